//! URL -> [`Route`]: the closed table of everything that may be asked here (contract, section 4).
//!
//! A path is compared with the table byte for byte, as it stood on the wire. Nothing is decoded, normalised or
//! case-folded first, so a spelling that only *means* a route (`/api/%63hat`, `//api/chat`, `/API/chat`,
//! `/api/chat/`) is no route: Ollama's own router would decode some of these and we would have judged another path than
//! the one it serves. What a backend is sent is rebuilt from the table; the only bytes of a client in it are a model
//! name or a digest of a few harmless characters.

use std::borrow::Cow;

use crate::refusal::Refusal;
use crate::wire::{Dialect, Endpoint};

/// The public prefix (contract, section 1). It is a name that must not change, so it is not a setting.
pub const BASE_PATH: &str = "/api/v1/ollama";

/// Longest query that is passed on, in bytes. Ollama reads none but a device's `ts`, so this is generous.
pub const QUERY_MAX_BYTES: usize = 8 * 1024;

/// Longest `{model}` segment, in bytes: a model and a tag of 80 each (ollama-wire, 6.1), a `:` and a source suffix.
const MODEL_MAX_BYTES: usize = 170;

/// Which spellings of the table are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteSettings {
    /// Serve Ollama's paths at the root too, so that a client only changes its host and port.
    pub drop_in: bool,
}

impl Default for RouteSettings {
    fn default() -> RouteSettings {
        RouteSettings { drop_in: true }
    }
}

/// What a method and a path ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// An endpoint of Ollama.
    Ollama {
        endpoint: Endpoint,
        /// The path for the backend, without a base path and without the query.
        upstream_path: Cow<'static, str>,
        /// `{model}` of `/v1/models/{model}`. Only its characters were checked: the model's grammar is `wire::model`'s.
        model: Option<String>,
        /// `{digest}` of `/api/blobs/{digest}`: `sha256:` and 64 lower-case hexadecimal digits.
        digest: Option<String>,
    },
    /// `POST /api/v1/auth/token`: answered here, never by a backend.
    Token,
    /// `GET /.well-known/jwks.json`: answered here.
    Jwks,
    /// An operation of OpenAI's or Bifrost's API that is not offered (400 `unsupported_operation`).
    Unsupported {
        /// Bifrost's `request_type`, such as `speech` or `file_upload`.
        operation: &'static str,
    },
    /// A route of Ollama that acts for the server's account on the internet (403 `egress_denied`).
    Egress,
}

/// Why a method and a path are no route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteError {
    /// Not in the table, or not in its one spelling: 404 `unknown_route`.
    Unknown,
    /// The path is known, the method is another: 405 with `Allow`.
    MethodNotAllowed { allow: &'static str },
}

impl From<RouteError> for Refusal {
    fn from(e: RouteError) -> Refusal {
        match e {
            RouteError::Unknown => Refusal::unknown_route(),
            RouteError::MethodNotAllowed { allow } => Refusal::method_not_allowed(allow),
        }
    }
}

/// What is wrong with a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryError {
    /// More than [`QUERY_MAX_BYTES`].
    TooLong,
    /// A byte that has no place in a query, or a `%` without two hexadecimal digits.
    BadByte,
}

impl From<QueryError> for Refusal {
    fn from(e: QueryError) -> Refusal {
        match e {
            QueryError::TooLong => Refusal::bad_framing("the query is longer than 8 KiB"),
            QueryError::BadByte => Refusal::bad_framing("the query holds a byte that must be percent-encoded"),
        }
    }
}

