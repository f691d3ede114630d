//! May they: the seed's own policy and others, over sockets; reload, refusal to start, and one model whatever it is called
//! (contract, sections 3 and 4; promises I1, I2 and I8).

use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD};
use behavry_ollama_proxy::wire::model;
use serde_json::{Value, json};

use crate::client::{Connection, Reply, Request};
use crate::house::{House, PATIENCE, Plan, program, run_to_end, wait_until};

const SEED: &str = include_str!("../../policies/examples/seed.rego");

const ADMIN: &[&str] = &["web:read", "web:write", "ollama:admin"];

async fn house_with(files: &[(&'static str, &str)], config: &str) -> House {
    let policy = files.iter().map(|(name, text)| (*name, (*text).to_owned())).collect();
    House::with(Plan { policy, config: config.to_owned(), ..Plan::default() }).await
}

fn chat(model: &str) -> Request {
    let ask = json!({ "model": model, "stream": false, "messages": [{ "role": "user", "content": "hi" }] });
    Request::post("/api/chat", ask)
}

fn denied_by(last: &Value, rule: &str) {
    assert_eq!((&last["policy_result"], &last["policy_id"]), (&json!("deny"), &json!(rule)));
    assert_eq!(last["extra"]["outcome"], "refused");
    assert!(last["extra"]["policy_revision"].is_string());
}

// ---- the seed's policy

#[tokio::test]
async fn the_seeds_policy_lets_three_models_pass_and_no_external_agent() {
    let house = house_with(&[("seed.rego", SEED)], "").await;
    let may = ["web:read", "web:write"];
    for model in ["llama3.2", "codellama", "mistral"] {
        for roles in [&[][..], &["internal"][..], &["internal", "ops"][..]] {
            let reply = house.send(chat(model).bearer(&house.token_with(roles, &may))).await;
            assert_eq!(reply.status, 200, "{model} {roles:?}");
        }
    }
    let seen = house.simulator.seen().len();
    for (n, (model, roles)) in [
        ("tiny-story", &["internal"][..]),
        ("llama3.2:1b", &["internal"]),
        ("llama3.2", &["external"]),
        ("llama3.2", &["internal", "external"]),
        ("llama3.2", &["external", "internal"]),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("denied-{n}");
        let reply = house.send(chat(model).bearer(&house.token_with(roles, &may)).id(&id)).await;
        assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()), "{model} {roles:?}");
        assert_eq!(reply.header("x-should-retry"), Some("false"));
        // Its `deny` is a boolean and has no words, so the refusal names the rule, the model and the roles.
        let words = format!("behavry.authz.deny denies this (model {model}) (roles: {})", roles.join(", "));
        assert_eq!(reply.json()["detail"], format!("The policy denies this request: {words}"));
        let last = house.final_of(&id).await;
        denied_by(&last, "behavry.authz.deny");
        assert_eq!((&last["policy_reason"], &last["extra"]["model"]), (&json!(words), &json!(model)));
        assert_eq!(house.records_of(&id).await.len(), 1, "no `request` record: nothing was to be sent");
    }
    assert_eq!(house.simulator.seen().len(), seen, "a denied request reaches no backend");

    // A request without a model is denied too, and a list shows what is approved.
    assert_eq!(house.send(Request::get("/api/version").bearer(&house.token())).await.status, 403);
    let reply = house.send(Request::get("/api/tags").bearer(&house.token()).id("list")).await;
    assert_eq!(reply.status, 200);
    assert_eq!(names(&reply, "models", "name"), ["llama3.2:latest", "codellama:latest", "mistral:latest"]);
    let last = house.final_of("list").await;
    assert_eq!((&last["policy_result"], &last["extra"]["filters"]), (&json!("allow"), &json!(["hidden_models"])));
    let external = house.token_with(&["external"], &may);
    let reply = house.send(Request::get("/api/tags").bearer(&external)).await;
    assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()), "nothing is left, and null is denied");
}

fn names(reply: &Reply, list: &str, key: &str) -> Vec<String> {
    let body = reply.json();
    let entries = body[list].as_array().expect("a list").iter();
    entries.map(|entry| entry[key].as_str().expect("a name").to_owned()).collect()
}

