//! Every metric of the proxy. Nothing outside this module names one.
//!
//! Labels come from closed sets only: enums, words of the code, models that a backend really holds ([`Metrics::known_model`]) and roles
//! of signed tokens, the last two bounded in number. A client cannot make a time series. Label children are resolved once and kept
//! in arrays, since a look-up by label values hashes strings and takes a lock for each observation (prometheus 0.14).

use std::sync::OnceLock;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use serde::Serialize;

use self::labels::{ModelSeries, Names};
use super::{Entry, Measures, Outcome, Phase};
use crate::wire::Endpoint;

mod labels;

pub use self::labels::{ModelLabel, RoleLabel};

/// Content type of [`Metrics::render`]: the Prometheus text format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Models with time series of their own; further ones are counted as "other". A host holds some dozens.
const MODELS: usize = 512;
/// Roles with time series of their own.
const ROLES: usize = 64;

/// The proxy's own part of a request: fine below a millisecond, where it should be.
const ADDED_SECONDS: &[f64] = &[
    0.000_025, 0.000_05, 0.000_075, 0.000_1, 0.000_15, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25, 1.0,
];
/// A model answers within milliseconds (a list) to minutes (a load, a long reply).
const REQUEST_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
const POLICY_SECONDS: &[f64] =
    &[0.000_001, 0.000_005, 0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.001, 0.01, 0.1];
/// A disk with a battery answers in tens of microseconds, one that spins in tens of milliseconds.
const FSYNC_SECONDS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];
const TOKENS_PER_SECOND: &[f64] = &[1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0];

/// What a request came to: the `endpoint` label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    Ollama(Endpoint),
    /// Behavry's token endpoint.
    Token,
    /// No route of ours.
    #[default]
    Unmatched,
}

impl Way {
    pub fn as_str(self) -> &'static str {
        match self {
            Way::Ollama(endpoint) => endpoint.as_str(),
            Way::Token => "token",
            Way::Unmatched => "unmatched",
        }
    }

    /// A place in the arrays of resolved children. An endpoint added after `Blob` has none and is looked up each time.
    fn place(self) -> usize {
        match self {
            Way::Unmatched => 0,
            Way::Token => 1,
            Way::Ollama(endpoint) => 2 + endpoint as usize,
        }
    }
}

const WAYS: usize = 2 + Endpoint::Blob as usize + 1;

/// What is loaded anew while the proxy runs: the `what` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reloaded {
    Policy,
    Agents,
    Revocations,
    /// Our own, of the state folder.
    Keys,
}

impl Reloaded {
    pub const ALL: [Reloaded; 4] = [Reloaded::Policy, Reloaded::Agents, Reloaded::Revocations, Reloaded::Keys];

    pub fn as_str(self) -> &'static str {
        match self {
            Reloaded::Policy => "policy",
            Reloaded::Agents => "agents",
            Reloaded::Revocations => "revocations",
            Reloaded::Keys => "keys",
        }
    }
}

/// A model that is loaded is found within some ten milliseconds (59 at most in the replies recorded from three versions of Ollama), and
/// the smallest takes 250 to load.
const A_LOAD: Duration = Duration::from_millis(200);

/// The bounds at the token endpoint, each there from the start, with 0.
const TOKEN_BOUNDS: [&str; 5] = ["address_rate", "client_rate", "address_share", "places", "turn"];
/// What a fetch of the key set's URL came to: the `result` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeysFetched {
    Changed,
    Unchanged,
    /// The last good keys stayed.
    Failed,
}

impl KeysFetched {
    const ALL: [KeysFetched; 3] = [KeysFetched::Changed, KeysFetched::Unchanged, KeysFetched::Failed];

    fn as_str(self) -> &'static str {
        match self {
            KeysFetched::Changed => "changed",
            KeysFetched::Unchanged => "unchanged",
            KeysFetched::Failed => "failed",
        }
    }
}

/// Status classes: 1xx to 5xx, and none.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// Sums since the start. Tokens are those that backends told; a reply that was broken off counts none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    pub requests: u64,
    /// Passed on whole.
    pub complete: u64,
    /// Answered by us instead of a backend, for whatever reason.
    pub refused: u64,
    /// By the policy.
    pub denied: u64,
    pub escalated: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
}

/// All metrics, in a registry of their own.
pub struct Metrics {
    registry: Registry,

    requests: IntCounterVec,
    requests_resolved: Vec<OnceLock<IntCounter>>,
    to_first_byte: HistogramVec,
    to_first_byte_resolved: Vec<OnceLock<Histogram>>,
    duration: HistogramVec,
    duration_resolved: Vec<OnceLock<Histogram>>,
    added: Histogram,
    in_flight: IntGauge,
    bytes_in: IntCounter,
    bytes_out: IntCounter,

