//! The built-in issuer: tokens in the shape of Behavry's (contract, section 2), and a look into any token.

use std::sync::Arc;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::token;
use super::{Caller, SigningKey, Verifier};

/// Life of a token unless something else is asked for, in seconds: Behavry's hour.
pub const DEFAULT_TTL_S: i64 = 3600;
/// Longest life of a token, in seconds (a year): what is forgotten must end by itself.
pub const MAX_TTL_S: i64 = 366 * 24 * 3600;

/// Whose token to make, and what it may do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Claims {
    /// The agent's id.
    pub sub: String,
    pub name: Option<String>,
    /// At most 8.
    pub roles: Vec<String>,
    pub permissions: Vec<String>,
    pub risk_tier: Option<String>,
    /// `jti`; a fresh UUID if `None`.
    pub session: Option<String>,
    /// Seconds; the issuer's own if `None`.
    pub ttl_s: Option<i64>,
}

/// What was made, beside the token.
#[derive(Clone, Debug, PartialEq)]
pub struct Minted {
    pub session_id: String,
    pub expires_in_s: i64,
}

/// Why no token was made: it would be refused by our own verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MintError {
    /// `sub`, the session, a role, a permission, the name or the risk tier is empty, too long or has control
    /// characters.
    Text(&'static str),
    TooManyRoles,
    TooManyPermissions,
    /// Not between 1 second and [`MAX_TTL_S`].
    Ttl,
    /// The token would be longer than the verifier reads.
    TooLong,
    Signing,
}

impl std::fmt::Display for MintError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MintError::Text(what) => {
                write!(f, "the {what} must not be empty, very long, or hold control characters")
            }
            MintError::TooManyRoles => write!(f, "more than {} roles", token::MAX_ROLES),
            MintError::TooManyPermissions => write!(f, "more than {} permissions", token::MAX_PERMISSIONS),
            MintError::Ttl => write!(f, "the life of a token is 1 to {MAX_TTL_S} seconds"),
            MintError::TooLong => f.write_str("the token would be longer than 8 KiB: use fewer permissions"),
            MintError::Signing => f.write_str("the signing key does not sign"),
        }
    }
}

impl std::error::Error for MintError {}

/// Makes tokens.
#[derive(Debug)]
pub struct Issuer {
    key: SigningKey,
    name: String,
    audience: Option<String>,
    ttl_s: i64,
}

impl Issuer {
    /// `name` is `iss`; `ttl_s` the life of a token in seconds (default [`DEFAULT_TTL_S`]).
    pub fn new(key: SigningKey, name: impl Into<String>, ttl_s: i64) -> Issuer {
        Issuer { key, name: name.into(), audience: None, ttl_s }
    }

    /// Tokens get this `aud`: needed once the verifier has an audience.
    pub fn with_audience(self, audience: Option<String>) -> Issuer {
        Issuer { audience, ..self }
    }

    pub fn key(&self) -> &SigningKey {
        &self.key
    }

    /// A token for an agent, from `now_s` seconds since 1970. RS256 takes about two milliseconds.
    pub fn mint(&self, claims: &Claims, now_s: i64) -> Result<(String, Minted), MintError> {
        let session_id = claims.session.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
        let expires_in_s = claims.ttl_s.unwrap_or(self.ttl_s);
        check(claims, &session_id, expires_in_s)?;
        let mut members = Map::new();
        members.insert("sub".into(), json!(claims.sub));
        members.insert("jti".into(), json!(session_id));
        members.insert("iss".into(), json!(self.name));
        members.insert("iat".into(), json!(now_s));
        members.insert("exp".into(), json!(now_s.saturating_add(expires_in_s)));
        members.insert("roles".into(), json!(claims.roles));
        members.insert("permissions".into(), json!(claims.permissions));
        if let Some(audience) = &self.audience {
            members.insert("aud".into(), json!(audience));
        }
        if let Some(name) = &claims.name {
            members.insert("name".into(), json!(name));
        }
        if let Some(tier) = &claims.risk_tier {
            members.insert("risk_tier".into(), json!(tier));
        }
        let token = self.key.sign_token(&Value::Object(members)).map_err(|_| MintError::Signing)?;
        if token.len() > super::credential::MAX_TOKEN_BYTES {
            return Err(MintError::TooLong);
        }
        Ok((token, Minted { session_id, expires_in_s }))
    }
}

