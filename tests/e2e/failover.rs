//! A request whose backend fails before a byte of its reply: another one answers, with the same body, or the client is told so.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use behavry_ollama_proxy::simulator::{Fault, Seen, Simulator};
use serde_json::{Value, json};

use crate::client::{Connection, End, Request};
use crate::fleet::{chat, holding, lists_are_read, tables, targets};
use crate::house::{House, PATIENCE, Plan, program, run_to_end, wait_until_async};
use crate::puppet::Puppet;

/// What backends hold is known, and not read again meanwhile.
pub const READ_ONCE: &str = "[catalogue]\nrefresh_s = 3600\nloaded_s = 3600\n";

/// Two backends; `b` is of a higher tier, and that costs more than any load, so that `a` is always asked first.
pub async fn two(a: &Simulator, b: &Simulator, more: &str) -> House {
    // Breakers open in a test of their own.
    let config = format!(
        "{more}{READ_ONCE}[health]\nprobe_s = 0\nfailures = 1000\n[queue]\ntier_s = 86400\n{}",
        tables([(a.url(), ""), (b.url(), "tier = 1")])
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    lists_are_read(&house).await;
    house
}

fn of<'a>(seen: &'a [Seen], path: &str) -> Vec<&'a Seen> {
    seen.iter().filter(|seen| seen.target == path).collect()
}

#[tokio::test]
async fn what_a_backend_fails_with_is_another_ones_chance_where_the_request_may_be_sent_twice() {
    let (a, b) = (holding(&["llama3.2", "tiny-embed"]).await, holding(&["llama3.2", "tiny-embed"]).await);
    let house = two(&a, &b, "").await;
    let large = json!({ "model": "tiny-embed", "input": "a".repeat(300_000) });
    let requests = [
        ("/api/chat", chat("llama3.2", true)),
        ("/v1/chat/completions", chat("llama3.2", true)), // its body is rewritten
        ("/api/generate", json!({ "model": "llama3.2", "prompt": "a".repeat(9 << 20), "stream": false })),
        ("/api/embed", large),
        ("/api/show", json!({ "model": "llama3.2" })),
    ];
    for (fault, word, moves_text) in [
        (Fault::ClosesBeforeHeaders, "broke_off", true),
        (Fault::ResetsBeforeHeaders, "broke_off", true),
        (Fault::ClosesInHead, "broke_off", true),
        (Fault::GarbageHead, "garbage", true),
        (Fault::Html, "garbage", true),
        (Fault::Redirect { location: "http://localhost:1/".to_owned() }, "garbage", true),
        (Fault::QueueFull, "full", true),
        (Fault::RunnerStopped, "error", false),
    ] {
        for (path, body) in &requests {
            let what = format!("{fault:?} {path}");
            let id = what.replace([' ', '/', '{', '}', ':', '"'], "-");
            a.set_fault_everywhere(fault.clone()).await.expect("nothing to open");
            a.forget();
            b.forget();
            let reply = house.send(Request::post(path, body.clone()).bearer(&house.token()).id(&id)).await;
            let record = house.final_of(&id).await;
            let infers_text = !["/api/embed", "/api/show"].contains(path);
            if infers_text && !moves_text {
                assert_eq!(reply.status, 500, "{what}");
                assert!(targets(&b).is_empty(), "{what}");
                assert_eq!(record["extra"]["retries"], 0, "{what}");
                continue;
            }
            assert_eq!((reply.status, reply.end), (200, End::Whole), "{what}: {}", reply.text());
            assert_eq!(reply.header("x-behavry-backend"), Some("b"), "{what}");
            assert_eq!(
                (&record["extra"]["backend"], &record["extra"]["outcome"]),
                (&json!("b"), &json!("complete")),
                "{what}"
            );
            assert_eq!((&record["error"], &record["extra"]["upstream_status"]), (&Value::Null, &json!(200)), "{what}");
            let placement = record["extra"]["placement"].as_str().expect("a reason");
            assert!(placement.ends_with(&format!(", after a {word}")), "{what}: {placement}");
            assert!(record["extra"]["retries"].as_u64().is_some_and(|retries| retries >= 1), "{what}");
            // One clean request at the one that answered, with the body to its last byte.
            let seen = b.seen();
            let [one] = of(&seen, path)[..] else { panic!("{what}: {} requests", seen.len()) };
            assert!(one.body_whole, "{what}");
            if *path != "/v1/chat/completions" {
                assert_eq!(one.body_bytes as usize, body.to_string().len(), "{what}");
            }
            assert_eq!(
                house.records_of(&id).await.iter().filter(|r| r["extra"]["phase"] == "request").count(),
                1,
                "{what}"
            );
        }
    }
    assert!(house.metrics().await.contains("behavry_ollama_failovers_total{reason=\"full\"} 5\n"));
}

