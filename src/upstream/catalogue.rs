//! What is known of a backend's models, read in the background; and with it whether the backend is up.
//!
//! Each backend is read by a task of its own, each look has a deadline of its own, and requests read what is known and never wait
//! for a look: one stalled backend delays nobody. But for the first moments after the start, when nothing is known yet.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::Method;

use super::client::{Call, Client, ClientError, Reply};
use super::health::Failed;
use super::placement::Has;
use super::{Backend, Pool};
use crate::ledger::Metrics;
use crate::mirror::Mirror;
use crate::wire::inventory::{self, Held, Loaded, Shown};
use crate::wire::{ModelRef, Source, model};

/// A look at a backend takes no longer: `/api/tags` answers at once, even during a load (ollama-wire, section 1).
const WITHIN: Duration = Duration::from_secs(5);
const LIMIT_BYTES: usize = 16 << 20;

/// What is known of one backend.
#[derive(Default)]
pub struct Catalogue {
    known: ArcSwap<Known>,
    /// Whoever reads the list for the first time, while others wait for it.
    turn: tokio::sync::Mutex<()>,
    /// Looks at the list that came to an end, well or not.
    looks: AtomicU64,
}

/// What is known of one backend at one moment. Times say when it was read; `None`: never.
#[derive(Clone, Default)]
pub struct Known {
    pub version: Option<Arc<str>>,
    /// By canonical name.
    pub models: Arc<HashMap<String, Arc<Model>>>,
    /// By canonical name. Of a model that was used since the last look only the name is known.
    pub loaded: Arc<HashMap<String, Loaded>>,
    /// When a model was seen to answer that was not among the loaded ones.
    noted: Arc<HashMap<String, Instant>>,
    /// Names that a model has only while it is on its way to the backend. They are nobody's model.
    pub temporary: Arc<[ModelRef]>,
    pub version_read: Option<Instant>,
    pub models_read: Option<Instant>,
    pub loaded_read: Option<Instant>,
}

/// A model that a backend holds.
#[derive(Clone)]
pub struct Model {
    /// Whether the backend would send this model's prompts to ollama.com: a copy of a stub has an innocent name (ollama-wire,
    /// section 6.3).
    pub source: Source,
    pub held: Held,
    /// `None`: not read yet.
    pub shown: Option<Arc<Shown>>,
}

impl Model {
    /// `None`: not known.
    pub fn capabilities(&self) -> Option<&[String]> {
        let shown = self.shown.as_ref().and_then(|shown| shown.capabilities.as_deref());
        shown.or(self.held.capabilities.as_deref())
    }

    /// That it was trained with. `None`: not known.
    pub fn context_length(&self) -> Option<u64> {
        self.shown.as_ref().and_then(|shown| shown.context_length).or(self.held.context_length)
    }
}

impl Catalogue {
    pub fn known(&self) -> Arc<Known> {
        self.known.load_full()
    }

    /// `None`: the model is not known. By canonical name, as everywhere here.
    pub fn source(&self, canonical: &str) -> Option<Source> {
        self.known.load().models.get(canonical).map(|model| model.source)
    }

    pub fn has(&self, canonical: &str) -> Has {
        let known = self.known.load();
        match (known.loaded.contains_key(canonical), known.models_read) {
            (true, _) => Has::Loaded,
            (false, None) => Has::Unknown,
            (false, Some(_)) if known.models.contains_key(canonical) => Has::Held,
            (false, Some(_)) => Has::Absent,
        }
    }

    /// Whether the list was ever read. Before that a stub of a cloud model cannot be told from a local one.
    pub fn is_read(&self) -> bool {
        self.known.load().models_read.is_some()
    }

    /// Whether somebody has tried to read the list.
    pub fn was_tried(&self) -> bool {
        self.looks.load(Ordering::Acquire) > 0
    }

    /// The models' names, in order, at most `most`; and how many there are.
    pub fn names(&self, most: usize) -> (Vec<String>, usize) {
        let known = self.known.load();
        let mut names: Vec<String> = known.models.keys().cloned().collect();
        names.sort_unstable();
        names.truncate(most);
        (names, known.models.len())
    }

    /// The backend has just answered with the model, so it is loaded there.
    pub fn note_loaded(&self, canonical: &str) {
        if self.known.load().loaded.contains_key(canonical) {
            return;
        }
        let (loaded, now) = (Loaded { name: canonical.to_owned(), ..Loaded::default() }, Instant::now());
        self.known.rcu(|known| {
            let (mut all, mut noted) = (HashMap::clone(&known.loaded), HashMap::clone(&known.noted));
            all.insert(canonical.to_owned(), loaded.clone());
            noted.insert(canonical.to_owned(), now);
            Known { loaded: Arc::new(all), noted: Arc::new(noted), ..Known::clone(known) }
        });
    }

    /// The backend has just said that it has not got the model.
    pub fn note_absent(&self, canonical: &str) {
        if !self.known.load().models.contains_key(canonical) && !self.known.load().loaded.contains_key(canonical) {
            return;
        }
        self.known.rcu(|known| {
            let (mut models, mut loaded) = (HashMap::clone(&known.models), HashMap::clone(&known.loaded));
            models.remove(canonical);
            loaded.remove(canonical);
            Known { models: Arc::new(models), loaded: Arc::new(loaded), ..Known::clone(known) }
        });
    }

