//! Who waits, who runs where, and who is next: the whole of it, without a clock, a lock, a task or a socket.
//!
//! Events and `now` go in ([`Scheduler::arrive`], [`Scheduler::ended`], [`Scheduler::seen`], ..); [`Scheduler::poll`] says what follows
//! from them, and [`Scheduler::wake`] when to ask again. Whoever drives it (`upstream::dispatch`; the simulation in
//! `bench/placement`) keeps time.
//!
//! - [`queue`]: who waits for one model, in which order.
//! - [`placement`]: what each backend would cost, and the least of it.
//! - [`rates`]: what was learnt about how long things take.
//! - [`book`]: what is known of models and backends, and what runs on them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod book;
mod placement;
mod queue;
mod rates;

pub use book::{BackendSettings, Inventory, State};
pub use placement::{Offer, Reason, Standing};
pub use queue::Class;

use book::Book;
use queue::Stand;

/// How many of those that wait for one model are placed in thought at a time: the first perhaps waits for a warm slot, and the tenth
/// finds that the queue before it justifies a second copy.
const LOOKED_AT: usize = 16;
/// How many models one [`Scheduler::poll`] looks at; the rest are due at the next one. It bounds how long a lock is held.
const MODELS_A_POLL: usize = 8;
/// Whoever waits is placed anew that often, because an answer may take longer than was expected.
const RECHECK_S: f64 = 0.1;
const RETRY_AFTER_S: (f64, f64) = (1.0, 60.0);

#[derive(Clone, Debug)]
pub struct Settings {
    /// Most that wait for one model.
    pub model_waiting: usize,
    /// Most that wait for all models.
    pub all_waiting: usize,
    /// Most of one agent's that wait, for whatever model.
    pub agent_waiting: usize,
    /// How long a slot is counted as busy after its client has left: Ollama notices, but not at once.
    pub linger: Duration,
    /// What one tier more is worth: a backend of a higher tier is used where it answers sooner by that much.
    pub tier: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            model_waiting: 512,
            all_waiting: 4096,
            agent_waiting: 128,
            linger: Duration::from_millis(200),
            tier: Duration::from_secs(10),
        }
    }
}

/// What a request wants of a backend.
#[derive(Clone, Debug)]
pub struct Want {
    /// Canonical name.
    pub model: Arc<str>,
    pub agent: Arc<str>,
    pub class: Class,
    pub input_bytes: u64,
    /// The most that it lets the model generate. An embedding generates nothing: 0.
    pub most_tokens: Option<u64>,
    /// Requests that begin with the same words have the same; a backend that has answered one still holds those words.
    pub conversation: Option<u64>,
    /// Its first byte is the first token's, and not the whole answer's.
    pub streams: bool,
    /// Until when it waits.
    pub deadline: Instant,
    /// Places of backends that may never have it: the configuration says so, or it was tried there. What may change while it waits is
    /// judged when it is placed.
    pub barred: Vec<usize>,
    /// Only backends whose list of models was read, as long as there are any.
    pub only_read: bool,
    /// Only backends that may have the model: none is better than one that is known not to have it.
    pub only_holding: bool,
}

/// One that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WaiterId(u64);

/// One that holds a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(u64);

/// Why a request may not even wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The agent has as many waiting as it may.
    Share { retry_after: Duration },
    /// The queue is full, whoever asks.
    Whole { retry_after: Duration },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    Granted(Grant),
    /// Its deadline has passed.
    Expired(WaiterId),
    /// No backend may take it, and waiting would not help: all are drained, barred, or gone.
    Nowhere(WaiterId),
    /// The load that nobody waits for is over, finished or not: a request needs the loader.
    GivesWay(RunId),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grant {
    pub waiter: WaiterId,
    pub run: RunId,
    pub backend: usize,
    pub reason: Reason,
    /// The model has to be loaded there.
    pub is_cold: bool,
    pub waited: Duration,
    pub trial: Trial,
}

/// What would become of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlook {
    /// Those that wait for the same model and would be served before it.
    pub ahead: usize,
    /// `None`: no backend may take it.
    pub chosen: Option<Prospect>,
    /// What each backend has to offer, by its place.
    pub offers: Vec<Offer>,
}

