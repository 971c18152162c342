//! `cargo bench --bench storage`: what a disk costs between its driver and its storage, at vhost-user level.
//!
//! One load generator, libblkio's virtio-blk driver, drives sealblk and QEMU's storage daemon in turn, over files on real
//! storage and over null storage; fio on the same file system says what the storage itself can do. Every round
//! measures all contenders at a workload one right after the other, each in a process of its own, started for it; from
//! round to round their order changes, and the places on storage of the encrypted and of the plain disk.

mod client;
mod fio;
mod logging;
#[path = "../report/mod.rs"]
mod report;
mod server;

use clap::Parser;
use client::{Load, Operation, Waiting};
use report::{Better, Conditions, Contender, Goal, Metric, Options, Report, Role};
use rustix::thread::{CpuSet, sched_setaffinity};
use server::{Disks, Kind, Server, Tuning};
use std::path::PathBuf;
use std::time::Duration;

/// Measure sealblk, QEMU's storage daemon and fio over the same storage
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Only this storage, of both
    #[arg(long, value_name = "real|null")]
    only: Option<Storage>,
    /// Where the disks are made, on the storage to be measured
    #[arg(long, value_name = "DIR", value_parser = parse_directory,
          default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/../bench"))]
    directory: PathBuf,
    /// The size of each of the three disks
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    size: u64,
    /// How long a contender is measured at a workload in a round
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    seconds: f64,
    /// Measure 4 KiB with this many queues too, served on both cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=16))]
    queues: Option<u16>,
    /// Only workloads with this text in their names
    #[arg(long, value_name = "TEXT", default_value = "")]
    workload: String,
    /// What the driver does while nothing is completed: it polls, or sleeps and is woken as a guest's is
    #[arg(long, value_name = "sleep|poll", default_value = "poll")]
    waiting: Waiting,
    /// The core of the load generator
    #[arg(long, value_name = "CORE", default_value_t = 0)]
    client_core: usize,
    /// The core of the server, and of fio
    #[arg(long, value_name = "CORE", default_value_t = 1)]
    server_core: usize,
    /// The block size of sealblk's disks
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    sector_size: u32,
    /// Compare with another build of sealblk, whose executable this is, and with nothing else. This build is measured twice: how much it
    /// differs from itself says what a difference means. And once while its driver's memory is logged, as in a live migration
    #[arg(long, value_name = "SEALBLK")]
    against: Option<PathBuf>,
    /// One more argument for `sealblk serve`, to tune it
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    serve_arg: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Storage {
    Real,
    Null,
}

const SEALBLK: Contender = Contender {
    name: "sealblk",
    role: Role::Subject,
};
const PLAIN: Contender = Contender {
    name: "sealblk, unencrypted",
    role: Role::Variant,
};
const AGAIN: Contender = Contender {
    name: "sealblk, once more",
    role: Role::Variant,
};
const LOGGED: Contender = Contender {
    name: "sealblk, logging",
    role: Role::Variant,
};
const OTHER_BUILD: Contender = Contender {
    name: "another build",
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
const FIO: Contender = Contender {
    name: "fio on the host",
    role: Role::Other,
};

const IOPS: Metric = Metric {
    name: "I/Os a second",
    unit: "IOPS",
    better: Better::More,
};
const RATE: Metric = Metric {
    name: "throughput",
    unit: "MB/s",
    better: Better::More,
};
const CPU: Metric = Metric {
    name: "CPU for each I/O",
    unit: "µs",
    better: Better::Less,
};
const CPU_MIB: Metric = Metric {
    name: "CPU for each MiB",
    unit: "µs",
    better: Better::Less,
};
const P50: Metric = Metric {
    name: "median latency",
    unit: "µs",
    better: Better::Less,
};
const P99: Metric = Metric {
    name: "99th percentile",
    unit: "µs",
    better: Better::Less,
};

/// How often each of QEMU's ways to do I/O is tried, in turn.
const AIO_TRIALS: u32 = 3;

/// A load with its name, and QEMU's way to do I/O for it.
#[derive(Clone, Debug)]
struct Workload {
    name: String,
    load: Load,
    aio: &'static str,
}

impl Workload {
    fn random(operation: Operation, depth: usize, queues: u16) -> Self {
        let each = match queues {
            1 => String::new(),
            _ => format!(" in each of {queues} queues"),
        };
        Workload {
            name: format!("4 KiB random {operation}s, {depth} in flight{each}"),
            load: Load {
                operation,
                random: true,
                block: 4096,
                depth,
                queues,
            },
            aio: server::AIO[0],
        }
    }

    fn sequential(operation: Operation) -> Self {
        Workload {
            name: format!("1 MiB sequential {operation}s, 8 in flight"),
            load: Load {
                operation,
                random: false,
                block: 1 << 20,
                depth: 8,
                queues: 1,
            },
            aio: server::AIO[0],
        }
    }

    /// What is drawn of it.
    fn metrics(&self) -> &'static [Metric] {
        match (self.load.depth, self.load.random) {
            (1, _) => &[P50, P99],
            (_, true) => &[IOPS, CPU],
            (_, false) => &[RATE, CPU_MIB],
        }
    }
}

