//! The tables of the file. Every field says what it is, its unit, its default and why that; the bounds stand beside it.
//!
//! A field whose name ends in `_ms` or `_s` in the file is a `Duration` here. An empty text in the file means *not
//! set*.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::service_url::ServiceUrl;
use super::values::{self, Algorithm, BackendUrl, Pem, Secret};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// `[routes]`: which spellings are served.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Routes {
    /// Serve Ollama's paths at `/` as well as below `/api/v1/ollama`. Default true: clients then change host and port
    /// only.
    pub drop_in: bool,
}

impl Default for Routes {
    fn default() -> Routes {
        Routes { drop_in: true }
    }
}

/// `[operator]`: the operator's own listener (metrics, health, live activity).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Operator {
    /// Default `127.0.0.1:5173`. Without a credential it answers to everybody, so loopback. Variable `BEHAVRY_OPERATOR_LISTEN`.
    #[serde(deserialize_with = "values::address")]
    pub listen: SocketAddr,
    /// File with the credential that every route but `/livez` asks for, as a Bearer token or a Basic password: 32 visible characters
    /// at least, mode 0600. Default none; off loopback it has to be there.
    pub credential_file: PathBuf,
    /// Names that the listener answers to besides addresses and `localhost`, without a port. Default none: a foreign name in `Host` is
    /// how a page of somebody else's reaches a loopback listener (DNS rebinding).
    #[serde(deserialize_with = "values::hosts")]
    pub hosts: Vec<String>,
}

impl Default for Operator {
    fn default() -> Operator {
        Operator {
            listen: SocketAddr::from(([127, 0, 0, 1], 5173)),
            credential_file: PathBuf::new(),
            hosts: Vec::new(),
        }
    }
}

/// `[[backend]]`: one Ollama.
#[derive(Clone, Serialize, Deserialize)]
pub struct Backend {
    /// `http://` or `https://`, host and port, and nothing behind them; a user and password become Basic credentials.
    /// Without a port it is the scheme's own (80, 443), as RFC 3986 has it, not 11434.
    #[serde(deserialize_with = "BackendUrl::deserialize", serialize_with = "BackendUrl::serialize_redacted")]
    pub url: BackendUrl,
    /// Its name in headers, records and metrics: letters, digits and `._-`, and no other backend's. Empty: `ollama`, or
    /// `ollama-1`, `ollama-2` and so on where there are several. Never empty once loaded.
    #[serde(default, deserialize_with = "values::label")]
    pub name: String,
    /// How fast it is, until it has shown that: one of weight 2 is taken to need half the time. Default 1.
    /// Unitless, 1 to 1000.
    #[serde(default = "one", deserialize_with = "values::whole::<_, _, 1, 1000>")]
    pub weight: u32,
    /// Backends of a higher tier are used where they answer sooner by `queue.tier_s` for each tier. Default 0.
    /// Unitless, 0 to 100.
    #[serde(default, deserialize_with = "values::whole::<_, _, 0, 100>")]
    pub tier: u32,
    /// Requests for one model that it computes at once: what its `OLLAMA_NUM_PARALLEL` is, which no endpoint of Ollama's tells.
    /// Default 1, as Ollama's. What exceeds it waits in the proxy. 1 to 100000.
    #[serde(default = "one", deserialize_with = "values::whole::<_, _, 1, 100_000>")]
    pub slots: u32,
    /// Sent as `Authorization: Bearer` with every request. Default none. Variable `BEHAVRY_OLLAMA_API_KEY`.
    #[serde(default, deserialize_with = "values::bearer", serialize_with = "values::redacted")]
    pub bearer: Option<Secret>,
    /// File with that bearer instead, of mode 0600, read at the start. Default none.
    #[serde(default)]
    pub bearer_file: PathBuf,
    /// PEM file with the CAs that its certificate is verified with, instead of the machine's own. Default none.
    #[serde(default)]
    pub ca_file: PathBuf,
    /// Models that it may serve, by name, in any of Ollama's spellings; a `*` at the end stands for any ending. Default none: all.
    #[serde(default, deserialize_with = "values::model_patterns")]
    pub models: Vec<String>,
    /// `slots` of single models, such as embedding models, which Ollama never runs in parallel. Default none.
    #[serde(default, deserialize_with = "values::model_slots")]
    pub model_slots: BTreeMap<String, u32>,
}

