//! A pull that is one: from a registry on this machine, over http, as Ollama does it.
//!
//! Source: ollama 0.17.4, `server/images.go` and `server/download.go`: the manifest; for each blob that is not here a HEAD for its size,
//! a GET that is not read and whose reply must say where the bytes are (`Location`), and from there ranges, at once; then the SHA-256 of
//! each. What Ollama does besides, and this does not: going on with what a broken pull left, and tries of a range after the first.

use std::sync::Arc;

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::Sender;
use tokio::task::JoinSet;

use super::Shared;
use super::loose::Fields;
use super::manage::{bad_name, elsewhere, named, scheme, streams};
use super::models::display_name;
use super::refusal::Refusal;
use super::text;

/// Ranges of a blob, at most; Ollama's are a hundred megabytes each.
const PARTS: usize = 16;
/// A model for tests.
const MOST_BYTES: usize = 256 << 20;

/// A pull from `host`, which is on this machine.
pub(super) struct Fetch {
    host: String,
    path: String,
    tag: String,
    name: String,
    pub streams: bool,
}

impl Fetch {
    /// `None`: the model's registry is not on this machine, or not to be asked by http.
    pub fn of(fields: &Fields) -> Result<Option<Fetch>, Refusal> {
        const GO: &str = "PullRequest";
        let name = display_name(named(fields, GO)?).map_err(bad_name)?;
        let Some((host, path, tag)) = elsewhere(&name).filter(|(host, ..)| host.starts_with("127.0.0.1:")) else {
            return Ok(None);
        };
        let streams = streams(fields, GO)?;
        Ok((scheme(fields) == "http").then_some(Fetch { host, path, tag, name, streams }))
    }

    /// Tells each line of progress, of which the last is `success` or an error.
    pub async fn run(self, shared: &Shared, tell: Sender<Vec<u8>>) {
        if let Err(error) = self.fetch(shared, &tell).await {
            let _ = tell.send(line("error", &error)).await;
        }
    }

    async fn fetch(&self, shared: &Shared, tell: &Sender<Vec<u8>>) -> Result<(), String> {
        let say = async |status: &str| _ = tell.send(line("status", status)).await;
        say("pulling manifest").await;
        let target = format!("/v2/{}/manifests/{}", self.path, self.tag);
        let named = |e: String| format!("pull model manifest: Get \"http://{}{target}\": {e}", self.host);
        let reply = ask(&self.host, "GET", &target, None, true).await.map_err(named)?;
        match reply.status {
            200 => {}
            404 => return Err("pull model manifest: file does not exist".to_owned()),
            status => return Err(format!("pull model manifest: {status}: ")),
        }
        let manifest: Value = serde_json::from_slice(&reply.body).map_err(|e| format!("pull model manifest: {e}"))?;
        let layers = manifest["layers"].as_array().cloned().unwrap_or_default();
        let mut size_bytes = 0;
        for layer in layers.iter().chain([&manifest["config"]]) {
            let Some(digest) = layer["digest"].as_str() else { continue };
            size_bytes += layer["size"].as_u64().unwrap_or(0);
            if !shared.blobs.has(digest) {
                self.blob(digest, tell).await?;
                shared.blobs.keep(digest);
            }
        }
        for status in ["verifying sha256 digest", "writing manifest"] {
            say(status).await;
        }
        let digest = text::hex(&Sha256::digest(&reply.body));
        shared.models.add_fetched(&self.name, digest, size_bytes).map_err(|_| "invalid model name".to_owned())?;
        say("success").await;
        Ok(())
    }

