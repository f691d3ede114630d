//! The audit: what is written, when, and what happens when it cannot be written (contract, section 6; promises I3 and I4).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use behavry_ollama_proxy::simulator::{Ending, Fault, SimulatorOptions};
use ed25519_dalek::Signer;
use ed25519_dalek::pkcs8::DecodePrivateKey;
use serde_json::{Value, json};

use crate::client::{Connection, End, Reply, Request};
use crate::house::{House, PATIENCE, Plan, read_lines, read_records, segments, wait_until};
use crate::puppet::Puppet;

fn chat(model: &str) -> Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] })
}

fn whole(mut ask: Value) -> Value {
    ask["stream"] = false.into();
    ask
}

fn phases(records: &[Value]) -> Vec<&str> {
    records.iter().filter_map(|record| record["extra"]["phase"].as_str()).collect()
}

/// The members of a final record that say how it ended.
fn end_of(record: &Value) -> (Option<&str>, Option<&str>, Option<u64>) {
    (record["policy_result"].as_str(), record["extra"]["outcome"].as_str(), record["response_code"].as_u64())
}

#[tokio::test]
async fn every_kind_of_refusal_has_one_final_record_and_no_other() {
    let house = House::open().await;
    let token = house.token();
    let path = "/api/v1/ollama/api/chat";
    let twice = r#"{"model":"tiny-story","MODEL":"other","messages":[]}"#;
    let outsider = house.token_with(&["external"], &["web:read", "web:write"]);
    let reader = house.token_with(&[], &["web:read"]);
    let cases = [
        ("missing-token", Request::post(path, chat("tiny-story")), 401, "missing_token"),
        ("bad-token", Request::post(path, chat("tiny-story")).bearer("a.b.c"), 401, ""),
        ("no-permission", Request::post(path, chat("tiny-story")).bearer(&reader), 403, "missing permission web:write"),
        ("denied", Request::post(path, chat("tiny-story")).bearer(&outsider), 403, "policy_denied"),
        ("ambiguous", Request::new("POST", path).body(twice).bearer(&token), 400, ""),
        ("no-json", Request::new("POST", path).body("{").bearer(&token), 400, ""),
        ("cloud", Request::post(path, chat("gpt-oss:120b-cloud")).bearer(&token), 403, ""),
        ("unknown-route", Request::get("/nowhere").bearer(&token), 404, "unknown_route"),
        ("wrong-method", Request::get(path).bearer(&token), 405, "method_not_allowed"),
        ("unsupported", Request::post("/v1/audio/speech", json!({})).bearer(&token), 400, "unsupported_operation"),
        ("egress", Request::get("/api/me").bearer(&token), 403, ""),
        ("encoded", Request::post(path, chat("tiny")).bearer(&token).header("content-encoding", "gzip"), 415, ""),
        (
            "manage",
            Request::post("/api/pull", json!({ "model": "x" })).bearer(&token),
            403,
            "missing permission ollama:admin",
        ),
        (
            "wrong-secret",
            Request::post(
                "/api/v1/auth/token",
                json!({ "client_id": "demo", "client_secret": "no", "grant_type": "client_credentials" }),
            ),
            401,
            "invalid_client",
        ),
        (
            "wrong-grant",
            Request::post("/api/v1/auth/token", json!({ "client_id": "demo", "grant_type": "password" })),
            400,
            "",
        ),
    ];
    for (name, request, status, cause) in cases {
        let reply = house.send(request.id(name)).await;
        assert_eq!(reply.status, status, "{name}");
        assert_eq!(reply.header("x-request-id"), Some(name));
        let records = house.records_of(name).await;
        assert_eq!(phases(&records), ["final"], "{name}");
        let last = &records[0];
        assert_eq!(end_of(last), (Some("deny"), Some("refused"), Some(status.into())), "{name}");
        let error = last["error"].as_str().unwrap_or_else(|| panic!("{name}: no cause"));
        assert!(!error.is_empty() && (cause.is_empty() || error == cause), "{name}: {error}");
        assert_eq!(last["policy_id"].is_null(), name != "denied", "{name}: a policy's id where it was asked");
        assert_eq!(
            last["agent_id"].is_null(),
            !["no-permission", "denied", "ambiguous", "no-json", "cloud", "unsupported", "egress", "encoded", "manage"]
                .contains(&name),
            "{name}: the agent, where it is known"
        );
        for unknown in ["input_tokens", "output_tokens", "upstream_status", "backend", "retries", "finish_reason"] {
            assert!(last["extra"][unknown].is_null(), "{name}: {unknown} is unknown, so null");
        }
    }
    assert_eq!(house.simulator.connections(), 0, "a refused request opens no connection");
}

