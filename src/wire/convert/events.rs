//! A stream, event by event.
//!
//! Items get consecutive places in the order in which they first appear, and each is finished before the next begins, so that the
//! stream and its last event tell the same. Ollama sends calls whole; one that comes in pieces (its arguments are no JSON yet) stays
//! open until they are.
use super::super::frames::{Frames, Framing, Piece};
use super::raw::Raw;
use super::whole::{counts, read_call};
use super::{Call, Counts, Reply, Status, part, status_of, text};

/// Turns the events of `/v1/chat/completions` into those of `/v1/responses`.
///
/// The last event repeats the whole answer, so the answer is held, up to `limit_bytes`; past it the response fails, with what was said
/// until then. No `Debug`: it holds a reply.
pub struct Events {
    reply: Reply,
    limit_bytes: usize,
    frames: Frames,
    record: Vec<u8>,
    sequence: u64,
    begun: bool,
    ended: bool,
    failed: bool,
    /// Finished items, as JSON.
    items: Vec<String>,
    held_bytes: usize,
    open: Open,
    counts: Counts,
    finish: Option<String>,
}

/// The item that has begun and not ended. Its place is behind the finished ones.
enum Open {
    None,
    Thought(String),
    Message(String),
    /// With the index that its pieces have.
    Call(Call, Option<u64>),
}

const TOO_LONG: &str = "The answer is longer than this proxy can convert for an Ollama without /v1/responses.";

impl Events {
    pub fn new(reply: Reply, limit_bytes: usize) -> Events {
        Events {
            reply,
            limit_bytes,
            frames: Frames::new(Framing::Sse),
            record: Vec::new(),
            sequence: 0,
            begun: false,
            ended: false,
            failed: false,
            items: Vec::new(),
            held_bytes: 0,
            open: Open::None,
            counts: Counts::default(),
            finish: None,
        }
    }

    /// The next bytes of the chat's stream in, events out.
    pub fn pass(&mut self, bytes: &[u8], now_s: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut frames = self.frames.clone();
        frames.feed(bytes, |piece| match piece {
            Piece::Data(bytes) if self.record.len() + bytes.len() > self.limit_bytes => {
                self.fail("server_error", TOO_LONG, now_s, &mut out);
            }
            Piece::Data(bytes) => self.record.extend_from_slice(bytes),
            Piece::Whole(record) => self.learn(record, now_s, &mut out),
            Piece::End => {
                let record = std::mem::take(&mut self.record);
                self.learn(&record, now_s, &mut out);
            }
        });
        self.frames = frames;
        out
    }

    /// The chat's stream has ended cleanly. Where it has no end the caller says so with [`Events::fail_with`].
    pub fn finish(&mut self, now_s: u64) -> Vec<u8> {
        let mut out = Vec::new();
        if !self.record.is_empty() {
            let record = std::mem::take(&mut self.record);
            self.learn(&record, now_s, &mut out);
        }
        if self.finish.is_some() {
            self.end(now_s, &mut out);
        }
        out
    }

    /// The response fails, with what was said so far. Nothing is said behind a response that has ended.
    pub fn fail_with(&mut self, message: &str, now_s: u64) -> Vec<u8> {
        let mut out = Vec::new();
        self.fail("server_error", message, now_s, &mut out);
        out
    }

