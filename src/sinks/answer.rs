//! What an HTTP answer to a batch means.

use std::time::Duration;

use http::{HeaderMap, header};

use super::Failure;
use crate::config::ServiceUrl;

/// Every 2xx means that it was taken; a redirect is not followed, since what is signed or sent for one is not another's.
pub fn taken(url: &ServiceUrl, status: u16, headers: &HeaderMap) -> Result<(), Failure> {
    match status {
        200..300 => Ok(()),
        _ => Err(Failure {
            why: format!("{url} answered {status}"),
            retry_after: retry_after(headers),
            too_large: status == 413,
        }),
    }
}

/// Seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    at.duration_since(jiff::Timestamp::now()).try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_that_is_asked_for_is_in_seconds_or_a_date() {
        let asked =
            |text: &str| retry_after(&HeaderMap::from_iter([(header::RETRY_AFTER, text.parse().expect("a value"))]));
        assert_eq!(asked("120"), Some(Duration::from_secs(120)));
        let then = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1000);
        let text = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&then).expect("a date");
        let asked_for = asked(&text).expect("a date");
        assert!(
            asked_for > Duration::from_secs(900) && asked_for <= Duration::from_secs(1000),
            "{text}: {asked_for:?}"
        );
        for nothing in ["", "soon", "-1", "Wed, 21 Oct 2015 07:28:00 GMT"] {
            assert_eq!(asked(nothing), None, "{nothing}");
        }
    }
}
