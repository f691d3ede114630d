//! One pull for all backends that should hold a model: one after another, told to the client as one.
//!
//! An Ollama gives away none of what it holds, so each backend fetches for itself, or all of them from the mirror where there is one
//! (`docs/models.md`). The client sees Ollama's own progress, a line for each backend in front of it, and one `success` once all of them
//! have the model.
//!
//! - [`mirrored`]: a backend that pulls from the mirror.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use pingora::http::ResponseHeader;
use pingora_proxy::Session;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use self::mirrored::Begun;
use super::Gateway;
use super::admit::Admitted;
use super::answer::{answer, json_head};
use super::views::gone;
use crate::door::Ticket;
use crate::exchange::Fault;
use crate::mirror::Pull;
use crate::refusal::Refusal;
use crate::upstream::Backend;
use crate::upstream::client::{Call, ClientError};
use crate::wire::rewrite::{Assignment, set};

mod mirrored;

/// No pull takes longer; its silences are bounded as everybody's are.
const WITHIN: Duration = Duration::from_secs(86_400);
/// Pieces of a reply on their way to the client.
const PIECES: usize = 32;
/// A line of progress has some two hundred bytes.
const LINE_BYTES: usize = 64 * 1024;

/// What one backend's reply came to.
#[derive(Default)]
struct Told {
    success: bool,
    /// Ollama's own words.
    error: Option<String>,
    /// The client has left.
    left: bool,
}

