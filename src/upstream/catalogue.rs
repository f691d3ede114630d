//! Which models a backend has, read in the background; and with it whether the backend is up.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;

use super::client::{Client, ClientError};
use super::{Backend, Pool};
use crate::ledger::Metrics;
use crate::wire::{Endpoint, ModelRef, Source, list, model};

/// A look at a backend takes no longer: `/api/tags` answers at once, even during a load (ollama-wire, section 1).
const WITHIN: Duration = Duration::from_secs(5);
const LIMIT_BYTES: usize = 16 << 20;

/// What is known of a backend's models.
#[derive(Default)]
pub struct Catalogue {
    /// By canonical name: whether the model is a stub of one on ollama.com.
    models: ArcSwap<HashMap<String, Source>>,
    read: AtomicBool,
}

impl Catalogue {
    /// Whether the backend would send this model's prompts to ollama.com: a copy of a stub has an innocent name
    /// (ollama-wire, section 6.3). `None`: the model is not known.
    pub fn source(&self, model: &ModelRef) -> Option<Source> {
        self.models.load().get(&model.canonical()).copied()
    }

    /// Whether the list was ever read. Before that a stub of a cloud model cannot be told from a local one.
    pub fn is_read(&self) -> bool {
        self.read.load(Ordering::Acquire)
    }

    /// The models' names, in order, at most `most`; and how many there are.
    pub fn names(&self, most: usize) -> (Vec<String>, usize) {
        let models = self.models.load();
        let mut names: Vec<String> = models.keys().cloned().collect();
        names.sort_unstable();
        names.truncate(most);
        (names, models.len())
    }

    /// Reads the list of one backend. The catalogue keeps what it knew where that fails.
    pub async fn refresh(&self, backend: &Backend, client: &Client, metrics: &Metrics) -> Result<(), ClientError> {
        let reply = client.get(backend, "/api/tags", None, "catalogue", LIMIT_BYTES, WITHIN).await;
        if let Ok(reply) = &reply
            && let Ok(listed) = list::names(Endpoint::Tags, &reply.body)
        {
            let mut models = HashMap::with_capacity(listed.len());
            for entry in listed {
                let Ok(model) = model::parse(&entry.name) else { continue };
                let canonical = model.canonical();
                metrics.known_model(&canonical);
                models.insert(canonical, if entry.remote { Source::Cloud } else { model.source });
            }
            self.models.store(Arc::new(models));
            self.read.store(true, Ordering::Release);
        }
        reply.map(|_| ())
    }
}

/// Keeps the catalogues of all backends fresh, until the process ends.
pub async fn keep_fresh(pool: &Pool, client: &Client, metrics: &Metrics, every: Duration) {
    loop {
        for backend in pool.backends() {
            let seen = backend.catalogue.refresh(backend, client, metrics).await;
            note(backend, seen.is_ok(), metrics);
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
