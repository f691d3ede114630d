//! The audit as OpenTelemetry logs: what a collector decodes is what the files hold (issue "Evidence", point 5).

use std::collections::BTreeMap;
use std::path::Path;

use behavry_ollama_proxy::simulator::SimulatorOptions;
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use prost::Message;
use serde_json::{Map, Value, json};

use crate::client::{Connection, Request};
use crate::collector::{Collector, Delivery, Does};
use crate::house::{House, Plan, program, run_to_end, wait_until};
use crate::metrics::until;
use crate::puppet::Puppet;
use crate::sinks::{Hooked, chains, has_all, private, serve, value, whole_and_in_order};

const LAG: &str = r#"behavry_ollama_audit_lag_records{sink="otlp"}"#;
const FAILURES: &str = r#"behavry_ollama_audit_sink_failures_total{sink="otlp"}"#;
const LOST: &str = r#"behavry_ollama_audit_dropped_records_total{sink="otlp"}"#;

fn config(collector: &Collector, more: &str) -> String {
    format!(
        "[audit.sinks]\nretry_max_s = 1\ntimeout_s = 60\n[audit.otlp]\nurl = \"http://{}/v1/logs\"\n{more}\n",
        collector.address
    )
}

async fn house(collector: &Collector) -> House {
    House::with(Plan { config: config(collector, ""), ..Plan::default() }).await
}

/// A log record with what its resource says.
struct Log {
    writer: String,
    time_unix_nano: u64,
    severity: String,
    event: String,
    line: String,
    attributes: BTreeMap<String, Value>,
}

fn json_of(value: &AnyValue) -> Value {
    match value.value.as_ref() {
        None => Value::Null,
        Some(Any::StringValue(text)) => text.as_str().into(),
        Some(Any::BoolValue(flag)) => (*flag).into(),
        Some(Any::IntValue(number)) => (*number).into(),
        Some(Any::ArrayValue(list)) => list.values.iter().map(json_of).collect(),
        Some(Any::KvlistValue(list)) => Value::Object(members(&list.values).into_iter().collect::<Map<_, _>>()),
        Some(other) => panic!("{other:?} does not occur in JSON of ours"),
    }
}

fn members(list: &[KeyValue]) -> BTreeMap<String, Value> {
    let value = |one: &KeyValue| one.value.as_ref().map_or(Value::Null, json_of);
    list.iter().map(|one| (one.key.clone(), value(one))).collect()
}

fn logs(delivery: &Delivery) -> Vec<Log> {
    let request = ExportLogsServiceRequest::decode(delivery.body.as_slice()).expect("OTLP");
    let mut logs = Vec::new();
    for resource in request.resource_logs {
        let about = members(&resource.resource.expect("a resource").attributes);
        assert_eq!(about["service.name"], "behavry-ollama-proxy");
        for scope in resource.scope_logs {
            assert_eq!(scope.scope.expect("a scope").name, "behavry.audit.v1");
            for record in scope.log_records {
                assert!(record.observed_time_unix_nano >= record.time_unix_nano, "seen after it happened");
                let body = record.body.as_ref().map(json_of).expect("a body");
                logs.push(Log {
                    writer: about["service.instance.id"].as_str().expect("a name").to_owned(),
                    time_unix_nano: record.time_unix_nano,
                    severity: record.severity_text,
                    event: record.event_name,
                    line: body.as_str().expect("a text").to_owned(),
                    attributes: members(&record.attributes),
                });
            }
        }
    }
    logs
}

fn taken(collector: &Collector) -> Vec<Log> {
    collector.taken().iter().flat_map(logs).collect()
}

fn lines(collector: &Collector) -> Vec<String> {
    taken(collector).into_iter().map(|log| log.line).collect()
}

async fn wait_for_all(house: &House, collector: &Collector) {
    let dir = house.audit_dir();
    wait_until("every line at the collector", || has_all(&dir, &lines(collector)).then_some(())).await;
}

/// What the attributes of a line should be: its members that are not null, `extra` taken apart.
fn expected_attributes(line: &Value) -> BTreeMap<String, Value> {
    let mut expected = BTreeMap::new();
    for (name, value) in line.as_object().expect("a record") {
        if name == "extra" {
            let extra = value.as_object().expect("members");
            expected.extend(extra.iter().map(|(name, value)| (format!("behavry.audit.extra.{name}"), value.clone())));
        } else {
            expected.insert(format!("behavry.audit.{name}"), value.clone());
        }
    }
    expected.retain(|_, value| !value.is_null());
    expected
}

fn headers_file(dir: &Path) -> String {
    let path = dir.join("otlp.headers");
    private(&path, "authorization: Bearer s3cr3t-of-the-collector\nx-tenant: one\n");
    format!("headers_file = \"{}\"", path.display())
}

