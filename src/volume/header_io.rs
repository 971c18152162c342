//! What the metadata code asks of the storage under it: little enough that a test can stand in for it and lose
//! everything that was not synced.

use std::fmt::Debug;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Advice, fadvise};

use super::lock::{LockMode, MetadataLock};
use crate::storage::{Backing, Kind};

/// The device or file that holds a header. Transfers are whole, or errors.
///
/// What was written may be read back at once, but survives a crash only after [`HeaderIo::sync`] came back; until
/// then any part of it may have reached the medium, in any order.
pub trait HeaderIo: Debug {
    /// What to call it in messages.
    fn path(&self) -> &Path;

    /// Its length in bytes as of now.
    fn size(&self) -> io::Result<u64>;

    /// Whether its length is a file's, which can be changed.
    fn can_grow(&self) -> bool;

    /// Makes a file that can grow `size` bytes long.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Whether nothing can be written.
    fn read_only(&self) -> bool;

    /// Fills `buffer` from `offset`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes durable all that was written.
    fn sync(&self) -> io::Result<()>;

    /// Has the next read of a range, which was synced, come from the medium and not from a cache.
    fn forget_cached(&self, range: Range<u64>) -> io::Result<()>;

    /// Waits for the lock that every writer of metadata honours.
    fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>>;
}

impl HeaderIo for Backing {
    fn path(&self) -> &Path {
        Backing::path(self)
    }

    fn size(&self) -> io::Result<u64> {
        Backing::len(self).map_err(io::Error::other)
    }

    fn can_grow(&self) -> bool {
        self.kind() == Kind::File
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.file().set_len(size)
    }

    fn read_only(&self) -> bool {
        Backing::read_only(self)
    }

    // The file is opened without O_DIRECT: the page cache takes care of a device's alignment.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file().read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file().write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file().sync_all()
    }

    fn forget_cached(&self, range: Range<u64>) -> io::Result<()> {
        let len = NonZeroU64::new(range.end - range.start);
        Ok(fadvise(self.file(), range.start, len, Advice::DontNeed)?)
    }

    fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>> {
        MetadataLock::acquire(self.file(), mode)
    }
}
