//! The front door: what stands between the socket and Pingora's `HttpProxy`, for every request.
//!
//! ```text
//! accept -> h1 or h2? -> one head under ONE deadline -> raw bytes judged -> session wrapped ONCE
//!        -> HttpProxy::process_new_http (all hooks) -> session taken back -> reply finished, whatever happened
//!        -> settled (the one final record) -> keep-alive
//! ```
//!
//! - [`head`]: one request head and its judgement.
//! - [`chunks`]: a chunked body's framing, judged as it comes.
//! - [`link`]: what door and hooks say to each other: the exchange, the body to replay, a cut.
//! - [`downstream`]: the session that `HttpProxy` sees.
//! - [`leaver`]: a client that left before its reply began, and what its backend is told.
//! - [`outgoing`]: what is still to be written, bounded; [`readers`]: who reads it too slowly.
//! - [`finish`]: the end of a reply: error frame, 500, lingering close.
//!
//! It leans on these parts of Pingora 0.9.1, which its documentation hides, and `tests/` holds each: the trait
//! `protocols::http::custom::server::Session`; v2's `take_response_body_writer`; pingora-proxy's private TASK_BUFFER_SIZE of 4;
//! `enable_retry_buffering` being called at the start of every attempt; a `Failed` task reaching `response_duplex_vec`; the
//! session being dropped before `process_new_http` returns. It needs `panic = "unwind"`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use futures::FutureExt;
use pingora::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v2::server::H2Options;
use pingora::protocols::{ALPN, Stream};
use pingora::server::ShutdownWatch;
use pingora::time::timeout;
use tokio::time::Instant;

mod chunks;
mod downstream;
mod finish;
mod head;
mod leaver;
mod link;
mod outgoing;
mod readers;

pub use leaver::Shield;
pub use link::{Link, Ticket};
pub use outgoing::{AGAIN, CUT, REFUSED, SLOW_READER};
pub use readers::Readers;

use self::chunks::Judged;
use self::downstream::Downstream;
use self::head::HeadFault;
use crate::exchange::Exchange;
use crate::site::Site;

/// Streams of one h2 connection at once: what HTTP/2 itself recommends as the least (RFC 9113, section 6.5.2), and h2's usual default.
const H2_STREAMS: u32 = 100;

/// Limits of the door. The values and their reasons are in `config`.
pub struct DoorSettings {
    /// For a whole head, from its first byte; for the first head of a connection from the accept.
    pub head: Duration,
    pub head_bytes: usize,
    /// A connection without a request is closed after this.
    pub keepalive: Duration,
    pub readers: Readers,
    pub shield: Shield,
    /// How long a connection that is closed with unread bytes is still read.
    pub linger: Duration,
}

pub struct Door<P> {
    proxy: Arc<P>,
    settings: Arc<DoorSettings>,
    site: Arc<Site>,
    h2c: HttpServerOptions,
}

/// What is left of a connection after a request: to be reused, with the bytes already read.
type Next = Option<(Stream, BytesMut)>;

impl<P: HttpServerApp + Send + Sync + 'static> Door<P> {
    pub fn new(proxy: P, settings: DoorSettings, site: Arc<Site>) -> Door<P> {
        let mut h2c = HttpServerOptions::default();
        h2c.h2c = true;
        h2c.h2_idle_timeout = Some(settings.keepalive);
        Door { proxy: Arc::new(proxy), settings: Arc::new(settings), site, h2c }
    }

    /// One request whose head is ready to be parsed.
    async fn serve(self: &Arc<Self>, mut session: ServerSession, shutdown: &ShutdownWatch) -> Next {
        match timeout(self.settings.head, session.read_request()).await {
            Ok(Ok(true)) if session.req_header().method == http::Method::CONNECT => {
                return self.refuse_unparsed(session, "connect").await;
            }
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return None,
            Ok(Err(_)) => return self.refuse_unparsed(session, "unparsable").await,
            Err(_) => return self.refuse_unparsed(session, "slow_head").await,
        }
        if self.site.is_draining() {
            session.set_keepalive(None);
        } else if session.get_keepalive().is_some() {
            session.set_keepalive(Some(self.settings.keepalive.as_secs()));
        }
        // Neither side sees an upgrade: Pingora would pass it on, and the tunnel would escape policy and audit (traps, Pingora 7).
        session.req_header_mut().remove_header("upgrade");

        let source_ip = session.client_addr().and_then(|address| address.as_inet()).map(|address| address.ip());
        let site = &self.site;
        let exchange = Box::new(Exchange::received(
            session.req_header(),
            source_ip,
            site.snapshot.load_full(),
            site.ledger.metrics.request_began(),
        ));
        let link = Arc::new(Link::new(exchange));
        let presence = self.site.live.enter(&link.signal);
        let downstream = Downstream::new(session, Arc::clone(&link), Arc::clone(&self.settings));
        let hooks = self.proxy.process_new_http(ServerSession::new_custom(Box::new(downstream)), shutdown);
        // Whatever happens in there, `Downstream::drop` leaves the session in the link and `Ticket::drop` the exchange.
        let panicked =
            std::panic::AssertUnwindSafe(link::LINK.scope(Arc::clone(&link), hooks)).catch_unwind().await.is_err();
        let (next, ending) = self.finish(&link, panicked).await;
        if let Some(exchange) = link.take_exchange() {
            exchange.settle(&self.site.ledger, ending);
        }
        drop(presence);
        next
    }
}

