//! A disk that is served for long, while all that can happen to it does: whatever adds up shows. SEALBLK_TEST_SOAK=SECONDS sets for how long.

use super::killed::Guest;
use super::upgrade::{signal, spawn, start, upgrade, wait_ended};
use common::agent::Agent;
use common::frontend::Frontend;
use common::memory::{END as END_OF_MEMORY, Log};
use common::process::{Facts, Process, facts_of};
use common::serve::sealblk_path;
use common::volume::{Volume, run};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// What memory may grow by between the first part of a run and its last: buffers that were not used before, and what an allocator keeps.
const SLACK_KIB: u64 = 4096;
/// How long a connection that has ended, or the thread that ends, may still be seen.
const PASSING: Duration = Duration::from_secs(5);
/// Beyond which the disk does not grow.
const LARGEST_MIB: u64 = 4096;

/// The host on which the guest runs, of two that have the disk.
struct Soak {
    agent: Agent,
    volume: Volume,
    guest: Guest,
    host: Host,
    mib: u64,
}

struct Host {
    name: &'static str,
    socket: PathBuf,
    control: PathBuf,
    /// What is said by the process that was started here, and by those that continued for it.
    log: Process,
}

impl Host {
    fn start(name: &'static str, volume: &Volume, args: &[&str]) -> Self {
        let socket = volume.beside(&format!("{name}.sock"));
        let control = volume.beside(&format!("{name}.control"));
        let log = start(volume, &socket, &control, args);
        log.wait_stderr("serving");
        Host {
            name,
            socket,
            control,
            log,
        }
    }

    fn verb(&self, verb: &str, args: &[&str]) -> Output {
        let mut command = Command::new(sealblk_path());
        run(command
            .arg(verb)
            .arg("--control-socket")
            .arg(&self.control)
            .args(args))
    }

    fn status(&self) -> Value {
        serde_json::from_slice(&self.verb("status", &["--json"]).stdout).unwrap()
    }

    /// The process that serves by now.
    fn process(&self) -> u32 {
        self.status()["process"].as_u64().unwrap() as u32
    }

    fn end(&self, by: Signal) {
        let process = self.process();
        signal(process, by);
        wait_ended(process);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Those that continued are not this test's children.
        if std::thread::panicking() && self.control.exists() {
            signal(self.process(), Signal::KILL);
        }
    }
}

/// What happens to a disk.
type Event = (&'static str, fn(&mut Soak));
const OF_A_PROCESS: [Event; 3] = [
    ("the front-end leaves and comes back", Soak::reconnect),
    ("others ask", Soak::ask),
    ("the disk grows", Soak::grow),
];
/// After these another process serves.
const OF_PROCESSES: [Event; 3] = [
    ("sealblk is killed", Soak::kill),
    ("sealblk is upgraded", Soak::upgrade),
    ("the guest migrates", Soak::migrate),
];

impl Soak {
    fn new() -> Self {
        let agent = Agent::new("");
        let volume = agent.volume();
        let host = Host::start("a", &volume, &[]);
        let guest = Guest::new(&host.socket);
        Soak {
            agent,
            volume,
            guest,
            host,
            mib: 64,
        }
    }

    fn reconnect(&mut self) {
        self.guest.driver.frontend.shut_down();
        self.guest.driver.frontend.wait_closed();
        self.guest.driver.reconnect(&self.host.socket);
    }

    fn ask(&mut self) {
        self.host.status();
        // A front-end that finds the place taken, and leaves.
        drop(Frontend::connect(&self.host.socket));
    }

    fn grow(&mut self) {
        if self.mib < LARGEST_MIB {
            self.mib += 1;
            self.host.verb("resize", &["--size", &format!("{}M", self.mib)]);
        }
    }

    fn kill(&mut self) {
        self.host.end(Signal::KILL);
        self.host = Host::start(self.host.name, &self.volume, &[]);
        self.guest.driver.reconnect(&self.host.socket);
    }

    fn upgrade(&mut self) {
        let before = self.host.process();
        let mut child = spawn(&mut upgrade(Path::new(sealblk_path()), &self.host.control));
        while child.try_wait().unwrap().is_none() {
            self.guest.run(Duration::from_millis(2));
        }
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}\n{}", self.host.log.stderr());
        wait_ended(before);
    }

    fn migrate(&mut self) {
        let other = if self.host.name == "a" { "b" } else { "a" };
        let destination = Host::start(other, &self.volume, &["--incoming"]);
        let frontend = &self.guest.driver.frontend;
        frontend.set_log(&Log::of_memory(END_OF_MEMORY));
        self.guest.driver.log_all(true);
        self.guest.run(Duration::from_millis(20));
        for queue in &self.guest.driver.queues {
            self.guest.driver.frontend.enable(queue.index, false);
            let base = self.guest.driver.frontend.stop_vring(queue.index);
            assert_eq!(base, queue.used_index(), "it leaves requests in flight");
        }
        self.guest.driver.reconnect(&destination.socket);
        self.host.end(Signal::TERM);
        self.host = destination;
    }
}

