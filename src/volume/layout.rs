//! The segments of the metadata (LUKS2 1.1, "Segments Object") laid out on a payload: every question answered but
//! the key's. Sizes that were `dynamic` are numbers, and every range lies within the payload and clear of all
//! others. With a key it becomes the [`SegmentTable`] that the data path uses.

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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::metadata::Id;
    use super::super::testing::{FILE, HEADER, parsed, sample_with};
    use super::*;

    fn crypt(offset: u64, size: &str, sector_size: u32) -> Value {
        json!({
            "type": "crypt", "offset": offset.to_string(), "size": size, "iv_tweak": "5",
            "encryption": "aes-xts-plain64", "sector_size": sector_size
        })
    }

    fn laid_out(segments: Value, payload_len: u64) -> Result<Layout, Refusal> {
        let ids: Vec<_> = segments.as_object().unwrap().keys().cloned().collect();
        let mut json = sample_with("/segments", segments);
        json["digests"]["0"]["segments"] = ids.into();
        Layout::new(&parsed(&json).unwrap(), HEADER, payload_len)
    }

    #[test]
    fn a_dynamic_segment_reaches_to_the_end() {
        let layout = laid_out(json!({"0": crypt(HEADER, "dynamic", 512)}), FILE + 511).unwrap();
        assert_eq!(layout.capacity(), FILE - HEADER);
        let refused = laid_out(json!({"0": crypt(HEADER, "dynamic", 4096)}), FILE + 512).unwrap_err();
        assert!(matches!(refused, Refusal::PayloadUnaligned { .. }));
        let both = json!({"0": crypt(HEADER, "dynamic", 512), "1": crypt(HEADER + 512, "512", 512)});
        assert_eq!(
            laid_out(both, FILE),
            Err(Refusal::DynamicNotLast { segment: Id(0) })
        );
    }

    #[test]
    fn a_payload_that_ends_too_early_is_refused() {
        for (size, len) in [
            ("dynamic", HEADER),
            ("dynamic", HEADER + 511),
            ("dynamic", 0),
            ("1024", HEADER + 1023),
        ] {
            let refused = laid_out(json!({"0": crypt(HEADER, size, 512)}), len).unwrap_err();
            assert!(
                matches!(refused, Refusal::PayloadTruncated { .. }),
                "{size} in {len}: {refused}"
            );
        }
        laid_out(json!({"0": crypt(HEADER, "1024", 512)}), HEADER + 1024).unwrap();
    }

    #[test]
    fn segments_follow_each_other_on_the_disk_in_the_order_of_their_numbers() {
        let segments = json!({
            "10": crypt(HEADER, "4096", 4096),
            "2": {"type": "linear", "offset": (HEADER + 8192).to_string(), "size": "1024"},
        });
        let layout = laid_out(segments, FILE).unwrap();
        assert_eq!(layout.capacity(), 5120);
        assert_eq!(layout.sector_size(), SectorSize::B4096);
        let key = crate::keys::arena::SecretBytes::random(64).unwrap();
        let table = layout
            .into_table(|size| SectorCipher::new(&key, size, Default::default()))
            .unwrap();
        let first = table.extent(Sector(0), 10);
        assert_eq!((first.sectors, first.offset), (2, HEADER + 8192));
        assert!(matches!(first.treatment, Treatment::Linear));
        let second = table.extent(Sector(3), 10);
        assert_eq!(
            (second.sectors, second.offset, second.iv),
            (7, HEADER + 512, Sector(6))
        );
    }

    #[test]
    fn segments_that_overlap_each_other_or_the_header_are_refused() {
        let overlapping = json!({"0": crypt(HEADER, "4096", 512), "1": crypt(HEADER + 3584, "512", 512)});
        let refused = laid_out(overlapping, FILE).unwrap_err();
        assert_eq!(
            refused,
            Refusal::SegmentsOverlap {
                offset: HEADER + 3584
            }
        );
        let refused = laid_out(json!({"0": crypt(0, "dynamic", 512)}), FILE).unwrap_err();
        assert_eq!(refused, Refusal::Detached { segment: Id(0) });
    }

    #[test]
    fn sector_sizes_that_dm_crypt_has_and_we_do_not_are_refused() {
        for bytes in [1024, 2048, 8192] {
            let refused = laid_out(json!({"0": crypt(HEADER, "dynamic", bytes)}), FILE).unwrap_err();
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
