//! What a line says of itself, found without parsing all of it. A quote inside of a string is escaped, so `"phase":"` is a member and
//! never a value.

use crate::ledger::trail;

/// How bad it is. The numbers are syslog's (RFC 5424, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    Error = 3,
    Warning = 4,
    Notice = 5,
    Info = 6,
}

/// The phase; empty where there is none.
pub fn phase(line: &[u8]) -> &str {
    word(line, br#""phase":""#)
}

/// As it stands there; empty where there is none.
pub fn timestamp(line: &[u8]) -> &str {
    trail::timestamp(line)
}

pub fn severity(line: &[u8]) -> Severity {
    match (phase(line), word(line, br#""outcome":""#)) {
        (_, "crashed" | "internal_error") => Severity::Error,
        (_, "upstream_error" | "upstream_reset" | "timeout") | ("adopted", _) => Severity::Warning,
        (_, "refused" | "client_abort" | "slow_client" | "revoked" | "budget_cut" | "shutdown") | ("tombstone", _) => {
            Severity::Notice
        }
        ("segment_close", _) if matches!(word(line, br#""reason":""#), "failed" | "renamed") => Severity::Warning,
        _ => Severity::Info,
    }
}

/// A member that is one short word.
fn word<'a>(line: &'a [u8], name: &[u8]) -> &'a str {
    let text = memchr::memmem::find(line, name).map_or(&[][..], |at| &line[at + name.len()..]);
    let end = text.iter().take(33).position(|byte| *byte == b'"').unwrap_or(0);
    let word = std::str::from_utf8(&text[..end]).unwrap_or_default();
    if word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') { word } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn severity_says_how_it_went() {
        for (members, expected) in [
            (r#""outcome":"complete","phase":"final""#, Severity::Info),
            (r#""outcome":null,"phase":"request""#, Severity::Info),
            (r#""outcome":"refused","phase":"final""#, Severity::Notice),
            (r#""outcome":"timeout","phase":"final""#, Severity::Warning),
            (r#""outcome":"crashed","phase":"final""#, Severity::Error),
            (r#""phase":"segment_close","reason":"stopped""#, Severity::Info),
            (r#""phase":"segment_close","reason":"failed""#, Severity::Warning),
            (r#""phase":"adopted""#, Severity::Warning),
            (r#""phase":"tombstone""#, Severity::Notice),
            (r#""phase":"checkpoint""#, Severity::Info),
        ] {
            assert_eq!(severity(format!("{{{members}}}").as_bytes()), expected, "{members}");
        }
    }

    #[test]
    fn a_word_is_short_and_plain_or_none() {
        assert_eq!(phase(br#"{"extra":{"phase":"stream_start"}}"#), "stream_start");
        for none in [
            &br#"{}"#[..],
            br#"{"phase":"#,
            br#"{"phase":"a b"}"#,
            br#"{"phase":"no end"#,
            br#"{"error":"\"phase\":\"final\""}"#,
        ] {
            assert_eq!(phase(none), "");
        }
    }
}
