//! What regorus says went wrong, as one line with file and line.

use super::bundle::LoadError;
use super::verdict::harmless;

/// An error of regorus as one harmless line, with file and line of the policy.
pub(super) fn one_line(error: &str) -> String {
    Located::of(error).line()
}

/// An error of regorus, which is a picture of the place: `\n--> file:line:col\n  |\n3 | text\n  | ^\nerror: words`.
/// The text of the policy stays behind: it is nothing for a caller to read.
#[derive(Debug)]
pub(super) struct Located {
    pub place: Option<(String, u32)>,
    pub message: String,
}

impl Located {
    pub fn of(error: &str) -> Located {
        let place = error.lines().find_map(|line| {
            let mut parts = line.trim_start().strip_prefix("--> ")?.rsplitn(3, ':');
            let (_column, line, file) = (parts.next()?, parts.next()?, parts.next()?);
            Some((file.to_owned(), line.parse().ok()?))
        });
        let mut lines = error.lines().map(str::trim).filter(|line| !line.is_empty());
        let message = match error.lines().find_map(|line| line.strip_prefix("error: ")) {
            Some(message) => message,
            None => lines.next().unwrap_or("an error without words"),
        };
        let mut message = message.trim_end().trim_end_matches(':').to_owned();
        if message.starts_with("recursion detected") {
            message = "this rule depends on itself".to_owned();
        }
        Located { place, message }
    }

    pub fn line(&self) -> String {
        match &self.place {
            Some((file, line)) => harmless(&format!("{file}:{line}: {}", self.message)),
            None => harmless(&self.message),
        }
    }
}

/// What to do about an error of regorus.
pub(super) fn wrong(error: &str) -> LoadError {
    let Located { place, mut message } = Located::of(error);
    let advice = if message.contains("must have a body") {
        ". Write `is_small(\"x\") if true` instead of `is_small(\"x\")`"
    } else if message.contains("unsafe") {
        ". Give it a value first; for `walk(input, [p, v])`, whose output regorus does not bind, name the members to look at"
    } else if message.contains("could not find function") {
        ". This builtin is not available here"
    } else {
        ""
    };
    message += advice;
    let (file, line) = place.map_or(("policy".to_owned(), None), |(file, line)| (file, Some(line)));
    LoadError::File { file, line, problem: harmless(&message) }
}
