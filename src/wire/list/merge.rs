//! The lists of several backends as one, and what is said of a model beside what its backend says.
//!
//! The first list is the base: what of it stays as it is stays byte for byte. Models of the others follow behind, each once.

use std::collections::HashSet;

use super::super::Endpoint;
use super::super::json::{Malformed, Reader, Shape, fold};
use super::super::model;
use super::super::rewrite::edit::{Edits, Siblings};
use super::{List, ListError, read};

/// Members that are put into an entry which has none of that name: a key, and a value as JSON.
pub type Extra = Vec<(&'static str, String)>;

/// What of some lists is shown, and how.
pub struct View<'a> {
    /// Whether a model may be seen, by its name as its backend spells it.
    pub shows: &'a (dyn Fn(&str) -> bool + Sync),
    /// What is said of a model, by its canonical name.
    pub extra: &'a (dyn Fn(&str) -> Extra + Sync),
    pub aliases: &'a [ListedAlias],
}

/// A name that is listed with what its target's entry says.
#[derive(Clone, Debug)]
pub struct ListedAlias {
    /// With its tag, as Ollama lists names.
    pub name: String,
    /// Both canonical.
    pub canonical: String,
    pub target: String,
}

/// One list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    pub body: Vec<u8>,
    pub shown: usize,
    pub hidden: usize,
}

/// Makes one list of the replies of several backends to `/api/tags`, `/api/ps` or `/v1/models`, of which there is one at least. A model
/// without a clear name is not shown: nobody can have allowed it. What is no list is never null, but empty.
pub fn merge(endpoint: Endpoint, bodies: &[&[u8]], view: &View<'_>) -> Result<Merged, ListError> {
    let lists = bodies.iter().map(|body| read(endpoint, body)).collect::<Result<Vec<_>, _>>()?;
    let Some((base, first)) = bodies.first().zip(lists.first()) else { return Err(ListError("there is none")) };
    let mut merging = Merging { view, seen: HashSet::new(), shown: 0, hidden: 0 };

    let (mut edits, mut siblings) = (Edits::default(), Siblings::new(first.place.start + 1));
    let mut own = Vec::new();
    for entry in &first.entries {
        let name = entry.model.as_ref().map(|model| model.name.as_str());
        let place = entry.place.clone();
        match name.filter(|name| merging.shows(name)) {
            Some(name) => {
                let canonical = canonical(name);
                if let Some(dressed) = dress(&base[place.clone()], &(view.extra)(&canonical), None) {
                    edits.replace(place.clone(), dressed);
                }
                own.push(canonical);
                siblings.keep(place, &mut edits);
                merging.shown += 1;
            }
            None => {
                siblings.cut(place, &mut edits);
                merging.hidden += 1;
            }
        }
    }
    siblings.close(String::new(), &mut edits);
    let has_some = !own.is_empty();
    merging.seen.extend(own);

    let mut behind = Vec::new();
    for (body, list) in bodies.iter().zip(&lists).skip(1) {
        merging.others(body, list, &mut behind);
    }
    for alias in view.aliases {
        behind.extend(listed_alias(alias, bodies, &lists, view));
    }
    merging.shown += behind.len();
    let behind = behind.join(",");
    if first.is_null {
        edits.replace(first.place.clone(), format!("[{behind}]"));
    } else if !behind.is_empty() {
        let end = first.place.end - 1;
        edits.replace(end..end, if has_some { format!(",{behind}") } else { behind });
    }
    Ok(Merged { body: edits.apply(base), shown: merging.shown, hidden: merging.hidden })
}

struct Merging<'a> {
    view: &'a View<'a>,
    /// Canonical names.
    seen: HashSet<String>,
    shown: usize,
    hidden: usize,
}

impl Merging<'_> {
    /// A model that has the name of an alias cannot be reached.
    fn shows(&self, name: &str) -> bool {
        let canonical = canonical(name);
        (self.view.shows)(name) && !self.view.aliases.iter().any(|alias| alias.canonical == canonical)
    }

    fn others(&mut self, body: &[u8], list: &List, behind: &mut Vec<String>) {
        for entry in &list.entries {
            let name = entry.model.as_ref().map(|model| model.name.as_str());
            let Some(name) = name.filter(|name| self.shows(name)) else {
                self.hidden += 1;
                continue;
            };
            let canonical = canonical(name);
            let extra = (self.view.extra)(&canonical);
            if self.seen.insert(canonical) {
                let text = &body[entry.place.clone()];
                behind.push(dress(text, &extra, None).unwrap_or_else(|| String::from_utf8_lossy(text).into_owned()));
            }
        }
    }
}

fn listed_alias(alias: &ListedAlias, bodies: &[&[u8]], lists: &[List], view: &View<'_>) -> Option<String> {
    let of_all = bodies.iter().zip(lists).flat_map(|(body, list)| list.entries.iter().map(move |entry| (body, entry)));
    let mut known = of_all.filter_map(|(body, entry)| Some((&body[entry.place.clone()], entry.model.as_ref()?)));
    let (text, _) = known.find(|(_, model)| canonical(&model.name) == alias.target)?;
    let mut extra = (view.extra)(&alias.target);
    extra.push(("alias_of", serde_json::Value::from(alias.target.as_str()).to_string()));
    dress(text, &extra, Some(&alias.name))
}

fn canonical(name: &str) -> String {
    model::parse(name).map_or_else(|_| name.to_owned(), |model| model.canonical())
}

