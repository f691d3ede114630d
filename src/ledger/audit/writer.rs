//! The thread that owns the file, and the watch over it.

use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::echo::Echo;
use super::sink::Sink;
use super::{Kind, Line, Phase, Shared, refuse_waiting};
use crate::ledger::chain::{self, Head};

/// How often the file's name is looked up, and what strangers left is written. Twice in the second within which a file that was
/// renamed or removed has to be noticed.
const CHECK_EVERY: Duration = Duration::from_millis(400);

/// At most this much in one write(2), so that a long backlog on a slow disk is not taken for a write that hangs.
const WRITE_BYTES: usize = 1 << 20;

/// Memory of a buffer that is kept for the next group.
const KEPT_BYTES: usize = 1 << 20;

pub(super) fn start(shared: Arc<Shared>, sink: Sink, echo: Option<Arc<Echo>>) -> io::Result<()> {
    let watched = Arc::downgrade(&shared);
    let tick = (shared.settings.patience / 4).clamp(Duration::from_millis(5), Duration::from_millis(250));
    std::thread::Builder::new().name("audit-watch".to_owned()).spawn(move || watch(&watched, tick))?;
    let writer = Writer {
        shared,
        sink,
        echo,
        events: Vec::new(),
        head: Head::Genesis,
        bytes: Vec::new(),
        start: 0,
        torn: 0,
        failing: false,
    };
    std::thread::Builder::new().name("audit".to_owned()).spawn(move || writer.run())?;
    Ok(())
}

/// Refuses those who wait for a write that hangs: the thread itself is inside it and cannot. (A timer for each request would cost
/// more than everything else here.)
fn watch(shared: &Weak<Shared>, tick: Duration) {
    loop {
        std::thread::sleep(tick);
        let Some(shared) = shared.upgrade() else { return };
        let mut writing = shared.writing.lock();
        if writing.since.is_some_and(|since| since.elapsed() > shared.settings.patience) {
            refuse_waiting(&mut writing.lines);
            // Under both locks: the thread, when its write returns after all, resets this afterwards.
            let mut queue = shared.queue.lock();
            refuse_waiting(&mut queue.lines);
            if !std::mem::replace(&mut queue.failing, true) {
                shared.metrics.audit_failing(true);
                log::error!(
                    "audit: a write has been hanging for {:?}; new requests are refused",
                    shared.settings.patience
                );
            }
        }
        if shared.queue.lock().done {
            return;
        }
    }
}

struct Writer {
    shared: Arc<Shared>,
    sink: Sink,
    echo: Option<Arc<Echo>>,
    /// Memory for what is taken from the queue.
    events: Vec<u8>,
    /// The last line that was taken from the queue.
    head: Head,
    /// What was taken from the queue, sealed; its lines are in `shared.writing`.
    bytes: Vec<u8>,
    /// Where the first line that is not wholly written begins in `bytes`.
    start: usize,
    /// How much of that line is in the sink already.
    torn: usize,
    failing: bool,
}

impl Writer {
    fn run(mut self) {
        let mut checked = Instant::now();
        loop {
            let closing = self.take();
            let mut result = Ok(());
            if self.failing || checked.elapsed() >= CHECK_EVERY {
                checked = Instant::now();
                result = self.check();
            }
            let result = result.and_then(|()| self.write());
            self.report(result);
            if closing && self.close() {
                return;
            }
        }
    }

    /// Waits for work and takes it over. Says whether the end was asked for.
    fn take(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut queue = shared.queue.lock();
        if self.failing {
            shared.work.wait_for(&mut queue, shared.settings.retry_every);
        } else {
            // First as long as final records may wait for company; if nothing came in that time, until something does.
            let until = Instant::now() + shared.settings.linger;
            while !queue.urgent && !shared.work.wait_until(&mut queue, until).timed_out() {}
            if queue.lines.is_empty() && !queue.urgent {
                queue.asleep = true;
                shared.work.wait_for(&mut queue, CHECK_EVERY);
                queue.asleep = false;
            }
        }
        queue.urgent = false;
        let closing = queue.closing;
        let mut events = std::mem::take(&mut self.events);
        std::mem::swap(&mut events, &mut queue.bytes);
        let mut lines = std::mem::take(&mut queue.lines);
        drop(queue);
        if self.bytes.is_empty() {
            self.bytes.shrink_to(KEPT_BYTES);
        }
        let mut at = 0;
        for line in &mut lines {
            let event = &events[at..at + line.len_bytes];
            at += line.len_bytes;
            let begun = self.bytes.len();
            if !event.is_empty() {
                self.head = chain::seal(event, self.head, &mut self.bytes);
            }
            line.len_bytes = self.bytes.len() - begun;
        }
        events.clear();
        events.shrink_to(KEPT_BYTES);
        self.events = events;
        if lines.is_empty() {
            return closing;
        }
        let mut writing = shared.writing.lock();
        if writing.lines.is_empty() {
            std::mem::swap(&mut writing.lines, &mut lines);
            // The emptied one goes back, with its memory, unless somebody was faster.
            drop(writing);
            let mut queue = shared.queue.lock();
            if queue.lines.capacity() == 0 && lines.capacity() <= KEPT_BYTES / size_of::<Line>() {
                queue.lines = lines;
            }
        } else {
            writing.lines.append(&mut lines);
        }
        closing
    }

