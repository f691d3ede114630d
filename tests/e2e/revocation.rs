//! Tokens that end before they expire: new requests are refused, what runs is cut with an error in its dialect, others go on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use behavry_ollama_proxy::identity::issuer::Claims;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::client::{Connection, Reply, Request};
use crate::h2_client::{self, Asked, H2};
use crate::house::{Ended, House, KEY, PATIENCE, Plan, program, run_to_end, wait_until};
use crate::puppet::{Hand, Puppet};

const WORDS: &str = "This token or its agent was revoked. Ask the operator for access.";
const NOT_RELOADED: &str = "revocations not reloaded";

fn state(house: &House) -> PathBuf {
    house.dir.path().join("state")
}

fn list(house: &House) -> PathBuf {
    state(house).join("revoked.toml")
}

/// Whole or not at all.
fn replace(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text).expect("written");
    std::fs::rename(draft, path).expect("renamed");
}

fn entry(subject: &str, id: &str) -> String {
    format!("[[revoked]]\n{subject} = \"{id}\"\nat = 2100-01-01T00:00:00Z\n")
}

async fn command(house: &House, arguments: &[&str]) -> Ended {
    let mut command = program(arguments);
    command.env("BEHAVRY_STATE_DIR", state(house));
    run_to_end(command).await
}

async fn done(house: &House, arguments: &[&str]) -> Ended {
    let ended = command(house, arguments).await;
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    ended
}

fn token(house: &House, agent: &str, session: &str) -> String {
    house.mint(Claims {
        sub: agent.to_owned(),
        session: Some(session.to_owned()),
        permissions: vec!["web:read".to_owned(), "web:write".to_owned()],
        ..Claims::default()
    })
}

fn chat(stream: bool) -> Value {
    json!({ "model": "m", "stream": stream, "max_tokens": 5, "messages": [{ "role": "user", "content": "hi" }] })
}

async fn house(puppet: &Puppet) -> House {
    House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await
}

/// A stream that has begun: its client has the first record.
async fn running(house: &House, puppet: &Puppet, path: &str, token: &str, id: &str) -> (Connection, Hand) {
    let mut client = Connection::open(house.public).await;
    client.send(&Request::post(path, chat(true)).bearer(token).id(id)).await;
    let mut hand = puppet.accept().await;
    hand.request().await;
    let (content_type, record) = match path {
        "/v1/chat/completions" => {
            ("text/event-stream", "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n")
        }
        "/v1/messages" => ("text/event-stream", "event: message_start\ndata: {\"type\":\"message_start\"}\n\n"),
        _ => ("application/x-ndjson", "{\"message\":{\"content\":\"a\"},\"done\":false}\n"),
    };
    hand.open_stream(content_type).await;
    hand.chunk(record.as_bytes()).await;
    assert_eq!(client.head().await.expect("a head").0, 200);
    client.chunk().await.expect("not the end").expect("the first record");
    (client, hand)
}

/// The last chunk of a stream that was cut, and then a clean end.
async fn frame(client: &mut Connection) -> String {
    let frame = client.chunk().await.expect("not the end").expect("an error");
    assert!(client.chunk().await.is_none(), "a clean end");
    String::from_utf8(frame).expect("text")
}

fn data(event: &str) -> Value {
    let line = event.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or_else(|| panic!("{event}"));
    serde_json::from_str(line).expect("JSON")
}

#[track_caller]
fn is_revoked(reply: &Reply) {
    assert_eq!((reply.status, reply.code().as_str()), (403, "revoked"), "{}", reply.text());
    assert_eq!(reply.header("x-should-retry"), Some("false"));
    assert!(reply.header("content-length").is_some());
}

