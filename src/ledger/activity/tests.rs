use std::sync::Arc;

use super::*;
use crate::ledger::Phase;
use crate::ledger::chain::{self, Head};
use crate::ledger::record::{Entry, Id};

/// A line as the audit's thread writes it.
fn line(phase: Phase, outcome: Option<Outcome>, entry: &Entry<'_>) -> Vec<u8> {
    let now = Moment::now();
    let mut event = Vec::new();
    Record::new(Id::new(now, [7; 10]), now, phase, outcome, entry).write_event(&mut event);
    let mut line = Vec::new();
    chain::seal(&event, Head::Genesis, &mut line);
    line
}

fn texts(news: &News) -> Vec<String> {
    news.frames.iter().map(|frame| String::from_utf8_lossy(frame).into_owned()).collect()
}

/// The event names of what came after the beginning.
fn names(activity: &Activity) -> Vec<String> {
    let frames = texts(&activity.since(0, usize::MAX));
    frames.iter().map(|frame| frame.lines().nth(1).expect("a name").replace("event: ", "")).collect()
}

#[test]
fn each_record_is_the_event_that_its_decision_makes_it_and_its_data_is_the_audits_line() {
    let activity = Activity::default();
    let id = Some("r1");
    let allowed = Entry { request_id: id, policy_result: Some("allow"), ..Entry::default() };
    let request = line(Phase::Request, None, &allowed);
    activity.publish(&request);
    activity.publish(&line(Phase::StreamStart, None, &allowed));
    activity.publish(&line(Phase::Final, Some(Outcome::Complete), &allowed));
    let refused = |result| Entry { request_id: id, policy_result: Some(result), ..Entry::default() };
    let two =
        [line(Phase::Final, Some(Outcome::Refused), &refused("deny")), line(Phase::Final, None, &refused("escalate"))];
    activity.publish(&two.concat());
    assert_eq!(names(&activity), ["tool_call", "tool_call", "policy_deny", "policy_escalate"]);
    let first = &texts(&activity.since(0, usize::MAX))[0];
    let data = first.lines().nth(2).and_then(|data| data.strip_prefix("data: ")).expect("data");
    assert_eq!(data.as_bytes(), request.trim_ascii_end());
    assert!(first.ends_with("\n\n"));
}

#[test]
fn a_name_that_recites_members_makes_no_other_event() {
    let activity = Activity::default();
    let recital = r#"","policy_result":"deny","phase":"final","request_id":null,"x":""#;
    let entry =
        Entry { request_id: Some("r"), agent_id: Some(recital), policy_result: Some("allow"), ..Entry::default() };
    activity.publish(&line(Phase::Request, None, &entry));
    activity.publish(&line(Phase::StreamStart, None, &entry));
    assert_eq!(names(&activity), ["tool_call"]);
}

#[test]
fn what_the_audit_says_of_itself_is_an_alert() {
    let activity = Activity::default();
    let folded = Entry { policy_result: Some("deny"), error: Some("4 refusals folded"), ..Entry::default() };
    activity.publish(&line(Phase::Final, Some(Outcome::Refused), &folded));
    let lost = Entry { error: Some("9 final records were lost"), ..Entry::default() };
    activity.publish(&line(Phase::Final, Some(Outcome::InternalError), &lost));
    let frames = texts(&activity.since(0, usize::MAX));
    assert_eq!(names(&activity), ["alert", "alert"]);
    assert!(
        frames[0].contains(r#""alert":"refusals_folded""#) && frames[0].contains("4 refusals folded"),
        "{}",
        frames[0]
    );
    assert!(frames[1].contains(r#""alert":"records_lost""#), "{}", frames[1]);
}

#[test]
fn a_slow_watcher_is_told_how_many_events_passed_by_and_the_ring_does_not_grow() {
    let activity = Activity::default();
    for n in 0..5 * EVENTS {
        activity.alert(Alert::Panicked, false, &n.to_string());
    }
    let news = activity.since(10, usize::MAX);
    assert_eq!((news.frames.len(), news.missed), (EVENTS, (4 * EVENTS - 10) as u64));
    assert_eq!(news.upto, (5 * EVENTS) as u64);
    let none = activity.since(news.upto, usize::MAX);
    assert_eq!((none.frames.len(), none.missed, none.upto), (0, 0, news.upto));

    let long = "x".repeat(100_000);
    for _ in 0..200 {
        activity.alert(Alert::Panicked, false, &long);
    }
    let ring = activity.ring.lock();
    assert!(ring.bytes <= RING_BYTES && ring.bytes == ring.frames.iter().map(Bytes::len).sum::<usize>());
}

#[test]
fn news_come_in_bounded_parts_without_a_gap() {
    let activity = Activity::default();
    for n in 0..100 {
        activity.alert(Alert::Panicked, false, &n.to_string());
    }
    let (mut at, mut seen) = (0, 0);
    while at < 100 {
        let news = activity.since(at, 500);
        assert!(!news.frames.is_empty() && news.missed == 0);
        assert!(news.frames.len() == 1 || news.frames.iter().map(Bytes::len).sum::<usize>() <= 500);
        seen += news.frames.len();
        at = news.upto;
    }
    assert_eq!((seen, at), (100, 100));
}

#[test]
fn who_comes_back_goes_on_where_it_stopped_and_who_is_new_sees_the_recent_ones() {
    let activity = Activity::default();
    assert_eq!(activity.resume(None), 0);
    for n in 0..600 {
        activity.alert(Alert::Panicked, false, &n.to_string());
    }
    let run = &activity.run;
    assert_eq!(activity.resume(None), 600 - RECENT);
    assert_eq!(activity.resume(Some(&format!("{run}-590"))), 590);
    // From another run, from the future, or made up: a new one.
    for odd in ["1-590", &format!("{run}-601"), &format!("{run}-x"), "590", "", "-"] {
        assert_eq!(activity.resume(Some(odd)), 600 - RECENT, "{odd}");
    }
}

#[test]
fn so_many_may_watch_and_a_place_is_given_back() {
    let activity = Arc::new(Activity::default());
    let mut watching: Vec<_> = (0..WATCHERS).map(|_| activity.watch().expect("a place")).collect();
    assert!(activity.watch().is_none());
    watching.pop();
    assert!(activity.watch().is_some());
    drop(watching);
    assert_eq!(activity.watchers(), 0);
}
