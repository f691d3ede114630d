//! Who sends a request: the credential is read, and whoever knows its form is asked.

use std::sync::Arc;

use http::HeaderMap;

use super::credential::{self, Credential};
use super::keyring::Keyring;
use super::{Caller, Rejection, Verifier};

/// What of a request says who sends it.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub headers: &'a HeaderMap,
    pub method: &'a str,
    /// Ollama's own path, without a base path: a device signs it.
    pub path: &'a str,
    pub query: Option<&'a str>,
}

/// Who it was.
#[derive(Clone, Debug)]
pub struct Identified {
    pub caller: Arc<Caller>,
    /// A device: `ts` in the query is part of its signature and means nothing to a backend.
    pub by_device: bool,
}

/// The caller of a request, at `now_s` seconds since 1970.
///
/// A device's signature is checked each time (45 microseconds): it is another one each second.
pub fn identify(
    verifier: &Verifier,
    keyring: &Keyring,
    asked: &Asked<'_>,
    now_s: i64,
) -> Result<Identified, Rejection> {
    let found = match credential::read(asked.headers)? {
        Credential::Token(token) => verifier.verify_token(token, now_s).map(|caller| (caller, false)),
        Credential::ApiKey(key) => keyring.api_key(key).map(|caller| (caller, false)),
        Credential::Device(signed) => signed.key().and_then(|key| {
            // A key that is nobody's costs no check of a signature.
            let caller = keyring.device(&key)?;
            signed.holds(&key, asked.method, asked.path, asked.query, now_s)?;
            Ok((caller, true))
        }),
    };
    let (caller, by_device) = found.map_err(Rejection::Invalid)?;
    Ok(Identified { caller, by_device })
}
