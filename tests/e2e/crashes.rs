//! The audit's chain on disk: kill -9, two processes, rotation, a full disk, retention (contract, section 6; promises I3, I4, I7).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use behavry_ollama_proxy::ledger::chain::{self, Head, SegmentName, WriterName};
use behavry_ollama_proxy::simulator::SimulatorOptions;
use serde_json::{Value, json};

use crate::client::{Connection, Request};
use crate::house::{House, PATIENCE, Plan, program, read_lines, run_to_end, segments, wait_until};

/// How often the program is killed; `BEHAVRY_TEST_KILLS` sets another number (tests/long).
const KILLS: usize = 20;

fn chat(model: &str) -> Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] })
}

/// Every line of every segment, each chain checked from its first line that is there to its last. A torn line may stand only at the
/// end of a chain whose process was killed.
fn checked(dir: &Path) -> Vec<Value> {
    let mut heads: BTreeMap<WriterName, Head> = BTreeMap::new();
    let mut found = Vec::new();
    for path in segments(dir) {
        let name: SegmentName = path.file_name().and_then(|name| name.to_str()).expect("a name").parse().expect("ours");
        let text = std::fs::read(&path).expect("a segment");
        for line in text.split_inclusive(|byte| *byte == b'\n').filter_map(|line| line.strip_suffix(b"\n")) {
            let sealed = chain::open(line).expect("a line");
            assert!(sealed.is_intact(), "{name}");
            if let Some(head) = heads.insert(name.writer, sealed.hash) {
                assert_eq!(sealed.previous, head, "{name}");
            }
            found.push(serde_json::from_slice(line).expect("JSON"));
        }
    }
    found
}

/// What `audit verify` has against the audit of a house: nothing, where it holds.
async fn verified(house: &House) -> String {
    let mut command = program(&["audit", "verify", "--json"]);
    command.env("BEHAVRY_STATE_DIR", house.dir.path().join("state"));
    let ended = run_to_end(command).await;
    if ended.code == Some(0) { String::new() } else { format!("{}{}", ended.stdout, ended.stderr) }
}

/// How many records of this phase each request id has.
fn counted(lines: &[Value], phase: &str) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for line in lines.iter().filter(|line| line["extra"]["phase"] == phase) {
        if let Some(id) = line["extra"]["request_id"].as_str() {
            *counts.entry(id.to_owned()).or_default() += 1;
        }
    }
    counts
}

