//! A proxy of one's own: the built program, on free ports, with its own folders, a simulator behind it.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use behavry_ollama_proxy::identity::issuer::Claims;
use behavry_ollama_proxy::identity::{Issuer, SigningKey};
use behavry_ollama_proxy::simulator::{Simulator, SimulatorOptions};
use serde_json::Value;
use tokio::net::{TcpListener, TcpSocket};

use crate::client::{Reply, Request};

/// No test waits longer for anything; a machine under load may be slow, and a deadline decides no test but by never coming.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const KEY: &[u8] = include_bytes!("../fixtures/keys/ed25519.private.pem");

/// What differs from an ordinary proxy.
pub struct Plan {
    pub simulator: SimulatorOptions,
    /// Lines for the configuration file, such as `[limits]\nbody_bytes = 1000`.
    pub config: String,
    pub env: Vec<(String, String)>,
    /// Policy files by name; none: the policy built into the program.
    pub policy: Vec<(&'static str, String)>,
    /// Instead of the simulator's.
    pub backend: Option<String>,
    /// Without a signing key in the environment: the proxy has another source of keys, or makes its own.
    pub no_key: bool,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            simulator: SimulatorOptions::for_tests(),
            config: String::new(),
            env: Vec::new(),
            policy: Vec::new(),
            backend: None,
            no_key: false,
        }
    }
}

pub struct House {
    pub simulator: Simulator,
    pub public: SocketAddr,
    pub operator: SocketAddr,
    pub dir: tempfile::TempDir,
    command: Command,
    child: Child,
    log: Arc<Mutex<String>>,
    issuer: Issuer,
}

impl House {
    /// An ordinary proxy.
    pub async fn open() -> House {
        House::with(Plan::default()).await
    }

