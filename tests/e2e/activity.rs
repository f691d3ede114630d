//! The operator's feed: the audit's records as they are written, what runs, and who may see it.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use base64::Engine as _;
use serde_json::{Value, json};
use tokio::net::TcpSocket;

use crate::client::{Connection, Reply, Request};
use crate::house::{House, PATIENCE, Plan, program, run_to_end, wait_until_async};
use crate::puppet::Puppet;

const FEED: &str = "/api/v1/audit/stream";
const CREDENTIAL: &str = "3f7c1b0e9d8a4c5b6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5";

/// One event of a feed.
struct Event {
    id: Option<String>,
    name: String,
    data: String,
}

impl Event {
    fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|e| panic!("{e}: {}", self.data))
    }
}

/// An open feed, read as a browser reads it.
struct Watcher {
    connection: Connection,
    text: String,
}

impl Watcher {
    async fn open(house: &House) -> Watcher {
        Watcher::with(house, Request::get(FEED)).await
    }

    async fn with(house: &House, request: Request) -> Watcher {
        let mut watcher = Watcher::on(Connection::open(house.operator).await, &request).await;
        let first = watcher.block().await.expect("a beginning");
        assert_eq!(first, "retry: 2000");
        watcher
    }

    async fn on(mut connection: Connection, request: &Request) -> Watcher {
        connection.send(request).await;
        let (status, headers) = connection.head().await.expect("a head");
        assert_eq!(status, 200);
        let has = |name: &str, value: &str| {
            assert!(headers.iter().any(|(key, found)| key.eq_ignore_ascii_case(name) && found == value), "{headers:?}");
        };
        has("content-type", "text/event-stream");
        has("cache-control", "no-store");
        Watcher { connection, text: String::new() }
    }

    /// What stands between two blank lines. `None`: the feed has ended.
    async fn block(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let block = self.text[..end].to_owned();
                self.text.drain(..end + 2);
                return Some(block);
            }
            match self.connection.chunk().await? {
                Ok(chunk) => self.text.push_str(std::str::from_utf8(&chunk).expect("the feed is text")),
                Err(()) => return None,
            }
        }
    }

    async fn next(&mut self) -> Option<Event> {
        loop {
            let block = self.block().await?;
            let member = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
            if let (Some(name), Some(data)) = (member("event: "), member("data: ")) {
                return Some(Event { id: member("id: "), name, data });
            }
        }
    }

    /// The next event for which `wanted` holds.
    async fn until(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let look = async {
            loop {
                let event = self.next().await.unwrap_or_else(|| panic!("the feed ended before {what}"));
                if wanted(&event) {
                    return event;
                }
            }
        };
        tokio::time::timeout(PATIENCE, look).await.unwrap_or_else(|_| panic!("{what} did not come"))
    }

    /// The final record of a request.
    async fn final_of(&mut self, request_id: &str) -> Event {
        self.until(request_id, |event| {
            let data = event.json();
            data["extra"]["phase"] == "final" && data["extra"]["request_id"] == *request_id
        })
        .await
    }
}

fn chat(model: &str) -> Request {
    Request::post("/api/chat", json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] }))
}

fn policy(rules: &str) -> Plan {
    Plan { policy: vec![("authz.rego", format!("package behavry.authz\n\n{rules}\n"))], ..Plan::default() }
}

#[tokio::test]
async fn a_request_is_an_event_in_the_seeds_words_and_its_data_is_the_audits_line() {
    let house = House::open().await;
    let mut watcher = Watcher::open(&house).await;
    house.send(chat("tiny-story").bearer(&house.token()).id("seen")).await;
    let first = watcher.until("the request", |event| event.json()["extra"]["request_id"] == "seen").await;
    assert_eq!((first.name.as_str(), &first.json()["extra"]["phase"]), ("tool_call", &json!("request")));
    let last = watcher.final_of("seen").await;
    assert_eq!(last.name, "tool_call");
    let record = last.json();
    for (column, value) in
        [("tool_name", "ollama-api"), ("mcp_server", "ollama-proxy"), ("action", "POST"), ("policy_result", "allow")]
    {
        assert_eq!(record[column], value, "{column}");
    }
    let file = house.audit_text();
    for event in [&first, &last] {
        assert!(file.lines().any(|line| line == event.data), "word for word, with its hashes: {}", event.data);
    }
}