/// A head of a reply that is turned into a new attempt leaves nothing behind, whatever its body's framing.
#[tokio::test]
async fn an_error_in_any_framing_is_given_up_for_another_backends_reply() {
    // A model for each request: one that `b` was seen to answer with is known to be there.
    let models: Vec<String> = (0..14).map(|n| format!("m-{n}")).collect();
    let (first, b) = (Puppet::listen().await, holding(&models.iter().map(String::as_str).collect::<Vec<_>>()).await);
    let mut models = models.iter();
    let config = tables([(first.url(), ""), (b.url(), "tier = 1")]);
    let house =
        House::with(Plan { config: format!("[health]\nprobe_s = 0\nfailures = 1000\n{config}"), ..Plan::default() })
            .await;
    let body = "{\"error\":\"server busy, please try again.  maximum pending requests exceeded\"}";
    let head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n";
    let chunk = format!("{:x}\r\n{body}\r\n", body.len());
    let mut client = Connection::open(house.public).await;
    for (what, reply) in [
        ("length", format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())),
        ("half of it", format!("{head}Content-Length: {}\r\n\r\n{}", body.len(), &body[..9])),
        ("chunks", format!("{head}Transfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n")),
        ("a chunk and no end", format!("{head}Transfer-Encoding: chunked\r\n\r\n{chunk}")),
        ("until the end", format!("{head}Connection: close\r\n\r\n{body}")),
        ("no body", format!("{head}Content-Length: 0\r\n\r\n")),
        ("a 1xx before", format!("HTTP/1.1 103 Early Hints\r\n\r\n{head}Content-Length: 2\r\n\r\n{{}}")),
    ] {
        for stream in [true, false] {
            let model = models.next().expect("enough");
            client.send(&Request::post("/api/chat", chat(model, stream)).bearer(&house.token())).await;
            let mut hand = first.accept().await;
            hand.request().await;
            hand.say(&reply).await;
            let reply = client.reply(false).await.unwrap_or_else(|| panic!("{what}: no reply"));
            assert_eq!(
                (reply.status, reply.end, reply.header("x-behavry-backend")),
                (200, End::Whole, Some("b")),
                "{what}"
            );
            assert!(!reply.text().contains("busy") && reply.text().contains("\"done\":true"), "{what}");
            assert!(client.unread.is_empty(), "{what}");
            hand.closed().await; // what may still come on it reaches nobody
        }
    }
}

#[tokio::test]
async fn what_all_backends_say_is_what_the_client_is_told() {
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["llama3.2"]).await);
    let house = two(&a, &b, "").await;
    for backend in [&a, &b] {
        backend.set_fault(Some(Fault::QueueFull)).await.expect("nothing to open");
    }
    let send = |id: &str, path: &str, body: Value| {
        let request = Request::post(path, body).bearer(&house.token()).id(id);
        house.send(request)
    };
    let reply = send("full", "/api/chat", chat("llama3.2", true)).await;
    assert_eq!((reply.status, reply.header("x-behavry-backend")), (503, Some("b")));
    assert!(reply.text().contains("server busy"), "{}", reply.text());
    assert_eq!(house.final_of("full").await["extra"]["placement"], "only, after a full");
    for backend in [&a, &b] {
        backend.stop().await;
    }
    let reply = send("down", "/v1/chat/completions", chat("llama3.2", true)).await;
    assert_eq!((reply.status, reply.code().as_str()), (502, "backend_unreachable"));
    let words = format!("Cannot reach Ollama at {}, {}. Is it running?", a.url(), b.url());
    assert_eq!(reply.json()["error"]["message"], words);
    let record = house.final_of("down").await;
    assert_eq!((&record["extra"]["retries"], &record["extra"]["outcome"]), (&json!(1), &json!("upstream_error")));
}

#[tokio::test]
async fn after_a_byte_of_the_reply_nothing_is_tried_again() {
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["llama3.2"]).await);
    let house = two(&a, &b, "").await;
    for fault in [Fault::ClosesMidStream { after: 1 }, Fault::ResetsMidStream { after: 1 }] {
        a.set_fault(Some(fault.clone())).await.expect("nothing to open");
        let reply = house.post("/api/chat", chat("llama3.2", true)).await;
        assert_eq!(
            (reply.status, reply.end, reply.header("x-behavry-backend")),
            (200, End::Whole, Some("a")),
            "{fault:?}"
        );
        assert!(reply.lines().last().expect("lines").contains("error"), "{fault:?}");
    }
    assert!(targets(&b).is_empty());
}

