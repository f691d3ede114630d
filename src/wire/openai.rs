//! Field names of the OpenAI-compatible API, but for `/v1/responses`. Requests: `openai/openai.go`; replies: ollama-wire 4.2.

/// Every member that Ollama reads of a request of `/v1/chat/completions`, `/v1/completions` or `/v1/embeddings`.
pub(crate) const REQUEST: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "input",
    "stream",
    "stream_options",
    "max_tokens",
    "tools",
    "seed",
    "stop",
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "response_format",
    "reasoning",
    "reasoning_effort",
    "logprobs",
    "top_logprobs",
    "suffix",
    "echo",
    "encoding_format",
    "dimensions",
    "_debug_render_only",
];

/// Members of one of `messages`.
pub(crate) const MESSAGE: &[&str] = &["role", "content", "reasoning", "tool_calls", "tool_call_id", "name"];

pub(crate) const STREAM_OPTIONS: &[&str] = &["include_usage"];

// Replies, as the meter looks for them.
pub(crate) const CHOICES: &[u8] = b"choices";
pub(crate) const FINISH_REASON: &[u8] = b"finish_reason";
pub(crate) const USAGE: &[u8] = b"usage";
pub(crate) const PROMPT_TOKENS: &[u8] = b"prompt_tokens";
pub(crate) const COMPLETION_TOKENS: &[u8] = b"completion_tokens";
/// The list of vectors.
pub(crate) const DATA: &[u8] = b"data";
pub(crate) const ERROR: &[u8] = b"error";
/// The end of a stream.
pub(crate) const END: &[u8] = b"[DONE]";
