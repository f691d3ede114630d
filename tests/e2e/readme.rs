//! What the documents say is done: the README's commands run as they are printed, on free ports and in folders of their own; its
//! tables agree with the program; the tests and files that a document names exist.
//!
//! Each block of code in the README is marked with how it is tested (`<!-- test: run -->`). The Python ones run in
//! `tests/sdk/test_readme.py`, which has the clients.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use behavry_ollama_proxy::refusal::Code;
use serde_json::{Value, json};

use crate::client::{Connection, Request};
use crate::house::{House, PATIENCE, Plan};

const README: &str = include_str!("../../README.md");
const PROGRAM: &str = env!("CARGO_BIN_EXE_behavry-ollama-proxy");
const NAME: &str = "behavry-ollama-proxy";

/// How a block may be tested, and in which language it is.
const MARKS: &[(&str, &str)] = &[
    ("demo", "sh"),
    ("script", "sh"),
    ("install", "sh"),
    ("serve", "sh"),
    ("simulate", "sh"),
    ("run", "sh"),
    ("python", "python"),
    ("record", "json"),
    ("check", "toml"),
    ("watch", "sh"),
    ("scrape", "yaml"), // tests/sdk/test_metrics.py
];

struct Block {
    line: usize,
    language: String,
    mark: Option<String>,
    text: String,
}

fn blocks(document: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut before = "";
    let mut lines = document.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            before = line;
            continue;
        };
        let text: Vec<&str> = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
        let mark = before.strip_prefix("<!-- test: ").and_then(|mark| mark.strip_suffix(" -->")).map(str::to_owned);
        blocks.push(Block { line: number + 1, language: language.to_owned(), mark, text: text.join("\n") });
        before = "";
    }
    blocks
}

fn marked(mark: &str) -> Vec<Block> {
    let found: Vec<Block> = blocks(README).into_iter().filter(|block| block.mark.as_deref() == Some(mark)).collect();
    assert!(!found.is_empty(), "the README has no block marked {mark}");
    found
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// A folder in which the program has the name that the README calls it by, in front of the caller's own PATH.
fn path_with_program(folder: &Path) -> String {
    symlink(PROGRAM, folder.join(NAME)).expect("a link");
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default())
}

/// Kills what a test started, however the test ends.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Both streams of a child, line by line.
fn lines_of(child: &mut Child) -> Receiver<String> {
    let (told, lines) = channel();
    let streams: [Box<dyn std::io::Read + Send>; 2] =
        [Box::new(child.stdout.take().expect("piped")), Box::new(child.stderr.take().expect("piped"))];
    for stream in streams {
        let told = told.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if told.send(line).is_err() {
                    return;
                }
            }
        });
    }
    lines
}

/// Everything up to the first line with `end` in it.
fn until(lines: &Receiver<String>, end: &str) -> String {
    let mut seen = String::new();
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                seen.push_str(&line);
                seen.push('\n');
                if line.contains(end) {
                    return seen;
                }
            }
            Err(RecvTimeoutError::Timeout) => panic!("{end:?} was not printed in time:\n{seen}"),
            Err(RecvTimeoutError::Disconnected) => panic!("it ended before it printed {end:?}:\n{seen}"),
        }
    }
}

