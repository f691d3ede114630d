//! From a backend that failed to another one, as long as nothing of a reply has gone to the client.
//!
//! Pingora begins anew when an error says so (`set_retry`), whether it comes from a connection or from our own judgement of a reply's
//! head; the door then replays the body, of any size.

use std::sync::Arc;
use std::time::Instant;

use pingora::http::ResponseHeader;
use pingora::prelude::*;

use super::queue::wish;
use super::{Gateway, steps};
use crate::door::Ticket;
use crate::exchange::{Exchange, Tried};
use crate::refusal::Refusal;
use crate::upstream::health::Failed;
use crate::upstream::scheduler::Class;
use crate::upstream::{Backend, Errand, Lease, failover};
use crate::wire::{Endpoint, Kind};

/// What makes Pingora begin anew after a reply's head.
pub(super) const ELSEWHERE: ErrorType = ErrorType::Custom("Elsewhere");

impl Gateway {
    /// The attempt has come to nothing. True: another backend, or the next model of the chain, is leased for the next.
    pub(super) fn go_elsewhere(&self, exchange: &mut Ticket, failed: Failed) -> bool {
        let Some(place) = exchange.lease.as_ref().map(|lease| lease.backend().place) else { return false };
        self.note_failed(exchange, failed);
        let before: Vec<Failed> = exchange.tried().map(|tried| tried.failed).collect();
        exchange.tried.push(Tried { place, failed });
        let since = exchange.attempted.map(|at| at.elapsed()).unwrap_or_default();
        if let Some(lease) = &exchange.lease {
            lease.ended(None); // whoever waits for its slot is next
        }
        if exchange.link.client_left().is_some() {
            return false; // nobody is there for another answer
        }
        let Some(endpoint) = exchange.endpoint() else { return false };
        let moves = failover::may_move(&self.site.failover, endpoint, failed, &before, since);
        let elsewhere = if moves {
            self.lease_again(endpoint, matches!(failed, Failed::Absent | Failed::NoRoute), exchange)
        } else {
            None
        };
        let falls_back = failed == Failed::Absent && since < self.site.failover.within;
        let lease = elsewhere.or_else(|| if falls_back { self.fall_back(endpoint, exchange) } else { None });
        let Some(lease) = lease else { return false };
        self.site.ledger.metrics.failed_over(failed.as_str());
        let after: Vec<String> = exchange.tried.iter().map(|tried| self.in_words(*tried)).collect();
        exchange.placement = Some(format!("{}, after {}", lease.reason(), after.join(", ")));
        exchange.lease = Some(lease);
        exchange.unreachable = 0;
        exchange.fresh_connection = false;
        exchange.upstream_status = None;
        true
    }

    /// A backend on which the exchange's model was not tried yet.
    fn lease_again(&self, endpoint: Endpoint, only_holding: bool, exchange: &Exchange) -> Option<Lease> {
        let places: Vec<usize> = exchange.tried().map(|tried| tried.place).collect();
        let (permit, receipt) = (exchange.permit.as_ref()?, exchange.receipt.as_ref()?);
        let errand = Errand { named: None, tried: &places, only_read: self.site.reads_catalogues(), only_holding };
        let pool = &self.site.pool;
        let leased = match endpoint.kind() {
            // It has waited already, and does not wait again.
            Kind::Infer => {
                pool.at_once(permit, receipt, &errand, wish(endpoint, Class::default(), Instant::now(), exchange))
            }
            _ => pool.lease(permit, receipt, &errand),
        };
        leased.ok()
    }

    /// No backend has the model that was believed to be there: the next of its chain runs, as if that had been known from the beginning.
    fn fall_back(&self, endpoint: Endpoint, exchange: &mut Exchange) -> Option<Lease> {
        while exchange.permit.as_mut()?.fall_back(|target| steps::may_follow(&self.site, target)) {
            let tried_before = std::mem::replace(&mut exchange.tried_before, exchange.tried.len());
            if let Some(lease) = self.lease_again(endpoint, false, exchange) {
                exchange.refit = true;
                return Some(lease);
            }
            exchange.tried_before = tried_before;
            exchange.permit.as_mut()?.step_back();
        }
        None
    }

    /// What health and the catalogue make of it.
    pub(super) fn note_failed(&self, exchange: &Ticket, failed: Failed) {
        let Some(lease) = &exchange.lease else { return };
        lease.failed(failed);
        if let (Failed::Absent, Some(model)) = (failed, lease.model()) {
            lease.backend().catalogue.note_absent(model);
            self.site.pool.tell_inventory(lease.backend().place);
        }
        self.site.ledger.metrics.backend_attempt(&lease.backend().name, failed.as_str());
    }

    pub(super) fn note_succeeded(&self, lease: &Lease) {
        lease.succeeded();
        self.site.ledger.metrics.backend_attempt(&lease.backend().name, "ok");
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

/// What a reply's head says of a backend, where it says anything.
pub(super) fn failure_of(head: &ResponseHeader, lease: &Lease) -> Option<Failed> {
    // A 404 in plain words is a route that this Ollama does not know.
    let content_type = head.headers.get(http::header::CONTENT_TYPE);
    let in_json = content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/json"));
    match head.status.as_u16() {
        404 if in_json && lease.model().is_some() => Some(Failed::Absent),
        503 => Some(Failed::Full),
        500..=599 => Some(Failed::Error),
        _ => None,
    }
}
