//! Eight Ollamas, as the service-time model has them.
//!
//! What is modelled is what decides a placement: a model must be in memory, loads go one after the other and evict what is idle, a
//! loaded model answers one request at a time and queues the others where nobody sees them, requests of several models share the
//! processor, and a slot remembers the last prompt that it answered (ollama-wire, sections 0 and 6.2). Times follow from sizes:
//! a load reads the file, prefill and generation go at the model's rate times the backend's speed. Each request's true rate differs
//! from that by up to a fifth, which only the oracle knows.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use crate::rng::Rng;
use crate::trace::{MODELS, Request};

pub struct Machine {
    pub gigabytes: f64,
    pub speed: f64,
    pub load_gigabytes_s: f64,
}

const fn machine(gigabytes: f64, speed: f64, load_gigabytes_s: f64) -> Machine {
    Machine { gigabytes, speed, load_gigabytes_s }
}

pub const MACHINES: [Machine; 8] = [
    machine(78.0, 2.0, 2.5),
    machine(78.0, 2.0, 2.5),
    machine(46.0, 1.0, 1.5),
    machine(46.0, 1.0, 1.5),
    machine(46.0, 1.0, 1.5),
    machine(46.0, 1.0, 1.5),
    machine(22.0, 0.6, 1.0),
    machine(22.0, 0.6, 1.0),
];

/// Ollama's `OLLAMA_KEEP_ALIVE`.
const KEEP_ALIVE_S: f64 = 300.0;
/// Starting a runner, besides reading the file.
const RUNNER_S: f64 = 1.5;

/// Chooses. Called after each event; what it returns is sent.
pub trait Policy {
    fn arrived(&mut self, now_s: f64, request: usize, world: &World) -> Vec<Sent>;
    fn first_token(&mut self, _now_s: f64, _request: usize, _world: &World) {}
    fn ended(&mut self, _now_s: f64, _request: usize, _world: &World) -> Vec<Sent> {
        Vec::new()
    }
    /// When it wants to be asked again, if nothing happens before.
    fn wake_s(&self) -> Option<f64> {
        None
    }
    fn woken(&mut self, _now_s: f64, _world: &World) -> Vec<Sent> {
        Vec::new()
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub request: usize,
    pub machine: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stage {
    Prefill,
    Generate,
}

#[derive(Clone, Debug)]
pub struct Running {
    pub request: usize,
    pub stage: Stage,
    /// Seconds of the stage that are left, alone on the machine.
    pub left_s: f64,
}

pub struct Loaded {
    pub model: usize,
    pub used_s: f64,
    pub running: Option<Running>,
    pub waiting: VecDeque<usize>,
    /// What the slot's prompt cache holds: a conversation, and how many tokens of it.
    pub cached: Option<(u64, f64)>,
}

pub struct Loading {
    pub model: usize,
    pub ready_s: f64,
}

#[derive(Default)]
pub struct Gpu {
    pub loaded: Vec<Loaded>,
    pub loading: Option<Loading>,
    /// Requests whose model is not loaded, in order: one thread takes them.
    pub pending: VecDeque<usize>,
    /// Until when its progress is reckoned.
    reckoned_s: f64,
    version: u64,
    busy_s: f64,
    load_s: f64,
}

impl Gpu {
    /// Requests sent to it and not ended.
    pub fn in_flight(&self) -> usize {
        let of = |loaded: &Loaded| loaded.waiting.len() + usize::from(loaded.running.is_some());
        self.pending.len() + self.loaded.iter().map(of).sum::<usize>()
    }

    pub fn holds(&self, model: usize) -> Option<&Loaded> {
        self.loaded.iter().find(|loaded| loaded.model == model)
    }

    pub fn running(&self) -> usize {
        self.loaded.iter().filter(|loaded| loaded.running.is_some()).count()
    }
}

/// How fast each of `running` requests goes: two together get more done than one, and each of them less.
pub fn share(running: usize) -> f64 {
    1.0 / (1.0 + 0.6 * running.saturating_sub(1) as f64)
}

pub fn load_s(machine: usize, model: usize) -> f64 {
    RUNNER_S + MODELS[model].gigabytes / MACHINES[machine].load_gigabytes_s
}

/// Every backend has every model on disk; one that exceeds its memory it cannot run.
pub fn fits(machine: usize, model: usize) -> bool {
    MODELS[model].gigabytes <= MACHINES[machine].gigabytes
}

pub struct World<'a> {
    pub requests: &'a [Request],
    /// Each request's own rate, as a factor.
    pub luck: Vec<f64>,
    pub gpus: Vec<Gpu>,
    first_token_s: Vec<f64>,
    ended_s: Vec<f64>,
    loads: usize,
    /// Of loads, those of a model that was in that memory within the last ten minutes.
    reloads: usize,
    evicted_s: Vec<Vec<f64>>,
}

impl World<'_> {
    /// Seconds until the first token, alone, with that much of the prompt in the cache; and from there to the end.
    pub fn times_s(&self, request: usize, machine: usize, cached_tokens: f64) -> (f64, f64) {
        let asked = &self.requests[request];
        let model = &MODELS[asked.model];
        let speed = MACHINES[machine].speed * self.luck[request];
        let first = 0.05 + (asked.input_tokens - cached_tokens).max(1.0) / (model.prefill_tokens_s * speed);
        (first, asked.output_tokens / (model.generate_tokens_s * speed))
    }

