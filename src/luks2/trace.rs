//! Traces of a LUKS header on a disk that has none: the first bytes of the magic of either copy, or JSON metadata without a magic.
//!
//! A volume whose header was overwritten in part must not be taken for a disk that was never encrypted.

use std::io;

use crate::binary::{self, Copy, HEADER_SIZES};
use crate::copies::HeaderError;
use crate::error::Reason;
use crate::foreign::{self, Format};
use crate::header_io::HeaderIo;
use sealblk_base::size::in_memory;

/// The lowest offset of a trace of a LUKS header on `disk`, at any offset that a copy of a header can have. A complete LUKS1 header is none:
/// it is what it is.
///
/// # Errors
/// If the disk cannot be read.
pub fn trace_of_header(disk: &dyn HeaderIo) -> Result<Option<u64>, Reason> {
    let len = disk.size().map_err(Reason::Length)?;
    for offset in [0].into_iter().chain(HEADER_SIZES) {
        let is_luks1 = offset == 0 && foreign::find(disk) == Some(Format::Luks1);
        if !is_luks1 && has_trace(disk, offset, len).map_err(HeaderError::Read)? {
            return Ok(Some(offset));
        }
    }
    Ok(None)
}

/// Whether something at `offset` looks as if it were, or had been, one copy of a header of this disk.
///
/// A primary copy stands at the start alone. Further on it is that of a volume in a partition, which the guest made there:
/// the first partition often starts where a secondary copy can stand, after 1 MiB.
fn has_trace(disk: &dyn HeaderIo, offset: u64, len: u64) -> io::Result<bool> {
    let mut bytes = [0; 2 * binary::LEN];
    let there = in_memory(len.saturating_sub(offset).min(bytes.len() as u64));
    disk.read_at(&mut bytes[..there], offset)?;
    let (block, json) = bytes.split_at(binary::LEN);
    // The letters are followed by two bytes that a terminal's or a transfer's conversions would have altered.
    let is = |copy: Copy| block[..4] == copy.magic()[..4];
    if is(Copy::Primary) {
        return Ok(offset == 0);
    }
    Ok(is(Copy::Secondary) || is_metadata(json))
}

/// Whether these are the first bytes of LUKS2's JSON metadata: an object, whose first member is one of those that it has.
fn is_metadata(json: &[u8]) -> bool {
    let member = json.strip_prefix(b"{").map(<[u8]>::trim_ascii_start);
    member.is_some_and(|member| OBJECTS.iter().any(|name| member.starts_with(name)))
}

/// What the JSON metadata of LUKS2 consist of, in any order.
const OBJECTS: [&[u8]; 5] = [
    b"\"keyslots\"",
    b"\"tokens\"",
    b"\"segments\"",
    b"\"digests\"",
    b"\"config\"",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{COPY, Memory, sample};

    fn trace(io: &Memory) -> Option<u64> {
        trace_of_header(io).unwrap()
    }

    /// Each of what a header is known by is enough, when everything else of it is gone.
    #[test]
    fn what_was_a_volume_is_not_unencrypted() {
        let wiped_but = |keep: &dyn Fn(u64) -> bool| {
            let io = Memory::of(&sample());
            for (at, byte) in (0..).zip(io.front.borrow_mut().iter_mut()) {
                if !keep(at) {
                    *byte = 0;
                }
            }
            io
        };
        let block = binary::LEN as u64;
        assert_eq!(trace(&wiped_but(&|at| at < 4)), Some(0));
        assert_eq!(trace(&wiped_but(&|at| (block..COPY).contains(&at))), Some(0));
        assert_eq!(
            trace(&wiped_but(&|at| (COPY..COPY + 4).contains(&at))),
            Some(COPY)
        );
        assert_eq!(trace(&wiped_but(&|at| at >= COPY + block)), Some(COPY));
        assert_eq!(trace(&wiped_but(&|at| at % COPY < 3)), None);
    }

    /// Many programs write JSON with members of these names, and their files lie anywhere.
    #[test]
    fn json_of_others_leaves_the_disk_unencrypted() {
        let io = Memory::of(&sample());
        let block = binary::LEN as u64;
        for (json, found) in [
            (&br#"{"schemaVersion":2,"config":{"digests":[]}}"#[..], None),
            (br#"{ "tokens" : {"#, Some(COPY)),
            (b"{\n\t\"segments\"", Some(COPY)),
        ] {
            io.front.borrow_mut().fill(0);
            io.write_at(json, COPY + block).unwrap();
            assert_eq!(trace(&io), found);
        }
    }

    /// Its secondary copy lies where none of this disk's can.
    #[test]
    fn volume_in_a_partition_leaves_the_disk_unencrypted() {
        for start in [1 << 20, 2 << 20] {
            let inner = sample();
            let io = Memory::of(&inner);
            let header = io.front.borrow().clone();
            io.front.borrow_mut().fill(0);
            io.write_at(&header[..2 * COPY as usize], start).unwrap();
            assert_eq!(trace(&io), None);
        }
    }

    #[test]
    fn a_secondary_copy_is_seen_wherever_one_can_stand() {
        for offset in HEADER_SIZES {
            let io = Memory::of(&sample());
            io.front.borrow_mut().fill(0);
            io.write_at(Copy::Secondary.magic(), offset).unwrap();
            assert_eq!(trace(&io), Some(offset));
        }
    }
}
