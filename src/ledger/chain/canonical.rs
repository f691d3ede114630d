//! The canonical form of an event: what Python's `json.dumps(event, sort_keys=True, separators=(",", ":"))` writes of it. Written, and
//! told from every other way to write the same.

use serde_json::Value;

use super::HEX;

/// How deep values may be nested: as deep as serde_json reads.
const DEEPEST: usize = 127;

/// A value that has no canonical form: a number that is not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotWhole;

/// The canonical form: members sorted by code point at every level, no white space, printable ASCII, whole numbers only.
pub fn canonical(value: &Value) -> Result<Vec<u8>, NotWhole> {
    let mut text = Vec::with_capacity(512);
    write(value, &mut text)?;
    Ok(text)
}

fn write(value: &Value, into: &mut Vec<u8>) -> Result<(), NotWhole> {
    match value {
        Value::Null => into.extend_from_slice(b"null"),
        Value::Bool(true) => into.extend_from_slice(b"true"),
        Value::Bool(false) => into.extend_from_slice(b"false"),
        Value::Number(number) if number.is_f64() => return Err(NotWhole),
        Value::Number(number) => into.extend_from_slice(number.to_string().as_bytes()),
        Value::String(text) => write_string(text, into),
        Value::Array(items) => {
            into.push(b'[');
            for (place, item) in items.iter().enumerate() {
                if place > 0 {
                    into.push(b',');
                }
                write(item, into)?;
            }
            into.push(b']');
        }
        Value::Object(members) => {
            // UTF-8 sorts as its code points do.
            let mut members: Vec<_> = members.iter().collect();
            members.sort_unstable_by_key(|(name, _)| *name);
            into.push(b'{');
            for (place, (name, value)) in members.into_iter().enumerate() {
                if place > 0 {
                    into.push(b',');
                }
                write_string(name, into);
                into.push(b':');
                write(value, into)?;
            }
            into.push(b'}');
        }
    }
    Ok(())
}

/// A string with its quotation marks, in printable ASCII, as Python's `json.dumps` escapes it. What JSON itself wants escaped is not
/// enough: DEL, C1 controls (a terminal's CSI is U+009B), U+2028 and bidirectional overrides may stand in a JSON string as they are.
pub fn write_string(text: &str, into: &mut Vec<u8>) {
    into.push(b'"');
    // Without an early end, so that the compiler looks at many bytes at once.
    if text.bytes().fold(true, |all, byte| all & is_plain(byte)) {
        into.extend_from_slice(text.as_bytes());
    } else {
        text.chars().for_each(|char| write_escaped(char, into));
    }
    into.push(b'"');
}

fn write_escaped(char: char, into: &mut Vec<u8>) {
    match char {
        '"' | '\\' => into.extend_from_slice(&[b'\\', char as u8]),
        ' '..='~' => into.push(char as u8),
        '\n' => into.extend_from_slice(b"\\n"),
        '\r' => into.extend_from_slice(b"\\r"),
        '\t' => into.extend_from_slice(b"\\t"),
        '\u{8}' => into.extend_from_slice(b"\\b"),
        '\u{c}' => into.extend_from_slice(b"\\f"),
        _ => {
            for unit in char.encode_utf16(&mut [0; 2]) {
                into.extend_from_slice(b"\\u");
                for shift in [12, 8, 4, 0] {
                    into.push(HEX[usize::from(*unit >> shift) & 15]);
                }
            }
        }
    }
}

/// Whether a text is an object in canonical form, said without making values of it: a check of a log does this for every line.
/// `each` is told of every member whose value ends: how deep its object is (1: the text itself), its name and its value as they are
/// written. What was told before a `false` is worth nothing.
pub fn scan<'a>(text: &'a [u8], each: &mut dyn FnMut(usize, &'a [u8], &'a [u8])) -> bool {
    let mut scan = Scan { text, at: 0 };
    scan.next(b'{') && scan.object(1, each) && scan.at == text.len()
}

/// The words of a string that [`scan`] has passed, without its quotation marks.
pub fn words(written: &[u8]) -> Option<std::borrow::Cow<'_, str>> {
    let inner = written.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    match memchr::memchr(b'\\', inner) {
        None => std::str::from_utf8(inner).ok().map(Into::into),
        Some(_) => serde_json::from_slice::<String>(written).ok().map(Into::into),
    }
}

