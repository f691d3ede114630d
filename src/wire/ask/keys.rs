//! Objects whose keys are judged: each once, and spelled as Ollama spells it.
use std::borrow::Cow;

use super::values::wrong_type;
use super::{AskError, Seen};
use crate::wire::json::{MAX_MEMBERS, Reader, Shape, Text, fold};
use crate::wire::rewrite::edit::{Fate, Siblings};

/// The keys of one object.
pub(super) struct Keys<'a> {
    place: &'static str,
    known: &'static [&'static str],
    /// Keys that Ollama does not read, and a filter does. Another spelling of one is just an unknown key.
    also: &'static [&'static str],
    /// Go compares the keys of this object exactly, not by folding.
    exact: bool,
    /// Folded.
    seen: Vec<Cow<'a, str>>,
}

impl<'a> Keys<'a> {
    pub fn new(place: &'static str, known: &'static [&'static str], also: &'static [&'static str]) -> Self {
        Keys { place, known, also, exact: false, seen: Vec::new() }
    }

    /// Of an object whose keys Go compares exactly.
    pub fn exact(place: &'static str, known: &'static [&'static str]) -> Self {
        Keys { exact: true, ..Keys::new(place, known, &[]) }
    }

    /// The object that was read last had no members.
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }

    /// The key's name if we know it.
    pub fn judge(&mut self, key: Text<'a>) -> Result<Option<&'static str>, AskError> {
        let spelled = key.decode();
        let folded = match &spelled {
            Cow::Borrowed(spelled) => fold(spelled),
            Cow::Owned(spelled) => Cow::Owned(fold(spelled).into_owned()),
        };
        let name = self.known.iter().copied().find(|&name| name == folded);
        if self.seen.contains(&folded) {
            return Err(AskError::Ambiguous(match name {
                Some(name) => {
                    format!("`{name}` is in {} twice (Ollama takes any case for it); send it once", self.place)
                }
                None => format!("a key is in {} twice (upper and lower case count as one); send it once", self.place),
            }));
        }
        if self.seen.len() == MAX_MEMBERS {
            return Err(AskError::Invalid(format!("{} has more than {MAX_MEMBERS} members", self.place)));
        }
        self.seen.push(folded);
        let Some(name) = name else {
            return Ok(self.also.iter().copied().find(|&name| name == spelled));
        };
        if spelled == name && !key.escaped {
            return Ok(Some(name));
        }
        if self.exact && spelled != name {
            return Ok(None);
        }
        Err(AskError::Ambiguous(format!(
            "a key in {} is another spelling of `{name}`; write it exactly so",
            self.place
        )))
    }
}

/// An object or null, each of whose keys is judged. `member` reads the values of known keys and says what becomes of them.
pub(super) fn judged_object<'a>(
    seen: &mut Seen,
    reader: &mut Reader<'a>,
    keys: &mut Keys<'a>,
    name: &str,
    mut member: impl FnMut(&mut Seen, &mut Reader<'a>, &'static str) -> Result<Fate, AskError>,
) -> Result<(), AskError> {
    match reader.shape()? {
        Shape::Null => Ok(reader.skip()?),
        Shape::Object => {
            keys.seen.clear();
            let mut siblings = Siblings::new(reader.at() + 1);
            reader.object(|reader, key| {
                let fate = match keys.judge(key)? {
                    Some(name) => member(seen, reader, name)?,
                    None => super::passed_over(reader)?,
                };
                siblings.tell(key.range().start..reader.at(), fate, &mut seen.edits);
                Ok::<(), AskError>(())
            })?;
            siblings.close(String::new(), &mut seen.edits);
            Ok(())
        }
        _ => Err(wrong_type(name, "an object")),
    }
}
