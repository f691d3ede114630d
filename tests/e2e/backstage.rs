//! A backend of which the test writes every byte, for replies that not even the simulator gives.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::house::PATIENCE;

/// A listening socket; each request comes to the test as a [`Scene`].
pub struct Backstage {
    listener: TcpListener,
    pub address: SocketAddr,
}

/// One connection whose request has come.
pub struct Scene {
    stream: TcpStream,
}

impl Backstage {
    pub async fn open() -> Backstage {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        Backstage { listener, address }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next connection with a whole request on it.
    pub async fn scene(&self) -> Scene {
        let (stream, _) = timeout(PATIENCE, self.listener.accept()).await.expect("in time").expect("accepted");
        Scene::read(stream).await.expect("a request")
    }
}

impl Scene {
    async fn read(mut stream: TcpStream) -> Option<Scene> {
        let mut bytes = Vec::new();
        let head_end = loop {
            if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if timeout(PATIENCE, stream.read_buf(&mut bytes)).await.ok()?.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
        let mut body = bytes.split_off(head_end);
        let length = head
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .and_then(|(_, value)| value.trim().parse().ok())
            .unwrap_or(0);
        while body.len() < length {
            if timeout(PATIENCE, stream.read_buf(&mut body)).await.ok()?.ok()? == 0 {
                return None;
            }
        }
        Some(Scene { stream })
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        let _ = timeout(PATIENCE, self.stream.write_all(bytes)).await.expect("in time"); // the proxy may have closed
    }
}
