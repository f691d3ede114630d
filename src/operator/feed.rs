//! What one watcher is sent, and when. It looks at the ring ten times a second instead of being woken for each event: some events
//! are then one write, and whoever makes them wakes nobody. Where much happens it looks more often, so that what it finds stays
//! small: requests share the thread, and wait while a part is written.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::board::Board;
use crate::ledger::Activity;
use crate::ledger::activity::missed_frame;

pub const PATH: &str = "/api/v1/audit/stream";

/// At most so much of the ring in one part: what a watcher holds beyond its socket's buffer, and what a request may have to wait for.
/// The kernel takes so much in some 20 µs.
const PART_BYTES: usize = 32 << 10;
/// A look that finds more than this is followed by one after half the time, and one that finds less than a quarter of it by one after
/// twice the time.
const MUCH_BYTES: usize = PART_BYTES / 2;

/// How often a feed does what it does.
#[derive(Clone, Copy)]
pub struct Pace {
    /// Between two looks at the ring where little happens. A tenth of a second looks like at once.
    pub look: Duration,
    /// Between two looks where much happens. With full parts these are 6 MB/s, more than a browser shows; whoever wants more loses
    /// events of the ring, is told so, and finds them in the audit.
    pub least_look: Duration,
    /// Between two snapshots of what runs.
    pub running: Duration,
    /// Between two comments that keep the connection from looking idle (S0).
    pub keepalive: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            look: Duration::from_millis(100),
            least_look: Duration::from_millis(5),
            running: Duration::from_secs(1),
            keepalive: Duration::from_secs(15),
        }
    }
}

pub struct Feed {
    activity: Arc<Activity>,
    /// For those who want to see what runs.
    board: Option<Arc<Board>>,
    pace: Pace,
    /// The number of the last event that was sent.
    at: u64,
    begun: bool,
    /// From the last look to the next.
    pause: Duration,
    next_look: Instant,
    next_running: Instant,
    next_keepalive: Instant,
    /// As they were last sent: they seldom change.
    backends: Bytes,
}

impl Feed {
    /// `last_event_id`: where the watcher stopped before.
    pub fn new(activity: Arc<Activity>, board: Option<Arc<Board>>, last_event_id: Option<&str>, pace: Pace) -> Feed {
        let now = Instant::now();
        Feed {
            at: activity.resume(last_event_id),
            activity,
            board,
            pace,
            begun: false,
            pause: pace.look,
            next_look: now,
            next_running: now,
            next_keepalive: now + pace.keepalive,
            backends: Bytes::new(),
        }
    }

    /// The next part of the stream: whole frames, or a comment. Waits until there is one; given up at any time, nothing is lost.
    pub async fn next(&mut self) -> Bytes {
        loop {
            let mut part = Vec::new();
            if !std::mem::replace(&mut self.begun, true) {
                part.extend_from_slice(b"retry: 2000\n\n"); // a proxy that restarts is soon back
            }
            let now = Instant::now();
            if now >= self.next_look {
                self.look(&mut part);
                self.next_look = now + self.pause;
            }
            if now >= self.next_running
                && let Some(board) = &self.board
            {
                self.next_running = now + self.pace.running;
                let backends = board.backends();
                if backends != self.backends {
                    frame(&mut part, "backends", &backends);
                    self.backends = backends;
                }
                frame(&mut part, "running", &board.running());
            }
            if now >= self.next_keepalive {
                self.next_keepalive = now + self.pace.keepalive;
                part.extend_from_slice(b":keepalive\n\n");
            }
            if !part.is_empty() {
                return part.into();
            }
            tokio::time::sleep_until(self.next_look.min(self.next_keepalive)).await;
        }
    }

    fn look(&mut self, part: &mut Vec<u8>) {
        let news = self.activity.since(self.at, PART_BYTES);
        self.at = news.upto;
        if news.missed > 0 {
            part.extend_from_slice(missed_frame(news.missed).as_bytes());
        }
        part.reserve(news.frames.iter().map(Bytes::len).sum());
        for frame in &news.frames {
            part.extend_from_slice(frame);
        }
        self.pause = match part.len() {
            much if much > MUCH_BYTES => self.pause / 2,
            little if little < MUCH_BYTES / 4 => self.pause * 2,
            _ => self.pause,
        }
        .clamp(self.pace.least_look.min(self.pace.look), self.pace.look);
    }
}

