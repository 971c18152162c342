//! XTS-AES-256 over the sectors of a disk, as dm-crypt's `aes-xts-plain64` (IEEE 1619).
//!
//! [`SectorCipher`] stands between guest memory, which is scattered and may change while it is read, and a bounce
//! buffer, which is contiguous. It works out of place: guest memory never holds ciphertext, the bounce buffer never
//! holds plaintext. Most pieces of guest memory are whole sectors; a [`kernel`] processes these in place, many at
//! a time. A sector that is split between pieces goes through a scratch buffer that is wiped.
//!
//! The tweak of a sector is its number in 512-byte units, little-endian, for every sector size.
#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        clippy::cast_lossless
    )
)]
#![allow(unsafe_code)] // Kernels work on raw memory: guest memory must not be borrowed as a Rust slice.

mod choice;
mod copy;
mod kernel;
mod portable;
mod self_test;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;

use subtle::ConstantTimeEq;
use vm_memory::VolatileSlice;

use kernel::{Kernel, Units};
use sealblk_secmem::arena::{ArenaError, SecretBytes};

pub use choice::KernelChoice;
pub use copy::copy;
pub use kernel::{Reader, Workspace};
pub use sealblk_base::sector::{Sector, SectorSize};
pub use self_test::self_test;

/// The length of an `aes-xts-plain64` key with AES-256: one half encrypts data, the other tweaks. In bytes.
pub const KEY_LEN: usize = 64;

/// Why there is no cipher.
#[derive(Debug, thiserror::Error)]
pub enum CipherError {
    /// XTS-AES-256 takes 64 bytes.
    #[error("the volume key has {0} bytes, XTS-AES-256 needs {KEY_LEN}")]
    KeyLength(usize),
    /// Such a key makes the tweak predictable; none comes out of a random source.
    #[error("sealblk refuses this volume key: its two halves are equal, which makes XTS unsafe")]
    EqualHalves,
    /// No memory for the round keys.
    #[error("cannot hold the cipher's round keys")]
    Arena(#[from] ArenaError),
    /// The processor lacks instructions of the kernel that was asked for.
    #[error("this machine cannot run the cipher kernel {kernel}; it can run: {runs_here}")]
    Kernel {
        /// What was asked for.
        kernel: KernelChoice,
        /// Their names.
        runs_here: String,
    },
    /// A kernel computes wrongly on this machine.
    #[error(
        "self-test of the {kernel} kernel failed: {sector_size}-byte sectors are not {operation} correctly"
    )]
    SelfTest {
        /// The kernel's name.
        kernel: &'static str,
        /// In bytes.
        sector_size: usize,
        /// "encrypted" or "decrypted".
        operation: &'static str,
    },
}

/// One volume key, expanded and ready for sectors of one size.
pub struct SectorCipher {
    kernel: Box<dyn Kernel>,
    name: &'static str,
    sector_size: SectorSize,
}

impl SectorCipher {
    /// Expands `key`; its round keys live in the key arena.
    ///
    /// # Errors
    /// [`CipherError`], for a key of the wrong length or with equal halves, for a kernel that this machine cannot run,
    /// or if the arena is full.
    pub fn new(
        key: &SecretBytes,
        sector_size: SectorSize,
        choice: KernelChoice,
    ) -> Result<Self, CipherError> {
        if key.len() != KEY_LEN {
            return Err(CipherError::KeyLength(key.len()));
        }
        let (data, tweak) = key.split_at(KEY_LEN / 2);
        if data.ct_eq(tweak).into() {
            return Err(CipherError::EqualHalves);
        }
        let chosen = choice::choose(choice)?;
        Ok(Self {
            kernel: (chosen.expand)(key)?,
            name: chosen.name,
            sector_size,
        })
    }

    /// The sector size.
    pub fn sector_size(&self) -> SectorSize {
        self.sector_size
    }

