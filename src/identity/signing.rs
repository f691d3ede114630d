//! The proxy's own key: made once, kept in a file that only its owner can read, proven before it is used.

use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::pkcs8::{DecodePrivateKey, KeypairBytes};
use jsonwebtoken::{EncodingKey, crypto::rust_crypto};
use p256::elliptic_curve::sec1::ToEncodedPoint;
use rand::rngs::OsRng;
use rsa::pkcs1::{DecodeRsaPrivateKey, EncodeRsaPrivateKey};
use rsa::pkcs8::{EncodePrivateKey, LineEnding, PrivateKeyInfo};
use rsa::traits::PublicKeyParts;
use serde_json::Value;

use super::keys::{self, Algorithm, KeyError, VerificationKey};
use super::{pem, private_file};

/// Size of a new RSA key, in bits: what RS256 asks for at least, and what the control plane uses. Verification, the
/// daily cost, grows with the square of it.
const NEW_RSA_BITS: usize = 2048;

/// A key that signs tokens, with the public half that verifies them. `Debug` shows algorithm and `kid` only.
pub struct SigningKey {
    private: EncodingKey,
    public: VerificationKey,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SigningKey").field(&self.public).finish()
    }
}

/// Why there is no signing key.
#[derive(Debug)]
pub enum SigningKeyError {
    File(private_file::FileError),
    Key { path: PathBuf, source: KeyError },
    OtherAlgorithm { path: PathBuf, found: Algorithm, wanted: Algorithm },
}

impl std::fmt::Display for SigningKeyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SigningKeyError::File(error) => error.fmt(f),
            SigningKeyError::Key { path, source } => write!(f, "{}: {source}", path.display()),
            SigningKeyError::OtherAlgorithm { path, found, wanted } => write!(
                f,
                "{}: the key there signs {}, the configuration asks for {}: run `token keys rotate --algorithm {}` (tokens of \
                 the old key hold until they end), or set the algorithm to {}",
                path.display(),
                found.as_str(),
                wanted.as_str(),
                wanted.as_str(),
                found.as_str()
            ),
        }
    }
}

impl std::error::Error for SigningKeyError {}

impl From<private_file::FileError> for SigningKeyError {
    fn from(error: private_file::FileError) -> Self {
        SigningKeyError::File(error)
    }
}

impl SigningKey {
    /// A new key from the operating system's randomness. RS256 takes a good part of a second.
    pub fn generate(algorithm: Algorithm) -> Result<SigningKey, KeyError> {
        Self::from_pem(generate_pem(algorithm)?.as_bytes())
    }

    /// The key in a file (PKCS#8 PEM), made there if there is none: file 0600, folder 0700, whole or not at all. Two
    /// starts at once end with the same key.
    pub fn load_or_create(path: &Path, algorithm: Algorithm) -> Result<SigningKey, SigningKeyError> {
        let key_error = |source| SigningKeyError::Key { path: path.to_owned(), source };
        let text = match private_file::read(path, private_file::OTHERS_CAN_READ)? {
            Some(text) => text,
            None => {
                let text = generate_pem(algorithm).map_err(key_error)?;
                if private_file::create(path, text.as_bytes())? {
                    text.into_bytes()
                } else {
                    // Another start was faster: its key is the one.
                    private_file::read(path, private_file::OTHERS_CAN_READ)?.ok_or(key_error(KeyError::Empty))?
                }
            }
        };
        let key = Self::from_pem(&text).map_err(key_error)?;
        if key.algorithm() != algorithm {
            return Err(SigningKeyError::OtherAlgorithm {
                path: path.to_owned(),
                found: key.algorithm(),
                wanted: algorithm,
            });
        }
        Ok(key)
    }

    /// The key in a file, of whatever algorithm; `None` where there is no file.
    pub fn load(path: &Path) -> Result<Option<SigningKey>, SigningKeyError> {
        let key_error = |source| SigningKeyError::Key { path: path.to_owned(), source };
        let text = private_file::read(path, private_file::OTHERS_CAN_READ)?;
        text.map(|text| Self::from_pem(&text).map_err(key_error)).transpose()
    }

    /// A private key in PEM form: PKCS#8 (`PRIVATE KEY`), PKCS#1 (`RSA PRIVATE KEY`) or SEC1 (`EC PRIVATE KEY`),
    /// without passphrase.
    pub fn from_pem(text: &[u8]) -> Result<SigningKey, KeyError> {
        let block = pem::single_key(text)?;
        let der = block.der.as_slice();
        match block.label.as_str() {
            "RSA PRIVATE KEY" => {
                Self::from_rsa(rsa::RsaPrivateKey::from_pkcs1_der(der).map_err(|_| KeyError::Unsupported)?)
            }
            "EC PRIVATE KEY" => {
                Self::from_p256(p256::SecretKey::from_sec1_der(der).map_err(|_| KeyError::Unsupported)?)
            }
            "PRIVATE KEY" => {
                let info = PrivateKeyInfo::try_from(der).map_err(|_| KeyError::Unsupported)?;
                match info.algorithm.oid.to_string().as_str() {
                    "1.2.840.113549.1.1.1" => {
                        Self::from_rsa(rsa::RsaPrivateKey::from_pkcs8_der(der).map_err(|_| KeyError::Unsupported)?)
                    }
                    "1.2.840.10045.2.1" => {
                        Self::from_p256(p256::SecretKey::from_pkcs8_der(der).map_err(|_| KeyError::Unsupported)?)
                    }
                    "1.3.101.112" => Self::from_ed25519(
                        &ed25519_dalek::SigningKey::from_pkcs8_der(der).map_err(|_| KeyError::Unsupported)?,
                    ),
                    _ => Err(KeyError::Unsupported),
                }
            }
            label if label.ends_with("PUBLIC KEY") || label == "CERTIFICATE" => Err(KeyError::PublicWherePrivate),
            _ => Err(KeyError::Unsupported),
        }
    }

