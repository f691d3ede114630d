//! Bifrost's 358 recorded cases, over sockets: what its client asked is asked of this proxy, what its backend answered is answered to
//! the proxy, and what our caller gets, and what the audit says, is held against what was answered and against what Bifrost's caller
//! got. Where the two callers do not learn the same, a table says why; it names each case, and an entry that is not needed fails.
//!
//! The bytes of the requests that are sent on are those of `wire::filter` and `wire::convert`, which have their own tables of the
//! same cases.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use behavry_ollama_proxy::wire::{Endpoint, Filter, ask};
use serde_json::{Value, json};

use crate::client::{Connection, End, Reply, Request};
use crate::house::{House, Plan, program, read_records, run_to_end, until_tried, wait_until};
use crate::puppet::Puppet;
use case::{Backend, Case, Then, plain};
use differs::{DIFFERS, FAULTS, NO_SUCH_ROUTE, compare, compare_faults, reason};
use told::{Item, Told};
use wanted::{GARBLED, converted, wanted};

mod case;
mod differs;
mod told;
mod wanted;

/// Which kind of test a case is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// An ordinary proxy, an ordinary answer.
    Plain,
    /// A backend that asks for a key.
    Keyed,
    /// The caller may have some models only.
    Restricted,
    /// No backend listens.
    Down,
    /// A backend that is silent for too long.
    Silent,
    /// The backend resets the connection, or the client leaves.
    Broken,
    Lists,
    Unsupported,
    /// How Bifrost was set up.
    Setup,
}

fn stage(case: &Case) -> Stage {
    let (name, config) = (case.name.as_str(), &case.client.config);
    let then = case.answer().map_or(Then::Ends, |answer| answer.then);
    if name.starts_with("unsup_") {
        Stage::Unsupported
    } else if config["dead"] == true {
        Stage::Down
    } else if config["models"].is_array() {
        Stage::Restricted
    } else if config["no_url"] == true {
        Stage::Setup
    } else if config["key"].is_string() && config["provider_url"].is_null() {
        Stage::Keyed
    } else if config["timeout"].is_u64() || name == "chat_s_idle" {
        Stage::Silent
    } else if then != Then::Ends {
        Stage::Broken
    } else if name.starts_with("models_") {
        Stage::Lists
    } else {
        Stage::Plain
    }
}

fn on(wanted: Stage) -> Vec<Case> {
    let mut cases = case::all();
    cases.retain(|case| stage(case) == wanted);
    cases
}

#[test]
fn every_case_is_on_one_stage_and_every_exemption_is_a_case() {
    let cases = case::all();
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!((cases.len(), names.len()), (358, 358));
    use Stage::*;
    let counts =
        [Plain, Keyed, Restricted, Down, Silent, Broken, Lists, Unsupported, Setup].map(|stage| on(stage).len());
    assert_eq!(counts, [308, 8, 2, 2, 3, 4, 4, 26, 1], "the tests below count as well");
    for (why, exempt) in DIFFERS.iter().chain(FAULTS) {
        for name in *exempt {
            assert!(names.contains(name), "{why}: there is no case {name}");
        }
    }
}

/// A proxy, and what stands in for Bifrost's backend.
struct Street {
    backend: Backend,
    house: House,
}

impl Street {
    async fn open(stage: Stage, plan: Plan) -> Street {
        let backend = Backend::start(on(stage)).await;
        // Many of the cases fail on purpose, and each is to be sent all the same.
        let config = format!("{}\n[health]\nprobe_s = 0\nfailures = 1000\n", plan.config);
        let house = House::with(Plan { backend: Some(backend.url.clone()), config, ..plan }).await;
        Street { backend, house }
    }

    fn request(&self, case: &Case) -> Request {
        let request = Request::new(&case.client.method, &case.client.path).bearer(&self.house.token()).id(&case.name);
        match case.client.method.as_str() {
            "GET" => request,
            _ => request.header("content-type", "application/json").body(case.body()),
        }
    }

