//! The facts known about one request, in the order in which they become known. Each is set once, by one module; the stage
//! of an exchange is derived from which facts exist, never stored.
//!
//! - [`requester`]: whom the agent says that it acts for.
//! - [`settle`]: from the facts to the one final record.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::identity::Caller;
use crate::ledger::metrics::InFlight;
use crate::ledger::{Receipt, Way};
use crate::memory::Held;
use crate::policy::Permit;
use crate::refusal::Refusal;
use crate::snapshot::Snapshot;
use crate::upstream::Lease;
use crate::upstream::health::Failed;
use crate::wire::convert;
use crate::wire::failure::Stream;
use crate::wire::mend::Mender;
use crate::wire::meter::Meter;
use crate::wire::rewrite::{Scrubber, UsageHider};
use crate::wire::whole::Whole;
use crate::wire::{Ask, Dialect, Endpoint, ModelRef};

pub mod requester;
mod settle;

pub use requester::Requester;
pub use settle::Ending;

/// A caller's own request id is taken over up to this length (contract, section 1).
const REQUEST_ID_CHARS: usize = 128;

pub struct Exchange {
    // ---- received
    pub request_id: String,
    /// What the ids of all its records end with: a request id is the client's word, and may come twice.
    pub number: u64,
    pub began: Instant,
    pub source_ip: Option<IpAddr>,
    pub method: String,
    /// As on the wire, without the query. It is recorded as far as the table of routes has it.
    pub path: String,
    named: OnceLock<String>,
    /// Without what only proves who the caller is.
    pub query: Option<String>,
    /// What a refusal is worded in; from the path, so that even a 404 has one.
    pub dialect: Dialect,
    /// Everything that a reload can change, as it was when the request came.
    pub snapshot: Arc<Snapshot>,
    pub in_flight: InFlight,

    // ---- routed
    pub way: Way,
    /// The path for the backend, from the table.
    pub target: Option<Cow<'static, str>>,

    // ---- authenticated, inspected, authorized
    pub caller: Option<Arc<Caller>>,
    /// Only a caller's is kept.
    pub requester: Requester,
    pub ask: Option<Ask>,
    /// What may run in the place of the model that is asked for, best first: an alias's target, fallbacks. Which of them does, the
    /// permit says.
    pub targets: Vec<ModelRef>,
    /// What was cut from or put into the request.
    pub filters: Vec<&'static str>,
    /// Length of the body as it is sent to a backend.
    pub body_bytes: usize,
    /// The body's share of the memory that all bodies may take, until the exchange is settled.
    pub held: Option<Held>,
    /// How long the client took to send the body: none of our doing.
    pub waited_for_body: Duration,
    pub permit: Option<Permit>,
    /// Answered here, to anybody (the key set) or on a secret's word (a token).
    pub granted_here: bool,
    /// Who was given a token by this request.
    pub token_agent: Option<String>,
    /// The policy's word on a request that it refused.
    pub denial: Option<PolicyWord>,
    pub receipt: Option<Receipt>,
    /// A request of `/v1/responses` as it is to be sent, until the reply begins: for an older Ollama it is converted.
    pub convertible: Option<Bytes>,

    // ---- placed
    /// What tells its conversation from others.
    pub conversation: Option<u64>,
    /// How long it has waited for a backend.
    pub queued: Option<Duration>,
    /// The backend that the request names, where that decides.
    pub named_backend: Option<String>,
    pub lease: Option<Lease>,
    /// Why it is this backend.
    pub placement: Option<String>,
    /// Backends that were tried and came to nothing, in order; the last may be the leased one.
    pub tried: Vec<Tried>,
    /// How many of them were tried with another model, of whose fallbacks one runs now.
    pub tried_before: usize,
    /// The request as it was before it was made to fit the model that runs; while others may still run in its place.
    pub unfitted: Option<Unfitted>,
    /// Another model runs from the next attempt on.
    pub refit: bool,
    /// When the first attempt began.
    pub attempted: Option<Instant>,
    /// The next attempt takes no pooled connection: one was dead, and the others may be.
    pub fresh_connection: bool,
    /// Attempts to reach a backend, the first included.
    pub attempts: u32,
    /// How many of the backend's addresses could not be connected to; the next attempt takes the next one.
    pub unreachable: usize,
    pub dispatched: Option<Instant>,
    /// The present attempt is converted; what its reply repeats.
    pub conversion: Option<convert::Reply>,
    /// The reply that came is one to a converted request.
    pub converted: bool,

    // ---- streaming
    pub upstream_status: Option<u16>,
    pub first_byte: Option<Instant>,
    pub last_byte: Option<Instant>,
    pub meter: Option<Meter>,
    pub hider: Option<UsageHider>,
    pub scrubber: Option<Scrubber>,
    /// Of a stream.
    pub mender: Option<Mender>,
    /// Of a reply that is none, and its part of the memory for replies.
    pub whole: Option<Whole>,
    pub whole_held: Option<Held>,
    /// Of a stream that is converted.
    pub events: Option<convert::Events>,
    /// Bytes of a body that is passed on as it comes.
    pub streamed_bytes: u64,

