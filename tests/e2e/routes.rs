//! What may pass: the closed table over sockets, at both bases, and the words of each refusal in each dialect
//! (contract, sections 4 and 5).

use serde_json::json;

use crate::client::{Connection, Request};
use crate::house::{House, Plan, wait_until};
use crate::lists::Fixed;

const BASE: &str = "/api/v1/ollama";
const DIGEST: &str = "/api/blobs/sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

fn admin(house: &House) -> String {
    house.token_with(&[], &["web:read", "web:write", "ollama:admin"])
}

/// One good request for each row of the table.
fn table() -> Vec<Request> {
    let message = json!([{ "role": "user", "content": "hi" }]);
    let chat = json!({ "model": "tiny-story", "messages": message, "stream": false, "max_tokens": 8 });
    let prompt = json!({ "model": "tiny-story", "prompt": "hi", "stream": false });
    let embed = json!({ "model": "tiny-embed", "input": "hi", "prompt": "hi" });
    let named = json!({ "model": "tiny-story", "stream": false });
    vec![
        Request::post("/api/chat", chat.clone()),
        Request::post("/api/generate", prompt.clone()),
        Request::post("/api/embed", embed.clone()),
        Request::post("/api/embeddings", embed.clone()),
        Request::post("/v1/chat/completions", chat.clone()),
        Request::post("/v1/completions", prompt),
        Request::post("/v1/embeddings", embed),
        Request::post("/v1/responses", json!({ "model": "tiny-story", "input": "hi" })),
        Request::post("/v1/messages", chat),
        Request::get("/"),
        Request::new("HEAD", "/"),
        Request::get("/api/version"),
        Request::new("HEAD", "/api/version"),
        Request::get("/api/status"),
        Request::get("/api/tags"),
        Request::new("HEAD", "/api/tags"),
        Request::get("/api/ps"),
        Request::post("/api/show", named.clone()),
        Request::get("/v1/models"),
        Request::get("/v1/models/tiny-story"),
        Request::post("/api/pull", named.clone()),
        Request::post("/api/push", named.clone()),
        Request::post("/api/create", json!({ "model": "mine", "from": "tiny-story", "stream": false })),
        Request::post("/api/copy", json!({ "source": "tiny-story", "destination": "mine" })),
        Request { method: "DELETE".into(), ..Request::post("/api/delete", json!({ "model": "mine" })) },
        Request::new("POST", DIGEST).body("abc"),
        Request::new("HEAD", DIGEST),
    ]
}

#[tokio::test]
async fn every_route_of_the_table_passes_at_both_bases_with_the_tables_own_path() {
    let house = House::open().await;
    let token = admin(&house);
    for base in ["", BASE] {
        for mut request in table() {
            let own = request.path.clone();
            request.path = format!("{base}{own}");
            let id = format!("{}{}{own}", base.len(), request.method);
            house.simulator.forget();
            let reply = house.send(request.clone().bearer(&token).id(&id)).await;
            assert!((200..300).contains(&reply.status), "{} {}: {}", request.method, request.path, reply.text());
            assert_eq!(reply.header("x-behavry-backend"), Some("ollama"), "{} {}", request.method, request.path);
            let queued = reply.header("x-behavry-queue-ms");
            assert!(queued.is_some_and(|ms| ms.parse::<u64>().is_ok()), "{queued:?}");
            let seen = house.simulator.seen();
            assert_eq!(seen.len(), 1, "{own}: one request makes one");
            let as_get = own == "/api/tags" && request.method == "HEAD"; // the list is read to be filtered
            assert_eq!((&*seen[0].method, &*seen[0].target), (if as_get { "GET" } else { &*request.method }, &*own));
            let last = house.final_of(&id).await;
            assert_eq!((&last["target"], &last["action"]), (&json!(own), &json!(request.method)), "without the base");
            assert_eq!(
                (&last["policy_result"], &last["extra"]["outcome"]),
                (&json!("allow"), &json!("complete")),
                "{own}"
            );
        }
    }
    // Ollama's own client begins with `HEAD <base>/`; people type the base without the slash.
    for path in ["/api/v1/ollama", "/api/v1/ollama/"] {
        for method in ["GET", "HEAD"] {
            house.simulator.forget();
            let reply = house.send(Request::new(method, path).bearer(&token)).await;
            assert_eq!(reply.status, 200, "{method} {path}");
            assert_eq!(house.simulator.seen()[0].target, "/");
            if method == "GET" {
                assert_eq!(reply.text(), "Ollama is running");
            }
        }
    }
}

