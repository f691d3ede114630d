//! `audit verify`, `tail`, `report` and `export` on what the proxy itself has written.

use std::process::Command;

use serde_json::{Value, json};

use crate::house::{Ended, House, program, run_to_end, segments};

/// A house whose proxy has served three requests and ended in order.
async fn ended_house() -> House {
    let mut house = House::open().await;
    for _ in 0..3 {
        let body = json!({ "model": "tiny-story", "messages": [{ "role": "user", "content": "hi" }], "stream": false });
        assert_eq!(house.post("/api/chat", body).await.status, 200);
    }
    house.signal(libc::SIGTERM);
    house.exit().await;
    house
}

async fn audit(house: &House, arguments: &[&str]) -> Ended {
    let mut command = program(&[&["audit"], arguments].concat());
    command.env("BEHAVRY_STATE_DIR", house.dir.path().join("state"));
    run_to_end(command).await
}

#[tokio::test]
async fn verify_says_by_its_exit_code_and_the_records_place_whether_the_audit_holds() {
    let house = ended_house().await;
    let held = audit(&house, &["verify"]).await;
    assert_eq!(held.code, Some(0), "{}{}", held.stdout, held.stderr);

    let segment = segments(&house.audit_dir()).remove(0);
    let text = std::fs::read_to_string(&segment).expect("the segment");
    let (place, line) =
        text.lines().enumerate().find(|(_, line)| line.contains(r#""phase":"final""#)).expect("a final");
    let edited = text.replacen(line, &line.replace(r#""policy_result":"allow""#, r#""policy_result":"deny""#), 1);
    assert_ne!(edited, text);
    std::fs::write(&segment, edited).expect("written");
    let broken = audit(&house, &["verify"]).await;
    assert_eq!(broken.code, Some(1), "{}", broken.stdout);
    let name = segment.file_name().and_then(|name| name.to_str()).expect("a name");
    let named = format!("{name} line {} ", place + 1);
    assert!(broken.stdout.contains(&named), "{named} not in\n{}", broken.stdout);

    std::fs::remove_dir_all(house.audit_dir()).expect("removed");
    assert_eq!(audit(&house, &["verify"]).await.code, Some(2), "nothing there is no proof of anything");
    assert_eq!(audit(&house, &["verify", "--no-such-flag"]).await.code, Some(2));
}

#[tokio::test]
async fn tail_gives_the_lines_of_the_file_and_report_what_they_come_to() {
    let house = ended_house().await;
    let tail = audit(&house, &["tail", "-n", "2"]).await;
    assert_eq!(tail.code, Some(0), "{}", tail.stderr);
    let (shown, written) = (tail.stdout.lines().collect::<Vec<_>>(), house.audit_text());
    assert_eq!(shown.len(), 2);
    assert!(shown.iter().all(|line| written.lines().any(|one| one == *line)));
    let last: Value = serde_json::from_str(shown[1]).expect("JSON when piped");
    assert_eq!((&last["extra"]["phase"], &last["extra"]["outcome"]), (&json!("final"), &json!("complete")));

    let report = audit(&house, &["report", "--json"]).await;
    assert_eq!(report.code, Some(0), "{}", report.stderr);
    assert!(report.stdout.contains("tiny-story") && !report.stdout.contains("\"hi\""), "{}", report.stdout);
}

#[tokio::test]
async fn an_exported_package_holds_for_a_checker_that_knows_only_the_format() {
    let house = ended_house().await;
    let path = |name: &str| house.dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (package, anchor) = (path("evidence.zip"), path("anchor.json"));
    let exported = audit(&house, &["export", "--package", &package, "--trust-anchor", &anchor]).await;
    assert_eq!(exported.code, Some(0), "{}", exported.stderr);
    let checker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdk/check_package.py");
    let mut python = Command::new("python3");
    python.args(["-B", checker, &package, &anchor]);
    let checked = run_to_end(python).await;
    assert_eq!(checked.code, Some(0), "{}{}", checked.stdout, checked.stderr);
}
