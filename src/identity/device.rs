//! The ed25519 keys of devices, and what Ollama's own client signs with them.
//!
//! With `OLLAMA_AUTH=1` that client sends `Authorization: <base64 of the SSH public key>:<base64 of the signature>` with each
//! request, and the time as `ts` in the query (Ollama 0.17.4, `api/client.go` and `auth/auth.go`). Signed are the bytes
//! `METHOD,/path?ts=UNIX`: method, Ollama's own path without any base path, time. Neither the body nor the host is, so whoever
//! reads the network can send another body with the same signature for as long as [`WINDOW_S`]; off loopback it belongs under TLS.

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD},
};
use ed25519_dalek::{Signature, VerifyingKey};
use sha2::{Digest, Sha256};

use super::cause;

/// How far a signature's time may lie from ours, in seconds, either way (contract, section 2).
pub const WINDOW_S: i64 = 30;

/// What the base64 of every `ssh-ed25519` key begins with: the length and the name of its kind.
const BLOB_START: &str = "AAAAC3NzaC1lZDI1NTE5";
/// The same before base64, and the length of the key that follows (RFC 8709, section 4).
const BLOB_HEAD: &[u8] = b"\0\0\0\x0bssh-ed25519\0\0\0\x20";

/// Longest comment of a key that is looked at. OpenSSH's are `user@host`.
const MAX_LINE_BYTES: usize = 1024;
/// Digits of a time. Ten are used until the year 2286.
const MAX_TIME_DIGITS: usize = 12;

/// A device's public key, one that can be trusted: a point of the curve and not of small order, with which one signature would
/// hold for every message.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceKey([u8; 32]);

/// Why a text is no device key. The words say what to do and never repeat the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKeyError {
    /// Not `ssh-ed25519 AAAA.. [comment]`.
    NotAKey,
    /// A key of another kind, or the private half.
    NotEd25519,
    /// A point of small order, or none of the curve.
    Weak,
}

impl std::fmt::Display for DeviceKeyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeviceKeyError::NotAKey => {
                "is not the public half of an SSH key: give the one line of ~/.ollama/id_ed25519.pub, `ssh-ed25519 AAAA..`"
            }
            DeviceKeyError::NotEd25519 => {
                "is not an ssh-ed25519 key: make one with `ssh-keygen -t ed25519 -N '' -f ~/.ollama/id_ed25519`"
            }
            DeviceKeyError::Weak => "is a weak key that anybody can sign for: make another one",
        })
    }
}

impl std::error::Error for DeviceKeyError {}

impl DeviceKey {
    /// Reads the line of a `.pub` file. Options in front, as `authorized_keys` has them, would say something that is not honoured
    /// here, so they are refused.
    pub fn parse(line: &str) -> Result<DeviceKey, DeviceKeyError> {
        if line.len() > MAX_LINE_BYTES {
            return Err(DeviceKeyError::NotAKey);
        }
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some("ssh-ed25519"), Some(blob)) => Self::from_base64(blob),
            (Some(kind), Some(_))
                if kind.starts_with("ssh-") || kind.starts_with("ecdsa-") || kind.starts_with("sk-") =>
            {
                Err(DeviceKeyError::NotEd25519)
            }
            (Some("-----BEGIN"), _) => Err(DeviceKeyError::NotEd25519),
            _ => Err(DeviceKeyError::NotAKey),
        }
    }

    fn from_base64(blob: &str) -> Result<DeviceKey, DeviceKeyError> {
        let blob = STANDARD.decode(blob).map_err(|_| DeviceKeyError::NotAKey)?;
        let key = blob.strip_prefix(BLOB_HEAD).ok_or(DeviceKeyError::NotAKey)?;
        let key = <[u8; 32]>::try_from(key).map_err(|_| DeviceKeyError::NotAKey)?;
        let point = VerifyingKey::from_bytes(&key).map_err(|_| DeviceKeyError::Weak)?;
        if point.is_weak() {
            return Err(DeviceKeyError::Weak);
        }
        Ok(DeviceKey(key))
    }

    /// As OpenSSH prints it: `SHA256:` and 43 characters.
    pub fn fingerprint(&self) -> String {
        format!("SHA256:{}", STANDARD_NO_PAD.encode(Sha256::digest(self.blob())))
    }

    /// As in a `.pub` file, without a comment.
    pub fn to_line(&self) -> String {
        format!("ssh-ed25519 {}", STANDARD.encode(self.blob()))
    }

    fn blob(&self) -> Vec<u8> {
        [BLOB_HEAD, &self.0].concat()
    }
}