#[tokio::test]
async fn every_kind_of_reply_of_a_backend_has_its_records() {
    // Long enough for a head to come before it.
    let silent = House::with(Plan { config: "[backend_timeouts]\nsilence_s = 5".into(), ..Plan::default() }).await;
    let patient = House::open().await;
    let token = patient.token();
    let path = "/api/chat";
    let served = ["request", "final"].as_slice();
    let streamed = ["request", "stream_start", "final"].as_slice();
    let cases = [
        ("streamed", chat("tiny-story"), streamed, "complete", Some(200), Some(17)),
        ("whole", whole(chat("tiny-story")), served, "complete", Some(200), Some(17)),
        ("not-pulled", chat("nobody-has-this"), served, "complete", Some(404), None),
        ("busy", chat("fault-503-queue-full"), served, "upstream_error", Some(503), None),
        ("stopped", chat("fault-500-error"), served, "upstream_error", Some(500), None),
        ("hangs", chat("fault-hangs-before-headers"), served, "timeout", Some(504), None),
        ("garbage", chat("fault-garbage-head"), served, "upstream_error", Some(502), None),
        ("resets", chat("fault-resets-mid-stream"), streamed, "upstream_reset", Some(200), None),
        ("stalls", chat("fault-stalls-mid-stream"), streamed, "timeout", Some(200), None),
        ("endless", chat("fault-no-terminal"), streamed, "upstream_error", Some(200), None),
        ("redirects", chat("fault-redirect"), served, "upstream_error", Some(502), None),
        ("a-page", chat("fault-html"), served, "upstream_error", Some(502), None),
    ];
    for (name, ask, wanted, outcome, status, output) in cases {
        let house = if outcome == "timeout" { &silent } else { &patient };
        let reply = house.send(Request::post(path, ask).bearer(&token).id(name)).await;
        assert_eq!(Some(u64::from(reply.status)), status, "{name}");
        let records = house.records_of(name).await;
        assert_eq!(phases(&records), wanted, "{name}");
        let last = records.last().expect("some");
        assert_eq!(end_of(last), (Some("allow"), Some(outcome), status), "{name}");
        assert_eq!(last["extra"]["output_tokens"].as_u64(), output, "{name}: counts are right or null");
        assert_eq!(last["error"].is_null(), outcome == "complete", "{name}");
        assert_eq!(records[0]["response_code"], Value::Null, "{name}: nothing is known of the reply yet");
        assert!(records[0]["extra"]["outcome"].is_null());
        if wanted.len() == 3 {
            assert_eq!(records[1]["response_code"], 200, "{name}: the stream's start has the upstream's status");
            assert_eq!(records[1]["extra"]["upstream_status"], 200);
        }
    }
    let house = patient;
    let reply = house.send(Request::get("/api/tags").bearer(&token).id("list")).await;
    assert_eq!(reply.status, 200);
    let records = house.records_of("list").await;
    assert_eq!(phases(&records), served);
    assert_eq!(end_of(&records[1]), (Some("allow"), Some("complete"), Some(200)));

    house.simulator.set_fault(Some(Fault::Refuses)).await.expect("closed");
    for (name, request) in
        [("down", Request::post(path, chat("tiny-story"))), ("down-list", Request::get("/v1/models"))]
    {
        let reply = house.send(request.bearer(&token).id(name)).await;
        assert_eq!((reply.status, reply.code()), (502, "backend_unreachable".to_owned()), "{name}");
        let records = house.records_of(name).await;
        assert_eq!(phases(&records), served, "{name}");
        assert_eq!(end_of(&records[1]), (Some("allow"), Some("upstream_error"), Some(502)), "{name}");
        assert!(records[1]["extra"]["upstream_status"].is_null(), "{name}");
    }
}

#[tokio::test]
async fn a_list_of_which_nothing_may_be_seen_is_refused_with_one_final_record() {
    let nothing = "package behavry.authz\ndeny contains \"nothing here\" if input.agent.id == \"tester\"\n";
    let house = House::with(Plan { policy: vec![("authz.rego", nothing.into())], ..Plan::default() }).await;
    for (name, path) in [("tags", "/api/tags"), ("ps", "/api/ps"), ("models", "/v1/models")] {
        let reply = house.send(Request::get(path).bearer(&house.token()).id(name)).await;
        assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()), "{name}");
        let last = house.final_of(name).await;
        assert_eq!(end_of(&last), (Some("deny"), Some("refused"), Some(403)), "{name}");
        assert!(last["policy_id"].is_string() && last["policy_reason"] == "nothing here", "{name}");
    }
}

