//! The facts of a request, read from its body by one strict reader for all dialects.
//!
//! Go's decoder takes `MODEL` for `model`, the last of two duplicates, and ignores what follows the object (ollama-wire, section
//! 7). A proxy that reads such a body otherwise than Ollama decides about one model and forwards to another. So this reader does
//! not imitate Go: a body that Go could read in another way than any other parser is refused, and everything else means the same
//! to all. What is refused beyond RFC 8259: duplicate keys after Go's folding, and known keys that are not spelled exactly (other
//! case, `ſ`, escapes). Both hold where facts are read: at the top, in `messages[]`, `input[]`, `tools[]`, `options` and
//! `stream_options`. In `options` Go compares keys exactly, so there another case is merely an unknown option.
use super::json::{MAX_MEMBERS, Malformed, Reader, Shape, Text, fold};
use super::{BodyRule, Dialect, Endpoint, Kind, ModelRef, anthropic, model, native, openai, responses};
use std::borrow::Cow;
use std::fmt;

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
}

impl fmt::Display for AskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AskError::Ambiguous(text) | AskError::Invalid(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for AskError {}

impl From<Malformed> for AskError {
    fn from(Malformed(what): Malformed) -> Self {
        AskError::Invalid(format!("the body is not valid JSON: {what}; send one JSON object"))
    }
}

/// Reads the facts of a request of `endpoint`. Endpoints without a JSON body have none.
///
/// The cost is one pass over the bytes; nothing is copied but names and escaped keys.
pub fn read(endpoint: Endpoint, body: &[u8]) -> Result<Ask, AskError> {
    if endpoint.body() != BodyRule::Json {
        return Ok(Ask::default());
    }
    let mut reader = Reader::new(body)?;
    reader.space();
    if reader.at() == body.len() {
        return Err(AskError::Invalid("the body is empty; send one JSON object".to_owned()));
    }
    if reader.shape()? != Shape::Object {
        return Err(AskError::Invalid("the body must be one JSON object".to_owned()));
    }
    let mut seen = Seen::default();
    let mut keys = Keys::new("the body", request_fields(endpoint));
    reader.object(|reader, key| match keys.judge(key)? {
        Some(name) => seen.member(endpoint, name, reader),
        None => Ok(reader.skip()?),
    })?;
    reader.end()?;
    seen.into_ask(endpoint)
}

fn request_fields(endpoint: Endpoint) -> &'static [&'static str] {
    match (endpoint, endpoint.dialect()) {
        (Endpoint::Responses, _) => responses::REQUEST,
        (_, Dialect::OpenAi) => openai::REQUEST,
        (_, Dialect::Anthropic) => anthropic::REQUEST,
        (_, Dialect::Native) => native::REQUEST,
    }
}

/// What was found in a body, before defaults.
#[derive(Default)]
struct Seen {
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
    wants_usage: bool,
    web_tools: bool,
}

impl Seen {
    /// Reads one member of the body. Members that are facts of another endpoint are passed over.
    fn member(&mut self, endpoint: Endpoint, name: &'static str, reader: &mut Reader<'_>) -> Result<(), AskError> {
        use Endpoint::*;
        match (name, endpoint) {
            ("model", endpoint) if endpoint != Copy => self.model = model_name(reader, name)?,
            ("name", Show | Pull | Push | Create | Delete) => self.name = model_name(reader, name)?,
            ("source", Copy) => self.model = model_name(reader, name)?,
            ("destination", Copy) | ("from", Create) => self.others.extend(model_name(reader, name)?),
            (
                "stream",
                Chat | Generate | ChatCompletions | Completions | Responses | Messages | Pull | Push | Create,
            ) => {
                self.stream = flag(reader, name)?;
            }
            ("messages", Chat | ChatCompletions | Messages) => self.messages(endpoint, reader)?,
            ("input", Responses) => self.items(reader)?,
            ("input", Embed | OpenAiEmbeddings) | ("prompt", Generate | Embeddings | Completions) => {
                self.count = inputs(reader)?;
            }
            ("instructions", Responses) | ("system", Generate) => {
                self.system |= text(reader, name)?.is_some_and(|text| !text.is_empty());
            }
            ("system", Messages) => self.system |= text_or_list(reader, name)?,
            ("tools", endpoint) if endpoint.kind() == Kind::Infer => self.tools(endpoint, reader)?,
            ("options", Chat | Generate | Embed | Embeddings) => self.options(reader)?,
            ("keep_alive", Chat | Generate | Embed | Embeddings) => self.keep_alive = keep_alive(reader)?,
            ("max_tokens", ChatCompletions | Completions | Messages) | ("max_output_tokens", Responses) => {
                self.num_predict = strict_integer(reader)?;
            }
            ("stream_options", ChatCompletions | Completions) => self.stream_options(reader)?,
            _ => reader.skip()?,
        }
        Ok(())
    }

