//! Changes of a header, from reading it under the write lock to the commit.
//!
//! Order of writes: a keyslot's area is durable before any metadata refer to it, and is wiped before the metadata
//! drop it. A crash between the wipe and the commit leaves a keyslot that opens nothing, and that can be removed like
//! any other. In the opposite order, a crash would leave material without a reference, which the key still opens
//! with an old copy of the header.

use std::fmt;
use std::io;
use std::ops::Range;

use sealblk_base::size::in_memory;
use sealblk_secmem::arena::SecretBytes;

use crate::copies::{self, Found, Header};
use crate::error::Reason;
use crate::header_io::HeaderIo;
use crate::keyslot::{self, AREA_LEN, NewKeyslot};
use crate::lock::{LockMode, MetadataLock};
use crate::locked::Locked;
use crate::metadata::{
    AREA_ALIGNMENT, Digest, Id, Keyslot, MAX_OBJECTS, Metadata, Segment, SegmentSize, Token,
};
use crate::refusal;

/// A change of the metadata, which were read anew (other programs write them too), under the write lock, which is held until this
/// is dropped. [`Update::commit`] puts the whole change in force; without it, none of it is.
pub struct Update<'header> {
    io: &'header dyn HeaderIo,
    header: Header,
    /// The areas of the keyslots that were removed.
    removed: Vec<(Id, Range<u64>)>,
    _lock: MetadataLock<'header>,
}

impl fmt::Debug for Update<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Update")
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

impl<'header> Locked<'header> {
    /// Begins a change of the metadata on storage.
    ///
    /// # Errors
    /// If the header cannot be locked, read or written, or is another volume's by now.
    pub fn update(&self) -> Result<Update<'header>, Reason> {
        self.update_if(|_| Ok(()))
    }

    /// The same, if `check` accepts the header as it is found, before it is repaired.
    ///
    /// # Errors
    /// As for [`Locked::update`], and those of `check`.
    pub(crate) fn update_if(
        &self,
        check: impl FnOnce(&Metadata) -> Result<(), Reason>,
    ) -> Result<Update<'header>, Reason> {
        let io = self.io;
        if io.read_only() {
            return Err(Reason::ReadOnly);
        }
        let lock = io.lock(LockMode::Write).map_err(Reason::Lock)?;
        let found = copies::read(io)?;
        check(&found.header().metadata)?;
        let header = match found {
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
            removed: Vec::new(),
            _lock: lock,
        })
    }
}

impl Update<'_> {
    /// The metadata as they will be.
    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// The header as it will be, but for its sequence number.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Where the disk ends.
    ///
    /// # Errors
    /// If sealblk does not serve what the header describes.
    pub(crate) fn segment_size(&self) -> Result<SegmentSize, Reason> {
        Ok(refusal::check(self.metadata())?.segment.place.size)
    }

    /// Has the disk end elsewhere.
    ///
    /// # Errors
    /// If sealblk does not serve what the header describes.
    pub(crate) fn set_segment_size(&mut self, size: SegmentSize) -> Result<(), Reason> {
        let served = refusal::check(self.metadata())?.id;
        if let Some(Segment::Crypt(segment)) = self.header.metadata.segments.get_mut(&served) {
            segment.place.size = size;
        }
        Ok(())
    }

    /// Adds keyslot `id`. Its area is written, and durable when this returns; it is none that a keyslot had before this update.
    ///
    /// # Errors
    /// If there is such a keyslot already, `new` holds another key than the volume key, the keyslots area has no room, or the area
    /// cannot be written.
    pub fn add_keyslot(&mut self, id: Id, new: NewKeyslot) -> Result<(), Reason> {
        if self.header.metadata.keyslots.contains_key(&id) {
            return Err(Reason::ChangedMeanwhile);
        }
        place(&mut self.header, id, new, &self.removed)?.store(self.io)
    }

    /// Removes keyslot `id`. The commit wipes its area first.
    ///
    /// # Errors
    /// If there is none.
    pub fn remove_keyslot(&mut self, id: Id) -> Result<(), Reason> {
        let metadata = &mut self.header.metadata;
        let slot = metadata
            .keyslots
            .remove(&id)
            .ok_or(Reason::NoSuchKeyslot { keyslot: id.0 })?;
        for digest in metadata.digests.values_mut() {
            digest.keyslots_mut().retain(|&named| named != id);
        }
        for token in metadata.tokens.values_mut() {
            token.keyslots.retain(|&named| named != id);
        }
        let (offset, size) = slot.area();
        self.removed.push((id, offset..offset + size));
        Ok(())
    }

    /// Adds a token, and gives its number.
    ///
    /// # Errors
    /// If there are as many as there may be.
    pub fn add_token(&mut self, token: Token) -> Result<Id, Reason> {
        add_token(&mut self.header.metadata, token)
    }

    /// Puts `token` in the place of token `id`.
    pub fn replace_token(&mut self, id: Id, token: Token) {
        self.header.metadata.tokens.insert(id, token);
    }

    /// Removes token `id`, and gives it.
    pub fn remove_token(&mut self, id: Id) -> Option<Token> {
        self.header.metadata.tokens.remove(&id)
    }

    /// Wipes the areas of the keyslots that were removed, and writes the header to both copies, and to `locked`, which the update
    /// began with. It is done once the primary copy is durable; `locked` tells then whether the secondary is.
    ///
    /// # Errors
    /// [`Reason::Wipe`]: a keyslot is still in the header, and may open nothing. [`Reason::Entry`]: it opens nothing, and is
    /// still in the header. Others: nothing was changed.
    pub fn commit(mut self, locked: &mut Locked<'_>) -> Result<(), Reason> {
        let (expected, found) = (self.header.binary.uuid, locked.uuid());
        if expected != found {
            return Err(Reason::Replaced { expected, found });
        }
        self.header.check()?;
        for (keyslot, area) in &self.removed {
            random_fill(self.io, area.clone())
                .and_then(|()| self.io.sync())
                .map_err(|source| Reason::Wipe {
                    keyslot: keyslot.0,
                    source,
                })?;
        }
        locked.state = self
            .header
            .commit(self.io)
            .map_err(|source| match self.removed.first() {
                Some(&(Id(keyslot), _)) => Reason::Entry { keyslot, source },
                None => source.into(),
            })?;
        locked.header = self.header;
        Ok(())
    }
}

