//! Edits of the agents file: one change, in its place, with the comments and the order of the rest kept.
//!
//! Whoever edits (a running proxy for a command, or a command itself where none runs) comes through [`change_file`], which loses
//! nothing: the folder is locked, the new text must be one that [`Agents::parse`] takes, and the file is replaced whole.

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml_edit::{Array, ArrayOfTables, DocumentMut, Item, Table, value};

use super::file::check;
use super::{Agent, Agents, AgentsError, State};
use crate::identity::api_key::{self, ApiKeyHash};
use crate::identity::device::DeviceKey;
use crate::identity::private_file::{self, FileError};
use crate::identity::secret::SecretHash;
use crate::identity::token;

mod keys;

/// The comment above the agents of a file that is made here.
pub const HEADER: &str =
    "# Agents that may fetch a token at POST /api/v1/auth/token. Secrets are stored hashed (argon2id).\n";

/// One change of the file. It holds no secret, only a hash: whoever shows a secret has made it.
#[derive(Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum Change {
    /// A new agent, at the end. Without a hash only `token mint` makes its tokens.
    Add {
        agent: Agent,
        secret_hash: Option<SecretHash>,
    },
    /// Suspend or resume.
    State {
        id: String,
        state: State,
    },
    /// Another secret; the old one is worth nothing from then on.
    Secret {
        id: String,
        secret_hash: SecretHash,
    },
    Remove {
        id: String,
    },
    /// Tie a device to an agent. `line`: of its `.pub` file.
    AddKey {
        id: String,
        line: String,
    },
    /// `key`: its line, or its fingerprint.
    RemoveKey {
        id: String,
        key: String,
    },
    AddApiKey {
        id: String,
        name: String,
        sha256: String,
    },
    /// `name`: of the key, or its session as records show it.
    RemoveApiKey {
        id: String,
        name: String,
    },
}

/// Why a change was not made. The file is as it was.
#[derive(Debug)]
pub enum EditError {
    File(FileError),
    /// The file is broken already; the change could hide or lose what somebody meant.
    Broken(AgentsError),
    /// `agent = [..]`: TOML, but nothing to which a table could be added.
    Inline,
    AlreadyThere {
        id: String,
    },
    Unknown {
        id: String,
    },
    /// The key belongs to an agent already.
    Taken {
        owner: String,
    },
    /// The agent has these, and not the one that was to be removed.
    NoSuchKey {
        id: String,
        known: Vec<String>,
    },
    /// Text that no agent can have.
    Invalid(String),
}

