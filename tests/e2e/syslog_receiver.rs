//! Somebody who is sent the audit as syslog: over a Unix socket, UDP or TCP, and strict about RFC 5424 and RFC 6587.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixDatagram};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// One message, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub facility: u8,
    pub severity: u8,
    pub timestamp: String,
    pub hostname: String,
    pub app_name: String,
    pub procid: String,
    pub msgid: String,
    pub msg: String,
}

impl Message {
    /// By the grammar of RFC 5424, section 6.
    pub fn parse(bytes: &[u8]) -> Result<Message, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "no UTF-8")?;
        let (pri, rest) = text.strip_prefix('<').and_then(|rest| rest.split_once('>')).ok_or("no PRI")?;
        let plain = !pri.is_empty() && pri.len() <= 3 && pri.bytes().all(|b| b.is_ascii_digit());
        let pri: u16 = pri.parse().ok().filter(|pri| plain && *pri <= 191).ok_or("PRI is no number up to 191")?;
        let mut fields = rest.splitn(7, ' ');
        let mut field = |name: &str, longest: usize| {
            let field = fields.next().ok_or(format!("no {name}"))?;
            let fits = (1..=longest).contains(&field.len()) && field.bytes().all(|b| (33..=126).contains(&b));
            fits.then(|| field.to_owned()).ok_or(format!("{name} does not fit: {field:?}"))
        };
        if field("VERSION", 3)? != "1" {
            return Err("VERSION is not 1".into());
        }
        let timestamp = field("TIMESTAMP", 32)?;
        if timestamp != "-" {
            // TIME-SECFRAC has six digits at most, T and Z are upper case, and jiff reads the rest.
            let fraction =
                timestamp.split_once('.').map_or(0, |(_, rest)| rest.bytes().take_while(u8::is_ascii_digit).count());
            let read = timestamp.parse::<jiff::Timestamp>().is_ok();
            if !read || fraction > 6 || timestamp.contains(['t', 'z', ' ']) {
                return Err(format!("TIMESTAMP does not fit: {timestamp}"));
            }
        }
        let hostname = field("HOSTNAME", 255)?;
        let app_name = field("APP-NAME", 48)?;
        let procid = field("PROCID", 128)?;
        let msgid = field("MSGID", 32)?;
        let rest = fields.next().ok_or("no STRUCTURED-DATA")?;
        let msg = rest.strip_prefix("- ").ok_or("STRUCTURED-DATA is not nil")?;
        if msg.starts_with('\u{feff}') || !msg.is_ascii() {
            return Err("MSG is plain ASCII, and so has no BOM".into());
        }
        Ok(Message {
            facility: (pri / 8) as u8,
            severity: (pri % 8) as u8,
            timestamp,
            hostname,
            app_name,
            procid,
            msgid,
            msg: msg.to_owned(),
        })
    }
}

/// What came, in its order.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Vec<Message>>>);

impl Seen {
    pub fn messages(&self) -> Vec<Message> {
        self.0.lock().expect("not poisoned").clone()
    }

    pub fn lines(&self) -> Vec<String> {
        self.messages().into_iter().map(|message| message.msg).collect()
    }

    fn take(&self, bytes: &[u8]) {
        let message = Message::parse(bytes);
        self.0.lock().expect("not poisoned").push(message.unwrap_or_else(|why| panic!("{why}")));
    }
}

/// Datagrams, one message each. The task's panic at a message that is none shows as one that never came.
pub struct Datagrams {
    reading: JoinHandle<()>,
}

impl Datagrams {
    pub fn unix(path: &Path, seen: &Seen) -> Datagrams {
        let socket = UnixDatagram::bind(path).expect("a free path");
        let kept = seen.clone();
        let reading = tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 20];
            while let Ok(bytes) = socket.recv(&mut buffer).await {
                kept.take(&buffer[..bytes]);
            }
        });
        Datagrams { reading }
    }

    pub async fn udp(address: SocketAddr, seen: &Seen) -> Datagrams {
        let socket = UdpSocket::bind(address).await.expect("a free port");
        let kept = seen.clone();
        let reading = tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(bytes) = socket.recv(&mut buffer).await {
                kept.take(&buffer[..bytes]);
            }
        });
        Datagrams { reading }
    }

    /// Nobody has the socket any more.
    pub async fn die(self) {
        self.reading.abort();
        let _ = self.reading.await; // aborted, or it panicked, and what did not come fails the test
    }
}

/// What a receiver over TCP does with a connection.
#[derive(Clone, Copy, Debug)]
pub enum Serves {
    /// Reads to the end, and closes.
    Whole,
    /// Reads so many bytes and resets the connection.
    Resets(usize),
    /// Reads to the end, and never closes.
    Lingers,
    /// Reads nothing.
    Stalls,
}

pub struct Stream {
    pub address: SocketAddr,
    pub seen: Seen,
    /// Connections so far.
    pub met: watch::Receiver<usize>,
    serves: watch::Sender<Serves>,
    accepting: JoinHandle<()>,
}

impl Stream {
    pub async fn open(serves: Serves) -> Stream {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (serves, seen) = (watch::Sender::new(serves), Seen::default());
        let (meet, met) = watch::channel(0);
        let (doing, kept) = (serves.subscribe(), seen.clone());
        let accepting = tokio::spawn(async move {
            let mut served = tokio::task::JoinSet::new(); // ends with us
            while let Ok((stream, _)) = listener.accept().await {
                meet.send_modify(|met| *met += 1);
                served.spawn(serve(stream, doing.clone(), kept.clone()));
            }
        });
        Stream { address, seen, met, serves, accepting }
    }

    pub fn serves(&self, serves: Serves) {
        self.serves.send_replace(serves);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(mut stream: TcpStream, mut doing: watch::Receiver<Serves>, seen: Seen) {
    let serves = *doing.borrow_and_update();
    let most = match serves {
        Serves::Whole | Serves::Lingers => usize::MAX,
        Serves::Resets(bytes) => bytes,
        Serves::Stalls => 0,
    };
    let mut bytes = Vec::new();
    while bytes.len() < most {
        match stream.read_buf(&mut bytes).await {
            Ok(0) => break,
            Ok(_) => take_frames(&mut bytes, &seen),
            Err(_) => return, // the proxy was killed
        }
        if matches!(serves, Serves::Resets(_)) {
            break;
        }
    }
    match serves {
        Serves::Whole => {
            assert!(bytes.is_empty(), "what is left is no frame");
            let _ = stream.shutdown().await; // it may be gone
        }
        // Unread bytes or not: this is what a process that dies does.
        Serves::Resets(_) => {
            let _ = stream.set_zero_linger();
        }
        Serves::Lingers | Serves::Stalls => _ = doing.changed().await,
    }
}

/// Octet counting: `MSG-LEN SP SYSLOG-MSG`, and the first digit is none of zero.
fn take_frames(bytes: &mut Vec<u8>, seen: &Seen) {
    while let Some(space) = bytes.iter().position(|byte| *byte == b' ') {
        let digits = std::str::from_utf8(&bytes[..space]).expect("digits");
        assert!(!digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit()), "{digits}");
        let length: usize = digits.parse().expect("a length");
        let Some(message) = bytes.get(space + 1..space + 1 + length) else { return };
        seen.take(message);
        bytes.drain(..space + 1 + length);
    }
}
