//! Waiting for a backend, in the proxy's own queue: after the receipt, before a backend is chosen (`docs/adr/0051-queue.md`).

use std::time::Instant;

use pingora_proxy::Session;

use super::Gateway;
use super::admit::refuse_cut;
use super::steps;
use super::views::gone;
use crate::door::Ticket;
use crate::exchange::{Exchange, Fault};
use crate::identity::Caller;
use crate::ledger::metrics::TurnedAway;
use crate::refusal::Refusal;
use crate::upstream::scheduler::{Class, Full};
use crate::upstream::{NoBackend, Wish};
use crate::wire::{Endpoint, Kind};

const PRIORITY: &str = "x-behavry-priority";

impl Gateway {
    pub(super) fn class(&self, session: &Session, caller: &Caller) -> Class {
        let asked = session.req_header().headers.get(PRIORITY).and_then(|word| word.to_str().ok());
        steps::class(&self.site, asked, &caller.roles)
    }

    /// Where to, and when: with the permit and the receipt, as soon as a backend has a slot.
    pub(super) async fn queue(
        &self,
        endpoint: Endpoint,
        class: Class,
        session: &mut Session,
        exchange: &mut Ticket,
    ) -> Result<(), Refusal> {
        // Cut while it was decided and written down: then no backend need hear of it.
        refuse_cut(exchange)?;
        let (began, wait) = (Instant::now(), self.site.queue.wait);
        let model = exchange.canonical_model().unwrap_or_default();
        let label = self.site.ledger.metrics.model(&model);
        let waiting = self.site.ledger.metrics.queue_entered(&label, class.as_str());
        let wish = wish(endpoint, class, began + wait, exchange);
        exchange.link.signal.progress.queued(began - exchange.began);
        let errand = self.errand(exchange);
        let (Some(permit), Some(receipt)) = (&exchange.permit, &exchange.receipt) else {
            return Err(Refusal::internal_error()); // the order of the steps has been broken
        };
        let leased = tokio::select! { biased;
            leased = self.site.pool.queue(permit, receipt, &errand, wish) => Some(leased),
            () = gone(session) => None,
        };
        let waited = began.elapsed();
        exchange.queued = Some(waited);
        match leased {
            Some(Ok(lease)) => {
                waiting.served(waited);
                exchange.link.signal.progress.placed();
                exchange.placement = Some(lease.reason().to_owned());
                exchange.lease = Some(lease);
                if endpoint == Endpoint::Responses {
                    exchange.convertible = exchange.link.body();
                }
                Ok(())
            }
            Some(Err(no)) => {
                if let Some(reason) = turned_away(no) {
                    self.site.ledger.metrics.queue_turned_away(reason);
                }
                Err(steps::refused_by_pool(&self.site, no, wait))
            }
            None => {
                refuse_cut(exchange)?;
                exchange.fault = Some(Fault::Client);
                Err(Refusal::queue_full("the client left the queue")) // which nobody reads
            }
        }
    }
}

pub(super) fn wish(endpoint: Endpoint, class: Class, deadline: Instant, exchange: &Exchange) -> Wish {
    let ask = exchange.ask.as_ref();
    Wish {
        agent: exchange.caller.as_ref().map(|caller| caller.agent_id.as_str().into()).unwrap_or_default(),
        class,
        input_bytes: exchange.body_bytes as u64,
        most_tokens: ask.and_then(|ask| steps::most_tokens(endpoint, ask)),
        conversation: exchange.conversation,
        streams: ask.and_then(|ask| ask.stream) == Some(true),
        deadline,
    }
}

/// Whoever the queue has no place for.
fn turned_away(no: NoBackend) -> Option<TurnedAway> {
    match no {
        NoBackend::Full(Full::Share { .. }) => Some(TurnedAway::Share),
        NoBackend::Full(Full::Whole { .. }) => Some(TurnedAway::Full),
        NoBackend::Expired => Some(TurnedAway::Expired),
        NoBackend::NoneLeft | NoBackend::Unnamed | NoBackend::UnknownName => None,
    }
}

/// Whether the caller may see why a backend was chosen: whoever manages models.
pub(super) fn sees_placement(exchange: &Exchange) -> bool {
    exchange.caller.as_ref().is_some_and(|caller| caller.may(Kind::Manage).is_ok())
}
