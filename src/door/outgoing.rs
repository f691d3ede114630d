//! The inner session and everything still to be written to it. It outlives what Pingora sees of the session.
//!
//! A reader that does not keep up never slows the backend: what it has not taken yet waits here, up to a limit
//! ([`super::DoorSettings::reply_buffer_bytes`]), and a reader that takes nothing for too long is cut.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::Bytes;
use pingora::http::ResponseHeader;
use pingora::prelude::*;
use pingora::protocols::http::{HttpTask, ServerSession};
use tokio::time::{Instant, Sleep, sleep};

use super::DoorSettings;
use super::link::Link;

/// The error of a reply whose place a refusal takes.
pub const REFUSED: ErrorType = ErrorType::Custom("Refused");
/// The error of an attempt that is made again, in other words.
pub const AGAIN: ErrorType = ErrorType::Custom("Again");
/// The context of the error that a stalled reader causes.
pub const SLOW_READER: &str = "the client does not read";
/// The context of the error that a cut causes.
pub const CUT: ErrorType = ErrorType::Custom("Cut");

/// The framing of a reply, as far as an error can be put into it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Framing {
    /// One body; nothing can be appended that a client would read as an error.
    Whole,
    Ndjson,
    Sse,
}

pub struct Outgoing {
    pub session: Box<ServerSession>,
    /// h2: the body's writer, taken out of the inner session.
    h2: Option<h2::SendStream<Bytes>>,
    /// h2: not yet sent (in h1 the inner session holds it).
    queue: VecDeque<Bytes>,
    /// Body bytes accepted.
    pushed_bytes: usize,
    h2_sent_bytes: usize,
    /// h2: END_STREAM is to follow the queue.
    h2_end: bool,
    /// The final head is written.
    pub head_written: bool,
    /// The end of the reply was pushed.
    pub ended: bool,
    pub framing: Framing,
    /// Content-Length, or no body: nothing can be appended.
    pub sized: bool,
    /// The last two bytes of the body so far.
    tail: [u8; 2],
    /// Since when nothing was taken, and how much was sent then.
    stall: Option<(Pin<Box<Sleep>>, usize)>,
}

impl Outgoing {
    pub fn new(session: ServerSession) -> Outgoing {
        Outgoing {
            session: Box::new(session),
            h2: None,
            queue: VecDeque::new(),
            pushed_bytes: 0,
            h2_sent_bytes: 0,
            h2_end: false,
            head_written: false,
            ended: false,
            framing: Framing::Whole,
            sized: false,
            tail: [0, 0],
            stall: None,
        }
    }

    pub fn sent_bytes(&self) -> usize {
        match &*self.session {
            ServerSession::H2(_) => self.h2_sent_bytes,
            session => session.body_bytes_sent(),
        }
    }

    /// Whether the bytes so far do not end a record of the reply's framing.
    pub fn is_mid_record(&self) -> bool {
        match (self.framing, self.tail) {
            (_, [0, 0]) => false, // nothing was sent yet
            (Framing::Sse, [b'\n', b'\n']) => false,
            (Framing::Sse, _) => true,
            (_, [_, b'\n']) => false,
            _ => true,
        }
    }

    /// Takes the h2 writer: dropping it sends what is queued and then RST_STREAM.
    pub fn take_h2(&mut self) -> Option<h2::SendStream<Bytes>> {
        self.h2.take()
    }

    pub(super) fn pending(&self) -> bool {
        match &*self.session {
            ServerSession::H2(_) => !self.queue.is_empty() || self.h2_end,
            session => session.has_pending_downstream_proxy_tasks(),
        }
    }

    /// Body bytes that the client's kernel has not taken yet.
    pub fn backlog_bytes(&self) -> usize {
        self.pushed_bytes.saturating_sub(self.sent_bytes())
    }

    fn note_head(&mut self, head: &ResponseHeader, end: bool) {
        if head.status.is_informational() && head.status != 101 {
            return;
        }
        self.head_written = true;
        self.ended |= end;
        self.sized = head.headers.contains_key("content-length")
            || matches!(head.status.as_u16(), 204 | 304)
            || self.session.req_header().method == http::Method::HEAD;
        let content_type = head.headers.get("content-type").map_or(&b""[..], |value| value.as_bytes());
        self.framing = if content_type.starts_with(b"text/event-stream") {
            Framing::Sse
        } else if content_type.starts_with(b"application/x-ndjson") {
            Framing::Ndjson
        } else {
            Framing::Whole
        };
    }

