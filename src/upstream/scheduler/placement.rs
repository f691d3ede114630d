//! What each backend would cost a request, in seconds until its answer is complete, and the least of it.
//!
//! Waiting for a slot, loading the model, what the load takes from others, reading the prompt (less what the backend still holds of
//! the conversation), generating, and what the configuration prefers. A request is willing to wait for a slot where the model is
//! loaded, if that ends sooner than a load elsewhere.

use super::book::{Backend, Book, Loading, Running, State};
use super::rates::Times;
use super::{Judge, Want};

/// Requests of other models share the backend's processor: each of them slows this one down by so much.
const CROWDED: f64 = 0.35;
/// How much of what a slot holds of another conversation is counted as lost, if this request takes its place.
const FORGOTTEN: f64 = 0.3;

/// Why it is this backend: the audit's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No other could be chosen.
    Only,
    /// The model is loaded there, and the conversation was answered there before.
    Conversation,
    /// The model is loaded there.
    Loaded,
    /// The model is there, is loaded nowhere, and has to be loaded.
    Held,
    /// It is loaded elsewhere, and loading it here as well ends sooner than waiting.
    SecondCopy,
    /// Nobody knows who has the model.
    Unknown,
    /// Nobody has the model: Ollama itself says so.
    Absent,
    /// All that could take it have failed lately.
    LastResort,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Only => "only",
            Reason::Conversation => "conversation",
            Reason::Loaded => "loaded",
            Reason::Held => "held",
            Reason::SecondCopy => "second_copy",
            Reason::Unknown => "unknown",
            Reason::Absent => "absent",
            Reason::LastResort => "last_resort",
        }
    }
}

/// One backend's offer for one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub backend: usize,
    pub reason: Reason,
    /// Seconds until the answer is complete, with what the load takes from others and what the configuration prefers.
    pub cost_s: f64,
    /// It can be sent now.
    pub is_free: bool,
    pub is_cold: bool,
    pub cached_bytes: u64,
    /// When the slot is free, and how long the request will hold it.
    starts_s: f64,
    pub(super) holds_s: f64,
    pub(super) load_s: f64,
}

/// What a backend has to offer for one request, for those who ask why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offer {
    pub backend: usize,
    pub standing: Standing,
    /// Seconds until a slot is free.
    pub waits_s: f64,
    /// Seconds for the model to be loaded, with what has to end before.
    pub load_s: f64,
    /// Seconds until the answer is complete, with what the load takes from others and what the configuration prefers: the least wins.
    pub cost_s: f64,
}

/// How a backend stands to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The model is in its memory.
    Loaded,
    /// The model is on its disk.
    Held,
    /// Its list was not read, and it may be used all the same.
    Unknown,
    /// Its list was not read: it is not used while others were.
    Unread,
    /// It fails, or did lately: it is used where no other can be.
    Failing,
    /// It has not got the model: it is used where no other can be.
    Absent,
    /// The configuration keeps the model from it.
    Barred,
    /// An operator has drained it.
    Drained,
}

impl Standing {
    pub fn as_str(self) -> &'static str {
        match self {
            Standing::Loaded => "loaded",
            Standing::Held => "held",
            Standing::Unknown => "unknown",
            Standing::Unread => "unread",
            Standing::Failing => "failing",
            Standing::Absent => "absent",
            Standing::Barred => "barred",
            Standing::Drained => "drained",
        }
    }

    /// Whether it may have the request at all.
    pub fn may_serve(self) -> bool {
        !matches!(self, Standing::Unread | Standing::Barred | Standing::Drained)
    }
}

/// A backend while those who wait for one model are placed on it in thought.
pub struct Desk {
    rank: Rank,
    /// One may try, and no more.
    is_trial: bool,
    is_warm: bool,
    is_free: bool,
    /// When each slot is free, as many as may be needed.
    free_s: Vec<f64>,
    times: Times,
    crowd: f64,
    preference_s: f64,
    /// Waiting for the loader and for what must end first; what others lose. `None`: not yet worked out.
    load: Option<(f64, f64)>,
}

