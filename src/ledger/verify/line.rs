//! One line, read strictly.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::StrDeserializer;
use serde_json::Value;

use super::finding::Fault;
use crate::ledger::chain::{self, Head, Mark, canonical};
use crate::ledger::record::{Id, MCP_SERVER, Moment, TOOL_NAME};

/// Behavry's columns without the two hashes, sorted.
const COLUMNS: [&str; 15] = [
    "action",
    "agent_id",
    "error",
    "extra",
    "id",
    "latency_ms",
    "mcp_server",
    "policy_id",
    "policy_reason",
    "policy_result",
    "response_code",
    "session_id",
    "target",
    "timestamp",
    "tool_name",
];

/// A line whose text and hash hold by themselves.
pub(super) struct Line {
    pub previous: Head,
    pub hash: Head,
    pub timestamp: String,
    pub kind: Kind,
}

pub(super) enum Kind {
    Request(Of),
    StreamStart(Of),
    Final(Final),
    Mark(Mark),
}

/// Whose record it is.
pub(super) struct Of {
    /// What the ids of a request's records have in common.
    pub exchange: u64,
    pub request_id: String,
}

pub(super) struct Final {
    pub exchange: u64,
    pub request_id: Option<String>,
    /// A backend was chosen, which only a recorded request can have.
    pub has_backend: bool,
    pub crashed: bool,
}

/// Reads a line without its newline. Its own form and hash are checked, not its place.
pub(super) fn read(line: &[u8]) -> Result<Line, Fault> {
    let sealed = chain::open(line).ok_or(Fault::Malformed("the line does not end with its two hashes"))?;
    let written = Written::of(&sealed.event)?;
    if !sealed.is_intact() {
        return Err(Fault::Hash);
    }
    let strange = Fault::Malformed("the line does not have the audit's columns");
    if written.columns != COLUMNS.len() {
        return Err(strange);
    }
    let tools = (written.text(b"tool_name"), written.text(b"mcp_server"));
    if (tools.0.as_deref(), tools.1.as_deref()) != (Some(TOOL_NAME), Some(MCP_SERVER)) {
        return Err(strange);
    }
    let stamped = Fault::Malformed("the line has no id, or no timestamp");
    let (Some(id), Some(timestamp)) = (written.id(), written.timestamp()) else { return Err(stamped) };
    let kind = written.kind(id, &sealed.event)?;
    Ok(Line { previous: sealed.previous, hash: sealed.hash, timestamp, kind })
}

/// The id of a line that may be anything.
pub(super) fn id(line: &[u8]) -> Option<String> {
    let event: Value = serde_json::from_slice(line).ok()?;
    // A UUID's own bytes only: whatever else stands there is somebody's text.
    uuid::Uuid::parse_str(event.get("id")?.as_str()?).ok().map(|id| id.to_string())
}

/// The members of a canonical event that this check asks for, as they are written.
#[derive(Default)]
struct Written<'a> {
    /// How many of [`COLUMNS`] were found, in their order, if nothing else was.
    columns: usize,
    values: [&'a [u8]; 9],
}

/// Where they stand in `Written::values`.
const ASKED_FOR: [(usize, &[u8]); 9] = [
    (1, b"id"),
    (1, b"timestamp"),
    (1, b"tool_name"),
    (1, b"mcp_server"),
    (1, b"extra"),
    (2, b"phase"),
    (2, b"request_id"),
    (2, b"backend"),
    (2, b"outcome"),
];

impl<'a> Written<'a> {
    fn of(event: &'a [u8]) -> Result<Written<'a>, Fault> {
        let mut written = Written::default();
        let canonical = canonical::scan(event, &mut |depth, name, value| {
            if depth == 1 {
                let in_order = COLUMNS.get(written.columns).is_some_and(|column| column.as_bytes() == name);
                // Only `extra` has members; those of another could be taken for them.
                let plain = name == b"extra" || !matches!(value.first(), Some(b'{' | b'['));
                written.columns = if in_order && plain { written.columns + 1 } else { usize::MAX };
            }
            if let Some(place) = ASKED_FOR.iter().position(|asked| *asked == (depth, name)) {
                written.values[place] = value;
            }
        });
        if canonical {
            return Ok(written);
        }
        Err(Fault::Malformed(match serde_json::from_slice::<serde::de::IgnoredAny>(event) {
            Ok(_) => "the line is not in canonical form",
            Err(_) => "the line is not JSON",
        }))
    }

    fn value(&self, name: &[u8]) -> &'a [u8] {
        ASKED_FOR.iter().position(|(_, asked)| *asked == name).map_or(&[], |place| self.values[place])
    }

    fn text(&self, name: &[u8]) -> Option<Cow<'a, str>> {
        canonical::words(self.value(name))
    }

    /// The line's id, if it is written as ours are.
    fn id(&self) -> Option<Id> {
        let text = self.text(b"id")?;
        text.parse::<Id>().ok().filter(|id| id.to_string() == text)
    }

    /// Likewise its time stamp.
    fn timestamp(&self) -> Option<String> {
        let text = self.text(b"timestamp")?;
        let moment =
            Moment::deserialize((&*text).into_deserializer() as StrDeserializer<'_, serde_json::Error>).ok()?;
        (moment.to_string() == text).then(|| text.into_owned())
    }

    fn kind(&self, id: Id, event: &[u8]) -> Result<Kind, Fault> {
        let exchange = id.exchange();
        let request_id = self.text(b"request_id").map(Cow::into_owned);
        let unnamed = Fault::Malformed("the record names no request");
        Ok(match self.text(b"phase").as_deref() {
            Some("request") => Kind::Request(Of { exchange, request_id: request_id.ok_or(unnamed)? }),
            Some("stream_start") => Kind::StreamStart(Of { exchange, request_id: request_id.ok_or(unnamed)? }),
            Some("final") => Kind::Final(Final {
                exchange,
                request_id,
                has_backend: self.value(b"backend").starts_with(b"\""),
                crashed: self.value(b"outcome") == b"\"crashed\"",
            }),
            _ => Kind::Mark(mark(event)?),
        })
    }
}

/// A mark has its own members and no others: what a reader of ours passes over, somebody else's could take for something.
fn mark(event: &[u8]) -> Result<Mark, Fault> {
    let event: Value = serde_json::from_slice(event).map_err(|_| Fault::Malformed("the line is not JSON"))?;
    let mark = Mark::of(&event).ok_or(Fault::Malformed("neither a record nor a mark of this format"))?;
    let own = event.as_object().into_iter().flatten().all(|(name, value)| {
        matches!(name.as_str(), "id" | "timestamp" | "tool_name" | "mcp_server" | "extra") || value.is_null()
    });
    let whole = serde_json::to_value(&mark).ok().as_ref() == event.get("extra");
    if own && whole { Ok(mark) } else { Err(Fault::Malformed("the mark has members that are not its own")) }
}
