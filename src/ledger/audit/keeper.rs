//! What takes time and must not delay a record, on a thread of its own: copies of checkpoints in a second place, which may be a disk
//! that hangs, and retention.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::retain::Retention;
use super::{Metrics, Shared};

/// Checkpoints that may wait for the second place. Each covers all before it, so past this the oldest is left out.
const WAITING: usize = 64;

/// How often the thread looks whether it is still needed.
const IDLE: Duration = Duration::from_secs(1);

/// How often segments are looked at for their age; for their size, after each new segment too.
const RETAIN_EVERY: Duration = Duration::from_secs(60);

/// How often the file system is asked for its room.
const ROOM_EVERY: Duration = Duration::from_secs(5);

pub(super) struct Keeper {
    checkpoint_file: Option<PathBuf>,
    metrics: Arc<Metrics>,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    checkpoints: VecDeque<Vec<u8>>,
    look: bool,
    busy: bool,
}

impl Keeper {
    pub(super) fn new(checkpoint_file: Option<PathBuf>, metrics: Arc<Metrics>) -> Arc<Keeper> {
        Arc::new(Keeper { checkpoint_file, metrics, waiting: Mutex::default(), changed: Condvar::new() })
    }

    pub(super) fn start(keeper: &Arc<Keeper>, shared: Weak<Shared>, retention: Retention) -> io::Result<()> {
        let keeper = Arc::downgrade(keeper);
        let run = move || run(&keeper, &shared, &retention);
        std::thread::Builder::new().name("audit-keeper".to_owned()).spawn(run).map(drop)
    }

    /// A checkpoint's line, newline included, for the second place. Never waits.
    pub(super) fn second_place(&self, line: &[u8]) {
        if self.checkpoint_file.is_none() {
            return;
        }
        let mut waiting = self.waiting.lock();
        if waiting.checkpoints.len() == WAITING {
            waiting.checkpoints.pop_front();
            self.metrics.audit_checkpoint_copy_failed();
        }
        waiting.checkpoints.push_back(line.to_vec());
        drop(waiting);
        self.changed.notify_all();
    }

    /// There is a new segment: an old one may be too much.
    pub(super) fn look(&self) {
        self.waiting.lock().look = true;
        self.changed.notify_all();
    }

    /// Waits until the second place has every checkpoint. `false`: not by the deadline.
    pub(super) fn drained(&self, deadline: Instant) -> bool {
        let mut waiting = self.waiting.lock();
        while waiting.busy || !waiting.checkpoints.is_empty() {
            if self.changed.wait_until(&mut waiting, deadline).timed_out() {
                return !waiting.busy && waiting.checkpoints.is_empty();
            }
        }
        true
    }

    fn copy(&self, path: &Path, lines: impl Iterator<Item = Vec<u8>>, failing: &mut bool) {
        let lines: Vec<u8> = lines.flatten().collect();
        let result = append(path, &lines);
        if let Err(error) = &result {
            self.metrics.audit_checkpoint_copy_failed();
            if !*failing {
                log::error!("audit: cannot copy checkpoints to {}: {error}", path.display());
            }
        } else if *failing {
            log::info!("audit: {} takes checkpoints again", path.display());
        }
        *failing = result.is_err();
    }
}

/// Opened anew each time: the second place may be unmounted, rotated and mounted again.
fn append(path: &Path, lines: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
    file.write_all(lines)?;
    file.sync_data()
}

/// What this process may still write there: a file system may keep some for root.
pub fn free_bytes(dir: &Path) -> io::Result<u64> {
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: zeroed, it is a valid statvfs of nothing; the path ends with a zero byte, and both live for the whole call.
    let (asked, about) = unsafe {
        let mut about: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut about), about)
    };
    if asked == 0 { Ok(about.f_bavail.saturating_mul(about.f_frsize)) } else { Err(io::Error::last_os_error()) }
}

fn run(keeper: &Weak<Keeper>, shared: &Weak<Shared>, retention: &Retention) {
    let mut looked: Option<Instant> = None;
    let mut room_asked: Option<Instant> = None;
    let mut failing = false;
    loop {
        let Some(keeper) = keeper.upgrade() else { return };
        let mut waiting = keeper.waiting.lock();
        if waiting.checkpoints.is_empty() && !waiting.look {
            keeper.changed.wait_for(&mut waiting, IDLE);
        }
        let checkpoints = std::mem::take(&mut waiting.checkpoints);
        let look = std::mem::take(&mut waiting.look) || looked.is_none_or(|at| at.elapsed() >= RETAIN_EVERY);
        waiting.busy = !checkpoints.is_empty();
        drop(waiting);
        if let Some(path) = keeper.checkpoint_file.as_deref().filter(|_| !checkpoints.is_empty()) {
            keeper.copy(path, checkpoints.into_iter(), &mut failing);
        }
        keeper.waiting.lock().busy = false;
        keeper.changed.notify_all();
        if room_asked.is_none_or(|at| at.elapsed() >= ROOM_EVERY) {
            room_asked = Some(Instant::now());
            if let Ok(bytes) = free_bytes(&retention.dir) {
                keeper.metrics.audit_free_bytes(bytes);
            }
        }
        if look && retention.is_set() {
            looked = Some(Instant::now());
            let Some(shared) = shared.upgrade() else { return };
            match retention.run(&shared) {
                Ok(false) => {}
                Ok(true) => keeper.look(),
                Err(error) => log::error!("audit: retention: {error}"),
            }
        }
    }
}
