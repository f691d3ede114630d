//! Assembly: a configuration becomes listeners, background tasks and a running proxy. The only place where everything meets.
//!
//! - [`assemble`]: keys, policy, agents and the rest of a [`Snapshot`], from the configuration.
//! - [`listen`]: sockets of our own, so that a port that is taken is a message and not a panic.
//! - [`reload`]: what is loaded anew while the proxy runs.
//! - [`commands`]: what the control socket's commands do.
//! - [`lifecycle`]: signals and drain.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use pingora::server::configuration::ServerConf;
use tokio::sync::{Semaphore, watch};

use self::commands::Commands;
use self::reload::{Reloader, Seen};
use crate::config::{self, Config, WebTools};
use crate::control;
use crate::door::{Door, DoorSettings, Readers, Shield};
use crate::identity::CAUSES;
use crate::identity::guesses::{GuessSettings, Guesses};
use crate::identity::places::{PlaceSettings, Places};
use crate::intake::Intake;
use crate::ledger::audit::{AuditSettings, Durability};
use crate::ledger::fold::FoldSettings;
use crate::ledger::{Ledger, Metrics, Reloaded};
use crate::memory::Memory;
use crate::mirror;
use crate::models::Models;
use crate::operator::{Operator, lookout};
use crate::proxy::Gateway;
use crate::route::RouteSettings;
use crate::sinks::Sinks;
use crate::site::Site;
use crate::upstream::catalogue::{self, Pace};
use crate::upstream::client::Client;
use crate::upstream::failover;
use crate::upstream::health::Failed;
use crate::upstream::warm;

pub mod assemble;
pub mod commands;
pub mod explain;
mod lifecycle;
mod listen;
mod reload;

/// A scraper, a few people.
const OPERATOR_CONNECTIONS: usize = 256;

