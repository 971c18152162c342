//! The content of a file or device that is about to be overwritten.

use std::fmt;

use uuid::Uuid;

use crate::copies::{self, Found, HeaderError};
use crate::foreign::{self, Format};
use crate::header_io::HeaderIo;

/// What a file or device holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A LUKS2 volume, by its UUID.
    Volume(Uuid),
    /// A LUKS2 header of which no copy can be used.
    DamagedVolume,
    /// Something else that has a signature.
    Other(Format),
    /// Bytes of no known form.
    Data,
}

impl Content {
    /// Looks at `io`. What cannot be read counts as data.
    pub fn of(io: &dyn HeaderIo) -> Self {
        match copies::read(io) {
            Ok(Found::Sound(header)) => Self::Volume(header.binary.uuid),
            Ok(Found::NeedsRecovery(recoverable)) => Self::Volume(recoverable.header.binary.uuid),
            Err(HeaderError::NotLuks { .. } | HeaderError::Length(_) | HeaderError::Read(_)) => {
                foreign::find(io).map_or(Self::Data, Self::Other)
            }
            Err(_) => Self::DamagedVolume,
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(uuid) => write!(f, "a LUKS2 volume, {uuid}"),
            Self::DamagedVolume => f.write_str("a LUKS2 volume whose header is damaged"),
            Self::Other(format) => format.fmt(f),
            Self::Data => f.write_str("data"),
        }
    }
}
