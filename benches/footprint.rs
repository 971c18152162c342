//! What a served disk costs while its guest does nothing: processor time, wake-ups, memory, threads and descriptors, those of
//! its key helper included;
//! how long it takes from its start to its first answer; and what 200 of them cost on one machine.
//!
//! `cargo bench --bench footprint`; the figures are those that the kernel keeps in `/proc`, so it has to run as root
//! (sealblk keeps its process from others of the same user).

mod report;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Parser;
use common::driver::{Driver, Setup};
use common::frontend::{GET_FEATURES, VERSION, message};
use common::process::{Process, Thread, threads_of};
use common::serve::serve;
use common::volume::{MIB, Volume};
use report::{Better, Conditions, Contender, Metric, Options, Report, Role};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    report: Options,
    /// How many disks are served at once
    #[arg(long, value_name = "N", default_value_t = 200)]
    disks: usize,
}

const WAITING: Contender = Contender {
    name: "no front-end yet",
    role: Role::Other,
};
const ONE_QUEUE: Contender = Contender {
    name: "a driver, 1 queue",
    role: Role::Subject,
};
const FOUR_QUEUES: Contender = Contender {
    name: "a driver, 4 queues",
    role: Role::Variant,
};
/// How many queues the driver starts in each state.
const STATES: [(Contender, u32); 3] = [(WAITING, 0), (ONE_QUEUE, 1), (FOUR_QUEUES, 4)];

const CPU: Metric = less("CPU", "µs");
const WAKE_UPS: Metric = less("wake-ups", "");
const KERNEL_WAKE_UPS: Metric = less("wake-ups of io_uring's kernel threads", "");
const START: Metric = less("start to the first answer", "ms");
const START_ALL: Metric = less("start of all", "s");
const BEYOND_POOL: Metric = less("resident beyond the pool", "MiB");
const POOL: Metric = less("pool", "MiB");
const PSS: Metric = less("proportional share (PSS), pool included", "MiB");
const THREADS: Metric = less("threads", "");
const DESCRIPTORS: Metric = less("descriptors", "");

const fn less(name: &'static str, unit: &'static str) -> Metric {
    Metric {
        name,
        unit,
        better: Better::Less,
    }
}

fn main() {
    let arguments = Arguments::parse();
    let quick = arguments.report.quick;
    let mut report = Report::new(
        "footprint",
        "What a served disk costs while its guest does nothing",
        Conditions::new(),
    );
    let window = Duration::from_secs(if quick { 1 } else { 10 });
    let starts = if quick { 3 } else { 20 };
    let disks = Disks::new(if quick { 5 } else { arguments.disks });
    idle(&mut report, &disks, window);
    for _ in 0..arguments.report.rounds() {
        all(&mut report, &disks);
    }
    for _ in 0..starts {
        let (_served, time) = disks.start(0);
        report.record(ONE_DISK, WAITING, START, 1e3 * time.as_secs_f64());
    }
    report.plot(&each_of(&disks), &[BEYOND_POOL, PSS]);
    report.finding(finding(&report, &disks));
    report.write(&arguments.report);
}

const ONE_DISK: &str = "one disk";

fn each_of(disks: &Disks) -> String {
    format!("each of {} disks", disks.paths.len())
}

fn finding(report: &Report, disks: &Disks) -> String {
    let of_each = |metric| {
        report
            .median(&each_of(disks), ONE_QUEUE, metric)
            .expect("it was measured")
    };
    format!(
        "A served disk takes {:.1} MiB beside its pool of {:.0} MiB, and answers {:.0} ms after its start",
        of_each(BEYOND_POOL),
        of_each(POOL),
        report.median(ONE_DISK, WAITING, START).expect("it was measured")
    )
}

/// What runs in `window` while nothing is asked for. What a guest did before may leave threads of the kernel's behind,
/// so the driver has written and flushed.
fn idle(report: &mut Report, disks: &Disks, window: Duration) {
    let workload = format!("one disk, idle for {} s", window.as_secs());
    let served: Vec<Served> = (0..STATES.len()).map(|disk| disks.start(disk).0).collect();
    let _drivers: Vec<_> = served
        .iter()
        .zip(STATES)
        .map(|(served, (_, queues))| served.connect(queues))
        .collect();
    // What polls for a while after a request, and threads that leave after 5 s without work, are gone by then.
    std::thread::sleep(window * 6 / 10 + Duration::from_secs(1));
    let threads = || -> Vec<Vec<Thread>> {
        served
            .iter()
            .map(|served| {
                processes_of(served.process.pid())
                    .into_iter()
                    .flat_map(threads_of)
                    .collect()
            })
            .collect()
    };
    let before = threads();
    std::thread::sleep(window);
    for (((state, _), before), after) in STATES.into_iter().zip(before).zip(threads()) {
        let (mut cpu, mut wake_ups, mut kernel) = (0, 0, 0);
        for thread in after {
            // A thread that is new has run.
            let old = before.iter().find(|old| old.id == thread.id);
            let (ran, switches) = old.map_or((0, 0), |old| (old.ran_ns, old.switches));
            cpu += thread.ran_ns - ran;
            let count = if thread.name.starts_with("iou-") {
                &mut kernel
            } else {
                &mut wake_ups
            };
            *count += thread.switches - switches;
        }
        report.record(&workload, state, CPU, cpu as f64 / 1e3);
        report.record(&workload, state, WAKE_UPS, wake_ups as f64);
        report.record(&workload, state, KERNEL_WAKE_UPS, kernel as f64);
    }
}