    pub fn cached_tokens(&self, request: usize, cached: Option<(u64, f64)>) -> f64 {
        let asked = &self.requests[request];
        cached
            .filter(|(conversation, _)| *conversation == asked.conversation)
            .map_or(0.0, |(_, tokens)| tokens.min(asked.input_tokens))
    }

    fn send(&mut self, now_s: f64, sent: Sent) {
        let model = self.requests[sent.request].model;
        assert!(fits(sent.machine, model), "{} was sent where it cannot run", MODELS[model].name);
        self.reckon(now_s, sent.machine);
        let gpu = &mut self.gpus[sent.machine];
        match gpu.loaded.iter_mut().find(|loaded| loaded.model == model) {
            Some(loaded) => loaded.waiting.push_back(sent.request),
            None => gpu.pending.push_back(sent.request),
        }
        self.start(now_s, sent.machine);
    }

    /// Moves the machine's progress up to now.
    fn reckon(&mut self, now_s: f64, machine: usize) {
        let gpu = &mut self.gpus[machine];
        let passed_s = now_s - gpu.reckoned_s;
        gpu.reckoned_s = now_s;
        let running = gpu.running();
        if running > 0 {
            gpu.busy_s += passed_s;
        }
        if gpu.loading.is_some() {
            gpu.load_s += passed_s;
        }
        for run in gpu.loaded.iter_mut().filter_map(|loaded| loaded.running.as_mut()) {
            run.left_s -= passed_s * share(running);
        }
    }

    /// Starts whatever can start.
    fn start(&mut self, now_s: f64, machine: usize) {
        // What has come to be loaded takes its requests from the load queue.
        let gpu = &mut self.gpus[machine];
        let mut rest = VecDeque::new();
        while let Some(request) = gpu.pending.pop_front() {
            let model = self.requests[request].model;
            match gpu.loaded.iter_mut().find(|loaded| loaded.model == model) {
                Some(loaded) => loaded.waiting.push_back(request),
                None => rest.push_back(request),
            }
        }
        gpu.pending = rest;
        for index in 0..self.gpus[machine].loaded.len() {
            let loaded = &self.gpus[machine].loaded[index];
            if loaded.running.is_some() || loaded.waiting.is_empty() {
                continue;
            }
            let request = loaded.waiting[0];
            let cached_tokens = self.cached_tokens(request, loaded.cached);
            let left_s = self.times_s(request, machine, cached_tokens).0;
            let loaded = &mut self.gpus[machine].loaded[index];
            loaded.waiting.pop_front();
            loaded.running = Some(Running { request, stage: Stage::Prefill, left_s });
        }
        self.load(now_s, machine);
        self.gpus[machine].version += 1;
    }

