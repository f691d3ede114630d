//! A command's side of the control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::{Fault, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Reply, Request, is_too_long, socket_path, too_long};

/// Longer than the proxy takes for anything that it does for a command.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a running proxy did not do what was asked.
#[derive(Debug)]
pub enum AskError {
    /// No proxy runs on this state folder, or it has no control socket.
    NobodyThere { path: PathBuf },
    /// As above: no proxy can have a socket there.
    TooLong { path: PathBuf },
    /// The request is larger than the proxy reads.
    TooLarge,
    /// The user may not open the socket.
    Denied { path: PathBuf },
    /// It answers, but not as a proxy of ours does.
    Broken { path: PathBuf, what: String },
    /// It was asked, and says why not.
    Refused(Fault),
}

impl std::fmt::Display for AskError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            AskError::NobodyThere { path } => {
                write!(f, "no proxy answers at {}; is it running, and with this state_dir?", path.display())
            }
            AskError::TooLong { path } => too_long(path, f),
            AskError::TooLarge => {
                write!(f, "the command is larger than the {MAX_REQUEST_BYTES} bytes that a proxy reads")
            }
            AskError::Denied { path } => {
                write!(f, "{}: you may not open it: use sudo, or the user that the proxy runs as", path.display())
            }
            AskError::Broken { path, what } => write!(f, "{}: {what}", path.display()),
            AskError::Refused(fault) => f.write_str(&fault.what),
        }
    }
}

impl std::error::Error for AskError {}

impl AskError {
    /// Whether no proxy was there to be asked, so that a command may do by itself what it would have asked for.
    pub fn is_nobody_there(&self) -> bool {
        matches!(self, AskError::NobodyThere { .. } | AskError::TooLong { .. })
    }
}

/// Asks the proxy that runs on this state folder, and waits for its answer.
pub fn ask(state_dir: &Path, request: &Request) -> Result<Value, AskError> {
    let path = socket_path(state_dir);
    if is_too_long(&path) {
        return Err(AskError::TooLong { path });
    }
    let mut line = serde_json::to_vec(request)
        .map_err(|error| AskError::Broken { path: path.clone(), what: error.to_string() })?;
    line.push(b'\n');
    if line.len() as u64 > MAX_REQUEST_BYTES {
        return Err(AskError::TooLarge);
    }
    let stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error) => {
            return Err(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => AskError::NobodyThere { path },
                io::ErrorKind::PermissionDenied => AskError::Denied { path },
                _ => AskError::Broken { path, what: format!("cannot open it: {error}") },
            });
        }
    };
    let reply = exchange(stream, &line).map_err(|error| {
        let what = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("the proxy did not answer within {PATIENCE:?}; whether it did what was asked is unknown")
            }
            _ => format!("the proxy went away before it answered ({error}); whether it did what was asked is unknown"),
        };
        AskError::Broken { path: path.clone(), what }
    })?;
    match serde_json::from_slice(&reply) {
        Ok(Reply::Done(value)) => Ok(value),
        Ok(Reply::Failed(fault)) => Err(AskError::Refused(fault)),
        Err(_) => Err(AskError::Broken {
            path,
            what: "its answer is none of ours, or was cut short; is it a proxy of another version?".to_owned(),
        }),
    }
}

fn exchange(mut stream: UnixStream, line: &[u8]) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(line)?;
    let mut reply = Vec::new();
    stream.take(MAX_REPLY_BYTES).read_to_end(&mut reply)?;
    Ok(reply)
}
