//! The [`Scheduler`] on real time: a lock around it, a task that wakes it, and slots that are given back by being dropped.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::scheduler::{
    BackendSettings, Decision, Ended, Full, Grant, Inventory, Judge, Measured, Outlook, Reason, RunId, Scheduler,
    Settings, Trial, WaiterId, Want,
};

/// How often the scheduler is asked under one lock, before others have their turn.
const POLLS_A_STEP: usize = 4;

pub struct Dispatch {
    inner: Mutex<Inner>,
    /// The scheduler wants to be woken earlier than was planned.
    sooner: Notify,
}

struct Inner {
    scheduler: Scheduler,
    /// Whoever waits, and how to tell it.
    callers: HashMap<WaiterId, oneshot::Sender<Result<Slot, NoSlot>>>,
    /// Loads that nobody waits for, and how to end them.
    preloads: HashMap<RunId, oneshot::Sender<()>>,
    /// When the task that keeps time will wake it.
    planned: Option<Instant>,
}

/// Why there is no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSlot {
    /// The queue is full, for this caller or for all.
    Full(Full),
    /// It has waited for as long as it may.
    Expired,
    /// No backend may take it.
    Nowhere,
}

/// The right to have one request computed by one backend, until dropped.
pub struct Slot {
    dispatch: Arc<Dispatch>,
    grant: Grant,
    /// A backend has heard of it, and needs a moment to notice its end.
    sent: AtomicBool,
    ended: AtomicBool,
}

/// What was given to a waiter, told once the lock is free: a slot that nobody takes is dropped, and its drop takes the lock.
type Told = Vec<(oneshot::Sender<Result<Slot, NoSlot>>, Result<Slot, NoSlot>)>;

impl Dispatch {
    pub fn new(settings: Settings, backends: Vec<BackendSettings>, judge: Box<dyn Judge>) -> Arc<Dispatch> {
        let scheduler = Scheduler::new(Instant::now(), settings, backends).judged_by(judge);
        let inner = Inner { scheduler, callers: HashMap::new(), preloads: HashMap::new(), planned: None };
        Arc::new(Dispatch { inner: Mutex::new(inner), sooner: Notify::new() })
    }

    /// Waits for a slot, no longer than until the deadline. Whoever drops the future has left the queue.
    pub async fn slot(self: &Arc<Dispatch>, want: Want) -> Result<Slot, NoSlot> {
        let (sender, told) = oneshot::channel();
        let waiter = self.step(|inner, now| {
            let waiter = inner.scheduler.arrive(now, want)?;
            inner.callers.insert(waiter, sender);
            Ok(waiter)
        });
        let waiting = Waiting { dispatch: self, waiter: waiter.map_err(NoSlot::Full)? };
        let slot = told.await.unwrap_or(Err(NoSlot::Nowhere)); // each sender is used, or dropped with its waiter
        drop(waiting);
        slot
    }

    /// A slot for a request that does not wait, though none may be free.
    pub fn at_once(self: &Arc<Dispatch>, want: &Want) -> Option<Slot> {
        let grant = self.step(|inner, now| inner.scheduler.at_once(now, want));
        grant.map(|grant| Slot::new(self, grant))
    }

    /// A slot for a load that nobody waits for. `None`: it would be in somebody's way.
    pub fn preload(self: &Arc<Dispatch>, backend: usize, model: &str) -> Option<PreloadSlot> {
        self.step(|inner, now| {
            let run = inner.scheduler.preload(now, backend, model)?;
            let (sender, gives_way) = oneshot::channel();
            inner.preloads.insert(run, sender);
            Some(PreloadSlot { dispatch: Arc::clone(self), run, gives_way })
        })
    }

    /// What would become of a request that came now. Nothing does.
    pub fn outlook(&self, want: &Want) -> Result<Outlook, Full> {
        self.inner.lock().scheduler.outlook(Instant::now(), want)
    }

    /// What a backend says that it has.
    pub fn seen(self: &Arc<Dispatch>, backend: usize, inventory: &Inventory<'_>) {
        self.step(|inner, now| inner.scheduler.seen(now, backend, inventory));
    }

