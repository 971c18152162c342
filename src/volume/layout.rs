//! The segments of the metadata (LUKS2 1.1 §3.3) laid out on a payload: every question answered but the key's. Sizes that
//! were `dynamic` are numbers, and every range lies within the payload and clear of all others. With a key it becomes
//! the [`SegmentTable`] that the data path uses.

use std::sync::Arc;

use super::metadata::{Metadata, Segment, SegmentSize};
use super::refusal::Refusal;
use super::segment::{self, SegmentTable, Treatment};
use crate::cipher::{Sector, SectorCipher, SectorSize};

/// The table as far as it is known without a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// In the order of the disk, each beginning where the one before it ends.
    segments: Vec<Planned>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Planned {
    /// Length and place in bytes.
    len: u64,
    offset: u64,
    /// Sector size and `iv_tweak`, unless it is linear.
    crypt: Option<(SectorSize, Sector)>,
}

impl Layout {
    /// Lays out the segments of `metadata` on a payload of `payload_len` bytes, of which the first `header_end` bytes
    /// are the header's.
    pub(super) fn new(metadata: &Metadata, header_end: u64, payload_len: u64) -> Result<Self, Refusal> {
        let last = metadata.segments.keys().next_back().copied();
        let mut segments = Vec::with_capacity(metadata.segments.len());
        for (&id, segment) in &metadata.segments {
            let (place, crypt) = match segment {
                Segment::Linear(linear) => (&linear.place, None),
                Segment::Crypt(crypt) => {
                    let bytes = crypt.sector_size;
                    let size = SectorSize::from_bytes(bytes.into());
                    let size = size.ok_or(Refusal::SectorSize { segment: id, bytes })?;
                    (&crypt.place, Some((size, Sector(crypt.iv_tweak.0))))
                }
                Segment::Other(other) => {
                    return Err(Refusal::SegmentType {
                        segment: id,
                        kind: other.kind.clone(),
                    });
                }
            };
            let unit = crypt.map_or(Sector::LEN, |(size, _)| size.bytes() as u64);
            let offset = place.offset.0;
            if offset < header_end {
                return Err(Refusal::Detached { segment: id });
            }
            let len = match place.size {
                SegmentSize::Fixed(size) => size,
                SegmentSize::Dynamic if Some(id) != last => {
                    return Err(Refusal::DynamicNotLast { segment: id });
                }
                // A loop device ends with the last whole sector of 512 bytes; more than that dm-crypt, too, refuses.
                SegmentSize::Dynamic => payload_len.saturating_sub(offset) / Sector::LEN * Sector::LEN,
            };
            if !len.is_multiple_of(unit) {
                return Err(Refusal::PayloadUnaligned {
                    payload_len,
                    sector_size: unit,
                });
            }
            let end = offset.saturating_add(len.max(unit));
            if len == 0 || end > payload_len {
                return Err(Refusal::PayloadTruncated {
                    segment: id,
                    needed: end,
                    payload_len,
                });
            }
            segments.push(Planned { len, offset, crypt });
        }
        let layout = Self { segments };
        layout.refuse_overlaps()?;
        Ok(layout)
    }

    /// Segments that lie in the payload and clear of each other cannot be longer than it together.
    fn refuse_overlaps(&self) -> Result<(), Refusal> {
        let ranges = self
            .segments
            .iter()
            .map(|segment| (segment.offset, segment.offset + segment.len));
        let mut ranges: Vec<_> = ranges.collect();
        ranges.sort_unstable();
        match ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => Err(Refusal::SegmentsOverlap { offset: pair[1].0 }),
            None => Ok(()),
        }
    }

    /// Length of the disk in bytes.
    pub(super) fn capacity(&self) -> u64 {
        self.segments.iter().map(|segment| segment.len).sum()
    }

    /// The unit in which the disk must be read and written: the largest sector size of its segments.
    pub(super) fn sector_size(&self) -> SectorSize {
        let sizes = self
            .segments
            .iter()
            .filter_map(|segment| segment.crypt.map(|(size, _)| size));
        sizes.max_by_key(|size| size.bytes()).unwrap_or_default()
    }

    /// The table, with the cipher that `expand` makes for each sector size that occurs.
    pub(super) fn into_table<E>(
        self,
        mut expand: impl FnMut(SectorSize) -> Result<SectorCipher, E>,
    ) -> Result<SegmentTable, E> {
        let mut ciphers: Vec<Arc<SectorCipher>> = Vec::new();
        let segments = self.segments.into_iter().map(|planned| {
            let (iv, treatment) = match planned.crypt {
                None => (Sector(0), Treatment::Linear),
                Some((size, iv)) => {
                    let cipher = match ciphers.iter().find(|cipher| cipher.sector_size() == size) {
                        Some(known) => Arc::clone(known),
                        None => {
                            ciphers.push(Arc::new(expand(size)?));
                            Arc::clone(&ciphers[ciphers.len() - 1])
                        }
                    };
                    (iv, Treatment::Crypt(cipher))
                }
            };
            Ok(segment::Segment {
                sectors: planned.len / Sector::LEN,
                offset: planned.offset,
                iv,
                treatment,
            })
        });
        Ok(SegmentTable::new(segments.collect::<Result<Vec<_>, E>>()?))
    }
}
