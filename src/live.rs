//! The exchanges now running: what a drain waits for, what a shutdown cuts, what a page shows.
//!
//! - [`progress`]: what can be seen of one.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Waker;
use std::time::Duration;

use futures::task::AtomicWaker;
use parking_lot::Mutex;
use serde::ser::{Serialize, Serializer};
use tokio::sync::Notify;

use crate::identity::Caller;
use crate::ledger::Outcome;
use crate::refusal::Refusal;

pub mod progress;

use self::progress::{Progress, Row};

/// Why a running exchange is ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    Shutdown,
    /// Its session or its agent was revoked.
    Revoked,
}

impl Cut {
    pub fn refusal(self) -> Refusal {
        match self {
            Cut::Shutdown => Refusal::shutting_down(),
            Cut::Revoked => Refusal::revoked(),
        }
    }

    pub fn outcome(self) -> Outcome {
        match self {
            Cut::Shutdown => Outcome::Shutdown,
            Cut::Revoked => Outcome::Revoked,
        }
    }
}

/// How a running exchange is told that it has to end: set from any thread, heard by the task that serves it.
#[derive(Default)]
pub struct Signal {
    state: Mutex<State>,
    /// The task was not told yet.
    pending: AtomicBool,
    waker: AtomicWaker,
    pub progress: Progress,
}

#[derive(Default)]
struct State {
    cut: Option<Cut>,
    /// Once it is known.
    caller: Option<Arc<Caller>>,
}

impl Signal {
    /// From now on the exchange is this caller's, and ends with it: see [`Live::cut_those`].
    pub fn belongs_to(&self, caller: &Arc<Caller>) {
        self.state.lock().caller = Some(Arc::clone(caller));
    }

    /// The caller is being refused already: a cut would only break the refusal off.
    pub fn is_refused(&self) {
        self.state.lock().caller = None;
        self.pending.store(false, Ordering::SeqCst);
    }

    /// Ends the exchange now, with an error frame if its reply has begun. The first reason stays.
    pub fn cut(&self, why: Cut) {
        self.cut_locked(&mut self.state.lock(), why);
    }

    fn cut_locked(&self, state: &mut State, why: Cut) {
        state.cut.get_or_insert(why);
        self.pending.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    pub fn reason(&self) -> Option<Cut> {
        self.state.lock().cut
    }

    /// The task is told once: an answer may then still be written.
    pub fn take(&self) -> bool {
        self.pending.load(Ordering::SeqCst) && self.pending.swap(false, Ordering::SeqCst)
    }

    /// The task waits; `waker` is woken by a cut, and by [`Signal::wake`].
    pub fn register(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    pub fn wake(&self) {
        self.waker.wake();
    }
}

/// Spread over shards, so that the workers do not meet at one lock for every request.
const SHARDS: usize = 16;

#[derive(Default)]
pub struct Live {
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Arc<Signal>>>; SHARDS],
    running: AtomicU64,
    left: Notify,
}

impl Live {
    /// Registers an exchange until the guard is dropped.
    pub fn enter(self: &Arc<Self>, signal: &Arc<Signal>) -> Presence {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.shard(id).lock().insert(id, Arc::clone(signal));
        self.running.fetch_add(1, Ordering::Relaxed);
        Presence { live: Arc::clone(self), id }
    }

    pub fn running(&self) -> u64 {
        self.running.load(Ordering::Relaxed)
    }

    /// Ends every running exchange.
    pub fn cut_all(&self, why: Cut) {
        for shard in &self.shards {
            for signal in shard.lock().values() {
                signal.cut(why);
            }
        }
    }

    /// Those that were allowed and written down, oldest first, at most `most` of them, and how many more there are; and who of all
    /// waits for a backend.
    pub fn allowed(&self, most: usize) -> Allowed {
        let mut rows = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            let allowed = shard.iter().filter(|(_, signal)| signal.progress.has_begun());
            rows.extend(allowed.map(|(id, signal)| (*id, Arc::clone(signal))));
        }
        rows.sort_unstable_by_key(|(id, _)| *id);
        let mut waits: BTreeMap<&str, (usize, Duration)> = BTreeMap::new();
        for (model, waited) in rows.iter().filter_map(|(_, signal)| signal.progress.waits()) {
            let (waiting, longest) = waits.entry(model).or_default();
            *waiting += 1;
            *longest = waited.max(*longest);
        }
        let queues = waits.into_iter();
        let queues =
            queues.map(|(model, (waiting, longest))| Queue { model: model.to_owned(), waiting, longest }).collect();
        let more = rows.len().saturating_sub(most);
        rows.truncate(most);
        Allowed { rows, more, queues }
    }

    /// Ends every running exchange whose caller `ends` names, and says how many.
    ///
    /// It looks at each exchange in turn instead of keeping an index by session and agent: revocations are rare, and requests would
    /// pay for the index.
    pub fn cut_those(&self, why: Cut, ends: impl Fn(&Caller) -> bool) -> usize {
        let mut cut = 0;
        for shard in &self.shards {
            for signal in shard.lock().values() {
                let mut state = signal.state.lock();
                if state.cut.is_none() && state.caller.as_deref().is_some_and(&ends) {
                    signal.cut_locked(&mut state, why);
                    cut += 1;
                }
            }
        }
        cut
    }

    /// Returns once nothing runs.
    pub async fn emptied(&self) {
        loop {
            let left = self.left.notified();
            if self.running() == 0 {
                return;
            }
            left.await;
        }
    }

    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Signal>>> {
        &self.shards[id as usize % SHARDS]
    }
}

/// Running exchanges at one moment; serialised as a list of rows.
pub struct Allowed {
    rows: Vec<(u64, Arc<Signal>)>,
    /// Beyond those listed.
    pub more: usize,
    /// By the model's name.
    pub queues: Vec<Queue>,
}

/// Those that wait for a backend for one model.
pub struct Queue {
    pub model: String,
    pub waiting: usize,
    /// How long the first of them has waited.
    pub longest: Duration,
}

impl Serialize for Allowed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.rows.iter().map(|(id, signal)| Row { id: *id, progress: &signal.progress }))
    }
}

/// One running exchange.
pub struct Presence {
    live: Arc<Live>,
    id: u64,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.live.shard(self.id).lock().remove(&self.id);
        if self.live.running.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.live.left.notify_waiters();
        }
    }
}
