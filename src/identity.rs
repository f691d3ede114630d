//! Who is asking: credentials of a request in, a [`Caller`] out. Pure: header map and clock are arguments.
//!
//! In reading order:
//! - [`identify`](fn@identify): asks tokens, devices or API keys, by the credential's form.
//! - [`credential`]: which header carries the credential, and which form it has.
//! - [`verify`]: the [`Verifier`], from a token to its caller, with a cache of verdicts.
//! - [`device`]: the signatures of Ollama's own client.
//! - [`api_key`]: static keys for clients that cannot fetch a token.
//! - [`keyring`]: whose device keys and API keys are.
//! - [`token`]: the strict look at a token and at its claims; `jsonwebtoken` does less than it seems.
//! - [`cause`]: the closed set of words that say why a token does not hold.
//! - [`keys`], [`jwks`], [`pem`]: what tokens are verified with; the key fixes the algorithm.
//! - [`signing`], [`own_keys`], [`issuer`]: the proxy's own keys, their rotation, and the tokens they sign.
//! - [`agents`], [`secret`]: who may have a token, their keys and hashed secrets.
//! - [`revocations`]: whose tokens end before they expire.
//! - [`token_endpoint`]: the words of `POST /api/v1/auth/token`, without its socket.
//! - [`guesses`], [`places`]: how fast secrets may be guessed there, and how many may ask at once.
//! - [`private_file`], [`strict_json`]: files that only we may read, JSON that has one meaning.

use crate::wire::Kind;

pub mod agents;
pub mod api_key;
pub mod cause;
pub mod credential;
pub mod device;
pub mod guesses;
mod identify;
pub mod issuer;
pub mod jwks;
pub mod keyring;
pub mod keys;
pub mod own_keys;
pub mod pem;
pub mod places;
pub mod private_file;
pub mod revocations;
pub mod secret;
pub mod signing;
pub mod strict_json;
pub mod token;
pub mod token_endpoint;
pub mod verify;

pub use cause::CAUSES;
pub use identify::{Asked, Identified, identify};
pub use issuer::Issuer;
pub use keys::{Algorithm, KeySet};
pub use secret::Secret;
pub use signing::SigningKey;
pub use verify::{Verifier, VerifierSettings};

/// An agent whose credential was verified. Everything in it was signed by a key that we trust, or stands in the agents file.
#[derive(Clone, Debug, PartialEq)]
pub struct Caller {
    /// `sub` of a token, `id` in the agents file.
    pub agent_id: String,
    /// `name`, where there is one.
    pub agent_name: Option<String>,
    /// `jti` of a token, the fingerprint of a device's key (`SHA256:..`), or what names an API key (`key:..`).
    pub session_id: String,
    /// At most 8 (contract, section 2).
    pub roles: Vec<String>,
    pub permissions: Vec<String>,
    pub risk_tier: Option<String>,
    /// `exp`, seconds since 1970. A key has none, and the last second there is.
    pub expires_at: i64,
    /// `iat`, seconds since 1970, a fraction cut off; `None` where the token does not say. Asked for by revocations of an agent.
    pub issued_at: Option<i64>,
}

/// Why a request has no caller. The client sees one wording for all but the first; the audit sees the cause.
#[derive(Clone, Debug, PartialEq)]
pub enum Rejection {
    /// No credential at all.
    Missing,
    /// A credential that does not hold; the cause is a word of a closed set (a metric label): [`CAUSES`].
    Invalid(&'static str),
}

impl Caller {
    /// Whether the token's permissions cover a class of endpoint (contract, sections 2 and 4); the error is the first
    /// permission that is missing. Egress asks for what inference asks for: the configuration, not the token, opens it.
    pub fn may(&self, kind: Kind) -> Result<(), &'static str> {
        let needed: &[&'static str] = match kind {
            Kind::Read | Kind::List => &["web:read"],
            Kind::Infer | Kind::Egress => &["web:write"],
            Kind::Manage => &["web:read", "web:write", "ollama:admin"],
        };
        match needed.iter().find(|permission| !self.permissions.iter().any(|held| held == *permission)) {
            Some(missing) => Err(missing),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller_with(permissions: &[&str]) -> Caller {
        Caller {
            agent_id: "a".into(),
            agent_name: None,
            session_id: "s".into(),
            roles: vec![],
            permissions: permissions.iter().map(|p| p.to_string()).collect(),
            risk_tier: None,
            expires_at: 0,
            issued_at: None,
        }
    }

    #[test]
    fn permissions_go_by_the_class_of_the_endpoint() {
        let reader = caller_with(&["web:read"]);
        assert_eq!(reader.may(Kind::Read), Ok(()));
        assert_eq!(reader.may(Kind::List), Ok(()));
        assert_eq!(reader.may(Kind::Infer), Err("web:write"));
        assert_eq!(reader.may(Kind::Egress), Err("web:write"));
        assert_eq!(reader.may(Kind::Manage), Err("web:write"));

        let writer = caller_with(&["web:write"]);
        assert_eq!(writer.may(Kind::Read), Err("web:read"));
        assert_eq!(writer.may(Kind::Infer), Ok(()));
        assert_eq!(writer.may(Kind::Egress), Ok(()));
        assert_eq!(writer.may(Kind::Manage), Err("web:read"));
    }

    #[test]
    fn management_needs_both_permissions_and_ollama_admin() {
        assert_eq!(caller_with(&["web:read", "web:write"]).may(Kind::Manage), Err("ollama:admin"));
        assert_eq!(caller_with(&["ollama:admin"]).may(Kind::Manage), Err("web:read"));
        assert_eq!(caller_with(&["web:read", "web:write", "ollama:admin"]).may(Kind::Manage), Ok(()));
    }

    #[test]
    fn a_permission_is_compared_whole() {
        assert_eq!(caller_with(&["web:readers", "WEB:READ", "web:*"]).may(Kind::Read), Err("web:read"));
    }
}
