//! Guest memory as the data path sees it: ranges of guest addresses, checked once, resolved at each use.
//!
//! A range is one piece for the guest but may be several for us: regions that are adjacent in the guest's address
//! space need not be adjacent in ours, and memory that is plugged in later makes such seams. No Rust reference points into
//! guest memory, since the guest writes to it at any time.
//!
//! A worker has guest memory as [`Memory`], which does not give out its mapping. So there are two ways to write to it: by
//! the methods of vm-memory, as virtio-queue does for the used ring, and by [`Memory::fill`], as the cipher does. With a dirty log,
//! both mark what was written ([`super::dirty_log`]). Chains and the available ring are read by [`Readable`], which no log slows down
//! and nothing can write to. The protocol handler has the mapping too, and reads the used ring's index only.

#![allow(unsafe_code)] // A slice of guest memory becomes one that marks what is written to it.

use std::iter::FusedIterator;
use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap, Permissions,
    VolatileSlice,
};

use super::dirty_log::{DirtyLog, Marks};

/// The guest's memory, as the front-end changes it.
pub(super) type SharedMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Pieces of guest memory; as many as most requests have fit without an allocation.
pub(super) type Pieces<'m> = SmallVec<[VolatileSlice<'m>; 64]>;

/// What an operator does about guest memory that is not shared with us, or not all of it.
pub(super) const HOW_TO_SHARE: &str = "all memory of the guest must be shared: in QEMU, \"-object memory-backend-memfd,id=mem,size=SIZE,share=on \
     -machine memory-backend=mem\", and share=on for each NUMA node and DIMM; in libvirt, \
     \"<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\"";

/// The guest's memory, as a snapshot that stays mapped for as long as it is held.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    mapped: Readable,
    /// Where writes are marked; none while the front-end logs nothing.
    marks: Option<Marks>,
}

impl Memory {
    /// The memory as it is now.
    pub(super) fn now(shared: &SharedMemory) -> Self {
        Self {
            mapped: Readable::of(shared.memory().into_inner()),
            marks: None,
        }
    }

    /// Its last address.
    pub(super) fn last_addr(&self) -> GuestAddress {
        self.mapped.0.memory.last_addr()
    }

    /// The same memory, with memory of ours beside it, in which nothing is logged.
    ///
    /// # Errors
    /// If there is guest memory at the same addresses.
    pub(super) fn beside(
        &self,
        ours: GuestRegionMmap,
    ) -> std::result::Result<Self, GuestRegionCollectionError> {
        let both = self.mapped.0.memory.insert_region(Arc::new(ours))?;
        Ok(Self {
            mapped: Readable::of(Arc::new(both)),
            marks: None,
        })
    }

    /// The same memory, with writes to it marked by `marks`.
    pub(super) fn marked_by(&self, marks: Option<Marks>) -> Self {
        Self {
            mapped: self.mapped.clone(),
            marks,
        }
    }

    /// Whether `log` has a bit for each page of it.
    pub(super) fn is_covered_by(&self, log: &DirtyLog) -> bool {
        log.covers(&self.mapped.0.memory)
    }

    /// The same memory, to be read.
    pub(super) fn readable(&self) -> &Readable {
        &self.mapped
    }

    /// The `len` bytes of `ranges` from `position` on, to be read.
    pub(super) fn source(&self, ranges: &[GuestRange], position: Position, len: u32) -> Result<Pieces<'_>> {
        self.pieces(ranges, position, len)
    }

    /// Has `write` fill the `len` bytes of `ranges` from `position` on.
    pub(super) fn fill(
        &self,
        ranges: &[GuestRange],
        position: Position,
        len: u32,
        write: impl FnOnce(&[VolatileSlice<'_>]),
    ) -> Result<()> {
        write(&self.pieces(ranges, position, len)?);
        if self.marks.is_some() {
            part(ranges, position, len).for_each(|range| self.mark(range));
        }
        Ok(())
    }

    /// Marks `range`, which was written to, if that is logged.
    pub(super) fn mark(&self, range: GuestRange) {
        if let Some(marks) = &self.marks {
            marks.at(range.address).mark_dirty(0, range.len as usize);
        }
    }

    fn pieces(&self, ranges: &[GuestRange], position: Position, len: u32) -> Result<Pieces<'_>> {
        let mut pieces = Pieces::new();
        for range in part(ranges, position, len) {
            for slice in self.mapped.0.slices(range.address, range.len as usize, ()) {
                pieces.push(slice?);
            }
        }
        Ok(pieces)
    }
}

/// The guest's memory, which is only read.
#[derive(Clone, Debug)]
pub(super) struct Readable(Arc<Mapped>);

impl Readable {
    fn of(memory: Arc<GuestMemoryMmap>) -> Self {
        Self(Arc::new(Mapped::of(memory)))
    }
}

impl GuestMemory for Readable {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, len: usize, access: Permissions) -> bool {
        access == Permissions::Read && self.0.has(address, len)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        match access {
            Permissions::Read => Ok(self.0.slices(address, len, ())),
            _ => Err(GuestMemoryError::HostAddressNotAvailable),
        }
    }
}

