//! `audit tail`: the last records, and what comes.

use std::io::{self, IsTerminal, Write};

use clap::Args;
use clap::builder::PossibleValuesParser;
use serde_json::Value;

use super::Failure;
use crate::config::Config;
use crate::ledger::Outcome;
use crate::ledger::chain;
use crate::ledger::trail::follow::POLL;
use crate::ledger::trail::{Event, Follower, Position, TrailError, back};

#[derive(Args)]
pub struct Tail {
    /// How many of the last records
    #[arg(short = 'n', long = "lines", value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    lines: u32,
    /// Go on with what is written from now on, until interrupted
    #[arg(short, long)]
    follow: bool,
    /// Of this agent only
    #[arg(long, value_name = "ID")]
    agent: Option<String>,
    /// For this model only
    #[arg(long, value_name = "MODEL", value_parser = canonical)]
    model: Option<String>,
    /// With this outcome only, such as complete, refused or client_abort
    #[arg(long, value_name = "OUTCOME", value_parser = PossibleValuesParser::new(Outcome::ALL.map(Outcome::as_str)))]
    outcome: Option<String>,
    /// All records of a request, and the marks of the chain, not only final records
    #[arg(long)]
    all: bool,
}

pub fn run(command: &Tail, config: &Config) -> Result<(), Failure> {
    let folder = &config.audit.dir;
    let unreadable = |error: TrailError| Failure::runtime(error.to_string());
    let table = io::stdout().is_terminal();
    // Taken first: what is written meanwhile is followed.
    let end = Position::at_the_end(folder).map_err(unreadable)?;
    if table {
        println!("{HEAD}");
    }
    for line in back::last(folder, &end, command.lines as usize, |line| command.wants(line)).map_err(unreadable)? {
        show(&line, table);
    }
    if !command.follow {
        return Ok(());
    }
    let mut follower = Follower::new(folder, &end);
    loop {
        while let Some(event) = follower.next().map_err(unreadable)? {
            match event {
                Event::Line { line, .. } if command.wants(line) => show(line, table),
                Event::Line { .. } => {}
                Event::Lost { writer, loss } => {
                    eprintln!("the audit of {writer} cannot be read on without a gap: {loss}")
                }
            }
        }
        let _ = io::stdout().flush(); // a closed pipe ends the process by its signal
        std::thread::sleep(POLL);
    }
}

/// The name that records have, whichever way it is written.
fn canonical(name: &str) -> Result<String, String> {
    crate::wire::model::parse(name).map(|model| model.canonical()).map_err(|error| error.to_string())
}

impl Tail {
    fn wants(&self, line: &[u8]) -> bool {
        let Ok(record) = serde_json::from_slice::<Value>(line) else { return false };
        let is = |wanted: &Option<String>, found: &Value| wanted.is_none() || found.as_str() == wanted.as_deref();
        (self.all || record["extra"]["phase"] == "final")
            && is(&self.agent, &record["agent_id"])
            && is(&self.model, &record["extra"]["model"])
            && is(&self.outcome, &record["extra"]["outcome"])
    }
}

const HEAD: &str = "TIME (UTC)           AGENT             MODEL             REQUEST                    CODE  OUTCOME         TOKENS IN/OUT      MS";

/// A row on a terminal, else the line as it stands in the log.
fn show(line: &[u8], table: bool) {
    match serde_json::from_slice::<Value>(line) {
        Ok(record) if table => println!("{}", row(&record)),
        _ => println!("{}", String::from_utf8_lossy(line)),
    }
}

fn row(record: &Value) -> String {
    let extra = &record["extra"];
    let request = format!("{} {}", plain(&record["action"]), plain(&record["target"]));
    let what = if extra["outcome"].is_string() { &extra["outcome"] } else { &extra["phase"] };
    format!(
        "{:<20} {:<17} {:<17} {:<26} {:<5} {:<15} {:>13} {:>7}",
        plain(&record["timestamp"]).get(..19).unwrap_or_default().replace('T', " "),
        fit(plain(&record["agent_id"]), 17),
        fit(plain(&extra["model"]), 17),
        fit(request, 26),
        plain(&record["response_code"]),
        plain(what),
        format!("{}/{}", plain(&extra["input_tokens"]), plain(&extra["output_tokens"])),
        plain(&record["latency_ms"]),
    )
}

/// A value for a terminal: a dash where it is not known, and never a control character, since names come from outside.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => {
            let mut escaped = Vec::new();
            chain::write_string(text, &mut escaped);
            String::from_utf8_lossy(&escaped[1..escaped.len() - 1]).into_owned()
        }
        other => other.to_string(),
    }
}

/// Plain ASCII, cut to a column.
pub(super) fn fit(text: String, width: usize) -> String {
    if text.len() > width { format!("{}~", &text[..width - 1]) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_unknown_as_unknown_and_no_terminal_escape() {
        let record = serde_json::json!({
            "timestamp": "2026-11-22T18:35:16.000001+00:00", "agent_id": "\u{1b}[2J\u{202e}", "action": "POST",
            "target": "/api/chat", "response_code": 200, "latency_ms": null,
            "extra": { "phase": "final", "outcome": "complete", "model": null, "input_tokens": 0, "output_tokens": null },
        });
        let row = row(&record);
        assert!(row.is_ascii() && !row.contains('\u{1b}'), "{row:?}");
        assert!(row.contains(" 0/- ") && row.ends_with(" -"), "{row}");
        assert!(row.starts_with("2026-11-22 18:35:16  \\u001b[2J\\u202e"), "{row}");
    }
}