#[tokio::test]
async fn all_spellings_of_a_model_are_one_model() {
    let policy = "package behavry.authz\n\ndeny contains \"not here\" if input.model == \"llama3.2\"\n";
    let house = house_with(&[("authz.rego", policy)], "").await;
    let spellings = [
        "llama3.2",
        "LLAMA3.2:latest",
        "Llama3.2:LATEST",
        "library/llama3.2",
        "registry.ollama.ai/library/llama3.2",
        "registry.ollama.ai/library/llama3.2:latest",
        "https://registry.ollama.ai/library/llama3.2",
        " llama3.2 ",
        "llama3.2:local",
    ];
    for (n, spelling) in spellings.into_iter().enumerate() {
        let id = format!("spelled-{n}");
        let reply = house.send(chat(spelling).bearer(&house.token()).id(&id)).await;
        assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()), "{spelling:?}");
        let last = house.final_of(&id).await;
        assert_eq!(
            (&last["extra"]["model"], &last["extra"]["model_raw"]),
            (&json!("llama3.2"), &json!(spelling.trim()))
        );
    }
    for path in ["/v1/models/llama3.2", "/v1/models/LLAMA3.2:latest"] {
        assert_eq!(house.send(Request::get(path).bearer(&house.token())).await.status, 403, "{path}");
    }
    let reply = house.send(Request::post("/api/show", json!({ "name": "Llama3.2" })).bearer(&house.token())).await;
    assert_eq!(reply.status, 403);
    assert_eq!(house.simulator.connections(), 0);
    assert_eq!(house.send(chat("mistral").bearer(&house.token())).await.status, 200);
}

// ---- what a policy says reaches the caller and the audit

const SPEAKING: &str = r#"package behavry.authz

deny contains sprintf("%s may not use %s", [input.agent.id, input.model]) if input.model == "mistral"

deny contains "not\nin \u001b[31mthis\u001b[0m house" if input.model == "mistral"

escalate if input.model == "codellama"
"#;

#[tokio::test]
async fn the_reasons_of_a_deny_set_reach_the_caller_in_its_dialect_and_the_audit() {
    let house = house_with(&[("authz.rego", SPEAKING)], "").await;
    let ask = json!({ "model": "mistral", "max_tokens": 1, "messages": [{ "role": "user", "content": "hi" }] });
    for (n, path) in ["/api/chat", "/v1/chat/completions", "/v1/messages"].into_iter().enumerate() {
        let id = format!("reasons-{n}");
        let reply = house.send(Request::post(path, ask.clone()).bearer(&house.token()).id(&id)).await;
        assert_eq!(reply.status, 403, "{path}");
        let body = reply.json();
        let text = body["error"]["message"].as_str().or(body["error"].as_str()).expect("words").to_owned();
        assert!(text.contains("tester may not use mistral") && text.contains("in "), "{path}: {text}");
        assert!(!text.contains(['\n', '\u{1b}']), "what could steer a terminal is escaped");
        let last = house.final_of(&id).await;
        denied_by(&last, "behavry.authz.deny");
        let reason = last["policy_reason"].as_str().expect("a reason");
        assert!(reason.contains("tester may not use mistral; ") || reason.ends_with("tester may not use mistral"));
        assert!(!reason.contains(['\n', '\u{1b}']));
    }
    let reply = house.send(chat("codellama").bearer(&house.token()).id("escalated")).await;
    assert_eq!((reply.status, reply.code()), (403, "policy_escalated".to_owned()));
    let last = house.final_of("escalated").await;
    assert_eq!((&last["policy_result"], &last["policy_id"]), (&json!("escalate"), &json!("behavry.authz.escalate")));
    assert_eq!(house.simulator.connections(), 0);
    assert_eq!(house.send(chat("llama3.2").bearer(&house.token())).await.status, 200, "it only declares denies");
}

