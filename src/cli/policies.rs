//! `policy test` and `policy explain`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};

use super::Failure;
use crate::config::Config;
use crate::control::{self, Question, Request};
use crate::policy::testing::{self, TestOutcome};
use crate::policy::{Explanation, Policy};
use crate::route::RouteSettings;
use crate::server::assemble;
use crate::server::explain::Case;

#[derive(Subcommand)]
pub enum PolicyCommand {
    /// Run the `test_*` rules of every *_test.rego in a folder
    Test {
        /// Without it: the configured policy folder, else ./policies
        dir: Option<PathBuf>,
    },
    /// Show the decision about a request, its reasons and the input document, and where the running proxy would send it; nothing is sent
    Explain(Box<Explain>),
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
    /// interactive, default or batch, as in x-behavry-priority
    #[arg(long)]
    priority: Option<String>,
    /// The backend that the request names in x-behavry-backend
    #[arg(long, value_name = "BACKEND")]
    on: Option<String>,
}

pub fn run(command: PolicyCommand, config: &Config) -> Result<(), Failure> {
    match command {
        PolicyCommand::Test { dir } => test(dir, config),
        PolicyCommand::Explain(request) => explain(*request, config),
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

/// A decision, and what the running proxy says of the backend.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    decision: Explanation,
    placement: Value,
}

fn explain(request: Explain, config: &Config) -> Result<(), Failure> {
    let policy: Policy = assemble::load_policy(config).map_err(Failure::configuration)?;
    let models = assemble::models(config).map_err(Failure::configuration)?;
    let [method, path] = &request.request[..] else {
        return Err(Failure::usage("give a method and a path, such as `POST /api/chat`"));
    };
    let permissions = match request.permissions.is_empty() {
        true => vec!["web:read".to_owned(), "web:write".to_owned()],
        false => request.permissions,
    };
    let question = || Question {
        method: method.clone(),
        path: path.clone(),
        body: request.body.clone(),
        model: request.model.clone(),
        agent: request.agent.clone(),
        roles: request.roles.clone(),
        permissions: permissions.clone(),
        risk_tier: request.risk_tier.clone(),
        source_ip: request.source_ip,
        priority: request.priority.clone(),
        backend: request.on.clone(),
    };
    let routes = RouteSettings { drop_in: config.routes.drop_in };
    let case = Case::read(question(), &routes, assemble::filters(config))?;
    let targets = models.targets_for(case.endpoint(), case.ask());
    let decision = policy.explain(&case.facts(&targets));
    // What is in each memory and what waits only the proxy knows that runs.
    let placement = control::ask(&config.state_dir, &Request::Explain(question()));
    let placement = placement.unwrap_or_else(|e| json!({ "outcome": "unknown", "detail": e.to_string() }));
    let shown = serde_json::to_string_pretty(&Shown { decision, placement });
    println!("{}", shown.map_err(|e| Failure::runtime(e.to_string()))?);
    if let Some(missing) = case.lacks() {
        println!("before the policy: refused, since the permission {missing} is missing");
    }
    Ok(())
}
