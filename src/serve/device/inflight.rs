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
//!      8      2  version: 1 while a worker serves the queue, or has died, or was stopped while requests wait for storage; else 0
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

#![allow(unsafe_code)] // A part is a structure in mapped memory.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use sealblk_base::blame::Blame;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use super::limits::MAX_QUEUE_SIZE;

/// The parts of all queues of a device.
#[derive(Clone, Debug)]
pub(super) struct InflightMemory {
    map: Arc<MmapRegion>,
    /// How many queues have a part.
    queues: u16,
    /// Whether it ends with the session.
    is_private: bool,
}

/// The part of a queue, as in the module's header. All fields are atomic, since the front-end has the memory as well. There is room for
/// the largest queue: QEMU 10 tells the size of its property `queue-size`, and lets firmware set up a larger queue.
#[repr(C, align(64))]
#[derive(Debug)]
struct Part {
    _features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
    descriptors: [Descriptor; MAX_QUEUE_SIZE as usize],
}

/// What is kept of a descriptor.
#[repr(C)]
#[derive(Debug)]
struct Descriptor {
    inflight: AtomicU8,
    _padding: [AtomicU8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

/// The layout is the specification's.
const _: () = {
    assert!(offset_of!(Part, version) == 8 && offset_of!(Part, desc_num) == 10);
    assert!(offset_of!(Part, last_batch_head) == 12 && offset_of!(Part, used_idx) == 14);
    assert!(offset_of!(Part, descriptors) == 16 && size_of::<Descriptor>() == 16);
    assert!(offset_of!(Descriptor, next) == 6 && offset_of!(Descriptor, counter) == 8);
};

/// The length of memory for `queues` queues.
pub(super) fn len_for(queues: u16) -> usize {
    size_of::<Part>() * usize::from(queues)
}

impl InflightMemory {
    /// Memory of this process alone.
    ///
    /// # Errors
    /// If memory is exhausted.
    pub(super) fn private(queues: u16) -> Result<Self, MapError> {
        Ok(Self {
            map: Arc::new(MmapRegion::new(len_for(queues))?),
            queues,
            is_private: true,
        })
    }

    /// Makes memory for a front-end to keep (VHOST_USER_GET_INFLIGHT_FD). No process can make it shorter.
    ///
    /// # Errors
    /// If descriptors or memory are exhausted.
    pub(super) fn create(queues: u16) -> Result<OwnedFd, MapError> {
        let create = || -> rustix::io::Result<OwnedFd> {
            let file = memfd_create(
                "sealblk-inflight",
                MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
            )?;
            ftruncate(&file, len_for(queues) as u64)?;
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file)
        };
        create().map_err(|error| MapError::Create(error.into()))
    }

    /// The memory that a front-end has kept, which lies `offset` bytes into `file` (VHOST_USER_SET_INFLIGHT_FD).
    ///
    /// # Errors
    /// If it is not what [`InflightMemory::create`] makes, or cannot be mapped.
    pub(super) fn map(file: impl AsFd, offset: u64, queues: u16) -> Result<Self, MapError> {
        // What a process cuts off is a SIGBUS for the others.
        let seals = fcntl_get_seals(&file).map_err(|_| MapError::Unsealed)?;
        let size = fstat(&file).map_err(|_| MapError::Unsealed)?.st_size;
        let end = offset.checked_add(len_for(queues) as u64);
        let is_within = end.is_some_and(|end| u64::try_from(size).is_ok_and(|size| end <= size));
        if !seals.contains(SealFlags::SHRINK) || !is_within {
            return Err(MapError::Unsealed);
        }
        let file = file.as_fd().try_clone_to_owned().map_err(MapError::Create)?;
        let place = FileOffset::new(File::from(file), offset);
        Ok(Self {
            map: Arc::new(MmapRegion::from_file(place, len_for(queues))?),
            queues,
            is_private: false,
        })
    }

    /// Whether it ends with the session: the front-end keeps none.
    pub(super) fn is_private(&self) -> bool {
        self.is_private
    }

    /// The part of a queue.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn of_queue(&self, index: usize) -> Result<Inflight, InflightError> {
        if index >= usize::from(self.queues) {
            return Err(InflightError::NoPart { queues: self.queues });
        }
        Ok(Inflight {
            map: Arc::clone(&self.map),
            index,
            size: 0,
            counter: 0,
        })
    }
}

