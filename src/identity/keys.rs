//! What tokens are verified with. A key fixes its algorithm: nothing in a token can choose another.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{DecodingKey, crypto::rust_crypto};
use p256::elliptic_curve::sec1::ToEncodedPoint;
use rsa::pkcs1::der::Decode as _;
use rsa::pkcs8::{DecodePublicKey, SubjectPublicKeyInfoRef};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{jwks, pem};

/// Least length of a shared secret, in bytes: the output of SHA-256 (RFC 7518 section 3.2).
pub const MIN_SECRET_BYTES: usize = 32;
/// Least RSA modulus, in bits (RFC 7518 section 3.3).
pub const MIN_RSA_BITS: usize = 2048;
/// Largest RSA modulus, in bits: the `rsa` crate (0.9, `RsaPublicKey::MAX_SIZE`) refuses more at the first signature.
pub const MAX_RSA_BITS: usize = 4096;
/// Most keys in a set: a token without `kid` is tried against each of its algorithm, so this bounds the work of a
/// forgery.
pub const MAX_KEYS: usize = 16;

/// How tokens are signed. `Rs256` is the default because it is Behavry's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Algorithm {
    #[default]
    Rs256,
    Es256,
    EdDsa,
    /// A secret shared with the issuer.
    Hs256,
}

impl Algorithm {
    /// The word in a token's header (RFC 7518 section 3.1, RFC 8037).
    pub fn as_str(self) -> &'static str {
        match self {
            Algorithm::Rs256 => "RS256",
            Algorithm::Es256 => "ES256",
            Algorithm::EdDsa => "EdDSA",
            Algorithm::Hs256 => "HS256",
        }
    }
}

impl std::str::FromStr for Algorithm {
    type Err = KeyError;

    /// Reads the configuration's word (`BEHAVRY_JWT_ALGORITHM`).
    fn from_str(word: &str) -> Result<Self, KeyError> {
        [Algorithm::Rs256, Algorithm::Es256, Algorithm::EdDsa, Algorithm::Hs256]
            .into_iter()
            .find(|algorithm| algorithm.as_str() == word)
            .ok_or(KeyError::UnknownAlgorithm)
    }
}

/// Why a key is not used. The words say what to do and never repeat the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyError {
    Empty,
    NotPem,
    SeveralInPem,
    Encrypted,
    PrivateWherePublic,
    PublicWherePrivate,
    Certificate,
    Unsupported,
    RsaTooSmall { bits: usize },
    RsaTooLarge { bits: usize },
    RsaExponent,
    SmallOrder,
    SecretTooShort { bytes: usize },
    PemAsSecret,
    NotAJwks,
    NoUsableKey,
    TooManyKeys,
    PrivateInJwks,
    UnknownAlgorithm,
    SecretCannotBeMade,
    SelfCheck,
}

