//! Whose an address is. A URL that somebody else has written (a redirect) must not lead to what only this machine can reach.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use tower_service::Service;

/// Whose an address is, from the farthest to the nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// The internet's.
    Public,
    /// A private network's (RFC 1918, RFC 4193, RFC 6598).
    Private,
    /// This machine's.
    Machine,
}

impl Reach {
    /// `None`: nobody's whom a URL should name: link-local (clouds keep a machine's credentials there), multicast, reserved.
    pub fn of(address: IpAddr) -> Option<Reach> {
        match address {
            IpAddr::V4(address) => of_v4(address),
            IpAddr::V6(address) => of_v6(address),
        }
    }

    pub fn covers(self, address: IpAddr) -> bool {
        Reach::of(address).is_some_and(|reach| reach <= self)
    }
}

fn of_v4(address: Ipv4Addr) -> Option<Reach> {
    match address.octets() {
        [127, ..] => Some(Reach::Machine),
        [10, ..] | [192, 168, ..] | [172, 16..=31, ..] | [100, 64..=127, ..] => Some(Reach::Private),
        [0, ..] | [169, 254, ..] | [192, 0, 0, _] | [198, 18..=19, ..] | [224..=255, ..] => None,
        _ => Some(Reach::Public),
    }
}

fn of_v6(address: Ipv6Addr) -> Option<Reach> {
    let s = address.segments();
    let embedded = |high: u16, low: u16| of_v4(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
    match s {
        [0, 0, 0, 0, 0, 0, 0, 1] => Some(Reach::Machine),
        // An IPv4 address in other clothes: mapped, NAT64, 6to4.
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            embedded(high, low)
        }
        [first, ..] if first & 0xfe00 == 0xfc00 => Some(Reach::Private),
        [first, ..] if first & 0xe000 == 0x2000 => Some(Reach::Public),
        _ => None,
    }
}

/// The address that a URL's host is, if it is one and no name.
pub fn literal(host: &str) -> Option<IpAddr> {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).parse().ok()
}

/// The machine's resolver, without the addresses that are too near.
#[derive(Clone)]
pub(super) struct Names {
    all: GaiResolver,
    most: Option<Reach>,
}

impl Names {
    pub fn new(most: Option<Reach>) -> Names {
        Names { all: GaiResolver::new(), most }
    }
}

impl Service<Name> for Names {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (found, most) = (self.all.call(name), self.most);
        Box::pin(async move {
            let may = |address: &SocketAddr| most.is_none_or(|most| most.covers(address.ip()));
            let addresses: Vec<SocketAddr> = found.await?.filter(may).collect();
            Ok(addresses.into_iter())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_belongs_to_the_internet_a_private_network_this_machine_or_nobody() {
        for (text, reach) in [
            ("1.1.1.1", Some(Reach::Public)),
            ("172.15.0.1", Some(Reach::Public)),
            ("172.32.0.1", Some(Reach::Public)),
            ("100.63.0.1", Some(Reach::Public)),
            ("2606:4700::1111", Some(Reach::Public)),
            ("64:ff9b::101:101", Some(Reach::Public)),
            ("10.0.0.1", Some(Reach::Private)),
            ("172.16.0.1", Some(Reach::Private)),
            ("172.31.255.255", Some(Reach::Private)),
            ("192.168.1.1", Some(Reach::Private)),
            ("100.64.0.1", Some(Reach::Private)),
            ("fd00::1", Some(Reach::Private)),
            ("::ffff:10.0.0.1", Some(Reach::Private)),
            ("127.0.0.1", Some(Reach::Machine)),
            ("127.9.9.9", Some(Reach::Machine)),
            ("::1", Some(Reach::Machine)),
            ("::ffff:127.0.0.1", Some(Reach::Machine)),
            ("64:ff9b::7f00:1", Some(Reach::Machine)),
            ("2002:7f00:1::", Some(Reach::Machine)),
            ("169.254.169.254", None),
            ("::ffff:169.254.169.254", None),
            ("fe80::1", None),
            ("ff02::1", None),
            ("224.0.0.1", None),
            ("255.255.255.255", None),
            ("0.0.0.0", None),
            ("::", None),
            ("::7f00:1", None),
        ] {
            assert_eq!(Reach::of(text.parse().unwrap()), reach, "{text}");
        }
        assert!(Reach::Machine.covers("10.0.0.1".parse().unwrap()));
        assert!(!Reach::Public.covers("10.0.0.1".parse().unwrap()));
        assert!(!Reach::Machine.covers("169.254.169.254".parse().unwrap()));
        assert_eq!(literal("[::1]"), Some("::1".parse().unwrap()));
        assert_eq!(literal("localhost"), None);
    }
}