/// The backend that would be chosen, as things are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prospect {
    pub backend: usize,
    pub reason: Reason,
    /// It would be sent now, and not wait.
    pub is_free: bool,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ended {
    Complete(Measured),
    /// The client left, or was cut: the backend needs a moment to notice.
    Left,
    /// It never reached the backend, failed there, or was answered without being computed: nothing to learn, and nothing that lingers.
    Moot,
}

/// What the backend said of itself, where it did (Ollama's own API does: ollama-wire, section 3.2).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    pub output_tokens: Option<u64>,
    pub load: Option<Duration>,
    pub prefill: Option<Duration>,
    pub generate: Option<Duration>,
}

struct Waiter {
    want: Want,
    model: usize,
    came_s: f64,
    /// What its agent was charged.
    takes_s: f64,
    stand: Stand,
}

struct Run {
    backend: usize,
    model: usize,
    want: Want,
    takes_s: f64,
    cached_bytes: u64,
    is_cold: bool,
    began_s: f64,
    first_s: Option<f64>,
}

/// What a run tries, of which it is not known whether it still fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trial {
    pub of_backend: bool,
    pub of_model: bool,
}

/// Knows which backends are to be trusted with work.
pub trait Judge: Send {
    /// Whether a backend, by its place, may have a request for a model now: asked before each choice.
    fn state(&self, backend: usize, model: &str) -> State;

    /// A request for the model goes there: told before anybody else is placed, so that of several that wait only one tries.
    fn begins(&self, _backend: usize, _model: &str) -> Trial {
        Trial::default()
    }
}

impl<F: Fn(usize, &str) -> State + Send> Judge for F {
    fn state(&self, backend: usize, model: &str) -> State {
        self(backend, model)
    }
}

pub struct Scheduler {
    settings: Settings,
    judge: Box<dyn Judge>,
    origin: Instant,
    book: Book,
    waiters: HashMap<u64, Waiter>,
    runs: HashMap<u64, Run>,
    last_id: u64,
    agents: HashMap<Arc<str>, usize>,
    /// Models for which something has changed.
    due: VecDeque<usize>,
    is_due: Vec<bool>,
    /// Models for which somebody waits.
    backlog: BTreeSet<usize>,
    rechecked_s: f64,
    /// By time.
    deadlines: BTreeSet<(u64, u64)>,
    /// Slots that are free again at some time: time, number, backend, model.
    lingers: BTreeSet<(u64, u64, usize, usize)>,
    /// Loads that had to end, until that was told.
    gave_way: Vec<RunId>,
    scratch: Vec<u64>,
    desks: Vec<placement::Desk>,
}

impl Scheduler {
    pub fn new(now: Instant, settings: Settings, backends: Vec<BackendSettings>) -> Scheduler {
        Scheduler {
            settings,
            judge: Box::new(|_: usize, _: &str| State::Up),
            origin: now,
            book: Book::new(backends),
            waiters: HashMap::new(),
            runs: HashMap::new(),
            last_id: 0,
            agents: HashMap::new(),
            due: VecDeque::new(),
            is_due: Vec::new(),
            backlog: BTreeSet::new(),
            rechecked_s: 0.0,
            deadlines: BTreeSet::new(),
            lingers: BTreeSet::new(),
            gave_way: Vec::new(),
            scratch: Vec::new(),
            desks: Vec::new(),
        }
    }

    /// Without a judge every backend is up.
    pub fn judged_by(self, judge: Box<dyn Judge>) -> Scheduler {
        Scheduler { judge, ..self }
    }

