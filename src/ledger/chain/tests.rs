use serde_json::json;

use super::mark::{ChainHead, CloseReason, TombstoneReason};
use super::segment::NotAName;
use super::*;

const EVENTS: &str = include_str!("../../../tests/fixtures/chain/events.json");
/// What Python made of them; see README.md there.
const LINES: &str = include_str!("../../../tests/fixtures/chain/lines.jsonl");
const HASH: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn events() -> Vec<Value> {
    serde_json::from_str(EVENTS).expect("the events")
}

fn writer(name: &str) -> WriterName {
    name.parse().expect("a name")
}

#[test]
fn lines_are_what_python_makes_of_the_same_events() {
    let (mut head, mut lines) = (Head::Genesis, Vec::new());
    for event in events() {
        head = seal(&canonical(&event).expect("whole numbers"), head, &mut lines);
    }
    assert_eq!(String::from_utf8(lines).expect("ASCII"), LINES);
}

#[test]
fn a_line_taken_apart_is_sealed_to_the_same_line() {
    let mut previous = Head::Genesis;
    for line in LINES.lines() {
        let sealed = open(line.as_bytes()).expect("a line");
        assert!(sealed.is_intact());
        assert_eq!(sealed.previous, previous);
        let value: Value = serde_json::from_slice(&sealed.event).expect("JSON");
        assert_eq!(canonical(&value).as_ref(), Ok(&sealed.event), "a line is its own canonical form");
        let mut again = Vec::new();
        assert_eq!(seal(&sealed.event, previous, &mut again), sealed.hash);
        assert_eq!(again, format!("{line}\n").into_bytes());
        previous = sealed.hash;
    }
}

#[test]
fn a_change_of_any_one_byte_of_a_line_shows() {
    let line = LINES.lines().nth(1).expect("a line").as_bytes();
    for place in 0..line.len() {
        let mut changed = line.to_vec();
        changed[place] ^= 1;
        let intact = open(&changed).is_some_and(|sealed| sealed.is_intact());
        assert!(!intact, "byte {place}");
    }
}

#[test]
fn what_is_no_line_is_not_taken_apart() {
    let good = LINES.lines().next().expect("a line");
    for text in [
        "",
        "{}",
        "\"}",
        r#"{"a":1,"previous_hash":"GENESIS","event_hash":""}"#,
        &good.replace("GENESIS", "genesis"),
        &good.replace("event_hash", "event_HASH"),
        &good[1..good.len() - 1],
        &good.to_uppercase(),
    ] {
        assert_eq!(open(text.as_bytes()), None, "{text}");
    }
}

#[test]
fn a_head_is_genesis_or_64_digits() {
    assert_eq!("GENESIS".parse(), Ok(Head::Genesis));
    assert_eq!(HASH.parse::<Head>().map(|head| head.to_string()), Ok(HASH.to_owned()));
    for text in ["", "genesis", &HASH[1..], &HASH.to_uppercase(), &HASH.replace('0', "g"), &format!("{HASH}0")] {
        assert_eq!(text.parse::<Head>(), Err(NotAHead), "{text}");
    }
}

#[test]
fn fractions_have_no_canonical_form() {
    assert_eq!(canonical(&json!({ "a": [1.5] })), Err(NotWhole));
    assert_eq!(canonical(&json!([u64::MAX, i64::MIN])), Ok(b"[18446744073709551615,-9223372036854775808]".to_vec()));
}

/// The payloads and the key's name were computed with Python, as the lines were.
#[test]
fn what_is_signed_of_a_checkpoint_and_a_tombstone_is_this() {
    let events = events();
    let payload = |place: usize| {
        let event = &events[place];
        let of_mark = Mark::of(event).expect("a mark").payload(event["timestamp"].as_str().expect("a time"));
        let extra = event["extra"].as_object().expect("members");
        let of_members = signing_payload(event["timestamp"].as_str().expect("a time"), extra).expect("whole numbers");
        assert_eq!(of_mark.as_ref(), Some(&of_members));
        String::from_utf8(of_members).expect("ASCII")
    };
    let at = r#""timestamp":"2026-11-22T18:35:16.000001+00:00""#;
    assert_eq!(
        payload(3),
        format!(
            r#"{{"count":3,"format":"behavry.audit.v1","head":"{HASH}","segment":1,{at},"writer":"20261122T183516Z-0badcafe"}}"#
        )
    );
    assert_eq!(
        payload(5),
        format!(
            concat!(
                r#"{{"count":5,"count_before":0,"first_previous_hash":"GENESIS","format":"behavry.audit.v1","#,
                r#""from":"2026-11-21T09:00:00.000000+00:00","head":"{}","reason":"age","segment":1,{},"#,
                r#""to":"2026-11-21T09:00:01.000000+00:00","writer":"20261121T090000Z-00000001"}}"#
            ),
            HASH, at
        )
    );
    assert_eq!(Mark::of(&events[0]).and_then(|mark| mark.payload("")), None, "an opening is not signed");
    let public: [u8; 32] = std::array::from_fn(|place| place as u8);
    assert_eq!(key_id(&public), "sha256:905f28def18eaac0");
}

