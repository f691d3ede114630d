//! What chains, and checkpoints that were kept, say about other chains.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;

use super::finding::{By, CannotCheck, Fault, Gap, Problem};
use super::line::{self, Kind};
use super::walk::{Bridge, Walk};
use super::{Against, End, Verdict};
use crate::ledger::chain::{GENESIS, Mark, SegmentName, WriterName};
use crate::ledger::trail::TrailError;
use crate::ledger::trail::segment::{Found, SegmentReader};

/// That a chain's line number `count` (from 1) had this hash.
pub(super) struct Expected {
    pub count: u64,
    pub hash: String,
    pub by: By,
    /// When it was the chain's last line, if that was written down: nothing of it is younger.
    pub at: Option<String>,
}

/// Collected while the chains are walked; judged at the end.
pub(super) struct Across {
    expected: BTreeMap<WriterName, Vec<Expected>>,
    /// What was expected of lines that stood before the first one that is there.
    before: BTreeMap<WriterName, Vec<Expected>>,
    adopted: Vec<Adopted>,
    /// `crashed` finals, by the dead writer and the exchange, with the request's id.
    crashed: HashMap<WriterName, HashMap<u64, String>>,
    tombstones: BTreeMap<(WriterName, u32), Tombstone>,
    contradictions: Vec<Fault>,
    walks: BTreeMap<WriterName, Walk>,
}

#[derive(PartialEq, Eq)]
struct Adopted {
    by: WriterName,
    writer: WriterName,
    segment: u32,
    count: u64,
    head: String,
    torn_bytes: u64,
    open_requests: u64,
}

struct Tombstone {
    by: WriterName,
    first_previous: String,
    head: String,
    count_before: u64,
    count: u64,
    to: String,
}

/// Whether retention accounts for lines that are gone.
enum Deleted {
    AsSaid,
    /// They are older than what tombstones speak of.
    LongAgo,
    No(Fault),
}

impl Across {
    pub(super) fn new(against: &Against) -> Across {
        let mut expected: BTreeMap<WriterName, Vec<Expected>> = BTreeMap::new();
        for kept in &against.checkpoints {
            let by = || By::Checkpoint { timestamp: kept.timestamp.clone() };
            let at = || Some(kept.timestamp.clone());
            let of = expected.entry(kept.writer).or_default();
            of.push(Expected { count: kept.count, hash: kept.head.clone(), by: by(), at: at() });
            // The checkpoint itself is the line after that.
            of.push(Expected { count: kept.count + 1, hash: kept.hash.clone(), by: by(), at: at() });
        }
        Across {
            expected,
            before: BTreeMap::new(),
            adopted: Vec::new(),
            crashed: HashMap::new(),
            tombstones: BTreeMap::new(),
            contradictions: Vec::new(),
            walks: BTreeMap::new(),
        }
    }

    /// Reads what the first line of a chain says of the other chains that were there.
    pub(super) fn expect_heads_of(&mut self, folder: &Path, segments: &[SegmentName]) -> Result<(), CannotCheck> {
        let Some(first) = segments.first().filter(|name| name.number == 1) else { return Ok(()) };
        let path = folder.join(first.to_string());
        let mut reader = match SegmentReader::open(&path, 0) {
            Ok(reader) => reader,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(TrailError::Unreadable { path, error }.into()),
        };
        if reader.find().map_err(|error| TrailError::Unreadable { path, error })? != Found::Line {
            return Ok(());
        }
        // If the line is bad, the walk will say so.
        if let Ok(line) = line::read(reader.line())
            && let Kind::Mark(Mark::SegmentOpen { heads, .. }) = line.kind
        {
            for head in heads {
                let of = self.expected.entry(head.writer).or_default();
                of.push(Expected { count: head.count, hash: head.head, by: By::Head { of: first.writer }, at: None });
            }
        }
        Ok(())
    }

