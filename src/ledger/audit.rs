//! The audit's lines, and the receipts for them.
//!
//! ```text
//! requests ── record_request ──> queue ──> one thread: chain, write(2) in groups, fsync ──> segments (or standard output)
//!     ^            settle ───────> (room is reserved)        │        │   │
//!     └────────────── receipt ───────────────────────────────┘        │   └─ checkpoints ─> a second place; retention, likewise
//!                                                                     └─ copy ─> standard output, on a thread of its own
//! ```
//!
//! - *One thread owns the files.* It takes all that is queued, seals it into the chain, writes it with one call, and answers each request
//!   of the group: after write(2), or after fsync(2) where [`Durability::Strict`] asks for it.
//! - *A receipt is room.* With the `request` record, places for `stream_start` and `final` are reserved in the bounded queue, so those
//!   two never wait and never fail; a receipt dropped without [`Receipt::settle`] leaves its final record by itself.
//! - *Whoever holds no receipt has to call [`Audit::note_final`]*: also after [`Audit::record_request`] failed or was cancelled. A
//!   `request` line without a receipt can then be in the file; its request was not forwarded, and its final record says so.
//! - *While the file cannot be written* (full, read-only, gone, or a write that hangs longer than [`AuditSettings::patience`]), new
//!   requests are refused at once. What was accepted stays in memory, in order, within the bounded room, and is written when the file
//!   takes it again. The thread tries by itself; nobody has to restart anything.
//! - *The chain on disk* is [`journal`]'s: segments, rotation, checkpoints, what a failed fsync means, a file renamed or removed.
//! - *What a process that died left open* is found at the next start ([`survey`]) and recorded as crashed ([`adopt`]).

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::fs::{DirBuilder, File};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use self::echo::Echo;
use self::journal::Journal;
use self::keeper::Keeper;
use self::key::AuditKey;
use self::lock::FolderLock;
use self::retain::Retention;
use self::sink::{Sink, Stream};
use super::fold::{Fold, FoldSettings, Folded, Passage};
use super::record::{Entry, Id, Moment, Record};
use super::{Activity, Metrics, Outcome, Phase};

mod adopt;
mod echo;
mod journal;
mod keeper;
mod key;
mod lock;
mod retain;
mod sink;
mod survey;
mod writer;

pub use self::keeper::free_bytes;
pub use self::key::KeyError;

/// How long a start waits for another process that starts or deletes in the same folder.
const FOLDER_PATIENCE: Duration = Duration::from_secs(30);

/// What a receipt is worth, and what a crash may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// write(2): survives the end of the process, however it ends; a loss of power takes what the kernel had not written.
    Write,
    /// As `Write`, and an fsync within [`AuditSettings::fsync_within`]: a loss of power takes that much. The default, since a receipt
    /// costs no more than with `Write` and the loss is bounded.
    #[default]
    Fsync,
    /// No receipt, and so no byte to a backend, before an fsync. Requests that come together share one.
    Strict,
}

/// Where the audit goes and how much it holds.
#[derive(Clone, Debug)]
pub struct AuditSettings {
    /// Folder of the segments; made with mode 0750 if it is not there, files in it with 0640. `None`: standard output alone, which then
    /// gives the receipts.
    pub dir: Option<PathBuf>,
    /// The key that signs checkpoints and tombstones; made if it is not there. `None`: `audit-key.pem` in `dir`.
    pub key: Option<PathBuf>,
    pub durability: Durability,
    /// With [`Durability::Fsync`]: the longest that a line is written and not on the disk. With `Strict`, for lines that nobody waits for.
    pub fsync_within: Duration,
    /// A segment is closed when it has this many bytes.
    pub rotate_bytes: u64,
    /// A segment with records is closed when it is this old.
    pub rotate_age: Duration,
    /// Between two checkpoints, if something was written.
    pub checkpoint_every: Duration,
    /// Checkpoints are appended to this file as well: on another disk, it tells when the end of a chain was cut off.
    pub checkpoint_file: Option<PathBuf>,
    /// Segments whose last line is older are deleted. Zero: none.
    pub keep: Duration,
    /// While the folder's segments have more bytes, the oldest is deleted. Zero: none.
    pub keep_bytes: u64,
    /// fsync(2). Tests put one here that fails, which no disk does on demand.
    pub sync_file: fn(&File) -> io::Result<()>,
    /// Also to standard output. Beside a file it is secondary: when it is slow, lines are left out and counted.
    pub stdout: bool,
    /// Records that may be queued or reserved; a running exchange has reserved two. 65,536 records of 1 kB are 64 MiB while the disk is
    /// full, and 30,000 running streams.
    pub room_records: usize,
    /// How long a final record may wait to be written together with others. No receipt waits for it. Short, since a process killed in
    /// the meantime leaves the exchange without its final record.
    pub linger: Duration,
    /// A write that takes longer counts as failing: those who wait for it are refused.
    pub patience: Duration,
    /// How often a failing file is tried again.
    pub retry_every: Duration,
    /// When strangers' refusals are counted instead of written.
    pub fold: FoldSettings,
}

