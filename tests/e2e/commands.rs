//! The command line: what each command prints, and its exit code; the first start, the second, and the demo.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::Request;
use crate::house::{Ended, House, PATIENCE, Plan, program, run_to_end};

const USAGE: Option<i32> = Some(64);
const CONFIGURATION: Option<i32> = Some(78);

/// A command with a state folder of its own.
fn with_state(arguments: &[&str], state: &Path) -> Command {
    let mut command = program(arguments);
    command.env("BEHAVRY_STATE_DIR", state);
    command
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

async fn run(arguments: &[&str], state: &Path) -> Ended {
    run_to_end(with_state(arguments, state)).await
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).permissions().mode() & 0o777
}

fn in_repository(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

// ---- tokens

#[tokio::test]
async fn token_mint_prints_a_token_alone_and_a_proxy_on_the_same_state_takes_it() {
    let state = folder();
    let dir = state.path().join("state");
    let arguments = ["token", "mint", "--agent", "alice", "--role", "ops", "--role", "dev", "--permission", "web:read"];
    let minted = run(&[&arguments[..], &["--ttl", "600", "--session", "s-1"]].concat(), &dir).await;
    assert_eq!(minted.code, Some(0), "{}", minted.stderr);
    let token = minted.stdout.strip_suffix('\n').expect("one line");
    assert!(token.split('.').count() == 3 && !token.contains(char::is_whitespace), "{}", minted.stdout);
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("signing-key.pem")), 0o600);

    let seen = run(&["token", "inspect", token], &dir).await;
    assert_eq!(seen.code, Some(0), "{}", seen.stderr);
    let shown: Value = serde_json::from_str(&seen.stdout).expect("JSON");
    assert_eq!(shown["verdict"]["holds"], true);
    assert_eq!((&shown["claims"]["sub"], &shown["claims"]["jti"]), (&json!("alice"), &json!("s-1")));
    assert_eq!(shown["claims"]["roles"], json!(["ops", "dev"]));
    assert_eq!(shown["claims"]["permissions"], json!(["web:read"]));
    assert_eq!(shown["header"]["alg"], "RS256");
    let life = shown["claims"]["exp"].as_i64().unwrap() - shown["claims"]["iat"].as_i64().unwrap();
    assert_eq!(life, 600);

    let env = vec![("BEHAVRY_STATE_DIR".to_owned(), dir.display().to_string())];
    let house = House::with(Plan { env, no_key: true, ..Plan::default() }).await;
    assert_eq!(house.send(Request::get("/api/version").bearer(token)).await.status, 200);
    let ask = json!({ "model": "tiny", "messages": [] });
    assert_eq!(house.send(Request::post("/api/chat", ask).bearer(token)).await.status, 403, "it may only read");
}

#[tokio::test]
async fn token_inspect_reads_standard_input_and_says_why_a_token_does_not_hold() {
    let (one, other) = (folder(), folder());
    let minted = run(&["token", "mint", "--agent", "alice"], one.path()).await;
    let token = minted.stdout.trim().to_owned();
    let piped = one.path().join("token");
    std::fs::write(&piped, format!("  {token}\n")).unwrap();
    let mut command = with_state(&["token", "inspect", "-"], one.path());
    command.stdin(std::fs::File::open(&piped).unwrap());
    let seen = run_to_end(command).await;
    assert_eq!(seen.code, Some(0), "{}", seen.stderr);
    assert_eq!(
        serde_json::from_str::<Value>(&seen.stdout).unwrap()["claims"]["permissions"],
        json!(["web:read", "web:write"])
    );

    let foreign = run(&["token", "inspect", &token], other.path()).await;
    assert_eq!(foreign.code, Some(1));
    let shown: Value = serde_json::from_str(&foreign.stdout).expect("JSON");
    assert_eq!(shown["verdict"]["holds"], false);
    assert!(["bad_signature", "unknown_key"].contains(&shown["verdict"]["cause"].as_str().unwrap()));
    let garbage = run(&["token", "inspect", "garbage"], one.path()).await;
    assert_eq!(
        (garbage.code, serde_json::from_str::<Value>(&garbage.stdout).unwrap()["verdict"]["cause"].clone()),
        (Some(1), json!("malformed"))
    );
}