    /// Queues one task. Nothing is lost if the caller is cancelled afterwards.
    pub(super) fn push(&mut self, task: HttpTask) -> Result<()> {
        match &task {
            HttpTask::Header(head, end) => self.note_head(head, *end),
            HttpTask::Body(bytes, end) => {
                if let Some(bytes) = bytes {
                    self.pushed_bytes += bytes.len();
                    match bytes[..] {
                        [.., last_but_one, last] => self.tail = [last_but_one, last],
                        [last] => self.tail = [self.tail[1], last],
                        [] => {}
                    }
                }
                self.ended |= *end;
            }
            HttpTask::Trailer(_) | HttpTask::Done => self.ended = true,
            HttpTask::UpgradedBody(..) => {
                return Error::e_explain(ErrorType::InternalError, "an upgrade, which is denied");
            }
            HttpTask::Failed(_) => {}
        }
        let ServerSession::H2(session) = &mut *self.session else {
            match task {
                HttpTask::Failed(e) => return Err(e),
                task => self.session.send_downstream_proxy_task(task),
            }
            return Ok(());
        };
        match task {
            HttpTask::Failed(e) => return Err(e),
            HttpTask::Header(head, end) => {
                session.write_response_header(head, end)?;
                self.h2 = session.take_response_body_writer();
            }
            HttpTask::Body(bytes, end) => {
                if let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) {
                    self.queue.push_back(bytes);
                }
                self.h2_end |= end;
            }
            HttpTask::Trailer(Some(trailers)) => {
                if let Some(writer) = &mut self.h2 {
                    // Trailers end the stream, so what is queued goes first (h2 buffers without a limit).
                    for bytes in self.queue.drain(..) {
                        self.h2_sent_bytes += bytes.len();
                        writer.send_data(bytes, false).or_err(ErrorType::WriteError, "h2 body")?;
                    }
                    writer.send_trailers(*trailers).or_err(ErrorType::WriteError, "h2 trailers")?;
                    self.h2 = None;
                }
            }
            _ => self.h2_end = true,
        }
        Ok(())
    }

    /// Writes as much as the client takes now. Cancel-safe: all state is in `self`.
    pub(super) fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if !self.pending() {
            self.stall = None;
            return Poll::Ready(Ok(()));
        }
        if matches!(&*self.session, ServerSession::H2(_)) {
            return self.poll_out_h2(cx);
        }
        let written = pin!(self.session.write_downstream_proxy_tasks()).poll(cx);
        if written.is_ready() {
            self.stall = None;
        }
        written.map(|result| result.map(|_| ()))
    }

    fn poll_out_h2(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let Some(writer) = &mut self.h2 else {
            self.queue.clear();
            self.h2_end = false;
            return Poll::Ready(Ok(()));
        };
        while let Some(bytes) = self.queue.front_mut() {
            writer.reserve_capacity(bytes.len());
            let capacity = match writer.capacity() {
                0 => match writer.poll_capacity(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Some(Ok(capacity))) => capacity,
                    Poll::Ready(_) => {
                        let gone = Error::explain(ErrorType::H2Error, "the client closed the stream");
                        return Poll::Ready(Err(gone.into_down()));
                    }
                },
                capacity => capacity,
            };
            if capacity == 0 {
                continue;
            }
            let part = bytes.split_to(capacity.min(bytes.len()));
            self.h2_sent_bytes += part.len();
            if bytes.is_empty() {
                self.queue.pop_front();
            }
            let end = self.h2_end && self.queue.is_empty();
            writer.send_data(part, end).or_err(ErrorType::WriteError, "h2 body")?;
            if end {
                self.h2_end = false;
                self.h2 = None;
                self.stall = None;
                return Poll::Ready(Ok(()));
            }
        }
        if self.h2_end {
            self.h2_end = false;
            writer.send_data(Bytes::new(), true).or_err(ErrorType::WriteError, "h2 end")?;
            self.h2 = None;
        }
        self.stall = None;
        Poll::Ready(Ok(()))
    }

    /// The next piece of the request body, or (`idle`, or none left) an error when the client leaves.
    pub(super) fn poll_idle(&mut self, cx: &mut Context<'_>, idle: bool) -> Poll<Result<Option<Bytes>>> {
        if let ServerSession::H2(session) = &mut *self.session
            && self.head_written
            && (idle || session.is_body_done())
        {
            // The body's writer is ours, so the inner session cannot watch for RST_STREAM any more.
            let Some(writer) = &mut self.h2 else { return Poll::Pending };
            return writer
                .poll_reset(cx)
                .map(|_| Err(Error::explain(ErrorType::H2Error, "the client closed the stream").into_down()));
        }
        pin!(self.session.read_body_or_idle(idle)).poll(cx)
    }

    /// A reader that has taken less than the floor for `stall` is gone. Only while something is unsent.
    pub(super) fn poll_stall(&mut self, cx: &mut Context<'_>, settings: &DoorSettings) -> Result<()> {
        if !self.pending() {
            self.stall = None;
            return Ok(());
        }
        let sent = self.sent_bytes();
        let (timer, at) = self.stall.get_or_insert_with(|| (Box::pin(sleep(settings.stall)), sent));
        if timer.as_mut().poll(cx).is_ready() {
            if sent - *at < settings.stall_floor_bytes.max(1) {
                return Err(Error::explain(ErrorType::WriteTimedout, SLOW_READER).into_down());
            }
            *at = sent;
            timer.as_mut().reset(Instant::now() + settings.stall);
            let _ = timer.as_mut().poll(cx);
        }
        Ok(())
    }

    /// Writes until at most `limit_bytes` of the body are unsent (0: everything, the end included).
    pub(super) async fn flush_to(
        &mut self,
        limit_bytes: usize,
        settings: &DoorSettings,
        link: Option<&Link>,
    ) -> Result<()> {
        poll_fn(|cx| {
            if let Some(link) = link {
                link.signal.register(cx.waker());
                if link.signal.take() {
                    return Poll::Ready(Err(cut_error()));
                }
            }
            if let Poll::Ready(result) = self.poll_out(cx) {
                return Poll::Ready(result);
            }
            if limit_bytes > 0 {
                if self.backlog_bytes() <= limit_bytes {
                    return Poll::Ready(Ok(()));
                }
                // A stream's reader that is behind by the whole buffer is cut at once: waiting would hold the model's slot.
                // A single large body (a list, a model's details) comes as fast as a file, holds no slot, and may wait.
                if self.framing != Framing::Whole {
                    return Poll::Ready(Err(Error::explain(ErrorType::WriteTimedout, SLOW_READER).into_down()));
                }
            }
            if let Err(e) = self.poll_stall(cx, settings) {
                return Poll::Ready(Err(e));
            }
            Poll::Pending
        })
        .await
    }
}

pub(super) fn cut_error() -> Box<Error> {
    Error::explain(CUT, "cut on demand").into_in()
}
