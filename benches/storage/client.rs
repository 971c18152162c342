//! The load generator: libblkio's virtio-blk driver, one thread for each queue.
//!
//! It keeps as many requests in flight as the load says, takes completions and submits their successors in batches, and
//! allocates nothing on the way, so that it is faster than what it measures. A driver that sleeps is woken by the
//! server's interrupts, as a guest's is; one that polls shows what the server can do when nothing else is the limit.

// Unsafe for libblkio's completions, which it hands out in memory that it says is filled, and for the CPU clock.
#![allow(unsafe_code)]

use crate::Measured;
use crate::server::Server;
use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use rustix::process::Pid;
use std::fmt::{self, Display};
use std::fs::OpenOptions;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
}

impl Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
        })
    }
}

/// What a driver asks of a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) operation: Operation,
    pub(crate) random: bool,
    /// Bytes of each request.
    pub(crate) block: usize,
    /// Requests in flight in each queue.
    pub(crate) depth: usize,
    pub(crate) queues: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Waiting {
    Sleep,
    Poll,
}

/// How long a server may take to listen, or to answer.
const DEADLINE: Duration = Duration::from_secs(20);
/// Latencies that a run can hold; a disk at one request in flight does not reach it in a minute.
const MOST_LATENCIES: usize = 1 << 24;

/// Drives a server and returns what it did between a warm-up and the end.
pub(crate) fn run(server: &Server, load: &Load, waiting: Waiting, time: Duration) -> Measured {
    let (_blkio, drivers) = connect(server.socket(), load, waiting);
    let start = Instant::now() + time / 10;
    let end = start + time;
    thread::scope(|scope| {
        let threads: Vec<_> = drivers
            .into_iter()
            .map(|driver| scope.spawn(move || driver.drive(start, end)))
            .collect();
        thread::sleep(start.saturating_duration_since(Instant::now()));
        let (cpu_before, before) = (cpu_time(server.pid()), Instant::now());
        thread::sleep(end.saturating_duration_since(Instant::now()));
        let (cpu, cpu_window) = (cpu_time(server.pid()) - cpu_before, before.elapsed());
        let drives: Vec<Drive> = threads
            .into_iter()
            .map(|thread| thread.join().expect("the driver's thread"))
            .collect();
        let time = drives.iter().map(|drive| drive.time).max().expect("a queue");
        Measured {
            operations: drives.iter().map(|drive| drive.operations).sum(),
            time,
            cpu: cpu.mul_f64(time.as_secs_f64() / cpu_window.as_secs_f64()),
            latency: percentiles(drives.into_iter().flat_map(|drive| drive.latencies).collect()),
        }
    })
}

/// Writes a whole disk once.
pub(crate) fn fill(socket: &Path) {
    let load = Load {
        operation: Operation::Write,
        random: false,
        block: 1 << 20,
        depth: 8,
        queues: 1,
    };
    let (_blkio, mut drivers) = connect(socket, &load, Waiting::Sleep);
    drivers[0].write_once();
}

fn percentiles(mut latencies: Vec<u32>) -> Option<[Duration; 2]> {
    latencies.sort_unstable();
    let at = |part: f64| latencies.get((latencies.len() as f64 * part) as usize);
    let (median, high) = (at(0.5)?, at(0.99)?);
    Some([*median, *high].map(|nanos| Duration::from_nanos(nanos.into())))
}

