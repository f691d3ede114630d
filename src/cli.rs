//! The command line. Exit codes: 0 ok, 64 usage, 78 configuration, 1 anything else; `audit verify` has its own.
//!
//! - [`agents`]: `agent ..`.
//! - [`audit`]: `audit verify`, `audit export`, `audit tail`, `audit report`.
//! - [`backends`]: `backend list`, `backend drain`, `backend undrain`.
//! - [`demo`]: a proxy, a simulator if no Ollama answers, two requests, and lines to paste.
//! - [`first_start`]: an agent for a newcomer, and where its secret goes.
//! - [`log_lines`]: which lines reach standard error.
//! - [`policies`]: `policy test`, `policy explain`.
//! - [`tokens`]: `token mint`, `token inspect`, `token revoke`, `token keys`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::config::{Config, Flags, process_env};
use crate::control::{self, AskError, Fault, FaultKind};
use crate::server::{self, ServerError, Started, assemble};
use crate::simulator::{self, SimulatorOptions};

mod agents;
mod audit;
mod backends;
mod demo;
mod first_start;
mod log_lines;
mod policies;
mod tokens;

const USAGE: u8 = 64;
const CONFIGURATION: u8 = 78;
const FAILURE: u8 = 1;

/// A gateway in front of Ollama: identity, policy, streaming, token counts and an audit trail without content.
#[derive(Parser)]
#[command(name = "behavry-ollama-proxy", version)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Command,
}

/// Settings that win over the environment and the file.
#[derive(Args)]
struct Settings {
    /// The configuration file; conf/proxy.toml lists every key
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of the public listener
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Address of the operator's listener
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    operator_listen: Option<String>,
    /// URL of Ollama; several are separated by commas
    #[arg(long, global = true, value_name = "URL,..")]
    backend: Option<String>,
    /// Folder for keys, agents and the audit
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Folder with the .rego files
    #[arg(long, global = true, value_name = "DIR")]
    policy_dir: Option<PathBuf>,
    /// Folder of the audit files
    #[arg(long, global = true, value_name = "DIR")]
    audit_dir: Option<PathBuf>,
    /// File with the agents that may have a token
    #[arg(long, global = true, value_name = "FILE")]
    agents_file: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT
    Serve,
    /// Serve, and show what it does: a simulator if no Ollama answers, two requests, their records, and lines to paste
    Demo,
    /// Check the configuration, the keys and the policy, and show the settings in force
    Check,
    /// Let the running proxy end as SIGTERM does: what runs may finish, nothing new begins
    Drain,
    /// Let the running proxy read policy, agents, revocations and its own keys again, now
    Reload,
    /// A stand-in Ollama that can be told to misbehave
    Simulate(SimulateArgs),
    /// Test and explain policies
    #[command(subcommand)]
    Policy(policies::PolicyCommand),
    /// Make, read and revoke tokens, and rotate the keys that sign them
    #[command(subcommand)]
    Token(tokens::TokenCommand),
    /// Say who may fetch a token
    #[command(subcommand)]
    Agent(agents::AgentCommand),
    /// Show the backends, and take one out of service and back
    #[command(subcommand)]
    Backend(backends::BackendCommand),
    /// Check, export, follow and count the audit
    #[command(subcommand)]
    Audit(audit::AuditCommand),
}

#[derive(Args)]
struct SimulateArgs {
    #[command(flatten)]
    options: SimulatorOptions,
}

/// Why a command failed: the words for standard error, and the exit code.
struct Failure {
    code: u8,
    what: String,
}

impl Failure {
    fn configuration(what: impl Into<String>) -> Failure {
        Failure { code: CONFIGURATION, what: what.into() }
    }

    fn runtime(what: impl Into<String>) -> Failure {
        Failure { code: FAILURE, what: what.into() }
    }

    fn usage(what: impl Into<String>) -> Failure {
        Failure { code: USAGE, what: what.into() }
    }
}

impl From<ServerError> for Failure {
    fn from(e: ServerError) -> Failure {
        match e {
            ServerError::Configuration(what) => Failure::configuration(what),
            ServerError::Runtime(what) => Failure::runtime(what),
        }
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        match fault.kind {
            FaultKind::Usage => Failure::usage(fault.what),
            FaultKind::Configuration => Failure::configuration(fault.what),
            FaultKind::Failure => Failure::runtime(fault.what),
        }
    }
}

impl From<AskError> for Failure {
    fn from(error: AskError) -> Failure {
        match error {
            AskError::Refused(fault) => fault.into(),
            other => Failure::runtime(other.to_string()),
        }
    }
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print(); // a closed terminal: the exit code still says it
            return if e.use_stderr() { ExitCode::from(usage_code()) } else { ExitCode::SUCCESS };
        }
    };
    log_lines::start();
    shut_up_panics();
    ignore_size_signal();
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("behavry-ollama-proxy: {}", failure.what);
            ExitCode::from(failure.code)
        }
    }
}

/// A command line that is wrong has no command to ask, and `audit verify` promises a code of its own.
fn usage_code() -> u8 {
    let guessed = Cli::command().ignore_errors(true).try_get_matches().ok();
    let audit = guessed.as_ref().and_then(|matches| matches.subcommand_matches("audit"));
    match audit.and_then(|matches| matches.subcommand_name()) {
        Some("verify") => audit::CANNOT_VERIFY,
        _ => USAGE,
    }
}

