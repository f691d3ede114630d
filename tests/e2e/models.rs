//! Models: settings that are pinned, aliases, fallbacks; and several backends' models as one list.

use behavry_ollama_proxy::simulator::{Fault, Simulator, SimulatorOptions, WireForm};
use serde_json::{Value, json};

use crate::client::Request;
use crate::fleet::{chat, holding, tables};
use crate::house::{House, PATIENCE, Plan, wait_until_async};
use crate::puppet::Puppet;

/// The body that the backend got of a request, byte for byte.
fn sent(house: &House, id: &str) -> String {
    let seen = house.simulator.seen();
    let of_it =
        seen.iter().rfind(|seen| seen.headers.iter().any(|(name, value)| name == "x-request-id" && value == id));
    String::from_utf8(of_it.expect("it came").body.clone()).expect("text")
}

fn policy(rules: &str) -> Vec<(&'static str, String)> {
    vec![("authz.rego", format!("package behavry.authz\n\n{rules}\n"))]
}

async fn house(config: &str) -> House {
    House::with(Plan { config: config.to_owned(), ..Plan::default() }).await
}

const GUARDED: &str = r#"
[[model]]
name = "tiny-story"
num_ctx = 8192
num_batch = { min = 64, max = 512 }
num_gpu = "strip"
use_mmap = true
keep_alive = { max = "10m" }

[[model]]
name = "*"
num_ctx = "strip"
"#;