    /// A request comes, and waits until [`Scheduler::poll`] says something of it: at once, where a slot is free.
    pub fn arrive(&mut self, now: Instant, want: Want) -> Result<WaiterId, Full> {
        let now_s = self.seconds(now);
        let model = self.model(&want.model);
        self.room_for(model, &want)?;
        let takes_s = self.book.takes_s(model, &want);
        self.last_id += 1;
        let id = self.last_id;
        *self.agents.entry(Arc::clone(&want.agent)).or_default() += 1;
        self.deadlines.insert((self.seconds(want.deadline).to_bits(), id));
        let entry = &mut self.book.models[model];
        entry.demand.note(now_s);
        let stand = entry.queue.push(now_s, id, &want.agent, want.class, takes_s);
        self.backlog.insert(model);
        self.waiters.insert(id, Waiter { want, model, came_s: now_s, takes_s, stand });
        self.mark(model);
        Ok(WaiterId(id))
    }

    /// What would become of a request that came now. Nothing does: no place, no slot, no memory of it.
    pub fn outlook(&mut self, now: Instant, want: &Want) -> Result<Outlook, Full> {
        let known = self.book.names.get(&want.model).copied();
        let model = known.unwrap_or_else(|| self.book.add(&want.model));
        let outlook = self.room_for(model, want).map(|()| self.look_ahead(self.seconds(now), model, want));
        if known.is_none() {
            self.book.take_back(model);
        }
        outlook
    }

    /// As [`Scheduler::place`] would, with the request where it would stand.
    fn look_ahead(&self, now_s: f64, model: usize, want: &Want) -> Outlook {
        let ahead: Vec<u64> = self.book.models[model].queue.ahead_of(now_s, &want.agent, want.class).collect();
        let first = &ahead[..ahead.len().min(LOOKED_AT)];
        let mut desks = Vec::new();
        self.book.set_desks(now_s, model, first.len() + 1, self.tier_s(), &*self.judge, &mut desks);
        for waiter in first.iter().filter_map(|id| self.waiters.get(id)) {
            if let Some(chosen) = self.book.choose(now_s, model, &waiter.want, &mut desks) {
                desks[chosen.backend].reserve(&chosen);
            }
        }
        let chosen = self.book.choose(now_s, model, want, &mut desks);
        let offers = self.book.offers(now_s, model, want, &mut desks);
        // Behind so many it is not looked at yet.
        let is_first = ahead.len() < LOOKED_AT;
        let chosen =
            chosen.map(|its| Prospect { backend: its.backend, reason: its.reason, is_free: its.is_free && is_first });
        Outlook { ahead: ahead.len(), chosen, offers }
    }

    /// A run for a request that has waited and was charged for it, and has failed on the backends that are barred to it: where it costs
    /// least, though no slot may be free there. `None`: no backend may take it.
    pub fn at_once(&mut self, now: Instant, want: &Want) -> Option<Grant> {
        let now_s = self.seconds(now);
        let model = self.model(&want.model);
        let mut desks = std::mem::take(&mut self.desks);
        self.book.set_desks(now_s, model, 1, self.tier_s(), &*self.judge, &mut desks);
        let chosen = self.book.choose(now_s, model, want, &mut desks);
        self.desks = desks;
        let chosen = chosen?;
        let takes_s = self.book.takes_s(model, want);
        let (run, trial) = self.begin(now_s, model, want.clone(), takes_s, &chosen);
        let (waiter, waited) = (WaiterId(run.0), Duration::ZERO); // nobody else has that number
        let (backend, reason, is_cold) = (chosen.backend, chosen.reason, chosen.is_cold);
        Some(Grant { waiter, run, backend, reason, is_cold, waited, trial })
    }

    /// A run that loads a model on a backend before anybody asks for it. It has a slot of the model, so that no request comes into the same
    /// load, and ends ([`Decision::GivesWay`]) as soon as a request wants another one loaded there. `None`: it would be in somebody's way.
    pub fn preload(&mut self, now: Instant, backend: usize, name: &str) -> Option<RunId> {
        let now_s = self.seconds(now);
        let model = self.model(name);
        if self.judge.state(backend, name) != State::Up {
            return None;
        }
        let chosen = self.book.preload(now_s, backend, model)?;
        let want = Want {
            model: name.into(),
            agent: "".into(),
            class: Class::Batch,
            input_bytes: 0,
            most_tokens: Some(0),
            conversation: None,
            streams: false,
            deadline: now,
            barred: Vec::new(),
            only_read: false,
            only_holding: true,
        };
        let (run, _) = self.begin(now_s, model, want, 0.0, &chosen);
        if let Some(loading) = &mut self.book.backends[backend].loading {
            loading.gives_way = true;
        }
        Some(run)
    }

