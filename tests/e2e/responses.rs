//! `/v1/responses` with an Ollama that has no such route: asked for a chat, and answered as the route would.

use behavry_ollama_proxy::simulator::SimulatorOptions;
use serde_json::{Value, json};

use crate::client::{Connection, End, Request};
use crate::h2_client::H2;
use crate::house::{House, Plan};
use crate::puppet::Puppet;

async fn house(version: &str) -> House {
    let simulator = SimulatorOptions { ollama_version: version.to_owned(), ..SimulatorOptions::for_tests() };
    House::with(Plan { simulator, ..Plan::default() }).await
}

fn ask(model: &str, more: Value) -> Value {
    let mut body = json!({ "model": model, "input": "hi" });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

fn paths(house: &House) -> Vec<String> {
    house.simulator.seen().iter().map(|seen| seen.target.clone()).collect()
}

fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

#[tokio::test]
async fn an_old_ollama_is_asked_for_a_chat_and_from_then_on_without_asking_first() {
    let house = house("0.12.6").await;
    for (number, stream) in [false, true, false].into_iter().enumerate() {
        house.simulator.forget();
        let id = format!("old-{number}");
        let body = ask("tiny-story", json!({ "stream": stream, "instructions": "Be brief." }));
        let reply = house.send(Request::post("/v1/responses", body).bearer(&house.token()).id(&id)).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}: {}", reply.text());
        let asked =
            if number == 0 { vec!["/v1/responses", "/v1/chat/completions"] } else { vec!["/v1/chat/completions"] };
        assert_eq!(paths(&house), asked, "{id}");
        let seen = house.simulator.seen();
        let sent: Value = serde_json::from_slice(&seen.last().expect("a request").body).expect("JSON");
        let mut wanted = json!({ "model": "tiny-story", "messages": [
            { "role": "system", "content": "Be brief." }, { "role": "user", "content": "hi" }] });
        if stream {
            wanted["stream"] = true.into();
            wanted["stream_options"] = json!({ "include_usage": true });
        }
        assert_eq!(sent, wanted, "{id}");
        let response = if stream {
            assert_eq!(reply.header("content-type"), Some("text/event-stream"), "{id}");
            let events = events(&reply.text());
            for (number, event) in events.iter().enumerate() {
                assert_eq!(event["sequence_number"], number, "{id}");
            }
            assert_eq!(events.last().expect("events")["type"], "response.completed", "{id}");
            events.last().expect("events")["response"].clone()
        } else {
            assert_eq!(reply.header("content-length"), Some(reply.body.len().to_string().as_str()), "{id}");
            reply.json()
        };
        assert_eq!(response["id"], format!("resp_{id}"), "{id}");
        let text = response["output"][0]["content"][0]["text"].as_str().expect("a text");
        assert!(text.starts_with("The quick brown fox <b>jumps & says \"café\""), "{id}: {text}");
        assert_eq!(response["usage"]["output_tokens"], 17, "{id}");

        let record = house.final_of(&id).await;
        assert_eq!(
            (&record["target"], &record["extra"]["dialect"]),
            (&json!("/v1/responses"), &json!("openai")),
            "{id}"
        );
        assert_eq!(record["extra"]["filters"], json!(["responses_to_chat"]), "{id}");
        assert_eq!(record["extra"]["outcome"], "complete", "{id}");
        assert_eq!(record["extra"]["finish_reason"], "completed", "{id}");
        assert_eq!(record["extra"]["output_tokens"], 17, "{id}");
        assert_eq!(record["extra"]["input_tokens"], response["usage"]["input_tokens"], "{id}");
        assert_eq!(record["extra"]["retries"], u64::from(number == 0), "{id}");
        assert_eq!((&record["response_code"], &record["extra"]["upstream_status"]), (&json!(200), &json!(200)), "{id}");
        assert_eq!(record["extra"]["has_system_prompt"], true, "{id}: the policy sees the request as it was asked");
        assert_eq!(record["extra"]["bytes_out"], reply.body.len(), "{id}");
    }
}

