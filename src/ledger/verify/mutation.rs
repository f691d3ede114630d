//! Logs changed in thousands of ways, each of which must show.
//!
//! What cannot show in principle is told apart by one rule, whatever the way: a change that leaves every line as it was up to the last one
//! that a kept checkpoint, another chain's head or an adoption names. Behind that, lines can be cut off, or written anew with
//! hashes of their own; nobody but the attacker knows what stood there. Even then the verdict says that the chain has no end, or how many of its
//! lines nothing signed covers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::honest::{Log, Shape};
use super::tests::against;
use super::*;
use crate::ledger::chain::Head;

/// Shared with the log as it was, but for those that a change touches.
type Files = BTreeMap<String, Arc<Vec<u8>>>;
type Change = fn(&mut Files, &mut StdRng);

/// Every kind of change. Those that make hashes anew are what somebody does who can write the files and has not the key.
const WAYS: [(&str, Change); 21] = [
    ("a byte is flipped", flip_byte),
    ("bytes are overwritten", overwrite),
    ("bytes are cut out", cut_out),
    ("bytes are put in", put_in),
    ("a line is deleted", delete_line),
    ("a line is repeated behind itself", repeat_line),
    ("a line is repeated elsewhere", repeat_elsewhere),
    ("two lines change places", swap_lines),
    ("a line is moved", move_line),
    ("a line is inserted with hashes of its own", insert_forged),
    ("a line is edited", edit),
    ("a line is edited and its hash made anew", edit_and_hash),
    ("a line is edited and all hashes after it made anew", edit_and_hash_the_rest),
    ("a line is deleted and all hashes after it made anew", delete_and_hash_the_rest),
    ("a line is written in another JSON", respell),
    ("the end is cut off", cut_end),
    ("the end is cut off between lines", cut_lines),
    ("a line is appended with hashes of its own", append_forged),
    ("a file is deleted", delete_file),
    ("two files change names", swap_files),
    ("two files are joined", join_files),
];

fn pick(files: &Files, rng: &mut StdRng) -> String {
    files.keys().collect::<Vec<_>>().choose(rng).expect("files").to_string()
}

fn lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
}

/// Changes the lines of one file; the second argument is the number of one of them.
fn on_lines(files: &mut Files, rng: &mut StdRng, change: impl FnOnce(&mut Vec<Vec<u8>>, usize, &mut StdRng)) {
    let name = pick(files, rng);
    let mut all = lines(&files[&name]);
    if !all.is_empty() {
        let at = rng.gen_range(0..all.len());
        change(&mut all, at, rng);
    }
    files.insert(name, all.concat().into());
}

fn on_bytes(files: &mut Files, rng: &mut StdRng, change: impl FnOnce(&mut Vec<u8>, usize, &mut StdRng)) {
    let name = pick(files, rng);
    let bytes = Arc::make_mut(files.get_mut(&name).expect("picked"));
    if !bytes.is_empty() {
        let at = rng.gen_range(0..bytes.len());
        change(bytes, at, rng);
    }
}

fn flip_byte(files: &mut Files, rng: &mut StdRng) {
    on_bytes(files, rng, |bytes, at, rng| bytes[at] ^= rng.gen_range(1..=255u8));
}

fn overwrite(files: &mut Files, rng: &mut StdRng) {
    on_bytes(files, rng, |bytes, at, rng| {
        let end = (at + rng.gen_range(1..300)).min(bytes.len());
        bytes[at..end].fill_with(|| rng.gen_range(b' '..=b'~'));
    });
}

fn cut_out(files: &mut Files, rng: &mut StdRng) {
    on_bytes(files, rng, |bytes, at, rng| _ = bytes.drain(at..(at + rng.gen_range(1..900)).min(bytes.len())));
}

fn put_in(files: &mut Files, rng: &mut StdRng) {
    on_bytes(files, rng, |bytes, at, rng| {
        let more: Vec<u8> = (0..rng.gen_range(1..40)).map(|_| rng.gen_range(b'\n'..=b'~')).collect();
        _ = bytes.splice(at..at, more);
    });
}

