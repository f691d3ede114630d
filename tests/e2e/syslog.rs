//! The audit as syslog: RFC 5424 messages over each transport, read by a receiver that is strict (issue "Evidence", point 5).

use std::net::SocketAddr;
use std::path::Path;

use serde_json::json;

use crate::client::{Connection, Request};
use crate::house::{House, Plan, wait_until};
use crate::metrics::until;
use crate::puppet::Puppet;
use crate::sinks::{chains, has_all, serve, value, whole_and_in_order};
use crate::syslog_receiver::{Datagrams, Seen, Serves, Stream};

const LAG: &str = r#"behavry_ollama_audit_lag_records{sink="syslog"}"#;
const FAILURES: &str = r#"behavry_ollama_audit_sink_failures_total{sink="syslog"}"#;

fn config(address: &str) -> String {
    format!(
        "[audit.sinks]\nretry_max_s = 1\ntimeout_s = 60\n[audit.syslog]\naddress = \"{address}\"\nfacility = \"local3\"\n"
    )
}

async fn house(address: &str) -> House {
    House::with(Plan { config: config(address), ..Plan::default() }).await
}

async fn wait_for_all(house: &House, seen: &Seen) {
    let dir = house.audit_dir();
    wait_until("every line at the receiver", || has_all(&dir, &seen.lines()).then_some(())).await;
}

/// A port of UDP that nobody has.
fn free_port() -> SocketAddr {
    std::net::UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port")
}

/// Each message says of its line what the line says.
#[track_caller]
fn as_the_lines_say(dir: &Path, seen: &Seen) {
    let chains = chains(dir);
    for message in seen.messages() {
        let line: serde_json::Value = serde_json::from_str(&message.msg).expect("the line");
        assert_eq!(message.timestamp, line["timestamp"]);
        assert_eq!(message.msgid, line["extra"]["phase"]);
        assert!(chains[&message.procid].contains(&message.msg), "of its writer");
        assert_eq!((message.facility, message.app_name.as_str()), (19, "behavry-ollama-proxy"));
        let refused = line["extra"]["outcome"] == "refused";
        assert_eq!(message.severity, if refused { 5 } else { 6 }, "{}", message.msg);
    }
}

#[tokio::test]
async fn a_unix_socket_has_every_line_also_of_the_time_before_it_was_there() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("log");
    let seen = Seen::default();
    let house = house(&format!("unix://{}", path.display())).await;
    serve(&house, 5, "before").await;
    house.send(Request::get("/api/version").id("stranger")).await;
    until(&house, "a failure", |scrape| value(scrape, FAILURES) > 0).await;
    let receiver = Datagrams::unix(&path, &seen);
    wait_for_all(&house, &seen).await;
    // It ends with nothing unread, and another one comes, as when a daemon is updated.
    receiver.die().await;
    std::fs::remove_file(&path).expect("removed");
    serve(&house, 5, "between").await;
    let receiver = Datagrams::unix(&path, &seen);
    wait_for_all(&house, &seen).await;
    receiver.die().await;
    whole_and_in_order(&house.audit_dir(), &seen.lines());
    as_the_lines_say(&house.audit_dir(), &seen);
}

#[tokio::test]
async fn udp_has_every_line_and_where_nobody_listens_they_wait() {
    let (address, seen) = (free_port(), Seen::default());
    let house = house(&format!("udp://{address}")).await;
    serve(&house, 5, "before").await;
    until(&house, "a failure", |scrape| value(scrape, FAILURES) > 0).await;
    // So few lines that they fit into the socket's buffer, however late they are read.
    let receiver = Datagrams::udp(address, &seen).await;
    wait_for_all(&house, &seen).await;
    receiver.die().await;
    whole_and_in_order(&house.audit_dir(), &seen.lines());
    as_the_lines_say(&house.audit_dir(), &seen);
}

#[tokio::test]
async fn over_tcp_whatever_becomes_of_the_receiver_or_of_us_every_line_has_arrived_in_order() {
    let receiver = Stream::open(Serves::Whole).await;
    let config =
        config(&format!("tcp://{}", receiver.address)).replace("timeout_s = 60", "timeout_s = 4\nbatch_lines = 9");
    let mut house = House::with(Plan { config, ..Plan::default() }).await;
    let mut met = receiver.met.clone();
    for (n, serves) in
        [Serves::Resets(1), Serves::Resets(3000), Serves::Lingers, Serves::Stalls].into_iter().enumerate()
    {
        receiver.serves(serves);
        met.mark_unchanged();
        serve(&house, 8, &format!("while-{n}")).await;
        // Twice: the first was not taken for good.
        for _ in 0..2 {
            tokio::time::timeout(crate::house::PATIENCE, met.changed()).await.expect("in time").expect("it listens");
        }
        if n % 2 == 1 {
            house.signal(libc::SIGKILL);
            house.restart().await;
        }
    }
    receiver.serves(Serves::Whole);
    wait_for_all(&house, &receiver.seen).await;
    whole_and_in_order(&house.audit_dir(), &receiver.seen.lines());
    until(&house, "no lag", |scrape| value(scrape, LAG) == 0).await;
    assert!(house.log().contains("did not take them in time"), "{}", house.log());
}

#[tokio::test]
async fn over_tcp_each_comes_once_while_all_is_well_and_the_last_ones_before_the_end() {
    let receiver = Stream::open(Serves::Whole).await;
    let mut house = house(&format!("tcp://{}", receiver.address)).await;
    serve(&house, 10, "req").await;
    house.send(Request::get("/api/version").id("stranger")).await;
    house.final_of("stranger").await;
    house.signal(libc::SIGTERM);
    house.exit().await;
    let files: Vec<String> = chains(&house.audit_dir()).into_values().flatten().collect();
    assert_eq!(receiver.seen.lines(), files);
    as_the_lines_say(&house.audit_dir(), &receiver.seen);
}

#[tokio::test]
async fn no_message_has_a_word_of_a_prompt_or_a_reply() {
    let receiver = Stream::open(Serves::Whole).await;
    let backend = Puppet::listen().await;
    let config = config(&format!("tcp://{}", receiver.address));
    let house = House::with(Plan { config, backend: Some(backend.url()), ..Plan::default() }).await;
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
    wait_for_all(&house, &receiver.seen).await;
    assert!(receiver.seen.messages().iter().all(|message| !format!("{message:?}").contains("canary")));
}
