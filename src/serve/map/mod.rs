//! The map of a disk: where each of its sectors lies in the payload's file, and what is done to it on the way. It has LUKS2's list
//! of segments (LUKS2 1.1, "Segments Object") as the data path uses it.
//!
//! A table does not change; a change makes a new table.

mod unencrypted;

use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::cipher::{self, CipherError, KernelChoice, Reader, Sector, SectorCipher, Workspace};
use crate::luks2::Volume;

pub use unencrypted::{UnencryptedError, unencrypted};

/// What is done to the sectors of a segment on their way to storage and back.
#[derive(Clone, Debug)]
pub enum Treatment {
    /// They lie there as the guest wrote them.
    Linear,
    /// They lie there encrypted.
    Crypt(Arc<SectorCipher>),
}

impl Treatment {
    /// Makes what goes to storage, and is read by `reader` there, of what the guest wrote; `iv` is that of the first
    /// sector.
    pub fn encrypt(
        &self,
        iv: Sector,
        plain: &[VolatileSlice<'_>],
        stored: &mut [u8],
        reader: Reader,
        workspace: &mut Workspace,
    ) {
        match self {
            Treatment::Crypt(cipher) => cipher.encrypt(iv, plain, stored, reader, workspace),
            Treatment::Linear => cipher::copy(plain, stored, reader),
        }
    }

    /// Makes what the guest reads of what came from storage; `iv` is that of the first sector.
    pub fn decrypt(&self, iv: Sector, stored: &[u8], plain: &[VolatileSlice<'_>], workspace: &mut Workspace) {
        match self {
            Treatment::Crypt(cipher) => cipher.decrypt(iv, stored, plain, workspace),
            Treatment::Linear => {
                let mut rest = stored;
                for piece in plain {
                    let (head, tail) = rest.split_at(piece.len().min(rest.len()));
                    piece.copy_from(head);
                    rest = tail;
                }
            }
        }
    }
}

/// A range of the disk with one treatment.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its length in sectors.
    pub sectors: u64,
    /// Where it starts in the payload's file, in bytes.
    pub offset: u64,
    /// What the sectors are encrypted under: that of its first sector, LUKS2's `iv_tweak`.
    pub iv: Sector,
    /// What is done to its sectors.
    pub treatment: Treatment,
}

/// The number of a treatment in its table, by which [`SegmentTable::treatment`] gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreatmentNumber(usize);

/// A run of sectors that lie together and are treated alike. It is a value without the table's lifetime, so that it can travel
/// with an operation from its start to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length in sectors.
    pub sectors: u64,
    /// Where it lies in the payload's file, in bytes.
    pub offset: u64,
    /// The initialisation vector of its first sector.
    pub iv: Sector,
    /// What is done to its sectors.
    pub treatment: TreatmentNumber,
}

impl Extent {
    /// No sectors, for an operation that concerns none.
    pub const EMPTY: Self = Self {
        sectors: 0,
        offset: 0,
        iv: Sector(0),
        treatment: TreatmentNumber(0),
    };

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors * Sector::LEN
    }
}

/// The segments of a disk, in order and without gaps.
#[derive(Debug)]
pub struct SegmentTable {
    /// Each with the disk's sector that it starts at; none is empty.
    segments: Box<[(u64, Segment)]>,
    sectors: u64,
}

impl SegmentTable {
    /// A table of segments that follow each other on the disk.
    pub fn new(segments: impl IntoIterator<Item = Segment>) -> Self {
        let mut sectors = 0;
        let segments = segments
            .into_iter()
            .filter(|segment| segment.sectors > 0)
            .map(|segment| {
                let first = sectors;
                sectors += segment.sectors;
                (first, segment)
            })
            .collect();
        Self { segments, sectors }
    }

    /// A disk of `capacity` bytes, whole sectors, that is one segment from the file's beginning on.
    pub fn whole(capacity: u64, treatment: Treatment) -> Self {
        Self::new([Segment {
            sectors: capacity / Sector::LEN,
            offset: 0,
            iv: Sector(0),
            treatment,
        }])
    }

    /// The disk of a volume, whose key is expanded for this kernel of the cipher.
    ///
    /// # Errors
    /// If the key cannot be used, or this machine cannot run the kernel.
    pub fn of(volume: &Volume, kernel: KernelChoice) -> Result<Self, CipherError> {
        let layout = volume.layout();
        let cipher = SectorCipher::new(volume.key(), layout.sector_size, kernel)?;
        Ok(Self::new([Segment {
            sectors: layout.capacity / Sector::LEN,
            offset: layout.offset,
            iv: layout.iv,
            treatment: Treatment::Crypt(Arc::new(cipher)),
        }]))
    }