/// Sends requests over its own connections until the program is gone.
async fn load(address: std::net::SocketAddr, token: String, worker: String) {
    for n in 0.. {
        let model = ["llama3.2", "fault-stalls-mid-stream", "tiny-story", "mistral"][n % 4];
        let request = Request::post("/api/chat", chat(model)).bearer(&token).id(&format!("{worker}-{n}"));
        let Ok(stream) = tokio::net::TcpStream::connect(address).await else { return };
        drop(stream);
        let mut connection = Connection::open(address).await;
        connection.send(&request).await;
        let reply = tokio::time::timeout(Duration::from_millis(20), connection.reply(false));
        if matches!(reply.await, Ok(None)) {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_kill_9_at_any_moment_each_request_that_a_backend_saw_has_one_request_record_and_one_final() {
    let kills = std::env::var("BEHAVRY_TEST_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS);
    let simulator = SimulatorOptions { tokens_per_second: 2000.0, ..SimulatorOptions::for_tests() };
    // Small segments, so that a kill falls into a rotation now and then.
    let config = "[audit]\nrotate_bytes = 20000\ncheckpoint_s = 1".to_owned();
    let mut house = House::with(Plan { simulator, config, ..Plan::default() }).await;
    for kill in 0..kills {
        let (address, token) = (house.public, house.token());
        let load: Vec<_> =
            (0..6).map(|worker| tokio::spawn(load(address, token.clone(), format!("{kill}-{worker}")))).collect();
        // Any moment will do. Most are when some requests have been seen, however slow the machine is; a few are whenever.
        let before = house.simulator.seen().len();
        let more = if kill % 4 == 0 { 0 } else { 1 + rand::random::<u32>() as usize % 8 };
        house.simulator.wait_for(PATIENCE, |seen| seen.len() >= before + more).await.expect("the load goes on");
        tokio::time::sleep(Duration::from_micros(rand::random::<u64>() % 20_000)).await;
        house.signal(libc::SIGKILL);
        for load in load {
            load.abort();
            let _ = load.await;
        }
        house.restart().await;
    }
    let lines = checked(&house.audit_dir());
    let (requests, finals) = (counted(&lines, "request"), counted(&lines, "final"));
    let seen: Vec<String> =
        house.simulator.seen().iter().filter_map(|one| one.header("x-request-id").map(str::to_owned)).collect();
    assert!(seen.len() >= kills * 3 / 4, "{} requests reached the backend", seen.len());
    for id in &seen {
        assert_eq!((requests.get(id), finals.get(id)), (Some(&1), Some(&1)), "{id}");
    }
    for (id, count) in &requests {
        assert_eq!((*count, finals.get(id)), (1, Some(&1)), "{id}");
    }
    let crashed = lines.iter().filter(|line| line["extra"]["outcome"] == "crashed").count();
    assert!(crashed > 0, "some of {} requests were open", requests.len());
    assert_eq!(verified(&house).await, "");
    eprintln!("{kills} kills, {} requests, {} at the backend, {crashed} crashed", requests.len(), seen.len());
}

#[tokio::test]
async fn kill_9_in_the_middle_of_streams_leaves_whole_lines_and_each_is_recorded_as_crashed() {
    let mut house = House::open().await;
    let token = house.token();
    let mut connections = Vec::new();
    for n in 0..20 {
        let mut connection = Connection::open(house.public).await;
        let ask = Request::post("/api/chat", chat("fault-stalls-mid-stream")).bearer(&token).id(&format!("cut-{n}"));
        connection.send(&ask).await;
        connection.head().await.expect("a head");
        connections.push(connection);
    }
    house.signal(libc::SIGKILL);
    house.restart().await;
    let dead = segments(&house.audit_dir()).swap_remove(0);
    assert!(std::fs::read_to_string(dead).expect("the dead segment").ends_with('\n'));
    for n in 0..20 {
        let last = house.final_of(&format!("cut-{n}")).await;
        assert_eq!(last["extra"]["outcome"], "crashed");
        assert_eq!(last["agent_id"], "tester");
    }
    assert!(house.metrics().await.contains("behavry_ollama_audit_crashed_requests_total 20"));
}

#[tokio::test]
async fn an_end_in_order_closes_the_segment_with_a_checkpoint_and_the_next_start_takes_nothing_over() {
    let mut house = House::open().await;
    house.post("/api/chat", chat("tiny-story")).await;
    house.signal(libc::SIGTERM);
    house.restart().await;
    let mut lines = checked(&house.audit_dir());
    // Two writers of one second sort by chance.
    lines.sort_by(|one, other| one["timestamp"].as_str().cmp(&other["timestamp"].as_str()));
    let phases: Vec<&str> = lines.iter().filter_map(|line| line["extra"]["phase"].as_str()).collect();
    assert_eq!(
        phases,
        ["segment_open", "request", "stream_start", "final", "checkpoint", "segment_close", "segment_open"]
    );
    assert_eq!(lines[5]["extra"]["reason"], "stopped");
    assert_eq!(lines[6]["extra"]["heads"][0]["head"], lines[5]["event_hash"]);
    for name in ["audit-key.pem", "audit-key.pub"] {
        assert!(house.dir.path().join("state").join(name).exists(), "{name}");
    }
}

#[tokio::test]
async fn two_processes_in_one_state_folder_share_no_segment_and_only_the_dead_one_is_taken_over() {
    let mut one = House::open().await;
    let state = one.dir.path().join("state").display().to_string();
    let two = House::with(Plan { env: vec![("BEHAVRY_STATE_DIR".to_owned(), state)], ..Plan::default() }).await;
    for n in 0..5 {
        one.send(Request::get("/api/version").bearer(&one.token()).id(&format!("one-{n}"))).await;
        two.send(Request::get("/api/version").bearer(&two.token()).id(&format!("two-{n}"))).await;
    }
    let mut running = Connection::open(two.public).await;
    let ask = Request::post("/api/chat", chat("fault-stalls-mid-stream")).bearer(&two.token()).id("running");
    running.send(&ask).await;
    running.head().await.expect("a head");
    one.signal(libc::SIGKILL);
    one.restart().await;
    for n in 0..5 {
        one.final_of(&format!("one-{n}")).await;
        one.final_of(&format!("two-{n}")).await;
    }
    let lines = checked(&one.audit_dir());
    let adopted: Vec<&Value> = lines.iter().filter(|line| line["extra"]["phase"] == "adopted").collect();
    assert_eq!(adopted.len(), 1, "the one that lives is left alone");
    assert!(lines.iter().all(|line| line["extra"]["outcome"] != "crashed"), "its stream runs");
    assert_eq!(segments(&one.audit_dir()).len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_segments_rotate_and_no_record_is_lost() {
    let config = "[audit]\nrotate_bytes = 8192".to_owned();
    let house = std::sync::Arc::new(House::with(Plan { config, ..Plan::default() }).await);
    let token = house.token();
    let workers: Vec<_> = (0..8)
        .map(|worker| {
            let (house, token) = (house.clone(), token.clone());
            tokio::spawn(async move {
                for n in 0..25 {
                    let id = format!("{worker}-{n}");
                    let ask = Request::get("/api/version").bearer(&token).id(&id);
                    assert_eq!(house.send(ask).await.status, 200);
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.expect("no worker fails");
    }
    let dir = house.audit_dir();
    wait_until("all finals", || (counted(&checked(&dir), "final").len() == 200).then_some(())).await;
    let lines = checked(&dir);
    assert!(segments(&dir).len() > 20, "{} segments", segments(&dir).len());
    for phase in ["request", "final"] {
        let counts = counted(&lines, phase);
        assert!(counts.len() == 200 && counts.values().all(|count| *count == 1), "{phase}");
    }
    assert_eq!(verified(&house).await, "");
}

/// A tmpfs of its own, gone with it.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None`: this user may not mount.
    fn mount(bytes: u64) -> Option<SmallDisk> {
        let disk = SmallDisk(tempfile::tempdir().expect("a folder"));
        let options = format!("size={bytes}");
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(disk.0.path()).stderr(std::process::Stdio::null());
        command.status().is_ok_and(|status| status.success()).then_some(disk)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let quiet = std::process::Stdio::null;
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).stderr(quiet()).status();
    }
}

#[tokio::test]
async fn on_a_full_disk_nothing_is_served_no_line_is_torn_and_service_resumes_by_itself() {
    let Some(disk) = SmallDisk::mount(256 << 10) else {
        eprintln!("skipped: a small disk needs the right to mount");
        return;
    };
    let dir = disk.0.path().join("audit");
    let env = vec![("BEHAVRY_AUDIT_DIR".to_owned(), dir.display().to_string())];
    let house = House::with(Plan { env, ..Plan::default() }).await;
    let token = house.token();
    let mut running = Connection::open(house.public).await;
    running.send(&Request::post("/api/chat", chat("fault-stalls-mid-stream")).bearer(&token).id("running")).await;
    running.head().await.expect("a head");
    // All but the last bytes are taken by something else, and those by records.
    let filler = disk.0.path().join("filler");
    while std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(&filler)
        .and_then(|mut file| std::io::Write::write_all(&mut file, &[0; 4096]))
        .is_ok()
    {}
    let mut served = 0;
    let refused = loop {
        assert!(served < 2_000, "more records than the disk has room for");
        let ask = Request::get("/api/version").bearer(&token).id(&format!("served-{served}"));
        let reply = house.send(ask).await;
        if reply.status != 200 {
            break reply;
        }
        served += 1;
    };
    assert_eq!((refused.status, refused.code()), (503, "audit_unavailable".to_owned()));
    let before = house.simulator.seen().len();
    assert_eq!(house.send(Request::get("/api/version").bearer(&token)).await.status, 503);
    assert_eq!(house.simulator.seen().len(), before, "the backend hears nothing");
    for segment in segments(&dir) {
        let text = std::fs::read_to_string(&segment).expect("a segment");
        assert!(text.ends_with('\n'), "no torn line");
    }
    std::fs::remove_file(&filler).expect("removed");
    let began = Instant::now();
    while Request::get("/readyz").send(house.operator).await.status != 200 {
        assert!(began.elapsed() < PATIENCE, "service did not resume");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(house.send(Request::get("/api/version").bearer(&token).id("after")).await.status, 200);
    drop(running);
    wait_until("all finals", || {
        let finals = counted(&checked(&dir), "final");
        let all = (0..served).map(|n| format!("served-{n}")).chain(["running".to_owned(), "after".to_owned()]);
        all.into_iter().all(|id| finals.contains_key(&id)).then_some(())
    })
    .await;
    let lines = checked(&dir);
    for (id, count) in counted(&lines, "request") {
        assert_eq!((count, counted(&lines, "final")[&id]), (1, 1), "{id}");
    }
}

#[tokio::test]
async fn retention_deletes_the_oldest_segments_and_a_tombstone_says_so() {
    let config = "[audit]\nrotate_bytes = 4096\nkeep_bytes = 40000".to_owned();
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let token = house.token();
    for n in 0..60 {
        house.send(Request::get("/api/version").bearer(&token).id(&format!("req-{n}"))).await;
    }
    let dir = house.audit_dir();
    let first = wait_until("a deletion", || {
        let left = segments(&dir);
        let first: SegmentName = left.first()?.file_name()?.to_str()?.parse().ok()?;
        (first.number > 1).then_some(first)
    })
    .await;
    let told: Vec<u64> = segments(&dir)
        .iter()
        .flat_map(|segment| read_lines(segment))
        .filter(|line| line["extra"]["phase"] == "tombstone")
        .filter_map(|line| line["extra"]["segment"].as_u64())
        .collect();
    assert!(told.contains(&u64::from(first.number - 1)), "{told:?}");
    assert_eq!(verified(&house).await, "");
}
