//! The audit: what was written, what could not be, and how far each sink is behind.

use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::Metrics;
use super::make::Make;
use crate::ledger::Phase;

/// A disk with a battery answers in tens of microseconds, one that spins in tens of milliseconds.
const FSYNC_SECONDS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

pub(super) struct Audit {
    records: [IntCounter; Phase::ALL.len()],
    unavailable: IntCounter,
    failing: IntGauge,
    lag: IntGaugeVec,
    dropped: IntCounterVec,
    sinks: Sinks,
    free: IntGauge,
    fsync: Histogram,
    fsync_failures: IntCounter,
    segments: IntCounter,
    bytes: IntGauge,
    checkpoints: IntCounter,
    checkpoint_copy_failures: IntCounter,
    tombstones: IntCounter,
    deleted_bytes: IntCounter,
    adopted: IntCounter,
    crashed: IntCounter,
    folded_refusals: IntCounter,
}

impl Audit {
    pub(super) fn new(make: &Make<'_>) -> Audit {
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
        Audit {
            records: Phase::ALL.map(|phase| audit_records.with_label_values(&[phase.as_str()])),
            unavailable: audit_unavailable,
            failing: audit_failing,
            lag: audit_lag,
            dropped: audit_dropped,
            sinks,
            free: audit_free,
            fsync: audit_fsync,
            fsync_failures: audit_fsync_failures,
            segments: audit_segments,
            bytes: audit_bytes,
            checkpoints: audit_checkpoints,
            checkpoint_copy_failures: audit_checkpoint_copy_failures,
            tombstones: audit_tombstones,
            deleted_bytes: audit_deleted_bytes,
            adopted: audit_adopted,
            crashed: audit_crashed,
            folded_refusals,
        }
    }
}

impl Metrics {
    pub(in crate::ledger) fn audit_written(&self, phases: [u64; Phase::ALL.len()]) {
        for (counter, records) in self.audit.records.iter().zip(phases) {
            counter.inc_by(records);
        }
    }

    pub(in crate::ledger) fn audit_unavailable(&self) {
        self.audit.unavailable.inc();
    }

    pub(in crate::ledger) fn audit_failing(&self, failing: bool) {
        self.audit.failing.set(i64::from(failing));
    }

    pub(in crate::ledger) fn audit_lag(&self, sink: &'static str, records: u64) {
        self.audit.lag.with_label_values(&[sink]).set(i64::try_from(records).unwrap_or(i64::MAX));
    }

    pub(in crate::ledger) fn audit_synced(&self, took: Duration, failed: bool) {
        self.audit.fsync.observe(took.as_secs_f64());
        self.audit.fsync_failures.inc_by(u64::from(failed));
    }

    pub(in crate::ledger) fn audit_segment_opened(&self) {
        self.audit.segments.inc();
    }

    pub(in crate::ledger) fn audit_bytes(&self, bytes: u64) {
        self.audit.bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    pub(in crate::ledger) fn audit_checkpoint(&self) {
        self.audit.checkpoints.inc();
    }

    pub(in crate::ledger) fn audit_checkpoint_copy_failed(&self) {
        self.audit.checkpoint_copy_failures.inc();
    }

    pub(in crate::ledger) fn audit_tombstone(&self, bytes: u64) {
        self.audit.tombstones.inc();
        self.audit.deleted_bytes.inc_by(bytes);
    }

    /// One chain of a process that died, and how many requests it had open.
    pub(in crate::ledger) fn audit_adopted(&self, requests: u64) {
        self.audit.adopted.inc();
        self.audit.crashed.inc_by(requests);
    }

    pub(in crate::ledger) fn audit_dropped(&self, sink: &'static str, records: u64) {
        self.audit.dropped.with_label_values(&[sink]).inc_by(records);
    }

    pub(in crate::ledger) fn audit_free_bytes(&self, bytes: u64) {
        self.audit.free.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// The series of a sink that is sent the audit from its files. `name`: what kind it is, of which there is one.
    pub fn audit_sink(&self, name: &'static str) -> SinkMetrics {
        SinkMetrics {
            lag_records: self.audit.lag.with_label_values(&[name]),
            lag_seconds: self.audit.sinks.behind.with_label_values(&[name]),
            delivered: self.audit.sinks.delivered.with_label_values(&[name]),
            failures: self.audit.sinks.failures.with_label_values(&[name]),
            last_success: self.audit.sinks.last_success.with_label_values(&[name]),
            dropped: self.audit.dropped.with_label_values(&[name]),
        }
    }

    pub(in crate::ledger) fn folded_refusal(&self) {
        self.audit.folded_refusals.inc();
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
