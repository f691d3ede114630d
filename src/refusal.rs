//! Every reason we answer instead of Ollama: status, stable code, words that say what to do, and the shape that the
//! caller's client reads (contract, section 5).
//!
//! A [`Refusal`] is pure data. It writes to no socket: whoever answers takes its status, headers and body, and the door
//! takes its [`frame`](Refusal::frame) once a reply has begun. No prompt, reply or token gets into its words; what a
//! caller reads and what the audit says of it are two texts, because a bad token's cause is nobody's but the audit's.

pub mod code;

use std::borrow::Cow;

use serde::Serialize;

pub use code::{Code, Retry};

use crate::wire::Dialect;
use crate::wire::failure::{Failure, Stream};

/// Most bytes of a policy's own words that are repeated to a caller.
const REASONS_MAX_BYTES: usize = 1024;

/// A request that we answer ourselves, or a reply that we end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    /// Words for the client: what happened and what to do.
    pub detail: Cow<'static, str>,
    /// Words for the audit's `error`: closed or short, never content. The code, where it says enough.
    pub cause: Cow<'static, str>,
    /// Seconds for `Retry-After`, where more is known than the code's own advice.
    pub retry_after_s: Option<u32>,
    /// `Allow` of a 405.
    pub allow: Option<&'static str>,
    /// OpenAI's `param`: the member of the request that is at fault.
    pub param: Option<String>,
    /// Bifrost's `request_type` of an operation that is not offered.
    pub operation: Option<&'static str>,
}

