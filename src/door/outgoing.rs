//! The inner session and everything still to be written to it. It outlives what Pingora sees of the session.
//!
//! What a reader has not taken yet waits here, so that the backend, and its slot, are done as soon as they can be. It is bounded for
//! each reply and for all together ([`super::Readers`]); past that the backend waits for the reader. One that takes too little while
//! something waits for it is cut: how little depends on whether the backend waits (`docs/adr/0013-slow-readers.md`).

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::Bytes;
use pingora::http::ResponseHeader;
use pingora::prelude::*;
use pingora::protocols::http::{HttpTask, ServerSession};
use tokio::time::{Instant, Sleep, sleep_until};

use super::link::Link;
use super::readers::{FREE_BYTES, Readers, Window};
use crate::memory::Held;

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
    /// The reply's part of the memory for what is unsent.
    held: Held,
    /// While something is unsent; the timer is set to the window's end.
    window: Option<(Window, Pin<Box<Sleep>>)>,
}

impl Outgoing {
    pub fn new(session: ServerSession, held: Held) -> Outgoing {
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
            held,
            window: None,
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
        let written = match &*self.session {
            _ if !self.pending() => Poll::Ready(Ok(())),
            ServerSession::H2(_) => self.poll_out_h2(cx),
            _ => {
                let written = pin!(self.session.write_downstream_proxy_tasks()).poll(cx);
                written.map(|result| result.map(|_| ()))
            }
        };
        if written.is_ready() {
            self.window = None;
        }
        if self.held.bytes() > 0 {
            self.held.shrink_to(self.backlog_bytes().saturating_sub(FREE_BYTES));
        }
        written
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
                return Poll::Ready(Ok(()));
            }
        }
        if self.h2_end {
            self.h2_end = false;
            writer.send_data(Bytes::new(), true).or_err(ErrorType::WriteError, "h2 end")?;
            self.h2 = None;
        }
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

    /// Whether what is unsent may wait here.
    fn has_room(&mut self, limit_bytes: usize) -> bool {
        let backlog_bytes = self.backlog_bytes();
        backlog_bytes <= limit_bytes && self.held.fit(backlog_bytes.saturating_sub(FREE_BYTES)).is_ok()
    }

    /// An error once the reader has taken too little. Only while something is unsent: a stream that is silent has no slow reader.
    /// `blocks`: the backend waits for it.
    pub(super) fn poll_slow(&mut self, cx: &mut Context<'_>, readers: &Readers, blocks: bool) -> Result<()> {
        if !self.pending() {
            self.window = None;
            return Ok(());
        }
        let sent_bytes = self.sent_bytes();
        let (window, timer) = self.window.get_or_insert_with(|| {
            let window = Window::begin(Instant::now(), readers, sent_bytes, blocks);
            let timer = Box::pin(sleep_until(window.ends));
            (window, timer)
        });
        loop {
            if window.look(Instant::now(), readers, sent_bytes, blocks).is_err() {
                return Err(Error::explain(ErrorType::WriteTimedout, SLOW_READER).into_down());
            }
            if timer.deadline() != window.ends {
                timer.as_mut().reset(window.ends);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
        }
    }

    /// Writes everything, the end included.
    pub(super) async fn flush(&mut self, readers: &Readers, link: &Link) -> Result<()> {
        self.flush_to(None, readers, link).await
    }

    /// Writes until what is unsent may wait here.
    pub(super) async fn make_room(&mut self, readers: &Readers, link: &Link) -> Result<()> {
        self.flush_to(Some(readers.buffer_bytes), readers, link).await
    }

    async fn flush_to(&mut self, limit_bytes: Option<usize>, readers: &Readers, link: &Link) -> Result<()> {
        poll_fn(|cx| {
            link.signal.register(cx.waker());
            if link.signal.take() {
                return Poll::Ready(Err(cut_error()));
            }
            if let Poll::Ready(result) = self.poll_out(cx) {
                return Poll::Ready(result);
            }
            if limit_bytes.is_some_and(|limit_bytes| self.has_room(limit_bytes)) {
                return Poll::Ready(Ok(()));
            }
            match self.poll_slow(cx, readers, limit_bytes.is_some()) {
                Ok(()) => Poll::Pending,
                Err(e) => Poll::Ready(Err(e)),
            }
        })
        .await
    }
}

pub(super) fn cut_error() -> Box<Error> {
    Error::explain(CUT, "cut on demand").into_in()
}
