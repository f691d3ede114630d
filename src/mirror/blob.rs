//! One blob: fetched once, whoever asks and how often; read while it grows; verified before its last byte is given out.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::registry::Registry;
use super::store::Reservation;
use super::{Fault, hex};
use crate::ledger::Metrics;

/// A registry that says nothing for so long has gone.
const SILENCE: Duration = Duration::from_secs(60);
/// Read from the file at once.
const PIECE_BYTES: u64 = 256 << 10;

pub(super) struct Blob {
    pub digest: String,
    pub size: u64,
    wished: AtomicBool,
    file: OnceLock<Arc<File>>,
    /// What may be read: all but the last byte, until the whole is verified. A part that is wrong is then whole nowhere.
    readable: watch::Sender<u64>,
}

impl Blob {
    pub fn new(digest: &str, size: u64) -> Blob {
        Blob {
            digest: digest.to_owned(),
            size,
            wished: AtomicBool::new(false),
            file: OnceLock::new(),
            readable: watch::Sender::new(0),
        }
    }

    /// True once.
    pub fn is_first_wish(&self) -> bool {
        !self.wished.swap(true, Ordering::AcqRel)
    }

    pub async fn fetch(&self, registry: &Registry, room: &Reservation, metrics: &Metrics) -> Result<(), Fault> {
        let file = Arc::new(room.file().await.map_err(|_| Fault::Disk)?);
        let file = self.file.get_or_init(|| file);
        let mut reply = registry.blob(&self.digest).await?;
        let announced =
            reply.headers.get(http::header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: u64| length != self.size) {
            return Err(Fault::WrongBytes);
        }
        let (mut hasher, mut written) = (Sha256::new(), 0_u64);
        while let Some(bytes) = reply.next(SILENCE).await.map_err(Fault::Outbound)? {
            let end =
                written.checked_add(bytes.len() as u64).filter(|end| *end <= self.size).ok_or(Fault::WrongBytes)?;
            metrics.mirror_fetched(bytes.len() as u64);
            let (file, at) = (Arc::clone(file), written);
            let work = move || {
                hasher.update(&bytes);
                file.write_all_at(&bytes, at).map(|()| hasher)
            };
            let done = tokio::task::spawn_blocking(work).await.map_err(|_| Fault::Disk)?;
            hasher = done.map_err(|_| Fault::Disk)?;
            written = end;
            self.readable.send_replace(written.min(self.size.saturating_sub(1)));
        }
        if written != self.size || format!("sha256:{}", hex(&hasher.finalize())) != self.digest {
            return Err(Fault::WrongBytes);
        }
        self.readable.send_replace(self.size);
        Ok(())
    }

    /// Some of the bytes from `at` to `end`, once the first of them is there. Waits for ever where it never will be.
    pub async fn piece(&self, at: u64, end: u64) -> io::Result<Bytes> {
        let mut readable = self.readable.subscribe();
        let there = *readable.wait_for(|there| *there > at).await.map_err(io::Error::other)?;
        let length = end.min(there).min(at + PIECE_BYTES) - at;
        let file = self.file.get().map(Arc::clone).ok_or_else(|| io::Error::other("no file"))?;
        let read = move || {
            let mut bytes = BytesMut::zeroed(length as usize); // PIECE_BYTES at most
            file.read_exact_at(&mut bytes, at).map(|()| bytes.freeze())
        };
        tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
    }
}