/// There is no memory that tracks requests in flight.
#[derive(Debug, thiserror::Error)]
pub(super) enum MapError {
    #[error(
        "the memory that tracks requests in flight is too small, or can be cut off: sealblk has not made it"
    )]
    Unsealed,
    #[error("memory that tracks requests in flight cannot be made")]
    Create(#[source] io::Error),
    #[error("the memory that tracks requests in flight cannot be mapped")]
    Map(#[from] MmapRegionError),
}

impl MapError {
    /// Where the cause lies.
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::Unsealed => Blame::FrontEnd,
            // Or what a front-end has said of its memory.
            Self::Create(_) | Self::Map(_) => Blame::Host,
        }
    }
}

/// The part of one queue.
#[derive(Debug)]
pub(super) struct Inflight {
    map: Arc<MmapRegion>,
    /// Which of those in `map`; it has as many.
    index: usize,
    /// How many descriptors the queue has.
    size: u16,
    /// The number of the head that is taken next.
    counter: u64,
}

/// A queue cannot be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InflightError {
    #[error("the front-end tracks requests in flight for {queues} queues")]
    NoPart { queues: u16 },
    #[error("it has {size} descriptors, and requests in flight are tracked for {MAX_QUEUE_SIZE} at most")]
    TooLarge { size: u16 },
    #[error("what an earlier process has left in flight is not known: {0}; reset the guest")]
    Unknown(&'static str),
}

/// What an earlier process has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    /// The heads in flight, in the order in which they were taken.
    pub heads: Vec<u16>,
    /// How far it has read the available ring.
    pub next_avail: u16,
}

impl Inflight {
    /// Begins with a queue of `size` descriptors, whose index in the used ring is `used`. Gives what an earlier process has left; nothing if
    /// none has served the queue, or the last one has finished all.
    ///
    /// # Errors
    /// [`InflightError`]; nothing was changed.
    pub(super) fn begin(&mut self, size: u16, used: u16) -> Result<Option<Left>, InflightError> {
        if size > MAX_QUEUE_SIZE {
            return Err(InflightError::TooLarge { size });
        }
        self.size = size;
        let part = self.part();
        match part.version.load(Ordering::Acquire) {
            0 => {
                for descriptor in part.descriptors.iter().take(size.into()) {
                    set8(&descriptor.inflight, 0);
                }
                set16(&part.desc_num, size);
                set16(&part.last_batch_head, 0);
                // Not 0: this queue may have been served elsewhere, and the difference would count as given back.
                set16(&part.used_idx, used);
                set16(&part.version, 1);
                Ok(None)
            }
            1 => self.take_over(used).map(Some),
            _ => Err(InflightError::Unknown("its record has another version")),
        }
    }

