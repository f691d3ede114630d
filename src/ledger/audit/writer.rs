//! The thread that owns the file, and the watch over it.

use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::echo::Echo;
use super::sink::Sink;
use super::{Durability, Kind, Line, Phase, Shared, refuse_waiting};

/// How often the sink is asked what is due (the file's name is looked up), and what strangers left is written. Twice in the second within which a file that was
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
    let writer = Writer { shared, sink, echo, events: Vec::new(), failing: false };
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
    /// What was taken from the queue and is not written; its lines are in `shared.writing`.
    events: Vec<u8>,
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
            let result = result.and_then(|()| self.write()).and_then(|()| self.sync_if_due());
            self.report(result);
            if closing && self.close() {
                return;
            }
        }
    }

    /// Waits for work and takes it over. Says whether the end was asked for.
    fn take(&mut self) -> bool {
        let shared = &self.shared;
        let mut queue = shared.queue.lock();
        if self.failing {
            shared.work.wait_for(&mut queue, shared.settings.retry_every);
        } else {
            // First as long as final records may wait for company; if nothing came in that time, until something does.
            let until = Instant::now() + shared.settings.linger;
            while !queue.urgent && !shared.work.wait_until(&mut queue, until).timed_out() {}
            if queue.lines.is_empty() && !queue.urgent {
                let until = Instant::now() + CHECK_EVERY;
                let until = self.sink.sync_due().map_or(until, |due| due.min(until));
                queue.asleep = true;
                shared.work.wait_until(&mut queue, until);
                queue.asleep = false;
            }
        }
        queue.urgent = false;
        let closing = queue.closing;
        if self.events.is_empty() {
            self.events.shrink_to(KEPT_BYTES);
            std::mem::swap(&mut self.events, &mut queue.bytes);
        } else {
            self.events.append(&mut queue.bytes);
        }
        let mut lines = std::mem::take(&mut queue.lines);
        drop(queue);
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

    /// Once in a while: what the sink does by the clock; what did strangers leave; what was lost.
    fn check(&mut self) -> io::Result<()> {
        let due = self.shared.fold.lock().due(self.shared.started.elapsed().as_secs());
        self.shared.write_folded(due);
        self.shared.write_lost();
        self.begin();
        let result = self.sink.tick();
        self.shared.writing.lock().since = None;
        result
    }

    /// From now on the watch counts.
    fn begin(&self) {
        self.shared.writing.lock().since = Some(Instant::now());
    }

    /// Writes all that was taken, in groups.
    fn write(&mut self) -> io::Result<()> {
        let mut begin = 0;
        let result = loop {
            let group = self.group();
            if group.lines == 0 {
                break Ok(());
            }
            let mut end = begin;
            let events: Vec<&[u8]> = group
                .lengths
                .iter()
                .map(|length| {
                    let event = &self.events[end..end + length];
                    end += length;
                    event
                })
                .collect();
            let appended = self.sink.append(&events, group.durably);
            let whole = appended.result.is_ok();
            begin += group.lengths[..appended.lines].iter().sum::<usize>();
            if self.failing && whole && begin == self.events.len() {
                // Before anyone learns that their line is written: they may ask for more at once.
                self.report(Ok(()));
            }
            self.written(appended.lines, whole || !group.durably);
            if let Err(error) = appended.result {
                break Err(error);
            }
        };
        self.events.drain(..begin);
        result
    }

    /// What is written with one call: the lines at the front of `shared.writing`.
    fn group(&self) -> Group {
        let strict = self.shared.settings.durability == Durability::Strict;
        let mut group = Group::default();
        let mut bytes = 0;
        let mut writing = self.shared.writing.lock();
        for line in &writing.lines {
            if bytes > 0 && bytes + line.len_bytes > WRITE_BYTES {
                break;
            }
            bytes += line.len_bytes;
            group.lines += 1;
            if line.len_bytes > 0 {
                group.lengths.push(line.len_bytes);
                group.durably |= match line.kind {
                    Kind::Request(_) => strict,
                    Kind::Mark(_) => true,
                    Kind::StreamStart | Kind::Final | Kind::Loose => false,
                };
            }
        }
        if group.lines > 0 {
            writing.since = Some(Instant::now());
        }
        group
    }

    /// The first `written` lines with bytes, and what stands before the next one, are in the sink: answers for them. Where they are not
    /// `durable`, although that was asked for, those who wait are refused.
    fn written(&mut self, written: usize, durable: bool) {
        let (mut lines, mut left, mut loose, mut phases) = (0, written, 0, [0; Phase::ALL.len()]);
        let mut writing = self.shared.writing.lock();
        writing.since = None;
        for line in &writing.lines {
            if line.len_bytes > 0 && left == 0 {
                break;
            }
            left -= usize::from(line.len_bytes > 0);
            lines += 1;
            loose += usize::from(matches!(line.kind, Kind::Loose));
            if let Some(phase) = line.kind.phase() {
                phases[phase as usize] += 1;
            }
        }
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
                Kind::Request(Some(waiting)) | Kind::Mark(waiting) if durable => waiting.send(()),
                _ => Ok(()),
            };
        }
        drop(writing);
        if records > 0 {
            let lines = self.sink.lines();
            if let Some(echo) = &self.echo {
                echo.copy(lines, records);
            }
            self.shared.activity.publish(lines);
        }
    }

    fn sync_if_due(&mut self) -> io::Result<()> {
        if self.sink.sync_due().is_none_or(|due| due > Instant::now()) {
            return Ok(());
        }
        self.begin();
        let result = self.sink.sync();
        self.shared.writing.lock().since = None;
        result
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
        queue.done = queue.open == 0 && queue.lines.is_empty() && self.events.is_empty();
        if !queue.done {
            if queue.open == 0 && !self.failing {
                queue.urgent = true;
            }
            return false;
        }
        drop(queue);
        if let Err(error) = self.sink.close() {
            log::error!("audit: {} could not be closed in order: {error}", self.sink);
        }
        self.shared.queue.lock().ended = true;
        self.shared.done.notify_all();
        true
    }
}

/// Lines that are written together.
#[derive(Default)]
struct Group {
    lines: usize,
    /// Of those that have bytes.
    lengths: Vec<usize>,
    /// They count only once they are on the disk.
    durably: bool,
}
