//! What a piece of work costs over several rounds, in microseconds of CPU.

use super::cpu::thread_time;

pub const ROUNDS: usize = 21;

/// The rounds, cheapest first.
pub struct Cost(Vec<f64>);

/// The median, and the range.
impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Cost(rounds) = self;
        let digits = f.precision().unwrap_or(3);
        let [median, least, most] = [rounds[rounds.len() / 2], rounds[0], rounds[rounds.len() - 1]];
        write!(f, "{median:.digits$} ({least:.digits$}-{most:.digits$})")
    }
}

/// Rounds of so many `pieces` each; `prepare` makes a round and is not counted.
pub fn measure<R: FnOnce()>(pieces: usize, prepare: impl Fn() -> R) -> Cost {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let round = prepare();
            let before = thread_time();
            round();
            (thread_time() - before).as_secs_f64() * 1e6 / pieces as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    Cost(rounds)
}