impl GuestMemory for Memory {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = Option<Marks>;

    fn check_range(&self, address: GuestAddress, len: usize, _: Permissions) -> bool {
        self.mapped.0.has(address, len)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        len: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let marks = self.marks.as_ref().map(|marks| marks.at(address));
        Ok(self.mapped.0.slices(address, len, marks))
    }
}

/// Guest memory, and where each region of it is mapped, in one list: a request asks for that a dozen times, and vm-memory finds a
/// region by way of three pointers each time.
#[derive(Debug)]
struct Mapped {
    memory: Arc<GuestMemoryMmap>,
    /// Ordered by their addresses.
    regions: Box<[Region]>,
}

/// Where a region of guest memory is mapped.
#[derive(Debug)]
struct Region {
    first: u64,
    len: usize,
    start: *mut u8,
}

// SAFETY: the guest and its devices all have this memory; whoever uses the address copes with that.
unsafe impl Send for Region {}
// SAFETY: the same.
unsafe impl Sync for Region {}

impl Mapped {
    fn of(memory: Arc<GuestMemoryMmap>) -> Self {
        let regions = memory.iter().map(|region| Region {
            first: region.start_addr().0,
            len: region.size(),
            start: region.as_ptr(),
        });
        Self {
            regions: regions.collect(),
            memory,
        }
    }

    /// The region that `address` is in, and how far in.
    #[inline]
    fn find(&self, address: GuestAddress) -> Option<(&Region, usize)> {
        let above = self.regions.partition_point(|region| region.first <= address.0);
        let region = self.regions.get(above.checked_sub(1)?)?;
        let within = usize::try_from(address.0 - region.first).ok()?;
        (within < region.len).then_some((region, within))
    }

    /// Whether all `len` bytes from `address` on are memory.
    fn has(&self, mut address: GuestAddress, len: usize) -> bool {
        let mut left = len;
        while left > 0 {
            let Some((region, within)) = self.find(address) else {
                return false;
            };
            let len = left.min(region.len - within);
            left -= len;
            // No region has the last address of all.
            address.0 += len as u64;
        }
        true
    }

    /// The `len` bytes from `address` on, marked by `marks` where they are written to.
    #[inline]
    fn slices<B>(&self, address: GuestAddress, len: usize, marks: B) -> Slices<'_, B> {
        Slices {
            mapped: self,
            address,
            left: len,
            marks,
        }
    }
}

/// Slices of guest memory that are adjacent for the guest. After an error there are none.
struct Slices<'m, B> {
    mapped: &'m Mapped,
    address: GuestAddress,
    left: usize,
    /// Those of the next slice.
    marks: B,
}

impl<'m, B: BitmapSlice> Iterator for Slices<'m, B>
where
    for<'a> B: WithBitmapSlice<'a, S = B>,
{
    type Item = Result<VolatileSlice<'m, B>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let Some((region, within)) = self.mapped.find(self.address) else {
            self.left = 0;
            return Some(Err(GuestMemoryError::InvalidGuestAddress(self.address)));
        };
        let len = self.left.min(region.len - within);
        let marks = self.marks.clone();
        self.marks = marks.slice_at(len);
        self.left -= len;
        // No region has the last address of all.
        self.address.0 += len as u64;
        // SAFETY: `within` is less than the region's length.
        let start = unsafe { region.start.add(within) };
        // SAFETY: `len` bytes of the region are left there, and `memory` keeps it mapped for `'m`.
        Some(Ok(unsafe { VolatileSlice::with_bitmap(start, len, marks, None) }))
    }
}

impl<B: BitmapSlice> FusedIterator for Slices<'_, B> where for<'a> B: WithBitmapSlice<'a, S = B> {}

impl<'m, B: BitmapSlice> GuestMemorySliceIterator<'m, B> for Slices<'m, B> where
    for<'a> B: WithBitmapSlice<'a, S = B>
{
}

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GuestRange {
    /// Where it starts.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
}

impl GuestRange {
    /// Whether all of it is memory.
    pub(super) fn is_in(&self, memory: &Memory, access: Permissions) -> bool {
        self.address.0.checked_add(u64::from(self.len)).is_some()
            && memory.check_range(self.address, self.len as usize, access)
    }
}

/// A position in a list of ranges: which range, and how far into it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    range: u32,
    offset: u32,
}

impl Position {
    /// The position `len` bytes further on.
    pub(super) fn advanced(mut self, ranges: &[GuestRange], mut len: u32) -> Self {
        while let Some(range) = ranges.get(self.range as usize) {
            let left = range.len - self.offset;
            if len < left {
                self.offset += len;
                break;
            }
            len -= left;
            self = Self {
                range: self.range + 1,
                offset: 0,
            };
        }
        self
    }
}

/// The `len` bytes of `ranges` from `position` on, as ranges.
fn part(ranges: &[GuestRange], position: Position, len: u32) -> impl Iterator<Item = GuestRange> {
    let ranges = ranges.get(position.range as usize..).unwrap_or_default();
    let (mut left, mut offset) = (len, position.offset);
    ranges.iter().map_while(move |range| {
        let len = left.min(range.len - offset);
        let address = GuestAddress(range.address.0 + u64::from(offset));
        left -= len;
        offset = 0;
        (len > 0).then_some(GuestRange { address, len })
    })
}

