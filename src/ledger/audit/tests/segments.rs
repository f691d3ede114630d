//! Segments: rotation, checkpoints, fsync, retention, two writers.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;

use base64::Engine as _;
use ed25519_dalek::pkcs8::DecodePublicKey;
use ed25519_dalek::{Signature, VerifyingKey};

use super::*;
use crate::ledger::verify;

async fn exchange(audit: &Audit, id: &str) {
    audit.record_request(&entry(id)).await.expect("a receipt").settle(Outcome::Complete, &entry(id));
}

#[tokio::test]
async fn segments_rotate_by_size_and_the_chain_goes_on() {
    let folder = Folder::new();
    let settings = AuditSettings { rotate_bytes: 4096, ..settings(&folder.dir()) };
    let audit = Audit::start(settings, metrics()).expect("the audit starts");
    for n in 0..60 {
        exchange(&audit, &format!("req-{n}")).await;
    }
    audit.close(LONG).expect("all is written");
    assert_eq!(lines(&folder.dir()).len(), 120, "none lost, none doubled, and the chain holds over all segments");
    let marks = marks(&folder.dir());
    let opened = marks.iter().filter(|mark| matches!(mark, Mark::SegmentOpen { .. })).count();
    let closed = |wanted: CloseReason| {
        let of = |mark: &&Mark| matches!(mark, Mark::SegmentClose { reason, .. } if *reason == wanted);
        marks.iter().filter(of).count()
    };
    assert!(opened > 5, "{opened} segments");
    assert_eq!((closed(CloseReason::Rotated), closed(CloseReason::Stopped)), (opened - 1, 1));
}

#[tokio::test]
async fn a_segment_with_records_rotates_by_age_and_an_empty_one_does_not() {
    let folder = Folder::new();
    let settings = AuditSettings { rotate_age: Duration::from_millis(1), ..settings(&folder.dir()) };
    let metrics = metrics();
    let audit = Audit::start(settings, Arc::clone(&metrics)).expect("the audit starts");
    exchange(&audit, "req").await;
    let began = Instant::now();
    while metric(&metrics, "audit_segments_total") < 2 {
        assert!(began.elapsed() < LONG, "no second segment");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    audit.close(LONG).expect("all is written");
    let numbers = survey::segments(&folder.dir()).expect("the folder").pop_first().expect("a writer").1;
    assert!(numbers.len() <= 3, "a segment that holds its own marks only is not rotated for ever: {numbers:?}");
    assert_eq!(phases_of(&lines(&folder.dir()), "req"), ["request", "final"]);
}

#[tokio::test]
async fn checkpoints_are_signed_count_the_lines_and_are_in_the_second_place() {
    let folder = Folder::new();
    let second = folder.0.join("second.jsonl");
    let settings =
        AuditSettings { checkpoint_file: Some(second.clone()), rotate_bytes: 4096, ..settings(&folder.dir()) };
    let audit = Audit::start(settings, metrics()).expect("the audit starts");
    for n in 0..20 {
        exchange(&audit, &format!("req-{n}")).await;
    }
    audit.close(LONG).expect("all is written");
    let public = fs::read_to_string(folder.dir().join("audit-key.pub")).expect("the public half");
    let public = VerifyingKey::from_public_key_pem(&public).expect("a key");
    let all = all_lines(&folder.dir());
    let mut heads = Vec::new();
    for (place, event) in all.iter().enumerate() {
        if let Some(mark @ Mark::Checkpoint { .. }) = Mark::of(event) {
            let Mark::Checkpoint { count, head, key_id, signature, .. } = &mark else { unreachable!("matched above") };
            assert_eq!(*count, place as u64, "the lines before it");
            assert_eq!(*key_id, chain::key_id(public.as_bytes()));
            let signature = base64::engine::general_purpose::STANDARD.decode(signature).expect("base64");
            let payload = mark.payload(event["timestamp"].as_str().expect("a time")).expect("signed");
            let signature = Signature::from_slice(&signature).expect("64 bytes");
            public.verify_strict(&payload, &signature).expect("a good signature");
            heads.push(head.clone());
        }
    }
    assert!(heads.len() > 2, "before each close");
    let copies = fs::read_to_string(&second).expect("the second place");
    let copied: Vec<String> = copies
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("JSON")["extra"]["head"].as_str().expect("a head").to_owned()
        })
        .collect();
    assert_eq!(copied, heads);
}

#[tokio::test]
async fn a_second_place_that_cannot_be_written_is_counted_and_stops_nothing() {
    let folder = Folder::new();
    let metrics = metrics();
    let settings =
        AuditSettings { checkpoint_file: Some("/dev/full".into()), rotate_bytes: 4096, ..settings(&folder.dir()) };
    let audit = Audit::start(settings, Arc::clone(&metrics)).expect("the audit starts");
    for n in 0..20 {
        exchange(&audit, &format!("req-{n}")).await;
    }
    audit.close(LONG).expect("all is written");
    assert!(metric(&metrics, "audit_checkpoint_copy_failures_total") > 0);
    assert_eq!(lines(&folder.dir()).len(), 40);
}

