//! What becomes of those who wait when a backend is drained, fails or comes back meanwhile: they go by what is so when they are placed.

use std::collections::BTreeSet;

use behavry_ollama_proxy::simulator::Fault;

use crate::client::{Connection, Request};
use crate::fleet::{backends, chat, holding, tables};
use crate::house::{House, PATIENCE, Plan, wait_until_async};
use crate::puppet::Puppet;
use crate::queue::{DONE, answer, ask, next, send, waiting};

async fn in_flight(house: &House, backend: &str) -> u64 {
    let activity = Request::get("/api/v1/activity").send(house.operator).await.json();
    activity["in_flight"][backend].as_u64().unwrap_or(0)
}

/// A client whose stream has begun and does not end, and the backend that holds it.
async fn stalled(house: &House) -> (Connection, String) {
    let mut client = Connection::open(house.public).await;
    client.send(&Request::post("/api/chat", chat("m", true)).bearer(&house.token())).await;
    let (_, headers) = client.head().await.expect("a reply");
    let backend = headers.into_iter().find(|(name, _)| name.eq_ignore_ascii_case("x-behavry-backend"));
    (client, backend.expect("chosen").1)
}

#[tokio::test]
async fn a_backend_that_is_drained_while_a_request_waits_does_not_get_it() {
    let (a, b) = (holding(&["m"]).await, holding(&["m"]).await);
    let house = House::with(Plan { config: tables([&a, &b].map(|each| (each.url(), ""))), ..Plan::default() }).await;
    for each in [&a, &b] {
        each.set_fault(Some(Fault::StallsMidStream { after: 1 })).await.expect("set");
    }
    let (first, drained) = stalled(&house).await;
    let (second, other) = stalled(&house).await;
    assert_ne!(drained, other, "each has one slot");
    for each in [&a, &b] {
        each.set_fault(None).await.expect("set");
    }
    let waits = send(&house, ask(&house, "waits", "x").body(chat("m", false).to_string()));
    waiting(&house, 1).await;
    house.command_backend("drain", &drained).await;
    drop(first);
    wait_until_async("its slot's return", async || (in_flight(&house, &drained).await == 0).then_some(())).await;
    drop(second);
    let reply = waits.await.expect("sent");
    assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some(other.as_str())));
}

#[tokio::test]
async fn a_backend_that_comes_back_while_a_request_waits_gets_it() {
    let (a, b) = (holding(&["m"]).await, holding(&["m"]).await);
    b.stop().await;
    // Once it is there it is the better one, whatever has to be loaded.
    let config = format!(
        "[catalogue]\nrefresh_s = 1\nloaded_s = 1\n[queue]\ntier_s = 86400\n{}",
        tables([(a.url(), "tier = 1"), (b.url(), "")])
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    wait_until_async("one list", async || backends(&house).await[0]["models"].is_array().then_some(())).await;
    a.set_fault(Some(Fault::StallsMidStream { after: 1 })).await.expect("set");
    let (_first, backend) = stalled(&house).await;
    assert_eq!(backend, "a");
    let waits = send(&house, ask(&house, "waits", "x").body(chat("m", false).to_string()));
    waiting(&house, 1).await;
    b.restart().await.expect("its port was kept");
    let reply = waits.await.expect("sent");
    assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")));
}

#[tokio::test]
async fn of_several_that_wait_a_breaker_that_is_half_open_lets_one_through() {
    let (a, b) = (Puppet::listen().await, Puppet::listen().await);
    let config = format!(
        "[health]\nprobe_s = 0\nrest_s = 1\n[queue]\ntier_s = 86400\n{}",
        // It has slots for all of them: only the breaker keeps them away.
        tables([(a.url(), "slots = 8"), (b.url(), "tier = 1")])
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let request = |id: &str| ask(&house, id, "x").body(chat("m", false).to_string());
    // Three failures in a row open the breaker of the model on `a`; the last of the requests keeps the slot of `b`.
    let mut replies = Vec::new();
    let mut holds = None;
    for n in 0..3 {
        replies.push(send(&house, request(&format!("fails-{n}"))));
        let (hand, _) = next(&a).await;
        answer(hand, "503 Service Unavailable", r#"{"error":"server busy"}"#).await;
        let (hand, _) = next(&b).await;
        match n {
            2 => holds = Some(hand),
            _ => answer(hand, "200 OK", DONE).await,
        }
    }
    for n in 0..4 {
        replies.push(send(&house, request(&format!("waits-{n}"))));
    }
    // After its rest `a` is tried by one of them, which is not told anything; the others wait for `b`, and get it one after another.
    let (trial, tried) = next(&a).await;
    waiting(&house, 3).await;
    let mut hand = holds.expect("kept");
    let mut served = BTreeSet::from([tried]);
    for left in (0..3).rev() {
        answer(hand, "200 OK", DONE).await;
        let (its, id) = next(&b).await;
        (hand, _) = (its, served.insert(id));
        waiting(&house, left).await;
    }
    assert_eq!(served, (0..4).map(|n| format!("waits-{n}")).collect(), "one was a trial, and no other");
    answer(hand, "200 OK", DONE).await;
    // It does what it should, and is used again.
    answer(trial, "200 OK", DONE).await;
    for reply in replies {
        assert_eq!(tokio::time::timeout(PATIENCE, reply).await.expect("in time").expect("sent").status, 200);
    }
    let last = send(&house, request("last"));
    let (hand, id) = next(&a).await;
    assert_eq!(id, "last");
    answer(hand, "200 OK", DONE).await;
    assert_eq!(last.await.expect("sent").header("x-behavry-backend"), Some("a"));
}
