//! `agent ..`: who may fetch a token, and whose devices and API keys stand for whom.
//!
//! A running proxy makes the change itself, asked over its control socket: the file keeps its owner, and the change is in force when
//! the command returns. Where none runs, the command edits the file. Secrets are made here, shown once, and only their hash goes on.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Failure;
use crate::config::Config;
use crate::control::{self, Request};
use crate::identity::agents::edit::{self, Change};
use crate::identity::agents::{Agent, Agents, State};
use crate::identity::api_key::{self, ApiKeyHash};
use crate::identity::device::DeviceKey;
use crate::identity::secret::{Secret, SecretHash};
use crate::server::commands::edit_fault;

#[derive(Subcommand)]
pub enum AgentCommand {
    /// Add an agent, and show its secret, once
    Add(Add),
    /// Show the agents; never their secrets or hashes
    List {
        #[command(flatten)]
        form: Form,
    },
    /// Give an agent no more tokens
    Suspend { id: String },
    /// Give a suspended agent tokens again
    Resume { id: String },
    /// Make another secret, and show it, once; the old one is worth nothing from then on
    RotateSecret {
        id: String,
        #[command(flatten)]
        form: Form,
    },
    /// Remove an agent; it does not ask
    Remove { id: String },
    /// Tie a device to an agent: with OLLAMA_AUTH=1 Ollama's own client signs with its key
    AddKey {
        id: String,
        /// The line of the device's ~/.ollama/id_ed25519.pub
        #[arg(required = true, value_name = "ssh-ed25519 ..")]
        key: Vec<String>,
    },
    /// Take a device away from its agent
    RemoveKey {
        id: String,
        /// Its fingerprint (SHA256:..), or its line
        #[arg(required = true)]
        key: Vec<String>,
    },
    /// Make a static API key for a client that cannot fetch a token, and show it, once
    AddApiKey {
        id: String,
        /// A name for people, which remove-api-key takes
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        form: Form,
    },
    /// Remove an API key
    RemoveApiKey {
        id: String,
        /// Its name, or its session as records show it (key:..)
        name: String,
    },
}

#[derive(Args)]
pub struct Add {
    /// Its client_id, and `sub` of its tokens
    id: String,
    /// A name for people
    #[arg(long)]
    name: Option<String>,
    /// May be repeated, 8 times at most
    #[arg(long = "role", value_name = "ROLE")]
    roles: Vec<String>,
    /// May be repeated; without any: web:read and web:write
    #[arg(long = "permission", value_name = "PERMISSION")]
    permissions: Vec<String>,
    /// A word for policies, such as medium
    #[arg(long, value_name = "TIER")]
    risk_tier: Option<String>,
    #[command(flatten)]
    form: Form,
}

