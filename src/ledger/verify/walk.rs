//! One writer's chain, line by line.

use std::collections::{HashSet, VecDeque};

use super::across::{Across, Expected};
use super::finding::Fault;
use super::line::{Final, Kind, Line, Of};
use super::{Against, ChainReport, End};
use crate::ledger::chain::mark::CloseReason;
use crate::ledger::chain::{FORMAT, Head, Mark, SegmentName, WriterName};

/// How far a chain was followed, and what is known of it there.
pub(super) struct Walk {
    pub writer: WriterName,
    /// The segment that is read.
    pub segment: u32,
    /// Lines of the chain before the next one, those of deleted segments included.
    pub count: u64,
    /// What the next line is chained to.
    pub head: Head,
    pub line_of_segment: u64,
    /// Lines that were read.
    pub lines: u64,
    /// Behind the last newline of the segment.
    pub torn_bytes: u64,
    /// Behind the chain's last line, in segments before that one.
    pub torn_since: u64,
    pub checkpoints: u64,
    /// Lines of the chain up to and with its last checkpoint.
    pub signed_through: u64,
    pub requests: Requests,
    /// Each segment that was read, for tombstones that speak of one that is still there.
    pub read: Vec<Extent>,
    /// Where the chain goes on behind segments that are not there.
    pub bridges: Vec<Bridge>,
    /// Segments whose bytes behind the last newline belong to no line, though their writer went on.
    pub torn_within: Vec<(u32, u64)>,
    /// The chain that this one is adopting, and how many `crashed` finals are still to come.
    pub adopting: Option<(WriterName, u64)>,
    pub end: End,
    /// What others remember of this chain, ascending; taken out as it is passed.
    pub expected: VecDeque<Expected>,
    /// Lines before the first one that was read.
    pub first_count: u64,
    closed: Option<CloseReason>,
    after_checkpoint: bool,
}

/// A segment as it was read.
pub(super) struct Extent {
    pub segment: u32,
    pub first_previous: Head,
    pub count_before: u64,
    pub count: u64,
    pub head: Head,
}

/// Segments between two that are there.
pub(super) struct Bridge {
    /// The last that was read before, and the lines up to it; 0 and nothing at the beginning of the chain.
    pub after: Option<(u32, u64, Head)>,
    /// The one where the chain goes on, and what it says it continues.
    pub segment: u32,
    pub count: u64,
    pub head: Head,
}

impl Walk {
    pub(super) fn new(writer: WriterName, expected: VecDeque<Expected>) -> Walk {
        Walk {
            writer,
            segment: 0,
            count: 0,
            head: Head::Genesis,
            line_of_segment: 0,
            lines: 0,
            torn_bytes: 0,
            torn_since: 0,
            checkpoints: 0,
            signed_through: 0,
            requests: Requests::default(),
            read: Vec::new(),
            bridges: Vec::new(),
            torn_within: Vec::new(),
            adopting: None,
            end: End::Open,
            expected,
            first_count: 0,
            closed: None,
            after_checkpoint: false,
        }
    }

    /// Goes on in the next segment that is there.
    pub(super) fn enter(&mut self, name: &SegmentName) -> Result<(), Fault> {
        if self.torn_bytes > 0 {
            self.torn_within.push((self.segment, self.torn_bytes));
            self.torn_since += self.torn_bytes;
        }
        let was_stopped = self.stopped();
        let contiguous = name.number == self.segment + 1;
        if !contiguous {
            let after = (self.segment > 0).then_some((self.segment, self.count, self.head));
            self.bridges.push(Bridge { after, segment: name.number, count: 0, head: Head::Genesis });
        }
        (self.segment, self.line_of_segment, self.torn_bytes) = (name.number, 0, 0);
        (self.closed, self.after_checkpoint) = (None, false);
        if was_stopped { Err(Fault::AfterStop) } else { Ok(()) }
    }

