//! The cipher's kernels, with data in the cache and without any input or output: beside the AES rounds alone, AWS-LC and
//! `xts-mode`.
//!
//! `cargo bench --bench cipher`. Each workload goes on for a while over buffers of its own, a call for each request.
//! "Rounds alone" is the ceiling of a kernel: AES-256's fourteen rounds in vectors of its width and nothing else, no
//! tweak, no load and no store, with as many blocks in flight as is fastest. It is the best of 6, 8, 10 and 12.
//! Both sides are aligned to a page, as guest memory and the pool's buffers are. A round is cut in ten, and the fastest
//! tenth counts, for all contenders alike: whatever else the machine does only ever slows a loop that waits for nothing.
//! AWS-LC is called as its users have to: `EVP_CipherInit_ex` with the tweak, and then `EVP_Cipher`, for each sector.
#![allow(unsafe_code)] // Assembly for the ceiling, and AWS-LC's interface.

mod report;

use std::hint::black_box;
use std::ptr;
use std::time::{Duration, Instant};

use aes::Aes256;
use aes::cipher::KeyInit;
use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_Cipher, EVP_CipherInit_ex, EVP_aes_256_xts,
};
use clap::Parser;
use report::{Better, Conditions, Contender, Goal, Metric, Options, Report, Role};
use sealblk::cipher::{KEY_LEN, KernelChoice, Reader, Sector, SectorCipher, SectorSize, Workspace};
use sealblk_secmem::arena::SecretBytes;
use vm_memory::VolatileSlice;
use xts_mode::{Xts128, get_tweak_default};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    report: Options,
}

const THROUGHPUT: Metric = Metric {
    name: "throughput",
    unit: "GB/s",
    better: Better::More,
};
const TIME: Metric = Metric {
    name: "one call",
    unit: "ns",
    better: Better::Less,
};

/// A kernel, its ceiling, and what it has to reach of that at 512-byte and at 4096-byte sectors.
struct Kernel {
    choice: KernelChoice,
    contender: Contender,
    ceiling: Option<Ceiling>,
}

/// Who is measured, how, and which share of it has to be reached.
type Ceiling = (Contender, fn(bool, Duration) -> f64, [f64; 2]);

const KERNELS: [Kernel; 4] = [
    Kernel {
        choice: KernelChoice::Avx512,
        contender: AVX512,
        ceiling: Some((other("rounds alone, 512-bit"), ceiling_avx512, [0.80, 0.88])),
    },
    Kernel {
        choice: KernelChoice::Avx2,
        contender: variant("avx2"),
        ceiling: Some((other("rounds alone, 256-bit"), ceiling_avx2, [0.85, 0.85])),
    },
    Kernel {
        choice: KernelChoice::AesNi,
        contender: variant("aes-ni"),
        ceiling: Some((other("rounds alone, 128-bit"), ceiling_aes_ni, [0.85, 0.85])),
    },
    Kernel {
        choice: KernelChoice::Portable,
        contender: variant("portable"),
        ceiling: None,
    },
];

const AVX512: Contender = Contender {
    name: "avx512",
    role: Role::Subject,
};
const AWS_LC: Contender = other("AWS-LC");
const XTS_MODE: Contender = other("xts-mode");

const fn variant(name: &'static str) -> Contender {
    Contender {
        name,
        role: Role::Variant,
    }
}

const fn other(name: &'static str) -> Contender {
    Contender {
        name,
        role: Role::Other,
    }
}

/// The rounds alone, in vectors of one width, with so many blocks in flight.
macro_rules! rounds {
    ($aes:literal, $r:literal, $blocks:literal) => {
        |turns: u64| {
            // SAFETY: it changes nothing but registers, and says which. What is in them does not matter.
            unsafe {
                std::arch::asm!(
                    "2:",
                    ".irp round,1,2,3,4,5,6,7,8,9,10,11,12,13,14",
                    concat!(".irp i,", $blocks),
                    concat!($aes, " ", $r, "\\i, ", $r, "\\i, ", $r, "15"),
                    ".endr",
                    ".endr",
                    "dec {turns}",
                    "jnz 2b",
                    turns = inout(reg) turns => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    options(nomem, nostack),
                )
            }
        }
    };
}

