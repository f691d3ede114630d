//! The end of a reply, whatever happened in the hooks: an error frame for a stream that was cut, 500 after a panic, a close
//! that lets the client read what was said, or the connection given back for the next request.

use std::time::Duration;

use bytes::Bytes;
use pingora::apps::HttpServerApp;
use pingora::http::ResponseHeader;
use pingora::protocols::Stream;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::time::timeout;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::chunks::Judged;
use super::head::HeadFault;
use super::link::Link;
use super::outgoing::{CUT, Framing, Outgoing, SLOW_READER, cut_error};
use super::{Door, Next};
use crate::exchange::Ending;
use crate::live::Cut;
use crate::refusal::Refusal;
use crate::wire::Dialect;

/// A socket that is closed is still read for at most so many bytes.
const LINGER_BYTES: usize = 64 << 20;
/// For a cut stream's error frame, where the client has left its window full. Less than a shutdown waits.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl<P: HttpServerApp + Send + Sync + 'static> Door<P> {
    /// Completes the reply and says how the exchange ended, as far as the door can see.
    pub(super) async fn finish(&self, link: &Link, panicked: bool) -> (Next, Ending) {
        if panicked {
            self.site.ledger.metrics.panicked();
        }
        let Some(mut out) = link.left.lock().take() else {
            return (None, Ending { panicked, left: link.client_left(), ..Ending::default() });
        };
        let mut ending = Ending { panicked, cut: link.signal.reason(), left: link.client_left(), ..Ending::default() };
        ending.bytes_in = out.session.body_bytes_read() as u64;
        let next = self.complete(link, &mut out, &mut ending).await;
        ending.bytes_out = out.sent_bytes() as u64;
        match next {
            Close::Now => (None, ending),
            Close::Linger => {
                // The record need not wait for a client that is still sending.
                let Outgoing { session, .. } = out;
                let settings = std::sync::Arc::clone(&self.settings);
                tokio::spawn(async move { linger_session(*session, settings.linger).await });
                (None, ending)
            }
            Close::Reuse => {
                let Outgoing { session, .. } = out;
                let reused = match session.finish().await {
                    Ok(Some(reusable)) => {
                        let (stream, prefix) = reusable.into_parts();
                        Some((stream, prefix.unwrap_or_default()))
                    }
                    _ => None,
                };
                (reused, ending)
            }
        }
    }

    async fn complete(&self, link: &Link, out: &mut Outgoing, ending: &mut Ending) -> Close {
        let (dialect, request_id) = match link.peek_exchange() {
            Some(known) => known,
            None => (Dialect::Native, String::new()),
        };
        ending.unsent = out.backlog_bytes() > 0;
        if !out.head_written {
            // Nothing was answered: a panic, a cut before the answer, or the client has gone.
            let refusal = match (ending.panicked, ending.cut) {
                (true, _) => Refusal::internal_error(),
                (false, Some(cut)) => cut.refusal(),
                (false, None) => return Close::Now,
            };
            ending.status = Some(refusal.status());
            out.session.set_keepalive(None);
            let answer = write_answer(out, &refusal, dialect, &request_id);
            let _ = timeout(self.settings.readers.window, answer).await;
            return Close::Linger;
        }
        if !out.ended {
            ending.broken = true;
            if out.sized || out.framing == Framing::Whole {
                // It cannot be completed, so it is closed short. h2: dropping the writer sends what is queued, then RST_STREAM;
                // h1: the connection ends before Content-Length is reached, or without the last chunk.
                if out.take_h2().is_none() {
                    let _ = self.flush(link, out, ending.cut).await;
                    out.session.shutdown().await;
                }
                return Close::Now;
            }
            let refusal = match (ending.panicked, ending.cut) {
                (true, _) => Refusal::internal_error(),
                (false, Some(cut)) => cut.refusal(),
                (false, None) => link.stream_refusal(),
            };
            let frame = link.last_words(&refusal, out.framing == Framing::Sse, out.is_mid_record());
            let framed = match frame.is_empty() {
                true => Ok(()), // everything was said
                false => out.push(HttpTask::Body(Some(Bytes::from(frame)), false)),
            };
            let framed = framed.and_then(|()| out.push(HttpTask::Done));
            if framed.is_err() {
                return Close::Now;
            }
        }
        // What the client has not taken yet; the backend and its lease are done already.
        if let Err(e) = self.flush(link, out, ending.cut).await {
            let slow = e.context.as_ref().is_some_and(|context| context.as_str() == SLOW_READER);
            if *e.etype() == CUT {
                ending.cut = link.signal.reason();
                ending.broken = true;
            } else {
                ending.slow_reader = slow;
                ending.client_gone = !slow;
            }
            if let Some(mut writer) = out.take_h2() {
                writer.send_reset(h2::Reason::CANCEL);
            }
            return Close::Now;
        }
        if !out.session.is_body_done() {
            return Close::Linger;
        }
        Close::Reuse
    }

    /// Writes what is left. A client that does not read is given its time; once the exchange is cut, no more than a moment, since a
    /// shutdown waits for it.
    async fn flush(&self, link: &Link, out: &mut Outgoing, cut: Option<Cut>) -> pingora::Result<()> {
        let flushed = out.flush(&self.settings.readers, link);
        match cut {
            None => flushed.await,
            Some(_) => timeout(LAST_WORDS, flushed).await.unwrap_or_else(|_| Err(cut_error())),
        }
    }

    /// Bytes that never became a request: answered, counted (promise I16), and closed.
    pub(super) async fn refuse_raw(&self, mut stream: Stream, fault: HeadFault) {
        let refusal = match fault {
            HeadFault::Gone => return,
            HeadFault::TooSlow => Refusal::slow_request("head"),
            HeadFault::TooLarge => Refusal::head_too_large(self.settings.head_bytes),
            HeadFault::Malformed(what) => Refusal::bad_framing("the head is malformed or ambiguous").because(what),
        };
        self.site.ledger.metrics.unparsed(fault.reason());
        let body = refusal.body(Dialect::Native, "");
        let mut reply =
            format!("HTTP/1.1 {} \r\nConnection: close\r\nContent-Length: {}\r\n", refusal.status(), body.len());
        for (name, value) in refusal.headers() {
            reply.push_str(&format!("{name}: {value}\r\n"));
        }
        reply.push_str("\r\n");
        let mut reply = reply.into_bytes();
        reply.extend_from_slice(&body);
        let linger = self.settings.linger;
        let _ = timeout(linger, async {
            stream.write_all(&reply).await?;
            stream.flush().await
        })
        .await;
        linger_stream(stream, linger).await;
    }

    /// A head that passed the door's judgement but not Pingora's parser.
    pub(super) async fn refuse_unparsed(&self, mut session: ServerSession, reason: &'static str) -> Next {
        if let ServerSession::H1(session) = session {
            self.refuse_raw(session.into_inner(), HeadFault::Malformed(reason)).await;
            return None;
        }
        self.site.ledger.metrics.unparsed(reason);
        let _ = timeout(self.settings.readers.window, session.respond_error(400)).await;
        None
    }
}

