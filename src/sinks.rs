//! Sinks beside the file and standard output: each is sent what the audit's files hold, behind the writer.
//!
//! - [`backlog`]: what a sink still has to get: read from the segments, behind its bookmark.
//! - [`batch`]: lines that are sent together.
//! - [`courier`]: the task of one sink: read, deliver, save the bookmark, or wait and try again.
//! - [`lag`]: how many lines a sink is behind.
//! - [`line`](mod@line), [`answer`], [`host`]: what a line says, what an HTTP answer means, what this machine is called.
//! - [`webhook`]: batches to a URL, signed.
//! - [`syslog`]: lines to a syslog receiver.
//! - [`otlp`]: lines to an OpenTelemetry collector.
//!
//! The file is primary. A sink reads it as `audit tail` does, so a request never waits for one, and one that is down, slow or wrong
//! costs nothing but its own lag: what it does not have is still in the file. Its bookmark (for each writer a segment and a byte) is saved in
//! the state folder after each batch that was taken; what was sent and not saved is sent again, so each line comes at least once, and those
//! of one writer in their order. What retention deletes before it was sent is counted and said. (docs/adr/0040-sinks.md)

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use self::courier::Courier;
use crate::ledger::Metrics;
use crate::ledger::record::Moment;

pub mod answer;
pub mod backlog;
pub mod batch;
pub mod courier;
pub mod host;
pub mod lag;
pub mod line;
pub mod otlp;
pub mod syslog;
pub mod webhook;

pub use backlog::Start;
pub use batch::Batch;
pub use otlp::Otlp;
pub use syslog::Syslog;
pub use webhook::Webhook;

/// What holds for every sink.
#[derive(Clone)]
pub struct SinkSettings {
    /// The audit's folder.
    pub folder: PathBuf,
    /// Where bookmarks are saved: `sinks` in the state folder.
    pub bookmarks: PathBuf,
    /// Where a sink begins that has no bookmark yet.
    pub start: Start,
    /// Before the first line of this process: where one begins that begins now.
    pub since: Moment,
    /// Lines of a batch.
    pub batch_lines: usize,
    /// Of one batch, from first to last.
    pub timeout: Duration,
    /// The longest pause before a batch is sent again.
    pub retry_max: Duration,
}

/// Where batches go. One of each kind at most, so that its name is a word of the code: a file's, and a label's.
pub enum Receiver {
    Webhook(Box<Webhook>),
    Syslog(Syslog),
    Otlp(Box<Otlp>),
}

impl Receiver {
    pub fn name(&self) -> &'static str {
        match self {
            Receiver::Webhook(_) => "webhook",
            Receiver::Syslog(_) => "syslog",
            Receiver::Otlp(_) => "otlp",
        }
    }

    /// Sends a batch, once. It was taken as a whole, or it is sent again.
    pub async fn deliver(&mut self, batch: &Batch, within: Duration) -> Result<Taken, Failure> {
        match self {
            Receiver::Webhook(webhook) => webhook.deliver(batch, within).await.map(|()| Taken::default()),
            Receiver::Syslog(syslog) => syslog.deliver(batch, within).await,
            Receiver::Otlp(otlp) => otlp.deliver(batch, within).await,
        }
    }
}

/// A batch was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// But for so many of its lines, which it would be no use to send again.
    pub refused: u64,
}

/// Why a batch was not taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// For the log. It quotes nothing that the other side said.
    pub why: String,
    /// The other side asks for so long a pause.
    pub retry_after: Option<Duration>,
    /// A smaller batch may be taken.
    pub too_large: bool,
}

impl Failure {
    pub fn new(why: impl Into<String>) -> Failure {
        Failure { why: why.into(), ..Failure::default() }
    }
}

/// The tasks of all sinks. Dropped, they end at once, and lose nothing but the knowledge of what was sent a moment ago.
pub struct Sinks {
    couriers: JoinSet<()>,
    closing: watch::Sender<bool>,
}

impl Sinks {
    /// Starts a task for each. Needs a runtime.
    pub fn start(receivers: Vec<Receiver>, settings: &SinkSettings, metrics: &Arc<Metrics>) -> Sinks {
        let (closing, closed) = watch::channel(false);
        let mut couriers = JoinSet::new();
        for receiver in receivers {
            let series = metrics.audit_sink(receiver.name());
            couriers.spawn(Courier::new(receiver, settings.clone(), series, closed.clone()).run());
        }
        Sinks { couriers, closing }
    }

    /// The audit is closed: each sink gets what it does not have yet, if it takes it at once. What is left is for the next start.
    pub async fn finish(mut self, within: Duration) {
        let _ = self.closing.send(true); // nobody listens: there are no sinks
        let all = async { while self.couriers.join_next().await.is_some() {} };
        if tokio::time::timeout(within, all).await.is_err() {
            log::info!("audit: a sink does not have the last lines; the next start sends them");
        }
    }
}
