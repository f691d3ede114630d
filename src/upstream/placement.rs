//! Which backend a request goes to that waits for nothing (lists, details, management), from what is known at that moment. Pure:
//! candidates in, one of them and the reason out.
//!
//! In this order: who has the model; who answers; the lowest tier; who has the model loaded; the least work for
//! its weight. Between equals it goes round.

use std::cmp::Reverse;

/// What is known of a backend's copy of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Has {
    Loaded,
    Held,
    /// Its models were never read.
    Unknown,
    Absent,
}

/// A backend that may serve the request.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// In the pool.
    pub place: usize,
    pub has: Has,
    pub up: bool,
    pub tier: u32,
    pub in_flight: u64,
    pub weight: u32,
}

/// Why it was this one: the audit's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No other could be chosen.
    Only,
    /// The request, or for management the configuration, names it.
    Named,
    /// The model is loaded there.
    Loaded,
    /// The model is there, and has to be loaded.
    Held,
    /// Nobody knows who has the model.
    Unknown,
    /// Nobody has the model: Ollama itself says so.
    Absent,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Only => "only",
            Reason::Named => "named",
            Reason::Loaded => "loaded",
            Reason::Held => "held",
            Reason::Unknown => "unknown",
            Reason::Absent => "absent",
        }
    }
}

/// `turn` goes up by one for each choice.
pub fn choose(candidates: &[Candidate], turn: usize) -> Option<(usize, Reason)> {
    if let [one] = candidates {
        return Some((one.place, Reason::Only));
    }
    let count = candidates.len();
    let rank = |(i, candidate): &(usize, &Candidate)| {
        let has = match candidate.has {
            Has::Loaded | Has::Held => 0,
            Has::Unknown => 1,
            Has::Absent => 2,
        };
        // With what this request adds, so that weights count from the first one on.
        let load = (candidate.in_flight + 1).saturating_mul(1_000_000) / u64::from(candidate.weight.max(1));
        let warm = Reverse(candidate.has == Has::Loaded);
        (has, Reverse(candidate.up), candidate.tier, warm, load, (i + count - turn % count) % count)
    };
    let (_, best) = candidates.iter().enumerate().min_by_key(rank)?;
    let reason = match best.has {
        Has::Loaded => Reason::Loaded,
        Has::Held => Reason::Held,
        Has::Unknown => Reason::Unknown,
        Has::Absent => Reason::Absent,
    };
    Some((best.place, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Candidate = Candidate { place: 0, has: Has::Held, up: true, tier: 0, in_flight: 0, weight: 1 };

    fn chosen(candidates: &[Candidate]) -> (usize, Reason) {
        choose(candidates, 0).expect("there is one")
    }

    #[test]
    fn each_criterion_outweighs_all_that_follow_it() {
        let worse: [fn(&mut Candidate); 5] =
            [|c| c.has = Has::Absent, |c| c.up = false, |c| c.tier = 1, |c| c.has = Has::Held, |c| c.in_flight = 9];
        for (i, spoil) in worse.iter().enumerate() {
            let mut first = Candidate { has: Has::Loaded, ..IDLE };
            spoil(&mut first);
            let mut second = Candidate { place: 1, has: Has::Loaded, ..IDLE };
            worse[i + 1..].iter().for_each(|spoil| spoil(&mut second));
            if i == 3 {
                second.has = Has::Loaded; // its own criterion again
            }
            assert_eq!(chosen(&[first, second]).0, 1, "criterion {i}");
            assert_eq!(chosen(&[second, first]).0, 1, "criterion {i}, the other way round");
        }
    }

    #[test]
    fn work_is_shared_by_weight_and_goes_round_between_equals() {
        let mut in_flight = [0; 3];
        for turn in 0..40 {
            let candidates: Vec<Candidate> = [1, 1, 2]
                .into_iter()
                .enumerate()
                .map(|(place, weight)| Candidate { place, weight, in_flight: in_flight[place], ..IDLE })
                .collect();
            in_flight[choose(&candidates, turn).expect("one").0] += 1;
        }
        assert_eq!(in_flight, [10, 10, 20]);
        let idle: Vec<Candidate> = (0..3).map(|place| Candidate { place, ..IDLE }).collect();
        let round: Vec<usize> = (0..6).map(|turn| choose(&idle, turn).expect("one").0).collect();
        assert_eq!(round, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn the_reason_says_what_was_known() {
        assert_eq!(choose(&[], 3), None);
        assert_eq!(chosen(&[Candidate { has: Has::Absent, ..IDLE }]), (0, Reason::Only));
        for (has, reason) in [
            (Has::Loaded, Reason::Loaded),
            (Has::Held, Reason::Held),
            (Has::Unknown, Reason::Unknown),
            (Has::Absent, Reason::Absent),
        ] {
            let both = [Candidate { has, ..IDLE }, Candidate { place: 1, has, ..IDLE }];
            assert_eq!(chosen(&both).1, reason);
        }
    }
}
