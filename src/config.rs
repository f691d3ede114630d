//! Settings: defaults <- TOML file <- environment <- flags, parsed once into types that cannot be wrong.
//!
//! This is the only module that reads the environment, and it does so through a function that it is given, so that
//! tests are pure. A text that makes no sense, a key that nobody knows and a variable that is set but empty stop the
//! start with a [`ConfigError`] that names the place and says what to do. `conf/proxy.toml` lists every key; a test
//! holds it equal to the defaults here.
//!
//! - [`models`]: what is said of models.
//! - [`sections`]: the tables of the file, field by field, with unit, default, variable and reason.
//! - [`service_url`]: where a service is that we call ourselves.
//! - [`syslog`]: where a syslog receiver is.
//! - [`values`]: secrets, backend URLs, and the checks of single values.
//! - `file`: TOML text in, a [`Config`] or the line at fault out.

mod audit;
mod file;
mod filters;
pub mod models;
pub mod sections;
pub mod service_url;
pub mod syslog;
pub mod values;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use audit::{Audit, Durability, Start};
pub use filters::{Egress, Filters, WebTools};
pub use models::{Model, Models, Setting, Span};
pub use sections::{
    Backend, BackendTimeouts, BuiltinErrors, Catalogue, Failover, Fleet, Health, Identity, Limits, Operator, Policy,
    Priority, Queue, Routes, Shutdown, Streaming,
};
pub use service_url::ServiceUrl;
pub use syslog::{Facility, SyslogAddress};
pub use values::{Algorithm, BackendUrl, Pem, Secret};

/// Each is looked at by the choice for every request.
const MOST_BACKENDS: usize = 256;

/// Name of the folders below the system's own, and of the one below `/etc`.
const NAME: &str = "behavry-ollama-proxy";

/// Everything that can be set. The field names are the keys of the file, but that a `Duration` has lost its unit.
#[derive(Clone, Serialize, Deserialize)]
#[serde(default = "Config::defaults")]
pub struct Config {
    /// Address of the public listener. Default `127.0.0.1:8000`: off loopback only on purpose, and best behind TLS.
    /// Variable `BEHAVRY_LISTEN`.
    #[serde(deserialize_with = "values::address")]
    pub listen: SocketAddr,

    /// Folder for what the proxy itself makes: keys, agents, audit, control socket. Empty in the file:
    /// `$STATE_DIRECTORY` (systemd), else `$XDG_STATE_HOME/behavry-ollama-proxy`, else
    /// `~/.local/state/behavry-ollama-proxy`. Never empty once [`Config::load`] returned. Variable `BEHAVRY_STATE_DIR`.
    pub state_dir: PathBuf,

    /// Worker threads; 0 is one for each core, which is best unless Ollama computes on the same cores.
    #[serde(deserialize_with = "values::whole::<_, _, 0, 1024>")]
    pub threads: usize,

    /// What is said of single models: aliases, fallbacks, pinned settings. Default none.
    pub model: Vec<Model>,

    pub routes: Routes,
    pub operator: Operator,

    /// The Ollamas behind the proxy. Default one, `http://localhost:11434`. Variables `BEHAVRY_OLLAMA_URL` (replaces the whole list;
    /// several URLs are separated by commas) and `BEHAVRY_OLLAMA_API_KEY` (the bearer: of the one backend, or of all that have no
    /// credential of their own).
    pub backend: Vec<Backend>,

    pub backend_timeouts: BackendTimeouts,
    pub fleet: Fleet,
    pub failover: Failover,
    pub health: Health,
    pub queue: Queue,
    pub limits: Limits,
    pub identity: Identity,
    pub policy: Policy,
    pub audit: Audit,
    pub filters: Filters,
    pub streaming: Streaming,
    pub shutdown: Shutdown,
    pub egress: Egress,
    pub catalogue: Catalogue,
    pub models: Models,
}

/// What the command line says. It wins over everything else.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub listen: Option<String>,
    pub operator_listen: Option<String>,
    /// As `BEHAVRY_OLLAMA_URL`.
    pub backend: Option<String>,
    pub state_dir: Option<PathBuf>,
    pub policy_dir: Option<PathBuf>,
    pub audit_dir: Option<PathBuf>,
    pub agents_file: Option<PathBuf>,
}

