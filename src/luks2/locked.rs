//! A volume at rest: its header was read, but its key is not known. Unlocking returns a [`Volume`], which is needed to add
//! another keyslot.

use std::fmt;
use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use sealblk_base::sector::SectorSize;
use sealblk_secmem::arena::SecretBytes;
use tracing::warn;
use uuid::Uuid;

use crate::copies::{self, Found, Header, HeaderError, HeaderState};
use crate::error::{Reason, VolumeError};
use crate::header_io::HeaderIo;
use crate::holder::{Holding, Host};
use crate::kdf::Budget;
use crate::keyslot::{self, KeyslotError};
use crate::layout::Layout;
use crate::lock::LockMode;
use crate::metadata::{Base64, Id, Keyslot, Luks2Keyslot, Metadata, Pbkdf2Digest};
use crate::refusal;

/// A volume whose header was read and found to be one that sealblk serves. No key is at hand.
#[derive(Debug)]
pub struct Locked<'header> {
    pub(crate) io: &'header dyn HeaderIo,
    pub(crate) header: Header,
    pub(crate) state: HeaderState,
    pub(crate) layout: Layout,
}

/// What a guest knows a volume by: two headers of the same identity give it the same data. A header that was put in another
/// one's place has another identity, also if it has the same UUID.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    uuid: Uuid,
    layout: Layout,
    /// Of the volume key.
    digest: (String, u32, Base64, Base64),
}

impl Identity {
    /// The UUID in the header.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The length of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.layout.capacity
    }

    /// What of it the guest would notice if `found` were in its place. A disk that has become longer is none the worse.
    pub fn changed_to(&self, found: &Self) -> Option<Changed> {
        let (was, now) = (self.layout, found.layout);
        if self.uuid != found.uuid {
            return Some(Changed::Volume {
                expected: self.uuid,
                found: found.uuid,
            });
        }
        if self.digest != found.digest {
            return Some(Changed::Key);
        }
        if !was.is_where(&now) {
            return Some(Changed::Place);
        }
        (was.capacity > now.capacity).then_some(Changed::Shrunk {
            was: was.capacity,
            now: now.capacity,
        })
    }
}

/// Why a header that is read anew gives the guest no more what it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Changed {
    /// Another volume.
    #[error(
        "the header was replaced: it belonged to volume {expected}, and now belongs to {found}; restore it"
    )]
    Volume {
        /// The volume that is being served.
        expected: Uuid,
        /// The volume that is there now.
        found: Uuid,
    },
    /// What the guest has written would be read under another key.
    #[error(
        "the header has the UUID of this volume, but its volume key has changed since the disk was attached: if this is intended, \
         restart the process that serves the disk; if not, the header was altered: restore it from a backup (`cryptsetup \
         luksHeaderRestore`)"
    )]
    Key,
    /// What the guest has written would be read at another place.
    #[error(
        "the header has the UUID of this volume, but the offset or sector size of its data has changed since the disk was \
         attached: if this is intended, restart the process that serves the disk; if not, the header was altered: restore it \
         from a backup (`cryptsetup luksHeaderRestore`)"
    )]
    Place,
    /// The guest would see an end where there was none.
    #[error(
        "the disk had {was} bytes when it was attached, and now has {now}; restore the size of its file or device"
    )]
    Shrunk {
        /// When it was attached, in bytes.
        was: u64,
        /// Now.
        now: u64,
    },
}

impl<'header> Locked<'header> {
    /// Reads the header, and repairs it if one of its copies is damaged and it can be written. `payload` is given
    /// when the header is detached.
    ///
    /// # Errors
    /// Where there is no LUKS2 header, both its copies are damaged, or sealblk does not serve what it describes.
    pub fn open(header: &'header dyn HeaderIo, payload: Option<&dyn HeaderIo>) -> Result<Self, VolumeError> {
        Self::open_with(header, payload, |_| true)
    }

    /// The same for a process of `host`. It repairs nothing while another host has the volume attached: that host may be writing the
    /// header, and no lock tells.
    ///
    /// # Errors
    /// As for [`Locked::open`].
    pub fn open_on(
        host: &Host,
        header: &'header dyn HeaderIo,
        payload: Option<&dyn HeaderIo>,
    ) -> Result<Self, VolumeError> {
        Self::open_with(header, payload, |found| {
            let holder = Holding::of(&found.metadata).holder;
            holder.is_none_or(|holder| holder.is(host))
        })
    }