#[cfg(test)]
mod tests {
    use super::super::dirty_log::tests::{log, marked};
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::sync::atomic::Ordering;
    use vm_memory::Bytes;

    fn range(address: u64, len: u32) -> GuestRange {
        GuestRange {
            address: GuestAddress(address),
            len,
        }
    }

    /// Two regions that are adjacent for the guest, and one that is not.
    fn memory() -> Memory {
        let ranges = [
            (GuestAddress(0), 4096),
            (GuestAddress(4096), 4096),
            (GuestAddress(65536), 4096),
        ];
        Memory {
            mapped: Readable::of(Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())),
            marks: None,
        }
    }

    #[test]
    fn a_position_walks_over_ranges_and_stops_after_the_last() {
        let ranges = [range(0, 10), range(100, 1), range(200, 5)];
        let start = Position::default();
        assert_eq!(start.advanced(&ranges, 9), Position { range: 0, offset: 9 });
        assert_eq!(start.advanced(&ranges, 10), Position { range: 1, offset: 0 });
        assert_eq!(start.advanced(&ranges, 12), Position { range: 2, offset: 1 });
        assert_eq!(
            start.advanced(&ranges, 9).advanced(&ranges, 7),
            Position { range: 3, offset: 0 }
        );
        assert_eq!(start.advanced(&ranges, 1000), Position { range: 3, offset: 0 });
    }

    #[test]
    fn a_range_over_the_seam_of_two_regions_is_two_pieces() {
        let memory = memory();
        let ranges = [range(4000, 200), range(65536, 100)];
        let pieces = memory.source(&ranges, Position::default().advanced(&ranges, 50), 200);
        let lens: Vec<_> = pieces.unwrap().iter().map(VolatileSlice::len).collect();
        assert_eq!(lens, [46, 104, 50]);
    }

    #[test]
    fn what_is_not_memory_is_not_in_it() {
        let memory = memory();
        assert!(range(4000, 200).is_in(&memory, Permissions::Write));
        assert!(!range(8000, 200).is_in(&memory, Permissions::Write));
        assert!(!range(u64::MAX - 10, 100).is_in(&memory, Permissions::Write));
        let beyond = [range(8000, 200)];
        assert!(memory.source(&beyond, Position::default(), 200).is_err());
    }

    #[test]
    fn what_is_to_be_read_cannot_be_written() {
        let memory = memory();
        let readable = memory.readable();
        readable
            .store(1_u16, GuestAddress(0), Ordering::Release)
            .unwrap_err();
        readable.write_slice(&[1; 100], GuestAddress(4000)).unwrap_err();
        assert!(!readable.check_range(GuestAddress(0), 2, Permissions::Write));
        assert!(written(&memory).is_empty());
        assert_eq!(
            readable.load::<u16>(GuestAddress(0), Ordering::Acquire).unwrap(),
            0
        );
    }

    /// Where the test's memory has been written to: it was all zeros.
    fn written(memory: &Memory) -> Vec<u64> {
        let regions = [0, 4096, 65536].into_iter().flat_map(|start| {
            let mut bytes = [0; 4096];
            memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
            let addresses = (start..).zip(bytes).filter(|(_, byte)| *byte != 0);
            addresses.map(|(address, _)| address).collect::<Vec<_>>()
        });
        regions.collect()
    }

    proptest! {
        #[test]
        fn the_page_of_each_byte_that_is_written_is_marked_and_no_other(
            writes in prop::collection::vec((0_u64..70_000, 1_u32..9000, any::<u32>(), 0..3), 1..4),
            shift in 0..11 * 4096_u64,
        ) {
            let log = Arc::new(log(8));
            let memory = memory().marked_by(Some(Marks::new(&log, shift)));
            for (address, len, skip, way) in writes {
                let cut = skip % len;
                let ranges = [range(address, cut), range(address + u64::from(cut), len - cut)];
                // Some are not in memory, or only begin there.
                let _ = match way {
                    0 => {
                        let ranges = ranges.map(|range| (range.len > 0).then_some(range));
                        let ranges: Vec<_> = ranges.into_iter().flatten().collect();
                        let position = Position::default().advanced(&ranges, cut / 2);
                        memory.fill(&ranges, position, len - cut / 2, |pieces| {
                            for piece in pieces {
                                piece.copy_from(&vec![0xff_u8; piece.len()]);
                            }
                        })
                    }
                    1 => memory.write_slice(&vec![0xff; len as usize], GuestAddress(address)),
                    _ => memory.store(0xffff_u16, GuestAddress(address), Ordering::Release),
                };
            }
            let pages: BTreeSet<_> = written(&memory).into_iter().map(|at| (at + shift) / 4096).collect();
            prop_assert_eq!(marked(&log), pages.into_iter().collect::<Vec<_>>());
        }
    }
}
