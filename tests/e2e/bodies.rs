//! Request bodies of any size, framing and protocol: what the client sent is what the backend got, or it is refused in words that
//! the client can read.

use behavry_ollama_proxy::simulator::{Ending, Fault, Seen, Simulator};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use crate::client::{Connection, Request};
use crate::failover::two;
use crate::fleet::holding;
use crate::h2_client::{self, H2};
use crate::house::{House, PATIENCE, Plan, until_tried, wait_until, wait_until_async};

const MIB: usize = 1024 * 1024;

/// Around Pingora's own retry buffer (64 KiB) and its double, and well past both.
const SIZES: [usize; 7] = [65_535, 65_536, 65_537, 131_073, MIB, 8 * MIB, 20 * MIB];

/// A body of exactly `size` bytes, no two stretches of which are alike, so that a lost or swapped piece shows.
fn body_of(size: usize) -> Vec<u8> {
    let start = br#"{"model":"tiny","stream":false,"messages":[{"role":"user","content":""#;
    let end = br#""}]}"#;
    filled(start, end, size)
}

/// A stream on `/v1`, into which the proxy writes `include_usage`.
fn v1_stream_of(size: usize) -> Vec<u8> {
    let start = br#"{"model":"tiny-story","stream":true,"messages":[{"role":"user","content":""#;
    filled(start, br#""}]}"#, size)
}

fn filled(start: &[u8], end: &[u8], size: usize) -> Vec<u8> {
    let mut body = start.to_vec();
    let mut number = 0u64;
    while body.len() < size - end.len() {
        let word = format!("{number:x} ");
        let room = size - end.len() - body.len();
        body.extend_from_slice(&word.as_bytes()[..word.len().min(room)]);
        number += 7;
    }
    body.extend_from_slice(end);
    assert_eq!(body.len(), size);
    body
}

/// As the proxy rewrites it: one member in front.
fn with_usage(body: &[u8]) -> Vec<u8> {
    [br#"{"stream_options":{"include_usage":true},"#, &body[1..]].concat()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn chat(house: &House, body: Vec<u8>) -> Request {
    Request::new("POST", "/api/chat").header("content-type", "application/json").bearer(&house.token()).body(body)
}

fn v1_chat(house: &House, body: Vec<u8>) -> Request {
    Request::new("POST", "/v1/chat/completions")
        .header("content-type", "application/json")
        .bearer(&house.token())
        .body(body)
}

fn only(mut seen: Vec<Seen>) -> Seen {
    assert_eq!(seen.len(), 1, "exactly one request at the backend: {seen:?}");
    seen.remove(0)
}

fn assert_arrived(seen: &Seen, body: &[u8], what: &str) {
    assert!(seen.body_whole, "{what}: the body is whole");
    assert_eq!(seen.body_bytes, body.len() as u64, "{what}: length");
    assert_eq!(seen.body_sha256, sha256(body), "{what}: every byte");
    let length = body.len().to_string();
    assert_eq!(seen.header("content-length"), Some(length.as_str()), "{what}: one framing");
    assert_eq!(seen.header("transfer-encoding"), None, "{what}: one framing");
}

#[tokio::test]
async fn a_body_of_any_size_arrives_byte_for_byte_over_http_1() {
    let house = House::open().await;
    let mut connection = Connection::open(house.public).await;
    let smallest = br#"{"model":"tiny"}"#.to_vec();
    for body in std::iter::once(smallest).chain(SIZES.map(body_of)) {
        for chunk_bytes in [None, Some(10_000)] {
            house.simulator.forget();
            let mut request = chat(&house, body.clone());
            request.chunked = chunk_bytes;
            connection.send(&request).await;
            let what = format!("{} bytes, in chunks: {}", body.len(), chunk_bytes.is_some());
            let reply = connection.reply(false).await.expect(&what);
            assert_eq!(reply.status, 200, "{what}");
            assert_arrived(&only(house.simulator.seen()), &body, &what);
        }
    }
}

#[tokio::test]
async fn a_body_of_any_size_arrives_byte_for_byte_over_http_2() {
    let house = House::open().await;
    let mut connection = H2::open(house.public).await;
    let smallest = br#"{"model":"tiny"}"#.to_vec();
    for body in std::iter::once(smallest).chain(SIZES.map(body_of)) {
        for declared in [true, false] {
            house.simulator.forget();
            let mut request = chat(&house, body.clone());
            request.chunked = (!declared).then_some(1);
            let reply = connection.send(&request).await;
            let what = format!("{} bytes, declared: {declared}", body.len());
            assert_eq!(reply.status, 200, "{what}");
            assert_arrived(&only(house.simulator.seen()), &body, &what);
        }
    }
}

#[tokio::test]
async fn chunks_of_one_byte_and_chunks_split_between_writes_are_put_together() {
    let house = House::open().await;
    let body = body_of(3_000);
    let reply = house.send(chat(&house, body.clone()).chunked(1)).await;
    assert_eq!(reply.status, 200);
    assert_arrived(&only(house.simulator.seen()), &body, "one byte a chunk");

    house.simulator.forget();
    let request = chat(&house, body.clone()).chunked(700);
    let mut connection = Connection::open(house.public).await;
    connection.write(&request.head_bytes()).await;
    for bytes in request.body_bytes().chunks(3) {
        connection.write(bytes).await; // sizes, line ends and data are torn apart
    }
    assert_eq!(connection.reply(false).await.expect("a reply").status, 200);
    assert_arrived(&only(house.simulator.seen()), &body, "torn framing");
}

#[tokio::test]
async fn one_byte_is_no_request_and_is_refused_before_a_backend_is_contacted() {
    let house = House::open().await;
    for body in [&b""[..], b"1", b" ", b"{"] {
        let reply = house.send(chat(&house, body.to_vec())).await;
        assert_eq!((reply.status, reply.code()), (400, "invalid_body".to_owned()), "{} bytes", body.len());
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn fifty_requests_of_changing_size_pass_over_one_connection() {
    let house = House::open().await;
    let mut connection = Connection::open(house.public).await;
    for number in 0..50 {
        let body = body_of(100 + number * 2_999);
        let mut request = chat(&house, body.clone());
        request.chunked = (number % 3 == 0).then_some(4_096);
        connection.send(&request).await;
        let reply = connection.reply(false).await.expect("the connection is kept");
        assert_eq!(reply.status, 200, "request {number}");
        let seen = house.simulator.seen();
        assert_eq!(seen.len(), number + 1);
        assert_arrived(&seen[number], &body, &format!("request {number}"));
    }
    assert_eq!(house.simulator.connections(), 1, "the backend's connection is kept as well");
}

#[tokio::test]
async fn pipelined_requests_are_answered_one_after_another() {
    let house = House::open().await;
    let bodies: Vec<Vec<u8>> = [80, 70_000, 90, 131_073, 100].map(body_of).to_vec();
    let mut bytes = Vec::new();
    for (number, body) in bodies.iter().enumerate() {
        let mut request = chat(&house, body.clone()).id(&format!("p{number}"));
        request.chunked = (number % 2 == 1).then_some(5_000);
        bytes.extend_from_slice(&request.head_bytes());
        bytes.extend_from_slice(&request.body_bytes());
    }
    let mut connection = Connection::open(house.public).await;
    connection.write(&bytes).await;
    for (number, body) in bodies.iter().enumerate() {
        let reply = connection.reply(false).await.expect("every request is answered");
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("x-request-id"), Some(format!("p{number}").as_str()), "in their order");
        assert_arrived(&house.simulator.seen()[number], body, &format!("request {number}"));
    }
    assert_eq!(house.simulator.seen().len(), bodies.len());
}

#[tokio::test]
async fn expect_100_continue_is_answered_once_the_token_was_checked() {
    let house = House::open().await;
    for (path, body) in [("/api/chat", body_of(70_000)), ("/api/chat", body_of(100))] {
        house.simulator.forget();
        let mut request = chat(&house, body.clone()).header("expect", "100-continue");
        request.path = path.to_owned();
        let mut connection = Connection::open(house.public).await;
        for _ in 0..2 {
            connection.write(&request.head_bytes()).await;
            assert_eq!(connection.head().await.expect("the interim head").0, 100);
            connection.write(&request.body_bytes()).await;
            let reply = connection.reply(false).await.expect("a reply, and the connection kept for the next");
            assert_eq!(reply.status, 200);
        }
        for seen in house.simulator.seen() {
            assert_arrived(&seen, &body, "after 100");
            assert_eq!(seen.header("expect"), None, "it ends at the proxy");
        }
    }
}

#[tokio::test]
async fn a_bad_token_is_refused_without_100_continue() {
    let house = House::open().await;
    let body = body_of(70_000);
    let mut request = Request::new("POST", "/api/chat").header("expect", "100-continue").body(body);
    for token in [None, Some("not.a.token")] {
        if let Some(token) = token {
            request = request.bearer(token);
        }
        let mut connection = Connection::open(house.public).await;
        connection.write(&request.head_bytes()).await;
        let (status, _) = connection.head().await.expect("a head");
        assert_eq!(status, 401, "and no 100 before it");
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_missing_permission_an_unknown_route_or_too_long_a_body_is_refused_without_100_continue() {
    let house = House::with(limits("body_bytes = 50000")).await;
    let reader = house.token_with(&[], &["web:read"]);
    for (path, token, length, status) in [
        ("/api/chat", reader, 100, 403),
        ("/api/nothing", house.token(), 100, 404),
        ("/api/chat", house.token(), 50_001, 413),
    ] {
        let request =
            Request::new("POST", path).bearer(&token).header("expect", "100-continue").body(vec![b' '; length]);
        let mut connection = Connection::open(house.public).await;
        connection.write(&request.head_bytes()).await;
        assert_eq!(connection.head().await.expect("a head").0, status);
    }
    let request = chat(&house, body_of(100)).header("expect", "200-ok");
    assert_eq!(house.send(request).await.code(), "bad_framing");
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_rewritten_body_arrives_rewritten_whatever_its_size() {
    let house = House::open().await;
    for size in [200, 60_000, 65_536 - 41, 65_536, MIB] {
        house.simulator.forget();
        let body = v1_stream_of(size);
        let reply = house.send(v1_chat(&house, body.clone())).await;
        assert_eq!(reply.status, 200);
        assert!(reply.text().ends_with("data: [DONE]\n\n"), "{size}");
        assert_arrived(&only(house.simulator.seen()), &with_usage(&body), &format!("{size} bytes"));
    }
}

/// Needs `enable_retry_buffering` to be called at the start of every attempt: that is when the door rewinds.
#[tokio::test]
async fn a_rewritten_body_arrives_rewritten_at_the_first_second_and_third_attempt() {
    // An old connection that had died, a new one that breaks, and then the other backend.
    let (a, b) = (holding(&["tiny-story"]).await, holding(&["tiny-story"]).await);
    let house = two(&a, &b, "").await;
    let asked = |simulator: &Simulator| {
        let seen = simulator.seen().into_iter();
        seen.filter(|seen| seen.target == "/v1/chat/completions").collect::<Vec<_>>()
    };
    for size in [60_000, MIB] {
        let body = v1_stream_of(size);
        for failures in 0..3 {
            let id = format!("again-{size}-{failures}");
            let mut tries = 0;
            until_tried(&id, async || {
                tries += 1;
                let id = format!("{id}-{tries}");
                a.set_fault(None).await.expect("listening");
                assert_eq!(house.send(v1_chat(&house, v1_stream_of(200))).await.status, 200); // leaves a connection behind
                a.forget();
                b.forget();
                if failures > 0 {
                    a.set_fault_times(Fault::ClosesBeforeHeaders, failures).await.expect("listening");
                }
                let reply = house.send(v1_chat(&house, body.clone()).id(&id)).await;
                let seen = [asked(&a), asked(&b)].concat();
                // The request before held the slot still, or its connection was not back in the pool yet.
                if asked(&a).is_empty() || failures == 2 && seen.len() == 2 {
                    return None;
                }
                assert_eq!(reply.status, 200, "{id}");
                assert!(reply.text().ends_with("data: [DONE]\n\n"), "{id}");
                assert_eq!(seen.len() as u64, failures + 1, "{id}: attempts");
                let (last, failed) = seen.split_last().expect("one at least");
                assert!(failed.iter().all(|seen| seen.ended_how == Some(Ending::Fault)), "{id}");
                assert_arrived(last, &with_usage(&body), &id);
                assert_eq!(house.final_of(&id).await["extra"]["retries"], failures, "{id}");
                Some(())
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_by_its_content_length_before_a_byte_is_read() {
    let house = House::with(limits("body_bytes = 100000")).await;
    let request = chat(&house, body_of(100_001));
    let mut connection = Connection::open(house.public).await;
    connection.write(&request.head_bytes()).await; // and nothing more
    let reply = connection.reply(false).await.expect("an answer");
    assert_eq!((reply.status, reply.code()), (413, "body_too_large".to_owned()));
    assert_eq!(house.send(chat(&house, body_of(100_000))).await.status, 200);
    house.simulator.forget();
    let huge = format!("POST /api/chat HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {}\r\n", house.token());
    for length in ["99999999999999999", "999999999999999999"] {
        let mut connection = Connection::open(house.public).await;
        connection.write(format!("{huge}content-length: {length}\r\n\r\n").as_bytes()).await;
        assert_eq!(connection.reply(false).await.expect("an answer").status, 413);
    }
    assert!(house.simulator.seen().is_empty());
}

#[tokio::test]
async fn a_chunked_body_over_the_limit_is_refused_while_it_is_read() {
    let house = House::with(limits("body_bytes = 100000")).await;
    let request = chat(&house, body_of(100_001)).chunked(30_000);
    let mut bytes = request.head_bytes();
    bytes.extend_from_slice(&request.body_bytes());
    bytes.truncate(bytes.len() - 5); // its end never comes
    let mut connection = Connection::open(house.public).await;
    connection.write(&bytes).await;
    let reply = connection.reply(false).await.expect("an answer");
    assert_eq!((reply.status, reply.code()), (413, "body_too_large".to_owned()));

    let mut h2 = H2::open(house.public).await;
    let mut request = chat(&house, body_of(300_000));
    request.chunked = Some(1);
    assert_eq!(h2.send(&request).await.status, 413);
    assert_eq!(house.simulator.connections(), 0);
    assert_eq!(house.send(chat(&house, body_of(100_000)).chunked(30_000)).await.status, 200);
}

#[tokio::test]
async fn bodies_together_take_no_more_memory_than_they_may() {
    let house = House::with(limits("body_bytes = 200000\nbodies_in_memory_bytes = 200000")).await;
    let body = body_of(150_000);
    let first = chat(&house, body.clone());
    let began = std::time::Instant::now();
    // Which of the two is over the limit depends on what the proxy has read of the first when the second comes: until it is the
    // second.
    loop {
        assert!(began.elapsed() < PATIENCE, "the second is never refused");
        let mut holder = Connection::open(house.public).await;
        holder.write(&first.head_bytes()).await;
        holder.write(&body[..140_000]).await;
        let second = house.send(chat(&house, body.clone())).await;
        let small = house.send(chat(&house, body_of(20_000))).await;
        let _ = holder.stream.write_all(&body[140_000..]).await; // it may have been refused instead
        let held = holder.reply(false).await.expect("an answer");
        for reply in [&second, &held] {
            assert!(matches!(reply.status, 200 | 503), "{}", reply.status);
        }
        if (held.status, second.status) == (200, 503) {
            assert_eq!(second.code(), "queue_full");
            assert!(second.header("retry-after").is_some());
            assert_eq!(small.status, 200, "a small one still fits");
            break;
        }
    }
    // A moment after its reply.
    wait_until_async("its share was given back", async || {
        (house.send(chat(&house, body.clone())).await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_body_that_stops_coming_is_refused() {
    let house = House::with(limits("body_idle_ms = 200")).await;
    let request = chat(&house, body_of(1_000)).id("stopped");
    let mut connection = Connection::open(house.public).await;
    connection.write(&request.head_bytes()).await;
    connection.write(&request.body_bytes()[..500]).await;
    let reply = connection.reply(false).await.expect("an answer");
    assert_eq!((reply.status, reply.code()), (408, "slow_request".to_owned()));
    assert_eq!(reply.header("connection"), Some("close"));
    assert_eq!(house.final_of("stopped").await["error"], "slow body");
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_body_that_drips_has_an_end_too() {
    let house = House::with(limits("body_idle_ms = 300")).await;
    let request = chat(&house, body_of(60_000));
    let mut connection = Connection::open(house.public).await;
    connection.write(&request.head_bytes()).await;
    let (mut read, mut write) = connection.stream.into_split();
    let dripping = tokio::spawn(async move {
        // Never silent for as long as the limit, and never done.
        for byte in request.body_bytes().chunks(1) {
            if write.write_all(byte).await.is_err() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
    let mut reply = Vec::new();
    while !reply.ends_with(b"}") {
        use tokio::io::AsyncReadExt;
        let read = tokio::time::timeout(PATIENCE, read.read_buf(&mut reply)).await.expect("an answer in time");
        assert!(read.expect("an answer") > 0);
    }
    dripping.abort();
    assert!(reply.starts_with(b"HTTP/1.1 408 "));
    assert_eq!(house.simulator.connections(), 0);
}

/// A client of the ordinary kind: it sends everything, and only then reads. A close with unread bytes would be a reset, which
/// breaks its write or destroys the answer on its way.
#[tokio::test]
async fn a_refused_upload_can_be_sent_to_its_end_and_the_reason_read_every_time() {
    let house = House::with(limits("body_bytes = 1000000\nlinger_ms = 30000")).await;
    let body = vec![b' '; 20 * MIB];
    let to = |path: &str| Request::new("POST", path).body(body.clone());
    let reader = house.token_with(&[], &["web:read"]);
    let refusals = [
        (to("/api/chat"), 401, "missing_token"),
        (to("/api/chat").bearer("not.a.token"), 401, "invalid_token"),
        (to("/api/chat").bearer(&reader), 403, "insufficient_scope"),
        (to("/api/nothing").bearer(&house.token()), 404, "unknown_route"),
        (to("/api/tags").bearer(&house.token()), 405, "method_not_allowed"),
        (to("/api/chat").bearer(&house.token()), 413, "body_too_large"),
        (to("/api/chat").bearer(&house.token()).chunked(100_000), 413, "body_too_large"),
        (to("/api/chat").bearer(&house.token()).header("content-encoding", "gzip"), 415, "unsupported_encoding"),
        (to("/api/pull").bearer(&house.token()), 403, "insufficient_scope"),
        (Request { method: "GET".into(), ..to("/api/tags") }.bearer(&house.token()), 400, "bad_framing"),
    ];
    for (request, status, code) in refusals.iter().chain(&refusals) {
        let mut connection = Connection::open(house.public).await;
        connection.write(&request.head_bytes()).await;
        connection.write(&request.body_bytes()).await; // fails the test if it cannot be written to its end
        let reply = connection.reply(false).await.expect("an answer");
        assert_eq!((reply.status, reply.code().as_str()), (*status, *code));
        assert_eq!(reply.header("connection"), Some("close"), "{code}");
        assert!(connection.reply(false).await.is_none(), "{code}: nothing behind it");
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn an_upload_that_the_policy_denies_can_be_sent_to_its_end_and_the_reason_read() {
    let policy = "package behavry.authz\ndeny contains \"not this one\" if input.model == \"tiny\"\nallow := true\n";
    let house = House::with(Plan { policy: vec![("p.rego", policy.into())], ..Plan::default() }).await;
    let mut connection = Connection::open(house.public).await;
    for chunked in [None, Some(50_000)] {
        let mut request = chat(&house, body_of(20 * MIB));
        request.chunked = chunked;
        connection.write(&request.head_bytes()).await;
        connection.write(&request.body_bytes()).await;
        let reply = connection.reply(false).await.expect("an answer, and the connection kept");
        assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()));
        assert!(reply.text().contains("not this one"));
    }
    let mut h2 = H2::open(house.public).await;
    let reply = h2.send(&chat(&house, body_of(MIB))).await;
    assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()));
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_refused_upload_over_http_2_is_answered_before_its_end() {
    let house = House::open().await;
    let mut h2 = H2::open(house.public).await;
    for _ in 0..5 {
        let request = Request::new("POST", "/api/chat").body(vec![b' '; 1]);
        let h2_client::Asked { reply, body } = h2.ask(&request, Some(20 * MIB)).await; // the body stays open
        let reply = h2_client::read(reply).await;
        assert_eq!((reply.status, reply.code()), (401, "missing_token".to_owned()));
        drop(body);
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_client_that_leaves_during_its_upload_is_recorded_as_gone_and_no_backend_is_contacted() {
    let house = House::open().await;
    for (id, chunked) in [("left-1", None), ("left-2", Some(1_000))] {
        let mut request = chat(&house, body_of(500_000)).id(id);
        request.chunked = chunked;
        let mut connection = Connection::open(house.public).await;
        connection.write(&request.head_bytes()).await;
        connection.write(&request.body_bytes()[..100_000]).await;
        drop(connection);
        assert_eq!(house.final_of(id).await["extra"]["outcome"], "client_abort", "{id}");
    }
    let request = chat(&house, body_of(500_000)).id("left-3");
    let mut h2 = H2::open(house.public).await;
    let mut asked = h2.ask(&request, Some(500_000)).await;
    h2_client::write_some(&mut asked.body, vec![b' '; 200_000].into()).await; // more than fits before the proxy reads
    drop(asked);
    drop(h2);
    assert_eq!(house.final_of("left-3").await["extra"]["outcome"], "client_abort");
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_body_where_none_belongs_is_refused_and_the_connection_closed() {
    let house = House::open().await;
    for path in ["/", "/api/tags", "/api/version", "/api/ps", "/v1/models", "/v1/models/tiny"] {
        for chunked in [None, Some(4)] {
            let mut request = Request::get(path).bearer(&house.token()).body("GET / HTTP/1.1\r\n\r\n");
            request.chunked = chunked;
            let mut connection = Connection::open(house.public).await;
            connection.send(&request).await;
            let reply = connection.reply(false).await.expect("an answer");
            assert_eq!((reply.status, reply.code()), (400, "bad_framing".to_owned()), "{path}");
            assert!(connection.reply(false).await.is_none(), "{path}: the body is not taken for a request");
        }
        let empty = Request::get(path).bearer(&house.token()).body("");
        assert_eq!(house.send(empty).await.status, 200, "{path}: a body of no bytes is none");
    }
}

#[tokio::test]
async fn an_encoded_body_is_refused_and_identity_is_not() {
    let house = House::open().await;
    for encoding in ["gzip", "br", "deflate", "zstd", "x-unknown", "gzip, identity", "identity, gzip"] {
        let reply = house.send(chat(&house, body_of(100)).header("content-encoding", encoding)).await;
        assert_eq!((reply.status, reply.code()), (415, "unsupported_encoding".to_owned()), "{encoding}");
    }
    assert_eq!(house.simulator.connections(), 0);
    let reply = house.send(chat(&house, body_of(100)).header("content-encoding", "identity")).await;
    assert_eq!(reply.status, 200);
    assert_eq!(only(house.simulator.seen()).header("content-encoding"), None);
}

// ---- bodies that pass as they come

fn admin(house: &House) -> String {
    house.token_with(&[], &["web:read", "web:write", "ollama:admin"])
}

fn blob(house: &House, bytes: &[u8]) -> Request {
    let digest: String = sha256(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Request::new("POST", &format!("/api/blobs/sha256:{digest}")).bearer(&admin(house)).body(bytes.to_vec())
}

fn noise(size: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..size).map(|_| next()).collect()
}

#[tokio::test]
async fn a_blob_passes_as_it_comes_with_both_framings_and_is_not_held() {
    // Far more than may be held.
    let house = House::with(limits("body_bytes = 1000\nbodies_in_memory_bytes = 1000")).await;
    for (number, size) in [1, 65_537, 12 * MIB].into_iter().enumerate() {
        let bytes = noise(size);
        for chunked in [None, Some(30_000)] {
            house.simulator.forget();
            let mut request = blob(&house, &bytes).header("content-type", "application/octet-stream");
            request.chunked = chunked;
            if number == 2 {
                request = request.header("expect", "100-continue");
            }
            let reply = house.send(request.clone()).await;
            assert!(matches!(reply.status, 200 | 201), "{size}: {}", reply.status);
            let seen = only(house.simulator.seen());
            assert_eq!((seen.body_bytes, seen.body_whole), (size as u64, true));
            assert_eq!(seen.body_sha256, sha256(&bytes));
            assert_eq!(seen.header("transfer-encoding").is_some(), chunked.is_some(), "the client's framing");
            assert_eq!(seen.header("content-length").is_some(), chunked.is_none(), "the client's framing");
        }
        let head = Request { method: "HEAD".into(), body: None, ..blob(&house, &bytes) };
        assert_eq!(house.send(head).await.status, 200, "it is there now");
    }
}

#[tokio::test]
async fn a_blob_passes_over_http_2_and_the_next_request_over_the_same_connections() {
    let house = House::open().await;
    let mut h2 = H2::open(house.public).await;
    for declared in [true, false] {
        house.simulator.forget();
        let bytes = noise(3 * MIB + usize::from(declared));
        let mut request = blob(&house, &bytes);
        request.chunked = (!declared).then_some(1);
        let reply = h2.send(&request).await;
        assert!(matches!(reply.status, 200 | 201), "{}", reply.status);
        let seen = only(house.simulator.seen());
        assert_eq!((seen.body_sha256, seen.body_whole), (sha256(&bytes), true));
        let framings = usize::from(seen.header("content-length").is_some())
            + usize::from(seen.header("transfer-encoding").is_some());
        assert_eq!(framings, 1);
        let body = body_of(70_000);
        assert_eq!(h2.send(&chat(&house, body.clone())).await.status, 200);
        assert_arrived(&house.simulator.seen()[1], &body, "after the blob");
    }
}

#[tokio::test]
async fn a_blob_has_a_limit_of_its_own() {
    let house = House::with(limits("blob_bytes = 100000")).await;
    let reply = house.send(blob(&house, &noise(100_001))).await;
    assert_eq!((reply.status, reply.code()), (413, "body_too_large".to_owned()));
    assert_eq!(house.simulator.connections(), 0, "by its length, before a backend is contacted");

    let reply = house.send(blob(&house, &noise(400_000)).chunked(20_000).id("long-blob")).await;
    assert_eq!((reply.status, reply.code()), (413, "body_too_large".to_owned()));
    assert_eq!(house.final_of("long-blob").await["error"], "body_too_large");
    let cut = house.simulator.wait_for(PATIENCE, |seen| seen.iter().all(|seen| seen.ended.is_some())).await;
    // None at all, if it was over before the backend had read the head.
    for seen in cut.expect("the backend's request ended") {
        assert!(!seen.body_whole, "the backend must not take it for a whole blob");
        assert!(seen.body_bytes <= 100_000);
    }

    let reply = house.send(blob(&house, &noise(100_000)).chunked(20_000)).await;
    assert!(matches!(reply.status, 200 | 201), "up to the limit it passes");
}

#[tokio::test]
async fn a_blob_whose_client_leaves_is_not_whole_at_the_backend() {
    let house = House::open().await;
    for chunked in [None, Some(10_000)] {
        house.simulator.forget();
        let mut request = blob(&house, &noise(2 * MIB));
        request.chunked = chunked;
        let id = format!("blob-left-{}", chunked.is_some());
        let request = request.id(&id);
        let mut connection = Connection::open(house.public).await;
        connection.write(&request.head_bytes()).await;
        connection.write(&request.body_bytes()[..MIB]).await;
        house.simulator.wait_for(PATIENCE, |seen| !seen.is_empty()).await.expect("it has begun");
        drop(connection);
        let ended = house.simulator.wait_for(PATIENCE, |seen| seen.iter().all(|seen| seen.ended.is_some())).await;
        let seen = only(ended.expect("the backend's request ended"));
        assert!(!seen.body_whole);
        assert_eq!(house.final_of(&id).await["extra"]["outcome"], "client_abort");
    }
}

#[tokio::test]
async fn a_blob_needs_the_managers_permission() {
    let house = House::open().await;
    let mut request = blob(&house, &noise(1_000));
    request.headers.retain(|(name, _)| name != "authorization");
    let reply = house.send(request.bearer(&house.token())).await;
    assert_eq!((reply.status, reply.code()), (403, "insufficient_scope".to_owned()));
    assert_eq!(house.simulator.connections(), 0);
}

fn limits(lines: &str) -> Plan {
    Plan { config: format!("[limits]\n{lines}\n"), ..Plan::default() }
}

/// The log is read while the program writes, so what was logged last may come a moment later.
#[tokio::test]
async fn no_upload_shows_in_what_the_program_prints() {
    let house =
        House::with(Plan { env: vec![("RUST_LOG".into(), "trace".into())], ..limits("body_bytes = 200000") }).await;
    let canary = "canary-4711";
    let body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": canary }] }).to_string();
    house.send(chat(&house, body.clone().into_bytes()).id("seen")).await;
    house.send(chat(&house, format!("{body}{}", " ".repeat(300_000)).into_bytes())).await;
    let request = chat(&house, body.clone().into_bytes()).header("transfer-encoding", "chunked");
    house.send(request).await;
    let broken = chat(&house, Vec::new()).header("x-canary", canary).header("transfer-encoding", "chunked");
    let mut bytes = String::from_utf8(broken.head_bytes()).expect("ASCII").replace("content-length: 0\r\n", "");
    bytes.push_str(&format!("{canary}\r\n"));
    let mut connection = Connection::open(house.public).await;
    connection.write(bytes.as_bytes()).await;
    assert_eq!(connection.reply(false).await.expect("an answer").status, 400);
    house.records_of("seen").await;
    wait_until("something in the log", || (!house.log().is_empty()).then_some(())).await;
    assert!(!house.log().contains(canary));
    assert!(!house.audit_text().contains(canary));
}
