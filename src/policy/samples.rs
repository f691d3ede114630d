//! What requests of every kind look like: a policy is tried on them before it decides anything.

use regorus::Value;

use super::{Facts, Requester, each_role, input};
use crate::identity::Caller;
use crate::wire::{Ask, Endpoint, ModelRef, Source};

/// Documents of each kind and dialect, with and without model, role and everything else that can be absent.
pub(super) fn samples() -> Vec<Value> {
    let model = |name: &str, tag: &str, source| ModelRef {
        raw: format!("{name}:{tag}"),
        host: "registry.ollama.ai".to_owned(),
        namespace: "library".to_owned(),
        name: name.to_owned(),
        tag: tag.to_owned(),
        source,
    };
    let models =
        [None, Some(model("llama3.2", "latest", Source::Local)), Some(model("gpt-oss", "120b", Source::Cloud))];
    let bare = Caller {
        agent_id: "agent".to_owned(),
        agent_name: None,
        session_id: "session".to_owned(),
        roles: Vec::new(),
        permissions: Vec::new(),
        risk_tier: None,
        expires_at: 0,
        issued_at: None,
    };
    let full = Caller {
        agent_name: Some("Agent".to_owned()),
        roles: vec!["internal".to_owned(), "external".to_owned()],
        permissions: vec!["web:read".to_owned(), "web:write".to_owned(), "ollama:admin".to_owned()],
        risk_tier: Some("medium".to_owned()),
        ..bare.clone()
    };
    let says_all = Ask {
        stream: Some(true),
        has_system_prompt: Some(true),
        has_tools: Some(true),
        message_count: Some(2),
        keep_alive: Some("5m".into()),
        num_ctx: Some(4096),
        num_predict: Some(128),
        ..Ask::default()
    };
    let mut samples = Vec::new();
    for (endpoint, method, resource) in [
        (Endpoint::Chat, "POST", "/api/chat"),
        (Endpoint::ChatCompletions, "POST", "/v1/chat/completions"),
        (Endpoint::Messages, "POST", "/v1/messages"),
        (Endpoint::Tags, "GET", "/api/tags"),
        (Endpoint::Version, "GET", "/api/version"),
        (Endpoint::Show, "POST", "/api/show"),
        (Endpoint::Delete, "DELETE", "/api/delete"),
    ] {
        for (caller, ask, source_ip) in
            [(&bare, &Ask::default(), None), (&full, &says_all, Some(std::net::Ipv4Addr::LOCALHOST.into()))]
        {
            let now = jiff::Timestamp::UNIX_EPOCH;
            let facts = Facts {
                caller,
                ask,
                targets: &[],
                endpoint,
                method,
                resource,
                requester: Requester::default(),
                source_ip,
                now,
            };
            for model in &models {
                samples.extend(each_role(&caller.roles).map(|role| input::document(&facts, role, model.as_ref())));
            }
        }
    }
    samples
}
