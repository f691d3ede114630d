//! What the control socket's commands do to a running proxy.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::assemble;
use super::explain::Case;
use super::reload::Reloader;
use crate::config::Config;
use crate::control::{self, Fault, OpenError, Reply, Request};
use crate::identity::agents::AgentsError;
use crate::identity::agents::edit::{self, Change, EditError};
use crate::identity::own_keys::rotate::{self, Plan, RotateError};
use crate::identity::revocations::edit::Revocation;
use crate::identity::revocations::{self, RevocationsError};
use crate::ledger::Reloaded;
use crate::site::Site;
use crate::upstream::Backend;

/// Between two tries for a socket that another proxy has: after an upgrade the old one drains, and ends.
const TAKE_OVER: Duration = Duration::from_secs(1);

/// What commands reach.
pub struct Commands {
    site: Arc<Site>,
    reloader: Arc<Reloader>,
    agents_file: PathBuf,
    revocations_file: PathBuf,
    /// `None`: the keys are configured, and rotated where they are made.
    own_keys: Option<PathBuf>,
    drain_s: u64,
    stop: watch::Sender<bool>,
}

impl Commands {
    pub fn new(site: Arc<Site>, reloader: Arc<Reloader>, config: &Config, stop: watch::Sender<bool>) -> Commands {
        Commands {
            site,
            reloader,
            agents_file: config.identity.agents_file.clone(),
            revocations_file: config.identity.revocations_file.clone(),
            own_keys: assemble::keys::signs_with_own_keys(config).then(|| config.state_dir.clone()),
            drain_s: config.shutdown.drain.as_secs(),
            stop,
        }
    }

    async fn answer(&self, request: Request) -> Result<Value, Fault> {
        match request {
            Request::Drain => Ok(self.drain()),
            Request::Reload => self.reload().await,
            Request::AgentList => Ok(self.agents()),
            Request::AgentChange(change) => self.change_agents(change).await,
            Request::Revoke(revocation) => self.revoke(revocation).await,
            Request::BackendList => Ok(json!({ "backends": self.backends() })),
            Request::BackendDrain { name } => self.drain_backend(&name, true),
            Request::BackendUndrain { name } => self.drain_backend(&name, false),
            Request::RotateKeys(plan) => self.rotate_keys(plan).await,
            Request::Explain(question) => {
                let case = Case::read(question, &self.site.routes, self.site.filters)?;
                Ok(case.placement(&self.site))
            }
        }
    }

    fn drain(&self) -> Value {
        log::info!("asked by command: stopping");
        let running = self.site.live.running();
        let _ = self.stop.send(true); // nobody listens: it stops already
        json!({ "running": running, "within_s": self.drain_s })
    }

    async fn reload(&self) -> Result<Value, Fault> {
        let mut broken = Vec::new();
        for what in Reloaded::ALL {
            // One that is broken keeps no other from being loaded.
            broken.extend(self.reloader.now(what).await.err());
        }
        if !broken.is_empty() {
            return Err(Fault::configuration(broken.join("\n")));
        }
        let snapshot = self.site.snapshot.load();
        Ok(json!({ "policy_revision": snapshot.policy.revision(), "agents": snapshot.agents.len() }))
    }

    fn agents(&self) -> Value {
        json!({ "agents": self.site.snapshot.load().agents.iter().collect::<Vec<_>>() })
    }

    fn backends(&self) -> Vec<Value> {
        let now = Instant::now();
        let of = |backend: &Arc<Backend>| {
            let (breaker, models) = backend.breakers(now);
            let models: serde_json::Map<_, _> =
                models.into_iter().map(|(model, state)| (model, json!(state.as_str()))).collect();
            json!({
                "name": backend.name, "url": backend.url.to_string(), "tier": backend.tier, "weight": backend.weight,
                "up": backend.is_up(), "drained": backend.is_drained(), "in_flight": backend.in_flight(),
                "breaker": breaker.as_str(), "models": models,
            })
        };
        self.site.pool.backends().iter().map(of).collect()
    }

    fn drain_backend(&self, name: &str, drained: bool) -> Result<Value, Fault> {
        let backends = self.site.pool.backends();
        let Some(backend) = backends.iter().find(|backend| backend.name == name) else {
            let names: Vec<&str> = backends.iter().map(|backend| backend.name.as_str()).collect();
            return Err(Fault::usage(format!("no backend is called {name:?}; there are {}", names.join(", "))));
        };
        if backend.drain(drained) {
            let what = if drained { "drained: it gets no new requests" } else { "undrained" };
            log::info!("asked by command: backend {name} is {what}");
        }
        self.site.ledger.metrics.backend_drained(name, drained);
        Ok(json!({ "running": backend.in_flight() }))
    }

