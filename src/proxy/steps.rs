//! The steps of a request's way that need its facts and nothing else: taken by requests (`admit`), and by those who only ask what would
//! become of one (`server::explain`).

use std::sync::Arc;
use std::time::Duration;

use crate::policy::{Denial, DenialKind, Permit};
use crate::refusal::Refusal;
use crate::site::Site;
use crate::upstream::scheduler::{Class, Full};
use crate::upstream::{Backend, NoBackend};
use crate::wire::{Ask, Endpoint, Kind, ModelRef, Source};

/// Who is asked for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Every backend in use: what is shown as one.
    Each,
    /// Every backend that should hold the model, one after another.
    Holders,
    /// The backend that has a slot for it.
    Slot,
    /// One backend, at once.
    One,
}

/// `named`: the request names a backend.
pub fn asked(site: &Site, endpoint: Endpoint, named: bool) -> Asked {
    let several = site.pool.backends().len() > 1;
    match endpoint {
        Endpoint::Pull if several && !named => Asked::Holders,
        Endpoint::Version if several => Asked::Each,
        _ if endpoint.kind() == Kind::List && several => Asked::Each,
        _ if endpoint.kind() == Kind::Infer => Asked::Slot,
        _ => Asked::One,
    }
}

/// What is said to any request at this moment, besides `more` than those that run.
pub fn turned_away(site: &Site, more: u64) -> Option<Refusal> {
    if site.is_draining() {
        Some(Refusal::shutting_down())
    } else if site.live.running() + more > site.in_flight {
        Some(Refusal::queue_full("limits.in_flight requests are being served"))
    } else {
        None
    }
}

/// What would leave the house, whoever asks: cloud models by name or by stub, and tools that Ollama runs on the internet. Of the
/// `targets` the local ones are left.
pub fn refuse_egress(site: &Site, ask: &Ask, targets: &mut Vec<ModelRef>) -> Result<(), Refusal> {
    let is_cloud = |model: &ModelRef| is_cloud(site, model);
    // Where others may run in its place the name itself is not sent, and may be anything.
    let asked = ask.model.iter().filter(|_| targets.is_empty());
    let leaves_the_house = asked.chain(&ask.others).any(is_cloud) || targets.first().is_some_and(is_cloud);
    if !site.cloud_models && leaves_the_house {
        return Err(runs_elsewhere());
    }
    if !site.cloud_models {
        targets.retain(|target| !is_cloud(target));
    }
    if ask.has_web_tools && !site.web_tools {
        return Err(Refusal::egress_denied("Ollama would run the request's web tools on the internet; leave them out"));
    }
    Ok(())
}

/// Whether a model is one of ollama.com's: by its name, or by a stub on any backend.
fn is_cloud(site: &Site, model: &ModelRef) -> bool {
    let canonical = model.canonical();
    let on = |backend: &Arc<Backend>| backend.catalogue.source(&canonical) == Some(Source::Cloud);
    model.source == Source::Cloud || site.pool.backends().iter().any(on)
}

/// Whether a model of a chain may run now, in the place of those before it.
pub fn may_follow(site: &Site, target: &ModelRef) -> bool {
    site.pool.can_serve(target) && (site.cloud_models || !is_cloud(site, target))
}

fn runs_elsewhere() -> Refusal {
    Refusal::egress_denied("the model runs on ollama.com; choose a local one")
}

/// A host in the name of a model that is pulled, pushed or created from is one that Ollama connects to.
///
/// And nobody manages what is on its way from the mirror: it would be shown to nobody, and deleted at any moment.
pub fn refuse_registry(site: &Site, endpoint: Endpoint, ask: &Ask) -> Result<(), Refusal> {
    if ask.model.iter().chain(&ask.others).any(ModelRef::is_temporary) {
        return Err(Refusal::invalid_body(
            "the model's namespace is one that only the proxy gives, for a moment; choose another",
        ));
    }
    let connects: Vec<&ModelRef> = match endpoint {
        Endpoint::Pull | Endpoint::Push => ask.model.iter().collect(),
        Endpoint::Create => ask.others.iter().collect(), // `from`, which is pulled where it is absent
        _ => Vec::new(),
    };
    match connects.into_iter().find(|model| !site.models.may_come_from(model)) {
        Some(model) => {
            let host = &model.host;
            Err(Refusal::egress_denied(format!("the registry {host}, which is not among models.registries")))
        }
        None => Ok(()),
    }
}

/// The permit is for one model from now on: of those that it allows and that are `left`, the first that can be served.
pub fn narrow(site: &Site, permit: &mut Permit, left: &[ModelRef]) -> Result<(), Refusal> {
    if permit.targets().is_empty() {
        return Ok(());
    }
    let is_left = |target: &ModelRef| left.iter().any(|left| left.same_model(target));
    match permit.narrow(is_left, |target| site.pool.can_serve(target)) {
        true => Ok(()),
        // Its stub was found since the policy was asked.
        false => Err(runs_elsewhere()),
    }
}

/// The words of a request that the policy refuses.
pub fn refused_by_policy(denial: &Denial) -> Refusal {
    match denial.kind {
        DenialKind::Denied => Refusal::policy_denied(&denial.reasons),
        DenialKind::Escalated => Refusal::policy_escalated(&denial.reasons),
        DenialKind::Error => Refusal::policy_denied(&denial.reasons).because("the policy could not be evaluated"),
    }
}

/// The class that a request is queued in: what it asks for, and no more than the strictest of its roles allows. Another word than
/// ours is no word: a client that speaks to other gateways too may have words of theirs.
pub fn class(site: &Site, asked: Option<&str>, roles: &[String]) -> Class {
    asked.and_then(Class::read).unwrap_or_default().min(site.queue.highest_of(roles))
}

/// The most that a request lets a model generate. `None`: as much as it likes.
pub fn most_tokens(endpoint: Endpoint, ask: &Ask) -> Option<u64> {
    match endpoint {
        Endpoint::Embed | Endpoint::Embeddings | Endpoint::OpenAiEmbeddings => Some(0),
        // 0 and below mean no limit (ollama-wire, section 3.1).
        _ => ask.num_predict.and_then(|most| u64::try_from(most).ok()).filter(|most| *most > 0),
    }
}

/// The words of a request that no backend may have, after `wait`.
pub fn refused_by_pool(site: &Site, no: NoBackend, wait: Duration) -> Refusal {
    let seconds = |after: Duration| u32::try_from(after.as_secs()).unwrap_or(u32::MAX);
    match no {
        NoBackend::Full(Full::Share { retry_after }) => Refusal::queue_share_full(seconds(retry_after)),
        NoBackend::Full(Full::Whole { retry_after }) => Refusal::queue_whole_full(seconds(retry_after)),
        NoBackend::Expired => Refusal::waited_in_vain(wait.as_secs()),
        NoBackend::NoneLeft => Refusal::no_backend(),
        NoBackend::Unnamed | NoBackend::UnknownName => {
            let names = site.pool.backends().iter().map(|backend| backend.name.as_str());
            Refusal::which_backend(&names.collect::<Vec<_>>())
        }
    }
}
