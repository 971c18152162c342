//! The segment of the metadata (LUKS2 1.1, "Segments Object") on a payload. A `dynamic` size is resolved to a number, and the
//! range is within the payload, after the header. With the volume key it is all that one needs to read and write the disk.

use sealblk_base::sector::{Sector, SectorSize};

use crate::metadata::SegmentSize;
use crate::refusal::{Refusal, Served};

/// Where the disk lies in its payload, and how it is encrypted there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Length of the disk in bytes.
    pub capacity: u64,
    /// Where it starts in the payload, in bytes.
    pub offset: u64,
    /// The unit in which the disk must be read and written.
    pub sector_size: SectorSize,
    /// The segment's `iv_tweak`: the tweak of the disk's first sector.
    pub iv: Sector,
}

impl Layout {
    /// Lays out the segment on a payload of `payload_len` bytes, of which the first `header_end` bytes are the
    /// header's.
    pub(crate) fn new(served: Served<'_>, header_end: u64, payload_len: u64) -> Result<Self, Refusal> {
        let (id, segment) = (served.id, served.segment);
        let bytes = segment.sector_size;
        let sector_size = SectorSize::from_bytes(bytes.into());
        let sector_size = sector_size.ok_or(Refusal::SectorSize { segment: id, bytes })?;
        let unit = sector_size.bytes() as u64;
        let offset = segment.place.offset.0;
        if offset < header_end {
            return Err(Refusal::Detached { segment: id });
        }
        let capacity = match segment.place.size {
            SegmentSize::Fixed(size) => size,
            // A loop device ends with the last whole sector of 512 bytes; more than that dm-crypt, too, refuses.
            SegmentSize::Dynamic => payload_len.saturating_sub(offset) / Sector::LEN * Sector::LEN,
        };
        if !capacity.is_multiple_of(unit) {
            return Err(Refusal::PayloadUnaligned {
                payload_len,
                sector_size: unit,
            });
        }
        let end = offset.saturating_add(capacity.max(unit));
        if capacity == 0 || end > payload_len {
            return Err(Refusal::PayloadTruncated {
                segment: id,
                needed: end,
                payload_len,
            });
        }
        Ok(Self {
            capacity,
            offset,
            sector_size,
            iv: Sector(segment.iv_tweak.0),
        })
    }

    /// Whether the data lie at the same place as those of `other`, however many they are.
    pub(crate) fn is_where(&self, other: &Self) -> bool {
        (self.offset, self.sector_size, self.iv) == (other.offset, other.sector_size, other.iv)
    }

    /// The largest power of two, up to `limit`, that divides where the segment starts in the payload: transfers of that
    /// many bytes stay aligned to it there.
    pub fn alignment(&self, limit: u32) -> u32 {
        limit.min(1 << self.offset.trailing_zeros().min(31))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::metadata::Id;
    use crate::refusal::check;
    use crate::testing::{FILE, HEADER, parsed, sample_with};

    fn crypt(offset: u64, size: &str, sector_size: u32) -> Value {
        json!({
            "type": "crypt", "offset": offset.to_string(), "size": size, "iv_tweak": "5",
            "encryption": "aes-xts-plain64", "sector_size": sector_size
        })
    }

    fn laid_out(segment: Value, payload_len: u64) -> Result<Layout, Refusal> {
        let metadata = parsed(&sample_with("/segments/0", segment)).unwrap();
        Layout::new(check(&metadata).unwrap(), HEADER, payload_len)
    }

    #[test]
    fn alignment_is_that_of_where_the_segment_starts() {
        for (offset, expected) in [(HEADER, 4096), (HEADER + 4096, 4096), (HEADER + 512, 512)] {
            let layout = laid_out(crypt(offset, "dynamic", 512), FILE + 8192).unwrap();
            assert_eq!(layout.alignment(4096), expected);
        }
    }

    #[test]
    fn a_dynamic_segment_reaches_to_the_end() {
        let layout = laid_out(crypt(HEADER, "dynamic", 512), FILE + 511).unwrap();
        assert_eq!(layout.capacity, FILE - HEADER);
        let refused = laid_out(crypt(HEADER, "dynamic", 4096), FILE + 512).unwrap_err();
        assert!(matches!(refused, Refusal::PayloadUnaligned { .. }));
    }

    #[test]
    fn a_payload_that_ends_too_early_is_refused() {
        for (size, len) in [
            ("dynamic", HEADER),
            ("dynamic", HEADER + 511),
            ("dynamic", 0),
            ("1024", HEADER + 1023),
        ] {
            let refused = laid_out(crypt(HEADER, size, 512), len).unwrap_err();
            assert!(
                matches!(refused, Refusal::PayloadTruncated { .. }),
                "{size} in {len}: {refused}"
            );
        }
        laid_out(crypt(HEADER, "1024", 512), HEADER + 1024).unwrap();
    }

    #[test]
    fn the_layout_has_the_segments_place_and_tweak() {
        let layout = laid_out(crypt(HEADER + 4096, "8192", 4096), FILE).unwrap();
        assert_eq!((layout.capacity, layout.sector_size), (8192, SectorSize::B4096));
        assert_eq!((layout.offset, layout.iv), (HEADER + 4096, Sector(5)));
    }

    #[test]
    fn a_segment_that_overlaps_the_header_is_refused() {
        let refused = laid_out(crypt(0, "dynamic", 512), FILE).unwrap_err();
        assert_eq!(refused, Refusal::Detached { segment: Id(0) });
    }

    #[test]
    fn sector_sizes_that_dm_crypt_has_and_we_do_not_are_refused() {
        for bytes in [1024, 2048, 8192] {
            let refused = laid_out(crypt(HEADER, "dynamic", bytes), FILE).unwrap_err();
            assert_eq!(
                refused,
                Refusal::SectorSize {
                    segment: Id(0),
                    bytes
                }
            );
        }
    }
}
