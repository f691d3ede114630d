//! A span of each day in UTC, as an operator writes it.

use std::time::Duration;

const DAY_S: u64 = 86_400;

/// When something holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hours {
    Always,
    /// Seconds since midnight. Where `to` is not behind `from` it is the next day's.
    Between {
        from_s: u64,
        to_s: u64,
    },
}

impl Hours {
    /// `always`, or `07:00-18:00`.
    pub fn parse(text: &str) -> Option<Hours> {
        if text == "always" {
            return Some(Hours::Always);
        }
        let (from, to) = text.split_once('-')?;
        let (from_s, to_s) = (time_of_day(from.trim())?, time_of_day(to.trim())?);
        (from_s != to_s).then_some(Hours::Between { from_s, to_s })
    }

    /// How long it holds from now on, if it does; `Duration::MAX` is for ever. `now_s`: since 1970.
    pub fn left(self, now_s: u64) -> Option<Duration> {
        match self {
            Hours::Always => Some(Duration::MAX),
            Hours::Between { from_s, to_s } => {
                let whole = (to_s + DAY_S - from_s) % DAY_S;
                let passed = (now_s % DAY_S + DAY_S - from_s) % DAY_S;
                (passed < whole).then(|| Duration::from_secs(whole - passed))
            }
        }
    }
}

fn time_of_day(text: &str) -> Option<u64> {
    let (hours, minutes) = text.split_once(':')?;
    let is_number = |digits: &str| digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_digit());
    let number = |digits: &str| is_number(digits).then(|| digits.parse::<u64>().ok()).flatten();
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    let seconds = hours * 3600 + minutes * 60;
    (minutes < 60 && seconds <= DAY_S).then_some(seconds % DAY_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_holds_between_its_ends_also_over_midnight() {
        let left = |text: &str, time: &str| {
            let now_s = 20_000 * DAY_S + time_of_day(time).unwrap();
            Hours::parse(text).unwrap().left(now_s).map(|left| left.as_secs())
        };
        assert_eq!(left("07:00-18:30", "06:59"), None);
        assert_eq!(left("07:00-18:30", "07:00"), Some(41_400));
        assert_eq!(left("07:00-18:30", "18:29"), Some(60));
        assert_eq!(left("07:00-18:30", "18:30"), None);
        assert_eq!(left("22:00-06:00", "23:00"), Some(25_200));
        assert_eq!(left("22:00-06:00", "05:59"), Some(60));
        assert_eq!(left("22:00-06:00", "06:00"), None);
        assert_eq!(left("08:00-24:00", "23:59"), Some(60));
        assert_eq!(Hours::parse("always").unwrap().left(5), Some(Duration::MAX));
    }

    #[test]
    fn what_is_no_span_is_none() {
        for text in [
            "",
            "never",
            "7-18",
            "07:00",
            "07:00-07:00",
            "00:00-24:00",
            "07:60-18:00",
            "25:00-26:00",
            "07:00–18:00",
            "+7:00-18:00",
        ] {
            assert_eq!(Hours::parse(text), None, "{text}");
        }
    }
}
