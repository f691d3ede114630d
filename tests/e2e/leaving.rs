//! Clients that leave, and clients that do not read. The witness is the simulator: its own clock says when the backend's work
//! was cancelled.

use std::time::{Duration, Instant};

use behavry_ollama_proxy::simulator::{Ending, Seen, SimulatorOptions};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use crate::client::{Connection, End, Request};
use crate::house::{House, PATIENCE, Plan, until_tried};
use crate::puppet::Puppet;

fn chat(model: &str, more: Value) -> Value {
    let mut body = json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

/// How a client leaves.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Closes,
    Resets,
    /// It ends its side only, which Ollama takes for the same.
    HalfCloses,
}

/// What it leaves in the middle of.
struct Stage {
    name: &'static str,
    path: &'static str,
    body: Value,
    /// The reply has begun, and the client has seen some of it.
    answered: bool,
}

fn stages() -> Vec<Stage> {
    let stage = |name, path, body, answered| Stage { name, path, body, answered };
    let prompt = |model: &str| json!({ "model": model, "prompt": "hi", "stream": true });
    vec![
        stage("before the headers", "/api/chat", chat("fault-hangs-before-headers", json!({})), false),
        stage("not streamed", "/api/chat", chat("fault-hangs-before-headers", json!({ "stream": false })), false),
        stage("between records", "/api/chat", chat("tiny-slow", json!({})), true),
        stage("between events", "/v1/chat/completions", chat("tiny-slow", json!({ "stream": true })), true),
        stage("in a stall", "/api/generate", prompt("fault-stalls-mid-stream-2"), true),
        stage("in a stall of events", "/v1/completions", prompt("fault-stalls-mid-stream-2"), true),
        stage("in full flow", "/api/chat", chat("tiny-loop", json!({})), true),
        stage("in a response", "/v1/responses", json!({ "model": "tiny-slow", "input": "hi", "stream": true }), true),
        stage("in a message", "/v1/messages", chat("tiny-slow", json!({ "stream": true, "max_tokens": 1000 })), true),
        // Held until it is whole, so that nothing of it is seen.
        stage("in half a reply", "/api/chat", chat("fault-stalls-mid-stream", json!({ "stream": false })), false),
    ]
}

/// Sends, waits until the backend works on it, and leaves. Gives when it asked.
async fn leave(house: &House, stage: &Stage, id: &str, manner: Manner) -> Instant {
    let asked = Instant::now();
    let mut client = Connection::open(house.public).await;
    client.send(&Request::post(stage.path, stage.body.clone()).bearer(&house.token()).id(id)).await;
    if stage.answered {
        assert_eq!(client.head().await.expect("a head").0, 200, "{}", stage.name);
    }
    let arrived = |seen: &[Seen]| find(seen, id).is_some_and(|seen| seen.body_whole);
    house.simulator.wait_for(PATIENCE, arrived).await.expect("the request arrives");
    if !matches!(manner, Manner::HalfCloses) {
        if matches!(manner, Manner::Resets) {
            client.stream.set_zero_linger().expect("a socket");
        }
        drop(client);
        return asked;
    }
    client.stream.shutdown().await.expect("the connection is open");
    // Whatever still comes, it does not look like a whole reply.
    if stage.answered {
        while client.more().await {}
        let rest = String::from_utf8_lossy(&client.unread).into_owned();
        for end in ["\"done\":true", "[DONE]", "response.completed", "message_stop"] {
            assert!(!rest.contains(end), "{}", stage.name);
        }
    } else {
        assert!(client.reply(false).await.is_none(), "{}: a reply after all", stage.name);
    }
    asked
}

fn find<'a>(seen: &'a [Seen], id: &str) -> Option<&'a Seen> {
    seen.iter().find(|seen| seen.header("x-request-id") == Some(id))
}

/// When the backend's work on the request ended, and how.
async fn ended(house: &House, id: &str) -> (Instant, Ending) {
    let over = |seen: &[Seen]| find(seen, id).is_some_and(|seen| seen.ended_how.is_some());
    let seen = house.simulator.wait_for(PATIENCE, over).await.expect("the backend's work ends");
    let seen = find(&seen, id).expect("it was just there");
    (seen.ended.expect("it has ended"), seen.ended_how.expect("it has ended"))
}

