//! The request. The table is bifrost-compat, section 3; each of its rows is a test.
use std::collections::HashSet;

use super::super::filter::{Filter, Filters};
use super::raw::{Object, Raw};
use super::{Reply, text};

/// A request of `/v1/chat/completions`. No `Debug`: it holds a prompt.
pub struct Converted {
    pub body: Vec<u8>,
    /// What the reply repeats.
    pub reply: Reply,
    /// What was not sent, by name: a closed set, for the audit.
    pub left_out: Vec<&'static str>,
}

/// Why a request cannot be one of chat.
#[derive(Debug, PartialEq, Eq)]
pub enum Unconvertible {
    /// The member at fault, as in `input[2].type`: `unsupported_parameter`.
    Parameter(String),
    /// `invalid_body`.
    Invalid(&'static str),
}

/// Members that are known, not sent, and in the audit.
const LEFT_OUT: [&str; 7] = ["include", "truncation", "user", "max_tool_calls", "context_management", "stop", "seed"];

/// Members that are known and need no word.
const KNOWN: [&str; 16] = [
    "model",
    "input",
    "instructions",
    "stream",
    "stream_options",
    "max_output_tokens",
    "text",
    "reasoning",
    "tools",
    "tool_choice",
    "temperature",
    "top_p",
    "top_logprobs",
    "parallel_tool_calls",
    "metadata",
    "safety_identifier",
];

/// Members that chat has too, and that its filters cut.
const FILTERED: [(&str, Filter); 3] =
    [("prompt_cache_key", Filter::PromptCacheKey), ("store", Filter::Store), ("service_tier", Filter::ServiceTier)];

fn parameter<T>(name: impl Into<String>) -> Result<T, Unconvertible> {
    Err(Unconvertible::Parameter(name.into()))
}

/// `body` is one that [`super::super::ask::read`] lets pass. `filters` are those that are on: what they cut from a chat, they cut here.
/// `request_id` is ours, or the caller's.
pub fn request(body: &[u8], filters: Filters, request_id: &str, now_s: u64) -> Result<Converted, Unconvertible> {
    let Some(body) = Raw::read(body).filter(|body| body.is_object()) else {
        return Err(Unconvertible::Invalid("it is no JSON object"));
    };
    let (length, body) = (body.0.len(), &body.object());
    let (mut left_out, mut fired) = (Vec::new(), Filters::NONE);
    for (name, value) in body.names() {
        let filtered = FILTERED.iter().any(|(known, _)| name == *known) || name == "cache_control";
        if value.is_absent() || KNOWN.contains(&name) || filtered {
            continue;
        }
        let word = LEFT_OUT.into_iter().find(|known| name == *known).unwrap_or("unknown_members");
        if !left_out.contains(&word) {
            left_out.push(word);
        }
    }
    let mut messages = Messages::default();
    if let Some(instructions) = body.get("instructions") {
        if !instructions.is_text() {
            return parameter("instructions");
        }
        messages.done.push(format!("{{\"role\":\"system\",\"content\":{}}}", instructions.0));
    }
    match body.raw("input") {
        Some(input) if input.is_text() => {
            messages.done.push(format!("{{\"role\":\"user\",\"content\":{}}}", input.0));
        }
        Some(input) if input.is_array() => {
            for (at, item) in input.items().into_iter().enumerate() {
                messages.item(at, item)?;
            }
            messages.flush();
        }
        _ => return Err(Unconvertible::Invalid("`input` must be a text or an array of items")),
    }
    if messages.done.is_empty() {
        return Err(Unconvertible::Invalid("`input` has no message"));
    }

    for member in ["text", "reasoning"] {
        if body.get(member).is_some_and(|value| !value.is_object()) {
            return parameter(member);
        }
    }
    let tools = Tools::read(body, filters)?;
    if tools.cut {
        left_out.push("unsupported_tools");
    }
    let mut chat = String::with_capacity(length + 256);
    chat.push_str("{\"model\":");
    chat.push_str(body.get("model").map_or("null", |model| model.0));
    chat.push_str(",\"messages\":[");
    chat.push_str(&messages.done.join(","));
    chat.push(']');
    let mut member = |name: &str, value: &str| {
        chat.push_str(",\"");
        chat.push_str(name);
        chat.push_str("\":");
        chat.push_str(value);
    };
    if !tools.sent.is_empty() {
        member("tools", &format!("[{}]", tools.sent.join(",")));
    }
    if let Some(choice) = &tools.choice {
        member("tool_choice", choice);
    }
    if let Some(format) = response_format(body)? {
        member("response_format", &format);
    }
    for (from, to) in [
        ("max_output_tokens", "max_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_logprobs", "top_logprobs"),
    ] {
        if let Some(value) = body.get(from) {
            member(to, value.0);
        }
    }
    if let Some(effort) = body.get("reasoning").and_then(|reasoning| reasoning.get("effort")) {
        member("reasoning_effort", effort.0);
    }
    for (name, filter) in FILTERED {
        match body.raw(name) {
            Some(_) if filters.has(filter) => fired.insert(filter),
            Some(value) => member(name, value.0),
            None => {}
        }
    }
    match body.get("text").and_then(|text| text.object().raw("verbosity")) {
        Some(_) if filters.has(Filter::Verbosity) => fired.insert(Filter::Verbosity),
        Some(value) => member("verbosity", value.0),
        None => {}
    }
    // A message is written anew, without it.
    if filters.has(Filter::CacheControl) && (is_marked(body) || messages.marked || tools.marked) {
        fired.insert(Filter::CacheControl);
    }
    if let Some(stream) = body.get("stream") {
        member("stream", stream.0);
        member("stream_options", "{\"include_usage\":true}");
    }
    chat.push('}');
    left_out.extend(fired.iter().map(Filter::as_str));
    Ok(Converted { body: chat.into_bytes(), reply: reply(body, request_id, now_s), left_out })
}

fn is_marked(object: &Object<'_>) -> bool {
    object.raw("cache_control").is_some()
}

/// A member that is a text, if it says something; `place` is the object's.
fn text_of<'a>(object: &Object<'a>, member: &str, place: &str) -> Result<Option<Raw<'a>>, Unconvertible> {
    match object.get(member) {
        Some(value) if !value.is_text() => parameter(format!("{place}.{member}")),
        value => Ok(value),
    }
}

