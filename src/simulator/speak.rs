//! How an answer is put into words on the wire, one speaker for each route that answers with text.

use super::ask::Ask;
use super::options::WireForm;
use super::reply::{EVENTS, NDJSON, Records, Reply};
use super::route::Route;
use super::script::Reason;
use super::{anthropic, native, openai, responses};

/// What one token, or several that make one character, adds to the answer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Delta<'a> {
    Text(&'a str),
    Thought(&'a str),
    /// A tag that Ollama takes out of the text.
    Tag(&'a str),
    Call(&'a Call),
}

/// The one tool call that the tiny models know: `get_weather(city: "Oslo")`.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub id: String,
}

pub(super) const CALL_NAME: &str = "get_weather";
pub(super) const CALL_ARGUMENTS: &str = "{\"city\":\"Oslo\"}";

/// How an answer ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Totals {
    pub reason: Reason,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub total_ns: u64,
    pub load_ns: u64,
    pub prompt_ns: u64,
    pub eval_ns: u64,
}

/// A whole answer, for a reply that is not streamed.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub text: String,
    pub thought: String,
    /// Everything, tags too.
    pub raw: String,
    pub call: Option<Call>,
}

impl Said {
    pub fn add(&mut self, delta: Delta<'_>) {
        match delta {
            Delta::Text(text) => {
                self.text.push_str(text);
                self.raw.push_str(text);
            }
            Delta::Thought(text) => {
                self.thought.push_str(text);
                self.raw.push_str(text);
            }
            Delta::Tag(text) => self.raw.push_str(text),
            Delta::Call(call) => self.call = Some(call.clone()),
        }
    }
}

/// What a speaker is told about its exchange.
pub(super) struct Setting<'a> {
    pub ask: &'a Ask,
    pub wire: WireForm,
    /// The prompt as it was rendered.
    pub prompt: &'a str,
    /// The runner finds tool calls itself, so that they come in the last record.
    pub call_comes_last: bool,
    /// A number of no meaning, for ids.
    pub id: u64,
}

pub(super) enum Speaker {
    Chat(native::Chat),
    Generate(native::Generate),
    OpenAiChat(openai::Chat),
    Completions(openai::Completions),
    Responses(Box<responses::Responses>),
    Messages(anthropic::Messages),
}

impl Speaker {
    pub fn new(route: Route, setting: &Setting<'_>) -> Speaker {
        match route {
            Route::Generate => Speaker::Generate(native::Generate::new(setting)),
            Route::OpenAiChat => Speaker::OpenAiChat(openai::Chat::new(setting)),
            Route::Completions => Speaker::Completions(openai::Completions::new(setting)),
            Route::Responses => Speaker::Responses(Box::new(responses::Responses::new(setting))),
            Route::Messages => Speaker::Messages(anthropic::Messages::new(setting)),
            _ => Speaker::Chat(native::Chat::new(setting)),
        }
    }

    /// The content type of a stream.
    pub fn stream_type(&self) -> &'static str {
        match self {
            Speaker::Chat(_) | Speaker::Generate(_) => NDJSON,
            _ => EVENTS,
        }
    }

    /// Whether Ollama sets `Cache-Control` and `Connection` on such a stream.
    pub fn says_no_cache(&self) -> bool {
        matches!(self, Speaker::Responses(_) | Speaker::Messages(_))
    }

    /// Adds the records of one delta; some show nothing.
    pub fn delta(&mut self, delta: Delta<'_>, out: &mut Records) {
        match self {
            Speaker::Chat(speaker) => speaker.delta(delta, out),
            Speaker::Generate(speaker) => speaker.delta(delta, out),
            Speaker::OpenAiChat(speaker) => speaker.delta(delta, out),
            Speaker::Completions(speaker) => speaker.delta(delta, out),
            Speaker::Responses(speaker) => speaker.delta(delta, out),
            Speaker::Messages(speaker) => speaker.delta(delta, out),
        }
    }

    /// Adds the dialect's own end.
    pub fn end(&mut self, totals: &Totals, out: &mut Records) {
        match self {
            Speaker::Chat(speaker) => speaker.end(totals, out),
            Speaker::Generate(speaker) => speaker.end(totals, out),
            Speaker::OpenAiChat(speaker) => speaker.end(totals, out),
            Speaker::Completions(speaker) => speaker.end(totals, out),
            Speaker::Responses(speaker) => speaker.end(totals, out),
            Speaker::Messages(speaker) => speaker.end(totals, out),
        }
    }

    /// Adds what Ollama sends when the runner fails in the middle: an error on the native routes, one more empty chunk
    /// on OpenAI's, nothing on the others.
    pub fn fail(&mut self, message: &str, out: &mut Records) {
        match self {
            Speaker::Chat(_) | Speaker::Generate(_) => native::fail(message, out),
            Speaker::OpenAiChat(speaker) => speaker.fail(out),
            Speaker::Completions(speaker) => speaker.fail(out),
            Speaker::Responses(_) | Speaker::Messages(_) => {}
        }
    }

    /// The answer in one piece. Without totals it is one that Ollama gave up.
    pub fn whole(&mut self, said: &Said, totals: Option<&Totals>) -> Reply {
        match self {
            Speaker::Chat(speaker) => speaker.whole(said, totals),
            Speaker::Generate(speaker) => speaker.whole(said, totals),
            Speaker::OpenAiChat(speaker) => speaker.whole(said, totals),
            Speaker::Completions(speaker) => speaker.whole(said, totals),
            Speaker::Responses(speaker) => speaker.whole(said, totals),
            Speaker::Messages(speaker) => speaker.whole(said, totals),
        }
    }
}
