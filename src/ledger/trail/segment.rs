//! One segment's lines, with bounded memory: forwards with what is behind the last newline told apart, or backwards.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::LONGEST_LINE;

/// How much is asked of the file at once.
const CHUNK: usize = 64 << 10;

/// What stands at a reader's place.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// A line, without its newline: [`SegmentReader::line`].
    Line,
    /// The file ends here, or after so many bytes that no newline ends: a line that is being written, or was torn.
    End { torn_bytes: u64 },
    /// The file is shorter than the place: it was cut.
    Cut { length: u64 },
    /// A line of more than [`LONGEST_LINE`] bytes: no writer of ours wrote it. Skipped to its end, or to the file's.
    Overlong,
}

/// A file and a place in it.
pub struct SegmentReader {
    file: File,
    /// Where `buffer[start..]` stands in the file.
    offset: u64,
    buffer: Vec<u8>,
    start: usize,
    /// Up to here `buffer` holds no newline.
    searched: usize,
    /// The line that was found, without its newline, if one was.
    line: Option<(usize, usize)>,
}

impl SegmentReader {
    pub fn open(path: &Path, offset: u64) -> io::Result<SegmentReader> {
        Ok(SegmentReader::new(File::open(path)?, offset))
    }

    pub fn new(file: File, offset: u64) -> SegmentReader {
        SegmentReader { file, offset, buffer: Vec::new(), start: 0, searched: 0, line: None }
    }

