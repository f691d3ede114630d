//! A pull for several backends is fetched once: from a registry on a socket, through the mirror, by simulators that really pull.

use std::net::SocketAddr;

use behavry_ollama_proxy::simulator::{Seen, Simulator, SimulatorOptions};
use serde_json::{Value, json};

use crate::client::{Connection, Reply, Request};
use crate::fleet::tables;
use crate::house::{House, PATIENCE, Plan, wait_until, wait_until_async};
use crate::registry::{Conduct, Published, Registry, blob};

const ADMIN: &[&str] = &["web:read", "web:write", "ollama:admin"];
const MARK: &str = "behavry-mirror-";

/// Backends that hold nothing.
async fn backends(count: usize) -> Vec<Simulator> {
    let mut backends = Vec::new();
    for _ in 0..count {
        let options = SimulatorOptions { models: Vec::new(), ..SimulatorOptions::for_tests() };
        backends.push(Simulator::start(options).await.expect("it listens"));
    }
    backends
}

fn config(registry: &Registry, backends: &[Simulator], mirror: &str) -> String {
    let tables = tables(backends.iter().map(|backend| (backend.url(), "")));
    format!("{tables}[models]\nregistries = [\"{}\"]\nmirror_listen = \"127.0.0.1:0\"\n{mirror}\n", registry.address)
}

async fn house(registry: &Registry, backends: &[Simulator], mirror: &str) -> House {
    House::with(Plan { config: config(registry, backends, mirror), ..Plan::default() }).await
}

fn tiny(registry: &Registry) -> Published {
    registry.publish("tiny", &[blob(1, 400), blob(2, 1_500_000), blob(3, 7), Vec::new()])
}

fn pull_request(house: &House, registry: &Registry, id: &str) -> Request {
    let body = json!({ "model": registry.name("library/tiny"), "insecure": true });
    Request::post("/api/pull", body).bearer(&house.token_with(&[], ADMIN)).id(id)
}

/// The same while something else happens.
fn begin_pull(house: &House, registry: &Registry, id: &str) -> tokio::task::JoinHandle<Reply> {
    let (request, address) = (pull_request(house, registry, id), house.public);
    tokio::spawn(async move { request.send(address).await })
}

async fn range(mirror: SocketAddr, path: String, range: &str) -> Reply {
    Request::get(&path).header("range", range).send(mirror).await
}

async fn pull(house: &House, registry: &Registry, id: &str) -> Reply {
    house.send(pull_request(house, registry, id)).await
}