    /// Which must be alike: what the backend said, what our caller learnt, what the audit says. And whether Bifrost's learnt it too.
    fn judge(&self, case: &Case, reply: &Reply, record: &Value) {
        let name = &case.name;
        let answer = case.answer().unwrap_or_else(plain);
        let ours = told(reply);
        let theirs = {
            let got = case.got();
            Told::by(got.status, got.is_stream, &got.body)
        };
        assert_eq!(reply.end, End::Whole, "{name}");
        assert_eq!(reply.header("x-request-id"), Some(name.as_str()), "{name}: the caller's id");
        for private in ["set-cookie", "x-custom", "server"] {
            assert_eq!(reply.header(private), None, "{name}");
        }
        let extra = &record["extra"];
        let wanted = wanted(case, &answer);
        assert_eq!(ours, wanted.told, "{name}: what the caller learns");
        assert_eq!(record["response_code"], ours.status, "{name}");
        assert_eq!(extra["outcome"], wanted.outcome, "{name}");
        assert_eq!(extra["finish_reason"], json!(wanted.finish), "{name}");
        let counts = wanted.usage.map_or((Value::Null, Value::Null), |(input, output)| (input.into(), output.into()));
        let output = if counts.1 == 0 { Value::Null } else { counts.1 };
        assert_eq!((&extra["input_tokens"], &extra["output_tokens"]), (&counts.0, &output), "{name}");
        if let Some(bytes) = wanted.bytes {
            assert_eq!(reply.text(), bytes, "{name}: byte for byte");
        }
        self.judge_sent(case);
        if case.client.path == "/v1/responses" && answer.is_stream() {
            assert_eq!(told::faults(&reply.text()), "", "{name}");
            compare_faults(case);
        }
        compare(case, &ours, &theirs);
    }

    /// What the backend was asked.
    fn judge_sent(&self, case: &Case) {
        let (name, body) = (&case.name, case.body());
        let endpoint = match case.client.path.as_str() {
            "/v1/chat/completions" => Endpoint::ChatCompletions,
            "/v1/completions" => Endpoint::Completions,
            "/v1/embeddings" => Endpoint::OpenAiEmbeddings,
            _ => return self.judge_converted(case),
        };
        let sent = self.backend.requests_of(name);
        let Ok(filtered) = ask::read_filtered(endpoint, body.as_bytes(), Filter::ALL.into_iter().collect()) else {
            return assert!(sent.is_empty(), "{name}: it was refused");
        };
        let wanted = filtered.edits.apply(body.as_bytes());
        assert_eq!(sent.len(), 1, "{name}: asked once");
        assert_eq!(sent[0].body, String::from_utf8_lossy(&wanted), "{name}");
        assert!(sent[0].head.starts_with(&format!("POST {} ", case.client.path)), "{name}");
    }

    /// A request of `/v1/responses` came as a chat.
    fn judge_converted(&self, case: &Case) {
        let mut sent = self.backend.requests_of(&case.name);
        sent.retain(|request| !request.head.starts_with("POST /v1/responses "));
        match converted(case) {
            Ok(wanted) => {
                assert_eq!(sent.len(), 1, "{}: asked once", case.name);
                assert!(sent[0].head.starts_with("POST /v1/chat/completions "), "{}", case.name);
                let body: Value = serde_json::from_str(&sent[0].body).expect("JSON");
                assert!(wanted.is_null() || body == wanted, "{}: {body}", case.name);
            }
            Err(_) => assert!(sent.is_empty(), "{}: it was refused", case.name),
        }
    }
}

fn told(reply: &Reply) -> Told {
    let is_stream = reply.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"));
    Told::by(reply.status, is_stream, &reply.text())
}

/// The final records of all these cases, in their order.
async fn finals(house: &House, cases: &[Case]) -> Vec<Value> {
    wait_until("every final record", || {
        let records = read_records(&house.audit_dir());
        let of = |case: &Case| {
            let mut finals = records
                .iter()
                .filter(|record| record["extra"]["phase"] == "final" && record["extra"]["request_id"] == *case.name);
            let first = finals.next().cloned();
            assert!(finals.next().is_none(), "{}: exactly one final record", case.name);
            first
        };
        cases.iter().map(of).collect::<Option<Vec<Value>>>()
    })
    .await
}