    /// Whoever waited has left. Nothing happens where the waiter has been granted a run already: that run ends by itself.
    pub fn leave(&mut self, waiter: WaiterId) {
        self.take(waiter.0, false);
    }

    /// What follows from all that has happened, and from the time.
    pub fn poll(&mut self, now: Instant, decisions: &mut Vec<Decision>) {
        let now_s = self.seconds(now);
        while let Some(&(at, _, backend, model)) = self.lingers.first()
            && f64::from_bits(at) <= now_s
        {
            self.lingers.pop_first();
            self.book.models[model].cells[backend].lingering -= 1;
            self.freed(model);
        }
        while let Some(&(at, waiter)) = self.deadlines.first()
            && f64::from_bits(at) <= now_s
        {
            self.take(waiter, false);
            decisions.push(Decision::Expired(WaiterId(waiter)));
        }
        if !self.backlog.is_empty() && now_s >= self.rechecked_s + RECHECK_S {
            self.rechecked_s = now_s;
            for model in self.backlog.clone() {
                self.mark(model);
            }
        }
        for _ in 0..MODELS_A_POLL {
            let Some(model) = self.due.pop_front() else { break };
            self.is_due[model] = false;
            self.place(now_s, model, decisions);
        }
        decisions.extend(self.gave_way.drain(..).map(Decision::GivesWay));
    }

    /// When to [`Scheduler::poll`] again, if nothing happens before.
    pub fn wake(&self) -> Option<Instant> {
        let lingers = self.lingers.first().map(|&(at, ..)| f64::from_bits(at));
        let deadlines = self.deadlines.first().map(|&(at, _)| f64::from_bits(at));
        let recheck = (!self.backlog.is_empty()).then_some(self.rechecked_s + RECHECK_S);
        let due = (!self.due.is_empty()).then_some(0.0);
        let first = [lingers, deadlines, recheck, due].into_iter().flatten().min_by(f64::total_cmp)?;
        // Rounded up: a driver that wakes a nanosecond early would spin.
        Some(self.origin + Duration::from_secs_f64(first) + Duration::from_micros(1))
    }

    /// A run's reply has begun.
    pub fn first_byte(&mut self, now: Instant, run: RunId) {
        let now_s = self.seconds(now);
        let Some(run_of) = self.runs.get_mut(&run.0) else { return };
        run_of.first_s.get_or_insert(now_s);
        let (backend, model) = (run_of.backend, run_of.model);
        let rest_s = self.book.generate_s(backend, model, &run_of.want);
        self.book.models[model].cells[backend].began_to_answer(run.0, now_s, rest_s);
        if self.book.loaded(now_s, run.0, backend, model) {
            self.mark(model);
        }
    }

    /// A run has ended, somehow: its slot is free, at once or after the linger.
    pub fn ended(&mut self, now: Instant, run: RunId, how: Ended) {
        self.end(self.seconds(now), run, how);
    }

    fn end(&mut self, now_s: f64, run: RunId, how: Ended) {
        let Some(ended) = self.runs.remove(&run.0) else { return };
        let (backend, model) = (ended.backend, ended.model);
        if matches!(how, Ended::Complete(_)) {
            self.book.loaded(now_s, run.0, backend, model);
        }
        self.book.release(run.0, backend, model);
        match how {
            Ended::Complete(measured) => {
                self.learn(now_s, &ended, &measured);
                let took_s = now_s - ended.began_s;
                let load_s = if ended.is_cold { self.book.times(backend, model).load_s } else { 0.0 };
                let by_s = took_s - load_s - ended.takes_s;
                self.book.models[model].queue.correct(&ended.want.agent, by_s);
            }
            Ended::Left => {
                let until_s = now_s + self.settings.linger.as_secs_f64();
                self.book.models[model].cells[backend].lingering += 1;
                self.lingers.insert((until_s.to_bits(), run.0, backend, model));
            }
            Ended::Moot => {}
        }
        self.freed(model);
    }

