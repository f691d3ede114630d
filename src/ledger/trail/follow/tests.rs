use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use super::super::LONGEST_LINE;
use super::*;

const FIRST: &str = "20261122T100000Z-00000001";
const SECOND: &str = "20261122T100005Z-00000002";
const THIRD: &str = "20261122T110000Z-00000003";

fn path(folder: &Path, writer: &str, number: u32) -> PathBuf {
    folder.join(SegmentName { writer: writer.parse().expect("a name"), number }.to_string())
}

fn append(folder: &Path, writer: &str, number: u32, text: &str) {
    let path = path(folder, writer, number);
    let mut file = OpenOptions::new().create(true).append(true).open(path).expect("opened");
    file.write_all(text.as_bytes()).expect("written");
}

/// A line that says when it was written, and what it is.
fn line(seconds: u32, what: &str) -> String {
    format!("{{\"error\":\"{what}\",\"timestamp\":\"2026-11-22T10:00:{seconds:02}.000000+00:00\"}}\n")
}

fn close() -> &'static str {
    "{\"extra\":{\"phase\":\"segment_close\"}}\n"
}

/// What is there now: the lines' words, and losses.
fn drain(follower: &mut Follower) -> Vec<String> {
    let mut seen = Vec::new();
    while let Some(event) = follower.next().expect("readable") {
        seen.push(match event {
            Event::Line { line, .. } => {
                let value: serde_json::Value = serde_json::from_slice(line).expect("JSON");
                value["error"].as_str().unwrap_or("close").to_owned()
            }
            Event::Lost { loss, .. } => format!("{loss:?}"),
        });
    }
    seen
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

#[test]
fn lines_come_in_order_across_segments_and_writers_that_overlap() {
    let dir = folder();
    let dir = dir.path();
    append(dir, FIRST, 1, &(line(1, "a") + &line(3, "b") + close()));
    append(dir, FIRST, 2, &(line(7, "e") + &line(30, "g")));
    append(dir, SECOND, 1, &(line(5, "c") + &line(6, "d") + &line(9, "f")));
    append(dir, SECOND, 2, &line(40, "h"));
    append(dir, THIRD, 1, &line(50, "i"));
    fs::write(dir.join("audit-key.pub"), "no segment").expect("written");
    // The close mark here has no time, so it comes as early as its writer allows.
    let seen = drain(&mut Follower::new(dir, &Position::default()));
    assert_eq!(seen, ["a", "b", "close", "c", "d", "e", "f", "g", "h", "i"]);
}

#[test]
fn a_follower_goes_on_as_files_grow_rotate_and_appear() {
    let dir = folder();
    let dir = dir.path();
    append(dir, FIRST, 1, &line(1, "old"));
    let mut follower = Follower::new(dir, &Position::at_the_end(dir).expect("readable"));
    assert!(drain(&mut follower).is_empty());
    append(dir, FIRST, 1, &line(2, "grown"));
    append(dir, FIRST, 1, "{\"error\":\"ha");
    assert_eq!(drain(&mut follower), ["grown"]);
    append(dir, FIRST, 1, "lf\"}\n");
    append(dir, FIRST, 1, close());
    append(dir, FIRST, 2, &line(3, "rotated"));
    append(dir, SECOND, 1, &line(4, "another"));
    assert_eq!(drain(&mut follower), ["half", "close", "rotated", "another"]);
    assert!(drain(&mut follower).is_empty());
    append(dir, SECOND, 1, &line(5, "more"));
    append(dir, FIRST, 2, &line(6, "of both"));
    assert_eq!(drain(&mut follower), ["more", "of both"]);
}

#[test]
fn a_saved_position_goes_on_where_it_was_at_every_line() {
    let dir = folder();
    let dir = dir.path();
    append(dir, FIRST, 1, &(line(1, "a") + &line(2, "b") + close()));
    append(dir, FIRST, 2, &line(4, "d"));
    append(dir, SECOND, 1, &(line(5, "e") + "torn"));
    append(dir, THIRD, 1, &line(6, "f"));
    let all = drain(&mut Follower::new(dir, &Position::default()));
    assert_eq!(all, ["a", "b", "close", "d", "e", "f"]);
    for taken in 0..=all.len() {
        let mut follower = Follower::new(dir, &Position::default());
        for _ in 0..taken {
            follower.next().expect("readable").expect("a line");
        }
        let saved = serde_json::to_string(&follower.position()).expect("JSON");
        let position: Position = serde_json::from_str(&saved).expect("a position");
        assert_eq!(drain(&mut Follower::new(dir, &position)), all[taken..], "after {taken}: {saved}");
    }
}

#[test]
fn a_file_that_is_renamed_or_deleted_while_it_is_followed_is_read_to_its_end() {
    for rename in [true, false] {
        let dir = folder();
        let dir = dir.path();
        append(dir, FIRST, 1, &line(1, "a"));
        let mut follower = Follower::new(dir, &Position::default());
        assert_eq!(drain(&mut follower), ["a"]);
        let mut open = OpenOptions::new().append(true).open(path(dir, FIRST, 1)).expect("open");
        match rename {
            true => fs::rename(path(dir, FIRST, 1), dir.join("moved")).expect("renamed"),
            false => fs::remove_file(path(dir, FIRST, 1)).expect("removed"),
        }
        assert!(drain(&mut follower).is_empty());
        open.write_all((line(2, "b") + close()).as_bytes()).expect("written");
        append(dir, FIRST, 2, &line(3, "c"));
        assert_eq!(drain(&mut follower), ["b", "close", "c"]);
    }
}

#[test]
fn what_is_lost_is_said_and_reading_goes_on() {
    let dir = folder();
    let dir = dir.path();
    for number in 1..=5 {
        append(dir, FIRST, number, &(line(number, "early") + &line(number, "late")));
    }
    let mut follower = Follower::new(dir, &Position::default());
    follower.next().expect("readable").expect("a line");
    let position = follower.position();
    drop(follower);
    fs::remove_file(path(dir, FIRST, 1)).expect("removed");
    fs::remove_file(path(dir, FIRST, 2)).expect("removed");
    fs::remove_file(path(dir, FIRST, 4)).expect("removed");
    let seen = drain(&mut Follower::new(dir, &position));
    assert_eq!(seen, ["Gone { after: 1, next: 3 }", "early", "late", "Gone { after: 3, next: 5 }", "early", "late"]);
    // Without a position nothing was expected.
    let seen = drain(&mut Follower::new(dir, &Position::default()));
    assert_eq!(seen, ["early", "late", "Gone { after: 3, next: 5 }", "early", "late"]);
}

#[test]
fn a_torn_end_is_said_once_the_writer_went_on_elsewhere() {
    let dir = folder();
    let dir = dir.path();
    append(dir, FIRST, 1, &(line(1, "a") + "{\"err"));
    let mut follower = Follower::new(dir, &Position::default());
    assert_eq!(drain(&mut follower), ["a"]);
    append(dir, FIRST, 2, &line(2, "b"));
    let end = line(1, "a").len();
    assert_eq!(drain(&mut follower), [&format!("Torn {{ at: Place {{ segment: 1, offset: {end} }}, bytes: 5 }}"), "b"]);
}

#[test]
fn a_file_that_was_cut_or_replaced_is_noticed_and_followed_on() {
    let dir = folder();
    let dir = dir.path();
    append(dir, FIRST, 1, &(line(1, "a") + &line(2, "b")));
    let mut follower = Follower::new(dir, &Position::default());
    assert_eq!(drain(&mut follower), ["a", "b"]);
    let position = follower.position();
    let file = OpenOptions::new().write(true).open(path(dir, FIRST, 1)).expect("open");
    file.set_len(line(1, "a").len() as u64).expect("cut");
    assert!(drain(&mut follower)[0].starts_with("Changed"));
    assert!(drain(&mut follower).is_empty(), "said once");
    // Its writer took a line back, and writes it again.
    append(dir, FIRST, 1, &(line(2, "b") + &line(3, "c")));
    assert_eq!(drain(&mut follower), ["c"]);

    fs::write(path(dir, FIRST, 1), line(1, &"other".repeat(40)) + &line(2, "d")).expect("replaced");
    let seen = drain(&mut Follower::new(dir, &position));
    assert!(seen.len() == 2 && seen[0].starts_with("Changed") && seen[1] == "d", "{seen:?}");
}

#[test]
fn an_overlong_line_is_skipped_and_said() {
    let dir = folder();
    let dir = dir.path();
    append(dir, FIRST, 1, &(line(1, "a") + &"x".repeat(LONGEST_LINE + 1) + "\n" + &line(2, "b")));
    let seen = drain(&mut Follower::new(dir, &Position::default()));
    assert!(seen.len() == 3 && seen[1].starts_with("Overlong"), "{seen:?}");
}

#[test]
fn many_dead_writers_need_few_descriptors_and_are_forgotten_with_their_files() {
    let dir = folder();
    let dir = dir.path();
    let writer = |n: u32| format!("20261122T10{:02}{:02}Z-{n:08x}", n / 60, n % 60);
    for n in 0..300 {
        append(dir, &writer(n), 1, &line(0, "x").replace("10:00:00", &format!("10:{:02}:{:02}", n / 60, n % 60)));
    }
    let open = |follower: &Follower| follower.chains.iter().filter(|chain| chain.reader.is_some()).count();
    let mut follower = Follower::new(dir, &Position::default());
    for _ in 0..300 {
        assert!(matches!(follower.next(), Ok(Some(Event::Line { .. }))));
        // Those with the same start are open at once.
        assert!(open(&follower) <= KEPT_OPEN + 2, "{}", open(&follower));
    }
    assert!(drain(&mut follower).is_empty());
    for n in 0..290 {
        fs::remove_file(path(dir, &writer(n), 1)).expect("removed");
    }
    assert!(drain(&mut follower).is_empty());
    // Those of which a file is still open may grow yet.
    let kept = follower.position().places().count();
    assert!((10..=KEPT_OPEN).contains(&kept), "{kept}");
}

#[test]
fn a_folder_that_is_not_there_is_an_error_and_an_empty_one_is_not() {
    let dir = folder();
    let mut follower = Follower::new(dir.path().join("none"), &Position::default());
    assert!(follower.next().is_err());
    assert!(Follower::new(dir.path(), &Position::default()).next().expect("readable").is_none());
}
