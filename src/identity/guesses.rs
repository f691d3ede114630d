//! Slows whoever guesses client secrets at the token endpoint. No socket, no clock: the time is an argument.
//!
//! Three allowances, each a bucket that is full at first and fills up steadily:
//! - of a client address: every request costs one, whatever comes of it, so that a secret of one's own buys no guesses at others';
//! - of a client id at an address: wrong secrets cost one, and a right one gives back what it took;
//! - of a client id from anywhere, [`ELSEWHERE`] times as wide, against many addresses that guess at one id.
//!
//! An id that proved itself from an address is *familiar* there. It passes the third allowance, and is let through on the second
//! where its address has used up the first: neither guesses from elsewhere nor a hostile neighbour behind the same NAT keep the
//! rightful owner out. Only a right secret makes anything familiar.
//!
//! The buckets are slots of tables of a fixed size, two rows with keyed hashes of their own, and the fuller of a key's two slots
//! counts. So nothing grows, and nothing is evicted: a flood of addresses or ids cannot push a history out. What it can do is
//! empty slots that others share, which never lets anybody guess faster. To keep 1 % of honest ids waiting, a tenth of each row has
//! to be kept empty: 1,638 slots at ten a minute are 273 wrong secrets a second, and two hashes at once check about 100. (For 1 % of
//! the addresses it is 8,190 requests a second.)
//! An id that does not exist has its buckets like any other, so that being slowed tells nothing about it.
//!
//! API keys and device keys need none of this: 256 bits are not guessed.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use parking_lot::Mutex;

/// How many addresses' allowance an id has over all addresses: enough that one that guesses leaves most of it to the owner.
const ELSEWHERE: u32 = 6;
/// Slots of a row: with two rows, 256 KiB a table.
const SLOTS: usize = 16_384;
/// Client ids that are remembered as familiar somewhere; past it the one that proved itself least recently is forgotten.
const FAMILIAR_IDS: usize = 4_096;
/// Addresses at which one id is familiar: one agent cannot push the others out.
const FAMILIAR_ADDRESSES: usize = 16;

/// How fast guessing may be. Each allowance holds a minute's worth when it is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuessSettings {
    /// Token requests a minute from one address (an IPv6 /64), right or wrong.
    pub requests_per_minute: u32,
    /// Wrong secrets a minute for one client id from one address.
    pub wrong_secrets_per_minute: u32,
}

/// Whose allowance is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slowed {
    Address { retry_after_s: u32 },
    Client { retry_after_s: u32 },
}

/// A request that may be looked at, and has paid for it.
#[derive(Debug)]
pub struct Arrival<'a> {
    network: IpAddr,
    client_id: &'a str,
    /// It came on the allowance of a familiar id, which it has paid already and does not get back.
    paid: bool,
}

/// A secret that may be checked, and has paid as if it were wrong.
#[derive(Debug)]
pub struct Guess<'a> {
    arrival: Arrival<'a>,
    /// What was taken from the id's allowance over all addresses.
    counted_elsewhere: bool,
}

/// The allowances of everybody. One lock: a handful of hashes of short texts are made under it, for each check of a secret by argon2.
pub struct Guesses {
    state: Mutex<State>,
}

struct State {
    addresses: Table,
    clients_at_addresses: Table,
    clients: Table,
    familiar: HashMap<String, Vec<(IpAddr, Duration)>>,
}

impl Guesses {
    pub fn new(settings: GuessSettings) -> Guesses {
        let wrong = settings.wrong_secrets_per_minute;
        Guesses {
            state: Mutex::new(State {
                addresses: Table::new(settings.requests_per_minute),
                clients_at_addresses: Table::new(wrong),
                clients: Table::new(wrong.saturating_mul(ELSEWHERE)),
                familiar: HashMap::new(),
            }),
        }
    }

    /// Whether a request is looked at. `now` is the time since any fixed moment.
    ///
    /// It is refused early where its secret would not be checked anyway, and does not pay for that.
    pub fn arrive<'a>(&self, address: IpAddr, client_id: &'a str, now: Duration) -> Result<Arrival<'a>, Slowed> {
        let network = network(address);
        let mut state = self.state.lock();
        let familiar = state.is_familiar(network, client_id);
        state.client_may(network, client_id, familiar, now)?;
        let wait = state.addresses.wait(&network, now);
        if wait.is_zero() {
            state.addresses.take(&network, now);
            return Ok(Arrival { network, client_id, paid: false });
        }
        if familiar {
            state.clients_at_addresses.take(&(network, client_id), now);
            return Ok(Arrival { network, client_id, paid: true });
        }
        Err(Slowed::Address { retry_after_s: whole_seconds(wait) })
    }

    /// Whether its secret is checked now. Ask only when the check is about to begin: many right ones that wait for their turn
    /// would otherwise look like as many wrong ones.
    pub fn guess<'a>(&self, arrival: Arrival<'a>, now: Duration) -> Result<Guess<'a>, Slowed> {
        let mut state = self.state.lock();
        if arrival.paid {
            return Ok(Guess { arrival, counted_elsewhere: false });
        }
        let (network, client_id) = (arrival.network, arrival.client_id);
        let familiar = state.is_familiar(network, client_id);
        state.client_may(network, client_id, familiar, now)?;
        state.clients_at_addresses.take(&(network, client_id), now);
        if !familiar {
            state.clients.take(client_id, now);
        }
        Ok(Guess { arrival, counted_elsewhere: !familiar })
    }

    /// The secret was right: it costs nothing, and its id is familiar where it came from. Whoever leaves before the answer has paid.
    pub fn proved(&self, guess: Guess<'_>, now: Duration) {
        let mut state = self.state.lock();
        state.give_back(&guess);
        state.remember(guess.arrival.network, guess.arrival.client_id, now);
    }

    /// Nobody could say whether the secret was right: it costs nothing, and makes nothing familiar.
    pub fn unjudged(&self, guess: Guess<'_>) {
        self.state.lock().give_back(&guess);
    }
}