#[tokio::test]
async fn a_client_that_leaves_cancels_the_backends_work_at_every_stage() {
    let house = House::open().await;
    for manner in [Manner::Closes, Manner::Resets, Manner::HalfCloses] {
        for (number, stage) in stages().iter().enumerate() {
            let id = format!("{manner:?}-{number}");
            leave(&house, stage, &id, manner).await;
            // None of these ends by itself before the end of the test.
            let (_, how) = ended(&house, &id).await;
            assert_eq!(how, Ending::ClientGone, "{} {manner:?}", stage.name);
            let record = house.final_of(&id).await;
            assert_eq!(record["extra"]["outcome"], "client_abort", "{} {manner:?}", stage.name);
            assert_eq!(record["extra"]["input_tokens"], Value::Null, "{}", stage.name);
            assert_eq!(record["extra"]["output_tokens"], Value::Null, "{}", stage.name);
            assert_eq!(record["extra"]["finish_reason"], Value::Null, "{}", stage.name);
            let code = if stage.answered { json!(200) } else { Value::Null };
            assert_eq!(record["response_code"], code, "{}", stage.name);
        }
    }
    // Nothing of those clients is left behind.
    let began = Instant::now();
    while !house.metrics().await.contains("\nbehavry_ollama_requests_in_flight 0\n") {
        assert!(began.elapsed() < PATIENCE, "a request is still in flight");
    }
}

