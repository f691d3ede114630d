//! What all requests share: the settings in force, the ledger, the running exchanges, the backends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;

use crate::control_plane::ControlPlane;
use crate::identity::guesses::Guesses;
use crate::identity::places::Places;
use crate::intake::Intake;
use crate::ledger::Ledger;
use crate::live::{Cut, Live};
use crate::memory::Memory;
use crate::mirror::Mirror;
use crate::models::Models;
use crate::remote_keys::RemoteKeys;
use crate::route::RouteSettings;
use crate::snapshot::Snapshot;
use crate::upstream::client::Client;
use crate::upstream::scheduler::Class;
use crate::upstream::{Pool, failover};
use crate::wire::Filters;

pub struct Site {
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Keys from a URL, where the configuration names one.
    pub remote_keys: Option<Arc<RemoteKeys>>,
    /// Where requests for tokens go, if not to the built-in issuer.
    pub control_plane: Option<ControlPlane>,
    pub ledger: Ledger,
    pub live: Arc<Live>,
    pub pool: Pool,
    pub queue: QueueRules,
    /// For requests of our own to a backend.
    pub client: Client,
    pub intake: Intake,
    /// That what slow readers have not taken may take, of all replies together.
    pub replies: Memory,
    pub routes: RouteSettings,
    /// Aliases, fallbacks and settings of models.
    pub models: Models,
    /// From which backends take what is pulled for several of them.
    pub mirror: Option<Arc<Mirror>>,
    /// Requests served at once.
    pub in_flight: u64,
    pub blob_bytes: u64,
    /// Of a reply that is not streamed, which is held to be judged.
    pub held_reply_bytes: usize,
    /// Largest list of a backend.
    pub list_bytes: usize,
    /// What is changed in requests.
    pub filters: Filters,
    /// How long a list waits for further backends once one has answered.
    pub straggler: Duration,
    /// Cloud models may pass.
    pub cloud_models: bool,
    /// Web tools that no filter has cut may pass.
    pub web_tools: bool,
    /// The backends' lists of models are read.
    pub catalogue: bool,
    /// When a request may be tried on another backend.
    pub failover: failover::Settings,
    /// How long a backend may be silent.
    pub silence: Duration,
    /// Token requests at once, waiting for their body or for `hashing`: whoever sends them is a stranger still, and may not take the
    /// places of those who have a token.
    pub token_places: Places,
    /// How fast secrets may be guessed.
    pub guesses: Guesses,
    /// argon2 at once: each takes 19 MiB and some 20 ms of a core.
    pub hashing: Arc<Semaphore>,
    /// What `guesses` counts time from.
    pub started: Instant,
    /// Set once, when the process is asked to stop.
    pub draining: AtomicBool,
}

/// Who may wait how, and for how long.
pub struct QueueRules {
    pub wait: Duration,
    /// The highest class of a caller none of whose roles is named.
    pub highest: Class,
    /// The highest class of a role.
    pub roles: BTreeMap<String, Class>,
}

impl QueueRules {
    /// The strictest of a caller's roles decides, as it does in the policy.
    pub fn highest_of(&self, roles: &[String]) -> Class {
        roles.iter().filter_map(|role| self.roles.get(role)).min().copied().unwrap_or(self.highest)
    }
}

impl Site {
    /// Puts a change of the snapshot in force, and ends what runs for those whom it turns away. The order is half of an argument:
    /// `proxy::admit` has the other half.
    pub fn renew(&self, change: impl Fn(&Snapshot) -> Snapshot) {
        self.snapshot.rcu(|now| change(now));
        let snapshot = self.snapshot.load_full();
        let cut = self.live.cut_those(Cut::Revoked, |caller| snapshot.turns_away(caller));
        if cut > 0 {
            log::info!("{cut} running requests of revoked sessions and agents are cut");
        }
    }

    /// Whether stubs of cloud models have to be told from local ones, and can be: backends' lists are read.
    pub fn reads_catalogues(&self) -> bool {
        self.catalogue && !self.cloud_models
    }

    /// From now on connections are closed after their reply, and `/readyz` says no.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}
