//! What happened. One record, several readers: the audit's durable lines, and the metrics.
//!
//! - [`record`]: one record of the audit, built from an [`Entry`].
//! - [`chain`]: the format on disk: lines, their hashes, marks, names.
//! - [`activity`]: the last events, for those who watch.
//! - [`audit`]: one thread owns the file, writes in groups, and gives receipts.
//! - [`evidence`]: a part of the audit as a package that Behavry's public verifier takes.
//! - [`fold`]: refusals of strangers, counted instead of written one by one.
//! - [`metrics`]: every metric of the proxy, named here and nowhere else.
//! - [`trail`]: reads the audit back, also while it is written.
//! - [`verify`]: whether the audit is what was written.
//!
//! The rule (contract, section 6): a request is forwarded only against a [`Receipt`] that its `request` record is written, and room
//! for its later records is reserved with it. Every request that was parsed has exactly one `final` record, which
//! [`Ledger::settle`] writes: with the receipt where there is one, without it for what was refused earlier.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

pub mod activity;
pub mod audit;
pub mod chain;
pub mod evidence;
pub mod fold;
pub mod metrics;
pub mod record;
pub mod trail;
pub mod verify;

pub use activity::{Activity, Alert};
pub use audit::{Audit, AuditError, AuditSettings, AuditUnavailable, Durability, Receipt};
pub use metrics::{Metrics, ModelLabel, Reloaded, RoleLabel, SinkMetrics, Way};
pub use record::{Entry, Record};

/// Which of an exchange's records a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The decision is made, the backend not yet contacted.
    Request,
    /// A streamed reply has begun; the upstream's status is known.
    StreamStart,
    /// The end, whatever it was.
    Final,
}

impl Phase {
    pub const ALL: [Phase; 3] = [Phase::Request, Phase::StreamStart, Phase::Final];

    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Request => "request",
            Phase::StreamStart => "stream_start",
            Phase::Final => "final",
        }
    }
}

/// How an exchange ended (contract, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The reply was passed on whole, whatever its status.
    Complete,
    /// We answered instead of a backend.
    Refused,
    /// The client went away.
    ClientAbort,
    /// The client read too slowly, and its stream was cut.
    SlowClient,
    /// No backend could be reached, or it answered garbage.
    UpstreamError,
    /// A backend broke off in mid-reply.
    UpstreamReset,
    /// Silence for longer than the limit.
    Timeout,
    /// The session was revoked while it ran.
    Revoked,
    /// A budget ran out while it ran.
    BudgetCut,
    /// We are shutting down.
    Shutdown,
    /// A fault of ours: a panic, or an exchange that nobody settled.
    InternalError,
    /// Left open by a process that died; found at the next start.
    Crashed,
}

impl Outcome {
    pub const ALL: [Outcome; 12] = [
        Outcome::Complete,
        Outcome::Refused,
        Outcome::ClientAbort,
        Outcome::SlowClient,
        Outcome::UpstreamError,
        Outcome::UpstreamReset,
        Outcome::Timeout,
        Outcome::Revoked,
        Outcome::BudgetCut,
        Outcome::Shutdown,
        Outcome::InternalError,
        Outcome::Crashed,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Complete => "complete",
            Outcome::Refused => "refused",
            Outcome::ClientAbort => "client_abort",
            Outcome::SlowClient => "slow_client",
            Outcome::UpstreamError => "upstream_error",
            Outcome::UpstreamReset => "upstream_reset",
            Outcome::Timeout => "timeout",
            Outcome::Revoked => "revoked",
            Outcome::BudgetCut => "budget_cut",
            Outcome::Shutdown => "shutdown",
            Outcome::InternalError => "internal_error",
            Outcome::Crashed => "crashed",
        }
    }
}

/// What the metrics need of a settled exchange beyond its [`Entry`]: finer times, and labels resolved before.
#[derive(Clone, Default)]
pub struct Measures {
    pub way: Way,
    /// The stable code of a refusal, or why a token did not hold: a word of a closed set, by which strangers' refusals are counted.
    pub cause: Option<&'static str>,
    /// From the first byte of the request to the last of the reply.
    pub took: Duration,
    /// From the first byte of the request to the first of the reply.
    pub to_first_byte: Option<Duration>,
    /// What of `took` was ours: neither the client's nor a backend's.
    pub added: Option<Duration>,
    /// How long the backend generated, if it streamed: from the first byte of its reply to the last. With the output tokens it gives
    /// their rate.
    pub generating: Option<Duration>,
    /// How long the request waited for its model to be loaded, as the backend says; on `/v1` it says nothing.
    pub loading: Option<Duration>,
    pub model: ModelLabel,
    pub role: RoleLabel,
}

