//! Refusals before a caller is known, folded: a stranger without a token can neither fill the disk nor stop the service.
//!
//! In each second the first few refusals of an address are recorded one by one; the rest become one counted record when the second
//! is over. Both are bounded over all addresses too: a stranger with many addresses is folded into one record without an address.
//! Pure: the time is an argument, and what is to be written is returned.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};

/// How much is recorded one by one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FoldSettings {
    /// Single records a second for each address. 10 is more than a person with a wrong token makes, and shows the first causes.
    pub singles_per_address: u32,
    /// Single records a second over all addresses: with records of 1 kB, at most 0.2 MB a second.
    pub singles_total: u32,
    /// Addresses counted apart in one second; refusals of further ones are counted together.
    pub addresses: usize,
}

impl Default for FoldSettings {
    fn default() -> FoldSettings {
        FoldSettings { singles_per_address: 10, singles_total: 200, addresses: 256 }
    }
}

/// What becomes of one refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// Write a record of its own.
    Single,
    /// It is counted, and will be part of a [`Folded`].
    Folded,
}

/// The refusals of one address in one second that got no record of their own.
#[derive(Debug, PartialEq)]
pub struct Folded {
    /// `None`: of all the addresses that were not counted apart. An IPv6 address stands for its /64.
    pub address: Option<IpAddr>,
    pub count: u64,
    causes: Vec<(&'static str, u64)>,
}

impl Folded {
    /// The words for the `error` column.
    pub fn summary(&self) -> String {
        let mut text = format!("{} refusals folded into this record:", self.count);
        for (cause, count) in &self.causes {
            let _ = write!(text, " {cause} {count},"); // Writing into a String does not fail.
        }
        text.pop();
        text
    }
}

/// How many refusals a record of the audit stands for, if it is a folded one: those alone are of no request and have such words.
pub fn refusals_in(record: &serde_json::Value) -> Option<u64> {
    let words = record["error"].as_str().filter(|_| record["extra"]["request_id"].is_null())?;
    words.split_once(" refusals folded into this record:")?.0.parse().ok()
}

/// The table of the current second.
pub struct Fold {
    settings: FoldSettings,
    second: u64,
    singles: u32,
    addresses: HashMap<IpAddr, Bucket>,
    others: Bucket,
}

#[derive(Default)]
struct Bucket {
    singles: u32,
    count: u64,
    causes: Vec<(&'static str, u64)>,
}

/// Causes are words of a closed set; past this many in one bucket they are counted as "other".
const CAUSES: usize = 16;

impl Fold {
    pub fn new(settings: FoldSettings) -> Fold {
        Fold { settings, second: 0, singles: 0, addresses: HashMap::new(), others: Bucket::default() }
    }

    /// One refusal at `second` (of any clock that does not go back). Call [`Fold::due`] first: what an earlier second left is
    /// otherwise counted into this one, never lost.
    pub fn note(&mut self, second: u64, address: IpAddr, cause: &'static str) -> Passage {
        if second != self.second {
            self.second = second;
            self.singles = 0;
            self.addresses.values_mut().chain([&mut self.others]).for_each(|bucket| bucket.singles = 0);
        }
        let address = network(address);
        let room = self.addresses.len() < self.settings.addresses;
        let bucket = match self.addresses.get_mut(&address) {
            Some(bucket) => bucket,
            None if room => self.addresses.entry(address).or_default(),
            None => &mut self.others,
        };
        if bucket.singles < self.settings.singles_per_address && self.singles < self.settings.singles_total {
            bucket.singles += 1;
            self.singles += 1;
            return Passage::Single;
        }
        bucket.count(cause);
        Passage::Folded
    }

    /// The counted records of every second before `second`. The table is empty afterwards, if a second has ended.
    pub fn due(&mut self, second: u64) -> Vec<Folded> {
        if second <= self.second || (self.addresses.is_empty() && self.others.is_empty()) {
            Vec::new()
        } else {
            self.drain()
        }
    }

    /// All that is counted, at once: for the end of the process.
    pub fn drain(&mut self) -> Vec<Folded> {
        let apart = std::mem::take(&mut self.addresses).into_iter().map(|(address, bucket)| (Some(address), bucket));
        let others = std::mem::take(&mut self.others);
        apart
            .chain([(None, others)])
            .filter(|(_, bucket)| bucket.count > 0)
            .map(|(address, bucket)| Folded { address, count: bucket.count, causes: bucket.causes })
            .collect()
    }
}

impl Bucket {
    fn is_empty(&self) -> bool {
        self.count == 0 && self.singles == 0
    }