/// Asks until the status is the one that a change of a file brings.
async fn eventually(house: &House, token: &str, status: u16) {
    let began = Instant::now();
    while house.send(Request::get("/api/version").bearer(token)).await.status != status {
        assert!(began.elapsed() < PATIENCE, "the change was not taken:\n{}", house.log());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn what_runs_for_a_revoked_session_is_cut_in_its_dialect_and_others_go_on() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet).await;
    let (doomed, spared) = (token(&house, "agent", "doomed"), token(&house, "agent", "spared"));
    // Silent from here on: no byte of a backend moves them.
    let (mut native, mut native_hand) = running(&house, &puppet, "/api/chat", &doomed, "native").await;
    let (mut openai, _openai_hand) = running(&house, &puppet, "/v1/chat/completions", &doomed, "openai").await;
    let (mut anthropic, _anthropic_hand) = running(&house, &puppet, "/v1/messages", &doomed, "anthropic").await;
    let (mut half, mut half_hand) = running(&house, &puppet, "/api/generate", &doomed, "half").await;
    half_hand.chunk(b"{\"response\":\"b").await; // within a record
    half.chunk().await.expect("not the end").expect("half a record");
    let (mut other, mut other_hand) = running(&house, &puppet, "/api/chat", &spared, "other").await;
    let mut waiting = Connection::open(house.public).await;
    waiting.send(&Request::post("/api/chat", chat(false)).bearer(&doomed).id("waiting")).await;
    let mut waiting_hand = puppet.accept().await;
    waiting_hand.request().await;
    let mut uploading = Connection::open(house.public).await;
    let upload = Request::post("/api/chat", chat(true)).bearer(&doomed).id("uploading");
    uploading.write(&upload.head_bytes()).await;
    uploading.write(&upload.body_bytes()[..10]).await;
    let mut kept = Connection::open(house.public).await; // verified already, on a connection that is kept
    kept.send(&Request::get("/v1/files").bearer(&doomed)).await;
    assert_eq!(kept.reply(false).await.expect("a reply").status, 400, "known, and not offered");
    let began = Instant::now();
    while !house.metrics().await.contains("\nbehavry_ollama_requests_in_flight 7\n") {
        assert!(began.elapsed() < PATIENCE, "seven requests did not come");
    }

    done(&house, &["token", "revoke", "--session", "doomed", "--reason", "a laptop was lost"]).await;
    assert_eq!(frame(&mut native).await, format!("{{\"error\":\"{WORDS}\"}}\n"));
    let said = data(&frame(&mut openai).await);
    assert_eq!((&said["error"]["message"], &said["error"]["code"]), (&json!(WORDS), &json!("revoked")));
    let event = frame(&mut anthropic).await;
    assert!(event.starts_with("event: error\n"), "{event}");
    let said = data(&event);
    assert_eq!((&said["type"], &said["error"]["message"]), (&json!("error"), &json!(WORDS)));
    assert_eq!(frame(&mut half).await, format!("\n{{\"error\":\"{WORDS}\"}}\n"), "the half record is ended");
    for client in [&mut waiting, &mut uploading] {
        is_revoked(&client.reply(false).await.expect("an answer"));
    }
    native_hand.closed().await; // the backend's work is cancelled
    waiting_hand.closed().await;
    kept.send(&Request::get("/api/version").bearer(&doomed)).await;
    is_revoked(&kept.reply(false).await.expect("an answer"));
    for path in ["/api/chat", "/v1/chat/completions", "/v1/messages"] {
        let reply = house.send(Request::post(path, chat(true)).bearer(&doomed).id("new")).await;
        assert_eq!((reply.status, reply.header("x-should-retry")), (403, Some("false")));
        assert!(reply.text().contains(WORDS) && !reply.text().contains("laptop"), "{}", reply.text());
    }

    other_hand.chunk(b"{\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":3,\"eval_count\":2}\n").await;
    other_hand.say("0\r\n\r\n").await;
    other.chunk().await.expect("not the end").expect("the last record");
    assert!(other.chunk().await.is_none(), "a clean end");
    assert_eq!(house.final_of("other").await["extra"]["outcome"], "complete");
    for id in ["native", "openai", "anthropic", "half", "waiting", "uploading"] {
        let last = house.final_of(id).await;
        assert_eq!((&last["extra"]["outcome"], &last["error"]), (&json!("revoked"), &json!("revoked")), "{id}");
        assert_eq!((&last["session_id"], &last["extra"]["output_tokens"]), (&json!("doomed"), &Value::Null), "{id}");
    }
    let refused = house.records().into_iter().find(|record| record["extra"]["request_id"] == "new").expect("a record");
    assert_eq!((&refused["extra"]["outcome"], &refused["error"]), (&json!("refused"), &json!("revoked")));
    assert_eq!((&refused["agent_id"], &refused["policy_result"]), (&json!("agent"), &json!("deny")));
    assert!(!house.audit_text().contains("laptop"));
}

