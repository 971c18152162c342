//! Ways into a volume: recovery keys, which are passphrases behind argon2id, and bindings to a provider's KEK,
//! which are tokens. Each is a keyslot with the same volume key in it.
//!
//! Order of writes: a keyslot's area is durable before any metadata refers to it, and is wiped only after none
//! does. A crash between the last commit and the wipe leaves material that nothing refers to, whose salt is gone.

use tracing::warn;

use super::copies::Header;
use super::error::{Reason, VolumeError};
use super::header_io::HeaderIo;
use super::kdf::{self, Argon2Cost};
use super::keyslot::{self, AREA_LEN, Sealed};
use super::locked::{Locked, Volume, keyslots_of_segments};
use super::metadata::{AREA_ALIGNMENT, Base64, Digest, Id, Keyslot, MAX_OBJECTS, Metadata, Segment};
use super::token::{self, SLOT_SECRET_LEN, SealblkToken};
use crate::keys::arena::SecretBytes;
use crate::keys::{Binding, KeyId, KeyProvider, KeyReason, Providers};

impl Locked<'_> {
    /// Unlocks by the sealblk tokens, one after the other, with the providers that they name.
    ///
    /// # Errors
    /// [`Reason::NoToken`] when there are none; else the error of the last one.
    pub fn unlock_with_provider(&self, providers: &dyn Providers) -> Result<Volume, VolumeError> {
        let unlock = || {
            let mut failure = Reason::NoToken;
            for (&id, token) in &self.header.metadata.tokens {
                let Some(sealblk) = SealblkToken::of(token) else {
                    continue;
                };
                let opened = sealblk
                    .map_err(|text| Reason::BrokenToken { token: id.0, text })
                    .and_then(|sealblk| self.unlock_token(id, token.keyslots[0], &sealblk, providers));
                match opened {
                    Ok(volume) => return Ok(volume),
                    Err(reason) => {
                        if !matches!(failure, Reason::NoToken) {
                            warn!("{}", self.failed(failure));
                        }
                        failure = reason;
                    }
                }
            }
            Err(failure)
        };
        unlock().map_err(|reason| self.failed(reason))
    }

    fn unlock_token(
        &self,
        token: Id,
        keyslot: Id,
        sealblk: &SealblkToken,
        providers: &dyn Providers,
    ) -> Result<Volume, Reason> {
        let binding = Binding {
            volume: self.uuid(),
            provider: &sealblk.provider,
            key_id: &sealblk.key_id,
            keyslot: keyslot.0,
        };
        let provider = providers
            .provider(&sealblk.provider)
            .map_err(|source| Reason::Provider {
                token: token.0,
                source,
            })?;
        let secret = provider
            .unwrap(&binding, &sealblk.wrapped_slot_secret.0)
            .map_err(|source| {
                if source.reason != KeyReason::Unauthentic {
                    return Reason::Provider {
                        token: token.0,
                        source,
                    };
                }
                let (provider, key_id) = (sealblk.provider.clone(), sealblk.key_id.clone());
                Reason::ForeignToken {
                    token: token.0,
                    uuid: self.uuid(),
                    provider,
                    key_id,
                }
            })?;
        let passphrase = token::passphrase_of(&secret)?;
        let (_, slot) = self
            .passphrase_keyslots()
            .find(|&(id, _)| id == keyslot)
            .ok_or(Reason::NoSuchKeyslot { keyslot: keyslot.0 })?;
        match self.open_keyslot(keyslot, slot, &passphrase) {
            Ok(Some(key)) => self.unlocked(keyslot, key),
            Ok(None) => Err(Reason::TokenOpensNothing {
                token: token.0,
                keyslot: keyslot.0,
            }),
            Err(source) => Err(Reason::Keyslot {
                keyslot: keyslot.0,
                source,
            }),
        }
    }

    /// Adds a keyslot for `passphrase`, and gives its number. `volume` is this volume, unlocked.
    ///
    /// # Errors
    /// Where there is no room, or the header cannot be written; it is as it was then.
    pub fn add_recovery_key(
        &mut self,
        volume: &Volume,
        passphrase: &SecretBytes,
        cost: Argon2Cost,
    ) -> Result<u32, VolumeError> {
        let mut add = || {
            let sealed = recovery_keyslot(volume.key(), passphrase, cost)?;
            let mut update = self.update()?;
            let keyslot = free_keyslot(&update.header.metadata)?;
            place(&mut update.header, keyslot, volume.key(), sealed)?.store(update.io)?;
            update.commit(self)?;
            Ok(keyslot.0)
        };
        add().map_err(|reason| self.failed(reason))
    }

    /// Adds a keyslot whose slot secret is wrapped under a KEK, with the token that says so, and gives the keyslot's
    /// number. `volume` is this volume, unlocked.
    ///
    /// # Errors
    /// Where the provider refuses, there is no room, or the header cannot be written; it is as it was then.
    pub fn bind(
        &mut self,
        volume: &Volume,
        provider: &dyn KeyProvider,
        key_id: &KeyId,
    ) -> Result<u32, VolumeError> {
        let mut bind = || {
            // The wrapping names the keyslot, and may take a while: the number is picked before the lock is taken.
            let keyslot = free_keyslot(&self.header.metadata)?;
            let binding = Binding {
                volume: self.uuid(),
                provider: provider.name(),
                key_id,
                keyslot: keyslot.0,
            };
            let (sealed, sealblk) = bound_keyslot(volume.key(), provider, &binding)?;
            let mut update = self.update()?;
            if update.header.metadata.keyslots.contains_key(&keyslot) {
                return Err(Reason::ChangedMeanwhile);
            }
            let material = place(&mut update.header, keyslot, volume.key(), sealed)?;
            add_token(&mut update.header.metadata, sealblk.into_token(keyslot))?;
            material.store(update.io)?;
            update.commit(self)?;
            Ok(keyslot.0)
        };
        bind().map_err(|reason| self.failed(reason))
    }

    /// Removes a keyslot, the sealblk token that belongs to it, and its material.
    ///
    /// # Errors
    /// [`Reason::LastWayIn`] when no other keyslot opens the volume, unless `even_the_last`.
    pub fn remove_keyslot(&mut self, keyslot: u32, even_the_last: bool) -> Result<(), VolumeError> {
        let mut remove = || {
            let mut update = self.update()?;
            let (offset, size) = forget(&mut update.header.metadata, Id(keyslot), even_the_last)?;
            update.commit(self)?;
            let wiped = random_fill(update.io, offset..offset + size).and_then(|()| update.io.sync());
            wiped.map_err(|source| Reason::Wipe { keyslot, source })
        };
        remove().map_err(|reason| self.failed(reason))
    }
}

