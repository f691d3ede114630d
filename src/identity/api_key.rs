//! Static API keys, for clients that cannot fetch a token. Off unless `identity.api_keys` turns them on.
//!
//! A key has 256 random bits, so it is stored as a plain SHA-256 and looked up by it: there is nothing to guess, and argon2, which
//! is for what people choose, would cost 20 ms with each request (`docs/adr/0036-device-and-api-keys.md`).

use sha2::{Digest, Sha256};

use super::secret::Secret;

/// What every key begins with, so that scanners for leaked secrets find it and no token is ever taken for one.
pub const PREFIX: &str = "bop_";

/// Longest name of a key, in characters.
pub const MAX_NAME_CHARS: usize = 64;

/// SHA-256 of a key. It opens nothing, but it belongs into no log either.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApiKeyHash([u8; 32]);

impl ApiKeyHash {
    pub fn of(key: &str) -> ApiKeyHash {
        ApiKeyHash(Sha256::digest(key.as_bytes()).into())
    }

    /// 64 lower-case hexadecimal digits; the error says what to do and never repeats the text.
    pub fn parse(text: &str) -> Result<ApiKeyHash, &'static str> {
        const REMEDY: &str =
            "is not a SHA-256 in 64 lower-case hexadecimal digits: make a key with `agent add-api-key`";
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(REMEDY);
        }
        let mut hash = [0_u8; 32];
        for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| REMEDY)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| REMEDY)?;
        }
        Ok(ApiKeyHash(hash))
    }

    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Names the key in records and revocations without giving its hash away: `key:` and 16 digits.
    pub fn session_id(&self) -> String {
        format!("key:{}", &self.to_hex()[..16])
    }
}

impl std::fmt::Debug for ApiKeyHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeyHash({})", self.session_id())
    }
}

/// A fresh key of 256 random bits: the prefix and 43 characters of base64url.
pub fn random() -> Secret {
    Secret::new(format!("{PREFIX}{}", Secret::random().expose()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_prefix_and_256_random_bits() {
        let (one, other) = (random(), random());
        assert!(one.expose().starts_with("bop_") && one.expose().len() == 4 + 43);
        assert!(one.expose() != other.expose());
        assert!(one.expose()[4..].bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
    }

    #[test]
    fn a_hash_is_read_as_it_is_written() {
        let hash = ApiKeyHash::of("bop_test");
        assert_eq!(ApiKeyHash::parse(&hash.to_hex()), Ok(hash));
        // By sha256sum.
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(ApiKeyHash::of("").to_hex(), empty);
        assert_eq!(ApiKeyHash::of("").session_id(), "key:e3b0c44298fc1c14");
        assert_eq!(format!("{:?}", ApiKeyHash::of("")), "ApiKeyHash(key:e3b0c44298fc1c14)");
    }

    #[test]
    fn what_is_no_hash_is_refused_without_repeating_it() {
        let hash = ApiKeyHash::of("x").to_hex();
        for text in [
            "",
            "bop_x",
            &hash[1..],
            &hash.to_uppercase(),
            &format!("{hash}0"),
            &hash.replace('a', "+"),
            &"é".repeat(32),
        ] {
            let refused = ApiKeyHash::parse(text).unwrap_err();
            assert!(text.is_empty() || !refused.contains(text), "{text}");
        }
    }
}
