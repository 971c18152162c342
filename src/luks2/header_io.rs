//! The storage interface of the metadata code: so small that a test can replace it and lose everything that was not
//! synced.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use crate::lock::{LockMode, MetadataLock};

/// What direct I/O is aligned to, wherever it is to be had.
pub const BLOCK: u64 = 4096;

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

    /// Fills `buffer` from `offset`, from the medium and not from a cache of this host, where that is to be had: another host
    /// may have written a device that both have.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes durable all that was written.
    fn sync(&self) -> io::Result<()>;

    /// Has the next read of a range, which was synced, come from the medium and not from a cache.
    fn forget_cached(&self, range: Range<u64>) -> io::Result<()>;

    /// The same file or device without a cache of this host between, where that is to be had: for transfers of whole
    /// blocks of [`BLOCK`] bytes, from memory that begins at a multiple of that.
    fn uncached(&self) -> io::Result<Option<File>> {
        Ok(None)
    }

    /// Tells storage that it need not keep a range. Gives whether it took that.
    fn discard(&self, range: Range<u64>) -> io::Result<bool> {
        let _ = range;
        Ok(false)
    }

    /// Waits for the lock that every writer of metadata honours.
    fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>>;
}
