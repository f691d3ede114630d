//! `[audit.syslog]`: where a syslog receiver is, and what it files us under.

use std::fmt;
use std::path::PathBuf;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::values::{self, BackendUrl};

/// `[audit.syslog]`
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Syslog {
    /// `unix:///dev/log`, `udp://host:514` or `tcp://host:601`. Empty: no syslog. TCP is the one that loses nothing.
    #[serde(deserialize_with = "SyslogAddress::deserialize", serialize_with = "SyslogAddress::serialize")]
    pub address: Option<SyslogAddress>,
    /// Default `authpriv`: who asked for what is nobody's business but the administrators', and Debian files it so.
    pub facility: Facility,
}

/// What a message is about (RFC 5424, table 1): those that are no part of the operating system's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Facility {
    User,
    Daemon,
    Auth,
    #[default]
    Authpriv,
    Local0,
    Local1,
    Local2,
    Local3,
    Local4,
    Local5,
    Local6,
    Local7,
}

impl Facility {
    pub fn code(self) -> u8 {
        match self {
            Facility::User => 1,
            Facility::Daemon => 3,
            Facility::Auth => 4,
            Facility::Authpriv => 10,
            local => 16 + (local as u8 - Facility::Local0 as u8),
        }
    }
}

/// A socket that takes RFC 5424 messages. Its `Display` is how it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyslogAddress {
    /// A datagram socket of this machine: `/dev/log`.
    Unix(PathBuf),
    /// A message a datagram (RFC 5426). The host has no brackets.
    Udp { host: String, port: u16 },
    /// Octet counting (RFC 6587, section 3.4.1).
    Tcp { host: String, port: u16 },
}

impl SyslogAddress {
    /// `unix:///dev/log`, `udp://host:514` or `tcp://host:601`.
    pub fn parse(text: &str) -> Result<SyslogAddress, String> {
        let bad =
            || Err("this is no address of a syslog; write unix:///dev/log, udp://host:514 or tcp://host:601".into());
        let Some((scheme, rest)) = text.split_once("://") else { return bad() };
        if scheme == "unix" {
            let fits = rest.starts_with('/') && rest.len() <= 107 && !rest.contains('\0'); // sun_path, unix(7)
            return if fits { Ok(SyslogAddress::Unix(rest.into())) } else { bad() };
        }
        // What is a host and a port there is one here; a port of its own is asked for, since syslog over TCP has no usual one.
        let has_port = rest.rsplit_once(':').is_some_and(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
        let parsed = BackendUrl::parse(&format!("http://{rest}")).ok().filter(|url| has_port && !url.has_userinfo());
        let Some(url) = parsed.filter(|_| !rest.ends_with('/')) else { return bad() };
        let (host, port) = (url.host().to_owned(), url.port());
        match scheme {
            "udp" => Ok(SyslogAddress::Udp { host, port }),
            "tcp" => Ok(SyslogAddress::Tcp { host, port }),
            _ => bad(),
        }
    }

    /// Whether what is sent stays on this machine.
    pub fn is_local(&self) -> bool {
        match self {
            SyslogAddress::Unix(_) => true,
            SyslogAddress::Udp { host, .. } | SyslogAddress::Tcp { host, .. } => {
                host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SyslogAddress>, D::Error> {
        let text = values::plain_text(d)?;
        if text.is_empty() { Ok(None) } else { SyslogAddress::parse(&text).map(Some).map_err(D::Error::custom) }
    }

    pub(super) fn serialize<S: Serializer>(address: &Option<SyslogAddress>, s: S) -> Result<S::Ok, S::Error> {
        values::or_empty(address, s)
    }
}

impl fmt::Display for SyslogAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            SyslogAddress::Unix(path) => return write!(f, "unix://{}", path.display()),
            SyslogAddress::Udp { host, port } => ("udp", host, port),
            SyslogAddress::Tcp { host, port } => ("tcp", host, port),
        };
        if host.contains(':') { write!(f, "{scheme}://[{host}]:{port}") } else { write!(f, "{scheme}://{host}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facilities_have_the_rfcs_numbers() {
        let codes = [Facility::User, Facility::Auth, Facility::Authpriv, Facility::Local0, Facility::Local7];
        assert_eq!(codes.map(Facility::code), [1, 4, 10, 16, 23]);
    }

    #[test]
    fn an_address_is_a_socket_of_this_machine_or_a_host_with_a_port() {
        for (text, local) in [
            ("unix:///dev/log", true),
            ("udp://127.0.0.1:514", true),
            ("udp://[::1]:514", true),
            ("tcp://localhost:601", true),
            ("tcp://logs.example:601", false),
            ("udp://[2001:db8::1]:514", false),
        ] {
            let address = SyslogAddress::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!((address.to_string().as_str(), address.is_local()), (text, local));
        }
        let long = format!("unix:///{}", "x".repeat(107));
        for bad in [
            "",
            "/dev/log",
            "unix://dev/log",
            "unix://",
            long.as_str(),
            "udp://host",
            "udp://:514",
            "tcp://host:0",
            "tcp://host:601/",
            "tcp://host:601/x",
            "tcp://user@host:601",
            "tls://host:6514",
            "http://host:514",
        ] {
            assert!(SyslogAddress::parse(bad).is_err(), "{bad}");
        }
    }
}
