//! Files to an engine that is known to work: parsed, checked, and tried on sample inputs.
//!
//! What OPA's compiler refuses and regorus lets through until a request comes is refused here, at load, with file and
//! line: a decision rule that is at once a boolean and a set, one that is a function and so never asked, an unsafe
//! variable, a rule of Rego v0 that is always true.

use std::num::NonZeroU32;
use std::time::Duration;

use regorus::unstable::{Expr, Module, Ref, Rule, RuleHead};
use regorus::utils::limits::ExecutionTimerConfig;
use regorus::{Engine, Value};

use super::budget::{Budget, Failure};
use super::bundle::{Bundle, LoadError, SourceFile};
use super::fault::{Located, wrong};
use super::verdict::harmless;
use super::{BuiltinErrors, PACKAGE, Settings, samples};

/// A rule that is the whole deciding package. `eval_query("data.behavry.authz")` parses and analyses the query for
/// each request (regorus 0.14.1, `engine.rs`, `make_query`): 20 µs, where the rule takes 8.
const DOCUMENT_FILE: &str = "(document)";
const DOCUMENT_PACKAGE: &str = "behavry_ollama_proxy_document";
const DOCUMENT_RULE: &str = "data.behavry_ollama_proxy_document.document";

/// Work units of the engine between two looks at the clock.
const CLOCK_INTERVAL: NonZeroU32 = NonZeroU32::new(32).expect("32 is not zero");

/// Time for one sample at load, when nobody waits for a reply.
const SAMPLE_LIMIT: Duration = Duration::from_secs(2);

/// Deepest nesting of brackets in a file. regorus 0.14.1 parses `[[[..` in time that doubles or worse with each level
/// (run: 10 levels 0.5 ms, 12 levels 13 ms, 200 levels never): such a file would hang the load.
const MAX_NESTING: usize = 10;

const MAX_WARNINGS: usize = 32;

/// The rules that decide.
const DECIDING: [&str; 4] = ["allow", "deny", "escalate", "decision"];

pub(super) struct Compiled {
    pub engine: Engine,
    pub declared: Declared,
    pub warnings: Vec<String>,
}

/// What the deciding package declares, whether it holds or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Declared {
    /// `allow` or `decision`: one of them must hold.
    pub allows: bool,
    /// `deny` or `escalate`.
    pub denies: bool,
}

pub(super) fn compile(bundle: &Bundle, settings: &Settings) -> Result<Compiled, LoadError> {
    let mut warnings = Vec::new();
    let mut engine = Engine::new();
    for file in &bundle.rego {
        warnings.extend(parse(&mut engine, file)?);
    }
    let declared = survey(engine.get_modules())?;
    if declared == Declared::default() {
        return Err(LoadError::NothingDecides);
    }
    add_data(&mut engine, &bundle.data)?;
    engine
        .add_policy(
            DOCUMENT_FILE.to_owned(),
            format!("package {DOCUMENT_PACKAGE}\nimport rego.v1\ndocument := data.{PACKAGE}\n"),
        )
        .map_err(|error| wrong(&error.to_string()))?;
    engine.set_strict_builtin_errors(settings.builtin_errors == BuiltinErrors::Strict);
    warnings.extend(bundle.unread.iter().map(|name| format!("{name} is not read: data must be JSON")));
    try_samples(&mut engine, settings, &mut warnings)?;
    if warnings.len() > MAX_WARNINGS {
        let more = warnings.len() - MAX_WARNINGS;
        warnings.truncate(MAX_WARNINGS);
        warnings.push(format!("and {more} more"));
    }
    Ok(Compiled { engine, declared, warnings })
}

/// Evaluates the deciding package, by the wall's clock for `limit` at most. `Err` is what regorus said.
///
/// regorus cleans up after an evaluation that succeeded; after an error its internal stacks are as the error left them, and the engine
/// is of no further use.
pub(super) fn evaluate(engine: &mut Engine, input: Value, limit: Duration) -> Result<Value, String> {
    engine.set_input(input);
    eval_rule(engine, DOCUMENT_RULE, limit)
}

/// Evaluates one rule, as [`evaluate`] does.
pub(super) fn eval_rule(engine: &mut Engine, rule: &str, limit: Duration) -> Result<Value, String> {
    engine.set_execution_timer_config(ExecutionTimerConfig { limit, check_interval: CLOCK_INTERVAL });
    engine.eval_rule(rule.to_owned()).map_err(|error| error.to_string())
}

pub(super) fn out_of_time(limit: Duration) -> String {
    format!("the policy took longer than {} ms", limit.as_millis())
}