#[tokio::test]
async fn a_token_that_was_given_is_recorded_under_its_agent() {
    let house = House::open().await;
    let (id, secret) = house.first_agent();
    let ask = json!({ "client_id": id, "client_secret": secret, "grant_type": "client_credentials" });
    let reply = house.send(Request::post("/api/v1/auth/token", ask).id("granted")).await;
    assert_eq!(reply.status, 200);
    let token = reply.json()["access_token"].as_str().expect("a token").to_owned();
    let records = house.records_of("granted").await;
    assert_eq!(phases(&records), ["final"]);
    assert_eq!(end_of(&records[0]), (Some("allow"), Some("complete"), Some(200)));
    assert_eq!(records[0]["agent_id"], *id);
    assert_eq!(records[0]["target"], "/api/v1/auth/token");
    assert_eq!(house.send(Request::get("/api/version").bearer(&token)).await.status, 200);
}

#[tokio::test]
async fn a_client_that_leaves_is_recorded_as_such_at_every_stage_and_its_counts_are_unknown() {
    let house = House::open().await;
    let token = house.token();
    let ask = |model: &str, id: &str| Request::post("/api/chat", chat(model)).bearer(&token).id(id);

    let mut before = Connection::open(house.public).await;
    before.send(&ask("fault-hangs-before-headers", "before-the-reply")).await;
    seen(&house, "before-the-reply").await;
    drop(before);
    let last = house.final_of("before-the-reply").await;
    assert_eq!(end_of(&last), (Some("allow"), Some("client_abort"), None));
    assert!(last["extra"]["upstream_status"].is_null() && last["extra"]["ttft_ms"].is_null());

    let mut during = Connection::open(house.public).await;
    during.send(&ask("fault-stalls-mid-stream", "in-the-stream")).await;
    during.head().await.expect("a head");
    during.chunk().await.expect("a chunk").expect("whole");
    drop(during);
    let last = house.final_of("in-the-stream").await;
    assert_eq!(end_of(&last), (Some("allow"), Some("client_abort"), Some(200)));
    for unknown in ["input_tokens", "output_tokens", "finish_reason"] {
        assert!(last["extra"][unknown].is_null(), "{unknown}");
    }

    let request = ask("tiny-story", "in-the-body");
    let mut uploading = Connection::open(house.public).await;
    uploading.write(&request.head_bytes()).await;
    uploading.write(&request.body_bytes()[..10]).await;
    drop(uploading);
    let last = house.final_of("in-the-body").await;
    assert_eq!(last["extra"]["outcome"], "client_abort", "it left before it had said what it wanted");
    assert_eq!(last["policy_result"], "deny", "no policy was asked");

    let mut listing = Connection::open(house.public).await;
    house.simulator.set_fault_everywhere(Fault::HangsBeforeHeaders).await.expect("set");
    listing.send(&Request::get("/api/tags").bearer(&token).id("in-a-list")).await;
    seen(&house, "in-a-list").await;
    drop(listing);
    let last = house.final_of("in-a-list").await;
    assert_eq!(end_of(&last), (Some("allow"), Some("client_abort"), None));
    let seen = house
        .simulator
        .wait_for(PATIENCE, |all| {
            all.iter().filter(|one| one.method != "GET" || one.target == "/api/tags").all(|one| one.ended.is_some())
        })
        .await
        .expect("all end");
    assert!(seen.iter().all(|one| one.ended_how == Some(Ending::ClientGone)), "nothing runs for nobody: {seen:?}");
}

/// Waits until the backend has read the request with this id.
async fn seen(house: &House, id: &str) {
    let found =
        |all: &[behavry_ollama_proxy::simulator::Seen]| all.iter().any(|one| one.header("x-request-id") == Some(id));
    house.simulator.wait_for(PATIENCE, found).await.expect("it reaches the backend");
}

#[tokio::test]
async fn the_request_record_is_in_the_file_when_the_backend_sees_the_request() {
    let house = House::open().await;
    house.simulator.set_fault_everywhere(Fault::HangsBeforeHeaders).await.expect("set");
    let token = house.token();
    let mut connections = Vec::new();
    for n in 0..24 {
        let id = format!("asked-{n}");
        let request = match n % 4 {
            0 => Request::post("/api/chat", chat("tiny-story")),
            1 => Request::post("/v1/chat/completions", chat("tiny-story")),
            2 => Request::get("/api/tags"),
            _ => Request::get("/api/version"),
        };
        let mut connection = Connection::open(house.public).await;
        connection.send(&request.bearer(&token).id(&id)).await;
        connections.push(connection);
        let all = house.simulator.wait_for(PATIENCE, |all| all.len() == n + 1).await.expect("it arrives");
        let records = house.records();
        for one in all {
            let id = one.header("x-request-id").expect("the proxy names each request");
            let of = records.iter().filter(|record| record["extra"]["request_id"] == *id);
            assert_eq!(of.filter(|record| record["extra"]["phase"] == "request").count(), 1, "{id}");
        }
    }
}

