//! What a check found, in words that say what to do.

use std::fmt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use crate::ledger::chain::WriterName;
use crate::ledger::trail::TrailError;

/// Where a problem is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Spot {
    /// The file's name.
    pub segment: String,
    /// From 1, as editors count.
    pub line: u64,
    /// Of the line's first byte.
    pub offset: u64,
    /// The record's own id, where it can be read.
    pub id: Option<String>,
}

/// What no honest log has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// `None`: it is about something that is not there.
    pub spot: Option<Spot>,
    #[serde(serialize_with = "in_words")]
    pub fault: Fault,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not JSON, not our columns, or not in canonical form.
    Malformed(&'static str),
    Overlong,
    /// The file became shorter while it was read.
    Shrunk,
    /// The hash is not that of the line's own text.
    Hash,
    /// The line is not chained to the one before it.
    Link {
        count: u64,
    },
    /// A segment does not begin with `segment_open`.
    NotOpened,
    /// A line stands behind a `segment_close`, or `segment_open` stands within a segment.
    AfterClose,
    OpenedWithin,
    /// A chain that was stopped has another segment.
    AfterStop,
    /// Bytes without a newline where no crash can have left them.
    Torn {
        bytes: u64,
    },
    /// A mark says something about its own chain that is not so.
    Mark {
        what: &'static str,
        said: String,
        found: String,
    },
    /// `segment_close` without a checkpoint before it.
    CloseWithoutCheckpoint,
    Signature,
    UnknownKey {
        key_id: String,
    },
    /// A `stream_start`, or a final record of a request that reached a backend, without its `request` record.
    WithoutRequest {
        request_id: String,
    },
    /// A second `request` record of one request.
    RequestTwice {
        request_id: String,
    },
    /// A chain that was stopped in order left requests without a final record.
    LeftOpen {
        writer: WriterName,
        requests: u64,
    },
    /// A record with outcome `crashed` that belongs to no adopted request.
    NotAdopted {
        request_id: String,
    },
    /// Lines before the first segment that is there are gone, and no tombstone says so.
    Missing {
        writer: WriterName,
        segment: u32,
        lines: u64,
    },
    /// A tombstone, a head, an adoption or a kept checkpoint names a chain that is not there, or is shorter, or another.
    ChainGone {
        writer: WriterName,
        by: By,
        count: u64,
    },
    ChainShorter {
        writer: WriterName,
        by: By,
        count: u64,
        found: u64,
    },
    ChainOther {
        writer: WriterName,
        by: By,
        count: u64,
    },
    /// A chain went on after it was adopted as dead.
    GrewAfterAdoption {
        writer: WriterName,
        count: u64,
        found: u64,
    },
    /// Two adoptions, or tombstones, of the same that differ.
    Contradiction {
        writer: WriterName,
        what: &'static str,
    },
    /// Adopted requests did not all get their final record.
    AdoptedLeftOpen {
        writer: WriterName,
        requests: u64,
    },
}

/// Who remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// A checkpoint that was kept elsewhere.
    Checkpoint {
        timestamp: String,
    },
    /// The first line of another writer's chain.
    Head {
        of: WriterName,
    },
    Adoption {
        of: WriterName,
    },
    Tombstone {
        of: WriterName,
    },
}

/// What nothing here shows. Not a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gap {
    NoKey,
    /// Keys of the state folder that were all accepted.
    SeveralKeys {
        keys: usize,
    },
    NoCheckpointsKept,
    /// The chain was being written.
    Running {
        writer: WriterName,
        open_requests: u64,
    },
    /// The chain has no end, and nobody has adopted it.
    Open {
        writer: WriterName,
        open_requests: u64,
        torn_bytes: u64,
    },
    /// Lines after a chain's last signed mark.
    Unsigned {
        writer: WriterName,
        lines: u64,
    },
    /// A segment is deleted, as a tombstone says: what stood there cannot be seen, only that it was `lines` lines.
    Deleted {
        writer: WriterName,
        segments: u32,
        lines: u64,
    },
    /// A kept checkpoint names a chain that is not there and whose tombstones are gone too; it is older than what retention deleted.
    LongAgo {
        writer: WriterName,
    },
    /// A tombstone's segment is still there: its writer died before it could delete it.
    StillThere {
        segment: String,
    },
    /// A segment that its writer left for another ends in mid-line. The chain goes on, so no line is missing.
    TornWithin {
        segment: String,
        bytes: u64,
    },
    /// Requests ended here whose beginning stood in segments that are gone.
    BegunBefore {
        writer: WriterName,
        requests: u64,
    },
}