    fn messages(&mut self, endpoint: Endpoint, reader: &mut Reader<'_>) -> Result<(), AskError> {
        let (fields, system_roles): (_, &[&str]) = match endpoint {
            Endpoint::ChatCompletions => (openai::MESSAGE, &["system", "developer"]),
            Endpoint::Messages => (anthropic::MESSAGE, &[]),
            _ => (native::MESSAGE, &["system"]),
        };
        let mut keys = Keys::new("a message", fields);
        list(reader, "messages", |reader| {
            self.count += 1;
            judged_object(reader, &mut keys, "messages[]", |reader, name| {
                if name == "role" && reader.shape()? == Shape::Text {
                    self.system |= is_one_of(&reader.string()?, system_roles);
                    return Ok(());
                }
                Ok(reader.skip()?)
            })
        })
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
        let mut keys = Keys::new("an item of `input`", responses::ITEM);
        list(reader, "input", |reader| {
            let (mut is_message, mut is_system) = (None, false);
            judged_object(reader, &mut keys, "input[]", |reader, name| {
                match (name, reader.shape()?) {
                    ("type", Shape::Text) => is_message = Some(is_one_of(&reader.string()?, &["message"])),
                    ("role", Shape::Text) => {
                        is_system = is_one_of(&reader.string()?, &["system", "developer"]);
                        is_message = is_message.or(Some(true));
                    }
                    _ => reader.skip()?,
                }
                Ok(())
            })?;
            self.count += u64::from(is_message == Some(true));
            self.system |= is_system;
            Ok(())
        })
    }

    fn tools(&mut self, endpoint: Endpoint, reader: &mut Reader<'_>) -> Result<(), AskError> {
        let runs_web_tools = matches!(endpoint, Endpoint::Responses | Endpoint::Messages);
        let mut keys = Keys::new("a tool", &["type", "name", "function"]);
        list(reader, "tools", |reader| {
            self.tools = true;
            judged_object(reader, &mut keys, "tools[]", |reader, name| {
                if name == "type" && runs_web_tools && reader.shape()? == Shape::Text {
                    // Anthropic's types end in a date (`web_search_20250305`). Case is ignored to be on the safe side.
                    let kind = reader.string()?.decode().to_ascii_lowercase();
                    self.web_tools |= kind.starts_with("web_search") || kind.starts_with("web_fetch");
                    return Ok(());
                }
                Ok(reader.skip()?)
            })
        })
    }

    fn options(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        let mut keys = Keys { exact: true, ..Keys::new("`options`", native::OPTIONS) };
        judged_object(reader, &mut keys, "options", |reader, name| {
            match name {
                "num_ctx" => self.num_ctx = loose_integer(reader, "options.num_ctx")?,
                "num_predict" => self.num_predict = loose_integer(reader, "options.num_predict")?,
                _ => reader.skip()?,
            }
            Ok(())
        })
    }

    fn stream_options(&mut self, reader: &mut Reader<'_>) -> Result<(), AskError> {
        let mut keys = Keys::new("`stream_options`", openai::STREAM_OPTIONS);
        judged_object(reader, &mut keys, "stream_options", |reader, name| {
            self.wants_usage = flag(reader, name)?.unwrap_or(false);
            Ok(())
        })
    }

