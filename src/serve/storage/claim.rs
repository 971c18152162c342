//! Locks that prevent two processes from attaching one disk, by any of its names: open file description locks (fcntl(2)).
//!
//! QEMU's `file` driver locks single bytes of the same kind, so a QEMU that has the file open and sealblk exclude each other. The
//! locks are independent of the flock(2) that cryptsetup and sealblk hold while they read or write LUKS2 metadata.
//!
//! Such a lock belongs to an inode, and one disk can have several inodes. So a claim locks all that it finds, each in the
//! range of bytes that belongs to the disk.
//!
//! ```text
//! opened                   also locked
//! block device             its node in /dev, if another node was named
//! partition                its range of the whole disk's node
//! loop device              its range of the file or device under it, and so on downwards
//! file of an overlayfs     the file in its upper directory
//! ```
//!
//! A claim also searches for loop devices over a file or device, since users of a loop device take no lock of this kind. On a
//! block device that is opened for writing, O_EXCL excludes mounts, device-mapper, and other nodes of the device in other
//! containers.
//!
//! A network file system may have only one kind of lock ([`one_kind_of_lock`]). Then a claim also excludes flock(2), and
//! the same open file description must not take flock(2): one lock would replace the other.
//!
//! Remaining gaps, because Linux does not report them or has nothing to lock:
//! - a device with two numbers (paths of a LUN without multipath), or on two hosts; a network file system whose
//!   server keeps no locks;
//! - a loop device that is set up over a file after the claim: the claim excludes another sealblk, but not a mount;
//! - a reader of a device that device-mapper writes to, and readers of one device in containers with their own `/dev`;
//! - objects that this process cannot open or see: the file under a loop device of another user or mount namespace, the
//!   upper directory of a container. The log reports this if it applies.

#![allow(unsafe_code)] // Open file description locks and the loop device's status have no safe wrapper.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, major, minor};

use super::access::{Access, StorageError};
use super::capabilities::sysfs;
use sealblk_base::mounts::{Mount, overlay_upper};

/// A disk that this process has for itself, or shares with other readers, until this is dropped: the locks on all that leads to
/// it. A ring of the disk is served only while there is one.
#[derive(Debug)]
pub struct Claim {
    held: Vec<File>,
}

impl Claim {
    /// Claims `file`, which `path` names, and all that is found to lead to the same bytes.
    pub(super) fn on(file: File, path: &Path, access: Access) -> Result<Self, StorageError> {
        let mut claiming = Claiming {
            path,
            access,
            held: Vec::new(),
        };
        claiming.lock(&file, &WHOLE)?;
        claiming.below(&file, WHOLE, None, MOST_LAYERS)?;
        let mut held = claiming.held;
        held.push(file);
        Ok(Self { held })
    }

    /// On nothing: null storage ([`DataFile::null`](super::DataFile::null)) has no other users.
    pub fn on_nothing() -> Self {
        Self { held: Vec::new() }
    }

    /// Makes both claims one: that of a disk and that of its header.
    pub fn add(&mut self, other: Self) {
        self.held.extend(other.held);
    }
}

/// Whether flock(2) is a lock of the whole file by fcntl(2) here: on NFS and SMB (flock(2), "NFS details", "CIFS details"), and
/// on 9p (`v9fs_file_flock_dotl` in Linux' fs/9p/vfs_file.c).
pub(super) fn one_kind_of_lock(file: &File) -> bool {
    const NFS: u32 = 0x6969;
    const SMB: [u32; 3] = [0x517b, 0xfe53_4d42, 0xff53_4d42];
    const V9FS: u32 = 0x0102_1997;
    // Magic numbers have 32 bits, with or without a sign.
    let [k0, k1, k2, k3, ..] = rustix::fs::fstatfs(file)
        .map_or(0, |stat| stat.f_type)
        .to_le_bytes();
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    kind == NFS || SMB.contains(&kind) || kind == V9FS
}

/// The range of bytes of a file or device that is wholly taken: up to the end of what a lock can name.
const WHOLE: Range<u64> = 0..i64::MAX.unsigned_abs();

/// The most that one thing stands on another.
const MOST_LAYERS: u32 = 16;

struct Claiming<'a> {
    path: &'a Path,
    access: Access,
    held: Vec<File>,
}

