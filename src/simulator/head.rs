//! A request's head and body as they come from the socket.

use bytes::{Buf, BytesMut};

/// Go's own limit for a head.
const MOST_HEAD_BYTES: usize = 1024 * 1024;
const MOST_HEADERS: usize = 128;

/// The head of a request, with what the simulator decides by.
pub(super) struct Head {
    pub raw: Vec<u8>,
    pub method: String,
    pub target: String,
    pub http_1_0: bool,
    pub headers: Vec<(String, String)>,
    pub body: BodyFraming,
    pub keep_alive: bool,
    pub expects_continue: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyFraming {
    None,
    Length(u64),
    Chunked,
}

/// Why a head is no head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadHead {
    Malformed,
    TooLarge,
    MissingHost,
    /// The preface of HTTP/2, which Ollama does not speak.
    Http2,
}

impl Head {
    /// Takes a head out of the buffer, if it is whole. `keep_all` also keeps the raw bytes and every header; without it
    /// only what is needed is copied.
    pub fn take(buffer: &mut BytesMut, keep_all: bool) -> Result<Option<Head>, BadHead> {
        let mut storage = [httparse::EMPTY_HEADER; MOST_HEADERS];
        let mut request = httparse::Request::new(&mut storage);
        let length = match request.parse(buffer) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) if buffer.len() > MOST_HEAD_BYTES => return Err(BadHead::TooLarge),
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(BadHead::TooLarge),
            Err(_) => return Err(BadHead::Malformed),
        };
        let http_1_0 = request.version == Some(0);
        let mut head = Head {
            raw: if keep_all { buffer[..length].to_vec() } else { Vec::new() },
            method: request.method.unwrap_or_default().to_owned(),
            target: request.path.unwrap_or_default().to_owned(),
            http_1_0,
            headers: Vec::new(),
            body: BodyFraming::None,
            keep_alive: !http_1_0,
            expects_continue: false,
        };
        let mut hosts = 0;
        for header in request.headers.iter() {
            let value = String::from_utf8_lossy(header.value);
            let value = value.trim();
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            let mut needed = keep_all;
            if is("content-length") {
                let length: u64 = value.parse().map_err(|_| BadHead::Malformed)?;
                match head.body {
                    BodyFraming::Length(other) if other != length => return Err(BadHead::Malformed),
                    // Go lets chunked win over a length.
                    BodyFraming::Chunked => {}
                    _ => head.body = BodyFraming::Length(length),
                }
            } else if is("transfer-encoding") {
                if !value.eq_ignore_ascii_case("chunked") {
                    return Err(BadHead::Malformed);
                }
                head.body = BodyFraming::Chunked;
            } else if is("connection") {
                if value.eq_ignore_ascii_case("close") {
                    head.keep_alive = false;
                } else if http_1_0 && value.eq_ignore_ascii_case("keep-alive") {
                    head.keep_alive = true;
                }
            } else if is("expect") {
                head.expects_continue = value.eq_ignore_ascii_case("100-continue");
            } else if is("host") {
                hosts += 1;
                needed = true;
            } else if is("origin") || is("content-encoding") {
                needed = true;
            }
            if needed {
                head.headers.push((header.name.to_owned(), value.to_owned()));
            }
        }
        if hosts > 1 {
            return Err(BadHead::Malformed);
        }
        if hosts == 0 && !http_1_0 {
            return Err(BadHead::MissingHost);
        }
        buffer.advance(length);
        Ok(Some(head))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// Takes a body out of the buffer, piece by piece, framing removed.
pub(super) enum BodyReader {
    Length(u64),
    Size,
    Data(u64),
    DataEnd,
    Trailers,
    Done,
}

/// A chunk's framing is not HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadChunk;

/// The longest line of framing: a size with its extensions, or a trailer.
const MOST_LINE_BYTES: usize = 4096;

impl BodyReader {
    pub fn new(framing: BodyFraming) -> BodyReader {
        match framing {
            BodyFraming::None | BodyFraming::Length(0) => BodyReader::Done,
            BodyFraming::Length(length) => BodyReader::Length(length),
            BodyFraming::Chunked => BodyReader::Size,
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self, BodyReader::Done)
    }

