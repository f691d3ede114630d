//! What is known of models and backends, and what runs on them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::Want;
use super::queue::Queue;
use super::rates::{self, Demand, Mean, Rates, Times};

/// Models that nobody holds are forgotten, once there are so many: clients name them.
const MODELS: usize = 4096;
/// A model that was not used for so long is unloaded: Ollama's own `OLLAMA_KEEP_ALIVE`.
const KEEP_ALIVE_S: f64 = 300.0;
/// Conversations that a slot's prompt cache is taken to hold.
const REMEMBERED: usize = 8;
/// Where nothing is known: as long as a short answer.
const OUTPUT_TOKENS: f64 = 200.0;

#[derive(Clone, Debug)]
pub struct BackendSettings {
    /// How fast it is, to begin with: 2 is taken to need half the time of 1.
    pub weight: f64,
    pub tier: u32,
    /// Requests for one model that it computes at once; the rest would wait there, where nobody sees them.
    pub slots: usize,
    /// By canonical name of the model.
    pub model_slots: HashMap<String, usize>,
}

impl Default for BackendSettings {
    fn default() -> BackendSettings {
        BackendSettings { weight: 1.0, tier: 0, slots: 1, model_slots: HashMap::new() }
    }
}

/// Whether a backend takes requests for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Up,
    /// It has failed, and one request may try whether it still does.
    Trial,
    /// It takes what no other can: the request is told what the backend says, and with luck finds it up again.
    Down,
    /// It takes none.
    Drained,
}

/// What a backend says that it has: names and bytes. `None`: it was not asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inventory<'a> {
    /// On disk, `/api/tags`.
    pub held: Option<&'a [(&'a str, u64)]>,
    /// In memory, `/api/ps`.
    pub loaded: Option<&'a [(&'a str, u64)]>,
}

/// What a run teaches. `None`: nothing about that.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lessons {
    pub load_s: Option<f64>,
    pub prefill_s_byte: Option<f64>,
    pub generate_s_token: Option<f64>,
    pub output_tokens: Option<f64>,
}

pub struct Book {
    pub backends: Vec<Backend>,
    pub models: Vec<Model>,
    pub names: HashMap<Arc<str>, usize>,
}

pub struct Backend {
    pub settings: BackendSettings,
    /// Its list was read: what is not in it, it does not have.
    pub is_read: bool,
    /// Its memory was read: what is not in it has to be loaded. Before that nobody can say, and nothing is held back for a load.
    pub is_watched: bool,
    pub held: HashSet<usize>,
    pub loaded: Vec<usize>,
    pub loading: Option<Loading>,
    pub in_flight: usize,
    /// As far as loads and evictions have shown. `/api/ps` tells what is used, and nothing tells what there is.
    pub room_bytes: u64,
    /// How its times compare with those of all backends for the same model.
    slowness: Mean,
}

/// One model at a time is loaded (ollama-wire, section 0.7).
pub struct Loading {
    pub run: u64,
    pub model: usize,
    /// Its first byte tells when the load is over.
    pub streams: bool,
    pub until_s: f64,
    /// Nobody waits for it: whoever needs the loader gets it.
    pub gives_way: bool,
}

impl Backend {
    /// The load that another one has to wait for.
    pub fn in_the_way(&self) -> Option<&Loading> {
        self.loading.as_ref().filter(|loading| !loading.gives_way)
    }

    /// Runs that a request shares the processor with.
    pub fn busy(&self) -> usize {
        self.in_flight - usize::from(self.loading.as_ref().is_some_and(|loading| loading.gives_way))
    }
}

pub struct Model {
    pub name: Arc<str>,
    pub queue: Queue,
    pub cells: Vec<Cell>,
    pub demand: Demand,
    /// On whichever backend, for one of weight 1.
    rates: Rates,
    output_tokens: Mean,
    pub bytes: u64,
}

/// One model on one backend.
#[derive(Default)]
pub struct Cell {
    pub slots: usize,
    pub running: Vec<Running>,
    pub lingering: usize,
    pub is_held: bool,
    pub is_loaded: bool,
    pub used_s: f64,
    rates: Rates,
    /// Conversations and how many bytes of each, the last one first.
    remembered: Vec<(u64, u64)>,
}

pub struct Running {
    pub run: u64,
    pub began_s: f64,
    pub ends_s: f64,
}

impl Running {
    /// What was expected to be over and is not will take a while yet: the longer it took, the longer.
    pub fn left_s(&self, now_s: f64) -> f64 {
        (self.ends_s - now_s).max(0.2 * (now_s - self.began_s)).max(0.05)
    }
}

impl Cell {
    pub fn is_used(&self) -> bool {
        !self.running.is_empty() || self.lingering > 0
    }

    pub fn free(&self) -> usize {
        self.slots.saturating_sub(self.running.len() + self.lingering)
    }

    pub fn began_to_answer(&mut self, run: u64, now_s: f64, rest_s: f64) {
        if let Some(running) = self.running.iter_mut().find(|running| running.run == run) {
            running.ends_s = now_s + rest_s;
        }
    }

