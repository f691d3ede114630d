//! One audit record: Behavry's columns and `extra` (contract, section 6), in the canonical form of [`super::chain`].
//!
//! A [`Record`] is built from an [`Entry`] (what the proxy knows, borrowed) and writes itself: serde_json with a formatter that
//! escapes as we do costs 20,000 instructions a record (each key is a string to be escaped there), this a tenth, and two records are
//! written for each request. What is unknown is `null`, never 0. Everything that comes from outside is bounded in length, and a line is plain ASCII: newlines,
//! terminal escapes, C1 controls, line separators and bidirectional overrides all come out as `\uXXXX`, so no reader of the file
//! (a terminal, a log shipper, a page) can be led astray by a name. Numbers are whole: floats never occur.

use std::borrow::Cow;
use std::fmt;
use std::io::Write as _;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, de};
use uuid::Uuid;

use super::{Outcome, Phase, chain};

/// `tool_name` of every record (contract, section 1).
pub const TOOL_NAME: &str = "ollama-api";
/// `mcp_server` of every record (contract, section 1).
pub const MCP_SERVER: &str = "ollama-proxy";

/// Names: agents, sessions, models, backends, requesters, roles. Longer ones are cut, and end with `…`.
const NAME_BYTES: usize = 256;
/// Sentences: reasons and errors.
const TEXT_BYTES: usize = 1024;
/// Paths. A path is rebuilt from the endpoint table where one was matched; only an unknown route brings the client's own.
const PATH_BYTES: usize = 512;
/// A finish reason is one word; anything else from a backend is not recorded, since it might be reply text.
const WORD_BYTES: usize = 40;
/// Roles a token may have are 8 (contract, section 2); filters are fewer. A list is cut here in any case.
const LIST_ITEMS: usize = 16;

/// What the proxy knows about an exchange at the time of a record. Borrowed, so that building one copies nothing;
/// `None` is "unknown" and becomes `null`.
#[derive(Clone, Copy, Default)]
pub struct Entry<'a> {
    /// A random number that the ids of all records of one exchange end with. 0: it has one record only.
    pub exchange: u64,
    // Who.
    pub agent_id: Option<&'a str>,
    pub session_id: Option<&'a str>,
    pub agent_roles: Option<&'a [String]>,
    pub requester_id: Option<&'a str>,
    pub requester_channel: Option<&'a str>,
    pub source_ip: Option<IpAddr>,
    // What: method and path, never the query.
    pub request_id: Option<&'a str>,
    pub action: Option<&'a str>,
    pub target: Option<&'a str>,
    pub dialect: Option<&'static str>,
    /// The canonical short name.
    pub model: Option<&'a str>,
    /// As the caller wrote it, if it fits Ollama's grammar for names.
    pub model_raw: Option<&'a str>,
    pub stream: Option<bool>,
    pub has_system_prompt: Option<bool>,
    pub has_tools: Option<bool>,
    pub message_count: Option<u64>,
    // May they.
    pub policy_result: Option<&'static str>,
    pub policy_id: Option<&'a str>,
    pub policy_reason: Option<&'a str>,
    pub policy_revision: Option<&'a str>,
    /// What was cut from or put into the request. `Some(&[])` says that nothing was.
    pub filters: Option<&'a [&'static str]>,
    // Where to.
    pub backend: Option<&'a str>,
    pub placement: Option<&'a str>,
    pub retries: Option<u32>,
    pub queue_ms: Option<u64>,
    pub upstream_status: Option<u16>,
    // What came of it.
    pub response_code: Option<u16>,
    pub latency_ms: Option<u64>,
    pub ttft_ms: Option<u64>,
    pub input_tokens: Option<u64>,
    pub output_tokens: Option<u64>,
    pub finish_reason: Option<&'a str>,
    pub bytes_in: Option<u64>,
    pub bytes_out: Option<u64>,
    pub error: Option<&'a str>,
}

