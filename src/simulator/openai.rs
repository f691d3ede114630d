//! OpenAI's dialect: `/v1/chat/completions` and `/v1/completions`.

use super::options::WireForm;
use super::reply::{EVENTS, JSON, Records, Reply};
use super::speak::{CALL_ARGUMENTS, CALL_NAME, Call, Delta, Said, Setting, Totals};
use super::text;

const DONE: &[u8] = b"data: [DONE]\n\n";

/// `{"prompt_tokens":..}`; all 0 where Ollama never learnt them.
fn usage(out: &mut Vec<u8>, totals: Option<&Totals>) {
    let (prompt, output) = totals.map_or((0, 0), |totals| (totals.prompt_tokens, totals.output_tokens));
    out.extend_from_slice(b"\"usage\":{\"prompt_tokens\":");
    text::number(out, prompt);
    out.extend_from_slice(b",\"completion_tokens\":");
    text::number(out, output);
    out.extend_from_slice(b",\"total_tokens\":");
    text::number(out, prompt + output);
    out.push(b'}');
}

fn call_json(out: &mut Vec<u8>, call: &Call) {
    text::print(
        out,
        format_args!(
            ",\"tool_calls\":[{{\"id\":\"{}\",\"index\":0,\"type\":\"function\",\"function\":{{\"name\":\"{CALL_NAME}\",\"arguments\":",
            call.id
        ),
    );
    text::string(out, CALL_ARGUMENTS);
    out.extend_from_slice(b"}}]");
}

/// `/v1/chat/completions`.
pub(super) struct Chat {
    id: u64,
    created: u64,
    model: String,
    wire: WireForm,
    include_usage: bool,
    /// From `{"id":` to `"system_fingerprint":"fp_ollama"`, made once.
    opening: Vec<u8>,
    spoke: bool,
    called: bool,
    call_comes_last: bool,
    /// The event of a call that comes with the end.
    last_call: Vec<u8>,
}

impl Chat {
    pub fn new(setting: &Setting<'_>) -> Chat {
        let mut chat = Chat {
            id: setting.id % 999,
            created: text::unix_now().as_secs(),
            model: setting.ask.model.clone(),
            wire: setting.wire,
            include_usage: setting.ask.include_usage,
            opening: Vec::new(),
            spoke: false,
            called: false,
            call_comes_last: setting.call_comes_last,
            last_call: Vec::new(),
        };
        let mut opening = b"data: ".to_vec();
        chat.open(&mut opening, "chat.completion.chunk", &chat.model);
        chat.opening = opening;
        chat
    }

    fn open(&self, out: &mut Vec<u8>, object: &str, model: &str) {
        text::print(
            out,
            format_args!(
                "{{\"id\":\"chatcmpl-{}\",\"object\":\"{object}\",\"created\":{},\"model\":",
                self.id, self.created
            ),
        );
        text::string(out, model);
        out.extend_from_slice(b",\"system_fingerprint\":\"fp_ollama\"");
    }

    pub fn delta(&mut self, delta: Delta<'_>, out: &mut Records) {
        let (content, thought, call) = match delta {
            Delta::Text(text) => (text, "", None),
            Delta::Thought(text) => ("", text, None),
            Delta::Call(call) => ("", "", Some(call)),
            Delta::Tag(_) => return,
        };
        let with_role = !self.spoke || self.wire == WireForm::Old;
        self.spoke = true;
        self.called |= call.is_some();
        let write = |record: &mut Vec<u8>| {
            record.extend_from_slice(&self.opening);
            record.extend_from_slice(b",\"choices\":[{\"index\":0,\"delta\":{");
            if with_role {
                record.extend_from_slice(b"\"role\":\"assistant\",");
            }
            record.extend_from_slice(b"\"content\":");
            text::string(record, content);
            if !thought.is_empty() {
                record.extend_from_slice(b",\"reasoning\":");
                text::string(record, thought);
            }
            if let Some(call) = call {
                call_json(record, call);
            }
            record.extend_from_slice(b"},\"finish_reason\":null}]}\n\n");
        };
        if call.is_some() && self.call_comes_last {
            write(&mut self.last_call);
        } else {
            out.add(write);
        }
    }

    pub fn end(&mut self, totals: &Totals, out: &mut Records) {
        let reason = if self.called { "tool_calls" } else { totals.reason.native() };
        let delta = match self.wire {
            WireForm::Current => "{}",
            WireForm::Old => "{\"role\":\"assistant\",\"content\":\"\"}",
        };
        // Ollama flushes these together.
        out.add(|record| {
            record.extend_from_slice(&self.last_call);
            record.extend_from_slice(&self.opening);
            text::print(
                record,
                format_args!(",\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":\"{reason}\"}}]}}\n\n"),
            );
            if self.include_usage {
                record.extend_from_slice(&self.opening);
                record.extend_from_slice(b",\"choices\":[],");
                usage(record, Some(totals));
                record.extend_from_slice(b"}\n\n");
            }
            record.extend_from_slice(DONE);
        });
    }

