//! Over chains that are sealed here as the audit's thread seals them.

use std::fs;

use super::*;
use crate::ledger::chain::{self, Head, SegmentName};
use crate::ledger::record::Id;
use crate::sinks::lag::Lag;

const OLD: &str = "20200101T000000Z-00000001";
const OTHER: &str = "20200101T000000Z-00000002";
const COMING: &str = "20990101T000000Z-00000003";

fn writer(name: &str) -> WriterName {
    name.parse().expect("a name")
}

fn moment(at: &str) -> Moment {
    Moment::from_microseconds(at.parse::<jiff::Timestamp>().expect("a time").as_microsecond())
}

/// A folder with chains that grow line by line.
struct Folder {
    dir: tempfile::TempDir,
    heads: BTreeMap<WriterName, (u32, u64, Head)>,
}

impl Folder {
    fn new() -> Folder {
        Folder { dir: tempfile::tempdir().expect("a folder"), heads: BTreeMap::new() }
    }

    fn path(&self, of: &str, number: u32) -> PathBuf {
        self.dir.path().join(SegmentName { writer: writer(of), number }.to_string())
    }

    fn line(&mut self, of: &str, event: &[u8]) {
        let (segment, count, head) = self.heads[&writer(of)];
        let mut line = Vec::new();
        let head = chain::seal(event, head, &mut line);
        let path = self.path(of, segment);
        let mut text = fs::read(&path).unwrap_or_default();
        text.extend_from_slice(&line);
        fs::write(path, text).expect("written");
        self.heads.insert(writer(of), (segment, count + 1, head));
    }

    /// A new segment, of so many lines with its first.
    fn segment(&mut self, of: &str, lines: u64, at: &str) {
        let (segment, count, head) = self.heads.get(&writer(of)).copied().unwrap_or((0, 0, Head::Genesis));
        self.heads.insert(writer(of), (segment + 1, count, head));
        let open = Mark::segment_open(writer(of), segment + 1, count, Vec::new(), "sha256:0");
        self.line(of, &open.event(Id::new(moment(at), [0; 10]), moment(at)));
        for _ in 1..lines {
            self.record(of, at);
        }
    }