    /// The last event is out.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// It was told that the response failed.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    fn learn(&mut self, record: &[u8], now_s: u64, out: &mut Vec<u8>) {
        if self.ended || record.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        if record.trim_ascii() == b"[DONE]" {
            if self.finish.is_some() {
                self.end(now_s, out);
            }
            return;
        }
        let Some(chunk) = Raw::read(record) else { return };
        self.begin(now_s, out);
        if let Some(error) = chunk.get("error") {
            let message = error.text().or(error.says("message")).unwrap_or_default().into_owned();
            return self.fail("server_error", &message, now_s, out);
        }
        let told = counts(chunk);
        self.counts.input = told.input.or(self.counts.input);
        self.counts.output = told.output.or(self.counts.output);
        let Some(choice) = chunk.get("choices").and_then(|choices| choices.items().into_iter().next()) else { return };
        if let Some(delta) = choice.get("delta") {
            if let Some(thought) = delta.says("reasoning").filter(|thought| !thought.is_empty()) {
                self.think(&thought, out);
            }
            if let Some(said) = delta.says("content").filter(|said| !said.is_empty()) {
                self.say(&said, out);
            }
            for call in delta.get("tool_calls").map(Raw::items).unwrap_or_default() {
                self.call(call, out);
            }
        }
        if let Some(finish) = choice.says("finish_reason") {
            self.finish = Some(finish.into_owned());
        }
        if self.held_bytes > self.limit_bytes {
            self.fail("server_error", TOO_LONG, now_s, out);
        }
    }

    fn begin(&mut self, now_s: u64, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let object = self.reply.object(&Status::InProgress, "", Counts::default(), now_s);
        for kind in ["response.created", "response.in_progress"] {
            self.event(kind, &format!("\"response\":{object}"), out);
        }
    }

    fn end(&mut self, now_s: u64, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.begin(now_s, out);
        if self.items.is_empty() && matches!(self.open, Open::None) {
            self.open_message(out); // an empty answer is a message too
        }
        self.close(out);
        let status = status_of(self.finish.as_deref().unwrap_or_default());
        let kind = if let Status::Completed = status { "response.completed" } else { "response.incomplete" };
        let object = self.reply.object(&status, &self.items.join(","), self.counts, now_s);
        self.event(kind, &format!("\"response\":{object}"), out);
    }

    fn fail(&mut self, code: &str, message: &str, now_s: u64, out: &mut Vec<u8>) {
        if self.ended {
            return;
        }
        self.begin(now_s, out);
        (self.ended, self.failed) = (true, true);
        self.record = Vec::new();
        let place = self.items.len();
        match std::mem::replace(&mut self.open, Open::None) {
            Open::None => {}
            Open::Thought(thought) => self.items.push(self.reply.reasoning_item(place, &thought)),
            Open::Message(said) => self.items.push(self.reply.message_item(place, &said, "incomplete")),
            Open::Call(call, _) => self.items.push(self.reply.call_item(place, &call, "incomplete")),
        }
        let status = Status::Failed { code, message };
        let object = self.reply.object(&status, &self.items.join(","), self.counts, now_s);
        self.event("response.failed", &format!("\"response\":{object}"), out);
    }

    fn think(&mut self, thought: &str, out: &mut Vec<u8>) {
        let at = self.place("rs");
        if !matches!(self.open, Open::Thought(_)) {
            self.close(out);
            let (index, id) = (self.items.len(), &self.reply.id);
            let item = format!("{{\"id\":\"rs_{id}_{index}\",\"summary\":[],\"type\":\"reasoning\"}}");
            self.item_event("response.output_item.added", &item, out);
            let at = self.place("rs");
            let part = "\"part\":{\"text\":\"\",\"type\":\"summary_text\"},\"summary_index\":0";
            self.event("response.reasoning_summary_part.added", &format!("{at},{part}"), out);
            self.open = Open::Thought(String::new());
            return self.think(thought, out);
        }
        if let Open::Thought(so_far) = &mut self.open {
            so_far.push_str(thought);
            self.held_bytes += thought.len();
        }
        let members = format!("\"delta\":{},{at},\"summary_index\":0", text(thought));
        self.event("response.reasoning_summary_text.delta", &members, out);
    }

    fn open_message(&mut self, out: &mut Vec<u8>) {
        let (index, id) = (self.items.len(), &self.reply.id);
        let item = format!(
            "{{\"content\":[],\"id\":\"msg_{id}_{index}\",\"role\":\"assistant\",\"status\":\"in_progress\",\"type\":\"message\"}}"
        );
        self.item_event("response.output_item.added", &item, out);
        let at = self.place("msg");
        self.event("response.content_part.added", &format!("\"content_index\":0,{at},\"part\":{}", part("")), out);
        self.open = Open::Message(String::new());
    }

    fn say(&mut self, said: &str, out: &mut Vec<u8>) {
        if !matches!(self.open, Open::Message(_)) {
            self.close(out);
            self.open_message(out);
        }
        if let Open::Message(so_far) = &mut self.open {
            so_far.push_str(said);
            self.held_bytes += said.len();
        }
        let at = self.place("msg");
        let members = format!("\"content_index\":0,\"delta\":{},{at},\"logprobs\":[]", text(said));
        self.event("response.output_text.delta", &members, out);
    }

    fn call(&mut self, piece: Raw<'_>, out: &mut Vec<u8>) {
        let index = piece.members().into_iter().find(|(name, _)| name == "index").and_then(|(_, index)| index.count());
        let is_new = piece.says("id").is_some_and(|id| !id.is_empty());
        let further = match &self.open {
            Open::Call(_, open) => !is_new && *open == index,
            _ => false,
        };
        if !further {
            self.close(out);
            let mut call = read_call(&self.reply, piece, self.items.len());
            let arguments = std::mem::take(&mut call.arguments);
            let item = self.reply.call_item(self.items.len(), &call, "in_progress");
            self.item_event("response.output_item.added", &item, out);
            self.held_bytes += call.id.len() + call.name.len();
            self.open = Open::Call(call, index);
            self.argue(&arguments, out);
        } else {
            let arguments = piece.get("function").and_then(|function| function.says("arguments"));
            self.argue(&arguments.unwrap_or_default(), out);
        }
        if let Open::Call(call, _) = &self.open
            && (call.arguments.is_empty() || Raw::read(call.arguments.as_bytes()).is_some())
        {
            self.close(out);
        }
    }

    fn argue(&mut self, arguments: &str, out: &mut Vec<u8>) {
        if let Open::Call(call, _) = &mut self.open {
            call.arguments.push_str(arguments);
            self.held_bytes += arguments.len();
        }
        let members = format!("\"delta\":{},{}", text(arguments), self.place("fc"));
        self.event("response.function_call_arguments.delta", &members, out);
    }

    /// Finishes the item that is open.
    fn close(&mut self, out: &mut Vec<u8>) {
        let place = self.items.len();
        let item = match std::mem::replace(&mut self.open, Open::None) {
            Open::None => return,
            Open::Thought(thought) => {
                let (at, said) = (self.place("rs"), text(&thought));
                let members = format!("{at},\"summary_index\":0,\"text\":{said}");
                self.event("response.reasoning_summary_text.done", &members, out);
                let members =
                    format!("{at},\"part\":{{\"text\":{said},\"type\":\"summary_text\"}},\"summary_index\":0");
                self.event("response.reasoning_summary_part.done", &members, out);
                self.reply.reasoning_item(place, &thought)
            }
            Open::Message(said) => {
                let at = self.place("msg");
                let members = format!("\"content_index\":0,{at},\"logprobs\":[],\"text\":{}", text(&said));
                self.event("response.output_text.done", &members, out);
                let members = format!("\"content_index\":0,{at},\"part\":{}", part(&said));
                self.event("response.content_part.done", &members, out);
                self.reply.message_item(place, &said, "completed")
            }
            Open::Call(call, _) => {
                let (arguments, name) = (text(&call.arguments), text(&call.name));
                let members = format!("\"arguments\":{arguments},{},\"name\":{name}", self.place("fc"));
                self.event("response.function_call_arguments.done", &members, out);
                self.reply.call_item(place, &call, "completed")
            }
        };
        self.item_event("response.output_item.done", &item, out);
        self.items.push(item);
    }

    /// The members that say which item an event belongs to.
    fn place(&self, prefix: &str) -> String {
        let (index, id) = (self.items.len(), &self.reply.id);
        format!("\"item_id\":\"{prefix}_{id}_{index}\",\"output_index\":{index}")
    }

    fn item_event(&mut self, kind: &str, item: &str, out: &mut Vec<u8>) {
        self.event(kind, &format!("\"item\":{item},\"output_index\":{}", self.items.len()), out);
    }

    fn event(&mut self, kind: &str, members: &str, out: &mut Vec<u8>) {
        let sequence = self.sequence;
        self.sequence += 1;
        let event =
            format!("event: {kind}\ndata: {{{members},\"sequence_number\":{sequence},\"type\":\"{kind}\"}}\n\n");
        out.extend_from_slice(event.as_bytes());
    }
}
