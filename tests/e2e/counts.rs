//! What the audit says of the tokens of each dialect, streamed or not, however the exchange ends: the numbers that the backend told, or
//! `null` and an outcome that says why. The backend is moved by hand, so each ending comes when the test means it to, and what is said
//! before it imitates the end of every dialect.

use serde_json::{Value, json};

use crate::client::{Connection, Request};
use crate::puppet::{Hand, Street};

/// An end of every dialect, inside of a text.
const IMITATION: &str = "\"done\":true,\"eval_count\":9}\n{\"done\":true,\"prompt_eval_count\":1,\"eval_count\":2}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\ndata: [DONE]\n\ndata: {\"type\":\"response.completed\",\"response\":{\"status\":\"completed\",\"usage\":{\"input_tokens\":5,\"output_tokens\":6}}}\n\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":8}}\n\ndata: {\"type\":\"message_stop\"}\n\n";

/// A dialect, as its backend speaks it: always 24 tokens in and 17 out.
struct Dialect {
    name: &'static str,
    path: &'static str,
    request: Value,
    /// A record with a text, then the rest of an answer; none where nothing is streamed.
    stream: Option<(String, String)>,
    /// An answer that is not streamed, and one of status 200 that is none.
    whole: String,
    half: String,
    /// The backend's own words of a failure, in its stream.
    failure: &'static str,
    /// As the record says it.
    finish: Value,
    output: Value,
}

fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

fn event(value: Value) -> String {
    format!("event: {}\n{}", value["type"].as_str().expect("its type"), data(&value))
}

fn dialects(converted: bool) -> Vec<Dialect> {
    let messages = json!([{ "role": "user", "content": IMITATION }]);
    let chat_failure = "data: {\"error\":{\"message\":\"it broke\",\"type\":\"api_error\"}}\n\n";
    let chunk = |delta: Value, finish: Value| {
        data(&json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] }))
    };
    let usage = json!({ "prompt_tokens": 24, "completion_tokens": 17, "total_tokens": 41 });
    let counted = data(&json!({ "choices": [], "usage": usage }));
    let chat = |name, path, request| {
        Dialect {
        name,
        path,
        request,
        stream: Some((
            chunk(json!({ "content": IMITATION }), Value::Null),
            chunk(json!({}), "stop".into()) + &counted + "data: [DONE]\n\n",
        )),
        whole: json!({ "choices": [{ "message": { "content": IMITATION }, "finish_reason": "stop" }], "usage": usage }).to_string(),
        half: json!({ "choices": [{ "message": { "content": IMITATION }, "finish_reason": null }], "usage": { "prompt_tokens": 0, "completion_tokens": 0 } }).to_string(),
        failure: chat_failure,
        finish: "stop".into(),
        output: 17.into(),
    }
    };
    if converted {
        let response = chat("responses as a chat", "/v1/responses", json!({ "model": "m", "input": IMITATION }));
        return vec![Dialect { finish: "completed".into(), ..response }];
    }
    let native = |path, request, text: fn(&str) -> Value| {
        let line = |mut said: Value, more: Value| {
            said.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            format!("{said}\n")
        };
        let ended = json!({ "done": true, "done_reason": "stop", "context": [1, 2], "prompt_eval_count": 24, "eval_count": 17 });
        Dialect {
            name: path,
            path,
            request,
            stream: Some((line(text(IMITATION), json!({ "done": false })), line(text(""), ended.clone()))),
            whole: line(text(IMITATION), ended),
            half: line(text(IMITATION), json!({ "done": false })),
            failure: "{\"error\":\"it broke\"}\n",
            finish: "stop".into(),
            output: 17.into(),
        }
    };
    let tokens = json!({ "input_tokens": 24, "output_tokens": 17 });
    let said = json!([{ "type": "message", "content": [{ "type": "output_text", "text": IMITATION }] }]);
    let zeros = json!({ "input_tokens": 0, "output_tokens": 0 });
    let vectors = |path, whole: Value, half: Value| Dialect {
        name: path,
        path,
        request: json!({ "model": "m", "input": IMITATION, "prompt": IMITATION }),
        stream: None,
        whole: whole.to_string(),
        half: half.to_string(),
        failure: "",
        finish: Value::Null,
        output: Value::Null,
    };
    vec![
        native("/api/chat", json!({ "model": "m", "messages": messages }), |text| json!({ "message": { "content": text } })),
        native("/api/generate", json!({ "model": "m", "prompt": IMITATION }), |text| json!({ "response": text })),
        chat("chat", "/v1/chat/completions", json!({ "model": "m", "messages": messages })),
        chat(
            "chat that asks for its counts",
            "/v1/chat/completions",
            json!({ "model": "m", "messages": messages, "stream_options": { "include_usage": true } }),
        ),
        Dialect {
            stream: Some((
                data(&json!({ "choices": [{ "text": IMITATION, "index": 0, "finish_reason": null }], "usage": { "prompt_tokens": 0, "completion_tokens": 0 } })),
                data(&json!({ "choices": [{ "text": "", "index": 0, "finish_reason": "stop" }], "usage": { "prompt_tokens": 0, "completion_tokens": 0 } }))
                    + &counted
                    + "data: [DONE]\n\n",
            )),
            ..chat("completions", "/v1/completions", json!({ "model": "m", "prompt": IMITATION }))
        },
        Dialect {
            name: "responses",
            path: "/v1/responses",
            request: json!({ "model": "m", "input": IMITATION }),
            stream: Some((
                event(json!({ "type": "response.output_text.delta", "delta": IMITATION, "sequence_number": 0 })),
                event(json!({ "type": "response.completed", "response": { "output": said, "status": "completed", "usage": tokens }, "sequence_number": 1 })),
            )),
            whole: json!({ "output": said, "status": "completed", "usage": tokens }).to_string(),
            half: json!({ "output": said, "status": "completed", "usage": zeros }).to_string(),
            failure: "event: error\ndata: {\"type\":\"error\",\"message\":\"it broke\",\"sequence_number\":1}\n\n",
            finish: "completed".into(),
            output: 17.into(),
        },
        Dialect {
            name: "messages",
            path: "/v1/messages",
            request: json!({ "model": "m", "max_tokens": 99, "messages": messages }),
            stream: Some((
                event(json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": IMITATION } })),
                event(json!({ "type": "message_delta", "delta": { "stop_reason": "end_turn" }, "usage": tokens })) + &event(json!({ "type": "message_stop" })),
            )),
            whole: json!({ "type": "message", "content": [{ "type": "text", "text": IMITATION }], "stop_reason": "end_turn", "usage": tokens }).to_string(),
            half: json!({ "type": "message", "content": [{ "type": "text", "text": IMITATION }], "stop_reason": null, "usage": zeros }).to_string(),
            failure: "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"it broke\"}}\n\n",
            finish: "end_turn".into(),
            output: 17.into(),
        },
        vectors("/api/embed", json!({ "embeddings": [[0.1]], "prompt_eval_count": 24 }), json!({ "model": "m" })),
        vectors("/v1/embeddings", json!({ "data": [{ "embedding": [0.1] }], "usage": { "prompt_tokens": 24 } }), json!({ "model": "m" })),
    ]
}

