use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::*;

/// Cuts every member whose key is `cut` and every item that is the text `cut`, at any depth.
fn cut_all(text: &str) -> String {
    fn value(reader: &mut Reader<'_>, edits: &mut Edits) -> Result<bool, Malformed> {
        let shape = reader.shape()?;
        let start = reader.at();
        let mut siblings = Siblings::new(start + 1);
        match shape {
            Shape::Object => {
                reader.object(|reader, key| {
                    value(reader, edits)?;
                    let member = key.range().start..reader.at();
                    if key.decode() == "cut" {
                        siblings.cut(member, edits)
                    } else {
                        siblings.keep(member, edits)
                    }
                    Ok::<(), Malformed>(())
                })?;
                siblings.close(String::new(), edits);
            }
            Shape::Array => {
                reader.array(|reader| {
                    let start = reader.at();
                    let goes = value(reader, edits)?;
                    let item = start..reader.at();
                    if goes {
                        siblings.cut(item, edits)
                    } else {
                        siblings.keep(item, edits)
                    }
                    Ok::<(), Malformed>(())
                })?;
                siblings.close(String::new(), edits);
            }
            Shape::Text => return Ok(reader.string()?.decode() == "cut"),
            _ => reader.skip()?,
        }
        Ok(false)
    }
    let mut edits = Edits::default();
    let mut reader = Reader::new(text.as_bytes()).unwrap();
    value(&mut reader, &mut edits).unwrap();
    reader.end().unwrap();
    String::from_utf8(edits.apply(text.as_bytes())).unwrap()
}

