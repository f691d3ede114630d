//! One Ollama: what was configured of it, where it is, and what runs on it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pingora_core::protocols::tls::CaType;
use pingora_core::utils::tls::{WrappedX509, parse_x509};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::Catalogue;
use super::health::{self, Failed, Health, State};
use super::scheduler::{self, BackendSettings, Trial};
use crate::config::{self, BackendTimeouts, BackendUrl, Secret};
use crate::wire::{ModelRef, convert, model};

/// How long a resolved name is believed: short, so that a backend that moves is found; long enough that a burst of requests
/// asks once.
const RESOLVED_FOR: Duration = Duration::from_secs(5);

/// How long an Ollama is believed that it has no `/v1/responses`: until then requests are converted without asking. Short, because an
/// upgrade brings the route, and asking costs one refused request.
const LACKING_FOR: Duration = Duration::from_secs(60);

/// One Ollama.
pub struct Backend {
    /// Its place in the pool.
    pub place: usize,
    pub name: String,
    pub url: BackendUrl,
    pub weight: u32,
    pub tier: u32,
    slots: u32,
    /// By canonical name.
    model_slots: HashMap<String, u32>,
    may_serve: Vec<Pattern>,
    /// The whole `Authorization` value that it wants.
    authorization: Option<Secret>,
    /// The CAs that its certificate is verified with. `None`: the machine's.
    pub(super) authorities: Option<Arc<CaType>>,
    pub(super) connect: Duration,
    pub(super) silence: Duration,
    in_flight: AtomicU64,
    /// What the last contact said.
    up: AtomicBool,
    health: Mutex<Health>,
    /// It gets no new work, by an operator's command.
    drained: AtomicBool,
    /// The scheduler was told its list.
    pub(super) told_list: AtomicBool,
    addresses: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    /// When it last said that it has no `/v1/responses`.
    without_responses: Mutex<Option<Instant>>,
    pub catalogue: Catalogue,
}

impl Backend {
    /// `authorization`: the whole header's value, wherever it was configured. The error says what to do.
    pub fn new(
        place: usize,
        configured: &config::Backend,
        authorization: Option<Secret>,
        timeouts: &BackendTimeouts,
        health: health::Settings,
    ) -> Result<Backend, String> {
        let name = &configured.name;
        let may_serve = configured.models.iter().map(|text| Pattern::read(text)).collect::<Result<_, _>>();
        let model_slots = configured.model_slots.iter().map(|(text, slots)| {
            let model = model::parse(text).map_err(|e| format!("{text:?}: {e}"))?;
            Ok((model.canonical(), *slots))
        });
        let ca_file = &configured.ca_file;
        let authorities = if ca_file.as_os_str().is_empty() {
            None
        } else {
            Some(authorities(ca_file).map_err(|e| format!("backend {name}: {e}"))?)
        };
        Ok(Backend {
            place,
            name: name.clone(),
            url: configured.url.clone(),
            weight: configured.weight,
            tier: configured.tier,
            slots: configured.slots,
            model_slots: model_slots
                .collect::<Result<_, String>>()
                .map_err(|e| format!("backend {name}: model_slots: {e}"))?,
            may_serve: may_serve.map_err(|e: String| format!("backend {name}: models: {e}"))?,
            authorization,
            authorities,
            connect: timeouts.connect,
            silence: timeouts.silence,
            in_flight: AtomicU64::new(0),
            up: AtomicBool::new(true),
            health: Mutex::new(Health::new(health)),
            drained: AtomicBool::new(false),
            told_list: AtomicBool::new(false),
            addresses: Mutex::new(None),
            without_responses: Mutex::new(None),
            catalogue: Catalogue::default(),
        })
    }

    pub fn authorization(&self) -> Option<&str> {
        self.authorization.as_ref().map(Secret::expose)
    }

    /// It said that it has no `/v1/responses`.
    pub fn note_without_responses(&self) {
        *self.without_responses.lock() = Some(Instant::now());
    }

    /// Whether it is known to have no `/v1/responses`: it said so lately, and no version that has it was read since, or its version is
    /// too old.
    pub fn lacks_responses(&self) -> bool {
        let known = self.catalogue.known();
        let by_version = known.version.as_deref().and_then(convert::is_native);
        let holds = |at: Instant| {
            let since_then = by_version == Some(true) && known.version_read.is_some_and(|read| read > at);
            at.elapsed() < LACKING_FOR && !since_then
        };
        self.without_responses.lock().is_some_and(holds) || by_version == Some(false)
    }

