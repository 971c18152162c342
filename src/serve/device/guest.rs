//! Guest memory as the data path sees it: ranges of guest addresses, checked once, resolved at each use.
//!
//! A range is one piece for the guest but may be several for us: regions that are adjacent in the guest's address
//! space need not be adjacent in ours, and memory that is plugged in later makes such seams. No Rust reference points into
//! guest memory, since the guest writes to it at any time.
//!
//! A worker has guest memory as [`Memory`], which does not give out its mapping. So there are two ways to write to it: by
//! the methods of vm-memory, as virtio-queue does for the used ring, and by [`Memory::fill`], as the cipher does.

use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestRegionCollectionError, GuestRegionMmap, Permissions, VolatileSlice,
};

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
    mapped: Arc<GuestMemoryMmap>,
}

impl Memory {
    /// The memory as it is now.
    pub(super) fn now(shared: &SharedMemory) -> Self {
        Self {
            mapped: shared.memory().into_inner(),
        }
    }

    /// Its last address.
    pub(super) fn last_addr(&self) -> GuestAddress {
        self.mapped.last_addr()
    }

    /// The same memory, with memory of ours beside it.
    ///
    /// # Errors
    /// If there is guest memory at the same addresses.
    pub(super) fn beside(
        &self,
        ours: GuestRegionMmap,
    ) -> std::result::Result<Self, GuestRegionCollectionError> {
        Ok(Self {
            mapped: Arc::new(self.mapped.insert_region(Arc::new(ours))?),
        })
    }

    /// The `len` bytes of `ranges` from `position` on, to be read.
    pub(super) fn source(&self, ranges: &[GuestRange], position: Position, len: u32) -> Result<Pieces<'_>> {
        self.pieces(ranges, position, len, Permissions::Read)
    }

    /// Has `write` fill the `len` bytes of `ranges` from `position` on.
    pub(super) fn fill(
        &self,
        ranges: &[GuestRange],
        position: Position,
        len: u32,
        write: impl FnOnce(&[VolatileSlice<'_>]),
    ) -> Result<()> {
        write(&self.pieces(ranges, position, len, Permissions::Write)?);
        Ok(())
    }

    fn pieces(
        &self,
        ranges: &[GuestRange],
        position: Position,
        len: u32,
        access: Permissions,
    ) -> Result<Pieces<'_>> {
        let mut pieces = Pieces::new();
        for range in part(ranges, position, len) {
            for slice in GuestMemory::get_slices(&*self.mapped, range.address, range.len as usize, access)? {
                pieces.push(slice?);
            }
        }
        Ok(pieces)
    }
}

impl GuestMemory for Memory {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, len: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&*self.mapped, address, len, access)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        GuestMemory::get_slices(&*self.mapped, address, len, access)
    }
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
    use super::*;

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
            mapped: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
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
}