fn one() -> u32 {
    1
}

impl Default for Backend {
    fn default() -> Backend {
        let url = BackendUrl::parse("http://localhost:11434").unwrap_or_else(|e| unreachable!("a literal URL: {e}"));
        Backend {
            url,
            name: String::new(),
            weight: 1,
            tier: 0,
            slots: 1,
            bearer: None,
            bearer_file: PathBuf::new(),
            ca_file: PathBuf::new(),
            models: Vec::new(),
            model_slots: BTreeMap::new(),
        }
    }
}

impl Backend {
    /// The whole `Authorization` value for this backend, if it has one, but for a bearer that stands in a file.
    pub fn authorization(&self) -> Option<Secret> {
        match (&self.bearer, self.url.userinfo()) {
            (Some(bearer), _) => Some(Secret::new(format!("Bearer {}", bearer.expose()))),
            (None, Some(user)) => {
                let encoded = base64::engine::general_purpose::STANDARD.encode(user.expose());
                Some(Secret::new(format!("Basic {encoded}")))
            }
            (None, None) => None,
        }
    }
}

/// `[backend_timeouts]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct BackendTimeouts {
    /// Time to connect. Default 5000 ms: a machine that is up answers in far less, and S0's 502 should come soon.
    #[serde(
        rename = "connect_ms",
        deserialize_with = "values::millis::<_, 1, 600_000>",
        serialize_with = "values::as_millis"
    )]
    pub connect: Duration,
    /// Longest silence of a backend, to the first byte and between bytes. Default 300 s (S0): status and headers come
    /// only with the first token, after queue, load and prefill.
    #[serde(
        rename = "silence_s",
        deserialize_with = "values::seconds::<_, 1, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub silence: Duration,
}

impl Default for BackendTimeouts {
    fn default() -> BackendTimeouts {
        BackendTimeouts { connect: Duration::from_millis(5000), silence: Duration::from_secs(300) }
    }
}

