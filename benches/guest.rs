//! What fio measured in a guest, as a report: `qemu/bench` boots the guest, and hands over what fio wrote there.
//!
//! In its directory are `ROUND.json`, in which a job is called `WORKLOAD.CONTENDER`, and `conditions`, a line each of
//! name and value.

mod report;

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use report::{Better, Conditions, Contender, Goal, Metric, Options, Report, Role};
use serde_json::Value;

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    report: Options,
    /// What the guest wrote
    results: Option<PathBuf>,
}

const ENCRYPTED: Contender = Contender {
    name: "sealblk",
    role: Role::Subject,
};
const UNENCRYPTED: Contender = Contender {
    name: "sealblk, unencrypted",
    role: Role::Variant,
};
const DM_CRYPT: Contender = Contender {
    name: "dm-crypt in the guest, over that",
    role: Role::Other,
};
const QEMU: Contender = Contender {
    name: "QEMU, unencrypted",
    role: Role::Other,
};
const QEMU_LUKS: Contender = Contender {
    name: "QEMU, LUKS",
    role: Role::Other,
};

/// By the names that the guest's script gives them.
const CONTENDERS: [(&str, Contender); 5] = [
    ("sealblk", ENCRYPTED),
    ("sealblk-plain", UNENCRYPTED),
    ("dm-crypt", DM_CRYPT),
    ("qemu", QEMU),
    ("qemu-luks", QEMU_LUKS),
];

const IOPS: Metric = Metric {
    name: "I/O operations a second",
    unit: "IOPS",
    better: Better::More,
};
const THROUGHPUT: Metric = Metric {
    name: "throughput",
    unit: "MB/s",
    better: Better::More,
};
const LATENCY: Metric = Metric {
    name: "99th percentile of the latency",
    unit: "ms",
    better: Better::Less,
};

/// What one is called in the guest's script and here, the direction as fio has it, and what counts.
const WORKLOADS: [(&str, &str, &str, Metric); 4] = [
    ("random-read", "4 KiB random reads, 32 in flight", "read", IOPS),
    ("random-write", "4 KiB random writes, 32 in flight", "write", IOPS),
    ("read", "1 MiB sequential reads, 8 in flight", "read", THROUGHPUT),
    (
        "write",
        "1 MiB sequential writes, 8 in flight",
        "write",
        THROUGHPUT,
    ),
];

fn main() {
    let arguments = Arguments::parse();
    let Some(results) = &arguments.results else {
        println!("the guest is booted, and this is run, by `qemu/bench DIR`");
        return;
    };
    let mut report = Report::new("guest", "fio in a guest", conditions(results));
    let mut ratios = Vec::new();
    let rounds: Vec<Value> = (1..)
        .map_while(|round| fio(&results.join(format!("{round}.json"))))
        .collect();
    for (its_name, workload, direction, metric) in WORKLOADS {
        for round in &rounds {
            for (name, contender) in CONTENDERS {
                let found = &job(round, &format!("{its_name}.{name}"))[direction];
                let (field, scale) = if metric == IOPS {
                    ("iops", 1.0)
                } else {
                    ("bw_bytes", 1e-6)
                };
                report.record(workload, contender, metric, number(&found[field]) * scale);
                let latency = &found["clat_ns"]["percentile"]["99.000000"];
                report.record(workload, contender, LATENCY, number(latency) * 1e-6);
            }
        }
        ratios.extend(report.compare(workload, metric, ENCRYPTED, UNENCRYPTED, Goal::AtLeast(0.97)));
        report.compare(workload, metric, ENCRYPTED, DM_CRYPT, Goal::AtLeast(1.0));
        report.plot(workload, &[metric]);
    }
    let least = ratios.into_iter().reduce(f64::min).expect("rounds of fio");
    report.finding(format!(
        "In a guest, an encrypted disk has at least {least:.2} of the unencrypted one's speed"
    ));
    report.write(&arguments.report);
}

fn conditions(results: &Path) -> Conditions {
    let mut conditions = Conditions::new();
    let text = fs::read_to_string(results.join("conditions")).expect("the conditions");
    let names = ["guest", "accelerator", "QEMU", "disks", "each run"];
    for name in names {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name}: ")));
        conditions.add(name, value.expect("a line of each"));
    }
    conditions.add_storage(results);
    conditions
}

/// What fio wrote in a round; nothing if there was none.
fn fio(path: &Path) -> Option<Value> {
    let text = fs::read_to_string(path).ok()?;
    // It puts warnings before.
    let json = text.find('{').map_or("", |start| &text[start..]);
    Some(serde_json::from_str(json).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

/// The job of that name, which has to have ended well.
fn job<'a>(round: &'a Value, name: &str) -> &'a Value {
    let mut jobs = round["jobs"].as_array().expect("a list of jobs").iter();
    let job = jobs
        .find(|job| job["jobname"] == name)
        .unwrap_or_else(|| panic!("no job {name}"));
    assert_eq!(job["error"], 0, "{name}");
    job
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number of fio's")
}
