//! What can be seen of an exchange while it runs: who, what, how far. For people who watch; nothing decides by it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// Set once a request is allowed and written down, and counted on while its reply passes.
#[derive(Default)]
pub struct Progress {
    facts: OnceLock<Box<Facts>>,
    /// From the first byte of the request to the first of the reply, in microseconds and one more; 0: there is none yet.
    first_byte_us: AtomicU64,
    records: AtomicU64,
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

    pub fn first_byte(&self, after: Duration) {
        let after = u64::try_from(after.as_micros()).unwrap_or(u64::MAX - 1);
        self.first_byte_us.store(after + 1, Ordering::Relaxed);
    }

    /// `records`: of the reply's stream, since it began.
    pub fn passed(&self, records: u64) {
        self.records.store(records, Ordering::Relaxed);
    }

    /// Whether there is something to show.
    pub fn has_begun(&self) -> bool {
        self.facts.get().is_some()
    }
}

/// A row for the page. `chunks` are whole records of the stream: a sign of progress, mostly one for each token.
pub(super) struct Row<'a> {
    pub id: u64,
    pub progress: &'a Progress,
}

impl Serialize for Row<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Progress { facts, first_byte_us, records } = self.progress;
        let mut row = serializer.serialize_struct("Row", 12)?;
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
        row.serialize_field("ttft_ms", &first_byte_us.checked_sub(1).map(|us| us / 1000))?;
        row.serialize_field("chunks", &records.load(Ordering::Relaxed))?;
        row.end()
    }
}