fn delete_line(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, _| _ = lines.remove(at));
}

fn repeat_line(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, _| lines.insert(at + 1, lines[at].clone()));
}

fn repeat_elsewhere(files: &mut Files, rng: &mut StdRng) {
    let from = pick(files, rng);
    let line = lines(&files[&from]).choose(rng).cloned().unwrap_or_default();
    on_lines(files, rng, |lines, at, _| lines.insert(at, line));
}

fn swap_lines(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, rng| {
        let other = rng.gen_range(0..lines.len());
        lines.swap(at, other);
    });
}

fn move_line(files: &mut Files, rng: &mut StdRng) {
    let mut moved = Vec::new();
    on_lines(files, rng, |lines, at, _| moved = lines.remove(at));
    on_lines(files, rng, |lines, at, _| lines.insert(at, moved));
}

/// The event of a line with one of its values changed, still canonical; the line's own where it has none to change.
fn edited(line: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let Some(sealed) = chain::open(line.strip_suffix(b"\n").unwrap_or(line)) else { return line.to_vec() };
    let mut event: serde_json::Value = serde_json::from_slice(&sealed.event).expect("our own");
    let column =
        ["agent_id", "target", "response_code", "policy_result", "error", "timestamp"].choose(rng).expect("some");
    event[*column] = format!("changed {}", rng.r#gen::<u32>()).into();
    chain::canonical(&event).expect("whole numbers")
}

fn open_line(line: &[u8]) -> Option<chain::Sealed> {
    chain::open(line.strip_suffix(b"\n")?)
}

fn sealed_anew(event: &[u8], previous: Head) -> (Vec<u8>, Head) {
    let mut line = Vec::new();
    let head = chain::seal(event, previous, &mut line);
    (line, head)
}

fn edit(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, rng| {
        let Some(sealed) = open_line(&lines[at]) else { return lines[at].push(b'x') };
        let event = edited(&lines[at], rng);
        let tail = lines[at][sealed.event.len() - 1..].to_vec();
        lines[at] = [&event[..event.len() - 1], &tail].concat();
    });
}

fn edit_and_hash(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, rng| {
        let Some(sealed) = open_line(&lines[at]) else { return lines[at].push(b'x') };
        lines[at] = sealed_anew(&edited(&lines[at], rng), sealed.previous).0;
    });
}

/// Chains the rest of the chain anew, through all of its segments, as somebody without the key can.
fn hash_the_rest(files: &mut Files, name: &str, from: usize, mut head: Head) {
    let writer = name.parse::<SegmentName>().expect("a segment").writer;
    let of_writer: Vec<_> =
        files.keys().filter(|file| file.contains(writer.as_str()) && file.as_str() >= name).cloned().collect();
    for (place, file) in of_writer.iter().enumerate() {
        let mut all = lines(&files[file]);
        for line in all.iter_mut().skip(if place == 0 { from } else { 0 }) {
            if let Some(sealed) = open_line(line) {
                // A mark says the head before it too.
                let mut event: serde_json::Value = serde_json::from_slice(&sealed.event).expect("our own");
                if matches!(event["extra"]["phase"].as_str(), Some("checkpoint" | "segment_close")) {
                    event["extra"]["head"] = head.to_string().into();
                }
                (*line, head) = sealed_anew(&chain::canonical(&event).expect("whole numbers"), head);
            }
        }
        files.insert(file.clone(), all.concat().into());
    }
}

fn edit_and_hash_the_rest(files: &mut Files, rng: &mut StdRng) {
    let name = pick(files, rng);
    let mut all = lines(&files[&name]);
    let at = rng.gen_range(0..all.len());
    let Some(sealed) = open_line(&all[at]) else { return };
    let (line, head) = sealed_anew(&edited(&all[at], rng), sealed.previous);
    all[at] = line;
    files.insert(name.clone(), all.concat().into());
    hash_the_rest(files, &name, at + 1, head);
}

fn delete_and_hash_the_rest(files: &mut Files, rng: &mut StdRng) {
    let name = pick(files, rng);
    let mut all = lines(&files[&name]);
    let at = rng.gen_range(0..all.len());
    let Some(sealed) = open_line(&all[at]) else { return };
    all.remove(at);
    files.insert(name.clone(), all.concat().into());
    hash_the_rest(files, &name, at, sealed.previous);
}

