//! A client that shows a reply exactly as it came: head, chunks, and how it ended.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// No test waits longer than this for anything.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A reply as it came.
#[derive(Default)]
pub struct Answer {
    /// Status line and headers, without the empty line. Empty if none came whole.
    pub head: String,
    /// The body, framing removed.
    pub body: Vec<u8>,
    /// The size of each HTTP chunk.
    pub chunks: Vec<usize>,
    /// Whether the framing came to its end.
    pub whole: bool,
}

impl Answer {
    pub fn status(&self) -> u16 {
        self.head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (own, value) = line.split_once(':')?;
        own.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

/// A POST of JSON.
pub fn post(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// One connection.
pub struct Client {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub async fn connect(address: std::net::SocketAddr) -> Client {
        let stream = TcpStream::connect(address).await.expect("the simulator listens");
        stream.set_nodelay(true).expect("a TCP socket");
        Client { stream, buffer: Vec::new() }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // The simulator may have closed already; the reply, or its absence, tells.
        let _ = self.stream.write_all(bytes).await;
    }

    /// Sends a request and reads one reply.
    pub async fn ask(&mut self, request: &[u8]) -> Answer {
        self.send(request).await;
        self.answer(request.starts_with(b"HEAD ")).await
    }

    /// Reads one reply.
    pub async fn answer(&mut self, head_only: bool) -> Answer {
        tokio::time::timeout(LIMIT, self.read(head_only)).await.expect("the simulator answers or closes")
    }

    /// True as long as there is more to come.
    async fn fill(&mut self) -> bool {
        matches!(self.stream.read_buf(&mut self.buffer).await, Ok(read) if read > 0)
    }

    async fn read(&mut self, head_only: bool) -> Answer {
        let mut answer = Answer::default();
        let end = loop {
            if let Some(end) = self.buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break end;
            }
            if !self.fill().await {
                answer.body = std::mem::take(&mut self.buffer);
                return answer;
            }
        };
        answer.head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end + 4);
        let bodiless = head_only || matches!(answer.status(), 100..=199 | 204);
        if bodiless {
            answer.whole = true;
        } else if answer.header("transfer-encoding").is_some() {
            self.read_chunks(&mut answer).await;
        } else if let Some(length) = answer.header("content-length") {
            let length: usize = length.parse().expect("a length is a number");
            while self.buffer.len() < length && self.fill().await {}
            answer.whole = self.buffer.len() >= length;
            answer.body = self.buffer.drain(..length.min(self.buffer.len())).collect();
        } else {
            while self.fill().await {}
            answer.body = std::mem::take(&mut self.buffer);
            answer.whole = true;
        }
        answer
    }

    async fn read_chunks(&mut self, answer: &mut Answer) {
        loop {
            let line = loop {
                if let Some(end) = self.buffer.windows(2).position(|bytes| bytes == b"\r\n") {
                    break end;
                }
                if !self.fill().await {
                    return;
                }
            };
            let size =
                std::str::from_utf8(&self.buffer[..line]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
            let size = size.expect("a chunk begins with its size");
            while self.buffer.len() < line + 2 + size + 2 {
                if !self.fill().await {
                    answer.body.extend_from_slice(&self.buffer[(line + 2).min(self.buffer.len())..]);
                    return;
                }
            }
            answer.body.extend_from_slice(&self.buffer[line + 2..line + 2 + size]);
            self.buffer.drain(..line + 2 + size + 2);
            if size == 0 {
                answer.whole = true;
                return;
            }
            answer.chunks.push(size);
        }
    }

    /// Reads until the connection ends; true if it ended with an end and not with a reset.
    pub async fn end(&mut self) -> bool {
        let read = async {
            loop {
                match self.stream.read_buf(&mut self.buffer).await {
                    Ok(0) => return true,
                    Ok(_) => {}
                    Err(_) => return false,
                }
            }
        };
        tokio::time::timeout(LIMIT, read).await.expect("the simulator closes")
    }
}
