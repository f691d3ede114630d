//! What other writers left in the folder: read once, at the start, under the folder's lock.
//!
//! A chain whose last line is a `segment_close` with reason `stopped` ended in order: nothing of it was open. One whose last segment is
//! locked is alive. Every other one died. It is taken over once: the writer that takes it over says so in its first lines, `adopted`
//! followed by the missing `final` records, and something else behind them (a checkpoint) when all of them are there. So a writer
//! killed in the middle of that leaves a chain that ends there, and the next one takes over both, with what is still missing.
//!
//! Which `final` belongs to which `request` is in their ids: all records of an exchange end with the same digits ([`Id::exchange`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::lock;
use crate::ledger::chain::mark::{ChainHead, CloseReason};
use crate::ledger::chain::{self, GENESIS, Mark, SegmentName, WriterName};
use crate::ledger::record::{Id, Record};
use crate::ledger::trail;
use crate::ledger::trail::segment::{Found, LinesBack, SegmentReader};

/// What was found.
#[derive(Default)]
pub(super) struct Survey {
    /// The last known line of each chain, sorted by writer.
    pub heads: Vec<ChainHead>,
    /// Chains of processes that died, not wholly taken over yet, the oldest first.
    pub dead: Vec<Dead>,
    /// Whose chains were taken over, wholly, and by whom.
    pub adopted: BTreeMap<WriterName, WriterName>,
}

/// A chain to be taken over.
pub(super) struct Dead {
    pub last: ChainHead,
    pub torn_bytes: u64,
    /// Its requests without a final record.
    pub open: Vec<Record<'static>>,
}

/// The end of a chain.
struct End {
    head: ChainHead,
    torn_bytes: u64,
    stopped: bool,
}

/// The first lines of a chain: whom it took over, and whether it came to the end of that.
#[derive(Default)]
struct Front {
    adopted: Vec<WriterName>,
    over: bool,
}

pub(super) fn survey(dir: &Path) -> io::Result<Survey> {
    let mut found = Survey::default();
    let chains = segments(dir)?;
    let mut died: Vec<(WriterName, End)> = Vec::new();
    for (writer, numbers) in &chains {
        let alive = numbers.iter().rev().take(2).try_fold(false, |alive, number| {
            Ok::<_, io::Error>(alive || lock::is_locked(&path(dir, *writer, *number))?)
        })?;
        let end = end(dir, *writer, numbers)?;
        found.heads.push(end.head.clone());
        let front = front(dir, *writer)?;
        if front.over || alive {
            found.adopted.extend(front.adopted.iter().map(|adopted| (*adopted, *writer)));
        }
        if !alive && !end.stopped {
            died.push((*writer, end));
        }
    }
    died.retain(|(writer, _)| !found.adopted.contains_key(writer));
    let open = open_requests(dir, died.iter().map(|(writer, _)| (*writer, chains[writer].as_slice())))?;
    for ((_, end), open) in died.into_iter().zip(open) {
        found.dead.push(Dead { last: end.head, torn_bytes: end.torn_bytes, open });
    }
    Ok(found)
}

/// The segments in the folder, by writer, numbers ascending.
pub(super) fn segments(dir: &Path) -> io::Result<BTreeMap<WriterName, Vec<u32>>> {
    let mut chains: BTreeMap<WriterName, Vec<u32>> = BTreeMap::new();
    for name in trail::names(dir)? {
        chains.entry(name.writer).or_default().push(name.number);
    }
    Ok(chains)
}

pub(super) fn path(dir: &Path, writer: WriterName, number: u32) -> PathBuf {
    dir.join(SegmentName { writer, number }.to_string())
}

/// The last whole line of a chain. A segment without any (its writer died while opening it) has its predecessor's.
fn end(dir: &Path, writer: WriterName, numbers: &[u32]) -> io::Result<End> {
    let nothing =
        ChainHead { writer, segment: numbers.last().copied().unwrap_or(1), count: 0, head: GENESIS.to_owned() };
    let mut end = End { head: nothing, torn_bytes: 0, stopped: false };
    for number in numbers.iter().rev() {
        let path = path(dir, writer, *number);
        let Some(tail) = Tail::read(&path)? else { continue };
        let last = *number == end.head.segment;
        end.torn_bytes += tail.torn_bytes;
        if let Some((hash, event)) = tail.line {
            let closed = match Mark::of(&event) {
                Some(Mark::SegmentClose { reason, count, .. }) => Some((reason, count + 1)),
                _ => None,
            };
            let count = match closed {
                Some((_, count)) => count,
                None => lines_before(&path)? + lines_in(&path, tail.end)?,
            };
            end.head.count = count;
            end.head.head = hash;
            end.stopped =
                last && tail.torn_bytes == 0 && closed.is_some_and(|(reason, _)| reason == CloseReason::Stopped);
            break;
        }
    }
    Ok(end)
}

/// A segment's end.
pub(super) struct Tail {
    /// Hash and event of the last line that is one.
    pub line: Option<(String, Value)>,
    /// Where that line ends.
    pub end: u64,
    /// What stands behind it.
    pub torn_bytes: u64,
}

