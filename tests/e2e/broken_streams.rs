//! A reply that fails in its middle: what Ollama swallows on `/v1`, and on its own routes, the client is told. The rows are those
//! of the table "Broken streams", with a backend that says exactly the bytes of each.

use serde_json::{Value, json};

use crate::client::{Connection, End, Reply, Request};
use crate::house::{House, Plan};
use crate::puppet::{Hand, Puppet, Street};

const EVENTS: &str = "text/event-stream";
const LINES: &str = "application/x-ndjson";
const NO_END: &str = "the backend's reply has no end";
const ENDED: &str = "Ollama's reply ended before it was complete. Send the request again.";
const TOLD: &str = "the backend ended its reply with an error";

/// How the backend ends the HTTP message.
#[derive(Clone, Copy)]
enum Ends {
    Cleanly,
    /// With a reset, or the next best thing: without the last chunk.
    Cut,
    /// A stream that has a Content-Length.
    Sized,
}

fn body(path: &str, stream: bool) -> Value {
    let mut body = json!({ "model": "m", "stream": stream });
    match path {
        "/v1/responses" => body["input"] = "hi".into(),
        "/api/generate" | "/v1/completions" => body["prompt"] = "hi".into(),
        _ => body["messages"] = json!([{ "role": "user", "content": "hi" }]),
    }
    if path == "/v1/messages" {
        body["max_tokens"] = 9.into();
    }
    if path.ends_with("completions") && stream {
        body["stream_options"] = json!({ "include_usage": true });
    }
    body
}

async fn streamed(hand: &mut Hand, content_type: &str, bytes: &str, ends: Ends) {
    if let Ends::Sized = ends {
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n", bytes.len());
        return hand.say(head + bytes).await;
    }
    hand.open_stream(content_type).await;
    if !bytes.is_empty() {
        hand.chunk(bytes.as_bytes()).await;
    }
    if let Ends::Cleanly = ends {
        hand.say("0\r\n\r\n").await;
    }
}

impl Street {
    /// What the client gets, and the final record.
    async fn streams(&self, id: &str, path: &str, bytes: &str, ends: Ends) -> (Reply, Value) {
        let content_type = if path.starts_with("/v1") { EVENTS } else { LINES };
        let mut client = Connection::open(self.house.public).await;
        let asked = Request::post(path, body(path, true)).bearer(&self.house.token()).id(id);
        client.send(&asked).await;
        {
            let mut hand = self.puppet.accept().await;
            hand.request().await;
            streamed(&mut hand, content_type, bytes, ends).await;
            if !matches!(ends, Ends::Cut) {
                let reply = client.reply(false).await.expect("a reply");
                return (reply, self.house.final_of(id).await);
            }
        }
        let reply = client.reply(false).await.expect("a reply");
        (reply, self.house.final_of(id).await)
    }

    async fn answers(&self, id: &str, path: &str, bytes: &str) -> (Reply, Value) {
        let mut client = Connection::open(self.house.public).await;
        client.send(&Request::post(path, body(path, false)).bearer(&self.house.token()).id(id)).await;
        let mut hand = self.puppet.accept().await;
        hand.request().await;
        hand.answer("200 OK", bytes).await;
        let reply = client.reply(false).await.expect("a reply");
        (reply, self.house.final_of(id).await)
    }
}

const HEL: &str = "data: {\"id\":\"chatcmpl-42\",\"object\":\"chat.completion.chunk\",\"created\":1787360523,\"model\":\"tiny\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"Hel\"},\"finish_reason\":null}]}\n\n";
const SWALLOWED: &str = "data: {\"id\":\"chatcmpl-42\",\"object\":\"chat.completion.chunk\",\"created\":1787360523,\"model\":\"\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
const FINISH: &str = "data: {\"id\":\"chatcmpl-42\",\"object\":\"chat.completion.chunk\",\"created\":1787360523,\"model\":\"tiny\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
const USAGE: &str = "data: {\"id\":\"chatcmpl-42\",\"object\":\"chat.completion.chunk\",\"created\":1787360523,\"model\":\"tiny\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[],\"usage\":{\"prompt_tokens\":26,\"completion_tokens\":8,\"total_tokens\":34}}\n\n";

