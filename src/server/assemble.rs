//! From the configuration to a [`Snapshot`]: keys, policy, agents. Whatever is wrong is one line that says what to do.

use std::fmt::Display;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use jiff::Timestamp;

use crate::config::{self, Config, Pem, Secret, ServiceUrl};
use crate::control_plane::ControlPlane;
use crate::identity::agents::Agents;
use crate::identity::issuer::DEFAULT_TTL_S;
use crate::identity::keys::KeySet;
use crate::identity::own_keys::{self, OwnKeys};
use crate::identity::revocations::Revocations;
use crate::identity::{Algorithm, Issuer, SigningKey, Verifier, VerifierSettings};
use crate::ledger::Metrics;
use crate::ledger::record::Moment;
use crate::models::Models;
use crate::operator::gate::Gate;
use crate::outbound::Outbound;
use crate::policy::{self, Policy};
use crate::remote_keys::{self, RemoteKeys, RemoteKeysSettings};
use crate::sinks::{self, Otlp, Receiver, SinkSettings, Syslog, Webhook};
use crate::snapshot::Snapshot;
use crate::upstream::{Backend, Pool};
use crate::wire::{Filter, Filters};

/// Everything from scratch: at the start.
pub fn snapshot(config: &Config) -> Result<Snapshot, String> {
    let policy = load_policy(config)?;
    let keys = keys(config)?;
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
    if !signs_with_own_keys(config) {
        return Ok(last.clone());
    }
    let keys = from_own(config, OwnKeys::reload(&config.state_dir).map_err(|e| e.to_string())?)?;
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

/// Changes when the proxy's own keys do: what they are replaced by is renamed into their folders.
pub fn keys_fingerprint(config: &Config) -> [Option<FileFingerprint>; 2] {
    if !signs_with_own_keys(config) {
        return [None; 2];
    }
    let state_dir = &config.state_dir;
    [own_keys::signing_key_path(state_dir), own_keys::folder_path(state_dir)].map(|path| FileFingerprint::of(&path))
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

/// What verifies tokens, and what signs them.
pub struct Keys {
    pub verifier: Verifier,
    /// `None`: tokens come from elsewhere.
    pub issuer: Option<Issuer>,
    /// When the next of our own old keys ends.
    pub next_end: Option<Timestamp>,
}

/// The keys of the configuration, or, where none is configured, our own of the state folder, made if there is none. Keys of a URL are
/// those that were saved, if they are not too old: [`remote_keys`] fetches them.
pub fn keys(config: &Config) -> Result<Keys, String> {
    let identity = &config.identity;
    let wanted = identity.algorithm.map(algorithm);
    if signs_with_own_keys(config) {
        return from_own(config, OwnKeys::open(&config.state_dir, wanted).map_err(|e| e.to_string())?);
    }
    let signing = configured_signing_key(config)?;
    let set = if let Some(pem) = &identity.public_key {
        KeySet::from_pem(&read_pem(pem, "identity.public_key_file")?).map_err(in_words("identity.public_key_file"))?
    } else if is_set(&identity.secret_file) {
        let secret = read_private(&identity.secret_file)?;
        KeySet::from_secret(trimmed(&secret)).map_err(in_words("identity.secret_file"))?
    } else if is_set(&identity.jwks_file) {
        let document =
            std::fs::read(&identity.jwks_file).map_err(in_words(&identity.jwks_file.display().to_string()))?;
        KeySet::from_jwks(&document).map_err(in_words("identity.jwks_file"))?
    } else if let Some(url) = &identity.jwks_url {
        let verifier = saved_keys(config, url);
        return Ok(Keys { verifier, issuer: signing.map(|key| issuer(config, key)), next_end: None });
    } else {
        let own =
            signing.as_ref().ok_or("no key verifies tokens; set identity.public_key_file, secret_file or jwks_file")?;
        KeySet::new(vec![own.verification_key()]).map_err(in_words("the signing key"))?
    };
    if let Some(wanted) = wanted
        && set.keys().iter().any(|key| key.algorithm() != wanted)
    {
        return Err(format!("identity.algorithm is {}, and the key is of another; make them agree", wanted.as_str()));
    }
    let verifier = Verifier::new(set, verifier_settings(config));
    Ok(Keys { verifier, issuer: signing.map(|key| issuer(config, key)), next_end: None })
}

/// The same with the keys that the URL gives now, where there is one: for commands.
pub fn keys_now(config: &Config) -> Result<Keys, String> {
    let keys = keys(config)?;
    let Some(url) = &config.identity.jwks_url else { return Ok(keys) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(in_words("a runtime"))?;
    let wanted = config.identity.algorithm.map(algorithm);
    let fetched = runtime.block_on(remote_keys::fetch(&outbound(config)?, url, wanted));
    let (_, set) = fetched.map_err(in_words(&format!("identity.jwks_url {url}")))?;
    Ok(Keys { verifier: Verifier::new(set, verifier_settings(config)), ..keys })
}

/// Whether the keys of the state folder sign and verify: nothing else is configured.
pub fn signs_with_own_keys(config: &Config) -> bool {
    let identity = &config.identity;
    identity.private_key.is_none() && !is_set(&identity.secret_file) && !identity.is_foreign()
}

/// Makes our own key where there is none: at the first start, before the files are looked at for changes.
pub fn make_own_key(config: &Config) -> Result<(), String> {
    if !signs_with_own_keys(config) || own_keys::signing_key_path(&config.state_dir).exists() {
        return Ok(());
    }
    keys(config).map(|_| ())
}

/// Our own key gives tokens the configured life from now on: a rotation has to know, also once the configuration says another.
pub fn note_ttl(config: &Config, snapshot: &Snapshot) -> Result<(), String> {
    let ttl_s = config.identity.token_ttl.as_secs() as i64;
    let Some(issuer) = snapshot.issuer.as_ref().filter(|_| signs_with_own_keys(config) && ttl_s > DEFAULT_TTL_S) else {
        return Ok(());
    };
    let _alone = own_keys::lock(&config.state_dir).map_err(|e| e.to_string())?;
    own_keys::note_ttl(&config.state_dir, &issuer.key().verification_key(), ttl_s).map_err(|e| e.to_string())
}

fn from_own(config: &Config, own: OwnKeys) -> Result<Keys, String> {
    let now = Timestamp::now();
    let set = own.key_set(now).map_err(in_words("the keys of the state folder"))?;
    Ok(Keys {
        next_end: own.next_end(now),
        verifier: Verifier::new(set, verifier_settings(config)),
        issuer: Some(issuer(config, own.signing)),
    })
}

/// Keys of a URL, kept fresh from now on.
pub fn remote_keys(
    config: &Config,
    snapshot: &Arc<ArcSwap<Snapshot>>,
    metrics: &Arc<Metrics>,
) -> Result<Option<Arc<RemoteKeys>>, String> {
    let identity = &config.identity;
    let Some(url) = &identity.jwks_url else { return Ok(None) };
    let settings = RemoteKeysSettings {
        url: url.clone(),
        refresh: identity.jwks_refresh,
        floor: identity.jwks_floor,
        saved: config.state_dir.join(remote_keys::saved::FILE),
        algorithm: identity.algorithm.map(algorithm),
        verifier: verifier_settings(config),
        in_flight: config.limits.in_flight,
    };
    Ok(Some(RemoteKeys::new(settings, outbound(config)?, Arc::clone(snapshot), Arc::clone(metrics))))
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

/// What the URL gave before the last restart. Whatever is wrong with it does not matter if the URL is up.
fn saved_keys(config: &Config, url: &ServiceUrl) -> Verifier {
    let path = config.state_dir.join(remote_keys::saved::FILE);
    match remote_keys::saved::read(&path, url, jiff::Timestamp::now().as_second()) {
        Ok(Some((set, age_s))) => {
            let wanted = config.identity.algorithm.map(algorithm);
            if set.keys().iter().all(|key| wanted.is_none_or(|wanted| key.algorithm() == wanted)) {
                log::info!("{} keys of {url} were saved {age_s} s ago", set.keys().len());
                return Verifier::new(set, verifier_settings(config));
            }
        }
        Ok(None) => {}
        Err(why) => log::warn!("{why}; they are not used"),
    }
    Verifier::awaiting_keys(verifier_settings(config))
}

fn verifier_settings(config: &Config) -> VerifierSettings {
    let identity = &config.identity;
    VerifierSettings {
        issuer: identity.issuer.clone(),
        audience: identity.audience.clone(),
        leeway_s: identity.leeway.as_secs(),
    }
}

fn issuer(config: &Config, key: SigningKey) -> Issuer {
    let identity = &config.identity;
    let ttl_s = identity.token_ttl.as_secs() as i64;
    Issuer::new(key, identity.issuer.clone(), ttl_s).with_audience(identity.audience.clone())
}

/// The key that the configuration names, or the shared secret. Only a public key or a key set: somebody else signs.
fn configured_signing_key(config: &Config) -> Result<Option<SigningKey>, String> {
    let identity = &config.identity;
    if let Some(pem) = &identity.private_key {
        let pem = match pem {
            Pem::File(path) => read_private(path)?,
            Pem::Text(text) => text.expose().as_bytes().to_vec(),
        };
        return SigningKey::from_pem(&pem).map(Some).map_err(in_words("identity.private_key_file"));
    }
    if is_set(&identity.secret_file) {
        let secret = read_private(&identity.secret_file)?;
        return SigningKey::from_secret(trimmed(&secret)).map(Some).map_err(in_words("identity.secret_file"));
    }
    Ok(None)
}

pub fn algorithm(configured: config::Algorithm) -> Algorithm {
    match configured {
        config::Algorithm::Rs256 => Algorithm::Rs256,
        config::Algorithm::Es256 => Algorithm::Es256,
        config::Algorithm::EdDsa => Algorithm::EdDsa,
        config::Algorithm::Hs256 => Algorithm::Hs256,
    }
}

/// Aliases, fallbacks and settings of models.
pub fn models(config: &Config) -> Result<Models, String> {
    Models::new(&config.model)
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
        Backend::new(place, configured, authorization, &config.backend_timeouts)
    });
    let backends = backends.collect::<Result<Vec<_>, String>>()?;
    let manage = backends.iter().position(|backend| backend.name == config.fleet.manage);
    Ok(Pool::new(backends, manage))
}

fn read_pem(pem: &Pem, what: &str) -> Result<Vec<u8>, String> {
    match pem {
        Pem::File(path) => std::fs::read(path).map_err(in_words(&format!("{what} ({})", path.display()))),
        Pem::Text(text) => Ok(text.expose().as_bytes().to_vec()),
    }
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
