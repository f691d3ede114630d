//! Reading the audit: the lines of a folder, of all its writers, in order, also while they are written.
//!
//! - [`segment`]: one file: its lines from front to back with their places, or from back to front.
//! - [`follow`]: all files of a folder as one sequence that goes on as they grow, rotate, appear and vanish.
//!
//! Nothing here judges what a line says: that is `verify`'s. A reader takes no lock and changes nothing, so it never disturbs a
//! writer; its memory is one buffer for each writer that it reads from at the moment. What it cannot give (a segment that is gone, a file
//! that lost its end, a line without an end) it says, and goes on.
//!
//! A [`Position`] is what a reader keeps to go on later where it stopped: for each writer the segment and the byte behind the last
//! line that was taken. It is a small value that can be saved as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub mod follow;
pub mod segment;

pub use follow::{Event, Follower};

/// The longest line that is read, in bytes. A record has 32 KiB at most; what grows is `segment_open`'s list of heads, by some 150
/// bytes for each writer whose files are still there: this is room for 25,000 of them.
pub const LONGEST_LINE: usize = 4 << 20;

/// The name of a segment: whose it is, and which of theirs. Sorts by the writer's start, then by number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    pub writer: String,
    /// From 1.
    pub number: u32,
}

impl SegmentName {
    /// `None`: a file of another kind. What was renamed (`.1`, `.bak`) is not read: it would be read twice.
    pub fn parse(file: &str) -> Option<SegmentName> {
        let (writer, number) = file.strip_prefix("audit-")?.strip_suffix(".jsonl")?.rsplit_once('-')?;
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let (at, random) = writer.split_once('-')?;
        let (day, time) = at.strip_suffix('Z')?.split_once('T')?;
        let well_formed = day.len() == 8 && digits(day) && time.len() == 6 && digits(time);
        let known = well_formed && random.len() == 8 && random.bytes().all(hex) && number.len() == 6 && digits(number);
        let number = number.parse().ok().filter(|number| *number > 0)?;
        known.then(|| SegmentName { writer: writer.to_owned(), number })
    }

    pub fn path(&self, folder: &Path) -> PathBuf {
        folder.join(self.to_string())
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "audit-{}-{:06}.jsonl", self.writer, self.number)
    }
}

/// The segments in `folder`, sorted.
pub fn segments(folder: &Path) -> Result<Vec<SegmentName>, TrailError> {
    let unreadable = |error| TrailError::Unreadable { path: folder.to_owned(), error };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        found.extend(name.to_str().and_then(SegmentName::parse));
    }
    found.sort();
    Ok(found)
}

/// A place in one writer's chain of segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    pub segment: u32,
    /// Bytes of that segment before the place; always behind a newline, or 0.
    pub offset: u64,
}

/// How far a reader has come with each writer. `Position::default()` is before everything; a writer that is not in it is read from its
/// first segment that is there. Writers whose files are gone are left out, so it is as small as the folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Position(BTreeMap<String, Place>);

impl Position {
    /// Behind the last whole line of everything that is in `folder` now.
    pub fn at_the_end(folder: &Path) -> Result<Position, TrailError> {
        let mut position = Position::default();
        // Sorted, so that a writer's last segment is what stays.
        for name in segments(folder)? {
            position.0.insert(name.writer, Place { segment: name.number, offset: 0 });
        }
        for (writer, place) in &mut position.0 {
            let path = SegmentName { writer: writer.clone(), number: place.segment }.path(folder);
            place.offset = segment::end(&path).map_err(|error| TrailError::Unreadable { path, error })?;
        }
        Ok(position)
    }

    pub fn of(&self, writer: &str) -> Option<Place> {
        self.0.get(writer).copied()
    }

    /// Writers and places, sorted by the writers' start.
    pub fn places(&self) -> impl DoubleEndedIterator<Item = (&str, Place)> {
        self.0.iter().map(|(writer, place)| (writer.as_str(), *place))
    }
}

/// Why the audit cannot be read.
#[derive(Debug)]
pub enum TrailError {
    /// The folder or a file in it.
    Unreadable { path: PathBuf, error: io::Error },
}

impl fmt::Display for TrailError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrailError::Unreadable { path, error } => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for TrailError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_segments_are_segments() {
        let name = SegmentName::parse("audit-20261122T213908Z-00c0ffee-000012.jsonl").expect("a segment");
        assert_eq!((name.writer.as_str(), name.number), ("20261122T213908Z-00c0ffee", 12));
        assert_eq!(name.to_string(), "audit-20261122T213908Z-00c0ffee-000012.jsonl");
        for other in [
            "audit.jsonl",
            "audit-key.pem",
            "audit-20261122T213908Z-00c0ffee-000012.jsonl.1",
            "audit-20261122T213908Z-00c0ffee-000000.jsonl",
            "audit-20261122T213908Z-00c0ffee-12.jsonl",
            "audit-20261122T213908Z-00C0FFEE-000012.jsonl",
            "audit-20261122T213908-00c0ffee-000012.jsonl",
            "audit-20261122T213908Z-00c0ffe-000012.jsonl",
            "audit-20261122213908ZT-00c0ffee-000012.jsonl",
            "audit-../../etc/passwd-000012.jsonl",
            "",
        ] {
            assert_eq!(SegmentName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_position_is_small_json_and_comes_back_as_it_was() {
        let mut position = Position::default();
        position.0.insert("20261122T213908Z-00c0ffee".to_owned(), Place { segment: 3, offset: 4_294_967_296 });
        let saved = serde_json::to_string(&position).expect("JSON");
        assert_eq!(saved, r#"{"20261122T213908Z-00c0ffee":{"segment":3,"offset":4294967296}}"#);
        assert_eq!(serde_json::from_str::<Position>(&saved).expect("read back"), position);
    }
}
