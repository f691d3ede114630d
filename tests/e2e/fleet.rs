//! Several backends as one: who is asked for what, and what becomes of it when one of them is not as it should be.

use behavry_ollama_proxy::simulator::{Fault, Seen, Simulator, SimulatorOptions};
use serde_json::{Value, json};

use crate::client::{Connection, Request};
use crate::house::{House, PATIENCE, Plan, wait_until_async};
use crate::key_server::{KeyServer, Says, tls_for};
use crate::puppet::Puppet;

pub fn chat(model: &str, stream: bool) -> Value {
    json!({ "model": model, "stream": stream, "messages": [{ "role": "user", "content": "hi" }] })
}

/// A simulator that holds these models.
pub async fn holding(models: &[&str]) -> Simulator {
    let models = models.iter().map(|model| (*model).to_owned()).collect();
    Simulator::start(SimulatorOptions { models, ..SimulatorOptions::for_tests() }).await.expect("it listens")
}

/// Tables for backends called `a`, `b` and so on, each with further lines.
pub fn tables<'a>(backends: impl IntoIterator<Item = (String, &'a str)>) -> String {
    let table = |(i, (url, lines)): (usize, (String, &str))| {
        format!("[[backend]]\nurl = \"{url}\"\nname = \"{}\"\n{lines}\n", char::from(b'a' + i as u8))
    };
    backends.into_iter().enumerate().map(table).collect()
}

/// Of inference and management: what the catalogue asks is not counted.
pub fn targets(simulator: &Simulator) -> Vec<String> {
    let own = |seen: &Seen| seen.header("x-request-id") == Some("catalogue");
    simulator.seen().iter().filter(|seen| !own(seen)).map(|seen| seen.target.clone()).collect()
}

pub async fn backends(house: &House) -> Vec<Value> {
    let activity = Request::get("/api/v1/activity").send(house.operator).await.json();
    activity["backends"].as_array().expect("a list").clone()
}

/// What each backend has is known.
pub async fn lists_are_read(house: &House) {
    let all = async || backends(house).await.iter().all(|each| each["models"].is_array()).then_some(());
    wait_until_async("all lists", all).await;
}

#[tokio::test]
async fn a_request_goes_to_the_backend_that_has_its_model() {
    let (a, b, c) = (holding(&["llama3.2", "both"]).await, holding(&["mistral:7b", "both"]).await, holding(&[]).await);
    let config = format!("{}[catalogue]\nrefresh_s = 30\n", tables([&a, &b, &c].map(|each| (each.url(), ""))));
    let house = House::with(Plan { config, ..Plan::default() }).await;
    // The first requests too: they wait until each backend has said what it has.
    for (id, model, backend) in
        [("1", "mistral:7b", "b"), ("2", "LLAMA3.2:latest", "a"), ("3", "library/Mistral:7B", "b")]
    {
        let reply = house.send(Request::post("/api/chat", chat(model, true)).bearer(&house.token()).id(id)).await;
        assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some(backend)), "{model}");
        let record = house.final_of(id).await;
        assert_eq!((&record["extra"]["backend"], &record["extra"]["retries"]), (&json!(backend), &json!(0)), "{model}");
        let placement = record["extra"]["placement"].as_str().expect("a reason").to_owned();
        assert!(["held", "loaded"].contains(&placement.as_str()), "{model}: {placement}");
    }
    for (path, body) in
        [("/api/show", json!({ "model": "mistral:7b" })), ("/v1/chat/completions", chat("mistral:7b", false))]
    {
        let reply = house.post(path, body).await;
        assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")), "{path}");
    }
    // Once it is loaded somewhere it stays there.
    let first =
        house.post("/api/chat", chat("both", false)).await.header("x-behavry-backend").expect("chosen").to_owned();
    for n in 0..4 {
        let id = format!("both-{n}");
        let reply = house.send(Request::post("/api/chat", chat("both", false)).bearer(&house.token()).id(&id)).await;
        assert_eq!(reply.header("x-behavry-backend"), Some(first.as_str()));
        assert_eq!(house.final_of(&id).await["extra"]["placement"], "loaded");
    }
    // What nobody has is refused in Ollama's own words, by one of them.
    let reply = house.post("/api/chat", chat("nobody-has-it", false)).await;
    assert_eq!(reply.status, 404);
    assert!(reply.text().contains("not found"), "{}", reply.text());
}

