//! Runs a policy's own tests, as `opa test` does: each rule `test_*` in a `*_test.rego` file passes where it is true.
//! Rules called `todo_test_*` are skipped.
//!
//! The folder is loaded as the proxy loads it, so that what it would refuse at start is refused here.

use std::path::Path;
use std::time::Duration;

use regorus::Value;
use serde::Serialize;

use super::budget::{Budget, Failure};
use super::bundle::{Bundle, LoadError};
use super::{Settings, compile, fault};

/// Longest time of one test. Longer than a decision may take: a test evaluates many.
const TEST_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize)]
pub struct TestReport {
    pub results: Vec<TestResult>,
    /// What loading the folder warned of.
    pub warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct TestResult {
    pub file: String,
    pub line: u32,
    /// `data.behavry.authz_test.test_x`.
    pub name: String,
    pub outcome: TestOutcome,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TestOutcome {
    Passed,
    /// Undefined, or not `true`.
    Failed,
    /// What went wrong, with file and line.
    Error(String),
    Skipped,
}

impl TestReport {
    /// At least one test ran, and none failed.
    pub fn passed(&self) -> bool {
        self.count(&TestOutcome::Passed) > 0
            && self.results.iter().all(|r| matches!(r.outcome, TestOutcome::Passed | TestOutcome::Skipped))
    }

    pub fn count(&self, outcome: &TestOutcome) -> usize {
        self.results.iter().filter(|r| r.outcome == *outcome).count()
    }
}

/// # Errors
/// The folder is not a policy, or one of its test files does not parse.
pub fn run(dir: &Path, settings: &Settings) -> Result<TestReport, LoadError> {
    run_bundle(&Bundle::read(dir)?, settings)
}

pub(super) fn run_bundle(bundle: &Bundle, settings: &Settings) -> Result<TestReport, LoadError> {
    let compile::Compiled { mut engine, mut warnings, .. } = compile::compile(bundle, settings)?;
    for file in &bundle.tests {
        warnings.extend(compile::parse(&mut engine, file)?);
    }
    let mut found: Vec<(String, u32, Vec<Option<String>>)> = Vec::new();
    for module in engine.get_modules() {
        let file = module.package.span.source.get_path();
        if bundle.tests.iter().any(|test| test.name == *file) {
            found.extend(compile::rules(module).map(|(path, line)| (file.clone(), line, path)));
        }
    }

    let mut results = Vec::new();
    for (i, (file, line, path)) in found.iter().enumerate() {
        let Some(Some(rule)) = path.last() else { continue };
        let skipped = rule.starts_with("todo_test_");
        if !skipped && !rule.starts_with("test_") {
            continue;
        }
        let name = compile::rule_name(path);
        let outcome = if skipped {
            TestOutcome::Skipped
        } else if found[..i].iter().any(|(_, _, other)| other == path) {
            // The engine would take the two as one, and one that passes would hide one that fails.
            TestOutcome::Error("another test has this name".to_owned())
        } else {
            let evaluated =
                Budget::new(TEST_LIMIT).spend(|limit| compile::eval_rule(&mut engine.clone(), &name, limit));
            match evaluated {
                Ok(Value::Bool(true)) => TestOutcome::Passed,
                Ok(_) => TestOutcome::Failed,
                Err(Failure::Engine(error)) => TestOutcome::Error(fault::one_line(&error)),
                Err(Failure::OutOfTime) => TestOutcome::Error(compile::out_of_time(TEST_LIMIT)),
            }
        };
        results.push(TestResult { file: file.clone(), line: *line, name, outcome });
    }
    Ok(TestReport { results, warnings })
}
