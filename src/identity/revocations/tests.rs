use std::os::unix::fs::PermissionsExt;

use super::edit::{EditError, Revocation, add, add_to_file};
use super::*;

fn caller(agent: &str, session: &str, issued_at: Option<i64>) -> Caller {
    Caller {
        agent_id: agent.into(),
        agent_name: None,
        session_id: session.into(),
        roles: vec![],
        permissions: vec![],
        risk_tier: None,
        expires_at: i64::MAX,
        issued_at,
    }
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn seconds(text: &str) -> i64 {
    at(text).as_second()
}

fn session(id: &str) -> Revocation {
    Revocation { subject: Subject::Session(id.into()), reason: None, ours: false }
}

fn agent(id: &str) -> Revocation {
    Revocation { subject: Subject::Agent(id.into()), reason: None, ours: false }
}

const NOON: &str = "2026-11-22T12:00:00Z";

#[test]
fn a_session_is_revoked_whatever_its_age_and_no_other_is() {
    let list = Revocations::parse(&format!("[[revoked]]\nsession = \"s\"\nat = {NOON}\n")).unwrap();
    for issued in [None, Some(0), Some(i64::MAX)] {
        assert!(list.name(&caller("a", "s", issued)));
        assert!(!list.name(&caller("a", "t", issued)));
        assert!(!list.name(&caller("s", "a", issued)), "a session's id is not an agent's");
    }
}

#[test]
fn an_agents_tokens_of_before_are_revoked_and_those_of_after_are_not() {
    let list = Revocations::parse(&format!("[[revoked]]\nagent = \"a\"\nat = {NOON}\n")).unwrap();
    let noon = seconds(NOON);
    assert!(list.name(&caller("a", "s", Some(noon - 1))));
    assert!(list.name(&caller("a", "s", None)), "a token that does not say when it was issued");
    assert!(!list.name(&caller("a", "s", Some(noon))));
    assert!(!list.name(&caller("b", "a", Some(noon - 1))));
}

#[test]
fn of_two_entries_for_an_agent_the_later_counts_in_any_order() {
    let (early, late) = ("agent = \"a\"\nat = 2026-11-22T12:00:00Z\n", "agent = \"a\"\nat = 2026-11-22T13:00:00Z\n");
    for (first, second) in [(early, late), (late, early)] {
        let list = Revocations::parse(&format!("[[revoked]]\n{first}[[revoked]]\n{second}")).unwrap();
        assert!(list.name(&caller("a", "s", Some(seconds("2026-11-22T12:59:59Z")))));
        assert!(!list.name(&caller("a", "s", Some(seconds("2026-11-22T13:00:00Z")))));
        assert_eq!(list.len(), 1);
    }
}

#[test]
fn a_time_within_a_second_revokes_the_whole_second_and_an_offset_is_honoured() {
    let list = Revocations::parse("[[revoked]]\nagent = \"a\"\nat = 2026-11-22T14:00:00.25+02:00\n").unwrap();
    assert!(list.name(&caller("a", "s", Some(seconds(NOON)))));
    assert!(!list.name(&caller("a", "s", Some(seconds(NOON) + 1))));
}

#[test]
fn a_broken_list_is_refused_with_its_line() {
    let entry = |text: &str| format!("[[revoked]]\n{text}\n");
    for (text, line, words) in [
        (entry("session = \"s\""), 1, "missing field `at`"),
        (entry(&format!("at = {NOON}")), 1, "either a `session` or an `agent`"),
        (entry(&format!("session = \"s\"\nagent = \"a\"\nat = {NOON}")), 1, "either a `session` or an `agent`"),
        (entry(&format!("session = \"\"\nat = {NOON}")), 1, "`session` must have"),
        (entry(&format!("agent = \"a\\u001b\"\nat = {NOON}")), 1, "`agent` must have"),
        (entry("session = \"s\"\nat = 2026-11-22T12:00:00"), 1, "offset"),
        (entry("session = \"s\"\nat = 2026-11-22"), 1, "offset"),
        (entry(&format!("session = \"s\"\nat = {NOON}\nuntil = 12:00:00")), 1, "`until`"),
        (entry(&format!("session = \"s\"\nat = {NOON}\nreason = \"a\\nb\"")), 1, "`reason`"),
        (entry(&format!("session = \"s\"\nat = {NOON}\njti = \"t\"")), 4, "unknown field"),
        (entry(&format!("session = \"s\"\nat = {NOON}")) + &entry("session = 1"), 5, "invalid type"),
        ("[[revoke]]\n".to_owned(), 1, "unknown field"),
        ("\n\n[[revoked]\n".to_owned(), 3, ""),
    ] {
        let said = Revocations::parse(&text).unwrap_err().to_string();
        assert!(said.starts_with(&format!("revoked.toml:{line}: ")) && said.contains(words), "{text}\n{said}");
    }
    assert!(Revocations::parse("# nobody yet\n").unwrap().is_empty());
}

#[test]
fn a_list_that_others_can_write_is_refused_and_one_that_is_not_there_is_none() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("revoked.toml");
    assert!(Revocations::load(&path).unwrap().is_none());
    std::fs::write(&path, "").unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    assert!(Revocations::load(&path).unwrap().unwrap().is_empty());
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o664)).unwrap();
    assert!(Revocations::load(&path).unwrap_err().to_string().contains("chmod go-w"));
}

