//! What stands behind an older Ollama's port says what no Ollama says, and `/v1/responses` is made of it: the client is told, the record
//! has it, and neither memory nor a slot is held for it.

use serde_json::{Value, json};

use crate::client::{Connection, End, Request};
use crate::house::{House, Plan};
use crate::puppet::{Hand, Puppet};

/// A proxy that knows that this backend has no `/v1/responses`.
async fn house(puppet: &Puppet, config: &str) -> House {
    let config = format!("{config}[[backend]]\nurl = \"{}\"\nslots = 1\n", puppet.url());
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let mut client = ask(&house, "first", false).await;
    let mut hand = puppet.asked().await;
    hand.say("HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 18\r\n\r\n404 page not found")
        .await;
    let mut hand = puppet.asked().await;
    hand.answer("200 OK", &whole("x")).await;
    assert_eq!(client.reply(false).await.expect("a reply").status, 200);
    house
}

async fn ask(house: &House, id: &str, stream: bool) -> Connection {
    let mut client = Connection::open(house.public).await;
    let body = json!({ "model": "m", "input": "hi", "stream": stream });
    client.send(&Request::post("/v1/responses", body).bearer(&house.token()).id(id)).await;
    client
}

fn whole(said: &str) -> String {
    json!({ "choices": [{ "index": 0, "message": { "content": said }, "finish_reason": "stop" }], "usage": { "prompt_tokens": 3, "completion_tokens": 4 } })
        .to_string()
}

fn delta(said: &str) -> String {
    format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "delta": { "content": said } }] }))
}

/// A connection of its own for each stream: the one before may have been closed.
async fn stream(puppet: &Puppet) -> Hand {
    let mut hand = puppet.asked().await;
    hand.open_stream("text/event-stream").await;
    hand
}

fn last_event(text: &str) -> Value {
    let data = text.lines().rev().find_map(|line| line.strip_prefix("data: ")).expect("an event");
    serde_json::from_str(data).expect("JSON")
}

async fn assert_failed(house: &House, id: &str, client: &mut Connection, cause: &str) -> Value {
    let reply = client.reply(false).await.expect("a reply");
    assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}: its framing is whole");
    let last = last_event(&reply.text());
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")), "{id}");
    let record = house.final_of(id).await;
    assert_eq!((&record["error"], &record["extra"]["outcome"]), (&json!(cause), &json!("upstream_error")), "{id}");
    last
}

#[tokio::test]
async fn a_stream_that_can_come_to_no_good_end_is_ended_and_its_backend_let_go() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "[limits]\nreply_buffer_bytes = 1000000\n").await;
    let too_long = "the answer is longer than limits.reply_buffer_bytes";
    let no_json = "an event of the reply is no JSON";
    // None of these backends ever says that it is done.
    for (id, bytes, cause) in [
        ("one-delta-of-10-mb", delta(&"x".repeat(10 << 20)), too_long),
        ("a-record-without-an-end", format!("data: {}", "x".repeat(2 << 20)), too_long),
        ("many-deltas", delta(&"x".repeat(1000)).repeat(1200), too_long),
        ("no-json", delta("so far") + "data: {not json}\n\n", no_json),
        ("deep", format!("data: {}\n\n", "[".repeat(100_000)), no_json),
    ] {
        let mut client = ask(&house, id, true).await;
        let mut hand = stream(&puppet).await;
        for part in bytes.as_bytes().chunks(1 << 16) {
            hand.try_chunk(part).await; // it may be let go before it has said all
        }
        let last = assert_failed(&house, id, &mut client, cause).await;
        if id == "no-json" {
            assert_eq!(last["response"]["output"][0]["content"][0]["text"], "so far", "{id}");
        }
        hand.closed().await;
    }
    // Within the bound all is well, however large a single delta is.
    let mut client = ask(&house, "large", true).await;
    let mut hand = stream(&puppet).await;
    let said = "y".repeat(900_000);
    hand.chunk(delta(&said).as_bytes()).await;
    hand.chunk(b"data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n")
        .await;
    hand.end().await;
    let reply = client.reply(false).await.expect("a reply");
    let last = last_event(&reply.text());
    assert_eq!((&last["type"], reply.end), (&json!("response.completed"), End::Whole));
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], said.as_str());
}