/// A line of the README, started by a shell on free ports and with a home of its own.
fn start(line: &str, folder: &Path, more: &[(&str, &str)]) -> (Started, Receiver<String>) {
    let mut child = Command::new("bash")
        .args(["-c", &format!("exec {line}")])
        .current_dir(root())
        .env_clear()
        .env("PATH", path_with_program(folder))
        .env("HOME", folder)
        .env("BEHAVRY_LISTEN", "127.0.0.1:0")
        .env("BEHAVRY_OPERATOR_LISTEN", "127.0.0.1:0")
        .envs(more.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("bash is there");
    let lines = lines_of(&mut child);
    (Started(child), lines)
}

#[test]
fn every_block_of_the_readme_says_how_it_is_tested() {
    for block in blocks(README) {
        let mark = block.mark.as_deref().unwrap_or("none");
        assert!(
            MARKS.contains(&(mark, block.language.as_str())),
            "README.md:{}: a block of {:?} with the mark {mark}",
            block.line,
            block.language
        );
    }
}

#[tokio::test]
async fn the_readmes_commands_work_as_they_are_printed() {
    if let Some(missing) = ["curl", "jq"].into_iter().find(|tool| !installed(tool)) {
        eprintln!("skipped: {missing} is not installed");
        return;
    }
    // With keys of its own, since one of the commands rotates them.
    let env = vec![("BEHAVRY_JWT_ALGORITHM".to_owned(), "EdDSA".to_owned())];
    let house = House::with(Plan { no_key: true, env, ..Plan::default() }).await;
    let (client_id, client_secret) = house.first_agent();
    let home = tempfile::tempdir().expect("a folder");
    let state = home.path().join(".local/state");
    fs::create_dir_all(&state).expect("a folder");
    symlink(house.dir.path().join("state"), state.join(NAME)).expect("a link");

    let mut script = "set -euo pipefail\n".to_owned();
    for block in marked("run") {
        script.push_str(&format!("echo '== README.md:{}' >&2\n{}\n", block.line, block.text));
        if block.text.contains("export BEHAVRY_JWT=") {
            // `export` hides the failure of what it is given.
            script.push_str("test \"$(printf %s \"$BEHAVRY_JWT\" | tr -dc . | wc -c)\" -eq 2\n");
        }
    }
    let script = script
        .replace("localhost:8000", &house.public.to_string())
        .replace("localhost:5173", &house.operator.to_string())
        .replace("YOUR_CLIENT_ID", &client_id)
        .replace("YOUR_SECRET", &client_secret);
    // Off this thread, on which the simulator answers.
    let mut command = Command::new("timeout");
    command
        .args([&PATIENCE.as_secs().to_string(), "bash", "-c", &script])
        .current_dir(root())
        .env_clear()
        .env("PATH", path_with_program(home.path()))
        .env("HOME", home.path());
    let done = tokio::task::spawn_blocking(move || command.output().expect("coreutils are there"));
    let done = done.await.expect("no panic in there");
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{told}");
    let out = String::from_utf8_lossy(&done.stdout);
    for expected in [
        "\"holds\": true",                  // token inspect
        " signs now (EdDSA)",               // token keys rotate
        " verifies until ",                 // token keys list
        "\"done\":true",                    // curl, native
        "\"chat.completion\"",              // curl, OpenAI
        "\"models\":",                      // curl, list
        "# everything that can be checked", // check
        " tests passed",                    // policy test
        "\"decision\": \"allow\"",          // policy explain
        "\"phase\": \"",                    // the audit, by jq
        "behavry_ollama_requests_total{",   // metrics
        "\nok\n",                           // livez, readyz
    ] {
        assert!(out.contains(expected), "{expected} was not printed; errors:\n{told}");
    }
    assert!(!out.contains("\"code\":\""), "one of the requests was refused");
}

#[test]
fn the_demo_shows_both_dialects_and_the_audit_and_goes_on_serving() {
    let [block] = &marked("demo")[..] else { panic!("one demo") };
    let words = block.text.strip_prefix("cargo run --release -- ").expect("the demo is one command of cargo's");
    let home = tempfile::tempdir().expect("a folder");
    // Nothing answers on port 1, so a simulator stands in.
    let nobody = [("BEHAVRY_OLLAMA_URL", "http://127.0.0.1:1")];
    let (mut demo, lines) = start(&format!("{NAME} {words}"), home.path(), &nobody);
    let shown = until(&lines, "openai import OpenAI");
    let place = |what: &str| shown.find(what).unwrap_or_else(|| panic!("the demo does not show {what}"));
    assert!(place("a simulator stands in for Ollama") < place("POST /api/v1/ollama/api/chat"));
    assert!(place("POST /api/v1/ollama/api/chat") < place("POST /api/v1/ollama/v1/chat/completions"));
    assert!(place("\"done\":true") < place("data: [DONE]"));
    assert_eq!(shown.matches("\"phase\":\"final\"").count(), 2, "a final record for each request");
    assert!(place("what the audit says") < place("export BEHAVRY_JWT=") && shown.contains("ollama import Client"));

    let key = home.path().join(".local/state").join(NAME).join("signing-key.pem");
    assert_eq!(fs::metadata(key).expect("made on the first run").permissions().mode() & 0o777, 0o600);
    assert!(demo.0.try_wait().expect("ours").is_none(), "it keeps serving");
    // SAFETY: the child is ours and not yet waited for.
    unsafe { libc::kill(demo.0.id() as i32, libc::SIGINT) };
    assert!(demo.0.wait().expect("ours").success());
}

#[test]
fn serve_and_simulate_start_as_they_are_printed() {
    for mark in ["serve", "simulate"] {
        for line in marked(mark).iter().flat_map(|block| block.text.lines()) {
            let home = tempfile::tempdir().expect("a folder");
            let line = line.replace("127.0.0.1:11434", "127.0.0.1:0");
            let (_started, lines) = start(&line, home.path(), &[("BEHAVRY_OLLAMA_URL", "http://127.0.0.1:1")]);
            let shown = until(&lines, "listening on http://127.0.0.1:");
            assert!(!shown.contains("stands in"), "serve never starts a simulator");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feed_shows_a_request_as_it_is_printed() {
    if !installed("curl") {
        eprintln!("skipped: curl is not installed");
        return;
    }
    let house = House::open().await;
    let home = tempfile::tempdir().expect("a folder");
    let [block] = &marked("watch")[..] else { panic!("one command to watch with") };
    let command = block.text.replace("localhost:5173", &house.operator.to_string());
    let (_started, lines) = start(&command, home.path(), &[]);
    let ask = json!({ "model": "tiny-story", "messages": [{ "role": "user", "content": "hi" }] });
    assert_eq!(house.post("/api/chat", ask).await.status, 200);
    let shown = tokio::task::spawn_blocking(move || until(&lines, "\"phase\":\"final\"")).await.expect("it came");
    for words in
        ["event: tool_call", "\"tool_name\":\"ollama-api\"", "\"mcp_server\":\"ollama-proxy\"", "\"action\":\"POST\""]
    {
        assert!(shown.contains(words), "{words}");
    }
}

#[test]
fn what_is_installed_or_run_by_its_path_is_there() {
    let parses = |text: &str, line: usize| {
        let status = Command::new("bash").args(["-n", "-c", text]).status().expect("bash is there");
        assert!(status.success(), "README.md:{line}");
    };
    for block in marked("script") {
        for script in block.text.lines() {
            let path = root().join(script);
            assert_ne!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o100, 0, "{script} runs");
            parses(&fs::read_to_string(&path).expect("a script"), block.line);
        }
    }
    let mut files = 0;
    for block in marked("install") {
        parses(&block.text, block.line);
        for word in block.text.split_whitespace().filter(|word| word.contains('/') && !word.starts_with('/')) {
            files += 1;
            match word.strip_prefix("target/release/") {
                Some(built) => assert_eq!(built, NAME),
                None => assert!(root().join(word).is_file(), "README.md:{}: {word} is not there", block.line),
            }
        }
    }
    assert!(files >= 3, "the installation names the program, the unit and the environment");
}

#[tokio::test]
async fn the_example_record_has_the_members_of_a_real_one() {
    let [block] = &marked("record")[..] else { panic!("one record") };
    let example: Value = serde_json::from_str(&block.text).expect("JSON");
    let house = House::open().await;
    let body = json!({ "model": "llama3.2", "messages": [{ "role": "user", "content": "Hello!" }] });
    let request = Request::post("/api/v1/ollama/api/chat", body).bearer(&house.token()).id("example");
    assert_eq!(house.send(request).await.status, 200);
    let real = house.final_of("example").await;
    let members =
        |record: &Value| -> BTreeSet<String> { record.as_object().expect("an object").keys().cloned().collect() };
    assert_eq!(members(&example), members(&real));
    assert_eq!(members(&example["extra"]), members(&real["extra"]));
    for constant in ["tool_name", "mcp_server", "action", "target", "policy_result", "policy_id", "response_code"] {
        assert_eq!(example[constant], real[constant], "{constant}");
    }
    for fact in ["phase", "dialect", "model", "stream", "has_system_prompt", "message_count", "outcome", "backend"] {
        assert_eq!(example["extra"][fact], real["extra"][fact], "{fact}");
    }
}

#[test]
fn the_table_of_variables_is_the_one_that_the_program_reads() {
    let words = |text: &str| -> BTreeSet<String> {
        let parts = text.split(|c: char| !c.is_ascii_uppercase() && c != '_');
        parts.filter(|word| word.starts_with("BEHAVRY_") && word.len() > 8).map(str::to_owned).collect()
    };
    let rows: String = README.lines().filter(|line| line.starts_with("| `BEHAVRY_")).collect::<Vec<_>>().join("\n");
    let literals: Vec<&str> = include_str!("../../src/config.rs").split('"').skip(1).step_by(2).collect();
    assert_eq!(words(&rows), words(&literals.join("\n")));
}

#[tokio::test]
async fn the_metrics_that_the_readme_names_are_there() {
    let house = House::open().await;
    let body = json!({ "model": "llama3.2", "messages": [{ "role": "user", "content": "Hello!" }] });
    assert_eq!(house.post("/api/chat", body).await.status, 200);
    let mut stranger = Connection::open(house.public).await;
    stranger.write(b"GARBAGE\r\n\r\n").await;
    assert_eq!(stranger.reply(false).await.expect("an answer").status, 400);
    let start = README.find("Names begin with `behavry_ollama_`").expect("the paragraph about metrics");
    let paragraph = README[start..].split("`/readyz`").next().expect("its end");
    let names: Vec<&str> = paragraph.split('`').skip(3).step_by(2).collect();
    assert!(names.len() > 15, "{names:?}");
    // A request is counted once it has settled, which may be after its client has the reply.
    let began = std::time::Instant::now();
    loop {
        let metrics = house.metrics().await;
        let missing: Vec<&&str> =
            names.iter().filter(|name| !metrics.contains(&format!("\nbehavry_ollama_{name}"))).collect();
        if missing.is_empty() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{missing:?} are not among the metrics");
    }
}

#[test]
fn the_codes_that_the_readme_explains_exist_with_that_status() {
    let mut explained = 0;
    for row in README.lines() {
        let mut cells = row.trim_matches('|').split('|').map(str::trim);
        let (Some(Ok(status)), Some(words)) = (cells.next().map(str::parse::<u16>), cells.next()) else { continue };
        let is_code = |word: &&str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        for code in words.split('`').skip(1).step_by(2).filter(is_code) {
            let known = Code::ALL.iter().any(|known| known.as_str() == code && known.status() == status);
            assert!(known, "{status} {code} is no refusal");
            explained += 1;
        }
    }
    assert!(explained > 12, "the table is there");
}

/// Every document that makes statements about the code, by its path.
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "policies/README.md"]
            .iter()
            .map(|name| root().join(name))
            .collect();
    let decisions = fs::read_dir(root().join("docs/adr")).expect("the decisions");
    paths.extend(decisions.map(|entry| entry.expect("an entry").path()));
    paths.into_iter().map(|path| (path.clone(), fs::read_to_string(&path).expect("a document"))).collect()
}

#[test]
fn every_test_that_a_document_names_exists() {
    let mut named = 0;
    for (document, text) in documents() {
        for word in text.split('`').skip(1).step_by(2) {
            // `e2e/auth::name`, `sdk/test_metrics::name`, `src/wire/meter::name`.
            let Some((file, test)) = word.split_once("::").filter(|(file, _)| file.contains('/')) else { continue };
            let place = format!("{}: {word}", document.display());
            let below = if file.starts_with("src/") || file.starts_with("tests/") { "" } else { "tests/" };
            let ways = [("rs", format!("fn {test}(")), ("py", format!("def {test}("))];
            let found = ways.iter().find_map(|(ext, head)| {
                let text = fs::read_to_string(root().join(format!("{below}{file}.{ext}"))).ok()?;
                Some(text.contains(head))
            });
            assert_eq!(found, Some(true), "{place}: there is no such test");
            named += 1;
        }
    }
    assert!(named > 20, "the promises name their proofs");
}

#[test]
fn every_file_that_a_document_links_to_is_there() {
    for (document, text) in documents() {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") || link.starts_with('#') {
                continue;
            }
            let target = document.parent().expect("in a folder").join(link.split('#').next().unwrap_or_default());
            assert!(target.exists(), "{}: {link}", document.display());
        }
    }
}

#[tokio::test]
async fn the_readmes_settings_pass_the_check() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, private).expect("its mode");
        path
    };
    write("internal-ca.pem", &crate::key_server::tls_for("localhost").0);
    write("gpu-1.key", "sk-of-the-first");
    for block in blocks(README).iter().filter(|block| block.mark.as_deref() == Some("check")) {
        let file = write("proxy.toml", &block.text);
        let mut check = crate::house::program(&["check"]);
        check.env("BEHAVRY_CONFIG", file).env("BEHAVRY_STATE_DIR", folder.path().join("state"));
        let ended = crate::house::run_to_end(check).await;
        assert_eq!(ended.code, Some(0), "README.md:{}: {}", block.line, ended.stderr);
    }
}
