//! What the test programs share: a real `sealblk serve` in its own process, volumes made by the real
//! tools, and a vhost-user front-end with a virtio-blk driver that does what it is told, right or wrong.
//!
//! The driver takes nothing from the crate under test nor from the vhost crates under it: message numbers, layouts
//! and ring arithmetic are written down here again from the vhost-user and virtio 1.2 specifications, so that a
//! mistake shared by device and driver cannot hide. Only the mapping of memory comes from vm-memory.
//!
//! Every wait has a deadline: a device that hangs fails its test.
#![allow(clippy::new_without_default)] // `new` of these starts servers and makes disks.

pub mod aes;
pub mod agent;
pub mod driver;
pub mod frontend;
pub mod fuse;
#[cfg(target_arch = "x86_64")]
pub mod inside;
pub mod memory;
pub mod mistakes;
pub mod process;
pub mod queue;
pub mod secrets;
pub mod serve;
pub mod storage;
pub mod swtpm;
pub mod volume;

use std::time::Duration;

/// How long anything that must happen may take. Long, since it is only reached by a failing test on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Bytes that look random and differ everywhere, the same for the same seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8))
        .flat_map(|_| random.number().to_le_bytes())
        .collect();
    bytes.truncate(len);
    bytes
}

/// A small generator (splitmix64): what a test did can be done again. SEALBLK_TEST_SEED=N makes tests do other things.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        let other = std::env::var("SEALBLK_TEST_SEED").map_or(0, |seed| seed.parse().expect("a number"));
        Random(seed ^ other << 32)
    }

    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// Cuts `len` bytes into fewer than 110 pieces, some of one byte: where each is, and its length.
    pub fn pieces(&mut self, len: usize) -> Vec<(u64, usize)> {
        let longest = 400.max(len as u64 / 20);
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < len {
            let most = if self.below(3) == 0 { 1 } else { longest };
            let rest = if pieces.len() < 100 {
                1 + self.below(most) as usize
            } else {
                len
            };
            let piece = rest.min(len - at);
            pieces.push((at as u64, piece));
            at += piece;
        }
        pieces
    }
}
