//! Each way of misbehaving, and what the simulator remembers.

use std::time::{Duration, Instant};

use behavry_ollama_proxy::simulator::{Ending, Fault, Seen, Simulator, SimulatorOptions};

use super::client::{Answer, Client, LIMIT, post};

const STREAM: &str = r#"{"model":"llama3.2","messages":[{"role":"user","content":"hi"}]}"#;
const WHOLE: &str = r#"{"model":"llama3.2","messages":[{"role":"user","content":"hi"}],"stream":false}"#;

async fn simulator() -> Simulator {
    Simulator::start(SimulatorOptions::for_tests()).await.expect("a free port")
}

async fn ask(simulator: &Simulator, path: &str, body: &str) -> Answer {
    Client::connect(simulator.addr()).await.ask(&post(path, body)).await
}

/// The answer to a chat under a fault, streamed or not.
async fn under(fault: Fault, body: &str) -> Answer {
    let simulator = simulator().await;
    simulator.set_fault(Some(fault)).await.expect("nothing to open");
    ask(&simulator, "/api/chat", body).await
}

fn ended(seen: &[Seen]) -> bool {
    seen.iter().all(|seen| seen.ended_how.is_some()) && !seen.is_empty()
}

#[tokio::test]
async fn a_simulator_that_refuses_refuses_and_comes_back_on_its_port() {
    let simulator = simulator().await;
    let mut before = Client::connect(simulator.addr()).await;
    assert_eq!(before.ask(&post("/api/chat", WHOLE)).await.status(), 200);
    simulator.set_fault(Some(Fault::Refuses)).await.expect("closing cannot fail");
    let refused = tokio::net::TcpStream::connect(simulator.addr()).await.expect_err("the listener is closed");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    before.end().await;
    simulator.set_fault(None).await.expect("the port was kept");
    assert_eq!(ask(&simulator, "/api/chat", WHOLE).await.status(), 200);
}

