//! The results for programs. `docs/benchmarks.md` describes this format; what is there keeps its name and meaning.

use super::{Goal, Report, Summary};
use serde_json::{Value, json};

pub(super) fn document(report: &Report) -> String {
    let conditions: serde_json::Map<String, Value> = report
        .conditions
        .iter()
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect();
    let results: Vec<Value> = report
        .series
        .iter()
        .map(|series| {
            let Summary { median, min, max } = Summary::of(&series.rounds);
            json!({
                "workload": series.workload,
                "contender": series.contender.name,
                "metric": series.metric.name,
                "unit": series.metric.unit,
                "rounds": series.rounds,
                "median": median,
                "min": min,
                "max": max,
            })
        })
        .collect();
    let comparisons: Vec<Value> = report
        .comparisons
        .iter()
        .map(|comparison| {
            let Summary { median, min, max } = Summary::of(&comparison.rounds);
            let (relation, bound) = match comparison.goal {
                Goal::AtLeast(bound) => ("ratio at least", bound),
                Goal::AtMost(bound) => ("ratio at most", bound),
                Goal::Within(bound) => ("difference at most", bound),
            };
            json!({
                "workload": comparison.workload,
                "metric": comparison.metric.name,
                "contender": comparison.contender,
                "other": comparison.other,
                "relation": relation,
                "goal": bound,
                "rounds": comparison.rounds,
                "median": median,
                "min": min,
                "max": max,
                "met": comparison.is_met(),
            })
        })
        .collect();
    let document = json!({
        "benchmark": report.name,
        "title": report.title,
        "finding": report.finding,
        "conditions": conditions,
        "results": results,
        "comparisons": comparisons,
    });
    format!("{document:#}\n")
}
