//! The proxy's own keys in its state folder: the one that signs, and those that only verify.
//!
//! ```text
//! signing-key.pem                  private, 0600: the key that signs
//! verification-keys/<kid>.json     public: {"keys":[<JWK>],"longest_ttl_s":86400,"until":"2026-11-23T21:02:00Z"}
//! ```
//!
//! A file in the folder is about the key that its JWK holds. While that key signs, only `longest_ttl_s` counts: the longest life that
//! a token of it was given. For every other key only `until` counts: it verifies until then, and without one not at all.
//!
//! - [`rotate`]: another key signs, the old one verifies until its last token has ended.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::issuer::DEFAULT_TTL_S;
use super::keys::{Algorithm, KeyError, KeySet, MAX_KEYS, VerificationKey};
use super::private_file::{self, FileError, FolderLock};
use super::signing::{SigningKey, SigningKeyError};
use super::strict_json;

pub mod rotate;

/// The key that signs.
const SIGNING_KEY: &str = "signing-key.pem";
/// The keys that verify.
const FOLDER: &str = "verification-keys";
/// Files that are read: more than verify at once, since those that have ended stay until the next rotation.
const MAX_FILES: usize = 4 * MAX_KEYS;

/// What is in the state folder.
#[derive(Debug)]
pub struct OwnKeys {
    pub signing: SigningKey,
    /// By the time at which they end, the first to end in front.
    pub others: Vec<OtherKey>,
}

/// A key that verifies for a while: it has signed before, or it is about to.
#[derive(Clone, Debug)]
pub struct OtherKey {
    pub key: VerificationKey,
    pub until: Timestamp,
}

/// Why the keys are not used: where, what, and what to do.
#[derive(Debug)]
pub enum OwnKeysError {
    Signing(SigningKeyError),
    /// The file that signs has gone.
    Gone {
        path: PathBuf,
    },
    File(FileError),
    Folder {
        path: PathBuf,
        source: std::io::Error,
    },
    Content {
        path: PathBuf,
        what: &'static str,
    },
    Key {
        path: PathBuf,
        source: KeyError,
    },
}

impl std::fmt::Display for OwnKeysError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OwnKeysError::Signing(error) => error.fmt(f),
            OwnKeysError::Gone { path } => write!(f, "{}: the key that signs has gone; put it back", path.display()),
            OwnKeysError::File(error) => error.fmt(f),
            OwnKeysError::Folder { path, source } => write!(f, "{}: cannot list it: {source}", path.display()),
            OwnKeysError::Content { path, what } => {
                write!(f, "{}: {what}; take the file away, and the tokens of its key end", path.display())
            }
            OwnKeysError::Key { path, source } => write!(f, "{}: {source}", path.display()),
        }
    }
}

impl std::error::Error for OwnKeysError {}

impl From<FileError> for OwnKeysError {
    fn from(error: FileError) -> Self {
        OwnKeysError::File(error)
    }
}

impl From<SigningKeyError> for OwnKeysError {
    fn from(error: SigningKeyError) -> Self {
        OwnKeysError::Signing(error)
    }
}

impl OwnKeys {
    /// At the start: a key is made where there is none (RS256 unless `wanted` says another). One of another algorithm than the wanted
    /// is an error.
    pub fn open(state_dir: &Path, wanted: Option<Algorithm>) -> Result<OwnKeys, OwnKeysError> {
        let path = signing_key_path(state_dir);
        let made = wanted.unwrap_or_default();
        let signing = match SigningKey::load(&path)? {
            Some(key) => key,
            None => SigningKey::load_or_create(&path, made)?,
        };
        if let Some(wanted) = wanted.filter(|wanted| *wanted != signing.algorithm()) {
            return Err(SigningKeyError::OtherAlgorithm { path, found: signing.algorithm(), wanted }.into());
        }
        Self::beside(signing, state_dir)
    }

    /// While running: no key is made, and the one there may be of any algorithm, since a rotation has decided that.
    pub fn reload(state_dir: &Path) -> Result<OwnKeys, OwnKeysError> {
        let path = signing_key_path(state_dir);
        let signing = SigningKey::load(&path)?.ok_or(OwnKeysError::Gone { path })?;
        Self::beside(signing, state_dir)
    }

    fn beside(signing: SigningKey, state_dir: &Path) -> Result<OwnKeys, OwnKeysError> {
        let mut others: Vec<OtherKey> = read_folder(state_dir)?
            .into_values()
            .filter(|file| file.key.kid() != signing.kid())
            .filter_map(|file| Some(OtherKey { until: file.until?, key: file.key }))
            .collect();
        others.sort_by_key(|other| other.until);
        Ok(OwnKeys { signing, others })
    }