#[test]
fn a_cut_takes_one_comma_along_and_leaves_the_rest_as_it_is_written() {
    for (text, wanted) in [
        (r#"{"cut":1}"#, "{}"),
        (r#"{ "cut" : 1 }"#, "{  }"),
        (r#"{"cut":1,"a":2}"#, r#"{"a":2}"#),
        (r#"{ "cut":1 , "a":2 }"#, r#"{ "a":2 }"#),
        (r#"{"a":2,"cut":1}"#, r#"{"a":2}"#),
        (r#"{ "a":2 , "cut":1 }"#, r#"{ "a":2 }"#),
        (r#"{"a":1, "cut":2, "b":3}"#, r#"{"a":1, "b":3}"#),
        (r#"{"cut":1,"cut":2,"a":3,"cut":4,"cut":5}"#, r#"{"a":3}"#),
        (r#"{"cut":1,"cut":2}"#, "{}"),
        (r#"{"c\u0075t":1,"a":"cut"}"#, r#"{"a":"cut"}"#),
        (r#"["cut",1,"cut"]"#, "[1]"),
        (r#"["cut"]"#, "[]"),
        // A cut within a cut.
        (r#"{"a":[1,{"cut":{"cut":1,"b":2}}],"cut":{"cut":[]}}"#, r#"{"a":[1,{}]}"#),
    ] {
        assert_eq!(cut_all(text), wanted, "{text}");
    }
}

/// A random JSON text, and the parts of it that must be found in its place, unchanged.
struct Grown {
    rng: StdRng,
    text: String,
    /// What stays, without white space and commas between siblings.
    kept: Vec<String>,
    /// Within a part that goes.
    cutting: u32,
}

impl Grown {
    fn put(&mut self, part: &str) {
        self.text.push_str(part);
        if self.cutting == 0 {
            self.kept.push(part.to_owned());
        }
    }

    fn space(&mut self) {
        for _ in 0..self.rng.gen_range(0..3) {
            let space = [" ", "\n", "\t", "\r"][self.rng.gen_range(0..4)];
            self.text.push_str(space);
        }
    }

    fn scalar(&mut self) {
        let number = self.rng.gen_range(0..1000);
        let scalar = match self.rng.gen_range(0..6) {
            0 => format!("{number}.50e+1"),
            1 => format!("\"\\u0041 , ] }} \\\" {number}\""),
            2 => format!("-{number}"),
            3 => "null".to_owned(),
            4 => "\"{\\\"cut\\\":[1,\u{e9}]}\"".to_owned(),
            _ => "true".to_owned(),
        };
        self.put(&scalar);
    }

    fn value(&mut self, depth: u32) {
        let members = self.rng.gen_range(0..5);
        match self.rng.gen_range(0..3) {
            0 if depth < 5 => self.container(members, '{', '}', |grown| {
                let goes = grown.rng.gen_bool(0.4);
                grown.cutting += u32::from(goes);
                let key = match (goes, grown.rng.gen_range(0..3)) {
                    (true, 0) => "\"c\\u0075t\"".to_owned(),
                    (true, _) => "\"cut\"".to_owned(),
                    (false, 0) => format!("\"\\u006b{}\"", grown.rng.gen_range(0..1000)),
                    (false, _) => format!("\"cut{}\"", grown.rng.gen_range(0..1000)),
                };
                grown.put(&key);
                grown.space();
                grown.put(":");
                grown.space();
                grown.value(depth + 1);
                grown.cutting -= u32::from(goes);
            }),
            1 if depth < 5 => self.container(members, '[', ']', |grown| {
                if grown.rng.gen_bool(0.4) {
                    grown.cutting += 1;
                    grown.put("\"cut\"");
                    grown.cutting -= 1;
                } else {
                    grown.value(depth + 1);
                }
            }),
            _ => self.scalar(),
        }
    }

    fn container(&mut self, members: u32, open: char, close: char, mut member: impl FnMut(&mut Grown)) {
        self.put(&open.to_string());
        for at in 0..members {
            self.space();
            if at > 0 {
                self.text.push(',');
                self.space();
            }
            member(self);
        }
        self.space();
        self.put(&close.to_string());
    }
}

/// A text without the white space and the commas that stand between values.
fn squeezed(text: &str) -> String {
    let (mut out, mut quoted, mut escaped) = (String::new(), false, false);
    for c in text.chars() {
        if quoted {
            out.push(c);
            quoted = escaped || c != '"';
            escaped = !escaped && c == '\\';
        } else if !matches!(c, ' ' | '\n' | '\t' | '\r' | ',') {
            out.push(c);
            quoted = c == '"';
        }
    }
    out
}

fn without_cut(value: Value) -> Value {
    match value {
        Value::Object(members) => Value::Object(
            members.into_iter().filter(|(key, _)| key != "cut").map(|(k, v)| (k, without_cut(v))).collect(),
        ),
        Value::Array(items) => Value::Array(items.into_iter().filter(|item| item != "cut").map(without_cut).collect()),
        other => other,
    }
}

#[test]
fn any_text_loses_exactly_what_is_cut_and_stays_json() {
    for seed in 0..20_000 {
        let mut grown = Grown { rng: StdRng::seed_from_u64(seed), text: String::new(), kept: vec![], cutting: 0 };
        grown.space();
        grown.value(0);
        grown.space();
        let out = cut_all(&grown.text);
        let read: Value =
            serde_json::from_str(&out).unwrap_or_else(|e| panic!("seed {seed}: {e}\n{}\n{out}", grown.text));
        assert_eq!(read, without_cut(serde_json::from_str(&grown.text).unwrap()), "seed {seed}: {}", grown.text);
        assert_eq!(squeezed(&out), squeezed(&grown.kept.concat()), "seed {seed}: {}", grown.text);
        if squeezed(&out) == squeezed(&grown.text) {
            assert_eq!(out, grown.text, "seed {seed}: nothing was cut, so no byte may change");
        }
    }
}

fn assigned(body: &str, assignments: &[(Option<&str>, &str, &str)]) -> Option<String> {
    let all: Vec<_> = assignments.iter().map(|&(within, name, value)| Assignment { within, name, value }).collect();
    set(body.as_bytes(), &all).map(|body| String::from_utf8(body).unwrap())
}

#[test]
fn members_are_set_where_they_are_and_else_in_front() {
    let all = [
        (None, "model", "\"b\""),
        (Some("options"), "num_ctx", "8"),
        (Some("options"), "top_k", "1"),
        (None, "x", "[]"),
    ];
    for (body, wanted) in [
        ("{}", r#"{"model":"b","options":{"num_ctx":8,"top_k":1},"x":[]}"#),
        (r#"{"model" : "a"}"#, r#"{"options":{"num_ctx":8,"top_k":1},"x":[],"model" : "b"}"#),
        (r#"{"model":"a","options":{},"x":1}"#, r#"{"model":"b","options":{"num_ctx":8,"top_k":1},"x":[]}"#),
        (
            r#"{"x":[],"model":"b","options":{ "seed":7, "num_ctx":4096 }}"#,
            r#"{"x":[],"model":"b","options":{"top_k":1, "seed":7, "num_ctx":8 }}"#,
        ),
        (r#"{"options":null,"x":[],"model":"b"}"#, r#"{"options":{"num_ctx":8,"top_k":1},"x":[],"model":"b"}"#),
        // The same names elsewhere are none of its business.
        (
            r#"{"a":{"model":"a","options":{"num_ctx":1}},"model":"b","x":[],"options":{"model":"a","num_ctx":8,"top_k":1}}"#,
            "",
        ),
    ] {
        assert_eq!(assigned(body, &all).as_deref().unwrap_or_default(), wanted, "{body}");
    }
    assert_eq!(assigned(r#"{"a":1}"#, &[]), None);
    assert_eq!(assigned("[]", &all), None);
    assert_eq!(assigned("{}x", &all), None);
    assert_eq!(assigned("{}", &[(None, "a\"b", "1")]).as_deref(), Some(r#"{"a\"b":1}"#));
}

#[test]
fn what_is_set_in_any_object_is_all_that_changes() {
    for seed in 0..5_000 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut grown = Grown { rng: StdRng::seed_from_u64(seed), text: String::new(), kept: vec![], cutting: 0 };
        let members = rng.gen_range(0..5);
        let chosen = rng.gen_range(0..6);
        let mut at = 0;
        grown.container(members, '{', '}', |grown| {
            let key = if at == chosen { "\"model\"".to_owned() } else { format!("\"k{at}\"") };
            grown.put(&key);
            grown.put(":");
            grown.space();
            grown.value(1);
            at += 1;
        });
        let mut wanted: Value = serde_json::from_str(&grown.text).unwrap();
        wanted["model"] = Value::from("b");
        let out = assigned(&grown.text, &[(None, "model", "\"b\"")]).unwrap();
        let read: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("seed {seed}: {e}\n{out}"));
        assert_eq!(read, wanted, "seed {seed}");
    }
}
