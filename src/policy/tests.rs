//! The sentences of contract.md, section 3, one by one; then what a policy folder may do to us.

use super::budget::thread_time;
use super::*;
use crate::wire::Source;

/// A busy machine must not fail a test that is not about time.
const UNHURRIED: Settings = Settings { builtin_errors: BuiltinErrors::Strict, timeout_ms: 10_000 };

const P: &str = "package behavry.authz\n";

fn caller(roles: &[&str]) -> Caller {
    Caller {
        agent_id: "a1".to_owned(),
        agent_name: Some("Ann".to_owned()),
        session_id: "s1".to_owned(),
        roles: roles.iter().map(|r| (*r).to_owned()).collect(),
        permissions: vec!["web:read".to_owned(), "web:write".to_owned()],
        risk_tier: Some("medium".to_owned()),
        expires_at: 0,
        issued_at: None,
    }
}

fn ask(model: Option<&str>) -> Ask {
    Ask { model: model.map(|m| model::parse(m).expect("test names are names")), ..Ask::default() }
}

fn facts<'a>(caller: &'a Caller, ask: &'a Ask) -> Facts<'a> {
    Facts {
        caller,
        ask,
        targets: &[],
        endpoint: Endpoint::Chat,
        method: "POST",
        resource: "/api/chat",
        requester: Requester::default(),
        source_ip: None,
        now: jiff::Timestamp::UNIX_EPOCH,
    }
}

fn list<'a>(caller: &'a Caller, ask: &'a Ask) -> Facts<'a> {
    Facts { endpoint: Endpoint::Tags, method: "GET", resource: "/api/tags", ..facts(caller, ask) }
}

fn policy(rules: &str) -> Policy {
    policy_with(rules, UNHURRIED)
}

fn policy_with(rules: &str, settings: Settings) -> Policy {
    match Policy::from_sources(&[("p.rego", &format!("{P}{rules}\n"))], &settings) {
        Ok(policy) => policy,
        Err(error) => panic!("{error}"),
    }
}

fn refused_at_load(files: &[(&str, &str)]) -> String {
    match Policy::from_sources(files, &UNHURRIED) {
        Ok(_) => panic!("loaded"),
        Err(error) => error.to_string(),
    }
}

fn decide(policy: &Policy, roles: &[&str], model: Option<&str>) -> Result<Permit, Denial> {
    policy.decide(&facts(&caller(roles), &ask(model)))
}

fn denial(policy: &Policy, roles: &[&str], model: Option<&str>) -> (DenialKind, String, Vec<String>) {
    let denial = decide(policy, roles, model).expect_err("refused");
    assert_eq!(denial.revision, policy.revision());
    (denial.kind, denial.policy_id, denial.reasons)
}

fn temp_dir(name: &str) -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("policy-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("the temporary folder is writable");
    dir
}

// The decision.

#[test]
fn a_boolean_deny_denies_and_names_model_and_roles() {
    let policy = policy("deny if input.model == \"mistral\"");
    assert!(decide(&policy, &["internal"], Some("llama3.2")).is_ok());
    let (kind, id, reasons) = denial(&policy, &["internal"], Some("Mistral:latest"));
    assert_eq!((kind, id.as_str()), (DenialKind::Denied, "behavry.authz.deny"));
    assert_eq!(reasons, ["behavry.authz.deny denies this (model mistral) (roles: internal)"]);
}

#[test]
fn the_strings_of_a_deny_set_are_the_reasons() {
    let policy = policy("deny contains \"b\" if input.model == \"x\"\ndeny contains \"a\" if input.model == \"x\"");
    assert!(decide(&policy, &[], Some("y")).is_ok(), "an empty set denies nothing");
    assert_eq!(denial(&policy, &[], Some("x")).2, ["a", "b"]);
}

#[test]
fn reasons_are_bounded_in_count_and_length() {
    let policy = policy(
        "deny contains sprintf(\"%d%s\", [i, concat(\"\", [x | numbers.range(1, 300)[_]; x := \"é\"])]) if some i in numbers.range(1, 20)",
    );
    let reasons = denial(&policy, &[], None).2;
    assert_eq!(reasons.len(), 8);
    assert!(reasons.iter().all(|r| r.chars().count() <= 257), "{reasons:?}");
}

#[test]
fn reasons_with_newlines_and_escapes_come_out_harmless() {
    let policy = policy("deny contains \"a\\nb\\u001b[31mred\\u202e\\u0085\\u0000\" if true");
    assert_eq!(denial(&policy, &[], None).2, ["a\\nb\\u{1b}[31mred\\u{202e}\\u{85}\\u{0}"]);
}

