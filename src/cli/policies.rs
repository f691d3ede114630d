//! `policy test` and `policy explain`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Failure;
use crate::config::Config;
use crate::identity::Caller;
use crate::policy::testing::{self, TestOutcome};
use crate::policy::{Facts, Policy, Requester};
use crate::route::{self, Route, RouteSettings};
use crate::server::assemble;
use crate::wire::{Ask, BodyRule, ask, model};

#[derive(Subcommand)]
pub enum PolicyCommand {
    /// Run the `test_*` rules of every *_test.rego in a folder
    Test {
        /// Without it: the configured policy folder, else ./policies
        dir: Option<PathBuf>,
    },
    /// Show the decision about a request, its reasons, and the input document; nothing is sent
    Explain(Explain),
}

#[derive(Args)]
pub struct Explain {
    /// Method and path as a client sends them, such as `POST /api/chat`
    #[arg(value_name = "METHOD PATH", num_args = 2)]
    request: Vec<String>,
    /// The request's JSON body
    #[arg(long, value_name = "JSON")]
    body: Option<String>,
    /// A model, where no body is given
    #[arg(long)]
    model: Option<String>,
    #[arg(long, default_value = "agent")]
    agent: String,
    /// May be repeated
    #[arg(long = "role")]
    roles: Vec<String>,
    /// May be repeated; without any: web:read and web:write
    #[arg(long = "permission")]
    permissions: Vec<String>,
    #[arg(long)]
    risk_tier: Option<String>,
    #[arg(long)]
    source_ip: Option<std::net::IpAddr>,
}

pub fn run(command: PolicyCommand, config: &Config) -> Result<(), Failure> {
    match command {
        PolicyCommand::Test { dir } => test(dir, config),
        PolicyCommand::Explain(request) => explain(request, config),
    }
}

fn test(dir: Option<PathBuf>, config: &Config) -> Result<(), Failure> {
    let configured = (!config.policy.dir.as_os_str().is_empty()).then(|| config.policy.dir.clone());
    let dir = dir.or(configured).unwrap_or_else(|| PathBuf::from("policies"));
    let report =
        testing::run(&dir, &assemble::policy_settings(config)).map_err(|e| Failure::configuration(e.to_string()))?;
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    for result in &report.results {
        match &result.outcome {
            TestOutcome::Passed => println!("PASS  {}:{}  {}", result.file, result.line, result.name),
            TestOutcome::Skipped => println!("SKIP  {}:{}  {}", result.file, result.line, result.name),
            TestOutcome::Failed => println!("FAIL  {}:{}  {}", result.file, result.line, result.name),
            TestOutcome::Error(why) => println!("ERROR {}:{}  {}: {why}", result.file, result.line, result.name),
        }
    }
    if report.results.is_empty() {
        return Err(Failure::configuration(format!("{}: no test_ rule in any *_test.rego", dir.display())));
    }
    let passed = report.count(&TestOutcome::Passed);
    println!("{passed} of {} tests passed", report.results.len() - report.count(&TestOutcome::Skipped));
    if report.passed() { Ok(()) } else { Err(Failure::runtime("a policy test failed")) }
}

fn explain(request: Explain, config: &Config) -> Result<(), Failure> {
    let policy: Policy = assemble::load_policy(config).map_err(Failure::configuration)?;
    let [method, path] = &request.request[..] else {
        return Err(Failure::usage("give a method and a path, such as `POST /api/chat`"));
    };
    let method = method.to_ascii_uppercase();
    let route = route::resolve(&method, path, &RouteSettings { drop_in: config.routes.drop_in });
    let Ok(Route::Ollama { endpoint, upstream_path, model: in_path, .. }) = route else {
        return Err(Failure::usage(format!("{method} {path} is no endpoint of Ollama that may pass")));
    };
    let mut ask = match (&request.body, endpoint.body()) {
        (Some(body), BodyRule::Json) => {
            let read = ask::read_filtered(endpoint, body.as_bytes(), assemble::filters(config));
            read.map_err(|e| Failure::usage(e.to_string()))?.ask
        }
        _ => Ask::default(),
    };
    if let Some(name) = request.model.as_ref().or(in_path.as_ref()) {
        ask.model = Some(model::parse(name).map_err(|e| Failure::usage(e.to_string()))?);
    }
    let permissions = match request.permissions.is_empty() {
        true => vec!["web:read".to_owned(), "web:write".to_owned()],
        false => request.permissions,
    };
    let caller = Caller {
        agent_id: request.agent,
        agent_name: None,
        session_id: "explain".to_owned(),
        roles: request.roles,
        permissions,
        risk_tier: request.risk_tier,
        expires_at: i64::MAX,
        issued_at: None,
    };
    let facts = Facts {
        caller: &caller,
        ask: &ask,
        targets: &[],
        endpoint,
        method: &method,
        resource: &upstream_path,
        requester: Requester::default(),
        source_ip: request.source_ip,
        now: jiff::Timestamp::now(),
    };
    let explanation = policy.explain(&facts);
    let shown = serde_json::to_string_pretty(&explanation).map_err(|e| Failure::runtime(e.to_string()))?;
    println!("{shown}");
    if let Err(missing) = caller.may(endpoint.kind()) {
        println!("before the policy: refused, since the permission {missing} is missing");
    }
    Ok(())
}
