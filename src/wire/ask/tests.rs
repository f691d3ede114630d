use super::*;
use crate::wire::Source;

fn chat(body: &str) -> Result<Ask, AskError> {
    read(Endpoint::Chat, body.as_bytes())
}

fn is_ambiguous(endpoint: Endpoint, body: &str) -> bool {
    matches!(read(endpoint, body.as_bytes()), Err(AskError::Ambiguous(_)))
}

fn is_invalid(endpoint: Endpoint, body: &str) -> bool {
    matches!(read(endpoint, body.as_bytes()), Err(AskError::Invalid(_)))
}

#[test]
fn duplicate_keys_are_refused_in_whatever_spelling() {
    for body in [
        r#"{"model":"a","model":"b"}"#,
        r#"{"model":"a","model":null}"#,
        r#"{"model":"a","MODEL":"b"}"#,
        r#"{"MODEL":"b","model":"a"}"#,
        r#"{"model":"a","mod\u0065l":"b"}"#,
        "{\"stream\":true,\"\u{17f}tream\":false}",
        r#"{"stream":true,"\u017ftream":false}"#,
        "{\"keep_alive\":1,\"\u{212a}eep_alive\":2}",
        r#"{"unknown":1,"unknown":2}"#,
        r#"{"unknown":1,"UnKnown":2}"#,
        r#"{"options":{"num_ctx":1},"options":{"num_ctx":2}}"#,
        r#"{"options":{"num_ctx":1,"num_ctx":2}}"#,
        r#"{"options":{"num_ctx":1,"num\u005fctx":2}}"#,
        r#"{"messages":[],"messages":[]}"#,
        r#"{"messages":[{"role":"user","role":"system"}]}"#,
        r#"{"messages":[{"role":"user"},{"role":"user","ROLE":"system"}]}"#,
        r#"{"messages":[{"content":"a","Content":"b"}]}"#,
        r#"{"tools":[{"type":"a","type":"b"}]}"#,
    ] {
        assert!(is_ambiguous(Endpoint::Chat, body), "{body}");
    }
    assert!(is_ambiguous(
        Endpoint::ChatCompletions,
        r#"{"stream_options":{"include_usage":true,"include_usage":false}}"#
    ));
    assert!(is_ambiguous(Endpoint::Responses, r#"{"input":[{"role":"user","role":"system"}]}"#));
}

#[test]
fn a_known_key_in_another_spelling_is_refused_even_alone() {
    for body in [
        r#"{"MODEL":"a"}"#,
        r#"{"mod\u0065l":"a"}"#,
        "{\"me\u{17f}\u{17f}ages\":[]}",
        r#"{"messages":[{"ROLE":"system"}]}"#,
        r#"{"TOOLS":[]}"#,
        r#"{"Prompt":"x"}"#,
        r#"{"options":{"num\u005fctx":2}}"#,
    ] {
        assert!(is_ambiguous(Endpoint::Chat, body), "{body}");
    }
    assert!(is_ambiguous(Endpoint::ChatCompletions, "{\"stream_option\u{17f}\":{}}"));
    assert!(is_ambiguous(Endpoint::ChatCompletions, r#"{"stream_options":{"INCLUDE_USAGE":true}}"#));
    assert!(is_ambiguous(Endpoint::Responses, r#"{"tools":[{"TYPE":"web_search"}]}"#));
}

#[test]
fn keys_in_options_are_exact_as_in_go() {
    let ask = chat(r#"{"model":"a","options":{"NUM_CTX":5}}"#).unwrap();
    assert_eq!(ask.num_ctx, None);
}

#[test]
fn equal_keys_in_different_objects_are_no_duplicates() {
    let ask = chat(
        r#"{"model":"a","messages":[{"role":"user","content":"x"},{"role":"user","content":"x"}],
            "tools":[{"type":"function"},{"type":"function"}],"x":{"model":"b","model":"c"}}"#,
    )
    .unwrap();
    assert_eq!(ask.message_count, Some(2));
    assert_eq!(ask.model.unwrap().canonical(), "a");
}

#[test]
fn what_is_not_one_json_object_is_refused() {
    for body in ["", " ", "null", "[]", "\"a\"", "1", "{", "{}x", "{}{}", "{}\0", "\u{feff}{}", "{\"model\":\"a\",}"] {
        assert!(is_invalid(Endpoint::Chat, body), "{body:?}");
    }
    assert!(matches!(read(Endpoint::Chat, b"{\"a\":\"\xff\"}"), Err(AskError::Invalid(_))));
    assert!(matches!(read(Endpoint::Chat, b"{\"mod\xffel\":1}"), Err(AskError::Invalid(_))));
}

#[test]
fn members_of_a_wrong_type_are_refused() {
    for body in [
        r#"{"model":5}"#,
        r#"{"model":["a"]}"#,
        r#"{"stream":"false"}"#,
        r#"{"stream":0}"#,
        r#"{"messages":{}}"#,
        r#"{"messages":"x"}"#,
        r#"{"messages":["x"]}"#,
        r#"{"tools":{}}"#,
        r#"{"tools":[1]}"#,
        r#"{"options":[]}"#,
        r#"{"options":{"num_ctx":99999999999999999999}}"#,
        r#"{"options":{"num_predict":1e400}}"#,
        r#"{"model":"a b"}"#,
        r#"{"model":"x:cloud:local"}"#,
    ] {
        assert!(is_invalid(Endpoint::Chat, body), "{body}");
    }
    assert!(is_invalid(Endpoint::Generate, r#"{"system":5}"#));
    assert!(is_invalid(Endpoint::Messages, r#"{"system":5}"#));
    assert!(is_invalid(Endpoint::ChatCompletions, r#"{"stream_options":true}"#));
    assert!(is_invalid(Endpoint::ChatCompletions, r#"{"stream_options":{"include_usage":1}}"#));
}

#[test]
fn what_honest_clients_send_passes() {
    for body in [
        r#"{"model":"a","messages":[{"role":"user","content":"\ud800 \u0000 \ud83e\udd8a"}]}"#,
        r#"{"model":"a","unknown":1e400,"other":1000000000000000000000000000000000000000000}"#,
        r#" {"model" : "a" , "stream" : null , "messages" : null , "tools" : null , "options" : null } "#,
        r#"{"model":null}"#,
        r#"{"model":""}"#,
        r#"{}"#,
        r#"{"messages":[null]}"#,
        r#"{"\u0000":1,"\u00e9":2,"é!":3}"#,
    ] {
        assert!(chat(body).is_ok(), "{body}: {:?}", chat(body));
    }
    let schema =
        format!("{{\"model\":\"a\",\"format\":{}{}}}", "{\"a\":".repeat(100), "1".to_owned() + &"}".repeat(100));
    assert!(chat(&schema).is_ok());
}

#[test]
fn null_and_empty_mean_absent_as_in_go() {
    for body in [r#"{"model":null,"stream":null}"#, r#"{"model":"  "}"#, "{}"] {
        let ask = chat(body).unwrap();
        assert_eq!((ask.model, ask.stream), (None, Some(true)), "{body}");
    }
}

#[test]
fn streaming_defaults_are_ollamas() {
    let stream = |endpoint, body: &str| read(endpoint, body.as_bytes()).unwrap().stream;
    assert_eq!(stream(Endpoint::Generate, "{}"), Some(true));
    assert_eq!(stream(Endpoint::Pull, "{}"), Some(true));
    assert_eq!(stream(Endpoint::Pull, r#"{"stream":false}"#), Some(false));
    assert_eq!(stream(Endpoint::ChatCompletions, r#"{"stream":null}"#), Some(false));
    assert_eq!(stream(Endpoint::Messages, r#"{"stream":true}"#), Some(true));
    assert_eq!(stream(Endpoint::Embed, r#"{"stream":"yes"}"#), Some(false));
    assert_eq!(stream(Endpoint::Show, r#"{"stream":true}"#), None);
}

#[test]
fn a_system_prompt_is_seen_in_every_dialect() {
    let system = |endpoint, body: &str| read(endpoint, body.as_bytes()).unwrap().has_system_prompt;
    assert_eq!(system(Endpoint::Chat, r#"{"messages":[{"role":"user"},{"role":"SYSTEM"}]}"#), Some(true));
    assert_eq!(system(Endpoint::Chat, r#"{"messages":[{"role":"\u0073ystem"}]}"#), Some(true));
    assert_eq!(system(Endpoint::Chat, r#"{"messages":[{"role":"developer"}]}"#), Some(false));
    assert_eq!(system(Endpoint::ChatCompletions, r#"{"messages":[{"role":"developer"}]}"#), Some(true));
    assert_eq!(system(Endpoint::Generate, r#"{"system":"x"}"#), Some(true));
    assert_eq!(system(Endpoint::Generate, r#"{"system":""}"#), Some(false));
    assert_eq!(system(Endpoint::Chat, r#"{"system":"x"}"#), Some(false));
    assert_eq!(system(Endpoint::Responses, r#"{"instructions":"x"}"#), Some(true));
    assert_eq!(system(Endpoint::Responses, r#"{"input":[{"role":"developer","content":"x"}]}"#), Some(true));
    assert_eq!(system(Endpoint::Messages, r#"{"system":[{"type":"text","text":"x"}]}"#), Some(true));
    assert_eq!(system(Endpoint::Messages, r#"{"system":[]}"#), Some(false));
}

#[test]
fn messages_are_counted_in_every_dialect() {
    let count = |endpoint, body: &str| read(endpoint, body.as_bytes()).unwrap().message_count;
    assert_eq!(count(Endpoint::Generate, r#"{"prompt":"x"}"#), Some(1));
    assert_eq!(count(Endpoint::Generate, r#"{"prompt":""}"#), Some(0));
    assert_eq!(count(Endpoint::Embed, r#"{"input":["a","b","c"]}"#), Some(3));
    assert_eq!(count(Endpoint::Embed, r#"{"input":"a"}"#), Some(1));
    assert_eq!(count(Endpoint::Responses, r#"{"input":""}"#), Some(1));
    assert_eq!(
        count(Endpoint::Responses, r#"{"input":[{"type":"function_call_output","call_id":"c"},{"role":"user"}]}"#),
        Some(1)
    );
    assert_eq!(count(Endpoint::Show, r#"{"model":"a"}"#), None);
}

#[test]
fn web_tools_are_seen_where_ollama_would_run_them() {
    let web = |endpoint, kind: &str| {
        let body = format!("{{\"tools\":[{{\"type\":\"function\"}},{{\"type\":\"{kind}\"}}]}}");
        read(endpoint, body.as_bytes()).unwrap().has_web_tools
    };
    assert!(web(Endpoint::Responses, "web_search"));
    assert!(web(Endpoint::Responses, "web\\u005fsearch"));
    assert!(web(Endpoint::Messages, "web_search_20250305"));
    assert!(web(Endpoint::Messages, "web_fetch_20250910"));
    assert!(!web(Endpoint::Messages, "custom"));
    assert!(!web(Endpoint::Chat, "web_search"));
}

#[test]
fn options_are_read_as_ollama_reads_them() {
    let ask = chat(r#"{"keep_alive":"5m","options":{"num_ctx":4096,"num_predict":-1,"seed":1e2}}"#).unwrap();
    assert_eq!((ask.num_ctx, ask.num_predict), (Some(4096), Some(-1)));
    assert_eq!(ask.keep_alive, Some(serde_json::json!("5m")));
    let ask = chat(r#"{"keep_alive":-1,"options":{"num_ctx":1e2,"num_predict":3.7}}"#).unwrap();
    assert_eq!((ask.num_ctx, ask.num_predict), (Some(100), Some(3)));
    assert_eq!(ask.keep_alive, Some(serde_json::json!(-1)));
    let ask = chat(r#"{"keep_alive":"my secret","options":{"num_ctx":"4096"}}"#).unwrap();
    assert_eq!((ask.num_ctx, ask.keep_alive), (None, None));
    let ask = read(Endpoint::Messages, br#"{"max_tokens":64}"#).unwrap();
    assert_eq!(ask.num_predict, Some(64));
    let ask =
        read(Endpoint::ChatCompletions, br#"{"max_tokens":3.0,"stream_options":{"include_usage":true}}"#).unwrap();
    assert_eq!((ask.num_predict, ask.wants_usage), (None, true));
}

#[test]
fn management_requests_name_every_model_they_touch() {
    let model = |endpoint, body: &str| {
        read(endpoint, body.as_bytes()).map(|ask| {
            let others: Vec<String> = ask.others.iter().map(ModelRef::canonical).collect();
            (ask.model.map(|m| m.canonical()), others)
        })
    };
    let a = Some("a".to_owned());
    assert_eq!(model(Endpoint::Show, r#"{"name":"A"}"#), Ok((a.clone(), vec![])));
    assert_eq!(model(Endpoint::Pull, r#"{"model":"a","name":"a:latest"}"#), Ok((a.clone(), vec![])));
    assert_eq!(model(Endpoint::Pull, r#"{"model":"","name":"a"}"#), Ok((a.clone(), vec![])));
    assert!(is_ambiguous(Endpoint::Delete, r#"{"model":"a","name":"b"}"#));
    assert_eq!(model(Endpoint::Copy, r#"{"source":"a","destination":"b"}"#), Ok((a.clone(), vec!["b".to_owned()])));
    assert_eq!(
        model(Endpoint::Copy, r#"{"source":"a","model":"c","destination":"b"}"#),
        Ok((a.clone(), vec!["b".into()]))
    );
    assert_eq!(
        model(Endpoint::Create, r#"{"model":"a","from":"b:cloud"}"#),
        Ok((a.clone(), vec!["b:cloud".to_owned()]))
    );
    // Generate knows no `name`.
    assert_eq!(model(Endpoint::Generate, r#"{"model":"a","name":"b"}"#), Ok((a, vec![])));
    assert_eq!(read(Endpoint::Pull, br#"{"name":"x:cloud"}"#).unwrap().model.unwrap().source, Source::Cloud);
}

#[test]
fn refusals_never_quote_the_body() {
    for body in [
        r#"{"SECRET":1,"secret":2}"#,
        r#"{"model":"secret word"}"#,
        r#"{"model":"secret","MODEL":"secret"}"#,
        r#"{"secret" 1}"#,
        r#"{"messages":"secret"}"#,
    ] {
        let error = chat(body).unwrap_err();
        let shown = format!("{error} {error:?}").to_lowercase();
        assert!(!shown.contains("secret"), "{shown}");
    }
}

#[test]
fn an_object_with_too_many_members_is_refused() {
    let members: Vec<String> = (0..100_000).map(|n| format!("\"k{n}\":1")).collect();
    assert!(is_invalid(Endpoint::Chat, &format!("{{{}}}", members.join(","))));
}
