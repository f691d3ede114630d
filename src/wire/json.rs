//! A strict JSON reader that goes over the bytes once and builds nothing.
//!
//! Why not `serde_json`: a body is judged, not used. It may be 20 MiB of base64 of which five small facts are wanted, and the
//! judgement needs what a deserializer hides: duplicate keys, how a key was spelled, and where in the bytes a value lies.
//! Only RFC 8259 passes, in UTF-8; a text that two parsers could read in two ways must end here.
use std::borrow::Cow;
use std::ops::Range;

/// How deep containers may nest. Go stops at 10,000 and `serde_json` at 128; honest bodies (a JSON schema in a tool) stay
/// under 40.
pub(crate) const MAX_DEPTH: u32 = 128;

/// How many members an object may have whose keys are judged. Ollama's largest has about 40; the bound keeps the search for
/// duplicates cheap.
pub(crate) const MAX_MEMBERS: usize = 64;

/// What was wrong. The words are ours: nothing of the text is in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub &'static str);

/// What a value begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Object,
    Array,
    Text,
    Number,
    Bool(bool),
    Null,
}

/// A string as it lies in the text, without its quotes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a> {
    raw: &'a str,
    /// Where `raw` lies in the text.
    at: usize,
    /// There is a backslash in it.
    pub escaped: bool,
}

impl<'a> Text<'a> {
    pub fn is_empty(&self) -> bool {
        self.raw.is_empty()
    }

    /// Where it lies in the text, with its quotes.
    pub fn range(&self) -> Range<usize> {
        self.at - 1..self.at + self.raw.len() + 1
    }

    /// The string itself. Lone surrogates become U+FFFD, as in Go.
    pub fn decode(&self) -> Cow<'a, str> {
        if self.escaped { Cow::Owned(unescape(self.raw)) } else { Cow::Borrowed(self.raw) }
    }
}

/// A position in a JSON text.
pub(crate) struct Reader<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    depth: u32,
}

impl<'a> Reader<'a> {
    pub fn new(body: &'a [u8]) -> Result<Self, Malformed> {
        let text = std::str::from_utf8(body).map_err(|_| Malformed("it is not UTF-8"))?;
        if text.starts_with('\u{feff}') {
            return Err(Malformed("it begins with a byte order mark"));
        }
        Ok(Reader { text, bytes: body, at: 0, depth: 0 })
    }

    /// Where the next byte lies, counted from the start of the text.
    pub fn at(&self) -> usize {
        self.at
    }

