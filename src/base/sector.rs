//! The units of a disk.

use std::fmt;
use std::ops::Add;

/// A sector number, or a number of sectors: always of 512 bytes, whatever the sector size of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

impl Sector {
    /// The length of a sector, in bytes.
    pub const LEN: u64 = 512;
}

/// Wraps around, as the tweak of `plain64` does.
impl Add<u64> for Sector {
    type Output = Self;

    fn add(self, sectors: u64) -> Self {
        Self(self.0.wrapping_add(sectors))
    }
}

impl fmt::Display for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How much is encrypted under one tweak: LUKS2's `sector_size`, IEEE 1619's data unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SectorSize {
    /// 512 bytes: every firmware boots from it.
    #[default]
    B512,
    /// 4096 bytes: fewer tweaks to compute.
    B4096,
}

impl SectorSize {
    /// The largest, in bytes.
    pub const MAX: usize = 4096;

    /// In bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }

    /// The same, as headers and virtio have it.
    pub const fn bytes_u32(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }

    /// In sectors.
    pub const fn sectors(self) -> u8 {
        match self {
            Self::B512 => 1,
            Self::B4096 => 8,
        }
    }

    /// The size of this many bytes, if there is one.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            512 => Some(Self::B512),
            4096 => Some(Self::B4096),
            _ => None,
        }
    }
}