#[tokio::test]
async fn what_a_backend_holds_and_has_loaded_is_shown_to_operators() {
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["mistral"]).await);
    let config = format!(
        "{}[catalogue]\nrefresh_s = 1\nloaded_s = 1\n",
        tables([(a.url(), "tier = 1\nweight = 3"), (b.url(), "")])
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    assert_eq!(house.post("/api/chat", chat("llama3.2", false)).await.status, 200);
    let known = wait_until_async("what the backends hold", async || {
        let known = backends(&house).await;
        let told = known[0]["loaded"] == json!(["llama3.2"]) && known.iter().all(|each| each["version"].is_string());
        told.then_some(known)
    })
    .await;
    assert_eq!((&known[0]["name"], &known[0]["tier"], &known[0]["weight"]), (&json!("a"), &json!(1), &json!(3)));
    assert_eq!((&known[0]["models"], &known[1]["models"]), (&json!(["llama3.2"]), &json!(["mistral"])));
    assert_eq!(known[1]["loaded"], json!([]));
    // A model's details are read once, and not at every look.
    let shown = |simulator: &Simulator| simulator.seen().iter().filter(|seen| seen.target == "/api/show").count();
    let looks = |seen: &[Seen]| seen.iter().filter(|seen| seen.target == "/api/ps" && seen.ended.is_some()).count();
    b.wait_for(PATIENCE, |seen| looks(seen) >= 3).await.expect("three looks");
    assert_eq!((shown(&a), shown(&b)), (1, 1));
}

#[tokio::test]
async fn management_goes_to_the_backend_that_is_named_and_to_no_other() {
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["llama3.2"]).await);
    let house = House::with(Plan { config: tables([&a, &b].map(|each| (each.url(), ""))), ..Plan::default() }).await;
    let admin = house.token_with(&[], &["web:read", "web:write", "ollama:admin"]);
    let copy = || Request::post("/api/copy", json!({ "source": "llama3.2", "destination": "mine" })).bearer(&admin);
    for (id, request) in [("none", copy()), ("unknown", copy().header("x-behavry-backend", "c"))] {
        let reply = house.send(request.id(id)).await;
        assert_eq!((reply.status, reply.code().as_str()), (400, "unsupported_parameter"), "{id}");
        assert!(reply.text().contains("x-behavry-backend: a, b"), "{id}: {}", reply.text());
        assert_eq!(house.final_of(id).await["extra"]["outcome"], "refused", "{id}");
    }
    let twice = copy().header("x-behavry-backend", "a").header("x-behavry-backend", "b");
    assert_eq!(house.send(twice).await.code(), "bad_framing");
    assert_eq!((a.connections(), b.connections()), (0, 0));
    let reply = house.send(copy().header("x-behavry-backend", "b").id("b")).await;
    assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")));
    assert_eq!(house.final_of("b").await["extra"]["placement"], "named");
    assert_eq!((a.connections(), targets(&b)), (0, vec!["/api/copy".to_owned()]));
    assert!(b.seen().iter().all(|seen| seen.header("x-behavry-backend").is_none()), "it goes no further");

    let config = format!("[fleet]\nmanage = \"a\"\n{}", tables([&a, &b].map(|each| (each.url(), ""))));
    let second = House::with(Plan { config, ..Plan::default() }).await;
    assert_eq!(second.send(copy()).await.header("x-behavry-backend"), Some("a"));
}

/// It takes connections and says nothing.
#[tokio::test]
async fn a_black_hole_delays_nobody_else() {
    let (a, hole) = (holding(&["llama3.2"]).await, Puppet::listen().await);
    let config = format!("{}[catalogue]\nrefresh_s = 1\nloaded_s = 1\n", tables([(hole.url(), ""), (a.url(), "")]));
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(hole.accept().await); // list, version and what is loaded: asked at once, and answered never
    }
    // Meanwhile the other is read, again and again, and serves.
    let looks = |seen: &[Seen]| seen.iter().filter(|seen| seen.target == "/api/tags" && seen.ended.is_some()).count();
    a.wait_for(PATIENCE, |seen| looks(seen) >= 2).await.expect("two looks");
    for _ in 0..10 {
        let reply = house.post("/api/chat", chat("llama3.2", true)).await;
        assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")));
    }
}

#[tokio::test]
async fn a_tier_is_used_once_the_slots_of_the_one_before_are_taken() {
    let (first, second) = (Puppet::listen().await, Puppet::listen().await);
    let config = tables([(first.url(), "model_slots = { m = 2 }"), (second.url(), "tier = 1")]);
    // To wait for a slot costs more than a second, and a higher tier that second.
    let config = format!("{config}[queue]\ntier_s = 1\n");
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let mut running = Vec::new();
    for (n, puppet) in [&first, &first, &second].into_iter().enumerate() {
        let mut client = Connection::open(house.public).await;
        client.send(&Request::post("/api/chat", chat("m", true)).bearer(&house.token())).await;
        let mut hand = puppet.accept().await;
        hand.request().await;
        running.push((client, hand));
        assert_eq!(running.len(), n + 1);
    }
    // A slot that is given back is used again.
    let (mut client, mut hand) = running.remove(0);
    hand.answer("200 OK", "{\"done\":true,\"done_reason\":\"stop\"}").await;
    assert_eq!(client.reply(false).await.expect("a reply").status, 200);
    wait_until_async("the slot's return", async || {
        let activity = Request::get("/api/v1/activity").send(house.operator).await.json();
        (activity["in_flight"]["a"] == 1).then_some(())
    })
    .await;
    client.send(&Request::post("/api/chat", chat("m", true)).bearer(&house.token())).await;
    hand.request().await; // over the same connection
}

