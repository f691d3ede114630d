//! What requests came to: how many, how they ended, how long they took, and the tokens that they used.

use std::sync::OnceLock;
use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::labels::{ModelLabel, ModelSeries, Names, RoleLabel};
use super::make::Make;
use super::{MODELS, Metrics, OTHER, REQUEST_SECONDS, ROLES};
use crate::ledger::{Entry, Measures, Outcome};
use crate::wire::Endpoint;

/// The proxy's own part of a request: fine below a millisecond, where it should be.
const ADDED_SECONDS: &[f64] = &[
    0.000_025, 0.000_05, 0.000_075, 0.000_1, 0.000_15, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25, 1.0,
];
const TOKENS_PER_SECOND: &[f64] = &[1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0];

/// A model that is loaded is found within some ten milliseconds (59 at most in the replies recorded from three versions of Ollama), and
/// the smallest takes 250 to load.
const A_LOAD: Duration = Duration::from_millis(200);

/// Status classes: 1xx to 5xx, and none.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

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

pub(super) struct Exchanges {
    pub(super) requests: IntCounterVec,
    requests_resolved: Vec<OnceLock<IntCounter>>,
    to_first_byte: HistogramVec,
    to_first_byte_resolved: Vec<OnceLock<Histogram>>,
    duration: HistogramVec,
    duration_resolved: Vec<OnceLock<Histogram>>,
    added: Histogram,
    in_flight: IntGauge,
    memory_bytes: IntGaugeVec,
    bytes_in: IntCounter,
    bytes_out: IntCounter,
    pub(super) tokens: IntCounterVec,
    tokens_per_second: HistogramVec,
    model_loads: IntCounterVec,
    models: Names<ModelLabel>,
    other_models: ModelSeries,
    roles: Names<RoleLabel>,
}

impl Exchanges {
    pub(super) fn new(make: &Make<'_>) -> Exchanges {
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
        let memory_bytes = make.gauges(
            "memory_bytes",
            "Bytes held of request bodies (limits.bodies_in_memory_bytes), and of replies that are judged first or that clients have \
             not taken yet (limits.replies_in_memory_bytes).",
            &["of"],
        );
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
        Exchanges {
            requests_resolved: unresolved(WAYS * Outcome::ALL.len() * CLASSES.len()),
            to_first_byte_resolved: unresolved(WAYS),
            duration_resolved: unresolved(WAYS),
            bytes_in: bytes.with_label_values(&["in"]),
            bytes_out: bytes.with_label_values(&["out"]),
            models: Names::new(MODELS),
            other_models: ModelSeries::default(),
            roles: Names::new(ROLES),
            requests,
            to_first_byte,
            duration,
            added,
            in_flight,
            memory_bytes,
            tokens,
            tokens_per_second,
            model_loads,
        }
    }
}

impl Metrics {
    /// Counts a request as being served until the returned value is dropped.
    pub fn request_began(&self) -> InFlight {
        self.exchanges.in_flight.inc();
        InFlight(self.exchanges.in_flight.clone())
    }

    /// `of`: requests or replies.
    pub fn memory_held(&self, of: &'static str, bytes: usize) {
        self.exchanges.memory_bytes.with_label_values(&[of]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// The end of a request.
    pub fn settled(&self, outcome: Outcome, entry: &Entry<'_>, measures: &Measures) {
        let way = measures.way;
        let class = entry.response_code.map_or(0, |code| usize::from(code / 100));
        let class = if class < CLASSES.len() { class } else { 0 };
        let place = (way.place() * Outcome::ALL.len() + outcome as usize) * CLASSES.len() + class;
        resolved(
            &self.exchanges.requests_resolved,
            place,
            || self.exchanges.requests.with_label_values(&[way.as_str(), outcome.as_str(), CLASSES[class]]),
            IntCounter::inc,
        );
        resolved(
            &self.exchanges.duration_resolved,
            way.place(),
            || self.exchanges.duration.with_label_values(&[way.as_str()]),
            |duration| duration.observe(measures.took.as_secs_f64()),
        );
        if let Some(to_first_byte) = measures.to_first_byte {
            resolved(
                &self.exchanges.to_first_byte_resolved,
                way.place(),
                || self.exchanges.to_first_byte.with_label_values(&[way.as_str()]),
                |histogram| histogram.observe(to_first_byte.as_secs_f64()),
            );
        }
        if let Some(added) = measures.added {
            self.exchanges.added.observe(added.as_secs_f64());
        }
        self.exchanges.bytes_in.inc_by(entry.bytes_in.unwrap_or(0));
        self.exchanges.bytes_out.inc_by(entry.bytes_out.unwrap_or(0));
        self.used_tokens(entry, measures);
        if measures.loading.is_some_and(|loading| loading >= A_LOAD) {
            self.exchanges.model_loads.with_label_values(&[measures.model.as_str()]).inc();
        }
    }

    fn used_tokens(&self, entry: &Entry<'_>, measures: &Measures) {
        if entry.input_tokens.is_none() && entry.output_tokens.is_none() {
            return;
        }
        let (model, role) = (&measures.model, &measures.role);
        let series = model.series().unwrap_or(&self.exchanges.other_models);
        let tokens = series.tokens(role, || {
            ["in", "out"]
                .map(|direction| self.exchanges.tokens.with_label_values(&[direction, model.as_str(), role.as_str()]))
        });
        tokens[0].inc_by(entry.input_tokens.unwrap_or(0));
        tokens[1].inc_by(entry.output_tokens.unwrap_or(0));
        if let (Some(out), Some(generating)) = (entry.output_tokens, measures.generating)
            && out > 0
            && !generating.is_zero()
        {
            series
                .per_second(|| self.exchanges.tokens_per_second.with_label_values(&[model.as_str()]))
                .observe(out as f64 / generating.as_secs_f64());
        }
    }

    /// Gives a model time series of its own. Only for models that a backend really holds, never for what a client names.
    pub fn known_model(&self, model: &str) -> ModelLabel {
        self.exchanges.models.insert(model)
    }

    /// The label of a model for a request: "other", unless it is known.
    pub fn model(&self, model: &str) -> ModelLabel {
        self.exchanges.models.find(model)
    }

    /// The label of a role. Only for roles from verified tokens.
    pub fn role(&self, role: &str) -> RoleLabel {
        self.exchanges.roles.insert(role)
    }
}

/// A request being served: counted while it lives.
pub struct InFlight(IntGauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
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
