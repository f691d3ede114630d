//! What the door and the hooks of one request say to each other.
//!
//! Pingora owns the session while its hooks run, and drops both the session and the context when they are done, also when
//! they panic. Whatever must survive that (the session, the exchange) is left here by a `Drop`, and the door takes it.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use super::outgoing::Outgoing;
use crate::exchange::{Exchange, Left};
use crate::live::Signal;
use crate::refusal::Refusal;
use crate::wire::Dialect;
use crate::wire::failure::Stream;

/// One per request.
pub struct Link {
    exchange: Mutex<Option<Box<Exchange>>>,
    /// The request body to replay, set by the intake.
    body: Mutex<Option<Bytes>>,
    /// A cut from outside; its waker is that of the proxy's task, waiting in `read_body_or_idle` or behind a full buffer.
    pub signal: Arc<Signal>,
    /// The head of a reply is on its way to the client, also if none of its bytes has left yet.
    answered: AtomicBool,
    /// Answer with `Connection: close`.
    close: AtomicBool,
    /// The reply's head waits until its body has been judged.
    holds_head: AtomicBool,
    /// The reply that was held is not to be sent.
    spoiled: AtomicBool,
    /// Attempt << 8 | pieces of the request body handed out and not yet written to the backend.
    pub(super) flying: AtomicUsize,
    /// The request that was sent last makes its backend load the model.
    loading: AtomicBool,
    /// The client left before its reply began.
    client_left: Mutex<Option<Left>>,
    /// Milliseconds after `born` at which the request was last sent to a backend; 0: not yet.
    sent_ms: AtomicU64,
    born: Instant,
    /// `Downstream::drop` leaves the inner session and what is unsent here.
    pub(super) left: Mutex<Option<Outgoing>>,
}

tokio::task_local! {
    pub(super) static LINK: Arc<Link>;
}

impl Link {
    pub fn new(exchange: Box<Exchange>) -> Link {
        Link {
            exchange: Mutex::new(Some(exchange)),
            body: Mutex::default(),
            signal: Arc::default(),
            answered: AtomicBool::new(false),
            close: AtomicBool::new(false),
            holds_head: AtomicBool::new(false),
            spoiled: AtomicBool::new(false),
            flying: AtomicUsize::new(0),
            loading: AtomicBool::new(false),
            client_left: Mutex::default(),
            sent_ms: AtomicU64::new(0),
            born: Instant::now(),
            left: Mutex::default(),
        }
    }

    /// The whole request body has been read, and perhaps rewritten: every attempt from now on sends this one.
    pub fn replay(&self, body: Bytes) {
        *self.body.lock() = Some(body);
    }

    /// Every attempt from now on sends what `change` makes of the body, where it makes something of it. The new length.
    pub fn rewrite(&self, change: impl FnOnce(&[u8]) -> Option<Vec<u8>>) -> Option<usize> {
        let mut body = self.body.lock();
        let changed = change(body.as_ref()?)?;
        let bytes = changed.len();
        *body = Some(changed.into());
        Some(bytes)
    }

    /// The body, until the first attempt takes it.
    pub fn body(&self) -> Option<Bytes> {
        self.body.lock().clone()
    }

    pub(super) fn take_body(&self) -> Option<Bytes> {
        self.body.lock().take()
    }

    /// `Session::set_keepalive(None)` is a no-op on a custom session: call this before the answer instead.
    pub fn close_connection(&self) {
        self.close.store(true, SeqCst);
    }

    pub(super) fn closes_connection(&self) -> bool {
        self.close.load(SeqCst)
    }

    /// The head of the reply that begins waits for the first bytes of its body, or its end: until then another answer may take its place.
    pub fn hold_head(&self) {
        self.holds_head.store(true, SeqCst);
    }

    pub(super) fn holds_head(&self) -> bool {
        self.holds_head.load(SeqCst)
    }