    /// Consumes what it can of the buffer.
    pub fn read(&mut self, buffer: &mut BytesMut, mut sink: impl FnMut(&[u8])) -> Result<(), BadChunk> {
        loop {
            match self {
                BodyReader::Done => return Ok(()),
                BodyReader::Length(left) | BodyReader::Data(left) => {
                    let take = buffer.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    if take == 0 {
                        return Ok(());
                    }
                    sink(&buffer[..take]);
                    buffer.advance(take);
                    *left -= take as u64;
                    if *left == 0 {
                        *self =
                            if matches!(self, BodyReader::Length(_)) { BodyReader::Done } else { BodyReader::DataEnd };
                    }
                }
                BodyReader::DataEnd => {
                    if buffer.len() < 2 {
                        return Ok(());
                    }
                    if &buffer[..2] != b"\r\n" {
                        return Err(BadChunk);
                    }
                    buffer.advance(2);
                    *self = BodyReader::Size;
                }
                BodyReader::Size => {
                    let Some(line) = line(buffer)? else { return Ok(()) };
                    let digits = line[..].split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
                    let size = std::str::from_utf8(digits).ok().and_then(|digits| u64::from_str_radix(digits, 16).ok());
                    match size {
                        // `from_str_radix` takes a plus sign; chunk sizes have none.
                        Some(_) if digits.first() == Some(&b'+') => return Err(BadChunk),
                        Some(0) => *self = BodyReader::Trailers,
                        Some(size) => *self = BodyReader::Data(size),
                        None => return Err(BadChunk),
                    }
                }
                BodyReader::Trailers => {
                    let Some(line) = line(buffer)? else { return Ok(()) };
                    if line.is_empty() {
                        *self = BodyReader::Done;
                    }
                }
            }
        }
    }
}

fn line(buffer: &mut BytesMut) -> Result<Option<BytesMut>, BadChunk> {
    match buffer.iter().take(MOST_LINE_BYTES).position(|byte| *byte == b'\n') {
        Some(end) => {
            let mut line = buffer.split_to(end + 1);
            if !line.ends_with(b"\r\n") {
                return Err(BadChunk);
            }
            line.truncate(end - 1);
            Ok(Some(line))
        }
        None if buffer.len() >= MOST_LINE_BYTES => Err(BadChunk),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunked_body_is_read_at_any_split() {
        let wire = b"3\r\nabc\r\n0a;x=y\r\n0123456789\r\n0\r\nT: 1\r\n\r\nrest";
        for split in 0..wire.len() {
            let mut buffer = BytesMut::new();
            let mut reader = BodyReader::new(BodyFraming::Chunked);
            let mut body = Vec::new();
            for half in [&wire[..split], &wire[split..]] {
                buffer.extend_from_slice(half);
                reader.read(&mut buffer, |bytes| body.extend_from_slice(bytes)).expect("good framing");
            }
            assert!(reader.is_done());
            assert_eq!(body, b"abc0123456789");
            assert_eq!(&buffer[..], b"rest");
        }
    }

    #[test]
    fn broken_chunks_are_told_apart_from_short_ones() {
        for wire in ["x\r\n", "+3\r\nabc\r\n", "3\r\nabcd\r\n", "3\nabc"] {
            let mut buffer = BytesMut::from(wire);
            assert_eq!(BodyReader::new(BodyFraming::Chunked).read(&mut buffer, |_| {}), Err(BadChunk), "{wire:?}");
        }
    }

    #[test]
    fn heads_that_go_refuses_are_refused() {
        let take = |text: &str| Head::take(&mut BytesMut::from(text), true).map(|head| head.is_some());
        assert_eq!(take("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), Ok(true));
        assert_eq!(take("GET / HTTP/1.1\r\nHost: a\r\n"), Ok(false));
        assert_eq!(take("GET / HTTP/1.1\r\n\r\n"), Err(BadHead::MissingHost));
        assert_eq!(take("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), Err(BadHead::Malformed));
        assert_eq!(
            take("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
            Err(BadHead::Malformed)
        );
        assert_eq!(take("GET / HTTP/1.0\r\n\r\n"), Ok(true));
    }
}
