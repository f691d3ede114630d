//! The wire layer over bytes recorded from running Ollama servers (`fixtures/ollama/README.md` says how they came to be).
use base64::Engine as _;
use behavry_ollama_proxy::route::{self, Route, RouteError, RouteSettings};
use behavry_ollama_proxy::wire::mend::Mender;
use behavry_ollama_proxy::wire::whole::Whole;
use behavry_ollama_proxy::wire::{Ask, Endpoint, Filter, Framing, Kind, ask, list, model};
use bytes::Bytes;
use recordings::{Dice, Recording, VERSIONS, canonical, endpoint, hidden, lines, metered, recordings};
use serde_json::Value;
use std::collections::HashSet;

#[path = "wire/broken.rs"]
mod broken;
#[path = "wire/recordings.rs"]
mod recordings;
#[path = "wire/splits.rs"]
mod splits;

/// What is no route here is answered by nobody: other spellings, other methods, what acts for the server's account.
#[test]
fn every_recorded_request_is_of_a_route_or_refused() {
    let mut counts = std::collections::BTreeMap::new();
    for version in VERSIONS {
        for file in ["native", "openai", "responses", "anthropic", "transport"] {
            for line in lines(version, file) {
                let (method, target) =
                    (line["request"]["method"].as_str().unwrap(), line["request"]["path"].as_str().unwrap());
                let path = target.split('?').next().unwrap();
                let way = match route::resolve(method, path, &RouteSettings::default()) {
                    Ok(Route::Ollama { .. }) => "route",
                    Ok(Route::Egress) => "egress",
                    Ok(Route::Unsupported { .. }) => "unsupported",
                    Err(RouteError::Unknown) => "unknown",
                    Err(RouteError::MethodNotAllowed { .. }) => "method",
                    Ok(Route::Token | Route::Jwks) => panic!("{method} {target}"),
                };
                *counts.entry(way).or_insert(0) += 1;
            }
        }
    }
    let wanted = [("egress", 9), ("method", 24), ("route", 935), ("unknown", 64), ("unsupported", 2)];
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), wanted, "1,034 in all");
    assert_eq!(VERSIONS.into_iter().flat_map(recordings).count(), 935, "each of them is read below");
}

#[test]
fn of_an_ambiguous_body_we_see_the_model_that_ran_or_refuse() {
    let mut seen = 0;
    let mut accepted = HashSet::new();
    for version in VERSIONS {
        for line in lines(version, "differential") {
            seen += 1;
            let (why, path) = (line["why"].as_str().unwrap(), line["path"].as_str().unwrap());
            let body = base64::engine::general_purpose::STANDARD.decode(line["body"].as_str().unwrap()).unwrap();
            let Ok(ask) = ask::read(endpoint("POST", path).unwrap(), &body) else { continue };
            accepted.insert(format!("{path} {why}"));
            let Some(ran) = line["model_run"].as_str() else { continue };
            assert_eq!(ask.model.map(|m| m.canonical()), Some(canonical(ran)), "{version} {path} {why}");
            assert_eq!(ask.stream, line["stream"].as_bool(), "{version} {path} {why}");
            let limit = ask.num_predict.filter(|&limit| limit > 0).and_then(|limit| u64::try_from(limit).ok());
            if let (Some(tokens), Some(limit)) = (line["output_tokens"].as_u64(), limit) {
                assert_eq!(tokens, limit, "{version} {path} {why}");
            }
        }
    }
    assert_eq!(seen, 303);
    for honest in [
        "/api/generate plain, allowed model",
        "/api/generate plain, other model",
        "/api/generate spaces around the name",
        "/api/generate name in mixed case",
        "/api/generate with scheme",
        "/api/generate escaped hyphen in the value",
        "/api/generate leading white space",
        "/api/generate trailing white space",
        "/api/generate 1e400 in an unknown key",
        "/api/generate 500-digit integer in an unknown key",
        "/api/generate seed 1e2 (integer option as float text)",
        "/api/generate num_predict 3.7",
        "/api/generate lone high surrogate",
        "/api/generate surrogate pair",
        "/api/generate escaped NUL in the prompt",
        "/api/generate empty object",
        "/api/chat plain chat",
        "/api/chat chat: messages null (a load)",
        "/api/chat chat: role value in upper case",
    ] {
        assert!(accepted.contains(honest), "refused: {honest}");
    }
    for refused in ["model then MODEL", "trailing garbage", "duplicate model", "\u{17f}tream true"] {
        assert!(!accepted.iter().any(|name| name.ends_with(refused)), "let through: {refused}");
    }
}

