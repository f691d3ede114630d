//! Real sockets and certificates made here.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

const BOUNDS: Bounds = Bounds { within: Duration::from_secs(20), reply_bytes: 1000 };

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Ca { issuer: Issuer::new(params, key), pem }
    }

    fn file(&self, dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("ca.pem");
        std::fs::write(&path, &self.pem).unwrap();
        path
    }

    fn server(&self, name: &str, years: (i32, i32)) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = date_time_ymd(years.0, 1, 1);
        params.not_after = date_time_ymd(years.1, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// Answers each request with these bytes and closes. Counts the requests whose head came whole.
async fn server(reply: &'static str, tls: Option<TlsAcceptor>) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let heads = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (tls, heads) = (tls.clone(), Arc::clone(&counted));
            tokio::spawn(async move {
                match tls {
                    None => answer(stream, reply, &heads).await,
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            answer(stream, reply, &heads).await;
                        }
                    }
                }
            });
        }
    });
    (address, heads)
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, reply: &str, heads: &AtomicUsize) {
    let mut seen = Vec::new();
    while !seen.windows(4).any(|end| end == b"\r\n\r\n") {
        if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
            return;
        }
    }
    heads.fetch_add(1, Ordering::SeqCst);
    let _ = stream.write_all(reply.as_bytes()).await;
    if reply.is_empty() {
        let _ = stream.read_buf(&mut seen).await; // silent until the client leaves
    }
    let _ = stream.shutdown().await;
}

async fn ask(outbound: &Outbound, url: &str) -> Result<Reply, OutboundError> {
    outbound.get(&ServiceUrl::parse(url).unwrap(), &[], BOUNDS).await
}

async fn refused(outbound: &Outbound, url: &str) -> OutboundError {
    match ask(outbound, url).await {
        Ok(reply) => panic!("{url} was answered with {}", reply.status),
        Err(e) => e,
    }
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn a_certificate_must_be_of_a_trusted_ca_for_the_name_and_of_today() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, other) = (Ca::new(), Ca::new());
    let trusting = Outbound::new(Some(&ours.file(&dir))).unwrap();
    for (ca, name, years, expected) in [
        (&ours, "localhost", (2020, 2099), None),
        (&other, "localhost", (2020, 2099), Some("its certificate is signed by a CA that is not trusted here")),
        (&ours, "elsewhere.example", (2020, 2099), Some("its certificate is for another name")),
        (&ours, "localhost", (2020, 2021), Some("its certificate has expired")),
        (&ours, "localhost", (2098, 2099), Some("its certificate is not valid yet")),
    ] {
        let (address, heads) = server(OK, Some(ca.server(name, years))).await;
        let url = format!("https://localhost:{}/", address.port());
        match expected {
            None => assert_eq!(ask(&trusting, &url).await.unwrap_or_else(|e| panic!("{e}")).body, "ok"),
            Some(why) => {
                assert_eq!(refused(&trusting, &url).await, OutboundError::Untrusted(why));
                assert_eq!(heads.load(Ordering::SeqCst), 0, "{why}: nothing was sent");
            }
        }
    }
    // Without the file its CA is a stranger.
    let (address, _) = server(OK, Some(ours.server("localhost", (2020, 2099)))).await;
    let plain = Outbound::new(None).unwrap();
    let refused = refused(&plain, &format!("https://localhost:{}/", address.port())).await;
    assert!(matches!(refused, OutboundError::Untrusted(_)), "{refused}");
}

#[tokio::test]
async fn a_redirect_is_a_reply_and_is_not_followed() {
    let (target, visits) = server(OK, None).await;
    let reply = format!("HTTP/1.1 302 Found\r\nlocation: http://{target}/\r\ncontent-length: 0\r\n\r\n");
    let (address, _) = server(reply.leak(), None).await;
    let outbound = Outbound::new(None).unwrap();
    assert_eq!(ask(&outbound, &format!("http://{address}/")).await.unwrap_or_else(|e| panic!("{e}")).status, 302);
    assert_eq!(visits.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_reply_is_bounded_however_it_is_framed() {
    let outbound = Outbound::new(None).unwrap();
    let body = "x".repeat(1001);
    let size = format!("HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\n{body}");
    let chunks = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n{body}\r\n0\r\n\r\n");
    let close = format!("HTTP/1.0 200 OK\r\n\r\n{body}");
    let head = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "x".repeat(2 * HEAD_BYTES));
    for (reply, expected) in [
        (size, OutboundError::TooLarge),
        (chunks, OutboundError::TooLarge),
        (close, OutboundError::TooLarge),
        (head, OutboundError::Broken),
        ("HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nshort".to_owned(), OutboundError::Broken),
        ("garbage\r\n\r\n".to_owned(), OutboundError::Broken),
    ] {
        let (address, _) = server(reply.leak(), None).await;
        assert_eq!(refused(&outbound, &format!("http://{address}/")).await, expected);
    }
}

#[tokio::test]
async fn silence_ends_at_the_deadline_and_the_connection_with_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let outbound = Outbound::new(None).unwrap();
    let closed = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut seen = Vec::new();
        while stream.read_buf(&mut seen).await.unwrap_or(0) > 0 {}
    });
    let bounds = Bounds { within: Duration::from_millis(50), ..BOUNDS };
    let asked = outbound.get(&ServiceUrl::parse(&format!("http://{address}/")).unwrap(), &[], bounds).await;
    assert_eq!(asked.err(), Some(OutboundError::TimedOut));
    tokio::time::timeout(Duration::from_secs(20), closed).await.expect("the connection is closed").unwrap();
}

#[tokio::test]
async fn nobody_there_is_said_to_be_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let outbound = Outbound::new(None).unwrap();
    assert_eq!(refused(&outbound, &format!("http://{address}/")).await, OutboundError::Unreachable);
}

#[test]
fn a_ca_file_that_holds_no_ca_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    for text in ["", "no PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "-----BEGIN CERT"] {
        std::fs::write(&path, text).unwrap();
        let words = Outbound::new(Some(&path)).err().expect("refused").to_string();
        assert!(words.contains("ca.pem") && words.contains("give a PEM file"), "{words}");
    }
    assert!(Outbound::new(Some(&dir.path().join("nothing"))).is_err());
}

#[tokio::test]
async fn a_client_for_what_others_have_written_connects_to_nothing_too_near() {
    let (address, heads) = server(OK, None).await;
    let all = Outbound::new(None).unwrap();
    for (most, reached) in [(Reach::Public, false), (Reach::Private, false), (Reach::Machine, true)] {
        let near = all.within(most);
        for host in ["127.0.0.1", "localhost"] {
            let url = ServiceUrl::parse(&format!("http://{host}:{}/", address.port())).unwrap();
            let before = heads.load(Ordering::SeqCst);
            let opened = near.open(&url, &[], BOUNDS.within).await;
            assert_eq!(opened.is_ok(), reached, "{most:?} {host}");
            assert_eq!(heads.load(Ordering::SeqCst) - before, usize::from(reached), "{most:?} {host}");
        }
    }
    let url = ServiceUrl::parse(&format!("http://127.0.0.1:{}/", address.port())).unwrap();
    let mut opened = all.open(&url, &[], BOUNDS.within).await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(opened.next(BOUNDS.within).await, Ok(Some(Bytes::from_static(b"ok"))));
    assert_eq!(opened.next(BOUNDS.within).await, Ok(None));
}
