//! The memory of keys: never swapped, never dumped, not readable by `/proc/PID/mem`, wiped when it is freed.
//!
//! Every volume key, slot secret, KEK and round key of the process is a [`SecretBytes`] or a [`SecretBox`]. They are
//! cut from one arena, so that many small secrets do not each cost a mapping and a page of `RLIMIT_MEMLOCK`:
//!
//! ```text
//! chunk:  guard page | secret, 64-byte units | secret | free ...... | guard page
//! ```
//!
//! The arena grows by chunks up to [`CAPACITY`] and never shrinks; freed memory is zero before it can be handed out
//! again, so what is handed out is zero. Secrets may be passed to `read(2)`, `write(2)` and `getrandom(2)`; `O_DIRECT`
//! and io_uring's registered buffers cannot reach them, by the kernel's design of `memfd_secret(2)`.
#![allow(unsafe_code)] // Slices and values are made from the arena's raw memory.

mod memory;

use std::fmt;
use std::io;
use std::mem::{align_of, size_of};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;
use std::sync::{LazyLock, Mutex, PoisonError};

use rustix::param::page_size;
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use memory::Source;

/// The most that a process keeps in its arena, in bytes. A `serve` process needs a few KiB; a keyslot's anti-forensic
/// material is 256 KiB for the moment that it is open; a key file has up to 8 MiB, of which a pipe makes some copies.
pub const CAPACITY: usize = 40 << 20;

/// Secrets are cut in units of a cache line, which also aligns whatever a key schedule holds.
const UNIT: usize = 64;

/// A chunk with its guard pages fits twice into the smallest `RLIMIT_MEMLOCK` in use, 64 KiB.
const CHUNK: usize = 24 << 10;

/// Why there is no memory for a secret.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The operator's limit on locked memory is too low.
    #[error(
        "cannot lock {wanted} bytes of memory for keys: RLIMIT_MEMLOCK is {limit} bytes, and what all processes of this user lock or \
         pin counts together; lift it (`LimitMEMLOCK=infinity` in a systemd unit, `ulimit -l unlimited` in a shell, a `memlock` \
         line in /etc/security/limits.conf for the user)"
    )]
    LockLimit {
        /// What was asked of the kernel, in bytes.
        wanted: usize,
        /// The limit in force, in bytes.
        limit: u64,
    },
    /// More secrets at a time than the arena may hold.
    #[error("cannot hold a secret of {wanted} bytes: the key arena's {CAPACITY} bytes are in use")]
    Full {
        /// The size of the secret, in bytes.
        wanted: usize,
    },
    /// The kernel gave no memory for another reason.
    #[error("cannot map memory for keys")]
    Map(#[source] io::Error),
    /// The kernel's random source failed.
    #[error("cannot read the kernel's random source")]
    Random(#[source] getrandom::Error),
}

/// Bytes in the key arena: one owner, wiped when dropped, and never printed.
///
/// There is no `Clone` and no `PartialEq`: a copy is a deliberate act, and a comparison is [`SecretBytes::ct_eq`].
pub struct SecretBytes {
    place: Allocation,
    len: usize,
}

/// Sees to it that secrets of these lengths find room together: the arena, which never shrinks, takes the memory now.
///
/// # Errors
/// [`ArenaError`], if the kernel gives it no more memory.
pub fn reserve(lens: &[usize]) -> Result<(), ArenaError> {
    let places: Result<Vec<_>, _> = lens.iter().map(|len| SecretBytes::zeroed(*len)).collect();
    places.map(drop)
}

impl SecretBytes {
    /// `len` bytes of zeros.
    ///
    /// # Errors
    /// [`ArenaError`], if the arena is full or the kernel gives no more memory to it.
    pub fn zeroed(len: usize) -> Result<Self, ArenaError> {
        Ok(Self {
            place: Allocation::take(len)?,
            len,
        })
    }

    /// `len` bytes from the kernel's random source.
    ///
    /// # Errors
    /// [`ArenaError`], as for [`SecretBytes::zeroed`], and if the random source fails.
    pub fn random(len: usize) -> Result<Self, ArenaError> {
        let mut secret = Self::zeroed(len)?;
        getrandom::fill(&mut secret).map_err(ArenaError::Random)?;
        Ok(secret)
    }

    /// A copy of `bytes`.
    ///
    /// # Errors
    /// [`ArenaError`], as for [`SecretBytes::zeroed`].
    pub fn copy_of(bytes: &[u8]) -> Result<Self, ArenaError> {
        let mut secret = Self::zeroed(bytes.len())?;
        secret.copy_from_slice(bytes);
        Ok(secret)
    }

    /// Moves the bytes of `source` here: it is wiped, also when there is no memory for them.
    ///
    /// # Errors
    /// [`ArenaError`], as for [`SecretBytes::zeroed`].
    pub fn take(source: &mut [u8]) -> Result<Self, ArenaError> {
        let moved = Self::copy_of(source);
        source.zeroize();
        moved
    }

    /// Drops the bytes from `len` on, and wipes them. Longer than the secret is: nothing happens.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            self[len..].zeroize();
            self.len = len;
        }
    }

    /// Whether these are the bytes of `other`, in a time that depends on the lengths alone.
    pub fn ct_eq(&self, other: &[u8]) -> bool {
        self.deref().ct_eq(other).into()
    }
}

