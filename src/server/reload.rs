//! What changes while the proxy runs: files are looked at, and good changes swapped in. A broken change leaves what works.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::assemble::{self, FileFingerprint};
use crate::config::Config;
use crate::ledger::Reloaded;
use crate::policy;
use crate::site::Site;
use crate::snapshot::Snapshot;

/// Between two looks at the agents file. It is one `stat`, and what is suspended should be so within a second.
pub const AGENTS_LOOK: Duration = Duration::from_millis(500);

/// Between two looks at the list of revocations: what is revoked is so within a second, also on a busy machine.
pub const REVOCATIONS_LOOK: Duration = Duration::from_millis(250);
const _: () = assert!(
    REVOCATIONS_LOOK.as_millis() <= 500,
    "two looks, and a list is taken back only by the second, fit into a second"
);

/// Between two looks at the proxy's own keys, for rotations that were not made through the control socket.
pub const KEYS_LOOK: Duration = Duration::from_millis(250);

/// What the files looked like when they were last loaded, or failed to load.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    policy: Option<policy::Fingerprint>,
    agents: Option<FileFingerprint>,
    revocations: Option<FileFingerprint>,
    /// A list that takes revocations back, as it was seen once: it counts when it is seen so again.
    taken_back: Option<FileFingerprint>,
    keys: [Option<FileFingerprint>; 2],
}

impl Seen {
    /// To be taken before the files are loaded, so that a change in between is seen the next time.
    pub fn now(config: &Config) -> Seen {
        Seen {
            policy: assemble::policy_fingerprint(config),
            agents: assemble::agents_fingerprint(config),
            revocations: assemble::revocations_fingerprint(config),
            taken_back: None,
            keys: assemble::keys::fingerprint(config),
        }
    }

    fn look(&mut self, config: &Config, last: &Snapshot, what: Reloaded) -> bool {
        let before = *self;
        match what {
            Reloaded::Policy => {
                self.policy = assemble::policy_fingerprint(config);
                self.policy != before.policy
            }
            Reloaded::Agents => {
                self.agents = assemble::agents_fingerprint(config);
                self.agents != before.agents
            }
            Reloaded::Revocations => {
                self.revocations = assemble::revocations_fingerprint(config);
                self.revocations != before.revocations
            }
            Reloaded::Keys => {
                self.keys = assemble::keys::fingerprint(config);
                self.keys != before.keys || last.next_key_end.is_some_and(|end| end <= Timestamp::now())
            }
        }
    }

    /// Whether a list that takes revocations back has to be seen once more: an editor may have truncated the file, and be about to write
    /// it. What is added counts at once.
    fn waits(&mut self, before: &Seen, last: &Snapshot, new: &Snapshot) -> bool {
        if new.revocations.cover(&last.revocations) || self.taken_back == self.revocations {
            self.taken_back = None;
            return false;
        }
        self.taken_back = self.revocations;
        self.revocations = before.revocations; // the next look finds it changed again
        true
    }
}

/// Swaps snapshots, one swap at a time: two at once could each undo what the other has swapped in.
pub struct Reloader {
    site: Arc<Site>,
    config: Arc<Config>,
    seen: Mutex<Seen>,
}

impl Reloader {
    /// `seen` is from before the snapshot in force was loaded.
    pub fn new(site: Arc<Site>, config: Config, seen: Seen) -> Reloader {
        Reloader { site, config: Arc::new(config), seen: Mutex::new(seen) }
    }

    /// Looks for changes for ever.
    pub async fn watch(self: Arc<Self>, what: Reloaded, every: Duration) {
        loop {
            tokio::time::sleep(every).await;
            let _ = self.load(what, false).await; // logged and counted
        }
    }

    /// Loads now, changed or not. The error is for whoever asked; it is logged and counted too.
    pub async fn now(&self, what: Reloaded) -> Result<(), String> {
        self.load(what, true).await
    }

    async fn load(&self, what: Reloaded, whether_changed_or_not: bool) -> Result<(), String> {
        let mut seen = self.seen.lock().await;
        let (config, last, mut looked) = (Arc::clone(&self.config), self.site.snapshot.load_full(), *seen);
        // Files, and a policy to compile: not on a worker.
        let loaded = spawn_blocking(move || {
            if what == Reloaded::Keys && !assemble::keys::signs_with_own_keys(&config) {
                return (looked, None); // configured keys are read at the start; those of a URL are swapped in from elsewhere
            }
            let before = looked;
            let changed = looked.look(&config, &last, what);
            if !changed && !whether_changed_or_not {
                return (looked, None);
            }
            let loaded = load(&config, &last, what);
            let waits = match &loaded {
                Ok(new) if what == Reloaded::Revocations && !whether_changed_or_not => {
                    looked.waits(&before, &last, new)
                }
                _ => false,
            };
            (looked, (!waits).then_some(loaded))
        });
        let (looked, loaded) =
            loaded.await.map_err(|_| "the proxy failed while it loaded; please report it".to_owned())?;
        *seen = looked;
        match loaded {
            None => Ok(()),
            Some(Ok(snapshot)) => {
                log::info!("{} reloaded; policy revision {}", what.as_str(), snapshot.policy.revision());
                // Keys are swapped in from elsewhere meanwhile: only what was loaded replaces what is in force.
                self.site.renew(|now| match what {
                    Reloaded::Policy => Snapshot { policy: Arc::clone(&snapshot.policy), ..now.clone() },
                    Reloaded::Agents => Snapshot { agents: Arc::clone(&snapshot.agents), ..now.clone() },
                    Reloaded::Revocations => Snapshot { revocations: Arc::clone(&snapshot.revocations), ..now.clone() },
                    Reloaded::Keys => Snapshot {
                        verifier: Arc::clone(&snapshot.verifier),
                        issuer: snapshot.issuer.clone(),
                        jwks: snapshot.jwks.clone(),
                        next_key_end: snapshot.next_key_end,
                        ..now.clone()
                    },
                });
                Ok(())
            }
            Some(Err(why)) => {
                self.site.ledger.metrics.reload_failed(what);
                log::error!("{} not reloaded, the last good one stays: {why}", what.as_str());
                Err(why)
            }
        }
    }
}

fn load(config: &Config, last: &Snapshot, what: Reloaded) -> Result<Snapshot, String> {
    match what {
        Reloaded::Policy => assemble::with_new_policy(config, last),
        Reloaded::Agents => assemble::with_new_agents(config, last),
        Reloaded::Revocations => assemble::with_new_revocations(config, last),
        Reloaded::Keys => assemble::with_new_keys(config, last),
    }
}