/// The chat's messages. Ollama's own converter makes one message of what an assistant thought, said and called.
#[derive(Default)]
struct Messages {
    done: Vec<String>,
    /// An assistant's message that further items may belong to.
    open: Option<Assistant>,
    /// A `cache_control` was met.
    marked: bool,
}

#[derive(Default)]
struct Assistant {
    reasoning: String,
    /// As JSON.
    content: Option<String>,
    calls: Vec<String>,
}

impl Messages {
    fn flush(&mut self) {
        let Some(Assistant { reasoning, content, calls }) = self.open.take() else { return };
        // A thought of nobody: Ollama refuses a message without content and calls.
        if content.is_none() && calls.is_empty() {
            return;
        }
        let mut message = "{\"role\":\"assistant\"".to_owned();
        if !reasoning.is_empty() {
            message.push_str(&format!(",\"reasoning\":{}", text(&reasoning)));
        }
        if let Some(content) = content {
            message.push_str(&format!(",\"content\":{content}"));
        }
        if !calls.is_empty() {
            message.push_str(&format!(",\"tool_calls\":[{}]", calls.join(",")));
        }
        message.push('}');
        self.done.push(message);
    }

    fn item(&mut self, at: usize, item: Raw<'_>) -> Result<(), Unconvertible> {
        if !item.is_object() {
            return parameter(format!("input[{at}]"));
        }
        let item = &item.object();
        self.marked |= is_marked(item);
        let place = format!("input[{at}]");
        let kind = text_of(item, "type", &place)?.and_then(Raw::text);
        match kind.as_deref() {
            Some("message") => self.message(at, item),
            None if item.get("role").is_some() => self.message(at, item),
            Some("reasoning") => {
                if self.open.as_ref().is_some_and(|open| open.content.is_some() || !open.calls.is_empty()) {
                    self.flush();
                }
                self.open.get_or_insert_default().reasoning.push_str(&thought(item));
                Ok(())
            }
            Some("function_call") => {
                let or_empty = |value: Option<Raw<'_>>| value.map_or("\"\"".to_owned(), |value| value.0.to_owned());
                let id = or_empty(text_of(item, "call_id", &place)?.or(text_of(item, "id", &place)?));
                let name = or_empty(text_of(item, "name", &place)?);
                // Ollama takes no empty text for arguments.
                let arguments = item.get("arguments").map_or("\"{}\"", |arguments| arguments.0);
                let open = self.open.get_or_insert_default();
                let index = open.calls.len();
                open.calls.push(format!(
                    "{{\"index\":{index},\"id\":{id},\"type\":\"function\",\"function\":{{\"name\":{name},\"arguments\":{arguments}}}}}"
                ));
                Ok(())
            }
            Some("function_call_output") => {
                self.flush();
                let said = match item.get("output") {
                    None => "\"\"".to_owned(),
                    Some(output) if output.is_text() => output.0.to_owned(),
                    Some(output) => {
                        let content = Content::read(output, &format!("{place}.output"))?;
                        self.marked |= content.marked;
                        if let Some(image) = content.images.first() {
                            return parameter(image.place.clone());
                        }
                        content.text
                    }
                };
                let id = text_of(item, "call_id", &place)?.map_or("\"\"", |id| id.0);
                self.done.push(format!("{{\"role\":\"tool\",\"tool_call_id\":{id},\"content\":{said}}}"));
                Ok(())
            }
            _ => parameter(format!("input[{at}].type")),
        }
    }