impl Tail {
    /// `None`: the file is gone.
    pub(super) fn read(path: &Path) -> io::Result<Option<Tail>> {
        let file = match fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = file.metadata()?.len();
        let whole = behind_the_last_newline(&file, length)?;
        let mut back = LinesBack::open(path, whole)?;
        let mut end = whole;
        while let Some(line) = back.find()? {
            let sealed = chain::open(&line);
            if let Some((hash, event)) =
                sealed.and_then(|sealed| Some((sealed.hash.to_string(), serde_json::from_slice(&sealed.event).ok()?)))
            {
                return Ok(Some(Tail { line: Some((hash, event)), end, torn_bytes: length - end }));
            }
            end -= line.len() as u64 + 1;
        }
        Ok(Some(Tail { line: None, end: 0, torn_bytes: length }))
    }
}

fn behind_the_last_newline(file: &fs::File, length: u64) -> io::Result<u64> {
    let mut end = length;
    let mut piece = vec![0; 64 << 10];
    while end > 0 {
        let start = end.saturating_sub(piece.len() as u64);
        let piece = &mut piece[..(end - start) as usize];
        file.read_exact_at(piece, start)?;
        if let Some(at) = memchr::memrchr(b'\n', piece) {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// Lines of the chain before this segment, as its first line says; 0 where that is none.
fn lines_before(path: &Path) -> io::Result<u64> {
    let mut reader = SegmentReader::open(path, 0)?;
    if reader.find()? != Found::Line {
        return Ok(0);
    }
    Ok(match serde_json::from_slice(reader.line()).ok().as_ref().and_then(Mark::of) {
        Some(Mark::SegmentOpen { count, .. }) => count,
        _ => 0,
    })
}

/// Whole lines in a segment up to this place. (Its writer may be alive, and write more meanwhile.)
pub(super) fn lines_in(path: &Path, end: u64) -> io::Result<u64> {
    let (mut lines, mut reader) = (0, SegmentReader::open(path, 0)?);
    while reader.offset() < end && matches!(reader.find()?, Found::Line | Found::Overlong) {
        lines += u64::from(reader.end_of_line() <= end);
    }
    Ok(lines)
}

fn each_line(path: &Path, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut reader = SegmentReader::open(path, 0)?;
    loop {
        match reader.find()? {
            Found::Line => each(reader.line()),
            Found::Overlong => {}
            Found::End { .. } | Found::Cut { .. } => return Ok(()),
        }
    }
}

fn front(dir: &Path, writer: WriterName) -> io::Result<Front> {
    let mut front = Front::default();
    let mut reader = match SegmentReader::open(&path(dir, writer, 1), 0) {
        Ok(reader) => reader,
        // Retention took it: it keeps it for as long as a chain is there that was taken over in it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Front { over: true, ..front }),
        Err(error) => return Err(error),
    };
    while reader.find()? == Found::Line {
        let event: Value = serde_json::from_slice(reader.line()).unwrap_or_default();
        match Mark::of(&event) {
            Some(Mark::SegmentOpen { .. }) => {}
            Some(Mark::Adopted { writer, .. }) => front.adopted.push(writer),
            _ if event["extra"]["outcome"] == "crashed" => {}
            _ => {
                front.over = true;
                break;
            }
        }
    }
    Ok(front)
}

/// For each of these chains the requests that have no final record in any of them.
fn open_requests<'a>(
    dir: &Path,
    chains: impl Iterator<Item = (WriterName, &'a [u32])>,
) -> io::Result<Vec<Vec<Record<'static>>>> {
    let mut open: Vec<HashMap<u64, Vec<u8>>> = Vec::new();
    // Those may stand in another chain than their request.
    let mut crashed: HashSet<u64> = HashSet::new();
    for (writer, numbers) in chains {
        let mut running: HashMap<u64, Vec<u8>> = HashMap::new();
        for number in numbers {
            each_line(&path(dir, writer, *number), |line| match phase_and_exchange(line) {
                Some((b"request", exchange)) => _ = running.insert(exchange, line.to_vec()),
                Some((b"final", exchange)) => {
                    let of_another_chain = running.remove(&exchange).is_none() && says_crashed(line);
                    crashed.extend(of_another_chain.then_some(exchange));
                }
                _ => {}
            })?;
        }
        open.push(running);
    }
    let of = |running: HashMap<u64, Vec<u8>>| {
        let left = running.into_iter().filter(|(exchange, _)| !crashed.contains(exchange));
        let mut records: Vec<Record<'static>> = left.filter_map(|(_, line)| Record::read(&line)).collect();
        records.sort_by_key(|record| record.timestamp);
        records
    };
    Ok(open.into_iter().map(of).collect())
}

/// Cut from the line's text: this is done for every line of a chain, which may be gigabytes. A quotation mark inside a JSON string is
/// escaped, so neither pattern occurs in one.
fn phase_and_exchange(line: &[u8]) -> Option<(&[u8], u64)> {
    let at = memchr::memmem::find(line, br#","phase":""#)? + br#","phase":""#.len();
    let phase = &line[at..at + memchr::memchr(b'"', &line[at..])?];
    let at = memchr::memmem::find(line, br#"},"id":""#)? + br#"},"id":""#.len();
    let id: Id = std::str::from_utf8(line.get(at..at + 36)?).ok()?.parse().ok()?;
    Some((phase, id.exchange()))
}

fn says_crashed(line: &[u8]) -> bool {
    memchr::memmem::find(line, br#","outcome":"crashed""#).is_some()
}
