//! Somebody who is sent the audit over HTTP, plain or over TLS: keeps what comes, and answers as a test wants.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::house::wait_until;

/// What it does with a request.
#[derive(Clone, Debug)]
pub enum Does {
    /// Keeps it and answers 200.
    Takes,
    /// Keeps it, and answers 200 with this body.
    TakesSaying(Vec<u8>),
    /// Answers with this status and these header lines, and keeps it only as refused.
    Answers(u16, String),
    /// Answers 413 to more than so many lines, and takes the rest.
    TakesAtMost(usize),
    /// Says nothing for as long as it does this.
    Stalls,
    /// Answers with what is no HTTP.
    Babbles,
    /// Closes without a word.
    HangsUp,
    /// Keeps it, and closes without a word: whoever sent it cannot know.
    TakesAndHangsUp,
}

/// One request as it came.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub head: String,
    pub body: Vec<u8>,
    pub taken: bool,
}

impl Delivery {
    pub fn header(&self, name: &str) -> &str {
        let named = self.head.lines().filter_map(|line| line.split_once(": "));
        named.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value).next().unwrap_or("")
    }
}

pub struct Collector {
    pub address: SocketAddr,
    does: watch::Sender<Does>,
    seen: Arc<Mutex<Vec<Delivery>>>,
    tls: Option<TlsAcceptor>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Collector {
    pub async fn open(does: Does) -> Collector {
        Collector::with(does, None).await
    }

    pub async fn with(does: Does, tls: Option<TlsAcceptor>) -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (does, seen) = (watch::Sender::new(does), Arc::default());
        let accepting = tokio::spawn(accept(listener, does.subscribe(), Arc::clone(&seen), tls.clone()));
        Collector { address, does, seen, tls, accepting }
    }

    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://localhost:{}/audit?key=hidden-in-the-query", self.address.port())
    }

    pub fn does(&self, does: Does) {
        self.does.send_replace(does);
    }

    /// Nobody listens any more.
    pub async fn die(&mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await; // aborted
    }

    /// At the same address as before.
    pub async fn rise(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("the port is still free");
        let seen = Arc::clone(&self.seen);
        self.accepting = tokio::spawn(accept(listener, self.does.subscribe(), seen, self.tls.clone()));
    }

    /// Every request so far, taken or not.
    pub fn seen(&self) -> Vec<Delivery> {
        self.seen.lock().expect("not poisoned").clone()
    }

    /// What was taken, one after the other.
    pub fn taken(&self) -> Vec<Delivery> {
        self.seen().into_iter().filter(|delivery| delivery.taken).collect()
    }

    /// The lines that were taken, as often as they came.
    pub fn lines(&self) -> Vec<String> {
        let bodies = self.taken().into_iter().map(|delivery| String::from_utf8(delivery.body).expect("UTF-8"));
        bodies.flat_map(|body| body.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    }

    /// Waits for this many requests more.
    pub async fn wait_for_more(&self, requests: usize) {
        let before = self.seen().len();
        wait_until("requests to the collector", || (self.seen().len() >= before + requests).then_some(())).await;
    }
}

async fn accept(
    listener: TcpListener,
    does: watch::Receiver<Does>,
    seen: Arc<Mutex<Vec<Delivery>>>,
    tls: Option<TlsAcceptor>,
) {
    let mut served = tokio::task::JoinSet::new(); // ends with us
    while let Ok((stream, _)) = listener.accept().await {
        let (does, seen, tls) = (does.clone(), Arc::clone(&seen), tls.clone());
        served.spawn(async move {
            match tls {
                None => answer(stream, does, &seen).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        answer(stream, does, &seen).await;
                    }
                }
            }
        });
    }
}

async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    mut doing: watch::Receiver<Does>,
    seen: &Mutex<Vec<Delivery>>,
) {
    let Some((head, body)) = request(&mut stream).await else { return };
    let does = doing.borrow_and_update().clone();
    let few = |most: usize| body.iter().filter(|byte| **byte == b'\n').count() <= most;
    let mut says = Vec::new();
    let (taken, reply) = match does {
        Does::Takes => (true, Some("HTTP/1.1 200 OK\r\n".to_owned())),
        Does::TakesSaying(body) => {
            says = body;
            (true, Some("HTTP/1.1 200 OK\r\n".to_owned()))
        }
        Does::TakesAtMost(most) if few(most) => (true, Some("HTTP/1.1 204 X\r\n".to_owned())),
        Does::TakesAtMost(_) => (false, Some("HTTP/1.1 413 X\r\n".to_owned())),
        Does::Answers(status, headers) => (false, Some(format!("HTTP/1.1 {status} X\r\n{headers}"))),
        Does::Babbles => (false, Some("SSH-2.0-OpenSSH_9.2\r\n".to_owned())),
        Does::HangsUp => (false, None),
        Does::TakesAndHangsUp => (true, None),
        Does::Stalls => {
            seen.lock().expect("not poisoned").push(Delivery { head, body, taken: false });
            let mut rest = Vec::new();
            tokio::select! {
                _ = doing.changed() => {}
                _ = stream.read_to_end(&mut rest) => {} // the client left
            }
            return;
        }
    };
    seen.lock().expect("not poisoned").push(Delivery { head, body, taken });
    if let Some(reply) = reply {
        let head = format!("{reply}content-length: {}\r\nconnection: close\r\n\r\n", says.len());
        let _ = stream.write_all(&[head.into_bytes(), says].concat()).await; // it may have read enough
    }
    let _ = stream.shutdown().await;
}

async fn request(stream: &mut (impl AsyncRead + Unpin)) -> Option<(String, Vec<u8>)> {
    let mut seen = Vec::new();
    let end = loop {
        if let Some(at) = seen.windows(4).position(|end| end == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
            return None;
        }
    };
    let body = seen.split_off(end);
    let delivery = Delivery { head: String::from_utf8(seen).ok()?, body, taken: false };
    let length: usize = delivery.header("content-length").parse().unwrap_or(0);
    let Delivery { head, mut body, .. } = delivery;
    while body.len() < length {
        if stream.read_buf(&mut body).await.unwrap_or(0) == 0 {
            return None;
        }
    }
    Some((head, body))
}