/// An Ollama without `/v1/responses`, which computes one thing at once: whoever leaves makes room for the next.
#[tokio::test]
async fn a_client_that_leaves_a_converted_response_cancels_it_and_its_slot_is_free() {
    let options = SimulatorOptions { ollama_version: "0.12.6".to_owned(), ..SimulatorOptions::for_tests() };
    let simulator = behavry_ollama_proxy::simulator::Simulator::start(options).await.expect("it listens");
    let config = format!("[[backend]]\nurl = \"{}\"\nslots = 1\n", simulator.url());
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let ask = |model: &str, stream: bool| json!({ "model": model, "input": "hi", "stream": stream });
    let request = |id: &str, body| Request::post("/v1/responses", body).bearer(&house.token()).id(id);
    // From then on it is not asked first.
    assert_eq!(house.send(request("first", ask("tiny-story", false))).await.status, 200);
    for manner in [Manner::Closes, Manner::Resets, Manner::HalfCloses] {
        for (name, body, answered) in [
            ("in full flow", ask("tiny-loop", true), true),
            ("between events", ask("tiny-slow", true), true),
            ("in a stall", ask("fault-stalls-mid-stream-2", true), true),
            ("in half a reply", ask("fault-stalls-mid-stream", false), false),
        ] {
            let id = format!("{manner:?}-{}", name.replace(' ', "-"));
            let mut client = Connection::open(house.public).await;
            client.send(&request(&id, body)).await;
            if answered {
                assert_eq!(client.head().await.expect("a head").0, 200, "{id}");
            }
            let arrived = |seen: &[Seen]| find(seen, &id).is_some_and(|seen| seen.body_whole);
            simulator.wait_for(PATIENCE, arrived).await.expect("the request arrives");
            match manner {
                Manner::Closes => drop(client),
                Manner::Resets => {
                    client.stream.set_zero_linger().expect("a socket");
                    drop(client);
                }
                Manner::HalfCloses => {
                    client.stream.shutdown().await.expect("the connection is open");
                    while client.more().await {}
                    assert!(!String::from_utf8_lossy(&client.unread).contains("response.completed"), "{id}");
                }
            }
            let over = |seen: &[Seen]| find(seen, &id).is_some_and(|seen| seen.ended_how.is_some());
            let seen = simulator.wait_for(PATIENCE, over).await.expect("the backend's work ends");
            let seen = find(&seen, &id).expect("it was just there");
            assert_eq!(
                (seen.target.as_str(), seen.ended_how),
                ("/v1/chat/completions", Some(Ending::ClientGone)),
                "{id}"
            );
            let record = house.final_of(&id).await;
            assert_eq!(record["extra"]["outcome"], "client_abort", "{id}");
            for name in ["input_tokens", "output_tokens", "finish_reason"] {
                assert_eq!(record["extra"][name], Value::Null, "{id}: {name}");
            }
            let next = house.send(request(&format!("{id}-next"), ask("tiny-story", false))).await;
            assert_eq!(next.status, 200, "{id}: the slot is free again");
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_during_a_load_or_a_long_prompt_cancels_it() {
    for simulator in [
        SimulatorOptions { load_ms: 600_000, ..SimulatorOptions::for_tests() },
        SimulatorOptions { first_token_ms: 600_000, ..SimulatorOptions::for_tests() },
    ] {
        let house = House::with(Plan { simulator, ..Plan::default() }).await;
        for (number, body) in
            [chat("llama3.2", json!({})), chat("llama3.2", json!({ "stream": false }))].into_iter().enumerate()
        {
            let stage = Stage { name: "a load", path: "/api/chat", body, answered: false };
            let id = format!("load-{number}");
            leave(&house, &stage, &id, Manner::Closes).await;
            let (_, how) = ended(&house, &id).await;
            assert_eq!(how, Ending::ClientGone);
            assert_eq!(house.final_of(&id).await["extra"]["outcome"], "client_abort");
        }
    }
}

/// Ollama leaks a handler for a request that is closed before its scheduler saw it.
#[tokio::test]
async fn a_request_just_sent_is_left_alone_for_a_moment() {
    let config = "[streaming]\ncancel_grace_ms = 1000".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let stage = &stages()[0];
    for manner in [Manner::Closes, Manner::HalfCloses] {
        let id = format!("{manner:?}");
        let asked = leave(&house, stage, &id, manner).await;
        let (at, how) = ended(&house, &id).await;
        assert_eq!(how, Ending::ClientGone);
        // The moment begins after the asking, so that however slow the machine is, it is never over sooner.
        let lived = at.duration_since(asked);
        assert!(lived >= Duration::from_millis(1000), "{manner:?}: cancelled after {lived:?}");
        assert_eq!(house.final_of(&id).await["extra"]["outcome"], "client_abort");
    }
}

#[tokio::test]
async fn a_request_whose_reply_has_begun_is_cancelled_without_that_moment() {
    let config = "[streaming]\ncancel_grace_ms = 1000".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    for (number, stage) in stages().iter().enumerate().filter(|(_, stage)| stage.answered) {
        // One that is cancelled sooner shows it: with the moment, none could be.
        let mut tries = 0;
        until_tried(stage.name, async || {
            tries += 1;
            let id = format!("begun-{number}-{tries}");
            let asked = leave(&house, stage, &id, Manner::Closes).await;
            let (at, how) = ended(&house, &id).await;
            assert_eq!(how, Ending::ClientGone);
            (at.duration_since(asked) < Duration::from_millis(1000)).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn the_moment_is_fifty_milliseconds_unless_configured() {
    let house = House::open().await;
    let stage = &stages()[0];
    for number in 0..3 {
        let id = format!("grace-{number}");
        let asked = leave(&house, stage, &id, Manner::Closes).await;
        let (at, _) = ended(&house, &id).await;
        // The moment begins after the asking: it is never over sooner, and without it the request would live a few milliseconds.
        let lived = at.duration_since(asked);
        assert!(lived >= Duration::from_millis(50), "cancelled after {lived:?}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_before_its_body_is_whole_reaches_no_backend() {
    let house = House::open().await;
    let request = Request::post("/api/chat", chat("llama3.2", json!({}))).bearer(&house.token()).id("half");
    for manner in [Manner::Closes, Manner::HalfCloses] {
        let mut client = Connection::open(house.public).await;
        client.write(&request.head_bytes()).await;
        client.write(&request.body_bytes()[..20]).await;
        match manner {
            Manner::HalfCloses => client.stream.shutdown().await.expect("open"),
            _ => drop(client),
        }
    }
    let both = crate::house::wait_until("two final records", || {
        let records = house.records();
        (records.len() == 2).then_some(records)
    });
    for record in both.await {
        assert_eq!(record["extra"]["outcome"], "client_abort");
        assert_eq!(record["extra"]["phase"], "final");
    }
    assert_eq!(house.simulator.connections(), 0);
}

/// OpenAI's clients read up to `[DONE]` and close, ollama-js up to `done`; the end of the framing is of no use to them.
#[tokio::test]
async fn a_client_that_stops_reading_at_the_last_record_had_a_complete_answer() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
    let events = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n\
                  data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";
    let record = "{\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":3,\"eval_count\":2}\n";
    let asked = json!({ "stream": true, "stream_options": { "include_usage": true } });
    for (id, path, body, content_type, last) in [
        ("events", "/v1/chat/completions", chat("m", asked), "text/event-stream", events),
        ("unasked", "/v1/chat/completions", chat("m", json!({ "stream": true })), "text/event-stream", events),
        ("records", "/api/chat", chat("m", json!({})), "application/x-ndjson", record),
    ] {
        let mut client = Connection::open(house.public).await;
        client.send(&Request::post(path, body).bearer(&house.token()).id(id)).await;
        let mut backend = puppet.accept().await;
        backend.request().await;
        backend.open_stream(content_type).await;
        backend.chunk(last.as_bytes()).await; // and the stream's end never comes
        client.head().await.expect("a head");
        client.chunk().await.expect("not the end").expect("a chunk");
        drop(client);
        backend.closed().await;
        let record = house.final_of(id).await;
        assert_eq!(record["extra"]["outcome"], "complete", "{id}");
        assert_eq!(record["extra"]["output_tokens"], 2, "{id}");
        assert_eq!(record["extra"]["finish_reason"], "stop", "{id}");
        assert_eq!(record["error"], Value::Null, "{id}");
    }
}

/// A client whose kernel takes little. Less than loopback's segment of 64 KiB would make every read wait for a window probe.
async fn small_reader(house: &House) -> Connection {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(128 * 1024).expect("set before it connects");
    Connection { stream: socket.connect(house.public).await.expect("the proxy listens"), unread: Vec::new() }
}

/// 131,072 records are 14 MB, and the proxy's kernel holds at most 4 MiB (`tcp_wmem`).
#[tokio::test]
async fn a_reader_that_does_not_read_does_not_slow_the_backend() {
    let config = "[limits]\nreply_buffer_bytes = 67108864".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    for (id, path, body) in [
        ("records", "/api/chat", chat("tiny-loop", json!({}))),
        ("events", "/v1/chat/completions", chat("tiny-loop", json!({ "stream": true }))),
    ] {
        let mut client = small_reader(&house).await;
        client.send(&Request::post(path, body).bearer(&house.token()).id(id)).await;
        // Nothing is read before the backend is done with everything.
        let (_, how) = ended(&house, id).await;
        assert_eq!(how, Ending::Complete, "{id}");
        let reply = client.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        let text = reply.text();
        let end = if path.starts_with("/v1") { "data: [DONE]\n\n" } else { "}\n" };
        assert!(text.ends_with(end) && text.contains("eight "), "{id}");
        assert!(reply.body.len() > 10 << 20, "{id}: more than a kernel holds");
        let record = house.final_of(id).await;
        assert_eq!(record["extra"]["outcome"], "complete", "{id}");
        assert_eq!(record["extra"]["output_tokens"], 131_072, "{id}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_with_half_its_answer_unsent_had_no_complete_one() {
    let config = "[limits]\nreply_buffer_bytes = 67108864".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let mut client = small_reader(&house).await;
    client.send(&Request::post("/api/chat", chat("tiny-loop", json!({}))).bearer(&house.token()).id("half")).await;
    assert_eq!(ended(&house, "half").await.1, Ending::Complete);
    drop(client);
    let record = house.final_of("half").await;
    assert_eq!(record["extra"]["outcome"], "client_abort");
    assert!(record["extra"]["bytes_out"].as_u64().expect("a number") < 12 << 20, "not all of it was taken");
}

#[tokio::test]
async fn a_reader_that_is_behind_by_more_than_the_buffer_is_cut() {
    let config = "[limits]\nreply_buffer_bytes = 65536\nslow_reader_stall_ms = 1000".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    for (id, path, body, reads_again) in [
        ("gone", "/api/chat", chat("tiny-loop", json!({})), false),
        ("late", "/api/chat", chat("tiny-loop", json!({})), true),
        ("events", "/v1/chat/completions", chat("tiny-loop", json!({ "stream": true })), true),
    ] {
        let mut client = small_reader(&house).await;
        client.send(&Request::post(path, body).bearer(&house.token()).id(id)).await;
        let (_, how) = ended(&house, id).await;
        assert_eq!(how, Ending::ClientGone, "{id}: the backend was still working");
        if !reads_again {
            let record = house.final_of(id).await; // the record does not wait for the client
            assert_eq!(record["extra"]["outcome"], "slow_client", "{id}");
        }
        let reply = client.reply(false).await.expect("a reply");
        let text = reply.text();
        assert!(!text.contains("\"done\":true") && !text.contains("[DONE]"), "{id}: it looks complete");
        let last = text.lines().rev().find(|line| !line.is_empty()).unwrap_or_default();
        assert!(reply.end == End::Short || last.contains("\"error\":"), "{id}: an end without an error");
        let record = house.final_of(id).await;
        assert_eq!(record["extra"]["outcome"], "slow_client", "{id}");
        assert_eq!(record["extra"]["output_tokens"], Value::Null, "{id}");
    }
}

/// Within the buffer, but for too long.
#[tokio::test]
async fn a_reader_that_takes_nothing_for_too_long_is_cut() {
    let config = "[limits]\nslow_reader_stall_ms = 300".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let mut client = small_reader(&house).await;
    // 5.5 MB: more than the kernel holds, less than kernel and buffer.
    let body = chat("tiny-loop", json!({ "options": { "num_predict": 50_000 } }));
    client.send(&Request::post("/api/chat", body).bearer(&house.token()).id("stalled")).await;
    ended(&house, "stalled").await; // complete, if the backend is done before the time is over
    let record = house.final_of("stalled").await;
    assert_eq!(record["extra"]["outcome"], "slow_client");
    let reply = client.reply(false).await.expect("what the kernel held");
    assert_eq!(reply.end, End::Short);
}
