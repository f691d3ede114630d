//! OpenAI streams carry no counts unless the request asks with `stream_options.include_usage` (ollama-wire 0.1). So the proxy
//! asks (`Filter::IncludeUsage`) and hides the answer from a client that did not ([`UsageHider`]). Such a client then sees what
//! Ollama would have sent without the question, byte for byte.
use super::edit::{Edits, Siblings};
use crate::wire::Endpoint;
use crate::wire::json::{Malformed, Reader, Shape};
use bytes::{Bytes, BytesMut};
use memchr::memchr;
use memchr::memmem::Finder;
use std::ops::Range;
use std::sync::LazyLock;

/// The longest event that is held back to be judged. Longer ones pass as they are; usage events have some 300 bytes.
pub const LONGEST_HELD_BYTES: usize = 64 * 1024;

/// Hides from a stream the counts that the proxy asked for.
///
/// It removes the event whose `choices` is `[]` and which has `usage`; from other events (`/v1/completions` has zeros in each) it
/// cuts the member `usage`. Complete events pass at once; only an event that has not ended is held, up to [`LONGEST_HELD_BYTES`].
/// A chunk with nothing to hide passes without a copy.
#[derive(Debug)]
pub struct UsageHider {
    active: bool,
    /// An event that has not ended.
    held: BytesMut,
    /// Within an event that was too long to hold: its bytes pass until it ends.
    passing: bool,
    /// The line that the last chunk ended in is empty so far (for `passing`).
    line_is_empty: bool,
}

/// What becomes of an event.
enum Verdict {
    Pass,
    Drop,
    /// All but its `usage`; `data` is where its JSON lies.
    Cut {
        data: Range<usize>,
        usage: Edits,
    },
}

impl UsageHider {
    /// A hider for other endpoints than the two that can be asked passes everything.
    pub fn new(endpoint: Endpoint) -> Self {
        let active = matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions);
        UsageHider { active, held: BytesMut::new(), passing: false, line_is_empty: true }
    }

    /// The next bytes of the stream in, those that the client may see out (perhaps none).
    pub fn pass(&mut self, chunk: Bytes) -> Bytes {
        if !self.active || chunk.is_empty() {
            return chunk;
        }
        if self.passing {
            let Some(end) = self.end_of_passing(&chunk) else { return chunk };
            self.passing = false;
            let rest = self.pass(chunk.slice(end..));
            return join(chunk.slice(..end), rest);
        }
        if self.held.is_empty() {
            return self.judge(chunk);
        }
        self.held.extend_from_slice(&chunk);
        if memchr(b'\n', &chunk).is_none() && self.held.len() <= LONGEST_HELD_BYTES {
            // No event can have ended.
            return Bytes::new();
        }
        let all = self.held.split().freeze();
        self.judge(all)
    }

    /// The stream has ended: what is still held.
    pub fn finish(&mut self) -> Bytes {
        self.held.split().freeze()
    }

    /// `bytes` begin with an event.
    fn judge(&mut self, bytes: Bytes) -> Bytes {
        let mut out = Out { bytes: &bytes, kept: 0..0, copied: BytesMut::new() };
        let mut start = 0;
        while let Some(length) = end_of_event(&bytes[start..]) {
            let event = start..start + length;
            match verdict(&bytes[event.clone()]) {
                Verdict::Pass => out.keep(event.clone()),
                Verdict::Drop => {}
                Verdict::Cut { data, usage } => {
                    let data = start + data.start..start + data.end;
                    out.keep(start..data.start);
                    for kept in usage.kept(data.len()) {
                        out.keep(data.start + kept.start..data.start + kept.end);
                    }
                    out.keep(data.end..event.end);
                }
            }
            start = event.end;
        }
        let rest = start..bytes.len();
        if rest.len() > LONGEST_HELD_BYTES {
            self.passing = true;
            self.line_is_empty = ends_in_empty_line(&bytes[rest.clone()]);
            out.keep(rest);
        } else {
            self.held.extend_from_slice(&bytes[rest]);
        }
        out.finish()
    }

    /// Where, within an event that passes, it ends: after an empty line.
    fn end_of_passing(&mut self, chunk: &[u8]) -> Option<usize> {
        let mut at = 0;
        while let Some(length) = memchr(b'\n', &chunk[at..]) {
            let line = &chunk[at..at + length];
            at += length + 1;
            if self.line_is_empty && matches!(line, b"" | b"\r") {
                return Some(at);
            }
            self.line_is_empty = true;
        }
        self.line_is_empty &= matches!(&chunk[at..], b"" | b"\r");
        None
    }
}

