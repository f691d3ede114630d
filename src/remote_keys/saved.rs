//! The last good document, in the state folder: a restart while the URL is down goes on with it.
//!
//! For a day, counted from when the URL last gave it: a night's outage is survived, and a machine that was off for weeks, or comes
//! back from a backup, does not trust keys that may have been withdrawn for a reason. The URL stands in it as a hash, since its query may
//! hold a secret; a copy of another URL is not used.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::ServiceUrl;
use crate::identity::KeySet;
use crate::identity::keys::KeyError;
use crate::identity::private_file::{self, FileError, OTHERS_CAN_WRITE};

/// Its name in the state folder.
pub const FILE: &str = "jwks-last-good.json";
/// Oldest copy that is used, in seconds.
pub const MAX_AGE_S: i64 = 24 * 3600;
/// A clock that was set back by less is not held against the copy.
const CLOCK_S: i64 = 300;

#[derive(Serialize, Deserialize)]
struct Saved {
    url_sha256: String,
    /// Seconds since 1970.
    confirmed_at: i64,
    /// The document as it was served.
    document: String,
}

/// Why there is a copy that is not used.
#[derive(Debug)]
pub enum SavedError {
    File(FileError),
    Unreadable,
    OfAnotherUrl,
    TooOld { age_s: i64 },
    FromTheFuture,
    Keys(KeyError),
}

impl fmt::Display for SavedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SavedError::File(e) => e.fmt(f),
            SavedError::Unreadable => f.write_str("the saved keys are damaged"),
            SavedError::OfAnotherUrl => f.write_str("the saved keys are those of another URL"),
            SavedError::TooOld { age_s } => {
                write!(f, "the saved keys are {} hours old, and are trusted for {}", age_s / 3600, MAX_AGE_S / 3600)
            }
            SavedError::FromTheFuture => {
                f.write_str("the saved keys are from the future; look at this machine's clock")
            }
            SavedError::Keys(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for SavedError {}

/// The saved keys and their age in seconds; `None` where nothing was saved yet.
pub fn read(path: &Path, url: &ServiceUrl, now_s: i64) -> Result<Option<(KeySet, i64)>, SavedError> {
    let Some(bytes) = private_file::read(path, OTHERS_CAN_WRITE).map_err(SavedError::File)? else { return Ok(None) };
    let saved: Saved = serde_json::from_slice(&bytes).map_err(|_| SavedError::Unreadable)?;
    if saved.url_sha256 != hash(url) {
        return Err(SavedError::OfAnotherUrl);
    }
    let age_s = now_s.saturating_sub(saved.confirmed_at);
    if age_s < -CLOCK_S {
        return Err(SavedError::FromTheFuture);
    }
    if age_s > MAX_AGE_S {
        return Err(SavedError::TooOld { age_s });
    }
    let keys = KeySet::from_jwks(saved.document.as_bytes()).map_err(SavedError::Keys)?;
    Ok(Some((keys, age_s.max(0))))
}

/// Writes the copy, whole or not at all.
pub fn write(path: &Path, url: &ServiceUrl, now_s: i64, document: &[u8]) -> Result<(), FileError> {
    let document = String::from_utf8_lossy(document).into_owned(); // what is no UTF-8 is no JSON, and was not taken
    let saved = Saved { url_sha256: hash(url), confirmed_at: now_s, document };
    let bytes = serde_json::to_vec(&saved).expect("texts and a number are always JSON");
    if path.exists() { private_file::replace(path, &bytes) } else { private_file::create(path, &bytes).map(|_| ()) }
}

fn hash(url: &ServiceUrl) -> String {
    Sha256::digest(url.uri().to_string()).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Algorithm, SigningKey};

    const NOW_S: i64 = 1_700_000_000;

    fn url(text: &str) -> ServiceUrl {
        ServiceUrl::parse(text).unwrap()
    }

    fn document() -> String {
        let key = SigningKey::generate(Algorithm::EdDsa).unwrap().verification_key();
        KeySet::new(vec![key]).unwrap().published()
    }

    #[test]
    fn a_copy_is_used_for_a_day_for_its_own_url_and_not_longer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let own = url("https://keys.example/jwks?key=hidden");
        assert!(read(&path, &own, NOW_S).unwrap().is_none());
        write(&path, &own, NOW_S - 10, document().as_bytes()).unwrap();
        write(&path, &own, NOW_S, document().as_bytes()).unwrap();
        assert!(!std::fs::read_to_string(&path).unwrap().contains("hidden"));
        for (later_s, age_s) in [(0, 0), (-CLOCK_S, 0), (3600, 3600), (MAX_AGE_S, MAX_AGE_S)] {
            let (keys, age) = read(&path, &own, NOW_S + later_s).unwrap().unwrap();
            assert_eq!((keys.keys().len(), age), (1, age_s));
        }
        let refused = |url: &ServiceUrl, now_s: i64| read(&path, url, now_s).expect_err("refused");
        assert!(matches!(refused(&own, NOW_S + MAX_AGE_S + 1), SavedError::TooOld { .. }));
        assert!(matches!(refused(&own, NOW_S - CLOCK_S - 1), SavedError::FromTheFuture));
        assert!(matches!(refused(&url("https://keys.example/jwks"), NOW_S), SavedError::OfAnotherUrl));
    }

    #[test]
    fn a_damaged_copy_or_one_that_others_can_write_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let own = url("https://keys.example/jwks");
        for text in ["", "{}", "[1]", "{\"url_sha256\":1}"] {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
            assert!(matches!(read(&path, &own, NOW_S), Err(SavedError::Unreadable)), "{text}");
        }
        write(&path, &own, NOW_S, b"{\"keys\":[]}").unwrap();
        assert!(matches!(read(&path, &own, NOW_S), Err(SavedError::Keys(_))));
        write(&path, &own, NOW_S, document().as_bytes()).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o620)).unwrap();
        assert!(matches!(read(&path, &own, NOW_S), Err(SavedError::File(_))));
    }
}
