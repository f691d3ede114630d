//! What runs, what was counted, what the backends hold: put into JSON once for all who watch, since 500 running streams are 150 kB.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::site::Site;

/// A snapshot serves everybody who asks within this time of it. A little less than a second, which is how often each asks.
const FRESH: Duration = Duration::from_millis(900);
/// Running exchanges in a snapshot; the rest is a number. More than a page can show to a person.
const ROWS: usize = 1000;
/// Models of a backend that are named.
const MODELS: usize = 200;

pub struct Board {
    site: Arc<Site>,
    /// Where clients connect: the page shows how.
    public: SocketAddr,
    running: Mutex<Option<(Instant, Bytes)>>,
}

impl Board {
    pub fn new(site: Arc<Site>, public: SocketAddr) -> Board {
        Board { site, public, running: Mutex::default() }
    }

    /// What runs and what was counted.
    pub fn running(&self) -> Bytes {
        let mut kept = self.running.lock();
        match &*kept {
            Some((at, text)) if at.elapsed() < FRESH => text.clone(),
            _ => {
                let text = Bytes::from(self.running_now().to_string());
                *kept = Some((Instant::now(), text.clone()));
                text
            }
        }
    }

    /// The backends, as far as they seldom change.
    pub fn backends(&self) -> Bytes {
        self.backends_now().to_string().into()
    }

    /// All of it.
    pub fn whole(&self) -> String {
        let mut all = self.running_now();
        all["backends"] = self.backends_now();
        format!("{all}\n")
    }

    fn running_now(&self) -> Value {
        let site = &self.site;
        let allowed = site.live.allowed(ROWS);
        let queues = allowed.queues.iter().map(|queue| {
            json!({ "model": queue.model, "waiting": queue.waiting, "longest_ms": queue.longest.as_millis() as u64 })
        });
        let in_flight = site.pool.backends().iter().map(|backend| (backend.name.clone(), json!(backend.in_flight())));
        json!({
            "public": self.public.to_string(),
            "version": env!("CARGO_PKG_VERSION"),
            "totals": site.ledger.metrics.totals(),
            "in_flight": in_flight.collect::<serde_json::Map<_, _>>(),
            "watchers": site.ledger.audit.activity().watchers(),
            "draining": site.is_draining(),
            "queues": queues.collect::<Vec<_>>(),
            "more": allowed.more,
            "running": allowed,
        })
    }

    fn backends_now(&self) -> Value {
        let backends = self.site.pool.fleet().into_iter().map(|(backend, known)| {
            let (models, of) = backend.catalogue.names(MODELS);
            let mut loaded: Vec<&String> = known.loaded.keys().collect();
            loaded.sort_unstable();
            loaded.truncate(MODELS);
            let (breaker, breakers) = backend.breakers(Instant::now());
            let breakers = breakers.into_iter().take(MODELS).map(|(model, state)| (model, json!(state.as_str())));
            json!({
                "name": backend.name,
                "url": backend.url.to_string(),
                "tier": backend.tier,
                "weight": backend.weight,
                "up": backend.is_up(),
                "drained": backend.is_drained(),
                "breaker": breaker.as_str(),
                "breakers": breakers.collect::<serde_json::Map<_, _>>(),
                "version": known.version,
                "models": known.models_read.is_some().then_some(models),
                "models_in_all": of,
                "loaded": loaded,
            })
        });
        backends.collect()
    }
}
