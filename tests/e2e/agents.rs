//! `agent ..`, `drain` and `reload`: commands against a proxy that runs, and against the files of one that does not.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::client::{Reply, Request};
use crate::house::{Ended, House, PATIENCE, Plan, program, run_to_end, wait_until};

/// A command for the proxy of a state folder.
fn command(arguments: &[&str], state: &Path) -> Command {
    let mut command = program(arguments);
    command.env("BEHAVRY_STATE_DIR", state);
    command
}

async fn run(arguments: &[&str], state: &Path) -> Ended {
    run_to_end(command(arguments, state)).await
}

#[track_caller]
fn good(ended: Ended) -> Ended {
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    ended
}

fn state(house: &House) -> PathBuf {
    house.dir.path().join("state")
}

/// A proxy whose only watcher of the policy is asleep: what it takes at once, it was told.
async fn house() -> House {
    House::with(Plan { config: "[policy]\nreload_s = 600".to_owned(), ..Plan::default() }).await
}

async fn ask_token(house: &House, id: &str, secret: &str) -> Reply {
    let ask = json!({ "client_id": id, "client_secret": secret, "grant_type": "client_credentials" });
    house.send(Request::post("/api/v1/auth/token", ask)).await
}

/// Adds an agent and gives its secret.
async fn add(state: &Path, id: &str, more: &[&str]) -> String {
    let added = good(run(&[&["agent", "add", id, "--json"], more].concat(), state).await);
    secret_of(&added, id)
}

fn secret_of(shown: &Ended, id: &str) -> String {
    let shown: Value = serde_json::from_str(&shown.stdout).expect("JSON");
    assert_eq!(shown["client_id"], id);
    shown["client_secret"].as_str().expect("a secret").to_owned()
}

fn agents_file(state: &Path) -> PathBuf {
    state.join("agents.toml")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("it is there")
}

// ---- a proxy that runs

#[tokio::test]
async fn a_new_agents_token_works_when_the_command_returns() {
    let house = house().await;
    let state = state(&house);
    let secret = add(&state, "fresh", &["--role", "internal", "--risk-tier", "low", "--name", "Fresh one"]).await;
    let granted = ask_token(&house, "fresh", &secret).await;
    assert_eq!(granted.status, 200, "{}", granted.text());
    let granted = granted.json();
    assert_eq!((&granted["agent_id"], &granted["risk_tier"]), (&json!("fresh"), &json!("low")));
    let token = granted["access_token"].as_str().expect("a token");
    let chat = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }], "stream": false });
    let reply = house.send(Request::post("/api/chat", chat).bearer(token).id("fresh-1")).await;
    assert_eq!(reply.status, 200, "without --permission it may read and infer: {}", reply.text());
    assert_eq!(house.final_of("fresh-1").await["extra"]["agent_roles"], json!(["internal"]));
    assert!(!read(&agents_file(&state)).contains(&secret), "only its hash is kept");
    assert!(!house.log().contains(&secret));

    let reader = add(&state, "reader", &["--permission", "web:read"]).await;
    let token = ask_token(&house, "reader", &reader).await.json()["access_token"].as_str().expect("one").to_owned();
    let chat = json!({ "model": "tiny", "messages": [] });
    assert_eq!(house.send(Request::post("/api/chat", chat).bearer(&token)).await.status, 403);
}