    /// One load at a time, for the first in the queue; what is idle longest makes room, and where all are in use it waits.
    fn load(&mut self, now_s: f64, machine: usize) {
        let gpu = &mut self.gpus[machine];
        gpu.loaded.retain(|loaded| {
            let stays = loaded.running.is_some() || !loaded.waiting.is_empty() || now_s - loaded.used_s < KEEP_ALIVE_S;
            if !stays {
                self.evicted_s[machine][loaded.model] = now_s;
            }
            stays
        });
        if gpu.loading.is_some() {
            return;
        }
        let Some(&request) = gpu.pending.front() else { return };
        let model = self.requests[request].model;
        loop {
            let used: f64 = gpu.loaded.iter().map(|loaded| MODELS[loaded.model].gigabytes).sum();
            if used + MODELS[model].gigabytes <= MACHINES[machine].gigabytes {
                break;
            }
            let idle = gpu.loaded.iter().enumerate();
            let idle = idle.filter(|(_, loaded)| loaded.running.is_none() && loaded.waiting.is_empty());
            let Some((oldest, _)) = idle.min_by(|(_, a), (_, b)| a.used_s.total_cmp(&b.used_s)) else {
                return;
            };
            let gone = gpu.loaded.swap_remove(oldest);
            self.evicted_s[machine][gone.model] = now_s;
        }
        self.loads += 1;
        if now_s - self.evicted_s[machine][model] < 600.0 {
            self.reloads += 1;
        }
        gpu.loading = Some(Loading { model, ready_s: now_s + load_s(machine, model) });
    }

    /// When the machine's next stage or load ends.
    fn next_s(&self, machine: usize) -> Option<f64> {
        let gpu = &self.gpus[machine];
        let share = share(gpu.running());
        let stages = gpu.loaded.iter().filter_map(|loaded| loaded.running.as_ref());
        let stages = stages.map(|run| gpu.reckoned_s + run.left_s.max(0.0) / share);
        stages.chain(gpu.loading.as_ref().map(|loading| loading.ready_s)).min_by(f64::total_cmp)
    }

    /// Ends what has ended by now: the requests with their first token, and those that are done.
    fn step(&mut self, now_s: f64, machine: usize) -> (Vec<usize>, Vec<usize>) {
        self.reckon(now_s, machine);
        let (mut first, mut done) = (Vec::new(), Vec::new());
        if self.gpus[machine].loading.as_ref().is_some_and(|loading| loading.ready_s <= now_s) {
            let gpu = &mut self.gpus[machine];
            let model = gpu.loading.take().expect("just seen").model;
            let fresh = Loaded { model, used_s: now_s, running: None, waiting: VecDeque::new(), cached: None };
            gpu.loaded.push(fresh);
        }
        for index in 0..self.gpus[machine].loaded.len() {
            let Some(run) = &self.gpus[machine].loaded[index].running else { continue };
            if run.left_s > 1e-9 {
                continue;
            }
            let (request, stage) = (run.request, run.stage);
            let generate_s = self.times_s(request, machine, 0.0).1;
            let loaded = &mut self.gpus[machine].loaded[index];
            loaded.used_s = now_s;
            if stage == Stage::Prefill {
                self.first_token_s[request] = now_s;
                first.push(request);
                if generate_s > 0.0 {
                    loaded.running = Some(Running { request, stage: Stage::Generate, left_s: generate_s });
                    continue;
                }
            }
            let asked = &self.requests[request];
            loaded.cached = Some((asked.conversation, asked.input_tokens + asked.output_tokens));
            loaded.running = None;
            done.push(request);
        }
        self.start(now_s, machine);
        (first, done)
    }
}

/// What came of one day.
pub struct Run {
    /// Of every request, in no order: its wait for the first token, and whether somebody sat before it.
    pub waits_s: Vec<(f64, crate::trace::Class)>,
    /// Output tokens a second of the answers that ended in the hour for which most work was asked.
    pub peak_tokens_s: f64,
    /// Of all machines' time.
    pub busy: f64,
    pub loading: f64,
    pub loads: usize,
    pub reloads: usize,
}

struct Event {
    at_s: f64,
    /// Makes the order of events at one time the order of their making.
    number: u64,
    what: What,
}

enum What {
    Arrival(usize),
    Machine(usize, u64),
    Wake,
}

impl PartialEq for Event {
    fn eq(&self, other: &Event) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Event) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Event {
    fn cmp(&self, other: &Event) -> Ordering {
        other.at_s.total_cmp(&self.at_s).then(other.number.cmp(&self.number))
    }
}

