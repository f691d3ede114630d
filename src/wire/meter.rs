//! Token counts and the finish reason, read while a reply passes.
//!
//! The bytes go to the client untouched; the meter sees them on the way. What it says goes into audits and budgets, so it is
//! right or it is `None`: a real tokenizer follows the path of keys ([`tokens`]), because a reply may recite
//! `"done":true,"eval_count":9` inside a string. It holds no more than one short key and one short value, however long a record
//! is (`context` with every token id comes before the counts; the last event of `/v1/responses` repeats the whole answer), and
//! feeding it allocates nothing.
//!
//! Zero is unknown: Ollama leaves out counts that are zero on its own API and writes zeros on the others for what it never
//! learnt (ollama-wire 0.3). No answer really has zero tokens, since the end of text counts as one.
mod dull;
mod tokens;

use super::frames::{Frames, Framing, Piece};
use super::{Endpoint, anthropic, openai, responses};
use std::fmt;
use tokens::{Layout, Record, Tokens};

/// A short word out of a reply, such as a finish reason: `^[a-z_]{1,32}$`, so it is safe to record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Word {
    bytes: [u8; 32],
    length: u8,
}

impl Word {
    /// `None` if the text does not fit the grammar.
    pub fn new(text: &[u8]) -> Option<Word> {
        if text.is_empty() || text.len() > 32 || !text.iter().all(|&b| b.is_ascii_lowercase() || b == b'_') {
            return None;
        }
        let mut word = Word { bytes: [0; 32], length: text.len() as u8 };
        word.bytes[..text.len()].copy_from_slice(text);
        Some(word)
    }

    pub fn as_str(&self) -> &str {
        // ASCII by construction.
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// What a reply said about itself. `None` is unknown, never zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub input_tokens: Option<u64>,
    pub output_tokens: Option<u64>,
    /// `done_reason`, `finish_reason`, `status` or `incomplete_details.reason`, `stop_reason`.
    pub finish_reason: Option<Word>,
    /// The dialect's own end came: `done:true`, `[DONE]`, `response.completed`, `message_stop`, `status:"success"`; where
    /// `[DONE]` alone is missing, a finish reason; in a reply that is not streamed, a finish reason, or a reply that does not stop in the middle where the endpoint has none. A reply of status 200 without it
    /// is a failed answer, even if the HTTP message is complete (ollama-wire 0.2 and 0.3).
    pub terminal: bool,
    /// The backend itself wrote an error: a record with `error`, or the dialect's error event.
    pub error_frame: bool,
    /// A prompt that was only rendered (`_debug_render_only`): it has no end, and none is missing.
    pub rendered: bool,
    /// From here on Ollama's own API only, in nanoseconds.
    pub total_duration_ns: Option<u64>,
    /// Waiting in the scheduler's queue and loading.
    pub load_duration_ns: Option<u64>,
    pub prompt_eval_duration_ns: Option<u64>,
    pub eval_duration_ns: Option<u64>,
}

/// Reads [`Usage`] from a reply that is fed to it in pieces, as they come.
#[derive(Clone, Debug)]
pub struct Meter {
    frames: Frames,
    tokens: Tokens,
    usage: Usage,
    records: u64,
    finished: bool,
}

impl Meter {
    /// `framing` comes from the reply's content type ([`Framing::of_content_type`]).
    pub fn new(endpoint: Endpoint, framing: Framing) -> Self {
        let layout = Layout::of(endpoint, framing);
        Meter {
            frames: Frames::new(framing),
            tokens: Tokens::new(layout),
            usage: Usage::default(),
            records: 0,
            finished: false,
        }
    }

    /// The next bytes of the reply's body. It cannot fail and allocates nothing; what is not JSON is passed over.
    pub fn feed(&mut self, bytes: &[u8]) {
        let Meter { frames, tokens, usage, records, .. } = self;
        frames.feed(bytes, |piece| match piece {
            Piece::Data(bytes) => tokens.feed(bytes),
            Piece::End => {
                *records += 1;
                end_of_record(tokens, usage);
            }
            Piece::Whole(record) if dull::teaches_nothing(tokens.layout(), record) => *records += 1,
            Piece::Whole(record) => {
                *records += 1;
                tokens.feed(record);
                end_of_record(tokens, usage);
            }
        });
    }

    /// The reply has ended, in whatever way. Said again, it says the same.
    pub fn finish(&mut self) -> Usage {
        let Meter { frames, tokens, usage, finished, .. } = self;
        if std::mem::replace(finished, true) {
            return self.usage;
        }
        // Replies of the other endpoints may be empty or plain text; only JSON that stops in the middle is not their end.
        let stopped = tokens.is_unfinished();
        frames.finish(|_| end_of_record(tokens, usage));
        match tokens.layout() {
            Layout::Whole => usage.terminal = !stopped && !usage.error_frame,
            // The model has finished, and said so; only `[DONE]` is missing. Not so where it stops in the middle of a record.
            Layout::ChoiceEvents => usage.terminal |= usage.finish_reason.is_some() && !usage.error_frame && !stopped,
            _ => {}
        }
        self.usage
    }