#[tokio::test]
async fn what_the_policy_denies_or_escalates_is_an_event_of_its_own() {
    let house = House::with(policy(
        "deny contains \"not here\" if input.model == \"mistral\"\n\nescalate if input.model == \"codellama\"",
    ))
    .await;
    let mut watcher = Watcher::open(&house).await;
    for (model, event, result) in [
        ("mistral", "policy_deny", "deny"),
        ("codellama", "policy_escalate", "escalate"),
        ("llama3.2", "tool_call", "allow"),
    ] {
        house.send(chat(model).bearer(&house.token()).id(model)).await;
        let seen = watcher.final_of(model).await;
        assert_eq!((seen.name.as_str(), &seen.json()["policy_result"]), (event, &json!(result)));
    }
    house.send(chat("llama3.2").id("stranger")).await;
    assert_eq!(watcher.final_of("stranger").await.name, "policy_deny");
}

#[tokio::test]
async fn a_new_watcher_sees_what_was_and_one_that_returns_goes_on_where_it_was() {
    let house = House::open().await;
    for id in ["one", "two", "three"] {
        house.send(chat("tiny-story").bearer(&house.token()).id(id)).await;
    }
    house.final_of("three").await;
    let mut watcher = Watcher::open(&house).await;
    let one = watcher.final_of("one").await;
    watcher.final_of("three").await;
    drop(watcher);

    let id = one.id.expect("an id");
    let mut watcher = Watcher::with(&house, Request::get(FEED).header("last-event-id", &id)).await;
    let next = watcher.next().await.expect("an event");
    assert_eq!(next.json()["extra"]["request_id"], "two", "nothing twice, nothing left out");
    // An id of another process means nothing to this one.
    let mut watcher = Watcher::with(&house, Request::get(FEED).header("last-event-id", "1-1")).await;
    assert_eq!(watcher.next().await.expect("an event").json()["extra"]["request_id"], "one");
}

#[tokio::test]
async fn what_runs_is_shown_with_its_progress_until_it_has_ended() {
    let mut plan = Plan::default();
    (plan.simulator.tokens_per_second, plan.simulator.tokens) = (40.0, 10_000);
    let house = House::with(plan).await;
    let mut plain = Watcher::open(&house).await;
    let mut watcher = Watcher::with(&house, Request::get("/api/v1/audit/stream?running=1")).await;
    let backends = watcher.until("the backends", |event| event.name == "backends").await.json();
    assert_eq!((&backends[0]["name"], &backends[0]["up"]), (&json!("ollama"), &json!(true)));
    assert_eq!(backends[0]["url"], house.simulator.url());

    let mut client = Connection::open(house.public).await;
    client.send(&chat("llama3.2").bearer(&house.token()).id("long")).await;
    let running = watcher
        .until("a row that has progress", |event| {
            event.name == "running" && event.json()["running"][0]["chunks"].as_u64().is_some_and(|chunks| chunks > 0)
        })
        .await
        .json();
    let row = &running["running"][0];
    for (name, value) in [
        ("agent_id", "tester"),
        ("model", "llama3.2"),
        ("action", "POST"),
        ("target", "/api/chat"),
        ("request_id", "long"),
    ] {
        assert_eq!(row[name], value, "{name}");
    }
    assert!(row["ttft_ms"].is_u64() && row["elapsed_ms"].is_u64(), "{row}");
    assert_eq!(running["in_flight"]["ollama"], 1);
    let whole = Request::get("/api/v1/activity").send(house.operator).await.json();
    assert_eq!(whole["running"][0]["request_id"], "long");
    let mut now = backends.clone();
    now[0]["loaded"] = json!(["llama3.2"]); // it answers with it
    assert_eq!(whole["backends"], now);

    drop(client);
    let over = watcher.until("an end", |event| event.name == "running" && event.json()["running"] == json!([])).await;
    assert_eq!(over.json()["totals"]["requests"], 1);
    // Whoever did not ask for it gets the records only.
    while let Some(event) = plain.next().await {
        assert_eq!(event.name, "tool_call");
        let record = event.json();
        if record["extra"]["phase"] == "final" {
            assert_eq!(record["extra"]["outcome"], "client_abort");
            break;
        }
    }
}