fn main() {
    let mut arguments = Arguments::parse();
    if arguments.options.quick {
        arguments.seconds = 0.05;
        arguments.size = 64;
        arguments.queues = arguments.queues.or(Some(2));
    }
    // The load generator's threads inherit it; the servers get their own.
    pin(arguments.client_core);
    for storage in [Storage::Real, Storage::Null] {
        if arguments.only.is_none_or(|only| only == storage) {
            measure(&arguments, storage);
        }
    }
}

fn parse_directory(text: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(text);
    // cargo runs benchmarks in the package's directory, wherever it was called.
    path.is_absolute()
        .then_some(path)
        .ok_or("an absolute path is needed")
}

fn pin(core: usize) {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).unwrap_or_else(|error| panic!("core {core}: {error}"));
}

fn measure(arguments: &Arguments, storage: Storage) {
    let bench = Bench::new(arguments, storage);
    let (name, title) = match storage {
        Storage::Real => ("storage", "A disk between its driver and its storage"),
        Storage::Null => (
            "null-storage",
            "A disk between its driver and storage that costs nothing",
        ),
    };
    let mut workloads = bench.workloads();
    if storage == Storage::Real && arguments.against.is_none() {
        workloads
            .iter_mut()
            .for_each(|workload| bench.choose_aio(workload));
    }
    let mut report = Report::new(name, title, bench.conditions(&workloads));
    let rounds = match storage {
        // Or one place, or one order, would have more of them than the other.
        Storage::Real if !arguments.options.quick => arguments.options.rounds().next_multiple_of(4),
        _ => arguments.options.rounds(),
    };
    for round in 1..=rounds {
        // Of four rounds, each order meets each place once.
        if storage == Storage::Real && round % 2 == 1 {
            bench.disks.exchange();
        }
        for workload in &workloads {
            eprintln!("{name}, round {round}: {}", workload.name);
            for (contender, runner) in bench.in_turn(&workload.load, round) {
                let measured = match runner {
                    Runner::Server(kind) => bench.run(workload, kind, bench.time()),
                    Runner::Fio => bench.run_fio(workload),
                };
                record(&mut report, workload, contender, &measured);
            }
        }
    }
    for workload in &workloads {
        judge(&mut report, storage, workload, arguments.against.is_some());
        if workload.load.queues == 1 {
            report.plot(&workload.name, workload.metrics());
        }
    }
    if let Some(finding) = finding(&report, storage, &workloads) {
        report.finding(finding);
    }
    report.write(&arguments.options);
}

/// Who does the I/O of a contender: a server for the load generator, or fio by itself.
#[derive(Clone, Copy, Debug)]
enum Runner {
    Server(Kind),
    Fio,
}

struct Bench<'a> {
    arguments: &'a Arguments,
    storage: Storage,
    disks: Disks,
}