/// `[limits]`: what one client, and all of them together, may take.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Largest JSON body, in bytes. Default 64 MiB: images in base64 fit.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 0x1_0000_0000>")]
    pub body_bytes: usize,
    /// All JSON bodies held at once, in bytes; past it a new request is refused (503 `queue_full`). Default 512 MiB.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 0x100_0000_0000>")]
    pub bodies_in_memory_bytes: usize,
    /// Largest blob upload, in bytes; blobs pass through and are not held. Default 128 GiB: larger than the models
    /// people serve.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 0x1000_0000_0000>")]
    pub blob_bytes: u64,
    /// Request line and headers together, in bytes. Default 32 KiB: a token with 8 roles is 2.
    #[serde(deserialize_with = "values::whole::<_, _, 1024, 1_048_576>")]
    pub head_bytes: usize,
    /// Time for the whole head, from its first byte. Default 10000 ms: a head is one packet, and a slow one holds a
    /// place.
    #[serde(
        rename = "head_timeout_ms",
        deserialize_with = "values::millis::<_, 1, 600_000>",
        serialize_with = "values::as_millis"
    )]
    pub head_timeout: Duration,
    /// Longest silence while a request body arrives. Default 30000 ms.
    #[serde(
        rename = "body_idle_ms",
        deserialize_with = "values::millis::<_, 1, 600_000>",
        serialize_with = "values::as_millis"
    )]
    pub body_idle: Duration,
    /// Requests being served at once; past it 503 `queue_full`. Default 10000.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 1_000_000>")]
    pub in_flight: usize,
    /// Client connections open at once, idle ones included; past it a new one is closed at once. Default 20000, twice
    /// `in_flight`: descriptors and memory are bounded even where nobody sends anything.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 1_000_000>")]
    pub connections: usize,
    /// How long an idle client connection is kept. Default 60 s; 0 closes after each reply.
    #[serde(
        rename = "keepalive_s",
        deserialize_with = "values::seconds::<_, 0, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub keepalive: Duration,
    /// Reply bytes held for a client that reads slowly, so that the backend is done with it at its own speed; past it the backend waits.
    /// Default 8 MiB, more than a long answer.
    #[serde(deserialize_with = "values::whole::<_, _, 65_536, 0x4000_0000>")]
    pub reply_buffer_bytes: usize,
    /// The same for all clients together, beyond 64 KiB each, with the replies that are held to be judged. Default 512 MiB, 64 such
    /// buffers: as much as request bodies may take.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 0x100_0000_0000>")]
    pub replies_in_memory_bytes: usize,
    /// A client with unsent bytes that takes fewer than `slow_reader_floor_bytes` in this time is cut (`slow_client`). Default 30000
    /// ms.
    #[serde(
        rename = "slow_reader_stall_ms",
        deserialize_with = "values::millis::<_, 1, 3_600_000>",
        serialize_with = "values::as_millis"
    )]
    pub slow_reader_stall: Duration,
    /// Default 1024 bytes: slower than any reader that is alive.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 0x4000_0000>")]
    pub slow_reader_floor_bytes: usize,
    /// The same while its buffer is full: the backend then waits for it, and a model's slot with it. Default 1 MiB, 35 kB a second:
    /// faster than models write, so that whoever is slower would hold the slot longer and longer.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 0x4000_0000>")]
    pub slow_reader_blocking_floor_bytes: usize,
    /// After a refusal, how long what the client still sends is read and dropped, so that it can read the reply
    /// (a reset would swallow it). Default 2000 ms.
    #[serde(
        rename = "linger_ms",
        deserialize_with = "values::millis::<_, 0, 60_000>",
        serialize_with = "values::as_millis"
    )]
    pub linger: Duration,
    /// Largest list (`/api/tags`, `/api/ps`, `/v1/models`) of a backend, in bytes, which is held to be filtered.
    /// Default 16 MiB.
    #[serde(deserialize_with = "values::whole::<_, _, 1024, 0x4000_0000>")]
    pub list_bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_bytes: 64 * MIB,
            bodies_in_memory_bytes: 512 * MIB,
            blob_bytes: 128 << 30,
            head_bytes: 32 * KIB,
            head_timeout: Duration::from_millis(10_000),
            body_idle: Duration::from_millis(30_000),
            in_flight: 10_000,
            connections: 20_000,
            keepalive: Duration::from_secs(60),
            reply_buffer_bytes: 8 * MIB,
            replies_in_memory_bytes: 512 * MIB,
            slow_reader_stall: Duration::from_millis(30_000),
            slow_reader_floor_bytes: KIB,
            slow_reader_blocking_floor_bytes: MIB,
            linger: Duration::from_millis(2_000),
            list_bytes: 16 * MIB,
        }
    }
}

