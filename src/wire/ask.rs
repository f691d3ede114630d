//! The facts of a request, read from its body by one strict reader for all dialects.
//!
//! Go's decoder takes `MODEL` for `model`, the last of two duplicates, and ignores what follows the object (ollama-wire, section
//! 7). A proxy that reads such a body otherwise than Ollama decides about one model and forwards to another. So this reader does
//! not imitate Go: a body that Go could read in another way than any other parser is refused, and everything else means the same
//! to all. What is refused beyond RFC 8259: duplicate keys after Go's folding, and known keys that are not spelled exactly (other
//! case, `ſ`, escapes). Both hold where facts are read: at the top, in `messages[]`, `input[]`, `tools[]`, `options` and
//! `stream_options`. In `options` Go compares keys exactly, so there another case is merely an unknown option.
//!
//! The filters of [`super::filter`] work in the same pass: what they cut or replace is noted while it is read, and the facts are
//! those of the body that is sent.
use std::fmt;
use std::ops::Range;

use super::filter::{Filter, Filters};
use super::json::{Malformed, Reader, Shape};
use super::rewrite::edit::{Edits, Fate, Siblings};
use super::{BodyRule, Dialect, Endpoint, Kind, ModelRef, anthropic, native, openai, responses};
use keys::{Keys, judged_object};

mod keys;
mod unoffered;
mod values;

pub use unoffered::asks_for_stream;

/// What a request asks for. Facts only: no prompt, no message, no text of the caller but names that fit a grammar.
/// `None` means that the endpoint has no such fact, or that the body does not say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ask {
    /// The model that Ollama will run, as Go's decoder reads the body.
    pub model: Option<ModelRef>,
    /// Further models that the request names (`destination` of a copy, `from` of a create): each is decided too.
    pub others: Vec<ModelRef>,
    /// Whether the reply will be streamed, Ollama's defaults applied (native: true, `/v1`: false).
    pub stream: Option<bool>,
    pub has_system_prompt: Option<bool>,
    pub has_tools: Option<bool>,
    pub message_count: Option<u64>,
    /// As the caller wrote it: a JSON number or string, for the policy only.
    pub keep_alive: Option<serde_json::Value>,
    pub num_ctx: Option<i64>,
    pub num_predict: Option<i64>,
    /// `/v1` streams: the caller set `stream_options.include_usage` itself.
    pub wants_usage: bool,
    /// A tool that Ollama itself would run on the internet (`web_search`, `web_fetch`): egress.
    pub has_web_tools: bool,
}

/// Why a body is refused (400). The text says what to do; it names keys from our own lists and quotes nothing of the caller's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskError {
    /// Two parsers could read it in two ways: `ambiguous_body`.
    Ambiguous(String),
    /// No JSON object, or a member that is not of its type: `invalid_body`.
    Invalid(String),
    /// A member that Ollama would pass over in silence, although the answer without it is another: `unsupported_parameter`. The
    /// text is its name.
    Unsupported(String),
}

impl fmt::Display for AskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AskError::Ambiguous(text) | AskError::Invalid(text) => f.write_str(text),
            AskError::Unsupported(name) => write!(f, "`{name}` is not supported"),
        }
    }
}

impl std::error::Error for AskError {}

impl From<Malformed> for AskError {
    fn from(Malformed(what): Malformed) -> Self {
        AskError::Invalid(format!("the body is not valid JSON: {what}; send one JSON object"))
    }
}

/// What was read of a body, and what has to be done to it.
pub struct Filtered {
    /// The facts of the body with its edits.
    pub ask: Ask,
    pub edits: Edits,
    /// The filters that found something to do.
    pub fired: Filters,
}

/// Reads the facts of a request of `endpoint` that is sent as it is. Endpoints without a JSON body have none.
///
/// The cost is one pass over the bytes; nothing is copied but names and escaped keys.
pub fn read(endpoint: Endpoint, body: &[u8]) -> Result<Ask, AskError> {
    Ok(read_filtered(endpoint, body, Filters::NONE)?.ask)
}

