//! Field names of `/v1/responses`. Requests: `openai/responses.go`; replies: ollama-wire 4.3.

/// Every member that Ollama reads of a request.
pub(crate) const REQUEST: &[&str] = &[
    "model",
    "input",
    "instructions",
    "tools",
    "stream",
    "max_output_tokens",
    "temperature",
    "top_p",
    "reasoning",
    "text",
    "background",
    "conversation",
    "include",
    "previous_response_id",
    "store",
    "truncation",
    "tool_choice",
];

/// Members of one of `input`.
pub(crate) const ITEM: &[&str] =
    &["type", "role", "content", "id", "call_id", "name", "arguments", "output", "summary", "encrypted_content"];

// Replies, as the meter looks for them.
pub(crate) const TYPE: &[u8] = b"type";
/// In an event; a reply that is not streamed is this object itself.
pub(crate) const RESPONSE: &[u8] = b"response";
pub(crate) const STATUS: &[u8] = b"status";
pub(crate) const INCOMPLETE_DETAILS: &[u8] = b"incomplete_details";
pub(crate) const REASON: &[u8] = b"reason";
pub(crate) const USAGE: &[u8] = b"usage";
pub(crate) const INPUT_TOKENS: &[u8] = b"input_tokens";
pub(crate) const OUTPUT_TOKENS: &[u8] = b"output_tokens";
pub(crate) const ERROR: &[u8] = b"error";
// The events that end a stream, and the one that is an error.
pub(crate) const COMPLETED: &[u8] = b"response.completed";
pub(crate) const INCOMPLETE: &[u8] = b"response.incomplete";
pub(crate) const FAILED: &[u8] = b"response.failed";
pub(crate) const ERROR_EVENT: &[u8] = b"error";