    /// Finds what a process has left that ended at any instruction.
    fn take_over(&mut self, used: u16) -> Result<Left, InflightError> {
        let part = self.part();
        if part.desc_num.load(Ordering::Relaxed) != self.size {
            return Err(InflightError::Unknown("its record is of a queue of another size"));
        }
        // In the used ring, and perhaps in flight all the same: it ended before it took note of that.
        let mut given_back = Vec::new();
        let mut head = part.last_batch_head.load(Ordering::Relaxed);
        for _ in 0..used.wrapping_sub(part.used_idx.load(Ordering::Relaxed)) {
            if head >= self.size || given_back.len() == usize::from(self.size) {
                return Err(InflightError::Unknown("its record does not fit its used ring"));
            }
            given_back.push(head);
            head = part.of(head).next.load(Ordering::Relaxed);
        }
        for head in given_back {
            set8(&part.of(head).inflight, 0);
        }
        set16(&part.used_idx, used);

        let mut taken: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| part.of(head).inflight.load(Ordering::Relaxed) != 0)
            .map(|head| (part.of(head).counter.load(Ordering::Relaxed), head))
            .collect();
        taken.sort_unstable();
        let counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let heads: Vec<u16> = taken.into_iter().map(|(_, head)| head).collect();
        let in_flight = u16::try_from(heads.len()).map_err(|_| InflightError::Unknown("it has too many"))?;
        self.counter = counter;
        Ok(Left {
            heads,
            next_avail: used.wrapping_add(in_flight),
        })
    }

    /// Takes `head`, unless it is in flight already, or no head of this queue.
    pub(super) fn take(&mut self, head: u16) -> bool {
        if head >= self.size {
            return false;
        }
        let descriptor = self.part().of(head);
        if descriptor.inflight.load(Ordering::Relaxed) != 0 {
            return false;
        }
        set64(&descriptor.counter, self.counter);
        set8(&descriptor.inflight, 1);
        self.counter = self.counter.wrapping_add(1);
        true
    }

    /// Takes note of `head`, which is about to be put into the used ring.
    pub(super) fn giving_back(&self, head: u16) {
        let part = self.part();
        set16(&part.of(head).next, part.last_batch_head.load(Ordering::Relaxed));
        set16(&part.last_batch_head, head);
    }

    /// Takes note that `head` is in the used ring, whose index is `used` by now.
    pub(super) fn given_back(&self, head: u16, used: u16) {
        let part = self.part();
        set8(&part.of(head).inflight, 0);
        set16(&part.used_idx, used);
    }

    /// Ends. What is in flight still is left to the next one, in this process or in another.
    pub(super) fn end(&self) {
        let part = self.part();
        let is_in_flight = |head| part.of(head).inflight.load(Ordering::Relaxed) != 0;
        if !(0..self.size).any(is_in_flight) {
            set16(&part.version, 0);
        }
    }

    /// Whether something may be left in flight; nothing of the queue is served.
    pub(super) fn may_have_left(&self) -> bool {
        self.part().version.load(Ordering::Acquire) != 0
    }

    fn part(&self) -> &Part {
        let parts = self.map.as_ptr().cast::<Part>();
        // SAFETY: `map` begins at a page and has more than `index` parts, so the pointer is aligned and stays within it.
        let part = unsafe { parts.add(self.index) };
        // SAFETY: `map` lives as long as `self`, cannot become shorter, and is only read and written by atomics, which take any bits.
        unsafe { &*part }
    }
}

impl Part {
    /// What is kept of the descriptor `head`, which is below the queue's size.
    fn of(&self, head: u16) -> &Descriptor {
        &self.descriptors[usize::from(head)]
    }
}

// Each write can be the last one of this process. Release, so that all before it were done as well.

fn set8(cell: &AtomicU8, value: u8) {
    if cut::goes_on() {
        cell.store(value, Ordering::Release);
    }
}

fn set16(cell: &AtomicU16, value: u16) {
    if cut::goes_on() {
        cell.store(value, Ordering::Release);
    }
}

fn set64(cell: &AtomicU64, value: u64) {
    if cut::goes_on() {
        cell.store(value, Ordering::Release);
    }
}

#[cfg(not(test))]
mod cut {
    /// Whether the next write is done.
    pub(super) fn goes_on() -> bool {
        true
    }
}

