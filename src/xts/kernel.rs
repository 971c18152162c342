//! The interface of an XTS kernel, and what each call of it takes.

use std::fmt;

use super::Sector;
#[cfg(target_arch = "x86_64")]
use super::x86::scratch;
use sealblk_secmem::arena::{ArenaError, SecretBox};

/// A run of data units (IEEE 1619), the first under `tweak`, each as many sectors further as it is long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units {
    /// Of the first unit, before its encryption under the tweak key; little-endian in memory.
    pub(super) tweak: u128,
    /// Of one unit, in bytes: 512 or 4096, so that none needs ciphertext stealing.
    pub(super) size: usize,
    pub(super) count: usize,
}

/// The number in a tweak.
#[expect(clippy::cast_possible_truncation, reason = "the other half is kept apart")]
fn low_half(tweak: u128) -> u64 {
    tweak as u64
}

impl Units {
    /// The offset (in bytes) and the tweak of each unit. Sector numbers have 64 bits and wrap, as dm-crypt's do.
    pub(super) fn each(self) -> impl Iterator<Item = (usize, [u8; 16])> {
        let high = self.tweak & !u128::from(u64::MAX);
        let step = self.size as u64 / Sector::LEN;
        (0..self.count).map(move |i| {
            let low = low_half(self.tweak).wrapping_add(i as u64 * step);
            (i * self.size, (high | u128::from(low)).to_le_bytes())
        })
    }

    /// Takes the first units off, at most `count` of them.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn take_first(&mut self, count: usize) -> Self {
        let first = Self {
            count: self.count.min(count),
            ..*self
        };
        let high = self.tweak & !u128::from(u64::MAX);
        let step = first.count as u64 * (self.size as u64 / Sector::LEN);
        self.tweak = high | u128::from(low_half(self.tweak).wrapping_add(step));
        self.count -= first.count;
        first
    }
}

/// Who reads ciphertext next, which tells where it had better be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// A device, out of memory: what is written goes past the cache, and does not fetch lines that it overwrites.
    Device,
    /// A processor: the cache is the place.
    Processor,
}

/// Where a kernel keeps tweaks while it runs: each thread that encrypts has one. A round key follows from them, so it is
/// in the key arena.
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "only kernels of x86-64 use it")
)]
pub struct Workspace(pub(super) SecretBox<Inside>);

#[cfg(target_arch = "x86_64")]
type Inside = scratch::Scratch;
#[cfg(not(target_arch = "x86_64"))]
type Inside = ();

impl Workspace {
    /// One that is wiped when dropped.
    ///
    /// # Errors
    /// [`ArenaError`], if the arena is full or the kernel gives no more memory to it.
    pub fn new() -> Result<Self, ArenaError> {
        SecretBox::new(Inside::default).map(Self)
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Workspace")
    }
}

/// One expanded key, and the code that uses it. Neither keys nor plaintext are left on the stack.
pub(super) trait Kernel: Send + Sync {
    /// Encrypts the units from `source` to `target`, where `reader` will look for them.
    ///
    /// # Safety
    /// Both sides are mapped for `units.size * units.count` bytes and do not overlap. The source may change at any
    /// time: it is read once and never borrowed.
    unsafe fn encrypt(
        &self,
        units: Units,
        source: *const u8,
        target: *mut u8,
        reader: Reader,
        workspace: &mut Workspace,
    );

    /// Decrypts the units from `source` to `target`.
    ///
    /// # Safety
    /// As for [`Kernel::encrypt`]; here it is the target that others may write to at any time.
    unsafe fn decrypt(&self, units: Units, source: *const u8, target: *mut u8, workspace: &mut Workspace);
}
