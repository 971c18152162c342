//! Another length of a disk.
//!
//! The segment says how long the disk is, or that it reaches to the end of its payload ("dynamic"). The new length is in force with the
//! primary copy of the header, so the order of writes is:
//!
//! ```text
//! longer    the payload, which is durable then; the header
//! shorter   the header; the payload, if it is a file
//! ```
//!
//! After a crash at any point the disk has the old length or the new one. The file may be longer than it needs to be.

use std::io;

use sealblk_base::sector::Sector;
use tracing::warn;

use crate::error::Reason;
use crate::header_io::HeaderIo;
use crate::locked::{Locked, layout};
use crate::metadata::SegmentSize;

/// What the length of a disk shall be.
#[derive(Debug, Clone, Copy)]
pub struct Resize {
    /// In bytes. None: as much as the file or device has room for.
    pub capacity: Option<u64>,
    /// Whether the disk may become shorter: the data behind its new end are lost.
    pub shrink: bool,
}

/// The lengths of a disk before and after a [`Resize`], in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resized {
    /// Before.
    pub from: u64,
    /// After.
    pub to: u64,
}

impl Locked<'_> {
    /// Gives the disk another length. `payload` is given when the header is detached. A file grows as needed, and a file whose disk
    /// becomes shorter is cut.
    ///
    /// # Errors
    /// Nothing is changed if the length is not possible, the disk would become shorter and may not, or the payload has no room and cannot
    /// grow. If writing fails, the disk has one of the two lengths.
    pub fn resize(&mut self, payload: Option<&dyn HeaderIo>, wanted: Resize) -> Result<Resized, Reason> {
        let mut update = self.update()?;
        // Under the lock, since other programs can change the header, too.
        let before = layout(update.header(), self.io, payload)?;
        if !before.is_where(&self.layout) {
            return Err(Reason::ChangedMeanwhile);
        }
        let payload = payload.unwrap_or(self.io);
        let len = payload.size().map_err(Reason::Length)?;
        let (unit, offset, from) = (before.sector_size.bytes() as u64, before.offset, self.capacity());
        let to = wanted
            .capacity
            .unwrap_or_else(|| len.saturating_sub(offset) / unit * unit);
        let end = offset.checked_add(to);
        let (Some(end), true) = (end, to > 0 && to.is_multiple_of(unit)) else {
            let (capacity, sector_size) = (to, before.sector_size.bytes());
            return Err(Reason::Capacity {
                capacity,
                sector_size,
            });
        };
        if to < from && !wanted.shrink {
            return Err(Reason::Shrinks { from, to });
        }
        let is_cut = to < from && len > end && payload.can_grow();
        let new_len = if is_cut { end } else { len.max(end) };

        if end > len && !payload.can_grow() {
            return Err(Reason::TooSmall { len, needed: end });
        }
        if to > from {
            grow(payload, len, end)?;
        }
        let is_up_to_end = (new_len - offset) / Sector::LEN * Sector::LEN == to;
        let size = match update.segment_size()? {
            SegmentSize::Dynamic if is_up_to_end => SegmentSize::Dynamic,
            _ => SegmentSize::Fixed(to),
        };
        if update.segment_size()? != size {
            update.set_segment_size(size)?;
            update.commit(self)?;
        }
        if is_cut && let Err(source) = payload.set_size(end) {
            if size == SegmentSize::Dynamic {
                return Err(Reason::Grow { len: end, source });
            }
            warn!(
                "{}: the disk is shorter, but its file keeps its length: {source}",
                payload.path().display()
            );
        }
        self.layout.capacity = to;
        Ok(Resized { from, to })
    }
}