    fn into_ask(self, endpoint: Endpoint) -> Result<Ask, AskError> {
        use Endpoint::*;
        let model = match (self.model, self.name) {
            (Some(model), Some(name)) if !model.same_model(&name) => {
                return Err(AskError::Ambiguous("`model` and `name` differ; send `model` alone".to_owned()));
            }
            (model, name) => model.or(name),
        };
        let stream = match endpoint {
            Chat | Generate | Pull | Push | Create => Some(self.stream.unwrap_or(true)),
            ChatCompletions | Completions | Responses | Messages => Some(self.stream.unwrap_or(false)),
            Embed | Embeddings | OpenAiEmbeddings => Some(false),
            _ => None,
        };
        let infers = endpoint.kind() == Kind::Infer;
        Ok(Ask {
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
        })
    }
}

/// The keys of one object: each once, and spelled as Ollama spells it.
struct Keys<'a> {
    place: &'static str,
    known: &'static [&'static str],
    /// Go compares the keys of this object exactly, not by folding.
    exact: bool,
    /// Folded.
    seen: Vec<Cow<'a, str>>,
}

impl<'a> Keys<'a> {
    fn new(place: &'static str, known: &'static [&'static str]) -> Self {
        Keys { place, known, exact: false, seen: Vec::new() }
    }

    /// The key's name if we know it.
    fn judge(&mut self, key: Text<'a>) -> Result<Option<&'static str>, AskError> {
        let spelled = key.decode();
        let folded = match &spelled {
            Cow::Borrowed(spelled) => fold(spelled),
            Cow::Owned(spelled) => Cow::Owned(fold(spelled).into_owned()),
        };
        let name = self.known.iter().copied().find(|&name| name == folded);
        if self.seen.contains(&folded) {
            return Err(AskError::Ambiguous(match name {
                Some(name) => {
                    format!("`{name}` is in {} twice (Ollama takes any case for it); send it once", self.place)
                }
                None => format!("a key is in {} twice (upper and lower case count as one); send it once", self.place),
            }));
        }
        if self.seen.len() == MAX_MEMBERS {
            return Err(AskError::Invalid(format!("{} has more than {MAX_MEMBERS} members", self.place)));
        }
        self.seen.push(folded);
        let Some(name) = name else { return Ok(None) };
        if spelled == name && !key.escaped {
            return Ok(Some(name));
        }
        if self.exact && spelled != name {
            return Ok(None);
        }
        Err(AskError::Ambiguous(format!(
            "a key in {} is another spelling of `{name}`; write it exactly so",
            self.place
        )))
    }
}

/// An object or null, each of whose keys is judged. `member` reads the values of known keys.
fn judged_object<'a>(
    reader: &mut Reader<'a>,
    keys: &mut Keys<'a>,
    name: &str,
    mut member: impl FnMut(&mut Reader<'a>, &'static str) -> Result<(), AskError>,
) -> Result<(), AskError> {
    match reader.shape()? {
        Shape::Null => Ok(reader.skip()?),
        Shape::Object => {
            keys.seen.clear();
            reader.object(|reader, key| match keys.judge(key)? {
                Some(name) => member(reader, name),
                None => Ok(reader.skip()?),
            })
        }
        _ => Err(wrong_type(name, "an object")),
    }
}

fn list<'a>(
    reader: &mut Reader<'a>,
    name: &str,
    item: impl FnMut(&mut Reader<'a>) -> Result<(), AskError>,
) -> Result<(), AskError> {
    match reader.shape()? {
        Shape::Null => Ok(reader.skip()?),
        Shape::Array => reader.array(item),
        _ => Err(wrong_type(name, "an array")),
    }
}

/// A model's name; null and an empty text are no name, as in Go.
fn model_name(reader: &mut Reader<'_>, name: &str) -> Result<Option<ModelRef>, AskError> {
    let Some(text) = text(reader, name)? else { return Ok(None) };
    match model::parse(&text.decode()) {
        Ok(model) => Ok(Some(model)),
        Err(model::NameError::Empty) => Ok(None),
        Err(error) => Err(AskError::Invalid(format!("`{name}`: {error}"))),
    }
}

fn text<'a>(reader: &mut Reader<'a>, name: &str) -> Result<Option<Text<'a>>, AskError> {
    match reader.shape()? {
        Shape::Text => Ok(Some(reader.string()?)),
        Shape::Null => Ok(reader.skip().map(|()| None)?),
        _ => Err(wrong_type(name, "a string")),
    }
}

