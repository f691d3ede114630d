//! Sums over the series, for a page that shows one number.

use prometheus::IntCounterVec;
use prometheus::core::Collector;
use serde::Serialize;

use super::Metrics;
use crate::ledger::Outcome;

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

impl Metrics {
    /// Sums of the counters, for a page. It walks over all series: for once a second, not for each request.
    pub fn totals(&self) -> Totals {
        let requests = |label: &str, value: &str| sum_where(&self.exchanges.requests, label, value);
        let all = sum_where(&self.exchanges.requests, "", "");
        Totals {
            requests: all,
            complete: requests("outcome", Outcome::Complete.as_str()),
            refused: requests("outcome", Outcome::Refused.as_str()),
            denied: sum_where(&self.callers.policy_decisions, "result", "deny"),
            escalated: sum_where(&self.callers.policy_decisions, "result", "escalate"),
            input_tokens: sum_where(&self.exchanges.tokens, "direction", "in"),
            output_tokens: sum_where(&self.exchanges.tokens, "direction", "out"),
        }
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
