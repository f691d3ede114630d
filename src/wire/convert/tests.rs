use super::*;
use crate::wire::frames::Framing;
use crate::wire::mend::Mender;
use crate::wire::{AskError, Endpoint, Filter, Filters, ask};
use serde_json::{Value, json};

mod hostile;

const NOW: u64 = 1_787_360_530;

/// The recorded cases of `/v1/responses`: `request`, and `backend`, what was answered to the chat. Beside it what is sent here
/// (`sent`, `left_out`), or the member that is named (`refused`), which was held against the table row by row.
fn cases() -> Vec<Value> {
    let read = |file: &str| {
        let path = format!("{}/tests/fixtures/bifrost/{file}.jsonl", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).expect("the recorded cases");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<Value>>()
    };
    let mut cases = read("cases");
    cases.retain(|case| case["case"].as_str().is_some_and(|name| name.starts_with("resp_")));
    let ours = read("responses-sent");
    for case in &mut cases {
        case["request"] = case["client"]["body"].take();
        if let Some(ours) = ours.iter().find(|ours| ours["case"] == case["case"]) {
            case.as_object_mut().expect("an object").extend(ours.as_object().expect("an object").clone());
        }
    }
    cases
}

fn all() -> Filters {
    Filter::ALL.into_iter().collect()
}

fn converted(body: &str) -> Converted {
    request(body.as_bytes(), all(), "req-1", NOW).unwrap_or_else(|why| panic!("{why:?}"))
}

fn sent(body: &str) -> String {
    String::from_utf8(converted(body).body).expect("UTF-8")
}

fn refused(body: &str) -> String {
    match request(body.as_bytes(), all(), "req-1", NOW) {
        Err(Unconvertible::Parameter(name)) => name,
        Err(Unconvertible::Invalid(what)) => what.to_owned(),
        Ok(_) => panic!("{body} was converted"),
    }
}

// ---- the request

#[test]
fn each_recorded_request_becomes_the_chat_that_the_table_says() {
    let mut seen = 0;
    for case in cases() {
        let (name, body) = (&case["case"], case["request"].to_string());
        // What no Ollama honours is refused where the facts are read, whoever the backend is.
        if let Err(AskError::Unsupported(param)) = ask::read(Endpoint::Responses, body.as_bytes()) {
            seen += 1;
            assert_eq!(json!(param), case["refused"], "{name}");
            continue;
        }
        match request(body.as_bytes(), all(), "req-1", NOW) {
            Ok(converted) if case["sent"].is_object() => {
                seen += 1;
                let sent: Value = serde_json::from_slice(&converted.body).expect("JSON");
                assert_eq!(sent, case["sent"], "{name}");
                assert_eq!(json!(converted.left_out), case["left_out"], "{name}");
            }
            Err(Unconvertible::Parameter(param)) => {
                seen += 1;
                assert_eq!(json!(param), case["refused"], "{name}");
            }
            Ok(_) => assert!(case["refused"].is_null(), "{name}: {} is not refused", case["refused"]),
            Err(why) => panic!("{name}: {why:?}"),
        }
    }
    assert!(seen > 60, "{seen}");
}

#[test]
fn schemas_arguments_and_texts_are_carried_byte_for_byte() {
    let schema = r#"{ "z":1.0e2, "a" : [ "é\u00e9\ud83e\udd8a<&>" ], "$schema":"x","x-k":{} }"#;
    let body = format!(
        r#"{{"model":"m","input":[{{"role":"user","content":" \u003ca\ud83e\udd8a\n\/ "}},{{"type":"function_call","call_id":"c","name":"f","arguments":"{{\"a\" : 1.0}}"}},{{"type":"function_call_output","call_id":"c","output":"\ud800"}}],"tools":[{{"type":"function","name":"f","parameters":{schema}}}],"text":{{"format":{{"type":"json_schema","name":"n","schema":{schema}}}}},"temperature":1.50}}"#
    );
    let sent = sent(&body);
    assert_eq!(sent.matches(schema).count(), 2, "{sent}");
    for kept in [r#"" \u003ca\ud83e\udd8a\n\/ ""#, r#""{\"a\" : 1.0}""#, r#""\ud800""#, r#""temperature":1.50"#] {
        assert!(sent.contains(kept), "{kept} is not in {sent}");
    }
    // Texts that are joined are one text: two halves of a pair stay two halves.
    let parts = r#"{"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":"a\"\ud83e"},{"type":"input_text","text":"\udd8ab"}]}]}"#;
    let sent: Value = serde_json::from_str(&self::sent(parts)).expect("JSON");
    assert_eq!(sent["messages"][0]["content"], "a\"\u{fffd}\u{fffd}b");
}

