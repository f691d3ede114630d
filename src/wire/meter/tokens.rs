//! An incremental JSON tokenizer that follows the few paths on which facts lie and skips everything else.
//!
//! It is lenient where leniency cannot make a wrong fact: inside what is skipped only strings and brackets are followed. On the
//! paths it is strict: what it does not expect makes the record unusable until its end.
use super::super::{anthropic, native, openai, responses};
use memchr::memchr2;

/// Which keys mean what: the shape of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// `/api/chat` and `/api/generate`, streamed or not.
    Native,
    /// Embeddings of both kinds.
    Vectors,
    /// `/v1/chat/completions` and `/v1/completions`, not streamed.
    Choices,
    ChoiceEvents,
    Response,
    ResponseEvents,
    Message,
    MessageEvents,
    /// Pull, push and create.
    Progress,
    /// Nothing to read but whether the JSON value is whole.
    Whole,
}

/// What one record said.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Record {
    pub done: bool,
    pub error: bool,
    pub has_vectors: bool,
    pub rendered: bool,
    /// How many choices it has, if it has `choices` at all.
    pub choices: Option<u32>,
    pub input_tokens: Option<u64>,
    pub output_tokens: Option<u64>,
    pub total_duration_ns: Option<u64>,
    pub load_duration_ns: Option<u64>,
    pub prompt_eval_duration_ns: Option<u64>,
    pub eval_duration_ns: Option<u64>,
    pub finish: Short,
    pub status: Short,
    /// `type`.
    pub kind: Short,
}

/// A text of at most 32 bytes; a longer one, or one with escapes, is no text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Short {
    bytes: [u8; Short::LONGEST as usize],
    length: u8,
}

impl Default for Short {
    fn default() -> Self {
        Short { bytes: [0; Short::LONGEST as usize], length: 0 }
    }
}

impl Short {
    const LONGEST: u8 = 32;
    const UNUSABLE: u8 = u8::MAX;

    pub fn bytes(&self) -> &[u8] {
        if self.length == Short::UNUSABLE { b"" } else { &self.bytes[..usize::from(self.length)] }
    }

    fn clear(&mut self) {
        self.length = 0;
    }

    fn spoil(&mut self) {
        self.length = Short::UNUSABLE;
    }

    fn push(&mut self, further: &[u8]) {
        let start = usize::from(self.length);
        match self.bytes.get_mut(start..start + further.len()) {
            Some(place) => {
                place.copy_from_slice(further);
                self.length += further.len() as u8;
            }
            None => self.spoil(),
        }
    }

    /// A count as JSON writes one that is a whole number; anything else is unknown.
    fn count(&self) -> Option<u64> {
        let digits = self.bytes();
        if digits.is_empty() || digits.len() > 19 || !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }
        Some(digits.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')))
    }
}

/// A container on a path to a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Top,
    Usage,
    Choices,
    /// `choices[0]`.
    Choice,
    Response,
    IncompleteDetails,
    Delta,
}

/// What is done with the value of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Skip,
    Enter(Node),
    Done,
    /// Its presence is the fact, unless it is null.
    Error,
    Vectors,
    Rendered,
    Finish,
    Status,
    Kind,
    Input,
    Output,
    TotalDuration,
    LoadDuration,
    PromptEvalDuration,
    EvalDuration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the record's value.
    Start,
    /// In an object that is followed: a key or the end.
    KeyOrEnd,
    Key,
    KeyEscape,
    Colon,
    Value,
    /// After a member of an object that is followed.
    AfterMember,
    /// In an array that is followed.
    ItemOrEnd,
    /// In a text that is kept.
    Text,
    TextEscape,
    SkipText,
    SkipTextEscape,
    /// In a number, true, false or null.
    Scalar,
    /// In a container that is skipped.
    Skip,
    SkipInnerText,
    SkipInnerEscape,
    /// After the record's value.
    Whole,
    /// In the text that ends a stream.
    Marker,
    /// Not what was expected: wait for the record's end.
    Bad,
}

#[derive(Clone, Debug)]
pub(super) struct Tokens {
    layout: Layout,
    state: State,
    plan: Plan,
    /// The containers that were entered. None of the layouts is deeper.
    path: [Node; 4],
    level: u8,
    /// Open brackets inside what is skipped.
    skipped: u32,
    /// The key, then the value.
    short: Short,
    marker: u8,
    record: Record,
}

