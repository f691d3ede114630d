//! Models that are loaded before anybody asks for them.
//!
//! Only one that is not loaded is touched: to touch one that is would load it anew where a client has loaded it with other settings. So
//! each is loaded again some seconds after it was unloaded, for as long as its hours last.
//!
//! A load holds a slot of its model like a request, and is no request's hindrance: it begins only where nothing else is being loaded, pushes
//! nothing out that is used, and is broken off when a request needs the backend's loader for another model (`docs/adr/0067-warm-loads-give-way.md`).

use std::collections::HashMap;
use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;

use super::client::{Call, Client};
use super::{Backend, Known, Pool, Preload};
use crate::ledger::Metrics;
use crate::models::{Models, Warm};
use crate::wire::rewrite::settings;
use crate::wire::{Endpoint, Source};

/// A model that could not be loaded is tried again after this long: what is full now may be full for some time.
const AFTER_FAILURE: Duration = Duration::from_secs(60);
const REPLY_BYTES: usize = 1 << 20;

/// An Ollama that has not picked a request up yet loses a descriptor over its end (ollama-wire, section 0.4).
const LIVES: Duration = Duration::from_millis(50);

/// Keeps the models of one backend warm, until the process ends. It looks `every` so long.
pub async fn keep_warm(
    pool: &Pool,
    place: usize,
    client: &Client,
    models: &Models,
    metrics: &Metrics,
    every: Duration,
) {
    let backend = &pool.backends()[place];
    let mut failed: HashMap<String, Instant> = HashMap::new();
    loop {
        for warm in models.warm() {
            let canonical = warm.model.canonical();
            let known = backend.catalogue.known();
            let Some(left) = warm.hours.left(jiff::Timestamp::now().as_second().max(0) as u64) else { continue };
            let rests = failed.get(&canonical).is_some_and(|at| at.elapsed() < AFTER_FAILURE);
            if rests || !backend.is_up() || !backend.may_serve(&warm.model) || !is_wanted(&known, &canonical) {
                continue;
            }
            let Some(preload) = pool.preload(place, &canonical) else { continue };
            let load = load(backend, client, models, warm, &known, left);
            let Some((loaded, took)) = unless_in_the_way(load, preload).await else {
                log::info!("{canonical} makes way on backend {} for a request that needs another model", backend.name);
                continue;
            };
            metrics.warmed(&canonical, loaded);
            if loaded {
                backend.catalogue.note_loaded(&canonical);
                log::info!(
                    "{canonical} is loaded on backend {} before anybody asks for it, in {took:.1?}",
                    backend.name
                );
            } else {
                failed.insert(canonical.clone(), Instant::now());
                log::warn!("{canonical} cannot be loaded on backend {}; the next try is in a minute", backend.name);
            }
        }
        tokio::time::sleep(every).await;
    }
}

/// Whether the model was loaded, and how long that took. `None`: it was broken off, because a request needs the loader.
async fn unless_in_the_way(load: impl Future<Output = bool>, mut preload: Preload) -> Option<(bool, Duration)> {
    let began = Instant::now();
    let mut load = pin!(load);
    let loaded = tokio::select! { biased;
        loaded = &mut load => loaded,
        () = preload.slot.gives_way() => {
            let _ = tokio::time::timeout(LIVES.saturating_sub(began.elapsed()), load).await;
            return None;
        }
    };
    if loaded {
        preload.slot.loaded(began.elapsed());
    }
    Some((loaded, began.elapsed()))
}

/// It is there and not loaded, as far as both are known; and its details were asked for, since they say how it is loaded.
fn is_wanted(known: &Known, canonical: &str) -> bool {
    let there = known.models.get(canonical);
    let is_local = there.is_some_and(|model| model.source == Source::Local && model.shown.is_some());
    is_local && known.loaded_read.is_some() && !known.loaded.contains_key(canonical)
}

/// An empty request loads the model and does nothing else; it has the settings that a client's would get.
async fn load(backend: &Backend, client: &Client, models: &Models, warm: &Warm, known: &Known, left: Duration) -> bool {
    let capabilities = known.models.get(&warm.model.canonical()).and_then(|model| model.capabilities());
    let only_embeds =
        capabilities.is_some_and(|words| !words.is_empty() && !words.iter().any(|word| word == "completion"));
    let (endpoint, target) =
        if only_embeds { (Endpoint::Embed, "/api/embed") } else { (Endpoint::Generate, "/api/generate") };
    let keep_alive = if left == Duration::MAX { -1 } else { left.as_secs() as i64 };
    let body = serde_json::json!({ "model": warm.model.raw, "keep_alive": keep_alive }).to_string().into_bytes();
    let body = settings::apply(endpoint, &body, models.rules(&warm.model)).map_or(body, |(body, _)| body);
    let call = Call {
        method: Method::POST,
        target,
        query: None,
        body: Some(Bytes::from(body)),
        request_id: "warm",
        limit_bytes: REPLY_BYTES,
        within: backend.silence,
        pieces: None,
    };
    client.call(backend, &call).await.is_ok_and(|reply| reply.head.status == 200)
}