    pub async fn with(plan: Plan) -> House {
        let simulator = Simulator::start(plan.simulator.clone()).await.expect("the simulator listens");
        let dir = tempfile::tempdir().expect("a folder");
        let config = dir.path().join("proxy.toml");
        // The catalogue's own requests would be counted among the simulator's; tests that want it turn it on.
        let catalogue = if plan.config.contains("[catalogue]") { "" } else { "\n[catalogue]\nrefresh_s = 0\n" };
        let health = if plan.config.contains("[health]") { "" } else { "\n[health]\nprobe_s = 0\n" };
        // The simulator computes as much at once as it is asked for; tests of the queue say otherwise. The variable would replace the table.
        let named =
            plan.config.contains("[[backend]]") || plan.env.iter().any(|(name, _)| name == "BEHAVRY_OLLAMA_URL");
        let url = plan.backend.clone().unwrap_or_else(|| simulator.url());
        let backend = if named { String::new() } else { format!("\n[[backend]]\nurl = \"{url}\"\nslots = 10000\n") };
        std::fs::write(&config, format!("{}\n{catalogue}{health}{backend}", plan.config)).expect("written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_behavry-ollama-proxy"));
        command
            .arg("serve")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("BEHAVRY_CONFIG", &config)
            .env("BEHAVRY_LISTEN", "127.0.0.1:0")
            .env("BEHAVRY_OPERATOR_LISTEN", "127.0.0.1:0")
            .env("BEHAVRY_STATE_DIR", dir.path().join("state"))
            .env("BEHAVRY_JWT_PRIVATE_KEY", String::from_utf8_lossy(KEY).as_ref())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if plan.no_key {
            command.env_remove("BEHAVRY_JWT_PRIVATE_KEY");
        }
        if !plan.policy.is_empty() {
            let policies = dir.path().join("policies");
            std::fs::create_dir(&policies).expect("a folder");
            for (name, text) in &plan.policy {
                std::fs::write(policies.join(name), text).expect("written");
            }
            command.env("BEHAVRY_POLICY_DIR", &policies);
        }
        command.envs(plan.env.iter().map(|(name, value)| (name, value)));
        let log = Arc::new(Mutex::new(String::new()));
        let (child, public, operator) = start(&mut command, &log);
        let key = SigningKey::from_pem(KEY).expect("a good key");
        House { simulator, public, operator, dir, command, child, log, issuer: Issuer::new(key, "behavry", 3600) }
    }

    /// Starts the program again, on other ports and in the same folders, after its end.
    pub async fn restart(&mut self) {
        self.exit().await;
        (self.child, self.public, self.operator) = start(&mut self.command, &self.log);
    }

    /// A token that may read and infer.
    pub fn token(&self) -> String {
        self.token_with(&[], &["web:read", "web:write"])
    }

    pub fn token_with(&self, roles: &[&str], permissions: &[&str]) -> String {
        self.mint(Claims {
            sub: "tester".to_owned(),
            roles: roles.iter().map(|role| (*role).to_owned()).collect(),
            permissions: permissions.iter().map(|permission| (*permission).to_owned()).collect(),
            ..Claims::default()
        })
    }

    pub fn mint(&self, claims: Claims) -> String {
        let now_s = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64;
        self.issuer.mint(&claims, now_s).expect("good claims").0
    }

    /// Sends one request over a connection of its own and reads the whole reply.
    pub async fn send(&self, request: Request) -> Reply {
        request.send(self.public).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.send(Request::post(path, body).bearer(&self.token())).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).bearer(&self.token())).await
    }

    /// `backend drain NAME` or `backend undrain NAME`, by the command line.
    pub async fn command_backend(&self, word: &str, name: &str) {
        let mut command = program(&["backend", word, name]);
        command.env("BEHAVRY_STATE_DIR", self.dir.path().join("state"));
        let ended = run_to_end(command).await;
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }

    pub async fn metrics(&self) -> String {
        Request::get("/metrics").send(self.operator).await.text()
    }

    pub fn audit_dir(&self) -> PathBuf {
        self.dir.path().join("state/audit")
    }

    /// The text of every segment, records and marks.
    pub fn audit_text(&self) -> String {
        segments(&self.audit_dir()).iter().filter_map(|segment| std::fs::read_to_string(segment).ok()).collect()
    }

    /// Every record so far.
    pub fn records(&self) -> Vec<Value> {
        read_records(&self.audit_dir())
    }

    /// The records of one request, once its final one is there.
    pub async fn records_of(&self, request_id: &str) -> Vec<Value> {
        let dir = self.audit_dir();
        wait_until(&format!("the final record of {request_id}"), || {
            let records = read_records(&dir);
            let ours: Vec<Value> =
                records.into_iter().filter(|record| record["extra"]["request_id"] == *request_id).collect();
            ours.iter().any(|record| record["extra"]["phase"] == "final").then_some(ours)
        })
        .await
    }

    /// The final record of one request.
    pub async fn final_of(&self, request_id: &str) -> Value {
        let records = self.records_of(request_id).await;
        let finals: Vec<&Value> = records.iter().filter(|record| record["extra"]["phase"] == "final").collect();
        assert_eq!(finals.len(), 1, "exactly one final record");
        finals[0].clone()
    }

    /// Id and secret of the agent that the first start made, whose standard error is no terminal here.
    pub fn first_agent(&self) -> (String, String) {
        let text = std::fs::read_to_string(self.dir.path().join("state/first-agent.secret")).expect("it was made");
        let kept: Value = serde_json::from_str(&text).expect("JSON");
        let word = |name: &str| kept[name].as_str().expect("a word").to_owned();
        (word("client_id"), word("client_secret"))
    }

    /// What the program printed so far, on both streams.
    pub fn log(&self) -> String {
        self.log.lock().expect("not poisoned").clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the child is ours and not yet waited for, so its number is not another's.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Waits for the program's end.
    pub async fn exit(&mut self) -> std::process::ExitStatus {
        let child = &mut self.child;
        wait_until("the program's end", || child.try_wait().expect("waited for")).await
    }
}

