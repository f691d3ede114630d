//! What `HttpProxy` sees of the client: the inner session, with the request body replayed from memory (any size, any number
//! of attempts), the unsent part of the reply held, and the link's cut heard.
//!
//! Pingora replays a body that a filter has read from a buffer of 64 KiB; a larger one never reaches the backend, and a
//! rewritten one is sent as it was (traps, Pingora 1; pingora #349, #575, #780). A custom session replaces that buffer.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::*;
use pingora::protocols::Digest;
use pingora::protocols::http::custom::{CustomMessageWrite, server::Session as CustomSession};
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;

use super::DoorSettings;
use super::leaver::Leaver;
use super::link::Link;
use super::outgoing::{Outgoing, REFUSED, cut_error};

/// One piece of a replayed body. The backend's write time-out then applies to a piece, and the reply is looked at between
/// pieces: handed over in one, an early 400 is seen only after the write time-out, which covers the whole body.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces on their way to the backend. Must stay below pingora-proxy's private TASK_BUFFER_SIZE (4): a full pipe stops
/// Pingora from polling the client, and one client in four that leaves during an upload is missed (traps, Pingora 1).
const PIECES_IN_FLIGHT: usize = 3;

pub struct Downstream {
    /// `Some` until dropped.
    out: Option<Outgoing>,
    link: Arc<Link>,
    settings: Arc<DoorSettings>,
    /// `None`: not replaying, the body comes from the inner session.
    body: Option<Bytes>,
    /// The replayed body has no bytes at all.
    empty: bool,
    /// The replayed body was given up, since no retry is possible any more.
    released: bool,
    responded: bool,
    position: usize,
    /// A head that waits until its body has been judged.
    held_head: Option<Box<ResponseHeader>>,
    /// The client has left, and Pingora is not told yet.
    leaver: Option<Leaver>,
}

impl Drop for Downstream {
    fn drop(&mut self) {
        *self.link.left.lock() = self.out.take();
    }
}

impl Downstream {
    pub fn new(session: ServerSession, link: Arc<Link>, settings: Arc<DoorSettings>) -> Downstream {
        Downstream {
            out: Some(Outgoing::new(session, settings.readers.memory.share())),
            link,
            settings,
            body: None,
            empty: false,
            released: false,
            responded: false,
            position: 0,
            held_head: None,
            leaver: None,
        }
    }

    fn out(&self) -> &Outgoing {
        self.out.as_ref().expect("present until dropped")
    }

    fn out_mut(&mut self) -> &mut Outgoing {
        self.out.as_mut().expect("present until dropped")
    }

    fn inner(&self) -> &ServerSession {
        &self.out().session
    }

    fn inner_mut(&mut self) -> &mut ServerSession {
        &mut self.out_mut().session
    }

    fn note_head(&mut self, head: &ResponseHeader) {
        if head.status.is_informational() && head.status != 101 {
            return;
        }
        self.responded = true;
        // No retry is possible any more. After 4xx and 5xx the rest of the body is of no use to the backend.
        if self.body.as_ref().is_some_and(|body| self.position >= body.len()) || head.status.as_u16() >= 400 {
            self.release();
        }
    }

    /// From now on the body is the one that was left in the link, if any: by the intake, or for this attempt.
    fn adopt(&mut self) {
        if let Some(body) = self.link.take_body() {
            self.empty = body.is_empty();
            self.body = Some(body);
        }
    }

    fn release(&mut self) {
        if self.body.is_some() {
            self.released = true;
            self.body = Some(Bytes::new());
        }
    }

    async fn write_head(&mut self, head: Box<ResponseHeader>, end: bool) -> Result<()> {
        self.held_head = None; // another answer takes its place
        self.note_head(&head);
        if !head.status.is_informational() {
            self.link.note_answered();
        }
        // h1: a 1xx written while the body is unread turns keep-alive off (traps, Pingora 2); put it back.
        let keepalive = head.status.is_informational().then(|| self.inner().get_keepalive());
        if self.link.closes_connection() {
            self.inner_mut().set_keepalive(None);
        }
        let out = self.out.as_mut().expect("present until dropped");
        out.push(HttpTask::Header(head, end))?;
        let written = out.flush(&self.settings.readers, &self.link).await;
        if let Some(keepalive) = keepalive {
            self.inner_mut().set_keepalive(keepalive);
        }
        written
    }

    /// The held head, now that its body may be sent. A body that comes whole gets its length, if the head says nothing of it.
    async fn release_head(&mut self, first: &HttpTask) -> Result<()> {
        let Some(mut head) = self.held_head.take() else { return Ok(()) };
        let says = |name| head.headers.contains_key(name);
        if let HttpTask::Body(bytes, true) = first
            && !says("content-length")
            && !says("transfer-encoding")
        {
            head.insert_header("content-length", bytes.as_ref().map_or(0, Bytes::len))?;
        }
        self.write_head(head, false).await
    }