fn lines(reply: &Reply) -> Vec<Value> {
    reply.lines().iter().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn statuses(reply: &Reply) -> Vec<String> {
    lines(reply).iter().filter_map(|line| line["status"].as_str().map(str::to_owned)).collect()
}

/// Names and digests of what a backend holds, told by itself.
async fn held(backend: &Simulator) -> Vec<(String, String)> {
    let told = Request::get("/api/tags").send(backend.addr()).await.json();
    let models = told["models"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    models.iter().map(|model| (text(&model["name"]), text(&model["digest"]))).collect()
}

/// Where the mirror is, and the namespace of the pull that runs: from what the backend was asked.
async fn temporary(backend: &Simulator) -> (SocketAddr, String) {
    let asked = |seen: &[Seen]| seen.iter().any(|seen| seen.target == "/api/pull" && seen.body_whole);
    let seen = backend.wait_for(PATIENCE, asked).await;
    let seen = seen.expect("it is asked to pull");
    let body = &seen.iter().rfind(|seen| seen.target == "/api/pull").expect("seen").body;
    let name = serde_json::from_slice::<Value>(body).expect("JSON")["model"].as_str().expect("a name").to_owned();
    let mut parts = name.split('/');
    let (host, namespace) = (parts.next().expect("a host"), parts.next().expect("a namespace"));
    assert!(namespace.starts_with(MARK), "{name}");
    (host.parse().expect("an address"), namespace.to_owned())
}

/// Nothing that a client, an operator or an auditor sees names the namespace.
async fn assert_kept_quiet(house: &House, reply: &Reply, id: &str) {
    house.final_of(id).await;
    assert!(!reply.text().contains(MARK), "{}", reply.text());
    for (what, text) in [("audit", house.audit_text()), ("log", house.log()), ("metrics", house.metrics().await)] {
        assert!(!text.contains(MARK), "{what}: {text}");
    }
}

fn metric(text: &str, line: &str) -> u64 {
    let found = text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
    found.unwrap_or_else(|| panic!("{line} is not there"))
}

#[tokio::test]
async fn each_blob_is_fetched_once_and_every_backend_holds_the_model_under_its_own_name() {
    let (registry, backends) = (Registry::open().await, backends(3).await);
    let published = tiny(&registry);
    let house = house(&registry, &backends, "").await;
    let reply = pull(&house, &registry, "pull").await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/x-ndjson")));
    let told = statuses(&reply);
    assert_eq!(told.iter().filter(|status| *status == "success").count(), 1, "{told:?}");
    assert_eq!(told.last().map(String::as_str), Some("success"), "{told:?}");
    for line in ["backend a (1 of 3)", "backend b (2 of 3)", "backend c (3 of 3)", "pulling manifest"] {
        assert!(told.iter().any(|status| status == line), "{line}: {told:?}");
    }
    assert!(!told.iter().any(|status| status.contains("for itself")), "{told:?}");
    let total = json!(1_500_000);
    assert!(lines(&reply).iter().any(|line| line["total"] == total && line["completed"] == total), "progress is shown");

    for digest in &published.digests[..3] {
        assert_eq!(registry.fetches(digest), (1, 0), "{digest}");
    }
    assert_eq!(registry.fetches(&published.digests[3]), (0, 0), "nothing has to be fetched for no bytes");
    let wanted = vec![(registry.name("library/tiny:latest"), published.digest.clone())];
    for backend in &backends {
        assert_eq!(held(backend).await, wanted);
    }
    assert_kept_quiet(&house, &reply, "pull").await;
    let record = house.final_of("pull").await;
    assert_eq!(
        (&record["extra"]["outcome"], &record["extra"]["model"]),
        (&json!("complete"), &json!(registry.name("library/tiny")))
    );
    let metrics = house.metrics().await;
    let bytes =
        |direction: &str| metric(&metrics, &format!("behavry_ollama_mirror_bytes_total{{direction=\"{direction}\"}}"));
    assert_eq!(bytes("fetched"), published.bytes as u64);
    assert!(bytes("served") >= 3 * published.bytes as u64, "{}", bytes("served"));

    // A newer one takes its place, what both have is fetched by nobody again, and a caller that wants no stream gets one object.
    let newer = registry.publish("tiny", &[blob(1, 400), blob(2, 1_500_000), blob(9, 90)]);
    registry.forget();
    let body = json!({ "model": registry.name("library/tiny"), "insecure": true, "stream": false });
    let whole = house.send(Request::post("/api/pull", body).bearer(&house.token_with(&[], ADMIN))).await;
    assert_eq!((whole.status, whole.json()), (200, json!({ "status": "success" })));
    let fetches: Vec<_> = newer.digests.iter().map(|digest| registry.fetches(digest)).collect();
    assert_eq!(fetches, [(0, 0), (0, 0), (1, 0)]);
    for backend in &backends {
        assert_eq!(held(backend).await, [(registry.name("library/tiny:latest"), newer.digest.clone())]);
    }
    assert_eq!(std::fs::read_dir(house.dir.path().join("state/mirror")).expect("a folder").count(), 0);
}

#[tokio::test]
async fn bytes_that_are_not_those_of_their_digest_end_the_pull_everywhere() {
    let (registry, backends) = (Registry::open().await, backends(2).await);
    let published = tiny(&registry);
    registry.spoil("tiny", &published.digests[1]);
    let house = house(&registry, &backends, "").await;
    let reply = pull(&house, &registry, "spoilt").await;
    let last = lines(&reply).pop().expect("a line");
    let error = last["error"].as_str().expect("an error");
    assert!(
        error.starts_with("2 of 2 backends did not get the model: backend a: the registry's bytes are not"),
        "{error}"
    );
    assert_eq!(registry.fetches(&published.digests[1]), (1, 0), "and nobody tries elsewhere");
    for backend in &backends {
        assert_eq!(held(backend).await, []);
    }
    assert_kept_quiet(&house, &reply, "spoilt").await;

    // Nothing of it was kept: the honest bytes are taken.
    let published = tiny(&registry);
    assert_eq!(statuses(&pull(&house, &registry, "honest").await).last().map(String::as_str), Some("success"));
    assert_eq!(held(&backends[1]).await[0].1, published.digest);
}

#[tokio::test]
async fn where_the_registry_dies_in_the_middle_the_backends_fetch_for_themselves() {
    let (registry, backends) = (Registry::open().await, backends(2).await);
    let published = tiny(&registry);
    registry.set(Conduct::CutsOnce { after: 100_000 });
    let house = house(&registry, &backends, "").await;
    let reply = pull(&house, &registry, "cut").await;
    let told = statuses(&reply);
    for backend in ["a", "b"] {
        let line = format!("backend {backend} fetches for itself: the registry: broke off");
        assert!(told.iter().any(|status| status.starts_with(&line)), "{told:?}");
    }
    assert_eq!(told.iter().filter(|status| *status == "success").count(), 1, "{told:?}");
    assert_eq!(told.last().map(String::as_str), Some("success"), "{told:?}");
    for backend in &backends {
        assert_eq!(held(backend).await, [(registry.name("library/tiny:latest"), published.digest.clone())]);
    }
    assert!(registry.fetches(&published.digests[1]).1 > 0, "in ranges, as backends do");
    assert_kept_quiet(&house, &reply, "cut").await;
}

#[tokio::test]
async fn a_backend_that_dies_in_the_middle_keeps_the_others_from_nothing() {
    let (registry, backends) = (Registry::open().await, backends(2).await);
    let published = tiny(&registry);
    registry.set(Conduct::Holds { after: 100_000 });
    let house = house(&registry, &backends, "").await;
    let running = begin_pull(&house, &registry, "half");
    let big = published.digests[1].clone();
    wait_until("the fetch", || (registry.fetches(&big).0 == 1).then_some(())).await;
    backends[0].stop().await;
    registry.release();
    let reply = running.await.expect("it ends");
    let last = lines(&reply).pop().expect("a line");
    let error = last["error"].as_str().expect("an error");
    assert!(error.starts_with("1 of 2 backends did not get the model: backend a: cannot be reached"), "{error}");
    assert_eq!(registry.fetches(&big), (1, 0));
    assert_eq!(held(&backends[1]).await, [(registry.name("library/tiny:latest"), published.digest)]);
    assert_kept_quiet(&house, &reply, "half").await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_fetch_and_the_namespace() {
    let (registry, backends) = (Registry::open().await, backends(2).await);
    let published = tiny(&registry);
    registry.set(Conduct::Holds { after: 100 });
    let house = house(&registry, &backends, "").await;
    let mut client = Connection::open(house.public).await;
    client.send(&pull_request(&house, &registry, "left")).await;
    let (mirror, namespace) = temporary(&backends[0]).await;
    let big = published.digests[1].clone();
    wait_until("the fetch", || (registry.fetches(&big).0 == 1).then_some(())).await;
    drop(client); // while no backend has anything to say
    wait_until("the fetch's end", || registry.asked().iter().any(|asked| asked.broke_off).then_some(())).await;
    let manifest = format!("/v2/{namespace}/model/manifests/latest");
    wait_until_async("the namespace's end", async || {
        (Request::get(&manifest).send(mirror).await.status == 404).then_some(())
    })
    .await;
    assert_eq!(house.final_of("left").await["extra"]["outcome"], "client_abort");
    assert_eq!(backends[1].seen().iter().filter(|seen| seen.target == "/api/pull").count(), 0);
    assert_eq!(held(&backends[0]).await, []);
    // And the next pull is as good as any.
    registry.set(Conduct::Honest);
    assert_eq!(statuses(&pull(&house, &registry, "again").await).last().map(String::as_str), Some("success"));
}

#[tokio::test]
async fn what_is_too_large_or_needs_a_key_is_fetched_by_each_backend() {
    for (conduct, mirror, why) in [
        (Conduct::Honest, "mirror_bytes = 1000000", "the model is larger than what is left of models.mirror_bytes"),
        (Conduct::NeedsKey, "", "the registry asks for a key, which only a backend has"),
    ] {
        let (registry, backends) = (Registry::open().await, backends(2).await);
        let published = tiny(&registry);
        registry.set(conduct.clone());
        let house = house(&registry, &backends, mirror).await;
        let reply = pull(&house, &registry, "declined").await;
        let told = statuses(&reply);
        assert_eq!(told[0], format!("each backend fetches for itself: {why}"), "{told:?}");
        match conduct {
            Conduct::Honest => {
                assert_eq!(told.last().map(String::as_str), Some("success"), "{told:?}");
                assert!(registry.fetches(&published.digests[1]).1 > 1);
            }
            // The words are the backends' own: the simulator has no key either.
            _ => assert!(lines(&reply).pop().expect("a line")["error"].as_str().is_some_and(|e| e.contains("401"))),
        }
        assert_kept_quiet(&house, &reply, "declined").await;
    }
}

#[tokio::test]
async fn a_redirect_is_followed_but_not_to_where_the_registry_is_not_itself() {
    let (registry, network, backends) = (Registry::open().await, Registry::open().await, backends(2).await);
    let published = tiny(&registry);
    tiny(&network);
    registry.set(Conduct::Redirects { to: format!("http://{}", network.address) });
    let house = house(&registry, &backends, "").await;
    let reply = pull(&house, &registry, "network").await;
    assert_eq!(statuses(&reply).last().map(String::as_str), Some("success"));
    assert_eq!(network.fetches(&published.digests[1]), (1, 0));
    assert!(!statuses(&reply).iter().any(|status| status.contains("for itself")));

    registry.publish("tiny", &[blob(7, 10), blob(8, 10)]);
    for to in ["http://169.254.169.254", "http://10.0.0.1", "https://169.254.169.254", "ftp://127.0.0.1", "//127.0.0.1"]
    {
        registry.set(Conduct::Redirects { to: to.to_owned() });
        let reply = pull(&house, &registry, "astray").await;
        let told = statuses(&reply);
        assert!(
            told.iter().any(|status| status.starts_with("backend a fetches for itself: the registry")),
            "{to}: {told:?}"
        );
    }
}

#[tokio::test]
async fn the_listener_answers_to_a_running_pulls_namespace_and_to_nothing_else() {
    let (registry, backends) = (Registry::open().await, backends(2).await);
    let published = tiny(&registry);
    let house = house(&registry, &backends, "").await;
    registry.set(Conduct::Holds { after: 100_000 });
    let running = begin_pull(&house, &registry, "pull");
    let (mirror, namespace) = temporary(&backends[0]).await;
    wait_until("the fetch", || (registry.fetches(&published.digests[1]).0 == 1).then_some(())).await;
    let model = format!("/v2/{namespace}/model");
    let (big, small) =
        (format!("{model}/blobs/{}", published.digests[1]), format!("{model}/blobs/{}", published.digests[0]));
    let guess = format!("{}{}", &namespace[..namespace.len() - 1], if namespace.ends_with('0') { '1' } else { '0' });
    let other_digest = format!("{model}/blobs/sha256:{}", "0".repeat(64));
    for path in [
        "/",
        "/v2/",
        "/v2/_catalog",
        &format!("/v2/{namespace}"),
        &format!("{model}/tags/list"),
        &format!("{model}/manifests/"),
        &format!("{model}/manifests/7b"),
        &format!("{model}/manifests/latest?x=1"),
        &format!("{model}/manifests/..%2flatest"),
        &format!("{model}/manifests/../manifests/latest"),
        &format!("{model}/blobs/"),
        &format!("{model}/blobs/sha256:..%2f..%2f..%2fetc%2fpasswd"),
        &format!("{model}/blobs/../../../../etc/passwd"),
        &format!("/v2/{}/model/manifests/latest", namespace.to_uppercase()),
        &format!("/v2/{guess}/model/manifests/latest"),
        "/v2/library/tiny/manifests/latest",
        &other_digest,
    ] {
        let reply = Request::get(path).send(mirror).await;
        assert_eq!((reply.status, reply.text().as_str()), (404, ""), "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        for path in [&big, "/v2/"] {
            let reply = Request::new(method, path).send(mirror).await;
            assert_eq!((reply.status, reply.header("allow")), (405, Some("GET, HEAD")), "{method} {path}");
        }
    }
    let manifest = Request::get(&format!("{model}/manifests/latest")).send(mirror).await;
    assert_eq!((manifest.status, manifest.json()["layers"][0]["size"].clone()), (200, json!(1_500_000)));
    let wanted = format!("sha256:{}", published.digest);
    assert_eq!(manifest.header("docker-content-digest"), Some(wanted.as_str()));
    let head = Request::new("HEAD", &big).send(mirror).await;
    assert_eq!((head.status, head.header("content-length"), head.text().as_str()), (200, Some("1500000"), ""));
    let part = range(mirror, small.clone(), "bytes=10-19").await;
    assert_eq!((part.status, part.header("content-range")), (206, Some("bytes 10-19/400")));
    assert_eq!(part.body, blob(1, 400)[10..20]);
    let end = range(mirror, small.clone(), "bytes=-5").await;
    assert_eq!((end.status, &end.body[..]), (206, &blob(1, 400)[395..]));
    let beyond = range(mirror, small.clone(), "bytes=400-").await;
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */400")));
    // What is there of a blob can be read; what is not is waited for.
    assert_eq!(range(mirror, big.clone(), "bytes=0-49999").await.body, blob(2, 1_500_000)[..50_000]);
    let rest = tokio::spawn(range(mirror, big.clone(), "bytes=1400000-1499999"));
    registry.release();
    assert_eq!(rest.await.expect("it comes").body, blob(2, 1_500_000)[1_400_000..]);
    assert_eq!(statuses(&running.await.expect("it ends")).last().map(String::as_str), Some("success"));
    assert_eq!(Request::get(&format!("{model}/manifests/latest")).send(mirror).await.status, 404);
    assert_eq!(registry.fetches(&published.digests[1]), (1, 0));
}

#[tokio::test]
async fn what_is_not_among_the_registries_is_refused_before_anybody_hears_of_it() {
    let (registry, backends) = (Registry::open().await, backends(2).await);
    tiny(&registry);
    let tables = tables(backends.iter().map(|backend| (backend.url(), "")));
    let config = format!("{tables}[models]\nmirror_listen = \"127.0.0.1:0\"\n");
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let reply = pull(&house, &registry, "foreign").await;
    assert_eq!((reply.status, reply.code()), (403, "egress_denied".to_owned()));
    assert!(registry.asked().is_empty());
    assert!(backends.iter().all(|backend| backend.connections() == 0));
}

#[tokio::test]
async fn nobody_but_the_proxy_gives_a_model_a_temporary_name() {
    let house = House::open().await;
    let name = format!("registry.ollama.ai/{MARK}{}/x", "c".repeat(64));
    let token = house.token_with(&[], ADMIN);
    for (path, body) in [
        ("/api/pull", json!({ "model": name })),
        ("/api/push", json!({ "model": name })),
        ("/api/create", json!({ "model": name, "from": "tiny-story" })),
        ("/api/copy", json!({ "source": "tiny-story", "destination": name })),
    ] {
        let reply = house.send(Request::post(path, body).bearer(&token)).await;
        assert_eq!((reply.status, reply.code()), (400, "invalid_body".to_owned()), "{path}");
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn what_a_crash_left_on_a_backend_is_deleted_and_never_shown() {
    let registry = Registry::open().await;
    let (own, others) =
        (format!("gateway:5174/{MARK}{}/model", "a".repeat(64)), format!("other:5174/{MARK}{}/model", "b".repeat(64)));
    let models = vec!["llama3.2".to_owned(), own.clone(), others.clone()];
    let options = SimulatorOptions { models, ..SimulatorOptions::for_tests() };
    let backends = vec![Simulator::start(options).await.expect("it listens")];
    let mirror = "mirror_url = \"http://gateway:5174\"\n[catalogue]\nrefresh_s = 1";
    let house = house(&registry, &backends, mirror).await;
    let deleted = |seen: &[Seen]| seen.iter().any(|seen| seen.target == "/api/delete" && seen.ended.is_some());
    backends[0].wait_for(PATIENCE, deleted).await.expect("it is deleted");
    let left: Vec<String> = held(&backends[0]).await.into_iter().map(|(name, _)| name).collect();
    assert_eq!(left, ["llama3.2:latest".to_owned(), format!("{others}:latest")], "another proxy's is its own affair");
    for (path, list, key) in [("/api/tags", "models", "name"), ("/v1/models", "data", "id")] {
        let shown = house.get(path).await.json();
        let names: Vec<&str> =
            shown[list].as_array().expect("a list").iter().filter_map(|model| model[key].as_str()).collect();
        assert_eq!(names, ["llama3.2:latest"], "{path}");
    }
    assert!(!house.metrics().await.contains(MARK));
}
