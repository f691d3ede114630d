//! Keys from a URL (a JWKS document over HTTPS): fetched at the start, by schedule, and when a token names a key that nobody knows.
//!
//! One fetch runs at a time, whoever wants one. What is fetched and good becomes a new `Verifier` in the snapshot; whatever else
//! comes back leaves the last good keys in force, for as long as the URL is down. A key that is gone from the document stops verifying
//! with the fetch that shows it. Choices and reasons: docs/adr/0026-keys-by-url.md.
//!
//! - [`RemoteKeys::learn`]: for a request whose token names an unknown key.
//! - [`saved`]: the copy in the state folder, with which a restart survives an outage.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::HeaderValue;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use crate::config::ServiceUrl;
use crate::identity::keys::KeyError;
use crate::identity::{Algorithm, KeySet, Verifier, VerifierSettings, jwks};
use crate::ledger::Metrics;
use crate::ledger::metrics::KeysFetched;
use crate::outbound::{Bounds, Outbound, OutboundError};
use crate::snapshot::Snapshot;

pub mod saved;

/// A fetch takes no longer, and so no request waits longer for one. A key server answers in milliseconds.
pub const FETCH: Duration = Duration::from_secs(5);
/// Requests that wait for a fetch at once. Each is a stranger's, and may not take the places of those who have a token; past it they
/// are refused at once, as they would be after the floor.
const WAITING: usize = 1024;
/// An unchanged copy is written anew when it is this old, so that its age says when the keys were last seen.
const REWRITE: Duration = Duration::from_secs(3600);

pub struct RemoteKeysSettings {
    pub url: ServiceUrl,
    /// Between two fetches by schedule.
    pub refresh: Duration,
    /// Between two fetches for unknown keys, and before a failed one is tried again.
    pub floor: Duration,
    /// The copy in the state folder.
    pub saved: PathBuf,
    /// The only algorithm that the keys may be for, where one is configured.
    pub algorithm: Option<Algorithm>,
    pub verifier: VerifierSettings,
    /// Requests served at once; those that wait for a fetch may be half of them at most.
    pub in_flight: usize,
}

/// Why a fetch brought no keys. Its words hold nothing of what was fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchError {
    Outbound(OutboundError),
    Status(u16),
    Keys(KeyError),
    OtherAlgorithm(Algorithm),
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FetchError::Outbound(OutboundError::TooLarge) => {
                write!(f, "its document is larger than {} KiB", jwks::MAX_DOCUMENT_BYTES >> 10)
            }
            FetchError::Outbound(e) => write!(f, "it {e}"),
            FetchError::Status(status @ 300..400) => {
                write!(f, "it answered {status}, and redirects are not followed; set the URL that it leads to")
            }
            FetchError::Status(status) => write!(f, "it answered {status}"),
            FetchError::Keys(e) => e.fmt(f),
            FetchError::OtherAlgorithm(wanted) => {
                write!(f, "it has a key of another algorithm than identity.algorithm, {}", wanted.as_str())
            }
        }
    }
}

impl std::error::Error for FetchError {}

/// The keys of one URL, kept fresh.
pub struct RemoteKeys {
    settings: RemoteKeysSettings,
    outbound: Outbound,
    snapshot: Arc<ArcSwap<Snapshot>>,
    metrics: Arc<Metrics>,
    flight: Mutex<Flight>,
    /// Counts the fetches that have ended.
    landed: watch::Sender<u64>,
    waiting: Semaphore,
}

#[derive(Default)]
struct Flight {
    running: bool,
    /// When an unknown key last caused a fetch.
    asked: Option<Instant>,
    /// Why the last fetch failed.
    failed: Option<FetchError>,
    saved: Option<Instant>,
}

/// Ends a flight whatever happens to it, so that no later one waits for it for ever.
struct Landing<'a>(&'a RemoteKeys);

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.0.flight.lock().running = false;
        self.0.landed.send_modify(|ended| *ended += 1);
    }
}

/// Fetches once, and judges the document.
pub async fn fetch(
    outbound: &Outbound,
    url: &ServiceUrl,
    algorithm: Option<Algorithm>,
) -> Result<(Bytes, KeySet), FetchError> {
    let accept = HeaderValue::from_static("application/jwk-set+json, application/json");
    let bounds = Bounds { within: FETCH, reply_bytes: jwks::MAX_DOCUMENT_BYTES };
    let reply = outbound.get(url, &[(http::header::ACCEPT, accept)], bounds).await.map_err(FetchError::Outbound)?;
    if reply.status != 200 {
        return Err(FetchError::Status(reply.status));
    }
    let keys = KeySet::from_jwks(&reply.body).map_err(FetchError::Keys)?;
    match algorithm {
        Some(wanted) if keys.keys().iter().any(|key| key.algorithm() != wanted) => {
            Err(FetchError::OtherAlgorithm(wanted))
        }
        _ => Ok((reply.body, keys)),
    }
}

