use super::*;

fn mended(endpoint: Endpoint, framing: Framing, parts: &[&[u8]]) -> (String, Mender) {
    let mut mender = Mender::new(endpoint, framing);
    let mut out = vec![];
    for part in parts {
        out.extend_from_slice(&mender.pass(Bytes::copy_from_slice(part)));
    }
    out.extend_from_slice(&mender.finish());
    (String::from_utf8(out).unwrap(), mender)
}

/// The same at every split into two, and byte by byte.
fn always(endpoint: Endpoint, stream: &str) -> (String, Mender) {
    let bytes = stream.as_bytes();
    let whole = mended(endpoint, Framing::Sse, &[bytes]);
    for at in 0..=bytes.len() {
        let (out, mender) = mended(endpoint, Framing::Sse, &[&bytes[..at], &bytes[at..]]);
        assert_eq!(out, whole.0, "cut at {at}");
        assert_eq!(mender.next_event(), whole.1.next_event(), "cut at {at}");
        assert_eq!(mender.is_mid_record(), whole.1.is_mid_record(), "cut at {at}");
        assert_eq!(mender.told_error(), whole.1.told_error(), "cut at {at}");
    }
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    assert_eq!(mended(endpoint, Framing::Sse, &single).0, whole.0, "byte by byte");
    whole
}

const HEL: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hel\"},\"finish_reason\":null}]}\n\n";
const TOLD: &str = "data: {\"error\":{\"message\":\"model runner has \\\"stopped\\\"\",\"type\":\"api_error\",\"param\":null,\"code\":null}}\n\n";

#[test]
fn an_error_that_is_a_text_becomes_the_dialects_event() {
    for line in [
        "data: {\"error\":\"model runner has \\\"stopped\\\"\"}\n\n",
        "data:{ \"error\" : \"model runner has \\\"stopped\\\"\" }\n\n",
        "data: {\"error\":\"model runner has \\\"stopped\\\"\"}\r\n\r\n",
        "{\"error\":\"model runner has \\\"stopped\\\"\"}\n",
        "{\"error\":\"model runner has \\\"stopped\\\"\"}",
        "{\"error\":{\"message\":\"model runner has \\\"stopped\\\"\",\"code\":500}}\n",
    ] {
        for endpoint in [Endpoint::ChatCompletions, Endpoint::Completions] {
            let (out, mender) = always(endpoint, &format!("{HEL}{line}"));
            assert_eq!(out, format!("{HEL}{TOLD}"), "{line}");
            assert!(mender.told_error() && !mender.is_mid_record(), "{line}");
        }
    }
    let (out, _) = always(Endpoint::Messages, "event: error\ndata: {\"error\":\"no\"}\n\n");
    assert_eq!(
        out,
        "event: error\n\nevent: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"no\"}}\n\n"
    );
    let before = "event: response.created\ndata: {\"sequence_number\":0}\n\ndata: {\"sequence_number\":1}\n\n";
    for line in ["data: {\"error\":\"no\"}\n\n", "{\"error\":\"no\"}\n"] {
        let (out, mender) = always(Endpoint::Responses, &format!("{before}{line}"));
        assert_eq!(
            out.strip_prefix(before),
            Some(
                "event: error\ndata: {\"type\":\"error\",\"code\":null,\"message\":\"no\",\"param\":null,\"error\":{\"message\":\"no\",\"type\":\"api_error\",\"param\":null,\"code\":null},\"sequence_number\":2}\n\n"
            )
        );
        assert_eq!(mender.next_event(), 3);
    }
}

#[test]
fn a_record_that_was_open_is_ended_before_the_error() {
    let (out, _) = always(Endpoint::ChatCompletions, "data: {\"a\":1}\n{\"error\":\"no\"}\n");
    assert!(out.starts_with("data: {\"a\":1}\n\ndata: {\"error\":"), "{out}");
}

#[test]
fn everything_else_passes_as_it_came() {
    let long = format!("data: {{\"error\":\"{}\"}}\n\n", "x".repeat(LONGEST_HELD_BYTES));
    for stream in [
        HEL,
        TOLD,
        "data: {\"error\":null}\n\n",
        "data: {\"error\":[1]}\n\n",
        "data: {\"error\":\"cut",
        "data: {\"error\"",
        "data: {\"choices\":[{\"delta\":{\"content\":\"data: {\\\"error\\\":\\\"x\\\"}\"}}]}\n\ndata: [DONE]\n\n",
        ": comment\n\nevent: x\ndata: {not json}\n\n\n\n",
        "dat",
        "{\"errors\":\"x\"}\n",
    ] {
        let (out, mender) = always(Endpoint::ChatCompletions, stream);
        assert_eq!(out, stream);
        assert!(!mender.told_error(), "{stream}");
    }
    let (out, _) = mended(Endpoint::ChatCompletions, Framing::Sse, &long.as_bytes().chunks(1000).collect::<Vec<_>>());
    assert!(out == long, "a long line passes in the end");
    let native = "{\"error\":\"x\"}\n";
    assert_eq!(mended(Endpoint::Chat, Framing::Ndjson, &[native.as_bytes()]).0, native);
}

#[test]
fn a_chunk_without_an_error_is_not_copied() {
    let mut mender = Mender::new(Endpoint::ChatCompletions, Framing::Sse);
    let chunk = Bytes::from(HEL.repeat(3));
    let passed = mender.pass(chunk.clone());
    assert_eq!((passed.as_ptr(), passed.len()), (chunk.as_ptr(), chunk.len()));
    // The beginning of a record that is none is not held back.
    assert_eq!(mender.pass(Bytes::from_static(b"data: {\"ch")), "data: {\"ch");
    assert!(mender.is_mid_record());
}

#[test]
fn it_knows_whether_a_record_is_open() {
    for (endpoint, framing, stream, open) in [
        (Endpoint::Chat, Framing::Ndjson, "", false),
        (Endpoint::Chat, Framing::Ndjson, "{\"a\":1}\n", false),
        (Endpoint::Chat, Framing::Ndjson, "{\"a\":1}", true),
        (Endpoint::Messages, Framing::Sse, "", false),
        (Endpoint::Messages, Framing::Sse, "data: x\n\n", false),
        (Endpoint::Messages, Framing::Sse, "data: x\n", true),
        (Endpoint::Messages, Framing::Sse, "data: x", true),
    ] {
        assert_eq!(mended(endpoint, framing, &[stream.as_bytes()]).1.is_mid_record(), open, "{stream:?}");
    }
}
