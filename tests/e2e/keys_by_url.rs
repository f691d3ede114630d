//! Keys from a URL, and a control plane's token endpoint: rotation, outages, garbage, TLS, and what a stranger can cause.
//!
//! On two threads each: a proxy asks the key server before it says that it listens, which the test's own thread waits for.

use std::path::Path;

use behavry_ollama_proxy::identity::issuer::Claims;
use futures::StreamExt;
use serde_json::{Value, json};

use crate::client::{Connection, Reply, Request};
use crate::house::{House, KEY, Plan, program, run_to_end, until_tried, wait_until};
use crate::key_server::{KeyServer, Says, Signer, tls_for};

/// Each refusal has a record of its own.
const NO_FOLDING: &str = "[audit]\nrefusals_per_second = 100000\n";
/// Schedule and floor so long that no test sees them.
const NEVER: &str = "jwks_refresh_s = 86400\njwks_floor_s = 3600\n";
/// As often as can be.
const OFTEN: &str = "jwks_refresh_s = 1\njwks_floor_s = 1\n";

fn plan(server: &KeyServer, more: &str) -> Plan {
    let config = format!("{NO_FOLDING}[identity]\njwks_url = \"{}\"\n{more}", server.url());
    Plan { config, no_key: true, ..Plan::default() }
}

async fn house(server: &KeyServer, more: &str) -> House {
    House::with(plan(server, more)).await
}

fn version(token: &str) -> Request {
    Request::get("/api/version").bearer(token)
}

async fn status(house: &House, token: &str) -> u16 {
    house.send(version(token)).await.status
}

