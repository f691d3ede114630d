//! The models in a list reply: read here, filtered and merged with others in [`merge`] without touching what stays.
use super::Endpoint;
use super::json::{Malformed, Reader, Shape, fold};
use std::fmt;
use std::ops::Range;

pub mod merge;

pub use merge::{Extra, ListedAlias, Merged, View, dress, merge};

/// One model of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedModel {
    /// As the backend spells it. Not yet judged: [`super::model::parse`] it before use.
    pub name: String,
    /// It has a `remote_host`: a stub whose prompts go to another machine.
    pub remote: bool,
}

/// The reply is not the list that the endpoint gives (502 `bad_backend_reply`). It never quotes the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListError(&'static str);

impl fmt::Display for ListError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the backend's list of models cannot be read: {}", self.0)
    }
}

impl std::error::Error for ListError {}

impl From<Malformed> for ListError {
    fn from(Malformed(what): Malformed) -> Self {
        ListError(what)
    }
}

/// The models of a list reply, in its order; entries without a name are left out.
pub fn names(endpoint: Endpoint, body: &[u8]) -> Result<Vec<ListedModel>, ListError> {
    Ok(read(endpoint, body)?.entries.into_iter().filter_map(|entry| entry.model).collect())
}

/// As [`names`], each with the bytes of its entry.
pub(super) fn entries(endpoint: Endpoint, body: &[u8]) -> Result<Vec<(ListedModel, &[u8])>, ListError> {
    let entries = read(endpoint, body)?.entries.into_iter();
    Ok(entries.filter_map(|entry| Some((entry.model?, &body[entry.place]))).collect())
}

struct List {
    /// From bracket to bracket; of `null` the word.
    place: Range<usize>,
    is_null: bool,
    entries: Vec<Entry>,
}

struct Entry {
    place: Range<usize>,
    model: Option<ListedModel>,
}

fn read(endpoint: Endpoint, body: &[u8]) -> Result<List, ListError> {
    // The first key that is there names the model.
    let (list_key, name_keys): (&str, [&str; 2]) = match endpoint {
        Endpoint::Tags | Endpoint::Ps => ("models", ["model", "name"]),
        Endpoint::Models => ("data", ["id", "id"]),
        _ => return Err(ListError("this endpoint has none")),
    };
    let mut reader = Reader::new(body)?;
    let mut found = false;
    let mut list = List { place: 0..0, is_null: false, entries: vec![] };
    reader.object(|reader, key| {
        // Go's client, which is `ollama ls`, folds keys too.
        if fold(&key.decode()) != list_key {
            return Ok(reader.skip()?);
        }
        if std::mem::replace(&mut found, true) {
            return Err(ListError("it has two lists"));
        }
        let shape = reader.shape()?;
        let start = reader.at();
        match shape {
            // `/v1/models` of an Ollama without models.
            Shape::Null => {
                list.is_null = true;
                reader.skip()?;
            }
            Shape::Array => reader.array(|reader| {
                list.entries.push(entry(reader, name_keys)?);
                Ok::<(), ListError>(())
            })?,
            _ => return Err(ListError("its list is no array")),
        }
        list.place = start..reader.at();
        Ok(())
    })?;
    reader.end()?;
    if found { Ok(list) } else { Err(ListError("it has no list")) }
}

