//! What could be had by whoever knew everything: how long each request will truly take, how far each running one truly is, what is
//! in each memory, and what will be asked next.
//!
//! It holds requests back as ours does, and gives the next slot to the one that will be done soonest, less the time that it has
//! waited. It is greedy, not optimal: it bounds what better estimates could bring, while `floor` is what no policy can beat.

use crate::trace::MODELS;
use crate::world::{MACHINES, Policy, Sent, Stage, World, fits, load_s, share};

/// How many of those that wait for one model are looked at after each event.
const LOOKED_AT: usize = 24;
/// A model that is asked for again within this time was not worth evicting.
const SOON_S: f64 = 120.0;

#[derive(Default)]
pub struct Oracle {
    waiting: Vec<usize>,
}

/// A machine as it will be once what was sent in this very moment has arrived.
struct Slot {
    /// When the slot of the model is free, and ready.
    free_s: f64,
    is_warm: bool,
    cached: Option<(u64, f64)>,
}

impl Oracle {
    fn choose(&mut self, now_s: f64, world: &World) -> Vec<Sent> {
        let mut sent = Vec::new();
        let urgency = |request: &usize| {
            let asked = &world.requests[*request];
            let (first, rest) = world.times_s(*request, 2, 0.0);
            first + rest - (now_s - asked.at_s)
        };
        self.waiting.sort_by(|a, b| urgency(a).total_cmp(&urgency(b)));
        let mut slots: Vec<Vec<Option<Slot>>> =
            MACHINES.iter().map(|_| MODELS.iter().map(|_| None).collect()).collect();
        let mut loads = vec![false; MACHINES.len()];
        let mut extra = vec![0; MACHINES.len()];
        let mut kept = Vec::new();
        let mut looked_at = [0; MODELS.len()];
        for request in std::mem::take(&mut self.waiting) {
            let model = world.requests[request].model;
            looked_at[model] += 1;
            if looked_at[model] > LOOKED_AT {
                kept.push(request);
                continue;
            }
            let mut best: Option<(f64, usize, bool, f64)> = None;
            for machine in (0..MACHINES.len()).filter(|machine| fits(*machine, model)) {
                let slot = slots[machine][model].get_or_insert_with(|| slot_of(now_s, world, machine, model));
                let running = world.gpus[machine].running() + extra[machine];
                let cached_tokens = world.cached_tokens(request, slot.cached);
                let (first, rest) = world.times_s(request, machine, cached_tokens);
                let (mut free_s, mut cost_s) = (slot.free_s, 0.0);
                if !slot.is_warm {
                    if loads[machine] || world.gpus[machine].loading.is_some() {
                        free_s = free_s.max(now_s + 5.0);
                    }
                    let (wait_s, evicted_s) = room(now_s, world, machine, model);
                    free_s = free_s.max(now_s + wait_s);
                    cost_s = load_s(machine, model) + evicted_s;
                }
                let ends_s = free_s + cost_s + (first + 0.3 * rest) / share(running + 1);
                if best.is_none_or(|(least, ..)| ends_s < least) {
                    best = Some((ends_s, machine, free_s <= now_s, (first + rest) / share(running + 1) + cost_s));
                }
            }
            let (_, machine, is_now, takes_s) = best.expect("every model fits somewhere");
            let slot = slots[machine][model].as_mut().expect("just made");
            slot.free_s = slot.free_s.max(now_s) + takes_s;
            if is_now {
                loads[machine] |= !slot.is_warm;
                extra[machine] += 1;
                sent.push(Sent { request, machine });
            } else {
                kept.push(request);
            }
            slot.is_warm = true;
        }
        self.waiting = kept;
        sent
    }
}

/// When the model's slot on the machine will be free, in truth.
fn slot_of(now_s: f64, world: &World, machine: usize, model: usize) -> Slot {
    let gpu = &world.gpus[machine];
    let queue_s = |requests: &mut dyn Iterator<Item = usize>| -> f64 {
        requests.map(|request| world.times_s(request, machine, 0.0)).map(|(first, rest)| first + rest).sum()
    };
    let pending = || gpu.pending.iter().copied().filter(|request| world.requests[*request].model == model);
    if let Some(loaded) = gpu.holds(model) {
        let running = loaded.running.as_ref().map_or(0.0, |run| {
            let rest = if run.stage == Stage::Prefill { world.times_s(run.request, machine, 0.0).1 } else { 0.0 };
            (run.left_s.max(0.0) + rest) / share(gpu.running())
        });
        let wait_s = running + queue_s(&mut loaded.waiting.iter().copied());
        return Slot { free_s: now_s + wait_s, is_warm: true, cached: loaded.cached };
    }
    let comes_s = match &gpu.loading {
        Some(loading) if loading.model == model => loading.ready_s - now_s,
        _ if pending().next().is_some() => {
            load_s(machine, model) + gpu.loading.as_ref().map_or(0.0, |l| l.ready_s - now_s)
        }
        _ => return Slot { free_s: now_s, is_warm: false, cached: None },
    };
    Slot { free_s: now_s + comes_s + queue_s(&mut pending()), is_warm: true, cached: None }
}

/// How long until there is room, and what it costs that others are evicted for it.
fn room(now_s: f64, world: &World, machine: usize, model: usize) -> (f64, f64) {
    let gpu = &world.gpus[machine];
    let mut used: f64 = gpu.loaded.iter().map(|loaded| MODELS[loaded.model].gigabytes).sum();
    used += gpu.loading.as_ref().map_or(0.0, |loading| MODELS[loading.model].gigabytes);
    let mut by_age: Vec<_> = gpu.loaded.iter().collect();
    by_age
        .sort_by(|a, b| (a.running.is_some(), a.used_s).partial_cmp(&(b.running.is_some(), b.used_s)).expect("no NaN"));
    let (mut wait_s, mut cost_s) = (0.0, 0.0);
    for loaded in by_age {
        if used + MODELS[model].gigabytes <= MACHINES[machine].gigabytes {
            break;
        }
        used -= MODELS[loaded.model].gigabytes;
        if let Some(run) = &loaded.running {
            let rest = if run.stage == Stage::Prefill { world.times_s(run.request, machine, 0.0).1 } else { 0.0 };
            wait_s = f64::max(wait_s, (run.left_s + rest) / share(gpu.running()));
        }
        if asked_soon(now_s, world, loaded.model) {
            cost_s += load_s(machine, loaded.model);
        }
    }
    (wait_s, cost_s)
}

/// Whether the model will be asked for soon: this is what only an oracle knows.
fn asked_soon(now_s: f64, world: &World, model: usize) -> bool {
    let from = world.requests.partition_point(|asked| asked.at_s <= now_s);
    world.requests[from..].iter().take_while(|asked| asked.at_s < now_s + SOON_S).any(|asked| asked.model == model)
}

impl Policy for Oracle {
    fn arrived(&mut self, now_s: f64, request: usize, world: &World) -> Vec<Sent> {
        self.waiting.push(request);
        self.choose(now_s, world)
    }

    fn ended(&mut self, now_s: f64, _request: usize, world: &World) -> Vec<Sent> {
        self.choose(now_s, world)
    }
}