enum Close {
    Now,
    /// The answer is out, but the client may still be sending.
    Linger,
    Reuse,
}

/// A whole answer on a session that has none yet.
async fn write_answer(
    out: &mut Outgoing,
    refusal: &Refusal,
    dialect: Dialect,
    request_id: &str,
) -> pingora::Result<()> {
    let body = refusal.body(dialect, request_id);
    let mut head = ResponseHeader::build(refusal.status(), Some(6))?;
    for (name, value) in refusal.headers() {
        head.insert_header(name, value.as_ref())?;
    }
    head.insert_header("content-length", body.len())?;
    head.insert_header("x-request-id", request_id)?;
    out.session.write_response_header(Box::new(head)).await?;
    out.session.write_response_body(Bytes::from(body), true).await
}

async fn linger_session(session: ServerSession, linger: Duration) {
    if let ServerSession::H1(session) = session {
        linger_stream(session.into_inner(), linger).await
    }
}

/// Ends our side, then reads what still comes for a while: closing with unread bytes would send RST, which may destroy the
/// answer on its way (traps, Pingora 16).
async fn linger_stream(stream: Stream, linger: Duration) {
    let (mut stream, _) = Judged::unwrap(stream); // what is wrong with its bytes was said already
    let _ = timeout(linger, async {
        pingora::protocols::Shutdown::shutdown(&mut *stream).await; // flush and FIN
        let mut scratch = vec![0u8; 16 << 10];
        let mut left = LINGER_BYTES;
        while let Ok(n) = stream.read(&mut scratch).await {
            if n == 0 || n > left {
                break;
            }
            left -= n;
        }
    })
    .await;
}
