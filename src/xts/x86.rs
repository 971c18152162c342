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
//! - **The tweaks of many data units are encrypted together**: 8 vectors of them at a time, before their data.
//! - **The first 128 blocks of a unit** (all 32 of a 512-byte one) get theirs from its T₀ = E(key2, i) in two ways, since
//!   the carry-less product competes with the rounds for units of the processor. Those of each group's first vectors come
//!   one from the other, in general registers, which have nothing else to do: V ⊗ α ⊕ c with c = k₁₄ ⊕ k₁₄ ⊗ α,
//!   a constant of the key. With one block in a vector, all do. The others come straight from a tweak T = l + h x⁶⁴, T₀ or T₀ ⊗ α⁶⁴: with
//!   s = h ≫ (64 − j), T ⊗ αʲ is T shifted left by j bits, plus s·(x⁷ + x² + x + 1). [`Tables`] has the shifts.
//! - **Later blocks** get theirs from those 128 before: α¹²⁸ = α⁷ + α² + α + 1, so that the tweak of block j + 128 is the
//!   sum of those of blocks j + 7, j + 2, j + 1 and j, and V is the sum of these V and k₁₄.
//! - **Tweaks are made during rounds**: 8 vectors (a *group*) are in flight at a time, which hides an instruction's
//!   latency; between their rounds are made the V of the next group.
//!
//! Each byte of the source is read once. Branches and addresses depend only on the number and size of the units. The
//! rounds are assembly, so that no compiler puts round keys or plaintext on the stack; V, from which a round key follows,
//! lies in a [`Workspace`], in the key arena. The registers are wiped at the end.
#![allow(unsafe_code)] // Assembly, on raw memory.

mod schedule;
pub(super) mod scratch;

use std::arch::asm;
use std::arch::x86_64::_mm_sfence;
use std::mem::offset_of;

use super::kernel::{Kernel, Reader, Units, Workspace};
use schedule::Schedules;
use scratch::{SHIFTS, Scratch, UNITS};
use sealblk_secmem::arena::{ArenaError, SecretBox, SecretBytes};

/// The most data units whose tweaks are encrypted together: 8 vectors of 4.
const TWEAKS: usize = 32;

/// What the code is assembled for.
const ENCRYPT: u8 = 0;
const ENCRYPT_PAST_CACHE: u8 = 1;
const DECRYPT: u8 = 2;

/// Constants of the code, 16 bytes for each block.
#[repr(C, align(64))]
struct Tables {
    /// j for block j, in both halves.
    left: [[u64; 2]; SHIFTS],
    /// 64 − j for block j, in both halves.
    right: [[u64; 2]; SHIFTS],
    /// x⁷ + x² + x + 1, and the same without 1 for where that part is added by itself.
    polynomial: [u64; 2],
    /// How much each unit's tweak is more than the first one's, for units of 512 and of 4096 bytes.
    count: [[[u64; 2]; TWEAKS]; 2],
}

static TABLES: Tables = {
    let mut tables = Tables {
        left: [[0; 2]; SHIFTS],
        right: [[0; 2]; SHIFTS],
        polynomial: [0x87, 0x86],
        count: [[[0; 2]; TWEAKS]; 2],
    };
    let mut i = 0;
    while i < SHIFTS {
        tables.left[i] = [i as u64; 2];
        tables.right[i] = [64 - i as u64; 2];
        i += 1;
    }
    i = 0;
    while i < TWEAKS {
        tables.count[0][i][0] = i as u64;
        tables.count[1][i][0] = 8 * i as u64;
        i += 1;
    }
    tables
};

