//! Who asks, and whether they may: tokens, the keys that verify them, and the policy's decisions.

use std::time::Duration;

use prometheus::{Histogram, IntCounterVec, IntGauge};

use super::make::Make;
use super::{Metrics, OTHER};

const POLICY_SECONDS: &[f64] =
    &[0.000_001, 0.000_005, 0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.001, 0.01, 0.1];

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

pub(super) struct Callers {
    pub(super) policy_decisions: IntCounterVec,
    policy_seconds: Histogram,
    token_failures: IntCounterVec,
    jwks_fetches: IntCounterVec,
    jwks_confirmed: IntGauge,
    token_causes: Vec<&'static str>,
    tokens_turned_away: IntCounterVec,
}

impl Callers {
    pub(super) fn new(make: &Make<'_>, token_causes: &[&'static str]) -> Callers {
        let policy_decisions = make.counters("policy_decisions_total", "Policy decisions by result.", &["result"]);
        for result in ["allow", "deny", "escalate"] {
            policy_decisions.with_label_values(&[result]);
        }
        let policy_seconds =
            make.histogram("policy_evaluation_seconds", "Time of one policy decision, over all roles.", POLICY_SECONDS);
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
        Callers {
            policy_decisions,
            policy_seconds,
            token_failures,
            jwks_fetches,
            jwks_confirmed,
            token_causes: token_causes.to_vec(),
            tokens_turned_away,
        }
    }
}

impl Metrics {
    /// `result`: allow, deny or escalate.
    pub fn policy_decided(&self, result: &'static str, took: Duration) {
        self.callers.policy_decisions.with_label_values(&[result]).inc();
        self.callers.policy_seconds.observe(took.as_secs_f64());
    }

    /// A cause that was not announced to [`Metrics::new`] counts as "other".
    pub fn token_failed(&self, cause: &'static str) {
        let cause = if self.callers.token_causes.contains(&cause) { cause } else { OTHER };
        self.callers.token_failures.with_label_values(&[cause]).inc();
    }

    /// `bound`: the rate of an address or of a client id, an address's share of the places, all places, or the wait for a turn.
    pub fn token_request_turned_away(&self, bound: &'static str) {
        let bound = if TOKEN_BOUNDS.contains(&bound) { bound } else { OTHER };
        self.callers.tokens_turned_away.with_label_values(&[bound]).inc();
    }

    /// The key set's URL was asked. Good keys, changed or not, are as old as this from now on.
    pub fn keys_fetched(&self, result: KeysFetched) {
        self.callers.jwks_fetches.with_label_values(&[result.as_str()]).inc();
        if result != KeysFetched::Failed {
            let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
            self.callers.jwks_confirmed.set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        }
    }
}
