//! Field names of Ollama's own API. Requests: `api/types.go`; replies: ollama-wire 3.2.

/// Every member that a request of `/api/*` may have: these and no others are compared without case by Go.
pub(crate) const REQUEST: &[&str] = &[
    "model",
    "prompt",
    "messages",
    "stream",
    "system",
    "options",
    "keep_alive",
    "tools",
    "input",
    "format",
    "think",
    "template",
    "suffix",
    "context",
    "raw",
    "images",
    "truncate",
    "shift",
    "dimensions",
    "logprobs",
    "top_logprobs",
    "_debug_render_only",
    "width",
    "height",
    "steps",
    "name",
    "verbose",
    "insecure",
    "username",
    "password",
    "source",
    "destination",
    "from",
    "remote_host",
    "files",
    "adapters",
    "license",
    "parameters",
    "renderer",
    "parser",
    "requires",
    "info",
    "quantize",
    "quantization",
];

/// Members of one of `messages`.
pub(crate) const MESSAGE: &[&str] =
    &["role", "content", "thinking", "images", "tool_calls", "tool_name", "tool_call_id", "name"];

/// Members of `options` that are facts; Go compares keys in here exactly.
pub(crate) const OPTIONS: &[&str] = &["num_ctx", "num_predict"];

// Replies, as the meter looks for them.
pub(crate) const DONE: &[u8] = b"done";
pub(crate) const DONE_REASON: &[u8] = b"done_reason";
pub(crate) const PROMPT_EVAL_COUNT: &[u8] = b"prompt_eval_count";
pub(crate) const EVAL_COUNT: &[u8] = b"eval_count";
pub(crate) const LOAD_DURATION: &[u8] = b"load_duration";
pub(crate) const TOTAL_DURATION: &[u8] = b"total_duration";
pub(crate) const PROMPT_EVAL_DURATION: &[u8] = b"prompt_eval_duration";
pub(crate) const EVAL_DURATION: &[u8] = b"eval_duration";
pub(crate) const EMBEDDING: &[u8] = b"embedding";
pub(crate) const EMBEDDINGS: &[u8] = b"embeddings";
/// Pull, push and create.
pub(crate) const STATUS: &[u8] = b"status";
pub(crate) const ERROR: &[u8] = b"error";
/// What `_debug_render_only` asks for, on the OpenAI routes too.
pub(crate) const DEBUG_INFO: &[u8] = b"_debug_info";
