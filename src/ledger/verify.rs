//! Whether an audit is what was written: every hash computed anew, every mark held against what it speaks of.
//!
//! - [`line`]: one line, strictly: canonical form, hash, columns, what it is.
//! - [`walk`]: one writer's chain, from its first segment that is there to its last line.
//! - [`across`]: what chains and kept checkpoints say about each other: heads, adoptions, tombstones.
//! - [`finding`]: what was found, in words.
//!
//! A finding is one of two things. A *problem* cannot be in a log that only we wrote, whatever crashed: the audit does not hold. A
//! *gap* is something that nothing in the files shows, such as whether lines after the last checkpoint were cut: who reads the verdict has to
//! know it, and it is no accusation. The first problem of a chain ends its check, since what follows cannot be judged.
//!
//! It reads as a stream: memory is one buffer, the requests that are open at a time, and some hundred bytes for each segment and checkpoint.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use ed25519_dalek::pkcs8::DecodePublicKey;
use ed25519_dalek::{Signature, VerifyingKey};
use serde::Serialize;

use super::chain::{self, SegmentName, WriterName};
use super::trail::segment::{Found, SegmentReader};
use super::trail::{self, TrailError};
use crate::identity::private_file::is_held;

mod across;
pub mod finding;
mod line;
mod walk;

pub use finding::{CannotCheck, Fault, Gap, Problem, Spot};

use across::Across;
use line::Kind;
use walk::Walk;

/// What an audit is held against, beside itself.
#[derive(Default)]
pub struct Against {
    keys: Vec<Key>,
    checkpoints: Vec<Kept>,
}

/// A public key that checkpoints and tombstones may be signed with.
struct Key {
    id: String,
    key: VerifyingKey,
}

/// A checkpoint that was kept elsewhere.
struct Kept {
    writer: WriterName,
    /// Lines before it.
    count: u64,
    head: String,
    hash: String,
    timestamp: String,
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
pub struct Verdict {
    pub chains: Vec<ChainReport>,
    /// In the order of the files: the first is the first bad record.
    pub problems: Vec<Problem>,
    pub gaps: Vec<Gap>,
    pub bytes: u64,
}

/// One writer's chain.
#[derive(Clone, Debug, Serialize)]
pub struct ChainReport {
    pub writer: WriterName,
    pub segments: u32,
    /// Lines that were read and hold.
    pub lines: u64,
    pub checkpoints: u64,
    pub end: End,
}

/// How a chain ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// With a `segment_close` whose reason is `stopped`.
    Stopped,
    /// Its writer has it open.
    Running,
    /// Its writer died, and another took it over.
    Adopted,
    /// Its writer is gone, and nothing says how.
    Open,
    /// A problem was found before its end.
    Unknown,
}

impl Verdict {
    pub fn holds(&self) -> bool {
        self.problems.is_empty()
    }

    pub fn lines(&self) -> u64 {
        self.chains.iter().map(|chain| chain.lines).sum()
    }
}

impl Against {
    /// Adds a public key (SPKI PEM, as `audit-key.pub` is).
    pub fn key(&mut self, path: &Path) -> Result<(), CannotCheck> {
        let unusable = |what: String| CannotCheck::Key { path: path.to_owned(), what };
        let text = read_small(path).map_err(|e| unusable(e.to_string()))?;
        let key = VerifyingKey::from_public_key_pem(&text)
            .map_err(|_| unusable("no Ed25519 public key in PEM; give audit-key.pub".to_owned()))?;
        let id = chain::key_id(key.as_bytes());
        if self.keys.iter().all(|known| known.id != id) {
            self.keys.push(Key { id, key });
        }
        Ok(())
    }