    fn count(&mut self, cause: &'static str) {
        self.count += 1;
        let cause = if self.causes.len() < CAUSES || self.causes.iter().any(|(known, _)| *known == cause) {
            cause
        } else {
            "other"
        };
        match self.causes.iter_mut().find(|(known, _)| *known == cause) {
            Some((_, count)) => *count += 1,
            None => self.causes.push((cause, 1)),
        }
    }
}

/// Whoever has one IPv6 address has its /64: single addresses there mean nothing.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn fold(singles_per_address: u32, singles_total: u32, addresses: usize) -> Fold {
        Fold::new(FoldSettings { singles_per_address, singles_total, addresses })
    }

    #[test]
    fn the_first_refusals_of_an_address_pass_and_the_rest_become_one_counted_record() {
        let mut fold = fold(2, 100, 10);
        let passages: Vec<_> = (0..5).map(|_| fold.note(7, ip("192.0.2.1"), "missing_token")).collect();
        assert_eq!(passages, [Passage::Single, Passage::Single, Passage::Folded, Passage::Folded, Passage::Folded]);
        fold.note(7, ip("192.0.2.1"), "expired");
        assert_eq!(fold.note(7, ip("192.0.2.2"), "missing_token"), Passage::Single, "another address is not touched");
        assert_eq!(fold.due(7), [], "the second is not over");
        let due = fold.due(8);
        assert_eq!(due.len(), 1);
        assert_eq!((due[0].address, due[0].count), (Some(ip("192.0.2.1")), 4));
        assert_eq!(due[0].summary(), "4 refusals folded into this record: missing_token 3, expired 1");
        let record =
            |request_id| serde_json::json!({ "error": due[0].summary(), "extra": { "request_id": request_id } });
        assert_eq!(refusals_in(&record(None)), Some(4));
        assert_eq!(refusals_in(&record(Some("r"))), None, "a request's own words");
        assert_eq!(fold.due(9), [], "it is told once");
        assert_eq!(fold.note(8, ip("192.0.2.1"), "missing_token"), Passage::Single, "a new second has new room");
    }

    #[test]
    fn a_flood_from_a_million_addresses_keeps_a_bounded_table_and_a_bounded_number_of_records() {
        let mut fold = fold(10, 50, 64);
        let mut singles = 0;
        for n in 0..1_000_000u32 {
            let address = IpAddr::V4(n.into());
            singles += u32::from(fold.note(1, address, "missing_token") == Passage::Single);
        }
        assert_eq!(singles, 50);
        assert_eq!(fold.addresses.len(), 64);
        let due = fold.due(2);
        assert!(due.len() <= 65);
        assert_eq!(due.iter().map(|folded| folded.count).sum::<u64>(), 1_000_000 - 50, "each is counted");
        assert!(due.iter().any(|folded| folded.address.is_none()));
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_stranger() {
        let mut fold = fold(1, 100, 10);
        assert_eq!(fold.note(1, ip("2001:db8::1"), "x"), Passage::Single);
        assert_eq!(fold.note(1, ip("2001:db8::2"), "x"), Passage::Folded);
        assert_eq!(fold.note(1, ip("2001:db8:0:1::1"), "x"), Passage::Single);
        assert_eq!(fold.note(1, ip("::ffff:192.0.2.1"), "x"), Passage::Single);
        assert_eq!(fold.note(1, ip("192.0.2.1"), "x"), Passage::Folded, "a mapped address is the address");
    }

    #[test]
    fn causes_past_the_bound_are_counted_together() {
        let mut fold = fold(0, 0, 1);
        let causes: Vec<&'static str> = (0..40).map(|n| &*Box::leak(format!("cause_{n}").into_boxed_str())).collect();
        for cause in &causes {
            fold.note(1, ip("192.0.2.1"), cause);
        }
        let due = fold.due(2);
        assert_eq!(due[0].count, 40);
        assert_eq!(due[0].causes.len(), CAUSES + 1);
        assert_eq!(due[0].causes.last(), Some(&("other", 40 - CAUSES as u64)));
    }

    #[test]
    fn what_is_left_at_the_end_is_told() {
        let mut fold = fold(0, 0, 4);
        fold.note(5, ip("192.0.2.1"), "missing_token");
        assert_eq!(fold.drain().len(), 1);
        assert_eq!(fold.drain(), []);
    }
}
