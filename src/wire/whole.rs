//! A reply that is not streamed, held until it is known to be an answer.
//!
//! Not streamed, Ollama reports most failures with a status of 500. Those that it hides (it gave up after repeats, or the runner's
//! own stream broke) are a 200 with half a text, without a finish reason and without counts (ollama-wire 0.2 and 0.3).
use super::json::{Malformed, Reader, Shape};
use super::{Endpoint, Usage};
use bytes::{Bytes, BytesMut};

/// No `Debug`: it holds a reply.
pub struct Whole {
    endpoint: Endpoint,
    limit_bytes: usize,
    held: BytesMut,
}

impl Whole {
    /// Up to `limit_bytes` are held.
    pub fn new(endpoint: Endpoint, limit_bytes: usize) -> Whole {
        Whole { endpoint, limit_bytes, held: BytesMut::new() }
    }

    pub fn limit_bytes(&self) -> usize {
        self.limit_bytes
    }

    /// The next bytes. `Err`: it became longer than what is held; here is all of it so far, and the rest passes unjudged.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Bytes> {
        self.held.extend_from_slice(bytes);
        if self.held.len() > self.limit_bytes { Err(self.take()) } else { Ok(()) }
    }

    /// Whether what came is an answer. `usage` is what the meter says of the same bytes.
    pub fn is_answer(&self, usage: &Usage) -> bool {
        if usage.rendered {
            return true; // nothing else was asked for
        }
        // `/v1/responses` says `completed` whatever happened. Without counts that is right for a load only, which says nothing.
        let unfounded = self.endpoint == Endpoint::Responses && usage.output_tokens.is_none();
        usage.terminal && !usage.error_frame && !(unfounded && says_something(&self.held).unwrap_or(true))
    }

    pub fn take(&mut self) -> Bytes {
        self.held.split().freeze()
    }
}

/// Whether a response object has a text that is not empty, or a call.
fn says_something(body: &[u8]) -> Result<bool, Malformed> {
    let mut says = false;
    let mut reader = Reader::new(body)?;
    members(&mut reader, |reader, key| {
        if key != "output" || reader.shape()? != Shape::Array {
            return reader.skip();
        }
        reader.array(|reader| {
            members(reader, |reader, key| match key {
                "content" | "summary" if reader.shape()? == Shape::Array => reader.array(|reader| {
                    members(reader, |reader, key| {
                        if key == "text" && reader.shape()? == Shape::Text {
                            says |= !reader.string()?.is_empty();
                            return Ok(());
                        }
                        reader.skip()
                    })
                }),
                "arguments" => {
                    says = true;
                    reader.skip()
                }
                _ => reader.skip(),
            })
        })
    })?;
    Ok(says)
}

/// The members of an object; anything else is passed over.
fn members<'a>(
    reader: &mut Reader<'a>,
    mut each: impl FnMut(&mut Reader<'a>, &str) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    if reader.shape()? != Shape::Object {
        return reader.skip();
    }
    reader.object(|reader, key| each(reader, &key.decode()))
}
