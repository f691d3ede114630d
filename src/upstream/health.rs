//! Whether a backend is to be trusted with work, judged by what became of earlier work. Pure: what happened and `now` come in.
//!
//! A breaker for the backend and one for each model that fails on it: after some failures in a row it opens, and the backend is passed
//! over as long as there is another; after a rest one request may try (half-open), and what becomes of it closes or opens the breaker.
//! So a backend that fails within milliseconds, and always looks idle, gets less work and not more. Where there is no other backend an
//! open breaker stops nobody: a refusal of ours would be no better than the backend's.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::scheduler::Trial;

/// Models with a breaker of their own, at most: a client chooses the names. Only failing ones have one.
const MODELS: usize = 256;
/// A trial that says nothing for so long has said something: the next may try.
const TRIAL: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Failures in a row that open a breaker.
    pub failures: u32,
    /// Rest after it has opened; doubled by each trial that fails, up to `most_rest`.
    pub rest: Duration,
    pub most_rest: Duration,
}

/// Why an attempt came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// It cannot be connected to, or its name does not resolve.
    Unreachable,
    /// It closed the connection before its reply.
    BrokeOff,
    /// What it says is not what Ollama says.
    Garbage,
    /// It said nothing for too long.
    Silent,
    /// 503: its queue is full.
    Full,
    /// 404: it has not got the model.
    Absent,
    /// 404 in the plain words of its router: it has not got the route.
    NoRoute,
    /// Another 5xx.
    Error,
}

impl Failed {
    pub const ALL: [Failed; 8] = [
        Failed::Unreachable,
        Failed::BrokeOff,
        Failed::Garbage,
        Failed::Silent,
        Failed::Full,
        Failed::Absent,
        Failed::NoRoute,
        Failed::Error,
    ];

    /// A word for records and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Failed::Unreachable => "unreachable",
            Failed::BrokeOff => "broke_off",
            Failed::Garbage => "garbage",
            Failed::Silent => "silent",
            Failed::Full => "full",
            Failed::Absent => "absent",
            Failed::NoRoute => "no_route",
            Failed::Error => "error",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Closed,
    Open,
    /// One request may try, or does.
    HalfOpen,
}

impl State {
    /// Or half open: it keeps requests away.
    pub fn is_open(self) -> bool {
        self != State::Closed
    }

    pub fn as_str(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::Open => "open",
            State::HalfOpen => "half_open",
        }
    }
}

/// The breakers of one backend.
pub struct Health {
    settings: Settings,
    whole: Breaker,
    /// By canonical name.
    models: HashMap<String, Breaker>,
}

impl Health {
    pub fn new(settings: Settings) -> Health {
        Health { settings, whole: Breaker::default(), models: HashMap::new() }
    }

    /// Whether a request for the model would be let through now.
    pub fn lets(&self, model: Option<&str>, now: Instant) -> bool {
        self.whole.lets(now) && model.and_then(|model| self.models.get(model)).is_none_or(|own| own.lets(now))
    }

    /// Whether one request for the model may try, and no more.
    pub fn is_trying(&self, model: &str, now: Instant) -> bool {
        let own = self.models.get(model).map(|own| own.state(now));
        self.whole.state(now) == State::HalfOpen || own == Some(State::HalfOpen)
    }

    /// A request goes there: if a breaker is half-open, as its trial.
    pub fn begins(&mut self, model: Option<&str>, now: Instant) -> Trial {
        let own = model.and_then(|model| self.models.get_mut(model));
        Trial { of_backend: self.whole.begins(now), of_model: own.is_some_and(|own| own.begins(now)) }
    }

    /// A trial came to no result, since its client left: the next request may try.
    pub fn gives_up(&mut self, model: Option<&str>, trial: Trial) {
        if trial.of_backend {
            self.whole.trial = None;
        }
        if let Some(own) = model.filter(|_| trial.of_model).and_then(|model| self.models.get_mut(model)) {
            own.trial = None;
        }
    }

    pub fn succeeded(&mut self, model: Option<&str>) {
        self.whole = Breaker::default();
        if let Some(model) = model {
            self.models.remove(model);
        }
    }

    pub fn failed(&mut self, model: Option<&str>, how: Failed, now: Instant) {
        let settings = &self.settings;
        match how {
            // Nobody else can connect either.
            Failed::Unreachable => self.whole.failed(settings.failures, settings, now),
            Failed::Absent | Failed::NoRoute => {}
            // It takes connections, so that it may be the model and not the whole backend that is at fault.
            Failed::BrokeOff | Failed::Garbage | Failed::Silent | Failed::Full | Failed::Error => {
                let Some(model) = model else { return self.whole.failed(1, settings, now) };
                if !self.models.contains_key(model) && self.models.len() >= MODELS {
                    self.models.retain(|_, own| !own.lets(now));
                }
                if self.models.contains_key(model) || self.models.len() < MODELS {
                    self.models.entry(model.to_owned()).or_default().failed(1, settings, now);
                }
            }
        }
    }

    pub fn state(&self, now: Instant) -> State {
        self.whole.state(now)
    }

    /// The models whose own breaker is not closed, in order.
    pub fn models(&self, now: Instant) -> Vec<(&str, State)> {
        let mut models: Vec<_> = self.models.iter().map(|(model, own)| (model.as_str(), own.state(now))).collect();
        models.retain(|(_, state)| *state != State::Closed);
        models.sort_unstable_by_key(|(model, _)| *model);
        models
    }
}

