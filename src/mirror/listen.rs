//! HTTP for the backends: `GET` and `HEAD` of a manifest and of its blobs, below the namespace of a pull that runs. All else is 404.
//!
//! hyper's server. One request a connection, a head within [`HEAD`] and of [`HEAD_BYTES`]; a reply may take as long as the pull does, and no
//! longer.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::header::{ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, LOCATION, RANGE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::manifest::is_digest;
use super::registry::MANIFEST_TYPE;
use super::{MODEL, Mirror, Running};

/// For a whole head: backends are near.
const HEAD: Duration = Duration::from_secs(10);
const HEAD_BYTES: usize = 16 * 1024;
/// Sixteen ranges at once for each of some backends.
pub const CONNECTIONS: usize = 512;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What a target names. Compared as it was sent: nothing is decoded, so there is one way to write it.
struct Wanted<'a> {
    namespace: &'a str,
    what: What<'a>,
}

enum What<'a> {
    Manifest,
    Blob(&'a str),
}

impl Mirror {
    /// Answers one backend's connection, which ends with its pull.
    pub async fn serve(&self, socket: TcpStream, peer: SocketAddr) {
        // Of the pull that the connection reads. Its end is watched from outside: who takes no more bytes is asked for none.
        let (tell, mut told) = watch::channel(None::<watch::Receiver<bool>>);
        let answer = service_fn(|request: Request<Incoming>| {
            let reply = self.answer(&request, &tell);
            async { Ok::<_, Infallible>(reply) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(HEAD_BYTES)
            .keep_alive(false)
            .serve_connection(TokioIo::new(socket), answer);
        let over = async {
            let found = told.wait_for(Option::is_some).await.ok().and_then(|pull| pull.clone());
            match found {
                Some(mut over) => _ = over.wait_for(|over| *over).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = connection => if let Err(e) = ended {
                log::debug!("mirror: a connection of {peer} ended early: {e}");
            },
            () = over => {}
        }
    }

    fn answer(
        &self,
        request: &Request<Incoming>,
        tell: &watch::Sender<Option<watch::Receiver<bool>>>,
    ) -> Response<Body> {
        let head_only = match *request.method() {
            Method::GET => false,
            Method::HEAD => true,
            _ => {
                let mut reply = bare(StatusCode::METHOD_NOT_ALLOWED);
                reply.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
                return reply;
            }
        };
        let target = request.uri();
        let wanted = if target.query().is_none() && target.scheme().is_none() { read(target.path()) } else { None };
        let Some(wanted) = wanted else { return bare(StatusCode::NOT_FOUND) };
        let running = self.running.lock().get(wanted.namespace).map(Arc::clone);
        let Some(running) = running else { return bare(StatusCode::NOT_FOUND) };
        tell.send_replace(Some(running.over.subscribe()));
        match wanted.what {
            What::Manifest => running.manifest_reply(head_only),
            What::Blob(digest) if running.blobs.contains_key(digest) => {
                running.blob_reply(digest, target.path(), request.headers().get(RANGE), head_only)
            }
            What::Blob(_) => bare(StatusCode::NOT_FOUND),
        }
    }
}

impl Running {
    fn manifest_reply(&self, head_only: bool) -> Response<Body> {
        let bytes = &self.manifest.bytes;
        let mut reply = Response::new(if head_only { empty() } else { whole(bytes.clone()) });
        let headers = reply.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MANIFEST_TYPE));
        headers.insert(CONTENT_LENGTH, bytes.len().into());
        if let Ok(digest) = HeaderValue::from_str(&self.manifest.digest) {
            headers.insert("docker-content-digest", digest);
        }
        if !head_only {
            self.metrics.mirror_served(bytes.len() as u64);
        }
        reply
    }

    fn blob_reply(
        self: &Arc<Running>,
        digest: &str,
        path: &str,
        range: Option<&HeaderValue>,
        head_only: bool,
    ) -> Response<Body> {
        let Some(blob) = self.blobs.get(digest) else { return bare(StatusCode::NOT_FOUND) };
        // A HEAD has no ranges (RFC 9110, 14.2).
        let range = range.filter(|_| !head_only).and_then(|range| range.to_str().ok());
        let (status, from, end) = match range.map_or(Range::Whole, |range| Range::read(range, blob.size)) {
            Range::Whole => (StatusCode::OK, 0, blob.size),
            Range::Part { from, end } => (StatusCode::PARTIAL_CONTENT, from, end),
            Range::Nothing => {
                let mut reply = bare(StatusCode::RANGE_NOT_SATISFIABLE);
                insert(&mut reply, CONTENT_RANGE, &format!("bytes */{}", blob.size));
                return reply;
            }
        };
        let body = if head_only || from == end {
            empty()
        } else {
            self.want(blob);
            let (own, digest) = (Arc::clone(self), digest.to_owned());
            let pieces = stream::try_unfold((own, digest, from), move |(own, digest, at)| async move {
                if at == end {
                    return Ok(None);
                }
                let blob = own.blobs.get(&digest).ok_or_else(|| io::Error::other("no blob"))?;
                let piece = blob.piece(at, end).await?;
                own.metrics.mirror_served(piece.len() as u64);
                let at = at + piece.len() as u64;
                Ok::<_, io::Error>(Some((Frame::data(piece), (own, digest, at))))
            });
            StreamBody::new(pieces).boxed_unsync()
        };
        let mut reply = Response::new(body);
        *reply.status_mut() = status;
        let headers = reply.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(CONTENT_LENGTH, (end - from).into());
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        match status {
            StatusCode::PARTIAL_CONTENT => {
                insert(&mut reply, CONTENT_RANGE, &format!("bytes {from}-{}/{}", end - 1, blob.size));
            }
            // Ollama takes the place of the bytes from here, redirected or not, and fails where it is missing (0.17.4,
            // server/download.go: `return resp.Location()`).
            _ => insert(&mut reply, LOCATION, path),
        }
        reply
    }
}

/// `/v2/NAMESPACE/model/manifests/latest`, `/v2/NAMESPACE/model/blobs/DIGEST`.
fn read(path: &str) -> Option<Wanted<'_>> {
    let mut parts = path.strip_prefix("/v2/")?.split('/');
    let (namespace, model) = (parts.next()?, parts.next()?);
    let (kind, last) = (parts.next()?, parts.next()?);
    let what = match (kind, last) {
        ("manifests", "latest") => What::Manifest,
        ("blobs", digest) if is_digest(digest) => What::Blob(digest),
        _ => return None,
    };
    (model == MODEL && parts.next().is_none()).then_some(Wanted { namespace, what })
}

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
enum Range {
    /// Also where the header is to be ignored: another unit, several ranges, no numbers (RFC 9110, 14.2).
    Whole,
    /// From the first byte to behind the last.
    Part { from: u64, end: u64 },
    /// Nothing of it is there.
    Nothing,
}

impl Range {
    fn read(text: &str, size: u64) -> Range {
        let Some((first, last)) = text.strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
            return Range::Whole;
        };
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse().unwrap_or(u64::MAX)) // more than any number there is
        };
        match (number(first), number(last)) {
            (None, Some(0)) if first.is_empty() => Range::Nothing,
            (None, Some(_)) if first.is_empty() && size == 0 => Range::Nothing,
            (None, Some(last)) if first.is_empty() => Range::Part { from: size.saturating_sub(last), end: size },
            (Some(from), Some(last)) if from > last => Range::Whole,
            (Some(from), _) if from >= size && (last.is_empty() || number(last).is_some()) => Range::Nothing,
            (Some(from), Some(last)) => Range::Part { from, end: last.saturating_add(1).min(size) },
            (Some(from), None) if last.is_empty() => Range::Part { from, end: size },
            _ => Range::Whole,
        }
    }
}