impl Tokens {
    pub fn new(layout: Layout) -> Self {
        Tokens {
            layout,
            state: State::Start,
            plan: Plan::Skip,
            path: [Node::Top; 4],
            level: 0,
            skipped: 0,
            short: Short::default(),
            marker: 0,
            record: Record::default(),
        }
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What the record says, if it is whole.
    pub fn record(&self) -> Option<&Record> {
        (self.state == State::Whole).then_some(&self.record)
    }

    /// The record was the text that ends a stream.
    pub fn is_end_marker(&self) -> bool {
        self.state == State::Marker && usize::from(self.marker) == self.layout.end_marker().len()
    }

    /// The record's value has begun and has not ended.
    pub fn is_unfinished(&self) -> bool {
        !matches!(self.state, State::Start | State::Whole | State::Bad)
    }

    /// Makes ready for the next record.
    pub fn reset(&mut self) {
        self.state = State::Start;
        self.plan = Plan::Skip;
        self.level = 0;
        self.skipped = 0;
        self.marker = 0;
        self.record = Record::default();
    }

    /// The next bytes of the record.
    pub fn feed(&mut self, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            match self.state {
                // Long stretches first: they find their end themselves.
                State::Key | State::Text => at = self.keep_text(bytes, at),
                State::SkipText | State::SkipInnerText => at = self.skip_text(bytes, at),
                State::Skip => at = self.skip(bytes, at),
                State::Scalar => at = self.scalar(bytes, at),
                State::Bad => return,
                _ => {
                    self.step(bytes[at]);
                    at += 1;
                }
            }
        }
    }

    /// One byte of what stands between texts and scalars.
    fn step(&mut self, byte: u8) {
        self.state = match (self.state, byte) {
            (State::KeyEscape, _) => State::Key,
            (State::TextEscape, _) => State::Text,
            (State::SkipTextEscape, _) => State::SkipText,
            (State::SkipInnerEscape, _) => State::SkipInnerText,
            (state, b' ' | b'\t' | b'\n' | b'\r') => state,
            (State::Start, b'{') => return self.enter(Node::Top),
            (State::Start | State::Marker, byte) => {
                if self.layout.end_marker().get(usize::from(self.marker)) == Some(&byte) {
                    self.marker += 1;
                    State::Marker
                } else {
                    State::Bad
                }
            }
            (State::KeyOrEnd, b'"') => {
                self.short.clear();
                State::Key
            }
            (State::KeyOrEnd | State::AfterMember, b'}') => return self.leave(),
            (State::AfterMember, b',') => State::KeyOrEnd,
            (State::Colon, b':') => {
                self.plan = plan(self.layout, self.path[usize::from(self.level) - 1], self.short.bytes());
                self.short.clear();
                State::Value
            }
            (State::Value, byte) => return self.value(byte),
            (State::ItemOrEnd, b']') => return self.leave(),
            (State::ItemOrEnd, b',') => State::ItemOrEnd,
            (State::ItemOrEnd, byte) => {
                let items = self.record.choices.unwrap_or(0);
                self.record.choices = Some(items.saturating_add(1));
                self.plan = if items == 0 { Plan::Enter(Node::Choice) } else { Plan::Skip };
                self.short.clear();
                return self.value(byte);
            }
            _ => State::Bad,
        };
    }

    /// The first byte of a value.
    fn value(&mut self, byte: u8) {
        match self.plan {
            // Whatever it is but null and false, which `scalar` judges.
            Plan::Error if matches!(byte, b'"' | b'{' | b'[') => self.record.error = true,
            Plan::Vectors if byte == b'[' => self.record.has_vectors = true,
            Plan::Rendered if byte == b'{' => self.record.rendered = true,
            _ => {}
        }
        self.state = match (byte, self.plan) {
            (b'"', Plan::Finish | Plan::Status | Plan::Kind) => State::Text,
            (b'"', _) => State::SkipText,
            (b'{', Plan::Enter(node)) if node != Node::Choices => return self.enter(node),
            (b'[', Plan::Enter(Node::Choices)) => {
                self.record.choices = Some(0);
                return self.enter(Node::Choices);
            }
            (b'{' | b'[', _) => {
                self.skipped = 1;
                State::Skip
            }
            (b'-' | b'0'..=b'9' | b't' | b'f' | b'n', _) => {
                self.short.push(&[byte]);
                State::Scalar
            }
            _ => State::Bad,
        };
    }