    /// The name of the kernel that does the work, for people.
    pub fn kernel(&self) -> &'static str {
        self.name
    }

    /// Encrypts what `plain` holds, sectors from `first` on, into `cipher`, for `reader`. Each byte of `plain` is read
    /// once.
    ///
    /// # Panics
    /// If `cipher` is not a whole number of sectors, or `plain` is not as long.
    pub fn encrypt(
        &self,
        first: Sector,
        plain: &[VolatileSlice<'_>],
        cipher: &mut [u8],
        reader: Reader,
        workspace: &mut Workspace,
    ) {
        self.check(plain, cipher.len());
        let mut plain = Pieces::new(plain);
        let mut scratch = None;
        let mut done = 0;
        while done < cipher.len() {
            let sector = first + done as u64 / Sector::LEN;
            let target = &mut cipher[done..];
            if let Some(run) = plain.next_run(self.sector_size) {
                let units = self.units(sector, run.len());
                // SAFETY: `run` is mapped for its length, and `target` is longer, because the two sides have equal
                // lengths; guest memory does not overlap memory that Rust borrows.
                unsafe {
                    self.kernel.encrypt(
                        units,
                        run.ptr_guard().as_ptr(),
                        target.as_mut_ptr(),
                        reader,
                        workspace,
                    )
                };
                done += run.len();
            } else {
                let scratch = scratch.get_or_insert_with(Scratch::new).sector(self.sector_size);
                plain.gather(scratch);
                let units = self.units(sector, scratch.len());
                // SAFETY: the scratch is one sector long, `target` at least that.
                unsafe {
                    self.kernel
                        .encrypt(units, scratch.as_ptr(), target.as_mut_ptr(), reader, workspace)
                };
                done += scratch.len();
            }
        }
    }

    /// Decrypts `cipher`, sectors from `first` on, into `plain`.
    ///
    /// # Panics
    /// If `cipher` is not a whole number of sectors, or `plain` is not as long.
    pub fn decrypt(
        &self,
        first: Sector,
        cipher: &[u8],
        plain: &[VolatileSlice<'_>],
        workspace: &mut Workspace,
    ) {
        self.check(plain, cipher.len());
        let mut plain = Pieces::new(plain);
        let mut scratch = None;
        let mut done = 0;
        while done < cipher.len() {
            let sector = first + done as u64 / Sector::LEN;
            let source = &cipher[done..];
            if let Some(run) = plain.next_run(self.sector_size) {
                let units = self.units(sector, run.len());
                // SAFETY: `run` is mapped for its length, and `source` is longer, because the two sides have equal
                // lengths; guest memory does not overlap memory that Rust borrows.
                unsafe {
                    self.kernel
                        .decrypt(units, source.as_ptr(), run.ptr_guard_mut().as_ptr(), workspace)
                };
                done += run.len();
            } else {
                let scratch = scratch.get_or_insert_with(Scratch::new).sector(self.sector_size);
                let units = self.units(sector, scratch.len());
                // SAFETY: the scratch is one sector long, `source` at least that.
                unsafe {
                    self.kernel
                        .decrypt(units, source.as_ptr(), scratch.as_mut_ptr(), workspace)
                };
                plain.scatter(scratch);
                done += scratch.len();
            }
        }
    }

    /// The lengths are the caller's to get right; memory safety depends on them.
    fn check(&self, plain: &[VolatileSlice<'_>], len: usize) {
        assert!(
            len.is_multiple_of(self.sector_size.bytes()),
            "{len} bytes are not whole sectors"
        );
        assert_eq!(
            plain.iter().map(VolatileSlice::len).sum::<usize>(),
            len,
            "the two sides differ in length"
        );
    }

    fn units(&self, first: Sector, len: usize) -> Units {
        let size = self.sector_size.bytes();
        Units {
            tweak: first.0.into(),
            size,
            count: len / size,
        }
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher")
            .field("kernel", &self.name)
            .field("sector_size", &self.sector_size)
            .finish()
    }
}

/// Walks over pieces of guest memory.
struct Pieces<'a, 'm> {
    rest: &'a [VolatileSlice<'m>],
    /// What of the first piece is done, in bytes.
    done: usize,
}

impl<'a, 'm> Pieces<'a, 'm> {
    fn new(pieces: &'a [VolatileSlice<'m>]) -> Self {
        Self {
            rest: pieces,
            done: 0,
        }
    }

    /// The whole sectors that come next in one piece; none, if the next sector is split between pieces.
    fn next_run(&mut self, size: SectorSize) -> Option<VolatileSlice<'m>> {
        let len = self.current()?.len() / size.bytes() * size.bytes();
        (len > 0).then(|| self.take(len))
    }

    /// Copies the next bytes, from as many pieces as it takes.
    fn gather(&mut self, target: &mut [u8]) {
        let mut filled = 0;
        while let Some(piece) = self.current().filter(|_| filled < target.len()) {
            filled += self
                .take(piece.len().min(target.len() - filled))
                .copy_to(&mut target[filled..]);
        }
    }

    /// Copies `source` to the next bytes, in as many pieces as it takes.
    fn scatter(&mut self, source: &[u8]) {
        let mut rest = source;
        while let Some(piece) = self.current().filter(|_| !rest.is_empty()) {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            self.take(now.len()).copy_from(now);
            rest = later;
        }
    }

    /// What is left of the first piece that is not done.
    fn current(&mut self) -> Option<VolatileSlice<'m>> {
        while let Some((first, rest)) = self.rest.split_first() {
            if self.done < first.len() {
                return Some(first.offset(self.done).expect("`done` is less than the length"));
            }
            self.rest = rest;
            self.done = 0;
        }
        None
    }

    /// The next `len` bytes, which are in the current piece.
    fn take(&mut self, len: usize) -> VolatileSlice<'m> {
        let taken = self.rest[0]
            .subslice(self.done, len)
            .expect("the caller has checked the current piece");
        self.done += len;
        taken
    }
}