fn flag(reader: &mut Reader<'_>, name: &str) -> Result<Option<bool>, AskError> {
    let value = match reader.shape()? {
        Shape::Bool(value) => Some(value),
        Shape::Null => None,
        _ => return Err(wrong_type(name, "true or false")),
    };
    reader.skip()?;
    Ok(value)
}

/// Whether a text or a list has anything in it.
fn text_or_list(reader: &mut Reader<'_>, name: &str) -> Result<bool, AskError> {
    match reader.shape()? {
        Shape::Text | Shape::Array => Ok(inputs(reader)? > 0),
        Shape::Null => Ok(reader.skip().map(|()| false)?),
        _ => Err(wrong_type(name, "a string or an array")),
    }
}

/// How many inputs: 1 for a text that is not empty, the length of a list, 0 for the rest (which Ollama refuses or ignores).
fn inputs(reader: &mut Reader<'_>) -> Result<u64, AskError> {
    match reader.shape()? {
        Shape::Text => Ok(u64::from(!reader.string()?.is_empty())),
        Shape::Array => {
            let mut count = 0;
            reader.array(|reader| {
                count += 1;
                reader.skip()
            })?;
            Ok(count)
        }
        _ => Ok(reader.skip().map(|()| 0)?),
    }
}

/// A number, or a duration as Go writes it. Any other text is not passed on: it could be anything.
fn keep_alive(reader: &mut Reader<'_>) -> Result<Option<serde_json::Value>, AskError> {
    match reader.shape()? {
        Shape::Number => {
            let text = reader.number()?;
            Ok((text.len() <= 32).then(|| serde_json::from_str(text).ok()).flatten())
        }
        Shape::Text => {
            let text = reader.string()?.decode();
            let is_duration = !text.is_empty()
                && text.len() <= 32
                && text.chars().all(|c| c.is_ascii_digit() || "+-.hmsnuµμ".contains(c));
            Ok(is_duration.then(|| serde_json::Value::String(text.into_owned())))
        }
        _ => Ok(reader.skip().map(|()| None)?),
    }
}

/// An option of type integer as Ollama reads it: any number, cut to its whole part (`3.7` is 3, `1e2` is 100). A policy that
/// limits it must see the number that counts; one beyond 64 bits means something else to every parser and is refused.
fn loose_integer(reader: &mut Reader<'_>, name: &str) -> Result<Option<i64>, AskError> {
    if reader.shape()? != Shape::Number {
        return Ok(reader.skip().map(|()| None)?);
    }
    let text = reader.number()?;
    if let Ok(whole) = text.parse::<i64>() {
        return Ok(Some(whole));
    }
    let value = text.parse::<f64>().unwrap_or(f64::INFINITY).trunc();
    if value.abs() < 9.0e18 {
        // In range by the line above.
        Ok(Some(value as i64))
    } else {
        Err(AskError::Invalid(format!("`{name}` does not fit into 64 bits")))
    }
}

/// An integer as Go reads one into an `int`: `3.0` and `1e0` are refused by Ollama itself.
fn strict_integer(reader: &mut Reader<'_>) -> Result<Option<i64>, AskError> {
    if reader.shape()? != Shape::Number {
        return Ok(reader.skip().map(|()| None)?);
    }
    Ok(reader.number()?.parse().ok())
}

fn is_one_of(text: &Text<'_>, words: &[&str]) -> bool {
    let text = text.decode();
    words.iter().any(|word| text.eq_ignore_ascii_case(word))
}

fn wrong_type(name: &str, wanted: &str) -> AskError {
    AskError::Invalid(format!("`{name}` must be {wanted}"))
}

#[cfg(test)]
mod tests;
