//! Where to: the backends, and the right to use one of them.
//!
//! - [`backend`]: one Ollama: what was configured of it, its addresses, what runs on it.
//! - [`placement`]: which of them a request goes to.
//! - [`scheduler`]: who waits, who runs where and who is next. `bench/placement` drives it; requests do not pass through it yet.
//! - [`health`]: whether one is to be trusted with work.
//! - [`failover`]: whether a request that came to nothing may be tried on another.
//! - [`peer`]: a backend as Pingora's connector sees it: address, TLS, time limits; and the head that it is sent.
//! - [`client`]: requests of our own to a backend (lists, health).
//! - [`catalogue`]: what is known of a backend's models, read in the background; whether it is up.
//! - [`warm`]: models that are loaded before anybody asks for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::ledger::Receipt;
use crate::policy::Permit;
use crate::wire::{Kind, ModelRef};

pub mod backend;
pub mod catalogue;
pub mod client;
pub mod failover;
pub mod health;
pub mod peer;
pub mod placement;
pub mod scheduler;
pub mod warm;

pub use backend::Backend;
pub use catalogue::{Catalogue, Known};
pub use placement::Reason;

use self::placement::{Candidate, Has};

/// All backends.
pub struct Pool {
    backends: Vec<Arc<Backend>>,
    /// The place of the one that management goes to where nobody names another.
    manage: Option<usize>,
    turn: AtomicUsize,
}

/// What is wanted of a backend, beyond what the permit says.
#[derive(Clone, Copy, Default)]
pub struct Errand<'a> {
    /// The name of the backend that the request asks for.
    pub named: Option<&'a str>,
    /// Places of backends that were tried.
    pub tried: &'a [usize],
    /// Only backends whose list of models was read, as long as there are any: a stub of a cloud model would not be known as one.
    pub only_read: bool,
    /// Only backends that may have the model.
    pub only_holding: bool,
}

/// Why no backend can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoBackend {
    /// Management with several backends, and none is named.
    Unnamed,
    /// None is called so.
    UnknownName,
    /// None may serve the model, or all were tried.
    NoneLeft,
}

impl Pool {
    /// `backends` stand in the order of their `place`, and there is one at least. `manage` is a place.
    pub fn new(backends: Vec<Backend>, manage: Option<usize>) -> Pool {
        Pool { backends: backends.into_iter().map(Arc::new).collect(), manage, turn: AtomicUsize::new(0) }
    }

    pub fn backends(&self) -> &[Arc<Backend>] {
        &self.backends
    }

    /// Whether a backend is there, as far as is known, that has the model and may serve it.
    pub fn can_serve(&self, model: &ModelRef) -> bool {
        let canonical = model.canonical();
        self.backends.iter().any(|backend| {
            backend.is_up()
                && !backend.is_drained()
                && backend.may_serve(model)
                && backend.catalogue.has(&canonical) != Has::Absent
        })
    }

    /// Each backend with what is known of its models at this moment. Costs two counters a backend.
    pub fn fleet(&self) -> Vec<(Arc<Backend>, Arc<Known>)> {
        self.backends.iter().map(|backend| (Arc::clone(backend), backend.catalogue.known())).collect()
    }

    /// The right to send one request. It cannot be had without the policy's consent and the ledger's receipt.
    pub fn lease(&self, permit: &Permit, _receipt: &Receipt, errand: &Errand<'_>) -> Result<Lease, NoBackend> {
        let model = permit.model().map(|model| model.canonical());
        let (place, reason) = match self.named(permit, errand)? {
            Some(place) if errand.tried.contains(&place) => return Err(NoBackend::NoneLeft),
            Some(place) => (place, Reason::Named),
            None => {
                let candidates = self.candidates(permit, model.as_deref(), errand);
                let turn = self.turn.fetch_add(1, Ordering::Relaxed);
                placement::choose(&candidates, turn).ok_or(NoBackend::NoneLeft)?
            }
        };
        let backend = Arc::clone(&self.backends[place]);
        backend.begin(model.as_deref(), Instant::now());
        Ok(Lease { backend, model, reason })
    }

    /// The right to ask every backend for what is shown as one; those that are down are left out while another is up.
    pub fn each(&self, _permit: &Permit, _receipt: &Receipt) -> Vec<Arc<Backend>> {
        let up: Vec<_> = self.backends.iter().filter(|backend| backend.is_up()).map(Arc::clone).collect();
        if up.is_empty() { self.backends.clone() } else { up }
    }

    /// Management changes one machine, and somebody says which; anything else is placed.
    fn named(&self, permit: &Permit, errand: &Errand<'_>) -> Result<Option<usize>, NoBackend> {
        if permit.endpoint().kind() != Kind::Manage {
            return Ok(None);
        }
        match errand.named {
            Some(name) => {
                let found = self.backends.iter().position(|backend| backend.name == name);
                found.map(Some).ok_or(NoBackend::UnknownName)
            }
            None if self.backends.len() == 1 => Ok(None),
            None => self.manage.map(Some).ok_or(NoBackend::Unnamed),
        }
    }

    fn candidates(&self, permit: &Permit, model: Option<&str>, errand: &Errand<'_>) -> Vec<Candidate> {
        let any_read = errand.only_read && self.backends.iter().any(|backend| backend.catalogue.is_read());
        let now = Instant::now();
        let may_hold = |backend: &Backend| model.is_none_or(|model| backend.catalogue.has(model) != Has::Absent);
        let usable = self.backends.iter().filter(|backend| {
            !backend.is_drained()
                && (!errand.only_holding || may_hold(backend))
                && !errand.tried.contains(&backend.place)
                && permit.model().is_none_or(|model| backend.may_serve(model))
                && (!any_read || backend.catalogue.is_read())
        });
        usable
            .map(|backend| Candidate {
                place: backend.place,
                has: model.map_or(Has::Held, |model| backend.catalogue.has(model)),
                up: backend.lets(model, now),
                full: model.is_some_and(|model| backend.running(model) >= backend.slots(model)),
                tier: backend.tier,
                in_flight: backend.in_flight(),
                weight: backend.weight,
            })
            .collect()
    }
}

/// A backend in use, counted until dropped.
pub struct Lease {
    backend: Arc<Backend>,
    /// Canonical.
    model: Option<String>,
    reason: Reason,
}

impl Lease {
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// The model that it is for, by canonical name.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// Why it is this backend.
    pub fn reason(&self) -> Reason {
        self.reason
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.backend.end(self.model.as_deref());
    }
}
