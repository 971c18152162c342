//! An unencrypted disk: a disk that is not a volume. Its bytes belong to the guest, and are not encrypted.
//!
//! If a volume were served as an unencrypted disk, the guest would see ciphertext, and overwrite header and data. So a disk
//! counts as unencrypted only if no possible header offset has a trace of a LUKS header: the first bytes of the magic of
//! either copy (also of LUKS1), or JSON metadata without a magic. A disk with a completely overwritten header, and the
//! payload of a detached header, look like noise: only the operator knows that they are encrypted, so he must request
//! unencrypted disks explicitly.
//!
//! The signature of another format also refuses a disk ([`Format`]), unless the operator says that the disk is raw: a guest
//! should not see an image as its disk, but a guest may have written such a signature to its unencrypted disk.
//!
//! A guest can write a LUKS2 header to its unencrypted disk. It then loses access to the disk: sealblk takes it for a volume
//! without a known key.

use std::path::PathBuf;
use std::sync::Arc;

use sealblk_base::blame::Blame;

use super::{SegmentTable, Treatment};
use crate::cipher::{Sector, SectorSize};
use crate::luks2::{self, Advice, Format, HeaderIo, Reason, VolumeError};

/// Why a disk is not served as an unencrypted one.
#[derive(Debug, thiserror::Error)]
pub enum UnencryptedError {
    /// It was a volume.
    #[error(
        "{}: it has no LUKS2 header, but a trace of one at byte {offset}, so it is not served as an unencrypted disk; if the disk was \
         a volume, restore a backup of its header with `cryptsetup luksHeaderRestore`; if it was never one, copy its data to a \
         disk on which these bytes are at another offset",
        path.display()
    )]
    TraceOfHeader {
        /// The disk.
        path: PathBuf,
        /// Where the trace is.
        offset: u64,
    },
    /// It looks like something that is not a guest's disk.
    #[error(
        "{}: it is {format}, and is not served as raw: {}; if it is an unencrypted disk, and its guest has written that content, \
         give --format raw",
        path.display(),
        Advice { path, format: *format }
    )]
    Foreign {
        /// The disk.
        path: PathBuf,
        /// What it looks like.
        format: Format,
    },
    /// It cannot be read, or is not a whole number of sectors.
    #[error(transparent)]
    Disk(#[from] VolumeError),
}

impl UnencryptedError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::TraceOfHeader { .. } | Self::Foreign { .. } => Blame::Content,
            Self::Disk(error) => error.reason.blame(),
        }
    }
}

/// The whole of `disk` as one linear segment, where [`Locked::open`](luks2::Locked::open) has found no header. `raw` says that
/// the operator knows it to be an unencrypted disk, whatever format it looks like.
///
/// # Errors
/// Where there is a trace of a LUKS header, or another format that is not known to be raw, or the disk is not a whole number of
/// sectors of that size. As a loop device does, it ends with the last whole sector of 512 bytes.
pub fn unencrypted(
    disk: &dyn HeaderIo,
    sector_size: SectorSize,
    raw: bool,
) -> Result<Arc<SegmentTable>, UnencryptedError> {
    let path = || disk.path().to_owned();
    let failed = |reason: Reason| reason.at(disk.path());
    if let Some(offset) = luks2::trace_of_header(disk).map_err(failed)? {
        return Err(UnencryptedError::TraceOfHeader { path: path(), offset });
    }
    let format = luks2::find_format(disk).filter(|format| format.is_foreign() && !raw);
    if let Some(format) = format {
        return Err(UnencryptedError::Foreign { path: path(), format });
    }
    let len = disk.size().map_err(Reason::Length).map_err(failed)?;
    let unit = sector_size.bytes();
    let capacity = len / Sector::LEN * Sector::LEN;
    if capacity == 0 {
        let needed = unit as u64;
        return Err(failed(Reason::TooSmall { len, needed }).into());
    }
    if !capacity.is_multiple_of(unit as u64) {
        return Err(failed(Reason::Capacity {
            capacity,
            sector_size: unit,
        })
        .into());
    }
    Ok(Arc::new(SegmentTable::whole(capacity, Treatment::Linear)))
}