/// As [`read`], with the edits that the filters `on` make.
pub fn read_filtered(endpoint: Endpoint, body: &[u8], on: Filters) -> Result<Filtered, AskError> {
    if endpoint.body() != BodyRule::Json {
        return Ok(Filtered { ask: Ask::default(), edits: Edits::default(), fired: Filters::NONE });
    }
    let mut reader = Reader::new(body)?;
    reader.space();
    if reader.at() == body.len() {
        return Err(AskError::Invalid("the body is empty; send one JSON object".to_owned()));
    }
    if reader.shape()? != Shape::Object {
        return Err(AskError::Invalid("the body must be one JSON object".to_owned()));
    }
    let mut seen = Seen::new(endpoint, on);
    let mut keys = Keys::new("the body", request_fields(endpoint), Filter::members(endpoint));
    let mut siblings = Siblings::new(reader.at() + 1);
    reader.object(|reader, key| {
        let fate = match keys.judge(key)? {
            Some(name) => seen.member(name, key.range(), reader)?,
            None => passed_over(reader)?,
        };
        siblings.tell(key.range().start..reader.at(), fate, &mut seen.edits);
        Ok::<(), AskError>(())
    })?;
    reader.end()?;
    let added = seen.ask_for_usage();
    siblings.close(added, &mut seen.edits);
    seen.free_the_choice();
    seen.finish()
}

fn request_fields(endpoint: Endpoint) -> &'static [&'static str] {
    match (endpoint, endpoint.dialect()) {
        (Endpoint::Responses, _) => responses::REQUEST,
        (_, Dialect::OpenAi) => openai::REQUEST,
        (_, Dialect::Anthropic) => anthropic::REQUEST,
        (_, Dialect::Native) => native::REQUEST,
    }
}

/// What was found in a body, before defaults, and what is to change in it.
struct Seen {
    endpoint: Endpoint,
    on: Filters,
    fired: Filters,
    edits: Edits,
    model: Option<ModelRef>,
    /// The older key of show, pull, push, create and delete.
    name: Option<ModelRef>,
    others: Vec<ModelRef>,
    stream: Option<bool>,
    system: bool,
    tools: bool,
    count: u64,
    keep_alive: Option<serde_json::Value>,
    num_ctx: Option<i64>,
    num_predict: Option<i64>,
    cap: Option<Cap>,
    wants_usage: bool,
    usage: UsagePlace,
    web_tools: bool,
    /// Names and types of the web tools that are cut.
    cut_tools: Vec<String>,
    choice: Option<Choice>,
}

/// Where the longest answer was told: by the older member or the newer.
struct Cap {
    value: Range<usize>,
    newer: bool,
}

/// Where a stream is asked for its counts.
#[derive(Default)]
enum UsagePlace {
    #[default]
    Missing,
    /// `stream_options` is null.
    Null(Range<usize>),
    /// It is an object; `open` is behind its bracket.
    Object { open: usize, empty: bool },
    /// The value of `include_usage`.
    Flag(Range<usize>),
}

/// A `tool_choice` that names a tool.
struct Choice {
    value: Range<usize>,
    tool: String,
}

impl Seen {
    fn new(endpoint: Endpoint, on: Filters) -> Seen {
        Seen {
            endpoint,
            on,
            fired: Filters::NONE,
            edits: Edits::default(),
            model: None,
            name: None,
            others: Vec::new(),
            stream: None,
            system: false,
            tools: false,
            count: 0,
            keep_alive: None,
            num_ctx: None,
            num_predict: None,
            cap: None,
            wants_usage: false,
            usage: UsagePlace::Missing,
            web_tools: false,
            cut_tools: Vec::new(),
            choice: None,
        }
    }