impl std::fmt::Display for KeyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KeyError::Empty => f.write_str("the key is set but empty: give a key, or unset it to use the built-in one"),
            KeyError::NotPem => f.write_str(
                "not a key in PEM form: it should begin with `-----BEGIN PUBLIC KEY-----` or `-----BEGIN PRIVATE KEY-----`",
            ),
            KeyError::SeveralInPem => {
                f.write_str("several keys in one PEM text: keep one, or put all of them into a JWKS document")
            }
            KeyError::Encrypted => f.write_str(
                "the private key is encrypted: write it without a passphrase (`openssl pkcs8 -topk8 -nocrypt -in <file>`)",
            ),
            KeyError::PrivateWherePublic => f.write_str(
                "a private key was given where a public key belongs: give its public half (`openssl pkey -in <file> \
                 -pubout`), and treat the private key as disclosed if others could read it here",
            ),
            KeyError::PublicWherePrivate => {
                f.write_str("a public key was given where a private key belongs: only a private key can sign")
            }
            KeyError::Certificate => f.write_str(
                "a certificate was given where a public key belongs: take its key (`openssl x509 -in <file> -noout -pubkey`)",
            ),
            KeyError::Unsupported => f.write_str(
                "this kind of key is not supported: use RSA (2048 to 4096 bits), EC on P-256, or Ed25519",
            ),
            KeyError::RsaTooSmall { bits } => write!(
                f,
                "the RSA key has {bits} bits and is too weak: use {MIN_RSA_BITS} at least (`openssl genrsa 3072`)"
            ),
            KeyError::RsaTooLarge { bits } => {
                write!(f, "the RSA key has {bits} bits: use {MAX_RSA_BITS} at most, or Ed25519")
            }
            KeyError::RsaExponent => {
                f.write_str("the RSA key has an unsafe public exponent: make a new key with 65537")
            }
            KeyError::SmallOrder => {
                f.write_str("the Ed25519 key is a point of small order, for which anyone can sign: make a new key")
            }
            KeyError::SecretTooShort { bytes } => write!(
                f,
                "the shared secret has {bytes} bytes: use {MIN_SECRET_BYTES} random bytes at least (`openssl rand -base64 48`)"
            ),
            KeyError::PemAsSecret => {
                f.write_str("a PEM key was given as shared secret: set it as the public key instead")
            }
            KeyError::NotAJwks => {
                f.write_str("not a JWKS document: expected a JSON object with an array `keys`, no member twice, up to 1 MiB")
            }
            KeyError::NoUsableKey => f.write_str(
                "no key that can verify tokens: expected at least one of RSA with RS256, EC P-256 with ES256 or Ed25519 with EdDSA",
            ),
            KeyError::TooManyKeys => write!(f, "more than {MAX_KEYS} keys: remove those that no longer sign"),
            KeyError::PrivateInJwks => f.write_str(
                "the JWKS document holds a private key: publish public keys only, and replace this one",
            ),
            KeyError::UnknownAlgorithm => f.write_str("unknown algorithm: use RS256, ES256, EdDSA or HS256"),
            KeyError::SecretCannotBeMade => {
                f.write_str("HS256 needs a secret shared with the issuer, which cannot be made here: give one, or use RS256")
            }
            KeyError::SelfCheck => {
                f.write_str("a token signed with this key does not verify: the key is damaged, make a new one")
            }
        }
    }
}

impl std::error::Error for KeyError {}

/// One key that tokens are verified with. `Debug` shows algorithm and `kid` only.
#[derive(Clone)]
pub struct VerificationKey {
    algorithm: Algorithm,
    kid: Option<String>,
    material: Material,
}

#[derive(Clone)]
enum Material {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
        key: DecodingKey,
    },
    P256 {
        x: Vec<u8>,
        y: Vec<u8>,
        key: DecodingKey,
    },
    /// Not through jsonwebtoken 11.1: its EdDSA verifier is not strict (`verify`, not `verify_strict`), so it accepts
    /// points of small order, and it slices the key without looking at its length (crypto/rust_crypto/eddsa.rs).
    Ed25519(ed25519_dalek::VerifyingKey),
    Secret(DecodingKey),
}

impl std::fmt::Debug for VerificationKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerificationKey").field("algorithm", &self.algorithm).field("kid", &self.kid).finish()
    }
}

impl VerificationKey {
    /// A public key in PEM form: SPKI (`PUBLIC KEY`) of RSA, P-256 or Ed25519, or PKCS#1 (`RSA PUBLIC KEY`).
    ///
    /// It has no `kid`: whoever configured it knows of one key, whatever name the issuer gives it.
    pub fn from_pem(text: &[u8]) -> Result<VerificationKey, KeyError> {
        let block = pem::single_key(text)?;
        match block.label.as_str() {
            "PUBLIC KEY" => Self::from_spki_der(&block.der),
            "RSA PUBLIC KEY" => Self::from_pkcs1_der(&block.der),
            "CERTIFICATE" => Err(KeyError::Certificate),
            label if label.ends_with("PRIVATE KEY") => Err(KeyError::PrivateWherePublic),
            _ => Err(KeyError::Unsupported),
        }
    }

    /// A secret shared with the issuer (HS256), byte for byte: a line break at the end of a file is the reader's to
    /// cut.
    pub fn from_secret(secret: &[u8]) -> Result<VerificationKey, KeyError> {
        check_secret(secret)?;
        let material = Material::Secret(DecodingKey::from_secret(secret));
        Ok(VerificationKey { algorithm: Algorithm::Hs256, kid: None, material })
    }