/// A setting that stops the start. Its text is one line and holds no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Where: a file and line, a variable, a flag, or the keys at odds.
    pub place: String,
    /// What was found there.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.place, self.problem, self.remedy)
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    fn new(place: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> ConfigError {
        ConfigError { place: place.into(), problem: problem.into(), remedy: remedy.into() }
    }
}

/// Reads one variable of the process: what `main` gives to [`Config::load`]. Bytes that are not UTF-8 become a
/// character that no setting takes, rather than an unset variable.
pub fn process_env(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

impl Config {
    /// Reads all sources, fills in the folders that depend on the machine, and checks what must agree.
    pub fn load(flags: &Flags, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
        let config_dir = config_dir(env)?;
        let mut config = match config_file(flags, env, config_dir.as_deref())? {
            None => Config::defaults(),
            Some(path) => {
                let text = std::fs::read_to_string(&path).map_err(|e| {
                    ConfigError::new(
                        path.display().to_string(),
                        format!("cannot be read ({e})"),
                        "check the path and its mode",
                    )
                })?;
                file::read(&text, &path)?
            }
        };
        for (variable, set) in VARIABLES {
            if let Some(value) = set_variable(env, variable)? {
                set(&mut config, &value).map_err(|e| e.at(variable))?;
            }
        }
        config.apply(flags)?;
        config.place_folders(config_dir.as_deref(), env)?;
        config.check()?;
        Ok(config)
    }

    /// The settings as the text of a file, with secrets, and the users and passwords in URLs, left out. For `check` and
    /// the log at start.
    pub fn effective(&self) -> String {
        toml::to_string(self).expect("every field is written as a TOML value, and scalars come before tables")
    }

    /// Settings that work and that an operator may not have meant.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.operator.listen.ip().is_loopback() {
            warnings.push(format!(
                "operator.listen = {}: its credential crosses the network in the clear; put TLS in front of it, or keep it on \
                 127.0.0.1 and reach it through ssh -L",
                self.operator.listen
            ));
        }
        if let Some(address) = self.audit.syslog.address.as_ref().filter(|address| !address.is_local()) {
            warnings.push(format!(
                "audit.syslog {address}: records cross the network in the clear, and anybody may answer; send them to a syslog of this \
                 machine that forwards them over TLS"
            ));
        }
        for backend in &self.backend {
            let has_credential = backend.authorization().is_some() || !backend.bearer_file.as_os_str().is_empty();
            if has_credential && !backend.url.is_tls() && !backend.url.is_loopback() {
                warnings.push(format!(
                    "backend {}: its credential crosses the network in the clear; use an https URL",
                    backend.url
                ));
            }
        }
        for model in self.model.iter().filter(|model| model.loads_unlike_v1()) {
            warnings.push(format!(
                "model {}: requests at /v1 cannot have its settings, and load it anew; strip them instead, or see docs/models.md",
                model.name
            ));
        }
        warnings
    }

    /// What holds without a file, a variable or a flag. Folders that depend on the machine are empty still.
    fn defaults() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 8000)),
            state_dir: PathBuf::new(),
            threads: 0,
            model: Vec::new(),
            routes: Routes::default(),
            operator: Operator::default(),
            backend: vec![Backend::default()],
            backend_timeouts: BackendTimeouts::default(),
            fleet: Fleet::default(),
            failover: Failover::default(),
            health: Health::default(),
            queue: Queue::default(),
            limits: Limits::default(),
            identity: Identity::default(),
            policy: Policy::default(),
            audit: Audit::default(),
            filters: Filters::default(),
            streaming: Streaming::default(),
            shutdown: Shutdown::default(),
            egress: Egress::default(),
            catalogue: Catalogue::default(),
            models: Models::default(),
        }
    }

    fn apply(&mut self, flags: &Flags) -> Result<(), ConfigError> {
        if let Some(v) = &flags.listen {
            self.listen = values::parse_address(v).map_err(|e| Bad::from(e).at("--listen"))?;
        }
        if let Some(v) = &flags.operator_listen {
            self.operator.listen = values::parse_address(v).map_err(|e| Bad::from(e).at("--operator-listen"))?;
        }
        if let Some(v) = &flags.backend {
            replace_backends(self, v).map_err(|e| e.at("--backend"))?;
        }
        if let Some(v) = &flags.state_dir {
            self.state_dir = v.clone();
        }
        if let Some(v) = &flags.policy_dir {
            self.policy.dir = v.clone();
        }
        if let Some(v) = &flags.audit_dir {
            self.audit.dir = v.clone();
        }
        if let Some(v) = &flags.agents_file {
            self.identity.agents_file = v.clone();
        }
        Ok(())
    }

    /// Fills in the paths that nobody set.
    fn place_folders(
        &mut self,
        config_dir: Option<&Path>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(), ConfigError> {
        if self.state_dir.as_os_str().is_empty() {
            self.state_dir = state_dir(env)?;
        }
        if self.audit.dir.as_os_str().is_empty() {
            self.audit.dir = self.state_dir.join("audit");
        }
        if self.identity.agents_file.as_os_str().is_empty() {
            self.identity.agents_file = self.state_dir.join("agents.toml");
        }
        if self.identity.revocations_file.as_os_str().is_empty() {
            self.identity.revocations_file = self.state_dir.join("revoked.toml");
        }
        if self.models.mirror_store.as_os_str().is_empty() {
            self.models.mirror_store = self.state_dir.join("mirror");
        }
        if self.policy.dir.as_os_str().is_empty() {
            let policies = config_dir.map(|dir| dir.join("policies")).filter(|dir| dir.is_dir());
            self.policy.dir = policies.unwrap_or_default();
        }
        let several = self.backend.len() > 1;
        for (i, backend) in self.backend.iter_mut().enumerate() {
            if backend.name.is_empty() {
                backend.name = if several { format!("ollama-{}", i + 1) } else { "ollama".to_owned() };
            }
        }
        Ok(())
    }

    fn check_backends(&self) -> Result<(), ConfigError> {
        let odds = |keys: &str, problem: String, remedy: &str| Err(ConfigError::new(keys, problem, remedy));
        if !(1..=MOST_BACKENDS).contains(&self.backend.len()) {
            return odds(
                "backend",
                format!("{} backends are given, and 1 to {MOST_BACKENDS} can be served", self.backend.len()),
                "give their URLs in BEHAVRY_OLLAMA_URL, --backend or [[backend]]",
            );
        }
        for (i, backend) in self.backend.iter().enumerate() {
            let credentials = [
                ("backend.bearer", backend.bearer.is_some()),
                ("backend.bearer_file", !backend.bearer_file.as_os_str().is_empty()),
                ("backend.url", backend.url.has_userinfo()),
            ];
            let set: Vec<&str> = credentials.iter().filter(|(_, set)| *set).map(|(key, _)| *key).collect();
            if set.len() > 1 {
                return odds(
                    &set.join(", "),
                    format!("several credentials are set for {}, for one Authorization header", backend.name),
                    "keep one of them",
                );
            }
            if !backend.ca_file.as_os_str().is_empty() && !backend.url.is_tls() {
                return odds(
                    "backend.ca_file, backend.url",
                    format!("{} has no certificate that could be verified", backend.url),
                    "write its URL with https, or take the CA away",
                );
            }
            if let Some(same) = self.backend[..i].iter().find(|other| other.name == backend.name) {
                return odds(
                    "backend.name",
                    format!("{} and {} are both called {}", same.url, backend.url, backend.name),
                    "give each a name of its own",
                );
            }
        }
        let manage = &self.fleet.manage;
        if !manage.is_empty() && self.backend.iter().all(|backend| backend.name != *manage) {
            let names: Vec<&str> = self.backend.iter().map(|backend| backend.name.as_str()).collect();
            return odds(
                "fleet.manage",
                format!("no backend is called {manage}"),
                &format!("name one of {}", names.join(", ")),
            );
        }
        Ok(())
    }

    /// What no single value shows.
    fn check(&self) -> Result<(), ConfigError> {
        let odds = |keys: &str, problem: String, remedy: &str| Err(ConfigError::new(keys, problem, remedy));
        self.check_backends()?;
        if self.catalogue.refresh.is_zero() && self.model.iter().any(|model| !model.warm.is_empty()) {
            return odds(
                "model.warm, catalogue.refresh_s",
                "nobody would know where the model is, nor whether it is loaded".into(),
                "set catalogue.refresh_s above 0, or take warm away",
            );
        }
        self.audit.check()?;
        self.models.check()?;
        if self.listen == self.operator.listen && self.listen.port() != 0 {
            return odds(
                "listen, operator.listen",
                format!("both are {}", self.listen),
                "give the operator's pages an address of their own",
            );
        }
        if !self.operator.listen.ip().is_loopback() && self.operator.credential_file.as_os_str().is_empty() {
            return odds(
                "operator.listen, operator.credential_file",
                format!("{} is reachable from other machines, and nothing is asked of them", self.operator.listen),
                "keep it on 127.0.0.1, or name a file of mode 0600 with a credential (openssl rand -hex 32)",
            );
        }
        if self.limits.bodies_in_memory_bytes < self.limits.body_bytes {
            return odds(
                "limits.bodies_in_memory_bytes, limits.body_bytes",
                format!(
                    "all bodies together may hold {} bytes, fewer than the {} of a single one",
                    self.limits.bodies_in_memory_bytes, self.limits.body_bytes
                ),
                "raise the first or lower the second",
            );
        }
        if !self.streaming.shield_load.is_zero() && self.catalogue.refresh.is_zero() {
            return odds(
                "streaming.shield_load_s, catalogue.refresh_s",
                "nobody asks the backends what is loaded, so no load can be told from an answer".to_owned(),
                "set the second above 0, or the first to 0",
            );
        }
        self.identity.check()
    }
}

