//! `token revoke`: by the running proxy, so that what runs is cut when the command returns; where none runs, in the file.

use clap::Args;
use jiff::Timestamp;

use crate::cli::Failure;
use crate::config::Config;
use crate::control::{self, Request};
use crate::identity::cause;
use crate::identity::revocations::Subject;
use crate::identity::revocations::edit::{self, Revocation};
use crate::server::assemble;
use crate::server::commands::revocation_fault;

#[derive(Args)]
#[command(group(clap::ArgGroup::new("subject").required(true).args(["token", "session", "agent"])))]
pub struct Revoke {
    /// `-`: read a token from standard input, and revoke its session
    #[arg(value_name = "-", value_parser = ["-"])]
    token: Option<String>,
    /// Every token of this session (`jti`), for good
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// The tokens that this agent (`sub`) has by now; it may fetch new ones unless it is suspended
    #[arg(long, value_name = "ID")]
    agent: Option<String>,
    /// Why, for whoever reads the list; clients do not see it
    #[arg(long, value_name = "WORDS")]
    reason: Option<String>,
}

pub fn run(what: Revoke, config: &Config) -> Result<(), Failure> {
    let subject = match (what.session, what.agent) {
        (Some(session), _) => Subject::Session(session),
        (None, Some(agent)) => Subject::Agent(agent),
        (None, None) => Subject::Session(session_of(&super::piped()?, config)?),
    };
    let said = match &subject {
        Subject::Session(id) => format!("session {id} is revoked"),
        Subject::Agent(id) => format!("the tokens that agent {id} has by now are revoked"),
    };
    let ours = assemble::keys::signs_with_own_keys(config);
    let request = Request::Revoke(Revocation { subject, reason: what.reason, ours });
    match control::ask(&config.state_dir, &request) {
        Ok(_) => {}
        Err(nobody) if nobody.is_nobody_there() => {
            let Request::Revoke(revocation) = request else { return Ok(()) };
            let file = &config.identity.revocations_file;
            edit::add_to_file(file, &revocation, Timestamp::now()).map_err(revocation_fault)?;
            // Said, since a proxy with another state_dir may be the one that was meant.
            eprintln!("{nobody}\n{} was edited; a proxy reads it within a second, or when it starts", file.display());
        }
        Err(error) => return Err(error.into()),
    }
    println!("{said}");
    Ok(())
}

/// Only a token that holds: of any other, nothing that it says can be believed, and nothing has to be revoked.
fn session_of(token: &str, config: &Config) -> Result<String, Failure> {
    let verifier = assemble::keys::load_now(config).map_err(Failure::configuration)?.verifier;
    match verifier.verify_token(token, Timestamp::now().as_second()) {
        Ok(caller) => Ok(caller.session_id.clone()),
        Err(cause::EXPIRED) => Err(Failure::runtime("this token has expired: nothing is left to revoke")),
        Err(cause) => Err(Failure::runtime(format!(
            "this token does not hold ({cause}), and opens nothing; to revoke a session all the same, name it with --session"
        ))),
    }
}
