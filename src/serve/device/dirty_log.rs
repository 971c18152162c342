//! The dirty log: which pages of guest memory were written to, for a front-end that migrates the guest (vhost-user specification,
//! "Migration").
//!
//! The log is the front-end's memory, mapped here: a bit for each page of 4096 bytes of guest address space, from address 0 on.
//! Page `n` is bit `n % 8` of byte `n / 8`. The front-end takes a word of the log and clears it, and then copies the pages that the
//! word names. So a page is marked after it was written to, and with release ordering: if the front-end sees the mark, it copies the
//! new content, and if it has just cleared the word, it finds the mark the next time. All devices of a guest share one log, so a
//! mark changes no other bit.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vhost::vhost_user::message::VhostUserLog;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion, VolatileMemory};

/// The unit of the log, whatever pages guest and host have (`VHOST_LOG_PAGE`).
const PAGE: u64 = 4096;
/// The pages that a byte of the log stands for.
const PAGES_A_BYTE: u64 = 8;

/// A front-end's dirty log.
#[derive(Debug)]
pub(super) struct DirtyLog {
    bytes: MmapRegion,
}

impl DirtyLog {
    /// Maps `file` where the front-end says that the log is. It lies within the file, which cannot shrink.
    ///
    /// # Errors
    /// If there is no room for one more mapping.
    pub(super) fn map(file: impl AsFd, place: VhostUserLog) -> io::Result<Self> {
        let file = File::from(file.as_fd().try_clone_to_owned()?);
        let file = FileOffset::new(file, place.mmap_offset);
        let len = usize::try_from(place.mmap_size).unwrap_or(usize::MAX);
        match MmapRegion::from_file(file, len) {
            Ok(bytes) => Ok(Self { bytes }),
            Err(MmapRegionError::Mmap(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Where it is mapped: its first byte, and how many there are.
    pub(super) fn mapped_at(&self) -> (usize, usize) {
        (self.bytes.as_ptr().addr(), self.bytes.size())
    }

    /// Whether it has a bit for each page of `memory`.
    pub(super) fn covers(&self, memory: &GuestMemoryMmap) -> bool {
        memory.num_regions() == 0 || self.covers_range(memory.last_addr().0, 1)
    }

    /// Whether it has a bit for each page of the `len` bytes from `address` on.
    pub(super) fn covers_range(&self, address: u64, len: u64) -> bool {
        let last = len.checked_sub(1).and_then(|more| address.checked_add(more));
        let byte = last.map(|last| last / PAGE / PAGES_A_BYTE);
        byte.is_some_and(|byte| usize::try_from(byte).is_ok_and(|byte| byte < self.bytes.size()))
    }

    /// Marks the pages of the `len` bytes from `address` on, which were written to. The log covers them.
    pub(super) fn mark(&self, address: u64, len: usize) {
        let Some(more) = (len as u64).checked_sub(1) else {
            return;
        };
        let (first, last) = (address / PAGE, address.saturating_add(more) / PAGE);
        for byte in first / PAGES_A_BYTE..=last / PAGES_A_BYTE {
            let pages = byte * PAGES_A_BYTE..(byte + 1) * PAGES_A_BYTE;
            let above = first.saturating_sub(pages.start);
            let below = (pages.end - 1).saturating_sub(last);
            let bits = (u8::MAX << above) & (u8::MAX >> below);
            let at = usize::try_from(byte).ok();
            if let Some(Ok(byte)) = at.map(|at| self.bytes.get_atomic_ref::<AtomicU8>(at)) {
                byte.fetch_or(bits, Ordering::Release);
            }
        }
    }
}

/// Where writes to guest memory are marked: vm-memory's bitmap of all guest addresses. It is never read.
#[derive(Clone, Debug)]
pub(super) struct Marks {
    log: Arc<DirtyLog>,
    /// Added to a guest address, wrapping, it gives the address in the log: the front-end chooses where writes to a used ring are
    /// marked.
    shift: u64,
}

impl Marks {
    /// Marks writes in `log`, at their guest addresses plus `shift`.
    pub(super) fn new(log: &Arc<DirtyLog>, shift: u64) -> Self {
        Self {
            log: Arc::clone(log),
            shift,
        }
    }

    /// The marks of what is written from `address` on.
    pub(super) fn at(&self, address: GuestAddress) -> MarksAt<'_> {
        MarksAt {
            log: &self.log,
            start: address.0.wrapping_add(self.shift),
        }
    }
}

impl<'m> WithBitmapSlice<'m> for Marks {
    type S = MarksAt<'m>;
}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> MarksAt<'_> {
        self.at(GuestAddress(offset as u64))
    }
}

/// Where writes to a slice of guest memory are marked.
#[derive(Clone, Debug)]
pub(super) struct MarksAt<'m> {
    log: &'m DirtyLog,
    /// The log's address of the slice's first byte.
    start: u64,
}

