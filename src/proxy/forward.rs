//! On the way to a backend: its address, the head that it is sent, and what is noted of the connection.

use std::time::Instant;

use bytes::Bytes;
use pingora::http::RequestHeader;
use pingora::prelude::*;

use super::Gateway;
use crate::door::{REFUSED, Ticket};
use crate::exchange::now_s;
use crate::refusal::Refusal;
use crate::upstream::health::Failed;
use crate::upstream::{catalogue, peer};
use crate::wire::{BodyRule, convert};

/// The audit's word for a request that was converted.
const CONVERTED: &str = "responses_to_chat";

impl Gateway {
    pub(super) async fn choose_peer(&self, exchange: &mut Ticket) -> Result<Box<HttpPeer>> {
        self.fit_again(exchange);
        self.fit_to_backend(exchange)?;
        let Some(lease) = &exchange.lease else {
            return Error::e_explain(ErrorType::InternalError, "no lease"); // `admit` gives one or refuses
        };
        let addresses = lease.backend().addresses().await;
        let Some(address) = addresses.ok().and_then(|all| all.get(exchange.unreachable % all.len()).copied()) else {
            let mut e = Error::explain(ErrorType::ConnectError, "the name does not resolve");
            e.set_retry(self.go_elsewhere(exchange, Failed::Unreachable));
            exchange.refusal = Some(self.unreachable(exchange).because("the backend's name does not resolve"));
            return Err(e);
        };
        let peer = peer::peer(lease.backend(), address, exchange.fresh_connection);
        exchange.attempts += 1;
        exchange.attempted.get_or_insert_with(Instant::now);
        Ok(Box::new(peer))
    }

    /// An Ollama without `/v1/responses` is asked for a chat. Decided again for each attempt: the next may go to another backend.
    fn fit_to_backend(&self, exchange: &mut Ticket) -> Result<()> {
        let (Some(lease), Some(body)) = (&exchange.lease, exchange.convertible.clone()) else { return Ok(()) };
        match (lease.backend().lacks_responses(), exchange.conversion.is_some()) {
            (true, false) => {
                let converted = convert::request(&body, self.site.filters, &exchange.request_id, now_s());
                let converted = converted.map_err(|why| {
                    exchange.refusal = Some(match why {
                        convert::Unconvertible::Parameter(name) => Refusal::unsupported_parameter(name),
                        convert::Unconvertible::Invalid(what) => Refusal::invalid_body(what),
                    });
                    Error::explain(REFUSED, "it cannot be converted")
                })?;
                exchange.body_bytes = converted.body.len();
                exchange.link.replay(converted.body.into());
                exchange.conversion = Some(converted.reply);
                exchange.filters.push(CONVERTED);
                exchange.filters.extend(converted.left_out);
            }
            (false, true) => {
                exchange.body_bytes = body.len();
                exchange.link.replay(body);
                exchange.conversion = None;
                // What was left out stands behind it.
                if let Some(at) = exchange.filters.iter().position(|filter| *filter == CONVERTED) {
                    exchange.filters.truncate(at);
                }
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn note_connected(&self, exchange: &mut Ticket, reused: bool) {
        self.site.ledger.metrics.upstream_connection(reused);
        if let Some(lease) = &exchange.lease {
            catalogue::note(lease.backend(), true, &self.site.ledger.metrics);
            if exchange.unreachable > 0 {
                lease.backend().put_first(exchange.unreachable);
            }
        }
    }

    /// Nothing was sent, so the next of the backend's addresses may be tried, and then another backend.
    pub(super) fn note_unreachable(&self, exchange: &mut Ticket, mut e: Box<Error>) -> Box<Error> {
        let Some(lease) = &exchange.lease else { return e };
        let backend = std::sync::Arc::clone(lease.backend());
        let known = backend.known_addresses();
        // Not the attempts: a dead pooled connection takes one too, and the address was a good one.
        exchange.unreachable += 1;
        if exchange.unreachable < known {
            e.set_retry(true);
            return e;
        }
        catalogue::note(&backend, false, &self.site.ledger.metrics);
        e.set_retry(self.go_elsewhere(exchange, Failed::Unreachable));
        exchange.refusal = Some(self.unreachable(exchange));
        e
    }

    pub(super) fn rewrite_request(&self, exchange: &mut Ticket, head: &mut RequestHeader) -> Result<()> {
        let (Some(lease), Some(target)) = (&exchange.lease, &exchange.target) else {
            return Error::e_explain(ErrorType::InternalError, "no lease"); // `admit` gives one or refuses
        };
        let target = if exchange.conversion.is_some() { convert::TARGET } else { target.as_ref() };
        let held_bytes = match exchange.endpoint().map(|endpoint| endpoint.body()) {
            Some(BodyRule::Json) => Some(exchange.body_bytes),
            _ => None,
        };
        peer::rewrite_head(head, lease.backend(), target, exchange.query.as_deref(), &exchange.request_id, held_bytes)?;
        lease.sent();
        let loads = lease.loads();
        exchange.refusal = None; // an earlier attempt's
        exchange.dispatched.get_or_insert_with(Instant::now);
        exchange.link.sent_upstream(loads);
        Ok(())
    }

    pub(super) fn bound_stream(&self, exchange: &mut Ticket, body: &mut Option<Bytes>, end: bool) -> Result<()> {
        if end && body.as_ref().is_some_and(Bytes::is_empty) {
            // h2 ends a body with an empty frame. Pingora 0.9.1 would write it as a chunk, which is the last one, and then the last
            // one again: bytes that the backend takes for the start of the next request (pingora-proxy, proxy_h1.rs, send_body_to1).
            *body = None;
        }
        if exchange.endpoint().map(|endpoint| endpoint.body()) != Some(BodyRule::Stream) {
            return Ok(());
        }
        exchange.streamed_bytes += body.as_ref().map_or(0, Bytes::len) as u64;
        if exchange.streamed_bytes > self.site.blob_bytes {
            exchange.refusal = Some(Refusal::body_too_large(self.site.blob_bytes));
            return Error::e_explain(REFUSED, "the blob is too large");
        }
        Ok(())
    }
}
