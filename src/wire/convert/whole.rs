//! A reply that is not streamed.
use std::borrow::Cow;

use super::raw::Raw;
use super::{Call, Counts, Reply, status_of};

/// Why a whole reply is not made a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoResponse {
    /// It is none of `/v1/chat/completions`.
    NoChat,
    TooLong,
}

/// The response for a whole reply of `/v1/chat/completions`. Nothing that it says is dropped: what was thought, then what was said,
/// then every call. `limit_bytes` is for all of them as they are written: an empty call becomes fifty times its length.
pub fn whole(reply: &Reply, chat: &[u8], limit_bytes: usize, now_s: u64) -> Result<Vec<u8>, NoResponse> {
    let chat = String::from_utf8_lossy(chat);
    let chat = Raw::read(chat.as_bytes()).ok_or(NoResponse::NoChat)?;
    let choice = chat.get("choices").and_then(|choices| choices.items().into_iter().next());
    let choice = choice.ok_or(NoResponse::NoChat)?;
    let message = choice.get("message").ok_or(NoResponse::NoChat)?;
    let mut output = Vec::new();
    if let Some(thought) = message.says("reasoning").filter(|thought| !thought.is_empty()) {
        output.push(reply.reasoning_item(output.len(), &thought));
    }
    let said = message.says("content").unwrap_or_default();
    let calls = message.get("tool_calls").map(Raw::items).unwrap_or_default();
    if !said.is_empty() || calls.is_empty() {
        output.push(reply.message_item(output.len(), &said, "completed"));
    }
    let mut bytes: usize = output.iter().map(String::len).sum();
    for call in calls {
        let call = read_call(reply, call, output.len());
        output.push(reply.call_item(output.len(), &call, "completed"));
        bytes += output.last().map_or(0, String::len);
        if bytes > limit_bytes {
            return Err(NoResponse::TooLong);
        }
    }
    let finish = choice.says("finish_reason").unwrap_or_default();
    let mut response = reply.object(&status_of(&finish), &output.join(","), counts(chat), now_s);
    response.push('\n');
    Ok(response.into_bytes())
}

fn read_call(reply: &Reply, call: Raw<'_>, index: usize) -> Call {
    let function = call.get("function");
    let says = |name| function.and_then(|function| function.says(name)).unwrap_or_default().into_owned();
    Call { id: call_id(reply, call.says("id"), index), name: says("name"), arguments: says("arguments") }
}

/// A call without an id gets one: the client has to say it again with what the call gave.
pub(super) fn call_id(reply: &Reply, given: Option<Cow<'_, str>>, index: usize) -> String {
    let given = given.filter(|id| !id.is_empty());
    given.map_or_else(|| format!("call_{}_{index}", reply.id), Cow::into_owned)
}

pub(super) fn counts(chat: Raw<'_>) -> Counts {
    let usage = chat.get("usage");
    let count = |name| usage.and_then(|usage| usage.get(name)).and_then(Raw::count);
    Counts { input: count("prompt_tokens"), output: count("completion_tokens") }
}