    async fn write_tasks(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let several = tasks.iter().filter(|task| matches!(task, HttpTask::Body(..))).count() > 1;
        let mut joined: Option<(BytesMut, bool)> = None; // several body tasks go out as one chunk
        let mut failed = None;
        for task in tasks {
            match task {
                // A backend's 1xx, which nobody asked for: its headers are unfiltered, HTTP/1.0 knows none, and Python's http.client
                // takes any but 100 for the reply.
                HttpTask::Header(head, _) if head.status.is_informational() && head.status != 101 => {}
                HttpTask::Header(head, false) if self.link.holds_head() => {
                    self.note_head(&head);
                    self.held_head = Some(head);
                }
                HttpTask::Header(head, end) => self.write_head(head, end).await?,
                HttpTask::Failed(e) => {
                    failed = Some(e);
                    break;
                }
                _ if self.held_head.is_some() && self.link.is_spoiled() => {
                    return Error::e_explain(REFUSED, "the reply is no answer");
                }
                // Nothing to be said yet.
                HttpTask::Body(bytes, false)
                    if self.held_head.is_some() && bytes.as_ref().is_none_or(Bytes::is_empty) => {}
                task if self.held_head.is_some() => {
                    self.release_head(&task).await?;
                    self.out_mut().push(task)?;
                }
                HttpTask::Body(bytes, end) if several => {
                    let all = joined.get_or_insert_with(Default::default);
                    if let Some(bytes) = bytes {
                        all.0.extend_from_slice(&bytes);
                    }
                    all.1 |= end;
                }
                task => {
                    if let Some((bytes, end)) = joined.take() {
                        self.out_mut().push(HttpTask::Body(Some(bytes.freeze()), end))?;
                    }
                    self.out_mut().push(task)?;
                }
            }
        }
        let out = self.out.as_mut().expect("present until dropped");
        if let Some((bytes, end)) = joined.take() {
            out.push(HttpTask::Body(Some(bytes.freeze()), end))?;
        }
        let written = out.make_room(&self.settings.readers, &self.link).await;
        if let Some(e) = failed {
            return Err(e); // the door writes the error frame
        }
        written?;
        if self.link.is_spoiled() && !self.link.holds_head() && !out.ended {
            return Error::e_explain(REFUSED, "the reply was given up, and its client told so");
        }
        Ok(out.ended)
    }
}