#[tokio::test]
async fn management_is_never_tried_elsewhere() {
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["llama3.2"]).await);
    let house = two(&a, &b, "").await;
    let admin = house.token_with(&[], &["web:read", "web:write", "ollama:admin"]);
    let copy = json!({ "source": "llama3.2", "destination": "other" });
    for fault in
        [Fault::QueueFull, Fault::RunnerStopped, Fault::ClosesBeforeHeaders, Fault::ModelMissing, Fault::Refuses]
    {
        a.set_fault_everywhere(fault.clone()).await.expect("closed");
        let request = Request::post("/api/copy", copy.clone()).bearer(&admin).header("x-behavry-backend", "a");
        let status = house.send(request).await.status;
        assert!(status >= 400, "{fault:?}: {status}");
        assert!(targets(&b).is_empty(), "{fault:?}");
        a.set_fault(None).await.expect("open again");
    }
}

#[tokio::test]
async fn a_backend_that_has_lost_a_model_is_not_asked_for_it_again() {
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["llama3.2"]).await);
    let house = two(&a, &b, "").await;
    assert_eq!(house.post("/api/chat", chat("llama3.2", false)).await.header("x-behavry-backend"), Some("a"));
    let delete = Request::new("DELETE", "/api/delete").body(json!({ "model": "llama3.2" }).to_string());
    assert_eq!(delete.send(a.addr()).await.status, 200, "behind the proxy's back");
    for _ in 0..3 {
        let reply = house.post("/api/chat", chat("llama3.2", true)).await;
        assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")));
    }
    assert_eq!(of(&a.seen(), "/api/chat").len(), 2, "it was asked once more, and knew nothing");
}

/// A backend that fails in milliseconds always looks idle.
#[tokio::test]
async fn a_backend_that_answers_fast_failures_gets_less_work_and_not_more() {
    let (a, b) = (holding(&["llama3.2", "mistral"]).await, holding(&["llama3.2", "mistral"]).await);
    let config = format!(
        "{READ_ONCE}[health]\nprobe_s = 0\nrest_s = 60\n{}",
        tables([(a.url(), "weight = 100"), (b.url(), "tier = 1")])
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    lists_are_read(&house).await;
    a.set_fault(Some(Fault::QueueFull)).await.expect("nothing to open");
    for n in 0..30 {
        let reply = house.post("/api/chat", chat("llama3.2", false)).await;
        assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")), "{n}");
    }
    assert_eq!(of(&a.seen(), "/api/chat").len(), 3, "three failures in a row were enough");
    let mut list = program(&["backend", "list"]);
    list.env("BEHAVRY_STATE_DIR", house.dir.path().join("state"));
    let listed = run_to_end(list).await.stdout;
    assert!(
        listed.lines().next().is_some_and(|line| line.starts_with("a ") && line.contains(", llama3.2 open,")),
        "{listed}"
    );
    // Its other model is not at fault.
    a.set_fault(None).await.expect("nothing to open");
    let reply = house.post("/api/chat", chat("mistral", false)).await;
    assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("a")));
}

#[tokio::test]
async fn a_backend_that_comes_back_is_seen_by_the_probe_and_used_again() {
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["llama3.2"]).await);
    let config =
        format!("{READ_ONCE}[health]\nprobe_s = 1\nrest_s = 60\n{}", tables([(a.url(), ""), (b.url(), "tier = 1")]));
    let house = House::with(Plan { config, ..Plan::default() }).await;
    lists_are_read(&house).await;
    let served_by = async || {
        let reply = house.post("/api/chat", chat("llama3.2", true)).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole));
        reply.header("x-behavry-backend").expect("chosen").to_owned()
    };
    for _ in 0..3 {
        wait_until_async("the first backend", async || (served_by().await == "a").then_some(())).await;
        a.stop().await;
        for _ in 0..3 {
            assert_eq!(served_by().await, "b");
        }
        a.restart().await.expect("its port was kept");
    }
}

