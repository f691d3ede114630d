//! What is changed in a request on its way to Ollama: a closed list, each switchable. [`super::ask::read_filtered`] does it.
//!
//! Seed S4 lists the members that Bifrost removes for Ollama; what its provider really does, and what we do, is in bifrost-compat,
//! section 2. Ollama passes over most of them in silence today; cutting them holds for servers that will not.
use super::Endpoint;

/// One change of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Filter {
    /// One leading `ollama/` of the model on `/v1/*`.
    ModelPrefix,
    PromptCacheKey,
    Verbosity,
    Store,
    ServiceTier,
    /// At the top, in messages, their parts, tools and their functions; never in a schema, a text or arguments.
    CacheControl,
    /// A `user` of more than 64 characters.
    User,
    /// It becomes `max_tokens`, which is what Ollama reads.
    MaxCompletionTokens,
    /// The question for the counts of a stream.
    IncludeUsage,
    /// Tools that Ollama itself would run on the internet.
    WebTools,
}

impl Filter {
    pub const ALL: [Filter; 10] = {
        use Filter::*;
        [
            ModelPrefix,
            PromptCacheKey,
            Verbosity,
            Store,
            ServiceTier,
            CacheControl,
            User,
            MaxCompletionTokens,
            IncludeUsage,
            WebTools,
        ]
    };

    /// The audit's word: a name that must not change.
    pub const fn as_str(self) -> &'static str {
        match self {
            Filter::ModelPrefix => "model_prefix",
            Filter::PromptCacheKey => "prompt_cache_key",
            Filter::Verbosity => "verbosity",
            Filter::Store => "store",
            Filter::ServiceTier => "service_tier",
            Filter::CacheControl => "cache_control",
            Filter::User => "user",
            Filter::MaxCompletionTokens => "max_completion_tokens",
            Filter::IncludeUsage => "include_usage",
            Filter::WebTools => "web_tools",
        }
    }

    /// The members that Ollama does not read, and that are looked at all the same.
    pub(super) fn members(endpoint: Endpoint) -> &'static [&'static str] {
        match endpoint {
            Endpoint::ChatCompletions | Endpoint::Completions => &[
                "prompt_cache_key",
                "verbosity",
                "store",
                "service_tier",
                "cache_control",
                "user",
                "max_completion_tokens",
            ],
            Endpoint::Responses => &["prompt"],
            _ => &[],
        }
    }

    /// The filter that cuts all members of a name from the places where it looks for it.
    pub(super) fn that_cuts(endpoint: Endpoint, member: &str) -> Option<Filter> {
        if !matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions) {
            return None;
        }
        match member {
            "prompt_cache_key" => Some(Filter::PromptCacheKey),
            "verbosity" => Some(Filter::Verbosity),
            "store" => Some(Filter::Store),
            "service_tier" => Some(Filter::ServiceTier),
            "cache_control" => Some(Filter::CacheControl),
            _ => None,
        }
    }
}

/// A set of filters: those that are on, or those that found something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filters(u16);

impl Filters {
    pub const NONE: Filters = Filters(0);

    pub fn has(self, filter: Filter) -> bool {
        self.0 & (1 << filter as u8) != 0
    }

    pub fn insert(&mut self, filter: Filter) {
        self.0 |= 1 << filter as u8;
    }

    /// In the order of [`Filter::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Filter> {
        Filter::ALL.into_iter().filter(move |&filter| self.has(filter))
    }
}

impl FromIterator<Filter> for Filters {
    fn from_iter<T: IntoIterator<Item = Filter>>(filters: T) -> Filters {
        let mut all = Filters::NONE;
        filters.into_iter().for_each(|filter| all.insert(filter));
        all
    }
}

#[cfg(test)]
mod tests;
