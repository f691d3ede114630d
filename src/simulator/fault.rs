//! The ways in which a backend can misbehave, each by name.
//!
//! A fault is chosen for the whole simulator (`--fault`, or the handle's `set_fault`), or for one request by the name of
//! its model: `fault-stalls-mid-stream` or, with an argument, `fault-stalls-mid-stream-5`. The model's name is the one
//! thing that reaches a backend through a proxy that drops headers.

use std::fmt;
use std::str::FromStr;

/// One way to misbehave. In a text form the argument follows a colon; every argument has a default.
///
/// `after` counts the deltas (texts, thoughts, tool calls) that are sent before the fault strikes; in a reply that is
/// not streamed, and in lists, half of the body is sent instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// `refuses`: the listener is closed and every connection with it. Only for the whole simulator.
    Refuses,
    /// `hangs-before-headers`: the request is read and nothing ever comes.
    HangsBeforeHeaders,
    /// `closes-before-headers`: the request is read, then the connection is closed without a byte.
    ClosesBeforeHeaders,
    /// `resets-before-headers`: the same with a reset.
    ResetsBeforeHeaders,
    /// `closes-on-reuse`: the second request of a connection is answered by closing it, as a server does that closed an
    /// idle connection at the moment in which it was used again.
    ClosesOnReuse,
    /// `closes-in-head`: half a response head, then the end of the connection.
    ClosesInHead,
    /// `stalls-mid-stream[:AFTER]`: silence for ever after so many deltas.
    StallsMidStream { after: u32 },
    /// `resets-mid-stream[:AFTER]`: a reset (RST).
    ResetsMidStream { after: u32 },
    /// `closes-mid-stream[:AFTER]`: an end (FIN) without the last chunk.
    ClosesMidStream { after: u32 },
    /// `drips[:MS]`: the reply comes byte by byte, with so many milliseconds between bytes (0: no pause).
    Drips { pause_ms: u64 },
    /// `garbage-head`: bytes that are no HTTP, then the end.
    GarbageHead,
    /// `huge-head[:BYTES]`: a response head of that size (2 MiB).
    HugeHead { size_bytes: usize },
    /// `503-queue-full`: Ollama's words when its load queue is full.
    QueueFull,
    /// `404-model`: the model is not there.
    ModelMissing,
    /// `500-error`: the runner stopped before the first token.
    RunnerStopped,
    /// `error-in-stream[:AFTER]`: the runner dies after so many deltas. Native streams end with an error line; the others
    /// hide it as Ollama does; not streamed it is a 500.
    ErrorInStream { after: u32 },
    /// `no-terminal[:AFTER]`: a clean end without the dialect's own end.
    NoTerminal { after: u32 },
    /// `closes-idle-connections[:MS]`: a connection is closed so long after each reply (0: at once), unannounced.
    ClosesIdleConnections { after_ms: u64 },
    /// `early-400[:keep|cut]`: a 400 before the body is read; then the body is read and dropped (`keep`), or the connection closed.
    Early400 { keep: bool },
    /// `two-replies`: a second, unasked reply directly behind the first.
    TwoReplies,
    /// `informational[:STATUS]`: a 1xx response first (103; 101 is a switch of protocols that nobody asked for).
    Informational { status: u16 },
    /// `compressed`: `Content-Encoding: gzip` over a body that is not.
    Compressed,
    /// `redirect[:LOCATION]`: a 302.
    Redirect { location: String },
    /// `html`: 200 with a web page, as of a wrong service on the port.
    Html,
    /// `wrong-content-length[:DIFFERENCE]`: a length that is off by so many bytes (10: the body ends short of it).
    WrongContentLength { difference: i64 },
}

/// A name that is no fault, or an argument that does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownFault(String);

impl fmt::Display for UnknownFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no such fault: {:?}; known are {}", self.0, NAMES.join(", "))
    }
}

impl std::error::Error for UnknownFault {}

/// The names of all faults.
pub const NAMES: [&str; 25] = [
    "refuses",
    "hangs-before-headers",
    "closes-before-headers",
    "resets-before-headers",
    "closes-on-reuse",
    "closes-in-head",
    "stalls-mid-stream",
    "resets-mid-stream",
    "closes-mid-stream",
    "drips",
    "garbage-head",
    "huge-head",
    "503-queue-full",
    "404-model",
    "500-error",
    "error-in-stream",
    "no-terminal",
    "closes-idle-connections",
    "early-400",
    "two-replies",
    "informational",
    "compressed",
    "redirect",
    "html",
    "wrong-content-length",
];

const DEFAULT_AFTER: u32 = 3;

impl FromStr for Fault {
    type Err = UnknownFault;

    fn from_str(text: &str) -> Result<Fault, UnknownFault> {
        let (name, argument) = match text.split_once(':') {
            Some((name, argument)) => (name, Some(argument)),
            None => (text, None),
        };
        Fault::named(name, argument).ok_or_else(|| UnknownFault(text.to_owned()))
    }
}