    pub fn answered(&mut self, now_s: f64, conversation: Option<u64>, bytes: u64) {
        self.used_s = now_s;
        // Whatever it answers, the slot forgets something for it.
        let key = conversation.unwrap_or(0);
        self.remembered.retain(|(its, _)| *its != key);
        self.remembered.insert(0, (key, bytes));
        self.remembered.truncate(self.slots.min(REMEMBERED));
    }

    pub fn cached_bytes(&self, want: &Want) -> u64 {
        let Some(key) = want.conversation else { return 0 };
        let its = self.remembered.iter().find(|(its, _)| *its == key);
        its.map_or(0, |(_, bytes)| (*bytes).min(want.input_bytes))
    }

    /// What it would forget for another conversation.
    pub fn would_forget(&self) -> u64 {
        if self.remembered.len() < self.slots.min(REMEMBERED) {
            0
        } else {
            self.remembered.last().map_or(0, |(_, bytes)| *bytes)
        }
    }
}

impl Book {
    pub fn new(backends: Vec<BackendSettings>) -> Book {
        let new = |settings| Backend {
            settings,
            is_read: false,
            is_watched: false,
            held: HashSet::new(),
            loaded: Vec::new(),
            loading: None,
            in_flight: 0,
            room_bytes: u64::MAX,
            slowness: Mean::default(),
        };
        Book { backends: backends.into_iter().map(new).collect(), models: Vec::new(), names: HashMap::new() }
    }

    /// The model's number.
    pub fn model(&mut self, name: &str) -> usize {
        if let Some(&model) = self.names.get(name) {
            return model;
        }
        let fresh = self.fresh(name);
        let name = Arc::clone(&fresh.name);
        let idle = |model: &Model| model.queue.is_empty() && model.cells.iter().all(|cell| !cell.is_used());
        let reused = if self.models.len() < MODELS {
            None
        } else {
            let held = |model: usize| {
                self.backends.iter().any(|backend| backend.held.contains(&model) || backend.loaded.contains(&model))
            };
            (0..self.models.len()).find(|model| idle(&self.models[*model]) && !held(*model))
        };
        let model = match reused {
            Some(model) => {
                self.names.remove(&self.models[model].name);
                self.models[model] = fresh;
                model
            }
            None => {
                self.models.push(fresh);
                self.models.len() - 1
            }
        };
        self.names.insert(name, model);
        model
    }

    /// A model without a past.
    fn fresh(&self, name: &str) -> Model {
        let name: Arc<str> = name.into();
        let cells = self.backends.iter().map(|backend| {
            let slots = backend.settings.model_slots.get(&*name).copied().unwrap_or(backend.settings.slots);
            Cell { slots: slots.max(1), ..Cell::default() }
        });
        Model {
            queue: Queue::default(),
            cells: cells.collect(),
            name,
            demand: Demand::default(),
            rates: Rates::default(),
            output_tokens: Mean::default(),
            bytes: 0,
        }
    }

    /// The number of a model that is none of those that are known, until it is taken back.
    pub fn add(&mut self, name: &str) -> usize {
        self.models.push(self.fresh(name));
        self.models.len() - 1
    }

    /// The last that was added.
    pub fn take_back(&mut self, model: usize) {
        self.models.truncate(model);
    }

    /// What each part takes for a model on a backend, as far as was learnt: there, on others, or by its size.
    pub fn times(&self, backend: usize, model: usize) -> Times {
        self.times_from(backend, model, &self.usual_times(model))
    }

    /// On a usual backend.
    pub fn usual_times(&self, model: usize) -> Times {
        let entry = &self.models[model];
        entry.rates.or(&rates::guess(entry.bytes))
    }

    pub fn times_from(&self, backend: usize, model: usize, guess: &Times) -> Times {
        let entry = &self.models[model];
        let of = &self.backends[backend];
        let slowness = of.slowness.or(1.0 / of.settings.weight);
        let here = Times {
            load_s: guess.load_s,
            prefill_s_byte: guess.prefill_s_byte * slowness,
            generate_s_token: guess.generate_s_token * slowness,
        };
        entry.cells[backend].rates.or(&here)
    }

    fn output_tokens(&self, model: usize, want: &Want) -> f64 {
        let usual = self.models[model].output_tokens.or(OUTPUT_TOKENS);
        want.most_tokens.map_or(usual, |most| usual.min(most as f64))
    }

    pub fn generate_s(&self, backend: usize, model: usize, want: &Want) -> f64 {
        self.times(backend, model).generate_s_token * self.output_tokens(model, want)
    }

    pub fn tokens(&self, model: usize, want: &Want) -> f64 {
        self.output_tokens(model, want)
    }

    /// What the request will take on a usual backend, to charge its agent for.
    pub fn takes_s(&self, model: usize, want: &Want) -> f64 {
        let times = self.usual_times(model);
        times.prefill_s_byte * want.input_bytes as f64 + times.generate_s_token * self.output_tokens(model, want) + 0.01
    }

    pub fn slots_in_use(&self, model: usize) -> usize {
        self.models[model].cells.iter().map(|cell| cell.running.len()).sum()
    }

