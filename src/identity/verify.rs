//! From a token to its caller.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::keys::{KeySet, VerificationKey};
use super::token::{self, Claimed, Expected, Unverified};
use super::{Caller, cause, credential};

/// Verdicts kept, over all shards. One is some 500 bytes, so 2 MiB at most.
pub const CACHED_TOKENS: usize = 4096;
/// Locks among which the verdicts are spread, so that worker threads seldom meet.
const SHARDS: usize = 16;

/// What a token must say to be one of ours.
#[derive(Clone, Debug)]
pub struct VerifierSettings {
    /// `iss`; Behavry's is `behavry`.
    pub issuer: String,
    /// `aud`. Once configured it is required; without it a token that has one is refused (RFC 7519 section 4.1.3).
    pub audience: Option<String>,
    /// Seconds granted to `exp` and `nbf` for clocks that differ.
    ///
    /// `identity.leeway_s` of the configuration says how many, and why; there is no other default.
    pub leeway_s: u64,
}

/// Verifies tokens with the keys that it was made with. A reload makes a new one, and so forgets every cached verdict.
pub struct Verifier {
    /// `None`: they are still to be fetched.
    keys: Option<KeySet>,
    expected: Expected,
    leeway_s: i64,
    cache: Cache,
}

impl Verifier {
    pub fn new(keys: KeySet, settings: VerifierSettings) -> Verifier {
        Verifier::made(Some(keys), settings)
    }

    /// One that has no keys yet: every token that is well-formed fails with [`cause::NO_KEYS`].
    pub fn awaiting_keys(settings: VerifierSettings) -> Verifier {
        Verifier::made(None, settings)
    }

    fn made(keys: Option<KeySet>, settings: VerifierSettings) -> Verifier {
        Verifier {
            keys,
            expected: Expected { issuer: settings.issuer, audience: settings.audience },
            leeway_s: i64::try_from(settings.leeway_s).unwrap_or(i64::MAX),
            cache: Cache::default(),
        }
    }

    pub fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Whether these are the keys that it verifies with: then another verifier would only forget what this one has cached.
    pub fn verifies_with(&self, keys: &KeySet) -> bool {
        self.keys.as_ref().is_some_and(|own| own.published() == keys.published())
    }

    /// The public keys that it verifies with, as a JWKS document; an empty one while it has none.
    pub fn published(&self) -> String {
        self.keys.as_ref().map_or_else(|| r#"{"keys":[]}"#.to_owned(), KeySet::published)
    }

    /// The caller of a token, at `now_s` seconds since 1970 (any value: a clock before 1970 only refuses or admits). The error is one
    /// of [`CAUSES`](super::CAUSES).
    ///
    /// The first sight of a token costs a signature check (microseconds: RS256 124, ES256 167, EdDSA 36, HS256 2; bench/RESULTS.md),
    /// later ones a hash of it (1).
    pub fn verify_token(&self, token: &str, now_s: i64) -> Result<Arc<Caller>, &'static str> {
        if token.len() > credential::MAX_TOKEN_BYTES {
            return Err(cause::OVERSIZED);
        }
        // Of the whole token: two tokens that differ in one bit of the signature are two tokens.
        let digest: TokenDigest = Sha256::digest(token.as_bytes()).into();
        if let Some(verdict) = self.cache.find(&digest) {
            token::holds_at(verdict.caller.expires_at, verdict.not_before, now_s, self.leeway_s)?;
            return Ok(verdict.caller);
        }
        let Claimed { caller, not_before } = self.judge(token)?;
        token::holds_at(caller.expires_at, not_before, now_s, self.leeway_s)?;
        let verdict = Verdict { caller: Arc::new(caller), not_before };
        self.cache.keep(digest, verdict.clone(), now_s.saturating_sub(self.leeway_s));
        Ok(verdict.caller)
    }

    /// Everything about a token but the time. Claims are not read before the signature holds.
    fn judge(&self, token: &str) -> Result<Claimed, &'static str> {
        let unverified = Unverified::read(token)?;
        let algorithm = unverified.algorithm()?;
        let kid = unverified.kid()?;
        // A key without a name (PEM, secret) is tried whatever name the issuer gives it; there are at most MAX_KEYS.
        let named = |key: &&VerificationKey| kid.is_none() || key.kid().is_none() || key.kid() == kid;
        let Some(keys) = &self.keys else { return Err(cause::NO_KEYS) };
        let mut candidates = keys.keys().iter().filter(named).peekable();
        if candidates.peek().is_none() {
            return Err(cause::UNKNOWN_KEY);
        }
        let mut candidates = candidates.filter(|key| key.algorithm().as_str() == algorithm).peekable();
        if candidates.peek().is_none() {
            return Err(cause::WRONG_ALGORITHM);
        }
        if !candidates.any(|key| key.verifies(unverified.message, &unverified.signature)) {
            return Err(cause::BAD_SIGNATURE);
        }
        token::caller(unverified.claims()?, &self.expected)
    }
}

type TokenDigest = [u8; 32];

#[derive(Clone)]
struct Verdict {
    caller: Arc<Caller>,
    not_before: Option<i64>,
}

/// Verified tokens by their hash. Only tokens with a good signature get in, so a stranger cannot push anything out.
#[derive(Default)]
struct Cache {
    shards: [Mutex<HashMap<TokenDigest, Verdict>>; SHARDS],
}

