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

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::api_key::{self, ApiKeyHash};
use super::device::DeviceKey;
use super::keyring::{Keyring, Taken};
use super::secret::{Secret, SecretHash};
use super::{issuer, private_file, token};

pub mod edit;

/// The agent that a first start makes.
pub const DEMO_AGENT_ID: &str = "demo-agent";

/// Most device keys, and most API keys, of one agent. Whoever needs more wants another agent.
const MAX_KEYS: usize = 64;

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
            add_keys(&mut agents.keyring, &agent, &entry.device_keys, &entry.api_keys)
                .map_err(|(at, what)| fault(at.unwrap_or(offset), what))?;
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
    #[serde(default)]
    device_keys: Vec<Spanned<String>>,
    #[serde(default)]
    api_keys: Vec<Spanned<ApiKeyEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ApiKeyEntry {
    name: String,
    sha256: String,
}

/// Puts an agent's keys on the ring. The error is where and what.
fn add_keys(
    keyring: &mut Keyring,
    agent: &Agent,
    device_keys: &[Spanned<String>],
    api_keys: &[Spanned<ApiKeyEntry>],
) -> Result<(), (Option<usize>, String)> {
    for (what, count) in [("device_keys", device_keys.len()), ("api_keys", api_keys.len())] {
        if count > MAX_KEYS {
            return Err((None, format!("`{what}` has more than {MAX_KEYS}: remove some, or make another agent")));
        }
    }
    let twice = |what: &str, taken: Taken| {
        format!(
            "this {what} is the agent {:?}'s already: a key belongs to one agent, so take it out of one",
            taken.agent_id
        )
    };
    for line in device_keys {
        let at = Some(line.span().start);
        let key = DeviceKey::parse(line.get_ref()).map_err(|why| (at, format!("one of `device_keys` {why}")))?;
        keyring.add_device(key, agent).map_err(|taken| (at, twice("device key", taken)))?;
    }
    let mut names = HashSet::new();
    for entry in api_keys {
        let at = Some(entry.span().start);
        let ApiKeyEntry { name, sha256 } = entry.get_ref();
        let hash = ApiKeyHash::parse(sha256).map_err(|why| (at, format!("`sha256` {why}")))?;
        if !token::is_plain(name, api_key::MAX_NAME_CHARS) {
            let what =
                format!("`name` must have 1 to {} characters and no control characters", api_key::MAX_NAME_CHARS);
            return Err((at, what));
        }
        if !names.insert(name) {
            return Err((at, format!("the API key {name:?} is there twice: give each a name of its own")));
        }
        keyring.add_api_key(hash, agent).map_err(|taken| (at, twice("API key", taken)))?;
    }
    Ok(())
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
    use crate::identity::cause;

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

    const DEVICE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBwHRSNviAJ/Gf9o9Iq7i4SwiFXNWG8ELj5+xDRdKidG me@laptop";

    fn device_keys(lines: &[&str]) -> String {
        format!("device_keys = {lines:?}")
    }

    fn api_keys(keys: &[(&str, &str)]) -> String {
        let keys: Vec<String> = keys
            .iter()
            .map(|(name, key)| format!("{{ name = {name:?}, sha256 = \"{}\" }}", ApiKeyHash::of(key).to_hex()))
            .collect();
        format!("api_keys = [{}]", keys.join(", "))
    }

    #[test]
    fn a_device_key_stands_for_its_agent() {
        let text = agent("a", "roles = [\"r\"]\npermissions = [\"web:read\"]\nrisk_tier = \"low\"\nname = \"A\"")
            + &device_keys(&[DEVICE]);
        let agents = Agents::parse(&text).unwrap();
        let key = DeviceKey::parse(DEVICE).unwrap();
        let caller = agents.keyring().device(&key).unwrap();
        assert_eq!((&*caller.agent_id, caller.agent_name.as_deref()), ("a", Some("A")));
        assert_eq!(caller.session_id, "SHA256:rz2L0IwXB9NDnzf6Q5IAEMIS92rk/5mYNNhLMtR1ylU");
        assert_eq!((&caller.roles[..], &caller.permissions[..]), (&["r".to_owned()][..], &["web:read".to_owned()][..]));
        assert_eq!(caller.risk_tier.as_deref(), Some("low"));
        let nobody = Agents::parse(&agent("a", "")).unwrap();
        assert_eq!(nobody.keyring().device(&key), Err(cause::UNKNOWN_DEVICE));
        let asleep = Agents::parse(&agent("a", &format!("state = \"suspended\"\n{}", device_keys(&[DEVICE])))).unwrap();
        assert_eq!(asleep.keyring().device(&key), Err(cause::SUSPENDED));
    }

    #[test]
    fn an_api_key_counts_where_it_is_turned_on_and_its_agent_is_active() {
        let text = agent("a", &api_keys(&[("ci", "bop_1"), ("other", "bop_2")]))
            + &agent("b", &format!("state = \"suspended\"\n{}", api_keys(&[("ci", "bop_3")])));
        let off = Agents::parse(&text).unwrap();
        assert_eq!(off.keyring().api_key("bop_1"), Err(cause::API_KEYS_OFF));
        let on = off.accepting_api_keys(true);
        let caller = on.keyring().api_key("bop_1").unwrap();
        assert_eq!((&*caller.agent_id, &*caller.session_id), ("a", &*ApiKeyHash::of("bop_1").session_id()));
        assert_eq!(on.keyring().api_key("bop_2").unwrap().agent_id, "a");
        assert_eq!(on.keyring().api_key("bop_3"), Err(cause::SUSPENDED));
        assert_eq!(on.keyring().api_key("bop_4"), Err(cause::UNKNOWN_API_KEY));
        assert!(!format!("{on:?}").contains(&ApiKeyHash::of("bop_1").to_hex()), "no debug text holds a hash");
    }

    #[test]
    fn a_key_that_is_broken_or_belongs_to_two_is_refused_with_its_line() {
        let same_key_other_comment = DEVICE.replace("me@laptop", "you@desk");
        let many = vec![DEVICE; 65];
        for (text, line, words) in [
            (agent("a", &device_keys(&["ssh-rsa AAAA hunter2"])), 3, "ssh-ed25519"),
            (
                agent("a", &device_keys(&[DEVICE])) + &agent("b", &device_keys(&[&same_key_other_comment])),
                6,
                "agent \"a\"'s",
            ),
            (agent("a", &device_keys(&[DEVICE, &same_key_other_comment])), 3, "one agent"),
            (agent("a", &device_keys(&many)), 1, "more than 64"),
            (agent("a", "api_keys = [{ name = \"ci\", sha256 = \"hunter2\" }]"), 3, "SHA-256"),
            (agent("a", "api_keys = [{ name = \"ci\", key = \"hunter2\" }]"), 3, "unknown field"),
            (agent("a", &api_keys(&[("", "bop_1")])), 3, "`name`"),
            (agent("a", &api_keys(&[("ci", "bop_1"), ("ci", "bop_2")])), 3, "twice"),
            (
                agent("a", &api_keys(&[("ci", "bop_1")])) + &agent("b", &api_keys(&[("ci", "bop_1")])),
                6,
                "agent \"a\"'s",
            ),
        ] {
            let said = fault(&text);
            assert!(said.starts_with(&format!("agents.toml:{line}: ")) && said.contains(words), "{text}\n{said}");
            assert!(!said.contains("hunter2") && !said.contains("AAAAC3"), "a key or hash is never quoted");
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