/// Puts something in the place of the audit's folder that takes no files.
fn break_folder(dir: &Path) {
    std::fs::rename(dir, dir.with_extension("aside")).expect("moved away");
    std::fs::write(dir, "not a folder").expect("written");
}

fn mend_folder(dir: &Path) {
    std::fs::remove_file(dir).expect("removed");
    std::fs::rename(dir.with_extension("aside"), dir).expect("moved back");
}

async fn until_ready(house: &House, status: u16) {
    let began = std::time::Instant::now();
    while Request::get("/readyz").send(house.operator).await.status != status {
        assert!(began.elapsed() < PATIENCE, "/readyz did not become {status}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn without_an_audit_sink_nothing_is_served_and_service_resumes_by_itself() {
    let house = House::open().await;
    let (token, dir) = (house.token(), house.audit_dir());
    break_folder(&dir);
    until_ready(&house, 503).await;
    let requests = [
        Request::post("/api/chat", chat("tiny-story")),
        Request::post("/v1/chat/completions", chat("tiny-story")),
        Request::get("/api/tags"),
        Request::get("/v1/models"),
        Request::get("/api/version"),
        Request::post("/api/show", json!({ "model": "tiny-story" })),
    ];
    for request in &requests {
        let reply = house.send(request.clone().bearer(&token)).await;
        assert_eq!((reply.status, reply.code()), (503, "audit_unavailable".to_owned()), "{}", request.path);
        assert!(reply.header("retry-after").is_some());
    }
    assert_eq!(house.simulator.connections(), 0, "no backend is contacted");
    assert_eq!(Request::get("/readyz").send(house.operator).await.status, 503);
    assert_eq!(Request::get("/livez").send(house.operator).await.status, 200);
    assert!(house.metrics().await.contains("behavry_ollama_audit_failing 1"));

    mend_folder(&dir);
    until_ready(&house, 200).await;
    for request in &requests {
        assert_eq!(house.send(request.clone().bearer(&token)).await.status, 200, "{}", request.path);
    }
    let kept = wait_until("what was kept in memory", || {
        let records = read_records(&dir);
        let finals = records.iter().filter(|record| record["extra"]["phase"] == "final").count();
        (finals == 2 * requests.len()).then_some(records)
    })
    .await;
    let refused = kept.iter().filter(|record| record["error"] == "the audit cannot be written").count();
    assert_eq!(refused, requests.len(), "the refusals of the meantime are on record");
}

#[tokio::test]
async fn a_stream_that_runs_when_the_disk_fills_is_finished_and_recorded_later() {
    let backend = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(backend.url()), ..Plan::default() }).await;
    let (token, dir) = (house.token(), house.audit_dir());
    let mut connection = Connection::open(house.public).await;
    connection.send(&Request::post("/api/chat", chat("tiny-story")).bearer(&token).id("running")).await;
    let mut hand = backend.asked().await;
    let first = r#"{"model":"tiny-story","message":{"role":"assistant","content":"a"},"done":false}"#;
    let last = r#"{"model":"tiny-story","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","prompt_eval_count":3,"eval_count":2}"#;
    hand.try_say(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n").await;
    hand.try_say(format!("{:x}\r\n{first}\n\r\n", first.len() + 1).as_bytes()).await;
    connection.head().await.expect("a head");
    connection.chunk().await.expect("a chunk").expect("whole");

    break_folder(&dir);
    // Until the proxy has noticed: requests that are let through in between go to the backend and are hung up on.
    let refused = loop {
        let mut other = Connection::open(house.public).await;
        other.send(&Request::post("/api/chat", chat("tiny-story")).bearer(&token)).await;
        tokio::select! {
            reply = other.reply(false) => break reply.expect("a reply"),
            _ = backend.asked() => {}
        }
    };
    assert_eq!((refused.status, refused.code()), (503, "audit_unavailable".to_owned()));

    hand.try_say(format!("{:x}\r\n{last}\n\r\n0\r\n\r\n", last.len() + 1).as_bytes()).await;
    let chunk = connection.chunk().await.expect("a chunk").expect("whole");
    assert_eq!(String::from_utf8_lossy(&chunk).trim_end(), last);
    assert!(connection.chunk().await.is_none(), "a clean end");

    mend_folder(&dir);
    until_ready(&house, 200).await;
    let all = wait_until("the final record", || {
        let mut records = read_records(&dir);
        records.retain(|record| record["extra"]["request_id"] == "running");
        (phases(&records).last() == Some(&"final")).then_some(records)
    })
    .await;
    assert_eq!(phases(&all), ["request", "stream_start", "final"]);
    assert_eq!(end_of(&all[2]), (Some("allow"), Some("complete"), Some(200)));
    assert_eq!(all[2]["extra"]["output_tokens"], 2);
}

#[tokio::test]
async fn records_are_on_standard_output_too() {
    let house = House::open().await;
    house.post("/api/chat", chat("tiny-story")).await;
    house.send(Request::get("/nowhere").id("last")).await;
    house.final_of("last").await;
    let text = house.audit_text();
    let records: Vec<&str> = text.lines().filter(|line| line.contains("\"request_id\":\"")).collect();
    wait_until("the copies", || {
        let log = house.log();
        let copies: HashSet<&str> = log.lines().collect();
        records.iter().all(|line| copies.contains(line)).then_some(())
    })
    .await;
    assert_eq!(records.len(), 4);
}

#[tokio::test]
async fn the_two_styles_give_equal_records_for_equal_exchanges() {
    let house = House::open().await;
    let token = house.token();
    let hi = json!([{ "role": "user", "content": "hi" }]);
    let with_system = json!([{ "role": "system", "content": "be brief" }, { "role": "user", "content": "hi" }]);
    let tools = json!([{ "type": "function", "function": { "name": "get_weather", "description": "d",
        "parameters": { "type": "object", "properties": { "city": { "type": "string" } } } } }]);
    let (chat, completions) = ("/api/chat", "/v1/chat/completions");
    let mut pairs = Vec::new();
    for stream in [true, false] {
        let usage = json!({ "include_usage": true });
        let pair = |native: (&'static str, Value), openai: (&'static str, Value)| {
            let ([mut a, mut b], paths) = ([native.1, openai.1], [native.0, openai.0]);
            a["stream"] = stream.into();
            b["stream"] = stream.into();
            if stream {
                b["stream_options"] = usage.clone();
            }
            ([a, b], paths)
        };
        let model = "tiny-story";
        pairs.push((
            "plain",
            pair(
                (chat, json!({ "model": model, "messages": hi })),
                (completions, json!({ "model": model, "messages": hi })),
            ),
        ));
        pairs.push((
            "system",
            pair(
                (chat, json!({ "model": model, "messages": with_system })),
                (completions, json!({ "model": model, "messages": with_system })),
            ),
        ));
        pairs.push((
            "tools",
            pair(
                (chat, json!({ "model": "tiny-tools", "messages": hi, "tools": tools })),
                (completions, json!({ "model": "tiny-tools", "messages": hi, "tools": tools })),
            ),
        ));
        pairs.push((
            "length",
            pair(
                (chat, json!({ "model": model, "messages": hi, "options": { "num_predict": 4 } })),
                (completions, json!({ "model": model, "messages": hi, "max_tokens": 4 })),
            ),
        ));
        pairs.push((
            "spelling",
            pair(
                (chat, json!({ "model": "Tiny-Story:LATEST", "messages": hi })),
                (completions, json!({ "model": "Tiny-Story:LATEST", "messages": hi })),
            ),
        ));
        pairs.push((
            "generate",
            pair(
                ("/api/generate", json!({ "model": model, "prompt": "hi" })),
                ("/v1/completions", json!({ "model": model, "prompt": "hi" })),
            ),
        ));
        pairs.push((
            "not-there",
            pair(
                (chat, json!({ "model": "nobody-has-this", "messages": hi })),
                (completions, json!({ "model": "nobody-has-this", "messages": hi })),
            ),
        ));
    }
    for input in [json!("one"), json!(["one", "two"])] {
        pairs.push((
            "embed",
            (
                [json!({ "model": "tiny-embed", "input": input }), json!({ "model": "tiny-embed", "input": input })],
                ["/api/embed", "/v1/embeddings"],
            ),
        ));
    }
    for (n, (name, (bodies, paths))) in pairs.into_iter().enumerate() {
        let mut sides = Vec::new();
        for (side, (body, path)) in bodies.into_iter().zip(paths).enumerate() {
            let id = format!("{name}-{n}-{side}");
            let reply = house.send(Request::post(path, body).bearer(&token).id(&id)).await;
            assert!([200, 404].contains(&reply.status), "{id}: {}", reply.status);
            let mut records = house.records_of(&id).await;
            records.iter_mut().for_each(|record| take_differences(record, name == "tools"));
            sides.push(records);
        }
        assert_eq!(phases(&sides[0]), phases(&sides[1]), "{name}-{n}");
        for (native, openai) in sides[0].iter().zip(&sides[1]) {
            assert_eq!(native, openai, "{name}-{n}");
        }
        let last = sides[0].last().expect("some");
        if name != "not-there" {
            assert!(last["extra"]["input_tokens"].as_u64() > Some(0), "{name}-{n}: equal, and not for being null");
        }
    }
}

/// What may differ between the styles (contract, section 6): ids, times, bytes, dialect, target, filters, and the finish
/// reason of a tool call.
fn take_differences(record: &mut Value, tool_call: bool) {
    for column in ["id", "timestamp", "latency_ms", "target", "previous_hash", "event_hash"] {
        record[column].take();
    }
    let mut members = vec!["request_id", "ttft_ms", "bytes_in", "bytes_out", "dialect", "filters"];
    if tool_call {
        members.push("finish_reason");
    }
    for member in members {
        record["extra"][member].take();
    }
}

/// Signs whatever it is given, as a careless issuer with our key would.
fn sign(claims: Value) -> String {
    let pem = include_str!("../fixtures/keys/ed25519.private.pem");
    let key = ed25519_dalek::SigningKey::from_pkcs8_pem(pem).expect("a good key");
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(json!({ "alg": "EdDSA", "typ": "JWT" })), part(claims));
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()).to_bytes()))
}

