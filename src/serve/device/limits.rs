//! What a guest and a front-end may ask of the device at most: all that bounds the memory and the time that they cost.

use std::time::Duration;

use crate::cipher::Sector;

/// The most regions of guest memory: what vhost-user-backend tells the front-end (GET_MAX_MEM_SLOTS).
pub(super) const MAX_REGIONS: usize = 509;

/// The largest queue that a driver may set up, in descriptors.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// The most requests that one queue has in hand; more wait in the available ring.
pub(super) const MAX_REQUESTS: u16 = 256;

/// The most descriptors that a chain may have: eight times what `seg_max` tells the driver.
pub(super) const MAX_DESCRIPTORS: usize = 1024;

/// The most buffers of a request (`seg_max`): what fits QEMU's default queue of 128 beside header and status.
pub(super) const SEG_MAX: u32 = 126;

/// The longest buffer of a request, in bytes (`size_max`).
pub(super) const SIZE_MAX: u32 = 1 << 20;

/// The longest data of a request, in bytes: what `size_max` and `seg_max` come to.
pub(super) const MAX_REQUEST: u32 = SIZE_MAX * SEG_MAX;

/// The most segments that one discard or write-zeroes request may have.
pub(super) const MAX_SECTOR_RANGES: u8 = 16;

/// The most sectors that one segment of a discard may cover: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// The most sectors that one segment of a write-zeroes may cover: 4 MiB, since each is a sector to encrypt and write, and
/// a queue that is stopped finishes what it has begun.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 13;

/// The most sectors of one piece of a request, 128 KiB: large requests are cut, so that cipher and storage work at the same
/// time.
pub(super) const MAX_PIECE_SECTORS: u64 = (128 << 10) / Sector::LEN;

/// The pages of a queue's pool, unless the operator sets them: room for 64 of the largest pieces, or for all requests of a few
/// pages. With less, storage idles while the driver has eight requests of 1 MiB in flight.
pub const DEFAULT_POOL_PAGES: u32 = 2048;

/// How long a ring that is stopped waits for storage, unless the operator sets it: longer than a path of a SAN or a server of NFS takes to
/// fail over. QEMU does nothing else meanwhile.
pub const DEFAULT_STOP_LIMIT: Duration = Duration::from_secs(30);

/// The longest that a worker looks for work before it sleeps, unless the operator sets it: that of QEMU's I/O threads.
pub const DEFAULT_POLL_MAX: Duration = Duration::from_micros(32);
