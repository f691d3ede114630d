//! What is changed in a request on its way, and what is refused since it could not be honoured: the simulator sees the bytes, the
//! audit names the filters.

use behavry_ollama_proxy::simulator::SimulatorOptions;
use serde_json::{Value, json};

use crate::client::{End, Reply, Request};
use crate::house::{House, Plan};

/// Sends a body as it is spelled; gives the reply, the body that the simulator got, and the final record.
async fn sent(house: &House, path: &str, body: &str) -> (Reply, Option<String>, Value) {
    house.simulator.forget();
    let id = format!("filtered-{}", house.records().len());
    let reply = house.send(Request::new("POST", path).bearer(&house.token()).id(&id).body(body)).await;
    let seen = house.simulator.seen().first().map(|seen| String::from_utf8(seen.body.clone()).expect("UTF-8"));
    (reply, seen, house.final_of(&id).await)
}

async fn with_config(config: &str) -> House {
    House::with(Plan { config: config.to_owned(), ..Plan::default() }).await
}

/// What S4 lists, with spaces that any rewriting would lose.
const S4: &str = concat!(
    r#"{ "model" : "ollama/tiny-story", "prompt_cache_key" : "k", "messages" : [ {"role":"user", "content" : [ {"type":"text","#,
    r#""text" : "cache_control, store" , "cache_control" : {"type":"ephemeral"} } ] } ], "verbosity":"low", "store" : true,"#,
    r#" "service_tier":"auto", "temperature" : 0.50, "max_completion_tokens" : 4, "user" : "USER", "x" : 1e2 }"#
);

fn s4() -> String {
    S4.replace("USER", &"u".repeat(65))
}

