//! Who reads too slowly: whoever takes less than a floor in a window of time while more waits for it.

use std::time::Duration;

use tokio::time::Instant;

use crate::memory::Memory;

/// What a client may do to those that answer it by reading slowly. The values and their reasons are in `config`.
pub struct Readers {
    /// What one reply may leave unsent before the backend waits.
    pub buffer_bytes: usize,
    /// The same of all replies, beyond [`FREE_BYTES`] each.
    pub memory: Memory,
    pub window: Duration,
    /// To be taken in a window while what is unsent waits here.
    pub floor_bytes: usize,
    /// To be taken in a window while the backend waits.
    pub blocking_floor_bytes: usize,
}

/// What each reply may leave unsent without asking whether there is room: a reader that keeps up needs no more, and never waits because
/// others do not.
pub const FREE_BYTES: usize = 64 << 10;

/// The time in which a reader is watched, from when something is unsent until nothing is.
pub struct Window {
    pub ends: Instant,
    /// Sent when it began.
    sent_bytes: usize,
    /// The backend has had to wait in it.
    blocks: bool,
}

/// It took less than it has to.
#[derive(Debug, PartialEq, Eq)]
pub struct TooSlow;

impl Window {
    pub fn begin(now: Instant, readers: &Readers, sent_bytes: usize, blocks: bool) -> Window {
        Window { ends: now + readers.window, sent_bytes, blocks }
    }

    /// Judges at the window's end, and begins the next. One in which the backend begins to wait begins anew: more is asked of the
    /// reader from then on. It stays so until its end, since a reader that takes next to nothing makes room too, now and then.
    pub fn look(&mut self, now: Instant, readers: &Readers, sent_bytes: usize, blocks: bool) -> Result<(), TooSlow> {
        if blocks && !self.blocks {
            *self = Window::begin(now, readers, sent_bytes, true);
            return Ok(());
        }
        if now < self.ends {
            return Ok(());
        }
        let floor_bytes = if self.blocks { readers.blocking_floor_bytes } else { readers.floor_bytes };
        if sent_bytes - self.sent_bytes < floor_bytes {
            return Err(TooSlow);
        }
        *self = Window::begin(now, readers, sent_bytes, blocks);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn readers() -> Readers {
        Readers {
            buffer_bytes: 1000,
            memory: Memory::new(1000),
            window: 10 * SECOND,
            floor_bytes: 10,
            blocking_floor_bytes: 100,
        }
    }

    #[test]
    fn a_reader_is_judged_by_what_it_takes_in_each_window() {
        let (readers, start) = (readers(), Instant::now());
        let mut window = Window::begin(start, &readers, 500, false);
        assert_eq!(window.look(start + 9 * SECOND, &readers, 500, false), Ok(()), "not before the end");
        assert_eq!(window.look(start + 10 * SECOND, &readers, 510, false), Ok(()));
        assert_eq!(window.ends, start + 20 * SECOND);
        assert_eq!(window.look(start + 20 * SECOND, &readers, 519, false), Err(TooSlow), "9 in the second");
    }

    #[test]
    fn more_is_asked_of_a_reader_that_the_backend_waits_for_and_from_then_on_only() {
        let (readers, start) = (readers(), Instant::now());
        let mut window = Window::begin(start, &readers, 0, false);
        // What it took before, nobody waited for.
        assert_eq!(window.look(start + 9 * SECOND, &readers, 20, true), Ok(()));
        assert_eq!(window.ends, start + 19 * SECOND);
        assert_eq!(window.look(start + 10 * SECOND, &readers, 20, true), Ok(()));
        assert_eq!(window.look(start + 19 * SECOND, &readers, 119, true), Err(TooSlow));
        assert_eq!(window.look(start + 19 * SECOND, &readers, 120, true), Ok(()));
        // A little room in between, which the next bytes fill, is no reason to begin anew.
        assert_eq!(window.look(start + 20 * SECOND, &readers, 121, false), Ok(()));
        assert_eq!(window.look(start + 21 * SECOND, &readers, 121, true), Ok(()));
        assert_eq!(window.ends, start + 29 * SECOND);
        assert_eq!(window.look(start + 29 * SECOND, &readers, 219, false), Err(TooSlow), "blocked in it");
        assert_eq!(window.look(start + 29 * SECOND, &readers, 220, false), Ok(()));
        assert_eq!(window.look(start + 39 * SECOND, &readers, 230, false), Ok(()), "and the next is as any other");
    }
}
