//! Lines to a syslog receiver, as RFC 5424 messages: in datagrams (Unix, RFC 5426) or counted in octets over TCP (RFC 6587, section
//! 3.4.1).
//!
//! MSG is the line as it stands in the file, without a BOM: it is plain ASCII, so MSG-ANY (RFC 5424, section 6.4) holds it, and a reader of
//! JSON finds it at once. PROCID is the writer, which names the process better than a number that comes again; MSGID is the phase. There is no structured
//! data: the line's own hashes say more than a sequence number.
//!
//! Syslog has no answers. Over TCP closing is one: we send a batch, close our half, and wait until the receiver has read to that end and
//! closes its own; whoever goes away before is sent the batch again. A datagram is gone once the kernel has taken it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket, UnixDatagram, lookup_host};

use super::{Batch, Failure, Taken, host, line};
use crate::config::{Facility, SyslogAddress};
use crate::ledger::chain::WriterName;

/// At most 48 characters (RFC 5424, section 6.2.5).
const APP_NAME: &str = "behavry-ollama-proxy";
/// What is read of a receiver that talks. Nothing it says means anything.
const IGNORED_BYTES: usize = 64 << 10;

pub struct Syslog {
    address: SyslogAddress,
    facility: Facility,
    /// As it stands in messages.
    hostname: String,
}

enum Socket {
    Unix(UnixDatagram),
    Udp(UdpSocket),
}

impl Socket {
    async fn send(&self, message: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => socket.send(message).await,
            Socket::Udp(socket) => socket.send(message).await,
        }
    }
}

impl Syslog {
    pub fn new(address: SyslogAddress, facility: Facility) -> Syslog {
        Syslog { address, facility, hostname: host::name() }
    }

    pub async fn deliver(&mut self, batch: &Batch, within: Duration) -> Result<Taken, Failure> {
        let sent = async {
            match &self.address {
                SyslogAddress::Unix(path) => {
                    let socket = UnixDatagram::unbound()?;
                    socket.connect(path)?;
                    self.datagrams(batch, &Socket::Unix(socket)).await
                }
                SyslogAddress::Udp { host, port } => {
                    // A name may have several addresses, and a datagram to one where nobody listens fails on this machine alone.
                    let mut sent = Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
                    for to in lookup_host((host.as_str(), *port)).await? {
                        sent = self.udp(batch, to).await;
                        if sent.is_ok() {
                            break;
                        }
                    }
                    sent
                }
                SyslogAddress::Tcp { host, port } => {
                    self.stream(batch, TcpStream::connect((host.as_str(), *port)).await?).await
                }
            }
        };
        match tokio::time::timeout(within, sent).await {
            Ok(sent) => sent.map_err(|e| Failure::new(format!("{}: {e}", self.address))),
            Err(_) => Err(Failure::new(format!("{} did not take them in time", self.address))),
        }
    }

    async fn udp(&self, batch: &Batch, to: SocketAddr) -> io::Result<Taken> {
        let any: IpAddr = if to.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(to).await?;
        self.datagrams(batch, &Socket::Udp(socket)).await
    }

    /// What does not fit a datagram never will.
    async fn datagrams(&self, batch: &Batch, socket: &Socket) -> io::Result<Taken> {
        let mut taken = Taken::default();
        let mut message = Vec::new();
        for (writer, line) in batch.lines() {
            message.clear();
            self.write_message(writer, line, &mut message);
            match socket.send(&message).await {
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => taken.refused += 1,
                sent => _ = sent?,
            }
        }
        match socket {
            // Where nobody listens on this machine the kernel knows by now.
            Socket::Udp(socket) => socket.take_error()?.map_or(Ok(taken), Err),
            Socket::Unix(_) => Ok(taken),
        }
    }

    async fn stream(&self, batch: &Batch, mut stream: TcpStream) -> io::Result<Taken> {
        let mut framed = Vec::with_capacity(batch.body().len() + batch.len() * 160);
        let mut message = Vec::new();
        for (writer, line) in batch.lines() {
            message.clear();
            self.write_message(writer, line, &mut message);
            framed.extend_from_slice(format!("{} ", message.len()).as_bytes());
            framed.extend_from_slice(&message);
        }
        stream.write_all(&framed).await?;
        stream.shutdown().await?;
        let mut ignored = vec![0; 4096];
        let mut said = 0;
        loop {
            match stream.read(&mut ignored).await? {
                0 => return Ok(Taken::default()),
                bytes => said += bytes,
            }
            if said > IGNORED_BYTES {
                return Err(io::Error::other("it talks, which no syslog receiver does"));
            }
        }
    }