/// Collects what stays of some bytes: as a slice of them while it lies together, as a copy once it does not.
struct Out<'a> {
    bytes: &'a Bytes,
    kept: Range<usize>,
    copied: BytesMut,
}

impl Out<'_> {
    fn keep(&mut self, range: Range<usize>) {
        if self.kept.is_empty() {
            self.kept = range;
        } else if self.kept.end == range.start {
            self.kept.end = range.end;
        } else {
            self.copied.extend_from_slice(&self.bytes[self.kept.clone()]);
            self.kept = range;
        }
    }

    fn finish(mut self) -> Bytes {
        if self.copied.is_empty() {
            return self.bytes.slice(self.kept);
        }
        self.copied.extend_from_slice(&self.bytes[self.kept]);
        self.copied.freeze()
    }
}

fn join(first: Bytes, second: Bytes) -> Bytes {
    match (first.is_empty(), second.is_empty()) {
        (true, _) => second,
        (_, true) => first,
        _ => {
            let mut both = BytesMut::with_capacity(first.len() + second.len());
            both.extend_from_slice(&first);
            both.extend_from_slice(&second);
            both.freeze()
        }
    }
}

/// The length of the event at the start, its empty line included.
fn end_of_event(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let length = memchr(b'\n', &bytes[at..])?;
        let line = &bytes[at..at + length];
        at += length + 1;
        if matches!(line, b"" | b"\r") {
            return Some(at);
        }
    }
}

fn ends_in_empty_line(bytes: &[u8]) -> bool {
    let start = memchr::memrchr(b'\n', bytes).map_or(0, |at| at + 1);
    matches!(&bytes[start..], b"" | b"\r")
}

fn verdict(event: &[u8]) -> Verdict {
    static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"usage\""));
    // In a text the quotes would be escaped, so most events are done here.
    if USAGE.find(event).is_none() {
        return Verdict::Pass;
    }
    let Some(data) = only_data_line(event) else { return Verdict::Pass };
    let Ok((usage, no_choices)) = find_usage(&event[data.clone()]) else { return Verdict::Pass };
    match (usage.is_empty(), no_choices) {
        (true, _) => Verdict::Pass,
        (false, true) => Verdict::Drop,
        (false, false) => Verdict::Cut { data, usage },
    }
}

/// What stands behind `data:` in an event of one such line, as Ollama writes them; comments and other fields may stand before it.
fn only_data_line(event: &[u8]) -> Option<Range<usize>> {
    let (mut found, mut at) = (None, 0);
    while at < event.len() {
        let end = memchr(b'\n', &event[at..]).map_or(event.len(), |length| at + length);
        if event[at..end].starts_with(b"data:") && found.replace(at + b"data:".len()..end).is_some() {
            return None;
        }
        at = end + 1;
    }
    found
}

/// The edits that cut the member `usage`, and whether `choices` is an empty array.
fn find_usage(data: &[u8]) -> Result<(Edits, bool), Malformed> {
    let mut reader = Reader::new(data)?;
    let (mut usage, mut no_choices) = (Edits::default(), false);
    reader.space();
    let mut siblings = Siblings::new(reader.at() + 1);
    reader.object(|reader, key| {
        let name = key.decode();
        if name == "choices" && reader.shape()? == Shape::Array {
            no_choices = true;
            reader.array(|reader| {
                no_choices = false;
                reader.skip()
            })?;
        } else {
            reader.skip()?;
        }
        let member = key.range().start..reader.at();
        if name == "usage" {
            siblings.cut(member, &mut usage)
        } else {
            siblings.keep(member, &mut usage)
        }
        Ok::<(), Malformed>(())
    })?;
    siblings.close(String::new(), &mut usage);
    reader.end()?;
    Ok((usage, no_choices))
}

#[cfg(test)]
mod tests;
