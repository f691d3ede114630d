//! The settings that Ollama loads a model with, as an operator wants them.
//!
//! Two clients of one model that differ in `options.num_ctx`, or in another of these, make Ollama load it again for each of
//! them (ollama-wire 0.8). [`apply`] pins, clamps or strips them in a body of Ollama's own API. The `/v1` routes have no such
//! members, and Ollama ignores them there, so nothing is written into such a body.

use std::ops::Range;

use super::super::Endpoint;
use super::super::json::{Malformed, Reader, Shape};
use super::super::keep_alive::KeepAlive;
use super::edit::{Edits, Siblings};

/// What becomes of one setting.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule<T> {
    /// Always this value, whether the client sends one or not.
    Pin(T),
    /// A value that the client sends is raised to the least or lowered to the most; one that it does not send stays Ollama's.
    Clamp { least: Option<T>, most: Option<T> },
    /// What the client sends is taken out.
    Strip,
}

/// The whole numbers among `options`, in the order of [`Rules::numbers`].
pub const NUMBERS: [&str; 5] = ["num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread"];

/// What an operator said about one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// By place in [`NUMBERS`].
    pub numbers: [Option<Rule<i64>>; NUMBERS.len()],
    pub use_mmap: Option<Rule<bool>>,
    pub keep_alive: Option<Rule<KeepAlive>>,
}

impl Rules {
    pub fn is_empty(&self) -> bool {
        *self == Rules::default()
    }
}

/// A body with its settings as they should be, and what was done, in the audit's words. `None` where nothing has to change.
///
/// The body is one of `endpoint` that [`super::super::ask::read`] has judged, so that no key comes twice.
pub fn apply(endpoint: Endpoint, body: &[u8], rules: &Rules) -> Option<(Vec<u8>, Vec<&'static str>)> {
    use Endpoint::*;
    if rules.is_empty() || !matches!(endpoint, Chat | Generate | Embed | Embeddings) {
        return None;
    }
    let mut change = Change { edits: Edits::default(), words: Vec::new() };
    let mut reader = Reader::new(body).ok()?;
    change.body(&mut reader, rules).ok()?;
    reader.end().ok()?;
    let Change { edits, mut words } = change;
    words.sort_unstable();
    (!words.is_empty()).then(|| (edits.apply(body), words))
}

/// The names that the audit has for what was done about one setting.
#[derive(Clone, Copy)]
struct Words {
    pinned: &'static str,
    clamped: &'static str,
    stripped: &'static str,
}

macro_rules! words {
    ($key:literal) => {
        Words {
            pinned: concat!($key, "_pinned"),
            clamped: concat!($key, "_clamped"),
            stripped: concat!($key, "_stripped"),
        }
    };
}

/// By place in [`NUMBERS`].
const NUMBER_WORDS: [Words; NUMBERS.len()] =
    [words!("num_ctx"), words!("num_batch"), words!("num_gpu"), words!("main_gpu"), words!("num_thread")];