/// A kernel for one width of vectors: registers 0 to 7 are the blocks in flight.
macro_rules! kernel {
    (
        $name:ident, expand: $expand:ident, vector: $bytes:literal bytes of blocks $blocks:literal in $r:literal,
        load: $load:literal, broadcast: $broadcast:literal, xor: $xor:literal, xor3: $xor3:ident,
        chained: $chained:literal, at first: $at_first:literal
    ) => {
        struct $name(SecretBox<Schedules>);

        pub(super) fn $expand(key: &SecretBytes) -> Result<Box<dyn Kernel>, ArenaError> {
            Ok(Box::new($name(schedules(key)?)))
        }

        impl Kernel for $name {
            unsafe fn encrypt(
                &self,
                units: Units,
                source: *const u8,
                target: *mut u8,
                reader: Reader,
                workspace: &mut Workspace,
            ) {
                // Stores past the cache take aligned vectors only.
                if reader == Reader::Device && target.addr().is_multiple_of($bytes) {
                    // SAFETY: the caller's promise, passed on, and the target is aligned.
                    unsafe { Self::work::<ENCRYPT_PAST_CACHE>(&self.0, units, source, target, workspace) }
                } else {
                    // SAFETY: the caller's promise, passed on.
                    unsafe { Self::work::<ENCRYPT>(&self.0, units, source, target, workspace) }
                }
            }

            unsafe fn decrypt(
                &self,
                units: Units,
                source: *const u8,
                target: *mut u8,
                workspace: &mut Workspace,
            ) {
                // SAFETY: the caller's promise, passed on.
                unsafe { Self::work::<DECRYPT>(&self.0, units, source, target, workspace) }
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
                Workspace(scratch): &mut Workspace,
            ) {
                scratch.prepare(units.size, Self::GROUP);
                let mut rest = units;
                while rest.count > 0 {
                    let batch = rest.take_first(UNITS);
                    let mut unstarted = batch;
                    for tweaks in scratch.tweaks.chunks_exact_mut(Self::GROUP / 16) {
                        if unstarted.count == 0 {
                            break;
                        }
                        Self::start(keys, unstarted.take_first(tweaks.len()), tweaks);
                    }
                    let len = batch.size * batch.count;
                    // SAFETY: the tweaks were made by the lines before, the sides are the caller's promise.
                    unsafe { Self::crypt::<OPERATION>(keys, batch.count, scratch, source, target) };
                    (source, target) = (source.wrapping_add(len), target.wrapping_add(len));
                }
            }

            /// Encrypts the units' tweaks: T₀ of each, in two vectors if they are enough, else in eight.
            fn start(keys: &Schedules, units: Units, tweaks: &mut [u128]) {
                assert_eq!(tweaks.len(), Self::GROUP / 16, "a block for each of a group");
                macro_rules! tweaks {
                    ($vectors:literal) => {
                        // SAFETY: it reads the keys, the tables and the first tweak, and writes to `tweaks`, which has
                        // room for a group of them.
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
                                tweaks = in(reg) tweaks.as_mut_ptr(),
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
                scratch: &mut Scratch,
                source: *const u8,
                target: *mut u8,
            ) {
                // Register 8 holds a round key, 9 and 10 the tweak for shifts and its swapped halves, 11 the polynomial,
                // 12 k₀ ⊕ k₁₄, 13 and 14 a V in the making, 15 k₁₄; the general registers `low` and `high` V of the block
                // that is next in the chain.
                macro_rules! next_unit {
                    () => {
                        concat!(
                            $broadcast, " ", $r, "9, [{tweaks}]\n",
                            "vpshufd ", $r, "10, ", $r, "9, 0x4e\n",
                            "lea {shifts}, [rip + {tables}]\n",
                            "mov {low}, [{tweaks}]\n",
                            "mov {high}, [{tweaks} + 8]\n",
                            "xor {low}, [{keys} + 16*14]\n",
                            "xor {high}, [{keys} + 16*14 + 8]\n",
                            "add {tweaks}, 16"
                        )
                    };
                }
                // The tweak for shifts, times α⁶⁴.
                macro_rules! next_64 {
                    () => {
                        concat!(
                            "vpclmulqdq ", $r, "14, ", $r, "9, ", $r, "11, 0x01\n",
                            "vpslldq ", $r, "9, ", $r, "9, 8\n",
                            $xor, " ", $r, "9, ", $r, "9, ", $r, "14\n",
                            "vpshufd ", $r, "10, ", $r, "9, 0x4e\n",
                            "lea {shifts}, [rip + {tables}]"
                        )
                    };
                }
                // The chain's next block.
                macro_rules! step {
                    () => {
                        concat!(
                            "mov {carry}, {high}\n",
                            "sar {carry}, 63\n",
                            "and {carry}, 0x87\n",
                            "xor {carry}, [{keys} + 16*15]\n",
                            "add {low}, {low}\n",
                            "adc {high}, {high}\n",
                            "xor {low}, {carry}\n",
                            "xor {high}, [{keys} + 16*15 + 8]"
                        )
                    };
                }
                // V of vector i of the next group, from the first tweak of its unit.
                macro_rules! first {
                    ($i:literal, $chained_:literal) => {
                        concat!(
                            ".if ", $i, " < ", $chained_, "\n",
                            ".irp block,", $blocks, "\n",
                            "mov [{scratch} + {next} + ", $bytes, "*(", $i, ") + 16*\\block], {low}\n",
                            "mov [{scratch} + {next} + ", $bytes, "*(", $i, ") + 16*\\block + 8], {high}\n",
                            step!(), "\n",
                            ".endr\n",
                            ".else\n",
                            "vpsllvq ", $r, "13, ", $r, "9, [{shifts} + ", $bytes, "*(", $i, ")]\n",
                            "vpsrlvq ", $r, "14, ", $r, "10, [{shifts} + 16*64 + ", $bytes, "*(", $i, ")]\n",
                            $xor, " ", $r, "13, ", $r, "13, ", $r, "14\n",
                            "vpclmulqdq ", $r, "14, ", $r, "14, ", $r, "11, 0x10\n",
                            $xor3!($r, "13", concat!($r, "14"), concat!($r, "15")), "\n",
                            $load, " [{scratch} + {next} + ", $bytes, "*(", $i, ")], ", $r, "13\n",
                            ".endif"
                        )
                    };
                }
                // Goes on to the group after the next one.
                macro_rules! after_first {
                    () => {
                        concat!(
                            "add {shifts}, {group}\n",
                            "mov {low}, [{scratch} + {next} + {group} - 16]\n",
                            "mov {high}, [{scratch} + {next} + {group} - 8]\n",
                            step!()
                        )
                    };
                }
                // V of vector i of the next group, from those of 128 blocks before.
                macro_rules! later {
                    ($i:literal, $chained_:literal) => {
                        concat!(
                            $load, " ", $r, "13, [{scratch} + {next} - 16*128 + ", $bytes, "*(", $i, ")]\n",
                            $load, " ", $r, "14, [{scratch} + {next} - 16*127 + ", $bytes, "*(", $i, ")]\n",
                            $xor3!($r, "13", concat!($r, "14"), concat!("[{scratch} + {next} - 16*126 + ", $bytes, "*(", $i, ")]")), "\n",
                            $xor3!($r, "13", concat!($r, "15"), concat!("[{scratch} + {next} - 16*121 + ", $bytes, "*(", $i, ")]")), "\n",
                            $load, " [{scratch} + {next} + ", $bytes, "*(", $i, ")], ", $r, "13"
                        )
                    };
                }
                macro_rules! after_later {
                    () => { "" };
                }
                // A group of blocks under the V of this group, while those of the next are made.
                macro_rules! group {
                    ($aes:literal, $store:expr, $next:ident, $after:ident) => {
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
                            $next!("\\round-1", $chained), "\n",
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
                            $after!(), "\n",
                            "mov {this:e}, {next:e}\n",
                            "add {next:e}, {group}\n",
                            "and {next:e}, [{scratch} + {last}]"
                        )
                    };
                }
                scratch.count = count as u64;
                macro_rules! all {
                    ($aes:literal, $store:expr, $keys:expr) => {
                        // SAFETY: it reads the source, the keys, the tables and the tweaks, and writes to the target
                        // and to `scratch`.
                        unsafe {
                            asm!(
                                concat!($broadcast, " ", $r, "12, [{keys}]"),
                                concat!($broadcast, " ", $r, "15, [{keys} + 16*14]"),
                                concat!($xor, " ", $r, "12, ", $r, "12, ", $r, "15"),
                                concat!($broadcast, " ", $r, "11, [rip + {tables} + 16*128]"),
                                // The first group's V.
                                next_unit!(),
                                "xor {next:e}, {next:e}",
                                ".irp i,0,1,2,3,4,5,6,7",
                                first!("\\i", $at_first),
                                ".endr",
                                after_first!(),
                                "xor {this:e}, {this:e}",
                                "mov {next:e}, {group}",
                                "mov {run}, [{scratch} + {shifted}]",
                                "mov {again}, [{scratch} + {again_at}]",
                                "dec {run}",
                                "jmp 3f",
                                // Groups before those whose tweaks come from one.
                                "2:",
                                group!($aes, $store, first, after_first),
                                "dec {run}",
                                "3:",
                                "test {run}, {run}",
                                "jnz 2b",
                                "cmp qword ptr [{scratch} + {count}], 0",
                                "je 6f",
                                "dec {again}",
                                "js 4f",
                                next_64!(),
                                "mov {run}, [{scratch} + {shifted}]",
                                "jmp 2b",
                                // Groups before those whose tweaks are sums.
                                "4:",
                                "mov {run}, [{scratch} + {summed}]",
                                "test {run}, {run}",
                                "jz 5f",
                                "7:",
                                group!($aes, $store, later, after_later),
                                "dec {run}",
                                "jnz 7b",
                                // The unit's last group: before one of the next unit, or of none.
                                "5:",
                                next_unit!(),
                                "mov {run:e}, 1",
                                "xor {again:e}, {again:e}",
                                "dec qword ptr [{scratch} + {count}]",
                                "cmovnz {run}, [{scratch} + {shifted}]",
                                "cmovnz {again}, [{scratch} + {again_at}]",
                                "jmp 2b",
                                "6:",
                                "vzeroall",
                                "xor {low:e}, {low:e}",
                                "xor {high:e}, {high:e}",
                                "xor {carry:e}, {carry:e}",
                                group = const Self::GROUP,
                                tables = sym TABLES,
                                count = const offset_of!(Scratch, count),
                                last = const offset_of!(Scratch, last),
                                shifted = const offset_of!(Scratch, shifted),
                                again_at = const offset_of!(Scratch, again),
                                summed = const offset_of!(Scratch, summed),
                                keys = in(reg) $keys,
                                scratch = in(reg) &raw mut *scratch,
                                tweaks = inout(reg) scratch.tweaks.as_ptr() => _,
                                source = inout(reg) source => _,
                                target = inout(reg) target => _,
                                this = out(reg) _,
                                next = out(reg) _,
                                run = out(reg) _,
                                again = out(reg) _,
                                shifts = out(reg) _,
                                low = out(reg) _,
                                high = out(reg) _,
                                carry = out(reg) _,
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
    Avx512, expand: expand_avx512, vector: 64 bytes of blocks "0,1,2,3" in "zmm",
    load: "vmovdqu64", broadcast: "vbroadcasti32x4", xor: "vpxorq", xor3: xor3_evex,
    chained: 3, at first: 0
}
kernel! {
    Avx2, expand: expand_avx2, vector: 32 bytes of blocks "0,1" in "ymm",
    load: "vmovdqu", broadcast: "vbroadcasti128", xor: "vpxor", xor3: xor3_vex,
    chained: 3, at first: 0
}
kernel! {
    AesNi, expand: expand_aes_ni, vector: 16 bytes of blocks "0" in "xmm",
    load: "vmovdqu", broadcast: "vmovdqu", xor: "vpxor", xor3: xor3_vex,
    chained: 8, at first: 8
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
