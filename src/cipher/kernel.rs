//! What computes XTS: the interface of a kernel, and the table that one is chosen from at run time.

use std::fmt;
use std::str::FromStr;

use super::{Sector, portable};
use crate::keys::arena::{ArenaError, SecretBytes};

/// A run of data units (IEEE 1619), the first under `tweak`, each as many sectors further as it is long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units {
    /// Of the first unit, before its encryption under the tweak key; little-endian in memory.
    pub(super) tweak: u128,
    /// Of one unit, in bytes; a multiple of 16, so that no unit needs ciphertext stealing.
    pub(super) size: usize,
    pub(super) count: usize,
}

impl Units {
    /// The offset (in bytes) and the tweak of each unit. Sector numbers have 64 bits and wrap, as dm-crypt's do.
    pub(super) fn each(self) -> impl Iterator<Item = (usize, [u8; 16])> {
        let high = self.tweak & !u128::from(u64::MAX);
        let step = self.size as u64 / Sector::LEN;
        (0..self.count).map(move |i| {
            let low = (self.tweak as u64).wrapping_add(i as u64 * step);
            (i * self.size, (high | u128::from(low)).to_le_bytes())
        })
    }
}

/// One expanded key, and the code that uses it. Neither keys nor plaintext are left on the stack.
pub(super) trait Kernel: Send + Sync {
    /// Encrypts the units from `source` to `target`.
    ///
    /// # Safety
    /// Both sides are mapped for `units.size * units.count` bytes and do not overlap. The source may change at any
    /// time: it is read once and never borrowed.
    unsafe fn encrypt(&self, units: Units, source: *const u8, target: *mut u8);

    /// Decrypts the units from `source` to `target`.
    ///
    /// # Safety
    /// As for [`Kernel::encrypt`]; here it is the target that others may write to at any time.
    unsafe fn decrypt(&self, units: Units, source: *const u8, target: *mut u8);
}

/// A row of the table.
pub(super) struct Candidate {
    pub(super) name: &'static str,
    pub(super) choice: KernelChoice,
    /// Expands a key of [`super::KEY_LEN`] bytes; round keys go to the key arena.
    pub(super) expand: fn(&SecretBytes) -> Result<Box<dyn Kernel>, ArenaError>,
}

/// The kernels that this machine can run, the fastest first.
pub(super) const KERNELS: &[Candidate] = &[Candidate {
    name: "portable",
    choice: KernelChoice::Portable,
    expand: portable::expand,
}];

/// Which kernel to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelChoice {
    /// The fastest that the machine can run.
    #[default]
    Fastest,
    /// The one that runs everywhere, and that others are compared with.
    Portable,
}

pub(super) fn choose(choice: KernelChoice) -> &'static Candidate {
    KERNELS
        .iter()
        .find(|kernel| kernel.choice == choice)
        .unwrap_or(&KERNELS[0])
}

impl fmt::Display for KernelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fastest => "fastest",
            Self::Portable => "portable",
        })
    }
}

impl FromStr for KernelChoice {
    type Err = UnknownKernel;

    fn from_str(name: &str) -> Result<Self, UnknownKernel> {
        [Self::Fastest, Self::Portable]
            .into_iter()
            .find(|choice| choice.to_string() == name)
            .ok_or_else(|| UnknownKernel(name.to_owned()))
    }
}

/// No kernel has this name.
#[derive(Debug, thiserror::Error)]
#[error("no cipher kernel is called {0:?}; known: fastest, portable")]
pub struct UnknownKernel(String);
