use std::os::fd::AsRawFd;

use super::honest::{Log, Shape};
use super::*;
use crate::ledger::chain::mark::CloseReason;
use crate::ledger::chain::{Head, Mark};
use crate::ledger::record::{Id, Moment};
use crate::ledger::{Entry, Outcome, Phase, Record};

pub(super) fn against(folder: &Path, with_kept: bool) -> Against {
    let mut against = Against::default();
    against.key(&folder.join("audit-key.pub")).expect("the key");
    if with_kept {
        against.checkpoints(&folder.join("kept")).expect("the checkpoints");
    }
    against
}

fn check(folder: &Path, with_kept: bool) -> Verdict {
    verify(folder, &against(folder, with_kept)).expect("checked")
}

fn words(verdict: &Verdict) -> String {
    let problems = verdict.problems.iter().map(|problem| format!("problem: {problem}"));
    let gaps = verdict.gaps.iter().map(|gap| format!("gap: {gap}"));
    problems.chain(gaps).collect::<Vec<_>>().join("\n")
}

fn shape(seed: u64) -> Shape {
    Shape {
        records: 40 + (seed % 7) as usize * 30,
        writers: 1 + (seed % 5) as usize,
        crashes: if seed.is_multiple_of(3) { 80 } else { 30 },
        rotations: (seed % 4) as u32 * 3,
        checkpoints: 10,
        retention: seed.is_multiple_of(2),
        closed: !seed.is_multiple_of(5),
    }
}

/// The program in docs/audit.md, over the folder: whether it is content, and what it says.
fn python(folder: &Path) -> (bool, String) {
    let page = include_str!("../../../docs/audit.md");
    let (_, rest) = page.split_once("```python\n").expect("a program");
    let (program, _) = rest.split_once("```").expect("its end");
    let ran =
        std::process::Command::new("python3").args(["-c", program]).current_dir(folder).output().expect("python3");
    (ran.status.success(), String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned())
}

#[test]
fn ten_lines_of_python_come_to_the_same_verdict() {
    let shape =
        Shape { records: 60, writers: 3, crashes: 0, rotations: 5, checkpoints: 10, retention: true, closed: true };
    let log = Log::of(11, &shape);
    let dir = tempfile::tempdir().expect("a folder");
    log.write(dir.path());
    assert!(check(dir.path(), true).holds());
    let (content, said) = python(dir.path());
    assert!(content && said.starts_with("every hash holds"), "{said}");

    let (name, bytes) = log.files.iter().next_back().expect("files");
    let changed = String::from_utf8(bytes.clone()).expect("ASCII").replacen("\"POST\"", "\"GET\"", 1);
    std::fs::write(dir.path().join(name), changed).expect("written");
    let (content, said) = python(dir.path());
    assert!(!content && said.contains(": changed"), "{said}");
    assert!(!check(dir.path(), true).holds());
}

#[test]
fn what_cannot_be_checked_is_said_and_is_no_accusation() {
    let shape =
        Shape { records: 60, writers: 2, crashes: 0, rotations: 5, checkpoints: 10, retention: false, closed: true };
    let log = Log::of(12, &shape);
    let dir = tempfile::tempdir().expect("a folder");
    log.write(dir.path());
    let verdict = verify(dir.path(), &Against::default()).expect("checked");
    assert!(verdict.holds());
    assert_eq!(verdict.gaps, [Gap::NoKey, Gap::NoCheckpointsKept]);
    assert!(check(dir.path(), true).gaps.is_empty());

    // The end is cut off, from the last checkpoint on: without a copy of it only the missing close shows, with one all does.
    let (name, bytes) = log.files.iter().next_back().expect("files");
    let text = String::from_utf8(bytes.clone()).expect("ASCII");
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    std::fs::write(dir.path().join(name), lines[..lines.len() - 2].concat()).expect("cut");
    let without = check(dir.path(), false);
    assert!(without.holds() && without.gaps.iter().any(|gap| matches!(gap, Gap::Open { .. })), "{}", words(&without));
    let with = check(dir.path(), true);
    assert!(matches!(with.problems[..], [Problem { fault: Fault::ChainShorter { .. }, .. }]), "{}", words(&with));

    // The whole latest chain is gone.
    let writer = name.parse::<SegmentName>().expect("a segment").writer;
    for name in log.files.keys().filter(|name| name.contains(writer.as_str())) {
        std::fs::remove_file(dir.path().join(name)).expect("removed");
    }
    assert!(check(dir.path(), false).holds());
    assert!(matches!(check(dir.path(), true).problems[..], [Problem { fault: Fault::ChainGone { .. }, .. }]));
}