impl Claiming<'_> {
    /// Claims what lies under `file`, of which `range` is locked, and looks for loop devices over it other than `from`.
    fn below(
        &mut self,
        file: &File,
        range: Range<u64>,
        from: Option<u64>,
        layers: u32,
    ) -> Result<(), StorageError> {
        let metadata = file.metadata().map_err(|source| StorageError::Lock {
            path: self.path.into(),
            source,
        })?;
        let mounts = Mount::all();
        self.refuse_loop_over(file, &metadata, &range, from, &mounts)?;
        if layers == 0 {
            return Ok(());
        }
        if !metadata.file_type().is_block_device() {
            if let Some(upper) = overlay_upper(file, &mounts)
                && let Some(upper) = self.also(&upper, &range, |found| found.is_file())?
            {
                self.below(&upper, range, None, layers - 1)?;
                self.held.push(upper);
            }
            return Ok(());
        }

        let rdev = metadata.rdev();
        let is = |number: u64| {
            move |found: &Metadata| found.file_type().is_block_device() && found.rdev() == number
        };
        let identity = |metadata: &Metadata| (metadata.dev(), metadata.ino());
        // The one in /dev, unless it is the one that is locked already.
        if let Some(node) = node(&sysfs(rdev))
            && fs::metadata(&node).is_ok_and(|node| identity(&node) != identity(&metadata))
            && let Some(node) = self.also(&node, &range, is(rdev))?
        {
            self.held.push(node);
        }
        if let Some(part) = Part::of(rdev) {
            let range = shifted(&range, part.start, part.len);
            if let Some(disk) = self.also(&part.disk, &range, is(part.rdev))? {
                self.below(&disk, range, None, layers - 1)?;
                self.held.push(disk);
            }
        }
        if let Some(backing) = LoopBacking::of(file, rdev) {
            let range = shifted(&range, backing.offset, backing.len);
            if let Some(under) = self.also(&backing.path, &range, |found| backing.is(found))? {
                self.below(&under, range, Some(rdev), layers - 1)?;
                self.held.push(under);
            }
        }
        Ok(())
    }

    /// Opens and locks what is the disk by another name, if it is what `is` says; nothing, and a warning, if it cannot be.
    fn also(
        &self,
        name: &Path,
        range: &Range<u64>,
        is: impl Fn(&Metadata) -> bool,
    ) -> Result<Option<File>, StorageError> {
        let mode = match self.access {
            Access::ReadWrite => OFlags::RDWR,
            Access::ReadOnly | Access::Inspect => OFlags::RDONLY,
        };
        let flags = mode | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let opened = rustix::fs::open(name, flags, Mode::empty()).map(File::from);
        let opened = opened
            .map_err(io::Error::from)
            .and_then(|file| match is(&file.metadata()?) {
                true => Ok(file),
                false => Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    "it was replaced in the meantime",
                )),
            });
        match opened {
            Ok(file) => {
                self.lock(&file, range)?;
                Ok(Some(file))
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    "{}: cannot also lock {}, which it is stored on: make sure that no other process uses that",
                    self.path.display(),
                    name.display()
                );
                Ok(None)
            }
        }
    }

    fn lock(&self, file: &File, range: &Range<u64>) -> Result<(), StorageError> {
        match lock(file, self.access, range) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Err(StorageError::InUse {
                    path: self.path.into(),
                })
            }
            Err(source) => Err(StorageError::Lock {
                path: self.path.into(),
                source,
            }),
        }
    }

    /// Refuses what a loop device stands over, other than `from`, if either can be written.
    fn refuse_loop_over(
        &self,
        file: &File,
        metadata: &Metadata,
        range: &Range<u64>,
        from: Option<u64>,
        mounts: &[Mount],
    ) -> Result<(), StorageError> {
        let own = Mount::of(file, mounts).map(|own| &*mounts[own].device);
        // Nobody looks at other file systems, whose servers may be away.
        let is_near = |path: &Path| {
            Mount::holding(path, mounts)
                .is_some_and(|mount| mount.is("devtmpfs") || Some(&*mount.device) == own)
        };
        let loops = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        for device in loops.filter(|device| device.file_name().as_encoded_bytes().starts_with(b"loop")) {
            let sysfs = device.path();
            let Some(path) = backing_file(&sysfs) else {
                continue;
            };
            if !is_near(&path) || !fs::metadata(path).is_ok_and(|under| is_same(&under, metadata)) {
                continue;
            }
            let told = |name: &str| number(&sysfs.join("loop").join(name)).unwrap_or(0);
            let taken = shifted(&WHOLE, told("offset"), told("sizelimit"));
            let overlap = taken.start < range.end && range.start < taken.end;
            let is_written = self.access == Access::ReadWrite || number(&sysfs.join("ro")) != Some(1);
            let is_from = from.is_some() && device_number(&sysfs) == from;
            if overlap && is_written && !is_from {
                return Err(StorageError::UnderLoop {
                    path: self.path.into(),
                    device: Path::new("/dev").join(device.file_name()),
                });
            }
        }
        Ok(())
    }
}

/// The range of what lies under, where the upper begins at `start` and is `len` bytes long, or if that is 0, goes to the end.
fn shifted(range: &Range<u64>, start: u64, len: u64) -> Range<u64> {
    let clamp = |at: u64| at.min(WHOLE.end);
    let end = match len {
        0 => range.end,
        len => range.end.min(len),
    };
    let start_of = clamp(start.saturating_add(range.start));
    start_of..clamp(start.saturating_add(end)).max(start_of)
}

