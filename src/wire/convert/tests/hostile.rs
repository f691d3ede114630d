//! Backends that say what Ollama does not say, and requests made to do harm.

use super::*;

fn delta(delta: &Value) -> String {
    format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "delta": delta }] }))
}

const END: &str =
    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"tool_calls\"}]}\n\ndata: [DONE]\n\n";

fn piece(index: Option<u64>, id: Option<&str>, name: Option<&str>, arguments: &str) -> Value {
    let mut call = json!({ "type": "function", "function": { "arguments": arguments } });
    if let Some(index) = index {
        call["index"] = index.into();
    }
    if let Some(id) = id {
        call["id"] = id.into();
    }
    if let Some(name) = name {
        call["function"]["name"] = name.into();
    }
    json!({ "tool_calls": [call] })
}

/// The items of what these events become, fed whole, byte by byte and at every cut.
fn items_of(name: &str, chat: &str) -> Vec<Value> {
    let reply = || reply_for(&json!({ "model": "ollama/tiny", "input": "x", "stream": true }));
    let text = streamed(reply(), chat, &mut std::iter::empty());
    assert_eq!(streamed(reply(), chat, &mut std::iter::repeat(1)), text, "{name}: byte by byte");
    for at in 1..chat.len() {
        assert_eq!(streamed(reply(), chat, &mut std::iter::once(at)), text, "{name}: cut at {at}");
    }
    output(&checked(name, &text)).as_array().expect("items").clone()
}

#[test]
fn calls_in_pieces_are_put_together_however_they_are_mixed() {
    let call = |item: &Value| {
        let text = |name: &str| item[name].as_str().unwrap_or_default().to_owned();
        (text("call_id"), text("name"), text("arguments"))
    };
    let made = |id: &str, name: &str, arguments: &str| (id.to_owned(), name.to_owned(), arguments.to_owned());
    let whole = [made("call_a", "f", "{\"a\":\"}\"}"), made("call_b", "g", "{\"b\":[2]}")];
    for (name, pieces, wanted) in [
        (
            "interleaved, the second first",
            vec![
                piece(Some(1), Some("call_b"), Some("g"), "{\"b\":"),
                piece(Some(0), Some("call_a"), Some("f"), ""),
                piece(Some(0), None, None, "{\"a\":\"}"),
                piece(Some(1), None, None, "[2]"),
                piece(Some(0), None, None, "\"}"),
                piece(Some(1), None, None, "}"),
            ],
            whole.to_vec(),
        ),
        (
            "each piece with its id again",
            vec![
                piece(Some(0), Some("call_a"), Some("f"), "{\"a\":"),
                piece(Some(0), Some("call_a"), None, "\"}\"}"),
                piece(Some(0), Some("call_b"), Some("g"), "{\"b\":"),
                piece(Some(0), Some("call_b"), None, "[2]}"),
            ],
            whole.to_vec(),
        ),
        (
            "no index, and an end that says nothing",
            vec![
                piece(None, Some("call_a"), Some("f"), "{\"a\""),
                piece(None, None, None, ":\"}\"}"),
                piece(None, None, None, ""),
                piece(None, Some("call_b"), Some("g"), "{\"b\":[2]}"),
            ],
            whole.to_vec(),
        ),
        (
            "a text in the middle of one",
            vec![
                piece(Some(0), Some("call_a"), Some("f"), "{\"a\""),
                json!({ "content": "meanwhile" }),
                piece(Some(0), None, None, ":\"}\"}"),
            ],
            vec![made("", "", ""), whole[0].clone()],
        ),
        (
            "without ids",
            vec![piece(Some(0), None, Some("f"), "{}"), piece(Some(0), None, Some("f"), "{}")],
            vec![made("call_req-1_0", "f", "{}"), made("call_req-1_1", "f", "{}")],
        ),
        (
            "one that never becomes whole",
            vec![piece(Some(0), Some("call_a"), Some("f"), "{\"a\":\"")],
            vec![made("call_a", "f", "{\"a\":\"")],
        ),
    ] {
        let chat = pieces.iter().map(delta).collect::<String>() + END;
        assert_eq!(items_of(name, &chat).iter().map(call).collect::<Vec<_>>(), wanted, "{name}");
    }
}

