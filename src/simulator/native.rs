//! Ollama's own dialect: NDJSON records and their whole forms.

use super::reply::{JSON_UTF8, Records, Reply};
use super::speak::{CALL_ARGUMENTS, CALL_NAME, Call, Delta, Said, Setting, Totals};
use super::text::{self, Stamps};

/// What begins every record: model and time.
struct Opening {
    model: Vec<u8>,
    stamps: Stamps,
}

impl Opening {
    fn new(model: &str) -> Opening {
        let mut opening = b"{\"model\":".to_vec();
        text::string(&mut opening, model);
        opening.extend_from_slice(b",\"created_at\":\"");
        Opening { model: opening, stamps: Stamps::default() }
    }

    fn write(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.model);
        self.stamps.rfc3339(out, text::unix_now());
        out.push(b'"');
    }
}

/// Every metric is left out when it is 0, as Go's `omitempty` does.
fn metrics(out: &mut Vec<u8>, totals: &Totals) {
    let members: [(&str, u64); 6] = [
        ("total_duration", totals.total_ns),
        ("load_duration", totals.load_ns),
        ("prompt_eval_count", totals.prompt_tokens),
        ("prompt_eval_duration", totals.prompt_ns),
        ("eval_count", totals.output_tokens),
        ("eval_duration", totals.eval_ns),
    ];
    for (name, value) in members {
        if value > 0 {
            out.extend_from_slice(b",\"");
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b"\":");
            text::number(out, value);
        }
    }
}

fn done(out: &mut Vec<u8>, totals: Option<&Totals>) {
    match totals {
        Some(totals) => text::print(out, format_args!(",\"done\":true,\"done_reason\":\"{}\"", totals.reason.native())),
        None => out.extend_from_slice(b",\"done\":false"),
    }
}

/// The last line of a stream whose runner failed.
pub(super) fn fail(message: &str, out: &mut Records) {
    out.add(|record| {
        record.extend_from_slice(b"{\"error\":");
        text::string(record, message);
        record.extend_from_slice(b"}\n");
    });
}

/// `/api/chat`.
pub(super) struct Chat {
    opening: Opening,
    call_comes_last: bool,
    call: Option<Call>,
}

impl Chat {
    pub fn new(setting: &Setting<'_>) -> Chat {
        Chat { opening: Opening::new(&setting.ask.model), call_comes_last: setting.call_comes_last, call: None }
    }

    fn message(out: &mut Vec<u8>, role: &str, content: &str, thought: &str, call: Option<&Call>) {
        text::print(out, format_args!(",\"message\":{{\"role\":\"{role}\",\"content\":"));
        text::string(out, content);
        if !thought.is_empty() {
            out.extend_from_slice(b",\"thinking\":");
            text::string(out, thought);
        }
        if let Some(call) = call {
            text::print(
                out,
                format_args!(
                    ",\"tool_calls\":[{{\"id\":\"{}\",\"function\":{{\"index\":0,\"name\":\"{CALL_NAME}\",\"arguments\":{CALL_ARGUMENTS}}}}}]",
                    call.id
                ),
            );
        }
        out.push(b'}');
    }

    pub fn delta(&mut self, delta: Delta<'_>, out: &mut Records) {
        let (content, thought, call) = match delta {
            Delta::Text(text) => (text, "", None),
            Delta::Thought(text) => ("", text, None),
            Delta::Call(call) if self.call_comes_last => {
                self.call = Some(call.clone());
                return;
            }
            Delta::Call(call) => ("", "", Some(call)),
            Delta::Tag(_) => return,
        };
        out.add(|record| {
            self.opening.write(record);
            Chat::message(record, "assistant", content, thought, call);
            record.extend_from_slice(b",\"done\":false}\n");
        });
    }

    pub fn end(&mut self, totals: &Totals, out: &mut Records) {
        let call = self.call.take();
        out.add(|record| {
            self.opening.write(record);
            Chat::message(record, "assistant", "", "", call.as_ref());
            done(record, Some(totals));
            metrics(record, totals);
            record.extend_from_slice(b"}\n");
        });
    }

    pub fn whole(&mut self, said: &Said, totals: Option<&Totals>) -> Reply {
        let mut body = Vec::with_capacity(said.text.len() + 384);
        self.opening.write(&mut body);
        Chat::message(&mut body, "assistant", &said.text, &said.thought, said.call.as_ref());
        done(&mut body, totals);
        if let Some(totals) = totals {
            metrics(&mut body, totals);
        }
        body.push(b'}');
        Reply::new(200, JSON_UTF8, body)
    }