#[tokio::test]
async fn tokens_that_would_never_hold_are_not_made() {
    let state = folder();
    let nine: Vec<String> = (0..9).flat_map(|n| ["--role".to_owned(), format!("r{n}")]).collect();
    let nine: Vec<&str> =
        ["token", "mint", "--agent", "a"].into_iter().chain(nine.iter().map(String::as_str)).collect();
    for arguments in [
        &nine[..],
        &["token", "mint"],
        &["token", "mint", "--agent", ""],
        &["token", "mint", "--agent", "a\nb"],
        &["token", "mint", "--agent", "a", "--ttl", "0"],
        &["token", "mint", "--agent", "a", "--ttl", "soon"],
    ] {
        let ended = run(arguments, state.path()).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (USAGE, ""), "{arguments:?}: {}", ended.stderr);
        assert!(!ended.stderr.is_empty());
    }
    let key = in_repository("tests/fixtures/keys/rsa2048.public.pem");
    let mut command = with_state(&["token", "mint", "--agent", "a"], state.path());
    command.env("BEHAVRY_JWT_PUBLIC_KEY", std::fs::read_to_string(key).unwrap());
    let ended = run_to_end(command).await;
    assert_eq!(ended.code, CONFIGURATION, "{}", ended.stderr);
    assert!(ended.stderr.contains("no key to sign with"), "{}", ended.stderr);
}

// ---- policies

#[tokio::test]
async fn policy_test_passes_on_what_is_shipped_and_fails_with_the_test_that_fails() {
    let state = folder();
    for dir in ["policies", "policies/examples"] {
        let ended = run(&["policy", "test", &in_repository(dir)], state.path()).await;
        assert_eq!(ended.code, Some(0), "{dir}: {}{}", ended.stdout, ended.stderr);
        assert!(ended.stdout.contains("PASS  ") && ended.stdout.contains(" tests passed"), "{}", ended.stdout);
        assert!(!ended.stdout.contains("FAIL") && !ended.stdout.contains("ERROR"));
    }
    let dir = folder();
    let test = "package behavry.authz_test\n\nimport data.behavry.authz\n\ntest_it_denies if authz.deny with input as {\"model\": \"x\"}\n";
    std::fs::write(dir.path().join("a.rego"), "package behavry.authz\n\ndeny if input.model == \"y\"\n").unwrap();
    std::fs::write(dir.path().join("a_test.rego"), test).unwrap();
    let ended = run(&["policy", "test", &dir.path().display().to_string()], state.path()).await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stdout.contains("FAIL  a_test.rego:5"), "{}", ended.stdout);
    assert!(ended.stdout.contains("0 of 1 tests passed"), "{}", ended.stdout);

    std::fs::write(dir.path().join("a_test.rego"), "package behavry.authz_test\n\ntest_it if {\n").unwrap();
    let ended = run(&["policy", "test", &dir.path().display().to_string()], state.path()).await;
    assert_ne!(ended.code, Some(0));
    assert!(ended.stderr.contains("a_test.rego:"), "{}", ended.stderr);
    std::fs::remove_file(dir.path().join("a_test.rego")).unwrap();
    let ended = run(&["policy", "test", &dir.path().display().to_string()], state.path()).await;
    assert_eq!(ended.code, CONFIGURATION, "nothing was tested: {}", ended.stderr);
}

#[tokio::test]
async fn policy_explain_shows_the_decision_the_reasons_and_the_input() {
    let state = folder();
    let seed = in_repository("policies/examples");
    // `policies/examples` is a folder of its own here, and so is loaded.
    let explain = |arguments: &[&str]| {
        let all = [&["policy", "explain", "--policy-dir", seed.as_str()], arguments].concat();
        let mut command = with_state(&all, state.path());
        command.env("BEHAVRY_OLLAMA_URL", "http://127.0.0.1:9");
        run_to_end(command)
    };
    let ended =
        explain(&["POST", "/api/chat", "--model", "LLAMA3.2:latest", "--role", "internal", "--agent", "alice"]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let shown: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!(shown["decision"], "allow");
    assert_eq!((&shown["input"]["model"], &shown["input"]["agent_role"]), (&json!("llama3.2"), &json!("internal")));
    assert_eq!(shown["input"]["agent"]["id"], "alice");
    assert_eq!(shown["input"]["request"]["resource"], "/api/chat");
    assert!(shown["revision"].is_string());

    let body = r#"{"model":"llama3.2","messages":[{"role":"user","content":"PROMPT-CANARY"}],"stream":true}"#;
    let ended =
        explain(&["post", "/api/v1/ollama/api/chat", "--body", body, "--role", "internal", "--role", "external"]).await;
    let shown: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&shown["decision"], &shown["policy_id"]), (&json!("deny"), &json!("behavry.authz.deny")));
    assert!(shown["reasons"][0].as_str().unwrap().contains("behavry.authz.deny denies this"));
    assert_eq!(shown["verdicts"].as_array().map(Vec::len), Some(2), "one for each role");
    assert_eq!(shown["input"]["request"]["parameters"]["stream"], true);
    assert!(!ended.stdout.contains("CANARY"), "no prompt enters the document");

    let ended = explain(&["POST", "/api/chat", "--model", "llama3.2", "--permission", "web:read"]).await;
    assert!(ended.stdout.contains("the permission web:write is missing"), "{}", ended.stdout);
    for wrong in [
        &["POST", "/nothing"][..],
        &["POST"],
        &["POST", "/api/chat", "--body", "no json"],
        &["POST", "/api/chat", "--model", "a b"],
    ] {
        assert_eq!(explain(wrong).await.code, USAGE, "{wrong:?}");
    }
    assert!(!state.path().join("agents.toml").exists(), "explaining makes nothing");
}

