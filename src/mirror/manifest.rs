//! What a model consists of, as its registry says: read strictly, and given to the backends byte for byte.

use std::collections::HashMap;

use bytes::Bytes;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{Fault, hex};

/// A model of thousands of tensors has some hundred bytes for each.
pub(super) const MOST_BYTES: usize = 4 << 20;
const MOST_BLOBS: usize = 10_000;

pub(super) struct Manifest {
    pub bytes: Bytes,
    /// `sha256:..` of the bytes.
    pub digest: String,
    /// Size by digest.
    pub blobs: HashMap<String, u64>,
}

#[derive(Deserialize)]
struct Told {
    #[serde(default)]
    config: Option<Layer>,
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
struct Layer {
    #[serde(default)]
    digest: String,
    #[serde(default)]
    size: u64,
}

impl Manifest {
    /// Ollama's reader is laxer (letters' case, the last of two keys): what it finds beyond this is not there for it, and it then pulls
    /// for itself.
    pub fn read(bytes: Bytes) -> Result<Manifest, Fault> {
        let told: Told =
            serde_json::from_slice(&bytes).map_err(|_| Fault::Manifest("is not the JSON that it should be"))?;
        // Ollama takes a config without a digest for none.
        let config = told.config.filter(|config| !config.digest.is_empty());
        let mut blobs = HashMap::new();
        for layer in told.layers.into_iter().chain(config) {
            if !is_digest(&layer.digest) {
                return Err(Fault::Manifest("has a digest that is none"));
            }
            if blobs.len() == MOST_BLOBS {
                return Err(Fault::Manifest("has too many blobs"));
            }
            if blobs.insert(layer.digest, layer.size).is_some_and(|size| size != layer.size) {
                return Err(Fault::Manifest("gives one blob two sizes"));
            }
        }
        let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        Ok(Manifest { bytes, digest, blobs })
    }
}

/// `sha256:` and 64 hexadecimal digits in lower case: nothing that could be a path.
pub(super) fn is_digest(text: &str) -> bool {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64 && hex.bytes().all(digit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<HashMap<String, u64>, Fault> {
        Manifest::read(Bytes::from(text.to_owned())).map(|manifest| manifest.blobs)
    }

    #[test]
    fn a_manifest_names_each_blob_once_by_digest_and_size() {
        let (a, b) = (format!("sha256:{}", "a".repeat(64)), format!("sha256:{}", "0".repeat(64)));
        let good = format!(
            r#"{{"schemaVersion":2,"config":{{"digest":"{a}","size":5}},"layers":[{{"digest":"{b}","size":7}},{{"digest":"{b}","size":7}}]}}"#
        );
        assert_eq!(read(&good).unwrap(), HashMap::from([(a.clone(), 5), (b.clone(), 7)]));
        assert_eq!(read(r#"{"layers":[],"config":{}}"#).unwrap(), HashMap::new());
        for bad in [
            "{}".to_owned(),
            "[]".to_owned(),
            "nonsense".to_owned(),
            format!(r#"{{"layers":[{{"digest":"{a}","size":-1}}]}}"#),
            format!(r#"{{"layers":[{{"digest":"{a}","size":1}},{{"digest":"{a}","size":2}}]}}"#),
            r#"{"layers":[{"size":1}]}"#.to_owned(),
            r#"{"layers":[{"digest":"sha256:../../../../etc/passwd","size":1}]}"#.to_owned(),
            format!(r#"{{"layers":[{{"digest":"sha256:{}","size":1}}]}}"#, "A".repeat(64)),
            format!(r#"{{"layers":[{{"digest":"sha512:{}","size":1}}]}}"#, "a".repeat(64)),
            format!(r#"{{"layers":[{{"digest":"{a}/","size":1}}]}}"#),
        ] {
            assert!(read(&bad).is_err(), "{bad}");
        }
    }
}
