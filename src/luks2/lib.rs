//! LUKS2 headers: read, made and changed, so that a crash at any byte loses nothing.
//!
//! The format is that of the LUKS2 On-Disk Format Specification 1.1, as cryptsetup reads and writes it:
//!
//! ```text
//! 0             hdr_size        2 hdr_size                   payload offset
//! +---------------+---------------+--------------------------------+-------------------
//! | binary header | binary header | keyslots area                  | payload
//! | JSON area     | JSON area     | (material of each keyslot)     | (the disk, encrypted)
//! +---------------+---------------+--------------------------------+-------------------
//!   primary copy    secondary copy                                   elsewhere, from 0, if
//!   16 KiB each unless made otherwise                                the header is detached
//! ```
//!
//! A volume is [`Locked`] until a passphrase opens one of its keyslots; then it is a [`Volume`], which has the volume key and the
//! [`Layout`] of the disk: all that is needed to read and write the disk with AES-XTS. This package does not read or write the payload.
//!
//! ```no_run
//! use std::path::Path;
//! use sealblk_luks2::{HeaderFile, Locked};
//! use sealblk_secmem::arena::SecretBytes;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file = HeaderFile::open(Path::new("disk.luks"), false)?;
//! let locked = Locked::open(&file, None)?;
//! let passphrase = SecretBytes::take(&mut Vec::from("correct horse battery staple"))?;
//! let volume = locked.unlock_with_passphrase(&passphrase)?;
//! println!("{} bytes from {}", volume.layout().capacity, volume.layout().offset);
//! # Ok(())
//! # }
//! ```
//!
//! The example `luks2` prints what opens a volume, and opens it: `cargo run -p sealblk-luks2 --example luks2 -- DISK`.
//!
//! Steps return a [`Reason`], so that a caller can say what the steps were for; whole operations return a [`VolumeError`], which
//! has the path too.
//!
//! ```text
//! create, update, passphrases     a new volume; changes of a header; keyslots of persons
//! resize                          another length of the disk
//! hold, holder                    which host has it attached
//! locked                          opening a volume
//! erase                           crypto-erase
//! key_backup                      a key in a header without a disk
//! trace, foreign, content         what is on a disk that is no volume
//! layout, refusal                 metadata -> a disk that can be served, or the reason if it cannot
//! memory                          the memory that a key derivation can use
//! keyslot, kdf, af, hash          passphrase -> volume key
//! copies                          the two copies, updates that survive a crash
//! binary, metadata                bytes and JSON -> types
//! header_io, header_file, lock    storage under the header
//! ```
//!
//! No header makes this code panic, hang, or take more memory than a few times the header's size plus the memory of its key
//! derivation, which is limited.
#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_possible_wrap,
        clippy::cast_lossless
    )
)]
#![forbid(unsafe_code)]

mod af;
mod binary;
mod blame;
mod content;
mod copies;
mod create;
mod erase;
mod error;
mod foreign;
mod hash;
mod header_file;
mod header_io;
mod hold;
mod holder;
#[cfg(test)]
mod hostile;
mod kdf;
pub mod key_backup;
mod keyslot;
mod layout;
mod lock;
mod locked;
mod memory;
pub mod metadata;
mod passphrases;
mod refusal;
mod resize;
#[cfg(test)]
mod testing;
mod trace;
mod update;

pub use content::Content;
pub use copies::{Damage, Found, Header, HeaderError, HeaderState, Recoverable, read as read_unlocked};
pub use create::{NewVolume, Options};
pub use erase::{Erased, erase};
pub use error::{Advice, Reason, VolumeError};
pub use foreign::{Format, Owner, Unpack, find as find_format};
pub use header_file::{HeaderFile, read_direct};
pub use header_io::{BLOCK, HeaderIo};
pub use hold::Terms;
pub use holder::{Holder, Holding, Host};
pub use kdf::{Argon2Cost, Budget, KdfError};
pub use keyslot::{KEY_LEN, KeyslotError, MATERIAL_LEN, NewKeyslot};
pub use layout::Layout;
pub use lock::{FileLock, LOCK_DIRECTORY, LockMode, MetadataLock};
pub use locked::{Changed, Identity, Locked, Volume, keyslots_of_segments, layout, read};
pub use refusal::Refusal;
pub use resize::{Resize, Resized};
pub use trace::trace_of_header;
pub use update::{Update, free_keyslot};
