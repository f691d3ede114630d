//! What a backend says of itself: `/api/tags`, `/api/ps`, `/api/show` and `/api/version`, for the catalogue.
//!
//! Lists are read with [`super::list`]'s strict eyes first, so that a model is known under the name under which it is shown; what
//! else an entry says is taken where it has the type that it should have, and `None` otherwise: a list with one odd entry is still a list.
use serde::Deserialize;
use serde_json::Value;

use super::Endpoint;
use super::list::{self, ListError};

/// One model that a backend holds, as its list says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// As the backend spells it. Not yet judged: [`super::model::parse`] it before use.
    pub name: String,
    /// It has a `remote_host`: a stub whose prompts go to another machine.
    pub remote: bool,
    /// Of its manifest: the same on two backends is the same model.
    pub digest: Option<String>,
    /// RFC 3339, as the backend wrote it.
    pub modified_at: Option<String>,
    pub size_bytes: Option<u64>,
    /// Since Ollama 0.30. What the model's layers alone show: [`Shown`] knows better.
    pub capabilities: Option<Vec<String>>,
    /// Since Ollama 0.30.
    pub context_length: Option<u64>,
}

/// One model that is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    pub name: String,
    /// RFC 3339, as the backend wrote it; far away where it is kept for ever.
    pub expires_at: Option<String>,
    pub size_bytes: Option<u64>,
    pub size_vram_bytes: Option<u64>,
    /// With which it was loaded. Since Ollama 0.10.
    pub context_length: Option<u64>,
}

/// A model's details.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// Since Ollama 0.6.
    pub capabilities: Option<Vec<String>>,
    /// That it was trained with.
    pub context_length: Option<u64>,
}

/// The models of `/api/tags`.
pub fn held(body: &[u8]) -> Result<Vec<Held>, ListError> {
    entries(Endpoint::Tags, body, |name, remote, entry| Held {
        name,
        remote,
        digest: text(&entry["digest"]),
        modified_at: text(&entry["modified_at"]),
        size_bytes: entry["size"].as_u64(),
        capabilities: words(&entry["capabilities"]),
        context_length: entry["details"]["context_length"].as_u64(),
    })
}

/// The models of `/api/ps`.
pub fn loaded(body: &[u8]) -> Result<Vec<Loaded>, ListError> {
    entries(Endpoint::Ps, body, |name, _, entry| Loaded {
        name,
        expires_at: text(&entry["expires_at"]),
        size_bytes: entry["size"].as_u64(),
        size_vram_bytes: entry["size_vram"].as_u64(),
        context_length: entry["context_length"].as_u64(),
    })
}

/// The reply of `/api/show`. `None`: it is none.
pub fn shown(body: &[u8]) -> Option<Shown> {
    /// Nothing else of it is kept: a template and a licence may be long.
    #[derive(Deserialize)]
    struct Show {
        #[serde(default)]
        capabilities: Value,
        #[serde(default)]
        model_info: serde_json::Map<String, Value>,
    }
    let show: Show = serde_json::from_slice(body).ok()?;
    let family = show.model_info.get("general.architecture").and_then(Value::as_str).unwrap_or_default();
    let context = show.model_info.get(&format!("{family}.context_length")).and_then(Value::as_u64);
    Some(Shown { capabilities: words(&show.capabilities), context_length: context })
}

/// The version of `/api/version`. `None`: it is none.
pub fn version(body: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    text(&value["version"])
}

/// Orders versions by age: the numbers between dots, and a release candidate before its release. What is no version is the oldest.
pub fn age(version: &str) -> (Vec<u64>, bool) {
    let (numbers, candidate) = version.split_once('-').unwrap_or((version, ""));
    let numbers: Option<Vec<u64>> = numbers.split('.').map(|number| number.parse().ok()).collect();
    (numbers.unwrap_or_default(), candidate.is_empty())
}

fn entries<T>(endpoint: Endpoint, body: &[u8], make: impl Fn(String, bool, &Value) -> T) -> Result<Vec<T>, ListError> {
    list::entries(endpoint, body)?
        .into_iter()
        .map(|(model, entry)| {
            let entry = serde_json::from_slice(entry).unwrap_or(Value::Null);
            Ok(make(model.name, model.remote, &entry))
        })
        .collect()
}

/// Short texts only: these are shown to operators, and a backend may say anything.
fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| text.len() <= 128 && text.bytes().all(|b| b.is_ascii_graphic())).map(str::to_owned)
}

fn words(value: &Value) -> Option<Vec<String>> {
    Some(value.as_array()?.iter().take(32).filter_map(text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_list_says_of_a_model_is_read() {
        let body = br#"{"models":[{"name":"a:latest","model":"a:latest","modified_at":"2026-01-01T00:00:00Z","size":5,"digest":"ab",
            "details":{"family":"llama","context_length":4096},"capabilities":["completion","tools"]},
            {"name":"b:latest","model":"b:latest","remote_host":"https://ollama.com:443","size":"large","digest":7},
            {"name":"c","model":"d"}]}"#;
        let read = held(body).unwrap();
        assert_eq!(read.len(), 2, "an entry with two names is none");
        assert_eq!((read[0].name.as_str(), read[0].remote, read[0].size_bytes), ("a:latest", false, Some(5)));
        assert_eq!(read[0].capabilities.as_deref().unwrap(), ["completion", "tools"]);
        assert_eq!((read[0].context_length, read[0].digest.as_deref()), (Some(4096), Some("ab")));
        assert_eq!(
            read[1],
            Held { name: "b:latest".into(), remote: true, ..Held::default() },
            "odd types are not known"
        );
        assert!(held(b"{\"models\":{}}").is_err());
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let mut versions = ["0.9.1", "0.33.0", "0.33.0-rc2", "0.17.4", "1.0.0", "nightly"];
        versions.sort_by_key(|version| age(version));
        assert_eq!(versions, ["nightly", "0.9.1", "0.17.4", "0.33.0-rc2", "0.33.0", "1.0.0"]);
    }

    #[test]
    fn what_is_loaded_is_read() {
        let body = br#"{"models":[{"name":"a:latest","model":"a:latest","size":9,"expires_at":"2318-01-01T00:00:00Z","size_vram":7,"context_length":8192}]}"#;
        let wanted = Loaded {
            name: "a:latest".into(),
            expires_at: Some("2318-01-01T00:00:00Z".into()),
            size_bytes: Some(9),
            size_vram_bytes: Some(7),
            context_length: Some(8192),
        };
        assert_eq!(loaded(body).unwrap(), [wanted]);
    }

    #[test]
    fn details_have_the_context_length_of_their_own_family() {
        let body = br#"{"capabilities":["embedding"],"model_info":{"general.architecture":"bert","bert.context_length":512,"llama.context_length":1}}"#;
        assert_eq!(
            shown(body),
            Some(Shown { capabilities: Some(vec!["embedding".into()]), context_length: Some(512) })
        );
        assert_eq!(shown(b"{}"), Some(Shown::default()));
        assert_eq!(shown(b"no"), None);
        assert_eq!(version(br#"{"version":"0.33.0"}"#).as_deref(), Some("0.33.0"));
        assert_eq!(version(br#"{"version":"\u001b[2J"}"#), None);
    }
}
