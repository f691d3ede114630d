//! What happened a moment ago, for those who watch: the last events in a ring, as frames of SSE.
//!
//! ```text
//! audit's thread ── publish ──> ring of frames ── since ──> one task for each watcher, which looks now and then
//!  (lines that are written)        ^
//! server's look at itself ── alert ┘
//! ```
//!
//! - *An event is a record that is in the audit*, word for word, with its hashes. The audit's own thread puts it here after it was
//!   written, so requests pay nothing, watched or not, and a page never shows what the audit does not hold.
//! - *The ring is the only memory.* It is bounded in events and in bytes; a watcher has a number and no queue. Whoever is slower than the
//!   ring is told how many events passed by ([`Alert::EventsMissed`]), and nobody waits for it.
//! - *Ids are `RUN-NUMBER`.* A watcher that comes back names the last one it saw. One from an earlier run means nothing here, and its
//!   watcher gets what a new one gets.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use memchr::memmem;
use parking_lot::Mutex;
use serde_json::json;

use super::Outcome;
use super::record::{Moment, Record};

/// Events that are kept. A request makes two: half a second at 1,000 requests a second, a morning on a quiet machine.
const EVENTS: usize = 1024;
/// Bytes of events that are kept. A record has some 1.2 kB, and 8 kB where every text in it is as long as it may be.
const RING_BYTES: usize = 4 << 20;
/// How many of them a new watcher is shown.
const RECENT: u64 = 400;
/// People and scripts that watch at once. Each takes a connection, and a task that looks for news.
pub const WATCHERS: usize = 64;

/// What an operator should look at: a closed set, so that a page and a script can know each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alert {
    /// Records cannot be written, so requests are refused.
    AuditUnavailable,
    /// A backend cannot be reached.
    BackendUnreachable,
    /// A backend gets no requests, or none for some models, since they failed there.
    BreakerOpen,
    /// A backend has been drained for so long that somebody may have forgotten it.
    BackendDrained,
    /// Requests are turned away because no backend is free for them.
    QueueFull,
    /// A change of the policy or of the agents did not load; the last good one stays.
    ReloadFailed,
    /// Strangers were refused so fast that their records were folded into one.
    RefusalsFolded,
    /// Final records found no room in the audit.
    RecordsLost,
    /// A fault of ours was caught.
    Panicked,
    /// This watcher was too slow, and events passed it by.
    EventsMissed,
}

impl Alert {
    pub fn as_str(self) -> &'static str {
        match self {
            Alert::AuditUnavailable => "audit_unavailable",
            Alert::BackendUnreachable => "backend_unreachable",
            Alert::BreakerOpen => "breaker_open",
            Alert::BackendDrained => "backend_drained",
            Alert::QueueFull => "queue_full",
            Alert::ReloadFailed => "reload_failed",
            Alert::RefusalsFolded => "refusals_folded",
            Alert::RecordsLost => "records_lost",
            Alert::Panicked => "panicked",
            Alert::EventsMissed => "events_missed",
        }
    }
}

/// The last events, and how many watch them.
pub struct Activity {
    /// Tells this process's ids from an earlier one's.
    run: String,
    ring: Mutex<Ring>,
    /// The number of the newest event; 0 before the first. Read without the lock by watchers that look for news.
    newest: AtomicU64,
    watchers: AtomicUsize,
}

#[derive(Default)]
struct Ring {
    frames: VecDeque<Bytes>,
    bytes: usize,
    newest: u64,
}

/// What a watcher has not seen.
pub struct News {
    /// Whole frames of SSE, oldest first.
    pub frames: Vec<Bytes>,
    /// The number of the last of them: what to ask with the next time.
    pub upto: u64,
    /// Events that had left the ring already.
    pub missed: u64,
}

impl Default for Activity {
    fn default() -> Activity {
        let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Activity {
            run: format!("{:x}", began.as_millis()),
            ring: Mutex::default(),
            newest: AtomicU64::new(0),
            watchers: AtomicUsize::new(0),
        }
    }
}

