//! `policy explain`: what the policy says of a request, and where the running proxy would send it. Nothing is sent.

use behavry_ollama_proxy::simulator::Fault;
use serde_json::{Value, json};

use crate::client::{Connection, Request};
use crate::failover::READ_ONCE;
use crate::fleet::{chat, holding, lists_are_read, tables, targets};
use crate::house::{House, PATIENCE, Plan, program, run_to_end};
use crate::queue::waiting;

const MODELS: &str = r#"
[[model]]
name = "fast"
alias = "Only-B"
[[model]]
name = "lost"
fallback = ["absent", "both"]
"#;

async fn explain(house: &House, arguments: &[&str]) -> Value {
    let mut command = program(&[&["policy", "explain"], arguments].concat());
    command.env("BEHAVRY_STATE_DIR", house.dir.path().join("state"));
    command.env("BEHAVRY_CONFIG", house.dir.path().join("proxy.toml"));
    if house.dir.path().join("policies").exists() {
        command.env("BEHAVRY_POLICY_DIR", house.dir.path().join("policies"));
    }
    let ended = run_to_end(command).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let (json, _) = ended.stdout.split_at(ended.stdout.rfind('}').expect("an object") + 1);
    serde_json::from_str(json).expect("JSON")
}

#[tokio::test]
async fn policy_explain_names_the_backend_and_why_and_sends_nothing() {
    let (a, b) = (holding(&["both"]).await, holding(&["only-b", "both"]).await);
    let deny = "package behavry.authz\n\ndeny contains \"not this one\" if input.model == \"secret\"\n";
    let config =
        format!("{MODELS}{READ_ONCE}{}", tables([(a.url(), ""), (b.url(), "models = [\"only-b\", \"both\"]")]));
    let policy = vec![("authz.rego", deny.to_owned())];
    let house = House::with(Plan { config, policy, ..Plan::default() }).await;
    lists_are_read(&house).await;

    // An alias, decided under both names; what a backend lacks is said.
    let told = explain(&house, &["POST", "/api/chat", "--model", "FAST:latest"]).await;
    assert_eq!((&told["decision"], &told["may_run"]), (&json!("allow"), &json!(["only-b"])));
    let decided: Vec<&Value> = told["verdicts"].as_array().expect("a list").iter().map(|each| &each["model"]).collect();
    assert_eq!(decided, ["fast", "only-b"]);
    let placement = &told["placement"];
    assert_eq!(
        [&placement["outcome"], &placement["backend"], &placement["reason"], &placement["model"]],
        ["sent", "b", "held", "only-b"],
        "{told}"
    );
    assert_eq!(placement["instead_of"], json!({ "model": "fast", "by": "alias" }));
    assert_eq!(placement["policy_revision"], told["revision"]);
    let standing = |placement: &Value, place: usize| placement["backends"][place]["standing"].clone();
    assert_eq!([standing(placement, 0), standing(placement, 1)], ["absent", "held"]);
    assert!(placement["backends"][1]["loads_s"].as_f64().is_some_and(|s| s > 0.0), "{placement}");
    // A chain: the first that a backend has.
    let told = explain(&house, &["POST", "/v1/chat/completions", "--body", r#"{"model":"lost","messages":[]}"#]).await;
    assert_eq!(told["may_run"], json!(["lost", "absent", "both"]));
    assert_eq!(told["placement"]["instead_of"], json!({ "model": "lost", "by": "fallback" }));
    assert_eq!(told["placement"]["model"], "both");
    // What is refused is refused in the words of a request.
    let refused = |told: &Value| (told["placement"]["status"].clone(), told["placement"]["code"].clone());
    let told = explain(&house, &["POST", "/api/chat", "--model", "secret"]).await;
    assert_eq!((&told["decision"], refused(&told)), (&json!("deny"), (json!(403), json!("policy_denied"))));
    let told = explain(&house, &["POST", "/api/chat", "--model", "both", "--permission", "web:read"]).await;
    assert_eq!(refused(&told), (json!(403), json!("insufficient_scope")));
    let told = explain(&house, &["POST", "/api/chat", "--model", "x:cloud"]).await;
    assert_eq!(refused(&told), (json!(403), json!("egress_denied")));
    // Lists, reads and management.
    let told = explain(&house, &["GET", "/api/tags"]).await;
    let both = json!([{ "name": "a" }, { "name": "b" }]);
    assert_eq!((&told["placement"]["outcome"], &told["placement"]["backends"]), (&json!("asked_of_each"), &both));
    let told = explain(&house, &["POST", "/api/show", "--model", "fast"]).await;
    assert_eq!((&told["placement"]["backend"], &told["placement"]["reason"]), (&json!("b"), &json!("held")));
    let admin = ["--permission", "web:read", "--permission", "web:write", "--permission", "ollama:admin"];
    let manage = ["POST", "/api/copy", "--body", r#"{"source":"both","destination":"x"}"#];
    let told = explain(&house, &[&manage[..], &admin].concat()).await;
    assert_eq!(refused(&told), (json!(400), json!("unsupported_parameter")), "nobody is named");
    let told = explain(&house, &[&manage[..], &admin, &["--on", "b"]].concat()).await;
    assert_eq!((&told["placement"]["backend"], &told["placement"]["reason"]), (&json!("b"), &json!("named")));
    let told = explain(&house, &[&["POST", "/api/pull", "--model", "new"], &admin[..]].concat()).await;
    assert_eq!(told["placement"]["backends"], json!([{ "name": "a" }]), "the other one may not serve it");

    house.command_backend("drain", "b").await;
    let told = explain(&house, &["POST", "/api/chat", "--model", "only-b"]).await;
    assert_eq!([standing(&told["placement"], 0), standing(&told["placement"], 1)], ["absent", "drained"]);
    house.command_backend("drain", "a").await;
    let told = explain(&house, &["POST", "/api/chat", "--model", "both"]).await;
    assert_eq!(refused(&told), (json!(503), json!("no_backend")));
    for name in ["a", "b"] {
        house.command_backend("undrain", name).await;
    }
    assert_eq!((targets(&a), targets(&b)), (Vec::new(), Vec::new()), "nothing was sent");
    assert!(house.records().is_empty(), "and nothing recorded");
    // It was true.
    let reply = house.post("/api/chat", chat("fast", false)).await;
    assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")));
}

#[tokio::test]
async fn policy_explain_counts_the_queue_and_takes_no_place_in_it() {
    let a = holding(&["m"]).await;
    let house = House::with(Plan { config: tables([(a.url(), "")]), ..Plan::default() }).await;
    a.set_fault(Some(Fault::StallsMidStream { after: 1 })).await.expect("set");
    let mut clients = Vec::new();
    for n in 0..3_u64 {
        let told = explain(&house, &["POST", "/api/chat", "--model", "m", "--agent", "tester"]).await;
        let placement = &told["placement"];
        assert_eq!(
            (&placement["outcome"], &placement["backend"], &placement["ahead"]),
            (&json!(if n == 0 { "sent" } else { "waits" }), &json!("a"), &json!(n.saturating_sub(1))),
            "{placement}"
        );
        waiting(&house, n.saturating_sub(1)).await;
        let mut client = Connection::open(house.public).await;
        client.send(&Request::post("/api/chat", chat("m", true)).bearer(&house.token())).await;
        if n == 0 {
            a.wait_for(PATIENCE, |seen| seen.len() == 1).await.expect("it is sent");
        }
        waiting(&house, n).await;
        clients.push(client);
    }
    // Whoever has waited for nothing yet, and is a person, goes before those who wait.
    let told = explain(&house, &["POST", "/api/chat", "--model", "m", "--priority", "interactive"]).await;
    assert_eq!(told["placement"]["ahead"], 0);
    assert_eq!(targets(&a).len(), 1);
}

#[tokio::test]
async fn without_a_running_proxy_policy_explain_says_that_nobody_knows_the_backend() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = program(&["policy", "explain", "POST", "/api/chat", "--model", "m"]);
    command.env("BEHAVRY_STATE_DIR", dir.path());
    let ended = run_to_end(command).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let told: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&told["decision"], &told["placement"]["outcome"]), (&json!("allow"), &json!("unknown")));
    let detail = told["placement"]["detail"].as_str().expect("words");
    assert!(detail.starts_with("no proxy answers at "), "{detail}");
}
