//! Memory that many requests share: a sum that is bounded, and each one's part of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What all together may take. A clone is the same memory.
#[derive(Clone)]
pub struct Memory {
    limit_bytes: usize,
    held_bytes: Arc<AtomicUsize>,
}

/// One's part, given back on drop.
pub struct Held {
    memory: Memory,
    bytes: usize,
}

/// There is no room for more.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

impl Memory {
    pub fn new(limit_bytes: usize) -> Memory {
        Memory { limit_bytes, held_bytes: Arc::default() }
    }

    /// A part, of nothing yet.
    pub fn share(&self) -> Held {
        Held { memory: self.clone(), bytes: 0 }
    }

    /// What all together take now.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes.load(Ordering::Relaxed)
    }
}

impl Held {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes so many more.
    pub fn grow(&mut self, bytes: usize) -> Result<(), Full> {
        let before = self.memory.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > self.memory.limit_bytes {
            self.memory.held_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Full);
        }
        self.bytes += bytes;
        Ok(())
    }

    /// Gives back all but so many.
    pub fn shrink_to(&mut self, bytes: usize) {
        let less = self.bytes.saturating_sub(bytes);
        self.memory.held_bytes.fetch_sub(less, Ordering::Relaxed);
        self.bytes -= less;
    }

    /// Holds so many: more than now only if there is room.
    pub fn fit(&mut self, bytes: usize) -> Result<(), Full> {
        match bytes.checked_sub(self.bytes) {
            Some(more) => self.grow(more),
            None => {
                self.shrink_to(bytes);
                Ok(())
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_never_take_more_than_the_whole_and_give_everything_back() {
        let memory = Memory::new(100);
        let (mut first, mut second) = (memory.share(), memory.share());
        assert_eq!(first.grow(60), Ok(()));
        assert_eq!(second.grow(41), Err(Full));
        assert_eq!((second.bytes(), memory.held_bytes()), (0, 60), "what found no room takes none");
        assert_eq!(second.fit(40), Ok(()));
        assert_eq!(second.fit(41), Err(Full));
        assert_eq!(second.fit(10), Ok(()));
        assert_eq!(first.grow(30), Ok(()));
        assert_eq!(memory.held_bytes(), 100);
        first.shrink_to(200);
        assert_eq!(first.bytes(), 90, "to shrink is not to grow");
        drop(first);
        assert_eq!(memory.held_bytes(), 10);
        drop(second);
        assert_eq!(memory.held_bytes(), 0);
    }

    #[test]
    fn many_at_once_keep_to_the_whole() {
        let memory = Memory::new(1000);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for bytes in 0..2000 {
                        let mut held = memory.share();
                        if held.fit(bytes % 300).is_ok() {
                            assert!(held.fit(bytes % 7).is_ok() || bytes % 300 < bytes % 7);
                        }
                    }
                });
            }
        });
        assert_eq!(memory.held_bytes(), 0);
    }
}
