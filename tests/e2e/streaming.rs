//! Streams pass at once and unchanged, and are counted rightly. What the client sees is held against what the same simulator
//! says to the same request without a proxy between.

use serde_json::{Value, json};

use crate::client::{Connection, End, Reply, Request};
use crate::house::{House, Plan};
use crate::puppet::Puppet;

const CHAT: &str = "application/x-ndjson";
const EVENTS: &str = "text/event-stream";

fn chat(model: &str, more: Value) -> Value {
    with(json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] }), more)
}

fn prompt(model: &str, more: Value) -> Value {
    with(json!({ "model": model, "prompt": "hi" }), more)
}

fn with(mut body: Value, more: Value) -> Value {
    let members = more.as_object().expect("an object").clone();
    body.as_object_mut().expect("an object").extend(members);
    body
}

/// What the simulator says without a proxy between.
async fn direct(house: &House, path: &str, body: &Value) -> Reply {
    Request::post(path, body.clone()).send(house.simulator.addr()).await
}

/// What two answers to one request may differ in: ids, times, durations. Their values become `_`.
fn masked(bytes: &[u8]) -> String {
    let mut text = String::from_utf8_lossy(bytes).into_owned();
    for key in
        ["id", "created_at", "created", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration"]
    {
        let key = format!("\"{key}\":");
        let mut from = 0;
        while let Some(at) = text[from..].find(&key) {
            let value = from + at + key.len();
            let length = text[value..].find([',', '}']).expect("a member ends");
            text.replace_range(value..value + length, "_");
            from = value + 1;
        }
    }
    text
}

fn boundaries(reply: &Reply) -> Vec<usize> {
    let mut at = 0;
    let ends = reply.chunks.iter().map(|chunk| {
        at += masked(chunk).len();
        at
    });
    ends.collect()
}

/// Every kind of stream, as the client asks for it.
fn streams() -> Vec<(&'static str, Value)> {
    let usage = json!({ "stream": true, "stream_options": { "include_usage": true } });
    vec![
        ("/api/chat", chat("tiny-story", json!({}))),
        ("/api/chat", chat("tiny-think", json!({ "stream": true }))),
        ("/api/generate", prompt("tiny-story", json!({}))),
        ("/v1/chat/completions", chat("tiny-story", usage.clone())),
        ("/v1/chat/completions", chat("tiny-story", json!({ "stream": true }))),
        ("/v1/completions", prompt("tiny-story", usage)),
        ("/v1/completions", prompt("tiny-story", json!({ "stream": true }))),
    ]
}

#[tokio::test]
async fn a_stream_has_the_bytes_that_the_backend_sent_in_its_chunks() {
    let house = House::open().await;
    for (path, body) in streams() {
        let direct = direct(&house, path, &body).await;
        let passed = house.post(path, body).await;
        assert_eq!((direct.status, passed.status), (200, 200), "{path}");
        assert_eq!(passed.header("content-type"), direct.header("content-type"), "{path}");
        assert_eq!(passed.end, End::Whole, "{path}");
        assert_eq!(masked(&passed.body), masked(&direct.body), "{path}");
        // Chunks that came together may go on together; none is ever split.
        let direct_ends = boundaries(&direct);
        for end in boundaries(&passed) {
            assert!(direct_ends.contains(&end), "{path}: a chunk that the backend did not make");
        }
    }
}

/// The backend sends the next chunk only when the client has the last one: whatever were held back would hang this test.
#[tokio::test]
async fn every_chunk_is_at_the_client_before_the_next_is_sent() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
    let event =
        |text: &str| format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n");
    let native: Vec<Vec<u8>> = vec![
        b"{\"message\":{\"content\":\"caf\xc3".to_vec(), // within a character
        b"\xa9\"},\"done\":false}\n".to_vec(),
        b"\n".to_vec(),
        b"{\"message\":{\"content\":\"a\"},\"done\":false}\n{\"message\":{\"content\":\"b\"},\"done\":false}\n"
            .to_vec(),
        b"{\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":3,\"eval_count\":2}\n".to_vec(),
    ];
    let asked: Vec<Vec<u8>> = vec![
        event("one").into_bytes(),
        b"data: {\"choices\":[{\"ind".to_vec(), // within an event
        b"ex\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n".to_vec(),
        b": a comment\n\n".to_vec(),
        b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\n".to_vec(),
        b"data: [DONE]\n\n".to_vec(),
    ];
    // For a client that did not ask, whole events pass at once.
    let unasked: Vec<Vec<u8>> =
        vec![event("one").into_bytes(), event("two").into_bytes(), b"data: [DONE]\n\n".to_vec()];
    let usage = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let cases = [
        ("/api/chat", chat("m", json!({})), CHAT, native),
        ("/v1/chat/completions", chat("m", usage), EVENTS, asked),
        ("/v1/chat/completions", chat("m", json!({ "stream": true })), EVENTS, unasked),
    ];
    for (path, body, content_type, chunks) in cases {
        let mut client = Connection::open(house.public).await;
        client.send(&Request::post(path, body).bearer(&house.token()).header("connection", "close")).await;
        let mut backend = puppet.accept().await;
        backend.request().await;
        backend.open_stream(content_type).await;
        let (status, _) = client.head().await.expect("the head comes before the first chunk");
        assert_eq!(status, 200);
        for (number, sent) in chunks.iter().enumerate() {
            backend.chunk(sent).await;
            let got = client.chunk().await.expect("not the end").expect("a chunk");
            assert_eq!(&got, sent, "{path}: chunk {number}");
        }
        backend.say("0\r\n\r\n").await;
        assert!(client.chunk().await.is_none(), "{path}: a clean end");
    }
}

