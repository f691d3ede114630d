//! Edits of a JSON text: collected while it is read, applied once. What no edit names stays as it is, byte for byte.
//!
//! A reader goes over the text and tells [`Siblings`] what stands side by side in an object or an array, and what of it goes; the
//! commas are their business. [`set`] is the ready-made edit of members that somebody prescribes.

use std::borrow::Cow;
use std::ops::Range;

use crate::wire::json::{Malformed, Reader, Shape};

/// The edits of one text. In any order; one that lies within a part that another cuts has no effect.
#[derive(Default)]
pub struct Edits(Vec<Edit>);

struct Edit {
    range: Range<usize>,
    text: Cow<'static, str>,
}

impl Edits {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts `text` where `range` is; an empty range is a place between two bytes.
    pub fn replace(&mut self, range: Range<usize>, text: impl Into<Cow<'static, str>>) {
        self.0.push(Edit { range, text: text.into() });
    }

    pub fn cut(&mut self, range: Range<usize>) {
        self.replace(range, "");
    }

    /// `text` with all edits.
    pub fn apply(mut self, text: &[u8]) -> Vec<u8> {
        let added: usize = self.0.iter().map(|edit| edit.text.len()).sum();
        let mut out = Vec::with_capacity(text.len() + added);
        self.each(text.len(), |kept, new| {
            out.extend_from_slice(&text[kept]);
            out.extend_from_slice(new.as_bytes());
        });
        out
    }

    /// What stays of a text of `length` bytes, in its order.
    pub fn kept(mut self, length: usize) -> Vec<Range<usize>> {
        let mut all = Vec::with_capacity(self.0.len() + 1);
        self.each(length, |kept, _| all.push(kept));
        all
    }

    /// Goes over a text of `length` bytes: what stays next, and what is new behind it.
    fn each(&mut self, length: usize, mut part: impl FnMut(Range<usize>, &str)) {
        // What is put in front of a cut sorts before it, since its range is empty.
        self.0.sort_by_key(|edit| (edit.range.start, edit.range.end));
        let mut at = 0;
        for Edit { range, text } in &self.0 {
            if range.start < at {
                continue; // it is gone already
            }
            part(at..range.start, text);
            at = range.end;
        }
        part(at..length, "");
    }
}

/// What becomes of a member or an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Keep,
    Cut,
}

/// What stands side by side in one object or array, told in its order: members from key to value, or items.
///
/// What is cut takes a comma along: the one in front of it, or the one behind it where nothing that stays is in front.
pub struct Siblings {
    /// Behind the opening bracket.
    open: usize,
    /// Something stays.
    kept: bool,
    /// Where the first one begins, if all so far are cut.
    leading: Option<usize>,
    /// Where the last one ended.
    end: usize,
}

impl Siblings {
    /// `open` is the place behind the opening bracket.
    pub fn new(open: usize) -> Siblings {
        Siblings { open, kept: false, leading: None, end: open }
    }

    pub fn tell(&mut self, range: Range<usize>, fate: Fate, edits: &mut Edits) {
        match fate {
            Fate::Keep => self.keep(range, edits),
            Fate::Cut => self.cut(range, edits),
        }
    }

    pub fn keep(&mut self, range: Range<usize>, edits: &mut Edits) {
        if let Some(leading) = self.leading.take() {
            edits.cut(leading..range.start);
        }
        self.kept = true;
        self.end = range.end;
    }

    pub fn cut(&mut self, range: Range<usize>, edits: &mut Edits) {
        if self.kept {
            edits.cut(self.end..range.end);
        } else {
            self.leading.get_or_insert(range.start);
        }
        self.end = range.end;
    }

    /// All are told. `added` is put in front of them: members or items with commas between them, or nothing.
    pub fn close(self, added: String, edits: &mut Edits) {
        if let Some(leading) = self.leading {
            edits.cut(leading..self.end);
        }
        if !added.is_empty() {
            let comma = if self.kept { "," } else { "" };
            edits.replace(self.open..self.open, added + comma);
        }
    }
}

