//! The backends, and who waits for one.

use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::labels::ModelLabel;
use super::make::Make;
use super::{Metrics, OTHER, REQUEST_SECONDS};

pub(super) struct Fleet {
    up: IntGaugeVec,
    drained: IntGaugeVec,
    attempts: IntCounterVec,
    failovers: IntCounterVec,
    connections_new: IntCounter,
    connections_reused: IntCounter,
    queue_waiting: IntGaugeVec,
    queue_seconds: HistogramVec,
    warmups: IntCounterVec,
}

impl Fleet {
    pub(super) fn new(make: &Make<'_>) -> Fleet {
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
        let warmups = make.counters(
            "model_warmups_total",
            "Models that the proxy had loaded before anybody asked for them, by result (loaded, failed).",
            &["model", "result"],
        );
        for result in ["loaded", "failed"] {
            warmups.with_label_values(&[OTHER, result]);
        }
        Fleet {
            up: backend_up,
            drained: backend_drained,
            attempts: backend_attempts,
            failovers,
            connections_new: connections.with_label_values(&["false"]),
            connections_reused: connections.with_label_values(&["true"]),
            queue_waiting,
            queue_seconds,
            warmups,
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
