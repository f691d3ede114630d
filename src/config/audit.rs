//! `[audit]`: where the records go, how sure they are, and how long they stay.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::syslog::Syslog;
use super::{ConfigError, ServiceUrl, values};

/// What a crash may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Nothing when the process dies; what the kernel had not written when the power is lost.
    Write,
    /// Nothing when the process dies; `fsync_ms` when the power is lost.
    Fsync,
    /// Nothing: the `request` record is on the disk before the backend is contacted.
    Strict,
}

/// `[audit]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Audit {
    /// Folder of the audit files. Empty: `audit` in the state folder. Variable `BEHAVRY_AUDIT_DIR`.
    pub dir: PathBuf,
    /// Write each record to standard output as well. Default true: the journal and containers collect it there.
    pub stdout: bool,
    /// Records for which room may be promised or taken at once; past it new requests are refused (503). A request takes
    /// three. Default 65536, enough for `limits.in_flight` twice over.
    #[serde(deserialize_with = "values::whole::<_, _, 16, 16_777_216>")]
    pub room_records: usize,
    /// Refusals without a caller that one client address gets a record each for, per second; the rest are counted in
    /// one record. Default 10.
    #[serde(deserialize_with = "values::whole::<_, _, 0, 1_000_000>")]
    pub refusals_per_second: u32,
    /// `write`, `fsync` or `strict`. Default `fsync`: no request waits for the disk, and a loss of power takes one second at most.
    pub durability: Durability,
    /// The longest that a record is written and not synced, with `fsync`; with `strict`, for records that nobody waits for.
    /// Default 1000 ms: a disk that spins is then busy with it for some hundredths of the time.
    #[serde(
        rename = "fsync_ms",
        deserialize_with = "values::millis::<_, 1, 60_000>",
        serialize_with = "values::as_millis"
    )]
    pub fsync: Duration,
    /// A segment is closed, and the next one opened, when it has this many bytes. Default 256 MiB, some 300,000 records: a file that
    /// tools still open at once.
    #[serde(deserialize_with = "values::whole::<_, _, 4096, 0x100_0000_0000>")]
    pub rotate_bytes: u64,
    /// A segment with records is closed when it is this old. Default 86400 s: a day a file.
    #[serde(
        rename = "rotate_age_s",
        deserialize_with = "values::seconds::<_, 1, 31_536_000>",
        serialize_with = "values::as_seconds"
    )]
    pub rotate_age: Duration,
    /// Segments whose last record is older are deleted, and a signed tombstone says so. Default 0, for ever: what an auditor may
    /// ask for is the operator's to say.
    #[serde(deserialize_with = "values::whole::<_, _, 0, 36_500>")]
    pub keep_days: u32,
    /// While the segments together have more bytes, the oldest is deleted, likewise. At least twice `rotate_bytes`. Default 0, no
    /// bound.
    #[serde(deserialize_with = "values::whole::<_, _, 0, 0x1_0000_0000_0000>")]
    pub keep_bytes: u64,
    /// Between two signed checkpoints, if something was written. Default 60 s: what is cut off the end of a chain without a trace is
    /// a minute's records at most.
    #[serde(
        rename = "checkpoint_s",
        deserialize_with = "values::seconds::<_, 1, 86_400>",
        serialize_with = "values::as_seconds"
    )]
    pub checkpoint: Duration,
    /// Checkpoints are appended to this file too. Best on another disk, or another machine's. Empty: only in the segments.
    pub checkpoint_file: PathBuf,
    pub sinks: Sinks,
    pub webhook: Webhook,
    pub syslog: Syslog,
    pub otlp: Otlp,
}

/// Where a sink begins that has never had anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// With the oldest line that the folder holds.
    Beginning,
    /// With what is written from then on.
    Now,
}