static FAILS: AtomicBool = AtomicBool::new(false);

fn failing_sync(file: &File) -> io::Result<()> {
    if FAILS.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { file.sync_data() }
}

#[tokio::test]
async fn after_a_failed_fsync_the_segment_is_closed_and_the_chain_goes_on_in_the_next() {
    let folder = Folder::new();
    let metrics = metrics();
    let settings = AuditSettings { durability: Durability::Strict, sync_file: failing_sync, ..settings(&folder.dir()) };
    let audit = Audit::start(settings, Arc::clone(&metrics)).expect("the audit starts");
    let running = audit.record_request(&entry("running")).await.expect("a receipt");
    FAILS.store(true, Ordering::SeqCst);
    assert_eq!(audit.record_request(&entry("refused")).await.err(), Some(AuditUnavailable::Failing));
    audit.note_final(Outcome::Refused, &entry("refused")).expect("room");
    assert!(metric(&metrics, "audit_fsync_failures_total") > 0);
    running.settle(Outcome::Complete, &entry("running"));
    assert_eq!(
        audit.flush(Duration::from_millis(60)).await,
        Err(AuditUnavailable::Late),
        "nothing is written meanwhile"
    );
    FAILS.store(false, Ordering::SeqCst);
    audit.flush(LONG).await.expect("it resumes by itself");
    exchange(&audit, "later").await;
    audit.close(LONG).expect("all is written");
    let numbers = survey::segments(&folder.dir()).expect("the folder").pop_first().expect("a writer").1;
    assert_eq!(numbers, [1, 2], "a disk that fails for long leaves no stumps");
    let lines = lines(&folder.dir());
    for id in ["running", "refused", "later"] {
        assert_eq!(phases_of(&lines, id), ["request", "final"], "{id}");
    }
    let failed = |mark: &Mark| matches!(mark, Mark::SegmentClose { reason: CloseReason::Failed, segment: 1, .. });
    assert!(marks(&folder.dir()).iter().any(failed));
}

static SYNCS: AtomicUsize = AtomicUsize::new(0);

fn counted_sync(file: &File) -> io::Result<()> {
    let result = file.sync_data();
    SYNCS.fetch_add(1, Ordering::SeqCst);
    result
}

#[tokio::test]
async fn a_strict_receipt_comes_after_an_fsync() {
    let folder = Folder::new();
    let settings = AuditSettings { durability: Durability::Strict, sync_file: counted_sync, ..settings(&folder.dir()) };
    let audit = Audit::start(settings, metrics()).expect("the audit starts");
    for n in 0..20 {
        let before = SYNCS.load(Ordering::SeqCst);
        exchange(&audit, &format!("req-{n}")).await;
        assert!(SYNCS.load(Ordering::SeqCst) > before);
    }
}

static TIMED_SYNCS: AtomicUsize = AtomicUsize::new(0);

fn timed_sync(file: &File) -> io::Result<()> {
    TIMED_SYNCS.fetch_add(1, Ordering::SeqCst);
    file.sync_data()
}

#[tokio::test]
async fn what_is_written_is_synced_by_itself_in_time_and_not_for_each_record() {
    let folder = Folder::new();
    let settings = AuditSettings {
        durability: Durability::Fsync,
        fsync_within: Duration::from_millis(30),
        sync_file: timed_sync,
        ..settings(&folder.dir())
    };
    let audit = Audit::start(settings, metrics()).expect("the audit starts");
    let opened = TIMED_SYNCS.load(Ordering::SeqCst);
    for n in 0..50 {
        exchange(&audit, &format!("req-{n}")).await;
    }
    let began = Instant::now();
    while TIMED_SYNCS.load(Ordering::SeqCst) == opened {
        assert!(began.elapsed() < LONG, "never synced");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(TIMED_SYNCS.load(Ordering::SeqCst) - opened < 50, "records share an fsync");
}

static SLOW: AtomicBool = AtomicBool::new(false);

fn slow_sync(file: &File) -> io::Result<()> {
    while SLOW.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
    }
    file.sync_data()
}