    fn message(&mut self, at: usize, item: &Object<'_>) -> Result<(), Unconvertible> {
        let role = item.get("role").and_then(Raw::text);
        let role = match role.as_deref() {
            Some("developer" | "system") => "system",
            Some("user") => "user",
            Some("assistant") => "assistant",
            _ => return parameter(format!("input[{at}].role")),
        };
        let content = match item.get("content") {
            None => "\"\"".to_owned(),
            Some(content) if content.is_text() => content.0.to_owned(),
            Some(content) => {
                let content = Content::read(content, &format!("input[{at}].content"))?;
                self.marked |= content.marked;
                content.json()
            }
        };
        if role == "assistant" {
            if self.open.as_ref().is_some_and(|open| open.content.is_some() || !open.calls.is_empty()) {
                self.flush();
            }
            self.open.get_or_insert_default().content = Some(content);
            return Ok(());
        }
        self.flush();
        self.done.push(format!("{{\"role\":\"{role}\",\"content\":{content}}}"));
        Ok(())
    }
}

/// What a reasoning item thought: its content, else its summary, else what Ollama keeps as plain text in `encrypted_content`.
fn thought(item: &Object<'_>) -> String {
    let texts = |name| {
        let parts = item.get(name).map(Raw::items).unwrap_or_default();
        parts.into_iter().filter_map(|part| part.says("text")).collect::<String>()
    };
    let (content, summary) = (texts("content"), texts("summary"));
    match (content.is_empty(), summary.is_empty()) {
        (false, _) => content,
        (true, false) => summary,
        (true, true) => item.says("encrypted_content").unwrap_or_default().into_owned(),
    }
}

/// The parts of a content.
struct Content {
    /// All texts, joined, as JSON.
    text: String,
    images: Vec<Image>,
    /// A `cache_control` was met.
    marked: bool,
}

struct Image {
    place: String,
    /// As a part of chat.
    json: String,
}

impl Content {
    fn read(content: Raw<'_>, place: &str) -> Result<Content, Unconvertible> {
        if !content.is_array() {
            return parameter(place);
        }
        let (mut texts, mut images, mut marked) = (Vec::new(), Vec::new(), false);
        for (at, part) in content.items().into_iter().enumerate() {
            let part = &part.object();
            marked |= is_marked(part);
            let here = format!("{place}[{at}]");
            let kind = part.get("type").and_then(Raw::text);
            match kind.as_deref() {
                Some("input_text" | "output_text" | "text" | "summary_text") => {
                    texts.extend(text_of(part, "text", &here)?);
                }
                Some("refusal") => texts.extend(text_of(part, "refusal", &here)?),
                Some("input_image") => {
                    let url = part.get("image_url");
                    let Some(url) = url.filter(|url| url.text().is_some_and(|url| url.starts_with("data:"))) else {
                        let member = if url.is_some() { "image_url" } else { "file_id" };
                        return parameter(format!("{here}.{member}"));
                    };
                    let detail = part.get("detail").map_or(String::new(), |detail| format!(",\"detail\":{}", detail.0));
                    images.push(Image {
                        place: format!("{here}.type"),
                        json: format!("{{\"type\":\"image_url\",\"image_url\":{{\"url\":{}{detail}}}}}", url.0),
                    });
                }
                _ => return parameter(format!("{here}.type")),
            }
        }
        let text = match texts[..] {
            [] => "\"\"".to_owned(),
            // As it was written.
            [one] => one.0.to_owned(),
            _ => text(&texts.iter().filter_map(|text| text.text()).collect::<String>()),
        };
        Ok(Content { text, images, marked })
    }

    fn json(self) -> String {
        if self.images.is_empty() {
            return self.text;
        }
        let said = (self.text != "\"\"").then(|| format!("{{\"type\":\"text\",\"text\":{}}}", self.text));
        let parts: Vec<String> = said.into_iter().chain(self.images.into_iter().map(|image| image.json)).collect();
        format!("[{}]", parts.join(","))
    }
}

struct Tools {
    /// As JSON.
    sent: Vec<String>,
    choice: Option<String>,
    /// Some were of a type that Ollama does not have.
    cut: bool,
    /// A `cache_control` was met.
    marked: bool,
}