/// The same with the simulator: it falls silent for ever after so many records, and the client has them all.
#[tokio::test]
async fn what_a_stalling_backend_has_sent_is_at_the_client() {
    let house = House::open().await;
    for (path, stream) in [("/api/chat", "api"), ("/v1/chat/completions", "v1")] {
        for records in [1, 2, 7] {
            let model = format!("fault-stalls-mid-stream-{records}");
            let mut client = Connection::open(house.public).await;
            client.send(&Request::post(path, chat(&model, json!({ "stream": true }))).bearer(&house.token())).await;
            assert_eq!(client.head().await.expect("a head").0, 200);
            let mut seen = String::new();
            while seen.matches("\"index\":0").count().max(seen.matches("\"done\":false").count()) < records {
                let chunk = client.chunk().await.expect("not the end").expect("a chunk");
                seen.push_str(&String::from_utf8_lossy(&chunk));
            }
            assert!(!seen.contains("[DONE]") && !seen.contains("\"done\":true"), "{stream}");
        }
    }
}

#[tokio::test]
async fn a_v1_stream_is_asked_for_counts_and_they_are_hidden_from_a_client_that_did_not_ask() {
    let house = House::open().await;
    let no = json!({ "stream": true, "stream_options": { "include_usage": false } });
    let cases = [
        ("/v1/chat/completions", chat("tiny-story", json!({ "stream": true }))),
        ("/v1/completions", prompt("tiny-story", json!({ "stream": true }))),
        ("/v1/chat/completions", chat("tiny-story", json!({ "stream": true, "stream_options": null }))),
        ("/v1/completions", prompt("tiny-story", no)),
    ];
    for (number, (path, body)) in cases.into_iter().enumerate() {
        house.simulator.forget();
        let id = format!("hidden-{number}");
        let passed = house.send(Request::post(path, body.clone()).bearer(&house.token()).id(&id)).await;
        let sent: Value = serde_json::from_slice(&house.simulator.seen()[0].body).expect("JSON");
        assert_eq!(sent["stream_options"]["include_usage"], true, "{path}");
        assert_eq!(
            with(sent, json!({ "stream_options": null })),
            with(body.clone(), json!({ "stream_options": null }))
        );
        let direct = direct(&house, path, &body).await;
        assert!(!direct.text().contains("\"usage\""), "{path}: the simulator was not asked here");
        assert_eq!(masked(&passed.body), masked(&direct.body), "{path}");
        let record = house.final_of(&id).await;
        assert_eq!(record["extra"]["filters"], json!(["include_usage"]), "{path}");
        assert_eq!(record["extra"]["output_tokens"], 17, "{path}");
    }
}

#[tokio::test]
async fn a_client_that_asked_for_counts_gets_them_once_and_its_body_passes_as_it_is() {
    let house = House::open().await;
    let usage = json!({ "stream": true, "stream_options": { "include_usage": true } });
    for (path, body) in
        [("/v1/chat/completions", chat("tiny-story", usage.clone())), ("/v1/completions", prompt("tiny-story", usage))]
    {
        house.simulator.forget();
        // Spelled oddly, so that any rewriting would show.
        let spelled = format!(" {} ", body.to_string().replace(':', " :  "));
        let id = path.replace('/', "");
        let passed = house.send(Request::new("POST", path).bearer(&house.token()).id(&id).body(spelled.clone())).await;
        assert_eq!(house.simulator.seen()[0].body, spelled.as_bytes(), "{path}");
        assert_eq!(passed.text().matches("\"completion_tokens\":17").count(), 1, "{path}");
        let record = house.final_of(&id).await;
        assert_eq!(record["extra"]["filters"], json!([]), "{path}");
        assert_eq!(record["extra"]["output_tokens"], 17, "{path}");
    }
}