#[tokio::test]
async fn suspend_resume_rotate_and_remove_are_in_force_when_they_return() {
    let house = house().await;
    let state = state(&house);
    let first = add(&state, "worker", &[]).await;
    assert_eq!(ask_token(&house, "worker", &first).await.status, 200);

    good(run(&["agent", "suspend", "worker"], &state).await);
    let refused = ask_token(&house, "worker", &first).await;
    assert_eq!((refused.status, refused.json()["error"].clone()), (403, json!("unauthorized_client")));
    assert_eq!(ask_token(&house, "worker", "wrong").await.status, 401, "only who has the secret is told");
    good(run(&["agent", "resume", "worker"], &state).await);
    assert_eq!(ask_token(&house, "worker", &first).await.status, 200);

    let second = secret_of(&good(run(&["agent", "rotate-secret", "worker", "--json"], &state).await), "worker");
    assert_ne!(first, second);
    assert_eq!(ask_token(&house, "worker", &first).await.status, 401, "the old secret is worth nothing");
    assert_eq!(ask_token(&house, "worker", &second).await.status, 200);

    good(run(&["agent", "remove", "worker"], &state).await);
    assert_eq!(ask_token(&house, "worker", &second).await.status, 401);
    let again = run(&["agent", "remove", "worker"], &state).await;
    assert_eq!(again.code, Some(1));
    assert!(again.stderr.contains("no agent \"worker\""), "{}", again.stderr);
    assert!(!house.log().contains(&second));
}

#[tokio::test]
async fn the_list_shows_what_is_in_force_and_no_hash() {
    let house = house().await;
    let state = state(&house);
    add(&state, "lister", &["--role", "a", "--role", "b", "--name", "The lister"]).await;
    good(run(&["agent", "suspend", "lister"], &state).await);
    let table = good(run(&["agent", "list"], &state).await).stdout;
    let line = table.lines().find(|line| line.starts_with("lister ")).expect("a line");
    for words in ["suspended", "a,b", "web:read,web:write", "The lister"] {
        assert!(line.contains(words), "{words} is not in {line}");
    }
    let listed = good(run(&["agent", "list", "--json"], &state).await).stdout;
    let shown: Value = serde_json::from_str(&listed).expect("JSON");
    let ours = shown.as_array().expect("a list").iter().find(|agent| agent["id"] == "lister").expect("listed");
    assert_eq!((&ours["state"], &ours["roles"]), (&json!("suspended"), &json!(["a", "b"])));
    for printed in [table, listed] {
        assert!(!printed.contains("argon2") && !printed.contains("hash"), "{printed}");
    }

    // A broken file changes nothing of what is in force.
    std::fs::write(agents_file(&state), "[[agent]\n").unwrap();
    let listed = good(run(&["agent", "list"], &state).await).stdout;
    assert!(listed.contains("lister"), "{listed}");
}

#[tokio::test]
async fn a_broken_file_is_named_by_the_command_and_left_as_it_is() {
    let house = house().await;
    let state = state(&house);
    let secret = add(&state, "steady", &[]).await;
    let good_text = read(&agents_file(&state));
    let broken = format!("{good_text}\n[[agent]]\nid = \"steady\"\n");
    std::fs::write(agents_file(&state), &broken).unwrap();
    for arguments in [&["agent", "add", "new"][..], &["agent", "suspend", "steady"], &["reload"]] {
        let ended = run(arguments, &state).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(78), ""), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains("agents.toml:") && ended.stderr.contains("twice"), "{}", ended.stderr);
    }
    assert_eq!(read(&agents_file(&state)), broken);
    assert_eq!(ask_token(&house, "steady", &secret).await.status, 200, "the last good agents stay");
    let metrics = house.metrics().await;
    assert!(!metrics.contains("reload_failures_total{what=\"agents\"} 0"), "{metrics}");
    assert!(metrics.contains("reload_failures_total{what=\"policy\"} 0"), "{metrics}");
    std::fs::write(agents_file(&state), &good_text).unwrap();
    good(run(&["reload"], &state).await);
    good(run(&["agent", "suspend", "steady"], &state).await);
}

#[tokio::test]
async fn commands_at_once_lose_no_agent() {
    let house = house().await;
    let state = state(&house);
    let ids: Vec<String> = (0..8).map(|n| format!("agent-{n}")).collect();
    let added = ids.iter().map(|id| run_to_end(command(&["agent", "add", id], &state)));
    for ended in futures::future::join_all(added).await {
        good(ended);
    }
    let listed = good(run(&["agent", "list"], &state).await).stdout;
    for id in ids {
        assert!(listed.contains(&id), "{id} is lost:\n{listed}");
    }
}