/// Shows what [`Config::effective`] shows, so that no secret can get out this way either.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.effective())
    }
}

/// What is wrong with a value, before it is known where it stood.
struct Bad {
    problem: String,
    remedy: String,
}

impl Bad {
    fn new(problem: impl Into<String>, remedy: impl Into<String>) -> Bad {
        Bad { problem: problem.into(), remedy: remedy.into() }
    }

    fn at(self, place: &str) -> ConfigError {
        ConfigError { place: place.to_owned(), problem: self.problem, remedy: self.remedy }
    }
}

/// The text has the form `problem; remedy`, as one of a file does.
impl From<String> for Bad {
    fn from(text: String) -> Bad {
        match text.rsplit_once("; ") {
            Some((problem, remedy)) => Bad::new(problem, remedy),
            None => Bad::new(text, "see conf/proxy.toml"),
        }
    }
}

type Set = fn(&mut Config, &str) -> Result<(), Bad>;

/// The variables that set something, each with what it sets. `BEHAVRY_CONFIG` and the folders of systemd and XDG are
/// read where they are needed.
const VARIABLES: &[(&str, Set)] = &[
    ("BEHAVRY_LISTEN", |c, v| {
        c.listen = values::parse_address(v)?;
        Ok(())
    }),
    ("BEHAVRY_OPERATOR_LISTEN", |c, v| {
        c.operator.listen = values::parse_address(v)?;
        Ok(())
    }),
    ("BEHAVRY_STATE_DIR", |c, v| {
        c.state_dir = v.into();
        Ok(())
    }),
    ("BEHAVRY_POLICY_DIR", |c, v| {
        c.policy.dir = v.into();
        Ok(())
    }),
    ("BEHAVRY_AUDIT_DIR", |c, v| {
        c.audit.dir = v.into();
        Ok(())
    }),
    ("BEHAVRY_AGENTS_FILE", |c, v| {
        c.identity.agents_file = v.into();
        Ok(())
    }),
    ("BEHAVRY_OLLAMA_URL", replace_backends),
    // After the URLs, which replace the list.
    ("BEHAVRY_OLLAMA_API_KEY", |c, v| {
        let key = values::parse_bearer(v)?;
        // Of several, those with a credential of their own keep it: the one's key is nobody else's.
        let one = c.backend.len() == 1;
        let without = |b: &&mut Backend| one || (b.authorization().is_none() && b.bearer_file.as_os_str().is_empty());
        c.backend.iter_mut().filter(without).for_each(|b| b.bearer = Some(key.clone()));
        Ok(())
    }),
    ("BEHAVRY_JWT_PUBLIC_KEY", |c, v| {
        c.identity.public_key = Some(values::parse_pem(v, "public_key_file")?);
        Ok(())
    }),
    ("BEHAVRY_JWT_PRIVATE_KEY", |c, v| {
        c.identity.private_key = Some(values::parse_pem(v, "private_key_file")?);
        Ok(())
    }),
    ("BEHAVRY_JWT_ALGORITHM", |c, v| {
        c.identity.algorithm = Some(values::parse_algorithm(v)?);
        Ok(())
    }),
    ("BEHAVRY_JWT_ISSUER", |c, v| {
        c.identity.issuer = values::parse_name(v)?;
        Ok(())
    }),
];

