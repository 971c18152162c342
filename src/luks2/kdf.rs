//! Key derivation: from a passphrase to the key of a keyslot's area (LUKS2 1.1, "Keyslots Object").
//!
//! The costs come from a header, which is untrusted. cryptsetup writes at most 4 GiB and 4 lanes for argon2;
//! the limits on time here are far above its values, and prevent a hostile header from hanging an attach.

use std::thread;

use argon2::{Algorithm, Block, Params, Version};
use serde::Serialize;
use zeroize::Zeroize;

use crate::hash::Hash;
use crate::memory::Memory;
use crate::metadata::{self, Base64, Kdf, Other, Pbkdf2};
use sealblk_secmem::arena::{ArenaError, SecretBytes, on_wiped_stack};

/// What one attempt to open a volume may cost in all, over its keyslots: every single derivation is capped, but a
/// header can list many. Its unit is one block of argon2 (1 KiB), about a microsecond.
#[derive(Debug)]
pub struct Budget(u64);

impl Default for Budget {
    fn default() -> Self {
        Self(MAX_WORK)
    }
}

impl Budget {
    /// Takes what it costs to try a keyslot with this KDF, and a digest, before any of it is done.
    pub(crate) fn spend(&mut self, kdf: &Kdf, digest_iterations: u32) -> Result<(), KdfError> {
        if digest_iterations > MAX_DIGEST_ITERATIONS {
            return Err(KdfError::DigestIterations {
                iterations: digest_iterations,
            });
        }
        let work = match kdf {
            Kdf::Pbkdf2(kdf) => u64::from(kdf.iterations) / ITERATIONS_PER_BLOCK,
            Kdf::Argon2i(kdf) | Kdf::Argon2id(kdf) => u64::from(kdf.time).saturating_mul(kdf.memory.into()),
            Kdf::Other(_) => 0,
        };
        let work = work.saturating_add(u64::from(digest_iterations) / ITERATIONS_PER_BLOCK);
        // What a single cap refuses is refused there, and costs nothing.
        if work <= MAX_WORK_KIB + u64::from(MAX_DIGEST_ITERATIONS) {
            self.0 = self.0.checked_sub(work).ok_or(KdfError::Budget)?;
        }
        Ok(())
    }
}

/// Derives the key of a keyslot's area from `passphrase` into `key`.
pub(crate) fn derive(kdf: &Kdf, passphrase: &[u8], key: &mut SecretBytes) -> Result<(), KdfError> {
    match kdf {
        Kdf::Pbkdf2(kdf) => {
            let hash = Hash::by_name(&kdf.hash).ok_or_else(|| KdfError::Hash {
                name: kdf.hash.clone(),
            })?;
            pbkdf2(hash, passphrase, &kdf.salt.0, kdf.iterations, key)
        }
        Kdf::Argon2i(kdf) => argon2(Algorithm::Argon2i, kdf, passphrase, key),
        Kdf::Argon2id(kdf) => argon2(Algorithm::Argon2id, kdf, passphrase, key),
        Kdf::Other(kdf) => Err(KdfError::Unknown {
            name: kdf.kind.clone(),
        }),
    }
}

/// PBKDF2 at a cost that a header named.
pub(crate) fn pbkdf2(
    hash: Hash,
    secret: &[u8],
    salt: &[u8],
    iterations: u32,
    out: &mut [u8],
) -> Result<(), KdfError> {
    if iterations == 0 || iterations > MAX_ITERATIONS {
        return Err(KdfError::Iterations { iterations });
    }
    on_wiped_stack(|| hash.pbkdf2(secret, salt, iterations, out));
    Ok(())
}

fn argon2(
    algorithm: Algorithm,
    kdf: &metadata::Argon2,
    passphrase: &[u8],
    key: &mut SecretBytes,
) -> Result<(), KdfError> {
    let cost = Argon2Cost {
        time: kdf.time,
        memory_kib: kdf.memory,
        lanes: kdf.cpus,
    };
    let params = cost.params()?;
    if let Some(memory) = Memory::of_this_process()
        && cost.needed_kib() > memory.available
    {
        return Err(KdfError::Memory {
            needed_kib: cost.needed_kib(),
            available_kib: Some(memory.available),
        });
    }
    let mut memory = Vec::<Block>::new();
    memory
        .try_reserve_exact(params.block_count())
        .map_err(|_| KdfError::Memory {
            needed_kib: cost.needed_kib(),
            available_kib: None,
        })?;
    memory.resize(params.block_count(), Block::new());
    let argon2 = argon2::Argon2::new(algorithm, Version::V0x13, params);
    let derived = on_wiped_stack(|| {
        argon2.hash_password_into_with_memory(passphrase, &kdf.salt.0, key, &mut memory[..])
    });
    memory.zeroize();
    derived.map_err(|_| KdfError::Argon2Cost { cost })
}

