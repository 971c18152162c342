//! The content of a disk that is not a LUKS2 volume, detected by signatures.
//!
//! If an image were served as raw, the guest would see the image itself and overwrite it. A member of a pool, or a disk
//! that another program encrypts, has an owner that does not expect a guest. But an unencrypted disk belongs to the guest,
//! which can write any of these signatures to it. So a signature leads to a refusal, and the operator can override it with
//! --format raw. sealblk never interprets the content of an image.
//!
//! Offsets are those of each format's description: QEMU's `docs/interop/` (qcow2, qed, parallels) and `block/` (VDI, VHD),
//! VMware's "Virtual Disk Format 5.0", MS-VHDX, the kernel's `Documentation/admin-guide/md.rst` and `md_p.h`, LVM2's
//! `label.h`, OpenZFS's "on-disk format"; libblkid's `superblocks/` agrees with all but the images.

use std::fmt;

use crate::header_io::HeaderIo;
use sealblk_base::size::in_memory;

/// What is likely to be found on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Qcow2,
    Qed,
    Vmdk,
    Vhdx,
    Vhd,
    Vdi,
    Parallels,
    Compressed,
    Luks1,
    BitLocker,
    Lvm,
    Zfs,
    Md,
    Bcache,
    Integrity,
    Bluestore,
    Gpt,
    Mbr,
    Xfs,
    Ext,
    Btrfs,
    Swap,
}

/// Whose bytes they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A disk is packed in it: what unpacks it.
    Image(Unpack),
    /// A host's, or that of a guest on its unencrypted disk.
    Pool,
    /// Like any file system: what an unencrypted disk holds.
    Disk,
}

/// How to come by the disk in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unpack {
    /// qemu-img's name of the format.
    QemuImg(&'static str),
    Decompress,
}

impl Format {
    /// Whose it is.
    pub fn owner(self) -> Owner {
        let image = |name| Owner::Image(Unpack::QemuImg(name));
        match self {
            Self::Qcow2 => image("qcow2"),
            Self::Qed => image("qed"),
            Self::Vmdk => image("vmdk"),
            Self::Vhdx => image("vhdx"),
            Self::Vhd => image("vpc"),
            Self::Vdi => image("vdi"),
            Self::Parallels => image("parallels"),
            Self::Compressed => Owner::Image(Unpack::Decompress),
            Self::Luks1
            | Self::BitLocker
            | Self::Lvm
            | Self::Zfs
            | Self::Md
            | Self::Bcache
            | Self::Integrity
            | Self::Bluestore => Owner::Pool,
            Self::Gpt | Self::Mbr | Self::Xfs | Self::Ext | Self::Btrfs | Self::Swap => Owner::Disk,
        }
    }

    /// Whether it may be that nobody meant it to be a guest's disk as it lies there.
    pub fn is_foreign(self) -> bool {
        self.owner() != Owner::Disk
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "a qcow2 image",
            Self::Qed => "a QED image",
            Self::Vmdk => "a VMDK image",
            Self::Vhdx => "a VHDX image",
            Self::Vhd => "a VHD image",
            Self::Vdi => "a VDI image",
            Self::Parallels => "a Parallels image",
            Self::Compressed => "a compressed file",
            Self::Luks1 => "a LUKS1 volume",
            Self::BitLocker => "a BitLocker volume",
            Self::Lvm => "a physical volume of LVM",
            Self::Zfs => "a member of a ZFS pool",
            Self::Md => "a member of a Linux RAID (md)",
            Self::Bcache => "a device of bcache",
            Self::Integrity => "a device of dm-integrity",
            Self::Bluestore => "a device of Ceph (BlueStore)",
            Self::Gpt => "a partition table (GPT)",
            Self::Mbr => "a partition table or boot sector",
            Self::Xfs => "XFS",
            Self::Ext => "ext2, ext3 or ext4",
            Self::Btrfs => "btrfs",
            Self::Swap => "swap space",
        })
    }
}

/// What `io` holds, if it is known. What cannot be read has no signature.
pub fn find(io: &dyn HeaderIo) -> Option<Format> {
    let len = io.size().ok()?;
    let at_start = SIGNATURES.iter().filter(|(format, ..)| format.is_foreign());
    let is_there = |(_, offset, signature): &&(Format, u64, &[u8])| has(io, *offset, signature);
    let found = |(format, ..): &(Format, u64, &[u8])| *format;
    at_start
        .clone()
        .find(is_there)
        .map(found)
        .or_else(|| has_vhd_footer(io, len).then_some(Format::Vhd))
        .or_else(|| is_md_member(io, len).then_some(Format::Md))
        .or_else(|| is_zfs_member(io, len).then_some(Format::Zfs))
        .or_else(|| {
            let own = SIGNATURES.iter().filter(|(format, ..)| !format.is_foreign());
            own.clone().find(is_there).map(found)
        })
}

