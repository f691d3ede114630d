//! From the configuration to a [`Snapshot`]: keys, policy, agents. Whatever is wrong is one line that says what to do.
//!
//! - [`keys`]: what verifies and signs tokens.

use std::fmt::Display;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::config::{self, Config, Secret};
use crate::control_plane::ControlPlane;
use crate::identity::agents::Agents;
use crate::identity::own_keys::OwnKeys;
use crate::identity::revocations::Revocations;
use crate::ledger::Metrics;
use crate::ledger::record::Moment;
use crate::mirror::{self, Mirror};
use crate::models::Models;
use crate::operator::gate::Gate;
use crate::outbound::Outbound;
use crate::policy::{self, Policy};
use crate::sinks::{self, Otlp, Receiver, SinkSettings, Syslog, Webhook};
use crate::site::QueueRules;
use crate::snapshot::Snapshot;
use crate::upstream::scheduler::{self, Class};
use crate::upstream::{Backend, Pool, health};
use crate::wire::{Filter, Filters};

pub mod keys;

/// Longest rest of a backend that fails each time it is tried.
const MOST_REST: Duration = Duration::from_secs(60);

/// Everything from scratch: at the start.
pub fn snapshot(config: &Config) -> Result<Snapshot, String> {
    let policy = load_policy(config)?;
    let keys = keys::load(config)?;
    let agents = load_agents(config)?;
    let revocations = load_revocations(config)?.unwrap_or_default();
    Ok(Snapshot {
        jwks: Bytes::from(keys.verifier.published()),
        verifier: Arc::new(keys.verifier),
        issuer: keys.issuer.map(Arc::new),
        next_key_end: keys.next_end,
        agents: Arc::new(agents),
        revocations: Arc::new(revocations),
        policy: Arc::new(policy),
    })
}

/// The policy, read anew; the rest stays.
pub fn with_new_policy(config: &Config, last: &Snapshot) -> Result<Snapshot, String> {
    Ok(Snapshot { policy: Arc::new(load_policy(config)?), ..last.clone() })
}

/// The agents, read anew; the rest stays. Apart from the policy, so that an agent can be suspended while a policy is broken.
///
/// A file that has gone is a broken change, not an empty file: an editor may write it anew a moment later.
pub fn with_new_agents(config: &Config, last: &Snapshot) -> Result<Snapshot, String> {
    let path = &config.identity.agents_file;
    if !last.agents.is_empty() && !path.exists() {
        return Err(format!("{} is gone; restore it, or leave it empty if nobody may have a token", path.display()));
    }
    Ok(Snapshot { agents: Arc::new(load_agents(config)?), ..last.clone() })
}

/// The revocations, read anew; the rest stays.
///
/// A file that has gone is a broken change, not an empty list: deleting it would let every revoked token pass.
pub fn with_new_revocations(config: &Config, last: &Snapshot) -> Result<Snapshot, String> {
    let loaded = load_revocations(config)?;
    if loaded.is_none() && !last.revocations.is_empty() {
        let path = config.identity.revocations_file.display();
        return Err(format!("{path} is gone; put it back, or leave it empty if nothing is revoked"));
    }
    Ok(Snapshot { revocations: Arc::new(loaded.unwrap_or_default()), ..last.clone() })
}

/// The proxy's own keys, read anew; the rest stays. Keys that are configured are read at the start only, or fetched from their URL.
pub fn with_new_keys(config: &Config, last: &Snapshot) -> Result<Snapshot, String> {
    if !keys::signs_with_own_keys(config) {
        return Ok(last.clone());
    }
    let keys = keys::from_own(config, OwnKeys::reload(&config.state_dir).map_err(|e| e.to_string())?)?;
    let renewed = last.with_verifier(Arc::new(keys.verifier));
    Ok(Snapshot { issuer: keys.issuer.map(Arc::new), next_key_end: keys.next_end, ..renewed })
}

/// Changes when a file of the policy does. `None`: the policy built into the program, or a folder that cannot be read.
pub fn policy_fingerprint(config: &Config) -> Option<policy::Fingerprint> {
    let dir = &config.policy.dir;
    (!dir.as_os_str().is_empty()).then(|| policy::fingerprint(dir).ok()).flatten()
}