/// Adds a file as Rego v1, or else as v0 with a warning. Never all as v0: the seed's own policy parses there, and
/// denies everything.
pub(super) fn parse(engine: &mut Engine, file: &SourceFile) -> Result<Option<String>, LoadError> {
    if let Some(line) = nested_too_deep(&file.text) {
        return Err(LoadError::File {
            file: file.name.clone(),
            line: Some(line),
            problem: format!("brackets are nested deeper than {MAX_NESTING}: move such constants into data.json"),
        });
    }
    let Err(v1) = engine.add_policy(file.name.clone(), file.text.clone()) else { return Ok(None) };
    let v1 = v1.to_string();

    let mut trial = Engine::new();
    trial.set_rego_v0(true);
    let parses = trial.add_policy(file.name.clone(), file.text.clone()).is_ok();
    if !parses || trial.get_modules().iter().any(|module| module.policy.iter().any(means_something_else)) {
        return Err(wrong(&v1));
    }
    engine.set_rego_v0(true);
    let added = engine.add_policy(file.name.clone(), file.text.clone());
    engine.set_rego_v0(false);
    added.map_err(|error| wrong(&error.to_string()))?;
    let Located { place, message } = Located::of(&v1);
    let line = place.map_or(0, |(_, line)| line);
    Ok(Some(harmless(&format!("{}: read as Rego v0, since line {line} is not v1: {message}", file.name))))
}

/// A rule that v0's grammar makes of a text meant as v1. To regorus 0.14.1 `allow if { .. }` is a rule `allow` that
/// always holds, followed by a rule called `if`: one syntax error elsewhere in the file would allow everything. OPA
/// refuses a bare name in v0 too.
fn means_something_else(rule: &Ref<Rule>) -> bool {
    let (head, bare) = match &**rule {
        Rule::Default { refr, .. } => (refr, false),
        Rule::Spec { head, bodies, .. } => match head {
            RuleHead::Compr { refr, assign, .. } => (refr, assign.is_none() && bodies.is_empty()),
            RuleHead::Func { refr, assign, .. } => (refr, assign.is_none() && bodies.is_empty()),
            RuleHead::Set { refr, .. } => (refr, false),
        },
    };
    let keyword =
        matches!(path(head).first(), Some(Some(name)) if ["if", "contains", "in", "every"].contains(&&**name));
    bare || keyword
}

/// What is declared, and what contradicts itself.
fn survey(modules: &[Ref<Module>]) -> Result<Declared, LoadError> {
    struct Seen {
        path: Vec<Option<String>>,
        is_set: bool,
        file: String,
        line: u32,
    }
    let mut seen: Vec<Seen> = Vec::new();
    let mut declared = Declared::default();
    for module in modules {
        let package = path(&module.package.refr);
        for rule in &module.policy {
            let (head, is_set, is_function) = match &**rule {
                Rule::Default { refr, args, .. } => (refr, false, !args.is_empty()),
                Rule::Spec { head: RuleHead::Compr { refr, .. }, .. } => (refr, false, false),
                Rule::Spec { head: RuleHead::Set { refr, .. }, .. } => (refr, true, false),
                Rule::Spec { head: RuleHead::Func { refr, .. }, .. } => (refr, false, true),
            };
            let span = rule.span();
            let (file, line) = (span.source.get_path().clone(), span.line);
            let path: Vec<_> = package.iter().cloned().chain(path(head)).collect();
            let decides = decides(&path);
            if is_function {
                if let Some(name) = decides.first() {
                    let problem = format!("`{name}` is a function here, which nothing asks: leave its arguments out");
                    return Err(LoadError::File { file, line: Some(line), problem });
                }
                continue;
            }
            declared.allows |= decides.iter().any(|name| ["allow", "decision"].contains(name));
            declared.denies |= decides.iter().any(|name| ["deny", "escalate"].contains(name));
            match seen.iter().find(|other| other.path == path) {
                Some(other) if other.is_set != is_set => {
                    let (this, that) = if is_set { ("a set", "a single value") } else { ("a single value", "a set") };
                    let problem = format!(
                        "{} is {this} here and {that} at {}:{}: write all its rules as `contains`, or none",
                        rule_name(&path),
                        other.file,
                        other.line
                    );
                    return Err(LoadError::File { file, line: Some(line), problem });
                }
                Some(_) => {}
                None => seen.push(Seen { path, is_set, file, line }),
            }
        }
    }
    Ok(declared)
}

/// The names of deciding rules that a rule with this path defines, or lies in. A part that is known only at
/// evaluation (`authz[name] := ..`) can be any of them.
fn decides(path: &[Option<String>]) -> Vec<&'static str> {
    let mut rest = path.iter();
    for wanted in PACKAGE.split('.') {
        match rest.next() {
            Some(Some(name)) if name != wanted => return Vec::new(),
            Some(_) => {}
            None => return DECIDING.to_vec(),
        }
    }
    match rest.next() {
        Some(Some(name)) => DECIDING.into_iter().filter(|deciding| name == deciding).collect(),
        Some(None) | None => DECIDING.to_vec(),
    }
}

/// The parts of a reference; `None` for one that is not a constant.
fn path(reference: &Expr) -> Vec<Option<String>> {
    let mut parts = Vec::new();
    let mut next = Some(reference);
    while let Some(expr) = next {
        next = match expr {
            Expr::RefDot { refr, field, .. } => {
                parts.push(Some(field.0.text().to_owned()));
                Some(refr)
            }
            Expr::RefBrack { refr, index, .. } => {
                parts.push(match &**index {
                    Expr::String { value: Value::String(name), .. } => Some(name.to_string()),
                    _ => None,
                });
                Some(refr)
            }
            Expr::Var { span, .. } => {
                parts.push(Some(span.text().to_owned()));
                None
            }
            _ => {
                parts.push(None);
                None
            }
        };
    }
    parts.reverse();
    parts
}

