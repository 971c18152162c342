//! The capabilities of the storage: whether it is writable, how direct I/O is aligned, whether it supports discards.
//!
//! These checks do not change the stored data. The check for discards requests a range that cannot be discarded: the kernel
//! first checks the support, then the range.

#![allow(unsafe_code)] // The ioctls of block devices have no safe wrapper.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, StatxAttributes, StatxFlags, major, minor};
use rustix::io::Errno;

/// What kind of inode a [`Backing`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// Why storage that can be read cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Protection {
    #[error(
        "the device is read-only; make it writable (`blockdev --setrw`, a loop device set up without --read-only, the write \
         protection of the LUN)"
    )]
    Device,
    #[error("its file system is mounted read-only; remount it for writing")]
    FileSystem,
    #[error("it is immutable or append-only (see `lsattr`); clear these attributes with `chattr -i -a`")]
    Attribute,
    #[error("this user has read access, but no write access; give the user write access")]
    Permission,
}

/// What keeps `path` from being opened for writing, which failed with `error`; none if it cannot be opened for reading
/// either.
pub(super) fn protection(path: &Path, error: Errno) -> Option<Protection> {
    if !matches!(error, Errno::ROFS | Errno::ACCESS | Errno::PERM) {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    let file_type = file.metadata().ok()?.file_type();
    if file_type.is_block_device() && (error == Errno::ROFS || is_read_only(&file).unwrap_or(false)) {
        return Some(Protection::Device);
    }
    match error {
        Errno::ROFS => Some(Protection::FileSystem),
        Errno::ACCESS => Some(Protection::Permission),
        _ => is_immutable(&file).then_some(Protection::Attribute),
    }
}

fn is_immutable(file: &File) -> bool {
    let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::empty());
    let protects = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    statx.is_ok_and(|statx| statx.stx_attributes.intersects(protects))
}

/// The length of a block device in bytes.
pub(super) fn block_device_size(device: &File) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer, which is valid for that.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    if result == 0 {
        Ok(size)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The smallest unit of a block device's I/O, in bytes.
pub(super) fn logical_block_size(device: &File) -> io::Result<u32> {
    int_of(device, BLKSSZGET).map(i32::unsigned_abs)
}

/// Whether a block device takes no writes, though it can be opened for them.
pub(super) fn is_read_only(device: &File) -> io::Result<bool> {
    int_of(device, BLKROGET).map(|read_only| read_only != 0)
}

fn int_of(device: &File, request: libc::c_ulong) -> io::Result<i32> {
    let mut value = 0_i32;
    // SAFETY: BLKSSZGET and BLKROGET, all that callers pass, write one int to the pointer, which is valid for that.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, &raw mut value) };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether `file`, which is open for writing, takes discards.
///
/// # Errors
/// The kernel's answer where it takes none.
pub(super) fn takes_discards(file: &File, kind: Kind) -> io::Result<()> {
    match kind {
        // A hole past the end is none; a file system that makes no holes says so before it looks where.
        Kind::File => {
            let past = file.metadata()?.len().next_multiple_of(1 << 20);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(file, flags, past, 4096) {
                // One that refuses what lies past the end makes them elsewhere (nbdfuse).
                Ok(()) | Err(Errno::NOSPC | Errno::FBIG) => Ok(()),
                Err(error) => Err(error.into()),
            }
        }
        Kind::BlockDevice => {
            let unaligned = [1_u64, 1];
            // SAFETY: BLKDISCARD reads two u64 from the pointer, which is valid for that. It discards nothing: the range
            // is no whole sector, which the kernel refuses once it has seen that the device takes discards.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, unaligned.as_ptr()) };
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                _ if result == 0 => Ok(()),
                Some(libc::EINVAL) => Ok(()),
                _ => Err(error),
            }
        }
    }
}

/// What a discard should be aligned to, in bytes, to give anything back; 1 where nothing tells.
pub(super) fn discard_granularity(file: &File, kind: Kind) -> u64 {
    let told = match kind {
        Kind::File => None,
        Kind::BlockDevice => file
            .metadata()
            .ok()
            .and_then(|metadata| queue_limit(metadata.rdev(), "discard_granularity")),
    };
    told.unwrap_or(0).max(1)
}

/// The alignment in bytes that O_DIRECT asks of offsets and lengths, or none where it is not to be had.
///
/// Offsets and lengths follow the file (statx(2), `stx_dio_offset_align`); our buffers are aligned to pages, which
/// satisfies every `stx_dio_mem_align`.
pub(super) fn direct_alignment(file: &File, kind: Kind) -> Option<u32> {
    let statx = rustix::fs::statx(
        file,
        "",
        AtFlags::EMPTY_PATH,
        StatxFlags::from_bits_retain(STATX_DIOALIGN),
    );
    if let Ok(statx) = statx
        && statx.stx_mask & STATX_DIOALIGN != 0
    {
        return (statx.stx_dio_offset_align != 0).then_some(statx.stx_dio_offset_align);
    }
    match kind {
        Kind::BlockDevice => logical_block_size(file).ok(),
        Kind::File => Some(untold_alignment(file)),
    }
}

/// The number of the file system of `file` (statfs(2)). Magic numbers have 32 bits, with or without a sign.
pub(super) fn file_system(file: &File) -> u32 {
    let [k0, k1, k2, k3, ..] = rustix::fs::fstatfs(file)
        .map_or(0, |stat| stat.f_type)
        .to_le_bytes();
    u32::from_le_bytes([k0, k1, k2, k3])
}

/// The number of NFS, as the client of Linux has it.
pub(super) const NFS: u32 = 0x6969;

/// The same of a file, before Linux 6.1, where nothing tells it: that of the device under its file system, else a page's.
///
/// To try is no way to find it: a read from a hole or past the end is taken at any alignment, also where a write is not.
///
/// NFS has no blocks: its requests begin and end at any byte, and the client's direct I/O passes them on as they are.
fn untold_alignment(file: &File) -> u32 {
    if file_system(file) == NFS {
        return 512;
    }
    let device = file.metadata().map(|metadata| metadata.dev());
    let told = device
        .ok()
        .and_then(|device| queue_limit(device, "logical_block_size"));
    told.and_then(|size| u32::try_from(size).ok()).unwrap_or(4096)
}

/// A limit of a block device's queue, in bytes (the kernel's `Documentation/ABI/stable/sysfs-block`); a partition has that
/// of its disk.
fn queue_limit(device: u64, name: &str) -> Option<u64> {
    let device = sysfs(device);
    let text = fs::read_to_string(device.join("queue").join(name))
        .or_else(|_| fs::read_to_string(device.join("../queue").join(name)));
    text.ok()?.trim().parse().ok()
}

/// Whether to open and close a block device can do something beside that: close a tray, spin a medium up, or, as the last who had
/// it open, end a connection of nbd.
pub fn opening_acts(device: u64) -> bool {
    const NBD: u32 = 43;
    let dir = sysfs(device);
    let removable = [dir.join("removable"), dir.join("../removable")]
        .iter()
        .find_map(|file| fs::read_to_string(file).ok());
    // Of what the kernel does not know it cannot be told.
    major(device) == NBD || removable.is_none_or(|text| text.trim() != "0")
}

/// Where the kernel tells of a block device.
pub(super) fn sysfs(device: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)))
}

