//! What a sink still has to get: lines from the segments, behind its bookmark.
//!
//! Beside the position itself it counts lines, absolutely: the first line of each segment says how many the chain has before it, and a
//! tombstone says which ones were deleted. So what the sink will never get is known to the line, however it was lost, and however often
//! the sink was down meanwhile.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::batch::{Batch, Filling};
use crate::identity::private_file::{self, FileError, OTHERS_CAN_WRITE};
use crate::ledger::chain::{Mark, WriterName};
use crate::ledger::record::Moment;
use crate::ledger::trail::{Event, Follower, Loss, Position, TrailError, timestamp};

/// Lines that are stepped over before a batch is given though it is not full: what was passed should be saved now and then.
const STEPS: usize = 100_000;

/// Chains whose files are gone and whose count is kept for their tombstones. Each is a start of the proxy.
const GONE: usize = 256;

/// Where a sink begins that has no bookmark yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// With everything that the folder holds.
    Beginning,
    /// With what is written from then on.
    Now,
}

/// How far a sink has come. Saved as JSON, as large as the folder has writers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bookmark {
    format: Format,
    start: Start,
    /// When this sink began.
    since: String,
    pub position: Position,
    pub passed: BTreeMap<WriterName, Passed>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Format {
    #[serde(rename = "behavry.audit.sink.v1")]
    V1,
}

/// Which lines of one chain are done with, counted from the chain's first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passed {
    /// Those before it are lost and were counted, or were no loss of this sink's.
    counted: u64,
    /// The first one that was there when the sink came to this chain.
    from: u64,
    /// Behind the last one that was given or is lost.
    pub next: u64,
}

impl Bookmark {
    fn new(start: Start, since: Moment) -> Bookmark {
        Bookmark {
            format: Format::V1,
            start,
            since: since.to_string(),
            position: Position::default(),
            passed: BTreeMap::new(),
        }
    }

    /// Counts a line that was read. How many were lost before it, as far as it tells.
    fn pass(&mut self, writer: WriterName, line: &[u8]) -> u64 {
        match mark(line) {
            Some(Mark::SegmentOpen { count, .. }) => match self.passed.get_mut(&writer) {
                Some(passed) => {
                    let lost = count.saturating_sub(passed.next);
                    passed.next = count + 1;
                    lost
                }
                None => {
                    // Of an older chain the first segments may have been deleted before there was this sink: its tombstones tell.
                    let ours = digits(writer.as_str()) >= digits(&self.since);
                    let counted = if ours { count } else { 0 };
                    self.passed.insert(writer, Passed { counted, from: count, next: count + 1 });
                    counted
                }
            },
            found => {
                if let Some(passed) = self.passed.get_mut(&writer) {
                    passed.next += 1;
                }
                match found {
                    Some(Mark::Tombstone { writer, count_before, count, to, .. })
                        if timestamp(line) >= self.since.as_str() =>
                    {
                        let lost = self.passed.entry(writer).or_default().bury(count_before, count_before + count);
                        if self.skips(&to) { 0 } else { lost }
                    }
                    _ => 0,
                }
            }
        }
    }

    /// Whether a line of this time is older than what the sink wants.
    fn skips(&self, timestamp: &str) -> bool {
        self.start == Start::Now && timestamp < self.since.as_str()
    }

    /// Forgets the oldest chains of those whose files are gone.
    fn prune(&mut self) {
        let gone: Vec<WriterName> =
            self.passed.keys().copied().filter(|writer| self.position.of(*writer).is_none()).collect();
        for writer in gone.iter().take(gone.len().saturating_sub(GONE)) {
            self.passed.remove(writer);
        }
    }
}

impl Passed {
    /// The lines from `start` to before `end` are deleted. How many of them the sink had not passed, and were not counted yet.
    fn bury(&mut self, start: u64, end: u64) -> u64 {
        let before = self.from.min(end).saturating_sub(self.counted.max(start));
        self.counted = self.counted.max(self.from.min(end));
        let behind = end.saturating_sub(self.next.max(start));
        self.next = self.next.max(end);
        before + behind
    }
}