/// A member that is to have a value, whatever was sent.
#[derive(Clone, Copy, Debug)]
pub struct Assignment<'a> {
    /// The object of the body that it belongs to (`options`), which is made where it is missing; `None`: the body itself.
    pub within: Option<&'a str>,
    pub name: &'a str,
    /// A JSON text.
    pub value: &'a str,
}

/// Sets members of a body: in the place of a value that is there, else in front.
///
/// The body is one that [`super::super::ask::read`] has judged, so that no key comes twice and each is spelled as it is read.
/// `None` where nothing has to change, or where the body is no object.
pub fn set(body: &[u8], assignments: &[Assignment<'_>]) -> Option<Vec<u8>> {
    let mut edits = Edits::default();
    let mut reader = Reader::new(body).ok()?;
    set_within(None, assignments, &mut reader, &mut edits).ok()?;
    reader.end().ok()?;
    (!edits.is_empty()).then(|| edits.apply(body))
}

fn set_within(
    within: Option<&str>,
    all: &[Assignment<'_>],
    reader: &mut Reader<'_>,
    edits: &mut Edits,
) -> Result<(), Malformed> {
    reader.space();
    let mut siblings = Siblings::new(reader.at() + 1);
    let mut missing = wanted(within, all);
    reader.object(|reader, key| {
        let name = key.decode();
        let found = missing.iter().position(|wanted| wanted.name() == name).map(|at| missing.remove(at));
        let shape = reader.shape()?;
        let start = reader.at();
        match found {
            Some(Wanted::Object(name)) if shape == Shape::Object => set_within(Some(name), all, reader, edits)?,
            _ => reader.skip()?,
        }
        let value = start..reader.at();
        siblings.keep(key.range().start..value.end, edits);
        match found {
            None => {}
            Some(Wanted::Object(_)) if shape == Shape::Object => {}
            Some(wanted) => {
                let new = wanted.value(all);
                if reader.text(value.clone()) != new {
                    edits.replace(value, new);
                }
            }
        }
        Ok::<(), Malformed>(())
    })?;
    let added: Vec<String> = missing.iter().map(|wanted| member(wanted.name(), &wanted.value(all))).collect();
    siblings.close(added.join(","), edits);
    Ok(())
}

/// What an object has to have.
#[derive(Clone, Copy)]
enum Wanted<'a> {
    Value(Assignment<'a>),
    /// An object with assignments of its own.
    Object(&'a str),
}

/// In the order of the assignments, an object of several once.
fn wanted<'a>(within: Option<&str>, all: &[Assignment<'a>]) -> Vec<Wanted<'a>> {
    let mut wanted = Vec::new();
    for &assignment in all {
        match assignment.within {
            own if own == within => wanted.push(Wanted::Value(assignment)),
            Some(object) if within.is_none() && !wanted.iter().any(|wanted| wanted.is_object(object)) => {
                wanted.push(Wanted::Object(object));
            }
            _ => {}
        }
    }
    wanted
}

impl<'a> Wanted<'a> {
    fn name(&self) -> &'a str {
        match self {
            Wanted::Value(assignment) => assignment.name,
            Wanted::Object(name) => name,
        }
    }

    fn is_object(&self, object: &str) -> bool {
        matches!(self, Wanted::Object(name) if *name == object)
    }

    /// As JSON text.
    fn value(&self, all: &[Assignment<'a>]) -> String {
        match self {
            Wanted::Value(assignment) => assignment.value.to_owned(),
            Wanted::Object(name) => {
                let own = all.iter().filter(|assignment| assignment.within == Some(name));
                let members: Vec<String> = own.map(|assignment| member(assignment.name, assignment.value)).collect();
                format!("{{{}}}", members.join(","))
            }
        }
    }
}

fn member(name: &str, value: &str) -> String {
    format!("{}:{value}", serde_json::Value::from(name))
}

#[cfg(test)]
mod tests;