fn openai_error(message: &str, code: Value) -> String {
    let message = json!(message);
    format!("data: {{\"error\":{{\"message\":{message},\"type\":\"api_error\",\"param\":null,\"code\":{code}}}}}\n\n")
}

fn responses_error(message: &str, code: Value, number: u64) -> String {
    let message = json!(message);
    format!(
        "event: error\ndata: {{\"type\":\"error\",\"code\":{code},\"message\":{message},\"param\":null,\"error\":{{\"message\":{message},\"type\":\"api_error\",\"param\":null,\"code\":{code}}},\"sequence_number\":{number}}}\n\n"
    )
}

#[tokio::test]
async fn a_clean_end_without_the_dialects_own_is_followed_by_its_error_event() {
    let street = Street::open().await;
    let code = || json!("bad_backend_reply");
    let response = "event: response.created\ndata: {\"response\":{\"status\":\"in_progress\"},\"sequence_number\":0,\"type\":\"response.created\"}\n\nevent: response.output_text.delta\ndata: {\"delta\":\"two \",\"sequence_number\":1,\"type\":\"response.output_text.delta\"}\n\n";
    let message = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"four \"}}\n\n";
    let anthropic = format!(
        "event: error\ndata: {{\"type\":\"error\",\"error\":{{\"type\":\"api_error\",\"message\":\"{ENDED}\"}}}}\n\n"
    );
    let line = "{\"model\":\"m\",\"message\":{\"role\":\"assistant\",\"content\":\"same \"},\"done\":false}\n";
    let native = format!("{{\"error\":\"{ENDED}\"}}\n");
    let swallowed = format!("{HEL}{SWALLOWED}");
    let rows = [
        ("chat", "/v1/chat/completions", swallowed.as_str(), openai_error(ENDED, code())),
        ("chat-empty", "/v1/chat/completions", "", openai_error(ENDED, code())),
        (
            "text",
            "/v1/completions",
            "data: {\"choices\":[{\"text\":\"\",\"index\":0,\"finish_reason\":null}],\"model\":\"\"}\n\n",
            openai_error(ENDED, code()),
        ),
        ("responses", "/v1/responses", response, responses_error(ENDED, code(), 2)),
        ("messages", "/v1/messages", message, anthropic.clone()),
        ("messages-empty", "/v1/messages", "", anthropic),
        ("native", "/api/chat", line, native.clone()),
        ("generate", "/api/generate", "{\"model\":\"m\",\"response\":\"same \",\"done\":false}\n", native),
    ];
    for (id, path, sent, words) in rows {
        let (reply, record) = street.streams(id, path, sent, Ends::Cleanly).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        assert_eq!(reply.text(), format!("{sent}{words}"), "{id}");
        assert_eq!(record["extra"]["outcome"], "upstream_error", "{id}");
        assert_eq!(record["error"], NO_END, "{id}");
        assert_eq!(record["response_code"], 200, "{id}");
        for unknown in ["input_tokens", "output_tokens", "finish_reason"] {
            assert_eq!(record["extra"][unknown], Value::Null, "{id}: {unknown}");
        }
    }
    // What was begun is ended first; a stream that has a length can be told as well.
    let (reply, _) = street.streams("cut-record", "/v1/chat/completions", &HEL[..60], Ends::Cleanly).await;
    assert_eq!(reply.text(), format!("{}\n\n{}", &HEL[..60], openai_error(ENDED, code())));
    let (reply, _) = street.streams("cut-line", "/api/chat", &line[..30], Ends::Cleanly).await;
    assert_eq!(reply.text(), format!("{}\n{{\"error\":\"{ENDED}\"}}\n", &line[..30]));
    let (reply, record) = street.streams("sized", "/v1/chat/completions", HEL, Ends::Sized).await;
    assert_eq!(reply.text(), format!("{HEL}{}", openai_error(ENDED, code())));
    assert_eq!((reply.header("content-length"), reply.header("transfer-encoding")), (None, Some("chunked")));
    assert_eq!(record["extra"]["outcome"], "upstream_error");
}

