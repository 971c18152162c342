//! Descriptor chains become requests: read once, checked whole, before anything is done (virtio 1.2 §5.2.6).
//!
//! A request is two streams of bytes, however the driver cut them into descriptors (§2.7.4): what the device reads
//! (header, then data or segments) and what it writes (data, then the status byte). What is read here is a copy:
//! the guest may change its memory at any time, and later looks would see something else than what was checked.

use std::sync::atomic::Ordering;

use sealblk_base::blame::Blame;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, Permissions};

use super::disk::Disk;
use super::guest::{GuestRange, HOW_TO_SHARE, Memory, Position, Readable};
use super::limits::{
    MAX_DESCRIPTORS, MAX_DISCARD_SECTORS, MAX_REQUEST, MAX_SECTOR_RANGES, MAX_WRITE_ZEROES_SECTORS,
};

/// A sector in every field of the specification.
pub(super) const SECTOR: u32 = 512;

/// The length of a request's header (§5.2.6, `struct virtio_blk_req`).
const HEADER: u32 = 16;
/// The length of `struct virtio_blk_discard_write_zeroes`.
const RANGE: u32 = 16;
/// The length of the answer to GET_ID.
const ID: u32 = 20;

/// The status byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        let [byte, ..] = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }
        .to_le_bytes();
        byte
    }
}

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Id,
    Discard,
    WriteZeroes,
}

/// A range of sectors: what the specification calls a segment of a discard or write-zeroes request. Here a segment is
/// LUKS2's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SectorRange {
    pub sector: u64,
    pub sectors: u64,
}

/// A request, with all that is needed to carry it out and to answer it. Requests are reused, so that the lists in
/// them are allocated once.
#[derive(Debug)]
pub(super) struct Request {
    /// The chain's head, to be returned in the used ring.
    pub head: u16,
    pub kind: Kind,
    /// The sectors concerned: one range for a read or write, none for a flush.
    pub ranges: Vec<SectorRange>,
    /// Where the status byte goes.
    pub status: GuestAddress,
    /// The length of the device-writable part before the status byte.
    pub writable_len: u32,
    /// The device-readable part: header, then data or segments.
    readable: Vec<GuestRange>,
    /// The device-writable part: data, then the status byte.
    writable: Vec<GuestRange>,
}

/// The buffers of a chain were collected.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gathered {
    readable_len: u32,
    writable_len: u32,
    /// Its last byte takes the status.
    last_writable: GuestRange,
}

/// Why a chain is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadRequest {
    #[error("the chain has no place for a status byte, more than {MAX_DESCRIPTORS} descriptors, or no end")]
    Malformed,
    #[error("the chain is shorter than a request's header")]
    NoHeader,
    #[error("a buffer of the chain is not in memory that the front-end has shared; {HOW_TO_SHARE}")]
    BadAddress,
    #[error("request type {0} is not offered")]
    UnknownType(u32),
    #[error("length {0} is not a multiple of the disk's sector size, or longer than size_max times seg_max")]
    BadLength(u32),
    #[error("sector {sector} + {sectors} is beyond the disk's end, or not at a multiple of its sector size")]
    OutOfRange { sector: u64, sectors: u64 },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("discard or write-zeroes with {0} bytes of segments")]
    BadRanges(u32),
    #[error("discard or write-zeroes of {0} sectors in one segment")]
    RangeTooLong(u32),
    #[error("discard or write-zeroes with flags {0:#x}")]
    UnknownFlags(u32),
}

impl BadRequest {
    /// Where the cause lies.
    pub(super) fn blame(self) -> Blame {
        match self {
            // Or the guest's: it may have memory that the front-end did not share.
            Self::BadAddress => Blame::FrontEnd,
            Self::Malformed
            | Self::NoHeader
            | Self::UnknownType(_)
            | Self::BadLength(_)
            | Self::OutOfRange { .. }
            | Self::ReadOnly
            | Self::BadRanges(_)
            | Self::RangeTooLong(_)
            | Self::UnknownFlags(_) => Blame::Guest,
        }
    }
}

impl BadRequest {
    /// The status that the driver gets; none if there is no way to report it.
    pub(super) fn status(self) -> Option<Status> {
        match self {
            BadRequest::Malformed => None,
            BadRequest::UnknownType(_) | BadRequest::UnknownFlags(_) => Some(Status::Unsupported),
            _ => Some(Status::IoError),
        }
    }

