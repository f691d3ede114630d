//! Lists of models: read from the backend here, decided model by model, and answered with what the caller may see.
//!
//! They do not take the way through `upstream_peer`, because the status of the answer depends on its content: nothing left and
//! nothing allowed is a 403 (contract, section 3).

use std::time::Instant;

use http::Method;
use pingora_proxy::Session;

use super::Gateway;
use super::admit::{Admitted, facts, refuse_by_policy};
use super::answer::{answer, json_head};
use crate::door::Ticket;
use crate::refusal::Refusal;
use crate::upstream::catalogue;
use crate::upstream::client::{Call, ClientError, Reply};
use crate::wire::{Endpoint, list};

/// Models decided before other requests get a turn: policy is synchronous, and a list may have 2,000 models by 8 roles.
const BATCH: usize = 32;

impl Gateway {
    pub(super) async fn answer_list(
        &self,
        endpoint: Endpoint,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> Result<Admitted, Refusal> {
        let policy = std::sync::Arc::clone(&exchange.snapshot.policy);
        let began = Instant::now();
        let open = policy.open_list(&facts(endpoint, exchange)?);
        let result = if open.is_ok() { "allow" } else { "deny" };
        self.site.ledger.metrics.policy_decided(result, began.elapsed());
        let open = open.map_err(|denial| refuse_by_policy(exchange, &denial))?;
        let empty_denied = open.empty_allowed().err().cloned();
        exchange.permit = Some(open.into_permit());
        self.write_down(exchange).await?;
        self.lease(exchange)?;

        let reply = tokio::select! { biased;
            reply = self.fetch_list(exchange) => reply?,
            () = gone(session) => {
                // Nobody is there to be told; or the door says why it was cut.
                exchange.fault = Some(crate::exchange::Fault::Client);
                return Ok(Admitted::Answered);
            }
        };
        exchange.upstream_status = Some(reply.head.status.as_u16());
        if reply.head.status != 200 {
            return Err(Refusal::bad_backend_reply("the backend answered a list with an error"));
        }
        super::reply::refuse_encoded(&reply.head)?;
        let garbled = |_| Refusal::bad_backend_reply("the reply is not the list that Ollama gives");
        let listed = list::names(endpoint, &reply.body).map_err(garbled)?;
        let names: Vec<&str> = listed.iter().map(|entry| entry.name.as_str()).collect();
        let mut shown = std::collections::HashSet::new();
        for batch in names.chunks(BATCH) {
            let verdicts = policy.shows(&facts(endpoint, exchange)?, batch);
            shown.extend(batch.iter().zip(verdicts).filter(|(_, shows)| *shows).map(|(name, _)| *name));
            tokio::task::yield_now().await;
        }
        let filtered = list::filter(endpoint, &reply.body, &mut |name| shown.contains(name)).map_err(garbled)?;
        if let Some(denial) = empty_denied.filter(|_| filtered.shown == 0) {
            exchange.permit = None;
            return Err(refuse_by_policy(exchange, &denial));
        }
        if filtered.hidden > 0 {
            exchange.filters.push("hidden_models");
        }
        exchange.first_byte = Some(reply.first_byte);
        exchange.last_byte = Some(Instant::now());

        let written = async {
            let mut head = json_head(200)?;
            if let Some(lease) = &exchange.lease {
                head.insert_header("x-behavry-backend", lease.backend().name.as_str())?;
                head.insert_header("x-behavry-queue-ms", "0")?;
            }
            let head_only = session.req_header().method == Method::HEAD;
            let body = if head_only { bytes::Bytes::new() } else { filtered.body.into() };
            answer(session, exchange, head, body).await
        };
        match written.await {
            Ok(()) => Ok(Admitted::Answered),
            // The client left; the record says so.
            Err(_) => {
                exchange.fault = Some(crate::exchange::Fault::Client);
                Ok(Admitted::Answered)
            }
        }
    }

    async fn fetch_list(&self, exchange: &mut Ticket) -> Result<Reply, Refusal> {
        let (Some(lease), Some(target)) = (&exchange.lease, &exchange.target) else {
            return Err(Refusal::internal_error()); // `answer_list` has just made both
        };
        let backend = std::sync::Arc::clone(lease.backend());
        let target = target.clone();
        exchange.attempts += 1;
        exchange.dispatched = Some(Instant::now());
        let call = Call {
            method: Method::GET,
            target: &target,
            query: exchange.query.as_deref(),
            body: None,
            request_id: &exchange.request_id,
            limit_bytes: self.site.list_bytes,
            within: self.site.silence,
        };
        let reply = self.site.client.call(&backend, &call).await;
        let metrics = &self.site.ledger.metrics;
        match reply {
            Ok(reply) => {
                metrics.upstream_connection(reply.reused);
                catalogue::note(&backend, true, metrics);
                Ok(reply)
            }
            Err(ClientError::Unreachable) => {
                catalogue::note(&backend, false, metrics);
                Err(Refusal::backend_unreachable(&[&backend.url.to_string()]))
            }
            Err(ClientError::Silent) => Err(Refusal::backend_timeout(self.site.silence.as_secs())),
            Err(ClientError::Broken(how)) => Err(Refusal::bad_backend_reply(how)),
        }
    }
}

/// Ends when the client has left or the exchange was cut: where we answer ourselves no hook of Pingora's watches for either. The body
/// has been read to its end, or there is none.
pub(super) async fn gone(session: &mut Session) {
    if session.as_downstream_mut().read_body_or_idle(true).await.is_ok() {
        std::future::pending().await // nothing else of this request comes
    }
}
