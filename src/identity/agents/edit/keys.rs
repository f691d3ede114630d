//! Edits of one agent's keys: `device_keys` and `api_keys`. A list that becomes empty goes away.

use toml_edit::{Array, ArrayOfTables, InlineTable, Item, Table, Value, value};

use crate::identity::api_key::ApiKeyHash;
use crate::identity::device::DeviceKey;
use crate::identity::token;

const DEVICE_KEYS: &str = "device_keys";
const API_KEYS: &str = "api_keys";

/// Adds the line of a key that was parsed, with its comment where that can be shown.
pub(super) fn add_device(table: &mut Table, key: &DeviceKey, line: &str) {
    let whole = line.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    let line = if token::is_plain(&whole, whole.len()) { whole } else { key.to_line() };
    match table.get_mut(DEVICE_KEYS).and_then(Item::as_array_mut) {
        Some(lines) => lines.push(line),
        None => table[DEVICE_KEYS] = value(Array::from_iter([line])),
    }
}

/// Removes a key by its line or its fingerprint. The error is the fingerprints that are there.
pub(super) fn remove_device(table: &mut Table, wanted: &str) -> Result<(), Vec<String>> {
    let wanted = DeviceKey::parse(wanted).map_or_else(|_| wanted.trim().to_owned(), |key| key.fingerprint());
    let print = |line: &Value| line.as_str().and_then(|line| DeviceKey::parse(line).ok()).map(|key| key.fingerprint());
    let Some(lines) = table.get_mut(DEVICE_KEYS).and_then(Item::as_array_mut) else { return Err(Vec::new()) };
    let prints: Vec<Option<String>> = lines.iter().map(print).collect();
    let Some(at) = prints.iter().position(|print| print.as_ref() == Some(&wanted)) else {
        return Err(prints.into_iter().flatten().collect());
    };
    lines.remove(at);
    if lines.is_empty() {
        table.remove(DEVICE_KEYS);
    }
    Ok(())
}

pub(super) fn add_api_key(table: &mut Table, name: &str, hash: &ApiKeyHash) {
    if let Some(tables) = table.get_mut(API_KEYS).and_then(Item::as_array_of_tables_mut) {
        let mut entry = Table::new();
        entry["name"] = value(name);
        entry["sha256"] = value(hash.to_hex());
        tables.push(entry);
        return;
    }
    let entry = InlineTable::from_iter([("name", name), ("sha256", &hash.to_hex())]);
    match table.get_mut(API_KEYS).and_then(Item::as_array_mut) {
        Some(entries) => entries.push(entry),
        None => table[API_KEYS] = value(Array::from_iter([entry])),
    }
}

/// Removes a key by its name, or by the session (`key:..`) that records show. The error is the names that are there.
pub(super) fn remove_api_key(table: &mut Table, wanted: &str) -> Result<(), Vec<String>> {
    let (at, names) = {
        let entries = entries(table.get(API_KEYS));
        let session = |sha256: &str| ApiKeyHash::parse(sha256).is_ok_and(|hash| hash.session_id() == wanted);
        let at = entries.iter().position(|(name, sha256)| *name == wanted || session(sha256));
        (at, entries.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>())
    };
    let Some(at) = at else { return Err(names) };
    match table.get_mut(API_KEYS) {
        Some(Item::ArrayOfTables(tables)) => drop(tables.remove(at)),
        Some(Item::Value(Value::Array(entries))) => drop(entries.remove(at)),
        _ => {}
    }
    if names.len() == 1 {
        table.remove(API_KEYS);
    }
    Ok(())
}

pub(super) fn has_api_key(table: &Table, wanted: &str) -> bool {
    entries(table.get(API_KEYS)).iter().any(|(name, _)| *name == wanted)
}

