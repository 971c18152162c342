//! The errors of a volume, for its callers.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::copies::{Damage, HeaderError};
use crate::foreign::{Format, Owner, Unpack};
use crate::holder::Holder;
use crate::keyslot::KeyslotError;
use crate::metadata::MetadataError;
use crate::refusal::Refusal;
use sealblk_base::error_chain::remedy;
use sealblk_base::harmless::harmless;
use sealblk_secmem::arena::ArenaError;

/// An operation on a volume that failed: on which file or device, and why.
#[derive(Debug)]
pub struct VolumeError {
    /// What holds the header.
    pub path: PathBuf,
    /// Why.
    pub reason: Box<Reason>,
}

impl fmt::Display for VolumeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may have pieces of a hostile header.
        let reason = harmless(&self.reason.to_string(), SHOWN);
        write!(f, "{}: {reason}", self.path.display())
    }
}

impl Error for VolumeError {
    /// What lies under the reason, whose own text is part of this error's.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.reason.source()
    }
}

/// How much of a reason is shown, in characters.
const SHOWN: usize = 2000;

/// Why an operation on a volume failed.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("sealblk does not serve this volume: {0}")]
    Refused(#[from] Refusal),
    #[error("cannot lock its metadata")]
    Lock(#[source] io::Error),
    #[error("its length cannot be read")]
    Length(#[source] io::Error),
    #[error("it is open for reading only, so its metadata cannot be changed")]
    ReadOnly,
    #[error(
        "no keyslot opens with this passphrase{}; try another one, or open the volume by its key provider",
        Untried(untried)
    )]
    WrongPassphrase {
        /// Keyslots that could not be tried, and why.
        untried: Vec<(u32, KeyslotError)>,
    },
    #[error("this passphrase does not open it; try another one")]
    WrongBackupPassphrase,
    #[error(
        "it has no keyslot for a passphrase; to use one of priority \"ignore\", run `cryptsetup config \
         --priority normal --key-slot`"
    )]
    NoKeyslots,
    #[error("keyslot {keyslot}: {source}")]
    Keyslot { keyslot: u32, source: KeyslotError },
    #[error("keyslot {keyslot} does not exist")]
    NoSuchKeyslot { keyslot: u32 },
    #[error("keyslot {keyslot} does not belong to a recovery key")]
    NoRecoveryKey { keyslot: u32 },
    #[error("there is no memory for the keys")]
    Arena(#[from] ArenaError),
    #[error("a keyslot cannot be made: {0}")]
    NewKeyslot(#[source] KeyslotError),
    #[error(
        "its erasure has begun, so it no longer opens, but the erasure cannot be finished; repair the storage, and erase it again"
    )]
    Erase(#[source] io::Error),
    #[error("the storage returns other data than sealblk wrote over the header: the volume is not erased")]
    NotErased,
    #[error(
        "the header was replaced in the meantime (it was volume {expected}, and is now {found}); try again"
    )]
    Replaced { expected: Uuid, found: Uuid },
    #[error("another program changed its metadata in the meantime; try again")]
    ChangedMeanwhile,
    #[error(
        "host {:?} has it attached since {} (attachment {sequence}): end sealblk there. Only if that host cannot write to the storage any \
         more, since it is off or cut off, take the volume over with --take-over {sequence}", holder.name, holder.since
    )]
    HeldElsewhere {
        /// Of the attachment.
        sequence: u64,
        holder: Box<Holder>,
    },
    #[error(
        "the guest has run elsewhere since it ran here (attachment {then}, now {now}), so its memory here is out of date: end this QEMU, \
         and boot the guest again"
    )]
    RanElsewhere { then: u64, now: u64 },
    #[error(
        "{} has taken the volume over while this host had it attached, so both may have written to it: end this host's guest, and check the file \
         system of the disk",
        by.as_ref().map_or_else(|| "another host".to_owned(), |name| format!("host {name:?}"))
    )]
    TakenOver {
        /// None: it has ended since.
        by: Option<String>,
    },
    #[error(
        "nothing tells this host from others, since neither its machine ID (/etc/machine-id) nor its boot ID \
         (/proc/sys/kernel/random/boot_id) can be read, so it cannot be entered in the header as the one that has the volume attached: give it a \
         machine ID (`systemd-machine-id-setup`); or, where nothing else attaches the volume, use --header-claim off"
    )]
    UnknownHost,
    #[error("another host ({by:?}) attached it in the same moment: start the guest on one host only")]
    AttachedTwice { by: String },
    #[error("the key does not belong to this volume")]
    NotItsKey,
    #[error("all {limit} {what}s are in use; remove one first")]
    NoneFree { what: &'static str, limit: u32 },
    #[error("the keyslots area has no room for another keyslot; remove one first")]
    NoRoom,
    #[error(
        "the volume was opened by keyslot {keyslot} itself; open it by its key provider, or by another key"
    )]
    SameKey { keyslot: u32 },
    #[error("the material of keyslot {keyslot} cannot be written")]
    WriteKeyslot { keyslot: u32, source: io::Error },
    #[error(
        "the material of keyslot {keyslot} cannot be overwritten, so the keyslot stays in the header, although it may no longer \
         open the volume; check the storage, and try again"
    )]
    Wipe { keyslot: u32, source: io::Error },
    #[error("keyslot {keyslot} is destroyed and no longer opens the volume, but is still listed: {source}")]
    Entry { keyslot: u32, source: HeaderError },
    #[error("the {copy} copy of the header is damaged: {damage}")]
    DamagedCopy { copy: &'static str, damage: Damage },
    #[error("it is not a usable backup: {what}; use another copy of it")]
    NoVault { what: &'static str },
    #[error("its keyslots area cannot be read")]
    ReadArea(#[source] io::Error),
    #[error("the header cannot be read back")]
    ForgetCached(#[source] io::Error),
    #[error("it is already a LUKS volume; its data would be lost")]
    AlreadyLuks,
    #[error(
        "{} is given as the payload of a detached header, but holds a LUKS volume itself, which would be overwritten; \
         open it by its own header, or name the payload that belongs to this header", path.display()
    )]
    PayloadIsLuks { path: PathBuf },
    #[error("it would have no keyslot, so nothing would open it")]
    NoWayIn,
    #[error(
        "a disk of {capacity} bytes is not possible: it must be a multiple of the sector size, {sector_size}"
    )]
    Capacity { capacity: u64, sector_size: usize },
    #[error(
        "the disk has {from} bytes, and would have {to}: the data behind its new end would be lost; nothing was changed"
    )]
    Shrinks { from: u64, to: u64 },
    #[error("{len} bytes are too few: {needed} are needed; make it larger, or choose a smaller disk")]
    TooSmall { len: u64, needed: u64 },
    #[error("label {label:?} is too long: the limit is 47 bytes; give a shorter one")]
    Label { label: String },
    #[error("its size cannot be set to {len} bytes{}", remedy(source))]
    Grow { len: u64, source: io::Error },
    #[error("its header area cannot be written{}", remedy(.0))]
    Prepare(#[source] io::Error),
    #[error("the kernel's random source failed")]
    Random(#[source] getrandom::Error),
}

impl Reason {
    /// The error of an operation that failed for this reason on the header in `path`.
    pub fn at(self, path: &Path) -> VolumeError {
        VolumeError {
            path: path.to_owned(),
            reason: Box::new(self),
        }
    }
}

impl Reason {
    /// Whether this user is not permitted to change the header. It is unchanged then.
    pub fn is_not_permitted(&self) -> bool {
        matches!(self, Self::Lock(error) if error.kind() == io::ErrorKind::PermissionDenied)
    }

    /// Whether the header has no room for what was to be added to it. It is unchanged then.
    pub fn has_no_room(&self) -> bool {
        matches!(
            self,
            Self::NoneFree { .. } | Self::Header(HeaderError::Unwritable(MetadataError::TooLong { .. }))
        )
    }
}

/// What to do with a disk that is of another format.
#[derive(Debug)]
pub struct Advice<'a> {
    /// The disk.
    pub path: &'a Path,
    /// What it holds.
    pub format: Format,
}

