//! The static credentials of the agents file, each with the caller it stands for: device keys and API keys.
//!
//! The callers are made when the file is read, not with each request; a reload makes a new keyring.

use std::collections::HashMap;
use std::sync::Arc;

use super::agents::{Agent, State};
use super::api_key::ApiKeyHash;
use super::device::DeviceKey;
use super::{Caller, cause};

/// Whose a key is.
#[derive(Clone, Debug)]
struct Owner {
    caller: Arc<Caller>,
    state: State,
}

/// Device keys and API keys by themselves.
#[derive(Clone, Debug, Default)]
pub struct Keyring {
    devices: HashMap<DeviceKey, Owner>,
    api_keys: HashMap<ApiKeyHash, Owner>,
    api_keys_on: bool,
}

/// The key is on the ring already: it would say two things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Whose it is.
    pub agent_id: String,
}

impl Keyring {
    /// API keys open nothing until this is said.
    pub(super) fn accept_api_keys(&mut self, on: bool) {
        self.api_keys_on = on;
    }

    pub(super) fn add_device(&mut self, key: DeviceKey, agent: &Agent) -> Result<(), Taken> {
        let owner = owner(agent, key.fingerprint());
        match self.devices.insert(key, owner) {
            None => Ok(()),
            Some(other) => Err(Taken { agent_id: other.caller.agent_id.clone() }),
        }
    }

    pub(super) fn add_api_key(&mut self, hash: ApiKeyHash, agent: &Agent) -> Result<(), Taken> {
        let owner = owner(agent, hash.session_id());
        match self.api_keys.insert(hash, owner) {
            None => Ok(()),
            Some(other) => Err(Taken { agent_id: other.caller.agent_id.clone() }),
        }
    }

    /// The agent that a device key belongs to, suspended or not.
    pub fn owner_of(&self, key: &DeviceKey) -> Option<&str> {
        self.devices.get(key).map(|owner| owner.caller.agent_id.as_str())
    }

    /// Whose device this is. Only what it signed says that the device is asking.
    pub fn device(&self, key: &DeviceKey) -> Result<Arc<Caller>, &'static str> {
        active(self.devices.get(key).ok_or(cause::UNKNOWN_DEVICE)?)
    }

    /// Who has this API key.
    ///
    /// By its hash: what a lookup's time could tell is about hashes, and nobody can choose a key by its hash.
    pub fn api_key(&self, key: &str) -> Result<Arc<Caller>, &'static str> {
        if !self.api_keys_on {
            return Err(cause::API_KEYS_OFF);
        }
        active(self.api_keys.get(&ApiKeyHash::of(key)).ok_or(cause::UNKNOWN_API_KEY)?)
    }
}

/// What the agents file says of the key's owner, under a session that names the key.
fn owner(agent: &Agent, session_id: String) -> Owner {
    let caller = Caller {
        agent_id: agent.id.clone(),
        agent_name: agent.name.clone(),
        session_id,
        roles: agent.roles.clone(),
        permissions: agent.permissions.clone(),
        risk_tier: agent.risk_tier.clone(),
        expires_at: i64::MAX, // until it is taken from the file
        issued_at: None,      // so that revoking the agent ends it too
    };
    Owner { caller: Arc::new(caller), state: agent.state }
}

fn active(owner: &Owner) -> Result<Arc<Caller>, &'static str> {
    match owner.state {
        State::Active => Ok(Arc::clone(&owner.caller)),
        State::Suspended => Err(cause::SUSPENDED),
    }
}
