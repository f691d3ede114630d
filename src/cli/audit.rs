//! `audit verify`, `audit export`, `audit tail`, `audit report`: what can be done with the audit without a running proxy.

use clap::Subcommand;

use super::Failure;
use crate::config::Config;

mod export;
mod report;
mod tail;
mod verify;
mod when;

#[derive(Subcommand)]
pub enum AuditCommand {
    /// Recompute every hash, and say what was changed, and what cannot be known. Exit codes: 0 it holds, 1 it does not, 2 it cannot
    /// be checked
    Verify(verify::Verify),
    /// Write a signed package of records that `behavry-verify` accepts
    Export(export::Export),
    /// Show the last records, and those to come: a table on a terminal, else JSON lines
    Tail(tail::Tail),
    /// Requests, tokens, time and denials by agent and model
    Report(report::Report),
}

/// The exit code of `audit verify` where nothing can be said.
pub const CANNOT_VERIFY: u8 = verify::CANNOT;

impl AuditCommand {
    /// A failure before the command could begin, with the exit code that the command has for that.
    pub fn cannot(&self, failure: Failure) -> Failure {
        match self {
            AuditCommand::Verify(_) => Failure { code: CANNOT_VERIFY, ..failure },
            _ => failure,
        }
    }
}

pub fn run(command: AuditCommand, config: &Config) -> Result<(), Failure> {
    match command {
        AuditCommand::Verify(command) => verify::run(&command, config),
        AuditCommand::Export(command) => export::run(command, config),
        AuditCommand::Tail(command) => tail::run(&command, config),
        AuditCommand::Report(command) => report::run(&command, config),
    }
}