    /// What others remember of a chain, in the order of its lines.
    pub(super) fn expected_of(&mut self, writer: WriterName) -> VecDeque<Expected> {
        let mut of: Vec<_> = self.expected.remove(&writer).unwrap_or_default();
        of.retain(|expected| expected.count > 0 && expected.hash != GENESIS);
        of.sort_by_key(|expected| expected.count);
        of.into()
    }

    pub(super) fn before_the_beginning(&mut self, writer: WriterName, expected: Expected) {
        self.before.entry(writer).or_default().push(expected);
    }

    pub(super) fn adopted(&mut self, by: WriterName, mark: &Mark) {
        if let Mark::Adopted { writer, segment, count, head, torn_bytes, open_requests } = mark {
            self.adopted.push(Adopted {
                by,
                writer: *writer,
                segment: *segment,
                count: *count,
                head: head.clone(),
                torn_bytes: *torn_bytes,
                open_requests: *open_requests,
            });
        }
    }

    /// A request of a dead chain got its final record. `false`: it has one already.
    pub(super) fn crashed(&mut self, dead: WriterName, exchange: u64, request_id: &str) -> bool {
        self.crashed.entry(dead).or_default().insert(exchange, request_id.to_owned()).is_none()
    }

    pub(super) fn tombstone(&mut self, by: WriterName, mark: Mark) {
        let Mark::Tombstone { writer, segment, first_previous_hash, head, count_before, count, to, .. } = mark else {
            return;
        };
        let first_previous = first_previous_hash;
        let tombstone = Tombstone { by, first_previous, head, count_before, count, to };
        match self.tombstones.get(&(writer, segment)) {
            Some(known) if !known.says_the_same(&tombstone) => {
                self.contradictions.push(Fault::Contradiction { writer, what: "tombstones" });
            }
            Some(_) => {}
            None => _ = self.tombstones.insert((writer, segment), tombstone),
        }
    }

    pub(super) fn walked(&mut self, walk: Walk) {
        self.walks.insert(walk.writer, walk);
    }

    /// Holds all against all.
    pub(super) fn conclude(mut self, verdict: &mut Verdict) {
        let mut faults = std::mem::take(&mut self.contradictions);
        for walk in self.walks.values() {
            // Also of a chain whose check ended at a bad line behind it.
            faults.extend(walk.bridges.iter().filter_map(|bridge| self.across_a_bridge(walk, bridge)));
            if walk.end != End::Unknown {
                faults.extend(walk.expected.iter().take(1).map(|expected| Fault::ChainShorter {
                    writer: walk.writer,
                    by: expected.by.clone(),
                    count: expected.count,
                    found: walk.count,
                }));
            }
        }
        faults.extend(self.deleted(verdict));
        // Whole chains that somebody remembers and nobody has.
        for (writer, expected) in std::mem::take(&mut self.expected) {
            self.before.entry(writer).or_default().extend(expected);
        }
        for (writer, expected) in &self.before {
            let mut judged = expected.iter().map(|expected| self.in_deleted(*writer, expected));
            match judged.find(|deleted| !matches!(deleted, Deleted::AsSaid)) {
                Some(Deleted::No(fault)) => faults.push(fault),
                Some(Deleted::LongAgo) => verdict.gaps.push(Gap::LongAgo { writer: *writer }),
                Some(Deleted::AsSaid) | None => {}
            }
        }
        faults.extend(self.adoptions());
        verdict.problems.extend(faults.into_iter().map(|fault| Problem { spot: None, fault }));
        for walk in self.walks.values_mut() {
            if walk.end == End::Open && self.adopted.iter().any(|adopted| adopted.writer == walk.writer) {
                walk.end = End::Adopted;
            }
            gaps_of(walk, &mut verdict.gaps);
            verdict.chains.push(walk.report());
        }
    }

