//! `audit report`: requests, tokens, time and denials by agent and model.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Value, json};

use super::tail::{fit, plain};
use super::{Failure, when};
use crate::config::Config;
use crate::ledger::fold::refusals_in;
use crate::ledger::record::Moment;
use crate::ledger::trail::{Event, Follower, Position};

/// Pairs of agent and model that are counted apart. A caller can name any model; what goes beyond is counted together.
const ROWS: usize = 10_000;

#[derive(Args)]
pub struct Report {
    /// Of a span that ends now, such as 30m, 24h or 7d
    #[arg(long, value_name = "SPAN", value_parser = when::ago, conflicts_with_all = ["from", "to"])]
    since: Option<Moment>,
    /// Of this date or time and later
    #[arg(long, value_name = "TIME", value_parser = when::moment)]
    from: Option<Moment>,
    /// Before this date or time
    #[arg(long, value_name = "TIME", value_parser = when::moment)]
    to: Option<Moment>,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// A count of which some parts may be unknown.
#[derive(Default)]
struct Sum {
    known: u64,
    known_parts: u64,
    unknown_parts: u64,
}

#[derive(Default)]
struct Row {
    requests: u64,
    denied: u64,
    input: Sum,
    output: Sum,
    time_ms: Sum,
}

/// Agent and model; `None` is unknown.
type Of = (Option<String>, Option<String>);

pub fn run(command: &Report, config: &Config) -> Result<(), Failure> {
    let (from, to) = (command.since.or(command.from).map(|at| at.to_string()), command.to.map(|at| at.to_string()));
    if let (Some(from), Some(to)) = (&from, &to)
        && from >= to
    {
        return Err(Failure::usage(format!("--from {from} is not before --to {to}")));
    }
    let mut rows: BTreeMap<Of, Row> = BTreeMap::new();
    let mut follower = Follower::new(&config.audit.dir, &Position::default());
    let (mut unreadable, mut beyond) = (0_u64, false);
    while let Some(event) = follower.next().map_err(|e| Failure::runtime(e.to_string()))? {
        let Event::Line { line, .. } = event else {
            unreadable += 1;
            continue;
        };
        let Ok(record) = serde_json::from_slice::<Value>(line) else {
            unreadable += 1;
            continue;
        };
        let time = record["timestamp"].as_str().unwrap_or_default();
        let within = from.as_deref().is_none_or(|from| time >= from) && to.as_deref().is_none_or(|to| time < to);
        if record["extra"]["phase"] == "final" && within {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let mut of = (text(&record["agent_id"]), text(&record["extra"]["model"]));
            if rows.len() >= ROWS && !rows.contains_key(&of) {
                of = (Some("(others)".to_owned()), None);
                beyond = true;
            }
            rows.entry(of).or_default().count(&record);
        }
    }
    match command.json {
        true => println!("{:#}", as_json(&rows, from.as_deref(), to.as_deref(), unreadable)),
        false => print(&rows),
    }
    if rows.is_empty() {
        eprintln!("no request ended in that time, or the audit has nothing of it any more");
    }
    if unreadable > 0 {
        eprintln!("{unreadable} lines or segments could not be read and are not counted; `audit verify` says which");
    }
    if beyond {
        eprintln!("more than {ROWS} pairs of agent and model; the rest is counted as (others)");
    }
    Ok(())
}

impl Row {
    fn count(&mut self, record: &Value) {
        let times = refusals_in(record).unwrap_or(1);
        self.requests += times;
        let denied = record["policy_result"] != "allow";
        self.denied += if denied { times } else { 0 };
        self.time_ms.add(&record["latency_ms"]);
        // What was denied ran nowhere: its tokens are not unknown, there are none.
        if !denied {
            self.input.add(&record["extra"]["input_tokens"]);
            self.output.add(&record["extra"]["output_tokens"]);
        }
    }
}

impl Sum {
    fn add(&mut self, part: &Value) {
        match part.as_u64() {
            Some(part) => (self.known, self.known_parts) = (self.known.saturating_add(part), self.known_parts + 1),
            None => self.unknown_parts += 1,
        }
    }

    /// `null` where nothing is known of anything.
    fn total(&self) -> Value {
        if self.known_parts == 0 && self.unknown_parts > 0 { Value::Null } else { self.known.into() }
    }

    fn in_words(&self) -> String {
        match (self.known_parts, self.unknown_parts) {
            (_, 0) => self.known.to_string(),
            (0, _) => "unknown".to_owned(),
            (_, unknown) => format!("{} + {unknown}?", self.known),
        }
    }

    fn mean(&self) -> Option<u64> {
        self.known.checked_div(self.known_parts)
    }
}

fn as_json(rows: &BTreeMap<Of, Row>, from: Option<&str>, to: Option<&str>, unreadable: u64) -> Value {
    let rows = rows.iter().map(|((agent, model), row)| {
        json!({
            "agent_id": agent,
            "model": model,
            "requests": row.requests,
            "denied": row.denied,
            "input_tokens": row.input.total(),
            "input_tokens_unknown_in": row.input.unknown_parts,
            "output_tokens": row.output.total(),
            "output_tokens_unknown_in": row.output.unknown_parts,
            "time_ms": row.time_ms.total(),
            "mean_ms": row.time_ms.mean(),
        })
    });
    json!({ "from": from, "to": to, "unreadable": unreadable, "rows": rows.collect::<Vec<_>>() })
}

fn print(rows: &BTreeMap<Of, Row>) {
    println!(
        "{:<24} {:<24} {:>9} {:>7} {:>17} {:>17} {:>10} {:>8}",
        "AGENT", "MODEL", "REQUESTS", "DENIED", "TOKENS IN", "TOKENS OUT", "TIME S", "MEAN MS"
    );
    for ((agent, model), row) in rows {
        let name = |name: &Option<String>| fit(plain(&name.clone().into()), 24);
        println!(
            "{:<24} {:<24} {:>9} {:>7} {:>17} {:>17} {:>10.1} {:>8}",
            name(agent),
            name(model),
            row.requests,
            row.denied,
            row.input.in_words(),
            row.output.in_words(),
            row.time_ms.known as f64 / 1000.0,
            row.time_ms.mean().map_or("unknown".to_owned(), |mean| mean.to_string()),
        );
    }
    if rows.values().any(|row| row.input.unknown_parts + row.output.unknown_parts > 0) {
        println!(
            "`N + M?`: N tokens are known, and of M requests the count is not (a stream that broke, or a reply without counts)"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_counts_are_never_zero_and_denials_have_none() {
        let record = |result: &str, tokens: Value| json!({ "policy_result": result, "latency_ms": 10, "extra": { "input_tokens": tokens, "output_tokens": null } });
        let mut row = Row::default();
        row.count(&record("deny", Value::Null));
        assert_eq!((row.requests, row.denied, row.input.total()), (1, 1, 0.into()));
        row.count(&record("allow", Value::Null));
        assert_eq!((row.input.total(), row.input.in_words()), (Value::Null, "unknown".to_owned()));
        row.count(&record("allow", 7.into()));
        assert_eq!((row.input.total(), row.input.in_words()), (7.into(), "7 + 1?".to_owned()));
        assert_eq!((row.output.total(), row.output.unknown_parts), (Value::Null, 2));
        assert_eq!(row.time_ms.mean(), Some(10));
        row.count(&json!({ "policy_result": "deny", "error": "40 refusals folded into this record: expired 40", "extra": {} }));
        assert_eq!((row.requests, row.denied), (43, 41), "a folded record stands for many");
    }
}
