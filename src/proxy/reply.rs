//! The reply on its way back: judged, cleaned, counted.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderName;
use pingora::http::ResponseHeader;
use pingora::prelude::*;
use pingora_proxy::Session;

use super::Gateway;
use super::elsewhere::{ELSEWHERE, failure_of};
use super::queue::sees_placement;
use crate::door::{AGAIN, REFUSED, Ticket};
use crate::exchange::{Exchange, now_s};
use crate::refusal::Refusal;
use crate::upstream::health::Failed;
use crate::upstream::scheduler::Measured;
use crate::wire::frames::Framing;
use crate::wire::mend::Mender;
use crate::wire::meter::Meter;
use crate::wire::rewrite::Scrubber;
use crate::wire::whole::Whole;
use crate::wire::{Endpoint, Kind, convert};

/// What the audit says of a reply that ended without its end.
const NO_END: &str = "the backend's reply has no end";
/// And of one that had to be held, and could not be.
const NO_ROOM: &str = "replies take all of limits.replies_in_memory_bytes";

/// The headers of a backend that reach a client; everything else ends here.
static PASSED_ON: [HeaderName; 7] = [
    http::header::CONTENT_TYPE,
    http::header::CONTENT_LENGTH,
    http::header::TRANSFER_ENCODING,
    http::header::DATE,
    http::header::CACHE_CONTROL,
    http::header::ALLOW,
    http::header::RETRY_AFTER,
];

impl Gateway {
    pub(super) fn open_reply(&self, session: &Session, exchange: &mut Ticket, head: &mut ResponseHeader) -> Result<()> {
        if head.status.is_informational() && head.status != 101 {
            return Ok(()); // the door drops it
        }
        self.judge_unknown_route(exchange, head)?;
        exchange.upstream_status = Some(head.status.as_u16());
        let kind = match judge(exchange, head) {
            Ok(kind) => {
                self.judge_backend(exchange, head)?;
                kind
            }
            Err(_) if self.go_elsewhere(exchange, Failed::Garbage) => return begin_anew(),
            Err(refusal) => {
                exchange.refusal = Some(refusal);
                return Error::e_explain(REFUSED, "the reply's head").map_err(|e: Box<Error>| e.into_up());
            }
        };
        // Until here another backend may still have to be asked, or for another model.
        exchange.convertible = None;
        exchange.unfitted = None;
        self.clean(exchange, head)?;
        if matches!(kind, ReplyKind::Json(Framing::Ndjson | Framing::Sse)) && head.status == 200 {
            unbind_length(session, head)?;
        }
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
        exchange.status = exchange.upstream_status.filter(|_| exchange.link.client_left().is_none());
        if let (Some(endpoint), ReplyKind::Json(framing)) = (exchange.endpoint(), kind)
            && endpoint.kind() == Kind::Infer
            && head.status == 200
        {
            // What comes is counted and judged by what was asked, and converted behind that.
            let conversion = exchange.conversion.as_ref().filter(|_| framing != Framing::Ndjson);
            let endpoint = if conversion.is_some() { Endpoint::ChatCompletions } else { endpoint };
            exchange.converted = conversion.is_some();
            if exchange.converted && framing == Framing::Json {
                head.remove_header(&http::header::CONTENT_LENGTH); // the door gives it its own
                head.remove_header(&http::header::TRANSFER_ENCODING);
            }
            if framing == Framing::Sse
                && let Some(conversion) = exchange.conversion.take()
            {
                exchange.events = Some(convert::Events::new(conversion, self.site.held_reply_bytes));
            }
            exchange.meter = Some(Meter::new(endpoint, framing));
            if let (Some(lease), Some(model)) = (&exchange.lease, exchange.canonical_model()) {
                lease.first_byte();
                lease.backend().catalogue.note_loaded(&model);
            }
            if framing == Framing::Json {
                exchange.whole = Some(Whole::new(endpoint, self.site.held_reply_bytes));
                exchange.whole_held = Some(self.site.replies.share());
                exchange.link.hold_head();
                exchange.status = None; // nothing of it is sent yet
            } else {
                exchange.mender = Some(Mender::new(endpoint, framing));
            }
        }
        exchange.scrubber = (head.status == 401).then(Scrubber::default);
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

    /// What the status says of the backend: an error may be another backend's chance, while nothing of the reply has gone to the client.
    fn judge_backend(&self, exchange: &mut Ticket, head: &ResponseHeader) -> Result<()> {
        let Some(lease) = &exchange.lease else { return Ok(()) };
        let Some(failed) = failure_of(head, lease) else {
            self.note_succeeded(lease);
            return Ok(());
        };
        if self.go_elsewhere(exchange, failed) { begin_anew() } else { Ok(()) }
    }

    /// The plain 404 of Go's router for a route of inference: an Ollama that is too old for it. Nothing was said to the client, so
    /// `/v1/responses` is sent once more, converted. Any other is another backend's chance, and then a refusal that says which
    /// version it needs, in the caller's dialect.
    fn judge_unknown_route(&self, exchange: &mut Ticket, head: &ResponseHeader) -> Result<()> {
        let content_type = head.headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let is_unknown = head.status == 404 && content_type.is_some_and(|it| it.starts_with("text/plain"));
        let Some(endpoint) = exchange.endpoint().filter(|_| is_unknown) else { return Ok(()) };
        let (asked, path) = match (&exchange.conversion, &exchange.target) {
            (Some(_), _) => (Endpoint::ChatCompletions, convert::TARGET.to_owned()),
            (None, Some(target)) => (endpoint, target.to_string()),
            (None, None) => return Ok(()),
        };
        if asked == Endpoint::Responses && exchange.convertible.is_some() {
            if let Some(lease) = &exchange.lease {
                lease.backend().note_without_responses();
            }
            return Error::e_explain(AGAIN, "the backend has no such route").map_err(|e: Box<Error>| e.into_up());
        }
        let Some(since) = asked.since() else { return Ok(()) };
        if self.go_elsewhere(exchange, Failed::NoRoute) {
            return begin_anew();
        }
        exchange.upstream_status = Some(head.status.as_u16());
        exchange.refusal = Some(Refusal::route_of_a_newer_ollama(&path, since));
        Error::e_explain(REFUSED, "the backend has no such route").map_err(|e: Box<Error>| e.into_up())
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
            clean.insert_header("x-behavry-queue-ms", exchange.queued.unwrap_or_default().as_millis().to_string())?;
            if let Some(placement) = exchange.placement.as_deref().filter(|_| sees_placement(exchange)) {
                clean.insert_header("x-behavry-placement", placement)?;
            }
        }
        if let Some(runs) = exchange.runs_instead() {
            clean.insert_header("x-behavry-model", runs)?;
        }
        clean.set_version(head.version);
        *head = clean;
        Ok(())
    }
}