    /// Whole records of the stream so far: lines or events. Ollama sends one for each token, mostly, but nobody promises it: a sign of
    /// progress, not a count of tokens.
    pub fn records(&self) -> u64 {
        self.records
    }
}

fn end_of_record(tokens: &mut Tokens, usage: &mut Usage) {
    if tokens.is_end_marker() {
        usage.terminal = true;
    } else if let Some(record) = tokens.record() {
        usage.learn(tokens.layout(), record);
    }
    tokens.reset();
}

impl Usage {
    fn learn(&mut self, layout: Layout, record: &Record) {
        self.error_frame |= record.error;
        self.rendered |= record.rendered;
        match layout {
            Layout::Native => {
                if record.done {
                    self.terminal = true;
                    self.finish_reason = Word::new(record.finish.bytes());
                    self.counts(record);
                    self.durations(record);
                }
            }
            Layout::Vectors => {
                if record.has_vectors {
                    self.terminal = true;
                    self.counts(record);
                    self.durations(record);
                }
            }
            Layout::Choices | Layout::ChoiceEvents => {
                let finish = Word::new(record.finish.bytes());
                self.finish_reason = finish.or(self.finish_reason);
                // A stream of `/v1/completions` has zeros in every chunk but the one without choices.
                let has_none = record.choices == Some(0) && layout == Layout::ChoiceEvents;
                if finish.is_some() || has_none {
                    self.counts(record);
                }
                if layout == Layout::Choices {
                    self.terminal |= finish.is_some();
                }
            }
            Layout::Response => self.learn_response(record),
            Layout::ResponseEvents => match record.kind.bytes() {
                responses::COMPLETED | responses::INCOMPLETE => self.learn_response(record),
                responses::FAILED => {
                    self.learn_response(record);
                    self.terminal = false;
                    self.error_frame = true;
                }
                responses::ERROR_EVENT => self.error_frame = true,
                _ => {}
            },
            Layout::Message => {
                let finish = Word::new(record.finish.bytes());
                if record.kind.bytes() == anthropic::WHOLE_MESSAGE && finish.is_some() {
                    self.terminal = true;
                    self.finish_reason = finish;
                    self.counts(record);
                }
            }
            Layout::MessageEvents => match record.kind.bytes() {
                anthropic::MESSAGE_DELTA => {
                    self.finish_reason = Word::new(record.finish.bytes()).or(self.finish_reason);
                    if self.finish_reason.is_some() {
                        self.counts(record);
                    }
                }
                anthropic::MESSAGE_STOP => self.terminal = true,
                _ => {}
            },
            Layout::Progress => self.terminal |= record.status.bytes() == b"success",
            Layout::Whole => {}
        }
    }

    fn learn_response(&mut self, record: &Record) {
        // `incomplete_details.reason` says more than the status `incomplete`.
        self.finish_reason = Word::new(record.finish.bytes()).or(Word::new(record.status.bytes()));
        self.terminal |= matches!(record.status.bytes(), b"completed" | b"incomplete");
        self.counts(record);
    }

    fn counts(&mut self, record: &Record) {
        let known = |count: Option<u64>| count.filter(|&count| count > 0);
        self.input_tokens = known(record.input_tokens).or(self.input_tokens);
        self.output_tokens = known(record.output_tokens).or(self.output_tokens);
    }

    fn durations(&mut self, record: &Record) {
        self.total_duration_ns = record.total_duration_ns;
        self.load_duration_ns = record.load_duration_ns;
        self.prompt_eval_duration_ns = record.prompt_eval_duration_ns;
        self.eval_duration_ns = record.eval_duration_ns;
    }
}

impl Layout {
    fn of(endpoint: Endpoint, framing: Framing) -> Layout {
        use Endpoint::*;
        let streams = framing == Framing::Sse;
        match endpoint {
            Chat | Generate => Layout::Native,
            Embed | Embeddings | OpenAiEmbeddings => Layout::Vectors,
            ChatCompletions | Completions if streams => Layout::ChoiceEvents,
            ChatCompletions | Completions => Layout::Choices,
            Responses if streams => Layout::ResponseEvents,
            Responses => Layout::Response,
            Messages if streams => Layout::MessageEvents,
            Messages => Layout::Message,
            Pull | Push | Create => Layout::Progress,
            Root | Version | Status | Tags | Ps | Show | Models | Model | Copy | Delete | Blob => Layout::Whole,
        }
    }

    /// The text that ends a stream without being JSON.
    fn end_marker(self) -> &'static [u8] {
        if self == Layout::ChoiceEvents { openai::END } else { b"" }
    }
}

#[cfg(test)]
mod tests;