// ---- check, usage, configuration

#[tokio::test]
async fn check_prints_the_settings_in_force_and_no_secret() {
    let state = folder();
    let secret = state.path().join("secret");
    std::fs::write(&secret, "SECRET-CANARY of more than thirty-two bytes").unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    let config = state.path().join("proxy.toml");
    let text = format!(
        "listen = \"127.0.0.1:8123\"\n[identity]\nsecret_file = \"{}\"\n[[backend]]\nurl = \"http://user:URL-CANARY@127.0.0.1:9\"\n",
        secret.display()
    );
    std::fs::write(&config, text).unwrap();
    let ended = run(&["check", "--config", config.to_str().unwrap()], state.path()).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for line in ["listen = \"127.0.0.1:8123\"", "silence_s = 300", "drop_in = true", "body_bytes = 67108864"] {
        assert!(ended.stdout.contains(line), "{line} is not in\n{}", ended.stdout);
    }
    assert!(ended.stdout.contains("url = \"http://(redacted)@127.0.0.1:9\""), "the backend is shown: {}", ended.stdout);
    assert!(ended.stdout.contains("# policy revision "), "{}", ended.stdout);

    std::fs::write(&config, "").unwrap();
    let key = std::fs::read_to_string(in_repository("tests/fixtures/keys/p256.private.pem")).unwrap();
    let mut command = with_state(&["check", "--config", config.to_str().unwrap()], state.path());
    command.env("BEHAVRY_OLLAMA_API_KEY", "KEY-CANARY").env("BEHAVRY_JWT_PRIVATE_KEY", &key);
    let with_env = run_to_end(command).await;
    assert_eq!(with_env.code, Some(0), "{}", with_env.stderr);
    let printed = ended.stdout + &ended.stderr + &with_env.stdout + &with_env.stderr;
    assert!(!printed.contains("CANARY"), "{printed}");
    assert!(!printed.contains(key.lines().nth(1).expect("a line of the key")), "the key is not shown");
}

#[tokio::test]
async fn usage_errors_are_64_and_help_is_0() {
    let state = folder();
    for wrong in [
        &[][..],
        &["fly"],
        &["serve", "--wings"],
        &["serve", "extra"],
        &["policy"],
        &["token"],
        &["simulate", "--fault", "nonsense"],
        &["simulate", "--listen", "here"],
    ] {
        let ended = run(wrong, state.path()).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (USAGE, ""), "{wrong:?}: {}", ended.stderr);
        assert!(!ended.stderr.is_empty(), "{wrong:?}");
    }
    for right in [&["--help"][..], &["--version"], &["serve", "--help"], &["token", "mint", "--help"]] {
        let ended = run(right, state.path()).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{right:?}");
        assert!(!ended.stdout.is_empty());
    }
}

