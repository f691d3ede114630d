//! However a network cuts a reply, what is read of it and what is made of it stays the same: every recording, and every broken one of
//! `broken`, byte by byte, at random into many parts, and at every place into two.
//!
//! The last is work that grows with the square of a reply's length, and a debug build is slow. So here a stream is cut at every place
//! of each of its records, with that record alone, and the whole of it at some hundred and thirty; what is shorter than
//! [`EVERY_PLACE_BYTES`] at all of them. With `BEHAVRY_TEST_EVERY_SPLIT` nothing is left out: `tests/long/run splits` does that.
use crate::broken;
use crate::recordings::{Dice, Recording, VERSIONS, check, given_to_bifrost, hidden, metered, recordings};
use behavry_ollama_proxy::wire::convert::{self, Events};
use behavry_ollama_proxy::wire::mend::Mender;
use behavry_ollama_proxy::wire::{Endpoint, Filters, Framing, Meter, Usage};
use bytes::Bytes;
use serde_json::Value;
use std::collections::HashSet;

/// Longer ones are cut at their first 10 and last 60 places, and at sixty between them.
const EVERY_PLACE_BYTES: usize = 500;
/// Bodies up to this length are cut at every two places into three, if no other of the same kind was.
const EVERY_TWO_PLACES_BYTES: usize = 400;
/// So often a reply is cut at random.
const RANDOM_CUTS: usize = 8;

const NOW: u64 = 1_787_360_530;

fn every_place() -> bool {
    std::env::var_os("BEHAVRY_TEST_EVERY_SPLIT").is_some()
}

/// Where a reply is cut into two.
fn places(reply: &[u8]) -> impl Iterator<Item = usize> {
    let length = reply.len();
    let all = every_place() || length <= EVERY_PLACE_BYTES;
    let step = (length / 60) | 1;
    (0..=length).filter(move |&at| all || at <= 10 || at + 60 >= length || at % step == 0)
}

/// The records of a stream, each with its end.
fn records<'a>(recording: &Recording, reply: &'a [u8]) -> Vec<&'a [u8]> {
    let end: &[u8] = match recording.framing {
        Framing::Json => return vec![],
        Framing::Ndjson => b"\n",
        Framing::Sse => b"\n\n",
    };
    let (mut records, mut rest) = (vec![], reply);
    while let Some(at) = rest.windows(end.len()).position(|window| window == end) {
        let (record, after) = rest.split_at(at + end.len());
        records.push(record);
        rest = after;
    }
    records
}

/// Some cuts into many parts, the same every time.
fn random_cuts(reply: &[u8]) -> Vec<Vec<&[u8]>> {
    let mut dice = Dice(0x5eed ^ reply.len() as u64);
    let mut cuts = vec![];
    for round in 0..RANDOM_CUTS {
        let longest = [3, 17, 200, 2_000][round % 4];
        let (mut rest, mut parts) = (reply, vec![]);
        while !rest.is_empty() {
            let (part, after) = rest.split_at((1 + dice.roll(longest)).min(rest.len()));
            parts.push(part);
            if dice.roll(9) == 0 {
                parts.push(&[]); // a read that brings nothing
            }
            rest = after;
        }
        cuts.push(parts);
    }
    cuts
}

/// Holds what comes of a reply in each way to cut it against what comes of the whole, and of each record that was not `seen` yet.
fn alike<T: PartialEq>(recording: &Recording, seen: &mut HashSet<Vec<u8>>, make: impl Fn(&[&[u8]]) -> T) {
    let (name, reply) = (&recording.name, recording.reply.as_slice());
    let whole = make(&[reply]);
    assert!(make(&reply.chunks(1).collect::<Vec<_>>()) == whole, "{name}: byte by byte");
    for at in places(reply) {
        assert!(make(&[&reply[..at], &reply[at..]]) == whole, "{name}: cut at {at}");
    }
    for (number, parts) in random_cuts(reply).iter().enumerate() {
        assert!(make(parts) == whole, "{name}: random cut {number}");
    }
    if every_place() || reply.len() <= EVERY_PLACE_BYTES {
        return;
    }
    for record in records(recording, reply) {
        let key = [format!("{:?}", recording.endpoint).as_bytes(), record].concat();
        if !seen.insert(key) {
            continue;
        }
        let alone = make(&[record]);
        for at in 1..record.len() {
            assert!(make(&[&record[..at], &record[at..]]) == alone, "{name}: a record of it, cut at {at}");
        }
    }
}