#[tokio::test]
async fn a_stopped_simulator_cuts_what_runs_and_says_so() {
    let simulator = simulator().await;
    let mut client = Client::connect(simulator.addr()).await;
    client.send(&post("/api/chat", r#"{"model":"tiny-slow","messages":[{"role":"user","content":"hi"}]}"#)).await;
    simulator.wait_for(LIMIT, |seen| seen.iter().any(|seen| seen.first_byte.is_some())).await.expect("a first token");
    simulator.stop().await;
    assert!(!client.answer(false).await.whole);
    assert_eq!(simulator.seen()[0].ended_how, Some(Ending::Stopped));
    simulator.restart().await.expect("the port was kept");
    assert_eq!(ask(&simulator, "/api/chat", WHOLE).await.status(), 200);
}

/// The stages at which a client may leave; the witness is the simulator's own clock.
#[tokio::test]
async fn a_client_that_leaves_is_noticed_at_once_at_every_stage() {
    let cases = [
        (SimulatorOptions { load_ms: 600_000, ..SimulatorOptions::for_tests() }, STREAM, None),
        (SimulatorOptions { first_token_ms: 600_000, ..SimulatorOptions::for_tests() }, STREAM, None),
        (SimulatorOptions { first_token_ms: 600_000, ..SimulatorOptions::for_tests() }, WHOLE, None),
        (SimulatorOptions { tokens_per_second: 0.001, ..SimulatorOptions::for_tests() }, STREAM, None),
        (SimulatorOptions::for_tests(), r#"{"model":"tiny-loop","messages":[{"role":"user","content":"hi"}]}"#, None),
        (SimulatorOptions::for_tests(), STREAM, Some(Fault::HangsBeforeHeaders)),
        (SimulatorOptions::for_tests(), STREAM, Some(Fault::StallsMidStream { after: 2 })),
        (SimulatorOptions::for_tests(), WHOLE, Some(Fault::StallsMidStream { after: 0 })),
    ];
    for (index, (options, body, fault)) in cases.into_iter().enumerate() {
        let simulator = Simulator::start(options).await.expect("a free port");
        simulator.set_fault(fault).await.expect("nothing to open");
        let mut client = Client::connect(simulator.addr()).await;
        client.send(&post("/api/chat", body)).await;
        simulator.wait_for(LIMIT, |seen| seen.iter().any(|seen| seen.body_whole)).await.expect("the request arrives");
        drop(client);
        // By itself none of these does anything, or comes to its end, for minutes.
        let seen = simulator.wait_for(LIMIT, ended).await.unwrap_or_else(|not| panic!("case {index}: {not}"));
        assert_eq!(seen[0].ended_how, Some(Ending::ClientGone), "case {index}");
    }
}

#[tokio::test]
async fn an_aborted_load_has_to_begin_again() {
    let options = SimulatorOptions { load_ms: 60_000, ..SimulatorOptions::for_tests() };
    let simulator = Simulator::start(options).await.expect("a free port");
    let mut client = Client::connect(simulator.addr()).await;
    client.send(&post("/api/chat", STREAM)).await;
    simulator.wait_for(LIMIT, |seen| seen.iter().any(|seen| seen.body_whole)).await.expect("the request arrives");
    drop(client);
    simulator.wait_for(LIMIT, ended).await.expect("the abort is noticed");
    let ps = Client::connect(simulator.addr()).await.ask(b"GET /api/ps HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(ps.text(), r#"{"models":[]}"#);
}

#[tokio::test]
async fn closing_before_or_in_the_head_gives_no_head() {
    for fault in [Fault::ClosesBeforeHeaders, Fault::ResetsBeforeHeaders, Fault::ClosesInHead, Fault::GarbageHead] {
        let answer = under(fault.clone(), STREAM).await;
        assert!(!answer.head.starts_with("HTTP/1.1 200"), "{fault:?}");
        // Garbage with an empty line in it reads as a head without a length, up to the end of the connection.
        assert!(!answer.whole || fault == Fault::GarbageHead, "{fault:?}");
    }
}

#[tokio::test]
async fn a_head_can_be_huge() {
    let answer = under(Fault::HugeHead { size_bytes: 100_000 }, STREAM).await;
    assert!(answer.head.len() > 100_000);
}

#[tokio::test]
async fn a_stream_can_be_cut_or_reset_after_so_many_records() {
    for fault in [Fault::ClosesMidStream { after: 2 }, Fault::ResetsMidStream { after: 2 }] {
        let simulator = simulator().await;
        simulator.set_fault(Some(fault.clone())).await.expect("nothing to open");
        let mut client = Client::connect(simulator.addr()).await;
        let answer = client.ask(&post("/api/chat", STREAM)).await;
        assert!(!answer.whole, "{fault:?}");
        // A reset may overtake what was sent.
        if matches!(fault, Fault::ClosesMidStream { .. }) {
            assert_eq!(answer.text().lines().count(), 2);
        }
        let whole = ask(&simulator, "/api/chat", WHOLE).await;
        assert!(!whole.whole, "{fault:?}");
        assert!(simulator.seen().iter().all(|seen| seen.ended_how == Some(Ending::Fault)));
    }
}

#[tokio::test]
async fn a_reset_is_a_reset() {
    let simulator = simulator().await;
    simulator.set_fault(Some(Fault::ResetsMidStream { after: 0 })).await.expect("nothing to open");
    let mut client = Client::connect(simulator.addr()).await;
    client.send(&post("/api/chat", STREAM)).await;
    assert!(!client.end().await, "the connection ended with a FIN");
    simulator.set_fault(Some(Fault::ClosesMidStream { after: 0 })).await.expect("nothing to open");
    let mut client = Client::connect(simulator.addr()).await;
    client.send(&post("/api/chat", STREAM)).await;
    assert!(client.end().await, "the connection ended with a reset");
}

#[tokio::test]
async fn a_dripping_reply_is_the_same_reply() {
    let answer = under(Fault::Drips { pause_ms: 0 }, STREAM).await;
    assert!(answer.whole);
    assert_eq!(answer.text().lines().count(), 16);
}

#[tokio::test]
async fn ollamas_own_errors_come_in_its_words() {
    let full = under(Fault::QueueFull, STREAM).await;
    assert_eq!(full.status(), 503);
    assert_eq!(full.text(), r#"{"error":"server busy, please try again.  maximum pending requests exceeded"}"#);
    let missing = under(Fault::ModelMissing, STREAM).await;
    assert_eq!((missing.status(), missing.text().as_str()), (404, r#"{"error":"model 'llama3.2' not found"}"#));
    assert_eq!(under(Fault::RunnerStopped, STREAM).await.status(), 500);
}

#[tokio::test]
async fn an_error_in_the_stream_shows_natively_and_is_hidden_elsewhere() {
    let simulator = simulator().await;
    simulator.set_fault(Some(Fault::ErrorInStream { after: 1 })).await.expect("nothing to open");
    let native = ask(&simulator, "/api/chat", STREAM).await;
    assert!(native.whole);
    assert!(native.text().lines().last().is_some_and(|line| line.starts_with(r#"{"error":"#)));
    let hidden = STREAM.replace('{', "{\"stream\":true,\"max_tokens\":8,").replacen(
        "\"stream\":true,\"max_tokens\":8,\"role\"",
        "\"role\"",
        1,
    );
    for path in ["/v1/chat/completions", "/v1/messages"] {
        let answer = ask(&simulator, path, &hidden).await;
        assert!(answer.whole && answer.status() == 200, "{path}");
        assert!(
            !answer.text().contains("error")
                && !answer.text().contains("[DONE]")
                && !answer.text().contains("message_stop")
        );
    }
    assert_eq!(ask(&simulator, "/api/chat", WHOLE).await.status(), 500);
}

#[tokio::test]
async fn a_stream_can_end_cleanly_without_its_end() {
    let answer = under(Fault::NoTerminal { after: 2 }, STREAM).await;
    assert!(answer.whole && !answer.text().contains("\"done\":true"));
    let whole = under(Fault::NoTerminal { after: 2 }, WHOLE).await;
    assert!(whole.status() == 200 && whole.text().contains("\"done\":false"));
}

#[tokio::test]
async fn idle_connections_can_be_closed_unannounced() {
    let simulator = simulator().await;
    simulator.set_fault(Some(Fault::ClosesIdleConnections { after_ms: 0 })).await.expect("nothing to open");
    let mut client = Client::connect(simulator.addr()).await;
    let answer = client.ask(&post("/api/chat", WHOLE)).await;
    assert!(answer.whole && answer.header("connection").is_none());
    assert!(client.end().await);
}

#[tokio::test]
async fn a_connection_can_die_at_its_second_request() {
    let simulator = simulator().await;
    simulator.set_fault_times(Fault::ClosesOnReuse, 1).await.expect("nothing to open");
    let mut client = Client::connect(simulator.addr()).await;
    assert!(client.ask(&post("/api/chat", WHOLE)).await.whole);
    assert!(client.ask(&post("/api/chat", WHOLE)).await.head.is_empty());
    let mut again = Client::connect(simulator.addr()).await;
    for _ in 0..2 {
        assert!(again.ask(&post("/api/chat", WHOLE)).await.whole);
    }
}

#[tokio::test]
async fn a_400_can_come_before_the_body() {
    for keep in [true, false] {
        let simulator = simulator().await;
        simulator.set_fault_times(Fault::Early400 { keep }, 1).await.expect("nothing to open");
        let mut client = Client::connect(simulator.addr()).await;
        client.send(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n").await;
        assert_eq!(client.answer(false).await.status(), 400);
        client.send(b"12345").await;
        if keep {
            assert_eq!(client.ask(&post("/api/chat", WHOLE)).await.status(), 200);
        } else {
            client.end().await;
        }
    }
}

#[tokio::test]
async fn a_client_that_expects_it_is_told_to_continue() {
    let simulator = simulator().await;
    let mut client = Client::connect(simulator.addr()).await;
    client
        .send(b"POST /api/show HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 16\r\n\r\n")
        .await;
    assert_eq!(client.answer(false).await.status(), 100);
    client.send(br#"{"model":"tiny"}"#).await;
    assert_eq!(client.answer(false).await.status(), 200);
}

#[tokio::test]
async fn a_second_reply_can_follow_unasked() {
    let simulator = simulator().await;
    simulator.set_fault(Some(Fault::TwoReplies)).await.expect("nothing to open");
    let mut client = Client::connect(simulator.addr()).await;
    assert!(client.ask(&post("/api/chat", STREAM)).await.whole);
    assert_eq!(client.answer(false).await.text(), r#"{"response":"2"}"#);
}

#[tokio::test]
async fn informational_responses_can_come_first() {
    for status in [100, 101, 103] {
        let simulator = simulator().await;
        simulator.set_fault(Some(Fault::Informational { status })).await.expect("nothing to open");
        let mut client = Client::connect(simulator.addr()).await;
        assert_eq!(client.ask(&post("/api/chat", WHOLE)).await.status(), status);
        assert_eq!(client.answer(false).await.status(), 200);
    }
}

#[tokio::test]
async fn replies_of_a_wrong_kind() {
    for body in [STREAM, WHOLE] {
        assert_eq!(under(Fault::Compressed, body).await.header("content-encoding"), Some("gzip"));
    }
    let moved = under(Fault::Redirect { location: "http://elsewhere.invalid/".to_owned() }, STREAM).await;
    assert_eq!((moved.status(), moved.header("location")), (302, Some("http://elsewhere.invalid/")));
    let page = under(Fault::Html, STREAM).await;
    assert_eq!((page.status(), page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let short = under(Fault::WrongContentLength { difference: 10 }, STREAM).await;
    assert!(short.status() == 200 && !short.whole);
    let long = under(Fault::WrongContentLength { difference: -1 }, STREAM).await;
    assert!(long.whole && serde_json::from_str::<serde_json::Value>(&long.text()).is_err());
}

#[tokio::test]
async fn a_models_name_chooses_a_fault_for_one_request() {
    let simulator = simulator().await;
    let body = STREAM.replace("llama3.2", "fault-closes-mid-stream-1:latest");
    let answer = ask(&simulator, "/api/chat", &body).await;
    assert!(!answer.whole && answer.text().lines().count() == 1);
    let listed =
        Client::connect(simulator.addr()).await.ask(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert!(!listed.text().contains("fault"));
    assert!(ask(&simulator, "/api/chat", STREAM).await.whole);
}

#[tokio::test]
async fn faults_leave_lists_alone_unless_told() {
    let simulator = simulator().await;
    let tags = b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n";
    simulator.set_fault(Some(Fault::Html)).await.expect("nothing to open");
    let mut client = Client::connect(simulator.addr()).await;
    assert_eq!(client.ask(tags).await.header("content-type"), Some("application/json; charset=utf-8"));
    simulator.set_fault_everywhere(Fault::Html).await.expect("nothing to open");
    assert_eq!(client.ask(tags).await.header("content-type"), Some("text/html; charset=utf-8"));
}

#[tokio::test]
async fn bodies_of_any_size_and_framing_are_hashed() {
    use sha2::Digest as _;
    let simulator = simulator().await;
    for size in [0_usize, 1, 65_535, 65_536, 65_537, 1 << 20, 8 << 20] {
        let text = "x".repeat(size);
        let body =
            format!(r#"{{"model":"llama3.2","stream":false,"messages":[{{"role":"user","content":"{text}"}}]}}"#);
        let expected: [u8; 32] = sha2::Sha256::digest(&body).into();
        let mut chunked = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for piece in body.as_bytes().chunks(10_000) {
            chunked.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            chunked.extend_from_slice(piece);
            chunked.extend_from_slice(b"\r\n");
        }
        chunked.extend_from_slice(b"0\r\n\r\n");
        for request in [post("/api/chat", &body), chunked] {
            simulator.forget();
            let answer = Client::connect(simulator.addr()).await.ask(&request).await;
            assert_eq!(answer.status(), 200, "{size} bytes");
            let seen = simulator.wait_for(LIMIT, ended).await.expect("it ends");
            assert_eq!((seen[0].body_bytes, seen[0].body_sha256), (body.len() as u64, expected));
            assert!(seen[0].body.len() <= 64 * 1024 && seen[0].body_whole);
        }
    }
}

#[tokio::test]
async fn the_witness_has_the_request_as_it_was_sent() {
    let simulator = simulator().await;
    let request =
        b"POST /api/chat?a=%20b HTTP/1.1\r\nhOsT: localhost\r\nX-Odd:  spaced \r\nContent-Length: 2\r\n\r\n{}";
    assert_eq!(Client::connect(simulator.addr()).await.ask(request).await.status(), 400);
    let seen = simulator.wait_for(LIMIT, ended).await.expect("it ends");
    assert_eq!(seen[0].raw_head, request[..request.len() - 2]);
    assert_eq!((seen[0].method.as_str(), seen[0].target.as_str()), ("POST", "/api/chat?a=%20b"));
    assert_eq!(seen[0].header("x-odd"), Some("spaced"));
    assert_eq!((seen[0].body.as_slice(), seen[0].ended_how), (&b"{}"[..], Some(Ending::Complete)));
    assert!(seen[0].first_byte.is_some() && simulator.connections() == 1);
    assert_eq!(simulator.bytes().received_bytes, request.len() as u64);
    assert!(!format!("{:?}", seen[0]).contains("{}"), "a body was printed");
}

#[tokio::test]
async fn the_list_of_the_seen_has_a_bound() {
    let options = SimulatorOptions { witnesses: 3, ..SimulatorOptions::for_tests() };
    let simulator = Simulator::start(options).await.expect("a free port");
    let mut client = Client::connect(simulator.addr()).await;
    for number in 0..5 {
        client.ask(format!("GET /api/version?{number} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await;
    }
    let targets: Vec<String> = simulator.seen().into_iter().map(|seen| seen.target).collect();
    assert_eq!(targets, ["/api/version?2", "/api/version?3", "/api/version?4"]);
    assert!(simulator.wait_for(Duration::from_millis(20), |seen| seen.len() > 3).await.is_err());
}

#[tokio::test]
async fn a_reader_that_stalls_holds_the_stream_and_not_the_simulator() {
    let simulator = simulator().await;
    let mut stalled = Client::connect(simulator.addr()).await;
    stalled.send(&post("/api/chat", r#"{"model":"tiny-loop","messages":[{"role":"user","content":"hi"}]}"#)).await;
    simulator.wait_for(LIMIT, |seen| seen.iter().any(|seen| seen.first_byte.is_some())).await.expect("a first token");
    assert!(ask(&simulator, "/api/chat", STREAM).await.whole);
    drop(stalled);
    let seen = simulator.wait_for(LIMIT, ended).await.expect("the stalled one is noticed");
    assert_eq!(seen[0].ended_how, Some(Ending::ClientGone));
}

#[tokio::test]
async fn tokens_come_at_their_pace_and_are_limited_as_asked() {
    let options =
        SimulatorOptions { tokens: 5, tokens_per_second: 50.0, first_token_ms: 50, ..SimulatorOptions::for_tests() };
    let simulator = Simulator::start(options).await.expect("a free port");
    let began = Instant::now();
    let answer = ask(&simulator, "/api/chat", STREAM).await;
    assert!(began.elapsed() >= Duration::from_millis(50 + 4 * 20), "{:?}", began.elapsed());
    assert_eq!(answer.text().lines().count(), 5);
    assert!(answer.text().contains(r#""done_reason":"stop""#) && answer.text().contains(r#""eval_count":5"#));
    let limited = STREAM.replace(['}', ']'], "") + r#"}],"options":{"num_predict":2}}"#;
    let answer = ask(&simulator, "/api/chat", &limited).await;
    assert!(
        answer.text().contains(r#""done_reason":"length""#) && answer.text().contains(r#""eval_count":2"#),
        "{}",
        answer.status()
    );
}

#[tokio::test]
async fn a_blob_is_judged_by_its_sha_256() {
    let simulator = simulator().await;
    let path = "/api/blobs/sha256:13229d0a7de8063ab5f432f6fae7461b28700f54b17293cdbc499368a0ce51b2";
    assert_eq!(ask(&simulator, path, "just another blob").await.status(), 400);
    assert_eq!(ask(&simulator, path, "just a blob\n").await.status(), 201);
    assert_eq!(ask(&simulator, path, "just a blob\n").await.status(), 200);
}

#[tokio::test]
async fn what_is_no_request_is_answered_and_closed() {
    let simulator = simulator().await;
    for request in [&b"nonsense\r\n\r\n"[..], b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\nHost: a\r\n\r\n"] {
        let mut client = Client::connect(simulator.addr()).await;
        assert_eq!(client.ask(request).await.status(), 400);
        client.end().await;
    }
    let mut client = Client::connect(simulator.addr()).await;
    let broken = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
    assert_eq!(client.ask(broken).await.status(), 400);
}

#[tokio::test]
async fn the_loopback_port_of_two_simulators_differs() {
    let (one, two) = (simulator().await, simulator().await);
    assert_ne!(one.addr(), two.addr());
    assert!(one.url().starts_with("http://127.0.0.1:"));
}