impl Deref for SecretBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `place` has at least `len` initialised bytes that this value alone owns, for as long as it lives.
        unsafe { slice::from_raw_parts(self.place.start.as_ptr(), self.len) }
    }
}

impl DerefMut for SecretBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.place.start.as_ptr(), self.len) }
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.len)
    }
}

/// One value in the key arena, such as a key schedule: dropped and then wiped.
pub struct SecretBox<T> {
    /// Holds an initialised `T` at its start.
    place: Allocation,
    value: std::marker::PhantomData<T>,
}

impl<T> SecretBox<T> {
    /// Moves what `make` returns into the arena, and wipes the stack that it was made on.
    ///
    /// # Errors
    /// [`ArenaError`], as for [`SecretBytes::zeroed`]; `make` is not called then.
    pub fn new(make: impl FnOnce() -> T) -> Result<Self, ArenaError> {
        const { assert!(align_of::<T>() <= UNIT, "the arena aligns to a cache line") };
        let place = Allocation::take(size_of::<T>())?;
        let target = place.start.cast::<T>();
        on_wiped_stack(|| {
            // SAFETY: `place` is large enough for a `T`, aligned to `UNIT`, and owned by this function.
            unsafe { target.write(make()) }
        });
        Ok(Self {
            place,
            value: std::marker::PhantomData,
        })
    }
}