/// Ends the process before a write, as far as memory that outlives it can tell.
#[cfg(test)]
mod cut {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
    }

    /// Lets `writes` more writes through.
    pub(super) fn after(writes: usize) {
        LEFT.set(writes);
    }

    /// Whether the next write is done.
    pub(super) fn goes_on() -> bool {
        let left = LEFT.get();
        LEFT.set(left.saturating_sub(1));
        left > 0
    }

    /// Whether no more writes are done.
    pub(super) fn is_over() -> bool {
        LEFT.get() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u16 = 4;

    /// What outlives a process: the record, both rings' indexes, and what came into the used ring.
    struct Shared {
        record: InflightMemory,
        offered: Vec<u16>,
        used: Vec<u16>,
    }

    impl Shared {
        fn new() -> Self {
            Self {
                record: InflightMemory::private(1).unwrap(),
                offered: Vec::new(),
                used: Vec::new(),
            }
        }

        fn used_index(&self) -> u16 {
            u16::try_from(self.used.len()).unwrap()
        }
    }

    /// A process that serves the queue, as the worker does.
    struct Process {
        record: Inflight,
        next_avail: usize,
        in_flight: Vec<u16>,
    }

    impl Process {
        fn begin(shared: &Shared) -> Self {
            let mut record = shared.record.of_queue(0).unwrap();
            let left = record.begin(SIZE, shared.used_index()).unwrap();
            // The front-end says where it starts if the record does not: at what is in the used ring.
            let (in_flight, next_avail) = match left {
                Some(left) => (left.heads, left.next_avail.into()),
                None => (Vec::new(), shared.used.len()),
            };
            Self {
                record,
                next_avail,
                in_flight,
            }
        }

        fn take(&mut self, shared: &Shared) {
            if let Some(&head) = shared.offered.get(self.next_avail) {
                self.next_avail += 1;
                assert!(self.record.take(head));
                self.in_flight.push(head);
            }
        }

        fn give_back(&mut self, shared: &mut Shared, which: usize) {
            if self.in_flight.is_empty() {
                return;
            }
            let head = self.in_flight.remove(which % self.in_flight.len());
            self.record.giving_back(head);
            if cut::goes_on() {
                shared.used.push(head);
            }
            self.record.given_back(head, shared.used_index());
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Take,
        GiveBack(usize),
        /// The queue is stopped, drained, and started again.
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Take),
            4 => (0..usize::from(SIZE)).prop_map(Step::GiveBack),
            1 => Just(Step::Restart),
        ]
    }

    /// Serves by `steps`, while the driver offers each head again as soon as it has it back. Tells whether all writes were let
    /// through.
    fn serve(shared: &mut Shared, steps: &[Step], writes: usize) -> bool {
        cut::after(writes);
        let mut process = Process::begin(shared);
        for step in steps {
            // Heads that are with the driver.
            for head in 0..SIZE {
                let count = |heads: &[u16]| heads.iter().filter(|other| **other == head).count();
                if count(&shared.offered) == count(&shared.used) {
                    shared.offered.push(head);
                }
            }
            match step {
                Step::Take => process.take(shared),
                Step::GiveBack(which) => process.give_back(shared, *which),
                Step::Restart => {
                    while !process.in_flight.is_empty() {
                        process.give_back(shared, 0);
                    }
                    process.record.end();
                    process = Process::begin(shared);
                }
            }
            // A process that has ended does nothing more; the driver may.
            if cut::is_over() {
                return false;
            }
        }
        true
    }

    /// Each head that was offered is in the used ring, in flight, or still to be taken, and only one of these.
    fn check(shared: &Shared) {
        cut::after(usize::MAX);
        let process = Process::begin(shared);
        let mut owned = shared.used.clone();
        owned.extend(&process.in_flight);
        owned.extend(&shared.offered[process.next_avail..]);
        let mut offered = shared.offered.clone();
        owned.sort_unstable();
        offered.sort_unstable();
        assert_eq!(owned, offered, "next_avail {}", process.next_avail);
        // In the order in which the driver offered them.
        let taken = &shared.offered[..process.next_avail];
        let place = |head: &u16| taken.iter().rposition(|other| other == head).unwrap();
        assert!(
            process.in_flight.is_sorted_by_key(place),
            "{:?} of {taken:?}",
            process.in_flight
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

        /// The rules against "exactly once": a process is killed before each of its writes, its successor too, and what is then left is
        /// what was offered.
        #[test]
        fn a_kill_before_any_write_loses_and_doubles_nothing(
            first in prop::collection::vec(step(), 0..24),
            second in prop::collection::vec(step(), 0..12),
            second_writes in 0_usize..40,
        ) {
            for writes in 0.. {
                let mut shared = Shared::new();
                let whole = serve(&mut shared, &first, writes);
                check(&shared);
                serve(&mut shared, &second, second_writes);
                check(&shared);
                if whole {
                    break;
                }
            }
        }
    }
}