impl std::fmt::Display for EditError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            EditError::File(error) => error.fmt(f),
            EditError::Broken(error) => write!(f, "{error}; nothing was changed, correct the file first"),
            EditError::Inline => {
                f.write_str("the agents are written as `agent = [..]`; write [[agent]] tables instead")
            }
            EditError::AlreadyThere { id } => {
                write!(f, "there is an agent {id:?} already; choose another id, or use rotate-secret")
            }
            EditError::Unknown { id } => write!(f, "there is no agent {id:?}; `agent list` shows those that are"),
            EditError::Taken { owner } => {
                write!(
                    f,
                    "the key belongs to the agent {owner:?} already; a key belongs to one agent, so remove it there first"
                )
            }
            EditError::NoSuchKey { id, known } if known.is_empty() => {
                write!(f, "the agent {id:?} has no such key, and no other of its kind")
            }
            EditError::NoSuchKey { id, known } => {
                write!(f, "the agent {id:?} has no such key; it has {}", known.join(", "))
            }
            EditError::Invalid(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for EditError {}

impl From<FileError> for EditError {
    fn from(error: FileError) -> EditError {
        EditError::File(error)
    }
}

/// Makes one change of the file, and gives the agents that are in it then. A first agent makes the file (0600).
///
/// Waits for other edits, reads and writes: call it off the request threads.
pub fn change_file(path: &Path, change: &Change) -> Result<Agents, EditError> {
    let _alone = private_file::lock_folder_of(path)?;
    let broken = |line, what| EditError::Broken(AgentsError::Content { path: Some(path.to_owned()), line, what });
    let bytes = private_file::read(path, private_file::OTHERS_CAN_WRITE)?;
    let text = match &bytes {
        None => HEADER,
        Some(bytes) => std::str::from_utf8(bytes).map_err(|_| broken(1, "the file is not UTF-8".to_owned()))?,
    };
    let (text, agents) = apply(text, change).map_err(|error| match error {
        EditError::Broken(AgentsError::Content { line, what, .. }) => broken(line, what),
        other => other,
    })?;
    if bytes.is_some() {
        private_file::replace(path, text.as_bytes())?;
    } else if !private_file::create(path, text.as_bytes())? {
        // Somebody who takes no lock (an editor, a first start) was faster.
        return Err(EditError::Broken(AgentsError::AlreadyThere { path: path.to_owned() }));
    }
    Ok(agents)
}

/// The text of a file with one agent, and the agents in it.
pub(super) fn new_file(agent: Agent, secret_hash: SecretHash) -> Result<(String, Agents), AgentsError> {
    let mut document = DocumentMut::new();
    document.set_trailing(HEADER);
    document.insert("agent", Item::ArrayOfTables(ArrayOfTables::new()));
    add(&mut document, table_of(&agent, Some(&secret_hash)));
    let text = document.to_string();
    let agents = Agents::parse(&text)?;
    Ok((text, agents))
}

/// The text with the change, and the agents in it.
pub fn apply(text: &str, change: &Change) -> Result<(String, Agents), EditError> {
    let before = Agents::parse(text).map_err(EditError::Broken)?;
    let unread = |error: toml_edit::TomlError| {
        // Two readers of the same family: what one takes the other does. Not its Display, which quotes the line.
        EditError::Broken(AgentsError::Content { path: None, line: 1, what: error.message().to_owned() })
    };
    let mut document: DocumentMut = text.parse().map_err(unread)?;
    let tables = match document.entry("agent").or_insert(Item::ArrayOfTables(ArrayOfTables::new())) {
        Item::ArrayOfTables(tables) => tables,
        _ => return Err(EditError::Inline),
    };
    match change {
        Change::Add { agent, secret_hash } => {
            if before.find(&agent.id).is_some() {
                return Err(EditError::AlreadyThere { id: agent.id.clone() });
            }
            check(agent).map_err(EditError::Invalid)?;
            add(&mut document, table_of(agent, secret_hash.as_ref()));
        }
        Change::State { id, state } => set(find(tables, id)?, "state", state.as_str()),
        Change::Secret { id, secret_hash } => set(find(tables, id)?, "secret_hash", secret_hash.as_str()),
        Change::Remove { id } => remove(&mut document, id)?,
        Change::AddKey { id, line } => {
            let table = find(tables, id)?;
            let key = DeviceKey::parse(line).map_err(|why| EditError::Invalid(format!("the key {why}")))?;
            if let Some(owner) = before.keyring().owner_of(&key) {
                return Err(EditError::Taken { owner: owner.to_owned() });
            }
            keys::add_device(table, &key, line);
        }
        Change::RemoveKey { id, key } => {
            let no_such = |known| EditError::NoSuchKey { id: id.clone(), known };
            keys::remove_device(find(tables, id)?, key).map_err(no_such)?;
        }
        Change::AddApiKey { id, name, sha256 } => {
            let table = find(tables, id)?;
            let hash = ApiKeyHash::parse(sha256).map_err(|why| EditError::Invalid(format!("the hash {why}")))?;
            if !token::is_plain(name, api_key::MAX_NAME_CHARS) || keys::has_api_key(table, name) {
                let what = "each API key of an agent needs a name of its own, of 1 to 64 characters; choose another";
                return Err(EditError::Invalid(what.to_owned()));
            }
            keys::add_api_key(table, name, &hash);
        }
        Change::RemoveApiKey { id, name } => {
            let no_such = |known| EditError::NoSuchKey { id: id.clone(), known };
            keys::remove_api_key(find(tables, id)?, name).map_err(no_such)?;
        }
    }
    let text = document.to_string();
    let agents = Agents::parse(&text).map_err(EditError::Broken)?;
    Ok((text, agents))
}

/// Adds a table at the end, behind a blank line. The comments of a file without agents stay above the first one.
fn add(document: &mut DocumentMut, mut table: Table) {
    let trailing = document.trailing().as_str().unwrap_or_default().to_owned();
    let Some(tables) = document.get_mut("agent").and_then(Item::as_array_of_tables_mut) else {
        return; // `apply` has just seen to it
    };
    let is_first = tables.is_empty();
    let above = match is_first {
        true if trailing.is_empty() || trailing.ends_with("\n\n") => trailing,
        true => format!("{trailing}\n"),
        false => "\n".to_owned(),
    };
    table.decor_mut().set_prefix(above);
    tables.push(table);
    if is_first {
        document.set_trailing("");
    }
}

fn position(tables: &ArrayOfTables, id: &str) -> Result<usize, EditError> {
    let has_id = |table: &Table| table.get("id").and_then(Item::as_str) == Some(id);
    tables.iter().position(has_id).ok_or_else(|| EditError::Unknown { id: id.to_owned() })
}

fn find<'a>(tables: &'a mut ArrayOfTables, id: &str) -> Result<&'a mut Table, EditError> {
    let at = position(tables, id)?;
    tables.get_mut(at).ok_or_else(|| EditError::Unknown { id: id.to_owned() })
}

