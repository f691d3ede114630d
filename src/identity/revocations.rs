//! Whose tokens end before they expire: `revoked.toml`.
//!
//! ```toml
//! [[revoked]]
//! session = "9f0c.."                # `jti`: every token of this session, for good
//! at = 2026-11-22T21:00:00Z
//! until = 2027-11-24T21:10:00Z      # optional: no token of it is left by then, so the entry may go
//! reason = "laptop lost"            # optional: an operator's words, never shown to clients
//!
//! [[revoked]]
//! agent = "research-1"              # `sub`: its tokens issued before `at`, and those that do not say when (`iat`)
//! at = 2026-11-22T21:00:00Z
//! ```
//!
//! An agent gets new tokens after `at`; to keep it out, suspend it.
//!
//! - [`edit`]: adds an entry, with the rest of the file kept as it is.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Deserialize;
use toml::Spanned;
use toml::value::Datetime;

use super::{Caller, private_file, token};

pub mod edit;

/// Longest `reason`, in characters: a line for people.
pub const MAX_REASON_CHARS: usize = 256;

/// Why a list is not used: where, what, and what to do.
#[derive(Debug)]
pub enum RevocationsError {
    File(private_file::FileError),
    Content { path: Option<PathBuf>, line: usize, what: String },
}

impl std::fmt::Display for RevocationsError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RevocationsError::File(error) => error.fmt(f),
            RevocationsError::Content { path, line, what } => {
                let path = path.as_deref().unwrap_or(Path::new("revoked.toml"));
                write!(f, "{}:{line}: {what}", path.display())
            }
        }
    }
}

impl std::error::Error for RevocationsError {}

impl From<private_file::FileError> for RevocationsError {
    fn from(error: private_file::FileError) -> Self {
        RevocationsError::File(error)
    }
}

/// What is revoked. An entry counts as long as it is in the file, also past its `until`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Revocations {
    sessions: HashSet<String>,
    /// Seconds since 1970: tokens issued before are refused. The latest where an agent is there several times.
    agents: HashMap<String, i64>,
}

impl Revocations {
    /// Reads the list; `None` where there is no file. Others may read it, nobody else may write it: whoever can, can let a revoked
    /// token pass.
    pub fn load(path: &Path) -> Result<Option<Revocations>, RevocationsError> {
        let Some(bytes) = private_file::read(path, private_file::OTHERS_CAN_WRITE)? else { return Ok(None) };
        let at = |line, what: String| RevocationsError::Content { path: Some(path.to_owned()), line, what };
        let text = std::str::from_utf8(&bytes).map_err(|_| at(1, "the file is not UTF-8".to_owned()))?;
        Self::parse(text).map(Some).map_err(|error| match error {
            RevocationsError::Content { line, what, .. } => at(line, what),
            other => other,
        })
    }

    /// Reads the text of a list.
    pub fn parse(text: &str) -> Result<Revocations, RevocationsError> {
        let fault = |offset: usize, what: String| {
            let line = 1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count();
            RevocationsError::Content { path: None, line, what }
        };
        let file: FileText = toml::from_str(text)
            .map_err(|error| fault(error.span().map_or(0, |span| span.start), error.message().to_owned()))?;
        let mut revocations = Revocations::default();
        for entry in file.revoked {
            let offset = entry.span().start;
            revocations.add(entry.into_inner()).map_err(|what| fault(offset, what))?;
        }
        Ok(revocations)
    }

    /// Whether this caller's token is revoked. Two lookups by hash; none where nothing is revoked.
    pub fn name(&self, caller: &Caller) -> bool {
        if self.is_empty() {
            return false;
        }
        let since = || self.agents.get(&caller.agent_id);
        self.sessions.contains(&caller.session_id)
            || since().is_some_and(|since| caller.issued_at.is_none_or(|issued| issued < *since))
    }

    /// Whether everything that `other` revokes is revoked here too.
    pub fn cover(&self, other: &Revocations) -> bool {
        other.sessions.is_subset(&self.sessions)
            && other.agents.iter().all(|(id, since)| self.agents.get(id).is_some_and(|ours| ours >= since))
    }

    /// Sessions and agents together.
    pub fn len(&self) -> usize {
        self.sessions.len() + self.agents.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn add(&mut self, entry: Entry) -> Result<(), String> {
        let at = time(entry.at, "at")?;
        entry.until.map(|until| time(until, "until")).transpose()?;
        if entry.reason.is_some_and(|reason| !token::is_plain(&reason, MAX_REASON_CHARS)) {
            return Err(format!("`reason` must have 1 to {MAX_REASON_CHARS} characters and no control characters"));
        }
        let subject = match (entry.session, entry.agent) {
            (Some(session), None) => Subject::Session(session),
            (None, Some(agent)) => Subject::Agent(agent),
            _ => return Err("an entry names either a `session` or an `agent`".to_owned()),
        };
        subject.check()?;
        match subject {
            Subject::Session(id) => _ = self.sessions.insert(id),
            Subject::Agent(id) => {
                let since = self.agents.entry(id).or_insert(i64::MIN);
                *since = (*since).max(seconds_rounded_up(at));
            }
        }
        Ok(())
    }
}

/// Whose tokens end.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// `jti`.
    Session(String),
    /// `sub`.
    Agent(String),
}

impl Subject {
    /// What no token can have is no subject: somebody meant another.
    pub fn check(&self) -> Result<(), String> {
        let (what, id) = match self {
            Subject::Session(id) => ("session", id),
            Subject::Agent(id) => ("agent", id),
        };
        if token::is_plain(id, token::MAX_ID_CHARS) {
            return Ok(());
        }
        Err(format!("`{what}` must have 1 to {} characters and no control characters", token::MAX_ID_CHARS))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileText {
    #[serde(default)]
    revoked: Vec<Spanned<Entry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    session: Option<String>,
    agent: Option<String>,
    at: Datetime,
    until: Option<Datetime>,
    reason: Option<String>,
}

fn time(written: Datetime, what: &str) -> Result<Timestamp, String> {
    let unclear = |_| format!("`{what}` must be a time with its offset, such as 2026-11-22T21:00:00Z");
    written.to_string().parse().map_err(unclear)
}

/// Tokens count whole seconds: of those in which `at` lies, none is spared.
fn seconds_rounded_up(at: Timestamp) -> i64 {
    at.as_second() + i64::from(at.subsec_nanosecond() > 0)
}

#[cfg(test)]
mod tests;
