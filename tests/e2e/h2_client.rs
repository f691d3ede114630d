//! HTTP/2 without TLS, with prior knowledge: as gRPC proxies and some SDKs behind a mesh speak it.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::client::{End, Reply, Request};
use crate::house::PATIENCE;

/// One connection; its frames are driven by a task of their own.
pub struct H2 {
    sender: SendRequest<Bytes>,
    /// `None`: another one's.
    driver: Option<tokio::task::JoinHandle<()>>,
}

/// A request whose reply has not been read yet.
pub struct Asked {
    pub reply: ResponseFuture,
    /// The body's writer, for as long as the body is not ended.
    pub body: SendStream<Bytes>,
}

impl H2 {
    pub async fn open(address: SocketAddr) -> H2 {
        let stream = TcpStream::connect(address).await.expect("the proxy listens");
        stream.set_nodelay(true).expect("a socket");
        let shaken = timeout(PATIENCE, h2::client::handshake(stream)).await.expect("in time");
        let (sender, connection) = shaken.expect("the proxy speaks h2c");
        let driver = tokio::spawn(async move {
            let _ = connection.await; // its end shows in each stream
        });
        H2 { sender, driver: Some(driver) }
    }

    /// The same connection, for a request at the same time.
    pub fn again(&self) -> H2 {
        H2 { sender: self.sender.clone(), driver: None }
    }

    /// Sends the head, and leaves the body open. `length`: declare it.
    pub async fn ask(&mut self, request: &Request, length: Option<usize>) -> Asked {
        let uri = format!("http://proxy{}", request.path);
        let mut head = http::Request::builder().method(request.method.as_str()).uri(uri);
        for (name, value) in &request.headers {
            head = head.header(name, value);
        }
        if let Some(length) = length {
            head = head.header("content-length", length);
        }
        self.begin(head.body(()).expect("a good head"), request.body.is_none()).await
    }

    pub async fn begin(&mut self, head: http::Request<()>, end: bool) -> Asked {
        let mut ready = timeout(PATIENCE, self.sender.clone().ready()).await.expect("in time").expect("a connection");
        let (reply, body) = ready.send_request(head, end).expect("sent");
        Asked { reply, body }
    }

    /// The whole of a request and its reply. A `chunked` one declares no length.
    pub async fn send(&mut self, request: &Request) -> Reply {
        let length = match (&request.body, request.chunked) {
            (Some(body), None) => Some(body.len()),
            _ => None,
        };
        let Asked { reply, mut body } = self.ask(request, length).await;
        if let Some(bytes) = &request.body {
            write(&mut body, Bytes::copy_from_slice(bytes)).await;
        }
        read(reply).await
    }
}

impl Drop for H2 {
    fn drop(&mut self) {
        if let Some(driver) = &self.driver {
            driver.abort();
        }
    }
}

/// Writes all of it as the other side takes it, or as much as it takes before it refuses.
pub async fn write(body: &mut SendStream<Bytes>, bytes: Bytes) {
    write_some(body, bytes).await;
    let _ = body.send_data(Bytes::new(), true);
}

/// As [`write`], and the body stays open.
pub async fn write_some(body: &mut SendStream<Bytes>, mut bytes: Bytes) {
    while !bytes.is_empty() {
        body.reserve_capacity(bytes.len());
        let capacity = timeout(PATIENCE, std::future::poll_fn(|cx| body.poll_capacity(cx))).await.expect("in time");
        let Some(Ok(capacity)) = capacity else { return };
        if body.send_data(bytes.split_to(capacity.min(bytes.len())), false).is_err() {
            return;
        }
    }
}

pub async fn read(reply: ResponseFuture) -> Reply {
    let reply = timeout(PATIENCE, reply).await.expect("in time").expect("a reply");
    let headers = reply.headers().iter();
    let headers =
        headers.map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()));
    let mut read = Reply {
        status: reply.status().as_u16(),
        headers: headers.collect(),
        body: Vec::new(),
        chunks: Vec::new(),
        end: End::Whole,
    };
    let mut body = reply.into_body();
    while let Some(part) = next(&mut body).await {
        match part {
            Ok(part) => {
                read.body.extend_from_slice(&part);
                read.chunks.push(part.to_vec());
            }
            Err(_) => {
                read.end = End::Short;
                break;
            }
        }
    }
    read
}

/// The next part of a reply's body.
pub async fn next(body: &mut RecvStream) -> Option<Result<Bytes, h2::Error>> {
    let part = timeout(PATIENCE, body.data()).await.expect("in time")?;
    if let Ok(part) = &part {
        let _ = body.flow_control().release_capacity(part.len());
    }
    Some(part)
}