/// Room for a sector of plaintext, wiped when dropped.
struct Scratch([u8; SectorSize::MAX]);

impl Scratch {
    fn new() -> Self {
        Self([0; SectorSize::MAX])
    }

    fn sector(&mut self, size: SectorSize) -> &mut [u8] {
        &mut self.0[..size.bytes()]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // As `zeroize` does, but a whole line at a time: this runs once for each run of sectors.
        self.0.fill(0);
        zeroize::optimization_barrier(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aes::Aes256;
    use aes::cipher::KeyInit;
    use proptest::prelude::*;
    use xts_mode::{Xts128, get_tweak_default};

    /// Where a count of 32 bits ends.
    const CARRY: u64 = 1 << 32;

    fn workspace() -> Workspace {
        Workspace::new().unwrap()
    }

    fn cipher(key: [u8; KEY_LEN], size: SectorSize, choice: KernelChoice) -> SectorCipher {
        SectorCipher::new(&SecretBytes::take(&mut key.clone()).unwrap(), size, choice).unwrap()
    }

    /// `xts-mode` on a flat buffer, with nothing of ours but the rule for tweaks.
    fn oracle(key: [u8; KEY_LEN], size: SectorSize, first: Sector, plain: &[u8]) -> Vec<u8> {
        let half = |half: &[u8]| Aes256::new_from_slice(half).unwrap();
        let xts = Xts128::new(half(&key[..32]), half(&key[32..]));
        let mut out = plain.to_vec();
        for (i, sector) in out.chunks_mut(size.bytes()).enumerate() {
            let number = first.0.wrapping_add((i * size.bytes() / 512) as u64);
            xts.encrypt_sector(sector, get_tweak_default(number.into()));
        }
        out
    }

    /// Cuts a buffer at `cuts` (fractions of its length, in any order), with empty pieces where they coincide.
    fn pieces<'a>(buffer: &'a mut [u8], cuts: &[usize]) -> Vec<VolatileSlice<'a>> {
        let mut at: Vec<_> = cuts.iter().map(|cut| cut % (buffer.len() + 1)).collect();
        at.sort_unstable();
        let mut pieces = Vec::new();
        let (mut rest, mut start) = (buffer, 0);
        for cut in at {
            let (piece, tail) = rest.split_at_mut(cut - start);
            pieces.push(VolatileSlice::from(piece));
            (rest, start) = (tail, cut);
        }
        pieces.push(VolatileSlice::from(rest));
        pieces
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_split_of_guest_memory_gives_what_xts_mode_gives(
            size in prop_oneof![Just(SectorSize::B512), Just(SectorSize::B4096)],
            sectors in 0usize..40,
            // Of the bounce buffer from a multiple of a vector: where there is one, stores past the cache cannot be had.
            offset in prop_oneof![Just(0_usize), 0..64_usize],
            first in prop_oneof![any::<u64>(), u64::MAX - 20..=u64::MAX, CARRY - 20..=CARRY],
            cuts in prop::collection::vec(any::<usize>(), 0..12),
            seed in any::<u64>(),
        ) {
            let key: [u8; KEY_LEN] = std::array::from_fn(|i| (seed >> (i % 8 * 8)) as u8 ^ i as u8);
            let plain: Vec<u8> = (0..sectors * size.bytes()).map(|i| (i as u64 ^ seed) as u8).collect();
            let expected = oracle(key, size, Sector(first), &plain);
            let readers = [Reader::Device, Reader::Processor];
            for (kernel, reader) in choice::running_here().flat_map(|kernel| readers.map(|reader| (kernel, reader))) {
                let cipher = cipher(key, size, kernel.choice);
                let mut guest = plain.clone();
                let mut bounce = vec![0xee; plain.len() + 128];
                let start = bounce.as_ptr().align_offset(64) + offset;
                let bounce = &mut bounce[start..start + plain.len()];
                cipher.encrypt(Sector(first), &pieces(&mut guest, &cuts), bounce, reader, &mut workspace());
                prop_assert_eq!(&guest, &plain, "guest memory is not written to");
                prop_assert_eq!(&*bounce, &*expected);

                guest.fill(0xdd);
                cipher.decrypt(Sector(first), bounce, &pieces(&mut guest, &cuts), &mut workspace());
                prop_assert_eq!(&guest, &plain);
                prop_assert_eq!(&*bounce, &*expected, "the bounce buffer is not written to");
            }
        }
    }