    /// The reply to a request that only loads or unloads a model.
    pub fn loaded(model: &str, reason: &str) -> Reply {
        let mut body = Vec::new();
        Opening::new(model).write(&mut body);
        Chat::message(&mut body, "assistant", "", "", None);
        text::print(&mut body, format_args!(",\"done\":true,\"done_reason\":\"{reason}\"}}"));
        Reply::new(200, JSON_UTF8, body)
    }

    /// The reply to `_debug_render_only`.
    pub fn rendered(model: &str, prompt: &str) -> Reply {
        let mut body = Vec::new();
        Opening::new(model).write(&mut body);
        Chat::message(&mut body, "", "", "", None);
        rendered(&mut body, prompt);
        Reply::new(200, JSON_UTF8, body)
    }
}

fn rendered(body: &mut Vec<u8>, prompt: &str) {
    body.extend_from_slice(b",\"done\":false,\"_debug_info\":{\"rendered_template\":");
    text::string(body, prompt);
    body.extend_from_slice(b"}}");
}

/// Tokens of a conversation that `context` holds at most, as with a context length of 4096.
const MOST_CONTEXT: usize = 4096;

/// `/api/generate`.
pub(super) struct Generate {
    opening: Opening,
    /// The bytes of prompt and answer, each one a token; `None` with `raw`.
    context: Option<Vec<u8>>,
}

impl Generate {
    pub fn new(setting: &Setting<'_>) -> Generate {
        let context = (!setting.ask.raw).then(|| setting.prompt.as_bytes().to_vec());
        Generate { opening: Opening::new(&setting.ask.model), context }
    }

    fn response(out: &mut Vec<u8>, response: &str, thought: &str) {
        out.extend_from_slice(b",\"response\":");
        text::string(out, response);
        if !thought.is_empty() {
            out.extend_from_slice(b",\"thinking\":");
            text::string(out, thought);
        }
    }

    fn remember(&mut self, said: &str) {
        if let Some(context) = &mut self.context {
            context.extend_from_slice(said.as_bytes());
        }
    }

    /// 259 is the space that the tokenizer puts first; the rest are byte tokens.
    fn context(&self, out: &mut Vec<u8>) {
        if let Some(context) = &self.context {
            out.extend_from_slice(b",\"context\":[259");
            let latest = context.len().saturating_sub(MOST_CONTEXT - 1);
            for byte in &context[latest..] {
                out.push(b',');
                text::number(out, u64::from(*byte));
            }
            out.push(b']');
        }
    }

    pub fn delta(&mut self, delta: Delta<'_>, out: &mut Records) {
        let (response, thought, raw) = match delta {
            Delta::Text(text) => (text, "", text),
            Delta::Thought(text) => ("", text, text),
            Delta::Tag(text) => ("", "", text),
            Delta::Call(_) => return,
        };
        self.remember(raw);
        out.add(|record| {
            self.opening.write(record);
            Generate::response(record, response, thought);
            record.extend_from_slice(b",\"done\":false}\n");
        });
    }

    pub fn end(&mut self, totals: &Totals, out: &mut Records) {
        out.add(|record| {
            self.opening.write(record);
            Generate::response(record, "", "");
            done(record, Some(totals));
            self.context(record);
            metrics(record, totals);
            record.extend_from_slice(b"}\n");
        });
    }

    pub fn whole(&mut self, said: &Said, totals: Option<&Totals>) -> Reply {
        self.remember(&said.raw);
        let mut body = Vec::with_capacity(said.text.len() + 1024);
        self.opening.write(&mut body);
        Generate::response(&mut body, &said.text, &said.thought);
        done(&mut body, totals);
        if let Some(totals) = totals {
            self.context(&mut body);
            metrics(&mut body, totals);
        }
        body.push(b'}');
        Reply::new(200, JSON_UTF8, body)
    }

    /// The reply to a request that only loads or unloads a model.
    pub fn loaded(model: &str, reason: &str) -> Reply {
        let mut body = Vec::new();
        Opening::new(model).write(&mut body);
        Generate::response(&mut body, "", "");
        text::print(&mut body, format_args!(",\"done\":true,\"done_reason\":\"{reason}\"}}"));
        Reply::new(200, JSON_UTF8, body)
    }

    /// The reply to `_debug_render_only`.
    pub fn rendered(model: &str, prompt: &str) -> Reply {
        let mut body = Vec::new();
        Opening::new(model).write(&mut body);
        Generate::response(&mut body, "", "");
        rendered(&mut body, prompt);
        Reply::new(200, JSON_UTF8, body)
    }
}