    /// Reads one member of the body. Members that are facts of another endpoint are passed over.
    fn member(&mut self, name: &'static str, key: Range<usize>, reader: &mut Reader<'_>) -> Result<Fate, AskError> {
        use Endpoint::*;
        match (name, self.endpoint) {
            ("model", endpoint) if endpoint != Copy => self.model = self.model_name(reader, name)?,
            ("name", Show | Pull | Push | Create | Delete) => self.name = values::model_name(reader, name)?,
            ("source", Copy) => self.model = values::model_name(reader, name)?,
            ("destination", Copy) | ("from", Create) => self.others.extend(values::model_name(reader, name)?),
            (
                "stream",
                Chat | Generate | ChatCompletions | Completions | Responses | Messages | Pull | Push | Create,
            ) => {
                self.stream = values::flag(reader, name)?;
            }
            ("messages", Chat | ChatCompletions | Messages) => self.messages(reader)?,
            ("input", Responses) => self.items(reader)?,
            ("input", Embed | OpenAiEmbeddings) | ("prompt", Generate | Embeddings | Completions) => {
                self.count = values::inputs(reader)?;
            }
            ("instructions", Responses) | ("system", Generate) => {
                self.system |= values::text(reader, name)?.is_some_and(|text| !text.is_empty());
            }
            ("system", Messages) => self.system |= values::text_or_list(reader, name)?,
            ("tools", endpoint) if endpoint.kind() == Kind::Infer => self.tools(reader)?,
            ("tool_choice", Responses | Messages) => self.tool_choice(reader)?,
            ("options", Chat | Generate | Embed | Embeddings) => self.options(reader)?,
            ("keep_alive", Chat | Generate | Embed | Embeddings) => self.keep_alive = values::keep_alive(reader)?,
            ("max_tokens", ChatCompletions | Completions) => return self.cap(key, reader, false),
            ("max_completion_tokens", ChatCompletions | Completions) => return self.cap(key, reader, true),
            ("max_tokens", Messages) | ("max_output_tokens", Responses) => {
                self.num_predict = values::strict_integer(reader)?;
            }
            ("stream_options", ChatCompletions | Completions) => self.stream_options(reader)?,
            ("user", ChatCompletions | Completions) => return self.user(reader),
            ("previous_response_id" | "conversation" | "prompt" | "background", Responses) => {
                if values::says_something(reader)? {
                    return Err(AskError::Unsupported(name.to_owned()));
                }
            }
            _ => {
                reader.skip()?;
                return Ok(self.fate(name));
            }
        }
        Ok(Fate::Keep)
    }

    /// Whether a filter cuts the members of this name.
    fn fate(&mut self, name: &str) -> Fate {
        match Filter::that_cuts(self.endpoint, name) {
            Some(filter) if self.on.has(filter) => {
                self.fired.insert(filter);
                Fate::Cut
            }
            _ => Fate::Keep,
        }
    }

    /// `model`, without the provider's name that Bifrost's clients write in front of it.
    fn model_name(&mut self, reader: &mut Reader<'_>, name: &str) -> Result<Option<ModelRef>, AskError> {
        const PREFIX: &str = "ollama/";
        reader.space();
        let start = reader.at();
        let Some(text) = values::text(reader, name)? else { return Ok(None) };
        let whole = text.decode();
        let rest = whole.strip_prefix(PREFIX).filter(|rest| !rest.is_empty());
        let is_filtered = self.endpoint.dialect() != Dialect::Native && self.on.has(Filter::ModelPrefix);
        let Some(rest) = rest.filter(|_| is_filtered) else { return values::parse_model(&whole, name) };
        self.fired.insert(Filter::ModelPrefix);
        if text.escaped {
            self.edits.replace(start..reader.at(), serde_json::Value::from(rest).to_string());
        } else {
            self.edits.cut(start + 1..start + 1 + PREFIX.len());
        }
        values::parse_model(rest, name)
    }