    fn enter(&mut self, node: Node) {
        let Some(place) = self.path.get_mut(usize::from(self.level)) else {
            self.state = State::Bad;
            return;
        };
        *place = node;
        self.level += 1;
        self.state = if node == Node::Choices { State::ItemOrEnd } else { State::KeyOrEnd };
    }

    fn leave(&mut self) {
        self.level -= 1;
        self.after_value();
    }

    fn after_value(&mut self) {
        self.state = match self.level {
            0 => State::Whole,
            level if self.path[usize::from(level) - 1] == Node::Choices => State::ItemOrEnd,
            _ => State::AfterMember,
        };
    }

    /// Goes on in a key or a kept text; gives the place after what was read.
    fn keep_text(&mut self, bytes: &[u8], at: usize) -> usize {
        let Some(length) = memchr2(b'"', b'\\', &bytes[at..]) else {
            self.short.push(&bytes[at..]);
            return bytes.len();
        };
        let end = at + length;
        if bytes[end] == b'\\' {
            // Ollama escapes none of the keys and words that we look for.
            self.short.spoil();
            self.state = if self.state == State::Key { State::KeyEscape } else { State::TextEscape };
        } else {
            self.short.push(&bytes[at..end]);
            if self.state == State::Key {
                self.state = State::Colon;
            } else {
                match self.plan {
                    Plan::Finish => self.record.finish = self.short,
                    Plan::Status => self.record.status = self.short,
                    Plan::Kind => self.record.kind = self.short,
                    _ => {}
                }
                self.after_value();
            }
        }
        end + 1
    }

    fn skip_text(&mut self, bytes: &[u8], at: usize) -> usize {
        let Some(length) = memchr2(b'"', b'\\', &bytes[at..]) else { return bytes.len() };
        let is_inner = self.state == State::SkipInnerText;
        if bytes[at + length] == b'\\' {
            self.state = if is_inner { State::SkipInnerEscape } else { State::SkipTextEscape };
        } else if is_inner {
            self.state = State::Skip;
        } else {
            self.after_value();
        }
        at + length + 1
    }

    fn skip(&mut self, bytes: &[u8], at: usize) -> usize {
        let Some(length) = bytes[at..].iter().position(|&byte| STOPS[usize::from(byte)]) else { return bytes.len() };
        match bytes[at + length] {
            b'"' => self.state = State::SkipInnerText,
            b'{' | b'[' => match self.skipped.checked_add(1) {
                Some(skipped) => self.skipped = skipped,
                None => self.state = State::Bad,
            },
            _ => {
                self.skipped -= 1;
                if self.skipped == 0 {
                    self.after_value();
                }
            }
        }
        at + length + 1
    }

