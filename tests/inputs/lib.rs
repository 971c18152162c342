//! Input by chance, for tests: a generator of numbers, and a short run of what a fuzz target runs for hours.
//!
//! A fuzz target (`fuzz/`) and a test have the same body, a function that takes any bytes and panics if sealblk does wrong. libFuzzer
//! finds input by what it reaches in the code. [`run`] needs no such build: it takes the seeds of the target, and then seeds that
//! it has changed.

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// A small generator (splitmix64): what a test did can be done again. SEALBLK_TEST_SEED=N makes tests do other things.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed ^ other_seed() << 32)
    }

    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// Cuts `len` bytes into fewer than 110 pieces, some of one byte: where each is, and its length.
    pub fn pieces(&mut self, len: usize) -> Vec<(u64, usize)> {
        let longest = 400.max(len as u64 / 20);
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < len {
            let most = if self.below(3) == 0 { 1 } else { longest };
            let rest = if pieces.len() < 100 {
                1 + self.below(most) as usize
            } else {
                len
            };
            let piece = rest.min(len - at);
            pieces.push((at as u64, piece));
            at += piece;
        }
        pieces
    }

    /// An index into a list of `len`, which is not empty.
    fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
}

fn other_seed() -> u64 {
    std::env::var("SEALBLK_TEST_SEED").map_or(0, |seed| seed.parse().expect("a number"))
}

/// Has `body` take the seeds of the fuzz target `target`, and then seeds that were changed, for `time`. If one of them makes it, or a
/// thread that it has started, panic, or does not end, the input is printed.
///
/// # Panics
/// If `body` does.
pub fn run(target: &str, time: Duration, body: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/seeds")
        .join(target);
    let files = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    let seeds: Vec<_> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    assert!(!seeds.is_empty(), "{}: no seeds", dir.display());

    count_panics_of_threads();
    let watched = watched(target);
    let take = |input: &[u8]| {
        let panics = PANICS_OF_THREADS.load(Ordering::SeqCst);
        watched
            .send(input.to_vec())
            .expect("the watching thread is there");
        let ended = panic::catch_unwind(AssertUnwindSafe(|| body(input)));
        if let Err(panic) = ended {
            tell(target, input);
            panic::resume_unwind(panic);
        }
        if PANICS_OF_THREADS.load(Ordering::SeqCst) != panics {
            tell(target, input);
            panic!("a thread has panicked");
        }
    };
    let start = Instant::now();
    seeds.iter().for_each(|seed| take(seed));
    let mut random = Random::new(0xf022);
    let mut inputs = seeds.len();
    while start.elapsed() < time {
        take(&changed(&seeds, &mut random));
        inputs += 1;
    }
    println!("{target}: {inputs} inputs; SEALBLK_TEST_SEED={}", other_seed());
}

/// How long a body may take over an input on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Ends the process if the next input does not come in time.
fn watched(target: &str) -> Sender<Vec<u8>> {
    let (watched, inputs) = channel::<Vec<u8>>();
    let target = target.to_owned();
    thread::spawn(move || {
        let mut last = Vec::new();
        loop {
            match inputs.recv_timeout(LIMIT) {
                Ok(input) => last = input,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    tell(&target, &last);
                    eprintln!("it has not ended within {LIMIT:?}");
                    std::process::abort();
                }
            }
        }
    });
    watched
}

/// Prints an input, as `xxd -r -p` reads it.
fn tell(target: &str, input: &[u8]) {
    let hexadecimal: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
    eprintln!(
        "the input of {target}, in hexadecimal (for the fuzz target, or as a seed of it): {hexadecimal}"
    );
}

static PANICS_OF_THREADS: AtomicUsize = AtomicUsize::new(0);

/// The library's threads may end by a panic that nothing else tells of. Those of tests have a test's name.
fn count_panics_of_threads() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let is_of_test = |name: &str| name == "main" || name.contains("::");
            if !thread::current().name().is_some_and(is_of_test) {
                PANICS_OF_THREADS.fetch_add(1, Ordering::SeqCst);
            }
            before(info);
        }));
    });
}

/// Numbers at which programs go wrong.
const ODD: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 63,
    u64::MAX,
];

/// The longest input.
const LONGEST: usize = 4096;

/// One of the seeds, changed in a few places.
fn changed(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = seeds[random.index(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        if input.is_empty() {
            input.push(0);
        }
        let at = random.index(input.len());
        let len = (1 + random.index(24)).min(input.len() - at);
        match random.below(9) {
            0 => input[at] ^= 1 << random.below(8),
            1 => input[at] = random.number() as u8,
            2 => input[at] = input[at].wrapping_add(random.below(33) as u8).wrapping_sub(16),
            3 => {
                let odd = ODD[random.index(ODD.len())].to_le_bytes();
                let len = len.min(1 << random.below(4));
                input[at..at + len].copy_from_slice(&odd[..len]);
            }
            4 => drop(input.drain(at..at + len)),
            5 => {
                let part = input[at..at + len].to_vec();
                let to = random.index(input.len());
                input.splice(to..to, part);
            }
            6 => input.insert(at, random.number() as u8),
            7 => input.truncate(at),
            _ => {
                // The end of another seed.
                let other = &seeds[random.index(seeds.len())];
                let from = random.index(other.len().max(1)).min(other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(LONGEST);
    input
}
