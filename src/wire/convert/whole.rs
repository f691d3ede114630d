//! A reply that is not streamed.
use super::raw::Raw;
use super::{Call, Counts, Reply, status_of};

/// The response for a whole reply of `/v1/chat/completions`. Nothing that it says is dropped: what was thought, then what was said,
/// then every call. `None`: it is no such reply.
pub fn whole(reply: &Reply, chat: &[u8], now_s: u64) -> Option<Vec<u8>> {
    let chat = Raw::read(chat)?;
    let choice = chat.get("choices")?.items().into_iter().next()?;
    let message = choice.get("message")?;
    let mut output = Vec::new();
    if let Some(thought) = message.says("reasoning").filter(|thought| !thought.is_empty()) {
        output.push(reply.reasoning_item(output.len(), &thought));
    }
    let said = message.says("content").unwrap_or_default();
    let calls = message.get("tool_calls").map(Raw::items).unwrap_or_default();
    if !said.is_empty() || calls.is_empty() {
        output.push(reply.message_item(output.len(), &said, "completed"));
    }
    for call in calls {
        let call = read_call(reply, call, output.len());
        output.push(reply.call_item(output.len(), &call, "completed"));
    }
    let finish = choice.says("finish_reason").unwrap_or_default();
    let mut response = reply.object(&status_of(&finish), &output.join(","), counts(chat), now_s);
    response.push('\n');
    Some(response.into_bytes())
}

pub(super) fn read_call(reply: &Reply, call: Raw<'_>, index: usize) -> Call {
    let function = call.get("function");
    let says = |name| function.and_then(|function| function.says(name)).unwrap_or_default().into_owned();
    let id = call.says("id").filter(|id| !id.is_empty());
    Call {
        id: id.map_or_else(|| format!("call_{}_{index}", reply.id), |id| id.into_owned()),
        name: says("name"),
        arguments: says("arguments"),
    }
}

pub(super) fn counts(chat: Raw<'_>) -> Counts {
    let usage = chat.get("usage");
    let count = |name| usage.and_then(|usage| usage.get(name)).and_then(Raw::count);
    Counts { input: count("prompt_tokens"), output: count("completion_tokens") }
}
