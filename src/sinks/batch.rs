//! Lines that are sent together.

use std::ops::Range;

use bytes::Bytes;

use crate::ledger::chain::WriterName;
use crate::ledger::trail;

/// Bytes past which no further line is added. One line may have more.
pub const BATCH_BYTES: usize = 1 << 20;

/// Some lines of the audit, word for word. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Each line with its newline, one behind the other.
    text: Bytes,
    lines: Vec<(WriterName, Range<usize>)>,
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// NDJSON: the lines as they stand in the files.
    pub fn body(&self) -> Bytes {
        self.text.clone()
    }

    /// Each line, without its newline, and whose it is.
    pub fn lines(&self) -> impl Iterator<Item = (WriterName, &[u8])> {
        self.lines.iter().map(|(writer, at)| (*writer, &self.text[at.clone()]))
    }

    /// The time stamp of the first line, as it stands there.
    pub fn oldest(&self) -> Option<&str> {
        self.lines().next().map(|(_, line)| trail::timestamp(line))
    }

    /// The first half and the rest; both have lines if there are two.
    pub fn halves(&self) -> (Batch, Batch) {
        let (first, second) = self.lines.split_at(self.lines.len() / 2);
        (self.part(first), self.part(second))
    }

    fn part(&self, lines: &[(WriterName, Range<usize>)]) -> Batch {
        let start = lines.first().map_or(0, |(_, at)| at.start);
        let end = lines.last().map_or(start, |(_, at)| at.end + 1);
        let shifted = lines.iter().map(|(writer, at)| (*writer, at.start - start..at.end - start));
        Batch { text: self.text.slice(start..end), lines: shifted.collect() }
    }
}

/// A batch that is being filled.
#[derive(Default)]
pub struct Filling {
    text: Vec<u8>,
    lines: Vec<(WriterName, Range<usize>)>,
}

impl Filling {
    pub fn has_room(&self, most_lines: usize) -> bool {
        self.lines.len() < most_lines && self.text.len() < BATCH_BYTES
    }

    pub fn push(&mut self, writer: WriterName, line: &[u8]) {
        let start = self.text.len();
        self.text.extend_from_slice(line);
        self.lines.push((writer, start..self.text.len()));
        self.text.push(b'\n');
    }

    pub fn done(self) -> Batch {
        Batch { text: self.text.into(), lines: self.lines }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_have_all_lines_in_their_order_down_to_a_single_one() {
        let writer: WriterName = "20261122T213908Z-00c0ffee".parse().expect("a name");
        let mut filling = Filling::default();
        for line in ["one", "", "three", "four", "five"] {
            filling.push(writer, line.as_bytes());
        }
        let whole = filling.done();
        let mut pieces = vec![whole.clone()];
        while let Some(at) = pieces.iter().position(|piece| piece.len() > 1) {
            let (first, second) = pieces.remove(at).halves();
            assert!(!first.is_empty() && !second.is_empty());
            pieces.splice(at..at, [first, second]);
        }
        let bodies: Vec<_> = pieces.iter().map(|piece| piece.body()).collect();
        assert_eq!(bodies, ["one\n", "\n", "three\n", "four\n", "five\n"]);
        assert!(pieces.iter().all(|piece| piece.lines().all(|(of, line)| of == writer && !line.contains(&b'\n'))));
        assert_eq!(whole.body(), "one\n\nthree\nfour\nfive\n");
    }
}