#[derive(Args)]
pub struct Form {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(command: AgentCommand, config: &Config) -> Result<(), Failure> {
    match command {
        AgentCommand::Add(add) => {
            let (id, json) = (add.id.clone(), add.form.json);
            let secret = Secret::random();
            let secret_hash = Some(SecretHash::of(&secret));
            change(config, Change::Add { agent: agent(add), secret_hash })?;
            show_secret(&id, &secret, json, "is added");
        }
        AgentCommand::List { form } => list(config, form.json)?,
        AgentCommand::Suspend { id } => {
            change(config, Change::State { id: id.clone(), state: State::Suspended })?;
            println!("agent {id} is suspended");
        }
        AgentCommand::Resume { id } => {
            change(config, Change::State { id: id.clone(), state: State::Active })?;
            println!("agent {id} is active");
        }
        AgentCommand::RotateSecret { id, form } => {
            let secret = Secret::random();
            change(config, Change::Secret { id: id.clone(), secret_hash: SecretHash::of(&secret) })?;
            show_secret(&id, &secret, form.json, "has another secret");
        }
        AgentCommand::Remove { id } => {
            change(config, Change::Remove { id: id.clone() })?;
            println!("agent {id} is removed");
        }
        AgentCommand::AddKey { id, key } => {
            let line = key.join(" ");
            change(config, Change::AddKey { id: id.clone(), line: line.clone() })?;
            let fingerprint = DeviceKey::parse(&line).map(|key| key.fingerprint()).unwrap_or_default();
            println!("the device {fingerprint} stands for agent {id}");
        }
        AgentCommand::RemoveKey { id, key } => {
            change(config, Change::RemoveKey { id: id.clone(), key: key.join(" ") })?;
            println!("the device stands for agent {id} no more");
        }
        AgentCommand::AddApiKey { id, name, form } => add_api_key(config, &id, name, form.json)?,
        AgentCommand::RemoveApiKey { id, name } => {
            change(config, Change::RemoveApiKey { id: id.clone(), name })?;
            println!("the API key of agent {id} is removed");
        }
    }
    Ok(())
}

fn add_api_key(config: &Config, id: &str, name: Option<String>, as_json: bool) -> Result<(), Failure> {
    let key = api_key::random();
    let hash = ApiKeyHash::of(key.expose());
    // Without a name it has the one that records give it, so that it can be told from others.
    let name = name.unwrap_or_else(|| hash.session_id());
    change(config, Change::AddApiKey { id: id.to_owned(), name: name.clone(), sha256: hash.to_hex() })?;
    if as_json {
        println!(
            "{}",
            json!({ "agent_id": id, "name": name, "session_id": hash.session_id(), "api_key": key.expose() })
        );
    } else {
        println!("agent {id} has another API key; it is shown only this once:");
        println!("  name     {name}");
        println!("  api_key  {}", key.expose());
    }
    if !config.identity.api_keys {
        eprintln!("API keys are off in this configuration: set identity.api_keys = true, and restart the proxy");
    }
    Ok(())
}

/// Makes one change: by the running proxy, or where none answers, here.
pub(super) fn change(config: &Config, change: Change) -> Result<(), Failure> {
    let request = Request::AgentChange(change);
    let nobody = match control::ask(&config.state_dir, &request) {
        Ok(_) => return Ok(()),
        Err(error) if error.is_nobody_there() => error,
        Err(error) => return Err(error.into()),
    };
    let Request::AgentChange(change) = request else { return Ok(()) };
    let file = &config.identity.agents_file;
    edit::change_file(file, &change).map_err(edit_fault)?;
    // Said, since a proxy with another state_dir may be the one that was meant.
    eprintln!("{nobody}\n{} was edited; a proxy reads it within a second, or when it starts", file.display());
    Ok(())
}

/// What the running proxy has in force, else what the file says.
fn agents(config: &Config) -> Result<Vec<Agent>, Failure> {
    match control::ask(&config.state_dir, &Request::AgentList) {
        Ok(mut answer) => serde_json::from_value(answer["agents"].take())
            .map_err(|_| Failure::runtime("the running proxy's answer is of another version; restart it")),
        Err(error) if error.is_nobody_there() => {
            let file = &config.identity.agents_file;
            let agents = Agents::load(file).map_err(|error| Failure::configuration(error.to_string()))?;
            Ok(agents.iter().cloned().collect())
        }
        Err(error) => Err(error.into()),
    }
}

fn agent(add: Add) -> Agent {
    let permissions = match add.permissions.is_empty() {
        true => vec!["web:read".to_owned(), "web:write".to_owned()],
        false => add.permissions,
    };
    Agent { id: add.id, name: add.name, roles: add.roles, permissions, risk_tier: add.risk_tier, state: State::Active }
}

fn show_secret(id: &str, secret: &Secret, as_json: bool, what: &str) {
    if as_json {
        println!("{}", json!({ "client_id": id, "client_secret": secret.expose() }));
        return;
    }
    println!("agent {id} {what}; its secret is shown only this once:");
    println!("  client_id      {id}");
    println!("  client_secret  {}", secret.expose());
}

fn list(config: &Config, as_json: bool) -> Result<(), Failure> {
    let agents = agents(config)?;
    if as_json {
        println!("{:#}", Value::from_iter(agents.iter().map(|agent| json!(agent))));
        return Ok(());
    }
    let mut rows = vec![["ID", "STATE", "ROLES", "PERMISSIONS", "RISK TIER", "NAME"].map(str::to_owned)];
    rows.extend(agents.into_iter().map(|agent| {
        let (tier, name) = (agent.risk_tier.unwrap_or_default(), agent.name.unwrap_or_default());
        [agent.id, agent.state.as_str().to_owned(), agent.roles.join(","), agent.permissions.join(","), tier, name]
    }));
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default())
        .collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    Ok(())
}
