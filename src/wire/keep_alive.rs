//! How long a model stays loaded after a request: Ollama's `keep_alive`, a number of seconds or a duration as Go writes one
//! (`api/types.go`, `Duration.UnmarshalJSON`; ollama-wire 3.1).

use std::cmp::Ordering;

const NS_PER_S: f64 = 1e9;

/// A `keep_alive` that was understood. Ordered by how long it is; for ever is the longest.
#[derive(Clone, Debug)]
pub struct KeepAlive {
    /// `None`: for ever, which any negative value means.
    ns: Option<f64>,
    /// As JSON, as it was written.
    json: String,
}

impl KeepAlive {
    /// A JSON number of seconds.
    pub fn seconds(number: &str) -> Option<KeepAlive> {
        let seconds: f64 = number.parse().ok().filter(|seconds: &f64| seconds.is_finite())?;
        Some(KeepAlive { ns: (seconds >= 0.0).then_some(seconds * NS_PER_S), json: number.to_owned() })
    }

    /// A duration such as `5m`, `1h30m`, `0` or `-1s`. A plain number in quotes is none, as in Go.
    pub fn duration(text: &str) -> Option<KeepAlive> {
        let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
        let ns = if unsigned == "0" { 0.0 } else { sum_of_units(unsigned)? };
        let forever = text.starts_with('-') && ns > 0.0;
        Some(KeepAlive { ns: (!forever).then_some(ns), json: format!("\"{text}\"") })
    }

    /// As it stands in a body.
    pub fn to_json(&self) -> String {
        self.json.clone()
    }
}

impl PartialEq for KeepAlive {
    fn eq(&self, other: &KeepAlive) -> bool {
        self.partial_cmp(other) == Some(Ordering::Equal)
    }
}

impl PartialOrd for KeepAlive {
    fn partial_cmp(&self, other: &KeepAlive) -> Option<Ordering> {
        self.ns.unwrap_or(f64::INFINITY).partial_cmp(&other.ns.unwrap_or(f64::INFINITY))
    }
}

/// One number with a unit after the other, as `time.ParseDuration` reads them.
fn sum_of_units(text: &str) -> Option<f64> {
    let mut rest = text;
    let mut sum = 0.0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (digits, behind) = rest.split_at(number);
        let value: f64 = digits.parse().ok()?;
        let unit = behind.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(behind.len());
        let (unit, behind) = behind.split_at(unit);
        sum += value
            * match unit {
                "ns" => 1.0,
                "us" | "µs" | "μs" => 1e3,
                "ms" => 1e6,
                "s" => NS_PER_S,
                "m" => 60.0 * NS_PER_S,
                "h" => 3600.0 * NS_PER_S,
                _ => return None,
            };
        rest = behind;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        let ns = |text: &str| KeepAlive::duration(text).map(|known| known.ns);
        for (text, seconds) in
            [("5m", 300.0), ("1h30m", 5400.0), ("0", 0.0), ("-0", 0.0), ("1.5s", 1.5), ("+2s", 2.0), ("250ms", 0.25)]
        {
            assert_eq!(ns(text), Some(Some(seconds * NS_PER_S)), "{text}");
        }
        assert_eq!(ns("-1m"), Some(None), "for ever");
        for text in ["", "300", "5 m", "m", "1d", "5m3", "--1s", "1e3s", ".s"] {
            assert_eq!(ns(text), None, "{text:?}");
        }
        assert_eq!(KeepAlive::seconds("-1").map(|known| known.ns), Some(None));
        assert_eq!(KeepAlive::seconds("3e2").map(|known| known.ns), Some(Some(300.0 * NS_PER_S)));
        assert!(KeepAlive::seconds("1e999").is_none());
    }

    #[test]
    fn for_ever_is_longer_than_anything_and_spelling_does_not_count() {
        let known = |text: &str| KeepAlive::duration(text).unwrap();
        assert!(known("-1s") > known("100000h") && known("5m") > known("299s"));
        assert_eq!(known("5m"), KeepAlive::seconds("300").unwrap());
        assert_eq!(known("5m").to_json(), "\"5m\"");
        assert_eq!(KeepAlive::seconds("-1").unwrap().to_json(), "-1");
    }
}