#[test]
fn a_segment_that_was_removed_is_named_although_requests_ran_across_its_ends() {
    let shape =
        Shape { records: 200, writers: 1, crashes: 0, rotations: 8, checkpoints: 5, retention: false, closed: true };
    for seed in 20..30 {
        let log = Log::of(seed, &shape);
        let names: Vec<SegmentName> = log.files.keys().map(|name| name.parse().expect("a segment")).collect();
        assert!(names.len() > 3, "{}", names.len());
        for removed in &names[1..names.len() - 1] {
            let dir = tempfile::tempdir().expect("a folder");
            log.write(dir.path());
            std::fs::remove_file(dir.path().join(removed.to_string())).expect("removed");
            let verdict = check(dir.path(), false);
            let [Problem { fault: Fault::Missing { segment, .. }, .. }] = verdict.problems[..] else {
                panic!("seed {seed}, {removed}: {}", words(&verdict));
            };
            assert_eq!(segment, removed.number + 1, "seed {seed}");
        }
    }
}

#[test]
fn a_pipe_with_a_segments_name_is_no_segment_and_nobody_waits_for_its_other_end() {
    let shape =
        Shape { records: 30, writers: 1, crashes: 0, rotations: 0, checkpoints: 10, retention: false, closed: true };
    let dir = tempfile::tempdir().expect("a folder");
    let log = Log::of(16, &shape);
    log.write(dir.path());
    let next = log.files.keys().next().and_then(|name| name.parse::<SegmentName>().ok()?.next()).expect("a name");
    let made = std::process::Command::new("mkfifo").arg(dir.path().join(next.to_string())).status().expect("mkfifo");
    assert!(made.success());
    let verdict = check(dir.path(), true);
    assert!(verdict.holds() && verdict.chains[0].segments == 1, "{}", words(&verdict));
}

#[test]
fn a_checkpoint_of_another_key_is_refused_whoever_shows_it() {
    let shape =
        Shape { records: 30, writers: 1, crashes: 0, rotations: 0, checkpoints: 10, retention: false, closed: true };
    let (ours, theirs) = (Log::of(13, &shape), Log::of(14, &shape));
    let (dir, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    ours.write(dir.path());
    theirs.write(other.path());
    let mut against = Against::default();
    against.key(&other.path().join("audit-key.pub")).expect("a key");
    let verdict = verify(dir.path(), &against).expect("checked");
    assert!(matches!(verdict.problems[..], [Problem { fault: Fault::UnknownKey { .. }, spot: Some(_) }]));
    assert!(against.checkpoints(&dir.path().join("kept")).is_err());
    assert!(against.checkpoints(&dir.path().join("none")).is_err());
    assert!(against.key(&dir.path().join("kept")).is_err());
    let empty = tempfile::tempdir().expect("a folder");
    assert!(matches!(verify(empty.path(), &Against::default()), Err(CannotCheck::NothingThere { .. })));
}

#[test]
fn a_writer_that_runs_is_told_from_one_that_died() {
    let shape =
        Shape { records: 30, writers: 1, crashes: 0, rotations: 0, checkpoints: 10, retention: false, closed: false };
    let log = Log::of(15, &shape);
    let dir = tempfile::tempdir().expect("a folder");
    log.write(dir.path());
    let verdict = check(dir.path(), false);
    assert!(verdict.holds() && verdict.chains[0].end == End::Open, "{}", words(&verdict));
    let file = File::open(dir.path().join(log.files.keys().next().expect("a file"))).expect("open");
    // SAFETY: a descriptor that is open.
    assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, 0);
    let verdict = check(dir.path(), false);
    assert!(verdict.holds() && verdict.chains[0].end == End::Running, "{}", words(&verdict));
}