/// What an argon2 keyslot costs to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Argon2Cost {
    /// Passes over the memory.
    pub time: u32,
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Lanes: how many processors an attacker, too, can put to it.
    pub lanes: u32,
}

impl Argon2Cost {
    /// 1 GiB, but no more than half of the memory that this host has, or the control group of this process, in 4 passes, and as many lanes as it has
    /// processors, up to 4: cryptsetup's ceilings, and its least number of passes. RFC 9106 §4 names 2 GiB in one pass
    /// first, and 64 MiB in three where memory is short; this lies between. What the host is busy with has no say in
    /// it.
    pub fn for_this_host() -> Self {
        let half = Memory::of_this_process().map_or(MEMORY_CEILING_KIB, |memory| memory.total / 2);
        let lanes = thread::available_parallelism()
            .map_or(1, |cpus| u32::try_from(cpus.get()).map_or(4, |cpus| cpus.min(4)));
        Self {
            time: 4,
            memory_kib: half.clamp(MEMORY_FLOOR_KIB, MEMORY_CEILING_KIB) as u32,
            lanes,
        }
    }

    /// argon2id at this cost, with a fresh salt.
    pub(crate) fn to_kdf(self) -> Result<Kdf, KdfError> {
        self.params()?;
        Ok(Kdf::Argon2id(metadata::Argon2 {
            time: self.time,
            memory: self.memory_kib,
            cpus: self.lanes,
            salt: fresh_salt()?,
            other: Other::new(),
        }))
    }

    /// What the process grows by, in KiB: the blocks, the page tables that map them (8 bytes for each 4 KiB), and what the
    /// process touches besides.
    fn needed_kib(self) -> u64 {
        let blocks = u64::from(self.memory_kib);
        blocks + blocks.div_ceil(512) + REST_KIB
    }

    fn params(self) -> Result<Params, KdfError> {
        let work = u64::from(self.time) * u64::from(self.memory_kib);
        if self.lanes > MAX_LANES || self.memory_kib > MAX_MEMORY_KIB || work > MAX_WORK_KIB {
            return Err(KdfError::Argon2Cost { cost: self });
        }
        Params::new(self.memory_kib, self.time, self.lanes, None)
            .map_err(|_| KdfError::Argon2Cost { cost: self })
    }
}

/// PBKDF2 for what needs no stretching, because it is random to begin with: 1000 iterations, the least that
/// cryptsetup accepts.
pub(crate) fn cheap() -> Result<Kdf, KdfError> {
    Ok(Kdf::Pbkdf2(Pbkdf2 {
        hash: Hash::Sha512.name().to_owned(),
        iterations: MIN_ITERATIONS,
        salt: fresh_salt()?,
        other: Other::new(),
    }))
}

/// 32 random bytes, as LUKS2 has for every salt but those of the binary headers.
pub(crate) fn fresh_salt() -> Result<Base64, KdfError> {
    let mut salt = vec![0; SALT_LEN];
    getrandom::fill(&mut salt).map_err(KdfError::Random)?;
    Ok(Base64(salt))
}

