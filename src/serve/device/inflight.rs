//! Which chains of a virtqueue are in flight, in memory that outlives this process (vhost-user specification, "Inflight I/O
//! tracking").
//!
//! The front-end keeps the memory, and gives it to the next back-end. That finds in it which chains the one before had taken and
//! not given back, in the order in which they were taken, and takes them again: each is answered once, whenever the one before
//! was killed. A front-end that keeps no such memory gets the same from memory of this process, which ends with it.
//!
//! # The memory
//!
//! A queue has a part of its own, which begins at a multiple of 64 bytes. All numbers are in the host's byte order.
//!
//! ```text
//! offset  bytes
//!      0      8  features: none
//!      8      2  version: 1 while a worker serves the queue, or has died; else 0
//!     10      2  desc_num: the queue's size
//!     12      2  last_batch_head: the head that was given back last
//!     14      2  used_idx: the used ring's index, as far as this memory takes it into account
//!     16  16 n   for each descriptor:
//!                    0  1  inflight: 1 while it is the head of a chain in flight
//!                    6  2  next: the head that was given back before this one
//!                    8  8  counter: the order in which heads were taken
//! ```
//!
//! # The order of writes
//!
//! ```text
//! take      counter, then inflight = 1; before any I/O
//! give back next and last_batch_head; the used ring's element, then its index; inflight = 0; used_idx
//! ```
//!
//! So after a kill, the number of heads in flight and the used ring's index give how far the available ring was read. This holds
//! because a head is taken only in the available ring's order, and because each head that was taken is in flight or in the used
//! ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vm_memory::mmap::MmapRegionError;
use vm_memory::{AtomicInteger, MmapRegion, VolatileMemory};

/// The parts of all queues of a device.
#[derive(Clone, Debug)]
pub(super) struct InflightMemory {
    map: Arc<MmapRegion>,
    /// The most descriptors that a queue may have.
    queue_size: u16,
}

impl InflightMemory {
    /// Memory of this process alone, for `queues` queues of `queue_size` descriptors at most.
    ///
    /// # Errors
    /// If memory is exhausted.
    pub(super) fn private(queues: usize, queue_size: u16) -> Result<Self, MapError> {
        let map = MmapRegion::new(part(queue_size) * queues).map_err(MapError)?;
        Ok(Self {
            map: Arc::new(map),
            queue_size,
        })
    }

    /// The part of a queue; none if there is none.
    pub(super) fn of_queue(&self, index: usize) -> Option<Inflight> {
        let len = part(self.queue_size);
        let at = index.checked_mul(len)?;
        (at.checked_add(len)? <= self.map.size()).then(|| Inflight {
            map: Arc::clone(&self.map),
            at,
            capacity: self.queue_size,
            size: 0,
            counter: 0,
        })
    }
}

/// The memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
#[error("the memory that tracks requests in flight cannot be mapped")]
pub(super) struct MapError(#[source] MmapRegionError);

/// The length of a queue's part.
fn part(queue_size: u16) -> usize {
    (DESCRIPTORS + DESCRIPTOR * usize::from(queue_size)).next_multiple_of(64)
}

/// The part of one queue.
#[derive(Debug)]
pub(super) struct Inflight {
    map: Arc<MmapRegion>,
    /// Where it begins.
    at: usize,
    /// How many descriptors it has room for, and how many the queue has.
    capacity: u16,
    size: u16,
    /// The number of the head that is taken next.
    counter: u64,
}

const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const DESCRIPTORS: usize = 16;

/// The length of what is kept of a descriptor, and the offsets in it.
const DESCRIPTOR: usize = 16;
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// A queue cannot be tracked.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(super) enum InflightError {
    #[error("it has {size} descriptors, and requests in flight are tracked for {capacity} at most")]
    TooLarge { size: u16, capacity: u16 },
}

impl Inflight {
    /// Begins with a queue of `size` descriptors whose used index is `used`.
    pub(super) fn begin(&mut self, size: u16, used: u16) -> Result<(), InflightError> {
        let capacity = self.capacity;
        if size > capacity {
            return Err(InflightError::TooLarge { size, capacity });
        }
        self.size = size;
        for head in 0..size {
            self.inflight(head).store(0, Ordering::Relaxed);
        }
        self.number(DESC_NUM).store(size, Ordering::Relaxed);
        self.number(LAST_BATCH_HEAD).store(0, Ordering::Relaxed);
        self.number(USED_IDX).store(used, Ordering::Relaxed);
        self.number(VERSION).store(1, Ordering::Release);
        Ok(())
    }

    /// Takes `head`, unless it is in flight already, or no head of this queue.
    pub(super) fn take(&mut self, head: u16) -> bool {
        if head >= self.size || self.inflight(head).load(Ordering::Relaxed) != 0 {
            return false;
        }
        self.cell::<AtomicU64>(descriptor(head) + COUNTER)
            .store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.inflight(head).store(1, Ordering::Release);
        true
    }

    /// Takes note of `head`, which is about to be put into the used ring.
    pub(super) fn giving_back(&self, head: u16) {
        let last = self.number(LAST_BATCH_HEAD);
        self.cell::<AtomicU16>(descriptor(head) + NEXT)
            .store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        last.store(head, Ordering::Relaxed);
    }

    /// Takes note that `head` is in the used ring, whose index is `used` by now.
    pub(super) fn given_back(&self, head: u16, used: u16) {
        self.inflight(head).store(0, Ordering::Release);
        self.number(USED_IDX).store(used, Ordering::Release);
    }

    /// Ends: nothing is in flight.
    pub(super) fn end(&self) {
        self.number(VERSION).store(0, Ordering::Release);
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        self.cell(descriptor(head) + INFLIGHT)
    }

    fn number(&self, offset: usize) -> &AtomicU16 {
        self.cell(offset)
    }

    fn cell<T: AtomicInteger>(&self, offset: usize) -> &T {
        self.map
            .get_atomic_ref(self.at + offset)
            .expect("the part lies within the memory, and heads are below the size")
    }
}

/// Where what is kept of a descriptor begins.
fn descriptor(head: u16) -> usize {
    DESCRIPTORS + DESCRIPTOR * usize::from(head)
}
