//! Decides whether a request may go to a backend. The order is the security argument: who, what, may they, written down.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pingora::prelude::*;
use pingora_proxy::Session;

use super::Gateway;
use super::steps::{self, Asked as Whom};
use crate::door::{REFUSED, Ticket};
use crate::exchange::{Exchange, Fault, PolicyWord, Requester, Unfitted};
use crate::identity::{self, Asked, Caller, Identified, Rejection, cause, device};
use crate::intake::{self, Encodings, Unread};
use crate::ledger::Way;
use crate::live::progress::Facts as Progress;
use crate::policy::{self, Denial, DenialKind, Facts};
use crate::refusal::Refusal;
use crate::route::{self, Route};
use crate::upstream::placement::Has;
use crate::upstream::{Backend, Errand};
use crate::wire::ask::{self, AskError};
use crate::wire::rewrite::{Assignment, UsageHider, settings};
use crate::wire::{Ask, BodyRule, Dialect, Endpoint, Filter, Kind, ModelRef, model, rewrite};

/// What `request_filter` has come to.
pub enum Admitted {
    /// To a backend.
    Forward,
    /// It was answered here.
    Answered,
}

impl Gateway {
    /// More requests at once than are allowed are answered at once.
    pub(super) fn bound_in_flight(&self, _session: &mut Session, exchange: &mut Ticket) -> Result<()> {
        exchange.refusal = steps::turned_away(&self.site, 0);
        match exchange.refusal {
            None => Ok(()),
            Some(_) => Error::e_explain(REFUSED, "before the request filter"),
        }
    }