/// `[identity]`: whose tokens are believed, and with which key the built-in issuer signs.
///
/// At most one source of keys: a public key, a shared secret, a JWKS file or a JWKS URL. Without any, the key pair that the proxy
/// made in its state folder.
#[derive(Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// `iss` that a token must have. Default `behavry`. Variable `BEHAVRY_JWT_ISSUER`.
    #[serde(deserialize_with = "values::name")]
    pub issuer: String,
    /// `aud` that a token must have; empty (default): none is asked for, as Behavry's tokens have none.
    #[serde(deserialize_with = "values::optional_name", serialize_with = "values::or_empty")]
    pub audience: Option<String>,
    /// RS256, ES256, EdDSA or HS256; the key must fit. Empty (default): what the key is, and RS256 for a key made here.
    /// Variable `BEHAVRY_JWT_ALGORITHM`.
    #[serde(deserialize_with = "values::algorithm", serialize_with = "values::or_empty")]
    pub algorithm: Option<Algorithm>,
    /// PEM file that verifies tokens. Variable `BEHAVRY_JWT_PUBLIC_KEY` (the PEM text itself).
    #[serde(rename = "public_key_file", deserialize_with = "values::pem_file", serialize_with = "values::as_pem_file")]
    pub public_key: Option<Pem>,
    /// PEM file that signs tokens. Variable `BEHAVRY_JWT_PRIVATE_KEY` (the PEM text itself).
    #[serde(
        rename = "private_key_file",
        deserialize_with = "values::pem_file",
        serialize_with = "values::as_pem_file"
    )]
    pub private_key: Option<Pem>,
    /// File with the shared secret of HS256, 32 bytes at least. Empty: none.
    pub secret_file: PathBuf,
    /// File with a JSON Web Key Set that verifies tokens. Empty: none.
    pub jwks_file: PathBuf,
    /// URL of a JSON Web Key Set that verifies tokens, `https` or `http` to this machine. Empty: none. Its last good keys stay while
    /// it is down, and a copy in the state folder survives a restart for a day.
    #[serde(deserialize_with = "ServiceUrl::deserialize", serialize_with = "ServiceUrl::serialize_redacted")]
    pub jwks_url: Option<ServiceUrl>,
    /// How often `jwks_url` is asked. Default 300 s: a key that was withdrawn stops verifying within five minutes, and nobody minds
    /// twelve requests an hour.
    #[serde(
        rename = "jwks_refresh_s",
        deserialize_with = "values::seconds::<_, 1, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub jwks_refresh: Duration,
    /// Least time between two fetches that are caused by tokens with a `kid` nobody knows, and before a fetch that failed is tried
    /// again. Default 10 s: anybody can make up a `kid`, and an agent with a new key waits no longer.
    #[serde(
        rename = "jwks_floor_s",
        deserialize_with = "values::seconds::<_, 1, 3_600>",
        serialize_with = "values::as_seconds"
    )]
    pub jwks_floor: Duration,
    /// PEM file with the certificates of CAs that `jwks_url` and `token_url` may be signed by, beside the machine's own. Empty: none.
    pub ca_file: PathBuf,
    /// URL of a control plane's token endpoint, `https` or `http` to this machine. Requests for tokens are then forwarded to it, and
    /// the built-in issuer and its agents are not used. Empty: none.
    #[serde(deserialize_with = "ServiceUrl::deserialize", serialize_with = "ServiceUrl::serialize_redacted")]
    pub token_url: Option<ServiceUrl>,
    /// The agents of the built-in issuer. Empty: `agents.toml` in the state folder. Variable `BEHAVRY_AGENTS_FILE`.
    pub agents_file: PathBuf,
    /// Take the static API keys of the agents file beside tokens. Default false: a key is good until somebody takes it away, a
    /// token for an hour.
    pub api_keys: bool,
    /// Sessions and agents whose tokens end before they expire. Empty: `revoked.toml` in the state folder.
    pub revocations_file: PathBuf,
    /// How far two clocks may differ. Default 30 s: agents run on laptops and in containers whose clocks nobody watches.
    #[serde(
        rename = "leeway_s",
        deserialize_with = "values::seconds::<_, 0, 600>",
        serialize_with = "values::as_seconds"
    )]
    pub leeway: Duration,
    /// Life of a token signed here. Default 3600 s, Behavry's one hour.
    #[serde(
        rename = "token_ttl_s",
        deserialize_with = "values::seconds::<_, 1, 31_536_000>",
        serialize_with = "values::as_seconds"
    )]
    pub token_ttl: Duration,
    /// Token requests a minute from one client address (an IPv6 /64), right or wrong; as many may come at once. Past it 429. Default
    /// 300: a hundred agents behind one NAT or reverse proxy, three times over. Unitless, 1 to 1000000.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 1_000_000>")]
    pub token_requests_per_minute: u32,
    /// Wrong secrets a minute for one client id from one address, and six times as many from all; as many may come at once. Past it
    /// 429, for an id that does not exist too. Default 10: more than a person mistypes. Unitless, 1 to 1000000.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 1_000_000>")]
    pub wrong_secrets_per_minute: u32,
}

