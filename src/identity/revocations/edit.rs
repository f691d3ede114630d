//! Adds an entry to the list: comments, order and what others wrote are kept, and entries that have ended are dropped.

use std::path::Path;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

use super::{MAX_REASON_CHARS, Revocations, RevocationsError, Subject};
use crate::identity::private_file::{self, FileError};
use crate::identity::{issuer, token};

/// The comment above the entries of a list that is made here.
const HEADER: &str = "# Tokens that end before they expire. An entry that is taken out lets them pass again.\n";
/// Added to the longest life of a token: the largest `identity.leeway_s` there is, and a day for clocks that are wrong.
const MARGIN_S: i64 = 600 + 24 * 3600;

/// What to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    pub subject: Subject,
    /// An operator's words.
    pub reason: Option<String>,
    /// All tokens of it are signed by us, so the last of them ends a known time from now (our longest life), and the entry with it.
    pub ours: bool,
}

/// Why nothing was added. The file is as it was.
#[derive(Debug)]
pub enum EditError {
    /// It is broken already; an entry could hide or lose what somebody meant.
    Broken(RevocationsError),
    /// `revoked = [..]`: TOML, but nothing to which a table could be added.
    Inline,
    /// Text that no token or entry can have.
    Invalid(String),
    /// As large as a list is read.
    Full,
}

impl std::fmt::Display for EditError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            EditError::Broken(RevocationsError::File(error)) => error.fmt(f),
            EditError::Broken(error) => write!(f, "{error}; nothing was changed, correct the file first"),
            EditError::Inline => {
                f.write_str("the list is written as `revoked = [..]`; write [[revoked]] tables instead")
            }
            EditError::Invalid(what) => f.write_str(what),
            EditError::Full => f.write_str("the list is full: take out entries whose tokens have ended"),
        }
    }
}

impl std::error::Error for EditError {}

impl From<FileError> for EditError {
    fn from(error: FileError) -> EditError {
        EditError::Broken(RevocationsError::File(error))
    }
}

/// Adds an entry to a file, and gives the list that is in it then. The first entry makes the file (0600).
///
/// Waits for other edits, reads and writes: call it off the request threads.
pub fn add_to_file(path: &Path, revocation: &Revocation, now: Timestamp) -> Result<Revocations, EditError> {
    let _alone = private_file::lock_folder_of(path)?;
    let broken = |line, what| EditError::Broken(RevocationsError::Content { path: Some(path.to_owned()), line, what });
    let bytes = private_file::read(path, private_file::OTHERS_CAN_WRITE)?;
    let text = match &bytes {
        None => HEADER,
        Some(bytes) => std::str::from_utf8(bytes).map_err(|_| broken(1, "the file is not UTF-8".to_owned()))?,
    };
    let (text, revocations) = add(text, revocation, now).map_err(|error| match error {
        EditError::Broken(RevocationsError::Content { line, what, .. }) => broken(line, what),
        other => other,
    })?;
    if bytes.is_some() {
        private_file::replace(path, text.as_bytes())?;
    } else if !private_file::create(path, text.as_bytes())? {
        // Somebody who takes no lock (an editor) was faster.
        return Err(broken(1, "the file has just been made by somebody else; try again".to_owned()));
    }
    Ok(revocations)
}

/// The text with the entry, and the list in it.
pub fn add(text: &str, revocation: &Revocation, now: Timestamp) -> Result<(String, Revocations), EditError> {
    Revocations::parse(text).map_err(EditError::Broken)?;
    revocation.subject.check().map_err(EditError::Invalid)?;
    if revocation.reason.as_ref().is_some_and(|reason| !token::is_plain(reason, MAX_REASON_CHARS)) {
        let what = format!("a reason has 1 to {MAX_REASON_CHARS} characters and no control characters");
        return Err(EditError::Invalid(what));
    }
    let unread = |error: toml_edit::TomlError| {
        // Two readers of the same family: what one takes the other does. Not its Display, which quotes the line.
        EditError::Broken(RevocationsError::Content { path: None, line: 1, what: error.message().to_owned() })
    };
    let mut document: DocumentMut = text.parse().map_err(unread)?;
    let trailing = document.trailing().as_str().unwrap_or_default().to_owned();
    let Item::ArrayOfTables(tables) = document.entry("revoked").or_insert(Item::ArrayOfTables(ArrayOfTables::new()))
    else {
        return Err(EditError::Inline);
    };
    let is_first = tables.is_empty();
    tables.retain(|entry| !has_ended(entry, now));
    let mut entry = table_of(revocation, now);
    // The comments of a list without entries stay above the first one.
    entry.decor_mut().set_prefix(if is_first { format!("{trailing}\n") } else { "\n".to_owned() });
    tables.push(entry);
    if is_first {
        document.set_trailing("");
    }
    let text = document.to_string();
    if text.len() as u64 > private_file::MAX_FILE_BYTES {
        return Err(EditError::Full);
    }
    let revocations = Revocations::parse(&text).map_err(EditError::Broken)?;
    Ok((text, revocations))
}

fn table_of(revocation: &Revocation, now: Timestamp) -> Table {
    // The next whole second: tokens count in seconds, and one that was issued in this one shall end as well.
    let at = Timestamp::from_second(now.as_second() + 1).unwrap_or(now);
    let mut table = Table::new();
    match &revocation.subject {
        Subject::Session(id) => table.insert("session", value(id)),
        Subject::Agent(id) => table.insert("agent", value(id)),
    };
    table.insert("at", written(at));
    if revocation.ours
        && let Ok(until) = at.checked_add(SignedDuration::from_secs(issuer::MAX_TTL_S + MARGIN_S))
    {
        table.insert("until", written(until));
    }
    if let Some(reason) = &revocation.reason {
        table.insert("reason", value(reason));
    }
    table
}

fn written(at: Timestamp) -> Item {
    // RFC 3339 in whole seconds is TOML's own form; a text would still be refused when the list is read back.
    at.to_string().parse::<toml_edit::Datetime>().map_or_else(|_| value(at.to_string()), value)
}

fn has_ended(entry: &Table, now: Timestamp) -> bool {
    let until = entry.get("until").and_then(Item::as_datetime);
    until.is_some_and(|until| until.to_string().parse::<Timestamp>().is_ok_and(|until| until < now))
}
