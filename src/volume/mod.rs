//! LUKS2 on storage, and the segment table that maps sectors of a disk to it.
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
//! A volume is [`Locked`] until a passphrase or a key provider opens one of its keyslots; then it is a [`Volume`],
//! whose [`SegmentTable`](segment::SegmentTable) the data path works by.
//!
//! ```text
//! create, locked, ways_in, info   operations on a volume
//! rekey                           replaces a KEK by a new one
//! bindings                        the KEKs that open it
//! erase                           crypto-erase
//! key_backup                      a key in a header without a disk
//! unencrypted                     a disk that is not a volume
//! foreign, content                other formats on a disk, and the content that would be overwritten
//! layout, refusal                 metadata -> segments that can be served, or the reason if they cannot
//! memory                          the memory that a key derivation can use
//! token, keyslot, kdf, af, hash   wrapped slot secret -> passphrase -> volume key
//! copies                          the two copies, updates that survive a crash
//! binary, metadata                bytes and JSON -> types
//! header_io, lock                 storage under the header
//! ```
//!
//! No header makes this code panic, hang, or take more memory than a few times the header's size plus the memory of its key
//! derivation, which is limited.

mod af;
mod binary;
mod bindings;
mod content;
mod copies;
mod create;
mod erase;
mod error;
mod foreign;
mod hash;
mod header_io;
#[cfg(test)]
mod hostile;
mod info;
mod kdf;
pub mod key_backup;
mod keyslot;
mod layout;
mod lock;
mod locked;
mod memory;
mod metadata;
mod refusal;
mod rekey;
pub mod segment;
#[cfg(test)]
mod testing;
mod token;
mod unencrypted;
mod ways_in;

pub use bindings::{Bindings, BoundTo, Proof};
pub use content::Content;
pub use copies::{Damage, HeaderError, HeaderState};
pub use create::{CreateOptions, create};
pub use erase::{Erased, erase};
pub use error::{Advice, Reason, VolumeError};
pub use foreign::{Format, Owner, Unpack};
pub use header_io::{BLOCK, HeaderIo};
pub use info::{CopiesInfo, Info, KdfInfo, KeyslotInfo, Purpose, SegmentInfo, TokenInfo};
pub use kdf::{Argon2Cost, KdfError};
pub use keyslot::{KeyslotError, MATERIAL_LEN};
pub use lock::{FileLock, LockMode, MetadataLock};
pub use locked::{Changed, Identity, Locked, Volume};
pub use refusal::Refusal;
pub use rekey::Rekeyed;
pub use unencrypted::unencrypted;