    /// The error is decoded as an answer of no model with no content.
    pub fn fail(&mut self, out: &mut Records) {
        let role = if !self.spoke || self.wire == WireForm::Old { "\"role\":\"assistant\"," } else { "" };
        out.add(|record| {
            record.extend_from_slice(b"data: ");
            self.open(record, "chat.completion.chunk", "");
            text::print(
                record,
                format_args!(
                    ",\"choices\":[{{\"index\":0,\"delta\":{{{role}\"content\":\"\"}},\"finish_reason\":null}}]}}\n\n"
                ),
            );
        });
    }

    pub fn whole(&mut self, said: &Said, totals: Option<&Totals>) -> Reply {
        let mut body = Vec::with_capacity(said.text.len() + 384);
        self.open(&mut body, "chat.completion", &self.model);
        body.extend_from_slice(b",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":");
        text::string(&mut body, &said.text);
        if !said.thought.is_empty() {
            body.extend_from_slice(b",\"reasoning\":");
            text::string(&mut body, &said.thought);
        }
        if let Some(call) = &said.call {
            call_json(&mut body, call);
        }
        body.extend_from_slice(b"},\"finish_reason\":");
        match totals {
            Some(_) if said.call.is_some() => body.extend_from_slice(b"\"tool_calls\""),
            Some(totals) => text::string(&mut body, totals.reason.native()),
            None => body.extend_from_slice(b"null"),
        }
        body.extend_from_slice(b"}],");
        usage(&mut body, totals);
        body.extend_from_slice(b"}\n");
        Reply::new(200, JSON, body)
    }
}

/// `/v1/completions`.
pub(super) struct Completions {
    id: u64,
    created: u64,
    model: String,
    include_usage: bool,
}

impl Completions {
    pub fn new(setting: &Setting<'_>) -> Completions {
        Completions {
            id: setting.id % 999,
            created: text::unix_now().as_secs(),
            model: setting.ask.model.clone(),
            include_usage: setting.ask.include_usage,
        }
    }

    fn open(&self, out: &mut Vec<u8>) {
        text::print(
            out,
            format_args!("{{\"id\":\"cmpl-{}\",\"object\":\"text_completion\",\"created\":{}", self.id, self.created),
        );
    }

    fn name(&self, out: &mut Vec<u8>, model: &str) {
        out.extend_from_slice(b",\"model\":");
        text::string(out, model);
        out.extend_from_slice(b",\"system_fingerprint\":\"fp_ollama\"");
    }

    /// One event. With `include_usage` every one carries a usage of zeros; only that of the last is real.
    fn event(&self, record: &mut Vec<u8>, text: Option<(&str, Option<&str>)>, model: &str, totals: Option<&Totals>) {
        record.extend_from_slice(b"data: ");
        self.open(record);
        record.extend_from_slice(b",\"choices\":[");
        if let Some((text, reason)) = text {
            record.extend_from_slice(b"{\"text\":");
            text::string(record, text);
            record.extend_from_slice(b",\"index\":0,\"finish_reason\":");
            match reason {
                Some(reason) => text::string(record, reason),
                None => record.extend_from_slice(b"null"),
            }
            record.push(b'}');
        }
        record.push(b']');
        self.name(record, model);
        if self.include_usage {
            record.push(b',');
            usage(record, totals);
        }
        record.extend_from_slice(b"}\n\n");
    }

    pub fn delta(&mut self, delta: Delta<'_>, out: &mut Records) {
        let text = match delta {
            Delta::Text(text) => text,
            Delta::Thought(_) | Delta::Tag(_) => "",
            Delta::Call(_) => return,
        };
        out.add(|record| self.event(record, Some((text, None)), &self.model, None));
    }

    pub fn end(&mut self, totals: &Totals, out: &mut Records) {
        out.add(|record| {
            self.event(record, Some(("", Some(totals.reason.native()))), &self.model, None);
            if self.include_usage {
                self.event(record, None, &self.model, Some(totals));
            }
            record.extend_from_slice(DONE);
        });
    }

    pub fn fail(&mut self, out: &mut Records) {
        out.add(|record| self.event(record, Some(("", None)), "", None));
    }

    pub fn whole(&mut self, said: &Said, totals: Option<&Totals>) -> Reply {
        self.whole_with(&said.text, totals.map(|totals| totals.reason.native()), totals)
    }

    fn whole_with(&self, said: &str, reason: Option<&str>, totals: Option<&Totals>) -> Reply {
        let mut body = Vec::with_capacity(said.len() + 256);
        self.open(&mut body);
        self.name(&mut body, &self.model);
        body.extend_from_slice(b",\"choices\":[{\"text\":");
        text::string(&mut body, said);
        body.extend_from_slice(b",\"index\":0,\"finish_reason\":");
        match reason {
            Some(reason) => text::string(&mut body, reason),
            None => body.extend_from_slice(b"null"),
        }
        body.extend_from_slice(b"}],");
        usage(&mut body, totals);
        body.extend_from_slice(b"}\n");
        Reply::new(200, JSON, body)
    }

    /// The reply to an empty prompt, which only loads the model; as a stream it is one write, and so has a length.
    pub fn loaded(setting: &Setting<'_>) -> Reply {
        let own = Completions::new(setting);
        if !setting.ask.stream {
            return own.whole_with("", Some("load"), None);
        }
        let mut body = Vec::new();
        own.event(&mut body, Some(("", Some("load"))), &own.model, None);
        body.extend_from_slice(DONE);
        Reply::new(200, EVENTS, body)
    }
}
