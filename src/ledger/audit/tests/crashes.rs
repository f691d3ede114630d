//! What a process that died left behind. Its folder is copied while it runs: a copy is not locked, as after kill -9, and may be cut at
//! any byte.

use super::*;
use crate::ledger::verify;

/// A folder as it would be if its process had died now.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for name in fs::read_dir(from).expect("the folder").filter_map(Result::ok) {
        fs::copy(name.path(), to.join(name.file_name())).expect("copied");
    }
}

fn finals(dir: &Path, id: &str) -> Vec<String> {
    let of = |line: &&Value| line["extra"]["request_id"] == id && line["extra"]["phase"] == "final";
    let lines = lines_also_torn(dir);
    let outcome = |line: &Value| line["extra"]["outcome"].as_str().expect("an outcome").to_owned();
    // Chains that began in the same second sort by chance.
    let mut outcomes: Vec<String> = lines.iter().filter(of).map(outcome).collect();
    outcomes.sort();
    outcomes
}

/// As [`lines`], but a dead segment keeps what was torn.
fn lines_also_torn(dir: &Path) -> Vec<Value> {
    let mut found = Vec::new();
    for (writer, numbers) in survey::segments(dir).expect("the folder") {
        for number in numbers {
            let text = fs::read(survey::path(dir, writer, number)).expect("a segment");
            let whole = text.split_inclusive(|byte| *byte == b'\n').filter_map(|line| line.strip_suffix(b"\n"));
            found.extend(whole.map(|line| serde_json::from_slice::<Value>(line).expect("JSON")));
        }
    }
    found
}

/// Two open requests of the same client's word, one of them refused beside them, one complete, one that streams.
async fn busy(dir: &Path) -> (Audit, Vec<Receipt>) {
    let audit = start(dir);
    let of = |id: &'static str, exchange| Entry { exchange, ..entry(id) };
    let done = audit.record_request(&of("done", 1)).await.expect("a receipt");
    let mut open = vec![audit.record_request(&of("open", 2)).await.expect("a receipt")];
    audit.note_final(Outcome::Refused, &of("open", 3)).expect("room");
    open.push(audit.record_request(&of("streams", 4)).await.expect("a receipt"));
    open[1].stream_start(&of("streams", 4));
    done.settle(Outcome::Complete, &of("done", 1));
    audit.flush(LONG).await.expect("written");
    (audit, open)
}

#[tokio::test]
async fn each_open_request_of_a_dead_process_gets_one_crashed_final_and_its_file_is_not_touched() {
    let folder = Folder::new();
    let (_audit, _open) = busy(&folder.dir()).await;
    let dead = folder.0.join("dead");
    copy(&folder.dir(), &dead);
    let (writer, numbers) = survey::segments(&dead).expect("the folder").pop_first().expect("a writer");
    let file = survey::path(&dead, writer, numbers[0]);
    let mut torn = fs::read(&file).expect("the segment");
    torn.extend_from_slice(b"{\"action\":\"PO");
    fs::write(&file, &torn).expect("written");

    let metrics = metrics();
    for round in 0..3 {
        let audit = Audit::start(settings(&dead), Arc::clone(&metrics)).expect("the audit starts");
        audit.close(LONG).expect("all is written");
        assert_eq!(finals(&dead, "done"), ["complete"], "round {round}");
        assert_eq!(finals(&dead, "streams"), ["crashed"], "round {round}");
        assert_eq!(finals(&dead, "open"), ["crashed", "refused"], "round {round}: one request of two is open");
    }
    assert_eq!(fs::read(&file).expect("the segment"), torn);
    assert_eq!(metric(&metrics, "audit_crashed_requests_total"), 2);
    assert_eq!(metric(&metrics, "audit_adopted_total"), 1);
    let adopted: Vec<Value> =
        lines_also_torn(&dead).into_iter().filter(|line| line["extra"]["phase"] == "adopted").collect();
    assert_eq!(adopted.len(), 1);
    let extra = &adopted[0]["extra"];
    let whole = torn.iter().filter(|byte| **byte == b'\n').count() as u64;
    assert_eq!(extra["writer"], writer.as_str());
    assert_eq!(
        (extra["count"].as_u64(), extra["torn_bytes"].as_u64(), extra["open_requests"].as_u64()),
        (Some(whole), Some(13), Some(2))
    );
    let crashed = lines_also_torn(&dead).into_iter().find(|line| line["extra"]["outcome"] == "crashed").expect("one");
    assert_eq!(crashed["agent_id"], "agent-1", "what was known stays known");
    assert!(crashed["extra"]["output_tokens"].is_null(), "what is not known is not 0");
}

/// The dead process may have been killed at any byte, and the one that takes over at any byte of that.
#[tokio::test]
async fn whoever_is_killed_wherever_each_request_has_exactly_one_final_in_the_end() {
    let folder = Folder::new();
    let (_audit, _open) = busy(&folder.dir()).await;
    let (writer, _) = survey::segments(&folder.dir()).expect("the folder").pop_first().expect("a writer");
    let whole = fs::read(survey::path(&folder.dir(), writer, 1)).expect("the segment");
    let (first, second) = (folder.0.join("first"), folder.0.join("second"));
    for cut in (0..=whole.len()).step_by(509) {
        copy(&folder.dir(), &first);
        fs::write(survey::path(&first, writer, 1), &whole[..cut]).expect("cut");
        let adopter = start(&first);
        let mine =
            survey::segments(&first).expect("the folder").into_keys().find(|name| *name != writer).expect("a second");
        let taken = fs::read(survey::path(&first, mine, 1)).expect("its segment");
        for again in (0..=taken.len()).step_by(311) {
            copy(&first, &second);
            fs::write(survey::path(&second, mine, 1), &taken[..again]).expect("cut");
            start(&second).close(LONG).expect("all is written");
            exactly_one_final_each(&second, cut, again);
            let verdict = verify::verify(&second, &verify::Against::default()).expect("it can be read");
            assert!(verdict.holds(), "cut at {cut} and {again}: {:?}", verdict.problems);
            fs::remove_dir_all(&second).expect("removed");
        }
        adopter.close(LONG).expect("its end, or it would make the folder anew");
        fs::remove_dir_all(&first).expect("removed");
    }
}

fn exactly_one_final_each(dir: &Path, cut: usize, again: usize) {
    let mut phases: HashMap<u64, Vec<String>> = HashMap::new();
    for line in lines_also_torn(dir) {
        let phase = line["extra"]["phase"].as_str().expect("a phase").to_owned();
        if ["request", "final"].contains(&phase.as_str()) {
            let id: Id = line["id"].as_str().expect("an id").parse().expect("a UUID");
            phases.entry(id.exchange()).or_default().push(phase);
        }
    }
    for (exchange, phases) in phases {
        let finals = phases.iter().filter(|phase| *phase == "final").count();
        assert_eq!(
            finals, 1,
            "exchange {exchange} has {phases:?} where the first was cut at {cut}, the second at {again}"
        );
    }
}