#[tokio::test]
async fn an_edit_by_hand_is_seen_within_a_second_whatever_the_policys_pace() {
    let house = house().await;
    let state = state(&house);
    let secret = add(&state, "worker", &[]).await;
    let text = read(&agents_file(&state));
    let end = text.rfind("state = \"active\"").expect("a state");
    let suspended = format!("{}{}", &text[..end], text[end..].replacen("active", "suspended", 1));
    std::fs::write(agents_file(&state), suspended).unwrap();
    let began = std::time::Instant::now();
    while ask_token(&house, "worker", &secret).await.status != 403 {
        assert!(began.elapsed() < PATIENCE, "it was not seen:\n{}", house.log());
    }
}

#[tokio::test]
async fn a_file_that_vanishes_leaves_the_last_good_agents() {
    let house = house().await;
    let state = state(&house);
    let secret = add(&state, "worker", &[]).await;
    std::fs::remove_file(agents_file(&state)).unwrap();
    wait_until("the loss is seen", || house.log().contains("agents not reloaded").then_some(())).await;
    assert_eq!(ask_token(&house, "worker", &secret).await.status, 200);
    assert!(house.log().contains("is gone; restore it"), "{}", house.log());
}

#[tokio::test]
async fn drain_ends_the_proxy_as_sigterm_does() {
    let mut house = house().await;
    let state = state(&house);
    let ended = good(run(&["drain"], &state).await);
    assert!(ended.stdout.contains("0 requests run") && ended.stdout.contains("30 s"), "{}", ended.stdout);
    assert_eq!(house.exit().await.code(), Some(0));
    assert!(!state.join("control.sock").exists(), "the socket is gone with its proxy");
    let again = run(&["drain"], &state).await;
    assert_eq!(again.code, Some(1));
    assert!(again.stderr.contains("no proxy answers at"), "{}", again.stderr);
}

#[tokio::test]
async fn the_socket_is_its_owners_alone_and_a_stranger_who_gets_to_it_is_refused() {
    let house = house().await;
    let state = state(&house);
    let socket = state.join("control.sock");
    let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&socket), mode(&state)), (0o600, 0o700));
    if std::fs::metadata(&socket).expect("there").uid() != 0 {
        eprintln!("skipped: only root can run a command as somebody else");
        return;
    }
    // As if somebody had opened every door to it. The stranger speaks by hand: the program may be where it cannot read.
    for path in [house.dir.path(), state.as_path()] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let knock = |mode: u32| {
        std::fs::set_permissions(&socket, PermissionsExt::from_mode(mode)).unwrap();
        let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
                      s.sendall(b'{\"command\":\"drain\"}\\n')\nprint(s.makefile().read())";
        let mut python = Command::new("python3");
        std::os::unix::process::CommandExt::uid(&mut python, 65534);
        python.args(["-c", script]).arg(&socket).current_dir("/").stdin(std::process::Stdio::null());
        run_to_end(python)
    };
    let outside = knock(0o600).await;
    assert!(outside.stderr.contains("PermissionError"), "{}{}", outside.stdout, outside.stderr);
    let inside = knock(0o666).await;
    assert!(inside.stdout.contains("\"failed\"") && inside.stdout.contains("use sudo"), "{}", inside.stderr);
    assert!(good(run(&["agent", "list"], &state).await).stderr.is_empty(), "it still runs");
}

#[tokio::test]
async fn a_second_proxy_on_the_state_folder_leaves_the_socket_to_the_first_and_takes_it_over() {
    let mut first = house().await;
    let state = state(&first);
    let env = vec![("BEHAVRY_STATE_DIR".to_owned(), state.display().to_string())];
    let second = House::with(Plan { env, ..Plan::default() }).await;
    // It says so beside telling where it listens, in no order.
    let told = || second.log().contains("another proxy runs on this state folder").then_some(());
    wait_until("its word that it has no socket", told).await;
    let secret = add(&state, "both", &[]).await;
    assert_eq!(ask_token(&first, "both", &secret).await.status, 200, "the first was asked");
    let began = std::time::Instant::now();
    while ask_token(&second, "both", &secret).await.status != 200 {
        assert!(began.elapsed() < PATIENCE, "the second watches the file");
    }
    good(run(&["drain"], &state).await);
    assert_eq!(first.exit().await.code(), Some(0));
    let began = std::time::Instant::now();
    while run(&["reload"], &state).await.code != Some(0) {
        assert!(began.elapsed() < PATIENCE, "the second did not take over");
    }
    assert_eq!(second.get("/api/version").await.status, 200);
}

