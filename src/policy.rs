//! May they: facts about a caller and its request in, a [`Permit`] or a [`Denial`] out. Pure; the Rego engine is inside.
//!
//! - [`input`]: the document that policies see (contract, section 3), field by field.
//! - [`bundle`]: the files of a policy folder, read and bounded; its revision and its fingerprint.
//! - `budget`: how long an evaluation may take.
//! - `compile`: files to an engine that is known to work, or a [`LoadError`] with file and line (`samples`: the inputs it
//!   is tried on; `fault`: what regorus says went wrong).
//! - `verdict`: what the evaluated document says.
//! - [`explain`]: the same decision, with everything that led to it.
//! - [`testing`]: runs `test_*` rules.
//!
//! Authorization is a value that one must hold: only this module constructs a [`Permit`]. A [`Policy`] never changes;
//! a reload loads another one and swaps the two.

mod budget;
pub mod bundle;
mod compile;
pub mod explain;
mod fault;
pub mod input;
mod samples;
pub mod testing;
mod verdict;

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use regorus::{Engine, Value};

use crate::identity::Caller;
use crate::wire::{Ask, Endpoint, Kind, ModelRef, model};

pub use bundle::{Fingerprint, LoadError, fingerprint};
pub use explain::Explanation;

use budget::{Budget, Failure};
use bundle::Bundle;
use compile::{Compiled, Declared};
use verdict::{Outcome, Verdict};

/// The package that decides (contract, section 1).
pub const PACKAGE: &str = "behavry.authz";

/// Most roles of a caller that are evaluated; a caller with more is refused (contract, section 2).
const MAX_ROLES: usize = 8;

/// Most models that one request may name; Ollama's own requests name two.
const MAX_MODELS: usize = 16;

/// What a builtin that fails on its argument does, as in `startswith(null, "a")`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BuiltinErrors {
    /// It is an error and refuses the request: a rule that could not be evaluated may be the one that denies.
    #[default]
    Strict,
    /// The rule does not fire, which is OPA's own default.
    Undefined,
}

/// How policies are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub builtin_errors: BuiltinErrors,
    /// Longest time of the CPU for one decision, over all its roles and models. Past it the request is refused. The
    /// default of 500 ms is ten thousand times what a decision takes.
    pub timeout_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { builtin_errors: BuiltinErrors::Strict, timeout_ms: 500 }
    }
}

impl Settings {
    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

/// What is known about a request when it is decided.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    pub caller: &'a Caller,
    pub ask: &'a Ask,
    /// What may run in the place of the model that is asked for, best first: an alias's target, fallbacks. Empty: that model itself.
    pub targets: &'a [ModelRef],
    pub endpoint: Endpoint,
    pub method: &'a str,
    /// Ollama's own path, without a prefix: `/api/chat`.
    pub resource: &'a str,
    pub requester: Requester<'a>,
    pub source_ip: Option<IpAddr>,
    pub now: jiff::Timestamp,
}

/// The person or system behind an agent, and what they used, as the agent names them. Nobody verified either.
#[derive(Clone, Copy, Debug, Default)]
pub struct Requester<'a> {
    pub id: Option<&'a str>,
    pub channel: Option<&'a str>,
}

/// Leave to contact a backend with exactly what was decided. Nothing outside this module can make or copy one.
#[derive(Debug)]
#[must_use = "a permit that nobody holds lets nothing pass"]
pub struct Permit {
    model: Option<ModelRef>,
    /// What may run in its place; each was decided.
    targets: Vec<ModelRef>,
    /// What it was for, before it fell back.
    before: Option<ModelRef>,
    others: Vec<ModelRef>,
    endpoint: Endpoint,
    policy_id: &'static str,
    reason: Option<String>,
    revision: Arc<str>,
}

impl Permit {
    /// The model that may be run.
    pub fn model(&self) -> Option<&ModelRef> {
        self.model.as_ref()
    }

    /// What may run instead of it, best first. Empty where one model was asked for and no other is meant by it.
    pub fn targets(&self) -> &[ModelRef] {
        &self.targets
    }