    /// Whether tombstones fill the gap before a segment.
    fn across_a_bridge(&self, walk: &Walk, bridge: &Bridge) -> Option<Fault> {
        // An empty file has nothing to continue.
        if !walk.read.iter().any(|extent| extent.segment == bridge.segment) {
            return None;
        }
        let (writer, segment) = (walk.writer, bridge.segment);
        let lines = bridge.count.saturating_sub(bridge.after.map_or(0, |(_, count, _)| count));
        let missing = Fault::Missing { writer, segment, lines };
        let Some(last) = self.tombstones.get(&(writer, segment - 1)) else { return Some(missing) };
        if last.head != bridge.head.to_string() || last.count_before + last.count != bridge.count {
            let by = By::Tombstone { of: last.by };
            return Some(Fault::ChainOther { writer, by, count: bridge.count });
        }
        let (after, count, head) = bridge.after?;
        let Some(first) = self.tombstones.get(&(writer, after + 1)) else { return Some(missing) };
        let continues = first.count_before == count && first.first_previous == head.to_string();
        (!continues).then_some(missing)
    }

    /// Tombstones among themselves, and of segments that are still there.
    fn deleted(&self, verdict: &mut Verdict) -> Vec<Fault> {
        let mut faults = Vec::new();
        let mut gaps: BTreeMap<WriterName, (u32, u64)> = BTreeMap::new();
        for ((writer, segment), tombstone) in &self.tombstones {
            let by = || By::Tombstone { of: tombstone.by };
            let through = tombstone.count_before + tombstone.count;
            let other = || Fault::ChainOther { writer: *writer, by: by(), count: through };
            if let Some(next) = self.tombstones.get(&(*writer, segment + 1))
                && (next.first_previous != tombstone.head || next.count_before != through)
            {
                faults.push(Fault::Contradiction { writer: *writer, what: "tombstones" });
            }
            let walk = self.walks.get(writer);
            let read = walk.and_then(|walk| walk.read.iter().find(|extent| extent.segment == *segment));
            match (read, walk) {
                (_, Some(walk)) if walk.end == End::Unknown => {}
                (Some(extent), _) => {
                    let same = extent.first_previous.to_string() == tombstone.first_previous
                        && extent.head.to_string() == tombstone.head
                        && (extent.count_before, extent.count) == (tombstone.count_before, tombstone.count);
                    match same {
                        true => verdict.gaps.push(Gap::StillThere {
                            segment: SegmentName { writer: *writer, number: *segment }.to_string(),
                        }),
                        false => faults.push(other()),
                    }
                }
                (None, _) => {
                    let gap = gaps.entry(*writer).or_default();
                    *gap = (gap.0 + 1, gap.1.max(through));
                }
            }
        }
        let gaps = gaps.into_iter();
        verdict.gaps.extend(gaps.map(|(writer, (segments, lines))| Gap::Deleted { writer, segments, lines }));
        faults
    }

    /// What somebody remembers of a line that is not there any more: retention must have deleted it.
    fn in_deleted(&self, writer: WriterName, expected: &Expected) -> Deleted {
        let fault = |other: bool| {
            let (by, count) = (expected.by.clone(), expected.count);
            Deleted::No(if other {
                Fault::ChainOther { writer, by, count }
            } else {
                Fault::ChainGone { writer, by, count }
            })
        };
        let mut covered = expected.count == 0 || expected.hash == GENESIS;
        for (_, tombstone) in self.tombstones.range((writer, 0)..=(writer, u32::MAX)) {
            let through = tombstone.count_before + tombstone.count;
            covered |= expected.count <= through;
            if through == expected.count && tombstone.head != expected.hash {
                return fault(true);
            }
        }
        // Tombstones stand in segments that are deleted one day too. The oldest goes first, so what is older than a segment that
        // was deleted went before it.
        let horizon = self.tombstones.values().map(|tombstone| &tombstone.to).max();
        match &expected.at {
            _ if covered => Deleted::AsSaid,
            Some(at) if horizon.is_some_and(|horizon| at <= horizon) => Deleted::LongAgo,
            _ => fault(false),
        }
    }

