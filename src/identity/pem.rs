//! The PEM armour around a key: found, opened, named. What is inside is for [`keys`](super::keys) and
//! [`signing`](super::signing).
//!
//! Lenient where an environment variable bends the text (CRLF, indentation, a literal `\n` for each line break, all on
//! one line), because the DER inside is what counts and is read strictly.

use base64::{Engine, engine::general_purpose::STANDARD};

use super::keys::KeyError;

/// One armoured block.
pub struct Block {
    /// `PUBLIC KEY`, `PRIVATE KEY`, ...
    pub label: String,
    pub der: Vec<u8>,
}

const BEGIN: &str = "-----BEGIN ";
const END: &str = "-----END ";
const DASHES: &str = "-----";

/// Whether a text looks like PEM: for the one who put a key where a shared secret belongs.
pub fn looks_like_pem(bytes: &[u8]) -> bool {
    bytes.windows(BEGIN.len()).any(|window| window == BEGIN.as_bytes())
}

/// The one key of a text. `EC PARAMETERS`, which `openssl ecparam -genkey` writes before its key, is passed over.
pub fn single_key(bytes: &[u8]) -> Result<Block, KeyError> {
    let text = std::str::from_utf8(bytes).map_err(|_| KeyError::NotPem)?;
    if text.trim().is_empty() {
        return Err(KeyError::Empty);
    }
    let text = text.replace("\\n", "\n");
    let mut rest = text.as_str();
    let mut found = None;
    while let Some(start) = rest.find(BEGIN) {
        let after = &rest[start + BEGIN.len()..];
        let (label, after) = after.split_once(DASHES).ok_or(KeyError::NotPem)?;
        let (body, after) = after.split_once(&format!("{END}{label}{DASHES}")).ok_or(KeyError::NotPem)?;
        rest = after;
        if label == "EC PARAMETERS" {
            continue;
        }
        if label == "ENCRYPTED PRIVATE KEY" || body.contains("ENCRYPTED") {
            return Err(KeyError::Encrypted);
        }
        let packed: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        let der = STANDARD.decode(packed).map_err(|_| KeyError::NotPem)?;
        if found.replace(Block { label: label.to_owned(), der }).is_some() {
            return Err(KeyError::SeveralInPem);
        }
    }
    found.ok_or(KeyError::NotPem)
}