    /// How many wait, and how many slots are held.
    #[cfg(test)]
    fn counts(&self) -> (usize, usize) {
        let inner = self.inner.lock();
        (inner.scheduler.waiting(), inner.scheduler.busy())
    }

    /// Wakes the scheduler when it wants to be woken, until the process ends.
    pub async fn keep_time(self: Arc<Dispatch>) {
        loop {
            let planned = self.step(|inner, _| {
                inner.planned = inner.scheduler.wake();
                inner.planned
            });
            let woken = self.sooner.notified();
            match planned {
                Some(at) => tokio::select! {
                    () = tokio::time::sleep_until(at.into()) => {}
                    () = woken => {}
                },
                None => woken.await,
            }
        }
    }

    /// Lets something happen, and everything that follows from it.
    fn step<T>(self: &Arc<Dispatch>, event: impl FnOnce(&mut Inner, Instant) -> T) -> T {
        let (result, told, sooner) = {
            let mut inner = self.inner.lock();
            let now = Instant::now();
            let result = event(&mut inner, now);
            let mut decisions = Vec::new();
            for _ in 0..POLLS_A_STEP {
                inner.scheduler.poll(now, &mut decisions);
                if inner.scheduler.wake().is_none_or(|at| at > now) {
                    break;
                }
            }
            let told = self.tell(&mut inner, decisions);
            let wake = inner.scheduler.wake();
            let sooner = wake.is_some_and(|at| inner.planned.is_none_or(|planned| at < planned));
            if sooner {
                inner.planned = wake;
            }
            (result, told, sooner)
        };
        if sooner {
            self.sooner.notify_one();
        }
        for (sender, word) in told {
            // Whoever has left meanwhile gives its slot back by not taking it.
            drop(sender.send(word));
        }
        result
    }

    fn tell(self: &Arc<Dispatch>, inner: &mut Inner, decisions: Vec<Decision>) -> Told {
        let mut told = Vec::new();
        for decision in decisions {
            let (waiter, word) = match decision {
                Decision::Granted(grant) => (grant.waiter, Ok(Slot::new(self, grant))),
                Decision::Expired(waiter) => (waiter, Err(NoSlot::Expired)),
                Decision::Nowhere(waiter) => (waiter, Err(NoSlot::Nowhere)),
                Decision::GivesWay(run) => {
                    inner.preloads.remove(&run); // its going tells
                    continue;
                }
            };
            let sender = inner.callers.remove(&waiter).expect("a waiter has a caller until it is told or leaves");
            told.push((sender, word));
        }
        told
    }
}

/// Leaves the queue when dropped.
struct Waiting<'a> {
    dispatch: &'a Arc<Dispatch>,
    waiter: WaiterId,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let waiter = self.waiter;
        self.dispatch.step(|inner, _| {
            if inner.callers.remove(&waiter).is_some() {
                inner.scheduler.leave(waiter);
            }
        });
    }
}

/// The right to load a model that nobody waits for, until dropped.
pub struct PreloadSlot {
    dispatch: Arc<Dispatch>,
    run: RunId,
    gives_way: oneshot::Receiver<()>,
}

impl PreloadSlot {
    /// Comes when a request needs the loader: the load is to be broken off.
    pub async fn gives_way(&mut self) {
        let _ = (&mut self.gives_way).await; // told by its sender's end
    }

    /// The model is loaded, and that took so long.
    pub fn loaded(&self, took: Duration) {
        let run = self.run;
        let measured = Measured { load: Some(took), ..Measured::default() };
        self.dispatch.step(|inner, now| inner.scheduler.ended(now, run, Ended::Complete(measured)));
    }
}

impl Drop for PreloadSlot {
    fn drop(&mut self) {
        let run = self.run;
        self.dispatch.step(|inner, now| {
            inner.preloads.remove(&run);
            inner.scheduler.ended(now, run, Ended::Left); // nothing, where it has ended before
        });
    }
}

