//! The proxy's own keys: another one signs while requests go on, and what the old ones have signed holds until it ends.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::client::{Reply, Request};
use crate::house::{Ended, House, Plan, program, run_to_end, wait_until};

async fn run(arguments: &[&str], state: &Path) -> Ended {
    let mut command = program(arguments);
    command.env("BEHAVRY_STATE_DIR", state);
    run_to_end(command).await
}

async fn good(arguments: &[&str], state: &Path) -> String {
    let ended = run(arguments, state).await;
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    ended.stdout
}

/// A proxy with keys of its own, Ed25519 unless said otherwise: RSA keys take their time.
async fn house(config: &str) -> House {
    let env = match config {
        "" => vec![("BEHAVRY_JWT_ALGORITHM".to_owned(), "EdDSA".to_owned())],
        _ => Vec::new(),
    };
    House::with(Plan { no_key: true, env, config: config.to_owned(), ..Plan::default() }).await
}

async fn mint(state: &Path, more: &[&str]) -> String {
    good(&[&["token", "mint", "--agent", "a"], more].concat(), state).await.trim().to_owned()
}

fn kid_of(token: &str) -> String {
    let header = URL_SAFE_NO_PAD.decode(token.split('.').next().unwrap()).unwrap();
    serde_json::from_slice::<Value>(&header).unwrap()["kid"].as_str().unwrap().to_owned()
}

async fn published(house: &House) -> Vec<String> {
    let set = house.send(Request::get("/.well-known/jwks.json")).await.json();
    let keys = set["keys"].as_array().expect("keys");
    assert!(keys.iter().all(|key| key.get("d").is_none()), "no private half");
    keys.iter().map(|key| key["kid"].as_str().expect("a kid").to_owned()).collect()
}

async fn version(house: &House, token: &str) -> Reply {
    house.send(Request::get("/api/version").bearer(token)).await
}

/// Clients that ask until they are told to stop; nothing but 200 is right.
struct Load {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    clients: tokio::task::JoinSet<()>,
}

