//! A stand-in Ollama: it speaks every dialect at a chosen pace, misbehaves on request, and remembers what it saw.
//!
//! One implementation with three users: the `simulate` command, the tests, and the load bench. It imports nothing of the
//! proxy, so that the two cannot agree on a mistake; what it says is held against recorded replies of real Ollama servers
//! by `tests/simulator.rs`.
//!
//! It is a raw server on purpose (no hyper): the tests need the request's exact bytes, and replies that no HTTP library
//! would send. The modules, in the order of a request:
//!
//! - `options`, `fault`, `witness`: what it is told, how it can misbehave, what it remembers;
//! - `link`, `head`, `exchange`: the socket, the request's bytes, one exchange;
//! - `route`, `loose`, `ask`, `refusal`: which handler, what Go's JSON decoder would make of the body, what is asked, errors;
//! - `handle`, `models`, `script`, `generate`, `embed`, `catalogue`, `manage`, `fetch`: the handlers, what is there, what it does;
//! - `speak`, `native`, `openai`, `anthropic`, `responses`, `reply`, `text`: the words.
//!
//! What it does not model: load-time options, slots and the load queue (but for `--load-ms` and the 503 fault), log
//! probabilities, zstd bodies, tool calls other than the recorded one, truncation to the context length.
//!
//! Like Ollama it has no time-outs towards its client: a test's own deadline, or the end of the test, ends a connection.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

mod anthropic;
mod ask;
mod catalogue;
mod embed;
mod exchange;
mod fault;
mod fetch;
mod generate;
mod handle;
mod head;
mod link;
mod loose;
mod manage;
mod models;
mod native;
mod openai;
mod options;
mod refusal;
mod reply;
mod responses;
mod route;
mod script;
mod speak;
mod text;
mod witness;

pub use fault::{Fault, NAMES as FAULT_NAMES, UnknownFault};
pub use options::{SimulatorOptions, WireForm};
pub use witness::{Ending, NotSeen, Seen, Traffic};

use fault::FaultRule;
use manage::Blobs;
use models::{Model, Models, NoModel};
use witness::Witnesses;

/// A running simulator. Dropping it stops it.
pub struct Simulator {
    shared: Arc<Shared>,
    address: SocketAddr,
    commands: mpsc::Sender<Command>,
    /// Bound and never listening: keeps the port while the listener is closed, so that a connection is refused and no
    /// other test gets the port.
    _port: TcpSocket,
}

/// What all connections share.
struct Shared {
    options: SimulatorOptions,
    models: Models,
    blobs: Blobs,
    witnesses: Arc<Witnesses>,
    /// Whether there is a rule at all: the one thing looked at for each request of a bench.
    has_rule: AtomicBool,
    rule: Mutex<Option<FaultRule>>,
    ids: AtomicU64,
}

enum Command {
    /// Close the listener and every connection.
    Close(oneshot::Sender<()>),
    /// Listen again.
    Open(oneshot::Sender<io::Result<()>>),
}

impl Simulator {
    /// Starts on the current tokio runtime.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn start(options: SimulatorOptions) -> io::Result<Simulator> {
        let first = socket(options.address())?;
        let address = first.local_addr()?;
        let keeper = socket(address)?;
        let listener = first.listen(BACKLOG)?;
        let rule =
            options.fault.clone().map(|fault| FaultRule { fault, everywhere: options.fault_everywhere, times: None });
        let shared = Arc::new(Shared {
            models: Models::new(&options.models),
            blobs: Blobs::default(),
            witnesses: Arc::new(Witnesses::new(options.witnesses)),
            has_rule: AtomicBool::new(rule.is_some()),
            rule: Mutex::new(rule),
            ids: AtomicU64::new(text::unix_now().as_nanos() as u64),
            options,
        });
        let (commands, inbox) = mpsc::channel(4);
        let refuses = shared.options.fault == Some(Fault::Refuses);
        tokio::spawn(listen(Arc::clone(&shared), (!refuses).then_some(listener), address, inbox));
        Ok(Simulator { shared, address, commands, _port: keeper })
    }

    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// `http://127.0.0.1:PORT`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The requests so far, oldest first; at most `witnesses` of them.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.witnesses.all()
    }

    /// Forgets the requests so far. Counters go on.
    pub fn forget(&self) {
        self.shared.witnesses.forget();
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> u64 {
        self.shared.witnesses.accepted.load(Ordering::Relaxed)
    }

    /// Bytes received and sent so far.
    pub fn bytes(&self) -> Traffic {
        let witnesses = &self.shared.witnesses;
        Traffic {
            received_bytes: witnesses.received_bytes.load(Ordering::Relaxed),
            sent_bytes: witnesses.sent_bytes.load(Ordering::Relaxed),
        }
    }

    /// Waits until the predicate holds for what was seen. It is asked again after each event, and never polled.
    ///
    /// # Errors
    /// It did not hold within the limit.
    pub async fn wait_for(&self, limit: Duration, predicate: impl Fn(&[Seen]) -> bool) -> Result<Vec<Seen>, NotSeen> {
        self.shared.witnesses.wait_for(limit, predicate).await
    }

    /// Misbehaves on every inference route from now on, or behaves again (`None`). Exchanges that run go on as they began.
    /// `Fault::Refuses` closes the listener and all connections, and taking it away opens it again.
    ///
    /// # Errors
    /// The listener cannot be opened again.
    pub async fn set_fault(&self, fault: Option<Fault>) -> io::Result<()> {
        self.set_rule(fault.map(|fault| FaultRule { fault, everywhere: false, times: None })).await
    }

    /// As `set_fault`, on every route.
    ///
    /// # Errors
    /// The listener cannot be opened again.
    pub async fn set_fault_everywhere(&self, fault: Fault) -> io::Result<()> {
        self.set_rule(Some(FaultRule { fault, everywhere: true, times: None })).await
    }

    /// As `set_fault`, for so many inference requests (`ClosesOnReuse`: of those that reuse a connection).
    ///
    /// # Errors
    /// The listener cannot be opened again.
    pub async fn set_fault_times(&self, fault: Fault, times: u64) -> io::Result<()> {
        self.set_rule(Some(FaultRule { fault, everywhere: false, times: Some(times) })).await
    }

    async fn set_rule(&self, rule: Option<FaultRule>) -> io::Result<()> {
        let refuses = rule.as_ref().is_some_and(|rule| rule.fault == Fault::Refuses);
        let refused = {
            let mut own = self.shared.rule.lock();
            let refused = own.as_ref().is_some_and(|rule| rule.fault == Fault::Refuses);
            self.shared.has_rule.store(rule.is_some(), Ordering::Release);
            *own = rule;
            refused
        };
        match (refused, refuses) {
            (false, true) => {
                self.stop().await;
                Ok(())
            }
            (true, false) => self.restart().await,
            _ => Ok(()),
        }
    }

    /// Closes the listener and every connection, as Ollama does at SIGTERM: replies that run are cut. Returns when all
    /// are closed; exchanges that ran ended as `Ending::Stopped`.
    pub async fn stop(&self) {
        let (done, wait) = oneshot::channel();
        if self.commands.send(Command::Close(done)).await.is_ok() {
            // The sender is only dropped when the runtime goes away, and then everything is closed anyway.
            let _ = wait.await;
        }
    }

    /// Listens again on the same port. What was loaded, seen and created is still there.
    ///
    /// # Errors
    /// The port cannot be listened on.
    pub async fn restart(&self) -> io::Result<()> {
        let gone = || io::Error::other("the simulator's runtime has ended");
        let (done, wait) = oneshot::channel();
        self.commands.send(Command::Open(done)).await.map_err(|_| gone())?;
        wait.await.map_err(|_| gone())?
    }
}