/// How a row's path is compared.
enum Path {
    /// These bytes.
    Is(&'static str),
    /// These bytes, then one model name.
    Model(&'static str),
    /// These bytes, then one digest.
    Digest(&'static str),
    /// These bytes alone, or followed by `/` and plain segments.
    Under(&'static str),
}

/// What a row leads to.
enum To {
    Ollama(Endpoint),
    Unsupported(&'static str),
    Egress,
}

/// A row of the table: the methods as an `Allow` header lists them ([`ANY`]: refused whatever the method), path,
/// target.
struct Row(&'static str, Path, To);

/// For rows that only ever lead to a refusal.
const ANY: &str = "";

/// Everything that Ollama serves and we know. The order is that of a linear search: what is asked often comes first.
#[rustfmt::skip]
const TABLE: &[Row] = {
    use Endpoint::*;
    use Path::{Digest, Is, Model as ModelName, Under};
    use To::*;
    &[
        // infer
        Row("POST",      Is("/api/chat"),            Ollama(Chat)),
        Row("POST",      Is("/v1/chat/completions"), Ollama(ChatCompletions)),
        Row("POST",      Is("/api/generate"),        Ollama(Generate)),
        Row("POST",      Is("/api/embed"),           Ollama(Embed)),
        Row("POST",      Is("/v1/embeddings"),       Ollama(OpenAiEmbeddings)),
        Row("POST",      Is("/v1/messages"),         Ollama(Messages)),
        Row("POST",      Is("/v1/responses"),        Ollama(Responses)),
        Row("POST",      Is("/v1/completions"),      Ollama(Completions)),
        Row("POST",      Is("/api/embeddings"),      Ollama(Embeddings)),
        // read and list
        Row("GET, HEAD", Is("/"),                    Ollama(Root)),
        Row("GET, HEAD", Is("/api/version"),         Ollama(Version)),
        Row("GET",       Is("/api/status"),          Ollama(Status)),
        Row("GET, HEAD", Is("/api/tags"),            Ollama(Tags)),
        Row("GET",       Is("/api/ps"),              Ollama(Ps)),
        Row("POST",      Is("/api/show"),            Ollama(Show)),
        Row("GET",       Is("/v1/models"),           Ollama(Models)),
        Row("GET",       ModelName("/v1/models/"),   Ollama(Model)),
        // manage
        Row("POST",      Is("/api/pull"),            Ollama(Pull)),
        Row("POST",      Is("/api/push"),            Ollama(Push)),
        Row("POST",      Is("/api/create"),          Ollama(Create)),
        Row("POST",      Is("/api/copy"),            Ollama(Copy)),
        Row("DELETE",    Is("/api/delete"),          Ollama(Delete)),
        Row("HEAD, POST", Digest("/api/blobs/"),     Ollama(Blob)),
        // egress
        Row(ANY, Under("/api/experimental"),         Egress),
        Row(ANY, Is("/api/me"),                      Egress),
        Row(ANY, Is("/api/signout"),                 Egress),
        Row(ANY, Under("/api/user/keys"),            Egress),
        // not offered; `operation` makes the finer words
        Row(ANY, Under("/v1/audio/speech"),          Unsupported("speech")),
        Row(ANY, Under("/v1/audio/transcriptions"),  Unsupported("transcription")),
        Row(ANY, Under("/v1/images/generations"),    Unsupported("image_generation")),
        Row(ANY, Under("/v1/images/edits"),          Unsupported("image_edit")),
        Row(ANY, Under("/v1/images/variations"),     Unsupported("image_variation")),
        Row(ANY, Under("/v1/videos"),                Unsupported("video")),
        Row(ANY, Under("/v1/rerank"),                Unsupported("rerank")),
        Row(ANY, Under("/v1/files"),                 Unsupported("file")),
        Row(ANY, Under("/v1/batches"),               Unsupported("batch")),
        Row(ANY, Under("/v1/containers"),            Unsupported("container")),
    ]
};

/// Finds the route of a request.
///
/// `path` is the raw path of the request target, without `?` and query. Bytes that are not ASCII match nothing.
pub fn resolve(method: &str, path: &str, settings: &RouteSettings) -> Result<Route, RouteError> {
    // Our own routes are of the origin, not of a base path.
    match path {
        "/api/v1/auth/token" => return only("POST", method, Route::Token),
        "/.well-known/jwks.json" => return only("GET", method, Route::Jwks),
        _ => {}
    }
    if below_base(path).is_none() && !settings.drop_in {
        return Err(RouteError::Unknown);
    }
    // Ollama's client begins with `HEAD <base>/`, and people type the base without the slash.
    let path = own_path(path);
    for Row(methods, pattern, to) in TABLE {
        let Some(rest) = pattern.rest_of(path) else { continue };
        if *methods != ANY && !methods.split(", ").any(|m| m == method) {
            return Err(RouteError::MethodNotAllowed { allow: methods });
        }
        return Ok(match to {
            To::Egress => Route::Egress,
            To::Unsupported(resource) => Route::Unsupported { operation: operation(resource, method, rest) },
            To::Ollama(endpoint) => pattern.ollama(*endpoint, rest),
        });
    }
    Err(RouteError::Unknown)
}

/// Ollama's own path, without a base path: what its client signs. Of a path that is no route it is that path.
pub fn own_path(path: &str) -> &str {
    match below_base(path) {
        Some("") => "/",
        Some(rest) => rest,
        None => path,
    }
}

/// What a record may hold of a path that leads nowhere: the longest beginning of whole segments that stands in the table, and `/*` for
/// what the client wrote behind it. A path is free text, and people paste tokens and questions into addresses.
pub fn recorded(path: &str) -> Cow<'_, str> {
    let below = below_base(path);
    let (base, own) = (path.len() - below.map_or(path.len(), str::len), below.unwrap_or(path));
    let table = TABLE.iter().map(|Row(_, pattern, _)| pattern.literal());
    let known = table.chain(["/api/v1/auth/token", "/.well-known/jwks.json", BASE_PATH]);
    let end = base + known.map(|literal| in_common(own, literal)).max().unwrap_or_default();
    match &path[end..] {
        "" => Cow::Borrowed(path),
        "/" if end == 0 => Cow::Borrowed(path),
        _ => Cow::Owned(format!("{}/*", &path[..end])),
    }
}

/// Bytes of `path` whose segments are also the first ones of `literal`.
fn in_common(path: &str, literal: &str) -> usize {
    let mut segments = path.split('/').zip(literal.trim_end_matches('/').split('/'));
    // Both begin with a slash, so the first one is empty, or there is nothing in common.
    match segments.next() {
        Some(("", "")) => segments.take_while(|(own, known)| own == known).map(|(own, _)| 1 + own.len()).sum(),
        _ => 0,
    }
}

/// Whose words a refusal uses where no endpoint is known: by the path alone, as far as it goes.
pub fn dialect_of(path: &str) -> Dialect {
    let path = below_base(path).unwrap_or(path);
    if path == "/v1/messages" || path.starts_with("/v1/messages/") {
        Dialect::Anthropic
    } else if path == "/v1" || path.starts_with("/v1/") {
        Dialect::OpenAi
    } else {
        Dialect::Native
    }
}

/// Checks a query, which is passed on as it is: the characters of RFC 3986 section 3.4, and the brackets that clients
/// write unescaped (`a[]=1`). A `#`, a space or a control character would let two parsers disagree on where it ends.
pub fn check_query(query: &str) -> Result<(), QueryError> {
    if query.len() > QUERY_MAX_BYTES {
        return Err(QueryError::TooLong);
    }
    let mut bytes = query.bytes();
    while let Some(b) = bytes.next() {
        let good = match b {
            b'%' => {
                let two = [bytes.next(), bytes.next()];
                two.iter().all(|d| d.is_some_and(|d| d.is_ascii_hexdigit()))
            }
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => true,
            _ => b"-._~!$&'()*+,;=:@/?[]".contains(&b),
        };
        if !good {
            return Err(QueryError::BadByte);
        }
    }
    Ok(())
}

impl Path {
    fn literal(&self) -> &'static str {
        match self {
            Path::Is(text) | Path::Model(text) | Path::Digest(text) | Path::Under(text) => text,
        }
    }

    /// What of `path` stands behind the row's own bytes, if the row is the one for it.
    fn rest_of<'p>(&self, path: &'p str) -> Option<&'p str> {
        match self {
            Path::Is(all) => (path == *all).then_some(""),
            Path::Model(start) => path.strip_prefix(start).filter(|m| is_model(m)),
            Path::Digest(start) => path.strip_prefix(start).filter(|d| is_digest(d)),
            Path::Under(start) => {
                let rest = path.strip_prefix(start)?;
                (rest.is_empty() || rest.strip_prefix('/').is_some_and(are_segments)).then_some(rest)
            }
        }
    }

    fn ollama(&self, endpoint: Endpoint, rest: &str) -> Route {
        let (upstream_path, model, digest) = match self {
            Path::Is(all) | Path::Under(all) => (Cow::Borrowed(*all), None, None),
            Path::Model(start) => (Cow::Owned(format!("{start}{rest}")), Some(rest.to_owned()), None),
            Path::Digest(start) => (Cow::Owned(format!("{start}{rest}")), None, Some(rest.to_owned())),
        };
        Route::Ollama { endpoint, upstream_path, model, digest }
    }
}

/// The path below the public prefix: empty, or beginning with `/`.
fn below_base(path: &str) -> Option<&str> {
    path.strip_prefix(BASE_PATH).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn only(allow: &'static str, method: &str, route: Route) -> Result<Route, RouteError> {
    if method == allow { Ok(route) } else { Err(RouteError::MethodNotAllowed { allow }) }
}

/// One segment of the characters of Ollama's names and `:`. A `/` in it is 404 at Ollama too (ollama-wire, section 2).
fn is_model(s: &str) -> bool {
    s.len() <= MODEL_MAX_BYTES
        && s.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b))
}

fn is_digest(s: &str) -> bool {
    s.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// Segments of unreserved characters and `:@`, none of them empty, `.` or `..`. These lead to a refusal only, but a
/// spelling that a normaliser would change is nobody's route.
fn are_segments(s: &str) -> bool {
    s.split('/').all(|segment| {
        !matches!(segment, "" | "." | "..")
            && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~:@".contains(&b))
    })
}

/// Bifrost's word for the operation (its `request_type`); `rest` is what follows the resource's path.
fn operation(resource: &'static str, method: &str, rest: &str) -> &'static str {
    let segments: Vec<&str> = rest.split('/').skip(1).collect();
    match (resource, method, segments.as_slice()) {
        ("file", "POST", _) => "file_upload",
        ("file", "DELETE", _) => "file_delete",
        ("file", _, []) => "file_list",
        ("file", _, [_, "content", ..]) => "file_content",
        ("file", ..) => "file_retrieve",
        ("batch", "POST", []) => "batch_create",
        ("batch", "POST", _) => "batch_cancel",
        ("batch", "DELETE", _) => "batch_delete",
        ("batch", _, []) => "batch_list",
        ("batch", _, [_, "results", ..]) => "batch_results",
        ("batch", ..) => "batch_retrieve",
        ("video", "POST", [_, "remix", ..]) => "video_remix",
        ("video", "POST", _) => "video_generation",
        ("video", "DELETE", _) => "video_delete",
        ("video", _, []) => "video_list",
        ("video", _, [_, "content", ..]) => "video_download",
        ("video", ..) => "video_retrieve",
        ("container", "POST", [_, "files", ..]) => "container_file_create",
        ("container", "POST", _) => "container_create",
        ("container", "DELETE", [_, "files", ..]) => "container_file_delete",
        ("container", "DELETE", _) => "container_delete",
        ("container", _, []) => "container_list",
        ("container", _, [_, "files"]) => "container_file_list",
        ("container", _, [_, "files", _, "content", ..]) => "container_file_content",
        ("container", _, [_, "files", ..]) => "container_file_retrieve",
        ("container", ..) => "container_retrieve",
        (resource, ..) => resource,
    }
}

/// Bifrost's word for the same operation with a stream for an answer, if it has one.
pub fn streamed(operation: &str) -> Option<&'static str> {
    Some(match operation {
        "speech" => "speech_stream",
        "transcription" => "transcription_stream",
        "image_generation" => "image_generation_stream",
        "image_edit" => "image_edit_stream",
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
