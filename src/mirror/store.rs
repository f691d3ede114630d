//! Files without names. Each is unlinked as soon as it is open, so that it ends with whoever holds it, a crash included.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Fault;
use crate::ledger::audit::free_bytes;

/// Names of files that a crash left between the two calls; nothing else in the folder is touched.
const PREFIX: &str = "behavry-mirror-";
/// Left to whoever else writes to the disk.
const SPARE_BYTES: u64 = 64 << 20;

pub(super) struct Store {
    folder: Arc<Path>,
    most_bytes: u64,
    reserved_bytes: Arc<AtomicU64>,
    files: Arc<AtomicU64>,
}

/// Room for one pull. Dropped, the room is another's.
pub(super) struct Reservation {
    folder: Arc<Path>,
    bytes: u64,
    all: Arc<AtomicU64>,
    files: Arc<AtomicU64>,
}

impl Store {
    pub fn open(folder: PathBuf, most_bytes: u64) -> Result<Store, String> {
        let named = |e: io::Error| {
            format!("models.mirror_store ({}): {e}; name a folder that can be written", folder.display())
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(named)?;
        for entry in fs::read_dir(&folder).map_err(named)? {
            let entry = entry.map_err(named)?;
            if entry.file_name().as_bytes().starts_with(PREFIX.as_bytes())
                && entry.file_type().map_err(named)?.is_file()
            {
                fs::remove_file(entry.path()).map_err(named)?;
            }
        }
        let store = Store {
            folder: folder.as_path().into(),
            most_bytes,
            reserved_bytes: Arc::default(),
            files: Arc::default(),
        };
        new_file(&store.folder, &store.files).map_err(named)?;
        Ok(store)
    }

    pub async fn reserve(&self, bytes: u64) -> Result<Reservation, Fault> {
        let room = |reserved: u64| reserved.checked_add(bytes).filter(|sum| *sum <= self.most_bytes);
        if self.reserved_bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_err() {
            return Err(Fault::TooLarge);
        }
        let (folder, all, files) =
            (Arc::clone(&self.folder), Arc::clone(&self.reserved_bytes), Arc::clone(&self.files));
        let reservation = Reservation { folder, bytes, all, files };
        let folder = Arc::clone(&self.folder);
        let free = tokio::task::spawn_blocking(move || free_bytes(&folder)).await;
        match free {
            // What other pulls have reserved and not written yet is not subtracted: a disk that fills up ends the pull in good order.
            Ok(Ok(free)) if free >= bytes.saturating_add(SPARE_BYTES) => Ok(reservation),
            _ => Err(Fault::Disk),
        }
    }
}

impl Reservation {
    pub async fn file(&self) -> io::Result<File> {
        let (folder, files) = (Arc::clone(&self.folder), Arc::clone(&self.files));
        tokio::task::spawn_blocking(move || new_file(&folder, &files)).await.map_err(io::Error::other)?
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

fn new_file(folder: &Path, files: &AtomicU64) -> io::Result<File> {
    let name = format!("{PREFIX}{}-{}", std::process::id(), files.fetch_add(1, Ordering::Relaxed));
    let path = folder.join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn room_is_bounded_and_given_back_and_files_have_no_names() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("store");
        let store = Store::open(folder.clone(), 100).unwrap();
        let first = store.reserve(60).await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(store.reserve(41).await.err(), Some(Fault::TooLarge));
        assert_eq!(store.reserve(u64::MAX).await.err(), Some(Fault::TooLarge));
        let file = first.file().await.unwrap();
        assert_eq!((file.metadata().unwrap().len(), fs::read_dir(&folder).unwrap().count()), (0, 0));
        let _second = store.reserve(40).await.unwrap_or_else(|e| panic!("{e}"));
        drop(first);
        let _third = store.reserve(60).await.unwrap_or_else(|e| panic!("{e}"));
        let endless = Store::open(folder.clone(), u64::MAX).unwrap();
        assert_eq!(endless.reserve(u64::MAX - 1).await.err(), Some(Fault::Disk), "no disk has that");
    }

    #[test]
    fn what_a_crash_left_is_removed_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("behavry-mirror-1-0"), "left").unwrap();
        fs::write(dir.path().join("somebody's"), "else").unwrap();
        Store::open(dir.path().to_owned(), 1).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["somebody's"]);
        let error = Store::open(dir.path().join("somebody's"), 1).err().unwrap();
        assert!(error.contains("models.mirror_store") && error.contains("name a folder"), "{error}");
    }
}
