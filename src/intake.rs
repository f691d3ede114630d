//! The request body: read before a backend is chosen, bounded in size, time and memory, and given to the door for replay.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use pingora::ErrorType;
use pingora_proxy::Session;

use crate::memory::{Full, Held, Memory};
use crate::refusal::Refusal;
use zstd::{Decoder, Undecodable};

mod zstd;

/// Each such piece of a body that has arrived buys another `idle`, so that a client that sends a byte now and then has an end.
const PACE_BYTES: usize = 64 * 1024;

/// Decoding goes on for so many bytes, and so many blocks, before others get the thread.
const STRETCH_BYTES: usize = 1 << 20;
const STRETCH_BLOCKS: usize = 256;

/// In which encodings an endpoint takes its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encodings {
    Plain,
    /// Or `zstd`, which Ollama itself takes on `/v1/*` alone. It is passed on decoded.
    PlainOrZstd,
}

pub struct Intake {
    /// Largest body.
    pub limit_bytes: usize,
    /// Longest silence of a client that sends a body.
    pub idle: Duration,
    /// That all bodies together may take.
    pub memory: Memory,
}

/// Why a body was not read.
pub enum Unread {
    Refused(Refusal),
    /// The client left before its end.
    Left,
}

impl From<Refusal> for Unread {
    fn from(refusal: Refusal) -> Unread {
        Unread::Refused(refusal)
    }
}

impl From<Full> for Unread {
    fn from(full: Full) -> Unread {
        Unread::Refused(no_room(full))
    }
}

fn no_room(_: Full) -> Refusal {
    Refusal::queue_full("request bodies take all the memory they may")
}

impl Intake {
    /// What can be refused by the head alone, before the client is asked to send anything.
    fn judge_head(&self, head: &http::request::Parts, encodings: Encodings) -> Result<(), Refusal> {
        if encodings == Encodings::Plain || !is_zstd(head) {
            refuse_encoding(head)?;
        }
        match declared_length(head) {
            Some(length) if length > self.limit_bytes as u64 => Err(Refusal::body_too_large(self.limit_bytes as u64)),
            _ => Ok(()),
        }
    }

    /// Reads the whole body, and decodes it. The caller is known by now: `Expect: 100-continue` is answered here and not earlier.
    pub async fn read(&self, session: &mut Session, encodings: Encodings) -> Result<(Bytes, Held), Unread> {
        self.judge_head(session.req_header(), encodings)?;
        let (body, held) = self.read_as_sent(session).await?;
        if is_zstd(session.req_header()) { Ok(self.decode(body, held).await?) } else { Ok((body, held)) }
    }

    async fn read_as_sent(&self, session: &mut Session) -> Result<(Bytes, Held), Unread> {
        let declared = declared_length(session.req_header());
        answer_expectation(session).await?;
        let mut held = self.memory.share();
        let Some(first) = self.next(session, Instant::now() + self.idle).await? else {
            return Ok((Bytes::new(), held));
        };
        if first.len() > self.limit_bytes {
            return Err(Refusal::body_too_large(self.limit_bytes as u64).into());
        }
        held.grow(first.len())?;
        // Without a declared length the first bytes may be none: a chunk's size came by itself, and its data are still under way.
        if declared == Some(first.len() as u64) {
            return Ok((first, held)); // the ordinary small request: no copy
        }
        let began = Instant::now();
        // What is declared is not believed all at once: memory follows what has arrived.
        let declared = usize::try_from(declared.unwrap_or(0)).unwrap_or(usize::MAX);
        let mut body = BytesMut::with_capacity(declared.min(1 << 20).max(first.len() * 2));
        body.extend_from_slice(&first);
        loop {
            let pace = self.idle * (2 + (body.len() / PACE_BYTES) as u32);
            let Some(bytes) = self.next(session, began + pace).await? else {
                return Ok((body.freeze(), held));
            };
            if body.len() + bytes.len() > self.limit_bytes {
                return Err(Refusal::body_too_large(self.limit_bytes as u64).into());
            }
            held.grow(bytes.len())?;
            body.extend_from_slice(&bytes);
        }
    }

