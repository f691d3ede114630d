//! Where to: the backends, and the right to use one of them.
//!
//! - [`backend`]: one Ollama: what was configured of it, its addresses, what runs on it.
//! - [`scheduler`]: who waits for a model, and which backend is next; [`dispatch`]: the same on real time.
//! - [`placement`]: where a request goes that waits for nothing: lists, details, management.
//! - [`health`]: whether one is to be trusted with work.
//! - [`failover`]: whether a request that came to nothing may be tried on another.
//! - [`peer`]: a backend as Pingora's connector sees it: address, TLS, time limits; and the head that it is sent.
//! - [`client`]: requests of our own to a backend (lists, health).
//! - [`catalogue`]: what is known of a backend's models, read in the background; whether it is up.
//! - [`warm`]: models that are loaded before anybody asks for them.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use crate::ledger::Receipt;
use crate::policy::Permit;
use crate::wire::{Kind, ModelRef};

pub mod backend;
pub mod catalogue;
pub mod client;
pub mod dispatch;
pub mod failover;
pub mod health;
pub mod peer;
pub mod placement;
pub mod scheduler;
pub mod warm;

pub use backend::Backend;
pub use catalogue::{Catalogue, Known};
pub use placement::Reason;

use self::dispatch::{Dispatch, NoSlot, PreloadSlot, Slot};
use self::health::Failed;
use self::placement::{Candidate, Has};
use self::scheduler::{Class, Full, Inventory, Judge, Measured, Outlook, State, Trial, Want};

/// Of a body that is at least so long, its beginning tells the conversation: prompts that are shorter cost next to nothing to read again.
const TELLING_BYTES: usize = 2048;

/// All backends.
pub struct Pool {
    backends: Vec<Arc<Backend>>,
    /// The place of the one that management goes to where nobody names another.
    manage: Option<usize>,
    turn: AtomicUsize,
    pub dispatch: Arc<Dispatch>,
    /// Nobody outside can make two conversations look like one.
    hasher: RandomState,
}

/// What a request that waits is like.
pub struct Wish {
    pub agent: Arc<str>,
    pub class: Class,
    pub input_bytes: u64,
    /// The most that it lets the model generate; an embedding generates nothing, 0.
    pub most_tokens: Option<u64>,
    pub conversation: Option<u64>,
    pub streams: bool,
    pub deadline: Instant,
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
    /// The queue is full.
    Full(Full),
    /// It has waited for as long as it may.
    Expired,
}

impl Pool {
    /// `backends` stand in the order of their `place`, and there is one at least. `manage` is a place.
    pub fn new(backends: Vec<Backend>, manage: Option<usize>, settings: scheduler::Settings) -> Pool {
        let for_scheduler = backends.iter().map(Backend::for_scheduler).collect();
        let backends: Vec<Arc<Backend>> = backends.into_iter().map(Arc::new).collect();
        let dispatch = Dispatch::new(settings, for_scheduler, Box::new(Breakers(backends.clone())));
        Pool { backends, manage, turn: AtomicUsize::new(0), dispatch, hasher: RandomState::new() }
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
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let (place, reason) = self.place(permit, model.as_deref(), errand, turn)?;
        let trial = self.backends[place].begins(model.as_deref(), Instant::now());
        Ok(self.lease_of(place, model, reason.as_str(), trial, None))
    }

    /// Which backend [`Pool::lease`] would take now, and why; nothing is done.
    pub fn outlook(&self, permit: &Permit, errand: &Errand<'_>) -> Result<(Arc<Backend>, Reason), NoBackend> {
        let model = permit.model().map(|model| model.canonical());
        let turn = self.turn.load(Ordering::Relaxed);
        let (place, reason) = self.place(permit, model.as_deref(), errand, turn)?;
        Ok((Arc::clone(&self.backends[place]), reason))
    }

    fn place(
        &self,
        permit: &Permit,
        model: Option<&str>,
        errand: &Errand<'_>,
        turn: usize,
    ) -> Result<(usize, Reason), NoBackend> {
        match self.named(permit, errand)? {
            Some(place) if errand.tried.contains(&place) => Err(NoBackend::NoneLeft),
            Some(place) => Ok((place, Reason::Named)),
            None => {
                let candidates = self.candidates(permit, model, errand);
                placement::choose(&candidates, turn).ok_or(NoBackend::NoneLeft)
            }
        }
    }