/// Sets a text; a comment behind the old one stays.
fn set(table: &mut Table, key: &str, text: &str) {
    let decor = table.get(key).and_then(Item::as_value).map(|old| old.decor().clone());
    table[key] = value(text);
    if let (Some(decor), Some(new)) = (decor, table[key].as_value_mut()) {
        *new.decor_mut() = decor;
    }
}

/// Removes an agent with the comment directly above it. What stands above that, behind a blank line, belongs to the file.
fn remove(document: &mut DocumentMut, id: &str) -> Result<(), EditError> {
    let Some(tables) = document.get_mut("agent").and_then(Item::as_array_of_tables_mut) else {
        return Err(EditError::Inline);
    };
    let at = position(tables, id)?;
    let above = |table: Option<&Table>| {
        let prefix = table.and_then(|table| table.decor().prefix()).and_then(|prefix| prefix.as_str());
        prefix.unwrap_or_default().to_owned()
    };
    let own = above(tables.get(at));
    let keep = own.rfind("\n\n").map_or("", |end| &own[..=end]);
    tables.remove(at);
    if keep.trim().is_empty() {
        return Ok(());
    }
    match tables.get_mut(at) {
        Some(next) => {
            let joined = format!("{keep}{}", above(Some(next)));
            next.decor_mut().set_prefix(joined);
        }
        None => {
            let trailing = document.trailing().as_str().unwrap_or_default().to_owned();
            document.set_trailing(format!("{keep}{trailing}"));
        }
    }
    Ok(())
}

fn table_of(agent: &Agent, secret_hash: Option<&SecretHash>) -> Table {
    let list = |words: &[String]| value(words.iter().map(String::as_str).collect::<Array>());
    let mut table = Table::new();
    table["id"] = value(&agent.id);
    if let Some(name) = &agent.name {
        table["name"] = value(name);
    }
    table["roles"] = list(&agent.roles);
    table["permissions"] = list(&agent.permissions);
    if let Some(tier) = &agent.risk_tier {
        table["risk_tier"] = value(tier);
    }
    table["state"] = value(agent.state.as_str());
    if let Some(hash) = secret_hash {
        table["secret_hash"] = value(hash.as_str());
    }
    table
}

#[cfg(test)]
mod tests;