    /// Reads the list if it never was. Whoever comes while another reads waits for that one, and takes what came of it.
    pub async fn read_first(&self, backend: &Backend, client: &Client, metrics: &Metrics) {
        let looks = self.looks.load(Ordering::Acquire);
        let _turn = self.turn.lock().await;
        if !self.is_read() && self.looks.load(Ordering::Acquire) == looks {
            let read = self.read_models(backend, client, metrics).await;
            note(backend, read.is_ok(), metrics);
        }
    }

    /// Reads the list of one backend. The catalogue keeps what it knew where that fails.
    async fn read_models(&self, backend: &Backend, client: &Client, metrics: &Metrics) -> Result<(), ClientError> {
        let reply = look(backend, client, "/api/tags").await;
        if let Ok(reply) = &reply
            && let Ok(listed) = inventory::held(&reply.body)
        {
            let before = self.known();
            let mut models = HashMap::with_capacity(listed.len());
            let mut temporary = Vec::new();
            for held in listed {
                let Ok(model) = model::parse(&held.name) else { continue };
                if model.is_temporary() {
                    temporary.push(model);
                    continue;
                }
                let canonical = model.canonical();
                metrics.known_model(&canonical);
                let source = if held.remote { Source::Cloud } else { model.source };
                let old = before.models.get(&canonical).filter(|old| old.held.digest == held.digest);
                let shown = old.and_then(|old| old.shown.clone());
                models.insert(canonical, Arc::new(Model { source, held, shown }));
            }
            let (models, temporary, now) = (Arc::new(models), Arc::from(temporary), Instant::now());
            self.known.rcu(|known| Known {
                models: Arc::clone(&models),
                temporary: Arc::clone(&temporary),
                models_read: Some(now),
                ..Known::clone(known)
            });
        }
        self.looks.fetch_add(1, Ordering::AcqRel);
        reply.map(|_| ())
    }

    async fn read_loaded(&self, backend: &Backend, client: &Client) -> Result<(), ClientError> {
        let asked = Instant::now();
        let reply = look(backend, client, "/api/ps").await?;
        if let Ok(listed) = inventory::loaded(&reply.body) {
            let by_name = listed.into_iter().filter_map(|loaded| {
                let model = model::parse(&loaded.name).ok()?;
                Some((model.canonical(), loaded))
            });
            let (listed, now) = (by_name.collect::<HashMap<_, _>>(), Instant::now());
            self.known.rcu(|known| {
                // What has answered meanwhile may be newer than this list.
                let noted = known.noted.iter().filter(|(_, at)| **at >= asked).map(|(name, at)| (name.clone(), *at));
                let noted: HashMap<String, Instant> = noted.collect();
                let mut loaded = listed.clone();
                for name in noted.keys() {
                    loaded.entry(name.clone()).or_insert_with(|| Loaded { name: name.clone(), ..Loaded::default() });
                }
                Known {
                    loaded: Arc::new(loaded),
                    noted: Arc::new(noted),
                    loaded_read: Some(now),
                    ..Known::clone(known)
                }
            });
        }
        Ok(())
    }

    async fn read_version(&self, backend: &Backend, client: &Client) -> Result<(), ClientError> {
        let reply = look(backend, client, "/api/version").await?;
        let version: Option<Arc<str>> = inventory::version(&reply.body).map(Arc::from);
        let now = Instant::now();
        self.known.rcu(|known| {
            let mut next = Known { version: version.clone(), version_read: Some(now), ..Known::clone(known) };
            if known.version.is_some() && known.version != version {
                // What an Ollama says of a model changes with its version.
                let mut models = HashMap::clone(&known.models);
                models.values_mut().for_each(|model| *model = Arc::new(Model { shown: None, ..Model::clone(model) }));
                next.models = Arc::new(models);
            }
            next
        });
        Ok(())
    }

    /// Reads the details of models that have none: from a backend of the same version that told them already, else from this one.
    async fn read_details(&self, backend: &Backend, pool: &Pool, client: &Client) {
        let known = self.known();
        let without = known.models.iter().filter(|(_, model)| model.shown.is_none() && model.source == Source::Local);
        let (began, mut read) = (Instant::now(), Vec::new());
        for (canonical, model) in without {
            let held = &model.held;
            let shown = match told_elsewhere(pool, backend, &known, held.digest.as_deref()) {
                Some(shown) => shown,
                None if began.elapsed() > WITHIN => continue, // the next time
                None => {
                    let body = serde_json::json!({ "model": held.name }).to_string();
                    let call = Call { body: Some(Bytes::from(body)), method: Method::POST, ..call("/api/show") };
                    let Ok(reply) = client.call(backend, &call).await else { break };
                    // What cannot be read is not asked again before the model changes.
                    Arc::new(inventory::shown(&reply.body).filter(|_| reply.head.status == 200).unwrap_or_default())
                }
            };
            read.push((canonical, held.digest.as_deref(), shown));
        }
        if read.is_empty() {
            return;
        }
        self.known.rcu(|known| {
            let mut models = HashMap::clone(&known.models);
            for (canonical, digest, shown) in &read {
                let same = models.get(*canonical).filter(|model| model.held.digest.as_deref() == *digest);
                if let Some(model) = same {
                    let told = Model { shown: Some(Arc::clone(shown)), ..Model::clone(model) };
                    models.insert((*canonical).clone(), Arc::new(told));
                }
            }
            Known { models: Arc::new(models), ..Known::clone(known) }
        });
    }
}

