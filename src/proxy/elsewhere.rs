//! From a backend that failed to another one, as long as nothing of a reply has gone to the client.
//!
//! Pingora begins anew when an error says so (`set_retry`), whether it comes from a connection or from our own judgement of a reply's
//! head; the door then replays the body, of any size.

use std::sync::Arc;
use std::time::Instant;

use pingora::prelude::*;

use super::Gateway;
use super::queue::wish;
use crate::door::Ticket;
use crate::exchange::Tried;
use crate::refusal::Refusal;
use crate::upstream::health::Failed;
use crate::upstream::scheduler::Class;
use crate::upstream::{Backend, Errand, failover};
use crate::wire::Kind;

/// What makes Pingora begin anew after a reply's head.
pub(super) const ELSEWHERE: ErrorType = ErrorType::Custom("Elsewhere");

impl Gateway {
    /// The attempt has come to nothing. True: another backend is leased for the next.
    pub(super) fn go_elsewhere(&self, exchange: &mut Ticket, failed: Failed) -> bool {
        let Some(place) = exchange.lease.as_ref().map(|lease| lease.backend().place) else { return false };
        self.note_failed(exchange, failed);
        let before: Vec<Failed> = exchange.tried.iter().map(|tried| tried.failed).collect();
        exchange.tried.push(Tried { place, failed });
        let since = exchange.attempted.map(|at| at.elapsed()).unwrap_or_default();
        if let Some(lease) = &exchange.lease {
            lease.ended(None); // whoever waits for its slot is next
        }
        if exchange.link.client_left().is_some() {
            return false; // nobody is there for another answer
        }
        let Some(endpoint) = exchange.endpoint() else { return false };
        if !failover::may_move(&self.site.failover, endpoint, failed, &before, since) {
            return false;
        }
        let places: Vec<usize> = exchange.tried.iter().map(|tried| tried.place).collect();
        let (Some(permit), Some(receipt)) = (&exchange.permit, &exchange.receipt) else { return false };
        let errand = Errand {
            named: None,
            tried: &places,
            only_read: self.site.reads_catalogues(),
            only_holding: failed == Failed::Absent,
        };
        let pool = &self.site.pool;
        let leased = match endpoint.kind() {
            // It has waited already, and does not wait again.
            Kind::Infer => {
                pool.at_once(permit, receipt, &errand, wish(endpoint, Class::default(), Instant::now(), exchange))
            }
            _ => pool.lease(permit, receipt, &errand),
        };
        let Ok(lease) = leased else { return false };
        self.site.ledger.metrics.failed_over(failed.as_str());
        let after: Vec<String> = exchange.tried.iter().map(|tried| self.in_words(*tried)).collect();
        exchange.placement = Some(format!("{}, after {}", lease.reason(), after.join(", ")));
        exchange.lease = Some(lease);
        exchange.unreachable = 0;
        exchange.fresh_connection = false;
        exchange.upstream_status = None;
        true
    }

    /// What health makes of it.
    pub(super) fn note_failed(&self, exchange: &Ticket, failed: Failed) {
        let Some(lease) = &exchange.lease else { return };
        lease.backend().failed(lease.model(), failed, Instant::now());
        self.site.ledger.metrics.backend_attempt(&lease.backend().name, failed.as_str());
    }

    fn in_words(&self, tried: Tried) -> String {
        let name = self.site.pool.backends().get(tried.place).map_or("", |backend| backend.name.as_str());
        format!("{name} {}", tried.failed.as_str())
    }

    /// The backends that were tried, in the words of S0.
    pub(super) fn unreachable(&self, exchange: &Ticket) -> Refusal {
        let url =
            |place: usize| self.site.pool.backends().get(place).map(|backend: &Arc<Backend>| backend.url.to_string());
        let urls: Vec<String> = exchange.tried.iter().filter_map(|tried| url(tried.place)).collect();
        Refusal::backend_unreachable(&urls.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// What a status says of a backend, where it says anything.
pub(super) fn failure_of(status: u16, names_model: bool) -> Option<Failed> {
    match status {
        404 if names_model => Some(Failed::Absent),
        503 => Some(Failed::Full),
        500..=599 => Some(Failed::Error),
        _ => None,
    }
}