fn claims(sub: &str, roles: &[&str]) -> Value {
    let now_s = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    json!({ "sub": sub, "jti": "session-1", "iss": "behavry", "iat": now_s, "exp": now_s + 600, "roles": roles,
        "permissions": ["web:read", "web:write"] })
}

#[tokio::test]
async fn names_with_newlines_escapes_and_separators_come_out_as_one_plain_line_each() {
    let config = "[audit]\nrefusals_per_second = 100000".into();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let nasty =
        ["a\nb", "a\r\n{\"id\":1}", "\u{1b}[31mred\u{1b}[0m", "a\u{2028}b", "\u{9b}2J", "\u{202e}cba", "\0", "\"\\"];
    let mut asked = 0;
    for (n, name) in nasty.iter().enumerate() {
        for (kind, request) in [
            ("model", Request::post("/api/chat", chat(name)).bearer(&house.token())),
            ("agent", Request::post("/api/chat", chat("tiny-story")).bearer(&sign(claims(name, &[])))),
            ("role", Request::post("/api/chat", chat("tiny-story")).bearer(&sign(claims("a", &[name])))),
        ] {
            let reply = house.send(request.id(&format!("{kind}-{n}"))).await;
            assert!(reply.status < 500, "{kind} {n}: {}", reply.status);
            house.final_of(&format!("{kind}-{n}")).await;
            asked += 1;
        }
    }
    for query in ["a=%0A%1b[31m", "a=%E2%80%A8&b"] {
        let reply = house.send(Request::get(&format!("/api/version?{query}")).bearer(&house.token())).await;
        assert_eq!(reply.status, 200);
        asked += 1;
    }
    for path in ["/a%0Ab", "/%1b[31m", "/a%E2%80%A8b", "/a%00"] {
        assert_eq!(house.send(Request::get(path)).await.status, 404);
        asked += 1;
    }
    // Request ids that are no ids are replaced; some cannot even be sent in a head.
    for id in ["caf\u{e9}", "two words", "\u{2028}", &"x".repeat(129), ""] {
        let reply = house.send(Request::get("/api/version").bearer(&house.token()).id(id)).await;
        assert_eq!(reply.status, 200);
        let ours = reply.header("x-request-id").expect("always");
        assert!(ours != id && ours.len() == 32 && ours.bytes().all(|byte| byte.is_ascii_hexdigit()), "{ours}");
        house.final_of(ours).await;
        asked += 1;
    }
    let text = wait_until("all finals", || {
        let text = house.audit_text().into_bytes();
        let finals = text.split(|byte| *byte == b'\n').filter(|line| is_final(line)).count();
        (finals >= asked).then_some(text)
    })
    .await;
    assert!(text.iter().all(|byte| matches!(byte, b'\n' | 0x20..=0x7e)), "printable ASCII, and newlines between lines");
    let mut lines = 0;
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let record: Value = serde_json::from_slice(line).expect("one valid JSON line each");
        assert!(record["id"].is_string() && record["extra"].is_object());
        assert!(!record.to_string().contains("%E2%80%A8&b"), "no query is recorded");
        lines += usize::from(is_final(line));
    }
    assert_eq!(lines, asked, "one final for each");
}