#[tokio::test]
async fn each_line_is_a_log_with_its_columns_as_attributes_and_itself_as_body() {
    let (dir, collector) = (tempfile::tempdir().expect("a folder"), Collector::open(Does::Takes).await);
    let config = config(&collector, &headers_file(dir.path()));
    let simulator = SimulatorOptions { tokens_per_second: 2000.0, ..SimulatorOptions::for_tests() };
    let mut house = House::with(Plan { config, simulator, ..Plan::default() }).await;
    let token = house.token_with(&["internal", "second"], &["web:read", "web:write"]);
    let ask = json!({ "model": "tiny-story", "messages": [{ "role": "user", "content": "hi" }] });
    house.send(Request::post("/api/chat", ask).bearer(&token).id("asked")).await;
    house.send(Request::get("/api/version").id("stranger")).await;
    house.final_of("asked").await;
    house.final_of("stranger").await;
    house.signal(libc::SIGTERM);
    house.exit().await;
    let chains = chains(&house.audit_dir());
    let logs = taken(&collector);
    let files: Vec<&String> = chains.values().flatten().collect();
    assert_eq!(logs.iter().map(|log| &log.line).collect::<Vec<_>>(), files, "each once, the last ones too");
    for log in &logs {
        let line: Value = serde_json::from_str(&log.line).expect("JSON");
        assert_eq!(log.attributes, expected_attributes(&line));
        assert!(chains[&log.writer].contains(&log.line));
        assert_eq!(log.event, format!("behavry.audit.{}", line["extra"]["phase"].as_str().expect("a phase")));
        let at: jiff::Timestamp = line["timestamp"].as_str().expect("a time").parse().expect("a time");
        assert_eq!(i128::from(log.time_unix_nano), at.as_nanosecond());
        let refused = line["extra"]["outcome"] == "refused";
        assert_eq!(log.severity, if refused { "NOTICE" } else { "INFO" });
    }
    let asked =
        logs.iter().find(|log| log.attributes.get("behavry.audit.extra.output_tokens").is_some_and(|n| *n == 17));
    assert_eq!(
        asked.expect("the final record").attributes["behavry.audit.extra.agent_roles"],
        json!(["internal", "second"])
    );
    for delivery in collector.seen() {
        assert!(delivery.head.starts_with("POST /v1/logs HTTP/1.1\r\n"), "{}", delivery.head);
        assert_eq!(delivery.header("content-type"), "application/x-protobuf");
        assert_eq!(delivery.header("authorization"), "Bearer s3cr3t-of-the-collector");
        assert_eq!(delivery.header("x-tenant"), "one");
    }
    assert!(!house.log().contains("s3cr3t"));
}

#[tokio::test]
async fn a_collector_that_refuses_or_only_seems_to_take_has_every_line_once_it_does() {
    let collector = Collector::open(Does::Takes).await;
    let config = config(&collector, "").replace("timeout_s = 60", "timeout_s = 4\nbatch_lines = 6");
    let mut house = House::with(Plan { config, ..Plan::default() }).await;
    let page = b"<html><body>Please log in</body></html>".to_vec();
    let ways = [
        Does::Answers(400, String::new()),
        Does::Answers(401, String::new()),
        Does::Answers(429, "retry-after: 1\r\n".to_owned()),
        Does::Answers(503, String::new()),
        Does::Babbles,
        Does::Stalls,
        Does::TakesAndHangsUp,
    ];
    for (n, way) in ways.into_iter().enumerate() {
        collector.does(way);
        serve(&house, 2, &format!("while-{n}")).await;
        collector.wait_for_more(2).await;
        if n == 3 {
            house.signal(libc::SIGKILL);
            house.restart().await;
        }
    }
    let failures = value(&house.metrics().await, FAILURES);
    collector.does(Does::TakesSaying(page));
    serve(&house, 2, "page").await;
    until(&house, "a page is no answer", |scrape| value(scrape, FAILURES) > failures + 1).await;
    collector.does(Does::Takes);
    wait_for_all(&house, &collector).await;
    whole_and_in_order(&house.audit_dir(), &lines(&collector));
    assert_eq!(value(&until(&house, "no lag", |scrape| value(scrape, LAG) == 0).await, LOST), 0);
    let log = house.log();
    assert!(log.contains("does not answer as a collector does") && !log.contains("log in"), "{log}");
}

#[tokio::test]
async fn records_that_a_collector_refuses_for_good_are_counted_and_not_sent_again() {
    let partial = ExportLogsPartialSuccess { rejected_log_records: 2, error_message: "canary".to_owned() };
    let answer = ExportLogsServiceResponse { partial_success: Some(partial) }.encode_to_vec();
    let collector = Collector::open(Does::Answers(503, String::new())).await;
    let house = house(&collector).await;
    serve(&house, 5, "req").await;
    collector.does(Does::TakesSaying(answer));
    wait_for_all(&house, &collector).await;
    let scrape = until(&house, "no lag", |scrape| value(scrape, LAG) == 0).await;
    assert_eq!(value(&scrape, LOST), 2 * collector.taken().len() as u64);
    assert!(house.log().contains("the otlp cannot take 2 lines") && !house.log().contains("canary"), "{}", house.log());
    let came = lines(&collector);
    let distinct: std::collections::HashSet<&String> = came.iter().collect();
    assert_eq!(distinct.len(), came.len());
}