#[tokio::test]
async fn a_watcher_that_does_not_read_delays_nobody_and_is_told_what_it_missed() {
    let long = "because ".repeat(120);
    let house = House::with(policy(&format!("deny contains \"{long}\" if input.model == \"mistral\""))).await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small window");
    let stream = socket.connect(house.operator).await.expect("connected");
    let mut slow = Watcher::on(Connection { stream, unread: Vec::new() }, &Request::get(FEED)).await;

    // More than the kernel holds for one connection (4 MiB) and the ring for all.
    let token = house.token();
    let senders = (0..4).map(|n| {
        let (token, address) = (token.clone(), house.public);
        tokio::spawn(async move {
            let mut connection = Connection::open(address).await;
            for i in 0..900 {
                connection.send(&chat("mistral").bearer(&token).id(&format!("{n}-{i}"))).await;
                assert_eq!(connection.reply(false).await.expect("a reply").status, 403);
            }
        })
    });
    for sender in senders.collect::<Vec<_>>() {
        sender.await.expect("nobody waits for the watcher: each reply came in time");
    }
    house.send(chat("mistral").bearer(&token).id("after")).await;
    Watcher::open(&house).await.final_of("after").await;

    let missed = slow.until("the word about what was missed", |event| event.json()["alert"] == "events_missed").await;
    assert_eq!((missed.name.as_str(), missed.id.as_ref()), ("alert", None));
    assert!(missed.json()["message"].as_str().is_some_and(|words| words.contains("events came faster")));
    slow.final_of("after").await;
}

#[tokio::test]
async fn so_many_may_watch_and_who_leaves_makes_room() {
    let house = House::open().await;
    let mut watchers = Vec::new();
    for _ in 0..64 {
        watchers.push(Watcher::open(&house).await);
    }
    let refused = Request::get(FEED).send(house.operator).await;
    assert_eq!((refused.status, refused.text().contains("too many")), (503, true));
    assert_eq!(Request::get("/livez").send(house.operator).await.status, 200, "the rest goes on");
    watchers.pop();
    let (mut seen, began) = (0, Instant::now());
    while seen != 200 {
        assert!(began.elapsed() < PATIENCE, "nobody's place became free");
        // Its leaving is noticed by an event of the socket's, soon but not at once.
        let mut connection = Connection::open(house.operator).await;
        connection.send(&Request::get(FEED)).await;
        seen = connection.head().await.expect("a head").0;
    }
}

#[tokio::test]
async fn troubles_of_the_proxy_itself_are_alerts_and_so_is_their_end() {
    let plan = policy("deny contains \"not here\" if input.model == \"mistral\"");
    let house = House::with(Plan {
        backend: Some("http://127.0.0.1:1".into()),
        config: "[policy]\nreload_s = 1".into(),
        ..plan
    })
    .await;
    let mut watcher = Watcher::open(&house).await;
    assert_eq!(house.send(chat("llama3.2").bearer(&house.token())).await.status, 502);
    let alert = watcher.until("the backend's alert", |event| event.json()["alert"] == "backend_unreachable").await;
    assert_eq!((alert.name.as_str(), &alert.json()["state"]), ("alert", &json!("raised")));
    assert!(alert.id.is_some(), "it is in the ring");

    std::fs::write(house.dir.path().join("policies/authz.rego"), "package behavry.authz\n\ndeny if (")
        .expect("written");
    watcher.until("the reload's alert", |event| event.json()["alert"] == "reload_failed").await;
}

/// A proxy in front of one slot that is moved by hand.
async fn one_slot(puppet: &Puppet, config: &str) -> House {
    let config = format!("[[backend]]\nurl = \"{}\"\n{config}", puppet.url());
    House::with(Plan { config, ..Plan::default() }).await
}

fn send(house: &House, id: &str) -> tokio::task::JoinHandle<Reply> {
    let (public, request) = (house.public, chat("llama3.2").bearer(&house.token()).id(id));
    tokio::spawn(async move { request.send(public).await })
}

/// What the page is shown, once `wanted` holds.
async fn board_where(house: &House, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    wait_until_async(what, async || {
        let board = Request::get("/api/v1/activity").send(house.operator).await.json();
        wanted(&board).then_some(board)
    })
    .await
}

fn states(board: &Value) -> Vec<(&str, &str)> {
    let rows = board["running"].as_array().expect("a list").iter();
    rows.map(|row| (row["request_id"].as_str().expect("a text"), row["state"].as_str().expect("a text"))).collect()
}

const DONE: &[u8] = b"{\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":3,\"eval_count\":2}\n";