    /// From the big-endian numbers of an RSA key, without leading zeros.
    pub(super) fn from_rsa_numbers(n: &[u8], e: &[u8]) -> Result<VerificationKey, KeyError> {
        let (n, e) = (without_zeros(n), without_zeros(e));
        let bits = n.len() * 8 - n.first().map_or(0, |byte| byte.leading_zeros() as usize);
        if bits < MIN_RSA_BITS {
            return Err(KeyError::RsaTooSmall { bits });
        }
        if bits > MAX_RSA_BITS {
            return Err(KeyError::RsaTooLarge { bits });
        }
        // With e = 1 a signature is the padded hash itself. The crate's own least exponent is 2 and it takes 33 bits.
        if e.is_empty() || e.len() > 4 || e == [1] || e.last().is_none_or(|byte| byte & 1 == 0) {
            return Err(KeyError::RsaExponent);
        }
        rsa::RsaPublicKey::new(rsa::BigUint::from_bytes_be(n), rsa::BigUint::from_bytes_be(e))
            .map_err(|_| KeyError::Unsupported)?;
        let key = DecodingKey::from_rsa_raw_components(n, e);
        let material = Material::Rsa { n: n.to_vec(), e: e.to_vec(), key };
        Ok(VerificationKey { algorithm: Algorithm::Rs256, kid: None, material })
    }

    /// From an SEC1 point; one that is not on the curve is refused.
    pub(super) fn from_p256_point(sec1: &[u8]) -> Result<VerificationKey, KeyError> {
        let public = p256::PublicKey::from_sec1_bytes(sec1).map_err(|_| KeyError::Unsupported)?;
        let point = public.to_encoded_point(false);
        let (Some(x), Some(y)) = (point.x(), point.y()) else { return Err(KeyError::Unsupported) };
        let key = DecodingKey::from_ec_der(point.as_bytes());
        let material = Material::P256 { x: x.to_vec(), y: y.to_vec(), key };
        Ok(VerificationKey { algorithm: Algorithm::Es256, kid: None, material })
    }

    /// From the 32 bytes of an Ed25519 key.
    pub(super) fn from_ed25519_bytes(bytes: &[u8]) -> Result<VerificationKey, KeyError> {
        let bytes = <&[u8; 32]>::try_from(bytes).map_err(|_| KeyError::Unsupported)?;
        let key = ed25519_dalek::VerifyingKey::from_bytes(bytes).map_err(|_| KeyError::Unsupported)?;
        if key.is_weak() {
            return Err(KeyError::SmallOrder);
        }
        Ok(VerificationKey { algorithm: Algorithm::EdDsa, kid: None, material: Material::Ed25519(key) })
    }

    fn from_spki_der(der: &[u8]) -> Result<VerificationKey, KeyError> {
        let info = SubjectPublicKeyInfoRef::from_der(der).map_err(|_| KeyError::Unsupported)?;
        match info.algorithm.oid.to_string().as_str() {
            // rsaEncryption. RSASSA-PSS keys (1.10) are for PS256 only and not ours.
            "1.2.840.113549.1.1.1" => {
                let pkcs1 = info.subject_public_key.as_bytes().ok_or(KeyError::Unsupported)?;
                Self::from_pkcs1_der(pkcs1)
            }
            "1.2.840.10045.2.1" => {
                let public = p256::PublicKey::from_public_key_der(der).map_err(|_| KeyError::Unsupported)?;
                Self::from_p256_point(public.to_encoded_point(false).as_bytes())
            }
            "1.3.101.112" => Self::from_ed25519_bytes(info.subject_public_key.as_bytes().ok_or(KeyError::Unsupported)?),
            _ => Err(KeyError::Unsupported),
        }
    }

    fn from_pkcs1_der(der: &[u8]) -> Result<VerificationKey, KeyError> {
        let key = rsa::pkcs1::RsaPublicKey::from_der(der).map_err(|_| KeyError::Unsupported)?;
        Self::from_rsa_numbers(key.modulus.as_bytes(), key.public_exponent.as_bytes())
    }

    /// The same key under a name that tokens can select it by.
    pub fn with_kid(self, kid: String) -> VerificationKey {
        VerificationKey { kid: Some(kid), ..self }
    }

    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// `None`: the key is tried for every `kid`.
    pub fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// The JWK thumbprint (RFC 7638, SHA-256, base64url): the same for the same key everywhere. `None` for a secret.
    pub fn thumbprint(&self) -> Option<String> {
        // The RFC wants exactly these members, sorted and without white space: they are written down in that order
        // below.
        let canonical = self.required_members()?.to_string();
        Some(URL_SAFE_NO_PAD.encode(Sha256::digest(canonical)))
    }

    /// As a member of a JWKS document. `None` for a secret, which is never published.
    pub fn public_jwk(&self) -> Option<Value> {
        let mut jwk = self.required_members()?;
        jwk["use"] = json!("sig");
        jwk["alg"] = json!(self.algorithm.as_str());
        jwk["kid"] = match &self.kid {
            Some(kid) => json!(kid),
            None => json!(self.thumbprint()?),
        };
        Some(jwk)
    }