impl Refusal {
    fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal {
            code,
            detail: detail.into(),
            cause: Cow::Borrowed(code.as_str()),
            retry_after_s: None,
            allow: None,
            param: None,
            operation: None,
        }
    }

    /// The same refusal with other words for the audit.
    pub fn because(mut self, cause: impl Into<Cow<'static, str>>) -> Refusal {
        self.cause = cause.into();
        self
    }

    // ---- 400

    /// A body that two JSON readers could understand differently (ollama-wire, section 7). `what` never quotes it.
    pub fn ambiguous_body(what: impl Into<Cow<'static, str>>) -> Refusal {
        let what = what.into();
        Refusal::new(
            Code::AmbiguousBody,
            format!("The body could be read in two ways: {what}. Send it in one spelling."),
        )
        .because(what)
    }

    /// A body that is no JSON of this endpoint. `what` never quotes it.
    pub fn invalid_body(what: impl Into<Cow<'static, str>>) -> Refusal {
        let what = what.into();
        Refusal::new(Code::InvalidBody, format!("The body is not valid here: {what}.")).because(what)
    }

    /// A head or a framing on which two HTTP parsers could disagree.
    pub fn bad_framing(what: impl Into<Cow<'static, str>>) -> Refusal {
        let what = what.into();
        Refusal::new(Code::BadFraming, format!("The request is not well-formed HTTP: {what}.")).because(what)
    }

    /// An operation that Ollama's provider does not have. The message is Bifrost's (bifrost-compat, section 6).
    pub fn unsupported_operation(operation: &'static str) -> Refusal {
        let mut refusal =
            Refusal::new(Code::UnsupportedOperation, format!("{operation} is not supported by ollama provider"));
        refusal.operation = Some(operation);
        refusal
    }

    /// A member of the request that cannot be honoured; `param` is its name as in `input[2].type`.
    pub fn unsupported_parameter(param: impl Into<String>) -> Refusal {
        let param = param.into();
        let mut refusal =
            Refusal::new(Code::UnsupportedParameter, format!("{param} is not supported here. Leave it out."));
        refusal.param = Some(param);
        refusal
    }

    /// Management of one of several backends, and it is not clear of which.
    pub fn which_backend(names: &[&str]) -> Refusal {
        let mut refusal = Refusal::new(
            Code::UnsupportedParameter,
            format!("Say which backend is meant, in the header x-behavry-backend: {}.", names.join(", ")),
        )
        .because("no backend of several is named");
        refusal.param = Some("x-behavry-backend".to_owned());
        refusal
    }

    // ---- 401

    pub fn missing_token() -> Refusal {
        Refusal::new(
            Code::MissingToken,
            "No token was sent. Send `Authorization: Bearer <token>`; fetch a token: POST /api/v1/auth/token",
        )
    }

    /// One wording for every cause: what is wrong with a token helps only someone who forges one. `cause` is the
    /// audit's and the metric's word.
    pub fn invalid_token(cause: &'static str) -> Refusal {
        Refusal::new(
            Code::InvalidToken,
            "The token is not valid or has expired; fetch a new token: POST /api/v1/auth/token",
        )
        .because(cause)
    }

    // ---- 403

    /// The policy says no, in its own words.
    pub fn policy_denied(reasons: &[String]) -> Refusal {
        Refusal::new(Code::PolicyDenied, with_reasons("The policy denies this request", reasons))
    }

    /// The policy wants someone else to decide; nobody here can, so it is refused with a code of its own.
    pub fn policy_escalated(reasons: &[String]) -> Refusal {
        Refusal::new(
            Code::PolicyEscalated,
            with_reasons("The policy escalates this request, and it is refused until it is approved", reasons),
        )
    }

    /// `permission` is the missing one, such as `web:write`.
    pub fn insufficient_scope(permission: &'static str) -> Refusal {
        Refusal::new(
            Code::InsufficientScope,
            format!("The token lacks the permission {permission}. Ask for it and fetch a new token."),
        )
        .because(format!("missing permission {permission}"))
    }

    pub fn revoked() -> Refusal {
        Refusal::new(Code::Revoked, "This token or its agent was revoked. Ask the operator for access.")
    }

    /// `what` is what would leave the premises, such as `a cloud model`.
    pub fn egress_denied(what: impl Into<Cow<'static, str>>) -> Refusal {
        let what = what.into();
        Refusal::new(
            Code::EgressDenied,
            format!("This would send data off the premises ({what}), and the operator has not allowed it."),
        )
        .because(what)
    }

    // ---- 404, 405

    pub fn unknown_route() -> Refusal {
        Refusal::new(
            Code::UnknownRoute,
            "This path is not served. Ollama's own paths are, also below /api/v1/ollama, each in one spelling.",
        )
    }

    /// The backend's Ollama is older than `since`, which brought the route.
    pub fn route_of_a_newer_ollama(path: &str, since: &str) -> Refusal {
        Refusal::new(
            Code::UnknownRoute,
            format!("The Ollama behind this proxy has no {path}: it needs Ollama {since} or later. Upgrade it, or use a route that it has."),
        )
        .because("the backend's Ollama is too old for the route")
    }

    pub fn method_not_allowed(allow: &'static str) -> Refusal {
        let mut refusal =
            Refusal::new(Code::MethodNotAllowed, format!("This path does not take that method. It takes {allow}."));
        refusal.allow = Some(allow);
        refusal
    }

    // ---- 408, 413, 415, 431

    /// `what` is `head` or `body`.
    pub fn slow_request(what: &'static str) -> Refusal {
        Refusal::new(Code::SlowRequest, format!("The request's {what} did not arrive in time. Send it again."))
            .because(format!("slow {what}"))
    }

    /// A reader that took too little of its reply while more waited for it.
    pub fn slow_reader() -> Refusal {
        Refusal::new(Code::SlowRequest, "The reply was not read in time, and the stream was ended.")
            .because("slow reader")
    }

    pub fn body_too_large(limit_bytes: u64) -> Refusal {
        Refusal::new(
            Code::BodyTooLarge,
            format!("The body is larger than the limit of {limit_bytes} bytes. Send less, or ask the operator."),
        )
    }

    pub fn unsupported_encoding() -> Refusal {
        Refusal::new(
            Code::UnsupportedEncoding,
            "This Content-Encoding is not accepted, because the body has to be read. Send it as it is (identity).",
        )
    }

    pub fn head_too_large(limit_bytes: usize) -> Refusal {
        Refusal::new(
            Code::HeadTooLarge,
            format!("The request line and headers are larger than the limit of {limit_bytes} bytes."),
        )
    }

    // ---- 429

    pub fn rate_limited(retry_after_s: u32) -> Refusal {
        Refusal::new(Code::RateLimited, "Too many requests. Wait as long as Retry-After says.").after(retry_after_s)
    }

    /// `budget` names it, such as `tokens of this hour`.
    pub fn budget_exhausted(budget: &str, retry_after_s: u32) -> Refusal {
        Refusal::new(
            Code::BudgetExhausted,
            format!("The budget is spent ({budget}). Wait as long as Retry-After says."),
        )
        .because(format!("budget: {budget}"))
        .after(retry_after_s)
    }

    pub fn queue_share_full(retry_after_s: u32) -> Refusal {
        Refusal::new(Code::QueueShareFull, "Too many of your requests are waiting. Let some finish first.")
            .because("caller's share of the queue is full")
            .after(retry_after_s)
    }

    // ---- 500

    /// A panic of ours. Its payload never gets here.
    pub fn internal_error() -> Refusal {
        Refusal::new(Code::InternalError, "An error of the proxy. Tell the operator the x-request-id of this reply.")
    }

    // ---- 502

    /// `cause` says what was observed, without the backend's bytes.
    pub fn bad_backend_reply(cause: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal::new(
            Code::BadBackendReply,
            "Ollama's reply could not be understood. Try again; if it stays, tell the operator.",
        )
        .because(cause)
    }

    /// The backend ended its reply before it was complete. It has no status of its own, since the head is gone.
    pub fn backend_cut(cause: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal::new(Code::BadBackendReply, "Ollama's reply ended before it was complete. Send the request again.")
            .because(cause)
    }

    /// S0's wording. `urls` are the backends that were tried, without user and password.
    pub fn backend_unreachable(urls: &[&str]) -> Refusal {
        Refusal::new(Code::BackendUnreachable, format!("Cannot reach Ollama at {}. Is it running?", urls.join(", ")))
    }

    // ---- 503

    pub fn audit_unavailable(cause: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal::new(
            Code::AuditUnavailable,
            "The audit cannot be written, so nothing is served. Try again later, or tell the operator.",
        )
        .because(cause)
    }

    pub fn policy_unavailable(cause: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal::new(
            Code::PolicyUnavailable,
            "The policy could not be evaluated, so nothing is served. Try again later, or tell the operator.",
        )
        .because(cause)
    }

    /// Nothing is wrong with the token as far as anybody can tell.
    pub fn keys_unavailable() -> Refusal {
        Refusal::new(
            Code::KeysUnavailable,
            "The keys that verify tokens could not be fetched yet, so nothing is served. Try again later, or tell the operator.",
        )
    }

    /// `cause` says what was observed of the control plane, without its bytes.
    pub fn control_plane_unavailable(cause: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal::new(
            Code::ControlPlaneUnavailable,
            "The control plane gives no tokens now. Try again later, or tell the operator.",
        )
        .because(cause)
    }

    pub fn no_backend() -> Refusal {
        Refusal::new(Code::NoBackend, "No Ollama is available for this request. Try again later.")
    }

    /// The whole queue, or another bound of the whole proxy. `cause` says which.
    pub fn queue_full(cause: &'static str) -> Refusal {
        Refusal::new(Code::QueueFull, "The proxy has as much to do as it may. Try again later.").because(cause)
    }

    pub fn queue_whole_full(retry_after_s: u32) -> Refusal {
        Refusal::new(Code::QueueFull, "The queue is full. Wait as long as Retry-After says.")
            .because("the queue is full")
            .after(retry_after_s)
    }

    /// It waited in the queue until the configuration's limit.
    pub fn waited_in_vain(wait_s: u64) -> Refusal {
        Refusal::new(Code::QueueFull, format!("No backend was free for {wait_s} seconds. Try again later."))
            .because("queue.wait_s has passed")
    }

    pub fn shutting_down() -> Refusal {
        Refusal::new(Code::ShuttingDown, "The proxy is shutting down. Send the request again.")
    }

    // ---- 504

    pub fn backend_timeout(silence_s: u64) -> Refusal {
        Refusal::new(
            Code::BackendTimeout,
            format!("Ollama was silent for {silence_s} s. Use a smaller model or hardware with more memory."),
        )
    }

    fn after(mut self, retry_after_s: u32) -> Refusal {
        self.retry_after_s = Some(retry_after_s);
        self
    }

    // ---- as a reply

    pub fn status(&self) -> u16 {
        self.code.status()
    }

    /// The headers that belong to the refusal. Length, date, connection and `x-request-id` are the answerer's.
    pub fn headers(&self) -> Vec<(&'static str, Cow<'static, str>)> {
        // The charset is what Ollama itself says; ollama-js reads an error only from a type with `application/json`.
        let mut headers = vec![("content-type", Cow::Borrowed("application/json; charset=utf-8"))];
        if self.status() == 401 {
            headers.push(("www-authenticate", Cow::Borrowed("Bearer")));
        }
        if let Some(allow) = self.allow {
            headers.push(("allow", Cow::Borrowed(allow)));
        }
        match (self.code.retry(), self.retry_after_s) {
            (Retry::Never, _) => headers.push(("x-should-retry", Cow::Borrowed("false"))),
            (Retry::After(_), Some(seconds)) | (Retry::After(seconds), None) => {
                headers.push(("retry-after", Cow::Owned(seconds.to_string())));
            }
            (Retry::Unsaid, _) => {}
        }
        headers
    }

    /// The body in the caller's dialect. Only Anthropic's shape carries the request id.
    pub fn body(&self, dialect: Dialect, request_id: &str) -> Vec<u8> {
        match dialect {
            Dialect::Native => {
                json(&NativeBody { error: &self.detail, detail: &self.detail, code: self.code.as_str() })
            }
            Dialect::OpenAi => json(&OpenAiBody {
                error: self.openai(),
                detail: &self.detail,
                extra_fields: self.operation.map(|request_type| ExtraFields { provider: "ollama", request_type }),
            }),
            Dialect::Anthropic => json(&self.anthropic(Some(request_id))),
        }
    }

    /// The error frame that ends a stream whose head is gone; see [`Failure::frame`].
    pub fn frame(&self, stream: Stream, mid_record: bool) -> Vec<u8> {
        let failure = Failure {
            message: &self.detail,
            openai_type: self.code.openai_type(),
            anthropic_type: self.code.anthropic_type(),
            code: Some(self.code.as_str()),
            param: self.param.as_deref(),
        };
        failure.frame(stream, mid_record)
    }

    fn openai(&self) -> OpenAiError<'_> {
        OpenAiError {
            message: &self.detail,
            r#type: self.code.openai_type(),
            param: self.param.as_deref(),
            code: self.code.as_str(),
        }
    }

    fn anthropic<'a>(&'a self, request_id: Option<&'a str>) -> AnthropicBody<'a> {
        AnthropicBody {
            r#type: "error",
            error: AnthropicError { r#type: self.code.anthropic_type(), message: &self.detail },
            request_id,
        }
    }
}

