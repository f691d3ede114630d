//! A folder's segments as one sequence of lines, which goes on as they grow, rotate, appear and vanish.
//!
//! Lines of one writer come in its order. Writers that overlap in time (an upgrade, two proxies on one folder) are merged by their
//! lines' timestamps, as far as the lines are there when the folder is looked at. A writer's file is opened only when the sequence has come to its start,
//! so that a folder with a thousand dead writers needs few descriptors.
//!
//! Nothing waits here: [`Follower::next`] gives `None` where nothing is new, and the caller asks again after [`POLL`].

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::segment::{Found, SegmentReader};
use super::{Place, Position, TrailError, segments};
use crate::ledger::chain::{SegmentName, WriterName};

/// How long to wait before asking again. A look at the folder costs one listing and one `stat` for each writer; a fifth of a second is
/// prompt to a person and nothing to the machine.
pub const POLL: Duration = Duration::from_millis(200);

/// Files that are kept open though they have nothing new: a file that is renamed or deleted is read to its end only while it is open.
/// Those who write now are among the youngest; two or three at most.
const KEPT_OPEN: usize = 16;

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A whole line, without its newline, and where it begins.
    Line { writer: WriterName, at: Place, line: &'a [u8] },
    /// Something that a reader should have got and cannot.
    Lost { writer: WriterName, loss: Loss },
}

/// What cannot be read, and why. Reading goes on behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The segments behind `after` and before `next` are gone, and what was not yet read of `after`: retention, or somebody else.
    Gone { after: u32, next: u32 },
    /// The file is not the one that was read to here: it is shorter now, or no line ends here.
    Changed { at: Place },
    /// The segment ends without a newline, and its writer went on in the next.
    Torn { at: Place, bytes: u64 },
    /// A line of more than [`super::LONGEST_LINE`] bytes was skipped.
    Overlong { at: Place },
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Gone { after, next } => {
                write!(f, "what was not read of segment {after} and is before {next} is gone")
            }
            Loss::Changed { at } => write!(f, "segment {} was changed at byte {}", at.segment, at.offset),
            Loss::Torn { at, bytes } => write!(f, "segment {} ends with {bytes} bytes that are no line", at.segment),
            Loss::Overlong { at } => write!(f, "the line at byte {} of segment {} is too long", at.offset, at.segment),
        }
    }
}

/// A reader of all lines of a folder.
pub struct Follower {
    folder: PathBuf,
    /// Sorted by writer, so by start.
    chains: Vec<Chain>,
    /// Which of `chains` may still have something in this round, ascending. Empty: the next call looks at the folder anew.
    round: Vec<usize>,
}

/// What is known of one writer's segments.
struct Chain {
    writer: WriterName,
    /// Behind what was given. Segment 0: nothing was, and the first segment there is comes next.
    place: Place,
    /// What the last listing showed, ascending.
    listed: Vec<u32>,
    reader: Option<SegmentReader>,
    /// The reader stands before a line that was not given yet.
    pending: bool,
    /// The pending line's time, for the order between writers.
    time: String,
    /// The place was held against the file in this round.
    checked: bool,
    /// That the file is shorter than the place was said already.
    told_short: bool,
    /// The last line read was a `segment_close`: this file does not grow any more.
    closed: bool,
}

enum Ready {
    Line,
    Nothing,
    Lost(Loss),
}

impl Follower {
    /// Goes on behind `position`: everything for [`Position::default`], what is written from now on for [`Position::at_the_end`].
    pub fn new(folder: impl Into<PathBuf>, position: &Position) -> Follower {
        let chains = position.places().map(|(writer, place)| Chain::new(writer, place)).collect();
        Follower { folder: folder.into(), chains, round: Vec::new() }
    }

    /// Behind the lines that were given.
    pub fn position(&self) -> Position {
        let begun = self.chains.iter().filter(|chain| chain.place.segment > 0);
        Position(begun.map(|chain| (chain.writer, chain.place)).collect())
    }

