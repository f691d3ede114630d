//! behavry-ollama-proxy: a gateway in front of Ollama.

pub mod wire;
pub mod identity;
pub mod refusal;
pub mod route;
pub mod config;
pub mod ledger;
pub mod simulator;