    /// Every count of sectors up to several groups of tweaks, and some about the most that a kernel works on at a time,
    /// whose numbers wrap or carry on the way; with a bounce buffer that vectors are aligned to, and with none.
    #[test]
    fn every_count_of_sectors_gives_what_aws_lc_gives() {
        for candidate in choice::KERNELS {
            if !(candidate.runs_here)() {
                eprintln!("skipped: this machine cannot run the kernel {}", candidate.name);
            }
        }
        for size in [SectorSize::B512, SectorSize::B4096] {
            for count in (0..=70).chain([127, 128, 129, 255, 256, 257, 300]) {
                let before = 4 * count as u64;
                let first = [before.wrapping_neg(), CARRY - before][count % 2];
                for (reader, shift) in [(Reader::Device, 0), (Reader::Processor, count * 16 % 61)] {
                    check_count(size, count, Sector(first), reader, shift);
                }
            }
        }
    }

    fn check_count(size: SectorSize, count: usize, first: Sector, reader: Reader, shift: usize) {
        let key = std::array::from_fn(|i| (i * 37) as u8);
        let plain: Vec<u8> = (0..count * size.bytes()).map(|i| (i % 241) as u8).collect();
        let expected = aws_lc(key, size, first, &plain);
        let from = (count * 7) % 59;
        for kernel in choice::running_here() {
            let cipher = cipher(key, size, kernel.choice);
            let mut guest = vec![0; from + plain.len()];
            guest[from..].copy_from_slice(&plain);
            let mut bounce = vec![0xee; plain.len() + 128];
            let start = bounce.as_ptr().align_offset(64) + shift;
            let end = start + plain.len();
            cipher.encrypt(
                first,
                &pieces(&mut guest[from..], &[]),
                &mut bounce[start..end],
                reader,
                &mut workspace(),
            );
            let what = format!("{}: {count} of {} from {first}", kernel.name, size.bytes());
            assert!(bounce[start..end] == expected, "{what}");
            assert_eq!(bounce[end], 0xee, "nothing is written after the end");
            guest.fill(0);
            cipher.decrypt(
                first,
                &bounce[start..end],
                &pieces(&mut guest[from..], &[]),
                &mut workspace(),
            );
            assert!(guest[from..] == plain, "{what}");
        }
    }

