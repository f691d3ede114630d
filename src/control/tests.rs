use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use serde_json::json;

use super::*;

/// Says what it was asked, as a proxy would do something.
async fn echo(request: Request) -> Reply {
    match request {
        Request::AgentChange(_) => Reply::Failed(Fault::configuration("the file is broken")),
        other => Reply::Done(serde_json::to_value(other).unwrap()),
    }
}

/// A served control socket, and the runtime that it lives on.
fn served(state_dir: &Path) -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let control = {
        let _inside = runtime.enter();
        open(state_dir).unwrap()
    };
    runtime.spawn(control.serve(echo, std::future::pending()));
    runtime
}

fn raw(state_dir: &Path, line: &[u8]) -> Reply {
    let mut stream = UnixStream::connect(socket_path(state_dir)).unwrap();
    stream.write_all(line).unwrap();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.ends_with('\n') && reply.lines().count() == 1, "one line: {reply}");
    serde_json::from_str(&reply).unwrap()
}

#[test]
fn a_command_is_answered_over_a_socket_that_only_its_owner_may_open() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let _runtime = served(&state);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket_path(&state)), 0o600);
    assert_eq!(mode(&state), 0o700);
    assert_eq!(mode(&state.join(LOCK)), 0o600);
    assert_eq!(ask(&state, &Request::Drain).unwrap(), json!({ "command": "drain" }));
    let change = Request::AgentChange(Change::Remove { id: "a".to_owned() });
    let Err(AskError::Refused(fault)) = ask(&state, &change) else { panic!("it was not refused") };
    assert_eq!(fault, Fault::configuration("the file is broken"));
}

#[test]
fn a_command_whose_answer_ends_the_proxy_has_its_answer() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().to_owned();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (close, mut closing) = tokio::sync::watch::channel(false);
    let answered = runtime.block_on(async {
        let control = open(root.path()).unwrap();
        let answer = move |_| {
            let close = close.clone();
            async move {
                close.send_replace(true);
                tokio::task::yield_now().await; // the end is on its way before the answer is
                Reply::Done(json!("ended"))
            }
        };
        let asked = tokio::task::spawn_blocking(move || ask(&state, &Request::Drain));
        control.serve(answer, async move { _ = closing.wait_for(|closed| *closed).await }).await;
        assert!(!socket_path(root.path()).exists());
        asked.await.unwrap().unwrap()
    });
    assert_eq!(answered, json!("ended"));
}

#[test]
fn whoever_says_nothing_holds_nobody_up() {
    let root = tempfile::tempdir().unwrap();
    let _runtime = served(root.path());
    let _silent = UnixStream::connect(socket_path(root.path())).unwrap();
    assert!(ask(root.path(), &Request::AgentList).is_ok());
}

#[test]
fn what_is_no_command_is_said_to_be_none_and_never_quoted() {
    let root = tempfile::tempdir().unwrap();
    let _runtime = served(root.path());
    let long = [vec![b'x'; MAX_REQUEST_BYTES as usize], b"\n".to_vec()].concat();
    for line in
        [&b"\n"[..], b"CANARY\n", b"{\"command\":\"CANARY\"}\n", b"{\"command\":\"drain\"}", b"\xff\n", b"", &long]
    {
        let Reply::Failed(fault) = raw(root.path(), line) else { panic!("it was taken: {} bytes", line.len()) };
        assert_eq!(fault.kind, FaultKind::Usage);
        assert!(!fault.what.contains("CANARY"));
    }
    assert!(ask(root.path(), &Request::AgentList).is_ok(), "it goes on answering");
    let id = "x".repeat(MAX_REQUEST_BYTES as usize);
    let large = Request::AgentChange(Change::Remove { id });
    assert!(matches!(ask(root.path(), &large), Err(AskError::TooLarge)));
}

#[test]
fn a_socket_that_a_crash_left_behind_is_replaced() {
    let root = tempfile::tempdir().unwrap();
    drop(UnixListener::bind(socket_path(root.path())).unwrap()); // std leaves the file
    assert!(ask(root.path(), &Request::Drain).unwrap_err().is_nobody_there());
    let _runtime = served(root.path());
    assert!(ask(root.path(), &Request::Drain).is_ok());
}

#[test]
fn a_second_proxy_on_the_folder_does_not_take_the_socket_before_the_first_ends() {
    let root = tempfile::tempdir().unwrap();
    let first = served(root.path());
    let _inside = first.enter();
    let Err(error) = open(root.path()) else { panic!("two have one socket") };
    assert!(matches!(error, OpenError::Taken { .. }));
    assert!(error.to_string().contains("state_dir of its own"), "{error}");
    assert!(ask(root.path(), &Request::Drain).is_ok(), "the first one still answers");
    drop(_inside);
    drop(first);
    assert!(!socket_path(root.path()).exists(), "it is gone with its proxy");
    assert!(ask(root.path(), &Request::Drain).unwrap_err().is_nobody_there());
    let _second = served(root.path());
    assert!(ask(root.path(), &Request::Drain).is_ok());
}

#[test]
fn a_path_that_is_too_long_for_a_socket_is_said_so_on_both_sides() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("x".repeat(MAX_PATH_BYTES));
    let Err(error) = open(&state) else { panic!("it was opened") };
    assert!(error.to_string().contains("shorter state_dir"), "{error}");
    assert!(!state.exists(), "nothing was made");
    let error = ask(&state, &Request::Drain).unwrap_err();
    assert!(error.is_nobody_there() && error.to_string().contains("shorter state_dir"), "{error}");
    // The longest that fits does.
    let room = MAX_PATH_BYTES - 1 - SOCKET.len() - 1 - root.path().as_os_str().len() - 1;
    let state = root.path().join("x".repeat(room));
    let _runtime = served(&state);
    assert!(ask(&state, &Request::Drain).is_ok());
}

#[test]
fn an_answer_that_is_cut_short_is_not_taken_for_one() {
    let root = tempfile::tempdir().unwrap();
    for answer in [&b""[..], b"{\"done\":{}", b"HTTP/1.1 400\r\n\r\n"] {
        let path = socket_path(root.path());
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let other = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(answer);
        });
        let error = ask(root.path(), &Request::Drain).unwrap_err();
        assert!(matches!(error, AskError::Broken { .. }) && !error.is_nobody_there(), "{error}");
        other.join().unwrap();
    }
}

#[test]
fn only_root_and_the_proxys_own_user_are_answered() {
    assert!(may_command(1000, 1000));
    assert!(may_command(0, 1000));
    assert!(!may_command(1001, 1000));
    assert!(!may_command(1000, 0));
}
