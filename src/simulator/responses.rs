//! OpenAI's Responses dialect: `/v1/responses`. In the stream Ollama builds every event from a Go map, so its keys are
//! sorted; the whole form is a struct, so its keys are not.

use super::reply::{JSON, Records, Reply};
use super::speak::{CALL_ARGUMENTS, CALL_NAME, Call, Delta, Said, Setting, Totals};
use super::text;

/// What the reply repeats of the request, as JSON.
struct Echo {
    instructions: Vec<u8>,
    max_output_tokens: Vec<u8>,
    format: Vec<u8>,
    truncation: String,
    background: bool,
    /// Sorted keys.
    tools: Vec<u8>,
    /// The struct's order.
    tools_whole: Vec<u8>,
}

pub(super) struct Responses {
    id: u64,
    item: u64,
    created: u64,
    model: String,
    echo: Echo,
    sequence: u64,
    output_index: u64,
    started: bool,
    thinking: bool,
    speaking: bool,
    said: Said,
}

impl Responses {
    pub fn new(setting: &Setting<'_>) -> Responses {
        let asked = &setting.ask.echo;
        let json = |value: &serde_json::Value| {
            let mut out = Vec::new();
            text::value(&mut out, value);
            out
        };
        let mut tools_whole = b"[".to_vec();
        for (index, tool) in asked.tools.iter().enumerate() {
            if index > 0 {
                tools_whole.push(b',');
            }
            for (index, name) in ["type", "name", "description", "strict", "parameters"].into_iter().enumerate() {
                text::print(&mut tools_whole, format_args!("{}\"{name}\":", if index == 0 { "{" } else { "," }));
                text::value(&mut tools_whole, &tool[name]);
            }
            tools_whole.push(b'}');
        }
        tools_whole.push(b']');
        let echo = Echo {
            instructions: json(&asked.instructions.clone().into()),
            max_output_tokens: json(&asked.max_output_tokens.into()),
            format: asked.format.as_ref().map_or_else(|| b"{\"type\":\"text\"}".to_vec(), json),
            truncation: asked.truncation.clone().unwrap_or_else(|| "disabled".to_owned()),
            background: asked.background,
            tools: json(&asked.tools.clone().into()),
            tools_whole,
        };
        Responses {
            id: setting.id % 999_999,
            item: (setting.id >> 20) % 999_999,
            created: text::unix_now().as_secs(),
            model: setting.ask.model.clone(),
            echo,
            sequence: 0,
            output_index: 0,
            started: false,
            thinking: false,
            speaking: false,
            said: Said::default(),
        }
    }

    /// One event: `before` are the members that sort before `sequence_number`, `after` those between it and `type`.
    fn event(
        &mut self,
        kind: &str,
        out: &mut Records,
        before: impl FnOnce(&mut Vec<u8>),
        after: impl FnOnce(&mut Vec<u8>),
    ) {
        let sequence = self.sequence;
        self.sequence += 1;
        out.add(|record| {
            text::print(record, format_args!("event: {kind}\ndata: {{"));
            before(record);
            text::print(record, format_args!("\"sequence_number\":{sequence},"));
            after(record);
            text::print(record, format_args!("\"type\":\"{kind}\"}}\n\n"));
        });
    }

