//! The models that the simulator holds: names, abilities, and which are loaded.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;

use super::text;

/// What a model does when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Voice {
    Random,
    Story,
    Tools,
    /// As `Tools`, but the runner finds the call: it arrives in the last record.
    Jinja,
    Think,
    Stutter,
    Loop,
    Slow,
    Embed,
    /// Cannot be loaded.
    Broken,
    /// No script of its own.
    Plain,
}

impl Voice {
    fn of(short: &str) -> Voice {
        match short {
            "tiny" => Voice::Random,
            "tiny-story" => Voice::Story,
            "tiny-tools" => Voice::Tools,
            "tiny-jinja" => Voice::Jinja,
            "tiny-think" => Voice::Think,
            "tiny-stutter" => Voice::Stutter,
            "tiny-loop" => Voice::Loop,
            "tiny-slow" => Voice::Slow,
            "tiny-embed" => Voice::Embed,
            "tiny-broken" => Voice::Broken,
            _ => Voice::Plain,
        }
    }

    /// Ollama's words for what the model can do. The plain ones take tools and never call one.
    pub fn capabilities(self) -> &'static [&'static str] {
        match self {
            Voice::Embed => &["embedding"],
            Voice::Tools | Voice::Jinja | Voice::Plain => &["completion", "tools"],
            Voice::Think => &["completion", "thinking"],
            _ => &["completion"],
        }
    }

    /// What `/api/tags` says, which reads only the model's layers: neither a runner's template nor its kind shows.
    pub fn listed_capabilities(self) -> &'static [&'static str] {
        match self {
            Voice::Embed | Voice::Jinja => &["completion"],
            _ => self.capabilities(),
        }
    }

    pub fn can(self, what: &str) -> bool {
        self.capabilities().contains(&what)
    }
}

/// A model as the lists show it.
#[derive(Debug, Clone)]
pub(super) struct Model {
    /// With its tag, as it is displayed: `tiny-story:latest`.
    pub name: String,
    pub voice: Voice,
    pub digest: String,
    pub size_bytes: u64,
    /// Since 1970.
    pub modified: Duration,
}

impl Model {
    fn new(name: &str, voice: Voice, modified: Duration) -> Model {
        let digest = <sha2::Sha256 as sha2::Digest>::digest(name.as_bytes());
        Model {
            name: name.to_owned(),
            voice,
            digest: text::hex(&digest),
            size_bytes: 480_000 + u64::from(digest[0]) * 40,
            modified,
        }
    }
}

/// Why a name leads to no model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoModel {
    Empty,
    BadName,
    /// `:cloud`, `-cloud`: runs elsewhere, and this server has that switched off.
    Cloud,
    Absent,
}

/// What is there and what is loaded.
pub(super) struct Models {
    held: Mutex<Vec<Model>>,
    loaded: Mutex<HashMap<String, Duration>>,
}

/// At most so many models, whatever is created.
const MOST_MODELS: usize = 10_000;

impl Models {
    pub fn new(names: &[String]) -> Models {
        let now = text::unix_now();
        let held = names
            .iter()
            .filter_map(|name| display_name(name).ok())
            .map(|name| Model::new(&name, Voice::of(name.strip_suffix(":latest").unwrap_or(&name)), now))
            .collect();
        Models { held: Mutex::new(held), loaded: Mutex::new(HashMap::new()) }
    }

    /// Finds the model that a request names. `fault-..` is always there and never listed.
    pub fn find(&self, raw: &str) -> Result<Model, NoModel> {
        let name = display_name(raw)?;
        if name.starts_with("fault-") {
            return Ok(Model::new(&name, Voice::Plain, Duration::ZERO));
        }
        let held = self.held.lock();
        held.iter().find(|model| model.name.eq_ignore_ascii_case(&name)).cloned().ok_or(NoModel::Absent)
    }

    pub fn all(&self) -> Vec<Model> {
        self.held.lock().clone()
    }

    /// Puts a model under another name, in place of what was there. The copy behaves as its source does.
    pub fn copy(&self, source: &Model, destination: &str) -> Result<(), NoModel> {
        let name = display_name(destination)?;
        let mut held = self.held.lock();
        held.retain(|model| !model.name.eq_ignore_ascii_case(&name));
        if held.len() < MOST_MODELS {
            held.push(Model { modified: text::unix_now(), name, ..source.clone() });
        }
        Ok(())
    }

    /// A model that was pulled.
    pub fn add(&self, raw: &str) -> Result<(), NoModel> {
        let name = display_name(raw)?;
        let voice = Voice::of(name.strip_suffix(":latest").unwrap_or(&name));
        self.copy(&Model::new(&name, voice, Duration::ZERO), &name)
    }