fn usage_survives_any_chunk_boundary(version: &str) {
    let mut counted = 0;
    let (mut kinds, mut seen) = (HashSet::new(), HashSet::new());
    for recording in recordings(version) {
        let reply = recording.reply.as_slice();
        let whole = metered(&recording, [reply]);
        check(&recording, whole, format_args!("whole"));
        counted += usize::from(whole.output_tokens.is_some());
        if recording.status() >= 400 && reply.starts_with(b"{") {
            assert!(whole.error_frame, "{}", recording.name);
        }
        alike(&recording, &mut seen, |parts| metered(&recording, parts.iter().copied()));

        if reply.len() > EVERY_TWO_PLACES_BYTES {
            continue;
        }
        // Most small replies differ in numbers and words only.
        let known = (whole.input_tokens.is_some(), whole.output_tokens.is_some(), whole.load_duration_ns.is_some());
        let ending = (whole.finish_reason, whole.terminal, whole.error_frame);
        if !kinds.insert(format!("{:?} {:?} {known:?} {ending:?}", recording.endpoint, recording.framing)) {
            continue;
        }
        for first in 0..=reply.len() {
            for second in first..=reply.len() {
                let parts = [&reply[..first], &reply[first..second], &reply[second..]];
                check(&recording, metered(&recording, parts), format_args!("cut at {first} and {second}"));
            }
        }
    }
    assert!(counted > 10, "{version}: {counted} replies with counts");
}

#[test]
fn usage_survives_any_chunk_boundary_in_0_17_4() {
    usage_survives_any_chunk_boundary("0.17.4");
}

#[test]
fn usage_survives_any_chunk_boundary_in_0_24_0() {
    usage_survives_any_chunk_boundary("0.24.0");
}

#[test]
fn usage_survives_any_chunk_boundary_in_0_33_0() {
    usage_survives_any_chunk_boundary("0.33.0-rc2");
}

/// Everything that is read and made of a stream on its way, in the order of `proxy::reply`: what is sent, what is counted, and what the
/// error frame behind it would have to know.
#[derive(PartialEq)]
struct Passed {
    sent: Vec<u8>,
    usage: Usage,
    told_error: bool,
    mid_record: bool,
    next_event: u64,
}

fn passed(recording: &Recording, hides: bool, parts: &[&[u8]]) -> Passed {
    let mut meter = Meter::new(recording.endpoint, recording.framing);
    let mut mender = Mender::new(recording.endpoint, recording.framing);
    let mut mended = vec![];
    for part in parts {
        meter.feed(part);
        mended.push(mender.pass(Bytes::copy_from_slice(part)));
    }
    mended.push(mender.finish());
    let parts = mended.iter().map(|part| &part[..]);
    let sent = if hides { hidden(recording.endpoint, parts) } else { parts.collect::<Vec<_>>().concat() };
    Passed {
        sent,
        usage: meter.finish(),
        told_error: mender.told_error(),
        mid_record: mender.is_mid_record(),
        next_event: mender.next_event(),
    }
}

fn is_chat_stream(recording: &Recording) -> bool {
    recording.endpoint == Endpoint::ChatCompletions && recording.framing == Framing::Sse
}

