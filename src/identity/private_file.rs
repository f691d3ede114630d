//! Files that hold secrets: read only when nobody else can, and made or replaced whole or not at all.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::{RngCore, rngs::OsRng};

/// Largest file that is read, in bytes. A key is 3 KiB; an agents file of a thousand agents 300 KiB.
pub const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Permission bits that stop a file from being used.
pub const OTHERS_CAN_READ: u32 = 0o077;
pub const OTHERS_CAN_WRITE: u32 = 0o022;

/// How long an edit waits for another one to end. An edit takes milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What went wrong, with the file and what to do.
#[derive(Debug)]
pub enum FileError {
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
    TooOpen {
        path: PathBuf,
        mode: u32,
        remedy: &'static str,
    },
    TooLarge {
        path: PathBuf,
    },
    NotAFile {
        path: PathBuf,
    },
    /// Somebody else edits files of this folder, for seconds by now.
    Busy {
        folder: PathBuf,
    },
}

impl std::fmt::Display for FileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FileError::Io { path, doing, source } => write!(f, "{}: cannot {doing}: {source}", path.display()),
            FileError::TooOpen { path, mode, remedy } => write!(
                f,
                "{}: others have access to it (mode {:04o}): run `chmod {remedy} {}`",
                path.display(),
                mode & 0o7777,
                path.display()
            ),
            FileError::TooLarge { path } => {
                write!(f, "{}: larger than {} MiB, so not what belongs here", path.display(), MAX_FILE_BYTES >> 20)
            }
            FileError::NotAFile { path } => write!(f, "{}: not a regular file", path.display()),
            FileError::Busy { folder } => {
                write!(f, "{}: another command edits files of this folder; try again", folder.display())
            }
        }
    }
}

impl std::error::Error for FileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            FileError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Reads a file unless one of the `forbidden` mode bits is set; `None` where there is none.
///
/// The bits are those of the file that was opened, not of the path, so a swap in between changes nothing.
pub fn read(path: &Path, forbidden: u32) -> Result<Option<Vec<u8>>, FileError> {
    // Non-blocking: opening a named pipe would wait for its writer for ever.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(path, "open it")(error)),
    };
    let metadata = file.metadata().map_err(io_error(path, "look at it"))?;
    if !metadata.is_file() {
        return Err(FileError::NotAFile { path: path.to_owned() });
    }
    if metadata.mode() & forbidden != 0 {
        let remedy = if forbidden == OTHERS_CAN_READ { "600" } else { "go-w" };
        return Err(FileError::TooOpen { path: path.to_owned(), mode: metadata.mode(), remedy });
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io_error(path, "read it"))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    Ok(Some(bytes))
}

/// Makes a file that only its owner can read (0600), and its folder (0700) where there is none. `false` where the file
/// exists by now: two starts at once agree on one of their files.
///
/// The bytes are on disk under another name before the file has its own, so nobody ever sees half of it; a hard link,
/// unlike a rename, never replaces.
pub fn create(path: &Path, bytes: &[u8]) -> Result<bool, FileError> {
    let folder = folder_of(path);
    make_folder(folder)?;
    let draft = draft_in(folder);
    let written = write_draft(&draft, bytes).map(|()| give_to_owner_of(folder, &draft));
    let outcome = written.and_then(|()| match std::fs::hard_link(&draft, path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(io_error(path, "create it")(error)),
    });
    // Best effort: a draft that stays behind is 0600 and never read.
    let _ = std::fs::remove_file(&draft);
    if let Ok(true) = outcome {
        // The name itself must survive a power cut, or a restart would make another key.
        sync_folder(folder)?;
    }
    outcome
}

/// Replaces a file whole: whoever reads it sees the old bytes or the new ones. It keeps its owner, its group and its mode, so that a
/// service can read what root has edited. A link is followed, and stays a link.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let path = &std::fs::canonicalize(path).map_err(io_error(path, "find it"))?;
    let old = std::fs::metadata(path).map_err(io_error(path, "look at it"))?;
    let folder = folder_of(path);
    let draft = draft_in(folder);
    let replaced = write_draft(&draft, bytes).and_then(|()| {
        let file = File::open(&draft).map_err(io_error(&draft, "open it"))?;
        let new = file.metadata().map_err(io_error(&draft, "look at it"))?;
        if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
            fchown(&file, Some(old.uid()), Some(old.gid()))
                .map_err(io_error(path, "keep its owner (edit it as root, or as who owns it)"))?;
        }
        let mode = std::fs::Permissions::from_mode(old.mode() & 0o7777);
        file.set_permissions(mode).map_err(io_error(path, "keep its mode"))?;
        std::fs::rename(&draft, path).map_err(io_error(path, "replace it"))
    });
    if replaced.is_err() {
        let _ = std::fs::remove_file(&draft); // best effort, as above
        return replaced;
    }
    sync_folder(folder)
}

/// Keeps every other edit of this folder's files out while it lives.
pub struct FolderLock {
    _folder: File,
}

/// Waits a few seconds for other edits to end. The folder is made (0700) where there is none.
///
/// The folder itself is locked: a lock file that root's edit had made would keep the service out for ever. The kernel frees it
/// with the process, however that ends. Slow: call it off the request threads.
pub fn lock_folder_of(path: &Path) -> Result<FolderLock, FileError> {
    let folder = folder_of(path);
    make_folder(folder)?;
    let opened = File::open(folder).map_err(io_error(folder, "open it"))?;
    let began = Instant::now();
    while !try_lock(&opened).map_err(io_error(folder, "lock it"))? {
        if began.elapsed() > LOCK_PATIENCE {
            return Err(FileError::Busy { folder: folder.to_owned() });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(FolderLock { _folder: opened })
}

/// Takes the file's lock if nobody has it; false where somebody has. It is free again when the file is closed, and so when the
/// process ends, however it does.
pub fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: the descriptor is open as long as the file is borrowed.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        held if held.kind() == io::ErrorKind::WouldBlock => Ok(false),
        error => Err(error),
    }
}

