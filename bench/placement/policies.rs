//! What others do: a backend is chosen the moment a request comes, and what must wait, waits in that backend's own queue.

use crate::rng::Rng;
use crate::trace::{MODELS, Request};
use crate::world::{Gpu, MACHINES, Policy, Sent, World, fits};

#[derive(Clone, Copy)]
pub enum Rule {
    Random,
    RoundRobin,
    LeastConnections,
    /// The least loaded of those that hold the model now, else the least loaded of all. It is told at once what is loaded where; a
    /// real one sees `/api/ps` some seconds late.
    WarmFirst,
}

pub struct Immediate {
    rule: Rule,
    rng: Rng,
    next: usize,
}

impl Immediate {
    pub fn new(rule: Rule, seed: u64) -> Immediate {
        Immediate { rule, rng: Rng::new(seed, 7), next: 0 }
    }

    fn choose(&mut self, asked: &Request, gpus: &[Gpu]) -> usize {
        // Nobody sends a model where it cannot run: that is known from the first try.
        let able: Vec<usize> = (0..MACHINES.len()).filter(|machine| fits(*machine, asked.model)).collect();
        assert!(!able.is_empty(), "{} fits nowhere", MODELS[asked.model].name);
        let least =
            |among: &[usize]| *among.iter().min_by_key(|machine| gpus[**machine].in_flight()).expect("not empty");
        match self.rule {
            Rule::Random => able[self.rng.below(able.len())],
            Rule::RoundRobin => {
                self.next += 1;
                able[self.next % able.len()]
            }
            Rule::LeastConnections => least(&able),
            Rule::WarmFirst => {
                let warm = able.iter().copied().filter(|machine| {
                    let gpu = &gpus[*machine];
                    let comes = gpu.loading.as_ref().is_some_and(|loading| loading.model == asked.model);
                    comes || gpu.holds(asked.model).is_some()
                });
                let warm: Vec<usize> = warm.collect();
                least(if warm.is_empty() { &able } else { &warm })
            }
        }
    }
}

impl Policy for Immediate {
    fn arrived(&mut self, _now_s: f64, request: usize, world: &World) -> Vec<Sent> {
        vec![Sent { request, machine: self.choose(&world.requests[request], &world.gpus) }]
    }
}