#[test]
fn the_facts_of_every_answered_request_are_read() {
    let mut compared = 0;
    for recording in VERSIONS.into_iter().flat_map(recordings) {
        if recording.status() != 200 || recording.request.is_empty() {
            continue;
        }
        // Compressed bodies are decoded before they come here.
        if recording.name.contains("zstd") {
            continue;
        }
        let name = &recording.name;
        let read = ask::read(recording.endpoint, &recording.request);
        // Ollama answers as if these had not been asked for; here they are refused by name.
        let refused = ["background", "previous_response_id"];
        if let Err(error) = &read
            && refused.iter().any(|name| error.to_string() == format!("`{name}` is not supported"))
        {
            continue;
        }
        let ask = read.unwrap_or_else(|error| panic!("{name}: {error}"));
        let expected = &recording.expected;
        if let Some(wanted) = expected["model"].as_str() {
            compared += 1;
            assert_eq!(ask.model.as_ref().map(|m| m.canonical()), Some(canonical(wanted)), "{name}");
        }
        if recording.endpoint.kind() != Kind::Infer || expected["model"].is_null() {
            continue;
        }
        assert_eq!(ask.stream, expected["stream"].as_bool(), "{name}: stream");
        assert_eq!(ask.has_system_prompt, expected["has_system_prompt"].as_bool(), "{name}: system");
        assert_eq!(ask.has_tools, expected["has_tools"].as_bool(), "{name}: tools");
        assert_eq!(ask.message_count, expected["message_count"].as_u64(), "{name}: messages");
        assert_eq!(ask.has_web_tools, name.contains("web-search-tool"), "{name}: web tools");
    }
    assert!(compared > 250, "{compared}");
}

#[test]
fn errors_that_ollama_shows_in_a_stream_are_noticed() {
    let mut shown = vec![];
    for recording in VERSIONS.into_iter().flat_map(recordings) {
        if recording.status() == 200 && metered(&recording, [recording.reply.as_slice()]).error_frame {
            assert!(recording.reply.windows(9).any(|part| part == b"{\"error\":"), "{}", recording.name);
            shown.push(recording.name);
        }
    }
    for name in ["0.17.4 native chat-runner-killed-stream", "0.33.0-rc2 native chat-jinja-runner-sseerror-stream"] {
        assert!(shown.iter().any(|shown| shown == name), "{name}");
    }
}

/// What the proxy judges of a reply with status 200 whose HTTP message came to its end: whether the client has to be told that its
/// answer is none.
fn is_broken(recording: &Recording, parts: &[&[u8]]) -> bool {
    let usage = metered(recording, parts.iter().copied());
    if recording.framing == Framing::Json {
        let mut whole = Whole::new(recording.endpoint, usize::MAX);
        for part in parts {
            assert!(whole.push(part).is_ok());
        }
        return !whole.is_answer(&usage);
    }
    let mut mender = Mender::new(recording.endpoint, recording.framing);
    let mut passed = vec![];
    for part in parts {
        passed.extend_from_slice(&mender.pass(Bytes::copy_from_slice(part)));
    }
    passed.extend_from_slice(&mender.finish());
    assert!(passed == recording.reply, "{}: a recorded stream passes as it is", recording.name);
    !(usage.terminal || usage.rendered)
}

/// Whether an auditor would call it broken, by what was recorded of it.
fn should_be_broken(recording: &Recording) -> bool {
    let expected = &recording.expected;
    let rendered = recording.name.contains("debug-render");
    // `/v1/responses`, not streamed, says `completed` whatever happened (ollama-wire 4.3).
    let half_said = recording.endpoint == Endpoint::Responses
        && recording.framing == Framing::Json
        && ["token-repeat", "runner-"].iter().any(|cause| recording.name.contains(cause));
    half_said || expected["terminal_marker"] == false && !rendered
}

#[test]
fn whole_replies_are_never_called_broken_and_broken_ones_always_are() {
    let (mut whole, mut broken) = (0, 0);
    for recording in VERSIONS.into_iter().flat_map(recordings) {
        if recording.status() != 200 || recording.endpoint.kind() != Kind::Infer {
            continue;
        }
        let name = &recording.name;
        let (reply, wanted) = (recording.reply.as_slice(), should_be_broken(&recording));
        *(if wanted { &mut broken } else { &mut whole }) += 1;
        assert_eq!(is_broken(&recording, &[reply]), wanted, "{name}");
    }
    assert!(whole > 150 && broken > 60, "{whole} whole, {broken} broken");
}

