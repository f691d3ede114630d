//! What a reload swaps, all or nothing: loaded once for each request, so that no request sees half of a change.

use std::sync::Arc;

use bytes::Bytes;

use crate::identity::agents::Agents;
use crate::identity::{Issuer, Verifier};
use crate::policy::Policy;

#[derive(Clone)]
pub struct Snapshot {
    pub verifier: Arc<Verifier>,
    /// The built-in issuer. `None` where tokens come from elsewhere and no key to sign with is configured.
    pub issuer: Option<Arc<Issuer>>,
    pub agents: Arc<Agents>,
    /// `/.well-known/jwks.json`, ready to send.
    pub jwks: Bytes,
    pub policy: Arc<Policy>,
}
