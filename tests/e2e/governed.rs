//! The main job: a request with a good token is decided, recorded, forwarded, streamed and counted.

use serde_json::json;

use crate::client::Request;
use crate::house::House;

#[tokio::test]
async fn a_native_chat_streams_through_and_is_recorded_three_times() {
    let house = House::open().await;
    let ask = json!({ "model": "tiny-story", "messages": [{ "role": "user", "content": "hi" }] });
    let reply = house.send(Request::post("/api/v1/ollama/api/chat", ask).bearer(&house.token()).id("n1")).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("application/x-ndjson"));
    assert_eq!(reply.header("x-request-id"), Some("n1"));
    assert_eq!(reply.header("x-behavry-backend"), Some("ollama"));
    assert!(reply.lines().last().expect("lines").contains(r#""done":true"#));

    let records = house.records_of("n1").await;
    let phases: Vec<&str> = records.iter().filter_map(|record| record["extra"]["phase"].as_str()).collect();
    assert_eq!(phases, ["request", "stream_start", "final"]);
    let last = &records[2];
    assert_eq!(last["agent_id"], "tester");
    assert_eq!(last["tool_name"], "ollama-api");
    assert_eq!(last["mcp_server"], "ollama-proxy");
    assert_eq!(last["action"], "POST");
    assert_eq!(last["target"], "/api/chat");
    assert_eq!(last["policy_result"], "allow");
    assert_eq!(last["response_code"], 200);
    assert_eq!(last["extra"]["model"], "tiny-story");
    assert_eq!(last["extra"]["input_tokens"], 24);
    assert_eq!(last["extra"]["output_tokens"], 17);
    assert_eq!(last["extra"]["finish_reason"], "stop");
    assert_eq!(last["extra"]["outcome"], "complete");
}

#[tokio::test]
async fn without_a_token_nothing_reaches_the_backend() {
    let house = House::open().await;
    let ask = json!({ "model": "tiny-story", "messages": [{ "role": "user", "content": "hi" }] });
    let reply = house.send(Request::post("/api/v1/ollama/api/chat", ask).id("none")).await;
    assert_eq!((reply.status, reply.code()), (401, "missing_token".to_owned()));
    assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
    assert_eq!(house.simulator.connections(), 0);
    let last = house.final_of("none").await;
    assert_eq!(last["policy_result"], "deny");
    assert_eq!(last["error"], "missing_token");
    assert_eq!(last["extra"]["outcome"], "refused");
}
