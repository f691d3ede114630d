//! `token ..`: tokens are made, looked into and revoked, and the keys that sign them rotated.
//!
//! - [`revoke`]: `token revoke`.
//! - [`keys`]: `token keys`.

use std::io::Read;

use clap::{Args, Subcommand};

use super::Failure;
use crate::config::Config;
use crate::identity::issuer::{self, Claims};
use crate::identity::own_keys;
use crate::server::assemble;

mod keys;
mod revoke;

#[derive(Subcommand)]
pub enum TokenCommand {
    /// Sign a token with the proxy's own key, and print it alone on standard output
    Mint(Mint),
    /// Show what a token says and whether it holds; reads it from standard input if it is `-`
    Inspect {
        /// The token, or `-`: then no shell history and no process list shows it
        token: String,
    },
    /// End tokens before they expire, and cut what runs with them
    Revoke(revoke::Revoke),
    /// The proxy's own keys
    #[command(subcommand)]
    Keys(keys::KeysCommand),
}

#[derive(Args)]
pub struct Mint {
    /// Whose token it is (`sub`)
    #[arg(long, value_name = "ID")]
    agent: String,
    /// May be repeated, 8 times at most
    #[arg(long = "role", value_name = "ROLE")]
    roles: Vec<String>,
    /// May be repeated; without any: web:read and web:write
    #[arg(long = "permission", value_name = "PERMISSION")]
    permissions: Vec<String>,
    /// Life in seconds; without it the configured one
    #[arg(long = "ttl", value_name = "SECONDS")]
    ttl_s: Option<i64>,
    /// The session (`jti`); without it a new one
    #[arg(long, value_name = "ID")]
    session: Option<String>,
}

pub fn run(command: TokenCommand, config: &Config) -> Result<(), Failure> {
    match command {
        TokenCommand::Mint(mint) => print_minted(mint, config),
        TokenCommand::Inspect { token } => inspect(token, config),
        TokenCommand::Revoke(what) => revoke::run(what, config),
        TokenCommand::Keys(command) => keys::run(command, config),
    }
}

fn print_minted(mint: Mint, config: &Config) -> Result<(), Failure> {
    // A key that gives a long life has to verify as long, also once it is rotated: that is written down before the token is shown,
    // and no rotation may come in between.
    let noted_ttl_s = mint.ttl_s.filter(|_| assemble::keys::signs_with_own_keys(config));
    let failed = |e: own_keys::OwnKeysError| Failure::configuration(e.to_string());
    let alone = noted_ttl_s.map(|_| own_keys::lock(&config.state_dir)).transpose();
    let _alone = alone.map_err(|e| failed(e.into()))?;
    let issuer = assemble::keys::load(config).map_err(Failure::configuration)?.issuer.ok_or_else(|| {
        Failure::configuration(
            "no key to sign with: set identity.private_key_file, or let the control plane issue tokens",
        )
    })?;
    let permissions = match mint.permissions.is_empty() {
        true => vec!["web:read".to_owned(), "web:write".to_owned()],
        false => mint.permissions,
    };
    let claims = Claims {
        sub: mint.agent,
        roles: mint.roles,
        permissions,
        session: mint.session,
        ttl_s: mint.ttl_s,
        ..Claims::default()
    };
    let minted = issuer.mint(&claims, jiff::Timestamp::now().as_second());
    let (token, _) = minted.map_err(|e| Failure::usage(e.to_string()))?;
    if let Some(ttl_s) = noted_ttl_s {
        own_keys::note_ttl(&config.state_dir, &issuer.key().verification_key(), ttl_s).map_err(failed)?;
    }
    println!("{token}");
    Ok(())
}

fn inspect(token: String, config: &Config) -> Result<(), Failure> {
    let token = if token == "-" { piped()? } else { token };
    let verifier = assemble::keys::load_now(config).map_err(Failure::configuration)?.verifier;
    let seen = issuer::inspect(&token, Some((&verifier, jiff::Timestamp::now().as_second())));
    let holds = matches!(seen.verdict, Some(Ok(_)));
    let verdict = match &seen.verdict {
        Some(Ok(caller)) => {
            serde_json::json!({ "holds": true, "agent": caller.agent_id, "expires_at": caller.expires_at })
        }
        Some(Err(cause)) => serde_json::json!({ "holds": false, "cause": cause }),
        None => serde_json::Value::Null,
    };
    let shown = serde_json::json!({ "header": seen.header, "claims": seen.claims, "verdict": verdict });
    println!("{shown:#}");
    if holds { Ok(()) } else { Err(Failure::runtime("this token does not hold")) }
}

/// A token on standard input: then no shell history and no process list shows it.
fn piped() -> Result<String, Failure> {
    let mut piped = String::new();
    let read = std::io::stdin().take(1 << 16).read_to_string(&mut piped);
    read.map_err(|e| Failure::runtime(format!("cannot read standard input: {e}")))?;
    Ok(piped.trim().to_owned())
}
