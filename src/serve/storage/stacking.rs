//! What a block device stands on, and which loop devices stand on a file or device, as Linux reports it.

#![allow(unsafe_code)] // The status of a loop device has no safe wrapper.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use super::capabilities::sysfs;
use sealblk_base::mounts::Mount;

/// The bytes of a whole file or device, and of the longest that the locks have room for.
pub(super) const WHOLE: Range<u64> = 0..1 << 61;

/// A loop device over a file or device.
pub(super) struct LoopOver {
    /// Its node.
    pub node: PathBuf,
    pub rdev: Option<u64>,
    pub is_read_only: bool,
}

/// The loop devices that use a part of `range` of `file`.
pub(super) fn loops_over(
    file: &File,
    metadata: &Metadata,
    range: &Range<u64>,
    mounts: &[Mount],
) -> impl Iterator<Item = LoopOver> {
    let own = Mount::of(file, mounts).map(|own| &*mounts[own].device);
    // Other file systems are not looked at: their servers may be away.
    let is_near = move |path: &Path| {
        Mount::holding(path, mounts).is_some_and(|mount| mount.is("devtmpfs") || Some(&*mount.device) == own)
    };
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let loops = devices.filter(|device| device.file_name().as_encoded_bytes().starts_with(b"loop"));
    loops.filter_map(move |device| {
        let sysfs = device.path();
        let path = backing_file(&sysfs).filter(|path| is_near(path))?;
        fs::metadata(path).ok().filter(|under| is_same(under, metadata))?;
        let told = |name: &str| number(&sysfs.join("loop").join(name)).unwrap_or(0);
        let taken = shifted(&WHOLE, told("offset"), told("sizelimit"));
        (taken.start < range.end && range.start < taken.end).then(|| LoopOver {
            node: Path::new("/dev").join(device.file_name()),
            rdev: device_number(&sysfs),
            is_read_only: number(&sysfs.join("ro")) == Some(1),
        })
    })
}

/// The range of what lies under, where the upper begins at `start` and is `len` bytes long, or if that is 0, goes to the end.
pub(super) fn shifted(range: &Range<u64>, start: u64, len: u64) -> Range<u64> {
    let clamp = |at: u64| at.min(WHOLE.end);
    let end = match len {
        0 => range.end,
        len => range.end.min(len),
    };
    let start_of = clamp(start.saturating_add(range.start));
    start_of..clamp(start.saturating_add(end)).max(start_of)
}

/// A partition of a disk.
pub(super) struct Partition {
    pub disk: PathBuf,
    pub rdev: u64,
    pub start: u64,
    pub len: u64,
}

impl Partition {
    pub(super) fn of(rdev: u64) -> Option<Self> {
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
pub(super) struct LoopBacking {
    pub path: PathBuf,
    device: u64,
    inode: u64,
    pub offset: u64,
    pub len: u64,
}

impl LoopBacking {
    pub(super) fn of(device: &File, rdev: u64) -> Option<Self> {
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

    pub(super) fn is(&self, found: &Metadata) -> bool {
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
pub(super) fn node(sysfs: &Path) -> Option<PathBuf> {
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
    fn device_numbers_are_encoded_as_the_kernel_does() {
        assert_eq!(encoded(rustix::fs::makedev(7, 3)), 0x703);
        assert_eq!(encoded(rustix::fs::makedev(259, 0x12345)), 0x1231_0345);
    }
}
