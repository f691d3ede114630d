//! Models that are loaded before anybody asks: in nobody's way.

use behavry_ollama_proxy::simulator::{Ending, Fault, Seen, Simulator, SimulatorOptions};

use crate::client::End;
use crate::fleet::{chat, tables};
use crate::house::{House, PATIENCE, Plan};
use crate::queue::{ask, send};

async fn house(backend: &Simulator) -> House {
    let warm = "[[model]]\nname = \"warm\"\nwarm = \"always\"\n[catalogue]\nrefresh_s = 1\nloaded_s = 1\n";
    House::with(Plan { config: format!("{}{warm}", tables([(backend.url(), "")])), ..Plan::default() }).await
}

async fn simulator(load_ms: u64, fault: Option<Fault>) -> Simulator {
    let models = ["warm", "other"].map(str::to_owned).to_vec();
    let options = SimulatorOptions { models, load_ms, fault, ..SimulatorOptions::for_tests() };
    Simulator::start(options).await.expect("it listens")
}

fn loads(seen: &[Seen]) -> Vec<&Seen> {
    seen.iter().filter(|seen| seen.header("x-request-id") == Some("warm")).collect()
}

#[tokio::test]
async fn a_load_that_nobody_waits_for_is_broken_off_for_a_request_that_needs_another_model() {
    let backend = simulator(0, Some(Fault::HangsBeforeHeaders)).await;
    let house = house(&backend).await;
    backend.wait_for(PATIENCE, |seen| !loads(seen).is_empty()).await.expect("it is being loaded");
    backend.set_fault(None).await.expect("set");
    // It would wait for as long as the load hangs.
    let reply = send(&house, ask(&house, "other", "x").body(chat("other", true).to_string())).await.expect("sent");
    assert_eq!((reply.status, reply.end), (200, End::Whole));
    let seen = backend.wait_for(PATIENCE, |seen| loads(seen)[0].ended.is_some()).await.expect("it is broken off");
    assert_eq!(loads(&seen)[0].ended_how, Some(Ending::ClientGone));
    let loaded = |seen: &[Seen]| loads(seen).iter().any(|seen| seen.ended_how == Some(Ending::Complete));
    backend.wait_for(PATIENCE, loaded).await.expect("and comes again, once nobody is in the way");
}

#[tokio::test]
async fn a_request_for_the_model_that_is_being_loaded_waits_for_that_load_and_begins_none() {
    let backend = simulator(1500, None).await;
    let house = house(&backend).await;
    backend.wait_for(PATIENCE, |seen| !loads(seen).is_empty()).await.expect("it is being loaded");
    let reply = send(&house, ask(&house, "same", "x").body(chat("warm", true).to_string())).await.expect("sent");
    assert_eq!((reply.status, reply.end), (200, End::Whole));
    let seen = backend.seen();
    let asked = seen.iter().find(|seen| seen.header("x-request-id") == Some("same")).expect("it came");
    let loaded = loads(&seen)[0];
    assert_eq!(loaded.ended_how, Some(Ending::Complete));
    assert!(loaded.ended.is_some_and(|ended| ended <= asked.started), "they met on a model with one slot");
}
