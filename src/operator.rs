//! The operator's own listener, never reachable from the public one:
//!
//! | route | what |
//! |---|---|
//! | `GET /` | *Live Activity*, a page |
//! | `GET /api/v1/audit/stream` | the audit's records as they are written, as SSE; `?running=1` adds what runs, once a second |
//! | `GET /api/v1/activity` | what runs, the counters and the backends at this moment, as JSON |
//! | `GET /metrics` | Prometheus' text format |
//! | `GET /livez` | the process answers |
//! | `GET /readyz` | it takes requests: not draining, the audit can be written, and there are keys to verify tokens with |
//!
//! - [`gate`]: which names it answers to, and the credential.
//! - [`page`]: the page's files.
//! - [`feed`]: what one watcher is sent, and when.
//! - [`board`]: what runs, what was counted, what the backends hold.
//! - [`lookout`]: looks at the proxy itself once a second, and raises alerts.
//!
//! Pingora's `ServeHttp` builds whole replies only, and a feed has no end: so this is an `HttpServerApp` (traps, Pingora 9).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{self, HeaderName};
use http::{Method, Version};
use pingora::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use tokio::time::timeout;

use crate::ledger::{Activity, metrics};
use crate::site::Site;

mod board;
mod feed;
pub mod gate;
pub mod lookout;
mod page;

use self::board::Board;
use self::feed::{Feed, Pace};
use self::gate::{Gate, Verdict};

/// An idle connection is kept so long.
const KEEPALIVE_S: u64 = 60;
/// For the next head, the idle time before it included.
const HEAD: Duration = Duration::from_secs(75);
/// A reply that is not taken in this time is given up, and a watcher with it.
const STALL: Duration = Duration::from_secs(30);

const TEXT: &str = "text/plain; charset=utf-8";

pub struct Operator {
    site: Arc<Site>,
    gate: Gate,
    board: Arc<Board>,
    pace: Pace,
}

impl Operator {
    /// `public`: where clients connect, for the page to say.
    pub fn new(site: Arc<Site>, gate: Gate, public: SocketAddr) -> Operator {
        Operator { board: Arc::new(Board::new(Arc::clone(&site), public)), site, gate, pace: Pace::default() }
    }