    /// A model that was fetched from a registry, with the digest of its manifest.
    pub fn add_fetched(&self, raw: &str, digest: String, size_bytes: u64) -> Result<(), NoModel> {
        let name = display_name(raw)?;
        self.copy(&Model { digest, size_bytes, ..Model::new(&name, Voice::Plain, Duration::ZERO) }, &name)
    }

    pub fn remove(&self, model: &Model) {
        self.held.lock().retain(|own| own.name != model.name);
        self.unload(&model.name);
    }

    pub fn is_loaded(&self, name: &str) -> bool {
        self.loaded.lock().contains_key(name)
    }

    /// Marks a model as loaded and used just now.
    pub fn touch(&self, name: &str) {
        let now = text::unix_now();
        let mut loaded = self.loaded.lock();
        if let Some(used) = loaded.get_mut(name) {
            *used = now;
        } else if loaded.len() < MOST_MODELS {
            loaded.insert(name.to_owned(), now);
        }
    }

    pub fn unload(&self, name: &str) {
        self.loaded.lock().remove(name);
    }

    /// Loaded models with the time of their last use, the latest first.
    pub fn running(&self) -> Vec<(Model, Duration)> {
        let loaded = self.loaded.lock().clone();
        let mut running: Vec<_> =
            self.all().into_iter().filter_map(|m| loaded.get(&m.name).map(|used| (m.clone(), *used))).collect();
        running.sort_by_key(|(_, used)| std::cmp::Reverse(*used));
        running
    }
}

/// The name as Ollama displays it: the default registry and namespace dropped, the tag always there.
///
/// Source: ollama `types/model/name.go` and `internal/modelref`, as read for 0.33.0-rc2.
pub(super) fn display_name(raw: &str) -> Result<String, NoModel> {
    let raw = raw.trim();
    if raw.is_empty() {
        return Err(NoModel::Empty);
    }
    let mut base = raw;
    if let Some((before, suffix)) = raw.rsplit_once(':') {
        let suffix = suffix.trim().to_ascii_lowercase();
        if suffix == "cloud" || (suffix.ends_with("-cloud") && !suffix.contains('/')) {
            return Err(NoModel::Cloud);
        }
        if suffix == "local" {
            base = before;
        }
    }
    let base = base.split_once("://").map_or(base, |(_, rest)| rest);
    let (path, tag) = match base.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, tag),
        _ => (base, "latest"),
    };
    let mut parts = path.rsplitn(3, '/');
    let model = parts.next().unwrap_or_default();
    let namespace = parts.next().unwrap_or("library");
    let host = parts.next().unwrap_or("registry.ollama.ai");
    let valid =
        part(host, 350, b"_.:-") && part(namespace, 80, b"_-") && part(model, 80, b"_.-") && part(tag, 80, b"_.-");
    if !valid {
        return Err(NoModel::BadName);
    }
    let default_host = host.eq_ignore_ascii_case("registry.ollama.ai");
    let default_namespace = namespace.eq_ignore_ascii_case("library");
    Ok(match (default_host, default_namespace) {
        (true, true) => format!("{model}:{tag}"),
        (true, false) => format!("{namespace}/{model}:{tag}"),
        (false, _) => format!("{host}/{namespace}/{model}:{tag}"),
    })
}

fn part(text: &str, longest: usize, marks: &[u8]) -> bool {
    let mut bytes = text.bytes();
    text.len() <= longest
        && bytes.next().is_some_and(|first| first.is_ascii_alphanumeric() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || marks.contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_they_mean_to_ollama() {
        for raw in [
            "llama3.2",
            " LLAMA3.2:latest ",
            "library/llama3.2",
            "http://registry.ollama.ai/library/llama3.2:latest",
            "llama3.2:local",
        ] {
            let name = display_name(raw).expect("a valid name");
            assert!(name.eq_ignore_ascii_case("llama3.2:latest"), "{raw}");
        }
        assert_eq!(display_name("hf.co/user/repo:Q4").as_deref(), Ok("hf.co/user/repo:Q4"));
        assert_eq!(display_name("x:cloud"), Err(NoModel::Cloud));
        assert_eq!(display_name("gpt-oss:120b-cloud"), Err(NoModel::Cloud));
        assert_eq!(display_name("a b"), Err(NoModel::BadName));
        assert_eq!(display_name("a//b"), Err(NoModel::BadName));
        assert_eq!(display_name(""), Err(NoModel::Empty));
    }
}
