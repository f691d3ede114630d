//! The audit on a disk that really runs full in mid-line. Alone in its process, since the limit that stands for the disk (RLIMIT_FSIZE)
//! holds for all of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use behavry_ollama_proxy::ledger::{Audit, AuditSettings, AuditUnavailable, Entry, Metrics, Outcome};

const LONG: Duration = Duration::from_secs(60);

/// No file of this process may grow past `bytes`: a write stops short there, and the next one fails with EFBIG.
fn disk_of(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: both calls take plain values; `limit` lives through the call. Without the signal the write just fails.
    let result = unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::setrlimit(libc::RLIMIT_FSIZE, &limit)
    };
    assert_eq!(result, 0, "the limit is set");
}

/// The one segment.
fn current(dir: &Path) -> PathBuf {
    let names = fs::read_dir(dir).expect("the folder").map(|entry| entry.expect("an entry").path());
    let mut segments: Vec<PathBuf> = names.filter(|name| name.extension().is_some_and(|end| end == "jsonl")).collect();
    assert_eq!(segments.len(), 1, "a full disk does not end a segment");
    segments.swap_remove(0)
}

/// The request ids of the lines; each line is whole and JSON.
fn ids(dir: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string(current(dir)).expect("the audit file");
    assert!(text.ends_with('\n'), "no torn line");
    let word = |value: &serde_json::Value| value.as_str().expect("a word").to_owned();
    text.lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("each line is JSON"))
        .filter(|line| line["extra"]["request_id"].is_string())
        .map(|line| (word(&line["extra"]["request_id"]), word(&line["extra"]["phase"])))
        .collect()
}

#[tokio::test]
async fn a_disk_that_runs_full_in_mid_line_leaves_whole_lines_and_loses_nothing() {
    let folder = std::env::temp_dir().join(format!("behavry-ledger-full-{}", std::process::id()));
    let settings = AuditSettings {
        dir: Some(folder.clone()),
        checkpoint_every: 100 * LONG, // a mark in the middle would take the room of a record
        stdout: false,
        retry_every: Duration::from_millis(10),
        ..AuditSettings::default()
    };
    let audit = Audit::start(settings, Arc::new(Metrics::new("test", &[]))).expect("the audit starts");
    let mut expected = Vec::new();
    for round in 1..=20u64 {
        // Room for some lines and a part of one, a different part each time.
        let begun = fs::metadata(current(&folder)).expect("it exists").len();
        disk_of(begun + 3000 + 97 * round);
        let mut running = Vec::new();
        let refused = loop {
            let id = format!("{round}-{}", running.len());
            let entry = Entry { request_id: Some(&id), ..Entry::default() };
            match audit.record_request(&entry).await {
                Ok(receipt) => running.push((id, receipt)),
                Err(refused) => break (id, refused),
            }
        };
        assert_eq!(refused.1, AuditUnavailable::Failing);
        assert!(running.len() >= 2, "some lines had room");
        assert_eq!(audit.flush(Duration::from_millis(30)).await, Err(AuditUnavailable::Late));
        let on_disk = ids(&folder);
        expected.extend(running.iter().map(|(id, _)| (id.clone(), "request".to_owned())));
        assert_eq!(on_disk, expected, "receipts stand for lines on the disk, and nothing else is there");

        // The one refused is in the file too, once there is space: it was decided, and its final record says what came of it.
        expected.push((refused.0.clone(), "request".to_owned()));
        let entry = Entry { request_id: Some(&refused.0), ..Entry::default() };
        audit.note_final(Outcome::Refused, &entry).expect("room");
        expected.push((refused.0.clone(), "final".to_owned()));
        for (id, receipt) in running {
            receipt.settle(Outcome::Complete, &Entry { request_id: Some(&id), ..Entry::default() });
            expected.push((id, "final".to_owned()));
        }
        disk_of(libc::RLIM_INFINITY);
        audit.flush(LONG).await.expect("service resumes by itself");
        assert_eq!(ids(&folder), expected);
    }
    audit.close(LONG).expect("all is written");
    fs::remove_dir_all(folder).expect("removed");
}
