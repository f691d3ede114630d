//! This writer's own chain on disk: segments that are opened, appended to, synced, rotated and closed by the audit's thread alone.
//!
//! - *No torn line*: what a short write left of a line is cut off again. Where that is impossible nothing more is written to that
//!   segment, and the chain goes on in the next one.
//! - *After a failed fsync* the kernel may have dropped what it could not write and say so only once (fsync(2)): the segment is closed
//!   and never written or synced again; the next one says which line it follows, so that a loss shows.
//! - *A segment that could not be opened whole* (its first line written, and synced where the configuration asks for it) is removed
//!   again: nobody has relied on it, and a disk that fails for hours does not fill a folder with stumps.
//! - The old segment's lock is let go only when the next one is locked, so that no other process takes us for dead in between.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::keeper::Keeper;
use super::key::AuditKey;
use super::lock;
use super::sink::{Appended, write_all};
use super::{AuditSettings, Durability, Metrics};
use crate::ledger::chain::mark::{ChainHead, CloseReason};
use crate::ledger::chain::{self, Head, Mark, SegmentName, WriterName};
use crate::ledger::record::{Id, Moment};

/// fsync(2), or in tests one that fails.
pub(super) type Sync = fn(&File) -> io::Result<()>;

pub(super) struct Journal {
    dir: PathBuf,
    durability: Durability,
    fsync_within: Duration,
    rotate_bytes: u64,
    rotate_age: Duration,
    checkpoint_every: Duration,
    sync_file: Sync,
    key: Arc<AuditKey>,
    keeper: Arc<Keeper>,
    metrics: Arc<Metrics>,

    writer: WriterName,
    /// The number of the last segment that was opened.
    number: u32,
    /// The last line of the chain, and how many lines there are.
    head: Head,
    count: u64,
    /// For the first segment's first line.
    heads: Vec<ChainHead>,
    /// `None`: the next append opens one.
    segment: Option<Segment>,
    /// The segment before, until the next one is locked.
    held: Option<File>,
    /// When the first line was written that is not synced.
    unsynced: Option<Instant>,
    /// When the last checkpoint was written, and how many lines there were with it.
    checkpointed: (Instant, u64),
    /// What the last append sealed; of that, what was written as whole lines.
    sealed: Vec<u8>,
    whole: usize,
    /// What the last mark was, as a line.
    marked: Vec<u8>,
}

struct Segment {
    path: PathBuf,
    file: File,
    opened: Instant,
    bytes: u64,
    /// Lines of the chain up to and with its first one.
    first: u64,
}

impl Journal {
    pub(super) fn new(
        settings: &AuditSettings,
        dir: &Path,
        heads: Vec<ChainHead>,
        key: Arc<AuditKey>,
        keeper: Arc<Keeper>,
        metrics: Arc<Metrics>,
    ) -> Journal {
        let now_s = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs() as i64);
        Journal {
            dir: dir.to_owned(),
            durability: settings.durability,
            fsync_within: settings.fsync_within,
            rotate_bytes: settings.rotate_bytes,
            rotate_age: settings.rotate_age,
            checkpoint_every: settings.checkpoint_every,
            sync_file: settings.sync_file,
            key,
            keeper,
            metrics,
            writer: WriterName::new(now_s, rand::random()),
            number: 0,
            head: Head::Genesis,
            count: 0,
            heads,
            segment: None,
            held: None,
            unsynced: None,
            checkpointed: (Instant::now(), 0),
            sealed: Vec::new(),
            whole: 0,
            marked: Vec::new(),
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.dir
    }

    pub(super) fn writer(&self) -> WriterName {
        self.writer
    }

    /// The text of the lines that the last append wrote.
    pub(super) fn lines(&self) -> &[u8] {
        &self.sealed[..self.whole]
    }

    pub(super) fn append(&mut self, events: &[&[u8]], durably: bool) -> Appended {
        if let Err(error) = self.ready() {
            return Appended { lines: 0, result: Err(error) };
        }
        let (lines, result) = self.put(events);
        if lines > 0 {
            self.unsynced.get_or_insert_with(Instant::now);
        }
        let result = if durably && lines > 0 { self.sync().and(result) } else { result };
        Appended { lines, result }
    }