    /// What lies there. The range is of values that were read.
    pub fn text(&self, range: Range<usize>) -> &'a str {
        &self.text[range]
    }

    /// What the next value is; white space before it is passed over.
    pub fn shape(&mut self) -> Result<Shape, Malformed> {
        self.space();
        match self.bytes.get(self.at) {
            Some(b'{') => Ok(Shape::Object),
            Some(b'[') => Ok(Shape::Array),
            Some(b'"') => Ok(Shape::Text),
            Some(b'-' | b'0'..=b'9') => Ok(Shape::Number),
            Some(b't') => Ok(Shape::Bool(true)),
            Some(b'f') => Ok(Shape::Bool(false)),
            Some(b'n') => Ok(Shape::Null),
            Some(_) => Err(Malformed("a value is missing or begins with a character that cannot begin one")),
            None => Err(Malformed("it ends in the middle")),
        }
    }

    /// Reads an object: `member` is called with each key and must read the value, whole.
    pub fn object<E: From<Malformed>>(
        &mut self,
        mut member: impl FnMut(&mut Self, Text<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.space();
        self.open(b'{')?;
        self.space();
        if self.take(b'}') {
            self.depth -= 1;
            return Ok(());
        }
        loop {
            self.space();
            let key = self.string()?;
            self.space();
            if !self.take(b':') {
                return Err(Malformed("a ':' is missing after a key").into());
            }
            member(self, key)?;
            self.space();
            if self.take(b',') {
                continue;
            }
            if self.take(b'}') {
                self.depth -= 1;
                return Ok(());
            }
            return Err(Malformed("a ',' or a '}' is missing in an object").into());
        }
    }

    /// Reads an array: `item` is called before each item and must read it, whole.
    pub fn array<E: From<Malformed>>(&mut self, mut item: impl FnMut(&mut Self) -> Result<(), E>) -> Result<(), E> {
        self.space();
        self.open(b'[')?;
        self.space();
        if self.take(b']') {
            self.depth -= 1;
            return Ok(());
        }
        loop {
            self.space();
            item(self)?;
            self.space();
            if self.take(b',') {
                continue;
            }
            if self.take(b']') {
                self.depth -= 1;
                return Ok(());
            }
            return Err(Malformed("a ',' or a ']' is missing in an array").into());
        }
    }

    /// Reads a string.
    pub fn string(&mut self) -> Result<Text<'a>, Malformed> {
        if !self.take(b'"') {
            return Err(Malformed("a string is missing"));
        }
        let start = self.at;
        let mut escaped = false;
        loop {
            let rest = &self.bytes[self.at..];
            let stop = memchr::memchr2(b'"', b'\\', rest).ok_or(Malformed("it ends in the middle"))?;
            if rest[..stop].iter().any(|&b| b < 0x20) {
                return Err(Malformed("a string has a control character that is not escaped"));
            }
            self.at += stop + 1;
            if rest[stop] == b'"' {
                return Ok(Text { raw: &self.text[start..self.at - 1], at: start, escaped });
            }
            escaped = true;
            match self.bytes.get(self.at) {
                Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
                Some(b'u') => {
                    let digits = self.bytes.get(self.at + 1..self.at + 5).ok_or(Malformed("it ends in the middle"))?;
                    if !digits.iter().all(u8::is_ascii_hexdigit) {
                        return Err(Malformed("a string has a bad escape"));
                    }
                    self.at += 5;
                }
                _ => return Err(Malformed("a string has a bad escape")),
            }
        }
    }

    /// Reads a number and gives its text.
    pub fn number(&mut self) -> Result<&'a str, Malformed> {
        const BAD: Malformed = Malformed("a number is not written as JSON wants it");
        let start = self.at;
        self.take(b'-');
        if !self.take(b'0') && self.digits() == 0 {
            return Err(BAD);
        }
        if self.take(b'.') && self.digits() == 0 {
            return Err(BAD);
        }
        if self.take(b'e') || self.take(b'E') {
            let _ = self.take(b'+') || self.take(b'-');
            if self.digits() == 0 {
                return Err(BAD);
            }
        }
        Ok(&self.text[start..self.at])
    }

    /// Reads any value, checks its syntax and forgets it. It does not recurse: the kinds of the open containers are bits.
    pub fn skip(&mut self) -> Result<(), Malformed> {
        let base = self.depth;
        let mut objects: u128 = 0; // bit d: the container at depth base + 1 + d is an object
        loop {
            // A value begins here.
            match self.shape()? {
                Shape::Text => {
                    self.string()?;
                }
                Shape::Number => {
                    self.number()?;
                }
                Shape::Bool(true) => self.literal(b"true")?,
                Shape::Bool(false) => self.literal(b"false")?,
                Shape::Null => self.literal(b"null")?,
                Shape::Array => {
                    self.open(b'[')?;
                    objects &= !(1 << (self.depth - base - 1));
                    self.space();
                    if !self.take(b']') {
                        continue;
                    }
                    self.depth -= 1;
                }
                Shape::Object => {
                    self.open(b'{')?;
                    objects |= 1 << (self.depth - base - 1);
                    self.space();
                    if !self.take(b'}') {
                        self.key()?;
                        continue;
                    }
                    self.depth -= 1;
                }
            }
            // A value has ended: close what ends with it, or go on to the next.
            loop {
                if self.depth == base {
                    return Ok(());
                }
                let in_object = objects & (1 << (self.depth - base - 1)) != 0;
                self.space();
                if self.take(b',') {
                    if in_object {
                        self.space();
                        self.key()?;
                    }
                    break;
                }
                if !self.take(if in_object { b'}' } else { b']' }) {
                    return Err(Malformed("a ',' or a closing bracket is missing"));
                }
                self.depth -= 1;
            }
        }
    }

    /// Nothing but white space may be left.
    pub fn end(&mut self) -> Result<(), Malformed> {
        self.space();
        if self.at == self.bytes.len() { Ok(()) } else { Err(Malformed("something follows the JSON value")) }
    }

    pub fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.bytes.get(self.at) {
            self.at += 1;
        }
    }

    fn key(&mut self) -> Result<(), Malformed> {
        self.string()?;
        self.space();
        if self.take(b':') { Ok(()) } else { Err(Malformed("a ':' is missing after a key")) }
    }

    fn open(&mut self, bracket: u8) -> Result<(), Malformed> {
        if !self.take(bracket) {
            return Err(Malformed("an opening bracket is missing"));
        }
        if self.depth == MAX_DEPTH {
            return Err(Malformed("it nests deeper than 128 levels"));
        }
        self.depth += 1;
        Ok(())
    }

    fn take(&mut self, byte: u8) -> bool {
        let there = self.bytes.get(self.at) == Some(&byte);
        self.at += usize::from(there);
        there
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
        self.at - start
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), Malformed> {
        if !self.bytes[self.at..].starts_with(word) {
            return Err(Malformed("a word is not one of true, false and null"));
        }
        self.at += word.len();
        Ok(())
    }
}