    /// The next line, or loss. `None`: nothing more is there now. After an error the same place is tried again.
    #[expect(clippy::should_implement_trait, reason = "what it gives borrows from it, which an Iterator cannot say")]
    pub fn next(&mut self) -> Result<Option<Event<'_>>, TrailError> {
        if self.round.is_empty() {
            self.look()?;
        }
        let mut first: Option<usize> = None;
        let mut i = 0;
        while let Some(&at) = self.round.get(i) {
            if let Some(first) = first
                && !starts_by(self.chains[at].writer, &self.chains[first].time)
            {
                break;
            }
            match self.chains[at].ready(&self.folder)? {
                Ready::Line if first.is_none_or(|first| self.chains[at].time < self.chains[first].time) => {
                    first = Some(at);
                    i += 1;
                }
                Ready::Line => i += 1,
                Ready::Nothing => {
                    self.round.remove(i);
                    self.close_the_oldest();
                }
                Ready::Lost(loss) => return Ok(Some(Event::Lost { writer: self.chains[at].writer, loss })),
            }
        }
        Ok(first.and_then(|first| self.chains[first].give()))
    }

    /// Starts a round: what is in the folder now.
    fn look(&mut self) -> Result<(), TrailError> {
        self.chains.iter_mut().for_each(|chain| chain.listed.clear());
        for name in segments(&self.folder)? {
            let at = match self.chains.binary_search_by(|chain| chain.writer.cmp(&name.writer)) {
                Ok(at) => at,
                Err(at) => {
                    self.chains.insert(at, Chain::new(name.writer, Place { segment: 0, offset: 0 }));
                    at
                }
            };
            self.chains[at].listed.push(name.number);
        }
        self.chains.retain(|chain| !chain.listed.is_empty() || (chain.reader.is_some() && !chain.closed));
        self.chains.iter_mut().for_each(|chain| chain.checked = false);
        self.round = (0..self.chains.len()).collect();
        Ok(())
    }

    /// Of those that have nothing new. The oldest are the least likely to be written to.
    fn close_the_oldest(&mut self) {
        let idle = |chain: &&mut Chain| chain.reader.is_some() && !chain.pending;
        let open = self.chains.iter_mut().filter(idle).count();
        self.chains.iter_mut().filter(idle).take(open.saturating_sub(KEPT_OPEN)).for_each(|chain| chain.reader = None);
    }
}

impl Chain {
    fn new(writer: WriterName, place: Place) -> Chain {
        Chain {
            writer,
            place,
            listed: Vec::new(),
            reader: None,
            pending: false,
            time: String::new(),
            checked: false,
            told_short: false,
            closed: false,
        }
    }

