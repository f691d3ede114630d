//! The reply on its way back: judged, cleaned, counted.

use std::time::Instant;

use bytes::Bytes;
use http::HeaderName;
use pingora::http::ResponseHeader;
use pingora::prelude::*;
use pingora_proxy::Session;

use super::Gateway;
use crate::door::Ticket;
use crate::exchange::Exchange;
use crate::refusal::Refusal;
use crate::wire::frames::Framing;
use crate::wire::meter::Meter;
use crate::wire::{Endpoint, Kind};

/// The headers of a backend that reach a client; everything else ends here.
static PASSED_ON: [HeaderName; 6] = [
    http::header::CONTENT_TYPE,
    http::header::CONTENT_LENGTH,
    http::header::TRANSFER_ENCODING,
    http::header::DATE,
    http::header::CACHE_CONTROL,
    http::header::ALLOW,
];

impl Gateway {
    pub(super) fn open_reply(&self, session: &Session, exchange: &mut Ticket, head: &mut ResponseHeader) -> Result<()> {
        if head.status.is_informational() && head.status != 101 {
            return Ok(()); // the door drops it
        }
        exchange.upstream_status = Some(head.status.as_u16());
        let kind = match judge(exchange, head) {
            Ok(kind) => kind,
            Err(refusal) => {
                exchange.refusal = Some(refusal);
                return Error::e_explain(ErrorType::Custom("Refused"), "the reply's head")
                    .map_err(|e: Box<Error>| e.into_up());
            }
        };
        self.clean(exchange, head)?;
        if session.req_header().version == http::Version::HTTP_10
            && !head.headers.contains_key(http::header::CONTENT_LENGTH)
        {
            // It knows no chunks: the connection's end is the body's (ollama-wire, section 1). Pingora would send chunks all the same.
            head.remove_header(&http::header::TRANSFER_ENCODING);
            exchange.link.close_connection();
        }
        let now = Instant::now();
        exchange.first_byte = Some(now);
        exchange.link.signal.progress.first_byte(now - exchange.began);
        exchange.status = exchange.upstream_status;
        if let (Some(endpoint), ReplyKind::Json(framing)) = (exchange.endpoint(), kind)
            && endpoint.kind() == Kind::Infer
            && head.status == 200
        {
            exchange.meter = Some(Meter::new(endpoint, framing));
        }
        let streamed = matches!(kind, ReplyKind::Json(Framing::Ndjson | Framing::Sse));
        if !streamed || head.status != 200 {
            exchange.hider = None; // an error, or a reply that is no stream: it passes as it is
        }
        if streamed && let Some(receipt) = &exchange.receipt {
            let model = exchange.canonical_model();
            receipt.stream_start(&crate::ledger::Entry {
                response_code: exchange.status,
                ttft_ms: exchange.first_byte.map(|at| (at - exchange.began).as_millis() as u64),
                ..exchange.entry(model.as_deref())
            });
        }
        Ok(())
    }

    fn clean(&self, exchange: &Exchange, head: &mut ResponseHeader) -> Result<()> {
        let mut clean = ResponseHeader::build(head.status, Some(10))?;
        for name in &PASSED_ON {
            if let Some(value) = head.headers.get(name) {
                clean.insert_header(name.clone(), value.clone())?;
            }
        }
        clean.insert_header("x-request-id", exchange.request_id.as_str())?;
        if let Some(lease) = &exchange.lease {
            clean.insert_header("x-behavry-backend", lease.backend().name.as_str())?;
            // There is no queue in front of a single backend.
            clean.insert_header("x-behavry-queue-ms", "0")?;
        }
        if let Some(runs) = exchange.runs_instead() {
            clean.insert_header("x-behavry-model", runs)?;
        }
        clean.set_version(head.version);
        *head = clean;
        Ok(())
    }
}

/// What kind of reply a head announces.
#[derive(Clone, Copy)]
enum ReplyKind {
    Json(Framing),
    /// `Ollama is running`, an empty body, a plain 404 of an unknown route.
    Text,
}

/// A reply that Ollama does not give is not passed on, and never quoted (contract, section 5: `bad_backend_reply`).
fn judge(exchange: &Exchange, head: &ResponseHeader) -> std::result::Result<ReplyKind, Refusal> {
    let status = head.status.as_u16();
    refuse_encoded(head)?;
    if status == 101 {
        return Err(Refusal::bad_backend_reply("the backend switches protocols")); // traps, Pingora 7
    }
    if (300..400).contains(&status) {
        return Err(Refusal::bad_backend_reply("the backend redirects")); // promises, Paths: it never reaches the client
    }
    let content_type = head.headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let media_type = content_type.split(';').next().unwrap_or("").trim();
    let endpoint = exchange.endpoint();
    match media_type {
        "application/json" | "application/x-ndjson" | "text/event-stream" => {
            Ok(ReplyKind::Json(Framing::of_content_type(content_type)))
        }
        // `GET /` and the plain words of Go's router for a route that this Ollama does not know.
        "text/plain" if endpoint == Some(Endpoint::Root) || matches!(status, 404 | 405) => Ok(ReplyKind::Text),
        // copy, delete and blobs answer with nothing; so does every HEAD.
        _ if endpoint.is_some_and(|endpoint| endpoint.kind() == Kind::Manage) && media_type.is_empty() => {
            Ok(ReplyKind::Text)
        }
        _ if exchange.method == "HEAD" => Ok(ReplyKind::Text),
        _ => Err(Refusal::bad_backend_reply("the reply is not of the type that Ollama gives")),
    }
}

/// What is encoded can be neither counted nor filtered.
pub(super) fn refuse_encoded(head: &ResponseHeader) -> std::result::Result<(), Refusal> {
    match head.headers.get(http::header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            Err(Refusal::bad_backend_reply("the reply is encoded, though that was declined"))
        }
        _ => Ok(()),
    }
}

/// Counts the bytes and passes them on, but for what the client did not ask for. Cannot fail and does not wait.
pub(super) fn pass(exchange: &mut Ticket, body: &mut Option<Bytes>, end: bool) {
    if let Some(bytes) = body.as_ref().filter(|bytes| !bytes.is_empty()) {
        exchange.last_byte = Some(Instant::now());
        if let Some(meter) = &mut exchange.meter {
            meter.feed(bytes);
            let records = meter.records();
            exchange.link.signal.progress.passed(records);
        }
    }
    let exchange: &mut Exchange = exchange;
    let Some(hider) = &mut exchange.hider else { return };
    let passed = body.take().map(|bytes| hider.pass(bytes)).unwrap_or_default();
    let rest = if end { hider.finish() } else { Bytes::new() };
    *body = match (passed.is_empty(), rest.is_empty()) {
        (_, true) => Some(passed),
        (true, false) => Some(rest),
        (false, false) => Some([passed, rest].concat().into()),
    };
}
