//! The AES-256 key schedule (FIPS 197, section 5.2) and that of the equivalent inverse cipher (section 5.3.5), by the
//! instructions made for it.

use std::arch::x86_64::{
    __m128i, _mm_aesimc_si128, _mm_aeskeygenassist_si128, _mm_shuffle_epi32, _mm_slli_si128, _mm_xor_si128,
};

use super::super::KEY_LEN;

/// Rounds of AES-256; there is one round key more.
pub(super) const ROUNDS: usize = 14;

/// The round keys of one key in one direction.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Schedule {
    round: [u128; ROUNDS + 1],
    /// c of the kernels' header: what makes V ⊗ α that of the next block.
    step: u128,
}

/// The schedules of an XTS key.
#[repr(C)]
pub(super) struct Schedules {
    pub(super) encrypt: Schedule,
    pub(super) decrypt: Schedule,
    pub(super) tweak: Schedule,
}

impl Schedules {
    /// To be called where the stack and the vector registers are wiped afterwards.
    #[target_feature(enable = "aes")]
    pub(super) fn new(key: &[u8; KEY_LEN]) -> Self {
        let (data, tweak) = key.split_at(KEY_LEN / 2);
        let encrypt = expand(data);
        Self {
            encrypt: Schedule::new(encrypt),
            decrypt: Schedule::new(inverse(encrypt)),
            tweak: Schedule::new(expand(tweak)),
        }
    }
}

impl Schedule {
    fn new(round: [u128; ROUNDS + 1]) -> Self {
        let last = round[ROUNDS];
        let times_alpha = (last << 1) ^ (0x87 & (last >> 127).wrapping_neg());
        Self {
            round,
            step: last ^ times_alpha,
        }
    }
}

#[target_feature(enable = "aes")]
fn expand(key: &[u8]) -> [u128; ROUNDS + 1] {
    let half = |half: &[u8]| u128::from_le_bytes(half.try_into().expect("half of an AES-256 key"));
    let mut round = [0; ROUNDS + 1];
    (round[0], round[1]) = (half(&key[..16]), half(&key[16..]));
    // The round constant is part of the instruction.
    macro_rules! assist {
        ($i:expr, $constant:literal, $word:literal) => {{
            let word = _mm_aeskeygenassist_si128::<$constant>(vector(round[$i - 1]));
            round[$i] = next(round[$i - 2], _mm_shuffle_epi32::<$word>(word));
        }};
    }
    macro_rules! pair {
        ($i:expr, $constant:literal) => {
            assist!($i, $constant, 0xff);
            assist!($i + 1, 0, 0xaa);
        };
    }
    pair!(2, 0x01);
    pair!(4, 0x02);
    pair!(6, 0x04);
    pair!(8, 0x08);
    pair!(10, 0x10);
    pair!(12, 0x20);
    assist!(14, 0x40, 0xff);
    round
}

/// Each word of the new key is the one before it, added to the old key's; `word` goes into the first.
#[target_feature(enable = "aes")]
fn next(old: u128, word: __m128i) -> u128 {
    let mut key = vector(old);
    key = _mm_xor_si128(key, _mm_slli_si128::<4>(key));
    key = _mm_xor_si128(key, _mm_slli_si128::<8>(key));
    number(_mm_xor_si128(key, word))
}

#[target_feature(enable = "aes")]
fn inverse(mut round: [u128; ROUNDS + 1]) -> [u128; ROUNDS + 1] {
    round.reverse();
    for key in &mut round[1..ROUNDS] {
        *key = number(_mm_aesimc_si128(vector(*key)));
    }
    round
}

fn vector(number: u128) -> __m128i {
    // SAFETY: any 16 bytes are a value of either type.
    unsafe { std::mem::transmute(number) }
}

fn number(vector: __m128i) -> u128 {
    // SAFETY: any 16 bytes are a value of either type.
    unsafe { std::mem::transmute(vector) }
}