impl Slot {
    fn new(dispatch: &Arc<Dispatch>, grant: Grant) -> Slot {
        let (sent, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        Slot { dispatch: Arc::clone(dispatch), grant, sent, ended }
    }

    /// The backend's place in the pool.
    pub fn backend(&self) -> usize {
        self.grant.backend
    }

    pub fn reason(&self) -> Reason {
        self.grant.reason
    }

    /// The model was not loaded there.
    pub fn is_cold(&self) -> bool {
        self.grant.is_cold
    }

    /// What it tries.
    pub fn trial(&self) -> Trial {
        self.grant.trial
    }

    /// The request is on its way to the backend.
    pub fn sent(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    pub fn first_byte(&self) {
        let run = self.run();
        self.dispatch.step(|inner, now| inner.scheduler.first_byte(now, run));
    }

    /// The backend's answer is complete: the slot is free, though the client may not have read it all yet.
    pub fn complete(&self, measured: Measured) {
        self.end(Ended::Complete(measured));
    }

    /// It failed, or answered without computing anything.
    pub fn moot(&self) {
        self.end(Ended::Moot);
    }

    fn end(&self, how: Ended) {
        if !self.ended.swap(true, Ordering::Relaxed) {
            let run = self.run();
            self.dispatch.step(|inner, now| inner.scheduler.ended(now, run, how));
        }
    }

    fn run(&self) -> RunId {
        self.grant.run
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.end(if self.sent.load(Ordering::Relaxed) { Ended::Left } else { Ended::Moot });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::scheduler::State;
    use super::*;

    fn dispatch(settings: Settings) -> Arc<Dispatch> {
        Dispatch::new(settings, vec![BackendSettings::default()], Box::new(|_: usize, _: &str| State::Up))
    }

    fn want(deadline: Duration) -> Want {
        Want {
            model: "a".into(),
            agent: "x".into(),
            class: Default::default(),
            input_bytes: 10,
            most_tokens: None,
            conversation: None,
            streams: true,
            deadline: Instant::now() + deadline,
            barred: Vec::new(),
            only_read: false,
            only_holding: false,
        }
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_slot_that_is_dropped_goes_to_the_next() {
        let dispatch = dispatch(Settings::default());
        let first = dispatch.slot(want(LONG)).await.expect("free");
        let mut second = Box::pin(dispatch.slot(want(LONG)));
        assert!(futures::poll!(&mut second).is_pending());
        assert_eq!(dispatch.counts(), (1, 1));
        drop(first);
        let second = second.await.expect("free again");
        assert_eq!(dispatch.counts(), (0, 1));
        second.complete(Measured::default());
        assert_eq!(dispatch.counts(), (0, 0), "complete, before it is dropped");
        drop(second);
        assert_eq!(dispatch.counts(), (0, 0), "and once only");
    }

    #[tokio::test]
    async fn whoever_leaves_is_taken_out_of_the_queue_and_gives_back_what_came_too_late() {
        let dispatch = dispatch(Settings::default());
        let first = dispatch.slot(want(LONG)).await.expect("free");
        let mut leaver = Box::pin(dispatch.slot(want(LONG)));
        let mut late = Box::pin(dispatch.slot(want(LONG)));
        assert!(futures::poll!(&mut leaver).is_pending() && futures::poll!(&mut late).is_pending());
        drop(leaver);
        assert_eq!(dispatch.counts(), (1, 1));
        drop(first); // granted to `late`, which has not looked yet
        assert_eq!(dispatch.counts(), (0, 1));
        drop(late);
        assert_eq!(dispatch.counts(), (0, 0));
    }

    #[tokio::test]
    async fn a_slot_of_a_request_that_was_sent_lingers_and_somebody_wakes_the_scheduler() {
        let dispatch = dispatch(Settings { linger: Duration::from_millis(20), ..Settings::default() });
        let clock = tokio::spawn(Arc::clone(&dispatch).keep_time());
        let first = dispatch.slot(want(LONG)).await.expect("free");
        first.sent();
        let left = Instant::now();
        drop(first);
        let second = dispatch.slot(want(LONG)).await.expect("free after the linger");
        assert!(left.elapsed() >= Duration::from_millis(19), "{:?}", left.elapsed());
        let third = dispatch.at_once(&want(LONG)).expect("no slot is free, and it does not wait");
        assert_eq!(dispatch.counts(), (0, 2));
        drop(third);
        assert_eq!(second.backend(), 0);
        // A deadline needs somebody to keep time as well.
        assert_eq!(dispatch.slot(want(Duration::from_millis(20))).await.err(), Some(NoSlot::Expired));
        clock.abort();
    }
}