#[tokio::test]
async fn a_decision_rule_and_an_allow_rule_must_say_yes() {
    let decision = r#"package behavry.authz

decision := {"result": "allow", "reason": "approved"} if input.model == "llama3.2"

decision := {"result": "deny", "reason": "out of hours"} if input.model == "mistral"

decision := {"result": "escalate", "reason": "ask first"} if input.model == "codellama"
"#;
    let house = house_with(&[("authz.rego", decision)], "").await;
    for (model, status, code, reason) in [
        ("llama3.2", 200, "", "approved"),
        ("mistral", 403, "policy_denied", "out of hours"),
        ("codellama", 403, "policy_escalated", "ask first"),
        ("tiny", 403, "policy_denied", "no rule of the policy allows this (model tiny) (no role)"),
    ] {
        let reply = house.send(chat(model).bearer(&house.token()).id(model)).await;
        assert_eq!(reply.status, status, "{model}");
        if status != 200 {
            assert_eq!(reply.code(), code);
            assert!(reply.json()["detail"].as_str().unwrap().contains(reason), "{model}");
        }
        assert_eq!(house.final_of(model).await["policy_reason"], reason);
    }

    let allow =
        "package behavry.authz\n\nallow if input.agent_role == \"writer\"\n\ndeny if input.agent_role == \"guest\"\n";
    let house = house_with(&[("authz.rego", allow)], "").await;
    let may = ["web:write"];
    for (roles, status) in [
        (&["writer"][..], 200),
        (&["reader", "writer"], 200),
        (&["reader"], 403),
        (&[], 403),
        (&["writer", "guest"], 403),
    ] {
        let reply = house.send(chat("llama3.2").bearer(&house.token_with(roles, &may))).await;
        assert_eq!(reply.status, status, "{roles:?}");
    }
}

#[tokio::test]
async fn a_policy_that_runs_away_or_errs_or_answers_nonsense_refuses_and_the_next_request_is_served() {
    let policy = r#"package behavry.authz

deny if {
	input.model == "tiny-slow"
	some a in numbers.range(1, 4000)
	some b in numbers.range(1, 4000)
	a * b == -1
}

deny if {
	input.model == "tiny-broken"
	startswith(input.model_ref.size, "x")
}

deny if {
	input.model == "tiny-loop"
	startswith(input.requester.id, "x")
}

escalate := "perhaps" if input.model == "tiny-tools"
"#;
    let house = house_with(&[("authz.rego", policy)], "[policy]\ntimeout_ms = 200\n").await;
    for (model, said) in [("tiny-slow", "200 ms"), ("tiny-loop", "authz.rego"), ("tiny-tools", "escalate")] {
        let reply = house.send(chat(model).bearer(&house.token()).id(model)).await;
        assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()), "{model}");
        let last = house.final_of(model).await;
        assert_eq!(last["policy_result"], "deny");
        assert_eq!(last["error"], "the policy could not be evaluated");
        assert!(last["policy_reason"].as_str().unwrap().contains(said), "{model}: {}", last["policy_reason"]);
        assert_eq!(house.simulator.connections(), 0, "{model}");
    }
    assert_eq!(house.send(chat("llama3.2").bearer(&house.token())).await.status, 200);
}

#[tokio::test]
async fn builtin_errors_may_be_configured_to_be_undefined_as_opa_has_it() {
    let policy = "package behavry.authz\n\ndeny if startswith(input.requester.id, \"x\")\n";
    let strict = house_with(&[("authz.rego", policy)], "").await;
    assert_eq!(strict.send(chat("llama3.2").bearer(&strict.token())).await.status, 403);
    let lenient = house_with(&[("authz.rego", policy)], "[policy]\nbuiltin_errors = \"undefined\"\n").await;
    assert_eq!(lenient.send(chat("llama3.2").bearer(&lenient.token())).await.status, 200);
}

// ---- management