    async fn change_agents(&self, change: Change) -> Result<Value, Fault> {
        let file = self.agents_file.clone();
        let changed = tokio::task::spawn_blocking(move || edit::change_file(&file, &change)).await;
        changed
            .map_err(|_| Fault::failure("the proxy failed while it edited; please report it"))?
            .map_err(edit_fault)?;
        self.reloader.now(Reloaded::Agents).await.map_err(|why| {
            Fault::configuration(format!("the file was changed, and the running proxy cannot load it: {why}"))
        })?;
        Ok(json!({ "file": self.agents_file }))
    }

    async fn revoke(&self, revocation: Revocation) -> Result<Value, Fault> {
        let file = self.revocations_file.clone();
        let added =
            tokio::task::spawn_blocking(move || revocations::edit::add_to_file(&file, &revocation, Timestamp::now()));
        added
            .await
            .map_err(|_| Fault::failure("the proxy failed while it edited; please report it"))?
            .map_err(revocation_fault)?;
        self.reloader.now(Reloaded::Revocations).await.map_err(|why| {
            Fault::configuration(format!("the file was changed, and the running proxy cannot load it: {why}"))
        })?;
        Ok(json!({ "file": self.revocations_file }))
    }

    /// The proxy reads its keys again after each step, so that it verifies what it will sign, and then signs with it.
    async fn rotate_keys(&self, plan: Plan) -> Result<Value, Fault> {
        let Some(state_dir) = self.own_keys.clone() else { return Err(keys_are_configured()) };
        let (reloader, runtime) = (Arc::clone(&self.reloader), tokio::runtime::Handle::current());
        let rotated = tokio::task::spawn_blocking(move || {
            let reload = |_| runtime.block_on(reloader.now(Reloaded::Keys)).is_ok();
            rotate::rotate(&state_dir, plan, Timestamp::now(), reload)
        });
        let rotated =
            rotated.await.map_err(|_| Fault::failure("the proxy failed while it rotated; please report it"))?;
        // What was taken away at the end.
        let _ = self.reloader.now(Reloaded::Keys).await;
        Ok(json!(rotated.map_err(rotate_fault)?))
    }
}

/// The exit code of a command whose edit was refused.
pub fn edit_fault(error: EditError) -> Fault {
    let what = error.to_string();
    match error {
        EditError::Invalid(_) => Fault::usage(what),
        EditError::Broken(AgentsError::AlreadyThere { .. }) => Fault::failure(what),
        EditError::Broken(_) | EditError::Inline => Fault::configuration(what),
        EditError::File(_)
        | EditError::AlreadyThere { .. }
        | EditError::Unknown { .. }
        | EditError::Taken { .. }
        | EditError::NoSuchKey { .. } => Fault::failure(what),
    }
}

/// The exit code of a revocation that was refused.
pub fn revocation_fault(error: revocations::edit::EditError) -> Fault {
    use revocations::edit::EditError;
    let what = error.to_string();
    match error {
        EditError::Invalid(_) => Fault::usage(what),
        EditError::Broken(RevocationsError::Content { .. }) | EditError::Inline => Fault::configuration(what),
        EditError::Broken(RevocationsError::File(_)) | EditError::Full => Fault::failure(what),
    }
}

/// The exit code of a rotation that was refused.
pub fn rotate_fault(error: RotateError) -> Fault {
    match &error {
        RotateError::Keys(_) | RotateError::New(_) => Fault::configuration(error.to_string()),
        RotateError::BrokenOff(_) => Fault::failure("the proxy cannot load the keys; its log says why"),
        RotateError::Full => Fault::failure(error.to_string()),
    }
}

/// Somebody else's keys are not rotated here.
pub fn keys_are_configured() -> Fault {
    Fault::configuration("the keys are configured ([identity]), not the proxy's own: rotate them where they are made")
}

/// Answers commands until it is asked to close. Without a socket the proxy serves all the same: it watches the files that commands then edit.
///
/// `first` is the socket as it was tried for at the start, before anybody was told that the proxy listens.
pub async fn answer_commands(
    first: Result<control::Control, OpenError>,
    state_dir: PathBuf,
    commands: Arc<Commands>,
    mut closing: watch::Receiver<bool>,
) {
    let mut opened = first;
    let mut told = false;
    loop {
        match opened {
            Ok(control) => {
                let answer = move |request| {
                    let commands = Arc::clone(&commands);
                    async move { Reply::from(commands.answer(request).await) }
                };
                let closed = async move {
                    let _ = closing.wait_for(|closed| *closed).await; // who could ask is gone: the same
                };
                return control.serve(answer, closed).await;
            }
            Err(OpenError::Taken { .. }) if told => {}
            Err(why) => {
                log::warn!("no control socket: {why}");
                if !matches!(why, OpenError::Taken { .. }) {
                    return;
                }
                told = true;
            }
        }
        if tokio::time::timeout(TAKE_OVER, closing.wait_for(|closed| *closed)).await.is_ok() {
            return;
        }
        opened = control::open(&state_dir);
    }
}