#[tokio::test]
async fn what_the_seed_lists_is_cut_and_the_rest_arrives_byte_for_byte() {
    let house = House::open().await;
    let (reply, seen, record) = sent(&house, "/v1/chat/completions", &s4()).await;
    assert_eq!((reply.status, reply.end), (200, End::Whole));
    let wanted = concat!(
        r#"{ "model" : "tiny-story", "messages" : [ {"role":"user", "content" : [ {"type":"text","#,
        r#""text" : "cache_control, store" } ] } ], "temperature" : 0.50, "max_tokens" : 4, "x" : 1e2 }"#
    );
    assert_eq!(seen.as_deref(), Some(wanted));
    let filters = json!([
        "model_prefix",
        "prompt_cache_key",
        "verbosity",
        "store",
        "service_tier",
        "cache_control",
        "user",
        "max_completion_tokens"
    ]);
    assert_eq!(record["extra"]["filters"], filters);
    assert_eq!(
        (&record["extra"]["model"], &record["extra"]["model_raw"]),
        (&json!("tiny-story"), &json!("tiny-story"))
    );
    // The bound is one that Ollama obeys now.
    assert_eq!((&record["extra"]["output_tokens"], &record["extra"]["finish_reason"]), (&json!(4), &json!("length")));

    let (_, seen, record) =
        sent(&house, "/v1/chat/completions", &s4().replace("\"x\"", "\"stream\":true, \"x\"")).await;
    assert!(
        seen.expect("it arrived").starts_with(r#"{"stream_options":{"include_usage":true}, "model" : "tiny-story","#)
    );
    assert_eq!(record["extra"]["filters"].as_array().expect("a list").len(), 9);
    assert_eq!(record["extra"]["output_tokens"], 4);
}

#[tokio::test]
async fn each_filter_is_switched_off_by_its_name() {
    let names = [
        "model_prefix",
        "prompt_cache_key",
        "verbosity",
        "store",
        "service_tier",
        "cache_control",
        "user",
        "max_completion_tokens",
    ];
    let off: String = names.iter().map(|name| format!("{name} = false\n")).collect();
    let house = with_config(&format!("[filters]\n{off}")).await;
    let body = s4().replace("ollama/", "");
    let (reply, seen, record) = sent(&house, "/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200);
    assert_eq!((seen.as_deref(), &record["extra"]["filters"]), (Some(body.as_str()), &json!([])));
    // The prefix is a part of the name then: of a model that is not there.
    let (reply, seen, record) = sent(&house, "/v1/chat/completions", &s4()).await;
    assert_eq!((reply.status, seen), (404, Some(s4())));
    assert_eq!(record["extra"]["model"], "ollama/tiny-story");

    let house = with_config("[filters]\nstore = false\n").await;
    let (_, seen, record) = sent(&house, "/v1/chat/completions", &s4()).await;
    assert!(seen.expect("it arrived").contains(r#", "store" : true"#));
    assert_eq!(record["extra"]["filters"].as_array().expect("a list").len(), 7);
}

#[tokio::test]
async fn each_filter_that_is_off_leaves_what_it_cuts_and_the_others_cut() {
    let pieces = [
        ("model_prefix", r#""ollama/tiny-story""#),
        ("prompt_cache_key", r#""prompt_cache_key" : "k""#),
        ("verbosity", r#""verbosity":"low""#),
        ("store", r#""store" : true"#),
        ("service_tier", r#""service_tier":"auto""#),
        ("cache_control", r#""cache_control" : {"type":"ephemeral"}"#),
        ("user", r#""user" : "uuu"#),
        ("max_completion_tokens", r#""max_completion_tokens" : 4"#),
    ];
    for (off, _) in pieces {
        let house = with_config(&format!("[filters]\n{off} = false\n")).await;
        let (_, seen, record) = sent(&house, "/v1/chat/completions", &s4()).await;
        let seen = seen.expect("it arrived");
        for (name, piece) in pieces {
            assert_eq!(seen.contains(piece), name == off, "{off} is off: {piece}");
        }
        let others: Vec<&str> = pieces.iter().map(|(name, _)| *name).filter(|name| *name != off).collect();
        assert_eq!(record["extra"]["filters"], json!(others), "{off} is off");
    }
    let house = with_config("[streaming]\ninclude_usage = false\n").await;
    let body = r#"{"model":"tiny-story","stream":true,"prompt":"hi"}"#;
    let (reply, seen, record) = sent(&house, "/v1/completions", body).await;
    assert_eq!((reply.status, seen.as_deref(), &record["extra"]["filters"]), (200, Some(body), &json!([])));
    assert_eq!(record["extra"]["output_tokens"], Value::Null, "nobody asked");
}

/// Everything at once that may happen to a request of `/v1/responses` on its way to an Ollama that has no such route.
#[tokio::test]
async fn a_converted_request_is_decoded_filtered_given_its_alias_and_leaves_out_what_was_cut() {
    let simulator = SimulatorOptions { ollama_version: "0.12.6".to_owned(), ..SimulatorOptions::for_tests() };
    // What is pinned is an option of the native routes, and stays out of the others.
    let config =
        "[[model]]\nname = \"fast\"\nalias = \"tiny-tools\"\n[[model]]\nname = \"tiny-tools\"\nnum_ctx = 8192\n";
    let house = House::with(Plan { simulator, config: config.to_owned(), ..Plan::default() }).await;
    let body = r#"{ "model" : "ollama/fast", "input":[{"role":"user","content":[{"type":"input_text","text":"store, \u00fc","cache_control":{"type":"ephemeral"}}]}],
        "store":true, "prompt_cache_key":"k", "service_tier":"auto", "text":{"verbosity":"low"}, "user":"USER", "include":["x"], "max_output_tokens" : 3,
        "tools":[ {"type":"web_search"}, {"type":"function","name":"f","parameters":{"properties":{"store":{}} } } ], "stream":STREAM }"#;
    for stream in [true, false] {
        let body = body.replace("USER", &"u".repeat(65)).replace("STREAM", &stream.to_string());
        let encoded = ruzstd::encoding::compress_to_vec(body.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest);
        let id = format!("all-{stream}");
        let request = Request::new("POST", "/v1/responses").header("content-encoding", "zstd").body(encoded);
        let reply = house.send(request.bearer(&house.token()).id(&id)).await;
        assert_eq!((reply.status, reply.end), (200, End::Whole), "{}", reply.text());
        assert_eq!(reply.header("x-behavry-model"), Some("tiny-tools"));
        let seen = house.simulator.seen();
        let seen = seen.iter().rfind(|seen| seen.header("x-request-id") == Some(id.as_str())).expect("it arrived");
        let options = if stream { r#","stream":true,"stream_options":{"include_usage":true}"# } else { "" };
        let wanted = concat!(
            r#"{"model":"tiny-tools","messages":[{"role":"user","content":"store, \u00fc"}],"tools":[{"type":"function","function":"#,
            r#"{"name":"f","parameters":{"properties":{"store":{}} }}}],"max_tokens":3"#
        );
        assert_eq!(String::from_utf8_lossy(&seen.body), format!("{wanted}{options}}}"));
        assert_eq!((seen.target.as_str(), seen.header("content-encoding")), ("/v1/chat/completions", None));
        let record = house.final_of(&id).await;
        let filters = json!([
            "model_prefix",
            "web_tools",
            "alias",
            "responses_to_chat",
            "user",
            "include",
            "prompt_cache_key",
            "verbosity",
            "store",
            "service_tier",
            "cache_control"
        ]);
        assert_eq!(record["extra"]["filters"], filters, "{stream}");
        assert_eq!((&record["extra"]["model"], &record["extra"]["model_raw"]), (&json!("tiny-tools"), &json!("fast")));
        assert_eq!(
            (&record["extra"]["output_tokens"], &record["extra"]["finish_reason"]),
            (&json!(3), &json!("max_output_tokens"))
        );
    }
}

#[tokio::test]
async fn native_routes_are_never_rewritten() {
    let house = House::open().await;
    let body = s4().replace("ollama/", "").replace("[ {\"type\":\"text\",\"text\" : ", "");
    let body = body.replace(" , \"cache_control\" : {\"type\":\"ephemeral\"} } ]", ", \"cache_control\":1");
    for path in ["/api/chat", "/api/v1/ollama/api/chat"] {
        let (reply, seen, record) = sent(&house, path, &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!((seen.as_deref(), &record["extra"]["filters"]), (Some(body.as_str()), &json!([])));
    }
}

#[tokio::test]
async fn policy_audit_and_backend_see_the_model_without_its_prefix() {
    let policy =
        "package behavry.authz\nallow if input.model == \"tiny-story\"\nallow if input.model == \"tiny-embed\"\n";
    let house = House::with(Plan { policy: vec![("p.rego", policy.to_owned())], ..Plan::default() }).await;
    let message = r#""messages":[{"role":"user","content":"hi"}]"#;
    for (path, body) in [
        ("/v1/chat/completions", format!(r#"{{"model":"ollama/tiny-story",{message}}}"#)),
        ("/v1/completions", r#"{"model":"ollama/tiny-story","prompt":"hi"}"#.to_owned()),
        ("/v1/embeddings", r#"{"model":"ollama/tiny-embed","input":"hi"}"#.to_owned()),
        ("/v1/responses", r#"{"model":"ollama/tiny-story","input":"hi"}"#.to_owned()),
        ("/v1/messages", format!(r#"{{"model":"ollama/tiny-story","max_tokens":9,{message}}}"#)),
    ] {
        let (reply, seen, record) = sent(&house, path, &body).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        assert_eq!(seen.expect("it arrived"), body.replace("ollama/", ""), "{path}");
        assert_eq!(record["extra"]["filters"], json!(["model_prefix"]), "{path}");
        assert_eq!(record["extra"]["model"], record["extra"]["model_raw"], "{path}");
    }
    // What the policy does not allow is not allowed by a prefix either.
    let (reply, seen, record) =
        sent(&house, "/v1/completions", r#"{"model":"ollama/ollama/tiny-story","prompt":"hi"}"#).await;
    assert_eq!((reply.status, reply.code(), seen), (403, "policy_denied".to_owned(), None));
    assert_eq!(record["extra"]["model"], "ollama/tiny-story");
}

const SEARCH: &str = concat!(
    r#"{"model":"tiny-tools","input":"hi","tools":[{"type":"web_search"},"#,
    r#"{"type":"function","name":"f","parameters":{}}],"tool_choice":{"type":"web_search"}}"#
);
const FETCH: &str = concat!(
    r#"{"model":"tiny-story","max_tokens":9,"messages":[{"role":"user","content":"hi"}],"#,
    r#""tools":[ {"type":"web_fetch_20250910","name":"web_fetch"} ]}"#
);

#[tokio::test]
async fn tools_that_ollama_would_run_on_the_internet_are_cut_and_the_request_goes_on() {
    let house = House::open().await;
    let (reply, seen, record) = sent(&house, "/v1/responses", SEARCH).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let wanted = r#"{"model":"tiny-tools","input":"hi","tools":[{"type":"function","name":"f","parameters":{}}],"tool_choice":"auto"}"#;
    assert_eq!(seen.as_deref(), Some(wanted));
    assert_eq!((&record["extra"]["filters"], &record["extra"]["has_tools"]), (&json!(["web_tools"]), &json!(true)));

    let (reply, seen, record) = sent(&house, "/v1/messages", FETCH).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(seen.expect("it arrived").ends_with(r#""tools":[  ]}"#));
    assert_eq!((&record["extra"]["filters"], &record["extra"]["has_tools"]), (&json!(["web_tools"]), &json!(false)));
}

#[tokio::test]
async fn web_tools_are_refused_or_let_through_where_the_configuration_says_so() {
    let house = with_config("[egress]\nweb_tools = \"refuse\"\n").await;
    for (path, body) in [("/v1/responses", SEARCH), ("/v1/messages", FETCH)] {
        let (reply, seen, record) = sent(&house, path, body).await;
        assert_eq!((reply.status, seen), (403, None), "{path}");
        assert!(reply.text().contains("leave them out"), "{path}: {}", reply.text());
        assert_eq!((&record["extra"]["filters"], &record["policy_result"]), (&json!([]), &json!("deny")), "{path}");
    }
    assert_eq!(house.simulator.connections(), 0);

    let house = with_config("[egress]\nweb_tools = \"allow\"\n").await;
    for (path, body) in [("/v1/responses", SEARCH), ("/v1/messages", FETCH)] {
        let (_, seen, record) = sent(&house, path, body).await;
        assert_eq!((seen.as_deref(), &record["extra"]["filters"]), (Some(body), &json!([])), "{path}");
    }
}

#[tokio::test]
async fn a_parameter_that_ollama_passes_over_in_silence_is_400_and_named() {
    let house = House::open().await;
    for (name, value) in [
        ("previous_response_id", "\"resp_1\""),
        ("conversation", "{\"id\":\"conv_1\"}"),
        ("prompt", "{\"id\":\"pmpt_1\"}"),
        ("background", "true"),
    ] {
        let body = format!(r#"{{"model":"tiny-story","input":"hi","{name}":{value}}}"#);
        let (reply, seen, record) = sent(&house, "/v1/responses", &body).await;
        assert_eq!((reply.status, seen), (400, None), "{name}");
        let error = &reply.json()["error"];
        assert_eq!((&error["code"], &error["param"]), (&json!("unsupported_parameter"), &json!(name)));
        assert!(error["message"].as_str().expect("a text").contains(name));
        assert_eq!(record["error"], "unsupported_parameter");
    }
    assert_eq!(house.simulator.connections(), 0);
    // Not there in earnest.
    let body = r#"{"model":"tiny-story","input":"hi","previous_response_id":null,"background":false,"prompt":{}}"#;
    assert_eq!(sent(&house, "/v1/responses", body).await.0.status, 200);
}

#[tokio::test]
async fn policy_explain_reads_a_body_as_it_will_be_sent() {
    let mut explain = crate::house::program(&["policy", "explain", "POST", "/v1/chat/completions", "--body"]);
    explain.arg(r#"{"model":"ollama/llama3.2","messages":[]}"#);
    let dir = tempfile::tempdir().expect("a folder");
    explain.env("BEHAVRY_STATE_DIR", dir.path());
    let ended = crate::house::run_to_end(explain).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains(r#""model": "llama3.2""#), "{}", ended.stdout);
}
