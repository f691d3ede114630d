//! One request head: read under one deadline, its raw bytes judged before any parser sees them.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use pingora::protocols::Stream;
// Lazy and cheap: no timer and no wake-up of the driver unless it waits (traps, Pingora 14).
use pingora::time::timeout;
use tokio::io::AsyncReadExt;

use super::DoorSettings;

/// Why there is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadFault {
    /// The client closed, or an idle connection's time is up: nothing to answer.
    Gone,
    TooSlow,
    TooLarge,
    /// What is wrong, as a word of a closed set (a metric label).
    Malformed(&'static str),
}

impl HeadFault {
    /// The label under which requests that never parsed are counted.
    pub fn reason(self) -> &'static str {
        match self {
            HeadFault::Gone => "gone",
            HeadFault::TooSlow => "slow_head",
            HeadFault::TooLarge => "head_too_large",
            HeadFault::Malformed(what) => what,
        }
    }
}

/// Reads into `buffer` until it starts with a whole head, and returns its length, blank line included. More bytes (a body, a
/// pipelined request) may follow it in the buffer.
///
/// `idle` bounds the wait for the first byte. The whole head then has one deadline, because Pingora bounds only each single
/// read (60 s), so that a client sending a byte a minute would be served for ever (traps, Pingora 3).
pub async fn read_head(
    stream: &mut Stream,
    buffer: &mut BytesMut,
    idle: Duration,
    settings: &DoorSettings,
) -> Result<usize, HeadFault> {
    // One for all empty lines that a client may send instead of a request.
    let idle_until = Instant::now() + idle;
    let mut deadline: Option<Instant> = None;
    let mut searched = 0;
    loop {
        while buffer.starts_with(b"\r\n") {
            // Empty lines before a request line are to be ignored (RFC 9112, section 2.2).
            let _ = buffer.split_to(2);
        }
        if let Some(at) = memchr::memmem::find(&buffer[searched..], b"\r\n\r\n") {
            let length = searched + at + 4;
            return if length <= settings.head_bytes { Ok(length) } else { Err(HeadFault::TooLarge) };
        }
        if buffer.len() > settings.head_bytes {
            return Err(HeadFault::TooLarge);
        }
        // At once: the end that some other parser sees behind it may never come.
        let unseen = searched..buffer.len();
        if memchr::memchr_iter(b'\n', &buffer[unseen])
            .any(|at| searched + at == 0 || buffer[searched + at - 1] != b'\r')
        {
            return Err(HeadFault::Malformed("bare_lf"));
        }
        searched = buffer.len().saturating_sub(3);
        let waiting = buffer.is_empty() || buffer[..] == *b"\r"; // half of an empty line is no request yet
        let until = if waiting { idle_until } else { *deadline.get_or_insert_with(|| Instant::now() + settings.head) };
        let wait = until.saturating_duration_since(Instant::now());
        buffer.reserve(4096);
        match timeout(wait, stream.read_buf(buffer)).await {
            Ok(Ok(n)) if n > 0 => {}
            Ok(_) => return Err(HeadFault::Gone),
            Err(_) if waiting => return Err(HeadFault::Gone),
            Err(_) => return Err(HeadFault::TooSlow),
        }
    }
}

/// Whether the client begins with HTTP/2's preface. Byte by byte as long as it may be one: Pingora's own peek waits for 24
/// bytes for ever, so that a short HTTP/1.0 request hangs (traps, Pingora 3).
pub async fn is_h2_preface(stream: &mut Stream) -> std::io::Result<bool> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut seen = [0u8; 24];
    for length in [1, 2, 3, 24] {
        if !stream.try_peek(&mut seen[..length]).await? || seen[..length] != PREFACE[..length] {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Judges the raw head: whatever two parsers could read differently is refused. Only stricter than Pingora's parser, which
/// checks the rest again: it drops a Content-Length beside Transfer-Encoding and goes on, passes bare LF, and percent-escapes
/// illegal request lines in silence (traps, Pingora 10).
///
/// Says whether a chunked body follows.
pub fn judge(raw: &[u8]) -> Result<bool, &'static str> {
    let (mut lengths, mut encodings, mut hosts) = (0, 0, 0);
    let mut is_1_1 = false;
    let mut start = 0;
    for (number, end) in memchr::memchr_iter(b'\n', raw).enumerate() {
        let line = &raw[start..end];
        start = end + 1;
        let Some(line) = line.strip_suffix(b"\r") else {
            return Err("bare_lf");
        };
        if !line.iter().all(|byte| PLAIN[usize::from(*byte)]) {
            return Err(match line.iter().any(|byte| matches!(byte, b'\r' | 0)) {
                true => "cr_or_nul_in_head",
                false if number == 0 => "target",
                false => "control_in_header",
            });
        }
        if number == 0 {
            is_1_1 = request_line(line)?;
            continue;
        }
        if line.is_empty() {
            continue;
        }
        if matches!(line[0], b' ' | b'\t') {
            return Err("folded_header");
        }
        let Some(colon) = memchr::memchr(b':', line) else {
            return Err("header_without_colon");
        };
        let name = &line[..colon];
        if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
            return Err("header_name");
        }
        let value = line[colon + 1..].trim_ascii();
        if name.eq_ignore_ascii_case(b"content-length") {
            lengths += 1;
            if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
                return Err("content_length");
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            encodings += 1;
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err("transfer_encoding");
            }
        } else if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
            if !value.iter().all(|byte| is_host(*byte)) {
                return Err("host");
            }
        }
    }
    if lengths + encodings > 1 {
        return Err("ambiguous_length");
    }
    if encodings > 0 && !is_1_1 {
        return Err("chunked_in_1_0");
    }
    if hosts > 1 || (hosts == 0 && is_1_1) {
        return Err("host");
    }
    Ok(encodings > 0)
}

