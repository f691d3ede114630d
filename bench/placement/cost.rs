//! What a choice costs: 64 backends, 2,000 models, 10,000 streams that run, each choice timed by itself.
//!
//! Every backend has every model on disk and ten in memory, so that most requests find a few warm copies among many cold ones; one
//! request in ten wants any model, and most of these nobody has loaded. What is loaded is read anew as in the proxy, every five seconds. A choice is everything that happens under the lock from a request's
//! arrival to its grant.

use std::time::{Duration, Instant};

use behavry_ollama_proxy::upstream::scheduler::{
    BackendSettings, Class, Decision, Ended, Inventory, Measured, RunId, Scheduler, Settings, Want,
};

use crate::rng::Rng;

const BACKENDS: usize = 64;
const MODELS: usize = 2000;
const STREAMS: usize = 10_000;
const LOADED: usize = 10;
/// Of these the loaded ones are, and most requests want one of them.
const POPULAR: usize = 400;
/// So many at most, while it fills: then some end.
const WAITING: usize = 200;
const CHOICES: usize = 100_000;

pub fn measure() {
    let origin = Instant::now();
    let settings = BackendSettings { slots: 64, ..BackendSettings::default() };
    let mut scheduler = Scheduler::new(origin, Settings::default(), vec![settings; BACKENDS]);
    let names: Vec<String> = (0..MODELS).map(|model| format!("model-{model}:7b")).collect();
    let held: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 5_000_000_000)).collect();
    let mut rng = Rng::new(1, 1);
    let (mut refreshes, mut memories) = (Vec::new(), Vec::new());
    for backend in 0..BACKENDS {
        let loaded: Vec<(&str, u64)> = (0..LOADED).map(|_| held[rng.below(POPULAR)]).collect();
        let began = Instant::now();
        scheduler.seen(origin, backend, &Inventory { held: Some(&held), loaded: Some(&loaded) });
        refreshes.push(began.elapsed());
        memories.push(loaded);
    }
    let (mut now, mut steps) = (origin, 0);
    let mut running: Vec<RunId> = Vec::new();
    let mut decisions = Vec::new();
    let (mut choices, mut ends) = (Vec::new(), Vec::new());
    while choices.len() < CHOICES && steps < 20 * CHOICES {
        now += Duration::from_micros(500);
        steps += 1;
        if steps % 150 == 0 {
            let backend = steps / 150 % BACKENDS;
            scheduler.seen(now, backend, &Inventory { held: None, loaded: Some(&memories[backend]) });
        }
        if running.len() >= STREAMS - 1 || scheduler.waiting() > WAITING {
            let run = running.swap_remove(rng.below(running.len()));
            let measured = Measured { output_tokens: Some(200), ..Measured::default() };
            let began = Instant::now();
            scheduler.ended(now, run, Ended::Complete(measured));
            scheduler.poll(now, &mut decisions);
            ends.push(began.elapsed());
            running.extend(granted(&mut decisions));
        }
        let want = Want {
            model: names[if rng.unit() < 0.1 { rng.below(MODELS) } else { rng.below(POPULAR) }].as_str().into(),
            agent: format!("agent-{}", rng.below(500)).into(),
            class: Class::Default,
            input_bytes: 4000,
            most_tokens: None,
            conversation: Some(rng.below(5000) as u64 + 1),
            streams: true,
            deadline: now + Duration::from_secs(300),
            barred: Vec::new(),
            only_read: false,
            only_holding: false,
        };
        let is_full = running.len() >= STREAMS * 9 / 10;
        let began = Instant::now();
        let arrived = scheduler.arrive(now, want);
        scheduler.poll(now, &mut decisions);
        let took = began.elapsed();
        if is_full && arrived.is_ok() {
            choices.push(took);
        }
        for run in granted(&mut decisions) {
            scheduler.first_byte(now, run);
            running.push(run);
        }
    }
    println!("{BACKENDS} backends, {MODELS} models, {} streams, {} waiting.", running.len(), scheduler.waiting());
    for (what, mut took) in [("a choice", choices), ("an end", ends), ("a backend's lists", refreshes)] {
        took.sort();
        let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize].as_nanos() as f64 / 1000.0;
        let mean_us = took.iter().sum::<Duration>().as_nanos() as f64 / 1000.0 / took.len() as f64;
        println!(
            "{what}: mean {mean_us:.1} us, p50 {:.1}, p99 {:.1}, worst {:.1} of {}",
            at(0.5),
            at(0.99),
            at(1.0),
            took.len()
        );
    }
}

fn granted(decisions: &mut Vec<Decision>) -> Vec<RunId> {
    let runs = decisions.drain(..).filter_map(|decision| match decision {
        Decision::Granted(grant) => Some(grant.run),
        _ => None,
    });
    runs.collect()
}