    /// The same for a request that a model computes, which waits until a backend has a slot for it. Whoever drops the future has left
    /// the queue.
    pub async fn queue(
        &self,
        permit: &Permit,
        _receipt: &Receipt,
        errand: &Errand<'_>,
        wish: Wish,
    ) -> Result<Lease, NoBackend> {
        self.tell_first_inventories();
        let model = permit.model().map(|model| model.canonical());
        let slot =
            self.dispatch.slot(self.want(permit, model.as_deref(), errand, wish)).await.map_err(|no| match no {
                NoSlot::Full(full) => NoBackend::Full(full),
                NoSlot::Expired => NoBackend::Expired,
                NoSlot::Nowhere => NoBackend::NoneLeft,
            })?;
        Ok(self.lease_of_slot(slot, model))
    }

    /// The same for one that has waited and has failed elsewhere: it is counted as every other, and does not wait again.
    pub fn at_once(
        &self,
        permit: &Permit,
        _receipt: &Receipt,
        errand: &Errand<'_>,
        wish: Wish,
    ) -> Result<Lease, NoBackend> {
        let model = permit.model().map(|model| model.canonical());
        let want = self.want(permit, model.as_deref(), errand, wish);
        self.dispatch.at_once(&want).map(|slot| self.lease_of_slot(slot, model)).ok_or(NoBackend::NoneLeft)
    }

    /// What would become of such a request if it came now; nothing is done.
    pub fn queue_outlook(&self, permit: &Permit, errand: &Errand<'_>, wish: Wish) -> Result<Outlook, NoBackend> {
        self.tell_first_inventories();
        let model = permit.model().map(|model| model.canonical());
        self.dispatch.outlook(&self.want(permit, model.as_deref(), errand, wish)).map_err(NoBackend::Full)
    }

    fn lease_of_slot(&self, slot: Slot, model: Option<String>) -> Lease {
        self.lease_of(slot.backend(), model, slot.reason().as_str(), slot.trial(), Some(slot))
    }

    fn lease_of(
        &self,
        place: usize,
        model: Option<String>,
        reason: &'static str,
        trial: Trial,
        slot: Option<Slot>,
    ) -> Lease {
        let backend = Arc::clone(&self.backends[place]);
        backend.count();
        Lease { backend, model, reason, slot, trial, is_judged: AtomicBool::new(false) }
    }

    fn want(&self, permit: &Permit, model: Option<&str>, errand: &Errand<'_>, wish: Wish) -> Want {
        let barred = self.backends.iter().filter(|backend| {
            errand.tried.contains(&backend.place) || permit.model().is_some_and(|model| !backend.may_serve(model))
        });
        Want {
            model: model.unwrap_or_default().into(),
            agent: wish.agent,
            class: wish.class,
            input_bytes: wish.input_bytes,
            most_tokens: wish.most_tokens,
            conversation: wish.conversation,
            streams: wish.streams,
            deadline: wish.deadline,
            barred: barred.map(|backend| backend.place).collect(),
            only_read: errand.only_read,
            only_holding: errand.only_holding,
        }
    }

    /// Requests that begin with the same words have the same number. `None`: too short to matter.
    pub fn conversation(&self, body: &[u8]) -> Option<u64> {
        body.get(..TELLING_BYTES).map(|beginning| self.hasher.hash_one(beginning))
    }

    /// A list that was read for the first time a moment ago, perhaps by this very request, is known to the scheduler before it chooses.
    fn tell_first_inventories(&self) {
        for backend in self.backends.iter().filter(|backend| backend.catalogue.is_read()) {
            if !backend.told_list.load(Ordering::Acquire) {
                self.tell_inventory(backend.place);
                backend.told_list.store(true, Ordering::Release);
            }
        }
    }

    /// Tells the scheduler what a backend's lists said.
    pub fn tell_inventory(&self, place: usize) {
        let known = self.backends[place].catalogue.known();
        let held = known.models.iter().map(|(name, model)| (name.as_str(), model.held.size_bytes.unwrap_or(0)));
        let loaded = known.loaded.iter().map(|(name, its)| {
            (name.as_str(), its.size_vram_bytes.filter(|bytes| *bytes > 0).or(its.size_bytes).unwrap_or(0))
        });
        let held: Option<Vec<(&str, u64)>> = known.models_read.map(|_| held.collect());
        let loaded: Option<Vec<(&str, u64)>> = known.loaded_read.map(|_| loaded.collect());
        self.dispatch.seen(place, &Inventory { held: held.as_deref(), loaded: loaded.as_deref() });
    }

