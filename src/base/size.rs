//! Lengths on storage as lengths in memory.

/// `len` bytes, which are or will be in memory. sealblk runs on 64-bit machines alone, where every length on storage is one in memory,
/// too.
#[expect(clippy::cast_possible_truncation, reason = "see the assertion")]
pub const fn in_memory(len: u64) -> usize {
    const { assert!(usize::BITS == u64::BITS, "sealblk needs a 64-bit machine") };
    len as usize
}
