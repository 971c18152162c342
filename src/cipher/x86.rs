//! XTS-AES-256 on x86-64's AES instructions, in vectors of 1, 2 and 4 blocks: AES-NI, AVX2 with VAES, AVX-512 with VAES.
//!
//! IEEE 1619, section 5.3, for block j of the data unit with tweak i, key1 for data and key2 for tweaks:
//!
//! ```text
//! T = E(key2, i) ⊗ αʲ        C = E(key1, P ⊕ T) ⊕ T        P = D(key1, C ⊕ T) ⊕ T
//! ```
//!
//! where α is the polynomial x of GF(2¹²⁸) modulo x¹²⁸ + x⁷ + x² + x + 1, bit 0 of byte 0 the constant term. With AES's
//! round keys k₀ ... k₁₄ (for D those of the equivalent inverse cipher) the code computes the same in this form:
//!
//! - **Whitening is folded into the outer round keys.** It keeps V = T ⊕ k₁₄ for each block. The first AddRoundKey is
//!   P ⊕ V ⊕ (k₀ ⊕ k₁₄), and the last round adds V instead of k₁₄, so that it gives C.
//! - **The tweaks of many data units are encrypted together**: of up to 8 vectors of them, before their data.
//! - **The first 64 blocks of a unit** (all 32 of a 512-byte one) get their tweaks straight from T₀ = E(key2, i), none
//!   from another. With T₀ = l + h x⁶⁴ and s = h ≫ (64 − j), T₀ ⊗ αʲ is T₀ shifted left by j bits, plus s·(x⁷ + x² + x + 1).
//!   [`Tables`] has the shifts.
//! - **Later blocks** get theirs from the one 64 before: V ⊗ α⁶⁴ = l x⁶⁴ + h·(x⁷ + x² + x + 1), and so
//!   T ⊗ α⁶⁴ ⊕ k₁₄ = V ⊗ α⁶⁴ ⊕ c with c = k₁₄ ⊕ k₁₄ ⊗ α⁶⁴, a constant of the key.
//! - **Tweaks are made during rounds**: 8 vectors (a *group*) are in flight at a time, which hides an instruction's
//!   latency; between their rounds are made the V of the next group. They lie in a ring of 64 blocks.
//!
//! Each byte of the source is read once. Branches and addresses depend on the number and size of the units alone. The
//! rounds are assembly, so that no compiler puts round keys or plaintext on the stack; V, from which a round key follows,
//! lies in [`Scratch`], which is wiped at the end, and so are the registers.
#![allow(unsafe_code)] // Assembly, on raw memory.

mod schedule;

use std::arch::asm;
use std::arch::x86_64::_mm_sfence;
use std::mem::{MaybeUninit, offset_of};

use super::kernel::{Kernel, Reader, Units};
use crate::keys::arena::{ArenaError, SecretBox, SecretBytes};
use schedule::Schedules;

/// Blocks whose tweaks come straight from T₀, and are kept.
const RING: usize = 64;
/// The most data units whose tweaks are encrypted together: 8 vectors of 4.
const UNITS: usize = 32;

/// What the code is assembled for.
const ENCRYPT: u8 = 0;
const ENCRYPT_PAST_CACHE: u8 = 1;
const DECRYPT: u8 = 2;

/// Constants of the code, 16 bytes for each block.
#[repr(C, align(64))]
struct Tables {
    /// j for block j, in both halves.
    left: [[u64; 2]; RING],
    /// 64 − j for block j, in both halves.
    right: [[u64; 2]; RING],
    /// x⁷ + x² + x + 1, and the same without 1 for where that part is added by itself.
    polynomial: [u64; 2],
    /// How much each unit's tweak is more than the first one's, for units of 512 and of 4096 bytes.
    count: [[[u64; 2]; UNITS]; 2],
}