/// The material of a keyslot that has its place in the metadata, and is not written yet.
#[must_use = "metadata may refer to it only once it is stored"]
pub(crate) struct Material {
    keyslot: Id,
    bytes: Vec<u8>,
    offset: u64,
}

impl Material {
    /// Writes it to its area. It is durable when this returns.
    pub(crate) fn store(self, io: &dyn HeaderIo) -> Result<(), Reason> {
        let keyslot = self.keyslot.0;
        let stored = io.write_at(&self.bytes, self.offset).and_then(|()| io.sync());
        stored.map_err(|source| Reason::WriteKeyslot { keyslot, source })
    }
}

/// Enters a keyslot into the metadata, wherever the keyslots area has room beside the keyslots there are and those that were
/// `removed`: they are still in force on storage.
pub(crate) fn place(
    header: &mut Header,
    keyslot: Id,
    new: NewKeyslot,
    removed: &[(Id, Range<u64>)],
) -> Result<Material, Reason> {
    let offset = free_area(header, removed)?;
    let digest = digest_of_disk(&mut header.metadata, new.key(), keyslot)?;
    digest.keyslots_mut().push(keyslot);
    let (slot, bytes) = new.at(offset);
    header
        .metadata
        .keyslots
        .insert(keyslot, Keyslot::Luks2(Box::new(slot)));
    Ok(Material {
        keyslot,
        bytes,
        offset,
    })
}

fn free_area(header: &Header, removed: &[(Id, Range<u64>)]) -> Result<u64, Reason> {
    let mut areas: Vec<_> = header.metadata.keyslots.values().map(Keyslot::area).collect();
    areas.extend(
        removed
            .iter()
            .map(|(_, area)| (area.start, area.end - area.start)),
    );
    areas.sort_unstable();
    let mut offset = 2 * header.binary.header_size;
    for (taken, size) in areas {
        if taken >= offset + AREA_LEN {
            break;
        }
        offset = (taken + size).next_multiple_of(AREA_ALIGNMENT);
    }
    if offset + AREA_LEN > header.end() {
        return Err(Reason::NoRoom);
    }
    Ok(offset)
}

/// The digest of `key`, which is the segment's. That `key` is the right one is looked at, not believed: a keyslot
/// with a key of another volume would lock out its owner.
fn digest_of_disk<'m>(
    metadata: &'m mut Metadata,
    key: &SecretBytes,
    keyslot: Id,
) -> Result<&'m mut Digest, Reason> {
    let served = refusal::check(metadata)?;
    let id = served.digest_id;
    if !keyslot::verify(served.digest, key).map_err(|source| Reason::Keyslot {
        keyslot: keyslot.0,
        source,
    })? {
        return Err(Reason::NotItsKey);
    }
    metadata.digests.get_mut(&id).ok_or(Reason::NotItsKey)
}

pub(crate) fn add_token(metadata: &mut Metadata, token: Token) -> Result<Id, Reason> {
    let free = (0..MAX_OBJECTS)
        .map(Id)
        .find(|id| !metadata.tokens.contains_key(id));
    let id = free.ok_or(Reason::NoneFree {
        what: "token",
        limit: MAX_OBJECTS,
    })?;
    metadata.tokens.insert(id, token);
    Ok(id)
}