fn entry(reader: &mut Reader<'_>, name_keys: [&str; 2]) -> Result<Entry, ListError> {
    let shape = reader.shape()?;
    let start = reader.at();
    if shape != Shape::Object {
        reader.skip()?;
        return Ok(Entry { place: start..reader.at(), model: None });
    }
    let mut names: [Option<String>; 2] = [None, None];
    let mut remote = false;
    reader.object(|reader, key| {
        let key = key.decode();
        let shape = reader.shape()?;
        match name_keys.iter().position(|&name| name == key) {
            Some(index) if shape == Shape::Text => names[index] = Some(reader.string()?.decode().into_owned()),
            _ if key == "remote_host" && shape == Shape::Text => remote |= !reader.string()?.is_empty(),
            _ => reader.skip()?,
        }
        Ok::<(), Malformed>(())
    })?;
    let [first, second] = names;
    let model = match (first, second) {
        // Two names for one model: none of them can be trusted to be the one that a client shows.
        (Some(first), Some(second)) if first != second => None,
        (first, second) => first.or(second).map(|name| ListedModel { name, remote }),
    };
    Ok(Entry { place: start..reader.at(), model })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without(endpoint: Endpoint, body: &str, denied: &[&str]) -> (String, usize, usize) {
        let view = View { shows: &|name| !denied.contains(&name), extra: &|_| vec![], aliases: &[] };
        let merged = merge(endpoint, &[body.as_bytes()], &view).unwrap();
        (String::from_utf8(merged.body).unwrap(), merged.shown, merged.hidden)
    }

    #[test]
    fn denied_models_are_cut_and_the_rest_is_byte_exact() {
        let body = "{ \"models\" : [ {\"name\":\"a\",\"x\":[{}]} , {\"name\":\"b\"},\n{\"name\":\"c\"} ] , \"y\":1 }\n";
        for (denied, list, shown) in [
            (vec![], "[ {\"name\":\"a\",\"x\":[{}]} , {\"name\":\"b\"},\n{\"name\":\"c\"} ]", 3),
            (vec!["a"], "[ {\"name\":\"b\"},\n{\"name\":\"c\"} ]", 2),
            (vec!["b"], "[ {\"name\":\"a\",\"x\":[{}]} ,\n{\"name\":\"c\"} ]", 2),
            (vec!["c"], "[ {\"name\":\"a\",\"x\":[{}]} , {\"name\":\"b\"} ]", 2),
            (vec!["a", "b"], "[ {\"name\":\"c\"} ]", 1),
            (vec!["a", "c"], "[ {\"name\":\"b\"} ]", 1),
            (vec!["b", "c"], "[ {\"name\":\"a\",\"x\":[{}]} ]", 1),
            (vec!["a", "b", "c"], "[  ]", 0),
        ] {
            let (out, kept, hidden) = without(Endpoint::Tags, body, &denied);
            assert_eq!((kept, hidden), (shown, denied.len()));
            let (start, end) = (body.find('[').unwrap(), body.rfind(']').unwrap() + 1);
            let wanted = format!("{}{list}{}", &body[..start], &body[end..]);
            // White space around a comma may go with the entry that is cut; the JSON must be the same.
            let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
            assert_eq!(value(&out), value(&wanted), "{denied:?}: {out}");
            if denied.is_empty() {
                assert_eq!(out, body);
            }
        }
    }

    #[test]
    fn compact_lists_are_cut_exactly() {
        let body = r#"{"object":"list","data":[{"id":"a"},{"id":"b"},{"id":"c"}]}"#;
        let out = |denied: &[&str]| without(Endpoint::Models, body, denied).0;
        assert_eq!(out(&["a"]), r#"{"object":"list","data":[{"id":"b"},{"id":"c"}]}"#);
        assert_eq!(out(&["b"]), r#"{"object":"list","data":[{"id":"a"},{"id":"c"}]}"#);
        assert_eq!(out(&["a", "b"]), r#"{"object":"list","data":[{"id":"c"}]}"#);
        assert_eq!(out(&["c"]), r#"{"object":"list","data":[{"id":"a"},{"id":"b"}]}"#);
        assert_eq!(out(&["a", "b", "c"]), r#"{"object":"list","data":[]}"#);
    }

    #[test]
    fn empty_lists_stay_as_they_are() {
        for (endpoint, body) in
            [(Endpoint::Models, r#"{"object":"list","data":[]}"#), (Endpoint::Ps, r#"{"models":[]}"#)]
        {
            assert_eq!(without(endpoint, body, &[]), (body.to_owned(), 0, 0));
            assert_eq!(names(endpoint, body.as_bytes()), Ok(vec![]));
        }
    }

    #[test]
    fn an_entry_without_one_clear_name_is_never_shown() {
        let body = r#"{"models":[{"size":1},"a",{"name":"a","model":"b"},{"name":"a","model":"a"}]}"#;
        let (out, shown, hidden) = without(Endpoint::Tags, body, &[]);
        assert_eq!((out.as_str(), shown, hidden), (r#"{"models":[{"name":"a","model":"a"}]}"#, 1, 3));
    }

    #[test]
    fn names_say_which_models_are_stubs() {
        let body =
            r#"{"models":[{"name":"a:latest"},{"name":"b\u002fc:cloud","remote_host":"https://ollama.com:443"}]}"#;
        let listed = names(Endpoint::Tags, body.as_bytes()).unwrap();
        let wanted = [("a:latest", false), ("b/c:cloud", true)];
        assert_eq!(listed.iter().map(|m| (m.name.as_str(), m.remote)).collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn what_is_no_list_is_an_error() {
        for body in [
            "",
            "{}",
            "[]",
            "{\"models\":{}}",
            "{\"models\":[1}",
            "{\"models\":[],\"models\":[]}",
            "{\"models\":[],\"Models\":[]}",
        ] {
            assert!(names(Endpoint::Tags, body.as_bytes()).is_err(), "{body}");
        }
        assert!(names(Endpoint::Chat, b"{\"models\":[]}").is_err());
    }
}