#[tokio::test]
async fn a_new_ollama_is_passed_what_was_asked() {
    let house = house("0.13.3").await;
    let body = ask("tiny-story", json!({ "stream": true }));
    let reply = house.send(Request::post("/v1/responses", body.clone()).bearer(&house.token()).id("new")).await;
    assert_eq!(reply.status, 200);
    let seen = house.simulator.seen();
    assert_eq!((seen[0].target.as_str(), seen.len()), ("/v1/responses", 1));
    assert_eq!(serde_json::from_slice::<Value>(&seen[0].body).expect("JSON"), body);
    assert_eq!(house.final_of("new").await["extra"]["filters"], json!([]));
}

#[tokio::test]
async fn what_cannot_be_mapped_is_a_400_that_names_it() {
    for (version, body, param) in [
        (
            "0.12.6",
            ask(
                "tiny-story",
                json!({ "input": [{ "role": "user", "content": "q" }, { "type": "item_reference", "id": "x" }] }),
            ),
            "input[1].type",
        ),
        ("0.12.6", ask("tiny-story", json!({ "tool_choice": "any" })), "tool_choice"),
        ("0.12.6", ask("tiny-story", json!({ "previous_response_id": "resp_1" })), "previous_response_id"),
        // Ollama itself would answer without the conversation, in silence.
        ("0.33.0", ask("tiny-story", json!({ "previous_response_id": "resp_1" })), "previous_response_id"),
        ("0.33.0", ask("tiny-story", json!({ "background": true })), "background"),
    ] {
        let house = house(version).await;
        let reply = house.send(Request::post("/v1/responses", body).bearer(&house.token()).id("named")).await;
        assert_eq!((reply.status, reply.code()), (400, "unsupported_parameter".to_owned()), "{param}");
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param);
        assert!(error["message"].as_str().expect("words").contains(param), "{param}");
        assert!(!paths(&house).contains(&"/v1/chat/completions".to_owned()), "{param}");
        let record = house.final_of("named").await;
        assert_eq!(
            (&record["extra"]["outcome"], &record["response_code"]),
            (&json!("refused"), &json!(400)),
            "{param}"
        );
        assert_eq!(record["error"], "unsupported_parameter", "{param}");
    }
}

#[tokio::test]
async fn what_is_left_out_is_in_the_audit() {
    let house = house("0.12.6").await;
    let body = ask(
        "tiny-story",
        json!({ "include": ["reasoning.encrypted_content"], "seed": 3, "odd": 1, "tools": [{ "type": "mcp" }] }),
    );
    let reply = house.send(Request::post("/v1/responses", body).bearer(&house.token()).id("left")).await;
    assert_eq!(reply.status, 200);
    let filters = json!(["responses_to_chat", "include", "unknown_members", "seed", "unsupported_tools"]);
    let mut found = house.final_of("left").await["extra"]["filters"].as_array().expect("filters").clone();
    let mut wanted = filters.as_array().expect("filters").clone();
    found.sort_by_key(Value::to_string);
    wanted.sort_by_key(Value::to_string);
    assert_eq!(found, wanted);
}

#[tokio::test]
async fn an_old_ollamas_own_errors_pass_and_its_failures_are_told() {
    let house = house("0.12.6").await;
    let reply = house.post("/v1/responses", ask("absent", json!({}))).await;
    assert_eq!(reply.status, 404);
    assert!(reply.json()["error"]["message"].as_str().expect("words").contains("not found"));
    for (id, model, outcome) in [
        ("ends", "fault-no-terminal", "upstream_error"),
        ("hidden", "fault-error-in-stream", "upstream_error"),
        ("cut", "fault-closes-mid-stream", "upstream_reset"),
    ] {
        let body = ask(model, json!({ "stream": true }));
        let reply = house.send(Request::post("/v1/responses", body).bearer(&house.token()).id(id)).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{id}");
        let events = events(&reply.text());
        let last = events.last().expect("events");
        assert_eq!(last["type"], "response.failed", "{id}");
        assert_eq!(last["sequence_number"], events.len() - 1, "{id}");
        assert_eq!(last["response"]["status"], "failed", "{id}");
        let words = "Ollama's reply ended before it was complete. Send the request again.";
        assert_eq!(last["response"]["error"], json!({ "code": "server_error", "message": words }), "{id}");
        let said: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
        assert!(!said.is_empty(), "{id}");
        assert_eq!(last["response"]["output"][0]["content"][0]["text"], said.as_str(), "{id}: what was said");
        assert_eq!(house.final_of(id).await["extra"]["outcome"], outcome, "{id}");
        if id != "hidden" {
            let reply = house.post("/v1/responses", ask(model, json!({}))).await;
            assert_eq!((reply.status, reply.code()), (502, "bad_backend_reply".to_owned()), "{id}");
        }
    }
}