    fn messages(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        let (fields, system_roles): (_, &[&str]) = match self.endpoint {
            Endpoint::ChatCompletions => (openai::MESSAGE, &["system", "developer"]),
            Endpoint::Messages => (anthropic::MESSAGE, &[]),
            _ => (native::MESSAGE, &["system"]),
        };
        let cuts = self.cuts_cache_control();
        let mut keys = Keys::new("a message", fields, if cuts { &["cache_control"] } else { &[] });
        values::list(self, reader, "messages", |seen, reader| {
            seen.count += 1;
            judged_object(seen, reader, &mut keys, "messages[]", |seen, reader, name| {
                match name {
                    "role" if reader.shape()? == Shape::Text => {
                        seen.system |= values::is_one_of(&reader.string()?, system_roles);
                    }
                    "content" if cuts && reader.shape()? == Shape::Array => seen.parts(reader)?,
                    "cache_control" => {
                        reader.skip()?;
                        return Ok(seen.fate(name));
                    }
                    _ => reader.skip()?,
                }
                Ok(Fate::Keep)
            })?;
            Ok(Fate::Keep)
        })
    }

    /// The filter looks into chats only: other requests have no such messages or tools, and `/v1/messages` passes as it is.
    fn cuts_cache_control(&self) -> bool {
        self.endpoint == Endpoint::ChatCompletions && self.on.has(Filter::CacheControl)
    }

    /// The parts of a message's content.
    fn parts(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        reader.array(|reader| match reader.shape()? {
            Shape::Object => self.without_cache_control(reader),
            _ => Ok(reader.skip()?),
        })
    }

    /// An object that is not judged: its own `cache_control` is cut, and all within its members stays.
    fn without_cache_control(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        reader.space();
        let mut siblings = Siblings::new(reader.at() + 1);
        reader.object(|reader, key| {
            reader.skip()?;
            let fate = if key.decode() == "cache_control" { self.fate("cache_control") } else { Fate::Keep };
            siblings.tell(key.range().start..reader.at(), fate, &mut self.edits);
            Ok::<(), AskError>(())
        })?;
        siblings.close(String::new(), &mut self.edits);
        Ok(())
    }

    /// `input` of `/v1/responses`: a text is one message; of a list the items of type message count (the type may be left out).
    fn items(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        match reader.shape()? {
            Shape::Text => {
                reader.string()?;
                self.count = 1;
                return Ok(());
            }
            Shape::Array => {}
            // Ollama itself refuses these.
            _ => return Ok(reader.skip()?),
        }
        let mut keys = Keys::new("an item of `input`", responses::ITEM, &[]);
        values::list(self, reader, "input", |seen, reader| {
            let (mut is_message, mut is_system) = (None, false);
            judged_object(seen, reader, &mut keys, "input[]", |_, reader, name| {
                match (name, reader.shape()?) {
                    ("type", Shape::Text) => is_message = Some(values::is_one_of(&reader.string()?, &["message"])),
                    ("role", Shape::Text) => {
                        is_system = values::is_one_of(&reader.string()?, &["system", "developer"]);
                        is_message = is_message.or(Some(true));
                    }
                    _ => reader.skip()?,
                }
                Ok(Fate::Keep)
            })?;
            seen.count += u64::from(is_message == Some(true));
            seen.system |= is_system;
            Ok(Fate::Keep)
        })
    }

    fn tools(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        let runs_web_tools = matches!(self.endpoint, Endpoint::Responses | Endpoint::Messages);
        let cuts = self.cuts_cache_control();
        let also: &[&str] = if cuts { &["cache_control"] } else { &[] };
        let mut keys = Keys::new("a tool", &["type", "name", "function"], also);
        values::list(self, reader, "tools", |seen, reader| {
            let (mut web_tool, mut tool_name) = (None, None);
            judged_object(seen, reader, &mut keys, "tools[]", |seen, reader, name| {
                match (name, reader.shape()?) {
                    ("type", Shape::Text) if runs_web_tools => {
                        // Anthropic's types end in a date (`web_search_20250305`). Case is ignored to be on the safe side.
                        let kind = reader.string()?.decode().to_ascii_lowercase();
                        web_tool = is_web_tool(&kind).then_some(kind);
                    }
                    ("name", Shape::Text) if runs_web_tools => tool_name = Some(reader.string()?),
                    ("function", Shape::Object) if cuts => seen.without_cache_control(reader)?,
                    ("cache_control", _) => {
                        reader.skip()?;
                        return Ok(seen.fate(name));
                    }
                    _ => reader.skip()?,
                }
                Ok(Fate::Keep)
            })?;
            if let Some(kind) = web_tool {
                if seen.on.has(Filter::WebTools) {
                    seen.fired.insert(Filter::WebTools);
                    seen.cut_tools.push(kind);
                    seen.cut_tools.extend(tool_name.map(|name| name.decode().into_owned()));
                    return Ok(Fate::Cut);
                }
                seen.web_tools = true;
            }
            seen.tools = true;
            Ok(Fate::Keep)
        })
    }

