//! The keys that verify and sign tokens, from whichever source the configuration names: the state folder's own, a PEM file, a shared
//! secret, a key set's file or URL.

use std::sync::Arc;

use arc_swap::ArcSwap;
use jiff::Timestamp;

use super::{FileFingerprint, in_words, is_set, outbound, read_private, trimmed};
use crate::config::{self, Config, Pem, ServiceUrl};
use crate::identity::issuer::DEFAULT_TTL_S;
use crate::identity::keys::KeySet;
use crate::identity::own_keys::{self, OwnKeys};
use crate::identity::{Algorithm, Issuer, SigningKey, Verifier, VerifierSettings};
use crate::ledger::Metrics;
use crate::remote_keys::{self, RemoteKeys, RemoteKeysSettings};
use crate::snapshot::Snapshot;

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
pub fn load(config: &Config) -> Result<Keys, String> {
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
pub fn load_now(config: &Config) -> Result<Keys, String> {
    let keys = load(config)?;
    let Some(url) = &config.identity.jwks_url else { return Ok(keys) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(in_words("a runtime"))?;
    let wanted = config.identity.algorithm.map(algorithm);
    let fetched = runtime.block_on(remote_keys::fetch(&outbound(config)?, url, wanted));
    let (_, set) = fetched.map_err(in_words(&format!("identity.jwks_url {url}")))?;
    Ok(Keys { verifier: Verifier::new(set, verifier_settings(config)), ..keys })
}

pub(super) fn from_own(config: &Config, own: OwnKeys) -> Result<Keys, String> {
    let now = Timestamp::now();
    let set = own.key_set(now).map_err(in_words("the keys of the state folder"))?;
    Ok(Keys {
        next_end: own.next_end(now),
        verifier: Verifier::new(set, verifier_settings(config)),
        issuer: Some(issuer(config, own.signing)),
    })
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
    load(config).map(|_| ())
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

/// Changes when the proxy's own keys do: what they are replaced by is renamed into their folders.
pub fn fingerprint(config: &Config) -> [Option<FileFingerprint>; 2] {
    if !signs_with_own_keys(config) {
        return [None; 2];
    }
    let state_dir = &config.state_dir;
    [own_keys::signing_key_path(state_dir), own_keys::folder_path(state_dir)].map(|path| FileFingerprint::of(&path))
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

fn issuer(config: &Config, key: SigningKey) -> Issuer {
    let identity = &config.identity;
    let ttl_s = identity.token_ttl.as_secs() as i64;
    Issuer::new(key, identity.issuer.clone(), ttl_s).with_audience(identity.audience.clone())
}

fn verifier_settings(config: &Config) -> VerifierSettings {
    let identity = &config.identity;
    VerifierSettings {
        issuer: identity.issuer.clone(),
        audience: identity.audience.clone(),
        leeway_s: identity.leeway.as_secs(),
    }
}

pub fn algorithm(configured: config::Algorithm) -> Algorithm {
    match configured {
        config::Algorithm::Rs256 => Algorithm::Rs256,
        config::Algorithm::Es256 => Algorithm::Es256,
        config::Algorithm::EdDsa => Algorithm::EdDsa,
        config::Algorithm::Hs256 => Algorithm::Hs256,
    }
}

fn read_pem(pem: &Pem, what: &str) -> Result<Vec<u8>, String> {
    match pem {
        Pem::File(path) => std::fs::read(path).map_err(in_words(&format!("{what} ({})", path.display()))),
        Pem::Text(text) => Ok(text.expose().as_bytes().to_vec()),
    }
}