impl Default for AuditSettings {
    fn default() -> AuditSettings {
        AuditSettings {
            dir: None,
            key: None,
            durability: Durability::default(),
            fsync_within: Duration::from_secs(1),
            rotate_bytes: 256 << 20,
            rotate_age: Duration::from_secs(24 * 3600),
            checkpoint_every: Duration::from_secs(60),
            checkpoint_file: None,
            keep: Duration::ZERO,
            keep_bytes: 0,
            sync_file: File::sync_data,
            stdout: true,
            room_records: 65_536,
            linger: Duration::from_millis(2),
            patience: Duration::from_secs(5),
            retry_every: Duration::from_millis(250),
            fold: FoldSettings::default(),
        }
    }
}

/// Why the audit did not start.
#[derive(Debug)]
pub enum AuditError {
    /// Neither a file nor standard output is configured.
    NoSink,
    /// The folder, or a file in it, could not be read or made.
    Folder {
        path: PathBuf,
        source: io::Error,
    },
    /// Another process holds the folder's lock.
    Busy(PathBuf),
    /// What another process left could not be taken over.
    Adoption {
        path: PathBuf,
        source: io::Error,
    },
    Key(KeyError),
    Stdout(io::Error),
    Thread(io::Error),
}

impl fmt::Display for AuditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AuditError::NoSink => f.write_str("the audit has neither a file nor standard output to write to"),
            AuditError::Folder { path, source } => {
                write!(f, "cannot write the audit in {}: {source}; free the disk or correct the folder", path.display())
            }
            AuditError::Busy(path) => {
                write!(
                    f,
                    "another process has been starting in {} for too long; end it, or give each its own folder",
                    path.display()
                )
            }
            AuditError::Adoption { path, source } => {
                write!(f, "cannot take over what a process that died left in {}: {source}", path.display())
            }
            AuditError::Key(error) => write!(f, "the audit's key: {error}"),
            AuditError::Stdout(source) => write!(f, "cannot use standard output for the audit: {source}"),
            AuditError::Thread(source) => write!(f, "cannot start the audit's thread: {source}"),
        }
    }
}

impl std::error::Error for AuditError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            AuditError::NoSink | AuditError::Busy(_) | AuditError::Key(_) => None,
            AuditError::Folder { source, .. }
            | AuditError::Adoption { source, .. }
            | AuditError::Stdout(source)
            | AuditError::Thread(source) => Some(source),
        }
    }
}

/// Why a record was not taken. For a client it is always 503 `audit_unavailable`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditUnavailable {
    /// The sink cannot be written now.
    Failing,
    /// All room is taken by what is queued and reserved.
    Full,
    /// [`Audit::close`] was called.
    Closed,
    /// What was asked for did not happen in the time allowed ([`Audit::flush`], [`Audit::close`]).
    Late,
}

impl AuditUnavailable {
    pub fn as_str(self) -> &'static str {
        match self {
            AuditUnavailable::Failing => "the audit cannot be written",
            AuditUnavailable::Full => "the audit has no room",
            AuditUnavailable::Closed => "the audit is closed",
            AuditUnavailable::Late => "the audit was not written in time",
        }
    }
}

/// The handle to the audit's thread.
pub struct Audit {
    shared: Arc<Shared>,
    echo: Option<Arc<Echo>>,
    keeper: Option<Arc<Keeper>>,
}

impl Audit {
    /// Opens the sinks and starts the threads.
    pub fn start(settings: AuditSettings, metrics: Arc<Metrics>) -> Result<Audit, AuditError> {
        let stdout = || io::stdout().as_fd().try_clone_to_owned().map(File::from).map_err(AuditError::Stdout);
        let stream = if settings.stdout { Some(stdout()?) } else { None };
        Audit::start_on(settings, stream, metrics)
    }

