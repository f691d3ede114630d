//! No prompt, no reply and no credential in anything that is kept or shown: log at every level, audit, metrics, refusals
//! (promise I5). Each place of a request and of a reply carries a mark of its own; none may turn up where it does not belong.
//!
//! What the contract records by name may: the model, the client's request id, the agent's id, session and roles, and the path
//! of an unknown route (the audit's `target`; never the log or a metric).

use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use behavry_ollama_proxy::identity::issuer::Claims;
use behavry_ollama_proxy::simulator::Fault;
use serde_json::{Value, json};

use crate::client::{Connection, Reply, Request};
use crate::h2_client::H2;
use crate::house::{House, Plan};
use crate::kept::{Kept, control};
use crate::puppet::Puppet;

/// Begins every mark. Nothing else holds it, whatever its case.
const MARK: &str = "canary";

/// As loud as it goes. Longer targets would win over shorter ones that are switched off.
const LOUD: &str = "trace,pingora_proxy::proxy_h1=trace,pingora_proxy::proxy_trait=trace,pingora_core::protocols=trace,\
    pingora_core::protocols::http=trace,pingora_core::protocols::http::v1=trace,\
    pingora_core::protocols::http::v1::server=trace,pingora_core::protocols::http::v1::client=trace,\
    pingora_core::protocols::http::v1::body=trace,pingora_core::protocols::http::v2::server=trace,\
    h2::codec::framed_read=trace,h2::codec::framed_write=trace,h2::proto=trace,h2::server=trace,rustls::client=trace,\
    jsonwebtoken::decoding=trace,regorus::engine=trace,httparse=trace,tokio=trace,mio=trace";

async fn loud_house(plan: Plan) -> House {
    let mut plan = plan;
    plan.env.push(("RUST_LOG".to_owned(), LOUD.to_owned()));
    plan.config.push_str("\n[audit]\nrefusals_per_second = 100000\n");
    House::with(plan).await
}

/// The lines with a mark among what was kept and shown, and among these replies.
async fn spilled(house: &House, replies: &[Vec<u8>]) -> Vec<String> {
    house.send(Request::get("/api/version").bearer(&house.token()).id("the-last-one")).await;
    let mut kept = Kept::of(house, "the-last-one").await;
    for reply in replies {
        kept.add("a reply", String::from_utf8_lossy(reply).into_owned());
    }
    kept.find(&[MARK])
}

/// Everything of a reply that a client reads.
fn bytes_of(reply: &Reply) -> Vec<u8> {
    let mut bytes = reply.body.clone();
    for (name, value) in &reply.headers {
        bytes.extend_from_slice(format!("\n{name}: {value}").as_bytes());
    }
    bytes
}

/// A chat with a mark in every place that a caller fills.
fn marked_chat(model: &str) -> Value {
    json!({
        "model": model,
        "messages": [
            { "role": "system", "content": "canary-system" },
            { "role": "user", "content": "canary-content", "images": ["Y2FuYXJ5LWltYWdl"], "canary-member": "canary-value" },
            { "role": "assistant", "content": "canary-answer", "thinking": "canary-thought",
              "tool_calls": [{ "function": { "name": "canary-call", "arguments": { "canary-argument": "canary-value" } } }] },
            { "role": "tool", "content": "canary-result", "tool_name": "canary-tool-name" },
        ],
        "tools": [{ "type": "function", "function": { "name": "canary-tool", "description": "canary-description",
            "parameters": { "type": "object", "properties": { "canary-property": { "type": "string" } } } } }],
        "format": { "type": "object", "properties": { "canary-format": { "type": "string" } } },
        "options": { "stop": ["canary-stop"], "canary-option": "canary-value" },
        "keep_alive": "5m",
        "canary-unknown": { "canary-inner": "canary-value" },
    })
}

