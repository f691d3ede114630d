//! Replies in the framing that Go's server gives them.

use std::borrow::Cow;

use super::text;

/// Go announces the length of a body that fits its write buffer, and sends a larger one in chunks.
const MOST_ANNOUNCED_BYTES: usize = 2048;

pub(super) const JSON_UTF8: &str = "application/json; charset=utf-8";
pub(super) const JSON: &str = "application/json";
pub(super) const NDJSON: &str = "application/x-ndjson";
pub(super) const EVENTS: &str = "text/event-stream";
pub(super) const TEXT: &str = "text/plain";

/// A whole reply, not framed yet.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    pub status: u16,
    /// In the order in which Go writes them, that is by name; `Date` and the length are not among them.
    pub headers: Vec<(&'static str, Cow<'static, str>)>,
    pub body: Vec<u8>,
    pub framing: Framing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// By the size of the body.
    Auto,
    Chunked,
    /// A length that is off by this much.
    Wrong(i64),
    /// No body and no length.
    Bare,
}

/// What the request says about the form of the reply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    pub http_1_0: bool,
    /// A HEAD request: the head as for a GET, no body.
    pub head_only: bool,
    /// The connection ends with this reply although the version would keep it.
    pub says_close: bool,
}

impl Reply {
    pub fn new(status: u16, content_type: &'static str, body: impl Into<Vec<u8>>) -> Reply {
        Reply {
            status,
            headers: vec![("Content-Type", Cow::Borrowed(content_type))],
            body: body.into(),
            framing: Framing::Auto,
        }
    }

    /// No content type and no body.
    pub fn empty(status: u16) -> Reply {
        Reply { status, headers: Vec::new(), body: Vec::new(), framing: Framing::Auto }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Reply {
        let at = self.headers.partition_point(|(own, _)| *own <= name);
        self.headers.insert(at, (name, value.into()));
        self
    }

    pub fn chunked(mut self) -> Reply {
        self.framing = Framing::Chunked;
        self
    }

    /// Appends the framed reply. Returns where the body begins in `out`, and whether the connection must end behind it.
    pub fn write(&self, out: &mut Vec<u8>, form: Form, date: &str) -> (usize, bool) {
        let mut head = Opening::new(out, self.status, form, date);
        for (name, value) in &self.headers {
            head.header(name, value);
        }
        let chunked = match self.framing {
            Framing::Auto => self.body.len() > MOST_ANNOUNCED_BYTES,
            Framing::Chunked => true,
            Framing::Wrong(_) | Framing::Bare => false,
        };
        let bare = self.framing == Framing::Bare;
        // Go announces nothing for a HEAD whose body it would have sent in chunks.
        let unannounced = bare || (chunked && form.head_only);
        let length = match self.framing {
            Framing::Wrong(difference) => (self.body.len() as i64).saturating_add(difference).max(0) as u64,
            _ => self.body.len() as u64,
        };
        let until_close = chunked && form.http_1_0;
        head.date();
        if !unannounced && !until_close {
            head.length((!chunked).then_some(length));
        }
        head.end();
        let body_at = out.len();
        if !form.head_only && !bare {
            if chunked && !form.http_1_0 {
                chunk(out, &self.body);
                out.extend_from_slice(b"0\r\n\r\n");
            } else {
                out.extend_from_slice(&self.body);
            }
        }
        (body_at, until_close || form.says_close)
    }
}

/// A response head that is being written.
pub(super) struct Opening<'a> {
    out: &'a mut Vec<u8>,
    form: Form,
    date: &'a str,
    dated: bool,
}

impl<'a> Opening<'a> {
    pub fn new(out: &'a mut Vec<u8>, status: u16, form: Form, date: &'a str) -> Opening<'a> {
        out.extend_from_slice(if form.http_1_0 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
        text::number(out, u64::from(status));
        out.push(b' ');
        out.extend_from_slice(reason(status).as_bytes());
        out.extend_from_slice(b"\r\n");
        let mut opening = Opening { out, form, date, dated: false };
        if form.says_close {
            opening.header("Connection", "close");
        }
        opening
    }