    /// Whether the driver may have seen another disk: when the guest started, the disk was served with other
    /// options or had another size, and a front-end that reconnects does not ask again.
    pub(super) fn may_be_of_another_disk(self) -> bool {
        use BadRequest::{BadLength, OutOfRange, ReadOnly};
        matches!(self, ReadOnly | BadLength(_) | OutOfRange { .. })
    }
}

/// The disk that requests are checked against.
#[derive(Clone, Copy)]
pub(super) struct Target<'d> {
    pub disk: &'d Disk,
    /// The sectors of the table by which they are carried out: the disk may be longer already.
    pub sectors: u64,
}

impl Request {
    /// An empty request, to be filled by [`Request::parse`].
    pub(super) fn new() -> Self {
        Self {
            head: 0,
            kind: Kind::Flush,
            ranges: Vec::new(),
            status: GuestAddress(0),
            writable_len: 0,
            readable: Vec::new(),
            writable: Vec::new(),
        }
    }

    /// The guest's buffers that hold the data of a read or write, or take the answer to GET_ID.
    pub(super) fn data(&self) -> &[GuestRange] {
        if self.kind == Kind::Write {
            &self.readable
        } else {
            &self.writable
        }
    }

    /// Where the data starts in [`Request::data`].
    pub(super) fn data_start(&self) -> Position {
        let header = if self.kind == Kind::Write { HEADER } else { 0 };
        Position::default().advanced(self.data(), header)
    }

    /// Reads what a chain asks for, and checks all of it against the disk and the guest's memory.
    ///
    /// After a refusal that has a status, `status` and `writable_len` are valid, so that it can be answered.
    pub(super) fn parse(
        &mut self,
        gathered: Result<Gathered, BadRequest>,
        memory: &Memory,
        target: Target<'_>,
    ) -> Result<(), BadRequest> {
        self.ranges.clear();
        let readable_len = self.find_status(gathered?, memory)?;

        let mut header = [0; HEADER as usize];
        if readable_len < HEADER {
            return Err(BadRequest::NoHeader);
        }
        self.read_out(memory, Position::default(), &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);

        let ranges = self.readable.iter().map(|range| (range, Permissions::Read));
        if !ranges
            .chain(self.writable.iter().map(|range| (range, Permissions::Write)))
            .all(|(range, access)| range.is_in(memory, access))
        {
            return Err(BadRequest::BadAddress);
        }

        let payload_len = readable_len - HEADER;
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => self.parse_transfer(Kind::Read, sector, self.writable_len, target),
            VIRTIO_BLK_T_OUT => self.parse_transfer(Kind::Write, sector, payload_len, target),
            VIRTIO_BLK_T_FLUSH => {
                self.kind = Kind::Flush;
                Ok(())
            }
            VIRTIO_BLK_T_GET_ID => {
                self.kind = Kind::Id;
                Ok(())
            }
            VIRTIO_BLK_T_DISCARD if target.disk.discard => {
                self.parse_ranges(Kind::Discard, payload_len, memory, target)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => self.parse_ranges(Kind::WriteZeroes, payload_len, memory, target),
            unknown => Err(BadRequest::UnknownType(unknown)),
        }
    }

