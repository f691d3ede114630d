//! The queue in front of a backend of one slot, which is moved by hand: who is next, who is turned away, and that no way of ending keeps
//! a slot.

use behavry_ollama_proxy::identity::issuer::Claims;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::client::{Connection, Reply, Request};
use crate::fleet::chat;
use crate::house::{House, Plan, wait_until_async};
use crate::puppet::{Hand, Puppet};

pub const DONE: &str = r#"{"model":"llama3.2","message":{"role":"assistant","content":"hi"},"done":true,"done_reason":"stop","prompt_eval_count":5,"eval_count":3}"#;

/// A proxy in front of one slot.
async fn house(puppet: &Puppet, config: &str) -> House {
    let config = format!("[[backend]]\nurl = \"{}\"\n{config}", puppet.url());
    House::with(Plan { config, ..Plan::default() }).await
}

/// A request that bears its id, so that the backend can say whose turn it is.
pub fn ask(house: &House, id: &str, agent: &str) -> Request {
    let claims = Claims {
        sub: agent.to_owned(),
        permissions: ["web:read", "web:write"].map(str::to_owned).into(),
        ..Claims::default()
    };
    Request::post("/api/chat", chat("llama3.2", false)).bearer(&house.mint(claims)).id(id)
}

pub fn send(house: &House, request: Request) -> JoinHandle<Reply> {
    let public = house.public;
    tokio::spawn(async move { request.send(public).await })
}

/// The next request that reaches the backend, and its id.
pub async fn next(puppet: &Puppet) -> (Hand, String) {
    let mut hand = puppet.accept().await;
    let request = hand.request().await;
    let id =
        request.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("x-request-id: ").map(str::to_owned));
    (hand, id.expect("the backend is told the id"))
}

/// A whole answer. The connection closes, so that the next request opens one.
pub async fn answer(mut hand: Hand, status: &str, body: &str) {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    hand.say(head + body).await;
}

/// Waits until so many requests are in the queue.
pub async fn waiting(house: &House, count: u64) {
    wait_until_async(&format!("{count} waiting"), async || {
        let metrics = house.metrics().await;
        let lines = metrics.lines().filter(|line| line.starts_with("behavry_ollama_queue_waiting_requests{"));
        let sum: u64 = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        (sum == count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn one_slot_serves_one_request_at_a_time_and_the_rest_wait_in_the_proxy() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "").await;
    let first = send(&house, ask(&house, "first", "x"));
    let (hand, id) = next(&puppet).await;
    assert_eq!(id, "first");
    let second = send(&house, ask(&house, "second", "x"));
    waiting(&house, 1).await;
    answer(hand, "200 OK", DONE).await;
    let (hand, id) = next(&puppet).await;
    assert_eq!(id, "second");
    waiting(&house, 0).await;
    answer(hand, "200 OK", DONE).await;
    for (reply, id) in [(first, "first"), (second, "second")] {
        let reply = reply.await.expect("sent");
        assert_eq!(reply.status, 200, "{}", reply.text());
        let told: u64 = reply.header("x-behavry-queue-ms").expect("it was placed").parse().expect("a number");
        let record = house.final_of(id).await;
        let noted = record["extra"]["queue_ms"].as_u64().expect("a number");
        assert!(noted >= told, "{id}: {noted} of {told} ms");
        assert_eq!(record["extra"]["placement"], "only");
        assert_eq!(reply.header("x-behavry-placement"), None, "for those who manage models");
    }
}

#[tokio::test]
async fn people_go_before_jobs_and_a_role_caps_what_one_may_ask_for() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "[queue.roles]\nreports = \"batch\"\n").await;
    let mut replies = vec![send(&house, ask(&house, "runs", "x"))];
    let (mut hand, _) = next(&puppet).await;
    let capped = Claims {
        sub: "capped".to_owned(),
        roles: vec!["reports".to_owned()],
        permissions: ["web:read", "web:write", "ollama:admin"].map(str::to_owned).into(),
        ..Claims::default()
    };
    let capped = Request::post("/api/chat", chat("llama3.2", false)).bearer(&house.mint(capped)).id("capped");
    let in_order = [
        capped.header("x-behavry-priority", "interactive"),
        ask(&house, "job", "job").header("x-behavry-priority", "batch"),
        ask(&house, "usual", "usual"),
        ask(&house, "person", "person").header("x-behavry-priority", "interactive"),
    ];
    for (i, request) in in_order.into_iter().enumerate() {
        replies.push(send(&house, request));
        waiting(&house, i as u64 + 1).await;
    }
    let mut served = Vec::new();
    for _ in 0..4 {
        answer(hand, "200 OK", DONE).await;
        let (its, id) = next(&puppet).await;
        (hand, _) = (its, served.push(id));
    }
    answer(hand, "200 OK", DONE).await;
    assert_eq!(served, ["person", "usual", "capped", "job"]);
    for (i, reply) in replies.into_iter().enumerate() {
        let reply = reply.await.expect("sent");
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("x-behavry-placement"), (i == 1).then_some("only"), "the second may manage models");
    }
}