#[derive(Default)]
struct Breaker {
    /// In a row.
    failures: u32,
    /// Since when it rests, and for how long. `None`: closed.
    rests: Option<(Instant, Duration)>,
    /// Since when somebody tries.
    trial: Option<Instant>,
}

impl Breaker {
    fn state(&self, now: Instant) -> State {
        match self.rests {
            None => State::Closed,
            Some((since, rest)) if now.saturating_duration_since(since) < rest => State::Open,
            Some(_) => State::HalfOpen,
        }
    }

    fn lets(&self, now: Instant) -> bool {
        match self.state(now) {
            State::Closed => true,
            State::Open => false,
            State::HalfOpen => self.trial.is_none_or(|since| now.saturating_duration_since(since) >= TRIAL),
        }
    }

    fn begins(&mut self, now: Instant) -> bool {
        let tries = self.state(now) == State::HalfOpen && self.lets(now);
        if tries {
            self.trial = Some(now);
        }
        tries
    }

    fn failed(&mut self, weight: u32, settings: &Settings, now: Instant) {
        self.failures = self.failures.saturating_add(weight);
        match self.state(now) {
            State::Closed if self.failures >= settings.failures => self.rests = Some((now, settings.rest)),
            State::HalfOpen => {
                let rest = self.rests.map_or(settings.rest, |(_, rest)| rest);
                self.rests = Some((now, (rest * 2).min(settings.most_rest)));
                self.trial = None;
            }
            // What was under way when it opened says nothing new.
            State::Closed | State::Open => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);
    const SETTINGS: Settings =
        Settings { failures: 3, rest: Duration::from_secs(5), most_rest: Duration::from_secs(15) };

    fn health() -> (Health, Instant) {
        (Health::new(SETTINGS), Instant::now())
    }

    #[test]
    fn three_failures_in_a_row_open_a_models_breaker_and_leave_the_others_alone() {
        let (mut health, now) = health();
        for _ in 0..2 {
            health.failed(Some("m"), Failed::Full, now);
        }
        health.succeeded(Some("m"));
        for n in 0..3 {
            assert!(health.lets(Some("m"), now), "{n}");
            health.failed(Some("m"), Failed::Error, now);
        }
        assert!(!health.lets(Some("m"), now));
        assert!(health.lets(Some("other"), now) && health.lets(None, now));
        assert_eq!(health.models(now), [("m", State::Open)]);
        assert_eq!(health.state(now), State::Closed);
    }

    #[test]
    fn after_its_rest_one_request_tries_and_the_others_wait_for_what_becomes_of_it() {
        let (mut health, now) = health();
        health.failed(None, Failed::Unreachable, now);
        assert!(!health.lets(Some("m"), now + 4 * S), "one failed connection is enough");
        let later = now + 5 * S;
        assert!(health.lets(Some("m"), later));
        health.begins(Some("m"), later);
        assert!(!health.lets(Some("m"), later), "no herd");
        health.failed(Some("m"), Failed::Unreachable, later);
        assert!(!health.lets(None, later + 9 * S), "a trial that fails doubles the rest");
        let third = later + 10 * S;
        health.begins(None, third);
        health.failed(None, Failed::Unreachable, third);
        assert!(health.lets(None, third + 15 * S), "which is bounded");
        health.begins(None, third + 15 * S);
        health.succeeded(None);
        assert_eq!(health.state(third + 15 * S), State::Closed);
        assert!(health.lets(None, third + 15 * S));
    }

    #[test]
    fn a_trial_whose_client_leaves_makes_room_for_the_next() {
        let (mut health, now) = health();
        health.failed(None, Failed::Unreachable, now);
        for _ in 0..3 {
            health.failed(Some("m"), Failed::Full, now);
        }
        let later = now + 5 * S;
        let trial = health.begins(Some("m"), later);
        assert_eq!(trial, Trial { of_backend: true, of_model: true });
        assert_eq!(health.begins(Some("m"), later), Trial::default(), "one at a time");
        health.gives_up(Some("m"), Trial::default());
        assert!(!health.lets(Some("m"), later), "that was not the one");
        health.gives_up(Some("m"), trial);
        assert!(health.lets(Some("m"), later));
    }

    #[test]
    fn a_trial_that_says_nothing_does_not_keep_others_away_for_ever() {
        let (mut health, now) = health();
        health.failed(None, Failed::Unreachable, now);
        health.begins(None, now + 5 * S);
        assert!(!health.lets(None, now + 5 * S));
        assert!(health.lets(None, now + 5 * S + TRIAL));
    }

    #[test]
    fn failures_of_what_was_under_way_do_not_lengthen_the_rest() {
        let (mut health, now) = health();
        for n in 0..50 {
            health.failed(Some("m"), Failed::BrokeOff, now + n * S / 100);
        }
        assert!(!health.lets(Some("m"), now + 4 * S));
        assert!(health.lets(Some("m"), now + 6 * S));
    }

    #[test]
    fn a_missing_model_is_nobodys_fault_and_names_take_bounded_room() {
        let (mut health, now) = health();
        for n in 0..10_000 {
            health.failed(Some("m"), Failed::Absent, now);
            health.failed(Some(&format!("made-up-{n}")), Failed::Error, now);
        }
        assert!(health.lets(Some("m"), now));
        assert!(health.models.len() <= MODELS);
    }
}