    /// `compressed` is held until it is decoded, so that both count.
    async fn decode(&self, compressed: Bytes, _held: Held) -> Result<(Bytes, Held), Refusal> {
        let mut held = self.memory.share();
        let mut decoder = Decoder::new(compressed, self.limit_bytes);
        loop {
            let rested_at = decoder.decoded_bytes();
            for _ in 0..STRETCH_BLOCKS {
                let more = decoder.step().map_err(|why| match why {
                    Undecodable::TooLarge => Refusal::body_too_large(self.limit_bytes as u64),
                    Undecodable::Malformed(what) => {
                        Refusal::invalid_body(format!("it is not zstd as it should be: {what}"))
                    }
                })?;
                held.fit(decoder.decoded_bytes()).map_err(no_room)?;
                if !more {
                    return Ok((decoder.finish(), held));
                }
                if decoder.decoded_bytes() - rested_at >= STRETCH_BYTES {
                    break;
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn next(&self, session: &mut Session, deadline: Instant) -> Result<Option<Bytes>, Unread> {
        let wait = self.idle.min(deadline.saturating_duration_since(Instant::now()));
        match pingora::time::timeout(wait, session.downstream_session.read_request_body()).await {
            Err(_) => Err(Refusal::slow_request("body").into()),
            Ok(Ok(bytes)) => Ok(bytes),
            // Its errors have no source, so that a malformed chunk would end as a 500 (traps, Pingora 1).
            Ok(Err(e)) if is_bad_framing(&e) => Err(malformed_body().into()),
            Ok(Err(_)) => Err(Unread::Left),
        }
    }
}

/// A body that is not held (blobs): only its head is judged, and the client told to go on.
pub async fn open_stream(session: &mut Session, limit_bytes: u64) -> Result<(), Refusal> {
    refuse_encoding(session.req_header())?;
    if declared_length(session.req_header()).is_some_and(|length| length > limit_bytes) {
        return Err(Refusal::body_too_large(limit_bytes));
    }
    answer_expectation(session).await
}

/// Whether an error of Pingora's says that the body was malformed, by the door (`door::chunks`) or by its own parser. Every other is
/// the socket's.
pub fn is_bad_framing(e: &pingora::Error) -> bool {
    let ours =
        e.root_cause().downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::InvalidData);
    // Lines that are too long, for one. The constants are private: `v1/body.rs`, INVALID_CHUNK and INVALID_TRAILER_END.
    ours || matches!(e.etype(), ErrorType::Custom("InvalidChunk" | "InvalidTrailerEnd"))
}

/// Endpoints without a body: one that comes all the same would desynchronise nothing, since it is never forwarded, but it shows
/// that two parsers disagree about the request.
pub fn refuse_body(session: &mut Session) -> Result<(), Refusal> {
    let head = session.req_header();
    let declared =
        declared_length(head).is_some_and(|length| length > 0) || head.headers.contains_key("transfer-encoding");
    // h2 needs neither header for a body, and what is not refused here would reach the backend without any framing.
    if declared || !session.as_downstream_mut().is_body_empty() {
        return Err(
            Refusal::bad_framing("this endpoint takes no body, so send it without one").because("unexpected body")
        );
    }
    Ok(())
}

/// A body whose chunks are none.
pub fn malformed_body() -> Refusal {
    Refusal::bad_framing("the body's chunks are malformed").because("body framing")
}

fn refuse_encoding(head: &http::request::Parts) -> Result<(), Refusal> {
    let plain =
        head.headers.get_all("content-encoding").iter().all(|value| value.as_bytes().eq_ignore_ascii_case(b"identity"));
    if plain { Ok(()) } else { Err(Refusal::unsupported_encoding()) }
}

/// As Ollama compares it: one header, exactly this.
fn is_zstd(head: &http::request::Parts) -> bool {
    let mut encodings = head.headers.get_all("content-encoding").iter();
    encodings.next().is_some_and(|encoding| encoding == "zstd") && encodings.next().is_none()
}

fn declared_length(head: &http::request::Parts) -> Option<u64> {
    head.headers.get("content-length").and_then(|value| value.to_str().ok()).and_then(|value| value.trim().parse().ok())
}

/// `Expect: 100-continue` is nobody's job in Pingora (traps, Pingora 2).
async fn answer_expectation(session: &mut Session) -> Result<(), Refusal> {
    let expects =
        session.req_header().headers.get("expect").map(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    match expects {
        None => Ok(()),
        Some(false) => {
            Err(Refusal::bad_framing("only `Expect: 100-continue` is understood").because("unknown expectation"))
        }
        Some(true) => session
            .downstream_session
            .write_continue_response()
            .await
            .map_err(|_| Refusal::bad_framing("the connection broke").because("100-continue not written")),
    }
}
