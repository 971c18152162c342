//! The results as a picture: a row for each workload, in it a panel for each metric, in that a bar for each contender.
//!
//! Bars are labelled with their values, so there are no axes. A thin line across a bar's end goes from the least to the
//! most of its rounds; a dashed line is a goal. It is drawn for a README's width and follows the reader's light or dark
//! surroundings.

use super::number::with_unit;
use super::{Better, Contender, Metric, Report, Role, Series, Summary};
use svg::Document;
use svg::node::element::{Group, Line, Rectangle, Style, Text, Title};

const WIDTH: f64 = 880.0;
const MARGIN: f64 = 24.0;
/// From one bar to the next, and a bar's own height.
const STEP: f64 = 22.0;
const BAR: f64 = 15.0;
/// Kept free at the end of the longest bar, for its label.
const LABEL: f64 = 92.0;
const GAP: f64 = 28.0;

/// Where the viewer does not know of dark surroundings, the plot has its own light ground and stays readable.
const STYLE: &str = "
text { font-family: system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif; font-size: 12.5px; fill: #24292f; }
.ground { fill: #ffffff; } .finding { font-size: 18px; font-weight: 600; } .workload { font-size: 14px; font-weight: 600; }
.value { stroke: #ffffff; stroke-width: 3px; paint-order: stroke; }
.minor { fill: #656d76; font-size: 11.5px; } .subject-text { font-weight: 600; }
.subject { fill: #0969da; } .variant { fill: #80b8f0; } .other { fill: #c9d1d9; }
.spread { stroke: #24292f; stroke-width: 1.2; } .goal { stroke: #bc4c00; stroke-width: 1.4; stroke-dasharray: 3 2.5; } .goal-text { fill: #bc4c00; font-size: 11px; }
.rule { stroke: #d8dee4; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .value { stroke: #0d1117; } .ground { fill: #0d1117; } .minor { fill: #8d96a0; }
.subject { fill: #4493f8; } .variant { fill: #2b5c94; } .other { fill: #484f58; }
.spread { stroke: #e6edf3; } .goal { stroke: #f0883e; } .goal-text { fill: #f0883e; } .rule { stroke: #30363d; }
}
";

pub(super) fn document(report: &Report) -> String {
    let mut drawing = Group::new();
    let mut y = MARGIN + 16.0;
    for line in wrapped(&report.finding, 72) {
        drawing = drawing.add(text(&line, MARGIN, y, "finding"));
        y += 24.0;
    }
    for (workload, metrics) in &report.rows {
        let row = Row::new(report, workload, metrics, y);
        y += row.height();
        drawing = drawing.add(row.draw());
    }
    y += MARGIN;
    let footer = format!(
        "{} · {} · bars: median of the rounds; thin lines: least to most",
        condition(report, "CPU"),
        condition(report, "date")
    );
    drawing = drawing.add(text(&footer, MARGIN, y, "minor"));
    let height = y + MARGIN * 0.75;
    let ground = Rectangle::new()
        .set("width", WIDTH)
        .set("height", height)
        .set("rx", 6)
        .set("class", "ground");
    let document = Document::new()
        .set("viewBox", (0, 0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .set("role", "img")
        .add(Title::new(report.finding.clone()))
        .add(Style::new(STYLE))
        .add(ground)
        .add(drawing);
    format!("{document}\n")
}

fn condition<'a>(report: &'a Report, wanted: &str) -> &'a str {
    let mut conditions = report.conditions.iter();
    conditions
        .find(|(name, _)| *name == wanted)
        .map_or("", |(_, value)| value)
}

/// One workload.
struct Row<'a> {
    report: &'a Report,
    workload: &'a str,
    metrics: &'a [Metric],
    contenders: Vec<Contender>,
    top: f64,
}

impl<'a> Row<'a> {
    fn new(report: &'a Report, workload: &'a str, metrics: &'a [Metric], top: f64) -> Self {
        let drawn = |s: &Series| s.workload == workload && metrics.contains(&s.metric);
        let contenders = report.distinct(|series| drawn(series).then_some(series.contender));
        Row {
            report,
            workload,
            metrics,
            contenders,
            top,
        }
    }

    fn height(&self) -> f64 {
        70.0 + STEP * self.contenders.len() as f64
    }

    fn draw(&self) -> Group {
        let rule = self.top + 2.0;
        let mut group = Group::new()
            .add(line((MARGIN, rule), (WIDTH - MARGIN, rule), "rule"))
            .add(text(self.workload, MARGIN, self.top + 26.0, "workload"));
        let longest = self
            .contenders
            .iter()
            .map(|contender| contender.name.chars().count())
            .max();
        let names = 7.0 * longest.unwrap_or(0) as f64 + 10.0;
        for (index, contender) in self.contenders.iter().enumerate() {
            let class = if contender.role == Role::Subject {
                "subject-text"
            } else {
                ""
            };
            group = group.add(text(contender.name, MARGIN, self.bar(index) + 12.0, class));
        }
        let room = WIDTH - 2.0 * MARGIN - names;
        let count = self.metrics.len() as f64;
        let width = (room - GAP * (count - 1.0)) / count;
        for (index, metric) in self.metrics.iter().enumerate() {
            let left = MARGIN + names + index as f64 * (width + GAP);
            group = group.add(self.panel(*metric, left, width));
        }
        group
    }

    /// The top of a contender's bar.
    fn bar(&self, index: usize) -> f64 {
        self.top + 54.0 + STEP * index as f64
    }

    fn panel(&self, metric: Metric, left: f64, width: f64) -> Group {
        let better = match metric.better {
            Better::More => "more is better",
            Better::Less => "less is better",
        };
        let caption = format!("{}: {better}", metric.name);
        let mut group = Group::new().add(text(&caption, left, self.top + 46.0, "minor"));
        let goal = self.goal(metric);
        let summaries = self.contenders.iter().map(|contender| {
            let series = self.report.find(self.workload, contender.name, metric)?;
            Some(Summary::of(&series.rounds))
        });
        let summaries: Vec<Option<Summary>> = summaries.collect();
        let most = summaries
            .iter()
            .flatten()
            .map(|summary| summary.max)
            .fold(0.0, f64::max);
        let most = goal.iter().map(|goal| goal.0).fold(most, f64::max);
        let scale = (width - LABEL) / most.max(f64::MIN_POSITIVE);
        // Labels lie over the goal's line, and the line over the bars.
        let mut labels = Group::new();
        for (index, (contender, summary)) in self.contenders.iter().zip(summaries).enumerate() {
            let Some(summary) = summary else { continue };
            let top = self.bar(index);
            group = group.add(bar(contender.role, summary, left, top, scale));
            let class = match contender.role {
                Role::Subject => "value subject-text",
                Role::Variant | Role::Other => "value",
            };
            let value = with_unit(summary.median, metric.unit);
            labels = labels.add(text(&value, left + summary.max * scale + 6.0, top + 12.0, class));
        }
        if let Some((value, label)) = goal {
            let (x, bottom) = (left + value * scale, self.bar(self.contenders.len()));
            let label = text(&label, x, bottom + 9.0, "goal-text").set("text-anchor", "middle");
            group = group
                .add(line((x, self.bar(0) - 3.0), (x, bottom - 3.0), "goal"))
                .add(label);
        }
        group.add(labels)
    }

    /// The goal that is hardest to reach among those of this panel, and what it is called.
    fn goal(&self, metric: Metric) -> Option<(f64, String)> {
        let goals = self
            .report
            .comparisons
            .iter()
            .filter(|comparison| comparison.workload == self.workload && comparison.metric == metric);
        let goals = goals.filter_map(|comparison| {
            let value = match comparison.other {
                None => comparison.goal.bound(),
                Some(_) => {
                    let series = self.report.find(self.workload, comparison.contender, metric)?;
                    let compared = Summary::of(&comparison.rounds).median;
                    comparison
                        .goal
                        .threshold(Summary::of(&series.rounds).median, compared)
                }
            };
            Some((value, format!("goal {}", with_unit(value, metric.unit))))
        });
        match metric.better {
            Better::More => goals.max_by(|a, b| a.0.total_cmp(&b.0)),
            Better::Less => goals.min_by(|a, b| a.0.total_cmp(&b.0)),
        }
    }
}

fn bar(role: Role, summary: Summary, left: f64, top: f64, scale: f64) -> Group {
    let class = match role {
        Role::Subject => "subject",
        Role::Variant => "variant",
        Role::Other => "other",
    };
    let rectangle = Rectangle::new()
        .set("x", number(left))
        .set("y", top)
        .set("width", number(summary.median * scale))
        .set("height", BAR)
        .set("class", class);
    let (least, most) = (left + summary.min * scale, left + summary.max * scale);
    let middle = top + BAR / 2.0;
    let spread = line((least, middle), (most, middle), "spread");
    Group::new().add(rectangle).add(spread)
}

fn text(content: &str, x: f64, y: f64, class: &str) -> Text {
    Text::new(content)
        .set("x", number(x))
        .set("y", number(y))
        .set("class", class)
}

fn line(from: (f64, f64), to: (f64, f64), class: &str) -> Line {
    Line::new()
        .set("x1", number(from.0))
        .set("y1", number(from.1))
        .set("x2", number(to.0))
        .set("y2", number(to.1))
        .set("class", class)
}

/// A tenth of a pixel is enough.
fn number(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Lines of at most so many characters.
fn wrapped(sentence: &str, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in sentence.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= most => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