    /// The next line, in its place.
    pub(super) fn take(&mut self, line: Line, against: &Against, across: &mut Across) -> Result<(), Fault> {
        if self.closed.is_some() {
            return Err(Fault::AfterClose);
        }
        let opens = matches!(line.kind, Kind::Mark(Mark::SegmentOpen { .. }));
        match (opens, self.line_of_segment) {
            (true, 0) => self.cross_a_bridge(&line),
            (true, _) => return Err(Fault::OpenedWithin),
            (false, 0) => return Err(Fault::NotOpened),
            (false, _) => {}
        }
        if line.previous != self.head {
            return Err(Fault::Link { count: self.count });
        }
        let is_checkpoint = matches!(line.kind, Kind::Mark(Mark::Checkpoint { .. }));
        match line.kind {
            Kind::Request(of) => self.requests.begin(of)?,
            Kind::StreamStart(of) => self.requests.runs(of)?,
            Kind::Final(end) if end.crashed => self.adopted_one(end, across)?,
            Kind::Final(end) => self.requests.end(end)?,
            Kind::Mark(mark) => self.mark(mark, &line.timestamp, against, across)?,
        }
        let previous = self.head;
        self.head = line.hash;
        (self.count, self.lines, self.line_of_segment) = (self.count + 1, self.lines + 1, self.line_of_segment + 1);
        self.after_checkpoint = is_checkpoint;
        self.torn_since = 0;
        if is_checkpoint {
            self.signed_through = self.count;
        }
        match self.read.last_mut().filter(|extent| extent.segment == self.segment) {
            Some(extent) => (extent.count, extent.head) = (extent.count + 1, line.hash),
            None => self.read.push(Extent {
                segment: self.segment,
                first_previous: previous,
                count_before: self.count - 1,
                count: 1,
                head: line.hash,
            }),
        }
        while self.expected.front().is_some_and(|expected| expected.count <= self.count) {
            let Some(expected) = self.expected.pop_front() else { break };
            if expected.count < self.count {
                // Before the first line that is there: a tombstone's matter.
                across.before_the_beginning(self.writer, expected);
            } else if expected.hash != line.hash.to_string() {
                return Err(Fault::ChainOther { writer: self.writer, by: expected.by, count: expected.count });
            }
        }
        Ok(())
    }