/// What a process used of all cores so far: all its threads, also those that have ended and io_uring's workers.
fn cpu_time(pid: Pid) -> Duration {
    let mut clock = 0;
    // SAFETY: it writes to `clock`, which outlives the call, and to nothing else.
    let error = unsafe { libc::clock_getcpuclockid(pid.as_raw_nonzero().get(), &mut clock) };
    assert_eq!(error, 0, "process {pid:?} has ended");
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it writes to `time`, which outlives the call, and to nothing else.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(result, 0, "process {pid:?} has ended");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Connects as soon as the server listens.
fn connect(socket: &Path, load: &Load, waiting: Waiting) -> (Blkio, Vec<Driver>) {
    let start = Instant::now();
    let mut blkio = loop {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").expect("libblkio's driver");
        blkio
            .set_str("path", socket.to_str().expect("a path of UTF-8"))
            .expect("a path");
        match blkio.connect() {
            Ok(()) => break blkio,
            Err(error) => {
                let log = std::fs::read_to_string(socket.with_file_name("log")).unwrap_or_default();
                assert!(
                    start.elapsed() < DEADLINE,
                    "{}: {error:?}; {log}",
                    socket.display()
                );
                thread::sleep(Duration::from_millis(2));
            }
        }
    };
    let capacity = blkio.get_u64("capacity").expect("a capacity");
    let (queues, other) = match waiting {
        Waiting::Sleep => ("num-queues", "num-poll-queues"),
        Waiting::Poll => ("num-poll-queues", "num-queues"),
    };
    blkio
        .set_i32(queues, load.queues.into())
        .expect("the server's queues");
    blkio.set_i32(other, 0).expect("no queues of the other kind");
    // A request takes three descriptors.
    let queue_size = (load.depth * 3).next_power_of_two().max(256);
    blkio
        .set_i32("queue-size", queue_size as i32)
        .expect("a queue's size");
    let started = blkio.start().expect("the driver starts");
    let bytes = load.depth * load.block;
    let region = blkio
        .alloc_mem_region(bytes * usize::from(load.queues))
        .expect("memory");
    blkio.map_mem_region(&region).expect("shared memory");
    let memory = OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", region.fd))
        .expect("the memory's file");
    let mut noise = vec![0; region.len];
    let mut random = Random(1);
    noise
        .chunks_exact_mut(8)
        .for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
    memory
        .write_all_at(&noise, region.fd_offset as u64)
        .expect("the memory is filled");

    let share = capacity / load.block as u64 / u64::from(load.queues);
    let drivers = started.queues.into_iter().chain(started.poll_queues).enumerate();
    let driver = |(index, queue)| Driver {
        queue,
        load: *load,
        memory: region.addr + index * bytes,
        first: share * index as u64,
        blocks: share,
        next: 0,
        random: Random::fresh(),
    };
    (blkio, drivers.map(driver).collect())
}

/// What one queue did after the warm-up.
struct Drive {
    operations: u64,
    time: Duration,
    /// In nanoseconds, where there is one request at a time.
    latencies: Vec<u32>,
}

/// One queue, with the part of the disk and of the memory that is its own.
struct Driver {
    queue: Blkioq,
    load: Load,
    memory: usize,
    first: u64,
    blocks: u64,
    /// The next block of a sequential load.
    next: u64,
    random: Random,
}

impl Driver {
    /// Keeps the queue full until the end, and for as long as it takes to complete anything at all.
    fn drive(mut self, start: Instant, end: Instant) -> Drive {
        let depth = self.load.depth;
        let mut latencies = Vec::with_capacity(if depth == 1 { MOST_LATENCIES } else { 0 });
        let mut completions = no_completions(depth);
        let mut operations = 0;
        (0..depth).for_each(|slot| self.submit(slot));
        let mut submitted = Instant::now();
        loop {
            let done = self.complete(&mut completions);
            let now = Instant::now();
            if now >= start {
                operations += done as u64;
                if depth == 1 && latencies.len() < MOST_LATENCIES {
                    latencies.push((now - submitted).as_nanos() as u32);
                }
            }
            if now >= end && operations > 0 {
                self.drain(depth - done, &mut completions);
                return Drive {
                    operations,
                    time: now - start,
                    latencies,
                };
            }
            submitted = now;
            for completion in &completions[..done] {
                self.submit(slot(completion));
            }
        }
    }

    fn write_once(&mut self) {
        let mut completions = no_completions(self.load.depth);
        let mut free: Vec<usize> = (0..self.load.depth).collect();
        for _ in 0..self.blocks {
            if free.is_empty() {
                let done = self.complete(&mut completions);
                free.extend(completions[..done].iter().map(slot));
            }
            self.submit(free.pop().expect("a completed request"));
        }
        self.drain(self.load.depth - free.len(), &mut completions);
    }

    fn drain(&mut self, mut in_flight: usize, completions: &mut [MaybeUninit<Completion>]) {
        while in_flight > 0 {
            in_flight -= self.complete(completions);
        }
    }

    fn submit(&mut self, slot: usize) {
        let block = if self.load.random {
            self.random.below(self.blocks)
        } else {
            self.next = (self.next + 1) % self.blocks;
            self.next
        };
        let Load {
            operation,
            block: len,
            ..
        } = self.load;
        let offset = (self.first + block) * len as u64;
        let buffer = (self.memory + slot * len) as *mut u8;
        match operation {
            Operation::Read => self.queue.read(offset, buffer, len, slot, ReqFlags::empty()),
            Operation::Write => self.queue.write(offset, buffer, len, slot, ReqFlags::empty()),
        }
    }

    /// Tells the server of what was submitted, waits for a completion, and takes all that there are.
    fn complete(&mut self, completions: &mut [MaybeUninit<Completion>]) -> usize {
        let done = self
            .queue
            .do_io(completions, 1, None, None)
            .expect("the queue works");
        for completion in &completions[..done] {
            // SAFETY: libblkio has filled as many elements as it returns, of which this is one.
            let completion = unsafe { completion.assume_init_ref() };
            assert_eq!(completion.ret, 0, "a request failed");
        }
        done
    }
}

/// Room for as many completions as there can be at a time.
fn no_completions(depth: usize) -> Vec<MaybeUninit<Completion>> {
    (0..depth).map(|_| MaybeUninit::uninit()).collect()
}

fn slot(completion: &MaybeUninit<Completion>) -> usize {
    // SAFETY: only those that libblkio has filled come here.
    let completion = unsafe { completion.assume_init_ref() };
    completion.user_data
}

/// xorshift64*: offsets that no cache foresees, and other ones each time, which nobody has just read.
struct Random(u64);

impl Random {
    fn fresh() -> Self {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).expect("the kernel's random numbers");
        Self(u64::from_le_bytes(seed) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}