    /// The right to ask every backend for what is shown as one: not those that are drained, and of the others not those that are down
    /// while another is up.
    pub fn each(&self, _permit: &Permit, _receipt: &Receipt) -> Result<Vec<Arc<Backend>>, NoBackend> {
        self.asked_for_lists().ok_or(NoBackend::NoneLeft)
    }

    /// The same, without the right to do it.
    pub fn asked_for_lists(&self) -> Option<Vec<Arc<Backend>>> {
        let in_use: Vec<_> = self.backends.iter().filter(|backend| !backend.is_drained()).map(Arc::clone).collect();
        let up: Vec<_> = in_use.iter().filter(|backend| backend.is_up()).map(Arc::clone).collect();
        Some(if up.is_empty() { in_use } else { up }).filter(|backends| !backends.is_empty())
    }

    /// The backends that should hold a model, drained ones too.
    pub fn holders(&self, model: &ModelRef) -> Vec<Arc<Backend>> {
        self.backends.iter().filter(|backend| backend.may_serve(model)).map(Arc::clone).collect()
    }

    /// The right to load a model on a backend before anybody asks for it. `None`: it would be in a request's way.
    pub fn preload(&self, place: usize, canonical: &str) -> Option<Preload> {
        self.dispatch.preload(place, canonical).map(|slot| {
            let backend = Arc::clone(&self.backends[place]);
            backend.count();
            Preload { backend, slot }
        })
    }

    /// Management changes one machine, and somebody says which; anything else is placed. A drained one is reached by its name only.
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
            None => match self.manage.ok_or(NoBackend::Unnamed)? {
                place if self.backends[place].is_drained() => Err(NoBackend::NoneLeft),
                place => Ok(Some(place)),
            },
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
                tier: backend.tier,
                in_flight: backend.in_flight(),
                weight: backend.weight,
            })
            .collect()
    }
}

/// A load that nobody waits for, counted until dropped.
pub struct Preload {
    backend: Arc<Backend>,
    pub slot: PreloadSlot,
}

impl Drop for Preload {
    fn drop(&mut self) {
        self.backend.uncount();
    }
}

/// What the scheduler is told of the backends' health.
struct Breakers(Vec<Arc<Backend>>);

impl Judge for Breakers {
    fn state(&self, backend: usize, model: &str) -> State {
        self.0[backend].standing(model, Instant::now())
    }

    fn begins(&self, backend: usize, model: &str) -> Trial {
        self.0[backend].begins(Some(model), Instant::now())
    }
}

/// A backend in use, counted until dropped.
pub struct Lease {
    backend: Arc<Backend>,
    /// Canonical.
    model: Option<String>,
    reason: &'static str,
    /// Of a request that a model computes.
    slot: Option<Slot>,
    trial: Trial,
    /// Health has heard what became of it.
    is_judged: AtomicBool,
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
    pub fn reason(&self) -> &'static str {
        self.reason
    }

    /// Whether the backend will have to load the model, as far as is known.
    pub fn loads(&self) -> bool {
        self.slot.as_ref().is_some_and(Slot::is_cold)
    }

    /// The backend does what it should.
    pub fn succeeded(&self) {
        self.is_judged.store(true, Ordering::Relaxed);
        self.backend.succeeded(self.model());
    }

    /// The attempt came to nothing.
    pub fn failed(&self, how: Failed) {
        self.is_judged.store(true, Ordering::Relaxed);
        self.backend.failed(self.model(), how, Instant::now());
    }

    /// The request is on its way.
    pub fn sent(&self) {
        if let Some(slot) = &self.slot {
            slot.sent();
        }
    }

    /// The model has begun to answer.
    pub fn first_byte(&self) {
        if let Some(slot) = &self.slot {
            slot.first_byte();
        }
    }

    /// The backend's part is over: whoever waits is next, though the client may not have read everything yet. `None`: there is nothing
    /// to learn from it. The first word counts.
    pub fn ended(&self, measured: Option<Measured>) {
        match (&self.slot, measured) {
            (None, _) => {}
            (Some(slot), Some(measured)) => slot.complete(measured),
            (Some(slot), None) => slot.moot(),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.is_judged.load(Ordering::Relaxed) {
            self.backend.gives_up(self.model(), self.trial);
        }
        self.backend.uncount();
    }
}