    /// Collects the chain's head and buffers.
    pub(super) fn gather(&mut self, chain: DescriptorChain<&Readable>) -> Result<Gathered, BadRequest> {
        self.head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        let mut readable_len = 0;
        let mut writable_len = 0;
        let mut last_writable = None;
        let mut ends = false;
        let mut in_order = true;
        for (count, descriptor) in chain.enumerate() {
            if count >= MAX_DESCRIPTORS {
                return Err(BadRequest::Malformed);
            }
            ends = !descriptor.has_next();
            let range = GuestRange {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            in_order &= descriptor.is_write_only() || last_writable.is_none();
            if range.len == 0 {
                continue;
            }
            let (list, total) = if descriptor.is_write_only() {
                last_writable = Some(range);
                (&mut self.writable, &mut writable_len)
            } else {
                (&mut self.readable, &mut readable_len)
            };
            // No overflow: the iterator ends a chain of more than 2^32 bytes (§2.7.5.2), with `ends` false.
            *total += range.len;
            list.push(range);
        }
        let last_writable = last_writable
            .filter(|_| ends && in_order)
            .ok_or(BadRequest::Malformed)?;
        Ok(Gathered {
            readable_len,
            writable_len,
            last_writable,
        })
    }

    /// Finds the status byte, and gives the length of the device-readable part.
    fn find_status(&mut self, gathered: Gathered, memory: &Memory) -> Result<u32, BadRequest> {
        let last = gathered.last_writable;
        let status = last
            .address
            .0
            .checked_add(u64::from(last.len) - 1)
            .map(GuestAddress);
        self.status = status.ok_or(BadRequest::Malformed)?;
        self.writable_len = gathered.writable_len - 1;
        if !(GuestRange {
            address: self.status,
            len: 1,
        })
        .is_in(memory, Permissions::Write)
        {
            return Err(BadRequest::Malformed);
        }
        Ok(gathered.readable_len)
    }

    fn parse_transfer(
        &mut self,
        kind: Kind,
        sector: u64,
        len: u32,
        target: Target<'_>,
    ) -> Result<(), BadRequest> {
        self.kind = kind;
        if kind == Kind::Write && target.disk.read_only {
            return Err(BadRequest::ReadOnly);
        }
        if !len.is_multiple_of(u32::from(target.disk.sector_size.sectors()) * SECTOR) || len > MAX_REQUEST {
            return Err(BadRequest::BadLength(len));
        }
        self.add_range(sector, len / SECTOR, target)
    }

    /// Reads the segments of a discard or write-zeroes request (§5.2.6, `struct virtio_blk_discard_write_zeroes`).
    fn parse_ranges(
        &mut self,
        kind: Kind,
        len: u32,
        memory: &Memory,
        target: Target<'_>,
    ) -> Result<(), BadRequest> {
        self.kind = kind;
        if target.disk.read_only {
            return Err(BadRequest::ReadOnly);
        }
        if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > u32::from(MAX_SECTOR_RANGES) {
            return Err(BadRequest::BadRanges(len));
        }
        let (allowed_flags, max_sectors) = match kind {
            Kind::Discard => (0, MAX_DISCARD_SECTORS),
            // Permission to unmap is not a wish to: the range has to read as zeros, which takes encrypted zeros.
            _ => (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_WRITE_ZEROES_SECTORS),
        };
        let mut ranges = [[0; RANGE as usize]; MAX_SECTOR_RANGES as usize];
        let ranges = &mut ranges[..(len / RANGE) as usize];
        let start = Position::default().advanced(&self.readable, HEADER);
        self.read_out(memory, start, ranges.as_flattened_mut())?;
        for range in ranges {
            let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = *range;
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags & !allowed_flags != 0 {
                return Err(BadRequest::UnknownFlags(flags));
            }
            if sectors > max_sectors {
                return Err(BadRequest::RangeTooLong(sectors));
            }
            self.add_range(u64::from_le_bytes(sector), sectors, target)?;
        }
        Ok(())
    }

    fn add_range(&mut self, sector: u64, sectors: u32, target: Target<'_>) -> Result<(), BadRequest> {
        let sectors = u64::from(sectors);
        let granule = u64::from(target.disk.sector_size.sectors());
        let in_range = sector
            .checked_add(sectors)
            .is_some_and(|end| end <= target.sectors);
        if !in_range || !sector.is_multiple_of(granule) || !sectors.is_multiple_of(granule) {
            return Err(BadRequest::OutOfRange { sector, sectors });
        }
        self.ranges.push(SectorRange { sector, sectors });
        Ok(())
    }

    /// Copies from the device-readable part.
    fn read_out(&self, memory: &Memory, from: Position, target: &mut [u8]) -> Result<(), BadRequest> {
        let len = u32::try_from(target.len()).map_err(|_| BadRequest::BadAddress)?;
        let source = memory.source(&self.readable, from, len);
        let mut copied = 0;
        for piece in source.map_err(|_| BadRequest::BadAddress)? {
            copied += piece.copy_to(&mut target[copied..]);
        }
        if copied == target.len() {
            Ok(())
        } else {
            Err(BadRequest::BadAddress)
        }
    }

    /// Answers GET_ID (§5.2.6.1): at most 20 bytes of the serial. Gives the number of bytes written.
    pub(super) fn write_id(&self, memory: &Memory, serial: &[u8; ID as usize]) -> u32 {
        let len = self.writable_len.min(ID);
        let written = memory.fill(&self.writable, Position::default(), len, |pieces| {
            let mut rest = &serial[..];
            for piece in pieces {
                piece.copy_from(rest);
                rest = &rest[piece.len().min(rest.len())..];
            }
        });
        written.map_or(0, |()| len)
    }

    /// Writes the status byte.
    pub(super) fn write_status(
        &self,
        memory: &Memory,
        status: Status,
    ) -> Result<(), vm_memory::GuestMemoryError> {
        memory.store(status.byte(), self.status, Ordering::Relaxed)
    }
}
