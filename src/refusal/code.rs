//! The closed set of reasons: status, stable text, and what a client should do by itself (contract, section 5).

/// Why, as a closed set. The texts are stable: clients and dashboards compare them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    AmbiguousBody,
    InvalidBody,
    BadFraming,
    UnsupportedOperation,
    UnsupportedParameter,
    MissingToken,
    InvalidToken,
    PolicyDenied,
    PolicyEscalated,
    InsufficientScope,
    Revoked,
    EgressDenied,
    UnknownRoute,
    MethodNotAllowed,
    SlowRequest,
    BodyTooLarge,
    UnsupportedEncoding,
    HeadTooLarge,
    RateLimited,
    BudgetExhausted,
    /// `queue_full`, because this caller has its share already (429).
    QueueShareFull,
    InternalError,
    BadBackendReply,
    BackendUnreachable,
    AuditUnavailable,
    PolicyUnavailable,
    /// Keys come from a URL that has not answered yet. Not in the contract's table.
    KeysUnavailable,
    /// The control plane gives no tokens now. Not in the contract's table.
    ControlPlaneUnavailable,
    NoBackend,
    /// `queue_full`, because the whole queue is (503).
    QueueFull,
    /// The proxy is stopping. Not in the contract's table: it serves requests and streams that a shutdown meets.
    ShuttingDown,
    BackendTimeout,
}

/// What a client should do with a refusal by itself. openai-python retries 408, 409, 429 and every 5xx, and obeys
/// `x-should-retry` and `Retry-After` (ollama-wire, section 9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same request would be refused again: `x-should-retry: false`.
    Never,
    /// Later: `Retry-After`, with these seconds unless the refusal knows better.
    After(u32),
    /// As the client thinks right.
    Unsaid,
}

impl Code {
    /// Every code, in the order of its status.
    pub const ALL: [Code; 32] = {
        use Code::*;
        [
            AmbiguousBody,
            InvalidBody,
            BadFraming,
            UnsupportedOperation,
            UnsupportedParameter,
            MissingToken,
            InvalidToken,
            PolicyDenied,
            PolicyEscalated,
            InsufficientScope,
            Revoked,
            EgressDenied,
            UnknownRoute,
            MethodNotAllowed,
            SlowRequest,
            BodyTooLarge,
            UnsupportedEncoding,
            HeadTooLarge,
            RateLimited,
            BudgetExhausted,
            QueueShareFull,
            InternalError,
            BadBackendReply,
            BackendUnreachable,
            AuditUnavailable,
            PolicyUnavailable,
            KeysUnavailable,
            ControlPlaneUnavailable,
            NoBackend,
            QueueFull,
            ShuttingDown,
            BackendTimeout,
        ]
    };

    /// Status, stable text, advice: the contract's table.
    #[rustfmt::skip]
    const fn row(self) -> (u16, &'static str, Retry) {
        use Retry::*;
        match self {
            Code::AmbiguousBody        => (400, "ambiguous_body", Unsaid),
            Code::InvalidBody          => (400, "invalid_body", Unsaid),
            Code::BadFraming           => (400, "bad_framing", Unsaid),
            Code::UnsupportedOperation => (400, "unsupported_operation", Unsaid),
            Code::UnsupportedParameter => (400, "unsupported_parameter", Unsaid),
            Code::MissingToken         => (401, "missing_token", Unsaid),
            Code::InvalidToken         => (401, "invalid_token", Unsaid),
            Code::PolicyDenied         => (403, "policy_denied", Never),
            Code::PolicyEscalated      => (403, "policy_escalated", Never),
            Code::InsufficientScope    => (403, "insufficient_scope", Never),
            Code::Revoked              => (403, "revoked", Never),
            Code::EgressDenied         => (403, "egress_denied", Never),
            Code::UnknownRoute         => (404, "unknown_route", Unsaid),
            Code::MethodNotAllowed     => (405, "method_not_allowed", Unsaid),
            Code::SlowRequest          => (408, "slow_request", Unsaid),
            Code::BodyTooLarge         => (413, "body_too_large", Unsaid),
            Code::UnsupportedEncoding  => (415, "unsupported_encoding", Unsaid),
            Code::HeadTooLarge         => (431, "head_too_large", Unsaid),
            Code::RateLimited          => (429, "rate_limited", After(1)),
            Code::BudgetExhausted      => (429, "budget_exhausted", After(60)),
            Code::QueueShareFull       => (429, "queue_full", After(1)),
            // What made us panic would do so again.
            Code::InternalError        => (500, "internal_error", Never),
            Code::BadBackendReply      => (502, "bad_backend_reply", Unsaid),
            Code::BackendUnreachable   => (502, "backend_unreachable", Unsaid),
            Code::AuditUnavailable     => (503, "audit_unavailable", After(5)),
            Code::PolicyUnavailable    => (503, "policy_unavailable", After(5)),
            Code::KeysUnavailable      => (503, "keys_unavailable", After(5)),
            Code::ControlPlaneUnavailable => (503, "control_plane_unavailable", After(5)),
            Code::NoBackend            => (503, "no_backend", After(5)),
            Code::QueueFull            => (503, "queue_full", After(1)),
            Code::ShuttingDown         => (503, "shutting_down", After(5)),
            // It took minutes already, and a client that retries by itself would start a second generation.
            Code::BackendTimeout       => (504, "backend_timeout", Never),
        }
    }

    pub const fn status(self) -> u16 {
        self.row().0
    }

    pub const fn as_str(self) -> &'static str {
        self.row().1
    }

    pub const fn retry(self) -> Retry {
        self.row().2
    }

    /// `error.type` as OpenAI's clients know it.
    pub const fn openai_type(self) -> &'static str {
        match self.status() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// `error.type` of Anthropic's own list (<https://docs.anthropic.com/en/api/errors>); 503 as Ollama maps it.
    pub const fn anthropic_type(self) -> &'static str {
        match self.status() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }
}