/// Runs a simulator on the current runtime, for ever.
///
/// # Errors
/// The address cannot be bound.
pub async fn run(options: SimulatorOptions) -> io::Result<Infallible> {
    let _simulator = Simulator::start(options).await?;
    std::future::pending().await
}

/// Runs a simulator on a runtime of its own with `threads` threads, for ever; `ready` is told its address. With one
/// thread everything stays on the calling one, which is what a bench on few cores wants.
///
/// # Errors
/// The address cannot be bound, or the runtime not be built.
pub fn run_blocking(options: SimulatorOptions, ready: impl FnOnce(SocketAddr)) -> io::Result<Infallible> {
    let runtime = match options.threads {
        1 => tokio::runtime::Builder::new_current_thread().enable_all().build()?,
        0 => tokio::runtime::Builder::new_multi_thread().enable_all().build()?,
        threads => tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?,
    };
    runtime.block_on(async {
        let simulator = Simulator::start(options).await?;
        ready(simulator.addr());
        std::future::pending().await
    })
}

const BACKLOG: u32 = 4096;

fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Linux lets two sockets share a port that both have this and neither listens yet; and lets the port be used
    // again while connections of before linger in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Accepts connections and owns their tasks: whoever ends this ends them.
async fn listen(
    shared: Arc<Shared>,
    mut listener: Option<TcpListener>,
    address: SocketAddr,
    mut inbox: mpsc::Receiver<Command>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            command = inbox.recv() => match command {
                None => return,
                Some(Command::Close(done)) => {
                    listener = None;
                    connections.shutdown().await;
                    let _ = done.send(());
                }
                Some(Command::Open(done)) => {
                    let opened = match &listener {
                        Some(_) => Ok(()),
                        None => socket(address).and_then(|socket| socket.listen(BACKLOG)).map(|open| listener = Some(open)),
                    };
                    let _ = done.send(opened);
                }
            },
            accepted = accept(listener.as_ref()) => match accepted {
                Ok(stream) => {
                    let number = shared.witnesses.accept();
                    connections.spawn(exchange::serve(stream, Arc::clone(&shared), number));
                }
                // Out of descriptors, most likely: waiting lets connections end.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<tokio::net::TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

impl Shared {
    /// A number of no meaning (splitmix64 of a counter), for ids.
    fn id(&self) -> u64 {
        let mut z = self.ids.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn find(&self, raw: &str) -> Result<Model, NoModel> {
        match self.models.find(raw) {
            Err(NoModel::Cloud) if !generate::knows_cloud(self.options.wire) => Err(NoModel::Absent),
            found => found,
        }
    }

    /// The fault for a request that has just begun, if the rule holds for it.
    fn take_fault(&self, infers: bool, reused: bool) -> Option<Fault> {
        if !self.has_rule.load(Ordering::Acquire) {
            return None;
        }
        let mut own = self.rule.lock();
        let rule = own.as_mut()?;
        let elsewhere = !infers && !rule.everywhere;
        let first = rule.fault == Fault::ClosesOnReuse && !reused;
        if elsewhere || first {
            return None;
        }
        let fault = rule.fault.clone();
        if let Some(times) = &mut rule.times {
            *times = times.saturating_sub(1);
            if *times == 0 {
                *own = None;
                self.has_rule.store(false, Ordering::Release);
            }
        }
        Some(fault)
    }

    /// How long a connection may be idle.
    fn idle_limit(&self) -> Option<Duration> {
        if !self.has_rule.load(Ordering::Acquire) {
            return None;
        }
        match self.rule.lock().as_ref()?.fault {
            Fault::ClosesIdleConnections { after_ms } => Some(Duration::from_millis(after_ms)),
            _ => None,
        }
    }
}
