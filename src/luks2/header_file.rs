//! A header in a file or block device, for programs that have no storage layer of their own.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, OFlags, fadvise, seek};

use crate::header_io::{BLOCK, HeaderIo};
use crate::lock::{FileLock, LockMode, MetadataLock};

/// A file or block device.
#[derive(Debug)]
pub struct HeaderFile {
    path: PathBuf,
    file: File,
    /// The same without a cache of this host between; none where the file system does not offer that.
    direct: Option<File>,
    read_only: bool,
    is_file: bool,
}

impl HeaderFile {
    /// Opens `path`, for writing too if `writable` says so.
    ///
    /// # Errors
    /// If it cannot be opened, or is neither a file nor a block device.
    pub fn open(path: &Path, writable: bool) -> io::Result<Self> {
        let open = |flags: OFlags| {
            let flags = flags | OFlags::NONBLOCK;
            OpenOptions::new()
                .read(true)
                .write(writable)
                .custom_flags(flags.bits().cast_signed())
                .open(path)
        };
        let file = open(OFlags::empty())?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let text = "it is neither a regular file nor a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            direct: open(OFlags::DIRECT).ok(),
            read_only: !writable,
            is_file: kind.is_file(),
        })
    }
}

impl HeaderIo for HeaderFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> io::Result<u64> {
        // A block device has no length among its metadata.
        Ok(seek(&self.file, rustix::fs::SeekFrom::End(0))?)
    }

    fn can_grow(&self) -> bool {
        self.is_file
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(file) => read_direct(file, buffer, offset),
            None => self.file.read_exact_at(buffer, offset),
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn forget_cached(&self, range: Range<u64>) -> io::Result<()> {
        let len = NonZeroU64::new(range.end - range.start);
        Ok(fadvise(&self.file, range.start, len, Advice::DontNeed)?)
    }

    fn uncached(&self) -> io::Result<Option<File>> {
        self.direct.as_ref().map(File::try_clone).transpose()
    }

    fn lock(&self, mode: LockMode) -> io::Result<MetadataLock<'_>> {
        MetadataLock::acquire(&self.file, mode, FileLock::Flock)
    }
}

/// Fills `buffer` from `offset` by direct I/O, which is in whole blocks of [`BLOCK`] bytes.
///
/// # Errors
/// If the read fails, or ends before the buffer is full.
pub fn read_direct(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    const MOST: usize = 1 << 20;
    const LEN: usize = 4096;
    const { assert!(LEN as u64 == BLOCK) };
    let block = LEN;
    let mut memory = vec![0; MOST.min(buffer.len()).next_multiple_of(block) + 2 * block];
    let start = memory.as_ptr().align_offset(block);
    let blocks = &mut memory[start..];
    let mut filled = 0;
    while filled < buffer.len() {
        let at = offset.saturating_add(filled as u64);
        let before = (at % BLOCK) as usize;
        let rest = (buffer.len() - filled).min(MOST);
        let len = (before + rest)
            .next_multiple_of(block)
            .min(blocks.len() / block * block);
        let read = match file.read_at(&mut blocks[..len], at - before as u64) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        // Less than was asked for ends at the end of the file, in the middle of a block perhaps.
        let found = read.saturating_sub(before).min(rest);
        if found == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer[filled..filled + found].copy_from_slice(&blocks[before..before + found]);
        filled += found;
    }
    Ok(())
}