#[tokio::test]
async fn a_clean_end_after_finish_and_usage_is_complete_without_done() {
    let street = Street::open().await;
    let sent = format!("{HEL}{FINISH}{USAGE}");
    let (reply, record) = street.streams("no-done", "/v1/chat/completions", &sent, Ends::Cleanly).await;
    assert_eq!(reply.text(), sent);
    assert_eq!(record["extra"]["outcome"], "complete");
    assert_eq!((&record["extra"]["input_tokens"], &record["extra"]["output_tokens"]), (&json!(26), &json!(8)));
    assert_eq!(record["extra"]["finish_reason"], "stop");
    assert_eq!(record["error"], Value::Null);
}

#[tokio::test]
async fn an_error_that_the_backend_tells_reaches_the_client_in_the_dialects_shape() {
    let street = Street::open().await;
    let words = "model runner has unexpectedly stopped";
    let right = openai_error(words, Value::Null);
    let text = format!("data: {{\"error\":\"{words}\"}}\n\n");
    let bare = format!("{{\"error\":\"{words}\"}}\n");
    let opening = "event: response.created\ndata: {\"sequence_number\":0,\"type\":\"response.created\"}\n\n";
    let anthropic = format!(
        "event: error\ndata: {{\"type\":\"error\",\"error\":{{\"type\":\"api_error\",\"message\":\"{words}\"}}}}\n\n"
    );
    let done = format!("{right}data: [DONE]\n\n");
    let rows: [(&str, &str, &str, &str, &str); 9] = [
        ("event", "/v1/chat/completions", HEL, &right, &right),
        ("text", "/v1/chat/completions", HEL, &text, &right),
        ("bare", "/v1/chat/completions", HEL, &bare, &right),
        ("done", "/v1/chat/completions", HEL, &done, &done),
        ("completions", "/v1/completions", "", &text, &right),
        ("responses", "/v1/responses", opening, &text, &responses_error(words, Value::Null, 1)),
        ("messages", "/v1/messages", "", &bare, &anthropic),
        ("messages-right", "/v1/messages", "", &anthropic, &anthropic),
        ("native", "/api/chat", "", &bare, &bare),
    ];
    for (id, path, before, sent, told) in rows {
        let (reply, record) = street.streams(id, path, &format!("{before}{sent}"), Ends::Cleanly).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        assert_eq!(reply.text(), format!("{before}{told}"), "{id}");
        assert_eq!(record["extra"]["outcome"], "upstream_error", "{id}");
        assert_eq!(record["error"], TOLD, "{id}");
        assert_eq!(record["extra"]["output_tokens"], Value::Null, "{id}");
        assert!(!street.house.log().contains(words), "{id}: a backend's words may quote a prompt");
    }
}

#[tokio::test]
async fn a_reset_is_an_error_event_without_addresses() {
    let street = Street::open().await;
    for (id, path, sent) in
        [("chat", "/v1/chat/completions", HEL), ("responses", "/v1/responses", "data: {\"sequence_number\":0}\n\n")]
    {
        let (reply, record) = street.streams(id, path, sent, Ends::Cut).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        let code = json!("bad_backend_reply");
        let words = if id == "chat" { openai_error(ENDED, code) } else { responses_error(ENDED, code, 1) };
        assert_eq!(reply.text(), format!("{sent}{words}"), "{id}");
        assert_eq!(record["extra"]["outcome"], "upstream_reset", "{id}");
    }
}