/// The audit and the metrics: what a request is told to.
pub struct Ledger {
    pub audit: Audit,
    pub metrics: Arc<Metrics>,
}

impl Ledger {
    /// Opens the audit and starts its threads: call it after daemonising, never before.
    pub fn start(settings: AuditSettings, metrics: Arc<Metrics>) -> Result<Ledger, AuditError> {
        Ok(Ledger { audit: Audit::start(settings, Arc::clone(&metrics))?, metrics })
    }

    /// Writes the `request` record. `entry` is written down before this returns; the receipt comes when the line is in the file.
    pub fn record(&self, entry: &Entry<'_>) -> impl Future<Output = Result<Receipt, AuditUnavailable>> + Send + use<> {
        self.audit.record_request(entry)
    }

    /// The end of an exchange: writes its one `final` record and moves the metrics. Never blocks.
    ///
    /// Without a receipt and without a caller it is a stranger's, and folded by the client's address.
    pub fn settle(&self, receipt: Option<Receipt>, outcome: Outcome, entry: &Entry<'_>, measures: &Measures) {
        match (receipt, entry.source_ip) {
            (Some(receipt), _) => receipt.settle(outcome, entry),
            (None, Some(address)) if entry.agent_id.is_none() => {
                self.audit.note_stranger(address, outcome, measures.cause.unwrap_or(outcome.as_str()), entry);
            }
            // The audit counts what it had no room for; there is nobody left to tell.
            (None, _) => _ = self.audit.note_final(outcome, entry),
        }
        self.metrics.settled(outcome, entry, measures);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_in_records_and_in_labels_are_the_same() {
        for outcome in Outcome::ALL {
            assert_eq!(serde_json::from_value::<Outcome>(outcome.as_str().into()).ok(), Some(outcome));
        }
        for phase in Phase::ALL {
            assert_eq!(serde_json::from_value::<Phase>(phase.as_str().into()).ok(), Some(phase));
        }
    }

    #[tokio::test]
    async fn every_end_of_an_exchange_is_one_final_record_and_one_counted_request() {
        let folder = std::env::temp_dir().join(format!("behavry-ledger-settle-{}", std::process::id()));
        let settings = AuditSettings { dir: Some(folder.clone()), stdout: false, ..AuditSettings::default() };
        let ledger = Ledger::start(settings, Arc::new(Metrics::new("test", &[]))).expect("the ledger starts");
        let known = Entry { agent_id: Some("agent-1"), response_code: Some(200), ..Entry::default() };
        let stranger = Entry {
            source_ip: Some([192, 0, 2, 1].into()),
            response_code: Some(401),
            error: Some("expired"),
            ..Entry::default()
        };
        let measures = Measures { cause: Some("expired"), ..Measures::default() };
        let receipt = ledger.record(&known).await.expect("a receipt");
        ledger.settle(Some(receipt), Outcome::Complete, &known, &measures);
        ledger.settle(None, Outcome::Refused, &Entry { response_code: Some(403), ..known }, &measures);
        for _ in 0..100 {
            ledger.settle(None, Outcome::Refused, &stranger, &measures);
        }
        ledger.audit.close(Duration::from_secs(20)).expect("all is written");

        let segment = trail::segments(&folder).expect("the folder").swap_remove(0);
        let text = std::fs::read_to_string(folder.join(segment.to_string())).expect("the audit file");
        std::fs::remove_dir_all(folder).expect("removed");
        let lines: Vec<_> = text.lines().filter_map(|line| Record::read(line.as_bytes())).collect();
        let finals = |agent: Option<&str>| {
            let of = |line: &&Record<'_>| line.extra.phase == Phase::Final && line.agent_id.as_deref() == agent;
            lines.iter().filter(of).map(|line| line.error.as_deref().unwrap_or_default()).collect::<Vec<_>>()
        };
        assert_eq!(finals(Some("agent-1")).len(), 2);
        let strangers = finals(None);
        let (singles, folded): (Vec<_>, Vec<_>) = strangers.into_iter().partition(|error| *error == "expired");
        assert!(singles.len() >= 10 && singles.len() < 100 && !folded.is_empty(), "{} single", singles.len());
        assert!(folded.iter().all(|error| error.contains("refusals folded into this record: expired ")), "{folded:?}");
        let metrics = ledger.metrics.render();
        for line in [
            r#"behavry_ollama_requests_total{endpoint="unmatched",outcome="complete",status_class="2xx"} 1"#,
            r#"behavry_ollama_requests_total{endpoint="unmatched",outcome="refused",status_class="4xx"} 101"#,
            r#"behavry_ollama_audit_records_total{phase="request"} 1"#,
        ] {
            assert!(metrics.lines().any(|found| found == line), "{line} not in\n{metrics}");
        }
    }
}
