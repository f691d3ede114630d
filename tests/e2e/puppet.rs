//! A backend that is moved by hand: each byte of its reply is sent when a test says so, so that a test knows what the other
//! side can have seen by then.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::house::{House, PATIENCE, Plan, listen_and_keep};

pub struct Puppet {
    listener: TcpListener,
    port: TcpSocket,
}

impl Puppet {
    pub async fn listen() -> Puppet {
        let (listener, port) = listen_and_keep();
        Puppet { listener, port }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().expect("it listens"))
    }

    /// Stops listening. Nobody else gets the port as long as what it gives is kept.
    pub fn leave(self) -> TcpSocket {
        self.port
    }

    /// The next connection, which has not sent anything as far as we know.
    pub async fn accept(&self) -> Hand {
        let accepted = timeout(PATIENCE, self.listener.accept()).await.expect("a connection comes in time");
        let (stream, _) = accepted.expect("accepted");
        stream.set_nodelay(true).expect("a socket");
        Hand { stream, unread: Vec::new() }
    }

    /// The next connection, once its request has come.
    pub async fn asked(&self) -> Hand {
        let mut hand = self.accept().await;
        hand.request().await;
        hand
    }
}

/// One connection of the proxy.
pub struct Hand {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Hand {
    /// Reads one request with a Content-Length, or without a body.
    pub async fn request(&mut self) -> String {
        self.next_request().await.expect("a request before the connection ends")
    }

    /// The same where the proxy may have closed the connection instead.
    pub async fn next_request(&mut self) -> Option<String> {
        let head_end = loop {
            if let Some(at) = self.unread.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if !self.more().await {
                return None;
            }
        };
        let head = String::from_utf8_lossy(&self.unread[..head_end]).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.map_or(0, |length| length.trim().parse().expect("a length"));
        while self.unread.len() < head_end + length {
            assert!(self.more().await, "the connection ended within a request");
        }
        Some(String::from_utf8_lossy(&self.unread.drain(..head_end + length).collect::<Vec<u8>>()).into_owned())
    }

    /// Ends the connection with a reset.
    pub fn reset(self) {
        self.stream.set_zero_linger().expect("a socket");
    }

    pub async fn say(&mut self, bytes: impl AsRef<[u8]>) {
        timeout(PATIENCE, self.stream.write_all(bytes.as_ref())).await.expect("in time").expect("written");
    }

    /// The same where the proxy may have closed the connection.
    pub async fn try_say(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = timeout(PATIENCE, self.stream.write_all(bytes.as_ref())).await.expect("in time");
    }

    /// The head of a stream.
    pub async fn open_stream(&mut self, content_type: &str) {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n");
        self.say(head).await;
    }

    pub async fn chunk(&mut self, bytes: &[u8]) {
        let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
        framed.extend_from_slice(bytes);
        framed.extend_from_slice(b"\r\n");
        self.say(framed).await;
    }

    /// The same where the proxy may have closed the connection.
    pub async fn try_chunk(&mut self, bytes: &[u8]) {
        self.try_say([format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()).await;
    }

    /// The end of a stream.
    pub async fn end(&mut self) {
        self.say("0\r\n\r\n").await;
    }

    /// A whole reply in JSON.
    pub async fn answer(&mut self, status: &str, body: &str) {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.say(head + body).await;
    }

    /// Waits until the proxy closes this connection.
    pub async fn closed(&mut self) {
        while self.more().await {}
    }

    /// One more read. False: the connection has ended.
    async fn more(&mut self) -> bool {
        let mut buffer = [0u8; 16 * 1024];
        match timeout(PATIENCE, self.stream.read(&mut buffer)).await.expect("something comes in time") {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                self.unread.extend_from_slice(&buffer[..n]);
                true
            }
        }
    }
}

/// A proxy whose only backend is a puppet.
pub struct Street {
    pub puppet: Puppet,
    pub house: House,
}

impl Street {
    pub async fn open() -> Street {
        let puppet = Puppet::listen().await;
        let house = House::with(Plan { backend: Some(puppet.url()), ..Plan::default() }).await;
        Street { puppet, house }
    }
}
