//! What would become of a request, without making it: what the policy says, and where it would go.
//!
//! The steps are those that a request takes (`proxy::steps`, `policy`, `upstream`), in their order. Nothing is sent, nothing is recorded,
//! and nobody has a slot, a place in the queue or a turn the less for it.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::{Fault, Question};
use crate::identity::Caller;
use crate::policy::{Facts, Permit, Requester};
use crate::proxy::steps::{self, Asked};
use crate::refusal::Refusal;
use crate::route::{self, Route, RouteSettings};
use crate::site::Site;
use crate::snapshot::Snapshot;
use crate::upstream::scheduler::{Offer, Outlook};
use crate::upstream::{Backend, Errand, Wish};
use crate::wire::{Ask, BodyRule, Endpoint, Filters, Kind, ModelRef, ask, model};

/// A question that was understood.
pub struct Case {
    endpoint: Endpoint,
    method: String,
    upstream_path: Cow<'static, str>,
    ask: Ask,
    /// As it would be sent, but for what the model that runs changes.
    body: Vec<u8>,
    caller: Caller,
    source_ip: Option<IpAddr>,
    priority: Option<String>,
    backend: Option<String>,
}

impl Case {
    /// # Errors
    /// It is no request that Ollama would be sent, and why.
    pub fn read(question: Question, routes: &RouteSettings, filters: Filters) -> Result<Case, Fault> {
        let method = question.method.to_ascii_uppercase();
        let Ok(Route::Ollama { endpoint, upstream_path, model: in_path, .. }) =
            route::resolve(&method, &question.path, routes)
        else {
            return Err(Fault::usage(format!("{method} {} is no endpoint of Ollama that may pass", question.path)));
        };
        let (mut ask, mut body) = (Ask::default(), Vec::new());
        if let (Some(sent), BodyRule::Json) = (question.body, endpoint.body()) {
            let read = ask::read_filtered(endpoint, sent.as_bytes(), filters);
            let read = read.map_err(|e| Fault::usage(e.to_string()))?;
            (ask, body) = (read.ask, read.edits.apply(sent.as_bytes()));
        }
        if let Some(name) = question.model.as_ref().or(in_path.as_ref()) {
            ask.model = Some(model::parse(name).map_err(|e| Fault::usage(e.to_string()))?);
        }
        let caller = Caller {
            agent_id: question.agent,
            agent_name: None,
            session_id: "explain".to_owned(),
            roles: question.roles,
            permissions: question.permissions,
            risk_tier: question.risk_tier,
            expires_at: i64::MAX,
            issued_at: None,
        };
        let (source_ip, priority, backend) = (question.source_ip, question.priority, question.backend);
        Ok(Case { endpoint, method, upstream_path, ask, body, caller, source_ip, priority, backend })
    }

