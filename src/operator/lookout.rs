//! Looks at the proxy itself once a second and raises alerts for those who watch. What it looks at is kept elsewhere for other reasons
//! (readiness, metrics), so nothing that serves requests has to know of alerts. What was wrong for less than a second may be missed: it
//! is in the log and in the metrics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ledger::{Activity, Alert, Reloaded};
use crate::site::Site;
use crate::upstream::Backend;

const EVERY: Duration = Duration::from_secs(1);
/// A backend that is drained for longer may have been forgotten. Longer than a driver's update and a restart take.
const LONG: Duration = Duration::from_secs(30 * 60);
/// The queue is not full any more once nobody was turned away for so long: it is full and not full in turns.
const QUIET: Duration = Duration::from_secs(60);
/// Models that an alert names.
const MODELS: usize = 5;

/// Until the process ends.
pub async fn keep_looking(site: Arc<Site>) {
    let mut lookout = Lookout::new(site);
    loop {
        lookout.look(Instant::now());
        tokio::time::sleep(EVERY).await;
    }
}

/// What was seen at the last look.
struct Lookout {
    site: Arc<Site>,
    audit_writes: bool,
    /// In the pool's order.
    backends: Vec<Seen>,
    turned_away: Counted,
    reload_failures: [u64; Reloaded::ALL.len()],
    panics: u64,
}

impl Lookout {
    fn new(site: Arc<Site>) -> Lookout {
        let backends = site.pool.backends().iter().map(|_| Seen::default()).collect();
        let turned_away = Counted::default();
        Lookout { site, audit_writes: true, backends, turned_away, reload_failures: Default::default(), panics: 0 }
    }

    fn look(&mut self, now: Instant) {
        let Lookout { site, audit_writes, backends, turned_away, reload_failures, panics } = self;
        let (audit, metrics) = (&site.ledger.audit, &site.ledger.metrics);
        let raise = |alert, over, message: &str| audit.activity().alert(alert, over, message);

        let writes = audit.is_writing();
        if std::mem::replace(audit_writes, writes) != writes {
            match writes {
                true => raise(Alert::AuditUnavailable, true, "the audit can be written again"),
                false => raise(Alert::AuditUnavailable, false, "the audit cannot be written; requests are refused"),
            }
        }
        for (backend, seen) in site.pool.backends().iter().zip(backends) {
            seen.look(now, backend, audit.activity());
        }
        let in_all = metrics.turned_away_by_all();
        match turned_away.look(now, in_all) {
            Some(Change::Begun) => {
                raise(Alert::QueueFull, false, "requests are turned away: no backend is free for them");
            }
            Some(Change::Over) => raise(Alert::QueueFull, true, "nobody was turned away for a minute"),
            None => {}
        }
        for (what, known) in Reloaded::ALL.into_iter().zip(reload_failures) {
            let failures = metrics.reload_failures(what);
            if std::mem::replace(known, failures) != failures {
                let message = format!("{} not reloaded, the last good one stays; the log says why", what.as_str());
                raise(Alert::ReloadFailed, false, &message);
            }
        }
        let caught = metrics.panics();
        if std::mem::replace(panics, caught) != caught {
            raise(Alert::Panicked, false, "a fault of ours was caught; the log says where");
        }
    }
}

/// What was seen of one backend.
#[derive(Default)]
struct Seen {
    down: bool,
    breaks: bool,
    drained: Lasting,
}

