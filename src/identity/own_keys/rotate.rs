//! Another key signs, and the old one verifies until its last token has ended.
//!
//! In this order, so that whoever is killed or loses power at any step leaves one key that signs, and every token that it has signed
//! verified:
//!
//! 1. the new public key is published, so that every proxy knows it before a token of it exists;
//! 2. the old public key is published, with its end;
//! 3. running proxies get a moment to read both;
//! 4. the new private key takes the old one's place, in one rename;
//! 5. what has ended is taken away.
//!
//! Broken off before 4, the old key goes on signing, and its end in the folder does not count; the new one ends after a day, unused.

use std::path::Path;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{KeyFile, OwnKeys, OwnKeysError, file_path, lock, read_folder, signing_key_path, write};
use crate::identity::keys::{Algorithm, KeyError, MAX_KEYS};
use crate::identity::private_file::{self, FileError};
use crate::identity::signing::{self, SigningKey};

/// A published key that never came to sign ends after this many seconds: a day.
const UNUSED_S: i64 = 24 * 3600;
/// Seconds for the rotation itself, and for proxies that sign with the old key for a moment longer.
const SLACK_S: i64 = 60;

/// What to rotate to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// `None`: as the old key.
    pub algorithm: Option<Algorithm>,
    /// Longest life that the configuration gives a token, and the clocks' leeway, in seconds.
    pub ttl_s: i64,
    pub leeway_s: i64,
    /// The old keys are not trusted any more: their tokens end with this rotation.
    pub end_old: bool,
}

/// Where a rotation has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The new public key is in the folder.
    NewPublished,
    /// The old one too: time for proxies to read both.
    OldPublished,
    /// The new key signs.
    Switched,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotated {
    pub old_kid: String,
    pub new_kid: String,
    pub algorithm: Algorithm,
    /// Until when tokens of the old key hold (RFC 3339, to the second); `None` where they have ended.
    pub until: Option<String>,
}

/// Why it was not rotated; the old key signs as before.
#[derive(Debug)]
pub enum RotateError {
    Keys(OwnKeysError),
    New(KeyError),
    /// As many keys verify as may.
    Full,
    /// `at_step` ended it.
    BrokenOff(Step),
}

impl std::fmt::Display for RotateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RotateError::Keys(error) => error.fmt(f),
            RotateError::New(error) => write!(f, "no new key: {error}"),
            RotateError::Full => write!(
                f,
                "{MAX_KEYS} keys verify already: wait until one ends (`token keys list`), or end them all with --end-old"
            ),
            RotateError::BrokenOff(step) => write!(f, "broken off: {step:?}"),
        }
    }
}

impl std::error::Error for RotateError {}

impl From<OwnKeysError> for RotateError {
    fn from(error: OwnKeysError) -> RotateError {
        RotateError::Keys(error)
    }
}

impl From<FileError> for RotateError {
    fn from(error: FileError) -> RotateError {
        RotateError::Keys(error.into())
    }
}

/// Rotates. `at_step` is called after each step, to wait there or (false) to break off. Slow: an RSA key takes a second or two.
pub fn rotate(
    state_dir: &Path,
    plan: Plan,
    now: Timestamp,
    mut at_step: impl FnMut(Step) -> bool,
) -> Result<Rotated, RotateError> {
    let mut go_on = |step| if at_step(step) { Ok(()) } else { Err(RotateError::BrokenOff(step)) };
    let algorithm = match plan.algorithm {
        Some(algorithm) => algorithm,
        None => OwnKeys::reload(state_dir)?.signing.algorithm(),
    };
    // Before the lock, which others wait for.
    let pem = signing::generate_pem(algorithm).map_err(RotateError::New)?;
    let new = SigningKey::from_pem(pem.as_bytes()).map_err(RotateError::New)?.verification_key();

    let _alone = lock(state_dir)?;
    let keys = OwnKeys::reload(state_dir)?;
    let old = keys.signing.verification_key();
    if !plan.end_old && keys.others.iter().filter(|other| other.until > now).count() + 2 > MAX_KEYS {
        return Err(RotateError::Full);
    }
    let (Some(old_kid), Some(new_kid)) = (old.kid().map(str::to_owned), new.kid().map(str::to_owned)) else {
        return Err(RotateError::New(KeyError::SecretCannotBeMade)); // a secret has no public half; none is kept in this folder
    };

    let in_seconds = |seconds| now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MAX);
    let unused = KeyFile { key: new, longest_ttl_s: plan.ttl_s, until: Some(in_seconds(UNUSED_S)) };
    write(state_dir, &unused)?;
    go_on(Step::NewPublished)?;

    let known_ttl_s = read_folder(state_dir)?.get(&old_kid).map_or(0, |file| file.longest_ttl_s);
    let longest_ttl_s = known_ttl_s.max(plan.ttl_s).max(crate::identity::issuer::DEFAULT_TTL_S);
    let until = in_seconds(longest_ttl_s.saturating_add(plan.leeway_s).saturating_add(SLACK_S));
    if !plan.end_old {
        write(state_dir, &KeyFile { key: old, longest_ttl_s, until: Some(until) })?;
    }
    go_on(Step::OldPublished)?;

    private_file::replace(&signing_key_path(state_dir), pem.as_bytes())?;
    go_on(Step::Switched)?;

    for (kid, file) in read_folder(state_dir)? {
        if kid != new_kid && (plan.end_old || file.until.is_none_or(|until| until <= now)) {
            // Best effort: the next rotation tries again, and what has ended does not verify.
            let _ = std::fs::remove_file(file_path(state_dir, &kid));
        }
    }
    Ok(Rotated { old_kid, new_kid, algorithm, until: (!plan.end_old).then(|| format!("{until:.0}")) })
}