#[tokio::test]
async fn a_full_queue_says_so_in_each_dialect_with_the_time_to_come_back() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "[queue]\nagent_waiting = 1\nmodel_waiting = 2\n").await;
    let mut replies = vec![send(&house, ask(&house, "runs", "x"))];
    let (mut hand, _) = next(&puppet).await;
    replies.push(send(&house, ask(&house, "waits", "x")));
    waiting(&house, 1).await;
    let messages = json!({ "model": "llama3.2", "max_tokens": 9, "messages": [{ "role": "user", "content": "hi" }] });
    let refused = async |agent: &str, status: u16| {
        for (path, code) in
            [("/api/chat", "/code"), ("/v1/chat/completions", "/error/code"), ("/v1/messages", "/error/type")]
        {
            let request = Request { path: path.into(), ..ask(&house, &format!("{agent}{path}"), agent) };
            let reply = house.send(request.body(messages.to_string())).await;
            assert_eq!(reply.status, status, "{path}: {}", reply.text());
            let after: u64 = reply.header("retry-after").expect("it says when").parse().expect("seconds");
            assert!((1..=60).contains(&after), "{path}: {after}");
            let said = reply.json().pointer(code).and_then(|said| said.as_str().map(str::to_owned));
            let expected = match (path, status) {
                ("/v1/messages", 429) => "rate_limit_error",
                ("/v1/messages", _) => "overloaded_error",
                _ => "queue_full",
            };
            assert_eq!(said.as_deref(), Some(expected), "{path}");
            let record = house.final_of(&format!("{agent}{path}")).await;
            assert_eq!((&record["extra"]["outcome"], &record["policy_result"]), (&json!("refused"), &json!("allow")));
        }
    };
    refused("x", 429).await;
    replies.push(send(&house, ask(&house, "other", "y")));
    waiting(&house, 2).await;
    refused("z", 503).await;
    for _ in 0..2 {
        answer(hand, "200 OK", DONE).await;
        (hand, _) = next(&puppet).await;
    }
    answer(hand, "200 OK", DONE).await;
    for reply in replies {
        assert_eq!(reply.await.expect("sent").status, 200);
    }
}

#[tokio::test]
async fn who_waits_for_too_long_is_told_and_who_leaves_makes_room() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "[queue]\nwait_s = 1\n").await;
    let first = send(&house, ask(&house, "first", "x"));
    let (hand, _) = next(&puppet).await;
    let late = house.send(ask(&house, "late", "x")).await;
    assert_eq!((late.status, late.code().as_str()), (503, "queue_full"));
    assert!(house.final_of("late").await["extra"]["queue_ms"].as_u64() >= Some(1000));
    answer(hand, "200 OK", DONE).await;
    assert_eq!(first.await.expect("sent").status, 200);

    let puppet = Puppet::listen().await;
    let house = self::house(&puppet, "").await;
    let first = send(&house, ask(&house, "first", "x"));
    let (hand, _) = next(&puppet).await;
    let mut leaver = Connection::open(house.public).await;
    leaver.send(&ask(&house, "leaver", "x")).await;
    waiting(&house, 1).await;
    drop(leaver);
    waiting(&house, 0).await;
    assert_eq!(house.final_of("leaver").await["extra"]["outcome"], "client_abort");
    let last = send(&house, ask(&house, "last", "x"));
    waiting(&house, 1).await;
    answer(hand, "200 OK", DONE).await;
    let (hand, id) = next(&puppet).await;
    assert_eq!(id, "last", "nobody computes for those who have left");
    answer(hand, "200 OK", DONE).await;
    assert_eq!((first.await.expect("sent").status, last.await.expect("sent").status), (200, 200));
}

#[tokio::test]
async fn no_way_of_ending_keeps_the_slot() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "").await;
    let stream = |id: &str| ask(&house, id, "x").body(chat("llama3.2", true).to_string());
    // How the backend, or the client, ends it; each time the next request finds the slot free.
    for end in
        ["closes", "500", "404", "garbage", "breaks-off", "no-end", "client-leaves", "client-leaves-early", "whole"]
    {
        let mut client = Connection::open(house.public).await;
        client.send(&stream(end)).await;
        let (mut hand, _) = next(&puppet).await;
        match end {
            "closes" => drop(hand),
            "500" => answer(hand, "500 Internal Server Error", r#"{"error":"no"}"#).await,
            "404" => answer(hand, "404 Not Found", r#"{"error":"model 'llama3.2' not found"}"#).await,
            "garbage" => hand.say("what?\r\n\r\n").await,
            "breaks-off" => {
                hand.open_stream("application/x-ndjson").await;
                hand.chunk(b"{\"model\":\"llama3.2\",\"done\":false}\n").await;
                drop(hand);
            }
            "no-end" => answer(hand, "200 OK", "{\"model\":\"llama3.2\",\"done\":false}").await,
            "client-leaves" => {
                hand.open_stream("application/x-ndjson").await;
                hand.chunk(b"{\"model\":\"llama3.2\",\"done\":false}\n").await;
                client.head().await.expect("a reply");
                drop(client);
                hand.closed().await;
            }
            "client-leaves-early" => {
                drop(client);
                hand.closed().await;
            }
            _ => answer(hand, "200 OK", DONE).await,
        }
        house.final_of(end).await;
        let id = format!("after-{end}");
        let reply = send(&house, ask(&house, &id, "x"));
        let (hand, its) = next(&puppet).await;
        assert_eq!(its, id, "after {end}");
        answer(hand, "200 OK", DONE).await;
        assert_eq!(reply.await.expect("sent").status, 200, "after {end}");
    }
    waiting(&house, 0).await;
}
