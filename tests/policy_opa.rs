//! Policies mean what OPA says they mean, or refuse.
//!
//! `fixtures/opa/verdicts.json` holds 1,050 verdicts of OPA 1.22.2: 25 policies, 42 inputs, some broken on purpose. Its
//! README lists where regorus differs; the same list is [`DIFFERS`], and a row that agrees after all fails the test too.

use behavry_ollama_proxy::policy::{BuiltinErrors, Policy, Settings};
use serde_json::{Value, json};

/// Policy and input (`*`: any) whose verdict is not OPA's although builtin errors are undefined as they are there.
const DIFFERS: [(&str, &str); 6] = [
    // `not approved[input.model]` with the member missing: nothing is denied in OPA; we pass null, never nothing.
    ("seed", "model_missing"),
    ("seed_v0", "model_missing"),
    ("v0_set", "model_missing"),
    // `upper("ß")`.
    ("unicode", "strasse"),
    // The last bit of `sum([0.1, 0.2])`: we deny with "sum", and nothing else may differ.
    ("numbers", "*"),
    // `sprintf("%s", [7])`.
    ("data_rules", "model_number"),
];

/// Policies that are refused at load, with what the message says.
const REFUSED_AT_LOAD: [(&str, &str); 2] = [
    ("walk_json", "policy.rego:2: use of undefined variable"),
    ("with_and_functions", "policy.rego:3: rule must have a body or assignment. Write `is_small(\"x\") if true`"),
];

struct Case {
    policy: String,
    input: String,
    opa: Result<Value, ()>,
    ours: Result<Value, String>,
    passes: bool,
}

/// Every verdict under a setting, but for the policies that do not load.
fn cases(builtin_errors: BuiltinErrors) -> Vec<Case> {
    let fixture: Value = serde_json::from_str(include_str!("fixtures/opa/verdicts.json")).expect("the fixture is JSON");
    // Plenty of time: here a time-out would look like a disagreement.
    let settings = Settings { builtin_errors, timeout_ms: 10_000 };
    let data = fixture["data"].to_string();
    let mut cases = Vec::new();
    let mut verdicts = 0;
    for policy in fixture["policies"].as_array().expect("policies") {
        let name = policy["policy"].as_str().expect("a name");
        let module = policy["module"].as_str().expect("a module");
        verdicts += policy["cases"].as_array().expect("cases").len();
        let loaded = Policy::from_sources(&[("policy.rego", module), ("data.json", &data)], &settings);
        if let Some((_, message)) = REFUSED_AT_LOAD.iter().find(|(refused, _)| *refused == name) {
            let error = loaded.expect_err(name).to_string();
            // The fixture's modules may begin with an empty line; the words count, and that a line is named.
            assert!(error.starts_with("policy.rego:"), "{name}: {error}");
            let words = message.split_once(": ").expect("place and words").1;
            assert!(error.contains(words), "{name}: {error}");
            continue;
        }
        let loaded = loaded.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(loaded.warnings().iter().any(|w| w.contains("read as Rego v0")), {
            // A module that imports the new keywords parses as v1 too.
            ["seed_v0", "v0_set"].contains(&name)
        });
        for case in policy["cases"].as_array().expect("cases") {
            let input_name = case["input"].as_str().expect("an input's name");
            let input = fixture["inputs"][input_name].clone();
            cases.push(Case {
                policy: name.to_owned(),
                input: input_name.to_owned(),
                opa: case.get("value").cloned().ok_or(()),
                ours: loaded.evaluate(input.clone()),
                passes: loaded.judge(input).is_ok(),
            });
        }
    }
    assert_eq!(verdicts, 1_050);
    assert_eq!(cases.len(), 1_050 - 42 * REFUSED_AT_LOAD.len());
    cases
}

/// The decision rules of the contract over OPA's own document, written a second time.
fn opa_passes(policy: &str, document: &Result<Value, ()>) -> bool {
    let Ok(document) = document else { return false };
    let refuses = |name: &str| match &document[name] {
        Value::Null | Value::Bool(false) => false,
        // OPA prints sets as arrays; no policy of the fixture makes an array here.
        Value::Array(reasons) => !reasons.is_empty(),
        _ => true,
    };
    let declares = ["default_allow", "decision_document", "wrong_type", "conflict", "v0_set", "import_rego_v1"];
    let result = &document["decision"]["result"];
    let wrong = !document["allow"].is_null() && !document["allow"].is_boolean();
    !refuses("deny")
        && !refuses("escalate")
        && !wrong
        && (result.is_null() || *result == json!("allow"))
        && (!declares.contains(&policy) || document["allow"] == json!(true) || *result == json!("allow"))
}

/// Numbers by value (`10` is `10.0`), everything else exactly.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        _ => a == b,
    }
}

fn agrees(case: &Case) -> bool {
    match (&case.opa, &case.ours) {
        (Ok(opa), Ok(ours)) => same(opa, ours) && case.passes == opa_passes(&case.policy, &case.opa),
        (Err(()), Err(_)) => !case.passes,
        _ => false,
    }
}

fn row(case: &Case) -> Option<usize> {
    DIFFERS.iter().position(|(policy, input)| *policy == case.policy && (*input == "*" || *input == case.input))
}

/// Whether the list has this case, and the difference is the one that the list means.
fn is_named(case: &Case) -> bool {
    if case.policy != "numbers" {
        return row(case).is_some();
    }
    let (Ok(opa), Ok(ours)) = (&case.opa, &case.ours) else { return false };
    let mut but_for_sum = ours.clone();
    if let Some(reasons) = but_for_sum["deny"].as_array_mut() {
        reasons.retain(|reason| reason != "sum");
    }
    row(case).is_some() && same(opa, &but_for_sum)
}

#[test]
fn with_undefined_builtin_errors_verdicts_are_opas_but_for_the_named_rows() {
    let mut wrong = Vec::new();
    let mut used = [false; DIFFERS.len()];
    for case in cases(BuiltinErrors::Undefined) {
        if agrees(&case) {
            continue;
        }
        if let (Some(row), true) = (row(&case), is_named(&case)) {
            used[row] = true;
        } else {
            wrong.push(format!("{} {}: OPA {:?}, ours {:?}", case.policy, case.input, case.opa, case.ours));
        }
    }
    assert!(wrong.is_empty(), "{} disagree:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(used, [true; DIFFERS.len()], "a row of the list agrees by now: take it out");
}

#[test]
fn by_default_verdicts_are_opas_or_refuse() {
    let mut refusals = 0;
    let mut wrong = Vec::new();
    for case in cases(BuiltinErrors::Strict) {
        if agrees(&case) {
            continue;
        }
        if !case.passes {
            refusals += 1;
        } else if !is_named(&case) {
            wrong.push(format!("{} {}: OPA {:?}, ours {:?}", case.policy, case.input, case.opa, case.ours));
        }
    }
    assert!(wrong.is_empty(), "{} pass where OPA says something else:\n{}", wrong.len(), wrong.join("\n"));
    assert!(refusals > 0, "builtin errors are strict by default");
}

#[test]
fn what_opa_refuses_passes_only_where_the_document_has_no_model() {
    for setting in [BuiltinErrors::Undefined, BuiltinErrors::Strict] {
        for case in cases(setting).iter().filter(|case| case.passes && !opa_passes(&case.policy, &case.opa)) {
            // The proxy never makes a document without `model`; a request that names none has `null` there.
            assert!(case.input == "model_missing" && is_named(case), "{} {} {setting:?}", case.policy, case.input);
        }
    }
}
