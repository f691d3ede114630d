//! Moments and spans as people type them.

use crate::ledger::record::Moment;

/// A date (`2026-11-22`: its first moment, UTC) or a time with its offset (`2026-11-22T18:00:00Z`).
pub fn moment(text: &str) -> Result<Moment, String> {
    let at = match text.parse::<jiff::civil::Date>() {
        Ok(day) if text.len() == 10 => {
            day.to_zoned(jiff::tz::TimeZone::UTC).map(|start| start.timestamp()).map_err(|e| e.to_string())?
        }
        _ => text
            .parse::<jiff::Timestamp>()
            .map_err(|_| "give a date (2026-11-22) or a time (2026-11-22T18:00:00Z)".to_owned())?,
    };
    Ok(Moment::from_microseconds(at.as_microsecond()))
}

/// A span that ends now: `90s`, `30m`, `24h`, `7d`.
pub fn ago(text: &str) -> Result<Moment, String> {
    let wrong = || "give a span such as 90s, 30m, 24h or 7d".to_owned();
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let seconds: i64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u32 = number.parse().map_err(|_| wrong())?;
    let since_us = i64::from(number).saturating_mul(seconds).saturating_mul(1_000_000);
    Ok(Moment::from_microseconds(jiff::Timestamp::now().as_microsecond().saturating_sub(since_us)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_times_and_spans_are_understood_and_nothing_else() {
        let text = |at: Result<Moment, String>| at.map(|at| at.to_string());
        assert_eq!(text(moment("2026-11-22")).as_deref(), Ok("2026-11-22T00:00:00.000000+00:00"));
        assert_eq!(text(moment("2026-11-22T18:00:00+02:00")).as_deref(), Ok("2026-11-22T16:00:00.000000+00:00"));
        assert!(ago("24h").unwrap() > ago("2d").unwrap() && ago("30m").unwrap() > ago("31m").unwrap());
        for wrong in ["", "yesterday", "2026-13-01", "18:00"] {
            assert!(moment(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "h", "24", "-1h", "1w", "1.5h", "99999999999d", "\u{e9}"] {
            assert!(ago(wrong).is_err(), "{wrong}");
        }
        assert!(ago("4294967295d").is_ok());
    }
}
