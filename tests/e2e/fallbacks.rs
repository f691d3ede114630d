//! A model that is gone although a backend was believed to have it: the chain is followed as if that had been known.

use behavry_ollama_proxy::simulator::{Simulator, SimulatorOptions};
use serde_json::{Value, json};

use crate::client::{Reply, Request};
use crate::failover::two;
use crate::fleet::{chat, targets};
use crate::house::House;

/// One that keeps what it was sent.
async fn keeping(models: &[&str]) -> Simulator {
    let models = models.iter().map(|model| (*model).to_owned()).collect();
    let options = SimulatorOptions { models, keep_body_bytes: 4096, ..SimulatorOptions::for_tests() };
    Simulator::start(options).await.expect("it listens")
}

/// Behind the proxy's back.
async fn lose(backends: &[&Simulator], model: &str) {
    for backend in backends {
        let delete = Request::new("DELETE", "/api/delete").body(json!({ "model": model }).to_string());
        assert_eq!(delete.send(backend.addr()).await.status, 200);
    }
}

const GONE: [&str; 6] = ["gone-0", "gone-1", "gone-2", "gone-3", "gone-4", "plain"];

async fn house(a: &Simulator, b: &Simulator) -> House {
    let chained = GONE.iter().filter(|name| name.starts_with("gone"));
    let chains: String = chained
        .map(|name| {
            format!("[[model]]\nname = \"{name}\"\nfallback = [\"lost-too\", \"spare\"]\nnum_ctx = 9000\nnum_gpu = 1\n")
        })
        .collect();
    let spare = "[[model]]\nname = \"spare\"\nnum_ctx = 2048\n";
    two(a, b, &format!("{chains}{spare}")).await
}

#[tokio::test]
async fn where_the_last_backend_turns_out_to_have_lost_a_model_the_next_of_its_chain_runs() {
    let held = [&GONE[..], &["lost-too"]].concat();
    let (a, b) = (keeping(&held).await, keeping(&[&held[..], &["spare"]].concat()).await);
    let house = house(&a, &b).await;
    for model in &held {
        lose(&[&a, &b], model).await;
    }
    let bodies = [
        ("gone-0", "/api/chat", chat("gone-0", true)),
        (
            "gone-1",
            "/api/generate",
            json!({ "model": "Gone-1", "prompt": "x", "stream": false, "options": { "seed": 7 } }),
        ),
        ("gone-2", "/v1/chat/completions", chat("gone-2", true)),
        ("gone-3", "/v1/responses", json!({ "model": "gone-3", "input": "hi" })),
        ("gone-4", "/api/show", json!({ "model": "gone-4" })),
    ];
    for (i, (id, path, body)) in bodies.into_iter().enumerate() {
        let reply = house.send(Request::post(path, body).bearer(&house.token()).id(id)).await;
        assert_eq!(
            (reply.status, reply.header("x-behavry-model"), reply.header("x-behavry-backend")),
            (200, Some("spare"), Some("b")),
            "{path}: {}",
            reply.text()
        );
        let record = house.final_of(id).await;
        let extra = &record["extra"];
        assert_eq!(
            (&extra["model"], &extra["outcome"], &record["error"]),
            (&json!("spare"), &json!("complete"), &Value::Null)
        );
        let filters = extra["filters"].to_string();
        assert!(filters.contains("\"fallback\"") && !filters.contains("num_gpu"), "what holds for what runs: {extra}");
        let placement = extra["placement"].as_str().expect("a reason");
        // The first request finds out for both models of the chain, and the others know of the second.
        let after =
            if i == 0 { ", after a absent, b absent, a absent, b absent" } else { ", after a absent, b absent" };
        assert!(placement.ends_with(after), "{path}: {placement}");
        assert_eq!(extra["retries"], if i == 0 { 4 } else { 2 }, "{path}");
        let seen = b.seen();
        let last = seen.iter().rfind(|seen| seen.header("x-request-id") == Some(id)).expect("it came");
        let sent: Value = serde_json::from_slice(&last.body).expect("JSON");
        assert_eq!(sent["model"], "spare", "{path}");
        if path == "/api/generate" {
            let wanted =
                json!({ "model": "spare", "prompt": "x", "stream": false, "options": { "seed": 7, "num_ctx": 2048 } });
            assert_eq!(sent, wanted, "what the client sent, with the settings of what runs");
        }
    }
    assert!(
        house.metrics().await.contains("behavry_ollama_failovers_total{reason=\"absent\"} 12\n"),
        "four and four twos"
    );
    // Without a chain it is Ollama's own 404, and from then on nobody is asked twice.
    let reply = house.post("/api/chat", chat("plain", true)).await;
    assert_eq!((reply.status, reply.header("x-behavry-model")), (404, None));
    assert!(reply.text().contains("not found"), "{}", reply.text());
    let before = targets(&a).len();
    assert_eq!(house.post("/api/chat", chat("gone-0", true)).await.header("x-behavry-model"), Some("spare"));
    assert_eq!(targets(&a).len(), before);
}

#[tokio::test]
async fn a_model_of_a_list_is_asked_for_elsewhere_and_then_the_chain_is_followed() {
    let (a, b) = (keeping(&["gone-0", "gone-1"]).await, keeping(&["gone-0", "gone-1", "spare"]).await);
    let house = house(&a, &b).await;
    lose(&[&a], "gone-0").await;
    lose(&[&a, &b], "gone-1").await;
    let reply = house.send(Request::get("/v1/models/gone-0").bearer(&house.token()).id("one")).await;
    let names = |reply: &Reply, model: &str| reply.json()["id"].as_str().is_some_and(|id| id.starts_with(model));
    assert!(reply.status == 200 && names(&reply, "gone-0"), "{}", reply.text());
    assert_eq!((reply.header("x-behavry-backend"), reply.header("x-behavry-model")), (Some("b"), None));
    let reply = house.send(Request::get("/v1/models/gone-1").bearer(&house.token()).id("two")).await;
    assert!(reply.status == 200 && names(&reply, "spare"), "{}", reply.text());
    assert_eq!(reply.header("x-behavry-model"), Some("spare"));
    let extra = house.final_of("two").await["extra"].clone();
    assert_eq!((&extra["model"], &extra["filters"]), (&json!("spare"), &json!(["fallback"])));
}

#[tokio::test]
async fn what_falls_back_is_what_the_policy_allows() {
    let (a, b) = (keeping(&["gone-0", "lost-too"]).await, keeping(&["gone-0", "lost-too", "spare"]).await);
    let config = "[[model]]\nname = \"gone-0\"\nfallback = [\"lost-too\", \"spare\"]\n";
    let rules = "package behavry.authz\n\ndeny contains \"no\" if input.model == \"spare\"\n".to_owned();
    let tables = crate::fleet::tables([(a.url(), ""), (b.url(), "tier = 1")]);
    let config = format!("{config}{}{tables}", crate::failover::READ_ONCE);
    let policy = vec![("authz.rego", rules)];
    let house = House::with(crate::house::Plan { config, policy, ..Default::default() }).await;
    crate::fleet::lists_are_read(&house).await;
    lose(&[&a, &b], "gone-0").await;
    lose(&[&a, &b], "lost-too").await;
    let reply = house.send(Request::post("/api/chat", chat("gone-0", true)).bearer(&house.token()).id("x")).await;
    assert_eq!(reply.status, 404, "{}", reply.text());
    assert_eq!(house.final_of("x").await["extra"]["model"], "lost-too", "the last that was tried");
}