    /// What a backend says that it has.
    pub fn seen(&mut self, now: Instant, backend: usize, inventory: &Inventory<'_>) {
        let now_s = self.seconds(now);
        if let Some(held) = inventory.held {
            let models: Vec<(usize, u64)> = held.iter().map(|(name, bytes)| (self.model(name), *bytes)).collect();
            self.book.holds(backend, &models);
        }
        if let Some(loaded) = inventory.loaded {
            let models: Vec<(usize, u64)> = loaded.iter().map(|(name, bytes)| (self.model(name), *bytes)).collect();
            self.book.has_loaded(now_s, backend, &models);
        }
        self.freed_all();
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// Slots that are held, lingering ones included.
    pub fn busy(&self) -> usize {
        self.runs.len() + self.lingers.len()
    }

    fn seconds(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.origin).as_secs_f64()
    }

    fn model(&mut self, name: &str) -> usize {
        let model = self.book.model(name);
        if self.is_due.len() <= model {
            self.is_due.resize(model + 1, false);
        }
        model
    }

    fn mark(&mut self, model: usize) {
        if !std::mem::replace(&mut self.is_due[model], true) {
            self.due.push_back(model);
        }
    }

    /// A slot is free: whoever waits for the model is next. Who might load another one there is placed anew soon anyway.
    fn freed(&mut self, model: usize) {
        if self.backlog.contains(&model) {
            self.mark(model);
        }
    }

    fn freed_all(&mut self) {
        for model in self.backlog.clone() {
            self.mark(model);
        }
    }

    fn take(&mut self, id: u64, is_served: bool) -> Option<Waiter> {
        let waiter = self.waiters.remove(&id)?;
        self.deadlines.remove(&(self.seconds(waiter.want.deadline).to_bits(), id));
        if let Some(own) = self.agents.get_mut(&waiter.want.agent) {
            *own -= 1;
            if *own == 0 {
                self.agents.remove(&waiter.want.agent);
            }
        }
        let queue = &mut self.book.models[waiter.model].queue;
        queue.take(waiter.stand, &waiter.want.agent, is_served);
        if queue.is_empty() {
            self.backlog.remove(&waiter.model);
        }
        Some(waiter)
    }

    /// Places those that wait for a model, in their order, each after the one before. Whose best choice is free now, is granted it; the
    /// others only keep it from those behind them.
    fn place(&mut self, now_s: f64, model: usize, decisions: &mut Vec<Decision>) {
        let mut first = std::mem::take(&mut self.scratch);
        let mut desks = std::mem::take(&mut self.desks);
        self.book.models[model].queue.first(now_s, LOOKED_AT, &mut first);
        self.book.set_desks(now_s, model, first.len(), self.tier_s(), &*self.judge, &mut desks);
        let mut moved = false;
        for id in &first {
            let waiter = &self.waiters[id];
            let Some(chosen) = self.book.choose(now_s, model, &waiter.want, &mut desks) else {
                self.take(*id, false);
                decisions.push(Decision::Nowhere(WaiterId(*id)));
                continue;
            };
            desks[chosen.backend].reserve(&chosen);
            if !chosen.is_free {
                continue;
            }
            moved = true;
            let Some(waiter) = self.take(*id, true) else { continue };
            let (run, trial) = self.begin(now_s, model, waiter.want, waiter.takes_s, &chosen);
            let waited = Duration::from_secs_f64((now_s - waiter.came_s).max(0.0));
            let (waiter, backend, reason, is_cold) = (WaiterId(*id), chosen.backend, chosen.reason, chosen.is_cold);
            decisions.push(Decision::Granted(Grant { waiter, run, backend, reason, is_cold, waited, trial }));
        }
        if moved && self.backlog.contains(&model) && first.len() == LOOKED_AT {
            self.mark(model); // more may be free
        }
        self.scratch = first;
        self.desks = desks;
    }