/// The lowest number that no keyslot has.
///
/// # Errors
/// If there are as many as there may be.
pub fn free_keyslot(metadata: &Metadata) -> Result<Id, Reason> {
    let free = (0..MAX_OBJECTS)
        .map(Id)
        .find(|id| !metadata.keyslots.contains_key(id));
    free.ok_or(Reason::NoneFree {
        what: "keyslot",
        limit: MAX_OBJECTS,
    })
}

/// Overwrites a range with random bytes, in pieces of bounded size.
pub(crate) fn random_fill(io: &dyn HeaderIo, range: Range<u64>) -> io::Result<()> {
    let mut piece = vec![0; PIECE.min(in_memory(range.end - range.start))];
    let mut offset = range.start;
    while offset < range.end {
        let len = piece.len().min(in_memory(range.end - offset));
        getrandom::fill(&mut piece[..len]).map_err(io::Error::other)?;
        io.write_at(&piece[..len], offset)?;
        offset += len as u64;
    }
    Ok(())
}

const PIECE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use sealblk_base::sector::SectorSize;

    use super::*;
    use crate::copies::HeaderError;
    use crate::create::{NewVolume, Options};
    use crate::keyslot::{KEY_LEN, KeyslotError};
    use crate::testing::{CHEAP, Memory, of_a_missing_keyslot, sample, secret, too_long};

    fn volume() -> Memory {
        let io = Memory::of(&sample());
        let options = Options {
            capacity: None,
            sector_size: SectorSize::B512,
            label: "",
            overwrite: true,
        };
        let mut new = NewVolume::plan(&io, None, &options).unwrap();
        let slot = NewKeyslot::for_passphrase(new.key(), &secret("old"), CHEAP).unwrap();
        new.add_keyslot(slot);
        new.write().unwrap();
        io
    }

    fn replace<'io>(locked: &Locked<'io>) -> Update<'io> {
        let volume = locked.unlock_with_passphrase(&secret("old")).unwrap();
        let mut update = locked.update().unwrap();
        update.remove_keyslot(Id(0)).unwrap();
        let slot = NewKeyslot::for_passphrase(volume.key(), &secret("new"), CHEAP).unwrap();
        update.add_keyslot(Id(0), slot).unwrap();
        update
    }

    /// The key that was verified was another argument than the keyslot.
    #[test]
    fn keyslot_with_another_key_is_refused() {
        let io = volume();
        let locked = Locked::open(&io, None).unwrap();
        let before = io.front.borrow().clone();
        let key = SecretBytes::random(KEY_LEN).unwrap();
        let slot = NewKeyslot::for_passphrase(&key, &secret("new"), CHEAP).unwrap();
        let refused = locked.update().unwrap().add_keyslot(Id(1), slot);
        assert!(matches!(refused, Err(Reason::NotItsKey)), "{refused:?}");
        assert!(*io.front.borrow() == before);
    }

    #[test]
    fn keyslot_for_a_key_of_another_length_is_refused() {
        for len in [1, 32, 128] {
            let key = SecretBytes::random(len).unwrap();
            let refused = NewKeyslot::for_random_secret(&key, &secret("new"));
            let bits = 8 * len as u64;
            assert!(matches!(refused, Err(KeyslotError::KeySize { bits: found }) if found == bits));
        }
    }

    /// The keyslot was destroyed before the metadata were looked at.
    #[test]
    fn change_to_invalid_metadata_leaves_the_keyslot_that_it_would_have_removed() {
        let io = volume();
        let mut locked = Locked::open(&io, None).unwrap();
        for token in [of_a_missing_keyslot(), too_long()] {
            let mut update = replace(&locked);
            update.add_token(token).unwrap();
            let refused = update.commit(&mut locked);
            assert!(
                matches!(refused, Err(Reason::Header(HeaderError::Unwritable(_)))),
                "{refused:?}"
            );
            let locked = Locked::open(&io, None).unwrap();
            locked.unlock_with_passphrase(&secret("old")).unwrap();
        }
    }

    #[test]
    fn keyslot_that_takes_anothers_place_opens_and_the_other_does_not() {
        let io = volume();
        let mut locked = Locked::open(&io, None).unwrap();
        replace(&locked).commit(&mut locked).unwrap();
        let locked = Locked::open(&io, None).unwrap();
        locked.unlock_with_passphrase(&secret("new")).unwrap();
        assert!(locked.unlock_with_passphrase(&secret("old")).is_err());
    }

    #[test]
    fn change_that_is_not_committed_leaves_the_keyslot_that_it_would_have_removed() {
        let io = volume();
        let locked = Locked::open(&io, None).unwrap();
        drop(replace(&locked));
        let locked = Locked::open(&io, None).unwrap();
        locked.unlock_with_passphrase(&secret("old")).unwrap();
    }
}
