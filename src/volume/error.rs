//! What goes wrong with a volume, as its callers see it.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::copies::{Damage, HeaderError};
use super::foreign::{Format, Owner, Unpack};
use super::kdf::KdfError;
use super::keyslot::KeyslotError;
use super::refusal::Refusal;
use crate::cipher::CipherError;
use crate::error_chain::remedy;
use crate::keys::arena::ArenaError;
use crate::keys::{KeyError, KeyId, KeyState};

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
        write!(f, "{}: ", self.path.display())?;
        write!(Plain { f, room: 2000 }, "{}", self.reason)
    }
}

/// Text that may hold pieces of a hostile header: no control character reaches a terminal or a log, and it ends.
struct Plain<'a, 'f> {
    f: &'a mut fmt::Formatter<'f>,
    room: usize,
}

impl fmt::Write for Plain<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars().take(self.room) {
            self.room -= 1;
            match c.is_control() {
                true => write!(self.f, "{}", c.escape_default())?,
                false => self.f.write_char(c)?,
            }
        }
        Ok(())
    }
}

impl Error for VolumeError {
    /// What lies under the reason, whose own text is part of this error's.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.reason.source()
    }
}

/// Why an operation on a volume failed.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("sealblk does not serve this volume: {0}")]
    Refused(#[from] Refusal),
    #[error("the lock on its metadata is not to be had")]
    Lock(#[source] io::Error),
    #[error("its length cannot be read")]
    Length(#[source] io::Error),
    #[error("it is opened for reading only, so its metadata cannot be changed")]
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
        "it has no keyslot to try a passphrase on; one of priority \"ignore\" is tried after `cryptsetup config \
         --priority normal --key-slot`"
    )]
    NoKeyslots,
    #[error("keyslot {keyslot}: {source}")]
    Keyslot { keyslot: u32, source: KeyslotError },
    #[error("there is no keyslot {keyslot}; see `sealblk info`")]
    NoSuchKeyslot { keyslot: u32 },
    #[error("keyslot {keyslot} belongs to no recovery key; see `sealblk info`")]
    NoRecoveryKey { keyslot: u32 },
    #[error("the volume key cannot be used")]
    Cipher(#[from] CipherError),
    #[error("there is no memory for the keys")]
    Arena(#[from] ArenaError),
    #[error("the key derivation failed: {0}")]
    Kdf(#[from] KdfError),
    #[error("a keyslot cannot be made: {0}")]
    NewKeyslot(#[source] KeyslotError),

    #[error(
        "it has no sealblk token, so no key provider can open it; open it with its passphrase or recovery key"
    )]
    NoToken,
    #[error("token {token} of type sealblk is broken: {text}; open the volume with its recovery key")]
    BrokenToken { token: u32, text: String },
    #[error("token {token}: {source}")]
    Provider { token: u32, source: KeyError },
    #[error("the slot secret cannot be wrapped: {0}")]
    Wrap(#[source] KeyError),
    #[error(
        "token {token} does not belong to volume {uuid}: key {key_id} of provider {provider:?} says that its slot \
         secret was wrapped for another volume or keyslot, or altered; restore this volume's own header, or open it \
         with its recovery key"
    )]
    ForeignToken {
        token: u32,
        uuid: Uuid,
        provider: String,
        key_id: KeyId,
    },
    #[error(
        "keyslot {keyslot} does not open with the slot secret of token {token}; somebody replaced one of them: \
         open the volume with its recovery key"
    )]
    TokenOpensNothing { token: u32, keyslot: u32 },

    #[error(
        "its erasure has begun, so it opens no more, and cannot be finished; mend the storage, and run `sealblk erase` again"
    )]
    Erase(#[source] io::Error),
    #[error(
        "what was written over the header is not what is read back: the storage keeps something else, and the volume is \
         not erased"
    )]
    NotErased,

    #[error("the header was replaced meanwhile (it was volume {expected}, and is {found}); try again")]
    Replaced { expected: Uuid, found: Uuid },
    #[error("its metadata were changed meanwhile by another program; try again")]
    ChangedMeanwhile,
    #[error("the key that is at hand is not this volume's")]
    NotItsKey,
    #[error("all {limit} {what}s are taken; remove one first")]
    NoneFree { what: &'static str, limit: u32 },
    #[error("the keyslots area has no room for another keyslot; remove one first")]
    NoRoom,
    #[error(
        "keyslot {keyslot} is the one that opened the volume; open it by its key provider, or name another \
         --unlock-key"
    )]
    SameKey { keyslot: u32 },
    #[error("the material of keyslot {keyslot} cannot be written")]
    WriteKeyslot { keyslot: u32, source: io::Error },
    #[error(
        "the material of keyslot {keyslot} cannot be overwritten, so it stays in the header, though it may open \
         nothing any more; check the storage, and remove it with `sealblk recovery remove --keyslot {keyslot}`"
    )]
    Wipe { keyslot: u32, source: io::Error },
    #[error(
        "keyslot {keyslot} is destroyed and opens nothing any more, but is still listed: {source}; remove it with \
         `sealblk recovery remove --keyslot {keyslot}`"
    )]
    Entry { keyslot: u32, source: HeaderError },

    #[error("there is no key provider to bind it to; `sealblk provider add` adds one")]
    NoProvider,
    #[error("there is no key to bind it to: {0}")]
    Kek(#[source] KeyError),
    #[error(
        "the volume has its new key, but what it had before may open it still: {0}; run `sealblk rekey` again, which \
         goes on from there"
    )]
    RekeyUnfinished(#[source] Box<Reason>),
    #[error("read back from storage, the new keyslot does not open: {0}")]
    ReadBack(#[source] Box<Reason>),
    #[error("the provider has its key as {state:?}, not as Active")]
    KekState { state: KeyState },
    #[error("the {copy} copy of the header is damaged: {damage}")]
    DamagedCopy { copy: &'static str, damage: Damage },
    #[error("it is no backup that can be used: {what}; take another copy of it")]
    NoVault { what: &'static str },
    #[error("its keyslots area cannot be read")]
    ReadArea(#[source] io::Error),
    #[error("the header cannot be read back")]
    ForgetCached(#[source] io::Error),
    #[error("the material of keyslot {keyslot} cannot be overwritten; check the storage")]
    WipeReplaced { keyslot: u32, source: io::Error },

    #[error(
        "it holds no LUKS2 volume, but at byte {offset} there is what one would have there, so it is not served as a \
         unencrypted disk; if the whole disk was a volume, restore a backup of its header with `cryptsetup luksHeaderRestore`; if it \
         was never one, copy it to where these bytes are not at that place"
    )]
    TraceOfHeader { offset: u64 },
    #[error(
        "it is {format}, and not served as it lies there: {}; if it is an unencrypted disk, and its guest has written that onto it, \
         say so: --format raw", Advice { path, format: *format }
    )]
    Foreign { path: PathBuf, format: Format },
    #[error("it is a LUKS volume already; its data would be lost")]
    AlreadyLuks,
    #[error(
        "{} is to be the payload of a detached header, but holds a LUKS volume of its own, which it would overwrite; \
         open it by its own header, or name the payload that belongs to this one", path.display()
    )]
    PayloadIsLuks { path: PathBuf },
    #[error("a volume needs a way in: a key provider, a recovery key, or both")]
    NoWayIn,
    #[error(
        "a disk of {capacity} bytes is not possible: it must be a multiple of the sector size, {sector_size}"
    )]
    Capacity { capacity: u64, sector_size: usize },
    #[error("{len} bytes are too few: {needed} are needed; make it longer, or ask for a smaller disk")]
    TooSmall { len: u64, needed: u64 },
    #[error("label {label:?} does not fit: it can be 47 bytes long; give a shorter one")]
    Label { label: String },
    #[error("it cannot be made {len} bytes long{}", remedy(source))]
    Grow { len: u64, source: io::Error },
    #[error("its header area cannot be written{}", remedy(.0))]
    Prepare(#[source] io::Error),
    #[error("the kernel's random source failed")]
    Random(#[source] getrandom::Error),
}

impl Reason {
    pub(super) fn at(self, path: &Path) -> VolumeError {
        VolumeError {
            path: path.to_owned(),
            reason: Box::new(self),
        }
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
                "the disk is packed in it, and a guest would see the package and write over it; unpack it with `qemu-img convert \
                 -f {format} -O raw {path} NEWFILE`, and name NEWFILE"
            ),
            Owner::Image(Unpack::Decompress) => f.write_str(
                "the disk is packed in it, and a guest would see the package and write over it; decompress it to a new file, \
                 and name that",
            ),
            Owner::Pool | Owner::Disk => f.write_str(
                "if it is one of this host's, or of another that shares the storage, a guest would write over what that host \
                 has in use: name another disk",
            ),
        }
    }
}

struct Untried<'a>(&'a [(u32, KeyslotError)]);

impl fmt::Display for Untried<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (keyslot, error) in self.0 {
            write!(f, "; keyslot {keyslot} could not be tried: {error}")?;
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
            segment: super::super::metadata::Id(0),
            encryption,
        };
        let text = Reason::from(refusal).at(Path::new("disk")).to_string();
        assert!(text.starts_with(
            "disk: sealblk does not serve this volume: segment 0 is encrypted with \\u{1b}[2J\\r\\n"
        ));
        assert!(text.len() < 2100 && !text.chars().any(char::is_control));
    }
}
