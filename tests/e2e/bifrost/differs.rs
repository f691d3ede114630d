//! Where our caller learns something else than Bifrost's, and why. Each entry is needed, or a test fails.

use super::case::Case;
use super::told::{self, Told};

pub const NO_SUCH_ROUTE: &str = "section 6: the closed table has no such route, so it is a 404";
/// Why our caller learns something else than Bifrost's, and in which cases. The letters are those of bifrost-compat, section 4.2.
#[rustfmt::skip]
pub const DIFFERS: &[(&str, &[&str])] = &[
    ("section 2: counts are hidden from a client that did not ask for them", &[
        "chat_f_all_s4_stream", "chat_mct_100_stream", "chat_s_empty_args", "chat_s_length", "chat_s_no_role", "chat_s_one_tool",
        "chat_s_reasoning", "chat_s_split", "chat_s_text_after_tool", "chat_s_text_old", "chat_s_text_then_tool",
        "chat_s_two_tools_one_chunk", "chat_s_two_tools_same_index", "chat_s_two_tools_two_chunks", "chat_s_usage_on_finish",
        "chat_s_utf8", "chat_so_false_stream", "chat_stream", "chat_stream_key", "text_stream", "text_stream_key",
    ]),
    ("section 7: a clean end behind the finish reason passes as it is: no [DONE] is made up, no counts are shown", &[
        "chat_s_no_done", "chat_s_no_done_idle2",
    ]),
    ("section 7: an error is no end, so no [DONE] is put behind it", &["chat_s_error_event"]),
    ("section 7: the backend's own words of its failure reach the caller, and no [DONE] behind them", &[
        "chat_s_error_event_string", "chat_s_error_native",
    ]),
    ("section 7: a stream without its end is told in words that say what to do, without addresses, and without [DONE]", &[
        "chat_s_cut", "chat_s_swallowed", "chat_s_swallowed_idle2",
    ]),
    ("section 7: a head of status 200 has passed, so a stream of nothing is told in the stream", &["chat_s_empty", "resp_s_empty"]),
    ("section 7: JSON for a stream passes, by its own type", &["chat_s_wrong_ct"]),
    ("section 6: 200 without the JSON that belongs there is a 502, and not quoted", &["chat_e200_empty", "chat_e200_html"]),
    ("section 6: the backend's error passes as it is, and is not wrapped or explained", &[
        "chat_e401_native", "chat_e403_empty",
    ]),
    ("ADR 80: a plain 404 is an Ollama that is too old for the route, and the caller is told which has it", &["chat_e404_text"]),
    ("section 6: a 502 says where the backend was looked for", &["chat_backend_down", "models_down"]),
    ("section 6: silence is told in our words; before the first byte it counts too", &["chat_s_idle", "chat_s_timeout_first", "chat_timeout"]),
    ("section 1: two spellings of one key are refused", &["chat_dup_keys"]),
    ("section 1: a model that is denied is a 403 with the policy's reason", &["chat_model_not_allowed"]),
    ("section 1: the backend's address is all that has to be said, and has a default", &["chat_no_base_url", "chat_provider_base_url_only"]),
    ("section 1: what Ollama takes is passed on, and what it does not take it refuses itself", &[
        "chat_f_stop_string", "chat_f_temperature_string", "chat_image_str", "chat_tool_args_object", "text_prompt_tokens",
        "text_stop_string",
    ]),
    ("section 3: what cannot be mapped is a 400 that names it, where Bifrost loses it", &[
        "resp_audio", "resp_chain_output_image", "resp_file", "resp_image_file_id", "resp_item_reference", "resp_other_items",
        "resp_p_background", "resp_p_conversation", "resp_p_previous_response_id", "resp_p_prompt", "resp_tc_any",
        "resp_tc_custom", "resp_tc_web_search",
    ]),
    ("section 4.1: a text beside calls is kept", &["resp_r_text_tools"]),
    ("section 4.1: a finish reason that nobody knows is an end", &["resp_r_unknown_finish"]),
    ("section 4.2, a: every call of a chunk survives", &["resp_s_two_tools_one_chunk"]),
    ("section 4.2, h: a text behind a call is an item of its own", &["resp_s_text_after_tool"]),
    ("section 4.2, i: items stand in the order in which they came", &["resp_s_tool_then_text"]),
    ("section 4.2, m: a failure is a failed response with what was said until then", &[
        "resp_s_cut", "resp_s_error_event", "resp_s_error_native", "resp_s_swallowed",
    ]),
    ("section 5: names are those that Ollama gives, in its order, and none that it does not have", &[
        "models_allow", "models_extra", "models_key", "models_plain",
    ]),
    ("a list that is none is a 502, whatever the backend's status", &["models_404"]),
    ("section 8: a client that leaves has no reply; its backend is told, which Bifrost does for streams only", &["chat_cancel", "chat_s_cancel"]),
    ("section 6: unsupported_operation also without a key for batches", &[
        "unsup_batch_cancel", "unsup_batch_create", "unsup_batch_list", "unsup_batch_results", "unsup_batch_retrieve",
        "unsup_file_upload",
    ]),
    (NO_SUCH_ROUTE, &["unsup_count_tokens", "unsup_ocr"]),
];

/// The faults that Bifrost's own streams of `/v1/responses` show. Ours have none.
#[rustfmt::skip]
pub const FAULTS: &[(&str, &[&str])] = &[
    ("bcdefj",  &["resp_s_blank_args"]),
    ("bcefijk", &["resp_s_tool_then_text"]),
    ("bcefj",   &["resp_s_empty_args", "resp_s_frag_args", "resp_s_one_tool", "resp_s_two_tools_one_chunk"]),
    ("bcefjk",  &["resp_s_four_tools", "resp_s_two_tools_same_index", "resp_s_two_tools_two_chunks"]),
    ("cefgj",   &["resp_s_reasoning_tool"]),
    ("cefhj",   &["resp_s_text_after_tool"]),
    ("cefj",    &["resp_s_text_then_tool"]),
    ("fgj",     &["resp_s_reasoning"]),
    ("fj",      &["resp_s_key", "resp_s_length", "resp_s_max_5", "resp_s_no_done", "resp_s_no_role", "resp_s_so_true", "resp_s_text",
                  "resp_s_text_nousage", "resp_s_text_old", "resp_s_usage_on_finish"]),
    ("fjl",     &["resp_s_empty_answer"]),
    ("fjm",     &["resp_s_cut", "resp_s_error_event", "resp_s_error_native", "resp_s_swallowed"]),
];

/// Why our caller may learn something else: at most one reason for each case.
pub fn reason(case: &Case) -> Option<&'static str> {
    let mut reasons = DIFFERS.iter().filter(|(_, cases)| cases.contains(&case.name.as_str())).map(|(why, _)| *why);
    let first = reasons.next();
    assert_eq!(reasons.next(), None, "{}: one reason is enough", case.name);
    first
}

/// Holds what our caller learnt against what Bifrost's did.
pub fn compare(case: &Case, ours: &Told, theirs: &Told) {
    match reason(case) {
        None => assert_eq!(ours, theirs, "{}: ours, and Bifrost's", case.name),
        Some(why) => assert_ne!(ours, theirs, "{}: there is nothing to exempt: {why}", case.name),
    }
}

pub fn compare_faults(case: &Case) {
    let wanted =
        FAULTS.iter().find(|(_, cases)| cases.contains(&case.name.as_str())).map_or("", |(letters, _)| *letters);
    let got = case.got();
    let found = if got.is_stream { told::faults(&got.body) } else { String::new() };
    assert_eq!(found, wanted, "{}: the faults of Bifrost's stream", case.name);
}
