//! Reading the audit: the lines of a folder, of all its writers, in order, also while they are written.
//!
//! - [`back`]: the last lines of a folder, found from its end.
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

use super::chain::{SegmentName, WriterName};

pub mod back;
pub mod follow;
pub mod segment;

pub use follow::{Event, Follower, Loss, timestamp};

/// The longest line that is read, in bytes. A record has 32 KiB at most; what grows is `segment_open`'s list of heads, by some 150
/// bytes for each writer whose files are still there: this is room for 25,000 of them.
pub const LONGEST_LINE: usize = 4 << 20;

/// The segments in `folder`, sorted. Files of other names are not read: what was renamed (`.1`, `.bak`) would be read twice.
pub fn segments(folder: &Path) -> Result<Vec<SegmentName>, TrailError> {
    names(folder).map_err(|error| TrailError::Unreadable { path: folder.to_owned(), error })
}

/// The segments in a folder, sorted. A pipe or a folder with such a name is none: whoever opened a pipe would wait for its other end.
pub(super) fn names(folder: &Path) -> io::Result<Vec<SegmentName>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Some(Ok(name)) = entry.file_name().to_str().map(str::parse::<SegmentName>) else { continue };
        let kind = entry.file_type()?;
        if kind.is_file() || (kind.is_symlink() && fs::metadata(entry.path()).is_ok_and(|about| about.is_file())) {
            found.push(name);
        }
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
pub struct Position(BTreeMap<WriterName, Place>);

impl Position {
    /// Behind the last whole line of everything that is in `folder` now.
    pub fn at_the_end(folder: &Path) -> Result<Position, TrailError> {
        let mut position = Position::default();
        // Sorted, so that a writer's last segment is what stays.
        for name in segments(folder)? {
            position.0.insert(name.writer, Place { segment: name.number, offset: 0 });
        }
        for (writer, place) in &mut position.0 {
            let path = folder.join(SegmentName { writer: *writer, number: place.segment }.to_string());
            place.offset = segment::end(&path).map_err(|error| TrailError::Unreadable { path, error })?;
        }
        Ok(position)
    }

    pub fn of(&self, writer: WriterName) -> Option<Place> {
        self.0.get(&writer).copied()
    }

    /// Writers and places, sorted by the writers' start.
    pub fn places(&self) -> impl DoubleEndedIterator<Item = (WriterName, Place)> {
        self.0.iter().map(|(writer, place)| (*writer, *place))
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
    fn a_position_is_small_json_and_comes_back_as_it_was() {
        let mut position = Position::default();
        position
            .0
            .insert("20261122T213908Z-00c0ffee".parse().expect("a name"), Place { segment: 3, offset: 4_294_967_296 });
        let saved = serde_json::to_string(&position).expect("JSON");
        assert_eq!(saved, r#"{"20261122T213908Z-00c0ffee":{"segment":3,"offset":4294967296}}"#);
        assert_eq!(serde_json::from_str::<Position>(&saved).expect("read back"), position);
    }
}