// ---- no proxy

#[tokio::test]
async fn without_a_proxy_every_command_edits_the_file_and_says_so() {
    let dir = tempfile::tempdir().expect("a folder");
    let state = dir.path().join("state");
    let none = run(&["agent", "list"], &state).await;
    assert_eq!(none.code, Some(78), "{}", none.stdout);
    let added = good(run(&["agent", "add", "early", "--role", "internal"], &state).await);
    assert!(added.stdout.contains("client_secret  ") && added.stdout.contains("only this once"), "{}", added.stdout);
    assert!(added.stderr.contains("no proxy answers at") && added.stderr.contains("agents.toml was edited"));
    let file = agents_file(&state);
    assert_eq!(std::fs::metadata(&file).expect("made").mode() & 0o777, 0o600);
    let secret = secret_of(&good(run(&["agent", "rotate-secret", "early", "--json"], &state).await), "early");
    good(run(&["agent", "suspend", "early"], &state).await);
    assert!(good(run(&["agent", "list"], &state).await).stdout.contains("suspended"));
    good(run(&["agent", "resume", "early"], &state).await);
    good(run(&["agent", "add", "other"], &state).await);
    good(run(&["agent", "remove", "other"], &state).await);

    std::fs::write(&file, format!("# ours\n{}", read(&file))).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
    good(run(&["agent", "add", "third"], &state).await);
    assert!(read(&file).starts_with("# ours\n"), "comments stay");
    assert_eq!(std::fs::metadata(&file).expect("there").mode() & 0o777, 0o640, "its mode stays");

    for (arguments, code, words) in [
        (&["agent", "add", "early"][..], 1, "already"),
        (&["agent", "add", "a\u{1b}b"], 64, "`id`"),
        (&["agent", "suspend", "nobody"], 1, "no agent"),
        (&["agent", "rotate-secret", "nobody", "--json"], 1, "no agent"),
        (&["agent", "add"], 64, "ID"),
        (&["agent"], 64, "add"),
        (&["reload"], 1, "no proxy answers"),
    ] {
        let ended = run(arguments, &state).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), ""), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(words), "{arguments:?}: {}", ended.stderr);
    }

    // Who was added before the first start is there, and no first agent is made beside.
    let env = vec![("BEHAVRY_STATE_DIR".to_owned(), state.display().to_string())];
    let house = House::with(Plan { env, ..Plan::default() }).await;
    assert_eq!(ask_token(&house, "early", &secret).await.status, 200);
    assert!(!read(&file).contains("demo-agent"));
}

/// Root's edit must not take the file away from the user that the service runs as.
#[tokio::test]
async fn an_edit_by_root_leaves_the_file_to_its_owner() {
    let dir = tempfile::tempdir().expect("a folder");
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    if std::os::unix::fs::chown(&state, Some(65534), Some(65534)).is_err() {
        eprintln!("skipped: only root can give a folder away");
        return;
    }
    let owner = || std::fs::metadata(agents_file(&state)).expect("there").uid();
    good(run(&["agent", "add", "a"], &state).await);
    assert_eq!(owner(), 65534, "a new file belongs to the folder's owner");
    good(run(&["agent", "suspend", "a"], &state).await);
    assert_eq!(owner(), 65534);
    let left: Vec<_> = std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["agents.toml"], "nothing of root's stays behind");
}

// ---- keys