static TABLES: Tables = {
    let mut tables = Tables {
        left: [[0; 2]; RING],
        right: [[0; 2]; RING],
        polynomial: [0x87, 0x86],
        count: [[[0; 2]; UNITS]; 2],
    };
    let mut i = 0;
    while i < RING {
        tables.left[i] = [i as u64; 2];
        tables.right[i] = [64 - i as u64; 2];
        i += 1;
    }
    i = 0;
    while i < UNITS {
        tables.count[0][i][0] = i as u64;
        tables.count[1][i][0] = 8 * i as u64;
        i += 1;
    }
    tables
};

/// What the code keeps in memory while it runs.
#[repr(C, align(64))]
struct Scratch {
    /// V of 64 blocks.
    ring: [u128; RING],
    /// T₀ of each unit, and room for one that the code looks at after the last.
    tweaks: [u128; UNITS + 4],
    /// Groups of a unit whose tweaks come from T₀, and those whose tweaks come from others.
    started: u64,
    stepped: u64,
}

/// A kernel for one width of vectors: registers 0 to 7 are the blocks in flight.
macro_rules! kernel {
    (
        $name:ident, expand: $expand:ident, vector: $bytes:literal bytes in $r:literal,
        load: $load:literal, broadcast: $broadcast:literal, xor: $xor:literal, xor3: $xor3:ident,
        shift: $left:literal $right:literal
    ) => {
        struct $name(SecretBox<Schedules>);

        pub(super) fn $expand(key: &SecretBytes) -> Result<Box<dyn Kernel>, ArenaError> {
            Ok(Box::new($name(schedules(key)?)))
        }

        impl Kernel for $name {
            unsafe fn encrypt(&self, units: Units, source: *const u8, target: *mut u8, reader: Reader) {
                // Stores past the cache take aligned vectors only.
                if reader == Reader::Device && target.addr().is_multiple_of($bytes) {
                    // SAFETY: the caller's promise, passed on, and the target is aligned.
                    unsafe { Self::work::<ENCRYPT_PAST_CACHE>(&self.0, units, source, target) }
                } else {
                    // SAFETY: the caller's promise, passed on.
                    unsafe { Self::work::<ENCRYPT>(&self.0, units, source, target) }
                }
            }

            unsafe fn decrypt(&self, units: Units, source: *const u8, target: *mut u8) {
                // SAFETY: the caller's promise, passed on.
                unsafe { Self::work::<DECRYPT>(&self.0, units, source, target) }
            }
        }

        impl $name {
            /// Bytes in flight.
            const GROUP: usize = 8 * $bytes;

            /// # Safety
            /// As for [`Kernel::encrypt`]; to encrypt past the cache, `target` is aligned to a vector.
            unsafe fn work<const OPERATION: u8>(
                keys: &Schedules,
                units: Units,
                mut source: *const u8,
                mut target: *mut u8,
            ) {
                assert!(
                    matches!(units.size, 512 | 4096),
                    "data units are 512 or 4096 bytes long"
                );
                let mut scratch = MaybeUninit::<Scratch>::uninit();
                let scratch = scratch.as_mut_ptr();
                let started = units.size.min(16 * RING) / Self::GROUP;
                // SAFETY: the field is in `scratch`.
                unsafe { (&raw mut (*scratch).started).write(started as u64) };
                // SAFETY: as above.
                unsafe { (&raw mut (*scratch).stepped).write((units.size / Self::GROUP - started) as u64) };
                let mut rest = units;
                while rest.count > 0 {
                    let batch = rest.take_first(Self::GROUP / 16);
                    // SAFETY: `scratch` has room for the tweaks of a group.
                    unsafe { Self::start(keys, batch, scratch) };
                    let len = batch.size * batch.count;
                    // SAFETY: the tweaks were made by the line before, the sides are the caller's promise.
                    unsafe { Self::crypt::<OPERATION>(keys, batch.count, scratch, source, target) };
                    (source, target) = (source.wrapping_add(len), target.wrapping_add(len));
                }
                // SAFETY: `scratch` is ours.
                unsafe { Self::wipe(scratch) };
            }

            /// Encrypts the units' tweaks: T₀ of each, in two vectors if they are enough, else in eight.
            ///
            /// # Safety
            /// There are at most a group of units; `scratch` is valid for writes.
            unsafe fn start(keys: &Schedules, units: Units, scratch: *mut Scratch) {
                macro_rules! tweaks {
                    ($vectors:literal) => {
                        // SAFETY: it reads the keys, the tables and the first tweak, and writes to the tweaks of
                        // `scratch`, which has room for a group of them.
                        unsafe {
                            asm!(
                                concat!($broadcast, " ", $r, "9, [{first}]"),
                                concat!($broadcast, " ", $r, "8, [{keys}]"),
                                concat!(".irp i,", $vectors),
                                concat!("vpaddq ", $r, "\\i, ", $r, "9, [{count} + ", $bytes, "*\\i]"),
                                concat!($xor, " ", $r, "\\i, ", $r, "\\i, ", $r, "8"),
                                ".endr",
                                ".irp round,1,2,3,4,5,6,7,8,9,10,11,12,13",
                                concat!($broadcast, " ", $r, "8, [{keys} + 16*\\round]"),
                                concat!(".irp i,", $vectors),
                                concat!("vaesenc ", $r, "\\i, ", $r, "\\i, ", $r, "8"),
                                ".endr",
                                ".endr",
                                concat!($broadcast, " ", $r, "8, [{keys} + 16*14]"),
                                concat!(".irp i,", $vectors),
                                concat!("vaesenclast ", $r, "\\i, ", $r, "\\i, ", $r, "8"),
                                concat!($load, " [{tweaks} + ", $bytes, "*\\i], ", $r, "\\i"),
                                ".endr",
                                keys = in(reg) &raw const keys.tweak,
                                first = in(reg) &raw const units.tweak,
                                count = in(reg) &raw const TABLES.count[usize::from(units.size == 4096)],
                                tweaks = in(reg) &raw mut (*scratch).tweaks,
                                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
                                out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _,
                                options(nostack, preserves_flags),
                            )
                        }
                    };
                }
                if units.count <= 2 * $bytes / 16 {
                    tweaks!("0,1");
                } else {
                    tweaks!("0,1,2,3,4,5,6,7");
                }
            }

            /// # Safety
            /// As for [`Self::work`], and the units' tweaks are in `scratch`.
            unsafe fn crypt<const OPERATION: u8>(
                keys: &Schedules,
                count: usize,
                scratch: *mut Scratch,
                source: *const u8,
                target: *mut u8,
            ) {
                // Register 8 holds a round key, 9 and 10 T₀ and its swapped halves (9 also c), 11 the polynomial,
                // 12 k₀ ⊕ k₁₄, 13 and 14 a tweak in the making, 15 k₁₄.
                macro_rules! load_tweak {
                    () => {
                        concat!(
                            "lea {shifts}, [rip + {tables}]\n",
                            $broadcast, " ", $r, "9, [{tweaks}]\n",
                            "vpshufd ", $r, "10, ", $r, "9, 0x4e\n",
                            "add {tweaks}, 16"
                        )
                    };
                }
                // V of vector i of the next group: T₀ ⊗ αʲ ⊕ k₁₄.
                macro_rules! start {
                    ($i:literal) => {
                        concat!(
                            $left, " ", $r, "13, ", $r, "9, [{shifts} + ", $bytes, "*(", $i, ")]\n",
                            $right, " ", $r, "14, ", $r, "10, [{shifts} + 16*64 + ", $bytes, "*(", $i, ")]\n",
                            $xor, " ", $r, "13, ", $r, "13, ", $r, "14\n",
                            "vpclmulqdq ", $r, "14, ", $r, "14, ", $r, "11, 0x10\n",
                            $xor3!($r, "13", concat!($r, "14"), concat!($r, "15")), "\n",
                            $load, " [{scratch} + {next} + ", $bytes, "*(", $i, ")], ", $r, "13"
                        )
                    };
                }
                // V of vector i of the next group: that of 64 blocks before, times α⁶⁴, plus c.
                macro_rules! step {
                    ($i:literal) => {
                        concat!(
                            $load, " ", $r, "13, [{scratch} + {next} + ", $bytes, "*(", $i, ")]\n",
                            "vpclmulqdq ", $r, "14, ", $r, "13, ", $r, "11, 0x01\n",
                            "vpslldq ", $r, "13, ", $r, "13, 8\n",
                            $xor3!($r, "13", concat!($r, "14"), concat!($r, "9")), "\n",
                            $load, " [{scratch} + {next} + ", $bytes, "*(", $i, ")], ", $r, "13"
                        )
                    };
                }
                // A group of blocks under the V of this group, while those of the next are made.
                macro_rules! group {
                    ($aes:literal, $store:expr, $tweak:ident) => {
                        concat!(
                            ".irp i,0,1,2,3,4,5,6,7\n",
                            $load, " ", $r, "\\i, [{source} + ", $bytes, "*\\i]\n",
                            $xor3!($r, "\\i", concat!($r, "12"), concat!("[{scratch} + {this} + ", $bytes, "*\\i]")), "\n",
                            ".endr\n",
                            ".irp round,1,2,3,4,5,6,7,8\n",
                            $broadcast, " ", $r, "8, [{keys} + 16*\\round]\n",
                            ".irp i,0,1,2,3,4,5,6,7\n",
                            $aes, " ", $r, "\\i, ", $r, "\\i, ", $r, "8\n",
                            ".endr\n",
                            $tweak!("\\round-1"), "\n",
                            ".endr\n",
                            ".irp round,9,10,11,12,13\n",
                            $broadcast, " ", $r, "8, [{keys} + 16*\\round]\n",
                            ".irp i,0,1,2,3,4,5,6,7\n",
                            $aes, " ", $r, "\\i, ", $r, "\\i, ", $r, "8\n",
                            ".endr\n",
                            ".endr\n",
                            ".irp i,0,1,2,3,4,5,6,7\n",
                            $aes, "last ", $r, "\\i, ", $r, "\\i, [{scratch} + {this} + ", $bytes, "*\\i]\n",
                            $store, " [{target} + ", $bytes, "*\\i], ", $r, "\\i\n",
                            ".endr\n",
                            "add {source}, {group}\n",
                            "add {target}, {group}\n",
                            "mov {this:e}, {next:e}\n",
                            "add {next:e}, {group}\n",
                            "and {next:e}, 16*64 - 1"
                        )
                    };
                }
                macro_rules! all {
                    ($aes:literal, $store:expr, $keys:expr) => {
                        // SAFETY: it reads the source, the keys, the tables and the tweaks, and writes to the target
                        // and the ring.
                        unsafe {
                            asm!(
                                load_tweak!(),
                                concat!($broadcast, " ", $r, "11, [{shifts} + 16*128]"),
                                concat!($broadcast, " ", $r, "12, [{keys}]"),
                                concat!($broadcast, " ", $r, "15, [{keys} + 16*14]"),
                                concat!($xor, " ", $r, "12, ", $r, "12, ", $r, "15"),
                                "xor {next:e}, {next:e}",
                                ".irp i,0,1,2,3,4,5,6,7",
                                start!("\\i"),
                                ".endr",
                                "add {shifts}, {group}",
                                "xor {this:e}, {this:e}",
                                "mov {next:e}, {group}",
                                "mov {run}, [{scratch} + {started}]",
                                "dec {run}",
                                "jmp 5f",
                                // Groups before those that come from others.
                                "2:",
                                "mov {run}, [{scratch} + {stepped}]",
                                "test {run}, {run}",
                                "jz 4f",
                                concat!($broadcast, " ", $r, "9, [{keys} + 16*15]"),
                                "3:",
                                group!($aes, $store, step),
                                "dec {run}",
                                "jnz 3b",
                                // The last group of a unit, and those of the next one that come before others which
                                // come from T₀.
                                "4:",
                                load_tweak!(),
                                "mov {run:e}, 1",
                                "dec {count}",
                                "cmovnz {run}, [{scratch} + {started}]",
                                "5:",
                                "test {run}, {run}",
                                "jz 2b",
                                "6:",
                                group!($aes, $store, start),
                                "add {shifts}, {group}",
                                "dec {run}",
                                "jnz 6b",
                                "test {count}, {count}",
                                "jnz 2b",
                                tables = sym TABLES,
                                group = const Self::GROUP,
                                started = const offset_of!(Scratch, started),
                                stepped = const offset_of!(Scratch, stepped),
                                keys = in(reg) $keys,
                                scratch = in(reg) scratch,
                                tweaks = inout(reg) &raw const (*scratch).tweaks => _,
                                source = inout(reg) source => _,
                                target = inout(reg) target => _,
                                count = inout(reg) count => _,
                                shifts = out(reg) _,
                                this = out(reg) _,
                                next = out(reg) _,
                                run = out(reg) _,
                                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                                options(nostack),
                            )
                        }
                    };
                }
                match OPERATION {
                    ENCRYPT => all!("vaesenc", $load, &raw const keys.encrypt),
                    ENCRYPT_PAST_CACHE => {
                        all!("vaesenc", "vmovntdq", &raw const keys.encrypt);
                        // What went past the cache is there before whatever hands the buffer over.
                        // SAFETY: every x86-64 has it.
                        unsafe { _mm_sfence() };
                    }
                    _ => all!("vaesdec", $load, &raw const keys.decrypt),
                }
            }

            /// Wipes `scratch` and the registers.
            ///
            /// # Safety
            /// `scratch` is valid for writes.
            unsafe fn wipe(scratch: *mut Scratch) {
                // SAFETY: it writes to `scratch` alone, and changes the registers that it names.
                unsafe {
                    asm!(
                        "vzeroall",
                        "2:",
                        concat!($load, " [{end} + {at}], ", $r, "0"),
                        concat!("add {at}, ", $bytes),
                        "jnz 2b",
                        end = in(reg) scratch.add(1),
                        at = inout(reg) -(size_of::<Scratch>() as isize) => _,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                        out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                        out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                        out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                        options(nostack),
                    )
                }
            }
        }
    };
}

