//! Who waits for one model, and in which order they are served.
//!
//! Start-time fair queueing by agent: a request is stamped, on arrival, with the virtual time at which its agent's turn comes, and
//! the agent's clock moves on by what the request will take. The virtual time is the stamp that was served last. So an agent that sends
//! a hundred at once queues behind itself, and another's first one is next. Deficit round robin would need a quantum as large as the
//! largest request, and these differ a thousandfold (`docs/adr/0050-scheduling.md`).
//!
//! A class is patience: a request of a lower class stands as far back as its patience goes, which shrinks while it waits. So a batch
//! gives way to people, and for a bounded time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// What a request may expect, and a role allow (`x-behavry-priority`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Jobs that nobody watches.
    Batch,
    #[default]
    Default,
    /// Somebody sits before it.
    Interactive,
}

impl Class {
    pub const ALL: [Class; 3] = [Class::Batch, Class::Default, Class::Interactive];

    pub fn as_str(self) -> &'static str {
        match self {
            Class::Batch => "batch",
            Class::Default => "default",
            Class::Interactive => "interactive",
        }
    }

    pub fn read(word: &str) -> Option<Class> {
        Class::ALL.into_iter().find(|class| class.as_str() == word)
    }

    /// Seconds for which it lets those of the highest class go first.
    fn patience_s(self) -> f64 {
        match self {
            Class::Interactive => 0.0,
            Class::Default => 10.0,
            Class::Batch => 120.0,
        }
    }
}

/// A stamp, and the order of arrival where stamps are equal.
type Stamp = (u64, u64);

#[derive(Default)]
pub struct Queue {
    /// By class, in the order of stamps.
    waiting: [BTreeMap<Stamp, Place>; 3],
    agents: HashMap<Arc<str>, Turn>,
    virtual_s: f64,
}

struct Place {
    waiter: u64,
    came_s: f64,
}

#[derive(Default)]
struct Turn {
    /// When the agent's next request has its turn, in virtual time.
    next_s: f64,
    waiting: usize,
}

/// Where a waiter stands; needed to take it out again.
#[derive(Clone, Copy, Debug)]
pub struct Stand {
    class: Class,
    stamp: Stamp,
}

/// Agents whose clock is ahead are remembered, the others forgotten, whenever so many have come together.
const AGENTS: usize = 1024;

impl Queue {
    pub fn len(&self) -> usize {
        self.waiting.iter().map(BTreeMap::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.iter().all(BTreeMap::is_empty)
    }

    #[cfg(test)]
    pub fn agents(&self) -> usize {
        self.agents.len()
    }

    pub fn push(&mut self, now_s: f64, waiter: u64, agent: &Arc<str>, class: Class, takes_s: f64) -> Stand {
        if self.agents.len() >= AGENTS {
            let virtual_s = self.virtual_s;
            self.agents.retain(|_, turn| turn.waiting > 0 || turn.next_s > virtual_s);
        }
        let start_s = self.start_s(agent);
        let turn = self.agents.entry(Arc::clone(agent)).or_default();
        turn.next_s = start_s + takes_s;
        turn.waiting += 1;
        // Not negative: the order of the bits is that of the numbers.
        let stamp = (start_s.to_bits(), waiter);
        self.waiting[class as usize].insert(stamp, Place { waiter, came_s: now_s });
        Stand { class, stamp }
    }

    /// Takes out one that is served, or one that leaves: then its agent's turn is as if it had not come.
    pub fn take(&mut self, stand: Stand, agent: &Arc<str>, is_served: bool) {
        if self.waiting[stand.class as usize].remove(&stand.stamp).is_none() {
            return;
        }
        let start_s = f64::from_bits(stand.stamp.0);
        if is_served {
            self.virtual_s = self.virtual_s.max(start_s);
        }
        if let Some(turn) = self.agents.get_mut(agent) {
            turn.waiting -= 1;
            if !is_served && turn.waiting == 0 {
                turn.next_s = turn.next_s.min(start_s);
            }
        }
    }

    /// A request took longer, or shorter, than its agent was charged for.
    pub fn correct(&mut self, agent: &Arc<str>, by_s: f64) {
        if let Some(turn) = self.agents.get_mut(agent) {
            turn.next_s = (turn.next_s + by_s).max(0.0);
        }
    }

    /// The virtual time at which the turn of an agent's next request comes.
    fn start_s(&self, agent: &Arc<str>) -> f64 {
        self.agents.get(agent).map_or(self.virtual_s, |turn| turn.next_s.max(self.virtual_s))
    }

    /// The first `most` of those that wait, in the order in which they are to be served.
    pub fn first(&self, now_s: f64, most: usize, into: &mut Vec<u64>) {
        into.clear();
        into.extend(self.in_order(now_s).take(most).map(|(_, waiter)| waiter));
    }

    /// Those that would be served before an agent's next request, if it came now.
    pub fn ahead_of(&self, now_s: f64, agent: &Arc<str>, class: Class) -> impl Iterator<Item = u64> {
        let own_s = self.start_s(agent) + class.patience_s();
        self.in_order(now_s).take_while(move |(turn_s, _)| *turn_s <= own_s).map(|(_, waiter)| waiter)
    }

    /// Those that wait, in the order in which they are to be served, each behind the virtual time of its turn.
    fn in_order(&self, now_s: f64) -> impl Iterator<Item = (f64, u64)> {
        let mut heads = self.waiting.each_ref().map(|waiting| waiting.iter().peekable());
        let patience = move |class: Class, place: &Place| (class.patience_s() - (now_s - place.came_s)).max(0.0);
        std::iter::from_fn(move || {
            let next = Class::ALL
                .into_iter()
                .rev()
                .filter_map(|class| {
                    let ((start, came), place) = heads[class as usize].peek()?;
                    Some((f64::from_bits(*start) + patience(class, place), *came, class))
                })
                // Between equals whoever came first: new agents all begin at the same stamp, and there may be no end of them.
                .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let (turn_s, _, class) = next?;
            heads[class as usize].next().map(|(_, place)| (turn_s, place.waiter))
        })
    }
}