/// Why the proxy did not start, or stopped.
#[derive(Debug)]
pub enum ServerError {
    /// A setting, a key, a policy: exit code 78.
    Configuration(String),
    /// The machine: exit code 1.
    Runtime(String),
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerError::Configuration(what) | ServerError::Runtime(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for ServerError {}

/// Where a started proxy listens, and what was made on its first start.
pub struct Started {
    pub public: SocketAddr,
    pub operator: SocketAddr,
    /// Ends the proxy as SIGTERM does.
    pub stop: watch::Sender<bool>,
}

/// The runtime that everything runs on.
pub fn runtime(config: &Config) -> Result<tokio::runtime::Runtime, ServerError> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if config.threads > 0 {
        builder.worker_threads(config.threads);
    }
    builder
        .thread_name("proxy")
        .enable_all()
        .build()
        .map_err(|e| ServerError::Runtime(format!("cannot start threads: {e}")))
}

/// Serves until SIGTERM, SIGINT or `Started::stop`. `ready` is called once both listeners are open.
pub async fn serve(config: Config, ready: impl FnOnce(Started)) -> Result<(), ServerError> {
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION"), CAUSES));
    assemble::keys::make_own_key(&config).map_err(ServerError::Configuration)?;
    let files_seen = Seen::now(&config);
    let snapshot = assemble::snapshot(&config).map_err(ServerError::Configuration)?;
    let models = assemble::models(&config).map_err(ServerError::Configuration)?;
    let gate = assemble::operator_gate(&config).map_err(ServerError::Configuration)?;
    let receivers = assemble::sinks(&config).map_err(ServerError::Configuration)?;
    assemble::keys::note_ttl(&config, &snapshot).map_err(ServerError::Configuration)?;
    // Before the audit: a start that fails here is no process that died.
    let public = listen::bind(config.listen)?;
    let operator = listen::bind(config.operator.listen)?;
    let mirror_socket = config.models.mirror_listen.map(listen::bind).transpose()?;
    let mirror_address = mirror_socket.as_ref().map(tokio::net::TcpListener::local_addr).transpose();
    let mirror_address = mirror_address.map_err(|e| ServerError::Runtime(e.to_string()))?;
    let mirror = assemble::mirror(&config, mirror_address, &metrics).map_err(ServerError::Configuration)?;
    let sink_settings = assemble::sink_settings(&config);
    let ledger = Ledger::start(audit_settings(&config), Arc::clone(&metrics))
        .map_err(|e| ServerError::Runtime(e.to_string()))?;
    let site = site(&config, snapshot, models, ledger).map_err(ServerError::Configuration)?;
    let site = Arc::new(Site { mirror, ..site });
    if let Some(remote_keys) = &site.remote_keys {
        // Before anybody is told that the proxy listens: a token of an agent's first request should find its key.
        remote_keys.refresh().await;
        tokio::spawn(Arc::clone(remote_keys).keep_fresh());
    }

    let sinks = Sinks::start(receivers, &sink_settings, &metrics);

    let (stop, stopping) = watch::channel(false);
    let reloader = Arc::new(Reloader::new(Arc::clone(&site), config.clone(), files_seen));
    let commands = Arc::new(Commands::new(Arc::clone(&site), Arc::clone(&reloader), &config, stop.clone()));
    let control = control::open(&config.state_dir);
    let (close_control, control_closing) = watch::channel(false);
    let commanded =
        tokio::spawn(commands::answer_commands(control, config.state_dir.clone(), commands, control_closing));
    let asked_to_stop = lifecycle::asked_to_stop(stopping)?;
    let address = public.local_addr().map_err(|e| ServerError::Runtime(e.to_string()))?;
    ready(Started {
        public: address,
        operator: operator.local_addr().map_err(|e| ServerError::Runtime(e.to_string()))?,
        stop: stop.clone(),
    });

    let gateway = Gateway { site: Arc::clone(&site) };
    let proxy = pingora_proxy::http_proxy(&Arc::new(pingora_conf()), gateway);
    let door = Door::new(proxy, door_settings(&config, &site), Arc::clone(&site));
    // Each side has its own signal: the operator's pages outlive the drain that they show.
    let (close_public, public_closing) = watch::channel(false);
    let (close_operator, operator_closing) = watch::channel(false);
    let counted = Arc::clone(&site);
    let turned_away = move || counted.ledger.metrics.unparsed("too_many_connections");
    tokio::spawn(listen::accept(public, Arc::new(door), public_closing, config.limits.connections, turned_away));
    let operators = Arc::new(Operator::new(Arc::clone(&site), gate, address));
    tokio::spawn(Arc::clone(&site.pool.dispatch).keep_time());
    tokio::spawn(lookout::keep_looking(Arc::clone(&site)));
    tokio::spawn(listen::accept(operator, operators, operator_closing.clone(), OPERATOR_CONNECTIONS, || {}));
    if let Some((mirror, socket)) = site.mirror.clone().zip(mirror_socket) {
        // As long as there may be a pull that reads it: what drains is still pulling.
        log::info!("what is pulled for several backends they take from http://{}", mirror.authority());
        let serve = move |socket, peer| {
            let mirror = Arc::clone(&mirror);
            async move { mirror.serve(socket, peer).await }
        };
        tokio::spawn(listen::accept_each(socket, operator_closing, mirror::CONNECTIONS, || {}, serve));
    }
    if !config.catalogue.refresh.is_zero() {
        let pace = Pace { models: config.catalogue.refresh, loaded: config.catalogue.loaded };
        for place in 0..site.pool.backends().len() {
            let site = Arc::clone(&site);
            tokio::spawn(async move {
                tokio::join!(
                    catalogue::keep_fresh(
                        &site.pool,
                        place,
                        &site.client,
                        &site.ledger.metrics,
                        site.mirror.as_deref(),
                        pace
                    ),
                    warm::keep_warm(&site.pool, place, &site.client, &site.models, &site.ledger.metrics, pace.loaded),
                );
            });
        }
    }
    for backend in site.pool.backends() {
        site.ledger.metrics.backend_known(&backend.name, Failed::ALL.map(Failed::as_str));
    }
    if !config.health.probe.is_zero() {
        for backend in site.pool.backends() {
            let (site, backend, every) = (Arc::clone(&site), Arc::clone(backend), config.health.probe);
            tokio::spawn(async move {
                catalogue::keep_probing(&backend, &site.client, &site.ledger.metrics, every).await;
            });
        }
    }
    if !config.policy.reload.is_zero() {
        tokio::spawn(Arc::clone(&reloader).watch(Reloaded::Policy, config.policy.reload));
    }
    tokio::spawn(Arc::clone(&reloader).watch(Reloaded::Revocations, reload::REVOCATIONS_LOOK));
    tokio::spawn(Arc::clone(&reloader).watch(Reloaded::Keys, reload::KEYS_LOOK));
    tokio::spawn(reloader.watch(Reloaded::Agents, reload::AGENTS_LOOK));

    asked_to_stop.await;
    lifecycle::drain(&site, config.shutdown.drain, close_public).await;
    sinks.finish(lifecycle::LAST_BATCHES).await;
    let _ = close_operator.send(true);
    let _ = close_control.send(true);
    let _ = commanded.await; // its socket is gone from the folder, and `drain` has its answer
    Ok(())
}

/// What all requests share, from its parts.
pub fn site(
    config: &Config,
    snapshot: crate::snapshot::Snapshot,
    models: Models,
    ledger: Ledger,
) -> Result<Site, String> {
    let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
    Ok(Site {
        remote_keys: assemble::keys::remote_keys(config, &snapshot, &ledger.metrics)?,
        control_plane: assemble::control_plane(config)?,
        snapshot,
        ledger,
        live: Arc::default(),
        pool: assemble::pool(config)?,
        queue: assemble::queue(config),
        client: Client::default(),
        intake: Intake {
            limit_bytes: config.limits.body_bytes,
            idle: config.limits.body_idle,
            memory: Memory::new(config.limits.bodies_in_memory_bytes),
        },
        replies: Memory::new(config.limits.replies_in_memory_bytes),
        routes: RouteSettings { drop_in: config.routes.drop_in },
        models,
        mirror: None,
        in_flight: config.limits.in_flight as u64,
        blob_bytes: config.limits.blob_bytes,
        held_reply_bytes: config.limits.reply_buffer_bytes,
        list_bytes: config.limits.list_bytes,
        filters: assemble::filters(config),
        straggler: config.catalogue.straggler,
        cloud_models: config.egress.cloud_models,
        web_tools: config.egress.web_tools == WebTools::Allow,
        catalogue: !config.catalogue.refresh.is_zero(),
        failover: failover::Settings { backends: config.failover.backends, within: config.failover.within },
        silence: config.backend_timeouts.silence,
        token_places: Places::new(PlaceSettings::within(config.limits.in_flight)),
        guesses: Guesses::new(GuessSettings {
            requests_per_minute: config.identity.token_requests_per_minute,
            wrong_secrets_per_minute: config.identity.wrong_secrets_per_minute,
        }),
        hashing: Arc::new(Semaphore::new(2)),
        started: Instant::now(),
        draining: AtomicBool::new(false),
    })
}

fn audit_settings(config: &Config) -> AuditSettings {
    AuditSettings {
        dir: Some(config.audit.dir.clone()),
        key: Some(config.state_dir.join("audit-key.pem")),
        durability: match config.audit.durability {
            config::Durability::Write => Durability::Write,
            config::Durability::Fsync => Durability::Fsync,
            config::Durability::Strict => Durability::Strict,
        },
        fsync_within: config.audit.fsync,
        rotate_bytes: config.audit.rotate_bytes,
        rotate_age: config.audit.rotate_age,
        checkpoint_every: config.audit.checkpoint,
        checkpoint_file: Some(config.audit.checkpoint_file.clone()).filter(|file| !file.as_os_str().is_empty()),
        keep: Duration::from_secs(u64::from(config.audit.keep_days) * 86_400),
        keep_bytes: config.audit.keep_bytes,
        stdout: config.audit.stdout,
        room_records: config.audit.room_records,
        fold: FoldSettings { singles_per_address: config.audit.refusals_per_second, ..FoldSettings::default() },
        ..AuditSettings::default()
    }
}

fn door_settings(config: &Config, site: &Site) -> DoorSettings {
    let limits = &config.limits;
    DoorSettings {
        head: limits.head_timeout,
        head_bytes: limits.head_bytes,
        keepalive: limits.keepalive,
        readers: Readers {
            buffer_bytes: limits.reply_buffer_bytes,
            memory: site.replies.clone(),
            window: limits.slow_reader_stall,
            floor_bytes: limits.slow_reader_floor_bytes,
            blocking_floor_bytes: limits.slow_reader_blocking_floor_bytes,
        },
        shield: Shield { grace: config.streaming.cancel_grace, load: config.streaming.shield_load },
        linger: limits.linger,
    }
}

/// What Pingora itself is told. Listeners, threads and signals are ours.
fn pingora_conf() -> ServerConf {
    ServerConf {
        // Idle connections to the backend. Ollama closes none by itself; one per running request is the most there can be use for.
        upstream_keepalive_pool_size: 512,
        // Counts the first attempt too; every further one needs a reason, and there are fewer (`upstream::failover`; a backend's name has
        // some addresses, and each backend may have had one dead connection).
        max_retries: 64,
        ..ServerConf::default()
    }
}