#[tokio::test]
async fn an_fsync_that_hangs_refuses_those_who_wait_and_service_resumes() {
    let folder = Folder::new();
    let settings = AuditSettings {
        durability: Durability::Strict,
        sync_file: slow_sync,
        patience: Duration::from_millis(50),
        ..settings(&folder.dir())
    };
    let audit = Audit::start(settings, metrics()).expect("the audit starts");
    SLOW.store(true, Ordering::SeqCst);
    assert_eq!(audit.record_request(&entry("waits")).await.err(), Some(AuditUnavailable::Failing));
    assert_eq!(audit.record_request(&entry("at once")).await.err(), Some(AuditUnavailable::Failing));
    audit.note_final(Outcome::Refused, &entry("waits")).expect("room");
    SLOW.store(false, Ordering::SeqCst);
    audit.flush(LONG).await.expect("it goes on by itself");
    let (later, receipt) = taken_in_the_end(&audit, "later").await;
    receipt.settle(Outcome::Complete, &entry(&later));
    audit.close(LONG).expect("all is written");
    let lines = lines(&folder.dir());
    assert_eq!(phases_of(&lines, "waits"), ["request", "final"]);
    assert_eq!(phases_of(&lines, &later), ["request", "final"]);
}

#[tokio::test]
async fn retention_by_size_deletes_the_oldest_and_leaves_a_signed_tombstone_for_each() {
    let folder = Folder::new();
    let metrics = metrics();
    let settings = AuditSettings { rotate_bytes: 4096, keep_bytes: 20_000, ..settings(&folder.dir()) };
    let audit = Audit::start(settings, Arc::clone(&metrics)).expect("the audit starts");
    for n in 0..100 {
        exchange(&audit, &format!("req-{n}")).await;
    }
    let bytes = || -> u64 {
        let names = fs::read_dir(folder.dir()).expect("the folder").filter_map(Result::ok);
        let segments = names.filter(|name| name.path().extension().is_some_and(|end| end == "jsonl"));
        segments.filter_map(|segment| segment.metadata().ok()).map(|about| about.len()).sum()
    };
    let began = Instant::now();
    // A tombstone goes into the current segment, so what is left is near the bound and not under it at every moment.
    while bytes() > 30_000 {
        assert!(began.elapsed() < LONG, "{} bytes", bytes());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    audit.close(LONG).expect("all is written");
    drop(audit);
    // The last deletion, whose tombstone is written already, may still be under way.
    let (numbers, texts) = loop {
        let (writer, numbers) = survey::segments(&folder.dir()).expect("the folder").pop_first().expect("a writer");
        let read = |number: &u32| fs::read_to_string(survey::path(&folder.dir(), writer, *number));
        if let Ok(texts) = numbers.iter().map(read).collect::<io::Result<Vec<_>>>() {
            break (numbers, texts);
        }
        assert!(began.elapsed() < LONG, "{numbers:?}");
    };
    assert!(numbers[0] > 1, "{numbers:?}");
    let public = fs::read_to_string(folder.dir().join("audit-key.pub")).expect("the public half");
    let public = VerifyingKey::from_public_key_pem(&public).expect("a key");
    let mut told = Vec::new();
    for text in &texts {
        for line in text.lines() {
            let event: Value = serde_json::from_str(line).expect("JSON");
            if let Some(mark @ Mark::Tombstone { .. }) = Mark::of(&event) {
                let payload = mark.payload(event["timestamp"].as_str().expect("a time")).expect("signed");
                let Mark::Tombstone { segment, head, count_before, count, signature, reason, .. } = mark else {
                    unreachable!("matched above")
                };
                let signature = base64::engine::general_purpose::STANDARD.decode(signature).expect("base64");
                public.verify_strict(&payload, &Signature::from_slice(&signature).expect("64 bytes")).expect("good");
                assert_eq!(reason, TombstoneReason::Size);
                told.push((segment, head, count_before + count));
            }
        }
    }
    // The last one that was deleted says what the first one that is left goes on from.
    let opened: Value = serde_json::from_str(texts[0].lines().next().expect("a line")).expect("JSON");
    let (_, head, lines) = told.iter().find(|(segment, ..)| *segment == numbers[0] - 1).expect("its tombstone").clone();
    assert_eq!(
        (opened["previous_hash"].as_str(), opened["extra"]["count"].as_u64()),
        (Some(head.as_str()), Some(lines))
    );
    while metric(&metrics, "audit_tombstones_total") < u64::from(numbers[0] - 1) {
        assert!(began.elapsed() < LONG, "each deletion is counted");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn of_several_writers_what_ended_first_is_deleted_first_whatever_their_names() {
    let folder = Folder::new();
    let keeps = AuditSettings { rotate_bytes: 4096, keep_bytes: 12_000, ..settings(&folder.dir()) };
    let audit = Audit::start(keeps, metrics()).expect("the audit starts");
    let own = survey::segments(&folder.dir()).expect("the folder").pop_first().expect("a writer").0;
    let brief = start(&folder.dir());
    exchange(&brief, "brief").await;
    brief.close(LONG).expect("all is written");
    drop(brief);
    let began = Instant::now();
    let mut n = 0;
    while survey::segments(&folder.dir()).expect("the folder").len() > 1 {
        assert!(began.elapsed() < LONG, "what ended long ago is still there, and {n} later requests were written");
        exchange(&audit, &format!("later-{n}")).await;
        n += 1;
    }
    audit.close(LONG).expect("all is written");
    drop(audit);
    let told = survey::segments(&folder.dir()).expect("the folder").pop_first().expect("a writer").0;
    assert_eq!(told, own, "it is the one that still wrote");
}

#[tokio::test]
async fn a_key_that_was_lost_is_replaced_and_what_it_signed_can_still_be_checked() {
    let folder = Folder::new();
    for life in 0..2 {
        let audit = start(&folder.dir());
        exchange(&audit, &format!("life-{life}")).await;
        audit.close(LONG).expect("all is written");
        drop(audit);
        if life == 0 {
            fs::remove_file(folder.dir().join("audit-key.pem")).expect("there");
        }
    }
    let keys = verify::public_keys_of(&folder.dir()).expect("the folder");
    assert_eq!(keys.len(), 2, "{keys:?}");
    let unknown = |keys: &[PathBuf]| {
        let mut against = verify::Against::default();
        keys.iter().for_each(|path| against.key(path).expect("a key"));
        let verdict = verify::verify(&folder.dir(), &against).expect("checked");
        verdict.problems.iter().filter(|found| matches!(found.fault, verify::Fault::UnknownKey { .. })).count()
    };
    assert_eq!((unknown(&keys), unknown(&keys[..1]), unknown(&keys[1..])), (0, 1, 1));
}

#[tokio::test]
async fn whoever_only_reads_a_segment_does_not_make_its_dead_writer_look_alive() {
    let folder = Folder::new();
    let audit = start(&folder.dir());
    let (writer, numbers) = survey::segments(&folder.dir()).expect("the folder").pop_first().expect("a writer");
    let path = survey::path(&folder.dir(), writer, numbers[0]);
    assert!(lock::is_locked(&path).expect("asked"), "it writes");
    audit.close(LONG).expect("all is written");
    drop(audit);
    let reader = File::open(&path).expect("a file");
    // SAFETY: a descriptor that is open.
    assert_eq!(unsafe { libc::flock(reader.as_raw_fd(), libc::LOCK_SH) }, 0);
    assert!(!lock::is_locked(&path).expect("asked"), "somebody reads it");
}

#[tokio::test]
async fn retention_by_age_leaves_what_is_younger_and_what_is_open() {
    let folder = Folder::new();
    let audit =
        Audit::start(AuditSettings { rotate_bytes: 4096, ..settings(&folder.dir()) }, metrics()).expect("it starts");
    for n in 0..20 {
        exchange(&audit, &format!("old-{n}")).await;
    }
    audit.close(LONG).expect("all is written");
    drop(audit);
    let old = survey::segments(&folder.dir()).expect("the folder").pop_first().expect("a writer").0;
    let settings = AuditSettings { keep: Duration::from_nanos(1), ..settings(&folder.dir()) };
    let audit = Audit::start(settings, metrics()).expect("the audit starts");
    let began = Instant::now();
    while survey::segments(&folder.dir()).expect("the folder").contains_key(&old) {
        assert!(began.elapsed() < LONG, "it is still there");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    exchange(&audit, "young").await;
    audit.close(LONG).expect("all is written");
    assert_eq!(phases_of(&lines(&folder.dir()), "young"), ["request", "final"], "the current segment stays");
    let aged =
        |mark: &Mark| matches!(mark, Mark::Tombstone { reason: TombstoneReason::Age, writer, .. } if *writer == old);
    assert!(marks(&folder.dir()).iter().any(aged));
}

#[tokio::test]
async fn two_writers_share_a_folder_and_no_segment() {
    let folder = Folder::new();
    let (one, two) = (start(&folder.dir()), start(&folder.dir()));
    for n in 0..20 {
        exchange(&one, &format!("one-{n}")).await;
        exchange(&two, &format!("two-{n}")).await;
    }
    two.close(LONG).expect("all is written");
    let third = start(&folder.dir());
    one.close(LONG).expect("all is written");
    third.close(LONG).expect("all is written");
    assert_eq!(survey::segments(&folder.dir()).expect("the folder").len(), 3);
    assert_eq!(lines(&folder.dir()).len(), 80, "each chain holds by itself");
    let marks = marks(&folder.dir());
    assert!(!marks.iter().any(|mark| matches!(mark, Mark::Adopted { .. })), "who is alive is not taken over");
    let heads = |mark: &Mark| match mark {
        Mark::SegmentOpen { heads, .. } => heads.len(),
        _ => 0,
    };
    let mut known: Vec<usize> = marks.iter().map(heads).filter(|heads| *heads > 0).collect();
    known.sort_unstable();
    assert_eq!(known, [1, 2], "each start names the chains that it found");
}