    tokens: IntCounterVec,
    tokens_per_second: HistogramVec,
    model_loads: IntCounterVec,
    warmups: IntCounterVec,
    models: Names<ModelLabel>,
    other_models: ModelSeries,
    roles: Names<RoleLabel>,

    policy_decisions: IntCounterVec,
    policy_seconds: Histogram,
    queue_waiting: IntGaugeVec,
    queue_seconds: HistogramVec,
    reload_failures: IntCounterVec,
    token_failures: IntCounterVec,
    jwks_fetches: IntCounterVec,
    jwks_confirmed: IntGauge,
    token_causes: Vec<&'static str>,
    tokens_turned_away: IntCounterVec,

    backend_up: IntGaugeVec,
    backend_drained: IntGaugeVec,
    backend_attempts: IntCounterVec,
    failovers: IntCounterVec,
    connections_new: IntCounter,
    connections_reused: IntCounter,

    audit_records: [IntCounter; Phase::ALL.len()],
    audit_unavailable: IntCounter,
    audit_failing: IntGauge,
    audit_lag: IntGaugeVec,
    audit_dropped: IntCounterVec,
    sinks: Sinks,
    audit_free: IntGauge,
    audit_fsync: Histogram,
    audit_fsync_failures: IntCounter,
    audit_segments: IntCounter,
    audit_bytes: IntGauge,
    audit_checkpoints: IntCounter,
    audit_checkpoint_copy_failures: IntCounter,
    audit_tombstones: IntCounter,
    audit_deleted_bytes: IntCounter,
    audit_adopted: IntCounter,
    audit_crashed: IntCounter,
    folded_refusals: IntCounter,

    unparsed: IntCounterVec,
    panics: IntCounter,
}

