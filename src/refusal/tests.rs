use super::*;
use serde_json::{Value, json};

/// One refusal of every code, made by its constructor.
fn one_of_each() -> Vec<Refusal> {
    let why = ["model not approved".to_owned()];
    vec![
        Refusal::ambiguous_body("`model` is written twice"),
        Refusal::invalid_body("it is not JSON"),
        Refusal::bad_framing("Content-Length is repeated"),
        Refusal::unsupported_operation("speech"),
        Refusal::unsupported_parameter("previous_response_id"),
        Refusal::missing_token(),
        Refusal::invalid_token("expired"),
        Refusal::policy_denied(&why),
        Refusal::policy_escalated(&why),
        Refusal::insufficient_scope("web:write"),
        Refusal::revoked(),
        Refusal::egress_denied("a cloud model"),
        Refusal::unknown_route(),
        Refusal::method_not_allowed("GET, HEAD"),
        Refusal::slow_request("body"),
        Refusal::body_too_large(64 << 20),
        Refusal::unsupported_encoding(),
        Refusal::head_too_large(32 << 10),
        Refusal::rate_limited(3),
        Refusal::budget_exhausted("tokens of this hour", 90),
        Refusal::queue_share_full(2),
        Refusal::internal_error(),
        Refusal::bad_backend_reply("not JSON"),
        Refusal::backend_unreachable(&["http://localhost:11434"]),
        Refusal::audit_unavailable("disk full"),
        Refusal::policy_unavailable("no policy is loaded"),
        Refusal::keys_unavailable(),
        Refusal::control_plane_unavailable("it cannot be reached"),
        Refusal::no_backend(),
        Refusal::queue_full("requests in flight"),
        Refusal::shutting_down(),
        Refusal::backend_timeout(300),
    ]
}

fn header<'a>(headers: &'a [(&'static str, Cow<'static, str>)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_ref())
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn every_code_of_the_contract_has_its_status() {
    let found: Vec<(u16, &str)> = Code::ALL.iter().map(|c| (c.status(), c.as_str())).collect();
    let contract = [
        (400, "ambiguous_body"),
        (400, "invalid_body"),
        (400, "bad_framing"),
        (400, "unsupported_operation"),
        (400, "unsupported_parameter"),
        (401, "missing_token"),
        (401, "invalid_token"),
        (403, "policy_denied"),
        (403, "policy_escalated"),
        (403, "insufficient_scope"),
        (403, "revoked"),
        (403, "egress_denied"),
        (404, "unknown_route"),
        (405, "method_not_allowed"),
        (408, "slow_request"),
        (413, "body_too_large"),
        (415, "unsupported_encoding"),
        (431, "head_too_large"),
        (429, "rate_limited"),
        (429, "budget_exhausted"),
        (429, "queue_full"),
        (500, "internal_error"),
        (502, "bad_backend_reply"),
        (502, "backend_unreachable"),
        (503, "audit_unavailable"),
        (503, "policy_unavailable"),
        (503, "keys_unavailable"),
        (503, "control_plane_unavailable"),
        (503, "no_backend"),
        (503, "queue_full"),
        (503, "shutting_down"),
        (504, "backend_timeout"),
    ];
    assert_eq!(found, contract);
}

#[test]
fn every_code_has_a_constructor_with_words() {
    let made = one_of_each();
    assert_eq!(made.iter().map(|r| r.code).collect::<Vec<_>>(), Code::ALL);
    for refusal in made {
        assert!(refusal.detail.len() > 15, "{refusal:?}");
        assert!(!refusal.cause.is_empty(), "{refusal:?}");
    }
}