    /// A secret shared with whoever verifies (HS256).
    pub fn from_secret(secret: &[u8]) -> Result<SigningKey, KeyError> {
        keys::check_secret(secret)?;
        Self::proven(EncodingKey::from_secret(secret), VerificationKey::from_secret(secret)?)
    }

    fn from_rsa(key: rsa::RsaPrivateKey) -> Result<SigningKey, KeyError> {
        // First the public half, which knows what is too weak: the crate signs with any size.
        let public = VerificationKey::from_rsa_numbers(&key.n().to_bytes_be(), &key.e().to_bytes_be())?;
        key.validate().map_err(|_| KeyError::SelfCheck)?;
        let der = key.to_pkcs1_der().map_err(|_| KeyError::Unsupported)?;
        Self::proven(EncodingKey::from_rsa_der(der.as_bytes()), public)
    }

    fn from_p256(key: p256::SecretKey) -> Result<SigningKey, KeyError> {
        let public = VerificationKey::from_p256_point(key.public_key().to_encoded_point(false).as_bytes())?;
        let der = key.to_pkcs8_der().map_err(|_| KeyError::Unsupported)?;
        Self::proven(EncodingKey::from_ec_der(der.as_bytes()), public)
    }

    fn from_ed25519(key: &ed25519_dalek::SigningKey) -> Result<SigningKey, KeyError> {
        let public = VerificationKey::from_ed25519_bytes(key.verifying_key().as_bytes())?;
        let der = ed25519_pkcs8(key).to_pkcs8_der().map_err(|_| KeyError::Unsupported)?;
        Self::proven(EncodingKey::from_ed_der(der.as_bytes()), public)
    }

    /// Signs something and verifies it: a key that cannot do both is found at the start, not at the first request.
    fn proven(private: EncodingKey, public: VerificationKey) -> Result<SigningKey, KeyError> {
        let public = match public.thumbprint() {
            Some(thumbprint) => public.with_kid(thumbprint),
            None => public,
        };
        let key = SigningKey { private, public };
        let signature = key.sign(b"self-check")?;
        if key.public.verifies(b"self-check", &signature) { Ok(key) } else { Err(KeyError::SelfCheck) }
    }

    pub fn algorithm(&self) -> Algorithm {
        self.public.algorithm()
    }

    /// The RFC 7638 thumbprint; `None` for a secret, of which nothing is told.
    pub fn kid(&self) -> Option<&str> {
        self.public.kid()
    }

    /// What verifies this key's tokens: goes into the [`KeySet`](super::KeySet) beside the configured keys.
    pub fn verification_key(&self) -> VerificationKey {
        self.public.clone()
    }

    /// The member for `/.well-known/jwks.json`; `None` for a secret.
    pub fn public_jwk(&self) -> Option<Value> {
        self.public.public_jwk()
    }

    /// `header.claims` with its signature, as a compact JWS. The header is the key's, so it cannot name another
    /// algorithm.
    pub(super) fn sign_token(&self, claims: &Value) -> Result<String, KeyError> {
        let mut header = serde_json::Map::new();
        header.insert("alg".into(), self.algorithm().as_str().into());
        header.insert("typ".into(), "JWT".into());
        if let Some(kid) = self.kid() {
            header.insert("kid".into(), kid.into());
        }
        let header = URL_SAFE_NO_PAD.encode(Value::Object(header).to_string());
        let claims = URL_SAFE_NO_PAD.encode(claims.to_string());
        let message = format!("{header}.{claims}");
        let signature = URL_SAFE_NO_PAD.encode(self.sign(message.as_bytes())?);
        Ok(format!("{message}.{signature}"))
    }

    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        use jsonwebtoken::Algorithm as Jwt;
        let algorithm = match self.algorithm() {
            Algorithm::Rs256 => Jwt::RS256,
            Algorithm::Es256 => Jwt::ES256,
            Algorithm::EdDsa => Jwt::EdDSA,
            Algorithm::Hs256 => Jwt::HS256,
        };
        // The provider by name: see VerificationKey::verifies.
        let signer = (rust_crypto::DEFAULT_PROVIDER.signer_factory)(&algorithm, &self.private)
            .map_err(|_| KeyError::SelfCheck)?;
        signer.try_sign(message).map_err(|_| KeyError::SelfCheck)
    }
}

/// A new private key as PKCS#8 PEM.
pub(super) fn generate_pem(algorithm: Algorithm) -> Result<String, KeyError> {
    let text = match algorithm {
        Algorithm::Rs256 => rsa::RsaPrivateKey::new(&mut OsRng, NEW_RSA_BITS)
            .map_err(|_| KeyError::SelfCheck)?
            .to_pkcs8_pem(LineEnding::LF),
        Algorithm::Es256 => p256::SecretKey::random(&mut OsRng).to_pkcs8_pem(LineEnding::LF),
        Algorithm::EdDsa => {
            ed25519_pkcs8(&ed25519_dalek::SigningKey::generate(&mut OsRng)).to_pkcs8_pem(LineEnding::LF)
        }
        Algorithm::Hs256 => return Err(KeyError::SecretCannotBeMade),
    };
    text.map(|text| text.to_string()).map_err(|_| KeyError::SelfCheck)
}

/// Without the public half: dalek's own encoding has it (RFC 8410's version 2), which OpenSSL 1 and 3.0 cannot read.
fn ed25519_pkcs8(key: &ed25519_dalek::SigningKey) -> KeypairBytes {
    KeypairBytes { secret_key: key.to_bytes(), public_key: None }
}