impl std::fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceKey({})", self.fingerprint())
    }
}

/// A value of `Authorization` in the form that Ollama's client gives it, not yet believed.
#[derive(Clone, Copy)]
pub struct Signed<'a> {
    key: &'a str,
    signature: &'a str,
}

impl<'a> Signed<'a> {
    /// `None`: it has another form.
    pub fn read(value: &'a [u8]) -> Option<Signed<'a>> {
        let value = std::str::from_utf8(value).ok().filter(|value| value.starts_with(BLOB_START))?;
        let (key, signature) = value.split_once(':')?;
        Some(Signed { key, signature })
    }

    /// The key that it says it was made with.
    pub fn key(&self) -> Result<DeviceKey, &'static str> {
        DeviceKey::from_base64(self.key).map_err(|_| cause::MALFORMED)
    }

    /// Whether `key` signed this request at about `now_s`. The time is looked at first, because that is cheap.
    ///
    /// `path` is Ollama's own, without a base path; `query` is the client's, whose `ts` is signed.
    pub fn holds(
        &self,
        key: &DeviceKey,
        method: &str,
        path: &str,
        query: Option<&str>,
        now_s: i64,
    ) -> Result<(), &'static str> {
        let ts = time_of(query)?;
        let at_s: i64 = ts.parse().map_err(|_| cause::BAD_TIMESTAMP)?;
        if at_s.abs_diff(now_s) > WINDOW_S.unsigned_abs() {
            return Err(cause::STALE_TIMESTAMP);
        }
        let signature = STANDARD.decode(self.signature).map_err(|_| cause::MALFORMED)?;
        let signature = Signature::from_slice(&signature).map_err(|_| cause::MALFORMED)?;
        let point = VerifyingKey::from_bytes(&key.0).map_err(|_| cause::BAD_SIGNATURE)?;
        // Strict: a signature has one spelling, and its own point must not be of small order either.
        point.verify_strict(format!("{method},{path}?ts={ts}").as_bytes(), &signature).map_err(|_| cause::BAD_SIGNATURE)
    }
}

/// The query without the time of a signature; everything else as it stands. `None` where nothing is left.
pub fn without_time(query: &str) -> Option<String> {
    let rest: Vec<&str> = query.split('&').filter(|one| !is_time(one)).collect();
    let rest = rest.join("&");
    (!rest.is_empty()).then_some(rest)
}

/// The digits of `ts`, which is there once.
fn time_of(query: Option<&str>) -> Result<&str, &'static str> {
    let mut times = query.unwrap_or_default().split('&').filter(|one| is_time(one));
    let (Some(time), None) = (times.next(), times.next()) else {
        return Err(cause::BAD_TIMESTAMP);
    };
    let digits = time.strip_prefix("ts=").unwrap_or_default();
    let good = !digits.is_empty() && digits.len() <= MAX_TIME_DIGITS && digits.bytes().all(|b| b.is_ascii_digit());
    if good { Ok(digits) } else { Err(cause::BAD_TIMESTAMP) }
}

/// By its name as it stands. A spelling that only decodes to `ts` was not signed, and passes on as any other parameter.
fn is_time(parameter: &str) -> bool {
    parameter.split('=').next() == Some("ts")
}

#[cfg(test)]
mod tests;