#[tokio::test]
async fn a_device_is_tied_and_taken_away_by_command_and_both_are_in_force_when_they_return() {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use ed25519_dalek::{Signer, SigningKey};

    let house = house().await;
    let state = state(&house);
    add(&state, "ann", &[]).await;
    add(&state, "bob", &[]).await;
    let device = SigningKey::from_bytes(&[9; 32]);
    let blob = [&b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..], device.verifying_key().as_bytes()].concat();
    let blob = STANDARD.encode(blob);
    let ask = || async {
        let ts = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
        let signature = device.sign(format!("GET,/api/tags?ts={ts}").as_bytes());
        let value = format!("{blob}:{}", STANDARD.encode(signature.to_bytes()));
        house.send(Request::get(&format!("/api/tags?ts={ts}")).header("authorization", &value)).await.status
    };
    assert_eq!(ask().await, 401);
    // As words, as a shell gives the line of the file.
    let added = good(run(&["agent", "add-key", "ann", "ssh-ed25519", &blob, "me@laptop"], &state).await);
    let fingerprint =
        added.stdout.split_whitespace().find(|word| word.starts_with("SHA256:")).expect("shown").to_owned();
    assert_eq!(ask().await, 200);
    let taken = run(&["agent", "add-key", "bob", &format!("ssh-ed25519 {blob}")], &state).await;
    assert_eq!(taken.code, Some(1));
    assert!(taken.stderr.contains("agent \"ann\" already"), "{}", taken.stderr);
    good(run(&["agent", "suspend", "ann"], &state).await);
    assert_eq!(ask().await, 401);
    good(run(&["agent", "resume", "ann"], &state).await);
    assert_eq!(ask().await, 200);
    good(run(&["agent", "remove-key", "ann", &fingerprint], &state).await);
    assert_eq!(ask().await, 401);
    for bad in ["ssh-rsa AAAA", "SHA256:abc", "-----BEGIN OPENSSH PRIVATE KEY-----"] {
        let refused = run(&["agent", "add-key", "ann", "--", bad], &state).await;
        assert_eq!(refused.code, Some(64), "{bad}");
        assert!(refused.stderr.contains("ed25519"), "{}", refused.stderr);
    }
}

#[tokio::test]
async fn an_api_key_is_shown_once_and_kept_as_a_hash_until_it_is_removed() {
    let config = "[policy]\nreload_s = 600\n[identity]\napi_keys = true".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let state = state(&house);
    add(&state, "ann", &[]).await;
    let with_config = |arguments: &[&str]| {
        let mut command = command(arguments, &state);
        command.env("BEHAVRY_CONFIG", house.dir.path().join("proxy.toml"));
        run_to_end(command)
    };
    let shown = good(with_config(&["agent", "add-api-key", "ann", "--name", "ci", "--json"]).await);
    assert_eq!(shown.stderr, "", "keys are on, so nothing is said of that");
    let shown: Value = serde_json::from_str(&shown.stdout).expect("JSON");
    let key = shown["api_key"].as_str().expect("a key").to_owned();
    let ask = || async { house.send(Request::get("/api/tags").header("x-api-key", &key).id("keyed")).await.status };
    assert_eq!(ask().await, 200);
    assert_eq!(house.final_of("keyed").await["session_id"], shown["session_id"]);
    assert!(!read(&agents_file(&state)).contains(&key) && !house.log().contains(&key));
    let twice = with_config(&["agent", "add-api-key", "ann", "--name", "ci"]).await;
    assert_eq!((twice.code, twice.stdout.as_str()), (Some(64), ""), "no key is shown that was not kept");
    good(with_config(&["agent", "remove-api-key", "ann", "ci"]).await);
    assert_eq!(ask().await, 401);
    let again = with_config(&["agent", "remove-api-key", "ann", "ci"]).await;
    assert_eq!(again.code, Some(1));

    let off = good(run(&["agent", "add-api-key", "ann"], &state).await);
    assert!(off.stdout.contains("bop_") && off.stderr.contains("identity.api_keys"), "{}{}", off.stdout, off.stderr);
}