/// One record, without the two hashes that chain its line.
#[derive(Deserialize)]
pub struct Record<'a> {
    pub id: Id,
    pub timestamp: Moment,
    pub agent_id: Option<Cow<'a, str>>,
    pub session_id: Option<Cow<'a, str>>,
    pub action: Option<Cow<'a, str>>,
    pub target: Option<Cow<'a, str>>,
    pub tool_name: Cow<'a, str>,
    pub mcp_server: Cow<'a, str>,
    pub policy_result: Option<Cow<'a, str>>,
    pub policy_id: Option<Cow<'a, str>>,
    pub policy_reason: Option<Cow<'a, str>>,
    pub response_code: Option<u16>,
    pub latency_ms: Option<u64>,
    pub error: Option<Cow<'a, str>>,
    pub extra: Extra<'a>,
}

/// The members that are ours, beside Behavry's columns.
#[derive(Deserialize)]
pub struct Extra<'a> {
    pub phase: Phase,
    pub request_id: Option<Cow<'a, str>>,
    pub dialect: Option<Cow<'a, str>>,
    pub model: Option<Cow<'a, str>>,
    pub model_raw: Option<Cow<'a, str>>,
    pub stream: Option<bool>,
    pub has_system_prompt: Option<bool>,
    pub has_tools: Option<bool>,
    pub message_count: Option<u64>,
    pub input_tokens: Option<u64>,
    pub output_tokens: Option<u64>,
    pub finish_reason: Option<Cow<'a, str>>,
    pub outcome: Option<Outcome>,
    pub retries: Option<u32>,
    pub placement: Option<Cow<'a, str>>,
    pub filters: Option<Words<'a>>,
    pub requester_id: Option<Cow<'a, str>>,
    pub requester_channel: Option<Cow<'a, str>>,
    pub backend: Option<Cow<'a, str>>,
    pub upstream_status: Option<u16>,
    pub ttft_ms: Option<u64>,
    pub queue_ms: Option<u64>,
    pub bytes_in: Option<u64>,
    pub bytes_out: Option<u64>,
    pub policy_revision: Option<Cow<'a, str>>,
    pub agent_roles: Option<Words<'a>>,
    pub source_ip: Option<IpAddr>,
}