/// A chain of one writer that was stopped in order, with these records: phase, exchange, and whether a backend is named. All are of
/// one request id.
fn chain_of(records: &[(Phase, u64, bool)]) -> Verdict {
    let writer = WriterName::new(1_795_000_000, 1);
    let (mut file, mut head, mut count, mut clock) = (Vec::new(), Head::Genesis, 0, 1_795_000_000_000_000);
    let mut add = |event: &dyn Fn(Moment, String, u64) -> Vec<u8>| {
        clock += 1;
        head = chain::seal(&event(Moment::from_microseconds(clock), head.to_string(), count), head, &mut file);
        count += 1;
    };
    add(&|at, _, _| Mark::segment_open(writer, 1, 0, Vec::new(), "key").event(Id::new(at, [1; 10]), at));
    for (phase, exchange, with_backend) in records {
        add(&|at, _, _| {
            let entry = Entry {
                request_id: Some("the same"),
                policy_result: Some("allow"),
                backend: with_backend.then_some("ollama"),
                ..Entry::default()
            };
            let outcome = (*phase == Phase::Final).then_some(Outcome::Complete);
            let mut event = Vec::new();
            Record::new(Id::of(at, *phase, *exchange), at, *phase, outcome, &entry).write_event(&mut event);
            event
        });
    }
    let key_id = || "key".to_owned();
    add(&|at, head, count| {
        let mark = Mark::Checkpoint { writer, segment: 1, count, head, key_id: key_id(), signature: String::new() };
        mark.event(Id::new(at, [2; 10]), at)
    });
    add(&|at, head, count| {
        let mark = Mark::SegmentClose { writer, segment: 1, count, head, reason: CloseReason::Stopped };
        mark.event(Id::new(at, [3; 10]), at)
    });
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join(SegmentName { writer, number: 1 }.to_string()), file).expect("written");
    verify(dir.path(), &Against::default()).expect("checked")
}

#[test]
fn records_of_one_request_are_told_from_those_of_another_that_chose_the_same_id() {
    use Phase::{Final, Request, StreamStart};
    let (one, other) = (1, 2);
    for records in [
        vec![
            (Request, one, false),
            (Request, other, false),
            (Final, other, true),
            (StreamStart, one, true),
            (Final, one, false),
        ],
        // The other was refused before it was recorded.
        vec![(Request, one, false), (Final, other, false), (Final, one, true)],
        // The 62 bits are what counts, as many as an id has room for.
        vec![(Request, one, false), (Final, one | 1 << 63, true)],
    ] {
        let verdict = chain_of(&records);
        assert!(verdict.holds(), "{records:?}: {}", words(&verdict));
    }
    let fault = |records: &[_]| chain_of(records).problems.into_iter().next().map(|problem| problem.fault);
    let request_id = || "the same".to_owned();
    // A record of the other is none of this one, though all of their words are the same.
    let left_open = fault(&[(Request, one, false), (Final, other, false)]);
    assert!(matches!(left_open, Some(Fault::LeftOpen { requests: 1, .. })), "{left_open:?}");
    for records in [
        vec![(Request, one, false), (Final, other, true)],
        vec![(Request, one, false), (StreamStart, other, true)],
        vec![(Request, one, false), (Final, one, true), (Final, one, true)],
    ] {
        assert_eq!(fault(&records), Some(Fault::WithoutRequest { request_id: request_id() }), "{records:?}");
    }
    let twice = fault(&[(Request, one, false), (Request, one, false)]);
    assert_eq!(twice, Some(Fault::RequestTwice { request_id: request_id() }));
}

fn clean_logs_hold(seeds: std::ops::Range<u64>) {
    let mut found = (0, 0, 0, 0);
    for seed in seeds.clone() {
        let log = Log::of(seed, &shape(seed));
        let dir = tempfile::tempdir().expect("a folder");
        log.write(dir.path());
        let verdict = check(dir.path(), !log.kept.is_empty());
        assert!(verdict.holds(), "seed {seed}:\n{}", words(&verdict));
        let crashed = verdict.chains.iter().filter(|chain| matches!(chain.end, End::Adopted | End::Open)).count();
        let segments = verdict.chains.iter().map(|chain| chain.segments as usize).sum::<usize>();
        let deleted = verdict.gaps.iter().filter(|gap| matches!(gap, Gap::Deleted { .. })).count();
        found = (found.0 + verdict.lines(), found.1 + segments, found.2 + crashed, found.3 + deleted);
    }
    let (lines, segments, crashed, deleted) = found;
    println!(
        "{} clean logs, {lines} lines in {segments} segments: no alarm; {crashed} writers had crashed, retention had cut {deleted} chains",
        seeds.count()
    );
    assert!(crashed > 0 && deleted > 0, "the logs have accidents");
}

#[test]
fn clean_logs_with_rotations_crashes_and_retention_raise_no_alarm() {
    clean_logs_hold(0..100);
}

#[test]
#[ignore = "minutes in a debug build: tests/long/run"]
fn thousands_of_clean_logs_raise_no_alarm() {
    clean_logs_hold(1000..4000);
}
