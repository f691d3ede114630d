//! Retention: old segments are deleted, and a signed tombstone says which.
//!
//! Never the segment that its writer has open, never the end of a chain that was neither stopped nor taken over, and a tombstone is on
//! the disk before its segment is gone. (A process killed in between leaves both; the next look writes the tombstone again.) Oldest
//! first, by the time of a segment's last line and whoever wrote it: so what is left of a chain is its end, and what is older than a
//! segment that was deleted is gone as well, which is all that remains to be said once tombstones are deleted themselves.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::oneshot::error::TryRecvError;

use super::key::AuditKey;
use super::lock::{self, FolderLock};
use super::survey::{self, Tail};
use super::{Metrics, Shared};
use crate::ledger::chain::mark::{CloseReason, TombstoneReason};
use crate::ledger::chain::{self, Mark, SegmentName, WriterName};
use crate::ledger::record::{Id, Moment};
use crate::ledger::trail::segment::{Found, SegmentReader};

/// For the folder's lock, and for a tombstone to be written: the next look is soon enough.
const PATIENCE: Duration = Duration::from_secs(5);

/// Segments that are deleted before the folder's lock is let go: each takes an fsync.
const AT_ONCE: usize = 16;

pub(super) struct Retention {
    pub dir: PathBuf,
    /// Zero: for ever.
    pub keep: Duration,
    /// Zero: without a bound.
    pub keep_bytes: u64,
    pub key: Arc<AuditKey>,
    pub metrics: Arc<Metrics>,
    pub own: WriterName,
    /// Chains of dead processes that were taken over, and by whom.
    pub adopted: BTreeMap<WriterName, WriterName>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Segment {
    name: SegmentName,
    path: PathBuf,
    bytes: u64,
    may_go: bool,
}

impl Retention {
    pub(super) fn is_set(&self) -> bool {
        !self.keep.is_zero() || self.keep_bytes > 0
    }

    /// Deletes what is too old or too much. `true`: there is more, and others may have the folder first.
    pub(super) fn run(&self, shared: &Shared) -> io::Result<bool> {
        let Some(_lock) = FolderLock::take(&self.dir, PATIENCE)? else {
            log::warn!("audit: retention waits for another process in {}", self.dir.display());
            return Ok(false);
        };
        let mut deleted = 0;
        let mut chains = self.chains()?;
        let mut bytes: u64 = chains.values().flatten().map(|segment| segment.bytes).sum();
        let mut left: BTreeMap<WriterName, usize> = chains.iter().map(|(writer, of)| (*writer, of.len())).collect();
        let mut oldest = BinaryHeap::new();
        for of in chains.values_mut() {
            oldest.extend(next(of)?);
        }
        while let Some(Reverse((to, segment))) = oldest.pop() {
            let SegmentName { writer, number } = segment.name;
            // Its first lines say that another chain was taken over, and that chain is still there.
            let adopter = self.adopted.iter().any(|(dead, by)| *by == writer && left.get(dead).is_some_and(|n| *n > 0));
            let too_much = self.keep_bytes > 0 && bytes > self.keep_bytes;
            if number == 1 && adopter {
                // It waits for that chain.
            } else if too_much || self.is_old(to) {
                let reason = if too_much { TombstoneReason::Size } else { TombstoneReason::Age };
                if !self.delete(&segment, reason, shared)? {
                    return Ok(false);
                }
                deleted += 1;
                if deleted == AT_ONCE {
                    return Ok(true);
                }
                bytes -= segment.bytes;
                left.entry(writer).and_modify(|n| *n -= 1);
            } else if to.is_some() {
                break; // all others are younger
            }
            if let Some(of) = chains.get_mut(&writer) {
                oldest.extend(next(of)?);
            }
        }
        self.metrics.audit_bytes(bytes);
        Ok(false)
    }

    fn chains(&self) -> io::Result<BTreeMap<WriterName, VecDeque<Segment>>> {
        let mut chains: BTreeMap<WriterName, VecDeque<Segment>> = BTreeMap::new();
        for (writer, numbers) in survey::segments(&self.dir)? {
            let last = numbers.last().copied().unwrap_or_default();
            let last_path = survey::path(&self.dir, writer, last);
            let alive = writer == self.own || lock::is_locked(&last_path)?;
            let over = !alive && (self.adopted.contains_key(&writer) || is_stopped(&last_path)?);
            for number in numbers {
                let path = survey::path(&self.dir, writer, number);
                let Ok(about) = fs::metadata(&path) else { continue };
                // Of a chain that died and was not taken over yet, the open requests are still to be found.
                let may_go = if alive { number < last } else { over };
                let segment = Segment { name: SegmentName { writer, number }, path, bytes: about.len(), may_go };
                chains.entry(writer).or_default().push_back(segment);
            }
        }
        Ok(chains)
    }