/// Polls: what a schedule does has no event.
async fn until_status(house: &House, token: &str, wanted: u16) {
    let began = std::time::Instant::now();
    while status(house, token).await != wanted {
        assert!(began.elapsed() < crate::house::PATIENCE, "{wanted} did not come:\n{}", house.log());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn metric(house: &House, line: &str) -> Option<f64> {
    house.metrics().await.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok())
}

async fn ready(house: &House) -> Reply {
    Request::get("/readyz").send(house.operator).await
}

// ---- rotation

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_a_key_from_the_url_passes_and_its_agent_is_recorded() {
    let signer = Signer::new();
    let server = KeyServer::open(Says::json(&signer.document), None).await;
    let house = house(&server, NEVER).await;
    assert_eq!(house.send(version(&signer.token()).id("good")).await.status, 200);
    assert_eq!(house.final_of("good").await["agent_id"], "remote-agent");
    assert_eq!(status(&house, &house.token()).await, 401, "a key that the URL does not have");
    assert!(metric(&house, "behavry_ollama_jwks_confirmed_timestamp_seconds").await.unwrap() > 1.7e9);
    let log = house.log();
    assert!(!log.contains("hidden-in-the-query"), "{log}");
    let published = house.send(Request::get("/.well-known/jwks.json")).await.json();
    assert_eq!(
        published,
        serde_json::from_str::<Value>(&signer.document).unwrap(),
        "what verifies here is published here"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_key_is_learned_by_the_first_request_that_names_it() {
    let (old, new) = (Signer::new(), Signer::new());
    let server = KeyServer::open(Says::json(&old.document), None).await;
    let house = house(&server, NEVER).await;
    assert_eq!(status(&house, &old.token()).await, 200);
    server.say(Says::json(&new.document));
    assert_eq!(status(&house, &new.token()).await, 200, "the request waits for the fetch");
    assert_eq!(status(&house, &old.token()).await, 401, "withdrawn with the fetch, though its verdict was cached");
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_was_withdrawn_stops_verifying_by_schedule() {
    let (old, new) = (Signer::new(), Signer::new());
    let server = KeyServer::open(Says::json(&old.document), None).await;
    let house = house(&server, OFTEN).await;
    assert_eq!(status(&house, &old.token()).await, 200);
    server.say(Says::json(&new.document));
    until_status(&house, &old.token(), 401).await;
    assert_eq!(status(&house, &new.token()).await, 200);
}

// ---- what a stranger can cause

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_with_an_unknown_key_cause_one_fetch_and_all_pass() {
    let (old, new) = (Signer::new(), Signer::new());
    until_tried("a thousand requests within the time of a fetch", async || {
        let server = KeyServer::open(Says::json(&old.document), None).await;
        let house = house(&server, NEVER).await;
        server.say(Says::Nothing); // so that all of them wait for the same fetch
        let token = new.token();
        let mut connections = Vec::new();
        for _ in 0..1000 {
            connections.push(Connection::open(house.public).await);
        }
        for connection in &mut connections {
            connection.send(&version(&token)).await;
        }
        server.wait_for_requests(2).await;
        server.say(Says::json(&new.document));
        let mut statuses = Vec::new();
        for mut connection in connections {
            statuses.push(connection.reply(false).await.expect("a reply").status);
        }
        assert_eq!(server.asked().len(), 2, "one at the start, one for all of them");
        if fetch_failed(&house).await {
            return None;
        }
        assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
        Some(())
    })
    .await;
}

/// A fetch takes five seconds at most, and the test has to say within them what the server says.
async fn fetch_failed(house: &House) -> bool {
    metric(house, "behavry_ollama_jwks_fetches_total{result=\"failed\"}").await != Some(0.0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn made_up_keys_cause_one_fetch_in_a_floor_and_are_refused() {
    let signer = Signer::new();
    let server = KeyServer::open(Says::json(&signer.document), None).await;
    let house = house(&server, NEVER).await;
    for _ in 0..20 {
        let reply = house.send(version(&Signer::new().token())).await;
        assert_eq!((reply.status, reply.code()), (401, "invalid_token".to_owned()));
    }
    assert_eq!(server.asked().len(), 2);
    // A stranger who knows a name of ours, or names none, causes nothing at all.
    let good = signer.token();
    let forged = format!("{}x", &good[..good.len() - 1]);
    assert_eq!(status(&house, &forged).await, 401);
    assert_eq!(server.asked().len(), 2);
    let last = house.send(version(&Signer::new().token()).id("stranger")).await;
    assert_eq!(last.status, 401);
    assert_eq!(house.final_of("stranger").await["error"], "unknown_key");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_wait_for_a_server_that_stalls_for_a_bounded_time_and_others_are_served() {
    let signer = Signer::new();
    let server = KeyServer::open(Says::json(&signer.document), None).await;
    let house = house(&server, NEVER).await;
    server.say(Says::Nothing);
    let mut waiting = Connection::open(house.public).await;
    waiting.send(&version(&Signer::new().token())).await;
    server.wait_for_requests(2).await;
    assert_eq!(status(&house, &signer.token()).await, 200, "a known key waits for nobody");
    assert_eq!(waiting.reply(false).await.expect("in the end").status, 401);
    assert_eq!(metric(&house, "behavry_ollama_jwks_fetches_total{result=\"failed\"}").await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_wait_for_a_fetch_leave_places_for_those_who_have_a_token() {
    let (signer, new) = (Signer::new(), Signer::new());
    until_tried("three requests within the time of a fetch", async || {
        let server = KeyServer::open(Says::json(&signer.document), None).await;
        let mut plan = plan(&server, NEVER);
        plan.config.push_str("[limits]\nin_flight = 4\n");
        let house = House::with(plan).await;
        server.say(Says::Nothing);
        let token = new.token();
        let mut replies = futures::stream::FuturesUnordered::new();
        for _ in 0..3 {
            let mut connection = Connection::open(house.public).await;
            connection.send(&version(&token)).await;
            replies.push(async move { connection.reply(false).await.expect("a reply").status });
        }
        assert_eq!(replies.next().await, Some(401), "half of the places are taken, and the third is refused at once");
        assert_eq!(status(&house, &signer.token()).await, 200);
        server.say(Says::json(&new.document));
        let rest = (replies.next().await, replies.next().await);
        if fetch_failed(&house).await {
            return None;
        }
        assert_eq!(rest, (Some(200), Some(200)));
        Some(())
    })
    .await;
}

// ---- bad documents

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_else_comes_back_the_last_good_keys_stay() {
    let signer = Signer::new();
    let good = Says::json(&signer.document);
    let server = KeyServer::open(good.clone(), None).await;
    let mut private: Value = serde_json::from_str(&signer.document).unwrap();
    private["keys"][0]["d"] = json!("AAAA");
    let house = house(&server, OFTEN).await;
    let elsewhere = Signer::new();
    let other = KeyServer::open(Says::json(&elsewhere.document), None).await;
    let moved: &'static str = format!("location: {}\r\n", other.url()).leak();
    for (bad, words) in [
        (Says::json(""), "the key is set but empty"),
        (Says::json("<html>not found</html>"), "not a JWKS document"),
        (Says::json(r#"{"keys":[]}"#), "no key that can verify"),
        (Says::json(r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#), "no key that can verify"),
        (Says::json(&private), "holds a private key"),
        (Says::json(format!("{}{}", signer.document, " ".repeat(2 << 20))), "larger than 1024 KiB"),
        (Says::Reply(404, "", signer.document.clone()), "it answered 404"),
        (Says::Reply(302, moved, String::new()), "redirects are not followed"),
    ] {
        let count = |what: &str| house.log().matches(what).count();
        let (failed, healed) = (count(words), count("gives keys again"));
        server.say(bad);
        wait_until(words, || (count(words) > failed).then_some(())).await;
        assert_eq!(status(&house, &signer.token()).await, 200, "{words}");
        server.say(good.clone());
        wait_until("the recovery", || (count("gives keys again") > healed).then_some(())).await;
    }
    assert!(other.asked().is_empty(), "a redirect leads nowhere");
    assert!(metric(&house, "behavry_ollama_jwks_fetches_total{result=\"failed\"}").await.unwrap() >= 8.0);
    assert!(!house.log().contains("html") && !house.log().contains("AAAA"), "nothing of a document is logged");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_another_algorithm_than_the_configured_one_is_not_taken() {
    let signer = Signer::new();
    let server = KeyServer::open(Says::json(&signer.document), None).await;
    let house = house(&server, &format!("{NEVER}algorithm = \"RS256\"\n")).await;
    assert_eq!(house.send(version(&signer.token())).await.code(), "keys_unavailable");
    assert!(house.log().contains("another algorithm than identity.algorithm, RS256"), "{}", house.log());
}

// ---- outages

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_url_is_down_the_last_good_keys_stay_also_over_a_restart() {
    let signer = Signer::new();
    let mut server = KeyServer::open(Says::json(&signer.document), None).await;
    let first = house(&server, OFTEN).await;
    assert_eq!(status(&first, &signer.token()).await, 200);
    let saved = first.dir.path().join("state/jwks-last-good.json");
    wait_until("the saved copy", || saved.exists().then_some(())).await;
    assert!(!std::fs::read_to_string(&saved).unwrap().contains("hidden-in-the-query"));
    server.die().await;
    wait_until("the outage", || first.log().contains("cannot be reached").then_some(())).await;
    assert_eq!(status(&first, &signer.token()).await, 200);
    assert_eq!(ready(&first).await.status, 200);

    let state = tempfile::tempdir().expect("a folder");
    let restarted = |saved: Vec<u8>, server: &KeyServer| {
        let folder = state.path().join(uuid_like(&saved));
        std::fs::create_dir_all(&folder).expect("a folder");
        write_private(&folder.join("jwks-last-good.json"), &saved);
        let env = vec![("BEHAVRY_STATE_DIR".to_owned(), folder.display().to_string())];
        House::with(Plan { env, ..plan(server, NEVER) })
    };
    let copy = std::fs::read(&saved).unwrap();
    let second = restarted(copy.clone(), &server).await;
    assert_eq!(status(&second, &signer.token()).await, 200);
    drop(second);

    // A copy from the day before yesterday is not trusted.
    let mut old: Value = serde_json::from_slice(&copy).unwrap();
    old["confirmed_at"] = json!(old["confirmed_at"].as_i64().unwrap() - 2 * 86_400);
    let third = restarted(old.to_string().into_bytes(), &server).await;
    assert_eq!(third.send(version(&signer.token())).await.code(), "keys_unavailable");
    assert!(third.log().contains("hours old"), "{}", third.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_keys_the_proxy_starts_is_not_ready_and_heals_by_itself() {
    let signer = Signer::new();
    let mut server = KeyServer::open(Says::json(&signer.document), None).await;
    server.die().await;
    let house = house(&server, OFTEN).await;
    let reply = ready(&house).await;
    assert_eq!(reply.status, 503);
    assert!(reply.text().contains("jwks_url"), "{}", reply.text());
    let reply = house.send(version(&signer.token()).id("early")).await;
    assert_eq!((reply.status, reply.code()), (503, "keys_unavailable".to_owned()));
    assert!(reply.header("retry-after").is_some());
    assert_eq!(house.final_of("early").await["extra"]["outcome"], "refused");
    assert_eq!(house.send(Request::get("/api/version")).await.status, 401, "no token is no token");
    assert!(house.simulator.seen().is_empty());
    assert!(!house.dir.path().join("state/agents.toml").exists());
    server.rise().await;
    until_status(&house, &signer.token(), 200).await;
    assert_eq!(ready(&house).await.status, 200);
}

// ---- TLS

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_is_verified_with_the_ca_of_the_configuration() {
    let (signer, dir) = (Signer::new(), tempfile::tempdir().expect("a folder"));
    let (ca, tls) = tls_for("localhost");
    let (other_ca, other_tls) = tls_for("elsewhere.example");
    let file = |name: &str, pem: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, pem).expect("written");
        format!("{NEVER}ca_file = \"{}\"\n", path.display())
    };
    let (ca, other_ca) = (file("ca.pem", &ca), file("other.pem", &other_ca));
    let server = KeyServer::open(Says::json(&signer.document), Some(tls)).await;
    let wrong_name = KeyServer::open(Says::json(&signer.document), Some(other_tls)).await;
    let good = house(&server, &ca).await;
    assert_eq!(status(&good, &signer.token()).await, 200);
    for (server, config, words) in [
        (&server, NEVER, "signed by a CA that is not trusted here"),
        (&server, other_ca.as_str(), "signed by a CA that is not trusted here"),
        (&wrong_name, other_ca.as_str(), "for another name"),
    ] {
        let before = server.asked().len();
        let house = house(server, config).await;
        assert_eq!(house.send(version(&signer.token())).await.code(), "keys_unavailable", "{words}");
        assert!(house.log().contains(words), "{words}: {}", house.log());
        assert_eq!(server.asked().len(), before, "{words}: nothing was sent");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_the_environment_is_not_used() {
    let signer = Signer::new();
    let server = KeyServer::open(Says::json(&signer.document), None).await;
    let man_in_the_middle = KeyServer::open(Says::json(Signer::new().document), None).await;
    let names = ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"];
    let proxy = format!("http://{}", man_in_the_middle.address);
    let env = names.iter().map(|name| ((*name).to_owned(), proxy.clone())).collect();
    let house = House::with(Plan { env, ..plan(&server, NEVER) }).await;
    assert_eq!(status(&house, &signer.token()).await, 200);
    assert!(man_in_the_middle.asked().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_that_anybody_on_the_way_could_answer_stops_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = dir.path().join("proxy.toml");
    for line in ["jwks_url = \"http://keys.example/keys\"", "token_url = \"http://plane.example/token\""] {
        std::fs::write(&config, format!("[identity]\n{line}\n")).expect("written");
        let mut command = program(&["check"]);
        command.env("BEHAVRY_CONFIG", &config).env("BEHAVRY_STATE_DIR", dir.path());
        let ended = run_to_end(command).await;
        assert_eq!(ended.code, Some(78));
        assert!(ended.stderr.contains("anybody on the way"), "{}", ended.stderr);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_asks_the_url() {
    let signer = Signer::new();
    let mut server = KeyServer::open(Says::json(&signer.document), None).await;
    let dir = tempfile::tempdir().expect("a folder");
    let config = dir.path().join("proxy.toml");
    std::fs::write(&config, format!("[identity]\njwks_url = \"{}\"\n", server.url())).expect("written");
    let check = || {
        let mut command = program(&["check"]);
        command.env("BEHAVRY_CONFIG", &config).env("BEHAVRY_STATE_DIR", dir.path());
        run_to_end(command)
    };
    let ended = check().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(!ended.stdout.contains("hidden-in-the-query"), "{}", ended.stdout);
    server.die().await;
    let ended = check().await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("cannot be reached"), "{}", ended.stderr);
    let broken = format!("[identity]\njwks_url = \"{}\"\nca_file = \"proxy.toml\"\n", server.url());
    std::fs::write(&config, broken).expect("written");
    let ended = check().await;
    assert_eq!(ended.code, Some(78), "a file that holds no CA is the configuration's fault");
    assert!(ended.stderr.contains("give a PEM file"), "{}", ended.stderr);
}

// ---- the control plane

async fn house_with_control_plane(plane: &KeyServer, keys: &KeyServer) -> House {
    house(keys, &format!("{NEVER}token_url = \"{}\"\n", plane.url())).await
}

fn ask() -> Request {
    let body =
        json!({ "client_id": "agent-7", "client_secret": "a-secret-of-the-test", "grant_type": "client_credentials" });
    Request::post("/api/v1/auth/token", body)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_for_a_token_is_forwarded_and_the_token_works() {
    let signer = Signer::new();
    let keys = KeyServer::open(Says::json(&signer.document), None).await;
    let granted = json!({ "access_token": signer.token(), "token_type": "Bearer", "expires_in": 3600 });
    let plane = KeyServer::open(Says::json(&granted), None).await;
    let house = house_with_control_plane(&plane, &keys).await;
    let reply = house.send(ask().id("forwarded").header("authorization", "Bearer x").header("cookie", "a=b")).await;
    assert_eq!((reply.status, reply.json()), (200, granted));
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    assert_eq!(status(&house, reply.json()["access_token"].as_str().unwrap()).await, 200);

    let asked = plane.asked();
    let (head, body) = asked[0].split_once("\r\n\r\n").expect("a head and a body");
    let head = head.to_ascii_lowercase();
    assert!(head.starts_with("post /keys?"), "{head}");
    for line in ["content-type: application/json", "x-request-id: forwarded"] {
        assert!(head.lines().any(|found| found == line), "{line} in {head}");
    }
    assert!(!head.contains("authorization") && !head.contains("cookie"), "{head}");
    assert_eq!(body.as_bytes(), ask().body_bytes());

    let form = "grant_type=client_credentials&client_id=agent-7&client_secret=a-secret-of-the-test&scope=x";
    let request = Request::new("POST", "/api/v1/auth/token").body(form);
    let reply =
        house.send(request.clone().header("content-type", "application/x-www-form-urlencoded; charset=utf-8")).await;
    assert_eq!(reply.status, 200);
    assert!(plane.asked()[1].ends_with(form));
    assert_eq!(house.send(request.header("content-type", "text/plain")).await.status, 400);
    assert_eq!(house.send(ask().body(vec![b' '; 17 * 1024])).await.status, 413);
    assert_eq!(plane.asked().len(), 2, "what is too large or of another type is not forwarded");

    let last = house.final_of("forwarded").await;
    assert_eq!((&last["agent_id"], &last["policy_result"]), (&Value::Null, &json!("allow")));
    let (records, log) = (house.audit_text(), house.log());
    for secret in ["a-secret-of-the-test", reply.json()["access_token"].as_str().unwrap(), "hidden-in-the-query"] {
        assert!(!records.contains(secret) && !log.contains(secret) && !house.metrics().await.contains(secret));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_planes_refusals_are_passed_back_and_its_troubles_are_not() {
    let keys = KeyServer::open(Says::json(Signer::new().document), None).await;
    let mut plane = KeyServer::open(Says::json(""), None).await;
    let house = house_with_control_plane(&plane, &keys).await;
    let refused = |error: &str| json!({ "error": error, "detail": "words of the plane" }).to_string();
    for (status, error, cause) in [
        (400, "unsupported_grant_type", "the control plane refused: unsupported_grant_type"),
        (401, "invalid_client", "the control plane refused: invalid_client"),
        (403, "unauthorized_client", "the control plane refused: unauthorized_client"),
        (429, "a word of its own", "the control plane refused: other"),
    ] {
        plane.say(Says::Reply(status, "retry-after: 7\r\nset-cookie: a=b\r\nx-own: y\r\n", refused(error)));
        let id = format!("refused-{status}");
        let reply = house.send(ask().id(&id)).await;
        assert_eq!((reply.status, reply.text()), (status, refused(error)));
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        assert_eq!(reply.header("www-authenticate").is_some(), status == 401);
        assert_eq!(reply.header("retry-after").is_some(), status == 429);
        assert_eq!((reply.header("set-cookie"), reply.header("x-own")), (None, None));
        let last = house.final_of(&id).await;
        assert_eq!((&last["error"], &last["policy_result"]), (&json!(cause), &json!("deny")));
    }
    let unavailable = async |id: &str, cause: &str| {
        let reply = house.send(ask().id(id)).await;
        assert_eq!(reply.status, 503, "{id}");
        let body = reply.json();
        assert_eq!(
            (&body["error"], &body["code"]),
            (&json!("temporarily_unavailable"), &json!("control_plane_unavailable"))
        );
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        assert!(reply.header("retry-after").is_some());
        assert!(!reply.text().contains("<html>"));
        let last = house.final_of(id).await;
        assert_eq!((&last["error"], &last["agent_id"]), (&json!(cause), &Value::Null));
    };
    let neither = "the control plane's reply is neither a token nor an error";
    for (id, says, cause) in [
        ("html", Says::json("<html>"), neither),
        ("shapeless", Says::json("{}"), neither),
        ("error-500", Says::Reply(500, "", refused("server_error")), "the control plane answered 500"),
        ("error-404", Says::Reply(404, "", refused("x")), "the control plane answered 404"),
        (
            "moved",
            Says::Reply(307, "location: http://localhost:1/\r\n", String::new()),
            "the control plane answered 307",
        ),
        (
            "large",
            Says::json(format!("{{\"error\":\"{}\"}}", "x".repeat(1 << 20))),
            "the control plane sent a reply that is too large",
        ),
        ("stalled", Says::Nothing, "the control plane did not answer in time"),
    ] {
        plane.say(says);
        unavailable(id, cause).await;
    }
    plane.die().await;
    unavailable("dead", "the control plane cannot be reached").await;
    assert!(!house.log().contains("words of the plane"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_control_plane_the_agents_of_the_built_in_issuer_get_nothing() {
    let keys = KeyServer::open(Says::json(Signer::new().document), None).await;
    let refused = r#"{"error":"invalid_client"}"#;
    let plane = KeyServer::open(Says::Reply(401, "", refused.to_owned()), None).await;
    // A key to sign with is there too, for `token mint`.
    let env = vec![("BEHAVRY_JWT_PRIVATE_KEY".to_owned(), String::from_utf8_lossy(KEY).into_owned())];
    let config = format!("{NEVER}token_url = \"{}\"\n", plane.url());
    let house = House::with(Plan { env, ..self::plan(&keys, &config) }).await;
    assert_eq!(house.send(ask()).await.text(), refused);
    assert_eq!(plane.asked().len(), 1);
    assert!(!house.dir.path().join("state/agents.toml").exists(), "no first agent is made");
    let own = house.mint(Claims { sub: "x".into(), permissions: vec!["web:read".into()], ..Claims::default() });
    assert_eq!(status(&house, &own).await, 401, "what signs here is not what verifies here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessing_is_slowed_before_the_control_plane_hears_of_it_and_an_outage_is_no_guess() {
    let keys = KeyServer::open(Says::json(Signer::new().document), None).await;
    let plane = KeyServer::open(Says::Reply(500, "", String::new()), None).await;
    let house = house_with_control_plane(&plane, &keys).await;
    for _ in 0..15 {
        assert_eq!(house.send(ask()).await.status, 503, "nobody said that the secret is wrong");
    }
    plane.say(Says::Reply(429, "", r#"{"error":"slow_down"}"#.to_owned()));
    for _ in 0..15 {
        assert_eq!(house.send(ask()).await.json()["error"], "slow_down", "nor here");
    }
    plane.say(Says::Reply(401, "", r#"{"error":"invalid_client"}"#.to_owned()));
    let mut statuses = Vec::new();
    while statuses.last() != Some(&429) {
        assert!(statuses.len() < 1000, "nobody is slowed");
        statuses.push(house.send(ask()).await.status);
    }
    assert_eq!(plane.asked().len(), 30 + statuses.len() - 1);
}

// ---- small things

fn write_private(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, bytes).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("ours");
}

/// A name for a folder of its own.
fn uuid_like(bytes: &[u8]) -> String {
    bytes.iter().fold(5381_u64, |sum, byte| sum.wrapping_mul(33) ^ u64::from(*byte)).to_string()
}
