//! Anthropic's dialect: `/v1/messages`.

use super::reply::{JSON, Records, Reply};
use super::script::Reason;
use super::speak::{CALL_ARGUMENTS, CALL_NAME, Delta, Said, Setting, Totals};
use super::text;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
}

pub(super) struct Messages {
    id: String,
    model: String,
    /// What `message_start` guesses; the truth comes with `message_delta`.
    guessed_tokens: u64,
    started: bool,
    open: Option<Block>,
    index: u64,
    called: bool,
}

impl Messages {
    pub fn new(setting: &Setting<'_>) -> Messages {
        let ask = setting.ask;
        let bytes: usize = ask.turns.iter().map(|turn| turn.content.len()).sum::<usize>()
            + ask.tools.iter().map(|tool| tool.to_string().len()).sum::<usize>();
        Messages {
            id: format!("msg_{:024x}", u128::from(setting.id) << 32),
            model: ask.model.clone(),
            guessed_tokens: bytes.div_ceil(4) as u64,
            started: false,
            open: None,
            index: 0,
            called: false,
        }
    }

    fn start(&mut self, out: &mut Records) {
        if std::mem::replace(&mut self.started, true) {
            return;
        }
        out.add(|record| {
            text::print(
                record,
                format_args!(
                    "event: message_start\ndata: {{\"type\":\"message_start\",\"message\":{{\"id\":\"{}\",\"type\":\"message\",\"role\":\"assistant\",\"model\":",
                    self.id
                ),
            );
            text::string(record, &self.model);
            text::print(
                record,
                format_args!(",\"content\":[],\"usage\":{{\"input_tokens\":{},\"output_tokens\":0}}}}}}\n\n", self.guessed_tokens),
            );
        });
    }

    fn close(&mut self, out: &mut Records) {
        if self.open.take().is_some() {
            self.stop(out);
        }
    }

    fn stop(&mut self, out: &mut Records) {
        out.add(|record| {
            text::print(
                record,
                format_args!(
                    "event: content_block_stop\ndata: {{\"type\":\"content_block_stop\",\"index\":{}}}\n\n",
                    self.index
                ),
            );
        });
        self.index += 1;
    }

    fn switch(&mut self, block: Block, out: &mut Records) {
        if self.open == Some(block) {
            return;
        }
        self.close(out);
        self.open = Some(block);
        let shape = match block {
            Block::Text => "{\"type\":\"text\",\"text\":\"\"}",
            Block::Thinking => "{\"type\":\"thinking\",\"thinking\":\"\"}",
        };
        self.begin(shape, out);
    }

    fn begin(&self, shape: &str, out: &mut Records) {
        out.add(|record| {
            text::print(
                record,
                format_args!(
                    "event: content_block_start\ndata: {{\"type\":\"content_block_start\",\"index\":{},\"content_block\":{shape}}}\n\n",
                    self.index
                ),
            );
        });
    }

    fn piece(&self, kind: &str, member: &str, said: &str, out: &mut Records) {
        out.add(|record| {
            text::print(
                record,
                format_args!(
                    "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"index\":{},\"delta\":{{\"type\":\"{kind}\",\"{member}\":",
                    self.index
                ),
            );
            text::string(record, said);
            record.extend_from_slice(b"}}\n\n");
        });
    }

    pub fn delta(&mut self, delta: Delta<'_>, out: &mut Records) {
        match delta {
            Delta::Tag(_) => {}
            Delta::Text(said) => {
                self.start(out);
                self.switch(Block::Text, out);
                self.piece("text_delta", "text", said, out);
            }
            Delta::Thought(said) => {
                self.start(out);
                self.switch(Block::Thinking, out);
                self.piece("thinking_delta", "thinking", said, out);
            }
            Delta::Call(call) => {
                self.start(out);
                self.close(out);
                self.called = true;
                self.begin(
                    &format!(
                        "{{\"type\":\"tool_use\",\"id\":\"{}\",\"name\":\"{CALL_NAME}\",\"input\":{{}}}}",
                        call.id
                    ),
                    out,
                );
                self.piece("input_json_delta", "partial_json", CALL_ARGUMENTS, out);
                self.stop(out);
            }
        }
    }

    pub fn end(&mut self, totals: &Totals, out: &mut Records) {
        self.start(out);
        self.close(out);
        let reason = stop_reason(self.called, totals);
        out.add(|record| {
            text::print(
                record,
                format_args!(
                    "event: message_delta\ndata: {{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":\"{reason}\"}},\"usage\":{{\"input_tokens\":{},\"output_tokens\":{}}}}}\n\n",
                    totals.prompt_tokens, totals.output_tokens
                ),
            );
        });
        out.add(|record| record.extend_from_slice(b"event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"));
    }

    pub fn whole(&mut self, said: &Said, totals: Option<&Totals>) -> Reply {
        let mut body = Vec::with_capacity(said.text.len() + 256);
        text::print(
            &mut body,
            format_args!("{{\"id\":\"{}\",\"type\":\"message\",\"role\":\"assistant\",\"model\":", self.id),
        );
        text::string(&mut body, &self.model);
        body.extend_from_slice(b",\"content\":");
        let mut blocks = Vec::new();
        if !said.thought.is_empty() {
            blocks.extend_from_slice(b"{\"type\":\"thinking\",\"thinking\":");
            text::string(&mut blocks, &said.thought);
            blocks.extend_from_slice(b"},");
        }
        if !said.text.is_empty() {
            blocks.extend_from_slice(b"{\"type\":\"text\",\"text\":");
            text::string(&mut blocks, &said.text);
            blocks.extend_from_slice(b"},");
        }
        if let Some(call) = &said.call {
            text::print(
                &mut blocks,
                format_args!(
                    "{{\"type\":\"tool_use\",\"id\":\"{}\",\"name\":\"{CALL_NAME}\",\"input\":{CALL_ARGUMENTS}}},",
                    call.id
                ),
            );
        }
        match blocks.split_last() {
            None => body.extend_from_slice(b"null"),
            Some((_comma, blocks)) => {
                body.push(b'[');
                body.extend_from_slice(blocks);
                body.push(b']');
            }
        }
        if let Some(totals) = totals {
            text::print(&mut body, format_args!(",\"stop_reason\":\"{}\"", stop_reason(said.call.is_some(), totals)));
        }
        let (input, output) = totals.map_or((0, 0), |totals| (totals.prompt_tokens, totals.output_tokens));
        text::print(&mut body, format_args!(",\"usage\":{{\"input_tokens\":{input},\"output_tokens\":{output}}}}}\n"));
        Reply::new(200, JSON, body)
    }
}

/// A stop sequence is an `end_turn` too, as with Ollama.
fn stop_reason(called: bool, totals: &Totals) -> &'static str {
    match totals.reason {
        _ if called => "tool_use",
        Reason::Stop => "end_turn",
        Reason::Length => "max_tokens",
    }
}