    /// Once in a while: is the file still the one under its name; what did strangers leave; what was lost.
    fn check(&mut self) -> io::Result<()> {
        let due = self.shared.fold.lock().due(self.shared.started.elapsed().as_secs());
        self.shared.write_folded(due);
        self.shared.write_lost();
        if self.sink.reopened()? {
            self.torn = 0;
        }
        Ok(())
    }

    /// Writes all that was taken.
    fn write(&mut self) -> io::Result<()> {
        loop {
            let from = self.start + self.torn;
            let upto = self.bytes.len().min(from + WRITE_BYTES);
            if from < upto {
                self.shared.writing.lock().since = Some(Instant::now());
            }
            let (written, result) = self.sink.write(&self.bytes[from..upto]);
            self.written(self.torn + written);
            if let Err(error) = result {
                if self.torn > 0 && self.sink.cut(self.torn as u64) {
                    self.torn = 0;
                }
                self.bytes.drain(..self.start);
                self.start = 0;
                return Err(error);
            }
            if self.start == self.bytes.len() {
                self.bytes.clear();
                self.start = 0;
                return Ok(());
            }
        }
    }

    /// Counted from `start`, `bytes` bytes are in the sink: answers for the whole lines among them.
    fn written(&mut self, bytes: usize) {
        let begin = self.start;
        let end = begin + bytes;
        if self.failing && end == self.bytes.len() {
            // Before anyone learns that their line is written: they may ask for more at once.
            self.report(Ok(()));
        }
        let (mut lines, mut loose, mut phases) = (0, 0, [0; Phase::ALL.len()]);
        let mut writing = self.shared.writing.lock();
        writing.since = None;
        for line in &writing.lines {
            if self.start + line.len_bytes > end {
                break;
            }
            self.start += line.len_bytes;
            lines += 1;
            loose += usize::from(matches!(line.kind, Kind::Loose));
            if let Some(phase) = line.kind.phase() {
                phases[phase as usize] += 1;
            }
        }
        self.torn = end - self.start;
        let records: u64 = phases.iter().sum();
        if records > 0 {
            let mut queue = self.shared.queue.lock();
            queue.used -= records as usize;
            queue.loose -= loose;
            drop(queue);
            self.shared.metrics.audit_written(phases);
        }
        for line in writing.lines.drain(..lines) {
            // Where nobody waits any more, sending fails: their room is free already.
            let _ = match line.kind {
                Kind::Request(Some(waiting)) | Kind::Mark(waiting) => waiting.send(()),
                Kind::Request(None) | Kind::StreamStart | Kind::Final | Kind::Loose => Ok(()),
            };
        }
        drop(writing);
        if records > 0 {
            let lines = &self.bytes[begin..self.start];
            if let Some(echo) = &self.echo {
                echo.copy(lines, records);
            }
            self.shared.activity.publish(lines);
        }
    }

    /// Lets callers know whether requests can be taken.
    fn report(&mut self, result: io::Result<()>) {
        let shared = &self.shared;
        let failing = result.is_err();
        let mut writing = shared.writing.lock();
        let mut queue = shared.queue.lock();
        if failing {
            refuse_waiting(&mut writing.lines);
            refuse_waiting(&mut queue.lines);
        }
        let before = std::mem::replace(&mut queue.failing, failing);
        let behind = (writing.lines.len() + queue.lines.len()) as u64;
        drop((writing, queue));
        self.failing = failing;
        shared.metrics.audit_lag("file", behind);
        if before == failing {
            return;
        }
        shared.metrics.audit_failing(failing);
        match result {
            Err(error) => log::error!("audit: cannot write to {}: {error}; new requests are refused", self.sink),
            Ok(()) => log::info!("audit: {} can be written again", self.sink),
        }
    }

    /// Ends, if nothing is left to write or to come.
    fn close(&mut self) -> bool {
        let left = self.shared.fold.lock().drain();
        self.shared.write_folded(left);
        self.shared.write_lost();
        let mut queue = self.shared.queue.lock();
        queue.done = queue.open == 0 && queue.lines.is_empty() && self.bytes.is_empty();
        if queue.done {
            self.shared.done.notify_all();
        } else if queue.open == 0 && !self.failing {
            queue.urgent = true;
        }
        queue.done
    }
}
