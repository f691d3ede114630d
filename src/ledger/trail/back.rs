//! The last lines of a folder, found from its end, so that a long log is not read for them.

use std::path::Path;

use super::follow::timestamp;
use super::segment::LinesBack;
use super::{Position, TrailError, segments};
use crate::ledger::chain::SegmentName;

/// The last `count` lines before `end` that are wanted, in the order of their time stamps.
pub fn last(
    folder: &Path,
    end: &Position,
    count: usize,
    mut wanted: impl FnMut(&[u8]) -> bool,
) -> Result<Vec<Vec<u8>>, TrailError> {
    let listed = segments(folder)?;
    let mut found: Vec<Vec<u8>> = Vec::new();
    for (writer, place) in end.places().rev() {
        let mut of_writer = 0;
        let of = |name: &&SegmentName| name.writer == writer && name.number <= place.segment;
        'writer: for name in listed.iter().filter(of).rev() {
            let path = folder.join(name.to_string());
            let unreadable = |error| TrailError::Unreadable { path: path.clone(), error };
            let behind = match name.number == place.segment {
                true => place.offset,
                false => super::segment::end(&path).map_err(unreadable)?,
            };
            let mut lines = match LinesBack::open(&path, behind) {
                Ok(lines) => lines,
                // Retention, since the folder was listed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                Err(error) => return Err(unreadable(error)),
            };
            while let Some(line) = lines.find().map_err(unreadable)? {
                // Everything before it is older than what is there already.
                let full = found.len() >= count + of_writer;
                if of_writer == count
                    || (full && found.first().is_some_and(|oldest| timestamp(&line) < timestamp(oldest)))
                {
                    break 'writer;
                }
                if wanted(&line) {
                    found.push(line);
                    of_writer += 1;
                }
            }
        }
        found.sort_by(|a, b| timestamp(a).cmp(timestamp(b)));
        found.drain(..found.len().saturating_sub(count));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_last_lines_of_all_writers_come_in_the_order_of_their_time() {
        let dir = tempfile::tempdir().expect("a folder");
        let line = |second: u32| format!("{{\"timestamp\":\"2026-11-22T10:00:{second:02}.000000+00:00\"}}\n");
        let lines = |seconds: &[u32]| seconds.iter().map(|second| line(*second)).collect::<String>();
        for (name, seconds) in [
            ("20261122T100000Z-00000001-000001", &[1, 2, 3][..]),
            ("20261122T100000Z-00000001-000002", &[4, 9]),
            ("20261122T100005Z-00000002-000001", &[5, 6, 8]),
        ] {
            fs::write(dir.path().join(format!("audit-{name}.jsonl")), lines(seconds) + "torn").expect("written");
        }
        let end = Position::at_the_end(dir.path()).expect("readable");
        let last = |count, wanted: fn(&[u8]) -> bool| {
            let found = super::last(dir.path(), &end, count, wanted).expect("readable");
            found.iter().map(|line| timestamp(line)[17..19].parse().expect("seconds")).collect::<Vec<u32>>()
        };
        assert_eq!(last(4, |_| true), [5, 6, 8, 9]);
        assert_eq!(last(0, |_| true), [0; 0]);
        assert_eq!(last(100, |_| true), [1, 2, 3, 4, 5, 6, 8, 9]);
        assert_eq!(last(2, |line| timestamp(line)[17..19].parse::<u32>().expect("seconds") < 5), [3, 4]);
    }
}