#[test]
fn every_body_has_what_the_clients_of_its_dialect_read() {
    for refusal in one_of_each() {
        let native: Value = serde_json::from_slice(&refusal.body(Dialect::Native, "r1")).unwrap();
        // ollama-python and -js read `error` as a string, Behavry's clients `detail`.
        assert_eq!(native["error"], *refusal.detail);
        assert_eq!(native["detail"], *refusal.detail);
        assert_eq!(native["code"], refusal.code.as_str());

        let openai: Value = serde_json::from_slice(&refusal.body(Dialect::OpenAi, "r1")).unwrap();
        let error = openai["error"].as_object().unwrap();
        assert_eq!(error.keys().collect::<Vec<_>>().len(), 4);
        assert_eq!(error["message"], *refusal.detail);
        assert_eq!(error["type"], refusal.code.openai_type());
        assert_eq!(error["code"], refusal.code.as_str());
        assert_eq!(error["param"], refusal.param.clone().map_or(Value::Null, Value::from));
        assert_eq!(openai["detail"], *refusal.detail);

        let anthropic: Value = serde_json::from_slice(&refusal.body(Dialect::Anthropic, "r1")).unwrap();
        assert_eq!(
            anthropic,
            json!({"type": "error", "request_id": "r1",
                   "error": {"type": refusal.code.anthropic_type(), "message": *refusal.detail}})
        );
    }
}

#[test]
fn the_shapes_are_these_bytes() {
    let refusal = Refusal::backend_unreachable(&["http://localhost:11434"]);
    assert_eq!(
        text(&refusal.body(Dialect::Native, "r1")),
        r#"{"error":"Cannot reach Ollama at http://localhost:11434. Is it running?","detail":"Cannot reach Ollama at http://localhost:11434. Is it running?","code":"backend_unreachable"}"#
    );
    assert_eq!(
        text(&refusal.body(Dialect::OpenAi, "r1")),
        r#"{"error":{"message":"Cannot reach Ollama at http://localhost:11434. Is it running?","type":"api_error","param":null,"code":"backend_unreachable"},"detail":"Cannot reach Ollama at http://localhost:11434. Is it running?"}"#
    );
    assert_eq!(
        text(&refusal.body(Dialect::Anthropic, "r1")),
        r#"{"type":"error","error":{"type":"api_error","message":"Cannot reach Ollama at http://localhost:11434. Is it running?"},"request_id":"r1"}"#
    );
    assert_eq!(
        text(&Refusal::unsupported_operation("file_upload").body(Dialect::OpenAi, "r1")),
        r#"{"error":{"message":"file_upload is not supported by ollama provider","type":"invalid_request_error","param":null,"code":"unsupported_operation"},"detail":"file_upload is not supported by ollama provider","extra_fields":{"provider":"ollama","request_type":"file_upload"}}"#
    );
    assert_eq!(
        text(&Refusal::unsupported_parameter("input[2].type").body(Dialect::OpenAi, "r1")),
        r#"{"error":{"message":"input[2].type is not supported here. Leave it out.","type":"invalid_request_error","param":"input[2].type","code":"unsupported_parameter"},"detail":"input[2].type is not supported here. Leave it out."}"#
    );
}

#[test]
fn the_frames_are_these_bytes() {
    let refusal = Refusal::shutting_down();
    assert_eq!(
        text(&refusal.frame(Stream::Lines, false)),
        "{\"error\":\"The proxy is shutting down. Send the request again.\"}\n"
    );
    assert_eq!(
        text(&refusal.frame(Stream::Choices, false)),
        "data: {\"error\":{\"message\":\"The proxy is shutting down. Send the request again.\",\"type\":\"api_error\",\"param\":null,\"code\":\"shutting_down\"}}\n\n"
    );
    assert_eq!(
        text(&refusal.frame(Stream::Messages, false)),
        "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"The proxy is shutting down. Send the request again.\"}}\n\n"
    );
    assert_eq!(
        text(&refusal.frame(Stream::Responses { sequence_number: 7 }, false)),
        "event: error\ndata: {\"type\":\"error\",\"code\":\"shutting_down\",\"message\":\"The proxy is shutting down. Send the request again.\",\"param\":null,\"error\":{\"message\":\"The proxy is shutting down. Send the request again.\",\"type\":\"api_error\",\"param\":null,\"code\":\"shutting_down\"},\"sequence_number\":7}\n\n"
    );
    assert!(refusal.frame(Stream::Lines, true).starts_with(b"\n{"));
    assert!(refusal.frame(Stream::Choices, true).starts_with(b"\n\ndata: {"));
}

