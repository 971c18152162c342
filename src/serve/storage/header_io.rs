//! The metadata of a volume in a file or block device.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use rustix::io::Errno;

use super::backing::Backing;
use super::capabilities::Kind;
use crate::luks2::{HeaderIo, LockMode, MetadataLock, read_direct};

/// Another process may serve the disk, on another host too.
const NOT_CLAIMED: &str =
    "the volume's header can be changed only where the guest runs, or by a process that has the disk alone";

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
        if i64::try_from(size).is_err() {
            return Err(Errno::FBIG.into());
        }
        self.file().set_len(size)
    }

    fn read_only(&self) -> bool {
        Backing::read_only(self)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self.direct() {
            Some(file) => read_direct(file, buffer, offset),
            // A file system without direct I/O keeps its cache in step with its storage; NFS does when the file is locked.
            None => self.file().read_exact_at(buffer, offset),
        }
    }

    // Through the page cache, which takes care of a device's alignment. Direct reads find what is in it.

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file().write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Backing::sync(self)
    }

    fn forget_cached(&self, range: Range<u64>) -> io::Result<()> {
        let len = NonZeroU64::new(range.end - range.start);
        Ok(fadvise(self.file(), range.start, len, Advice::DontNeed)?)
    }

    fn uncached(&self) -> io::Result<Option<File>> {
        self.direct().map(File::try_clone).transpose()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<bool> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self.file(), flags, range.start, range.end - range.start) {
            Ok(()) => Backing::sync(self).map(|()| true),
            Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::INVAL | Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>> {
        if mode == LockMode::Read {
            return MetadataLock::acquire(self.file(), mode, self.metadata_lock());
        }
        let not_claimed = || io::Error::new(io::ErrorKind::PermissionDenied, NOT_CLAIMED);
        if !self.may_change() {
            return Err(not_claimed());
        }
        let alone = self.change_alone();
        let lock = MetadataLock::acquire(self.file(), mode, self.metadata_lock())?;
        // Another thread may have given the claim back while this one has waited.
        match self.may_change() {
            true => Ok(lock.alone(alone)),
            false => Err(not_claimed()),
        }
    }
}
