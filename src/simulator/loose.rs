//! Reads a request body as Ollama does, that is as Go's `encoding/json` fills a struct, and not as a strict parser would.
//!
//! The first value counts and what follows it is ignored; keys match in any case (and `ſ` is an s, U+212A a k); the last
//! duplicate wins, `null` leaves a plain field as it was; duplicate `options` are merged. That is what makes an ambiguous
//! body run another model than a proxy has judged, so a stand-in must do it too.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// The members of a request body, in order, keys folded.
#[derive(Default)]
pub(super) struct Fields(Vec<(String, Value)>);

/// The first value of a body, as far as Ollama cares.
enum Top {
    Object(Fields),
    Null,
    /// Go's name of the kind.
    Other(&'static str),
}

impl Fields {
    /// Reads a body. `go_type` is the struct that the message names. An error is in Go's words.
    pub fn read(body: &[u8], go_type: &str) -> Result<Fields, String> {
        let parsed = match std::str::from_utf8(body) {
            Ok(text) => first_value(text),
            // Go puts U+FFFD for what is no UTF-8.
            Err(_) => first_value(&String::from_utf8_lossy(body)),
        };
        match parsed {
            Ok(Top::Object(fields)) => Ok(fields),
            Ok(Top::Null) => Ok(Fields::default()),
            Ok(Top::Other(kind)) => Err(format!("json: cannot unmarshal {kind} into Go value of type {go_type}")),
            Err(error) => Err(error),
        }
    }

    /// The last value of that name, `null` too.
    pub fn last(&self, name: &str) -> Option<&Value> {
        self.0.iter().rev().find(|(own, _)| own == name).map(|(_, value)| value)
    }

    /// The value that a plain Go field ends up with: the last that is not `null`.
    pub fn plain(&self, name: &str) -> Option<&Value> {
        self.0.iter().rev().find(|(own, value)| own == name && !value.is_null()).map(|(_, value)| value)
    }

    /// A field of type string.
    pub fn text(&self, name: &str, go_struct: &str) -> Result<Option<&str>, String> {
        match self.plain(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(mismatch(other, go_struct, name, "string")),
        }
    }

    /// A field of type `*bool`: `null` takes an earlier value back.
    pub fn flag(&self, name: &str, go_struct: &str) -> Result<Option<bool>, String> {
        match self.last(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(mismatch(other, go_struct, name, "bool")),
        }
    }

    /// A field of type `[]T`.
    pub fn list(&self, name: &str, go_struct: &str, go_type: &str) -> Result<&[Value], String> {
        match self.last(name) {
            None | Some(Value::Null) => Ok(&[]),
            Some(Value::Array(items)) => Ok(items),
            Some(other) => Err(mismatch(other, go_struct, name, go_type)),
        }
    }

    /// `options`, duplicates merged, `null` clearing what came before.
    pub fn options(&self) -> serde_json::Map<String, Value> {
        let mut merged = serde_json::Map::new();
        for (name, value) in &self.0 {
            match value {
                _ if name != "options" => {}
                Value::Object(members) => {
                    merged.extend(members.iter().map(|(name, value)| (name.clone(), value.clone())))
                }
                Value::Null => merged.clear(),
                _ => {}
            }
        }
        merged
    }
}

/// Go's message about a value of the wrong kind.
pub(super) fn mismatch(value: &Value, go_struct: &str, field: &str, go_type: &str) -> String {
    format!("json: cannot unmarshal {} into Go struct field {go_struct}.{field} of type {go_type}", kind(value))
}

/// A member of a nested object, its key in any case.
pub(super) fn member<'a>(object: &'a Value, name: &str) -> Option<&'a Value> {
    let members = object.as_object()?;
    members.get(name).or_else(|| members.iter().find(|(own, _)| fold(own) == name).map(|(_, value)| value))
}

/// A member that is a text.
pub(super) fn member_text<'a>(object: &'a Value, name: &str) -> &'a str {
    member(object, name).and_then(Value::as_str).unwrap_or_default()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn fold(key: &str) -> String {
    key.chars()
        .map(|letter| match letter {
            'ſ' => 's',
            '\u{212A}' => 'k',
            other => other.to_ascii_lowercase(),
        })
        .collect()
}

