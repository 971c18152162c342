//! Under which conditions was measured: what a reader needs to judge the figures or to repeat them.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Names and values, in the order in which they are shown.
#[derive(Debug)]
pub struct Conditions(Vec<(&'static str, String)>);

impl Conditions {
    /// What every benchmark says: when, on which machine, and which sealblk.
    pub fn new() -> Self {
        let mut conditions = Conditions(Vec::new());
        conditions.add("date", said("date", &["-u", "+%F %H:%M UTC"]));
        conditions.add("CPU", cpu());
        conditions.add("memory", memory());
        conditions.add("kernel", said("uname", &["-srm"]));
        conditions.add("sealblk", sealblk());
        conditions.add("Rust", said("rustc", &["--version"]));
        conditions
    }

    pub fn add(&mut self, name: &'static str, value: impl Into<String>) {
        self.0.push((name, value.into()));
    }

    /// A program that takes part, by the first line that it says of its version.
    pub fn add_program(&mut self, name: &'static str, command: &[String]) {
        let arguments: Vec<&str> = command[1..].iter().map(String::as_str).collect();
        self.add(
            name,
            said(&command[0], &[&arguments, &["--version"][..]].concat()),
        );
    }

    /// The storage that a file is on: device, its model, file system.
    pub fn add_storage(&mut self, path: &Path) {
        let path = path.to_str().expect("a path of UTF-8");
        let source = said("findmnt", &["-no", "SOURCE", "--target", path]);
        let system = said("findmnt", &["-no", "FSTYPE,OPTIONS", "--target", path]);
        // From the file system's device down to what the hardware calls itself.
        let devices = lines("lsblk", &["-sno", "NAME,SIZE,MODEL", &source]);
        self.add("storage", format!("{system}; on {}", devices.join(" on ")));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }
}

fn cpu() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": "))
            .map_or("unknown", |(_, value)| value)
    };
    let cores = cpuinfo
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let has = |flag: &str| field("flags").split_whitespace().any(|has| has == flag);
    let mut text = format!("{}, {cores} logical cores", field("model name"));
    for (flag, name) in [("vaes", "VAES"), ("avx512f", "AVX-512")] {
        if has(flag) {
            text += &format!(", {name}");
        }
    }
    if has("hypervisor") {
        text += ", in a virtual machine";
    }
    text
}

fn memory() -> String {
    let meminfo = fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let kib = meminfo
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse::<f64>().ok());
    kib.map_or("unknown".to_owned(), |kib| format!("{:.1} GiB", kib / 1048576.0))
}

fn sealblk() -> String {
    let git = |arguments: &[&str]| lines("git", &[&["-C", env!("CARGO_MANIFEST_DIR")], arguments].concat());
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).pop();
    // Reports change the documents; what they tell of is the program.
    let changed = !git(&["status", "--porcelain", "--", ".", ":!docs"]).is_empty();
    format!(
        "{}, commit {}{}",
        env!("CARGO_PKG_VERSION"),
        commit.as_deref().unwrap_or("unknown"),
        if changed { ", changed" } else { "" }
    )
}

/// The first line that a command says, or that it is not known.
fn said(program: &str, arguments: &[&str]) -> String {
    let first = lines(program, arguments).into_iter().next();
    first.unwrap_or("unknown".to_owned())
}

/// What a command says, without the space that makes columns of it. Nothing if it cannot be run.
fn lines(program: &str, arguments: &[&str]) -> Vec<String> {
    let output = Command::new(program).args(arguments).output();
    let text = output.map_or(String::new(), |output| {
        String::from_utf8_lossy(&output.stdout).into_owned()
    });
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text.lines().map(words).collect()
}
