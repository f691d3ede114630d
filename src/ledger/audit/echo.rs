//! Standard output beside a file: a copy of what the file holds, on a thread of its own. When it is slow or stuck, lines are left out
//! and counted; the file has them.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Metrics;

/// What may wait for a slow reader. Past it whole groups of lines are left out.
const ROOM_BYTES: usize = 4 << 20;

/// How often the thread looks whether it is still needed.
const IDLE: Duration = Duration::from_secs(1);

pub(super) struct Echo {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    records: u64,
    /// The thread is writing what it took.
    busy: bool,
}

impl Echo {
    pub(super) fn start(stream: File, metrics: Arc<Metrics>) -> io::Result<Arc<Echo>> {
        let echo = Arc::new(Echo { waiting: Mutex::default(), changed: Condvar::new(), metrics });
        let weak = Arc::downgrade(&echo);
        std::thread::Builder::new().name("audit-stdout".to_owned()).spawn(move || run(&weak, stream))?;
        Ok(echo)
    }

    /// Whole lines, already in the file. Never waits.
    pub(super) fn copy(&self, lines: &[u8], records: u64) {
        let mut waiting = self.waiting.lock();
        if waiting.bytes.len() + lines.len() > ROOM_BYTES {
            drop(waiting);
            return self.metrics.audit_dropped("stdout", records);
        }
        waiting.bytes.extend_from_slice(lines);
        waiting.records += records;
        self.metrics.audit_lag("stdout", waiting.records);
        drop(waiting);
        self.changed.notify_all();
    }

    /// Waits until the reader has everything. `false`: not by the deadline.
    pub(super) fn drained(&self, deadline: Instant) -> bool {
        let mut waiting = self.waiting.lock();
        while waiting.busy || !waiting.bytes.is_empty() {
            if self.changed.wait_until(&mut waiting, deadline).timed_out() {
                return !waiting.busy && waiting.bytes.is_empty();
            }
        }
        true
    }
}

fn run(echo: &Weak<Echo>, mut stream: File) {
    let mut bytes = Vec::new();
    loop {
        let Some(echo) = echo.upgrade() else { return };
        let mut waiting = echo.waiting.lock();
        if waiting.bytes.is_empty() {
            echo.changed.wait_for(&mut waiting, IDLE);
        }
        std::mem::swap(&mut bytes, &mut waiting.bytes);
        let records = std::mem::take(&mut waiting.records);
        waiting.busy = !bytes.is_empty();
        drop(waiting);
        if bytes.is_empty() {
            continue;
        }
        if stream.write_all(&bytes).is_err() {
            echo.metrics.audit_dropped("stdout", records);
        }
        bytes.clear();
        let mut waiting = echo.waiting.lock();
        waiting.busy = false;
        echo.metrics.audit_lag("stdout", waiting.records);
        drop(waiting);
        echo.changed.notify_all();
    }
}
