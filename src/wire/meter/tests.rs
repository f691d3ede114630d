use super::*;

fn metered(endpoint: Endpoint, framing: Framing, body: &str) -> Usage {
    let mut whole = Meter::new(endpoint, framing);
    whole.feed(body.as_bytes());
    let whole = whole.finish();
    let mut by_bytes = Meter::new(endpoint, framing);
    for byte in body.as_bytes() {
        by_bytes.feed(std::slice::from_ref(byte));
    }
    assert_eq!(by_bytes.finish(), whole, "whole and byte by byte");
    whole
}

fn counts(usage: Usage) -> (Option<u64>, Option<u64>, Option<&'static str>) {
    let known = ["stop", "length", "load", "end_turn", "completed", "failed", "max_output_tokens", "tool_use"];
    let finish =
        usage.finish_reason.map(|word| *known.iter().find(|&&k| k == word.as_str()).expect("a word of the test"));
    (usage.input_tokens, usage.output_tokens, finish)
}

#[test]
fn a_reply_that_recites_end_markers_does_not_fool_it() {
    let body = concat!(
        r#"{"message":{"content":"\"done\":true,\"done_reason\":\"stop\",\"eval_count\":9}\n{\"done\":true,\"eval_count\":8}"},"done":false}"#,
        "\n",
        r#"{"message":{"content":"x","done":true,"eval_count":7,"a":[{"done":true,"eval_count":6}]},"done":false}"#,
        "\n",
        r#"{"a":"\\","b":"\\\"","done":true,"c":"\",\"eval_count\":5,\"x\":\"","done_reason":"length","prompt_eval_count":24,"eval_count":17}"#,
        "\n",
    );
    let usage = metered(Endpoint::Chat, Framing::Ndjson, body);
    assert_eq!(counts(usage), (Some(24), Some(17), Some("length")));
    let cut = &body[..body.rfind("{\"a\":\"\\\\\"").unwrap()];
    assert_eq!(metered(Endpoint::Chat, Framing::Ndjson, cut), Usage::default());

    let recited = r#"data: {"choices":[{"delta":{"content":"data: [DONE]\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1},"finish_reason":"stop"},"finish_reason":null}]}"#;
    let usage = metered(Endpoint::ChatCompletions, Framing::Sse, &format!("{recited}\n\n"));
    assert_eq!(usage, Usage::default());
}

#[test]
fn counts_after_a_million_numbers_are_found() {
    let context = "128000,".repeat(1_000_000) + "1";
    let body = format!(
        "{{\"response\":\"\",\"done\":true,\"done_reason\":\"stop\",\"context\":[{context}],\"total_duration\":5,\"load_duration\":4,\
         \"prompt_eval_count\":999999,\"prompt_eval_duration\":3,\"eval_count\":1,\"eval_duration\":2}}\n"
    );
    let mut meter = Meter::new(Endpoint::Generate, Framing::Ndjson);
    for part in body.as_bytes().chunks(16 * 1024) {
        meter.feed(part);
    }
    let usage = meter.finish();
    assert_eq!(counts(usage), (Some(999_999), Some(1), Some("stop")));
    assert_eq!((usage.total_duration_ns, usage.load_duration_ns), (Some(5), Some(4)));
    assert_eq!((usage.prompt_eval_duration_ns, usage.eval_duration_ns), (Some(3), Some(2)));
}

#[test]
fn zeros_are_unknown_and_never_replace_a_count() {
    let zeros =
        r#"{"choices":[{"text":"same","finish_reason":null}],"usage":{"prompt_tokens":0,"completion_tokens":0}}"#;
    let usage = metered(Endpoint::Completions, Framing::Json, zeros);
    assert_eq!((counts(usage), usage.terminal), ((None, None, None), false));
    let load = zeros.replace("null", "\"load\"");
    let usage = metered(Endpoint::Completions, Framing::Json, &load);
    assert_eq!((counts(usage), usage.terminal), ((None, None, Some("load")), true));
    let stream = concat!(
        "data: {\"choices\":[{\"finish_reason\":null}],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":0}}\n\n",
        "data: {\"choices\":[{\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":0,\"completion_tokens\":0}}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":24,\"completion_tokens\":17}}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":0,\"completion_tokens\":0}}\n\n",
        "data: [DONE]\n\n"
    );
    let usage = metered(Endpoint::Completions, Framing::Sse, stream);
    assert_eq!((counts(usage), usage.terminal), ((Some(24), Some(17), Some("stop")), true));
}