impl<'a> Bench<'a> {
    /// Makes the disks, and writes them once through their own servers: nobody then meets storage never written to.
    fn new(arguments: &'a Arguments, storage: Storage) -> Self {
        let disks = match storage {
            Storage::Null => Disks::null(),
            Storage::Real => Disks::new(&arguments.directory, arguments.size, arguments.sector_size),
        };
        let bench = Bench {
            arguments,
            storage,
            disks,
        };
        if storage == Storage::Real {
            for kind in [Kind::Sealblk, Kind::Plain, Kind::QemuLuks] {
                eprintln!("filling the disk of {kind:?}");
                let server = bench.start(kind, 1, server::AIO[0]);
                client::fill(server.socket());
            }
        }
        bench
    }

    /// The contenders in the order of a round. What one leaves behind (storage that is still busy with its writes, a
    /// core that is warm) meets another one in each round: the order moves on by one, and every second time backwards.
    fn in_turn(&self, load: &Load, round: u32) -> Vec<(Contender, Runner)> {
        let mut order = self.contenders(load);
        let len = order.len();
        order.rotate_left(round as usize / 2 % len);
        if round.is_multiple_of(2) {
            order.reverse();
        }
        order
    }

    /// Over null storage QEMU's LUKS needs a QEMU that can have it there, and large requests that QEMU does not encrypt are
    /// left out: not a byte of them is touched.
    fn contenders(&self, load: &Load) -> Vec<(Contender, Runner)> {
        if self.arguments.against.is_some() {
            return vec![
                (SEALBLK, Runner::Server(Kind::Sealblk)),
                (OTHER_BUILD, Runner::Server(Kind::OtherBuild)),
                (AGAIN, Runner::Server(Kind::Sealblk)),
                (LOGGED, Runner::Server(Kind::Logged)),
            ];
        }
        let mut all = vec![
            (SEALBLK, Runner::Server(Kind::Sealblk)),
            (PLAIN, Runner::Server(Kind::Plain)),
            (LOGGED, Runner::Server(Kind::Logged)),
            (QEMU, Runner::Server(Kind::Qemu)),
            (QEMU_LUKS, Runner::Server(Kind::QemuLuks)),
            (FIO, Runner::Fio),
        ];
        let null = self.storage == Storage::Null;
        all.retain(|(_, runner)| match runner {
            Runner::Server(Kind::Sealblk | Kind::OtherBuild | Kind::Plain) => true,
            Runner::Server(Kind::Logged) => null,
            Runner::Server(Kind::Qemu) => !null || load.random,
            Runner::Server(Kind::QemuLuks) => !null || server::has_qemu10(),
            Runner::Fio => !null && load.queues == 1,
        });
        all
    }

    fn workloads(&self) -> Vec<Workload> {
        use Operation::{Read, Write};
        let depths: &[usize] = match self.storage {
            Storage::Real => &[32, 1],
            Storage::Null => &[32, 128],
        };
        let mut workloads = Vec::new();
        for depth in depths {
            workloads.extend([Read, Write].map(|operation| Workload::random(operation, *depth, 1)));
        }
        workloads.extend([Read, Write].map(Workload::sequential));
        if let Some(queues) = self.arguments.queues {
            workloads.extend([Read, Write].map(|operation| Workload::random(operation, 32, queues)));
        }
        workloads.retain(|workload| workload.name.contains(&self.arguments.workload));
        workloads
    }

