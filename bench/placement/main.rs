//! Replays a day of mixed load over eight backends and compares policies that choose among them.
//!
//! ```sh
//! cargo bench --bench placement
//! ```
//!
//! It is a discrete simulation: no clock, no socket, the same numbers on every machine. [`trace`] makes the requests, [`world`] is
//! what eight Ollamas would do with them, [`policies`] choose. `-- --seeds 2` runs fewer seeds, `-- --first 6`
//! others (ours was tuned on 6 to 8), `-- --only ours,oracle` some policies. `-- --cost` measures what one of our
//! choices costs. How to read the figures: `bench/RESULTS.md`, section "Placement".

mod cost;
mod oracle;
mod ours;
mod policies;
mod report;
mod rng;
mod trace;
mod world;

use policies::{Immediate, Rule};
use world::{Policy, Run};

const SEEDS: u64 = 5;

/// By name, in the order of the table.
fn policy(name: &str, seed: u64) -> Option<Box<dyn Policy>> {
    Some(match name {
        "random" => Box::new(Immediate::new(Rule::Random, seed)),
        "round robin" => Box::new(Immediate::new(Rule::RoundRobin, seed)),
        "least connections" => Box::new(Immediate::new(Rule::LeastConnections, seed)),
        "warm first" => Box::new(Immediate::new(Rule::WarmFirst, seed)),
        "ours" => Box::new(ours::Ours::new()),
        "oracle" => Box::new(oracle::Oracle::default()),
        _ => return None,
    })
}

const POLICIES: [&str; 6] = ["random", "round robin", "least connections", "warm first", "ours", "oracle"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| arguments.iter().position(|word| word == flag).and_then(|at| arguments.get(at + 1));
    let seeds = value("--seeds").and_then(|text| text.parse().ok()).unwrap_or(SEEDS);
    if arguments.iter().any(|word| word == "--cost") {
        return cost::measure();
    }
    let first: u64 = value("--first").and_then(|text| text.parse().ok()).unwrap_or(1);
    let seeds = first..first + seeds;
    let only: Option<Vec<&str>> = value("--only").map(|names| names.split(',').collect());
    let chosen = POLICIES.into_iter().filter(|name| only.as_ref().is_none_or(|only| only.contains(name)));

    let mut rows = Vec::new();
    for name in chosen {
        let runs: Vec<Run> = seeds
            .clone()
            .map(|seed| {
                let trace = trace::day(seed);
                let mut policy = policy(name, seed).expect("a name of the list");
                world::replay(&trace, policy.as_mut())
            })
            .collect();
        eprintln!("{name}: done");
        rows.push((name, runs));
    }
    let floor: Vec<Run> = seeds.map(|seed| world::floor(&trace::day(seed))).collect();
    rows.push(("floor", floor));
    report::print(&rows);
}