#[tokio::test]
async fn a_stream_over_http_2_is_cut_with_an_error_and_its_connection_goes_on_for_others() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet).await;
    let h2 = H2::open(house.public).await;
    let mut streams = Vec::new();
    for session in ["doomed", "spared"] {
        let request = Request::post("/api/chat", chat(true)).bearer(&token(&house, "agent", session)).id(session);
        let Asked { reply, mut body } = h2.again().ask(&request, None).await;
        h2_client::write(&mut body, request.body_bytes().into()).await;
        let mut hand = puppet.accept().await;
        hand.request().await;
        hand.open_stream("application/x-ndjson").await;
        hand.chunk(b"{\"message\":{\"content\":\"a\"},\"done\":false}\n").await;
        let reply = timeout(PATIENCE, reply).await.expect("in time").expect("a reply");
        assert_eq!(reply.status(), 200);
        let mut parts = reply.into_body();
        h2_client::next(&mut parts).await.expect("not the end").expect("the first record");
        streams.push((parts, hand));
    }
    let [(doomed, doomed_hand), (spared, spared_hand)] = &mut streams[..] else { panic!("two streams") };
    done(&house, &["token", "revoke", "--session", "doomed"]).await;
    let mut rest = Vec::new();
    while let Some(part) = h2_client::next(doomed).await {
        rest.extend_from_slice(&part.expect("a clean end, and no reset"));
    }
    assert_eq!(String::from_utf8_lossy(&rest), format!("{{\"error\":\"{WORDS}\"}}\n"));
    doomed_hand.closed().await; // the backend's work is cancelled
    assert_eq!(house.final_of("doomed").await["extra"]["outcome"], "revoked");

    spared_hand.chunk(b"{\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":3,\"eval_count\":2}\n").await;
    spared_hand.say("0\r\n\r\n").await;
    while let Some(part) = h2_client::next(spared).await {
        part.expect("it goes on to its end");
    }
    assert_eq!(house.final_of("spared").await["extra"]["outcome"], "complete");
    let again = Request::get("/api/version").bearer(&token(&house, "agent", "doomed"));
    is_revoked(&h2.again().send(&again).await);
}

/// Told and in force are one: whoever has seen the command return has seen the end of what the session is told.
#[tokio::test]
async fn nothing_that_a_backend_says_after_the_command_has_returned_reaches_a_revoked_session() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet).await;
    for round in 0..10 {
        let (session, id) = (format!("s-{round}"), format!("cut-{round}"));
        let token = token(&house, "agent", &session);
        let (mut client, mut hand) = running(&house, &puppet, "/api/chat", &token, &id).await;
        done(&house, &["token", "revoke", "--session", &session]).await;
        let late = "{\"message\":{\"content\":\"too late\"},\"done\":false}\n";
        hand.try_say(format!("{:x}\r\n{late}\r\n", late.len())).await;
        assert_eq!(frame(&mut client).await, format!("{{\"error\":\"{WORDS}\"}}\n"), "round {round}");
        assert_eq!(house.final_of(&id).await["extra"]["outcome"], "revoked");
    }
}

#[tokio::test]
async fn what_somebody_writes_into_the_list_is_in_force_for_requests_and_streams() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet).await;
    let (old, other) = (token(&house, "worker", "w-1"), token(&house, "bystander", "b-1"));
    let (mut stream, _hand) = running(&house, &puppet, "/api/chat", &old, "stream").await;
    replace(&list(&house), &entry("agent", "worker"));
    assert_eq!(frame(&mut stream).await, format!("{{\"error\":\"{WORDS}\"}}\n"));
    is_revoked(&house.send(Request::post("/api/chat", chat(false)).bearer(&old)).await);
    let (_others, mut hand) = running(&house, &puppet, "/api/chat", &other, "others").await;
    hand.chunk(b"{\"message\":{\"content\":\"b\"},\"done\":false}\n").await;

    // In place, and in the middle of it: what was revoked stays so while the file has only its half.
    let text = entry("session", "b-1") + &entry("agent", "worker");
    std::fs::write(list(&house), "").unwrap();
    std::fs::write(list(&house), &text).unwrap();
    eventually(&house, &other, 403).await;
    assert_eq!(house.send(Request::get("/api/version").bearer(&old)).await.status, 403);
    assert_eq!(house.final_of("others").await["extra"]["outcome"], "revoked");
}

