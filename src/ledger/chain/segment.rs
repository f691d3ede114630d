//! What writers and their files are called.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A writer: one process. `YYYYMMDDTHHMMSSZ-xxxxxxxx`: its start (UTC) and 8 random hex digits, so that names sort by start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriterName([u8; 25]);

impl WriterName {
    /// `started_s`: seconds since 1970; `random` tells processes apart that start in the same second.
    pub fn new(started_s: i64, random: u32) -> WriterName {
        // The last second with a year of four digits that jiff can name; a clock before 1970 reads as 1970.
        let at = jiff::Timestamp::from_second(started_s.clamp(0, 253_402_207_199)).unwrap_or_default();
        let at = jiff::tz::Offset::UTC.to_datetime(at);
        let text = format!(
            "{:04}{:02}{:02}T{:02}{:02}{:02}Z-{random:08x}",
            at.year(),
            at.month(),
            at.day(),
            at.hour(),
            at.minute(),
            at.second()
        );
        let mut name = [0; 25];
        name.copy_from_slice(text.as_bytes());
        WriterName(name)
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("made and parsed of ASCII only")
    }
}

/// Not the name of a writer, or of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAName;

impl FromStr for WriterName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<WriterName, NotAName> {
        let name: [u8; 25] = text.as_bytes().try_into().map_err(|_| NotAName)?;
        let fits = name.iter().zip(b"ddddddddTddddddZ-xxxxxxxx").all(|(byte, pattern)| match pattern {
            b'd' => byte.is_ascii_digit(),
            b'x' => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
            literal => byte == literal,
        });
        if fits { Ok(WriterName(name)) } else { Err(NotAName) }
    }
}

impl fmt::Display for WriterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for WriterName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for WriterName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<WriterName, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(|_| de::Error::custom("not the name of a writer"))
    }
}

/// A segment of a writer's chain. Names sort by the writer's start, then by number; as file names too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    pub writer: WriterName,
    /// From 1 to 999,999.
    pub number: u32,
}

impl SegmentName {
    /// A segment's largest number: six digits, so that names sort.
    pub const LAST: u32 = 999_999;

    /// The one after this. `None`: the numbers are used up, and the writer needs another name.
    pub fn next(self) -> Option<SegmentName> {
        (self.number < SegmentName::LAST).then_some(SegmentName { number: self.number + 1, ..self })
    }
}

impl fmt::Display for SegmentName {
    /// The name of its file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "audit-{}-{:06}.jsonl", self.writer, self.number)
    }
}

impl FromStr for SegmentName {
    type Err = NotAName;

    fn from_str(file_name: &str) -> Result<SegmentName, NotAName> {
        let rest = file_name.strip_prefix("audit-").and_then(|rest| rest.strip_suffix(".jsonl")).ok_or(NotAName)?;
        let (writer, number) = rest.rsplit_once('-').ok_or(NotAName)?;
        if number.len() != 6 || !number.bytes().all(|byte| byte.is_ascii_digit()) || number == "000000" {
            return Err(NotAName);
        }
        Ok(SegmentName { writer: writer.parse()?, number: number.parse().map_err(|_| NotAName)? })
    }
}
