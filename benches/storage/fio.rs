//! What the storage itself can do: fio on the plain disk's file, with io_uring as fast as fio has it.

use crate::Measured;
use crate::client::{Load, Operation};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub(crate) fn run(load: &Load, file: &Path, time: Duration, core: usize) -> Measured {
    let operation = match load.operation {
        Operation::Read => "read",
        Operation::Write => "write",
    };
    let mut command = Command::new("taskset");
    command
        .args(["--cpu-list", &core.to_string()])
        .args(["fio", "--name=raw", "--output-format=json", "--ioengine=io_uring"])
        .args([
            "--direct=1",
            "--fixedbufs=1",
            "--registerfiles=1",
            "--time_based=1",
            "--norandommap=1",
            "--randrepeat=0",
        ])
        // A driver does not tell that a file is invalid, which costs nothing and is done before the time starts.
        .args([
            "--invalidate=0",
            "--lat_percentiles=1",
            "--clat_percentiles=0",
            "--percentile_list=50:99",
        ])
        .arg(format!("--filename={}", file.display()))
        .arg(format!(
            "--rw={}{operation}",
            if load.random { "rand" } else { "" }
        ))
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--runtime={}ms", time.as_millis()));
    if load.depth > 1 {
        // Nobody looks at these latencies, so nobody pays for taking them.
        command.arg("--gtod_reduce=1");
    }
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("fio's JSON");
    let job = &report["jobs"][0];
    let number = |value: &Value| {
        value
            .as_f64()
            .unwrap_or_else(|| panic!("fio's JSON lacks a number: {job}"))
    };
    let time = Duration::from_secs_f64(number(&job["job_runtime"]) / 1e3);
    let busy = (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0;
    let percentile = |name: &str| {
        let nanos = number(&job[operation]["lat_ns"]["percentile"][name]);
        Duration::from_nanos(nanos as u64)
    };
    Measured {
        operations: number(&job[operation]["total_ios"]) as u64,
        time,
        cpu: time.mul_f64(busy),
        latency: (load.depth == 1).then(|| ["50.000000", "99.000000"].map(percentile)),
    }
}