    /// From now on the permit is for the first of its targets that `can_be_served`, or for the first of all where none can. Those that do
    /// not `may_run` are none any more; false: then none is left.
    pub fn narrow(&mut self, may_run: impl Fn(&ModelRef) -> bool, can_be_served: impl Fn(&ModelRef) -> bool) -> bool {
        self.targets.retain(may_run);
        if self.targets.is_empty() {
            return false;
        }
        if !self.fall_back(can_be_served) {
            self.model = Some(self.targets.remove(0));
        }
        true
    }

    /// From now on the permit is for the next of its targets that `can_be_served`, if there is one.
    pub fn fall_back(&mut self, can_be_served: impl Fn(&ModelRef) -> bool) -> bool {
        let Some(chosen) = self.targets.iter().position(can_be_served) else { return false };
        let next = self.targets.drain(..=chosen).next_back();
        self.before = std::mem::replace(&mut self.model, next);
        true
    }

    /// The target was of no use: the permit is for the model that it was for before.
    pub fn step_back(&mut self) {
        self.model = self.before.take().or_else(|| self.model.take());
    }

    /// Further models that the request names; each was decided.
    pub fn others(&self) -> &[ModelRef] {
        &self.others
    }

    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// The rule that allowed, `behavry.authz.allow` for one; the package alone where nothing denied.
    pub fn policy_id(&self) -> &str {
        self.policy_id
    }

    /// The policy's own words, where it has any.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Of the policy that decided.
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

/// Leave to ask a backend for a list. What of it is shown is decided by [`Policy::shows`].
#[derive(Debug)]
#[must_use = "a permit that nobody holds lets nothing pass"]
pub struct ListPermit {
    permit: Permit,
    empty: Result<(), Denial>,
}

impl ListPermit {
    pub fn permit(&self) -> &Permit {
        &self.permit
    }

    /// Whether a list with nothing left in it may be shown: the decision about the document with `model: null`.
    pub fn empty_allowed(&self) -> Result<(), &Denial> {
        self.empty.as_ref().copied()
    }

    pub fn into_permit(self) -> Permit {
        self.permit
    }
}

/// Why a request may not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    pub kind: DenialKind,
    /// At least one; bounded in count and length, and without control characters.
    pub reasons: Vec<String>,
    /// The rule that refused, `behavry.authz.deny` for one.
    pub policy_id: String,
    pub revision: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenialKind {
    Denied,
    /// Somebody else should decide; nobody here can.
    Escalated,
    /// The policy could not be evaluated, or says something that is not an answer.
    Error,
}

impl DenialKind {
    /// The word for the audit's `policy_result`, but for `Error`, which the audit calls a denial.
    pub fn as_str(self) -> &'static str {
        match self {
            DenialKind::Denied => "deny",
            DenialKind::Escalated => "escalate",
            DenialKind::Error => "error",
        }
    }
}

/// A loaded policy. It never changes, and may be used by many threads at once.
pub struct Policy {
    /// Prepared (analysed, with data), never evaluated in place: each decision works on a clone. Measured for the
    /// seed's policy in a release build: a clone 0.3 µs of a decision's 14 µs, so a cache of engines for each thread
    /// would save nothing, and a clone cannot carry anything over from an evaluation that failed half way.
    engine: Engine,
    declared: Declared,
    revision: Arc<str>,
    warnings: Vec<String>,
    settings: Settings,
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy").field("revision", &self.revision).field("settings", &self.settings).finish()
    }
}

impl Policy {
    /// Loads a folder: all its `*.rego` but `*_test.rego`, and its `*.json` as data.
    ///
    /// # Errors
    /// Whatever would make decisions fail later: an empty folder, a file that does not parse, a package that decides
    /// nothing, rules that contradict each other.
    pub fn load(dir: &Path, settings: &Settings) -> Result<Policy, LoadError> {
        Policy::from_bundle(Bundle::read(dir)?, settings)
    }

    /// The policy built into the program (`policies/authz.rego`).
    pub fn embedded(settings: &Settings) -> Result<Policy, LoadError> {
        Policy::from_sources(&[("authz.rego", include_str!("../policies/authz.rego"))], settings)
    }

    /// Files that are already in memory, by name and text, under the rules of [`Policy::load`].
    pub fn from_sources(files: &[(&str, &str)], settings: &Settings) -> Result<Policy, LoadError> {
        Policy::from_bundle(Bundle::from_sources(files)?, settings)
    }

