//! `[filters]`: what is changed in a request before it is judged and sent, and `[egress]`: what may leave the premises.

use serde::{Deserialize, Serialize};

/// `[filters]`: each is on by default, as seed S4 has it. The names are also the audit's words for what fired.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Filters {
    /// Cut one leading `ollama/` from the model of a request on `/v1/*`, which is how Bifrost's clients write it.
    pub model_prefix: bool,
    /// Cut `prompt_cache_key` from chat and text completions; so the next three.
    pub prompt_cache_key: bool,
    pub verbosity: bool,
    pub store: bool,
    pub service_tier: bool,
    /// Cut `cache_control` from chats: at the top, in messages, their parts, tools and their functions.
    pub cache_control: bool,
    /// Cut a `user` of more than 64 characters.
    pub user: bool,
    /// Send `max_completion_tokens` as `max_tokens`: Ollama reads only that, so that without it the answer has no bound.
    pub max_completion_tokens: bool,
}

impl Default for Filters {
    fn default() -> Filters {
        Filters {
            model_prefix: true,
            prompt_cache_key: true,
            verbosity: true,
            store: true,
            service_tier: true,
            cache_control: true,
            user: true,
            max_completion_tokens: true,
        }
    }
}

/// What becomes of `web_search` and `web_fetch` tools in `/v1/responses` and `/v1/messages`, which Ollama runs on the internet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WebTools {
    /// They are cut from the request, which goes on without them.
    Cut,
    /// 403 `egress_denied`.
    Refuse,
    /// They pass, if the policy lets the request pass.
    Allow,
}

/// `[egress]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Egress {
    /// Let requests for Ollama's cloud models pass, if the policy does. Default false.
    pub cloud_models: bool,
    /// `cut`, `refuse` or `allow`. Default `cut`: agents send these tools unasked, and work without them.
    pub web_tools: WebTools,
}

impl Default for Egress {
    fn default() -> Egress {
        Egress { cloud_models: false, web_tools: WebTools::Cut }
    }
}
