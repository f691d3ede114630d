//! What broke, whose fault it was, and what the client is told.

use pingora::prelude::*;
use pingora_proxy::{FailToProxy, Session};

use super::Gateway;
use super::elsewhere::ELSEWHERE;
use crate::door::{AGAIN, CUT, REFUSED, SLOW_READER, Ticket};
use crate::exchange::Fault;
use crate::intake;
use crate::refusal::Refusal;
use crate::upstream::health::Failed;
use crate::wire::{BodyRule, Kind};

impl Gateway {
    pub(super) async fn explain_failure(&self, session: &mut Session, exchange: &mut Ticket, e: &Error) -> FailToProxy {
        note(exchange, Some(e));
        let status = match self.refusal_for(exchange, e) {
            Some(refusal) if session.response_written().is_none() && !exchange.link.is_answered() => {
                let status = refusal.status();
                // The client may be gone; then nobody reads this.
                let _ = self.refuse(session, exchange, refusal).await;
                status
            }
            // The head is out: the door ends the stream with this.
            Some(refusal) => {
                exchange.refusal = Some(refusal);
                0
            }
            None => 0,
        };
        FailToProxy { error_code: status, can_reuse_downstream: false }
    }

    /// `None`: the client is gone, or does not read, and is told nothing.
    fn refusal_for(&self, exchange: &mut Ticket, e: &Error) -> Option<Refusal> {
        if *e.etype() == CUT {
            return exchange.link.signal.reason().map(|cut| cut.refusal());
        }
        if let Some(refusal) = exchange.refusal.take() {
            return Some(refusal);
        }
        match fault_of(e) {
            Fault::Client if intake::is_bad_framing(e) => Some(intake::malformed_body()),
            Fault::Client => None,
            Fault::SlowClient => Some(Refusal::slow_reader()),
            // Pingora's own answer to a time-out is 502 (traps, Pingora 3); the contract says 504.
            Fault::Silence => Some(Refusal::backend_timeout(self.site.silence.as_secs())),
            Fault::Backend if exchange.upstream_status.is_some() => Some(Refusal::backend_cut("the backend broke off")),
            Fault::Backend => Some(Refusal::bad_backend_reply(match e.etype() {
                ErrorType::InvalidHTTPHeader => "the reply's head could not be understood",
                ErrorType::ConnectionClosed => "the backend closed the connection without a reply",
                _ => "the backend broke off before its reply",
            })),
            Fault::Internal => {
                log::error!("request {}: {:?} in the proxy's own part", exchange.request_id, e.etype());
                Some(Refusal::internal_error())
            }
        }
    }

    /// Pingora's default refuses every POST, and every inference is one (traps, Pingora 4). Ours: nothing of a reply was seen, the body
    /// can be sent again, and the error is the backend's. An old connection that was dead is replaced by a new one; what fails on a
    /// new one may be tried on another backend.
    pub(super) fn may_retry(
        &self,
        session: &Session,
        exchange: &mut Ticket,
        mut e: Box<Error>,
        reused: bool,
    ) -> Box<Error> {
        if *e.etype() == ELSEWHERE {
            e.set_retry(true); // another backend is leased already
            return e;
        }
        if *e.etype() == AGAIN {
            e.set_retry(!session.as_ref().retry_buffer_truncated() && exchange.link.client_left().is_none());
            return e;
        }
        // Management is never sent twice: the first may have been carried out (ollama-wire, section 2).
        let replayable = exchange
            .endpoint()
            .is_some_and(|endpoint| endpoint.body() != BodyRule::Stream && endpoint.kind() != Kind::Manage);
        let unanswered = exchange.upstream_status.is_none() && session.response_written().is_none();
        if *e.esource() != ErrorSource::Upstream || !unanswered {
            e.set_retry(false);
            return e;
        }
        let failed = match e.etype() {
            ErrorType::ReadTimedout | ErrorType::WriteTimedout => Failed::Silent,
            ErrorType::InvalidHTTPHeader => Failed::Garbage,
            _ => Failed::BrokeOff,
        };
        if !replayable || session.as_ref().retry_buffer_truncated() || exchange.link.client_left().is_some() {
            self.note_failed(exchange, failed);
            e.set_retry(false);
            return e;
        }
        if *e.etype() == ErrorType::WriteError && reused {
            // A large body on a dead pooled connection ends as a write error that Pingora has decided against.
            e.set_retry(true);
        } else {
            e.retry.decide_reuse(reused);
        }
        if e.retry() {
            exchange.fresh_connection = true;
        } else {
            e.set_retry(self.go_elsewhere(exchange, failed));
        }
        e
    }
}

/// Keeps whose fault an error was.
pub(super) fn note(exchange: &mut Ticket, e: Option<&Error>) {
    let told = |e: &&Error| *e.etype() == CUT || *e.etype() == REFUSED || intake::is_bad_framing(e);
    if let Some(e) = e.filter(|e| !told(e)) {
        exchange.fault.get_or_insert(fault_of(e));
    }
}

fn fault_of(e: &Error) -> Fault {
    match (e.esource(), e.etype()) {
        (ErrorSource::Downstream, ErrorType::WriteTimedout) => match &e.context {
            Some(context) if context.as_str() == SLOW_READER => Fault::SlowClient,
            _ => Fault::Client,
        },
        (ErrorSource::Downstream, _) => Fault::Client,
        (ErrorSource::Upstream, ErrorType::ReadTimedout | ErrorType::WriteTimedout) => Fault::Silence,
        (ErrorSource::Upstream, _) => Fault::Backend,
        (_, ErrorType::ConnectTimedout | ErrorType::ConnectRefused | ErrorType::ConnectError) => Fault::Backend,
        _ => Fault::Internal,
    }
}