impl Cache {
    fn find(&self, digest: &TokenDigest) -> Option<Verdict> {
        self.shard(digest).lock().get(digest).cloned()
    }

    /// Keeps a verdict; a full shard first drops what expired before `dead_before_s`, else what expires first.
    fn keep(&self, digest: TokenDigest, verdict: Verdict, dead_before_s: i64) {
        let mut shard = self.shard(&digest).lock();
        if shard.len() >= CACHED_TOKENS / SHARDS {
            shard.retain(|_, verdict| verdict.caller.expires_at > dead_before_s);
        }
        if shard.len() >= CACHED_TOKENS / SHARDS {
            let first = shard.iter().min_by_key(|(_, verdict)| verdict.caller.expires_at).map(|(digest, _)| *digest);
            if let Some(first) = first {
                shard.remove(&first);
            }
        }
        shard.insert(digest, verdict);
    }

    fn shard(&self, digest: &TokenDigest) -> &Mutex<HashMap<TokenDigest, Verdict>> {
        &self.shards[usize::from(digest[0]) % SHARDS]
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::issuer::{Claims, Issuer};
    use crate::identity::{Algorithm, SigningKey};

    fn pair() -> (Issuer, Verifier) {
        let key = SigningKey::generate(Algorithm::EdDsa).unwrap();
        let settings = VerifierSettings { issuer: "behavry".into(), audience: None, leeway_s: 5 };
        let verifier = Verifier::new(KeySet::new(vec![key.verification_key()]).unwrap(), settings);
        (Issuer::new(key, "behavry", 3600), verifier)
    }

    fn claims(sub: &str, ttl_s: i64) -> Claims {
        Claims { sub: sub.into(), roles: vec!["r".into()], ttl_s: Some(ttl_s), ..Claims::default() }
    }

    #[test]
    fn a_token_seen_before_is_answered_from_the_cache() {
        let (issuer, verifier) = pair();
        let (token, _) = issuer.mint(&claims("a", 60), 1000).unwrap();
        let first = verifier.verify_token(&token, 1000).unwrap();
        let second = verifier.verify_token(&token, 1001).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(verifier.cache.len(), 1);
    }

    #[test]
    fn a_cached_verdict_does_not_outlive_its_token() {
        let (issuer, verifier) = pair();
        let (token, _) = issuer.mint(&claims("a", 60), 1000).unwrap();
        assert!(verifier.verify_token(&token, 1000).is_ok());
        assert!(verifier.verify_token(&token, 1064).is_ok(), "5 s of leeway");
        assert_eq!(verifier.verify_token(&token, 1065), Err(cause::EXPIRED));
    }

    #[test]
    fn a_token_that_was_refused_is_not_cached() {
        let (issuer, verifier) = pair();
        let (token, _) = issuer.mint(&claims("a", 60), 1000).unwrap();
        let mut forged = token.clone();
        let middle = token.rfind('.').unwrap() + 10;
        let other = if &token[middle..=middle] == "A" { "B" } else { "A" };
        forged.replace_range(middle..=middle, other);
        assert_eq!(verifier.verify_token(&forged, 1000), Err(cause::BAD_SIGNATURE));
        assert_eq!(verifier.verify_token(&token, 9000), Err(cause::EXPIRED));
        assert_eq!(verifier.cache.len(), 0);
    }

    #[test]
    fn a_cached_token_with_another_signature_is_another_token() {
        let (issuer, verifier) = pair();
        let (token, _) = issuer.mint(&claims("a", 60), 1000).unwrap();
        assert!(verifier.verify_token(&token, 1000).is_ok());
        let signature = token.rfind('.').unwrap() + 1;
        for place in [signature, signature + 40, token.len() - 2] {
            let mut forged = token.clone();
            let other = if &token[place..=place] == "A" { "B" } else { "A" };
            forged.replace_range(place..=place, other);
            assert_eq!(verifier.verify_token(&forged, 1000), Err(cause::BAD_SIGNATURE));
        }
        assert_eq!(verifier.cache.len(), 1);
    }

    #[test]
    fn another_set_of_keys_knows_nothing_of_what_was_verified_before() {
        let (issuer, verifier) = pair();
        let (token, _) = issuer.mint(&claims("a", 60), 1000).unwrap();
        assert!(verifier.verify_token(&token, 1000).is_ok());
        let (_, renewed) = pair();
        assert_eq!(renewed.verify_token(&token, 1000), Err(cause::UNKNOWN_KEY));
    }

    #[test]
    fn the_cache_is_bounded_and_drops_what_expires_first() {
        let cache = Cache::default();
        for number in 0_u32..20_000 {
            let caller = Caller {
                agent_id: String::new(),
                agent_name: None,
                session_id: String::new(),
                roles: vec![],
                permissions: vec![],
                risk_tier: None,
                expires_at: i64::from(number) + 1,
                issued_at: None,
            };
            let verdict = Verdict { caller: Arc::new(caller), not_before: None };
            cache.keep(Sha256::digest(number.to_be_bytes()).into(), verdict, 0);
        }
        assert!(cache.len() <= CACHED_TOKENS);
        assert!(cache.find(&Sha256::digest(19_999_u32.to_be_bytes()).into()).is_some());
        assert!(cache.find(&Sha256::digest(0_u32.to_be_bytes()).into()).is_none());
    }
}