/// Asks all of it, then judges all of it: the audit is read once.
async fn play(street: &Street, cases: &[Case]) {
    let mut replies = Vec::new();
    for case in cases {
        replies.push(street.house.send(street.request(case)).await);
    }
    let records = finals(&street.house, cases).await;
    let failed: Vec<&str> = cases
        .iter()
        .zip(replies.iter().zip(&records))
        .filter(|(case, (reply, record))| catch_unwind(AssertUnwindSafe(|| street.judge(case, reply, record))).is_err())
        .map(|(case, _)| case.name.as_str())
        .collect();
    assert!(failed.is_empty(), "{failed:?}: above stands why");
}

#[tokio::test]
async fn a_caller_learns_what_the_backend_said_in_each_ordinary_case() {
    let street = Street::open(Stage::Plain, Plan::default()).await;
    let cases = on(Stage::Plain);
    assert_eq!(cases.len(), 308);
    play(&street, &cases).await;
}

#[tokio::test]
async fn the_key_of_a_protected_backend_is_sent_with_each_request() {
    let env = vec![("BEHAVRY_OLLAMA_API_KEY".to_owned(), "sk-test".to_owned())];
    let street = Street::open(Stage::Keyed, Plan { env, ..Plan::default() }).await;
    let (lists, cases): (Vec<Case>, Vec<Case>) =
        on(Stage::Keyed).into_iter().partition(|case| case.client.method == "GET");
    assert_eq!((lists.len(), cases.len()), (1, 7));
    play(&street, &cases).await;
    for case in &lists {
        judge_list(&street, case, &street.house.token()).await;
    }
    for case in &cases {
        for request in street.backend.requests_of(&case.name) {
            assert_eq!(request.header("authorization"), Some("Bearer sk-test"), "{}", case.name);
        }
    }
}

/// A list of models; its request to the backend is the proxy's own.
async fn judge_list(street: &Street, case: &Case, token: &str) {
    street.backend.list(case);
    let asked = Request::get(&case.client.path).bearer(token).id(&case.name);
    let reply = street.house.send(asked).await;
    let answer = case.answer().expect("a list");
    let ours = told(&reply);
    let got = case.got();
    let mut wanted = Told::by(answer.status, false, &answer.body);
    if answer.status != 200 {
        wanted = Told { status: 502, error: Some(GARBLED.to_owned()), ..Told::default() };
    }
    if case.client.config["models"].is_array() {
        wanted.items.retain(|item| *item == Item::Model("tiny:latest".to_owned()));
    }
    assert_eq!(ours, wanted, "{}", case.name);
    if ours.status == 200 {
        let list = reply.json();
        assert!(list["data"].is_array() && list["object"] == "list", "{}: {list}", case.name);
    }
    compare(case, &ours, &Told::by(got.status, false, &got.body));
    let record = street.house.final_of(&case.name).await;
    assert_eq!(record["response_code"], reply.status, "{}", case.name);
    let sent = street.backend.requests_of(&case.name);
    assert_eq!(sent.len(), 1, "{}: asked once", case.name);
    if let Some(key) = case.client.config["key"].as_str() {
        assert_eq!(sent[0].header("authorization"), Some(format!("Bearer {key}").as_str()), "{}", case.name);
    }
}

#[tokio::test]
async fn lists_have_the_names_that_ollama_gives() {
    let street = Street::open(Stage::Lists, Plan::default()).await;
    let cases = on(Stage::Lists);
    assert_eq!(cases.len(), 4);
    for case in &cases {
        judge_list(&street, case, &street.house.token()).await;
    }
}

const SOME_MODELS: &str = "package behavry.authz
import rego.v1
default allow := false
allow if { input.agent_role == \"others\"; input.model == \"other\" }
allow if { input.agent_role == \"listed\"; input.model in {\"tiny\", \"absent:1b\"} }
";

#[tokio::test]
async fn a_model_that_a_caller_may_not_use_is_refused_and_not_listed() {
    let policy = vec![("some.rego", SOME_MODELS.to_owned())];
    let street = Street::open(Stage::Restricted, Plan { policy, ..Plan::default() }).await;
    let cases = on(Stage::Restricted);
    assert_eq!(cases.len(), 2);
    let permissions = ["web:read", "web:write"];
    for case in &cases {
        if case.client.method == "GET" {
            judge_list(&street, case, &street.house.token_with(&["listed"], &permissions)).await;
            continue;
        }
        let token = street.house.token_with(&["others"], &permissions);
        let asked = Request::post(&case.client.path, case.asked()).bearer(&token).id(&case.name);
        let reply = street.house.send(asked).await;
        assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()), "{}", case.name);
        let got = case.got();
        compare(case, &told(&reply), &Told::by(got.status, false, &got.body));
        assert_eq!(street.house.final_of(&case.name).await["extra"]["outcome"], "refused");
        assert!(street.backend.requests_of(&case.name).is_empty());
    }
}

