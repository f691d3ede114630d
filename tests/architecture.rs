//! Holds what ARCHITECTURE.md says about the source: which module may name which, and what is deliberately absent.
//!
//! It reads the text of `src/`, without comments and without the tests at the end of a file. Each rule is a function from a
//! [`Source`] to its violations, so that the last test here can show that each rule finds what it is for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Each module below `src/`, and the modules that it may name, from the bottom up: a module may name only what stands above it
/// here, so that dependencies run one way.
#[rustfmt::skip]
const MAY_NAME: &[(&str, &[&str])] = &[
    ("wire", &[]),
    ("simulator", &[]),
    ("config", &[]),
    ("identity", &["wire"]),
    ("models", &["config", "wire"]),
    ("outbound", &["config"]),
    ("control_plane", &["config", "identity", "outbound"]),
    ("refusal", &["wire"]),
    ("control", &["identity"]),
    ("ledger", &["identity", "wire"]),
    ("policy", &["identity", "wire"]),
    ("route", &["refusal", "wire"]),
    ("memory", &[]),
    ("intake", &["memory", "refusal"]),
    ("live", &["identity", "ledger", "refusal"]),
    ("snapshot", &["identity", "policy"]),
    ("remote_keys", &["config", "identity", "ledger", "outbound", "snapshot"]),
    ("sinks", &["config", "identity", "ledger", "outbound"]),
    ("mirror", &["config", "ledger", "outbound", "wire"]),
    ("upstream", &["config", "ledger", "mirror", "models", "policy", "wire"]),
    ("exchange", &["identity", "ledger", "live", "memory", "policy", "refusal", "route", "snapshot", "upstream", "wire"]),
    ("site", &[
        "control_plane", "identity", "intake", "ledger", "live", "memory", "mirror", "models", "remote_keys", "route", "snapshot",
        "upstream", "wire",
    ]),
    ("door", &["exchange", "live", "memory", "refusal", "site", "wire"]),
    ("operator", &["ledger", "site", "upstream"]),
    ("proxy", &[
        "control_plane", "door", "exchange", "identity", "intake", "ledger", "live", "mirror", "policy", "refusal", "route", "site",
        "upstream", "wire",
    ]),
    ("server", &[
        "config", "control", "control_plane", "door", "identity", "intake", "ledger", "live", "memory", "mirror", "models", "operator",
        "outbound", "policy", "proxy", "refusal", "remote_keys", "route", "sinks", "site", "snapshot", "upstream", "wire",
    ]),
    ("cli", &["config", "control", "identity", "ledger", "policy", "route", "server", "simulator", "wire"]),
    ("lib", &[]),
    ("main", &["cli"]),
];

/// The only modules that know Pingora; the rest survives its next version.
const PINGORA: [&str; 6] = ["server", "door", "proxy", "intake", "upstream", "operator"];

/// Bytes or facts in, facts out: no socket, no runtime.
const PURE: [&str; 7] = ["identity", "wire", "policy", "refusal", "route", "config", "models"];

/// Pure, and without a clock or a lock as well: events and `now` in, decisions out (`docs/adr/0050-scheduling.md`).
const TIMELESS: &str = "upstream/scheduler";

/// A file of `src/`.
struct Source {
    /// As in `door/link.rs`.
    path: String,
    /// Without comments and tests.
    code: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Source {
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        let code = text.lines().map(without_comment).collect::<Vec<_>>().join("\n");
        Source { path: path.to_owned(), code }
    }

    /// The module below `src/` that the file belongs to.
    fn module(&self) -> &str {
        self.path.split('/').next().unwrap_or_default().trim_end_matches(".rs")
    }

    fn says(&self, what: &str) -> bool {
        self.code.contains(what)
    }

    /// The modules that the file names, as `crate::module`, in braces too.
    fn names(&self) -> BTreeSet<&str> {
        let mut named = BTreeSet::new();
        for root in ["crate::", "behavry_ollama_proxy::"] {
            for (at, _) in self.code.match_indices(root) {
                let rest = &self.code[at + root.len()..];
                match rest.strip_prefix('{') {
                    None => _ = named.insert(word(rest)),
                    Some(list) => {
                        let mut depth = 0;
                        let mut item = 0;
                        for (i, byte) in list.bytes().enumerate() {
                            match byte {
                                b'{' => depth += 1,
                                b'}' | b',' if depth == 0 => {
                                    named.insert(word(list[item..i].trim()));
                                    item = i + 1;
                                    if byte == b'}' {
                                        break;
                                    }
                                }
                                b'}' => depth -= 1,
                                _ => {}
                            }
                        }
                    }
                }
            }
        }
        named.remove("");
        named
    }
}

