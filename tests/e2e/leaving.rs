//! Clients that leave, and clients that do not read. The witness is the simulator: its own clock says when the backend's work
//! was cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use behavry_ollama_proxy::simulator::{Ending, Seen, SimulatorOptions};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::client::{Connection, End, Request};
use crate::h2_client::{self, H2};
use crate::house::{House, PATIENCE, Plan, until_tried, wait_until_async};
use crate::puppet::{Hand, Puppet};

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

/// A client that left, once the proxy has noticed it: the backend is not told yet.
async fn noticed(house: &House) {
    wait_until_async("a client that left", async || {
        let board = Request::get("/api/v1/activity").send(house.operator).await.json();
        let running = board["running"].as_array().expect("a list").clone();
        running.iter().any(|row| row["state"] == "left").then_some(())
    })
    .await;
}

/// A backend that holds a model. What the proxy itself asks is answered at once, chats by hand.
struct Loader {
    url: String,
    /// What it says of the model from now on.
    is_loaded: Arc<AtomicBool>,
    chats: UnboundedReceiver<Hand>,
}

impl Loader {
    async fn listen() -> Loader {
        let puppet = Puppet::listen().await;
        let (url, is_loaded) = (puppet.url(), Arc::new(AtomicBool::new(false)));
        let (told, chats) = unbounded_channel();
        let says = Arc::clone(&is_loaded);
        tokio::spawn(async move {
            loop {
                let mut hand = puppet.accept().await;
                let (told, says) = (told.clone(), Arc::clone(&says));
                tokio::spawn(async move {
                    let request = hand.request().await;
                    let listed = r#"{"models":[{"name":"llama3.2:latest","model":"llama3.2:latest"}]}"#;
                    let body = match request.split(' ').nth(1).expect("a path") {
                        "/api/tags" => listed,
                        "/api/ps" if says.load(Ordering::SeqCst) => listed,
                        "/api/ps" => r#"{"models":[]}"#,
                        "/api/version" => r#"{"version":"0.33.0"}"#,
                        "/api/chat" => return drop(told.send(hand)),
                        _ => "{}",
                    };
                    let length = body.len();
                    let head = format!(
                        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
                    );
                    hand.try_say(head + body).await;
                });
            }
        });
        Loader { url, is_loaded, chats }
    }

    async fn chat(&mut self) -> Hand {
        tokio::time::timeout(PATIENCE, self.chats.recv()).await.expect("in time").expect("a chat comes")
    }
}

/// A proxy that knows that the backend has the model, and has not loaded it.
async fn house_before(loaders: &[&Loader], config: &str) -> House {
    let backends: String = loaders
        .iter()
        .enumerate()
        .map(|(tier, loader)| format!("[[backend]]\nurl = \"{}\"\ntier = {}\n", loader.url, tier))
        .collect();
    let config = format!("{config}\n[queue]\ntier_s = 86400\nlinger_ms = 0\n[catalogue]\nloaded_s = 1\n{backends}");
    let house = House::with(Plan { config, ..Plan::default() }).await;
    wait_until_async("a catalogue", async || {
        let board = Request::get("/api/v1/activity").send(house.operator).await.json();
        let read = board["backends"].as_array().expect("a list").iter().all(|backend| !backend["models"].is_null());
        // Only where it was asked what is loaded does a list say so.
        let listed = house.get("/api/tags").await.json();
        (read && listed["models"][0]["loaded"] == false).then_some(())
    })
    .await;
    house
}

/// Sends a request that makes its backend load the model, and leaves once it is there.
async fn leave_a_load(house: &House, loader: &mut Loader, id: &str, body: Value, manner: Manner) -> Hand {
    let mut client = Connection::open(house.public).await;
    client.send(&Request::post("/api/chat", body).bearer(&house.token()).id(id)).await;
    let backend = loader.chat().await;
    match manner {
        Manner::Closes => drop(client),
        Manner::Resets => {
            client.stream.set_zero_linger().expect("a socket");
            drop(client);
        }
        Manner::HalfCloses => {
            client.stream.shutdown().await.expect("open");
            tokio::spawn(async move { while client.more().await {} });
        }
    }
    noticed(house).await;
    backend
}