    /// Steps over the line that was found before, and looks for the next. Ask again after [`Found::End`]: the file may have grown.
    pub fn find(&mut self) -> io::Result<Found> {
        self.step();
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.buffer[self.searched..]) {
                let end = self.searched + end;
                if end - self.start > LONGEST_LINE {
                    self.skip(end + 1);
                    return Ok(Found::Overlong);
                }
                self.line = Some((self.start, end));
                return Ok(Found::Line);
            }
            self.searched = self.buffer.len();
            if self.searched - self.start > LONGEST_LINE {
                return self.skip_overlong();
            }
            if self.fill()? == 0 {
                let torn_bytes = (self.buffer.len() - self.start) as u64;
                let length = self.file.metadata()?.len();
                if length < self.offset + torn_bytes {
                    self.drop_buffer();
                    if length < self.offset {
                        return Ok(Found::Cut { length });
                    }
                    return Ok(Found::End { torn_bytes: length - self.offset });
                }
                // What was torn is read anew: its writer takes a torn line back before it writes another.
                self.drop_buffer();
                return Ok(Found::End { torn_bytes });
            }
        }
    }

    /// The line that [`SegmentReader::find`] found, without its newline; empty where it found none.
    pub fn line(&self) -> &[u8] {
        self.line.map_or(&[], |(start, end)| &self.buffer[start..end])
    }

    /// Where the line that was found begins; else where the next one will.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Where the line that was found ends, its newline included.
    pub fn end_of_line(&self) -> u64 {
        self.offset + self.line.map_or(0, |(start, end)| (end + 1 - start) as u64)
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    fn step(&mut self) {
        if let Some((_, end)) = self.line.take() {
            self.skip(end + 1);
        }
    }

    fn skip(&mut self, to: usize) {
        self.offset += (to - self.start) as u64;
        (self.start, self.searched) = (to, to);
    }

    fn drop_buffer(&mut self) {
        self.buffer.truncate(0);
        self.buffer.shrink_to(CHUNK);
        (self.start, self.searched) = (0, 0);
    }

    /// Reads behind what the buffer holds: how many bytes came.
    fn fill(&mut self) -> io::Result<usize> {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.searched -= self.start;
            self.start = 0;
        }
        let held = self.buffer.len();
        self.buffer.resize(held + CHUNK, 0);
        let read = loop {
            match self.file.read_at(&mut self.buffer[held..], self.offset + held as u64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.buffer.truncate(held + *read.as_ref().unwrap_or(&0));
        read
    }

    fn skip_overlong(&mut self) -> io::Result<Found> {
        loop {
            self.skip(self.buffer.len());
            if self.fill()? == 0 {
                self.drop_buffer();
                return Ok(Found::Overlong);
            }
            if let Some(end) = memchr::memchr(b'\n', &self.buffer) {
                self.skip(end + 1);
                return Ok(Found::Overlong);
            }
        }
    }
}

/// Where the last whole line of the file ends.
pub(super) fn end(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    last_newline(&file, file.metadata()?.len(), u64::MAX).map(|found| found.map_or(0, |at| at + 1))
}

/// The lines of a file before a place, the last first.
pub struct LinesBack {
    file: File,
    /// Before this stands what was not given yet; behind a newline, or 0.
    end: u64,
}

impl LinesBack {
    /// `end`: behind a newline, or 0.
    pub fn open(path: &Path, end: u64) -> io::Result<LinesBack> {
        Ok(LinesBack { file: File::open(path)?, end })
    }

    /// `None`: that was the first one. What is longer than [`LONGEST_LINE`] is left out.
    pub fn find(&mut self) -> io::Result<Option<Vec<u8>>> {
        while self.end > 0 {
            let end = self.end - 1;
            let start = match last_newline(&self.file, end, LONGEST_LINE as u64)? {
                Some(at) => at + 1,
                None if end <= LONGEST_LINE as u64 => 0,
                None => last_newline(&self.file, end, u64::MAX)?.map_or(0, |at| at + 1),
            };
            self.end = start;
            if end - start <= LONGEST_LINE as u64 {
                let mut line = vec![0; (end - start) as usize];
                self.file.read_exact_at(&mut line, start)?;
                return Ok(Some(line));
            }
        }
        Ok(None)
    }
}

/// The last newline before `end` and not more than `within` bytes before it.
fn last_newline(file: &File, end: u64, within: u64) -> io::Result<Option<u64>> {
    let (first, mut end) = (end.saturating_sub(within.saturating_add(1)), end);
    // A record has some 1 KiB: small steps first.
    let mut step = 4 << 10;
    let mut piece = Vec::new();
    while end > first {
        let start = end.saturating_sub(step).max(first);
        piece.resize((end - start) as usize, 0);
        file.read_exact_at(&mut piece, start)?;
        if let Some(at) = memchr::memrchr(b'\n', &piece) {
            return Ok(Some(start + at as u64));
        }
        end = start;
        step = (step * 2).min(1 << 20);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(bytes).expect("written");
        file
    }

    fn all(reader: &mut SegmentReader) -> Vec<(u64, Vec<u8>)> {
        let mut lines = Vec::new();
        while reader.find().expect("read") == Found::Line {
            lines.push((reader.offset(), reader.line().to_vec()));
        }
        lines
    }

    #[test]
    fn lines_come_with_their_places_also_where_they_are_longer_than_a_chunk() {
        let long = "x".repeat(CHUNK * 3 + 5);
        let file = file(format!("one\n\n{long}\nlast").as_bytes());
        let mut reader = SegmentReader::open(file.path(), 0).expect("open");
        let lines = all(&mut reader);
        let places: Vec<_> = lines.iter().map(|(at, line)| (*at, line.len())).collect();
        assert_eq!(places, [(0, 3), (4, 0), (5, long.len())]);
        assert_eq!(reader.find().expect("read"), Found::End { torn_bytes: 4 });
        assert_eq!((reader.line(), reader.offset()), (&b""[..], 6 + long.len() as u64));
    }

    #[test]
    fn a_line_that_grows_is_given_once_it_has_its_end() {
        let mut file = file(b"one\ntw");
        let mut reader = SegmentReader::open(file.path(), 0).expect("open");
        assert_eq!(all(&mut reader).len(), 1);
        assert_eq!(reader.find().expect("read"), Found::End { torn_bytes: 2 });
        file.write_all(b"o\nthree\n").expect("written");
        assert_eq!(all(&mut reader), [(4, b"two".to_vec()), (8, b"three".to_vec())]);
        assert_eq!(reader.find().expect("read"), Found::End { torn_bytes: 0 });
    }

    #[test]
    fn a_torn_line_that_its_writer_took_back_is_not_mixed_with_the_next() {
        let mut file = file(b"one\ntorn");
        let mut reader = SegmentReader::open(file.path(), 0).expect("open");
        assert_eq!(all(&mut reader).len(), 1);
        file.as_file().set_len(4).expect("cut");
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(4)).expect("there");
        file.write_all(b"other words\n").expect("written");
        assert_eq!(all(&mut reader), [(4, b"other words".to_vec())]);
    }

    #[test]
    fn a_file_that_lost_lines_says_so() {
        let file = file(b"one\ntwo\nthree\n");
        let mut reader = SegmentReader::open(file.path(), 0).expect("open");
        assert_eq!(all(&mut reader).len(), 3);
        file.as_file().set_len(4).expect("cut");
        assert_eq!(reader.find().expect("read"), Found::Cut { length: 4 });
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped_in_bounded_memory() {
        let mut bytes = vec![b'x'; LONGEST_LINE + 1];
        bytes.extend_from_slice(b"\nnext\n");
        let first = file(&bytes);
        let mut reader = SegmentReader::open(first.path(), 0).expect("open");
        assert_eq!(reader.find().expect("read"), Found::Overlong);
        assert_eq!(all(&mut reader), [(LONGEST_LINE as u64 + 2, b"next".to_vec())]);
        let mut back = LinesBack::open(first.path(), bytes.len() as u64).expect("open");
        assert_eq!(back.find().expect("read").as_deref(), Some(&b"next"[..]));
        assert_eq!(back.find().expect("read"), None);

        let endless = file(&vec![b'x'; LONGEST_LINE * 3]);
        let mut reader = SegmentReader::open(endless.path(), 0).expect("open");
        assert_eq!(reader.find().expect("read"), Found::Overlong);
        assert_eq!(reader.find().expect("read"), Found::End { torn_bytes: 0 });
        assert!(reader.buffer.capacity() < LONGEST_LINE * 2, "{}", reader.buffer.capacity());
    }

    #[test]
    fn lines_backwards_are_the_lines_forwards_reversed() {
        let texts = ["".to_owned(), "a".to_owned(), "b".repeat(5000), "c".repeat(CHUNK * 2), "d".to_owned()];
        let whole: String = texts.iter().map(|text| format!("{text}\n")).collect();
        let file = file(format!("{whole}torn").as_bytes());
        assert_eq!(end(file.path()).expect("read"), whole.len() as u64);
        let mut back = LinesBack::open(file.path(), whole.len() as u64).expect("open");
        for text in texts.iter().rev() {
            assert_eq!(back.find().expect("read").as_deref(), Some(text.as_bytes()));
        }
        assert_eq!(back.find().expect("read"), None);
    }
}
