//! One line, read strictly.

use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::StrDeserializer;
use serde_json::{Map, Value};

use super::finding::Fault;
use crate::ledger::chain::{self, Head, Mark};
use crate::ledger::record::{MCP_SERVER, Moment, TOOL_NAME};

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
    Request { request_id: String },
    StreamStart { request_id: String },
    Final(Final),
    Mark(Mark),
}

pub(super) struct Final {
    pub request_id: Option<String>,
    /// A backend was chosen, which only a recorded request can have.
    pub has_backend: bool,
    /// The policy, or what comes before it, refused: such a request has no record but this.
    pub refused_before: bool,
    pub crashed: bool,
}

/// Reads a line without its newline. Its own form and hash are checked, not its place.
pub(super) fn read(line: &[u8]) -> Result<Line, Fault> {
    let sealed = chain::open(line).ok_or(Fault::Malformed("the line does not end with its two hashes"))?;
    let event: Value = serde_json::from_slice(&sealed.event).map_err(|_| Fault::Malformed("the line is not JSON"))?;
    if chain::canonical(&event).ok().as_deref() != Some(&sealed.event) {
        return Err(Fault::Malformed("the line is not in canonical form"));
    }
    if !sealed.is_intact() {
        return Err(Fault::Hash);
    }
    let kind = kind(&event)?;
    let timestamp = timestamp(&event).ok_or(Fault::Malformed("the line has no id, or no timestamp"))?;
    Ok(Line { previous: sealed.previous, hash: sealed.hash, timestamp, kind })
}

/// The id of a line that may be anything.
pub(super) fn id(line: &[u8]) -> Option<String> {
    let event: Value = serde_json::from_slice(line).ok()?;
    // A UUID's own bytes only: whatever else stands there is somebody's text.
    uuid::Uuid::parse_str(event.get("id")?.as_str()?).ok().map(|id| id.to_string())
}

/// A line's time stamp, if that and its id are written as ours are.
fn timestamp(event: &Value) -> Option<String> {
    let (id, text) = (event["id"].as_str()?, event["timestamp"].as_str()?);
    uuid::Uuid::parse_str(id).ok().filter(|uuid| uuid.hyphenated().to_string() == id)?;
    let moment = Moment::deserialize(text.into_deserializer() as StrDeserializer<'_, serde_json::Error>).ok()?;
    (moment.to_string() == text).then(|| text.to_owned())
}

fn kind(event: &Value) -> Result<Kind, Fault> {
    let strange = Fault::Malformed("the line does not have the audit's columns");
    let (Value::Object(columns), Some(extra)) = (event, event["extra"].as_object()) else { return Err(strange) };
    let all_there = columns.len() == COLUMNS.len() && COLUMNS.iter().all(|name| columns.contains_key(*name));
    if !all_there || event["tool_name"] != TOOL_NAME || event["mcp_server"] != MCP_SERVER {
        return Err(strange);
    }
    let text = |name: &str| extra.get(name).and_then(Value::as_str).map(str::to_owned);
    let asked_for = || text("request_id").ok_or(Fault::Malformed("the record names no request"));
    Ok(match extra.get("phase").and_then(Value::as_str) {
        Some("request") => Kind::Request { request_id: asked_for()? },
        Some("stream_start") => Kind::StreamStart { request_id: asked_for()? },
        Some("final") => Kind::Final(Final {
            request_id: text("request_id"),
            has_backend: extra.get("backend").is_some_and(Value::is_string),
            refused_before: event["policy_result"] != "allow",
            crashed: extra.get("outcome").and_then(Value::as_str) == Some("crashed"),
        }),
        _ => Kind::Mark(mark(event, columns)?),
    })
}

/// A mark has its own members and no others: what a reader of ours passes over, somebody else's could take for something.
fn mark(event: &Value, columns: &Map<String, Value>) -> Result<Mark, Fault> {
    let mark = Mark::of(event).ok_or(Fault::Malformed("neither a record nor a mark of this format"))?;
    let own = columns.iter().all(|(name, value)| {
        matches!(name.as_str(), "id" | "timestamp" | "tool_name" | "mcp_server" | "extra") || value.is_null()
    });
    let whole = serde_json::to_value(&mark).ok().as_ref() == columns.get("extra");
    if own && whole { Ok(mark) } else { Err(Fault::Malformed("the mark has members that are not its own")) }
}
