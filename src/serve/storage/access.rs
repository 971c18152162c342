//! What storage is opened for, and why it cannot be.

use std::io;
use std::path::PathBuf;

use sealblk_base::blame::Blame;

use super::capabilities::Protection;
use crate::error_chain::remedy;

/// What a [`Backing`](super::Backing) is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads only; any number of read-only openers share the file.
    ReadOnly,
    /// Reads and writes; nobody else may have the file attached.
    ReadWrite,
    /// Reads of metadata, whoever has the file attached: it is not claimed. What is read may change at any time.
    Inspect,
}

/// Why a file or block device cannot be used as storage.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("{}: cannot be opened for {}{}", path.display(), match access {
        Access::ReadOnly | Access::Inspect => "reading",
        Access::ReadWrite => "reading and writing",
    }, remedy(source))]
    Open {
        path: PathBuf,
        access: Access,
        source: io::Error,
    },
    #[error("{}: {by}", path.display())]
    WriteProtected { path: PathBuf, by: Protection },
    #[error("{}: is neither a regular file nor a block device; name the disk's file or device", path.display())]
    NotStorage { path: PathBuf },
    #[error(
        "{}: is in use by another process (another sealblk, a QEMU, a mount or device-mapper); detach it there first",
        path.display()
    )]
    InUse { path: PathBuf },
    #[error(
        "{}: writes of a process that was killed have not reached the storage yet: waiting for them, since they could overwrite later \
         ones; if this takes long, see whether the storage hangs", path.display()
    )]
    Landing { path: PathBuf },
    #[error(
        "{}: the loop device {} uses it, so other processes could write to it; detach the loop device (`losetup --detach {1}`), \
         or name the loop device instead", path.display(), device.display()
    )]
    UnderLoop { path: PathBuf, device: PathBuf },
    #[error(
        "{}: cannot be locked, so a second server could use it at the same time; mount its file system with locks, or move the \
         disk to another file system", path.display()
    )]
    Lock { path: PathBuf, source: io::Error },
    #[error("{}: its size cannot be read{}", path.display(), remedy(source))]
    Size { path: PathBuf, source: io::Error },
    #[error("{}: cannot be opened once more{}", path.display(), remedy(source))]
    Reopen { path: PathBuf, source: io::Error },
}

impl StorageError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::InUse { .. } | Self::Landing { .. } | Self::UnderLoop { .. } => Blame::Use,
            Self::Open { .. }
            | Self::WriteProtected { .. }
            | Self::NotStorage { .. }
            | Self::Lock { .. }
            | Self::Size { .. }
            | Self::Reopen { .. } => Blame::Storage,
        }
    }
}