    async fn blob(&self, digest: &str, tell: &Sender<Vec<u8>>) -> Result<(), String> {
        let target = format!("/v2/{}/blobs/{digest}", self.path);
        let head = ask(&self.host, "HEAD", &target, None, false).await?;
        if head.status != 200 {
            return Err(format!("{}: ", head.status));
        }
        let size = head.length.filter(|size| *size <= MOST_BYTES).ok_or("a blob without a size")?;
        // Closed without being read.
        let direct = ask(&self.host, "GET", &target, None, false).await?;
        let location = match direct.status {
            200 | 307 => direct.location.ok_or("http: no Location header in response")?,
            status => return Err(format!("unexpected status code {status}")),
        };
        let (host, target) =
            match location.strip_prefix("http://").map(|rest| rest.split_once('/').unwrap_or((rest, ""))) {
                Some((host, path)) => (host.to_owned(), format!("/{path}")),
                None => (self.host.clone(), location),
            };
        let place = Arc::new((host, target));
        let part = size.div_ceil(PARTS).max(1);
        let mut parts = JoinSet::new();
        for from in (0..size).step_by(part) {
            let (place, end) = (Arc::clone(&place), (from + part).min(size));
            parts.spawn(async move {
                let reply = ask(&place.0, "GET", &place.1, Some((from, end - 1)), true).await?;
                if reply.body.len() < end - from {
                    return Err("max retries exceeded: unexpected EOF".to_owned());
                }
                Ok((from, reply.body[..end - from].to_vec()))
            });
        }
        let (mut bytes, mut completed) = (vec![0; size], 0);
        while let Some(part) = parts.join_next().await {
            let (from, part) = part.map_err(|e| e.to_string())??;
            bytes[from..from + part.len()].copy_from_slice(&part);
            completed += part.len();
            let mut line = b"{\"status\":".to_vec();
            text::string(&mut line, &format!("pulling {}", digest.get(7..19).unwrap_or(digest)));
            text::print(
                &mut line,
                format_args!(",\"digest\":\"{digest}\",\"total\":{size},\"completed\":{completed}}}"),
            );
            let _ = tell.send(line).await;
        }
        let own = format!("sha256:{}", text::hex(&Sha256::digest(&bytes)));
        if own != digest {
            return Err(format!("digest mismatch, file must be downloaded again: want {digest}, got {own}"));
        }
        Ok(())
    }
}

struct Reply {
    status: u16,
    length: Option<usize>,
    location: Option<String>,
    body: Vec<u8>,
}

/// One request on a connection of its own. `read`: the body too, as far as it comes.
async fn ask(
    host: &str,
    method: &str,
    target: &str,
    range: Option<(usize, usize)>,
    read: bool,
) -> Result<Reply, String> {
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::ConnectionRefused => format!("dial tcp {host}: connect: connection refused"),
        _ => e.to_string(),
    };
    let mut stream = TcpStream::connect(host).await.map_err(failed)?;
    let range = range.map_or(String::new(), |(from, last)| format!("Range: bytes={from}-{last}\r\n"));
    let head = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n{range}Connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.map_err(failed)?;
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = memchr::memmem::find(&bytes, b"\r\n\r\n") {
            break end + 4;
        }
        if bytes.len() > 64 * 1024 || stream.read_buf(&mut bytes).await.map_err(failed)? == 0 {
            return Err("EOF".to_owned());
        }
    };
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Response::new(&mut headers);
    parsed.parse(&bytes[..end]).map_err(|e| e.to_string())?;
    let header = |name: &str| {
        let found = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(found.value).ok().map(str::to_owned)
    };
    let length: Option<usize> = header("content-length").and_then(|length| length.parse().ok());
    let (status, location) = (parsed.code.unwrap_or(0), header("location"));
    let mut body = bytes.split_off(end);
    if read {
        let wanted = length.unwrap_or(MOST_BYTES).min(MOST_BYTES);
        while body.len() < wanted {
            match stream.read_buf(&mut body).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
    Ok(Reply { status, length, location, body })
}

fn line(key: &str, value: &str) -> Vec<u8> {
    let mut line = format!("{{\"{key}\":").into_bytes();
    text::string(&mut line, value);
    line.push(b'}');
    line
}