/// Whether somebody has the file's lock for himself, as whoever writes has it. Asked by sharing it for a moment, which those who only
/// read may do at the same time: neither a check nor a backup makes a dead file look alive.
pub fn is_held(file: &File) -> io::Result<bool> {
    // SAFETY: the descriptor is open as long as the file is borrowed; flock touches no memory.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) } == 0 {
        // SAFETY: as above.
        unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
        return Ok(false);
    }
    match io::Error::last_os_error() {
        held if held.kind() == io::ErrorKind::WouldBlock => Ok(true),
        error => Err(error),
    }
}

/// Makes a folder (0700), and those above it, where there is none.
pub fn make_folder(folder: &Path) -> Result<(), FileError> {
    if folder.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io_error(folder, "make the folder"))?;
    give_to_owner_of(folder_of(folder), folder);
    Ok(())
}

/// What root makes in a service's folder is the service's to read. Best effort: nobody but root can, and nobody else has to.
fn give_to_owner_of(folder: &Path, made: &Path) {
    if let Ok(owner) = std::fs::metadata(folder) {
        let _ = chown(made, Some(owner.uid()), Some(owner.gid()));
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn draft_in(folder: &Path) -> PathBuf {
    folder.join(format!(".new-{:016x}", OsRng.next_u64()))
}

fn sync_folder(folder: &Path) -> Result<(), FileError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error(folder, "write it to disk"))
}

fn write_draft(draft: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(draft)
        .map_err(io_error(draft, "create it"))?;
    give_to_folders_owner(&file, draft)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_error(draft, "write it"))
}

/// What root makes in a service's folder belongs to the service, which could not read it otherwise.
fn give_to_folders_owner(file: &File, path: &Path) -> Result<(), FileError> {
    let look = |looked: io::Result<std::fs::Metadata>| looked.map_err(io_error(path, "look at it"));
    let (folder, file_now) = (look(std::fs::metadata(folder_of(path)))?, look(file.metadata())?);
    if file_now.uid() != 0 || folder.uid() == 0 {
        return Ok(());
    }
    fchown(file, Some(folder.uid()), Some(folder.gid())).map_err(io_error(path, "give it to its folder's owner"))
}

fn io_error<'a>(path: &'a Path, doing: &'static str) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError::Io { path: path.to_owned(), doing, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_created_file_is_0600_in_a_folder_of_0700() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("state/deep/key.pem");
        assert!(create(&path, b"x").unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(root.path().join("state")).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no draft stays behind");
    }

    #[test]
    fn a_file_that_exists_is_never_replaced() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("key.pem");
        assert!(create(&path, b"first").unwrap());
        assert!(!create(&path, b"second").unwrap());
        assert_eq!(read(&path, OTHERS_CAN_READ).unwrap().unwrap(), b"first");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_with_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("key.pem");
        create(&path, b"x").unwrap();
        for mode in [0o640, 0o604, 0o620, 0o601] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let words = read(&path, OTHERS_CAN_READ).unwrap_err().to_string();
            assert!(words.contains("chmod 600") && words.contains(&format!("{mode:04o}")), "{words}");
        }
    }

    #[test]
    fn a_replaced_file_keeps_its_mode_and_its_link_and_leaves_no_draft() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("agents.toml");
        let link = root.path().join("link.toml");
        create(&path, b"old").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        replace(&link, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2, "no draft stays behind");
        assert!(replace(&root.path().join("none"), b"x").is_err(), "only what is there is replaced");
    }

    #[test]
    fn a_replaced_file_keeps_its_owner() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("agents.toml");
        create(&path, b"old").unwrap();
        // Only root can give a file away; for anybody else the owner stays the same by itself.
        let other = if std::os::unix::fs::chown(&path, Some(65534), Some(65534)).is_ok() { Some(65534) } else { None };
        replace(&path, b"new").unwrap();
        let now = std::fs::metadata(&path).unwrap();
        assert_eq!(now.mode() & 0o777, 0o600);
        other.into_iter().for_each(|other| assert_eq!((now.uid(), now.gid()), (other, other)));
    }

    #[test]
    fn a_folder_is_locked_by_one_edit_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/agents.toml");
        let lock = lock_folder_of(&path).unwrap();
        let other = File::open(root.path().join("deep")).unwrap();
        assert!(!try_lock(&other).unwrap());
        drop(lock);
        assert!(try_lock(&other).unwrap());
    }

    #[test]
    fn a_pipe_or_a_folder_is_refused_at_once() {
        let root = tempfile::tempdir().unwrap();
        assert!(read(root.path(), 0).is_err());
        let pipe = root.path().join("pipe");
        if std::process::Command::new("mkfifo").arg(&pipe).status().is_ok_and(|status| status.success()) {
            assert!(matches!(read(&pipe, 0), Err(FileError::NotAFile { .. })));
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_none() {
        let root = tempfile::tempdir().unwrap();
        assert!(read(&root.path().join("nothing"), OTHERS_CAN_READ).unwrap().is_none());
    }
}
