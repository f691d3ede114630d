//! The backends, and who waits for one.

use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::labels::ModelLabel;
use super::make::Make;
use super::{Metrics, OTHER, REQUEST_SECONDS};

/// Why the queue has no place for a request: the `reason` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnedAway {
    /// Its agent has as many waiting as it may.
    Share,
    Full,
    /// It has waited for as long as it may.
    Expired,
}

impl TurnedAway {
    const ALL: [TurnedAway; 3] = [TurnedAway::Share, TurnedAway::Full, TurnedAway::Expired];

    fn as_str(self) -> &'static str {
        match self {
            TurnedAway::Share => "share",
            TurnedAway::Full => "full",
            TurnedAway::Expired => "expired",
        }
    }
}

/// What became of a load whose client had left (`streaming.shield_load_s`): the `result` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShieldedLoad {
    /// The backend began to answer.
    Loaded,
    Failed,
    /// The time was over, or the exchange was cut.
    Ended,
}

impl ShieldedLoad {
    const ALL: [ShieldedLoad; 3] = [ShieldedLoad::Loaded, ShieldedLoad::Failed, ShieldedLoad::Ended];

    fn as_str(self) -> &'static str {
        match self {
            ShieldedLoad::Loaded => "loaded",
            ShieldedLoad::Failed => "failed",
            ShieldedLoad::Ended => "ended",
        }
    }
}

pub(super) struct Fleet {
    up: IntGaugeVec,
    drained: IntGaugeVec,
    breakers_open: IntGaugeVec,
    attempts: IntCounterVec,
    failovers: IntCounterVec,
    connections_new: IntCounter,
    connections_reused: IntCounter,
    queue_waiting: IntGaugeVec,
    queue_seconds: HistogramVec,
    queue_turned_away: IntCounterVec,
    warmups: IntCounterVec,
    shielded_loads: IntCounterVec,
    mirror_fetched: IntCounter,
    mirror_served: IntCounter,
}

impl Fleet {
    pub(super) fn new(make: &Make<'_>) -> Fleet {
        let backend_up = make.gauges("backend_up", "Whether a backend answers (1) or not (0).", &["backend"]);
        let backend_drained =
            make.gauges("backend_drained", "Whether a backend is drained by command (1) or not (0).", &["backend"]);
        let breakers_open = make.gauges(
            "backend_breakers_open",
            "How many of a backend's breakers keep requests from it: its own, and one for each model that fails there.",
            &["backend"],
        );
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
        let queue_turned_away = make.counters(
            "queue_turned_away_total",
            "Requests that the queue had no place for: full, full of their agent's own (share), or waited in vain (expired).",
            &["reason"],
        );
        for reason in TurnedAway::ALL {
            queue_turned_away.with_label_values(&[reason.as_str()]);
        }
        let warmups = make.counters(
            "model_warmups_total",
            "Models that the proxy had loaded before anybody asked for them, by result (loaded, failed).",
            &["model", "result"],
        );
        for result in ["loaded", "failed"] {
            warmups.with_label_values(&[OTHER, result]);
        }
        let shielded_loads = make.counters(
            "shielded_loads_total",
            "Loads of a model that a backend was left to go on with after the client had gone, by what became of them.",
            &["result"],
        );
        for result in ShieldedLoad::ALL {
            shielded_loads.with_label_values(&[result.as_str()]);
        }
        let mirror_bytes = make.counters(
            "mirror_bytes_total",
            "Bytes of models that were fetched from a registry once for several backends, and that backends took from here.",
            &["direction"],
        );
        Fleet {
            up: backend_up,
            drained: backend_drained,
            breakers_open,
            attempts: backend_attempts,
            failovers,
            connections_new: connections.with_label_values(&["false"]),
            connections_reused: connections.with_label_values(&["true"]),
            queue_waiting,
            queue_seconds,
            queue_turned_away,
            warmups,
            shielded_loads,
            mirror_fetched: mirror_bytes.with_label_values(&["fetched"]),
            mirror_served: mirror_bytes.with_label_values(&["served"]),
        }
    }
}

impl Metrics {
    /// `backend`: its name in the configuration.
    pub fn backend_up(&self, backend: &str, up: bool) {
        self.fleet.up.with_label_values(&[backend]).set(i64::from(up));
    }

    /// Its series are there from the start, with 0; so are those of `reasons` for which requests may fail over.
    pub fn backend_known<const N: usize>(&self, backend: &str, reasons: [&'static str; N]) {
        self.backend_drained(backend, false);
        for result in reasons.into_iter().chain(["ok"]) {
            self.fleet.attempts.with_label_values(&[backend, result]);
        }
        for reason in reasons {
            self.fleet.failovers.with_label_values(&[reason]);
        }
    }

    pub fn backend_drained(&self, backend: &str, drained: bool) {
        self.fleet.drained.with_label_values(&[backend]).set(i64::from(drained));
    }

    /// `backend`: its name in the configuration. `open`: how many of its breakers are not closed.
    pub fn breakers_open(&self, backend: &str, open: usize) {
        self.fleet.breakers_open.with_label_values(&[backend]).set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// `result`: `ok`, or a word of the code.
    pub fn backend_attempt(&self, backend: &str, result: &'static str) {
        self.fleet.attempts.with_label_values(&[backend, result]).inc();
    }

    /// `reason`: a word of the code.
    pub fn failed_over(&self, reason: &'static str) {
        self.fleet.failovers.with_label_values(&[reason]).inc();
    }

    pub fn upstream_connection(&self, reused: bool) {
        if reused { &self.fleet.connections_reused } else { &self.fleet.connections_new }.inc();
    }

    /// A model of the configuration was loaded on a backend that holds it, or was not.
    pub fn warmed(&self, model: &str, loaded: bool) {
        let result = if loaded { "loaded" } else { "failed" };
        self.fleet.warmups.with_label_values(&[self.model(model).as_str(), result]).inc();
    }

    pub fn load_shielded(&self, result: ShieldedLoad) {
        self.fleet.shielded_loads.with_label_values(&[result.as_str()]).inc();
    }

    pub fn queue_turned_away(&self, reason: TurnedAway) {
        self.fleet.queue_turned_away.with_label_values(&[reason.as_str()]).inc();
    }

    /// Those that no backend was free for; an agent that has its share is none.
    pub fn turned_away_by_all(&self) -> u64 {
        let count = |why: TurnedAway| self.fleet.queue_turned_away.with_label_values(&[why.as_str()]).get();
        count(TurnedAway::Full) + count(TurnedAway::Expired)
    }

    /// Came from a registry.
    pub fn mirror_fetched(&self, bytes: u64) {
        self.fleet.mirror_fetched.inc_by(bytes);
    }

    /// Is on its way to a backend.
    pub fn mirror_served(&self, bytes: u64) {
        self.fleet.mirror_served.inc_by(bytes);
    }

    /// Counts a request as waiting for a backend until the returned value is dropped.
    pub fn queue_entered(&self, model: &ModelLabel, class: &'static str) -> Waiting {
        let labels = [model.as_str(), class];
        let waiting = self.fleet.queue_waiting.with_label_values(&labels);
        waiting.inc();
        Waiting { waiting, seconds: self.fleet.queue_seconds.with_label_values(&labels) }
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