/// Makes a payload of `len` bytes at least `end` bytes long, durably: what says that it is so long comes later, and must not
/// outlive it. Where that fails, it is as long as it was.
fn grow(payload: &dyn HeaderIo, len: u64, end: u64) -> Result<(), Reason> {
    let longer = || match end > len {
        true => payload.set_size(end),
        // Whoever made it longer may not have waited for that.
        false => Ok(()),
    };
    let is_longer = || match payload.size()? >= end {
        true => Ok(()),
        false => Err(io::Error::other(
            "the file keeps its length, although no error was reported",
        )),
    };
    let grown = longer().and_then(|()| payload.sync()).and_then(|()| is_longer());
    grown.map_err(|source| {
        if end > len {
            let _ = payload.set_size(len);
        }
        Reason::Grow { len: end, source }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Id;
    use crate::testing::{FILE, HEADER, Memory, sample_with};
    use serde_json::Value;

    /// The sample with a segment of this size, in a file of `len` bytes.
    fn volume(size: &str, len: u64) -> Memory {
        let mut io = Memory::of(&sample_with("/segments/0/size", size));
        io.grows = true;
        io.set_size(len).unwrap();
        io
    }

    fn size_in_header(io: &Memory) -> Value {
        let locked = Locked::open(io, None).unwrap();
        let segment = &locked.header().metadata().segments[&Id(0)];
        serde_json::to_value(segment).unwrap()["size"].clone()
    }

    fn resize(io: &Memory, capacity: Option<u64>, shrink: bool) -> Result<Resized, Reason> {
        let mut locked = Locked::open(io, None).unwrap();
        let resized = locked.resize(None, Resize { capacity, shrink })?;
        assert_eq!(locked.capacity(), resized.to);
        assert_eq!(Locked::open(io, None).unwrap().capacity(), resized.to);
        Ok(resized)
    }

    #[test]
    fn a_disk_follows_its_file_and_a_file_its_disk() {
        for size in ["dynamic", "4096"] {
            for (len, capacity, expected, expected_len) in [
                (HEADER + 8192, None, 8192, HEADER + 8192),
                // The last whole sector.
                (HEADER + 8192 + 511, None, 8192, HEADER + 8192 + 511),
                (HEADER + 4096, Some(65536), 65536, HEADER + 65536),
                (HEADER + 4096, None, 4096, HEADER + 4096),
            ] {
                let io = volume(size, HEADER + 4096);
                let mut locked = Locked::open(&io, None).unwrap();
                io.set_size(len).unwrap();
                let shrink = false;
                let resized = locked.resize(None, Resize { capacity, shrink }).unwrap();
                let (from, to) = (4096, expected);
                assert_eq!(resized, Resized { from, to }, "{size} {len} {capacity:?}");
                assert_eq!(io.size().unwrap(), expected_len);
                let in_header = match size {
                    "dynamic" => "dynamic".to_owned(),
                    _ => expected.to_string(),
                };
                assert_eq!(size_in_header(&io), in_header);
            }
        }
    }

    #[test]
    fn a_segment_that_ends_before_its_payload_says_where() {
        let io = volume("dynamic", HEADER + 4096);
        let mut locked = Locked::open(&io, None).unwrap();
        io.set_size(HEADER + 65536).unwrap();
        let (capacity, shrink) = (Some(8192), false);
        locked.resize(None, Resize { capacity, shrink }).unwrap();
        assert_eq!(size_in_header(&io), "8192");
        assert_eq!(io.size().unwrap(), HEADER + 65536);
    }

    #[test]
    fn a_disk_becomes_shorter_only_if_it_may_and_its_file_with_it() {
        for size in ["dynamic", "8192"] {
            let io = volume(size, HEADER + 8192);
            let before = io.front.borrow().clone();
            let refused = resize(&io, Some(4096), false).unwrap_err();
            let (from, to) = (8192, 4096);
            assert!(
                matches!(refused, Reason::Shrinks { from: 8192, to: 4096 }),
                "{refused}"
            );
            assert!(*io.front.borrow() == before);
            assert_eq!(resize(&io, Some(4096), true).unwrap(), Resized { from, to });
            assert_eq!(io.size().unwrap(), HEADER + 4096);
        }
    }

    #[test]
    fn lengths_that_are_not_possible_change_nothing() {
        for capacity in [0, 1, 511, 513, u64::MAX, u64::MAX / 512 * 512] {
            let io = volume("dynamic", FILE);
            let before = io.front.borrow().clone();
            let refused = resize(&io, Some(capacity), true);
            assert!(
                matches!(refused, Err(Reason::Capacity { .. })),
                "{capacity}: {refused:?}"
            );
            assert!(*io.front.borrow() == before);
        }
    }
}