    /// The response object of the stream.
    fn object(&self, totals: Option<&Totals>, output: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(768 + output.len());
        let done = totals.is_some();
        text::print(&mut out, format_args!("\"response\":{{\"background\":{},\"completed_at\":", self.echo.background));
        if done {
            text::number(&mut out, text::unix_now().as_secs());
        } else {
            out.extend_from_slice(b"null");
        }
        text::print(
            &mut out,
            format_args!(
                ",\"created_at\":{},\"error\":null,\"frequency_penalty\":0,\"id\":\"resp_{}\",\"incomplete_details\":null,\"instructions\":",
                self.created, self.id
            ),
        );
        out.extend_from_slice(&self.echo.instructions);
        out.extend_from_slice(b",\"max_output_tokens\":");
        out.extend_from_slice(&self.echo.max_output_tokens);
        out.extend_from_slice(b",\"max_tool_calls\":null,\"metadata\":{},\"model\":");
        text::string(&mut out, &self.model);
        out.extend_from_slice(b",\"object\":\"response\",\"output\":[");
        out.extend_from_slice(output);
        out.extend_from_slice(
            b"],\"parallel_tool_calls\":true,\"presence_penalty\":0,\"previous_response_id\":null,\"prompt_cache_key\":null,\"reasoning\":null,\"safety_identifier\":null,\"service_tier\":\"default\",\"status\":",
        );
        out.extend_from_slice(if done { b"\"completed\"" } else { b"\"in_progress\"" });
        out.extend_from_slice(b",\"store\":false,\"temperature\":1,\"text\":{\"format\":");
        out.extend_from_slice(&self.echo.format);
        out.extend_from_slice(b"},\"tool_choice\":\"auto\",\"tools\":");
        out.extend_from_slice(&self.echo.tools);
        out.extend_from_slice(b",\"top_logprobs\":0,\"top_p\":1,\"truncation\":");
        text::string(&mut out, &self.echo.truncation);
        out.extend_from_slice(b",\"usage\":");
        match totals {
            Some(totals) => text::print(
                &mut out,
                format_args!(
                    "{{\"input_tokens\":{},\"input_tokens_details\":{{\"cached_tokens\":0}},\"output_tokens\":{},\"output_tokens_details\":{{\"reasoning_tokens\":0}},\"total_tokens\":{}}}",
                    totals.prompt_tokens,
                    totals.output_tokens,
                    totals.prompt_tokens + totals.output_tokens
                ),
            ),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b"},");
        out
    }

    fn start(&mut self, out: &mut Records) {
        if std::mem::replace(&mut self.started, true) {
            return;
        }
        let object = self.object(None, b"");
        for kind in ["response.created", "response.in_progress"] {
            self.event(kind, out, |record| record.extend_from_slice(&object), |_| {});
        }
    }

    fn reasoning(&self) -> Vec<u8> {
        let mut item = b"{\"encrypted_content\":".to_vec();
        text::string(&mut item, &self.said.thought);
        text::print(&mut item, format_args!(",\"id\":\"rs_{}\",\"summary\":[{{\"text\":", self.item));
        text::string(&mut item, &self.said.thought);
        item.extend_from_slice(b",\"type\":\"summary_text\"}],\"type\":\"reasoning\"}");
        item
    }

    fn part(&self) -> Vec<u8> {
        let mut part = b"{\"annotations\":[],\"logprobs\":[],\"text\":".to_vec();
        text::string(&mut part, &self.said.text);
        part.extend_from_slice(b",\"type\":\"output_text\"}");
        part
    }

    fn message(&self) -> Vec<u8> {
        let mut item = b"{\"content\":[".to_vec();
        item.extend_from_slice(&self.part());
        text::print(
            &mut item,
            format_args!(
                "],\"id\":\"msg_{}\",\"role\":\"assistant\",\"status\":\"completed\",\"type\":\"message\"}}",
                self.item
            ),
        );
        item
    }

    fn call(&self, call: &Call, status: &str, arguments: &str) -> Vec<u8> {
        let mut item = b"{\"arguments\":".to_vec();
        text::string(&mut item, arguments);
        text::print(
            &mut item,
            format_args!(
                ",\"call_id\":\"{}\",\"id\":\"fc_{}_0\",\"name\":\"{CALL_NAME}\",\"status\":\"{status}\",\"type\":\"function_call\"}}",
                call.id, self.item
            ),
        );
        item
    }

    fn item_event(&mut self, kind: &str, item: &[u8], out: &mut Records) {
        let index = self.output_index;
        self.event(
            kind,
            out,
            |record| {
                record.extend_from_slice(b"\"item\":");
                record.extend_from_slice(item);
                text::print(record, format_args!(",\"output_index\":{index},"));
            },
            |_| {},
        );
    }

    fn think(&mut self, thought: &str, out: &mut Records) {
        if !std::mem::replace(&mut self.thinking, true) {
            let item = format!("{{\"id\":\"rs_{}\",\"summary\":[],\"type\":\"reasoning\"}}", self.item);
            self.item_event("response.output_item.added", item.as_bytes(), out);
        }
        let (item, index) = (self.item, self.output_index);
        self.event(
            "response.reasoning_summary_text.delta",
            out,
            |record| {
                record.extend_from_slice(b"\"delta\":");
                text::string(record, thought);
                text::print(record, format_args!(",\"item_id\":\"rs_{item}\",\"output_index\":{index},"));
            },
            |record| record.extend_from_slice(b"\"summary_index\":0,"),
        );
    }