    pub(super) fn sync_due(&self) -> Option<Instant> {
        let since = self.unsynced.filter(|_| self.durability != Durability::Write)?;
        Some(since + self.fsync_within)
    }

    /// Puts what was written on the disk. Where that fails, the segment is given up.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.sync_segment().inspect_err(|_| self.give_up(CloseReason::Failed))
    }

    fn sync_segment(&mut self) -> io::Result<()> {
        let Some(segment) = &self.segment else { return Ok(()) };
        self.unsynced = None;
        let began = Instant::now();
        let result = (self.sync_file)(&segment.file);
        self.metrics.audit_synced(began.elapsed(), result.is_err());
        result
    }

    pub(super) fn tick(&mut self) -> io::Result<()> {
        if let Some(segment) = &self.segment {
            let (there, open) = (fs::metadata(&segment.path).ok(), segment.file.metadata()?);
            if there.is_none_or(|there| (there.dev(), there.ino()) != (open.dev(), open.ino())) {
                log::warn!("audit: {} was renamed or removed; the next segment is opened", segment.path.display());
                self.give_up(CloseReason::Renamed);
            } else if open.len() < segment.bytes {
                log::error!("audit: {} was cut from outside; the next segment is opened", segment.path.display());
                self.give_up(CloseReason::Failed);
            }
        }
        self.ready()?;
        let aged = |segment: &Segment| segment.opened.elapsed() >= self.rotate_age && self.count > segment.first;
        if self.segment.as_ref().is_some_and(aged) {
            self.rotate()?;
        }
        if self.checkpointed.0.elapsed() >= self.checkpoint_every {
            self.checkpoint()?;
        }
        Ok(())
    }

    /// The end, in order: a last checkpoint and a close, on the disk.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        self.checkpoint()?;
        self.close(CloseReason::Stopped)?;
        let synced = self.sync_segment();
        self.segment = None;
        synced
    }

    /// Writes a signed checkpoint, unless nothing was written since the last one. A copy goes to the second place.
    pub(super) fn checkpoint(&mut self) -> io::Result<()> {
        let Some(_) = self.segment.as_ref().filter(|_| self.count > self.checkpointed.1) else { return Ok(()) };
        let at = Moment::now();
        let (writer, segment, count, head) = (self.writer, self.number, self.count, self.head.to_string());
        let key_id = self.key.id().to_owned();
        let unsigned = Mark::Checkpoint {
            writer,
            segment,
            count,
            head: head.clone(),
            key_id: key_id.clone(),
            signature: String::new(),
        };
        let signature = self.key.sign(&unsigned.payload(&at.to_string()).unwrap_or_default());
        self.mark_at(&Mark::Checkpoint { writer, segment, count, head, key_id, signature }, at)?;
        self.keeper.second_place(&self.marked);
        self.checkpointed = (Instant::now(), self.count);
        self.metrics.audit_checkpoint();
        Ok(())
    }

    /// Writes one mark.
    pub(super) fn mark(&mut self, mark: &Mark) -> io::Result<()> {
        self.mark_at(mark, Moment::now())
    }

    fn mark_at(&mut self, mark: &Mark, at: Moment) -> io::Result<()> {
        let event = mark.event(Id::new(at, rand::random()), at);
        // A mark may follow the lines of an append before those were shown to anybody.
        let shown = self.whole;
        std::mem::swap(&mut self.sealed, &mut self.marked);
        let (lines, result) = self.put(&[&event]);
        std::mem::swap(&mut self.sealed, &mut self.marked);
        self.whole = shown;
        if lines > 0 {
            self.unsynced.get_or_insert_with(Instant::now);
        }
        result
    }

    /// Makes sure that there is a segment with room.
    pub(super) fn ready(&mut self) -> io::Result<()> {
        match &self.segment {
            Some(segment) if segment.bytes >= self.rotate_bytes && self.count > segment.first => self.rotate(),
            Some(_) => Ok(()),
            None => self.open(),
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.checkpoint()?;
        self.close(CloseReason::Rotated)?;
        let synced = if self.durability == Durability::Write { Ok(()) } else { self.sync_segment() };
        self.let_go();
        synced.and_then(|()| self.open())
    }

    fn close(&mut self, reason: CloseReason) -> io::Result<()> {
        let (writer, segment, count, head) = (self.writer, self.number, self.count, self.head.to_string());
        self.mark(&Mark::SegmentClose { writer, segment, count, head, reason })
    }

    /// Nothing more is written to this segment but, if it takes them, its last words.
    fn give_up(&mut self, reason: CloseReason) {
        // Best effort: whether they are there is seen by whoever reads.
        let _ = self.checkpoint().and_then(|()| self.close(reason));
        self.let_go();
    }

    fn let_go(&mut self) {
        if let Some(segment) = self.segment.take() {
            self.held = Some(segment.file);
        }
        self.unsynced = None;
    }

    fn open(&mut self) -> io::Result<()> {
        let (head, count) = (self.head, self.count);
        let result = self.try_open();
        if let Err(error) = &result
            && let Some(segment) = self.segment.take()
        {
            log::debug!("audit: {} could not be begun: {error}", segment.path.display());
            let _ = fs::remove_file(&segment.path); // it holds no record
            (self.head, self.count) = (head, count);
            self.number -= 1;
        }
        result
    }

    fn try_open(&mut self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o750).create(&self.dir)?;
        if self.number == SegmentName::LAST {
            return Err(io::Error::other("the numbers of segments are used up; restart the proxy"));
        }
        let name = SegmentName { writer: self.writer, number: self.number + 1 };
        let path = self.dir.join(name.to_string());
        let file = match OpenOptions::new().read(true).append(true).create_new(true).mode(0o640).open(&path) {
            Ok(file) => file,
            Err(error) => {
                if error.kind() == io::ErrorKind::AlreadyExists {
                    self.number += 1; // whoever made it: it is not ours
                }
                return Err(error);
            }
        };
        self.number += 1;
        let locked = lock::lock_new(&file);
        self.segment = Some(Segment { path, file, opened: Instant::now(), bytes: 0, first: self.count + 1 });
        if !locked? {
            return Err(io::Error::other("the new segment is locked by another process"));
        }
        let heads = self.heads.clone();
        self.mark(&Mark::segment_open(self.writer, name.number, self.count, heads, self.key.id()))?;
        if self.durability != Durability::Write {
            self.sync_segment()?;
            File::open(&self.dir)?.sync_all()?; // or a loss of power takes the name
        }
        self.heads.clear();
        self.held = None;
        self.metrics.audit_segment_opened();
        self.keeper.look();
        Ok(())
    }

    /// Appends events as lines: how many are in the file whole, and what stopped the next one.
    fn put(&mut self, events: &[&[u8]]) -> (usize, io::Result<()>) {
        self.sealed.clear();
        self.whole = 0;
        let Some(segment) = &mut self.segment else { return (0, Err(io::ErrorKind::NotFound.into())) };
        let mut head = self.head;
        let mut ends = Vec::with_capacity(events.len());
        for event in events {
            head = chain::seal(event, head, &mut self.sealed);
            ends.push((self.sealed.len(), head));
        }
        let (written, result) = write_all(&mut segment.file, &self.sealed);
        let lines = ends.partition_point(|(end, _)| *end <= written);
        if let Some((end, head)) = ends[..lines].last() {
            self.whole = *end;
            self.head = *head;
            self.count += lines as u64;
            segment.bytes += *end as u64;
        }
        let torn = (written - self.whole) as u64;
        if torn > 0 && !cut(&mut segment.file, torn).unwrap_or(false) {
            log::error!("audit: {} keeps a torn line; the next segment is opened", segment.path.display());
            self.let_go();
        }
        (lines, result)
    }
}

/// Takes back the last `torn_bytes`, only where they are the file's last ones and ours: in append mode the position is the end of what
/// this handle wrote (open(2)).
fn cut(file: &mut File, torn_bytes: u64) -> io::Result<bool> {
    let (end, about) = (file.stream_position()?, file.metadata()?);
    if !about.is_file() || about.len() != end || end < torn_bytes {
        return Ok(false);
    }
    file.set_len(end - torn_bytes)?;
    Ok(true)
}