    fn conditions(&self, workloads: &[Workload]) -> Conditions {
        let arguments = self.arguments;
        let mut conditions = Conditions::new();
        conditions.add("sector size", format!("{} bytes", arguments.sector_size));
        if let Some(against) = &arguments.against {
            conditions.add("another build", against.display().to_string());
        }
        if !arguments.serve_arg.is_empty() {
            conditions.add("sealblk serve", arguments.serve_arg.join(" "));
        }
        conditions.add_program("QEMU", &server::daemon(self.storage == Storage::Null));
        match self.storage {
            Storage::Real => {
                conditions.add_program("fio", &["fio".to_owned()]);
                conditions.add_storage(&arguments.directory);
                conditions.add(
                    "disks",
                    format!("{} MiB each, all of it written before", arguments.size),
                );
                let native = workloads.iter().filter(|workload| workload.aio != server::AIO[0]);
                let native: Vec<_> = native.map(|workload| workload.name.as_str()).collect();
                let aio = match native.is_empty() {
                    true => "io_uring".to_owned(),
                    false => format!("io_uring; native for: {}", native.join("; ")),
                };
                conditions.add("QEMU's aio, the faster", aio);
            }
            Storage::Null => {}
        }
        conditions.add("measured", format!("{} s a round for each", arguments.seconds));
        conditions.add(
            "cores",
            format!(
                "the driver on {}, the server (and fio) on {}; with several queues the server on both",
                arguments.client_core, arguments.server_core
            ),
        );
        let waiting = match arguments.waiting {
            Waiting::Sleep => "sleeps while it waits",
            Waiting::Poll => "polls",
        };
        conditions.add("the driver", format!("libblkio; it {waiting}"));
        conditions
    }

    fn time(&self) -> Duration {
        Duration::from_secs_f64(self.arguments.seconds)
    }

    /// QEMU has two ways to do I/O, and which is the faster depends on the load: each gets a trial on the plain disk.
    fn choose_aio(&self, workload: &mut Workload) {
        let mut done = [0.0; server::AIO.len()];
        for _ in 0..AIO_TRIALS {
            for (done, aio) in done.iter_mut().zip(server::AIO) {
                let trial = Workload {
                    aio,
                    ..workload.clone()
                };
                *done += self.run(&trial, Kind::Qemu, self.time() / AIO_TRIALS).iops();
            }
        }
        let fastest = done
            .into_iter()
            .zip(server::AIO)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        workload.aio = fastest.expect("there are two").1;
    }

    fn run(&self, workload: &Workload, kind: Kind, time: Duration) -> Measured {
        let server = self.start(kind, workload.load.queues, workload.aio);
        client::run(&server, &workload.load, self.arguments.waiting, time)
    }

    fn run_fio(&self, workload: &Workload) -> Measured {
        let file = self.disks.raw();
        fio::run(&workload.load, &file, self.time(), self.arguments.server_core)
    }

    fn start(&self, kind: Kind, queues: u16, aio: &str) -> Server {
        let arguments = self.arguments;
        let cores = match queues {
            1 => arguments.server_core.to_string(),
            _ => format!("{},{}", arguments.client_core, arguments.server_core),
        };
        let tuning = Tuning {
            cores: &cores,
            queues,
            aio,
            sector_size: arguments.sector_size,
            serve_arguments: &arguments.serve_arg,
            other_build: arguments.against.as_deref(),
        };
        Server::start(&self.disks, kind, &tuning)
    }
}

/// What came of one contender at one workload in one round.
#[derive(Debug)]
struct Measured {
    operations: u64,
    time: Duration,
    /// What the server's process used of all cores meanwhile.
    cpu: Duration,
    /// The median and the 99th percentile, where only one request is in flight.
    latency: Option<[Duration; 2]>,
}

impl Measured {
    fn iops(&self) -> f64 {
        self.operations as f64 / self.time.as_secs_f64()
    }
}

fn record(report: &mut Report, workload: &Workload, contender: Contender, measured: &Measured) {
    assert!(
        measured.operations > 0,
        "{}: {}: no I/O",
        workload.name,
        contender.name
    );
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let cpu = micros(measured.cpu) / measured.operations as f64;
    let mut record = |metric, value| report.record(&workload.name, contender, metric, value);
    if workload.load.random {
        record(IOPS, measured.iops());
        record(CPU, cpu);
    } else {
        let block = workload.load.block as f64;
        record(RATE, measured.iops() * block / 1e6);
        record(CPU_MIB, cpu * f64::from(1 << 20) / block);
    }
    if let Some([median, high]) = measured.latency {
        record(P50, micros(median));
        record(P99, micros(high));
    }
}