#[test]
fn every_mark_is_the_event_that_the_format_says() {
    let (own, old) = (writer("20261122T183516Z-0badcafe"), writer("20261121T090000Z-00000001"));
    let (head, key_id) = (HASH.to_owned(), "sha256:ab82f3bda9e43327".to_owned());
    let (from, to) = ("2026-11-21T09:00:00.000000+00:00".to_owned(), "2026-11-21T09:00:01.000000+00:00".to_owned());
    let other = ChainHead { writer: old, segment: 3, count: 12, head: head.clone() };
    let marks = [
        (0, Mark::segment_open(own, 1, 0, vec![other], &key_id)),
        (
            3,
            Mark::Checkpoint {
                writer: own,
                segment: 1,
                count: 3,
                head: head.clone(),
                key_id: key_id.clone(),
                signature: "AAAA".to_owned(),
            },
        ),
        (4, Mark::Adopted { writer: old, segment: 3, count: 12, head: head.clone(), torn_bytes: 7, open_requests: 2 }),
        (
            5,
            Mark::Tombstone {
                writer: old,
                segment: 1,
                first_previous_hash: GENESIS.to_owned(),
                head: head.clone(),
                count_before: 0,
                count: 5,
                from,
                to,
                reason: TombstoneReason::Age,
                key_id,
                signature: "AAAA".to_owned(),
            },
        ),
        (6, Mark::SegmentClose { writer: own, segment: 1, count: 6, head, reason: CloseReason::Rotated }),
    ];
    let at = Moment::from_microseconds(1_795_372_516_000_001);
    for (place, mark) in marks {
        let sealed = open(LINES.lines().nth(place).expect("a line").as_bytes()).expect("a line");
        let event = String::from_utf8(mark.event(Id::new(at, [7; 10]), at)).expect("ASCII");
        assert_eq!(event, String::from_utf8(sealed.event).expect("ASCII"));
        assert_eq!(Mark::of(&serde_json::from_str(&event).expect("JSON")), Some(mark));
    }
    assert_eq!(Mark::of(&events()[1]), None, "a record is no mark");
}

#[test]
fn writers_and_segments_have_names_that_sort_by_start_and_number() {
    let first = WriterName::new(1_795_372_516, 0x0bad_cafe);
    assert_eq!(first.as_str(), "20261122T183516Z-0badcafe");
    assert_eq!(WriterName::new(-5, 0).as_str(), "19700101T000000Z-00000000");
    let later = WriterName::new(1_795_372_517, 0);
    let segment = SegmentName { writer: first, number: 1 };
    assert_eq!(segment.to_string(), "audit-20261122T183516Z-0badcafe-000001.jsonl");
    let mut segments =
        [SegmentName { writer: later, number: 1 }, segment, SegmentName { writer: first, number: 10 }].to_vec();
    segments.sort();
    let mut names: Vec<String> = segments.iter().map(SegmentName::to_string).collect();
    let parsed: Vec<SegmentName> = names.iter().map(|name| name.parse().expect("its own name")).collect();
    assert_eq!(parsed, segments);
    names.sort();
    assert_eq!(names, segments.iter().map(SegmentName::to_string).collect::<Vec<_>>(), "as text too");
    assert_eq!(segment.next().map(|next| next.number), Some(2));
    assert_eq!(SegmentName { number: SegmentName::LAST, ..segment }.next(), None);
    for name in [
        "audit.jsonl",
        "audit-20261122T183516Z-0badcafe-000000.jsonl",
        "audit-20261122T183516Z-0badcafe-1.jsonl",
        "audit-20261122T183516Z-0badcafe-000001.jsonl.1",
        "audit-20261122T183516Z-0BADCAFE-000001.jsonl",
        "audit-20261122T183516Z-000001.jsonl",
        "audit-20261122T183516Z-0badcafe-+00001.jsonl",
    ] {
        assert_eq!(name.parse::<SegmentName>(), Err(NotAName), "{name}");
    }
}

