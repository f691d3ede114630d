//! The path of a request, as a table of contents: each hook says in a line or two what happens, and where.
//!
//! ```text
//! client -> (door) received -> authenticated -> inspected -> authorized -> placed -> streaming -> settled
//!            route        identity      intake+wire    policy      upstream   wire::meter   ledger
//!            |-------------- request_filter: admit() -------------|upstream_peer|response_*| logging
//!            any step may end early with a Refusal -----------------------------------------> settled
//! ```

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::prelude::*;
use pingora::protocols::Digest;
use pingora_proxy::{FailToProxy, ProxyHttp, Session};

use crate::door::Ticket;
use crate::site::Site;

mod admit;
mod answer;
mod elsewhere;
mod failure;
mod forward;
mod pull;
mod queue;
mod reply;
pub mod steps;
mod tokens;
mod views;

/// The gateway in front of Ollama.
pub struct Gateway {
    pub site: Arc<Site>,
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = Ticket;

    fn new_ctx(&self) -> Ticket {
        Ticket::pick_up()
    }

    /// Nothing: the default adds a compression module to every request (traps, Pingora 11).
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, exchange: &mut Ticket) -> Result<()> {
        self.bound_in_flight(session, exchange)
    }

    /// Whose request it is, what it asks, and whether it may: or the answer that it gets instead.
    async fn request_filter(&self, session: &mut Session, exchange: &mut Ticket) -> Result<bool> {
        match self.admit(session, exchange).await {
            Ok(admit::Admitted::Forward) => Ok(false),
            Ok(admit::Admitted::Answered) => Ok(true),
            Err(refusal) => self.refuse(session, exchange, refusal).await.map(|()| true),
        }
    }

    /// Which backend, at which of its addresses.
    async fn upstream_peer(&self, _session: &mut Session, exchange: &mut Ticket) -> Result<Box<HttpPeer>> {
        self.choose_peer(exchange).await
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        reused: bool,
        _peer: &HttpPeer,
        #[cfg(unix)] _fd: std::os::unix::io::RawFd,
        _digest: Option<&Digest>,
        exchange: &mut Ticket,
    ) -> Result<()> {
        self.note_connected(exchange, reused);
        Ok(())
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        exchange: &mut Ticket,
        e: Box<Error>,
    ) -> Box<Error> {
        self.note_unreachable(exchange, e)
    }

    /// What the backend is sent: the table's target and a handful of headers.
    async fn upstream_request_filter(
        &self,
        _session: &mut Session,
        head: &mut RequestHeader,
        exchange: &mut Ticket,
    ) -> Result<()> {
        self.rewrite_request(exchange, head)
    }

    /// Only bodies that are passed on as they come are seen here as well; the others were read before.
    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        exchange: &mut Ticket,
    ) -> Result<()> {
        self.bound_stream(exchange, body, end)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        e: Box<Error>,
        exchange: &mut Ticket,
        reused: bool,
    ) -> Box<Error> {
        self.may_retry(session, exchange, e, reused)
    }

    /// The reply begins: its head is judged and cleaned, the meter chosen, the stream's start recorded.
    async fn response_filter(
        &self,
        session: &mut Session,
        head: &mut ResponseHeader,
        exchange: &mut Ticket,
    ) -> Result<()> {
        self.open_reply(session, exchange, head)
    }

    /// The reply passes: counted, and untouched but for what the client did not ask for.
    fn response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        exchange: &mut Ticket,
    ) -> Result<Option<Duration>> {
        reply::pass(exchange, body, end);
        Ok(None)
    }

    /// Something broke: the refusal that says so, or the reason why the stream ends.
    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, exchange: &mut Ticket) -> FailToProxy {
        self.explain_failure(session, exchange, e).await
    }

    /// The door settles, once the client has everything; here only the connection's end is noted.
    async fn logging(&self, _session: &mut Session, e: Option<&Error>, exchange: &mut Ticket) {
        failure::note(exchange, e);
    }

    /// Pingora's own lines print paths, queries and up to 1 MiB of a backend's bytes (traps, Pingora 6). The record says it all.
    fn suppress_error_log(&self, _session: &Session, _exchange: &Ticket, _e: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _exchange: &Ticket,
        _e: &Error,
        _context: pingora_proxy::ProxyWarnLogContext,
    ) -> bool {
        true
    }

    fn request_summary(&self, _session: &Session, exchange: &Ticket) -> String {
        format!("request {}", exchange.request_id)
    }
}