#[test]
fn a_call_that_is_cut_is_incomplete_in_the_failed_response() {
    let chat = delta(&piece(Some(0), Some("call_a"), Some("f"), "{\"a\":"))
        + "data: {\"error\":{\"message\":\"it broke\"}}\n\n";
    let items = items_of("cut", &chat);
    assert_eq!((&items[0]["status"], &items[0]["arguments"]), (&json!("incomplete"), &json!("{\"a\":")));
}

#[test]
fn a_stream_that_ends_within_a_record_lacks_its_end_and_one_whose_last_record_is_whole_does_not() {
    let reply = || reply_for(&json!({ "model": "ollama/tiny", "input": "x", "stream": true }));
    let said = delta(&json!({ "content": "so far" }));
    let finish = END.split_once("data: [DONE]").expect("two events").0;
    for (rest, kind, message) in [
        ("data: {\"choices\":[{\"ind", "response.failed", json!("it ended")),
        ("data: [DO", "response.failed", json!("it ended")),
        (END.trim_end(), "response.completed", Value::Null),
        (finish.trim_end(), "response.completed", Value::Null),
    ] {
        let chat = format!("{said}{rest}");
        let events = checked(rest, &streamed(reply(), &chat, &mut std::iter::repeat(7)));
        let last = events.last().unwrap();
        assert_eq!((&last["type"], &last["response"]["error"]["message"]), (&json!(kind), &message), "{rest}");
        assert_eq!(output(&events)[0]["content"][0]["text"], "so far", "{rest}");
    }
}

#[test]
fn only_the_first_choice_is_the_answer_wherever_it_stands() {
    let chat = format!(
        "data: {}\n\ndata: {}\n\n{END}",
        json!({ "choices": [{ "index": 1, "delta": { "content": "not this" } }, { "index": 0, "delta": { "content": "this" } }] }),
        json!({ "choices": [{ "index": 1, "delta": { "content": "nor this" }, "finish_reason": "stop" }] }),
    );
    assert_eq!(items_of("choices", &chat)[0]["content"][0]["text"], "this");
}

#[test]
fn counts_that_come_first_are_counts_and_the_last_ones_count() {
    let usage = |prompt: u64| {
        format!("data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":{prompt},\"completion_tokens\":5}}}}\n\n")
    };
    let chat = usage(1) + &delta(&json!({ "content": "x" })) + &usage(7) + END;
    let reply = reply_for(&json!({ "model": "ollama/tiny", "input": "x", "stream": true }));
    let events = checked("counts", &streamed(reply, &chat, &mut std::iter::empty()));
    assert_eq!(events.last().unwrap()["response"]["usage"]["total_tokens"], 12);
}

/// What is no JSON may have been the answer: a response without it must not look complete.
#[test]
fn an_event_that_is_no_json_fails_the_response_and_bytes_that_are_no_text_do_not() {
    let deep = "[".repeat(200) + &"]".repeat(200);
    for junk in ["{not json}", "{\"choices\":[]} {}", "{\"choices\":", deep.as_str()] {
        let chat = delta(&json!({ "content": "so far" })) + &format!("data: {junk}\n\n") + END;
        let mut events = Events::new(reply_for(&json!({ "model": "ollama/tiny", "input": "x" })), 1 << 20);
        let mut out = events.pass(chat.as_bytes(), NOW);
        out.extend(events.finish(NOW));
        let all = checked(junk, std::str::from_utf8(&out).unwrap());
        assert_eq!(all.last().unwrap()["type"], "response.failed", "{junk}");
        assert_eq!(output(&all)[0]["content"][0]["text"], "so far", "{junk}");
        assert_eq!(events.failed(), Some("an event of the reply is no JSON"), "{junk}");
    }
    let mut events = Events::new(reply_for(&json!({ "model": "ollama/tiny", "input": "x" })), 1 << 20);
    let mut out = events.pass(b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\xff\xc3b\"}}]}\n\n", NOW);
    out.extend(events.pass(END.as_bytes(), NOW));
    let all = checked("not UTF-8", std::str::from_utf8(&out).unwrap());
    assert_eq!(output(&all)[0]["content"][0]["text"], "a\u{fffd}\u{fffd}b");
    let chat = b"{\"choices\":[{\"message\":{\"content\":\"a\xff\"},\"finish_reason\":\"stop\"}]}";
    let made = whole(&reply_for(&json!({ "model": "m", "input": "x" })), chat, 1 << 20, NOW).expect("a response");
    assert_eq!(serde_json::from_slice::<Value>(&made).unwrap()["output"][0]["content"][0]["text"], "a\u{fffd}");
}

