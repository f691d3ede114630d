//! A day of a team's load: people who chat, coding agents, a search index that embeds, and jobs that arrive all at once.
//!
//! The rates follow the hour. A conversation stays with one model and its prompts grow; a coding agent sends long prompts in quick
//! succession; a job sends hundreds of requests within two minutes. Requests arrive when the trace says, however long the answers
//! before them took, so that every policy gets the same requests at the same times.

use crate::rng::Rng;

pub const DAY_S: f64 = 86_400.0;

pub struct Model {
    pub name: &'static str,
    /// Of weights and cache, in memory and on disk.
    pub gigabytes: f64,
    /// On a backend of speed 1, alone.
    pub prefill_tokens_s: f64,
    pub generate_tokens_s: f64,
}

const fn model(name: &'static str, gigabytes: f64, prefill_tokens_s: f64, generate_tokens_s: f64) -> Model {
    Model { name, gigabytes, prefill_tokens_s, generate_tokens_s }
}

pub const MODELS: [Model; 12] = [
    model("llama3.2:3b", 3.0, 6000.0, 150.0),
    model("llama3.1:8b", 6.0, 3500.0, 90.0),
    model("qwen2.5-coder:7b", 6.0, 3500.0, 90.0),
    model("gemma3:12b", 9.0, 2200.0, 60.0),
    model("qwen2.5-coder:14b", 10.0, 1900.0, 50.0),
    model("mistral-small:24b", 15.0, 1200.0, 35.0),
    model("gemma3:27b", 18.0, 1000.0, 30.0),
    model("qwen3:32b", 21.0, 850.0, 26.0),
    model("deepseek-r1:32b", 21.0, 850.0, 26.0),
    model("llama3.3:70b", 43.0, 400.0, 13.0),
    model("nomic-embed-text", 0.6, 20_000.0, 1.0),
    model("bge-m3", 1.2, 12_000.0, 1.0),
];

const CHAT: [(usize, f64); 7] = [(0, 14.0), (1, 30.0), (3, 20.0), (5, 12.0), (6, 9.0), (8, 6.0), (9, 2.0)];
const CODING: [(usize, f64); 3] = [(2, 45.0), (4, 35.0), (7, 20.0)];
const JOBS: [(usize, f64); 4] = [(1, 30.0), (3, 25.0), (5, 25.0), (6, 20.0)];
const EMBED: [(usize, f64); 2] = [(10, 70.0), (11, 30.0)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Interactive,
    Default,
    Batch,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub at_s: f64,
    pub model: usize,
    pub class: Class,
    pub agent: u32,
    /// Requests of one conversation begin with the same words.
    pub conversation: u64,
    pub input_tokens: f64,
    pub output_tokens: f64,
}

/// How busy the hour is: people at 9 to 12 and 13 to 18, next to nothing at night.
const HOURS: [f64; 24] = [
    0.08, 0.05, 0.04, 0.04, 0.05, 0.08, 0.15, 0.35, 0.70, 0.95, 1.00, 0.95, 0.60, 0.80, 1.00, 1.00, 0.90, 0.75, 0.50,
    0.35, 0.30, 0.25, 0.18, 0.12,
];

/// Conversations, coding sessions and embedding bursts that begin in an hour of full rate; jobs of a day.
const CHATS_HOUR: f64 = 520.0;
const SESSIONS_HOUR: f64 = 44.0;
const BURSTS_HOUR: f64 = 90.0;
const JOBS_DAY: usize = 16;

pub fn day(seed: u64) -> Vec<Request> {
    let mut requests = Vec::new();
    let mut conversation = 0;
    let mut start = |rng: &mut Rng, rate_hour: f64, each: &mut dyn FnMut(&mut Rng, f64, u64)| {
        let mut at_s = 0.0;
        loop {
            at_s += rng.exponential(3600.0 / rate_hour);
            if at_s >= DAY_S {
                return;
            }
            let hour = HOURS[(at_s / 3600.0) as usize];
            if rng.unit() < hour {
                conversation += 1;
                each(rng, at_s, conversation);
            }
        }
    };

    let pick = |rng: &mut Rng, from: &[(usize, f64)]| {
        let weights: Vec<f64> = from.iter().map(|(_, weight)| *weight).collect();
        from[rng.weighted(&weights)].0
    };

    start(&mut Rng::new(seed, 1), CHATS_HOUR, &mut |rng, mut at_s, conversation| {
        let (model, agent) = (pick(rng, &CHAT), rng.below(60) as u32);
        let mut input_tokens = rng.log_normal(350.0, 0.7);
        loop {
            let output_tokens = rng.log_normal(220.0, 0.8).clamp(5.0, 2000.0);
            requests.push(Request {
                at_s,
                model,
                class: Class::Interactive,
                agent,
                conversation,
                input_tokens,
                output_tokens,
            });
            if rng.unit() < 0.22 {
                return;
            }
            // The answer at a usual speed, and then somebody reads and writes.
            at_s += output_tokens / 40.0 + 5.0 + rng.exponential(40.0);
            input_tokens = (input_tokens + output_tokens + rng.log_normal(60.0, 0.8)).min(16_000.0);
        }
    });
    start(&mut Rng::new(seed, 2), SESSIONS_HOUR, &mut |rng, mut at_s, conversation| {
        let (model, agent) = (pick(rng, &CODING), 100 + rng.below(25) as u32);
        let mut input_tokens = rng.log_normal(5000.0, 0.5).clamp(1500.0, 14_000.0);
        for _ in 0..10 + rng.below(31) {
            let output_tokens = rng.log_normal(130.0, 0.9).clamp(10.0, 1500.0);
            requests.push(Request {
                at_s,
                model,
                class: Class::Default,
                agent,
                conversation,
                input_tokens,
                output_tokens,
            });
            at_s += output_tokens / 50.0 + 2.0 + rng.exponential(9.0);
            input_tokens = (input_tokens + output_tokens + rng.log_normal(350.0, 0.9)).min(28_000.0);
        }
    });
    start(&mut Rng::new(seed, 3), BURSTS_HOUR, &mut |rng, mut at_s, conversation| {
        let (model, agent) = (pick(rng, &EMBED), 200 + rng.below(6) as u32);
        for i in 0..4 + rng.below(24) as u64 {
            requests.push(Request {
                at_s,
                model,
                class: Class::Default,
                agent,
                conversation: (conversation << 8) + i, // nothing in common
                input_tokens: rng.log_normal(900.0, 0.8).min(8000.0),
                output_tokens: 0.0,
            });
            at_s += rng.exponential(0.4);
        }
    });
    let mut rng = Rng::new(seed, 4);
    for job in 0..JOBS_DAY as u64 {
        // Half of them at night, as a careful team would; the rest whenever somebody pressed a button.
        let begins_s = if job % 2 == 0 { rng.between(0.0, 6.0) } else { rng.between(8.0, 19.0) } * 3600.0;
        let model = pick(&mut rng, &JOBS);
        for i in 0..150 + rng.below(350) as u64 {
            requests.push(Request {
                at_s: begins_s + rng.between(0.0, 120.0),
                model,
                class: Class::Batch,
                agent: 300 + job as u32 % 4,
                conversation: (1 << 48) + (job << 16) + i,
                input_tokens: rng.log_normal(1400.0, 0.6).min(8000.0),
                output_tokens: rng.log_normal(180.0, 0.6).clamp(10.0, 800.0),
            });
        }
    }
    requests.retain(|request| request.at_s < DAY_S);
    requests.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
    requests
}
