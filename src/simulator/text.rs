//! Text as Go writes it: JSON strings, JSON values, times. Ollama's bytes are compared, so the small habits matter.

use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// Appends a JSON string as Go's `encoding/json` writes it: `<`, `>`, `&`, U+2028 and U+2029 escaped, other text as it is.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut plain = 0;
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        // E2 80 A8 and E2 80 A9 are the line and paragraph separators.
        let separator =
            byte == 0xE2 && bytes.get(at + 1) == Some(&0x80) && matches!(bytes.get(at + 2), Some(0xA8 | 0xA9));
        if byte >= 0x20 && !matches!(byte, b'"' | b'\\' | b'<' | b'>' | b'&') && !separator {
            at += 1;
            continue;
        }
        out.extend_from_slice(&bytes[plain..at]);
        if separator {
            out.extend_from_slice(if bytes[at + 2] == 0xA8 { b"\\u2028" } else { b"\\u2029" });
            at += 3;
        } else {
            match byte {
                b'"' => out.extend_from_slice(b"\\\""),
                b'\\' => out.extend_from_slice(b"\\\\"),
                b'\n' => out.extend_from_slice(b"\\n"),
                b'\r' => out.extend_from_slice(b"\\r"),
                b'\t' => out.extend_from_slice(b"\\t"),
                0x08 => out.extend_from_slice(b"\\b"),
                0x0C => out.extend_from_slice(b"\\f"),
                _ => {
                    out.extend_from_slice(b"\\u00");
                    out.extend_from_slice(hex(&[byte]).as_bytes());
                }
            }
            at += 1;
        }
        plain = at;
    }
    out.extend_from_slice(&bytes[plain..]);
    out.push(b'"');
}

/// Appends a value as Go writes a map: keys sorted. (serde_json's own order depends on who else uses it.)
pub(super) fn value(out: &mut Vec<u8>, of: &Value) {
    match of {
        Value::String(text) => string(out, text),
        Value::Array(items) => {
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                value(out, item);
            }
            out.push(b']');
        }
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(name, _)| name.as_str());
            out.push(b'{');
            for (index, (name, member)) in members.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                string(out, name);
                out.push(b':');
                value(out, member);
            }
            out.push(b'}');
        }
        Value::Number(number) => match number.as_f64() {
            // Go writes a float without a fraction as an integer.
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < 1e15 => {
                print(out, format_args!("{float:.0}"))
            }
            _ => print(out, format_args!("{number}")),
        },
        Value::Bool(_) | Value::Null => print(out, format_args!("{of}")),
    }
}

/// Appends formatted text.
pub(super) fn print(out: &mut Vec<u8>, what: std::fmt::Arguments<'_>) {
    out.write_fmt(what).expect("writing into a Vec cannot fail");
}

/// Appends a number; formatting machinery is too dear for every chunk.
pub(super) fn number(out: &mut Vec<u8>, mut of: u64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (of % 10) as u8;
        of /= 10;
        if of == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .map(char::from)
        .collect()
}

/// Time since 1970. A clock before that counts as 1970.
pub(super) fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A point in time, split for printing.
struct Civil {
    year: i64,
    month: u32,
    day: u32,
    hour: u64,
    minute: u64,
    second: u64,
    weekday: usize,
}

/// Days to year, month, day: Howard Hinnant's `civil_from_days`.
fn civil(seconds: u64) -> Civil {
    let days = (seconds / 86_400) as i64;
    let rest = seconds % 86_400;
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * shifted + 2) / 5 + 1) as u32;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 } as u32;
    Civil {
        year: year_of_era + era * 400 + i64::from(month <= 2),
        month,
        day,
        hour: rest / 3_600,
        minute: rest / 60 % 60,
        second: rest % 60,
        weekday: ((days + 4) % 7) as usize,
    }
}

/// Writes time stamps; keeps the part that only changes once a second.
#[derive(Default)]
pub(super) struct Stamps {
    second: u64,
    prefix: Vec<u8>,
}

impl Stamps {
    /// Appends RFC 3339 with nanoseconds, trailing zeros cut: `2026-11-22T17:06:57.85407298Z`.
    pub fn rfc3339(&mut self, out: &mut Vec<u8>, at: Duration) {
        if self.prefix.is_empty() || self.second != at.as_secs() {
            let c = civil(at.as_secs());
            self.second = at.as_secs();
            self.prefix.clear();
            print(
                &mut self.prefix,
                format_args!("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}", c.year, c.month, c.day, c.hour, c.minute, c.second),
            );
        }
        out.extend_from_slice(&self.prefix);
        let mut nanos = at.subsec_nanos();
        if nanos > 0 {
            let mut digits = [b'0'; 9];
            for digit in digits.iter_mut().rev() {
                *digit = b'0' + (nanos % 10) as u8;
                nanos /= 10;
            }
            let kept = digits.iter().rposition(|digit| *digit != b'0').map_or(0, |last| last + 1);
            out.push(b'.');
            out.extend_from_slice(&digits[..kept]);
        }
        out.push(b'Z');
    }
}

/// A time stamp by itself.
pub(super) fn rfc3339(at: Duration) -> String {
    let mut out = Vec::with_capacity(32);
    Stamps::default().rfc3339(&mut out, at);
    String::from_utf8(out).expect("a time stamp is ASCII")
}

/// The value of a `Date` header: `Sun, 22 Nov 2026 17:06:57 GMT`.
pub(super) fn http_date(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let c = civil(seconds);
    format!(
        "{}, {:02} {} {:04} {:02}:{:02}:{:02} GMT",
        DAYS[c.weekday],
        c.day,
        MONTHS[c.month as usize - 1],
        c.year,
        c.hour,
        c.minute,
        c.second
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> String {
        let mut out = Vec::new();
        string(&mut out, text);
        String::from_utf8(out).expect("UTF-8 in, UTF-8 out")
    }

    #[test]
    fn strings_are_escaped_as_go_escapes_them() {
        assert_eq!(written("a<b>&\"\\\n\u{1}\u{2028}é🦊"), r#""a\u003cb\u003e\u0026\"\\\n\u0001\u2028é🦊""#);
        assert_eq!(written("\u{20}\u{E2}\u{2027}"), "\"\u{20}\u{E2}\u{2027}\"");
    }

    #[test]
    fn times_read_as_gos_do() {
        assert_eq!(rfc3339(Duration::new(1_795_367_217, 854_072_980)), "2026-11-22T17:06:57.85407298Z");
        assert_eq!(rfc3339(Duration::new(951_782_400, 0)), "2000-02-29T00:00:00Z");
        assert_eq!(http_date(1_795_367_217), "Sun, 22 Nov 2026 17:06:57 GMT");
    }

    #[test]
    fn keys_are_sorted_and_whole_floats_are_integers() {
        let mut out = Vec::new();
        value(&mut out, &serde_json::json!({"b": 1.0, "a": [null, true, 0.5]}));
        assert_eq!(String::from_utf8_lossy(&out), r#"{"a":[null,true,0.5],"b":1}"#);
    }
}
