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

pub use inputs::Random;

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
