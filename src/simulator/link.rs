//! One connection's socket: bytes in, bytes out, and an eye on whether the client is still there.
//!
//! Whenever the simulator waits (for a token's time, in a stall, for room in the kernel's buffer) it also waits for the
//! client's FIN or RST, so that the moment in which it notices is the moment in which a real backend could stop work.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::net::TcpStream;

use super::text;
use super::witness::Witnesses;

/// The client left, and when that was noticed. A half-close counts: Ollama takes it for the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone {
    pub at: Instant,
}

/// Bytes that a client may send ahead of its turn before the simulator stops looking. Past that it cannot see a FIN.
const MOST_AHEAD_BYTES: usize = 64 * 1024;
const READ_BYTES: usize = 16 * 1024;

pub(super) struct Link {
    stream: TcpStream,
    /// What came and is not used yet.
    pub inbox: BytesMut,
    /// Send byte by byte, with this pause between bytes.
    pub drip: Option<Duration>,
    gone: Option<Gone>,
    witnesses: Arc<Witnesses>,
    date: (u64, String),
}

impl Link {
    pub fn new(stream: TcpStream, witnesses: Arc<Witnesses>) -> Link {
        // Without this the second small write of a stream waits 40 ms for the client's delayed acknowledgement.
        let _ = stream.set_nodelay(true);
        Link { stream, inbox: BytesMut::new(), drip: None, gone: None, witnesses, date: (u64::MAX, String::new()) }
    }

    /// Waits for more bytes in the inbox.
    pub async fn receive(&mut self) -> Result<(), Gone> {
        loop {
            if self.take_in()? {
                return Ok(());
            }
            if self.stream.readable().await.is_err() {
                return Err(self.leave());
            }
        }
    }

    /// Sends everything; gives up when the client leaves.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        match self.drip {
            None => self.push(bytes).await,
            Some(pause) => {
                for byte in bytes {
                    self.push(std::slice::from_ref(byte)).await?;
                    if pause.is_zero() {
                        tokio::task::yield_now().await;
                    } else {
                        self.wait(pause).await?;
                    }
                }
                Ok(())
            }
        }
    }

    async fn push(&mut self, mut bytes: &[u8]) -> Result<(), Gone> {
        while !bytes.is_empty() {
            match self.stream.try_write(bytes) {
                Ok(sent) => {
                    self.witnesses.sent_bytes.fetch_add(sent as u64, Ordering::Relaxed);
                    bytes = &bytes[sent..];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.inbox.len() >= MOST_AHEAD_BYTES {
                        if self.stream.writable().await.is_err() {
                            return Err(self.leave());
                        }
                        continue;
                    }
                    tokio::select! {
                        writable = self.stream.writable() => if writable.is_err() { return Err(self.leave()); },
                        _ = self.stream.readable() => { self.take_in()?; }
                    }
                }
                Err(_) => return Err(self.leave()),
            }
        }
        Ok(())
    }

    /// Waits that long, or until the client leaves.
    pub async fn wait(&mut self, time: Duration) -> Result<(), Gone> {
        self.wait_until(tokio::time::Instant::now() + time).await
    }

    pub async fn wait_until(&mut self, until: tokio::time::Instant) -> Result<(), Gone> {
        tokio::select! {
            gone = self.left() => Err(gone),
            () = tokio::time::sleep_until(until) => Ok(()),
        }
    }

    /// Waits until the client leaves.
    pub async fn left(&mut self) -> Gone {
        loop {
            if let Err(gone) = self.take_in() {
                return gone;
            }
            if self.inbox.len() >= MOST_AHEAD_BYTES {
                std::future::pending::<()>().await;
            }
            if self.stream.readable().await.is_err() {
                return self.leave();
            }
        }
    }

    /// Looks without waiting. Costs no system call unless the kernel has reported something.
    pub fn look(&mut self) -> Result<(), Gone> {
        while self.inbox.len() < MOST_AHEAD_BYTES && self.take_in()? {}
        Ok(())
    }

    /// Reads what is there. True if something was.
    fn take_in(&mut self) -> Result<bool, Gone> {
        if let Some(gone) = self.gone {
            return Err(gone);
        }
        self.inbox.reserve(READ_BYTES);
        match self.stream.try_read_buf(&mut self.inbox) {
            Ok(0) => Err(self.leave()),
            Ok(read) => {
                self.witnesses.received_bytes.fetch_add(read as u64, Ordering::Relaxed);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(_) => Err(self.leave()),
        }
    }

    fn leave(&mut self) -> Gone {
        *self.gone.get_or_insert(Gone { at: Instant::now() })
    }

    /// The `Date` of now, made once a second.
    pub fn date(&mut self) -> &str {
        let now = text::unix_now().as_secs();
        if self.date.0 != now {
            self.date = (now, text::http_date(now));
        }
        &self.date.1
    }

    /// Closes with a reset instead of an end.
    pub fn reset(self) {
        let _ = self.stream.set_zero_linger();
    }

    /// Closes so that the client can still read what was sent: the kernel answers unread input with a reset, which would
    /// throw away what the client has not read, so the input is dropped for a moment first.
    pub async fn close(mut self) {
        use tokio::io::AsyncWriteExt as _;
        let _ = self.stream.shutdown().await;
        let until = tokio::time::Instant::now() + Duration::from_millis(500);
        let drain = async {
            loop {
                self.inbox.clear();
                if self.receive().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout_at(until, drain).await;
    }
}