    /// Whether the configuration lets it serve the model.
    pub fn may_serve(&self, model: &ModelRef) -> bool {
        self.may_serve.is_empty() || self.may_serve.iter().any(|pattern| pattern.fits(model))
    }

    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// A request for the model is about to go there: perhaps as a trial.
    pub(super) fn begins(&self, canonical: Option<&str>, now: Instant) -> Trial {
        self.health.lock().begins(canonical, now)
    }

    /// The trial's request has ended without a word of the backend's.
    pub(super) fn gives_up(&self, canonical: Option<&str>, trial: Trial) {
        self.health.lock().gives_up(canonical, trial);
    }

    pub(super) fn count(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn uncount(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether its breakers let a request through.
    pub fn lets(&self, canonical: Option<&str>, now: Instant) -> bool {
        self.health.lock().lets(canonical, now)
    }

    pub fn succeeded(&self, canonical: Option<&str>) {
        self.health.lock().succeeded(canonical);
    }

    pub fn failed(&self, canonical: Option<&str>, how: Failed, now: Instant) {
        self.health.lock().failed(canonical, how, now);
    }

    /// Whether it may get a request for the model now, as far as it is to be trusted.
    pub(super) fn standing(&self, model: &str, now: Instant) -> scheduler::State {
        if self.is_drained() {
            return scheduler::State::Drained;
        }
        let health = self.health.lock();
        match (health.lets(Some(model), now), health.is_trying(model, now)) {
            (false, _) => scheduler::State::Down,
            (true, true) => scheduler::State::Trial,
            (true, false) => scheduler::State::Up,
        }
    }

    /// Its breaker, and the models whose own is not closed.
    pub fn breakers(&self, now: Instant) -> (State, Vec<(String, State)>) {
        let health = self.health.lock();
        (health.state(now), health.models(now).into_iter().map(|(model, state)| (model.to_owned(), state)).collect())
    }

    pub fn is_drained(&self) -> bool {
        self.drained.load(Ordering::Relaxed)
    }

    /// From now on it gets no new work, or gets it again. Whether that is news.
    pub fn drain(&self, drained: bool) -> bool {
        self.drained.swap(drained, Ordering::Relaxed) != drained
    }

    /// What the last contact said; true before the first.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    pub(super) fn for_scheduler(&self) -> BackendSettings {
        BackendSettings {
            weight: f64::from(self.weight),
            tier: self.tier,
            slots: self.slots as usize,
            model_slots: self.model_slots.iter().map(|(model, slots)| (model.clone(), *slots as usize)).collect(),
        }
    }

    /// Whether that is news.
    pub fn note_up(&self, up: bool) -> bool {
        self.up.swap(up, Ordering::Relaxed) != up
    }

    /// How many addresses the name had when it was last resolved.
    pub fn known_addresses(&self) -> usize {
        self.addresses.lock().as_ref().map_or(0, |(_, known)| known.len())
    }

    /// The first `unreachable` of the known addresses could not be connected to: the next requests begin with the one that could.
    pub fn put_first(&self, unreachable: usize) {
        if let Some((_, known)) = &mut *self.addresses.lock()
            && !known.is_empty()
        {
            let length = known.len();
            known.rotate_left(unreachable % length);
        }
    }

    /// All addresses of the backend's name. `localhost` may be `::1` first, where Ollama listens on 127.0.0.1 only.
    pub async fn addresses(&self) -> std::io::Result<Vec<SocketAddr>> {
        if let Some((at, known)) = &*self.addresses.lock()
            && at.elapsed() < RESOLVED_FOR
        {
            return Ok(known.clone());
        }
        let host = self.url.host().trim_start_matches('[').trim_end_matches(']');
        let found = tokio::net::lookup_host((host, self.url.port()));
        let found: Vec<SocketAddr> = match tokio::time::timeout(self.connect, found).await {
            Ok(found) => found?.collect(),
            Err(_) => return Err(std::io::ErrorKind::TimedOut.into()),
        };
        if found.is_empty() {
            return Err(std::io::ErrorKind::NotFound.into());
        }
        *self.addresses.lock() = Some((Instant::now(), found.clone()));
        Ok(found)
    }
}

/// A model that a backend may serve: one by name, or all whose name begins so.
enum Pattern {
    Name(String),
    Start(String),
}

impl Pattern {
    fn read(text: &str) -> Result<Pattern, String> {
        match text.strip_suffix('*') {
            None => {
                model::parse(text).map(|model| Pattern::Name(model.canonical())).map_err(|e| format!("{text:?}: {e}"))
            }
            Some(start) => {
                let start = start.to_ascii_lowercase();
                let start = start.strip_prefix("registry.ollama.ai/").unwrap_or(&start);
                Ok(Pattern::Start(start.strip_prefix("library/").unwrap_or(start).to_owned()))
            }
        }
    }