    /// What was held is not to be sent: the exchange has a refusal that is. Of a stream, nothing is sent after what was just said.
    pub fn spoil(&self) {
        self.spoiled.store(true, SeqCst);
    }

    pub(super) fn is_spoiled(&self) -> bool {
        self.spoiled.load(SeqCst)
    }

    pub(super) fn note_answered(&self) {
        self.answered.store(true, SeqCst);
    }

    /// Whether it is too late for another answer. `Session::response_written` says so only once the head's bytes have left: a cut in
    /// between would send a refusal's body behind the backend's 200.
    pub fn is_answered(&self) -> bool {
        self.answered.load(SeqCst)
    }

    /// A request head is about to be written to a backend. `loading`: it will have to load the model.
    pub fn sent_upstream(&self, loading: bool) {
        self.loading.store(loading, SeqCst);
        self.sent_ms.store((self.born.elapsed().as_millis() as u64).max(1), SeqCst);
    }

    pub(super) fn is_loading(&self) -> bool {
        self.loading.load(SeqCst)
    }

    pub(super) fn note_client_left(&self, left: Left) {
        *self.client_left.lock() = Some(left);
        self.signal.progress.client_left();
    }

    /// Whether the client left before its reply began: nobody is there to be answered, by whatever backend.
    pub fn client_left(&self) -> Option<Left> {
        *self.client_left.lock()
    }

    /// Until when a client's leaving is kept from the backend, if the request was sent only just now: Ollama leaks a handler and a
    /// descriptor for requests that are closed before its scheduler has picked them up (ollama-wire, section 0.4: 57 of 60 after
    /// 1 ms, none after 20).
    pub(super) fn cancel_not_before(&self, grace: Duration) -> Option<Instant> {
        let sent_ms = self.sent_ms.load(SeqCst);
        (sent_ms > 0).then(|| self.born + Duration::from_millis(sent_ms) + grace).filter(|at| *at > Instant::now())
    }

    /// The client's dialect and the request's id, once the hooks are done.
    pub(super) fn peek_exchange(&self) -> Option<(Dialect, String)> {
        self.exchange.lock().as_ref().map(|exchange| (exchange.dialect, exchange.request_id.clone()))
    }

    /// What a stream whose backend failed ends with.
    pub(super) fn stream_refusal(&self) -> Refusal {
        let failure = self.exchange.lock().as_ref().and_then(|exchange| exchange.refusal.clone());
        failure.unwrap_or_else(|| Refusal::backend_cut("the backend broke off"))
    }

    /// What a stream that is cut ends with.
    pub(super) fn last_words(&self, refusal: &Refusal, sse: bool, mid_record: bool) -> Vec<u8> {
        match &mut *self.exchange.lock() {
            Some(exchange) => exchange.last_words(refusal, sse, mid_record),
            None => refusal.frame(Stream::of(Dialect::Native, None, sse, 0), mid_record),
        }
    }

    pub(super) fn take_exchange(&self) -> Option<Box<Exchange>> {
        self.exchange.lock().take()
    }
}

/// Pingora's CTX: the exchange, on loan from the link.
pub struct Ticket {
    exchange: Option<Box<Exchange>>,
    pub link: Arc<Link>,
}

impl Ticket {
    /// Picks up the exchange of the request that this task serves. Only the door starts such a task.
    pub fn pick_up() -> Ticket {
        let link = LINK.with(Arc::clone);
        Ticket { exchange: link.take_exchange(), link }
    }
}

impl Deref for Ticket {
    type Target = Exchange;
    fn deref(&self) -> &Exchange {
        self.exchange.as_deref().expect("a ticket holds its exchange until it is dropped; the door issues one per link")
    }
}

impl DerefMut for Ticket {
    fn deref_mut(&mut self) -> &mut Exchange {
        self.exchange
            .as_deref_mut()
            .expect("a ticket holds its exchange until it is dropped; the door issues one per link")
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        *self.link.exchange.lock() = self.exchange.take();
    }
}
