use serde_json::Value;
use serde_json::value::RawValue;

use super::*;
use crate::wire::ask::{self, AskError};

fn all() -> Filters {
    Filter::ALL.into_iter().collect()
}

/// The body that is sent, and the filters that fired.
fn filtered(endpoint: Endpoint, body: &str, on: Filters) -> (String, Vec<&'static str>) {
    let read = ask::read_filtered(endpoint, body.as_bytes(), on).unwrap_or_else(|e| panic!("{e}: {body}"));
    let fired = read.fired.iter().map(Filter::as_str).collect();
    let sent = String::from_utf8(read.edits.apply(body.as_bytes())).unwrap();
    // What was judged is what is sent.
    let again = ask::read_filtered(endpoint, sent.as_bytes(), on).unwrap_or_else(|e| panic!("{e}: {sent}"));
    assert!(again.edits.is_empty() || sent.contains("ollama/"), "filtered twice: {sent}");
    let facts = ask::read(endpoint, sent.as_bytes()).unwrap();
    assert_eq!(ask::Ask { wants_usage: read.ask.wants_usage, ..facts }, read.ask, "{sent}");
    (sent, fired)
}

fn chat(body: &str) -> (String, Vec<&'static str>) {
    filtered(Endpoint::ChatCompletions, body, all())
}

// ---- Bifrost's cases

#[derive(serde::Deserialize)]
struct Case<'a> {
    case: String,
    #[serde(borrow)]
    client: Client<'a>,
}

#[derive(serde::Deserialize)]
struct Client<'a> {
    path: String,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
    raw_body: Option<String>,
}

const USER_65: &str = r#", "user": "uuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu""#;
const CACHE_CONTROL: &str = r#", "cache_control": {"type": "ephemeral"}"#;