impl Seen {
    fn look(&mut self, now: Instant, backend: &Backend, activity: &Activity) {
        let (name, url) = (&backend.name, &backend.url);
        let down = !backend.is_up();
        if std::mem::replace(&mut self.down, down) != down {
            let state = if down { "cannot be reached" } else { "can be reached again" };
            activity.alert(Alert::BackendUnreachable, !down, &format!("backend {name} ({url}) {state}"));
        }
        // One that cannot be reached has an open breaker too, and has been told of.
        let (own, models) = backend.breakers(now);
        let breaks = !down && (own.is_open() || !models.is_empty());
        if std::mem::replace(&mut self.breaks, breaks) != breaks {
            let message = match (breaks, own.is_open()) {
                (false, _) => format!("backend {name} gets requests again as any other"),
                (true, true) => format!("backend {name} gets no requests for a while: they failed there"),
                (true, false) => {
                    let named: Vec<&str> = models.iter().take(MODELS).map(|(model, _)| model.as_str()).collect();
                    let more = if models.len() > MODELS { " and others" } else { "" };
                    let named = named.join(", ");
                    format!("backend {name} gets no requests for {named}{more} for a while: they failed there")
                }
            };
            activity.alert(Alert::BreakerOpen, !breaks, &message);
        }
        match self.drained.look(now, backend.is_drained(), LONG) {
            Some(Change::Begun) => {
                let message =
                    format!("backend {name} has been drained for half an hour; backend undrain {name} uses it again");
                activity.alert(Alert::BackendDrained, false, &message);
            }
            Some(Change::Over) => {
                activity.alert(Alert::BackendDrained, true, &format!("backend {name} is used again"));
            }
            None => {}
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Begun,
    Over,
}

/// Something that is told of once it has lasted for some time.
#[derive(Default)]
struct Lasting {
    since: Option<Instant>,
    told: bool,
}

impl Lasting {
    fn look(&mut self, now: Instant, holds: bool, long: Duration) -> Option<Change> {
        if !holds {
            self.since = None;
            return std::mem::take(&mut self.told).then_some(Change::Over);
        }
        let since = *self.since.get_or_insert(now);
        let is_news = !self.told && now.saturating_duration_since(since) >= long;
        self.told |= is_news;
        is_news.then_some(Change::Begun)
    }
}

/// A counter that should stand still: told of when it moves, and when it has stood still again for a while.
#[derive(Default)]
struct Counted {
    last: u64,
    moved: Option<Instant>,
}

impl Counted {
    fn look(&mut self, now: Instant, count: u64) -> Option<Change> {
        if std::mem::replace(&mut self.last, count) != count {
            return self.moved.replace(now).is_none().then_some(Change::Begun);
        }
        let is_over = self.moved.is_some_and(|at| now.saturating_duration_since(at) >= QUIET);
        self.moved.take_if(|_| is_over).map(|_| Change::Over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn what_lasts_is_told_of_once_and_its_end_only_if_it_was() {
        let (mut drained, start) = (Lasting::default(), Instant::now());
        assert_eq!(drained.look(start, false, LONG), None);
        assert_eq!(drained.look(start, true, LONG), None);
        assert_eq!(drained.look(start + 29 * MINUTE, true, LONG), None);
        assert_eq!(drained.look(start + 29 * MINUTE, false, LONG), None, "nobody has heard of it");
        assert_eq!(drained.look(start + 29 * MINUTE, true, LONG), None, "it begins anew");
        assert_eq!(drained.look(start + 58 * MINUTE, true, LONG), None);
        assert_eq!(drained.look(start + 59 * MINUTE, true, LONG), Some(Change::Begun));
        assert_eq!(drained.look(start + 99 * MINUTE, true, LONG), None);
        assert_eq!(drained.look(start + 99 * MINUTE, false, LONG), Some(Change::Over));
        assert_eq!(drained.look(start + 99 * MINUTE, false, LONG), None);
    }

    #[test]
    fn a_counter_that_moves_is_told_of_and_again_once_it_stood_still() {
        let (mut counted, start) = (Counted::default(), Instant::now());
        assert_eq!(counted.look(start, 0), None);
        assert_eq!(counted.look(start + MINUTE, 3), Some(Change::Begun));
        assert_eq!(counted.look(start + MINUTE + QUIET, 4), None, "it goes on");
        assert_eq!(counted.look(start + MINUTE + QUIET + QUIET / 2, 4), None);
        assert_eq!(counted.look(start + MINUTE + 2 * QUIET, 4), Some(Change::Over));
        assert_eq!(counted.look(start + MINUTE + 3 * QUIET, 4), None);
        assert_eq!(counted.look(start + MINUTE + 3 * QUIET, 5), Some(Change::Begun));
    }
}
