//! The exchanges now running: what a drain waits for and what a shutdown cuts.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::door::Link;
use crate::ledger::Outcome;
use crate::refusal::Refusal;

/// Why a running exchange is ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    Shutdown,
}

impl Cut {
    pub fn refusal(self) -> Refusal {
        match self {
            Cut::Shutdown => Refusal::shutting_down(),
        }
    }

    pub fn outcome(self) -> Outcome {
        match self {
            Cut::Shutdown => Outcome::Shutdown,
        }
    }
}

/// Spread over shards, so that the workers do not meet at one lock for every request.
const SHARDS: usize = 16;

#[derive(Default)]
pub struct Live {
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Arc<Link>>>; SHARDS],
    running: AtomicU64,
    left: Notify,
}

impl Live {
    /// Registers an exchange until the guard is dropped.
    pub fn enter(self: &Arc<Self>, link: &Arc<Link>) -> Presence {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.shard(id).lock().insert(id, Arc::clone(link));
        self.running.fetch_add(1, Ordering::Relaxed);
        Presence { live: Arc::clone(self), id }
    }

    pub fn running(&self) -> u64 {
        self.running.load(Ordering::Relaxed)
    }

    /// Ends every running exchange.
    pub fn cut_all(&self, why: Cut) {
        for shard in &self.shards {
            for link in shard.lock().values() {
                link.cut(why);
            }
        }
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

    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Link>>> {
        &self.shards[id as usize % SHARDS]
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
