//! How every benchmark writes down what it measured: JSON for programs, a Markdown table, and a plot (SVG).
//!
//! A benchmark measures *contenders* at *workloads* in rounds, each contender once in a round, and records one value
//! of each *metric* a round. What is reported is the median of the rounds, beside the least and the most. A ratio
//! between two contenders is taken within each round, so that what slows the machine for a while slows both; the
//! ratio reported is the median of these. `docs/benchmarks.md` describes the files.

// Each benchmark compiles this module and uses its own part of it.
#![allow(dead_code, unreachable_pub)]

mod conditions;
mod json;
mod markdown;
mod number;
mod plot;

pub use conditions::Conditions;

use std::fs;
use std::path::{Path, PathBuf};

/// What every benchmark can be told. A benchmark flattens it into its own arguments.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A short run that shows that all of it works; its figures mean nothing
    #[arg(long)]
    pub quick: bool,
    /// How often each contender is measured; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Write the results to docs/benchmarks/ too
    #[arg(long)]
    docs: bool,
    /// What `cargo bench` tells every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    pub fn rounds(&self) -> u32 {
        if self.quick { 1 } else { self.rounds }
    }
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contender {
    pub name: &'static str,
    pub role: Role,
}

/// How a contender stands out in the plot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// What the benchmark is about.
    Subject,
    /// The same program in another way, as the unencrypted disk beside the encrypted one.
    Variant,
    /// Whom it is compared with.
    Other,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    pub name: &'static str,
    pub unit: &'static str,
    pub better: Better,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    More,
    Less,
}

/// What a contender's value has to be, compared with another's; or what it has to be, where there is no other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At least so many times the other's.
    AtLeast(f64),
    /// At most so many times the other's.
    AtMost(f64),
    /// At most so much more than the other's, in the metric's unit.
    Within(f64),
}

impl Goal {
    fn of(self, value: f64, other: f64) -> f64 {
        match self {
            Goal::AtLeast(_) | Goal::AtMost(_) => value / other,
            Goal::Within(_) => value - other,
        }
    }

    fn is_met(self, result: f64) -> bool {
        match self {
            Goal::AtLeast(bound) => result >= bound,
            Goal::AtMost(bound) | Goal::Within(bound) => result <= bound,
        }
    }

    fn bound(self) -> f64 {
        match self {
            Goal::AtLeast(bound) | Goal::AtMost(bound) | Goal::Within(bound) => bound,
        }
    }

    /// The value that the first contender would have to have, with the value that it has and what that compares to. Not
    /// the other's value times the bound: what is judged are the rounds, each by itself.
    fn threshold(self, value: f64, compared: f64) -> f64 {
        match self {
            Goal::AtLeast(bound) | Goal::AtMost(bound) => value * bound / compared,
            Goal::Within(bound) => value - compared + bound,
        }
    }
}

/// The values of one contender's rounds.
#[derive(Debug)]
struct Series {
    workload: String,
    contender: Contender,
    metric: Metric,
    rounds: Vec<f64>,
}

/// Two series of one workload and metric, compared.
#[derive(Debug)]
struct Comparison {
    workload: String,
    metric: Metric,
    contender: &'static str,
    /// Nobody, where the goal is a value itself.
    other: Option<&'static str>,
    goal: Goal,
    rounds: Vec<f64>,
}

impl Comparison {
    fn is_met(&self) -> bool {
        self.goal.is_met(Summary::of(&self.rounds).median)
    }
}

#[derive(Debug)]
pub struct Report {
    name: &'static str,
    title: String,
    finding: String,
    conditions: Conditions,
    series: Vec<Series>,
    comparisons: Vec<Comparison>,
    /// The plot, from top to bottom: a workload and the metrics that are drawn side by side.
    rows: Vec<(String, Vec<Metric>)>,
}