    pub fn learn(&mut self, backend: usize, model: usize, lessons: &Lessons) {
        let weight = self.backends[backend].settings.weight;
        let entry = &mut self.models[model];
        let usual = entry.rates.or(&rates::guess(entry.bytes));
        let cell = &mut entry.cells[backend];
        let slowness = &mut self.backends[backend].slowness;
        if let Some(load_s) = lessons.load_s {
            cell.rates.load_s.note(load_s);
            entry.rates.load_s.note(load_s);
        }
        if let Some(s) = lessons.prefill_s_byte {
            cell.rates.prefill_s_byte.note(s);
            if entry.rates.prefill_s_byte.is_known() {
                slowness.note((s / usual.prefill_s_byte).clamp(0.05, 20.0));
            }
            entry.rates.prefill_s_byte.note(s * weight);
        }
        if let Some(s) = lessons.generate_s_token {
            cell.rates.generate_s_token.note(s);
            if entry.rates.generate_s_token.is_known() {
                slowness.note((s / usual.generate_s_token).clamp(0.05, 20.0));
            }
            entry.rates.generate_s_token.note(s * weight);
        }
        if let Some(tokens) = lessons.output_tokens {
            entry.output_tokens.note(tokens);
        }
    }

    /// The models that a backend has on disk are these, and no others.
    pub fn holds(&mut self, backend: usize, models: &[(usize, u64)]) {
        let of = &mut self.backends[backend];
        of.is_read = true;
        for model in of.held.drain() {
            self.models[model].cells[backend].is_held = false;
        }
        of.held.extend(models.iter().map(|(model, _)| *model));
        for (model, bytes) in models {
            let entry = &mut self.models[*model];
            entry.cells[backend].is_held = true;
            entry.bytes = entry.bytes.max(*bytes);
        }
    }

    /// The models that a backend has in memory are these, and no others.
    pub fn has_loaded(&mut self, now_s: f64, backend: usize, models: &[(usize, u64)]) {
        let of = &mut self.backends[backend];
        of.is_watched = true;
        let used: u64 = models.iter().map(|(_, bytes)| *bytes).sum();
        if of.room_bytes < used {
            of.room_bytes = used;
        }
        let here = |model: &usize| models.iter().any(|(its, _)| its == model);
        // Gone long before its time: it made room, so that all of them together are more than there is.
        let pushed_out: u64 = of
            .loaded
            .iter()
            .filter(|model| !here(model) && now_s - self.models[**model].cells[backend].used_s < KEEP_ALIVE_S / 2.0)
            .map(|model| self.models[*model].bytes)
            .sum();
        let comes = of.loading.as_ref().filter(|loading| !here(&loading.model));
        let comes = comes.map_or(0, |loading| self.models[loading.model].bytes);
        if pushed_out > 0 && used + comes > 0 {
            of.room_bytes = of.room_bytes.min(used + comes + pushed_out - 1);
        }
        if of.loading.as_ref().is_some_and(|loading| !loading.streams && here(&loading.model)) {
            of.loading = None; // an answer that comes whole has its first byte long after the load
        }
        let loading = of.loading.is_some();
        let before = std::mem::take(&mut of.loaded);
        for model in before {
            let cell = &mut self.models[model].cells[backend];
            // A request that was just sent keeps its belief: the list may be older than the load.
            if loading && cell.is_used() && !here(&model) {
                self.backends[backend].loaded.push(model);
            } else {
                cell.is_loaded = false;
            }
        }
        for (model, bytes) in models {
            let entry = &mut self.models[*model];
            entry.bytes = entry.bytes.max(*bytes);
            let cell = &mut entry.cells[backend];
            if !cell.is_loaded && cell.used_s == 0.0 {
                cell.used_s = now_s;
            }
            cell.is_loaded = true;
            self.backends[backend].loaded.push(*model);
        }
    }

    /// Whether the model is in the backend's memory, as far as is known.
    pub fn is_loaded(&self, backend: usize, model: usize) -> bool {
        let cell = &self.models[model].cells[backend];
        cell.is_loaded || !self.backends[backend].is_watched
    }

    /// A run has its first byte or its end: the model is loaded. Whether that is news to those who wait.
    pub fn loaded(&mut self, now_s: f64, run: u64, backend: usize, model: usize) -> bool {
        let of = &mut self.backends[backend];
        let was_loading = of.loading.as_ref().is_some_and(|loading| loading.run == run);
        if was_loading {
            of.loading = None;
        }
        let cell = &mut self.models[model].cells[backend];
        cell.used_s = now_s;
        if !cell.is_loaded {
            cell.is_loaded = true;
            if !of.loaded.contains(&model) {
                of.loaded.push(model);
            }
        }
        was_loading
    }

    /// A run is over: it holds no slot any more, and loads nothing.
    pub fn release(&mut self, run: u64, backend: usize, model: usize) {
        let of = &mut self.backends[backend];
        of.in_flight -= 1;
        let cell = &mut self.models[model].cells[backend];
        cell.running.retain(|running| running.run != run);
        if of.loading.as_ref().is_some_and(|loading| loading.run == run) {
            // Ended before its first byte: the load was aborted (ollama-wire, section 0.5).
            of.loading = None;
        }
    }
}
