//! A client that left before its reply began, and for how long that is kept from the backend.
//!
//! When Pingora sees a downstream error it drops the backend's connection at once, and Ollama stops whatever it did. Until the reply
//! begins that can be the wrong moment: a request that its scheduler has not seen leaks a handler (ollama-wire, section 0.4), and
//! a load that is broken off begins again for the next client (0.5). So the error is told to Pingora a little later
//! (`docs/adr/0070-shielded-loads.md`).

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use pingora::prelude::*;
use tokio::time::{Instant, Sleep, sleep_until};

use super::link::Link;
use crate::exchange::Left;

/// How long a client's leaving is kept from the backend.
pub struct Shield {
    /// From when the request was sent.
    pub grace: Duration,
    /// From when the client left, while its model is being loaded. Zero: not at all.
    pub load: Duration,
}

pub struct Leaver {
    until: Pin<Box<Sleep>>,
    error: Option<Box<Error>>,
}

impl Leaver {
    /// `error`: what Pingora is to be told.
    pub fn new(error: Box<Error>, link: &Link, shield: &Shield) -> Leaver {
        let now = Instant::now();
        let shielded = link.is_loading() && !shield.load.is_zero();
        link.note_client_left(if shielded { Left::Shielded } else { Left::AtOnce });
        let load = shielded.then(|| now + shield.load);
        let until = link.cancel_not_before(shield.grace).map(Instant::from_std).max(load);
        Leaver { until: Box::pin(sleep_until(until.unwrap_or(now))), error: Some(error) }
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Box<Error>> {
        self.until.as_mut().poll(cx).map(|()| self.error())
    }

    /// Now: the reply has begun.
    pub fn error(&mut self) -> Box<Error> {
        let told = || Error::explain(ErrorType::ConnectionClosed, "the client has left").into_down();
        self.error.take().unwrap_or_else(told)
    }
}
