//! A pull's own registry: while a model is pulled for several backends, the proxy fetches it once and the backends pull it from here.
//!
//! An Ollama gives away no blob, but it pulls from whatever host stands in a model's name. So a pull that goes to several backends gets a
//! namespace of its own, which nobody can guess and which is the only right to read anything here; the backends are asked for
//! `HOST:PORT/NAMESPACE/model`, and copy it to its real name. (docs/adr/0085-mirror.md; the backends' side is `proxy::pull`)
//!
//! - `registry`: the model's own registry, its redirects and what is refused of it;
//! - `manifest`: what a model consists of, judged before a byte of it is fetched;
//! - `blob`: one blob, fetched once, read while it grows, verified before its last byte is given out;
//! - `store`: files without names, the bound of all of them, and the disk's;
//! - `listen`: HTTP for the backends.
//!
//! What a pull holds (the namespace, its files, its fetches, its part of the bound) ends with its [`Pull`].

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::RngCore as _;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

use self::blob::Blob;
use self::manifest::Manifest;
use self::registry::Registry;
use self::store::{Reservation, Store};
use crate::ledger::Metrics;
use crate::outbound::{Outbound, OutboundError};
use crate::wire::model::{ModelRef, TEMPORARY};

mod blob;
mod listen;
mod manifest;
mod registry;
mod store;

pub use self::listen::CONNECTIONS;

/// The model's part of a temporary name; its tag is `latest`.
const MODEL: &str = "model";
/// Blobs of one pull that are fetched at once. One line to the registry is not made wider by sharing it.
const FETCHES: usize = 4;

/// What an operator says.
pub struct Settings {
    /// Folder for what is being fetched. Made if it is not there; what a crash left in it is removed.
    pub store: PathBuf,
    /// Of all pulls that run together.
    pub most_bytes: u64,
    /// `host:port`, as it stands in the names of models.
    pub authority: String,
}

/// Everything that is being pulled through here.
pub struct Mirror {
    authority: String,
    store: Store,
    outbound: Outbound,
    metrics: Arc<Metrics>,
    /// By namespace.
    running: Mutex<HashMap<String, Arc<Running>>>,
}

/// Why a model is not fetched here, or no longer. The words name nothing of the pull's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The registry wants a key that only a backend has.
    NeedsKey,
    /// The registry, or where it sent us, did not answer.
    Outbound(OutboundError),
    /// What it answered does not do; the words say what.
    Registry(&'static str),
    /// The registry's own status.
    Status(u16),
    /// The manifest is none that can be served.
    Manifest(&'static str),
    /// Larger than what is left of `models.mirror_bytes`.
    TooLarge,
    /// The store's disk is full, or does not do.
    Disk,
    /// The bytes are not those of the digest.
    WrongBytes,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::NeedsKey => f.write_str("the registry asks for a key, which only a backend has"),
            Fault::Outbound(error) => write!(f, "the registry: {error}"),
            Fault::Registry(what) => write!(f, "the registry {what}"),
            Fault::Status(status) => write!(f, "the registry answered {status}"),
            Fault::Manifest(what) => write!(f, "the model's manifest {what}"),
            Fault::TooLarge => f.write_str("the model is larger than what is left of models.mirror_bytes"),
            Fault::Disk => f.write_str("the disk of models.mirror_store has no room for it, or cannot be written"),
            Fault::WrongBytes => f.write_str("the registry's bytes are not those of the digest"),
        }
    }
}

/// What is known of one pull; shared by its fetches and by the connections that read it.
struct Running {
    registry: Registry,
    manifest: Manifest,
    /// By digest.
    blobs: HashMap<String, Blob>,
    fault: watch::Sender<Option<Fault>>,
    over: watch::Sender<bool>,
    places: Semaphore,
    fetches: Mutex<Vec<AbortHandle>>,
    metrics: Arc<Metrics>,
    /// Given back once nobody holds a file any more.
    _reserved: Reservation,
}

/// The right to pull one model from here, for as long as this lives.
pub struct Pull {
    mirror: Arc<Mirror>,
    namespace: String,
    running: Arc<Running>,
}

