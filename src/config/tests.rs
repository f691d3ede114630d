//! The environment is a closure and the files are in a folder of the test, so these tests see nothing of the machine.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::*;

const SHIPPED: &str = include_str!("../../conf/proxy.toml");

/// A folder that is removed with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("behavry-config-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Loads with these variables. `CONFIGURATION_DIRECTORY` points to nothing unless it is given.
fn load_with(flags: &Flags, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let mut env: HashMap<&str, &str> = [("CONFIGURATION_DIRECTORY", "/nonexistent"), ("HOME", "/home/u")].into();
    env.extend(variables.iter().copied());
    Config::load(flags, &|name| env.get(name).map(|v| v.to_string()))
}

fn env(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    load_with(&Flags::default(), variables)
}

fn text(file: &str) -> Result<Config, ConfigError> {
    file::read(file, Path::new("/conf/proxy.toml"))
}

fn error(file: &str) -> String {
    match text(file) {
        Ok(_) => panic!("this must not be taken: {file}"),
        Err(e) => e.to_string(),
    }
}

fn refused(variables: &[(&str, &str)]) -> String {
    match env(variables) {
        Ok(_) => panic!("these must not be taken: {variables:?}"),
        Err(e) => e.to_string(),
    }
}

fn keys_and_values(config: &Config) -> toml::Table {
    toml::Table::try_from(config).unwrap()
}

/// The shipped file with the markers of its commented values taken away.
fn shipped_with_values() -> String {
    let mut lines = Vec::new();
    for line in SHIPPED.lines() {
        lines.push(
            line.strip_prefix('#')
                .filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '['))
                .unwrap_or(line),
        );
    }
    lines.join("\n")
}

#[test]
fn the_shipped_file_lists_every_key_with_its_default() {
    // Compared as raw TOML, so that a key which the file lacks cannot be filled in from the defaults.
    let shipped: toml::Table = toml::from_str(&shipped_with_values()).unwrap();
    assert_eq!(shipped, keys_and_values(&Config::defaults()));
    // And the same through the reader, with the values and as it is shipped.
    assert_eq!(keys_and_values(&text(&shipped_with_values()).unwrap()), shipped);
    assert_eq!(keys_and_values(&text(SHIPPED).unwrap()), shipped);
}

#[test]
fn every_variable_is_named_in_the_shipped_file() {
    for (variable, _) in VARIABLES {
        assert!(SHIPPED.contains(variable), "{variable}");
    }
}

#[test]
fn the_names_of_the_contract_are_the_defaults() {
    let config = env(&[]).unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:8000");
    assert_eq!(config.operator.listen.to_string(), "127.0.0.1:5173");
    assert_eq!(config.backend[0].url.to_string(), "http://localhost:11434");
    assert_eq!(config.backend[0].name, "ollama");
    assert_eq!(config.backend_timeouts.silence, Duration::from_secs(300));
    assert_eq!(config.limits.body_bytes, 64 << 20);
    assert_eq!(config.identity.issuer, "behavry");
    assert_eq!(config.state_dir, Path::new("/home/u/.local/state/behavry-ollama-proxy"));
    assert_eq!(config.audit.dir, config.state_dir.join("audit"));
    assert_eq!(config.identity.agents_file, config.state_dir.join("agents.toml"));
    assert_eq!(config.identity.revocations_file, config.state_dir.join("revoked.toml"));
    assert_eq!(config.policy.dir, Path::new(""), "the policy built in");
    assert!(
        config.routes.drop_in && config.audit.stdout && config.streaming.include_usage && !config.egress.cloud_models
    );
    assert!(config.warnings().is_empty(), "{:?}", config.warnings());
}

#[test]
fn the_file_wins_over_defaults_the_environment_over_the_file_and_flags_over_all() {
    let folder = Folder::new();
    let file = folder.write(
        "p.toml",
        "listen = \"127.0.0.1:1\"\n[operator]\nlisten = \"127.0.0.1:11\"\n[limits]\nin_flight = 7\n[audit]\ndir = \"/file\"\n",
    );
    let variables = [
        ("BEHAVRY_CONFIG", file.to_str().unwrap()),
        ("BEHAVRY_LISTEN", "127.0.0.1:2"),
        ("BEHAVRY_OPERATOR_LISTEN", "127.0.0.1:12"),
    ];
    let flags = Flags { listen: Some("127.0.0.1:3".into()), ..Flags::default() };
    let config = load_with(&flags, &variables).unwrap();
    assert_eq!(config.listen.port(), 3);
    assert_eq!(config.operator.listen.port(), 12);
    assert_eq!(config.limits.in_flight, 7);
    assert_eq!(config.audit.dir, Path::new("/file"));
    assert_eq!(config.limits.head_bytes, 32 << 10);

    let other = folder.write("q.toml", "listen = \"127.0.0.1:4\"\n");
    let flags = Flags { config: Some(other), ..Flags::default() };
    assert_eq!(load_with(&flags, &variables[..1]).unwrap().listen.port(), 4);
}