/// A client that knows no chunks, and one that has frames of its own.
#[tokio::test]
async fn a_converted_answer_is_whole_over_http_2_and_over_http_1_0() {
    let house = house("0.12.6").await;
    assert_eq!(house.post("/v1/responses", ask("tiny-story", json!({}))).await.status, 200);
    let mut h2 = H2::open(house.public).await;
    for stream in [true, false] {
        let body = ask("tiny-story", json!({ "stream": stream }));
        let id = format!("h2-{stream}");
        let over_2 = h2.send(&Request::post("/v1/responses", body.clone()).bearer(&house.token()).id(&id)).await;
        assert_eq!((over_2.status, over_2.end), (200, End::Whole), "{stream}");
        let head = format!(
            "POST /v1/responses HTTP/1.0\r\nAuthorization: Bearer {}\r\nx-request-id: old-{stream}\r\n",
            house.token()
        );
        let body = body.to_string();
        let mut old = Connection::open(house.public).await;
        old.write(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).await;
        let over_1_0 = old.reply(false).await.expect("a reply");
        assert_eq!((over_1_0.status, over_1_0.end), (200, End::Whole), "{stream}");
        assert_eq!(over_1_0.header("transfer-encoding"), None, "{stream}");
        assert_eq!(over_1_0.header("content-length").is_some(), !stream, "{stream}");
        assert!(!old.more().await, "{stream}: the connection ends with the reply");
        for (id, reply) in [(&id, &over_2), (&format!("old-{stream}"), &over_1_0)] {
            let response = if stream {
                let events = events(&reply.text());
                assert!(events.iter().enumerate().all(|(number, event)| event["sequence_number"] == number), "{id}");
                let last = events.last().expect("events");
                assert_eq!(last["type"], "response.completed", "{id}");
                last["response"].clone()
            } else {
                assert_eq!(reply.header("content-length"), Some(reply.body.len().to_string().as_str()), "{id}");
                reply.json()
            };
            assert_eq!((&response["id"], &response["status"]), (&json!(format!("resp_{id}")), &json!("completed")));
            let record = house.final_of(id).await;
            assert_eq!(record["extra"]["output_tokens"], response["usage"]["output_tokens"], "{id}");
            assert_eq!(record["extra"]["bytes_out"], reply.body.len(), "{id}");
        }
    }
}

/// Every whole record is at the client before the next is sent.
#[tokio::test]
async fn each_event_is_at_the_client_before_the_next_comes() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
    let mut client = Connection::open(house.public).await;
    let request =
        Request::post("/v1/responses", ask("m", json!({ "stream": true }))).bearer(&house.token()).id("prompt");
    client.send(&request).await;
    let mut hand = puppet.accept().await;
    assert!(hand.request().await.starts_with("POST /v1/responses "));
    hand.say("HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 18\r\n\r\n404 page not found")
        .await;
    let mut hand = puppet.accept().await;
    assert!(hand.request().await.starts_with("POST /v1/chat/completions "));
    hand.open_stream("text/event-stream").await;
    let chunk =
        |said: &str| format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "delta": { "content": said } }] }));
    let mut text = String::new();
    for said in ["one", "two"] {
        hand.chunk(chunk(said).as_bytes()).await;
        if said == "one" {
            assert_eq!(client.head().await.expect("a head").0, 200);
        }
        while !text.contains(&format!("\"delta\":\"{said}\"")) {
            let more = client.chunk().await.expect("not the end").expect("a chunk");
            text.push_str(&String::from_utf8_lossy(&more));
        }
    }
    // Its client leaves: the work of the backend is cancelled.
    drop(client);
    hand.closed().await;
    assert_eq!(house.final_of("prompt").await["extra"]["outcome"], "client_abort");
}