    fn required_members(&self) -> Option<Value> {
        let b64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match &self.material {
            Material::Rsa { n, e, .. } => Some(json!({"e": b64(e), "kty": "RSA", "n": b64(n)})),
            Material::P256 { x, y, .. } => Some(json!({"crv": "P-256", "kty": "EC", "x": b64(x), "y": b64(y)})),
            Material::Ed25519(key) => Some(json!({"crv": "Ed25519", "kty": "OKP", "x": b64(key.as_bytes())})),
            Material::Secret(_) => None,
        }
    }

    /// Whether `signature` is this key's over `message`. Signatures are those of RFC 7518: for ES256 64 bytes, never
    /// DER.
    pub(super) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        use jsonwebtoken::Algorithm as Jwt;
        let (algorithm, key) = match &self.material {
            Material::Rsa { key, .. } => (Jwt::RS256, key),
            Material::P256 { key, .. } => (Jwt::ES256, key),
            Material::Secret(key) => (Jwt::HS256, key),
            Material::Ed25519(key) => {
                return ed25519_dalek::Signature::from_slice(signature)
                    .is_ok_and(|signature| key.verify_strict(message, &signature).is_ok());
            }
        };
        // The provider by name, not `jsonwebtoken::crypto::verify`: that one panics at its first use unless exactly one
        // of the crate's two backends is compiled in (11.1, crypto/mod.rs), and another dependency could add the
        // second.
        (rust_crypto::DEFAULT_PROVIDER.verifier_factory)(&algorithm, key)
            .is_ok_and(|verifier| verifier.verify(message, &signature.to_vec()).is_ok())
    }
}

/// The keys that are trusted now. Never empty.
#[derive(Clone, Debug)]
pub struct KeySet {
    keys: Vec<VerificationKey>,
    skipped: Vec<jwks::Skipped>,
}

impl KeySet {
    /// Keys from anywhere together, at most [`MAX_KEYS`].
    pub fn new(keys: Vec<VerificationKey>) -> Result<KeySet, KeyError> {
        if keys.is_empty() {
            return Err(KeyError::NoUsableKey);
        }
        if keys.len() > MAX_KEYS {
            return Err(KeyError::TooManyKeys);
        }
        Ok(KeySet { keys, skipped: Vec::new() })
    }

    /// One public key in PEM form.
    pub fn from_pem(text: &[u8]) -> Result<KeySet, KeyError> {
        Self::new(vec![VerificationKey::from_pem(text)?])
    }

    /// One shared secret.
    pub fn from_secret(secret: &[u8]) -> Result<KeySet, KeyError> {
        Self::new(vec![VerificationKey::from_secret(secret)?])
    }

    /// A JWKS document (RFC 7517). Keys that cannot verify our tokens are passed over, see [`KeySet::skipped`].
    pub fn from_jwks(document: &[u8]) -> Result<KeySet, KeyError> {
        let (keys, skipped) = jwks::read(document)?;
        Ok(KeySet { skipped, ..Self::new(keys)? })
    }

    /// These keys and one more, such as the proxy's own.
    pub fn with(mut self, key: VerificationKey) -> Result<KeySet, KeyError> {
        self.keys.push(key);
        Ok(KeySet { skipped: self.skipped, ..Self::new(self.keys)? })
    }

    pub fn keys(&self) -> &[VerificationKey] {
        &self.keys
    }

    /// The public keys as a JWKS document (RFC 7517). A shared secret is in none.
    pub fn published(&self) -> String {
        let keys: Vec<Value> = self.keys.iter().filter_map(VerificationKey::public_jwk).collect();
        json!({ "keys": keys }).to_string()
    }

    /// What a JWKS document held beside the keys, for a line in the log.
    pub fn skipped(&self) -> &[jwks::Skipped] {
        &self.skipped
    }
}

pub(super) fn check_secret(secret: &[u8]) -> Result<(), KeyError> {
    if secret.is_empty() {
        return Err(KeyError::Empty);
    }
    // The classic confusion: HS256 with the text of a public key as its secret, which everyone knows.
    if pem::looks_like_pem(secret) {
        return Err(KeyError::PemAsSecret);
    }
    if secret.len() < MIN_SECRET_BYTES {
        return Err(KeyError::SecretTooShort { bytes: secret.len() });
    }
    Ok(())
}

fn without_zeros(bytes: &[u8]) -> &[u8] {
    let start = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
    &bytes[start..]
}