    /// The headers must come in the order of their names; `Date` slips in where it belongs.
    pub fn header(&mut self, name: &str, value: &str) {
        if name > "Date" {
            self.date();
        }
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b": ");
        self.out.extend_from_slice(value.as_bytes());
        self.out.extend_from_slice(b"\r\n");
    }

    pub fn date(&mut self) {
        if !self.dated {
            self.dated = true;
            self.out.extend_from_slice(b"Date: ");
            self.out.extend_from_slice(self.date.as_bytes());
            self.out.extend_from_slice(b"\r\n");
        }
    }

    /// `Content-Length`, or chunked where no length is known. To HTTP/1.0 the end of the connection says it.
    pub fn length(&mut self, length: Option<u64>) {
        match length {
            Some(length) => {
                self.out.extend_from_slice(b"Content-Length: ");
                text::number(self.out, length);
                self.out.extend_from_slice(b"\r\n");
            }
            None if self.form.http_1_0 => {}
            None => self.out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        }
    }

    pub fn end(self) {
        self.out.extend_from_slice(b"\r\n");
    }
}

/// Collects the records of a stream for the next send, each one an HTTP chunk of its own, as Ollama flushes them.
pub(super) struct Records {
    /// What is to be sent next; the sender clears it.
    pub out: Vec<u8>,
    record: Vec<u8>,
    plain: bool,
}

impl Records {
    pub fn new(http_1_0: bool) -> Records {
        Records { out: Vec::with_capacity(1024), record: Vec::with_capacity(512), plain: http_1_0 }
    }

    /// One record.
    pub fn add(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        self.record.clear();
        write(&mut self.record);
        if self.plain {
            self.out.extend_from_slice(&self.record);
        } else {
            chunk(&mut self.out, &self.record);
        }
    }

    /// The end of the body.
    pub fn finish(&mut self) {
        if !self.plain {
            self.out.extend_from_slice(b"0\r\n\r\n");
        }
    }
}

fn chunk(out: &mut Vec<u8>, data: &[u8]) {
    if data.is_empty() {
        // A chunk of no bytes would be the end.
        return;
    }
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut size = [0u8; 16];
    let mut at = size.len();
    let mut left = data.len();
    while left > 0 {
        at -= 1;
        size[at] = DIGITS[left & 15];
        left >>= 4;
    }
    out.extend_from_slice(&size[at..]);
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

pub(super) fn reason(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        103 => "Early Hints",
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        307 => "Temporary Redirect",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Request Entity Too Large",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: Form = Form { http_1_0: false, head_only: false, says_close: false };

    fn written(reply: &Reply, form: Form) -> String {
        let mut out = Vec::new();
        reply.write(&mut out, form, "D");
        String::from_utf8(out).expect("ASCII")
    }

    #[test]
    fn a_body_up_to_2048_bytes_has_a_length_and_a_larger_one_has_chunks() {
        let head = |size| written(&Reply::new(200, TEXT, vec![b'x'; size]), FORM);
        assert!(
            head(2048)
                .starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nDate: D\r\nContent-Length: 2048\r\n\r\nx")
        );
        assert!(head(2049).contains("Transfer-Encoding: chunked\r\n\r\n801\r\nx"));
    }

    #[test]
    fn head_requests_get_the_head_alone() {
        let reply = Reply::new(200, TEXT, vec![b'x'; 3000]);
        let text = written(&reply, Form { head_only: true, ..FORM });
        assert_eq!(text, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nDate: D\r\n\r\n");
    }

    #[test]
    fn to_http_1_0_the_end_of_the_connection_is_the_end_of_the_body() {
        let mut out = Vec::new();
        let form = Form { http_1_0: true, ..FORM };
        let (_, closes) = Reply::new(200, TEXT, vec![b'x'; 3000]).write(&mut out, form, "D");
        assert!(closes);
        assert!(out.starts_with(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nDate: D\r\n\r\nxxx"));
    }
}