    pub fn has_key(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Adds the checkpoints of a file that was kept elsewhere: one or more lines, as `audit.checkpoint_file` has them. They must be
    /// signed by a key that was added before, if one was.
    pub fn checkpoints(&mut self, path: &Path) -> Result<(), CannotCheck> {
        let unusable = |number, what: &str| CannotCheck::Checkpoints {
            path: path.to_owned(),
            line: number,
            what: what.to_owned(),
        };
        let unreadable =
            |error: io::Error| CannotCheck::Checkpoints { path: path.to_owned(), line: 0, what: error.to_string() };
        let mut reader = SegmentReader::open(path, 0).map_err(unreadable)?;
        let mut number = 0;
        let before = self.checkpoints.len();
        loop {
            number += 1;
            match reader.find().map_err(unreadable)? {
                Found::Line => {}
                // A last line without its newline was copied by hand, or torn: nothing can be held against half of one.
                Found::End { torn_bytes: 0 } => break,
                Found::End { .. } => return Err(unusable(number, "has no end; the file was cut, or copied in part")),
                Found::Overlong | Found::Cut { .. } => return Err(unusable(number, "is no checkpoint")),
            }
            let line = line::read(reader.line()).map_err(|fault| unusable(number, &fault.to_string()))?;
            let Kind::Mark(mark @ chain::Mark::Checkpoint { .. }) = &line.kind else {
                return Err(unusable(number, "is no checkpoint"));
            };
            if let Err(fault) = self.signed(mark, &line.timestamp)
                && self.has_key()
            {
                return Err(unusable(number, &fault.to_string()));
            }
            if let chain::Mark::Checkpoint { writer, count, head, .. } = mark {
                self.checkpoints.push(Kept {
                    writer: *writer,
                    count: *count,
                    head: head.clone(),
                    hash: line.hash.to_string(),
                    timestamp: line.timestamp.clone(),
                });
            }
        }
        if self.checkpoints.len() == before {
            return Err(unusable(1, "is not there: the file holds no checkpoint"));
        }
        Ok(())
    }

    /// Whether a mark's signature is that of one of the keys.
    fn signed(&self, mark: &chain::Mark, timestamp: &str) -> Result<(), Fault> {
        use base64::Engine;
        let (chain::Mark::Checkpoint { key_id, signature, .. } | chain::Mark::Tombstone { key_id, signature, .. }) =
            mark
        else {
            return Ok(());
        };
        let Some(known) = self.keys.iter().find(|key| key.id == *key_id) else {
            return Err(Fault::UnknownKey { key_id: key_id.clone() });
        };
        let payload = mark.payload(timestamp).unwrap_or_default();
        let signature = base64::engine::general_purpose::STANDARD.decode(signature).ok();
        let signature = signature.and_then(|bytes| Signature::from_slice(&bytes).ok()).ok_or(Fault::Signature)?;
        known.key.verify_strict(&payload, &signature).map_err(|_| Fault::Signature)
    }
}

/// Checks all that is in `folder`.
pub fn verify(folder: &Path, against: &Against) -> Result<Verdict, CannotCheck> {
    let segments = trail::segments(folder)?;
    if segments.is_empty() && against.checkpoints.is_empty() {
        return Err(CannotCheck::NothingThere { folder: folder.to_owned() });
    }
    let mut verdict = Verdict::default();
    let mut across = Across::new(against);
    // What chains say about others stands in their first lines; those others may be read before them.
    for of_writer in segments.chunk_by(|a, b| a.writer == b.writer) {
        across.expect_heads_of(folder, of_writer)?;
    }
    for of_writer in segments.chunk_by(|a, b| a.writer == b.writer) {
        let walk = walk_chain(folder, of_writer, against, &mut across, &mut verdict)?;
        across.walked(walk);
    }
    across.conclude(&mut verdict);
    if !against.has_key() {
        verdict.gaps.insert(0, Gap::NoKey);
    }
    if against.checkpoints.is_empty() {
        verdict.gaps.push(Gap::NoCheckpointsKept);
    }
    Ok(verdict)
}

/// One chain from its first segment that is there to its end.
fn walk_chain(
    folder: &Path,
    segments: &[SegmentName],
    against: &Against,
    across: &mut Across,
    verdict: &mut Verdict,
) -> Result<Walk, CannotCheck> {
    let mut walk = Walk::new(segments[0].writer, across.expected_of(segments[0].writer));
    for name in segments {
        let path = folder.join(name.to_string());
        let unreadable = |error| TrailError::Unreadable { path: path.clone(), error };
        let mut reader = match SegmentReader::open(&path, 0) {
            Ok(reader) => reader,
            // Retention, since the folder was listed. Then a tombstone will say so.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(unreadable(error).into()),
        };
        let mut misplaced = walk.enter(name).err();
        loop {
            let found = reader.find().map_err(unreadable)?;
            let fault = match found {
                Found::Line => {
                    verdict.bytes += reader.line().len() as u64 + 1;
                    let mut step = || line::read(reader.line()).and_then(|line| walk.take(line, against, across));
                    misplaced.take().or_else(|| step().err())
                }
                Found::End { torn_bytes } => {
                    walk.torn_bytes = torn_bytes;
                    verdict.bytes += torn_bytes;
                    break;
                }
                Found::Overlong => Some(Fault::Overlong),
                Found::Cut { .. } => Some(Fault::Shrunk),
            };
            if let Some(fault) = fault {
                let spot = Spot {
                    segment: name.to_string(),
                    line: walk.line_of_segment + 1,
                    offset: reader.offset(),
                    id: line::id(reader.line()),
                };
                verdict.problems.push(Problem { spot: Some(spot), fault });
                walk.end = End::Unknown;
                return Ok(walk);
            }
        }
        if let Err(fault) = walk.leave() {
            let spot =
                Spot { segment: name.to_string(), line: walk.line_of_segment + 1, offset: reader.offset(), id: None };
            verdict.problems.push(Problem { spot: Some(spot), fault });
            walk.end = End::Unknown;
            return Ok(walk);
        }
        walk.end = match walk.stopped() {
            true => End::Stopped,
            false if is_held(reader.file()).unwrap_or_default() => End::Running,
            false => End::Open,
        };
    }
    Ok(walk)
}

/// A key file: some hundred bytes.
fn read_small(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    File::open(path)?.take(64 << 10).read_to_string(&mut text)?;
    Ok(text)
}

/// The public halves of the keys that a state folder's proxy signs with (`audit-key.pub`) and signed with before (`audit-key-ID.pub`).
pub fn public_keys_of(state_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(state_dir)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name == "audit-key.pub" || (name.starts_with("audit-key-") && name.ends_with(".pub")) {
            found.push(state_dir.join(&*name));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
pub(super) mod honest;
#[cfg(test)]
mod mutation;
#[cfg(test)]
mod tests;
