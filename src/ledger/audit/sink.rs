//! Where lines go first: a file, or standard output where it is the only one.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The sink that gives receipts.
pub(super) enum Sink {
    File(LogFile),
    Stream(File),
}

/// A file appended to by us alone.
pub(super) struct LogFile {
    path: PathBuf,
    /// `None`: the name led nowhere when it was last looked up.
    file: Option<File>,
}

impl Sink {
    /// Writes as much as goes: how much that was, and what stopped it.
    pub(super) fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let file = match self {
            Sink::File(LogFile { file: Some(file), .. }) | Sink::Stream(file) => file,
            Sink::File(LogFile { file: None, .. }) => return (0, Err(io::ErrorKind::NotFound.into())),
        };
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

    /// Takes back the last `torn_bytes` that were written. `false`: they are still there.
    pub(super) fn cut(&mut self, torn_bytes: u64) -> bool {
        match self {
            Sink::File(LogFile { file: Some(file), .. }) => cut(file, torn_bytes).unwrap_or(false),
            Sink::File(LogFile { file: None, .. }) | Sink::Stream(_) => false,
        }
    }

    /// Looks whether the name still leads to the open file, and opens what is there now if it does not. `true`: it is another file.
    pub(super) fn reopened(&mut self) -> io::Result<bool> {
        let Sink::File(log) = self else { return Ok(false) };
        let (there, open) = (fs::metadata(&log.path).ok(), log.file.as_ref().and_then(|file| file.metadata().ok()));
        if let (Some(there), Some(open)) = (there, open)
            && (there.dev(), there.ino()) == (open.dev(), open.ino())
        {
            return Ok(false);
        }
        log.file = None;
        *log = LogFile::open(&log.path)?;
        log::warn!("audit: {} was renamed or removed; it is opened anew", log.path.display());
        Ok(true)
    }
}

impl fmt::Display for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sink::File(log) => write!(f, "{}", log.path.display()),
            Sink::Stream(_) => f.write_str("standard output"),
        }
    }
}

impl LogFile {
    /// Opens the file, which is made if it is not there, as is its folder. A last line without an end (of an earlier process that died)
    /// is ended, not cut: it is not ours.
    pub(super) fn open(path: &Path) -> io::Result<LogFile> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            DirBuilder::new().recursive(true).mode(0o750).create(folder)?;
        }
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o640).open(path)?;
        let about = file.metadata()?;
        if about.is_file() && about.len() > 0 {
            let mut last = [0];
            file.read_exact_at(&mut last, about.len() - 1)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
            }
        }
        Ok(LogFile { path: path.to_owned(), file: Some(file) })
    }
}

/// Only where our bytes are the last ones: in append mode the position is the end of what this handle wrote (open(2)).
fn cut(file: &mut File, torn_bytes: u64) -> io::Result<bool> {
    let (end, about) = (file.stream_position()?, file.metadata()?);
    if !about.is_file() || about.len() != end || end < torn_bytes {
        return Ok(false);
    }
    file.set_len(end - torn_bytes)?;
    Ok(true)
}
