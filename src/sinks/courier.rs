//! The task of one sink: read, deliver, save the bookmark; or wait, and try the same again.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::Rng;
use tokio::sync::watch;

use super::backlog::{Backlog, Bookmark, Read};
use super::lag::Lag;
use super::{Batch, Failure, Receiver, SinkSettings, Taken};
use crate::identity::private_file::{make_folder, try_lock};
use crate::ledger::SinkMetrics;

/// How often a folder in which nothing was new is looked at. A batch then has what half a second brings.
const POLL: Duration = Duration::from_millis(500);
/// How often another process that delivers is asked whether it still does, and the lag is measured.
const LOOK: Duration = Duration::from_secs(1);
/// The pause after the first failure.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

pub struct Courier {
    receiver: Receiver,
    settings: SinkSettings,
    metrics: Arc<SinkMetrics>,
    closing: watch::Receiver<bool>,
    /// Lines of a batch: fewer once the other side said that it was too large.
    most_lines: usize,
    /// The words of the failure that was logged last.
    failing: Option<String>,
    /// That the bookmark cannot be saved was logged.
    unsaved: bool,
}

/// What the measuring of the lag has to know.
struct Known {
    /// Behind what the sink has taken.
    bookmark: Bookmark,
    /// The time stamp of the first line of the batch in hand.
    oldest: Option<String>,
}

impl Known {
    /// The batch in hand was taken. Whether that changed the bookmark.
    fn has_moved_to(&mut self, bookmark: &Bookmark) -> bool {
        self.oldest = None;
        let moved = self.bookmark != *bookmark;
        if moved {
            self.bookmark.clone_from(bookmark);
        }
        moved
    }
}

impl Courier {
    pub fn new(
        receiver: Receiver,
        settings: SinkSettings,
        metrics: SinkMetrics,
        closing: watch::Receiver<bool>,
    ) -> Courier {
        let most_lines = settings.batch_lines;
        Courier { receiver, settings, metrics: Arc::new(metrics), closing, most_lines, failing: None, unsaved: false }
    }

    /// Until it is told to close and has delivered everything, or cannot.
    pub async fn run(mut self) {
        let Some(_alone) = self.take_turn().await else { return };
        let SinkSettings { folder, start, since, .. } = self.settings.clone();
        let saved_at = self.settings.bookmarks.join(format!("{}.json", self.receiver.name()));
        let Ok(mut backlog) = off_the_runtime(move || Backlog::open(&folder, saved_at, start, since)).await else {
            return;
        };
        let known = Arc::new(Mutex::new(Known { bookmark: backlog.bookmark().clone(), oldest: None }));
        let _measuring = AbortOnDrop(tokio::spawn(measure(
            self.settings.folder.clone(),
            Arc::clone(&known),
            Arc::clone(&self.metrics),
        )));
        loop {
            // Seen before the folder is: what was written before it was said is found.
            let closing = *self.closing.borrow();
            let most_lines = self.most_lines;
            let Ok((read, back)) = off_the_runtime(move || (backlog.read(most_lines), backlog)).await else { return };
            backlog = back;
            let Read { batch, lost, more } = match read {
                Ok(read) => read,
                Err(why) => {
                    self.failed(&why.to_string());
                    if closing {
                        return;
                    }
                    self.pause(POLL).await;
                    continue;
                }
            };
            if lost > 0 {
                self.metrics.dropped(lost);
                log::error!("audit: {lost} lines were deleted before the {} had them", self.receiver.name());
            }
            known.lock().oldest = batch.oldest().map(str::to_owned);
            if !batch.is_empty() && !self.deliver(batch).await {
                return;
            }
            if known.lock().has_moved_to(backlog.bookmark()) {
                let saving = off_the_runtime(move || (backlog.save().map_err(|e| e.to_string()), backlog));
                let Ok((saved, back)) = saving.await else { return };
                backlog = back;
                self.saved(saved);
            }
            if !more {
                if closing {
                    return;
                }
                self.pause(POLL).await;
            }
        }
    }

    /// Two processes may share a folder: one of them delivers, and the other goes on where it ended. `None`: told to close.
    async fn take_turn(&mut self) -> Option<std::fs::File> {
        let path = self.settings.bookmarks.join(format!("{}.lock", self.receiver.name()));
        let mut told = false;
        loop {
            let (path, shown) = (path.clone(), path.clone());
            match off_the_runtime(move || lock(&path)).await.ok()? {
                Ok(Some(alone)) => return Some(alone),
                Ok(None) if !told => log::info!("audit: another process delivers to the {}", self.receiver.name()),
                Err(why) if !told => log::error!("audit: {}: {why}; nothing is delivered", shown.display()),
                _ => {}
            }
            told = true;
            if self.pause(LOOK).await {
                return None;
            }
        }
    }

