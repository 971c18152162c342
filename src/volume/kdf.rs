//! Key derivation: what makes a passphrase the key of a keyslot's area (LUKS2 1.1, "Keyslots Object").
//!
//! The costs stand in a header that anybody may have written. cryptsetup writes at most 4 GiB and 4 lanes for argon2;
//! the caps on time here are far above what it ever picks, and keep a hostile header from hanging an attach.

use std::fs;
use std::thread;

use argon2::{Algorithm, Block, Params, Version};
use serde::Serialize;
use zeroize::Zeroize;

use super::hash::Hash;
use super::metadata::{self, Base64, Kdf, Other, Pbkdf2};
use crate::keys::arena::{ArenaError, SecretBytes, on_wiped_stack};

/// Derives the key of a keyslot's area from `passphrase` into `key`.
pub(super) fn derive(kdf: &Kdf, passphrase: &[u8], key: &mut SecretBytes) -> Result<(), KdfError> {
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
pub(super) fn pbkdf2(
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
    if let Some(available) = available_memory_kib()
        && u64::from(cost.memory_kib) > available
    {
        return Err(KdfError::Memory {
            needed_kib: cost.memory_kib,
            available_kib: Some(available),
        });
    }
    let mut memory = Vec::<Block>::new();
    memory
        .try_reserve_exact(params.block_count())
        .map_err(|_| KdfError::Memory {
            needed_kib: cost.memory_kib,
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
    /// cryptsetup's ceiling of 1 GiB and 4 lanes, less where this host has less, and its least number of passes:
    /// above both of what RFC 9106 §4 recommends. Nothing is measured, so that a busy host does not make a weak key.
    pub fn for_this_host() -> Self {
        let half = available_memory_kib().map_or(MEMORY_CEILING_KIB, |available| available / 2);
        let lanes = thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4));
        Self {
            time: 4,
            memory_kib: half.clamp(MEMORY_FLOOR_KIB, MEMORY_CEILING_KIB) as u32,
            lanes: lanes as u32,
        }
    }

    /// argon2id at this cost, with a fresh salt.
    pub(super) fn to_kdf(self) -> Result<Kdf, KdfError> {
        self.params()?;
        Ok(Kdf::Argon2id(metadata::Argon2 {
            time: self.time,
            memory: self.memory_kib,
            cpus: self.lanes,
            salt: fresh_salt()?,
            other: Other::new(),
        }))
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
pub(super) fn cheap() -> Result<Kdf, KdfError> {
    Ok(Kdf::Pbkdf2(Pbkdf2 {
        hash: Hash::Sha512.name().to_owned(),
        iterations: MIN_ITERATIONS,
        salt: fresh_salt()?,
        other: Other::new(),
    }))
}

/// 32 random bytes, as LUKS2 has for every salt but those of the binary headers.
pub(super) fn fresh_salt() -> Result<Base64, KdfError> {
    let mut salt = vec![0; SALT_LEN];
    getrandom::fill(&mut salt).map_err(KdfError::Random)?;
    Ok(Base64(salt))
}

fn available_memory_kib() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// Why no key can be derived.
#[derive(Debug, thiserror::Error)]
pub enum KdfError {
    #[error("its key derivation {name:?} is not known here")]
    Unknown { name: String },
    #[error("its hash {name:?} is not known here")]
    Hash { name: String },
    #[error("its PBKDF2 iterations ({iterations}) are not within 1 to {MAX_ITERATIONS}")]
    Iterations { iterations: u32 },
    #[error(
        "its argon2 cost (time {}, memory {} KiB, {} lanes) is out of bounds", cost.time, cost.memory_kib, cost.lanes
    )]
    Argon2Cost { cost: Argon2Cost },
    #[error(
        "its argon2 takes {needed_kib} KiB of memory{}; free some, or open the volume on a larger host",
        available_kib.map(|kib| format!(", and {kib} KiB are available")).unwrap_or_default()
    )]
    Memory {
        needed_kib: u32,
        available_kib: Option<u64>,
    },
    #[error("the kernel's random source failed")]
    Random(#[source] getrandom::Error),
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

pub(super) const SALT_LEN: usize = 32;
pub(super) const MIN_ITERATIONS: u32 = 1000;

/// A minute or two of SHA-256.
const MAX_ITERATIONS: u32 = 1 << 28;

/// cryptsetup's own limits.
const MAX_LANES: u32 = 4;
const MAX_MEMORY_KIB: u32 = 4 << 20;

/// Passes times memory: a minute or two, 64 GiB of blocks.
const MAX_WORK_KIB: u64 = 64 << 20;

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

    #[test]
    fn the_least_costs_that_cryptsetup_writes_are_accepted() {
        argon2_with(1, 8, 1).unwrap();
        argon2_with(4, 32, 4).unwrap();
    }

    #[test]
    fn the_cost_for_this_host_is_within_the_caps() {
        let cost = Argon2Cost::for_this_host();
        assert!(cost.params().is_ok(), "{cost:?}");
        assert!(cost.time >= 4 && cost.memory_kib >= 64 << 10);
    }
}
