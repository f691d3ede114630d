//! JSON that has one meaning: an object in which a member that is there twice, at any depth, is an error.
//!
//! RFC 7515 section 4 and RFC 7519 section 4 let a parser refuse duplicates or keep the last; two parsers that disagree
//! about which member counts are an attack. serde_json alone keeps the last.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// What is wrong with a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonFault {
    /// Not JSON, trailing bytes, or not an object.
    NotAnObject,
    /// A member is there twice.
    DuplicateMember,
}

/// Reads one JSON object. serde_json's depth limit (128) holds.
pub fn object(bytes: &[u8]) -> Result<Map<String, Value>, JsonFault> {
    match serde_json::from_slice::<Strict>(bytes) {
        Ok(Strict(Value::Object(members))) => Ok(members),
        Ok(_) => Err(JsonFault::NotAnObject),
        // serde_json keeps no custom error types: the marker in the text is how ours is told from a syntax error.
        Err(error) if error.to_string().starts_with(DUPLICATE) => Err(JsonFault::DuplicateMember),
        Err(_) => Err(JsonFault::NotAnObject),
    }
}

const DUPLICATE: &str = "duplicate member";

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            if members.contains_key(&name) {
                // Without the name: it is the caller's text.
                return Err(A::Error::custom(DUPLICATE));
            }
            let Strict(value) = entries.next_value()?;
            members.insert(name, value);
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_is_there_twice_is_an_error_at_any_depth_and_in_any_spelling() {
        for text in [r#"{"a":1,"a":1}"#, r#"{"a":1,"\u0061":2}"#, r#"{"x":[{"a":1,"b":2,"a":3}]}"#] {
            assert_eq!(object(text.as_bytes()), Err(JsonFault::DuplicateMember), "{text}");
        }
    }

    #[test]
    fn only_one_whole_object_is_read() {
        for text in ["", "[]", "1", "null", "{} {}", "{}x", "{\"a\":1,}", "{'a':1}", "\u{feff}{}", "{\"a\":NaN}"] {
            assert_eq!(object(text.as_bytes()), Err(JsonFault::NotAnObject), "{text}");
        }
        assert_eq!(object(b"{\"a\":\"\xff\"}"), Err(JsonFault::NotAnObject));
    }

    #[test]
    fn values_are_what_serde_json_reads() {
        let text = r#" {"a":[1,-1,1.5,18446744073709551615,true,null,"\u00e9"],"b":{"c":{}}} "#;
        assert_eq!(Value::Object(object(text.as_bytes()).unwrap()), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn a_very_deep_document_is_an_error_and_not_a_stack_overflow() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(4000), "]".repeat(4000));
        assert_eq!(object(deep.as_bytes()), Err(JsonFault::NotAnObject));
    }
}