    fn scalar(&mut self, bytes: &[u8], at: usize) -> usize {
        let rest = &bytes[at..];
        let end = rest.iter().position(|byte| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r'));
        self.short.push(&rest[..end.unwrap_or(rest.len())]);
        let Some(length) = end else { return bytes.len() };
        let record = &mut self.record;
        match self.plan {
            Plan::Done => record.done = self.short.bytes() == b"true",
            Plan::Error => record.error |= !matches!(self.short.bytes(), b"null" | b"false"),
            Plan::Input => record.input_tokens = self.short.count(),
            Plan::Output => record.output_tokens = self.short.count(),
            Plan::TotalDuration => record.total_duration_ns = self.short.count(),
            Plan::LoadDuration => record.load_duration_ns = self.short.count(),
            Plan::PromptEvalDuration => record.prompt_eval_duration_ns = self.short.count(),
            Plan::EvalDuration => record.eval_duration_ns = self.short.count(),
            _ => {}
        }
        self.after_value();
        // The byte that ended it belongs to what comes next.
        at + length
    }
}

/// The bytes that matter inside what is skipped.
static STOPS: [bool; 256] = {
    let mut stops = [false; 256];
    stops[b'"' as usize] = true;
    stops[b'{' as usize] = true;
    stops[b'}' as usize] = true;
    stops[b'[' as usize] = true;
    stops[b']' as usize] = true;
    stops
};

/// What the value of `key` in `node` is for.
fn plan(layout: Layout, node: Node, key: &[u8]) -> Plan {
    match (layout, node) {
        (Layout::Native, _) => match key {
            native::DONE => Plan::Done,
            native::DONE_REASON => Plan::Finish,
            native::PROMPT_EVAL_COUNT => Plan::Input,
            native::EVAL_COUNT => Plan::Output,
            native::TOTAL_DURATION => Plan::TotalDuration,
            native::LOAD_DURATION => Plan::LoadDuration,
            native::PROMPT_EVAL_DURATION => Plan::PromptEvalDuration,
            native::EVAL_DURATION => Plan::EvalDuration,
            native::ERROR => Plan::Error,
            native::DEBUG_INFO => Plan::Rendered,
            _ => Plan::Skip,
        },
        (Layout::Vectors, Node::Top) => match key {
            native::EMBEDDING | native::EMBEDDINGS | openai::DATA => Plan::Vectors,
            native::PROMPT_EVAL_COUNT => Plan::Input,
            native::TOTAL_DURATION => Plan::TotalDuration,
            native::LOAD_DURATION => Plan::LoadDuration,
            openai::USAGE => Plan::Enter(Node::Usage),
            native::ERROR => Plan::Error,
            _ => Plan::Skip,
        },
        (Layout::Vectors, _) if key == openai::PROMPT_TOKENS => Plan::Input,
        (Layout::Choices | Layout::ChoiceEvents, node) => match (node, key) {
            (Node::Top, openai::CHOICES) => Plan::Enter(Node::Choices),
            (Node::Top, openai::USAGE) => Plan::Enter(Node::Usage),
            (Node::Top, openai::ERROR) => Plan::Error,
            (Node::Top, native::DEBUG_INFO) => Plan::Rendered,
            (Node::Choice, openai::FINISH_REASON) => Plan::Finish,
            (Node::Usage, openai::PROMPT_TOKENS) => Plan::Input,
            (Node::Usage, openai::COMPLETION_TOKENS) => Plan::Output,
            _ => Plan::Skip,
        },
        (Layout::ResponseEvents, Node::Top) => match key {
            responses::TYPE => Plan::Kind,
            responses::RESPONSE => Plan::Enter(Node::Response),
            responses::ERROR => Plan::Error,
            _ => Plan::Skip,
        },
        (Layout::Response | Layout::ResponseEvents, Node::Top | Node::Response) => match key {
            responses::STATUS => Plan::Status,
            responses::INCOMPLETE_DETAILS => Plan::Enter(Node::IncompleteDetails),
            responses::USAGE => Plan::Enter(Node::Usage),
            responses::ERROR => Plan::Error,
            _ => Plan::Skip,
        },
        (Layout::Response | Layout::ResponseEvents, node) => match (node, key) {
            (Node::IncompleteDetails, responses::REASON) => Plan::Finish,
            (Node::Usage, responses::INPUT_TOKENS) => Plan::Input,
            (Node::Usage, responses::OUTPUT_TOKENS) => Plan::Output,
            _ => Plan::Skip,
        },
        (Layout::Message | Layout::MessageEvents, Node::Top) => match key {
            anthropic::TYPE => Plan::Kind,
            anthropic::USAGE => Plan::Enter(Node::Usage),
            anthropic::ERROR => Plan::Error,
            anthropic::DELTA if layout == Layout::MessageEvents => Plan::Enter(Node::Delta),
            anthropic::STOP_REASON if layout == Layout::Message => Plan::Finish,
            _ => Plan::Skip,
        },
        (Layout::Message | Layout::MessageEvents, node) => match (node, key) {
            (Node::Delta, anthropic::STOP_REASON) => Plan::Finish,
            (Node::Usage, anthropic::INPUT_TOKENS) => Plan::Input,
            (Node::Usage, anthropic::OUTPUT_TOKENS) => Plan::Output,
            _ => Plan::Skip,
        },
        (Layout::Progress, _) => match key {
            native::STATUS => Plan::Status,
            native::ERROR => Plan::Error,
            _ => Plan::Skip,
        },
        (Layout::Whole, _) if key == native::ERROR => Plan::Error,
        _ => Plan::Skip,
    }
}