impl Metrics {
    /// `token_causes`: every cause for which a token may fail to verify; each is there from the start, with 0. `version`: ours.
    pub fn new(version: &str, token_causes: &[&'static str]) -> Metrics {
        let registry = Registry::new();
        let make = Make { registry: &registry };

        let requests = make.counters(
            "requests_total",
            "Requests by endpoint, how they ended, and the class of the status sent to the client.",
            &["endpoint", "outcome", "status_class"],
        );
        let to_first_byte = make.histograms(
            "time_to_first_byte_seconds",
            "From the first byte of a request to the first byte of its reply.",
            &["endpoint"],
            REQUEST_SECONDS,
        );
        let duration = make.histograms(
            "request_duration_seconds",
            "From the first byte of a request to the last byte of its reply.",
            &["endpoint"],
            REQUEST_SECONDS,
        );
        let added = make.histogram(
            "added_seconds",
            "What the proxy itself added to a request: its time without the client's and the backend's.",
            ADDED_SECONDS,
        );
        let in_flight = make.gauge("requests_in_flight", "Requests being served now.");
        let bytes = make.counters("bytes_total", "Body bytes from clients (in) and to clients (out).", &["direction"]);

        let tokens = make.counters(
            "tokens_total",
            "Tokens read (in) and generated (out), as the backends counted them, by model and agent role.",
            &["direction", "model", "role"],
        );
        let tokens_per_second = make.histograms(
            "tokens_per_second",
            "Tokens generated a second, for each reply.",
            &["model"],
            TOKENS_PER_SECOND,
        );

        let model_loads = make.counters(
            "model_loads_total",
            "Replies of Ollama's own API for which the model was loaded first: a load_duration of 200 ms or more.",
            &["model"],
        );
        model_loads.with_label_values(&[OTHER]);
        let warmups = make.counters(
            "model_warmups_total",
            "Models that the proxy had loaded before anybody asked for them, by result (loaded, failed).",
            &["model", "result"],
        );
        for result in ["loaded", "failed"] {
            warmups.with_label_values(&[OTHER, result]);
        }

        let policy_decisions = make.counters("policy_decisions_total", "Policy decisions by result.", &["result"]);
        for result in ["allow", "deny", "escalate"] {
            policy_decisions.with_label_values(&[result]);
        }
        let queue_waiting = make.gauges(
            "queue_waiting_requests",
            "Requests that wait for a backend, by model and class.",
            &["model", "class"],
        );
        let queue_seconds = make.histograms(
            "queue_seconds",
            "Time that requests waited for the backend that they got, by model and class.",
            &["model", "class"],
            REQUEST_SECONDS,
        );
        let policy_seconds =
            make.histogram("policy_evaluation_seconds", "Time of one policy decision, over all roles.", POLICY_SECONDS);
        let reload_failures = make.counters(
            "reload_failures_total",
            "Changes of a watched file that did not load, by what it holds; the last good one stayed.",
            &["what"],
        );
        for what in Reloaded::ALL {
            reload_failures.with_label_values(&[what.as_str()]);
        }
        let token_failures =
            make.counters("token_verification_failures_total", "Tokens that did not verify, by cause.", &["cause"]);
        for cause in token_causes.iter().copied().chain([OTHER]) {
            token_failures.with_label_values(&[cause]);
        }

        let tokens_turned_away = make.counters(
            "token_requests_turned_away_total",
            "Token requests refused before a secret was checked, by the bound that was reached.",
            &["bound"],
        );
        for bound in TOKEN_BOUNDS {
            tokens_turned_away.with_label_values(&[bound]);
        }
        let jwks_fetches =
            make.counters("jwks_fetches_total", "Fetches of the key set's URL, by what came of them.", &["result"]);
        for result in KeysFetched::ALL {
            jwks_fetches.with_label_values(&[result.as_str()]);
        }
        let jwks_confirmed = make.gauge(
            "jwks_confirmed_timestamp_seconds",
            "When the key set's URL last gave good keys, in seconds since 1970; 0: not since the start, or no URL.",
        );

        let backend_up = make.gauges("backend_up", "Whether a backend answers (1) or not (0).", &["backend"]);
        let backend_drained =
            make.gauges("backend_drained", "Whether a backend is drained by command (1) or not (0).", &["backend"]);
        let backend_attempts = make.counters(
            "backend_attempts_total",
            "Attempts of requests on a backend, by what became of them: ok, or why it was of no use.",
            &["backend", "result"],
        );
        let failovers = make.counters(
            "failovers_total",
            "Requests that were tried on another backend, by what had become of them on the one before.",
            &["reason"],
        );
        let connections =
            make.counters("upstream_connections_total", "Connections used for requests to backends.", &["reused"]);

        let audit_records = make.counters("audit_records_total", "Audit records written, by phase.", &["phase"]);
        let audit_unavailable =
            make.counter("audit_unavailable_total", "Requests refused because their record could not be written.");
        let audit_failing = make.gauge("audit_failing", "Whether the audit cannot be written now (1).");
        let audit_lag = make.gauges(
            "audit_lag_records",
            "Records accepted and not yet written (file, stdout), or lines of the files not yet delivered, by sink.",
            &["sink"],
        );
        let audit_dropped = make.counters(
            "audit_dropped_records_total",
            "Records that a sink did not get: final records of refused requests (file), copies (stdout), or lines (others).",
            &["sink"],
        );
        for sink in ["file", "stdout"] {
            audit_lag.with_label_values(&[sink]);
            audit_dropped.with_label_values(&[sink]);
        }
        let sinks = Sinks {
            delivered: make.counters("audit_sink_delivered_records_total", "Lines that a sink has taken.", &["sink"]),
            failures: make.counters("audit_sink_failures_total", "Batches that a sink did not take.", &["sink"]),
            behind: make.gauges(
                "audit_sink_lag_seconds",
                "Age of the oldest line that a sink does not have; 0 where it has all.",
                &["sink"],
            ),
            last_success: make.gauges(
                "audit_sink_last_success_timestamp_seconds",
                "When a sink last took a batch, in seconds since 1970; 0 before the first.",
                &["sink"],
            ),
        };
        let audit_free =
            make.gauge("audit_free_bytes", "Bytes that may still be written on the file system of the audit's folder.");
        let audit_fsync = make.histogram("audit_fsync_seconds", "Time of one fsync of the audit.", FSYNC_SECONDS);
        let audit_fsync_failures =
            make.counter("audit_fsync_failures_total", "Fsyncs of the audit that failed; each ends its segment.");
        let audit_segments = make.counter("audit_segments_total", "Segments of the audit that were opened.");
        let audit_bytes =
            make.gauge("audit_folder_bytes", "Bytes of all segments after retention last looked; 0 without retention.");
        let audit_checkpoints = make.counter("audit_checkpoints_total", "Signed checkpoints written.");
        let audit_checkpoint_copy_failures = make.counter(
            "audit_checkpoint_copy_failures_total",
            "Copies of checkpoints that did not reach audit.checkpoint_file.",
        );
        let audit_tombstones = make.counter("audit_tombstones_total", "Segments that retention deleted.");
        let audit_deleted_bytes =
            make.counter("audit_deleted_bytes_total", "Bytes of the segments that retention deleted.");
        let audit_adopted =
            make.counter("audit_adopted_total", "Chains of processes that died, taken over at the start.");
        let audit_crashed =
            make.counter("audit_crashed_requests_total", "Requests of processes that died, recorded as crashed.");
        let folded_refusals = make.counter(
            "folded_refusals_total",
            "Refusals of unknown callers that were counted in a folded audit record instead of written one by one.",
        );

        let unparsed =
            make.counters("unparsed_requests_total", "Requests whose head could not be read, by reason.", &["reason"]);
        let panics = make.counter("panics_total", "Panics caught.");
        let build = make.gauges("build_info", "The running version; always 1.", &["version"]);
        build.with_label_values(&[version]).set(1);

        Metrics {
            requests_resolved: unresolved(WAYS * Outcome::ALL.len() * CLASSES.len()),
            to_first_byte_resolved: unresolved(WAYS),
            duration_resolved: unresolved(WAYS),
            bytes_in: bytes.with_label_values(&["in"]),
            bytes_out: bytes.with_label_values(&["out"]),
            model_loads,
            warmups,
            models: Names::new(MODELS),
            other_models: ModelSeries::default(),
            roles: Names::new(ROLES),
            token_causes: token_causes.to_vec(),
            connections_new: connections.with_label_values(&["false"]),
            connections_reused: connections.with_label_values(&["true"]),
            audit_records: Phase::ALL.map(|phase| audit_records.with_label_values(&[phase.as_str()])),
            requests,
            to_first_byte,
            duration,
            added,
            in_flight,
            tokens,
            tokens_per_second,
            policy_decisions,
            policy_seconds,
            queue_waiting,
            queue_seconds,
            reload_failures,
            token_failures,
            tokens_turned_away,
            jwks_fetches,
            jwks_confirmed,
            backend_up,
            backend_drained,
            backend_attempts,
            failovers,
            audit_unavailable,
            audit_failing,
            audit_lag,
            audit_dropped,
            sinks,
            audit_free,
            audit_fsync,
            audit_fsync_failures,
            audit_segments,
            audit_bytes,
            audit_checkpoints,
            audit_checkpoint_copy_failures,
            audit_tombstones,
            audit_deleted_bytes,
            audit_adopted,
            audit_crashed,
            folded_refusals,
            unparsed,
            panics,
            registry,
        }
    }

    /// All metrics in the Prometheus text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        if let Err(error) = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text) {
            // It happens only for a family without a name or a metric, which a registry does not gather.
            log::error!("metrics: {error}");
        }
        text
    }

    /// Sums of the counters, for a page. It walks over all series: for once a second, not for each request.
    pub fn totals(&self) -> Totals {
        let requests = |label: &str, value: &str| sum_where(&self.requests, label, value);
        let all = sum_where(&self.requests, "", "");
        Totals {
            requests: all,
            complete: requests("outcome", Outcome::Complete.as_str()),
            refused: requests("outcome", Outcome::Refused.as_str()),
            denied: sum_where(&self.policy_decisions, "result", "deny"),
            escalated: sum_where(&self.policy_decisions, "result", "escalate"),
            input_tokens: sum_where(&self.tokens, "direction", "in"),
            output_tokens: sum_where(&self.tokens, "direction", "out"),
        }
    }

    /// Panics that were caught.
    pub fn panics(&self) -> u64 {
        self.panics.get()
    }

    /// Changes of `what` that did not load.
    pub fn reload_failures(&self, what: Reloaded) -> u64 {
        self.reload_failures.with_label_values(&[what.as_str()]).get()
    }

    /// Counts a request as being served until the returned value is dropped.
    pub fn request_began(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    /// The end of a request.
    pub fn settled(&self, outcome: Outcome, entry: &Entry<'_>, measures: &Measures) {
        let way = measures.way;
        let class = entry.response_code.map_or(0, |code| usize::from(code / 100));
        let class = if class < CLASSES.len() { class } else { 0 };
        let place = (way.place() * Outcome::ALL.len() + outcome as usize) * CLASSES.len() + class;
        resolved(
            &self.requests_resolved,
            place,
            || self.requests.with_label_values(&[way.as_str(), outcome.as_str(), CLASSES[class]]),
            IntCounter::inc,
        );
        resolved(
            &self.duration_resolved,
            way.place(),
            || self.duration.with_label_values(&[way.as_str()]),
            |duration| duration.observe(measures.took.as_secs_f64()),
        );
        if let Some(to_first_byte) = measures.to_first_byte {
            resolved(
                &self.to_first_byte_resolved,
                way.place(),
                || self.to_first_byte.with_label_values(&[way.as_str()]),
                |histogram| histogram.observe(to_first_byte.as_secs_f64()),
            );
        }
        if let Some(added) = measures.added {
            self.added.observe(added.as_secs_f64());
        }
        self.bytes_in.inc_by(entry.bytes_in.unwrap_or(0));
        self.bytes_out.inc_by(entry.bytes_out.unwrap_or(0));
        self.used_tokens(entry, measures);
        if measures.loading.is_some_and(|loading| loading >= A_LOAD) {
            self.model_loads.with_label_values(&[measures.model.as_str()]).inc();
        }
    }

    fn used_tokens(&self, entry: &Entry<'_>, measures: &Measures) {
        if entry.input_tokens.is_none() && entry.output_tokens.is_none() {
            return;
        }
        let (model, role) = (&measures.model, &measures.role);
        let series = model.series().unwrap_or(&self.other_models);
        let tokens = series.tokens(role, || {
            ["in", "out"].map(|direction| self.tokens.with_label_values(&[direction, model.as_str(), role.as_str()]))
        });
        tokens[0].inc_by(entry.input_tokens.unwrap_or(0));
        tokens[1].inc_by(entry.output_tokens.unwrap_or(0));
        if let (Some(out), Some(generating)) = (entry.output_tokens, measures.generating)
            && out > 0
            && !generating.is_zero()
        {
            series
                .per_second(|| self.tokens_per_second.with_label_values(&[model.as_str()]))
                .observe(out as f64 / generating.as_secs_f64());
        }
    }

    /// Gives a model time series of its own. Only for models that a backend really holds, never for what a client names.
    pub fn known_model(&self, model: &str) -> ModelLabel {
        self.models.insert(model)
    }

    /// A model of the configuration was loaded on a backend that holds it, or was not.
    pub fn warmed(&self, model: &str, loaded: bool) {
        let result = if loaded { "loaded" } else { "failed" };
        self.warmups.with_label_values(&[self.model(model).as_str(), result]).inc();
    }

    /// The label of a model for a request: "other", unless it is known.
    pub fn model(&self, model: &str) -> ModelLabel {
        self.models.find(model)
    }

    /// Counts a request as waiting for a backend until the returned value is dropped.
    pub fn queue_entered(&self, model: &ModelLabel, class: &'static str) -> Waiting {
        let labels = [model.as_str(), class];
        let waiting = self.queue_waiting.with_label_values(&labels);
        waiting.inc();
        Waiting { waiting, seconds: self.queue_seconds.with_label_values(&labels) }
    }

    /// The label of a role. Only for roles from verified tokens.
    pub fn role(&self, role: &str) -> RoleLabel {
        self.roles.insert(role)
    }

    /// `result`: allow, deny or escalate.
    pub fn policy_decided(&self, result: &'static str, took: Duration) {
        self.policy_decisions.with_label_values(&[result]).inc();
        self.policy_seconds.observe(took.as_secs_f64());
    }

    pub fn reload_failed(&self, what: Reloaded) {
        self.reload_failures.with_label_values(&[what.as_str()]).inc();
    }

    /// A cause that was not announced to [`Metrics::new`] counts as "other".
    pub fn token_failed(&self, cause: &'static str) {
        let cause = if self.token_causes.contains(&cause) { cause } else { OTHER };
        self.token_failures.with_label_values(&[cause]).inc();
    }

    /// `bound`: the rate of an address or of a client id, an address's share of the places, all places, or the wait for a turn.
    pub fn token_request_turned_away(&self, bound: &'static str) {
        let bound = if TOKEN_BOUNDS.contains(&bound) { bound } else { OTHER };
        self.tokens_turned_away.with_label_values(&[bound]).inc();
    }

    /// The key set's URL was asked. Good keys, changed or not, are as old as this from now on.
    pub fn keys_fetched(&self, result: KeysFetched) {
        self.jwks_fetches.with_label_values(&[result.as_str()]).inc();
        if result != KeysFetched::Failed {
            let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
            self.jwks_confirmed.set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        }
    }

    /// `backend`: its name in the configuration.
    pub fn backend_up(&self, backend: &str, up: bool) {
        self.backend_up.with_label_values(&[backend]).set(i64::from(up));
    }

    /// Its series are there from the start, with 0; so are those of `reasons` for which requests may fail over.
    pub fn backend_known<const N: usize>(&self, backend: &str, reasons: [&'static str; N]) {
        self.backend_drained(backend, false);
        for result in reasons.into_iter().chain(["ok"]) {
            self.backend_attempts.with_label_values(&[backend, result]);
        }
        for reason in reasons {
            self.failovers.with_label_values(&[reason]);
        }
    }

    pub fn backend_drained(&self, backend: &str, drained: bool) {
        self.backend_drained.with_label_values(&[backend]).set(i64::from(drained));
    }

    /// `result`: `ok`, or a word of the code.
    pub fn backend_attempt(&self, backend: &str, result: &'static str) {
        self.backend_attempts.with_label_values(&[backend, result]).inc();
    }

    /// `reason`: a word of the code.
    pub fn failed_over(&self, reason: &'static str) {
        self.failovers.with_label_values(&[reason]).inc();
    }

    pub fn upstream_connection(&self, reused: bool) {
        if reused { &self.connections_reused } else { &self.connections_new }.inc();
    }

    /// `reason`: a word of the code.
    pub fn unparsed(&self, reason: &'static str) {
        self.unparsed.with_label_values(&[reason]).inc();
    }

    pub fn panicked(&self) {
        self.panics.inc();
    }

    pub(super) fn audit_written(&self, phases: [u64; Phase::ALL.len()]) {
        for (counter, records) in self.audit_records.iter().zip(phases) {
            counter.inc_by(records);
        }
    }

    pub(super) fn audit_unavailable(&self) {
        self.audit_unavailable.inc();
    }

    pub(super) fn audit_failing(&self, failing: bool) {
        self.audit_failing.set(i64::from(failing));
    }

    pub(super) fn audit_lag(&self, sink: &'static str, records: u64) {
        self.audit_lag.with_label_values(&[sink]).set(i64::try_from(records).unwrap_or(i64::MAX));
    }

    pub(super) fn audit_synced(&self, took: Duration, failed: bool) {
        self.audit_fsync.observe(took.as_secs_f64());
        self.audit_fsync_failures.inc_by(u64::from(failed));
    }

    pub(super) fn audit_segment_opened(&self) {
        self.audit_segments.inc();
    }

    pub(super) fn audit_bytes(&self, bytes: u64) {
        self.audit_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    pub(super) fn audit_checkpoint(&self) {
        self.audit_checkpoints.inc();
    }

    pub(super) fn audit_checkpoint_copy_failed(&self) {
        self.audit_checkpoint_copy_failures.inc();
    }

    pub(super) fn audit_tombstone(&self, bytes: u64) {
        self.audit_tombstones.inc();
        self.audit_deleted_bytes.inc_by(bytes);
    }

    /// One chain of a process that died, and how many requests it had open.
    pub(super) fn audit_adopted(&self, requests: u64) {
        self.audit_adopted.inc();
        self.audit_crashed.inc_by(requests);
    }

    pub(super) fn audit_dropped(&self, sink: &'static str, records: u64) {
        self.audit_dropped.with_label_values(&[sink]).inc_by(records);
    }

    pub(super) fn audit_free_bytes(&self, bytes: u64) {
        self.audit_free.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// The series of a sink that is sent the audit from its files. `name`: what kind it is, of which there is one.
    pub fn audit_sink(&self, name: &'static str) -> SinkMetrics {
        SinkMetrics {
            lag_records: self.audit_lag.with_label_values(&[name]),
            lag_seconds: self.sinks.behind.with_label_values(&[name]),
            delivered: self.sinks.delivered.with_label_values(&[name]),
            failures: self.sinks.failures.with_label_values(&[name]),
            last_success: self.sinks.last_success.with_label_values(&[name]),
            dropped: self.audit_dropped.with_label_values(&[name]),
        }
    }

    pub(super) fn folded_refusal(&self) {
        self.folded_refusals.inc();
    }
}

/// Families with a series for each configured sink.
struct Sinks {
    delivered: IntCounterVec,
    failures: IntCounterVec,
    behind: IntGaugeVec,
    last_success: IntGaugeVec,
}

/// One sink's series.
pub struct SinkMetrics {
    lag_records: IntGauge,
    lag_seconds: IntGauge,
    delivered: IntCounter,
    failures: IntCounter,
    last_success: IntGauge,
    dropped: IntCounter,
}

impl SinkMetrics {
    /// How many lines the sink does not have, and how old the oldest of them is.
    pub fn behind(&self, records: u64, seconds: u64) {
        self.lag_records.set(i64::try_from(records).unwrap_or(i64::MAX));
        self.lag_seconds.set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }

    pub fn delivered(&self, records: u64) {
        self.delivered.inc_by(records);
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        self.last_success.set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    }

    pub fn failed(&self) {
        self.failures.inc();
    }

    /// Lines that the sink will never get.
    pub fn dropped(&self, records: u64) {
        self.dropped.inc_by(records);
    }
}

/// The series of a counter that have `value` for `label`, added up; all of them for the label "".
fn sum_where(counters: &IntCounterVec, label: &str, value: &str) -> u64 {
    let families = counters.collect();
    let series = families.iter().flat_map(|family| family.get_metric());
    let wanted = series.filter(|series| {
        label.is_empty() || series.get_label().iter().any(|pair| pair.name() == label && pair.value() == value)
    });
    wanted.map(|series| series.get_counter().get_value() as u64).sum()
}

/// A request being served: counted while it lives.
pub struct InFlight(IntGauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A request that waits for a backend: counted while it lives.
pub struct Waiting {
    waiting: IntGauge,
    seconds: Histogram,
}

impl Waiting {
    /// It has waited for so long, and goes to a backend now.
    pub fn served(self, waited: Duration) {
        self.seconds.observe(waited.as_secs_f64());
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waiting.dec();
    }
}

/// The label value of what has no time series of its own.
const OTHER: &str = "other";

/// Makes metrics with our prefix, and registers each.
struct Make<'a> {
    registry: &'a Registry,
}

impl Make<'_> {
    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let metric = made.expect("names and labels are literals of this module, which its tests make");
        self.registry
            .register(Box::new(metric.clone()))
            .expect("each name occurs once in this module, which its tests register");
        metric
    }

    fn opts(name: &str, help: &str) -> Opts {
        Opts::new(format!("behavry_ollama_{name}"), help)
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(Self::opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Self::opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(Self::opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Self::opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts { common_opts: Self::opts(name, help), buckets: buckets.to_vec() };
        self.register(Histogram::with_opts(opts))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let opts = HistogramOpts { common_opts: Self::opts(name, help), buckets: buckets.to_vec() };
        self.register(HistogramVec::new(opts, labels))
    }
}

fn unresolved<T>(places: usize) -> Vec<OnceLock<T>> {
    std::iter::repeat_with(OnceLock::new).take(places).collect()
}

/// Uses the child at `place`, which is looked up the first time. Without a place in the array it is looked up each time.
fn resolved<T>(places: &[OnceLock<T>], place: usize, look_up: impl FnOnce() -> T, then: impl FnOnce(&T)) {
    match places.get(place) {
        Some(child) => then(child.get_or_init(look_up)),
        None => then(&look_up()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        Metrics::new("0.1.0", &["expired", "signature"])
    }

    fn chat() -> Measures {
        Measures {
            way: Way::Ollama(Endpoint::Chat),
            took: Duration::from_millis(40),
            to_first_byte: Some(Duration::from_millis(3)),
            added: Some(Duration::from_micros(60)),
            generating: Some(Duration::from_millis(500)),
            ..Measures::default()
        }
    }

    fn reply() -> Entry<'static> {
        Entry {
            response_code: Some(200),
            input_tokens: Some(26),
            output_tokens: Some(9),
            bytes_in: Some(100),
            bytes_out: Some(2000),
            ..Entry::default()
        }
    }

    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|found| found == line), "{line}\nnot in\n{text}");
    }

    #[test]
    fn a_settled_exchange_moves_every_metric_it_should() {
        let metrics = metrics();
        let measures = Measures { model: metrics.known_model("llama3.2"), role: metrics.role("internal"), ..chat() };
        metrics.settled(Outcome::Complete, &reply(), &measures);
        metrics.settled(Outcome::Complete, &reply(), &measures);
        let text = metrics.render();
        for line in [
            r#"behavry_ollama_requests_total{endpoint="chat",outcome="complete",status_class="2xx"} 2"#,
            r#"behavry_ollama_tokens_total{direction="in",model="llama3.2",role="internal"} 52"#,
            r#"behavry_ollama_tokens_total{direction="out",model="llama3.2",role="internal"} 18"#,
            r#"behavry_ollama_tokens_per_second_bucket{model="llama3.2",le="20"} 2"#,
            r#"behavry_ollama_tokens_per_second_bucket{model="llama3.2",le="10"} 0"#,
            r#"behavry_ollama_time_to_first_byte_seconds_count{endpoint="chat"} 2"#,
            r#"behavry_ollama_request_duration_seconds_count{endpoint="chat"} 2"#,
            r#"behavry_ollama_added_seconds_bucket{le="0.000075"} 2"#,
            r#"behavry_ollama_bytes_total{direction="in"} 200"#,
            r#"behavry_ollama_bytes_total{direction="out"} 4000"#,
        ] {
            has(&text, line);
        }
    }

    #[test]
    fn a_reply_that_waited_for_its_model_is_a_load_and_one_that_found_it_is_none() {
        let metrics = metrics();
        for (ms, loads) in [(59, None), (250, Some(1)), (7000, Some(2))] {
            let loading = Some(Duration::from_millis(ms));
            let measures = Measures { loading, model: metrics.known_model("llama3.2"), ..chat() };
            metrics.settled(Outcome::Complete, &reply(), &measures);
            match loads {
                None => assert!(!metrics.render().contains(r#"model_loads_total{model="llama3.2"}"#)),
                Some(n) => {
                    has(&metrics.render(), &format!(r#"behavry_ollama_model_loads_total{{model="llama3.2"}} {n}"#))
                }
            }
        }
    }

    #[test]
    fn every_way_outcome_and_class_has_a_series_of_its_own() {
        let metrics = metrics();
        let ways = [Way::Unmatched, Way::Token, Way::Ollama(Endpoint::Root), Way::Ollama(Endpoint::Blob)];
        let codes = [None, Some(100), Some(204), Some(302), Some(404), Some(503)];
        for way in ways {
            for outcome in Outcome::ALL {
                for response_code in codes {
                    let entry = Entry { response_code, ..Entry::default() };
                    metrics.settled(outcome, &entry, &Measures { way, ..Measures::default() });
                }
            }
        }
        let text = metrics.render();
        let series: Vec<_> = text.lines().filter(|line| line.starts_with("behavry_ollama_requests_total{")).collect();
        assert_eq!(series.len(), ways.len() * Outcome::ALL.len() * codes.len());
        assert!(series.iter().all(|line| line.ends_with(" 1")), "{series:?}");
    }

    #[test]
    fn a_client_cannot_make_a_time_series() {
        let metrics = metrics();
        for n in 0..2000 {
            let measures = Measures {
                model: metrics.model(&format!("made-up-{n}")),
                role: metrics.role(&format!("role-{n}")),
                ..chat()
            };
            metrics.settled(Outcome::Complete, &reply(), &measures);
            metrics.known_model(&format!("model-{n}"));
        }
        metrics.token_failed("made up");
        let wild = Entry { response_code: Some(u16::MAX), ..Entry::default() };
        metrics.settled(Outcome::Complete, &wild, &chat());
        let text = metrics.render();
        assert!(!text.contains("made-up") && !text.contains("made up"));
        let series = text.lines().filter(|line| line.starts_with("behavry_ollama_tokens_total{")).count();
        assert!(series <= 2 * (ROLES + 2), "{series} series");
        has(&text, r#"behavry_ollama_token_verification_failures_total{cause="other"} 1"#);
        let known = metrics.known_model("model-0");
        assert_eq!(known.as_str(), "model-0");
        assert_eq!(metrics.known_model("model-1999").as_str(), OTHER, "no more than {MODELS}");
    }

    #[test]
    fn what_can_be_alarmed_on_is_there_before_it_happens() {
        let text = metrics().render();
        for line in [
            r#"behavry_ollama_token_verification_failures_total{cause="expired"} 0"#,
            r#"behavry_ollama_token_requests_turned_away_total{bound="client_rate"} 0"#,
            r#"behavry_ollama_policy_decisions_total{result="escalate"} 0"#,
            r#"behavry_ollama_audit_records_total{phase="stream_start"} 0"#,
            r#"behavry_ollama_audit_dropped_records_total{sink="file"} 0"#,
            r#"behavry_ollama_upstream_connections_total{reused="true"} 0"#,
            "behavry_ollama_audit_failing 0",
            "behavry_ollama_audit_unavailable_total 0",
            "behavry_ollama_panics_total 0",
            r#"behavry_ollama_build_info{version="0.1.0"} 1"#,
        ] {
            has(&text, line);
        }
    }

    #[test]
    fn requests_in_flight_go_down_again_whatever_happens() {
        let metrics = metrics();
        let running = metrics.request_began();
        has(&metrics.render(), "behavry_ollama_requests_in_flight 1");
        drop(running);
        has(&metrics.render(), "behavry_ollama_requests_in_flight 0");
    }

    #[test]
    fn label_values_with_quotes_and_newlines_stay_on_their_line() {
        let metrics = metrics();
        metrics.backend_up("a\"b\\c\nd", true);
        has(&metrics.render(), r#"behavry_ollama_backend_up{backend="a\"b\\c\nd"} 1"#);
    }
}
