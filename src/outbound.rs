//! Our own requests to others: whatever is neither a caller's request nor for a backend (a key set, a control plane's token endpoint).
//!
//! hyper's client over rustls and ring. It has no redirects, no proxies, no cookies and no decompression to turn off; what is
//! added here is a deadline for the whole of a request and a bound for its reply. Certificates are always verified, against the
//! machine's roots (where OpenSSL looks for them, `SSL_CERT_FILE` and `SSL_CERT_DIR` included) and those of a file that the
//! configuration names. HTTP/1.1 only: one request in minutes needs no more. (docs/adr/0025-outbound.md)
//!
//! - [`reach`]: whether an address is the internet's, a private network's or this machine's.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CertificateError, ClientConfig, RootCertStore};

use self::reach::{Names, Reach};
use crate::config::ServiceUrl;

pub mod reach;

/// One address of a name; a name may have several, and the deadline of a request is for all of them.
const CONNECT: Duration = Duration::from_secs(5);
/// Connections kept for the next request; most of what is asked here is asked once in minutes.
const IDLE_CONNECTIONS: usize = 4;
const IDLE: Duration = Duration::from_secs(30);
/// Largest head of a reply.
const HEAD_BYTES: usize = 64 * 1024;

/// The client. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct Outbound {
    client: Client<HttpsConnector<HttpConnector<Names>>, Full<Bytes>>,
    tls: ClientConfig,
    most: Option<Reach>,
}

/// What one request may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// From the look-up of the name to the last byte of the reply.
    pub within: Duration,
    /// The reply's body.
    pub reply_bytes: usize,
}

/// A whole reply, of any status: a redirect is one, and nobody follows it. No `Debug`: it may hold a token.
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// A reply whose body is read as it comes. No `Debug`, for the same reason.
pub struct Opened {
    pub status: u16,
    pub headers: HeaderMap,
    body: Incoming,
}

impl Opened {
    /// The next bytes of the body; `None` at its end. `silence` is for these bytes alone.
    pub async fn next(&mut self, silence: Duration) -> Result<Option<Bytes>, OutboundError> {
        loop {
            let frame = tokio::time::timeout(silence, self.body.frame()).await.map_err(|_| OutboundError::TimedOut)?;
            match frame {
                None => return Ok(None),
                Some(Err(_)) => return Err(OutboundError::Broken),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => return Ok(Some(data)),
                    Err(_) => {} // trailers
                },
            }
        }
    }
}

/// Why there is no reply. The words name no bytes of the other side's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutboundError {
    Unreachable,
    /// Its certificate does not hold; the words say why.
    Untrusted(&'static str),
    TimedOut,
    TooLarge,
    /// It broke off, or what it says is no HTTP.
    Broken,
}

impl fmt::Display for OutboundError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OutboundError::Unreachable => "cannot be reached",
            OutboundError::Untrusted(why) => why,
            OutboundError::TimedOut => "did not answer in time",
            OutboundError::TooLarge => "sent a reply that is too large",
            OutboundError::Broken => "broke off, or does not speak HTTP",
        })
    }
}

impl std::error::Error for OutboundError {}

/// A CA file that cannot be used.
#[derive(Debug)]
pub struct TrustError {
    path: PathBuf,
    what: String,
}

impl fmt::Display for TrustError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; give a PEM file with the CA's certificate", self.path.display(), self.what)
    }
}

impl std::error::Error for TrustError {}