/// What a line may hold: anything but control characters, the tab aside. A table, because every byte of every head is looked at.
static PLAIN: [bool; 256] = {
    let mut plain = [true; 256];
    let mut byte = 0;
    while byte < 0x20 {
        plain[byte] = byte == b'\t' as usize;
        byte += 1;
    }
    plain[0x7f] = false;
    plain
};

/// `METHOD SP target SP HTTP/1.x`, single spaces, visible ASCII only. Whether it is HTTP/1.1.
fn request_line(line: &[u8]) -> Result<bool, &'static str> {
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err("request_line");
    };
    if method.is_empty() || !method.iter().all(|byte| is_token(*byte)) {
        return Err("method");
    }
    if !has_known_form(target, method) || !target.iter().all(|byte| is_target(*byte)) {
        return Err("target");
    }
    match version {
        b"HTTP/1.1" => Ok(true),
        b"HTTP/1.0" => Ok(false),
        _ => Err("version"),
    }
}

/// Origin form, absolute form (whose authority Pingora compares with `Host`), or what only these two methods may say (RFC 9112,
/// section 3.2). Anything else would be completed by one parser and taken for a host by another.
fn has_known_form(target: &[u8], method: &[u8]) -> bool {
    let is_absolute = |scheme: &[u8]| target.get(..scheme.len()).is_some_and(|own| own.eq_ignore_ascii_case(scheme));
    match method {
        b"CONNECT" => !target.is_empty(), // refused behind this
        b"OPTIONS" if target == b"*" => true,
        _ => target.starts_with(b"/") || is_absolute(b"http://") || is_absolute(b"https://"),
    }
}

/// What a host and port may hold (RFC 3986, section 3.2.2), but for the comma, which some read as a list.
fn is_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+;=%:[]".contains(&byte)
}

/// What a request target may hold (RFC 3986), and `[` `]`, which clients send unescaped. Pingora percent-escapes anything else and
/// parses again, so that what is decided and what came would differ (traps, Pingora 10).
fn is_target(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/?%[]".contains(&byte)
}

/// `tchar` of RFC 9110, section 5.6.2.
pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::judge;

    #[test]
    fn an_ordinary_head_passes() {
        for head in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.0\r\n\r\n",
            "POST /api/chat HTTP/1.1\r\nhost: a\r\nContent-Length: 12\r\nx:\r\n\r\n",
            "POST /api/chat HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: Chunked\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX-Name: caf\u{e9}\r\n\r\n",
        ] {
            assert_eq!(judge(head.as_bytes()), Ok(head.contains("Chunked")), "{head:?}");
        }
    }

    #[test]
    fn whatever_two_parsers_could_read_differently_is_refused() {
        for (head, reason) in [
            ("GET / HTTP/1.1\r\n\r\n", "host"),
            ("GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n", "host"),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
                "ambiguous_length",
            ),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", "ambiguous_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", "content_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n", "content_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n", "content_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "transfer_encoding"),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", "transfer_encoding"),
            ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", "chunked_in_1_0"),
            ("GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", "folded_header"),
            ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 1\r\n\r\n", "header_name"),
            ("GET / HTTP/1.1\r\nHost: a\r\nnocolon\r\n\r\n", "header_without_colon"),
            ("GET / HTTP/1.1\r\nHost: a\r\n: empty\r\n\r\n", "header_name"),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", "bare_lf"),
            ("GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", "cr_or_nul_in_head"),
            ("GET / HTTP/1.1\r\nHost: a\0\r\n\r\n", "cr_or_nul_in_head"),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: \x1b[31m\r\n\r\n", "control_in_header"),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "request_line"),
            ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", "request_line"),
            ("GET /\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n", "target"),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", "version"),
            ("GET a HTTP/1.1\r\nHost: a\r\n\r\n", "target"),
            ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", "target"),
            ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", "target"),
            ("GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", "host"),
            ("GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", "host"),
            ("GE(T / HTTP/1.1\r\nHost: a\r\n\r\n", "method"),
        ] {
            assert_eq!(judge(head.as_bytes()), Err(reason), "{head:?}");
        }
    }
}
