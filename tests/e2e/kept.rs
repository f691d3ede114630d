//! Everything that a proxy keeps or shows, as text: what tests of privacy search.
//!
//! A new place where something is written, or a new page, file or command that shows something, is a line in [`Kept::of`].

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{Connection, Request};
use crate::house::{House, PATIENCE, program, run_to_end};

/// What was kept and shown, each with its place.
pub struct Kept(pub Vec<(String, String)>);

impl Kept {
    /// Of a house whose last exchange had this request id: its record is there, and so are those before it.
    pub async fn of(house: &House, last: &str) -> Kept {
        house.final_of(last).await;
        let mut kept = Kept(Vec::new());
        // The file, and standard output with the log: audit.stdout is on by default.
        kept.add("audit", house.audit_text());
        kept.add("log and standard output", house.log());
        // Other sinks of the audit: here, one line for each.
        kept.add("metrics", house.metrics().await);
        for path in ["/", "/api/v1/activity", "/livez", "/readyz"] {
            kept.add(path, Request::get(path).send(house.operator).await.text());
        }
        kept.add("feed", feed(house, last).await);
        for arguments in [
            &["tail", "--all", "-n", "100000"][..],
            &["report"],
            &["report", "--json"],
            &["verify"],
            &["verify", "--json"],
        ] {
            kept.add(&format!("audit {}", arguments.join(" ")), audit(house, arguments).await);
        }
        let package = house.dir.path().join("package.zip").display().to_string();
        kept.add("audit export", audit(house, &["export", "--package", &package]).await);
        // Its members are stored as they are.
        let package = std::fs::read(&package).expect("the package");
        assert!(package.starts_with(b"PK") && package.len() > 1000, "{} bytes", package.len());
        kept.add("package", String::from_utf8_lossy(&package).into_owned());
        for line in [r#"{"command":"agent-list"}"#, r#"{"command":"reload"}"#] {
            kept.add("control socket", control(house, line).await);
        }
        kept.add_folder(&house.dir.path().join("state"));
        kept
    }

    pub fn add(&mut self, place: &str, text: String) {
        assert!(!text.is_empty(), "{place} is empty: what is searched has to be there");
        self.0.push((place.to_owned(), text));
    }

    /// The lines in which one of these words is found, in any case, each behind its place.
    pub fn find(&self, words: &[&str]) -> Vec<String> {
        let mut found = Vec::new();
        for (place, text) in &self.0 {
            let lines = text.lines().filter(|line| {
                let line = line.to_lowercase();
                words.iter().any(|word| line.contains(word))
            });
            found.extend(lines.map(|line| format!("{place}: {line}")));
        }
        found
    }

    /// The files of the state folder, beside the audit's segments: keys, agents, revocations, what was fetched.
    fn add_folder(&mut self, folder: &std::path::Path) {
        for entry in std::fs::read_dir(folder).expect("a folder").map_while(Result::ok) {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                let bytes = std::fs::read(&path).expect("a file of ours");
                self.0.push((path.display().to_string(), String::from_utf8_lossy(&bytes).into_owned()));
            }
        }
    }
}

/// The operator's feed as a new watcher gets it: with the last request's final record, and what runs.
async fn feed(house: &House, last: &str) -> String {
    let mut connection = Connection::open(house.operator).await;
    connection.send(&Request::get("/api/v1/audit/stream?running=1")).await;
    assert_eq!(connection.head().await.expect("a head").0, 200);
    let mut text = String::new();
    let both = async {
        let last = format!(r#""request_id":"{last}""#);
        while !text.contains(&last) || !text.contains("event: running") || !text.contains("event: backends") {
            let chunk = connection.chunk().await.expect("the feed goes on").expect("a chunk");
            text.push_str(&String::from_utf8_lossy(&chunk));
        }
    };
    tokio::time::timeout(PATIENCE, both).await.expect("the feed shows the last request");
    text
}

/// A command's own words and what it printed.
async fn audit(house: &House, arguments: &[&str]) -> String {
    let mut command = program(&[&["audit"], arguments].concat());
    command.env("BEHAVRY_STATE_DIR", house.dir.path().join("state"));
    let ended = run_to_end(command).await;
    assert_eq!(ended.code, Some(0), "audit {}: {}", arguments.join(" "), ended.stderr);
    ended.stdout + &ended.stderr
}

/// One line to the control socket, and its answer.
pub async fn control(house: &House, line: &str) -> String {
    let path = house.dir.path().join("state/control.sock");
    let mut socket = tokio::net::UnixStream::connect(path).await.expect("the control socket");
    let asked = async {
        socket.write_all(format!("{line}\n").as_bytes()).await.expect("written");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.expect("read");
        answer
    };
    tokio::time::timeout(PATIENCE, asked).await.expect("an answer")
}
