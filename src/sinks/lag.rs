//! How many lines a sink is behind, without reading what it has not read: the first line of a segment says how many stand before it, so
//! only each writer's last segment is counted, and of that only what is new since the last look.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::backlog::Bookmark;
use crate::ledger::chain::{Mark, SegmentName, WriterName};
use crate::ledger::trail::segment::{Found, SegmentReader};
use crate::ledger::trail::{self, TrailError};

/// The ends of all chains, as far as they were counted.
pub struct Lag {
    folder: PathBuf,
    ends: BTreeMap<WriterName, End>,
}

#[derive(Clone, Copy, Default)]
struct End {
    segment: u32,
    /// Behind the last whole line of the segment.
    offset: u64,
    /// Of the chain, up to there.
    lines: u64,
}

impl Lag {
    pub fn new(folder: PathBuf) -> Lag {
        Lag { folder, ends: BTreeMap::new() }
    }

    /// Lines behind `bookmark`.
    pub fn measure(&mut self, bookmark: &Bookmark) -> Result<u64, TrailError> {
        let listed = trail::segments(&self.folder)?;
        let mut behind = 0;
        let mut ends = BTreeMap::new();
        for of_writer in listed.chunk_by(|a, b| a.writer == b.writer) {
            let (first, last) = (&of_writer[0], &of_writer[of_writer.len() - 1]);
            let passed = bookmark.passed.get(&last.writer).map(|passed| passed.next);
            let known = self.ends.get(&last.writer).copied().or_else(|| {
                let at = bookmark.position.of(last.writer).filter(|at| at.segment == last.number)?;
                Some(End { segment: at.segment, offset: at.offset, lines: passed? })
            });
            let counted = counted(&self.folder, last, known.filter(|end| end.segment == last.number));
            let had = match passed {
                Some(next) => Ok(next),
                None => lines_before(&self.folder, first),
            };
            match (counted, had) {
                (Ok(end), Ok(had)) => {
                    behind += end.lines.saturating_sub(had);
                    ends.insert(last.writer, end);
                }
                // Deleted since the folder was listed.
                (Err(error), _) | (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
                (Err(error), _) | (_, Err(error)) => {
                    return Err(TrailError::Unreadable { path: self.folder.join(last.to_string()), error });
                }
            }
        }
        self.ends = ends;
        Ok(behind)
    }
}

/// Counts on from what is known of the segment.
fn counted(folder: &Path, segment: &SegmentName, known: Option<End>) -> io::Result<End> {
    let path = folder.join(segment.to_string());
    let mut end = known.unwrap_or(End { segment: segment.number, ..End::default() });
    if fs::metadata(&path)?.len() <= end.offset {
        return Ok(end);
    }
    let mut reader = SegmentReader::open(&path, end.offset)?;
    loop {
        match reader.find()? {
            Found::Line if reader.offset() == 0 => end.lines = before(reader.line()) + 1,
            Found::Line | Found::Overlong => end.lines += 1,
            Found::End { .. } | Found::Cut { .. } => break,
        }
    }
    end.offset = reader.offset();
    Ok(end)
}

fn lines_before(folder: &Path, segment: &SegmentName) -> io::Result<u64> {
    if segment.number == 1 {
        return Ok(0);
    }
    let mut reader = SegmentReader::open(&folder.join(segment.to_string()), 0)?;
    Ok(if reader.find()? == Found::Line { before(reader.line()) } else { 0 })
}

/// What the first line of a segment says of the lines before it.
fn before(line: &[u8]) -> u64 {
    match serde_json::from_slice(line).ok().as_ref().and_then(Mark::of) {
        Some(Mark::SegmentOpen { count, .. }) => count,
        _ => 0,
    }
}
