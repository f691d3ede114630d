//! What the simulator saw: the witness of the tests.
//!
//! Every time here was taken by the simulator itself when it noticed the event, so that "the backend was cancelled
//! within 100 ms" is said by the backend and not by the proxy under test.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// One request as it arrived, and what became of it.
#[derive(Clone)]
pub struct Seen {
    /// Which of the simulator's connections, counted from 1 in the order of acceptance.
    pub connection_id: u64,
    pub method: String,
    /// The request target exactly as it was sent.
    pub target: String,
    /// The request head exactly as it was sent, from the request line to the empty line.
    pub raw_head: Vec<u8>,
    /// Names as they were sent, in their order. A value that is not UTF-8 shows U+FFFD.
    pub headers: Vec<(String, String)>,
    /// Bytes of the body, chunked framing removed.
    pub body_bytes: u64,
    /// SHA-256 of the body, chunked framing removed; of nothing until the body is whole.
    pub body_sha256: [u8; 32],
    /// The body's first bytes, as far as `keep_body_bytes` goes.
    pub body: Vec<u8>,
    /// Whether the whole body arrived.
    pub body_whole: bool,
    /// The model that the body names, as it is spelled there.
    pub model: Option<String>,
    /// When the head was complete.
    pub started: Instant,
    /// When the first byte of the reply was handed to the kernel.
    pub first_byte: Option<Instant>,
    /// When it was over; `None` while it runs. For `ClientGone`: when the client's FIN or RST was noticed.
    pub ended: Option<Instant>,
    /// How it ended; `None` while it runs.
    pub ended_how: Option<Ending>,
}

/// How an exchange ended, from the simulator's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Everything was handed to the kernel. Says nothing about whether the client has read it.
    Complete,
    /// The client closed or reset its connection, or half-closed it (which Ollama takes for the same).
    ClientGone,
    /// A fault ended it.
    Fault,
    /// The request was not HTTP, or not a request that can be answered on this connection.
    BadRequest,
    /// The simulator was stopped, or told to refuse, in the middle of it.
    Stopped,
}

/// A body is never printed: a failing test must not show a prompt.
impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seen")
            .field("connection_id", &self.connection_id)
            .field("method", &self.method)
            .field("path", &self.target.split('?').next().unwrap_or_default())
            .field("body_bytes", &self.body_bytes)
            .field("body_whole", &self.body_whole)
            .field("answered", &self.first_byte.is_some())
            .field("lasted", &self.ended.map(|ended| ended.duration_since(self.started)))
            .field("ended_how", &self.ended_how)
            .finish_non_exhaustive()
    }
}

impl Seen {
    /// The value of the first header of that name, whatever its case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body's SHA-256 in hexadecimal.
    pub fn body_sha256_hex(&self) -> String {
        super::text::hex(&self.body_sha256)
    }
}

/// Bytes that went through all connections so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// Nothing like it was seen in the time that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotSeen {
    pub waited: Duration,
    /// How many requests there were at the end.
    pub requests: usize,
}

impl std::fmt::Display for NotSeen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the simulator did not see it within {:?}; it saw {} requests", self.waited, self.requests)
    }
}

impl std::error::Error for NotSeen {}

/// The requests that are remembered: the latest `limit`, older ones fall out.
pub(super) struct Witnesses {
    limit: usize,
    log: Mutex<Log>,
    changed: Notify,
    pub accepted: AtomicU64,
    pub received_bytes: AtomicU64,
    pub sent_bytes: AtomicU64,
}

struct Log {
    first: u64,
    seen: VecDeque<Seen>,
}

impl Witnesses {
    pub fn new(limit: usize) -> Self {
        Witnesses {
            limit,
            log: Mutex::new(Log { first: 0, seen: VecDeque::new() }),
            changed: Notify::new(),
            accepted: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        }
    }

    pub fn on(&self) -> bool {
        self.limit > 0
    }

    /// Remembers a request that has begun. The testimony ends it as `Stopped` if nobody else does.
    pub fn begin(self: &Arc<Self>, seen: impl FnOnce() -> Seen) -> Testimony {
        if !self.on() {
            return Testimony { to: None };
        }
        let mut log = self.log.lock();
        while log.seen.len() >= self.limit {
            log.seen.pop_front();
            log.first += 1;
        }
        let number = log.first + log.seen.len() as u64;
        log.seen.push_back(seen());
        drop(log);
        self.changed.notify_waiters();
        Testimony { to: Some((Arc::clone(self), number)) }
    }

    pub fn all(&self) -> Vec<Seen> {
        self.log.lock().seen.iter().cloned().collect()
    }

    pub fn forget(&self) {
        let mut log = self.log.lock();
        log.first += log.seen.len() as u64;
        log.seen.clear();
    }

    /// A connection was accepted; gives its number.
    pub fn accept(&self) -> u64 {
        let number = self.accepted.fetch_add(1, Ordering::Relaxed) + 1;
        self.changed.notify_waiters();
        number
    }

    /// Waits until the predicate holds for what was seen; asks it again after each change.
    pub async fn wait_for(&self, limit: Duration, predicate: impl Fn(&[Seen]) -> bool) -> Result<Vec<Seen>, NotSeen> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            // Registered before the look, so that a change between look and wait is not missed.
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let seen = self.all();
            if predicate(&seen) {
                return Ok(seen);
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(NotSeen { waited: limit, requests: seen.len() });
            }
        }
    }
}

/// Writes on into one remembered request. Without witnesses it does nothing.
pub(super) struct Testimony {
    to: Option<(Arc<Witnesses>, u64)>,
}

impl Testimony {
    pub fn wants_body(&self) -> bool {
        self.to.is_some()
    }

    pub fn add(&self, change: impl FnOnce(&mut Seen)) {
        if let Some((witnesses, number)) = &self.to {
            let mut log = witnesses.log.lock();
            let place = number.checked_sub(log.first).map(|place| place as usize);
            if let Some(seen) = place.and_then(|place| log.seen.get_mut(place)) {
                change(seen);
            }
            drop(log);
            witnesses.changed.notify_waiters();
        }
    }

    pub fn first_byte(&self) {
        self.add(|seen| {
            seen.first_byte.get_or_insert_with(Instant::now);
        });
    }

    pub fn end(mut self, how: Ending, at: Instant) {
        self.close(how, at);
    }

    fn close(&mut self, how: Ending, at: Instant) {
        self.add(|seen| {
            seen.ended = Some(at);
            seen.ended_how = Some(how);
        });
        self.to = None;
    }
}

impl Drop for Testimony {
    fn drop(&mut self) {
        self.close(Ending::Stopped, Instant::now());
    }
}
