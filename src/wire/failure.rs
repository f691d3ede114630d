//! How a failure is said inside a stream that has begun, in the words of each dialect.
use super::{Dialect, Endpoint};
use serde::Serialize;

/// What kind of stream it is that an error is put into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// NDJSON, whoever speaks it.
    Lines,
    /// Events of Ollama's own words, which Ollama itself never sends.
    NativeEvents,
    /// `/v1/chat/completions` and `/v1/completions`.
    Choices,
    /// `/v1/responses`, whose events are numbered.
    Responses { sequence_number: u64 },
    /// `/v1/messages`.
    Messages,
}

impl Stream {
    /// `sequence_number` counts for `/v1/responses` only.
    pub fn of(dialect: Dialect, endpoint: Option<Endpoint>, sse: bool, sequence_number: u64) -> Stream {
        match (sse, dialect, endpoint) {
            (false, ..) => Stream::Lines,
            (true, _, Some(Endpoint::Responses)) => Stream::Responses { sequence_number },
            (true, Dialect::Native, _) => Stream::NativeEvents,
            (true, Dialect::OpenAi, _) => Stream::Choices,
            (true, Dialect::Anthropic, _) => Stream::Messages,
        }
    }
}

/// A failure, and what each dialect calls it.
#[derive(Clone, Copy, Debug)]
pub struct Failure<'a> {
    pub message: &'a str,
    pub openai_type: &'a str,
    pub anthropic_type: &'a str,
    /// A stable word of ours; a backend's error has none.
    pub code: Option<&'a str>,
    pub param: Option<&'a str>,
}

impl Failure<'_> {
    /// The error frame that ends a stream: a line of its own, or an event.
    ///
    /// `mid_record` says that the bytes sent last did not end a record. It is ended first, with a newline (a blank line
    /// in SSE), and not otherwise: a blank line makes ollama-python raise before it sees the error.
    pub fn frame(&self, stream: Stream, mid_record: bool) -> Vec<u8> {
        let mut frame = Vec::with_capacity(256);
        if mid_record {
            frame.extend_from_slice(if stream == Stream::Lines { b"\n" } else { b"\n\n" });
        }
        match stream {
            // Every NDJSON reader looks for `error` as a string; ollama-js insists on it.
            Stream::Lines => {
                json(&mut frame, &Native { error: self.message });
                frame.push(b'\n');
            }
            Stream::NativeEvents => event(&mut frame, None, &Native { error: self.message }),
            Stream::Choices => event(&mut frame, None, &OpenAi { error: self.openai() }),
            // OpenAI documents the flat members and sends the nested ones. Its clients raise on `error` whatever the type is.
            Stream::Responses { sequence_number } => event(
                &mut frame,
                Some("error"),
                &ResponsesError {
                    r#type: "error",
                    code: self.code,
                    message: self.message,
                    param: self.param,
                    error: self.openai(),
                    sequence_number,
                },
            ),
            Stream::Messages => event(
                &mut frame,
                Some("error"),
                &Anthropic {
                    r#type: "error",
                    error: AnthropicError { r#type: self.anthropic_type, message: self.message },
                },
            ),
        }
        frame
    }

    fn openai(&self) -> OpenAiError<'_> {
        OpenAiError { message: self.message, r#type: self.openai_type, param: self.param, code: self.code }
    }
}

fn event(out: &mut Vec<u8>, name: Option<&str>, data: &impl Serialize) {
    if let Some(name) = name {
        out.extend_from_slice(b"event: ");
        out.extend_from_slice(name.as_bytes());
        out.push(b'\n');
    }
    out.extend_from_slice(b"data: ");
    json(out, data);
    out.extend_from_slice(b"\n\n");
}

fn json(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(out, value).expect("a struct of texts and numbers always serialises");
}

#[derive(Serialize)]
struct Native<'a> {
    error: &'a str,
}

#[derive(Serialize)]
struct OpenAi<'a> {
    error: OpenAiError<'a>,
}

#[derive(Serialize)]
struct OpenAiError<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

#[derive(Serialize)]
struct ResponsesError<'a> {
    r#type: &'a str,
    code: Option<&'a str>,
    message: &'a str,
    param: Option<&'a str>,
    error: OpenAiError<'a>,
    sequence_number: u64,
}

#[derive(Serialize)]
struct Anthropic<'a> {
    r#type: &'a str,
    error: AnthropicError<'a>,
}

#[derive(Serialize)]
struct AnthropicError<'a> {
    r#type: &'a str,
    message: &'a str,
}
