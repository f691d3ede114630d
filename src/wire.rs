//! What is on the wire: bytes in, facts out. Pure: nothing here does input or output, and nothing here knows Pingora.
//!
//! - [`ask`]: the facts of a request, read from its body by one strict reader for all dialects.
//! - [`filter`]: what is changed in a request on the way, as a closed list.
//! - [`keep_alive`]: how long a model stays loaded.
//! - [`model`]: model names by Ollama's own rules.
//! - [`frames`]: NDJSON lines and SSE events, found in a stream at any split of its bytes.
//! - [`meter`]: token counts and the finish reason, read while a reply passes.
//! - [`failure`]: how a failure is said inside a stream, in each dialect.
//! - [`mend`]: a backend's own words of failure, put into the stream's dialect.
//! - [`whole`]: a reply that is not streamed, judged before it passes.
//! - [`rewrite`]: bytes cut from or put into a request or a reply; everything else stays byte-exact.
//! - [`list`]: the models in a list reply, filtered without touching what stays.
//! - [`inventory`]: what a backend says of itself and its models, for the catalogue.
//! - `native`, `openai`, `responses`, `anthropic`: a dialect is a file of field names, nothing else.

/// Whose words a client speaks. It decides the shape of a refusal and the field names the meter looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dialect {
    Native,
    OpenAi,
    Anthropic,
}

impl Dialect {
    pub fn as_str(self) -> &'static str {
        match self {
            Dialect::Native => "native",
            Dialect::OpenAi => "openai",
            Dialect::Anthropic => "anthropic",
        }
    }
}

/// What an endpoint does, and so which permission it needs (contract, sections 2 and 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Infer,
    Read,
    List,
    Manage,
    Egress,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Infer => "infer",
            Kind::Read => "read",
            Kind::List => "list",
            Kind::Manage => "manage",
            Kind::Egress => "egress",
        }
    }
}

/// What a request of an endpoint carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyRule {
    /// Nothing; a body is refused.
    None,
    /// JSON, held in memory up to the configured limit and judged before a backend is chosen.
    Json,
    /// Bytes passed on as they come, never held and never replayed (blobs).
    Stream,
}

/// Every route of Ollama that may pass. The table of paths and methods is in `route`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    Root,
    Version,
    Status,
    Tags,
    Ps,
    Show,
    Chat,
    Generate,
    Embed,
    Embeddings,
    ChatCompletions,
    Completions,
    OpenAiEmbeddings,
    Responses,
    Messages,
    Models,
    Model,
    Pull,
    Push,
    Create,
    Copy,
    Delete,
    Blob,
}

impl Endpoint {
    pub fn dialect(self) -> Dialect {
        use Endpoint::*;
        match self {
            ChatCompletions | Completions | OpenAiEmbeddings | Responses | Models | Model => Dialect::OpenAi,
            Messages => Dialect::Anthropic,
            _ => Dialect::Native,
        }
    }

    pub fn kind(self) -> Kind {
        use Endpoint::*;
        match self {
            Root | Version | Status | Show | Model => Kind::Read,
            Tags | Ps | Models => Kind::List,
            Chat | Generate | Embed | Embeddings | ChatCompletions | Completions | OpenAiEmbeddings | Responses
            | Messages => Kind::Infer,
            Pull | Push | Create | Copy | Delete | Blob => Kind::Manage,
        }
    }

    pub fn body(self) -> BodyRule {
        use Endpoint::*;
        match self {
            Root | Version | Status | Tags | Ps | Models | Model => BodyRule::None,
            Blob => BodyRule::Stream,
            _ => BodyRule::Json,
        }
    }

    /// The Ollama that brought a route of inference. `None`: no Ollama is older.
    pub fn since(self) -> Option<&'static str> {
        use Endpoint::*;
        match self {
            Chat => Some("0.1.14"),
            ChatCompletions => Some("0.1.24"),
            Completions => Some("0.2.0"),
            Embed | OpenAiEmbeddings => Some("0.2.6"),
            Responses => Some("0.13.3"),
            Messages => Some("0.14.0"),
            _ => None,
        }
    }

    /// A short name for metric labels and logs: a closed set.
    pub fn as_str(self) -> &'static str {
        use Endpoint::*;
        match self {
            Root => "root",
            Version => "version",
            Status => "status",
            Tags => "tags",
            Ps => "ps",
            Show => "show",
            Chat => "chat",
            Generate => "generate",
            Embed => "embed",
            Embeddings => "embeddings",
            ChatCompletions => "chat_completions",
            Completions => "completions",
            OpenAiEmbeddings => "openai_embeddings",
            Responses => "responses",
            Messages => "messages",
            Models => "models",
            Model => "model",
            Pull => "pull",
            Push => "push",
            Create => "create",
            Copy => "copy",
            Delete => "delete",
            Blob => "blob",
        }
    }
}

mod anthropic;
pub mod ask;
pub mod convert;
pub mod failure;
pub mod filter;
pub mod frames;
pub mod inventory;
mod json;
pub mod keep_alive;
pub mod list;
pub mod mend;
pub mod meter;
pub mod model;
mod native;
mod openai;
mod responses;
pub mod rewrite;
pub mod whole;

pub use ask::{Ask, AskError};
pub use filter::{Filter, Filters};
pub use frames::Framing;
pub use meter::{Meter, Usage};
pub use model::{ModelRef, NameError, Source};
