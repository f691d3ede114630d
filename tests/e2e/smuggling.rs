//! Raw bytes that two HTTP parsers could read differently: refused, with the connection closed, and nothing of them reaches a
//! backend. What is accepted makes exactly one clean request there (promises I1 and I10).

use behavry_ollama_proxy::simulator::Seen;
use bytes::Bytes;

use crate::client::{Connection, Reply, Request};
use crate::h2_client::{self, H2};
use crate::house::House;

/// A body that Ollama would answer.
const CHAT: &str = r#"{"model":"tiny","stream":false}"#;

/// What a smuggler wants to be taken for a request of its own.
const HIDDEN: &str = "GET /api/tags HTTP/1.1\r\nHost: hidden\r\n\r\n";

/// Every request of the raw bytes is answered, and the connection then ends. The replies.
async fn all_replies(house: &House, bytes: &[u8]) -> Vec<Reply> {
    let mut connection = Connection::open(house.public).await;
    connection.write(bytes).await;
    let mut replies = Vec::new();
    while let Some(reply) = connection.reply(false).await {
        assert!(replies.len() < 9, "no end of replies");
        replies.push(reply);
    }
    assert!(connection.unread.is_empty(), "nothing but replies");
    replies
}

/// The bytes get one refusal, and the connection is closed behind it.
async fn assert_refused(house: &House, status: u16, bytes: &[u8]) {
    let shown = String::from_utf8_lossy(bytes);
    let shown: Vec<&str> = shown.split("\r\n").filter(|line| !line.contains("Bearer")).collect();
    let mut connection = Connection::open(house.public).await;
    connection.write(bytes).await;
    let reply = connection.reply(false).await.unwrap_or_else(|| panic!("no answer: {shown:?}"));
    assert_eq!(reply.status, status, "{shown:?}");
    assert_eq!(reply.header("connection").map(str::to_ascii_lowercase).as_deref(), Some("close"), "{shown:?}");
    if status == 400 {
        assert_eq!(reply.code(), "bad_framing", "{shown:?}");
    }
    assert!(connection.reply(false).await.is_none(), "closed behind it: {shown:?}");
    assert!(connection.unread.is_empty(), "nothing behind it: {shown:?}");
}

/// A request line and headers with a good token; `{}` of the template is replaced.
fn head(house: &House, request_line: &str, headers: &str) -> String {
    format!("{request_line}\r\nHost: proxy\r\nAuthorization: Bearer {}\r\n{headers}\r\n", house.token())
}

fn post(house: &House, headers: &str, body: &str) -> Vec<u8> {
    (head(house, "POST /api/chat HTTP/1.1", headers) + body).into_bytes()
}

fn chunked(body: &str) -> String {
    format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len())
}

/// One clean request: its bytes, read by another parser, are one whole head with one host, one length, and only headers that may
/// pass.
fn assert_clean(house: &House, seen: &Seen) {
    let mut storage = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut storage);
    let length = parsed.parse(&seen.raw_head).expect("a head");
    assert_eq!(length, httparse::Status::Complete(seen.raw_head.len()), "a head and nothing else");
    assert_eq!(parsed.version, Some(1));
    assert!(parsed.path.is_some_and(|path| path.starts_with('/')), "origin form");
    assert!(seen.raw_head.split(|byte| *byte == b'\n').all(|line| line.is_empty() || line.ends_with(b"\r")));
    const ALLOWED: [&str; 14] = [
        "accept",
        "accept-encoding",
        "anthropic-beta",
        "anthropic-version",
        "connection",
        "content-length",
        "content-type",
        "host",
        "traceparent",
        "tracestate",
        "transfer-encoding",
        "user-agent",
        "x-request-id",
        "authorization",
    ];
    let names: Vec<String> = parsed.headers.iter().map(|header| header.name.to_ascii_lowercase()).collect();
    for name in &names {
        assert!(ALLOWED[..13].contains(&name.as_str()), "{name} may not pass");
        assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{name} once");
    }
    let backend = house.simulator.addr().to_string();
    assert_eq!(seen.header("host"), Some(backend.as_str()));
    assert!(!(names.contains(&"content-length".into()) && names.contains(&"transfer-encoding".into())), "one framing");
    assert_eq!(seen.header("connection").unwrap_or("keep-alive"), "keep-alive");
    assert!(seen.body_whole);
}

