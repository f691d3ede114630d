//! Asks backends for what is shown as one, and waits for each only so long.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http::Method;
use pingora_proxy::Session;

use super::super::Gateway;
use super::super::elsewhere::failure_of;
use super::super::reply::refuse_encoded;
use super::gone;
use crate::door::Ticket;
use crate::exchange::Fault;
use crate::refusal::Refusal;
use crate::upstream::client::{Call, ClientError, Reply};
use crate::upstream::health::Failed;
use crate::upstream::{Backend, catalogue};

/// A backend, and what it answered.
pub(super) struct Gathered {
    pub backend: Arc<Backend>,
    pub reply: Reply,
}

/// Whether a body is what was asked for.
type Read<'a, E> = &'a (dyn Fn(&Bytes) -> Result<(), E> + Sync);

impl Gateway {
    /// The replies of all backends that are up, in the order of the configuration, one at least. Once one has answered the others have
    /// `catalogue.straggler_ms` left: one that is stalled hides its own models, and delays nobody. `None`: the client has left.
    pub(super) async fn gather<E>(
        &self,
        session: &mut Session,
        exchange: &mut Ticket,
        read: Read<'_, E>,
    ) -> Result<Option<Vec<Gathered>>, Refusal> {
        let backends = self.lease_each(exchange)?;
        let answered = tokio::select! { biased;
            answered = self.ask_each(exchange, &backends, read) => answered,
            () = gone(session) => {
                exchange.fault = Some(Fault::Client);
                return Ok(None);
            }
        };
        answered.map(Some)
    }

    async fn ask_each<E>(
        &self,
        exchange: &mut Ticket,
        backends: &[Arc<Backend>],
        read: Read<'_, E>,
    ) -> Result<Vec<Gathered>, Refusal> {
        exchange.attempts += 1;
        exchange.dispatched = Some(Instant::now());
        let exchange: &Ticket = exchange;
        let ask = async |backend: &Arc<Backend>| (Arc::clone(backend), self.ask(exchange, backend).await);
        let mut asked: FuturesUnordered<_> = backends.iter().map(ask).collect();
        let mut answers: Vec<Gathered> = Vec::new();
        let mut refusals = Vec::new();
        let mut unreachable = Vec::new();
        let mut until = None;
        loop {
            let next = match until {
                None => asked.next().await,
                Some(until) => tokio::time::timeout_at(until, asked.next()).await.unwrap_or_default(),
            };
            let Some((backend, answer)) = next else { break };
            let answer = answer.map_err(|fault| match fault {
                ClientError::Unreachable => {
                    unreachable.push(backend.url.to_string());
                    None
                }
                other => Some(self.refusal_of(&backend, other)),
            });
            match answer.and_then(|reply| whole(reply, read).map_err(Some)) {
                Ok(reply) => {
                    until.get_or_insert_with(|| tokio::time::Instant::now() + self.site.straggler);
                    answers.push(Gathered { backend, reply });
                }
                Err(refusal) => refusals.extend(refusal),
            }
        }
        if answers.is_empty() {
            let urls: Vec<&str> = unreachable.iter().map(String::as_str).collect();
            return Err(refusals.pop().unwrap_or_else(|| Refusal::backend_unreachable(&urls)));
        }
        answers.sort_by_key(|answer| answer.backend.place);
        Ok(answers)
    }

    /// The reply of one backend, the next one where the first fails or has not got the model. `None`: the client has left.
    pub(super) async fn ask_one(
        &self,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> Result<Option<Gathered>, Refusal> {
        self.lease(exchange)?;
        loop {
            self.fit_again(exchange);
            let Some(lease) = &exchange.lease else { return Err(Refusal::internal_error()) };
            let backend = Arc::clone(lease.backend());
            exchange.attempts += 1;
            exchange.attempted.get_or_insert_with(Instant::now);
            exchange.dispatched.get_or_insert_with(Instant::now);
            let answer = tokio::select! { biased;
                answer = self.ask(exchange, &backend) => answer,
                () = gone(session) => {
                    exchange.fault = Some(Fault::Client);
                    return Ok(None);
                }
            };
            let Some(lease) = &exchange.lease else { return Err(Refusal::internal_error()) };
            let failed = match &answer {
                Ok(reply) => failure_of(&reply.head, lease),
                Err(ClientError::Unreachable) => Some(Failed::Unreachable),
                Err(ClientError::Silent) => Some(Failed::Silent),
                Err(ClientError::Broken(_)) => Some(Failed::BrokeOff),
            };
            match failed {
                None => self.note_succeeded(lease),
                Some(failed) if self.go_elsewhere(exchange, failed) => continue,
                Some(_) => {}
            }
            return match answer {
                Ok(reply) => refuse_encoded(&reply.head).map(|()| Some(Gathered { backend, reply })),
                Err(ClientError::Unreachable) => Err(self.unreachable(exchange)),
                Err(fault) => Err(self.refusal_of(&backend, fault)),
            };
        }
    }

    async fn ask(&self, exchange: &Ticket, backend: &Arc<Backend>) -> Result<Reply, ClientError> {
        let call = Call {
            method: Method::GET,
            target: exchange.target.as_deref().unwrap_or_default(),
            query: exchange.query.as_deref(),
            body: None,
            request_id: &exchange.request_id,
            limit_bytes: self.site.list_bytes,
            within: self.site.silence,
            pieces: None,
        };
        let reply = self.site.client.call(backend, &call).await;
        let metrics = &self.site.ledger.metrics;
        match &reply {
            Ok(reply) => {
                metrics.upstream_connection(reply.reused);
                catalogue::note(backend, true, metrics);
            }
            Err(ClientError::Unreachable) => catalogue::note(backend, false, metrics),
            Err(_) => {}
        }
        reply
    }

    fn refusal_of(&self, backend: &Backend, fault: ClientError) -> Refusal {
        match fault {
            ClientError::Unreachable => Refusal::backend_unreachable(&[&backend.url.to_string()]),
            ClientError::Silent => Refusal::backend_timeout(self.site.silence.as_secs()),
            ClientError::Broken(how) => Refusal::bad_backend_reply(how),
        }
    }
}

/// A reply that is what was asked for.
fn whole<E>(reply: Reply, read: Read<'_, E>) -> Result<Reply, Refusal> {
    if reply.head.status != 200 {
        return Err(Refusal::bad_backend_reply("the backend answered a list with an error"));
    }
    refuse_encoded(&reply.head)?;
    read(&reply.body).map_err(|_| super::garbled())?;
    Ok(reply)
}
