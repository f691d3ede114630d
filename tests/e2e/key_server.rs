//! A server of somebody else's, plain or over TLS, that says what a test wants: a key set's URL, a control plane.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use behavry_ollama_proxy::identity::issuer::Claims;
use behavry_ollama_proxy::identity::{Algorithm, Issuer, KeySet, SigningKey};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};

use crate::house::{listen_and_keep, wait_until};

/// What the server says to whoever asks.
#[derive(Clone)]
pub enum Says {
    /// Status, further header lines, body.
    Reply(u16, &'static str, String),
    /// Nothing, until it says something else or the client leaves.
    Nothing,
}

impl Says {
    pub fn json(body: impl ToString) -> Says {
        Says::Reply(200, "content-type: application/json\r\n", body.to_string())
    }
}

pub struct KeyServer {
    pub address: SocketAddr,
    says: tokio::sync::watch::Sender<Says>,
    asked: Arc<Mutex<Vec<String>>>,
    tls: Option<TlsAcceptor>,
    accepting: tokio::task::JoinHandle<()>,
    _port: TcpSocket,
}

impl KeyServer {
    pub async fn open(says: Says, tls: Option<TlsAcceptor>) -> KeyServer {
        let (listener, port) = listen_and_keep();
        let address = listener.local_addr().expect("bound");
        let (says, asked) = (tokio::sync::watch::Sender::new(says), Arc::default());
        let accepting = tokio::spawn(accept(listener, says.subscribe(), Arc::clone(&asked), tls.clone()));
        KeyServer { address, says, asked, tls, accepting, _port: port }
    }

    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://localhost:{}/keys?secret=hidden-in-the-query", self.address.port())
    }

    pub fn say(&self, says: Says) {
        self.says.send_replace(says);
    }

    /// Nobody listens any more.
    pub async fn die(&mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await; // aborted
    }

    /// At the same address as before.
    pub async fn rise(&mut self) {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("a socket");
        socket.bind(self.address).expect("the port was kept");
        let listener = socket.listen(1024).expect("nobody else listens");
        let asked = Arc::clone(&self.asked);
        self.accepting = tokio::spawn(accept(listener, self.says.subscribe(), asked, self.tls.clone()));
    }

    /// The requests so far, head and body.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("not poisoned").clone()
    }

    pub async fn wait_for_requests(&self, at_least: usize) {
        wait_until("a request to the key server", || (self.asked().len() >= at_least).then_some(())).await;
    }
}

async fn accept(
    listener: TcpListener,
    says: tokio::sync::watch::Receiver<Says>,
    asked: Arc<Mutex<Vec<String>>>,
    tls: Option<TlsAcceptor>,
) {
    let mut served = tokio::task::JoinSet::new(); // ends with us
    while let Ok((stream, _)) = listener.accept().await {
        let (says, asked, tls) = (says.clone(), Arc::clone(&asked), tls.clone());
        served.spawn(async move {
            match tls {
                None => answer(stream, says, &asked).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        answer(stream, says, &asked).await;
                    }
                }
            }
        });
    }
}

async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    mut says: tokio::sync::watch::Receiver<Says>,
    asked: &Mutex<Vec<String>>,
) {
    let mut seen = Vec::new();
    let whole = |seen: &[u8]| {
        let text = String::from_utf8_lossy(seen).into_owned();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        (body.len() >= length.unwrap_or(0)).then_some(text)
    };
    let request = loop {
        if let Some(request) = whole(&seen) {
            break request;
        }
        if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
            return;
        }
    };
    asked.lock().expect("not poisoned").push(request);
    let said = says.wait_for(|says| matches!(says, Says::Reply(..)));
    let reply = tokio::select! {
        said = said => match said.map(|said| said.clone()) {
            Ok(Says::Reply(status, headers, body)) => {
                let length = body.len();
                format!("HTTP/1.1 {status} X\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}")
            }
            _ => return,
        },
        _ = stream.read_buf(&mut seen) => return, // the client left
    };
    let _ = stream.write_all(reply.as_bytes()).await; // it may have read enough
    let _ = stream.shutdown().await;
}

/// A CA of the test, and a server of its for `name`.
pub fn tls_for(name: &str) -> (String, TlsAcceptor) {
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::new(Vec::new()).expect("no names");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = ca.self_signed(&ca_key).expect("signed").pem();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = KeyPair::generate().expect("a key");
    let names = CertificateParams::new(vec![name.to_owned()]).expect("a name");
    let certificate = names.signed_by(&key, &issuer).expect("signed");
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .expect("a pair");
    (pem, TlsAcceptor::from(Arc::new(config)))
}

/// Somebody who signs tokens elsewhere.
pub struct Signer {
    issuer: Issuer,
    pub document: String,
}

impl Signer {
    pub fn new() -> Signer {
        let key = SigningKey::generate(Algorithm::EdDsa).expect("a key");
        let document = KeySet::new(vec![key.verification_key()]).expect("one key").published();
        Signer { issuer: Issuer::new(key, "behavry", 3600), document }
    }

    pub fn token(&self) -> String {
        let claims = Claims {
            sub: "remote-agent".to_owned(),
            permissions: vec!["web:read".to_owned(), "web:write".to_owned()],
            ..Claims::default()
        };
        let now_s = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64;
        self.issuer.mint(&claims, now_s).expect("good claims").0
    }
}
