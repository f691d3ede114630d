//! What a backend says of its own failure, in the middle of a stream of `/v1`, put into the words of that stream.
//!
//! An error that comes as `data: {"error":"text"}`, or as a bare line `{"error":..}` between the events, is understood by no client of
//! the dialect: some skip the line, some lose the text. [`Mender`] puts the text into the error event that the dialect has. All
//! other bytes pass as they came and when they came; what may be the beginning of such a line, a dozen bytes, waits for the rest.
//!
//! It also knows what an error frame that is put behind the stream has to know: whether a record is open, and the number that the
//! next event of `/v1/responses` has.
use super::Endpoint;
use super::failure::{Failure, Stream};
use super::frames::Framing;
use super::json::{Malformed, Reader, Shape};
use bytes::{Bytes, BytesMut};
use memchr::memchr;

/// The longest line that is held to be mended; Ollama's errors have some hundred bytes.
pub const LONGEST_HELD_BYTES: usize = 64 * 1024;

/// No `Debug`: what is held is a reply's.
pub struct Mender {
    /// Lines are looked at.
    active: bool,
    endpoint: Endpoint,
    framing: Framing,
    place: Place,
    /// What may be an error line, from the line's first byte.
    held: BytesMut,
    /// The last two bytes that passed.
    tail: [u8; 2],
    /// Lines so far that begin with `data`: one for each event.
    events: u64,
    /// A mended event has its empty line already.
    drops_empty_line: bool,
    told: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    LineStart,
    /// Within a line that passes.
    Line,
    /// Within a line that is held.
    Held,
}

/// Whether a line is an error that needs mending, as far as its bytes so far say.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Suspicion {
    None,
    /// The bytes end too early to tell.
    Open,
    Sure,
}

impl Mender {
    pub fn new(endpoint: Endpoint, framing: Framing) -> Mender {
        use Endpoint::*;
        let active =
            framing == Framing::Sse && matches!(endpoint, ChatCompletions | Completions | Responses | Messages);
        Mender {
            active,
            endpoint,
            framing,
            place: Place::LineStart,
            held: BytesMut::new(),
            tail: [0, 0],
            events: 0,
            drops_empty_line: false,
            told: false,
        }
    }

    /// The next bytes of the stream in, those for the client out.
    pub fn pass(&mut self, chunk: Bytes) -> Bytes {
        let passed =
            if self.active && (self.place == Place::Held || self.drops_empty_line || self.is_suspicious(&chunk)) {
                let mut out = BytesMut::with_capacity(chunk.len() + 128);
                self.mend(&chunk, &mut out);
                out.freeze()
            } else {
                chunk
            };
        self.note(&passed);
        passed
    }

    /// The stream has ended: what is still held. A line without its end is a line.
    pub fn finish(&mut self) -> Bytes {
        if self.place != Place::Held {
            return Bytes::new();
        }
        let line = self.held.split();
        let mut out = BytesMut::new();
        self.end_line(&line, &mut out);
        self.place = Place::LineStart;
        let passed = out.freeze();
        self.note(&passed);
        passed
    }

    /// The backend's own error was put into the dialect's words.
    pub fn told_error(&self) -> bool {
        self.told
    }

    /// The bytes so far do not end a record.
    pub fn is_mid_record(&self) -> bool {
        match (self.framing, self.tail) {
            (_, [0, 0]) => false, // nothing passed yet
            (Framing::Sse, [b'\n', b'\n']) => false,
            (Framing::Sse, _) => true,
            (_, [_, b'\n']) => false,
            _ => true,
        }
    }

    pub fn is_events(&self) -> bool {
        self.framing == Framing::Sse
    }

    /// The number that the next event of `/v1/responses` has: Ollama numbers them from 0.
    pub fn next_event(&self) -> u64 {
        self.events
    }

    fn note(&mut self, passed: &[u8]) {
        match passed[..] {
            [.., last_but_one, last] => self.tail = [last_but_one, last],
            [last] => self.tail = [self.tail[1], last],
            [] => {}
        }
    }

    /// Whether there is a line in the chunk that must not pass as it is. If not, the chunk is followed to its end.
    fn is_suspicious(&mut self, chunk: &[u8]) -> bool {
        let (mut at, mut place, mut events) = (0, self.place, self.events);
        while at < chunk.len() {
            if place == Place::LineStart {
                if suspicion(&chunk[at..]) != Suspicion::None {
                    return true;
                }
                events += u64::from(chunk[at] == b'd');
            }
            match memchr(b'\n', &chunk[at..]) {
                Some(length) => at += length + 1,
                None => {
                    at = chunk.len();
                    place = Place::Line;
                    continue;
                }
            }
            place = Place::LineStart;
        }
        (self.place, self.events) = (place, events);
        false
    }