/// `target ^= a ^ b` in one instruction, of EVEX.
macro_rules! xor3_evex {
    ($r:literal, $target:literal, $a:expr, $b:expr) => {
        concat!("vpternlogq ", $r, $target, ", ", $a, ", ", $b, ", 0x96")
    };
}

/// `target ^= a ^ b` in two, of VEX.
macro_rules! xor3_vex {
    ($r:literal, $target:literal, $a:expr, $b:expr) => {
        concat!(
            "vpxor ", $r, $target, ", ", $r, $target, ", ", $a, "\n", "vpxor ", $r, $target, ", ", $r,
            $target, ", ", $b
        )
    };
}

kernel! {
    Avx512, expand: expand_avx512, vector: 64 bytes in "zmm",
    load: "vmovdqu64", broadcast: "vbroadcasti32x4", xor: "vpxorq", xor3: xor3_evex,
    shift: "vpsllvq" "vpsrlvq"
}
kernel! {
    Avx2, expand: expand_avx2, vector: 32 bytes in "ymm",
    load: "vmovdqu", broadcast: "vbroadcasti128", xor: "vpxor", xor3: xor3_vex,
    shift: "vpsllvq" "vpsrlvq"
}
// Shifts by one count for both halves are all that AVX has, and all that one block needs.
kernel! {
    AesNi, expand: expand_aes_ni, vector: 16 bytes in "xmm",
    load: "vmovdqu", broadcast: "vmovdqu", xor: "vpxor", xor3: xor3_vex,
    shift: "vpsllq" "vpsrlq"
}

pub(super) fn has_avx512() -> bool {
    has_aes_ni()
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
}

pub(super) fn has_avx2() -> bool {
    has_aes_ni()
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("avx2")
}

pub(super) fn has_aes_ni() -> bool {
    is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("avx")
}

fn schedules(key: &SecretBytes) -> Result<SecretBox<Schedules>, ArenaError> {
    let key = key[..].try_into().expect("the caller checked the key's length");
    // SAFETY: who made this kernel's row of the table runs it only where the processor has the instructions.
    SecretBox::new(|| unsafe { Schedules::new(key) })
}