    /// Which tool the answer must call, if it says: OpenAI by the type of a tool of its own, Anthropic by name.
    fn tool_choice(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        if !self.on.has(Filter::WebTools) || reader.shape()? != Shape::Object {
            return Ok(reader.skip()?);
        }
        let start = reader.at();
        let (mut kind, mut tool) = (None, None);
        reader.object(|reader, key| {
            match (key.decode().as_ref(), reader.shape()?) {
                ("type", Shape::Text) => kind = Some(reader.string()?.decode().to_ascii_lowercase()),
                ("name", Shape::Text) => tool = Some(reader.string()?.decode().into_owned()),
                _ => reader.skip()?,
            }
            Ok::<(), AskError>(())
        })?;
        let tool = match self.endpoint {
            Endpoint::Messages => tool.filter(|_| kind.as_deref() == Some("tool")),
            _ => kind.filter(|kind| is_web_tool(kind)),
        };
        self.choice = tool.map(|tool| Choice { value: start..reader.at(), tool });
        Ok(())
    }

    /// A choice of a tool that was cut would ask for what is not there: then the model chooses.
    fn free_the_choice(&mut self) {
        let Some(choice) = self.choice.take() else { return };
        if self.cut_tools.contains(&choice.tool) {
            let auto = if self.endpoint == Endpoint::Messages { r#"{"type":"auto"}"# } else { r#""auto""# };
            self.edits.replace(choice.value, auto);
        }
    }

    fn options(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        let mut keys = Keys::exact("`options`", native::OPTIONS);
        judged_object(self, reader, &mut keys, "options", |seen, reader, name| {
            match name {
                "num_ctx" => seen.num_ctx = values::loose_integer(reader, "options.num_ctx")?,
                "num_predict" => seen.num_predict = values::loose_integer(reader, "options.num_predict")?,
                _ => reader.skip()?,
            }
            Ok(Fate::Keep)
        })
    }

    /// `max_tokens`, or the newer `max_completion_tokens`, which Ollama does not read. The newer one wins, and one is sent: the
    /// first of the two stays in its place.
    fn cap(&mut self, key: Range<usize>, reader: &mut Reader<'_>, newer: bool) -> Result<Fate, AskError> {
        let shape = reader.shape()?;
        let start = reader.at();
        let tokens = values::strict_integer(reader)?;
        let value = start..reader.at();
        if newer && (shape == Shape::Null || !self.on.has(Filter::MaxCompletionTokens)) {
            return Ok(Fate::Keep); // as if it were not there
        }
        let first = self.cap.take();
        if newer || !first.as_ref().is_some_and(|cap| cap.newer) {
            self.num_predict = tokens;
        }
        if newer {
            self.fired.insert(Filter::MaxCompletionTokens);
        }
        match first {
            None => {
                if newer {
                    self.edits.replace(key, "\"max_tokens\"");
                }
                self.cap = Some(Cap { value, newer });
                Ok(Fate::Keep)
            }
            Some(first) => {
                if newer {
                    self.edits.replace(first.value, reader.text(value).to_owned());
                }
                Ok(Fate::Cut)
            }
        }
    }

    /// A `user` that is longer than OpenAI itself allows, in Unicode scalar values.
    fn user(&mut self, reader: &mut Reader<'_>) -> Result<Fate, AskError> {
        const MOST: usize = 64;
        if reader.shape()? != Shape::Text || !self.on.has(Filter::User) {
            reader.skip()?;
            return Ok(Fate::Keep);
        }
        if reader.string()?.decode().chars().nth(MOST).is_none() {
            return Ok(Fate::Keep);
        }
        self.fired.insert(Filter::User);
        Ok(Fate::Cut)
    }

    fn stream_options(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        let shape = reader.shape()?;
        let start = reader.at();
        let mut flag = None;
        let mut keys = Keys::new("`stream_options`", openai::STREAM_OPTIONS, &[]);
        judged_object(self, reader, &mut keys, "stream_options", |seen, reader, name| {
            reader.space();
            let start = reader.at();
            seen.wants_usage = values::flag(reader, name)?.unwrap_or(false);
            flag = Some(start..reader.at());
            Ok(Fate::Keep)
        })?;
        self.usage = match (shape, flag) {
            (_, Some(value)) => UsagePlace::Flag(value),
            (Shape::Object, None) => UsagePlace::Object { open: start + 1, empty: keys.is_empty() },
            _ => UsagePlace::Null(start..reader.at()),
        };
        Ok(())
    }

    /// OpenAI's streams carry no counts unless asked (ollama-wire, section 0.1). What has to be put in front of the body's members.
    fn ask_for_usage(&mut self) -> String {
        const MEMBER: &str = r#""include_usage":true"#;
        let streams =
            matches!(self.endpoint, Endpoint::ChatCompletions | Endpoint::Completions) && self.stream == Some(true);
        if !streams || self.wants_usage || !self.on.has(Filter::IncludeUsage) {
            return String::new();
        }
        self.fired.insert(Filter::IncludeUsage);
        match &self.usage {
            UsagePlace::Missing => return format!(r#""stream_options":{{{MEMBER}}}"#),
            UsagePlace::Null(value) => self.edits.replace(value.clone(), format!("{{{MEMBER}}}")),
            UsagePlace::Flag(value) => self.edits.replace(value.clone(), "true"),
            &UsagePlace::Object { open, empty } => {
                self.edits.replace(open..open, format!("{MEMBER}{}", if empty { "" } else { "," }));
            }
        }
        String::new()
    }

    fn finish(self) -> Result<Filtered, AskError> {
        use Endpoint::*;
        let model = match (self.model, self.name) {
            (Some(model), Some(name)) if !model.same_model(&name) => {
                return Err(AskError::Ambiguous("`model` and `name` differ; send `model` alone".to_owned()));
            }
            (model, name) => model.or(name),
        };
        let stream = match self.endpoint {
            Chat | Generate | Pull | Push | Create => Some(self.stream.unwrap_or(true)),
            ChatCompletions | Completions | Responses | Messages => Some(self.stream.unwrap_or(false)),
            Embed | Embeddings | OpenAiEmbeddings => Some(false),
            _ => None,
        };
        let infers = self.endpoint.kind() == Kind::Infer;
        let ask = Ask {
            model,
            others: self.others,
            stream,
            has_system_prompt: infers.then_some(self.system),
            has_tools: infers.then_some(self.tools),
            message_count: infers.then_some(self.count),
            keep_alive: self.keep_alive,
            num_ctx: self.num_ctx,
            num_predict: self.num_predict,
            wants_usage: self.wants_usage,
            has_web_tools: self.web_tools,
        };
        Ok(Filtered { ask, edits: self.edits, fired: self.fired })
    }
}

/// The types of tools that Ollama itself runs on the internet, in lower case.
fn is_web_tool(kind: &str) -> bool {
    kind.starts_with("web_search") || kind.starts_with("web_fetch")
}

fn passed_over(reader: &mut Reader<'_>) -> Result<Fate, Malformed> {
    reader.skip()?;
    Ok(Fate::Keep)
}

#[cfg(test)]
mod tests;