#[tokio::test]
async fn configuration_errors_are_78_with_the_place_and_the_remedy_and_change_nothing() {
    let dir = folder();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        path.display().to_string()
    };
    let world =
        write("world.pem", &std::fs::read_to_string(in_repository("tests/fixtures/keys/p256.private.pem")).unwrap());
    std::fs::set_permissions(&world, PermissionsExt::from_mode(0o644)).unwrap();
    let twice = write("twice.toml", "[[agent]]\nid = \"a\"\n\n[[agent]]\nid = \"a\"\n");
    let short = write("short", "too short");
    let public = std::fs::read_to_string(in_repository("tests/fixtures/keys/rsa2048.public.pem")).unwrap();
    let config = |name: &str, text: String| ("BEHAVRY_CONFIG", write(name, &text));
    type Case<'a> = (Vec<(&'a str, String)>, &'a [&'a str]);
    let cases: Vec<Case> = vec![
        (vec![("BEHAVRY_OLLAMA_URL", String::new())], &["BEHAVRY_OLLAMA_URL", "set but empty", "unset it"]),
        (vec![("BEHAVRY_JWT_PRIVATE_KEY", "  ".into())], &["BEHAVRY_JWT_PRIVATE_KEY", "set but empty"]),
        (vec![("BEHAVRY_LISTEN", "8000".into())], &["BEHAVRY_LISTEN"]),
        (vec![("BEHAVRY_OLLAMA_URL", "ftp://127.0.0.1".into())], &["BEHAVRY_OLLAMA_URL"]),
        (
            vec![config("ca.toml", format!("[[backend]]\nurl = \"https://127.0.0.1:1\"\nca_file = \"{short}\"\n"))],
            &["backend ollama: ca_file", "no certificate"],
        ),
        (
            vec![config("model.toml", "[[backend]]\nurl = \"http://127.0.0.1:1\"\nmodels = [\"a/b/c/d\"]\n".into())],
            &["backend ollama: models: \"a/b/c/d\""],
        ),
        (vec![("BEHAVRY_JWT_PRIVATE_KEY", public)], &["public key"]),
        (
            vec![("BEHAVRY_CONFIG", dir.path().join("none.toml").display().to_string())],
            &["none.toml", "cannot be read"],
        ),
        (
            vec![config("unknown.toml", "listen = \"127.0.0.1:0\"\n\n[limits]\nwings = 2\n".into())],
            &["unknown.toml line 4", "wings"],
        ),
        (vec![config("broken.toml", "listen = \n".into())], &["broken.toml line 1"]),
        (vec![config("world.toml", format!("[identity]\nprivate_key_file = \"{world}\"\n"))], &["world.pem", "chmod"]),
        (vec![config("short.toml", format!("[identity]\nsecret_file = \"{short}\"\n"))], &["secret_file", "32"]),
        (vec![config("jwks.toml", format!("[identity]\njwks_file = \"{short}\"\n"))], &["jwks_file"]),
        (vec![("BEHAVRY_JWT_ALGORITHM", "none".into())], &["BEHAVRY_JWT_ALGORITHM"]),
        (vec![("BEHAVRY_AGENTS_FILE", twice)], &["twice.toml:4", "twice"]),
    ];
    for (n, (env, said)) in cases.into_iter().enumerate() {
        let state = dir.path().join(format!("state-{n}"));
        for command in ["check", "serve"] {
            let mut program = with_state(&[command, "--operator-listen", "127.0.0.1:0"], &state);
            if !env.iter().any(|(name, _)| *name == "BEHAVRY_LISTEN") {
                program.args(["--listen", "127.0.0.1:0"]);
            }
            program.envs(env.iter().map(|(name, value)| (name, value)));
            let ended = run_to_end(program).await;
            assert_eq!(ended.code, CONFIGURATION, "{command} {env:?}: {}", ended.stderr);
            for words in said {
                assert!(ended.stderr.contains(words), "{command}: {words} is not in {}", ended.stderr);
            }
            assert!(!ended.stderr.contains("listening on"), "{}", ended.stderr);
            assert!(!ended.stderr.contains("too short"), "a secret is never quoted");
        }
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_said_so_and_is_no_configuration_error() {
    let house = House::open().await;
    let state = folder();
    let taken = house.public.to_string();
    let ended = run(&["serve", "--listen", &taken, "--operator-listen", "127.0.0.1:0"], state.path()).await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains(&format!("cannot listen on {taken}")), "{}", ended.stderr);
}

// ---- the first start