/// `[audit.sinks]`: what holds for every sink that is sent the audit from its files, whichever are configured below.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Sinks {
    /// `beginning` or `now`. Default `beginning`: a sink has all that the folder has.
    pub start: Start,
    /// Lines sent at once, and held in memory for each sink; a MiB of them at most. Default 500: few enough to be sent again without
    /// harm, many enough to catch up at some thousand lines a second.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 10_000>")]
    pub batch_lines: usize,
    /// For one batch, from the look-up of the name to the answer. Default 10 s: a collector that is alive takes milliseconds.
    #[serde(
        rename = "timeout_s",
        deserialize_with = "values::seconds::<_, 1, 600>",
        serialize_with = "values::as_seconds"
    )]
    pub timeout: Duration,
    /// The longest pause before a batch that was not taken is sent again; the first is below a second, and each is twice the one
    /// before. Default 60 s: a sink that is back is noticed within a minute, and one that is down is asked once a minute.
    #[serde(
        rename = "retry_max_s",
        deserialize_with = "values::seconds::<_, 1, 3_600>",
        serialize_with = "values::as_seconds"
    )]
    pub retry_max: Duration,
}

impl Default for Sinks {
    fn default() -> Sinks {
        Sinks {
            start: Start::Beginning,
            batch_lines: 500,
            timeout: Duration::from_secs(10),
            retry_max: Duration::from_secs(60),
        }
    }
}

/// `[audit.webhook]`: lines in batches to a URL, signed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Webhook {
    /// Where batches are posted to, `https` or `http` to this machine. Empty: no webhook.
    #[serde(deserialize_with = "ServiceUrl::deserialize", serialize_with = "ServiceUrl::serialize_redacted")]
    pub url: Option<ServiceUrl>,
    /// File with the secret that signs them, 32 bytes at least, readable by nobody else. Needed with `url`.
    pub secret_file: PathBuf,
    /// PEM file with CAs that `url` may be signed by, beside the machine's own. Empty: none.
    pub ca_file: PathBuf,
}

/// `[audit.otlp]`: lines as OpenTelemetry logs, over OTLP/HTTP.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Otlp {
    /// Where logs are posted to, with its path (`/v1/logs`), `https` or `http` to this machine. Empty: none.
    #[serde(deserialize_with = "ServiceUrl::deserialize", serialize_with = "ServiceUrl::serialize_redacted")]
    pub url: Option<ServiceUrl>,
    /// File with headers that the collector asks for, `name: value` in each line, readable by nobody else. Empty: none.
    pub headers_file: PathBuf,
    /// PEM file with CAs that `url` may be signed by, beside the machine's own. Empty: none.
    pub ca_file: PathBuf,
}

impl Default for Audit {
    fn default() -> Audit {
        Audit {
            dir: PathBuf::new(),
            stdout: true,
            room_records: 65_536,
            refusals_per_second: 10,
            durability: Durability::Fsync,
            fsync: Duration::from_millis(1000),
            rotate_bytes: 256 << 20,
            rotate_age: Duration::from_secs(86_400),
            keep_days: 0,
            keep_bytes: 0,
            checkpoint: Duration::from_secs(60),
            checkpoint_file: PathBuf::new(),
            sinks: Sinks::default(),
            webhook: Webhook::default(),
            syslog: Syslog::default(),
            otlp: Otlp::default(),
        }
    }
}

impl Audit {
    /// What no single value shows.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.keep_bytes > 0 && self.keep_bytes < 2 * self.rotate_bytes {
            return Err(ConfigError::new(
                "audit.keep_bytes, audit.rotate_bytes",
                "less is kept than two segments have, so requests that run could lose their records",
                "raise keep_bytes or lower rotate_bytes",
            ));
        }
        if self.otlp.url.as_ref().is_some_and(|url| url.uri().path() == "/") {
            return Err(ConfigError::new(
                "audit.otlp.url",
                "the URL has no path, and a collector takes logs at one",
                "write it as https://host:4318/v1/logs",
            ));
        }
        if self.webhook.url.is_some() && self.webhook.secret_file.as_os_str().is_empty() {
            return Err(ConfigError::new(
                "audit.webhook.url, audit.webhook.secret_file",
                "batches would be sent unsigned, so that nobody can tell them from somebody else's",
                "name a file of mode 0600 with a secret (openssl rand -hex 32)",
            ));
        }
        Ok(())
    }
}