/// What is in a token. Not a word of it is believed; `verdict` says whether it could be.
#[derive(Clone, Debug, PartialEq)]
pub struct Inspection {
    /// `None` where the token cannot be taken apart.
    pub header: Option<Value>,
    pub claims: Option<Value>,
    /// Whether the verifier accepts it, and the cause if not; `None` without a verifier.
    pub verdict: Option<Result<Arc<Caller>, &'static str>>,
}

/// Looks into a token for its owner (`token inspect`), and asks a verifier about it at a time, if there is one.
pub fn inspect(token: &str, check: Option<(&Verifier, i64)>) -> Inspection {
    let token = token.trim();
    let verdict = check.map(|(verifier, now_s)| verifier.verify_token(token, now_s));
    // `token::Unverified` refuses what a verifier must not honour; its owner still wants to see that.
    let mut segments = token.split('.').map(|segment| {
        let bytes = URL_SAFE_NO_PAD.decode(segment).ok()?;
        serde_json::from_slice::<Value>(&bytes).ok()
    });
    let (header, claims) = (segments.next().flatten(), segments.next().flatten());
    Inspection { header, claims, verdict }
}

fn check(claims: &Claims, session_id: &str, expires_in_s: i64) -> Result<(), MintError> {
    let plain = |what, text: &str, max_chars| {
        if token::is_plain(text, max_chars) { Ok(()) } else { Err(MintError::Text(what)) }
    };
    plain("agent id", &claims.sub, token::MAX_ID_CHARS)?;
    plain("session id", session_id, token::MAX_ID_CHARS)?;
    claims.roles.iter().try_for_each(|role| plain("role", role, token::MAX_WORD_CHARS))?;
    claims.permissions.iter().try_for_each(|permission| plain("permission", permission, token::MAX_WORD_CHARS))?;
    claims.name.iter().try_for_each(|name| plain("name", name, token::MAX_WORD_CHARS))?;
    claims.risk_tier.iter().try_for_each(|tier| plain("risk tier", tier, token::MAX_WORD_CHARS))?;
    if claims.roles.len() > token::MAX_ROLES {
        return Err(MintError::TooManyRoles);
    }
    if claims.permissions.len() > token::MAX_PERMISSIONS {
        return Err(MintError::TooManyPermissions);
    }
    if !(1..=MAX_TTL_S).contains(&expires_in_s) {
        return Err(MintError::Ttl);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Algorithm, KeySet, VerifierSettings, cause};

    fn issuer() -> Issuer {
        Issuer::new(SigningKey::generate(Algorithm::EdDsa).unwrap(), "behavry", DEFAULT_TTL_S)
    }

    fn verifier(issuer: &Issuer, audience: Option<&str>) -> Verifier {
        let keys = KeySet::new(vec![issuer.key().verification_key()]).unwrap();
        let settings =
            VerifierSettings { issuer: "behavry".into(), audience: audience.map(str::to_owned), leeway_s: 5 };
        Verifier::new(keys, settings)
    }

    fn claims() -> Claims {
        Claims {
            sub: "agent-1".into(),
            name: Some("Demo".into()),
            roles: vec!["internal".into()],
            permissions: vec!["web:read".into()],
            risk_tier: Some("medium".into()),
            session: Some("s-1".into()),
            ttl_s: None,
        }
    }

    #[test]
    fn a_minted_token_verifies_as_the_agent_it_was_made_for() {
        let issuer = issuer();
        let (token, minted) = issuer.mint(&claims(), 1000).unwrap();
        assert_eq!(minted, Minted { session_id: "s-1".into(), expires_in_s: 3600 });
        let caller = verifier(&issuer, None).verify_token(&token, 1000).unwrap();
        assert_eq!(caller.agent_id, "agent-1");
        assert_eq!(caller.agent_name.as_deref(), Some("Demo"));
        assert_eq!(caller.session_id, "s-1");
        assert_eq!(caller.roles, ["internal"]);
        assert_eq!(caller.permissions, ["web:read"]);
        assert_eq!(caller.risk_tier.as_deref(), Some("medium"));
        assert_eq!(caller.expires_at, 4600);
    }

    #[test]
    fn each_token_without_a_session_gets_its_own() {
        let issuer = issuer();
        let anonymous = Claims { session: None, ..claims() };
        let (one, other) = (issuer.mint(&anonymous, 0).unwrap().1, issuer.mint(&anonymous, 0).unwrap().1);
        assert_ne!(one.session_id, other.session_id);
        assert!(Uuid::parse_str(&one.session_id).is_ok());
    }

    #[test]
    fn what_the_verifier_would_refuse_is_not_minted() {
        let issuer = issuer();
        let refused = |change: &dyn Fn(&mut Claims)| {
            let mut claims = claims();
            change(&mut claims);
            issuer.mint(&claims, 1000).unwrap_err()
        };
        assert_eq!(refused(&|c| c.sub = String::new()), MintError::Text("agent id"));
        assert_eq!(refused(&|c| c.sub = "a\nb".into()), MintError::Text("agent id"));
        assert_eq!(refused(&|c| c.session = Some(String::new())), MintError::Text("session id"));
        assert_eq!(refused(&|c| c.roles = vec!["r".repeat(129)]), MintError::Text("role"));
        assert_eq!(refused(&|c| c.roles = vec!["r".into(); 9]), MintError::TooManyRoles);
        assert_eq!(refused(&|c| c.permissions = vec!["r".into(); 65]), MintError::TooManyPermissions);
        assert_eq!(refused(&|c| c.permissions = vec!["r".repeat(128); 64]), MintError::TooLong);
        for ttl_s in [0, -1, MAX_TTL_S + 1, i64::MIN, i64::MAX] {
            assert_eq!(refused(&|c| c.ttl_s = Some(ttl_s)), MintError::Ttl);
        }
    }

    #[test]
    fn an_issuer_with_an_audience_serves_a_verifier_that_wants_one() {
        let issuer = issuer().with_audience(Some("ollama".into()));
        let (token, _) = issuer.mint(&claims(), 1000).unwrap();
        assert!(verifier(&issuer, Some("ollama")).verify_token(&token, 1000).is_ok());
        assert_eq!(verifier(&issuer, Some("other")).verify_token(&token, 1000), Err(cause::WRONG_AUDIENCE));
    }

    #[test]
    fn inspection_shows_a_token_and_says_whether_it_holds() {
        let issuer = issuer();
        let verifier = verifier(&issuer, None);
        let (token, _) = issuer.mint(&claims(), 1000).unwrap();
        let seen = inspect(&format!("{token}\n"), Some((&verifier, 1000)));
        assert_eq!(seen.header.unwrap()["alg"], "EdDSA");
        assert_eq!(seen.claims.unwrap()["sub"], "agent-1");
        assert!(seen.verdict.unwrap().is_ok());
        assert_eq!(inspect(&token, Some((&verifier, 9000))).verdict, Some(Err(cause::EXPIRED)));
        assert_eq!(inspect(&token, None).verdict, None);
        let nonsense = inspect("nonsense", Some((&verifier, 0)));
        assert_eq!((nonsense.header, nonsense.claims), (None, None));
        assert_eq!(nonsense.verdict, Some(Err(cause::MALFORMED)));
    }
}