/// Name and hash of each, in whichever of TOML's two spellings they stand.
fn entries(item: Option<&Item>) -> Vec<(&str, &str)> {
    let tables = item.and_then(Item::as_array_of_tables).into_iter().flat_map(ArrayOfTables::iter);
    let from_tables =
        tables.map(|entry| (entry.get("name").and_then(Item::as_str), entry.get("sha256").and_then(Item::as_str)));
    let inline = item.and_then(Item::as_array).into_iter().flat_map(Array::iter).filter_map(Value::as_inline_table);
    let from_inline =
        inline.map(|entry| (entry.get("name").and_then(Value::as_str), entry.get("sha256").and_then(Value::as_str)));
    from_tables
        .chain(from_inline)
        .map(|(name, sha256)| (name.unwrap_or_default(), sha256.unwrap_or_default()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Change, EditError, apply};
    use super::*;

    const LINE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBwHRSNviAJ/Gf9o9Iq7i4SwiFXNWG8ELj5+xDRdKidG me@laptop";
    const PRINT: &str = "SHA256:rz2L0IwXB9NDnzf6Q5IAEMIS92rk/5mYNNhLMtR1ylU";
    const FILE: &str = "# ours\n[[agent]]\nid = \"a\" # first\n\n[[agent]]\nid = \"b\"\n";

    fn add_key(id: &str, line: &str) -> Change {
        Change::AddKey { id: id.to_owned(), line: line.to_owned() }
    }

    fn remove_key(id: &str, key: &str) -> Change {
        Change::RemoveKey { id: id.to_owned(), key: key.to_owned() }
    }

    fn add_api(id: &str, name: &str, key: &str) -> Change {
        Change::AddApiKey { id: id.to_owned(), name: name.to_owned(), sha256: ApiKeyHash::of(key).to_hex() }
    }

    fn remove_api(id: &str, name: &str) -> Change {
        Change::RemoveApiKey { id: id.to_owned(), name: name.to_owned() }
    }

    #[track_caller]
    fn changed(text: &str, change: &Change) -> String {
        apply(text, change).unwrap_or_else(|e| panic!("{e}")).0
    }

    fn refused(text: &str, change: &Change) -> EditError {
        apply(text, change).map(|_| ()).unwrap_err()
    }

    #[test]
    fn a_device_key_is_added_and_removed_and_the_rest_of_the_file_stays() {
        let (text, agents) = apply(FILE, &add_key("a", LINE)).unwrap();
        assert_eq!(text, FILE.replace("# first\n", &format!("# first\ndevice_keys = [\"{LINE}\"]\n")));
        assert_eq!(agents.keyring().device(&DeviceKey::parse(LINE).unwrap()).unwrap().agent_id, "a");
        for key in [PRINT, LINE, &LINE.replace("me@laptop", "")] {
            assert_eq!(changed(&text, &remove_key("a", key)), FILE, "{key}");
        }
        let odd = changed(FILE, &add_key("a", &LINE.replace("me@laptop", "bell\u{7}")));
        assert!(odd.contains("dG\"]"), "a comment that cannot be shown is left out: {odd}");
    }

    #[test]
    fn a_device_key_belongs_to_one_agent_and_must_be_a_good_one() {
        let text = changed(FILE, &add_key("a", LINE));
        for id in ["a", "b"] {
            assert!(matches!(refused(&text, &add_key(id, LINE)), EditError::Taken { owner } if owner == "a"), "{id}");
        }
        assert!(matches!(refused(FILE, &add_key("c", LINE)), EditError::Unknown { .. }));
        assert!(matches!(refused(FILE, &add_key("a", "ssh-rsa AAAA")), EditError::Invalid(_)));
        let weak = format!("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{}", "A".repeat(43));
        let said = refused(FILE, &add_key("a", &weak)).to_string();
        assert!(said.contains("weak"), "{said}");
        assert!(matches!(refused(&text, &remove_key("b", PRINT)), EditError::NoSuchKey { .. }));
        let said = refused(&text, &remove_key("a", "SHA256:other")).to_string();
        assert!(said.contains(PRINT), "what is there is named: {said}");
    }

    #[test]
    fn an_api_key_is_added_and_removed_in_either_spelling() {
        let one = changed(FILE, &add_api("a", "ci", "bop_1"));
        let (two, agents) = apply(&one, &add_api("a", "cd", "bop_2")).unwrap();
        assert_eq!(agents.accepting_api_keys(true).keyring().api_key("bop_2").unwrap().agent_id, "a");
        assert_eq!(changed(&two, &remove_api("a", "cd")), one);
        assert_eq!(changed(&two, &remove_api("a", &ApiKeyHash::of("bop_2").session_id())), one);
        assert_eq!(changed(&one, &remove_api("a", "ci")), FILE);
        let said = refused(&two, &remove_api("a", "none")).to_string();
        assert!(said.contains("ci, cd") && !said.contains(&ApiKeyHash::of("bop_1").to_hex()), "{said}");
        assert!(matches!(refused(FILE, &remove_api("a", "ci")), EditError::NoSuchKey { .. }));
        assert!(matches!(refused(&one, &add_api("a", "ci", "bop_3")), EditError::Invalid(_)), "a name is used once");
        assert!(matches!(refused(FILE, &add_api("a", "", "bop_3")), EditError::Invalid(_)));

        let tables = format!(
            "[[agent]]\nid = \"a\"\n\n[[agent.api_keys]]\nname = \"ci\"\nsha256 = \"{}\"\n",
            ApiKeyHash::of("bop_1").to_hex()
        );
        let (two, agents) = apply(&tables, &add_api("a", "cd", "bop_2")).unwrap();
        let agents = agents.accepting_api_keys(true);
        assert!(agents.keyring().api_key("bop_1").is_ok() && agents.keyring().api_key("bop_2").is_ok(), "{two}");
        let (_, agents) = apply(&two, &remove_api("a", "ci")).unwrap();
        let agents = agents.accepting_api_keys(true);
        assert!(agents.keyring().api_key("bop_1").is_err() && agents.keyring().api_key("bop_2").is_ok());
    }
}
