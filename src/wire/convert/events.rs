//! A stream, event by event.
//!
//! Items get consecutive places, and each is finished before the next begins, so that the stream and its last event tell the same.
//! Ollama sends calls whole; one that comes in pieces is gathered until its arguments are whole, and only then begins.
use std::borrow::Cow;

use super::super::frames::{Frames, Framing, Piece};
use super::raw::Raw;
use super::whole::{call_id, counts};
use super::{Call, Counts, Reply, Status, part, status_of, text};

/// Turns the events of `/v1/chat/completions` into those of `/v1/responses`.
///
/// The last event repeats the whole answer, so the answer is held, up to `limit_bytes` of it as it is written there; past them the
/// response fails, with what was said until then. No `Debug`: it holds a reply.
pub struct Events {
    reply: Reply,
    limit_bytes: usize,
    frames: Frames,
    record: Vec<u8>,
    sequence: u64,
    begun: bool,
    ended: bool,
    /// What the audit says of a failure.
    failed: Option<&'static str>,
    gave_up: bool,
    /// Finished items, as JSON.
    items: Vec<String>,
    /// Of the finished items as they are written, of the others as they are.
    held_bytes: usize,
    open: Open,
    /// Calls whose arguments are not whole yet, by first appearance.
    gathered: Vec<Gathered>,
    counts: Counts,
    finish: Option<String>,
}

/// The item that has begun and not ended. Its place is behind the finished ones.
enum Open {
    None,
    Thought(String),
    Message(String),
}

/// A call in pieces.
struct Gathered {
    call: Call,
    /// That its pieces have.
    index: Option<u64>,
    nesting: Nesting,
}

/// As many calls in pieces at once; the first of more is finished as it is.
const MOST_GATHERED: usize = 128;

/// What is held of a call beside its texts.
const CALL_BYTES: usize = 64;

/// A failure that is found here: what the client is told, and what the audit says.
type Fault = (&'static str, &'static str);

const NO_JSON: Fault = ("Ollama sent an event that could not be understood.", "an event of the reply is no JSON");