/// statx(2)'s request for the alignment of direct I/O, which rustix does not name yet.
const STATX_DIOALIGN: u32 = 0x2000;

/// `_IOR(0x12, 114, size_t)` of linux/fs.h.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `_IO(0x12, 104)` of linux/fs.h.
const BLKSSZGET: libc::c_ulong = 0x1268;
/// `_IO(0x12, 94)` of linux/fs.h.
const BLKROGET: libc::c_ulong = 0x125e;
/// `_IO(0x12, 119)` of linux/fs.h.
pub(super) const BLKDISCARD: libc::c_ulong = 0x1277;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use std::process::Command;

    /// A sparse file on a file system whose device has blocks of 4096 bytes was taken for one that does direct I/O of 512,
    /// since a read from its hole is taken at any alignment; each write of a guest failed then.
    #[test]
    fn alignment_that_nothing_tells_is_that_of_the_device_under_the_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let (image, mounted) = (dir.path().join("image"), dir.path().join("mounted"));
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        fs::create_dir(&mounted).unwrap();
        let output = |command: &str, args: &[&str]| {
            let output = Command::new(command).args(args).output().ok()?;
            output
                .status
                .success()
                .then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
        };
        let (image, at) = (image.to_str().unwrap(), mounted.to_str().unwrap());
        let Some(device) = output("losetup", &["--find", "--show", "--sector-size", "4096", image]) else {
            eprintln!("skipped: no loop device can be had here");
            return;
        };
        output("mkfs.ext4", &["-q", &device]).unwrap();
        let is_mounted = output("mount", &[&device, at]).is_some();
        output("losetup", &["--detach", &device]);
        if !is_mounted {
            eprintln!("skipped: nothing can be mounted here");
            return;
        }

        let sparse = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_DIRECT)
            .open(mounted.join("sparse"))
            .unwrap();
        sparse.set_len(1 << 20).unwrap();
        let mut buffer = vec![0; 8192];
        let start = buffer.as_ptr().align_offset(4096);
        let sector = &mut buffer[start..start + 512];
        let (read, written) = (sparse.read_at(sector, 512), sparse.write_at(sector, 512));
        let (told, untold) = (direct_alignment(&sparse, Kind::File), untold_alignment(&sparse));
        drop(sparse);
        output("umount", &[at]).unwrap();
        assert!(read.is_ok() && written.is_err(), "{read:?} {written:?}");
        assert_eq!((told, untold), (Some(4096), 4096));
    }

    #[test]
    fn storage_without_a_device_is_taken_to_need_pages() {
        assert_eq!(untold_alignment(&File::open("/proc/self/status").unwrap()), 4096);
    }
}
