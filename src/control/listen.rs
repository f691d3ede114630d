//! The proxy's side of the control socket.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Fault, LOCK, MAX_REQUEST_BYTES, Reply, Request, is_too_long, may_command, socket_path, too_long};
use crate::identity::private_file::{self, FileError};

/// Commands at once. People and scripts; the others wait in the listener's queue.
const CONNECTIONS: u32 = 8;
/// For a request's line to come and a reply's to be taken. Both fit into the kernel's buffers; who is slower is no command of ours.
const LINE_PATIENCE: Duration = Duration::from_secs(5);
/// At the end: for answers that are on their way, such as that to `drain` itself.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// After a failed accept (no descriptors left): the next one may do.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no control socket. The proxy serves all the same: commands then edit the files, which it watches.
#[derive(Debug)]
pub enum OpenError {
    TooLong {
        path: PathBuf,
    },
    /// Another proxy has this state folder's socket. It may be draining: try again.
    Taken {
        path: PathBuf,
    },
    Folder(FileError),
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
}

impl std::fmt::Display for OpenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OpenError::TooLong { path } => too_long(path, f),
            OpenError::Taken { path } => write!(
                f,
                "{}: another proxy runs on this state folder and answers commands until it ends; give this one a state_dir of its own",
                path.display()
            ),
            OpenError::Folder(error) => error.fmt(f),
            OpenError::Io { path, doing, source } => write!(f, "{}: cannot {doing}: {source}", path.display()),
        }
    }
}

impl std::error::Error for OpenError {}

/// An open control socket. Dropped, it is gone from the folder.
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
    /// Held as long as the socket is ours.
    _lock: File,
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path); // one that stays behind answers nobody, and the next start replaces it
    }
}

/// Opens the socket of a state folder, which is made where there is none. To be called within a runtime.
pub fn open(state_dir: &Path) -> Result<Control, OpenError> {
    let path = socket_path(state_dir);
    if is_too_long(&path) {
        return Err(OpenError::TooLong { path });
    }
    let failed = |path: &Path, doing| {
        let path = path.to_owned();
        move |source| OpenError::Io { path, doing, source }
    };
    private_file::make_folder(state_dir).map_err(OpenError::Folder)?;
    let lock_path = state_dir.join(LOCK);
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&lock_path)
        .map_err(failed(&lock_path, "open it"))?;
    if !private_file::try_lock(&lock).map_err(failed(&lock_path, "lock it"))? {
        return Err(OpenError::Taken { path });
    }
    // The lock is ours, so whoever made a socket that is still there is gone.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed(&path, "remove what is left of it")(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(failed(&path, "listen on it"))?;
    let control = Control { listener, path, _lock: lock };
    // Who connects in the moment before is asked for a user id as everybody is.
    std::fs::set_permissions(&control.path, Permissions::from_mode(0o600))
        .map_err(failed(&control.path, "set its mode"))?;
    Ok(control)
}

impl Control {
    /// Answers commands until it is asked to close. When it returns the socket is gone, and what was being answered has its answer.
    pub async fn serve<F, Answered>(self, answer: F, closing: impl Future<Output = ()>)
    where
        F: Fn(Request) -> Answered + Clone + Send + 'static,
        Answered: Future<Output = Reply> + Send,
    {
        let places = Arc::new(Semaphore::new(CONNECTIONS as usize));
        tokio::select! {
            () = closing => {}
            () = self.accept(&places, answer) => {}
        }
        drop(self);
        let _ = timeout(LAST_ANSWERS, places.acquire_many(CONNECTIONS)).await; // whoever says nothing holds nobody up
    }

    async fn accept<F, Answered>(&self, places: &Arc<Semaphore>, answer: F)
    where
        F: Fn(Request) -> Answered + Clone + Send + 'static,
        Answered: Future<Output = Reply> + Send,
    {
        while let Ok(place) = Arc::clone(places).acquire_owned().await {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let answer = answer.clone();
                    tokio::spawn(async move {
                        let _ = speak(stream, answer).await; // the command left: nobody to tell
                        drop(place);
                    });
                }
                Err(error) => {
                    log::warn!("control socket: cannot accept: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn speak<F, Answered>(mut stream: UnixStream, answer: F) -> io::Result<()>
where
    F: Fn(Request) -> Answered,
    Answered: Future<Output = Reply>,
{
    let peer = stream.peer_cred()?.uid();
    // The line is read before anything is said, a stranger's too: a command that still writes would die of the closed socket.
    let mut line = Vec::new();
    let mut limited = BufReader::new((&mut stream).take(MAX_REQUEST_BYTES));
    let read = timeout(LINE_PATIENCE, limited.read_until(b'\n', &mut line)).await;
    // SAFETY: geteuid only reads, and cannot fail.
    let own = unsafe { libc::geteuid() };
    let reply = match read {
        _ if !may_command(peer, own) => {
            log::warn!("control socket: user {peer} was refused");
            let what = format!("only root and user {own} may command this proxy, and you are user {peer}: use sudo");
            Reply::Failed(Fault::failure(what))
        }
        Err(_) => return Ok(()), // says nothing: no command of ours
        Ok(Err(error)) => return Err(error),
        Ok(Ok(_)) => match read_request(&line) {
            Ok(request) => answer(request).await,
            Err(fault) => Reply::Failed(fault),
        },
    };
    let mut line = serde_json::to_vec(&reply).unwrap_or_default();
    line.push(b'\n');
    timeout(LINE_PATIENCE, stream.write_all(&line)).await??;
    stream.shutdown().await?;
    // A socket closed over unread bytes takes the answer back (ECONNRESET): what is left of too long a line is dropped first.
    let mut rest = stream.take(MAX_REQUEST_BYTES);
    timeout(LINE_PATIENCE, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await??;
    Ok(())
}

fn read_request(line: &[u8]) -> Result<Request, Fault> {
    let Some(line) = line.strip_suffix(b"\n") else {
        return Err(Fault::usage(format!("a request is one line of at most {MAX_REQUEST_BYTES} bytes")));
    };
    // Not the reader's own words: they would quote the request.
    serde_json::from_slice(line).map_err(|_| {
        let version = env!("CARGO_PKG_VERSION");
        Fault::usage(format!(
            "the running proxy ({version}) does not understand this command: restart it, if it is older than the command"
        ))
    })
}