    pub(super) async fn admit(
        &self,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> std::result::Result<Admitted, Refusal> {
        let route = route::resolve(&exchange.method, &exchange.path, &self.site.routes)?;
        if let Some(query) = &exchange.query {
            route::check_query(query)?;
        }
        match route {
            Route::Ollama { endpoint, upstream_path, model, .. } => {
                exchange.way = Way::Ollama(endpoint);
                exchange.dialect = endpoint.dialect();
                exchange.target = Some(upstream_path);
                self.admit_to_ollama(endpoint, model, session, exchange).await
            }
            Route::Token => {
                exchange.way = Way::Token;
                self.answer_token(session, exchange).await
            }
            Route::Jwks => self.answer_jwks(session, exchange).await,
            // What is not offered is said to callers only: a stranger learns nothing but that a token is needed.
            Route::Unsupported { operation } => {
                exchange.dialect = Dialect::OpenAi;
                self.identify(session, exchange).await?;
                let operation = self.name_operation(operation, session, exchange).await?;
                Err(Refusal::unsupported_operation(operation))
            }
            Route::Egress => {
                self.identify(session, exchange).await?;
                Err(Refusal::egress_denied("the route acts on the internet with the server's own account"))
            }
        }
    }

    /// Bifrost's word for an operation that is not offered, with the difference that a stream makes. A body in JSON is read for that; a
    /// form is not: it would be an upload of audio or images for one word more.
    async fn name_operation(
        &self,
        operation: &'static str,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> std::result::Result<&'static str, Refusal> {
        let content_type = session.req_header().headers.get(http::header::CONTENT_TYPE);
        let in_json = content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/json"));
        let Some(streamed) = route::streamed(operation).filter(|_| in_json) else { return Ok(operation) };
        match self.site.intake.read(session, Encodings::PlainOrZstd).await {
            Ok((body, _held)) => Ok(if ask::asks_for_stream(&body) { streamed } else { operation }),
            // However a body cannot be read, it is not offered.
            Err(Unread::Refused(_)) if exchange.link.signal.reason().is_none() => Ok(operation),
            Err(unread) => Err(refuse_unread(exchange, unread)),
        }
    }

    async fn admit_to_ollama(
        &self,
        endpoint: Endpoint,
        model_in_path: Option<String>,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> std::result::Result<Admitted, Refusal> {
        let caller = self.identify(session, exchange).await?;
        caller.may(endpoint.kind()).map_err(Refusal::insufficient_scope)?;
        self.inspect(endpoint, model_in_path, session, exchange).await?;
        if let Some(ask) = &exchange.ask {
            exchange.targets = self.site.models.targets_for(endpoint, ask);
        }
        self.refuse_egress(exchange)?;
        if endpoint.kind() == Kind::List {
            return self.answer_list(endpoint, session, exchange).await;
        }
        if endpoint.kind() == Kind::Manage {
            exchange.named_backend = named_backend(session)?;
            if let Some(ask) = &exchange.ask {
                steps::refuse_registry(&self.site, endpoint, ask)?;
            }
        }
        let class = self.class(session, &caller);
        self.authorize(endpoint, exchange)?;
        self.know_models(exchange).await?;
        self.settle_on_model(endpoint, exchange)?;
        self.write_down(exchange).await?;
        match steps::asked(&self.site, endpoint, exchange.named_backend.is_some()) {
            Whom::Holders => return self.pull_everywhere(session, exchange).await,
            Whom::Each => return self.answer_version(session, exchange).await,
            Whom::Slot => self.queue(endpoint, class, session, exchange).await?,
            Whom::One if endpoint == Endpoint::Model => return self.answer_model(session, exchange).await,
            Whom::One => self.lease(exchange)?,
        }
        Ok(Admitted::Forward)
    }

    /// Who.
    async fn identify(
        &self,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> std::result::Result<Arc<Caller>, Refusal> {
        let identified = self.with_new_keys(session, exchange).await;
        let Identified { caller, by_device } = identified.map_err(|rejection| match rejection {
            Rejection::Missing => {
                self.site.ledger.metrics.token_failed(cause::MISSING);
                Refusal::missing_token()
            }
            Rejection::Invalid(cause::NO_KEYS) => {
                self.site.ledger.metrics.token_failed(cause::NO_KEYS);
                Refusal::keys_unavailable()
            }
            Rejection::Invalid(cause) => {
                self.site.ledger.metrics.token_failed(cause);
                Refusal::invalid_token(cause)
            }
        })?;
        exchange.caller = Some(Arc::clone(&caller));
        if by_device {
            exchange.query = exchange.query.as_deref().and_then(device::without_time);
        }
        exchange.requester = Requester::read(&session.req_header().headers)?;
        self.refuse_revoked(&caller, exchange)?;
        Ok(caller)
    }

    /// Whether they still may come at all; asked for every request, behind the cache of verified tokens.
    ///
    /// The order matters. A reload stores the new snapshot first, and then cuts what runs; here the caller is made known to `live` first,
    /// and then looked up in the snapshot of this moment (not the exchange's, which may be older). Both go through the signal's lock, so
    /// either the cut finds this caller, or this lookup finds the new snapshot: no exchange slips through between them.
    fn refuse_revoked(&self, caller: &Arc<Caller>, exchange: &Ticket) -> std::result::Result<(), Refusal> {
        exchange.link.signal.belongs_to(caller);
        if self.site.snapshot.load().turns_away(caller) {
            exchange.link.signal.is_refused();
            return Err(Refusal::revoked());
        }
        Ok(())
    }

    /// A key that is not known may be new: the key set's URL is asked, and then all that is in force by now is taken, whole.
    async fn with_new_keys(
        &self,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> std::result::Result<Identified, Rejection> {
        let identified = by_credential(session, exchange);
        let Some(remote_keys) = &self.site.remote_keys else { return identified };
        if !matches!(identified, Err(Rejection::Invalid(cause::UNKNOWN_KEY | cause::NO_KEYS))) {
            return identified;
        }
        remote_keys.learn().await;
        let now = self.site.snapshot.load_full();
        if Arc::ptr_eq(&now.verifier, &exchange.snapshot.verifier) {
            return identified;
        }
        exchange.snapshot = now;
        by_credential(session, exchange)
    }

    /// What: the body is read and judged before anything else is decided.
    async fn inspect(
        &self,
        endpoint: Endpoint,
        model_in_path: Option<String>,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> std::result::Result<(), Refusal> {
        let mut ask = match endpoint.body() {
            BodyRule::None => {
                intake::refuse_body(session)?;
                Ask::default()
            }
            BodyRule::Stream => {
                intake::open_stream(session, self.site.blob_bytes).await?;
                Ask::default()
            }
            BodyRule::Json => {
                let reading = Instant::now();
                let read = self.site.intake.read(session, encodings(endpoint)).await;
                let (body, held) = read.map_err(|unread| refuse_unread(exchange, unread))?;
                exchange.waited_for_body = reading.elapsed();
                exchange.held = Some(held);
                let read = ask::read_filtered(endpoint, &body, self.site.filters).map_err(refuse_unreadable)?;
                exchange.filters.extend(read.fired.iter().map(Filter::as_str));
                if read.fired.has(Filter::IncludeUsage) {
                    exchange.hider = Some(UsageHider::new(endpoint));
                }
                let body = if read.edits.is_empty() { body } else { read.edits.apply(&body).into() };
                exchange.body_bytes = body.len();
                exchange.conversation = self.site.pool.conversation(&body);
                exchange.link.replay(body);
                read.ask
            }
        };
        if let Some(name) = model_in_path {
            // The table checked its characters only.
            ask.model = Some(model::parse(&name).map_err(|_| Refusal::unknown_route())?);
        }
        exchange.ask = Some(ask);
        Ok(())
    }

    fn refuse_egress(&self, exchange: &mut Exchange) -> std::result::Result<(), Refusal> {
        let Some(ask) = &exchange.ask else { return Ok(()) };
        steps::refuse_egress(&self.site, ask, &mut exchange.targets)
    }

    /// Just after the start the lists of models may not have been read yet, and a stub of a cloud model would pass as a local one:
    /// the first requests wait for them. Behind the policy, because a request that is refused opens no connection.
    async fn know_models(&self, exchange: &mut Exchange) -> std::result::Result<(), Refusal> {
        if !self.site.reads_catalogues() {
            return Ok(());
        }
        let backends = self.site.pool.backends();
        let none_read = !backends.iter().any(|backend| backend.catalogue.is_read());
        let asked = exchange.ask.as_ref().and_then(|ask| ask.model.as_ref());
        let is_held = |model: &ModelRef| {
            let canonical = model.canonical();
            backends.iter().any(|backend| matches!(backend.catalogue.has(&canonical), Has::Held | Has::Loaded))
        };
        if !none_read && (asked.is_none_or(is_held) || exchange.targets.iter().any(is_held)) {
            return Ok(()); // whoever was not read is not used
        }
        // A backend that did not answer delays nobody a second time while others do.
        let unread = backends.iter().filter(|b| !b.catalogue.is_read() && (none_read || !b.catalogue.was_tried()));
        // One that cannot be reached now cannot be reached by this request either, and it will be told so.
        let read = unread.map(|b| b.catalogue.read_first(b, &self.site.client, &self.site.ledger.metrics));
        let read = futures::future::join_all(read).await;
        if read.is_empty() { Ok(()) } else { self.refuse_egress(exchange) }
    }

    /// Which of the models that may run does: the permit is for that one from now on.
    fn settle_on_model(&self, endpoint: Endpoint, exchange: &mut Ticket) -> std::result::Result<(), Refusal> {
        let left = std::mem::take(&mut exchange.targets);
        let Some(permit) = &mut exchange.permit else { return Ok(()) };
        steps::narrow(&self.site, permit, &left)?;
        if !permit.targets().is_empty() {
            let filters = exchange.filters.len();
            exchange.unfitted = Some(Unfitted { body: exchange.link.body(), filters });
        }
        self.fit_to_model(endpoint, exchange);
        Ok(())
    }

    /// The request names the model that runs, and has the settings that hold for it.
    fn fit_to_model(&self, endpoint: Endpoint, exchange: &mut Ticket) {
        let (Some(runs), Some(ask)) =
            (exchange.permit.as_ref().and_then(|permit| permit.model()).cloned(), &exchange.ask)
        else {
            return;
        };
        let asked = ask.model.as_ref();
        if !asked.is_some_and(|asked| asked.same_model(&runs)) {
            let by_alias = asked.is_some_and(|asked| self.site.models.is_alias(asked));
            exchange.filters.push(if by_alias { "alias" } else { "fallback" });
            let name = serde_json::Value::from(runs.raw.as_str()).to_string();
            let model = [Assignment { within: None, name: "model", value: &name }];
            match endpoint.body() {
                BodyRule::Json => self.rewrite(exchange, |body| rewrite::set(body, &model)),
                _ => exchange.target = Some(format!("/v1/models/{}", runs.raw).into()),
            }
        }
        let rules = self.site.models.rules(&runs);
        let mut changed = Vec::new();
        self.rewrite(exchange, |body| {
            let (body, words) = settings::apply(endpoint, body, rules)?;
            changed = words;
            Some(body)
        });
        exchange.filters.extend(changed);
    }

    /// The same for a model to which the request has fallen back, from what the client sent.
    pub(super) fn fit_again(&self, exchange: &mut Ticket) {
        let (true, Some(endpoint)) = (std::mem::take(&mut exchange.refit), exchange.endpoint()) else { return };
        let Some(Unfitted { body, filters }) = &exchange.unfitted else { return };
        let (body, filters) = (body.clone(), *filters);
        exchange.filters.truncate(filters);
        exchange.conversion = None;
        if let Some(body) = body {
            exchange.body_bytes = body.len();
            exchange.link.replay(body);
        }
        self.fit_to_model(endpoint, exchange);
        if exchange.convertible.is_some() {
            exchange.convertible = exchange.link.body();
        }
    }

    fn rewrite(&self, exchange: &mut Ticket, change: impl FnOnce(&[u8]) -> Option<Vec<u8>>) {
        if let Some(bytes) = exchange.link.rewrite(change) {
            exchange.body_bytes = bytes;
        }
    }

    /// May they.
    fn authorize(&self, endpoint: Endpoint, exchange: &mut Exchange) -> std::result::Result<(), Refusal> {
        let policy = Arc::clone(&exchange.snapshot.policy);
        let began = Instant::now();
        let decided = policy.decide(&facts(endpoint, exchange)?);
        let result = match &decided {
            Ok(_) => "allow",
            Err(denial) => result_of(denial),
        };
        self.site.ledger.metrics.policy_decided(result, began.elapsed());
        match decided {
            Ok(permit) => {
                exchange.permit = Some(permit);
                Ok(())
            }
            Err(denial) => Err(refuse_by_policy(exchange, &denial)),
        }
    }

    /// Nothing is sent unrecorded.
    pub(super) async fn write_down(&self, exchange: &mut Ticket) -> std::result::Result<(), Refusal> {
        let model = exchange.canonical_model();
        let written = self.site.ledger.record(&exchange.entry(model.as_deref()));
        exchange.receipt = Some(written.await.map_err(|e| Refusal::audit_unavailable(e.as_str()))?);
        exchange.link.signal.progress.begin(progress(exchange, model));
        Ok(())
    }

    /// All backends, for what is shown as one. Where there is one only it is the exchange's.
    pub(super) fn lease_each(&self, exchange: &mut Ticket) -> std::result::Result<Vec<Arc<Backend>>, Refusal> {
        if let [_] = self.site.pool.backends() {
            self.lease(exchange)?;
            return Ok(exchange.lease.iter().map(|lease| Arc::clone(lease.backend())).collect());
        }
        refuse_cut(exchange)?;
        let (Some(permit), Some(receipt)) = (&exchange.permit, &exchange.receipt) else {
            return Err(Refusal::internal_error()); // the order of the steps has been broken
        };
        self.site.pool.each(permit, receipt).map_err(|no| steps::refused_by_pool(&self.site, no, Duration::ZERO))
    }

    /// What is wanted of a backend, beyond what the permit says.
    pub(super) fn errand<'a>(&self, exchange: &'a Exchange) -> Errand<'a> {
        Errand {
            named: exchange.named_backend.as_deref(),
            tried: &[],
            only_read: self.site.reads_catalogues(),
            only_holding: false,
        }
    }

    /// Where to: only with the permit and the receipt, which the steps before have left.
    pub(super) fn lease(&self, exchange: &mut Ticket) -> std::result::Result<(), Refusal> {
        refuse_cut(exchange)?;
        let (Some(permit), Some(receipt)) = (&exchange.permit, &exchange.receipt) else {
            return Err(Refusal::internal_error()); // the order of the steps has been broken
        };
        let errand = self.errand(exchange);
        match self.site.pool.lease(permit, receipt, &errand) {
            Ok(lease) => {
                exchange.placement = Some(lease.reason().to_owned());
                exchange.lease = Some(lease);
                Ok(())
            }
            Err(no) => Err(steps::refused_by_pool(&self.site, no, Duration::ZERO)),
        }
    }
}

/// Cut while it was decided and written down: then no backend need hear of it.
pub(super) fn refuse_cut(exchange: &Ticket) -> std::result::Result<(), Refusal> {
    match exchange.link.signal.reason() {
        Some(cut) => {
            exchange.link.signal.is_refused();
            Err(cut.refusal())
        }
        None => Ok(()),
    }
}

/// Whoever the request's credential stands for, by the keys and agents of its snapshot.
fn by_credential(session: &Session, exchange: &Exchange) -> std::result::Result<Identified, Rejection> {
    let snapshot = &exchange.snapshot;
    let asked = Asked {
        headers: &session.req_header().headers,
        method: &exchange.method,
        path: route::own_path(&exchange.path),
        query: exchange.query.as_deref(),
    };
    identity::identify(&snapshot.verifier, snapshot.agents.keyring(), &asked, now_s())
}

/// The backend that a request of management is for, as its header says.
fn named_backend(session: &Session) -> std::result::Result<Option<String>, Refusal> {
    let mut named = session.req_header().headers.get_all("x-behavry-backend").iter();
    match (named.next(), named.next()) {
        (None, _) => Ok(None),
        (Some(name), None) => Ok(Some(name.to_str().unwrap_or_default().to_owned())), // no backend has such a name
        (Some(_), Some(_)) => Err(Refusal::bad_framing("x-behavry-backend comes twice")),
    }
}

/// What those who watch see of the exchange from now on.
fn progress(exchange: &Exchange, model: Option<String>) -> Progress {
    let entry = exchange.entry(None);
    let owned = |text: Option<&str>| text.map(str::to_owned);
    Progress {
        began: exchange.began,
        request_id: exchange.request_id.clone(),
        agent_id: owned(entry.agent_id),
        session_id: owned(entry.session_id),
        action: exchange.method.clone(),
        target: entry.target.unwrap_or_default().to_owned(),
        model,
        stream: entry.stream,
        policy_reason: owned(entry.policy_reason),
    }
}

/// The document that the policy decides on.
pub(super) fn facts<'a>(endpoint: Endpoint, exchange: &'a Exchange) -> std::result::Result<Facts<'a>, Refusal> {
    let (Some(caller), Some(ask), Some(target)) = (&exchange.caller, &exchange.ask, &exchange.target) else {
        return Err(Refusal::internal_error()); // the order of `admit` has been broken
    };
    Ok(Facts {
        caller,
        ask,
        targets: &exchange.targets,
        endpoint,
        method: &exchange.method,
        resource: target,
        requester: policy::Requester {
            id: exchange.requester.id.as_deref(),
            channel: exchange.requester.channel.as_deref(),
        },
        source_ip: exchange.source_ip,
        now: jiff::Timestamp::now(),
    })
}

/// Codex sends its requests to `/v1/responses` in zstd; Ollama decodes it on all of `/v1/*`, and nowhere else.
fn encodings(endpoint: Endpoint) -> Encodings {
    match endpoint.dialect() {
        Dialect::Native => Encodings::Plain,
        Dialect::OpenAi | Dialect::Anthropic => Encodings::PlainOrZstd,
    }
}

/// Words the refusal of a body whose facts could not be read.
fn refuse_unreadable(e: AskError) -> Refusal {
    match e {
        AskError::Ambiguous(what) => Refusal::ambiguous_body(what),
        AskError::Invalid(what) => Refusal::invalid_body(what),
        AskError::Unsupported(name) => Refusal::unsupported_parameter(name),
    }
}

/// Notes a client that left during its upload, and words the refusal: it may have closed its sending side only, and still read.
pub(super) fn refuse_unread(exchange: &mut Ticket, unread: Unread) -> Refusal {
    if let Some(cut) = exchange.link.signal.reason() {
        return cut.refusal(); // it looks like a fault of the body's
    }
    match unread {
        Unread::Refused(refusal) => refusal,
        Unread::Left => {
            exchange.fault = Some(Fault::Client);
            Refusal::bad_framing("the connection ended before the body did").because("the client left")
        }
    }
}

/// Notes the policy's word in the exchange and words the refusal.
pub(super) fn refuse_by_policy(exchange: &mut Exchange, denial: &Denial) -> Refusal {
    exchange.denial = Some(PolicyWord {
        result: result_of(denial),
        policy_id: denial.policy_id.clone(),
        reason: denial.reasons.join("; "),
        revision: denial.revision.clone(),
    });
    steps::refused_by_policy(denial)
}

fn result_of(denial: &Denial) -> &'static str {
    match denial.kind {
        DenialKind::Escalated => "escalate",
        DenialKind::Denied | DenialKind::Error => "deny",
    }
}

/// Seconds since 1970; a clock before that is 0, at which no token holds that has an `nbf` or `iat`.
pub(super) fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