#[tokio::test]
async fn who_waits_for_a_backend_is_a_row_and_counted_by_model() {
    let puppet = Puppet::listen().await;
    let house = one_slot(&puppet, "").await;
    let first = send(&house, "first");
    let mut backend = puppet.asked().await;
    let second = send(&house, "second");
    let board = board_where(&house, "one that waits", |board| board["queues"][0]["waiting"] == 1).await;
    assert_eq!(states(&board), [("first", "waiting"), ("second", "queued")]);
    assert_eq!(board["queues"].as_array().map(Vec::len), Some(1));
    assert_eq!(board["queues"][0]["model"], "llama3.2");
    let longest = board["queues"][0]["longest_ms"].as_u64().expect("a number");
    board_where(&house, "a longer wait", |board| board["queues"][0]["longest_ms"].as_u64() > Some(longest)).await;

    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
    backend.say(head).await;
    backend.chunk(b"{\"message\":{\"content\":\"a\"},\"done\":false}\n").await;
    board_where(&house, "an answer", |board| states(board) == [("first", "answering"), ("second", "queued")]).await;
    backend.chunk(DONE).await;
    backend.say("0\r\n\r\n").await;
    assert_eq!(first.await.expect("sent").status, 200);
    let backend = puppet.asked().await;
    let board = board_where(&house, "the second", |board| states(board) == [("second", "waiting")]).await;
    assert_eq!(board["queues"], json!([]));
    drop(backend);
    let _ = second.await;
}

#[tokio::test]
async fn a_queue_that_turns_requests_away_is_an_alert() {
    let puppet = Puppet::listen().await;
    let house = one_slot(&puppet, "[queue]\nmodel_waiting = 1").await;
    let mut watcher = Watcher::open(&house).await;
    let _first = send(&house, "first");
    let _backend = puppet.asked().await;
    let _second = send(&house, "second");
    board_where(&house, "one that waits", |board| board["queues"][0]["waiting"] == 1).await;
    assert_eq!(send(&house, "third").await.expect("sent").status, 503);
    let alert = watcher.until("the full queue", |event| event.json()["alert"] == "queue_full").await;
    assert_eq!(alert.json()["state"], "raised");
    let metrics = house.metrics().await;
    assert!(metrics.contains("behavry_ollama_queue_turned_away_total{reason=\"full\"} 1\n"));
    assert!(metrics.contains("behavry_ollama_queue_turned_away_total{reason=\"share\"} 0\n"));
}

#[tokio::test]
async fn a_breaker_that_opens_is_an_alert_and_so_is_its_closing() {
    let config = "[health]\nprobe_s = 0\nfailures = 1\nrest_s = 1".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let mut watcher = Watcher::open(&house).await;
    assert_eq!(house.send(chat("fault-500-error").bearer(&house.token())).await.status, 500);
    let alert = watcher.until("an open breaker", |event| event.json()["alert"] == "breaker_open").await;
    assert_eq!(alert.json()["state"], "raised");
    let message = alert.json()["message"].as_str().expect("a text").to_owned();
    assert_eq!(message, "backend ollama gets no requests for fault-500-error for a while: they failed there");
    let board = board_where(&house, "a breaker", |board| board["backends"][0]["breakers"] != json!({})).await;
    assert_eq!((&board["backends"][0]["breaker"], &board["backends"][0]["drained"]), (&json!("closed"), &json!(false)));
    assert!(house.metrics().await.contains("behavry_ollama_backend_breakers_open{backend=\"ollama\"} 1\n"));
}

#[tokio::test]
async fn strangers_in_a_crowd_are_one_alert_and_do_not_push_the_others_out() {
    // So few are recorded one by one that 300 are a crowd on any machine.
    let config = "[audit]\nrefusals_per_second = 1".into();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    house.send(chat("tiny-story").bearer(&house.token()).id("known")).await;
    let mut connection = Connection::open(house.public).await;
    for _ in 0..300 {
        connection.send(&Request::get("/api/tags")).await;
        assert_eq!(connection.reply(false).await.expect("a reply").status, 401);
    }
    let mut watcher = Watcher::open(&house).await;
    watcher.final_of("known").await;
    let alert = watcher.until("the folded ones", |event| event.json()["alert"] == "refusals_folded").await;
    assert!(alert.json()["message"].as_str().is_some_and(|words| words.contains("missing_token")), "{}", alert.data);
}

#[tokio::test]
async fn a_watcher_keeps_no_drain_waiting() {
    let mut house = House::open().await;
    let mut watcher = Watcher::open(&house).await;
    house.signal(libc::SIGTERM);
    let ended = house.exit().await;
    assert!(ended.success(), "{ended}: {}", house.log());
    while watcher.next().await.is_some() {}
}

#[tokio::test]
async fn the_page_comes_with_headers_that_let_it_use_nothing_but_its_own_files() {
    let house = House::open().await;
    for (path, content_type) in [
        ("/", "text/html; charset=utf-8"),
        ("/activity.css", "text/css; charset=utf-8"),
        ("/activity.js", "text/javascript; charset=utf-8"),
    ] {
        let reply = Request::get(path).send(house.operator).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some(content_type)), "{path}");
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(reply.header("referrer-policy"), Some("no-referrer"));
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        let csp = reply.header("content-security-policy").expect("a policy");
        assert!(
            csp.starts_with(
                "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
            ),
            "{csp}"
        );
        assert!(!csp.contains("unsafe"), "{csp}");
        assert_eq!(
            house.send(Request::get(path).bearer(&house.token())).await.status,
            if path == "/" { 200 } else { 404 }
        );
    }
    assert_ne!(
        house.send(Request::get("/").bearer(&house.token())).await.header("content-type"),
        Some("text/html; charset=utf-8")
    );
}