fn word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// `//` inside a string ends nothing; a string here never holds `//` and a quote after it.
fn without_comment(line: &str) -> &str {
    let mut from = 0;
    while let Some(at) = line[from..].find("//") {
        let at = from + at;
        if line[..at].matches('"').count().is_multiple_of(2) {
            return &line[..at];
        }
        from = at + 2;
    }
    line
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("src can be read") {
            let path = entry.expect("src can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                let name = path.strip_prefix(&root).expect("below src").to_string_lossy().replace('\\', "/");
                // `foo/tests.rs` is the tests of `foo`.
                if !name.ends_with("/tests.rs") {
                    found.push(Source::new(&name, &fs::read_to_string(&path).expect("src can be read")));
                }
            }
        }
    }
    assert!(found.len() > 50, "the sources are where they were");
    found
}

type Rule = fn(&Source) -> Vec<String>;

#[track_caller]
fn hold(rule: Rule) {
    let broken: Vec<String> = sources().iter().flat_map(rule).collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

fn broken(source: &Source, what: impl std::fmt::Display) -> String {
    format!("src/{}: {what}", source.path)
}

// ---- the rules

fn names_only_what_it_may(source: &Source) -> Vec<String> {
    let module = source.module();
    let Some((_, allowed)) = MAY_NAME.iter().find(|(name, _)| *name == module) else {
        return vec![broken(source, "a module that MAY_NAME does not know; say there what it may name")];
    };
    let strangers = source.names().into_iter().filter(|named| *named != module && !allowed.contains(named));
    strangers.map(|named| broken(source, format!("names {named}, which is not below {module}"))).collect()
}

fn stays_in_its_module(source: &Source) -> Vec<String> {
    // Otherwise a module could be reached without its name.
    let depth = source.path.matches('/').count();
    let climbs = "super::".repeat(depth + 1);
    if source.module() != "lib" && source.says(&climbs) {
        return vec![broken(source, format!("{climbs} leads out of the module; write crate::"))];
    }
    Vec::new()
}

fn knows_pingora_only_where_it_must(source: &Source) -> Vec<String> {
    let names_it = source.code.match_indices("pingora").any(|(at, _)| {
        let rest = &source.code[at..];
        let before = source.code[..at].chars().next_back();
        before != Some('"') && rest[word(rest).len()..].starts_with("::")
    });
    if names_it && !PINGORA.contains(&source.module()) {
        return vec![broken(source, "names Pingora")];
    }
    Vec::new()
}

fn does_no_input_or_output_where_it_is_pure(source: &Source) -> Vec<String> {
    let doors = ["tokio::", "std::net::Tcp", "std::net::Udp", "std::os::unix::net", "std::process::"];
    let used = doors.iter().filter(|door| PURE.contains(&source.module()) && source.says(door));
    used.map(|door| broken(source, format!("{door} in a pure module"))).collect()
}

fn keeps_no_time_where_it_is_given(source: &Source) -> Vec<String> {
    let doors = ["Instant::now", "SystemTime", ".elapsed()", "tokio::", "Mutex", "std::net", "crate::"];
    let used = doors.iter().filter(|door| source.path.starts_with(TIMELESS) && source.says(door));
    used.map(|door| broken(source, format!("{door} in the scheduler"))).collect()
}

fn reads_the_environment_only_in_config(source: &Source) -> Vec<String> {
    let ways = ["std::env", "env::var", "env::args", "env::temp_dir", "env::current_dir", "env::home_dir"];
    let ways = ways.iter().filter(|way| source.module() != "config" && source.says(way)).map(|way| (*way).to_owned());
    // env_logger reads RUST_LOG by itself, and clap would read variables for `#[arg(env)]`.
    let logger = (source.module() != "cli" && source.says("parse_default_env")).then(|| "parse_default_env".to_owned());
    let clap = source.code.lines().any(|line| line.trim_start().starts_with("#[arg(") && line.contains("env"));
    let clap = clap.then(|| "#[arg(env)]".to_owned());
    ways.chain(logger)
        .chain(clap)
        .map(|way| broken(source, format!("{way}: only config reads the environment")))
        .collect()
}

fn names_metrics_only_in_metrics(source: &Source) -> Vec<String> {
    if source.path.starts_with("ledger/metrics") {
        return Vec::new();
    }
    let prefix = source
        .code
        .match_indices("behavry_ollama_")
        .any(|(at, _)| !source.code[at..].starts_with("behavry_ollama_proxy"));
    let library = source.says("prometheus::");
    let found = [(prefix, "a metric's name"), (library, "prometheus")].into_iter().filter(|(found, _)| *found);
    found.map(|(_, what)| broken(source, format!("{what} outside ledger::metrics"))).collect()
}

fn makes_permits_only_in_policy(source: &Source) -> Vec<String> {
    let text = &source.code;
    let made = ["Permit {", "Receipt {"].into_iter().filter(|made| {
        text.match_indices(made).any(|(at, _)| {
            let before = text[..at].trim_end();
            let word_goes_on = text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            !word_goes_on
                && !["->", "-> &", "&", "struct", "impl", "for"].iter().any(|keyword| before.ends_with(keyword))
        })
    });
    let homes = |made: &str| if made.starts_with("Permit") { "policy" } else { "ledger" };
    made.filter(|made| source.module() != homes(made))
        .map(|made| broken(source, format!("`{made} ..}}`: only {} makes one", homes(made))))
        .collect()
}

fn silences_no_lint(source: &Source) -> Vec<String> {
    let silenced = source.says("#[allow") || source.says("#![allow");
    if silenced { vec![broken(source, "#[allow]: write #[expect(.., reason = ..)]")] } else { Vec::new() }
}

// ---- held

#[test]
fn each_module_names_only_what_lies_below_it() {
    hold(names_only_what_it_may);
    hold(stays_in_its_module);
}

#[test]
fn the_list_of_what_may_be_named_runs_one_way() {
    let place: BTreeMap<&str, usize> = MAY_NAME.iter().enumerate().map(|(i, (name, _))| (*name, i)).collect();
    for (module, named) in MAY_NAME {
        for below in *named {
            assert!(place.contains_key(below), "{below} is no module");
            assert!(place[below] < place[module], "{module} may not name {below}, which does not stand above it");
        }
    }
}

#[test]
fn nothing_is_permitted_that_nobody_does() {
    let mut named: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources() {
        named.entry(source.module().to_owned()).or_default().extend(source.names().into_iter().map(str::to_owned));
    }
    for (module, allowed) in MAY_NAME {
        assert!(named.contains_key(*module), "MAY_NAME lists {module}, which is gone");
        let idle: Vec<_> = allowed.iter().filter(|below| !named[*module].contains(**below)).collect();
        assert!(idle.is_empty(), "MAY_NAME lets {module} name {idle:?}, and it does not: take them out");
    }
}

#[test]
fn pingora_is_known_to_six_modules_and_no_other() {
    hold(knows_pingora_only_where_it_must);
}

#[test]
fn the_pure_modules_open_no_socket_and_need_no_runtime() {
    hold(does_no_input_or_output_where_it_is_pure);
    hold(keeps_no_time_where_it_is_given);
}

#[test]
fn only_config_reads_the_environment() {
    hold(reads_the_environment_only_in_config);
}

#[test]
fn only_ledger_metrics_names_a_metric() {
    hold(names_metrics_only_in_metrics);
}

#[test]
fn only_policy_makes_a_permit_and_only_the_ledger_a_receipt() {
    hold(makes_permits_only_in_policy);
    // What the compiler then holds: no field is public, and nothing derives a second way to get one.
    for (path, head) in [("policy.rs", "pub struct Permit {"), ("ledger/audit.rs", "pub struct Receipt {")] {
        let sources = sources();
        let source = sources.iter().find(|source| source.path == path).expect("its home");
        let at = source.code.find(head).unwrap_or_else(|| panic!("{head} in {path}"));
        let fields = source.code[at + head.len()..].split('}').next().unwrap_or_default();
        assert!(!fields.contains("pub"), "{path}: a public field lets others make or change one");
        let attributes = &source.code[..at];
        let attributes = attributes.rsplit("\n\n").next().unwrap_or_default();
        assert!(
            !["Clone", "Default", "Deserialize"].iter().any(|way| attributes.contains(way)),
            "{path}: {attributes}"
        );
    }
}

#[test]
fn what_holds_a_prompt_or_a_reply_cannot_be_printed() {
    let sources = sources();
    for (path, name) in [
        ("exchange.rs", "pub struct Exchange"),
        ("wire/mend.rs", "pub struct Mender"),
        ("wire/convert.rs", "pub struct Reply"),
        ("wire/convert/request.rs", "pub struct Converted"),
        ("wire/convert/events.rs", "pub struct Events"),
        ("wire/whole.rs", "pub struct Whole"),
        ("door/link.rs", "pub struct Link"),
        ("door/link.rs", "pub struct Ticket"),
        ("door/downstream.rs", "pub struct Downstream"),
        ("door/downstream.rs", "struct Piece"),
        ("door/outgoing.rs", "pub struct Outgoing"),
        ("control_plane.rs", "pub struct Answer"),
        ("outbound.rs", "pub struct Reply"),
        ("proxy/tokens.rs", "struct TokenAnswer"),
        ("upstream/client.rs", "pub struct Reply"),
    ] {
        let source = sources.iter().find(|source| source.path == path).unwrap_or_else(|| panic!("{path} is gone"));
        let at = source.code.find(name).unwrap_or_else(|| panic!("{name} is gone from {path}"));
        let derives = source.code[..at].trim_end().rsplit('\n').next().unwrap_or_default();
        assert!(!derives.contains("derive"), "{path}: {name} has {derives}");
        let own = name.rsplit(' ').next().unwrap_or_default();
        for way in ["Debug", "Display", "Serialize"] {
            assert!(!source.says(&format!("{way} for {own}")), "{path}: {name} has {way}");
        }
    }
}

#[test]
fn lints_are_expected_and_never_silenced() {
    hold(silences_no_lint);
}

#[test]
fn no_module_hides_in_a_file_called_mod() {
    let hidden: Vec<_> =
        sources().into_iter().map(|source| source.path).filter(|path| path.ends_with("mod.rs")).collect();
    assert!(hidden.is_empty(), "{hidden:?}");
}

// ---- able to fail

#[test]
fn every_rule_finds_what_it_is_for() {
    let finds = |rule: Rule, path: &str, text: &str| !rule(&Source::new(path, text)).is_empty();

    assert!(finds(names_only_what_it_may, "wire/list.rs", "use crate::policy::Permit;"));
    assert!(finds(
        names_only_what_it_may,
        "wire.rs",
        "use crate::{\n    wire::model::{parse, ModelRef},\n    door,\n};"
    ));
    assert!(finds(names_only_what_it_may, "simulator.rs", "let c = behavry_ollama_proxy::config::Config::default();"));
    assert!(finds(names_only_what_it_may, "novelty.rs", ""));
    assert!(!finds(names_only_what_it_may, "wire.rs", "// crate::policy\nuse crate::wire::model;"));
    assert!(!finds(names_only_what_it_may, "wire.rs", "#[cfg(test)]\nmod tests { use crate::door; }"));
    assert!(finds(stays_in_its_module, "wire/meter.rs", "use super::super::policy;"));
    assert!(!finds(stays_in_its_module, "wire/meter/tokens.rs", "use super::super::native;"));

    assert!(finds(knows_pingora_only_where_it_must, "ledger.rs", "use pingora_core::Error;"));
    assert!(finds(knows_pingora_only_where_it_must, "cli.rs", "use pingora::server::Server;"));
    assert!(!finds(knows_pingora_only_where_it_must, "cli.rs", r#"for module in ["pingora", "pingora_core"] {}"#));
    assert!(!finds(knows_pingora_only_where_it_must, "door/head.rs", "use pingora::time::timeout;"));

    assert!(finds(does_no_input_or_output_where_it_is_pure, "wire.rs", "use tokio::io::AsyncRead;"));
    assert!(finds(does_no_input_or_output_where_it_is_pure, "policy.rs", "use std::net::TcpStream;"));
    assert!(!finds(does_no_input_or_output_where_it_is_pure, "policy.rs", "use std::net::IpAddr;"));

    assert!(finds(keeps_no_time_where_it_is_given, "upstream/scheduler/rates.rs", "let now = Instant::now();"));
    assert!(!finds(keeps_no_time_where_it_is_given, "upstream.rs", "let now = Instant::now();"));

    assert!(finds(reads_the_environment_only_in_config, "server.rs", r#"std::env::var("HOME")"#));
    assert!(finds(reads_the_environment_only_in_config, "cli.rs", r#"    #[arg(long, env = "X")]"#));
    assert!(!finds(reads_the_environment_only_in_config, "config.rs", r#"std::env::var_os("HOME")"#));
    assert!(!finds(reads_the_environment_only_in_config, "server.rs", r#"env!("CARGO_PKG_VERSION")"#));

    assert!(finds(names_metrics_only_in_metrics, "proxy.rs", r#""behavry_ollama_requests_total""#));
    assert!(!finds(names_metrics_only_in_metrics, "main.rs", "behavry_ollama_proxy::cli::run()"));

    assert!(finds(makes_permits_only_in_policy, "proxy.rs", "let permit = Permit { model: None };"));
    assert!(finds(makes_permits_only_in_policy, "policy.rs", "let receipt = Receipt { line };"));
    assert!(!finds(makes_permits_only_in_policy, "proxy.rs", "fn permit(&self) -> &Permit {}\nListPermit { permit }"));

    assert!(finds(silences_no_lint, "door.rs", "#[allow(dead_code)]"));
}
