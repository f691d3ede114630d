//! What a request body asks for, in one form for all dialects.

use serde_json::Value;

use super::loose::{Fields, member, member_text, mismatch};
use super::refusal::Refusal;
use super::route::Route;

/// A request for text.
pub(super) struct Ask {
    /// As the caller spells it.
    pub model: String,
    pub stream: bool,
    /// OpenAI's `stream_options.include_usage`.
    pub include_usage: bool,
    /// Most tokens to say.
    pub limit: Option<i64>,
    pub stops: Vec<String>,
    pub turns: Vec<Turn>,
    /// Taken as it is, without turns around it: generate's `raw` or `template`.
    pub bare_prompt: Option<String>,
    pub raw: bool,
    /// No prompt: the model is only loaded.
    pub loads_only: bool,
    /// `keep_alive` is 0.
    pub unloads: bool,
    /// In Ollama's own form: `{"type":"function","function":{..}}`.
    pub tools: Vec<Value>,
    pub think: Think,
    pub suffix: bool,
    pub debug_render: bool,
    /// A wrong option, found where the model would be run.
    pub bad_option: Option<Refusal>,
    /// The Responses API shows parts of the request in its reply.
    pub echo: Echo,
}

/// One message of a conversation.
pub(super) struct Turn {
    pub role: String,
    pub content: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Think {
    Default,
    Off,
    /// Refused by models that cannot.
    On,
    /// Ignored by models that cannot (Anthropic).
    Wished,
}

#[derive(Default)]
pub(super) struct Echo {
    pub instructions: Option<String>,
    pub tools: Vec<Value>,
    pub max_output_tokens: Option<i64>,
    pub format: Option<Value>,
    pub truncation: Option<String>,
    pub background: bool,
}

impl Ask {
    fn new(model: &str, stream: bool) -> Ask {
        Ask {
            model: model.to_owned(),
            stream,
            include_usage: false,
            limit: None,
            stops: Vec::new(),
            turns: Vec::new(),
            bare_prompt: None,
            raw: false,
            loads_only: false,
            unloads: false,
            tools: Vec::new(),
            think: Think::Default,
            suffix: false,
            debug_render: false,
            bad_option: None,
            echo: Echo::default(),
        }
    }

    /// Reads the fields of a request on one of the routes that answer with text.
    pub fn read(route: Route, fields: &Fields) -> Result<Ask, Refusal> {
        match route {
            Route::Generate => generate(fields),
            Route::OpenAiChat => openai_chat(fields),
            Route::Completions => completions(fields),
            Route::Responses => responses(fields),
            Route::Messages => messages(fields),
            _ => chat(fields),
        }
    }

    /// Go's name of the struct that such a route binds, with its package.
    pub fn go_type(route: Route) -> &'static str {
        match route {
            Route::Generate => "api.GenerateRequest",
            Route::OpenAiChat => "openai.ChatCompletionRequest",
            Route::Completions => "openai.CompletionRequest",
            Route::Responses => "openai.ResponsesRequest",
            Route::Messages => "anthropic.MessagesRequest",
            Route::Embed => "api.EmbedRequest",
            Route::OpenAiEmbeddings => "openai.EmbedRequest",
            Route::Embeddings => "api.EmbeddingRequest",
            Route::Show => "api.ShowRequest",
            Route::Pull => "api.PullRequest",
            Route::Push => "api.PushRequest",
            Route::Create => "api.CreateRequest",
            Route::Copy => "api.CopyRequest",
            Route::Delete => "api.DeleteRequest",
            _ => "api.ChatRequest",
        }
    }

