//! What a reload swaps, all or nothing: loaded once for each request, so that no request sees half of a change.
//!
//! Files, commands and the key set's URL change it at the same time: whoever swaps says only what is new (`ArcSwap::rcu`), and never
//! stores a whole that was loaded a while ago.

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use crate::identity::agents::Agents;
use crate::identity::revocations::Revocations;
use crate::identity::{Caller, Issuer, Verifier};
use crate::policy::Policy;

#[derive(Clone)]
pub struct Snapshot {
    pub verifier: Arc<Verifier>,
    /// The built-in issuer. `None` where tokens come from elsewhere and no key to sign with is configured.
    pub issuer: Option<Arc<Issuer>>,
    pub agents: Arc<Agents>,
    pub revocations: Arc<Revocations>,
    /// `/.well-known/jwks.json`, ready to send: the public keys that tokens are verified with (docs/adr/0026-keys-by-url.md).
    pub jwks: Bytes,
    /// When the next old key of our own ends, and the keys must be read again.
    pub next_key_end: Option<Timestamp>,
    pub policy: Arc<Policy>,
}

impl Snapshot {
    /// With other keys; what the old verifier had cached is forgotten with it.
    pub fn with_verifier(&self, verifier: Arc<Verifier>) -> Snapshot {
        Snapshot { jwks: Bytes::from(verifier.published()), verifier, ..self.clone() }
    }

    /// Whether a caller whose token holds is turned away all the same: its session or agent was revoked, or its agent is suspended.
    /// Two lookups by hash.
    pub fn turns_away(&self, caller: &Caller) -> bool {
        self.revocations.name(caller) || self.agents.is_suspended(&caller.agent_id)
    }
}
