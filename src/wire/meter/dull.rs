//! Records that teach nothing, found without reading them.
//!
//! Nearly every record of a stream is a piece of text. Reading it with the tokenizer costs some 5,000 instructions (a chunk of
//! `/v1/chat/completions` with 227 bytes), a few searches in its place fewer than 1,000. They are sound because they only ever say "nothing
//! here": a fact needs certain bytes in the record, and where those are missing the tokenizer would have learnt nothing either.
//! Where they are there, perhaps inside a text, the tokenizer decides.
use super::tokens::Layout;
use memchr::memmem::Finder;
use std::sync::LazyLock;

static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"error\""));
static TRUE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("true"));
static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"usage\""));
static FINISH_REASON: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"finish_reason\""));
static MESSAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("message_"));
static RESPONSE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("response."));

/// Whether the tokenizer would learn nothing from this whole record. `false` is always a right answer.
pub(super) fn teaches_nothing(layout: Layout, record: &[u8]) -> bool {
    // The text that ends a stream is no object.
    if record.first() != Some(&b'{') {
        return false;
    }
    let has = |finder: &Finder<'_>| finder.find(record).is_some();
    match layout {
        // Facts come with `done: true`.
        Layout::Native => !has(&TRUE) && !has(&ERROR),
        // Facts are a finish reason that is a text, or `usage`.
        Layout::ChoiceEvents => {
            FINISH_REASON.find_iter(record).all(|at| is_null(&record[at + FINISH_REASON.needle().len()..]))
                && !has(&USAGE)
                && !has(&ERROR)
        }
        // `message_delta` and `message_stop`.
        Layout::MessageEvents => !has(&MESSAGE) && !has(&ERROR),
        // `response.completed`, `response.incomplete` and `response.failed`.
        Layout::ResponseEvents => {
            RESPONSE
                .find_iter(record)
                .all(|at| !matches!(record.get(at + RESPONSE.needle().len()), Some(b'c' | b'i' | b'f')))
                && !has(&ERROR)
        }
        Layout::Vectors | Layout::Choices | Layout::Response | Layout::Message | Layout::Progress | Layout::Whole => {
            false
        }
    }
}

/// What follows a key is `:null`, written as Ollama writes it.
fn is_null(after: &[u8]) -> bool {
    after.starts_with(b":null")
}