#[tokio::test]
async fn management_needs_the_permission_and_the_policys_consent_for_both_names() {
    let policy = r#"package behavry.authz

deny contains sprintf("%s is protected", [input.model]) if input.model in {"llama3.2", "prod/chat"}
"#;
    let house = house_with(&[("authz.rego", policy)], "").await;
    let admin = house.token_with(&[], ADMIN);
    let delete = |body: Value| Request { method: "DELETE".into(), ..Request::post("/api/delete", body) };
    let quiet = |path: &str, model: &str| Request::post(path, json!({ "model": model, "stream": false }));
    for (n, request) in [
        quiet("/api/pull", "llama3.2"),
        quiet("/api/push", "LLAMA3.2:latest"),
        Request::post("/api/pull", json!({ "name": "library/llama3.2" })),
        Request::post("/api/create", json!({ "model": "mine", "from": "llama3.2" })),
        Request::post("/api/create", json!({ "model": "prod/chat", "from": "mistral" })),
        Request::post("/api/copy", json!({ "source": "llama3.2", "destination": "mine" })),
        Request::post("/api/copy", json!({ "source": "mistral", "destination": "llama3.2" })),
        Request::post("/api/copy", json!({ "source": "mistral", "destination": "Prod/Chat:latest" })),
        delete(json!({ "model": "llama3.2" })),
        delete(json!({ "name": "llama3.2" })),
    ]
    .into_iter()
    .enumerate()
    {
        let what = format!("{} {}", request.path, n);
        let reply = house.send(request.bearer(&admin).id(&format!("kept-{n}"))).await;
        assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()), "{what}");
        assert!(reply.json()["detail"].as_str().unwrap().contains("is protected"), "{what}");
        denied_by(&house.final_of(&format!("kept-{n}")).await, "behavry.authz.deny");
    }
    assert_eq!(house.simulator.connections(), 0);

    for request in [
        quiet("/api/pull", "newcomer"),
        quiet("/api/push", "newcomer"),
        Request::post("/api/create", json!({ "model": "mine", "from": "mistral", "stream": false })),
        Request::post("/api/copy", json!({ "source": "mistral", "destination": "copied" })),
        delete(json!({ "model": "copied" })),
    ] {
        let (method, what) = (request.method.clone(), request.path.clone());
        let reply = house.send(request.bearer(&admin).id(&what)).await;
        assert_eq!(reply.status, 200, "{what}: {}", reply.text());
        let last = house.final_of(&what).await;
        assert_eq!((&last["action"], &last["target"]), (&json!(method), &json!(what)));
        assert_eq!(last["extra"]["outcome"], "complete", "{what}");
    }
    assert_eq!(house.simulator.seen().len(), 5);
}

#[tokio::test]
async fn the_shipped_policy_serves_every_agent_but_external_ones_and_admins_manage() {
    let house = House::open().await;
    assert_eq!(house.send(chat("tiny-story").bearer(&house.token())).await.status, 200);
    let external = house.token_with(&["external"], &["web:read", "web:write"]);
    let reply = house.send(chat("tiny-story").bearer(&external)).await;
    assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()));
    assert!(reply.json()["detail"].as_str().unwrap().contains("role external may not use local models"));
    assert_eq!(house.send(Request::get("/api/version").bearer(&external)).await.status, 200);
    let copy = json!({ "source": "mistral", "destination": "copied" });
    let admin = house.token_with(&[], ADMIN);
    assert_eq!(house.send(Request::post("/api/copy", copy).bearer(&admin)).await.status, 200);
}

// ---- bodies that could be read in two ways (promise I2)

#[tokio::test]
async fn a_body_that_names_its_model_twice_is_refused_before_a_backend_is_contacted() {
    let house = house_with(&[("seed.rego", SEED)], "").await;
    for (n, body) in [
        r#"{"model":"llama3.2","MODEL":"x","messages":[]}"#,
        r#"{"MODEL":"x","model":"llama3.2","messages":[]}"#,
        r#"{"model":"llama3.2","model":"x","messages":[]}"#,
        r#"{"model":"llama3.2","m\u006fdel":"x","messages":[]}"#,
        r#"{"model":"llama3.2","messages":[]} {"model":"x"}"#,
        r#"{"model":"llama3.2","messages":[],"ſtream":false}"#,
    ]
    .into_iter()
    .enumerate()
    {
        for path in ["/api/chat", "/v1/chat/completions"] {
            let request = Request::new("POST", path).header("content-type", "application/json").body(body);
            let id = format!("two-{n}{}", path.replace('/', "-"));
            let reply = house.send(request.bearer(&house.token()).id(&id)).await;
            assert_eq!(reply.status, 400, "{path} {body}");
            assert!(["ambiguous_body", "invalid_body"].contains(&&*reply.code()), "{path} {body}: {}", reply.code());
            if n < 3 {
                assert_eq!(reply.code(), "ambiguous_body");
            }
            let last = house.final_of(&id).await;
            assert_eq!((&last["policy_result"], &last["agent_id"]), (&json!("deny"), &json!("tester")));
        }
    }
    assert_eq!(house.simulator.connections(), 0);
}