/// What each of many disks costs.
fn all(report: &mut Report, disks: &Disks) {
    let workload = each_of(disks);
    for (state, queues) in STATES {
        let started = Instant::now();
        let processes: Vec<Process> = (0..disks.paths.len()).map(|disk| disks.spawn(disk)).collect();
        for disk in 0..processes.len() {
            wait_for_answer(&disks.socket(disk));
        }
        let time = started.elapsed();
        let served: Vec<Served> = processes
            .into_iter()
            .enumerate()
            .map(|(disk, process)| Served {
                process,
                socket: disks.socket(disk),
            })
            .collect();
        let drivers: Vec<_> = served.iter().map(|served| served.connect(queues)).collect();
        std::thread::sleep(Duration::from_millis(500));
        let costs: Vec<Cost> = served
            .iter()
            .map(|served| Cost::of_all(&processes_of(served.process.pid())))
            .collect();
        let mean = |part: fn(&Cost) -> f64| costs.iter().map(part).sum::<f64>() / costs.len() as f64;
        report.record(&workload, state, BEYOND_POOL, mean(|cost| cost.beyond_pool));
        report.record(&workload, state, POOL, mean(|cost| cost.pool));
        report.record(&workload, state, PSS, mean(|cost| cost.pss));
        report.record(&workload, state, THREADS, mean(|cost| cost.threads));
        report.record(&workload, state, DESCRIPTORS, mean(|cost| cost.descriptors));
        report.record(&workload, state, START_ALL, time.as_secs_f64());
        drop(drivers);
    }
}

/// Volumes to serve: the same one in files of their own, of which only the header takes room.
struct Disks {
    volume: Volume,
    paths: Vec<PathBuf>,
}

impl Disks {
    fn new(count: usize) -> Self {
        let volume = Volume::created(MIB, 512);
        let header = volume.stored(0, MIB as usize);
        let len = fs::metadata(&volume.path).unwrap().len();
        let make = |number| {
            let path = volume.beside(&format!("disk-{number}"));
            fs::write(&path, &header).unwrap();
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_len(len).unwrap();
            path
        };
        let paths = (0..count).map(make).collect();
        Disks { volume, paths }
    }

    fn socket(&self, disk: usize) -> PathBuf {
        self.paths[disk].with_extension("sock")
    }

    fn spawn(&self, disk: usize) -> Process {
        let command = serve(&self.volume, &self.socket(disk), &[]);
        // The same command, with another disk.
        let arguments = command
            .get_args()
            .map(|argument| match Path::new(argument) == self.volume.path {
                true => self.paths[disk].as_os_str(),
                false => argument,
            });
        Process::spawn(Command::new(command.get_program()).args(arguments))
    }

    /// Serves a disk, and tells how long it took until a front-end had an answer.
    fn start(&self, disk: usize) -> (Served, Duration) {
        let socket = self.socket(disk);
        let started = Instant::now();
        let process = self.spawn(disk);
        wait_for_answer(&socket);
        (Served { process, socket }, started.elapsed())
    }
}

struct Served {
    process: Process,
    socket: PathBuf,
}

impl Served {
    /// A driver that has read, written and flushed on each of its queues, and is then quiet; none, with none.
    fn connect(&self, queues: u32) -> Option<Driver> {
        (queues > 0).then(|| {
            let mut driver = Driver::with(
                &self.socket,
                Setup {
                    queues,
                    ..Setup::default()
                },
            );
            driver.still_serves();
            driver
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.process.signal(rustix::process::Signal::TERM);
        self.process.wait();
    }
}

fn wait_for_answer(socket: &Path) {
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    };
    stream.set_read_timeout(Some(common::DEADLINE)).unwrap();
    stream.write_all(&message(GET_FEATURES, VERSION, &[])).unwrap();
    stream.read_exact(&mut [0; 20]).unwrap();
}

/// The processes of a served disk: the one that serves it, and its key helper.
fn processes_of(serving: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{serving}/task/{serving}/children")).unwrap();
    let children = children.split_whitespace().map(|child| child.parse().unwrap());
    [serving].into_iter().chain(children).collect()
}

/// What the kernel says processes take.
struct Cost {
    beyond_pool: f64,
    pool: f64,
    pss: f64,
    threads: f64,
    descriptors: f64,
}

impl Cost {
    fn of_all(processes: &[u32]) -> Self {
        let costs: Vec<Self> = processes.iter().copied().map(Self::of).collect();
        let sum = |part: fn(&Self) -> f64| costs.iter().map(part).sum();
        Self {
            beyond_pool: sum(|cost| cost.beyond_pool),
            pool: sum(|cost| cost.pool),
            pss: sum(|cost| cost.pss),
            threads: sum(|cost| cost.threads),
            descriptors: sum(|cost| cost.descriptors),
        }
    }

    fn of(pid: u32) -> Self {
        let file = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let (status, rollup) = (file("status"), file("smaps_rollup"));
        let field = |text: &str, name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        // The pool is what is pinned, and resident; the guest's memory is shared, and is not the server's own.
        let pool = field(&status, "VmPin:") / 1024.0;
        let resident = (field(&status, "RssAnon:") + field(&status, "RssFile:")) / 1024.0;
        Cost {
            beyond_pool: resident - pool,
            pool,
            pss: field(&rollup, "Pss:") / 1024.0,
            threads: field(&status, "Threads:"),
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as f64,
        }
    }
}