/// A partition of a disk.
struct Part {
    disk: PathBuf,
    rdev: u64,
    start: u64,
    len: u64,
}

impl Part {
    fn of(rdev: u64) -> Option<Self> {
        let part = fs::canonicalize(sysfs(rdev)).ok()?;
        part.join("partition").exists().then_some(())?;
        let disk = part.parent()?;
        Some(Self {
            disk: node(disk)?,
            rdev: device_number(disk)?,
            start: number(&part.join("start"))? * SECTOR,
            len: number(&part.join("size"))? * SECTOR,
        })
    }
}

/// sysfs counts in these, whatever the device's blocks.
const SECTOR: u64 = 512;

/// What a loop device stands on (loop(4), `struct loop_info64`).
struct LoopBacking {
    path: PathBuf,
    device: u64,
    inode: u64,
    offset: u64,
    len: u64,
}

impl LoopBacking {
    fn of(device: &File, rdev: u64) -> Option<Self> {
        let path = backing_file(&sysfs(rdev))?;
        let mut info = [0_u64; 29];
        // SAFETY: LOOP_GET_STATUS64 writes one struct loop_info64, of 232 bytes, to the pointer, which is valid for that.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) };
        // lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit.
        let [device, inode, _, offset, len, ..] = info;
        (result == 0).then_some(Self {
            path,
            device,
            inode,
            offset,
            len,
        })
    }

    fn is(&self, found: &Metadata) -> bool {
        found.ino() == self.inode && encoded(found.dev()) == self.device
    }
}

/// A device number as the kernel hands it out in 64 bits (`huge_encode_dev`).
fn encoded(device: u64) -> u64 {
    let (major, minor) = (u64::from(major(device)), u64::from(minor(device)));
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The path of what a loop device stands on, as whoever set it up called it.
fn backing_file(sysfs: &Path) -> Option<PathBuf> {
    let mut path = fs::read(sysfs.join("loop/backing_file")).ok()?;
    path.pop_if(|byte| *byte == b'\n');
    Some(OsString::from_vec(path).into())
}

/// The node in /dev of a device of sysfs: there is one in the host's devtmpfs, and may be others elsewhere.
fn node(sysfs: &Path) -> Option<PathBuf> {
    let uevent = fs::read_to_string(sysfs.join("uevent")).ok()?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

fn device_number(sysfs: &Path) -> Option<u64> {
    let text = fs::read_to_string(sysfs.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Whether both are one file, or nodes of one device.
fn is_same(one: &Metadata, other: &Metadata) -> bool {
    let device = |metadata: &Metadata| metadata.file_type().is_block_device().then(|| metadata.rdev());
    match (device(one), device(other)) {
        (Some(one), Some(other)) => one == other,
        (None, None) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

fn lock(file: &File, access: Access, range: &Range<u64>) -> io::Result<()> {
    let len = if range.end >= WHOLE.end {
        // To the end, wherever that will be.
        0
    } else {
        range.end - range.start
    };
    let kind = match access {
        Access::ReadOnly | Access::Inspect => libc::F_RDLCK,
        Access::ReadWrite => libc::F_WRLCK,
    };
    let lock = libc::flock {
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: i64::try_from(range.start).map_err(io::Error::other)?,
        l_len: i64::try_from(len).map_err(io::Error::other)?,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the duration of the call, and `lock` is a valid struct flock that the
    // kernel only reads for F_OFD_SETLK.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `LOOP_GET_STATUS64` of linux/loop.h.
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_parts_are_those_of_the_whole() {
        assert_eq!(shifted(&WHOLE, 0, 0), WHOLE);
        assert_eq!(shifted(&WHOLE, 1 << 20, 4096), 1 << 20..(1 << 20) + 4096);
        assert_eq!(
            shifted(&(512..1024), 1 << 20, 4096),
            (1 << 20) + 512..(1 << 20) + 1024
        );
        assert_eq!(shifted(&(512..8192), 0, 4096), 512..4096);
        assert_eq!(shifted(&WHOLE, u64::MAX, u64::MAX), WHOLE.end..WHOLE.end);
    }

    #[test]
    fn parts_of_one_file_are_claimed_each_by_itself_and_the_whole_by_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let take = |range: Range<u64>| {
            let file = File::options().read(true).write(true).open(file.path()).unwrap();
            lock(&file, Access::ReadWrite, &range).map(|()| file)
        };
        let _first = take(0..4096).unwrap();
        let _second = take(4096..8192).unwrap();
        take(4095..4097).unwrap_err();
        take(WHOLE).unwrap_err();
        take(8192..WHOLE.end).unwrap();
    }

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_does() {
        assert_eq!(encoded(rustix::fs::makedev(7, 3)), 0x703);
        assert_eq!(encoded(rustix::fs::makedev(259, 0x12345)), 0x1231_0345);
    }
}
