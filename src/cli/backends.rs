//! `backend ..`: the backends of the proxy that runs on the same state folder.

use clap::Subcommand;
use serde_json::Value;

use super::Failure;
use crate::config::Config;
use crate::control::{self, Request};

#[derive(Subcommand)]
pub(super) enum BackendCommand {
    /// Show the backends of the running proxy, and how each is
    List,
    /// Give a backend no new requests; what runs on it goes on. Until undrain, or the proxy's next start
    Drain {
        /// As in `backend list`
        name: String,
    },
    /// Give it requests again
    Undrain {
        /// As in `backend list`
        name: String,
    },
}

pub(super) fn run(command: BackendCommand, config: &Config) -> Result<(), Failure> {
    match command {
        BackendCommand::List => {
            let answer = control::ask(&config.state_dir, &Request::BackendList)?;
            for backend in answer["backends"].as_array().into_iter().flatten() {
                println!("{}", in_words(backend));
            }
        }
        BackendCommand::Drain { name } => {
            let answer = control::ask(&config.state_dir, &Request::BackendDrain { name: name.clone() })?;
            println!("backend {name} gets no new requests; {} run on it", answer["running"]);
        }
        BackendCommand::Undrain { name } => {
            control::ask(&config.state_dir, &Request::BackendUndrain { name: name.clone() })?;
            println!("backend {name} gets requests again");
        }
    }
    Ok(())
}

fn in_words(backend: &Value) -> String {
    let word = |key: &str| backend[key].as_str().unwrap_or_default().to_owned();
    let up = if backend["up"] == true { "up" } else { "down" };
    let drained = if backend["drained"] == true { ", drained" } else { "" };
    let breaker = match word("breaker").as_str() {
        "closed" => String::new(),
        state => format!(", breaker {state}"),
    };
    let models = backend["models"].as_object().into_iter().flatten();
    let models: String =
        models.map(|(model, state)| format!(", {model} {}", state.as_str().unwrap_or_default())).collect();
    format!(
        "{}  {}  {up}{drained}{breaker}{models}, {} running, tier {}, weight {}",
        word("name"),
        word("url"),
        backend["in_flight"],
        backend["tier"],
        backend["weight"]
    )
}