impl<T> Deref for SecretBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` wrote a `T` here, which this value alone owns until its `drop`.
        unsafe { self.place.start.cast::<T>().as_ref() }
    }
}

impl<T> DerefMut for SecretBox<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { self.place.start.cast::<T>().as_mut() }
    }
}

impl<T> Drop for SecretBox<T> {
    fn drop(&mut self) {
        // SAFETY: `new` wrote a `T` here; nothing uses it after this, and `place` wipes the bytes next.
        unsafe { self.place.start.cast::<T>().drop_in_place() }
    }
}

// SAFETY: `SecretBox` owns its `T`, as `Box` does.
unsafe impl<T: Send> Send for SecretBox<T> {}
// SAFETY: `SecretBox` gives out `&T` alone to those that share it, as `Box` does.
unsafe impl<T: Sync> Sync for SecretBox<T> {}

impl<T> fmt::Debug for SecretBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBox({} bytes)", size_of::<T>())
    }
}

/// Runs `work` and then overwrites the stack below this frame, where the work spilt what it computed with: values
/// that were moved, and the key schedules and hash states of library code.
pub fn on_wiped_stack<R>(work: impl FnOnce() -> R) -> R {
    /// Deeper than the code that is run this way goes.
    const DEPTH: usize = 16 << 10;

    #[inline(never)]
    fn run<R>(work: impl FnOnce() -> R) -> R {
        work()
    }
    let result = run(work);
    wipe_vector_registers();
    zeroize::zeroize_stack::<DEPTH>();
    result
}

/// Clears the registers that ciphers compute in. Nobody reads what is left in them, but the C library's lazy binding puts
/// them on the stack as they are.
fn wipe_vector_registers() {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512.
            unsafe { wipe_zmm() };
        } else if is_x86_feature_detected!("avx") {
            // SAFETY: the processor has AVX.
            unsafe { std::arch::x86_64::_mm256_zeroall() };
        }
    }
}

/// All 32 of them; `vzeroall` reaches 16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn wipe_zmm() {
    // SAFETY: it changes nothing but registers, and says which.
    unsafe {
        std::arch::asm!(
            "vzeroall",
            "vpxorq zmm16, zmm16, zmm16", "vpxorq zmm17, zmm17, zmm17",
            "vpxorq zmm18, zmm18, zmm18", "vpxorq zmm19, zmm19, zmm19",
            "vpxorq zmm20, zmm20, zmm20", "vpxorq zmm21, zmm21, zmm21",
            "vpxorq zmm22, zmm22, zmm22", "vpxorq zmm23, zmm23, zmm23",
            "vpxorq zmm24, zmm24, zmm24", "vpxorq zmm25, zmm25, zmm25",
            "vpxorq zmm26, zmm26, zmm26", "vpxorq zmm27, zmm27, zmm27",
            "vpxorq zmm28, zmm28, zmm28", "vpxorq zmm29, zmm29, zmm29",
            "vpxorq zmm30, zmm30, zmm30", "vpxorq zmm31, zmm31, zmm31",
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
            out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// A range of an arena, wiped and given back when dropped.
struct Allocation {
    start: NonNull<u8>,
    /// A multiple of [`UNIT`].
    len: usize,
    home: &'static Mutex<Arena>,
}

impl Allocation {
    fn take(len: usize) -> Result<Self, ArenaError> {
        Self::take_from(&ARENA, len)
    }

    fn take_from(home: &'static Mutex<Arena>, len: usize) -> Result<Self, ArenaError> {
        let (start, len) = home.lock().unwrap_or_else(PoisonError::into_inner).take(len)?;
        Ok(Self { start, len, home })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: the range belongs to this value alone, was initialised when mapped, and is never unmapped.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }.zeroize();
        self.home
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .give_back(self.start, self.len);
    }
}

// SAFETY: a place is a range of process memory that one value owns; nothing about it is bound to a thread.
unsafe impl Send for Allocation {}
// SAFETY: a shared place gives out its address alone.
unsafe impl Sync for Allocation {}

static ARENA: LazyLock<Mutex<Arena>> = LazyLock::new(|| Mutex::new(Arena::new(Source::detect())));

/// The chunks, and what of each is free. Secrets are few and long-lived, so first fit does.
struct Arena {
    source: Source,
    chunks: Vec<Chunk>,
}

struct Chunk {
    base: NonNull<u8>,
    len: usize,
    /// Free ranges as (offset, length), by offset, none adjacent to another.
    free: Vec<(usize, usize)>,
}

// SAFETY: the chunks are process memory that is never unmapped; the arena only does arithmetic on their addresses.
unsafe impl Send for Arena {}

impl Arena {
    fn new(source: Source) -> Self {
        Self {
            source,
            chunks: Vec::new(),
        }
    }

    /// Zeros for `wanted` bytes: where they start, and how many whole units they are.
    fn take(&mut self, wanted: usize) -> Result<(NonNull<u8>, usize), ArenaError> {
        if wanted > CAPACITY {
            return Err(ArenaError::Full { wanted });
        }
        let len = wanted.max(1).next_multiple_of(UNIT);
        if let Some(start) = self.chunks.iter_mut().find_map(|chunk| chunk.take(len)) {
            return Ok((start, len));
        }
        let grown = len.max(CHUNK).next_multiple_of(page_size());
        if self.chunks.iter().map(|chunk| chunk.len).sum::<usize>() + grown > CAPACITY {
            return Err(ArenaError::Full { wanted });
        }
        let base = self.source.map(grown)?;
        let mut chunk = Chunk {
            base,
            len: grown,
            free: vec![(0, grown)],
        };
        let start = chunk
            .take(len)
            .expect("a new chunk is as long as what it was made for");
        self.chunks.push(chunk);
        Ok((start, len))
    }

    fn give_back(&mut self, start: NonNull<u8>, len: usize) {
        let chunk = self.chunks.iter_mut().find_map(|chunk| {
            let offset = start.addr().get().checked_sub(chunk.base.addr().get())?;
            (offset < chunk.len).then_some((offset, chunk))
        });
        let (offset, chunk) = chunk.expect("a place was cut from one of the chunks");
        chunk.give_back(offset, len);
    }
}

impl Chunk {
    fn take(&mut self, len: usize) -> Option<NonNull<u8>> {
        let i = self.free.iter().position(|&(_, free)| free >= len)?;
        let (offset, free) = self.free[i];
        if free == len {
            self.free.remove(i);
        } else {
            self.free[i] = (offset + len, free - len);
        }
        // SAFETY: `offset` lies within the chunk, because the free ranges do.
        Some(unsafe { self.base.add(offset) })
    }

    fn give_back(&mut self, offset: usize, len: usize) {
        let i = self.free.partition_point(|&(start, _)| start < offset);
        self.free.insert(i, (offset, len));
        if let Some(&(next, more)) = self.free.get(i + 1)
            && offset + len == next
        {
            self.free[i].1 += more;
            self.free.remove(i + 1);
        }
        if i > 0 && self.free[i - 1].0 + self.free[i - 1].1 == offset {
            self.free[i - 1].1 += self.free[i].1;
            self.free.remove(i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    /// An arena apart from the process' own.
    fn private(source: Source) -> &'static Mutex<Arena> {
        Box::leak(Box::new(Mutex::new(Arena::new(source))))
    }

    fn random_in(home: &'static Mutex<Arena>, len: usize) -> SecretBytes {
        let mut secret = SecretBytes {
            place: Allocation::take_from(home, len).unwrap(),
            len,
        };
        getrandom::fill(&mut secret).unwrap();
        secret
    }

    /// What is left where a secret was.
    fn remains(start: *const u8, len: usize) -> Vec<u8> {
        // SAFETY: the callers' arenas are private, so nobody writes meanwhile; arenas never unmap.
        unsafe { slice::from_raw_parts(start, len) }.to_vec()
    }

    #[test]
    fn secret_cannot_be_read_through_proc_self_mem() {
        if Source::detect() != Source::Secret {
            eprintln!("skipped: this kernel has no memfd_secret");
            return;
        }
        let secret = SecretBytes::random(32).unwrap();
        let ordinary = [7u8; 32];
        let mut read = [0u8; 32];
        let mem = match File::open("/proc/self/mem") {
            Ok(mem) => mem,
            // Another test hardened the process, and it is not root's: out of reach altogether.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return,
            Err(e) => panic!("{e}"),
        };
        mem.read_exact_at(&mut read, ordinary.as_ptr().addr() as u64)
            .unwrap();
        assert_eq!(read, ordinary, "the method of this test finds what is not secret");
        assert!(mem.read_at(&mut read, secret.as_ptr().addr() as u64).is_err());
    }

    #[test]
    fn dropped_secret_is_wiped() {
        for source in [Source::detect(), Source::Locked] {
            let secret = random_in(private(source), 100);
            let start = secret.as_ptr();
            assert_ne!(remains(start, 100), [0; 100]);
            drop(secret);
            assert_eq!(remains(start, 128), [0; 128]);
        }
    }

    #[test]
    fn boxed_value_is_dropped_and_wiped() {
        struct Noisy<'a>([u64; 8], &'a std::cell::Cell<bool>);
        impl Drop for Noisy<'_> {
            fn drop(&mut self) {
                self.1.set(self.0 == [0x5ea1; 8]);
            }
        }
        let dropped = std::cell::Cell::new(false);
        let boxed = SecretBox::new(|| Noisy([0x5ea1; 8], &dropped)).unwrap();
        assert_eq!(boxed.0, [0x5ea1; 8]);
        drop(boxed);
        assert!(dropped.get());
    }

    #[test]
    fn truncated_tail_is_wiped() {
        let mut secret = random_in(private(Source::Locked), 40);
        let start = secret.as_ptr();
        secret.truncate(8);
        assert_eq!(secret.len(), 8);
        assert_eq!(remains(start.wrapping_add(8), 32), [0; 32]);
        secret.truncate(40);
        assert_eq!(secret.len(), 8);
    }

    #[test]
    fn taken_source_is_wiped() {
        let mut source = *b"correct horse battery staple";
        let secret = SecretBytes::take(&mut source).unwrap();
        assert!(secret.ct_eq(b"correct horse battery staple"));
        assert!(!secret.ct_eq(b"correct horse battery stapler"));
        assert!(!secret.ct_eq(b"correct horse battery stable"));
        assert_eq!(source, [0; 28]);
    }

    #[test]
    fn debug_prints_the_length_alone() {
        let mut secret = SecretBytes::zeroed(3).unwrap();
        secret.copy_from_slice(b"abc");
        assert_eq!(format!("{secret:?}"), "SecretBytes(3 bytes)");
        assert_eq!(
            format!("{:?}", SecretBox::new(|| *b"abc").unwrap()),
            "SecretBox(3 bytes)"
        );
    }

    #[test]
    fn memory_around_a_chunk_faults() {
        let start = random_in(private(Source::detect()), 1).as_ptr();
        let guards = [start.wrapping_sub(1), start.wrapping_add(CHUNK)];
        for guard in guards {
            // The kernel refuses to read from an address that it may not access, instead of a signal.
            let (_reader, writer) = io::pipe().unwrap();
            // SAFETY: the call reads one byte or fails with EFAULT; nothing in this process is altered.
            let written = unsafe { libc::write(writer.as_raw_fd(), guard.cast(), 1) };
            assert_eq!(written, -1);
        }
    }

    #[test]
    fn freed_ranges_are_joined_and_used_again() {
        let home = private(Source::Locked);
        let secrets: Vec<_> = (0..CHUNK / UNIT).map(|_| random_in(home, UNIT)).collect();
        assert_eq!(
            home.lock().unwrap().chunks.len(),
            1,
            "small secrets share a chunk"
        );
        // Every second one first, so that each of the others joins two neighbours.
        let (even, odd): (Vec<_>, Vec<_>) = secrets.into_iter().enumerate().partition(|(i, _)| i % 2 == 0);
        drop(even);
        drop(odd);
        assert_eq!(home.lock().unwrap().chunks[0].free, [(0, CHUNK)]);
        assert_eq!(random_in(home, CHUNK).len(), CHUNK);
        assert_eq!(home.lock().unwrap().chunks.len(), 1);
    }

    #[test]
    fn full_arena_refuses_and_recovers() {
        let home = private(Source::Locked);
        let large = random_in(home, CAPACITY - CHUNK);
        let small = random_in(home, CHUNK);
        assert!(matches!(
            Allocation::take_from(home, 1),
            Err(ArenaError::Full { wanted: 1 })
        ));
        assert!(matches!(
            Allocation::take_from(home, usize::MAX),
            Err(ArenaError::Full { .. })
        ));
        drop((large, small));
        assert_eq!(random_in(home, 1).len(), 1);
    }
}