#[tokio::test]
async fn nothing_that_a_caller_sends_is_kept_shown_or_quoted() {
    let house = loud_house(Plan::default()).await;
    let token = house.mint(Claims {
        sub: "tester".to_owned(),
        name: Some("canary-agent-name".to_owned()),
        roles: vec!["internal".to_owned()],
        permissions: vec!["web:read".to_owned(), "web:write".to_owned(), "canary-permission".to_owned()],
        risk_tier: Some("canary-tier".to_owned()),
        session: Some("session-1".to_owned()),
        ..Claims::default()
    });
    let headers = [
        ("user-agent", "canary-agent"),
        ("accept", "canary/accept"),
        ("cookie", "canary-cookie=1"),
        ("origin", "http://canary-origin"),
        ("referer", "http://canary-referer/"),
        ("traceparent", "canary-parent"),
        ("tracestate", "canary-state"),
        ("x-forwarded-for", "canary-forwarded"),
        ("x-behavry-priority", "canary-priority"),
        ("x-agent-id", "canary-identity"),
        ("anthropic-beta", "canary-beta"),
        ("x-canary-header", "canary-value"),
        ("x-request-id", "canary not an id"),
    ];
    let with_headers =
        |request: Request| headers.iter().fold(request, |request, (name, value)| request.header(name, value));
    let query = "canary=canary&%63%61%6e%61%72%79=1";
    let mut replies = Vec::new();

    // Well-formed, to each route, forwarded: also to backends that fail in every way.
    let openai = json!({
        "model": "tiny-story", "stream": true, "user": "canary-user", "stop": "canary-stop", "metadata": { "canary": "canary" },
        "messages": [{ "role": "developer", "content": "canary-developer" },
            { "role": "user", "name": "canary-name", "content": [{ "type": "text", "text": "canary-part" },
                { "type": "image_url", "image_url": { "url": "data:image/png;base64,canary" } }] }],
    });
    let asks = [
        ("/api/chat", marked_chat("llama3.2")),
        ("/api/chat", marked_chat("nobody-has-this")),
        ("/api/chat", marked_chat("fault-hangs-before-headers")),
        ("/api/chat", marked_chat("fault-stalls-mid-stream")),
        ("/api/chat", marked_chat("fault-resets-mid-stream")),
        ("/api/chat", marked_chat("fault-garbage-head")),
        ("/api/chat", marked_chat("fault-closes-before-headers")),
        ("/api/chat", marked_chat("fault-error-in-stream")),
        ("/api/chat", marked_chat("fault-early-400")),
        (
            "/api/generate",
            json!({ "model": "tiny-story", "prompt": "canary-prompt", "system": "canary-system",
            "template": "canary-template", "raw": false, "context": [1] }),
        ),
        ("/api/embed", json!({ "model": "tiny-embed", "input": ["canary-one", "canary-two"] })),
        ("/api/embeddings", json!({ "model": "tiny-embed", "prompt": "canary-prompt" })),
        ("/v1/chat/completions", openai),
        ("/v1/completions", json!({ "model": "tiny-story", "prompt": "canary-prompt" })),
        ("/v1/embeddings", json!({ "model": "tiny-embed", "input": "canary-input" })),
        ("/api/generate", json!({ "model": "nobody-has-this", "prompt": "canary-prompt", "suffix": "canary-suffix" })),
        (
            "/v1/completions",
            json!({ "model": "nobody-has-this", "prompt": "canary-prompt", "suffix": "canary-suffix" }),
        ),
        ("/api/show", json!({ "model": "tiny-story", "canary": "canary" })),
    ];
    for (path, ask) in asks {
        let request = with_headers(Request::post(&format!("{path}?{query}"), ask.clone()).bearer(&token));
        let mut connection = Connection::open(house.public).await;
        connection.send(&request).await;
        match ask["model"].as_str() {
            // These never end: the client leaves.
            Some("fault-hangs-before-headers") => {
                house.simulator.wait_for(crate::house::PATIENCE, |all| !all.is_empty()).await.expect("it arrives");
            }
            Some("fault-stalls-mid-stream") => {
                connection.head().await.expect("it begins");
                // It runs, and so it is on the operator's page.
                let running = Request::get("/api/v1/activity").send(house.operator).await;
                assert!(running.text().contains("fault-stalls-mid-stream"));
                replies.push(bytes_of(&running));
            }
            // Ollama's own words, which may say what it was told.
            Some(model) => {
                let reply = connection.reply(false).await;
                let good = reply.is_some_and(|reply| reply.status == 200);
                assert!(good || model.starts_with("fault-") || model == "nobody-has-this", "{path} {model}");
            }
            None => unreachable!("each names a model"),
        }
    }
    // Malformed, ambiguous, refused: what is ours says nothing of it.
    let twice = r#"{"model":"canary-model","messages":[],"canary-key":1,"messages":"canary"}"#;
    let bodies = [
        twice.to_owned(),
        r#"{"canary-key":1,"model":{"canary":1}}"#.to_owned(),
        r#"{"model":"tiny-story","stream":"canary"}"#.to_owned(),
        r#"{"model":"tiny-story","messages":"canary"}"#.to_owned(),
        r#"{"model":"tiny-story","messages":[{"role":"user","content":"canary"}],"Messages":[]}"#.to_owned(),
        r#"{"model":"tiny-story","options":{"num_ctx":"canary"},"messages":[]}"#.to_owned(),
        r#"{"model":"tiny-story"} canary"#.to_owned(),
        "canary".to_owned(),
        "{\"canary".to_owned(),
        r#"{"model":"canary canary\n"}"#.to_owned(),
        r#"{"model":"tiny-story","messages":[{"canary":"#.repeat(200),
    ];
    for body in &bodies {
        for path in ["/api/chat", "/v1/chat/completions", "/v1/messages", "/api/generate", "/v1/embeddings"] {
            let request = with_headers(Request::new("POST", path).body(body.as_str()).bearer(&token));
            let reply = house.send(request).await;
            assert!(reply.status < 500, "{path}: {}", reply.status);
            if reply.header("x-behavry-backend").is_none() {
                replies.push(bytes_of(&reply)); // ours, and not Ollama's
            }
        }
    }
    let ask = marked_chat("llama3.2");
    for request in [
        Request::post("/api/chat", ask.clone()),
        Request::post("/api/chat", ask.clone()).bearer("canary.canary.canary"),
        Request::post("/api/chat", ask.clone()).header("x-api-key", "canary-key"),
        Request::post("/api/chat", ask.clone()).bearer(&token).header("x-api-key", "canary-key"),
        Request::post("/api/chat", ask.clone()).header("authorization", "Basic Y2FuYXJ5OmNhbmFyeQ== canary"),
        Request::post("/api/chat", ask.clone()).bearer(&token).header("content-encoding", "canary"),
        Request::post("/api/chat", ask.clone()).bearer(&token).header("expect", "canary"),
        Request::post("/api/chat?canary=%zz", ask.clone()).bearer(&token),
        Request::new("CANARY", "/api/chat").bearer(&token),
        Request::post("/v1/audio/speech", json!({ "input": "canary" })).bearer(&token),
        Request::post("/api/pull", json!({ "model": "x", "canary": 1 })).bearer(&token),
        Request::post(
            "/api/v1/auth/token",
            json!({ "client_id": "canary-id", "client_secret": "canary-secret",
            "grant_type": "client_credentials" }),
        ),
        Request::post(
            "/api/v1/auth/token",
            json!({ "client_id": "demo", "client_secret": "canary-secret",
            "grant_type": "client_credentials" }),
        ),
        Request::post("/api/v1/auth/token", json!({ "client_id": "demo", "grant_type": "canary" })),
        Request::new("POST", "/api/v1/auth/token").body("client_id=canary&client_secret=canary"),
    ] {
        let replied = house.send(with_headers(request)).await;
        assert!((400..500).contains(&replied.status), "{}", replied.status);
        replies.push(bytes_of(&replied));
    }
    for raw in [
        "CANARY canary canary\r\n\r\n",
        "GET /canary HTTP/1.1\r\ncanary\r\n\r\n",
        "GET /canary HTTP/1.1\r\nhost: canary\r\nhost: canary\r\n\r\n",
        "GET http://canary:canary@canary/api/tags HTTP/1.1\r\nhost: canary\r\n\r\n",
        "POST /api/chat HTTP/1.1\r\nhost: canary\r\ntransfer-encoding: chunked\r\ncontent-type: canary\r\n\r\ncanary\r\n",
    ] {
        let mut connection = Connection::open(house.public).await;
        connection.write(raw.as_bytes()).await;
        let reply = connection.reply(false).await.expect("a reply");
        assert!((400..500).contains(&reply.status), "{}", reply.status);
        replies.push(bytes_of(&reply));
    }
    // Clients that break off, in HTTP/1.1 and HTTP/2.
    for raw in [
        "POST /api/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\nx-canary: canary\r\n\r\n{\"canary\":\"canary",
        "POST /api/chat HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n6\r\ncanary\r\nffff\r\ncanary",
        "GET /canary?canary HTTP/1.1\r\nhost: x\r\ncanary: can",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\ncanary canary canary canary",
    ] {
        let mut connection = Connection::open(house.public).await;
        let raw = raw.replacen("host: x", &format!("host: x\r\nauthorization: Bearer {token}"), 1);
        connection.write(raw.as_bytes()).await;
    }
    let mut h2 = H2::open(house.public).await;
    let marked = Request::post(&format!("/api/chat?{query}"), ask.clone()).bearer(&token);
    // `connection` and its like are not for HTTP/2; none of these is.
    let reply = h2.send(&with_headers(marked.clone())).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    replies.push(bytes_of(&h2.send(&with_headers(Request::post("/v1/nothing", ask.clone()).bearer(&token))).await));
    let half = h2.ask(&with_headers(marked), Some(9000)).await;
    drop((half, h2));
    // The operator's side: what it refuses it does not repeat, and the control socket neither.
    for request in [
        Request::get("/canary?canary=canary"),
        Request::new("CANARY", "/api/v1/activity"),
        Request::post("/api/v1/audit/stream?canary", json!({ "canary": "canary" })),
        Request::get("/api/v1/activity").header("origin", "http://canary.example"),
        Request::get("/metrics?canary").header("authorization", "Bearer canary"),
        Request::get("/api/v1/audit/stream/canary").header("last-event-id", "canary"),
    ] {
        replies.push(bytes_of(&with_headers(request).send(house.operator).await));
    }
    let mut connection = Connection::open(house.operator).await;
    connection.write(b"GET /api/v1/activity?canary HTTP/1.1\r\nhost: canary.example\r\n\r\n").await;
    replies.push(bytes_of(&connection.reply(false).await.expect("a reply")));
    for line in
        ["canary", r#"{"command":"canary"}"#, r#"{"command":"agent-list","canary":"canary"}"#, r#"{"canary":"canary"}"#]
    {
        replies.push(control(&house, line).await.into_bytes());
    }
    house.simulator.set_fault(Some(Fault::Refuses)).await.expect("closed");
    replies.push(bytes_of(&house.send(with_headers(Request::post("/api/chat", ask).bearer(&token))).await));
    house.simulator.set_fault(None).await.expect("open");

    let spilled = spilled(&house, &replies).await;
    // A method is recorded by name (`action`), as far as it goes.
    let spilled: Vec<&String> = spilled.iter().filter(|line| !line.contains(r#""action":"CANARY""#)).collect();
    assert!(spilled.is_empty(), "{spilled:#?}");
    // The token itself, or a part of it.
    for part in token.split('.').skip(1) {
        assert!(!house.log().contains(part), "a token in the log");
        assert!(!house.audit_text().contains(part));
    }
}

#[tokio::test]
async fn nothing_that_a_backend_says_is_kept_or_shown_and_its_garbage_is_not_quoted() {
    let backend = Puppet::listen().await;
    let house = loud_house(Plan { backend: Some(backend.url()), ..Plan::default() }).await;
    let headers = "server: canary-server\r\nset-cookie: canary-cookie=1\r\nx-canary: canary\r\nwww-authenticate: canary\r\n\
        location: http://canary/\r\n";
    let line =
        r#"{"model":"canary","message":{"role":"assistant","content":"canary","thinking":"canary"},"done":false}"#;
    let last = r#"{"model":"canary","message":{"role":"assistant","content":"","tool_calls":[{"function":{"name":"canary","arguments":{"canary":"canary"}}}]},"done":true,"done_reason":"canary says more than one word","eval_count":3,"prompt_eval_count":2,"canary":"canary"}"#;
    let chunk = |text: &str| format!("{:x};canary=canary\r\n{text}\r\n", text.len());
    let ok = |media: &str| format!("HTTP/1.1 200 canary\r\n{headers}content-type: {media}\r\n");
    let whole = |head: String, body: &str| format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let chunked = |media: &str, text: &str| format!("{}transfer-encoding: chunked\r\n\r\n{text}", ok(media));
    let sse = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"canary\"},\"finish_reason\":null}]}\n\n";
    // The reply, and whether a client sees the backend's own words.
    let replies = [
        (
            chunked(
                "application/x-ndjson",
                &format!(
                    "{}{}0\r\ncanary-trailer: canary\r\n\r\n",
                    chunk(&format!("{line}\n")),
                    chunk(&format!("{last}\n"))
                ),
            ),
            true,
        ),
        (chunked("application/x-ndjson", &chunk(line)), true), // and cut
        (chunked("application/x-ndjson", &chunk("canary is no JSON\n")), true),
        (chunked("application/x-ndjson", "canary\r\ncanary"), true), // no chunk: cut
        (chunked("text/event-stream", &chunk(sse)), true),
        (whole(ok("application/json"), last), true),
        (
            whole(
                format!("HTTP/1.1 500 canary\r\n{headers}content-type: application/json\r\n"),
                r#"{"error":"canary"}"#,
            ),
            true,
        ),
        (
            whole(
                format!("HTTP/1.1 404 canary\r\n{headers}content-type: application/json\r\n"),
                r#"{"error":"canary"}"#,
            ),
            true,
        ),
        (format!("HTTP/1.1 103 canary\r\n{headers}\r\n{}", whole(ok("application/json"), last)), true),
        (whole(ok("text/html"), "<p>canary"), false),
        (whole(ok("canary/canary"), "canary"), false),
        (whole(format!("{}content-encoding: canary\r\n", ok("application/json")), "canary"), false),
        (whole(format!("HTTP/1.1 302 canary\r\n{headers}"), "canary"), false),
        (whole(format!("HTTP/1.1 500 canary\r\n{headers}content-type: text/plain\r\n"), "canary"), false),
        (format!("HTTP/1.1 101 canary\r\n{headers}upgrade: canary\r\nconnection: upgrade\r\n\r\ncanary"), false),
        ("canary canary canary\r\n\r\n".to_owned(), false),
        (format!("HTTP/1.1 200 OK\r\ncanary\r\n{headers}\r\ncanary"), false),
        (format!("HTTP/1.1 200 OK\r\ncontent-length: canary\r\n{headers}\r\ncanary"), false),
        (format!("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n{headers}\r\ncanary"), false),
        (format!("HTTP/1.1 999 canary\r\n{headers}\r\ncanary"), false),
        (format!("HTTP/1.1 200 OK\r\nx-canary: {}\r\n\r\n", "canary".repeat(400_000)), false),
        ("canary".repeat(200_000), false),
    ];
    let mut kept = Vec::new();
    for (n, (bytes, passed_on)) in replies.iter().enumerate() {
        for path in ["/api/chat", "/v1/chat/completions", "/api/tags"] {
            let ask = json!({ "model": "llama3.2", "messages": [{ "role": "user", "content": "hi" }], "stream": true });
            let request = if path == "/api/tags" { Request::get(path) } else { Request::post(path, ask) };
            let request = request.bearer(&house.token());
            let reply = tokio::select! {
                reply = house.send(request) => reply,
                () = answer_all(&backend, bytes.as_bytes()) => unreachable!("it answers for ever"),
            };
            for (name, value) in &reply.headers {
                // `content-type` and its like are passed on; of these none is marked where the reply is.
                assert!(!name.to_lowercase().contains(MARK) && !value.contains(MARK), "{n} {path}: header {name}");
            }
            if !passed_on || path == "/api/tags" {
                kept.push(bytes_of(&reply));
            }
        }
    }
    let spilled = tokio::select! {
        spilled = spilled(&house, &kept) => spilled,
        () = answer_all(&backend, b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}") => unreachable!(),
    };
    assert!(spilled.is_empty(), "{spilled:#?}");
}

/// Answers every request with the same bytes and closes.
async fn answer_all(backend: &Puppet, bytes: &[u8]) {
    loop {
        backend.asked().await.try_say(bytes).await;
    }
}

#[tokio::test]
async fn of_an_unknown_path_method_or_query_nothing_of_the_clients_own_is_kept() {
    let house = loud_house(Plan::default()).await;
    // Its id is the one word of its own that is recorded.
    let id = "canary-lost";
    let reply = house.send(Request::get("/api/chat/canary-path/eyJ.canary-token?canary-query=1").id(id)).await;
    assert_eq!(reply.status, 404);
    let odd = house.send(Request::new("canary-method", "/api/chat").id("odd")).await;
    assert_eq!(odd.status, 405);
    let spilled = spilled(&house, &[bytes_of(&reply), bytes_of(&odd)]).await;
    assert!(spilled.iter().all(|line| !line.replace(id, "").contains(MARK)), "{spilled:#?}");
    // Where records are shown it is found: so what is searched here and above is there.
    for place in ["audit:", "log and standard output:", "feed:", "audit tail --all -n 100000:", "package:"] {
        assert!(spilled.iter().any(|line| line.starts_with(place)), "{place} {spilled:#?}");
    }
    assert_eq!(house.final_of(id).await["target"], "/api/chat/*");
    let record = house.final_of("odd").await;
    assert_eq!((&record["action"], &record["target"]), (&"OTHER".into(), &"/api/chat".into()));
}

#[tokio::test]
async fn credentials_of_ours_are_never_shown() {
    let backend_key = "canary-backend-key-0123456789";
    let env = vec![("BEHAVRY_OLLAMA_API_KEY".to_owned(), backend_key.to_owned())];
    let house = loud_house(Plan { env, ..Plan::default() }).await;
    let (id, secret) = house.first_agent();
    let grant = json!({ "client_id": id, "client_secret": secret, "grant_type": "client_credentials" });
    let given = house.send(Request::post("/api/v1/auth/token", grant)).await;
    assert_eq!(given.status, 200);
    let token = given.json()["access_token"].as_str().expect("a token").to_owned();
    for path in ["/api/version", "/api/tags"] {
        assert_eq!(house.send(Request::get(path).bearer(&token)).await.status, 200);
    }
    // The backend's key went to the backend and nowhere else; the token went nowhere.
    for one in house.simulator.seen() {
        assert_eq!(one.header("authorization"), Some(&*format!("Bearer {backend_key}")));
        assert!(!String::from_utf8_lossy(&one.raw_head).contains(&token));
    }
    let spilled = spilled(&house, &[]).await;
    assert!(spilled.is_empty(), "{spilled:#?}");
    assert!(!house.log().contains(&secret), "what is printed here is kept by somebody");
    let audit = house.audit_text();
    let everywhere = house.log() + &audit + &house.metrics().await;
    for part in token.split('.').skip(1) {
        assert!(!everywhere.contains(part), "a part of a token");
    }
    assert!(!audit.contains(&secret));
    let key = include_str!("../fixtures/keys/ed25519.private.pem");
    assert!(key.lines().filter(|line| !line.starts_with('-')).all(|line| !everywhere.contains(line)), "our own key");
    let agents = std::fs::read_to_string(house.dir.path().join("state/agents.toml")).expect("the agents");
    assert!(!agents.contains(&secret), "secrets are stored hashed");
}

#[tokio::test]
async fn settings_that_are_wrong_are_refused_without_their_values() {
    let dir = tempfile::tempdir().expect("a folder");
    let encoded = STANDARD.encode("canary");
    let jwt = URL_SAFE_NO_PAD.encode("canary");
    let pem = format!("-----BEGIN PRIVATE KEY-----\ncanary{encoded}{jwt}\n-----END PRIVATE KEY-----\n");
    for (name, value) in [
        ("BEHAVRY_JWT_PRIVATE_KEY", pem.as_str()),
        ("BEHAVRY_JWT_PRIVATE_KEY", "canary"),
        ("BEHAVRY_JWT_PUBLIC_KEY", pem.as_str()),
        ("BEHAVRY_OLLAMA_API_KEY", "canary\nkey"),
        ("BEHAVRY_OLLAMA_URL", "http://canary:canary@"),
        ("BEHAVRY_OLLAMA_URL", "http://user:canary@host/path"),
        ("BEHAVRY_OLLAMA_URL", "http://user:canary@host:port"),
    ] {
        let told = Command::new(env!("CARGO_BIN_EXE_behavry-ollama-proxy"))
            .arg("check")
            .env_clear()
            .env("BEHAVRY_STATE_DIR", dir.path())
            .env("RUST_LOG", LOUD)
            .env(name, value)
            .output()
            .expect("it runs");
        let words = [told.stdout, told.stderr].concat();
        let words = String::from_utf8_lossy(&words).to_lowercase();
        assert_eq!(told.status.code(), Some(78), "{name}: {}", words.len());
        assert!(!words.contains(MARK) && !words.contains(&encoded.to_lowercase()), "{name}");
    }
    // What is right is not shown either.
    let told = Command::new(env!("CARGO_BIN_EXE_behavry-ollama-proxy"))
        .arg("check")
        .env_clear()
        .env("BEHAVRY_STATE_DIR", dir.path())
        .env("BEHAVRY_OLLAMA_URL", "http://canary-user:canary-password@127.0.0.1:9")
        .env("RUST_LOG", LOUD)
        .output()
        .expect("it runs");
    assert!(told.status.success());
    let words = [told.stdout, told.stderr].concat();
    assert!(!String::from_utf8_lossy(&words).to_lowercase().contains(MARK));
}
