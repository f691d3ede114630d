//! Guessing client secrets is slow, and whoever guesses keeps nobody else out (ADR 29; promise I9).

use std::net::{IpAddr, Ipv4Addr};

use behavry_ollama_proxy::identity::secret::{Secret, SecretHash};
use serde_json::{Value, json};

use crate::client::{Connection, Reply, Request};
use crate::house::{House, PATIENCE, Plan};

/// Where the tests' client is when it says nothing else, and where it can be too.
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

/// A proxy with two agents, `worker` and `idle` (suspended), and the secret of both.
struct Office {
    house: House,
    secret: Secret,
    _dir: tempfile::TempDir,
}

impl Office {
    async fn with(identity: &str) -> Office {
        let secret = Secret::random();
        let hash = SecretHash::of(&secret);
        let agents = format!(
            "[[agent]]\nid = \"worker\"\nsecret_hash = \"{hash}\"\n[[agent]]\nid = \"idle\"\nstate = \"suspended\"\nsecret_hash = \"{hash}\"\n",
            hash = hash.as_str()
        );
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("agents.toml");
        std::fs::write(&file, agents).expect("written");
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("ours");
        let house = House::with(Plan {
            config: format!("[audit]\nrefusals_per_second = 100000\n[identity]\n{identity}\n"),
            env: vec![("BEHAVRY_AGENTS_FILE".to_owned(), file.display().to_string())],
            ..Plan::default()
        })
        .await;
        Office { house, secret, _dir: dir }
    }

    async fn right(&self, id: &str, source: IpAddr) -> Reply {
        ask(id, self.secret.expose()).send_from(source, self.house.public).await
    }

    async fn wrong(&self, id: &str, source: IpAddr) -> Reply {
        ask(id, "a guess").send_from(source, self.house.public).await
    }

    async fn turned_away(&self, bound: &str) -> u64 {
        let series = format!("behavry_ollama_token_requests_turned_away_total{{bound=\"{bound}\"}} ");
        let metrics = self.house.metrics().await;
        let count = metrics.lines().find_map(|line| line.strip_prefix(&series)).expect("there from the start");
        count.parse().expect("a count")
    }
}

fn ask(id: &str, secret: &str) -> Request {
    let ask = json!({ "client_id": id, "client_secret": secret, "grant_type": "client_credentials" });
    Request::post("/api/v1/auth/token", ask)
}

fn retry_after(reply: &Reply) -> u64 {
    reply.header("retry-after").expect("it says when").parse().expect("whole seconds")
}

