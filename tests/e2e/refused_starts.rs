//! Settings with which the proxy does not start: exit code 78, one line that says what to do, and nothing made.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::house::{Ended, program, run_to_end};

const CONFIGURATION: Option<i32> = Some(78);

fn key_file(name: &str) -> String {
    let path = format!("{}/tests/fixtures/keys/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).expect("a fixture")
}

/// `serve` as one would start it, with its own folders and one more setting.
async fn serve(dir: &Path, variable: Option<(&str, &str)>, config: &str) -> Ended {
    let file = dir.join("proxy.toml");
    std::fs::write(&file, config).expect("written");
    let mut command = program(&["serve", "--listen", "127.0.0.1:0", "--operator-listen", "127.0.0.1:0"]);
    command.env("BEHAVRY_STATE_DIR", dir.join("state")).env("BEHAVRY_CONFIG", file);
    command.envs(variable);
    run_to_end(command).await
}

#[track_caller]
fn refused(what: &str, ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code, CONFIGURATION, "{what}: {}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "{what}: {word:?} is not in {}", ended.stderr);
    }
    assert!(!ended.stderr.contains("listening on"), "{what}: {}", ended.stderr);
    assert_eq!(ended.stdout, "", "{what}");
}

/// Every variable that the file of settings names, and that of the file itself.
fn variables() -> BTreeSet<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/conf/proxy.toml")).expect("it is there");
    let words = text.split(|c: char| !(c.is_ascii_uppercase() || c == '_'));
    words.filter(|word| word.starts_with("BEHAVRY_")).map(str::to_owned).collect()
}

#[tokio::test]
async fn every_variable_that_is_set_but_empty_stops_the_start() {
    let variables = variables();
    for known in [
        "BEHAVRY_AGENTS_FILE",
        "BEHAVRY_AUDIT_DIR",
        "BEHAVRY_CONFIG",
        "BEHAVRY_JWT_ALGORITHM",
        "BEHAVRY_JWT_ISSUER",
        "BEHAVRY_JWT_PRIVATE_KEY",
        "BEHAVRY_JWT_PUBLIC_KEY",
        "BEHAVRY_LISTEN",
        "BEHAVRY_OLLAMA_API_KEY",
        "BEHAVRY_OLLAMA_URL",
        "BEHAVRY_OPERATOR_LISTEN",
        "BEHAVRY_POLICY_DIR",
        "BEHAVRY_STATE_DIR",
    ] {
        assert!(variables.contains(known), "{known} is not in conf/proxy.toml");
    }
    let dir = tempfile::tempdir().expect("a folder");
    for variable in &variables {
        for empty in ["", " ", "\n"] {
            let ended = serve(dir.path(), Some((variable, empty)), "").await;
            refused(variable, &ended, &[&format!("{variable}: is set but empty; give it a value or unset it")]);
        }
    }
    assert!(!dir.path().join("state").exists(), "nothing was made");
}

#[tokio::test]
async fn weak_keys_and_secrets_stop_the_start_and_the_message_says_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let write = |name: &str, content: &str, mode: u32| -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, content).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("ours");
        path
    };
    let weak_public = write("weak.public.pem", &key_file("rsa1024.public.pem"), 0o644);
    let weak_private = write("weak.private.pem", &key_file("rsa1024.private.pem"), 0o600);
    let secret = "s3cret-of-thirty-one-characters"; // 31
    assert_eq!(secret.len(), 31);
    let short = write("short", secret, 0o600);
    let short_with_newline = write("short-line", &format!("{secret}\n"), 0o600);
    let pem = write("pem", &key_file("rsa2048.public.pem"), 0o600);
    let shared = write("shared", &"x".repeat(32), 0o604);
    let world = write("world.pem", &key_file("p256.private.pem"), 0o604);
    let group = write("group.pem", &key_file("p256.private.pem"), 0o640);
    for (name, key, path, words) in [
        ("RSA 1024 verifies", "public_key_file", &weak_public, &["1024", "2048"][..]),
        ("RSA 1024 signs", "private_key_file", &weak_private, &["1024", "openssl genrsa"]),
        ("a secret of 31 bytes", "secret_file", &short, &["31", "32"]),
        ("a secret of 31 bytes and a newline", "secret_file", &short_with_newline, &["31", "32"]),
        ("a public key as a secret", "secret_file", &pem, &["secret_file"]),
        ("a secret that the world can read", "secret_file", &shared, &["shared", "chmod 600"]),
        ("a private key that the world can read", "private_key_file", &world, &["world.pem", "chmod 600"]),
        ("a private key that its group can read", "private_key_file", &group, &["group.pem", "chmod 600"]),
    ] {
        let ended = serve(dir.path(), None, &format!("[identity]\n{key} = \"{}\"\n", path.display())).await;
        refused(name, &ended, words);
        assert!(!ended.stderr.contains(secret), "{name}: a secret is never quoted");
    }
    for (variable, pem) in
        [("BEHAVRY_JWT_PUBLIC_KEY", "rsa1024.public.pem"), ("BEHAVRY_JWT_PRIVATE_KEY", "rsa1024.private.pem")]
    {
        let ended = serve(dir.path(), Some((variable, &key_file(pem))), "").await;
        refused(variable, &ended, &["1024", "2048"]);
    }
    assert!(!dir.path().join("state").exists(), "nothing was made");
}