fn is_final(line: &[u8]) -> bool {
    line.windows(15).any(|window| window == br#""phase":"final""#)
}

#[tokio::test]
async fn a_burst_of_strangers_is_folded_into_few_records_and_each_is_counted() {
    const BURST: u64 = 300;
    let house = House::with(Plan { config: "[audit]\nrefusals_per_second = 3".into(), ..Plan::default() }).await;
    let mut connection = Connection::open(house.public).await;
    for n in 0..BURST {
        let request = Request::get("/api/version").bearer(&format!("not.a.token{n}"));
        connection.send(&request).await;
        assert_eq!(connection.reply(false).await.expect("a reply").status, 401);
    }
    let (singles, folded) = wait_until("each refusal, by itself or counted", || {
        let records = house.records();
        let (folded, singles): (Vec<_>, Vec<_>) =
            records.iter().filter_map(|record| record["error"].as_str()).partition(|error| error.contains("folded"));
        let counted: u64 = folded.iter().filter_map(|error| error.split(' ').next()?.parse::<u64>().ok()).sum();
        (singles.len() as u64 + counted == BURST).then_some((singles.len(), folded.len()))
    })
    .await;
    assert!(folded > 0 && singles >= 3, "{singles} single, {folded} folded");
    // Three a second, however long this machine took for the burst.
    assert!(singles <= 3 * (folded + 2), "{singles} single, {folded} folded");
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_flood_of_token_requests_keeps_nobody_with_a_token_waiting_and_each_is_answered() {
    const FLOOD: usize = 400;
    let config = "[limits]\nin_flight = 300".into();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let ask = json!({ "client_id": "demo-agent", "client_secret": "no", "grant_type": "password" });
    let request = Request::post("/api/v1/auth/token", ask);
    let mut flood = Vec::new();
    for _ in 0..FLOOD {
        let mut connection = Connection::open(house.public).await;
        connection.write(&request.head_bytes()).await; // and the body later: each holds its place
        flood.push(connection);
    }
    let reply = house.post("/api/chat", whole(chat("tiny-story"))).await;
    assert_eq!(reply.status, 200, "the service goes on");
    let mut told = BTreeMap::<u16, usize>::new();
    for connection in &mut flood {
        let _ = connection.stream.try_write(&request.body_bytes());
    }
    for connection in &mut flood {
        let reply = connection.reply(false).await.expect("each is answered");
        if reply.status == 429 {
            assert!(reply.header("retry-after").is_some());
        }
        *told.entry(reply.status).or_default() += 1;
    }
    // Later ones may find the place of one that is done, or whose body took too long.
    assert_eq!(told.values().sum::<usize>(), FLOOD);
    assert!(told.keys().all(|status| [400, 408, 429].contains(status)), "{told:?}");
    assert!(told.get(&429).is_some_and(|count| *count > 0), "an address has its share of the places: {told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_a_mixed_load_with_aborts_each_request_has_exactly_one_final_record() {
    const REQUESTS: usize = 320;
    let config = "[audit]\nrefusals_per_second = 100000".into();
    let simulator = SimulatorOptions { tokens_per_second: 2000.0, ..SimulatorOptions::for_tests() };
    let house = std::sync::Arc::new(House::with(Plan { config, simulator, ..Plan::default() }).await);
    let (token, outsider) = (house.token(), house.token_with(&["external"], &["web:read", "web:write"]));
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..16 {
        let (house, token, outsider) = (house.clone(), token.clone(), outsider.clone());
        tasks.spawn(async move {
            for n in (worker..REQUESTS).step_by(16) {
                one_of_many(&house, n, &token, &outsider).await;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no worker fails");
    }
    let records = wait_until("every final record", || {
        let records = house.records();
        let finals = records.iter().filter(|record| record["extra"]["phase"] == "final").count();
        (finals >= REQUESTS).then_some(records)
    })
    .await;
    let mut by_id: HashMap<&str, BTreeMap<&str, usize>> = HashMap::new();
    for record in &records {
        let id = record["extra"]["request_id"].as_str().expect("each has its own id");
        let phase = record["extra"]["phase"].as_str().expect("a phase");
        *by_id.entry(id).or_default().entry(phase).or_default() += 1;
    }
    assert_eq!(by_id.len(), REQUESTS);
    assert!(by_id.values().all(|phases| phases["final"] == 1), "exactly one");
    let mut at_backend = HashSet::new();
    for one in house.simulator.seen() {
        let id = one.header("x-request-id").expect("each has one").to_owned();
        assert_eq!(by_id[id.as_str()].get("request"), Some(&1), "{id}");
        assert!(at_backend.insert(id), "one accepted request is one request at the backend");
    }
    assert!(at_backend.len() > REQUESTS / 2);
    for (id, phases) in &by_id {
        if !phases.contains_key("request") {
            assert!(!at_backend.contains(*id), "{id} was never allowed");
        }
    }
    wait_for_gauge(&house, "behavry_ollama_requests_in_flight 0").await;
}

async fn wait_for_gauge(house: &House, line: &str) {
    let began = std::time::Instant::now();
    while !house.metrics().await.lines().any(|found| found == line) {
        assert!(
            began.elapsed() < PATIENCE,
            "{line} did not come, but {:?}",
            house.metrics().await.lines().find(|l| l.starts_with("behavry_ollama_requests_in_flight"))
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn one_of_many(house: &House, n: usize, token: &str, outsider: &str) {
    let id = format!("load-{n}");
    let mut connection = Connection::open(house.public).await;
    let request = match n % 10 {
        0 => Request::post("/api/chat", chat("llama3.2")),
        1 => Request::post(
            "/v1/chat/completions",
            json!({ "model": "llama3.2", "stream": true,
            "messages": [{ "role": "user", "content": "hi" }] }),
        ),
        2 => Request::post("/api/generate", json!({ "model": "mistral", "prompt": "hi", "stream": false })),
        3 => Request::get("/api/tags"),
        4 => Request::post("/api/chat", chat("fault-resets-mid-stream")),
        5 => Request::post("/api/chat", chat("fault-stalls-mid-stream")),
        6 => Request::post("/api/chat", chat("fault-hangs-before-headers")),
        7 => Request::post("/api/chat", chat("llama3.2")),
        8 => Request::new("POST", "/api/chat").body(r#"{"model":"a","Model":"b"}"#),
        _ => Request::post("/api/embed", json!({ "model": "tiny-embed", "input": "x" })).chunked(7),
    };
    let request = request.bearer(if n % 10 == 7 { outsider } else { token }).id(&id);
    connection.send(&request).await;
    match n % 10 {
        5 => {
            connection.head().await.expect("a head");
            connection.chunk().await.expect("a chunk").expect("whole");
        }
        6 => seen(house, &id).await,
        0 if n.is_multiple_of(20) => {
            connection.head().await.expect("a head"); // and away, in mid-stream or at its end
        }
        _ => {
            connection.reply(false).await.expect("a reply");
        }
    }
}

#[tokio::test]
async fn a_shutdown_while_a_backend_hangs_settles_every_request() {
    let mut house = House::with(Plan { config: "[shutdown]\ndrain_s = 1".into(), ..Plan::default() }).await;
    house.simulator.set_fault_everywhere(Fault::HangsBeforeHeaders).await.expect("set");
    let token = house.token();
    let uploading = Request::post("/api/chat", chat("tiny-story")).bearer(&token).id("uploading");
    let mut open = Vec::new();
    for request in [
        Request::post("/api/chat", chat("tiny-story")).bearer(&token).id("chat"),
        Request::get("/api/tags").bearer(&token).id("list"),
    ] {
        let mut connection = Connection::open(house.public).await;
        connection.send(&request).await;
        seen(&house, &request.headers.last().expect("its id").1).await;
        open.push(connection);
    }
    let mut connection = Connection::open(house.public).await;
    connection.write(&uploading.head_bytes()).await;
    open.push(connection);
    wait_for_gauge(&house, "behavry_ollama_requests_in_flight 3").await;

    house.signal(libc::SIGTERM);
    for (connection, id) in open.iter_mut().zip(["chat", "list", "uploading"]) {
        let reply: Reply = connection.reply(false).await.unwrap_or_else(|| panic!("{id}: an answer"));
        assert_eq!((reply.status, reply.end), (503, End::Whole), "{id}");
    }
    assert!(house.exit().await.success());
    for id in ["chat", "list", "uploading"] {
        let last = house.final_of(id).await;
        assert_eq!(last["extra"]["outcome"], "shutdown", "{id}");
    }
}

#[tokio::test]
async fn a_file_that_is_renamed_or_removed_is_made_anew_and_nothing_is_lost_unseen() {
    let house = House::open().await;
    let (token, dir) = (house.token(), house.audit_dir());
    let current = || segments(&dir).pop().expect("a segment");
    house.send(Request::get("/api/version").bearer(&token).id("first")).await;
    house.final_of("first").await;
    let (file, old) = (current(), dir.join("old.1"));
    std::fs::rename(&file, &old).expect("rotated");
    wait_until("a new file", || segments(&dir).pop()).await;
    house.send(Request::get("/api/version").bearer(&token).id("second")).await;
    house.final_of("second").await;
    let lines = read_lines(&old);
    assert_eq!(lines.last().expect("lines")["extra"]["reason"], "renamed");
    assert!(lines.iter().all(|line| line["extra"]["request_id"] != "second"));
    let first = read_lines(&current()).swap_remove(0);
    assert_eq!(first["previous_hash"], lines.last().expect("lines")["event_hash"], "the chain goes on");
    std::fs::remove_file(current()).expect("removed");
    wait_until("a new file", || segments(&dir).pop()).await;
    assert_eq!(house.send(Request::get("/api/version").bearer(&token).id("third")).await.status, 200);
    house.final_of("third").await;
}