/// What is made of a record is many times as long as the record: the bound is on what is made.
#[test]
fn small_records_that_make_large_responses_meet_the_bound() {
    const LIMIT: usize = 100_000;
    let reply = || reply_for(&json!({ "model": "ollama/tiny", "input": "x" }));
    let calls = format!("{{\"tool_calls\":[{}]}}", vec!["{}"; 20_000].join(","));
    let named =
        format!("{{\"tool_calls\":[{}]}}", vec![r#"{"function":{"name":"f","arguments":"{}"}}"#; 2_000].join(","));
    let one = |delta: &str| format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{delta}}}]}}\n\n");
    let by_turns = one(r#"{"reasoning":"a","content":"b"}"#).repeat(5_000);
    let gathered: String = (0..50_000)
        .map(|n| {
            one(&format!(r#"{{"tool_calls":[{{"index":{n},"id":"{n}","function":{{"name":"f","arguments":"{{"}}}}]}}"#))
        })
        .collect();
    for (name, chat) in [("calls", one(&named)), ("by turns", by_turns), ("gathered", gathered)] {
        let mut events = Events::new(reply(), LIMIT);
        let mut made = Vec::new();
        for chunk in chat.as_bytes().chunks(60_000) {
            made.extend(events.pass(chunk, NOW));
        }
        made.extend(events.finish(NOW));
        assert_eq!(events.failed(), Some(TOO_LONG), "{name}");
        assert!(made.len() < 16 * LIMIT, "{name}: {} bytes", made.len());
        checked(name, std::str::from_utf8(&made).unwrap());
    }
    let chat = format!("{{\"choices\":[{{\"message\":{calls},\"finish_reason\":\"stop\"}}]}}");
    assert_eq!(whole(&reply(), chat.as_bytes(), LIMIT, NOW), Err(NoResponse::TooLong));
    // Empty pieces of no call are none.
    let mut events = Events::new(reply(), LIMIT);
    let out = events.pass(one(&calls).as_bytes(), NOW);
    assert!(out.len() < 3_000 && events.failed().is_none());
}

#[test]
fn a_member_of_the_wrong_type_is_named_and_nothing_is_lost_in_silence() {
    let item = |item: &str| format!(r#"{{"model":"m","input":[{{"role":"user","content":"q"}},{item}]}}"#);
    for (body, name) in [
        (r#"{"model":"m","input":"x","instructions":["a"]}"#.to_owned(), "instructions"),
        (r#"{"model":"m","input":"x","tools":{"type":"function"}}"#.to_owned(), "tools"),
        (r#"{"model":"m","input":"x","text":"json"}"#.to_owned(), "text"),
        (r#"{"model":"m","input":"x","reasoning":"high"}"#.to_owned(), "reasoning"),
        (item(r#"{"role":"user","content":[{"type":"input_text","text":7}]}"#), "input[1].content[0].text"),
        (item(r#"{"role":"user","content":[{"type":"input_text","text":{"a":1}}]}"#), "input[1].content[0].text"),
        (item(r#"{"role":"assistant","content":[{"type":"refusal","refusal":[1]}]}"#), "input[1].content[0].refusal"),
        (item(r#"{"role":"user","content":["bare"]}"#), "input[1].content[0].type"),
        (item(r#"{"role":["user"],"content":"x"}"#), "input[1].role"),
        (item(r#"{"type":7,"role":"user","content":"x"}"#), "input[1].type"),
        (item(r#"{"type":"function_call","call_id":7,"name":"f","arguments":"{}"}"#), "input[1].call_id"),
        (item(r#"{"type":"function_call","call_id":"c","name":{"a":1},"arguments":"{}"}"#), "input[1].name"),
        (item(r#"{"type":"function_call_output","call_id":7,"output":"x"}"#), "input[1].call_id"),
        (item(r#"{"type":"function_call_output","call_id":"c","output":7}"#), "input[1].output"),
        (item("[]"), "input[1]"),
        (item("null"), "input[1]"),
    ] {
        assert_eq!(refused(&body), name, "{body}");
    }
}

/// A call without arguments, as our own stream said it, comes back in the next request; Ollama takes no empty text there.
#[test]
fn a_call_without_arguments_is_sent_with_an_empty_object() {
    for arguments in [r#","arguments":"""#, ""] {
        let body =
            format!(r#"{{"model":"m","input":[{{"type":"function_call","call_id":"c","name":"now"{arguments}}}]}}"#);
        let sent: Value = serde_json::from_str(&sent(&body)).expect("JSON");
        assert_eq!(sent["messages"][0]["tool_calls"][0]["function"], json!({ "name": "now", "arguments": "{}" }));
    }
}

/// Work that grows with the square of a request's length would hold up every other request of the thread.
#[test]
fn allowed_tools_are_looked_up_and_not_searched_for() {
    const TOOLS: usize = 60_000;
    let tool = |n: usize| format!(r#"{{"type":"function","name":"f{n}"}}"#);
    let tools = (0..TOOLS).map(tool).collect::<Vec<_>>().join(",");
    let allowed = (TOOLS - 2..2 * TOOLS).map(tool).collect::<Vec<_>>().join(",");
    let body = format!(
        r#"{{"model":"m","input":"x","tools":[{tools}],"tool_choice":{{"type":"allowed_tools","mode":"auto","tools":[{allowed}]}}}}"#
    );
    let sent: Value = serde_json::from_str(&sent(&body)).expect("JSON");
    assert_eq!(sent["tools"].as_array().map(Vec::len), Some(2));
}

#[test]
fn what_the_filters_cut_from_a_chat_is_cut_here_and_named_unless_they_are_off() {
    let body = r#"{"model":"m","prompt_cache_key":"k","store":false,"service_tier":"auto","text":{"verbosity":"low"},"input":[{"role":"user","content":[{"type":"input_text","text":"cache_control","cache_control":{"type":"ephemeral"}}]}],"tools":[{"type":"function","name":"f","cache_control":1,"parameters":{"properties":{"cache_control":{}}}}]}"#;
    let on = converted(body);
    let sent: Value = serde_json::from_slice(&on.body).expect("JSON");
    let function = json!({ "name": "f", "parameters": { "properties": { "cache_control": {} } } });
    let bare = json!({ "model": "m", "messages": [{ "role": "user", "content": "cache_control" }],
        "tools": [{ "type": "function", "function": function }] });
    assert_eq!(sent, bare);
    assert_eq!(on.left_out, ["prompt_cache_key", "verbosity", "store", "service_tier", "cache_control"]);
    for filter in [Filter::PromptCacheKey, Filter::Verbosity, Filter::Store, Filter::ServiceTier, Filter::CacheControl]
    {
        let others = Filter::ALL.into_iter().filter(|other| *other != filter).collect();
        let off = request(body.as_bytes(), others, "req-1", NOW).unwrap_or_else(|why| panic!("{why:?}"));
        let mut wanted = bare.clone();
        match filter {
            Filter::PromptCacheKey => wanted["prompt_cache_key"] = json!("k"),
            Filter::Verbosity => wanted["verbosity"] = json!("low"),
            Filter::Store => wanted["store"] = json!(false),
            Filter::ServiceTier => wanted["service_tier"] = json!("auto"),
            _ => wanted["tools"][0]["function"]["cache_control"] = json!(1),
        }
        assert_eq!(serde_json::from_slice::<Value>(&off.body).expect("JSON"), wanted, "{filter:?}");
        assert!(!off.left_out.contains(&filter.as_str()) && off.left_out.len() == 4, "{filter:?}");
    }
}

/// Bytes that differ here and there, always the same ones.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below.max(1)
    }

    fn mutate(&mut self, text: &str) -> Vec<u8> {
        const PIECES: [&str; 16] = [
            "\"",
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "null",
            "7",
            "\"\"",
            "{}",
            "[]",
            "\\",
            "\"role\":\"system\"",
            "\"type\":\"message\"",
            "\n\ndata: ",
        ];
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..=self.roll(3) {
            let (at, length) = (self.roll(bytes.len()), self.roll(6));
            let end = (at + length).min(bytes.len());
            match self.roll(4) {
                0 => drop(bytes.splice(at..at, PIECES[self.roll(PIECES.len())].bytes())),
                1 => drop(bytes.drain(at..end)),
                2 => drop(bytes.splice(at..end, PIECES[self.roll(PIECES.len())].bytes())),
                _ => {
                    // A piece of itself somewhere else.
                    let from = self.roll(bytes.len());
                    let piece = bytes[from..(from + self.roll(80)).min(bytes.len())].to_vec();
                    drop(bytes.splice(at..at, piece));
                }
            }
        }
        bytes
    }
}

/// What a policy was told of a request is true of the chat that is sent for it.
#[test]
fn a_mutated_request_is_refused_or_becomes_a_chat_of_the_same_facts() {
    let mut dice = Dice(7);
    let (mut converted, mut refused) = (0, 0);
    for case in cases() {
        let body = case["request"].to_string();
        for _ in 0..150 {
            let body = dice.mutate(&body);
            let Ok(asked) = ask::read(Endpoint::Responses, &body) else { continue };
            let Ok(made) = request(&body, all(), "req-1", NOW) else {
                refused += 1;
                continue;
            };
            converted += 1;
            let shown =
                || (String::from_utf8_lossy(&body).into_owned(), String::from_utf8_lossy(&made.body).into_owned());
            assert!(serde_json::from_slice::<Value>(&made.body).is_ok(), "{:?}", shown());
            let sent = ask::read(Endpoint::ChatCompletions, &made.body);
            let sent = sent.unwrap_or_else(|why| panic!("{why:?}: {:?}", shown()));
            let model = |ask: &ask::Ask| ask.model.as_ref().map(|model| model.raw.clone());
            assert_eq!(model(&asked), model(&sent), "{:?}", shown());
            assert_eq!(asked.stream, sent.stream, "{:?}", shown());
            assert_eq!(asked.num_predict, sent.num_predict, "{:?}", shown());
            assert_eq!(asked.has_system_prompt, sent.has_system_prompt, "{:?}", shown());
            assert!(asked.has_tools != Some(false) || sent.has_tools != Some(true), "{:?}", shown());
        }
    }
    assert!(converted > 1000 && refused > 100, "{converted} converted, {refused} refused");
}

#[test]
fn a_mutated_chat_becomes_the_same_events_in_any_parts_and_always_ends() {
    let mut dice = Dice(11);
    let mut seen = 0;
    for case in cases() {
        let name = case["case"].as_str().unwrap_or_default();
        if !name.starts_with("resp_s_") || case["backend"].as_str().is_none_or(|text| !text.contains("data:")) {
            continue;
        }
        let chat = backend(&case);
        for _ in 0..60 {
            seen += 1;
            let chat = String::from_utf8_lossy(&dice.mutate(&chat)).into_owned();
            let reply = || reply_for(&json!({ "model": "ollama/tiny", "input": "x", "stream": true }));
            let text = streamed(reply(), &chat, &mut std::iter::empty());
            checked(name, &text);
            assert_eq!(streamed(reply(), &chat, &mut std::iter::repeat(1)), text, "{name}: byte by byte: {chat}");
            let parts: Vec<usize> = (0..40).map(|_| 1 + dice.roll(60)).collect();
            assert_eq!(streamed(reply(), &chat, &mut parts.into_iter()), text, "{name}: {chat}");
        }
    }
    assert!(seen > 1000, "{seen}");
}