fn insert_forged(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, rng| {
        let Some(sealed) = open_line(&lines[at]) else { return };
        let line = sealed_anew(&edited(&lines[at], rng), sealed.hash).0;
        lines.insert(at + 1, line);
    });
}

fn append_forged(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, rng| {
        let Some(last) = lines.iter().rev().find_map(|line| open_line(line)) else { return };
        let line = sealed_anew(&edited(&lines[at], rng), last.hash).0;
        lines.push(line);
    });
}

fn respell(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, rng| {
        let text = String::from_utf8_lossy(&lines[at]).into_owned();
        let text = match rng.gen_range(0..5) {
            0 => text.replacen(':', ": ", 1),
            1 => text.replacen("null", "null ", 1),
            2 => text.replace('\n', "\r\n"),
            3 => text.replacen("\"id\"", "\"\\u0069d\"", 1),
            _ => text.replacen("{\"action\":", "{\"action\":null,\"action\":", 1),
        };
        lines[at] = text.into_bytes();
    });
}

fn cut_end(files: &mut Files, rng: &mut StdRng) {
    on_bytes(files, rng, |bytes, at, _| bytes.truncate(at));
}

fn cut_lines(files: &mut Files, rng: &mut StdRng) {
    on_lines(files, rng, |lines, at, _| lines.truncate(at));
}

fn delete_file(files: &mut Files, rng: &mut StdRng) {
    let name = pick(files, rng);
    files.remove(&name);
}

fn swap_files(files: &mut Files, rng: &mut StdRng) {
    let (one, other) = (pick(files, rng), pick(files, rng));
    let (a, b) = (files[&one].clone(), files[&other].clone());
    files.insert(one, b);
    files.insert(other, a);
}

fn join_files(files: &mut Files, rng: &mut StdRng) {
    let (one, other) = (pick(files, rng), pick(files, rng));
    if one != other {
        let tail = files.remove(&other).expect("picked");
        Arc::make_mut(files.get_mut(&one).expect("picked")).extend(tail.iter());
    }
}

/// The bytes of a chain up to its line number `count`, segment by segment, torn ones included where all of it is known.
fn known(files: &Files, writer: WriterName, count: u64, before: u64) -> Vec<Vec<u8>> {
    let mut left = count.saturating_sub(before);
    let mut known = Vec::new();
    for (_, bytes) in files.iter().filter(|(name, _)| name.contains(writer.as_str())) {
        let of_segment: Vec<_> = lines(bytes).into_iter().take(usize::try_from(left).unwrap_or(usize::MAX)).collect();
        left = left.saturating_sub(of_segment.len() as u64);
        known.push(of_segment.concat());
    }
    known.retain(|segment| !segment.is_empty());
    known
}

/// How many lines of a chain stood in segments that were deleted.
fn deleted_before(files: &Files, writer: WriterName) -> u64 {
    let first = files.iter().find(|(name, _)| name.contains(writer.as_str())).map(|(_, bytes)| lines(bytes));
    let open = first.and_then(|lines| open_line(lines.first()?)).map(|sealed| sealed.event);
    let event: Option<serde_json::Value> = open.and_then(|event| serde_json::from_slice(&event).ok());
    event.and_then(|event| event["extra"]["count"].as_u64()).unwrap_or(0)
}

/// How many changes showed, and how many were behind the last known line.
#[derive(Default)]
struct Tally {
    found: usize,
    behind: usize,
}