#[test]
fn a_frame_is_one_record_whatever_its_words() {
    let refusal = Refusal::policy_denied(&["a\r\nb\n\ndata: [DONE]\u{2028}\u{1b}[31m\"\\".to_owned()]);
    let line = refusal.frame(Stream::Lines, false);
    assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
    serde_json::from_slice::<Value>(&line).unwrap();
    for stream in [Stream::NativeEvents, Stream::Choices, Stream::Responses { sequence_number: 0 }, Stream::Messages] {
        let event = refusal.frame(stream, false);
        let event = text(&event);
        assert_eq!(event.matches("\n\n").count(), 1);
        assert!(event.ends_with("\n\n") && !event.contains('\r') && !event.contains('\u{1b}'), "{event:?}");
        let data = event.lines().find_map(|l| l.strip_prefix("data: ")).unwrap();
        serde_json::from_str::<Value>(data).unwrap();
    }
}

#[test]
fn headers_say_how_to_go_on() {
    for refusal in one_of_each() {
        let headers = refusal.headers();
        let status = refusal.status();
        assert!(header(&headers, "content-type").unwrap().contains("application/json"));
        assert_eq!(header(&headers, "www-authenticate"), (status == 401).then_some("Bearer"), "{status}");
        assert_eq!(header(&headers, "retry-after").is_some(), status == 429 || status == 503, "{refusal:?}");
        assert_eq!(header(&headers, "allow").is_some(), status == 405);
        if status == 403 {
            assert_eq!(header(&headers, "x-should-retry"), Some("false"));
        }
    }
    assert_eq!(header(&Refusal::method_not_allowed("GET, HEAD").headers(), "allow"), Some("GET, HEAD"));
    assert_eq!(header(&Refusal::rate_limited(7).headers(), "retry-after"), Some("7"));
    assert_eq!(header(&Refusal::no_backend().headers(), "retry-after"), Some("5"));
    assert_eq!(header(&Refusal::backend_timeout(300).headers(), "x-should-retry"), Some("false"));
}

#[test]
fn a_bad_token_is_told_one_thing_whatever_its_cause() {
    let [a, b] = [Refusal::invalid_token("expired"), Refusal::invalid_token("bad_signature")];
    assert_eq!(a.body(Dialect::Native, "r"), b.body(Dialect::Native, "r"));
    assert_eq!(a.headers(), b.headers());
    assert_ne!(a.cause, b.cause);
    assert!(a.detail.ends_with("fetch a new token: POST /api/v1/auth/token"), "{}", a.detail);
}

#[test]
fn a_denial_repeats_the_policys_words_within_bounds() {
    let two = Refusal::policy_denied(&["external agents".to_owned(), "model not approved".to_owned()]);
    assert_eq!(two.detail, "The policy denies this request: external agents; model not approved");
    assert_eq!(Refusal::policy_denied(&[]).detail, "The policy denies this request.");
    let many: Vec<String> = (0..10_000).map(|_| "é".repeat(50)).collect();
    assert!(Refusal::policy_denied(&many).detail.len() < REASONS_MAX_BYTES + 100);
    assert!(Refusal::policy_denied(&["é".repeat(5_000)]).detail.ends_with(" .."));
}

#[test]
fn several_backends_that_were_tried_are_all_named() {
    let refusal = Refusal::backend_unreachable(&["http://a:1", "http://b:2"]);
    assert_eq!(refusal.detail, "Cannot reach Ollama at http://a:1, http://b:2. Is it running?");
}

#[test]
fn the_missing_permission_is_named() {
    assert!(Refusal::insufficient_scope("web:write").detail.contains("web:write"));
}
