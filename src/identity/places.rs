//! The places of token requests that are under way: so many in all, and so many of them for one client address, because a body that
//! comes slowly holds a place for seconds.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use super::guesses::network;

/// How many there are. A place takes a body of at most 16 KiB.
#[derive(Clone, Copy, Debug)]
pub struct PlaceSettings {
    /// At once, from everywhere. 1024 is ten seconds of checking secrets.
    pub total: usize,
    /// At once, from one address (an IPv6 /64). 128: a hundred agents behind a NAT that fetch their tokens in the same moment.
    pub per_address: usize,
}

impl PlaceSettings {
    /// For a proxy that serves so many requests at once: half of them at most, and one address half of that, so that strangers leave
    /// room for those who have a token whatever the limit is.
    pub fn within(in_flight: usize) -> PlaceSettings {
        let total = (in_flight / 2).clamp(1, 1024);
        PlaceSettings { total, per_address: (total / 2).clamp(1, 128) }
    }
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// The address has its share.
    Address,
    /// All are taken.
    Everybody,
}

/// All places. A clone is the same ones.
#[derive(Clone)]
pub struct Places {
    settings: PlaceSettings,
    /// By network; who has none is not in it, so there are never more entries than places.
    taken: Arc<Mutex<Taken>>,
}

#[derive(Default)]
struct Taken {
    total: usize,
    by_network: HashMap<IpAddr, usize>,
}

/// One place, given back on drop.
pub struct Place {
    places: Places,
    network: IpAddr,
}

impl Places {
    pub fn new(settings: PlaceSettings) -> Places {
        Places { settings, taken: Arc::default() }
    }

    pub fn take(&self, address: IpAddr) -> Result<Place, NoPlace> {
        let network = network(address);
        let mut taken = self.taken.lock();
        if taken.by_network.get(&network).is_some_and(|count| *count >= self.settings.per_address) {
            return Err(NoPlace::Address);
        }
        if taken.total >= self.settings.total {
            return Err(NoPlace::Everybody);
        }
        taken.total += 1;
        *taken.by_network.entry(network).or_default() += 1;
        Ok(Place { places: self.clone(), network })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        taken.total = taken.total.saturating_sub(1);
        if let Some(count) = taken.by_network.get_mut(&self.network) {
            *count -= 1; // an entry is made with one, and taken out at none
            if *count == 0 {
                taken.by_network.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn one_address_cannot_take_every_place() {
        let places = Places::new(PlaceSettings { total: 10, per_address: 4 });
        let held: Vec<Place> = (0..4).map(|_| places.take(address(1)).expect("a place")).collect();
        assert_eq!(places.take(address(1)).err(), Some(NoPlace::Address));
        let _other = places.take(address(2)).expect("others have theirs");
        drop(held);
        assert!(places.take(address(1)).is_ok(), "places come back");
    }

    #[test]
    fn strangers_leave_room_for_those_who_have_a_token_whatever_the_limit_is() {
        for in_flight in [2, 3, 10, 300, 10_000, 1_000_000] {
            let PlaceSettings { total, per_address } = PlaceSettings::within(in_flight);
            assert!(
                1 <= per_address && per_address <= total && total <= in_flight / 2,
                "{in_flight}: {total}, {per_address}"
            );
        }
        let ordinary = PlaceSettings::within(10_000);
        assert_eq!((ordinary.total, ordinary.per_address), (1024, 128));
    }

    #[test]
    fn all_addresses_together_have_a_bound_and_leave_nothing_behind() {
        let places = Places::new(PlaceSettings { total: 10, per_address: 4 });
        let held: Vec<Place> = (0..10).map(|n| places.take(address(n)).expect("a place")).collect();
        assert_eq!(places.take(address(99)).err(), Some(NoPlace::Everybody));
        assert_eq!(places.taken.lock().by_network.len(), 10, "who got none has no entry");
        drop(held);
        let taken = places.taken.lock();
        assert_eq!((taken.total, taken.by_network.len()), (0, 0));
    }
}