    fn from_bundle(bundle: Bundle, settings: &Settings) -> Result<Policy, LoadError> {
        let Compiled { engine, declared, warnings } = compile::compile(&bundle, settings)?;
        Ok(Policy { engine, declared, revision: bundle.revision().into(), warnings, settings: *settings })
    }

    /// The first 12 hex digits of SHA-256 over names and texts of all its files.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// What an operator should know although the policy was loaded.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Decides a request: once for each role and each model that it names. One role that is denied or escalated
    /// refuses; where the package declares `allow` or `decision`, it must hold for at least one role.
    ///
    /// Where other models may run in the place of the one that is named, each of them is decided too: those that are denied are left
    /// out, and where none is left the first one's denial refuses.
    pub fn decide(&self, facts: &Facts<'_>) -> Result<Permit, Denial> {
        let mut judge = Judge::new(self);
        let mut allowed = judge.decide(facts, facts.ask.model.as_ref())?;
        let targets = judge.targets(facts)?;
        if facts.ask.others.len() > MAX_MODELS {
            return Err(self.fault(format!("the request names more than {MAX_MODELS} models")));
        }
        for other in &facts.ask.others {
            let outcome = judge.decide(facts, Some(other))?;
            allowed.reason = allowed.reason.or(outcome.reason);
        }
        Ok(Permit { targets, ..self.permit(facts, allowed) })
    }

    /// Opens a list. The backend may be asked whatever the document with `model: null` says, for that policies deny
    /// which know nothing of lists; its verdict counts where nothing is left to show.
    ///
    /// # Errors
    /// [`DenialKind::Error`] for an endpoint that is not a list: it would escape [`Policy::decide`].
    pub fn open_list(&self, facts: &Facts<'_>) -> Result<ListPermit, Denial> {
        if facts.endpoint.kind() != Kind::List {
            return Err(self.fault("this request is not a list".to_owned()));
        }
        let decided = Judge::new(self).decide(facts, None);
        let allowed = match &decided {
            Ok(allowed) => allowed.clone(),
            Err(_) => Allowed { policy_id: PACKAGE, reason: None },
        };
        Ok(ListPermit { permit: self.permit(facts, allowed), empty: decided.map(drop) })
    }

    /// Which entries of a list the caller may see. `names` as the backend lists them; one that does not parse is
    /// hidden. A name that comes twice is decided once. After an evaluation that ran out of time the rest is hidden
    /// undecided, so that a batch costs at most one time-out; call it with batches (64 names take about 2 ms) and
    /// yield in between.
    pub fn shows(&self, facts: &Facts<'_>, names: &[&str]) -> Vec<bool> {
        let mut decided: HashMap<&str, bool> = HashMap::with_capacity(names.len());
        let mut out_of_time = false;
        names
            .iter()
            .map(|&name| {
                *decided.entry(name).or_insert_with(|| {
                    let Ok(model) = model::parse(name) else { return false };
                    if out_of_time {
                        return false;
                    }
                    let mut judge = Judge::new(self);
                    let shown = judge.decide(facts, Some(&model)).is_ok();
                    out_of_time = judge.out_of_time;
                    shown
                })
            })
            .collect()
    }

    /// Everything that leads to the decision about `facts`; for a person, not for the request path.
    pub fn explain(&self, facts: &Facts<'_>) -> Explanation {
        explain::explain(self, facts)
    }

    /// The document `data.behavry.authz` for any input, right or wrong; null where nothing defines it.
    ///
    /// # Errors
    /// What the engine said, with file and line.
    pub fn evaluate(&self, input: serde_json::Value) -> Result<serde_json::Value, String> {
        let document = Judge::new(self).document(Value::from(input))?;
        explain::json(&document)
    }

    /// [`Policy::decide`]'s rules for one document of the caller's own making. `Err` is a refusal.
    pub fn judge(&self, input: serde_json::Value) -> Result<(), Denial> {
        let verdict = Judge::new(self).verdict(Value::from(input));
        let outcome = verdict::combine([verdict], self.declared.allows);
        self.settle(outcome, None, None).map(drop)
    }