/// What a client of `/v1/responses` gets where the backend is asked for a chat.
fn converted(parts: &[&[u8]]) -> Vec<u8> {
    let asked = convert::request(br#"{"model":"m","input":"x","stream":true}"#, Filters::NONE, "req-1", NOW);
    let reply = asked.unwrap_or_else(|_| panic!("it can be converted")).reply;
    let mut mender = Mender::new(Endpoint::ChatCompletions, Framing::Sse);
    let mut events = Events::new(reply, 1 << 20);
    let mut sent = vec![];
    for part in parts {
        sent.extend(events.pass(&mender.pass(Bytes::copy_from_slice(part)), NOW));
    }
    sent.extend(events.pass(&mender.finish(), NOW));
    sent.extend(events.finish(NOW));
    if !events.has_ended() {
        sent.extend(events.fail_with("it ended", NOW));
    }
    sent
}

#[test]
fn what_a_client_is_sent_of_a_recorded_stream_is_the_same_at_any_split() {
    let (mut mended, mut hidden, mut seen) = (0, 0, HashSet::new());
    for recording in VERSIONS.into_iter().flat_map(recordings) {
        if recording.framing != Framing::Sse || recording.status() != 200 {
            continue;
        }
        // The hider works behind the mender, so both are seen at once.
        let hides = recording.endpoint.as_str().contains("completions");
        mended += 1;
        hidden += usize::from(hides);
        alike(&recording, &mut seen, |parts| passed(&recording, hides, parts));
    }
    assert!(mended > 100 && hidden > 50, "{mended} streams, {hidden} of them with counts to hide");
}

#[test]
fn a_recorded_chat_becomes_the_same_response_at_any_split() {
    let (mut chats, mut seen) = (0, HashSet::new());
    for recording in VERSIONS.into_iter().flat_map(recordings) {
        if is_chat_stream(&recording) && recording.status() == 200 {
            chats += 1;
            alike(&recording, &mut seen, converted);
        }
    }
    assert!(chats > 30, "{chats}");
}

#[test]
fn replies_that_were_given_to_bifrost_come_out_the_same_at_any_split() {
    let (mut streams, mut whole, mut seen) = (0, 0, HashSet::new());
    for recording in given_to_bifrost() {
        if recording.framing == Framing::Json {
            whole += 1;
            alike(&recording, &mut seen, |parts| metered(&recording, parts.iter().copied()));
            continue;
        }
        streams += 1;
        alike(&recording, &mut seen, |parts| passed(&recording, true, parts));
        if is_chat_stream(&recording) {
            alike(&recording, &mut HashSet::new(), converted);
        }
    }
    assert!(streams > 20 && whole > 10, "{streams} streams, {whole} others");
}

#[test]
fn broken_replies_are_read_as_an_auditor_should_at_any_split() {
    let mut seen = HashSet::new();
    let all = broken::all();
    assert!(all.len() > 150, "{}", all.len());
    for broken in all {
        broken.check(&metered(&broken.recording, [broken.recording.reply.as_slice()]));
        let recording = &broken.recording;
        alike(recording, &mut seen, |parts| metered(recording, parts.iter().copied()));
    }
}

#[test]
fn what_a_client_is_sent_of_a_broken_stream_is_the_same_at_any_split() {
    let mut seen = HashSet::new();
    for broken in broken::all() {
        let recording = &broken.recording;
        if recording.framing != Framing::Sse {
            continue;
        }
        let hides = recording.endpoint.as_str().contains("completions");
        alike(recording, &mut seen, |parts| passed(recording, hides, parts));
        // Whatever could be counted was hidden from whoever did not ask for it.
        let sent = passed(recording, hides, &[&recording.reply]).sent;
        let counted = broken.read.output.is_some() && hides;
        let told = |count: &str| sent.windows(count.len()).any(|window| window == count.as_bytes());
        assert!(!counted || !told("\"completion_tokens\":17"), "{}: the counts are hidden", recording.name);
    }
}

#[test]
fn a_broken_chat_becomes_the_same_response_at_any_split() {
    let mut seen = HashSet::new();
    for broken in broken::all() {
        if is_chat_stream(&broken.recording) {
            alike(&broken.recording, &mut seen, converted);
            let text = String::from_utf8(converted(&[&broken.recording.reply])).expect("UTF-8");
            let ends = ["response.completed", "response.incomplete", "response.failed"];
            let ended = ends.iter().filter(|end| text.contains(&format!("event: {end}\n"))).count();
            assert_eq!(ended, 1, "{}: one end", broken.recording.name);
            let completed = text.contains("event: response.completed\n");
            // What is not understood is not passed over: it may have been a part of the answer.
            let chat = String::from_utf8_lossy(&broken.recording.reply);
            let mut data = chat.lines().filter_map(|line| line.strip_prefix("data:"));
            let is_read = data.all(|data| data.trim() == "[DONE]" || serde_json::from_str::<Value>(data).is_ok());
            let is_whole = broken.read.terminal && !broken.read.error && broken.read.finish.is_some() && is_read;
            assert_eq!(completed, is_whole, "{}: it is complete if it was", broken.recording.name);
        }
    }
}

/// Counts behind a million numbers, in the replies that can have such: what comes before them is as long as a prompt.
#[test]
fn counts_behind_a_million_numbers_are_found_at_any_split() {
    let numbers = "128000,".repeat(999_999) + "128000";
    let native = format!(
        "{{\"model\":\"m\",\"response\":\"\",\"done\":true,\"done_reason\":\"stop\",\"context\":[{numbers}],\"total_duration\":5,\"prompt_eval_count\":24,\"eval_count\":17}}\n"
    );
    let openai = format!(
        "{{\"choices\":[{{\"index\":0,\"logprobs\":{{\"bytes\":[{numbers}]}},\"finish_reason\":\"stop\"}}],\"usage\":{{\"prompt_tokens\":24,\"completion_tokens\":17}}}}\n"
    );
    let response = format!(
        "event: response.completed\ndata: {{\"response\":{{\"output\":[{{\"bytes\":[{numbers}]}}],\"status\":\"completed\",\"usage\":{{\"input_tokens\":24,\"output_tokens\":17}}}},\"type\":\"response.completed\"}}\n\n"
    );
    for (endpoint, framing, reply) in [
        (Endpoint::Generate, Framing::Ndjson, &native),
        (Endpoint::Generate, Framing::Json, &native),
        (Endpoint::ChatCompletions, Framing::Json, &openai),
        (Endpoint::Responses, Framing::Sse, &response),
    ] {
        let reply = reply.as_bytes();
        let read = |before: &Meter, parts: &mut dyn Iterator<Item = &[u8]>| {
            let mut meter = before.clone();
            parts.for_each(|part| meter.feed(part));
            let usage = meter.finish();
            (usage.input_tokens, usage.output_tokens, usage.terminal)
        };
        let fresh = Meter::new(endpoint, framing);
        let wanted = (Some(24), Some(17), true);
        for size in [16_384, reply.len()] {
            assert_eq!(read(&fresh, &mut reply.chunks(size)), wanted, "{endpoint:?} in parts of {size}");
        }
        // Every place around the counts, from the state that the meter has after all the numbers.
        let near = reply.len() - 250;
        let mut before = fresh;
        before.feed(&reply[..near]);
        let rest = &reply[near..];
        assert_eq!(read(&before, &mut rest.chunks(1)), wanted, "{endpoint:?} byte by byte");
        for at in 0..=rest.len() {
            assert_eq!(read(&before, &mut [&rest[..at], &rest[at..]].into_iter()), wanted, "{endpoint:?} cut at {at}");
        }
    }
}