impl Mirror {
    /// # Errors
    /// The folder cannot be made, read or written; or the machine's certificates cannot be used.
    pub fn new(settings: Settings, metrics: Arc<Metrics>) -> Result<Mirror, String> {
        let store = Store::open(settings.store, settings.most_bytes)?;
        let outbound = Outbound::new(None).map_err(|e| e.to_string())?;
        Ok(Mirror { authority: settings.authority, store, outbound, metrics, running: Mutex::default() })
    }

    /// `host:port`, where the backends find it.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Reads the model's manifest and opens a namespace for it. Nothing else is fetched before a backend asks.
    ///
    /// `plain`: the caller wants `http`, which is taken to this machine alone.
    ///
    /// # Errors
    /// The model is not for here; its backends can still pull for themselves.
    pub async fn begin(self: &Arc<Mirror>, model: &ModelRef, plain: bool) -> Result<Pull, Fault> {
        let registry = Registry::find(&self.outbound, model, plain).await?;
        let manifest = Manifest::read(registry.manifest().await?)?;
        self.metrics.mirror_fetched(manifest.bytes.len() as u64);
        let total = manifest.blobs.values().try_fold(0_u64, |sum, size| sum.checked_add(*size));
        let reserved = self.store.reserve(total.ok_or(Fault::TooLarge)?).await?;
        let blobs = manifest.blobs.iter().map(|(digest, size)| (digest.clone(), Blob::new(digest, *size)));
        let running = Arc::new(Running {
            blobs: blobs.collect(),
            registry,
            manifest,
            fault: watch::Sender::new(None),
            over: watch::Sender::new(false),
            places: Semaphore::new(FETCHES),
            fetches: Mutex::default(),
            metrics: Arc::clone(&self.metrics),
            _reserved: reserved,
        });
        let mut secret = [0; 32];
        rand::rngs::OsRng.fill_bytes(&mut secret);
        let namespace = format!("{TEMPORARY}{}", hex(&secret));
        self.running.lock().insert(namespace.clone(), Arc::clone(&running));
        Ok(Pull { mirror: Arc::clone(self), namespace, running })
    }

    /// Whether a name on a backend is one of ours that no pull needs any more: what a crash left, of this proxy or of one before at
    /// this address. Another proxy's are its own affair.
    pub fn left_behind(&self, model: &ModelRef) -> bool {
        model.is_temporary()
            && model.host.eq_ignore_ascii_case(&self.authority)
            && !self.running.lock().contains_key(&model.namespace)
    }
}

impl Pull {
    /// What a backend is asked to pull, by `http`.
    pub fn name(&self) -> String {
        format!("{}/{}/{MODEL}", self.mirror.authority, self.namespace)
    }

    /// A second temporary name of this pull's, for what a backend had under the real one before.
    pub fn name_before(&self) -> String {
        format!("{}/{}/before", self.mirror.authority, self.namespace)
    }

    /// What went wrong, once something has. It stays so.
    pub fn fault(&self) -> Option<Fault> {
        *self.running.fault.borrow()
    }

    /// Waits until something goes wrong.
    pub async fn failed(&self) {
        let mut fault = self.running.fault.subscribe();
        // The sender lives as long as `self`.
        let _ = fault.wait_for(Option::is_some).await;
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        self.mirror.running.lock().remove(&self.namespace);
        // In this order: a fetch that begins at this moment sees one or the other.
        self.running.over.send_replace(true);
        for fetch in self.running.fetches.lock().drain(..) {
            fetch.abort();
        }
    }
}

impl Running {
    /// Has a blob fetched, if nobody has asked for it yet.
    fn want(self: &Arc<Running>, blob: &Blob) {
        if blob.is_first_wish() {
            let (own, digest) = (Arc::clone(self), blob.digest.clone());
            let fetch = tokio::spawn(async move {
                let Some(blob) = own.blobs.get(&digest) else { return };
                let Ok(_place) = own.places.acquire().await else { return };
                if let Err(fault) = blob.fetch(&own.registry, &own._reserved, &own.metrics).await {
                    // Whoever reads goes on waiting until the pull is told to end: a reader that is cut tries again for a minute.
                    own.fault.send_if_modified(|known| known.replace(fault).is_none());
                }
            });
            let mut fetches = self.fetches.lock();
            fetches.push(fetch.abort_handle());
            if *self.over.borrow() {
                fetches.drain(..).for_each(|fetch| fetch.abort()); // the pull ended in between
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // a String takes everything
        text
    })
}