/// Runs the day to the end of its last request.
pub fn replay(requests: &[Request], policy: &mut dyn Policy) -> Run {
    let mut rng = Rng::new(requests.len() as u64, 99);
    let machines = MACHINES.len();
    let mut world = World {
        requests,
        luck: requests.iter().map(|_| rng.between(0.8, 1.2)).collect(),
        gpus: (0..machines).map(|_| Gpu::default()).collect(),
        first_token_s: vec![f64::NAN; requests.len()],
        ended_s: vec![f64::NAN; requests.len()],
        loads: 0,
        reloads: 0,
        evicted_s: vec![vec![f64::NEG_INFINITY; MODELS.len()]; machines],
    };
    let mut events = BinaryHeap::new();
    let mut number = 0;
    let mut push = |events: &mut BinaryHeap<Event>, at_s, what| {
        number += 1;
        events.push(Event { at_s, number, what });
    };
    for (request, asked) in requests.iter().enumerate() {
        push(&mut events, asked.at_s, What::Arrival(request));
    }
    let (mut ended, mut last_s, mut wake_s) = (0, 0.0, None);
    while let Some(event) = events.pop() {
        let now_s = event.at_s;
        let mut touched = Vec::new();
        let sent = match event.what {
            What::Arrival(request) => policy.arrived(now_s, request, &world),
            What::Wake if wake_s == Some(now_s) => {
                wake_s = None;
                policy.woken(now_s, &world)
            }
            What::Machine(machine, version) if world.gpus[machine].version == version => {
                let (first, done) = world.step(now_s, machine);
                touched.push(machine);
                for request in first {
                    policy.first_token(now_s, request, &world);
                }
                let mut sent = Vec::new();
                for request in done {
                    ended += 1;
                    last_s = now_s;
                    world.ended_s[request] = now_s;
                    sent.extend(policy.ended(now_s, request, &world));
                }
                sent
            }
            _ => continue,
        };
        for sent in sent {
            world.send(now_s, sent);
            touched.push(sent.machine);
        }
        touched.sort_unstable();
        touched.dedup();
        for machine in touched {
            if let Some(at_s) = world.next_s(machine) {
                push(&mut events, at_s, What::Machine(machine, world.gpus[machine].version));
            }
        }
        if let Some(at_s) = policy.wake_s().map(|at_s| at_s.max(now_s))
            && wake_s.is_none_or(|planned| at_s < planned)
        {
            wake_s = Some(at_s);
            push(&mut events, at_s, What::Wake);
        }
    }
    assert_eq!(ended, requests.len(), "every request is answered in the end");
    let span_s = last_s - requests[0].at_s;
    let whole_s = span_s * machines as f64;
    Run {
        waits_s: requests
            .iter()
            .zip(&world.first_token_s)
            .map(|(asked, at_s)| (at_s - asked.at_s, asked.class))
            .collect(),
        peak_tokens_s: peak_tokens_s(requests, &world.ended_s),
        busy: world.gpus.iter().map(|gpu| gpu.busy_s).sum::<f64>() / whole_s,
        loading: world.gpus.iter().map(|gpu| gpu.load_s).sum::<f64>() / whole_s,
        loads: world.loads,
        reloads: world.reloads,
    }
}

fn peak_tokens_s(requests: &[Request], ended_s: &[f64]) -> f64 {
    let mut asked_work = [0.0; 24];
    for asked in requests {
        let model = &MODELS[asked.model];
        asked_work[(asked.at_s / 3600.0) as usize] +=
            asked.input_tokens / model.prefill_tokens_s + asked.output_tokens / model.generate_tokens_s;
    }
    let hour = (0..24).max_by(|a, b| asked_work[*a].total_cmp(&asked_work[*b])).expect("a day has hours");
    let within = requests.iter().zip(ended_s).filter(|(_, at_s)| (*at_s / 3600.0) as usize == hour);
    within.map(|(asked, _)| asked.output_tokens).sum::<f64>() / 3600.0
}

/// What no policy can beat: each request alone on the fastest backend, its model loaded, and its conversation in the cache.
pub fn floor(requests: &[Request]) -> Run {
    let fastest = MACHINES.iter().map(|machine| machine.speed).fold(0.0, f64::max);
    let mut longest: std::collections::HashMap<u64, f64> = std::collections::HashMap::new();
    let waits_s = requests
        .iter()
        .map(|asked| {
            let cached = longest.insert(asked.conversation, asked.input_tokens + asked.output_tokens).unwrap_or(0.0);
            let new = (asked.input_tokens - cached).max(1.0);
            (0.05 + new / (MODELS[asked.model].prefill_tokens_s * fastest * 1.2), asked.class)
        })
        .collect();
    Run { waits_s, peak_tokens_s: f64::NAN, busy: f64::NAN, loading: f64::NAN, loads: 0, reloads: 0 }
}
