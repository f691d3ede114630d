//! Marks: the lines of the chain that tell of the chain itself. Behavry's columns, all null but five, and in `extra` only what is here.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{FORMAT, NotWhole, WriterName, canonical, event, signing_payload};
use crate::ledger::record::{Id, Moment};

/// A mark's `extra`. `count` is always the number of lines of the chain that is spoken of, before this one; `head` the last of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Mark {
    /// The first line of each segment.
    SegmentOpen {
        format: String,
        writer: WriterName,
        segment: u32,
        count: u64,
        /// The last known line of every other writer's chain in the folder, sorted by writer: in a writer's first segment only.
        heads: Vec<ChainHead>,
        key_id: String,
    },
    /// Signed, at an interval and before each close.
    Checkpoint { writer: WriterName, segment: u32, count: u64, head: String, key_id: String, signature: String },
    /// The last line of a segment that ended in order.
    SegmentClose { writer: WriterName, segment: u32, count: u64, head: String, reason: CloseReason },
    /// A chain of a process that died, taken over by this writer. All members name the dead chain as it was found.
    Adopted {
        writer: WriterName,
        segment: u32,
        count: u64,
        head: String,
        /// Bytes behind its last whole line.
        torn_bytes: u64,
        /// Requests without a final record; the `final` records with outcome `crashed` follow.
        open_requests: u64,
    },
    /// A segment that retention deleted. Signed.
    Tombstone {
        writer: WriterName,
        segment: u32,
        /// `previous_hash` of its first line.
        first_previous_hash: String,
        /// Of its last line.
        head: String,
        /// Lines of its chain before it.
        count_before: u64,
        /// Lines in it.
        count: u64,
        /// Time stamps of its first and last line.
        from: String,
        to: String,
        reason: TombstoneReason,
        key_id: String,
        signature: String,
    },
}

/// The last known line of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainHead {
    pub writer: WriterName,
    pub segment: u32,
    pub count: u64,
    pub head: String,
}

/// Why a segment was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CloseReason {
    /// It was large or old enough.
    Rotated,
    /// The process ended in order.
    Stopped,
    /// A write or an fsync of it failed.
    Failed,
    /// Somebody renamed or removed the file.
    Renamed,
}

/// Why retention deleted a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TombstoneReason {
    Age,
    Size,
}

impl Mark {
    /// The mark of a line. `None`: it is a record, or nothing of ours.
    pub fn of(event: &Value) -> Option<Mark> {
        Mark::deserialize(event.get("extra")?).ok()
    }

    /// The event of a mark, in canonical form.
    pub fn event(&self, id: Id, timestamp: Moment) -> Vec<u8> {
        canonical(&event(id, timestamp, self.extra())).expect("a mark has whole numbers only")
    }

    /// What the signature of a checkpoint or a tombstone is made over. `None`: this mark is not signed.
    pub fn payload(&self, timestamp: &str) -> Option<Vec<u8>> {
        match (self, self.extra()) {
            (Mark::Checkpoint { .. } | Mark::Tombstone { .. }, Value::Object(extra)) => {
                let payload: Result<_, NotWhole> = signing_payload(timestamp, &extra);
                Some(payload.expect("a mark has whole numbers only"))
            }
            _ => None,
        }
    }

    /// The first line of a segment.
    pub fn segment_open(writer: WriterName, segment: u32, count: u64, heads: Vec<ChainHead>, key_id: &str) -> Mark {
        Mark::SegmentOpen { format: FORMAT.to_owned(), writer, segment, count, heads, key_id: key_id.to_owned() }
    }

    fn extra(&self) -> Value {
        serde_json::to_value(self).expect("a mark has only text, whole numbers and lists of them")
    }
}
