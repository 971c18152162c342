//! What the metadata code asks of the storage under it: little enough that a test can stand in for it and lose
//! everything that was not synced.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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

    /// Waits for the lock that every writer of metadata honours.
    fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>>;
}

/// A header to look at, on a disk that may be served meanwhile: it takes no lock but that on the metadata.
#[derive(Debug)]
pub struct HeaderFile {
    file: File,
    path: PathBuf,
}

impl HeaderFile {
    /// Opens a file or block device for reading.
    ///
    /// # Errors
    /// Where it cannot be opened, or is neither.
    pub fn open(path: &Path) -> io::Result<Self> {
        // O_NONBLOCK, so that a FIFO in the disk's place cannot hang us.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }
}

impl HeaderIo for HeaderFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> io::Result<u64> {
        // A block device has no length but where its end is.
        (&self.file).seek(SeekFrom::End(0))
    }

    fn can_grow(&self) -> bool {
        false
    }

    fn set_size(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>> {
        MetadataLock::acquire(&self.file, mode)
    }
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

    fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>> {
        MetadataLock::acquire(self.file(), mode)
    }
}