    fn open_with(
        header: &'header dyn HeaderIo,
        payload: Option<&dyn HeaderIo>,
        may_repair: impl Fn(&Header) -> bool,
    ) -> Result<Self, VolumeError> {
        let read = || {
            let (found, state) = read_and_repair(header, may_repair)?;
            let layout = layout(&found, header, payload)?;
            Ok(Self {
                io: header,
                header: found,
                state,
                layout,
            })
        };
        read().map_err(|reason: Reason| reason.at(header.path()))
    }

    /// The UUID in its header.
    pub fn uuid(&self) -> Uuid {
        self.header.binary.uuid
    }

    /// What the guest knows it by.
    ///
    /// # Errors
    /// If sealblk does not serve what the header describes.
    pub fn identity(&self) -> Result<Identity, VolumeError> {
        let served = refusal::check(&self.header.metadata).map_err(|refusal| self.failed(refusal.into()))?;
        let Pbkdf2Digest {
            hash,
            iterations,
            salt,
            digest,
            ..
        } = served.digest;
        Ok(Identity {
            uuid: self.uuid(),
            layout: self.layout,
            digest: (hash.clone(), *iterations, salt.clone(), digest.clone()),
        })
    }

    /// The same for a guest that has had the volume as `expected` before: it has the length that it had then, too.
    ///
    /// # Errors
    /// What has changed, if the guest would notice; or as for [`Locked::identity`].
    pub fn as_before<E: From<Changed> + From<VolumeError>>(mut self, expected: &Identity) -> Result<Self, E> {
        let found = self.identity()?;
        if let Some(changed) = expected.changed_to(&found) {
            return Err(changed.into());
        }
        if found != *expected {
            tracing::warn!(
                bytes = found.layout.capacity,
                "the file or device has grown; the guest keeps the size that it knows until the disk is resized"
            );
        }
        self.layout = expected.layout;
        Ok(self)
    }

    /// Its header, as of when it was read or written last.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Whether both copies of the header are sound, as of when they were read or written last.
    pub fn header_state(&self) -> &HeaderState {
        &self.state
    }

    /// Where the disk lies in its payload, and how it is encrypted there.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Length of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.layout.capacity
    }

    /// The unit in which the disk must be read and written.
    pub fn sector_size(&self) -> SectorSize {
        self.layout.sector_size
    }

    /// Tries `passphrase` on every keyslot: those of high priority first, those to be ignored not at all.
    ///
    /// # Errors
    /// [`Reason::WrongPassphrase`] when none opens; but if no keyslot could be tried at all, why the first could not.
    pub fn unlock_with_passphrase(&self, passphrase: &SecretBytes) -> Result<Volume, VolumeError> {
        let unlock = || {
            let mut slots: Vec<_> = self
                .passphrase_keyslots()
                .filter(|(_, slot)| priority(slot) > 0)
                .collect();
            slots.sort_by_key(|(id, slot)| (std::cmp::Reverse(priority(slot)), *id));
            if slots.is_empty() {
                return Err(Reason::NoKeyslots);
            }
            let digest = refusal::check(&self.header.metadata)?.digest;
            let (mut untried, mut tried) = (Vec::new(), false);
            let mut budget = Budget::default();
            for (id, slot) in slots {
                match self.key_in(slot, digest, passphrase, &mut budget) {
                    Ok(Some(key)) => return Ok(self.unlocked(id, key)),
                    Ok(None) => tried = true,
                    Err(error) => untried.push((id.0, error)),
                }
            }
            if tried {
                return Err(Reason::WrongPassphrase { untried });
            }
            let (keyslot, source) = untried.swap_remove(0);
            Err(Reason::Keyslot { keyslot, source })
        };
        unlock().map_err(|reason| self.failed(reason))
    }

    fn passphrase_keyslots(&self) -> impl Iterator<Item = (Id, &Luks2Keyslot)> {
        keyslots_of_segments(&self.header.metadata)
    }

    /// Tries `passphrase` on keyslot `id` alone. None: it is not the keyslot's. `budget` limits what all tries together cost.
    ///
    /// # Errors
    /// If there is no such keyslot, it is not one of the disk's, or it cannot be tried.
    pub fn open_keyslot(
        &self,
        id: Id,
        passphrase: &SecretBytes,
        budget: &mut Budget,
    ) -> Result<Option<Volume>, Reason> {
        let (_, slot) = self
            .passphrase_keyslots()
            .find(|&(found, _)| found == id)
            .ok_or(Reason::NoSuchKeyslot { keyslot: id.0 })?;
        let digest = refusal::check(&self.header.metadata)?.digest;
        let opened = self.key_in(slot, digest, passphrase, budget);
        let key = opened.map_err(|source| Reason::Keyslot {
            keyslot: id.0,
            source,
        })?;
        Ok(key.map(|key| self.unlocked(id, key)))
    }

    /// The volume key, if `passphrase` is that of `slot` and the segment's digest says that what `slot` holds is it.
    fn key_in(
        &self,
        slot: &Luks2Keyslot,
        digest: &Pbkdf2Digest,
        passphrase: &SecretBytes,
        budget: &mut Budget,
    ) -> Result<Option<SecretBytes>, KeyslotError> {
        budget.spend(&slot.kdf, digest.iterations)?;
        let key = keyslot::open(self.io, slot, passphrase)?;
        Ok(keyslot::verify(digest, &key)?.then_some(key))
    }

    fn unlocked(&self, Id(keyslot): Id, key: SecretBytes) -> Volume {
        Volume {
            uuid: self.uuid(),
            keyslot,
            layout: self.layout,
            key,
        }
    }

    /// Reads the header anew, from storage and not from a cache of this host: what was committed is there, in both copies.
    ///
    /// # Errors
    /// If a copy is damaged, or the header is another volume's by now.
    pub fn read_back(&mut self) -> Result<(), Reason> {
        let _lock = self.io.lock(LockMode::Read).map_err(Reason::Lock)?;
        self.io
            .forget_cached(0..self.header.end())
            .map_err(Reason::ForgetCached)?;
        let header = match copies::read(self.io)? {
            Found::Sound(header) => header,
            Found::NeedsRecovery(recoverable) => {
                return Err(Reason::DamagedCopy {
                    copy: recoverable.bad.name(),
                    damage: recoverable.damage,
                });
            }
        };
        let (expected, found) = (self.uuid(), header.binary.uuid);
        if found != expected {
            return Err(Reason::Replaced { expected, found });
        }
        self.header = header;
        Ok(())
    }

    /// Whether the header was opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.io.read_only()
    }

    /// What holds the header.
    pub fn path(&self) -> &Path {
        self.io.path()
    }

    pub(crate) fn failed(&self, reason: Reason) -> VolumeError {
        reason.at(self.path())
    }
}

