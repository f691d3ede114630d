//! A proxy with an agents file of its own, which a test can replace, for the tests of device keys and API keys.

use std::path::PathBuf;

use crate::client::{Reply, Request};
use crate::house::{House, PATIENCE, Plan};

/// More than the tests' refusals in a second, so that each has a record of its own.
const NO_FOLDING: &str = "[audit]\nrefusals_per_second = 100000\n[policy]\nreload_s = 1\n";

pub struct Keyholders {
    pub house: House,
    pub agents: PathBuf,
    _dir: tempfile::TempDir,
}

impl Keyholders {
    /// `agents`: the agents file. `config`: more lines for the configuration.
    pub async fn open(agents: &str, config: &str) -> Keyholders {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("agents.toml");
        std::fs::write(&path, agents).expect("written");
        let house = House::with(Plan {
            config: format!("{NO_FOLDING}{config}"),
            env: vec![("BEHAVRY_AGENTS_FILE".to_owned(), path.display().to_string())],
            ..Plan::default()
        })
        .await;
        Keyholders { house, agents: path, _dir: dir }
    }

    /// As an editor does: another file under the same name.
    pub fn replace_agents(&self, text: &str) {
        let draft = self.agents.with_extension("draft");
        std::fs::write(&draft, text).expect("written");
        std::fs::rename(&draft, &self.agents).expect("replaced");
    }

    /// Asks until the status is the one that a reload brings.
    pub async fn eventually(&self, ask: impl Fn() -> Request, status: u16) -> Reply {
        let began = std::time::Instant::now();
        loop {
            let reply = self.house.send(ask()).await;
            if reply.status == status {
                return reply;
            }
            assert!(began.elapsed() < PATIENCE, "the change was not taken:\n{}", self.house.log());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    /// Everything that the proxy wrote: log, audit, metrics.
    pub async fn written(&self) -> String {
        let audit = self.house.audit_text();
        self.house.log() + &audit + &self.house.metrics().await
    }
}