    // ---- ended
    /// The status that the client was sent.
    pub status: Option<u16>,
    /// What we answered, or ended a stream with, instead of the backend.
    pub refusal: Option<Refusal>,
    pub fault: Option<Fault>,
}

/// A backend, by its place in the pool, and why it was of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tried {
    pub place: usize,
    pub failed: Failed,
}

/// A request before anything in it was changed for the model that runs.
pub struct Unfitted {
    pub body: Option<Bytes>,
    /// How many of the exchange's filters had fired.
    pub filters: usize,
}

/// What a policy said of a request that it refused.
pub struct PolicyWord {
    pub result: &'static str,
    pub policy_id: String,
    pub reason: String,
    pub revision: String,
}

/// What the backend of a client that left before its reply began was spared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing, or only the first moment after its request was sent.
    AtOnce,
    /// It may load the model to the end.
    Shielded,
}

/// Whose fault an error was, as Pingora saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The client left.
    Client,
    /// The client did not read.
    SlowClient,
    /// The backend broke off or answered garbage.
    Backend,
    /// The backend was silent for too long.
    Silence,
    /// Ours.
    Internal,
}

impl Exchange {
    /// `parts`: the head as it was parsed.
    pub fn received(
        parts: &http::request::Parts,
        source_ip: Option<IpAddr>,
        snapshot: Arc<Snapshot>,
        in_flight: InFlight,
    ) -> Exchange {
        let path = parts.uri.path().to_owned();
        let own_id =
            parts.headers.get("x-request-id").and_then(|value| value.to_str().ok()).filter(|id| is_request_id(id));
        Exchange {
            request_id: own_id.map_or_else(|| uuid::Uuid::now_v7().simple().to_string(), str::to_owned),
            number: rand::random(),
            began: Instant::now(),
            source_ip: source_ip.map(|ip| ip.to_canonical()),
            method: parts.method.as_str().to_owned(),
            dialect: crate::route::dialect_of(&path),
            path,
            named: OnceLock::new(),
            query: parts.uri.query().map(str::to_owned),
            snapshot,
            in_flight,
            way: Way::Unmatched,
            target: None,
            caller: None,
            requester: Requester::default(),
            ask: None,
            targets: Vec::new(),
            filters: Vec::new(),
            body_bytes: 0,
            held: None,
            waited_for_body: Duration::ZERO,
            permit: None,
            granted_here: false,
            token_agent: None,
            denial: None,
            receipt: None,
            named_backend: None,
            convertible: None,
            conversation: None,
            queued: None,
            lease: None,
            placement: None,
            tried: Vec::new(),
            tried_before: 0,
            unfitted: None,
            refit: false,
            attempted: None,
            fresh_connection: false,
            attempts: 0,
            unreachable: 0,
            dispatched: None,
            conversion: None,
            converted: false,
            upstream_status: None,
            first_byte: None,
            last_byte: None,
            meter: None,
            hider: None,
            scrubber: None,
            mender: None,
            whole: None,
            whole_held: None,
            events: None,
            streamed_bytes: 0,
            status: None,
            refusal: None,
            fault: None,
        }
    }

    /// The model that runs, or would.
    pub fn model(&self) -> Option<&ModelRef> {
        let asked = || self.ask.as_ref().and_then(|ask| ask.model.as_ref());
        self.permit.as_ref().and_then(|permit| permit.model()).or_else(asked)
    }

    /// The attempts that count for the model that runs now: that a backend has not got another one says nothing.
    pub fn tried(&self) -> impl Iterator<Item = Tried> {
        let counts = |(i, tried): &(usize, &Tried)| *i >= self.tried_before || tried.failed != Failed::Absent;
        self.tried.iter().enumerate().filter(counts).map(|(_, tried)| *tried)
    }

    /// The model that runs, where another was asked for.
    pub fn runs_instead(&self) -> Option<String> {
        let asked = self.ask.as_ref()?.model.as_ref()?;
        self.model().filter(|runs| !runs.same_model(asked)).map(ModelRef::canonical)
    }

    /// What a stream ends with that cannot come to its own end, in the client's dialect.
    pub fn last_words(&mut self, refusal: &Refusal, sse: bool, mid_record: bool) -> Vec<u8> {
        if let Some(events) = &mut self.events {
            return events.fail_with(&refusal.detail, now_s());
        }
        let next_event = self.mender.as_ref().map_or(0, Mender::next_event);
        refusal.frame(Stream::of(self.dialect, self.endpoint(), sse, next_event), mid_record)
    }

    pub fn endpoint(&self) -> Option<Endpoint> {
        match self.way {
            Way::Ollama(endpoint) => Some(endpoint),
            _ => None,
        }
    }
}

/// Seconds since 1970.
pub fn now_s() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs())
}

fn is_request_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= REQUEST_ID_CHARS && id.bytes().all(|byte| byte.is_ascii_graphic())
}
