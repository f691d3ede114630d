//! What was learnt from the requests before: means that follow, over a guess to begin with.

/// A mean that follows what it sees: plain for the first few, then weighted towards the last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mean {
    value: f64,
    seen: u32,
}

/// From then on a new value counts one in so many: a backend whose clock was throttled is found out within a dozen requests, and
/// one odd request moves nothing much.
const MEMORY: u32 = 10;

impl Mean {
    pub fn note(&mut self, value: f64) {
        if !value.is_finite() || value < 0.0 {
            return;
        }
        self.seen = (self.seen + 1).min(MEMORY);
        self.value += (value - self.value) / f64::from(self.seen);
    }

    /// The guess counts as one observation.
    pub fn or(&self, guess: f64) -> f64 {
        (guess + self.value * f64::from(self.seen)) / f64::from(1 + self.seen)
    }

    pub fn is_known(&self) -> bool {
        self.seen > 0
    }
}

/// How long a model takes: on all backends together, or on one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    pub load_s: Mean,
    pub prefill_s_byte: Mean,
    pub generate_s_token: Mean,
}

/// What the parts of one request will take.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    pub load_s: f64,
    pub prefill_s_byte: f64,
    pub generate_s_token: f64,
}

/// For a model of which nothing was seen, by its size: such as a graphics card of a workstation does it. Only the order of magnitude
/// matters, since the first answer corrects it.
pub fn guess(bytes: u64) -> Times {
    let gigabytes = if bytes == 0 { 8.0 } else { (bytes as f64 / 1e9).clamp(0.3, 500.0) };
    Times {
        load_s: 2.0 + gigabytes / 1.5,
        // 4 bytes a token, 2,000 tokens a second for a model of 8 GB.
        prefill_s_byte: gigabytes / 8.0 / 8000.0,
        generate_s_token: gigabytes / 8.0 / 60.0,
    }
}

impl Rates {
    pub fn or(&self, guess: &Times) -> Times {
        Times {
            load_s: self.load_s.or(guess.load_s),
            prefill_s_byte: self.prefill_s_byte.or(guess.prefill_s_byte),
            generate_s_token: self.generate_s_token.or(guess.generate_s_token),
        }
    }
}

/// Events a minute, roughly, forgetting the old ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Demand {
    count: f64,
    at_s: f64,
}

const DEMAND_S: f64 = 60.0;

impl Demand {
    pub fn note(&mut self, now_s: f64) {
        self.count = self.at(now_s) + 1.0;
        self.at_s = now_s;
    }

    fn at(&self, now_s: f64) -> f64 {
        self.count * (-(now_s - self.at_s).max(0.0) / DEMAND_S).exp()
    }

    /// How likely another one is within a minute.
    pub fn soon(&self, now_s: f64) -> f64 {
        1.0 - (-self.at(now_s)).exp()
    }
}