/// A chat that nobody finished, cleanly ended: no end for a response.
#[tokio::test]
async fn a_chat_that_ends_without_having_finished_is_a_failed_response() {
    let puppet = Puppet::listen().await;
    let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
    let said = json!({ "choices": [{ "index": 0, "delta": { "content": "half" }, "finish_reason": null }] });
    let ended = json!({ "choices": [{ "index": 0, "delta": {}, "finish_reason": "stop" }] });
    let counted = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":24,\"completion_tokens\":1";
    for (id, rest) in
        [("done-alone", "data: [DONE]\n\n".to_owned()), ("half-a-record", format!("data: {ended}\n\n{counted}"))]
    {
        let mut client = Connection::open(house.public).await;
        let request = Request::post("/v1/responses", ask("m", json!({ "stream": true }))).bearer(&house.token()).id(id);
        client.send(&request).await;
        let mut hand = puppet.asked().await;
        if id == "done-alone" {
            let head = "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 18\r\n\r\n";
            hand.say(format!("{head}404 page not found")).await;
            hand = puppet.asked().await;
        }
        hand.open_stream("text/event-stream").await;
        hand.chunk(format!("data: {said}\n\n{rest}").as_bytes()).await;
        hand.say("0\r\n\r\n").await;
        let reply = client.reply(false).await.expect("a reply");
        let events = events(&reply.text());
        let last = events.last().expect("events");
        assert_eq!((&last["type"], reply.end), (&json!("response.failed"), End::Whole), "{id}");
        assert_eq!(last["response"]["output"][0]["content"][0]["text"], "half", "{id}");
        let words = "Ollama's reply ended before it was complete. Send the request again.";
        assert_eq!(last["response"]["error"]["message"], words, "{id}");
        let record = house.final_of(id).await;
        assert_eq!(record["extra"]["outcome"], "upstream_error", "{id}");
        assert_eq!(record["extra"]["output_tokens"], Value::Null, "{id}");
    }
}

/// By its version, without a 404: this backend has the route all the same.
#[tokio::test]
async fn an_ollama_whose_version_is_too_old_is_not_asked_first() {
    let puppet = Puppet::listen().await;
    let config = "[catalogue]\nrefresh_s = 60".to_owned();
    let backend = puppet.url();
    let served = tokio::spawn(async move {
        loop {
            let mut hand = puppet.accept().await;
            tokio::spawn(async move {
                loop {
                    let request = hand.request().await;
                    let path = request.split(' ').nth(1).expect("a path").to_owned();
                    let native = json!({ "id": "resp_1", "object": "response", "status": "completed", "usage": { "input_tokens": 1, "output_tokens": 1 } });
                    let chat = json!({ "choices": [{ "index": 0, "message": { "content": "as a chat" }, "finish_reason": "stop" }], "usage": { "prompt_tokens": 3, "completion_tokens": 4 } });
                    let body = match path.as_str() {
                        "/api/version" => json!({ "version": "0.12.6" }),
                        "/v1/responses" => native,
                        "/v1/chat/completions" => chat,
                        "/api/show" => json!({ "capabilities": ["completion"] }),
                        _ => json!({ "models": [{ "name": "m:latest", "model": "m:latest", "digest": "d" }] }),
                    };
                    hand.answer("200 OK", &body.to_string()).await;
                }
            });
        }
    });
    let house = House::with(Plan { backend: Some(backend), config, ..Plan::default() }).await;
    let began = std::time::Instant::now();
    for number in 0.. {
        assert!(began.elapsed() < crate::house::PATIENCE, "its version is never known");
        let id = format!("version-{number}");
        let reply =
            house.send(Request::post("/v1/responses", ask("m", json!({}))).bearer(&house.token()).id(&id)).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let record = house.final_of(&id).await;
        if record["extra"]["filters"] == json!([]) {
            assert_eq!(reply.json()["id"], "resp_1");
            continue; // the version was not read yet
        }
        assert_eq!(reply.json()["output"][0]["content"][0]["text"], "as a chat");
        assert_eq!(
            (&record["extra"]["filters"], &record["extra"]["retries"]),
            (&json!(["responses_to_chat"]), &json!(0))
        );
        assert_eq!(record["extra"]["output_tokens"], 4);
        break;
    }
    served.abort();
}
