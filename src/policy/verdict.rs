//! What an evaluated document says, and what the documents of all roles say together (contract, section 3).

use regorus::Value;

use super::{DenialKind, PACKAGE};
use crate::wire::ModelRef;

pub(super) const DENY: &str = "behavry.authz.deny";
pub(super) const ESCALATE: &str = "behavry.authz.escalate";
pub(super) const DECISION: &str = "behavry.authz.decision";
pub(super) const ALLOW: &str = "behavry.authz.allow";

/// A policy may make a set of reasons of any size; this many reach a record or a caller.
const MAX_REASONS: usize = 8;
const MAX_REASON_CHARS: usize = 256;

/// What one document says.
#[derive(Debug)]
pub(super) enum Verdict {
    Allowed {
        policy_id: &'static str,
        reason: Option<String>,
    },
    Denied {
        policy_id: &'static str,
        reasons: Vec<String>,
    },
    Escalated {
        policy_id: &'static str,
        reasons: Vec<String>,
    },
    /// Neither yes nor no.
    Silent,
    /// No answer at all.
    Faulty {
        reason: String,
    },
}

/// What all roles together come to.
#[derive(Debug)]
pub(super) enum Outcome {
    Allowed { policy_id: &'static str, reason: Option<String> },
    Refused { kind: DenialKind, policy_id: &'static str, reasons: Vec<String> },
}

/// Reads the document `data.behavry.authz`. Denials come first, so that a reason is never lost to another rule's fault.
pub(super) fn read(document: &Value) -> Verdict {
    if document.as_object().is_err() {
        return faulty("the package", document, "an object");
    }
    match yes_or_reasons(member(document, "deny")) {
        Ok(None) => {}
        Ok(Some(reasons)) => return Verdict::Denied { policy_id: DENY, reasons },
        Err(value) => return faulty("deny", value, "a boolean or a set of reasons"),
    }
    let allow = match member(document, "allow") {
        None => false,
        Some(Value::Bool(allow)) => *allow,
        Some(value) => return faulty("allow", value, "a boolean"),
    };
    let escalate = match yes_or_reasons(member(document, "escalate")) {
        Ok(escalate) => escalate,
        Err(value) => return faulty("escalate", value, "a boolean or a set of reasons"),
    };
    let decision = match member(document, "decision") {
        None => None,
        Some(value) if value.as_object().is_ok() => match member(value, "result") {
            Some(Value::String(result)) => Some((&**result, member(value, "reason").map(words))),
            Some(value) => return faulty("decision.result", value, "a string"),
            None => return Verdict::Faulty { reason: format!("{DECISION} has no `result`") },
        },
        Some(value) => return faulty("decision", value, "an object with `result`"),
    };
    if let Some(reasons) = escalate {
        return Verdict::Escalated { policy_id: ESCALATE, reasons };
    }
    match decision {
        Some(("allow", reason)) => Verdict::Allowed { policy_id: DECISION, reason },
        Some(("deny", reason)) => Verdict::Denied { policy_id: DECISION, reasons: reason.into_iter().collect() },
        Some((_, reason)) => Verdict::Escalated { policy_id: DECISION, reasons: reason.into_iter().collect() },
        None if allow => Verdict::Allowed { policy_id: ALLOW, reason: None },
        None => Verdict::Silent,
    }
}

/// One role that is denied, in error or escalated refuses, in this order. `declares_allow`: one must be allowed.
pub(super) fn combine(verdicts: impl IntoIterator<Item = Verdict>, declares_allow: bool) -> Outcome {
    let mut allowed = None;
    let mut escalated = None;
    let mut fault = None;
    for verdict in verdicts {
        match verdict {
            Verdict::Denied { policy_id, reasons } => {
                return Outcome::Refused { kind: DenialKind::Denied, policy_id, reasons };
            }
            Verdict::Faulty { reason } => {
                fault.get_or_insert(reason);
            }
            Verdict::Escalated { policy_id, reasons } => {
                escalated.get_or_insert((policy_id, reasons));
            }
            Verdict::Allowed { policy_id, reason } => {
                allowed.get_or_insert((policy_id, reason));
            }
            Verdict::Silent => {}
        }
    }
    if let Some(reason) = fault {
        return Outcome::Refused { kind: DenialKind::Error, policy_id: PACKAGE, reasons: vec![harmless(&reason)] };
    }
    if let Some((policy_id, reasons)) = escalated {
        return Outcome::Refused { kind: DenialKind::Escalated, policy_id, reasons };
    }
    match allowed {
        Some((policy_id, reason)) => Outcome::Allowed { policy_id, reason },
        None if declares_allow => {
            Outcome::Refused { kind: DenialKind::Denied, policy_id: PACKAGE, reasons: Vec::new() }
        }
        None => Outcome::Allowed { policy_id: PACKAGE, reason: None },
    }
}

/// A refusal of a policy that gives no reason is explained in our own words.
pub(super) fn own_words(
    kind: DenialKind,
    policy_id: &str,
    model: Option<&ModelRef>,
    roles: Option<&[String]>,
) -> String {
    let mut words = match (kind, policy_id) {
        (DenialKind::Denied, PACKAGE) => "no rule of the policy allows this".to_owned(),
        (DenialKind::Denied, _) => format!("{policy_id} denies this"),
        (DenialKind::Escalated, _) => format!("{policy_id} asks for an approval"),
        (DenialKind::Error, _) => "the policy could not be evaluated".to_owned(),
    };
    if let Some(model) = model {
        words += &format!(" (model {})", model.canonical());
    }
    match roles {
        Some([]) => words += " (no role)",
        Some(roles) => words += &format!(" (roles: {})", roles.join(", ")),
        None => {}
    }
    harmless(&words)
}

/// One line of bounded length: control characters are escaped, and so are those that turn or hide text on a terminal.
pub(super) fn harmless(words: &str) -> String {
    let mut out = String::with_capacity(words.len().min(MAX_REASON_CHARS));
    for (i, c) in words.chars().enumerate() {
        if i == MAX_REASON_CHARS {
            out.push('…');
            break;
        }
        let hidden = matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
        if c.is_control() || hidden {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// `None`: no. `Err`: neither a boolean nor a set.
fn yes_or_reasons(value: Option<&Value>) -> Result<Option<Vec<String>>, &Value> {
    match value {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(Value::Bool(true)) => Ok(Some(Vec::new())),
        Some(Value::Set(set)) if set.is_empty() => Ok(None),
        Some(Value::Set(set)) => Ok(Some(set.iter_sorted().take(MAX_REASONS).map(words).collect())),
        Some(other) => Err(other),
    }
}

/// A string as it is, anything else as JSON.
fn words(value: &Value) -> String {
    match value {
        Value::String(words) => harmless(words),
        other => harmless(&serde_json::to_string(other).unwrap_or_else(|_| "a reason that is not text".to_owned())),
    }
}

fn member<'v>(object: &'v Value, name: &str) -> Option<&'v Value> {
    object.as_object().ok()?.get(&Value::from(name)).filter(|value| **value != Value::Undefined)
}

fn faulty(what: &str, value: &Value, wanted: &str) -> Verdict {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Set(_) => "a set",
        Value::Object(_) => "an object",
        Value::Undefined => "undefined",
    };
    Verdict::Faulty { reason: format!("{PACKAGE}: {what} is {kind}, not {wanted}") }
}
