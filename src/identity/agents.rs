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
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::secret::{Secret, SecretHash};
use super::{issuer, private_file, token};

pub mod edit;

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
        let fault = |offset: usize, what: String| {
            let line = 1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count();
            AgentsError::Content { path: None, line, what }
        };
        let file: FileText = toml::from_str(text).map_err(|error| {
            // `message`, not Display: that one quotes the line, which may hold a hash.
            fault(error.span().map_or(0, |span| span.start), error.message().to_owned())
        })?;
        let mut agents = Agents::default();
        for entry in file.agent {
            let offset = entry.span().start;
            let entry = entry.into_inner();
            let hash = match &entry.secret_hash {
                None => None,
                Some(hash) => Some(
                    SecretHash::parse(hash.get_ref())
                        .map_err(|why| fault(hash.span().start, format!("`secret_hash` {why}")))?,
                ),
            };
            let agent = Agent {
                id: entry.id,
                name: entry.name,
                roles: entry.roles,
                permissions: entry.permissions,
                risk_tier: entry.risk_tier,
                state: entry.state,
            };
            check(&agent).map_err(|what| fault(offset, what))?;
            if agents.by_id.contains_key(&agent.id) {
                return Err(fault(offset, format!("the id {:?} is there twice: give each agent its own", agent.id)));
            }
            agents.order.push(agent.id.clone());
            agents.by_id.insert(agent.id.clone(), (agent, hash));
        }
        Ok(agents)
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

    pub fn find(&self, id: &str) -> Option<&Agent> {
        self.by_id.get(id).map(|(agent, _)| agent)
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileText {
    #[serde(default)]
    agent: Vec<Spanned<Entry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    id: String,
    name: Option<String>,
    #[serde(default)]
    roles: Vec<String>,
    #[serde(default)]
    permissions: Vec<String>,
    risk_tier: Option<String>,
    #[serde(default)]
    state: State,
    secret_hash: Option<Spanned<String>>,
}

/// What the verifier would refuse in a token is refused in the file.
fn check(agent: &Agent) -> Result<(), String> {
    let plain = |what: &str, text: &str, max_chars: usize| {
        if token::is_plain(text, max_chars) {
            return Ok(());
        }
        Err(format!("{what} must have 1 to {max_chars} characters and no control characters"))
    };
    plain("`id`", &agent.id, token::MAX_ID_CHARS)?;
    agent.name.iter().try_for_each(|name| plain("`name`", name, token::MAX_WORD_CHARS))?;
    agent.risk_tier.iter().try_for_each(|tier| plain("`risk_tier`", tier, token::MAX_WORD_CHARS))?;
    agent.roles.iter().try_for_each(|role| plain("each of `roles`", role, token::MAX_WORD_CHARS))?;
    agent.permissions.iter().try_for_each(|word| plain("each of `permissions`", word, token::MAX_WORD_CHARS))?;
    if agent.roles.len() > token::MAX_ROLES {
        return Err(format!("`roles` has more than {}: remove some", token::MAX_ROLES));
    }
    if agent.permissions.len() > token::MAX_PERMISSIONS {
        return Err(format!("`permissions` has more than {}: remove some", token::MAX_PERMISSIONS));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn agent(id: &str, more: &str) -> String {
        format!("[[agent]]\nid = \"{id}\"\n{more}\n")
    }

    fn fault(text: &str) -> String {
        Agents::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_right_secret_gives_the_agent() {
        let secret = Secret::random();
        let hash = SecretHash::of(&secret);
        let line = format!("secret_hash = \"{}\"", hash.as_str());
        let text = agent("a", &line) + &agent("b", &format!("{line}\nstate = \"suspended\"")) + &agent("c", "");
        let agents = Agents::parse(&text).unwrap();
        assert_eq!(agents.authenticate("a", &secret).unwrap().id, "a");
        assert_eq!(agents.authenticate("a", &Secret::random()), Err(AuthFailure::WrongIdOrSecret));
        assert_eq!(agents.authenticate("nobody", &secret), Err(AuthFailure::WrongIdOrSecret));
        assert_eq!(agents.authenticate("c", &secret), Err(AuthFailure::WrongIdOrSecret), "no hash, no secret");
        assert_eq!(agents.authenticate("b", &secret), Err(AuthFailure::Suspended));
        assert_eq!(agents.authenticate("b", &Secret::random()), Err(AuthFailure::WrongIdOrSecret));
    }

    #[test]
    fn a_broken_file_is_refused_with_its_line() {
        for (text, line, words) in [
            (agent("a", "colour = \"red\""), 3, "unknown field"),
            (agent("a", "") + &agent("a", ""), 4, "twice"),
            (agent("a", "id = \"b\""), 3, "duplicate"),
            (agent("a", "state = \"asleep\""), 3, "unknown variant"),
            (agent("a", "secret = \"hunter2\""), 3, "unknown field"),
            (agent("a", "\nsecret_hash = \"hunter2\""), 4, "argon2id"),
            (agent("", ""), 1, "`id`"),
            (agent("a\\u001b", ""), 1, "`id`"),
            (agent("a", "roles = [\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\"]"), 1, "`roles`"),
            ("[[agent]]\nname = \"x\"\n".into(), 1, "missing field `id`"),
            ("\n\n[agents]\n".into(), 3, "unknown field"),
            ("id = ".into(), 1, ""),
        ] {
            let said = fault(&text);
            assert!(said.starts_with(&format!("agents.toml:{line}: ")) && said.contains(words), "{text}\n{said}");
            assert!(!said.contains("hunter2"), "a hash or secret is never quoted");
        }
    }

    #[test]
    fn an_empty_file_has_no_agents() {
        assert!(Agents::parse("").unwrap().is_empty());
    }

    #[test]
    fn agents_keep_the_order_of_the_file() {
        let agents = Agents::parse(&(agent("z", "") + &agent("a", "") + &agent("m", ""))).unwrap();
        assert_eq!(agents.iter().map(|agent| agent.id.as_str()).collect::<Vec<_>>(), ["z", "a", "m"]);
    }

    #[test]
    fn the_first_start_makes_one_agent_and_never_replaces_a_file() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("state/agents.toml");
        let (made, secret) = Agents::create_with_demo(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let loaded = Agents::load(&path).unwrap();
        assert_eq!(made.find(DEMO_AGENT_ID), loaded.find(DEMO_AGENT_ID));
        assert_eq!(loaded.authenticate(DEMO_AGENT_ID, &secret).unwrap().permissions, ["web:read", "web:write"]);
        assert!(!std::fs::read_to_string(&path).unwrap().contains(secret.expose()), "secrets are stored hashed");
        assert!(matches!(Agents::create_with_demo(&path), Err(AgentsError::AlreadyThere { .. })));
    }

    #[test]
    fn agents_agree_on_an_id_while_nothing_of_it_has_changed() {
        let with = |hash: &SecretHash, more: &str| {
            let text = agent("a", &format!("secret_hash = \"{}\"\n{more}", hash.as_str())) + &agent("b", "");
            Agents::parse(&text).unwrap()
        };
        let hash = SecretHash::of_nobody();
        let now = with(&hash, "");
        assert!(now.agrees_on(&with(&hash, "state = \"active\""), "a") && now.agrees_on(&Agents::default(), "nobody"));
        for other in [with(&SecretHash::of_nobody(), ""), with(&hash, "state = \"suspended\""), Agents::default()] {
            assert!(!now.agrees_on(&other, "a"));
        }
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("agents.toml");
        std::fs::write(&path, agent("a", "")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(Agents::load(&path).is_ok());
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o664)).unwrap();
        assert!(Agents::load(&path).unwrap_err().to_string().contains("chmod go-w"));
        assert!(matches!(Agents::load(&root.path().join("none")), Err(AgentsError::NotThere { .. })));
    }
}