impl<'m> WithBitmapSlice<'_> for MarksAt<'m> {
    type S = MarksAt<'m>;
}

impl BitmapSlice for MarksAt<'_> {}

impl Bitmap for MarksAt<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.start.wrapping_add(offset as u64), len);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            log: self.log,
            start: self.start.wrapping_add(offset as u64),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    /// A log of `len` bytes.
    pub(in super::super) fn log(len: u64) -> DirtyLog {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        DirtyLog::map(file, VhostUserLog::new(len, 0)).unwrap()
    }

    /// The pages that are marked.
    pub(in super::super) fn marked(log: &DirtyLog) -> Vec<u64> {
        let byte = |at: u64| {
            let byte = log.bytes.get_atomic_ref::<AtomicU8>(at as usize);
            byte.unwrap().load(Ordering::Acquire)
        };
        let pages = 0..8 * log.bytes.size() as u64;
        pages
            .filter(|page| byte(page / 8) >> (page % 8) & 1 == 1)
            .collect()
    }

    proptest! {
        #[test]
        fn each_page_of_a_range_is_marked_and_no_other(ranges in prop::collection::vec((0..200 * PAGE, 0..40 * PAGE), 0..6)) {
            let log = log(32);
            let mut expected = std::collections::BTreeSet::new();
            for (address, len) in ranges {
                log.mark(address, len as usize);
                // A byte of each page, and the last one.
                let bytes = (address..address + len).step_by(PAGE as usize);
                let last = len.checked_sub(1).map(|more| address + more);
                expected.extend(bytes.chain(last).map(|byte| byte / PAGE));
            }
            prop_assert_eq!(marked(&log), expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_mark_beyond_the_log_is_no_mark() {
        let log = log(2);
        log.mark(15 * PAGE + 4095, 2 * PAGE as usize);
        log.mark(u64::MAX - 1, 100);
        log.mark(3 * PAGE, 0);
        assert_eq!(marked(&log), [15]);
    }

    /// As the devices of one guest do, and as the workers of one device do.
    #[test]
    fn marks_by_several_at_a_time_are_all_there() {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 512).unwrap();
        let logs = [(); 2].map(|()| DirtyLog::map(&file, VhostUserLog::new(512, 0)).unwrap());
        std::thread::scope(|scope| {
            for (first, log) in logs.iter().enumerate() {
                let pages = (first as u64..8 * 512).step_by(2);
                scope.spawn(move || pages.for_each(|page| log.mark(page * PAGE, 1)));
            }
        });
        assert_eq!(marked(&logs[0]).len(), 8 * 512);
    }

    #[test]
    fn a_log_covers_memory_if_it_has_a_bit_for_its_last_page() {
        let memory = |start, pages: usize| {
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096), (GuestAddress(start), pages * 4096)])
        };
        assert!(log(2).covers(&memory(8 * PAGE, 8).unwrap()));
        assert!(!log(2).covers(&memory(8 * PAGE, 9).unwrap()));
        assert!(log(1).covers(&GuestMemoryMmap::new()));
        assert!(log(1).covers_range(7 * PAGE, PAGE) && !log(1).covers_range(7 * PAGE, PAGE + 1));
        assert!(!log(1).covers_range(u64::MAX, 2));
    }
}
