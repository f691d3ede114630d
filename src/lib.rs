//! behavry-ollama-proxy: a gateway in front of Ollama.
//!
//! ```text
//! client -> (door) received -> authenticated -> inspected -> authorized -> placed -> streaming -> settled
//!            route        identity      intake+wire    policy      upstream   wire::meter   ledger
//!            |-------------- request_filter: admit() -------------|upstream_peer|response_*| logging
//!            any step may end early with a Refusal -----------------------------------------> settled
//! ```
//!
//! The modules in reading order. `identity`, `wire`, `policy` and `ledger` know nothing of Pingora; `ARCHITECTURE.md` says which
//! way dependencies run, and a test holds it.

pub mod cli;
pub mod config;
pub mod control;
pub mod server;

pub mod door;
pub mod proxy;

pub mod control_plane;
pub mod exchange;
pub mod live;
pub mod memory;
pub mod models;
pub mod remote_keys;
pub mod site;
pub mod snapshot;

pub mod identity;
pub mod intake;
pub mod ledger;
pub mod mirror;
pub mod outbound;
pub mod policy;
pub mod refusal;
pub mod route;
pub mod sinks;
pub mod upstream;
pub mod wire;

pub mod operator;
pub mod simulator;
