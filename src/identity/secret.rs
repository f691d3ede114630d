//! A secret in memory, and its hash in a file.

use argon2::{Argon2, Params, PasswordHash, PasswordHasher, PasswordVerifier, password_hash::SaltString};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::{RngCore, rngs::OsRng};
use serde::{Deserialize, Serialize};

/// argon2id parameters: OWASP's second choice (password storage cheat sheet: 19 MiB, two passes, one lane), which is
/// also the crate's default. About 20 ms and 19 MiB a check: whoever checks must bound how many run at once.
pub const ARGON2_MEMORY_KIB: u32 = 19_456;
pub const ARGON2_PASSES: u32 = 2;
pub const ARGON2_LANES: u32 = 1;

/// A client secret. It has no `Debug`, `Display` or `Serialize`, so that no log line or record can carry it.
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Secret {
        Secret(text)
    }

    /// 256 random bits of the operating system as base64url, 43 characters.
    pub fn random() -> Secret {
        let mut bytes = [0_u8; 32];
        OsRng.fill_bytes(&mut bytes);
        Secret(URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The text, for the one place that shows or checks it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// A stored argon2id hash in PHC form, with exactly this module's parameters.
///
/// Others are refused rather than honoured: an agent whose check takes longer or shorter than that of an unknown id
/// tells a stranger that the id exists.
///
/// It is serialised for the agents file and for the proxy's own control socket, and read only if it is a good one.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretHash(String);

impl TryFrom<String> for SecretHash {
    type Error = &'static str;

    fn try_from(text: String) -> Result<SecretHash, &'static str> {
        SecretHash::parse(&text)
    }
}

impl From<SecretHash> for String {
    fn from(hash: SecretHash) -> String {
        hash.0
    }
}

impl std::fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretHash(..)")
    }
}

impl SecretHash {
    /// Hashes with a fresh salt. Slow on purpose.
    pub fn of(secret: &Secret) -> SecretHash {
        let salt = SaltString::generate(&mut OsRng);
        let hash = hasher()
            .hash_password(secret.expose().as_bytes(), &salt)
            .expect("parameters and salt are ours and in argon2's bounds");
        SecretHash(hash.to_string())
    }

    /// Reads a hash; the error says what to do and never repeats the text.
    pub fn parse(text: &str) -> Result<SecretHash, &'static str> {
        const REMEDY: &str = "is not an argon2id hash with m=19456,t=2,p=1 (`$argon2id$v=19$m=19456,t=2,p=1$<salt>$<hash>`): \
                              make a new one";
        let hash = PasswordHash::new(text).map_err(|_| REMEDY)?;
        let ours = hash.algorithm == argon2::ARGON2ID_IDENT
            && hash.version == Some(argon2::Version::V0x13.into())
            && hash.salt.is_some()
            && hash.hash.is_some_and(|output| output.len() == Params::DEFAULT_OUTPUT_LEN)
            && hash.params.iter().count() == 3
            && hash.params.get_decimal("m") == Some(ARGON2_MEMORY_KIB)
            && hash.params.get_decimal("t") == Some(ARGON2_PASSES)
            && hash.params.get_decimal("p") == Some(ARGON2_LANES);
        if ours { Ok(SecretHash(text.to_owned())) } else { Err(REMEDY) }
    }

    /// A hash that no secret has, for the check of an id that does not exist: the same work as a real one.
    pub fn of_nobody() -> SecretHash {
        SecretHash::of(&Secret::random())
    }

    /// Whether the secret has this hash. Slow on purpose; compares in constant time.
    pub fn matches(&self, secret: &Secret) -> bool {
        PasswordHash::new(&self.0).is_ok_and(|hash| hasher().verify_password(secret.expose().as_bytes(), &hash).is_ok())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn hasher() -> Argon2<'static> {
    let params = Params::new(ARGON2_MEMORY_KIB, ARGON2_PASSES, ARGON2_LANES, None)
        .expect("the parameters are constants in argon2's bounds");
    Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_matches_its_own_hash_only() {
        let secret = Secret::random();
        let hash = SecretHash::of(&secret);
        assert!(hash.matches(&secret));
        assert!(!hash.matches(&Secret::random()));
        assert!(!hash.matches(&Secret::new(String::new())));
        assert_eq!(SecretHash::parse(hash.as_str()), Ok(hash.clone()));
        assert!(hash.as_str().starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "the documented parameters are written");
    }

    #[test]
    fn secrets_are_43_characters_and_never_twice_the_same() {
        let (one, other) = (Secret::random(), Secret::random());
        assert_eq!(one.expose().len(), 43);
        assert!(one.expose() != other.expose());
    }

    #[test]
    fn a_hash_with_other_parameters_is_refused() {
        let good = SecretHash::of_nobody();
        for (from, to) in
            [("argon2id", "argon2i"), ("m=19456", "m=8"), ("t=2", "t=1"), ("p=1", "p=2"), ("v=19", "v=16")]
        {
            let other = good.as_str().replace(from, to);
            assert_ne!(other, good.as_str());
            assert!(SecretHash::parse(&other).is_err(), "{from} -> {to}");
        }
        for text in ["", "secret", "$2y$10$abcdefghijklmnopqrstuv", "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ"] {
            assert!(SecretHash::parse(text).is_err(), "{text}");
        }
    }
}