#[tokio::test]
async fn a_drained_backend_gets_no_new_work_and_finishes_what_it_has() {
    let (first, b) = (Puppet::listen().await, holding(&["m"]).await);
    let config = tables([(first.url(), ""), (b.url(), "tier = 1")]);
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let command = async |arguments: &[&str]| {
        let mut command = program(arguments);
        command.env("BEHAVRY_STATE_DIR", house.dir.path().join("state"));
        run_to_end(command).await
    };
    let mut client = Connection::open(house.public).await;
    client.send(&Request::post("/api/chat", chat("m", true)).bearer(&house.token())).await;
    let mut hand = first.accept().await;
    hand.request().await;
    hand.open_stream("application/x-ndjson").await;
    let drained = command(&["backend", "drain", "a"]).await;
    assert_eq!((drained.code, drained.stdout.as_str()), (Some(0), "backend a gets no new requests; 1 run on it\n"));
    for _ in 0..3 {
        assert_eq!(house.post("/api/chat", chat("m", false)).await.header("x-behavry-backend"), Some("b"));
    }
    assert!(house.metrics().await.contains("behavry_ollama_backend_drained{backend=\"a\"} 1\n"));
    hand.chunk(b"{\"done\":true,\"done_reason\":\"stop\"}\n").await;
    hand.say("0\r\n\r\n").await;
    assert_eq!(client.reply(false).await.expect("a reply").end, End::Whole);
    assert_eq!(command(&["backend", "drain", "b"]).await.code, Some(0));
    let reply = house.post("/api/chat", chat("m", false)).await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "no_backend"));
    assert_eq!(command(&["backend", "undrain", "b"]).await.stdout, "backend b gets requests again\n");
    assert_eq!(house.post("/api/chat", chat("m", false)).await.header("x-behavry-backend"), Some("b"));
    let unknown = command(&["backend", "drain", "c"]).await;
    assert_eq!(unknown.code, Some(64), "{}", unknown.stderr);
    assert!(unknown.stderr.contains("there are a, b"), "{}", unknown.stderr);
}

/// A hundred connections in the pool, one backend that restarts again and again, now at once and now after a while, and one that does not.
/// `tests/long/run restarts` does it at a thousand requests a second and many more times.
#[tokio::test]
async fn while_a_backend_restarts_no_client_that_has_seen_no_byte_sees_an_error() {
    const CLIENTS: usize = 100;
    let setting = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u32>().expect("a number"));
    let restarts = setting("BEHAVRY_TEST_RESTARTS").unwrap_or(6) as usize;
    let every = setting("BEHAVRY_TEST_RATE").map(|rate| Duration::from_secs(1) * CLIENTS as u32 / rate);
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["llama3.2"]).await);
    let config = format!(
        "{READ_ONCE}[health]\nprobe_s = 1\nrest_s = 1\n{}",
        tables([&a, &b].map(|each| (each.url(), "slots = 1000")))
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    lists_are_read(&house).await;
    let (house, over) = (&house, &AtomicBool::new(false));
    let began = Instant::now();
    let client = |n: usize| async move {
        let mut connection = Connection::open(house.public).await;
        let request = Request::post("/api/chat", chat("llama3.2", true)).bearer(&house.token());
        let mut turns =
            every.map(|every| tokio::time::interval_at((began + every * n as u32 / CLIENTS as u32).into(), every));
        let (mut whole, mut cut) = (0, 0);
        while !over.load(SeqCst) || whole == 0 {
            if let Some(turns) = &mut turns {
                turns.tick().await;
            }
            connection.send(&request).await;
            let reply = connection.reply(false).await.expect("an answer");
            // A reply that had begun when its backend died ends with an error; one that had not is another backend's.
            assert_eq!((reply.status, reply.end), (200, End::Whole), "{}", reply.text());
            if reply.text().contains("\"done\":true") { whole += 1 } else { cut += 1 }
        }
        (whole, cut)
    };
    let clients = futures::future::join_all((0..CLIENTS).map(client));
    let backend = async {
        for n in 0..restarts {
            // Each time it has work again.
            a.forget();
            a.wait_for(PATIENCE, |seen| seen.len() >= CLIENTS).await.unwrap_or_else(|_| panic!("restart {n}: no work"));
            a.stop().await;
            if n % 2 == 1 {
                b.forget();
                b.wait_for(PATIENCE, |seen| seen.len() >= CLIENTS)
                    .await
                    .unwrap_or_else(|_| panic!("restart {n}: no work"));
            }
            a.restart().await.expect("its port was kept");
        }
        over.store(true, SeqCst);
    };
    let (counts, ()) = tokio::join!(clients, backend);
    let sum = |of: fn(&(u64, u64)) -> u64| counts.iter().map(of).sum::<u64>();
    let (whole, cut) = (sum(|of| of.0), sum(|of| of.1));
    assert!(whole >= (CLIENTS * restarts / 2) as u64, "{whole} whole replies");
    let took = began.elapsed().as_secs_f64();
    println!(
        "{restarts} restarts, {:.0} requests a second: {whole} whole replies, {cut} cut after a byte",
        (whole + cut) as f64 / took
    );
    // Each request that reached a backend was recorded once, and ended once.
    wait_until_async("the last record", async || {
        let records = house.records();
        let count = |phase: &str| records.iter().filter(|r| r["extra"]["phase"] == phase).count() as u64;
        (count("request") == whole + cut && count("final") == whole + cut).then_some(())
    })
    .await;
}