impl fmt::Display for Advice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.format.owner() {
            Owner::Image(Unpack::QemuImg(format)) => write!(
                f,
                "a guest would see the image itself instead of the disk in it, and overwrite it; convert it with `qemu-img convert \
                 -f {format} -O raw {path} NEWFILE`, and name NEWFILE"
            ),
            Owner::Image(Unpack::Decompress) => f.write_str(
                "a guest would see the compressed file instead of the disk in it, and overwrite it; decompress it to a new file, \
                 and name that file",
            ),
            Owner::Pool | Owner::Disk => f.write_str(
                "if this host, or another host that shares the storage, uses it, a guest would overwrite the host's data: name another \
                 disk",
            ),
        }
    }
}

struct Untried<'a>(&'a [(u32, KeyslotError)]);

impl fmt::Display for Untried<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (keyslot, error) in self.0 {
            write!(f, "; cannot try keyslot {keyslot}: {error}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_hostile_header_reaches_no_terminal_as_it_is() {
        let encryption = format!("\x1b[2J\r\n{}", "x".repeat(1 << 20));
        let refusal = Refusal::Cipher {
            segment: crate::metadata::Id(0),
            encryption,
        };
        let text = Reason::from(refusal).at(Path::new("disk")).to_string();
        assert!(text.starts_with(
            "disk: sealblk does not serve this volume: segment 0 is encrypted with \\u{1b}[2J\\r\\n"
        ));
        assert!(text.len() < 2100 && !text.chars().any(char::is_control));
    }
}