    /// The same table for a disk of `sectors` sectors, which ends with the last segment.
    pub fn resized(&self, sectors: u64) -> Self {
        let mut segments: Vec<_> = self.segments.iter().map(|(_, segment)| segment.clone()).collect();
        if let (Some(last), Some((first, _))) = (segments.last_mut(), self.segments.last()) {
            last.sectors = sectors.saturating_sub(*first);
        }
        Self::new(segments)
    }

    /// The capacity of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The extent that starts at `first`, of at most `sectors` sectors.
    ///
    /// # Panics
    /// If `first` is not a sector of the disk.
    pub fn extent(&self, first: Sector, sectors: u64) -> Extent {
        assert!(
            first.0 < self.sectors,
            "sector {first} of a disk of {} sectors",
            self.sectors
        );
        // The table is not empty, since it has sectors, and its first segment starts at 0.
        let index = self.segments.partition_point(|(start, _)| *start <= first.0) - 1;
        let (start, segment) = &self.segments[index];
        let into = first.0 - start;
        Extent {
            sectors: sectors.min(segment.sectors - into),
            offset: segment.offset + into * Sector::LEN,
            iv: segment.iv + into,
            treatment: TreatmentNumber(index),
        }
    }

    /// The treatment of an extent of this table.
    ///
    /// # Panics
    /// If the table has no treatment of that number, which is then another table's.
    pub fn treatment(&self, number: TreatmentNumber) -> &Treatment {
        let TreatmentNumber(index) = number;
        &self.segments[index].1.treatment
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cipher::{KEY_LEN, KernelChoice, SectorSize};
    use sealblk_secmem::arena::SecretBytes;

    fn linear(sectors: u64, offset: u64, iv: u64) -> Segment {
        Segment {
            sectors,
            offset,
            iv: Sector(iv),
            treatment: Treatment::Linear,
        }
    }

    #[test]
    fn extents_end_where_segments_do() {
        let table = SegmentTable::new([linear(8, 4096, 0), linear(0, 0, 0), linear(8, 65536, 100)]);
        assert_eq!(table.sectors(), 16);
        for (first, sectors, expected) in [
            (0, 16, (8, 4096, 0)),
            (7, 16, (1, 4096 + 7 * 512, 7)),
            (8, 3, (3, 65536, 100)),
            (15, 1, (1, 65536 + 7 * 512, 107)),
        ] {
            let extent = table.extent(Sector(first), sectors);
            assert_eq!((extent.sectors, extent.offset, extent.iv.0), expected);
        }
    }

    #[test]
    fn a_table_that_is_resized_ends_with_its_last_segment() {
        let table = SegmentTable::new([linear(8, 4096, 0), linear(8, 65536, 100)]);
        for sectors in [12, 16, 1000] {
            let resized = table.resized(sectors);
            assert_eq!(resized.sectors(), sectors);
            let last = resized.extent(Sector(sectors - 1), 1);
            assert_eq!(last.offset, 65536 + (sectors - 9) * 512);
        }
    }

    #[test]
    fn extent_brings_its_segments_treatment_from_the_table() {
        let key = SecretBytes::random(KEY_LEN).unwrap();
        let cipher = SectorCipher::new(&key, SectorSize::B512, KernelChoice::Portable).unwrap();
        let crypt = Segment {
            treatment: Treatment::Crypt(Arc::new(cipher)),
            ..linear(8, 4096, 0)
        };
        let table = SegmentTable::new([linear(8, 0, 0), crypt, linear(8, 8192, 0)]);
        let is_crypt = |sector| {
            let extent = table.extent(Sector(sector), 1);
            matches!(table.treatment(extent.treatment), Treatment::Crypt(_))
        };
        let sectors: Vec<_> = (0..24).filter(|&sector| is_crypt(sector)).collect();
        assert_eq!(sectors, (8..16).collect::<Vec<_>>());
    }

    #[test]
    fn linear_data_passes_as_it_is_through_split_pieces() {
        let mut plain = *b"what the guest wrote";
        let (one, two) = plain.split_at_mut(3);
        let pieces = [VolatileSlice::from(one), VolatileSlice::from(two)];
        let mut stored = [0; 20];
        let mut workspace = Workspace::new().unwrap();
        Treatment::Linear.encrypt(Sector(0), &pieces, &mut stored, Reader::Device, &mut workspace);
        assert_eq!(&stored, b"what the guest wrote");
        Treatment::Linear.decrypt(Sector(0), b"what the guest reads", &pieces, &mut workspace);
        assert_eq!(&plain, b"what the guest reads");
    }
}