impl<'a> Record<'a> {
    /// `outcome` belongs to a final record; the other phases have none yet.
    pub fn new(id: Id, timestamp: Moment, phase: Phase, outcome: Option<Outcome>, entry: &Entry<'a>) -> Record<'a> {
        Record {
            id,
            timestamp,
            agent_id: clip(entry.agent_id, NAME_BYTES),
            session_id: clip(entry.session_id, NAME_BYTES),
            action: clip(entry.action, WORD_BYTES),
            target: clip(entry.target, PATH_BYTES),
            tool_name: Cow::Borrowed(TOOL_NAME),
            mcp_server: Cow::Borrowed(MCP_SERVER),
            policy_result: entry.policy_result.map(Cow::Borrowed),
            policy_id: clip(entry.policy_id, NAME_BYTES),
            policy_reason: clip(entry.policy_reason, TEXT_BYTES),
            response_code: entry.response_code,
            latency_ms: entry.latency_ms,
            error: clip(entry.error, TEXT_BYTES),
            extra: Extra {
                phase,
                request_id: clip(entry.request_id, NAME_BYTES),
                dialect: entry.dialect.map(Cow::Borrowed),
                model: clip(entry.model, NAME_BYTES),
                model_raw: clip(entry.model_raw, NAME_BYTES),
                stream: entry.stream,
                has_system_prompt: entry.has_system_prompt,
                has_tools: entry.has_tools,
                message_count: entry.message_count,
                input_tokens: entry.input_tokens,
                output_tokens: entry.output_tokens,
                finish_reason: entry.finish_reason.filter(|word| is_word(word)).map(Cow::Borrowed),
                outcome,
                retries: entry.retries,
                placement: clip(entry.placement, NAME_BYTES),
                filters: entry.filters.map(Words::Literals),
                requester_id: clip(entry.requester_id, NAME_BYTES),
                requester_channel: clip(entry.requester_channel, NAME_BYTES),
                backend: clip(entry.backend, NAME_BYTES),
                upstream_status: entry.upstream_status,
                ttft_ms: entry.ttft_ms,
                queue_ms: entry.queue_ms,
                bytes_in: entry.bytes_in,
                bytes_out: entry.bytes_out,
                policy_revision: clip(entry.policy_revision, NAME_BYTES),
                agent_roles: entry.agent_roles.map(Words::Strings),
                source_ip: entry.source_ip.map(|ip| ip.to_canonical()),
            },
        }
    }

    /// Appends the record in canonical form, without its hashes and without a newline: [`super::chain::seal`] makes a line of it, on the
    /// audit's thread. Members are sorted by name, as they stand here.
    pub fn write_event(&self, event: &mut Vec<u8>) {
        let extra = &self.extra;
        let mut line = Line(event);
        line.text(r#"{"action":"#, &self.action);
        line.text(r#","agent_id":"#, &self.agent_id);
        line.text(r#","error":"#, &self.error);
        line.words(r#","extra":{"agent_roles":"#, &extra.agent_roles);
        line.text(r#","backend":"#, &extra.backend);
        line.number(r#","bytes_in":"#, extra.bytes_in);
        line.number(r#","bytes_out":"#, extra.bytes_out);
        line.text(r#","dialect":"#, &extra.dialect);
        line.words(r#","filters":"#, &extra.filters);
        line.text(r#","finish_reason":"#, &extra.finish_reason);
        line.flag(r#","has_system_prompt":"#, extra.has_system_prompt);
        line.flag(r#","has_tools":"#, extra.has_tools);
        line.number(r#","input_tokens":"#, extra.input_tokens);
        line.number(r#","message_count":"#, extra.message_count);
        line.text(r#","model":"#, &extra.model);
        line.text(r#","model_raw":"#, &extra.model_raw);
        line.text(r#","outcome":"#, &extra.outcome.map(|outcome| Cow::Borrowed(outcome.as_str())));
        line.number(r#","output_tokens":"#, extra.output_tokens);
        line.raw(r#","phase":"#);
        line.string(extra.phase.as_str());
        line.text(r#","placement":"#, &extra.placement);
        line.text(r#","policy_revision":"#, &extra.policy_revision);
        line.number(r#","queue_ms":"#, extra.queue_ms);
        line.text(r#","request_id":"#, &extra.request_id);
        line.text(r#","requester_channel":"#, &extra.requester_channel);
        line.text(r#","requester_id":"#, &extra.requester_id);
        line.number(r#","retries":"#, extra.retries);
        line.address(r#","source_ip":"#, extra.source_ip);
        line.flag(r#","stream":"#, extra.stream);
        line.number(r#","ttft_ms":"#, extra.ttft_ms);
        line.number(r#","upstream_status":"#, extra.upstream_status);
        line.raw(r#"},"id":""#);
        line.raw(self.id.0.hyphenated().encode_lower(&mut Uuid::encode_buffer()));
        line.raw("\"");
        line.number(r#","latency_ms":"#, self.latency_ms);
        line.raw(r#","mcp_server":"#);
        line.string(&self.mcp_server);
        line.text(r#","policy_id":"#, &self.policy_id);
        line.text(r#","policy_reason":"#, &self.policy_reason);
        line.text(r#","policy_result":"#, &self.policy_result);
        line.number(r#","response_code":"#, self.response_code);
        line.text(r#","session_id":"#, &self.session_id);
        line.text(r#","target":"#, &self.target);
        line.raw(r#","timestamp":""#);
        self.timestamp.write(line.0);
        line.raw(r#"","tool_name":"#);
        line.string(&self.tool_name);
        line.raw("}");
    }

    /// Reads an event that [`Record::write_event`] wrote, or its line. `None`: it is neither; a mark is not.
    pub fn read(line: &[u8]) -> Option<Record<'static>> {
        serde_json::from_slice(line).ok()
    }

    /// The final record of an exchange of which only this record is left.
    pub fn into_final(self, id: Id, timestamp: Moment, outcome: Outcome, error: &'a str) -> Record<'a> {
        let began = self.timestamp;
        Record {
            id,
            timestamp,
            latency_ms: Some((timestamp.0.saturating_sub(began.0)).max(0) as u64 / 1000),
            error: Some(Cow::Borrowed(error)),
            extra: Extra { phase: Phase::Final, outcome: Some(outcome), ..self.extra },
            ..self
        }
    }
}

/// The id of a record: a UUID of version 7 (RFC 9562), so that ids sort by time. The records of one exchange end with the same 62 random
/// bits, by which a `final` is known to belong to its `request`; the 12 bits before say the phase, so that no two are equal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id(Uuid);

impl Id {
    /// `random` is taken from the caller: the operating system would be asked anew for each id by `Uuid::now_v7` (uuid 1.x
    /// without `fast-rng`), where a thread's generator costs some nanoseconds.
    pub fn new(at: Moment, random: [u8; 10]) -> Id {
        let millis = (at.0.max(0) / 1000) as u64;
        Id(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
    }
}

impl Id {
    /// The id of a record of this exchange.
    pub fn of(at: Moment, phase: Phase, exchange: u64) -> Id {
        let mut random = [0; 10];
        random[1] = phase as u8;
        random[2..].copy_from_slice(&exchange.to_be_bytes());
        Id::new(at, random)
    }

    /// What the ids of the exchange's records have in common.
    pub fn exchange(self) -> u64 {
        self.0.as_u64_pair().1 & (u64::MAX >> 2) // without the two bits of the variant
    }
}

impl FromStr for Id {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Id, uuid::Error> {
        Uuid::try_parse(text).map(Id)
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.hyphenated())
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Id, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        Uuid::try_parse(&text).map(Id).map_err(|_| de::Error::custom("not a UUID"))
    }
}

/// A moment in microseconds since 1970, UTC; in a line as `2026-11-22T18:35:16.000001+00:00` (the form that Behavry signs:
/// microseconds, and `+00:00` rather than `Z`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(i64);

/// The last whole second that jiff 0.2 knows ends here (`Timestamp::MAX`, 26 hours before the year 10000).
const LAST_MICROSECOND: i64 = 253_402_207_199_999_999;

impl Moment {
    pub fn now() -> Moment {
        SystemTime::now().into()
    }

    pub fn from_microseconds(microseconds: i64) -> Moment {
        Moment(microseconds.clamp(0, LAST_MICROSECOND))
    }

    fn write(self, line: &mut Vec<u8>) {
        let at = jiff::Timestamp::from_microsecond(self.0).unwrap_or_default();
        let at = jiff::tz::Offset::UTC.to_datetime(at);
        let mut text = *b"0000-00-00T00:00:00.000000+00:00";
        digits(&mut text[0..4], at.year() as u32);
        digits(&mut text[5..7], at.month() as u32);
        digits(&mut text[8..10], at.day() as u32);
        digits(&mut text[11..13], at.hour() as u32);
        digits(&mut text[14..16], at.minute() as u32);
        digits(&mut text[17..19], at.second() as u32);
        digits(&mut text[20..26], at.subsec_nanosecond() as u32 / 1000);
        line.extend_from_slice(&text);
    }
}

impl From<SystemTime> for Moment {
    /// A clock before 1970 reads as 1970.
    fn from(time: SystemTime) -> Moment {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment::from_microseconds(i64::try_from(since.as_micros()).unwrap_or(LAST_MICROSECOND))
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Vec::new();
        self.write(&mut text);
        f.write_str(&String::from_utf8_lossy(&text))
    }
}

/// `number` right-aligned into `into`, with leading zeros.
fn digits(into: &mut [u8], mut number: u32) {
    for place in into.iter_mut().rev() {
        *place = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Moment, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let at: jiff::Timestamp = text.parse().map_err(|_| de::Error::custom("not a time"))?;
        Ok(Moment::from_microseconds(at.as_microsecond()))
    }
}

/// A list of words: borrowed from where they live, or read back from a line.
pub enum Words<'a> {
    Strings(&'a [String]),
    Literals(&'a [&'static str]),
    Read(Vec<String>),
}

impl<'de> Deserialize<'de> for Words<'_> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(Words::Read)
    }
}

fn clip(text: Option<&str>, limit_bytes: usize) -> Option<Cow<'_, str>> {
    text.map(|text| clipped(text, limit_bytes))
}

/// `text` in at most `limit_bytes` bytes; one that was cut ends with `…`.
fn clipped(text: &str, limit_bytes: usize) -> Cow<'_, str> {
    const MARK: char = '…';
    if text.len() <= limit_bytes {
        return Cow::Borrowed(text);
    }
    let mut end = limit_bytes - MARK.len_utf8();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Cow::Owned(format!("{}{MARK}", &text[..end]))
}

fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= WORD_BYTES
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
}

/// JSON in printable ASCII.
struct Line<'b>(&'b mut Vec<u8>);

impl Line<'_> {
    fn raw(&mut self, text: &str) {
        self.0.extend_from_slice(text.as_bytes());
    }

    fn text(&mut self, key: &'static str, text: &Option<Cow<'_, str>>) {
        self.raw(key);
        match text {
            Some(text) => self.string(text),
            None => self.raw("null"),
        }
    }

    fn string(&mut self, text: &str) {
        chain::write_string(text, self.0);
    }

    fn flag(&mut self, key: &'static str, flag: Option<bool>) {
        self.raw(key);
        self.raw(match flag {
            Some(true) => "true",
            Some(false) => "false",
            None => "null",
        });
    }

    fn number(&mut self, key: &'static str, number: Option<impl Into<u64>>) {
        self.raw(key);
        match number {
            Some(number) => self.decimal(number.into()),
            None => self.raw("null"),
        }
    }

    fn decimal(&mut self, number: u64) {
        let (mut left, mut text, mut first) = (number, [0; 20], 20);
        while first == 20 || left > 0 {
            first -= 1;
            text[first] = b'0' + (left % 10) as u8;
            left /= 10;
        }
        self.0.extend_from_slice(&text[first..]);
    }

    fn words(&mut self, key: &'static str, words: &Option<Words<'_>>) {
        self.raw(key);
        match words {
            Some(Words::Strings(words)) => self.list(words),
            Some(Words::Literals(words)) => self.list(words),
            Some(Words::Read(words)) => self.list(words),
            None => self.raw("null"),
        }
    }

    fn list(&mut self, words: &[impl AsRef<str>]) {
        for (place, word) in words.iter().take(LIST_ITEMS).enumerate() {
            self.0.push(if place == 0 { b'[' } else { b',' });
            self.string(&clipped(word.as_ref(), NAME_BYTES));
        }
        self.raw(if words.is_empty() { "[]" } else { "]" });
    }

    fn address(&mut self, key: &'static str, address: Option<IpAddr>) {
        self.raw(key);
        match address {
            Some(IpAddr::V4(address)) => {
                for (place, octet) in address.octets().into_iter().enumerate() {
                    self.0.push(if place == 0 { b'"' } else { b'.' });
                    self.decimal(octet.into());
                }
                self.raw("\"");
            }
            Some(IpAddr::V6(address)) => _ = write!(self.0, "\"{address}\""), // As above.
            None => self.raw("null"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(phase: Phase, outcome: Option<Outcome>, entry: &Entry<'_>) -> String {
        let at = Moment::from_microseconds(1_795_372_516_000_001);
        let mut line = Vec::new();
        Record::new(Id::new(at, [7; 10]), at, phase, outcome, entry).write_event(&mut line);
        String::from_utf8(line).expect("an event is ASCII")
    }

    fn roles() -> Vec<String> {
        vec!["internal".to_owned(), "analyst".to_owned()]
    }

    fn full<'a>(roles: &'a [String]) -> Entry<'a> {
        Entry {
            exchange: 0,
            agent_id: Some("agent-1"),
            session_id: Some("session-1"),
            agent_roles: Some(roles),
            requester_id: Some("user-7"),
            requester_channel: Some("slack"),
            source_ip: Some("::ffff:192.0.2.7".parse().expect("an address")),
            request_id: Some("req-1"),
            action: Some("POST"),
            target: Some("/api/chat"),
            dialect: Some("native"),
            model: Some("llama3.2"),
            model_raw: Some("Llama3.2:latest"),
            stream: Some(true),
            has_system_prompt: Some(false),
            has_tools: Some(false),
            message_count: Some(2),
            policy_result: Some("allow"),
            policy_id: Some("behavry.authz"),
            policy_reason: None,
            policy_revision: Some("abc"),
            filters: Some(&["web_search"]),
            backend: Some("ollama-1"),
            placement: Some("only"),
            retries: Some(0),
            queue_ms: Some(0),
            upstream_status: Some(200),
            response_code: Some(200),
            latency_ms: Some(12),
            ttft_ms: Some(3),
            input_tokens: Some(26),
            output_tokens: Some(9),
            finish_reason: Some("stop"),
            bytes_in: Some(100),
            bytes_out: Some(2000),
            error: None,
        }
    }

    #[test]
    fn a_final_record_is_this_event() {
        assert_eq!(
            line(Phase::Final, Some(Outcome::Complete), &full(&roles())),
            concat!(
                r#"{"action":"POST","agent_id":"agent-1","error":null,"extra":{"agent_roles":["internal","analyst"],"#,
                r#""backend":"ollama-1","bytes_in":100,"bytes_out":2000,"dialect":"native","filters":["web_search"],"#,
                r#""finish_reason":"stop","has_system_prompt":false,"has_tools":false,"input_tokens":26,"#,
                r#""message_count":2,"model":"llama3.2","model_raw":"Llama3.2:latest","outcome":"complete","#,
                r#""output_tokens":9,"phase":"final","placement":"only","policy_revision":"abc","queue_ms":0,"#,
                r#""request_id":"req-1","requester_channel":"slack","requester_id":"user-7","retries":0,"#,
                r#""source_ip":"192.0.2.7","stream":true,"ttft_ms":3,"upstream_status":200},"#,
                r#""id":"01a2048a-82a0-7707-8707-070707070707","latency_ms":12,"#,
                r#""mcp_server":"ollama-proxy","policy_id":"behavry.authz","policy_reason":null,"#,
                r#""policy_result":"allow","response_code":200,"session_id":"session-1","target":"/api/chat","#,
                r#""timestamp":"2026-11-22T18:35:16.000001+00:00","tool_name":"ollama-api"}"#,
            )
        );
    }

    #[test]
    fn every_event_is_in_the_canonical_form_of_its_value() {
        let hostile = vec!["\n\u{9b}\u{1f600}\"".to_owned()];
        for entry in [Entry::default(), full(&roles()), Entry { error: Some("\t\u{8}\u{c}\u{7f}é"), ..full(&hostile) }]
        {
            let line = line(Phase::Final, None, &entry);
            let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            assert_eq!(chain::canonical(&value), Ok(line.into_bytes()));
        }
    }

    #[test]
    fn what_is_unknown_is_null_and_never_missing() {
        let line = line(Phase::Request, None, &Entry::default());
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let columns = value.as_object().expect("an object");
        assert_eq!(columns.len(), 15);
        for (name, value) in columns {
            let known = ["id", "timestamp", "tool_name", "mcp_server", "extra"].contains(&name.as_str());
            assert_eq!(value.is_null(), !known, "{name}");
        }
        let extra = columns["extra"].as_object().expect("an object");
        assert_eq!(extra.len(), 27);
        for (name, value) in extra {
            assert_eq!(value.is_null(), name != "phase", "{name}");
        }
    }

    #[test]
    fn names_with_newlines_escapes_and_overrides_come_out_as_one_ascii_line_with_the_same_meaning() {
        let hostile =
            "a\n\r\u{1b}[2J\u{7f}\u{9b}31m\u{2028}\u{2029}\u{202e}\u{2066}\u{200b}\u{feff}\"\\é漢\u{1f600}\u{e0041}\0";
        let roles = vec![hostile.to_owned()];
        let entry = Entry {
            agent_id: Some(hostile),
            session_id: Some(hostile),
            agent_roles: Some(&roles),
            requester_id: Some(hostile),
            requester_channel: Some(hostile),
            request_id: Some(hostile),
            action: Some("GET"),
            target: Some(hostile),
            model: Some(hostile),
            model_raw: Some(hostile),
            policy_id: Some(hostile),
            policy_reason: Some(hostile),
            error: Some(hostile),
            ..Entry::default()
        };
        let line = line(Phase::Final, Some(Outcome::Refused), &entry);
        assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{line}");
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        for name in ["agent_id", "session_id", "target", "policy_id", "policy_reason", "error"] {
            assert_eq!(value[name], hostile, "{name}");
        }
        for name in ["requester_channel", "requester_id", "request_id", "model", "model_raw"] {
            assert_eq!(value["extra"][name], hostile, "{name}");
        }
        assert_eq!(value["extra"]["agent_roles"][0], hostile);
    }

    #[test]
    fn every_text_from_outside_is_bounded_and_cut_between_characters() {
        let long = "ü".repeat(100_000);
        let roles = vec![long.clone(); 100];
        let filters = ["filter"; 100];
        let entry = Entry {
            agent_id: Some(&long),
            session_id: Some(&long),
            agent_roles: Some(&roles),
            requester_id: Some(&long),
            requester_channel: Some(&long),
            request_id: Some(&long),
            action: Some(&long),
            target: Some(&long),
            model: Some(&long),
            model_raw: Some(&long),
            policy_id: Some(&long),
            policy_reason: Some(&long),
            policy_revision: Some(&long),
            filters: Some(&filters),
            backend: Some(&long),
            placement: Some(&long),
            finish_reason: Some(&long),
            error: Some(&long),
            ..Entry::default()
        };
        let line = line(Phase::Final, Some(Outcome::Refused), &entry);
        assert!(line.len() < 32 * 1024, "{} bytes", line.len());
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let agent = value["agent_id"].as_str().expect("a name");
        assert!(agent.len() <= NAME_BYTES && agent.ends_with("ü…"), "{} bytes", agent.len());
    }

    #[test]
    fn a_finish_reason_that_is_not_a_word_is_not_recorded() {
        for (reason, kept) in
            [("stop", true), ("tool_calls", true), ("my secret reply", false), ("", false), ("\u{1b}[", false)]
        {
            let line = line(Phase::Final, None, &Entry { finish_reason: Some(reason), ..Entry::default() });
            let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            assert_eq!(value["extra"]["finish_reason"].is_string(), kept, "{reason:?}");
        }
    }

    #[test]
    fn addresses_are_written_in_their_shortest_form() {
        for (address, written) in
            [("127.0.0.1", "127.0.0.1"), ("::ffff:10.20.255.0", "10.20.255.0"), ("2001:db8:0::1", "2001:db8::1")]
        {
            let source_ip = Some(address.parse().expect("an address"));
            let line = line(Phase::Final, None, &Entry { source_ip, ..Entry::default() });
            assert!(line.contains(&format!(r#""source_ip":"{written}","#)), "{line}");
        }
    }

    #[test]
    fn a_record_read_back_is_written_as_the_same_event() {
        let written = line(Phase::Final, Some(Outcome::Complete), &full(&roles()));
        let mut again = Vec::new();
        Record::read(written.as_bytes()).expect("our own event").write_event(&mut again);
        assert_eq!(again, written.as_bytes());
        let mut sealed = Vec::new();
        chain::seal(&again, chain::Head::Genesis, &mut sealed);
        assert!(Record::read(&sealed).is_some(), "its line too");
        assert!(Record::read(b"{}").is_none());
        assert!(Record::read(&written.as_bytes()[..written.len() / 2]).is_none());
    }

    #[test]
    fn ids_of_one_exchange_end_alike_and_none_is_another() {
        let at = Moment::from_microseconds(1_795_372_516_000_001);
        let exchange = u64::MAX - 5;
        let ids = Phase::ALL.map(|phase| Id::of(at, phase, exchange));
        assert!(ids.iter().all(|id| id.exchange() == ids[0].exchange()));
        assert_ne!(ids[0].exchange(), Id::of(at, Phase::Request, 7).exchange());
        let mut texts: Vec<String> = ids.iter().map(Id::to_string).collect();
        assert!(texts.iter().all(|text| text.parse::<Id>().is_ok_and(|id| id.exchange() == ids[0].exchange())));
        texts.dedup();
        assert_eq!(texts.len(), 3, "{texts:?}");
    }

    #[test]
    fn numbers_are_whole_from_zero_to_the_largest() {
        for number in [0, 9, 10, 4_294_967_296, u64::MAX] {
            let line = line(Phase::Final, None, &Entry { bytes_out: Some(number), ..Entry::default() });
            let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            assert_eq!(value["extra"]["bytes_out"].as_u64(), Some(number));
        }
    }

    #[test]
    fn a_moment_has_microseconds_and_an_offset_in_digits() {
        for (microseconds, text) in [
            (0, "1970-01-01T00:00:00.000000+00:00"),
            (-5, "1970-01-01T00:00:00.000000+00:00"),
            (951_782_400_000_123, "2000-02-29T00:00:00.000123+00:00"),
            (i64::MAX, "9999-12-30T21:59:59.999999+00:00"),
        ] {
            assert_eq!(Moment::from_microseconds(microseconds).to_string(), text);
        }
    }
}
