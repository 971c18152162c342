//! A volume at rest: its header was read, but its key is not known. Unlocking returns a [`Volume`], which is needed to add
//! another keyslot.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tracing::warn;
use uuid::Uuid;

use super::bindings::Bindings;
use super::copies::{self, Found, Header, HeaderError, HeaderState};
use super::error::{Reason, VolumeError};
use super::header_io::HeaderIo;
use super::kdf::Budget;
use super::keyslot::{self, KeyslotError};
use super::layout::Layout;
use super::lock::{LockMode, MetadataLock};
use super::metadata::{Base64, Id, Keyslot, Luks2Keyslot, Metadata, Pbkdf2Digest};
use super::refusal;
use super::segment::SegmentTable;
use crate::cipher::{KernelChoice, SectorCipher, SectorSize};
use crate::keys::arena::SecretBytes;

/// A volume whose header was read and found to be one that sealblk serves. No key is at hand.
#[derive(Debug)]
pub struct Locked<'header> {
    pub(super) io: &'header dyn HeaderIo,
    pub(super) header: Header,
    state: HeaderState,
    layout: Layout,
    kernel: KernelChoice,
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

    /// What of it the guest would notice if `found` were in its place. A disk that has become longer is none the worse.
    fn changed_to(&self, found: &Self) -> Option<Changed> {
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
         restart `sealblk serve`; if not, the header was altered: restore it from a backup (`cryptsetup luksHeaderRestore`)"
    )]
    Key,
    /// What the guest has written would be read at another place.
    #[error(
        "the header has the UUID of this volume, but the offset or sector size of its data has changed since the disk was \
         attached: if this is intended, restart `sealblk serve`; if not, the header was altered: restore it from a backup \
         (`cryptsetup luksHeaderRestore`)"
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
        let read = || {
            let (found, state) = read_and_repair(header)?;
            let layout = layout(&found, header, payload)?;
            Ok(Self {
                io: header,
                header: found,
                state,
                layout,
                kernel: KernelChoice::default(),
            })
        };
        read().map_err(|reason: Reason| reason.at(header.path()))
    }

    /// Makes the volumes that are unlocked from here use this kernel of the cipher.
    pub fn with_kernel(mut self, kernel: KernelChoice) -> Self {
        self.kernel = kernel;
        self
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
                "the disk has grown since it was attached; its guest sees the new size after a restart of `sealblk serve`"
            );
        }
        self.layout = expected.layout;
        Ok(self)
    }

    /// The KEKs that open it.
    pub fn bindings(&self) -> Bindings {
        Bindings::of(&self.header)
    }

    /// Whether both copies of the header are sound, as of when they were read or written last.
    pub fn header_state(&self) -> &HeaderState {
        &self.state
    }

    /// Length of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.layout.capacity
    }

    /// The unit in which the disk must be read and written.
    pub fn sector_size(&self) -> SectorSize {
        self.layout.sector_size
    }

    /// The largest power of two, up to `limit`, that divides where the disk starts in the payload.
    pub fn alignment(&self, limit: u32) -> u32 {
        self.layout.alignment(limit)
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
                match self.open_keyslot(slot, digest, passphrase, &mut budget) {
                    Ok(Some(key)) => return self.unlocked(id, key),
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

    /// The keyslots that hold the key of a segment. Others ("unbound" ones) hold whatever their owner put there.
    pub(super) fn passphrase_keyslots(&self) -> impl Iterator<Item = (Id, &Luks2Keyslot)> {
        keyslots_of_segments(&self.header.metadata)
    }

    /// The volume key, if `passphrase` is that of `slot` and the segment's digest says that what `slot` holds is it.
    pub(super) fn open_keyslot(
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

    /// Expands the key that keyslot `id` held, and puts the segment table together.
    pub(super) fn unlocked(&self, id: Id, key: SecretBytes) -> Result<Volume, Reason> {
        let cipher = SectorCipher::new(&key, self.sector_size(), self.kernel)?;
        Ok(Volume {
            uuid: self.uuid(),
            keyslot: id.0,
            capacity: self.capacity(),
            sector_size: self.sector_size(),
            table: Arc::new(self.layout.table(cipher)),
            key,
        })
    }

    /// Begins a change of the metadata on storage.
    pub(super) fn update(&self) -> Result<Update<'header>, Reason> {
        let io = self.io;
        if io.read_only() {
            return Err(Reason::ReadOnly);
        }
        let lock = io.lock(LockMode::Write).map_err(Reason::Lock)?;
        let header = match copies::read(io)? {
            Found::Sound(header) => header,
            Found::NeedsRecovery(recoverable) => recoverable.recover(io)?,
        };
        let (expected, found) = (self.uuid(), header.binary.uuid);
        if found != expected {
            return Err(Reason::Replaced { expected, found });
        }
        refusal::check(&header.metadata)?;
        Ok(Update {
            io,
            header,
            _lock: lock,
        })
    }

    pub(super) fn failed(&self, reason: Reason) -> VolumeError {
        reason.at(self.io.path())
    }
}

/// A change of the metadata, from their being read anew (other programs write them too) to the end of the write lock.
/// Nothing is changed unless it is committed.
pub(super) struct Update<'header> {
    pub(super) io: &'header dyn HeaderIo,
    pub(super) header: Header,
    _lock: MetadataLock<'header>,
}

