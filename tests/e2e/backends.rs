//! A backend that misbehaves: each way has one documented outcome, for the client and in the record.

use std::time::{Duration, Instant};

use behavry_ollama_proxy::simulator::{Fault, Seen};
use serde_json::{Value, json};

use crate::client::{Connection, End, Reply, Request};
use crate::house::{House, Plan, until_tried};
use crate::puppet::Puppet;

const PATHS: [&str; 2] = ["/api/chat", "/v1/chat/completions"];

fn chat(model: &str, stream: bool) -> Value {
    json!({ "model": model, "stream": stream, "messages": [{ "role": "user", "content": "hi" }] })
}

/// What a client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Status and code of an answer of ours.
    Refusal(u16, &'static str),
    /// The backend's own reply, of this status.
    Reply(u16),
    /// 200, and at the end of the stream an error frame with this code; the connection goes on.
    Frame(&'static str),
}

/// One fault: what is told where a stream was asked for and where not; then the record's outcome, `upstream_status`, and `error`.
struct Row(&'static str, Told, Told, &'static str, Option<u16>, Option<&'static str>);

const OK: Told = Told::Reply(200);
const BAD: Told = Told::Refusal(502, "bad_backend_reply");
const TIMEOUT: Told = Told::Refusal(504, "backend_timeout");
const CUT: Told = Told::Frame("bad_backend_reply");
const BROKE_OFF: &str = "the backend broke off";
const HEAD: &str = "the reply's head could not be understood";
const NO_REPLY: &str = "the backend closed the connection without a reply";
const NO_END: &str = "the backend's reply has no end";
const AN_ERROR: &str = "the backend answered with an error";

const ROWS: &[Row] = &[
    Row("hangs-before-headers", TIMEOUT, TIMEOUT, "timeout", None, Some("backend_timeout")),
    Row("closes-before-headers", BAD, BAD, "upstream_error", None, Some(NO_REPLY)),
    Row("resets-before-headers", BAD, BAD, "upstream_error", None, Some("the backend broke off before its reply")),
    Row("closes-in-head", BAD, BAD, "upstream_error", None, Some(NO_REPLY)),
    Row("garbage-head", BAD, BAD, "upstream_error", None, Some(HEAD)),
    Row("huge-head", BAD, BAD, "upstream_error", None, Some(HEAD)),
    Row("stalls-mid-stream", Told::Frame("backend_timeout"), TIMEOUT, "timeout", Some(200), Some("backend_timeout")),
    Row("resets-mid-stream", CUT, BAD, "upstream_reset", Some(200), Some(BROKE_OFF)),
    Row("closes-mid-stream", CUT, BAD, "upstream_reset", Some(200), Some(BROKE_OFF)),
    Row("no-terminal", CUT, BAD, "upstream_error", Some(200), Some(NO_END)),
    Row("drips-0", OK, OK, "complete", Some(200), None),
    Row("503-queue-full", Told::Reply(503), Told::Reply(503), "upstream_error", Some(503), Some(AN_ERROR)),
    Row("500-error", Told::Reply(500), Told::Reply(500), "upstream_error", Some(500), Some(AN_ERROR)),
    Row("404-model", Told::Reply(404), Told::Reply(404), "complete", Some(404), None),
    Row("two-replies", OK, OK, "complete", Some(200), None),
    Row("informational", OK, OK, "complete", Some(200), None),
    Row("informational-100", OK, OK, "complete", Some(200), None),
    Row("informational-101", BAD, BAD, "upstream_error", Some(101), Some("the backend switches protocols")),
    Row("redirect", BAD, BAD, "upstream_error", Some(302), Some("the backend redirects")),
    Row("compressed", BAD, BAD, "upstream_error", Some(200), Some("the reply is encoded, though that was declined")),
    Row("html", BAD, BAD, "upstream_error", Some(200), Some("the reply is not of the type that Ollama gives")),
    // Whole replies either way, since a stream has no length.
    Row("wrong-content-length-10", BAD, BAD, "upstream_reset", Some(200), Some(BROKE_OFF)),
    Row("wrong-content-length--10", BAD, BAD, "upstream_error", Some(200), Some(NO_END)),
];

#[tokio::test]
async fn each_fault_of_a_backend_has_one_outcome() {
    let (silent, others): (Vec<&Row>, Vec<&Row>) = ROWS.iter().partition(|row| row.3 == "timeout");
    // Long enough that no other than the silent ones is taken for silent, and that a head is there before it.
    for (rows, silence_s) in [(silent, 5), (others, 300)] {
        let house = House::with(Plan {
            config: format!("[backend_timeouts]\nsilence_s = {silence_s}"),
            env: vec![("RUST_LOG".to_owned(), "trace".to_owned())],
            ..Plan::default()
        })
        .await;
        let house = &house;
        let each = rows.into_iter().flat_map(|row| {
            PATHS.iter().flat_map(move |path| [true, false].map(|stream| one_fault(house, row, path, stream)))
        });
        futures::future::join_all(each).await;
        // A wrong service's words are nobody's.
        for words in ["no HTTP", "It works", "another service", "websocket", "localhost:1/elsewhere"] {
            assert!(!house.log().contains(words), "{words}");
        }
    }
}

async fn one_fault(house: &House, row: &Row, path: &str, stream: bool) {
    let Row(fault, streamed, whole, outcome, upstream_status, error) = row;
    let what = format!("{fault} {path} stream={stream}");
    let id = what.replace(['/', ' '], ".");
    let mut client = Connection::open(house.public).await;
    let body = chat(&format!("fault-{fault}"), stream);
    client.send(&Request::post(path, body).bearer(&house.token()).id(&id)).await;
    let reply = client.reply(false).await.unwrap_or_else(|| panic!("{what}: no reply"));
    let told = if stream { *streamed } else { *whole };
    let v1 = path.starts_with("/v1");
    match told {
        Told::Refusal(status, code) => {
            assert_eq!((reply.status, reply.code().as_str(), reply.end), (status, code, End::Whole), "{what}");
            let body = reply.json();
            assert_eq!(body["error"].is_object(), v1, "{what}: in the caller's dialect");
            assert!(body["detail"].is_string(), "{what}");
        }
        Told::Reply(status) => assert_eq!((reply.status, reply.end), (status, End::Whole), "{what}"),
        Told::Frame(code) => {
            assert_eq!((reply.status, reply.end), (200, End::Whole), "{what}");
            error_frame(&reply, v1, code, &what);
        }
    }
    // What was said was all of it, and the connection can be used again.
    client.send(&Request::get("/api/version").bearer(&house.token())).await;
    let next = client.reply(false).await.unwrap_or_else(|| panic!("{what}: the connection is of no further use"));
    assert_eq!((next.status, next.json()["version"].is_string()), (200, true), "{what}");
    assert!(reply.header("location").is_none() && reply.header("upgrade").is_none(), "{what}");
    let record = house.final_of(&id).await;
    assert_eq!(record["extra"]["outcome"], *outcome, "{what}");
    assert_eq!(record["extra"]["upstream_status"], json!(upstream_status), "{what}");
    assert_eq!(record["error"], json!(error), "{what}");
    assert_eq!(record["response_code"], reply.status, "{what}");
    assert_eq!(record["extra"]["retries"], 0, "{what}");
    if *outcome != "complete" && !fault.starts_with("wrong") {
        assert_eq!(record["extra"]["output_tokens"], Value::Null, "{what}");
    }
}

/// The last record is an error in the stream's own dialect, and everything before it is whole.
fn error_frame(reply: &Reply, v1: bool, code: &str, what: &str) {
    let lines = reply.lines();
    let (last, before) = lines.split_last().unwrap_or_else(|| panic!("{what}: nothing came"));
    let data = |line: &str| {
        let line = if v1 { line.strip_prefix("data: ").expect("an event") } else { line };
        serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{what}: {e}"))
    };
    for line in before {
        assert!(data(line)["error"].is_null(), "{what}");
    }
    let error = &data(last)["error"];
    match v1 {
        true => assert_eq!(error["code"], code, "{what}"),
        false => assert!(error.is_string(), "{what}"),
    }
    let text = reply.text();
    assert!(text.ends_with(if v1 { "\n\n" } else { "}\n" }), "{what}");
    assert!(!text.contains("[DONE]") && !text.contains("\"done\":true"), "{what}: it looks complete");
    assert!(v1 || !text.contains("\n\n"), "{what}: an empty line makes ollama-python stop before the error");
}

#[tokio::test]
async fn a_backend_that_is_down_is_a_502_with_s0s_words_until_it_is_up_again() {
    let house = House::open().await;
    assert_eq!(house.post("/api/chat", chat("llama3.2", false)).await.status, 200);
    assert!(house.metrics().await.contains("behavry_ollama_backend_up{backend=\"ollama\"} 1\n"));
    house.simulator.stop().await;
    let words = format!("Cannot reach Ollama at {}. Is it running?", house.simulator.url());
    for (id, request) in [
        ("chat", Request::post("/api/chat", chat("llama3.2", true))),
        ("v1", Request::post("/v1/chat/completions", chat("llama3.2", true))),
        ("list", Request::get("/api/tags")),
        ("version", Request::get("/api/version")),
    ] {
        let reply = house.send(request.bearer(&house.token()).id(id)).await;
        assert_eq!((reply.status, reply.code()), (502, "backend_unreachable".to_owned()), "{id}");
        let body = reply.json();
        assert_eq!(body["detail"], words, "{id}");
        assert_eq!(if id == "v1" { &body["error"]["message"] } else { &body["error"] }, &words, "{id}");
        let record = house.final_of(id).await;
        assert_eq!(record["extra"]["outcome"], "upstream_error", "{id}");
        assert_eq!(record["extra"]["upstream_status"], Value::Null, "{id}");
        assert_eq!(record["error"], "backend_unreachable", "{id}");
        assert_eq!(record["policy_result"], "allow", "{id}");
        assert_eq!(house.records_of(id).await.len(), 2, "{id}: a request and a final record");
    }
    assert!(house.metrics().await.contains("behavry_ollama_backend_up{backend=\"ollama\"} 0\n"));
    house.simulator.restart().await.expect("its port was kept");
    assert_eq!(house.post("/api/chat", chat("llama3.2", false)).await.status, 200);
    assert!(house.metrics().await.contains("behavry_ollama_backend_up{backend=\"ollama\"} 1\n"));
}

#[tokio::test]
async fn a_backends_password_is_sent_to_it_and_shown_to_nobody() {
    let puppet = Puppet::listen().await;
    let backend = puppet.url().replace("http://", "http://someone:wholesale@");
    let house = House::with(Plan { backend: Some(backend), ..Plan::default() }).await;
    let answered = async {
        let mut hand = puppet.accept().await;
        let request = hand.request().await;
        assert!(request.to_ascii_lowercase().contains("authorization: basic "));
        assert!(request.contains("c29tZW9uZTp3aG9sZXNhbGU=")); // base64 of the two
        hand.answer("200 OK", "{\"version\":\"1\"}").await;
    };
    let (reply, ()) = tokio::join!(house.get("/api/version"), answered);
    assert_eq!(reply.status, 200);
    let shown = puppet.url();
    let _port = puppet.leave(); // nobody else may listen there in the meantime
    let request = Request::post("/api/chat", chat("llama3.2", true)).bearer(&house.token()).id("down");
    let reply = house.send(request).await;
    assert_eq!((reply.status, reply.code()), (502, "backend_unreachable".to_owned()));
    assert!(reply.text().contains(&format!("at {shown}. ")), "the address without user and password");
    house.final_of("down").await;
    let records = house.audit_text();
    for text in [reply.text(), records, house.log(), house.metrics().await] {
        assert!(!text.contains("wholesale") && !text.contains("c29tZW9uZTp3aG9sZXNhbGU"));
    }
}

/// Where the name's first address is `::1`, nobody listens there.
#[tokio::test]
async fn a_backend_called_localhost_is_found_at_whichever_address_answers() {
    let house = House::open().await;
    let backend = format!("http://localhost:{}", house.simulator.addr().port());
    let second = House::with(Plan { backend: Some(backend), ..Plan::default() }).await;
    for _ in 0..2 {
        assert_eq!(second.post("/api/chat", chat("llama3.2", false)).await.status, 200);
        assert_eq!(second.get("/api/tags").await.status, 200);
    }
}

#[tokio::test]
async fn a_backend_whose_name_does_not_resolve_is_unreachable() {
    let backend = "http://no-such-host.invalid:11434";
    let house = House::with(Plan { backend: Some(backend.to_owned()), ..Plan::default() }).await;
    for (id, request) in [("chat", Request::post("/api/chat", chat("m", true))), ("list", Request::get("/v1/models"))] {
        let reply = house.send(request.bearer(&house.token()).id(id)).await;
        assert_eq!((reply.status, reply.code()), (502, "backend_unreachable".to_owned()), "{id}");
        assert!(reply.text().contains(&format!("Cannot reach Ollama at {backend}. Is it running?")), "{id}");
        assert_eq!(house.final_of(id).await["extra"]["outcome"], "upstream_error", "{id}");
    }
}

#[tokio::test]
async fn an_early_400_is_seen_by_a_client_that_is_still_sending_20_mib() {
    let house = House::open().await;
    house.simulator.set_fault(Some(Fault::Early400 { keep: true })).await.expect("nothing to open");
    let body = json!({ "model": "llama3.2", "prompt": "a".repeat(20 << 20) });
    for id in ["first", "again"] {
        let reply = house.send(Request::post("/api/generate", body.clone()).bearer(&house.token()).id(id)).await;
        assert_eq!((reply.status, reply.text().as_str()), (400, "{\"error\":\"refused before the body was read\"}"));
        let record = house.final_of(id).await;
        assert_eq!((&record["response_code"], &record["extra"]["outcome"]), (&json!(400), &json!("complete")));
    }
    // The backend may also close at once, and its reset overtake its words: then it is a 502, and never a hang.
    house.simulator.set_fault(Some(Fault::Early400 { keep: false })).await.expect("nothing to open");
    let reply = house.send(Request::post("/api/generate", body).bearer(&house.token()).id("cut")).await;
    assert!(matches!(reply.status, 400 | 502), "{}", reply.status);
    assert_eq!(house.final_of("cut").await["response_code"], reply.status);
}

fn chats(seen: &[Seen], path: &str) -> usize {
    seen.iter().filter(|seen| seen.target == path).count()
}

#[tokio::test]
async fn inference_on_a_connection_that_had_died_is_sent_again_and_nobody_notices() {
    let house = House::open().await;
    let large = json!({ "model": "llama3.2", "prompt": "a".repeat(300_000) });
    for (id, path, body) in [
        ("small", "/api/chat", chat("llama3.2", true)),
        ("large", "/api/generate", large),
        ("v1", "/v1/chat/completions", chat("llama3.2", true)), // its body is rewritten
    ] {
        house.simulator.set_fault(None).await.expect("nothing to open");
        assert_eq!(house.post("/api/chat", chat("llama3.2", false)).await.status, 200); // leaves a connection behind
        house.simulator.forget();
        house.simulator.set_fault_times(Fault::ClosesOnReuse, 1).await.expect("nothing to open");
        let reply = house.send(Request::post(path, body.clone()).bearer(&house.token()).id(id)).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        let record = house.final_of(id).await;
        assert_eq!(record["extra"]["retries"], 1, "{id}");
        assert_eq!((&record["extra"]["outcome"], &record["error"]), (&json!("complete"), &Value::Null), "{id}");
        let seen = house.simulator.seen();
        assert_eq!(chats(&seen, path), 2, "{id}: the dead connection and a new one");
        assert_ne!(seen[0].connection_id, seen[1].connection_id, "{id}");
        assert!(seen[1].body_whole, "{id}");
        if id != "v1" {
            assert_eq!(seen[1].body_bytes as usize, body.to_string().len(), "{id}");
        }
    }
}

#[tokio::test]
async fn management_on_a_connection_that_had_died_is_not_sent_again() {
    let house = House::open().await;
    let admin = house.token_with(&[], &["web:read", "web:write", "ollama:admin"]);
    assert_eq!(house.post("/api/chat", chat("llama3.2", false)).await.status, 200); // leaves a connection behind
    house.simulator.set_fault_everywhere(Fault::ClosesOnReuse).await.expect("nothing to open");
    let copy = json!({ "source": "llama3.2", "destination": "other" });
    let request = Request::post("/api/copy", copy).bearer(&admin);
    // A connection goes back a moment after the reply that it brought, so one that comes early is served on a new one.
    let mut sent = 0;
    let reply = loop {
        sent += 1;
        let reply = house.send(request.clone().id(&format!("copy-{sent}"))).await;
        if reply.status != 200 || sent == 50 {
            break reply;
        }
    };
    assert_eq!((reply.status, reply.code()), (502, "bad_backend_reply".to_owned()));
    assert_eq!(chats(&house.simulator.seen(), "/api/copy"), sent);
    let record = house.final_of(&format!("copy-{sent}")).await;
    assert_eq!((&record["extra"]["retries"], &record["extra"]["outcome"]), (&json!(0), &json!("upstream_error")));
}

#[tokio::test]
async fn connections_that_a_restart_killed_are_not_used() {
    let house = House::open().await;
    let ask = || house.post("/api/chat", chat("tiny-story", true));
    for _ in 0..3 {
        futures::future::join_all((0..8).map(|_| ask())).await;
        house.simulator.stop().await;
        house.simulator.restart().await.expect("its port was kept");
        for reply in futures::future::join_all((0..8).map(|_| ask())).await {
            assert_eq!((reply.status, reply.end), (200, End::Whole));
        }
    }
    house.simulator.set_fault(Some(Fault::ClosesIdleConnections { after_ms: 0 })).await.expect("nothing to open");
    for _ in 0..20 {
        assert_eq!(ask().await.status, 200);
    }
}

const EXTRA: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n{\"stolen\":\"reply\"}";

/// Whoever asks next must not get what the one before did not ask for.
#[tokio::test]
async fn bytes_behind_a_reply_reach_nobody() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
    let whole = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{\"version\":\"1\"}";
    let chunked = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n\
                   f\r\n{\"version\":\"1\"}\r\n0\r\n\r\n";
    let mut client = Connection::open(house.public).await;
    let request = Request::get("/api/version").bearer(&house.token());
    for (number, reply) in [whole, chunked].into_iter().enumerate() {
        for later in [false, true] {
            let what = format!("reply {number}, later: {later}");
            client.send(&request).await;
            let mut hand = puppet.accept().await; // never the connection of before
            hand.request().await;
            if later {
                hand.say(reply).await;
                assert_eq!(client.reply(false).await.expect("a reply").text(), "{\"version\":\"1\"}", "{what}");
                hand.say(EXTRA).await; // into the pool
            } else {
                hand.say([reply, EXTRA].concat()).await;
                assert_eq!(client.reply(false).await.expect("a reply").text(), "{\"version\":\"1\"}", "{what}");
            }
            assert!(client.unread.is_empty(), "{what}");
        }
    }
    client.send(&request).await;
    let mut hand = puppet.accept().await;
    hand.request().await;
    hand.say(whole).await;
    assert_eq!(client.reply(false).await.expect("a reply").text(), "{\"version\":\"1\"}");
}

#[tokio::test]
async fn broken_framing_in_a_reply_never_looks_complete() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
    let stream = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n";
    let record = "{\"done\":false}\n";
    for (id, reply) in [
        ("no-number", format!("{stream}f\r\n{record}\r\nzz\r\nnonsense\r\n")),
        ("too-long", format!("{stream}f\r\n{record}\r\nfffffffffffffffffffff\r\n{record}\r\n")),
        ("half-a-record", format!("{stream}5\r\n{{\"don\r\n")),
    ] {
        let mut client = Connection::open(house.public).await;
        client.send(&Request::post("/api/chat", chat("m", true)).bearer(&house.token()).id(id)).await;
        let mut hand = puppet.accept().await;
        hand.request().await;
        hand.say(reply).await;
        drop(hand);
        let reply = client.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        let lines = reply.lines();
        let error: Value = serde_json::from_str(lines.last().expect("lines")).expect("a line of its own");
        assert!(error["error"].is_string(), "{id}");
        assert_eq!(lines.len(), 2, "{id}: what came, and the error");
        assert_eq!(house.final_of(id).await["extra"]["outcome"], "upstream_reset", "{id}");
    }
}

/// A list is read whole before it is shown.
#[tokio::test]
async fn a_list_that_a_backend_spoils_is_a_502_or_504() {
    let silent = House::with(Plan { config: "[backend_timeouts]\nsilence_s = 1".to_owned(), ..Plan::default() }).await;
    let patient = House::open().await;
    for (fault, status, code, outcome) in [
        (Fault::HangsBeforeHeaders, 504, "backend_timeout", "timeout"),
        (Fault::StallsMidStream { after: 1 }, 504, "backend_timeout", "timeout"),
        (Fault::ClosesBeforeHeaders, 502, "bad_backend_reply", "upstream_error"),
        (Fault::ResetsMidStream { after: 1 }, 502, "bad_backend_reply", "upstream_error"),
        (Fault::ClosesMidStream { after: 1 }, 502, "bad_backend_reply", "upstream_error"),
        (Fault::GarbageHead, 502, "bad_backend_reply", "upstream_error"),
        (Fault::HugeHead { size_bytes: 2 << 20 }, 502, "bad_backend_reply", "upstream_error"),
        (Fault::Html, 502, "bad_backend_reply", "upstream_error"),
        (Fault::Compressed, 502, "bad_backend_reply", "upstream_error"),
        (Fault::Redirect { location: "http://localhost:1/".to_owned() }, 502, "bad_backend_reply", "upstream_error"),
        (Fault::Informational { status: 101 }, 502, "bad_backend_reply", "upstream_error"),
        (Fault::WrongContentLength { difference: 10 }, 502, "bad_backend_reply", "upstream_error"),
    ] {
        let what = format!("{fault:?}");
        let id = what.split([' ', '{']).next().expect("a name").to_owned() + &status.to_string();
        let house = if outcome == "timeout" { &silent } else { &patient };
        house.simulator.set_fault_everywhere(fault).await.expect("nothing to open");
        let reply = house.send(Request::get("/api/tags").bearer(&house.token()).id(&id)).await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{what}");
        assert_eq!(house.final_of(&id).await["extra"]["outcome"], outcome, "{what}");
    }
    let house = patient;
    for fault in [Fault::Informational { status: 103 }, Fault::TwoReplies, Fault::Drips { pause_ms: 0 }] {
        let what = format!("{fault:?}");
        house.simulator.set_fault_everywhere(fault).await.expect("nothing to open");
        for _ in 0..2 {
            let reply = house.get("/api/tags").await;
            assert_eq!(reply.status, 200, "{what}");
            assert!(reply.json()["models"].is_array(), "{what}");
        }
    }
}

/// Nobody's silence is the client's: the time begins anew with every byte.
#[tokio::test]
async fn silence_is_counted_between_bytes_and_not_over_the_whole_reply() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan {
        config: "[backend_timeouts]\nsilence_s = 2".to_owned(),
        backend: Some(puppet.url()),
        ..Plan::default()
    })
    .await;
    let mut tries = 0;
    until_tried("a stream without a pause", async || {
        tries += 1;
        let id = format!("slow-{tries}");
        let mut client = Connection::open(house.public).await;
        client.send(&Request::post("/api/chat", chat("m", true)).bearer(&house.token()).id(&id)).await;
        let mut hand = puppet.accept().await;
        hand.request().await;
        hand.open_stream("application/x-ndjson").await;
        let (began, mut last, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
        while began.elapsed() < Duration::from_millis(2500) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            longest = longest.max(last.elapsed());
            if longest > Duration::from_millis(1500) {
                return None; // the machine was silent, and not the backend's reply
            }
            hand.chunk(b"{\"done\":false}\n").await;
            last = Instant::now();
        }
        hand.chunk(b"{\"done\":true,\"done_reason\":\"stop\"}\n").await;
        hand.say("0\r\n\r\n").await;
        let reply = client.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.end), (200, End::Whole), "the longest pause was {longest:?}");
        assert_eq!(house.final_of(&id).await["extra"]["outcome"], "complete");
        Some(())
    })
    .await;
}