    fn stop_thinking(&mut self, out: &mut Records) {
        if !std::mem::replace(&mut self.thinking, false) {
            return;
        }
        let (item, index, thought) = (self.item, self.output_index, self.said.thought.clone());
        self.event(
            "response.reasoning_summary_text.done",
            out,
            |record| text::print(record, format_args!("\"item_id\":\"rs_{item}\",\"output_index\":{index},")),
            |record| {
                record.extend_from_slice(b"\"summary_index\":0,\"text\":");
                text::string(record, &thought);
                record.push(b',');
            },
        );
        let reasoning = self.reasoning();
        self.item_event("response.output_item.done", &reasoning, out);
        self.output_index += 1;
    }

    fn start_speaking(&mut self, out: &mut Records) {
        if std::mem::replace(&mut self.speaking, true) {
            return;
        }
        let item = format!(
            "{{\"content\":[],\"id\":\"msg_{}\",\"role\":\"assistant\",\"status\":\"in_progress\",\"type\":\"message\"}}",
            self.item
        );
        self.item_event("response.output_item.added", item.as_bytes(), out);
        let empty = b"{\"annotations\":[],\"logprobs\":[],\"text\":\"\",\"type\":\"output_text\"}".to_vec();
        self.part_event("response.content_part.added", &empty, out);
    }

    fn part_event(&mut self, kind: &str, part: &[u8], out: &mut Records) {
        let (item, index) = (self.item, self.output_index);
        self.event(
            kind,
            out,
            |record| {
                text::print(
                    record,
                    format_args!("\"content_index\":0,\"item_id\":\"msg_{item}\",\"output_index\":{index},\"part\":"),
                );
                record.extend_from_slice(part);
                record.push(b',');
            },
            |_| {},
        );
    }

    pub fn delta(&mut self, delta: Delta<'_>, out: &mut Records) {
        match delta {
            Delta::Tag(_) => return,
            Delta::Thought(thought) => {
                self.start(out);
                self.think(thought, out);
            }
            Delta::Text(said) => {
                self.start(out);
                self.stop_thinking(out);
                self.start_speaking(out);
                let (item, index) = (self.item, self.output_index);
                self.event(
                    "response.output_text.delta",
                    out,
                    |record| {
                        record.extend_from_slice(b"\"content_index\":0,\"delta\":");
                        text::string(record, said);
                        text::print(
                            record,
                            format_args!(",\"item_id\":\"msg_{item}\",\"logprobs\":[],\"output_index\":{index},"),
                        );
                    },
                    |_| {},
                );
            }
            Delta::Call(call) => {
                self.start(out);
                self.stop_thinking(out);
                let (item, index) = (self.item, self.output_index);
                let begun = self.call(call, "in_progress", "");
                self.item_event("response.output_item.added", &begun, out);
                for (kind, member) in [
                    ("response.function_call_arguments.delta", "delta"),
                    ("response.function_call_arguments.done", "arguments"),
                ] {
                    self.event(
                        kind,
                        out,
                        |record| {
                            text::print(record, format_args!("\"{member}\":"));
                            text::string(record, CALL_ARGUMENTS);
                            text::print(record, format_args!(",\"item_id\":\"fc_{item}_0\",\"output_index\":{index},"));
                        },
                        |_| {},
                    );
                }
                let whole = self.call(call, "completed", CALL_ARGUMENTS);
                self.item_event("response.output_item.done", &whole, out);
            }
        }
        self.said.add(delta);
    }

    pub fn end(&mut self, totals: &Totals, out: &mut Records) {
        self.start(out);
        let mut output = Vec::new();
        if !self.said.thought.is_empty() {
            self.stop_thinking(out);
            output.extend_from_slice(&self.reasoning());
            output.push(b',');
        }
        match self.said.call.clone() {
            Some(call) => output.extend_from_slice(&self.call(&call, "completed", CALL_ARGUMENTS)),
            None => {
                self.start_speaking(out);
                let (item, index) = (self.item, self.output_index);
                let said = self.said.text.clone();
                self.event(
                    "response.output_text.done",
                    out,
                    |record| {
                        text::print(
                            record,
                            format_args!("\"content_index\":0,\"item_id\":\"msg_{item}\",\"logprobs\":[],\"output_index\":{index},"),
                        );
                    },
                    |record| {
                        record.extend_from_slice(b"\"text\":");
                        text::string(record, &said);
                        record.push(b',');
                    },
                );
                let part = self.part();
                self.part_event("response.content_part.done", &part, out);
                let message = self.message();
                self.item_event("response.output_item.done", &message, out);
                output.extend_from_slice(&message);
            }
        }
        let object = self.object(Some(totals), &output);
        self.event("response.completed", out, |record| record.extend_from_slice(&object), |_| {});
    }