/// The material of a keyslot that has its place in the metadata, and is not written yet.
#[must_use = "metadata may refer to it only once it is stored"]
pub(super) struct Material {
    keyslot: Id,
    bytes: Vec<u8>,
    offset: u64,
}

impl Material {
    /// Writes it to its area. It is durable when this returns.
    pub(super) fn store(self, io: &dyn HeaderIo) -> Result<(), Reason> {
        let keyslot = self.keyslot.0;
        let stored = io.write_at(&self.bytes, self.offset).and_then(|()| io.sync());
        stored.map_err(|source| Reason::WriteKeyslot { keyslot, source })
    }
}

/// Enters a keyslot with `key` in it into the metadata, wherever the keyslots area has room.
pub(super) fn place(
    header: &mut Header,
    keyslot: Id,
    key: &SecretBytes,
    sealed: Sealed,
) -> Result<Material, Reason> {
    let offset = free_area(header)?;
    let digest = digest_of_disk(&mut header.metadata, key, keyslot)?;
    digest.keyslots_mut().push(keyslot);
    let (slot, bytes) = sealed.at(offset);
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

fn free_area(header: &Header) -> Result<u64, Reason> {
    let mut areas: Vec<_> = header.metadata.keyslots.values().map(Keyslot::area).collect();
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

/// Takes a keyslot out of the metadata, and all that refers to it, and gives its area.
fn forget(metadata: &mut Metadata, id: Id, even_the_last: bool) -> Result<(u64, u64), Reason> {
    let area = metadata
        .keyslots
        .get(&id)
        .ok_or(Reason::NoSuchKeyslot { keyslot: id.0 })?
        .area();
    let others = keyslots_of_segments(metadata)
        .filter(|&(other, _)| other != id)
        .count();
    if others == 0 && !even_the_last {
        return Err(Reason::LastWayIn { keyslot: id.0 });
    }
    metadata.keyslots.remove(&id);
    for digest in metadata.digests.values_mut() {
        digest.keyslots_mut().retain(|&other| other != id);
    }
    for token in metadata.tokens.values_mut() {
        token.keyslots.retain(|&other| other != id);
    }
    // Tokens of others may wait for a keyslot; one of ours without it is nothing.
    metadata
        .tokens
        .retain(|_, token| token.kind != token::TYPE || !token.keyslots.is_empty());
    Ok(area)
}

/// The digest that ties the segments to `key`. That `key` is the right one is looked at, not believed: a keyslot
/// with a key of another volume would lock out its owner.
fn digest_of_disk<'m>(
    metadata: &'m mut Metadata,
    key: &SecretBytes,
    keyslot: Id,
) -> Result<&'m mut Digest, Reason> {
    let crypt = metadata
        .segments
        .iter()
        .find(|(_, segment)| matches!(segment, Segment::Crypt(_)));
    let digest = crypt.and_then(|(&segment, _)| metadata.digest_of_segment(segment));
    let Some((id, Digest::Pbkdf2(digest))) = digest else {
        return Err(Reason::NotItsKey);
    };
    if !keyslot::verify(digest, key).map_err(|source| Reason::Keyslot {
        keyslot: keyslot.0,
        source,
    })? {
        return Err(Reason::NotItsKey);
    }
    metadata.digests.get_mut(&id).ok_or(Reason::NotItsKey)
}