    /// AWS-LC on a flat buffer, one sector after the other.
    fn aws_lc(key: [u8; KEY_LEN], size: SectorSize, first: Sector, plain: &[u8]) -> Vec<u8> {
        use aws_lc_sys::{
            EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_Cipher, EVP_CipherInit_ex, EVP_aes_256_xts,
        };
        use std::ptr::null_mut;
        // SAFETY: it takes nothing.
        let context = unsafe { EVP_CIPHER_CTX_new() };
        // SAFETY: it takes nothing.
        let cipher = unsafe { EVP_aes_256_xts() };
        let mut out = vec![0; plain.len()];
        let sectors = plain.chunks(size.bytes()).zip(out.chunks_mut(size.bytes()));
        for (i, (source, target)) in sectors.enumerate() {
            let number = first.0.wrapping_add((i * size.bytes() / 512) as u64);
            let tweak = u128::from(number).to_le_bytes();
            // SAFETY: the key has this cipher's length, and the tweak 16 bytes.
            let begun =
                unsafe { EVP_CipherInit_ex(context, cipher, null_mut(), key.as_ptr(), tweak.as_ptr(), 1) };
            assert_eq!(begun, 1);
            // SAFETY: both sides have this length.
            let done = unsafe { EVP_Cipher(context, target.as_mut_ptr(), source.as_ptr(), source.len()) };
            assert_eq!(done, 1);
        }
        // SAFETY: nothing uses the context any more.
        unsafe { EVP_CIPHER_CTX_free(context) };
        out
    }

    /// Every cut of two sectors in two and three pieces, byte by byte.
    #[test]
    fn every_cut_of_two_sectors_gives_the_same_ciphertext() {
        let key = std::array::from_fn(|i| i as u8);
        let cipher = cipher(key, SectorSize::B512, KernelChoice::Portable);
        let mut plain: Vec<u8> = (0..1024).map(|i| (i % 253) as u8).collect();
        let expected = oracle(key, SectorSize::B512, Sector(9), &plain);
        for cut in 0..=1024 {
            let mut bounce = vec![0; 1024];
            cipher.encrypt(
                Sector(9),
                &pieces(&mut plain, &[cut, cut + 7]),
                &mut bounce,
                Reader::Processor,
                &mut workspace(),
            );
            assert_eq!(bounce, expected, "cut at {cut}");
        }
    }

    #[test]
    fn tweak_of_a_4096_byte_sector_counts_512_byte_units() {
        let key = std::array::from_fn(|i| i as u8);
        let mut plain = vec![0x11; 3 * 4096];
        let mut whole = vec![0; 3 * 4096];
        let cipher = cipher(key, SectorSize::B4096, KernelChoice::Portable);
        cipher.encrypt(
            Sector(8),
            &pieces(&mut plain, &[]),
            &mut whole,
            Reader::Device,
            &mut workspace(),
        );
        let mut third = vec![0; 4096];
        cipher.encrypt(
            Sector(24),
            &pieces(&mut plain[..4096], &[]),
            &mut third,
            Reader::Processor,
            &mut workspace(),
        );
        assert_eq!(whole[2 * 4096..], third);
    }

    #[test]
    fn key_with_equal_halves_is_refused() {
        let key = SecretBytes::take(&mut [7; KEY_LEN]).unwrap();
        let refused = SectorCipher::new(&key, SectorSize::B512, KernelChoice::Fastest);
        assert!(matches!(refused, Err(CipherError::EqualHalves)));
    }

    #[test]
    fn key_of_another_length_is_refused() {
        let key = SecretBytes::random(32).unwrap();
        let refused = SectorCipher::new(&key, SectorSize::B512, KernelChoice::Fastest);
        assert!(matches!(refused, Err(CipherError::KeyLength(32))));
    }

    #[test]
    #[should_panic(expected = "differ in length")]
    fn sides_of_unequal_length_are_refused() {
        let cipher = cipher(
            std::array::from_fn(|i| i as u8),
            SectorSize::B512,
            KernelChoice::Fastest,
        );
        cipher.encrypt(
            Sector(0),
            &pieces(&mut [0; 1024], &[]),
            &mut [0; 512],
            Reader::Device,
            &mut workspace(),
        );
    }

    #[test]
    fn kernel_is_chosen_by_name() {
        assert_eq!(
            "portable".parse::<KernelChoice>().unwrap(),
            KernelChoice::Portable
        );
        for choice in KernelChoice::ALL {
            assert_eq!(choice.to_string().parse::<KernelChoice>().unwrap(), choice);
        }
        let refused = "AES-NI".parse::<KernelChoice>().unwrap_err().to_string();
        assert!(
            refused.contains("AES-NI") && refused.contains("portable"),
            "{refused}"
        );
    }

