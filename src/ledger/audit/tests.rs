use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use serde_json::Value;

use super::*;
use crate::ledger::chain::mark::{CloseReason, TombstoneReason};
use crate::ledger::chain::{self, Head, Mark};

mod crashes;
mod segments;

/// Longer than any test takes; nothing is decided by it but how long a broken one runs.
const LONG: Duration = Duration::from_secs(60);

struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("behavry-audit-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("a folder for the test");
        Folder(path)
    }

    fn dir(&self) -> PathBuf {
        self.0.join("audit")
    }

    /// In the place of the audit's folder is now something that nothing can be written to.
    fn break_dir(&self) {
        fs::rename(self.dir(), self.0.join("aside")).expect("moved away");
        fs::write(self.dir(), "not a folder").expect("written");
    }

    fn mend_dir(&self) {
        fs::remove_file(self.dir()).expect("removed");
        fs::rename(self.0.join("aside"), self.dir()).expect("moved back");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new("test", &[]))
}

fn settings(dir: &Path) -> AuditSettings {
    AuditSettings {
        dir: Some(dir.to_owned()),
        stdout: false,
        retry_every: Duration::from_millis(10),
        ..AuditSettings::default()
    }
}

fn start(dir: &Path) -> Audit {
    Audit::start(settings(dir), metrics()).expect("the audit starts")
}

fn entry(request_id: &str) -> Entry<'_> {
    Entry { request_id: Some(request_id), agent_id: Some("agent-1"), action: Some("POST"), ..Entry::default() }
}

/// Every line of every segment, records and marks, each chain checked from its first line to its last.
fn all_lines(dir: &Path) -> Vec<Value> {
    let mut found = Vec::new();
    for (writer, numbers) in survey::segments(dir).expect("the folder") {
        let mut head = Head::Genesis;
        for number in numbers {
            let text = fs::read(survey::path(dir, writer, number)).expect("a segment");
            for line in text.split_inclusive(|byte| *byte == b'\n') {
                let sealed = chain::open(line.strip_suffix(b"\n").expect("no torn line")).expect("a line");
                assert!(sealed.is_intact() && sealed.previous == head, "{writer} {number}: the chain holds");
                head = sealed.hash;
                let event: Value = serde_json::from_slice(&sealed.event).expect("JSON");
                assert_eq!(chain::canonical(&event), Ok(sealed.event));
                found.push(event);
            }
        }
    }
    found
}

fn lines(dir: &Path) -> Vec<Value> {
    let mut lines = all_lines(dir);
    lines.retain(|line| Mark::of(line).is_none());
    lines
}

fn marks(dir: &Path) -> Vec<Mark> {
    all_lines(dir).iter().filter_map(Mark::of).collect()
}

fn phases_of(lines: &[Value], request_id: &str) -> Vec<String> {
    let of = |line: &&Value| line["extra"]["request_id"] == request_id;
    lines.iter().filter(of).map(|line| line["extra"]["phase"].as_str().expect("a phase").to_owned()).collect()
}

fn metric(metrics: &Metrics, name: &str) -> u64 {
    let text = metrics.render();
    let line = text.lines().find(|line| line.starts_with(&format!("behavry_ollama_{name} ")));
    line.and_then(|line| line.rsplit(' ').next()).and_then(|value| value.parse().ok()).expect("the metric")
}

#[tokio::test]
async fn a_receipt_comes_only_when_the_line_can_be_read_from_the_file() {
    let folder = Folder::new();
    let audit = start(&folder.dir());
    for n in 0..200 {
        let id = format!("req-{n}");
        let receipt = audit.record_request(&entry(&id)).await.expect("a receipt");
        assert_eq!(phases_of(&lines(&folder.dir()), &id), ["request"]);
        receipt.settle(Outcome::Complete, &entry(&id));
    }
}

