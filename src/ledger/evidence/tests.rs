use std::process::Command;

use super::*;
use crate::ledger::verify::honest::{Log, Shape};

fn log() -> (Log, tempfile::TempDir) {
    let shape =
        Shape { records: 60, writers: 2, crashes: 50, rotations: 5, checkpoints: 10, retention: false, closed: true };
    let log = Log::of(21, &shape);
    let dir = tempfile::tempdir().expect("a folder");
    log.write(dir.path());
    (log, dir)
}

/// What somebody else's checker says of a package: whether it is content, and its words.
fn checked(package: &[u8], key: &SigningKey, folder: &Path) -> (bool, String) {
    let (archive, anchor) = (folder.join("package.zip"), folder.join("anchor.json"));
    std::fs::write(&archive, package).expect("written");
    std::fs::write(&anchor, trust_anchor(key).to_string()).expect("written");
    let checker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdk/check_package.py");
    let ran = Command::new("python3").arg(checker).args([archive, anchor]).output().expect("python3");
    (ran.status.success(), String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned())
}

#[test]
fn a_package_holds_for_a_checker_that_was_made_from_the_format_alone() {
    let (log, dir) = log();
    let mut package = Vec::new();
    let packed = super::package(dir.path(), &Selection::default(), &log.key, &mut package).expect("packed");
    let (content, said) = checked(&package, &log.key, dir.path());
    assert!(
        content && said.starts_with(&format!("{} events of {} agents hold", packed.events, packed.agents)),
        "{said}"
    );

    // The checker can say no: to another key, and to a word that was changed.
    let other = SigningKey::from_bytes(&[7; 32]);
    assert!(!checked(&package, &other, dir.path()).0);
    let at = package.windows(8).position(|word| word == b"llama3.2").expect("stored as it is");
    package[at + 5] = b'9';
    assert!(!checked(&package, &log.key, dir.path()).0);
}

#[test]
fn a_package_has_what_was_selected_and_an_empty_or_altered_one_is_not_made() {
    let (log, dir) = log();
    let pack = |selection: &Selection| super::package(dir.path(), selection, &log.key, &mut Vec::new());
    let all = pack(&Selection::default()).expect("packed");
    let carol = pack(&Selection { agent: Some("carol".to_owned()), ..Selection::default() }).expect("packed");
    assert!(carol.agents == 1 && carol.events > 0 && carol.events < all.events);
    let nobody = Selection { agent: Some("nobody".to_owned()), ..Selection::default() };
    assert!(matches!(pack(&nobody), Err(EvidenceError::NothingSelected)));

    let middle = Some(Moment::from_microseconds(1_795_000_006_000_000));
    let before = pack(&Selection { to: middle, ..Selection::default() }).expect("packed");
    let after = pack(&Selection { from: middle, ..Selection::default() }).expect("packed");
    assert_eq!(before.events + after.events, all.events);

    let (name, bytes) = log.files.iter().next().expect("files");
    let changed = String::from_utf8_lossy(bytes).replacen("\"POST\"", "\"GET\"", 1);
    std::fs::write(dir.path().join(name), changed).expect("written");
    assert!(matches!(pack(&Selection::default()), Err(EvidenceError::Altered { .. })));
}