#[tokio::test]
async fn settings_of_a_model_are_pinned_clamped_or_stripped_and_the_audit_says_so() {
    let house = house(GUARDED).await;
    let raw = r#"{ "model":"TINY-story:latest", "messages":[] ,"options":{"num_batch":4096,"seed" : 7,"num_gpu":99}, "keep_alive": -1,"x":[1.50]}"#;
    let reply = house.send(Request::new("POST", "/api/chat").bearer(&house.token()).id("guarded").body(raw)).await;
    assert_eq!(reply.status, 200);
    let wanted = r#"{ "model":"TINY-story:latest", "messages":[] ,"options":{"num_ctx":8192,"use_mmap":true,"num_batch":512,"seed" : 7}, "keep_alive": "10m","x":[1.50]}"#;
    assert_eq!(sent(&house, "guarded"), wanted, "all else is as the client wrote it");
    assert_eq!(reply.header("x-behavry-model"), None, "no other model runs");
    let last = house.final_of("guarded").await;
    let words = ["keep_alive_clamped", "num_batch_clamped", "num_ctx_pinned", "num_gpu_stripped", "use_mmap_pinned"];
    assert_eq!(last["extra"]["filters"], json!(words));

    // What is as it should be passes byte for byte; other models have the rules of all others.
    let right = r#"{"model":"tiny-story","input":"x","options":{"use_mmap":true,"num_ctx":8192}}"#;
    house.send(Request::new("POST", "/api/embed").bearer(&house.token()).id("right").body(right)).await;
    assert_eq!(sent(&house, "right"), right);
    assert_eq!(house.final_of("right").await["extra"]["filters"], json!([]));
    let other = r#"{"model":"tiny","prompt":"x","options":{"num_ctx":9,"num_gpu":1}}"#;
    house.send(Request::new("POST", "/api/generate").bearer(&house.token()).id("other").body(other)).await;
    assert_eq!(sent(&house, "other"), r#"{"model":"tiny","prompt":"x","options":{"num_gpu":1}}"#);
    assert_eq!(house.final_of("other").await["extra"]["filters"], json!(["num_ctx_stripped"]));

    // /v1 has no such members, and gets none.
    let body = r#"{"model":"tiny-story","messages":[{"role":"user","content":"x"}],"keep_alive":-1}"#;
    house.send(Request::new("POST", "/v1/chat/completions").bearer(&house.token()).id("v1").body(body)).await;
    assert_eq!(sent(&house, "v1"), body);
}

#[tokio::test]
async fn without_a_word_of_the_operators_a_native_body_is_passed_on_byte_for_byte() {
    let house = House::open().await;
    let raw = r#"{ "model" : "tiny" , "options":{"num_ctx":1, "num_gpu":2},"keep_alive":"1h","prompt":"x" }"#;
    house.send(Request::new("POST", "/api/generate").bearer(&house.token()).id("raw").body(raw)).await;
    assert_eq!(sent(&house, "raw"), raw);
}

#[tokio::test]
async fn loads_are_counted_by_model() {
    let simulator = SimulatorOptions { load_ms: 300, ..SimulatorOptions::for_tests() };
    let config = "[catalogue]\nrefresh_s = 1\n".to_owned();
    let house = House::with(Plan { simulator, config, ..Plan::default() }).await;
    let ask = json!({ "model": "tiny", "stream": false, "messages": [{ "role": "user", "content": "x" }] });
    for _ in 0..2 {
        assert_eq!(house.post("/api/chat", ask.clone()).await.status, 200);
    }
    let counted = "behavry_ollama_model_loads_total{model=\"tiny\"} ";
    let began = std::time::Instant::now();
    while began.elapsed() < PATIENCE {
        let text = house.metrics().await;
        let requests =
            text.lines().any(|line| line.contains("requests_total{endpoint=\"chat\"") && line.ends_with(" 2"));
        if requests {
            // The second one found it loaded, unless this machine took 200 ms to answer at all.
            let line = text.lines().find(|line| line.starts_with(counted)).expect("the first one was a load");
            assert!(["1", "2"].contains(&&line[counted.len()..]), "{line}");
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("two requests were not counted");
}

const NAMED: &str = r#"
[[model]]
name = "fast"
alias = "Tiny-Story"

[[model]]
name = "mistral"
fallback = ["absent", "fast"]

[[model]]
name = "gone"
fallback = ["absent", "tiny"]

[catalogue]
refresh_s = 1
"#;

#[tokio::test]
async fn an_alias_runs_its_target_in_every_dialect_and_says_so_in_header_and_audit() {
    let house = house(NAMED).await;
    let messages = r#""messages":[{"role":"user","content":"x"}]"#;
    for (path, body) in [
        ("/api/chat", format!(r#"{{"model":"FAST",{messages},"stream":false}}"#)),
        ("/api/generate", r#"{"stream":false,"prompt":"x","model" : "library/fast"}"#.to_owned()),
        ("/v1/chat/completions", format!(r#"{{"model":"fast:latest",{messages}}}"#)),
        ("/v1/messages", format!(r#"{{"max_tokens":9,"model":"fast",{messages}}}"#)),
        ("/v1/responses", r#"{"input":"x","model":"fast"}"#.to_owned()),
        ("/v1/embeddings", r#"{"input":"x","model":"fast"}"#.to_owned()),
        ("/api/show", r#"{"name":"fast"}"#.to_owned()),
    ] {
        let reply = house.send(Request::new("POST", path).bearer(&house.token()).id(path).body(body.as_str())).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        assert_eq!(reply.header("x-behavry-model"), Some("tiny-story"), "{path}");
        let got: Value = serde_json::from_str(&sent(&house, path)).expect("JSON");
        assert_eq!(got["model"], "Tiny-Story", "{path}");
        let last = house.final_of(path).await;
        let extra = &last["extra"];
        assert_eq!(extra["model"], "tiny-story", "{path}");
        assert!(extra["model_raw"].as_str().is_some_and(|raw| raw.to_lowercase().contains("fast")), "{path}: {extra}");
        assert_eq!(extra["filters"][0], "alias", "{path}");
        // What ran is what the reply names: Ollama echoes the name that it was sent.
        if !path.contains("show") {
            assert_eq!(reply.json()["model"], "Tiny-Story", "{path}");
        }
    }
    let one = house.send(Request::get("/v1/models/fast").bearer(&house.token()).id("one")).await;
    assert_eq!((one.status, one.header("x-behavry-model")), (200, Some("tiny-story")));
    assert_eq!(house.final_of("one").await["extra"]["model_raw"], "fast");
}

#[tokio::test]
async fn where_no_backend_has_a_model_the_next_of_its_chain_runs() {
    let house = house(NAMED).await;
    let ask =
        |model: &str| json!({ "model": model, "stream": false, "messages": [{ "role": "user", "content": "x" }] });
    let token = house.token();
    let send =
        async |id: &str, model: &str| house.send(Request::post("/api/chat", ask(model)).bearer(&token).id(id)).await;
    let held = send("held", "mistral").await;
    assert_eq!((held.status, held.header("x-behavry-model")), (200, None), "the backend has it");
    assert_eq!(house.final_of("held").await["extra"]["filters"], json!([]));
    let gone = send("gone", "gone").await;
    assert_eq!((gone.status, gone.header("x-behavry-model")), (200, Some("tiny")));
    let extra = house.final_of("gone").await["extra"].clone();
    assert_eq!(
        (&extra["model"], &extra["model_raw"], &extra["filters"]),
        (&json!("tiny"), &json!("gone"), &json!(["fallback"]))
    );
    let absent = send("absent", "absent").await;
    assert_eq!(absent.status, 404, "no chain, no other model: Ollama's own words");
}

#[tokio::test]
async fn the_policy_decides_the_name_that_was_asked_for_and_what_runs_for_it() {
    let run = async |rules: &str, model: &str| {
        let house = House::with(Plan { config: NAMED.to_owned(), policy: policy(rules), ..Plan::default() }).await;
        let ask = json!({ "model": model, "stream": false, "messages": [] });
        let reply = house.send(Request::post("/api/chat", ask).bearer(&house.token()).id("x")).await;
        let ran = house.final_of("x").await["extra"]["model"].clone();
        (reply.status, ran, house.simulator.seen().iter().filter(|seen| seen.target.starts_with("/api/chat")).count())
    };
    let only = |names: &str| format!("deny contains \"no\" if not input.model in {{{names}}}");
    assert_eq!(run(&only("\"fast\", \"tiny-story\""), "fast").await, (200, json!("tiny-story"), 1));
    assert_eq!(run(&only("\"tiny-story\""), "fast").await, (403, json!("fast"), 0), "the name was not allowed");
    assert_eq!(run(&only("\"fast\""), "fast").await, (403, json!("fast"), 0), "the model was not allowed");
    // Of a chain what is denied is left out.
    assert_eq!(run(&only("\"gone\", \"tiny\""), "gone").await, (200, json!("tiny"), 1));
    assert_eq!(run(&only("\"gone\""), "gone").await.0, 404, "the model itself is allowed, and is not there");
    assert_eq!(run(&only("\"tiny\""), "gone").await, (403, json!("gone"), 0));
}

#[tokio::test]
async fn an_alias_hides_no_cloud_model_and_manages_nothing() {
    let config = "[[model]]\nname = \"cheap\"\nalias = \"gpt-oss:120b-cloud\"\n\n[[model]]\nname = \"big\"\nfallback = [\"gpt-oss:cloud\", \"tiny\"]\n[[model]]\nname = \"fast\"\nalias = \"tiny\"\n[catalogue]\nrefresh_s = 1\n";
    let house = house(config).await;
    let token = house.token_with(&[], &["web:read", "web:write", "ollama:admin"]);
    let ask = |model: &str| json!({ "model": model, "stream": false, "messages": [] });
    let hidden = house.send(Request::post("/api/chat", ask("cheap")).bearer(&token)).await;
    assert_eq!((hidden.status, hidden.code()), (403, "egress_denied".to_owned()));
    let skipped = house.send(Request::post("/api/chat", ask("big")).bearer(&token)).await;
    assert_eq!(
        (skipped.status, skipped.header("x-behavry-model")),
        (200, Some("tiny")),
        "a cloud model is passed over"
    );
    let manage = json!({ "model": "fast" });
    let deleted =
        house.send(Request::new("DELETE", "/api/delete").bearer(&token).id("delete").body(manage.to_string())).await;
    assert_eq!(
        sent(&house, "delete"),
        manage.to_string(),
        "it is the backend's own model that would be deleted: {}",
        deleted.status
    );
}

#[tokio::test]
async fn a_circle_of_aliases_stops_the_start_with_words() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("proxy.toml");
    std::fs::write(&file, "[[model]]\nname = \"a\"\nalias = \"b\"\n[[model]]\nname = \"b\"\nalias = \"a\"\n")
        .expect("written");
    for word in ["serve", "check"] {
        let mut command = crate::house::program(&[word]);
        command.env("BEHAVRY_CONFIG", &file).env("BEHAVRY_STATE_DIR", dir.path().join("state"));
        let ended = crate::house::run_to_end(command).await;
        assert_eq!(ended.code, Some(78), "{word}: {}", ended.stderr);
        assert!(ended.stderr.contains("a -> b -> a leads back to itself"), "{word}: {}", ended.stderr);
    }
}

/// Three backends, each with models of its own and one in common; what is waited for here takes as long as it takes.
async fn three() -> [Simulator; 3] {
    [holding(&["llama3.2", "common"]).await, holding(&["common", "mistral:7b"]).await, holding(&["tiny-embed"]).await]
}

fn merged(backends: &[Simulator], lines: &str) -> String {
    let tables = tables(backends.iter().map(|backend| (backend.url(), "")));
    format!("{tables}[catalogue]\nrefresh_s = 1\nloaded_s = 1\nstraggler_ms = 60000\n{lines}")
}

fn names(list: &Value) -> Vec<String> {
    let entries = list["models"].as_array().or(list["data"].as_array()).expect("never null");
    entries.iter().map(|entry| entry["id"].as_str().or(entry["name"].as_str()).expect("a name").to_owned()).collect()
}

fn entry<'a>(list: &'a Value, name: &str) -> &'a Value {
    let entries = list["models"].as_array().or(list["data"].as_array()).expect("a list");
    entries.iter().find(|entry| entry["id"] == name || entry["name"] == name).expect("it is listed")
}

/// Asks until an answer is as it should be: the catalogue reads in its own time.
async fn list_once(house: &House, path: &str, token: &str, is_right: impl Fn(&Value) -> bool) -> Value {
    let began = std::time::Instant::now();
    loop {
        let reply = house.send(Request::get(path).bearer(token)).await;
        if reply.status == 200 && is_right(&reply.json()) {
            return reply.json();
        }
        assert!(began.elapsed() < PATIENCE, "{path} never was right: {}", reply.text());
    }
}

#[tokio::test]
async fn lists_show_the_models_of_all_backends_once_with_what_is_known_of_them() {
    let backends = three().await;
    let house = House::with(Plan { config: merged(&backends, ""), ..Plan::default() }).await;
    let token = house.token();
    let all = ["llama3.2:latest", "common:latest", "mistral:7b", "tiny-embed:latest"];
    for path in ["/api/tags", "/v1/models"] {
        let list = list_once(&house, path, &token, |list| {
            let entries = list["models"].as_array().or(list["data"].as_array()).expect("a list");
            entries.iter().all(|entry| !entry["capabilities"].is_null() && !entry["loaded"].is_null())
        });
        let list = list.await;
        assert_eq!(names(&list), all, "{path}");
        let embed = entry(&list, "tiny-embed:latest");
        assert_eq!(
            (&embed["loaded"], &embed["backends"]),
            (&json!(false), &Value::Null),
            "{path}: names are for operators"
        );
        assert!(entry(&list, "mistral:7b")["context_length"].is_u64(), "{path}: {list}");
    }
    // What /api/show says, once it was asked.
    let is_shown = |list: &Value| entry(list, "tiny-embed:latest")["capabilities"] == json!(["embedding"]);
    list_once(&house, "/v1/models", &token, is_shown).await;

    // One that answers is loaded, wherever it is.
    assert_eq!(house.post("/api/chat", chat("mistral:7b", false)).await.status, 200);
    list_once(&house, "/v1/models", &token, |list| entry(list, "mistral:7b")["loaded"] == true).await;
    let running = list_once(&house, "/api/ps", &token, |list| names(list) == ["mistral:7b"]).await;
    assert!(running["models"][0]["capabilities"].is_null());

    let one = house.send(Request::get("/v1/models/mistral:7b").bearer(&token).id("one")).await;
    assert_eq!((one.status, one.header("x-behavry-backend")), (200, Some("b")));
    assert_eq!((&one.json()["id"], &one.json()["loaded"]), (&json!("mistral:7b"), &json!(true)));
    let absent = house.get("/v1/models/absent").await;
    assert_eq!((absent.status, absent.json()["error"]["type"].as_str().is_some()), (404, true), "Ollama's own words");

    // Who may manage sees where they are.
    let operator = house.token_with(&[], &["web:read", "web:write", "ollama:admin"]);
    for path in ["/api/tags", "/v1/models"] {
        let list = house.send(Request::get(path).bearer(&operator).id(path)).await.json();
        assert_eq!(entry(&list, "common:latest")["backends"], json!(["a", "b"]), "{path}");
        assert_eq!(entry(&list, "tiny-embed:latest")["backends"], json!(["c"]), "{path}");
        let last = house.final_of(path).await;
        assert_eq!((&last["extra"]["backend"], &last["extra"]["outcome"]), (&Value::Null, &json!("complete")));
    }
    let running = house.send(Request::get("/api/ps").bearer(&operator)).await.json();
    assert_eq!(running["models"][0]["backends"], json!(["b"]));
}

#[tokio::test]
async fn of_a_merged_list_each_model_is_decided() {
    let backends = three().await;
    let policy = policy("deny if not input.model in {\"common\", \"mistral:7b\", \"fast\", \"lost\"}");
    let aliases = "[[model]]\nname = \"fast\"\nalias = \"mistral:7b\"\n[[model]]\nname = \"lost\"\nalias = \"llama3.2\"\n[[model]]\nname = \"hidden\"\nalias = \"common\"\n";
    let house = House::with(Plan { config: merged(&backends, aliases), policy, ..Plan::default() }).await;
    for path in ["/api/tags", "/v1/models"] {
        let reply = house.send(Request::get(path).bearer(&house.token()).id(path)).await;
        let list = reply.json();
        // `lost` stands for a model that is denied, and `hidden` is not allowed itself.
        assert_eq!(names(&list), ["common:latest", "mistral:7b", "fast:latest"], "{path}");
        assert_eq!(entry(&list, "fast:latest")["alias_of"], "mistral:7b");
        assert_eq!(house.final_of(path).await["extra"]["filters"], json!(["hidden_models"]));
    }
    let one = house.get("/v1/models/fast").await;
    assert_eq!((&one.json()["id"], one.header("x-behavry-model")), (&json!("fast:latest"), Some("mistral:7b")));
    assert_eq!(house.get("/v1/models/lost").await.status, 403);
}

#[tokio::test]
async fn a_backend_that_dies_takes_its_models_along_and_one_that_stalls_only_hides_its_own() {
    let backends = three().await;
    let house = House::with(Plan { config: merged(&backends, ""), ..Plan::default() }).await;
    let token = house.token();
    assert_eq!(names(&house.get("/api/tags").await.json()).len(), 4);
    backends[1].set_fault(Some(Fault::Refuses)).await.expect("set");
    for path in ["/api/tags", "/v1/models"] {
        assert_eq!(
            names(&house.get(path).await.json()),
            ["llama3.2:latest", "common:latest", "tiny-embed:latest"],
            "{path}"
        );
    }
    backends[1].set_fault(None).await.expect("set");
    list_once(&house, "/api/tags", &token, |list| names(list).len() == 4).await;
    for backend in &backends {
        backend.set_fault(Some(Fault::Refuses)).await.expect("set");
    }
    let down = house.get("/api/tags").await;
    assert_eq!((down.status, down.code()), (502, "backend_unreachable".to_owned()));

    let (alive, hole) = (holding(&["llama3.2"]).await, Puppet::listen().await);
    let tables = tables([(hole.url(), ""), (alive.url(), "")]);
    let config = format!("{tables}[catalogue]\nrefresh_s = 0\nstraggler_ms = 50\n");
    let house = House::with(Plan { config, ..Plan::default() }).await;
    for path in ["/api/tags", "/v1/models"] {
        assert_eq!(names(&house.get(path).await.json()), ["llama3.2:latest"], "{path}");
    }
}

#[tokio::test]
async fn the_version_of_several_backends_is_the_lowest() {
    let new = holding(&["llama3.2"]).await;
    let old = SimulatorOptions { wire: WireForm::Old, ..SimulatorOptions::for_tests() };
    let backends = [new, Simulator::start(old).await.expect("it listens")];
    let house = House::with(Plan { config: merged(&backends, ""), ..Plan::default() }).await;
    assert_eq!(house.get("/api/version").await.json(), json!({ "version": "0.17.4" }));
    let operator = house.token_with(&[], &["web:read", "web:write", "ollama:admin"]);
    let told = house.send(Request::get("/api/version").bearer(&operator)).await.json();
    assert_eq!(told["backends"], json!({ "a": "0.33.0-rc2", "b": "0.17.4" }));
    assert_eq!(house.send(Request::new("HEAD", "/api/version").bearer(&operator)).await.status, 200);
}

const ADMIN: &[&str] = &["web:read", "web:write", "ollama:admin"];

fn pulls(backend: &Simulator) -> Vec<Value> {
    let bodies = backend.seen().into_iter().filter(|seen| seen.target == "/api/pull");
    bodies.map(|seen| serde_json::from_slice(&seen.body).expect("JSON")).collect()
}

#[tokio::test]
async fn a_pull_goes_to_every_backend_that_should_hold_the_model_and_is_told_as_one() {
    let backends = three().await;
    let [a, b, c] = &backends;
    let config = tables([(a.url(), ""), (b.url(), "models = [\"other\"]"), (c.url(), "")]);
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let token = house.token_with(&[], ADMIN);
    let pull = json!({ "model": "qwen3" });
    let reply = house.send(Request::post("/api/pull", pull.clone()).bearer(&token).id("pull")).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/x-ndjson")));
    let lines: Vec<Value> = reply.lines().iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let statuses: Vec<&str> = lines.iter().filter_map(|line| line["status"].as_str()).collect();
    assert_eq!(statuses.iter().filter(|status| **status == "success").count(), 1, "{statuses:?}");
    assert_eq!((statuses.first(), statuses.last()), (Some(&"backend a (1 of 2)"), Some(&"success")));
    assert!(statuses.contains(&"backend c (2 of 2)") && lines.iter().any(|line| line["completed"].is_u64()));
    assert_eq!([a, b, c].map(|backend| pulls(backend).len()), [1, 0, 1]);
    let records = house.records_of("pull").await;
    let phases: Vec<&str> = records.iter().filter_map(|record| record["extra"]["phase"].as_str()).collect();
    assert_eq!(phases, ["request", "stream_start", "final"]);
    assert_eq!((&records[2]["extra"]["outcome"], &records[2]["extra"]["model"]), (&json!("complete"), &json!("qwen3")));

    // Not streamed, and one that is named alone.
    let whole = json!({ "model": "qwen3", "stream": false });
    let reply = house.send(Request::post("/api/pull", whole).bearer(&token)).await;
    assert_eq!((reply.status, reply.json()), (200, json!({ "status": "success" })));
    let named = Request::post("/api/pull", pull.clone()).bearer(&token).header("x-behavry-backend", "b");
    assert_eq!(house.send(named).await.status, 200);
    assert_eq!([a, b, c].map(|backend| pulls(backend).len()), [2, 1, 2]);

    // One that is down keeps the others from nothing, and the end says so.
    a.set_fault(Some(Fault::Refuses)).await.expect("set");
    let reply = house.send(Request::post("/api/pull", pull).bearer(&token).id("half")).await;
    let last: Value = serde_json::from_str(reply.lines().last().expect("a line")).expect("JSON");
    let error = last["error"].as_str().expect("an error").to_owned();
    assert!(error.starts_with("1 of 2 backends did not get the model: backend a: cannot be reached"), "{error}");
    assert_eq!(pulls(c).len(), 3);
    assert_eq!(house.final_of("half").await["extra"]["outcome"], "upstream_error");
}

#[tokio::test]
async fn models_come_from_the_registries_of_the_configuration_only() {
    let house = house("[models]\nregistries = [\"registry.ollama.ai\", \"HF.co\"]\n").await;
    let token = house.token_with(&[], ADMIN);
    let outside = "169.254.169.254/library/x";
    for (path, body) in [
        ("/api/pull", json!({ "model": outside })),
        ("/api/pull", json!({ "name": "http://localhost:11434/a/b", "insecure": true })),
        ("/api/push", json!({ "model": "evil.example/me/x" })),
        ("/api/create", json!({ "model": "x", "from": "evil.example/me/x" })),
    ] {
        let reply = house.send(Request::post(path, body).bearer(&token).id("no")).await;
        assert_eq!((reply.status, reply.code()), (403, "egress_denied".to_owned()), "{path}");
        assert!(reply.json()["detail"].as_str().is_some_and(|detail| detail.contains("models.registries")), "{path}");
    }
    assert!(house.simulator.seen().is_empty(), "no backend heard of it");
    for model in ["tiny", "library/tiny", "https://Registry.Ollama.AI/library/tiny", "hf.co/me/x"] {
        let reply = house.send(Request::post("/api/pull", json!({ "model": model })).bearer(&token)).await;
        assert_eq!(reply.status, 200, "{model}");
    }
    // What is here already may have any name.
    let copy = json!({ "source": "tiny", "destination": "evil.example/me/x" });
    assert_ne!(house.send(Request::post("/api/copy", copy).bearer(&token)).await.status, 403);
}

#[tokio::test]
async fn a_model_is_loaded_before_anybody_asks_for_it_wherever_it_is_and_again_once_it_was_unloaded() {
    let (a, b) = (holding(&["llama3.2", "tiny-embed"]).await, holding(&["mistral"]).await);
    let tables = tables([(a.url(), ""), (b.url(), "")]);
    let warm = "[[model]]\nname = \"Llama3.2:latest\"\nwarm = \"always\"\nnum_ctx = 2048\n[[model]]\nname = \"tiny-embed\"\nwarm = \"always\"\n";
    let config = format!("{tables}{warm}[catalogue]\nrefresh_s = 1\nloaded_s = 1\n");
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let of = |seen: &[behavry_ollama_proxy::simulator::Seen], target: &str| {
        let own = seen.iter().filter(|seen| seen.target == target && seen.header("x-request-id") == Some("warm"));
        own.map(|seen| seen.body.clone()).collect::<Vec<_>>()
    };
    // On a slow machine a model may be asked for twice before the look that shows it loaded.
    a.wait_for(PATIENCE, |seen| !of(seen, "/api/generate").is_empty() && !of(seen, "/api/embed").is_empty())
        .await
        .expect("both are loaded");
    let body: Value = serde_json::from_slice(&of(&a.seen(), "/api/generate")[0]).expect("JSON");
    let wanted = json!({ "model": "Llama3.2:latest", "keep_alive": -1, "options": { "num_ctx": 2048 } });
    assert_eq!(body, wanted, "with the settings that a client's request would get");
    let token = house.token();
    list_once(&house, "/api/ps", &token, |list| names(list).contains(&"llama3.2:latest".to_owned())).await;

    let before = of(&a.seen(), "/api/generate").len();
    let unload = json!({ "model": "llama3.2", "keep_alive": 0 });
    assert_eq!(house.post("/api/generate", unload).await.status, 200);
    a.wait_for(PATIENCE, |seen| of(seen, "/api/generate").len() > before).await.expect("it is loaded again");
    assert!(of(&b.seen(), "/api/generate").is_empty(), "where it is not it is not loaded");
    let counted = "behavry_ollama_model_warmups_total{model=\"llama3.2\",result=\"loaded\"}";
    wait_until_async("the load is counted", async || house.metrics().await.contains(counted).then_some(())).await;
}