/// What a process has, in a moment without passing things.
fn least_of(process: u32) -> Facts {
    let mut least = facts_of(process);
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(2));
        let facts = facts_of(process);
        least.descriptors = least.descriptors.min(facts.descriptors);
        least.threads = least.threads.min(facts.threads);
        least.guest_mappings = least.guest_mappings.min(facts.guest_mappings);
        least.resident_kib = least.resident_kib.min(facts.resident_kib);
    }
    least
}

/// The most of each in a part of a run.
fn most(facts: &[Facts]) -> Facts {
    let most = |of: fn(&Facts) -> u64| facts.iter().map(of).max().unwrap();
    Facts {
        descriptors: most(|facts| facts.descriptors as u64) as usize,
        threads: most(|facts| facts.threads as u64) as usize,
        guest_mappings: most(|facts| facts.guest_mappings as u64) as usize,
        resident_kib: most(|facts| facts.resident_kib),
        locked_kib: most(|facts| facts.locked_kib),
    }
}

/// Whether nothing has added up between two parts of a run. A process that has just started may not have ended the thread that got its
/// key.
fn assert_level(what: &str, first: &Facts, last: &Facts) {
    println!(
        "{what}: memory {} KiB, then {} KiB; descriptors {}, then {}; threads {}, then {}",
        first.resident_kib,
        last.resident_kib,
        first.descriptors,
        last.descriptors,
        first.threads,
        last.threads
    );
    assert!(
        last.descriptors <= first.descriptors + 1
            && last.threads <= first.threads + 1
            && last.guest_mappings <= first.guest_mappings
            && last.locked_kib <= first.locked_kib + SLACK_KIB
            && last.resident_kib <= first.resident_kib + SLACK_KIB,
        "{what} grows: {first:?}, then {last:?}"
    );
}

#[test]
fn served_for_long_it_loses_nothing_and_nothing_adds_up() {
    let seconds = std::env::var("SEALBLK_TEST_SOAK").map_or(10, |seconds| seconds.parse().expect("seconds"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut soak = Soak::new();
    let mut served = Vec::new();
    let mut agent = Vec::new();
    let mut happened = BTreeMap::new();
    let (mut serving, mut at_first) = (0, least_of(soak.agent.child.id()));
    // In a long run a process lives for minutes, too.
    let calm = if seconds < 60 { 4 } else { 256 };
    // The first and the last part each have all events.
    let part = (calm + 1) * OF_A_PROCESS.len() + OF_PROCESSES.len();
    while Instant::now() < end || served.len() < 2 * part {
        let begun = served.len();
        // First those of one process, then all by chance.
        let mut left: Vec<Event> = OF_A_PROCESS.repeat(calm);
        let mut mixed = [&OF_A_PROCESS[..], &OF_PROCESSES[..]].concat();
        while !left.is_empty() {
            let which = soak.guest.random.below(left.len() as u64) as usize;
            let (what, event) = left.swap_remove(which);
            event(&mut soak);
            *happened.entry(what).or_insert(0) += 1;
            let time = soak.guest.random.below(100);
            soak.guest.run(Duration::from_millis(20 + time));
            let process = soak.host.process();
            if serving != process {
                // Once it serves all queues; whatever happens to it later.
                soak.guest.settle();
                soak.guest.ask_all();
                (serving, at_first) = (process, least_of(process));
            }
            let mut facts = least_of(process);
            // What passes has time to.
            let start = Instant::now();
            while facts.descriptors > at_first.descriptors || facts.guest_mappings > at_first.guest_mappings {
                assert!(
                    start.elapsed() < PASSING,
                    "{what}: {facts:?}, at first it was {at_first:?}"
                );
                facts = least_of(process);
            }
            served.push(facts);
            agent.push(least_of(soak.agent.child.id()));
            if left.is_empty() {
                if !mixed.is_empty() {
                    let calm = &served[begun..];
                    let quarter = calm.len() / 4;
                    assert_level(
                        "one process",
                        &most(&calm[..quarter]),
                        &most(&calm[calm.len() - quarter..]),
                    );
                }
                left.append(&mut mixed);
            }
        }
        soak.guest.settle();
        soak.guest.check_content();
        soak.guest.ask_all();
    }
    soak.guest.settle();
    soak.guest.check_content();
    println!("{} requests were answered", soak.guest.answered);
    for (what, times) in happened {
        println!("{what}: {times} times");
    }
    let (first, last) = (&served[..part], &served[served.len() - part..]);
    assert_level("sealblk", &most(first), &most(last));
    assert_level(
        "the agent",
        &most(&agent[..part]),
        &most(&agent[agent.len() - part..]),
    );
    soak.host.end(Signal::TERM);
}