#[tokio::test]
async fn without_include_usage_a_body_passes_byte_for_byte_and_the_counts_are_unknown() {
    let house = House::with(Plan { config: "[streaming]\ninclude_usage = false".to_owned(), ..Plan::default() }).await;
    let body = chat("tiny-story", json!({ "stream": true })).to_string().replace(':', " : ");
    let request = Request::new("POST", "/v1/chat/completions").bearer(&house.token()).id("off").body(body.clone());
    let passed = house.send(request).await;
    assert_eq!(house.simulator.seen()[0].body, body.as_bytes());
    assert!(passed.text().ends_with("data: [DONE]\n\n") && !passed.text().contains("\"usage\""));
    let record = house.final_of("off").await;
    assert_eq!(record["extra"]["input_tokens"], Value::Null);
    assert_eq!(record["extra"]["output_tokens"], Value::Null);
    assert_eq!(record["extra"]["finish_reason"], "stop");
    assert_eq!(record["extra"]["outcome"], "complete");
}

#[tokio::test]
async fn the_counts_of_every_endpoint_are_recorded_as_the_backend_told_them() {
    let house = House::open().await;
    let chat_usage =
        |reply: &Value| (reply["usage"]["prompt_tokens"].clone(), reply["usage"]["completion_tokens"].clone());
    // Path, body, the finish reason of the record.
    let cases = [
        ("/api/chat", chat("tiny-story", json!({ "stream": false })), json!("stop")),
        ("/api/chat", chat("tiny-story", json!({ "options": { "num_predict": 4 } })), json!("length")),
        ("/api/generate", prompt("tiny-story", json!({ "stream": false })), json!("stop")),
        ("/api/generate", prompt("tiny-story", json!({ "options": { "num_predict": 4 } })), json!("length")),
        ("/api/embed", json!({ "model": "tiny-embed", "input": ["one", "two"] }), Value::Null),
        ("/api/embeddings", json!({ "model": "tiny-embed", "prompt": "one" }), Value::Null),
        ("/v1/chat/completions", chat("tiny-story", json!({ "max_tokens": 4 })), json!("length")),
        ("/v1/chat/completions", chat("tiny-story", json!({ "stream": true, "max_tokens": 4 })), json!("length")),
        ("/v1/completions", prompt("tiny-story", json!({})), json!("stop")),
        ("/v1/completions", prompt("tiny-story", json!({ "stream": true })), json!("stop")),
        ("/v1/embeddings", json!({ "model": "tiny-embed", "input": "one" }), Value::Null),
    ];
    for (number, (path, body, reason)) in cases.into_iter().enumerate() {
        let id = format!("count-{number}");
        let reply = house.send(Request::post(path, body.clone()).bearer(&house.token()).id(&id)).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{path}");
        // The truth is a direct answer that carries counts in any case.
        let asked = with(body.clone(), json!({ "stream_options": { "include_usage": true } }));
        let body = if path.starts_with("/v1") && body["stream"] == true { asked } else { body };
        let direct = direct(&house, path, &body).await;
        let last = direct.lines().into_iter().rev().find(|line| !line.ends_with("[DONE]")).expect("a line");
        let last: Value = serde_json::from_str(last.trim_start_matches("data: ")).expect("JSON");
        let (input, output) = match path {
            "/api/embeddings" => (Value::Null, Value::Null),
            _ if path.starts_with("/v1") => chat_usage(&last),
            _ => (last["prompt_eval_count"].clone(), last["eval_count"].clone()),
        };
        let record = house.final_of(&id).await;
        assert_eq!(record["extra"]["input_tokens"], input, "{path} {number}");
        assert_eq!(record["extra"]["output_tokens"], output, "{path} {number}");
        assert_eq!(record["extra"]["finish_reason"], reason, "{path} {number}");
        assert_eq!(record["extra"]["outcome"], "complete", "{path} {number}");
        assert_eq!(record["extra"]["bytes_out"], reply.body.len(), "{path} {number}");
        let told = !path.contains("embeddings") || path.starts_with("/v1");
        assert_eq!(input.is_u64(), told, "{path} {number}: the test compares numbers");
    }
}