#[test]
fn only_what_is_a_whole_number_is_a_count() {
    for (text, wanted) in [
        ("24", Some(24)),
        ("9999999999999999999", Some(9_999_999_999_999_999_999)),
        ("99999999999999999999", None),
        ("-1", None),
        ("2.5", None),
        ("1e3", None),
        ("\"24\"", None),
        ("null", None),
        ("[24]", None),
        ("0", None),
    ] {
        let body = format!("{{\"done\":true,\"done_reason\":\"stop\",\"eval_count\":{text}}}");
        assert_eq!(metered(Endpoint::Chat, Framing::Json, &body).output_tokens, wanted, "{text}");
    }
}

#[test]
fn errors_of_the_backend_are_seen_in_every_dialect() {
    let error = |endpoint, framing, body| metered(endpoint, framing, body).error_frame;
    assert!(error(Endpoint::Chat, Framing::Ndjson, "{\"done\":false}\n{\"error\":\"x\"}\n"));
    assert!(error(Endpoint::Chat, Framing::Json, "{\"error\":\"x\"}"));
    assert!(error(Endpoint::Pull, Framing::Ndjson, "{\"status\":\"pulling manifest\"}\n{\"error\":\"x\"}\n"));
    assert!(error(Endpoint::ChatCompletions, Framing::Sse, "data: {\"error\":{\"message\":\"x\"}}\n\n"));
    assert!(error(Endpoint::Messages, Framing::Sse, "event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n"));
    assert!(error(Endpoint::Responses, Framing::Sse, "data: {\"type\":\"error\",\"message\":\"x\"}\n\n"));
    assert!(error(
        Endpoint::Responses,
        Framing::Sse,
        "data: {\"response\":{\"status\":\"failed\"},\"type\":\"response.failed\"}\n\n"
    ));
    assert!(!error(Endpoint::Responses, Framing::Json, "{\"status\":\"completed\",\"error\":null}"));
    assert!(!error(Endpoint::Chat, Framing::Ndjson, "{\"message\":{\"error\":\"x\"},\"done\":false}\n"));
}

#[test]
fn a_response_counts_only_at_its_end() {
    let stream = concat!(
        "event: response.created\ndata: {\"response\":{\"status\":\"in_progress\",\"usage\":{\"input_tokens\":1,\"output_tokens\":1}},\"type\":\"response.created\"}\n\n",
        "data: {\"response\":{\"output\":[{\"status\":\"x\",\"usage\":{\"input_tokens\":2}}],\"incomplete_details\":{\"reason\":\"max_output_tokens\"},",
        "\"status\":\"incomplete\",\"usage\":{\"input_tokens\":24,\"output_tokens\":17}},\"type\":\"response.incomplete\"}\n\n",
    );
    let usage = metered(Endpoint::Responses, Framing::Sse, stream);
    assert_eq!((counts(usage), usage.terminal), ((Some(24), Some(17), Some("max_output_tokens")), true));
    let begun = &stream[..stream.find("data: {\"response\":{\"output\"").unwrap()];
    assert_eq!(metered(Endpoint::Responses, Framing::Sse, begun), Usage::default());
}

#[test]
fn the_shortest_records_with_a_fact_are_not_taken_for_dull_ones() {
    for (endpoint, framing, record) in [
        (Endpoint::Chat, Framing::Ndjson, "{\"done\" : true}\n"),
        (Endpoint::Chat, Framing::Ndjson, "{\"error\":1}\n"),
        (Endpoint::ChatCompletions, Framing::Sse, "data: {\"choices\":[{\"finish_reason\" : \"stop\"}]}\n\n"),
        (Endpoint::ChatCompletions, Framing::Sse, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}\n\n"),
        (Endpoint::ChatCompletions, Framing::Sse, "data: {\"error\":1}\n\n"),
        (Endpoint::ChatCompletions, Framing::Sse, "data: [DONE]\n\n"),
        (
            Endpoint::Responses,
            Framing::Sse,
            "data: {\"type\":\"response.completed\",\"response\":{\"status\":\"completed\"}}\n\n",
        ),
        (
            Endpoint::Responses,
            Framing::Sse,
            "data: {\"type\":\"response.incomplete\",\"response\":{\"status\":\"incomplete\"}}\n\n",
        ),
        (Endpoint::Responses, Framing::Sse, "data: {\"type\":\"response.failed\"}\n\n"),
        (Endpoint::Responses, Framing::Sse, "data: {\"type\":\"error\"}\n\n"),
        (Endpoint::Messages, Framing::Sse, "data: {\"type\":\"message_stop\"}\n\n"),
        (
            Endpoint::Messages,
            Framing::Sse,
            "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"}}\n\n",
        ),
        (Endpoint::Messages, Framing::Sse, "data: {\"error\":{}}\n\n"),
    ] {
        assert_ne!(metered(endpoint, framing, record), Usage::default(), "{record}");
    }
}