    /// The prompt as the tiny models' templates render it. One byte is one token, and two more begin it.
    pub fn render(&self, with_tools: bool) -> String {
        if let Some(bare) = &self.bare_prompt {
            return bare.clone();
        }
        let mut prompt = String::new();
        if with_tools && !self.tools.is_empty() {
            prompt.push_str("[tools] ");
            prompt.push_str(&Value::from(self.tools.clone()).to_string());
            prompt.push_str("\nAnswer with {\"name\": ..., \"parameters\": ...} to call one.\n");
        }
        for (index, turn) in self.turns.iter().enumerate() {
            // Ollama joins neighbours of one role.
            if index > 0 && self.turns[index - 1].role == turn.role {
                prompt.truncate(prompt.len() - 1);
                prompt.push_str("\n\n");
            } else {
                prompt.push('[');
                prompt.push_str(&turn.role);
                prompt.push_str("] ");
            }
            prompt.push_str(&turn.content);
            prompt.push('\n');
        }
        prompt.push_str("[assistant] ");
        prompt
    }

    fn say(&mut self, role: &str, content: impl Into<String>) {
        self.turns.push(Turn { role: role.to_owned(), content: content.into() });
    }
}

fn zero(fields: &Fields) -> bool {
    match fields.plain("keep_alive") {
        Some(Value::Number(number)) => number.as_f64() == Some(0.0),
        Some(Value::String(text)) => matches!(text.as_str(), "0" | "0s" | "0m" | "0h"),
        _ => false,
    }
}