/// An entry with further members, in front of its closing brace, and perhaps with another name. `None`: there is nothing to do, or it is
/// no object.
pub fn dress(entry: &[u8], extra: &Extra, rename: Option<&str>) -> Option<String> {
    let mut edits = Edits::default();
    let mut keys = Vec::new();
    let mut reader = Reader::new(entry).ok()?;
    if reader.shape().ok()? != Shape::Object {
        return None;
    }
    reader
        .object(|reader, key| {
            let key = fold(&key.decode()).into_owned();
            let shape = reader.shape()?;
            let start = reader.at();
            reader.skip()?;
            if let Some(name) = rename
                && shape == Shape::Text
                && ["name", "model", "id"].contains(&key.as_str())
            {
                edits.replace(start..reader.at(), serde_json::Value::from(name).to_string());
            }
            keys.push(key);
            Ok::<(), Malformed>(())
        })
        .ok()?;
    let end = reader.at() - 1;
    let added = extra.iter().filter(|(key, _)| !keys.iter().any(|known| known == key));
    let added: Vec<String> = added.map(|(key, value)| format!("\"{key}\":{value}")).collect();
    if !added.is_empty() {
        let comma = if keys.is_empty() { "" } else { "," };
        edits.replace(end..end, format!("{comma}{}", added.join(",")));
    }
    if edits.is_empty() { None } else { String::from_utf8(edits.apply(entry)).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(name: &str, target: &str) -> ListedAlias {
        ListedAlias { name: format!("{name}:latest"), canonical: name.to_owned(), target: target.to_owned() }
    }

    fn merged(endpoint: Endpoint, bodies: &[&str], denied: &[&str], extra: Extra, aliases: &[ListedAlias]) -> Merged {
        let bodies: Vec<&[u8]> = bodies.iter().map(|body| body.as_bytes()).collect();
        let view = View { shows: &|name| !denied.contains(&name), extra: &|_| extra.clone(), aliases };
        merge(endpoint, &bodies, &view).expect("lists")
    }

    fn text(merged: &Merged) -> &str {
        std::str::from_utf8(&merged.body).expect("text")
    }

    #[test]
    fn each_model_is_listed_once_and_the_first_list_keeps_its_bytes() {
        let first = "{ \"models\": [ {\"name\":\"a:latest\",\"x\":1.50} , {\"name\":\"b\"} ] ,\"y\":2}\n";
        let second = r#"{"models":[{"name":"B:latest","z":1},{"name":"c"},{"name":"d"}]}"#;
        let all = merged(Endpoint::Tags, &[first, second, r#"{"models":[{"name":"c"}]}"#], &["d"], vec![], &[]);
        let wanted =
            "{ \"models\": [ {\"name\":\"a:latest\",\"x\":1.50} , {\"name\":\"b\"} ,{\"name\":\"c\"}] ,\"y\":2}\n";
        assert_eq!((text(&all), all.shown, all.hidden), (wanted, 3, 1));
        let none_of_the_first = merged(Endpoint::Tags, &[first, second], &["a:latest", "b", "B:latest"], vec![], &[]);
        let list: serde_json::Value = serde_json::from_slice(&none_of_the_first.body).expect("JSON");
        assert_eq!(list["models"], serde_json::json!([{ "name": "c" }, { "name": "d" }]));
    }

    #[test]
    fn a_list_is_never_null() {
        let none = r#"{"object":"list","data":null}"#;
        assert_eq!(text(&merged(Endpoint::Models, &[none], &[], vec![], &[])), r#"{"object":"list","data":[]}"#);
        let one = r#"{"object":"list","data":[{"id":"a"}]}"#;
        assert_eq!(text(&merged(Endpoint::Models, &[none, one], &[], vec![], &[])), one);
        assert_eq!(text(&merged(Endpoint::Models, &[one, none], &[], vec![], &[])), one);
    }

    #[test]
    fn members_are_added_only_where_there_are_none() {
        let body = r#"{"data":[{"id":"a","Loaded":1},{"id":"b"},{}]}"#;
        let extra = vec![("loaded", "true".to_owned()), ("capabilities", "[\"x\"]".to_owned())];
        let wanted =
            r#"{"data":[{"id":"a","Loaded":1,"capabilities":["x"]},{"id":"b","loaded":true,"capabilities":["x"]}]}"#;
        assert_eq!(text(&merged(Endpoint::Models, &[body], &[], extra.clone(), &[])), wanted);
        assert_eq!(dress(b"{}", &extra, None).as_deref(), Some(r#"{"loaded":true,"capabilities":["x"]}"#));
        assert_eq!(dress(b"{\"id\":\"a\"}", &vec![], None), None);
        assert_eq!(dress(b"[1]", &extra, Some("x")), None);
    }

    #[test]
    fn an_alias_is_listed_as_its_target_with_another_name_and_hides_a_model_of_that_name() {
        let bodies = [
            r#"{"models":[{"name":"fast:latest","model":"fast:latest"}]}"#,
            r#"{"models":[{"name":"big:7b","model":"big:7b","size":5,"details":{"name":"kept"}}]}"#,
        ];
        let all = merged(Endpoint::Tags, &bodies, &[], vec![], &[alias("fast", "big:7b"), alias("gone", "absent")]);
        let list: serde_json::Value = serde_json::from_slice(&all.body).expect("JSON");
        let entry =
            |name: &str| serde_json::json!({ "name": name, "model": name, "size": 5, "details": { "name": "kept" } });
        let mut fast = entry("fast:latest");
        fast["alias_of"] = "big:7b".into();
        assert_eq!(list["models"], serde_json::json!([entry("big:7b"), fast]));
    }
}