#[tokio::test]
async fn a_hundred_agents_behind_one_address_fetch_their_tokens_at_once() {
    let office = Office::with("").await;
    let mut waiting = Vec::new();
    for _ in 0..100 {
        let mut connection = Connection::open(office.house.public).await;
        connection.send(&ask("worker", office.secret.expose())).await;
        waiting.push(connection);
    }
    // Turns come in order: while a machine under load checks a hundred secrets, nobody waits long for the next token.
    for mut connection in waiting {
        let reply = connection.reply(false).await.expect("a reply");
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    assert_eq!(office.turned_away("address_rate").await + office.turned_away("client_rate").await, 0);
    assert_eq!(office.turned_away("address_share").await, 0);
}

/// Guesses at an id until it is slowed: on a slow machine an allowance has filled up again by the time that it should be used up.
async fn until_slowed(office: &Office, id: &str) -> (String, Reply) {
    for n in 0..100 {
        let request_id = format!("{id}-{n}");
        let reply = ask(id, "a guess").id(&request_id).send(office.house.public).await;
        if reply.status == 429 {
            assert!(n >= 3, "{id} was slowed after {n}");
            return (request_id, reply);
        }
        assert_eq!(reply.status, 401, "{id}");
    }
    panic!("{id} was never slowed");
}

#[tokio::test]
async fn wrong_secrets_are_slowed_with_429_and_it_is_the_same_for_ids_that_exist_and_do_not() {
    let office = Office::with("wrong_secrets_per_minute = 3").await;
    let mut answers = std::collections::BTreeSet::new();
    for id in ["stranger", "idle", "worker"] {
        let (request_id, reply) = until_slowed(&office, id).await;
        assert!((1..=20).contains(&retry_after(&reply)), "one comes back every 20 s");
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        let body = reply.json();
        assert_eq!((&body["error"], &body["code"]), (&json!("temporarily_unavailable"), &json!("rate_limited")));
        assert!(body["detail"].as_str().is_some_and(|detail| detail.contains("Retry-After")), "{body}");
        let (mut headers, text) = reply.without_id_and_date();
        headers.retain(|header| !header.to_ascii_lowercase().starts_with("retry-after"));
        answers.insert((headers, text));
        let last = office.house.final_of(&request_id).await;
        assert_eq!(last["error"], "too many wrong secrets for this client_id");
        assert_eq!((&last["policy_result"], &last["agent_id"]), (&json!("deny"), &Value::Null));
        assert_eq!(last["response_code"], 429);
    }
    assert_eq!(answers.len(), 1, "one answer for all: {answers:?}");
    assert_eq!(office.turned_away("client_rate").await, 3);
    assert_eq!(office.right("worker", HERE).await.status, 429, "who guesses here is not told that he was right");
    assert_eq!(office.house.simulator.connections(), 0);
}

#[tokio::test]
async fn who_guesses_at_an_id_does_not_keep_its_owner_out() {
    let office = Office::with("wrong_secrets_per_minute = 2").await;
    let mut guesses = 0;
    while office.wrong("worker", HERE).await.status != 429 {
        guesses += 1;
        assert!(guesses < 100, "never slowed");
    }
    // An owner that was never seen, while one address guesses.
    assert_eq!(office.right("worker", ELSEWHERE).await.status, 200);
    // Then the whole allowance of the id is used up from many addresses, until one that has not guessed yet gets no guess.
    let mut strangers = (3..=255).map(|n| IpAddr::V4(Ipv4Addr::new(127, 0, 0, n)));
    loop {
        let stranger = strangers.next().expect("nobody else gets a guess in the end");
        if office.wrong("worker", stranger).await.status == 429 {
            break;
        }
        office.wrong("worker", stranger).await;
    }
    for _ in 0..5 {
        assert_eq!(office.right("worker", ELSEWHERE).await.status, 200, "where it proved itself, it gets in");
    }
}

#[tokio::test]
async fn an_address_that_asks_too_often_is_slowed_and_neither_others_nor_its_known_agents_are() {
    let office = Office::with("token_requests_per_minute = 5").await;
    assert_eq!(office.right("worker", HERE).await.status, 200);
    let mut asked = 0;
    let (request_id, reply) = loop {
        let request_id = format!("id-{asked}");
        let reply = ask(&request_id, "a guess").id(&request_id).send(office.house.public).await;
        if reply.status != 401 {
            break (request_id, reply);
        }
        asked += 1;
        assert!(asked < 100, "never slowed");
    };
    assert!(asked >= 4, "slowed after {asked}");
    assert_eq!((reply.status, reply.code()), (429, "rate_limited".to_owned()));
    assert!((1..=12).contains(&retry_after(&reply)), "one comes back every 12 s");
    assert_eq!(office.house.final_of(&request_id).await["error"], "too many token requests from this address");
    assert_eq!(office.turned_away("address_rate").await, 1);
    assert_eq!(office.wrong(&request_id, ELSEWHERE).await.status, 401, "another address is not slowed");
    assert_eq!(office.right("worker", HERE).await.status, 200, "nor an agent that has proved itself here");
    assert_eq!(office.house.get("/api/tags").await.status, 200, "nor who has a token already");
}

#[tokio::test]
async fn one_address_cannot_hold_every_place_with_bodies_that_do_not_come() {
    let office = Office::with("token_requests_per_minute = 100000").await;
    let head = ask("worker", "x").head_bytes();
    let mut held = Vec::new();
    let refused = loop {
        // A place is given up after some seconds, so more than 128 may be needed on a slow machine.
        assert!(held.len() < 5_000, "never refused");
        for _ in 0..16 {
            let mut connection = Connection::open(office.house.public).await;
            connection.write(&head).await;
            held.push(connection);
        }
        let reply = office.right("worker", HERE).await;
        if reply.status != 200 {
            break reply;
        }
    };
    assert!(held.len() >= 128, "refused with {} open", held.len());
    assert_eq!((refused.status, refused.code()), (429, "queue_full".to_owned()));
    assert_eq!(refused.json()["error"], "temporarily_unavailable");
    assert!(refused.header("retry-after").is_some());
    assert_eq!(office.right("worker", ELSEWHERE).await.status, 200, "others have their places");
    assert!(office.turned_away("address_share").await >= 1);
    drop(held);
    let began = std::time::Instant::now();
    while office.right("worker", HERE).await.status != 200 {
        assert!(began.elapsed() < PATIENCE, "the places did not come back");
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_for_its_turn_frees_its_place() {
    let office = Office::with("").await;
    let mut leaving = Vec::new();
    for n in 0..60 {
        let mut connection = Connection::open(office.house.public).await;
        connection.send(&ask("worker", office.secret.expose()).id(&format!("leaving-{n}"))).await;
        leaving.push(connection);
    }
    drop(leaving);
    let mut outcomes = std::collections::BTreeMap::new();
    for n in 0..60 {
        let last = office.house.final_of(&format!("leaving-{n}")).await;
        *outcomes.entry(last["extra"]["outcome"].as_str().expect("a word").to_owned()).or_insert(0) += 1;
    }
    assert!(outcomes.get("client_abort").is_some_and(|count| *count > 0), "{outcomes:?}");

    assert_eq!(office.right("worker", HERE).await.status, 200);
}

#[tokio::test]
async fn token_requests_that_follow_each_other_on_a_connection_are_all_answered() {
    let office = Office::with("").await;
    let mut connection = Connection::open(office.house.public).await;
    let request = ask("worker", office.secret.expose());
    let one = [request.head_bytes(), request.body_bytes()].concat();
    connection.write(&[one.clone(), one.clone(), one].concat()).await;
    for n in 0..3 {
        let reply = connection.reply(false).await.unwrap_or_else(|| panic!("no reply to request {n}"));
        assert_eq!(reply.status, 200, "request {n}");
    }
}
