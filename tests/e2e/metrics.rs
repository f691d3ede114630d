//! The metrics: each moves as its name says, no client can make a time series, and only the operator's listener shows them.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use behavry_ollama_proxy::simulator::{Fault, SimulatorOptions};
use serde_json::json;

use crate::client::{Connection, Request};
use crate::house::{House, PATIENCE, Plan};

/// The value of a series, written as it is scraped; the sum of all whose text begins so.
fn sum(scrape: &str, begin: &str) -> f64 {
    let series = scrape.lines().filter(|line| line.starts_with(begin));
    series.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a number")).sum()
}

/// Scrapes until it holds. What is settled is counted a moment after the client has its reply.
pub async fn until(house: &House, what: &str, holds: impl Fn(&str) -> bool) -> String {
    let began = std::time::Instant::now();
    loop {
        let scrape = house.metrics().await;
        if holds(&scrape) {
            return scrape;
        }
        assert!(began.elapsed() < PATIENCE, "{what}, in\n{scrape}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

fn chat(model: &str) -> serde_json::Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] })
}

#[tokio::test]
async fn each_family_moves_as_its_name_says() {
    let simulator = SimulatorOptions { tokens_per_second: 500.0, ..SimulatorOptions::for_tests() };
    let config = "[catalogue]\nrefresh_s = 1".into();
    let house = House::with(Plan { simulator, config, ..Plan::default() }).await;
    // The models have names in labels once the backend's list has been read.
    until(&house, "the backend is up", |scrape| sum(scrape, r#"behavry_ollama_backend_up{backend="ollama"}"#) == 1.0)
        .await;
    let token = house.token_with(&["internal", "second"], &["web:read", "web:write"]);
    let mut connection = Connection::open(house.public).await;
    for request in [
        Request::post("/api/chat", chat("tiny-story")),
        Request::post("/v1/chat/completions", chat("tiny-story")),
        Request::post("/api/chat", chat("nobody-has-this")),
        Request::get("/api/tags"),
    ] {
        connection.send(&request.bearer(&token)).await;
        connection.reply(false).await.expect("a reply");
    }
    let outsider = house.token_with(&["external"], &["web:read", "web:write"]);
    house.send(Request::post("/api/chat", chat("tiny-story")).bearer(&outsider)).await;
    house.send(Request::get("/api/tags")).await;
    house.send(Request::get("/api/tags").bearer("x.y.z")).await;
    house.send(Request::get("/nowhere")).await;
    house.send(Request::post("/api/v1/auth/token", json!({}))).await;
    Connection::open(house.public).await.write(b"GET / HTTP/9.9\r\n\r\n").await;

    let scrape = until(&house, "every request is settled", |scrape| {
        sum(scrape, "behavry_ollama_requests_total{") == 9.0
            && sum(scrape, "behavry_ollama_unparsed_requests_total{") == 1.0
    })
    .await;
    let is = |series: &str, value: f64| assert_eq!(sum(&scrape, series), value, "{series} in\n{scrape}");
    is(r#"behavry_ollama_requests_total{endpoint="chat",outcome="complete",status_class="2xx"} "#, 1.0);
    is(r#"behavry_ollama_requests_total{endpoint="chat",outcome="complete",status_class="4xx"} "#, 1.0);
    is(r#"behavry_ollama_requests_total{endpoint="chat",outcome="refused",status_class="4xx"} "#, 1.0);
    is(r#"behavry_ollama_requests_total{endpoint="tags",outcome="complete",status_class="2xx"} "#, 1.0);
    is(r#"behavry_ollama_requests_total{endpoint="tags",outcome="refused",status_class="4xx"} "#, 2.0);
    is(r#"behavry_ollama_requests_total{endpoint="token",outcome="refused",status_class="4xx"} "#, 1.0);
    is(r#"behavry_ollama_requests_total{endpoint="unmatched",outcome="refused",status_class="4xx"} "#, 1.0);
    is(r#"behavry_ollama_time_to_first_byte_seconds_count{endpoint="chat"} "#, 3.0);
    is(r#"behavry_ollama_request_duration_seconds_count{endpoint="chat"} "#, 3.0);
    // 24 tokens in and 17 out, in each dialect; the first role counts.
    is(r#"behavry_ollama_tokens_total{direction="in",model="tiny-story",role="internal"} "#, 48.0);
    is(r#"behavry_ollama_tokens_total{direction="out",model="tiny-story",role="internal"} "#, 34.0);
    is("behavry_ollama_tokens_total{", 82.0);
    is(r#"behavry_ollama_tokens_per_second_count{model="tiny-story"} "#, 1.0);
    is(r#"behavry_ollama_policy_decisions_total{result="allow"} "#, 4.0);
    is(r#"behavry_ollama_policy_decisions_total{result="deny"} "#, 1.0);
    is("behavry_ollama_policy_evaluation_seconds_count ", 5.0);
    is(r#"behavry_ollama_token_verification_failures_total{cause="missing"} "#, 1.0);
    is("behavry_ollama_token_verification_failures_total{", 2.0);
    is("behavry_ollama_requests_in_flight ", 0.0);
    is("behavry_ollama_panics_total ", 0.0);
    is("behavry_ollama_audit_failing ", 0.0);
    is(r#"behavry_ollama_audit_records_total{phase="request"} "#, 4.0);
    is("behavry_ollama_upstream_connections_total{", 4.0);
    // Whether the list finds the connection of the catalogue's own reading free is a matter of time.
    let reused = sum(&scrape, r#"behavry_ollama_upstream_connections_total{reused="true"} "#);
    assert!((2.0..=3.0).contains(&reused), "{reused} of 4 reused one");
    is("behavry_ollama_added_seconds_count ", 4.0);
    let added_s = sum(&scrape, "behavry_ollama_added_seconds_sum ");
    assert!(added_s > 0.0 && added_s < sum(&scrape, "behavry_ollama_request_duration_seconds_sum{"), "{added_s}");
    assert!(sum(&scrape, r#"behavry_ollama_bytes_total{direction="in"} "#) > 4.0 * 50.0);
    assert!(sum(&scrape, r#"behavry_ollama_bytes_total{direction="out"} "#) > 2000.0);
    assert!(sum(&scrape, "behavry_ollama_build_info{") == 1.0);

    house.simulator.set_fault(Some(Fault::Refuses)).await.expect("closed");
    house.send(Request::post("/api/chat", chat("tiny-story")).bearer(&token)).await;
    until(&house, "the backend is down", |scrape| sum(scrape, "behavry_ollama_backend_up{") == 0.0).await;
    house.simulator.set_fault(None).await.expect("open");
    until(&house, "the backend is up again", |scrape| sum(scrape, "behavry_ollama_backend_up{") == 1.0).await;
}

#[tokio::test]
async fn requests_in_flight_are_counted_and_return_to_none_however_they_end() {
    let house = House::open().await;
    let token = house.token();
    let mut connections = Vec::new();
    for n in 0..12 {
        let model = ["fault-hangs-before-headers", "fault-stalls-mid-stream", "tiny-story"][n % 3];
        let request = Request::post("/api/chat", chat(model)).bearer(&token);
        let mut connection = Connection::open(house.public).await;
        match n % 3 {
            2 => connection.write(&request.head_bytes()).await, // the body never comes
            _ => connection.send(&request).await,
        }
        connections.push(connection);
    }
    until(&house, "all run", |scrape| sum(scrape, "behavry_ollama_requests_in_flight ") == 12.0).await;
    drop(connections);
    let scrape = until(&house, "none runs", |scrape| sum(scrape, "behavry_ollama_requests_in_flight ") == 0.0).await;
    assert_eq!(sum(&scrape, "behavry_ollama_requests_total{"), 12.0);
    assert_eq!(sum(&scrape, r#"behavry_ollama_requests_total{endpoint="chat",outcome="client_abort""#), 12.0);
}

/// The time series of a scrape, without their values.
fn series(scrape: &str) -> BTreeSet<String> {
    let series = scrape.lines().filter(|line| !line.starts_with('#'));
    series.map(|line| line.rsplit_once(' ').expect("a value").0.to_owned()).collect()
}

#[tokio::test]
async fn a_client_that_invents_names_makes_no_time_series() {
    const NAMES: usize = 1000;
    let house = House::open().await;
    let token = house.token();
    let mut connection = Connection::open(house.public).await;
    let mut before = BTreeSet::new();
    // One round makes every series that there will be; the names are new in each.
    for n in 0..NAMES {
        if n == 10 {
            before = series(&house.metrics().await);
        }
        let request = match n % 5 {
            0 => Request::post("/api/chat", chat(&format!("made-up-{n}"))).bearer(&token),
            1 => Request::get(&format!("/made-up-{n}")).bearer(&token),
            2 => Request::get("/api/version").bearer(&format!("made.up.{n}")),
            3 => Request::get(&format!("/v1/models/made-up-{n}?made-up-{n}=1"))
                .bearer(&token)
                .id(&format!("made-up-{n}")),
            _ => Request::new(&format!("MADEUP{n}"), "/api/chat").bearer(&token),
        };
        connection.send(&request).await;
        connection.reply(false).await.expect("a reply");
    }
    let scrape =
        until(&house, "all are counted", |scrape| sum(scrape, "behavry_ollama_requests_total{") == NAMES as f64).await;
    let after = series(&scrape);
    assert_eq!(after.difference(&before).collect::<Vec<_>>(), Vec::<&String>::new());
    assert!(!scrape.to_lowercase().contains("made"), "no name of a client's");
    assert!(after.len() < 1000, "{} series", after.len());
}

#[tokio::test]
async fn roles_of_signed_tokens_are_labels_up_to_a_bound() {
    let house = House::open().await;
    let mut connection = Connection::open(house.public).await;
    for n in 0..100 {
        let token = house.token_with(&[&format!("role-{n}")], &["web:write"]);
        connection
            .send(&Request::post("/api/embed", json!({ "model": "tiny-embed", "input": "x" })).bearer(&token))
            .await;
        assert_eq!(connection.reply(false).await.expect("a reply").status, 200);
    }
    let begin = "behavry_ollama_requests_total{";
    let scrape = until(&house, "all are counted", |scrape| sum(scrape, begin) == 100.0).await;
    let roles =
        series(&scrape).iter().filter(|one| one.starts_with("behavry_ollama_tokens_total{direction=\"in\"")).count();
    assert!((2..=66).contains(&roles), "{roles} roles");
    assert!(scrape.contains(r#"role="other""#));
}

#[tokio::test]
async fn what_never_parsed_is_counted_by_a_closed_set_of_reasons() {
    let house = House::open().await;
    let heads: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"\x16\x03\x01 made up\r\n\r\n",
        b"GET / HTTP/1.1\nhost: a\n\n",
        b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",
    ];
    for head in heads {
        let mut connection = Connection::open(house.public).await;
        connection.write(head).await;
        let reply = connection.reply(false).await.expect("a reply");
        assert_eq!(reply.status, 400);
    }
    let scrape = until(&house, "all are counted", |scrape| {
        sum(scrape, "behavry_ollama_unparsed_requests_total{") == heads.len() as f64
    })
    .await;
    assert!(!scrape.contains("made up"));
    assert_eq!(sum(&scrape, "behavry_ollama_requests_total{"), 0.0);
    assert_eq!(house.records().len(), 0, "they were no requests, so there are no records (promise I16)");
}

#[tokio::test]
async fn promtool_finds_nothing_to_complain_about() {
    let house = House::open().await;
    house.post("/api/chat", chat("tiny-story")).await;
    house.send(Request::get("/nowhere")).await;
    let scrape = until(&house, "both are counted", |scrape| sum(scrape, "behavry_ollama_requests_total{") == 2.0).await;
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("skipped: promtool is not installed (Debian: prometheus)");
        return;
    };
    promtool.stdin.take().expect("piped").write_all(scrape.as_bytes()).expect("written");
    let said = promtool.wait_with_output().expect("it ends");
    let words = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success() && words.trim().is_empty(), "{words}");
}

#[tokio::test]
async fn the_operators_pages_are_only_on_the_operators_listener() {
    let house = House::open().await;
    let token = house.token();
    for path in ["/metrics", "/livez", "/readyz", "/api/v1/ollama/metrics", "/api/v1/metrics"] {
        let reply = house.send(Request::get(path).bearer(&token)).await;
        assert_eq!((reply.status, reply.code()), (404, "unknown_route".to_owned()), "{path}");
    }
    for path in ["/metrics", "/livez", "/readyz"] {
        let head = |host: &str| format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n");
        for (host, status) in [("localhost", 200), ("127.0.0.1:5173", 200), ("evil.example", 421), ("", 421)] {
            let mut connection = Connection::open(house.operator).await;
            connection.write(head(host).as_bytes()).await;
            assert_eq!(connection.reply(false).await.expect("a reply").status, status, "{path} {host}");
        }
    }
    // What is served to clients is not served to operators, and nothing can be changed.
    for request in
        [Request::get("/api/tags").bearer(&token), Request::post("/api/chat", chat("tiny-story")).bearer(&token)]
    {
        let status = request.send(house.operator).await.status;
        assert!([404, 405].contains(&status), "{status}");
    }
    assert_eq!(house.simulator.connections(), 0);
}