    fn fits(&self, model: &ModelRef) -> bool {
        match self {
            Pattern::Name(name) => model.canonical() == *name,
            // `qwen3:*` means `qwen3:latest` too.
            Pattern::Start(start) => model.display().starts_with(start) || model.canonical().starts_with(start),
        }
    }
}

/// Only these are trusted then: whoever runs a CA of his own for his backends does not mean every CA of the machine as well.
fn authorities(ca_file: &Path) -> Result<Arc<CaType>, String> {
    let bad = |what: &str| format!("ca_file {}: {what}; give a PEM file with the CA's certificate", ca_file.display());
    let certificates = CertificateDer::pem_file_iter(ca_file).map_err(|e| bad(&format!("cannot be read ({e})")))?;
    let mut authorities = Vec::new();
    for certificate in certificates {
        let certificate = certificate.map_err(|_| bad("is not PEM"))?;
        // Pingora adds them to a store at each connection and parses them with an `expect` before: what is no CA is refused here.
        RootCertStore::empty().add(certificate.clone()).map_err(|_| bad("holds a certificate that is none of a CA"))?;
        authorities.push(WrappedX509::new(certificate.to_vec(), parse_x509));
    }
    if authorities.is_empty() {
        return Err(bad("holds no certificate"));
    }
    Ok(authorities.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEALTH: health::Settings =
        health::Settings { failures: 3, rest: Duration::from_secs(5), most_rest: Duration::from_secs(60) };

    fn backend(models: &[&str]) -> Backend {
        let configured = config::Backend {
            name: "gpu-1".into(),
            models: models.iter().map(|model| (*model).to_owned()).collect(),
            model_slots: [("LLAMA3.2:latest".to_owned(), 4)].into(),
            ..config::Backend::default()
        };
        Backend::new(0, &configured, None, &BackendTimeouts::default(), HEALTH).expect("good settings")
    }

    #[test]
    fn a_backend_serves_the_models_that_it_may_in_any_spelling() {
        let serves = |models: &[&str], name: &str| backend(models).may_serve(&model::parse(name).expect("a name"));
        assert!(serves(&[], "anything:7b"));
        assert!(serves(&["llama3.2"], "Library/LLAMA3.2:latest"));
        assert!(!serves(&["llama3.2"], "llama3.2:1b"));
        for name in ["qwen3", "qwen3:8b", "registry.ollama.ai/library/Qwen3:4b"] {
            assert!(serves(&["library/QWEN3:*"], name), "{name}");
        }
        assert!(!serves(&["qwen3:*"], "qwen3-coder"));
        assert!(serves(&["qwen3*"], "qwen3-coder") && serves(&["*"], "x/y:z"));
        assert!(serves(&["hf.co/us/*"], "hf.co/US/model:q4"));
    }

    #[test]
    fn slots_are_known_by_the_models_canonical_name() {
        let backend = backend(&[]);
        let told = backend.for_scheduler();
        assert_eq!((told.model_slots.get("llama3.2"), told.slots), (Some(&4), 1));
    }

    #[test]
    fn a_models_name_or_a_ca_that_is_none_is_refused_with_its_place() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let bad = |configured: config::Backend| {
            let named = config::Backend { name: "gpu-1".into(), ..configured };
            match Backend::new(0, &named, None, &BackendTimeouts::default(), HEALTH) {
                Ok(_) => panic!("it must be refused"),
                Err(e) => e,
            }
        };
        let models = bad(config::Backend { models: vec!["a/b/c/d".into()], ..config::Backend::default() });
        assert!(models.starts_with("backend gpu-1: models: \"a/b/c/d\""), "{models}");
        let ca = bad(config::Backend { ca_file: file.path().into(), ..config::Backend::default() });
        assert!(ca.contains("holds no certificate"), "{ca}");
    }
}
