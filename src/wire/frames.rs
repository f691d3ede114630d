//! NDJSON lines and SSE events, found in a stream at any split of its bytes.
//!
//! Nothing is held back: a record may be 20 MB, so its bytes are handed on as they come, and its end is said when it comes.
use memchr::memchr;

/// How a reply is cut into records. Taken from the reply's content type, not from the request: Ollama answers a streamed
/// request with one JSON object when it only loads a model (ollama-wire 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// The body is one record.
    Json,
    /// A record a line.
    Ndjson,
    /// A record is what the `data` lines of an event say.
    Sse,
}

impl Framing {
    /// From the value of a `Content-Type` header; parameters and case do not count, and what is unknown is one record.
    pub fn of_content_type(value: &str) -> Framing {
        let kind = value.split(';').next().unwrap_or("").trim();
        if kind.eq_ignore_ascii_case("application/x-ndjson") {
            Framing::Ndjson
        } else if kind.eq_ignore_ascii_case("text/event-stream") {
            Framing::Sse
        } else {
            Framing::Json
        }
    }
}

/// A part of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Further bytes of the present record.
    Data(&'a [u8]),
    /// The present record has ended. Said for empty records too (a blank line).
    End,
    /// A record that lies in the stream's chunk from its first byte to its last: the usual case, and so the fast one.
    Whole(&'a [u8]),
}

/// Cuts a stream into records.
#[derive(Clone, Debug)]
pub struct Frames {
    framing: Framing,
    line: Line,
    /// The present record has bytes.
    open: bool,
}

/// Where in a line of an event stream we are.
#[derive(Clone, Copy, Debug)]
enum Line {
    /// So many bytes of `data:` were read.
    Field(u8),
    /// After `data:`, where one space does not count.
    Colon,
    Data,
    /// A line that says nothing to us: `event:`, `id:`, a comment.
    Other,
}

const FIELD: &[u8] = b"data:";

impl Frames {
    pub fn new(framing: Framing) -> Self {
        Frames { framing, line: Line::Field(0), open: false }
    }

    /// Takes the next bytes of the stream. It does not allocate and cannot fail.
    #[inline]
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(Piece<'_>)) {
        match self.framing {
            Framing::Json => {
                self.open = true;
                each(Piece::Data(bytes));
            }
            Framing::Ndjson => self.feed_lines(bytes, each),
            Framing::Sse => self.feed_events(bytes, each),
        }
    }

    /// The stream has ended: a record that is still open ends with it.
    pub fn finish(&mut self, mut each: impl FnMut(Piece<'_>)) {
        if std::mem::take(&mut self.open) {
            each(Piece::End);
        }
    }

    fn feed_lines(&mut self, mut bytes: &[u8], mut each: impl FnMut(Piece<'_>)) {
        while let Some(end) = memchr(b'\n', bytes) {
            if std::mem::take(&mut self.open) {
                each(Piece::Data(&bytes[..end]));
                each(Piece::End);
            } else {
                each(Piece::Whole(&bytes[..end]));
            }
            bytes = &bytes[end + 1..];
        }
        if !bytes.is_empty() {
            self.open = true;
            each(Piece::Data(bytes));
        }
    }

    /// Line ends are LF and CR LF. A lone CR, which the standard allows too, is taken for a part of the line: no server that we
    /// know sends it.
    fn feed_events(&mut self, mut bytes: &[u8], mut each: impl FnMut(Piece<'_>)) {
        while let Some(&byte) = bytes.first() {
            match self.line {
                // What Ollama writes: one data line, then an empty line.
                Line::Field(0) if !self.open && bytes.starts_with(b"data: ") => {
                    bytes = &bytes[b"data: ".len()..];
                    self.line = Line::Data;
                    match memchr(b'\n', bytes) {
                        Some(end) if bytes.get(end + 1) == Some(&b'\n') => {
                            each(Piece::Whole(&bytes[..end]));
                            bytes = &bytes[end + 2..];
                            self.line = Line::Field(0);
                        }
                        _ => self.open = true,
                    }
                }
                Line::Field(matched) => {
                    bytes = &bytes[1..];
                    self.line = match byte {
                        b'\n' => {
                            if matched == 0 {
                                self.open = false;
                                each(Piece::End);
                            }
                            Line::Field(0)
                        }
                        b'\r' if matched == 0 => Line::Field(0),
                        byte if byte == FIELD[usize::from(matched)] => {
                            if usize::from(matched) + 1 == FIELD.len() {
                                Line::Colon
                            } else {
                                Line::Field(matched + 1)
                            }
                        }
                        _ => Line::Other,
                    };
                }
                Line::Colon => {
                    if self.open {
                        // The data lines of one event are joined by line feeds.
                        each(Piece::Data(b"\n"));
                    }
                    self.open = true;
                    if byte == b' ' {
                        bytes = &bytes[1..];
                    }
                    self.line = Line::Data;
                }
                Line::Data => match memchr(b'\n', bytes) {
                    Some(end) => {
                        each(Piece::Data(&bytes[..end]));
                        bytes = &bytes[end + 1..];
                        self.line = Line::Field(0);
                    }
                    None => {
                        each(Piece::Data(bytes));
                        return;
                    }
                },
                Line::Other => match memchr(b'\n', bytes) {
                    Some(end) => {
                        bytes = &bytes[end + 1..];
                        self.line = Line::Field(0);
                    }
                    None => return,
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The records of a stream that comes in two parts, cut at `at`.
    fn records(framing: Framing, stream: &[u8], at: usize) -> Vec<String> {
        let mut frames = Frames::new(framing);
        let mut records = vec![];
        let mut record = vec![];
        let mut each = |piece: Piece<'_>| match piece {
            Piece::Data(bytes) => record.extend_from_slice(bytes),
            Piece::End => records.push(String::from_utf8(std::mem::take(&mut record)).unwrap()),
            Piece::Whole(bytes) => {
                assert!(record.is_empty(), "a whole record begins inside another");
                records.push(String::from_utf8(bytes.to_vec()).unwrap());
            }
        };
        frames.feed(&stream[..at], &mut each);
        frames.feed(&stream[at..], &mut each);
        frames.finish(&mut each);
        records
    }

    #[test]
    fn lines_are_found_at_any_split() {
        let stream = b"{\"a\":1}\n\n{\"b\":2}\r\n{\"c\"";
        for at in 0..=stream.len() {
            assert_eq!(records(Framing::Ndjson, stream, at), ["{\"a\":1}", "", "{\"b\":2}\r", "{\"c\""], "{at}");
        }
    }

    #[test]
    fn events_are_found_at_any_split() {
        let stream = b": hello\n\nevent: x\ndata: {\"a\":1}\n\ndata:{\"b\":\ndata:  2}\nid: 7\n\ndat: no\ndatabase: no\n\r\ndata: [DONE]\r\n\r\ndata: x";
        for at in 0..=stream.len() {
            let found = records(Framing::Sse, stream, at);
            assert_eq!(found, ["", "{\"a\":1}", "{\"b\":\n 2}", "", "[DONE]\r", "x"], "{at}");
        }
    }

    #[test]
    fn the_content_type_says_how_a_reply_is_framed() {
        assert_eq!(Framing::of_content_type("application/x-ndjson"), Framing::Ndjson);
        assert_eq!(Framing::of_content_type("Text/Event-Stream; charset=utf-8"), Framing::Sse);
        assert_eq!(Framing::of_content_type("application/json; charset=utf-8"), Framing::Json);
        assert_eq!(Framing::of_content_type(""), Framing::Json);
    }
}