#[async_trait]
impl CustomSession for Downstream {
    fn req_header(&self) -> &RequestHeader {
        self.inner().req_header()
    }
    fn req_header_mut(&mut self) -> &mut RequestHeader {
        self.inner_mut().req_header_mut()
    }
    fn request_summary(&self) -> String {
        String::new() // Pingora's own prints path and query
    }
    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.inner().to_h1_raw()
    }

    // ---- the request's body: the intake reads the original, the proxy's loop the replay

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        let Self { out, link, .. } = self;
        let mut read = pin!(out.as_mut().expect("present until dropped").session.read_request_body());
        poll_fn(|cx| {
            link.signal.register(cx.waker());
            if link.signal.take() {
                return Poll::Ready(Err(cut_error()));
            }
            read.as_mut().poll(cx)
        })
        .await
    }
    async fn drain_request_body(&mut self) -> Result<()> {
        Ok(()) // the door's business
    }
    fn is_body_done(&mut self) -> bool {
        match &self.body {
            Some(body) => self.empty || self.released || self.position >= body.len(),
            None => self.inner_mut().is_body_done(),
        }
    }
    fn is_body_empty(&mut self) -> bool {
        self.adopt();
        if self.body.is_some() { self.empty } else { self.inner_mut().is_body_empty() }
    }
    /// Called at the start of every attempt: rewind.
    fn enable_retry_buffering(&mut self) {
        self.adopt();
        self.position = 0;
        let attempt = (self.link.flying.load(SeqCst) >> 8) + 1;
        self.link.flying.store(attempt << 8, SeqCst);
    }
    fn retry_buffer_truncated(&self) -> bool {
        self.released || self.responded
    }
    fn get_retry_buffer(&self) -> Option<Bytes> {
        None
    }
    /// The heart: hands out the body, and while there is nothing to hand out watches the client and the cut signal, and
    /// drives the unsent reply. Cancel-safe: polled afresh every time.
    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        let replay = self.body.is_some();
        let idle = replay || no_body_expected;
        let give = replay && !no_body_expected && !self.is_body_done();
        let Self { out, link, settings, leaver, responded, .. } = self;
        let out = out.as_mut().expect("present until dropped");
        let read = poll_fn(|cx| {
            link.signal.register(cx.waker());
            if link.signal.take() {
                return Poll::Ready(Err(cut_error()));
            }
            if out.pending() {
                if let Poll::Ready(Err(e)) = out.poll_out(cx) {
                    return Poll::Ready(Err(e));
                }
                out.poll_slow(cx, &settings.readers, false)?;
            }
            if give && link.flying.load(SeqCst) & 0xff < PIECES_IN_FLIGHT {
                return Poll::Ready(Ok(None));
            }
            if leaver.is_none() {
                match out.poll_idle(cx, idle) {
                    Poll::Ready(Err(e)) if idle && !*responded => {
                        *leaver = Some(Leaver::new(e, link, &settings.shield))
                    }
                    read => return read,
                }
            }
            let leaver = leaver.as_mut().expect("it has just been put there, or was before");
            leaver.poll(cx).map(Err)
        })
        .await?;
        if !give {
            return Ok(read);
        }
        let body = self.body.as_ref().expect("`give` says that there is one");
        let end = (self.position + PIECE_BYTES).min(body.len());
        let piece = body.slice(self.position..end);
        self.position = end;
        if end >= body.len() && self.responded {
            self.release();
        }
        let attempt = self.link.flying.fetch_add(1, SeqCst) >> 8;
        Ok(Some(Bytes::from_owner(Piece { bytes: piece, link: Arc::clone(&self.link), attempt })))
    }
    fn body_bytes_read(&self) -> usize {
        self.inner().body_bytes_read()
    }

    // ---- the reply

    async fn write_response_header(&mut self, head: Box<ResponseHeader>, end: bool) -> Result<()> {
        self.write_head(head, end).await
    }
    async fn write_response_header_ref(&mut self, head: &ResponseHeader, end: bool) -> Result<()> {
        self.write_head(Box::new(head.clone()), end).await
    }
    async fn write_body(&mut self, bytes: Bytes, end: bool) -> Result<()> {
        self.write_tasks(vec![HttpTask::Body(Some(bytes), end)]).await.map(|_| ())
    }
    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.write_tasks(vec![HttpTask::Trailer(Some(Box::new(trailers)))]).await.map(|_| ())
    }
    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        // The loop asks for these and for the cut in random order, and what is pushed is sent before the error frame.
        if self.link.signal.take() {
            return Err(cut_error());
        }
        let begins = |task: &HttpTask| matches!(task, HttpTask::Header(head, _) if !head.status.is_informational());
        if let Some(leaver) = &mut self.leaver
            && tasks.iter().any(begins)
        {
            return Err(leaver.error().into_down()); // what was waited for has come, and nobody reads it
        }
        self.write_tasks(tasks).await
    }
    fn response_written(&self) -> Option<&ResponseHeader> {
        self.inner().response_written()
    }
    fn body_bytes_sent(&self) -> usize {
        self.out().sent_bytes()
    }
    /// `finish_body` and `finish`: the end of a complete reply.
    async fn finish(&mut self) -> Result<()> {
        if self.out().head_written && !self.out().ended {
            self.write_tasks(vec![HttpTask::Done]).await?;
        }
        Ok(())
    }
    async fn shutdown(&mut self, _code: u32, _context: &str) {}
    async fn abandon(&mut self, _context: &str) {}

    // ---- plumbing

    fn set_read_timeout(&mut self, limit: Option<Duration>) {
        self.inner_mut().set_read_timeout(limit)
    }
    fn get_read_timeout(&self) -> Option<Duration> {
        self.inner().get_read_timeout()
    }
    fn set_write_timeout(&mut self, limit: Option<Duration>) {
        self.inner_mut().set_write_timeout(limit)
    }
    fn get_write_timeout(&self) -> Option<Duration> {
        self.inner().get_write_timeout()
    }
    fn set_total_drain_timeout(&mut self, limit: Option<Duration>) {
        self.inner_mut().set_total_drain_timeout(limit)
    }
    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.inner().get_total_drain_timeout()
    }
    fn digest(&self) -> Option<&Digest> {
        self.inner().digest()
    }
    fn digest_mut(&mut self) -> Option<&mut Digest> {
        self.inner_mut().digest_mut()
    }
    fn client_addr(&self) -> Option<&SocketAddr> {
        self.inner().client_addr()
    }
    fn server_addr(&self) -> Option<&SocketAddr> {
        self.inner().server_addr()
    }
    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }
    fn take_custom_message_reader(
        &mut self,
    ) -> Option<Box<dyn futures::Stream<Item = Result<Bytes>> + Unpin + Send + Sync>> {
        None
    }
    fn restore_custom_message_reader(
        &mut self,
        _reader: Box<dyn futures::Stream<Item = Result<Bytes>> + Unpin + Send + Sync>,
    ) -> Result<()> {
        Ok(())
    }
    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }
    fn restore_custom_message_writer(&mut self, _writer: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }
}

/// A piece that reports when the backend's side has written or dropped it.
struct Piece {
    bytes: Bytes,
    link: Arc<Link>,
    attempt: usize,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // A piece of an earlier attempt does not count: it may linger in a backend's queue.
        let _ =
            self.link.flying.fetch_update(SeqCst, SeqCst, |flying| (flying >> 8 == self.attempt).then(|| flying - 1));
        self.link.signal.wake();
    }
}