fn insert(reply: &mut Response<Body>, name: http::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        reply.headers_mut().insert(name, value);
    }
}

fn bare(status: StatusCode) -> Response<Body> {
    let mut reply = Response::new(empty());
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_LENGTH, 0.into());
    reply
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_as_rfc_9110_has_it() {
        let part = |from, end| Range::Part { from, end };
        for (text, expected) in [
            ("bytes=0-9", part(0, 10)),
            ("bytes=5-5", part(5, 6)),
            ("bytes=90-", part(90, 100)),
            ("bytes=90-1000", part(90, 100)),
            ("bytes=0-99999999999999999999999", part(0, 100)),
            ("bytes=-10", part(90, 100)),
            ("bytes=-1000", part(0, 100)),
            ("bytes=100-", Range::Nothing),
            ("bytes=100-200", Range::Nothing),
            ("bytes=99999999999999999999999-", Range::Nothing),
            ("bytes=-0", Range::Nothing),
            ("bytes=9-5", Range::Whole),
            ("bytes=0-1,5-6", Range::Whole),
            ("bytes=-", Range::Whole),
            ("bytes=a-b", Range::Whole),
            ("bytes=+1-5", Range::Whole),
            ("bytes=1-5x", Range::Whole),
            ("bytes=200-5x", Range::Whole),
            ("lines=1-5", Range::Whole),
            ("", Range::Whole),
        ] {
            assert_eq!(Range::read(text, 100), expected, "{text:?}");
        }
        assert_eq!(Range::read("bytes=0-0", 0), Range::Nothing);
        assert_eq!(Range::read("bytes=-5", 0), Range::Nothing);
    }

    #[test]
    fn a_target_is_a_manifest_or_a_blob_and_nothing_else() {
        let digest = format!("sha256:{}", "a".repeat(64));
        assert!(matches!(read("/v2/x/model/manifests/latest"), Some(Wanted { namespace: "x", what: What::Manifest })));
        assert!(read(&format!("/v2/x/model/blobs/{digest}")).is_some());
        for bad in [
            "",
            "/",
            "/v2",
            "/v2/",
            "/v2/_catalog",
            "/v2/x/model/tags/list",
            "/v2/x/model/manifests/other",
            "/v2/x/other/manifests/latest",
            "/v2/x/model/manifests/latest/",
            "/v2//x/model/manifests/latest",
            "/v2/x/../x/model/manifests/latest",
            "/v2/x/model/blobs/sha256:..%2f..%2fetc%2fpasswd",
            "/v2/x/model/blobs/../../../etc/passwd",
            &format!("/v2/x/model/blobs/{}", digest.to_uppercase()),
            &format!("/v2/x/model/blobs/{digest}/"),
            &format!("/v2/x/model/blobs/{}", &digest[..70]),
        ] {
            assert!(read(bad).is_none(), "{bad}");
        }
    }
}