    fn record(&mut self, of: &str, at: &str) {
        let event = format!(r#"{{"extra":{{"phase":"final"}},"timestamp":"{}"}}"#, moment(at));
        self.line(of, event.as_bytes());
    }

    /// Deletes a segment as retention does.
    fn retire(&mut self, of: &str, number: u32, told_by: &str, at: &str) {
        let path = self.path(of, number);
        let text = fs::read_to_string(&path).expect("a segment");
        let first: serde_json::Value = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
        let last = timestamp(text.lines().last().expect("a line").as_bytes()).to_owned();
        let tombstone = Mark::Tombstone {
            writer: writer(of),
            segment: number,
            first_previous_hash: String::new(),
            head: String::new(),
            count_before: first["extra"]["count"].as_u64().expect("a count"),
            count: text.lines().count() as u64,
            from: last.clone(),
            to: last,
            reason: chain::mark::TombstoneReason::Size,
            key_id: String::new(),
            signature: String::new(),
        };
        self.line(told_by, &tombstone.event(Id::new(moment(at), [0; 10]), moment(at)));
        fs::remove_file(path).expect("removed");
    }

    fn saved_at(&self) -> PathBuf {
        self.dir.path().join("bookmarks/webhook.json")
    }

    fn backlog(&self, start: Start) -> Backlog {
        Backlog::open(self.dir.path(), self.saved_at(), start, Moment::now())
    }

    fn text(&self, of: &str, number: u32) -> String {
        fs::read_to_string(self.path(of, number)).expect("a segment")
    }
}

/// Everything there is: the text, and how many lines are lost.
fn drain(backlog: &mut Backlog, most_lines: usize) -> (String, u64) {
    let (mut text, mut lost) = (String::new(), 0);
    loop {
        let read = backlog.read(most_lines).expect("readable");
        text += std::str::from_utf8(&read.batch.body()).expect("ASCII");
        lost += read.lost;
        if !read.more {
            return (text, lost);
        }
    }
}

/// Long after now, so that any sink is older.
const LATER: &str = "2099-01-01T00:00:00Z";
const EARLIER: &str = "2020-01-01T00:00:00Z";

#[test]
fn every_line_comes_once_in_order_and_after_a_restart_goes_on_where_it_was_saved() {
    let mut folder = Folder::new();
    folder.segment(OLD, 5, EARLIER);
    folder.segment(OLD, 3, EARLIER);
    let mut backlog = folder.backlog(Start::Beginning);
    let mut lag = Lag::new(folder.dir.path().to_owned());
    assert_eq!(lag.measure(backlog.bookmark()).expect("measured"), 8);
    let first = backlog.read(6).expect("readable");
    assert_eq!((first.batch.len(), first.more, first.batch.oldest().map(|at| &at[..4])), (6, true, Some("2020")));
    backlog.save().expect("saved");
    assert_eq!(lag.measure(backlog.bookmark()).expect("measured"), 2);
    // What was read and not saved comes again.
    assert_eq!(backlog.read(6).expect("readable").batch.len(), 2);
    let mut again = folder.backlog(Start::Now);
    let (rest, lost) = drain(&mut again, 6);
    let whole = folder.text(OLD, 1) + &folder.text(OLD, 2);
    assert_eq!((String::from_utf8_lossy(&first.batch.body()).into_owned() + &rest, lost), (whole, 0));
    folder.record(OLD, EARLIER);
    assert_eq!(lag.measure(again.bookmark()).expect("measured"), 1);
    assert_eq!(Lag::new(folder.dir.path().to_owned()).measure(again.bookmark()).expect("measured"), 1);
    assert_eq!(drain(&mut again, 1).0.lines().count(), 1);
    assert_eq!(lag.measure(again.bookmark()).expect("measured"), 0);
}

#[test]
fn what_is_deleted_before_it_was_sent_is_counted_to_the_line_and_once() {
    let mut folder = Folder::new();
    folder.segment(OLD, 10, EARLIER);
    folder.segment(OLD, 10, EARLIER);
    folder.segment(OLD, 10, EARLIER);
    let mut backlog = folder.backlog(Start::Beginning);
    assert_eq!(backlog.read(4).expect("readable").batch.len(), 4);
    backlog.save().expect("saved");
    // Gone while the sink was down: 6 lines of the first segment, 10 of the second.
    folder.segment(COMING, 1, LATER);
    folder.retire(OLD, 1, COMING, LATER);
    folder.retire(OLD, 2, COMING, LATER);
    let mut backlog = folder.backlog(Start::Beginning);
    let (text, lost) = drain(&mut backlog, 100);
    assert_eq!((text.lines().count(), lost), (10 + 3, 16));
    // What was sent is no loss; and a chain that is gone as a whole shows by its tombstones, also one that is written twice.
    folder.retire(OLD, 3, COMING, LATER);
    folder.segment(OTHER, 7, EARLIER);
    folder.retire(OTHER, 1, COMING, LATER);
    backlog.save().expect("saved");
    let mut backlog = folder.backlog(Start::Beginning);
    assert_eq!(drain(&mut backlog, 100).1, 7);
    folder.segment(OTHER, 1, EARLIER);
    let twice = folder.text(COMING, 1).lines().last().expect("a line").to_owned();
    let event = twice.split(r#","previous_hash""#).next().expect("an event").to_owned() + "}";
    folder.line(COMING, event.as_bytes());
    assert_eq!(drain(&mut backlog, 100).1, 0);
}

#[test]
fn what_was_deleted_before_there_was_the_sink_is_no_loss_of_its_own() {
    let mut folder = Folder::new();
    folder.segment(OLD, 10, EARLIER);
    folder.segment(OLD, 10, EARLIER);
    folder.segment(OLD, 10, EARLIER);
    folder.segment(OTHER, 1, EARLIER);
    folder.retire(OLD, 1, OTHER, EARLIER);
    // This one after the sink began, and before it came to the chain.
    folder.segment(COMING, 1, LATER);
    let mut backlog = folder.backlog(Start::Beginning);
    folder.retire(OLD, 2, COMING, LATER);
    let (text, lost) = drain(&mut backlog, 3);
    assert_eq!((text.lines().count(), lost), (10 + 2 + 2, 10));
}

#[test]
fn a_sink_that_begins_now_has_what_comes_and_misses_nothing_of_before() {
    let mut folder = Folder::new();
    folder.segment(OLD, 10, EARLIER);
    folder.segment(OLD, 10, EARLIER);
    drop(folder.backlog(Start::Now));
    folder.record(OLD, &jiff::Timestamp::now().to_string());
    // It began before this line, though it had nothing yet.
    let mut backlog = folder.backlog(Start::Now);
    assert_eq!(drain(&mut backlog, 100).0.lines().count(), 1);
    folder.segment(COMING, 2, LATER);
    folder.retire(OLD, 1, COMING, LATER);
    let (text, lost) = drain(&mut backlog, 100);
    assert_eq!((text, lost), (folder.text(COMING, 1), 0));
    backlog.save().expect("saved");
    folder.record(OLD, LATER);
    assert_eq!(drain(&mut folder.backlog(Start::Beginning), 100).0.lines().count(), 1);
}

#[test]
fn a_bookmark_that_is_damaged_means_that_everything_comes_again() {
    let mut folder = Folder::new();
    folder.segment(OLD, 4, EARLIER);
    let mut backlog = folder.backlog(Start::Beginning);
    drain(&mut backlog, 100);
    backlog.save().expect("saved");
    assert_eq!(drain(&mut folder.backlog(Start::Beginning), 100).0, "");
    let saved = fs::read(folder.saved_at()).expect("saved");
    for damaged in [&b""[..], b"{}", &saved[..saved.len() - 1]] {
        fs::write(folder.saved_at(), damaged).expect("written");
        assert_eq!(drain(&mut folder.backlog(Start::Now), 100).0.lines().count(), 4);
    }
}

#[test]
fn a_batch_has_a_mebibyte_or_one_line_that_is_longer() {
    let mut folder = Folder::new();
    folder.segment(OLD, 1, EARLIER);
    let long = format!(r#"{{"extra":{{"phase":"final"}},"long":"{}"}}"#, "x".repeat(700_000));
    for _ in 0..3 {
        folder.line(OLD, long.as_bytes());
    }
    let mut backlog = folder.backlog(Start::Beginning);
    let mut sizes = Vec::new();
    loop {
        let read = backlog.read(100).expect("readable");
        sizes.push(read.batch.len());
        if !read.more {
            break;
        }
    }
    assert_eq!(sizes, [3, 1]);
}
