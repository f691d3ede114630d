//! Locks between processes: flock(2), held by an open descriptor and so gone with the process, however it ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::identity::private_file::{is_held, try_lock};

/// The file that stands for the folder. Empty.
const FOLDER_LOCK: &str = "audit.lock";

/// How often a lock that another process holds is tried again.
const TRY_EVERY: Duration = Duration::from_millis(20);

/// Locks a file of ours that is new. Another process may just be looking whether it is locked, which takes no time. `false`: somebody
/// keeps it locked.
pub(super) fn lock_new(file: &File) -> io::Result<bool> {
    for _ in 0..10 {
        if try_lock(file)? {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(false)
}

/// Whether a writer holds the file's lock: another process, or another descriptor of this one. A file that is gone is not locked.
pub(super) fn is_locked(path: &Path) -> io::Result<bool> {
    match File::open(path) {
        Ok(file) => is_held(&file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Starting (reading other chains, adopting, opening the first segment) and deleting are done by one process at a time.
pub(super) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// `None`: another process kept it for all of `within`.
    pub(super) fn take(folder: &Path, within: Duration) -> io::Result<Option<FolderLock>> {
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(folder.join(FOLDER_LOCK))?;
        let deadline = Instant::now() + within;
        while !try_lock(&file)? {
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(TRY_EVERY);
        }
        Ok(Some(FolderLock { _file: file }))
    }
}