#[tokio::test]
async fn requests_are_served_while_every_sink_is_dead_and_each_catches_up_by_itself() {
    let (hooked, mut webhook, mut collector) =
        (Hooked::new(), Collector::open(Does::Takes).await, Collector::open(Does::Takes).await);
    let syslog = hooked.dir.path().join("log");
    webhook.die().await;
    collector.die().await;
    let config = format!(
        "{}\n[audit.syslog]\naddress = \"unix://{}\"\n[audit.otlp]\nurl = \"http://{}/v1/logs\"\n",
        hooked.config(&webhook.url(), "", ""),
        syslog.display(),
        collector.address
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    serve(&house, 30, "alone").await;
    let behind = |scrape: &str, sink: &str| {
        value(scrape, &format!(r#"behavry_ollama_audit_lag_records{{sink="{sink}"}}"#)) > 60
            && value(scrape, &format!(r#"behavry_ollama_audit_sink_failures_total{{sink="{sink}"}}"#)) > 0
    };
    let all = |scrape: &str| ["webhook", "syslog", "otlp"].into_iter().all(|sink| behind(scrape, sink));
    until(&house, "all are behind", all).await;
    collector.rise().await;
    wait_for_all(&house, &collector).await;
    let seen = crate::syslog_receiver::Seen::default();
    let receiver = crate::syslog_receiver::Datagrams::unix(&syslog, &seen);
    let dir = house.audit_dir();
    wait_until("every line at the receiver", || has_all(&dir, &seen.lines()).then_some(())).await;
    until(&house, "the webhook is behind still", |scrape| behind(scrape, "webhook")).await;
    webhook.rise().await;
    wait_until("every line at the webhook", || has_all(&dir, &webhook.lines()).then_some(())).await;
    receiver.die().await;
}

#[tokio::test]
async fn no_log_has_a_word_of_a_prompt_or_a_reply() {
    let (backend, collector) = (Puppet::listen().await, Collector::open(Does::Takes).await);
    let plan = Plan { config: config(&collector, ""), backend: Some(backend.url()), ..Plan::default() };
    let house = House::with(plan).await;
    let body = r#"{"model":"canary","message":{"role":"assistant","content":"canary-reply"},"done":true}"#;
    let reply =
        format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let ask =
        json!({ "model": "llama3.2", "stream": false, "messages": [{ "role": "user", "content": "canary-prompt" }] });
    let mut connection = Connection::open(house.public).await;
    connection.send(&Request::post("/api/chat", ask).bearer(&house.token()).id("asked")).await;
    backend.asked().await.try_say(reply.as_bytes()).await;
    assert!(connection.reply(false).await.expect("a reply").text().contains("canary-reply"));
    house.final_of("asked").await;
    wait_for_all(&house, &collector).await;
    for delivery in collector.seen() {
        assert!(!String::from_utf8_lossy(&delivery.body).contains("canary") && !delivery.head.contains("canary"));
    }
}

#[tokio::test]
async fn check_names_a_header_that_is_none_by_its_line_and_does_not_quote_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let headers = dir.path().join("otlp.headers");
    let file = dir.path().join("proxy.toml");
    let check = async |url: &str, text: &str| {
        private(&headers, text);
        let lines = format!("[audit.otlp]\nurl = \"{url}\"\nheaders_file = \"otlp.headers\"\n");
        std::fs::write(&file, lines).expect("written");
        let mut command = program(&["check"]);
        command.env("BEHAVRY_STATE_DIR", dir.path().join("state")).env("BEHAVRY_CONFIG", &file);
        run_to_end(command).await
    };
    let good = check("https://collector.example:4318/v1/logs", "authorization: Bearer s3cr3t\n").await;
    assert_eq!(good.code, Some(0), "{}", good.stderr);
    assert!(!good.stdout.contains("s3cr3t"));
    for (url, text, words) in [
        ("https://collector.example:4318/v1/logs", "x-tenant: one\ns3cr3t", "line 2 is no header"),
        ("https://collector.example:4318", "", "write it as https://host:4318/v1/logs"),
        ("http://collector.example:4318/v1/logs", "", "anybody on the way"),
    ] {
        let told = check(url, text).await;
        assert_eq!(told.code, Some(78), "{words}");
        assert!(told.stderr.contains(words) && !told.stderr.contains("s3cr3t"), "{words}: {}", told.stderr);
    }
}