/// What becomes of a member that was sent.
enum Fate {
    Stays,
    Becomes(String, &'static str),
    Goes(&'static str),
}

struct Change {
    edits: Edits,
    words: Vec<&'static str>,
}

impl Change {
    fn body(&mut self, reader: &mut Reader<'_>, rules: &Rules) -> Result<(), Malformed> {
        let (mut has_options, mut has_keep_alive) = (false, false);
        reader.space();
        let mut siblings = Siblings::new(reader.at() + 1);
        reader.object(|reader, key| {
            let name = key.decode();
            let shape = reader.shape()?;
            let start = reader.at();
            if name == "options" && shape == Shape::Object {
                has_options = true;
                self.options(reader, rules)?;
                siblings.keep(key.range().start..reader.at(), &mut self.edits);
                return Ok(());
            }
            reader.skip()?;
            let value = start..reader.at();
            let fate = match name.as_ref() {
                "options" => {
                    has_options = true;
                    let added = self.added_options(rules, &[]);
                    match added.is_empty() {
                        true => Fate::Stays,
                        false => Fate::Becomes(format!("{{{added}}}"), ""),
                    }
                }
                "keep_alive" => {
                    has_keep_alive = true;
                    let rule = rules.keep_alive.as_ref();
                    fate(rule, words!("keep_alive"), shape, reader.text(value.clone()), keep_alive, KeepAlive::to_json)
                }
                _ => Fate::Stays,
            };
            self.meet(fate, key.range().start, value, &mut siblings);
            Ok::<(), Malformed>(())
        })?;
        let mut added = Vec::new();
        if let Some(Rule::Pin(pinned)) = rules.keep_alive.as_ref().filter(|_| !has_keep_alive) {
            added.push(format!("\"keep_alive\":{}", pinned.to_json()));
            self.words.push(words!("keep_alive").pinned);
        }
        if !has_options {
            let options = self.added_options(rules, &[]);
            if !options.is_empty() {
                added.push(format!("\"options\":{{{options}}}"));
            }
        }
        siblings.close(added.join(","), &mut self.edits);
        Ok(())
    }

    fn options(&mut self, reader: &mut Reader<'_>, rules: &Rules) -> Result<(), Malformed> {
        let mut sent = Vec::new();
        let mut siblings = Siblings::new(reader.at() + 1);
        reader.object(|reader, key| {
            let name = key.decode();
            let shape = reader.shape()?;
            let start = reader.at();
            reader.skip()?;
            let value = start..reader.at();
            let text = reader.text(value.clone());
            let fate = if let Some(place) = NUMBERS.iter().position(|number| *number == name) {
                sent.push(NUMBERS[place]);
                fate(rules.numbers[place].as_ref(), NUMBER_WORDS[place], shape, text, number, i64::to_string)
            } else if name == "use_mmap" {
                sent.push("use_mmap");
                fate(rules.use_mmap.as_ref(), words!("use_mmap"), shape, text, |shape, _| flag(shape), bool::to_string)
            } else {
                Fate::Stays
            };
            self.meet(fate, key.range().start, value, &mut siblings);
            Ok::<(), Malformed>(())
        })?;
        let added = self.added_options(rules, &sent);
        siblings.close(added, &mut self.edits);
        Ok(())
    }

    /// The pinned options that were not sent.
    fn added_options(&mut self, rules: &Rules, sent: &[&str]) -> String {
        let mut added = Vec::new();
        for ((name, words), rule) in NUMBERS.iter().zip(NUMBER_WORDS).zip(&rules.numbers) {
            if let Some(Rule::Pin(pinned)) = rule.as_ref().filter(|_| !sent.contains(name)) {
                added.push(format!("\"{name}\":{pinned}"));
                self.words.push(words.pinned);
            }
        }
        if let Some(Rule::Pin(pinned)) = rules.use_mmap.as_ref().filter(|_| !sent.contains(&"use_mmap")) {
            added.push(format!("\"use_mmap\":{pinned}"));
            self.words.push(words!("use_mmap").pinned);
        }
        added.join(",")
    }

    fn meet(&mut self, fate: Fate, start: usize, value: Range<usize>, siblings: &mut Siblings) {
        let whole = start..value.end;
        match fate {
            Fate::Stays => siblings.keep(whole, &mut self.edits),
            Fate::Becomes(text, word) => {
                siblings.keep(whole, &mut self.edits);
                self.edits.replace(value, text);
                self.words.extend((!word.is_empty()).then_some(word));
            }
            Fate::Goes(word) => {
                siblings.cut(whole, &mut self.edits);
                self.words.push(word);
            }
        }
    }
}

/// `read`: what a value means, if anything; `write`: the same as JSON. `null` is what is not sent.
fn fate<T: PartialOrd>(
    rule: Option<&Rule<T>>,
    words: Words,
    shape: Shape,
    text: &str,
    read: impl Fn(Shape, &str) -> Option<T>,
    write: impl Fn(&T) -> String,
) -> Fate {
    let value = read(shape, text);
    match rule {
        Some(Rule::Pin(pinned)) if value.as_ref() != Some(pinned) => Fate::Becomes(write(pinned), words.pinned),
        Some(Rule::Clamp { least, most }) => {
            let Some(value) = value else { return Fate::Stays };
            let too_low = least.as_ref().filter(|least| value < **least);
            let bound = too_low.or(most.as_ref().filter(|most| value > **most));
            bound.map_or(Fate::Stays, |bound| Fate::Becomes(write(bound), words.clamped))
        }
        Some(Rule::Strip) if shape != Shape::Null => Fate::Goes(words.stripped),
        _ => Fate::Stays,
    }
}

/// An integer as Ollama reads an option: any number, cut to its whole part. One beyond 64 bits saturates, and a bound holds it.
fn number(shape: Shape, text: &str) -> Option<i64> {
    let number = (shape == Shape::Number).then_some(text)?;
    number.parse().ok().or_else(|| number.parse::<f64>().ok().map(|value| value.trunc() as i64))
}

fn flag(shape: Shape) -> Option<bool> {
    match shape {
        Shape::Bool(on) => Some(on),
        _ => None,
    }
}

fn keep_alive(shape: Shape, text: &str) -> Option<KeepAlive> {
    match shape {
        Shape::Number => KeepAlive::seconds(text),
        Shape::Text => KeepAlive::duration(&Reader::new(text.as_bytes()).ok()?.string().ok()?.decode()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules::default()
    }

    fn num_ctx(rule: Rule<i64>) -> Rules {
        Rules { numbers: [Some(rule), None, None, None, None], ..rules() }
    }

    fn edited(endpoint: Endpoint, body: &str, rules: &Rules) -> (String, Vec<&'static str>) {
        match apply(endpoint, body.as_bytes(), rules) {
            Some((edited, words)) => (String::from_utf8(edited).expect("text"), words),
            None => (body.to_owned(), vec![]),
        }
    }

    #[test]
    fn a_pinned_option_is_there_whatever_the_client_sends() {
        let pin = num_ctx(Rule::Pin(8192));
        for (body, wanted) in [
            (r#"{"model":"m"}"#, r#"{"options":{"num_ctx":8192},"model":"m"}"#),
            (r#"{}"#, r#"{"options":{"num_ctx":8192}}"#),
            (r#"{"model":"m","options":null}"#, r#"{"model":"m","options":{"num_ctx":8192}}"#),
            (r#"{"options":{} ,"a":1}"#, r#"{"options":{"num_ctx":8192} ,"a":1}"#),
            (r#"{"options":{"seed": 1}}"#, r#"{"options":{"num_ctx":8192,"seed": 1}}"#),
            (r#"{"options":{"num_ctx" : 4096 , "seed":1}}"#, r#"{"options":{"num_ctx" : 8192 , "seed":1}}"#),
            (r#"{"options":{"num_ctx":"x"}}"#, r#"{"options":{"num_ctx":8192}}"#),
            (r#"{"options":{"num_ctx":null}}"#, r#"{"options":{"num_ctx":8192}}"#),
            (r#"{"options":{"num_ctx":1e99}}"#, r#"{"options":{"num_ctx":8192}}"#),
        ] {
            assert_eq!(edited(Endpoint::Chat, body, &pin), (wanted.to_owned(), vec!["num_ctx_pinned"]), "{body}");
        }
        for same in [
            r#"{"options":{"num_ctx":8192}}"#,
            r#"{"options":{"num_ctx":8192.7}}"#,
            r#"{"options":{"num_ctx":8.192e3}}"#,
        ] {
            assert_eq!(
                edited(Endpoint::Generate, same, &pin),
                (same.to_owned(), vec![]),
                "Ollama reads the same number"
            );
        }
    }

    #[test]
    fn a_clamped_option_is_moved_to_its_bound_and_else_left_alone() {
        let clamp = num_ctx(Rule::Clamp { least: Some(2048), most: Some(8192) });
        for (sent, wanted) in
            [("1", "2048"), ("-5", "2048"), ("8193", "8192"), ("99999999999999999999999", "8192"), ("1e5", "8192")]
        {
            let body = format!("{{\"options\":{{\"a\":[1],\"num_ctx\":{sent}}}}}");
            let wanted = format!("{{\"options\":{{\"a\":[1],\"num_ctx\":{wanted}}}}}");
            assert_eq!(edited(Endpoint::Embed, &body, &clamp), (wanted, vec!["num_ctx_clamped"]), "{sent}");
        }
        for left in [
            "{\"options\":{\"num_ctx\":2048}}",
            "{\"options\":{\"num_ctx\":8192.9}}",
            "{}",
            "{\"options\":{\"num_ctx\":null}}",
            "{\"options\":{\"num_ctx\":\"9999\"}}",
        ] {
            assert_eq!(edited(Endpoint::Embed, left, &clamp), (left.to_owned(), vec![]));
        }
    }

    #[test]
    fn what_is_stripped_takes_its_comma_along() {
        let strip = Rules {
            numbers: [Some(Rule::Strip), Some(Rule::Strip), None, None, Some(Rule::Strip)],
            use_mmap: Some(Rule::Strip),
            keep_alive: Some(Rule::Strip),
        };
        for (body, wanted) in [
            (r#"{"options":{"num_ctx":1,"seed":2}}"#, r#"{"options":{"seed":2}}"#),
            (r#"{"options":{"seed":2, "num_ctx":1}}"#, r#"{"options":{"seed":2}}"#),
            (r#"{"options":{"num_ctx":1 , "num_batch":2 ,"seed":3,"num_thread":4}}"#, r#"{"options":{"seed":3}}"#),
            (r#"{"options":{ "num_ctx":1,"num_batch":2 }}"#, r#"{"options":{ }}"#),
            (r#"{"options":{"a":1,"num_ctx":1,"b":2,"use_mmap":true,"c":3}}"#, r#"{"options":{"a":1,"b":2,"c":3}}"#),
            (r#"{"keep_alive":"5m","model":"m"}"#, r#"{"model":"m"}"#),
            (r#"{"model":"m","keep_alive":-1}"#, r#"{"model":"m"}"#),
            (r#"{"keep_alive":0}"#, r#"{}"#),
        ] {
            let (out, words) = edited(Endpoint::Chat, body, &strip);
            let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect(text);
            assert_eq!(value(&out), value(wanted), "{body}: {out}");
            assert!(!words.is_empty() && words.iter().all(|word| word.ends_with("_stripped")), "{words:?}");
        }
    }

    #[test]
    fn keep_alive_is_a_member_of_its_own() {
        let five = KeepAlive::duration("5m").unwrap();
        let pin = Rules { keep_alive: Some(Rule::Pin(five.clone())), ..rules() };
        assert_eq!(edited(Endpoint::Chat, r#"{"model":"m"}"#, &pin).0, r#"{"keep_alive":"5m","model":"m"}"#);
        assert_eq!(edited(Endpoint::Chat, r#"{"keep_alive":-1}"#, &pin).0, r#"{"keep_alive":"5m"}"#);
        assert_eq!(edited(Endpoint::Chat, r#"{"keep_alive":"300s"}"#, &pin).1.len(), 0, "that is five minutes");
        let clamp = Rules { keep_alive: Some(Rule::Clamp { least: None, most: Some(five) }), ..rules() };
        for (sent, wanted) in [
            ("\"1h\"", "\"5m\""),
            ("-1", "\"5m\""),
            ("\"-1s\"", "\"5m\""),
            ("301", "\"5m\""),
            ("0", "0"),
            ("\"\\u0035m\"", "\"\\u0035m\""),
        ] {
            let body = format!("{{\"keep_alive\":{sent}}}");
            assert_eq!(edited(Endpoint::Chat, &body, &clamp).0, format!("{{\"keep_alive\":{wanted}}}"));
        }
    }

    #[test]
    fn several_rules_change_one_body_together() {
        let all = Rules {
            numbers: [
                Some(Rule::Pin(1)),
                Some(Rule::Strip),
                Some(Rule::Clamp { least: None, most: Some(9) }),
                Some(Rule::Pin(0)),
                None,
            ],
            use_mmap: Some(Rule::Pin(true)),
            keep_alive: Some(Rule::Pin(KeepAlive::seconds("-1").unwrap())),
        };
        let (out, words) =
            edited(Endpoint::Chat, r#"{"options":{"num_batch":2,"num_gpu":99,"use_mmap":false},"model":"m"}"#, &all);
        let wanted = serde_json::json!({
            "keep_alive": -1, "model": "m", "options": { "num_ctx": 1, "main_gpu": 0, "num_gpu": 9, "use_mmap": true }
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&out).unwrap(), wanted, "{out}");
        let wanted = [
            "keep_alive_pinned",
            "main_gpu_pinned",
            "num_batch_stripped",
            "num_ctx_pinned",
            "num_gpu_clamped",
            "use_mmap_pinned",
        ];
        assert_eq!(words, wanted);
        let (out, _) = edited(Endpoint::Chat, r#"{"options":{"num_batch":2}}"#, &all);
        assert!(serde_json::from_str::<serde_json::Value>(&out).is_ok(), "nothing stays beside what is new: {out}");
    }

    #[test]
    fn bodies_of_other_routes_have_no_such_settings() {
        let pin = num_ctx(Rule::Pin(8192));
        let body = r#"{"model":"m","options":{"num_ctx":1},"keep_alive":1}"#;
        for endpoint in
            [Endpoint::ChatCompletions, Endpoint::Responses, Endpoint::Messages, Endpoint::Show, Endpoint::Create]
        {
            assert_eq!(edited(endpoint, body, &pin), (body.to_owned(), vec![]));
        }
        assert_eq!(edited(Endpoint::Chat, body, &Rules::default()), (body.to_owned(), vec![]));
    }
}
