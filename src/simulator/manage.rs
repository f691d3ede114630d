//! Routes that change what the simulator holds: pull, push, create, copy, delete, blobs. Nothing is sent to anybody, and fetched only
//! from a registry on this machine ([`super::fetch`]): Ollama's own is pretended to answer, every other host to refuse the connection.

use std::collections::HashSet;

use parking_lot::Mutex;
use serde_json::Value;

use super::loose::Fields;
use super::models::{Model, Models, NoModel, display_name};
use super::refusal::Refusal;
use super::reply::{Framing, JSON, JSON_UTF8, Reply};
use super::text;

/// A management route's answer: lines of a stream, of which a caller without `stream` gets the last.
pub(super) struct Progress {
    pub streams: bool,
    pub lines: Vec<Vec<u8>>,
    /// The last line is an error.
    pub failed: bool,
}

impl Progress {
    fn new(streams: bool) -> Progress {
        Progress { streams, lines: Vec::new(), failed: false }
    }

    fn status(&mut self, status: &str) {
        let mut line = b"{\"status\":".to_vec();
        text::string(&mut line, status);
        line.push(b'}');
        self.lines.push(line);
    }

    fn layer(&mut self, status: &str, digest: &str, size_bytes: u64) {
        for completed in [size_bytes / 2, size_bytes] {
            let mut line = b"{\"status\":".to_vec();
            text::string(&mut line, status);
            text::print(
                &mut line,
                format_args!(",\"digest\":\"sha256:{digest}\",\"total\":{size_bytes},\"completed\":{completed}}}"),
            );
            self.lines.push(line);
        }
    }

    fn fail(mut self, error: &str) -> Progress {
        let mut line = b"{\"error\":".to_vec();
        text::string(&mut line, error);
        line.push(b'}');
        self.lines.push(line);
        self.failed = true;
        self
    }

    /// The reply to a caller that wants no stream.
    pub fn whole(&self) -> Reply {
        let status = if self.failed { 500 } else { 200 };
        Reply::new(status, JSON, self.lines.last().cloned().unwrap_or_default())
    }
}

/// `model`, else `name`.
pub(super) fn named<'a>(fields: &'a Fields, go_struct: &str) -> Result<&'a str, Refusal> {
    let text = |name| fields.text(name, go_struct).map_err(Refusal::binding);
    Ok(match text("model")? {
        Some(model) if !model.is_empty() => model,
        _ => text("name")?.unwrap_or_default(),
    })
}

pub(super) fn streams(fields: &Fields, go_struct: &str) -> Result<bool, Refusal> {
    fields.flag("stream", go_struct).map(|flag| flag.unwrap_or(true)).map_err(Refusal::binding)
}

/// Host and path of a name that is not in Ollama's own registry.
pub(super) fn elsewhere(display: &str) -> Option<(String, String, String)> {
    let (path, tag) = display.rsplit_once(':')?;
    let mut parts = path.splitn(2, '/');
    let (host, rest) = (parts.next()?, parts.next()?);
    rest.contains('/').then(|| (host.to_owned(), rest.to_owned(), tag.to_owned()))
}

pub(super) fn scheme(fields: &Fields) -> &'static str {
    let insecure = fields.plain("insecure").and_then(Value::as_bool).unwrap_or(false);
    if insecure { "http" } else { "https" }
}

pub(super) fn pull(models: &Models, fields: &Fields) -> Result<Progress, Refusal> {
    const GO: &str = "PullRequest";
    let name = display_name(named(fields, GO)?).map_err(bad_name)?;
    let mut progress = Progress::new(streams(fields, GO)?);
    progress.status("pulling manifest");
    if let Some((host, path, tag)) = elsewhere(&name) {
        let error = format!(
            "pull model manifest: Get \"{}://{host}/v2/{path}/manifests/{tag}\": dial tcp {host}: connect: connection refused",
            scheme(fields)
        );
        return Ok(progress.fail(&error));
    }
    models.add(&name).map_err(bad_name)?;
    let model = models.find(&name).map_err(bad_name)?;
    progress.layer(&format!("pulling {}", &model.digest[..12]), &model.digest, model.size_bytes);
    for status in ["verifying sha256 digest", "writing manifest", "success"] {
        progress.status(status);
    }
    Ok(progress)
}

pub(super) fn bad_name(_: NoModel) -> Refusal {
    Refusal::handler(400, "invalid model name")
}

pub(super) fn push(models: &Models, fields: &Fields) -> Result<Progress, Refusal> {
    const GO: &str = "PushRequest";
    let raw = named(fields, GO)?;
    let name = match display_name(raw) {
        Err(NoModel::Empty) => return Err(Refusal::handler(400, "model is required")),
        other => other.map_err(bad_name)?,
    };
    let mut progress = Progress::new(streams(fields, GO)?);
    progress.status("retrieving manifest");
    let digest = models.find(&name).map(|model| model.digest);
    if let Some((host, path, _)) = elsewhere(&name) {
        let digest = digest.unwrap_or_else(|_| "0".repeat(64));
        let error = format!(
            "Head \"{}://{host}/v2/{path}/blobs/sha256:{digest}\": dial tcp {host}: connect: connection refused",
            scheme(fields)
        );
        return Ok(progress.fail(&error));
    }
    let Ok(digest) = digest else {
        return Ok(progress.fail(&format!("couldn't find model '{raw}'")));
    };
    progress.layer(&format!("pushing {}", &digest[..12]), &digest, 4096);
    for status in ["pushing manifest", "success"] {
        progress.status(status);
    }
    Ok(progress)
}