impl Outbound {
    /// A client that trusts the machine's roots, and those in the PEM file `ca_file`. Reads files; needs no runtime yet.
    pub fn new(ca_file: Option<&Path>) -> Result<Outbound, TrustError> {
        let roots = roots(ca_file)?;
        // The provider by name: the process-wide default is whatever another dependency may set.
        let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has the suites of TLS 1.2 and 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Outbound::over(tls, None))
    }

    /// The same client, which connects to nothing that is nearer than `most`: for URLs that somebody else has written.
    pub fn within(&self, most: Reach) -> Outbound {
        Outbound::over(self.tls.clone(), Some(most))
    }

    fn over(tls: ClientConfig, most: Option<Reach>) -> Outbound {
        let mut tcp = HttpConnector::new_with_resolver(Names::new(most));
        tcp.enforce_http(false); // TLS is laid over it below
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_nodelay(true);
        // Which URLs may be http is decided where a `ServiceUrl` is made.
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls.clone())
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .http1_max_buf_size(HEAD_BYTES)
            .build(connector);
        Outbound { client, tls, most }
    }

    pub async fn get(
        &self,
        url: &ServiceUrl,
        headers: &[(HeaderName, HeaderValue)],
        bounds: Bounds,
    ) -> Result<Reply, OutboundError> {
        self.send(Method::GET, url, headers, Bytes::new(), bounds).await
    }

    pub async fn post(
        &self,
        url: &ServiceUrl,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
        bounds: Bounds,
    ) -> Result<Reply, OutboundError> {
        self.send(Method::POST, url, headers, body, bounds).await
    }

    /// A GET whose body may be of any length. `within` is for the reply's head.
    pub async fn open(
        &self,
        url: &ServiceUrl,
        headers: &[(HeaderName, HeaderValue)],
        within: Duration,
    ) -> Result<Opened, OutboundError> {
        // hyper resolves no address that stands in the URL as such.
        let literal = url.uri().host().and_then(reach::literal);
        if self.most.is_some_and(|most| literal.is_some_and(|address| !most.covers(address))) {
            return Err(OutboundError::Unreachable);
        }
        let asked = self.client.request(request(Method::GET, url, headers, Bytes::new()));
        let reply = tokio::time::timeout(within, asked).await.map_err(|_| OutboundError::TimedOut)?;
        let (head, body) = reply.map_err(|e| why_not(&e))?.into_parts();
        Ok(Opened { status: head.status.as_u16(), headers: head.headers, body })
    }

    /// A request is sent once: hyper sends it again only where an idle connection turned out to be closed before a byte was sent.
    async fn send(
        &self,
        method: Method,
        url: &ServiceUrl,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
        bounds: Bounds,
    ) -> Result<Reply, OutboundError> {
        let request = request(method, url, headers, body);
        let whole = async {
            let reply = self.client.request(request).await.map_err(|e| why_not(&e))?;
            let (head, body) = reply.into_parts();
            let body = Limited::new(body, bounds.reply_bytes).collect().await.map_err(|e| {
                if e.is::<LengthLimitError>() { OutboundError::TooLarge } else { OutboundError::Broken }
            })?;
            Ok(Reply { status: head.status.as_u16(), headers: head.headers, body: body.to_bytes() })
        };
        tokio::time::timeout(bounds.within, whole).await.unwrap_or(Err(OutboundError::TimedOut))
    }
}

fn request(
    method: Method,
    url: &ServiceUrl,
    headers: &[(HeaderName, HeaderValue)],
    body: Bytes,
) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = url.uri().clone();
    request.headers_mut().insert(
        http::header::USER_AGENT,
        HeaderValue::from_static(concat!("behavry-ollama-proxy/", env!("CARGO_PKG_VERSION"))),
    );
    for (name, value) in headers {
        request.headers_mut().insert(name, value.clone());
    }
    request
}

fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, TrustError> {
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    match ca_file {
        Some(path) => {
            let bad = |what: String| TrustError { path: path.to_owned(), what };
            let certificates = CertificateDer::pem_file_iter(path).map_err(|e| bad(format!("cannot be read ({e})")))?;
            let before = roots.len();
            for certificate in certificates {
                let certificate = certificate.map_err(|_| bad("is not PEM".into()))?;
                roots.add(certificate).map_err(|_| bad("holds a certificate that is none of a CA".into()))?;
            }
            if roots.len() == before {
                return Err(bad("holds no certificate".into()));
            }
        }
        None if usable == 0 => log::warn!(
            "this machine has no root certificates, so that no https URL can be trusted; install ca-certificates, or name a CA file"
        ),
        None => {}
    }
    Ok(roots)
}

fn why_not(error: &ClientError) -> OutboundError {
    let mut cause = error.source();
    while let Some(found) = cause {
        if let Some(tls) = found.downcast_ref::<rustls::Error>() {
            return distrust(tls);
        }
        // An io::Error hands over what it wraps here only: its `source` is that of what it wraps.
        let wrapped = found.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = wrapped.map(|it| it as &(dyn std::error::Error + 'static)).or_else(|| found.source());
    }
    if error.is_connect() { OutboundError::Unreachable } else { OutboundError::Broken }
}

fn distrust(error: &rustls::Error) -> OutboundError {
    let rustls::Error::InvalidCertificate(certificate) = error else { return OutboundError::Broken };
    OutboundError::Untrusted(match certificate {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "its certificate has expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "its certificate is for another name"
        }
        // The second: the CA has the name of one of ours and another key.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is signed by a CA that is not trusted here"
        }
        _ => "its certificate does not hold",
    })
}

#[cfg(test)]
mod tests;