    /// Sends the batch until it is taken. `false`: told to close meanwhile.
    async fn deliver(&mut self, batch: Batch) -> bool {
        let mut pieces = VecDeque::from([batch]);
        let mut pause = FIRST_PAUSE;
        while let Some(piece) = pieces.front() {
            match self.receiver.deliver(piece, self.settings.timeout).await {
                Ok(Taken { refused }) => {
                    self.metrics.delivered((piece.len() as u64).saturating_sub(refused));
                    if refused > 0 {
                        self.metrics.dropped(refused);
                        log::error!("audit: the {} cannot take {refused} lines", self.receiver.name());
                    }
                    if self.failing.take().is_some() {
                        log::info!("audit: the {} takes lines again", self.receiver.name());
                    }
                    pieces.pop_front();
                    pause = FIRST_PAUSE;
                }
                Err(failure) => {
                    self.failed(&failure.why);
                    if failure.too_large && piece.len() > 1 {
                        let (first, second) = piece.halves();
                        self.most_lines = first.len();
                        pieces.pop_front();
                        pieces.push_front(second);
                        pieces.push_front(first);
                        continue;
                    }
                    if *self.closing.borrow() || self.pause(jittered(pause, &failure, self.settings.retry_max)).await {
                        return false;
                    }
                    pause = (pause * 2).min(self.settings.retry_max);
                }
            }
        }
        true
    }

    fn failed(&mut self, why: &str) {
        self.metrics.failed();
        if self.failing.as_deref() != Some(why) {
            log::warn!("audit: the {} does not have the next lines: {why}; they are sent again", self.receiver.name());
            self.failing = Some(why.to_owned());
        }
    }

    fn saved(&mut self, saved: Result<(), String>) {
        if let Err(why) = &saved
            && !self.unsaved
        {
            log::error!(
                "audit: the bookmark of the {} is not saved ({why}); a restart sends again",
                self.receiver.name()
            );
        }
        self.unsaved = saved.is_err();
    }

    /// `true`: told to close.
    async fn pause(&mut self, pause: Duration) -> bool {
        let closed = self.closing.wait_for(|closing| *closing);
        tokio::time::timeout(pause, closed).await.is_ok() // who could tell is gone: the same
    }
}

/// Half to all of the pause, so that many proxies do not come back at once; what the other side asked for, up to the longest pause, is kept.
fn jittered(pause: Duration, failure: &Failure, longest: Duration) -> Duration {
    let pause = pause.min(longest).mul_f64(rand::thread_rng().gen_range(0.5..=1.0));
    pause.max(failure.retry_after.unwrap_or_default().min(longest))
}

/// `None`: another process holds it.
fn lock(path: &Path) -> io::Result<Option<std::fs::File>> {
    if let Some(folder) = path.parent() {
        make_folder(folder).map_err(io::Error::other)?;
    }
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    Ok(try_lock(&file)?.then_some(file))
}

/// Sets the lag, once in a while, also while a batch is not taken.
async fn measure(folder: std::path::PathBuf, known: Arc<Mutex<Known>>, metrics: Arc<SinkMetrics>) {
    let mut lag = Lag::new(folder);
    let mut all_there = Instant::now();
    loop {
        let about = Arc::clone(&known);
        let measured = off_the_runtime(move || {
            let (bookmark, oldest) = {
                let known = about.lock();
                (known.bookmark.clone(), known.oldest.clone())
            };
            (lag.measure(&bookmark), oldest, lag)
        });
        let Ok((behind, oldest, back)) = measured.await else { return };
        lag = back;
        match behind {
            Ok(0) => {
                all_there = Instant::now();
                metrics.behind(0, 0);
            }
            Ok(lines) => {
                let age = oldest.as_deref().and_then(age).unwrap_or_else(|| all_there.elapsed());
                metrics.behind(lines, age.as_secs());
            }
            Err(_) => {} // the courier reads the same files, and says so
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn age(timestamp: &str) -> Option<Duration> {
    let then: jiff::Timestamp = timestamp.parse().ok()?;
    Some(jiff::Timestamp::now().duration_since(then).try_into().unwrap_or_default())
}

async fn off_the_runtime<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ()> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ())
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