fn first_value(text: &str) -> Result<Top, String> {
    // Not `from_str`: that one wants the end of the text behind the value.
    let mut parser = serde_json::Deserializer::from_str(text);
    Top::deserialize(&mut parser).map_err(|error| {
        if error.is_eof() {
            return if text.trim().is_empty() { "EOF" } else { "unexpected EOF" }.to_owned();
        }
        // serde_json counts lines and columns from 1, columns in bytes.
        let line = text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
        match line.get(error.column().saturating_sub(1)..).and_then(|rest| rest.chars().next()) {
            Some(letter) if letter.is_control() => {
                format!("invalid character '\\x{:02x}' looking for beginning of value", u32::from(letter))
            }
            Some(letter) => format!("invalid character '{letter}' looking for beginning of value"),
            None => "invalid character ' ' looking for beginning of value".to_owned(),
        }
    })
}

impl<'de> Deserialize<'de> for Top {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Top, D::Error> {
        struct TopVisitor;

        impl<'de> Visitor<'de> for TopVisitor {
            type Value = Top;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Top, A::Error> {
                let mut fields = Vec::with_capacity(map.size_hint().unwrap_or(8).min(64));
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    fields.push((fold(&key), value));
                }
                Ok(Top::Object(Fields(fields)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Top, A::Error> {
                while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                Ok(Top::Other("array"))
            }

            fn visit_unit<E>(self) -> Result<Top, E> {
                Ok(Top::Null)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Top, E> {
                Ok(Top::Other("bool"))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Top, E> {
                Ok(Top::Other("number"))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Top, E> {
                Ok(Top::Other("number"))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Top, E> {
                Ok(Top::Other("number"))
            }

            fn visit_str<E>(self, _: &str) -> Result<Top, E> {
                Ok(Top::Other("string"))
            }
        }

        deserializer.deserialize_any(TopVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(body: &str) -> Option<String> {
        let fields = Fields::read(body.as_bytes(), "api.ChatRequest").ok()?;
        fields.text("model", "ChatRequest").ok().flatten().map(str::to_owned)
    }

    #[test]
    fn the_model_that_runs_is_the_one_that_go_would_run() {
        assert_eq!(model(r#"{"model":"a","MODEL":"b"}"#).as_deref(), Some("b"));
        assert_eq!(model(r#"{"MODEL":"b","model":"a"}"#).as_deref(), Some("a"));
        assert_eq!(model(r#"{"mod\u0065l":"a"}"#).as_deref(), Some("a"));
        assert_eq!(model(r#"{"model":"a","model":null}"#).as_deref(), Some("a"));
        assert_eq!(model(r#"{"model":"a"} garbage"#).as_deref(), Some("a"));
        assert_eq!(model(r#"{"model":"a"}{"model":"b"}"#).as_deref(), Some("a"));
    }

    #[test]
    fn options_are_merged_and_null_clears_them() {
        let read = |body: &str| Fields::read(body.as_bytes(), "x").map(|fields| fields.options().len()).ok();
        assert_eq!(read(r#"{"options":{"a":1},"options":{"b":2}}"#), Some(2));
        assert_eq!(read(r#"{"options":{"a":1},"options":null}"#), Some(0));
    }

    #[test]
    fn errors_are_in_gos_words() {
        let error = |body: &[u8]| Fields::read(body, "api.ChatRequest").err();
        assert_eq!(error(b"").as_deref(), Some("EOF"));
        assert_eq!(error(b"{\"a\":").as_deref(), Some("unexpected EOF"));
        assert_eq!(error(b"\x1f\x8b").as_deref(), Some("invalid character '\\x1f' looking for beginning of value"));
        assert_eq!(
            error(b"[1]").as_deref(),
            Some("json: cannot unmarshal array into Go value of type api.ChatRequest")
        );
        assert!(error(b"null").is_none());
    }
}