    /// `stream` is standard output, or in tests a pipe.
    fn start_on(settings: AuditSettings, stream: Option<File>, metrics: Arc<Metrics>) -> Result<Audit, AuditError> {
        let (sink, echo, kept) = match (&settings.dir, stream) {
            (Some(dir), stream) => {
                let (journal, keeper, retention) = open_folder(&settings, dir, &metrics)?;
                let echo = stream.map(|stream| Echo::start(stream, Arc::clone(&metrics))).transpose();
                (Sink::Journal(Box::new(journal)), echo.map_err(AuditError::Thread)?, Some((keeper, retention)))
            }
            (None, Some(stream)) => (Sink::Stream(Stream::new(stream)), None, None),
            (None, None) => return Err(AuditError::NoSink),
        };
        let shared = Arc::new(Shared {
            fold: Mutex::new(Fold::new(settings.fold)),
            settings,
            metrics,
            activity: Arc::default(),
            started: Instant::now(),
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            writing: Mutex::default(),
        });
        writer::start(Arc::clone(&shared), sink, echo.clone()).map_err(AuditError::Thread)?;
        let mut audit = Audit { shared, echo, keeper: None };
        if let Some((keeper, retention)) = kept {
            Keeper::start(&keeper, Arc::downgrade(&audit.shared), retention).map_err(AuditError::Thread)?;
            audit.keeper = Some(keeper);
        }
        Ok(audit)
    }

    /// Writes a `request` record. The entry is put into words before this returns; the future ends when the line is written, and then
    /// the request may be forwarded.
    pub fn record_request(
        &self,
        entry: &Entry<'_>,
    ) -> impl Future<Output = Result<Receipt, AuditUnavailable>> + Send + use<> {
        let queued = self.shared.queue_request(entry);
        if queued.is_err() {
            self.shared.metrics.audit_unavailable();
        }
        async move {
            let Queued { mut room, line, began, written } = queued?;
            if written.await.is_err() {
                room.shared().metrics.audit_unavailable();
                return Err(AuditUnavailable::Failing);
            }
            Ok(Receipt { shared: room.keep(), line, began, stream_started: AtomicBool::new(false), settled: false })
        }
    }

    /// The one record of a request that ended without a receipt. Never waits. What there is no room for is counted, and a record says
    /// so later; these records take at most half of the room, so that they cannot keep requests out.
    pub fn note_final(&self, outcome: Outcome, entry: &Entry<'_>) -> Result<(), AuditUnavailable> {
        with_line(Phase::Final, Some(outcome), entry, |line| self.shared.queue_loose(line))
    }

    /// The end of a request of somebody unknown: recorded like [`Audit::note_final`] up to a rate per address, counted above it.
    pub fn note_stranger(&self, address: IpAddr, outcome: Outcome, cause: &'static str, entry: &Entry<'_>) {
        let second = self.shared.started.elapsed().as_secs();
        let mut fold = self.shared.fold.lock();
        let due = fold.due(second);
        let passage = fold.note(second, address, cause);
        drop(fold);
        self.shared.write_folded(due);
        match passage {
            // What finds no room is counted there.
            Passage::Single => _ = self.note_final(outcome, entry),
            Passage::Folded => self.shared.metrics.folded_refusal(),
        }
    }

    /// Whether the sink takes records at present. What `/readyz` says.
    pub fn is_writing(&self) -> bool {
        let queue = self.shared.queue.lock();
        !queue.failing && !queue.closing
    }

    /// What was written a moment ago.
    pub fn activity(&self) -> &Arc<Activity> {
        &self.shared.activity
    }