/// A keyslot that a person's recovery key opens.
pub(super) fn recovery_keyslot(
    key: &SecretBytes,
    passphrase: &SecretBytes,
    cost: Argon2Cost,
) -> Result<Sealed, Reason> {
    Sealed::new(key, cost.to_kdf()?, passphrase).map_err(Reason::Seal)
}

/// A keyslot that a new slot secret opens, and the token that has it wrapped under the KEK of `binding`.
pub(super) fn bound_keyslot(
    key: &SecretBytes,
    provider: &dyn KeyProvider,
    binding: &Binding<'_>,
) -> Result<(Sealed, SealblkToken), Reason> {
    let secret = SecretBytes::random(SLOT_SECRET_LEN)?;
    let wrapped = provider.wrap(binding, &secret).map_err(Reason::Wrap)?;
    let sealed = Sealed::new(key, kdf::cheap()?, &token::passphrase_of(&secret)?).map_err(Reason::Seal)?;
    let token = SealblkToken {
        provider: binding.provider.to_owned(),
        key_id: binding.key_id.clone(),
        wrapped_slot_secret: Base64(wrapped),
    };
    Ok((sealed, token))
}

pub(super) fn add_token(metadata: &mut Metadata, token: super::metadata::Token) -> Result<(), Reason> {
    let free = (0..MAX_TOKENS)
        .map(Id)
        .find(|id| !metadata.tokens.contains_key(id));
    let id = free.ok_or(Reason::NoneFree {
        what: "token",
        limit: MAX_TOKENS,
    })?;
    metadata.tokens.insert(id, token);
    Ok(())
}

pub(super) fn free_keyslot(metadata: &Metadata) -> Result<Id, Reason> {
    let free = (0..MAX_KEYSLOTS)
        .map(Id)
        .find(|id| !metadata.keyslots.contains_key(id));
    free.ok_or(Reason::NoneFree {
        what: "keyslot",
        limit: MAX_KEYSLOTS,
    })
}

/// Overwrites a range with random bytes, in pieces of bounded size.
pub(super) fn random_fill(io: &dyn HeaderIo, range: std::ops::Range<u64>) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE.min((range.end - range.start) as usize)];
    let mut offset = range.start;
    while offset < range.end {
        let len = piece.len().min((range.end - offset) as usize);
        getrandom::fill(&mut piece[..len]).map_err(std::io::Error::other)?;
        io.write_at(&piece[..len], offset)?;
        offset += len as u64;
    }
    Ok(())
}

/// cryptsetup does not see what has a greater number.
const MAX_KEYSLOTS: u32 = MAX_OBJECTS as u32;
const MAX_TOKENS: u32 = MAX_OBJECTS as u32;

const PIECE: usize = 1 << 20;