/// What may be chosen at all: the best rank that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Known,
    /// Its list was not read.
    Unknown,
    /// Failing, or down, though it would have the model.
    Suspect,
    Absent,
    Never,
}

impl Desk {
    /// One more is before those that follow.
    pub fn reserve(&mut self, chosen: &Choice) {
        let first = self.free_s.iter_mut().min_by(|a, b| a.total_cmp(b));
        if let Some(first) = first {
            *first = chosen.starts_s + chosen.holds_s;
        }
        if chosen.is_cold {
            // Its other slots are ready once it is loaded.
            for free_s in &mut self.free_s {
                *free_s = free_s.max(chosen.starts_s + chosen.load_s);
            }
            self.is_warm = true;
        }
        self.is_free = false;
        if self.is_trial {
            self.rank = Rank::Suspect;
        }
    }

    fn starts_s(&self) -> f64 {
        self.free_s.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

impl Book {
    /// Sets a desk for each backend, with `most` slots at most.
    pub fn set_desks(
        &self,
        now_s: f64,
        model: usize,
        most: usize,
        tier_s: f64,
        judge: &dyn Judge,
        desks: &mut Vec<Desk>,
    ) {
        desks.resize_with(self.backends.len(), || Desk {
            rank: Rank::Never,
            is_trial: false,
            is_warm: false,
            is_free: false,
            free_s: Vec::new(),
            times: Times::default(),
            crowd: 1.0,
            preference_s: 0.0,
            load: None,
        });
        let usual = self.usual_times(model);
        for (place, desk) in desks.iter_mut().enumerate() {
            let backend = &self.backends[place];
            let cell = &self.models[model].cells[place];
            let state = judge.state(place, &self.models[model].name);
            desk.is_trial = state == State::Trial;
            desk.rank = match state {
                State::Drained => Rank::Never,
                _ if backend.is_read && !cell.is_held && !cell.is_loaded => Rank::Absent,
                State::Down => Rank::Suspect,
                State::Trial if cell.is_used() => Rank::Suspect,
                State::Up | State::Trial if !backend.is_read => Rank::Unknown,
                State::Up | State::Trial => Rank::Known,
            };
            if desk.rank == Rank::Never {
                continue;
            }
            let comes =
                backend.loading.as_ref().filter(|loading| cell.running.iter().any(|run| run.run == loading.run));
            desk.is_warm = comes.is_some() || self.is_loaded(place, model) || desk.rank == Rank::Absent;
            desk.free_s.clear();
            let ready_s = comes.map_or(now_s, |loading| loading.until_s.max(now_s + 0.1));
            desk.free_s.extend(std::iter::repeat_n(ready_s, cell.free().min(most.max(1))));
            if desk.free_s.len() < most.max(1) {
                desk.free_s.extend(cell.running.iter().map(|running| now_s + running.left_s(now_s)));
                desk.free_s.extend(std::iter::repeat_n(now_s + 0.1, cell.lingering));
            }
            desk.is_free = cell.free() > 0 && comes.is_none();
            desk.times = self.times_from(place, model, &usual);
            let others = backend.busy().saturating_sub(cell.running.len());
            desk.crowd = 1.0 + CROWDED * others as f64;
            // In flight only decides between equals.
            desk.preference_s =
                tier_s * f64::from(backend.settings.tier) + 1e-4 * backend.busy() as f64 / backend.settings.weight;
            desk.load = None;
        }
    }

    /// The backend that costs the request least. `None`: none may take it.
    pub fn choose(&self, now_s: f64, model: usize, want: &Want, desks: &mut [Desk]) -> Option<Choice> {
        let passes_unread = self.passes_unread(want);
        let may = |place: &usize| self.may(want, passes_unread, *place);
        let tokens = self.tokens(model, want);
        let (mut rank, mut choices) = (Rank::Never, 0);
        for place in (0..desks.len()).filter(may) {
            rank = rank.min(desks[place].rank);
            choices += usize::from(desks[place].rank != Rank::Never);
        }
        if rank == Rank::Never || (rank == Rank::Absent && want.only_holding) {
            return None;
        }
        loop {
            let mut best: Option<Choice> = None;
            for place in (0..desks.len()).filter(may) {
                if desks[place].rank != rank {
                    continue;
                }
                let offer = self.offer(now_s, model, want, tokens, place, &desks[place]);
                if best.is_none_or(|best| offer.cost_s < best.cost_s) {
                    best = Some(offer);
                }
            }
            let mut best = best?;
            let desk = &mut desks[best.backend];
            if best.is_cold && desk.load.is_none() {
                // Without it the offer was too good; only what would win is worked out.
                desk.load = Some(self.load_costs(now_s, best.backend, model));
                continue;
            }
            best.reason = match rank {
                _ if choices == 1 => Reason::Only,
                Rank::Suspect => Reason::LastResort,
                Rank::Unknown => Reason::Unknown,
                Rank::Absent | Rank::Never => Reason::Absent,
                Rank::Known if !best.is_cold && best.cached_bytes > 0 => Reason::Conversation,
                Rank::Known if !best.is_cold => Reason::Loaded,
                Rank::Known if desks.iter().any(|desk| desk.rank == Rank::Known && desk.is_warm) => Reason::SecondCopy,
                Rank::Known => Reason::Held,
            };
            return Some(best);
        }
    }

    /// What each backend has to offer, the chosen one and the others.
    pub fn offers(&self, now_s: f64, model: usize, want: &Want, desks: &mut [Desk]) -> Vec<Offer> {
        let (passes_unread, tokens) = (self.passes_unread(want), self.tokens(model, want));
        let offer = |(place, desk): (usize, &mut Desk)| {
            let standing = match desk.rank {
                Rank::Never => Standing::Drained,
                _ if want.barred.contains(&place) => Standing::Barred,
                _ if !self.may(want, passes_unread, place) => Standing::Unread,
                Rank::Known if desk.is_warm => Standing::Loaded,
                Rank::Known => Standing::Held,
                Rank::Unknown => Standing::Unknown,
                Rank::Suspect => Standing::Failing,
                Rank::Absent => Standing::Absent,
            };
            if !standing.may_serve() {
                return Offer { backend: place, standing, waits_s: 0.0, load_s: 0.0, cost_s: 0.0 };
            }
            if !desk.is_warm && desk.load.is_none() {
                desk.load = Some(self.load_costs(now_s, place, model));
            }
            let choice = self.offer(now_s, model, want, tokens, place, desk);
            let waits_s = (choice.starts_s - now_s).max(0.0);
            Offer { backend: place, standing, waits_s, load_s: choice.load_s, cost_s: choice.cost_s }
        };
        desks.iter_mut().enumerate().map(offer).collect()
    }

    /// Whether backends are left out whose list was not read.
    fn passes_unread(&self, want: &Want) -> bool {
        want.only_read && self.backends.iter().any(|backend| backend.is_read)
    }

    fn may(&self, want: &Want, passes_unread: bool, place: usize) -> bool {
        !want.barred.contains(&place) && (!passes_unread || self.backends[place].is_read)
    }

    fn offer(&self, now_s: f64, model: usize, want: &Want, tokens: f64, place: usize, desk: &Desk) -> Choice {
        let cell = &self.models[model].cells[place];
        let cached_bytes = if desk.is_warm { cell.cached_bytes(want) } else { 0 };
        let forgets = if desk.is_warm && cached_bytes == 0 { cell.would_forget() } else { 0 };
        let (wait_s, loss_s) = if desk.is_warm { (0.0, 0.0) } else { desk.load.unwrap_or((0.0, 0.0)) };
        let load_s = if desk.is_warm { 0.0 } else { desk.times.load_s + wait_s };
        let new_bytes = (want.input_bytes - cached_bytes) as f64;
        let works_s = (new_bytes * desk.times.prefill_s_byte + tokens * desk.times.generate_s_token) * desk.crowd;
        let lost_s = loss_s + FORGOTTEN * forgets as f64 * desk.times.prefill_s_byte;
        let starts_s = desk.starts_s();
        // One load at a time: where another is under way, this one would wait in Ollama's queue, where it cannot be called back.
        let loader_is_free = self.backends[place].in_the_way().is_none();
        Choice {
            backend: place,
            reason: Reason::Loaded,
            cost_s: (starts_s - now_s) + load_s + works_s + lost_s + desk.preference_s,
            is_free: starts_s <= now_s && (desk.is_warm || loader_is_free),
            is_cold: !desk.is_warm,
            cached_bytes,
            starts_s,
            holds_s: load_s + works_s,
            load_s,
        }
    }

    /// A load that nobody waits for: what it would be chosen for, if it is in nobody's way. The model is on the backend's disk and not in its
    /// memory, nothing else is loaded, and nothing that is used has to make room.
    pub fn preload(&self, now_s: f64, place: usize, model: usize) -> Option<Choice> {
        let (backend, cell) = (&self.backends[place], &self.models[model].cells[place]);
        if self.is_loaded(place, model) || cell.is_used() || backend.loading.is_some() {
            return None;
        }
        if self.victims(place, model).into_iter().any(|victim| self.models[victim].cells[place].is_used()) {
            return None;
        }
        let load_s = self.times(place, model).load_s;
        Some(Choice {
            backend: place,
            reason: Reason::Held,
            cost_s: load_s,
            is_free: true,
            is_cold: true,
            cached_bytes: 0,
            starts_s: now_s,
            holds_s: load_s,
            load_s,
        })
    }

    /// How long a load waits for the loader and for requests of models that must go, and what it costs that they go.
    fn load_costs(&self, now_s: f64, place: usize, model: usize) -> (f64, f64) {
        let backend = &self.backends[place];
        let mut wait_s = backend.in_the_way().map_or(0.0, |loading| (loading.until_s - now_s).max(0.5));
        let mut cost_s = 0.0;
        for victim in self.victims(place, model) {
            let cell = &self.models[victim].cells[place];
            for running in &cell.running {
                wait_s = wait_s.max(running.left_s(now_s));
            }
            cost_s +=
                self.models[victim].demand.soon(now_s) * self.times(place, victim).load_s / self.copies(victim) as f64;
        }
        (wait_s, cost_s)
    }

    fn copies(&self, model: usize) -> usize {
        self.models[model].cells.iter().filter(|cell| cell.is_loaded).count().max(1)
    }

    /// What Ollama would unload to make room: what is idle longest, and only then what is in use.
    pub fn victims(&self, place: usize, model: usize) -> Vec<usize> {
        let backend = &self.backends[place];
        if backend.room_bytes == u64::MAX {
            return Vec::new(); // nothing has ever been pushed out
        }
        let mut loaded: Vec<usize> =
            backend.loaded.iter().copied().filter(|its| *its != model && self.is_loaded(place, *its)).collect();
        let mut used: u64 = loaded.iter().map(|its| self.models[*its].bytes).sum::<u64>() + self.models[model].bytes;
        if used <= backend.room_bytes {
            return Vec::new();
        }
        let age = |its: &usize| {
            let cell = &self.models[*its].cells[place];
            (cell.is_used(), cell.used_s)
        };
        loaded.sort_by(|a, b| age(a).partial_cmp(&age(b)).unwrap_or(std::cmp::Ordering::Equal));
        let mut victims = Vec::new();
        for its in loaded {
            if used <= backend.room_bytes {
                break;
            }
            used -= self.models[its].bytes;
            victims.push(its);
        }
        victims
    }

    /// A run takes its slot.
    pub fn begin(&mut self, run: u64, model: usize, streams: bool, chosen: &Choice, now_s: f64) {
        if chosen.is_cold {
            // What makes room gets no more requests there: they would wait for its reload.
            for victim in self.victims(chosen.backend, model) {
                self.models[victim].cells[chosen.backend].is_loaded = false;
                self.backends[chosen.backend].loaded.retain(|its| *its != victim);
            }
        }
        let backend: &mut Backend = &mut self.backends[chosen.backend];
        backend.in_flight += 1;
        if chosen.is_cold && backend.loading.is_none() {
            let until_s = now_s + chosen.load_s;
            backend.loading = Some(Loading { run, model, streams, until_s, gives_way: false });
        }
        let cell = &mut self.models[model].cells[chosen.backend];
        cell.used_s = now_s;
        cell.running.push(Running { run, began_s: now_s, ends_s: now_s + chosen.holds_s });
    }
}
