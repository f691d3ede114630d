//! TOML text in, a [`Config`] or the line and key at fault out.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::values::Pem;
use super::{Bad, Config, ConfigError, Model};

/// Parses the text of a file. `file` names it in errors, and relative paths in it are relative to its folder, so that
/// what it means does not depend on where the proxy was started.
pub(super) fn read(text: &str, file: &Path) -> Result<Config, ConfigError> {
    let place = |offset: usize| format!("{} line {}", file.display(), line_of(text, offset));
    let tree = DeTable::parse(text).map_err(|e| {
        let at = e.span().map_or(0, |span| span.start);
        ConfigError::new(place(at), format!("this is not TOML ({})", one_line(e.message())), "mend the line")
    })?;
    let mut known = toml::Table::try_from(Config::defaults()).expect("every field is written as a TOML value");
    // There is no model by default whose keys would show.
    let model = Model::KEYS.map(|key| (key.to_owned(), toml::Value::Boolean(true))).into_iter().collect();
    known.insert("model".to_owned(), vec![toml::Value::Table(model)].into());
    if let Some(unknown) = unknown_key(tree.get_ref(), &known, "") {
        let remedy = match nearest(&unknown, &known) {
            Some(key) => format!("did you mean {key}?"),
            None => "take it away; conf/proxy.toml lists every key".to_owned(),
        };
        return Err(ConfigError::new(place(unknown.at), format!("{:?} is no key here", unknown.path), remedy));
    }
    let mut config: Config = toml::from_str(text).map_err(|e| {
        let at = e.span().map_or(0, |span| span.start);
        let key = e.span().and_then(|span| key_at(tree.get_ref(), &span, ""));
        let mut error = Bad::from(one_line(e.message())).at(&place(at));
        if let Some(key) = key {
            error.problem = format!("{key}: {}", error.problem);
        }
        error
    })?;
    // A bare name has the parent "", which `join` leaves alone.
    let folder = file.parent().unwrap_or(Path::new(""));
    for path in paths(&mut config) {
        if !path.as_os_str().is_empty() {
            *path = folder.join(&*path);
        }
    }
    Ok(config)
}

/// Every path that a file can set.
fn paths(config: &mut Config) -> Vec<&mut PathBuf> {
    let identity = &mut config.identity;
    let mut paths = vec![
        &mut config.state_dir,
        &mut config.operator.credential_file,
        &mut config.policy.dir,
        &mut config.audit.dir,
        &mut config.audit.checkpoint_file,
        &mut config.audit.webhook.secret_file,
        &mut config.audit.webhook.ca_file,
        &mut config.audit.otlp.headers_file,
        &mut config.audit.otlp.ca_file,
        &mut identity.secret_file,
        &mut identity.jwks_file,
        &mut identity.ca_file,
        &mut identity.agents_file,
        &mut config.models.mirror_store,
    ];
    paths.extend(config.backend.iter_mut().flat_map(|backend| [&mut backend.bearer_file, &mut backend.ca_file]));
    for pem in [&mut identity.public_key, &mut identity.private_key] {
        if let Some(Pem::File(path)) = pem {
            paths.push(path);
        }
    }
    paths
}

struct Unknown {
    /// With its section, as in `limits.body_byts`.
    path: String,
    section: String,
    key: String,
    at: usize,
}

/// The first key of the file that the defaults do not have.
fn unknown_key(table: &DeTable<'_>, known: &toml::Table, section: &str) -> Option<Unknown> {
    for (key, value) in table {
        let path = joined(section, key.get_ref());
        let unknown = match (value.get_ref(), known.get(key.get_ref().as_ref())) {
            (_, None) => Some(Unknown {
                path,
                section: section.to_owned(),
                key: key.get_ref().to_string(),
                at: key.span().start,
            }),
            // A table without keys of its own has names of models for keys.
            (DeValue::Table(_), Some(toml::Value::Table(known))) if known.is_empty() => None,
            (DeValue::Table(table), Some(toml::Value::Table(known))) => unknown_key(table, known, &path),
            (DeValue::Array(tables), Some(toml::Value::Array(known))) => {
                let known = known.first().and_then(toml::Value::as_table);
                tables.iter().find_map(|value| match (value.get_ref(), known) {
                    (DeValue::Table(table), Some(known)) => unknown_key(table, known, &path),
                    _ => None,
                })
            }
            _ => None,
        };
        if unknown.is_some() {
            return unknown;
        }
    }
    None
}

/// The key that was probably meant: the most similar of its section, else the same word of another section.
fn nearest(unknown: &Unknown, known: &toml::Table) -> Option<String> {
    let mut keys = Vec::new();
    all_keys(known, "", &mut keys);
    let here = keys.iter().filter(|(section, _)| *section == unknown.section);
    let close = here
        .map(|(section, key)| (distance(key, &unknown.key), joined(section, key)))
        .filter(|(distance, _)| *distance <= 1 + unknown.key.len() / 4)
        .min();
    let elsewhere = || keys.iter().find(|(_, key)| *key == unknown.key).map(|(section, key)| joined(section, key));
    close.map(|(_, path)| path).or_else(elsewhere)
}

fn all_keys(table: &toml::Table, section: &str, keys: &mut Vec<(String, String)>) {
    for (key, value) in table {
        keys.push((section.to_owned(), key.clone()));
        let below = match value {
            toml::Value::Table(below) => Some(below),
            toml::Value::Array(tables) => tables.first().and_then(toml::Value::as_table),
            _ => None,
        };
        if let Some(below) = below {
            all_keys(below, &joined(section, key), keys);
        }
    }
}

/// The key whose value lies at `span`.
fn key_at(table: &DeTable<'_>, span: &Range<usize>, section: &str) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        let path = joined(section, key.get_ref());
        let below = match value.get_ref() {
            DeValue::Table(table) => key_at(table, span, &path),
            DeValue::Array(values) => values.iter().find_map(|value| match value.get_ref() {
                DeValue::Table(table) => key_at(table, span, &path),
                _ => None,
            }),
            _ => None,
        };
        let here = value.span().start <= span.start && span.end <= value.span().end;
        below.or_else(|| here.then_some(path))
    })
}

fn joined(section: &str, key: &str) -> String {
    if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") }
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|b| *b == b'\n').count()
}

fn one_line(message: &str) -> String {
    message.replace(['\n', '\r'], " ").trim().to_owned()
}

/// Levenshtein's distance. Keys are short; a long one is far from all of them.
fn distance(a: &str, b: &str) -> usize {
    if a.len().max(b.len()) > 64 {
        return usize::MAX;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let cost = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
