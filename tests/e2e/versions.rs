//! Ollamas of several versions: a route that one of them lacks, one that becomes another while the proxy runs, and attempts at both
//! for one request.

use std::net::SocketAddr;
use std::sync::Arc;

use behavry_ollama_proxy::simulator::{Fault, Seen, Simulator, SimulatorOptions};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::client::{End, Request};
use crate::failover::two;
use crate::fleet::{backends, tables};
use crate::house::{House, Plan, wait_until, wait_until_async};

async fn ollama(version: &str) -> Simulator {
    let options = SimulatorOptions { ollama_version: version.to_owned(), ..SimulatorOptions::for_tests() };
    Simulator::start(options).await.expect("it listens")
}

/// What came with a request's id, without what the proxy asks of itself.
fn of(simulator: &Simulator, id: &str) -> Vec<Seen> {
    simulator.seen().into_iter().filter(|seen| seen.header("x-request-id") == Some(id)).collect()
}

async fn versions_are_read(house: &House) {
    let all = async || backends(house).await.iter().all(|each| each["version"].is_string()).then_some(());
    wait_until_async("all versions", all).await;
}

fn message(stream: bool) -> Value {
    json!({ "model": "tiny-story", "max_tokens": 9, "stream": stream, "messages": [{ "role": "user", "content": "hi" }] })
}

#[tokio::test]
async fn a_route_that_came_later_is_refused_in_the_callers_words_with_the_version_that_it_needs() {
    for version in ["0.13.2", "0.13.5"] {
        let simulator = SimulatorOptions { ollama_version: version.to_owned(), ..SimulatorOptions::for_tests() };
        let house = House::with(Plan { simulator, ..Plan::default() }).await;
        for stream in [false, true] {
            let id = format!("{version}-{stream}");
            let request = Request::post("/v1/messages", message(stream)).bearer(&house.token()).id(&id);
            let reply = house.send(request).await;
            assert_eq!((reply.status, reply.end), (404, End::Whole), "{id}");
            let words = "The Ollama behind this proxy has no /v1/messages: it needs Ollama 0.14.0 or later. Upgrade it, or use a route that it has.";
            let wanted =
                json!({ "type": "error", "error": { "type": "not_found_error", "message": words }, "request_id": id });
            assert_eq!(reply.json(), wanted, "{id}");
            let record = house.final_of(&id).await;
            assert_eq!(
                (&record["response_code"], &record["extra"]["upstream_status"]),
                (&json!(404), &json!(404)),
                "{id}"
            );
            assert_eq!(record["error"], "the backend's Ollama is too old for the route", "{id}");
            assert_eq!(
                (&record["policy_result"], &record["extra"]["dialect"]),
                (&json!("allow"), &json!("anthropic")),
                "{id}"
            );
            assert_eq!(
                (&record["extra"]["input_tokens"], &record["extra"]["retries"]),
                (&Value::Null, &json!(0)),
                "{id}"
            );
        }
    }
    // What an Ollama says of a model that it has not got is still its own.
    let house = House::open().await;
    let reply = house
        .post(
            "/v1/messages",
            json!({ "model": "absent", "max_tokens": 9, "messages": [{ "role": "user", "content": "hi" }] }),
        )
        .await;
    assert!(reply.text().contains("absent") && !reply.text().contains("0.14.0"), "{}", reply.text());
}

#[tokio::test]
async fn a_route_that_one_backend_lacks_is_another_ones_chance() {
    let (old, new) = (ollama("0.13.5").await, ollama("0.33.0").await);
    let house = two(&old, &new, "").await;
    for stream in [false, true] {
        let id = format!("chance-{stream}");
        let reply = house.send(Request::post("/v1/messages", message(stream)).bearer(&house.token()).id(&id)).await;
        assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")), "{}", reply.text());
        let record = house.final_of(&id).await;
        assert_eq!((&record["extra"]["outcome"], &record["error"]), (&json!("complete"), &Value::Null), "{id}");
        let placement = record["extra"]["placement"].as_str().expect("a reason");
        assert!(placement.ends_with(", after a no_route"), "{id}: {placement}");
    }
    // It lacks the route and not the model: it is asked for that all the same.
    let chat = json!({ "model": "tiny-story", "messages": [{ "role": "user", "content": "hi" }] });
    assert_eq!(house.post("/v1/chat/completions", chat).await.header("x-behavry-backend"), Some("a"));
}