impl Gateway {
    /// Permit and receipt are there.
    pub(super) async fn pull_everywhere(
        &self,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> Result<Admitted, Refusal> {
        let Some(model) = exchange.model().cloned() else {
            return Err(Refusal::invalid_body("`model` is missing; name the one to pull"));
        };
        let streams = exchange.ask.as_ref().is_some_and(|ask| ask.stream == Some(true));
        let sent = exchange.link.body().ok_or_else(Refusal::internal_error)?;
        // Its progress is a sign of life, wanted by the client or not.
        let streamed = [Assignment { within: None, name: "stream", value: "true" }];
        let body = set(&sent, &streamed).map_or(sent, Bytes::from);
        let holders = self.site.pool.holders(&model);
        if holders.iter().all(|backend| backend.is_drained()) {
            return Err(Refusal::no_backend());
        }
        exchange.dispatched = Some(Instant::now());
        exchange.attempts = 1;
        if streams {
            begin(session, exchange).await.map_err(|_| Refusal::internal_error())?;
        }
        let pulling = holders.iter().filter(|backend| !backend.is_drained()).count();
        let pull = match self.begin_mirror(&model, &body, pulling, session).await {
            Begun::Not => None,
            Begun::Pull(pull) => Some(pull),
            Begun::Declined(why) => {
                let line = json!({ "status": format!("each backend fetches for itself: {why}") });
                if streams && write(session, &line).await.is_err() {
                    exchange.fault = Some(Fault::Client);
                    return Ok(Admitted::Answered);
                }
                None
            }
            Begun::Left => {
                exchange.fault = Some(Fault::Client);
                return Ok(Admitted::Answered);
            }
        };
        let (mut failures, mut left_out) = (Vec::new(), Vec::new());
        for (place, backend) in holders.iter().enumerate() {
            let is_drained = backend.is_drained();
            let what = if is_drained { ", left out since it is drained" } else { "" };
            let status = format!("backend {} ({} of {}){what}", backend.name, place + 1, holders.len());
            let line = json!({ "status": status });
            if streams && write(session, &line).await.is_err() {
                exchange.fault = Some(Fault::Client);
                return Ok(Admitted::Answered);
            }
            if is_drained {
                left_out.push(backend.name.as_str());
                continue;
            }
            exchange.named_backend = Some(backend.name.clone());
            self.lease(exchange)?;
            let told = match &pull {
                Some(pull) => self.pull_mirrored(pull, backend, &model, body.clone(), streams, session, exchange).await,
                None => self.pull_on(backend, body.clone(), streams, None, session, exchange).await,
            };
            exchange.lease = None;
            match told {
                Ok(told) if told.left => {
                    exchange.fault = Some(Fault::Client);
                    return Ok(Admitted::Answered);
                }
                Ok(told) if told.success => {}
                Ok(told) => {
                    let why = told.error.unwrap_or_else(|| "its reply has no end".to_owned());
                    failures.push(format!("backend {}: {why}", backend.name));
                }
                Err(why) => failures.push(format!("backend {}: {why}", backend.name)),
            }
        }
        drop(pull); // whoever reads the last line finds nothing there any more
        let last = match &failures[..] {
            [] if left_out.is_empty() => json!({ "status": "success" }),
            [] => json!({ "status": "success", "left_out": left_out }),
            some => {
                json!({ "error": format!("{} of {} backends did not get the model: {}", some.len(), holders.len(), some.join("; ")) })
            }
        };
        self.end(&last, !failures.is_empty(), streams, session, exchange).await
    }

    /// `pull`: where it is from the mirror. What goes wrong there ends it.
    async fn pull_on(
        &self,
        backend: &Arc<Backend>,
        body: Bytes,
        streams: bool,
        pull: Option<&Pull>,
        session: &mut Session,
        exchange: &Ticket,
    ) -> Result<Told, String> {
        let (pieces, incoming) = mpsc::channel(PIECES);
        let asked = async {
            let call = Call {
                method: Method::POST,
                target: "/api/pull",
                query: None,
                body: Some(body),
                request_id: &exchange.request_id,
                limit_bytes: LINE_BYTES,
                within: WITHIN,
                pieces: Some(pieces),
            };
            let broken = async {
                match pull {
                    Some(pull) => pull.failed().await,
                    None => std::future::pending().await,
                }
            };
            // With the call its end of the channel goes, and then the relay ends.
            tokio::select! {
                reply = self.site.client.call(backend, &call) => reply,
                () = broken => Err(ClientError::Broken("the mirror broke off")),
            }
        };
        let relayed = relay(incoming, streams, session);
        tokio::pin!(asked, relayed);
        let (reply, mut told) = tokio::select! {
            reply = &mut asked => (reply, relayed.await),
            told = &mut relayed => {
                if told.left {
                    return Ok(told); // and the call ends with it, though the backend may say nothing for long
                }
                (asked.await, told)
            }
        };
        match reply {
            Ok(reply) if reply.head.status != 200 => {
                let words = serde_json::from_slice::<Value>(&reply.body).ok();
                told.error = words.and_then(|words| Some(words["error"].as_str()?.to_owned())).or(told.error);
                told.success = false;
                Ok(told)
            }
            Err(ClientError::Unreachable) => Err(format!("cannot be reached at {}", backend.url)),
            Err(ClientError::Silent) => Err("was silent for too long".to_owned()),
            Err(ClientError::Broken(_)) if !told.left && !told.success => Err("broke off".to_owned()),
            _ => Ok(told),
        }
    }

    async fn end(
        &self,
        last: &Value,
        has_failed: bool,
        streams: bool,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> Result<Admitted, Refusal> {
        exchange.last_byte = Some(Instant::now());
        let written = if streams {
            let mut line = last.to_string();
            line.push('\n');
            session.write_response_body(Some(line.into()), true).await
        } else {
            let status = if has_failed { 500 } else { 200 };
            match json_head(status) {
                Ok(head) => answer(session, exchange, head, last.to_string().into()).await,
                Err(e) => Err(e),
            }
        };
        if written.is_err() {
            exchange.fault = Some(Fault::Client);
        } else if has_failed {
            exchange.refusal = Some(Refusal::bad_backend_reply("a backend did not get the model"));
        }
        Ok(Admitted::Answered)
    }
}

/// The head of a stream of progress.
async fn begin(session: &mut Session, exchange: &mut Ticket) -> pingora::Result<()> {
    let mut head = ResponseHeader::build(200, Some(4))?;
    head.insert_header(http::header::CONTENT_TYPE, "application/x-ndjson")?;
    head.insert_header("x-request-id", exchange.request_id.as_str())?;
    match session.req_header().version {
        http::Version::HTTP_10 => exchange.link.close_connection(), // the connection's end is the body's
        _ => head.insert_header(http::header::TRANSFER_ENCODING, "chunked")?,
    }
    let now = Instant::now();
    exchange.status = Some(200);
    exchange.upstream_status = Some(200);
    exchange.first_byte = Some(now);
    exchange.link.signal.progress.first_byte(now - exchange.began);
    if let Some(receipt) = &exchange.receipt {
        let model = exchange.canonical_model();
        receipt.stream_start(&crate::ledger::Entry {
            response_code: exchange.status,
            ttft_ms: Some((now - exchange.began).as_millis() as u64),
            ..exchange.entry(model.as_deref())
        });
    }
    session.write_response_header(Box::new(head), false).await
}

async fn write(session: &mut Session, line: &Value) -> pingora::Result<()> {
    let mut text = line.to_string();
    text.push('\n');
    session.write_response_body(Some(text.into()), false).await
}

/// Passes lines of progress on, but for the end, which is not this backend's to say.
async fn relay(mut incoming: mpsc::Receiver<Bytes>, streams: bool, session: &mut Session) -> Told {
    let mut told = Told::default();
    let mut held: Vec<u8> = Vec::new();
    loop {
        let piece = tokio::select! { biased;
            piece = incoming.recv() => piece,
            () = gone(session) => None,
        };
        let Some(piece) = piece else {
            // The channel is closed where the reply has ended; else the client has left.
            told.left = !incoming.is_closed();
            return told;
        };
        held.extend_from_slice(&piece);
        let mut passed: Vec<u8> = Vec::new();
        while let Some(end) = held.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = held.drain(..=end).collect();
            let Ok(words) = serde_json::from_slice::<Value>(&line) else { continue };
            if words["status"] == "success" {
                told.success = true;
            } else if let Some(error) = words["error"].as_str() {
                told.error = Some(error.to_owned());
            } else {
                passed.extend_from_slice(&line);
            }
        }
        if held.len() > LINE_BYTES {
            told.error = Some("its progress cannot be read".to_owned());
            return told;
        }
        if streams && !passed.is_empty() && session.write_response_body(Some(passed.into()), false).await.is_err() {
            told.left = true;
            return told;
        }
    }
}