/// What we change in the bodies of Bifrost's cases beside the model's prefix and the question for the counts: text by text. A case
/// that is not here passes byte for byte, though Bifrost changes many of them (bifrost-compat, section 2).
#[rustfmt::skip]
const CHANGED: &[(&str, &[(&str, &str)])] = &[
    ("chat_f_prompt_cache_key", &[(r#", "prompt_cache_key": "k1""#, "")]),
    ("chat_f_verbosity",        &[(r#", "verbosity": "low""#, "")]),
    ("chat_f_store",            &[(r#", "store": true"#, "")]),
    ("chat_f_service_tier",     &[(r#", "service_tier": "flex""#, "")]),
    ("chat_f_service_tier_auto", &[(r#", "service_tier": "auto""#, "")]),
    ("chat_f_all_s4",           ALL_S4),
    ("chat_f_all_s4_stream",    ALL_S4),
    ("chat_unknown_passthrough_known", &[(r#", "prompt_cache_key": "k""#, "")]),
    ("text_all",                &[(r#", "prompt_cache_key": "k""#, ""), (r#", "store": true"#, ""), (USER_65, "")]),
    ("chat_user_65",            &[(USER_65, "")]),
    ("chat_cc_image",           &[(CACHE_CONTROL, "")]),
    ("chat_cc_message",         &[(CACHE_CONTROL, "")]),
    ("chat_cc_part",            &[(CACHE_CONTROL, "")]),
    ("chat_cc_system",          &[(CACHE_CONTROL, "")]),
    ("chat_cc_tool",            &[(CACHE_CONTROL, "")]),
    ("chat_cc_tool_function",   &[(CACHE_CONTROL, "")]),
    ("chat_cc_tool_result",     &[(CACHE_CONTROL, "")]),
    ("chat_cc_toplevel",        &[(CACHE_CONTROL, "")]),
    ("chat_mct_0",              NEWER),
    ("chat_mct_1",              NEWER),
    ("chat_mct_5",              NEWER),
    ("chat_mct_15",             NEWER),
    ("chat_mct_16",             NEWER),
    ("chat_mct_100",            NEWER),
    ("chat_mct_m1",             NEWER),
    ("chat_mct_100_stream",     NEWER),
    ("chat_reasoning_max_tokens_cap", NEWER),
    ("chat_mct_100_mt_50",      &[NEWER[0], (r#", "max_tokens": 50"#, "")]),
    ("chat_mct_5_mt_50",        &[NEWER[0], (r#", "max_tokens": 50"#, "")]),
    ("chat_mct_openai_front",   &[NEWER[0], (r#", "max_tokens": 50"#, "")]),
    ("chat_so_false_stream",    &[(r#""include_usage": false"#, r#""include_usage": true"#)]),
];
const NEWER: &[(&str, &str)] = &[("max_completion_tokens", "max_tokens")];
const ALL_S4: &[(&str, &str)] = &[
    (r#", "prompt_cache_key": "k", "verbosity": "low", "store": false, "service_tier": "auto""#, ""),
    (USER_65, ""),
    NEWER[0],
];

#[test]
fn every_request_of_bifrosts_cases_is_sent_as_the_seed_says() {
    let path = format!("{}/tests/fixtures/bifrost/cases.jsonl", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let mut seen = 0;
    let mut changed: Vec<_> = CHANGED.iter().map(|(case, _)| *case).collect();
    for line in text.lines() {
        let Case { case, client } = serde_json::from_str(line).unwrap();
        let endpoint = match client.path.as_str() {
            "/v1/chat/completions" => Endpoint::ChatCompletions,
            "/v1/completions" => Endpoint::Completions,
            "/v1/embeddings" => Endpoint::OpenAiEmbeddings,
            _ => continue,
        };
        let body = client.raw_body.as_deref().or(client.body.map(RawValue::get)).unwrap();
        seen += 1;
        if case == "chat_dup_keys" {
            let refused = ask::read_filtered(endpoint, body.as_bytes(), all()).err();
            assert!(matches!(refused, Some(AskError::Ambiguous(_))), "{refused:?}");
            continue;
        }
        let mut wanted = body.replacen(r#""model": "ollama/"#, r#""model": ""#, 1);
        for (from, to) in CHANGED.iter().filter(|(name, _)| *name == case).flat_map(|(_, edits)| *edits) {
            assert_eq!(wanted.matches(from).count(), 1, "{case}: {from} in {wanted}");
            wanted = wanted.replacen(from, to, 1);
        }
        changed.retain(|name| *name != case);
        let asked: Value = serde_json::from_str(body).unwrap();
        if asked["stream"] == true && endpoint != Endpoint::OpenAiEmbeddings && asked["stream_options"].is_null() {
            wanted = wanted.replacen('{', r#"{"stream_options":{"include_usage":true},"#, 1);
        }
        let (sent, fired) = filtered(endpoint, body, all());
        assert_eq!(sent, wanted, "{case}");
        assert_eq!(fired.contains(&"model_prefix"), body.contains("\"ollama/"), "{case}");
        // With all of them off nothing is touched. (A host behind `ollama/` is no model's name.)
        if !body.contains("ollama/hf.co") {
            assert_eq!(filtered(endpoint, body, Filters::NONE), (body.to_owned(), vec![]), "{case}");
        }
    }
    assert_eq!((seen, changed), (212, vec![]), "cases, and entries of the table that no case has");
}

// ---- one by one

#[test]
fn each_filter_can_be_switched_off_and_has_its_word() {
    let body =
        r#"{"model":"ollama/a","messages":[{"role":"user","content":"x","cache_control":1}],"prompt_cache_key":"k",
        "verbosity":"low","store":true,"service_tier":"auto","user":"UUUUU","max_completion_tokens":5,"stream":true}"#
            .replace("UUUUU", &"u".repeat(65));
    let (_, every) = chat(&body);
    let but_web_tools: Vec<_> = Filter::ALL[..9].iter().map(|filter| filter.as_str()).collect();
    assert_eq!(every, but_web_tools);
    for off in &Filter::ALL[..9] {
        let on: Filters = Filter::ALL.into_iter().filter(|filter| filter != off).collect();
        let (sent, fired) = filtered(Endpoint::ChatCompletions, &body, on);
        let rest: Vec<_> = but_web_tools.iter().copied().filter(|name| *name != off.as_str()).collect();
        assert_eq!(fired, rest);
        let kept = match off {
            Filter::ModelPrefix => "ollama/",
            Filter::User => "\"user\"",
            Filter::IncludeUsage => "\"stream\":true}",
            other => other.as_str(),
        };
        assert!(sent.contains(kept), "{off:?}: {sent}");
    }
}

#[test]
fn of_the_two_bounds_of_an_answer_the_newer_wins_and_one_is_sent() {
    for (body, wanted, tokens) in [
        (r#"{"max_completion_tokens":7}"#, r#"{"max_tokens":7}"#, Some(7)),
        (r#"{ "max_completion_tokens" : 7 , "max_tokens": 9 }"#, r#"{ "max_tokens" : 7 }"#, Some(7)),
        (r#"{"max_tokens":9,"x":1,"max_completion_tokens":7}"#, r#"{"max_tokens":7,"x":1}"#, Some(7)),
        (r#"{"max_tokens":null,"max_completion_tokens":7}"#, r#"{"max_tokens":7}"#, Some(7)),
        (r#"{"max_completion_tokens":7,"max_tokens":null}"#, r#"{"max_tokens":7}"#, Some(7)),
        // Null is no wish.
        (
            r#"{"max_completion_tokens":null,"max_tokens":9}"#,
            r#"{"max_completion_tokens":null,"max_tokens":9}"#,
            Some(9),
        ),
        (
            r#"{"max_tokens":9,"max_completion_tokens":null}"#,
            r#"{"max_tokens":9,"max_completion_tokens":null}"#,
            Some(9),
        ),
        // Bifrost raises these to 16. What is no whole number is Ollama's to refuse, as it would `max_tokens`.
        (r#"{"max_completion_tokens":0}"#, r#"{"max_tokens":0}"#, Some(0)),
        (r#"{"max_completion_tokens":-1}"#, r#"{"max_tokens":-1}"#, Some(-1)),
        (r#"{"max_completion_tokens":"7"}"#, r#"{"max_tokens":"7"}"#, None),
        (r#"{"max_completion_tokens":7.0,"max_tokens":9}"#, r#"{"max_tokens":7.0}"#, None),
        (r#"{"max_compl\u0065tion_tokens":7}"#, r#"{"max_tokens":7}"#, Some(7)),
    ] {
        for endpoint in [Endpoint::ChatCompletions, Endpoint::Completions] {
            assert_eq!(filtered(endpoint, body, all()).0, wanted, "{body}");
            let facts = ask::read_filtered(endpoint, body.as_bytes(), all()).unwrap().ask;
            assert_eq!(facts.num_predict, tokens, "{body}");
        }
    }
    // Another spelling is a key that nobody reads; twice the same after folding is refused as ever.
    assert_eq!(chat(r#"{"Max_Completion_Tokens":7}"#).0, r#"{"Max_Completion_Tokens":7}"#);
    let twice = ask::read_filtered(Endpoint::ChatCompletions, br#"{"store":1,"STORE":2}"#, all());
    assert!(matches!(twice.err(), Some(AskError::Ambiguous(_))));
}

#[test]
fn cache_control_is_cut_where_it_is_a_directive_and_stays_where_it_is_content() {
    let cut = r#"{"a":1,"messages":[{"role":"user","content":[{"type":"text","text":"t"}]}],"tools":[{"type":"function","function":{"name":"f"}}]}"#;
    for body in [
        r#"{"cache_control":{"x":[1]},"a":1,"messages":[{"role":"user","content":[{"type":"text","text":"t"}]}],"tools":[{"type":"function","function":{"name":"f"}}]}"#,
        r#"{"a":1,"messages":[{"cache_control":1,"role":"user","content":[{"type":"text","text":"t"}]}],"tools":[{"type":"function","function":{"name":"f"}}]}"#,
        r#"{"a":1,"messages":[{"role":"user","content":[{"cache_control":1,"type":"text","text":"t"}]}],"tools":[{"type":"function","function":{"name":"f"}}]}"#,
        r#"{"a":1,"messages":[{"role":"user","content":[{"type":"text","text":"t","c\u0061che_control":null}]}],"tools":[{"type":"function","function":{"name":"f"}}]}"#,
        r#"{"a":1,"messages":[{"role":"user","content":[{"type":"text","text":"t"}]}],"tools":[{"type":"function","cache_control":{},"function":{"cache_control":{},"name":"f"}}]}"#,
    ] {
        assert_eq!(chat(body), (cut.to_owned(), vec!["cache_control"]), "{body}");
    }
    for stays in [
        r#"{"messages":[{"role":"user","content":"\"cache_control\":1"}]}"#,
        r#"{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{\"cache_control\":1}"}}]}]}"#,
        r#"{"messages":[{"role":"assistant","tool_calls":[{"cache_control":1,"function":{"arguments":{"cache_control":1}}}]}]}"#,
        r#"{"messages":[{"content":[{"type":"x","x":{"cache_control":1}},"cache_control"]}]}"#,
        r#"{"tools":[{"function":{"parameters":{"properties":{"cache_control":{"type":"string"}},"required":["cache_control"]}}}]}"#,
        r#"{"metadata":{"cache_control":"1"},"response_format":{"json_schema":{"schema":{"cache_control":1}}}}"#,
    ] {
        assert_eq!(chat(stays), (stays.to_owned(), vec![]), "{stays}");
    }
    // Anthropic's clients send it everywhere; Ollama passes over it there, and the route is passed on.
    let messages = r#"{"system":[{"type":"text","text":"s","cache_control":{}}],"cache_control":1}"#;
    assert_eq!(filtered(Endpoint::Messages, messages, all()), (messages.to_owned(), vec![]));
}

#[test]
fn a_user_is_counted_in_characters() {
    for (user, goes) in [
        ("u".repeat(64), false),
        ("u".repeat(65), true),
        ("\u{1f600}".repeat(64), false),
        ("\u{e9}".repeat(65), true),
        ("\\u00e9".repeat(64), false),
        ("\\ud83d\\ude00".repeat(64), false),
        ("\\ud83d\\ude00".repeat(65), true),
        (String::new(), false),
    ] {
        for endpoint in [Endpoint::ChatCompletions, Endpoint::Completions] {
            let body = format!(r#"{{"user":"{user}","x":1}}"#);
            let wanted = if goes { (r#"{"x":1}"#.to_owned(), vec!["user"]) } else { (body.clone(), vec![]) };
            assert_eq!(filtered(endpoint, &body, all()), wanted);
        }
    }
    assert_eq!(chat(r#"{"user":{"id":1}}"#).1, Vec::<&str>::new());
}

#[test]
fn one_prefix_is_cut_from_the_model_on_v1_alone() {
    use Endpoint::*;
    for (model, wanted) in [
        ("ollama/tiny", "tiny"),
        ("ollama/library/tiny:latest", "library/tiny:latest"),
        ("ollama/ollama/tiny", "ollama/tiny"),
        ("ollama/hf.co/user/repo:Q4", "hf.co/user/repo:Q4"),
        ("tiny", "tiny"),
        ("Ollama/tiny", "Ollama/tiny"),
        (" ollama/tiny", " ollama/tiny"),
        ("hf.co/ollama/tiny", "hf.co/ollama/tiny"),
    ] {
        let body = format!(r#"{{ "model" : "{model}" , "x":1}}"#);
        for endpoint in [ChatCompletions, Completions, OpenAiEmbeddings, Responses, Messages] {
            let (sent, fired) = filtered(endpoint, &body, all());
            assert_eq!(sent, format!(r#"{{ "model" : "{wanted}" , "x":1}}"#));
            assert_eq!(fired, if model == wanted { vec![] } else { vec!["model_prefix"] });
        }
        // A host behind it is no model's name where it stays.
        for endpoint in [Chat, Generate, Embed, Show, Pull].into_iter().filter(|_| !model.contains("ollama/hf.co")) {
            assert_eq!(filtered(endpoint, &body, all()), (body.clone(), vec![]), "{endpoint:?}");
        }
    }
    assert_eq!(chat(r#"{"model":"oll\u0061ma/tiny"}"#).0, r#"{"model":"tiny"}"#);
    let ask = ask::read_filtered(ChatCompletions, br#"{"model":"ollama/Tiny:latest"}"#, all()).unwrap().ask;
    assert_eq!(ask.model.unwrap().canonical(), "tiny");
    assert!(ask::read_filtered(ChatCompletions, br#"{"model":"ollama/"}"#, all()).is_err(), "a name of nothing");
}

#[test]
fn the_question_for_the_counts_is_put_in_and_nothing_else_changes() {
    let usage: Filters = [Filter::IncludeUsage].into_iter().collect();
    for (body, wanted) in [
        (r#"{"model":"a","stream":true}"#, r#"{"stream_options":{"include_usage":true},"model":"a","stream":true}"#),
        (
            " { \"a\" : 1, \"stream\":true } \n",
            " {\"stream_options\":{\"include_usage\":true}, \"a\" : 1, \"stream\":true } \n",
        ),
        (r#"{"stream_options":null,"stream":true}"#, r#"{"stream_options":{"include_usage":true},"stream":true}"#),
        (
            r#"{"stream":true, "stream_options" : {} }"#,
            r#"{"stream":true, "stream_options" : {"include_usage":true} }"#,
        ),
        (
            r#"{"stream":true,"stream_options":{"x":[1]}}"#,
            r#"{"stream":true,"stream_options":{"include_usage":true,"x":[1]}}"#,
        ),
        (
            r#"{"stream_options":{"include_usage": false },"stream":true}"#,
            r#"{"stream_options":{"include_usage": true },"stream":true}"#,
        ),
        (
            r#"{"stream_options":{"x":1,"include_usage":null},"stream":true}"#,
            r#"{"stream_options":{"x":1,"include_usage":true},"stream":true}"#,
        ),
        (
            r#"{"x":{"stream_options":{}},"stream":true,"y":"stream_options"}"#,
            r#"{"stream_options":{"include_usage":true},"x":{"stream_options":{}},"stream":true,"y":"stream_options"}"#,
        ),
    ] {
        for endpoint in [Endpoint::ChatCompletions, Endpoint::Completions] {
            assert_eq!(filtered(endpoint, body, usage), (wanted.to_owned(), vec!["include_usage"]), "{body}");
            assert!(ask::read(endpoint, wanted.as_bytes()).unwrap().wants_usage, "{wanted}");
        }
        assert_eq!(filtered(Endpoint::Responses, body, usage).0, body);
    }
    for body in [
        r#"{"stream_options":{"include_usage":true},"stream":true}"#,
        r#"{"stream":false}"#,
        r#"{"stream_options":{}}"#,
        "{}",
    ] {
        assert_eq!(chat(body), (body.to_owned(), vec![]), "{body}");
    }
    // In front of what is cut.
    assert_eq!(chat(r#"{"store":1,"stream":true}"#).0, r#"{"stream_options":{"include_usage":true},"stream":true}"#);
}

#[test]
fn web_tools_are_cut_where_ollama_would_run_them() {
    use Endpoint::*;
    let function = r#"{"type":"function","name":"f"}"#;
    for (endpoint, tools, left) in [
        (Responses, r#"[{"type":"web_search"}]"#, "[]".to_owned()),
        (Responses, r#"[{"type":"web_search_preview","x":[{}]},F]"#, format!("[{function}]")),
        (Responses, r#"[F,{"type":"WEB_FETCH"},F]"#, format!("[{function},{function}]")),
        (Messages, r#"[{"type":"web_search_20250305","name":"web_search"},F]"#, format!("[{function}]")),
        (Messages, r#"[F, {"name":"web_fetch","type":"web_fetch_20250910"}]"#, format!("[{function}]")),
    ] {
        let body = format!(
            r#"{{"model":"a","tools":{},"x":1}}"#,
            tools.replace("F,", &format!("{function},")).replace("F]", &format!("{function}]"))
        );
        let (sent, fired) = filtered(endpoint, &body, all());
        assert_eq!(sent, format!(r#"{{"model":"a","tools":{left},"x":1}}"#));
        assert_eq!(fired, ["web_tools"]);
        let ask = ask::read_filtered(endpoint, body.as_bytes(), all()).unwrap().ask;
        assert_eq!((ask.has_tools, ask.has_web_tools), (Some(left != "[]"), false), "{body}");
        let ask = ask::read_filtered(endpoint, body.as_bytes(), Filters::NONE).unwrap().ask;
        assert_eq!((ask.has_tools, ask.has_web_tools), (Some(true), true), "{body}");
    }
    // A tool that the client runs may have such a name, and a chat's tools are never run by Ollama.
    let named = r#"{"tools":[{"type":"function","name":"web_search"},{"name":"web_fetch"}]}"#;
    assert_eq!(filtered(Responses, named, all()).0, named);
    let chats = r#"{"tools":[{"type":"web_search"}]}"#;
    assert_eq!(chat(chats).0, chats);
}

#[test]
fn a_choice_of_a_tool_that_was_cut_becomes_the_models() {
    use Endpoint::*;
    for (endpoint, choice, wanted) in [
        (Responses, r#"{"type":"web_search"}"#, r#""auto""#),
        (Responses, r#"{"type":"function","name":"web_search"}"#, r#"{"type":"function","name":"web_search"}"#),
        (Responses, r#""required""#, r#""required""#),
        (Messages, r#"{"type":"tool","name":"search"}"#, r#"{"type":"auto"}"#),
        (Messages, r#"{"type":"tool","name":"f"}"#, r#"{"type":"tool","name":"f"}"#),
        (Messages, r#"{"type":"any"}"#, r#"{"type":"any"}"#),
    ] {
        let tools = r#""tools":[{"type":"web_search","name":"search"},{"type":"function","name":"f"}]"#;
        let left = r#""tools":[{"type":"function","name":"f"}]"#;
        for (body, wanted) in [
            (format!(r#"{{"tool_choice":{choice},{tools}}}"#), format!(r#"{{"tool_choice":{wanted},{left}}}"#)),
            (format!(r#"{{{tools},"tool_choice":{choice}}}"#), format!(r#"{{{left},"tool_choice":{wanted}}}"#)),
        ] {
            assert_eq!(filtered(endpoint, &body, all()).0, wanted);
        }
    }
}

#[test]
fn what_the_answer_depends_on_and_ollama_ignores_is_refused_by_name() {
    for (name, values) in [
        ("previous_response_id", &[r#""resp_1""#][..]),
        ("conversation", &[r#""conv_1""#, r#"{"id":"conv_1"}"#]),
        ("prompt", &[r#"{"id":"pmpt_1"}"#]),
        ("background", &["true"]),
    ] {
        for value in values {
            let body = format!(r#"{{"model":"a","input":"x","{name}":{value}}}"#);
            for on in [all(), Filters::NONE] {
                let refused = ask::read_filtered(Endpoint::Responses, body.as_bytes(), on).err();
                assert_eq!(refused, Some(AskError::Unsupported(name.to_owned())), "{body}");
            }
        }
        for nothing in ["null", "false", "\"\"", "{}", "[]"] {
            let body = format!(r#"{{"model":"a","input":"x","{name}":{nothing}}}"#);
            assert_eq!(filtered(Endpoint::Responses, &body, all()).0, body);
        }
    }
    // Elsewhere they mean nothing, or something else.
    assert!(ask::read(Endpoint::Completions, br#"{"prompt":"p","previous_response_id":"x"}"#).is_ok());
}

#[test]
fn responses_pass_on_what_only_chats_lose() {
    let body =
        r#"{"model":"a","store":true,"prompt_cache_key":"k","service_tier":"auto","user":"U","max_output_tokens":5}"#
            .replace('U', &"u".repeat(80));
    assert_eq!(filtered(Endpoint::Responses, &body, all()), (body.clone(), vec![]));
}
