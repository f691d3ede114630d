//! What the audit costs: putting a record into words, chaining its line, and checking it later. In CPU time of one thread, the best of
//! some rounds, so that a busy machine does not count.
//!
//! ```text
//! cargo run --release --locked --example audit_cost
//! ```
//! Not by instruction counts: valgrind knows no SHA instructions, so it would count a hash in software that no server runs.
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use behavry_ollama_proxy::ledger::chain::mark::Mark;
use behavry_ollama_proxy::ledger::chain::{self, Head, SegmentName, WriterName, canonical};
use behavry_ollama_proxy::ledger::record::{Id, Moment};
use behavry_ollama_proxy::ledger::verify::{Against, verify};
use behavry_ollama_proxy::ledger::{Entry, Outcome, Phase, Record};

#[path = "cost/cpu.rs"]
mod cpu;

use cpu::thread_time;

const ROUNDS: usize = 15;
/// Records of a round; two for each request, as a reply that is no stream has them.
const RECORDS: usize = 20_000;

fn main() {
    let events: Vec<Vec<u8>> = (0..RECORDS).map(event).collect();
    let mut lines = Vec::new();
    let sealed = |lines: &mut Vec<u8>| {
        lines.clear();
        let mut head = Head::Genesis;
        for event in &events {
            head = chain::seal(event, head, lines);
        }
        head
    };
    sealed(&mut lines);
    let bytes = lines.len() / RECORDS;
    println!("{RECORDS} records of {bytes} bytes, CPU of each in ns, the best of {ROUNDS} rounds:");

    let mut text = Vec::new();
    show(
        "put into words (write_event)",
        best(&mut || {
            for number in 0..RECORDS {
                write(number, &mut text);
                black_box(&text);
            }
        }),
    );
    let mut copied = Vec::with_capacity(lines.len());
    show(
        "copied into the line, not chained",
        best(&mut || {
            copied.clear();
            for event in &events {
                copied.extend_from_slice(event);
                copied.push(b'\n');
            }
            black_box(&copied);
        }),
    );
    let mut again = Vec::with_capacity(lines.len());
    show("chained: hashed, and written with both hashes (seal)", best(&mut || _ = black_box(sealed(&mut again))));
    show(
        "canonical form checked by a scan",
        best(&mut || {
            assert!(events.iter().all(|event| canonical::scan(event, &mut |_, _, _| {})));
        }),
    );
    show(
        "the same by parsing, sorting and writing it anew",
        best(&mut || {
            assert!(events.iter().all(|event| {
                let value: serde_json::Value = serde_json::from_slice(event).expect("JSON");
                chain::canonical(&value).as_ref() == Ok(event)
            }));
        }),
    );

    let dir = std::env::temp_dir().join(format!("audit-cost-{}", std::process::id()));
    std::fs::create_dir(&dir).expect("a folder");
    let size = log(&dir, &events);
    let verdict = || verify(&dir, &Against::default()).expect("it can be read");
    assert!(verdict().holds(), "{:?}", verdict().problems);
    let each = best(&mut || _ = black_box(verdict()));
    show("audit verify, all of it", each);
    println!("audit verify: {:.0} MB/s on one core", size as f64 / (each.as_secs_f64() * RECORDS as f64) / 1e6);
    std::fs::remove_dir_all(&dir).expect("removed");
}

/// A log of one writer: how many bytes.
fn log(dir: &Path, events: &[Vec<u8>]) -> usize {
    let writer = WriterName::new(1_795_000_000, 1);
    let now = Moment::from_microseconds(1_795_000_000_000_000);
    let open = Mark::segment_open(writer, 1, 0, Vec::new(), "none").event(Id::new(now, [1; 10]), now);
    let mut text = Vec::new();
    let mut head = chain::seal(&open, Head::Genesis, &mut text);
    for event in events {
        head = chain::seal(event, head, &mut text);
    }
    std::fs::write(dir.join(SegmentName { writer, number: 1 }.to_string()), &text).expect("written");
    text.len()
}

fn event(number: usize) -> Vec<u8> {
    let mut text = Vec::new();
    write(number, &mut text);
    text
}

/// The two records of a request, in turn.
fn write(number: usize, into: &mut Vec<u8>) {
    let at = Moment::from_microseconds(1_795_000_000_000_000 + number as i64 * 500);
    let (exchange, ended) = (number as u64 / 2 + 1, number % 2 == 1);
    let roles = ["internal".to_owned()];
    let request = Entry {
        exchange,
        agent_id: Some("research-1"),
        session_id: Some("7b0c1f64-9a58-4f0e-8f0e-3a2f3b7c5d11"),
        agent_roles: Some(&roles),
        source_ip: Some([127, 0, 0, 1].into()),
        request_id: Some("0199c0de-0000-7000-8000-00000000f00d"),
        action: Some("POST"),
        target: Some("/api/chat"),
        dialect: Some("native"),
        model: Some("llama3.2"),
        model_raw: Some("llama3.2:latest"),
        stream: Some(true),
        has_system_prompt: Some(true),
        has_tools: Some(false),
        message_count: Some(12),
        policy_result: Some("allow"),
        policy_id: Some("behavry.authz"),
        policy_revision: Some("sha256:0123456789abcdef"),
        filters: Some(&[]),
        ..Entry::default()
    };
    let end = Entry {
        backend: Some("ollama"),
        retries: Some(0),
        queue_ms: Some(0),
        upstream_status: Some(200),
        response_code: Some(200),
        latency_ms: Some(5123),
        ttft_ms: Some(210),
        input_tokens: Some(1234),
        output_tokens: Some(567),
        finish_reason: Some("stop"),
        bytes_in: Some(4321),
        bytes_out: Some(98765),
        ..request
    };
    let (phase, outcome, entry) = match ended {
        true => (Phase::Final, Some(Outcome::Complete), &end),
        false => (Phase::Request, None, &request),
    };
    into.clear();
    Record::new(Id::of(at, phase, exchange), at, phase, outcome, entry).write_event(into);
}

/// CPU for one record in the best round.
fn best(round: &mut dyn FnMut()) -> Duration {
    let once = |round: &mut dyn FnMut()| {
        let began = thread_time();
        round();
        thread_time() - began
    };
    (0..ROUNDS).map(|_| once(round)).min().expect("some rounds") / RECORDS as u32
}

fn show(what: &str, each: Duration) {
    println!("{:>8}  {what}", each.as_nanos());
}