    /// Everything that verifies at a time, the key that signs in front.
    pub fn key_set(&self, now: Timestamp) -> Result<KeySet, KeyError> {
        let others = self.others.iter().filter(|other| other.until > now).map(|other| other.key.clone());
        KeySet::new(std::iter::once(self.signing.verification_key()).chain(others).collect())
    }

    /// When the next of the others ends.
    pub fn next_end(&self, now: Timestamp) -> Option<Timestamp> {
        self.others.iter().map(|other| other.until).find(|until| *until > now)
    }
}

pub fn signing_key_path(state_dir: &Path) -> PathBuf {
    state_dir.join(SIGNING_KEY)
}

pub fn folder_path(state_dir: &Path) -> PathBuf {
    state_dir.join(FOLDER)
}

/// Keeps rotations out while tokens of a long life are made: see [`note_ttl`].
pub fn lock(state_dir: &Path) -> Result<FolderLock, FileError> {
    private_file::lock_folder_of(&signing_key_path(state_dir))
}

/// Writes down that a key gives, or has given, a token a life of so many seconds: after a rotation it verifies as long. To be called
/// before the token is handed out, and with the [`lock`] held since before the key was read. The default life needs no note.
pub fn note_ttl(state_dir: &Path, key: &VerificationKey, ttl_s: i64) -> Result<(), OwnKeysError> {
    let Some(kid) = key.kid() else { return Ok(()) };
    let known = read_folder(state_dir)?.remove(kid);
    if ttl_s <= known.as_ref().map_or(DEFAULT_TTL_S, |file| file.longest_ttl_s) {
        return Ok(());
    }
    let until = known.and_then(|file| file.until);
    write(state_dir, &KeyFile { key: key.clone(), longest_ttl_s: ttl_s, until })
}

struct KeyFile {
    key: VerificationKey,
    longest_ttl_s: i64,
    until: Option<Timestamp>,
}

fn file_path(state_dir: &Path, kid: &str) -> PathBuf {
    folder_path(state_dir).join(format!("{kid}.json"))
}

/// By `kid`, which is the thumbprint: never what the file's name says.
fn read_folder(state_dir: &Path) -> Result<HashMap<String, KeyFile>, OwnKeysError> {
    let folder = folder_path(state_dir);
    let fault = |source| OwnKeysError::Folder { path: folder.clone(), source };
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(fault(error)),
    };
    let mut files = HashMap::new();
    for entry in entries.take(MAX_FILES) {
        let path = entry.map_err(fault)?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue; // a draft that a crash has left
        }
        // A file that ended between listing and reading has been taken away by a rotation.
        let Some(bytes) = private_file::read(&path, private_file::OTHERS_CAN_WRITE)? else { continue };
        let file = parse(&bytes, &path)?;
        let kid = file.key.kid().unwrap_or_default().to_owned();
        files.insert(kid, file);
    }
    Ok(files)
}

fn parse(bytes: &[u8], path: &Path) -> Result<KeyFile, OwnKeysError> {
    let fault = |what| OwnKeysError::Content { path: path.to_owned(), what };
    let members = strict_json::object(bytes).map_err(|_| fault("not a JSON object"))?;
    let set = KeySet::from_jwks(bytes).map_err(|source| OwnKeysError::Key { path: path.to_owned(), source })?;
    let [key] = set.keys() else { return Err(fault("not exactly one key")) };
    let until = match members.get("until") {
        None => None,
        Some(Value::String(until)) => Some(until.parse().map_err(|_| fault("`until` is not a time"))?),
        Some(_) => return Err(fault("`until` is not a time")),
    };
    let longest_ttl_s = match members.get("longest_ttl_s") {
        None => DEFAULT_TTL_S,
        Some(seconds) => seconds.as_i64().ok_or_else(|| fault("`longest_ttl_s` is not a number"))?,
    };
    let kid = key.thumbprint().ok_or_else(|| fault("not a public key"))?;
    Ok(KeyFile { key: key.clone().with_kid(kid), longest_ttl_s, until })
}

fn write(state_dir: &Path, file: &KeyFile) -> Result<(), OwnKeysError> {
    let (Some(jwk), Some(kid)) = (file.key.public_jwk(), file.key.kid()) else { return Ok(()) };
    let mut text = json!({ "keys": [jwk], "longest_ttl_s": file.longest_ttl_s });
    if let Some(until) = file.until {
        text["until"] = json!(until.to_string());
    }
    let (path, text) = (file_path(state_dir, kid), format!("{text:#}\n"));
    // Only rotations and notes write here, under the lock: between the two nobody makes or removes the file.
    if path.exists() {
        private_file::replace(&path, text.as_bytes())?;
    } else {
        private_file::create(&path, text.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
