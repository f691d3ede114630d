//! The text of `agents.toml`: what may stand in it, and each fault with its line.

use std::collections::HashSet;

use serde::Deserialize;
use toml::Spanned;

use super::{Agent, Agents, AgentsError, State};
use crate::identity::api_key::{self, ApiKeyHash};
use crate::identity::device::DeviceKey;
use crate::identity::keyring::{Keyring, Taken};
use crate::identity::secret::SecretHash;
use crate::identity::token;

/// Most device keys, and most API keys, of one agent. Whoever needs more wants another agent.
const MAX_KEYS: usize = 64;

/// Reads the text of a file.
pub(super) fn parse(text: &str) -> Result<Agents, AgentsError> {
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
pub(super) fn check(agent: &Agent) -> Result<(), String> {
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