#[tokio::test]
async fn each_attempt_is_converted_or_not_as_its_backend_needs_it() {
    for (first, second) in [("0.12.6", "0.33.0"), ("0.33.0", "0.12.6"), ("0.12.6", "0.13.2")] {
        let (a, b) = (ollama(first).await, ollama(second).await);
        let house = two(&a, &b, "").await;
        versions_are_read(&house).await;
        a.set_fault(Some(Fault::QueueFull)).await.expect("nothing to open");
        let is_old = |version: &str| version != "0.33.0";
        for stream in [false, true] {
            let id = format!("{first}-{second}-{stream}");
            // Spaces that a rewriting would lose.
            let body = format!(r#"{{ "model":"tiny-story", "input" : "hi", "stream": {stream}, "seed":7 }}"#);
            let request = Request::new("POST", "/v1/responses").bearer(&house.token()).id(&id).body(body.as_str());
            let reply = house.send(request).await;
            assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}: {}", reply.text());
            assert_eq!(reply.header("x-behavry-backend"), Some("b"), "{id}");
            assert!(reply.text().contains("\"status\":\"completed\""), "{id}");
            for (simulator, version) in [(&a, first), (&b, second)] {
                let [seen] = &of(simulator, &id)[..] else { panic!("{id}: one request each") };
                let wanted = if is_old(version) { "/v1/chat/completions" } else { "/v1/responses" };
                assert_eq!(seen.target, wanted, "{id} {version}");
                if !is_old(version) {
                    assert_eq!(String::from_utf8_lossy(&seen.body), body, "{id}: byte for byte");
                }
                assert!(seen.body_whole, "{id}");
            }
            let record = house.final_of(&id).await;
            let filters = if is_old(second) { json!(["responses_to_chat", "seed"]) } else { json!([]) };
            assert_eq!(record["extra"]["filters"], filters, "{id}: of the attempt that was answered");
            assert_eq!(
                (&record["extra"]["retries"], &record["extra"]["outcome"]),
                (&json!(1), &json!("complete")),
                "{id}"
            );
            assert!(record["extra"]["output_tokens"].as_u64() > Some(0), "{id}");
        }
        // What only a new one understands is refused where only an old one is left.
        let body = json!({ "model": "tiny-story", "input": [{ "type": "item_reference", "id": "x" }] });
        let reply = house.post("/v1/responses", body).await;
        if is_old(second) {
            assert_eq!((reply.status, reply.code()), (400, "unsupported_parameter".to_owned()));
            assert_eq!(reply.json()["error"]["param"], "input[0].type");
        }
    }
}

/// An address behind which another server can be put, as when one is stopped and another started on its port.
struct Port {
    url: String,
    behind: watch::Sender<Behind>,
}

/// A server, and what each of its connections holds.
#[derive(Clone)]
struct Behind {
    address: SocketAddr,
    alive: Arc<()>,
}

impl Port {
    async fn open(address: SocketAddr) -> Port {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let (behind, now) = watch::channel(Behind { address, alive: Arc::default() });
        tokio::spawn(async move {
            while let Ok((mut outside, _)) = listener.accept().await {
                let mut now = now.clone();
                let Behind { address, alive } = now.borrow_and_update().clone();
                tokio::spawn(async move {
                    let mut inside = TcpStream::connect(address).await.expect("a simulator listens");
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut outside, &mut inside) => {}
                        _ = now.changed() => {} // the server is stopped, and its connections with it
                    }
                    drop((outside, inside, alive));
                });
            }
        });
        Port { url, behind }
    }

    /// Returns when nothing of the server before is left.
    async fn put(&self, address: SocketAddr) {
        let before = self.behind.send_replace(Behind { address, alive: Arc::default() });
        wait_until("the end of its connections", || (Arc::strong_count(&before.alive) == 1).then_some(())).await;
    }
}

#[tokio::test]
async fn an_ollama_that_becomes_another_version_is_asked_as_what_it_is_now() {
    let (old, new) = (ollama("0.13.2").await, ollama("0.33.0").await);
    let port = Port::open(new.addr()).await;
    let config = format!(
        "[catalogue]\nrefresh_s = 1\nloaded_s = 1\n[health]\nprobe_s = 0\n{}",
        tables([(port.url.clone(), "slots = 1000")])
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let mut sent = 0;
    // Whatever is known of it at that moment, each request is answered, and by what is there.
    let mut ask = async |simulator: &Simulator| {
        sent += 1;
        let id = format!("asked-{sent}");
        let body = json!({ "model": "tiny-story", "input": "hi", "stream": sent % 2 == 0 });
        let reply = house.send(Request::post("/v1/responses", body).bearer(&house.token()).id(&id)).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}: {}", reply.text());
        assert!(reply.text().contains("\"status\":\"completed\""), "{id}");
        assert!(!of(simulator, &id).is_empty(), "{id}: another one answered");
        let record = house.final_of(&id).await;
        let converted = record["extra"]["filters"] == json!(["responses_to_chat"]);
        (converted, record["extra"]["retries"] == json!(0))
    };
    for round in 0..2 {
        for (simulator, converted) in [(&old, true), (&new, false)] {
            simulator.forget();
            port.put(simulator.addr()).await;
            loop {
                // Of two reads the first was taken in before the second began: from then on no request is sent the wrong way first.
                let is_known = versions_read(simulator) >= 2;
                let (was_converted, at_once) = ask(simulator).await;
                assert!(was_converted || !converted, "round {round}: it has no other way");
                if was_converted == converted && at_once {
                    break;
                }
                assert!(!is_known || was_converted == converted, "round {round}: its version is known");
            }
        }
    }
}

/// How often it has said what it is.
fn versions_read(simulator: &Simulator) -> usize {
    simulator.seen().iter().filter(|seen| seen.target == "/api/version" && seen.ended.is_some()).count()
}