/// A key as Go's `encoding/json` compares it with field names: ASCII letters in lower case, `ſ` is s, `K` (the Kelvin sign) is k.
/// Go folds further letters as well, but no field name has them.
pub(crate) fn fold(key: &str) -> Cow<'_, str> {
    if key.bytes().all(|b| b.is_ascii() && !b.is_ascii_uppercase()) {
        return Cow::Borrowed(key);
    }
    let fold = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    Cow::Owned(key.chars().map(fold).collect())
}

/// Undoes the escapes of a string whose syntax was checked.
fn unescape(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let (letter, tail) = (rest.as_bytes().get(at + 1).copied(), rest.get(at + 2..).unwrap_or(""));
        rest = tail;
        let plain = match letter {
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let first = hex4(rest);
                rest = rest.get(4..).unwrap_or("");
                let second = rest.strip_prefix("\\u").map(hex4);
                match (first, second) {
                    (0xd800..=0xdbff, Some(second @ 0xdc00..=0xdfff)) => {
                        rest = rest.get(6..).unwrap_or("");
                        let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
                        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
                    }
                    _ => char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER),
                }
            }
            Some(other) => char::from(other),
            None => break,
        };
        out.push(plain);
    }
    out.push_str(rest);
    out
}

fn hex4(text: &str) -> u32 {
    text.get(..4).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0xfffd)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &[u8]) -> Result<(), Malformed> {
        let mut reader = Reader::new(body)?;
        reader.skip()?;
        reader.end()
    }

    #[test]
    fn it_accepts_what_serde_json_accepts() {
        for body in [
            "{}",
            "[]",
            " {\"a\" : [1, -0.5e+3, true, false, null, \"x\\u00e9\\n\"]} \n",
            "0",
            "-0",
            "1e400",
            "\"\\ud800\"",
            "[[],{},[{}],{\"a\":{}}]",
            "\"\u{7f}\"",
        ] {
            assert_eq!(check(body.as_bytes()), Ok(()), "{body}");
        }
    }

    #[test]
    fn it_refuses_what_is_not_rfc_8259() {
        for body in [
            "",
            " ",
            "{",
            "}",
            "[1,]",
            "{\"a\":1,}",
            "{,}",
            "[,]",
            "{\"a\"}",
            "{\"a\":}",
            "{a:1}",
            "{'a':1}",
            "01",
            "+1",
            "1.",
            ".5",
            "1e",
            "--1",
            "tru",
            "True",
            "nul",
            "NaN",
            "Infinity",
            "\"",
            "\"\\x\"",
            "\"\\u12g4\"",
            "\"\\u12",
            "\"\n\"",
            "\"\u{0}\"",
            "{}{}",
            "{} x",
            "[1 2]",
            "{\"a\":1 \"b\":2}",
            "[}",
            "{]",
            "[1}",
            "{\"a\":1]",
            "// c\n1",
            "\u{b}1",
            "\u{a0}1",
            "\u{feff}1",
            "1\u{0}",
            "\"\t\"",
        ] {
            assert!(check(body.as_bytes()).is_err(), "{body:?}");
            assert!(serde_json::from_str::<serde_json::Value>(body).is_err(), "serde_json takes {body:?}");
        }
        assert!(check(b"\"\xff\"").is_err());
    }

    #[test]
    fn nesting_is_bounded_without_recursion() {
        let nested = |n: usize| [b"[".repeat(n), b"]".repeat(n)].concat();
        assert_eq!(check(&nested(128)), Ok(()));
        assert!(check(&nested(129)).is_err());
        assert!(check(&b"[".repeat(1_000_000)).is_err());
        let objects = [b"{\"a\":".repeat(127), b"[]".to_vec(), b"}".repeat(127)].concat();
        assert_eq!(check(&objects), Ok(()));
    }

    #[test]
    fn strings_are_decoded_as_go_does() {
        let decode = |text: &str| Reader::new(text.as_bytes()).unwrap().string().unwrap().decode().into_owned();
        assert_eq!(decode(r#""mod\u0065l""#), "model");
        assert_eq!(decode(r#""a\"\\\/\b\f\n\r\tz""#), "a\"\\/\u{8}\u{c}\n\r\tz");
        assert_eq!(decode(r#""\ud83e\udd8a""#), "🦊");
        assert_eq!(decode(r#""a\ud800b""#), "a\u{fffd}b");
        assert_eq!(decode(r#""\ud800\u0041""#), "\u{fffd}A");
        assert_eq!(decode(r#""\udc00""#), "\u{fffd}");
        assert_eq!(decode("\"é\\n\""), "é\n");
    }

    #[test]
    fn keys_fold_as_in_go() {
        for key in ["model", "MODEL", "mOdEl"] {
            assert_eq!(fold(key), "model");
        }
        assert_eq!(fold("me\u{17f}\u{17f}ages"), "messages");
        assert_eq!(fold("\u{212a}eep_alive"), "keep_alive");
        assert_eq!(fold("Ünknown"), "Ünknown");
    }
}
