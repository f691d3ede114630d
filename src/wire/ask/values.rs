//! The values of members, read as Ollama reads them.
use super::{AskError, Seen};
use crate::wire::json::{Reader, Shape, Text};
use crate::wire::rewrite::edit::{Fate, Siblings};
use crate::wire::{ModelRef, model};

/// An array or null; `item` reads each item and says what becomes of it.
pub(super) fn list<'a>(
    seen: &mut Seen,
    reader: &mut Reader<'a>,
    name: &str,
    mut item: impl FnMut(&mut Seen, &mut Reader<'a>) -> Result<Fate, AskError>,
) -> Result<(), AskError> {
    match reader.shape()? {
        Shape::Null => Ok(reader.skip()?),
        Shape::Array => {
            let mut siblings = Siblings::new(reader.at() + 1);
            reader.array(|reader| {
                let start = reader.at();
                let fate = item(seen, reader)?;
                siblings.tell(start..reader.at(), fate, &mut seen.edits);
                Ok::<(), AskError>(())
            })?;
            siblings.close(String::new(), &mut seen.edits);
            Ok(())
        }
        _ => Err(wrong_type(name, "an array")),
    }
}

/// A model's name; null and an empty text are no name, as in Go.
pub(super) fn model_name(reader: &mut Reader<'_>, name: &str) -> Result<Option<ModelRef>, AskError> {
    match text(reader, name)? {
        Some(text) => parse_model(&text.decode(), name),
        None => Ok(None),
    }
}

pub(super) fn parse_model(text: &str, name: &str) -> Result<Option<ModelRef>, AskError> {
    match model::parse(text) {
        Ok(model) => Ok(Some(model)),
        Err(model::NameError::Empty) => Ok(None),
        Err(error) => Err(AskError::Invalid(format!("`{name}`: {error}"))),
    }
}

pub(super) fn text<'a>(reader: &mut Reader<'a>, name: &str) -> Result<Option<Text<'a>>, AskError> {
    match reader.shape()? {
        Shape::Text => Ok(Some(reader.string()?)),
        Shape::Null => Ok(reader.skip().map(|()| None)?),
        _ => Err(wrong_type(name, "a string")),
    }
}

pub(super) fn flag(reader: &mut Reader<'_>, name: &str) -> Result<Option<bool>, AskError> {
    let value = match reader.shape()? {
        Shape::Bool(value) => Some(value),
        Shape::Null => None,
        _ => return Err(wrong_type(name, "true or false")),
    };
    reader.skip()?;
    Ok(value)
}

/// Whether a text or a list has anything in it.
pub(super) fn text_or_list(reader: &mut Reader<'_>, name: &str) -> Result<bool, AskError> {
    match reader.shape()? {
        Shape::Text | Shape::Array => Ok(inputs(reader)? > 0),
        Shape::Null => Ok(reader.skip().map(|()| false)?),
        _ => Err(wrong_type(name, "a string or an array")),
    }
}

/// How many inputs: 1 for a text that is not empty, the length of a list, 0 for the rest (which Ollama refuses or ignores).
pub(super) fn inputs(reader: &mut Reader<'_>) -> Result<u64, AskError> {
    match reader.shape()? {
        Shape::Text => Ok(u64::from(!reader.string()?.is_empty())),
        Shape::Array => {
            let mut count = 0;
            reader.array(|reader| {
                count += 1;
                reader.skip()
            })?;
            Ok(count)
        }
        _ => Ok(reader.skip().map(|()| 0)?),
    }
}

/// A number, or a duration as Go writes it. Any other text is not passed on: it could be anything.
pub(super) fn keep_alive(reader: &mut Reader<'_>) -> Result<Option<serde_json::Value>, AskError> {
    match reader.shape()? {
        Shape::Number => {
            let text = reader.number()?;
            Ok((text.len() <= 32).then(|| serde_json::from_str(text).ok()).flatten())
        }
        Shape::Text => {
            let text = reader.string()?.decode();
            let is_duration = !text.is_empty()
                && text.len() <= 32
                && text.chars().all(|c| c.is_ascii_digit() || "+-.hmsnuµμ".contains(c));
            Ok(is_duration.then(|| serde_json::Value::String(text.into_owned())))
        }
        _ => Ok(reader.skip().map(|()| None)?),
    }
}

/// An option of type integer as Ollama reads it: any number, cut to its whole part (`3.7` is 3, `1e2` is 100). A policy that
/// limits it must see the number that counts; one beyond 64 bits means something else to every parser and is refused.
pub(super) fn loose_integer(reader: &mut Reader<'_>, name: &str) -> Result<Option<i64>, AskError> {
    if reader.shape()? != Shape::Number {
        return Ok(reader.skip().map(|()| None)?);
    }
    let text = reader.number()?;
    if let Ok(whole) = text.parse::<i64>() {
        return Ok(Some(whole));
    }
    let value = text.parse::<f64>().unwrap_or(f64::INFINITY).trunc();
    if value.abs() < 9.0e18 {
        // In range by the line above.
        Ok(Some(value as i64))
    } else {
        Err(AskError::Invalid(format!("`{name}` does not fit into 64 bits")))
    }
}

/// An integer as Go reads one into an `int`: `3.0` and `1e0` are refused by Ollama itself.
pub(super) fn strict_integer(reader: &mut Reader<'_>) -> Result<Option<i64>, AskError> {
    if reader.shape()? != Shape::Number {
        return Ok(reader.skip().map(|()| None)?);
    }
    Ok(reader.number()?.parse().ok())
}

/// Whether a member is there in earnest: null, `false` and what is empty count as absent.
pub(super) fn says_something(reader: &mut Reader<'_>) -> Result<bool, AskError> {
    Ok(match reader.shape()? {
        Shape::Object => {
            let mut any = false;
            reader.object(|reader, _| {
                any = true;
                reader.skip()
            })?;
            any
        }
        Shape::Text | Shape::Array => inputs(reader)? > 0,
        shape => {
            reader.skip()?;
            !matches!(shape, Shape::Null | Shape::Bool(false))
        }
    })
}

pub(super) fn is_one_of(text: &Text<'_>, words: &[&str]) -> bool {
    let text = text.decode();
    words.iter().any(|word| text.eq_ignore_ascii_case(word))
}

pub(super) fn wrong_type(name: &str, wanted: &str) -> AskError {
    AskError::Invalid(format!("`{name}` must be {wanted}"))
}
