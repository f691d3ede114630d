//! What a simulator is told at its start: how it is called, which models it holds, how fast they speak.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::fault::Fault;

/// The forms of the wire that clients of Ollama still meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum WireForm {
    /// Ollama 0.32.6 and newer (recorded from 0.33.0-rc2).
    #[default]
    Current,
    /// As recorded from 0.17.4: the finish reason of an OpenAI chat stream sits on a delta with empty content, `role`
    /// is in every delta, every error of a handler has the type `api_error`, and lists say less about a model.
    Old,
}

impl WireForm {
    /// The version that `/api/version` reports.
    pub fn version(self) -> &'static str {
        match self {
            WireForm::Current => "0.33.0-rc2",
            WireForm::Old => "0.17.4",
        }
    }
}

/// Options of `simulate`, and of a simulator inside a test or a bench.
///
/// The defaults are those of the command line: a pace that a person can follow, and no record of what was seen.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct SimulatorOptions {
    /// Address to listen on.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub host: IpAddr,

    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 11434)]
    pub port: u16,

    /// Models to hold, separated by commas. Names that begin with `tiny` recite what Ollama's tiny test models recite;
    /// any other name answers with a fixed sentence of `--tokens` tokens.
    #[arg(long, value_delimiter = ',', default_values_t = default_models())]
    pub models: Vec<String>,

    /// Tokens for each answer of a model that has no script of its own, the end-of-text token included.
    #[arg(long, default_value_t = 16)]
    pub tokens: u32,

    /// Tokens for each second and answer; 0 is as fast as possible.
    #[arg(long, default_value_t = 200.0)]
    pub tokens_per_second: f64,

    /// Milliseconds before the first token, spent for the prompt. The reply's head comes with the first token.
    #[arg(long, default_value_t = 0)]
    pub first_token_ms: u64,

    /// Milliseconds for loading a model at its first use. A client that leaves aborts the load.
    #[arg(long, default_value_t = 0)]
    pub load_ms: u64,

    /// Which form of the wire to speak.
    #[arg(long, value_enum, default_value_t = WireForm::Current)]
    pub wire: WireForm,

    /// The version that `/api/version` reports; empty: that of `--wire`. One before 0.13.3 answers 404 on /v1/responses, one before
    /// 0.14.0 on /v1/messages, as Ollama did.
    #[arg(long, default_value = "")]
    pub ollama_version: String,

    /// Misbehave on every inference route: NAME or NAME:ARGUMENT. Names: see the documentation of `Fault`.
    #[arg(long)]
    pub fault: Option<Fault>,

    /// Let `--fault` hold for every route, lists and versions too.
    #[arg(long)]
    pub fault_everywhere: bool,

    /// Answer to any `Host`, as an Ollama does that is bound to 0.0.0.0. On loopback Ollama answers 403 to a foreign one.
    #[arg(long)]
    pub any_host: bool,

    /// Worker threads (`run_blocking` only); 0 is one for each core, 1 keeps everything on one thread.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,

    /// How many requests to remember for `seen()`; 0 remembers none and hashes no body.
    #[arg(long, default_value_t = 0, hide = true)]
    pub witnesses: usize,

    /// Bytes of each request body that `Seen::body` keeps.
    #[arg(long, default_value_t = 0, hide = true)]
    pub keep_body_bytes: usize,
}

impl Default for SimulatorOptions {
    fn default() -> Self {
        SimulatorOptions {
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 11434,
            models: default_models(),
            tokens: 16,
            tokens_per_second: 200.0,
            first_token_ms: 0,
            load_ms: 0,
            wire: WireForm::Current,
            ollama_version: String::new(),
            fault: None,
            fault_everywhere: false,
            any_host: false,
            threads: 1,
            witnesses: 0,
            keep_body_bytes: 0,
        }
    }
}

impl SimulatorOptions {
    /// For tests: a free port, as fast as possible, the last 100,000 requests remembered, up to 64 KiB of each body.
    pub fn for_tests() -> Self {
        let mut models = default_models();
        models.push("tiny-broken".to_owned());
        SimulatorOptions {
            port: 0,
            models,
            tokens_per_second: 0.0,
            witnesses: 100_000,
            keep_body_bytes: 64 * 1024,
            ..SimulatorOptions::default()
        }
    }

    pub(super) fn version(&self) -> &str {
        if self.ollama_version.is_empty() { self.wire.version() } else { &self.ollama_version }
    }

    /// Whether the Ollama of that version has what came in `since`.
    pub(super) fn has(&self, since: [u32; 3]) -> bool {
        let mut parts = self.version().split(['.', '-']).map(|part| part.parse().unwrap_or(0));
        [0; 3].map(|_: u32| parts.next().unwrap_or(0)) >= since
    }

    pub(super) fn address(&self) -> SocketAddr {
        SocketAddr::new(self.host, self.port)
    }
}

fn default_models() -> Vec<String> {
    [
        "llama3.2",
        "codellama",
        "mistral",
        "tiny",
        "tiny-story",
        "tiny-tools",
        "tiny-jinja",
        "tiny-think",
        "tiny-stutter",
        "tiny-loop",
        "tiny-slow",
        "tiny-embed",
    ]
    .map(str::to_owned)
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: SimulatorOptions,
    }

    #[test]
    fn the_command_lines_defaults_are_the_defaults() {
        let line: Line = clap::Parser::parse_from(["simulate"]);
        assert_eq!(line.options, SimulatorOptions::default());
    }

    #[test]
    fn the_command_line_understands_faults_and_models() {
        let line: Line = clap::Parser::parse_from(["simulate", "--fault", "stalls-mid-stream:5", "--models", "a,b"]);
        assert_eq!(line.options.fault, Some(Fault::StallsMidStream { after: 5 }));
        assert_eq!(line.options.models, ["a", "b"]);
    }
}