    fn is_old(&self, to: Option<jiff::Timestamp>) -> bool {
        // One without a line has nothing that could be missed.
        let age =
            to.map_or(Some(Duration::MAX), |to| Duration::try_from(jiff::Timestamp::now().duration_since(to)).ok());
        !self.keep.is_zero() && age.is_some_and(|age| age > self.keep)
    }

    /// `false`: its tombstone could not be written now.
    fn delete(&self, segment: &Segment, reason: TombstoneReason, shared: &Shared) -> io::Result<bool> {
        match self.tombstone(segment, reason)? {
            Some(event) => {
                if !written(shared, &event) {
                    return Ok(false);
                }
            }
            None if segment.bytes == 0 => {}
            None => {
                log::warn!("audit: {} cannot be read as a segment and is kept", segment.path.display());
                return Ok(true);
            }
        }
        fs::remove_file(&segment.path)?;
        self.metrics.audit_tombstone(segment.bytes);
        log::info!("audit: {} was deleted ({reason:?}), a tombstone says so", segment.path.display());
        Ok(true)
    }

    /// `None`: there is no line in it to speak of.
    fn tombstone(&self, segment: &Segment, reason: TombstoneReason) -> io::Result<Option<Vec<u8>>> {
        let mut reader = SegmentReader::open(&segment.path, 0)?;
        let Found::Line = reader.find()? else { return Ok(None) };
        let (Some(first), Some(tail)) = (chain::open(reader.line()), Tail::read(&segment.path)?) else {
            return Ok(None);
        };
        let (Ok(opening), Some((head, last))) = (serde_json::from_slice::<Value>(&first.event), tail.line) else {
            return Ok(None);
        };
        let Some(Mark::SegmentOpen { count: count_before, .. }) = Mark::of(&opening) else { return Ok(None) };
        let count = match Mark::of(&last) {
            Some(Mark::SegmentClose { count, .. }) => (count + 1).saturating_sub(count_before),
            _ => survey::lines_in(&segment.path, tail.end)?,
        };
        let time = |event: &Value| event["timestamp"].as_str().unwrap_or_default().to_owned();
        let mark = |signature: String| Mark::Tombstone {
            writer: segment.name.writer,
            segment: segment.name.number,
            first_previous_hash: first.previous.to_string(),
            head: head.clone(),
            count_before,
            count,
            from: time(&opening),
            to: time(&last),
            reason,
            key_id: self.key.id().to_owned(),
            signature,
        };
        let at = Moment::now();
        let payload = mark(String::new()).payload(&at.to_string()).unwrap_or_default();
        Ok(Some(mark(self.key.sign(&payload)).event(Id::new(at, rand::random()), at)))
    }
}

/// A segment, and when its last line was written.
type Ended = (Option<jiff::Timestamp>, Segment);

/// The first of a chain's segments, if it may go, with the time of its last line. One without a line comes first.
fn next(of: &mut VecDeque<Segment>) -> io::Result<Option<Reverse<Ended>>> {
    let Some(segment) = of.pop_front().filter(|segment| segment.may_go) else { return Ok(None) };
    let last = Tail::read(&segment.path)?.and_then(|tail| tail.line);
    let to = last.and_then(|(_, event)| event["timestamp"].as_str().and_then(|text| text.parse().ok()));
    Ok(Some(Reverse((to, segment))))
}

fn is_stopped(path: &std::path::Path) -> io::Result<bool> {
    let Some(Tail { line: Some((_, event)), torn_bytes: 0, .. }) = Tail::read(path)? else { return Ok(false) };
    Ok(matches!(Mark::of(&event), Some(Mark::SegmentClose { reason: CloseReason::Stopped, .. })))
}

/// Hands a mark to the thread that owns the files, and waits until it is on the disk.
fn written(shared: &Shared, event: &[u8]) -> bool {
    let Some(mut told) = shared.queue_mark(event) else { return false };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match told.try_recv() {
            Ok(()) => return true,
            Err(TryRecvError::Closed) => return false,
            Err(TryRecvError::Empty) if Instant::now() >= deadline => return false,
            Err(TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