impl Default for Identity {
    fn default() -> Identity {
        Identity {
            issuer: "behavry".to_owned(),
            audience: None,
            algorithm: None,
            public_key: None,
            private_key: None,
            secret_file: PathBuf::new(),
            jwks_file: PathBuf::new(),
            jwks_url: None,
            jwks_refresh: Duration::from_secs(300),
            jwks_floor: Duration::from_secs(10),
            ca_file: PathBuf::new(),
            token_url: None,
            agents_file: PathBuf::new(),
            api_keys: false,
            revocations_file: PathBuf::new(),
            leeway: Duration::from_secs(30),
            token_ttl: Duration::from_secs(3600),
            token_requests_per_minute: 300,
            wrong_secrets_per_minute: 10,
        }
    }
}

impl Identity {
    /// Somebody else makes the tokens: nobody needs an agent here.
    pub fn is_foreign(&self) -> bool {
        self.public_key.is_some()
            || !self.jwks_file.as_os_str().is_empty()
            || self.jwks_url.is_some()
            || self.token_url.is_some()
    }

    /// Keys that contradict each other. Whether a key fits its algorithm is seen when it is loaded.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let sources = [
            ("identity.public_key_file", self.public_key.is_some()),
            ("identity.secret_file", !self.secret_file.as_os_str().is_empty()),
            ("identity.jwks_file", !self.jwks_file.as_os_str().is_empty()),
            ("identity.jwks_url", self.jwks_url.is_some()),
        ];
        let set: Vec<&str> = sources.iter().filter(|(_, set)| *set).map(|(key, _)| *key).collect();
        let secret = !self.secret_file.as_os_str().is_empty();
        let odds = |keys: &str, problem: &str, remedy: &str| Err(ConfigError::new(keys, problem, remedy));
        if set.len() > 1 {
            return odds(
                &set.join(", "),
                "several sources of keys are set",
                "keep the one that signs your agents' tokens",
            );
        }
        if set.is_empty() && self.token_url.is_some() {
            return odds(
                "identity.token_url",
                "no key verifies the control plane's tokens",
                "set identity.jwks_url, or another source of its keys",
            );
        }
        if secret && self.private_key.is_some() {
            return odds(
                "identity.secret_file, identity.private_key_file",
                "a shared secret signs by itself",
                "take one of them away",
            );
        }
        match self.algorithm {
            Some(Algorithm::Hs256) if !secret => {
                odds("identity.algorithm", "HS256 needs a shared secret", "set identity.secret_file")
            }
            Some(other) if secret && other != Algorithm::Hs256 => odds(
                "identity.algorithm, identity.secret_file",
                "a shared secret is for HS256 alone",
                "set the algorithm to HS256 or take the secret away",
            ),
            _ => Ok(()),
        }
    }
}

/// What a builtin of Rego that fails on its argument does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BuiltinErrors {
    /// It is an evaluation error, and the request is refused.
    Strict,
    /// The rule does not fire: OPA's own default.
    Undefined,
}

