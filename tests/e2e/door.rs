//! The front door: heads under one deadline, connections kept or closed as they should be, no tunnels, h2c, panics answered. And what
//! it leans on in Pingora, each part with a test that fails when an update takes it away (see `src/door.rs`):
//!
//! - the hidden trait of custom sessions: `a_panic_before_the_reply_is_answered_with_500`, whose hooks look at their session;
//! - v2's `take_response_body_writer`: `an_http_2_stream_comes_as_it_is_made`;
//! - TASK_BUFFER_SIZE: `a_client_that_leaves_while_the_backend_takes_no_body_is_noticed_every_time`;
//! - `enable_retry_buffering` at every attempt: `bodies::a_rewritten_body_arrives_rewritten_at_the_first_second_and_third_attempt`;
//! - `Failed` reaching `response_duplex_vec`: `a_stream_whose_backend_dies_ends_with_an_error_and_the_connection_is_kept`;
//! - the session dropped before `process_new_http` returns, and unwinding: every test of a panic.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

use behavry_ollama_proxy::simulator::Ending;

use crate::bare_door::BareDoor;
use crate::client::{Connection, End, Reply, Request};
use crate::h2_client::{self, H2};
use crate::house::{House, PATIENCE, Plan, until_tried};

fn limits(lines: &str) -> Plan {
    Plan { config: format!("[limits]\n{lines}\n"), ..Plan::default() }
}

fn ask(model: &str) -> serde_json::Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] })
}

fn chat(house: &House, model: &str) -> Request {
    Request::post("/api/chat", ask(model)).bearer(&house.token())
}

async fn ends(connection: &mut Connection) -> bool {
    !connection.more().await && connection.unread.is_empty()
}

