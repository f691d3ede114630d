//! Whether a request whose attempt came to nothing may be tried on another backend. Pure: the rule, and no deed.
//!
//! Only where nothing of a reply was seen by the client. Inference has no effect beyond a GPU's time (ollama-wire, section 2), so it may
//! move when the backend was not reached, is full, has not got the model, or broke off; a 500 of it stays, since the request itself
//! may have brought the runner down, and would bring down the next. Reads and embeddings move then too. Management never does: it may
//! have been carried out.

use std::time::Duration;

use super::health::Failed;
use crate::wire::{Endpoint, Kind};

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Backends that one request is tried on, the first included.
    pub backends: usize,
    /// From the first attempt; later none begins.
    pub within: Duration,
}

/// `before`: what became of the earlier attempts on other backends. `since`: the first attempt.
pub fn may_move(settings: &Settings, endpoint: Endpoint, failed: Failed, before: &[Failed], since: Duration) -> bool {
    if before.len() + 1 >= settings.backends || since >= settings.within {
        return false;
    }
    let computes_text = endpoint.kind() == Kind::Infer && !is_embedding(endpoint);
    let broke = |failed: &Failed| matches!(failed, Failed::BrokeOff | Failed::Garbage);
    match (endpoint.kind(), failed) {
        (Kind::Manage | Kind::Egress, _) => false,
        // Who waited for so long would wait as long again.
        (_, Failed::Silent) => false,
        (_, Failed::Unreachable | Failed::Full | Failed::Absent | Failed::NoRoute) => true,
        (_, Failed::Error) => !computes_text,
        // A request that brings backends down brings down two.
        (_, Failed::BrokeOff | Failed::Garbage) => !before.iter().any(broke),
    }
}

fn is_embedding(endpoint: Endpoint) -> bool {
    matches!(endpoint, Endpoint::Embed | Endpoint::Embeddings | Endpoint::OpenAiEmbeddings)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Settings = Settings { backends: 3, within: Duration::from_secs(30) };

    fn moves(endpoint: Endpoint, failed: Failed) -> bool {
        may_move(&SETTINGS, endpoint, failed, &[], Duration::ZERO)
    }

    #[test]
    fn what_may_move_is_this_table() {
        use Failed::*;
        for failed in Failed::ALL {
            for endpoint in [Endpoint::Pull, Endpoint::Copy, Endpoint::Delete, Endpoint::Blob, Endpoint::Create] {
                assert!(!moves(endpoint, failed), "{endpoint:?} {failed:?}");
            }
            for endpoint in [Endpoint::Chat, Endpoint::Completions, Endpoint::Messages, Endpoint::Responses] {
                assert_eq!(moves(endpoint, failed), !matches!(failed, Silent | Error), "{endpoint:?} {failed:?}");
            }
            for endpoint in [Endpoint::Embed, Endpoint::OpenAiEmbeddings, Endpoint::Show, Endpoint::Version] {
                assert_eq!(moves(endpoint, failed), failed != Silent, "{endpoint:?} {failed:?}");
            }
        }
    }

    #[test]
    fn attempts_are_bounded_in_number_and_time_and_a_deadly_request_kills_no_third() {
        let again =
            |failed, before: &[Failed], s| may_move(&SETTINGS, Endpoint::Chat, failed, before, Duration::from_secs(s));
        assert!(again(Failed::Full, &[Failed::Unreachable], 29));
        assert!(!again(Failed::Full, &[Failed::Unreachable, Failed::Full], 0));
        assert!(!again(Failed::Full, &[], 30));
        assert!(!again(Failed::BrokeOff, &[Failed::Garbage], 0));
        assert!(again(Failed::BrokeOff, &[Failed::Full], 0));
    }
}
