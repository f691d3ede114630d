//! The control socket: how a command speaks to the proxy that runs on the same state folder.
//!
//! A Unix socket (0600) in the state folder. One line of JSON asks, one line of JSON answers, and the connection is closed:
//!
//! ```text
//! {"command":"agent-change","with":{"change":"state","id":"research-1","state":"suspended"}}
//! {"done":{"file":"/var/lib/behavry-ollama-proxy/agents.toml"}}
//! ```
//!
//! Both lines are bounded in size, a connection in time, and how many there are at once. Only root and the user that the proxy runs
//! as are answered. Nothing that is asked or answered is written to a log.
//!
//! - [`open`], [`Control::serve`]: the proxy's side.
//! - [`ask`]: the command's side.
//!
//! A new command is a variant of [`Request`], and its answer an arm in `server::commands`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::identity::agents::edit::Change;
use crate::identity::own_keys::rotate::Plan;
use crate::identity::revocations::edit::Revocation;

mod ask;
mod listen;

pub use ask::{AskError, ask};
pub use listen::{Control, OpenError, open};

/// The socket's name in the state folder.
const SOCKET: &str = "control.sock";
/// Beside it: whoever holds its lock has the socket. The kernel frees it with the process, so a socket that a crash left behind is
/// known as such.
const LOCK: &str = "control.lock";

/// `sun_path` of unix(7), with the zero at its end.
const MAX_PATH_BYTES: usize = 108;
/// An agent with all its roles, permissions and keys takes a few KiB.
const MAX_REQUEST_BYTES: u64 = 256 * 1024;
/// A list of ten thousand agents takes 3 MiB.
const MAX_REPLY_BYTES: u64 = 16 * 1024 * 1024;

/// What a command asks of a running proxy.
#[derive(Serialize, Deserialize)]
#[serde(tag = "command", content = "with", rename_all = "kebab-case")]
pub enum Request {
    /// End as after SIGTERM.
    Drain,
    /// Read agents, policy, revocations and own keys anew, now, whether they look changed or not.
    Reload,
    /// The agents in force.
    AgentList,
    /// Edit the agents file; in force when it is answered.
    AgentChange(Change),
    /// End tokens before they expire; what runs with them is cut when it is answered.
    Revoke(Revocation),
    /// The backends, and how they are.
    BackendList,
    /// A backend, by name, gets no new work; what runs on it goes on. Until it is undrained or the proxy restarts.
    BackendDrain {
        name: String,
    },
    BackendUndrain {
        name: String,
    },
    /// Sign with another key; in force when it is answered.
    RotateKeys(Plan),
    /// What would become of a request; nothing is done.
    Explain(Question),
}

/// A request that nobody makes. It may hold a prompt, and so has no `Debug`.
#[derive(Serialize, Deserialize)]
pub struct Question {
    pub method: String,
    pub path: String,
    /// JSON.
    pub body: Option<String>,
    /// Instead of the body's.
    pub model: Option<String>,
    pub agent: String,
    pub roles: Vec<String>,
    pub permissions: Vec<String>,
    pub risk_tier: Option<String>,
    pub source_ip: Option<IpAddr>,
    /// `x-behavry-priority`.
    pub priority: Option<String>,
    /// `x-behavry-backend`.
    pub backend: Option<String>,
}

/// What the proxy answers.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    Done(Value),
    Failed(Fault),
}

/// Why a command was not carried out.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    pub kind: FaultKind,
    /// For the person at the command line: what is wrong, and what to do.
    pub what: String,
}

/// Whose fault it is: the command's exit code goes by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    Usage,
    Configuration,
    Failure,
}

impl Fault {
    pub fn usage(what: impl Into<String>) -> Fault {
        Fault { kind: FaultKind::Usage, what: what.into() }
    }

    pub fn configuration(what: impl Into<String>) -> Fault {
        Fault { kind: FaultKind::Configuration, what: what.into() }
    }

    pub fn failure(what: impl Into<String>) -> Fault {
        Fault { kind: FaultKind::Failure, what: what.into() }
    }
}

impl From<Result<Value, Fault>> for Reply {
    fn from(done: Result<Value, Fault>) -> Reply {
        match done {
            Ok(value) => Reply::Done(value),
            Err(fault) => Reply::Failed(fault),
        }
    }
}

/// Where the socket of a state folder is.
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join(SOCKET)
}

fn is_too_long(path: &Path) -> bool {
    path.as_os_str().len() >= MAX_PATH_BYTES
}

fn too_long(path: &Path, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
    write!(
        f,
        "{}: a socket's path has at most {} bytes: choose a shorter state_dir",
        path.display(),
        MAX_PATH_BYTES - 1
    )
}

/// Whom the proxy answers. The socket's mode says the same; this holds where somebody has changed that.
fn may_command(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == own_uid || peer_uid == 0
}

#[cfg(test)]
mod tests;