impl RemoteKeys {
    pub fn new(
        settings: RemoteKeysSettings,
        outbound: Outbound,
        snapshot: Arc<ArcSwap<Snapshot>>,
        metrics: Arc<Metrics>,
    ) -> Arc<RemoteKeys> {
        let waiting = Semaphore::new(WAITING.min(settings.in_flight / 2));
        let (flight, landed) = (Mutex::default(), watch::Sender::new(0));
        Arc::new(RemoteKeys { settings, outbound, snapshot, metrics, flight, landed, waiting })
    }

    /// Fetches now and waits for the end of it: [`FETCH`] at most.
    pub async fn refresh(self: &Arc<Self>) {
        if let Some(landed) = self.start(Cause::Schedule) {
            wait_for(landed).await;
        }
    }

    /// Fetches by schedule for ever; a fetch that failed is tried again after the floor.
    pub async fn keep_fresh(self: Arc<Self>) {
        loop {
            let failed = self.flight.lock().failed.is_some();
            let RemoteKeysSettings { refresh, floor, .. } = self.settings;
            tokio::time::sleep(if failed { refresh.min(floor) } else { refresh }).await;
            self.refresh().await;
        }
    }

    /// A token names a key that nobody knows: fetches, or waits for the fetch that runs, and comes back when the keys in force are as
    /// new as they can be. At most one fetch in a floor is caused this way, however many tokens with made-up keys there are.
    pub async fn learn(self: &Arc<Self>) {
        let Ok(_place) = self.waiting.try_acquire() else { return };
        if let Some(landed) = self.start(Cause::UnknownKey) {
            wait_for(landed).await;
        }
    }

    /// Starts a flight unless one runs. `None`: it is too early for another one.
    ///
    /// The flight is a task of its own: a client that leaves does not end what others wait for.
    fn start(self: &Arc<Self>, cause: Cause) -> Option<watch::Receiver<u64>> {
        let mut flight = self.flight.lock();
        let landed = self.landed.subscribe(); // under the lock, so that no landing is missed
        if flight.running {
            return Some(landed);
        }
        if cause == Cause::UnknownKey {
            if flight.asked.is_some_and(|asked| asked.elapsed() < self.settings.floor) {
                return None;
            }
            flight.asked = Some(Instant::now());
        }
        flight.running = true;
        let keys = Arc::clone(self);
        tokio::spawn(async move { keys.fly().await });
        Some(landed)
    }

    async fn fly(&self) {
        let landing = Landing(self);
        let fetched = fetch(&self.outbound, &self.settings.url, self.settings.algorithm).await;
        let before = self.flight.lock().failed;
        match fetched {
            Ok((document, keys)) => {
                let changed = self.take(keys);
                self.flight.lock().failed = None;
                if before.is_some() {
                    log::info!("{} gives keys again", self.settings.url);
                }
                drop(landing); // nobody waits for the disk
                self.save(&document, changed).await;
            }
            Err(why) => {
                self.metrics.keys_fetched(KeysFetched::Failed);
                self.flight.lock().failed = Some(why);
                if before != Some(why) {
                    let kept = match self.snapshot.load().verifier.has_keys() {
                        true => "the last good keys stay",
                        false => "no token can be verified until it does",
                    };
                    log::error!("no keys from {}: {why}; {kept}", self.settings.url);
                }
            }
        }
    }

    /// Puts the keys in force. True: they are others than before.
    fn take(&self, keys: KeySet) -> bool {
        let changed = !self.snapshot.load().verifier.verifies_with(&keys);
        self.metrics.keys_fetched(if changed { KeysFetched::Changed } else { KeysFetched::Unchanged });
        if changed {
            log::info!("{} keys from {}; {} passed over", keys.keys().len(), self.settings.url, keys.skipped().len());
            let verifier = Arc::new(Verifier::new(keys, self.settings.verifier.clone()));
            self.snapshot.rcu(|now| now.with_verifier(Arc::clone(&verifier)));
        }
        changed
    }

    async fn save(&self, document: &Bytes, changed: bool) {
        let fresh = self.flight.lock().saved.is_some_and(|saved| saved.elapsed() < REWRITE);
        if fresh && !changed {
            return;
        }
        let (path, url, document) = (self.settings.saved.clone(), self.settings.url.clone(), document.clone());
        let now_s = jiff::Timestamp::now().as_second();
        let written = tokio::task::spawn_blocking(move || saved::write(&path, &url, now_s, &document)).await;
        match written {
            Ok(Ok(())) => self.flight.lock().saved = Some(Instant::now()),
            Ok(Err(why)) => log::warn!("the keys could not be saved for the next start: {why}"),
            Err(_) => log::error!("the keys could not be saved for the next start"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    Schedule,
    UnknownKey,
}

async fn wait_for(mut landed: watch::Receiver<u64>) {
    // The fetch has a deadline of its own; the second is for a machine under load.
    let _ = tokio::time::timeout(FETCH + Duration::from_secs(1), landed.changed()).await;
}