    fn adoptions(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        for (place, adopted) in self.adopted.iter().enumerate() {
            let by = || By::Adoption { of: adopted.by };
            let writer = || adopted.writer;
            let before = &self.adopted[..place];
            if let Some(other) = before.iter().find(|other| other.writer == adopted.writer) {
                if (other.segment, other.count, &other.head) != (adopted.segment, adopted.count, &adopted.head) {
                    faults.push(Fault::Contradiction { writer: writer(), what: "adoptions" });
                }
                continue;
            }
            let Some(walk) = self.walks.get(&adopted.writer) else {
                let expected = Expected { count: adopted.count, hash: adopted.head.clone(), by: by(), at: None };
                if let Deleted::No(fault) = self.in_deleted(adopted.writer, &expected) {
                    faults.push(fault);
                }
                continue;
            };
            if walk.end == End::Unknown {
                continue;
            }
            if walk.count != adopted.count || walk.torn_since + walk.torn_bytes != adopted.torn_bytes {
                faults.push(Fault::GrewAfterAdoption { writer: writer(), count: adopted.count, found: walk.count });
            } else if walk.head.to_string() != adopted.head {
                faults.push(Fault::ChainOther { writer: writer(), by: by(), count: adopted.count });
            } else {
                faults.extend(self.open_requests_of(walk));
            }
        }
        // Finals for chains that nobody adopted cannot be: `adopted` comes first.
        faults
    }

    /// Whether the requests that a dead chain left open, and no others, were ended by those who adopted it.
    fn open_requests_of(&self, dead: &Walk) -> Vec<Fault> {
        let mut faults = Vec::new();
        let none = HashMap::new();
        let crashed = self.crashed.get(&dead.writer).unwrap_or(&none);
        let ended = crashed.keys().filter(|exchange| dead.requests.is_open(**exchange)).count();
        if ended < crashed.len() && !dead.requests.begins_later {
            // The first in the order of ids, so that the same log is always judged in the same words.
            let strange = crashed.iter().filter(|(exchange, _)| !dead.requests.is_open(**exchange)).map(|(_, id)| id);
            faults.extend(strange.min().map(|id| Fault::NotAdopted { request_id: id.clone() }));
        }
        let left = dead.requests.open() - ended as u64;
        // Whoever died while adopting leaves the rest to the next.
        let unfinished = self.walks.values().any(|walk| {
            let adopting = walk.adopting.as_ref().is_some_and(|(writer, left)| *writer == dead.writer && *left > 0);
            adopting && walk.end != End::Stopped
        });
        if left > 0 && !unfinished {
            faults.push(Fault::AdoptedLeftOpen { writer: dead.writer, requests: left });
        }
        faults
    }
}

impl Tombstone {
    fn says_the_same(&self, other: &Tombstone) -> bool {
        (&self.first_previous, &self.head, self.count_before, self.count)
            == (&other.first_previous, &other.head, other.count_before, other.count)
    }
}

fn gaps_of(walk: &Walk, gaps: &mut Vec<Gap>) {
    let (writer, open_requests) = (walk.writer, walk.requests.open());
    match walk.end {
        End::Unknown => return,
        End::Running => gaps.push(Gap::Running { writer, open_requests }),
        End::Open => gaps.push(Gap::Open { writer, open_requests, torn_bytes: walk.torn_bytes }),
        End::Stopped | End::Adopted => {}
    }
    let unsigned = walk.count - walk.signed_through.min(walk.count);
    // A chain that was stopped has its close behind its last checkpoint; an adopted one is held by the chain that adopted it.
    let covered = walk.end == End::Adopted || (walk.end == End::Stopped && unsigned <= 1);
    if unsigned > 0 && !covered {
        gaps.push(Gap::Unsigned { writer: walk.writer, lines: unsigned });
    }
    for (segment, bytes) in &walk.torn_within {
        gaps.push(Gap::TornWithin {
            segment: SegmentName { writer: walk.writer, number: *segment }.to_string(),
            bytes: *bytes,
        });
    }
    if walk.requests.begun_before > 0 {
        gaps.push(Gap::BegunBefore { writer: walk.writer, requests: walk.requests.begun_before });
    }
}
