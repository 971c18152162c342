//! Messages of the front-end that the protocol handler would accept, and that we cannot serve: they end the session.
//!
//! Descriptors come first. Nothing else is done with one before its kind is known; see [`super::foreign`].

use rustix::fs::SealFlags;
use sealblk_base::blame::Blame;
use vhost::vhost_user::message::{VhostUserLog, VhostUserMemoryRegion};

use super::foreign::{Foreign, Kind};
use super::frontend_message::{FrontendMessage, Refused, Scope, named};
use super::guest::HOW_TO_SHARE;
use super::limits::MAX_REGIONS;
use super::message::Message;
use super::rings::Rings;
use crate::storage::PAGE;

/// Why a message is not passed on.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("{} has a descriptor that is not {wanted}: {found}", named(*.message))]
    Descriptor {
        message: u32,
        wanted: &'static str,
        found: String,
    },
    #[error(
        "guest memory is in {found}, which is neither a memfd, nor a file of tmpfs or hugetlbfs, nor a DAX device; take one of these \
         in its place, for a virtual NVDIMM, too: {HOW_TO_SHARE}"
    )]
    MemoryFile { found: String },
    #[error("guest memory is in {found}, which the front-end has opened read-only; {HOW_TO_SHARE}")]
    MemoryReadOnly { found: String },
    #[error(
        "a memory region does not lie within its file, or is not made of whole huge pages; {HOW_TO_SHARE}"
    )]
    MemoryBeyondFile,
    #[error(
        "the log of a migration is in {found}, which is no memfd that can be written to and is sealed against shrinking; QEMU has it in \
         one, unless it may not call memfd_create(2)"
    )]
    LogFile { found: String },
    #[error("more than {MAX_REGIONS} memory regions; have fewer NUMA nodes or DIMMs")]
    TooManyRegions,
    #[error("queue {index} is one too many: there are {queues} (--num-queues)")]
    QueueIndex { index: usize, queues: usize },
    #[error("a queue of {0} descriptors, which is not a power of two")]
    QueueSize(u32),
}

impl CheckError {
    /// Where the cause lies.
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::Refused(_) | Self::Descriptor { .. } | Self::QueueSize(_) => Blame::FrontEnd,
            Self::MemoryFile { .. }
            | Self::MemoryReadOnly { .. }
            | Self::MemoryBeyondFile
            | Self::LogFile { .. }
            | Self::TooManyRegions
            | Self::QueueIndex { .. } => Blame::Operator,
        }
    }
}

/// Checks `message`, which was decoded as `content`.
pub(super) fn check(message: &Message, content: &FrontendMessage, rings: &Rings) -> Result<(), CheckError> {
    for descriptor in message.fds() {
        check_descriptor(message.number(), content, descriptor)?;
    }
    if let Some(Scope::One(index)) = content.rule().pauses
        && index >= rings.count()
    {
        let queues = rings.count();
        return Err(CheckError::QueueIndex { index, queues });
    }
    match content {
        FrontendMessage::SetMemTable(regions) => check_regions(regions, message.fds()),
        FrontendMessage::AddMemReg(region) => {
            check_regions(&[**region], message.fds())?;
            match rings.memory_regions() {
                ..MAX_REGIONS => Ok(()),
                _ => Err(CheckError::TooManyRegions),
            }
        }
        FrontendMessage::SetLogBase(log) => match message.fds() {
            [file] if is_log(log, file) => Ok(()),
            _ => Err(Refused(message.number()).into()),
        },
        FrontendMessage::SetVringNum(ring) if !ring.num.is_power_of_two() => {
            Err(CheckError::QueueSize(ring.num))
        }
        FrontendMessage::SetVringKick(ring) if !ring.is_there => {
            tracing::warn!(
                "a queue without a kick must be polled, which sealblk does not do: it is not served"
            );
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Refuses a descriptor of another kind than the message has.
fn check_descriptor(message: u32, content: &FrontendMessage, descriptor: &Foreign) -> Result<(), CheckError> {
    use FrontendMessage as M;
    let found = || descriptor.name();
    let wrong = |wanted| CheckError::Descriptor {
        message,
        wanted,
        found: found(),
    };
    match (content, descriptor.kind()) {
        (M::SetMemTable(_) | M::AddMemReg(_) | M::RemMemReg, Kind::Memory | Kind::Dax { .. }) => {
            match descriptor.is_writable() {
                true => Ok(()),
                false => Err(CheckError::MemoryReadOnly { found: found() }),
            }
        }
        (M::SetMemTable(_) | M::AddMemReg(_) | M::RemMemReg, _) => {
            Err(CheckError::MemoryFile { found: found() })
        }
        (M::SetLogBase(_), Kind::Memory) if descriptor.is_writable() && cannot_shrink(descriptor) => Ok(()),
        (M::SetLogBase(_), _) => Err(CheckError::LogFile { found: found() }),
        (M::SetVringKick(_) | M::SetVringCall(_) | M::SetVringErr(_), Kind::Event)
        | (M::SetBackendReqFd, Kind::Socket)
        | (M::SetInflightFd(_), Kind::Memory) => Ok(()),
        (M::SetVringKick(_) | M::SetVringCall(_) | M::SetVringErr(_), _) => Err(wrong("an eventfd")),
        (M::SetBackendReqFd, _) => Err(wrong("a Unix stream socket")),
        (M::SetInflightFd(_), _) => Err(wrong("the memfd that it was given")),
        _ => Err(Refused(message).into()),
    }
}

/// Refuses a region that does not lie within its file, or is not made of whole pages of it: to touch what lies beyond would be
/// a SIGBUS, and a part of a huge page cannot be unmapped. The handler finds all else that may be wrong with regions.
fn check_regions(regions: &[VhostUserMemoryRegion], files: &[Foreign]) -> Result<(), CheckError> {
    match regions
        .iter()
        .zip(files)
        .all(|(region, file)| is_mappable(region.memory_size, region.mmap_offset, file))
    {
        true => Ok(()),
        false => Err(CheckError::MemoryBeyondFile),
    }
}

fn is_mappable(size: u64, offset: u64, file: &Foreign) -> bool {
    let end = size.checked_add(offset);
    let within = |len| end.is_some_and(|end| end <= len);
    match file.kind() {
        Kind::Memory => huge_page(file).is_some_and(|page| {
            rustix::fs::fstat(file).is_ok_and(|stat| u64::try_from(stat.st_size).is_ok_and(within))
                && size.is_multiple_of(page)
                && offset.is_multiple_of(page)
        }),
        Kind::Dax { size } => within(size),
        _ => false,
    }
}

/// Whether the log lies within its file, and can be mapped from its offset on.
fn is_log(log: &VhostUserLog, file: &Foreign) -> bool {
    let (size, offset) = (log.mmap_size, log.mmap_offset);
    size > 0 && offset.is_multiple_of(PAGE as u64) && is_mappable(size, offset, file)
}

fn cannot_shrink(file: &Foreign) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

/// The size of the huge pages that a memory file is made of; 1 if it is not.
fn huge_page(file: &Foreign) -> Option<u64> {
    let stat = rustix::fs::fstatfs(file).ok()?;
    match stat.f_type {
        HUGETLBFS_MAGIC => u64::try_from(stat.f_bsize).ok().filter(|page| *page > 0),
        _ => Some(1),
    }
}

/// What statfs(2) says of hugetlbfs.
const HUGETLBFS_MAGIC: libc::__fsword_t = 0x9584_58f6;