#[tokio::test]
async fn what_a_401_says_of_the_backends_own_machine_is_taken_out() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
    let leak = r#"{"error":"unauthorized","signin_url":"https://ollama.com/connect?name=HOST-CANARY&key=KEY-CANARY"}"#;
    for path in ["/api/chat", "/v1/chat/completions", "/v1/messages"] {
        let body = json!({ "model": "tiny", "max_tokens": 9, "messages": [{ "role": "user", "content": "hi" }] });
        let (request, public) = (Request::post(path, body).bearer(&house.token()).id(path), house.public);
        let asking = tokio::spawn(async move { request.send(public).await });
        let mut hand = puppet.accept().await;
        hand.request().await;
        hand.answer("401 Unauthorized", leak).await;
        let reply = asking.await.expect("sent");
        assert_eq!((reply.status, reply.end), (401, End::Whole), "{path}");
        assert_eq!(reply.json(), json!({ "error": "unauthorized" }), "{path}");
        assert_eq!(house.final_of(path).await["response_code"], 401, "{path}");
    }
    assert!(!(house.log() + &house.audit_text()).contains("CANARY"));
}

#[tokio::test]
async fn a_backends_advice_when_to_come_again_reaches_the_client() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
    let body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }] });
    let (request, public) = (Request::post("/v1/chat/completions", body).bearer(&house.token()), house.public);
    let asking = tokio::spawn(async move { request.send(public).await });
    let mut hand = puppet.accept().await;
    hand.request().await;
    hand.answer("429 Too Many Requests\r\nRetry-After: 7\r\nSet-Cookie: a=b", r#"{"error":{"message":"slow down"}}"#)
        .await;
    let reply = asking.await.expect("sent");
    assert_eq!((reply.status, reply.header("retry-after"), reply.header("set-cookie")), (429, Some("7"), None));
}