/// What a recorded Ollama made of each body that two readers could understand differently.
const DIFFERENTIAL: [&str; 3] = [
    include_str!("../fixtures/ollama/0.17.4/differential.jsonl"),
    include_str!("../fixtures/ollama/0.24.0/differential.jsonl"),
    include_str!("../fixtures/ollama/0.33.0-rc2/differential.jsonl"),
];

#[tokio::test]
async fn what_is_audited_is_what_ollama_runs_whatever_the_body() {
    let house = House::open().await;
    let token = house.token();
    let canonical = |name: &str| model::parse(name).expect("a model's name").canonical();
    let (mut forwarded, mut refused) = (Vec::new(), 0);
    let mut connection = Connection::open(house.public).await;
    let mut tried = std::collections::HashMap::new();
    for (version, lines) in DIFFERENTIAL.into_iter().enumerate() {
        for (n, line) in lines.lines().enumerate() {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let (path, why) = (line["path"].as_str().unwrap(), line["why"].as_str().unwrap());
            let body = STANDARD.decode(line["body"].as_str().unwrap()).unwrap();
            // The same body again: only what that version made of it may differ.
            let id = match tried.get(&(path.to_owned(), body.clone())) {
                Some(Some(id)) => String::clone(id),
                Some(None) => continue,
                None => {
                    let id = format!("body-{version}-{n}");
                    let before = house.simulator.seen().len();
                    let request = Request::new("POST", path).header("content-type", "application/json");
                    connection.send(&request.bearer(&token).id(&id).body(body.clone())).await;
                    let reply = match connection.reply(false).await {
                        Some(reply) => reply,
                        None => panic!("{path} {why}: no reply"),
                    };
                    if reply.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
                        connection = Connection::open(house.public).await;
                    }
                    let seen = house.simulator.seen();
                    let ours = reply.header("x-behavry-backend").is_none();
                    tried.insert((path.to_owned(), body.clone()), (!ours).then(|| id.clone()));
                    if ours {
                        assert!((400..500).contains(&reply.status), "{path} {why}: {}", reply.status);
                        assert_eq!(seen.len(), before, "{path} {why}: refused, and yet the backend was asked");
                        refused += 1;
                        continue;
                    }
                    assert_eq!(seen.len(), before + 1, "{path} {why}: one request makes one request");
                    let last = seen.last().expect("one");
                    assert_eq!(last.target, path);
                    if path.starts_with("/api/") {
                        assert_eq!(last.body, body, "{path} {why}: native bodies pass byte for byte");
                    }
                    id
                }
            };
            forwarded.push((id, path.to_owned(), why.to_owned(), line));
        }
    }
    assert!(refused >= 30 && forwarded.len() >= 60, "{refused} refused, {} forwarded", forwarded.len());
    let seen = house.simulator.seen();
    for (id, path, why, line) in forwarded {
        let last = house.final_of(&id).await;
        let audited = last["extra"]["model"].as_str().map(str::to_owned);
        let at_backend = seen.iter().find(|one| one.header("x-request-id") == Some(&id)).expect("it was forwarded");
        if let Some(named) = at_backend.model.as_deref().filter(|name| !name.trim().is_empty()) {
            assert_eq!(audited, Some(canonical(named)), "{path} {why}: another model at the backend");
        }
        if let Some(ran) = line["model_run"].as_str() {
            assert_eq!(audited, Some(canonical(ran)), "{path} {why}: Ollama ran another model");
            assert_eq!(last["extra"]["stream"], line["stream"], "{path} {why}");
        }
    }
}

