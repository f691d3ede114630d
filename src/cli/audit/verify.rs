//! `audit verify`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::Failure;
use crate::config::Config;
use crate::ledger::verify::{self, Against, CannotCheck, End, Gap, Verdict};

/// The exit code for an audit that does not hold.
const CHANGED: u8 = 1;
/// The exit code where nothing can be said: nothing there, unreadable, or a wrong command line.
pub const CANNOT: u8 = 2;

#[derive(Args)]
pub struct Verify {
    /// The public half of the key that signs checkpoints; may be repeated, if the key was changed. Without it: audit-key.pub of the
    /// state folder and audit-key-*.pub, those of keys before it. An auditor keeps a copy: whoever can write the audit can most likely write that file too
    #[arg(long = "public-key", value_name = "FILE")]
    public_keys: Vec<PathBuf>,
    /// Checkpoints that were kept elsewhere (audit.checkpoint_file, or lines copied from it); may be repeated. With them a log whose
    /// end was cut off, or that was put back to an earlier state, shows
    #[arg(long = "checkpoint", value_name = "FILE")]
    checkpoints: Vec<PathBuf>,
    /// The verdict as one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(command: &Verify, config: &Config) -> Result<(), Failure> {
    let began = Instant::now();
    let cannot = |error: CannotCheck| Failure { code: CANNOT, what: format!("cannot be checked: {error}") };
    let mut against = Against::default();
    // A folder that cannot be listed has no key to offer, and the verdict says that none was there.
    let own = || verify::public_keys_of(&config.state_dir).unwrap_or_default();
    let (keys, ours) = match command.public_keys.is_empty() {
        true => (own(), true),
        false => (command.public_keys.clone(), false),
    };
    for path in &keys {
        against.key(path).map_err(cannot)?;
    }
    for path in &command.checkpoints {
        against.checkpoints(path).map_err(cannot)?;
    }
    let mut verdict = verify::verify(&config.audit.dir, &against).map_err(cannot)?;
    if ours && keys.len() > 1 {
        verdict.gaps.insert(0, Gap::SeveralKeys { keys: keys.len() });
    }
    match command.json {
        true => println!("{:#}", as_json(&verdict)),
        false => print(&verdict, config, began),
    }
    match verdict.problems.len() {
        0 => Ok(()),
        1 => Err(Failure { code: CHANGED, what: "the audit does NOT hold".to_owned() }),
        more => Err(Failure { code: CHANGED, what: format!("the audit does NOT hold: {more} problems") }),
    }
}

fn as_json(verdict: &Verdict) -> serde_json::Value {
    let mut shown = serde_json::to_value(verdict).unwrap_or_default();
    shown["holds"] = verdict.holds().into();
    shown["lines"] = verdict.lines().into();
    shown
}

fn print(verdict: &Verdict, config: &Config, began: Instant) {
    let seconds = began.elapsed().as_secs_f64().max(0.001);
    let megabytes = verdict.bytes as f64 / 1e6;
    println!(
        "{}: {} lines, {megabytes:.1} MB, {} writers, read in {seconds:.1} s ({:.0} MB/s)",
        config.audit.dir.display(),
        verdict.lines(),
        verdict.chains.len(),
        megabytes / seconds
    );
    for chain in &verdict.chains {
        let end = match chain.end {
            End::Stopped => "stopped in order",
            End::Running => "still running",
            End::Adopted => "its writer died, and another took it over",
            End::Open => "without an end",
            End::Unknown => "does not hold",
        };
        println!(
            "  {}  {} lines in {} segments, {} checkpoints, {end}",
            chain.writer, chain.lines, chain.segments, chain.checkpoints
        );
    }
    for problem in &verdict.problems {
        println!("CHANGED      {problem}");
    }
    for gap in &verdict.gaps {
        println!("NOT CHECKED  {gap}");
    }
    if verdict.holds() {
        println!("the audit holds{}", if verdict.gaps.is_empty() { "" } else { ", but for what could not be checked" });
    }
}