/// Why no key can be derived.
#[derive(Debug, thiserror::Error)]
pub enum KdfError {
    #[error("its key derivation {name:?} is unknown")]
    Unknown { name: String },
    #[error("its hash {name:?} is unknown")]
    Hash { name: String },
    #[error("its PBKDF2 iterations ({iterations}) are not in the range 1 to {MAX_ITERATIONS}")]
    Iterations { iterations: u32 },
    #[error(
        "the digest of its key has {iterations} PBKDF2 iterations, but no program writes more than {MAX_DIGEST_ITERATIONS}; the \
         header was altered: restore a backup of it with `cryptsetup luksHeaderRestore`"
    )]
    DigestIterations { iterations: u32 },
    #[error(
        "the keyslots that were tried before used up the time limit; open it with `cryptsetup open \
         --key-slot`, or remove unneeded keyslots"
    )]
    Budget,
    #[error(
        "its argon2 cost (time {}, memory {} KiB, {} lanes) is out of range", cost.time, cost.memory_kib, cost.lanes
    )]
    Argon2Cost { cost: Argon2Cost },
    #[error(
        "its argon2 needs {needed_kib} KiB of memory{}; free memory, raise the limit of this control group if it \
         has one, or open the volume on a larger host",
        available_kib.map(|kib| format!(", but {kib} KiB are available")).unwrap_or_default()
    )]
    Memory {
        needed_kib: u64,
        available_kib: Option<u64>,
    },
    #[error("the kernel's random source failed")]
    Random(#[source] getrandom::Error),
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

pub(crate) const SALT_LEN: usize = 32;
pub(crate) const MIN_ITERATIONS: u32 = 1000;

/// A minute or two of SHA-256.
const MAX_ITERATIONS: u32 = 1 << 28;

/// cryptsetup's own limits.
const MAX_LANES: u32 = 4;
const MAX_MEMORY_KIB: u32 = 4 << 20;

/// Passes times memory: a minute or two, 64 GiB of blocks.
const MAX_WORK_KIB: u64 = 64 << 20;

/// What 32 keyslots cost that cryptsetup has made, each to take two seconds on the fastest of machines; on a slow one,
/// ten minutes.
const MAX_WORK: u64 = 512 << 20;

/// Of PBKDF2 with SHA-256, in the time of one block of argon2.
const ITERATIONS_PER_BLOCK: u64 = 4;

/// cryptsetup measures what takes it an eighth of a second, whatever its `--iter-time`: about a million on the fastest
/// of machines.
const MAX_DIGEST_ITERATIONS: u32 = 1 << 24;

/// What a derivation takes beside its blocks and their page tables: stacks, and what each processor holds of a control group's
/// memory in advance. Less than 1 MiB was seen.
const REST_KIB: u64 = 2 << 10;

const MEMORY_CEILING_KIB: u64 = 1 << 20;
const MEMORY_FLOOR_KIB: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn argon2_with(time: u32, memory: u32, cpus: u32) -> Result<(), KdfError> {
        let kdf = Kdf::Argon2id(metadata::Argon2 {
            time,
            memory,
            cpus,
            salt: Base64(vec![1; SALT_LEN]),
            other: Other::new(),
        });
        derive(&kdf, b"passphrase", &mut SecretBytes::zeroed(64).unwrap())
    }

    #[test]
    fn hostile_costs_are_refused_before_any_work() {
        for (time, memory, lanes) in [
            (1, 32, 5),
            (1, 32, 0),
            (0, 32, 1),
            (1, 0, 1),
            (1, MAX_MEMORY_KIB + 1, 1),
            (u32::MAX, 32, 1),
            (17, MAX_MEMORY_KIB, 4),
            (u32::MAX, u32::MAX, u32::MAX),
        ] {
            let error = argon2_with(time, memory, lanes).unwrap_err();
            assert!(
                matches!(error, KdfError::Argon2Cost { .. }),
                "{time} {memory} {lanes}: {error}"
            );
        }
        for iterations in [0, MAX_ITERATIONS + 1, u32::MAX] {
            let error = pbkdf2(Hash::Sha256, b"", b"", iterations, &mut [0; 32]).unwrap_err();
            assert!(matches!(error, KdfError::Iterations { .. }));
        }
    }

    // The blocks alone were counted: in a control group that had room for these and not for their page tables, the kernel ended
    // the process.
    #[test]
    fn page_tables_and_the_rest_of_the_process_need_memory_too() {
        let needed = |memory_kib| {
            Argon2Cost {
                time: 4,
                memory_kib,
                lanes: 4,
            }
            .needed_kib()
                - u64::from(memory_kib)
        };
        assert_eq!(needed(1 << 20), (2 << 10) + REST_KIB);
        assert_eq!(needed(MAX_MEMORY_KIB), (8 << 10) + REST_KIB);
        assert_eq!(needed(8), 1 + REST_KIB);
    }

    #[test]
    fn the_least_costs_that_cryptsetup_writes_are_accepted() {
        argon2_with(1, 8, 1).unwrap();
        argon2_with(4, 32, 4).unwrap();
    }

    #[test]
    fn many_keyslots_cost_no_more_than_a_few() {
        let dear = |time, memory| {
            Kdf::Argon2id(metadata::Argon2 {
                time,
                memory,
                cpus: 4,
                salt: Base64(vec![1; SALT_LEN]),
                other: Other::new(),
            })
        };
        let tried = |kdf: Kdf, digest: u32| {
            let mut budget = Budget::default();
            (0..32).take_while(|_| budget.spend(&kdf, digest).is_ok()).count()
        };
        // Each as dear as one may be.
        assert!(tried(dear(16, MAX_MEMORY_KIB), 1000) <= 8);
        // cryptsetup's default on a machine that does a pass over 1 GiB in an eighth of a second.
        assert_eq!(tried(dear(15, 1 << 20), 1_300_000), 32);
        assert_eq!(tried(dear(1, 8), MAX_DIGEST_ITERATIONS + 1), 0);
    }

    #[test]
    fn the_cost_for_this_host_is_half_its_memory_and_not_what_is_free_of_it() {
        let total = Memory::of_this_process().unwrap().total;
        let memory_kib = Argon2Cost::for_this_host().memory_kib;
        assert_eq!(
            u64::from(memory_kib),
            (total / 2).clamp(MEMORY_FLOOR_KIB, MEMORY_CEILING_KIB)
        );
    }

    #[test]
    fn the_cost_for_this_host_is_within_the_caps() {
        let cost = Argon2Cost::for_this_host();
        assert!(cost.params().is_ok(), "{cost:?}");
        assert!(cost.time >= 4 && cost.memory_kib >= 64 << 10);
    }
}