    /// Always `completed`, also where Ollama never learnt how it ended.
    pub fn whole(&mut self, said: &Said, totals: Option<&Totals>) -> Reply {
        let mut body = Vec::with_capacity(said.text.len() + 1024);
        let (id, created) = (self.id, self.created);
        let completed = text::unix_now().as_secs();
        text::print(
            &mut body,
            format_args!(
                "{{\"id\":\"resp_{id}\",\"object\":\"response\",\"created_at\":{created},\"completed_at\":{completed},\"status\":\"completed\",\"incomplete_details\":null,\"model\":"
            ),
        );
        text::string(&mut body, &self.model);
        body.extend_from_slice(b",\"previous_response_id\":null,\"instructions\":");
        body.extend_from_slice(&self.echo.instructions);
        body.extend_from_slice(b",\"output\":[");
        if !said.thought.is_empty() {
            text::print(
                &mut body,
                format_args!(
                    "{{\"id\":\"rs_resp_{id}\",\"type\":\"reasoning\",\"summary\":[{{\"type\":\"summary_text\",\"text\":"
                ),
            );
            text::string(&mut body, &said.thought);
            body.extend_from_slice(b"}],\"encrypted_content\":");
            text::string(&mut body, &said.thought);
            body.extend_from_slice(b"},");
        }
        match &said.call {
            Some(call) => {
                text::print(
                    &mut body,
                    format_args!(
                        "{{\"id\":\"fc_resp_{id}_0\",\"type\":\"function_call\",\"status\":\"completed\",\"call_id\":\"{}\",\"name\":\"{CALL_NAME}\",\"arguments\":",
                        call.id
                    ),
                );
                text::string(&mut body, CALL_ARGUMENTS);
                body.push(b'}');
            }
            None => {
                text::print(
                    &mut body,
                    format_args!(
                        "{{\"id\":\"msg_{}\",\"type\":\"message\",\"status\":\"completed\",\"role\":\"assistant\",\"content\":[{{\"type\":\"output_text\",\"text\":",
                        self.item
                    ),
                );
                text::string(&mut body, &said.text);
                body.extend_from_slice(b",\"annotations\":[],\"logprobs\":[]}]}");
            }
        }
        body.extend_from_slice(b"],\"error\":null,\"tools\":");
        body.extend_from_slice(&self.echo.tools_whole);
        body.extend_from_slice(b",\"tool_choice\":\"auto\",\"truncation\":");
        text::string(&mut body, &self.echo.truncation);
        body.extend_from_slice(b",\"parallel_tool_calls\":true,\"text\":{\"format\":");
        body.extend_from_slice(&self.echo.format);
        let (input, output) = totals.map_or((0, 0), |totals| (totals.prompt_tokens, totals.output_tokens));
        text::print(
            &mut body,
            format_args!(
                "}},\"top_p\":1,\"presence_penalty\":0,\"frequency_penalty\":0,\"top_logprobs\":0,\"temperature\":1,\"reasoning\":null,\"usage\":{{\"input_tokens\":{input},\"output_tokens\":{output},\"total_tokens\":{},\"input_tokens_details\":{{\"cached_tokens\":0}},\"output_tokens_details\":{{\"reasoning_tokens\":0}}}},\"max_output_tokens\":",
                input + output
            ),
        );
        body.extend_from_slice(&self.echo.max_output_tokens);
        text::print(
            &mut body,
            format_args!(
                ",\"max_tool_calls\":null,\"store\":false,\"background\":{},\"service_tier\":\"default\",\"metadata\":{{}},\"safety_identifier\":null,\"prompt_cache_key\":null}}\n",
                self.echo.background
            ),
        );
        Reply::new(200, JSON, body)
    }
}
