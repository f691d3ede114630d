//! The agents that may have a token from the built-in issuer: `agents.toml`.
//!
//! ```toml
//! [[agent]]
//! id = "research-1"                         # `sub` of its tokens, and its client_id
//! name = "Research agent"                   # optional
//! roles = ["internal"]                      # at most 8
//! permissions = ["web:read", "web:write"]
//! risk_tier = "medium"                      # optional
//! state = "active"                          # or "suspended"; optional
//! secret_hash = "$argon2id$v=19$m=19456,t=2,p=1$..."   # optional: without it, only `token mint` makes its tokens
//! device_keys = ["ssh-ed25519 AAAA.. me@laptop"]       # optional: what Ollama's own client signs with
//! api_keys = [{ name = "ci", sha256 = "9f86d0.." }]    # optional; they count where `identity.api_keys` is on
//! ```
//!
//! `file` reads its text, and [`edit`] changes it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::keyring::Keyring;
use super::secret::{Secret, SecretHash};
use super::{issuer, private_file};

pub mod edit;
mod file;

/// The agent that a first start makes.
pub const DEMO_AGENT_ID: &str = "demo-agent";

/// Whether an agent may have tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    #[default]
    Active,
    Suspended,
}

impl State {
    /// As in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Active => "active",
            State::Suspended => "suspended",
        }
    }
}

/// One agent, without its secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agent {
    pub id: String,
    pub name: Option<String>,
    pub roles: Vec<String>,
    pub permissions: Vec<String>,
    pub risk_tier: Option<String>,
    pub state: State,
}

impl Agent {
    /// The claims of a token for this agent: a fresh session, the issuer's own life time.
    pub fn claims(&self) -> issuer::Claims {
        issuer::Claims {
            sub: self.id.clone(),
            name: self.name.clone(),
            roles: self.roles.clone(),
            permissions: self.permissions.clone(),
            risk_tier: self.risk_tier.clone(),
            session: None,
            ttl_s: None,
        }
    }
}

/// Why an agent gets no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthFailure {
    /// One answer and one duration for both.
    WrongIdOrSecret,
    /// Only said to whoever has the secret.
    Suspended,
}

/// Why a file of agents is not used: where, what, and what to do.
#[derive(Debug)]
pub enum AgentsError {
    File(private_file::FileError),
    NotThere { path: PathBuf },
    AlreadyThere { path: PathBuf },
    Content { path: Option<PathBuf>, line: usize, what: String },
}

impl std::fmt::Display for AgentsError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            AgentsError::File(error) => error.fmt(f),
            AgentsError::NotThere { path } => write!(f, "{}: there is no such agents file", path.display()),
            AgentsError::AlreadyThere { path } => write!(f, "{}: the agents file exists already", path.display()),
            AgentsError::Content { path, line, what } => {
                let path = path.as_deref().unwrap_or(Path::new("agents.toml"));
                write!(f, "{}:{line}: {what}", path.display())
            }
        }
    }
}

impl std::error::Error for AgentsError {}

impl From<private_file::FileError> for AgentsError {
    fn from(error: private_file::FileError) -> Self {
        AgentsError::File(error)
    }
}

/// The agents of a file, by id.
#[derive(Clone, Debug, Default)]
pub struct Agents {
    by_id: HashMap<String, (Agent, Option<SecretHash>)>,
    /// As in the file.
    order: Vec<String>,
    keyring: Keyring,
}

impl Agents {
    /// Reads a file. It may be readable by a group (a service user's), but nobody else may write it: whoever can, is
    /// admin.
    pub fn load(path: &Path) -> Result<Agents, AgentsError> {
        let bytes = private_file::read(path, private_file::OTHERS_CAN_WRITE)?
            .ok_or_else(|| AgentsError::NotThere { path: path.to_owned() })?;
        let at = |line, what: &str| AgentsError::Content { path: Some(path.to_owned()), line, what: what.to_owned() };
        let text = std::str::from_utf8(&bytes).map_err(|_| at(1, "the file is not UTF-8"))?;
        Self::parse(text).map_err(|error| match error {
            AgentsError::Content { line, what, .. } => at(line, &what),
            other => other,
        })
    }

    /// Reads the text of a file.
    pub fn parse(text: &str) -> Result<Agents, AgentsError> {
        file::parse(text)
    }

    /// Makes the file (0600, whole or not at all) with one agent for the demo, and returns its secret, which is in no
    /// file. An error where the file exists.
    pub fn create_with_demo(path: &Path) -> Result<(Agents, Secret), AgentsError> {
        let secret = Secret::random();
        let agent = Agent {
            id: DEMO_AGENT_ID.to_owned(),
            name: Some("Demo agent".to_owned()),
            roles: vec!["internal".to_owned()],
            permissions: vec!["web:read".to_owned(), "web:write".to_owned()],
            risk_tier: Some("medium".to_owned()),
            state: State::Active,
        };
        let (text, agents) = edit::new_file(agent, SecretHash::of(&secret))?;
        if private_file::create(path, text.as_bytes())? {
            Ok((agents, secret))
        } else {
            Err(AgentsError::AlreadyThere { path: path.to_owned() })
        }
    }

    /// The agent with this id and secret.
    ///
    /// Slow on purpose (one argon2id, 19 MiB): call it off the request threads, and bound how many run at once. An id
    /// that does not exist, or has no secret, costs the same check of a hash that nobody has.
    pub fn authenticate(&self, client_id: &str, client_secret: &Secret) -> Result<Agent, AuthFailure> {
        static NOBODY: LazyLock<SecretHash> = LazyLock::new(SecretHash::of_nobody);
        // For every call, not only for unknown ids: else the first of those would take twice the time.
        let nobody = &*NOBODY;
        let found = self.by_id.get(client_id).and_then(|(agent, hash)| Some((agent, hash.as_ref()?)));
        let matches = found.map_or(nobody, |(_, hash)| hash).matches(client_secret);
        match found {
            Some((agent, _)) if matches && agent.state == State::Active => Ok(agent.clone()),
            Some(_) if matches => Err(AuthFailure::Suspended),
            _ => Err(AuthFailure::WrongIdOrSecret),
        }
    }

    /// Whether both say the same of one id: the agent, its state, its secret.
    pub fn agrees_on(&self, other: &Agents, id: &str) -> bool {
        self.by_id.get(id) == other.by_id.get(id)
    }

    /// The same agents, whose API keys count or do not (`identity.api_keys`). They do not unless this is said.
    pub fn accepting_api_keys(mut self, on: bool) -> Agents {
        self.keyring.accept_api_keys(on);
        self
    }

    /// Their device keys and API keys.
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    pub fn find(&self, id: &str) -> Option<&Agent> {
        self.by_id.get(id).map(|(agent, _)| agent)
    }

    /// Whether the file says that the agent may do nothing for now. An id that is in no file is not suspended: `token mint` makes tokens
    /// for any.
    pub fn is_suspended(&self, id: &str) -> bool {
        self.find(id).is_some_and(|agent| agent.state == State::Suspended)
    }

    /// In the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = &Agent> {
        self.order.iter().filter_map(|id| self.find(id))
    }

    pub fn len(&self) -> usize {
        self.order.len()
    }

    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

#[cfg(test)]
mod tests;
