//! `audit verify`, `audit export`, `audit tail`, `audit report`: what can be done with the audit without a running proxy.

use clap::Subcommand;

use super::Failure;
use crate::config::Config;

mod verify;

#[derive(Subcommand)]
pub enum AuditCommand {
    /// Recompute every hash, and say what was changed, and what cannot be known. Exit codes: 0 it holds, 1 it does not, 2 it cannot
    /// be checked
    Verify(verify::Verify),
}

/// The exit code of `audit verify` where nothing can be said.
pub const CANNOT_VERIFY: u8 = verify::CANNOT;

impl AuditCommand {
    /// A failure before the command could begin, with the exit code that the command has for that.
    pub fn cannot(&self, failure: Failure) -> Failure {
        match self {
            AuditCommand::Verify(_) => Failure { code: CANNOT_VERIFY, ..failure },
        }
    }
}

pub fn run(command: AuditCommand, config: &Config) -> Result<(), Failure> {
    match command {
        AuditCommand::Verify(command) => verify::run(&command, config),
    }
}