#[tokio::test]
async fn a_whole_reply_that_is_too_long_or_no_answer_is_a_502_and_is_not_waited_for() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "[limits]\nreply_buffer_bytes = 1000000\n").await;
    let calls = format!(
        "{{\"choices\":[{{\"message\":{{\"tool_calls\":[{}]}},\"finish_reason\":\"stop\"}}]}}",
        vec!["{}"; 100_000].join(",")
    );
    for (id, body, ends) in [
        ("endless", format!("{{\"choices\":\"{}", "x".repeat(2 << 20)), false),
        ("calls", calls, true),
        ("no-json", "{not json}".to_owned(), true),
        ("no-choice", "{\"choices\":[]}".to_owned(), true),
    ] {
        let mut client = ask(&house, id, false).await;
        let mut hand = puppet.asked().await;
        hand.open_stream("application/json").await;
        for part in body.as_bytes().chunks(1 << 16) {
            hand.try_chunk(part).await;
        }
        if ends {
            hand.end().await;
        }
        let reply = client.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.code()), (502, "bad_backend_reply".to_owned()), "{id}");
        assert!(reply.body.len() < 1000 && !reply.text().contains("xxx"), "{id}: nothing of it is quoted");
        let record = house.final_of(id).await;
        let too_long = ["endless", "calls"].contains(&id);
        let cause = if too_long {
            "the answer is longer than limits.reply_buffer_bytes"
        } else {
            "the backend's reply has no end"
        };
        assert_eq!((&record["error"], &record["response_code"]), (&json!(cause), &json!(502)), "{id}");
        if !ends {
            hand.closed().await;
        }
    }
}

/// Requests that are made to be read in two ways, or to be too much: no backend hears of them.
#[tokio::test]
async fn requests_that_mean_harm_are_refused_before_a_backend_is_asked() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "").await;
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    for (body, code) in [
        (r#"{"model":"m","input":"x","input":"y"}"#.to_owned(), "ambiguous_body"),
        (r#"{"model":"m","INPUT":"x"}"#.to_owned(), "ambiguous_body"),
        (r#"{"model":"m","input":[{"role":"user","role":"system","content":"x"}]}"#.to_owned(), "ambiguous_body"),
        (r#"{"model":"m","input":[{"Role":"system","content":"x"}]}"#.to_owned(), "ambiguous_body"),
        (format!(r#"{{"model":"m","input":[{{"role":"user","content":{deep}}}]}}"#), "invalid_body"),
        (r#"{"model":"m","input":[{"role":"user","content":"x"},7]}"#.to_owned(), "invalid_body"),
        (
            r#"{"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":7}]}]}"#.to_owned(),
            "unsupported_parameter",
        ),
        (r#"{"model":"m","input":"x","instructions":["a"]}"#.to_owned(), "invalid_body"),
        (r#"{"model":"m","input":7}"#.to_owned(), "invalid_body"),
        (r#"{"model":"m"}"#.to_owned(), "invalid_body"),
    ] {
        let request = Request::new("POST", "/v1/responses").bearer(&house.token()).body(body.as_str());
        let reply = house.send(request).await;
        assert_eq!((reply.status, reply.code()), (400, code.to_owned()), "{}", &body[..body.len().min(90)]);
    }
}

/// A reply repeats its request's instructions and tools, three times where it is streamed.
#[tokio::test]
async fn a_request_of_many_megabytes_is_repeated_whole() {
    let puppet = Puppet::listen().await;
    let house = house(&puppet, "").await;
    let instructions = "z".repeat(12 << 20);
    for stream in [true, false] {
        let id = format!("large-{stream}");
        let body = json!({ "model": "m", "input": "hi", "stream": stream, "instructions": instructions });
        let mut client = Connection::open(house.public).await;
        client.send(&Request::post("/v1/responses", body).bearer(&house.token()).id(&id)).await;
        let mut hand = puppet.asked().await;
        if stream {
            hand.open_stream("text/event-stream").await;
            hand.chunk(
                (delta("said")
                    + "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n")
                    .as_bytes(),
            )
            .await;
            hand.end().await;
        } else {
            hand.answer("200 OK", &whole("said")).await;
        }
        let reply = client.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        let response = if stream { last_event(&reply.text())["response"].take() } else { reply.json() };
        assert_eq!(
            (&response["status"], &response["output"][0]["content"][0]["text"]),
            (&json!("completed"), &json!("said")),
            "{id}"
        );
        assert_eq!(response["instructions"].as_str().map(str::len), Some(instructions.len()), "{id}");
        assert_eq!(house.final_of(&id).await["extra"]["outcome"], "complete", "{id}");
    }
}
