use super::*;

const CHAT: &str = concat!(
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"say \\\"usage\\\": {}, \\\"choices\\\":[]\"}}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":24,\"completion_tokens\":17}}\n\n",
    "data: [DONE]\n\n"
);

/// The stream through a hider in the given parts.
fn hidden(endpoint: Endpoint, parts: &[&[u8]]) -> Vec<u8> {
    let mut hider = UsageHider::new(endpoint);
    let mut out = vec![];
    for part in parts {
        out.extend_from_slice(&hider.pass(Bytes::copy_from_slice(part)));
    }
    out.extend_from_slice(&hider.finish());
    out
}

#[test]
fn the_usage_event_is_hidden_at_every_split() {
    let start = CHAT.find("data: {\"id\":\"c\",\"choices\":[],").unwrap();
    let end = CHAT.find("data: [DONE]").unwrap();
    let wanted = [&CHAT.as_bytes()[..start], &CHAT.as_bytes()[end..]].concat();
    let stream = CHAT.as_bytes();
    for first in 0..=stream.len() {
        for second in first..=stream.len() {
            let parts = [&stream[..first], &stream[first..second], &stream[second..]];
            assert_eq!(hidden(Endpoint::ChatCompletions, &parts), wanted, "{first} {second}");
        }
    }
    let bytes: Vec<&[u8]> = stream.chunks(1).collect();
    assert_eq!(hidden(Endpoint::ChatCompletions, &bytes), wanted);
}

#[test]
fn usage_is_cut_from_every_chunk_wherever_it_stands() {
    for (event, wanted) in [
        ("{\"choices\":[{}],\"usage\":{\"a\":0}}", "{\"choices\":[{}]}"),
        ("{\"choices\":[{}],\"usage\":{\"a\":0},\"x\":1}", "{\"choices\":[{}],\"x\":1}"),
        ("{\"usage\":{\"a\":0},\"choices\":[{}]}", "{\"choices\":[{}]}"),
        ("{ \"usage\" : null , \"choices\":[{}]}", "{ \"choices\":[{}]}"),
        ("{\"usage\":null}", "{}"),
        // Not ours to cut: inside a choice, not JSON, no object.
        ("{\"choices\":[{\"usage\":1}]}", "{\"choices\":[{\"usage\":1}]}"),
        ("{\"usage\":", "{\"usage\":"),
        ("[\"usage\"]", "[\"usage\"]"),
        ("\"usage\"", "\"usage\""),
    ] {
        let stream = format!("data: {event}\n\ndata: [DONE]\n\n");
        let out = hidden(Endpoint::Completions, &[stream.as_bytes()]);
        assert_eq!(String::from_utf8(out).unwrap(), format!("data: {wanted}\n\ndata: [DONE]\n\n"));
    }
}

#[test]
fn a_chunk_with_nothing_to_hide_passes_without_a_copy() {
    let chunk = Bytes::from_static(b"data: {\"choices\":[{\"delta\":{}}]}\n\ndata: {\"choices\":[{}]}\n\n");
    let mut hider = UsageHider::new(Endpoint::ChatCompletions);
    let out = hider.pass(chunk.clone());
    assert_eq!((out.as_ptr(), out.len()), (chunk.as_ptr(), chunk.len()));
    // Complete events pass at once, also when another has begun.
    let out = hider.pass(Bytes::from_static(b"data: {}\n\ndata: {\"choi"));
    assert_eq!(out, "data: {}\n\n");
    // The last chunk of Ollama: finish, usage and [DONE] together.
    let mut hider = UsageHider::new(Endpoint::ChatCompletions);
    assert_eq!(
        hider.pass(Bytes::from_static(b"data: {\"choices\":[],\"usage\":{}}\n\ndata: [DONE]\n\n")),
        "data: [DONE]\n\n"
    );
}

#[test]
fn an_event_too_long_to_hold_passes_and_the_next_is_judged_again() {
    let long = format!("data: {{\"choices\":[{{\"x\":\"{}\"}}],\"usage\":1}}\n\n", "y".repeat(3 * LONGEST_HELD_BYTES));
    let stream = format!("{long}data: {{\"choices\":[],\"usage\":{{}}}}\n\ndata: [DONE]\n\n");
    let wanted = format!("{long}data: [DONE]\n\n");
    for size in [1000, 4096, LONGEST_HELD_BYTES + 1] {
        let mut hider = UsageHider::new(Endpoint::ChatCompletions);
        let mut out = vec![];
        for part in stream.as_bytes().chunks(size) {
            out.extend_from_slice(&hider.pass(Bytes::copy_from_slice(part)));
            assert!(hider.held.len() <= LONGEST_HELD_BYTES);
        }
        out.extend_from_slice(&hider.finish());
        assert!(out == wanted.as_bytes(), "pieces of {size}: {} bytes", out.len());
    }
}

#[test]
fn other_endpoints_pass_untouched() {
    assert_eq!(hidden(Endpoint::Messages, &[CHAT.as_bytes()]), CHAT.as_bytes());
}

#[test]
fn a_stream_that_ends_in_an_event_loses_nothing() {
    assert_eq!(hidden(Endpoint::ChatCompletions, &[b"data: {\"choices\":[", b"]"]), b"data: {\"choices\":[]");
}