struct Scan<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Scan<'a> {
    /// Steps over this byte, if it is the next one.
    fn next(&mut self, byte: u8) -> bool {
        let found = self.text.get(self.at) == Some(&byte);
        self.at += usize::from(found);
        found
    }

    fn literal(&mut self, word: &[u8]) -> bool {
        let found = self.text[self.at..].starts_with(word);
        self.at += if found { word.len() } else { 0 };
        found
    }

    fn value(&mut self, depth: usize, each: &mut dyn FnMut(usize, &'a [u8], &'a [u8])) -> bool {
        match self.text.get(self.at) {
            Some(b'"') => self.string(),
            Some(b'n') => self.literal(b"null"),
            Some(b't') => self.literal(b"true"),
            Some(b'f') => self.literal(b"false"),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b'{') => {
                self.at += 1;
                depth < DEEPEST && self.object(depth + 1, each)
            }
            Some(b'[') => {
                self.at += 1;
                depth < DEEPEST && self.array(depth + 1, each)
            }
            _ => false,
        }
    }

    fn object(&mut self, depth: usize, each: &mut dyn FnMut(usize, &'a [u8], &'a [u8])) -> bool {
        if self.next(b'}') {
            return true;
        }
        let mut before: &[u8] = &[];
        loop {
            let from = self.at;
            if !self.string() {
                return false;
            }
            let name = &self.text[from..self.at];
            if !(before.is_empty() || comes_before(before, name)) || !self.next(b':') {
                return false;
            }
            before = name;
            let from = self.at;
            if !self.value(depth, each) {
                return false;
            }
            each(depth, &name[1..name.len() - 1], &self.text[from..self.at]);
            if !self.next(b',') {
                return self.next(b'}');
            }
        }
    }

    fn array(&mut self, depth: usize, each: &mut dyn FnMut(usize, &'a [u8], &'a [u8])) -> bool {
        if self.next(b']') {
            return true;
        }
        loop {
            if !self.value(depth, each) {
                return false;
            }
            if !self.next(b',') {
                return self.next(b']');
            }
        }
    }

    /// Whole, without a leading zero, and in the range of the one or the other type: others are read as floats.
    fn number(&mut self) -> bool {
        let negative = self.next(b'-');
        let from = self.at;
        let digits = self.text[from..].iter().take_while(|byte| byte.is_ascii_digit());
        let (mut length, mut value) = (0, Some(0_u64));
        for digit in digits {
            length += 1;
            value = value.and_then(|value| value.checked_mul(10)?.checked_add(u64::from(digit - b'0')));
        }
        self.at += length;
        let leading_zero = self.text.get(from) == Some(&b'0') && (length > 1 || negative);
        let most = if negative { 1 << 63 } else { u64::MAX };
        length > 0 && !leading_zero && value.is_some_and(|value| value <= most)
    }

    fn string(&mut self) -> bool {
        if !self.next(b'"') {
            return false;
        }
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.iter().position(|byte| !is_plain(*byte)).unwrap_or(rest.len());
            self.at += plain;
            match rest.get(plain) {
                Some(b'"') => {
                    self.at += 1;
                    return true;
                }
                Some(b'\\') => {
                    self.at += 1;
                    if !self.escape() {
                        return false;
                    }
                }
                _ => return false,
            }
        }
    }

    /// Behind a backslash: the one way in which the character is escaped.
    fn escape(&mut self) -> bool {
        let Some(letter) = self.text.get(self.at) else { return false };
        self.at += 1;
        match letter {
            b'"' | b'\\' | b'n' | b'r' | b't' | b'b' | b'f' => true,
            b'u' => match self.unit() {
                Some(0xd800..=0xdbff) => self.literal(b"\\u") && matches!(self.unit(), Some(0xdc00..=0xdfff)),
                Some(0xdc00..=0xdfff | 0x20..=0x7e | 0x08 | 0x09 | 0x0a | 0x0c | 0x0d) | None => false,
                Some(_) => true,
            },
            _ => false,
        }
    }

    /// Four hex digits, lower case.
    fn unit(&mut self) -> Option<u16> {
        let digits = self.text.get(self.at..self.at + 4)?;
        let mut unit = 0;
        for digit in digits {
            let value = HEX.iter().position(|own| own == digit)?;
            unit = unit << 4 | value as u16;
        }
        self.at += 4;
        Some(unit)
    }
}

/// Whether two names, as written, stand in the order of their code points, and are not the same.
fn comes_before(one: &[u8], other: &[u8]) -> bool {
    if memchr::memchr(b'\\', one).is_none() && memchr::memchr(b'\\', other).is_none() {
        // Without the quotation mark at the end, before which a space and `!` would stand.
        return one[..one.len() - 1] < other[..other.len() - 1];
    }
    words(one) < words(other)
}

/// Stands for itself in a string.
fn is_plain(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte) & (byte != b'"') & (byte != b'\\')
}