#[test]
fn what_cannot_be_mapped_is_named() {
    let item = |item: &str| format!(r#"{{"model":"m","input":[{{"role":"user","content":"q"}},{item}]}}"#);
    for (body, name) in [
        (item(r#"{"type":"item_reference","id":"x"}"#), "input[1].type"),
        (item(r#"{"type":"mystery"}"#), "input[1].type"),
        (item("7"), "input[1]"),
        (item(r#"{"role":"judge","content":"x"}"#), "input[1].role"),
        (item(r#"{"role":"user","content":{"a":1}}"#), "input[1].content"),
        (item(r#"{"role":"user","content":[{"type":"input_file","file_id":"f"}]}"#), "input[1].content[0].type"),
        (
            item(r#"{"role":"user","content":[{"type":"input_image","image_url":"https://a/b.png"}]}"#),
            "input[1].content[0].image_url",
        ),
        (item(r#"{"role":"user","content":[{"type":"input_image","file_id":"f"}]}"#), "input[1].content[0].file_id"),
        (
            item(
                r#"{"type":"function_call_output","call_id":"c","output":[{"type":"input_image","image_url":"data:image/png;base64,aGk="}]}"#,
            ),
            "input[1].output[0].type",
        ),
        (r#"{"model":"m","input":"x","tool_choice":"any"}"#.to_owned(), "tool_choice"),
        (r#"{"model":"m","input":"x","tool_choice":"required","tools":[{"type":"mcp"}]}"#.to_owned(), "tools"),
        (r#"{"model":"m","input":"x","text":{"format":{"type":"grammar"}}}"#.to_owned(), "text.format.type"),
        (r#"{"model":"m","input":[]}"#.to_owned(), "`input` has no message"),
        (r#"{"model":"m"}"#.to_owned(), "`input` must be a text or an array of items"),
    ] {
        assert_eq!(refused(&body), name, "{body}");
    }
    // What says nothing counts as absent.
    let nothing = r#"{"model":"m","input":"x","previous_response_id":null,"conversation":"","prompt":{},"background":false,"tools":[],"tool_choice":null,"include":[],"stream":false}"#;
    assert_eq!(sent(nothing), r#"{"model":"m","messages":[{"role":"user","content":"x"}]}"#);
    assert!(converted(nothing).left_out.is_empty());
}

#[test]
fn a_stream_is_asked_for_its_counts() {
    let body = r#"{"model":"m","input":"x","stream":true,"stream_options":{"include_obfuscation":false}}"#;
    assert!(sent(body).ends_with(r#""stream":true,"stream_options":{"include_usage":true}}"#));
}

#[test]
fn versions_say_whether_the_route_is_there() {
    for (version, native) in [
        ("0.13.2", Some(false)),
        ("0.13.3", Some(true)),
        ("0.13.3-rc0", Some(true)),
        ("0.9.14", Some(false)),
        ("0.33.0-rc2", Some(true)),
        ("1.0.0", Some(true)),
        ("0.0.0", None),
        ("", None),
        ("new", None),
        ("0.13", None),
    ] {
        assert_eq!(is_native(version), native, "{version}");
    }
}

// ---- the reply

fn reply_for(body: &Value) -> Reply {
    converted(&body.to_string()).reply
}

/// The recorded reply to a case: its body, without the notes.
fn backend(case: &Value) -> String {
    let text = case["backend"].as_str().unwrap_or_else(|| panic!("{}: no reply", case["case"]));
    let body = text.split_once("\n\n").expect("a head").1;
    match body.rfind("\n(") {
        Some(note) if body.ends_with(")\n") || body.ends_with(')') => body[..note].to_owned(),
        _ => body.to_owned(),
    }
}

fn case(name: &str) -> Value {
    cases().into_iter().find(|case| case["case"] == name).unwrap_or_else(|| panic!("{name} is gone"))
}

fn whole_of(name: &str) -> Value {
    let case = case(name);
    let made = whole(&reply_for(&case["request"]), backend(&case).as_bytes(), 1 << 20, NOW)
        .unwrap_or_else(|e| panic!("{name}: {e:?}"));
    serde_json::from_slice(&made).expect("JSON")
}

/// Through the same parts as in the proxy, in pieces as they come; the failure of a missing end included.
fn streamed(reply: Reply, chat: &str, pieces: &mut dyn Iterator<Item = usize>) -> String {
    let mut mender = Mender::new(Endpoint::ChatCompletions, Framing::Sse);
    let mut events = Events::new(reply, 1 << 20);
    let (mut out, mut rest) = (Vec::new(), chat.as_bytes());
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(pieces.next().unwrap_or(rest.len()).min(rest.len()));
        rest = after;
        let passed = mender.pass(bytes::Bytes::copy_from_slice(piece));
        out.extend(events.pass(&passed, NOW));
    }
    out.extend(events.pass(&mender.finish(), NOW));
    out.extend(events.finish(NOW));
    if !events.has_ended() {
        out.extend(events.fail_with("it ended", NOW));
    }
    String::from_utf8(out).expect("UTF-8")
}

/// The events of a recorded stream.
fn events_of(name: &str) -> Vec<Value> {
    let case = case(name);
    checked(name, &streamed(reply_for(&case["request"]), &backend(&case), &mut std::iter::empty()))
}

/// The events, each of which is as events have to be.
fn checked(name: &str, text: &str) -> Vec<Value> {
    let mut events = Vec::new();
    for event in text.split_terminator("\n\n") {
        let (kind, data) = event.split_once('\n').unwrap_or_else(|| panic!("{name}: {event}"));
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!(data["type"], kind.strip_prefix("event: ").expect("a name"), "{name}");
        assert_eq!(data["sequence_number"], events.len(), "{name}: numbered without gaps");
        events.push(data);
    }
    assert!(text.ends_with("\n\n") && !text.contains("[DONE]"), "{name}");
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("text")).collect();
    assert_eq!(kinds[..2], ["response.created", "response.in_progress"], "{name}");
    let last = events.last().expect("events");
    let ends = ["response.completed", "response.incomplete", "response.failed"];
    assert_eq!(kinds.iter().filter(|kind| ends.contains(kind)).count(), 1, "{name}: one end");
    assert!(ends.contains(&last["type"].as_str().expect("text")), "{name}: at the end");
    // f: every response object is complete.
    for event in events.iter().filter(|event| event["response"].is_object()) {
        let response = &event["response"];
        assert_eq!((&response["object"], &response["model"]), (&json!("response"), &json!("ollama/tiny")), "{name}");
        assert!(response["output"].is_array() && response["status"].is_string(), "{name}");
        assert_eq!(response["id"], "resp_req-1", "{name}");
        if event != last {
            assert_eq!((&response["output"], &response["usage"]), (&json!([]), &Value::Null), "{name}");
        }
    }
    // Each item: added, then done, at the place that it has in the last event; nothing of it after that.
    let output = last["response"]["output"].as_array().expect("output");
    let failed = last["type"] == "response.failed";
    let mut open: Option<u64> = None;
    let mut done = 0;
    for event in &events {
        match event["type"].as_str().expect("text") {
            "response.output_item.added" => {
                assert_eq!((open, &event["output_index"]), (None, &json!(done)), "{name}: one after the other");
                open = Some(done);
            }
            "response.output_item.done" => {
                assert_eq!(open.take().map(|index| json!(index)), Some(event["output_index"].clone()), "{name}");
                assert_eq!(event["item"], output[done as usize], "{name}: stream and end tell the same");
                done += 1;
            }
            _ if event["output_index"].is_u64() => {
                assert_eq!(open.map(|index| json!(index)), Some(event["output_index"].clone()), "{name}");
                assert_eq!(event["item_id"], output[done as usize]["id"], "{name}");
                assert!(event.get("item").is_none(), "{name}: j");
            }
            _ => {}
        }
    }
    assert!(failed || open.is_none() && done as usize == output.len(), "{name}: all items are done");
    events
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().expect("text").trim_start_matches("response.")).collect()
}

fn output(events: &[Value]) -> &Value {
    &events.last().expect("events")["response"]["output"]
}

#[test]
fn a_whole_reply_drops_nothing_and_has_its_status() {
    let both = whole_of("resp_r_text_tools");
    let kinds: Vec<&Value> = both["output"].as_array().unwrap().iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds[..2], ["message", "function_call"]);
    assert_eq!(both["status"], "completed");
    let length = whole_of("resp_r_length");
    assert_eq!(length["status"], "incomplete");
    assert_eq!(length["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    assert_eq!(length["completed_at"], Value::Null);
    assert_eq!(whole_of("resp_r_content_filter")["incomplete_details"], json!({ "reason": "content_filter" }));
    assert_eq!(whole_of("resp_r_unknown_finish")["status"], "completed");
    let empty = whole_of("resp_r_empty");
    assert_eq!(empty["output"][0]["content"][0]["text"], "");
    let thinking = whole_of("resp_r_reasoning");
    assert_eq!(thinking["output"][0]["type"], "reasoning");
    assert_eq!(thinking["output"][0]["summary"][0]["text"], thinking["output"][0]["encrypted_content"]);
    let tools = whole_of("resp_r_tools");
    let call = tools["output"].as_array().unwrap().iter().find(|item| item["type"] == "function_call").unwrap();
    assert!(
        call["id"].as_str().unwrap().starts_with("fc_req-1_") && call["call_id"].as_str().unwrap().starts_with("call_")
    );
    for response in [both, length, empty] {
        let usage = json!({ "input_tokens": 26, "input_tokens_details": { "cached_tokens": 0 }, "output_tokens": 8, "output_tokens_details": { "reasoning_tokens": 0 }, "total_tokens": 34 });
        assert_eq!(response["usage"], usage);
        assert_eq!((&response["object"], &response["id"]), (&json!("response"), &json!("resp_req-1")));
    }
    let chat = whole(&reply_for(&json!({ "model": "m", "input": "x" })), b"{\"a\":1}", 1 << 20, NOW);
    assert_eq!(chat, Err(NoResponse::NoChat));
}

#[test]
fn a_reply_repeats_what_was_asked() {
    let asked = json!({ "model": "m", "input": "x", "instructions": "I", "metadata": { "a": "b" }, "parallel_tool_calls": false, "safety_identifier": "s",
        "temperature": 0.5, "top_p": 0.25, "max_output_tokens": 9, "tool_choice": "auto", "text": { "format": { "type": "json_object" } },
        "reasoning": { "effort": "low" }, "tools": [{ "type": "function", "name": "f", "parameters": { "type": "object" } }] });
    let object = reply_for(&asked).object(&Status::InProgress, "", Counts::default(), NOW);
    let object: Value = serde_json::from_str(&object).expect("JSON");
    for name in [
        "model",
        "instructions",
        "metadata",
        "parallel_tool_calls",
        "safety_identifier",
        "temperature",
        "top_p",
        "max_output_tokens",
        "tool_choice",
        "text",
        "reasoning",
    ] {
        assert_eq!(object[name], asked[name], "{name}");
    }
    let tool = json!({ "type": "function", "name": "f", "description": null, "strict": null, "parameters": { "type": "object" } });
    assert_eq!(object["tools"], json!([tool]));
}

#[test]
fn every_recorded_stream_becomes_the_same_events_at_any_split() {
    let mut seen = 0;
    for case in cases() {
        let name = case["case"].as_str().expect("a name");
        if !name.starts_with("resp_s_") || !case["backend"].is_string() {
            continue;
        }
        seen += 1;
        let chat = backend(&case);
        let stream = |pieces: &mut dyn Iterator<Item = usize>| streamed(reply_for(&case["request"]), &chat, pieces);
        let text = stream(&mut std::iter::empty());
        checked(name, &text);
        assert_eq!(stream(&mut std::iter::repeat(1)), text, "{name}: byte by byte");
        for at in 1..chat.len() {
            assert_eq!(stream(&mut std::iter::once(at)), text, "{name}: cut at {at}");
        }
    }
    assert!(seen >= 25, "{seen}");
}

#[test]
fn defect_a_every_call_of_a_chunk_survives() {
    for name in ["resp_s_two_tools_one_chunk", "resp_s_two_tools_two_chunks", "resp_s_two_tools_same_index"] {
        let events = events_of(name);
        let ids: Vec<&Value> = output(&events).as_array().unwrap().iter().map(|item| &item["call_id"]).collect();
        assert_eq!(ids, ["call_aaaa0001", "call_aaaa0002"], "{name}");
        let arguments: Vec<&Value> =
            output(&events).as_array().unwrap().iter().map(|item| &item["arguments"]).collect();
        assert_eq!(arguments, ["{\"city\":\"Oslo\"}", "{\"city\":\"Rome\"}"], "{name}");
    }
    assert_eq!(output(&events_of("resp_s_four_tools")).as_array().unwrap().len(), 4);
}

#[test]
fn defects_b_c_and_e_a_call_has_its_place_and_an_id_of_its_own() {
    let events = events_of("resp_s_one_tool");
    assert_eq!(
        kinds(&events),
        [
            "created",
            "in_progress",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed"
        ]
    );
    for event in &events[2..6] {
        assert_eq!(event["output_index"], 0);
        assert!(event.get("content_index").is_none());
    }
    let item = &output(&events)[0];
    assert_eq!((&item["id"], &item["call_id"]), (&json!("fc_req-1_0"), &json!("call_aaaa0001")));
    assert_eq!((&events[2]["item"]["status"], &item["status"]), (&json!("in_progress"), &json!("completed")));
}

#[test]
fn defect_d_a_call_without_arguments_is_done() {
    for (name, arguments) in [("resp_s_blank_args", ""), ("resp_s_empty_args", "{}")] {
        let events = events_of(name);
        assert_eq!(
            kinds(&events)[2..6],
            ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"],
            "{name}"
        );
        assert_eq!(
            (&events[4]["arguments"], &output(&events)[0]["arguments"]),
            (&json!(arguments), &json!(arguments)),
            "{name}"
        );
    }
    // Not Ollama's way: a call in pieces is one call.
    let events = events_of("resp_s_frag_args");
    assert_eq!(output(&events).as_array().unwrap().len(), 1);
    assert_eq!(output(&events)[0]["arguments"], "{\"city\":\"Oslo\"}");
}

#[test]
fn defects_f_and_j_a_text_is_told_whole() {
    for name in ["resp_s_text", "resp_s_text_old", "resp_s_no_role", "resp_s_no_done", "resp_s_usage_on_finish"] {
        let events = events_of(name);
        let kinds = kinds(&events);
        assert_eq!(kinds[2..4], ["output_item.added", "content_part.added"], "{name}");
        assert_eq!(
            kinds[kinds.len() - 4..],
            ["output_text.done", "content_part.done", "output_item.done", "completed"],
            "{name}"
        );
        assert_eq!(events[2]["item"]["status"], "in_progress", "{name}");
        let said: String = events
            .iter()
            .filter(|event| event["type"] == "response.output_text.delta")
            .map(|event| event["delta"].as_str().unwrap())
            .collect();
        assert_eq!(output(&events)[0]["content"][0]["text"], said.as_str(), "{name}");
        assert_eq!(events.last().unwrap()["response"]["usage"]["total_tokens"], 34, "{name}");
    }
    let unknown = events_of("resp_s_text_nousage");
    assert_eq!(unknown.last().unwrap()["response"]["usage"], Value::Null, "what is not known is not 0");
}

#[test]
fn defect_g_a_thought_is_a_summary_with_all_its_events() {
    let events = events_of("resp_s_reasoning");
    let kinds = kinds(&events);
    for kind in [
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
    ] {
        assert!(kinds.contains(&kind), "{kind}");
    }
    assert_eq!(output(&events)[0]["summary"][0]["text"], "hmm ok");
    assert!(output(&events)[0].get("content").is_none());
    assert_eq!(output(&events)[1]["content"][0]["text"], "Hi");
    let events = events_of("resp_s_reasoning_tool");
    assert_eq!(
        (&output(&events)[0]["type"], &output(&events)[1]["type"]),
        (&json!("reasoning"), &json!("function_call"))
    );
}

#[test]
fn defects_h_i_and_k_items_stand_in_the_order_in_which_they_came() {
    let types = |name| {
        let events = events_of(name);
        output(&events)
            .as_array()
            .unwrap()
            .iter()
            .map(|item| item["type"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(types("resp_s_text_after_tool"), ["message", "function_call", "message"]);
    assert_eq!(types("resp_s_tool_then_text"), ["function_call", "message"]);
    assert_eq!(types("resp_s_text_then_tool"), ["message", "function_call"]);
    let events = events_of("resp_s_text_after_tool");
    assert_eq!(
        (&output(&events)[0]["content"][0]["text"], &output(&events)[2]["content"][0]["text"]),
        (&json!("A"), &json!("B"))
    );
    let first_text = events_of("resp_s_tool_then_text")
        .iter()
        .position(|event| event["type"] == "response.output_text.delta")
        .unwrap();
    let call_done = events_of("resp_s_tool_then_text")
        .iter()
        .position(|event| event["type"] == "response.function_call_arguments.done")
        .unwrap();
    assert!(call_done < first_text, "k: a call is done when its arguments are");
}

#[test]
fn defect_l_an_empty_answer_is_a_message() {
    let events = events_of("resp_s_empty_answer");
    assert_eq!(
        output(&events)[0]["content"],
        json!([{ "type": "output_text", "text": "", "annotations": [], "logprobs": [] }])
    );
}

#[test]
fn defect_m_an_error_is_a_failed_response_with_what_was_said() {
    for name in ["resp_s_error_event", "resp_s_error_native"] {
        let events = events_of(name);
        let last = events.last().unwrap();
        assert_eq!(last["type"], "response.failed", "{name}");
        assert_eq!(last["response"]["status"], "failed", "{name}");
        assert_eq!(
            last["response"]["error"],
            json!({ "code": "server_error", "message": "model runner has unexpectedly stopped" }),
            "{name}"
        );
        assert_eq!(output(&events)[0]["content"][0]["text"], "Hel", "{name}");
        assert_eq!(output(&events)[0]["status"], "incomplete", "{name}");
    }
}

#[test]
fn defect_n_a_stream_without_an_end_fails() {
    for name in ["resp_s_swallowed", "resp_s_empty", "resp_s_cut"] {
        let events = events_of(name);
        assert_eq!(events.last().unwrap()["type"], "response.failed", "{name}");
        assert_eq!(events.last().unwrap()["response"]["error"]["message"], "it ended", "{name}");
    }
}

#[test]
fn a_stream_that_is_cut_by_length_is_incomplete_with_its_reason() {
    let events = events_of("resp_s_length");
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(last["response"]["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    assert_eq!(last["response"]["usage"]["output_tokens"], 8, "usage comes behind the finish reason");
}

#[test]
fn an_answer_beyond_the_bound_fails_and_is_held_no_longer() {
    let reply = || reply_for(&json!({ "model": "ollama/tiny", "input": "x", "stream": true }));
    let chunk =
        |said: &str| format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "delta": { "content": said } }] }));
    let mut events = Events::new(reply(), 1000);
    let mut out = Vec::new();
    for _ in 0..100 {
        out.extend(events.pass(chunk(&"x".repeat(100)).as_bytes(), NOW));
    }
    out.extend(events.finish(NOW));
    let all = checked("long", std::str::from_utf8(&out).unwrap());
    assert_eq!(all.last().unwrap()["type"], "response.failed");
    assert!(events.has_ended() && events.failed().is_some());
    assert!(out.len() < 10_000, "nothing is said after that");
    // One endless record is bounded as well.
    let mut events = Events::new(reply(), 1000);
    let mut out = events.pass(b"data: {\"choices\":\"", NOW);
    for _ in 0..100 {
        out.extend(events.pass(&[b'x'; 100], NOW));
    }
    assert!(events.failed().is_some());
    checked("endless", std::str::from_utf8(&out).unwrap());
}

#[test]
fn replies_recorded_from_ollama_become_whole_responses_and_broken_ones_fail() {
    let (mut ended, mut failed) = (0, 0);
    for version in ["0.17.4", "0.24.0", "0.33.0-rc2"] {
        let path = format!("{}/tests/fixtures/ollama/{version}/openai.jsonl", env!("CARGO_MANIFEST_DIR"));
        for line in std::fs::read_to_string(&path).expect("recorded").lines() {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let (name, body, expected) =
                (line["case"].as_str().unwrap(), line["body"].as_str().unwrap(), &line["expected"]);
            if line["request"]["path"] != "/v1/chat/completions" || expected["status"] != 200 {
                continue;
            }
            if !body.starts_with("data:") {
                continue;
            }
            let reply = reply_for(&json!({ "model": "ollama/tiny", "input": "x" }));
            let text = streamed(reply, body, &mut std::iter::empty());
            let events = checked(name, &text);
            let last = events.last().unwrap();
            match expected["terminal_marker"].as_bool() {
                Some(true) => {
                    ended += 1;
                    let kind = if expected["finish_reason"] == "length" {
                        "response.incomplete"
                    } else {
                        "response.completed"
                    };
                    assert_eq!(last["type"], kind, "{version} {name}");
                    assert_eq!(
                        last["response"]["usage"]["output_tokens"], expected["output_tokens"],
                        "{version} {name}"
                    );
                }
                _ => {
                    failed += 1;
                    assert_eq!(last["type"], "response.failed", "{version} {name}");
                }
            }
        }
    }
    assert!(ended > 10 && failed > 8, "{ended} ended, {failed} failed");
}
