//! Requests of our own to a backend: the lists that are filtered before a client sees them, and the catalogue's look at it.
//!
//! Over Pingora's own connector, so that addresses, TLS and time limits are those of the requests that are passed on.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::Method;
use pingora::connectors::http::Connector;
use pingora::http::ResponseHeader;
use pingora::prelude::*;
use tokio::sync::mpsc;

use super::{Backend, peer};

/// A change of names is done at once, but for a disk that is busy with a pull.
const CHANGE: Duration = Duration::from_secs(60);
const CHANGE_BYTES: usize = 64 * 1024;

pub struct Client {
    connector: Connector,
}

/// One request of our own.
pub struct Call<'a> {
    pub method: Method,
    pub target: &'a str,
    pub query: Option<&'a str>,
    /// JSON.
    pub body: Option<Bytes>,
    pub request_id: &'a str,
    /// Of the reply's body.
    pub limit_bytes: usize,
    /// For the reply to come whole.
    pub within: Duration,
    /// Takes the body of a 200 piece by piece, as it comes, instead of [`Reply::body`]. Once nobody takes any more the rest is not read.
    pub pieces: Option<mpsc::Sender<Bytes>>,
}

/// Why there is no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientError {
    Unreachable,
    Silent,
    /// It broke off, answered garbage, or more than was asked for.
    Broken(&'static str),
}

/// A whole reply.
pub struct Reply {
    pub head: ResponseHeader,
    pub body: Bytes,
    pub first_byte: Instant,
    pub reused: bool,
}

impl Default for Client {
    fn default() -> Client {
        Client { connector: Connector::new(None) }
    }
}

impl Client {
    /// A request whose reply is held. Only what may be sent twice: on an old connection that turns out dead it is.
    pub async fn call(&self, backend: &Backend, call: &Call<'_>) -> Result<Reply, ClientError> {
        let attempts = async {
            loop {
                match self.attempt(backend, call).await {
                    // A pooled connection that the backend has closed meanwhile; the next one is another, or new.
                    Err((ClientError::Broken(_), true)) => continue,
                    result => return result.map_err(|(e, _)| e),
                }
            }
        };
        tokio::time::timeout(call.within, attempts).await.unwrap_or(Err(ClientError::Silent))
    }

    /// Takes a name, and what no other name needs, off a backend. False: it was not there.
    pub async fn delete(&self, backend: &Backend, name: &str) -> Result<bool, ClientError> {
        let body = serde_json::json!({ "model": name }).to_string();
        match self.change(backend, Method::DELETE, "/api/delete", body).await? {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(ClientError::Broken("it could not be deleted")),
        }
    }

    /// Puts a model under another name as well. False: the backend has not got it.
    pub async fn copy(&self, backend: &Backend, source: &str, destination: &str) -> Result<bool, ClientError> {
        let body = serde_json::json!({ "source": source, "destination": destination }).to_string();
        match self.change(backend, Method::POST, "/api/copy", body).await? {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(ClientError::Broken("it could not be copied")),
        }
    }

    async fn change(&self, backend: &Backend, method: Method, target: &str, body: String) -> Result<u16, ClientError> {
        let call = Call {
            method,
            target,
            query: None,
            body: Some(body.into()),
            request_id: "mirror",
            limit_bytes: CHANGE_BYTES,
            within: CHANGE,
            pieces: None,
        };
        Ok(self.call(backend, &call).await?.head.status.as_u16())
    }

    /// One attempt. On an error: whether another may be better, since the connection was an old one.
    async fn attempt(&self, backend: &Backend, call: &Call<'_>) -> Result<Reply, (ClientError, bool)> {
        let addresses = backend.addresses().await.map_err(|_| (ClientError::Unreachable, false))?;
        let mut connected = None;
        for address in addresses {
            let peer = peer::peer(backend, address, false);
            if let Ok(session) = self.connector.get_http_session(&peer).await {
                connected = Some((peer, session));
                break;
            }
        }
        let (peer, (mut session, reused)) = connected.ok_or((ClientError::Unreachable, false))?;
        let read = async {
            session.set_read_timeout(peer.options.read_timeout);
            session.set_write_timeout(peer.options.write_timeout);
            let mut head = peer::build(&call.method, backend, call.target, call.query, call.request_id)?;
            if let Some(body) = &call.body {
                head.insert_header(http::header::CONTENT_TYPE, "application/json")?;
                head.insert_header(http::header::CONTENT_LENGTH, body.len())?;
            }
            session.write_request_header(Box::new(head)).await?;
            if let Some(body) = &call.body {
                session.write_request_body(body.clone(), true).await?;
            }
            session.finish_request_body().await?;
            loop {
                session.read_response_header().await?;
                // Behind a 1xx comes the reply. Asked for its body, Pingora 0.9.1 panics (v1/client.rs, `init_body_reader`).
                if session.response_header().is_none_or(|head| !head.status.is_informational() || head.status == 101) {
                    return Ok::<_, Box<Error>>(Instant::now());
                }
            }
        };
        let first_byte = read.await.map_err(|e| (fault_of(&e), reused))?;
        let Some(head) = session.response_header().cloned() else {
            return Err((ClientError::Broken("no head"), false));
        };
        if head.status == 101 {
            session.shutdown().await; // what follows is no HTTP, and has no end
            return Err((ClientError::Broken("the backend switches protocols"), false));
        }
        let mut body = BytesMut::new();
        while let Some(bytes) = session.read_response_body().await.map_err(|e| (fault_of(&e), false))? {
            if let Some(pieces) = call.pieces.as_ref().filter(|_| head.status == 200) {
                if pieces.send(bytes).await.is_err() {
                    session.shutdown().await;
                    return Err((ClientError::Broken("nobody takes the rest"), false));
                }
                continue;
            }
            if body.len() + bytes.len() > call.limit_bytes {
                session.shutdown().await;
                return Err((ClientError::Broken("the reply is too large"), false));
            }
            body.extend_from_slice(&bytes);
        }
        self.connector.release_http_session(session, &peer, peer.options.idle_timeout).await;
        Ok(Reply { head, body: body.freeze(), first_byte, reused })
    }
}

fn fault_of(e: &Error) -> ClientError {
    match e.etype() {
        ErrorType::ReadTimedout | ErrorType::WriteTimedout => ClientError::Silent,
        _ => ClientError::Broken("the backend broke off"),
    }
}