fn replace_backends(config: &mut Config, urls: &str) -> Result<(), Bad> {
    let urls: Vec<BackendUrl> =
        urls.split(',').map(|url| BackendUrl::parse(url.trim())).collect::<Result<_, String>>()?;
    config.backend = urls.into_iter().map(|url| Backend { url, ..Backend::default() }).collect();
    Ok(())
}

/// A variable's value. One that is set but empty is a mistake (a missing secret, a typo in a unit file), so it stops
/// the start instead of being taken for unset.
fn set_variable(env: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<Option<String>, ConfigError> {
    match env(name) {
        Some(value) if value.trim().is_empty() => {
            Err(ConfigError::new(name, "is set but empty", "give it a value or unset it"))
        }
        other => Ok(other),
    }
}

/// `$CONFIGURATION_DIRECTORY` (systemd), else `/etc/behavry-ollama-proxy` if it exists.
fn config_dir(env: &dyn Fn(&str) -> Option<String>) -> Result<Option<PathBuf>, ConfigError> {
    if let Some(dirs) = set_variable(env, "CONFIGURATION_DIRECTORY")? {
        return Ok(Some(first_of(&dirs)));
    }
    Ok(Some(Path::new("/etc").join(NAME)).filter(|dir| dir.is_dir()))
}

/// The file named by `--config` or `BEHAVRY_CONFIG`, which must exist; else `proxy.toml` of the configuration folder,
/// if it does.
fn config_file(
    flags: &Flags,
    env: &dyn Fn(&str) -> Option<String>,
    config_dir: Option<&Path>,
) -> Result<Option<PathBuf>, ConfigError> {
    let variable = set_variable(env, "BEHAVRY_CONFIG")?;
    let named = flags.config.clone().or_else(|| variable.map(PathBuf::from));
    Ok(named.or_else(|| config_dir.map(|dir| dir.join("proxy.toml")).filter(|file| file.exists())))
}

/// `$STATE_DIRECTORY` (systemd), else below `$XDG_STATE_HOME`, else below `$HOME`. An empty or relative
/// `XDG_STATE_HOME` counts as unset, as the XDG base directory specification has it.
fn state_dir(env: &dyn Fn(&str) -> Option<String>) -> Result<PathBuf, ConfigError> {
    if let Some(dirs) = set_variable(env, "STATE_DIRECTORY")? {
        return Ok(first_of(&dirs));
    }
    let absolute = |name| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    base.map(|base| base.join(NAME)).ok_or_else(|| {
        ConfigError::new(
            "state_dir",
            "no folder is known for keys and audit (no STATE_DIRECTORY, XDG_STATE_HOME or HOME)",
            "set BEHAVRY_STATE_DIR or state_dir",
        )
    })
}

/// systemd separates several folders with colons; ours is the first.
fn first_of(dirs: &str) -> PathBuf {
    PathBuf::from(dirs.split(':').next().unwrap_or(dirs))
}

#[cfg(test)]
mod tests;
