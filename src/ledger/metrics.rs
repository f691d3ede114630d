//! Every metric of the proxy. Nothing outside this module names one.
//!
//! Labels come from closed sets only: enums, words of the code, models that a backend really holds ([`Metrics::known_model`]) and roles
//! of signed tokens, the last two bounded in number. A client cannot make a time series. Label children are resolved once and kept
//! in arrays, since a look-up by label values hashes strings and takes a lock for each observation (prometheus 0.14).

use prometheus::{IntCounter, IntCounterVec, Registry, TextEncoder};

use self::audit::Audit;
use self::callers::Callers;
use self::exchanges::Exchanges;
use self::fleet::Fleet;
use self::make::Make;

mod audit;
mod callers;
mod exchanges;
mod fleet;
mod labels;
mod make;
mod totals;

pub use self::audit::SinkMetrics;
pub use self::callers::KeysFetched;
pub use self::exchanges::{InFlight, Way};
pub use self::fleet::{ShieldedLoad, TurnedAway, Waiting};
pub use self::labels::{ModelLabel, RoleLabel};
pub use self::totals::Totals;

/// Content type of [`Metrics::render`]: the Prometheus text format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Models with time series of their own; further ones are counted as "other". A host holds some dozens.
const MODELS: usize = 512;
/// Roles with time series of their own.
const ROLES: usize = 64;

/// A model answers within milliseconds (a list) to minutes (a load, a long reply).
const REQUEST_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
/// The label value of what has no time series of its own.
const OTHER: &str = "other";

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

/// All metrics, in a registry of their own. Its methods stand beside what they count.
pub struct Metrics {
    registry: Registry,
    exchanges: Exchanges,
    callers: Callers,
    fleet: Fleet,
    audit: Audit,
    reload_failures: IntCounterVec,
    unparsed: IntCounterVec,
    panics: IntCounter,
}

impl Metrics {
    /// `token_causes`: every cause for which a token may fail to verify; each is there from the start, with 0. `version`: ours.
    pub fn new(version: &str, token_causes: &[&'static str]) -> Metrics {
        let registry = Registry::new();
        let make = Make { registry: &registry };
        let reload_failures = make.counters(
            "reload_failures_total",
            "Changes of a watched file that did not load, by what it holds; the last good one stayed.",
            &["what"],
        );
        for what in Reloaded::ALL {
            reload_failures.with_label_values(&[what.as_str()]);
        }
        let unparsed =
            make.counters("unparsed_requests_total", "Requests whose head could not be read, by reason.", &["reason"]);
        let panics = make.counter("panics_total", "Panics caught.");
        let build = make.gauges("build_info", "The running version; always 1.", &["version"]);
        build.with_label_values(&[version]).set(1);
        Metrics {
            exchanges: Exchanges::new(&make),
            callers: Callers::new(&make, token_causes),
            fleet: Fleet::new(&make),
            audit: Audit::new(&make),
            reload_failures,
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

    /// Panics that were caught.
    pub fn panics(&self) -> u64 {
        self.panics.get()
    }

    /// Changes of `what` that did not load.
    pub fn reload_failures(&self, what: Reloaded) -> u64 {
        self.reload_failures.with_label_values(&[what.as_str()]).get()
    }

    pub fn reload_failed(&self, what: Reloaded) {
        self.reload_failures.with_label_values(&[what.as_str()]).inc();
    }

    /// `reason`: a word of the code.
    pub fn unparsed(&self, reason: &'static str) {
        self.unparsed.with_label_values(&[reason]).inc();
    }

    pub fn panicked(&self) {
        self.panics.inc();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ledger::{Entry, Measures, Outcome};
    use crate::wire::Endpoint;

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
