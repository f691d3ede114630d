//! `token mint` and `token inspect`.

use std::io::Read;

use clap::{Args, Subcommand};

use super::Failure;
use crate::config::Config;
use crate::identity::issuer::{self, Claims};
use crate::server::assemble;

#[derive(Subcommand)]
pub enum TokenCommand {
    /// Sign a token with the proxy's own key, and print it alone on standard output
    Mint(Mint),
    /// Show what a token says and whether it holds; reads it from standard input if it is `-`
    Inspect {
        /// The token, or `-`: then no shell history and no process list shows it
        token: String,
    },
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
    let now_s = jiff::Timestamp::now().as_second();
    match command {
        TokenCommand::Mint(mint) => {
            let (_, issuer) = assemble::keys(config).map_err(Failure::configuration)?;
            let issuer = issuer.ok_or_else(|| {
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
            let (token, _) = issuer.mint(&claims, now_s).map_err(|e| Failure::usage(e.to_string()))?;
            println!("{token}");
        }
        TokenCommand::Inspect { token } => {
            let token = match token.as_str() {
                "-" => {
                    let mut piped = String::new();
                    let read = std::io::stdin().take(1 << 16).read_to_string(&mut piped);
                    read.map_err(|e| Failure::runtime(format!("cannot read standard input: {e}")))?;
                    piped.trim().to_owned()
                }
                _ => token,
            };
            let (verifier, _) = assemble::keys_now(config).map_err(Failure::configuration)?;
            let seen = issuer::inspect(&token, Some((&verifier, now_s)));
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
            if !holds {
                return Err(Failure::runtime("this token does not hold"));
            }
        }
    }
    Ok(())
}