/// `data` is JSON on one line. The frame has no id: the next one replaces it.
fn frame(part: &mut Vec<u8>, name: &str, data: &Bytes) {
    part.extend_from_slice(b"event: ");
    part.extend_from_slice(name.as_bytes());
    part.extend_from_slice(b"\ndata: ");
    part.extend_from_slice(data);
    part.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Alert;

    const NEVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn an_idle_feed_says_that_it_lives_at_its_interval_and_nothing_else() {
        let pace = Pace { look: NEVER, least_look: NEVER, running: NEVER, keepalive: Duration::from_millis(20) };
        let mut feed = Feed::new(Arc::default(), None, None, pace);
        assert_eq!(feed.next().await, "retry: 2000\n\n");
        let mut last = Instant::now();
        for _ in 0..3 {
            assert_eq!(feed.next().await, ":keepalive\n\n");
            assert!(last.elapsed() >= Duration::from_millis(15), "not before its time");
            last = Instant::now();
        }
        assert_eq!(Pace::default().keepalive, Duration::from_secs(15), "S0's interval");
    }

    #[tokio::test]
    async fn a_feed_that_is_given_up_while_it_waits_loses_nothing() {
        let activity: Arc<Activity> = Arc::default();
        let pace = Pace {
            look: Duration::from_millis(1),
            least_look: Duration::from_millis(1),
            running: NEVER,
            keepalive: NEVER,
        };
        let mut feed = Feed::new(Arc::clone(&activity), None, None, pace);
        assert_eq!(feed.next().await, "retry: 2000\n\n");
        let mut seen = String::new();
        for n in 0..50 {
            let _ = tokio::time::timeout(Duration::from_millis(1), feed.next())
                .await
                .map(|part| seen.push_str(&String::from_utf8_lossy(&part)));
            activity.alert(Alert::Panicked, false, &format!("number {n}."));
        }
        while !seen.contains("number 49.") {
            seen.push_str(&String::from_utf8_lossy(&feed.next().await));
        }
        for n in 0..50 {
            assert_eq!(seen.matches(&format!("number {n}.")).count(), 1, "{n}");
        }
    }

    #[test]
    fn where_much_happens_it_looks_more_often_and_where_nothing_does_as_before() {
        let activity: Arc<Activity> = Arc::default();
        let pace = Pace::default();
        let mut feed = Feed::new(Arc::clone(&activity), None, None, pace);
        let mut looked = |events: usize| {
            for _ in 0..events {
                activity.alert(Alert::Panicked, false, &"x".repeat(1000));
            }
            let mut part = Vec::new();
            feed.look(&mut part);
            assert!(part.len() <= PART_BYTES, "{}", part.len());
            feed.pause
        };
        assert_eq!(looked(1), pace.look, "little");
        assert_eq!(looked(10), pace.look, "not much");
        assert_eq!(looked(20), pace.look / 2, "much");
        for _ in 0..5 {
            looked(20);
        }
        assert_eq!(looked(20), pace.least_look);
        assert_eq!(looked(0), pace.least_look * 2);
        for _ in 0..5 {
            looked(0);
        }
        assert_eq!(looked(0), pace.look);
    }

    #[tokio::test]
    async fn a_full_ring_comes_in_parts_and_what_passed_by_is_told_first() {
        let activity: Arc<Activity> = Arc::default();
        let pace = Pace {
            look: Duration::from_millis(1),
            least_look: Duration::from_millis(1),
            running: NEVER,
            keepalive: NEVER,
        };
        let mut feed = Feed::new(Arc::clone(&activity), None, None, pace);
        let long = "x".repeat(2000);
        for _ in 0..3000 {
            activity.alert(Alert::Panicked, false, &long);
        }
        let first = feed.next().await;
        let text = String::from_utf8_lossy(&first);
        assert!(
            text.starts_with("retry: 2000\n\nevent: alert\ndata: {\"alert\":\"events_missed\""),
            "{}",
            &text[..100]
        );
        assert!(text.contains("1976 events came faster"), "3000 less the 1024 of the ring");
        let mut frames = text.matches("\nid: ").count() + usize::from(text.starts_with("id: "));
        while frames < 1024 {
            let part = feed.next().await;
            assert!(part.len() <= PART_BYTES + 4096, "{}", part.len());
            frames += String::from_utf8_lossy(&part).matches("id: ").count();
        }
        assert_eq!(frames, 1024);
    }
}