/// The fastest count of blocks in flight, for one width and both directions: GB/s.
macro_rules! ceiling {
    ($name:ident, $bytes:literal, $r:literal) => {
        fn $name(encrypt: bool, time: Duration) -> f64 {
            let candidates: [(u64, [fn(u64); 2]); 4] = [
                (
                    6,
                    [
                        rounds!("vaesdec", $r, "0,1,2,3,4,5"),
                        rounds!("vaesenc", $r, "0,1,2,3,4,5"),
                    ],
                ),
                (
                    8,
                    [
                        rounds!("vaesdec", $r, "0,1,2,3,4,5,6,7"),
                        rounds!("vaesenc", $r, "0,1,2,3,4,5,6,7"),
                    ],
                ),
                (
                    10,
                    [
                        rounds!("vaesdec", $r, "0,1,2,3,4,5,6,7,8,9"),
                        rounds!("vaesenc", $r, "0,1,2,3,4,5,6,7,8,9"),
                    ],
                ),
                (
                    12,
                    [
                        rounds!("vaesdec", $r, "0,1,2,3,4,5,6,7,8,9,10,11"),
                        rounds!("vaesenc", $r, "0,1,2,3,4,5,6,7,8,9,10,11"),
                    ],
                ),
            ];
            candidates
                .into_iter()
                .map(|(blocks, rounds)| {
                    let turns = 200;
                    let per_call = run(time / 4, || rounds[usize::from(encrypt)](turns));
                    (turns * blocks * $bytes) as f64 / per_call
                })
                .fold(0.0, f64::max)
        }
    };
}

ceiling!(ceiling_avx512, 64, "zmm");
ceiling!(ceiling_avx2, 32, "ymm");
ceiling!(ceiling_aes_ni, 16, "xmm");

/// Calls `work` for about so long; nanoseconds for one call, in the fastest tenth of that time.
fn run(time: Duration, mut work: impl FnMut()) -> f64 {
    let mut timed = |calls: u32| {
        let start = Instant::now();
        for _ in 0..calls {
            work();
        }
        start.elapsed()
    };
    let mut calls = 1u32;
    loop {
        let took = timed(calls);
        if took >= time / PARTS {
            break;
        }
        let aim =
            1.1 * (time / PARTS).as_nanos() as f64 / (took.as_nanos() as f64 / f64::from(calls)).max(1.0);
        calls = (aim as u32).max(calls + 1);
    }
    let fastest = (0..PARTS).map(|_| timed(calls)).min().expect("a round has parts");
    fastest.as_nanos() as f64 / f64::from(calls)
}

/// Of a round.
const PARTS: u32 = 10;

/// A buffer in pages of its own.
struct Pages(Vec<u8>);

impl Pages {
    const SIZE: usize = 4096;

    fn new(len: usize, value: u8) -> Self {
        Self(vec![value; len + Self::SIZE])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(Self::SIZE);
        let len = self.0.len() - Self::SIZE;
        &mut self.0[start..][..len]
    }
}

const SIZES: [SectorSize; 2] = [SectorSize::B512, SectorSize::B4096];

/// A workload's name: the direction, the sector size, and how much a call encrypts.
fn workload(encrypt: bool, size: SectorSize, len: usize) -> String {
    let direction = if encrypt { "encrypt" } else { "decrypt" };
    let len = match len {
        512 => "512 B".to_owned(),
        _ if len < 1 << 20 => format!("{} KiB", len >> 10),
        _ => format!("{} MiB", len >> 20),
    };
    format!("{direction}, {}-byte sectors, {len} a call", size.bytes())
}

/// The request that stands for data in the cache: both sides together take 32 KiB, a core's first level.
const IN_CACHE: usize = 16 << 10;