    pub fn ask(&self) -> &Ask {
        &self.ask
    }

    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// The permission that the caller lacks.
    pub fn lacks(&self) -> Option<&'static str> {
        self.caller.may(self.endpoint.kind()).err()
    }

    /// What the policy decides on. `targets`: what may run in the place of the model that is asked for.
    pub fn facts<'a>(&'a self, targets: &'a [ModelRef]) -> Facts<'a> {
        Facts {
            caller: &self.caller,
            ask: &self.ask,
            targets,
            endpoint: self.endpoint,
            method: &self.method,
            resource: &self.upstream_path,
            requester: Requester::default(),
            source_ip: self.source_ip,
            now: jiff::Timestamp::now(),
        }
    }

    /// Where the proxy would send it now, and why.
    pub fn placement(&self, site: &Site) -> Value {
        let snapshot = site.snapshot.load_full();
        let mut placed = self.place(site, &snapshot).unwrap_or_else(|refusal| {
            let code = refusal.code.as_str();
            json!({ "outcome": "refused", "status": refusal.status(), "code": code, "detail": refusal.detail })
        });
        placed["policy_revision"] = json!(snapshot.policy.revision());
        placed
    }

    fn place(&self, site: &Site, snapshot: &Snapshot) -> Result<Value, Refusal> {
        if let Some(refusal) = steps::turned_away(site, 1) {
            return Err(refusal);
        }
        self.caller.may(self.endpoint.kind()).map_err(Refusal::insufficient_scope)?;
        if snapshot.turns_away(&self.caller) {
            return Err(Refusal::revoked());
        }
        let mut targets = site.models.targets_for(self.endpoint, &self.ask);
        steps::refuse_egress(site, &self.ask, &mut targets)?;
        let facts = self.facts(&targets);
        if self.endpoint.kind() == Kind::List {
            let open = snapshot.policy.open_list(&facts).map_err(|denial| steps::refused_by_policy(&denial))?;
            return self.ask_for(site, &open.into_permit());
        }
        steps::refuse_registry(site, self.endpoint, &self.ask)?;
        let mut permit = snapshot.policy.decide(&facts).map_err(|denial| steps::refused_by_policy(&denial))?;
        steps::narrow(site, &mut permit, &targets)?;
        let mut placed = self.ask_for(site, &permit)?;
        if let Some(runs) = permit.model() {
            placed["model"] = json!(runs.canonical());
            if let Some(asked) = self.ask.model.as_ref().filter(|asked| !asked.same_model(runs)) {
                let how = if site.models.is_alias(asked) { "alias" } else { "fallback" };
                placed["instead_of"] = json!({ "model": asked.canonical(), "by": how });
            }
        }
        Ok(placed)
    }

    fn ask_for(&self, site: &Site, permit: &Permit) -> Result<Value, Refusal> {
        let refused = |no| steps::refused_by_pool(site, no, Duration::ZERO);
        let errand = Errand {
            named: self.backend.as_deref(),
            tried: &[],
            only_read: site.reads_catalogues(),
            only_holding: false,
        };
        let names = |backends: &[Arc<Backend>]| -> Vec<Value> {
            let in_use = backends.iter().filter(|backend| !backend.is_drained());
            in_use.map(|backend| json!({ "name": backend.name })).collect()
        };
        match steps::asked(site, self.endpoint, self.backend.is_some()) {
            Asked::Each => {
                let backends = site.pool.asked_for_lists().ok_or_else(Refusal::no_backend)?;
                Ok(json!({ "outcome": "asked_of_each", "backends": names(&backends) }))
            }
            Asked::Holders => {
                let backends = names(&permit.model().map(|model| site.pool.holders(model)).unwrap_or_default());
                if backends.is_empty() {
                    return Err(Refusal::no_backend());
                }
                Ok(json!({ "outcome": "asked_of_each", "backends": backends }))
            }
            Asked::One => {
                let (backend, reason) = site.pool.outlook(permit, &errand).map_err(refused)?;
                Ok(json!({ "outcome": "sent", "backend": backend.name, "reason": reason.as_str() }))
            }
            Asked::Slot => {
                let wish = Wish {
                    agent: self.caller.agent_id.as_str().into(),
                    class: steps::class(site, self.priority.as_deref(), &self.caller.roles),
                    input_bytes: self.body.len() as u64,
                    most_tokens: steps::most_tokens(self.endpoint, &self.ask),
                    conversation: site.pool.conversation(&self.body),
                    streams: self.ask.stream == Some(true),
                    deadline: Instant::now() + site.queue.wait,
                };
                let outlook = site.pool.queue_outlook(permit, &errand, wish).map_err(refused)?;
                in_queue(site, &outlook).ok_or_else(Refusal::no_backend)
            }
        }
    }
}

fn in_queue(site: &Site, outlook: &Outlook) -> Option<Value> {
    let chosen = outlook.chosen.as_ref()?;
    let name = |place: usize| site.pool.backends()[place].name.as_str();
    // Milliseconds are more than is known.
    let seconds = |s: f64| (s * 1000.0).round() / 1000.0;
    let offer = |offer: &Offer| {
        let mut shown = json!({ "name": name(offer.backend), "standing": offer.standing.as_str() });
        if offer.standing.may_serve() {
            shown["waits_s"] = json!(seconds(offer.waits_s));
            shown["loads_s"] = json!(seconds(offer.load_s));
            shown["cost_s"] = json!(seconds(offer.cost_s));
        }
        shown
    };
    Some(json!({
        "outcome": if chosen.is_free { "sent" } else { "waits" },
        "backend": name(chosen.backend),
        "reason": chosen.reason.as_str(),
        "ahead": outlook.ahead,
        "backends": outlook.offers.iter().map(offer).collect::<Vec<_>>(),
    }))
}