async fn status(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> u16 {
    let mut connection = Connection::open(address).await;
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    connection.write(format!("GET {path} HTTP/1.1\r\n{headers}\r\n").as_bytes()).await;
    connection.head().await.expect("a reply").0
}

#[tokio::test]
async fn only_known_names_are_answered_and_no_other_sites_page() {
    let house =
        House::with(Plan { config: "[operator]\nhosts = [\"gateway.internal\"]".into(), ..Plan::default() }).await;
    for path in ["/", "/activity.js", FEED, "/api/v1/activity", "/metrics", "/livez", "/none"] {
        let here = if path == "/none" { 404 } else { 200 };
        for (host, expected) in [
            ("localhost", here),
            ("127.0.0.1:5173", here),
            ("Gateway.Internal:80", here),
            ("evil.example", 421),
            ("", 421),
        ] {
            assert_eq!(status(house.operator, path, &[("host", host)]).await, expected, "{path} {host}");
        }
        let foreign = [("host", "localhost"), ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "cors")];
        assert_eq!(status(house.operator, path, &foreign).await, 403, "{path}");
    }
}

fn write_secret(path: &Path, text: &str, mode: u32) {
    std::fs::write(path, text).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("ours");
}

#[tokio::test]
async fn with_a_credential_every_route_but_livez_asks_for_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("operator.token");
    write_secret(&file, &format!("{CREDENTIAL}\n"), 0o600);
    let config = format!("[operator]\ncredential_file = \"{}\"", file.display());
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("anyone:{CREDENTIAL}"));
    let wrong = base64::engine::general_purpose::STANDARD.encode(format!("{CREDENTIAL}:anyone"));
    for path in ["/", "/activity.css", FEED, "/api/v1/activity", "/metrics", "/readyz", "/none"] {
        let right = if path == "/none" { 404 } else { 200 };
        for (authorization, expected) in [
            (format!("Bearer {CREDENTIAL}"), right),
            (format!("Basic {basic}"), right),
            (format!("Basic {wrong}"), 401),
            (format!("Bearer {}", house.token()), 401),
            ("Bearer".to_owned(), 401),
        ] {
            let headers = [("host", "localhost"), ("authorization", authorization.as_str())];
            assert_eq!(status(house.operator, path, &headers).await, expected, "{path} {authorization}");
        }
        let reply = Request::get(path).send(house.operator).await;
        assert_eq!(reply.status, 401, "{path}");
        assert!(reply.header("www-authenticate").is_some_and(|way| way.starts_with("Basic realm=")), "a browser asks");
    }
    assert_eq!(Request::get("/livez").send(house.operator).await.status, 200);
    assert!(!house.log().contains(CREDENTIAL));
}

#[tokio::test]
async fn off_loopback_it_does_not_start_without_a_good_credential() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str, mode| {
        let path = dir.path().join(name);
        write_secret(&path, text, mode);
        path.display().to_string()
    };
    let none = dir.path().join("none").display().to_string();
    for (credential, said) in [
        (String::new(), "operator.listen, operator.credential_file: 0.0.0.0:0 is reachable from other machines"),
        (file("short", "too-short", 0o600), "32 is the least"),
        (file("open", CREDENTIAL, 0o644), "chmod"),
        (none, "does not exist"),
    ] {
        let config = dir.path().join("proxy.toml");
        std::fs::write(&config, format!("[operator]\nlisten = \"0.0.0.0:0\"\ncredential_file = \"{credential}\"\n"))
            .expect("written");
        for command in ["check", "serve"] {
            let mut program = program(&[command, "--listen", "127.0.0.1:0"]);
            program.env("BEHAVRY_CONFIG", &config).env("BEHAVRY_STATE_DIR", dir.path().join("state"));
            let ended = run_to_end(program).await;
            assert_eq!(ended.code, Some(78), "{command}: {}", ended.stderr);
            assert!(ended.stderr.contains(said), "{command}: {}", ended.stderr);
            assert!(!ended.stderr.contains("too-short") && !ended.stderr.contains(CREDENTIAL), "it is never quoted");
        }
    }
}