#[test]
fn every_flag_and_variable_reaches_its_field() {
    let pem = "-----BEGIN PUBLIC KEY-----\\nAA\\n-----END PUBLIC KEY-----";
    let config = env(&[
        ("BEHAVRY_STATE_DIR", "/s"),
        ("BEHAVRY_POLICY_DIR", "/p"),
        ("BEHAVRY_AUDIT_DIR", "/a"),
        ("BEHAVRY_AGENTS_FILE", "/g"),
        ("BEHAVRY_OLLAMA_URL", "https://gpu:8443/"),
        ("BEHAVRY_OLLAMA_API_KEY", "sk-1"),
        ("BEHAVRY_JWT_PUBLIC_KEY", pem),
        ("BEHAVRY_JWT_PRIVATE_KEY", pem),
        ("BEHAVRY_JWT_ALGORITHM", "ES256"),
        ("BEHAVRY_JWT_ISSUER", "me"),
    ])
    .unwrap();
    assert_eq!(config.state_dir, Path::new("/s"));
    assert_eq!(config.policy.dir, Path::new("/p"));
    assert_eq!(config.audit.dir, Path::new("/a"));
    assert_eq!(config.identity.agents_file, Path::new("/g"));
    assert_eq!(config.backend[0].url.to_string(), "https://gpu:8443");
    assert!(config.backend[0].authorization().is_some_and(|a| a.expose() == "Bearer sk-1"));
    assert!(matches!(&config.identity.public_key, Some(Pem::Text(t)) if t.expose().lines().count() == 3));
    assert!(config.identity.private_key.is_some());
    assert_eq!(config.identity.algorithm, Some(Algorithm::Es256));
    assert_eq!(config.identity.issuer, "me");

    let flags = Flags {
        config: None,
        listen: Some("[::1]:0".into()),
        operator_listen: Some("127.0.0.1:0".into()),
        backend: Some("http://f:1".into()),
        state_dir: Some("/fs".into()),
        policy_dir: Some("/fp".into()),
        audit_dir: Some("/fa".into()),
        agents_file: Some("/fg".into()),
    };
    let config = load_with(&flags, &[("BEHAVRY_STATE_DIR", "/s")]).unwrap();
    assert_eq!((config.listen.to_string(), config.operator.listen.port()), ("[::1]:0".to_owned(), 0));
    assert_eq!(config.backend[0].url.to_string(), "http://f:1");
    let dirs = [&config.state_dir, &config.policy.dir, &config.audit.dir, &config.identity.agents_file];
    assert_eq!(dirs, ["/fs", "/fp", "/fa", "/fg"].map(PathBuf::from).each_ref());
}

#[test]
fn the_key_of_a_protected_backend_goes_with_the_url_of_the_file_too() {
    let folder = Folder::new();
    let file = folder.write("proxy.toml", "[[backend]]\nurl = \"http://gpu:1\"\nname = \"big\"\nbearer = \"old\"\n");
    let config = env(&[("BEHAVRY_CONFIG", file.to_str().unwrap()), ("BEHAVRY_OLLAMA_API_KEY", "sk-new")]).unwrap();
    assert_eq!(config.backend[0].name, "big");
    assert!(config.backend[0].authorization().is_some_and(|a| a.expose() == "Bearer sk-new"));
}

#[test]
fn folders_come_from_systemd_then_xdg_then_home() {
    let state = |variables: &[(&str, &str)]| env(variables).unwrap().state_dir;
    let systemd = ("STATE_DIRECTORY", "/var/lib/a:/var/lib/b");
    let xdg = ("XDG_STATE_HOME", "/x");
    assert_eq!(state(&[systemd, xdg]), Path::new("/var/lib/a"));
    assert_eq!(state(&[xdg]), Path::new("/x/behavry-ollama-proxy"));
    assert_eq!(state(&[("XDG_STATE_HOME", "")]), Path::new("/home/u/.local/state/behavry-ollama-proxy"));
    assert_eq!(state(&[("XDG_STATE_HOME", "relative")]), Path::new("/home/u/.local/state/behavry-ollama-proxy"));
    assert!(refused(&[("HOME", "")]).contains("set BEHAVRY_STATE_DIR"));
}