#[tokio::test]
async fn the_first_start_makes_a_key_and_an_agent_and_the_second_makes_nothing() {
    let first = House::with(Plan { no_key: true, ..Plan::default() }).await;
    let state = first.dir.path().join("state");
    assert_eq!(mode(&state), 0o700);
    assert_eq!(mode(&state.join("signing-key.pem")), 0o600);
    assert_eq!(mode(&state.join("agents.toml")), 0o600);
    assert_eq!(mode(&state.join("first-agent.secret")), 0o600);
    let (id, secret) = first.first_agent();
    assert!(first.log().contains("first-agent.secret") && !first.log().contains(&secret), "the path alone is printed");
    let agents = std::fs::read_to_string(state.join("agents.toml")).unwrap();
    assert!(!agents.contains(&secret), "only its hash is kept");
    let ask = json!({ "client_id": id, "client_secret": secret, "grant_type": "client_credentials" });
    let reply = first.send(Request::post("/api/v1/auth/token", ask.clone())).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let token = reply.json()["access_token"].as_str().unwrap().to_owned();
    assert_eq!(first.send(Request::get("/api/tags").bearer(&token)).await.status, 200);

    let key = std::fs::read(state.join("signing-key.pem")).unwrap();
    first.signal(libc::SIGTERM);
    let mut first = first;
    assert!(first.exit().await.success());
    let env = vec![("BEHAVRY_STATE_DIR".to_owned(), state.display().to_string())];
    let second = House::with(Plan { env, no_key: true, ..Plan::default() }).await;
    assert!(!second.log().contains("a first agent"), "{}", second.log());
    assert_eq!(std::fs::read_to_string(state.join("agents.toml")).unwrap(), agents);
    assert_eq!(std::fs::read(state.join("signing-key.pem")).unwrap(), key);
    assert_eq!(second.send(Request::get("/api/tags").bearer(&token)).await.status, 200, "the token still holds");
    assert_eq!(second.send(Request::post("/api/v1/auth/token", ask)).await.status, 200);
}

#[tokio::test]
async fn on_a_terminal_the_first_start_shows_the_secret_and_keeps_it_nowhere() {
    let state = folder();
    let (mut terminal, end) = terminal();
    let mut serve = with_state(&["serve", "--listen", "127.0.0.1:0", "--operator-listen", "127.0.0.1:0"], state.path());
    serve.env("BEHAVRY_JWT_ALGORITHM", "EdDSA").stdout(std::process::Stdio::null()).stderr(end);
    let mut child = serve.spawn().expect("the program starts");
    drop(serve); // and with it our hold on the terminal's other end
    let printed = std::thread::spawn(move || {
        let (mut printed, mut some) = (Vec::new(), [0; 1024]);
        while !String::from_utf8_lossy(&printed).contains("operator listening on") {
            match std::io::Read::read(&mut terminal, &mut some) {
                Ok(0) | Err(_) => break,
                Ok(n) => printed.extend_from_slice(&some[..n]),
            }
        }
        String::from_utf8_lossy(&printed).into_owned()
    });
    let printed = printed.join().expect("it reads");
    let _ = child.kill();
    let _ = child.wait();
    let secret = printed.lines().find_map(|line| line.trim().strip_prefix("client_secret ")).expect(&printed).trim();
    assert_eq!(printed.matches(secret).count(), 1, "once");
    assert!(!state.path().join("first-agent.secret").exists());
    let agents = behavry_ollama_proxy::identity::agents::Agents::load(&state.path().join("agents.toml")).expect("made");
    let secret = behavry_ollama_proxy::identity::secret::Secret::new(secret.to_owned());
    assert!(agents.authenticate("demo-agent", &secret).is_ok());
}

/// A terminal: the side of who sits there, and the side of the program.
fn terminal() -> (std::fs::File, std::fs::File) {
    use std::os::fd::FromRawFd;
    let (mut ours, mut theirs) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: two descriptors are written; name, settings and size are not given.
    let opened = unsafe { libc::openpty(&mut ours, &mut theirs, none, none.cast(), none.cast()) };
    assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: both are open, and nobody else's.
    unsafe { (std::fs::File::from_raw_fd(ours), std::fs::File::from_raw_fd(theirs)) }
}

#[tokio::test]
async fn a_state_folder_that_others_can_read_does_not_hold_a_readable_key() {
    let dir = folder();
    let state = dir.path().join("state");
    let minted = run(&["token", "mint", "--agent", "a"], &state).await;
    assert_eq!(minted.code, Some(0));
    std::fs::set_permissions(state.join("signing-key.pem"), PermissionsExt::from_mode(0o640)).unwrap();
    let ended = run(&["check"], &state).await;
    assert_eq!(ended.code, CONFIGURATION, "{}", ended.stdout);
    assert!(ended.stderr.contains("signing-key.pem") && ended.stderr.contains("chmod"), "{}", ended.stderr);
}