impl Fault {
    /// The fault that a model's name asks for, if it does: `fault-NAME` or `fault-NAME-ARGUMENT`, tag and all else dropped.
    pub fn of_model(model: &str) -> Option<Fault> {
        let rest = model.strip_prefix("fault-")?;
        let rest = rest.split(':').next().unwrap_or(rest);
        if NAMES.contains(&rest) {
            return Fault::named(rest, None);
        }
        let name = NAMES.iter().find(|name| rest.strip_prefix(**name).is_some_and(|tail| tail.starts_with('-')))?;
        Fault::named(name, Some(&rest[name.len() + 1..]))
    }

    fn named(name: &str, argument: Option<&str>) -> Option<Fault> {
        let after = || number(argument, DEFAULT_AFTER);
        Some(match name {
            "refuses" => Fault::Refuses,
            "hangs-before-headers" => Fault::HangsBeforeHeaders,
            "closes-before-headers" => Fault::ClosesBeforeHeaders,
            "resets-before-headers" => Fault::ResetsBeforeHeaders,
            "closes-on-reuse" => Fault::ClosesOnReuse,
            "closes-in-head" => Fault::ClosesInHead,
            "stalls-mid-stream" => Fault::StallsMidStream { after: after()? },
            "resets-mid-stream" => Fault::ResetsMidStream { after: after()? },
            "closes-mid-stream" => Fault::ClosesMidStream { after: after()? },
            "drips" => Fault::Drips { pause_ms: number(argument, 1)? },
            "garbage-head" => Fault::GarbageHead,
            "huge-head" => Fault::HugeHead { size_bytes: number(argument, 2 * 1024 * 1024)? },
            "503-queue-full" => Fault::QueueFull,
            "404-model" => Fault::ModelMissing,
            "500-error" => Fault::RunnerStopped,
            "error-in-stream" => Fault::ErrorInStream { after: after()? },
            "no-terminal" => Fault::NoTerminal { after: after()? },
            "closes-idle-connections" => Fault::ClosesIdleConnections { after_ms: number(argument, 0)? },
            "early-400" => match argument {
                None | Some("keep") => Fault::Early400 { keep: true },
                Some("cut") => Fault::Early400 { keep: false },
                Some(_) => return None,
            },
            "two-replies" => Fault::TwoReplies,
            "informational" => {
                let status = number(argument, 103)?;
                if !(100..200).contains(&status) {
                    return None;
                }
                Fault::Informational { status }
            }
            "compressed" => Fault::Compressed,
            "redirect" => Fault::Redirect { location: argument.unwrap_or("http://localhost:1/elsewhere").to_owned() },
            "html" => Fault::Html,
            "wrong-content-length" => Fault::WrongContentLength { difference: number(argument, 10)? },
            _ => return None,
        })
    }

    /// After how many deltas the stream is to be cut, for the faults that cut one.
    pub(super) fn strikes_after(&self) -> Option<u32> {
        match self {
            Fault::StallsMidStream { after }
            | Fault::ResetsMidStream { after }
            | Fault::ClosesMidStream { after }
            | Fault::ErrorInStream { after }
            | Fault::NoTerminal { after } => Some(*after),
            _ => None,
        }
    }
}

fn number<N: FromStr>(argument: Option<&str>, default: N) -> Option<N> {
    argument.map_or(Some(default), |text| text.parse().ok())
}

/// A fault, where it holds, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FaultRule {
    pub fault: Fault,
    /// Every route, not only inference.
    pub everywhere: bool,
    /// For so many requests; `None` until it is taken away.
    pub times: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_fault_by_itself_and_as_a_models_name() {
        for name in NAMES {
            let fault = Fault::from_str(name).expect("each listed name parses");
            assert_eq!(Fault::of_model(&format!("fault-{name}:latest")), Some(fault));
        }
    }

    #[test]
    fn arguments_are_read_in_both_forms() {
        assert_eq!(Fault::from_str("drips:0"), Ok(Fault::Drips { pause_ms: 0 }));
        assert_eq!(Fault::of_model("fault-closes-mid-stream-7"), Some(Fault::ClosesMidStream { after: 7 }));
        assert_eq!(Fault::of_model("fault-early-400-cut:latest"), Some(Fault::Early400 { keep: false }));
        assert_eq!(Fault::from_str("wrong-content-length:-3"), Ok(Fault::WrongContentLength { difference: -3 }));
    }

    #[test]
    fn what_is_no_fault_is_refused() {
        for text in ["", "stall", "drips:x", "informational:200", "early-400:no"] {
            assert!(Fault::from_str(text).is_err(), "{text}");
        }
        assert_eq!(Fault::of_model("llama3.2"), None);
        assert_eq!(Fault::of_model("fault-nonsense"), None);
    }
}
