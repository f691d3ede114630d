//! What the work on a reply's bytes costs: counting them, mending what a backend says of its failure, hiding the counts that nobody asked
//! for, and making a response out of a chat; and what the conversion of a request costs. Prints a section for bench/RESULTS.md.
//!
//! ```text
//! cargo run --release --example dialect_cost
//! ```
//! Times are of the CPU, of one thread, in microseconds: the median of the rounds, and their range.
use std::hint::black_box;

use behavry_ollama_proxy::wire::convert::{self, Events};
use behavry_ollama_proxy::wire::mend::Mender;
use behavry_ollama_proxy::wire::rewrite::UsageHider;
use behavry_ollama_proxy::wire::{Endpoint, Filter, Filters, Framing, Meter, ask};
use bytes::Bytes;

#[path = "cost/cpu.rs"]
mod cpu;
#[path = "cost/rounds.rs"]
mod rounds;

use rounds::{ROUNDS, measure};

const STREAMS: usize = 200;
const TOKENS: usize = 100;
const NOW_S: u64 = 1_800_000_000;
const LIMIT_BYTES: usize = 8 << 20;

/// What is done with the chunks of a stream.
type Pass = fn(&[Bytes]) -> usize;

fn main() {
    println!("### Dialects (`cargo run --release --example dialect_cost`), CPU µs\n");
    println!(
        "Median (range) of {ROUNDS} rounds of {STREAMS} streams of {TOKENS} tokens, each record a chunk of its own.\n"
    );
    println!("| what is done with a record of `/v1/chat/completions` | µs a record |\n|---|---|");
    let chunks = stream();
    let rows: [(&str, Pass); 4] = [
        ("counted", counted),
        ("counted and mended", mended),
        ("counted, mended, and the counts hidden that were not asked for", hidden),
        ("counted, mended, and made one of `/v1/responses`", converted),
    ];
    for (what, pass) in rows {
        let cost = measure(STREAMS * TOKENS, || || done((0..STREAMS).map(|_| pass(black_box(&chunks))).sum()));
        println!("| {what} | {cost} |");
    }
    println!("\n| a request of `/v1/responses` | bytes | facts read | converted as well |\n|---|---|---|---|");
    for (what, body) in [
        ("one short text", r#"{"model":"llama3.2","input":"Say hello.","stream":true}"#.to_owned()),
        ("20 messages and 10 tools", agents(200)),
        ("the same with 50 KB in each message", agents(50_000)),
    ] {
        let filters: Filters = Filter::ALL.into_iter().collect();
        let read = || ask::read_filtered(Endpoint::Responses, black_box(body.as_bytes()), filters).is_ok();
        let convert = || convert::request(black_box(body.as_bytes()), filters, "request", NOW_S).is_ok();
        let times = (2_000_000 / body.len()).clamp(3, 1000);
        let alone = measure(times, || || done((0..times).map(|_| usize::from(read())).sum()));
        let both = measure(times, || || done((0..times).map(|_| usize::from(read() && convert())).sum()));
        println!("| {what} | {} | {alone} | {both} |", body.len());
    }
}

/// As Ollama 0.33 writes it.
fn stream() -> Vec<Bytes> {
    let head = r#"{"id":"chatcmpl-42","object":"chat.completion.chunk","created":1787360523,"model":"llama3.2","system_fingerprint":"fp_ollama""#;
    let event = |rest: &str| Bytes::from(format!("data: {head},{rest}}}\n\n"));
    let delta =
        |n| event(&format!(r#""choices":[{{"index":0,"delta":{{"content":" word{n}"}},"finish_reason":null}}]"#));
    let mut chunks: Vec<Bytes> = (0..TOKENS).map(delta).collect();
    chunks.push(event(r#""choices":[{"index":0,"delta":{},"finish_reason":"stop"}]"#));
    chunks.push(event(r#""choices":[],"usage":{"prompt_tokens":26,"completion_tokens":101,"total_tokens":127}"#));
    chunks.push(Bytes::from_static(b"data: [DONE]\n\n"));
    chunks
}

fn counted(chunks: &[Bytes]) -> usize {
    let mut meter = Meter::new(Endpoint::ChatCompletions, Framing::Sse);
    chunks.iter().for_each(|chunk| meter.feed(chunk));
    meter.finish().output_tokens.map_or(0, |tokens| tokens as usize)
}

/// The meter sees what came; `then` gets what the mender lets pass.
fn after_mender(chunks: &[Bytes], mut then: impl FnMut(Bytes) -> usize) -> usize {
    let mut meter = Meter::new(Endpoint::ChatCompletions, Framing::Sse);
    let mut mender = Mender::new(Endpoint::ChatCompletions, Framing::Sse);
    let mut bytes = 0;
    for chunk in chunks {
        meter.feed(chunk);
        bytes += then(mender.pass(chunk.clone()));
    }
    meter.finish();
    bytes + then(mender.finish())
}

fn mended(chunks: &[Bytes]) -> usize {
    after_mender(chunks, |passed| passed.len())
}

fn hidden(chunks: &[Bytes]) -> usize {
    let mut hider = UsageHider::new(Endpoint::ChatCompletions);
    after_mender(chunks, |passed| hider.pass(passed).len())
}

fn converted(chunks: &[Bytes]) -> usize {
    let body = br#"{"model":"llama3.2","input":"Say hello.","stream":true}"#;
    let Ok(converted) = convert::request(body, Filters::NONE, "request", NOW_S) else { return 0 };
    let mut events = Events::new(converted.reply, LIMIT_BYTES);
    let bytes = after_mender(chunks, |passed| events.pass(&passed, NOW_S).len());
    assert!(events.has_ended() && events.failed().is_none());
    bytes
}

/// What an agent sends: a conversation and its tools.
fn agents(text_bytes: usize) -> String {
    let text = "lorem ipsum ".repeat(text_bytes / 12);
    let item = |n| {
        let (role, part) = if n % 2 == 0 { ("user", "input_text") } else { ("assistant", "output_text") };
        format!(r#"{{"type":"message","role":"{role}","content":[{{"type":"{part}","text":"{text}"}}]}}"#)
    };
    let tool = |n| {
        format!(
            r#"{{"type":"function","name":"tool_{n}","description":"Does something with a path.","parameters":{{"type":"object","properties":{{"path":{{"type":"string"}},"lines":{{"type":"integer"}}}},"required":["path"]}}}}"#
        )
    };
    let items: Vec<String> = (0..20).map(item).collect();
    let tools: Vec<String> = (0..10).map(tool).collect();
    format!(
        r#"{{"model":"llama3.2","instructions":"Be brief.","input":[{}],"tools":[{}],"store":false,"stream":true}}"#,
        items.join(","),
        tools.join(",")
    )
}

/// A round that did nothing measures nothing.
fn done(made: usize) {
    assert!(black_box(made) > 0);
}
