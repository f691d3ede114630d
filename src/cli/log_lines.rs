//! The log on standard error: our own lines as RUST_LOG wants them (info, unless it says otherwise), and of others' only warnings of
//! those that never see a request.
//!
//! Pingora's lines print paths, queries, bodies and a backend's key; at error level a bad backend head prints up to 1 MiB of its
//! bytes (traps, Pingora 6). A directive of env_logger cannot keep them out: a longer one in RUST_LOG, such as
//! `pingora_core::protocols=trace`, wins over a shorter one that is off. So the target is looked at before env_logger is.

use log::{Level, Log, Metadata, Record};

/// What these say is of requests, whatever its level.
const SILENT: [&str; 6] = ["pingora", "h2", "hyper", "rustls", "jsonwebtoken", "regorus"];
const OURS: &str = "behavry_ollama_proxy";

struct Lines(env_logger::Logger);

/// A second call in one process (tests) changes nothing.
pub fn start() {
    let mut log = env_logger::Builder::new();
    log.filter_level(log::LevelFilter::Warn).filter_module(OURS, log::LevelFilter::Info).parse_default_env();
    let log = log.build();
    let level = log.filter();
    if log::set_boxed_logger(Box::new(Lines(log))).is_ok() {
        log::set_max_level(level);
    }
}

fn may_speak(target: &str, level: Level) -> bool {
    if target.starts_with(OURS) {
        return true;
    }
    level <= Level::Warn && !SILENT.iter().any(|silent| target.starts_with(silent))
}

impl Log for Lines {
    fn enabled(&self, line: &Metadata<'_>) -> bool {
        may_speak(line.target(), line.level()) && self.0.enabled(line)
    }

    fn log(&self, line: &Record<'_>) {
        if may_speak(line.target(), line.level()) {
            self.0.log(line);
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_lines_go_below_warnings_and_what_sees_requests_is_silent() {
        for (target, level, speaks) in [
            ("behavry_ollama_proxy::server", Level::Trace, true),
            ("pingora_core::protocols::http::v1::client", Level::Error, false),
            ("pingora_proxy", Level::Error, false),
            ("h2::server", Level::Warn, false),
            ("tokio", Level::Warn, true),
            ("tokio", Level::Info, false),
        ] {
            assert_eq!(may_speak(target, level), speaks, "{target} {level}");
        }
    }
}
