//! The operator's own listener, never reachable from the public one:
//!
//! | route | what |
//! |---|---|
//! | `GET /livez` | the process answers |
//! | `GET /readyz` | it takes requests: not draining, the audit can be written, and there are keys to verify tokens with |
//! | `GET /metrics` | Prometheus' text format |

use std::sync::Arc;

use async_trait::async_trait;
use http::{Method, Response};
use pingora::apps::http_app::{HttpServer, ServeHttp};
use pingora::protocols::http::ServerSession;

use crate::ledger::metrics;
use crate::site::Site;

pub struct Operator {
    site: Arc<Site>,
}

impl Operator {
    pub fn app(site: Arc<Site>) -> HttpServer<Operator> {
        HttpServer::new_app(Operator { site })
    }
}

#[async_trait]
impl ServeHttp for Operator {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let head = session.req_header();
        if !is_known_host(head.headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("")) {
            return reply(421, "text/plain; charset=utf-8", "unknown Host; use the listener's address or localhost\n");
        }
        if head.method != Method::GET {
            return reply(405, "text/plain; charset=utf-8", "GET only\n");
        }
        match head.uri.path() {
            "/metrics" => reply(200, metrics::CONTENT_TYPE, self.site.ledger.metrics.render()),
            "/livez" => reply(200, "text/plain; charset=utf-8", "ok\n"),
            "/readyz" if self.site.is_draining() => reply(503, "text/plain; charset=utf-8", "draining\n"),
            "/readyz" if !self.site.ledger.audit.is_writing() => {
                reply(503, "text/plain; charset=utf-8", "the audit cannot be written\n")
            }
            "/readyz" if !self.site.snapshot.load().verifier.has_keys() => {
                reply(503, "text/plain; charset=utf-8", "no keys yet: identity.jwks_url has not given any\n")
            }
            "/readyz" => reply(200, "text/plain; charset=utf-8", "ok\n"),
            _ => reply(404, "text/plain; charset=utf-8", "unknown route; try /metrics, /livez or /readyz\n"),
        }
    }
}

/// A page of somebody else's whose name was made to resolve to us sends that name (DNS rebinding): only addresses and
/// `localhost` are ours.
fn is_known_host(host: &str) -> bool {
    let name = host
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()))
        .map_or(host, |(name, _)| name);
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok()
}

fn reply(status: u16, content_type: &'static str, body: impl Into<Vec<u8>>) -> Response<Vec<u8>> {
    let body = body.into();
    Response::builder()
        .status(status)
        .header(http::header::CONTENT_TYPE, content_type)
        .header(http::header::CONTENT_LENGTH, body.len())
        .body(body)
        .expect("a literal status and literal headers")
}

#[cfg(test)]
mod tests {
    use super::is_known_host;

    #[test]
    fn a_name_that_was_made_to_resolve_to_us_is_unknown() {
        for known in ["localhost", "localhost:5173", "127.0.0.1:5173", "[::1]:5173", "[::1]", "10.0.0.7"] {
            assert!(is_known_host(known), "{known}");
        }
        for unknown in ["", "evil.example", "evil.example:5173", "localhost.evil.example", "127.0.0.1.evil.example:80"]
        {
            assert!(!is_known_host(unknown), "{unknown}");
        }
    }
}
