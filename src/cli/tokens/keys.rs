//! `token keys`: which keys sign and verify, and another one to sign with.

use std::time::Duration;

use clap::Subcommand;
use jiff::Timestamp;

use crate::cli::Failure;
use crate::config::Config;
use crate::control::{self, Request};
use crate::identity::Algorithm;
use crate::identity::own_keys::OwnKeys;
use crate::identity::own_keys::rotate::{self, Plan, Rotated, Step};
use crate::server::assemble;
use crate::server::commands::{keys_are_configured, rotate_fault};

/// For proxies that answer no command but watch the files: several of their looks.
const FOR_WATCHERS: Duration = Duration::from_secs(1);

#[derive(Subcommand)]
pub enum KeysCommand {
    /// Show the keys that sign and verify: kid, algorithm, and until when
    List,
    /// Sign with another key; tokens of the old one hold until they end
    Rotate {
        /// RS256, ES256 or EdDSA; without it as before, or as identity.algorithm says
        #[arg(long, value_name = "ALGORITHM")]
        algorithm: Option<String>,
        /// The old keys were disclosed: all their tokens end now
        #[arg(long)]
        end_old: bool,
    },
}

pub fn run(command: KeysCommand, config: &Config) -> Result<(), Failure> {
    if !assemble::keys::signs_with_own_keys(config) {
        return Err(keys_are_configured().into());
    }
    match command {
        KeysCommand::List => list(config),
        KeysCommand::Rotate { algorithm, end_old } => rotate(config, algorithm, end_old),
    }
}

fn list(config: &Config) -> Result<(), Failure> {
    let keys = OwnKeys::reload(&config.state_dir).map_err(|e| Failure::configuration(e.to_string()))?;
    let line = |kid: Option<&str>, algorithm: Algorithm, state: &str| {
        println!("{}  {:<5}  {state}", kid.unwrap_or_default(), algorithm.as_str());
    };
    line(keys.signing.kid(), keys.signing.algorithm(), "signs");
    let now = Timestamp::now();
    for other in keys.others.iter().filter(|other| other.until > now) {
        line(other.key.kid(), other.key.algorithm(), &format!("verifies until {:.0}", other.until));
    }
    Ok(())
}

fn rotate(config: &Config, algorithm: Option<String>, end_old: bool) -> Result<(), Failure> {
    let asked: Option<Algorithm> = algorithm
        .map(|word| word.parse())
        .transpose()
        .map_err(|_| Failure::usage("--algorithm wants RS256, ES256 or EdDSA"))?;
    if asked == Some(Algorithm::Hs256) {
        return Err(Failure::usage("HS256 needs a secret that others know; --algorithm wants RS256, ES256 or EdDSA"));
    }
    let configured = config.identity.algorithm.map(assemble::keys::algorithm);
    if let (Some(asked), Some(configured)) = (asked, configured)
        && asked != configured
    {
        return Err(Failure::configuration(format!(
            "identity.algorithm is {}, and the next start would refuse a key of {}; change or remove that setting first",
            configured.as_str(),
            asked.as_str()
        )));
    }
    let plan = Plan {
        algorithm: asked.or(configured),
        ttl_s: config.identity.token_ttl.as_secs() as i64,
        leeway_s: config.identity.leeway.as_secs() as i64,
        end_old,
    };
    let rotated: Rotated = match control::ask(&config.state_dir, &Request::RotateKeys(plan)) {
        Ok(answer) => serde_json::from_value(answer)
            .map_err(|_| Failure::runtime("the running proxy's answer is of another version; restart it"))?,
        Err(nobody) if nobody.is_nobody_there() => {
            eprintln!("{nobody}\nthe keys are rotated here; a proxy reads them within a second, or when it starts");
            let wait = |step| {
                if step == Step::OldPublished {
                    std::thread::sleep(FOR_WATCHERS);
                }
                true
            };
            rotate::rotate(&config.state_dir, plan, Timestamp::now(), wait).map_err(rotate_fault)?
        }
        Err(error) => return Err(error.into()),
    };
    println!("{} signs now ({})", rotated.new_kid, rotated.algorithm.as_str());
    match rotated.until {
        Some(until) => println!("{} verifies until {until}", rotated.old_kid),
        None => println!("{} and all before it are not trusted any more", rotated.old_kid),
    }
    Ok(())
}