/// What came of reading on.
pub struct Read {
    pub batch: Batch,
    /// Lines that the sink will never get.
    pub lost: u64,
    /// There may be more at once.
    pub more: bool,
}

/// Reads on behind a sink's bookmark. Does file input and output: keep it off the request threads.
pub struct Backlog {
    saved_at: PathBuf,
    follower: Follower,
    /// Behind what was read last.
    bookmark: Bookmark,
}

impl Backlog {
    /// Goes on where `saved_at` says, else begins: at `since` where `start` is [`Start::Now`]. What is saved and cannot be read is no
    /// reason to send nothing.
    pub fn open(folder: &Path, saved_at: PathBuf, start: Start, since: Moment) -> Backlog {
        let (bookmark, new) = match read(&saved_at) {
            Ok(Some(bookmark)) => (bookmark, false),
            Ok(None) => (Bookmark::new(start, since), true),
            Err(why) => {
                log::error!("audit: {why}; the sink begins anew, and gets again what it had");
                (Bookmark::new(Start::Beginning, since), true)
            }
        };
        let backlog = Backlog { saved_at, follower: Follower::new(folder, &bookmark.position), bookmark };
        if new && let Err(why) = backlog.save() {
            // Else a restart before the first batch would begin later, and leave out what came meanwhile.
            log::error!("audit: the bookmark of a new sink is not saved ({why})");
        }
        backlog
    }

    /// Behind what was read last.
    pub fn bookmark(&self) -> &Bookmark {
        &self.bookmark
    }

    /// The next lines, at most so many. After an error the same place is tried again.
    pub fn read(&mut self, most_lines: usize) -> Result<Read, TrailError> {
        let (mut filling, mut lost, mut steps) = (Filling::default(), 0, 0);
        while filling.has_room(most_lines) && steps < STEPS {
            let Some(event) = self.follower.next()? else { break };
            steps += 1;
            match event {
                Event::Line { writer, line, .. } => {
                    lost += self.bookmark.pass(writer, line);
                    if !self.bookmark.skips(timestamp(line)) {
                        filling.push(writer, line);
                    }
                }
                Event::Lost { writer, loss } => {
                    if let Loss::Overlong { .. } = loss {
                        lost += 1;
                        if let Some(passed) = self.bookmark.passed.get_mut(&writer) {
                            passed.next += 1;
                        }
                    }
                    log::warn!("audit: a sink cannot have a part of the chain of {writer}: {loss}");
                }
            }
        }
        self.bookmark.position = self.follower.position();
        self.bookmark.prune();
        let more = !filling.has_room(most_lines) || steps == STEPS;
        Ok(Read { batch: filling.done(), lost, more })
    }

    /// Keeps the bookmark for the next start, whole or not at all.
    pub fn save(&self) -> Result<(), FileError> {
        let bytes = serde_json::to_vec(&self.bookmark).expect("texts and numbers are always JSON");
        if self.saved_at.exists() {
            private_file::replace(&self.saved_at, &bytes)
        } else {
            private_file::create(&self.saved_at, &bytes).map(|_| ())
        }
    }
}

fn read(path: &Path) -> Result<Option<Bookmark>, String> {
    let Some(bytes) = private_file::read(path, OTHERS_CAN_WRITE).map_err(|e| e.to_string())? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|_| format!("{}: is damaged", path.display()))
}

/// The marks that tell of counts. A quote inside of a string is escaped, so these are members' names.
fn mark(line: &[u8]) -> Option<Mark> {
    let says = |text: &[u8]| memchr::memmem::find(line, text).is_some();
    if !says(br#""phase":"segment_open""#) && !says(br#""phase":"tombstone""#) {
        return None;
    }
    Mark::of(&serde_json::from_slice(line).ok()?)
}

/// Year to second of a time stamp or of a writer's name.
fn digits(text: &str) -> Vec<u8> {
    text.bytes().filter(u8::is_ascii_digit).take(14).collect()
}

#[cfg(test)]
mod tests;