fn begin_anew() -> Result<()> {
    Error::e_explain(ELSEWHERE, "another backend is tried").map_err(|e: Box<Error>| e.into_up())
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
    let infers = exchange.endpoint().is_some_and(|endpoint| endpoint.kind() == Kind::Infer);
    if infers && status == 200 && head.headers.get(http::header::CONTENT_LENGTH).is_some_and(|length| length == "0") {
        return Err(Refusal::backend_cut(NO_END)); // no hook sees the end of a body that there is not
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

/// A stream with a length (Ollama gives one to a stream of one write) gets chunks instead: what is hidden, or put behind it, changes it.
fn unbind_length(session: &Session, head: &mut ResponseHeader) -> Result<()> {
    if head.remove_header(&http::header::CONTENT_LENGTH).is_some()
        && session.req_header().version == http::Version::HTTP_11
    {
        head.insert_header(http::header::TRANSFER_ENCODING, "chunked")?;
    }
    Ok(())
}

/// Counts the bytes and passes them on, but for what the client did not ask for, and with what it has to be told. Cannot fail and
/// does not wait.
pub(super) fn pass(exchange: &mut Ticket, body: &mut Option<Bytes>, end: bool) {
    if let Some(bytes) = body.as_ref().filter(|bytes| !bytes.is_empty()) {
        exchange.last_byte = Some(Instant::now());
        if let Some(meter) = &mut exchange.meter {
            meter.feed(bytes);
            let records = meter.records();
            exchange.link.signal.progress.passed(records);
        }
    }
    if end {
        free_slot(exchange);
    }
    if let Some(scrubber) = &mut exchange.scrubber {
        let passed = scrubber.pass(&body.take().unwrap_or_default());
        *body = Some(if end { joined(passed, scrubber.finish()) } else { passed });
        return;
    }
    if exchange.whole.is_some() {
        return pass_whole(exchange, body, end);
    }
    let facts: &mut Exchange = exchange;
    if facts.mender.is_none() && facts.hider.is_none() {
        return;
    }
    let mut passed = body.take().unwrap_or_default();
    if let Some(mender) = &mut facts.mender {
        passed = mender.pass(passed);
        if end {
            passed = joined(passed, mender.finish());
        }
    }
    if let Some(hider) = &mut facts.hider {
        passed = hider.pass(passed);
        if end {
            passed = joined(passed, hider.finish());
        }
    }
    if let Some(events) = &mut facts.events {
        let mut converted = events.pass(&passed, now_s());
        if end {
            converted.extend(events.finish(now_s()));
        }
        passed = converted.into();
    }
    if end && let Some(words) = say_what_is_missing(facts) {
        passed = joined(passed, words.into());
    }
    *body = Some(passed);
    if let Some(events) = facts.events.as_ref().filter(|events| events.gave_up()) {
        facts.refusal = events.failed().map(Refusal::backend_cut);
        exchange.link.spoil(); // the backend may go on for ever
    }
}

/// The backend has said everything: whoever waits for its slot is next, however long this client takes to read.
fn free_slot(exchange: &mut Exchange) {
    let usage = exchange.meter.as_mut().map(Meter::finish);
    let Some(lease) = &exchange.lease else { return };
    let duration = |nanoseconds: Option<u64>| nanoseconds.map(Duration::from_nanos);
    lease.ended(usage.filter(|usage| usage.terminal && !usage.error_frame && !usage.rendered).map(|usage| Measured {
        output_tokens: usage.output_tokens,
        load: duration(usage.load_duration_ns),
        prefill: duration(usage.prompt_eval_duration_ns),
        generate: duration(usage.eval_duration_ns),
    }));
}

/// On the `/v1` routes Ollama swallows what fails in the middle, and on its own some of it: the stream just ends (ollama-wire 0.2
/// and 0.3). The client is told, as by any other cut.
fn say_what_is_missing(exchange: &mut Exchange) -> Option<Vec<u8>> {
    let (meter, mender) = (exchange.meter.as_mut()?, exchange.mender.as_ref()?);
    let usage = meter.finish();
    let told = usage.error_frame || mender.told_error();
    match &exchange.events {
        Some(events) if events.has_ended() => {
            if let Some(cause) = events.failed().filter(|_| !told) {
                exchange.refusal = Some(Refusal::backend_cut(cause));
            }
            return None;
        }
        Some(_) => {} // whatever came: the client's stream has no end
        None if usage.terminal || told || usage.rendered => return None,
        None => {}
    }
    let refusal = Refusal::backend_cut(NO_END);
    let (sse, mid_record) = (mender.is_events(), mender.is_mid_record());
    let words = exchange.last_words(&refusal, sse, mid_record);
    exchange.refusal = Some(refusal);
    Some(words)
}

/// What is not streamed comes in one go and passes in one go, if it is an answer.
fn pass_whole(exchange: &mut Ticket, body: &mut Option<Bytes>, end: bool) {
    let facts: &mut Exchange = exchange;
    let Some(whole) = &mut facts.whole else { return };
    if let Some(bytes) = body.take() {
        let has_room = facts.whole_held.as_mut().is_none_or(|held| held.grow(bytes.len()).is_ok());
        let pushed = whole.push(&bytes).and_then(|()| if has_room { Ok(()) } else { Err(whole.take()) });
        if let Err(unjudged) = pushed {
            facts.whole_held = None;
            if facts.converted {
                facts.refusal = Some(Refusal::backend_cut(if has_room { convert::TOO_LONG } else { NO_ROOM }));
                exchange.link.spoil();
                return;
            }
            facts.whole = None;
            facts.status = facts.upstream_status;
            *body = Some(unjudged);
            return;
        }
    }
    if !end {
        return;
    }
    facts.whole_held = None; // from now on it is unsent
    let usage = facts.meter.as_mut().map(|meter| meter.finish()).unwrap_or_default();
    let mut answer = if whole.is_answer(&usage) { Ok(whole.take()) } else { Err(NO_END) };
    if let (Ok(chat), Some(conversion)) = (&answer, facts.conversion.take()) {
        answer = match convert::whole(&conversion, chat, whole.limit_bytes(), now_s()) {
            Ok(response) => Ok(response.into()),
            Err(convert::NoResponse::NoChat) => Err(NO_END),
            Err(convert::NoResponse::TooLong) => Err(convert::TOO_LONG),
        };
    }
    match answer {
        Ok(answer) => {
            *body = Some(answer);
            facts.status = facts.upstream_status;
        }
        Err(cause) => {
            exchange.refusal = Some(Refusal::backend_cut(cause));
            exchange.link.spoil();
        }
    }
}

fn joined(first: Bytes, second: Bytes) -> Bytes {
    match (first.is_empty(), second.is_empty()) {
        (_, true) => first,
        (true, false) => second,
        (false, false) => [first, second].concat().into(),
    }
}