/// A volume whose key is at hand.
pub struct Volume {
    uuid: Uuid,
    keyslot: u32,
    layout: Layout,
    key: SecretBytes,
}

impl Volume {
    /// The UUID in its header.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The keyslot that it was unlocked by.
    pub fn keyslot(&self) -> u32 {
        self.keyslot
    }

    /// Where the disk lies in its payload, and how it is encrypted there.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The volume key, of [`KEY_LEN`](crate::KEY_LEN) bytes.
    pub fn key(&self) -> &SecretBytes {
        &self.key
    }
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume")
            .field("uuid", &self.uuid)
            .field("keyslot", &self.keyslot)
            .finish_non_exhaustive()
    }
}

/// Reads both copies under the lock for reading, and repairs nothing. Where this process may not have that lock, what is not sound
/// may be another program's update on its way, and is looked at again.
///
/// # Errors
/// Where there is no LUKS2 header, or both its copies are damaged.
pub fn read(io: &dyn HeaderIo) -> Result<Found, Reason> {
    let lock = io.lock(LockMode::Read).map_err(Reason::Lock)?;
    let mut looks = if lock.is_held() { 0 } else { UNLOCKED_LOOKS };
    loop {
        match copies::read(io) {
            Ok(Found::NeedsRecovery(_)) | Err(_) if looks > 0 => thread::sleep(PAUSE),
            found => return Ok(found?),
        }
        looks -= 1;
    }
}

/// An update takes milliseconds.
const UNLOCKED_LOOKS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