    fn permit(&self, facts: &Facts<'_>, allowed: Allowed) -> Permit {
        Permit {
            model: facts.ask.model.clone(),
            targets: Vec::new(),
            before: None,
            others: facts.ask.others.clone(),
            endpoint: facts.endpoint,
            policy_id: allowed.policy_id,
            reason: allowed.reason,
            revision: Arc::clone(&self.revision),
        }
    }

    fn settle(&self, outcome: Outcome, model: Option<&ModelRef>, roles: Option<&[String]>) -> Result<Allowed, Denial> {
        match outcome {
            Outcome::Allowed { policy_id, reason } => Ok(Allowed { policy_id, reason }),
            Outcome::Refused { kind, policy_id, mut reasons } => {
                if reasons.is_empty() {
                    reasons.push(verdict::own_words(kind, policy_id, model, roles));
                }
                Err(Denial { kind, reasons, policy_id: policy_id.to_owned(), revision: self.revision.to_string() })
            }
        }
    }

    fn fault(&self, reason: String) -> Denial {
        Denial {
            kind: DenialKind::Error,
            reasons: vec![verdict::harmless(&reason)],
            policy_id: PACKAGE.to_owned(),
            revision: self.revision.to_string(),
        }
    }
}

/// What allowed a request.
#[derive(Clone, Debug)]
struct Allowed {
    policy_id: &'static str,
    reason: Option<String>,
}

/// One decision in progress: an engine of its own and a budget. A cache of decisions would be asked in
/// [`Judge::verdict`], keyed by the input document.
struct Judge<'p> {
    policy: &'p Policy,
    engine: Engine,
    budget: Budget,
    out_of_time: bool,
}

impl<'p> Judge<'p> {
    fn new(policy: &'p Policy) -> Self {
        Judge {
            policy,
            engine: policy.engine.clone(),
            budget: Budget::new(policy.settings.timeout()),
            out_of_time: false,
        }
    }

    fn decide(&mut self, facts: &Facts<'_>, model: Option<&ModelRef>) -> Result<Allowed, Denial> {
        let roles = &facts.caller.roles;
        if roles.len() > MAX_ROLES {
            return Err(self.policy.fault(format!("the caller has more than {MAX_ROLES} roles")));
        }
        let policy = self.policy;
        let outcome = verdict::combine(
            each_role(roles).map(|role| self.verdict(input::document(facts, role, model))),
            policy.declared.allows,
        );
        policy.settle(outcome, model, Some(roles))
    }

    /// Those of the targets that may run.
    fn targets(&mut self, facts: &Facts<'_>) -> Result<Vec<ModelRef>, Denial> {
        let mut allowed = Vec::new();
        let mut denied = None;
        for target in facts.targets {
            // The name that was asked for is decided already.
            let is_asked = facts.ask.model.as_ref().is_some_and(|asked| asked.same_model(target));
            match if is_asked { Ok(()) } else { self.decide(facts, Some(target)).map(drop) } {
                Ok(()) => allowed.push(target.clone()),
                Err(denial) => _ = denied.get_or_insert(denial),
            }
        }
        match denied {
            Some(denial) if allowed.is_empty() => Err(denial),
            _ => Ok(allowed),
        }
    }

    fn verdict(&mut self, input: Value) -> Verdict {
        match self.document(input) {
            Ok(document) => verdict::read(&document),
            Err(reason) => Verdict::Faulty { reason },
        }
    }

    fn document(&mut self, input: Value) -> Result<Value, String> {
        let Judge { policy, engine, budget, out_of_time } = self;
        let document = budget.spend(|limit| {
            let document = compile::evaluate(engine, input.clone(), limit);
            if document.is_err() {
                *engine = policy.engine.clone();
            }
            document
        });
        document.map_err(|failure| match failure {
            Failure::OutOfTime => {
                *out_of_time = true;
                compile::out_of_time(policy.settings.timeout())
            }
            Failure::Engine(error) => fault::one_line(&error),
        })
    }
}

/// Each role once, or `None` once where there is none.
fn each_role(roles: &[String]) -> impl Iterator<Item = Option<&str>> {
    let distinct =
        roles.iter().enumerate().filter(|(i, role)| !roles[..*i].contains(role)).map(|(_, role)| Some(&**role));
    distinct.chain(roles.is_empty().then_some(None))
}

#[cfg(test)]
mod tests;
