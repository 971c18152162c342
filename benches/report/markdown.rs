//! The results as tables, and the page that shows them with their plot and their conditions.

use super::number::{rounded, with_unit};
use super::{Comparison, Goal, Report, Summary};
use std::fmt::Write;

pub(super) fn document(report: &Report) -> String {
    let Report {
        name, title, finding, ..
    } = report;
    let mut page = format!("# {title}\n\n![{finding}]({name}.svg)\n\n{}", results(report));
    page += "\n| condition | |\n| --- | --- |\n";
    for (name, value) in report.conditions.iter() {
        writeln!(page, "| {name} | {value} |").expect("a String takes all");
    }
    write!(page, "\nAll rounds: [{name}.json]({name}.json)\n").expect("a String takes all");
    page
}

/// A table of contenders for each workload, then one of what was compared.
pub(super) fn results(report: &Report) -> String {
    let mut text = String::new();
    for workload in report.distinct(|series| Some(&series.workload)) {
        let of_workload = |wanted: &str| wanted == workload;
        let metrics = report.distinct(|s| of_workload(&s.workload).then_some(s.metric));
        let contenders = report.distinct(|s| of_workload(&s.workload).then_some(s.contender.name));
        text += &format!("| {workload} |");
        metrics
            .iter()
            .for_each(|metric| text += &format!(" {} |", metric.name));
        text += "\n| --- |";
        metrics.iter().for_each(|_| text += " ---: |");
        text += "\n";
        for contender in contenders {
            text += &format!("| {contender} |");
            for metric in &metrics {
                let cell = report.find(workload, contender, *metric).map(|series| {
                    let Summary { median, min, max } = Summary::of(&series.rounds);
                    let median = with_unit(median, metric.unit);
                    match series.rounds.len() {
                        1 => median,
                        _ => format!("{median} ({} to {})", rounded(min), rounded(max)),
                    }
                });
                text += &format!(" {} |", cell.unwrap_or_default());
            }
            text += "\n";
        }
        text += "\n";
    }
    if !report.comparisons.is_empty() {
        text += "| compared, round by round | median | least to most | goal | met |\n| --- | ---: | ---: | ---: | --- |\n";
        report
            .comparisons
            .iter()
            .for_each(|comparison| text += &row(comparison));
    }
    text
}

fn row(comparison: &Comparison) -> String {
    let Comparison {
        workload,
        metric,
        contender,
        other,
        goal,
        rounds,
    } = comparison;
    let Summary { median, min, max } = Summary::of(rounds);
    let unit = match (other, goal) {
        (Some(_), Goal::AtLeast(_) | Goal::AtMost(_)) => "",
        _ => metric.unit,
    };
    let (relation, sign) = match goal {
        Goal::AtLeast(_) => (" to ", "≥"),
        Goal::AtMost(_) => (" to ", "≤"),
        Goal::Within(_) => (" less ", "≤"),
    };
    let other = other.map_or(String::new(), |other| format!("{relation}{other}"));
    let goal = format!("{sign} {}", with_unit(goal.bound(), unit));
    let met = if comparison.is_met() { "yes" } else { "**no**" };
    format!(
        "| {workload}, {}: {contender}{other} | {} | {} to {} | {goal} | {met} |\n",
        metric.name,
        with_unit(median, unit),
        rounded(min),
        rounded(max)
    )
}