#[test]
fn a_list_covers_another_when_it_revokes_as_much() {
    let list = |text: &str| Revocations::parse(text).unwrap();
    let small = list("[[revoked]]\nagent = \"a\"\nat = 2026-11-22T12:00:00Z\n");
    let later = list("[[revoked]]\nagent = \"a\"\nat = 2026-11-22T13:00:00Z\n");
    let other = list("[[revoked]]\nsession = \"a\"\nat = 2026-11-22T13:00:00Z\n");
    assert!(later.cover(&small) && small.cover(&small) && small.cover(&Revocations::default()));
    assert!(!small.cover(&later) && !small.cover(&other) && !Revocations::default().cover(&small));
}

#[test]
fn an_added_entry_keeps_what_was_there_and_ends_tokens_of_this_very_second() {
    let before = format!("# ours\n\n[[revoked]] # first\nsession = \"s\"\nat = {NOON}\n\n# the end\n");
    let now = at("2026-11-22T13:00:00.75Z");
    let (text, list) = add(&before, &agent("a"), now).unwrap();
    for kept in ["# ours\n", "[[revoked]] # first\nsession = \"s\"\n", "# the end"] {
        assert!(text.contains(kept), "{text}");
    }
    assert!(list.name(&caller("x", "s", None)));
    assert!(list.name(&caller("a", "x", Some(now.as_second()))), "issued a moment before");
    assert!(!list.name(&caller("a", "x", Some(now.as_second() + 1))), "issued after");
    assert!(!text.contains("until"), "whoever else signs may give any life");
}

#[test]
fn an_entry_keeps_odd_names_whole() {
    for id in ["a\"b\\c", "[[revoked]]", "é '''", "# x", "\"\"\""] {
        let named = Revocation { reason: Some(id.to_owned()), ..session(id) };
        let (_, list) = add("", &named, at(NOON)).unwrap();
        assert!(list.name(&caller("a", id, None)), "{id}");
    }
    for id in ["", "a\nb", &"x".repeat(257)] {
        assert!(matches!(add("", &session(id), at(NOON)), Err(EditError::Invalid(_))), "{id}");
    }
    let talkative = Revocation { reason: Some("a\nb".into()), ..session("s") };
    assert!(matches!(add("", &talkative, at(NOON)), Err(EditError::Invalid(_))));
}

#[test]
fn entries_whose_tokens_have_all_ended_are_dropped_by_the_next_edit_and_no_others() {
    let ours = Revocation { ours: true, ..session("old") };
    let (text, _) = add("", &ours, at("2020-01-01T00:00:00Z")).unwrap();
    let (text, _) = add(&text, &session("forever"), at("2020-01-01T00:00:00Z")).unwrap();
    let year_later = at("2021-01-01T00:00:00Z");
    let (text, list) = add(&text, &session("mid"), year_later).unwrap();
    assert!(list.name(&caller("a", "old", None)), "a token of a year may still live");
    let (text, list) = add(&text, &session("new"), at("2021-02-01T00:00:00Z")).unwrap();
    assert!(!list.name(&caller("a", "old", None)), "{text}");
    for kept in ["forever", "mid", "new"] {
        assert!(list.name(&caller("a", kept, None)), "{kept}");
    }
}

#[test]
fn a_broken_list_is_not_edited() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("revoked.toml");
    std::fs::write(&path, "[[revoked]]\nsession = 1\n").unwrap();
    let said = add_to_file(&path, &session("s"), at(NOON)).unwrap_err().to_string();
    assert!(said.contains(":2: ") && said.contains("nothing was changed"), "{said}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "[[revoked]]\nsession = 1\n");
    assert!(matches!(add("revoked = []\n", &session("s"), at(NOON)), Err(EditError::Inline)));
}

#[test]
fn edits_at_the_same_moment_lose_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("state/revoked.toml");
    std::thread::scope(|scope| {
        for n in 0..8 {
            let path = &path;
            scope.spawn(move || add_to_file(path, &session(&format!("s{n}")), at(NOON)).unwrap());
        }
    });
    let list = Revocations::load(&path).unwrap().unwrap();
    assert!((0..8).all(|n| list.name(&caller("a", &format!("s{n}"), None))));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}
