//! The end of the process: what runs may finish for a while, then it is cut with an error; every record is written.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::client::{Connection, End, Request};
use crate::house::{House, PATIENCE, Plan};
use crate::puppet::{Hand, Puppet};

fn chat(stream: bool) -> Value {
    json!({ "model": "m", "stream": stream, "messages": [{ "role": "user", "content": "hi" }] })
}

async fn house(puppet: &Puppet, drain_s: u32) -> House {
    let config = format!("[shutdown]\ndrain_s = {drain_s}");
    House::with(Plan { config, backend: Some(puppet.url()), ..Plan::default() }).await
}

/// A stream that has begun: its client has the first record.
async fn running(house: &House, puppet: &Puppet, path: &str, id: &str) -> (Connection, Hand) {
    let mut client = Connection::open(house.public).await;
    client.send(&Request::post(path, chat(true)).bearer(&house.token()).id(id)).await;
    let mut hand = puppet.accept().await;
    hand.request().await;
    if path.starts_with("/v1") {
        hand.open_stream("text/event-stream").await;
        hand.chunk(b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n").await;
    } else {
        hand.open_stream("application/x-ndjson").await;
        hand.chunk(b"{\"message\":{\"content\":\"a\"},\"done\":false}\n").await;
    }
    assert_eq!(client.head().await.expect("a head").0, 200);
    client.chunk().await.expect("not the end").expect("the first record");
    (client, hand)
}

async fn refuses_connections(house: &House) {
    let began = Instant::now();
    while TcpStream::connect(house.public).await.is_ok() {
        assert!(began.elapsed() < PATIENCE, "it still listens");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// One final record for each request, and nothing else by that name.
fn finals(house: &House) -> Vec<Value> {
    let mut finals: Vec<Value> =
        house.records().into_iter().filter(|record| record["extra"]["phase"] == "final").collect();
    let ids = |records: &[Value]| -> Vec<String> {
        records.iter().map(|record| record["extra"]["request_id"].to_string()).collect()
    };
    finals.sort_by_key(|record| record["extra"]["request_id"].to_string());
    let mut unique = ids(&finals);
    unique.dedup();
    assert_eq!(ids(&finals), unique, "a request with two final records");
    finals
}

#[tokio::test]
async fn a_running_stream_finishes_after_sigterm_or_sigint_and_no_new_one_begins() {
    for (signal, name) in [(libc::SIGTERM, "SIGTERM"), (libc::SIGINT, "SIGINT")] {
        let puppet = Puppet::listen().await;
        let mut house = house(&puppet, 600).await;
        let (mut client, mut hand) = running(&house, &puppet, "/api/chat", "running").await;
        let mut idle = Connection::open(house.public).await;
        house.signal(signal);
        refuses_connections(&house).await;
        // A connection that has asked for nothing is closed, and the operator sees why.
        assert!(!idle.more().await, "{name}");
        let ready = Request::get("/readyz").send(house.operator).await;
        assert_eq!((ready.status, ready.text().as_str()), (503, "draining\n"), "{name}");
        assert_eq!(Request::get("/livez").send(house.operator).await.status, 200, "{name}");

        hand.chunk(b"{\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":3,\"eval_count\":2}\n").await;
        hand.say("0\r\n\r\n").await;
        let last = client.chunk().await.expect("not the end").expect("the last record");
        assert!(String::from_utf8_lossy(&last).contains("\"done\":true"), "{name}");
        assert!(client.chunk().await.is_none(), "{name}: a clean end");
        assert!(!client.more().await, "{name}: the connection is closed behind its reply");
        assert_eq!(house.exit().await.code(), Some(0), "{name}");
        let finals = finals(&house);
        assert_eq!(finals.len(), 1, "{name}");
        assert_eq!(finals[0]["extra"]["outcome"], "complete", "{name}");
        assert_eq!(finals[0]["extra"]["output_tokens"], 2, "{name}");
    }
}

#[tokio::test]
async fn what_still_runs_after_the_drain_is_cut_with_an_error_in_its_dialect() {
    let puppet = Puppet::listen().await;
    let mut house = house(&puppet, 1).await;
    let (mut native, mut native_hand) = running(&house, &puppet, "/api/chat", "native").await;
    let (mut events, _events_hand) = running(&house, &puppet, "/v1/chat/completions", "events").await;
    let (mut half, mut half_hand) = running(&house, &puppet, "/api/generate", "half").await;
    half_hand.chunk(b"{\"response\":\"b").await; // within a record
    half.chunk().await.expect("not the end").expect("half a record");
    let mut waiting = Connection::open(house.public).await;
    waiting.send(&Request::post("/api/chat", chat(false)).bearer(&house.token()).id("waiting")).await;
    let mut waiting_hand = puppet.accept().await;
    waiting_hand.request().await;
    let mut sized = Connection::open(house.public).await;
    sized.send(&Request::get("/api/version").bearer(&house.token()).id("sized")).await;
    let mut sized_hand = puppet.accept().await;
    sized_hand.request().await;
    sized_hand.say("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{\"vers").await;
    assert_eq!(sized.head().await.expect("a head").0, 200);
    let mut uploading = Connection::open(house.public).await;
    let upload = Request::post("/api/chat", chat(true)).bearer(&house.token()).id("uploading");
    uploading.write(&upload.head_bytes()).await;
    uploading.write(&upload.body_bytes()[..10]).await;
    let began = Instant::now();
    while !house.metrics().await.contains("\nbehavry_ollama_requests_in_flight 6\n") {
        assert!(began.elapsed() < PATIENCE, "six requests did not come");
    }

    house.signal(libc::SIGTERM);
    let words = "The proxy is shutting down. Send the request again.";
    let frame = native.chunk().await.expect("not the end").expect("an error");
    assert_eq!(String::from_utf8_lossy(&frame), format!("{{\"error\":\"{words}\"}}\n"));
    assert!(native.chunk().await.is_none(), "a clean end");
    let frame = events.chunk().await.expect("not the end").expect("an error");
    let frame = String::from_utf8_lossy(&frame).into_owned();
    let error: Value = serde_json::from_str(frame.trim_start_matches("data: ")).expect("an event");
    assert_eq!((&error["error"]["message"], &error["error"]["code"]), (&json!(words), &json!("shutting_down")));
    assert!(events.chunk().await.is_none(), "a clean end");
    let frame = half.chunk().await.expect("not the end").expect("an error");
    assert_eq!(String::from_utf8_lossy(&frame), format!("\n{{\"error\":\"{words}\"}}\n"), "the half record is ended");
    assert!(half.chunk().await.is_none(), "a clean end");
    for (client, name) in [(&mut waiting, "waiting"), (&mut uploading, "uploading")] {
        let reply = client.reply(false).await.expect("an answer");
        assert_eq!((reply.status, reply.code()), (503, "shutting_down".to_owned()), "{name}");
        assert!(reply.header("retry-after").is_some(), "{name}");
    }
    while sized.more().await {}
    assert_eq!(sized.unread, b"{\"vers", "closed short");
    native_hand.closed().await; // the backend's work is cancelled

    assert_eq!(house.exit().await.code(), Some(0));
    let finals = finals(&house);
    let seen: Vec<(&str, &str)> = finals
        .iter()
        .map(|record| (record["extra"]["request_id"].as_str().unwrap(), record["extra"]["outcome"].as_str().unwrap()))
        .collect();
    let ids = ["events", "half", "native", "sized", "uploading", "waiting"];
    assert_eq!(seen, ids.map(|id| (id, "shutdown")));
    for record in &finals {
        assert_eq!(record["extra"]["output_tokens"], Value::Null);
        assert_eq!(record["error"], "shutting_down");
    }
}

#[tokio::test]
async fn without_a_request_the_process_ends_at_once_and_is_not_held_by_idle_clients() {
    let puppet = Puppet::listen().await;
    let mut house = house(&puppet, 600).await;
    let mut idle = Connection::open(house.public).await;
    let mut half = Connection::open(house.public).await;
    half.write(b"POST /api/chat HTTP/1.1\r\nhost:").await;
    let used = async {
        let mut hand = puppet.accept().await;
        hand.request().await;
        hand.answer("200 OK", "{\"version\":\"1\"}").await;
    };
    let mut kept = Connection::open(house.public).await;
    kept.send(&Request::get("/api/version").bearer(&house.token())).await;
    let (reply, ()) = tokio::join!(kept.reply(false), used);
    let reply = reply.expect("a reply");
    assert_eq!((reply.status, reply.end), (200, End::Whole));
    house.signal(libc::SIGTERM);
    assert_eq!(house.exit().await.code(), Some(0));
    for client in [&mut idle, &mut half, &mut kept] {
        assert!(!client.more().await);
    }
}

/// A reader that does not read holds a record back, and must not hold the process.
#[tokio::test]
async fn a_client_that_does_not_read_does_not_hold_the_process() {
    let mut house = House::with(Plan { config: "[shutdown]\ndrain_s = 1".to_owned(), ..Plan::default() }).await;
    let mut client = Connection::open(house.public).await;
    let body = json!({ "model": "tiny-loop", "prompt": "hi", "options": { "num_predict": 100_000 } });
    client.send(&Request::post("/api/generate", body).bearer(&house.token()).id("unread")).await;
    house.simulator.wait_for(PATIENCE, |seen| seen.iter().any(|seen| seen.ended.is_some())).await.expect("it ends");
    house.signal(libc::SIGTERM);
    assert_eq!(house.exit().await.code(), Some(0));
    let finals = finals(&house);
    assert_eq!(finals.len(), 1, "exactly one final record");
    let outcome = finals[0]["extra"]["outcome"].as_str().expect("an outcome");
    assert!(["shutdown", "slow_client"].contains(&outcome), "{outcome}");
}

/// Nor where its stream is cut while it does not read: the error frame cannot be sent.
#[tokio::test]
async fn a_stream_that_is_cut_under_a_client_that_does_not_read_is_recorded_as_such() {
    let puppet = Puppet::listen().await;
    let mut house = house(&puppet, 1).await;
    let (client, mut hand) = running(&house, &puppet, "/api/chat", "unread").await;
    let record = format!("{{\"message\":{{\"content\":\"{}\"}},\"done\":false}}\n", "a".repeat(64 * 1024));
    for _ in 0..200 {
        hand.chunk(record.as_bytes()).await; // 13 MB: more than the kernels hold, and less than with the buffer
    }
    house.signal(libc::SIGTERM);
    assert_eq!(house.exit().await.code(), Some(0));
    let finals = finals(&house);
    assert_eq!(finals.len(), 1, "exactly one final record");
    assert_eq!(finals[0]["extra"]["outcome"], "shutdown");
    drop(client);
}

#[tokio::test]
async fn a_second_instance_on_the_same_port_says_so_and_exits() {
    let house = House::open().await;
    let state = tempfile::tempdir().expect("a folder");
    for variable in ["BEHAVRY_LISTEN", "BEHAVRY_OPERATOR_LISTEN"] {
        let taken = if variable == "BEHAVRY_LISTEN" { house.public } else { house.operator };
        let mut second = crate::house::program(&["serve"]);
        second
            .env("BEHAVRY_LISTEN", "127.0.0.1:0")
            .env("BEHAVRY_OPERATOR_LISTEN", "127.0.0.1:0")
            .env("BEHAVRY_STATE_DIR", state.path().join(variable))
            .env("BEHAVRY_JWT_ALGORITHM", "EdDSA")
            .env("BEHAVRY_OLLAMA_URL", house.simulator.url())
            .env(variable, taken.to_string());
        let ended = crate::house::run_to_end(second).await;
        assert_eq!(ended.code, Some(1), "{variable}: {}", ended.stderr);
        let words = format!("cannot listen on {taken}");
        assert!(ended.stderr.contains(&words) && ended.stderr.contains("another process"), "{}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"));
    }
    // The first one goes on.
    assert_eq!(house.get("/api/version").await.status, 200);
}