impl Report {
    /// `name` is the files' name, `title` says what was measured.
    pub fn new(name: &'static str, title: &str, conditions: Conditions) -> Self {
        Report {
            name,
            title: title.to_owned(),
            finding: title.to_owned(),
            conditions,
            series: Vec::new(),
            comparisons: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Adds the value of one round. Workloads and contenders are reported in the order in which they first come.
    pub fn record(&mut self, workload: &str, contender: Contender, metric: Metric, value: f64) {
        let known = self
            .series
            .iter_mut()
            .find(|s| s.workload == workload && s.contender == contender && s.metric == metric);
        match known {
            Some(series) => series.rounds.push(value),
            None => self.series.push(Series {
                workload: workload.to_owned(),
                contender,
                metric,
                rounds: vec![value],
            }),
        }
    }

    /// The median of what was recorded so far.
    pub fn median(&self, workload: &str, contender: Contender, metric: Metric) -> Option<f64> {
        self.find(workload, contender.name, metric)
            .map(|series| Summary::of(&series.rounds).median)
    }

    /// Compares two contenders, when all is recorded, or one contender with the goal itself. Returns the median of the
    /// rounds, or nothing where one of them was not measured.
    pub fn compare(
        &mut self,
        workload: &str,
        metric: Metric,
        contender: Contender,
        other: impl Into<Option<Contender>>,
        goal: Goal,
    ) -> Option<f64> {
        let other = other.into();
        let rounds = match other {
            None => self.find(workload, contender.name, metric)?.rounds.clone(),
            Some(other) => self.compared(workload, metric, contender, other, goal)?,
        };
        let median = Summary::of(&rounds).median;
        self.comparisons.push(Comparison {
            workload: workload.to_owned(),
            metric,
            contender: contender.name,
            other: other.map(|other| other.name),
            goal,
            rounds,
        });
        Some(median)
    }

    /// The median of the rounds' ratios of two contenders, where there is no goal. Nothing where one of them was not
    /// measured.
    pub fn ratio(
        &self,
        workload: &str,
        metric: Metric,
        contender: Contender,
        other: Contender,
    ) -> Option<f64> {
        let rounds = self.compared(workload, metric, contender, other, Goal::AtLeast(0.0))?;
        Some(Summary::of(&rounds).median)
    }

    fn compared(
        &self,
        workload: &str,
        metric: Metric,
        contender: Contender,
        other: Contender,
        goal: Goal,
    ) -> Option<Vec<f64>> {
        let ours = self.find(workload, contender.name, metric)?;
        let theirs = self.find(workload, other.name, metric)?;
        let pairs = ours.rounds.iter().zip(&theirs.rounds);
        Some(pairs.map(|(ours, theirs)| goal.of(*ours, *theirs)).collect())
    }

    /// Draws a workload's metrics, as the plot's next row.
    pub fn plot(&mut self, workload: &str, metrics: &[Metric]) {
        self.rows.push((workload.to_owned(), metrics.to_vec()));
    }

    /// What the results say, in one sentence: the plot's title.
    pub fn finding(&mut self, finding: String) {
        self.finding = finding;
    }

    /// Writes NAME.json, NAME.md and NAME.svg to `target/bench`, and with `--docs` to `docs/benchmarks`.
    pub fn write(&self, options: &Options) {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench");
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/benchmarks");
        self.write_to(&target);
        if options.docs {
            self.write_to(&docs);
        }
        println!("\n{}", markdown::results(self));
        println!(
            "{}",
            target.join(self.name).with_extension("{json,md,svg}").display()
        );
    }

    fn write_to(&self, dir: &Path) {
        let file = |extension: &str| dir.join(self.name).with_extension(extension);
        let write = |path: PathBuf, text: String| {
            fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        };
        fs::create_dir_all(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        write(file("json"), json::document(self));
        write(file("md"), markdown::document(self));
        write(file("svg"), plot::document(self));
    }

    fn find(&self, workload: &str, contender: &str, metric: Metric) -> Option<&Series> {
        self.series
            .iter()
            .find(|s| s.workload == workload && s.contender.name == contender && s.metric == metric)
    }

    /// What there is of something among the series, each once, in order.
    fn distinct<'a, T: PartialEq>(&'a self, part: impl Fn(&'a Series) -> Option<T>) -> Vec<T> {
        let mut parts = Vec::new();
        for part in self.series.iter().filter_map(part) {
            if !parts.contains(&part) {
                parts.push(part);
            }
        }
        parts
    }
}

/// What is reported of a series of rounds.
#[derive(Clone, Copy, Debug)]
struct Summary {
    median: f64,
    min: f64,
    max: f64,
}

impl Summary {
    /// # Panics
    /// Without rounds.
    fn of(rounds: &[f64]) -> Self {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Summary {
            median: (low + high) / 2.0,
            min: sorted[0],
            max: sorted[sorted.len() - 1],
        }
    }
}