#[test]
fn the_guess_in_message_start_is_not_a_count() {
    let stream =
        "data: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":1,\"output_tokens\":0}}}\n\n";
    assert_eq!(metered(Endpoint::Messages, Framing::Sse, stream), Usage::default());
    let stream = format!(
        "{stream}data: {{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":\"end_turn\"}},\"usage\":{{\"input_tokens\":24,\
         \"output_tokens\":17}}}}\n\n"
    );
    let usage = metered(Endpoint::Messages, Framing::Sse, &stream);
    assert_eq!((counts(usage), usage.terminal), ((Some(24), Some(17), Some("end_turn")), false));
}

#[test]
fn a_reply_that_stops_in_the_middle_has_no_end() {
    let body = r#"{"model":"a","done":true,"done_reason":"stop","prompt_eval_count":24,"eval_count":17}"#;
    for end in 0..body.len() {
        assert_eq!(metered(Endpoint::Chat, Framing::Ndjson, &body[..end]), Usage::default(), "{end}");
    }
    assert!(metered(Endpoint::Chat, Framing::Ndjson, body).terminal);
    let list = "{\"models\":[{\"name\":\"a\"}]}";
    for end in 1..list.len() {
        assert!(!metered(Endpoint::Tags, Framing::Json, &list[..end]).terminal, "{end}");
    }
    assert!(metered(Endpoint::Tags, Framing::Json, list).terminal);
    assert!(metered(Endpoint::Root, Framing::Json, "Ollama is running").terminal);
    assert!(metered(Endpoint::Delete, Framing::Json, "").terminal);
}

#[test]
fn a_broken_record_spoils_no_other() {
    let good = r#"{"done":true,"done_reason":"stop","eval_count":17}"#;
    for bad in [
        "{\"done\":tru",
        "}",
        "[DONE]",
        "{\"a\":[}",
        "{{",
        "\"",
        "{\"done\" true}",
        "{\"x\":\"",
        "garbage",
        "{\"a\":\"\\",
    ] {
        let usage = metered(Endpoint::Chat, Framing::Ndjson, &format!("{bad}\n{good}\n"));
        assert_eq!(counts(usage), (None, Some(17), Some("stop")), "{bad}");
    }
    // Garbage after the value is not the reply that belongs there.
    assert_eq!(metered(Endpoint::Chat, Framing::Json, &format!("{good}x")), Usage::default());
}

#[test]
fn finish_reasons_outside_the_grammar_are_not_kept() {
    let long = "x".repeat(33);
    for reason in ["", "Stop", "stop\\u0041", "a b", "<b>", "st\\nop", long.as_str()] {
        let body = format!("{{\"done\":true,\"done_reason\":\"{reason}\",\"eval_count\":1}}");
        let usage = metered(Endpoint::Chat, Framing::Json, &body);
        assert_eq!((usage.finish_reason, usage.terminal), (None, true), "{reason}");
    }
    assert!(Word::new("x".repeat(32).as_bytes()).is_some());
}

#[test]
fn an_event_in_several_data_lines_is_one_record() {
    let stream = "data: {\"choices\":\ndata: [{\"finish_reason\":\ndata:\"stop\"}]}\n\ndata: [DONE]\n\n";
    let usage = metered(Endpoint::ChatCompletions, Framing::Sse, stream);
    assert_eq!((counts(usage), usage.terminal), ((None, None, Some("stop")), true));
}

#[test]
fn deep_nesting_costs_nothing() {
    let deep = "[".repeat(1_000_000) + &"]".repeat(1_000_000);
    let usage = metered(Endpoint::Chat, Framing::Json, &format!("{{\"x\":{deep},\"done\":true,\"eval_count\":3}}"));
    assert_eq!(usage.output_tokens, Some(3));
}

#[test]
fn each_whole_record_of_a_stream_is_one_however_it_is_cut() {
    let line = "{\"model\":\"m\",\"message\":{\"role\":\"assistant\",\"content\":\"a\\\"b\"},\"done\":false}\n";
    let event = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":null}]}\n\n";
    for (endpoint, framing, record) in
        [(Endpoint::Chat, Framing::Ndjson, line), (Endpoint::ChatCompletions, Framing::Sse, event)]
    {
        let stream = record.repeat(7);
        for part_bytes in [1, 2, 13, stream.len()] {
            let mut meter = Meter::new(endpoint, framing);
            stream.as_bytes().chunks(part_bytes).for_each(|part| meter.feed(part));
            assert_eq!(meter.records(), 7, "{framing:?} in parts of {part_bytes}");
        }
    }
}