/// How a rule is called in a query: `data.behavry.authz["odd name"]`.
pub(super) fn rule_name(path: &[Option<String>]) -> String {
    let mut name = "data".to_owned();
    for part in path.iter().map(|part| part.as_deref().unwrap_or("_")) {
        let plain = part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if plain {
            name += &format!(".{part}");
        } else {
            name += &format!("[{}]", serde_json::Value::from(part));
        }
    }
    name
}

/// All rules of a module with their paths, names and lines.
pub(super) fn rules(module: &Module) -> impl Iterator<Item = (Vec<Option<String>>, u32)> {
    module.policy.iter().map(|rule| {
        let head = match &**rule {
            Rule::Default { refr, .. } => refr,
            Rule::Spec { head, .. } => match head {
                RuleHead::Compr { refr, .. } | RuleHead::Set { refr, .. } | RuleHead::Func { refr, .. } => refr,
            },
        };
        (path(&module.package.refr).into_iter().chain(path(head)).collect(), rule.span().line)
    })
}

fn add_data(engine: &mut Engine, files: &[SourceFile]) -> Result<(), LoadError> {
    for file in files {
        let wrong = |line, problem: String| LoadError::File { file: file.name.clone(), line, problem };
        let mut json: serde_json::Value = serde_json::from_str(&file.text)
            .map_err(|e| wrong(u32::try_from(e.line()).ok(), format!("not JSON: {e}")))?;
        if !json.is_object() {
            return Err(wrong(None, "data must be a JSON object".to_owned()));
        }
        for folder in file.name.split('/').rev().skip(1) {
            json = serde_json::Value::Object([(folder.to_owned(), json)].into_iter().collect());
        }
        // Rules and data at one path hide each other; OPA refuses that too.
        let mut place = Some(&json);
        for name in PACKAGE.split('.') {
            place = place.and_then(|value| value.get(name));
        }
        let blocked = json.get("behavry").is_some_and(|value| !value.is_object());
        if place.is_some() || blocked || json.get(DOCUMENT_PACKAGE).is_some() {
            return Err(wrong(
                None,
                format!("defines data.{PACKAGE}, which belongs to the rules: choose another name"),
            ));
        }
        engine.add_data(Value::from(json)).map_err(|error| wrong(None, Located::of(&error.to_string()).message))?;
    }
    Ok(())
}

/// Evaluates what requests of every kind look like. What fails whatever a request says is refused; what fails for some
/// requests, which are then refused one by one, is a warning.
fn try_samples(engine: &mut Engine, settings: &Settings, warnings: &mut Vec<String>) -> Result<(), LoadError> {
    let prepared = {
        // The first evaluation analyses all files; what it finds wrong lies in the policy, not in the input.
        let _ = evaluate(engine, Value::new_object(), SAMPLE_LIMIT);
        engine.clone()
    };
    let mut lenient = prepared.clone();
    lenient.set_strict_builtin_errors(false);
    let evaluated = |engine: &Engine, input: &Value| {
        Budget::new(SAMPLE_LIMIT).spend(|limit| evaluate(&mut engine.clone(), input.clone(), limit))
    };
    for input in samples::samples() {
        let error = match evaluated(&prepared, &input) {
            Ok(_) => continue,
            Err(Failure::Engine(error)) => error,
            Err(Failure::OutOfTime) => out_of_time(SAMPLE_LIMIT),
        };
        let located = Located::of(&error);
        let builtin = settings.builtin_errors == BuiltinErrors::Strict && evaluated(&lenient, &input).is_ok();
        // Type errors of operators ignore the switch, and two values of one rule can be a matter of the input.
        let by_input =
            [" expects ", "conflicts with rule", "multiple outputs"].iter().any(|m| located.message.contains(m));
        if !builtin && !by_input {
            return Err(wrong(&error));
        }
        let warning = format!("{}: requests for which this fails are refused", located.line());
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
    *engine = prepared;
    Ok(())
}

/// A line on which more brackets are open than regorus can parse. Strings and comments do not count.
fn nested_too_deep(text: &str) -> Option<u32> {
    let mut depth = 0usize;
    let mut line = 1;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\n' => line += 1,
            '[' | '{' | '(' => {
                depth += 1;
                if depth > MAX_NESTING {
                    return Some(line);
                }
            }
            ']' | '}' | ')' => depth = depth.saturating_sub(1),
            '#' => line += u32::from(chars.by_ref().any(|c| c == '\n')),
            '"' => {
                while let Some(c) = chars.next() {
                    match c {
                        '\\' => _ = chars.next(),
                        // A string ends with its line; what follows one that is not closed is counted again.
                        '"' => break,
                        '\n' => {
                            line += 1;
                            break;
                        }
                        _ => {}
                    }
                }
            }
            '`' => line += chars.by_ref().take_while(|c| *c != '`').filter(|c| *c == '\n').count() as u32,
            _ => {}
        }
    }
    None
}
