//! JSON taken apart without a change to its bytes: a value is the text that it lies in.
use super::super::json::{Malformed, Reader, Shape};
use std::borrow::Cow;

/// One JSON value.
#[derive(Clone, Copy)]
pub(super) struct Raw<'a>(pub &'a str);

impl<'a> Raw<'a> {
    /// `None`: it is no JSON, or something follows it.
    pub fn read(body: &'a [u8]) -> Option<Raw<'a>> {
        let text = std::str::from_utf8(body).ok()?;
        let mut reader = Reader::new(body).ok()?;
        reader.skip().ok()?;
        reader.end().ok()?;
        Some(Raw(text.trim_matches([' ', '\t', '\r', '\n'])))
    }

    fn reader(self) -> Option<(Reader<'a>, Shape)> {
        let mut reader = Reader::new(self.0.as_bytes()).ok()?;
        let shape = reader.shape().ok()?;
        Some((reader, shape))
    }

    /// The members of an object; of anything else none.
    pub fn members(self) -> Vec<(Cow<'a, str>, Raw<'a>)> {
        let mut members = Vec::new();
        if let Some((mut reader, Shape::Object)) = self.reader() {
            let _ = reader.object(|reader, key| {
                members.push((key.decode(), self.value(reader)?));
                Ok::<(), Malformed>(())
            });
        }
        members
    }

    /// The items of an array; of anything else none.
    pub fn items(self) -> Vec<Raw<'a>> {
        let mut items = Vec::new();
        if let Some((mut reader, Shape::Array)) = self.reader() {
            let _ = reader.array(|reader| {
                items.push(self.value(reader)?);
                Ok::<(), Malformed>(())
            });
        }
        items
    }

    fn value(self, reader: &mut Reader<'a>) -> Result<Raw<'a>, Malformed> {
        reader.space();
        let start = reader.at();
        reader.skip()?;
        Ok(Raw(&self.0[start..reader.at()]))
    }

    /// An object whose members are asked for more than once.
    pub fn object(self) -> Object<'a> {
        Object(self.members())
    }

    /// As [`Object::get`].
    pub fn get(self, key: &str) -> Option<Raw<'a>> {
        self.object().get(key)
    }

    pub fn is_absent(self) -> bool {
        match self.reader() {
            Some((_, Shape::Null | Shape::Bool(false))) | None => true,
            Some((_, Shape::Text)) => self.0 == "\"\"",
            // It is JSON: between its brackets is something or white space.
            Some((_, Shape::Object | Shape::Array)) => self.0[1..self.0.len() - 1].trim_ascii().is_empty(),
            Some(_) => false,
        }
    }

    pub fn is_text(self) -> bool {
        self.0.starts_with('"')
    }

    pub fn is_object(self) -> bool {
        self.0.starts_with('{')
    }

    pub fn is_array(self) -> bool {
        self.0.starts_with('[')
    }

    /// What a string says. Lone surrogates become U+FFFD, as in Go.
    pub fn text(self) -> Option<Cow<'a, str>> {
        let (mut reader, shape) = self.reader()?;
        (shape == Shape::Text).then(|| reader.string().ok().map(|text| text.decode())).flatten()
    }

    /// What a member that is a string says, an empty one too.
    pub fn says(self, key: &str) -> Option<Cow<'a, str>> {
        self.object().raw(key)?.text()
    }

    /// A whole number.
    pub fn count(self) -> Option<u64> {
        self.0.parse().ok()
    }
}

/// The members of an object, found once: a body may have 20 MiB.
pub(super) struct Object<'a>(Vec<(Cow<'a, str>, Raw<'a>)>);

impl<'a> Object<'a> {
    pub fn names(&self) -> impl Iterator<Item = (&str, Raw<'a>)> {
        self.0.iter().map(|(name, value)| (name.as_ref(), *value))
    }

    /// A member, whatever it says. Of duplicates the last, as in Go.
    pub fn raw(&self, key: &str) -> Option<Raw<'a>> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| *value)
    }

    /// What a member that is a string says, an empty one too.
    pub fn says(&self, key: &str) -> Option<Cow<'a, str>> {
        self.raw(key)?.text()
    }

    /// A member, if it says something: `null`, `false` and empty values count as absent.
    pub fn get(&self, key: &str) -> Option<Raw<'a>> {
        self.raw(key).filter(|value| !value.is_absent())
    }
}