/// Sends `bytes` one by one, never silent for long and never done, until something comes back.
async fn drip(connection: Connection, bytes: impl Iterator<Item = u8> + Send + 'static) -> Vec<u8> {
    let (mut read, mut write) = connection.stream.into_split();
    let dripping = tokio::spawn(async move {
        for byte in bytes {
            if write.write_all(&[byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        std::future::pending::<()>().await // a dropped half would be a client that closes
    });
    let mut all = Vec::new();
    let _ = timeout(PATIENCE, read.read_to_end(&mut all)).await.expect("the proxy ends it");
    dripping.abort();
    all
}

// ---- heads

#[tokio::test]
async fn a_head_that_drips_has_one_deadline_as_a_whole() {
    let house = House::with(limits("head_timeout_ms = 400")).await;
    let endless = b"GET /api/version HTTP/1.1\r\nHost: a\r\nX: ".iter().copied().chain(std::iter::repeat(b'x'));
    let reply = until_tried("a head in drops", async || {
        let reply = drip(Connection::open(house.public).await, endless.clone()).await;
        (!reply.is_empty()).then_some(reply) // closed without a word: not one drop came in time
    })
    .await;
    assert!(reply.starts_with(b"HTTP/1.1 408 "));
    assert!(String::from_utf8_lossy(&reply).contains("slow_request"));

    // The second head of a connection too.
    let reply = until_tried("a second head in drops", async || {
        let reply = drip(served(&house).await, endless.clone()).await;
        (!reply.is_empty()).then_some(reply)
    })
    .await;
    assert!(reply.starts_with(b"HTTP/1.1 408 "));
}

/// A connection with one request behind it, where heads have little time.
async fn served(house: &House) -> Connection {
    until_tried("a head in time", async || {
        let mut connection = Connection::open(house.public).await;
        connection.send(&Request::get("/api/version").bearer(&house.token())).await;
        let status = connection.reply(false).await.map(|reply| reply.status);
        assert!(matches!(status, None | Some(200 | 408)), "{status:?}");
        (status == Some(200)).then_some(connection)
    })
    .await
}

#[tokio::test]
async fn a_connection_that_says_nothing_or_only_empty_lines_is_closed_without_a_word() {
    let house = House::with(limits("head_timeout_ms = 400\nkeepalive_s = 1")).await;
    assert!(ends(&mut Connection::open(house.public).await).await);
    let lines = b"\r\n".iter().copied().cycle();
    assert_eq!(drip(Connection::open(house.public).await, lines.clone()).await, b"");

    assert!(ends(&mut served(&house).await).await, "an idle connection is closed");
    assert_eq!(drip(served(&house).await, lines).await, b"", "empty lines do not keep it");
}

#[tokio::test]
async fn an_empty_line_before_a_request_is_passed_over() {
    let house = House::open().await;
    let mut connection = Connection::open(house.public).await;
    for _ in 0..2 {
        connection.write(b"\r\n\r\n").await;
        connection.send(&Request::get("/api/version").bearer(&house.token())).await;
        assert_eq!(connection.reply(false).await.expect("a reply").status, 200);
    }
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused_before_its_end() {
    let house = House::with(limits("head_bytes = 4096")).await;
    let start = format!("GET /api/version HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\n", house.token());
    let endless = [format!("{start}X: {}", "x".repeat(5_000)), start.clone() + &"X: y\r\n".repeat(1_000)];
    let whole = format!("{start}X: {}\r\n\r\n", "x".repeat(5_000));
    let long_line = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(5_000));
    for head in endless.iter().chain([&whole, &long_line]) {
        let mut connection = Connection::open(house.public).await;
        connection.write(head.as_bytes()).await;
        let reply = connection.reply(false).await.expect("an answer");
        assert_eq!((reply.status, reply.code()), (431, "head_too_large".to_owned()));
        assert!(connection.reply(false).await.is_none());
    }
    let fits = format!("{start}X: {}\r\n\r\n", "x".repeat(1_000));
    let mut connection = Connection::open(house.public).await;
    connection.write(fits.as_bytes()).await;
    assert_eq!(connection.reply(false).await.expect("a reply").status, 200);
}

#[tokio::test]
async fn a_thousand_headers_are_refused_and_no_matter_which_limit_says_so() {
    let house = House::open().await;
    let head = format!("GET /api/version HTTP/1.1\r\nHost: a\r\n{}\r\n", "a: b\r\n".repeat(1_000));
    let mut connection = Connection::open(house.public).await;
    connection.write(head.as_bytes()).await;
    let reply = connection.reply(false).await.expect("an answer");
    assert!(matches!(reply.status, 400 | 431), "{}", reply.status);
    assert!(!reply.code().is_empty());
    assert_eq!(house.simulator.connections(), 0);
}

// ---- HTTP/1.0

async fn raw(house: &House, text: &str) -> (String, Vec<u8>) {
    let mut connection = Connection::open(house.public).await;
    connection.write(text.as_bytes()).await;
    while connection.more().await {}
    let all = connection.unread;
    let end = all.windows(4).position(|window| window == b"\r\n\r\n").expect("a head") + 4;
    (String::from_utf8_lossy(&all[..end]).to_ascii_lowercase(), all[end..].to_vec())
}

#[tokio::test]
async fn http_1_0_gets_a_stream_without_chunks_that_ends_with_the_connection() {
    let house = House::open().await;
    let body = ask("tiny-story").to_string();
    for keep in ["", "Connection: keep-alive\r\n"] {
        let text = format!(
            "POST /api/chat HTTP/1.0\r\nAuthorization: Bearer {}\r\n{keep}Content-Length: {}\r\n\r\n{body}",
            house.token(),
            body.len()
        );
        let (head, body) = raw(&house, &text).await;
        assert!(head.starts_with("http/1.") && head.contains(" 200 "), "{head}");
        assert!(!head.contains("transfer-encoding"), "{head}");
        assert!(head.contains("connection: close"), "{head}");
        let lines: Vec<&[u8]> = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
        assert!(lines.len() > 3);
        for line in lines {
            serde_json::from_slice::<serde_json::Value>(line).expect("a record, and no chunk's size");
        }
    }
}

#[tokio::test]
async fn http_1_0_closes_after_a_reply_unless_asked_to_keep_the_connection() {
    let house = House::open().await;
    let start = format!("GET /api/version HTTP/1.0\r\nAuthorization: Bearer {}\r\n", house.token());
    let (head, body) = raw(&house, &format!("{start}\r\n")).await;
    assert!(head.contains(" 200 ") && body.starts_with(b"{"), "{head}");

    let mut connection = Connection::open(house.public).await;
    for _ in 0..2 {
        connection.write(format!("{start}Connection: keep-alive\r\n\r\n").as_bytes()).await;
        let reply = connection.reply(false).await.expect("the connection is kept");
        assert_eq!(reply.status, 200);
        assert!(reply.header("content-length").is_some(), "nothing else says where it ends");
    }
}

/// Pingora's own look for HTTP/2's preface waits for 24 bytes for ever.
#[tokio::test]
async fn short_requests_do_not_wait_for_a_preface() {
    let house = House::open().await;
    for text in ["GET / HTTP/1.0\r\n\r\n", "PUT / HTTP/1.0\r\n\r\n", "POST / HTTP/1.0\r\n\r\n", "P / HTTP/1.0\r\n\r\n"]
    {
        let (head, _) = raw(&house, text).await;
        assert!(head.contains(" 401 ") || head.contains(" 405 "), "{text:?}: {head}");
    }
    let (head, _) = raw(&house, "PRI / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert!(head.contains(" 405 "), "{head}");
}

#[tokio::test]
async fn half_of_a_preface_is_no_reason_to_wait_for_ever() {
    let house = House::with(limits("head_timeout_ms = 300")).await;
    for start in ["P", "PR", "PRI * HTTP/2.0\r\n", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"] {
        let mut connection = Connection::open(house.public).await;
        connection.write(start.as_bytes()).await;
        while connection.more().await {}
        assert!(connection.unread.is_empty() || connection.unread.starts_with(b"HTTP/1.1 4"), "{start:?}");
    }
}

// ---- methods

#[tokio::test]
async fn connect_opens_no_tunnel() {
    let house = House::open().await;
    for target in ["example.com:443", "proxy:80", "127.0.0.1:1", "/api/version"] {
        let text =
            format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nAuthorization: Bearer {}\r\n\r\n", house.token());
        let mut connection = Connection::open(house.public).await;
        connection.write(text.as_bytes()).await;
        let reply = connection.reply(false).await.expect("an answer");
        assert!(matches!(reply.status, 400 | 405), "{target}: {}", reply.status);
        assert!(connection.reply(false).await.is_none(), "closed");
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn an_upgrade_is_not_passed_on_and_the_request_is_an_ordinary_one() {
    let house = House::open().await;
    let websocket = Request::get("/api/version")
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    let h2c = chat(&house, "tiny").header("connection", "Upgrade, HTTP2-Settings").header("upgrade", "h2c");
    for request in [websocket.bearer(&house.token()), h2c.header("http2-settings", "AAMAAABkAAQAAP__")] {
        house.simulator.forget();
        let reply = house.send(request).await;
        assert_eq!(reply.status, 200);
        let seen = house.simulator.seen();
        assert_eq!(seen.len(), 1);
        for name in ["upgrade", "http2-settings", "sec-websocket-key", "sec-websocket-version"] {
            assert_eq!(seen[0].header(name), None, "{name}");
        }
    }
    // A backend that switches protocols all the same does not get through.
    let reply = house.send(chat(&house, "fault-informational-101")).await;
    assert_eq!((reply.status, reply.code()), (502, "bad_backend_reply".to_owned()));
}

#[tokio::test]
async fn head_is_answered_without_a_body_and_the_connection_is_kept() {
    let house = House::open().await;
    let mut connection = Connection::open(house.public).await;
    let head = |path: &str| Request::new("HEAD", path);
    for (request, status) in [
        (head("/").bearer(&house.token()), 200),
        (head("/api/version").bearer(&house.token()), 200),
        (head("/api/tags").bearer(&house.token()), 200),
        (head("/api/v1/ollama/").bearer(&house.token()), 200),
        (head("/"), 401),
        (head("/api/nothing").bearer(&house.token()), 404),
        (head("/api/chat").bearer(&house.token()), 405),
        (Request::get("/api/version").bearer(&house.token()), 200),
    ] {
        connection.send(&request).await;
        let reply = connection.reply(request.method == "HEAD").await.expect("the connection is kept");
        assert_eq!(reply.status, status, "{} {}", request.method, request.path);
        assert!(connection.unread.is_empty(), "no body");
    }
}

#[tokio::test]
async fn other_methods_are_refused_with_what_is_allowed() {
    let house = House::open().await;
    for method in ["OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "get", "GETX", "PROPFIND"] {
        let reply = house.send(Request::new(method, "/api/version").bearer(&house.token())).await;
        assert_eq!((reply.status, reply.code()), (405, "method_not_allowed".to_owned()), "{method}");
        assert_eq!(reply.header("allow"), Some("GET, HEAD"), "{method}");
    }
    let reply = house.send(Request::new("OPTIONS", "*").bearer(&house.token())).await;
    assert!(matches!(reply.status, 400 | 404), "{}", reply.status);
    assert_eq!(house.simulator.connections(), 0);
}

// ---- connections

#[tokio::test]
async fn a_connection_is_kept_after_every_kind_of_refusal_whose_body_was_read() {
    let policy = "package behavry.authz\ndeny contains \"no\" if input.model == \"mistral\"\nallow := true\n";
    let house = House::with(Plan { policy: vec![("p.rego", policy.into())], ..Plan::default() }).await;
    let token = house.token();
    let reader = house.token_with(&[], &["web:write"]);
    let refusals: [(Request, u16); 9] = [
        (Request::get("/api/version"), 401),
        (Request::get("/api/version").bearer("x"), 401),
        (Request::get("/api/version").bearer(&reader), 403),
        (Request::get("/api/nothing").bearer(&token), 404),
        (Request::get("/api/chat").bearer(&token), 405),
        (chat(&house, "mistral"), 403),
        (Request::post("/api/chat", json!([])).bearer(&token), 400),
        (Request::post("/api/chat", json!({ "model": "a b" })).bearer(&token), 400),
        (chat(&house, "fault-garbage-head"), 502),
    ];
    let mut connection = Connection::open(house.public).await;
    for (request, status) in &refusals {
        for (request, status) in [(request, *status), (&chat(&house, "tiny-story"), 200)] {
            connection.send(request).await;
            let reply = connection.reply(false).await.unwrap_or_else(|| panic!("{status}: the connection is kept"));
            assert_eq!((reply.status, reply.end), (status, End::Whole), "{} {}", request.method, request.path);
        }
    }
}

#[tokio::test]
async fn a_client_that_asks_for_it_has_its_connection_closed() {
    let house = House::open().await;
    for value in ["close", "Close", "keep-alive, close"] {
        let mut connection = Connection::open(house.public).await;
        connection.send(&chat(&house, "tiny-story").header("connection", value)).await;
        let reply = connection.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.end), (200, End::Whole));
        assert!(ends(&mut connection).await, "{value}");
    }
}

#[tokio::test]
async fn a_stream_whose_backend_dies_ends_with_an_error_and_the_connection_is_kept() {
    let house = House::open().await;
    let mut connection = Connection::open(house.public).await;
    for fault in ["fault-closes-mid-stream", "fault-resets-mid-stream"] {
        connection.send(&chat(&house, fault)).await;
        let reply = connection.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.end), (200, End::Whole), "clean framing");
        let last: serde_json::Value =
            serde_json::from_str(reply.lines().last().expect("a line")).expect("a record of its own");
        assert!(last["error"].is_string(), "{fault}");
        assert!(!reply.text().contains(r#""done":true"#));
        connection.send(&chat(&house, "tiny-story")).await;
        let next = connection.reply(false).await.expect("the connection is kept");
        assert!(next.text().contains(r#""done":true"#));
    }
}

/// More than three pieces on their way would fill Pingora's pipe, and nobody would look at the client any more.
#[tokio::test]
async fn a_client_that_leaves_while_the_backend_takes_no_body_is_noticed_every_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let backend = format!("http://{}", listener.local_addr().expect("bound"));
    let house = House::with(Plan { backend: Some(backend), ..Plan::default() }).await;
    let size = 16 << 20; // more than two kernels hold
    let body = format!(r#"{{"model":"tiny","prompt":"{}"}}"#, "x".repeat(size));
    for number in 0..6 {
        let id = format!("stuck-{number}");
        let request = Request::new("POST", "/api/generate").bearer(&house.token()).id(&id).body(body.clone());
        let mut client = Connection::open(house.public).await;
        client.write(&request.head_bytes()).await;
        client.write(&request.body_bytes()).await;
        let (mut stuck, _) = timeout(PATIENCE, listener.accept()).await.expect("in time").expect("a connection");
        let mut first = [0u8; 16];
        timeout(PATIENCE, stuck.read_exact(&mut first)).await.expect("in time").expect("its head");
        drop(client);
        // It reads nothing more until the proxy has settled.
        assert_eq!(house.final_of(&id).await["extra"]["outcome"], "client_abort");
        let mut taken = 0;
        let mut scratch = vec![0u8; 1 << 20];
        while let Ok(n @ 1..) = timeout(PATIENCE, stuck.read(&mut scratch)).await.expect("in time") {
            taken += n;
        }
        assert!(taken < size, "the body was cut");
    }
}

// ---- h2c

#[tokio::test]
async fn an_http_2_stream_comes_as_it_is_made() {
    let house = House::open().await;
    let mut h2 = H2::open(house.public).await;
    let asked = h2.ask(&chat(&house, "fault-stalls-mid-stream-4"), None).await;
    let h2_client::Asked { reply, mut body } = asked;
    h2_client::write(&mut body, chat(&house, "fault-stalls-mid-stream-4").body_bytes().into()).await;
    let reply = timeout(PATIENCE, reply).await.expect("in time").expect("a reply");
    assert_eq!(reply.status(), 200);
    let mut reply = reply.into_body();
    let mut text = Vec::new();
    while text.iter().filter(|byte| **byte == b'\n').count() < 4 {
        // The backend stays silent behind these, so that they can only come if nothing is held back.
        text.extend_from_slice(&h2_client::next(&mut reply).await.expect("more").expect("good"));
    }
    let whole = h2.send(&chat(&house, "tiny-story")).await;
    assert_eq!((whole.status, whole.end), (200, End::Whole));
    assert!(whole.text().contains(r#""done":true"#));
}

#[tokio::test]
async fn many_http_2_streams_run_at_once_over_one_connection() {
    let house = House::open().await;
    let h2 = H2::open(house.public).await;
    let stalled = chat(&house, "fault-stalls-mid-stream");
    let mut waiting = Vec::new();
    for _ in 0..10 {
        let mut own = h2.again();
        let h2_client::Asked { reply, mut body } = own.ask(&stalled, None).await;
        h2_client::write(&mut body, stalled.body_bytes().into()).await;
        waiting.push(timeout(PATIENCE, reply).await.expect("in time").expect("a reply")); // and it stays open
    }
    let all = (0..20).map(|number| {
        let mut own = h2.again();
        let request =
            chat(&house, if number % 2 == 0 { "tiny-story" } else { "mistral" }).id(&format!("many-{number}"));
        async move { own.send(&request).await }
    });
    for (number, reply) in futures::future::join_all(all).await.into_iter().enumerate() {
        assert_eq!((reply.status, reply.end), (200, End::Whole));
        assert_eq!(reply.header("x-request-id"), Some(format!("many-{number}").as_str()));
        let model = if number % 2 == 0 { "tiny-story" } else { "mistral" };
        assert!(reply.lines().iter().all(|line| line.contains(model)), "no stream gets another's records");
    }
    assert_eq!(house.simulator.seen().len(), 30);
}

#[tokio::test]
async fn a_reset_http_2_stream_cancels_the_backend_and_no_other_stream() {
    let house = House::open().await;
    let mut h2 = H2::open(house.public).await;
    for model in ["fault-stalls-mid-stream", "fault-hangs-before-headers", "tiny-slow"] {
        house.simulator.forget();
        let id = format!("reset-{model}");
        let request = chat(&house, model).id(&id);
        let h2_client::Asked { reply, mut body } = h2.ask(&request, None).await;
        h2_client::write(&mut body, request.body_bytes().into()).await;
        house.simulator.wait_for(PATIENCE, |seen| seen.iter().any(|seen| seen.body_whole)).await.expect("it has begun");
        if model != "fault-hangs-before-headers" {
            let reply = timeout(PATIENCE, reply).await.expect("in time").expect("a reply");
            let mut reply = reply.into_body();
            h2_client::next(&mut reply).await.expect("more").expect("good");
            body.send_reset(h2::Reason::CANCEL);
        } else {
            body.send_reset(h2::Reason::CANCEL);
            drop(reply);
        }
        let seen = house.simulator.wait_for(PATIENCE, |seen| seen.iter().all(|seen| seen.ended.is_some())).await;
        assert_eq!(seen.expect("it was cancelled")[0].ended_how, Some(Ending::ClientGone), "{model}");
        assert_eq!(house.final_of(&id).await["extra"]["outcome"], "client_abort", "{model}");
        assert_eq!(h2.send(&chat(&house, "tiny-story")).await.status, 200, "the connection goes on");
    }
}

#[tokio::test]
async fn http_2_refusals_leave_the_connection_in_use() {
    let house = House::open().await;
    let mut h2 = H2::open(house.public).await;
    for (request, status) in [
        (Request::get("/api/version"), 401),
        (Request::get("/api/nothing").bearer(&house.token()), 404),
        (Request::new("PUT", "/api/version").bearer(&house.token()), 405),
        (Request::post("/api/chat", json!([])).bearer(&house.token()), 400),
        (Request::new("HEAD", "/api/version").bearer(&house.token()), 200),
        (Request::get("/api/version").bearer(&house.token()), 200),
    ] {
        let reply = h2.send(&request).await;
        assert_eq!((reply.status, reply.end), (status, End::Whole), "{} {}", request.method, request.path);
        assert!(reply.header("connection").is_none() && reply.header("transfer-encoding").is_none());
    }
}

// ---- panics

fn assert_is_500(reply: &Reply, hook: &str) {
    assert_eq!((reply.status, reply.code()), (500, "internal_error".to_owned()), "{hook}");
    assert_eq!(reply.end, End::Whole, "{hook}");
    assert!(!reply.text().contains("canary"), "the panic's words are nobody's business");
}

#[tokio::test]
async fn a_panic_before_the_reply_is_answered_with_500() {
    let bare = BareDoor::open().await;
    let mut h2 = H2::open(bare.address).await;
    for hook in ["request_filter", "upstream_peer", "upstream_request_filter", "response_filter"] {
        let request = BareDoor::chat(hook).id(&format!("h1-{hook}"));
        let mut connection = Connection::open(bare.address).await;
        connection.send(&request).await;
        assert_is_500(&connection.reply(false).await.expect("an answer"), hook);
        assert!(connection.reply(false).await.is_none(), "{hook}: closed, since nobody knows what was read");
        assert_is_500(&h2.send(&BareDoor::chat(hook).id(&format!("h2-{hook}"))).await, hook);
        for protocol in ["h1", "h2"] {
            let last = bare.final_of(&format!("{protocol}-{hook}")).await;
            assert_eq!(last["extra"]["outcome"], "internal_error");
            assert_eq!(last["response_code"], 500);
            assert!(!last.to_string().contains("canary"));
        }
    }
    let metrics = bare.metrics();
    let panics = metrics.lines().find(|line| line.starts_with("behavry_ollama_") && line.contains("panic"));
    assert!(panics.is_some_and(|line| line.ends_with(" 8")), "{panics:?}");
    let after = h2.send(&BareDoor::chat("nowhere")).await;
    assert!(after.text().contains(r#""done":true"#), "others are served as before");
    assert_eq!(bare.site.live.running(), 0, "nothing is left behind");
}

#[tokio::test]
async fn a_panic_in_mid_stream_ends_the_stream_with_an_error() {
    let bare = BareDoor::open().await;
    let mut h2 = H2::open(bare.address).await;
    for hook in ["response_body_filter", "end_of_body"] {
        let h1 = BareDoor::chat(hook).id(&format!("mid-h1-{hook}")).send(bare.address).await;
        let h2 = h2.send(&BareDoor::chat(hook).id(&format!("mid-h2-{hook}"))).await;
        for reply in [&h1, &h2] {
            assert_eq!((reply.status, reply.end), (200, End::Whole), "{hook}: clean framing");
            let lines = reply.lines();
            assert!(lines.len() > 2, "{hook}: what came before is there");
            let last: serde_json::Value = serde_json::from_str(lines.last().expect("a line")).expect("a record");
            assert!(last["error"].is_string(), "{hook}: a cut stream never looks complete");
            assert!(!reply.text().contains("canary"));
        }
        for protocol in ["h1", "h2"] {
            let last = bare.final_of(&format!("mid-{protocol}-{hook}")).await;
            assert_eq!(last["extra"]["outcome"], "internal_error", "{hook}");
        }
    }
}

#[tokio::test]
async fn a_panic_after_the_reply_harms_neither_the_reply_nor_the_next_request() {
    let bare = BareDoor::open().await;
    for _ in 0..2 {
        let reply = BareDoor::chat("logging").send(bare.address).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole));
        assert!(reply.text().trim_end().ends_with('}') && reply.text().contains(r#""done":true"#));
    }
    let mut h2 = H2::open(bare.address).await;
    for _ in 0..2 {
        let reply = h2.send(&BareDoor::chat("logging")).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole));
        assert!(reply.text().contains(r#""done":true"#));
    }
}