#[test]
fn a_whole_stream_that_is_cut_anywhere_before_its_end_is_broken() {
    let mut seen = 0;
    for recording in recordings("0.33.0-rc2") {
        let streamed = matches!(recording.framing, Framing::Sse | Framing::Ndjson);
        if recording.status() != 200
            || recording.endpoint.kind() != Kind::Infer
            || !streamed
            || should_be_broken(&recording)
        {
            continue;
        }
        seen += 1;
        let reply = &recording.reply;
        // The record that ends it: from its first byte on the end may be there.
        let last = match recording.framing {
            Framing::Ndjson => reply[..reply.len() - 1].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1),
            _ => {
                let text = std::str::from_utf8(reply).unwrap();
                let ends = ["\"finish_reason\":\"", "event: message_stop", "event: response.completed"];
                ends.iter().filter_map(|end| text.find(end)).min().unwrap_or_else(|| panic!("{}", recording.name))
            }
        };
        for at in 0..=last {
            assert!(!metered(&recording, [&reply[..at]]).terminal, "{}: cut at {at}", recording.name);
        }
    }
    assert!(seen > 40, "{seen}");
}

/// Without what differs from one answer to the next.
fn without_ids(stream: &[u8]) -> String {
    let mut text = String::from_utf8(stream.to_vec()).unwrap();
    for prefix in ["\"id\":\"chatcmpl-", "\"id\":\"cmpl-", "\"created\":", "\"id\":\"call_"] {
        let mut parts = text.split(prefix);
        let mut out = parts.next().unwrap_or("").to_owned();
        for part in parts {
            out.push_str(prefix);
            out.push_str(part.trim_start_matches(|c: char| c.is_ascii_alphanumeric()));
        }
        text = out;
    }
    text
}

#[test]
fn a_client_that_did_not_ask_sees_what_ollama_sends_without_the_question() {
    let mut pairs = 0;
    for version in VERSIONS {
        let all = recordings(version);
        for (with, without) in [
            ("chat-stream-usage", "chat-stream"),
            ("completions-stream-usage", "completions-stream"),
            ("chat-tools-stream-usage", "chat-tools-stream"),
            ("chat-usage-token-repeat-stream", "chat-token-repeat-stream"),
        ] {
            let find = |case| all.iter().find(|r| r.name == format!("{version} openai {case}"));
            let (Some(with), Some(without)) = (find(with), find(without)) else { continue };
            pairs += 1;
            let wanted = without_ids(&without.reply);
            let reply = with.reply.as_slice();
            assert_eq!(without_ids(&hidden(with.endpoint, [reply])), wanted, "{}", with.name);
            assert_eq!(without_ids(&hidden(with.endpoint, reply.chunks(1))), wanted, "{}", with.name);
        }
    }
    assert!(pairs >= 6, "{pairs}");
}

#[test]
fn a_stream_without_usage_passes_the_hider_unchanged() {
    let mut seen = 0;
    for recording in VERSIONS.into_iter().flat_map(recordings) {
        let asked = ask::read(recording.endpoint, &recording.request).is_ok_and(|ask| ask.wants_usage);
        if recording.framing == Framing::Sse && !asked && recording.endpoint.as_str().contains("completions") {
            seen += 1;
            assert!(hidden(recording.endpoint, recording.reply.chunks(100)) == recording.reply, "{}", recording.name);
        }
    }
    assert!(seen > 20, "{seen}");
}

#[test]
fn the_question_can_be_put_into_every_recorded_request() {
    let mut seen = 0;
    for recording in VERSIONS.into_iter().flat_map(recordings) {
        if !matches!(recording.endpoint, Endpoint::ChatCompletions | Endpoint::Completions) {
            continue;
        }
        let Ok(before) = ask::read(recording.endpoint, &recording.request) else { continue };
        seen += 1;
        check_question(recording.endpoint, &recording.request, &before);
    }
    assert!(seen > 100, "{seen}");
}

/// The body with the question means the same but for the question.
fn check_question(endpoint: Endpoint, body: &[u8], before: &Ask) {
    let usage = [Filter::IncludeUsage].into_iter().collect();
    let read = ask::read_filtered(endpoint, body, usage).expect("it was read before");
    if before.wants_usage || before.stream != Some(true) {
        assert!(read.edits.is_empty());
        return;
    }
    let asked = read.edits.apply(body);
    let after = ask::read(endpoint, &asked).expect("the body that was made is valid");
    assert_eq!(after, Ask { wants_usage: true, ..before.clone() });
    // A number beyond f64 is valid JSON that serde_json does not take.
    let (Ok(mut wanted), Ok(got)) = (serde_json::from_slice::<Value>(body), serde_json::from_slice::<Value>(&asked))
    else {
        return;
    };
    if wanted["stream_options"].is_null() {
        wanted["stream_options"] = Value::Object(Default::default());
    }
    wanted["stream_options"]["include_usage"] = Value::Bool(true);
    assert_eq!(got, wanted);
}

