//! One view of all backends: lists of models, one model of a list, and the version.
//!
//! They do not take the way through `upstream_peer`. Several backends are asked for one answer; each model of a list is decided; and the
//! status of the answer depends on its content: nothing left and nothing allowed is a 403 (contract, section 3).
//!
//! - [`gather`]: asks backends, and waits for each only so long.
//! - [`extra`]: what is said of a model beside what its backend says.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::Method;
use pingora::http::ResponseHeader;
use pingora_proxy::Session;

use self::extra::Said;
use self::gather::Gathered;
use super::Gateway;
use super::admit::{Admitted, facts, refuse_by_policy};
use super::answer::{answer, json_head};
use crate::door::Ticket;
use crate::policy::Policy;
use crate::refusal::Refusal;
use crate::wire::list::{self, ListedAlias, View};
use crate::wire::{Endpoint, Kind, inventory, model};

mod extra;
mod gather;

/// Models decided before other requests get a turn: policy is synchronous, and a list may have 2,000 models by 8 roles.
const BATCH: usize = 32;

impl Gateway {
    pub(super) async fn answer_list(
        &self,
        endpoint: Endpoint,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> Result<Admitted, Refusal> {
        let policy = Arc::clone(&exchange.snapshot.policy);
        let began = Instant::now();
        let open = policy.open_list(&facts(endpoint, exchange)?);
        let result = if open.is_ok() { "allow" } else { "deny" };
        self.site.ledger.metrics.policy_decided(result, began.elapsed());
        let open = open.map_err(|denial| refuse_by_policy(exchange, &denial))?;
        let empty_denied = open.empty_allowed().err().cloned();
        exchange.permit = Some(open.into_permit());
        self.write_down(exchange).await?;

        let read = |body: &Bytes| list::names(endpoint, body).map(|_| ());
        let Some(gathered) = self.gather(session, exchange, &read).await? else { return Ok(Admitted::Answered) };
        let mut names = Vec::new();
        for reply in &gathered {
            let listed = list::names(endpoint, &reply.reply.body).map_err(|_| garbled())?;
            names.push(listed.into_iter().map(|entry| entry.name).collect::<Vec<_>>());
        }
        let mut shown = HashSet::new();
        let mut distinct: Vec<&str> = names.iter().flatten().map(String::as_str).collect();
        distinct.sort_unstable();
        distinct.dedup();
        distinct.retain(|name| !model::parse(name).is_ok_and(|model| model.is_temporary()));
        for batch in distinct.chunks(BATCH) {
            let verdicts = policy.shows(&facts(endpoint, exchange)?, batch);
            shown.extend(batch.iter().zip(verdicts).filter(|(_, shows)| *shows).map(|(name, _)| *name));
            tokio::task::yield_now().await;
        }
        let canonical =
            shown.iter().filter_map(|name| model::parse(name).ok()).map(|model| model.canonical()).collect();
        let aliases = self.listed_aliases(endpoint, exchange, &policy, &canonical)?;
        let said = Said::new(&self.site.pool, &gathered, &names, may_manage(exchange));
        let view = View {
            shows: &|name| shown.contains(name),
            extra: &|canonical| said.of(endpoint, canonical),
            aliases: &aliases,
        };
        let bodies: Vec<&[u8]> = gathered.iter().map(|reply| &*reply.reply.body).collect();
        let merged = list::merge(endpoint, &bodies, &view).map_err(|_| garbled())?;
        if let Some(denial) = empty_denied.filter(|_| merged.shown == 0) {
            exchange.permit = None;
            return Err(refuse_by_policy(exchange, &denial));
        }
        if merged.hidden > 0 {
            exchange.filters.push("hidden_models");
        }
        note_times(exchange, &gathered);
        Ok(reply_with(session, exchange, json_head(200), merged.body.into()).await)
    }

    /// The aliases that a list shows: those that the caller may use, with the target that would run.
    fn listed_aliases(
        &self,
        endpoint: Endpoint,
        exchange: &Ticket,
        policy: &Policy,
        shown: &HashSet<String>,
    ) -> Result<Vec<ListedAlias>, Refusal> {
        if endpoint == Endpoint::Ps {
            return Ok(Vec::new()); // what is loaded has its own name
        }
        let mut listed = Vec::new();
        for alias in self.site.models.aliases() {
            let targets = alias.targets.iter().map(|target| target.canonical());
            let Some(target) = targets.into_iter().find(|target| shown.contains(target)) else { continue };
            if policy.shows(&facts(endpoint, exchange)?, &[&alias.name.raw])[0] {
                listed.push(ListedAlias { name: alias.name.display(), canonical: alias.name.canonical(), target });
            }
        }
        Ok(listed)
    }

    /// `GET /v1/models/{model}`: as the list says it. Permit and receipt are there.
    pub(super) async fn answer_model(&self, session: &mut Session, exchange: &mut Ticket) -> Result<Admitted, Refusal> {
        let Some(gathered) = self.ask_one(session, exchange).await? else { return Ok(Admitted::Answered) };
        let reply = &gathered.reply;
        let status = reply.head.status.as_u16();
        let content_type = reply.head.headers.get(http::header::CONTENT_TYPE).cloned();
        let body = match status {
            200 if serde_json::from_slice::<serde::de::IgnoredAny>(&reply.body).is_err() => return Err(garbled()),
            200 => {
                let runs = exchange.model().map(|model| model.canonical()).unwrap_or_default();
                let names = [vec![runs.clone()]];
                let said = Said::new(&self.site.pool, std::slice::from_ref(&gathered), &names, may_manage(exchange));
                let mut extra = said.of(Endpoint::Models, &runs);
                let asked = exchange.ask.as_ref().and_then(|ask| ask.model.as_ref());
                let alias = asked.filter(|asked| self.site.models.is_alias(asked)).map(|alias| alias.display());
                if alias.is_some() {
                    extra.push(("alias_of", serde_json::Value::from(runs.as_str()).to_string()));
                }
                list::dress(&reply.body, &extra, alias.as_deref()).map_or_else(|| reply.body.clone(), Bytes::from)
            }
            // Ollama's own 404 passes unchanged.
            _ => reply.body.clone(),
        };
        note_times(exchange, std::slice::from_ref(&gathered));
        let head = json_head(status).and_then(|mut head| {
            if let Some(content_type) = content_type {
                head.insert_header(http::header::CONTENT_TYPE, content_type)?;
            }
            Ok(head)
        });
        Ok(reply_with(session, exchange, head, body).await)
    }

    /// `/api/version` of several backends: the lowest, since what a client does with it has to work on each. Permit and receipt are there.
    pub(super) async fn answer_version(
        &self,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> Result<Admitted, Refusal> {
        let read = |body: &Bytes| inventory::version(body).map(|_| ()).ok_or(());
        let Some(gathered) = self.gather(session, exchange, &read).await? else { return Ok(Admitted::Answered) };
        let version = |reply: &Gathered| inventory::version(&reply.reply.body).unwrap_or_default();
        let Some(lowest) = gathered.iter().min_by_key(|reply| inventory::age(&version(reply))) else {
            return Err(garbled());
        };
        let mut body = lowest.reply.body.clone();
        if may_manage(exchange) {
            let of_each = gathered.iter().map(|reply| (reply.backend.name.clone(), version(reply).into()));
            let of_each = serde_json::Value::Object(of_each.collect()).to_string();
            body = list::dress(&body, &vec![("backends", of_each)], None).map_or(body, Bytes::from);
        }
        note_times(exchange, &gathered);
        Ok(reply_with(session, exchange, json_head(200), body).await)
    }
}

/// Who may change the backends may know their names.
fn may_manage(exchange: &Ticket) -> bool {
    exchange.caller.as_ref().is_some_and(|caller| caller.may(Kind::Manage).is_ok())
}

fn garbled() -> Refusal {
    Refusal::bad_backend_reply("the reply is not the list that Ollama gives")
}

fn note_times(exchange: &mut Ticket, gathered: &[Gathered]) {
    exchange.upstream_status = gathered.first().map(|reply| reply.reply.head.status.as_u16());
    exchange.first_byte = gathered.iter().map(|reply| reply.reply.first_byte).min();
    exchange.last_byte = Some(Instant::now());
}

async fn reply_with(
    session: &mut Session,
    exchange: &mut Ticket,
    head: pingora::Result<ResponseHeader>,
    body: Bytes,
) -> Admitted {
    let written = async {
        let mut head = head?;
        if let Some(lease) = &exchange.lease {
            head.insert_header("x-behavry-backend", lease.backend().name.as_str())?;
            head.insert_header("x-behavry-queue-ms", "0")?;
        }
        if let Some(runs) = exchange.runs_instead() {
            head.insert_header("x-behavry-model", runs)?;
        }
        let head_only = session.req_header().method == Method::HEAD;
        answer(session, exchange, head, if head_only { Bytes::new() } else { body }).await
    };
    if written.await.is_err() {
        exchange.fault = Some(crate::exchange::Fault::Client); // it left; the record says so
    }
    Admitted::Answered
}

/// Ends when the client has left or the exchange was cut: where we answer ourselves no hook of Pingora's watches for either. The body
/// has been read to its end, or there is none.
pub(super) async fn gone(session: &mut Session) {
    if session.as_downstream_mut().read_body_or_idle(true).await.is_ok() {
        std::future::pending().await // nothing else of this request comes
    }
}