    fn begin(
        &mut self,
        now_s: f64,
        model: usize,
        want: Want,
        takes_s: f64,
        chosen: &placement::Choice,
    ) -> (RunId, Trial) {
        let loads = self.book.backends[chosen.backend].loading.as_ref().filter(|loading| loading.gives_way);
        if let Some(other) = loads.filter(|loading| chosen.is_cold && loading.model != model).map(|its| RunId(its.run))
        {
            self.end(now_s, other, Ended::Left);
            self.gave_way.push(other);
        }
        self.last_id += 1;
        let run = self.last_id;
        let trial = self.judge.begins(chosen.backend, &want.model);
        self.book.begin(run, model, want.streams, chosen, now_s);
        let run_of = Run {
            backend: chosen.backend,
            model,
            takes_s,
            want,
            cached_bytes: chosen.cached_bytes,
            is_cold: chosen.is_cold,
            began_s: now_s,
            first_s: None,
        };
        self.runs.insert(run, run_of);
        (RunId(run), trial)
    }

    /// What a whole answer teaches. Ollama's own durations are believed; without them the times as seen from here are.
    fn learn(&mut self, now_s: f64, run: &Run, measured: &Measured) {
        let output_tokens = measured.output_tokens.map(|tokens| tokens as f64);
        let first_s = run.first_s.unwrap_or(now_s) - run.began_s;
        let expected = self.book.times(run.backend, run.model);
        let new_bytes = run.want.input_bytes.saturating_sub(run.cached_bytes).max(1) as f64;
        let generates = output_tokens.is_some_and(|tokens| tokens >= 1.0);
        // Of an answer that comes whole the first byte says nothing of prefill, unless it generates nothing.
        let split = run.want.streams || run.want.most_tokens == Some(0);
        let load_s = measured
            .load
            .map(|load| load.as_secs_f64())
            .or_else(|| (run.is_cold && split).then(|| (first_s - expected.prefill_s_byte * new_bytes).max(0.0)));
        let prefill_s = measured.prefill.map(|prefill| prefill.as_secs_f64());
        let prefill_s = prefill_s.or((!run.is_cold && split).then_some(first_s));
        let generate_s = measured.generate.map(|generate| generate.as_secs_f64());
        let generate_s = generate_s.or((split && generates).then_some(now_s - run.began_s - first_s));
        let lessons = book::Lessons {
            load_s: load_s.filter(|_| run.is_cold),
            prefill_s_byte: prefill_s.filter(|_| new_bytes >= 64.0).map(|s| s / new_bytes),
            generate_s_token: generate_s
                .zip(output_tokens.filter(|tokens| *tokens >= 1.0))
                .map(|(s, tokens)| s / tokens),
            output_tokens: output_tokens.filter(|_| run.want.most_tokens != Some(0)),
        };
        self.book.learn(run.backend, run.model, &lessons);
        let entry = &mut self.book.models[run.model].cells[run.backend];
        entry.answered(now_s, run.want.conversation, run.want.input_bytes + 4 * measured.output_tokens.unwrap_or(0));
    }

    /// Whether one more may wait.
    fn room_for(&self, model: usize, want: &Want) -> Result<(), Full> {
        let queued = self.book.models[model].queue.len();
        let takes_s = self.book.takes_s(model, want);
        if queued >= self.settings.model_waiting || self.waiters.len() >= self.settings.all_waiting {
            return Err(Full::Whole { retry_after: self.retry_after(model, queued, takes_s) });
        }
        let own = self.agents.get(&want.agent).copied().unwrap_or(0);
        if own >= self.settings.agent_waiting {
            return Err(Full::Share { retry_after: self.retry_after(model, own, takes_s) });
        }
        Ok(())
    }

    fn tier_s(&self) -> f64 {
        self.settings.tier.as_secs_f64()
    }

    fn retry_after(&self, model: usize, ahead: usize, takes_s: f64) -> Duration {
        let slots = self.book.slots_in_use(model).max(1) as f64;
        let (least, most) = RETRY_AFTER_S;
        // A place is free as soon as the first of them is served; whoever comes back then is not alone, so: half of them.
        Duration::from_secs_f64((takes_s * ahead as f64 / slots / 2.0).clamp(least, most).ceil())
    }
}

#[cfg(test)]
mod tests;