// ---- the demo

#[tokio::test]
async fn the_demo_serves_two_requests_prints_lines_that_work_and_ends_at_ctrl_c() {
    let dir = folder();
    // A port that was free a moment ago, and at which nothing answers.
    let unused = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let mut command =
        with_state(&["demo", "--listen", "127.0.0.1:0", "--operator-listen", "127.0.0.1:0"], &dir.path().join("state"));
    command.env("BEHAVRY_OLLAMA_URL", format!("http://{unused}"));
    let mut demo = Demo::start(command);
    let printed = demo.until("python3 -c 'import os; from openai").await;
    assert!(printed.contains("a simulator stands in for Ollama"), "{printed}");
    assert!(printed.contains("== a native request, streamed") && printed.contains("\"done\":true"), "{printed}");
    assert!(printed.contains("== the same in OpenAI's words") && printed.contains("data: [DONE]"), "{printed}");
    let records: Vec<Value> = printed
        .lines()
        .filter(|line| line.starts_with('{') && line.contains("\"event_hash\":"))
        .map(|line| serde_json::from_str(line).expect("a record"))
        .collect();
    let finals = records.iter().filter(|record| record["extra"]["phase"] == "final").count();
    assert_eq!((records.len(), finals), (6, 2), "{printed}");
    for record in records.iter().filter(|record| record["extra"]["phase"] == "final") {
        assert_eq!((&record["policy_result"], &record["extra"]["outcome"]), (&json!("allow"), &json!("complete")));
        assert!(record["extra"]["output_tokens"].as_u64() > Some(0));
    }
    assert!(!printed.contains("the demo's requests failed"));

    // The printed lines, as a person pastes them.
    let line = |start: &str| printed.lines().find(|line| line.starts_with(start)).expect("printed").to_owned();
    let mut shell = Command::new("sh");
    let paste = format!("{}\n{}", line("export BEHAVRY_JWT="), line("curl -s "));
    shell.args(["-c", &paste]).env("no_proxy", "*").stdin(std::process::Stdio::null());
    if Command::new("curl").arg("--version").output().is_ok() {
        let pasted = run_to_end(shell).await;
        assert_eq!(pasted.code, Some(0), "{}", pasted.stderr);
        let last = pasted.stdout.lines().last().expect("lines").to_owned();
        assert!(last.contains("\"done\":true"), "{}", pasted.stdout);
    } else {
        eprintln!("skipped: curl is not installed");
    }
    demo.interrupt();
    assert_eq!(demo.ended().await, Some(0));
    assert_eq!(crate::house::segments(&dir.path().join("state/audit")).len(), 1);
}

/// A running demo and what it printed so far.
struct Demo {
    child: std::process::Child,
    printed: std::sync::Arc<std::sync::Mutex<String>>,
}

impl Demo {
    fn start(mut command: Command) -> Demo {
        use std::io::{BufRead, BufReader, Read};
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let printed = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let pipes: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("piped")), Box::new(child.stderr.take().expect("piped"))];
        for pipe in pipes {
            let printed = std::sync::Arc::clone(&printed);
            std::thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    let mut printed = printed.lock().expect("not poisoned");
                    printed.push_str(&line);
                    printed.push('\n');
                }
            });
        }
        Demo { child, printed }
    }

    async fn until(&self, words: &str) -> String {
        let began = std::time::Instant::now();
        loop {
            let printed = self.printed.lock().expect("not poisoned").clone();
            if printed.contains(words) {
                return printed;
            }
            assert!(began.elapsed() < 2 * PATIENCE, "{words:?} was not printed:\n{printed}");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    fn interrupt(&self) {
        // SAFETY: the child is ours and not yet waited for, so its number is not another's.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGINT) };
    }

    async fn ended(&mut self) -> Option<i32> {
        let child = &mut self.child;
        crate::house::wait_until("the demo's end", || child.try_wait().expect("waited for")).await.code()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_reader_that_has_enough_ends_a_command_without_a_complaint() {
    let home = tempfile::tempdir().expect("a folder");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_behavry-ollama-proxy"))
        .arg("check")
        .env_clear()
        .env("BEHAVRY_STATE_DIR", home.path())
        .env("BEHAVRY_JWT_ALGORITHM", "EdDSA") // a key of it is made at once
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    let done = child.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&done.stderr), "");
}