    fn ready(&mut self, folder: &Path) -> Result<Ready, TrailError> {
        loop {
            if self.pending {
                return Ok(Ready::Line);
            }
            let path = folder.join(SegmentName { writer: self.writer, number: self.place.segment }.to_string());
            let unreadable = |error| TrailError::Unreadable { path: path.clone(), error };
            let Some(reader) = &mut self.reader else {
                match self.open(&path).map_err(unreadable)? {
                    Some(ready) => return Ok(ready),
                    None => continue,
                }
            };
            if !self.checked {
                self.checked = true;
                if self.place.offset > 0 && !self.told_short {
                    let mut before = [0];
                    let read = reader.file().read_at(&mut before, self.place.offset - 1).map_err(unreadable)?;
                    if read == 1 && before != *b"\n" {
                        // From the next line on.
                        _ = reader.find().map_err(unreadable)?;
                        return Ok(Ready::Lost(Loss::Changed { at: self.moved_to_readers_end() }));
                    }
                }
            }
            match reader.find().map_err(unreadable)? {
                Found::Line => {
                    self.time.clear();
                    self.time.push_str(timestamp(reader.line()));
                    self.closed = memchr::memmem::find(reader.line(), br#""phase":"segment_close""#).is_some();
                    (self.pending, self.told_short) = (true, false);
                }
                Found::Overlong => return Ok(Ready::Lost(Loss::Overlong { at: self.moved_to_readers_end() })),
                Found::End { torn_bytes } => match self.following() {
                    Some(_) if torn_bytes > 0 => {
                        let at = self.place;
                        self.reader = None;
                        self.place.offset += torn_bytes;
                        return Ok(Ready::Lost(Loss::Torn { at, bytes: torn_bytes }));
                    }
                    Some(next) => {
                        if let Some(lost) = self.go_on_in(next) {
                            return Ok(lost);
                        }
                    }
                    None => {
                        if self.closed {
                            self.reader = None;
                        }
                        return Ok(Ready::Nothing);
                    }
                },
                Found::Cut { .. } => {
                    let following = self.following();
                    if self.told_short {
                        match following {
                            Some(next) => _ = self.go_on_in(next),
                            None => return Ok(Ready::Nothing),
                        }
                    } else {
                        self.told_short = true;
                        return Ok(Ready::Lost(Loss::Changed { at: self.place }));
                    }
                }
            }
        }
    }

    /// Opens the segment of the place, or the next one that is there. `None`: it is open, or another is to be tried.
    fn open(&mut self, path: &Path) -> io::Result<Option<Ready>> {
        let following = self.following();
        if self.listed.contains(&self.place.segment) {
            let nothing_new = match fs::metadata(path) {
                Ok(about) => about.len() == self.place.offset && self.place.offset > 0,
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                Err(error) => return Err(error),
            };
            if nothing_new {
                return Ok(match following {
                    Some(next) => self.go_on_in(next),
                    None => Some(Ready::Nothing),
                });
            }
            match SegmentReader::open(path, self.place.offset) {
                Ok(reader) => {
                    self.reader = Some(reader);
                    return Ok(None);
                }
                // Deleted since the folder was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.listed.retain(|number| *number != self.place.segment);
                }
                Err(error) => return Err(error),
            }
        }
        let after = self.place.segment;
        Ok(match following {
            None => Some(Ready::Nothing),
            Some(next) => {
                _ = self.go_on_in(next);
                (after > 0).then_some(Ready::Lost(Loss::Gone { after, next }))
            }
        })
    }

    fn following(&self) -> Option<u32> {
        self.listed.iter().copied().find(|number| *number > self.place.segment)
    }

    /// Steps to the beginning of a later segment; what lies between is lost.
    fn go_on_in(&mut self, next: u32) -> Option<Ready> {
        let after = self.place.segment;
        (self.reader, self.closed, self.told_short) = (None, false, false);
        self.place = Place { segment: next, offset: 0 };
        (next > after + 1).then_some(Ready::Lost(Loss::Gone { after, next }))
    }

    /// Moves the place to where the reader stands, and says where it was.
    fn moved_to_readers_end(&mut self) -> Place {
        let at = self.place;
        if let Some(reader) = &self.reader {
            self.place.offset = reader.end_of_line();
        }
        at
    }

    fn give(&mut self) -> Option<Event<'_>> {
        let reader = self.reader.as_ref()?;
        let at = self.place;
        self.pending = false;
        self.place.offset = reader.end_of_line();
        Some(Event::Line { writer: self.writer, at, line: reader.line() })
    }
}

/// A line's timestamp, as it stands there; empty where there is none. Quotes inside a string are escaped, so this is a member's name.
pub fn timestamp(line: &[u8]) -> &str {
    const NAME: &[u8] = br#""timestamp":""#;
    let text = memchr::memmem::rfind(line, NAME).map_or(&[][..], |at| &line[at + NAME.len()..]);
    let end = memchr::memchr(b'"', &text[..text.len().min(64)]).unwrap_or(0);
    std::str::from_utf8(&text[..end]).unwrap_or_default()
}

/// Whether a writer (`20261122T183516Z-..`) may have lines as old as `time` (`2026-11-22T18:35:16.000001+00:00`).
fn starts_by(writer: WriterName, time: &str) -> bool {
    let digits = |text: &str| text.bytes().filter(u8::is_ascii_digit).take(14).collect::<Vec<_>>();
    digits(writer.as_str()) <= digits(time)
}

#[cfg(test)]
mod tests;