    /// Whichever machine this is, it runs the portable kernel, so that is what it says.
    #[test]
    fn kernel_that_the_machine_lacks_is_refused_with_those_it_has() {
        for candidate in choice::KERNELS {
            match choice::choose(candidate.choice) {
                Ok(chosen) => assert_eq!(chosen.choice, candidate.choice),
                Err(refused) => {
                    let refused = refused.to_string();
                    assert!(
                        refused.contains(candidate.name) && refused.contains("can run: "),
                        "{refused}"
                    );
                    assert!(refused.ends_with("portable"), "{refused}");
                }
            }
        }
    }

    /// IEEE 1619-2007, appendix B, vector 10.
    #[test]
    fn ieee_1619_vector_10() {
        let mut plain: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let mut encrypted = vec![0; 512];
        for kernel in choice::running_here() {
            let cipher = cipher(self_test::KEY, SectorSize::B512, kernel.choice);
            cipher.encrypt(
                Sector(0xff),
                &pieces(&mut plain, &[]),
                &mut encrypted,
                Reader::Processor,
                &mut workspace(),
            );
            assert_eq!(
                encrypted[..32],
                unhex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b")
            );
            assert_eq!(
                encrypted[480..],
                unhex("773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151")
            );
        }
    }

    /// Every whole-block vector of NIST's validation suite, on every kernel, in the direction it is given for.
    #[test]
    fn nist_cavp_xtsgen_aes256() {
        let files = [
            include_str!("testdata/XTSGenAES256-tweak-128hexstr.rsp"),
            include_str!("testdata/XTSGenAES256-tweak-dataunitseqno.rsp"),
        ];
        let mut run = 0;
        for file in files {
            let mut encrypting = true;
            for block in file.split("\n\n") {
                match block.trim() {
                    "[ENCRYPT]" => encrypting = true,
                    "[DECRYPT]" => encrypting = false,
                    vector if vector.starts_with("COUNT") => {
                        for kernel in choice::running_here() {
                            check_vector(kernel, vector, encrypting);
                        }
                        run += 1;
                    }
                    _ => {}
                }
            }
        }
        assert_eq!(run, 1200);
    }

    fn check_vector(kernel: &choice::Candidate, vector: &str, encrypting: bool) {
        let field = |name: &str| {
            vector
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "))
                .map(str::trim)
        };
        let key = SecretBytes::take(&mut unhex(field("Key").unwrap())).unwrap();
        let tweak = match (field("i"), field("DataUnitSeqNumber")) {
            (Some(tweak), _) => u128::from_le_bytes(unhex(tweak).try_into().unwrap()),
            (None, number) => number.unwrap().parse().unwrap(),
        };
        let (plain, encrypted) = (unhex(field("PT").unwrap()), unhex(field("CT").unwrap()));
        // Vectors are shorter than a sector. What follows in the unit changes nothing about the blocks before.
        let units = Units {
            tweak,
            size: 512,
            count: 1,
        };
        let (given, expected) = if encrypting {
            (plain, encrypted)
        } else {
            (encrypted, plain)
        };
        let mut source = given;
        source.resize(512, 0);
        let mut out = vec![0; 512];
        let expanded = (kernel.expand)(&key).unwrap();
        let mut workspace = Workspace::new().unwrap();
        if encrypting {
            // SAFETY: both buffers are one unit long.
            unsafe {
                expanded.encrypt(
                    units,
                    source.as_ptr(),
                    out.as_mut_ptr(),
                    Reader::Processor,
                    &mut workspace,
                )
            };
        } else {
            // SAFETY: both buffers are one unit long.
            unsafe { expanded.decrypt(units, source.as_ptr(), out.as_mut_ptr(), &mut workspace) };
        }
        out.truncate(expected.len());
        assert_eq!(out, expected, "{}: {vector}", kernel.name);
    }

    fn unhex(hex: &str) -> Vec<u8> {
        (0..hex.len() / 2)
            .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
            .collect()
    }
}