// ---- loading and reloading

fn replace(house: &House, name: &str, text: &str) {
    // As editors and configuration tools do: whole or not at all.
    let dir = house.dir.path().join("policies");
    std::fs::write(dir.join(format!(".{name}")), text).expect("written");
    std::fs::rename(dir.join(format!(".{name}")), dir.join(name)).expect("renamed");
}

async fn until_chat_gives(house: &House, status: u16) {
    let began = std::time::Instant::now();
    while house.send(chat("llama3.2").bearer(&house.token())).await.status != status {
        assert!(began.elapsed() < PATIENCE, "the change was not taken:\n{}", house.log());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_good_change_is_taken_while_running_and_a_broken_one_leaves_the_last_good_policy() {
    const YES: &str = "package behavry.authz\n\ndeny if input.model == \"nothing\"\n";
    const NO: &str = "package behavry.authz\n\ndeny if input.model == \"llama3.2\"\n";
    let house = house_with(&[("authz.rego", YES)], "[policy]\nreload_s = 1\n").await;
    let reply = house.send(chat("llama3.2").bearer(&house.token()).id("before")).await;
    assert_eq!(reply.status, 200);
    let revision = house.final_of("before").await["extra"]["policy_revision"].clone();
    assert!(house.metrics().await.contains(r#"behavry_ollama_reload_failures_total{what="policy"} 0"#));

    replace(&house, "authz.rego", NO);
    until_chat_gives(&house, 403).await;

    replace(&house, "authz.rego", "package behavry.authz\n\nallow if {\n");
    wait_until("the broken policy is seen", || house.log().contains("not reloaded").then_some(())).await;
    assert!(house.metrics().await.contains(r#"behavry_ollama_reload_failures_total{what="policy"} 1"#));
    assert!(house.log().contains("authz.rego:"), "file and line are named: {}", house.log());
    assert_eq!(house.send(chat("llama3.2").bearer(&house.token())).await.status, 403, "the last good one stays");

    // Removing everything is a broken change as well: nothing is allowed by it.
    std::fs::remove_file(house.dir.path().join("policies/authz.rego")).unwrap();
    let began = std::time::Instant::now();
    while !house.metrics().await.contains(r#"behavry_ollama_reload_failures_total{what="policy"} 2"#) {
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(house.send(chat("llama3.2").bearer(&house.token())).await.status, 403);

    replace(&house, "authz.rego", YES);
    until_chat_gives(&house, 200).await;
    assert_eq!(house.send(chat("llama3.2").bearer(&house.token()).id("after")).await.status, 200);
    assert_eq!(house.final_of("after").await["extra"]["policy_revision"], revision, "the same text, the same revision");
}

#[tokio::test]
async fn without_a_policy_that_works_the_proxy_does_not_start() {
    let serve = async |dir: &Path| {
        let state = tempfile::tempdir().expect("a folder");
        let mut command = program(&["serve", "--listen", "127.0.0.1:0", "--operator-listen", "127.0.0.1:0"]);
        command.env("BEHAVRY_STATE_DIR", state.path()).env("BEHAVRY_POLICY_DIR", dir);
        run_to_end(command).await
    };
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("house.rego");
    for (text, words) in [
        (None, "has no policy"),
        (Some("package behavry.authz\n\ndeny if {\n"), "house.rego:"),
        (Some("package behavry.authz\n\ndeny if no_such_function(input.model)\n"), "house.rego:3"),
        (Some("package behavry.authz\n\nx := 1\n"), "everything would be allowed"),
        (Some("package somebody.elses\n\nallow := true\n"), "everything would be allowed"),
    ] {
        if let Some(text) = text {
            std::fs::write(&file, text).unwrap();
        }
        let ended = serve(dir.path()).await;
        assert_eq!(ended.code, Some(78), "{text:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(words), "{text:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(&dir.path().display().to_string()), "{}", ended.stderr);
        assert!(!ended.stderr.contains("listening on"), "{}", ended.stderr);
    }
    let ended = serve(&dir.path().join("none")).await;
    assert_eq!(ended.code, Some(78), "{}", ended.stderr);
}
