//! The key that signs checkpoints and tombstones (docs/adr/0030-audit-chain.md): Ed25519, made at the first start, its public half beside it for whoever
//! checks.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey};
use ed25519_dalek::{Signer, SigningKey, VerifyingKey};

use crate::identity::private_file::{self, FileError, OTHERS_CAN_READ};
use crate::ledger::chain;

/// Has no `Debug`: it is a secret.
pub(super) struct AuditKey {
    key: SigningKey,
    id: String,
}

/// Why there is no key.
#[derive(Debug)]
pub enum KeyError {
    File(FileError),
    /// The file holds something else than an Ed25519 key in PKCS#8 PEM.
    NotAKey(PathBuf),
    /// The public half could not be written.
    Public {
        path: PathBuf,
        source: io::Error,
    },
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyError::File(error) => error.fmt(f),
            KeyError::NotAKey(path) => write!(
                f,
                "{}: not an Ed25519 key in PKCS#8 PEM: put the right one back, or move the file away so that a new key is made",
                path.display()
            ),
            KeyError::Public { path, source } => write!(f, "{}: cannot write it: {source}", path.display()),
        }
    }
}

impl AuditKey {
    /// Reads the key, or makes it, and writes its public half beside it (`.pub`). The public half of another key that stood there is
    /// kept under that key's own name: what it signed is still to be checked.
    pub(super) fn load_or_create(path: &Path) -> Result<AuditKey, KeyError> {
        let not_a_key = || KeyError::NotAKey(path.to_owned());
        let pem = match private_file::read(path, OTHERS_CAN_READ).map_err(KeyError::File)? {
            Some(pem) => pem,
            None => {
                let fresh = SigningKey::generate(&mut rand::rngs::OsRng);
                let pem = fresh.to_pkcs8_pem(LineEnding::LF).map_err(|_| not_a_key())?;
                // Two starts at once agree on the key of the faster one.
                private_file::create(path, pem.as_bytes()).map_err(KeyError::File)?;
                private_file::read(path, OTHERS_CAN_READ).map_err(KeyError::File)?.ok_or_else(not_a_key)?
            }
        };
        let pem = std::str::from_utf8(&pem).map_err(|_| not_a_key())?;
        let key = SigningKey::from_pkcs8_pem(pem).map_err(|_| not_a_key())?;
        let public = path.with_extension("pub");
        let text = key.verifying_key().to_public_key_pem(LineEnding::LF).map_err(|_| not_a_key())?;
        let id = chain::key_id(key.verifying_key().as_bytes());
        publish(&public, &text, &id).map_err(|source| KeyError::Public { path: public, source })?;
        Ok(AuditKey { key, id })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Base64 of the signature over `payload`.
    pub(super) fn sign(&self, payload: &[u8]) -> String {
        STANDARD.encode(self.key.sign(payload).to_bytes())
    }
}

/// Only where it differs: a reader never sees half of it twice.
fn publish(path: &Path, text: &str, id: &str) -> io::Result<()> {
    let there = std::fs::read_to_string(path).ok();
    if there.as_deref() == Some(text) {
        return Ok(());
    }
    if let Some(other) = there.and_then(|text| VerifyingKey::from_public_key_pem(&text).ok()) {
        let other = chain::key_id(other.as_bytes());
        let kept = other_key(path, &other);
        std::fs::rename(path, &kept)?;
        log::warn!(
            "audit: signed by key {id} from now on, and by {other} until now, whose public half is kept as {}; if nobody changed \
             the key on purpose, ask who could write this folder",
            kept.display()
        );
    }
    let draft = path.with_extension(format!("pub.new-{:08x}", rand::random::<u32>()));
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&draft)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&draft, path))
}

/// `audit-key-ID.pub`, beside `audit-key.pub`.
fn other_key(path: &Path, id: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let id: String = id.chars().filter(char::is_ascii_alphanumeric).collect();
    path.with_file_name(format!("{stem}-{id}.pub"))
}