/// What changes with a file: two edits of one length in one tick of the clock still give two inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileFingerprint {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileFingerprint {
    /// `None` where there is no file.
    pub fn of(path: &Path) -> Option<FileFingerprint> {
        let file = std::fs::metadata(path).ok()?;
        Some(FileFingerprint {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    }
}

/// Changes when the agents file does.
pub fn agents_fingerprint(config: &Config) -> Option<FileFingerprint> {
    FileFingerprint::of(&config.identity.agents_file)
}

/// Changes when the list of revocations does.
pub fn revocations_fingerprint(config: &Config) -> Option<FileFingerprint> {
    FileFingerprint::of(&config.identity.revocations_file)
}

/// What is changed in requests.
pub fn filters(config: &Config) -> Filters {
    let on = |filter: &Filter| {
        let set = &config.filters;
        match filter {
            Filter::ModelPrefix => set.model_prefix,
            Filter::PromptCacheKey => set.prompt_cache_key,
            Filter::Verbosity => set.verbosity,
            Filter::Store => set.store,
            Filter::ServiceTier => set.service_tier,
            Filter::CacheControl => set.cache_control,
            Filter::User => set.user,
            Filter::MaxCompletionTokens => set.max_completion_tokens,
            Filter::IncludeUsage => config.streaming.include_usage,
            Filter::WebTools => config.egress.web_tools == config::WebTools::Cut,
        }
    };
    Filter::ALL.into_iter().filter(on).collect()
}

pub fn policy_settings(config: &Config) -> policy::Settings {
    policy::Settings {
        builtin_errors: match config.policy.builtin_errors {
            config::BuiltinErrors::Strict => policy::BuiltinErrors::Strict,
            config::BuiltinErrors::Undefined => policy::BuiltinErrors::Undefined,
        },
        timeout_ms: u64::try_from(config.policy.timeout.as_millis()).unwrap_or(u64::MAX),
    }
}

pub fn load_policy(config: &Config) -> Result<Policy, String> {
    let settings = policy_settings(config);
    let dir = &config.policy.dir;
    let policy = if dir.as_os_str().is_empty() {
        Policy::embedded(&settings).map_err(in_words("the policy built into the program"))?
    } else {
        Policy::load(dir, &settings).map_err(in_words(&format!("policy folder {}", dir.display())))?
    };
    for warning in policy.warnings() {
        log::warn!("policy: {warning}");
    }
    Ok(policy)
}

fn load_agents(config: &Config) -> Result<Agents, String> {
    let path = &config.identity.agents_file;
    if !path.exists() {
        return Ok(Agents::default());
    }
    let agents = Agents::load(path).map_err(in_words(&path.display().to_string()))?;
    Ok(agents.accepting_api_keys(config.identity.api_keys))
}

fn load_revocations(config: &Config) -> Result<Option<Revocations>, String> {
    Revocations::load(&config.identity.revocations_file).map_err(|e| e.to_string())
}

pub fn control_plane(config: &Config) -> Result<Option<ControlPlane>, String> {
    let Some(url) = &config.identity.token_url else { return Ok(None) };
    Ok(Some(ControlPlane::new(url.clone(), outbound(config)?)))
}

/// The client for the two URLs of `[identity]`.
pub fn outbound(config: &Config) -> Result<Outbound, String> {
    trusting(&config.identity.ca_file, "identity.ca_file")
}

/// A client that trusts a CA file's certificates too, if there is one.
fn trusting(ca_file: &Path, key: &str) -> Result<Outbound, String> {
    Outbound::new(is_set(ca_file).then_some(ca_file)).map_err(in_words(key))
}

/// Aliases, fallbacks and settings of models.
pub fn models(config: &Config) -> Result<Models, String> {
    Models::new(&config.model, &config.models)
}

/// From where backends take what is pulled for several of them. `address`: where its listener came to be.
pub fn mirror(
    config: &Config,
    address: Option<SocketAddr>,
    metrics: &Arc<Metrics>,
) -> Result<Option<Arc<Mirror>>, String> {
    let Some(address) = address else { return Ok(None) };
    let settings = mirror::Settings {
        store: config.models.mirror_store.clone(),
        most_bytes: config.models.mirror_bytes,
        authority: config.models.mirror_authority(address),
    };
    Mirror::new(settings, Arc::clone(metrics)).map(Arc::new).map(Some)
}

/// Names and credential of the operator's listener. That one off loopback has a credential is the configuration's affair.
pub fn operator_gate(config: &Config) -> Result<Gate, String> {
    let path = &config.operator.credential_file;
    let credential = if is_set(path) { Some(read_private(path)?) } else { None };
    Gate::new(&config.operator.hosts, credential.as_deref().map(trimmed))
        .map_err(in_words(&format!("operator.credential_file ({})", path.display())))
}

/// The sinks that are configured beside the file and standard output, with their secrets.
pub fn sinks(config: &Config) -> Result<Vec<Receiver>, String> {
    let mut receivers = Vec::new();
    let webhook = &config.audit.webhook;
    if let Some(url) = &webhook.url {
        let secret = read_private(&webhook.secret_file)?;
        let secret = sinks::webhook::Secret::new(trimmed(&secret))
            .map_err(in_words(&format!("audit.webhook.secret_file ({})", webhook.secret_file.display())))?;
        let outbound = trusting(&webhook.ca_file, "audit.webhook.ca_file")?;
        receivers.push(Receiver::Webhook(Box::new(Webhook::new(url.clone(), outbound, secret))));
    }
    let syslog = &config.audit.syslog;
    if let Some(address) = &syslog.address {
        receivers.push(Receiver::Syslog(Syslog::new(address.clone(), syslog.facility)));
    }
    let otlp = &config.audit.otlp;
    if let Some(url) = &otlp.url {
        let file = &otlp.headers_file;
        let text = if is_set(file) { read_private(file)? } else { Vec::new() };
        let named = format!("audit.otlp.headers_file ({})", file.display());
        let text = String::from_utf8(text).map_err(|_| format!("{named}: is no text"))?;
        let headers = sinks::otlp::headers(&text).map_err(in_words(&named))?;
        let outbound = trusting(&otlp.ca_file, "audit.otlp.ca_file")?;
        receivers.push(Receiver::Otlp(Box::new(Otlp::new(url.clone(), outbound, headers))));
    }
    Ok(receivers)
}

/// Called before the audit is opened: a sink that begins now has all that this process writes.
pub fn sink_settings(config: &Config) -> SinkSettings {
    SinkSettings {
        folder: config.audit.dir.clone(),
        bookmarks: config.state_dir.join("sinks"),
        start: match config.audit.sinks.start {
            config::Start::Beginning => sinks::Start::Beginning,
            config::Start::Now => sinks::Start::Now,
        },
        since: Moment::now(),
        batch_lines: config.audit.sinks.batch_lines,
        timeout: config.audit.sinks.timeout,
        retry_max: config.audit.sinks.retry_max,
    }
}

/// Who may wait how, and for how long.
pub fn queue(config: &Config) -> QueueRules {
    let class = |priority: config::Priority| match priority {
        config::Priority::Batch => Class::Batch,
        config::Priority::Default => Class::Default,
        config::Priority::Interactive => Class::Interactive,
    };
    let roles = config.queue.roles.iter().map(|(role, highest)| (role.clone(), class(*highest)));
    QueueRules { wait: config.queue.wait, highest: class(config.queue.highest), roles: roles.collect() }
}

/// The backends.
pub fn pool(config: &Config) -> Result<Pool, String> {
    let backends = config.backend.iter().enumerate().map(|(place, configured)| {
        let authorization = match is_set(&configured.bearer_file) {
            true => {
                let bearer = read_private(&configured.bearer_file)?;
                let bearer = std::str::from_utf8(trimmed(&bearer)).unwrap_or_default();
                Some(Secret::bearer(bearer).map_err(in_words(&configured.bearer_file.display().to_string()))?)
            }
            false => configured.authorization(),
        };
        let health =
            health::Settings { failures: config.health.failures, rest: config.health.rest, most_rest: MOST_REST };
        Backend::new(place, configured, authorization, &config.backend_timeouts, health)
    });
    let backends = backends.collect::<Result<Vec<_>, String>>()?;
    let manage = backends.iter().position(|backend| backend.name == config.fleet.manage);
    let queue = &config.queue;
    let settings = scheduler::Settings {
        model_waiting: queue.model_waiting,
        all_waiting: queue.all_waiting,
        agent_waiting: queue.agent_waiting,
        linger: queue.linger,
        tier: queue.tier,
    };
    Ok(Pool::new(backends, manage, settings))
}

/// A file with a secret: nobody but its owner may read it.
fn read_private(path: &Path) -> Result<Vec<u8>, String> {
    match crate::identity::private_file::read(path, 0o077) {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err(format!("{} does not exist; create it or correct the path", path.display())),
        Err(e) => Err(e.to_string()),
    }
}

/// An editor's newline at the end is not part of a secret.
fn trimmed(secret: &[u8]) -> &[u8] {
    secret.trim_ascii_end()
}

fn is_set(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

fn in_words<E: Display>(what: &str) -> impl FnOnce(E) -> String {
    let what = what.to_owned();
    move |e| format!("{what}: {e}")
}