#[async_trait]
impl<P: HttpServerApp + Send + Sync + 'static> ServerApp for Door<P> {
    async fn process_new(self: &Arc<Self>, mut stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let accepted = Instant::now();
        let h2 = matches!(stream.selected_alpn_proto(), Some(ALPN::H2));
        let h2 = h2
            || match timeout(self.settings.head, head::is_h2_preface(&mut stream)).await {
                Ok(Ok(is_h2)) => is_h2,
                Ok(Err(_)) => return None, // closed without a word
                Err(_) => {
                    self.site.ledger.metrics.unparsed(HeadFault::TooSlow.reason());
                    return None;
                }
            };
        if h2 {
            return ServerApp::process_new(&Arc::new(H2Face(Arc::clone(self))), stream, shutdown).await;
        }
        let mut buffer = BytesMut::new();
        let mut first = Some(self.settings.head.saturating_sub(accepted.elapsed()));
        let mut stop = shutdown.clone();
        loop {
            let idle = first.take().unwrap_or(self.settings.keepalive);
            let head = tokio::select! { biased;
                head = head::read_head(&mut stream, &mut buffer, idle, &self.settings) => head,
                _ = stop.wait_for(|stopping| *stopping) => return None,
            };
            let length = *head.as_ref().unwrap_or(&0);
            let judged = head.and_then(|length| head::judge(&buffer[..length]).map_err(HeadFault::Malformed));
            let chunked = match judged {
                Ok(chunked) => chunked,
                Err(fault) => {
                    self.refuse_raw(stream, fault).await;
                    return None;
                }
            };
            if chunked {
                stream = Judged::wrap(stream, buffer.split_off(length));
            }
            let mut session = ServerSession::new_http1(stream);
            session.set_keepalive(Some(self.settings.keepalive.as_secs()));
            // Off by default: a second request that comes early would kill the first unanswered (traps, Pingora 2).
            session.set_pipelining_enabled(true);
            session.set_pipelined_prefix(std::mem::take(&mut buffer)); // parsed at once, nothing is read
            (stream, buffer) = self.serve(session, shutdown).await?;
            let unread;
            (stream, unread) = Judged::unwrap(stream);
            buffer.unsplit(unread);
        }
    }

    async fn cleanup(&self) {
        self.proxy.http_cleanup().await
    }
}

/// The same door for h2: Pingora's own accept loop gives it one session per stream.
struct H2Face<P>(Arc<Door<P>>);

#[async_trait]
impl<P: HttpServerApp + Send + Sync + 'static> HttpServerApp for H2Face<P> {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        self.0.serve(session, shutdown).await;
        None
    }
    fn h2_options(&self) -> Option<H2Options> {
        // Pingora's defaults know nothing of our limits.
        let mut options = H2Options::new();
        options.max_header_list_size(u32::try_from(self.0.settings.head_bytes).unwrap_or(u32::MAX));
        options.max_concurrent_streams(H2_STREAMS);
        Some(options)
    }
    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.0.h2c)
    }
}
