//! Sinks beside the file: what it holds arrives, whole and in order, whatever becomes of the other side or of us, and no request waits
//! for it (contract, section 6; issue "Evidence", point 5).

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use behavry_ollama_proxy::ledger::chain::{self, SegmentName};
use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::client::Request;
use crate::collector::{Collector, Delivery, Does};
use crate::house::{House, Plan, program, run_to_end, segments, wait_until};
use crate::key_server::tls_for;
use crate::metrics::until;
use crate::puppet::Puppet;

const SECRET: &str = "0123456789abcdef0123456789abcdef";

pub fn private(path: &Path, text: &str) {
    std::fs::write(path, text).expect("written");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).expect("private");
}

/// A folder with a secret, and the lines of a configuration with a webhook.
pub struct Hooked {
    pub dir: tempfile::TempDir,
}

impl Hooked {
    pub fn new() -> Hooked {
        let dir = tempfile::tempdir().expect("a folder");
        private(&dir.path().join("webhook.secret"), &format!("{SECRET}\n"));
        Hooked { dir }
    }

    /// `audit`: further lines of `[audit]`; `more`: of `[audit.webhook]`.
    pub fn config(&self, url: &str, audit: &str, more: &str) -> String {
        let secret = self.dir.path().join("webhook.secret");
        format!(
            "[audit]\n{audit}\n[audit.sinks]\nretry_max_s = 1\ntimeout_s = 60\n[audit.webhook]\nurl = \"{url}\"\nsecret_file = \"{}\"\n{more}",
            secret.display()
        )
    }

    async fn house(&self, collector: &Collector, audit: &str) -> House {
        House::with(Plan { config: self.config(&collector.url(), audit, ""), ..Plan::default() }).await
    }
}

/// Every whole line of each writer, in order.
pub fn chains(dir: &Path) -> BTreeMap<String, Vec<String>> {
    let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in segments(dir) {
        let name: SegmentName = path.file_name().and_then(|name| name.to_str()).expect("a name").parse().expect("ours");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        chains.entry(name.writer.to_string()).or_default().extend(whole.lines().map(str::to_owned));
    }
    chains
}

/// Whether each line of the folder was delivered.
pub fn has_all(dir: &Path, delivered: &[String]) -> bool {
    let had: std::collections::HashSet<&str> = delivered.iter().map(String::as_str).collect();
    chains(dir).values().flatten().all(|line| had.contains(line.as_str()))
}

/// Lines came at least once, word for word, and those of a writer first came in its order.
#[track_caller]
pub fn whole_and_in_order(dir: &Path, delivered: &[String]) {
    let mut first: HashMap<&str, usize> = HashMap::new();
    for (at, line) in delivered.iter().enumerate() {
        first.entry(line).or_insert(at);
    }
    for (writer, lines) in chains(dir) {
        let places: Vec<usize> = lines
            .iter()
            .enumerate()
            .map(|(n, line)| *first.get(line.as_str()).unwrap_or_else(|| panic!("line {n} of {writer} did not come")))
            .collect();
        assert!(places.is_sorted(), "{writer}: {places:?}");
    }
}

async fn wait_for_all(house: &House, collector: &Collector) {
    let dir = house.audit_dir();
    wait_until("every line at the collector", || has_all(&dir, &collector.lines()).then_some(())).await;
}

pub async fn serve(house: &House, requests: usize, name: &str) {
    for n in 0..requests {
        let ask = Request::get("/api/version").bearer(&house.token()).id(&format!("{name}-{n}"));
        assert_eq!(house.send(ask).await.status, 200);
    }
}

pub fn value(scrape: &str, series: &str) -> u64 {
    let found = scrape.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{series} in\n{scrape}"))
}

const LAG: &str = r#"behavry_ollama_audit_lag_records{sink="webhook"}"#;
const FAILURES: &str = r#"behavry_ollama_audit_sink_failures_total{sink="webhook"}"#;
const LOST: &str = r#"behavry_ollama_audit_dropped_records_total{sink="webhook"}"#;