/// Starts a proxy and waits until it listens.
fn start(command: &mut Command, log: &Arc<Mutex<String>>) -> (Child, SocketAddr, SocketAddr) {
    let mut child = command.spawn().expect("the program starts");
    keep_reading(child.stdout.take().expect("piped"), Arc::clone(log), |_| {});
    let (told, ready) = std::sync::mpsc::channel();
    keep_reading(child.stderr.take().expect("piped"), Arc::clone(log), move |line| {
        if let Some((_, address)) = line.split_once("listening on http://") {
            let _ =
                told.send((line.starts_with("operator"), address.trim().parse::<SocketAddr>().expect("an address")));
        }
    });
    let (mut public, mut operator) = (None, None);
    while public.is_none() || operator.is_none() {
        match ready.recv_timeout(PATIENCE) {
            Ok((true, address)) => operator = Some(address),
            Ok((false, address)) => public = Some(address),
            Err(_) => panic!("the proxy did not start:\n{}", log.lock().expect("not poisoned")),
        }
    }
    (child, public.expect("seen"), operator.expect("seen"))
}

/// A listener, and what keeps its port once it is closed: bound and never listening, so that nobody else gets the port in between.
pub fn listen_and_keep() -> (TcpListener, TcpSocket) {
    let bind = |address| {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("a socket"); // two may share a port while neither listens
        socket.bind(address).expect("a free port");
        socket
    };
    let first = bind(SocketAddr::from(([127, 0, 0, 1], 0)));
    let keeper = bind(first.local_addr().expect("bound"));
    (first.listen(1024).expect("nobody else listens"), keeper)
}

/// The program, which sees nothing of this machine's environment but `PATH`.
pub fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_behavry-ollama-proxy"));
    command.args(arguments).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.stdin(Stdio::null());
    command
}

/// What a program that came to its end left behind.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end, which comes in time or fails the test.
pub async fn run_to_end(mut command: Command) -> Ended {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let (stdout, stderr) = (Arc::new(Mutex::new(String::new())), Arc::new(Mutex::new(String::new())));
    let pipes = [
        keep_reading(child.stdout.take().expect("piped"), Arc::clone(&stdout), |_| {}),
        keep_reading(child.stderr.take().expect("piped"), Arc::clone(&stderr), |_| {}),
    ];
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("waited for") {
            break status;
        }
        if began.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            panic!("the program did not end: {}", stderr.lock().expect("not poisoned"));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    for pipe in pipes {
        pipe.join().expect("the reader ends with its pipe");
    }
    let text = |of: Arc<Mutex<String>>| of.lock().expect("not poisoned").clone();
    Ended { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

impl Drop for House {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The audit's files in a folder, in order.
pub fn segments(dir: &Path) -> Vec<PathBuf> {
    let names = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    let mut segments: Vec<PathBuf> = names.filter(|name| name.extension().is_some_and(|end| end == "jsonl")).collect();
    segments.sort();
    segments
}

/// The records in a folder of segments, without the marks of the chain.
pub fn read_records(dir: &Path) -> Vec<Value> {
    let mut records: Vec<Value> = segments(dir).iter().flat_map(|segment| read_lines(segment)).collect();
    records.retain(|line| ["request", "stream_start", "final"].iter().any(|phase| line["extra"]["phase"] == *phase));
    records
}

/// Every whole line of a segment, records and marks.
pub fn read_lines(segment: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(segment).unwrap_or_default();
    // The last line may be half written at this moment.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: a line that is no JSON")))
        .collect()
}

/// Tries again what a machine under load may spoil, such as a byte within a second: `None` is a try that says nothing either way, because
/// what it needed in time did not come in time.
pub async fn until_tried<T>(what: &str, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..20 {
        if let Some(found) = attempt().await {
            return found;
        }
    }
    panic!("{what}: 20 tries, and none came to a result")
}

/// Polls for what no event tells; the pause between looks is not a measure of anything.
pub async fn wait_until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The same for a look that waits itself.
pub async fn wait_until_async<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A pipe that nobody reads would stop the program.
fn keep_reading(
    pipe: impl Read + Send + 'static,
    log: Arc<Mutex<String>>,
    mut each: impl FnMut(&str) + Send + 'static,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            each(&line);
            let mut log = log.lock().expect("not poisoned");
            log.push_str(&line);
            log.push('\n');
        }
    })
}