/// `[policy]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Folder with the `.rego` files. Empty: `policies` in the configuration folder if it exists, else (still empty
    /// once loaded) the policy built into the program. Variable `BEHAVRY_POLICY_DIR`.
    pub dir: PathBuf,
    /// `strict` (default: what fails refuses) or `undefined` (verdicts as OPA's).
    pub builtin_errors: BuiltinErrors,
    /// Longest evaluation of one request, in time of the CPU: a busy machine refuses nothing. Past it the request is refused. Default
    /// 500 ms: ten thousand times what one takes.
    #[serde(
        rename = "timeout_ms",
        deserialize_with = "values::millis::<_, 1, 60_000>",
        serialize_with = "values::as_millis"
    )]
    pub timeout: Duration,
    /// How often the folder is looked at for changes. Default 2 s; 0 never.
    #[serde(
        rename = "reload_s",
        deserialize_with = "values::seconds::<_, 0, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub reload: Duration,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            dir: PathBuf::new(),
            builtin_errors: BuiltinErrors::Strict,
            timeout: Duration::from_millis(500),
            reload: Duration::from_secs(2),
        }
    }
}

/// `[streaming]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Streaming {
    /// Ask Ollama for the counts of `/v1` streams, and hide the extra chunk from a client that did not. Default true:
    /// without it such a stream's tokens are unknown.
    pub include_usage: bool,
    /// How long a request that was just sent is left alone before it is cancelled. Default 50 ms: Ollama leaks a
    /// handler when a request is closed before its scheduler saw it (ollama-wire, section 0).
    #[serde(
        rename = "cancel_grace_ms",
        deserialize_with = "values::millis::<_, 0, 1_000>",
        serialize_with = "values::as_millis"
    )]
    pub cancel_grace: Duration,
    /// How long a backend may go on to load the model of a client that has left, before it is cancelled; the reply's first byte ends it
    /// sooner. Default 0, it is cancelled as any other: whoever leaves mostly means it, and the slot stays taken meanwhile. Of use
    /// where clients give up before a load is done, so that it never is (ollama-wire, section 0.5).
    #[serde(
        rename = "shield_load_s",
        deserialize_with = "values::seconds::<_, 0, 3_600>",
        serialize_with = "values::as_seconds"
    )]
    pub shield_load: Duration,
}

impl Default for Streaming {
    fn default() -> Streaming {
        Streaming { include_usage: true, cancel_grace: Duration::from_millis(50), shield_load: Duration::ZERO }
    }
}

/// `[shutdown]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Shutdown {
    /// How long running requests may finish after SIGTERM; then they are cut with an error frame. Default 30 s, well
    /// inside systemd's 90.
    #[serde(
        rename = "drain_s",
        deserialize_with = "values::seconds::<_, 0, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub drain: Duration,
}

impl Default for Shutdown {
    fn default() -> Shutdown {
        Shutdown { drain: Duration::from_secs(30) }
    }
}

/// `[fleet]`: how several backends are used as one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Fleet {
    /// Name of the backend that management (`/api/create`, `/api/delete`, blobs, ..) goes to where the request names none in
    /// `x-behavry-backend`. Empty (default): such a request is refused, unless there is one backend only. What is created or deleted
    /// on a machine that nobody named is a surprise.
    #[serde(deserialize_with = "values::label")]
    pub manage: String,
}

/// `[failover]`: when a request that came to nothing on one backend is tried on another. Never after a byte of a reply.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Failover {
    /// Backends that one request is tried on, the first included. Default 3; 1 turns it off. 1 to 16.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 16>")]
    pub backends: usize,
    /// From a request's first attempt; later none begins. Default 30 s: three backends that cannot be connected to, and more than that.
    #[serde(
        rename = "within_s",
        deserialize_with = "values::seconds::<_, 1, 3_600>",
        serialize_with = "values::as_seconds"
    )]
    pub within: Duration,
}

impl Default for Failover {
    fn default() -> Failover {
        Failover { backends: 3, within: Duration::from_secs(30) }
    }
}