#[test]
fn the_configuration_folder_brings_its_file_and_its_policies() {
    let folder = Folder::new();
    folder.write("proxy.toml", "threads = 3\n");
    let dir = folder.0.to_str().unwrap();
    assert_eq!(env(&[("CONFIGURATION_DIRECTORY", dir)]).unwrap().threads, 3);
    assert_eq!(env(&[("CONFIGURATION_DIRECTORY", dir)]).unwrap().policy.dir, Path::new(""));
    std::fs::create_dir(folder.0.join("policies")).unwrap();
    assert_eq!(env(&[("CONFIGURATION_DIRECTORY", dir)]).unwrap().policy.dir, folder.0.join("policies"));
}

#[test]
fn a_file_that_was_named_and_is_not_there_stops_the_start() {
    let e = refused(&[("BEHAVRY_CONFIG", "/nonexistent/p.toml")]);
    assert!(e.starts_with("/nonexistent/p.toml: cannot be read"), "{e}");
}

#[test]
fn a_variable_that_is_set_but_empty_stops_the_start() {
    let names = VARIABLES.iter().map(|(name, _)| *name);
    for name in names.chain(["BEHAVRY_CONFIG", "STATE_DIRECTORY", "CONFIGURATION_DIRECTORY"]) {
        for empty in ["", "  "] {
            assert_eq!(refused(&[(name, empty)]), format!("{name}: is set but empty; give it a value or unset it"));
        }
    }
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_the_nearest_one() {
    for (file, expected) in [
        ("lisen = \"x\"", "line 1: \"lisen\" is no key here; did you mean listen?"),
        ("\n[limits]\n\nbody_byte = 1", "line 4: \"limits.body_byte\" is no key here; did you mean limits.body_bytes?"),
        ("[limit]\nbody_bytes = 1", "line 1: \"limit\" is no key here; did you mean limits?"),
        ("body_bytes = 1", "line 1: \"body_bytes\" is no key here; did you mean limits.body_bytes?"),
        (
            "[[backend]]\nurl = \"http://a\"\nbaerer = \"x\"",
            "line 3: \"backend.baerer\" is no key here; did you mean backend.bearer?",
        ),
        ("zzzzzzzz = 1", "line 1: \"zzzzzzzz\" is no key here; take it away; conf/proxy.toml lists every key"),
        (
            "\"a\\u001b[31m\" = 1",
            "line 1: \"a\\u{1b}[31m\" is no key here; take it away; conf/proxy.toml lists every key",
        ),
    ] {
        assert_eq!(error(file), format!("/conf/proxy.toml {expected}"));
    }
}

#[test]
fn a_wrong_value_is_refused_with_its_line_its_key_and_what_to_write() {
    for (file, expected) in [
        (
            "listen = \"8000\"",
            "line 1: listen: \"8000\" is no address and port; write one like 127.0.0.1:8000 or [::1]:8000",
        ),
        ("listen = 8000", "line 1: listen: found 8000; write a text in quotes"),
        ("threads = -1", "line 1: threads: found -1; write a whole number from 0 to 1024"),
        (
            "\n\n[limits]\nhead_bytes = 10",
            "line 4: limits.head_bytes: found 10; write a whole number from 1024 to 1048576",
        ),
        (
            "[limits]\nbody_bytes = \"64MiB\"",
            "line 2: limits.body_bytes: found \"64MiB\"; write a whole number from 1 to 4294967296",
        ),
        ("[shutdown]\ndrain_s = 1.5", "line 2: shutdown.drain_s: found 1.5; write a whole number from 0 to 86400"),
        (
            "[identity]\nalgorithm = \"none\"",
            "line 2: identity.algorithm: \"none\" is no algorithm; write RS256, ES256, EdDSA or HS256",
        ),
        ("[identity]\nissuer = \"\"", "line 2: identity.issuer: \"\" is no name; write 1 to 255 visible characters"),
        (
            "[[backend]]\nurl = \"http://a\"\n[[backend]]\nurl = \"ftp://a\"",
            "line 4: backend.url: the URL does not begin with http:// or https://; write it as http://host:11434",
        ),
        (
            "[audit.syslog]\naddress = \"/dev/log\"",
            "line 2: audit.syslog.address: this is no address of a syslog; write unix:///dev/log, udp://host:514 or tcp://host:601",
        ),
        (
            "[[backend]]\nurl = \"http://a\"\nname = \"a b\"",
            "line 3: backend.name: \"a b\" cannot stand in a header; write up to 64 letters, digits and ._-",
        ),
    ] {
        assert_eq!(error(file), format!("/conf/proxy.toml {expected}"));
    }
    // Words of the parser's own: the place and the key are what counts.
    for (file, start) in [
        ("[routes]\ndrop_in = 1", "/conf/proxy.toml line 2: routes.drop_in: "),
        ("[policy]\nbuiltin_errors = \"lax\"", "/conf/proxy.toml line 2: policy.builtin_errors: "),
        ("a = 1\na = 2", "/conf/proxy.toml line 2: this is not TOML ("),
        ("\n\nlisten = ", "/conf/proxy.toml line 3: this is not TOML ("),
        ("[[backend]]\nname = \"a\"", "/conf/proxy.toml line 1: "),
        ("limits = 3", "/conf/proxy.toml line 1: limits: "),
    ] {
        let e = error(file);
        assert!(e.starts_with(start) && !e.contains('\n'), "{e}");
    }
}

#[test]
fn a_wrong_variable_or_flag_is_named() {
    assert_eq!(
        refused(&[("BEHAVRY_LISTEN", "here\u{1b}")]),
        "BEHAVRY_LISTEN: \"here\\u{1b}\" is no address and port; write one like 127.0.0.1:8000 or [::1]:8000"
    );
    assert!(refused(&[("BEHAVRY_JWT_PUBLIC_KEY", "/etc/key.pem")]).contains("identity.public_key_file"));
    assert!(refused(&[("BEHAVRY_JWT_ALGORITHM", "rs256")]).starts_with("BEHAVRY_JWT_ALGORITHM: "));
    let flags = Flags { backend: Some("gpu".into()), ..Flags::default() };
    assert!(load_with(&flags, &[]).is_err_and(|e| e.place == "--backend"));
}

#[test]
fn a_url_is_scheme_host_and_port() {
    for (url, shown, authority, host, port) in [
        ("http://localhost:11434", "http://localhost:11434", "localhost:11434", "localhost", 11434),
        ("HTTP://GPU-1.internal:8080/", "http://gpu-1.internal:8080", "gpu-1.internal:8080", "gpu-1.internal", 8080),
        ("http://host", "http://host", "host", "host", 80),
        ("https://ollama.example.com", "https://ollama.example.com", "ollama.example.com", "ollama.example.com", 443),
        ("https://host:80", "https://host:80", "host:80", "host", 80),
        ("http://[::1]:11434", "http://[::1]:11434", "[::1]:11434", "::1", 11434),
        ("http://my_service:1", "http://my_service:1", "my_service:1", "my_service", 1),
    ] {
        let parsed = BackendUrl::parse(url).unwrap_or_else(|e| panic!("{url}: {e}"));
        assert_eq!(
            (parsed.to_string().as_str(), parsed.authority().as_str(), parsed.host(), parsed.port()),
            (shown, authority, host, port)
        );
    }
    for bad in [
        "",
        "localhost:11434",
        "ftp://a",
        "http://",
        "https://:443",
        "http://a/v1",
        "http://a//",
        "http://a?x",
        "http://a#x",
        "http://a:0",
        "http://a:65536",
        "http://a:",
        "http://a:1:2",
        "http://a:+1",
        "http://[::1",
        "http://[x]:1",
        "http://[]:1",
        "http://a b",
        "http://é",
        "http://a\n",
        "http://.a",
        "http://-a",
        "http://u:p@",
        "http://%zz@a",
        "unix:///run/x",
    ] {
        assert!(BackendUrl::parse(bad).is_err(), "{bad:?}");
    }
    assert!(BackendUrl::parse("http://[::1]:1").is_ok_and(|u| u.is_loopback() && !u.is_tls()));
    assert!(BackendUrl::parse("https://10.0.0.1").is_ok_and(|u| !u.is_loopback() && u.is_tls()));
}

#[test]
fn a_user_in_the_url_becomes_basic_credentials() {
    let config = env(&[("BEHAVRY_OLLAMA_URL", "http://al%40x:p%3Aw@gpu:1")]).unwrap();
    // echo -n 'al@x:p:w' | base64
    assert!(config.backend[0].authorization().is_some_and(|a| a.expose() == "Basic YWxAeDpwOnc="));
    assert_eq!(config.warnings().len(), 1, "a credential in the clear is worth a word");
    assert!(!config.warnings()[0].contains("al@x"), "{:?}", config.warnings());
    let both = refused(&[("BEHAVRY_OLLAMA_URL", "http://u:p@gpu"), ("BEHAVRY_OLLAMA_API_KEY", "k")]);
    assert!(both.contains("one Authorization header"), "{both}");
}

#[test]
fn several_backends_are_urls_with_commas_or_tables() {
    let config = env(&[("BEHAVRY_OLLAMA_URL", "http://a:1, https://b:2")]).unwrap();
    let names: Vec<&str> = config.backend.iter().map(|backend| backend.name.as_str()).collect();
    assert_eq!(names, ["ollama-1", "ollama-2"]);
    assert_eq!((config.backend[0].url.port(), config.backend[1].url.is_tls()), (1, true));
    assert!(refused(&[("BEHAVRY_OLLAMA_URL", "http://a:1,")]).starts_with("BEHAVRY_OLLAMA_URL: the URL"));
    let many = vec!["http://a"; 257].join(",");
    assert!(refused(&[("BEHAVRY_OLLAMA_URL", &many)]).starts_with("backend: 257 backends are given, and 1 to 256"));

    let tables = "[fleet]\nmanage = \"big\"\n[[backend]]\nurl = \"https://a\"\nname = \"big\"\nweight = 2\nslots = 4\n\
        bearer_file = \"key\"\nca_file = \"ca.pem\"\nmodels = [\"llama3.2\", \"qwen3:*\", \"*\"]\nmodel_slots = { \"llama3.2:1b\" = 8 }\n\
        [[backend]]\nurl = \"http://b\"\ntier = 1\nbearer = \"own\"\n[[backend]]\nurl = \"http://c\"";
    let folder = Folder::new();
    let file = folder.write("proxy.toml", tables);
    let config = env(&[("BEHAVRY_CONFIG", file.to_str().unwrap()), ("BEHAVRY_OLLAMA_API_KEY", "shared")]).unwrap();
    let [big, second, third] = &config.backend[..] else { panic!("three tables") };
    assert_eq!((big.weight, big.tier, big.slots, big.model_slots["llama3.2:1b"]), (2, 0, 4, 8));
    assert_eq!(big.bearer_file, file.with_file_name("key"), "relative to the file");
    assert_eq!(big.ca_file, file.with_file_name("ca.pem"));
    assert_eq!((second.name.as_str(), second.tier, second.weight, second.slots), ("ollama-2", 1, 1, 1));
    let bearers = config.backend.iter().map(|backend| backend.authorization().map(|a| a.expose().to_owned()));
    let wanted = [None, Some("Bearer own".to_owned()), Some("Bearer shared".to_owned())];
    assert_eq!(bearers.collect::<Vec<_>>(), wanted, "each keeps its own credential");
    assert_eq!(third.name, "ollama-3");
}

#[test]
fn backends_at_odds_are_refused_with_their_keys() {
    for (tables, keys) in [
        (
            "[[backend]]\nurl = \"http://a\"\nname = \"x\"\n[[backend]]\nurl = \"http://b\"\nname = \"x\"",
            "backend.name",
        ),
        ("[[backend]]\nurl = \"http://a\"\nname = \"ollama-2\"\n[[backend]]\nurl = \"http://b\"", "backend.name"),
        ("[[backend]]\nurl = \"http://a\"\nca_file = \"ca.pem\"", "backend.ca_file, backend.url"),
        ("[[backend]]\nurl = \"http://a\"\nbearer = \"k\"\nbearer_file = \"k\"", "backend.bearer, backend.bearer_file"),
        ("[[backend]]\nurl = \"http://u:p@a\"\nbearer_file = \"k\"", "backend.bearer_file, backend.url"),
        ("[fleet]\nmanage = \"y\"\n[[backend]]\nurl = \"http://a\"\nname = \"x\"", "fleet.manage"),
    ] {
        let folder = Folder::new();
        let file = folder.write("proxy.toml", tables);
        let e = env(&[("BEHAVRY_CONFIG", file.to_str().unwrap())]).expect_err(tables);
        assert_eq!(e.place, keys, "{e}");
    }
    for (line, words) in [
        ("models = [\"a b\"]", "backend.models: \"a b\" is no model's name"),
        ("models = [\"\"]", "is no model's name"),
        (
            "model_slots = { \"a\" = 0 }",
            "backend.model_slots: \"a\" = 0; write a model's name and a whole number from 1 to 100000",
        ),
        ("slots = 0", "backend.slots: found 0; write a whole number from 1 to 100000"),
        ("weight = 1001", "backend.weight: found 1001"),
    ] {
        let e = error(&format!("[[backend]]\nurl = \"http://a\"\n{line}"));
        assert!(e.contains(words), "{e}");
    }
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let folder = Folder::new();
    for (text, keys) in [
        ("listen = \"127.0.0.1:9\"\n[operator]\nlisten = \"127.0.0.1:9\"", "listen, operator.listen"),
        (
            "[limits]\nbody_bytes = 1000\nbodies_in_memory_bytes = 999",
            "limits.bodies_in_memory_bytes, limits.body_bytes",
        ),
        (
            "[streaming]\nshield_load_s = 300\n[catalogue]\nrefresh_s = 0",
            "streaming.shield_load_s, catalogue.refresh_s",
        ),
        ("[identity]\npublic_key_file = \"a\"\njwks_file = \"b\"", "identity.public_key_file, identity.jwks_file"),
        ("[identity]\njwks_file = \"a\"\njwks_url = \"https://keys.example\"", "identity.jwks_file, identity.jwks_url"),
        ("[identity]\ntoken_url = \"https://plane.example/token\"", "identity.token_url"),
        (
            "[identity]\nsecret_file = \"a\"\nprivate_key_file = \"b\"",
            "identity.secret_file, identity.private_key_file",
        ),
        ("[identity]\nalgorithm = \"HS256\"", "identity.algorithm"),
        ("[identity]\nalgorithm = \"RS256\"\nsecret_file = \"a\"", "identity.algorithm, identity.secret_file"),
        ("backend = []", "backend"),
        ("[models]\nmirror_url = \"http://gateway:5174\"", "models.mirror_listen, models.mirror_url"),
        ("[models]\nmirror_listen = \"0.0.0.0:5174\"", "models.mirror_listen, models.mirror_url"),
        ("[models]\nmirror_listen = \"[::1]:5174\"", "models.mirror_listen, models.mirror_url"),
        ("[audit.otlp]\nurl = \"https://collector.example:4318\"", "audit.otlp.url"),
        ("[audit.webhook]\nurl = \"https://hook.example\"", "audit.webhook.url, audit.webhook.secret_file"),
    ] {
        let file = folder.write("proxy.toml", text);
        let e = env(&[("BEHAVRY_CONFIG", file.to_str().unwrap())]).expect_err(text);
        assert_eq!(e.place, keys, "{e}");
    }
    let any_port = "listen = \"127.0.0.1:0\"\n[operator]\nlisten = \"127.0.0.1:0\"";
    let file = folder.write("proxy.toml", any_port);
    assert!(env(&[("BEHAVRY_CONFIG", file.to_str().unwrap())]).is_ok());
}

#[test]
fn relative_paths_of_a_file_are_relative_to_its_folder() {
    let config = text("[audit]\ndir = \"a\"\n[policy]\ndir = \"/p\"\n[identity]\npublic_key_file = \"k.pem\"").unwrap();
    assert_eq!(config.audit.dir, Path::new("/conf/a"));
    assert_eq!(config.policy.dir, Path::new("/p"));
    assert!(matches!(&config.identity.public_key, Some(Pem::File(p)) if p == Path::new("/conf/k.pem")));
    assert_eq!(config.identity.jwks_file, Path::new(""));
}

#[test]
fn no_secret_is_shown_in_the_settings_or_in_an_error() {
    let secret = "s3cr3t";
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{secret}\n-----END PRIVATE KEY-----");
    for variables in [
        vec![("BEHAVRY_OLLAMA_URL", "http://user:s3cr3t@gpu:1"), ("BEHAVRY_JWT_PRIVATE_KEY", &pem)],
        vec![("BEHAVRY_OLLAMA_URL", "http://s3cr3t@gpu:1")],
        vec![("BEHAVRY_OLLAMA_API_KEY", "s3cr3t"), ("BEHAVRY_JWT_PUBLIC_KEY", &pem)],
    ] {
        let config = env(&variables).unwrap();
        for shown in [
            config.effective(),
            format!("{config:?}"),
            format!("{:?}", config.backend[0].url),
            config.warnings().join(""),
        ] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
    for variables in [
        [("BEHAVRY_OLLAMA_URL", "http://user:s3cr3t@gpu:x")],
        [("BEHAVRY_OLLAMA_URL", "http://s3cr3t@gpu/p")],
        [("BEHAVRY_OLLAMA_API_KEY", "s3cr3t with a space")],
        [("BEHAVRY_JWT_PRIVATE_KEY", "s3cr3t")],
    ] {
        let e = refused(&variables);
        assert!(!e.contains(secret), "{e}");
    }
    for file in [
        "[[backend]]\nurl = \"http://user:s3cr3t@gpu:x\"",
        "[[backend]]\nurl = \"http://a\"\nbearer = \"s3cr3t \\u0001\"",
        "[[backend]]\nurl = \"http://a\"\nbearer = s3cr3t",
        "[[backend]]\nurl = \"http://a\"\nbearer = [\"s3cr3t\"]",
        "[[backend]]\nurl = \"http://a\"\nbearer = \"s3cr3t",
        "[identity]\nprivate_key_file = \"\"\"-----BEGIN PRIVATE KEY-----\ns3cr3t\"\"\"",
    ] {
        let e = error(file);
        assert!(!e.contains(secret), "{e}");
    }
}

#[test]
fn the_effective_settings_are_these_lines() {
    let config = env(&[
        ("BEHAVRY_OLLAMA_URL", "https://al:pw@gpu.example"),
        ("BEHAVRY_STATE_DIR", "/var/lib/behavry"),
        ("BEHAVRY_JWT_PUBLIC_KEY", "-----BEGIN PUBLIC KEY-----\nAA\n-----END PUBLIC KEY-----"),
        ("BEHAVRY_JWT_ALGORITHM", "EdDSA"),
    ])
    .unwrap();
    let expected = r#"listen = "127.0.0.1:8000"
state_dir = "/var/lib/behavry"
threads = 0
model = []

[routes]
drop_in = true

[operator]
listen = "127.0.0.1:5173"
credential_file = ""
hosts = []

[[backend]]
url = "https://(redacted)@gpu.example"
name = "ollama"
weight = 1
tier = 0
slots = 1
bearer = ""
bearer_file = ""
ca_file = ""
models = []

[backend.model_slots]

[backend_timeouts]
connect_ms = 5000
silence_s = 300

[fleet]
manage = ""

[failover]
backends = 3
within_s = 30

[health]
probe_s = 5
failures = 3
rest_s = 5

[queue]
model_waiting = 512
all_waiting = 4096
agent_waiting = 128
wait_s = 300
linger_ms = 200
tier_s = 10
highest = "interactive"

[queue.roles]

[limits]
body_bytes = 67108864
bodies_in_memory_bytes = 536870912
blob_bytes = 137438953472
head_bytes = 32768
head_timeout_ms = 10000
body_idle_ms = 30000
in_flight = 10000
connections = 20000
keepalive_s = 60
reply_buffer_bytes = 8388608
replies_in_memory_bytes = 536870912
slow_reader_stall_ms = 30000
slow_reader_floor_bytes = 1024
slow_reader_blocking_floor_bytes = 1048576
linger_ms = 2000
list_bytes = 16777216

[identity]
issuer = "behavry"
audience = ""
algorithm = "EdDSA"
public_key_file = "(from the environment)"
private_key_file = ""
secret_file = ""
jwks_file = ""
jwks_url = ""
jwks_refresh_s = 300
jwks_floor_s = 10
ca_file = ""
token_url = ""
agents_file = "/var/lib/behavry/agents.toml"
api_keys = false
revocations_file = "/var/lib/behavry/revoked.toml"
leeway_s = 30
token_ttl_s = 3600
token_requests_per_minute = 300
wrong_secrets_per_minute = 10

[policy]
dir = ""
builtin_errors = "strict"
timeout_ms = 500
reload_s = 2

[audit]
dir = "/var/lib/behavry/audit"
stdout = true
room_records = 65536
refusals_per_second = 10
durability = "fsync"
fsync_ms = 1000
rotate_bytes = 268435456
rotate_age_s = 86400
keep_days = 0
keep_bytes = 0
checkpoint_s = 60
checkpoint_file = ""

[audit.sinks]
start = "beginning"
batch_lines = 500
timeout_s = 10
retry_max_s = 60

[audit.webhook]
url = ""
secret_file = ""
ca_file = ""

[audit.syslog]
address = ""
facility = "authpriv"

[audit.otlp]
url = ""
headers_file = ""
ca_file = ""

[filters]
model_prefix = true
prompt_cache_key = true
verbosity = true
store = true
service_tier = true
cache_control = true
user = true
max_completion_tokens = true

[streaming]
include_usage = true
cancel_grace_ms = 50
shield_load_s = 0

[shutdown]
drain_s = 30

[egress]
cloud_models = false
web_tools = "cut"

[catalogue]
refresh_s = 30
loaded_s = 5
straggler_ms = 2000

[models]
registries = ["registry.ollama.ai"]
mirror_listen = ""
mirror_url = ""
mirror_store = "/var/lib/behavry/mirror"
mirror_bytes = 137438953472
"#;
    assert_eq!(config.effective(), expected);
}

#[test]
fn an_operators_listener_off_loopback_needs_a_credential_and_is_worth_a_word() {
    let e = refused(&[("BEHAVRY_OPERATOR_LISTEN", "0.0.0.0:5173")]);
    assert!(e.starts_with("operator.listen, operator.credential_file: 0.0.0.0:5173 is reachable"), "{e}");
    let folder = Folder::new();
    let file = folder.write("proxy.toml", "[operator]\nlisten = \"[::]:5173\"\ncredential_file = \"operator.token\"");
    let config = env(&[("BEHAVRY_CONFIG", file.to_str().unwrap())]).unwrap();
    assert_eq!(config.operator.credential_file, file.with_file_name("operator.token"));
    assert_eq!(config.warnings().len(), 1);
}

#[test]
fn the_mirrors_url_can_stand_in_a_models_name() {
    let url = |url: &str| {
        let config = text(&format!("[models]\nmirror_listen = \"0.0.0.0:5174\"\nmirror_url = \"{url}\""))?;
        Ok::<_, ConfigError>(config.models.mirror_authority("0.0.0.0:9".parse().unwrap()))
    };
    assert_eq!(url("http://Gateway.internal:5174").unwrap(), "gateway.internal:5174");
    assert_eq!(url("http://10.0.0.5:1").unwrap(), "10.0.0.5:1");
    for bad in [
        "https://gateway:5174",
        "gateway:5174",
        "http://gateway",
        "http://gateway:0",
        "http://gateway:+1",
        "http://gateway:99999",
        "http://gateway:5174/",
        "http://user@gateway:5174",
        "http://[::1]:5174",
        "http://:5174",
        "http://-x:5174",
        "http://a b:5174",
    ] {
        assert!(url(bad).is_err(), "{bad}");
    }
    let config = text("[models]\nmirror_listen = \"127.0.0.1:0\"").unwrap();
    assert_eq!(config.models.mirror_authority("127.0.0.1:7".parse().unwrap()), "127.0.0.1:7");
}

#[test]
fn a_syslog_on_another_machine_is_worth_a_word() {
    let folder = Folder::new();
    for (address, words) in [("udp://127.0.0.1:514", 0), ("unix:///dev/log", 0), ("tcp://logs.example:601", 1)] {
        let file = folder.write("proxy.toml", &format!("[audit.syslog]\naddress = \"{address}\""));
        assert_eq!(env(&[("BEHAVRY_CONFIG", file.to_str().unwrap())]).unwrap().warnings().len(), words, "{address}");
    }
}

#[test]
fn a_name_of_a_host_has_no_port_and_no_scheme() {
    let hosts = |list: &str| text(&format!("[operator]\nhosts = {list}")).map(|config| config.operator.hosts);
    assert_eq!(hosts("[\"gateway.internal\", \"GW-1\"]").unwrap(), ["gateway.internal", "GW-1"]);
    for bad in ["[\"\"]", "[\"gateway:5173\"]", "[\"http://gateway\"]", "[\"*\"]", "\"gateway\""] {
        assert!(hosts(bad).is_err(), "{bad}");
    }
}

#[test]
fn no_text_panics_the_reader() {
    // Every prefix of the shipped file with its values, and every single byte of it replaced.
    let whole = shipped_with_values();
    for end in (0..whole.len()).step_by(29).filter(|end| whole.is_char_boundary(*end)) {
        let _ = text(&whole[..end]);
    }
    for at in (0..whole.len()).step_by(37) {
        for byte in ["\"", "[", "=", "\n", "\0", "é"] {
            if whole.is_char_boundary(at) && whole.is_char_boundary(at + 1) {
                let _ = text(&format!("{}{byte}{}", &whole[..at], &whole[at + 1..]));
            }
        }
    }
}

#[test]
fn what_is_said_of_models_is_read_and_shown() {
    let file = r#"[[model]]
name = "fast"
alias = "llama3.2:3b"
[[model]]
name = "llama3.2:3b"
fallback = ["llama3.2:1b"]
num_ctx = 8192
num_batch = { min = 64, max = 512 }
num_gpu = "strip"
use_mmap = false
keep_alive = { max = "30m" }
"#;
    let config = text(file).unwrap();
    let model = &config.model[1];
    assert_eq!(config.model[0], Model { name: "fast".into(), alias: "llama3.2:3b".into(), ..Model::default() });
    assert_eq!((&model.num_ctx, &model.num_gpu), (&Some(Setting::Pin(8192)), &Some(Setting::Strip)));
    assert_eq!(model.num_batch, Some(Setting::Clamp { min: Some(64), max: Some(512) }));
    assert_eq!(model.keep_alive, Some(Setting::Clamp { min: None, max: Some(Span::Text("30m".into())) }));
    let warnings = config.warnings();
    assert!(warnings.len() == 1 && warnings[0].starts_with("model llama3.2:3b: requests at /v1"), "{warnings:?}");
    assert_eq!(keys_and_values(&config)["model"], toml::from_str::<toml::Table>(file).unwrap()["model"]);

    for (lines, expected) in [
        ("num_cxt = 1", "line 3: \"model.num_cxt\" is no key here; did you mean model.num_ctx?"),
        (
            "num_ctx = \"8k\"",
            "line 3: model.num_ctx: found \"8k\"; write a whole number, { min = .., max = .. } or \"strip\"",
        ),
        (
            "num_ctx = {}",
            "line 3: model.num_ctx: found a value of type table; write a whole number, { min = .., max = .. } or \"strip\"",
        ),
        ("use_mmap = 1", "line 3: model.use_mmap: found 1; write true, false or \"strip\""),
    ] {
        assert_eq!(error(&format!("[[model]]\nname = \"a\"\n{lines}\n")), format!("/conf/proxy.toml {expected}"));
    }
    assert!(error("[[model]]\nalias = \"a\"\n").contains("name"), "a table without a name");
    assert!(error("[[model]]\nname = \"a\"\nnum_gpu = { mni = 1 }\n").contains("model.num_gpu"));
}