/// How an exchange ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    Whole,
    /// The HTTP message ends in order, and the answer is half of one.
    Half,
    /// The backend's connection ends in the middle of the message.
    Cut,
    ClientLeaves,
    /// The backend says that it failed.
    Fails,
}

const ENDINGS: [Ends; 5] = [Ends::Whole, Ends::Half, Ends::Cut, Ends::ClientLeaves, Ends::Fails];

impl Street {
    /// One exchange, to its final record.
    async fn exchange(&self, dialect: &Dialect, streams: bool, ends: Ends) -> Value {
        let id = format!("{}-{streams}-{ends:?}", dialect.name.replace(['/', ' '], "."));
        let mut body = dialect.request.clone();
        if dialect.stream.is_some() {
            body["stream"] = streams.into();
        }
        let mut client = Connection::open(self.house.public).await;
        client.send(&Request::post(dialect.path, body).bearer(&self.house.token()).id(&id)).await;
        let mut hand = self.puppet.asked().await;
        match &dialect.stream {
            Some((first, rest)) if streams => self.stream(client, hand, (first, rest), dialect, ends).await,
            _ => {
                match ends {
                    Ends::Whole => hand.answer("200 OK", &dialect.whole).await,
                    Ends::Half => hand.answer("200 OK", &dialect.half).await,
                    Ends::Fails => hand.answer("500 Internal Server Error", "{\"error\":\"it broke\"}").await,
                    Ends::Cut => {
                        let half = &dialect.whole[..dialect.whole.len() - 9];
                        let length = dialect.whole.len();
                        hand.say(format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{half}")).await;
                    }
                    Ends::ClientLeaves => {
                        drop(client);
                        hand.closed().await;
                        return self.house.final_of(&id).await;
                    }
                }
                if ends == Ends::Cut {
                    drop(hand);
                }
                let reply = client.reply(false).await.expect("a reply");
                assert_eq!(reply.status == 200, ends == Ends::Whole, "{id}: {}", reply.status);
            }
        }
        self.house.final_of(&id).await
    }

    async fn stream(
        &self,
        mut client: Connection,
        mut hand: Hand,
        parts: (&String, &String),
        dialect: &Dialect,
        ends: Ends,
    ) {
        let (first, rest) = parts;
        let kind = if dialect.path.starts_with("/v1") { "text/event-stream" } else { "application/x-ndjson" };
        hand.open_stream(kind).await;
        hand.chunk(first.as_bytes()).await;
        assert_eq!(client.head().await.expect("a head").0, 200);
        let mut read = client.chunk().await.expect("the first record").expect("a chunk");
        match ends {
            Ends::Whole => hand.chunk(rest.as_bytes()).await,
            Ends::Fails => hand.chunk(dialect.failure.as_bytes()).await,
            // Half of its last record: the counts are not all there.
            Ends::Half => hand.chunk(&rest.as_bytes()[..rest.find("17").map_or(9, |at| at + 1)]).await,
            Ends::Cut => return self.cut(client, hand).await,
            Ends::ClientLeaves => {
                drop(client);
                return hand.closed().await;
            }
        }
        hand.say("0\r\n\r\n").await;
        while let Some(chunk) = client.chunk().await {
            read.extend(chunk.expect("it is ended cleanly"));
        }
        let text = String::from_utf8_lossy(&read);
        let told = text.contains("\"error\"")
            && text.matches("it broke").count() + text.matches("before it was complete").count() > 0;
        assert_eq!(told, ends != Ends::Whole, "{} {ends:?}: the client is told of what failed", dialect.name);
    }

    async fn cut(&self, mut client: Connection, hand: Hand) {
        hand.reset();
        while let Some(Ok(_)) = client.chunk().await {}
    }
}

async fn each_dialect_is_counted(converted: bool) {
    let street = Street::open().await;
    if converted {
        // Its first request shows that this Ollama has no such route.
        let asked = Request::post("/v1/responses", json!({ "model": "m", "input": "x" })).bearer(&street.house.token());
        let mut client = Connection::open(street.house.public).await;
        client.send(&asked).await;
        let mut hand = street.puppet.asked().await;
        hand.say("HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 18\r\n\r\n404 page not found")
            .await;
        let mut hand = street.puppet.asked().await;
        hand.answer("200 OK", &dialects(true)[0].whole).await;
        assert_eq!(client.reply(false).await.expect("a reply").status, 200);
    }
    let mut seen = 0;
    for dialect in dialects(converted) {
        for streams in [false, true] {
            if streams && dialect.stream.is_none() {
                continue;
            }
            for ends in ENDINGS {
                seen += 1;
                let record = street.exchange(&dialect, streams, ends).await;
                let extra = &record["extra"];
                let at = format!("{}, streamed: {streams}, {ends:?}", dialect.name);
                let found = (&extra["input_tokens"], &extra["output_tokens"], &extra["finish_reason"]);
                let (input, null) = (json!(24), Value::Null);
                // That the model finished is known all the same: a chat says so before it counts, and a response that is not streamed
                // says so whatever happened.
                let says_finished = ends == Ends::Half && streams && dialect.failure.starts_with("data: ");
                let says_finished = says_finished || ends == Ends::Half && !streams && dialect.name == "responses";
                let wanted = match ends {
                    Ends::Whole => (&input, &dialect.output, &dialect.finish),
                    Ends::Half if says_finished => (&null, &null, &dialect.finish),
                    _ => (&null, &null, &null),
                };
                assert_eq!(found, wanted, "{at}");
                let outcome = match ends {
                    Ends::Whole => "complete",
                    Ends::Half | Ends::Fails => "upstream_error",
                    Ends::Cut => "upstream_reset",
                    Ends::ClientLeaves => "client_abort",
                };
                assert_eq!(extra["outcome"], outcome, "{at}");
                assert_eq!(record["error"].is_null(), ends == Ends::Whole, "{at}: {}", record["error"]);
            }
        }
    }
    assert_eq!(seen, if converted { 10 } else { 80 });
}

#[tokio::test]
async fn counts_are_those_of_the_backend_or_null_with_an_outcome_in_every_dialect() {
    each_dialect_is_counted(false).await;
}

#[tokio::test]
async fn counts_are_those_of_the_backend_or_null_with_an_outcome_where_a_response_is_converted() {
    each_dialect_is_counted(true).await;
}