const TOO_LONG: Fault =
    ("The answer is longer than this proxy can convert for an Ollama without /v1/responses.", super::TOO_LONG);

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
            failed: None,
            gave_up: false,
            items: Vec::new(),
            held_bytes: 0,
            open: Open::None,
            gathered: Vec::new(),
            counts: Counts::default(),
            finish: None,
        }
    }

    /// The next bytes of the chat's stream in, events out.
    pub fn pass(&mut self, bytes: &[u8], now_s: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut frames = self.frames.clone();
        frames.feed(bytes, |piece| match piece {
            _ if self.ended => {}
            Piece::Data(bytes) if self.record.len() + bytes.len() > self.limit_bytes => {
                self.give_up(TOO_LONG, now_s, &mut out);
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

    /// The chat's stream has ended cleanly. Where it has no end, or stops in the middle of a record, the caller says so with
    /// [`Events::fail_with`].
    pub fn finish(&mut self, now_s: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let record = std::mem::take(&mut self.record);
        let is_json = || Raw::read(String::from_utf8_lossy(&record).as_bytes()).is_some();
        if !matches!(record.trim_ascii(), b"" | b"[DONE]") && !is_json() {
            return out; // half a record
        }
        self.learn(&record, now_s, &mut out);
        if self.finish.is_some() {
            self.end(now_s, &mut out);
        }
        out
    }

    /// The response fails, with what was said so far. Nothing is said behind a response that has ended.
    pub fn fail_with(&mut self, message: &str, now_s: u64) -> Vec<u8> {
        let mut out = Vec::new();
        self.fail(message, "it was ended", now_s, &mut out);
        out
    }

    /// The last event is out.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// It was told that the response failed; why, in the audit's words.
    pub fn failed(&self) -> Option<&'static str> {
        self.failed
    }

    /// It failed by what was found here: whatever the backend still says, nobody hears it.
    pub fn gave_up(&self) -> bool {
        self.gave_up
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
        // Others read bytes that are no text so too, and lose a letter, not an answer.
        let record = String::from_utf8_lossy(record);
        let Some(chunk) = Raw::read(record.as_bytes()) else { return self.give_up(NO_JSON, now_s, out) };
        self.begin(now_s, out);
        if let Some(error) = chunk.get("error") {
            let message = error.text().or(error.says("message")).unwrap_or_default().into_owned();
            return self.fail(&message, "the backend told of an error", now_s, out);
        }
        let told = counts(chunk);
        self.counts.input = told.input.or(self.counts.input);
        self.counts.output = told.output.or(self.counts.output);
        let choices = chunk.get("choices").map(Raw::items).unwrap_or_default();
        let is_first = |choice: &Raw<'_>| choice.get("index").is_none_or(|index| index.count() == Some(0));
        let Some(choice) = choices.into_iter().find(is_first) else { return };
        if let Some(delta) = choice.get("delta") {
            if let Some(thought) = delta.says("reasoning").filter(|thought| !thought.is_empty()) {
                self.think(&thought, out);
            }
            if let Some(said) = delta.says("content").filter(|said| !said.is_empty()) {
                self.say(&said, out);
            }
            for call in delta.get("tool_calls").map(Raw::items).unwrap_or_default() {
                self.call(call, out);
                if self.held_bytes > self.limit_bytes {
                    break; // a record of empty calls makes many times its own length
                }
            }
        }
        if let Some(finish) = choice.says("finish_reason") {
            self.finish = Some(finish.into_owned());
        }
        if self.held_bytes > self.limit_bytes {
            self.give_up(TOO_LONG, now_s, out);
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
        self.close(out);
        while !self.gathered.is_empty() {
            self.finish_call(0, out);
        }
        if self.items.is_empty() {
            self.open_message(out); // an empty answer is a message too
            self.close(out);
        }
        let status = status_of(self.finish.as_deref().unwrap_or_default());
        let kind = if let Status::Completed = status { "response.completed" } else { "response.incomplete" };
        let object = self.reply.object(&status, &self.items.join(","), self.counts, now_s);
        self.event(kind, &format!("\"response\":{object}"), out);
    }

    fn give_up(&mut self, (message, cause): Fault, now_s: u64, out: &mut Vec<u8>) {
        self.gave_up |= !self.ended;
        self.fail(message, cause, now_s, out);
    }

    fn fail(&mut self, message: &str, cause: &'static str, now_s: u64, out: &mut Vec<u8>) {
        if self.ended {
            return;
        }
        self.begin(now_s, out);
        (self.ended, self.failed) = (true, Some(cause));
        self.record = Vec::new();
        let place = self.items.len();
        match std::mem::replace(&mut self.open, Open::None) {
            Open::None => {}
            Open::Thought(thought) => self.items.push(self.reply.reasoning_item(place, &thought)),
            Open::Message(said) => self.items.push(self.reply.message_item(place, &said, "incomplete")),
        }
        for Gathered { call, .. } in std::mem::take(&mut self.gathered) {
            self.items.push(self.reply.call_item(self.items.len(), &call, "incomplete"));
        }
        let status = Status::Failed { code: "server_error", message };
        let object = self.reply.object(&status, &self.items.join(","), self.counts, now_s);
        self.event("response.failed", &format!("\"response\":{object}"), out);
    }

    fn think(&mut self, thought: &str, out: &mut Vec<u8>) {
        let at = self.place("rs");
        if !matches!(self.open, Open::Thought(_)) {
            self.before_text(out);
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
            self.before_text(out);
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
        let index = piece.get("index").and_then(Raw::count);
        let id = piece.says("id").filter(|id| !id.is_empty());
        let function = piece.get("function");
        let says = |name| function.and_then(|function| function.says(name)).unwrap_or(Cow::Borrowed(""));
        let (name, arguments) = (says("name"), says("arguments"));
        let belongs = |it: &Gathered| it.index == index && id.as_ref().is_none_or(|id| *id == it.call.id);
        let at = match self.gathered.iter().rposition(belongs) {
            Some(at) => at,
            // The end of a call that is finished.
            None if id.is_none() && name.is_empty() && arguments.trim_ascii().is_empty() => return,
            None => {
                self.close(out);
                if self.gathered.len() == MOST_GATHERED {
                    self.finish_call(0, out);
                }
                let call = Call {
                    id: call_id(&self.reply, id, self.items.len() + self.gathered.len()),
                    name: name.into_owned(),
                    arguments: String::new(),
                };
                self.held_bytes += call.id.len() + call.name.len() + CALL_BYTES;
                self.gathered.push(Gathered { call, index, nesting: Nesting::default() });
                self.gathered.len() - 1
            }
        };
        let gathered = &mut self.gathered[at];
        gathered.call.arguments.push_str(&arguments);
        gathered.nesting.follow(&arguments);
        self.held_bytes += arguments.len();
        if gathered.nesting.is_whole() {
            self.finish_call(at, out);
        }
    }

    /// A call, from its beginning to its end.
    fn finish_call(&mut self, at: usize, out: &mut Vec<u8>) {
        self.close(out);
        let Call { id, name, arguments } = self.gathered.remove(at).call;
        self.held_bytes = self.held_bytes.saturating_sub(id.len() + name.len() + arguments.len() + CALL_BYTES);
        let mut call = Call { id, name, arguments: String::new() };
        let item = self.reply.call_item(self.items.len(), &call, "in_progress");
        self.item_event("response.output_item.added", &item, out);
        let place = self.place("fc");
        let members = format!("\"delta\":{},{place}", text(&arguments));
        self.event("response.function_call_arguments.delta", &members, out);
        let members = format!("\"arguments\":{},{place},\"name\":{}", text(&arguments), text(&call.name));
        self.event("response.function_call_arguments.done", &members, out);
        call.arguments = arguments;
        let item = self.reply.call_item(self.items.len(), &call, "completed");
        self.finish_item(item, out);
    }

    /// A text or a thought begins behind the calls without arguments; whose arguments are still to come begins later.
    fn before_text(&mut self, out: &mut Vec<u8>) {
        self.close(out);
        while let Some(at) = self.gathered.iter().position(|it| !it.nesting.is_open()) {
            self.finish_call(at, out);
        }
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
                self.held_bytes = self.held_bytes.saturating_sub(thought.len());
                self.reply.reasoning_item(place, &thought)
            }
            Open::Message(said) => {
                let at = self.place("msg");
                let members = format!("\"content_index\":0,{at},\"logprobs\":[],\"text\":{}", text(&said));
                self.event("response.output_text.done", &members, out);
                let members = format!("\"content_index\":0,{at},\"part\":{}", part(&said));
                self.event("response.content_part.done", &members, out);
                self.held_bytes = self.held_bytes.saturating_sub(said.len());
                self.reply.message_item(place, &said, "completed")
            }
        };
        self.finish_item(item, out);
    }

    fn finish_item(&mut self, item: String, out: &mut Vec<u8>) {
        self.item_event("response.output_item.done", &item, out);
        self.held_bytes += item.len();
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

/// How deep a JSON text is nested at its present end. It is followed, not judged.
#[derive(Default)]
struct Nesting {
    depth: usize,
    in_text: bool,
    escaped: bool,
    /// It was nested once.
    begun: bool,
}

impl Nesting {
    fn follow(&mut self, json: &str) {
        for byte in json.bytes() {
            match byte {
                _ if std::mem::take(&mut self.escaped) => {}
                b'\\' if self.in_text => self.escaped = true,
                b'"' => self.in_text = !self.in_text,
                _ if self.in_text => {}
                b'{' | b'[' => (self.depth, self.begun) = (self.depth + 1, true),
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
    }

    /// An object or an array, from its first bracket to its last.
    fn is_whole(&self) -> bool {
        self.begun && !self.is_open()
    }

    fn is_open(&self) -> bool {
        self.in_text || self.depth > 0
    }
}
