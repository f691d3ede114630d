//! A backend as Pingora's connector sees it, and the head that it is sent.

use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderName, Method};
use pingora::http::RequestHeader;
use pingora::upstreams::peer::HttpPeer;

use super::Backend;

/// An idle pooled connection is given up after this. Ollama itself never closes one (ollama-wire, section 1).
const POOLED_IDLE: Duration = Duration::from_secs(90);

/// A pool in which no connection is kept.
const FRESH: u64 = 1 << 63;

/// The headers of a client that reach a backend (contract, section 1), and no other: no credential, no identity, no `Origin`
/// (which Ollama answers with 403), nothing hop-by-hop.
static PASSED_ON: [HeaderName; 7] = [
    http::header::CONTENT_TYPE,
    http::header::ACCEPT,
    http::header::USER_AGENT,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("anthropic-version"),
    HeaderName::from_static("anthropic-beta"),
];

/// The peer for one attempt at one of the backend's addresses.
///
/// `fresh`: over a connection of its own, and none that is kept for others or was.
pub fn peer(backend: &Backend, address: SocketAddr, fresh: bool) -> HttpPeer {
    let url = &backend.url;
    // With rustls an empty SNI together with a CA turns verification off (traps, Pingora 15); the configuration refuses empty hosts.
    let mut peer = HttpPeer::new(address, url.is_tls(), url.host().to_owned());
    // Connections are pooled by address and name, and not by CA: what one backend's CA has verified is not another backend's.
    peer.group_key = backend.place as u64 | if fresh { FRESH } else { 0 };
    let options = &mut peer.options;
    options.ca = backend.authorities.clone();
    // None of these has a default (traps, Pingora 3).
    options.connection_timeout = Some(backend.connect);
    options.total_connection_timeout = Some(backend.connect);
    options.read_timeout = Some(backend.silence);
    options.write_timeout = Some(backend.silence);
    options.idle_timeout = Some(if fresh { Duration::ZERO } else { POOLED_IDLE });
    options.http_upstream_request_policy.h1_upgrade = pingora::upstreams::peer::H1UpgradePolicy::Deny;
    peer
}

/// Rewrites `head`, a client's, into the one that the backend gets.
///
/// The target is the table's, and always in origin form with the backend's `Host`: on a custom session Pingora's authority
/// checks are off, and Ollama on loopback answers 403 to a foreign host (traps, Pingora 1; ollama-wire, section 1).
pub fn rewrite_head(
    head: &mut RequestHeader,
    backend: &Backend,
    target: &str,
    query: Option<&str>,
    request_id: &str,
    body_bytes: Option<usize>,
) -> pingora::Result<()> {
    let client = std::mem::replace(head, build(&head.method.clone(), backend, target, query, request_id)?);
    for name in &PASSED_ON {
        for value in client.headers.get_all(name) {
            head.append_header(name.clone(), value.clone())?;
        }
    }
    match body_bytes {
        Some(bytes) => head.insert_header(http::header::CONTENT_LENGTH, bytes)?,
        // A body that passes as it comes keeps the client's framing.
        None => {
            for name in [http::header::CONTENT_LENGTH, http::header::TRANSFER_ENCODING] {
                if let Some(value) = client.headers.get(&name) {
                    head.insert_header(name, value.clone())?;
                }
            }
        }
    }
    Ok(())
}

/// A head of our own.
pub fn build(
    method: &Method,
    backend: &Backend,
    target: &str,
    query: Option<&str>,
    request_id: &str,
) -> pingora::Result<RequestHeader> {
    let target = match query {
        Some(query) => format!("{target}?{query}"),
        None => target.to_owned(),
    };
    let mut head = RequestHeader::build(method.clone(), target.as_bytes(), Some(12))?;
    head.insert_header(http::header::HOST, backend.url.authority())?;
    // Counts are read from plain bytes, so no reply may be compressed (traps, Pingora 11).
    head.insert_header(http::header::ACCEPT_ENCODING, "identity")?;
    head.insert_header("x-request-id", request_id)?;
    if let Some(authorization) = backend.authorization() {
        head.insert_header(http::header::AUTHORIZATION, authorization)?;
    }
    Ok(head)
}
