//! Where lines go first: a chain of segments in a folder, or standard output where it is the only sink.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::time::Instant;

use super::journal::Journal;
use crate::ledger::chain::{self, Head};

/// The sink that gives receipts.
pub(super) enum Sink {
    Journal(Box<Journal>),
    Stream(Stream),
}

/// What came of an append.
pub(super) struct Appended {
    /// How many of the events are in the sink, as whole lines.
    pub lines: usize,
    /// What stopped the next one, or the fsync that was asked for.
    pub result: io::Result<()>,
}

impl Sink {
    /// Writes events as lines of the chain, as many as go. `durably`: the lines count only once an fsync has returned; where it fails,
    /// `lines` are in the file all the same.
    pub(super) fn append(&mut self, events: &[&[u8]], durably: bool) -> Appended {
        match self {
            Sink::Journal(journal) => journal.append(events, durably),
            Sink::Stream(stream) => stream.append(events),
        }
    }

    /// The text of the lines that the last append wrote.
    pub(super) fn lines(&self) -> &[u8] {
        match self {
            Sink::Journal(journal) => journal.lines(),
            Sink::Stream(stream) => &stream.sealed[..stream.whole],
        }
    }

    /// What is due by the clock: the look at the file's name, rotation, checkpoints.
    pub(super) fn tick(&mut self) -> io::Result<()> {
        match self {
            Sink::Journal(journal) => journal.tick(),
            Sink::Stream(_) => Ok(()),
        }
    }

    /// When what was written has to be on the disk, if the configuration says so.
    pub(super) fn sync_due(&self) -> Option<Instant> {
        match self {
            Sink::Journal(journal) => journal.sync_due(),
            Sink::Stream(_) => None,
        }
    }

    pub(super) fn sync(&mut self) -> io::Result<()> {
        match self {
            Sink::Journal(journal) => journal.sync(),
            Sink::Stream(_) => Ok(()),
        }
    }

    /// The end, in order.
    pub(super) fn close(&mut self) -> io::Result<()> {
        match self {
            Sink::Journal(journal) => journal.stop(),
            Sink::Stream(_) => Ok(()),
        }
    }
}

impl fmt::Display for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sink::Journal(journal) => write!(f, "{}", journal.folder().display()),
            Sink::Stream(_) => f.write_str("standard output"),
        }
    }
}

/// Standard output as the only sink: one chain from `GENESIS`, without marks. Nothing can be taken back from a pipe, so after a write
/// that stopped in mid-line the next one goes on there.
pub(super) struct Stream {
    file: File,
    head: Head,
    /// Sealed lines: those that the last append finished, up to `whole`, and those that are not wholly written.
    sealed: Vec<u8>,
    whole: usize,
    written: usize,
    /// Where the lines in `sealed` end that are not wholly written.
    ends: VecDeque<usize>,
}

impl Stream {
    pub(super) fn new(file: File) -> Stream {
        Stream { file, head: Head::Genesis, sealed: Vec::new(), whole: 0, written: 0, ends: VecDeque::new() }
    }

    /// The first events may be sealed already: those that an earlier append did not finish.
    fn append(&mut self, events: &[&[u8]]) -> Appended {
        self.sealed.drain(..self.whole);
        self.written -= self.whole;
        self.ends.iter_mut().for_each(|end| *end -= self.whole);
        self.whole = 0;
        for event in &events[self.ends.len().min(events.len())..] {
            self.head = chain::seal(event, self.head, &mut self.sealed);
            self.ends.push_back(self.sealed.len());
        }
        let (more, result) = write_all(&mut self.file, &self.sealed[self.written..]);
        self.written += more;
        let mut lines = 0;
        while let Some(end) = self.ends.front().copied().filter(|end| *end <= self.written) {
            self.ends.pop_front();
            self.whole = end;
            lines += 1;
        }
        Appended { lines, result }
    }
}

/// Writes as much as goes: how much that was, and what stopped it.
pub(super) fn write_all(file: &mut File, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}