/// Not streamed, zeros without a finish reason mean that Ollama never learnt how it ended: no answer.
#[tokio::test]
async fn a_whole_reply_that_is_no_answer_is_a_502_and_never_quoted() {
    let street = Street::open().await;
    let zeros = "\"usage\":{\"prompt_tokens\":0,\"completion_tokens\":0,\"total_tokens\":0}";
    let chat = format!(
        "{{\"choices\":[{{\"index\":0,\"message\":{{\"content\":\"half-a-text\"}},\"finish_reason\":null}}],{zeros}}}\n"
    );
    let text = format!("{{\"choices\":[{{\"text\":\"half-a-text\",\"index\":0,\"finish_reason\":null}}],{zeros}}}\n");
    let zeros = "\"usage\":{\"input_tokens\":0,\"output_tokens\":0}";
    let response = format!(
        "{{\"status\":\"completed\",\"output\":[{{\"type\":\"message\",\"content\":[{{\"type\":\"output_text\",\"text\":\"half-a-text\"}}]}}],{zeros}}}\n"
    );
    let message =
        format!("{{\"type\":\"message\",\"content\":[{{\"type\":\"text\",\"text\":\"half-a-text\"}}],{zeros}}}\n");
    for (id, path, sent) in [
        ("native", "/api/chat", "{\"model\":\"m\",\"message\":{\"content\":\"half-a-text\"},\"done\":false}"),
        ("chat", "/v1/chat/completions", chat.as_str()),
        ("text", "/v1/completions", text.as_str()),
        ("responses", "/v1/responses", response.as_str()),
        ("messages", "/v1/messages", message.as_str()),
        ("garbage", "/v1/chat/completions", "<html>half-a-text</html>"),
        ("native-garbage", "/api/generate", "half-a-text"),
        ("cut", "/v1/embeddings", "{\"data\":[{\"embedding\":[0.1,"),
        ("empty", "/v1/chat/completions", ""),
    ] {
        let (reply, record) = street.answers(id, path, sent).await;
        assert_eq!((reply.status, reply.end), (502, End::Whole), "{id}");
        assert!(!reply.text().contains("half-a-text"), "{id}");
        let body = reply.json();
        let told = match path {
            "/v1/messages" => &body["error"]["message"],
            path if path.starts_with("/v1") => {
                assert_eq!(body["error"]["code"], "bad_backend_reply", "{id}");
                &body["error"]["message"]
            }
            _ => &body["error"],
        };
        assert_eq!(*told, ENDED, "{id}");
        assert_eq!(record["extra"]["outcome"], "upstream_error", "{id}");
        assert_eq!((&record["response_code"], &record["extra"]["upstream_status"]), (&json!(502), &json!(200)), "{id}");
        assert_eq!(record["extra"]["output_tokens"], Value::Null, "{id}");
        assert_eq!(record["error"], NO_END, "{id}");
    }
    // A load has no counts either, and says nothing; a rendered prompt is what was asked for.
    for (id, path, sent) in [
        (
            "load",
            "/v1/responses",
            "{\"status\":\"completed\",\"output\":[{\"type\":\"message\",\"content\":[{\"type\":\"output_text\",\"text\":\"\"}]}],\"usage\":{\"input_tokens\":0,\"output_tokens\":0}}",
        ),
        (
            "render",
            "/api/chat",
            "{\"model\":\"m\",\"done\":false,\"_debug_info\":{\"rendered_template\":\"[user] hi\"}}",
        ),
    ] {
        let (reply, record) = street.answers(id, path, sent).await;
        assert_eq!((reply.status, reply.text().as_str()), (200, sent), "{id}");
        assert_eq!(record["extra"]["outcome"], "complete", "{id}");
    }
}

/// What is longer than what is held passes as it comes.
#[tokio::test]
async fn a_whole_reply_that_is_too_long_to_be_held_passes() {
    let puppet = Puppet::listen().await;
    let config = "[limits]\nreply_buffer_bytes = 65536".to_owned();
    let house = House::with(Plan { backend: Some(puppet.url()), config, ..Plan::default() }).await;
    let mut client = Connection::open(house.public).await;
    client.send(&Request::post("/api/chat", body("/api/chat", false)).bearer(&house.token()).id("long")).await;
    let mut hand = puppet.accept().await;
    hand.request().await;
    let sent = format!("{{\"message\":{{\"content\":\"{}\"}},\"done\":false}}", "x".repeat(300_000));
    hand.answer("200 OK", &sent).await;
    let reply = client.reply(false).await.expect("a reply");
    assert_eq!((reply.status, reply.end), (200, End::Whole));
    assert!(reply.text() == sent);
    assert_eq!(house.final_of("long").await["extra"]["outcome"], "upstream_error");
}