impl Tools {
    fn read(body: &Object<'_>, filters: Filters) -> Result<Tools, Unconvertible> {
        let all = body.get("tools");
        if all.is_some_and(|tools| !tools.is_array()) {
            return parameter("tools");
        }
        let all: Vec<Object<'_>> = all.map(Raw::items).unwrap_or_default().into_iter().map(Raw::object).collect();
        let marked = all.iter().any(is_marked);
        let is_function = |tool: &&Object<'_>| tool.says("type").as_deref() == Some("function");
        let mut functions: Vec<&Object<'_>> = all.iter().filter(is_function).collect();
        let cut = functions.len() < all.len();
        let mut choice = None;
        if let Some(asked) = body.get("tool_choice") {
            let kind = asked.says("type");
            match (asked.text().as_deref(), kind.as_deref()) {
                (Some("none"), _) => functions.clear(),
                (Some("auto"), _) => choice = Some(asked.0.to_owned()),
                (Some("required"), _) if cut && functions.is_empty() => return parameter("tools"),
                (Some("required"), _) => choice = Some(asked.0.to_owned()),
                (None, Some("function")) => {
                    let name = asked.get("name").map_or("\"\"", |name| name.0);
                    choice = Some(format!("{{\"type\":\"function\",\"function\":{{\"name\":{name}}}}}"));
                }
                (None, Some("allowed_tools")) => {
                    let allowed = asked.get("tools").map(Raw::items).unwrap_or_default();
                    let allowed: Vec<Object<'_>> = allowed.into_iter().map(Raw::object).collect();
                    let allowed: HashSet<_> = allowed.iter().filter(is_function).map(|it| it.says("name")).collect();
                    functions.retain(|tool| allowed.contains(&tool.says("name")));
                    let mode = asked.says("mode").filter(|mode| mode == "required");
                    if mode.is_some() && functions.is_empty() {
                        return parameter("tool_choice.tools");
                    }
                    choice = Some(text(mode.as_deref().unwrap_or("auto")));
                }
                _ => return parameter("tool_choice"),
            }
        }
        let sent: Vec<String> = functions
            .iter()
            .map(|tool| {
                let inner = tool.names().filter(|(name, _)| {
                    *name != "type" && !(*name == "cache_control" && filters.has(Filter::CacheControl))
                });
                let inner: Vec<String> = inner.map(|(name, value)| format!("{}:{}", text(name), value.0)).collect();
                format!("{{\"type\":\"function\",\"function\":{{{}}}}}", inner.join(","))
            })
            .collect();
        if sent.is_empty() {
            choice = None;
        }
        Ok(Tools { sent, choice, cut, marked })
    }
}

fn response_format(body: &Object<'_>) -> Result<Option<String>, Unconvertible> {
    let Some(format) = body.get("text").and_then(|text| text.get("format")) else { return Ok(None) };
    match format.says("type").as_deref() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some("{\"type\":\"json_object\"}".to_owned())),
        Some("json_schema") => {
            let inner = format.members().into_iter().filter(|(name, _)| name != "type");
            let inner: Vec<String> = inner.map(|(name, value)| format!("{}:{}", text(&name), value.0)).collect();
            Ok(Some(format!("{{\"type\":\"json_schema\",\"json_schema\":{{{}}}}}", inner.join(","))))
        }
        _ => parameter("text.format.type"),
    }
}

/// What Ollama's own route repeats, with its defaults.
fn reply(body: &Object<'_>, request_id: &str, now_s: u64) -> Reply {
    let or = |name: &str, default: &str| body.get(name).map_or(default, |value| value.0).to_owned();
    let tools = body.get("tools").map(Raw::items).unwrap_or_default();
    let tools: Vec<String> = tools
        .into_iter()
        .map(|raw| {
            let tool = raw.object();
            if tool.says("type").as_deref() != Some("function") {
                return raw.0.to_owned();
            }
            let names = ["type", "name", "description", "strict", "parameters"];
            let members = names.map(|name| format!("\"{name}\":{}", tool.raw(name).map_or("null", |value| value.0)));
            format!("{{{}}}", members.join(","))
        })
        .collect();
    let flag = |name: &str, default: &str| {
        let given = body.raw(name).map(|value| value.0);
        given.filter(|given| *given != "null").unwrap_or(default).to_owned()
    };
    Reply {
        id: request_id.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-')).take(64).collect(),
        created_at: now_s,
        model: or("model", "\"\""),
        instructions: or("instructions", "null"),
        max_output_tokens: or("max_output_tokens", "null"),
        max_tool_calls: or("max_tool_calls", "null"),
        metadata: or("metadata", "{}"),
        parallel_tool_calls: flag("parallel_tool_calls", "true"),
        reasoning: or("reasoning", "null"),
        safety_identifier: or("safety_identifier", "null"),
        temperature: or("temperature", "1"),
        format: body
            .get("text")
            .and_then(|text| text.get("format"))
            .map_or("{\"type\":\"text\"}", |it| it.0)
            .to_owned(),
        tool_choice: or("tool_choice", "\"auto\""),
        tools: format!("[{}]", tools.join(",")),
        top_logprobs: or("top_logprobs", "0"),
        top_p: or("top_p", "1"),
        truncation: or("truncation", "\"disabled\""),
    }
}