#[test]
fn a_role_with_escapes_does_not_reach_the_words_of_a_refusal() {
    let policy = policy("deny if true");
    let reasons = denial(&policy, &["in\u{1b}]0;x\u{7}\nternal"], None).2;
    assert!(!reasons[0].contains(char::is_control), "{reasons:?}");
}

#[test]
fn reasons_that_are_not_text_are_json() {
    assert_eq!(denial(&policy("deny contains {\"code\": 7} if true"), &[], None).2, [r#"{"code":7}"#]);
}

#[test]
fn escalate_refuses_with_a_kind_of_its_own() {
    let policy = policy("escalate if input.model == \"big\"");
    assert!(decide(&policy, &[], Some("small")).is_ok());
    let (kind, id, _) = denial(&policy, &[], Some("big"));
    assert_eq!((kind, id.as_str()), (DenialKind::Escalated, "behavry.authz.escalate"));
}

#[test]
fn a_decision_allows_denies_or_escalates_by_its_result() {
    let policy = policy(
        "decision := {\"result\": r, \"reason\": \"because\"} if r := {\"a\": \"allow\", \"d\": \"deny\", \"e\": \"escalate\", \"o\": \"Allow\"}[input.model]",
    );
    let permit = decide(&policy, &[], Some("a")).expect("allowed");
    assert_eq!((permit.policy_id(), permit.reason()), ("behavry.authz.decision", Some("because")));
    assert_eq!(denial(&policy, &[], Some("d")), {
        (DenialKind::Denied, "behavry.authz.decision".to_owned(), vec!["because".to_owned()])
    });
    assert_eq!(denial(&policy, &[], Some("e")).0, DenialKind::Escalated);
    assert_eq!(denial(&policy, &[], Some("o")).0, DenialKind::Escalated, "only the word `allow` allows");
    let (kind, id, _) = denial(&policy, &[], Some("undefined"));
    assert_eq!((kind, id.as_str()), (DenialKind::Denied, "behavry.authz"));
}

#[test]
fn a_package_that_declares_allow_denies_where_it_does_not_hold() {
    for rules in ["allow if input.model == \"x\"", "default allow := false\nallow if input.model == \"x\""] {
        let policy = policy(rules);
        assert_eq!(decide(&policy, &[], Some("x")).expect("allowed").policy_id(), "behavry.authz.allow");
        let (kind, id, reasons) = denial(&policy, &[], Some("y"));
        assert_eq!((kind, id.as_str()), (DenialKind::Denied, "behavry.authz"));
        assert_eq!(reasons, ["no rule of the policy allows this (model y) (no role)"]);
    }
}

#[test]
fn a_package_that_only_declares_denies_allows_the_rest() {
    let policy = policy("deny if false");
    assert_eq!(decide(&policy, &[], Some("x")).expect("allowed").policy_id(), "behavry.authz");
}

#[test]
fn allow_is_declared_wherever_it_is_written() {
    let deny = "package behavry.authz\ndeny if false\n";
    for other in [
        "package behavry\nauthz.allow := true if input.model == \"x\"\n",
        "package behavry.authz.decision\nresult := \"allow\" if input.model == \"x\"\n",
        "package behavry.authz\ndecision.result := \"allow\" if input.model == \"x\"\n",
    ] {
        let policy = Policy::from_sources(&[("a.rego", deny), ("b.rego", other)], &UNHURRIED).expect(other);
        assert!(decide(&policy, &[], Some("x")).is_ok(), "{other}");
        assert!(decide(&policy, &[], Some("y")).is_err(), "{other}");
    }
}

#[test]
fn deny_wins_over_allow() {
    let policy = policy("allow := true\ndeny if input.model == \"x\"");
    assert!(decide(&policy, &[], Some("y")).is_ok());
    assert_eq!(denial(&policy, &[], Some("x")).0, DenialKind::Denied);
}

#[test]
fn a_wrong_type_refuses() {
    for rules in [
        "deny := \"yes\" if input.model == \"x\"",
        "deny := [\"a\"] if input.model == \"x\"",
        "deny := null if input.model == \"x\"",
        "deny := 0 if input.model == \"x\"",
        "deny[\"k\"] := 1 if input.model == \"x\"",
        "allow := 1 if input.model == \"x\"",
        "allow := \"true\" if input.model == \"x\"",
        "escalate := \"no\" if input.model == \"x\"",
        "allow := true\ndecision := \"allow\" if input.model == \"x\"",
        "decision := {\"reason\": \"r\"} if input.model == \"x\"",
        "decision := {\"result\": true} if input.model == \"x\"",
    ] {
        assert_eq!(denial(&policy(rules), &[], Some("x")).0, DenialKind::Error, "{rules}");
    }
}

#[test]
fn an_evaluation_error_refuses_with_file_and_line_and_without_policy_text() {
    let policy = policy("\ndeny if startswith(input.model, \"SECRET\")");
    assert!(decide(&policy, &[], Some("x")).is_ok());
    let (kind, id, reasons) = denial(&policy, &[], None);
    assert_eq!((kind, id.as_str()), (DenialKind::Error, "behavry.authz"));
    assert_eq!(reasons, ["p.rego:3: `startswith` expects string argument. Got `null` instead"]);
    assert!(policy.warnings()[0].starts_with("p.rego:3: `startswith`"), "{:?}", policy.warnings());
    assert!(decide(&policy, &[], Some("x")).is_ok(), "an error leaves nothing behind");
}

#[test]
fn undefined_builtin_errors_do_not_fire_as_in_opa() {
    let settings = Settings { builtin_errors: BuiltinErrors::Undefined, ..UNHURRIED };
    let policy = policy_with("deny if startswith(input.model, \"a\")", settings);
    assert!(decide(&policy, &[], None).is_ok());
    assert!(decide(&policy, &[], Some("abc")).is_err());
    assert_eq!(policy.warnings(), [""; 0]);
}

#[test]
fn a_runaway_rule_is_stopped_and_refuses() {
    let settings = Settings { timeout_ms: 700, ..UNHURRIED };
    let rules = "deny if { input.model == \"x\"; r := numbers.range(1, 3000); count([1 | some a in r; some b in r; a == b; a < 0]) > 0 }";
    let policy = policy_with(rules, settings);
    assert!(decide(&policy, &[], Some("y")).is_ok());
    let before = thread_time();
    let (kind, _, reasons) = denial(&policy, &["a", "b", "c", "d", "e", "f", "g", "h"], Some("x"));
    assert_eq!((kind, reasons), (DenialKind::Error, vec!["the policy took longer than 700 ms".to_owned()]));
    let took = thread_time() - before;
    assert!(took < Duration::from_millis(4 * 700), "one limit for all eight roles: {took:?}");
}

#[test]
fn a_batch_of_a_list_costs_one_timeout_at_most() {
    let settings = Settings { timeout_ms: 200, ..UNHURRIED };
    let rules = "deny if { startswith(input.model_ref.raw, \"slow\"); r := numbers.range(1, 3000); count([1 | some a in r; some b in r; a == b; a < 0]) > 0 }";
    let policy = policy_with(&rules.replace("startswith(", "input.model != null; startswith("), settings);
    let names: Vec<String> = (0..64).map(|i| if i == 0 { "fast".to_owned() } else { format!("slow{i}") }).collect();
    let names: Vec<&str> = names.iter().map(|n| &**n).collect();
    let before = thread_time();
    let (caller, ask) = (caller(&[]), ask(None));
    let shown = policy.shows(&list(&caller, &ask), &names);
    assert!(shown[0] && shown[1..].iter().all(|shown| !shown));
    let took = thread_time() - before;
    assert!(took < Duration::from_millis(16 * 200), "{took:?} for 63 names that are slow");
}

// Roles and models.

#[test]
fn one_denied_role_refuses_in_any_order() {
    let policy = policy("deny if input.agent_role == \"external\"");
    assert!(decide(&policy, &["internal"], None).is_ok());
    for roles in [&["internal", "external"], &["external", "internal"]] {
        assert!(decide(&policy, roles, None).is_err());
    }
}

#[test]
fn the_role_being_decided_is_the_agents_role_too() {
    let policy = policy("deny if input.agent.role == \"external\"");
    assert!(decide(&policy, &["internal", "external"], None).is_err());
}

#[test]
fn one_allowed_role_is_enough_where_none_is_denied() {
    let policy = policy("default allow := false\nallow if input.agent_role == \"b\"");
    assert!(decide(&policy, &["a", "b"], None).is_ok());
    assert!(decide(&policy, &["a"], None).is_err());
    assert!(decide(&policy, &[], None).is_err());
}

#[test]
fn a_denied_role_outweighs_an_error_and_an_escalation_of_others() {
    let policy = policy(
        "deny if input.agent_role == \"d\"\nescalate if input.agent_role == \"e\"\nallow := 1 if input.agent_role == \"x\"\nallow := true if input.agent_role != \"x\"",
    );
    assert_eq!(denial(&policy, &["e", "x", "d"], None).0, DenialKind::Denied);
    assert_eq!(denial(&policy, &["e", "x"], None).0, DenialKind::Error);
    assert_eq!(denial(&policy, &["ok", "e"], None).0, DenialKind::Escalated);
}

#[test]
fn without_roles_the_role_is_null() {
    let policy = policy("allow if input.agent_role == null");
    assert!(decide(&policy, &[], None).is_ok());
    assert!(decide(&policy, &["a"], None).is_err());
}

#[test]
fn a_caller_with_more_than_eight_roles_is_refused() {
    let policy = policy("deny if false");
    let nine: Vec<String> = (0..9).map(|i| i.to_string()).collect();
    let nine: Vec<&str> = nine.iter().map(|r| &**r).collect();
    assert_eq!(denial(&policy, &nine, None).0, DenialKind::Error);
    assert!(decide(&policy, &nine[..8], None).is_ok());
}

#[test]
fn every_model_that_a_request_names_is_decided() {
    let policy = policy("deny if input.model == \"secret\"");
    let caller = caller(&["r"]);
    for (model, other, passes) in [("a", "b", true), ("a", "secret", false), ("secret", "b", false)] {
        let mut ask = ask(Some(model));
        ask.others.push(model::parse(other).expect("a name"));
        assert_eq!(policy.decide(&facts(&caller, &ask)).is_ok(), passes, "{model} {other}");
    }
}

#[test]
fn a_request_with_too_many_models_is_refused() {
    let mut ask = ask(Some("a"));
    ask.others = vec![ask.model.clone().expect("set above"); 17];
    let caller = caller(&[]);
    assert!(policy("deny if false").decide(&facts(&caller, &ask)).is_err());
}

#[test]
fn the_permit_owns_what_was_decided() {
    let policy = policy("deny if false");
    let permit = decide(&policy, &[], Some("LLAMA3.2")).expect("allowed");
    assert_eq!(permit.model().map(|m| m.raw.as_str()), Some("LLAMA3.2"));
    assert_eq!((permit.endpoint(), permit.revision()), (Endpoint::Chat, policy.revision()));
}

// Lists.

const SEED: &str = include_str!("../../policies/examples/seed.rego");

#[test]
fn the_seeds_policy_lists_the_approved_models_and_denies_null() {
    let policy = Policy::from_sources(&[("seed.rego", SEED)], &UNHURRIED).expect("the seed loads");
    let (caller, ask) = (caller(&["internal"]), ask(None));
    let facts = list(&caller, &ask);
    let opened = policy.open_list(&facts).expect("a list");
    assert_eq!(opened.empty_allowed().map_err(|d| d.kind), Err(DenialKind::Denied));
    let names = ["llama3.2:latest", "llama3.2:1b", "MISTRAL", "no name!", "", "llama3.2:latest", "codellama"];
    assert_eq!(policy.shows(&facts, &names), [true, false, true, false, false, true, true]);
    assert_eq!(opened.permit().model(), None);
}

#[test]
fn an_external_agent_is_shown_nothing_by_the_seeds_policy() {
    let policy = Policy::from_sources(&[("seed.rego", SEED)], &UNHURRIED).expect("the seed loads");
    let (caller, ask) = (caller(&["external"]), ask(None));
    assert_eq!(policy.shows(&list(&caller, &ask), &["llama3.2", "mistral"]), [false, false]);
}

#[test]
fn an_empty_list_is_shown_where_the_null_model_passes() {
    let policy = policy("deny if input.model == \"x\"");
    let (caller, ask) = (caller(&[]), ask(None));
    let opened = policy.open_list(&list(&caller, &ask)).expect("a list");
    assert_eq!(opened.empty_allowed(), Ok(()));
}

#[test]
fn only_a_list_can_be_opened_as_one() {
    let (caller, ask) = (caller(&[]), ask(Some("x")));
    let refused = policy("deny if true").open_list(&facts(&caller, &ask));
    assert_eq!(refused.map(|_| ()).map_err(|d| d.kind), Err(DenialKind::Error));
}

// The document.

#[test]
fn the_document_has_every_member_of_the_contract_and_null_for_what_is_absent() {
    let bare = Caller { agent_name: None, risk_tier: None, permissions: Vec::new(), ..caller(&[]) };
    let ask = Ask::default();
    let document = explain::json(&input::document(&facts(&bare, &ask), None, None)).expect("JSON");
    let want = serde_json::json!({
        "mcp_server": "ollama-proxy", "tool_name": "ollama-api", "model": null, "agent_role": null,
        "agent": {"id": "a1", "name": null, "role": null, "roles": [], "permissions": [], "risk_tier": null, "session_id": "s1"},
        "request": {"tool_name": "ollama-api", "action": "post", "method": "POST", "resource": "/api/chat",
            "mcp_server": "ollama-proxy", "resource_count": 1, "kind": "infer", "dialect": "native",
            "parameters": {"model": null, "stream": null, "has_tools": null, "has_system_prompt": null,
                "message_count": null, "keep_alive": null, "num_ctx": null, "num_predict": null}},
        "action": {"type": "write", "tool": "ollama-api/api/chat", "method": "POST"},
        "resource": {"path": "/api/chat", "server": "ollama-proxy", "model": null},
        "model_ref": {"raw": null, "name": null, "tag": null, "namespace": null, "host": null, "source": null},
        "session": {"id": "s1"}, "requester": {"id": null, "channel": null, "verified": false},
        "context": {"source_ip": null, "time": "1970-01-01T00:00:00Z"},
        "workflow_session": null, "delegation": null
    });
    assert_eq!(document, want);
}

#[test]
fn the_document_carries_what_is_known() {
    let caller = caller(&["x", "y"]);
    let mut ask = ask(Some("HF.co/User/Repo:Q4"));
    ask.num_ctx = Some(8192);
    ask.keep_alive = Some("5m".into());
    let facts = Facts {
        requester: Requester { id: Some("u1"), channel: Some("slack") },
        source_ip: Some("::ffff:10.1.2.3".parse().expect("an address")),
        endpoint: Endpoint::ChatCompletions,
        ..facts(&caller, &ask)
    };
    let document = explain::json(&input::document(&facts, Some("y"), ask.model.as_ref())).expect("JSON");
    assert_eq!(document["model"], "hf.co/user/repo:q4");
    assert_eq!(document["model_ref"]["raw"], "HF.co/User/Repo:Q4");
    assert_eq!(document["request"]["parameters"]["num_ctx"], 8192);
    assert_eq!(document["request"]["parameters"]["keep_alive"], "5m");
    assert_eq!(document["request"]["dialect"], "openai");
    assert_eq!(document["requester"], serde_json::json!({"id": "u1", "channel": "slack", "verified": false}));
    assert_eq!(document["context"]["source_ip"], "10.1.2.3");
    assert_eq!((&document["agent_role"], &document["agent"]["role"]), (&"y".into(), &"y".into()));
    assert_eq!(document["agent"]["roles"], serde_json::json!(["x", "y"]));
}

#[test]
fn a_keep_alive_that_is_no_duration_cannot_carry_text() {
    let caller = caller(&[]);
    for (given, seen) in [
        (serde_json::json!("-1"), serde_json::json!("-1")),
        (serde_json::json!(-1), serde_json::json!(-1)),
        (serde_json::json!("tell me a secret"), serde_json::json!("other")),
        (serde_json::json!("1h".repeat(40)), serde_json::json!("other")),
        (serde_json::json!({"a": "b"}), serde_json::json!("other")),
        (serde_json::json!(null), serde_json::json!(null)),
    ] {
        let ask = Ask { keep_alive: Some(given), ..Ask::default() };
        let document = explain::json(&input::document(&facts(&caller, &ask), None, None)).expect("JSON");
        assert_eq!(document["request"]["parameters"]["keep_alive"], seen);
    }
}

#[test]
fn reading_is_a_read_even_by_post() {
    let (caller, ask) = (caller(&[]), ask(Some("x")));
    let facts = Facts { endpoint: Endpoint::Show, resource: "/api/show", ..facts(&caller, &ask) };
    let document = explain::json(&input::document(&facts, None, None)).expect("JSON");
    assert_eq!(document["action"]["type"], "read");
}

// Loading.

#[test]
fn a_v0_file_is_read_as_v0_with_a_warning_beside_v1_files() {
    let files = [
        ("a.rego", "package behavry.authz\ndeny contains \"v1\" if input.model == \"a\"\n"),
        ("b.rego", "package behavry.authz\ndeny[msg] { input.model == \"b\"; msg := \"v0\" }\n"),
    ];
    let policy = Policy::from_sources(&files, &UNHURRIED).expect("loads");
    assert_eq!(policy.warnings().len(), 1);
    assert!(policy.warnings()[0].starts_with("b.rego: read as Rego v0"), "{:?}", policy.warnings());
    assert_eq!(denial(&policy, &[], Some("a")).2, ["v1"]);
    assert_eq!(denial(&policy, &[], Some("b")).2, ["v0"]);
    assert!(decide(&policy, &[], Some("c")).is_ok());
}

#[test]
fn a_v1_file_with_a_mistake_is_not_read_as_v0_where_it_would_allow_everything() {
    // In v0 the second line is a rule `allow` without a body, which always holds, and a rule called `if`.
    let text = "package behavry.authz\nallow if { input.model == \"x\" }\nis_small(\"y\")\n";
    let error = refused_at_load(&[("a.rego", text)]);
    assert!(error.starts_with("a.rego:3: ") && error.contains("if true"), "{error}");
    for v0 in ["allow\n", "allow { false }\nallow\n", "f(\"x\")\nallow { f(\"x\") }\n"] {
        let error = refused_at_load(&[("a.rego", &format!("package behavry.authz\n{v0}"))]);
        assert!(error.starts_with("a.rego:"), "{error}");
    }
}

#[test]
fn a_syntax_error_names_file_and_line() {
    let error = refused_at_load(&[("sub/a.rego", "package behavry.authz\n\ndeny if { input.x = = 3 }\n")]);
    assert!(error.starts_with("sub/a.rego:3: "), "{error}");
}

#[test]
fn a_deny_that_is_boolean_here_and_a_set_there_is_refused_with_both_places() {
    for (a, b) in [
        ("deny if input.model == \"x\"", "deny contains \"r\" if input.model == \"y\""),
        ("deny contains \"r\" if input.model == \"x\"", "deny := true if input.model == \"y\""),
        ("default deny := false", "deny contains \"r\" if input.model == \"y\""),
    ] {
        let error = refused_at_load(&[("a.rego", &format!("{P}{a}\n")), ("b.rego", &format!("{P}\n{b}\n"))]);
        assert!(error.starts_with("b.rego:3: data.behavry.authz.deny is ") && error.contains("a.rego:2"), "{error}");
    }
}

#[test]
fn a_deciding_rule_that_is_a_function_is_refused() {
    let error = refused_at_load(&[("a.rego", &format!("{P}deny(x) if x.model == \"y\"\n"))]);
    assert!(error.starts_with("a.rego:2: `deny` is a function"), "{error}");
}

#[test]
fn walk_with_outputs_is_refused_with_its_line() {
    let text = format!("{P}\ndeny contains \"secret\" if {{ input.never; walk(input, [p, v]); is_string(v) }}\n");
    let error = refused_at_load(&[("w.rego", &text)]);
    assert!(error.starts_with("w.rego:3: ") && error.contains("walk"), "{error}");
}

#[test]
fn an_unknown_builtin_is_refused() {
    let error = refused_at_load(&[("a.rego", &format!("{P}deny if crypto.sha256(\"x\") == \"y\"\n"))]);
    assert!(error.starts_with("a.rego:2: ") && error.contains("not available"), "{error}");
}

#[test]
fn rules_that_depend_on_themselves_are_refused() {
    let error = refused_at_load(&[("a.rego", &format!("{P}deny if x\nx if y\ny if x\n"))]);
    assert!(error.contains("depends on itself"), "{error}");
}

#[test]
fn a_conflict_of_some_inputs_is_a_warning_and_refuses_those() {
    let policy = policy(
        "decision := {\"result\": \"allow\"} if input.model == \"llama3.2\"\ndecision := {\"result\": \"deny\"} if input.agent_role == \"external\"",
    );
    assert_eq!(policy.warnings().len(), 1, "{:?}", policy.warnings());
    assert!(decide(&policy, &["internal"], Some("llama3.2")).is_ok());
    assert_eq!(denial(&policy, &["external"], Some("llama3.2")).0, DenialKind::Error);
}

#[test]
fn deep_nesting_is_refused_before_it_hangs_the_parser() {
    let text = format!("{P}x := {}1{}\ndeny if false\n", "[".repeat(200), "]".repeat(200));
    let error = refused_at_load(&[("a.rego", &text)]);
    assert!(error.starts_with("a.rego:2: brackets"), "{error}");
    let harmless = format!("{P}# {0}\nx := \"\\\"{0}\"\ny := `{0}`\ndeny if {{ x == y }}\n", "[".repeat(200));
    assert!(Policy::from_sources(&[("a.rego", &harmless)], &UNHURRIED).is_ok());
}

#[test]
fn a_package_that_decides_nothing_is_refused() {
    for text in ["package behavry.authz\nhelper := 1\n", "package other\ndeny if true\n", "package behavry.authz\n"] {
        assert!(refused_at_load(&[("a.rego", text)]).contains("everything would be allowed"), "{text}");
    }
}

#[test]
fn an_empty_or_missing_or_broken_folder_is_refused() {
    let dir = temp_dir("empty");
    let load = |dir: &Path| Policy::load(dir, &UNHURRIED).map(drop).map_err(|e| e.to_string());
    assert!(load(&dir).expect_err("empty").contains("has no policy"));
    std::fs::write(dir.join("authz_test.rego"), "package t\n").expect("writable");
    assert!(load(&dir).expect_err("tests only").contains("has no policy"));
    std::fs::write(dir.join("a.rego"), [0x70, 0x0a, 0xff]).expect("writable");
    assert!(load(&dir).expect_err("not text").starts_with("a.rego:2: not UTF-8"));
    std::fs::write(dir.join("a.rego"), vec![b' '; (1 << 20) + 1]).expect("writable");
    assert!(load(&dir).expect_err("large").contains("more than 1048576 bytes"));
    assert!(load(&dir.join("missing")).expect_err("missing").contains("cannot read"));
    std::fs::remove_dir_all(&dir).expect("ours");
}

#[test]
fn a_folder_gives_rules_and_data_of_its_folders_but_not_hidden_ones_and_examples() {
    let dir = temp_dir("tree");
    for folder in ["behavry", "..data", "examples"] {
        std::fs::create_dir(dir.join(folder)).expect("writable");
    }
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).expect("writable");
    write(
        "a.rego",
        "package behavry.authz\nallow if input.model in data.behavry.models\nallow if input.model in data.top\n",
    );
    write("behavry/models.json", "{\"models\": [\"x\"]}");
    write("data.json", "{\"top\": [\"y\"]}");
    write("..data/a.rego", "package behavry.authz\nallow := true\n");
    write("examples/b.rego", "package behavry.authz\nallow := true\n");
    write("more.yaml", "a: b");
    let before = fingerprint(&dir).expect("readable");
    let policy = Policy::load(&dir, &UNHURRIED).expect("loads");
    assert!(decide(&policy, &[], Some("x")).is_ok() && decide(&policy, &[], Some("y")).is_ok());
    assert!(decide(&policy, &[], Some("z")).is_err());
    assert_eq!(policy.warnings(), ["more.yaml is not read: data must be JSON"]);
    assert_eq!(policy.revision().len(), 12);

    assert_eq!(fingerprint(&dir).expect("readable"), before);
    write("data.json", "{\"top\": [\"z\"]}");
    assert_ne!(fingerprint(&dir).expect("readable"), before, "same size, other text");
    let changed = Policy::load(&dir, &UNHURRIED).expect("loads");
    assert_ne!(changed.revision(), policy.revision());
    assert!(decide(&changed, &[], Some("z")).is_ok());

    write("data.json", "{\n\"top\": nothing}");
    let error = Policy::load(&dir, &UNHURRIED).expect_err("broken").to_string();
    assert!(error.starts_with("data.json:2: not JSON"), "{error}");
    std::fs::remove_dir_all(&dir).expect("ours");
}

#[cfg(unix)]
#[test]
fn a_linked_file_is_followed_and_a_pipe_or_linked_folder_is_not() {
    let dir = temp_dir("links");
    std::fs::create_dir(dir.join("..data")).expect("writable");
    std::fs::write(dir.join("..data/a.rego"), "package behavry.authz\ndeny if false\n").expect("writable");
    std::os::unix::fs::symlink("..data/a.rego", dir.join("a.rego")).expect("writable");
    std::os::unix::fs::symlink(".", dir.join("loop")).expect("writable");
    std::os::unix::fs::symlink("/dev/zero", dir.join("endless.rego")).expect("writable");
    assert!(Policy::load(&dir, &UNHURRIED).is_ok());
    std::fs::remove_dir_all(&dir).expect("ours");
}

#[test]
fn data_may_not_take_the_place_of_rules() {
    let rego = ("a.rego", "package behavry.authz\ndeny if false\n");
    for data in ["{\"behavry\": {\"authz\": {\"allow\": true}}}", "{\"behavry\": 7}", "[1]", "7"] {
        let error = refused_at_load(&[rego, ("data.json", data)]);
        assert!(error.starts_with("data.json: "), "{error}");
    }
    let error = refused_at_load(&[rego, ("behavry/authz/data.json", "{}")]);
    assert!(error.contains("belongs to the rules"), "{error}");
}

// The policies that come with the program, and their tests.

#[test]
fn the_embedded_policy_serves_a_new_user() {
    let policy = Policy::embedded(&UNHURRIED).expect("it loads");
    assert_eq!(policy.warnings(), [""; 0]);
    assert!(decide(&policy, &[], Some("llama3.2")).is_ok());
    assert!(decide(&policy, &["internal"], Some("anything:7b")).is_ok());
    assert_eq!(
        denial(&policy, &["external"], Some("llama3.2")).2,
        ["agents with the role external may not use local models"]
    );
    let cloud = model::parse("gpt-oss:120b-cloud").expect("a name");
    assert_eq!(cloud.source, Source::Cloud);
    assert!(decide(&policy, &[], Some("gpt-oss:120b-cloud")).is_err());

    let (agent, none) = (caller(&["internal"]), ask(None));
    let version =
        Facts { endpoint: Endpoint::Version, method: "GET", resource: "/api/version", ..facts(&agent, &none) };
    assert!(policy.decide(&version).is_ok());
    let opened = policy.open_list(&list(&agent, &none)).expect("a list");
    assert_eq!(opened.empty_allowed(), Ok(()));
    assert_eq!(policy.shows(&list(&agent, &none), &["a", "b:cloud"]), [true, false]);

    let one = ask(Some("a"));
    let delete = |caller| {
        let facts =
            Facts { endpoint: Endpoint::Delete, method: "DELETE", resource: "/api/delete", ..facts(caller, &one) };
        policy.decide(&facts).is_ok()
    };
    let admin = Caller { permissions: vec!["ollama:admin".to_owned()], ..caller(&[]) };
    assert!(!delete(&agent) && delete(&admin));
}

#[test]
fn the_shipped_policies_pass_their_own_tests() {
    let policies = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
    for (dir, at_least) in [(policies.clone(), 12), (policies.join("examples"), 7)] {
        let report = testing::run(&dir, &UNHURRIED).expect("it loads");
        assert!(report.passed(), "{report:?}");
        assert!(report.count(&testing::TestOutcome::Passed) >= at_least, "{report:?}");
        assert_eq!(report.warnings, [""; 0]);
    }
}

#[test]
fn policy_tests_pass_fail_err_and_are_skipped() {
    use testing::TestOutcome::*;
    let tests = "package t\nimport data.behavry.authz\n\
        test_pass if authz.deny with input as {\"model\": \"x\"}\n\
        test_undefined if authz.deny with input as {\"model\": \"y\"}\n\
        test_false := false\n\
        test_not_true := 1\n\
        test_error if startswith(null, \"a\")\n\
        todo_test_later if false\n\
        helper := true\n\
        test_twice := true\n\
        test_twice if false\n";
    let files = [
        ("a.rego", "package behavry.authz\ndeny if input.model == \"x\"\ntest_not_here := false\n"),
        ("a_test.rego", tests),
    ];
    let bundle = Bundle::from_sources(&files).expect("a bundle");
    let report = testing::run_bundle(&bundle, &UNHURRIED).expect("it loads");
    let outcomes: Vec<_> =
        report.results.iter().map(|r| (r.line, r.name.trim_start_matches("data.t."), &r.outcome)).collect();
    assert_eq!(outcomes[0], (3, "test_pass", &Passed));
    assert_eq!(outcomes[1], (4, "test_undefined", &Failed));
    assert_eq!(outcomes[2], (5, "test_false", &Failed));
    assert_eq!(outcomes[3], (6, "test_not_true", &Failed));
    assert!(
        matches!(outcomes[4], (7, "test_error", Error(words)) if words.starts_with("a_test.rego:7: ")),
        "{outcomes:?}"
    );
    assert_eq!(outcomes[5], (8, "todo_test_later", &Skipped));
    assert_eq!(outcomes[6], (10, "test_twice", &Passed));
    assert!(matches!(outcomes[7], (11, "test_twice", Error(_))));
    assert_eq!(outcomes.len(), 8);
    assert!(!report.passed());
}

#[test]
fn an_explanation_shows_every_role_and_the_input() {
    let policy = policy("deny contains \"no\" if input.agent_role == \"external\"");
    let (caller, ask) = (caller(&["internal", "external"]), ask(Some("x")));
    let explanation = serde_json::to_value(policy.explain(&facts(&caller, &ask))).expect("JSON");
    assert_eq!(explanation["decision"], "deny");
    assert_eq!(explanation["reasons"], serde_json::json!(["no"]));
    assert_eq!(explanation["verdicts"][0]["verdict"], "none");
    assert_eq!(
        explanation["verdicts"][1],
        serde_json::json!({
            "role": "external", "model": "x", "verdict": "deny", "reasons": ["no"], "document": {"deny": ["no"]}
        })
    );
    assert_eq!(explanation["input"]["agent_role"], "internal");
}

#[test]
fn a_policy_is_shared_between_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    let policy = policy("deny if input.model == \"x\"");
    shared(&policy);
    std::thread::scope(|scope| {
        for i in 0..4 {
            let policy = &policy;
            scope.spawn(move || {
                for _ in 0..50 {
                    assert_eq!(decide(policy, &["r"], Some(if i % 2 == 0 { "x" } else { "y" })).is_err(), i % 2 == 0);
                }
            });
        }
    });
}