/// `times` changes, shared out among as many threads.
fn mutations_show(times: usize, seed: u64, shape: &Shape, threads: usize) {
    let log = Log::of(seed, shape);
    let began = std::time::Instant::now();
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let shares: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn({
                    let log = &log;
                    move || share(log, (thread..times).step_by(threads), seed)
                })
            })
            .collect();
        shares.into_iter().map(|share| share.join().expect("all of them show")).collect()
    });
    let sum = |of: fn(&Tally) -> usize| tallies.iter().map(of).sum::<usize>();
    let (found, behind) = (sum(|tally| tally.found), sum(|tally| tally.behind));
    let megabytes = log.files.values().map(Vec::len).sum::<usize>() as f64 / 1e6;
    println!(
        "{times} changes of {} records ({megabytes:.1} MB, {} segments): {found} found, {behind} behind the last known line told of, \
         {} of no effect; {:.0} s",
        shape.records,
        log.files.len(),
        times - found - behind,
        began.elapsed().as_secs_f64()
    );
    assert!(found > times * 8 / 10, "the changes are of what is known: {found} of {times}");
}

fn share(log: &Log, rounds: impl Iterator<Item = usize>, seed: u64) -> Tally {
    let dir = tempfile::tempdir().expect("a folder");
    log.write(dir.path());
    let against = against(dir.path(), true);
    let check = || verify(dir.path(), &against).expect("checked");
    let clean = check();
    assert!(clean.holds(), "{:?}", clean.problems);
    let gaps = serde_json::to_string(&clean.gaps).expect("JSON");
    let files: Files = log.files.iter().map(|(name, bytes)| (name.clone(), Arc::new(bytes.clone()))).collect();
    let covered: BTreeMap<WriterName, _> = (log.covered().into_iter())
        .map(|(writer, count)| {
            let before = deleted_before(&files, writer);
            (writer, (count, before, known(&files, writer, count, before)))
        })
        .collect();
    let mut tally = Tally::default();
    for round in rounds {
        let (way, change) = WAYS[round % WAYS.len()];
        let mut changed = files.clone();
        // Each round has its own, so that one can be run again alone.
        change(&mut changed, &mut StdRng::seed_from_u64(seed << 32 | round as u64));
        let names: BTreeSet<&String> = changed.keys().chain(files.keys()).collect();
        let touched: Vec<&String> = names.into_iter().filter(|name| changed.get(*name) != files.get(*name)).collect();
        if touched.is_empty() {
            continue;
        }
        let put = |name: &String, from: &Files| match from.get(name) {
            Some(bytes) => std::fs::write(dir.path().join(name), &**bytes).expect("written"),
            None => std::fs::remove_file(dir.path().join(name)).expect("removed"),
        };
        touched.iter().for_each(|name| put(name, &changed));
        let verdict = check();
        let writers: BTreeSet<_> =
            touched.iter().map(|name| name.parse::<SegmentName>().expect("ours").writer).collect();
        let in_principle = writers.into_iter().any(|writer| {
            covered.get(&writer).is_some_and(|(count, before, was)| known(&changed, writer, *count, *before) != *was)
        });
        if in_principle {
            tally.found += 1;
            assert!(!verdict.holds(), "seed {seed}, round {round}: {way}, and nothing shows");
        } else {
            tally.behind += 1;
            let told = !verdict.holds() || serde_json::to_string(&verdict.gaps).expect("JSON") != gaps;
            assert!(told, "seed {seed}, round {round}: {way} at the unsigned end, and not even a gap says so");
        }
        touched.iter().for_each(|name| put(name, &files));
    }
    tally
}

#[test]
fn twelve_hundred_changes_of_a_log_with_crashes_all_show() {
    mutations_show(
        1200,
        7,
        &Shape { records: 30, writers: 3, crashes: 50, rotations: 10, checkpoints: 10, retention: false, closed: true },
        1,
    );
}

#[test]
fn eight_hundred_changes_of_a_log_with_retention_all_show() {
    mutations_show(
        800,
        8,
        &Shape { records: 40, writers: 2, crashes: 0, rotations: 15, checkpoints: 10, retention: true, closed: true },
        1,
    );
}

#[test]
#[ignore = "hours in a debug build: tests/long/run"]
fn a_hundred_thousand_changes_of_a_log_of_ten_thousand_records_all_show() {
    let shape = Shape {
        records: 10_000,
        writers: 4,
        crashes: 50,
        rotations: 1,
        checkpoints: 1,
        retention: false,
        closed: true,
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    mutations_show(100_000, 9, &shape, threads);
}