impl Activity {
    /// Whole lines of the audit, newlines included. Called by the audit's thread, once they are written.
    pub fn publish(&self, lines: &[u8]) {
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match kind_of(line) {
                Some(Kind::Record(name)) => self.push(name, line),
                Some(Kind::OfTheAudit) => self.push_about(line),
                None => {}
            }
        }
    }

    /// `over`: what was wrong is right again.
    pub fn alert(&self, alert: Alert, over: bool, message: &str) {
        self.push("alert", alert_data(alert, over, message, Moment::now()).as_bytes());
    }

    /// What came after the event with the number `after`, oldest first, at most `limit_bytes` of it (one event at least).
    pub fn since(&self, after: u64, limit_bytes: usize) -> News {
        if self.newest.load(Ordering::Acquire) <= after {
            return News { frames: Vec::new(), upto: after, missed: 0 };
        }
        let ring = self.ring.lock();
        let oldest = ring.newest - ring.frames.len() as u64 + 1;
        let from = (after + 1).max(oldest);
        let (mut frames, mut bytes) = (Vec::new(), 0);
        for frame in ring.frames.range((from - oldest) as usize..) {
            if bytes > 0 && bytes + frame.len() > limit_bytes {
                break;
            }
            bytes += frame.len();
            frames.push(frame.clone());
        }
        News { upto: from + frames.len() as u64 - 1, frames, missed: from - after - 1 }
    }

    /// Where a new watcher begins: a screenful or two back. `last_event_id`: where it stopped before, if it did.
    pub fn resume(&self, last_event_id: Option<&str>) -> u64 {
        let newest = self.newest.load(Ordering::Acquire);
        let seen = last_event_id
            .and_then(|id| id.split_once('-'))
            .filter(|(run, _)| *run == self.run)
            .and_then(|(_, number)| number.parse::<u64>().ok())
            .filter(|number| *number <= newest);
        let oldest = newest - self.ring.lock().frames.len().min(newest as usize) as u64;
        seen.unwrap_or(newest.saturating_sub(RECENT).max(oldest))
    }

    /// A place among those who watch, until it is dropped. `None`: all are taken.
    pub fn watch(self: &std::sync::Arc<Self>) -> Option<Watching> {
        let taken = self.watchers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |watchers| {
            (watchers < WATCHERS).then_some(watchers + 1)
        });
        taken.ok().map(|_| Watching(std::sync::Arc::clone(self)))
    }

    pub fn watchers(&self) -> usize {
        self.watchers.load(Ordering::Relaxed)
    }

    fn push(&self, name: &str, data: &[u8]) {
        let mut ring = self.ring.lock();
        let number = ring.newest + 1;
        let head = format!("id: {}-{number}\nevent: {name}\ndata: ", self.run);
        let mut frame = Vec::with_capacity(head.len() + data.len() + 2);
        frame.extend_from_slice(head.as_bytes());
        frame.extend_from_slice(data);
        frame.extend_from_slice(b"\n\n");
        ring.bytes += frame.len();
        ring.frames.push_back(frame.into());
        ring.newest = number;
        while ring.frames.len() > EVENTS || ring.bytes > RING_BYTES {
            let Some(oldest) = ring.frames.pop_front() else { break };
            ring.bytes -= oldest.len();
        }
        self.newest.store(number, Ordering::Release);
    }

    /// A line in which the audit speaks of itself. Rare: some in a second at most.
    fn push_about(&self, line: &[u8]) {
        let Some(record) = Record::read(line) else { return };
        let alert = match record.extra.outcome {
            Some(Outcome::InternalError) => Alert::RecordsLost,
            _ => Alert::RefusalsFolded,
        };
        let message = record.error.unwrap_or_default();
        self.push("alert", alert_data(alert, false, &message, record.timestamp).as_bytes());
    }
}

/// One who watches.
pub struct Watching(std::sync::Arc<Activity>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The frame that tells a watcher how many events passed it by. It has no id: it is no event of the ring.
pub fn missed_frame(missed: u64) -> String {
    let message = format!("{missed} events came faster than they were read, and are not shown; the audit has them");
    format!("event: alert\ndata: {}\n\n", alert_data(Alert::EventsMissed, false, &message, Moment::now()))
}

fn alert_data(alert: Alert, over: bool, message: &str, at: Moment) -> String {
    let state = if over { "over" } else { "raised" };
    json!({ "alert": alert.as_str(), "state": state, "timestamp": at.to_string(), "message": message }).to_string()
}

enum Kind {
    /// A request's, with the name of its event.
    Record(&'static str),
    /// Of no request: what was folded, what was lost.
    OfTheAudit,
}

/// Which event a line of the audit is. `None`: none; the start of a stream says nothing that the running ones do not show.
///
/// It looks for members instead of parsing: inside a string every quote is escaped, so the text `"phase":"final"` can only be the
/// member itself.
fn kind_of(line: &[u8]) -> Option<Kind> {
    let has = |member: &str| memmem::find(line, member.as_bytes()).is_some();
    let is_final = has(r#""phase":"final""#);
    if !is_final && !has(r#""phase":"request""#) {
        return None;
    }
    if is_final && has(r#""request_id":null"#) {
        return Some(Kind::OfTheAudit);
    }
    Some(Kind::Record(if has(r#""policy_result":"deny""#) {
        "policy_deny"
    } else if has(r#""policy_result":"escalate""#) {
        "policy_escalate"
    } else {
        "tool_call"
    }))
}

#[cfg(test)]
mod tests;