#[tokio::test]
async fn without_drop_in_only_the_base_and_our_own_routes_are_served() {
    let house = House::with(Plan { config: "[routes]\ndrop_in = false\n".to_owned(), ..Plan::default() }).await;
    let token = admin(&house);
    for request in table() {
        let what = format!("{} {}", request.method, request.path);
        assert_eq!(house.send(request.bearer(&token)).await.status, 404, "{what}");
    }
    for path in ["/api/me", "/v1/audio/speech"] {
        assert_eq!(house.send(Request::get(path).bearer(&token)).await.status, 404, "{path}");
    }
    assert_eq!(house.simulator.connections(), 0);
    assert_eq!(house.send(Request::get("/api/v1/ollama/api/version").bearer(&token)).await.status, 200);
    assert_eq!(house.send(Request::get("/.well-known/jwks.json")).await.status, 200);
    assert_eq!(house.send(Request::get("/api/v1/auth/token")).await.status, 405);
}

#[tokio::test]
async fn what_only_means_a_route_is_none_and_is_never_forwarded() {
    // Nobody is known at a 404, so that many of them would be folded into one record.
    let config = "[audit]\nrefusals_per_second = 100000\n".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let token = admin(&house);
    for (n, path) in [
        "/nothing",
        "/API/chat",
        "/api/Chat",
        "/api/chat/",
        "//api/chat",
        "/api//chat",
        "/./api/chat",
        "/x/../api/chat",
        "/api/%63hat",
        "/api%2fchat",
        "/api/chat;x=1",
        "/api/chat%00",
        "/api/v1/ollamaapi/chat",
        "/api/v1/ollama//api/chat",
        "/api/v1/ollama/../ollama/api/chat",
        "/api/v1/ollama/api/v1/ollama/api/chat",
        "/api/v1/Ollama/api/chat",
        "/v1/models/a%2Fb",
        "/v1/models/a/b",
        "/v1/models/",
        "/v1/models/..",
        "/api/blobs/sha256:0",
        "/api/blobs/../tags",
        "/metrics",
        "/livez",
        "/.well-known/jwks.json/",
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("none-{n}");
        let ask = json!({ "model": "tiny-story", "messages": [] });
        let reply = house.send(Request::post(path, ask).bearer(&token).id(&id)).await;
        assert_eq!((reply.status, reply.code()), (404, "unknown_route".to_owned()), "{path}");
        let last = house.final_of(&id).await;
        assert_eq!((&last["policy_result"], &last["error"]), (&json!("deny"), &json!("unknown_route")), "{path}");
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn another_method_on_a_known_path_is_405_and_allow_says_which() {
    let house = House::open().await;
    let token = admin(&house);
    for (method, path, allow) in [
        ("GET", "/api/chat", "POST"),
        ("PUT", "/api/v1/ollama/api/chat", "POST"),
        ("HEAD", "/api/chat", "POST"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/api/tags", "GET, HEAD"),
        ("HEAD", "/api/ps", "GET"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/tiny", "GET"),
        ("POST", "/api/delete", "DELETE"),
        ("GET", DIGEST, "HEAD, POST"),
        ("OPTIONS", "/api/chat", "POST"),
        ("PATCH", "/v1/messages", "POST"),
        ("TRACE", "/api/version", "GET, HEAD"),
        ("PURGE", "/api/version", "GET, HEAD"),
        ("get", "/api/version", "GET, HEAD"),
    ] {
        let reply = house.send(Request::new(method, path).bearer(&token)).await;
        assert_eq!((reply.status, reply.header("allow")), (405, Some(allow)), "{method} {path}");
        if method != "HEAD" {
            let (body, anthropic) = (reply.json(), path.contains("/v1/messages"));
            let code = if anthropic { &body["error"]["type"] } else { &json!(reply.code()) };
            assert_eq!(code, if anthropic { "invalid_request_error" } else { "method_not_allowed" });
        }
    }
    // A browser's question gets no permission from us: no origin is configured.
    let asked = Request::new("OPTIONS", "/api/chat")
        .header("origin", "http://page.example")
        .header("access-control-request-method", "POST");
    let reply = house.send(asked).await;
    assert!(reply.headers.iter().all(|(name, _)| !name.to_ascii_lowercase().starts_with("access-control")));
    let reply = house.send(Request::get("/api/version").bearer(&token).header("origin", "http://localhost:3000")).await;
    assert_eq!(reply.status, 200);
    assert!(reply.headers.iter().all(|(name, _)| !name.to_ascii_lowercase().starts_with("access-control")));
    assert!(house.simulator.seen().iter().all(|seen| seen.header("origin").is_none()));
}

#[tokio::test]
async fn what_ollama_does_not_offer_is_400_in_openais_shape_and_bifrosts_words() {
    let house = House::open().await;
    let token = house.token();
    for (method, path, operation) in [
        ("POST", "/v1/audio/speech", "speech"),
        ("POST", "/v1/audio/transcriptions", "transcription"),
        ("POST", "/v1/images/generations", "image_generation"),
        ("POST", "/v1/images/edits", "image_edit"),
        ("POST", "/v1/images/variations", "image_variation"),
        ("POST", "/v1/files", "file_upload"),
        ("GET", "/v1/files", "file_list"),
        ("GET", "/v1/files/f-1", "file_retrieve"),
        ("DELETE", "/v1/files/f-1", "file_delete"),
        ("GET", "/v1/files/f-1/content", "file_content"),
        ("POST", "/v1/batches", "batch_create"),
        ("GET", "/v1/batches", "batch_list"),
        ("GET", "/v1/batches/b-1", "batch_retrieve"),
        ("POST", "/v1/batches/b-1/cancel", "batch_cancel"),
        ("POST", "/v1/rerank", "rerank"),
        ("POST", "/v1/videos", "video_generation"),
        ("POST", "/v1/containers", "container_create"),
        ("GET", "/v1/containers/c-1/files/f-1/content", "container_file_content"),
        ("DELETE", "/v1/videos/v-1", "video_delete"),
        ("POST", "/v1/images/edits/more", "image_edit"),
        ("PUT", "/v1/audio/speech/a/b/c", "speech"),
    ] {
        for base in ["", BASE] {
            let id = format!("{}{method}{path}", base.len());
            let request = Request::new(method, &format!("{base}{path}")).bearer(&token).id(&id);
            let reply = house.send(request.body("not read")).await;
            assert_eq!(reply.status, 400, "{method} {path}");
            let message = format!("{operation} is not supported by ollama provider");
            let wanted = json!({
                "error": { "message": message, "type": "invalid_request_error", "param": null, "code": "unsupported_operation" },
                "detail": message,
                "extra_fields": { "provider": "ollama", "request_type": operation },
            });
            assert_eq!(reply.json(), wanted);
            assert_eq!(house.final_of(&id).await["error"], "unsupported_operation");
        }
    }
    let stranger = house.send(Request::new("POST", "/v1/audio/speech").body("x")).await;
    assert_eq!((stranger.status, stranger.code()), (401, "missing_token".to_owned()), "a stranger learns nothing");
    assert_eq!(house.simulator.connections(), 0);
}

/// Whatever the body, the refusal is the same but for the word of a stream, and no backend hears of it.
#[tokio::test]
async fn no_body_changes_that_an_operation_is_not_offered() {
    let config = "[limits]\nbody_bytes = 2000".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let stream = "{\"stream\":true,\"prompt\":\"a cat\"}";
    let form = "--b\r\ncontent-disposition: form-data; name=\"stream\"\r\n\r\ntrue\r\n--b--\r\n";
    let (json, long) =
        ("application/json; charset=utf-8", format!("{{\"stream\":true,\"x\":\"{}\"}}", "x".repeat(4000)));
    for (id, path, headers, body, word) in [
        ("stream", "images/generations", vec![("content-type", json)], stream, "image_generation_stream"),
        ("speech", "audio/speech", vec![("content-type", json)], "{\"stream_format\":\"sse\"}", "speech_stream"),
        ("no-stream-of-it", "images/variations", vec![("content-type", json)], stream, "image_variation"),
        ("no-type", "images/generations", vec![], stream, "image_generation"),
        (
            "form",
            "audio/transcriptions",
            vec![("content-type", "multipart/form-data; boundary=b")],
            form,
            "transcription",
        ),
        ("empty", "images/generations", vec![("content-type", json)], "", "image_generation"),
        ("no-json", "images/generations", vec![("content-type", json)], "stream: true", "image_generation"),
        ("long", "images/generations", vec![("content-type", json)], long.as_str(), "image_generation"),
        (
            "packed",
            "images/generations",
            vec![("content-type", json), ("content-encoding", "br")],
            stream,
            "image_generation",
        ),
    ] {
        for chunked in [false, true] {
            let id = format!("{id}-{chunked}");
            let mut request = Request::new("POST", &format!("/v1/{path}")).bearer(&house.token()).id(&id).body(body);
            request.headers.extend(headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
            let request = if chunked { request.chunked(100) } else { request };
            let reply = house.send(request).await;
            assert_eq!((reply.status, reply.code()), (400, "unsupported_operation".to_owned()), "{id}");
            assert_eq!(reply.json()["extra_fields"]["request_type"], word, "{id}");
            assert_eq!(house.final_of(&id).await["error"], "unsupported_operation", "{id}");
        }
    }
    assert_eq!(house.simulator.connections(), 0);
}

// ---- what would leave the house

#[tokio::test]
async fn routes_that_act_for_the_servers_account_are_403() {
    let house = House::open().await;
    let token = admin(&house);
    for (method, path) in [
        ("POST", "/api/me"),
        ("GET", "/api/v1/ollama/api/me"),
        ("POST", "/api/signout"),
        ("DELETE", "/api/user/keys/abc"),
        ("POST", "/api/experimental/aliases"),
        ("GET", "/api/experimental/web_search"),
    ] {
        let id = format!("{method}{path}");
        let reply = house.send(Request::new(method, path).bearer(&token).id(&id)).await;
        assert_eq!((reply.status, reply.code()), (403, "egress_denied".to_owned()), "{method} {path}");
        assert_eq!(reply.header("x-should-retry"), Some("false"));
        assert_eq!(house.final_of(&id).await["agent_id"], "tester");
        let stranger = house.send(Request::new(method, path)).await;
        assert_eq!(stranger.status, 401, "{path}");
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn cloud_models_are_refused_by_their_names_on_every_route_unless_the_configuration_lets_them() {
    let house = House::open().await;
    let token = admin(&house);
    let message = json!([{ "role": "user", "content": "hi" }]);
    for (n, request) in [
        Request::post("/api/chat", json!({ "model": "gpt-oss:120b-cloud", "messages": message })),
        Request::post("/api/chat", json!({ "model": "GPT-OSS:Cloud", "messages": message })),
        Request::post("/api/generate", json!({ "model": "somebody/x:cloud", "prompt": "hi" })),
        Request::post("/v1/chat/completions", json!({ "model": "gpt-oss:20b-CLOUD", "messages": message })),
        Request::post("/v1/messages", json!({ "model": "x:cloud", "max_tokens": 1, "messages": message })),
        Request::post("/api/show", json!({ "model": "x:cloud" })),
        Request::post("/api/pull", json!({ "model": "x:cloud" })),
        Request::post("/api/copy", json!({ "source": "x:cloud", "destination": "mine" })),
        Request::post("/api/create", json!({ "model": "mine", "from": "x:cloud" })),
        Request::get("/v1/models/x:cloud"),
    ]
    .into_iter()
    .enumerate()
    {
        let (id, path) = (format!("cloud-{n}"), request.path.clone());
        let reply = house.send(request.bearer(&token).id(&id)).await;
        assert_eq!(reply.status, 403, "{path} ({n})");
        let text = reply.text();
        assert!(text.contains("ollama.com"), "it says why: {text}");
        assert!(!text.contains("..") && !text.contains(".),"), "in whole sentences: {text}");
        let last = house.final_of(&id).await;
        assert_eq!((&last["policy_result"], &last["extra"]["outcome"]), (&json!("deny"), &json!("refused")), "{path}");
    }
    assert_eq!(house.simulator.connections(), 0);

    let policy =
        vec![("authz.rego", "package behavry.authz\n\ndeny if input.model_ref.source == \"moon\"\n".to_owned())];
    let open = House::with(Plan { config: "[egress]\ncloud_models = true\n".into(), policy, ..Plan::default() }).await;
    let ask = json!({ "model": "x:cloud", "messages": message, "stream": false });
    let reply = open.post("/api/chat", ask).await;
    assert!(reply.header("x-behavry-backend").is_some(), "it passes: {}", reply.text());
}

#[tokio::test]
async fn a_stub_of_a_cloud_model_is_refused_whatever_it_is_called() {
    let tags = r#"{"models":[{"name":"innocent:latest","model":"innocent:latest","remote_host":"https://ollama.com:443","remote_model":"gpt-oss:120b"},{"name":"local:latest","model":"local:latest"}]}"#;
    let chat = r#"{"model":"x","message":{"role":"assistant","content":"hi"},"done":true,"done_reason":"stop","prompt_eval_count":1,"eval_count":1}"#;
    let backend =
        Fixed::start(&[("/api/tags", 200, "application/json", tags), ("/api/chat", 200, "application/json", chat)])
            .await;
    let config = "[catalogue]\nrefresh_s = 1\n".to_owned();
    let house = House::with(Plan { backend: Some(backend.url()), config, ..Plan::default() }).await;
    // The second look begins when the first has been taken in.
    let looks = || backend.lines().iter().filter(|line| line.starts_with("GET /api/tags ")).count();
    wait_until("two looks at the list", || (looks() >= 2).then_some(())).await;
    let ask =
        |model: &str| json!({ "model": model, "stream": false, "messages": [{ "role": "user", "content": "hi" }] });
    for name in ["innocent", "Innocent:LATEST", "library/innocent"] {
        let reply = house.post("/api/chat", ask(name)).await;
        assert_eq!((reply.status, reply.code()), (403, "egress_denied".to_owned()), "{name}");
    }
    let copy = Request::post("/api/copy", json!({ "source": "innocent", "destination": "mine" }));
    assert_eq!(house.send(copy.bearer(&admin(&house))).await.status, 403);
    let asked = ["GET /api/tags ", "GET /api/ps ", "GET /api/version ", "POST /api/show "]; // by the catalogue
    let own = |line: &String| asked.iter().any(|asked| line.starts_with(asked));
    assert!(backend.lines().iter().all(own), "{:?}", backend.lines());
    assert_eq!(house.post("/api/chat", ask("local")).await.status, 200);
}

// ---- queries

#[tokio::test]
async fn a_query_passes_as_it_is_and_is_never_written_down() {
    let house = House::open().await;
    let token = house.token();
    let query = "x=CANARY-1&y=%20%2F..%2f&z[]=1&ts=17&k=a+b:@/?~!$'()*,;=&&=&%41";
    for mut request in [
        Request::get("/api/version"),
        Request::get("/api/tags"),
        Request::get("/v1/models/tiny"),
        Request::post("/api/v1/ollama/api/show", json!({ "model": "tiny" })),
        Request::get("/nothing"),
        Request::new("PUT", "/api/chat"),
    ] {
        house.simulator.forget();
        let path = request.path.clone();
        request.path = format!("{path}?{query}");
        let id = format!("query{path}");
        let status = house.send(request.bearer(&token).id(&id)).await.status;
        let last = house.final_of(&id).await;
        if status == 200 {
            let target = path.strip_prefix(BASE).unwrap_or(&path);
            assert_eq!(house.simulator.seen()[0].target, format!("{target}?{query}"));
            assert_eq!(last["target"], target);
        } else {
            assert!(house.simulator.seen().is_empty(), "{path}: {status}");
        }
    }
    house.simulator.forget();
    assert_eq!(house.send(Request::get("/api/version?").bearer(&token)).await.status, 200, "an empty one");
    let long = format!("/api/version?{}", "q".repeat(8193));
    let strange: Vec<String> = ["%zz", "%4", "a\"b", "a<b", "a{b}", "a\\b", "a|b", "a^b", "`"]
        .iter()
        .map(|bad| format!("/api/version?CANARY-2={bad}"))
        .chain([long])
        .collect();
    house.simulator.forget();
    for path in strange {
        let reply = house.send(Request::get(&path).bearer(&token)).await;
        assert_eq!((reply.status, reply.code()), (400, "bad_framing".to_owned()), "{path}");
    }
    assert!(house.simulator.seen().is_empty());
    let written = house.log() + &house.audit_text() + &house.metrics().await;
    assert!(!written.contains("CANARY"), "a query was written down");
}

// ---- words

/// One refusal in each dialect, byte for byte: clients parse these.
#[tokio::test]
async fn refusals_have_the_shape_that_each_dialects_clients_read() {
    let house = House::open().await;
    let token = house.token();
    let missing = "No token was sent. Send `Authorization: Bearer <token>`; fetch a token: POST /api/v1/auth/token";
    let quoted = |words: &str| json!(words).to_string();
    let native = |words: &str, code: &str| {
        let words = quoted(words);
        format!("{{\"error\":{words},\"detail\":{words},\"code\":\"{code}\"}}")
    };
    let openai = |words: &str, kind: &str, code: &str| {
        let words = quoted(words);
        format!(
            "{{\"error\":{{\"message\":{words},\"type\":\"{kind}\",\"param\":null,\"code\":\"{code}\"}},\"detail\":{words}}}"
        )
    };
    let anthropic = |words: &str, kind: &str| {
        let words = quoted(words);
        format!("{{\"type\":\"error\",\"error\":{{\"type\":\"{kind}\",\"message\":{words}}},\"request_id\":\"shape\"}}")
    };
    let unknown = "This path is not served. Ollama's own paths are, also below /api/v1/ollama, each in one spelling.";
    let scope = "The token lacks the permission web:write. Ask for it and fetch a new token.";
    let reader = house.token_with(&[], &["web:read"]);
    let cases: Vec<(&str, Option<&str>, u16, String)> = vec![
        ("/api/chat", None, 401, native(missing, "missing_token")),
        ("/v1/chat/completions", None, 401, openai(missing, "authentication_error", "missing_token")),
        ("/v1/messages", None, 401, anthropic(missing, "authentication_error")),
        ("/api/chat", Some(&reader), 403, native(scope, "insufficient_scope")),
        ("/v1/embeddings", Some(&reader), 403, openai(scope, "permission_error", "insufficient_scope")),
        ("/v1/messages", Some(&reader), 403, anthropic(scope, "permission_error")),
        ("/nothing", Some(&token), 404, native(unknown, "unknown_route")),
        ("/v1/nothing", Some(&token), 404, openai(unknown, "not_found_error", "unknown_route")),
        ("/api/v1/ollama/v1/nothing", Some(&token), 404, openai(unknown, "not_found_error", "unknown_route")),
        ("/v1/messages/batches", Some(&token), 404, anthropic(unknown, "not_found_error")),
        ("/api/v1/ollama/v1/messages/x", Some(&token), 404, anthropic(unknown, "not_found_error")),
    ];
    for (path, token, status, wanted) in cases {
        let request = Request::post(path, json!({})).id("shape");
        let reply = house.send(token.iter().fold(request, |request, token| request.bearer(token))).await;
        assert_eq!(reply.status, status, "{path}");
        assert_eq!(reply.header("content-type"), Some("application/json; charset=utf-8"), "{path}");
        assert_eq!(reply.text(), wanted, "{path}");
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_body_where_none_belongs_is_refused_and_a_body_that_is_no_json_too() {
    let house = House::open().await;
    let token = house.token();
    for path in ["/api/tags", "/api/version", "/"] {
        let reply = house.send(Request::get(path).bearer(&token).body("{}")).await;
        assert_eq!((reply.status, reply.code()), (400, "bad_framing".to_owned()), "{path}");
        let reply = house.send(Request::get(path).bearer(&token).body("{}").chunked(1)).await;
        assert_eq!((reply.status, reply.code()), (400, "bad_framing".to_owned()), "{path}");
        assert!(!reply.json()["detail"].as_str().unwrap().ends_with(".."), "{}", reply.text());
    }
    assert_eq!(
        house.send(Request::get("/api/version").bearer(&token).body("")).await.status,
        200,
        "an empty one is none"
    );
    for body in
        ["", "PROMPT-CANARY", "[]", "\"PROMPT-CANARY\"", "{\"model\":1}", "{\"model\":\"tiny\"", "{\"model\":\"a b\"}"]
    {
        let request = Request::new("POST", "/api/chat").header("content-type", "application/json").body(body);
        let reply = house.send(request.bearer(&token)).await;
        assert_eq!((reply.status, reply.code()), (400, "invalid_body".to_owned()), "{body}");
        assert!(!reply.text().contains("CANARY"), "a body is never quoted");
    }
    let written = house.log() + &house.audit_text();
    assert!(!written.contains("PROMPT-CANARY"));
    let encoded = Request::post("/api/chat", json!({})).header("content-encoding", "gzip").bearer(&token);
    let reply = house.send(encoded).await;
    assert_eq!((reply.status, reply.code()), (415, "unsupported_encoding".to_owned()));
    let seen = house.simulator.seen();
    assert!(seen.iter().all(|seen| seen.target == "/api/version"), "{seen:?}");
}

#[tokio::test]
async fn many_refusals_on_one_connection_leave_it_usable() {
    let house = House::open().await;
    let token = house.token();
    let mut connection = Connection::open(house.public).await;
    for n in 0..20 {
        let request = match n % 4 {
            0 => Request::get("/nothing"),
            1 => Request::get("/api/tags"),
            2 => Request::get("/v1/audio/speech").bearer(&token),
            _ => Request::get("/api/version").bearer(&token),
        };
        connection.send(&request).await;
        let reply = connection.reply(false).await.expect("the connection stays");
        assert_eq!(reply.status, [404, 401, 400, 200][n % 4]);
    }
}