    /// Waits until everything accepted so far is written, `within` at most.
    pub async fn flush(&self, within: Duration) -> Result<(), AuditUnavailable> {
        let (mark, written) = oneshot::channel();
        {
            let mut queue = self.shared.queue.lock();
            if queue.done {
                return Ok(());
            }
            queue.lines.push_back(Line { len_bytes: 0, kind: Kind::Mark(mark) });
            self.shared.wake(&mut queue, true);
        }
        match tokio::time::timeout(within, written).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(AuditUnavailable::Late),
        }
    }

    /// The end: no new request is taken; waits (blocking) until every receipt is settled, everything is written, and the segment is
    /// closed, `within` at most. Settle or cut the running exchanges first.
    pub fn close(&self, within: Duration) -> Result<(), AuditUnavailable> {
        let deadline = Instant::now() + within;
        let mut queue = self.shared.queue.lock();
        queue.closing = true;
        self.shared.wake(&mut queue, true);
        while !queue.ended {
            if self.shared.done.wait_until(&mut queue, deadline).timed_out() && !queue.ended {
                return Err(AuditUnavailable::Late);
            }
        }
        drop(queue);
        if self.keeper.as_ref().is_some_and(|keeper| !keeper.drained(deadline)) {
            return Err(AuditUnavailable::Late);
        }
        match &self.echo {
            Some(echo) if !echo.drained(deadline) => Err(AuditUnavailable::Late),
            _ => Ok(()),
        }
    }
}

/// Reads what others left, takes over what died, and opens our first segment: under the folder's lock, so that of two starts only one
/// takes over.
fn open_folder(
    settings: &AuditSettings,
    dir: &Path,
    metrics: &Arc<Metrics>,
) -> Result<(Journal, Arc<Keeper>, Retention), AuditError> {
    let failed = |source| AuditError::Folder { path: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o750).create(dir).map_err(failed)?;
    let key = settings.key.clone().unwrap_or_else(|| dir.join("audit-key.pem"));
    let key = Arc::new(AuditKey::load_or_create(&key).map_err(AuditError::Key)?);
    let _lock =
        FolderLock::take(dir, FOLDER_PATIENCE).map_err(failed)?.ok_or_else(|| AuditError::Busy(dir.to_owned()))?;
    let mut found = survey::survey(dir).map_err(failed)?;
    let keeper = Keeper::new(settings.checkpoint_file.clone(), Arc::clone(metrics));
    let heads = std::mem::take(&mut found.heads);
    let mut journal = Journal::new(settings, dir, heads, Arc::clone(&key), Arc::clone(&keeper), Arc::clone(metrics));
    journal.ready().map_err(failed)?;
    adopt::adopt(&mut journal, &mut found, metrics)
        .map_err(|source| AuditError::Adoption { path: dir.to_owned(), source })?;
    let retention = Retention {
        dir: dir.to_owned(),
        keep: settings.keep,
        keep_bytes: settings.keep_bytes,
        key,
        metrics: Arc::clone(metrics),
        own: journal.writer(),
        adopted: found.adopted,
    };
    Ok((journal, keeper, retention))
}

impl Drop for Audit {
    /// Without [`Audit::close`] the thread still writes what is left, but nobody waits for it.
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.closing = true;
        self.shared.wake(&mut queue, true);
    }
}

/// The proof that a `request` record is written, and the room for what follows it. Only the audit makes one.
pub struct Receipt {
    shared: Arc<Shared>,
    /// The request's line: what is still known when nobody settles.
    line: Box<[u8]>,
    began: Instant,
    stream_started: AtomicBool,
    settled: bool,
}

impl Receipt {
    /// Since the `request` record was queued.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// Writes the `stream_start` record. Never waits, never fails. A second call does nothing: there is room for one.
    pub fn stream_start(&self, entry: &Entry<'_>) {
        if !self.stream_started.swap(true, Ordering::Relaxed) {
            with_line(Phase::StreamStart, None, entry, |line| self.shared.queue_reserved(line, Kind::StreamStart, 0));
        }
    }

    /// Writes the one final record. Never waits, never fails.
    pub fn settle(mut self, outcome: Outcome, entry: &Entry<'_>) {
        with_line(Phase::Final, Some(outcome), entry, |line| self.finish(line));
    }

    fn finish(&mut self, line: &[u8]) {
        self.settled = true;
        let unused = usize::from(!*self.stream_started.get_mut());
        self.shared.queue_reserved(line, Kind::Final, unused);
    }
}

