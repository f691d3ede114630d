//! An HTTP client that hides nothing: what is sent is written by hand, what comes back is kept byte for byte.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::house::PATIENCE;

/// A request by parts; [`Connection::write`] sends any bytes at all.
#[derive(Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Option<Vec<u8>>,
    /// In chunks of this many bytes instead of with a Content-Length.
    pub chunked: Option<usize>,
}

impl Request {
    pub fn new(method: &str, path: &str) -> Request {
        Request { method: method.into(), path: path.into(), headers: Vec::new(), body: None, chunked: None }
    }

    pub fn get(path: &str) -> Request {
        Request::new("GET", path)
    }

    pub fn post(path: &str, body: Value) -> Request {
        Request::new("POST", path).header("content-type", "application/json").body(body.to_string())
    }

    pub fn header(mut self, name: &str, value: &str) -> Request {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn bearer(self, token: &str) -> Request {
        self.header("authorization", &format!("Bearer {token}"))
    }

    /// The request id under which its records are found.
    pub fn id(self, id: &str) -> Request {
        self.header("x-request-id", id)
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Request {
        self.body = Some(body.into());
        self
    }

    pub fn chunked(mut self, chunk_bytes: usize) -> Request {
        self.chunked = Some(chunk_bytes);
        self
    }

    pub fn head_bytes(&self) -> Vec<u8> {
        let mut text = format!("{} {} HTTP/1.1\r\nhost: localhost\r\n", self.method, self.path);
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        match (&self.body, self.chunked) {
            (Some(_), Some(_)) => text.push_str("transfer-encoding: chunked\r\n"),
            (Some(body), None) => text.push_str(&format!("content-length: {}\r\n", body.len())),
            (None, _) => {}
        }
        text.push_str("\r\n");
        text.into_bytes()
    }

    pub fn body_bytes(&self) -> Vec<u8> {
        match (&self.body, self.chunked) {
            (Some(body), Some(chunk_bytes)) => {
                let mut framed = Vec::with_capacity(body.len() + body.len() / chunk_bytes * 16 + 16);
                for chunk in body.chunks(chunk_bytes) {
                    framed.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    framed.extend_from_slice(chunk);
                    framed.extend_from_slice(b"\r\n");
                }
                framed.extend_from_slice(b"0\r\n\r\n");
                framed
            }
            (Some(body), None) => body.clone(),
            (None, _) => Vec::new(),
        }
    }

    /// Over a connection of its own.
    pub async fn send(&self, address: SocketAddr) -> Reply {
        self.send_over(Connection::open(address).await).await
    }

    /// The same from another address of this machine's.
    pub async fn send_from(&self, source: IpAddr, address: SocketAddr) -> Reply {
        self.send_over(Connection::open_from(source, address).await).await
    }

    async fn send_over(&self, mut connection: Connection) -> Reply {
        connection.send(self).await;
        connection.reply(self.method == "HEAD").await.expect("a reply")
    }
}

/// One client connection.
pub struct Connection {
    pub stream: TcpStream,
    /// Read and not yet used.
    pub unread: Vec<u8>,
}

/// How a reply's body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As its framing says.
    Whole,
    /// The connection ended first.
    Short,
}

pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// As they came, if it was chunked.
    pub chunks: Vec<Vec<u8>>,
    pub end: End,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: status {}, not JSON", self.status))
    }

    /// The code of a refusal, in whichever dialect.
    pub fn code(&self) -> String {
        let body = self.json();
        let code = body["error"]["code"].as_str().or(body["code"].as_str());
        code.unwrap_or_else(|| panic!("status {}: no code", self.status)).to_owned()
    }

    /// What all answers of one kind must share, to the byte: headers but for id and date, and the body.
    pub fn without_id_and_date(&self) -> (Vec<String>, String) {
        let own = |name: &str| ["x-request-id", "date"].iter().any(|own| name.eq_ignore_ascii_case(own));
        let headers =
            self.headers.iter().filter(|(name, _)| !own(name)).map(|(name, value)| format!("{name}: {value}"));
        (headers.collect(), self.text())
    }

    pub fn lines(&self) -> Vec<String> {
        self.text().lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Connection {
        let stream = TcpStream::connect(address).await.expect("the proxy listens");
        stream.set_nodelay(true).expect("a socket");
        Connection { stream, unread: Vec::new() }
    }

    /// From another address of this machine's: all of 127.0.0.0/8 is loopback.
    pub async fn open_from(source: IpAddr, address: SocketAddr) -> Connection {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::new(source, 0)).expect("a free port");
        let stream = socket.connect(address).await.expect("the proxy listens");
        stream.set_nodelay(true).expect("a socket");
        Connection { stream, unread: Vec::new() }
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.stream.write_all(bytes)).await.expect("in time").expect("written");
    }

    /// Writes as much as the other side takes: a refusal may close the connection under a large body.
    pub async fn send(&mut self, request: &Request) {
        let mut bytes = request.head_bytes();
        bytes.extend_from_slice(&request.body_bytes());
        let _ = timeout(PATIENCE, self.stream.write_all(&bytes)).await.expect("in time");
    }

    /// One more read. False: the connection has ended.
    pub async fn more(&mut self) -> bool {
        let mut buffer = vec![0u8; 64 * 1024]; // not in the future, which would outgrow a test's stack
        match timeout(PATIENCE, self.stream.read(&mut buffer)).await.expect("something comes in time") {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                self.unread.extend_from_slice(&buffer[..n]);
                true
            }
        }
    }

    /// Takes everything up to and with `end`.
    async fn until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = self.unread.windows(end.len()).position(|window| window == end) {
                return Some(self.unread.drain(..at + end.len()).collect());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    /// Takes `length` bytes, or all there are before the end.
    async fn exactly(&mut self, length: usize) -> (Vec<u8>, End) {
        while self.unread.len() < length {
            if !self.more().await {
                return (std::mem::take(&mut self.unread), End::Short);
            }
        }
        (self.unread.drain(..length).collect(), End::Whole)
    }

    /// Status and headers of the next reply, 100-continue included. `None`: the connection ended.
    pub async fn head(&mut self) -> Option<(u16, Vec<(String, String)>)> {
        let head = String::from_utf8(self.until(b"\r\n\r\n").await?).expect("a head is ASCII");
        let mut lines = head.lines();
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers = lines.filter_map(|line| line.split_once(':'));
        Some((status, headers.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()))
    }

    /// The next chunk of a chunked reply. `None`: its end; `Some(Err)`: the connection ended first.
    pub async fn chunk(&mut self) -> Option<Result<Vec<u8>, ()>> {
        let Some(size) = self.until(b"\r\n").await else { return Some(Err(())) };
        let size = usize::from_str_radix(String::from_utf8_lossy(&size).trim(), 16).expect("a chunk's size");
        let (mut chunk, end) = self.exactly(size + 2).await;
        if end == End::Short {
            return Some(Err(()));
        }
        chunk.truncate(size);
        (size > 0).then_some(Ok(chunk))
    }

    /// The next whole reply. `None`: the connection ended before one.
    pub async fn reply(&mut self, to_head: bool) -> Option<Reply> {
        let (status, headers) = loop {
            let (status, headers) = self.head().await?;
            if status != 100 {
                break (status, headers);
            }
        };
        let mut reply = Reply { status, headers, body: Vec::new(), chunks: Vec::new(), end: End::Whole };
        if to_head || status == 204 || status == 304 {
            return Some(reply);
        }
        if reply.header("transfer-encoding").is_some() {
            while let Some(chunk) = self.chunk().await {
                match chunk {
                    Ok(chunk) => {
                        reply.body.extend_from_slice(&chunk);
                        reply.chunks.push(chunk);
                    }
                    Err(()) => {
                        reply.end = End::Short;
                        break;
                    }
                }
            }
        } else if let Some(length) = reply.header("content-length").map(|length| length.parse().expect("a length")) {
            (reply.body, reply.end) = self.exactly(length).await;
        } else {
            while self.more().await {}
            reply.body = std::mem::take(&mut self.unread);
        }
        Some(reply)
    }
}
