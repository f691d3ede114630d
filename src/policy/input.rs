//! The input document: what policies see of a request (contract, section 3; field by field in `policies/README.md`).
//!
//! One document serves every shape that Behavry has published. A fact that is absent is `null`, never missing: in
//! `not approved[input.model]` OPA lets a missing member deny nothing, while a `null` denies. No prompt, message or
//! reply can get in, since [`Facts`] hold none.

use std::collections::BTreeMap;

use regorus::Value;

use super::Facts;
use crate::wire::{Kind, ModelRef};

/// Behavry's names for what this proxy guards.
const SERVER: &str = "ollama-proxy";
const TOOL: &str = "ollama-api";

/// Longest `keep_alive` that is passed on as it is. Ollama's are like `5m` or `1h30m`.
const MAX_KEEP_ALIVE_BYTES: usize = 64;

/// The document for one of the caller's roles (`None`: it has none) and one of the models that the request names.
pub fn document(facts: &Facts<'_>, role: Option<&str>, model: Option<&ModelRef>) -> Value {
    let caller = facts.caller;
    let kind = facts.endpoint.kind();
    let canonical = model.map_or(Value::Null, |m| Value::from(m.canonical()));
    let role = text(role);
    let action_type = match kind {
        Kind::Read | Kind::List => "read",
        Kind::Infer | Kind::Manage | Kind::Egress => "write",
    };
    object([
        ("mcp_server", Value::from(SERVER)),
        ("tool_name", Value::from(TOOL)),
        ("model", canonical.clone()),
        ("agent_role", role.clone()),
        (
            "agent",
            object([
                ("id", Value::from(&*caller.agent_id)),
                ("name", text(caller.agent_name.as_deref())),
                // The role that is being decided, so that a rule about `agent.role` means the same as one about
                // `agent_role` and no order of roles in the token escapes it.
                ("role", role),
                ("roles", list(&caller.roles)),
                ("permissions", list(&caller.permissions)),
                ("risk_tier", text(caller.risk_tier.as_deref())),
                ("session_id", Value::from(&*caller.session_id)),
            ]),
        ),
        (
            "request",
            object([
                ("tool_name", Value::from(TOOL)),
                ("action", Value::from(facts.method.to_ascii_lowercase())),
                ("method", Value::from(facts.method)),
                ("resource", Value::from(facts.resource)),
                ("mcp_server", Value::from(SERVER)),
                ("resource_count", Value::from(1u64)),
                ("kind", Value::from(kind.as_str())),
                ("dialect", Value::from(facts.endpoint.dialect().as_str())),
                ("parameters", parameters(facts, canonical.clone())),
            ]),
        ),
        (
            "action",
            object([
                ("type", Value::from(action_type)),
                ("tool", Value::from(format!("{TOOL}{}", facts.resource))),
                ("method", Value::from(facts.method)),
            ]),
        ),
        (
            "resource",
            object([("path", Value::from(facts.resource)), ("server", Value::from(SERVER)), ("model", canonical)]),
        ),
        ("model_ref", model_ref(model)),
        ("session", object([("id", Value::from(&*caller.session_id))])),
        (
            "requester",
            object([
                ("id", text(facts.requester.id)),
                ("channel", text(facts.requester.channel)),
                ("verified", Value::from(false)),
            ]),
        ),
        (
            "context",
            object([
                // An IPv4 client of a socket that speaks both comes as `::ffff:10.1.2.3`, which no 10.0.0.0/8 contains.
                ("source_ip", facts.source_ip.map_or(Value::Null, |ip| Value::from(ip.to_canonical().to_string()))),
                ("time", Value::from(facts.now.to_string())),
            ]),
        ),
        ("workflow_session", Value::Null),
        ("delegation", Value::Null),
    ])
}

fn parameters(facts: &Facts<'_>, model: Value) -> Value {
    let ask = facts.ask;
    object([
        ("model", model),
        ("stream", ask.stream.map_or(Value::Null, Value::from)),
        ("has_tools", ask.has_tools.map_or(Value::Null, Value::from)),
        ("has_system_prompt", ask.has_system_prompt.map_or(Value::Null, Value::from)),
        ("message_count", ask.message_count.map_or(Value::Null, Value::from)),
        ("keep_alive", ask.keep_alive.as_ref().map_or(Value::Null, keep_alive)),
        ("num_ctx", ask.num_ctx.map_or(Value::Null, Value::from)),
        ("num_predict", ask.num_predict.map_or(Value::Null, Value::from)),
    ])
}

/// All members are there, `null` each, where no model is named: `input.model_ref.source` must not be missing.
fn model_ref(model: Option<&ModelRef>) -> Value {
    object([
        ("raw", text(model.map(|m| &*m.raw))),
        ("name", text(model.map(|m| &*m.name))),
        ("tag", text(model.map(|m| &*m.tag))),
        ("namespace", text(model.map(|m| &*m.namespace))),
        ("host", text(model.map(|m| &*m.host))),
        ("source", text(model.map(|m| m.source.as_str()))),
    ])
}

/// A number, or a string that can be a duration of Go. Anything else is the word `other`: not the caller's text, and
/// not `null` either, which would say that the request leaves the matter to Ollama.
fn keep_alive(value: &serde_json::Value) -> Value {
    let duration =
        |s: &str| s.len() <= MAX_KEEP_ALIVE_BYTES && s.chars().all(|c| c.is_ascii_digit() || "+-.nuµμmsh".contains(c));
    match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Number(_) => Value::from(value.clone()),
        serde_json::Value::String(s) if duration(s) => Value::from(&**s),
        _ => Value::from("other"),
    }
}

fn text(value: Option<&str>) -> Value {
    value.map_or(Value::Null, Value::from)
}

fn list(values: &[String]) -> Value {
    Value::from(values.iter().map(|v| Value::from(&**v)).collect::<Vec<_>>())
}

fn object<const N: usize>(members: [(&str, Value); N]) -> Value {
    Value::from(members.into_iter().map(|(key, value)| (Value::from(key), value)).collect::<BTreeMap<_, _>>())
}