#[tokio::test]
async fn a_backend_that_does_not_listen_is_a_502_that_shows_where() {
    let puppet = Puppet::listen().await;
    let url = puppet.url();
    let house = House::with(Plan { backend: Some(url.clone()), ..Plan::default() }).await;
    let _port = puppet.leave();
    let cases = on(Stage::Down);
    assert_eq!(cases.len(), 2);
    for case in &cases {
        let mut asked = Request::new(&case.client.method, &case.client.path).bearer(&house.token()).id(&case.name);
        if case.client.method == "POST" {
            asked = asked.body(case.body());
        }
        let reply = house.send(asked).await;
        assert_eq!((reply.status, reply.code()), (502, "backend_unreachable".to_owned()), "{}", case.name);
        let ours = told(&reply);
        assert_eq!(ours.error, Some(format!("Cannot reach Ollama at {url}. Is it running?")), "{}", case.name);
        let got = case.got();
        compare(case, &ours, &Told::by(got.status, false, &got.body));
        let record = house.final_of(&case.name).await;
        assert_eq!((&record["response_code"], &record["extra"]["upstream_status"]), (&json!(502), &Value::Null));
    }
}

/// A second of silence is what has to come. Where it comes before a stream has begun, on a machine that had no time for the backend, the
/// stream is asked for again.
#[tokio::test]
async fn silence_is_a_504_before_the_first_byte_and_an_error_event_after_it() {
    let config = "[backend_timeouts]\nsilence_s = 1\n".to_owned();
    let street = Street::open(Stage::Silent, Plan { config, ..Plan::default() }).await;
    let cases = on(Stage::Silent);
    assert_eq!(cases.len(), 3);
    for case in &cases {
        let never_begins = case.answer().expect("an answer").then == Then::NeverBegins;
        let mut tries = 0;
        let (id, reply) = until_tried(&case.name, async || {
            tries += 1;
            let id = format!("{}~{tries}", case.name);
            let mut request = street.request(case);
            request.headers.retain(|(name, _)| name != "x-request-id");
            let reply = street.house.send(request.id(&id)).await;
            (never_begins || reply.status == 200).then_some((id, reply))
        })
        .await;
        let (ours, record) = (told(&reply), street.house.final_of(&id).await);
        let got = case.got();
        compare(case, &ours, &Told::by(got.status, got.is_stream, &got.body));
        assert_eq!(record["extra"]["outcome"], "timeout", "{id}");
        assert_eq!(record["extra"]["output_tokens"], Value::Null, "{id}");
        if never_begins {
            assert_eq!((reply.status, reply.code()), (504, "backend_timeout".to_owned()), "{id}");
        } else {
            assert_eq!(reply.end, End::Whole, "{id}");
            assert_eq!(ours.items, [Item::Said("Hello".to_owned())], "{id}: what was said before");
            assert!(ours.error.is_some() && !ours.ended, "{id}: it is told, and looks like no end");
        }
        wait_until("the backend is left alone", || street.backend.was_left(&case.name).then_some(())).await;
    }
}