#[tokio::test]
async fn an_agent_whose_tokens_were_revoked_can_be_given_new_ones() {
    let house = House::open().await;
    let old = token(&house, "worker", "w-1");
    assert_eq!(house.send(Request::get("/api/version").bearer(&old)).await.status, 200);
    done(&house, &["token", "revoke", "--agent", "worker"]).await;
    is_revoked(&house.send(Request::get("/api/version").bearer(&old)).await);
    let began = Instant::now();
    // Tokens count whole seconds: from the next one on they are new.
    while house.send(Request::get("/api/version").bearer(&token(&house, "worker", "w-2"))).await.status != 200 {
        assert!(began.elapsed() < PATIENCE, "{}", house.log());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    is_revoked(&house.send(Request::get("/api/version").bearer(&old)).await);
}

#[tokio::test]
async fn a_list_that_is_broken_or_deleted_leaves_the_last_good_one_and_an_empty_one_revokes_nothing() {
    let house = House::open().await;
    let gone = token(&house, "agent", "gone");
    let failures = |n: usize| format!("behavry_ollama_reload_failures_total{{what=\"revocations\"}} {n}\n");
    replace(&list(&house), &entry("session", "gone"));
    eventually(&house, &gone, 403).await;
    assert!(house.metrics().await.contains(&failures(0)));

    replace(&list(&house), "[[revoked]]\nsession = \"gone\"\n");
    wait_until("the broken list is seen", || (house.log().matches(NOT_RELOADED).count() == 1).then_some(())).await;
    assert!(house.metrics().await.contains(&failures(1)));
    std::fs::remove_file(list(&house)).unwrap();
    wait_until("the loss is seen", || (house.log().matches(NOT_RELOADED).count() == 2).then_some(())).await;
    is_revoked(&house.send(Request::get("/api/version").bearer(&gone)).await);
    let log = house.log();
    assert!(log.contains("revoked.toml:1: missing field `at`") && log.contains("is gone; put it back"), "{log}");

    replace(&list(&house), "");
    eventually(&house, &gone, 200).await;
}

#[tokio::test]
async fn a_suspended_agents_tokens_end_and_hold_again_when_it_is_resumed() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet).await;
    done(&house, &["agent", "add", "worker"]).await;
    let (worker, other) = (token(&house, "worker", "w-1"), token(&house, "in-no-file", "o-1"));
    let (mut stream, _hand) = running(&house, &puppet, "/api/chat", &worker, "stream").await;
    let (_others, _others_hand) = running(&house, &puppet, "/api/chat", &other, "others").await;
    done(&house, &["agent", "suspend", "worker"]).await;
    assert_eq!(frame(&mut stream).await, format!("{{\"error\":\"{WORDS}\"}}\n"));
    assert_eq!(house.final_of("stream").await["extra"]["outcome"], "revoked");
    is_revoked(&house.send(Request::post("/api/chat", chat(false)).bearer(&worker)).await);
    done(&house, &["agent", "resume", "worker"]).await;
    let (_again, _again_hand) = running(&house, &puppet, "/api/chat", &worker, "again").await;
    // Removed, it is as an id that was in no file: `token mint` makes tokens for any.
    done(&house, &["agent", "remove", "worker"]).await;
    let (_removed, _removed_hand) = running(&house, &puppet, "/api/chat", &worker, "removed").await;
}

#[tokio::test]
async fn token_revoke_takes_a_token_on_standard_input_if_it_holds() {
    let house = House::open().await;
    let (one, sibling) = (token(&house, "agent", "s-1"), token(&house, "agent", "s-2"));
    let revoke = |token: String| {
        let file = house.dir.path().join("token");
        std::fs::write(&file, token + "\n").unwrap();
        let mut command = program(&["token", "revoke", "-"]);
        command.env("BEHAVRY_STATE_DIR", state(&house));
        command.env("BEHAVRY_JWT_PRIVATE_KEY", String::from_utf8_lossy(KEY).as_ref());
        command.stdin(std::fs::File::open(file).unwrap());
        run_to_end(command)
    };
    let mut forged = one.clone();
    let middle = one.rfind('.').expect("three segments") + 10;
    forged.replace_range(middle..=middle, if &one[middle..=middle] == "A" { "B" } else { "A" });
    for (token, words) in [(forged, "does not hold"), ("x".to_owned(), "does not hold")] {
        let ended = revoke(token).await;
        assert_eq!(ended.code, Some(1), "{}", ended.stdout);
        assert!(ended.stderr.contains(words), "{}", ended.stderr);
    }
    assert!(!list(&house).exists());
    let ended = revoke(one.clone()).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "session s-1 is revoked\n"), "{}", ended.stderr);
    is_revoked(&house.send(Request::get("/api/version").bearer(&one)).await);
    assert_eq!(house.send(Request::get("/api/version").bearer(&sibling)).await.status, 200);
    assert!(!std::fs::read_to_string(list(&house)).unwrap().contains(&one), "no token is written anywhere");

    for arguments in [
        &["token", "revoke"][..],
        &["token", "revoke", &one],
        &["token", "revoke", "--session", "a", "--agent", "b"],
        &["token", "revoke", "--session", ""],
        &["token", "revoke", "--session", "a", "--reason", "two\nlines"],
    ] {
        assert_eq!(command(&house, arguments).await.code, Some(64), "{arguments:?}");
    }
}