    /// The reply to a request, unless it is the feed's.
    fn answer(&self, head: &RequestHeader) -> Answer {
        let path = head.uri.path();
        match self.gate.judge(head, path == "/livez") {
            Verdict::Pass => {}
            Verdict::UnknownHost => {
                return Answer::text(
                    421,
                    "unknown Host; use the listener's address or localhost, or add the name to operator.hosts\n",
                );
            }
            Verdict::OtherSite => return Answer::text(403, "asked by a page of another site\n"),
            Verdict::NoCredential => {
                return Answer::text(
                    401,
                    "the operator's credential is needed, as a Bearer token or a Basic password\n",
                )
                .with(header::WWW_AUTHENTICATE, r#"Basic realm="behavry-ollama-proxy operator", charset="UTF-8""#);
            }
        }
        if head.method != Method::GET {
            return Answer::text(405, "GET only\n").with(header::ALLOW, "GET");
        }
        match path {
            feed::PATH => Answer::Feed,
            "/api/v1/activity" => Answer::whole("application/json", self.board.whole()),
            "/metrics" => Answer::whole(metrics::CONTENT_TYPE, self.metrics()),
            "/livez" => Answer::text(200, "ok\n"),
            "/readyz" if self.site.is_draining() => Answer::text(503, "draining\n"),
            "/readyz" if !self.site.ledger.audit.is_writing() => Answer::text(503, "the audit cannot be written\n"),
            "/readyz" if !self.site.snapshot.load().verifier.has_keys() => {
                Answer::text(503, "no keys yet: identity.jwks_url has not given any\n")
            }
            "/readyz" => Answer::text(200, "ok\n"),
            _ => match page::file(path) {
                Some((content_type, body)) => Answer::whole(content_type, body),
                None => Answer::text(404, "unknown route; try /, /metrics, /livez or /readyz\n"),
            },
        }
    }

    /// What others count for reasons of their own is read when it is asked for.
    fn metrics(&self) -> String {
        let metrics = &self.site.ledger.metrics;
        metrics.memory_held("requests", self.site.intake.memory.held_bytes());
        metrics.memory_held("replies", self.site.replies.held_bytes());
        for backend in self.site.pool.backends() {
            let (own, models) = backend.breakers(Instant::now());
            metrics.breakers_open(&backend.name, usize::from(own.is_open()) + models.len());
        }
        metrics.render()
    }

    /// Serves the feed until either side ends it. There is no way back to the connection's next request.
    async fn stream(&self, session: &mut ServerSession, shutdown: &ShutdownWatch) -> pingora::Result<()> {
        let activity: &Arc<Activity> = self.site.ledger.audit.activity();
        let Some(_watching) = activity.watch() else {
            return write(session, Reply::text(503, "too many watch already; close a page and try again\n")).await;
        };
        let head = session.req_header();
        let last = head.headers.get("last-event-id").and_then(|id| id.to_str().ok());
        let runs = head.uri.query().is_some_and(|query| query.split('&').any(|pair| pair == "running=1"));
        let mut feed = Feed::new(Arc::clone(activity), runs.then(|| Arc::clone(&self.board)), last, self.pace);
        let mut reply = reply_head(200, "text/event-stream")?;
        if head.version == Version::HTTP_11 {
            reply.insert_header(header::TRANSFER_ENCODING, "chunked")?;
        }
        session.set_keepalive(None);
        session.write_response_header(Box::new(reply)).await?;
        let mut stop = shutdown.clone();
        loop {
            let part = tokio::select! { biased;
                _ = stop.wait_for(|stopping| *stopping) => break,
                // It has nothing more to say: whatever comes is its leaving.
                _ = session.read_body_or_idle(true) => return Ok(()),
                part = feed.next() => part,
            };
            match timeout(STALL, session.write_response_body(part, false)).await {
                Ok(written) => written?,
                Err(_) => return Ok(()),
            }
        }
        session.write_response_body(Bytes::new(), true).await
    }
}

#[async_trait]
impl HttpServerApp for Operator {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        // What cannot be parsed is closed without a word: no client of ours sends it.
        if !timeout(HEAD, session.read_request()).await.ok()?.ok()? {
            return None;
        }
        session.set_keepalive((!*shutdown.borrow()).then_some(KEEPALIVE_S));
        let written = match self.answer(session.req_header()) {
            Answer::Feed => {
                // A watcher that leaves in the middle is no error of anybody's.
                let _ = self.stream(&mut session, shutdown).await;
                session.shutdown().await;
                return None;
            }
            Answer::Whole(reply) => timeout(STALL, write(&mut session, reply)).await,
        };
        if !matches!(written, Ok(Ok(()))) {
            session.shutdown().await;
            return None;
        }
        let settings = HttpPersistentSettings::for_session(&session);
        let reusable = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(reusable, settings))
    }
}

enum Answer {
    Feed,
    Whole(Reply),
}

struct Reply {
    status: u16,
    content_type: &'static str,
    body: Bytes,
    more: Option<(HeaderName, &'static str)>,
}

impl Reply {
    fn text(status: u16, body: &'static str) -> Reply {
        Reply { status, content_type: TEXT, body: Bytes::from_static(body.as_bytes()), more: None }
    }
}

impl Answer {
    fn text(status: u16, body: &'static str) -> Answer {
        Answer::Whole(Reply::text(status, body))
    }

    fn whole(content_type: &'static str, body: impl Into<Bytes>) -> Answer {
        Answer::Whole(Reply { status: 200, content_type, body: body.into(), more: None })
    }

    fn with(mut self, name: HeaderName, value: &'static str) -> Answer {
        if let Answer::Whole(reply) = &mut self {
            reply.more = Some((name, value));
        }
        self
    }
}

async fn write(session: &mut ServerSession, reply: Reply) -> pingora::Result<()> {
    let mut head = reply_head(reply.status, reply.content_type)?;
    head.insert_header(header::CONTENT_LENGTH, reply.body.len())?;
    if let Some((name, value)) = reply.more {
        head.insert_header(name, value)?;
    }
    session.write_response_header(Box::new(head)).await?;
    session.write_response_body(reply.body, true).await
}

/// What every reply here says: nothing of it is kept, embedded, or taken for something else.
fn reply_head(status: u16, content_type: &'static str) -> pingora::Result<ResponseHeader> {
    let mut head = ResponseHeader::build(status, Some(12))?;
    head.insert_header(header::CONTENT_TYPE, content_type)?;
    head.insert_header(header::CACHE_CONTROL, "no-store")?;
    head.insert_header(header::CONTENT_SECURITY_POLICY, page::SECURITY_POLICY)?;
    head.insert_header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")?;
    head.insert_header(header::REFERRER_POLICY, "no-referrer")?;
    head.insert_header(HeaderName::from_static("cross-origin-resource-policy"), "same-origin")?;
    head.insert_header(HeaderName::from_static("cross-origin-opener-policy"), "same-origin")?;
    Ok(head)
}
