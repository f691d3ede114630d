//! `/v1/responses` for an Ollama that has no such route (before 0.13.3): the request becomes one of `/v1/chat/completions`, and the
//! reply becomes what the route would have answered.
//!
//! - [`request`]: the request, and what is repeated of it in the reply.
//! - [`Reply`]: what a reply repeats of its request, and the object that all replies are.
//! - [`whole`]: a reply that is not streamed.
//! - [`Events`]: a stream, event by event.
//! - `raw`: JSON taken apart without a change to its bytes.
//!
//! Content is only here and in `intake`, in types without `Debug`.

mod events;
mod raw;
mod request;
mod whole;

pub use events::Events;
pub use request::{Converted, Unconvertible, request};
pub use whole::{NoResponse, whole};

/// Where a converted request goes.
pub const TARGET: &str = "/v1/chat/completions";

/// What the audit says of an answer that is longer than is held.
pub const TOO_LONG: &str = "the answer is longer than limits.reply_buffer_bytes";

/// The first Ollama that has `/v1/responses`.
pub const SINCE: [u64; 3] = [0, 13, 3];

/// Whether an Ollama that calls itself so has `/v1/responses`. `None`: its version says nothing (a development build is `0.0.0`).
pub fn is_native(version: &str) -> Option<bool> {
    let mut parts = version.split(['.', '-', '+']).map(|part| part.parse::<u64>().ok());
    let version = [parts.next()??, parts.next()??, parts.next()??];
    (version != [0, 0, 0]).then_some(version >= SINCE)
}

/// What a reply repeats of its request, as raw JSON, and what it is called. No `Debug`: instructions are content.
pub struct Reply {
    /// Made from the request's id: letters, digits, `_` and `-`.
    id: String,
    pub created_at: u64,
    model: String,
    instructions: String,
    max_output_tokens: String,
    max_tool_calls: String,
    metadata: String,
    parallel_tool_calls: String,
    reasoning: String,
    safety_identifier: String,
    temperature: String,
    format: String,
    tool_choice: String,
    tools: String,
    top_logprobs: String,
    top_p: String,
    truncation: String,
}

/// How a response stands.
enum Status<'a> {
    InProgress,
    Completed,
    /// With its reason.
    Incomplete(&'a str),
    Failed {
        code: &'a str,
        message: &'a str,
    },
}

#[derive(Clone, Copy, Default)]
struct Counts {
    input: Option<u64>,
    output: Option<u64>,
}

impl Counts {
    fn json(self) -> String {
        let (Some(input), Some(output)) = (self.input, self.output) else { return "null".to_owned() };
        format!(
            "{{\"input_tokens\":{input},\"input_tokens_details\":{{\"cached_tokens\":0}},\"output_tokens\":{output},\"output_tokens_details\":{{\"reasoning_tokens\":0}},\"total_tokens\":{}}}",
            input.saturating_add(output)
        )
    }
}

impl Reply {
    /// The response object; `output` are its items, joined by commas.
    fn object(&self, status: &Status<'_>, output: &str, counts: Counts, now_s: u64) -> String {
        let word = match status {
            Status::InProgress => "in_progress",
            Status::Completed => "completed",
            Status::Incomplete(_) => "incomplete",
            Status::Failed { .. } => "failed",
        };
        let completed_at = if let Status::Completed = status { now_s.to_string() } else { "null".to_owned() };
        let incomplete = match status {
            Status::Incomplete(reason) => format!("{{\"reason\":{}}}", text(reason)),
            _ => "null".to_owned(),
        };
        let error = match status {
            Status::Failed { code, message } => {
                format!("{{\"code\":{},\"message\":{}}}", text(code), text(message))
            }
            _ => "null".to_owned(),
        };
        let Reply { id, created_at, model, instructions, max_output_tokens, max_tool_calls, metadata, .. } = self;
        let Reply { parallel_tool_calls, reasoning, safety_identifier, temperature, format, tool_choice, .. } = self;
        let Reply { tools, top_logprobs, top_p, truncation, .. } = self;
        let usage = counts.json();
        format!(
            "{{\"background\":false,\"completed_at\":{completed_at},\"created_at\":{created_at},\"error\":{error},\"frequency_penalty\":0,\"id\":\"resp_{id}\",\
             \"incomplete_details\":{incomplete},\"instructions\":{instructions},\"max_output_tokens\":{max_output_tokens},\"max_tool_calls\":{max_tool_calls},\
             \"metadata\":{metadata},\"model\":{model},\"object\":\"response\",\"output\":[{output}],\"parallel_tool_calls\":{parallel_tool_calls},\
             \"presence_penalty\":0,\"previous_response_id\":null,\"prompt_cache_key\":null,\"reasoning\":{reasoning},\"safety_identifier\":{safety_identifier},\
             \"service_tier\":\"default\",\"status\":\"{word}\",\"store\":false,\"temperature\":{temperature},\"text\":{{\"format\":{format}}},\
             \"tool_choice\":{tool_choice},\"tools\":{tools},\"top_logprobs\":{top_logprobs},\"top_p\":{top_p},\"truncation\":{truncation},\"usage\":{usage}}}"
        )
    }

    fn reasoning_item(&self, index: usize, thought: &str) -> String {
        let (id, thought) = (&self.id, text(thought));
        format!(
            "{{\"encrypted_content\":{thought},\"id\":\"rs_{id}_{index}\",\"summary\":[{{\"text\":{thought},\"type\":\"summary_text\"}}],\"type\":\"reasoning\"}}"
        )
    }

    fn message_item(&self, index: usize, said: &str, status: &str) -> String {
        format!(
            "{{\"content\":[{}],\"id\":\"msg_{}_{index}\",\"role\":\"assistant\",\"status\":\"{status}\",\"type\":\"message\"}}",
            part(said),
            self.id
        )
    }

    fn call_item(&self, index: usize, call: &Call, status: &str) -> String {
        let (arguments, call_id, name) = (text(&call.arguments), text(&call.id), text(&call.name));
        format!(
            "{{\"arguments\":{arguments},\"call_id\":{call_id},\"id\":\"fc_{}_{index}\",\"name\":{name},\"status\":\"{status}\",\"type\":\"function_call\"}}",
            self.id
        )
    }
}

/// One call of a function, as a reply says it.
struct Call {
    id: String,
    name: String,
    arguments: String,
}

/// How a finish reason of the chat is said here. A reason that nobody knows is an end.
fn status_of(finish: &str) -> Status<'static> {
    match finish {
        "length" => Status::Incomplete("max_output_tokens"),
        "content_filter" => Status::Incomplete("content_filter"),
        _ => Status::Completed,
    }
}

/// How the audit says a finish reason of the chat, so that a record is the same whichever Ollama answered.
pub fn finish_word(finish: &str) -> &str {
    match status_of(finish) {
        Status::Incomplete(reason) => reason,
        _ => "completed",
    }
}

fn part(said: &str) -> String {
    format!("{{\"annotations\":[],\"logprobs\":[],\"text\":{},\"type\":\"output_text\"}}", text(said))
}

/// As a JSON string.
fn text(of: &str) -> String {
    serde_json::Value::from(of).to_string()
}

#[cfg(test)]
mod tests;