/// A list with nothing in it but what may be seen.
fn filtered(
    endpoint: Endpoint,
    body: &[u8],
    shows: &(dyn Fn(&str) -> bool + Sync),
) -> Result<list::Merged, list::ListError> {
    list::merge(endpoint, &[body], &list::View { shows, extra: &|_| vec![], aliases: &[] })
}

#[test]
fn recorded_lists_are_filtered_exactly() {
    let mut seen = 0;
    for recording in VERSIONS.into_iter().flat_map(recordings) {
        let (list, name) = match recording.endpoint {
            Endpoint::Tags | Endpoint::Ps => ("models", "name"),
            Endpoint::Models => ("data", "id"),
            _ => continue,
        };
        if recording.status() != 200 || recording.reply.is_empty() {
            continue; // also the answer to a HEAD
        }
        seen += 1;
        let (endpoint, body) = (recording.endpoint, recording.reply.as_slice());
        let names = list::names(endpoint, body).unwrap();
        assert!(!names.is_empty() && names.iter().all(|model| !model.remote), "{}", recording.name);

        let all = filtered(endpoint, body, &|_| true).unwrap();
        assert!(all.body == body && all.shown == names.len() && all.hidden == 0, "{}", recording.name);
        for denied in &names {
            let filtered = filtered(endpoint, body, &|name| name != denied.name).unwrap();
            assert_eq!((filtered.shown, filtered.hidden), (names.len() - 1, 1), "{}", recording.name);
            let mut wanted: Value = serde_json::from_slice(body).unwrap();
            wanted[list].as_array_mut().unwrap().retain(|model| model[name] != denied.name.as_str());
            let got: Value = serde_json::from_slice(&filtered.body).unwrap();
            assert_eq!(got, wanted, "{}", recording.name);
        }
        let none = filtered(endpoint, body, &|_| false).unwrap();
        assert_eq!((none.shown, none.hidden), (0, names.len()));
        let got: Value = serde_json::from_slice(&none.body).unwrap();
        assert_eq!(got[list], Value::Array(vec![]));
    }
    assert!(seen >= 6, "{seen}");
}

#[test]
fn a_mutated_body_is_refused_or_means_to_us_what_it_means_to_serde() {
    let mut dice = Dice(20_261_122);
    let seeds: Vec<(Endpoint, Vec<u8>)> = VERSIONS
        .into_iter()
        .flat_map(recordings)
        .filter(|recording| !recording.request.is_empty())
        .map(|recording| (recording.endpoint, recording.request))
        .collect();
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..40_000 {
        let (endpoint, seed) = &seeds[dice.roll(seeds.len())];
        let body = dice.mutate(seed);
        let parsed = serde_json::from_slice::<Value>(&body);
        match ask::read(*endpoint, &body) {
            Ok(ask) => {
                accepted += 1;
                // serde_json takes no lone surrogates and no numbers beyond f64; all else that passes is JSON.
                let Ok(parsed) = parsed else { continue };
                if let (Some(name), true) = (parsed["model"].as_str(), endpoint.kind() == Kind::Infer) {
                    let wanted = model::parse(name).ok().map(|m| m.canonical());
                    assert_eq!(ask.model.as_ref().map(|m| m.canonical()), wanted);
                }
                if let (Some(stream), Some(true)) = (ask.stream, parsed.get("stream").map(Value::is_boolean)) {
                    let never = matches!(endpoint, Endpoint::Embed | Endpoint::Embeddings | Endpoint::OpenAiEmbeddings);
                    assert!(never || parsed["stream"] == stream);
                }
                if matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions) {
                    check_question(*endpoint, &body, &ask);
                }
            }
            Err(_) => refused += 1,
        }
    }
    assert!(accepted > 1_000 && refused > 1_000, "{accepted} accepted, {refused} refused");
}

#[test]
fn a_mutated_stream_is_read_the_same_in_any_parts_and_never_panics() {
    let mut dice = Dice(11_434);
    let mut seeds: Vec<Recording> = VERSIONS.into_iter().flat_map(recordings).collect();
    seeds.retain(|recording| (1..3_000).contains(&recording.reply.len()));
    for _ in 0..15_000 {
        let recording = &seeds[dice.roll(seeds.len())];
        let reply = dice.mutate(&recording.reply);
        let size = 1 + dice.roll(300);
        let whole = metered(recording, [reply.as_slice()]);
        assert_eq!(metered(recording, reply.chunks(size)), whole, "{} in chunks of {size}", recording.name);
        let out = hidden(recording.endpoint, [reply.as_slice()]);
        assert!(hidden(recording.endpoint, reply.chunks(size)) == out, "{} in chunks of {size}", recording.name);
        let _ = list::names(recording.endpoint, &reply);
        let _ = filtered(recording.endpoint, &reply, &|name| name.len() % 2 == 0);
    }
}