fn told_elsewhere(pool: &Pool, own: &Backend, known: &Known, digest: Option<&str>) -> Option<Arc<Shown>> {
    let (version, digest) = (known.version.as_ref()?, digest?);
    let others = pool.backends().iter().filter(|other| other.place != own.place);
    others.into_iter().find_map(|other| {
        let other = other.catalogue.known.load();
        if other.version.as_ref() != Some(version) {
            return None;
        }
        other.models.values().find(|model| model.held.digest.as_deref() == Some(digest))?.shown.clone()
    })
}

fn call(target: &str) -> Call<'_> {
    Call {
        method: Method::GET,
        target,
        query: None,
        body: None,
        request_id: "catalogue",
        limit_bytes: LIMIT_BYTES,
        within: WITHIN,
        pieces: None,
    }
}

async fn look(backend: &Backend, client: &Client, target: &str) -> Result<Reply, ClientError> {
    let reply = client.call(backend, &call(target)).await?;
    if reply.head.status != 200 { Err(ClientError::Broken("the backend answered with an error")) } else { Ok(reply) }
}

/// How often a backend is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub models: Duration,
    pub loaded: Duration,
}

/// Keeps the catalogue of one backend fresh, until the process ends.
pub async fn keep_fresh(
    pool: &Pool,
    place: usize,
    client: &Client,
    metrics: &Metrics,
    mirror: Option<&Mirror>,
    pace: Pace,
) {
    let backend = &pool.backends()[place];
    let catalogue = &backend.catalogue;
    let models = async {
        catalogue.read_first(backend, client, metrics).await;
        pool.tell_inventory(place);
        tidy(backend, client, mirror).await;
        // Every backend was read at the start, and from then on each has its own moment.
        tokio::time::sleep(pace.models.mul_f64((place + 1) as f64 / pool.backends().len() as f64)).await;
        loop {
            let read = catalogue.read_models(backend, client, metrics).await;
            note(backend, read.is_ok(), metrics);
            pool.tell_inventory(place);
            tidy(backend, client, mirror).await;
            tokio::time::sleep(pace.models).await;
        }
    };
    let loaded = async {
        loop {
            // What fails here failed for a reason that the list meets too.
            let version = async {
                let read = catalogue.known.load().version_read;
                if read.is_none_or(|at| at.elapsed() > pace.models) {
                    let _ = catalogue.read_version(backend, client).await;
                }
            };
            let _ = tokio::join!(version, catalogue.read_loaded(backend, client));
            pool.tell_inventory(place);
            catalogue.read_details(backend, pool, client).await;
            tokio::time::sleep(pace.loaded).await;
        }
    };
    tokio::join!(models, loaded);
}

/// Deletes the temporary names that no pull needs any more: what a crash left. What fails is left to the next look.
async fn tidy(backend: &Backend, client: &Client, mirror: Option<&Mirror>) {
    let Some(mirror) = mirror else { return };
    let known = backend.catalogue.known();
    for left in known.temporary.iter().filter(|name| mirror.left_behind(name)) {
        if client.delete(backend, &left.raw).await == Ok(true) {
            log::info!("backend {}: the temporary name of a pull that did not end was deleted", backend.name);
        }
    }
}

/// Asks one backend for its version again and again, until the process ends: it is up if it answers. `/api/version` takes no lock
/// inside Ollama (ollama-wire, section 1), so that a backend that only loads is not taken for one that is down.
pub async fn keep_probing(backend: &Backend, client: &Client, metrics: &Metrics, every: Duration) {
    loop {
        let answered = backend.catalogue.read_version(backend, client).await;
        note(backend, answered.is_ok(), metrics);
        match answered {
            Ok(()) => backend.succeeded(None),
            Err(ClientError::Unreachable) => backend.failed(None, Failed::Unreachable, Instant::now()),
            Err(ClientError::Silent) => backend.failed(None, Failed::Unreachable, Instant::now()),
            Err(ClientError::Broken(_)) => backend.failed(None, Failed::Garbage, Instant::now()),
        }
        tokio::time::sleep(every).await;
    }
}

/// A backend was reached, or was not.
pub fn note(backend: &Backend, up: bool, metrics: &Metrics) {
    metrics.backend_up(&backend.name, up);
    if backend.note_up(up) {
        match up {
            true => log::info!("backend {} ({}) is up", backend.name, backend.url),
            false => log::warn!("backend {} ({}) cannot be reached", backend.name, backend.url),
        }
    }
}
