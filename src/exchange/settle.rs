//! How an exchange ended, and its one final record.

use std::time::Duration;

use super::{Exchange, Fault, Left};
use crate::ledger::metrics::ShieldedLoad;
use crate::ledger::{Entry, Ledger, Measures, Outcome};
use crate::live::Cut;
use crate::refusal::Code;
use crate::wire::Kind;
use crate::wire::convert;
use crate::wire::meter::Usage;

/// What the door saw at the end, after the hooks were done and the client had everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ending {
    pub panicked: bool,
    pub cut: Option<Cut>,
    /// The reply's head was sent, and its end never came.
    pub broken: bool,
    pub slow_reader: bool,
    pub client_gone: bool,
    /// The client left before its reply began.
    pub left: Option<Left>,
    /// Bytes of the backend's reply were still waiting for the client.
    pub unsent: bool,
    /// The status of an answer that the door itself wrote.
    pub status: Option<u16>,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Exchange {
    /// Writes the final record and moves the metrics.
    pub fn settle(mut self, ledger: &Ledger, ending: Ending) {
        let mut usage = self.meter.as_mut().map(|meter| meter.finish());
        if let (Some(usage), Some(mender)) = (&mut usage, &self.mender) {
            usage.error_frame |= mender.told_error(); // a bare line is no record to the meter
        }
        let outcome = self.outcome(&ending, usage.as_ref());
        if let Some(lease) = &self.lease
            && matches!(outcome, Outcome::UpstreamError | Outcome::UpstreamReset | Outcome::Timeout)
        {
            lease.ended(None);
        }
        if ending.left == Some(Left::Shielded) {
            ledger.metrics.load_shielded(self.load_end(&ending));
        }
        let receipt = self.receipt.take();
        let model = self.canonical_model();
        // Counts of a reply that did not come to its end are not known (promise I15).
        let counts = usage.as_ref().filter(|usage| usage.terminal);
        let entry = Entry {
            response_code: ending.status.or(self.status).filter(|_| ending.left.is_none()), // nobody was sent one
            latency_ms: Some(millis(self.began.elapsed())),
            ttft_ms: self.first_byte.map(|at| millis(at - self.began)),
            input_tokens: counts.and_then(|usage| usage.input_tokens),
            output_tokens: counts.and_then(|usage| usage.output_tokens),
            finish_reason: usage.as_ref().and_then(|usage| usage.finish_reason.as_ref()).map(|word| {
                match self.converted {
                    true => convert::finish_word(word.as_str()),
                    false => word.as_str(),
                }
            }),
            bytes_in: Some(ending.bytes_in),
            bytes_out: Some(ending.bytes_out),
            error: self.error(&ending, outcome, usage.as_ref().is_some_and(|usage| usage.error_frame)),
            ..self.entry(model.as_deref())
        };
        let loading = usage.as_ref().and_then(|usage| usage.load_duration_ns).map(Duration::from_nanos);
        let measures = Measures { loading, ..self.measures(ledger, &entry, model.as_deref()) };
        ledger.settle(receipt, outcome, &entry, &measures);
    }

    /// What is known at any time. `model` is the canonical name, which the caller keeps for as long as the entry lives.
    pub fn entry<'a>(&'a self, model: Option<&'a str>) -> Entry<'a> {
        let caller = self.caller.as_deref();
        let ask = self.ask.as_ref();
        let (permit, denial) = (self.permit.as_ref(), self.denial.as_ref());
        Entry {
            exchange: self.number,
            agent_id: caller.map(|caller| caller.agent_id.as_str()).or(self.token_agent.as_deref()),
            session_id: caller.map(|caller| caller.session_id.as_str()),
            agent_roles: caller.map(|caller| caller.roles.as_slice()),
            requester_id: self.requester.id.as_deref(),
            requester_channel: self.requester.channel.as_deref(),
            source_ip: self.source_ip,
            request_id: Some(&self.request_id),
            action: Some(known_method(&self.method)),
            target: Some(self.target.as_deref().unwrap_or_else(|| self.named())),
            dialect: Some(self.dialect.as_str()),
            model,
            model_raw: ask.and_then(|ask| ask.model.as_ref()).map(|model| model.raw.as_str()),
            stream: ask.and_then(|ask| ask.stream),
            has_system_prompt: ask.and_then(|ask| ask.has_system_prompt),
            has_tools: ask.and_then(|ask| ask.has_tools),
            message_count: ask.and_then(|ask| ask.message_count),
            // A refusal before the policy was asked carries "deny" (contract, section 6).
            policy_result: match (permit, denial) {
                (Some(_), _) => Some("allow"),
                (None, Some(word)) => Some(word.result),
                (None, None) if self.granted_here => Some("allow"),
                (None, None) => Some("deny"),
            },
            policy_id: permit.map(|permit| permit.policy_id()).or(denial.map(|word| word.policy_id.as_str())),
            policy_reason: permit.and_then(|permit| permit.reason()).or(denial.map(|word| word.reason.as_str())),
            policy_revision: permit.map(|permit| permit.revision()).or(denial.map(|word| word.revision.as_str())),
            filters: ask.map(|_| self.filters.as_slice()),
            backend: self.lease.as_ref().map(|lease| lease.backend().name.as_str()),
            placement: self.placement.as_deref(),
            retries: (self.attempts > 0).then(|| self.attempts - 1),
            queue_ms: self.queued.map(millis).or(self.lease.as_ref().map(|_| 0)), // what no model computes waits for nothing
            upstream_status: self.upstream_status,
            ..Entry::default()
        }
    }

    pub fn canonical_model(&self) -> Option<String> {
        self.model().map(|model| model.canonical())
    }

    fn outcome(&self, ending: &Ending, usage: Option<&Usage>) -> Outcome {
        if ending.panicked {
            return Outcome::InternalError;
        }
        if ending.left.is_some() {
            return Outcome::ClientAbort; // whatever became of it afterwards
        }
        if let Some(cut) = ending.cut.filter(|_| ending.broken || self.status.is_none() || self.refusal.is_some()) {
            return cut.outcome();
        }
        if ending.slow_reader || self.fault == Some(Fault::SlowClient) {
            return Outcome::SlowClient;
        }
        if ending.client_gone || self.fault == Some(Fault::Client) {
            // OpenAI's clients stop reading at `[DONE]` and close: they have the whole answer, if not the last chunk's end.
            let answered = usage.is_some_and(|usage| usage.terminal && !usage.error_frame) && !ending.unsent;
            return if answered { Outcome::Complete } else { Outcome::ClientAbort };
        }
        if let Some(refusal) = &self.refusal {
            return match refusal.code {
                Code::BackendTimeout => Outcome::Timeout,
                Code::BackendUnreachable => Outcome::UpstreamError,
                Code::BadBackendReply if self.events.as_ref().is_some_and(convert::Events::gave_up) => {
                    Outcome::UpstreamError
                }
                Code::BadBackendReply if ending.broken => Outcome::UpstreamReset,
                // A reply that was held, so that nothing of it was sent.
                Code::BadBackendReply if self.fault == Some(Fault::Backend) && self.upstream_status.is_some() => {
                    Outcome::UpstreamReset
                }
                Code::BadBackendReply => Outcome::UpstreamError,
                Code::InternalError => Outcome::InternalError,
                Code::ShuttingDown => Outcome::Shutdown,
                _ => Outcome::Refused,
            };
        }
        match self.fault {
            Some(Fault::Silence) => Outcome::Timeout,
            Some(Fault::Backend) => Outcome::UpstreamReset,
            Some(Fault::Internal) => Outcome::InternalError,
            _ if ending.broken => Outcome::UpstreamReset,
            _ if self.status.is_none() => Outcome::ClientAbort, // it left before there was anything to say
            _ if self.upstream_status.is_some_and(|status| status >= 500) => Outcome::UpstreamError,
            _ if self.lacks_its_end(usage) => Outcome::UpstreamError,
            _ => Outcome::Complete,
        }
    }

    /// A 200 without the dialect's own end is a failed answer, even if the HTTP message is whole (ollama-wire, 0.2 and 0.3).
    fn lacks_its_end(&self, usage: Option<&Usage>) -> bool {
        self.upstream_status == Some(200)
            && self.endpoint().is_some_and(|endpoint| endpoint.kind() == Kind::Infer)
            && usage.is_some_and(|usage| !usage.rendered && (!usage.terminal || usage.error_frame))
    }

    /// `told_error`: the backend's own words in its stream said so.
    fn error(&self, ending: &Ending, outcome: Outcome, told_error: bool) -> Option<&str> {
        match (&self.refusal, outcome) {
            (_, Outcome::ClientAbort) if ending.left == Some(Left::Shielded) => Some(match self.load_end(ending) {
                ShieldedLoad::Loaded => "the client left, and its model was loaded all the same",
                ShieldedLoad::Failed => "the client left, and the backend failed to load its model",
                ShieldedLoad::Ended => "the client left, and the load of its model was cancelled later",
            }),
            (Some(refusal), _) => Some(refusal.cause.as_ref()),
            (None, Outcome::Complete) => None,
            (None, Outcome::UpstreamError) if self.upstream_status.is_some_and(|status| status >= 500) => {
                Some("the backend answered with an error")
            }
            (None, Outcome::UpstreamError) if told_error => Some("the backend ended its reply with an error"),
            (None, Outcome::UpstreamError) => Some("the backend's reply has no end"),
            (None, Outcome::UpstreamReset) => Some("the backend broke off"),
            (None, Outcome::ClientAbort) => Some("the client left"),
            (None, Outcome::SlowClient) => Some("the client did not read"),
            (None, other) => Some(other.as_str()),
        }
    }

    /// What became of the load that was gone on with.
    fn load_end(&self, ending: &Ending) -> ShieldedLoad {
        match (self.upstream_status, self.fault) {
            (Some(200..=299), _) => ShieldedLoad::Loaded,
            (None, Some(Fault::Client) | None) => ShieldedLoad::Ended,
            _ if ending.cut.is_some() => ShieldedLoad::Ended,
            _ => ShieldedLoad::Failed,
        }
    }

    /// The path of what leads to no backend, as far as the table of routes knows it.
    fn named(&self) -> &str {
        self.named.get_or_init(|| crate::route::recorded(&self.path).into_owned())
    }

    fn measures(&self, ledger: &Ledger, entry: &Entry<'_>, model: Option<&str>) -> Measures {
        let until_dispatch = self.dispatched.map(|at| at - self.began);
        Measures {
            way: self.way,
            cause: self.refusal.as_ref().map(|refusal| refusal.code.as_str()),
            took: self.began.elapsed(),
            to_first_byte: self.first_byte.map(|at| at - self.began),
            added: until_dispatch
                .map(|took| took.saturating_sub(self.waited_for_body + self.queued.unwrap_or_default())),
            // An answer that comes whole has its first byte when all is generated.
            generating: self.first_byte.zip(self.last_byte).filter(|_| entry.stream == Some(true)).map(|(a, z)| z - a),
            model: model.map(|model| ledger.metrics.model(model)).unwrap_or_default(),
            loading: None, // what the meter says
            role: entry
                .agent_roles
                .and_then(|roles| roles.first())
                .map(|role| ledger.metrics.role(role))
                .unwrap_or_default(),
        }
    }
}

/// The methods that HTTP has; another word is the client's own, and free text.
fn known_method(method: &str) -> &str {
    match method {
        "GET" | "HEAD" | "POST" | "PUT" | "DELETE" | "PATCH" | "OPTIONS" | "TRACE" | "CONNECT" => method,
        _ => "OTHER",
    }
}

fn millis(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}