impl State {
    fn client_may(&self, network: IpAddr, client_id: &str, familiar: bool, now: Duration) -> Result<(), Slowed> {
        let here = self.clients_at_addresses.wait(&(network, client_id), now);
        let elsewhere = if familiar { Duration::ZERO } else { self.clients.wait(client_id, now) };
        match here.max(elsewhere) {
            Duration::ZERO => Ok(()),
            wait => Err(Slowed::Client { retry_after_s: whole_seconds(wait) }),
        }
    }

    fn give_back(&mut self, guess: &Guess<'_>) {
        let Arrival { network, client_id, paid } = guess.arrival;
        if !paid {
            self.clients_at_addresses.give_back(&(network, client_id));
        }
        if guess.counted_elsewhere {
            self.clients.give_back(client_id);
        }
    }

    fn is_familiar(&self, network: IpAddr, client_id: &str) -> bool {
        self.familiar.get(client_id).is_some_and(|places| places.iter().any(|(known, _)| *known == network))
    }

    fn remember(&mut self, network: IpAddr, client_id: &str, now: Duration) {
        if let Some(places) = self.familiar.get_mut(client_id) {
            places.retain(|(known, _)| *known != network);
            if places.len() >= FAMILIAR_ADDRESSES {
                places.remove(0); // the order is that of the last proofs
            }
            places.push((network, now));
            return;
        }
        if self.familiar.len() >= FAMILIAR_IDS {
            let last_proof = |places: &Vec<(IpAddr, Duration)>| places.last().map(|(_, proved)| *proved);
            let oldest = self.familiar.iter().min_by_key(|(_, places)| last_proof(places)).map(|(id, _)| id.clone());
            if let Some(oldest) = oldest {
                self.familiar.remove(&oldest);
            }
        }
        self.familiar.insert(client_id.to_owned(), vec![(network, now)]);
    }
}

/// Buckets of one kind. A slot holds when its bucket will be full again (the generic cell rate algorithm, in nanoseconds).
struct Table {
    /// Time in which one request's worth comes back.
    interval_ns: u64,
    /// What a full bucket holds, as time.
    depth_ns: u64,
    rows: [(RandomState, Box<[u64]>); 2],
}

impl Table {
    fn new(per_minute: u32) -> Table {
        let interval_ns = 60_000_000_000 / u64::from(per_minute.max(1));
        let row = || (RandomState::new(), vec![0; SLOTS].into_boxed_slice());
        Table { interval_ns, depth_ns: interval_ns * u64::from(per_minute.max(1)), rows: [row(), row()] }
    }

    /// Until there is room for one more, by the fuller of the two buckets: the other one is fuller of somebody else's guesses.
    fn wait<K: Hash + ?Sized>(&self, key: &K, now: Duration) -> Duration {
        let now_ns = nanoseconds(now);
        let wait = |(keyed, slots): &(RandomState, Box<[u64]>)| {
            let full_at = slots[place(keyed, key)].max(now_ns);
            (full_at + self.interval_ns).saturating_sub(now_ns + self.depth_ns)
        };
        Duration::from_nanos(self.rows.iter().map(wait).min().unwrap_or(0))
    }

    fn take<K: Hash + ?Sized>(&mut self, key: &K, now: Duration) {
        let now_ns = nanoseconds(now);
        for (keyed, slots) in &mut self.rows {
            let slot = &mut slots[place(keyed, key)];
            *slot = (*slot).max(now_ns) + self.interval_ns;
        }
    }

    fn give_back<K: Hash + ?Sized>(&mut self, key: &K) {
        for (keyed, slots) in &mut self.rows {
            let slot = &mut slots[place(keyed, key)];
            *slot = slot.saturating_sub(self.interval_ns);
        }
    }
}

fn place<K: Hash + ?Sized>(keyed: &RandomState, key: &K) -> usize {
    // A remainder below SLOTS fits.
    (keyed.hash_one(key) % SLOTS as u64) as usize
}

/// Five hundred years of them fit.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// For `Retry-After`: whoever comes back then is let in, unless others were faster.
fn whole_seconds(wait: Duration) -> u32 {
    u32::try_from(wait.as_nanos().div_ceil(1_000_000_000)).unwrap_or(u32::MAX).max(1)
}

/// Whoever has one IPv6 address has its /64. An IPv4 address in IPv6's clothes is the IPv4 address.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

#[cfg(test)]
mod tests;
