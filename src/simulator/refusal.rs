//! Errors in Ollama's words and, by dialect, in their shapes.

use super::models::NoModel;
use super::options::WireForm;
use super::reply::{JSON, JSON_UTF8, Reply};
use super::route::Dialect;
use super::text;

/// An error that Ollama raises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: u16,
    pub message: String,
    pub raised: Raised,
}

/// Who raises it decides some bytes of the reply on the `/v1` routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Raised {
    /// The middleware that binds the body.
    Binding,
    /// The native handler behind it.
    Handler,
    /// The middleware for cloud models, which speaks native everywhere.
    Cloud,
    /// The runner, before its first token.
    Runner,
}

/// The exact words, two spaces included.
pub(super) const QUEUE_FULL: &str = "server busy, please try again.  maximum pending requests exceeded";
pub(super) const RUNNER_STOPPED: &str = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, check ollama server logs for details";
pub(super) const RUNNER_DIED: &str = "an error was encountered while running the model: unexpected EOF";

impl Refusal {
    pub fn binding(message: impl Into<String>) -> Refusal {
        Refusal { status: 400, message: message.into(), raised: Raised::Binding }
    }

    pub fn handler(status: u16, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), raised: Raised::Handler }
    }

    pub fn cloud() -> Refusal {
        let message = "ollama cloud is disabled: remote model is unavailable".to_owned();
        Refusal { status: 403, message, raised: Raised::Cloud }
    }

    /// For a name that leads nowhere; `absent` is what the route says of a model that is not there.
    pub fn no_model(why: NoModel, empty: Refusal, absent: Refusal) -> Refusal {
        match why {
            NoModel::Empty => empty,
            NoModel::BadName => Refusal::handler(400, "invalid model name"),
            NoModel::Cloud => Refusal::cloud(),
            NoModel::Absent => absent,
        }
    }

    /// The error object alone.
    pub fn body(&self, dialect: Dialect, wire: WireForm, request_id: u64) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.message.len() + 128);
        let dialect = if self.raised == Raised::Cloud { Dialect::Native } else { dialect };
        match dialect {
            Dialect::Native => {
                body.extend_from_slice(b"{\"error\":");
                text::string(&mut body, &self.message);
                body.push(b'}');
            }
            Dialect::OpenAi => {
                let kind = match self.status {
                    _ if wire == WireForm::Old && self.raised != Raised::Binding => "api_error",
                    400 => "invalid_request_error",
                    404 => "not_found_error",
                    _ => "api_error",
                };
                body.extend_from_slice(b"{\"error\":{\"message\":");
                text::string(&mut body, &self.message);
                text::print(&mut body, format_args!(",\"type\":\"{kind}\",\"param\":null,\"code\":null}}}}"));
            }
            Dialect::Anthropic => {
                let kind = match self.status {
                    400 => "invalid_request_error",
                    401 => "authentication_error",
                    403 => "permission_error",
                    404 => "not_found_error",
                    429 => "rate_limit_error",
                    503 | 529 => "overloaded_error",
                    _ => "api_error",
                };
                text::print(
                    &mut body,
                    format_args!("{{\"type\":\"error\",\"error\":{{\"type\":\"{kind}\",\"message\":"),
                );
                text::string(&mut body, &self.message);
                text::print(
                    &mut body,
                    format_args!("}},\"request_id\":\"req_{:024x}\"}}", u128::from(request_id) << 32),
                );
            }
        }
        body
    }

    /// The whole reply. `streamed` is whether a stream was asked for.
    pub fn reply(&self, dialect: Dialect, wire: WireForm, request_id: u64, streamed: bool) -> Reply {
        let mut body = self.body(dialect, wire, request_id);
        let plain = matches!(self.raised, Raised::Binding | Raised::Cloud);
        if dialect == Dialect::Native || plain {
            // A native stream's errors before its first record lose the charset, and are flushed.
            return match self.raised {
                Raised::Runner if streamed => Reply::new(self.status, JSON, body).chunked(),
                _ => Reply::new(self.status, JSON_UTF8, body),
            };
        }
        body.push(b'\n');
        let reply = Reply::new(self.status, JSON, body);
        if self.raised == Raised::Runner && streamed { reply.chunked() } else { reply }
    }
}