    /// At the end of a segment.
    pub(super) fn leave(&mut self) -> Result<(), Fault> {
        match self.closed {
            Some(_) if self.torn_bytes > 0 => Err(Fault::Torn { bytes: self.torn_bytes }),
            Some(CloseReason::Stopped) if self.requests.open() > 0 => {
                Err(Fault::LeftOpen { writer: self.writer, requests: self.requests.open() })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn stopped(&self) -> bool {
        self.closed == Some(CloseReason::Stopped)
    }

    pub(super) fn report(&self) -> ChainReport {
        ChainReport {
            writer: self.writer,
            segments: self.read.len() as u32,
            lines: self.lines,
            checkpoints: self.checkpoints,
            end: self.end,
        }
    }

    /// Behind segments that are gone the chain goes on where it says; whether that is right, tombstones have to say.
    fn cross_a_bridge(&mut self, open: &Line) {
        let Some(bridge) = self.bridges.last_mut().filter(|bridge| bridge.segment == self.segment) else { return };
        if let Kind::Mark(Mark::SegmentOpen { count, .. }) = &open.kind {
            (bridge.count, bridge.head) = (*count, open.previous);
            (self.count, self.head) = (*count, open.previous);
            // Requests of the segments that are gone may end here.
            self.requests.begins_later = true;
            // And those that were open before it may have ended there: nothing shows that they did not.
            self.requests.open.clear();
            if bridge.after.is_none() {
                self.first_count = *count;
                self.signed_through = *count;
            }
        }
    }

    fn mark(&mut self, mark: Mark, timestamp: &str, against: &Against, across: &mut Across) -> Result<(), Fault> {
        match &mark {
            Mark::SegmentOpen { format, writer, segment, count, heads, .. } => {
                said("format", format, FORMAT)?;
                self.own(*writer, *segment, *count)?;
                let sorted = heads.is_sorted_by(|a, b| a.writer < b.writer);
                let strange = *segment > 1 && !heads.is_empty();
                if !sorted || strange || heads.iter().any(|head| head.writer == *writer) {
                    return Err(Fault::Malformed("the segment_open lists other chains' heads out of order or place"));
                }
            }
            Mark::Checkpoint { writer, segment, count, head, .. } => {
                self.own(*writer, *segment, *count)?;
                said("head", head, &self.head.to_string())?;
                if against.has_key() {
                    against.signed(&mark, timestamp)?;
                }
                self.checkpoints += 1;
            }
            Mark::SegmentClose { writer, segment, count, head, reason } => {
                self.own(*writer, *segment, *count)?;
                said("head", head, &self.head.to_string())?;
                if !self.after_checkpoint {
                    return Err(Fault::CloseWithoutCheckpoint);
                }
                self.closed = Some(*reason);
            }
            Mark::Adopted { writer, open_requests, .. } => {
                if *writer == self.writer {
                    return Err(Fault::Malformed("a chain that adopts itself"));
                }
                self.adopting = Some((*writer, *open_requests));
                across.adopted(self.writer, &mark);
            }
            Mark::Tombstone { .. } => {
                if against.has_key() {
                    against.signed(&mark, timestamp)?;
                }
                across.tombstone(self.writer, mark);
            }
        }
        Ok(())
    }

    /// What a mark says of the chain that it stands in.
    fn own(&self, writer: WriterName, segment: u32, count: u64) -> Result<(), Fault> {
        said("writer", writer.as_str(), self.writer.as_str())?;
        said("segment", &segment.to_string(), &self.segment.to_string())?;
        said("count", &count.to_string(), &self.count.to_string())
    }

    /// The final record that another chain's request gets from this one.
    fn adopted_one(&mut self, end: Final, across: &mut Across) -> Result<(), Fault> {
        let request_id = end.request_id.ok_or(Fault::Malformed("a crashed request has an id"))?;
        match &mut self.adopting {
            Some((dead, left)) if *left > 0 && across.crashed(*dead, end.exchange, &request_id) => {
                *left -= 1;
                Ok(())
            }
            _ => Err(Fault::NotAdopted { request_id }),
        }
    }
}

fn said(what: &'static str, said: &str, found: &str) -> Result<(), Fault> {
    if said == found { Ok(()) } else { Err(Fault::Mark { what, said: said.to_owned(), found: found.to_owned() }) }
}

/// The requests that have begun and not ended, by what the ids of an exchange's records have in common ([`Id::exchange`]). Not by
/// `request_id`: a caller may choose that, and may choose the same one twice (contract, section 1).
///
/// [`Id::exchange`]: crate::ledger::record::Id::exchange
#[derive(Default)]
pub(super) struct Requests {
    open: HashSet<u64>,
    /// Segments before the ones that were read are gone: requests that began there may end here.
    pub begins_later: bool,
    /// How many did.
    pub begun_before: u64,
}

impl Requests {
    pub(super) fn open(&self) -> u64 {
        self.open.len() as u64
    }

    pub(super) fn is_open(&self, exchange: u64) -> bool {
        self.open.contains(&exchange)
    }

    fn begin(&mut self, of: Of) -> Result<(), Fault> {
        match self.open.insert(of.exchange) {
            true => Ok(()),
            false => Err(Fault::RequestTwice { request_id: of.request_id }),
        }
    }

    fn runs(&mut self, of: Of) -> Result<(), Fault> {
        if self.open.contains(&of.exchange) || self.begins_later {
            return Ok(());
        }
        Err(Fault::WithoutRequest { request_id: of.request_id })
    }

    /// A final record that names no backend may stand alone: its request was refused before it was recorded.
    fn end(&mut self, end: Final) -> Result<(), Fault> {
        if self.open.remove(&end.exchange) || !end.has_backend {
            return Ok(());
        }
        self.begun_before += 1;
        match self.begins_later {
            true => Ok(()),
            false => Err(Fault::WithoutRequest { request_id: end.request_id.unwrap_or_default() }),
        }
    }
}