impl Drop for Receipt {
    /// An exchange that nobody settled (a panic, a task cut off) is on record all the same.
    fn drop(&mut self) {
        const UNSETTLED: &str = "the exchange was dropped without being settled";
        if self.settled {
            return;
        }
        let now = Moment::now();
        let request = std::mem::take(&mut self.line);
        let record = match Record::read(&request) {
            Some(record) => {
                let id = Id::of(now, Phase::Final, record.id.exchange());
                record.into_final(id, now, Outcome::InternalError, UNSETTLED)
            }
            None => {
                let id = Id::of(now, Phase::Final, rand::random());
                let entry = Entry { error: Some(UNSETTLED), ..Entry::default() };
                Record::new(id, now, Phase::Final, Some(Outcome::InternalError), &entry)
            }
        };
        let mut line = Vec::with_capacity(request.len() + 64);
        record.write_event(&mut line);
        self.finish(&line);
    }
}

impl fmt::Debug for Receipt {
    /// Nothing of the record.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receipt")
    }
}

/// What the audit's thread and its callers share.
struct Shared {
    settings: AuditSettings,
    metrics: Arc<Metrics>,
    activity: Arc<Activity>,
    started: Instant,
    fold: Mutex<Fold>,
    queue: Mutex<Queue>,
    /// Something to do for the thread.
    work: Condvar,
    /// The thread has ended.
    done: Condvar,
    /// Locked before `queue` where both are needed.
    writing: Mutex<Writing>,
}

/// Lines accepted and not yet taken by the thread.
#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    lines: VecDeque<Line>,
    /// Records queued, being written, or reserved. At most `room_records`.
    used: usize,
    /// Of `used`: final records without a receipt.
    loose: usize,
    /// Receipts not yet settled, and requests waiting for theirs.
    open: usize,
    /// Final records that found no room and were not yet told of.
    lost: u64,
    failing: bool,
    closing: bool,
    /// Nothing more is taken.
    done: bool,
    /// The thread has ended.
    ended: bool,
    /// Somebody waits for what is queued.
    urgent: bool,
    /// The thread waits for anything at all; otherwise it comes by itself, in `linger` at most.
    asleep: bool,
}

/// Lines that the thread has taken and not yet written.
#[derive(Default)]
struct Writing {
    /// When the write now running began.
    since: Option<Instant>,
    lines: VecDeque<Line>,
}

struct Line {
    len_bytes: usize,
    kind: Kind,
}

enum Kind {
    /// Who waits for it; `None` when they were told that it failed.
    Request(Option<oneshot::Sender<()>>),
    StreamStart,
    Final,
    /// A final record without a receipt.
    Loose,
    /// Not a record: somebody wants to know when all before it is written, or (where it has bytes) a mark of the chain, which is on the
    /// disk then.
    Mark(oneshot::Sender<()>),
}

impl Kind {
    fn phase(&self) -> Option<Phase> {
        match self {
            Kind::Request(_) => Some(Phase::Request),
            Kind::StreamStart => Some(Phase::StreamStart),
            Kind::Final | Kind::Loose => Some(Phase::Final),
            Kind::Mark(_) => None,
        }
    }
}

/// A `request` record on its way.
struct Queued {
    room: Room,
    line: Box<[u8]>,
    began: Instant,
    written: oneshot::Receiver<()>,
}

/// The places reserved for the two later records, until a receipt takes them over.
struct Room(Option<Arc<Shared>>);

impl Room {
    fn shared(&self) -> &Shared {
        self.0.as_ref().expect("a room is kept once, by value")
    }

    fn keep(&mut self) -> Arc<Shared> {
        self.0.take().expect("a room is kept once, by value")
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            let mut queue = shared.queue.lock();
            queue.used -= 2;
            queue.open -= 1;
        }
    }
}

impl Shared {
    fn queue_request(self: &Arc<Shared>, entry: &Entry<'_>) -> Result<Queued, AuditUnavailable> {
        self.takes_requests(&self.queue.lock())?;
        with_line(Phase::Request, None, entry, |line| {
            let (receipt, written) = oneshot::channel();
            let kept = Box::from(line);
            let mut queue = self.queue.lock();
            self.takes_requests(&queue)?;
            queue.used += 3;
            queue.open += 1;
            queue.push(line, Kind::Request(Some(receipt)));
            self.wake(&mut queue, true);
            Ok(Queued { room: Room(Some(Arc::clone(self))), line: kept, began: Instant::now(), written })
        })
    }

    fn takes_requests(&self, queue: &Queue) -> Result<(), AuditUnavailable> {
        if queue.closing {
            Err(AuditUnavailable::Closed)
        } else if queue.failing {
            Err(AuditUnavailable::Failing)
        } else if queue.used + 3 > self.settings.room_records {
            Err(AuditUnavailable::Full)
        } else {
            Ok(())
        }
    }