    fn mend(&mut self, mut chunk: &[u8], out: &mut BytesMut) {
        while !chunk.is_empty() {
            let end = memchr(b'\n', chunk).map_or(chunk.len(), |length| length + 1);
            let (part, rest) = chunk.split_at(end);
            let ends = part.ends_with(b"\n");
            match self.place {
                Place::Line => {
                    out.extend_from_slice(part);
                    self.place = if ends { Place::LineStart } else { Place::Line };
                }
                Place::LineStart | Place::Held => {
                    self.held.extend_from_slice(part);
                    let judged = suspicion(&self.held);
                    let line = match judged {
                        _ if ends => Some(Place::LineStart),
                        _ if self.drops_empty_line && self.held[..] == *b"\r" => None,
                        Suspicion::None => Some(Place::Line),
                        _ if self.held.len() > LONGEST_HELD_BYTES => Some(Place::Line),
                        _ => None,
                    };
                    match line {
                        None => self.place = Place::Held,
                        Some(place) => {
                            let line = self.held.split();
                            if ends {
                                self.end_line(&line, out);
                            } else {
                                self.drops_empty_line = false;
                                self.events += u64::from(line.first() == Some(&b'd'));
                                out.extend_from_slice(&line);
                            }
                            self.place = place;
                        }
                    }
                }
            }
            chunk = rest;
        }
    }

    /// A whole line, its end included if it has one.
    fn end_line(&mut self, line: &[u8], out: &mut BytesMut) {
        if std::mem::take(&mut self.drops_empty_line) && matches!(line, b"\n" | b"\r\n") {
            return;
        }
        self.events += u64::from(line.first() == Some(&b'd'));
        let message = if line.len() <= LONGEST_HELD_BYTES && suspicion(line) == Suspicion::Sure {
            self.message(line)
        } else {
            None
        };
        let Some(message) = message else {
            out.extend_from_slice(line);
            return;
        };
        let failure = Failure {
            message: &message,
            openai_type: "api_error",
            anthropic_type: "api_error",
            code: None,
            param: None,
        };
        // Whatever lines of the event came before are ended: a name without data says nothing.
        let mut before = self.tail;
        for &byte in &out[out.len().saturating_sub(2)..] {
            before = [before[1], byte];
        }
        if before != [0, 0] && before != *b"\n\n" {
            out.extend_from_slice(b"\n");
        }
        let is_data = line.first() == Some(&b'd');
        let sequence_number = self.events - u64::from(is_data);
        self.events = sequence_number + 1;
        let stream = Stream::of(self.endpoint.dialect(), Some(self.endpoint), true, sequence_number);
        out.extend_from_slice(&failure.frame(stream, false));
        self.told = true;
        self.drops_empty_line = true;
    }

    /// The error's text, if the line needs mending.
    fn message(&self, line: &[u8]) -> Option<String> {
        let data = line.strip_prefix(b"data:");
        let (message, is_object) = read_error(data.unwrap_or(line)).ok()??;
        let is_right = data.is_some() && is_object && self.endpoint.dialect() == super::Dialect::OpenAi;
        // OpenAI's clients understand the nested form on every route.
        (!is_right).then_some(message)
    }
}

/// `error` is a text, or an object with a text `message`.
fn read_error(json: &[u8]) -> Result<Option<(String, bool)>, Malformed> {
    let mut reader = Reader::new(json)?;
    let mut found = None;
    if reader.shape()? != Shape::Object {
        return Ok(None);
    }
    reader.object(|reader, key| {
        if key.decode() != "error" {
            return reader.skip();
        }
        match reader.shape()? {
            Shape::Text => found = Some((reader.string()?.decode().into_owned(), false)),
            Shape::Object => reader.object(|reader, key| {
                if key.decode() == "message" && reader.shape()? == Shape::Text {
                    found = Some((reader.string()?.decode().into_owned(), true));
                    return Ok(());
                }
                reader.skip()
            })?,
            _ => reader.skip()?,
        }
        Ok::<(), Malformed>(())
    })?;
    reader.end()?;
    Ok(found)
}

/// Whether a line begins with an object whose first key is `error`.
fn suspicion(line: &[u8]) -> Suspicion {
    let mut rest = line;
    if rest.first() == Some(&b'd') {
        match starts(&mut rest, b"data:") {
            Suspicion::Sure => {}
            other => return other,
        }
    }
    for word in [&b"{"[..], b"\"error\"", b":"] {
        while let Some((b' ' | b'\t', after)) = rest.split_first() {
            rest = after;
        }
        match starts(&mut rest, word) {
            Suspicion::Sure => {}
            other => return other,
        }
    }
    Suspicion::Sure
}

fn starts(rest: &mut &[u8], word: &[u8]) -> Suspicion {
    if let Some(after) = rest.strip_prefix(word) {
        *rest = after;
        Suspicion::Sure
    } else if word.starts_with(rest) {
        Suspicion::Open
    } else {
        Suspicion::None
    }
}

#[cfg(test)]
mod tests;