#[track_caller]
fn verified(delivery: &Delivery, secret: &[u8]) {
    let (id, time) = (delivery.header("webhook-id"), delivery.header("webhook-timestamp"));
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("any length");
    mac.update(format!("{id}.{time}.").as_bytes());
    mac.update(&delivery.body);
    let signature = delivery.header("webhook-signature").strip_prefix("v1,").expect("version 1");
    mac.verify_slice(&STANDARD.decode(signature).expect("base64")).expect("the signature holds");
    let now_s = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    assert!(now_s.abs_diff(time.parse().expect("seconds")) < 300, "{time}");
    assert!(id.starts_with("msg_") && id.len() == 36, "{id}");
}

#[tokio::test]
async fn every_line_of_the_files_arrives_word_for_word_and_signed_and_the_last_ones_before_the_end() {
    let (hooked, collector) = (Hooked::new(), Collector::open(Does::Takes).await);
    let mut house = hooked.house(&collector, "rotate_bytes = 8192").await;
    serve(&house, 20, "req").await;
    wait_for_all(&house, &collector).await;
    let scrape = until(&house, "no lag", |scrape| value(scrape, LAG) == 0).await;
    assert_eq!((value(&scrape, FAILURES), value(&scrape, LOST)), (0, 0));
    house.signal(libc::SIGTERM);
    house.exit().await;
    let lines = collector.lines();
    let files: Vec<String> = chains(&house.audit_dir()).into_values().flatten().collect();
    assert_eq!(lines, files, "each once, since nothing failed");
    assert!(lines.last().is_some_and(|line| line.contains(r#""reason":"stopped""#)));
    assert!(lines.iter().all(|line| chain::open(line.as_bytes()).is_some_and(|line| line.is_intact())));
    for delivery in collector.seen() {
        verified(&delivery, SECRET.as_bytes());
        assert!(delivery.head.starts_with("POST /audit?key=hidden-in-the-query HTTP/1.1\r\n"), "{}", delivery.head);
        assert_eq!(delivery.header("content-type"), "application/x-ndjson");
    }
    assert!(!house.log().contains("hidden-in-the-query"));
}

#[tokio::test]
async fn a_collector_that_fails_in_every_way_has_every_line_once_it_takes_them() {
    let (hooked, mut collector) = (Hooked::new(), Collector::open(Does::Answers(500, String::new())).await);
    let elsewhere = Collector::open(Does::Takes).await;
    let config = hooked.config(&collector.url(), "", "").replace("timeout_s = 60", "timeout_s = 4");
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let ways = [
        Does::Answers(500, String::new()),
        Does::Answers(429, "retry-after: 1\r\n".to_owned()),
        Does::Answers(503, "retry-after: never\r\n".to_owned()),
        Does::Answers(401, String::new()),
        Does::Answers(307, format!("location: {}\r\n", elsewhere.url())),
        Does::Babbles,
        Does::HangsUp,
        Does::Stalls,
        Does::TakesAndHangsUp,
    ];
    for (n, way) in ways.into_iter().enumerate() {
        collector.does(way);
        serve(&house, 2, &format!("while-{n}")).await;
        collector.wait_for_more(2).await;
    }
    collector.die().await;
    let failures = value(&house.metrics().await, FAILURES);
    serve(&house, 2, "dead").await;
    let scrape = until(&house, "a failure to connect", |scrape| value(scrape, FAILURES) > failures).await;
    assert!(value(&scrape, LAG) > 0, "{scrape}");
    collector.does(Does::TakesAtMost(3));
    collector.rise().await;
    wait_for_all(&house, &collector).await;
    whole_and_in_order(&house.audit_dir(), &collector.lines());
    assert!(elsewhere.seen().is_empty(), "a redirect is not followed");
    let scrape = until(&house, "no lag", |scrape| value(scrape, LAG) == 0).await;
    assert_eq!(value(&scrape, LOST), 0);
    let log = house.log();
    assert!(log.contains("answered 429") && log.contains("takes lines again"), "{log}");
    assert!(!log.contains("hidden-in-the-query") && !log.contains("SSH-2.0"), "{log}");
    // The same batch has the same id, however often it comes.
    let mut bodies: HashMap<String, Vec<u8>> = HashMap::new();
    for delivery in collector.seen() {
        verified(&delivery, SECRET.as_bytes());
        let body = bodies.entry(delivery.header("webhook-id").to_owned()).or_insert_with(|| delivery.body.clone());
        assert_eq!(*body, delivery.body);
    }
    assert!(bodies.len() < collector.seen().len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_kill_9_and_restart_at_any_moment_every_line_has_arrived_at_least_once_in_its_writers_order() {
    let (hooked, collector) = (Hooked::new(), Collector::open(Does::Takes).await);
    let mut config = hooked.config(&collector.url(), "rotate_bytes = 20000", "");
    config = config.replace("retry_max_s = 1", "retry_max_s = 1\nbatch_lines = 7");
    let mut house = House::with(Plan { config, ..Plan::default() }).await;
    for kill in 0..8 {
        collector.does(if kill % 3 == 1 { Does::TakesAndHangsUp } else { Does::Takes });
        let (address, token) = (house.public, house.token());
        let load = tokio::spawn(async move {
            for n in 0.. {
                let ask = Request::get("/api/version").bearer(&token).id(&format!("{kill}-{n}"));
                let mut connection = crate::client::Connection::open(address).await;
                connection.send(&ask).await;
                if connection.reply(false).await.is_none_or(|reply| reply.status != 200) {
                    return;
                }
            }
        });
        // Something of this life came; the moment after that is the point of the sleep, and none decides the outcome.
        collector.wait_for_more(1).await;
        tokio::time::sleep(std::time::Duration::from_micros(rand::random::<u64>() % 300_000)).await;
        house.signal(libc::SIGKILL);
        let _ = load.await; // the proxy went away
        house.restart().await;
    }
    collector.does(Does::Takes);
    wait_for_all(&house, &collector).await;
    whole_and_in_order(&house.audit_dir(), &collector.lines());
    let crashed = collector.lines().iter().filter(|line| line.contains(r#""phase":"adopted""#)).count();
    assert!(crashed >= 8, "{crashed} deaths are told of");
    assert_eq!(value(&until(&house, "no lag", |scrape| value(scrape, LAG) == 0).await, LOST), 0);
}

#[tokio::test]
async fn requests_are_served_while_no_sink_is_there_and_the_lag_says_so() {
    let (hooked, mut collector) = (Hooked::new(), Collector::open(Does::Takes).await);
    collector.die().await;
    let mut house = hooked.house(&collector, "").await;
    serve(&house, 30, "alone").await;
    let lines = || chains(&house.audit_dir()).into_values().flatten().count() as u64;
    until(&house, "all lines are behind", |scrape| value(scrape, LAG) == lines() && value(scrape, FAILURES) > 0).await;
    let behind_s = r#"behavry_ollama_audit_sink_lag_seconds{sink="webhook"}"#;
    until(&house, "seconds behind", |scrape| value(scrape, behind_s) > 0).await;
    // Neither does its end wait for them.
    house.signal(libc::SIGTERM);
    house.restart().await;
    collector.rise().await;
    wait_for_all(&house, &collector).await;
    until(&house, "no lag", |scrape| value(scrape, LAG) == 0 && value(scrape, behind_s) == 0).await;
}

#[tokio::test]
async fn what_retention_deletes_before_it_was_sent_is_counted_to_the_line_and_said() {
    let (hooked, collector) = (Hooked::new(), Collector::open(Does::Answers(503, String::new())).await);
    let house = hooked.house(&collector, "rotate_bytes = 4096\nkeep_bytes = 40000").await;
    let first = |dir: &Path| -> Option<u32> {
        let name: SegmentName = segments(dir).first()?.file_name()?.to_str()?.parse().ok()?;
        Some(name.number)
    };
    let dir = house.audit_dir();
    let mut rounds = 0;
    while first(&dir).is_none_or(|number| number < 5) {
        rounds += 1;
        assert!(rounds < 100, "nothing is deleted");
        serve(&house, 10, &format!("round-{rounds}")).await;
    }
    collector.does(Does::Takes);
    // Of the one chain that there is, each line was sent or counted.
    until(&house, "no lag", |scrape| value(scrape, LAG) == 0).await;
    wait_for_all(&house, &collector).await;
    let lost = value(&house.metrics().await, LOST);
    let lines = collector.lines();
    let distinct: std::collections::HashSet<&String> = lines.iter().collect();
    let open: Value = chains(&dir)
        .into_values()
        .flatten()
        .rev()
        .find_map(|line| {
            let line: Value = serde_json::from_str(&line).expect("JSON");
            (line["extra"]["phase"] == "segment_open").then_some(line)
        })
        .expect("a segment");
    let last = segments(&dir).pop().expect("a segment");
    let total = open["extra"]["count"].as_u64().expect("a count") + crate::house::read_lines(&last).len() as u64;
    assert!(lost > 0, "{lost}");
    assert_eq!(distinct.len() as u64 + lost, total);
    assert!(house.log().contains("lines were deleted before the webhook had them"), "{}", house.log());
}

#[tokio::test]
async fn of_two_processes_one_delivers_and_the_other_goes_on_where_it_ended() {
    let (hooked, collector) = (Hooked::new(), Collector::open(Does::Takes).await);
    let mut one = hooked.house(&collector, "").await;
    serve(&one, 3, "one").await;
    wait_for_all(&one, &collector).await;
    let state = one.dir.path().join("state").display().to_string();
    let config = hooked.config(&collector.url(), "", "");
    let env = vec![("BEHAVRY_STATE_DIR".to_owned(), state)];
    let two = House::with(Plan { config, env, ..Plan::default() }).await;
    serve(&two, 3, "two").await;
    wait_for_all(&one, &collector).await;
    one.signal(libc::SIGTERM);
    one.exit().await;
    serve(&two, 3, "alone").await;
    wait_for_all(&one, &collector).await;
    let lines = collector.lines();
    let distinct: std::collections::HashSet<&String> = lines.iter().collect();
    assert_eq!(distinct.len(), lines.len(), "none came twice");
    assert!(two.log().contains("another process delivers to the webhook"));
}

#[tokio::test]
async fn a_collector_is_verified_by_its_certificate_before_it_hears_anything() {
    let hooked = Hooked::new();
    let (ca, acceptor) = tls_for("localhost");
    let collector = Collector::with(Does::Takes, Some(acceptor)).await;
    std::fs::write(hooked.dir.path().join("ca.pem"), ca).expect("written");
    let config = hooked.config(&collector.url(), "", "");
    let stranger = House::with(Plan { config, ..Plan::default() }).await;
    until(&stranger, "a failure", |scrape| value(scrape, FAILURES) > 1).await;
    assert!(stranger.log().contains("signed by a CA that is not trusted here"), "{}", stranger.log());
    assert!(collector.seen().is_empty());
    let ca_file = format!("ca_file = \"{}\"", hooked.dir.path().join("ca.pem").display());
    let config = hooked.config(&collector.url(), "", &ca_file);
    let house = House::with(Plan { config, ..Plan::default() }).await;
    serve(&house, 1, "trusted").await;
    wait_for_all(&house, &collector).await;
}

#[tokio::test]
async fn a_sink_that_begins_now_is_not_sent_what_was_there_before() {
    let (hooked, collector) = (Hooked::new(), Collector::open(Does::Takes).await);
    let mut house = House::open().await;
    serve(&house, 3, "before").await;
    house.signal(libc::SIGTERM);
    house.exit().await;
    let config = hooked.config(&collector.url(), "", "").replace("retry_max_s = 1", "start = \"now\"");
    let backend = format!("[[backend]]\nurl = \"{}\"\n", house.simulator.url());
    std::fs::write(house.dir.path().join("proxy.toml"), format!("{config}\n{backend}")).expect("written");
    house.restart().await;
    serve(&house, 3, "after").await;
    wait_until("the last record", || collector.lines().iter().any(|line| line.contains("after-2")).then_some(())).await;
    let lines = collector.lines();
    assert!(lines.iter().all(|line| !line.contains("before-")), "{lines:?}");
    assert!(lines[0].contains("segment_open"), "its first line too: {}", lines[0]);
}

#[tokio::test]
async fn check_says_what_is_wrong_with_a_sink_and_shows_no_secret() {
    let hooked = Hooked::new();
    let dir = hooked.dir.path();
    let check = async |config: &str| {
        let file = dir.join("proxy.toml");
        std::fs::write(&file, config).expect("written");
        let mut command = program(&["check"]);
        command.env("BEHAVRY_STATE_DIR", dir.join("state")).env("BEHAVRY_CONFIG", file);
        run_to_end(command).await
    };
    let good = check(&hooked.config("https://hook.example/a?key=hidden", "", "")).await;
    assert_eq!(good.code, Some(0), "{}", good.stderr);
    assert!(good.stdout.contains(r#"url = "https://hook.example/a?(redacted)""#), "{}", good.stdout);
    assert!(!good.stdout.contains("hidden") && !good.stdout.contains(SECRET));
    let secret = dir.join("webhook.secret");
    let webhook = hooked.config("https://hook.example/", "", "");
    for (config, text, mode, words) in [
        (webhook.clone(), "too short", 0o600, "32 is the least"),
        (webhook.clone(), SECRET, 0o644, "chmod 600"),
        (webhook.replace("https", "http"), SECRET, 0o600, "anybody on the way"),
        (webhook.clone() + "\nca_file = \"none.pem\"", SECRET, 0o600, "audit.webhook.ca_file"),
        (
            webhook.replace("secret_file", "#"),
            SECRET,
            0o600,
            "audit.webhook.secret_file: batches would be sent unsigned",
        ),
        (webhook.replace("retry_max_s", "retry_max"), SECRET, 0o600, "did you mean audit.sinks.retry_max_s?"),
    ] {
        std::fs::write(&secret, text).expect("written");
        std::fs::set_permissions(&secret, PermissionsExt::from_mode(mode)).expect("its mode");
        let told = check(&config).await;
        assert_eq!(told.code, Some(78), "{words}");
        assert!(told.stderr.contains(words) && !told.stderr.contains(SECRET), "{words}: {}", told.stderr);
    }
}

#[tokio::test]
async fn no_sink_hears_a_word_of_a_prompt_or_a_reply() {
    let (hooked, collector) = (Hooked::new(), Collector::open(Does::Takes).await);
    let backend = Puppet::listen().await;
    let config = hooked.config(&collector.url(), "", "");
    let house = House::with(Plan { config, backend: Some(backend.url()), ..Plan::default() }).await;
    let body = r#"{"model":"canary","message":{"role":"assistant","content":"canary-reply"},"done":true,"done_reason":"canary and more"}"#;
    let reply =
        format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let ask = json!({ "model": "llama3.2", "stream": false, "canary": "canary",
        "messages": [{ "role": "user", "content": "canary-prompt" }] });
    let ask = Request::post("/api/chat?canary=1", ask).header("cookie", "canary").bearer(&house.token()).id("asked");
    let answered = tokio::join!(house.send(ask), async { backend.asked().await.try_say(reply.as_bytes()).await });
    assert!(answered.0.text().contains("canary-reply"), "the client has it");
    let has_final = |line: &String| line.contains("asked") && line.contains(r#""phase":"final""#);
    wait_until("the final record", || collector.lines().iter().any(has_final).then_some(())).await;
    for delivery in collector.seen() {
        let text = format!("{}{}", delivery.head, String::from_utf8_lossy(&delivery.body)).to_lowercase();
        assert!(!text.contains("canary"), "{text}");
    }
}