const SHIELD: &str = "[streaming]\nshield_load_s = 600";

async fn shielded(house: &House, result: &str) -> String {
    let metrics = house.metrics().await;
    let name = format!("behavry_ollama_shielded_loads_total{{result=\"{result}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).expect("it is always there").to_owned()
}

#[tokio::test]
async fn a_load_may_be_finished_for_a_client_that_left_and_its_backend_is_then_told() {
    for (number, manner) in [Manner::Closes, Manner::Resets, Manner::HalfCloses].into_iter().enumerate() {
        let mut loader = Loader::listen().await;
        let house = house_before(&[&loader], SHIELD).await;
        let streams = number != 1;
        let body = chat("llama3.2", json!({ "stream": streams }));
        let mut backend = leave_a_load(&house, &mut loader, "load", body, manner).await;
        assert_eq!(shielded(&house, "loaded").await, "0", "{manner:?}");
        loader.is_loaded.store(true, Ordering::SeqCst);
        if streams {
            backend.open_stream("application/x-ndjson").await;
            backend.try_say("5\r\n{\"a\"\r\n").await;
        } else {
            backend.answer("200 OK", r#"{"message":{},"done":true,"prompt_eval_count":5,"eval_count":3}"#).await;
        }
        backend.closed().await;
        let record = house.final_of("load").await;
        assert_eq!(record["extra"]["outcome"], "client_abort", "{manner:?}");
        for began in house.records_of("load").await.iter().filter(|record| record["extra"]["phase"] == "stream_start") {
            assert_eq!((&began["response_code"], &began["extra"]["upstream_status"]), (&Value::Null, &json!(200)));
        }
        assert_eq!(record["error"], "the client left, and its model was loaded all the same");
        assert_eq!(record["response_code"], Value::Null, "nobody was answered");
        assert_eq!(record["extra"]["upstream_status"], 200);
        assert_eq!(shielded(&house, "loaded").await, "1");
        // From now on it is there, and a client that leaves is a client that leaves.
        let mut client = Connection::open(house.public).await;
        let again = Request::post("/api/chat", chat("llama3.2", json!({}))).bearer(&house.token()).id("warm");
        client.send(&again).await;
        let mut backend = loader.chat().await;
        drop(client);
        backend.closed().await;
        assert_eq!(house.final_of("warm").await["error"], "the client left");
    }
}

#[tokio::test]
async fn a_load_that_is_gone_on_with_holds_its_slot_and_fails_over_to_nobody() {
    let (mut loader, other) = (Loader::listen().await, Loader::listen().await);
    let house = house_before(&[&loader, &other], SHIELD).await;
    let mut backend = leave_a_load(&house, &mut loader, "load", chat("llama3.2", json!({})), Manner::Closes).await;
    // Whoever comes next waits for the slot.
    let next = Request::post("/api/chat", chat("llama3.2", json!({ "stream": false }))).bearer(&house.token());
    let public = house.public;
    let next = tokio::spawn(async move { next.send(public).await });
    wait_until_async("one that waits", async || {
        let metrics = house.metrics().await;
        let waits = "behavry_ollama_queue_waiting_requests{class=\"default\",model=\"llama3.2\"} 1\n";
        metrics.contains(waits).then_some(())
    })
    .await;
    backend.answer("503 Service Unavailable", r#"{"error":"server busy"}"#).await;
    let record = house.final_of("load").await;
    assert_eq!(record["extra"]["outcome"], "client_abort");
    assert_eq!(record["error"], "the client left, and the backend failed to load its model");
    assert_eq!((&record["extra"]["retries"], &record["extra"]["backend"]), (&json!(0), &json!("ollama-1")));
    assert_eq!(shielded(&house, "failed").await, "1");
    let mut backend = loader.chat().await;
    backend.answer("200 OK", r#"{"message":{},"done":true,"prompt_eval_count":5,"eval_count":3}"#).await;
    assert_eq!(next.await.expect("sent").status, 200);
}

#[tokio::test]
async fn a_load_is_gone_on_with_for_so_long_and_no_longer_and_a_cut_ends_it_at_once() {
    let mut loader = Loader::listen().await;
    let house = house_before(&[&loader], "[streaming]\nshield_load_s = 1").await;
    let mut client = Connection::open(house.public).await;
    client.send(&Request::post("/api/chat", chat("llama3.2", json!({}))).bearer(&house.token()).id("long")).await;
    let mut backend = loader.chat().await;
    let left = Instant::now();
    drop(client);
    backend.closed().await;
    assert!(left.elapsed() >= Duration::from_secs(1), "it had its time");
    let record = house.final_of("long").await;
    assert_eq!(record["extra"]["outcome"], "client_abort");
    assert_eq!(record["error"], "the client left, and the load of its model was cancelled later");
    assert_eq!(shielded(&house, "ended").await, "1");

    let mut house = house_before(&[&loader], &format!("{SHIELD}\n[shutdown]\ndrain_s = 0")).await;
    let mut backend = leave_a_load(&house, &mut loader, "cut", chat("llama3.2", json!({})), Manner::Closes).await;
    house.signal(libc::SIGTERM);
    backend.closed().await;
    assert!(house.exit().await.success());
    let record = house.final_of("cut").await;
    assert_eq!(record["extra"]["outcome"], "client_abort", "it left before it was cut");
    assert_eq!(record["error"], "the client left, and the load of its model was cancelled later");
}

/// Dropping the stream resets it; the connection stays.
#[tokio::test]
async fn a_stream_of_http_2_that_is_reset_during_a_load_is_no_other_client() {
    let mut loader = Loader::listen().await;
    let house = house_before(&[&loader], SHIELD).await;
    let mut h2 = H2::open(house.public).await;
    let body = chat("llama3.2", json!({})).to_string();
    let request = Request::post("/api/chat", chat("llama3.2", json!({}))).bearer(&house.token()).id("load");
    let mut asked = h2.ask(&request, Some(body.len())).await;
    h2_client::write(&mut asked.body, body.into()).await;
    let mut backend = loader.chat().await;
    drop(asked);
    noticed(&house).await;
    backend.open_stream("application/x-ndjson").await;
    backend.closed().await;
    let record = house.final_of("load").await;
    assert_eq!(record["extra"]["outcome"], "client_abort");
    assert_eq!(record["error"], "the client left, and its model was loaded all the same");
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

/// Past the buffer the backend waits, and with it whoever wants its slot: more is asked of such a reader.
#[tokio::test]
async fn a_reader_that_lets_the_backend_wait_is_cut_when_it_takes_too_little() {
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
    let cut = "behavry_ollama_requests_total{endpoint=\"chat\",outcome=\"slow_client\",status_class=\"2xx\"} 2";
    assert!(house.metrics().await.contains(cut), "they are counted");
}

/// How much the proxy holds of replies that nobody has taken.
async fn unsent_bytes(house: &House) -> u64 {
    let metrics = house.metrics().await;
    let line = metrics.lines().find_map(|line| line.strip_prefix("behavry_ollama_memory_bytes{of=\"replies\"} "));
    line.expect("it is always there").parse().expect("a number")
}

/// Replies of 14 MB, more than buffer and kernel hold: the backend waits, and nothing is lost.
#[tokio::test]
async fn a_reader_that_is_slower_than_the_backend_gets_all_of_it() {
    let config = "[limits]\nreply_buffer_bytes = 1048576\nslow_reader_stall_ms = 600000".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    for (id, path, body) in [
        ("records", "/api/chat", chat("tiny-loop", json!({}))),
        ("events", "/v1/chat/completions", chat("tiny-loop", json!({ "stream": true }))),
    ] {
        let mut client = small_reader(&house).await;
        client.send(&Request::post(path, body).bearer(&house.token()).id(id)).await;
        // What comes at once and does not fit is not counted, so that a full buffer counts somewhat less.
        wait_until_async("a full buffer", async || (unsent_bytes(&house).await > 500_000).then_some(())).await;
        assert!(unsent_bytes(&house).await <= 1_048_576, "{id}: bounded");
        let reply = client.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        let text = reply.text();
        let end = if path.starts_with("/v1") { "data: [DONE]\n\n" } else { "}\n" };
        assert!(text.ends_with(end) && reply.body.len() > 10 << 20, "{id}");
        let record = house.final_of(id).await;
        assert_eq!(record["extra"]["outcome"], "complete", "{id}");
        assert_eq!(record["extra"]["output_tokens"], 131_072, "{id}");
        assert_eq!(unsent_bytes(&house).await, 0, "{id}");
    }
}

/// Half a reply that is not streamed waits for the other half, as nobody can say yet whether it is an answer.
#[tokio::test]
async fn what_is_held_to_be_judged_takes_part_of_the_same_memory_and_passes_where_there_is_no_room() {
    for (limit_bytes, waits) in [(100_000, true), (1_000, false)] {
        let puppet = Puppet::listen().await;
        let config = format!("[limits]\nreplies_in_memory_bytes = {limit_bytes}");
        let house = House::with(Plan { config, backend: Some(puppet.url()), ..Plan::default() }).await;
        let text = "a".repeat(5_000);
        let reply = json!({ "message": { "content": text }, "done": true, "prompt_eval_count": 5, "eval_count": 3 });
        let reply = reply.to_string();
        let (first, rest) = reply.split_at(2_000);
        let mut client = Connection::open(house.public).await;
        let body = chat("m", json!({ "stream": false }));
        client.send(&Request::post("/api/chat", body).bearer(&house.token()).id("whole")).await;
        let mut backend = puppet.asked().await;
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", reply.len());
        backend.say(head + first).await;
        if waits {
            wait_until_async("half a reply", async || (unsent_bytes(&house).await == 2_000).then_some(())).await;
        } else {
            assert_eq!(client.head().await.expect("before the rest").0, 200);
        }
        backend.say(rest).await;
        if waits {
            assert_eq!(client.reply(false).await.expect("a reply").body, reply.as_bytes());
        } else {
            while client.unread.len() < reply.len() && client.more().await {}
            assert_eq!(client.unread, reply.as_bytes());
        }
        assert_eq!(house.final_of("whole").await["extra"]["outcome"], "complete");
        assert_eq!(unsent_bytes(&house).await, 0);
    }
}

#[tokio::test]
async fn readers_that_do_not_read_share_one_memory_and_take_nothing_from_those_who_do() {
    let config = "[limits]\nreply_buffer_bytes = 67108864\nreplies_in_memory_bytes = 2000000\n\
                  slow_reader_stall_ms = 600000";
    let house = House::with(Plan { config: config.to_owned(), ..Plan::default() }).await;
    let mut idle = Vec::new();
    for id in ["one", "two", "three"] {
        let mut client = small_reader(&house).await;
        let body = chat("tiny-loop", json!({}));
        client.send(&Request::post("/api/chat", body).bearer(&house.token()).id(id)).await;
        idle.push((id, client));
    }
    wait_until_async("a full memory", async || (unsent_bytes(&house).await > 1_000_000).then_some(())).await;
    // Who reads needs none of it.
    let reply = house.send(Request::post("/api/chat", chat("tiny-loop", json!({}))).bearer(&house.token()).id("reads"));
    let reply = reply.await;
    assert_eq!((reply.status, reply.end), (200, End::Whole));
    assert!(unsent_bytes(&house).await <= 2_000_000, "bounded");
    let (id, mut late) = idle.pop().expect("three");
    assert_eq!(late.reply(false).await.expect("a reply").end, End::Whole, "late, and whole");
    assert_eq!(house.final_of(id).await["extra"]["outcome"], "complete");
    for (id, client) in idle {
        drop(client);
        assert_eq!(house.final_of(id).await["extra"]["outcome"], "client_abort");
    }
    assert_eq!(unsent_bytes(&house).await, 0, "all of it is given back");
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