/// Why nothing could be said.
#[derive(Debug)]
pub enum CannotCheck {
    NothingThere { folder: PathBuf },
    Unreadable(TrailError),
    Key { path: PathBuf, what: String },
    Checkpoints { path: PathBuf, line: u64, what: String },
}

impl From<TrailError> for CannotCheck {
    fn from(error: TrailError) -> CannotCheck {
        CannotCheck::Unreadable(error)
    }
}

impl fmt::Display for CannotCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CannotCheck::NothingThere { folder } => {
                write!(f, "{}: no audit-*.jsonl there; name the folder with --audit-dir", folder.display())
            }
            CannotCheck::Unreadable(error) => error.fmt(f),
            CannotCheck::Key { path, what } => write!(f, "{}: {what}", path.display()),
            CannotCheck::Checkpoints { path, line: 0, what } => write!(f, "{}: {what}", path.display()),
            CannotCheck::Checkpoints { path, line, what } => write!(f, "{}: line {line}: {what}", path.display()),
        }
    }
}

impl std::error::Error for CannotCheck {}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {} (byte {}", self.segment, self.line, self.offset)?;
        match &self.id {
            Some(id) => write!(f, ", id {id})"),
            None => f.write_str(")"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.spot {
            Some(spot) => write!(f, "{spot}: {}", self.fault),
            None => self.fault.fmt(f),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Malformed(what) => write!(f, "{what}: edited, or not written by this proxy"),
            Fault::Overlong => {
                f.write_str("a line longer than any that is written: inserted, or newlines were taken out")
            }
            Fault::Shrunk => f.write_str("the file became shorter while it was read"),
            Fault::Hash => f.write_str("its event_hash is not the hash of its text: it was edited"),
            Fault::Link { count } => write!(
                f,
                "it is not chained to the line before it: lines were inserted, deleted, repeated or put in another order here \
                 (after {count} lines of this chain that hold)"
            ),
            Fault::NotOpened => f.write_str("the segment does not begin with segment_open: its beginning was cut off"),
            Fault::AfterClose => f.write_str("it stands behind the segment's segment_close: it was appended"),
            Fault::OpenedWithin => f.write_str("a segment_open within a segment: files were joined"),
            Fault::AfterStop => f.write_str("the chain was stopped, and here is another segment of it: it was added"),
            Fault::Torn { bytes } => {
                write!(
                    f,
                    "{bytes} bytes without a newline, where no crash can have left them: they were appended, or cut"
                )
            }
            Fault::Mark { what, said, found } => write!(f, "its {what} says {said}, and it is {found}"),
            Fault::CloseWithoutCheckpoint => {
                f.write_str("a segment_close without the checkpoint that stands before each")
            }
            Fault::Signature => {
                f.write_str("its signature does not hold: it was changed or made by somebody without the key")
            }
            Fault::UnknownKey { key_id } => write!(
                f,
                "it is signed with a key that was not given, {key_id}; if the proxy had another key once, give its public half \
                 with --public-key too"
            ),
            Fault::WithoutRequest { request_id } => {
                write!(f, "request {request_id} reached a backend and has no request record before this")
            }
            Fault::RequestTwice { request_id } => {
                write!(f, "request {request_id} has a request record before this that no final record has ended")
            }
            Fault::LeftOpen { writer, requests } => {
                write!(f, "the chain of {writer} was stopped in order, and {requests} requests have no final record")
            }
            Fault::NotAdopted { request_id } => {
                write!(
                    f,
                    "request {request_id} ended as crashed, and no adopted chain has it open, or it ended as crashed before"
                )
            }
            Fault::Missing { writer, segment, lines } => write!(
                f,
                "segments of {writer} before segment {segment} are missing, {lines} lines, and no tombstone says that retention \
                 deleted them; if a file was renamed, give it its name back"
            ),
            Fault::ChainGone { writer, by, count } => {
                write!(
                    f,
                    "{by} the chain of {writer} had {count} lines; they are not there, and no tombstone says that retention deleted them"
                )
            }
            Fault::ChainShorter { writer, by, count, found } => write!(
                f,
                "the chain of {writer} was cut or rolled back: {by} it had {count} lines, and {found} are left"
            ),
            Fault::ChainOther { writer, by, count } => {
                write!(f, "the chain of {writer} is not the one that was: {by} its line {count} was another")
            }
            Fault::GrewAfterAdoption { writer, count, found } => write!(
                f,
                "the chain of {writer} was adopted as dead with {count} lines, and has {found}: lines were appended or cut"
            ),
            Fault::Contradiction { writer, what } => write!(f, "two {what} of {writer} say different things"),
            Fault::AdoptedLeftOpen { writer, requests } => write!(
                f,
                "the chain of {writer} was adopted, and {requests} of its open requests have no final record after that"
            ),
        }
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            By::Checkpoint { timestamp } => write!(f, "by the checkpoint of {timestamp} that was kept"),
            By::Head { of } => write!(f, "when {of} began"),
            By::Adoption { of } => write!(f, "when {of} adopted it"),
            By::Tombstone { of } => write!(f, "by a tombstone of {of}"),
        }
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Gap::NoKey => f.write_str(
                "signatures: no public key was given (--public-key), so whoever could write the files could have made all of them anew",
            ),
            Gap::SeveralKeys { keys } => write!(
                f,
                "whose the {keys} keys are: all that lie in the state folder (audit-key*.pub) were accepted, and whoever can write there can \
                 add one; --public-key names the right ones"
            ),
            Gap::NoCheckpointsKept => f.write_str(
                "truncation and rollback: no checkpoint kept elsewhere was given (--checkpoint), so nothing shows whether the end of \
                 the log, or its latest writer's whole chain, was cut off",
            ),
            Gap::Running { writer, open_requests } => {
                write!(f, "{writer}: its writer is still running; {open_requests} requests have no final record yet")
            }
            Gap::Open { writer, open_requests, torn_bytes } => write!(
                f,
                "{writer}: it has no end, {open_requests} requests have no final record and {torn_bytes} bytes no newline: its writer died \
                 and the next start will adopt it, or its end was cut off"
            ),
            Gap::Unsigned { writer, lines } => write!(
                f,
                "{writer}: its last {lines} lines stand behind its last checkpoint: a change there, with all hashes made anew, does not show"
            ),
            Gap::Deleted { writer, segments, lines } => write!(
                f,
                "{writer}: retention deleted {segments} segments, up to line {lines} of the chain, and signed for it; what stood there \
                 cannot be checked"
            ),
            Gap::LongAgo { writer } => write!(
                f,
                "{writer}: a kept checkpoint names lines that are not there; they are older than segments that retention deleted, and \
                 so, most likely, is their tombstone"
            ),
            Gap::StillThere { segment } => {
                write!(f, "{segment}: a tombstone says that it was deleted, and it is there; its writer died in between")
            }
            Gap::TornWithin { segment, bytes } => write!(
                f,
                "{segment}: {bytes} bytes at its end belong to no line: a write that failed, or somebody's; the chain goes on without them"
            ),
            Gap::BegunBefore { writer, requests } => write!(
                f,
                "{writer}: {requests} requests ended whose request records would stand in segments that are not there"
            ),
        }
    }
}

impl Serialize for Gap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn in_words<S: Serializer>(fault: &Fault, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(fault)
}
