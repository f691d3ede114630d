//! `audit export`.

use std::fs::OpenOptions;
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey;

use super::{Failure, when};
use crate::config::Config;
use crate::identity::private_file::{self, OTHERS_CAN_READ};
use crate::ledger::evidence::{self, Selection};
use crate::ledger::record::Moment;

#[derive(Args)]
pub struct Export {
    /// Where the package goes; a file that is there is not overwritten
    #[arg(long, value_name = "FILE.zip")]
    package: PathBuf,
    /// Where the public key goes that the package is checked with, as `behavry-verify --trust-anchor` wants it
    #[arg(long, value_name = "FILE.json")]
    trust_anchor: Option<PathBuf>,
    /// Records of this date or time and later
    #[arg(long, value_name = "TIME", value_parser = when::moment)]
    from: Option<Moment>,
    /// Records before this date or time
    #[arg(long, value_name = "TIME", value_parser = when::moment)]
    to: Option<Moment>,
    /// Records of this agent only
    #[arg(long, value_name = "ID")]
    agent: Option<String>,
}

pub fn run(command: Export, config: &Config) -> Result<(), Failure> {
    let path = config.state_dir.join("audit-key.pem");
    let key = private_file::read(&path, OTHERS_CAN_READ).map_err(|e| Failure::configuration(e.to_string()))?;
    let key = key.as_deref().and_then(|pem| std::str::from_utf8(pem).ok());
    let key = key.and_then(|pem| SigningKey::from_pkcs8_pem(pem).ok()).ok_or_else(|| {
        Failure::configuration(format!("{}: no key to sign with; the first start makes it there", path.display()))
    })?;
    let selection = Selection { from: command.from, to: command.to, agent: command.agent };
    let mut package = Vec::new();
    let packed = evidence::package(&config.audit.dir, &selection, &key, &mut package)
        .map_err(|e| Failure::runtime(e.to_string()))?;
    create(&command.package, &package)?;
    if let Some(path) = &command.trust_anchor {
        create(path, format!("{:#}\n", evidence::trust_anchor(&key)).as_bytes())?;
    }
    println!(
        "{}: {} events of {} agents, Merkle root {}",
        command.package.display(),
        packed.events,
        packed.agents,
        packed.root_hash
    );
    if packed.losses > 0 {
        eprintln!("{} places of the audit could not be read; `audit verify` says which", packed.losses);
    }
    Ok(())
}

/// A record says who did what: it is the owner's to pass on.
fn create(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|file| {
        let mut file = BufWriter::new(file);
        file.write_all(bytes)?;
        file.flush()
    });
    written.map_err(|e| Failure::runtime(format!("{}: {e}", path.display())))
}