fn execute(cli: Cli) -> Result<(), Failure> {
    let Cli { settings, command } = cli;
    // The simulator is no part of the proxy: `--listen` is its own address there.
    if let Command::Simulate(mut args) = command {
        if let Some(listen) = &settings.listen {
            let address: std::net::SocketAddr =
                listen.parse().map_err(|_| Failure::usage("--listen wants ADDRESS:PORT, such as 127.0.0.1:11434"))?;
            (args.options.host, args.options.port) = (address.ip(), address.port());
        }
        let told =
            simulator::run_blocking(args.options, |address| eprintln!("simulator listening on http://{address}"));
        return match told {
            Ok(never) => match never {},
            Err(e) => Err(Failure::runtime(format!("the simulator cannot listen: {e}"))),
        };
    }
    if !matches!(command, Command::Serve | Command::Demo) {
        end_with_the_reader();
    }
    let config = load(&settings).map_err(|failure| match &command {
        Command::Audit(command) => command.cannot(failure),
        _ => failure,
    })?;
    match command {
        Command::Serve => serve(config),
        Command::Demo => demo::run(config),
        Command::Check => check(&config),
        Command::Policy(command) => policies::run(command, &config),
        Command::Token(command) => tokens::run(command, &config),
        Command::Agent(command) => agents::run(command, &config),
        Command::Drain => drain(&config),
        Command::Backend(command) => backends::run(command, &config),
        Command::Reload => reload(&config),
        Command::Audit(command) => audit::run(command, &config),
        Command::Simulate(_) => Ok(()), // answered above
    }
}

fn load(settings: &Settings) -> Result<Config, Failure> {
    let flags = Flags {
        config: settings.config.clone(),
        listen: settings.listen.clone(),
        operator_listen: settings.operator_listen.clone(),
        backend: settings.backend.clone(),
        state_dir: settings.state_dir.clone(),
        policy_dir: settings.policy_dir.clone(),
        audit_dir: settings.audit_dir.clone(),
        agents_file: settings.agents_file.clone(),
    };
    let config = Config::load(&flags, &process_env).map_err(|e| Failure::configuration(e.to_string()))?;
    for warning in config.warnings() {
        log::warn!("{warning}");
    }
    Ok(config)
}

fn serve(config: Config) -> Result<(), Failure> {
    first_start::make_agent(&config)?;
    for line in config.effective().lines() {
        log::debug!("{line}");
    }
    for backend in &config.backend {
        log::info!("backend {} at {}", backend.name, backend.url);
    }
    let runtime = server::runtime(&config)?;
    let served = runtime.block_on(server::serve(config, |started| announce(&started)));
    // What still runs was cut; a task that hangs in somebody's socket is not waited for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(served?)
}

/// One line per listener on standard error, for people and for scripts that wait for them.
fn announce(started: &Started) {
    eprintln!("listening on http://{}", started.public);
    eprintln!("operator listening on http://{}", started.operator);
}

fn check(config: &Config) -> Result<(), Failure> {
    println!("{}", config.effective().trim_end());
    let snapshot = assemble::snapshot(config).map_err(Failure::configuration)?;
    assemble::operator_gate(config).map_err(Failure::configuration)?;
    assemble::sinks(config).map_err(Failure::configuration)?;
    assemble::models(config).map_err(Failure::configuration)?;
    assemble::pool(config).map_err(Failure::configuration)?;
    // A CA file at fault is the configuration's; a URL that is down is not.
    if config.identity.jwks_url.is_some() || config.identity.token_url.is_some() {
        assemble::outbound(config).map_err(Failure::configuration)?;
    }
    assemble::keys::load_now(config).map_err(Failure::runtime)?;
    println!("\n# policy revision {}, {} agents", snapshot.policy.revision(), snapshot.agents.len());
    println!("# everything that can be checked without serving is in order");
    Ok(())
}

fn drain(config: &Config) -> Result<(), Failure> {
    let answer = control::ask(&config.state_dir, &control::Request::Drain)?;
    println!("the proxy drains: {} requests run, and have {} s to finish", answer["running"], answer["within_s"]);
    Ok(())
}

fn reload(config: &Config) -> Result<(), Failure> {
    let answer = control::ask(&config.state_dir, &control::Request::Reload)?;
    println!("in force: policy revision {}, {} agents", answer["policy_revision"], answer["agents"]);
    Ok(())
}

/// A panic's message may quote what it tripped over. Only the place is printed.
fn shut_up_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
        eprintln!("behavry-ollama-proxy: a fault of ours{place}; please report it");
    }));
}

/// `check | head -1`: a reader that has enough ends the command, and is no fault of ours. Whoever serves must not die of it.
fn end_with_the_reader() {
    // SAFETY: SIG_DFL installs no code, and no thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Past `RLIMIT_FSIZE` a write would kill the process; ignored, it fails with EFBIG, and the audit says so.
fn ignore_size_signal() {
    // SAFETY: SIG_IGN installs no code, and no thread runs yet.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