fn main() {
    let arguments = Arguments::parse();
    let time = Duration::from_millis(if arguments.report.quick { 2 } else { 50 });
    let mut report = Report::new(
        "cipher",
        "XTS-AES-256, one core, without storage",
        Conditions::new(),
    );
    let key: [u8; KEY_LEN] = std::array::from_fn(|i| (i * 7 + 3) as u8);
    let ciphers: Vec<(&Kernel, [SectorCipher; 2])> = KERNELS
        .iter()
        .filter_map(|kernel| {
            let cipher = |size| {
                let key = SecretBytes::take(&mut key.clone()).expect("there is memory for a key");
                SectorCipher::new(&key, size, kernel.choice)
            };
            match (cipher(SectorSize::B512), cipher(SectorSize::B4096)) {
                (Ok(small), Ok(large)) => Some((kernel, [small, large])),
                (Err(refused), _) | (_, Err(refused)) => {
                    eprintln!("skipped: {refused}");
                    None
                }
            }
        })
        .collect();
    let mut workspace = Workspace::new().expect("there is memory for tweaks");
    let aws_lc = [AwsLc::new(&key, false), AwsLc::new(&key, true)];
    let half = |half: &[u8]| Aes256::new_from_slice(half).expect("half of an XTS key");
    let xts_mode = Xts128::new(half(&key[..32]), half(&key[32..]));

    for _ in 0..arguments.report.rounds() {
        for encrypt in [true, false] {
            for (i, size) in SIZES.into_iter().enumerate() {
                for len in [512, 4 << 10, IN_CACHE, 128 << 10, 64 << 20] {
                    if len < size.bytes() {
                        continue;
                    }
                    let name = workload(encrypt, size, len);
                    let mut record = |contender, ns: f64| {
                        report.record(&name, contender, THROUGHPUT, len as f64 / ns);
                        if len <= 128 << 10 {
                            report.record(&name, contender, TIME, ns);
                        }
                    };
                    let (mut plain, mut sealed) = (Pages::new(len, 0x5a), Pages::new(len, 0xa5));
                    let (plain, sealed) = (plain.bytes(), sealed.bytes());
                    for (kernel, ciphers) in &ciphers {
                        let pieces = [VolatileSlice::from(&mut *plain)];
                        let ns = run(time, || match encrypt {
                            true => ciphers[i].encrypt(
                                Sector(7),
                                &pieces,
                                black_box(&mut *sealed),
                                Reader::Processor,
                                &mut workspace,
                            ),
                            false => {
                                ciphers[i].decrypt(Sector(7), black_box(&*sealed), &pieces, &mut workspace)
                            }
                        });
                        record(kernel.contender, ns);
                    }
                    let (source, target) = if encrypt {
                        (&*plain, sealed)
                    } else {
                        (&*sealed, plain)
                    };
                    let ns = run(time, || {
                        aws_lc[usize::from(encrypt)].sectors(size, source, black_box(&mut *target))
                    });
                    record(AWS_LC, ns);
                    if len <= IN_CACHE {
                        let ns = run(time, || {
                            target.copy_from_slice(source);
                            let tweak = |n| get_tweak_default(7 + n * (size.bytes() as u128 / 512));
                            match encrypt {
                                true => {
                                    xts_mode.encrypt_area(black_box(&mut *target), size.bytes(), 0, tweak)
                                }
                                false => {
                                    xts_mode.decrypt_area(black_box(&mut *target), size.bytes(), 0, tweak)
                                }
                            }
                        });
                        record(XTS_MODE, ns);
                    }
                    if len == IN_CACHE {
                        for (kernel, _) in &ciphers {
                            if let Some((contender, ceiling, _)) = kernel.ceiling {
                                report.record(&name, contender, THROUGHPUT, ceiling(encrypt, time));
                            }
                        }
                    }
                }
            }
        }
    }

    let mut shares = Vec::new();
    for encrypt in [true, false] {
        for (i, size) in SIZES.into_iter().enumerate() {
            let name = workload(encrypt, size, IN_CACHE);
            for (kernel, _) in &ciphers {
                if let Some((ceiling, _, share)) = kernel.ceiling {
                    let goal = Goal::AtLeast(share[i]);
                    let share = report.compare(&name, THROUGHPUT, kernel.contender, ceiling, goal);
                    if kernel.choice == KernelChoice::Avx512 {
                        shares.extend(share);
                    }
                }
            }
            let goal = Goal::AtLeast([2.6, 1.3][i]);
            report.compare(&name, THROUGHPUT, AVX512, AWS_LC, goal);
            report.plot(&name, &[THROUGHPUT]);
        }
    }
    if let (Some(least), Some(most)) = (
        shares.iter().copied().reduce(f64::min),
        shares.iter().copied().reduce(f64::max),
    ) {
        report.finding(format!(
            "The AVX-512 kernel reaches {least:.2} to {most:.2} of what the AES rounds alone allow"
        ));
    }
    report.write(&arguments.report);
}

/// A context of AWS-LC that has the key, for one direction.
struct AwsLc(*mut EVP_CIPHER_CTX);

impl AwsLc {
    fn new(key: &[u8; KEY_LEN], encrypt: bool) -> Self {
        // SAFETY: it takes nothing.
        let context = unsafe { EVP_CIPHER_CTX_new() };
        assert!(!context.is_null(), "AWS-LC has no memory");
        // SAFETY: it takes nothing.
        let cipher = unsafe { EVP_aes_256_xts() };
        // SAFETY: the context is new, and the key as long as this cipher's.
        let done = unsafe {
            EVP_CipherInit_ex(
                context,
                cipher,
                ptr::null_mut(),
                key.as_ptr(),
                ptr::null(),
                i32::from(encrypt),
            )
        };
        assert_eq!(done, 1);
        Self(context)
    }

    fn sectors(&self, size: SectorSize, source: &[u8], target: &mut [u8]) {
        let sectors = source.chunks(size.bytes()).zip(target.chunks_mut(size.bytes()));
        for (i, (source, target)) in sectors.enumerate() {
            let tweak = u128::to_le_bytes(7 + (i * size.bytes() / 512) as u128);
            // SAFETY: the context is initialised, and the tweak 16 bytes long; -1 leaves the direction as it is.
            let done = unsafe {
                EVP_CipherInit_ex(
                    self.0,
                    ptr::null(),
                    ptr::null_mut(),
                    ptr::null(),
                    tweak.as_ptr(),
                    -1,
                )
            };
            assert_eq!(done, 1);
            // SAFETY: both sides are of this length.
            let done = unsafe { EVP_Cipher(self.0, target.as_mut_ptr(), source.as_ptr(), source.len()) };
            assert_eq!(done, 1);
        }
    }
}

impl Drop for AwsLc {
    fn drop(&mut self) {
        // SAFETY: `new` made it, and nothing else has it.
        unsafe { EVP_CIPHER_CTX_free(self.0) };
    }
}
