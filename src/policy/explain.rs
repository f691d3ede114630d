//! A decision with everything that led to it, for `policy explain`.

use regorus::Value;
use serde::Serialize;

use super::verdict::{self, Verdict};
use super::{Facts, Judge, MAX_MODELS, MAX_ROLES, Policy, each_role, input};
use crate::wire::ModelRef;

/// Why a request is decided as it is.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// `allow`, `deny`, `escalate`, or `error` (which refuses too).
    pub decision: &'static str,
    pub policy_id: String,
    pub reasons: Vec<String>,
    /// The models that may run, best first: the one that is asked for, or those of its alias and fallbacks that are allowed.
    pub may_run: Vec<String>,
    /// One for each role and each model that the request names, or that may run for it.
    pub verdicts: Vec<RoleVerdict>,
    /// The document for the first role and model; the others differ in `agent_role`, `agent.role` and the model.
    pub input: serde_json::Value,
    pub revision: String,
}

/// What one document came to.
#[derive(Debug, Serialize)]
pub struct RoleVerdict {
    pub role: Option<String>,
    pub model: Option<String>,
    /// `allow`, `deny`, `escalate`, `none` (no rule says anything) or `error`.
    pub verdict: &'static str,
    pub reasons: Vec<String>,
    /// `data.behavry.authz`, evaluated; null where that failed.
    pub document: serde_json::Value,
}

pub(super) fn explain(policy: &Policy, facts: &Facts<'_>) -> Explanation {
    let named = std::iter::once(facts.ask.model.as_ref());
    let models = named.chain(facts.targets.iter().chain(&facts.ask.others).map(Some));
    let mut verdicts = Vec::new();
    for model in models.take(1 + MAX_MODELS) {
        for role in each_role(&facts.caller.roles).take(MAX_ROLES) {
            let evaluated = Judge::new(policy).document(input::document(facts, role, model));
            let document = evaluated.as_ref().ok().and_then(|value| json(value).ok()).unwrap_or_default();
            let (verdict, reasons) = match evaluated.map(|value| verdict::read(&value)) {
                Ok(Verdict::Allowed { reason, .. }) => ("allow", reason.into_iter().collect()),
                Ok(Verdict::Denied { reasons, .. }) => ("deny", reasons),
                Ok(Verdict::Escalated { reasons, .. }) => ("escalate", reasons),
                Ok(Verdict::Silent) => ("none", Vec::new()),
                Ok(Verdict::Faulty { reason }) | Err(reason) => ("error", vec![reason]),
            };
            let (role, model) = (role.map(str::to_owned), model.map(|m| m.canonical()));
            verdicts.push(RoleVerdict { role, model, verdict, reasons, document });
        }
    }
    let mut may_run = Vec::new();
    let (decision, policy_id, reasons) = match policy.decide(facts) {
        Ok(permit) => {
            let runs = if permit.targets().is_empty() { permit.model.as_slice() } else { permit.targets() };
            may_run.extend(runs.iter().map(ModelRef::canonical));
            ("allow", permit.policy_id().to_owned(), permit.reason().map(str::to_owned).into_iter().collect())
        }
        Err(denial) => (denial.kind.as_str(), denial.policy_id, denial.reasons),
    };
    let first_role = each_role(&facts.caller.roles).next().flatten();
    let input = json(&input::document(facts, first_role, facts.ask.model.as_ref())).unwrap_or_default();
    Explanation { decision, policy_id, reasons, may_run, verdicts, input, revision: policy.revision().to_owned() }
}

/// Sets become arrays, as in OPA's output; undefined becomes null.
pub(super) fn json(value: &Value) -> Result<serde_json::Value, String> {
    if *value == Value::Undefined {
        return Ok(serde_json::Value::Null);
    }
    serde_json::to_value(value).map_err(|error| format!("the document is not JSON: {error}"))
}
