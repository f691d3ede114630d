//! The audit's format on disk, version `behavry.audit.v1` (docs/adr/0030-audit-chain.md): what a line is, how it is chained, what is
//! signed, and what a segment is called. Pure: bytes and values in, bytes and values out.
//!
//! A line is its own canonical form: what Python's `json.dumps(event, sort_keys=True, separators=(",", ":"))` writes of the event
//! without its two hashes, with `previous_hash` and `event_hash` put in as its last two members. So whoever checks a line cuts text
//! off its end, and parses nothing.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::record::{Id, MCP_SERVER, Moment, TOOL_NAME};

pub mod canonical;
pub mod mark;
pub mod segment;

pub use canonical::{NotWhole, canonical, write_string};
pub use mark::Mark;
pub use segment::{SegmentName, WriterName};

/// The version of the format: named in the first line of each segment and in everything that is signed.
pub const FORMAT: &str = "behavry.audit.v1";

/// `previous_hash` of a writer's very first line.
pub const GENESIS: &str = "GENESIS";

/// What a line is chained to, and what is chained to a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Head {
    /// Before a writer's first line.
    Genesis,
    /// The `event_hash` of a line: SHA-256.
    Line([u8; 32]),
}

impl Head {
    /// The head after a line with this event: SHA-256 over the event's canonical form followed by this head's text.
    pub fn after(self, event: &[u8]) -> Head {
        let mut hash = Sha256::new();
        hash.update(event);
        self.with_text(|text| hash.update(text));
        Head::Line(hash.finalize().into())
    }

    fn with_text<T>(self, then: impl FnOnce(&[u8]) -> T) -> T {
        match self {
            Head::Genesis => then(GENESIS.as_bytes()),
            Head::Line(hash) => then(&hex(&hash)),
        }
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_text(|text| text.iter().try_for_each(|byte| write!(f, "{}", char::from(*byte))))
    }
}

/// Neither `GENESIS` nor 64 lower-case hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAHead;

impl FromStr for Head {
    type Err = NotAHead;

    fn from_str(text: &str) -> Result<Head, NotAHead> {
        if text == GENESIS {
            return Ok(Head::Genesis);
        }
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(NotAHead);
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let value = |digit: u8| if digit <= b'9' { digit - b'0' } else { digit - b'a' + 10 };
            *byte = value(pair[0]) << 4 | value(pair[1]);
        }
        Ok(Head::Line(hash))
    }
}

/// A line taken apart. Whether its hash is right, [`Sealed::is_intact`] says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The event in canonical form, without its two hashes.
    pub event: Vec<u8>,
    pub previous: Head,
    pub hash: Head,
}

impl Sealed {
    /// Whether the line's hash is that of its event and of what it says it is chained to.
    pub fn is_intact(&self) -> bool {
        self.previous.after(&self.event) == self.hash
    }
}

/// Appends the line of `event` (canonical, without hashes) to `into`, newline included, and returns the head after it.
pub fn seal(event: &[u8], previous: Head, into: &mut Vec<u8>) -> Head {
    let head = previous.after(event);
    into.extend_from_slice(event.strip_suffix(b"}").unwrap_or(event));
    into.extend_from_slice(br#","previous_hash":""#);
    previous.with_text(|text| into.extend_from_slice(text));
    into.extend_from_slice(br#"","event_hash":""#);
    head.with_text(|text| into.extend_from_slice(text));
    into.extend_from_slice(b"\"}\n");
    head
}

/// Takes a line (without its newline) apart. `None`: it does not end as a line of this format does.
pub fn open(line: &[u8]) -> Option<Sealed> {
    let rest = line.strip_suffix(b"\"}")?;
    let (rest, hash) = rest.split_at_checked(rest.len().checked_sub(64)?)?;
    let rest = rest.strip_suffix(br#"","event_hash":""#)?;
    let at = rest.len() - rest.iter().rev().position(|byte| *byte == b'"')?;
    let (rest, previous) = rest.split_at(at);
    let event = rest.strip_suffix(br#","previous_hash":""#)?;
    let head = |text: &[u8]| std::str::from_utf8(text).ok()?.parse().ok();
    Some(Sealed { event: [event, b"}"].concat(), previous: head(previous)?, hash: head(hash)? })
}

/// What a mark's signature is made over: the canonical form of its members but `phase`, `key_id` and `signature`, with the format and
/// the mark's own time stamp. `extra` is a mark's. The same rule for checkpoints and tombstones.
pub fn signing_payload(timestamp: &str, extra: &Map<String, Value>) -> Result<Vec<u8>, NotWhole> {
    let signed = |name: &str| !matches!(name, "phase" | "key_id" | "signature");
    let members = extra.iter().filter(|(name, _)| signed(name)).map(|(name, value)| (name.clone(), value.clone()));
    let mut payload: Map<String, Value> = members.collect();
    payload.insert("format".to_owned(), FORMAT.into());
    payload.insert("timestamp".to_owned(), timestamp.into());
    canonical(&Value::Object(payload))
}

/// The name of a key: `sha256:` and the first 16 hex digits of SHA-256 over the base64 text of its 32 public bytes.
pub fn key_id(public: &[u8; 32]) -> String {
    let hash: [u8; 32] = Sha256::digest(STANDARD.encode(public)).into();
    format!("sha256:{}", String::from_utf8_lossy(&hex(&hash)[..16]))
}

/// Behavry's columns with nothing in them, and `extra`: what a mark is.
fn event(id: Id, timestamp: Moment, extra: Value) -> Value {
    let mut columns = Map::new();
    for name in [
        "action",
        "agent_id",
        "error",
        "latency_ms",
        "policy_id",
        "policy_reason",
        "policy_result",
        "response_code",
        "session_id",
        "target",
    ] {
        columns.insert(name.to_owned(), Value::Null);
    }
    columns.insert("id".to_owned(), id.to_string().into());
    columns.insert("timestamp".to_owned(), timestamp.to_string().into());
    columns.insert("tool_name".to_owned(), TOOL_NAME.into());
    columns.insert("mcp_server".to_owned(), MCP_SERVER.into());
    columns.insert("extra".to_owned(), extra);
    Value::Object(columns)
}

const HEX: &[u8; 16] = b"0123456789abcdef";

fn hex(bytes: &[u8; 32]) -> [u8; 64] {
    let mut text = [0; 64];
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair[0] = HEX[usize::from(byte >> 4)];
        pair[1] = HEX[usize::from(byte & 15)];
    }
    text
}

#[cfg(test)]
mod tests;