/// Format, offset, bytes.
const SIGNATURES: &[(Format, u64, &[u8])] = &[
    (Format::Qcow2, 0, b"QFI\xfb"),
    (Format::Qed, 0, b"QED\0"),
    (Format::Vmdk, 0, b"KDMV"),
    (Format::Vmdk, 0, b"COWD"),
    (Format::Vmdk, 0, b"# Disk DescriptorFile"),
    (Format::Vhdx, 0, b"vhdxfile"),
    (Format::Vhd, 0, b"conectix"),
    (Format::Vdi, 64, b"\x7f\x10\xda\xbe"),
    (Format::Parallels, 0, b"WithoutFreeSpace"),
    (Format::Parallels, 0, b"WithouFreSpacExt"),
    (Format::Compressed, 0, b"\x1f\x8b\x08"),
    (Format::Compressed, 0, b"\xfd7zXZ\0"),
    (Format::Compressed, 0, b"\x28\xb5\x2f\xfd"),
    (Format::Compressed, 4, b"1AY&SY"),
    (Format::Luks1, 0, b"LUKS\xba\xbe\0\x01"),
    (Format::BitLocker, 3, b"-FVE-FS-"),
    // A label stands in one of the first four sectors.
    (Format::Lvm, 0, b"LABELONE"),
    (Format::Lvm, 512, b"LABELONE"),
    (Format::Lvm, 1024, b"LABELONE"),
    (Format::Lvm, 1536, b"LABELONE"),
    (Format::Bcache, 4120, &BCACHE),
    (Format::Integrity, 0, b"integrt\0"),
    (Format::Bluestore, 0, b"bluestore block device"),
    (Format::Gpt, 512, b"EFI PART"),
    (Format::Gpt, 4096, b"EFI PART"),
    (Format::Mbr, 510, b"\x55\xaa"),
    (Format::Xfs, 0, b"XFSB"),
    (Format::Ext, 1080, b"\x53\xef"),
    (Format::Btrfs, 65600, b"_BHRfS_M"),
    (Format::Swap, 4086, b"SWAPSPAC"),
];

/// `BCACHE_MAGIC` of the kernel's `bcache_ondisk.h`.
const BCACHE: [u8; 16] = [
    0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba, 0x6d, 0x81,
];

fn has(io: &dyn HeaderIo, offset: u64, signature: &[u8]) -> bool {
    let mut found = vec![0; signature.len()];
    io.read_at(&mut found, offset).is_ok() && found == signature
}

/// An image of fixed size is a disk and behind it, in the last sector, its footer.
fn has_vhd_footer(io: &dyn HeaderIo, len: u64) -> bool {
    len.checked_sub(512)
        .is_some_and(|footer| has(io, footer, b"conectix"))
}

/// Superblocks of version 0.90 and 1.0 stand near the end, 1.1 at the start, and 1.2 after 4 KiB; version 0.90 is in the
/// byte order of its host, later ones are little-endian.
fn is_md_member(io: &dyn HeaderIo, len: u64) -> bool {
    let sectors = len / 512;
    let version_0 = (sectors & !127).checked_sub(128);
    let version_1 = sectors.checked_sub(16).map(|last| last & !7);
    let is_at = |sector: u64, magic_and_version: [u8; 8]| has(io, sector * 512, &magic_and_version);
    let v1 = [0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0];
    let [little, big] = [
        [0xfc, 0x4e, 0x2b, 0xa9, 0, 0, 0, 0],
        [0xa9, 0x2b, 0x4e, 0xfc, 0, 0, 0, 0],
    ];
    version_0.is_some_and(|at| is_at(at, little) || is_at(at, big))
        || [Some(0), Some(8), version_1]
            .into_iter()
            .flatten()
            .any(|at| is_at(at, v1))
}

/// Two labels at either end, each with a ring of uberblocks, at 128 KiB, that begin with 0xbab10c.
fn is_zfs_member(io: &dyn HeaderIo, len: u64) -> bool {
    const LABEL: u64 = 256 << 10;
    const RING: u64 = 128 << 10;
    /// The smallest that an uberblock is.
    const UBERBLOCK: usize = 1024;
    /// As many libblkid wants to see, over all labels: one number may be anybody's.
    const ENOUGH: usize = 4;
    let whole = len / LABEL * LABEL;
    let Some(end) = whole.checked_sub(2 * LABEL).filter(|end| *end >= 2 * LABEL) else {
        return false;
    };
    let uberblocks = |label: u64| {
        let mut ring = vec![0; in_memory(RING)];
        let read = io.read_at(&mut ring, label + RING);
        let begins = ring.chunks_exact(UBERBLOCK).filter(|uberblock| {
            let magic = [0, 0, 0, 0, 0, 0xba, 0xb1, 0x0c];
            let begin = &uberblock[..8];
            begin == magic || begin.iter().rev().eq(&magic)
        });
        read.map_or(0, |()| begins.count())
    };
    let labels = [0, LABEL, end, end + LABEL];
    labels.into_iter().map(uberblocks).sum::<usize>() >= ENOUGH
}