#[tokio::test]
async fn two_lengths_are_refused_whatever_they_say() {
    let house = House::open().await;
    let cl = format!("Content-Length: {}\r\n", CHAT.len());
    let te = "Transfer-Encoding: chunked\r\n";
    for headers in [
        format!("{cl}{te}"),
        format!("{te}{cl}"),
        format!("{cl}{cl}"),
        format!("{cl}Content-Length: 0\r\n"),
        format!("{te}{te}"),
        format!("{cl}Transfer-Encoding: identity\r\n"),
        format!("{cl}Transfer-Encoding:\r\n"),
        format!("Content-Length: {0}, {0}\r\n", CHAT.len()),
    ] {
        assert_refused(&house, 400, &post(&house, &headers, CHAT)).await;
        assert_refused(&house, 400, &post(&house, &headers, &(chunked(CHAT) + HIDDEN))).await;
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_length_that_is_no_plain_number_is_refused() {
    let house = House::open().await;
    for length in [
        "+31",
        "-1",
        "0x1f",
        "31.0",
        "31a",
        "",
        " ",
        "3 1",
        "31,",
        "31;",
        "1e1",
        "99999999999999999999",
        "３１",
        "\"31\"",
    ] {
        assert_refused(&house, 400, &post(&house, &format!("Content-Length: {length}\r\n"), CHAT)).await;
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_transfer_encoding_other_than_chunked_is_refused() {
    let house = House::open().await;
    for encoding in [
        "gzip, chunked",
        "chunked, gzip",
        "chunked, chunked",
        "chunked;q=1",
        "xchunked",
        "chunked x",
        "\"chunked\"",
        "identity",
        "gzip",
        "",
        "chunked,",
        ",chunked",
        "chunk\tked",
        "x chunked",
    ] {
        assert_refused(&house, 400, &post(&house, &format!("Transfer-Encoding: {encoding}\r\n"), &chunked(CHAT))).await;
    }
    for headers in [
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding\t: chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "X: y\r\n Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding:\r\n chunked\r\n",
        "Transfer-Encoding: chunked\r\n\tgzip\r\n",
        "X: y\nTransfer-Encoding: chunked\r\n",
        "X: y\rTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\n\r\n",
        "Transfer-Encoding: \x0bchunked\r\n",
        "Transfer-Encoding: chunked\0\r\n",
        "Transfer-Encoding\0: chunked\r\n",
        ": chunked\r\n",
        "Transfer-Encoding chunked\r\n",
        "Transfer\u{2d}Encoding\u{a0}: chunked\r\n",
    ] {
        assert_refused(&house, 400, &post(&house, headers, &chunked(CHAT))).await;
    }
    let old = head(&house, "POST /api/chat HTTP/1.0", "Transfer-Encoding: chunked\r\n") + &chunked(CHAT);
    assert_refused(&house, 400, old.as_bytes()).await;
    // A name that only looks like it is another header, and then there is no body at all: what follows is judged for itself.
    let replies = all_replies(&house, &post(&house, "Transfer_Encoding: chunked\r\n", &chunked(CHAT))).await;
    assert!(replies.iter().all(|reply| reply.status == 400), "no body, and then no request");
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn heads_with_odd_line_ends_spaces_or_controls_are_refused() {
    let house = House::open().await;
    let token = house.token();
    let auth = format!("Authorization: Bearer {token}");
    for text in [
        format!("GET /api/tags HTTP/1.1\nHost: proxy\n{auth}\n\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\n{auth}\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\n\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\rHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\nX: a\rb\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\nX: a\0b\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\nX: a\x7fb\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\nX: a\x1b[31m\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\nX: folded\r\n {auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\n Host: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost : proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\n{auth}\r\nno colon\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n(x): y\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1\r\nHost: proxy\r\n{auth}\r\nna me: y\r\n\r\n"),
        format!("GET  /api/tags HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags  HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1 \r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!(" GET /api/tags HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET\t/api/tags\tHTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.2\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/0.9\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/2.0\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags http/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags HTTP/1.1x\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("G@T /api/tags HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags#x HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api\\tags HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags?a=\"b\" HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/t\u{e4}gs HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/tags\0 HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
    ] {
        assert_refused(&house, 400, text.as_bytes()).await;
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn hosts_that_are_missing_repeated_or_disagree_are_refused() {
    let house = House::open().await;
    let auth = format!("Authorization: Bearer {}", house.token());
    for text in [
        format!("GET /api/version HTTP/1.1\r\n{auth}\r\n\r\n"),
        format!("GET /api/version HTTP/1.1\r\nHost: proxy\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/version HTTP/1.1\r\nHost: proxy\r\nhost: other\r\n{auth}\r\n\r\n"),
        format!("GET /api/version HTTP/1.0\r\nHost: proxy\r\nHost: other\r\n{auth}\r\n\r\n"),
        format!("GET http://other/api/version HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET http://proxy:1/api/version HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET http://user@proxy/api/version HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET http://proxy@other/api/version HTTP/1.1\r\nHost: proxy@other\r\n{auth}\r\n\r\n"),
        format!("GET http:///api/version HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET http:/api/version HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET gopher://proxy/api/version HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET file:///api/version HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET api/version HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET proxy HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET proxy:80 HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET ?a HTTP/1.1\r\nHost: proxy\r\n{auth}\r\n\r\n"),
        format!("GET /api/version HTTP/1.1\r\nHost: pro xy\r\n{auth}\r\n\r\n"),
        format!("GET /api/version HTTP/1.1\r\nHost: proxy/evil\r\n{auth}\r\n\r\n"),
        format!("GET /api/version HTTP/1.1\r\nHost: a@b\r\n{auth}\r\n\r\n"),
        format!("GET /api/version HTTP/1.1\r\nHost: a,b\r\n{auth}\r\n\r\n"),
    ] {
        assert_refused(&house, 400, text.as_bytes()).await;
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn an_absolute_target_reaches_the_backend_in_origin_form_with_the_backends_host() {
    let house = House::open().await;
    for target in ["http://proxy/api/version", "http://proxy/api/v1/ollama/api/version", "HTTP://proxy/api/version?x=1"]
    {
        house.simulator.forget();
        let text = head(&house, &format!("GET {target} HTTP/1.1"), "Connection: close\r\n");
        let replies = all_replies(&house, text.as_bytes()).await;
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].status, 200, "{target}");
        let seen = house.simulator.seen();
        assert_eq!(seen.len(), 1);
        assert_eq!(
            seen[0].target,
            target.replacen("HTTP", "http", 1)["http://proxy".len()..].replace("/api/v1/ollama", "")
        );
        assert_clean(&house, &seen[0]);
    }
}

#[tokio::test]
async fn chunk_lines_that_two_parsers_could_read_differently_are_refused() {
    let house = House::open().await;
    let te = "Transfer-Encoding: chunked\r\n";
    let size = format!("{:x}", CHAT.len());
    let bodies = [
        // line ends
        format!("{size}\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size}\r\n{CHAT}\n0\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\n\n"),
        format!("{size}\r{CHAT}\r\n0\r\n\r\n"),
        format!("{size}\r\n{CHAT}0\r\n\r\n"),
        format!("{size}\r\n{CHAT}xx0\r\n\r\n"),
        // extensions: a line end in one is another line to another parser
        format!("{size};a\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size};a=\"\n\"\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size};a\rb\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size};\0\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0;a\nb\r\n\r\n"),
        // sizes
        format!("\r\n{CHAT}\r\n0\r\n\r\n"),
        format!(";a\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n;x\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n \r\n\r\n"),
        format!("0x{size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("+{size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("-{size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!(" {size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size} \r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size} 1\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size}_\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size}g\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("1{size:0>16}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size:0>40}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("ffffffffffffffff\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("fffffffffffffffe\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("7fffffffffffffff{}\r\n{CHAT}\r\n0\r\n\r\n", "f"),
        "not a size\r\n\r\n".to_owned(),
        // trailers
        format!("{size}\r\n{CHAT}\r\n0\r\nX: y\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\nX: a\rb\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\nX: a\0b\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\nno colon\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\n folded: x\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\nX : y\r\n\r\n"),
    ];
    for body in &bodies {
        assert_refused(&house, 400, &post(&house, te, &(body.clone() + HIDDEN))).await;
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_chunk_line_is_judged_however_it_is_cut_into_reads() {
    let house = House::open().await;
    let size = format!("{:x}", CHAT.len());
    for bad in [format!("{size};a\n\r\n{CHAT}\r\n0\r\n\r\n"), format!("{size}\r\n{CHAT}\r\n;\r\n\r\n")] {
        let mut connection = Connection::open(house.public).await;
        connection.write(head(&house, "POST /api/chat HTTP/1.1", "Transfer-Encoding: chunked\r\n").as_bytes()).await;
        for byte in bad.as_bytes() {
            if connection.stream.try_write(&[*byte]).is_err() {
                break; // it may be refused already
            }
            tokio::task::yield_now().await;
        }
        let reply = connection.reply(false).await.expect("an answer");
        assert_eq!((reply.status, reply.code()), (400, "bad_framing".to_owned()), "{bad:?}");
        assert!(connection.reply(false).await.is_none());
    }
    assert_eq!(house.simulator.connections(), 0);
}

/// The first read may bring a chunk's size and none of its data: that is no empty body.
#[tokio::test]
async fn honest_chunks_pass_however_they_are_cut_into_reads() {
    let house = House::open().await;
    let head = head(&house, "POST /api/chat HTTP/1.1", "Transfer-Encoding: chunked\r\n");
    let size = format!("{:x}\r\n", CHAT.len());
    for round in 0..20 {
        let mut connection = Connection::open(house.public).await;
        connection.write(format!("{head}{size}").as_bytes()).await;
        for piece in format!("{CHAT}\r\n0\r\n\r\n").as_bytes().chunks(round + 1) {
            tokio::task::yield_now().await;
            connection.write(piece).await;
        }
        assert_eq!(connection.reply(false).await.expect("an answer").status, 200, "round {round}");
    }
    assert!(house.simulator.seen().iter().all(|seen| seen.body == CHAT.as_bytes()));
}

#[tokio::test]
async fn honest_chunks_pass_with_extensions_trailers_and_sizes_of_either_case() {
    let house = House::open().await;
    let size = CHAT.len();
    for body in [
        chunked(CHAT),
        format!("{size:X}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size:08x}\r\n{CHAT}\r\n000\r\n\r\n"),
        format!("{size:x};name=value;other=\"quoted words\"\r\n{CHAT}\r\n0;last\r\n\r\n"),
        format!("{size:x}\r\n{CHAT}\r\n0\r\nX-Checksum: 1\r\nX-More: 2\r\n\r\n"),
        format!("5\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n", &CHAT[..5], size - 5, &CHAT[5..]),
    ] {
        house.simulator.forget();
        let mut connection = Connection::open(house.public).await;
        for _ in 0..2 {
            connection.write(&post(&house, "Transfer-Encoding: Chunked\r\n", &body)).await;
            assert_eq!(connection.reply(false).await.expect("the connection is kept").status, 200, "{body:?}");
        }
        let seen = house.simulator.seen();
        assert_eq!(seen.len(), 2);
        for seen in &seen {
            assert_eq!(seen.body, CHAT.as_bytes());
            assert_eq!(seen.header("x-checksum"), None);
            assert_clean(&house, seen);
        }
    }
}

#[tokio::test]
async fn a_request_hidden_in_a_body_is_a_body() {
    let house = House::open().await;
    let hidden = HIDDEN.replace('\r', "\\r").replace('\n', "\\n");
    let body = format!(r#"{{"model":"tiny","stream":false,"messages":[{{"role":"user","content":"{hidden}"}}]}}"#);
    let raw_inside = format!("{CHAT}\r\n\r\n{}", " ".repeat(100)); // blank lines in the body, not of a head
    for body in [&body, &raw_inside] {
        for framed in [
            post(&house, &format!("Content-Length: {}\r\n", body.len()), body),
            post(&house, "Transfer-Encoding: chunked\r\n", &chunked(body)),
        ] {
            house.simulator.forget();
            let mut connection = Connection::open(house.public).await;
            connection.write(&framed).await;
            assert_eq!(connection.reply(false).await.expect("a reply").status, 200);
            let seen = house.simulator.seen();
            assert_eq!(seen.len(), 1);
            assert_eq!(seen[0].body, body.as_bytes());
            assert_clean(&house, &seen[0]);
        }
    }
}

#[tokio::test]
async fn what_follows_a_body_is_a_request_of_its_own_and_needs_a_token_of_its_own() {
    let house = House::open().await;
    for framed in [
        post(&house, &format!("Content-Length: {}\r\n", CHAT.len()), CHAT),
        post(&house, "Transfer-Encoding: chunked\r\n", &chunked(CHAT)),
    ] {
        house.simulator.forget();
        let bytes = [&framed[..], HIDDEN.as_bytes(), b"garbage\r\n\r\n"].concat();
        let replies = all_replies(&house, &bytes).await;
        let statuses: Vec<u16> = replies.iter().map(|reply| reply.status).collect();
        assert_eq!(statuses, [200, 401, 400]);
        let seen = house.simulator.seen();
        assert_eq!(seen.len(), 1, "nothing but the first reached the backend");
        assert_clean(&house, &seen[0]);
    }
    // A length that is short leaves a rest, which is no request.
    let short = post(&house, &format!("Content-Length: {}\r\n", CHAT.len() - 1), CHAT);
    let replies = all_replies(&house, &[&short[..], b"\r\n\r\n"].concat()).await;
    assert_eq!(replies.iter().map(|reply| reply.status).collect::<Vec<_>>(), [400, 400]);
}

#[tokio::test]
async fn a_body_on_get_is_not_taken_for_a_request() {
    let house = House::open().await;
    let cl = head(&house, "GET /api/version HTTP/1.1", &format!("Content-Length: {}\r\n", HIDDEN.len())) + HIDDEN;
    let te = head(&house, "GET /api/version HTTP/1.1", "Transfer-Encoding: chunked\r\n") + &chunked(HIDDEN);
    for text in [cl, te] {
        assert_refused(&house, 400, text.as_bytes()).await;
    }
    assert_eq!(house.simulator.connections(), 0);
}

/// h2 needs no header for a body, so what the backend is sent must not depend on one.
#[tokio::test]
async fn over_http_2_a_body_where_none_belongs_is_refused() {
    let house = House::open().await;
    for path in ["/api/version", "/", "/v1/models/tiny", "/api/tags", "/api/ps"] {
        let mut h2 = H2::open(house.public).await;
        let mut request = Request::get(path).bearer(&house.token()).body(HIDDEN);
        for declared in [None, Some(4)] {
            request.chunked = declared;
            let reply = h2.send(&request).await;
            assert_eq!((reply.status, reply.code()), (400, "bad_framing".to_owned()), "{path}");
        }
    }
    assert_eq!(house.simulator.connections(), 0);
}

/// An empty frame would be written as a chunk of no bytes, which is the last one.
#[tokio::test]
async fn over_http_2_empty_frames_do_not_end_a_body_that_goes_on() {
    use sha2::Digest;
    let house = House::open().await;
    let token = house.token_with(&[], &["web:read", "web:write", "ollama:admin"]);
    let body = format!("0\r\n\r\n{HIDDEN}").repeat(20);
    let digest: String = sha2::Sha256::digest(body.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    let uses = [(format!("/api/blobs/sha256:{digest}"), body.as_str(), 201), ("/api/chat".to_owned(), CHAT, 200)];
    for (path, body, status) in uses {
        house.simulator.forget();
        let mut h2 = H2::open(house.public).await;
        let request = Request::new("POST", &path).bearer(&token).body(body);
        let h2_client::Asked { reply, body: mut writer } = h2.ask(&request, None).await;
        for part in body.as_bytes().chunks(97) {
            writer.send_data(Bytes::new(), false).expect("sent");
            h2_client::write_some(&mut writer, Bytes::copy_from_slice(part)).await;
            writer.send_data(Bytes::new(), false).expect("sent");
            tokio::task::yield_now().await;
        }
        h2_client::write(&mut writer, Bytes::new()).await;
        assert_eq!(h2_client::read(reply).await.status, status, "{path}");
        let next = h2.send(&Request::get("/api/version").bearer(&token)).await;
        assert_eq!(next.status, 200, "the backend's connection is clean");
        let seen = house.simulator.seen();
        assert_eq!(seen.len(), 2, "{path}: {seen:?}");
        assert_eq!(seen[0].body_bytes, body.len() as u64);
        for seen in &seen {
            assert_clean(&house, seen);
        }
    }
}

#[tokio::test]
async fn over_http_2_hop_by_hop_and_disagreeing_headers_do_not_reach_the_backend() {
    let house = House::open().await;
    let authorization = format!("Bearer {}", house.token());
    let head =
        |uri: &str| http::Request::builder().uri(uri).header("authorization", &authorization).header("x-secret", "1");
    let mut h2 = H2::open(house.public).await;
    let asked = h2.begin(head("http://proxy/api/version").body(()).expect("a head"), true).await;
    assert_eq!(h2_client::read(asked.reply).await.status, 200);
    let seen = house.simulator.seen();
    assert_eq!(seen.len(), 1);
    assert_clean(&house, &seen[0]);
    house.simulator.forget();
    for host in ["other", "proxy:1", "", "a b"] {
        let head = head("http://proxy/api/version").header("host", host);
        let mut h2 = H2::open(house.public).await;
        let asked = h2.begin(head.body(()).expect("a head"), true).await;
        let refused = match asked.reply.await {
            Ok(reply) => reply.status() == 400,
            Err(_) => true, // the stream is reset
        };
        assert!(refused, "{host:?} against the authority");
    }
    assert!(house.simulator.seen().is_empty());
}

#[tokio::test]
async fn only_one_spelling_of_a_path_is_a_route() {
    let house = House::open().await;
    for path in [
        "//api/version",
        "/api//version",
        "/api/version/",
        "/api/./version",
        "/api/../api/version",
        "/api/x/../version",
        "/./api/version",
        "/../api/version",
        "/%61pi/version",
        "/api%2fversion",
        "/api%2Fversion",
        "/api/version%00",
        "/api/version%20",
        "/api/version;",
        "/api/version;a=b",
        "/api/version/..;/version",
        "/API/version",
        "/api/Version",
        "/api/version.",
        "/api/vers%69on",
        "/api/v1/ollama/api/v1/ollama/api/version",
        "/api/v1/ollama//api/version",
        "/api/v1/OLLAMA/api/version",
        "/api/v1/ollama/../../version",
        "/api/v1/ollama%2fapi/version",
        "/api/v1/ollama/%2e%2e/x",
        "/api/v1/ollamaapi/version",
        "/v1/models/..",
        "/v1/models/.",
        "/v1/models/a%2fb",
        "/v1/models/tiny/",
        "/v1/models//tiny",
        "/v1/models/tiny;x",
        "/v1/models/%74iny",
        "/api/%2e%2e/version",
        "/api/version%2e",
        "/api/blobs/sha256:..",
        "/*",
        "*",
        "/api/version%",
        "/api/version%0a",
        "/api/version%0d%0aHost:x",
        "/api/version@",
        "/api/version:80",
    ] {
        let text = head(&house, &format!("GET {path} HTTP/1.1"), "");
        let mut connection = Connection::open(house.public).await;
        connection.write(text.as_bytes()).await;
        let reply = connection.reply(false).await.expect("an answer");
        assert!(matches!(reply.status, 400 | 404), "{path}: {}", reply.status);
        if reply.status == 404 {
            assert_eq!(reply.code(), "unknown_route", "{path}");
        }
    }
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn queries_pass_as_they_are_and_broken_ones_are_refused() {
    let house = House::open().await;
    for query in ["a=b", "a=b&a=c", "a[]=1", "x=%41%2f..%2f", "a=//..;?x", "", "a=%E2%82%AC"] {
        house.simulator.forget();
        let text = head(&house, &format!("GET /api/version?{query} HTTP/1.1"), "Connection: close\r\n");
        assert_eq!(all_replies(&house, text.as_bytes()).await[0].status, 200, "{query}");
        let seen = house.simulator.seen();
        assert_eq!(seen[0].target, format!("/api/version?{query}"));
        assert_clean(&house, &seen[0]);
    }
    house.simulator.forget();
    for query in ["a=%", "a=%4", "a=%zz", "a=b#c", "a=\u{20ac}", "a=<b>", "a=b|c", "a=^"] {
        let text = head(&house, &format!("GET /api/version?{query} HTTP/1.1"), "Connection: close\r\n");
        let replies = all_replies(&house, text.as_bytes()).await;
        assert_eq!(replies[0].code(), "bad_framing", "{query}");
    }
    assert!(house.simulator.seen().is_empty());
}

#[tokio::test]
async fn headers_that_a_client_nominates_or_invents_do_not_reach_the_backend() {
    let house = House::open().await;
    let headers = "Connection: keep-alive, x-secret, content-length\r\nX-Secret: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\n\
        Trailer: x\r\nProxy-Authorization: Basic eDp5\r\nProxy-Connection: keep-alive\r\nX-Forwarded-For: 1.2.3.4\r\n\
        X-Forwarded-Host: evil\r\nForwarded: for=1.2.3.4\r\nX-Original-URL: /api/delete\r\nX-HTTP-Method-Override: DELETE\r\n\
        Origin: http://evil\r\nCookie: a=b\r\nX-Api-Key: \r\nX-Behavry-Agent: root\r\nRange: bytes=0-1\r\nIf-Match: *\r\n\
        Accept-Encoding: gzip\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nUser-Agent: test\r\nAccept: */*\r\n";
    let headers = headers.replace("X-Api-Key: \r\n", "");
    let bytes = post(&house, &format!("{headers}Content-Length: {}\r\n", CHAT.len()), CHAT);
    let mut connection = Connection::open(house.public).await;
    connection.write(&bytes).await;
    assert_eq!(connection.reply(false).await.expect("a reply").status, 200);
    let seen = house.simulator.seen();
    assert_eq!(seen.len(), 1);
    assert_clean(&house, &seen[0]);
    assert_eq!(seen[0].header("accept-encoding"), Some("identity"));
    assert_eq!(seen[0].header("user-agent"), Some("test"));
    assert_eq!(seen[0].body, CHAT.as_bytes());
}

/// The bytes of an attack are counted, since no record can name a request that never was one (promise I16).
#[tokio::test]
async fn what_never_became_a_request_is_counted_by_its_reason() {
    let house = House::open().await;
    assert_refused(&house, 400, b"GET / HTTP/1.1\nHost: a\n\n").await;
    assert_refused(&house, 400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n").await;
    assert_refused(&house, 400, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").await;
    let metrics = house.metrics().await;
    for reason in ["bare_lf", "host"] {
        let counted = metrics.lines().find(|line| line.contains("unparsed") && line.contains(&format!("\"{reason}\"")));
        assert!(counted.is_some_and(|line| line.ends_with(" 1")), "{reason}: {counted:?}");
    }
    assert!(house.records().is_empty());
}
