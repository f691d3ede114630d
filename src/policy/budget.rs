//! How long an evaluation may take, in time of the CPU.
//!
//! What the limit guards against is a policy that never comes to its end and holds a thread. On a machine that is busy with something
//! else, with Ollama's own inference for one, a decision of a millisecond can take a second of the wall's clock, and refusing it
//! would refuse at random.

use std::time::{Duration, Instant};

/// Time of the CPU that an evaluation, or several in a row, may take together. To be used on the thread that made it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    limit: Duration,
    began: Duration,
}

/// Why there is no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The budget is used up.
    OutOfTime,
    /// What the engine said.
    Engine(String),
}

impl Budget {
    pub fn new(limit: Duration) -> Budget {
        Budget { limit, began: thread_time() }
    }

    fn left(&self) -> Duration {
        self.limit.saturating_sub(thread_time().saturating_sub(self.began))
    }

    /// Calls `evaluate` with the longest time that it may take by the wall's clock, which is the only one that regorus 0.14.1 looks at
    /// (`utils/limits/time.rs`); again, with twice the time, where that ran out because others had the CPU. `evaluate` begins anew at
    /// each call.
    pub fn spend<T>(&self, evaluate: impl FnMut(Duration) -> Result<T, String>) -> Result<T, Failure> {
        self.spend_from(self.left(), evaluate)
    }

    fn spend_from<T>(
        &self,
        first: Duration,
        mut evaluate: impl FnMut(Duration) -> Result<T, String>,
    ) -> Result<T, Failure> {
        let mut wall = first;
        loop {
            let before = self.left();
            if before.is_zero() {
                return Err(Failure::OutOfTime);
            }
            let called = Instant::now();
            let error = match evaluate(wall) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if called.elapsed() < wall {
                return Err(Failure::Engine(error));
            }
            let left = self.left();
            // It needs more than it has just had, and that is more than there is.
            if before - left >= left {
                return Err(Failure::OutOfTime);
            }
            wall = wall.saturating_mul(2);
        }
    }
}

/// The CPU's time that this thread has had. A system call of a quarter of a microsecond.
pub(super) fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes into a value of ours. It fails for clocks that there are not, and each thread has this one.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As regorus does: until it has all the CPU's time that it needs, or the wall's clock says that it is late.
    fn work(needs: Duration, wall: Duration) -> Result<(), String> {
        let (called, began) = (Instant::now(), thread_time());
        while thread_time() - began < needs {
            if called.elapsed() >= wall {
                return Err("the engine's own limit".to_owned());
            }
        }
        Ok(())
    }

    #[test]
    fn what_was_kept_off_the_cpu_is_tried_again_until_it_ends() {
        let budget = Budget::new(Duration::from_secs(20));
        let mut walls = Vec::new();
        let ended = budget.spend_from(Duration::from_nanos(1), |wall| {
            walls.push(wall);
            work(Duration::from_millis(2), wall)
        });
        assert!(ended.is_ok(), "{ended:?}");
        assert!(walls.len() > 10 && walls.windows(2).all(|pair| pair[1] == pair[0] * 2), "{walls:?}");
    }

    #[test]
    fn what_never_ends_is_stopped_when_it_has_had_its_time() {
        let budget = Budget::new(Duration::from_millis(50));
        let mut calls = 0;
        let stopped = budget.spend(|wall| {
            calls += 1;
            work(Duration::MAX, wall)
        });
        assert!(matches!(stopped, Err(Failure::OutOfTime)), "{stopped:?}");
        let had = thread_time() - budget.began;
        assert!(had >= Duration::from_millis(25), "{had:?} in {calls} calls");
    }

    #[test]
    fn an_error_of_the_engine_is_passed_on_and_said_once() {
        let mut calls = 0;
        let failed = Budget::new(Duration::from_secs(20)).spend(|_| {
            calls += 1;
            Err::<(), _>("words".to_owned())
        });
        assert!(matches!(failed, Err(Failure::Engine(words)) if words == "words"));
        assert_eq!(calls, 1);
    }
}