/// `[health]`: when a backend is passed over.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Health {
    /// How often each backend is asked for its version, which tells that it is up. Default 5 s; 0 never.
    #[serde(
        rename = "probe_s",
        deserialize_with = "values::seconds::<_, 0, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub probe: Duration,
    /// Failures in a row after which a backend gets no more requests for a model while another can have them; one failed connection is
    /// enough for all of its models. Default 3. 1 to 1000.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 1000>")]
    pub failures: u32,
    /// Then it rests so long, before one request is tried; a trial that fails doubles the rest, up to a minute. Default 5 s: what a
    /// restart takes. 1 to 60 s.
    #[serde(
        rename = "rest_s",
        deserialize_with = "values::seconds::<_, 1, 60>",
        serialize_with = "values::as_seconds"
    )]
    pub rest: Duration,
}

impl Default for Health {
    fn default() -> Health {
        Health { probe: Duration::from_secs(5), failures: 3, rest: Duration::from_secs(5) }
    }
}

/// A class of requests: who goes first while they wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    Batch,
    Default,
    Interactive,
}

/// `[queue]`: how requests wait for a backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Queue {
    /// Most requests that wait for one model; past it 503 `queue_full`. Default 512, as Ollama's `OLLAMA_MAX_QUEUE`.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 1_000_000>")]
    pub model_waiting: usize,
    /// Most that wait for all models. Default 4096.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 1_000_000>")]
    pub all_waiting: usize,
    /// Most of one agent's that wait; past it 429 `queue_full`. Default 128, a quarter of one model's.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 1_000_000>")]
    pub agent_waiting: usize,
    /// Longest that one waits; then 503 `queue_full`. Default 300 s, as long as a backend may be silent.
    #[serde(
        rename = "wait_s",
        deserialize_with = "values::seconds::<_, 1, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub wait: Duration,
    /// How long a slot is counted as busy after its client has left. Default 200 ms: Ollama notices within a token or two.
    #[serde(
        rename = "linger_ms",
        deserialize_with = "values::millis::<_, 0, 60_000>",
        serialize_with = "values::as_millis"
    )]
    pub linger: Duration,
    /// What one tier of backends more is worth: a dearer one is used where it answers sooner by that much. Default 10 s.
    #[serde(
        rename = "tier_s",
        deserialize_with = "values::seconds::<_, 0, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub tier: Duration,
    /// The highest class that a caller may ask for in `x-behavry-priority`, if no role of its says otherwise. Default `interactive`.
    pub highest: Priority,
    /// The highest class of single roles; the strictest of a caller's roles decides. Default none.
    pub roles: BTreeMap<String, Priority>,
}

impl Default for Queue {
    fn default() -> Queue {
        Queue {
            model_waiting: 512,
            all_waiting: 4096,
            agent_waiting: 128,
            wait: Duration::from_secs(300),
            linger: Duration::from_millis(200),
            tier: Duration::from_secs(10),
            highest: Priority::Interactive,
            roles: BTreeMap::new(),
        }
    }
}

/// `[catalogue]`: what the proxy knows of the backends' models.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Catalogue {
    /// How often each backend's list of models is read. Default 30 s; 0 never, and nothing else of a backend either (models then
    /// have no names in metrics, stubs of cloud models are known by name only, and any backend is taken to have any model).
    #[serde(
        rename = "refresh_s",
        deserialize_with = "values::seconds::<_, 0, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub refresh: Duration,
    /// How often each backend is asked which models are loaded. Default 5 s: a model is unloaded after minutes.
    #[serde(
        rename = "loaded_s",
        deserialize_with = "values::seconds::<_, 1, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub loaded: Duration,
    /// How long a list that is shown to a client waits for further backends, once one has answered. Default 2000 ms: a list takes some
    /// milliseconds, and a backend that is stalled is not to be waited for by everybody.
    #[serde(
        rename = "straggler_ms",
        deserialize_with = "values::millis::<_, 1, 600_000>",
        serialize_with = "values::as_millis"
    )]
    pub straggler: Duration,
}

impl Default for Catalogue {
    fn default() -> Catalogue {
        Catalogue {
            refresh: Duration::from_secs(30),
            loaded: Duration::from_secs(5),
            straggler: Duration::from_millis(2000),
        }
    }
}