#[tokio::test]
async fn models_that_no_backend_may_serve_are_served_by_none() {
    let (a, b) = (holding(&["llama3.2", "mistral"]).await, holding(&["llama3.2", "mistral"]).await);
    let config = tables([(a.url(), "models = [\"llama*\"]"), (b.url(), "models = [\"library/mistral\"]")]);
    let house = House::with(Plan { config, ..Plan::default() }).await;
    for _ in 0..3 {
        for (model, backend) in [("llama3.2", "a"), ("MISTRAL:latest", "b")] {
            let reply = house.post("/api/chat", chat(model, false)).await;
            assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some(backend)));
        }
    }
    let reply = house.post("/api/chat", chat("codellama", false)).await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "no_backend"));
    assert!(reply.header("retry-after").is_some());
}

#[tokio::test]
async fn a_stub_of_a_cloud_model_on_one_backend_makes_it_one_for_all() {
    let (a, stub) = (holding(&["innocent", "llama3.2"]).await, KeyServer::open(Says::Nothing, None).await);
    let tags = json!({ "models": [{ "name": "innocent:latest", "model": "innocent:latest", "remote_host": "https://ollama.com:443" }] });
    stub.say(Says::json(tags));
    let url = format!("http://{}", stub.address);
    let config = format!("{}[catalogue]\nrefresh_s = 30\n", tables([(a.url(), ""), (url, "")]));
    let house = House::with(Plan { config, ..Plan::default() }).await;
    lists_are_read(&house).await;
    let reply = house.post("/api/chat", chat("innocent", false)).await;
    assert_eq!((reply.status, reply.code().as_str()), (403, "egress_denied"));
    assert_eq!(house.post("/api/chat", chat("llama3.2", false)).await.status, 200);
    assert_eq!(targets(&a), ["/api/chat"], "the refused one reached nobody");
}

#[tokio::test]
async fn a_backend_over_https_is_verified_with_its_own_ca_and_gets_its_own_bearer() {
    let (ca, acceptor) = tls_for("localhost");
    let (other_ca, _) = tls_for("localhost");
    let server = KeyServer::open(Says::json(json!({ "version": "9.9.9" })), Some(acceptor)).await;
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let (good, bad, bearer) =
        (write("ca.pem", &ca), write("other.pem", &other_ca), write("bearer", "sk-of-the-file\n"));
    std::fs::set_permissions(&bearer, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("its mode");
    let url = format!("https://localhost:{}", server.address.port());
    let open = |lines: String| {
        let config = tables([(url.clone(), lines.as_str())]);
        House::with(Plan { config, ..Plan::default() })
    };
    let house = open(format!("ca_file = \"{good}\"\nbearer_file = \"{bearer}\"")).await;
    let reply = house.get("/api/version").await;
    assert_eq!((reply.status, reply.json()["version"].as_str()), (200, Some("9.9.9")), "{}", reply.text());
    let asked = server.asked();
    assert!(asked[0].to_ascii_lowercase().contains("authorization: bearer sk-of-the-file\r\n"), "{asked:?}");
    assert!(!house.log().contains("sk-of-the-file") && !house.audit_text().contains("sk-of-the-file"));
    // Another CA's word, or the machine's, is not enough.
    for lines in [format!("ca_file = \"{bad}\""), String::new()] {
        let house = open(lines).await;
        let reply = house.get("/api/version").await;
        assert_eq!((reply.status, reply.code().as_str()), (502, "backend_unreachable"));
    }
    assert_eq!(server.asked().len(), asked.len(), "nothing was sent to whom nobody vouches for");
}

#[tokio::test]
async fn a_failing_backend_is_not_chosen_while_another_can_be() {
    let (a, b) = (holding(&["llama3.2"]).await, holding(&["llama3.2"]).await);
    let config = format!("{}[catalogue]\nrefresh_s = 1\n", tables([&a, &b].map(|each| (each.url(), ""))));
    let house = House::with(Plan { config, ..Plan::default() }).await;
    a.set_fault(Some(Fault::Refuses)).await.expect("closed");
    wait_until_async("its being down", async || (backends(&house).await[0]["up"] == false).then_some(())).await;
    for _ in 0..6 {
        let reply = house.post("/api/chat", chat("llama3.2", false)).await;
        assert_eq!((reply.status, reply.header("x-behavry-backend")), (200, Some("b")));
    }
}
