//! A control plane's token endpoint: requests for tokens are forwarded to it, and its answers judged before a client sees them.
//!
//! Passed back are a token, and an error with one of the four statuses that say something about the request. Everything else (it is
//! down, slow, answers HTML, 404 or 500, redirects) is its own trouble, and not for a client to read. Nothing of a request or an answer
//! is logged: both hold secrets. (docs/adr/0026-keys-by-url.md)

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use serde_json::Value;

use crate::config::ServiceUrl;
use crate::identity::strict_json;
use crate::outbound::{Bounds, Outbound, OutboundError, Reply};

/// Slower than any password hash.
const WITHIN: Duration = Duration::from_secs(10);
/// A token is some KiB at most.
const REPLY_BYTES: usize = 64 * 1024;
/// Statuses that say something about the request: bad, wrong secret, suspended, too many.
const PASSED_BACK: [u16; 4] = [400, 401, 403, 429];
/// RFC 6749 section 5.2: words that may stand in a record. Others could be anything.
const WORDS: [&str; 6] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
];

pub struct ControlPlane {
    outbound: Outbound,
    url: ServiceUrl,
    failing: AtomicBool,
}

/// What a client is sent. No `Debug`: it may hold a token.
pub struct Answer {
    pub status: u16,
    pub body: Bytes,
    /// Its `error`, if the RFC knows it; "" for a token.
    pub word: &'static str,
    /// Of a 429.
    pub retry_after: Option<HeaderValue>,
}

/// Why there is no answer that can be passed back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    Outbound(OutboundError),
    Status(u16),
    /// The status of a token or an error, and a body that is neither.
    BadReply,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unavailable::Outbound(e) => write!(f, "the control plane {e}"),
            Unavailable::Status(status) => write!(f, "the control plane answered {status}"),
            Unavailable::BadReply => f.write_str("the control plane's reply is neither a token nor an error"),
        }
    }
}

impl std::error::Error for Unavailable {}

impl ControlPlane {
    pub fn new(url: ServiceUrl, outbound: Outbound) -> ControlPlane {
        ControlPlane { outbound, url, failing: AtomicBool::new(false) }
    }

    /// Forwards a request as it is. Its size was bounded, and `content_type` is one of those that the endpoint takes.
    pub async fn token(
        &self,
        content_type: &'static str,
        request_id: &str,
        body: Bytes,
    ) -> Result<Answer, Unavailable> {
        let mut headers = vec![
            (http::header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
            (http::header::ACCEPT, HeaderValue::from_static("application/json")),
        ];
        if let Ok(id) = HeaderValue::from_str(request_id) {
            headers.push((HeaderName::from_static("x-request-id"), id));
        }
        let bounds = Bounds { within: WITHIN, reply_bytes: REPLY_BYTES };
        let asked = self.outbound.post(&self.url, &headers, body, bounds).await;
        let answer = asked.map_err(Unavailable::Outbound).and_then(judge);
        let failing = answer.as_ref().err();
        if self.failing.swap(failing.is_some(), Ordering::Relaxed) != failing.is_some() {
            match failing {
                Some(why) => log::error!("no tokens from {}: {why}", self.url),
                None => log::info!("{} answers again", self.url),
            }
        }
        answer
    }
}

fn judge(reply: Reply) -> Result<Answer, Unavailable> {
    let refused = PASSED_BACK.contains(&reply.status);
    if reply.status != 200 && !refused {
        return Err(Unavailable::Status(reply.status));
    }
    let members = strict_json::object(&reply.body).map_err(|_| Unavailable::BadReply)?;
    let text = |name: &str| members.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    let word = if refused {
        // Behavry's has `detail` alone in some.
        let error = text("error").or(text("detail")).ok_or(Unavailable::BadReply)?;
        WORDS.into_iter().find(|word| *word == error).unwrap_or("other")
    } else {
        let token = text("access_token").ok_or(Unavailable::BadReply)?;
        let kind = text("token_type").ok_or(Unavailable::BadReply)?;
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) || !kind.eq_ignore_ascii_case("bearer") {
            return Err(Unavailable::BadReply);
        }
        ""
    };
    let seconds = reply
        .headers
        .get(http::header::RETRY_AFTER)
        .filter(|after| reply.status == 429 && after.len() <= 8 && after.as_bytes().iter().all(u8::is_ascii_digit));
    Ok(Answer { status: reply.status, retry_after: seconds.cloned(), word, body: reply.body })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: u16, body: &str) -> Result<&'static str, Unavailable> {
        let reply = Reply { status, headers: http::HeaderMap::new(), body: Bytes::copy_from_slice(body.as_bytes()) };
        judge(reply).map(|answer| answer.word)
    }

    #[test]
    fn a_token_or_an_error_is_passed_back_and_nothing_else() {
        let token = r#"{"access_token":"a.b.c","token_type":"bearer","expires_in":3600,"agent_id":"a"}"#;
        assert_eq!(judged(200, token), Ok(""));
        assert_eq!(judged(401, r#"{"error":"invalid_client","detail":"no"}"#), Ok("invalid_client"));
        assert_eq!(judged(403, r#"{"detail":"suspended"}"#), Ok("other"));
        assert_eq!(judged(429, r#"{"error":"made up"}"#), Ok("other"));
        for (status, body) in [
            (200, ""),
            (200, "<html>"),
            (200, "{}"),
            (200, r#"{"access_token":"a.b.c"}"#),
            (200, r#"{"access_token":"","token_type":"Bearer"}"#),
            (200, r#"{"access_token":"a b","token_type":"Bearer"}"#),
            (200, r#"{"access_token":"a","access_token":"b","token_type":"Bearer"}"#),
            (200, r#"{"access_token":"a","token_type":"mac"}"#),
            (401, "{}"),
            (400, "not JSON"),
        ] {
            assert_eq!(judged(status, body), Err(Unavailable::BadReply), "{status} {body}");
        }
        for status in [201, 204, 301, 302, 404, 500, 503] {
            assert_eq!(judged(status, token), Err(Unavailable::Status(status)));
        }
    }
}