#[tokio::test]
async fn each_receipt_leaves_exactly_one_final_record_also_when_it_is_dropped() {
    let folder = Folder::new();
    let audit = start(&folder.dir());
    let of = |id: &'static str| audit.record_request(&Entry { model: Some("llama3.2"), ..entry(id) });
    of("settled").await.expect("a receipt").settle(Outcome::Complete, &entry("settled"));
    drop(of("dropped").await.expect("a receipt"));
    let receipt = of("panicked").await.expect("a receipt");
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        receipt.stream_start(&entry("panicked"));
        receipt.stream_start(&entry("panicked"));
        std::panic::resume_unwind(Box::new("held across it"));
    }));
    assert!(panicked.is_err());
    audit.close(LONG).expect("all is written");
    let lines = lines(&folder.dir());
    assert_eq!(phases_of(&lines, "settled"), ["request", "final"]);
    assert_eq!(phases_of(&lines, "dropped"), ["request", "final"]);
    assert_eq!(phases_of(&lines, "panicked"), ["request", "stream_start", "final"]);
    let left = lines.iter().find(|line| line["extra"]["request_id"] == "dropped" && line["extra"]["phase"] == "final");
    let left = left.expect("the final record");
    assert_eq!(left["extra"]["outcome"], "internal_error");
    assert_eq!(left["agent_id"], "agent-1", "what was known stays known");
    assert_eq!(left["extra"]["model"], "llama3.2");
    assert!(left["latency_ms"].is_u64() && left["error"].is_string());
    assert_ne!(left["id"], lines[0]["id"]);
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_refuses_requests_keeps_what_was_accepted_and_service_resumes_by_itself() {
    let folder = Folder::new();
    let (dir, metrics) = (folder.dir(), metrics());
    let audit = Audit::start(settings(&dir), Arc::clone(&metrics)).expect("the audit starts");
    let receipt = audit.record_request(&entry("running")).await.expect("a receipt");
    receipt.stream_start(&entry("running"));
    audit.flush(LONG).await.expect("written");

    folder.break_dir();
    let mut accepted = Vec::new();
    let refused = loop {
        let id = format!("early-{}", accepted.len());
        match audit.record_request(&entry(&id)).await {
            Ok(receipt) => accepted.push((id, receipt)),
            Err(refused) => break refused,
        }
    };
    assert_eq!(refused, AuditUnavailable::Failing);
    assert_eq!(metric(&metrics, "audit_failing"), 1);
    assert_eq!(metric(&metrics, "audit_unavailable_total"), 1);
    assert_eq!(audit.record_request(&entry("at once")).await.err(), Some(AuditUnavailable::Failing));
    audit.note_final(Outcome::Refused, &entry("at once")).expect("there is room for what was refused");
    receipt.settle(Outcome::Complete, &entry("running"));
    assert_eq!(audit.flush(Duration::from_millis(50)).await, Err(AuditUnavailable::Late));

    folder.mend_dir();
    audit.flush(LONG).await.expect("what was kept is written");
    assert_eq!(metric(&metrics, "audit_failing"), 0);
    audit
        .record_request(&entry("later"))
        .await
        .expect("requests are taken again")
        .settle(Outcome::Complete, &entry("later"));
    for (id, receipt) in accepted {
        receipt.settle(Outcome::Complete, &entry(&id));
    }
    audit.close(LONG).expect("all is written");
    let lines = lines(&dir);
    assert_eq!(phases_of(&lines, "running"), ["request", "stream_start", "final"]);
    assert_eq!(phases_of(&lines, "at once"), ["final"]);
    assert_eq!(phases_of(&lines, "later"), ["request", "final"]);
    let place = |id: &str| lines.iter().rposition(|line| line["extra"]["request_id"] == id);
    assert!(place("at once") < place("running") && place("running") < place("later"), "in the order accepted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_records_of_many_tasks_are_all_whole_lines_in_order_and_none_is_lost() {
    const TASKS: usize = 16;
    const EACH: usize = 210;
    let folder = Folder::new();
    let audit = Arc::new(start(&folder.dir()));
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let audit = Arc::clone(&audit);
            tokio::spawn(async move {
                for n in 0..EACH {
                    let id = format!("{task}/{n}\n\u{1b}\u{9b}\u{2028}");
                    let receipt = audit.record_request(&entry(&id)).await.expect("a receipt");
                    receipt.stream_start(&entry(&id));
                    tokio::task::yield_now().await;
                    receipt.settle(Outcome::Complete, &entry(&id));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("the task ends");
    }
    audit.close(LONG).expect("all is written");
    let mut exchanges: HashMap<String, Vec<Value>> = HashMap::new();
    let lines = lines(&folder.dir());
    assert_eq!(lines.len(), TASKS * EACH * 3);
    for line in lines {
        let id = line["extra"]["request_id"].as_str().expect("an id").to_owned();
        exchanges.entry(id).or_default().push(line["extra"]["phase"].clone());
    }
    assert_eq!(exchanges.len(), TASKS * EACH);
    for phases in exchanges.values() {
        assert_eq!(phases, &["request", "stream_start", "final"]);
    }
}

#[tokio::test]
async fn a_file_renamed_or_removed_is_noticed() {
    let folder = Folder::new();
    let dir = folder.dir();
    let audit = start(&dir);
    for number in 1..=2 {
        audit.record_request(&entry("before")).await.expect("a receipt").settle(Outcome::Complete, &entry("before"));
        audit.flush(LONG).await.expect("written");
        let (writer, numbers) = survey::segments(&dir).expect("the folder").pop_first().expect("a writer");
        assert_eq!(numbers.last(), Some(&number));
        let (file, next) = (survey::path(&dir, writer, number), survey::path(&dir, writer, number + 1));
        let aside = folder.0.join("rotated");
        if number == 1 {
            fs::rename(&file, &aside).expect("renamed");
        } else {
            fs::remove_dir_all(&dir).expect("removed, with its folder");
        }
        let began = Instant::now();
        while !next.exists() {
            assert!(began.elapsed() < LONG, "no new file");
            tokio::task::yield_now().await;
        }
        if number == 1 {
            let text = fs::read_to_string(&aside).expect("the old one");
            let last: Value = serde_json::from_str(text.lines().last().expect("lines")).expect("JSON");
            assert_eq!(
                (&last["extra"]["phase"], &last["extra"]["reason"]),
                (&"segment_close".into(), &"renamed".into())
            );
            fs::rename(&aside, &file).expect("put back: the chain is whole");
            assert_eq!(phases_of(&lines(&dir), "before"), ["request", "final"]);
            fs::remove_file(&file).expect("removed");
            continue;
        }
        audit.record_request(&entry("after")).await.expect("a receipt").settle(Outcome::Complete, &entry("after"));
        audit.flush(LONG).await.expect("written");
        let text = fs::read_to_string(&next).expect("the new one");
        assert_eq!(text.matches("\"after\"").count(), 2);
        let about = (fs::metadata(&next).expect("it exists"), fs::metadata(&dir).expect("it exists"));
        assert_eq!(
            (about.0.mode() & 0o777 & !0o640, about.1.mode() & 0o777 & !0o750),
            (0, 0),
            "nobody else may read it"
        );
    }
}

#[tokio::test]
async fn the_room_is_bounded_and_running_exchanges_have_theirs_reserved() {
    let folder = Folder::new();
    let settings = AuditSettings { room_records: 21, ..settings(&folder.dir()) };
    let audit = Audit::start(settings, metrics()).expect("the audit starts");
    let mut receipts = Vec::new();
    let refused = loop {
        match audit.record_request(&entry("req")).await {
            Ok(receipt) => receipts.push(receipt),
            Err(refused) => break refused,
        }
        audit.flush(LONG).await.expect("written");
    };
    assert_eq!((refused, receipts.len()), (AuditUnavailable::Full, 10), "two places each, one of three for the next");
    for receipt in receipts {
        receipt.stream_start(&entry("req"));
        receipt.settle(Outcome::Complete, &entry("req"));
    }
    audit.flush(LONG).await.expect("written");
    let cancelled = audit.record_request(&entry("cancelled"));
    drop(cancelled);
    audit.flush(LONG).await.expect("written");
    assert_eq!(audit.shared.queue.lock().used, 0, "a request cancelled before its receipt gives its room back");
    assert_eq!(phases_of(&lines(&folder.dir()), "req").len(), 30);
    audit.close(LONG).expect("all is written");
}

/// A pipe that nobody reads, filled to the last byte.
fn stuck_pipe() -> (io::PipeReader, File) {
    let (reader, writer) = io::pipe().expect("a pipe");
    (reader, File::from(std::os::fd::OwnedFd::from(writer)))
}

/// A receipt, where the audit's patience is so short that a busy machine's write may pass for one that hangs. Gives the id that was taken.
async fn taken_in_the_end(audit: &Audit, id: &str) -> (String, Receipt) {
    let began = Instant::now();
    for attempt in 0.. {
        let id = format!("{id}-{attempt}");
        match audit.record_request(&entry(&id)).await {
            Ok(receipt) => return (id, receipt),
            Err(why) => assert!(began.elapsed() < LONG, "requests are not taken again: {why:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    unreachable!("there is always another number")
}

#[tokio::test]
async fn a_write_that_hangs_refuses_those_who_wait_and_nothing_is_lost_or_torn() {
    let (mut reader, stream) = stuck_pipe();
    let settings = AuditSettings {
        dir: None,
        patience: Duration::from_millis(50),
        room_records: 2000,
        ..settings(Path::new("unused"))
    };
    let metrics = metrics();
    let audit = Audit::start_on(settings, Some(stream), Arc::clone(&metrics)).expect("the audit starts");
    // More than a pipe holds.
    for _ in 0..900 {
        audit.note_final(Outcome::Refused, &entry("filler")).expect("room");
    }
    assert_eq!(audit.record_request(&entry("waits")).await.err(), Some(AuditUnavailable::Failing));
    assert_eq!(audit.record_request(&entry("at once")).await.err(), Some(AuditUnavailable::Failing));
    let mut noted = 900;
    while audit.note_final(Outcome::Refused, &entry("filler")).is_ok() {
        noted += 1;
    }
    // What the pipe itself took (64 KiB) is written, not waiting.
    assert!((1000..1100).contains(&noted), "refused requests take at most half of the room: {noted}");

    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text)
    });
    audit.flush(LONG).await.expect("it goes on by itself");
    let (later, receipt) = taken_in_the_end(&audit, "later").await;
    drop(receipt);
    audit.close(LONG).expect("all is written");
    drop(audit);
    let text = reading.join().expect("the reader ends").expect("text");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("whole lines")).collect();
    assert_eq!(phases_of(&lines, "filler").len(), noted);
    assert_eq!(phases_of(&lines, &later), ["request", "final"]);
    let told =
        |line: &&Value| line["error"].as_str().is_some_and(|error| error.starts_with("1 final records were lost"));
    assert_eq!(lines.iter().filter(told).count(), 1, "what had no room is told");
}

#[tokio::test]
async fn a_stuck_standard_output_beside_a_file_delays_nothing_and_is_counted() {
    let folder = Folder::new();
    let (reader, stream) = stuck_pipe();
    let metrics = metrics();
    let settings = AuditSettings { stdout: true, ..settings(&folder.dir()) };
    let audit = Audit::start_on(settings, Some(stream), Arc::clone(&metrics)).expect("the audit starts");
    for round in 0..8 {
        for _ in 0..1000 {
            audit.note_final(Outcome::Refused, &entry("req")).expect("room");
        }
        audit.flush(LONG).await.unwrap_or_else(|_| panic!("round {round} was delayed"));
    }
    assert_eq!(lines(&folder.dir()).len(), 8000);
    assert!(metric(&metrics, "audit_dropped_records_total{sink=\"stdout\"}") > 0);
    assert_eq!(audit.close(Duration::from_millis(50)), Err(AuditUnavailable::Late), "its end is not waited for");
    drop(reader);
}

#[tokio::test]
async fn standard_output_beside_a_file_has_the_same_lines() {
    let folder = Folder::new();
    let (mut reader, stream) = stuck_pipe();
    let settings = AuditSettings { stdout: true, ..settings(&folder.dir()) };
    let audit = Audit::start_on(settings, Some(stream), metrics()).expect("the audit starts");
    for _ in 0..20 {
        drop(audit.record_request(&entry("req")).await.expect("a receipt"));
    }
    audit.close(LONG).expect("both have all");
    drop(audit);
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("text");
    let copies: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let ids = |lines: &[Value]| lines.iter().map(|line| line["id"].to_string()).collect::<Vec<_>>();
    assert_eq!(ids(&copies), ids(&lines(&folder.dir())));
    assert_eq!(copies.len(), 40);
}

#[tokio::test]
async fn closing_waits_for_running_exchanges_and_takes_no_new_ones() {
    let folder = Folder::new();
    let audit = start(&folder.dir());
    let receipt = audit.record_request(&entry("running")).await.expect("a receipt");
    assert_eq!(audit.close(Duration::from_millis(20)), Err(AuditUnavailable::Late));
    assert_eq!(audit.record_request(&entry("new")).await.err(), Some(AuditUnavailable::Closed));
    receipt.settle(Outcome::Shutdown, &entry("running"));
    audit.close(LONG).expect("all is written");
    assert_eq!(phases_of(&lines(&folder.dir()), "running"), ["request", "final"]);
    assert_eq!(audit.note_final(Outcome::Refused, &entry("late")), Err(AuditUnavailable::Closed));
    assert_eq!(audit.flush(LONG).await, Ok(()));
}

#[tokio::test]
async fn strangers_are_folded_and_each_of_them_is_counted() {
    const REFUSALS: u64 = 5000;
    let folder = Folder::new();
    let metrics = metrics();
    let audit = Audit::start(settings(&folder.dir()), Arc::clone(&metrics)).expect("the audit starts");
    let stranger = Entry { agent_id: None, error: Some("missing_token"), policy_result: Some("deny"), ..entry("req") };
    for _ in 0..REFUSALS {
        audit.note_stranger(IpAddr::from([192, 0, 2, 1]), Outcome::Refused, "missing_token", &stranger);
    }
    audit.close(LONG).expect("all is written");
    let lines = lines(&folder.dir());
    let folded: Vec<_> = lines.iter().filter(|line| line["extra"]["source_ip"] == "192.0.2.1").collect();
    let counted: u64 = folded
        .iter()
        .map(|line| line["error"].as_str().and_then(|error| error.split(' ').next()).expect("a count"))
        .map(|count| count.parse::<u64>().expect("a number"))
        .sum();
    let singles = lines.len() - folded.len();
    assert_eq!(singles as u64 + counted, REFUSALS);
    assert_eq!(metric(&metrics, "folded_refusals_total"), counted);
    assert!(lines.len() < 100, "{} lines", lines.len());
    assert!(folded.iter().all(|line| line["extra"]["outcome"] == "refused" && line["policy_result"] == "deny"));
}

#[test]
fn an_audit_without_a_sink_or_with_a_folder_that_cannot_be_does_not_start() {
    let nowhere = AuditSettings { dir: None, stdout: false, ..AuditSettings::default() };
    assert!(matches!(Audit::start(nowhere, metrics()), Err(AuditError::NoSink)));
    let below_a_file = settings(Path::new("/dev/null/audit"));
    let error = Audit::start(below_a_file, metrics()).err().expect("it does not start");
    assert!(error.to_string().contains("/dev/null/audit"), "{error}");
}

#[tokio::test]
async fn a_receipt_says_nothing_of_its_record() {
    let folder = Folder::new();
    let audit = start(&folder.dir());
    let receipt = audit.record_request(&entry("secret-id")).await.expect("a receipt");
    assert_eq!(format!("{receipt:?}"), "Receipt");
}
