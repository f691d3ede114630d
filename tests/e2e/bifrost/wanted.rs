//! What our caller is to learn, and the audit to say: read from what the backend said, by rules that are none of the proxy's.

use serde_json::{Value, json};

use super::case::{Answer, Case, Then};
use super::told::Told;

const ENDED: &str = "Ollama's reply ended before it was complete. Send the request again.";
pub const GARBLED: &str = "Ollama's reply could not be understood. Try again; if it stays, tell the operator.";

/// What becomes of a request of `/v1/responses`: the chat that is sent (null: not written down), or the member that is named.
pub fn converted(case: &Case) -> Result<Value, String> {
    let path = format!("{}/tests/fixtures/bifrost/responses-sent.jsonl", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).expect("what is sent");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    match lines.into_iter().find(|line| line["case"] == *case.name) {
        None => Ok(Value::Null),
        Some(line) if line["refused"].is_string() => Err(line["refused"].as_str().expect("a name").to_owned()),
        Some(mut line) => {
            // The prefix is a filter's, which comes first.
            line["sent"]["model"] =
                line["sent"]["model"].as_str().expect("a name").trim_start_matches("ollama/").into();
            Ok(line["sent"].take())
        }
    }
}

/// What our caller is to learn, and the audit to say.
pub struct Wanted {
    pub told: Told,
    pub outcome: &'static str,
    pub finish: Option<String>,
    pub usage: Option<(u64, u64)>,
    /// The whole reply, where nothing of it is ours.
    pub bytes: Option<String>,
}

/// Read from what the backend said, by rules that are none of the proxy's.
pub fn wanted(case: &Case, answer: &Answer) -> Wanted {
    let refused = |status: u16, message: String| Wanted {
        told: Told { status, error: Some(message), ..Told::default() },
        outcome: "refused",
        finish: None,
        usage: None,
        bytes: None,
    };
    if case.name == "chat_dup_keys" {
        return refused(400, "The body could be read in two ways: `model` is in the body twice (Ollama takes any case for it); send it once. Send it in one spelling.".to_owned());
    }
    if case.client.path == "/v1/responses"
        && let Err(member) = converted(case)
    {
        return refused(400, format!("{member} is not supported here. Leave it out."));
    }
    let said = Told::by(answer.status, answer.is_stream(), &answer.body);
    if answer.status == 404 && answer.content_type == "text/plain" {
        let path = &case.client.path;
        let words = "it needs Ollama 0.1.24 or later. Upgrade it, or use a route that it has.";
        return refused(404, format!("The Ollama behind this proxy has no {path}: {words}"));
    }
    if answer.status != 200 {
        let outcome = if answer.status >= 500 { "upstream_error" } else { "complete" };
        let bytes = (answer.status != 401).then(|| answer.body.clone());
        return Wanted { told: said, outcome, finish: None, usage: None, bytes };
    }
    if !answer.is_stream() && said.items.is_empty() && said.finish.is_none() {
        let words = if answer.content_type == "application/json" { ENDED } else { GARBLED };
        let told = Told { status: 502, error: Some(words.to_owned()), ..Told::default() };
        return Wanted { told, outcome: "upstream_error", finish: None, usage: None, bytes: None };
    }
    let is_response = case.client.path == "/v1/responses";
    let finish = said.finish.clone().map(|finish| if is_response { response_word(&finish) } else { finish });
    let mut told = Told { finish: finish.clone(), ..said.clone() };
    let (mut outcome, mut bytes) = ("complete", (!is_response).then(|| answer.body.clone()));
    if answer.is_stream() {
        if let Some(error) = &said.error {
            outcome = "upstream_error";
            told.error = Some(error.clone());
            bytes = None;
        } else if said.finish.is_none() {
            outcome = if answer.then == Then::Resets { "upstream_reset" } else { "upstream_error" };
            told.error = Some(ENDED.to_owned());
            bytes = None;
        } else if !is_response && case.asked()["stream_options"]["include_usage"] != true {
            told.usage = None;
            bytes = Some(without_usage(&answer.body));
        }
    }
    if is_response {
        told.ended = answer.is_stream();
    }
    Wanted { told, outcome, finish, usage: said.usage, bytes }
}

fn response_word(finish: &str) -> String {
    match finish {
        "length" => "max_output_tokens",
        "content_filter" => "content_filter",
        _ => "completed",
    }
    .to_owned()
}

/// A stream as it is without the question for the counts.
fn without_usage(stream: &str) -> String {
    let mut out = String::new();
    for event in stream.split_inclusive("\n\n") {
        let data = event.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data.trim_end()).ok());
        match data {
            Some(data) if data["usage"].is_object() && data["choices"] == json!([]) => {}
            Some(data) if data["usage"].is_object() => {
                let from = event.find(", \"usage\": {").expect("the member is written so");
                let to = from + event[from..].find('}').expect("its end") + 1;
                out.push_str(&event[..from]);
                out.push_str(&event[to..]);
            }
            _ => out.push_str(event),
        }
    }
    out
}