fn texts(value: Option<&Value>) -> Vec<String> {
    match value {
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) => items.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// What the native routes have in common.
fn native(fields: &Fields, go_struct: &str) -> Result<Ask, String> {
    let model = fields.text("model", go_struct)?.unwrap_or_default();
    let mut ask = Ask::new(model, fields.flag("stream", go_struct)?.unwrap_or(true));
    ask.unloads = zero(fields);
    let options = fields.options();
    match options.get("num_predict") {
        None | Some(Value::Null) => {}
        Some(Value::Number(number)) => {
            ask.limit = number.as_i64().or_else(|| number.as_f64().map(|float| float as i64))
        }
        Some(_) => ask.bad_option = Some(Refusal::handler(500, "option \"num_predict\" must be of type integer")),
    }
    ask.stops = texts(options.get("stop"));
    ask.think = match fields.plain("think") {
        None => Think::Default,
        Some(Value::Bool(false)) => Think::Off,
        Some(_) => Think::On,
    };
    ask.debug_render = fields.flag("_debug_render_only", go_struct)?.unwrap_or(false);
    if let Some(Value::String(format)) = fields.plain("format")
        && !matches!(format.as_str(), "" | "json")
    {
        let quoted = Value::from(Value::from(format.as_str()).to_string());
        let message = format!("invalid format: {quoted}; expected \"json\" or a valid JSON Schema object");
        ask.bad_option = Some(Refusal::handler(500, message));
    }
    Ok(ask)
}

fn chat(fields: &Fields) -> Result<Ask, Refusal> {
    const GO: &str = "ChatRequest";
    let mut ask = native(fields, GO).map_err(Refusal::binding)?;
    let messages = fields.list("messages", GO, "[]api.Message").map_err(Refusal::binding)?;
    ask.loads_only = messages.is_empty();
    for message in messages {
        let mut content = member_text(message, "content").to_owned();
        for call in member(message, "tool_calls").and_then(Value::as_array).into_iter().flatten() {
            let function = member(call, "function").unwrap_or(&Value::Null);
            content.push_str(&call_text(member_text(function, "name"), member(function, "arguments")));
        }
        ask.say(&member_text(message, "role").to_lowercase(), content);
    }
    ask.tools = fields.list("tools", GO, "[]api.Tool").map_err(Refusal::binding)?.to_vec();
    Ok(ask)
}

fn call_text(name: &str, arguments: Option<&Value>) -> String {
    format!("{{\"name\": \"{name}\", \"parameters\": {}}}", arguments.unwrap_or(&Value::Null))
}

fn generate(fields: &Fields) -> Result<Ask, Refusal> {
    const GO: &str = "GenerateRequest";
    let mut ask = native(fields, GO).map_err(Refusal::binding)?;
    let text = |name| fields.text(name, GO).map(|text| text.unwrap_or_default().to_owned()).map_err(Refusal::binding);
    let (prompt, system, template) = (text("prompt")?, text("system")?, text("template")?);
    ask.raw = fields.flag("raw", GO).map_err(Refusal::binding)?.unwrap_or(false);
    ask.suffix = !text("suffix")?.is_empty();
    ask.loads_only = prompt.is_empty();
    if ask.raw {
        ask.bare_prompt = Some(prompt);
    } else if !template.is_empty() {
        ask.bare_prompt = Some(template.replace("{{ .Prompt }}", &prompt).replace("{{ .System }}", &system));
    } else {
        if !system.is_empty() {
            ask.say("system", system);
        }
        ask.say("user", prompt);
    }
    Ok(ask)
}

/// What the chat and completion routes of OpenAI have in common.
fn openai(fields: &Fields, go_struct: &str) -> Result<Ask, String> {
    let model = fields.text("model", go_struct)?.unwrap_or_default();
    let mut ask = Ask::new(model, fields.flag("stream", go_struct)?.unwrap_or(false));
    let stream_options = fields.plain("stream_options").unwrap_or(&Value::Null);
    ask.include_usage = member(stream_options, "include_usage").and_then(Value::as_bool).unwrap_or(false);
    ask.limit = whole(fields, "max_tokens", go_struct)?;
    ask.stops = texts(fields.plain("stop"));
    Ok(ask)
}

/// Integers are strict here: `3.0` is none.
fn whole(fields: &Fields, name: &str, go_struct: &str) -> Result<Option<i64>, String> {
    match fields.plain(name) {
        None => Ok(None),
        Some(Value::Number(number)) => match number.as_i64() {
            Some(number) => Ok(Some(number)),
            None => Err(format!(
                "json: cannot unmarshal number {number} into Go struct field {go_struct}.{name} of type int"
            )),
        },
        Some(other) => Err(mismatch(other, go_struct, name, "int")),
    }
}

fn openai_chat(fields: &Fields) -> Result<Ask, Refusal> {
    const GO: &str = "ChatCompletionRequest";
    let mut ask = openai(fields, GO).map_err(Refusal::binding)?;
    let messages = fields.list("messages", GO, "[]openai.Message").map_err(Refusal::binding)?;
    if messages.is_empty() {
        return Err(Refusal::binding("[] is too short - 'messages'"));
    }
    for message in messages {
        let role = member_text(message, "role");
        match member(message, "content") {
            None | Some(Value::Null) => {
                let calls = member(message, "tool_calls").and_then(Value::as_array);
                ask.say(role, calls.into_iter().flatten().map(openai_call).collect::<String>());
            }
            Some(Value::String(text)) => {
                let calls = member(message, "tool_calls").and_then(Value::as_array);
                ask.say(role, text.clone() + &calls.into_iter().flatten().map(openai_call).collect::<String>());
            }
            Some(Value::Array(parts)) => {
                for part in parts {
                    match member_text(part, "type") {
                        "text" => ask.say(role, member_text(part, "text")),
                        "image_url" => {
                            let image = member(part, "image_url").unwrap_or(&Value::Null);
                            let url = image.as_str().unwrap_or_else(|| member_text(image, "url"));
                            if url.starts_with("http://") || url.starts_with("https://") {
                                let words =
                                    "image URLs are not currently supported, please use base64 encoded data instead";
                                return Err(Refusal::binding(words));
                            }
                        }
                        _ => {}
                    }
                }
            }
            Some(other) => {
                let kind = if other.is_boolean() {
                    "bool"
                } else if other.is_number() {
                    "float64"
                } else {
                    "map[string]interface {}"
                };
                return Err(Refusal::binding(format!("invalid message content type: {kind}")));
            }
        }
    }
    ask.tools = fields.list("tools", GO, "[]api.Tool").map_err(Refusal::binding)?.to_vec();
    let effort = fields.plain("reasoning_effort").or_else(|| member(fields.plain("reasoning")?, "effort"));
    ask.think = match effort.and_then(Value::as_str) {
        None => Think::Default,
        Some("none") => Think::Off,
        Some("minimal" | "low" | "medium" | "high" | "xhigh" | "ultra" | "max") => Think::On,
        Some(other) => {
            let known = r#"(must be "minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none")"#;
            return Err(Refusal::binding(format!("invalid reasoning value: {} {known}", Value::from(other))));
        }
    };
    Ok(ask)
}

fn openai_call(call: &Value) -> String {
    let function = member(call, "function").unwrap_or(&Value::Null);
    let arguments: Option<Value> = serde_json::from_str(member_text(function, "arguments")).ok();
    call_text(member_text(function, "name"), arguments.as_ref())
}

fn completions(fields: &Fields) -> Result<Ask, Refusal> {
    const GO: &str = "CompletionRequest";
    let mut ask = openai(fields, GO).map_err(Refusal::binding)?;
    let prompt = fields.text("prompt", GO).map_err(Refusal::binding)?.unwrap_or_default();
    ask.suffix = !fields.text("suffix", GO).map_err(Refusal::binding)?.unwrap_or_default().is_empty();
    ask.loads_only = prompt.is_empty();
    ask.say("user", prompt);
    Ok(ask)
}

fn responses(fields: &Fields) -> Result<Ask, Refusal> {
    const GO: &str = "ResponsesRequest";
    let bad = Refusal::binding;
    let model = fields.text("model", GO).map_err(bad)?.unwrap_or_default();
    let mut ask = Ask::new(model, fields.flag("stream", GO).map_err(bad)?.unwrap_or(false));
    ask.limit = whole(fields, "max_output_tokens", GO).map_err(bad)?;
    ask.echo.max_output_tokens = ask.limit;
    if let Some(instructions) = fields.text("instructions", GO).map_err(bad)?.filter(|text| !text.is_empty()) {
        ask.echo.instructions = Some(instructions.to_owned());
        ask.say("system", instructions);
    }
    match fields.plain("input") {
        None => ask.loads_only = true,
        Some(Value::String(text)) if text.is_empty() => ask.loads_only = true,
        Some(Value::String(text)) => ask.say("user", text.clone()),
        Some(Value::Array(items)) => {
            ask.loads_only = items.is_empty();
            for item in items {
                item_turn(&mut ask, item)?;
            }
        }
        Some(other) => {
            let kind = if other.is_number() {
                "number"
            } else if other.is_boolean() {
                "bool"
            } else {
                "object"
            };
            let words = format!(
                "input must be a string or array: json: cannot unmarshal {kind} into Go value of type []json.RawMessage"
            );
            return Err(bad(words));
        }
    }
    for tool in fields.list("tools", GO, "[]openai.ResponsesTool").map_err(bad)? {
        let part = |name: &str| member(tool, name).cloned().unwrap_or(Value::Null);
        ask.echo.tools.push(serde_json::json!({
            "type": member_text(tool, "type"), "name": member_text(tool, "name"), "description": part("description"),
            "strict": part("strict"), "parameters": part("parameters"),
        }));
        ask.tools.push(serde_json::json!({"type": "function", "function": {
            "name": member_text(tool, "name"), "description": member_text(tool, "description"), "parameters": part("parameters"),
        }}));
    }
    ask.echo.format = fields.plain("text").and_then(|text| member(text, "format")).cloned();
    ask.echo.truncation = fields.text("truncation", GO).map_err(bad)?.map(str::to_owned);
    ask.echo.background = fields.flag("background", GO).map_err(bad)?.unwrap_or(false);
    Ok(ask)
}

fn item_turn(ask: &mut Ask, item: &Value) -> Result<(), Refusal> {
    match member_text(item, "type") {
        "function_call" => {
            // No text is no arguments there, and an error on the chat route.
            let arguments = Some(member_text(item, "arguments")).filter(|text| !text.is_empty()).unwrap_or("{}");
            let arguments: Option<Value> = serde_json::from_str(arguments).ok();
            let call = call_text(member_text(item, "name"), arguments.as_ref());
            // What an assistant said and called is one message.
            match ask.turns.last_mut().filter(|turn| turn.role == "assistant") {
                Some(turn) => turn.content.push_str(&call),
                None => ask.say("assistant", call),
            }
        }
        "function_call_output" => ask.say("tool", member_text(item, "output")),
        _ => match member(item, "content") {
            Some(Value::Array(parts)) => {
                for part in parts {
                    match member_text(part, "type") {
                        "input_file" => return Err(Refusal::binding("file inputs are not currently supported")),
                        _ => ask.say(member_text(item, "role"), member_text(part, "text")),
                    }
                }
            }
            content => ask.say(member_text(item, "role"), content.and_then(Value::as_str).unwrap_or_default()),
        },
    }
    Ok(())
}

fn messages(fields: &Fields) -> Result<Ask, Refusal> {
    const GO: &str = "MessagesRequest";
    let bad = Refusal::binding;
    let model = fields.text("model", GO).map_err(bad)?.unwrap_or_default();
    let mut ask = Ask::new(model, fields.flag("stream", GO).map_err(bad)?.unwrap_or(false));
    ask.limit = whole(fields, "max_tokens", GO).map_err(bad)?;
    let messages = fields.list("messages", GO, "[]anthropic.MessageParam").map_err(bad)?;
    if model.is_empty() {
        return Err(Refusal::binding("model is required"));
    }
    if ask.limit.unwrap_or(0) <= 0 {
        return Err(Refusal::binding("max_tokens is required and must be positive"));
    }
    if messages.is_empty() {
        return Err(Refusal::binding("messages is required"));
    }
    match fields.plain("system") {
        Some(Value::String(text)) => ask.say("system", text.clone()),
        Some(Value::Array(blocks)) => {
            for block in blocks {
                ask.say("system", member_text(block, "text"));
            }
        }
        _ => {}
    }
    for message in messages {
        let role = member_text(message, "role");
        match member(message, "content") {
            Some(Value::Array(blocks)) => {
                for block in blocks {
                    block_turn(&mut ask, role, block)?;
                }
            }
            content => ask.say(role, content.and_then(Value::as_str).unwrap_or_default()),
        }
    }
    for tool in fields.list("tools", GO, "[]anthropic.Tool").map_err(bad)? {
        ask.tools.push(serde_json::json!({"type": "function", "function": {
            "name": member_text(tool, "name"), "description": member_text(tool, "description"),
            "parameters": member(tool, "input_schema").cloned().unwrap_or(Value::Null),
        }}));
    }
    ask.stops = texts(fields.plain("stop_sequences"));
    ask.think = match fields.plain("thinking").map(|thinking| member_text(thinking, "type")) {
        None => Think::Default,
        Some("disabled") => Think::Off,
        Some(_) => Think::Wished,
    };
    Ok(ask)
}

fn block_turn(ask: &mut Ask, role: &str, block: &Value) -> Result<(), Refusal> {
    match member_text(block, "type") {
        "tool_use" => ask.say("assistant", call_text(member_text(block, "name"), member(block, "input"))),
        "tool_result" => match member(block, "content") {
            Some(Value::Array(parts)) => {
                for part in parts {
                    ask.say("tool", member_text(part, "text"));
                }
            }
            content => ask.say("tool", content.and_then(Value::as_str).unwrap_or_default()),
        },
        "image" => {
            let kind = member(block, "source").map(|source| member_text(source, "type")).unwrap_or_default();
            if kind != "base64" {
                let words = format!("invalid image source type: {kind}. Only base64 images are supported.");
                return Err(Refusal::binding(words));
            }
        }
        _ => ask.say(role, member_text(block, "text")),
    }
    Ok(())
}