impl Load {
    /// Half with a token that they have, half with one that they fetch for each request.
    async fn start(house: &House, state: &Path) -> Load {
        let added = good(&["agent", "add", "fetcher", "--json"], state).await;
        let secret = serde_json::from_str::<Value>(&added).expect("JSON")["client_secret"].as_str().unwrap().to_owned();
        let old = mint(state, &[]).await;
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut clients = tokio::task::JoinSet::new();
        for n in 0..4 {
            let (stop, asked, old, secret) = (Arc::clone(&stop), Arc::clone(&asked), old.clone(), secret.clone());
            let public = house.public;
            clients.spawn(async move {
                let ask =
                    json!({ "client_id": "fetcher", "client_secret": secret, "grant_type": "client_credentials" });
                while !stop.load(Ordering::Relaxed) {
                    let token = match n {
                        0 => {
                            let granted = Request::post("/api/v1/auth/token", ask.clone()).send(public).await;
                            assert_eq!(granted.status, 200, "{}", granted.text());
                            granted.json()["access_token"].as_str().unwrap().to_owned()
                        }
                        _ => old.clone(),
                    };
                    let reply = Request::get("/api/version").bearer(&token).send(public).await;
                    assert_eq!(reply.status, 200, "{} with a token of {}", reply.text(), kid_of(&token));
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Load { stop, asked, clients }
    }

    /// Some more requests have been answered since.
    async fn goes_on(&self) {
        let before = self.asked.load(Ordering::Relaxed);
        wait_until("more requests", || (self.asked.load(Ordering::Relaxed) > before + 20).then_some(())).await;
    }

    async fn end(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.expect("every request was served");
        }
        self.asked.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn rotation_under_load_refuses_no_request_and_the_new_key_signs_when_the_command_returns() {
    let house = house("").await;
    let state = house.dir.path().join("state");
    let load = Load::start(&house, &state).await;
    let first = published(&house).await;
    assert_eq!(first.len(), 1);
    let mut seen = first.clone();
    for _ in 0..3 {
        load.goes_on().await;
        let told = good(&["token", "keys", "rotate"], &state).await;
        let keys = published(&house).await;
        let new: Vec<&String> = keys.iter().filter(|kid| !seen.contains(kid)).collect();
        assert_eq!(new.len(), 1, "one new key, all old ones kept: {keys:?}");
        assert!(told.starts_with(&format!("{} signs now (EdDSA)\n", new[0])), "{told}");
        let minted = mint(&state, &[]).await;
        assert_eq!(&kid_of(&minted), new[0]);
        assert_eq!(version(&house, &minted).await.status, 200);
        seen.push(new[0].clone());
        assert_eq!(keys.iter().collect::<BTreeSet<_>>(), seen.iter().collect());
    }
    load.goes_on().await;
    println!("{} requests, none refused", load.end().await);
    let list = good(&["token", "keys", "list"], &state).await;
    assert_eq!(list.lines().count(), 4);
    assert!(list.lines().next().unwrap().ends_with("signs") && list.matches("verifies until").count() == 3, "{list}");
    assert!(!list.contains("PRIVATE"));
}

#[tokio::test]
async fn a_proxy_that_answers_no_command_takes_a_rotation_from_its_files() {
    let house = house("").await;
    let state = house.dir.path().join("state");
    let load = Load::start(&house, &state).await;
    std::fs::remove_file(state.join("control.sock")).unwrap();
    let told = run(&["token", "keys", "rotate"], &state).await;
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    assert!(told.stderr.contains("rotated here"), "{}", told.stderr);
    let new = told.stdout.split(' ').next().unwrap().to_owned();
    // It was published before it signed, so a token of it holds at once.
    let minted = mint(&state, &[]).await;
    assert_eq!(kid_of(&minted), new);
    assert_eq!(version(&house, &minted).await.status, 200);
    load.goes_on().await;
    load.end().await;
}

#[tokio::test]
async fn a_rotation_that_is_killed_leaves_a_key_that_signs_and_its_tokens_hold() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let env = ("BEHAVRY_JWT_ALGORITHM", "EdDSA");
    let mut first = program(&["token", "mint", "--agent", "a"]);
    first.env("BEHAVRY_STATE_DIR", &state).env(env.0, env.1);
    let old = run_to_end(first).await.stdout.trim().to_owned();
    let mut rotation = program(&["token", "keys", "rotate"]);
    rotation.env("BEHAVRY_STATE_DIR", &state).stdout(Stdio::null()).stderr(Stdio::null());
    let mut rotation = rotation.spawn().unwrap();
    // Both keys are published, and it waits for proxies: the longest step.
    let folder = state.join("verification-keys");
    wait_until("both keys", || (std::fs::read_dir(&folder).map_or(0, |files| files.count()) >= 2).then_some(())).await;
    rotation.kill().unwrap();
    rotation.wait().unwrap();
    let house = House::with(Plan {
        no_key: true,
        env: vec![("BEHAVRY_STATE_DIR".to_owned(), state.display().to_string())],
        ..Plan::default()
    })
    .await;
    assert_eq!(version(&house, &old).await.status, 200);
    let minted = mint(&state, &[]).await;
    assert_eq!(version(&house, &minted).await.status, 200);
    good(&["token", "keys", "rotate"], &state).await;
    for token in [&old, &minted, &mint(&state, &[]).await] {
        assert_eq!(version(&house, token).await.status, 200);
    }
}

#[tokio::test]
async fn a_token_of_a_long_life_outlives_the_rotation_of_its_key() {
    let house = house("").await;
    let state = house.dir.path().join("state");
    let long = mint(&state, &["--ttl", "31000000"]).await;
    let told = good(&["token", "keys", "rotate"], &state).await;
    let until = told.split("verifies until ").nth(1).expect("an end").trim().parse::<jiff::Timestamp>().unwrap();
    let left_s = until.as_second() - jiff::Timestamp::now().as_second();
    assert!(left_s > 31_000_000 - 3600, "{told}");
    assert_eq!(version(&house, &long).await.status, 200);
}

#[tokio::test]
async fn the_tokens_of_a_key_that_was_disclosed_end_with_its_rotation() {
    let house = house("").await;
    let state = house.dir.path().join("state");
    let old = mint(&state, &[]).await;
    assert_eq!(version(&house, &old).await.status, 200);
    good(&["token", "keys", "rotate", "--end-old"], &state).await;
    assert_eq!(version(&house, &old).await.status, 401, "the cache of verified tokens is gone with the key");
    assert_eq!(version(&house, &mint(&state, &[]).await).await.status, 200);
    assert_eq!(published(&house).await.len(), 1);
}

#[tokio::test]
async fn another_algorithm_is_a_rotation_away_and_the_refused_start_says_so() {
    let house = house("").await;
    let state = house.dir.path().join("state");
    let old = mint(&state, &[]).await;
    let config = house.dir.path().join("es256.toml");
    std::fs::write(&config, "[identity]\nalgorithm = \"ES256\"\n").unwrap();
    let config = config.display().to_string();
    let refused = run(&["check", "--config", &config], &state).await;
    assert_eq!(refused.code, Some(78));
    assert!(refused.stderr.contains("token keys rotate --algorithm ES256"), "{}", refused.stderr);
    let told = good(&["token", "keys", "rotate", "--algorithm", "ES256", "--config", &config], &state).await;
    assert!(told.contains("signs now (ES256)"), "{told}");
    good(&["check", "--config", &config], &state).await;
    for token in [&old, &mint(&state, &[]).await] {
        assert_eq!(version(&house, token).await.status, 200);
    }

    let against = run(&["token", "keys", "rotate", "--algorithm", "EdDSA", "--config", &config], &state).await;
    assert_eq!(against.code, Some(78), "the next start would refuse it");
    for word in ["HS256", "none", "rs256"] {
        assert_eq!(run(&["token", "keys", "rotate", "--algorithm", word], &state).await.code, Some(64), "{word}");
    }
}

#[tokio::test]
async fn keys_that_are_configured_are_not_rotated_here() {
    let house = House::open().await;
    let state = house.dir.path().join("state");
    let mut command = program(&["token", "keys", "rotate"]);
    command.env("BEHAVRY_STATE_DIR", &state);
    command.env("BEHAVRY_JWT_PRIVATE_KEY", String::from_utf8_lossy(crate::house::KEY).as_ref());
    let ended = run_to_end(command).await;
    assert_eq!(ended.code, Some(78), "{}", ended.stdout);
    assert!(ended.stderr.contains("where they are made"), "{}", ended.stderr);
    // Nor by whoever reaches the proxy with other settings of their own.
    good(&["token", "mint", "--agent", "a"], &state).await;
    let asked = run(&["token", "keys", "rotate"], &state).await;
    assert_eq!(asked.code, Some(78), "{}", asked.stdout);
}

#[tokio::test]
async fn a_key_that_is_taken_away_while_running_leaves_the_last_good_one() {
    let house = house("").await;
    let state = house.dir.path().join("state");
    let old = mint(&state, &[]).await;
    std::fs::remove_file(state.join("signing-key.pem")).unwrap();
    wait_until("the loss is seen", || house.log().contains("keys not reloaded").then_some(())).await;
    assert_eq!(version(&house, &old).await.status, 200);
    assert!(house.metrics().await.contains("behavry_ollama_reload_failures_total{what=\"keys\"} 1\n"));
    assert!(!state.join("signing-key.pem").exists(), "no other is made in its place");
}