    fn write_message(&self, writer: WriterName, text: &[u8], into: &mut Vec<u8>) {
        let priority = self.facility.code() * 8 + line::severity(text) as u8;
        // Whoever can write the files can write anything there; it stays one message with its fields all the same.
        let is_time = |at: &&str| at.len() <= 32 && at.parse::<jiff::Timestamp>().is_ok() && !at.contains(' ');
        let at = Some(line::timestamp(text)).filter(is_time).unwrap_or("-");
        let phase = Some(line::phase(text)).filter(|phase| !phase.is_empty()).unwrap_or("-");
        let hostname = &self.hostname;
        let head = format!("<{priority}>1 {at} {hostname} {APP_NAME} {writer} {phase} - ");
        into.extend_from_slice(head.as_bytes());
        into.extend_from_slice(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(facility: Facility, line: &str) -> String {
        let address = SyslogAddress::parse("unix:///dev/log").expect("an address");
        let syslog = Syslog { address, facility, hostname: "gw-1".to_owned() };
        let mut message = Vec::new();
        syslog.write_message("20261122T213908Z-00c0ffee".parse().expect("a name"), line.as_bytes(), &mut message);
        String::from_utf8(message).expect("ASCII")
    }

    #[test]
    fn a_message_has_the_records_own_time_its_writer_its_phase_and_the_line_as_it_stands() {
        let line = r#"{"extra":{"outcome":"refused","phase":"final"},"timestamp":"2026-11-22T18:35:16.000001+00:00"}"#;
        assert_eq!(
            message(Facility::Authpriv, line),
            format!(
                "<85>1 2026-11-22T18:35:16.000001+00:00 gw-1 behavry-ollama-proxy 20261122T213908Z-00c0ffee final - {line}"
            )
        );
        // What is no line of ours is sent all the same.
        for garbage in ["garbage", r#"{"phase":"A B","timestamp":"2026-11-22 18:35:16"}"#] {
            assert_eq!(
                message(Facility::Local7, garbage),
                format!("<190>1 - gw-1 behavry-ollama-proxy 20261122T213908Z-00c0ffee - - {garbage}")
            );
        }
    }

    #[tokio::test]
    async fn what_no_datagram_can_hold_is_counted_and_the_others_go() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = SyslogAddress::parse(&format!("udp://{}", socket.local_addr().expect("bound"))).expect("one");
        let mut syslog = Syslog::new(address, Facility::Local0);
        let mut filling = crate::sinks::batch::Filling::default();
        for line in ["first", "x".repeat(70_000).as_str(), "last"] {
            filling.push("20261122T213908Z-00c0ffee".parse().expect("a name"), line.as_bytes());
        }
        let taken = syslog.deliver(&filling.done(), Duration::from_secs(60)).await;
        assert_eq!(taken, Ok(Taken { refused: 1 }));
        for expected in ["first", "last"] {
            let mut buffer = [0; 2000];
            let bytes = socket.recv(&mut buffer).await.expect("a datagram");
            assert!(buffer[..bytes].ends_with(expected.as_bytes()));
        }
    }

    #[tokio::test]
    async fn where_nobody_listens_nothing_is_taken() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let port = socket.local_addr().expect("bound").port();
        drop(socket);
        let folder = tempfile::tempdir().expect("a folder");
        let unix = format!("unix://{}", folder.path().join("log").display());
        for address in [format!("udp://127.0.0.1:{port}"), format!("tcp://127.0.0.1:{port}"), unix] {
            let address = SyslogAddress::parse(&address).expect("an address");
            let mut syslog = Syslog::new(address.clone(), Facility::Local0);
            let mut filling = crate::sinks::batch::Filling::default();
            filling.push("20261122T213908Z-00c0ffee".parse().expect("a name"), b"line");
            assert!(syslog.deliver(&filling.done(), Duration::from_secs(60)).await.is_err(), "{address}");
        }
    }
}