#[tokio::test]
async fn a_reset_is_told_without_addresses_and_a_client_that_leaves_takes_the_work_with_it() {
    let street = Street::open(Stage::Broken, Plan::default()).await;
    let cases = on(Stage::Broken);
    assert_eq!(cases.len(), 4);
    for case in &cases {
        let (name, answer) = (&case.name, case.answer().expect("an answer"));
        let mut client = Connection::open(street.house.public).await;
        client.send(&street.request(case)).await;
        let mut text = String::new();
        if answer.body.is_empty() {
            let asked = || (!street.backend.requests_of(name).is_empty()).then_some(());
            wait_until("the backend is asked", asked).await;
        } else {
            assert_eq!(client.head().await.expect("a head").0, 200, "{name}");
            while !text.contains("\"lo\"") {
                text += &String::from_utf8_lossy(&client.chunk().await.expect("not the end").expect("a chunk"));
            }
        }
        if answer.then == Then::Resets {
            street.backend.reset();
            while let Some(chunk) = client.chunk().await {
                text += &String::from_utf8_lossy(&chunk.expect("it is ended cleanly"));
            }
            let (ours, got) = (Told::by(200, true, &text), case.got());
            assert_eq!(ours.items, [Item::Said("Hello".to_owned())], "{name}");
            assert!(ours.error.is_some(), "{name}: it is told");
            assert!(!text.contains("127.0.0.1") && got.body.contains("127.0.0.1"), "{name}: no addresses");
            compare(case, &ours, &Told::by(got.status, true, &got.body));
            if case.client.path == "/v1/responses" {
                assert_eq!(told::faults(&text), "", "{name}");
                compare_faults(case);
            } else {
                assert!(!ours.ended, "{name}: nothing that looks like an end");
            }
            assert_eq!(street.house.final_of(name).await["extra"]["outcome"], "upstream_reset", "{name}");
        } else {
            drop(client);
            wait_until("the backend is left alone", || street.backend.was_left(name).then_some(())).await;
            let record = street.house.final_of(name).await;
            assert_eq!(record["extra"]["outcome"], "client_abort", "{name}");
            assert_eq!(record["extra"]["output_tokens"], Value::Null, "{name}");
            assert!(reason(case).is_some(), "{name}: there is no caller left to compare");
        }
    }
}

/// Bifrost needs its backend's address in a certain place; here it has a default, which is shown.
#[tokio::test]
async fn a_backend_need_not_be_named() {
    let cases = on(Stage::Setup);
    assert_eq!(cases.len(), 1);
    let folder = tempfile::tempdir().expect("a folder");
    let mut check = program(&["check"]);
    check.env("BEHAVRY_STATE_DIR", folder.path());
    let ended = run_to_end(check).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("http://localhost:11434"), "{}", ended.stdout);
    let got = cases[0].got();
    assert_eq!(got.status, 400, "Bifrost's caller is told that no key was found");
    assert!(reason(&cases[0]).is_some());
}

/// Of each operation that Bifrost calls unsupported: our answer, its words, and that no backend hears of it.
#[tokio::test]
async fn unsupported_operations_are_refused_in_bifrosts_words() {
    let house = House::open().await;
    let cases = on(Stage::Unsupported);
    assert_eq!(cases.len(), 26);
    for case in &cases {
        let name = &case.name;
        let mut asked = Request::new(&case.client.method, &case.client.path).bearer(&house.token()).id(name);
        if case.client.method != "GET" {
            asked = asked.header("content-type", "application/json").body(case.body());
        }
        let reply = house.send(asked).await;
        let got = case.got();
        let theirs: Value = serde_json::from_str(&got.body).expect("JSON");
        let words = |error: &Value| (error["code"].clone(), error["message"].clone());
        let kind = &theirs["extra_fields"]["request_type"];
        let message = json!(format!("{} is not supported by ollama provider", kind.as_str().expect("a word")));
        let same = (reply.status, words(&reply.json()["error"])) == (got.status, words(&theirs["error"]));
        assert_eq!(reason(case).is_none(), same, "{name}: {}", reply.text());
        let record = house.final_of(name).await;
        assert_eq!(record["extra"]["upstream_status"], Value::Null, "{name}");
        if reason(case) == Some(NO_SUCH_ROUTE) {
            assert_eq!((reply.status, reply.code()), (404, "unknown_route".to_owned()), "{name}");
            continue;
        }
        let wanted = json!({
            "error": { "message": message, "type": "invalid_request_error", "param": null, "code": "unsupported_operation" },
            "detail": message,
            "extra_fields": { "provider": "ollama", "request_type": kind },
        });
        assert_eq!((reply.status, reply.json()), (400, wanted), "{name}");
        assert_eq!(
            (&record["error"], &record["response_code"]),
            (&json!("unsupported_operation"), &json!(400)),
            "{name}"
        );
        assert_eq!(record["agent_id"], "tester", "{name}");
    }
    assert_eq!((house.simulator.connections(), house.simulator.seen().len()), (0, 0), "no backend heard of any of it");
}
