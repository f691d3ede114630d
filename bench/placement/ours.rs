//! Ours: the proxy's own scheduler, on simulated time. It is told what the proxy is told: sizes on arrival, first bytes and ends as they
//! come, counts at the end, and every five seconds what is in each memory.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use behavry_ollama_proxy::upstream::scheduler::{
    BackendSettings, Class, Decision, Ended, Inventory, Measured, RunId, Scheduler, Settings, WaiterId, Want,
};

use crate::trace::{self, DAY_S, MODELS};
use crate::world::{MACHINES, Policy, Sent, World, fits};

const LOOK_EVERY_S: f64 = 5.0;

pub struct Ours {
    scheduler: Scheduler,
    origin: Instant,
    waiters: HashMap<WaiterId, usize>,
    runs: HashMap<usize, RunId>,
    looked_s: f64,
    decisions: Vec<Decision>,
}

impl Ours {
    pub fn new() -> Ours {
        let origin = Instant::now();
        // A queue without bounds, as those of the others have none.
        let settings = Settings {
            model_waiting: usize::MAX,
            all_waiting: usize::MAX,
            agent_waiting: usize::MAX,
            ..Settings::default()
        };
        let backends = vec![BackendSettings::default(); MACHINES.len()];
        let mut scheduler = Scheduler::new(origin, settings, backends);
        for machine in 0..MACHINES.len() {
            let held = (0..MODELS.len()).filter(|model| fits(machine, *model));
            let held: Vec<(&str, u64)> = held.map(|model| (MODELS[model].name, bytes(model))).collect();
            scheduler.seen(origin, machine, &Inventory { held: Some(&held), loaded: Some(&[]) });
        }
        Ours { scheduler, origin, waiters: HashMap::new(), runs: HashMap::new(), looked_s: 0.0, decisions: Vec::new() }
    }

    fn at(&self, now_s: f64) -> Instant {
        self.origin + Duration::from_secs_f64(now_s)
    }

    fn poll(&mut self, now_s: f64, world: &World) -> Vec<Sent> {
        if now_s >= self.looked_s + LOOK_EVERY_S {
            self.looked_s = now_s;
            for (machine, gpu) in world.gpus.iter().enumerate() {
                let loaded: Vec<(&str, u64)> =
                    gpu.loaded.iter().map(|loaded| (MODELS[loaded.model].name, bytes(loaded.model))).collect();
                self.scheduler.seen(self.at(now_s), machine, &Inventory { held: None, loaded: Some(&loaded) });
            }
        }
        let now = self.at(now_s);
        let mut sent = Vec::new();
        while self.scheduler.wake().is_some_and(|at| at <= now) {
            self.scheduler.poll(now, &mut self.decisions);
            for decision in self.decisions.drain(..) {
                let Decision::Granted(grant) = decision else {
                    panic!("nobody gives up and no backend fails: {decision:?}")
                };
                let request = self.waiters.remove(&grant.waiter).expect("it waits");
                self.runs.insert(request, grant.run);
                sent.push(Sent { request, machine: grant.backend });
            }
        }
        sent
    }
}

fn bytes(model: usize) -> u64 {
    (MODELS[model].gigabytes * 1e9) as u64
}

impl Policy for Ours {
    fn arrived(&mut self, now_s: f64, request: usize, world: &World) -> Vec<Sent> {
        let asked = &world.requests[request];
        let want = Want {
            model: MODELS[asked.model].name.into(),
            agent: asked.agent.to_string().into(),
            class: match asked.class {
                trace::Class::Interactive => Class::Interactive,
                trace::Class::Default => Class::Default,
                trace::Class::Batch => Class::Batch,
            },
            input_bytes: (asked.input_tokens * 4.0) as u64,
            most_tokens: (asked.output_tokens == 0.0).then_some(0),
            conversation: Some(asked.conversation),
            streams: true,
            deadline: self.at(now_s + DAY_S),
            barred: Vec::new(),
            only_read: false,
            only_holding: false,
        };
        let waiter = self.scheduler.arrive(self.at(now_s), want).expect("the queue has no bounds here");
        self.waiters.insert(waiter, request);
        self.poll(now_s, world)
    }

    fn first_token(&mut self, now_s: f64, request: usize, _world: &World) {
        let run = self.runs[&request];
        self.scheduler.first_byte(self.at(now_s), run);
    }

    fn ended(&mut self, now_s: f64, request: usize, world: &World) -> Vec<Sent> {
        let run = self.runs.remove(&request).expect("it runs");
        let output_tokens = Some(world.requests[request].output_tokens as u64);
        let measured = Measured { output_tokens, ..Measured::default() };
        self.scheduler.ended(self.at(now_s), run, Ended::Complete(measured));
        self.poll(now_s, world)
    }

    fn wake_s(&self) -> Option<f64> {
        self.scheduler.wake().map(|at| (at - self.origin).as_secs_f64())
    }

    fn woken(&mut self, now_s: f64, world: &World) -> Vec<Sent> {
        self.poll(now_s, world)
    }
}