#[tokio::test]
async fn a_reply_that_is_no_stream_though_one_was_asked_for_passes_as_it_is() {
    let house = House::open().await;
    for (id, path, body) in [
        ("load", "/api/generate", json!({ "model": "tiny-story" })),
        ("load-chat", "/api/chat", json!({ "model": "tiny-story", "messages": [], "stream": true })),
        ("unload", "/api/generate", json!({ "model": "tiny-story", "keep_alive": 0 })),
    ] {
        let direct = direct(&house, path, &body).await;
        let passed = house.send(Request::post(path, body).bearer(&house.token()).id(id)).await;
        assert_eq!(passed.status, 200, "{id}");
        assert_eq!(passed.header("content-type"), Some("application/json; charset=utf-8"), "{id}");
        // Its durations have as many digits as they have; what is announced is what comes.
        assert_eq!(passed.header("content-length"), Some(passed.body.len().to_string().as_str()), "{id}");
        assert_eq!(masked(&passed.body), masked(&direct.body), "{id}");
        let record = house.final_of(id).await;
        assert_eq!(record["extra"]["outcome"], "complete", "{id}");
        assert_eq!(record["extra"]["output_tokens"], Value::Null, "{id}");
    }
}

#[tokio::test]
async fn an_error_before_the_first_record_passes_with_ollamas_status_and_words() {
    let house = House::open().await;
    for (path, body, status) in [
        ("/api/chat", chat("absent", json!({})), 404),
        ("/api/generate", prompt("absent", json!({})), 404),
        ("/api/embed", json!({ "model": "absent", "input": "x" }), 404),
        ("/v1/chat/completions", chat("absent", json!({ "stream": true })), 404),
        ("/v1/completions", prompt("absent", json!({ "stream": true })), 404),
        ("/api/chat", chat("tiny-embed", json!({})), 400),
        ("/api/chat", chat("fault-503-queue-full", json!({})), 503),
        ("/v1/chat/completions", chat("fault-503-queue-full", json!({ "stream": true })), 503),
        ("/api/chat", chat("fault-500-error", json!({})), 500),
        ("/v1/completions", prompt("fault-500-error", json!({ "stream": true })), 500),
    ] {
        let direct = direct(&house, path, &body).await;
        let id = format!("early-{}-{}-{status}", path.replace('/', "."), body["model"].as_str().expect("a name"));
        let passed = house.send(Request::post(path, body).bearer(&house.token()).id(&id)).await;
        assert_eq!((direct.status, passed.status), (status, status), "{id}");
        assert_eq!(passed.header("content-type"), direct.header("content-type"), "{id}");
        assert_eq!(masked(&passed.body), masked(&direct.body), "{id}");
        let record = house.final_of(&id).await;
        assert_eq!(record["response_code"], status, "{id}");
        assert_eq!(record["extra"]["upstream_status"], status, "{id}");
        assert_eq!(record["extra"]["input_tokens"], Value::Null, "{id}");
        let outcome = if status >= 500 { "upstream_error" } else { "complete" };
        assert_eq!(record["extra"]["outcome"], outcome, "{id}");
    }
}

/// 40 ms steps are the classic fault of gateways: small writes that wait for the other side's delayed acknowledgement.
#[tokio::test]
async fn no_socket_of_the_proxy_waits_to_fill_a_packet() {
    let house = House::open().await;
    let mut client = Connection::open(house.public).await;
    let body = chat("fault-stalls-mid-stream-1", json!({}));
    client.send(&Request::post("/api/chat", body).bearer(&house.token())).await;
    client.head().await.expect("a head");
    let own = client.stream.local_addr().expect("an address");
    let Some(sockets) = sockets_of(house.pid()) else {
        eprintln!("skipped: this machine does not let a parent look at its child's sockets (pidfd_getfd)");
        return;
    };
    let (mut to_client, mut to_backend) = (0, 0);
    for (peer, nodelay) in sockets {
        if peer == own || peer == house.simulator.addr() {
            assert!(nodelay, "Nagle's algorithm is on");
            to_client += usize::from(peer == own);
            to_backend += usize::from(peer == house.simulator.addr());
        }
    }
    assert_eq!((to_client, to_backend), (1, 1));
}

/// The peers of a child's TCP connections, and whether each has TCP_NODELAY. `None`: the kernel does not allow it.
fn sockets_of(pid: u32) -> Option<Vec<(std::net::SocketAddr, bool)>> {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    let call = |number, first: i32, second: i32| {
        // SAFETY: both calls take integers only and give a new descriptor or -1.
        let fd = unsafe { libc::syscall(number, first, second, 0) };
        // SAFETY: a descriptor that the kernel has just made is nobody else's.
        i32::try_from(fd).ok().filter(|fd| *fd >= 0).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let process = call(libc::SYS_pidfd_open, pid as i32, 0)?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok())?;
        if !std::fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:")) {
            continue;
        }
        let copy = call(libc::SYS_pidfd_getfd, process.as_raw_fd(), number)?;
        let socket = std::net::TcpStream::from(copy);
        if let (Ok(peer), Ok(nodelay)) = (socket.peer_addr(), socket.nodelay()) {
            found.push((peer, nodelay));
        }
    }
    Some(found)
}