/// Reads the header under the lock. What needs recovery is looked at again under the write lock before it is
/// repaired, because what looked like damage may have been another program's update.
fn read_and_repair(
    io: &dyn HeaderIo,
    may_repair: impl Fn(&Header) -> bool,
) -> Result<(Header, HeaderState), Reason> {
    let found = read(io)?;
    if let Found::Sound(header) = found {
        return Ok((header, HeaderState::Sound));
    }
    let lock = match io.read_only() || !may_repair(found.header()) {
        true => None,
        false => match io.lock(LockMode::Write) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                warn!("{}: the LUKS2 header needs repair: {error}", io.path().display());
                None
            }
            lock => Some(lock.map_err(Reason::Lock)?),
        },
    };
    let found = match lock {
        None => found,
        Some(_lock) => match copies::read(io)? {
            Found::NeedsRecovery(recoverable) if may_repair(&recoverable.header) => {
                let copy = recoverable.bad.name();
                let damage = recoverable.damage.to_string();
                let header = recoverable.header.clone();
                match recoverable.recover(io) {
                    Ok(header) => {
                        warn!(
                            volume = %header.binary.uuid,
                            "{}: repaired the {copy} copy of the LUKS2 header: {damage}",
                            io.path().display()
                        );
                        return Ok((header, HeaderState::Repaired { copy, damage }));
                    }
                    Err(error @ HeaderError::Write { .. }) => {
                        warn!(volume = %header.binary.uuid, "{}: {error}", io.path().display());
                        return Ok((header, HeaderState::NeedsRepair { copy, damage }));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            found => found,
        },
    };
    Ok(match found {
        Found::Sound(header) => (header, HeaderState::Sound),
        Found::NeedsRecovery(recoverable) => {
            let state = HeaderState::NeedsRepair {
                copy: recoverable.bad.name(),
                damage: recoverable.damage.to_string(),
            };
            (recoverable.header, state)
        }
    })
}

/// Refuses a payload that is a LUKS volume itself, and whose header the guest would write over. One whose segment
/// begins behind that header may have its header in a backup, too.
fn refuse_volume(payload: &dyn HeaderIo, segment: u64) -> Result<(), Reason> {
    match copies::read(payload) {
        Err(HeaderError::NotLuks { .. }) => Ok(()),
        Ok(found) if segment >= found.header().end() => Ok(()),
        Err(HeaderError::BothDamaged { .. }) if segment > 0 => Ok(()),
        Err(HeaderError::Length(source)) => Err(Reason::Length(source)),
        Err(error @ HeaderError::Read(_)) => Err(error.into()),
        _ => Err(Reason::PayloadIsLuks {
            path: payload.path().to_owned(),
        }),
    }
}

/// Lays out the segment of `header` on `payload`, or behind the header where that is not detached; or tells why it is
/// not served.
///
/// # Errors
/// [`Reason::Refused`], or what keeps the payload from being looked at.
pub fn layout(header: &Header, io: &dyn HeaderIo, payload: Option<&dyn HeaderIo>) -> Result<Layout, Reason> {
    let served = refusal::check(&header.metadata)?;
    if let Some(payload) = payload {
        refuse_volume(payload, served.segment.place.offset.0)?;
    }
    let payload_len = payload.unwrap_or(io).size().map_err(Reason::Length)?;
    let header_end = if payload.is_some() { 0 } else { header.end() };
    Ok(Layout::new(served, header_end, payload_len)?)
}

/// The keyslots of type `luks2` that the digest of a segment names. Others ("unbound" ones) hold whatever their owner put there.
pub fn keyslots_of_segments(metadata: &Metadata) -> impl Iterator<Item = (Id, &Luks2Keyslot)> {
    let bound = |id: &Id| {
        let segments = metadata.segments.keys();
        let mut digests = segments.filter_map(|&segment| metadata.digest_of_segment(segment));
        digests.any(|(_, digest)| digest.keyslots().contains(id))
    };
    metadata.keyslots.iter().filter_map(move |(id, slot)| match slot {
        Keyslot::Luks2(slot) if bound(id) => Some((*id, slot.as_ref())),
        _ => None,
    })
}

/// 0: to be ignored, 1: normal, 2: to be tried first.
fn priority(slot: &Luks2Keyslot) -> u32 {
    slot.priority.unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kdf::KdfError;
    use crate::testing::{Memory, sample_with};

    /// Why the sample does not open, which has no keyslot but number 0.
    fn refused(pointer: &str, value: impl Into<serde_json::Value>) -> Reason {
        let io = Memory::of(&sample_with(pointer, value));
        let locked = Locked::open(&io, None).unwrap();
        let passphrase = SecretBytes::zeroed(8).unwrap();
        *locked.unlock_with_passphrase(&passphrase).unwrap_err().reason
    }

    #[test]
    fn a_passphrase_that_was_not_tried_is_not_called_wrong() {
        assert!(matches!(
            refused("/keyslots/0/kdf/type", "scrypt"),
            Reason::Keyslot {
                keyslot: 0,
                source: KeyslotError::Kdf(KdfError::Unknown { .. })
            }
        ));
        assert!(matches!(
            refused("/digests/0/iterations", 1 << 25),
            Reason::Keyslot {
                keyslot: 0,
                source: KeyslotError::Kdf(KdfError::DigestIterations { .. })
            }
        ));
        assert!(matches!(
            refused("/keyslots/0/priority", 1),
            Reason::WrongPassphrase { untried } if untried.is_empty()
        ));
    }
}