/// What [`canonical::scan`] is a short way to say.
fn is_canonical(text: &[u8]) -> bool {
    let value: Option<Value> = serde_json::from_slice(text).ok();
    value.is_some_and(|value| value.is_object() && canonical(&value).as_deref() == Ok(text))
}

fn scanned(text: &[u8]) -> bool {
    canonical::scan(text, &mut |_, _, _| {})
}

#[test]
fn what_is_canonical_is_told_without_reading_it() {
    for text in [
        "{}",
        r#"{"":0}"#,
        r#"{"a":[],"b":{"c":[{},[null,true,false]]}}"#,
        r#"{"a":"\u0000\u001f\u007f\u00e9\u2028\ud83d\ude00\"\\\n\r\t\b\f/"}"#,
        r#"{"a":[0,-1,18446744073709551615,-9223372036854775808]}"#,
        r#"{"a":1,"a ":1,"a!":1}"#,
        r#"{"\n":1," ":2,"\"":3,"a":4,"\u00e9":5,"\ue000":6,"\ud83d\ude00":7}"#,
    ] {
        assert!(is_canonical(text.as_bytes()) && scanned(text.as_bytes()), "{text}");
    }
    for text in [
        "",
        "[]",
        "null",
        "{",
        "{}x",
        " {}",
        r#"{"a"}"#,
        r#"{"a":}"#,
        r#"{"a":1,}"#,
        r#"{"a": 1}"#,
        r#"{"a":[1,]}"#,
        r#"{"a":[,1]}"#,
        r#"{"b":1,"a":1}"#,
        r#"{"a":1,"a":1}"#,
        r#"{"a":1,"\u0061":1}"#,
        r#"{"\u00e9":1,"a":1}"#,
        r#"{"a!":1,"a ":1}"#,
        r#"{"a":-0}"#,
        r#"{"a":01}"#,
        r#"{"a":-01}"#,
        r#"{"a":-}"#,
        r#"{"a":+1}"#,
        r#"{"a":1.0}"#,
        r#"{"a":1e2}"#,
        r#"{"a":NaN}"#,
        r#"{"a":18446744073709551616}"#,
        r#"{"a":-9223372036854775809}"#,
        r#"{"a":nul}"#,
        r#"{"a":True}"#,
        r#"{"a":"\/"}"#,
        r#"{"a":"\u0061"}"#,
        r#"{"a":"\u00E9"}"#,
        r#"{"a":"\u000a"}"#,
        r#"{"a":"\u12"}"#,
        r#"{"a":"\u"}"#,
        r#"{"a":"\ud800"}"#,
        r#"{"a":"\udc00\ud800"}"#,
        r#"{"a":"\ud800\ud800"}"#,
        r#"{"a":"\ud800x"}"#,
        r#"{"a":"\x"}"#,
        "{\"a\":\"\u{e9}\"}",
        "{\"a\":\"\u{7f}\"}",
        "{\"a\":\"\t\"}",
        r#"{"a":"}"#,
        r#"{"a":"\"}"#,
    ] {
        assert!(!is_canonical(text.as_bytes()) && !scanned(text.as_bytes()), "{text}");
    }
    let nested = |depth: usize| format!("{}{}{}", "{\"a\":".repeat(depth), 1, "}".repeat(depth));
    for depth in [1, 126, 127, 128, 10_000] {
        assert_eq!(scanned(nested(depth).as_bytes()), is_canonical(nested(depth).as_bytes()), "{depth}");
    }
}

#[test]
fn a_changed_line_is_canonical_for_the_scan_just_where_it_is_for_the_parser() {
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(17);
    let pieces: [&[u8]; 12] = [b"\"", b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"\\u00e9", b"\"a\":1,"];
    let mut canonical_ones = 0;
    for round in 0..60_000 {
        let line = LINES.lines().nth(round % LINES.lines().count()).expect("a line");
        let mut text = open(line.as_bytes()).expect("a line").event;
        for _ in 0..rng.gen_range(0..3) {
            let at = rng.gen_range(0..text.len());
            match rng.gen_range(0..4) {
                0 => text[at] = rng.gen_range(b' '..=b'~'),
                1 => _ = text.remove(at),
                2 => _ = text.splice(at..at, pieces[rng.gen_range(0..pieces.len())].iter().copied()),
                _ => text[at] = rng.r#gen(),
            }
        }
        assert_eq!(scanned(&text), is_canonical(&text), "{}", String::from_utf8_lossy(&text));
        canonical_ones += usize::from(scanned(&text));
    }
    assert!((20_000..59_000).contains(&canonical_ones), "{canonical_ones}");
}