/// What this project wants of itself.
fn judge(report: &mut Report, storage: Storage, workload: &Workload, against: bool) {
    use Goal::{AtLeast, AtMost, Within};
    let Load {
        operation,
        random,
        depth,
        queues,
        ..
    } = workload.load;
    let mut goal = |metric, other: Option<Contender>, goal| {
        report.compare(&workload.name, metric, SEALBLK, other, goal);
    };
    if against {
        let (speed, cpu) = match (random, depth) {
            (true, 1) => ((P50, AtMost(1.02)), CPU),
            (true, _) => ((IOPS, AtLeast(0.98)), CPU),
            (false, _) => ((RATE, AtLeast(0.98)), CPU_MIB),
        };
        for (metric, wanted) in [speed, (cpu, AtMost(1.02))] {
            goal(metric, Some(AGAIN), wanted);
            goal(metric, Some(OTHER_BUILD), wanted);
        }
        let may_be = match speed.0 {
            P50 => AtMost(1.1),
            _ => AtLeast(0.9),
        };
        // A migration takes a while, and may cost something.
        for (metric, wanted) in [(speed.0, may_be), (cpu, AtMost(1.1))] {
            report.compare(&workload.name, metric, LOGGED, Some(SEALBLK), wanted);
        }
        return;
    }
    match (storage, random, depth) {
        _ if queues > 1 => {}
        (Storage::Real, true, 1) => goal(P50, Some(FIO), Within(20.0)),
        (Storage::Real, true, _) => {
            goal(IOPS, Some(PLAIN), AtLeast(0.97));
            goal(IOPS, Some(FIO), AtLeast(0.90));
            goal(IOPS, Some(QEMU), AtLeast(1.0));
            goal(CPU, Some(FIO), AtMost(1.5));
            let of_luks = match operation {
                Operation::Read => 1.0 / 2.0,
                Operation::Write => 1.0 / 4.0,
            };
            goal(CPU, Some(QEMU_LUKS), AtMost(of_luks));
        }
        (Storage::Real, false, _) => {
            goal(RATE, Some(PLAIN), AtLeast(0.97));
            if operation == Operation::Write {
                goal(RATE, Some(QEMU_LUKS), AtLeast(6.0));
                goal(CPU_MIB, Some(QEMU_LUKS), AtMost(1.0 / 15.0));
            }
        }
        (Storage::Null, true, _) => goal(IOPS, None, AtLeast(700_000.0)),
        (Storage::Null, false, _) => goal(RATE, None, AtLeast(8_000.0)),
    }
}

/// The plot's title: how near encryption comes to no encryption, at the worst of the workloads.
fn finding(report: &Report, storage: Storage, workloads: &[Workload]) -> Option<String> {
    let single = workloads.iter().filter(|workload| workload.load.queues == 1);
    let ratio = |workload: &Workload| {
        let metric = if workload.load.random { IOPS } else { RATE };
        report.ratio(&workload.name, metric, SEALBLK, PLAIN)
    };
    let worst = single.filter_map(ratio).reduce(f64::min)?;
    let percent = (worst * 100.0).floor();
    let least = |random: bool, metric| {
        let alike = workloads
            .iter()
            .filter(|workload| workload.load.queues == 1 && workload.load.random == random);
        let medians = alike.filter_map(|workload| report.median(&workload.name, SEALBLK, metric));
        medians.reduce(f64::min)
    };
    Some(match storage {
        Storage::Real => format!("Encrypted by sealblk, a disk keeps {percent} % or more of its speed"),
        Storage::Null => format!(
            "One queue on one core encrypts {:.0} k I/Os of 4 KiB a second or more, and {:.1} GB/s of large ones",
            least(true, IOPS)? / 1e3,
            least(false, RATE)? / 1e3,
        ),
    })
}
