//! The first start makes an agent: a proxy without any is of no use to a newcomer.

use std::io::IsTerminal;
use std::path::Path;

use serde_json::json;

use super::Failure;
use crate::config::Config;
use crate::identity::agents::{Agents, DEMO_AGENT_ID};
use crate::identity::private_file;
use crate::identity::secret::Secret;
use crate::server::assemble;

/// In the state folder: what `agent add --json` would have printed.
const SECRET_FILE: &str = "first-agent.secret";

/// Makes the agents file with one agent where there is none, and shows its secret once.
///
/// Nothing is made where the configuration names somebody else's keys: then tokens come from elsewhere.
pub fn make_agent(config: &Config) -> Result<(), Failure> {
    let file = &config.identity.agents_file;
    if file.exists() || config.identity.is_foreign() {
        return Ok(());
    }
    // Not by a start that fails: the secret would be shown to nobody.
    assemble::load_policy(config).map_err(Failure::configuration)?;
    assemble::keys::load(config).map_err(Failure::configuration)?;
    let (_, secret) = Agents::create_with_demo(file).map_err(|e| Failure::configuration(e.to_string()))?;
    // What goes to a terminal is seen by who sits there; anything else (the journal, a log collector) keeps what it gets.
    if std::io::stderr().is_terminal() {
        eprintln!("a first agent was made in {}; its secret is shown only this once:", file.display());
        eprintln!("  client_id      {DEMO_AGENT_ID}");
        eprintln!("  client_secret  {}", secret.expose());
        return Ok(());
    }
    let kept = config.state_dir.join(SECRET_FILE);
    match keep(&kept, &secret) {
        Ok(()) => eprintln!(
            "a first agent was made in {}; its id and secret are in {}, for its owner alone: read that file, then remove it",
            file.display(),
            kept.display()
        ),
        // No reason to stop: another secret is one command away.
        Err(why) => eprintln!(
            "a first agent was made in {}; its secret could not be kept ({why}): run `behavry-ollama-proxy agent \
             rotate-secret {DEMO_AGENT_ID}` for another one",
            file.display()
        ),
    }
    Ok(())
}

/// 0600. One of an earlier agent, whose file is gone, is worth nothing any more; its mode, which somebody may have changed, goes with it.
fn keep(path: &Path, secret: &Secret) -> Result<(), String> {
    let text = format!("{}\n", json!({ "client_id": DEMO_AGENT_ID, "client_secret": secret.expose() }));
    let _ = std::fs::remove_file(path); // mostly there is none
    match private_file::create(path, text.as_bytes()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("{}: something is there that cannot be removed", path.display())),
        Err(error) => Err(error.to_string()),
    }
}