pub(super) fn create(models: &Models, fields: &Fields) -> Result<Progress, Refusal> {
    const GO: &str = "CreateRequest";
    let name = display_name(named(fields, GO)?).map_err(bad_name)?;
    let mut progress = Progress::new(streams(fields, GO)?);
    let from = fields.text("from", GO).map_err(Refusal::binding)?.unwrap_or_default();
    if from.is_empty() {
        return Ok(progress.fail("unknown type"));
    }
    let source = match models.find(from) {
        Ok(source) => source,
        Err(NoModel::Absent) => {
            // What is not there is pulled first.
            progress.status("pulling manifest");
            let from = display_name(from).map_err(bad_name)?;
            let Some((host, path, tag)) = elsewhere(&from) else {
                return Ok(progress.fail("pull model manifest: file does not exist"));
            };
            return Ok(progress.fail(&format!(
                "pull model manifest: Get \"https://{host}/v2/{path}/manifests/{tag}\": dial tcp {host}: connect: connection refused"
            )));
        }
        Err(why) => return Err(bad_name(why)),
    };
    models.copy(&source, &name).map_err(bad_name)?;
    progress.status(&format!("using existing layer sha256:{}", source.digest));
    progress.status(&format!("using existing layer sha256:{}", digest_of("template", &source)));
    for part in ["system", "parameters"] {
        if fields.plain(part).is_some() {
            progress.status(&format!("creating new layer sha256:{}", digest_of(part, &source)));
        }
    }
    for status in ["writing manifest", "success"] {
        progress.status(status);
    }
    Ok(progress)
}

fn digest_of(part: &str, model: &Model) -> String {
    text::hex(&<sha2::Sha256 as sha2::Digest>::digest(format!("{part}\n{}", model.digest)))
}

/// The reply to a `create` without a usable source; Ollama answers it before the stream begins.
pub(super) fn create_refused(progress: &Progress) -> Option<Reply> {
    let only = progress.failed && progress.lines.len() == 1;
    only.then(|| Reply::new(400, JSON, progress.lines[0].clone()))
}

pub(super) fn copy(models: &Models, fields: &Fields) -> Result<Reply, Refusal> {
    const GO: &str = "CopyRequest";
    let text = |name| fields.text(name, GO).map(Option::unwrap_or_default).map_err(Refusal::binding);
    let (source, destination) = (text("source")?, text("destination")?);
    let found = models.find(source).map_err(|why| match why {
        NoModel::Absent => Refusal::handler(404, format!("model \"{source}\" not found")),
        _ => Refusal::handler(400, format!("source \"{source}\" is invalid")),
    })?;
    let invalid = |_| Refusal::handler(400, format!("destination \"{destination}\" is invalid"));
    models.copy(&found, destination).map_err(invalid)?;
    Ok(Reply::empty(200))
}

pub(super) fn delete(models: &Models, fields: &Fields) -> Result<Reply, Refusal> {
    let raw = named(fields, "DeleteRequest")?;
    let model = models.find(raw).map_err(|why| {
        let absent = Refusal::handler(404, format!("model '{raw}' not found"));
        Refusal::no_model(why, Refusal::handler(400, "model is required"), absent)
    })?;
    models.remove(&model);
    Ok(Reply::empty(200))
}

/// The digests of blobs that were sent; their bytes are not kept.
#[derive(Default)]
pub(super) struct Blobs(Mutex<HashSet<String>>);

const MOST_BLOBS: usize = 100_000;

impl Blobs {
    /// `sha256:` and 64 hexadecimal digits.
    pub fn is_digest(digest: &str) -> bool {
        digest
            .strip_prefix("sha256:")
            .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
    }

    pub fn head(&self, digest: &str) -> Reply {
        if self.has(digest) {
            return Reply { framing: Framing::Bare, ..Reply::empty(200) };
        }
        let mut body = b"{\"error\":".to_vec();
        text::string(&mut body, &format!("blob \"{digest}\" not found"));
        body.push(b'}');
        Reply::new(404, JSON_UTF8, body)
    }

    pub fn has(&self, digest: &str) -> bool {
        self.0.lock().contains(digest)
    }

    /// A blob came whole, and its SHA-256 was found to be this.
    pub fn keep(&self, digest: &str) {
        let mut blobs = self.0.lock();
        if blobs.len() < MOST_BLOBS {
            blobs.insert(digest.to_owned());
        }
    }

    /// A blob came whole, with this SHA-256.
    pub fn store(&self, digest: &str, sha256: &[u8; 32]) -> Result<Reply, Refusal> {
        let own = format!("sha256:{}", text::hex(sha256));
        if own != digest.to_ascii_lowercase() {
            return Err(Refusal::handler(400, format!("digest mismatch, expected \"{digest}\", got \"{own}\"")));
        }
        self.keep(&own);
        Ok(Reply::empty(201))
    }
}
