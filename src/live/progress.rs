//! What can be seen of an exchange while it runs: who, what, how far. For people who watch; nothing decides by it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// Set once a request is allowed and written down, and counted on while its reply passes.
#[derive(Default)]
pub struct Progress {
    facts: OnceLock<Box<Facts>>,
    /// From the first byte of the request to the first of the reply, in microseconds and one more; 0: there is none yet.
    first_byte_us: AtomicU64,
    records: AtomicU64,
    /// From the first byte of the request to when it began to wait for a backend, in the same way; 0: it does not wait.
    queued_us: AtomicU64,
    client_left: AtomicBool,
}

/// What is known of an exchange when it is sent to a backend. No text of its body.
pub struct Facts {
    pub began: Instant,
    pub request_id: String,
    pub agent_id: Option<String>,
    pub session_id: Option<String>,
    pub action: String,
    /// The path for the backend.
    pub target: String,
    pub model: Option<String>,
    pub stream: Option<bool>,
    pub policy_reason: Option<String>,
}

impl Progress {
    /// Only the first call counts.
    pub fn begin(&self, facts: Facts) {
        let _ = self.facts.set(Box::new(facts)); // a retry is the same exchange
    }

    /// It waits for a backend, since so long after its first byte.
    pub fn queued(&self, after: Duration) {
        self.queued_us.store(micros_and_one(after), Ordering::Relaxed);
    }

    /// It waits no longer.
    pub fn placed(&self) {
        self.queued_us.store(0, Ordering::Relaxed);
    }

    pub fn first_byte(&self, after: Duration) {
        self.first_byte_us.store(micros_and_one(after), Ordering::Relaxed);
    }

    /// `records`: of the reply's stream, since it began.
    pub fn passed(&self, records: u64) {
        self.records.store(records, Ordering::Relaxed);
    }

    /// The client has gone before its reply began; what its backend does goes on.
    pub fn client_left(&self) {
        self.client_left.store(true, Ordering::Relaxed);
    }

    /// For which model it waits, and how long it has. `None`: it does not.
    pub fn waits(&self) -> Option<(&str, Duration)> {
        let after = Duration::from_micros(self.queued_us.load(Ordering::Relaxed).checked_sub(1)?);
        let facts = self.facts.get()?;
        Some((facts.model.as_deref().unwrap_or_default(), facts.began.elapsed().saturating_sub(after)))
    }

    /// Whether there is something to show.
    pub fn has_begun(&self) -> bool {
        self.facts.get().is_some()
    }
}

fn micros_and_one(after: Duration) -> u64 {
    u64::try_from(after.as_micros()).unwrap_or(u64::MAX - 1) + 1
}

/// A row for the page. `chunks` are whole records of the stream: a sign of progress, mostly one for each token.
pub(super) struct Row<'a> {
    pub id: u64,
    pub progress: &'a Progress,
}

impl Serialize for Row<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Progress { facts, first_byte_us, records, queued_us, client_left } = self.progress;
        let mut row = serializer.serialize_struct("Row", 13)?;
        row.serialize_field("id", &self.id)?;
        if let Some(facts) = facts.get() {
            row.serialize_field("request_id", &facts.request_id)?;
            row.serialize_field("agent_id", &facts.agent_id)?;
            row.serialize_field("session_id", &facts.session_id)?;
            row.serialize_field("action", &facts.action)?;
            row.serialize_field("target", &facts.target)?;
            row.serialize_field("model", &facts.model)?;
            row.serialize_field("stream", &facts.stream)?;
            row.serialize_field("policy_reason", &facts.policy_reason)?;
            row.serialize_field("elapsed_ms", &u64::try_from(facts.began.elapsed().as_millis()).unwrap_or(u64::MAX))?;
        }
        let first_byte_us = first_byte_us.load(Ordering::Relaxed);
        // `waiting` is for the backend's first byte; `left` is the client, from a backend that goes on.
        let state = match (client_left.load(Ordering::Relaxed), queued_us.load(Ordering::Relaxed), first_byte_us) {
            (true, ..) => "left",
            (_, 1.., _) => "queued",
            (.., 0) => "waiting",
            _ => "answering",
        };
        row.serialize_field("state", state)?;
        row.serialize_field("ttft_ms", &first_byte_us.checked_sub(1).map(|us| us / 1000))?;
        row.serialize_field("chunks", &records.load(Ordering::Relaxed))?;
        row.end()
    }
}