#[tokio::test]
async fn a_revocation_outlives_a_restart_and_a_broken_list_stops_the_start() {
    let mut house = House::open().await;
    let gone = token(&house, "agent", "gone");
    done(&house, &["token", "revoke", "--session", "gone"]).await;
    house.signal(libc::SIGTERM);
    let status = house.exit().await;
    assert!(status.success(), "{status}: {}", house.log());
    // Nobody answers: the command edits the file itself, and says so.
    let ended = done(&house, &["token", "revoke", "--session", "later"]).await;
    assert!(ended.stderr.contains("revoked.toml was edited"), "{}", ended.stderr);
    let env = vec![("BEHAVRY_STATE_DIR".to_owned(), state(&house).display().to_string())];
    let second = House::with(Plan { env: env.clone(), ..Plan::default() }).await;
    is_revoked(&second.send(Request::get("/api/version").bearer(&gone)).await);
    is_revoked(&second.send(Request::get("/api/version").bearer(&token(&second, "agent", "later"))).await);
    drop(second);

    replace(&list(&house), "[[revoked]\n");
    let mut third = program(&["serve"]);
    third.env("BEHAVRY_LISTEN", "127.0.0.1:0").env("BEHAVRY_OPERATOR_LISTEN", "127.0.0.1:0");
    third.env("BEHAVRY_JWT_PRIVATE_KEY", String::from_utf8_lossy(KEY).as_ref());
    let ended = run_to_end({
        third.envs(env);
        third
    })
    .await;
    assert_eq!(ended.code, Some(78));
    assert!(ended.stderr.contains("revoked.toml:1:"), "{}", ended.stderr);
}

/// Whoever comes while the list is loaded is either refused or cut: none of these streams would end by itself.
#[tokio::test]
async fn no_stream_that_begins_while_a_revocation_is_loaded_slips_through() {
    let backend = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", backend.local_addr().expect("it listens"));
    let house = House::with(Plan { backend: Some(url), ..Plan::default() }).await;
    let endless = tokio::spawn(async move {
        let mut streams = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = backend.accept().await {
            streams.spawn(async move {
                let record = "{\"message\":{\"content\":\"a\"},\"done\":false}\n";
                let reply = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{record}\r\n",
                    record.len()
                );
                // Once it is cut there is nobody to write to.
                let _ = stream.write_all(reply.as_bytes()).await;
                let mut read = [0; 4096];
                while let Ok(1..) = stream.read(&mut read).await {}
            });
        }
    });
    for round in 0..5 {
        let session = format!("round-{round}");
        let token = token(&house, "agent", &session);
        let public = house.public;
        let mut clients = tokio::task::JoinSet::new();
        let mut revoked = None;
        for n in 0..60 {
            let (token, began) = (token.clone(), n % 3);
            clients.spawn(async move {
                let mut client = Connection::open(public).await;
                for _ in 0..began {
                    tokio::task::yield_now().await;
                }
                client.send(&Request::post("/api/chat", chat(true)).bearer(&token)).await;
                client.reply(false).await.expect("an end")
            });
            if n == 20 {
                let mut command = program(&["token", "revoke", "--session", &session]);
                command.env("BEHAVRY_STATE_DIR", state(&house));
                revoked = Some(tokio::spawn(run_to_end(command)));
            }
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        let ended = revoked.expect("begun").await.expect("run");
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let (mut cut, mut refused) = (0, 0);
        while let Some(reply) = clients.join_next().await {
            let reply = reply.expect("a reply");
            match reply.status {
                200 => {
                    let text = reply.text();
                    assert!(text.ends_with(&format!("{{\"error\":\"{WORDS}\"}}\n")), "{text} ({:?})", reply.end);
                    cut += 1;
                }
                _ => {
                    is_revoked(&reply);
                    refused += 1;
                }
            }
        }
        println!("round {round}: {cut} cut, {refused} refused");
        assert_eq!(cut + refused, 60);
    }
    endless.abort();
}
