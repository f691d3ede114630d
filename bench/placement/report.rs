//! The table: for each policy the median over the seeds, and the range.

use crate::trace::Class;
use crate::world::Run;

pub fn print(rows: &[(&str, Vec<Run>)]) {
    println!(
        "| policy | p50, s | p95, s | p99, s | interactive p95, s | tokens/s at peak | busy | loading | idle | loads | reloads |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (name, runs) in rows {
        let spread = |digits: usize, of: &dyn Fn(&Run) -> f64| spread(runs.iter().map(of).collect(), digits);
        let percent = |of: &dyn Fn(&Run) -> f64| spread(1, &|run| 100.0 * of(run));
        println!(
            "| {name} | {} | {} | {} | {} | {} | {} % | {} % | {} % | {} | {} |",
            spread(2, &|run| wait(run, 0.50, None)),
            spread(2, &|run| wait(run, 0.95, None)),
            spread(1, &|run| wait(run, 0.99, None)),
            spread(2, &|run| wait(run, 0.95, Some(Class::Interactive))),
            spread(0, &|run| run.peak_tokens_s),
            percent(&|run| run.busy),
            percent(&|run| run.loading),
            percent(&|run| 1.0 - run.busy - run.loading),
            spread(0, &|run| run.loads as f64),
            spread(0, &|run| run.reloads as f64),
        );
    }
    let requests: Vec<usize> =
        rows.first().map(|(_, runs)| runs.iter().map(|run| run.waits_s.len()).collect()).unwrap_or_default();
    println!("\nRequests of each seed: {requests:?}.");
}

/// The wait for the first token that `part` of the requests do not exceed.
fn wait(run: &Run, part: f64, class: Option<Class>) -> f64 {
    let of = run.waits_s.iter().filter(|(_, its)| class.is_none_or(|class| class == *its));
    let mut waits: Vec<f64> = of.map(|(wait, _)| *wait).collect();
    waits.sort_by(f64::total_cmp);
    waits[((waits.len() - 1) as f64 * part) as usize]
}

fn spread(mut values: Vec<f64>, digits: usize) -> String {
    if values.iter().any(|value| value.is_nan()) {
        return "-".to_owned();
    }
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[0], values[values.len() - 1]);
    format!("{:.digits$} ({low:.digits$}-{high:.digits$})", values[values.len() / 2])
}
