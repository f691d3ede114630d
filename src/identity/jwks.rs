//! A JWKS document (RFC 7517) as verification keys. Pure: bytes in, so that a file and a URL read alike.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::keys::{KeyError, VerificationKey};
use super::strict_json;

/// Largest document, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 1024 * 1024;
/// Longest `kid`, in bytes.
pub const MAX_KID_BYTES: usize = 256;

/// A key of the document that was passed over.
#[derive(Clone, Debug, PartialEq)]
pub struct Skipped {
    /// Its place in `keys`, from 0.
    pub index: usize,
    pub why: String,
}

/// The keys that can verify our tokens, and why the others cannot.
///
/// Passed over: other key types and curves, `use` other than `sig`, `key_ops` without `verify`, another `alg`, weak
/// keys, and `oct`: a secret in a document that is made to be published is none. A private key refuses the whole
/// document.
pub fn read(document: &[u8]) -> Result<(Vec<VerificationKey>, Vec<Skipped>), KeyError> {
    if document.trim_ascii().is_empty() {
        return Err(KeyError::Empty);
    }
    if document.len() > MAX_DOCUMENT_BYTES {
        return Err(KeyError::NotAJwks);
    }
    let members = strict_json::object(document).map_err(|_| KeyError::NotAJwks)?;
    let Some(Value::Array(entries)) = members.get("keys") else { return Err(KeyError::NotAJwks) };
    let (mut keys, mut skipped) = (Vec::new(), Vec::new());
    for (index, entry) in entries.iter().enumerate() {
        match entry.as_object().ok_or_else(|| "not an object".to_owned()).and_then(key) {
            Ok(key) => keys.push(key),
            Err(why) => skipped.push(Skipped { index, why }),
        }
        if entry.get("kty").is_some_and(|kty| kty != "oct") && entry.get("d").is_some() {
            return Err(KeyError::PrivateInJwks);
        }
    }
    if keys.is_empty() { Err(KeyError::NoUsableKey) } else { Ok((keys, skipped)) }
}

fn key(jwk: &Map<String, Value>) -> Result<VerificationKey, String> {
    let text = |name: &str| match jwk.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(format!("`{name}` is not a string")),
    };
    let number = |name: &str| -> Result<Vec<u8>, String> {
        let encoded = text(name)?.ok_or_else(|| format!("`{name}` is missing"))?;
        URL_SAFE_NO_PAD.decode(encoded).map_err(|_| format!("`{name}` is not base64url"))
    };
    if text("use")?.is_some_and(|word| word != "sig") {
        return Err("`use` is not `sig`".into());
    }
    if let Some(operations) = jwk.get("key_ops") {
        let verifies = operations.as_array().is_some_and(|list| list.iter().any(|operation| operation == "verify"));
        if !verifies {
            return Err("`key_ops` has no `verify`".into());
        }
    }
    let words = |error: KeyError| error.to_string();
    let key = match (text("kty")?, text("crv")?) {
        (Some("RSA"), _) => VerificationKey::from_rsa_numbers(&number("n")?, &number("e")?).map_err(words)?,
        (Some("EC"), Some("P-256")) => {
            let (x, y) = (number("x")?, number("y")?);
            if x.len() != 32 || y.len() != 32 {
                return Err("the point has not the length of P-256".into());
            }
            VerificationKey::from_p256_point(&[&[4], x.as_slice(), &y].concat()).map_err(words)?
        }
        (Some("OKP"), Some("Ed25519")) => VerificationKey::from_ed25519_bytes(&number("x")?).map_err(words)?,
        _ => return Err("key type or curve is not supported".into()),
    };
    // RFC 9864 names the curve where RFC 8037 said EdDSA; the key is the same.
    let ours = |word| word == key.algorithm().as_str() || (word == "Ed25519" && key.algorithm().as_str() == "EdDSA");
    if text("alg")?.is_some_and(|word| !ours(word)) {
        return Err(format!("`alg` is not {}", key.algorithm().as_str()));
    }
    match text("kid")? {
        Some(kid) if kid.is_empty() || kid.len() > MAX_KID_BYTES => Err("`kid` is empty or too long".into()),
        Some(kid) => Ok(key.with_kid(kid.to_owned())),
        None => Ok(key),
    }
}