impl Update<'_> {
    /// Writes the header to both copies, and to `locked`, which the update began with. It is done once the primary
    /// copy is durable; `locked` tells then whether the secondary is.
    pub(super) fn commit(&mut self, locked: &mut Locked<'_>) -> Result<(), HeaderError> {
        locked.state = self.header.commit(self.io)?;
        locked.header = self.header.clone();
        Ok(())
    }
}

/// A volume whose key is at hand.
pub struct Volume {
    uuid: Uuid,
    keyslot: u32,
    capacity: u64,
    sector_size: SectorSize,
    table: Arc<SegmentTable>,
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

    /// Length of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The unit in which the disk must be read and written.
    pub fn sector_size(&self) -> SectorSize {
        self.sector_size
    }

    /// The map from sectors to the payload, as of now.
    pub fn table(&self) -> Arc<SegmentTable> {
        Arc::clone(&self.table)
    }

    pub(super) fn key(&self) -> &SecretBytes {
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

/// Reads both copies under the lock for reading. Where this process may not have that, what is not sound may be another
/// program's update on its way, and is looked at again.
pub(super) fn read_locked(io: &dyn HeaderIo) -> Result<Found, Reason> {
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
fn read_and_repair(io: &dyn HeaderIo) -> Result<(Header, HeaderState), Reason> {
    let found = read_locked(io)?;
    if let Found::Sound(header) = found {
        return Ok((header, HeaderState::Sound));
    }
    let lock = match io.read_only() {
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
            Found::NeedsRecovery(recoverable) => {
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
            sound => sound,
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
pub(super) fn layout(
    header: &Header,
    io: &dyn HeaderIo,
    payload: Option<&dyn HeaderIo>,
) -> Result<Layout, Reason> {
    let served = refusal::check(&header.metadata)?;
    if let Some(payload) = payload {
        refuse_volume(payload, served.segment.place.offset.0)?;
    }
    let payload_len = payload.unwrap_or(io).size().map_err(Reason::Length)?;
    let header_end = if payload.is_some() { 0 } else { header.end() };
    Ok(Layout::new(served, header_end, payload_len)?)
}

/// The keyslots of type `luks2` that the digest of a segment names.
pub(super) fn keyslots_of_segments(metadata: &Metadata) -> impl Iterator<Item = (Id, &Luks2Keyslot)> {
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
    use super::super::kdf::KdfError;
    use super::super::testing::{Memory, sample_with};
    use super::*;

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
