//! Field names of `/v1/messages`. Requests: `anthropic/anthropic.go`; replies: ollama-wire 5.

/// Every member that Ollama reads of a request.
pub(crate) const REQUEST: &[&str] = &[
    "model",
    "messages",
    "max_tokens",
    "system",
    "stream",
    "tools",
    "tool_choice",
    "temperature",
    "top_p",
    "top_k",
    "stop_sequences",
    "thinking",
    "output_config",
    "metadata",
];

/// Members of one of `messages`.
pub(crate) const MESSAGE: &[&str] = &["role", "content"];

// Replies, as the meter looks for them.
pub(crate) const TYPE: &[u8] = b"type";
pub(crate) const STOP_REASON: &[u8] = b"stop_reason";
/// In `message_delta`.
pub(crate) const DELTA: &[u8] = b"delta";
pub(crate) const USAGE: &[u8] = b"usage";
pub(crate) const INPUT_TOKENS: &[u8] = b"input_tokens";
pub(crate) const OUTPUT_TOKENS: &[u8] = b"output_tokens";
pub(crate) const ERROR: &[u8] = b"error";
// Values of `type`. The counts of `message_start` are a guess, so only `message_delta` is read.
pub(crate) const MESSAGE_DELTA: &[u8] = b"message_delta";
pub(crate) const MESSAGE_STOP: &[u8] = b"message_stop";
pub(crate) const WHOLE_MESSAGE: &[u8] = b"message";