    /// Into a reserved place; `unused` more are given back.
    fn queue_reserved(&self, line: &[u8], kind: Kind, unused: usize) {
        let mut queue = self.queue.lock();
        queue.used -= unused;
        if matches!(kind, Kind::Final) {
            queue.open -= 1;
        }
        queue.push(line, kind);
        self.wake(&mut queue, false);
    }

    fn queue_loose(&self, line: &[u8]) -> Result<(), AuditUnavailable> {
        let mut queue = self.queue.lock();
        let refused = if queue.done {
            AuditUnavailable::Closed
        } else if queue.used >= self.settings.room_records || queue.loose >= self.settings.room_records / 2 {
            AuditUnavailable::Full
        } else {
            queue.used += 1;
            queue.loose += 1;
            queue.push(line, Kind::Loose);
            self.wake(&mut queue, false);
            return Ok(());
        };
        queue.lost += 1;
        drop(queue);
        self.metrics.audit_dropped("file", 1);
        Err(refused)
    }

    /// A mark of the chain. `None`: the audit has ended.
    fn queue_mark(&self, event: &[u8]) -> Option<oneshot::Receiver<()>> {
        let (mark, written) = oneshot::channel();
        let mut queue = self.queue.lock();
        if queue.done {
            return None;
        }
        queue.push(event, Kind::Mark(mark));
        self.wake(&mut queue, true);
        Some(written)
    }

    /// One record for the refusals of one address in one second.
    fn write_folded(&self, due: Vec<Folded>) {
        for folded in due {
            let summary = folded.summary();
            let entry = Entry {
                source_ip: folded.address,
                policy_result: Some("deny"),
                error: Some(&summary),
                ..Entry::default()
            };
            // What finds no room is counted there.
            let _ = with_line(Phase::Final, Some(Outcome::Refused), &entry, |line| self.queue_loose(line));
        }
    }

    /// Says in the audit itself how many final records it could not take, once there is room again.
    fn write_lost(&self) {
        let mut queue = self.queue.lock();
        if queue.lost == 0 || queue.failing || queue.used >= self.settings.room_records {
            return;
        }
        let lost = std::mem::take(&mut queue.lost);
        queue.used += 1;
        queue.loose += 1;
        drop(queue);
        let error = format!("{lost} final records were lost: the audit had no room for them");
        let entry = Entry { error: Some(&error), ..Entry::default() };
        with_line(Phase::Final, Some(Outcome::InternalError), &entry, |line| {
            let mut queue = self.queue.lock();
            queue.push(line, Kind::Loose);
            self.wake(&mut queue, false);
        });
    }

    /// Tells the thread. A final record alone wakes it only from deep sleep: otherwise the thread comes soon by itself, and one wake-up
    /// (some microseconds) is saved for each request.
    fn wake(&self, queue: &mut MutexGuard<'_, Queue>, urgent: bool) {
        queue.urgent |= urgent;
        if urgent || queue.asleep {
            queue.asleep = false;
            self.work.notify_one();
        }
    }
}

impl Queue {
    fn push(&mut self, line: &[u8], kind: Kind) {
        self.bytes.extend_from_slice(line);
        self.lines.push_back(Line { len_bytes: line.len(), kind });
    }
}

/// Those who wait for a receipt are told that there is none now; what they queued stays in order.
fn refuse_waiting(lines: &mut VecDeque<Line>) {
    for line in lines {
        if let Kind::Request(receipt) = &mut line.kind {
            *receipt = None;
        }
    }
}

thread_local! {
    /// The line being put into words: the memory is used again for the next one.
    static LINE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

fn with_line<T>(phase: Phase, outcome: Option<Outcome>, entry: &Entry<'_>, then: impl FnOnce(&[u8]) -> T) -> T {
    let now = Moment::now();
    let exchange = if entry.exchange == 0 { rand::random() } else { entry.exchange };
    let id = Id::of(now, phase, exchange);
    // A thread that ends has no such memory any more, but may still drop a receipt.
    let mut line = LINE.try_with(Cell::take).unwrap_or_default();
    line.clear();
    Record::new(id, now, phase, outcome, entry).write_event(&mut line);
    let result = then(&line);
    let _ = LINE.try_with(|kept| kept.set(line));
    result
}

#[cfg(test)]
mod tests;
