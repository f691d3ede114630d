//! Where to: the backends, and the right to use one of them.
//!
//! - [`peer`]: a backend as Pingora's connector sees it: address, TLS, time limits; and the head that it is sent.
//! - [`client`]: requests of our own to a backend (lists, health).
//! - [`catalogue`]: which models a backend has, read in the background; whether it is up.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::config::{BackendUrl, Secret};
use crate::ledger::Receipt;
use crate::policy::Permit;
use crate::wire::ModelRef;

pub mod catalogue;
pub mod client;
pub mod peer;

pub use catalogue::Catalogue;

/// How long a resolved name is believed: short, so that a backend that moves is found; long enough that a burst of requests
/// asks once.
const RESOLVED_FOR: Duration = Duration::from_secs(5);

/// One Ollama.
pub struct Backend {
    pub name: String,
    pub url: BackendUrl,
    /// The whole `Authorization` value that it wants.
    authorization: Option<Secret>,
    connect: Duration,
    silence: Duration,
    in_flight: AtomicU64,
    /// What the last contact said.
    up: AtomicBool,
    addresses: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    pub catalogue: Catalogue,
}

impl Backend {
    pub fn new(
        name: String,
        url: BackendUrl,
        authorization: Option<Secret>,
        connect: Duration,
        silence: Duration,
    ) -> Backend {
        Backend {
            name,
            url,
            authorization,
            connect,
            silence,
            in_flight: AtomicU64::new(0),
            up: AtomicBool::new(true),
            addresses: Mutex::new(None),
            catalogue: Catalogue::default(),
        }
    }

    pub fn authorization(&self) -> Option<&str> {
        self.authorization.as_ref().map(Secret::expose)
    }

    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// What the last contact said; true before the first.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
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

/// All backends. This version has one; choosing among several comes with the fleet.
pub struct Pool {
    backends: Vec<Arc<Backend>>,
}

impl Pool {
    pub fn new(backend: Backend) -> Pool {
        Pool { backends: vec![Arc::new(backend)] }
    }

    pub fn backends(&self) -> &[Arc<Backend>] {
        &self.backends
    }

    /// Whether a backend is there, as far as is known, that has the model.
    pub fn can_serve(&self, model: &ModelRef) -> bool {
        self.backends.iter().any(|backend| {
            backend.is_up() && (!backend.catalogue.is_read() || backend.catalogue.source(model).is_some())
        })
    }

    /// The right to send one request. It cannot be had without the policy's consent and the ledger's receipt.
    pub fn lease(&self, _permit: &Permit, _receipt: &Receipt) -> Lease {
        let backend = Arc::clone(&self.backends[0]);
        backend.in_flight.fetch_add(1, Ordering::Relaxed);
        Lease { backend }
    }
}

/// A backend in use, counted until dropped.
pub struct Lease {
    backend: Arc<Backend>,
}

impl Lease {
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.backend.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