#[derive(Serialize)]
struct NativeBody<'a> {
    error: &'a str,
    detail: &'a str,
    code: &'a str,
}

#[derive(Serialize)]
struct OpenAiBody<'a> {
    error: OpenAiError<'a>,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    extra_fields: Option<ExtraFields<'a>>,
}

#[derive(Serialize)]
struct OpenAiError<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: &'a str,
}

#[derive(Serialize)]
struct ExtraFields<'a> {
    provider: &'a str,
    request_type: &'a str,
}

#[derive(Serialize)]
struct AnthropicBody<'a> {
    r#type: &'a str,
    error: AnthropicError<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
}

#[derive(Serialize)]
struct AnthropicError<'a> {
    r#type: &'a str,
    message: &'a str,
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("a struct of strings always serialises")
}

/// `what: reason; reason`, bounded: a policy may make a set of any size.
fn with_reasons(what: &str, reasons: &[String]) -> String {
    let mut text = what.to_owned();
    if reasons.is_empty() {
        text.push('.');
        return text;
    }
    let mut room = REASONS_MAX_BYTES;
    for (i, reason) in reasons.iter().enumerate() {
        text.push_str(if i == 0 { ": " } else { "; " });
        if reason.len() > room {
            let end = (0..=room).rev().find(|i| reason.is_char_boundary(*i)).unwrap_or(0);
            text.push_str(&reason[..end]);
            text.push_str(" ..");
            break;
        }
        text.push_str(reason);
        room = (room - reason.len()).saturating_sub(2);
    }
    text
}

#[cfg(test)]
mod tests;
