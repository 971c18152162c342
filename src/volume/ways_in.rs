//! The keyslots of a volume: for recovery keys, which are passphrases with argon2id, and for bindings to a provider's KEK,
//! which are tokens. Each keyslot holds the same volume key.
//!
//! Order of writes: a keyslot's area is durable before any metadata refer to it, and is wiped before the metadata
//! drop it. A crash between the wipe and the commit leaves a keyslot that opens nothing, and that can be removed like
//! any other. In the opposite order, a crash would leave material without a reference, which the key still opens
//! with an old copy of the header.

use tracing::warn;

use super::copies::Header;
use super::error::{Reason, VolumeError};
use super::header_io::HeaderIo;
use super::info::Purpose;
use super::kdf::{self, Argon2Cost, Budget};
use super::keyslot::{self, AREA_LEN, NewKeyslot};
use super::locked::{Locked, Volume};
use super::metadata::{AREA_ALIGNMENT, Base64, Digest, Id, Keyslot, MAX_OBJECTS, Metadata};
use super::refusal;
use super::token::{self, SLOT_SECRET_LEN, SealblkToken};
use crate::keys::arena::SecretBytes;
use crate::keys::{Binding, KeyProvider, KeyReason, KeyState, Providers};
use crate::timestamp::Timestamp;

impl Locked<'_> {
    /// Unlocks by the sealblk tokens, one after the other, with the providers that they name. That which a rekey under way
    /// has added is the first: the key that it replaces may be gone for good.
    ///
    /// # Errors
    /// [`Reason::NoToken`] when there are none; else the error of the last one.
    pub fn unlock_with_provider(&self, providers: &dyn Providers) -> Result<Volume, VolumeError> {
        let unlock = || {
            let mut failure = Reason::NoToken;
            let mut budget = Budget::default();
            let tokens = self.header.metadata.tokens.iter();
            let mut ours: Vec<_> = tokens
                .filter_map(|(&id, token)| Some((id, token, SealblkToken::of(token)?)))
                .collect();
            ours.sort_by_key(|(_, _, sealblk)| !matches!(sealblk, Ok(token) if !token.replaces.is_empty()));
            for (id, token, sealblk) in ours {
                let opened = sealblk
                    .map_err(|text| Reason::BrokenToken { token: id.0, text })
                    .and_then(|sealblk| {
                        self.unlock_token(id, token.keyslots[0], &sealblk, providers, &mut budget)
                    });
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

    pub(super) fn unlock_token(
        &self,
        token: Id,
        keyslot: Id,
        sealblk: &SealblkToken,
        providers: &dyn Providers,
        budget: &mut Budget,
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
        let digest = refusal::check(&self.header.metadata)?.digest;
        match self.open_keyslot(slot, digest, &passphrase, budget) {
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
            let new = recovery_keyslot(volume.key(), passphrase, cost)?;
            let mut update = self.update()?;
            let keyslot = free_keyslot(&update.header.metadata)?;
            place(&mut update.header, keyslot, volume.key(), new)?.store(update.io)?;
            update.commit(self)?;
            Ok(keyslot.0)
        };
        add().map_err(|reason| self.failed(reason))
    }

    /// Makes sure that the way by which `opened` was unlocked will be there tomorrow: a KEK that is still in memory opens the
    /// volume also when its provider has lost it.
    ///
    /// # Errors
    /// [`Reason::KekState`] if the provider does not have the KEK ready for use, or [`Reason::Kek`] if it cannot tell.
    pub fn check_way_in(&self, opened: &Volume, providers: &dyn Providers) -> Result<(), VolumeError> {
        let keyslot = Id(opened.keyslot());
        let tokens = self.header.metadata.tokens.values();
        let bound = tokens
            .filter(|token| token.keyslots.contains(&keyslot))
            .filter_map(|token| SealblkToken::of(token)?.ok());
        for sealblk in bound {
            let state = providers
                .provider(&sealblk.provider)
                .and_then(|provider| provider.state(&sealblk.key_id))
                .map_err(|source| self.failed(Reason::Kek(source)))?;
            if state != KeyState::Active {
                return Err(self.failed(Reason::KekState { state }));
            }
        }
        Ok(())
    }

    /// Removes the keyslot of a recovery key, and its material: no copy of the header opens with the key any more.
    /// `other` is this volume, unlocked in another way, which so is known to work; see [`Locked::check_way_in`].
    ///
    /// # Errors
    /// Where the keyslot is none of a recovery key, opened `other`, or is not what it was when this header was read.
    /// After [`Reason::Entry`] the keyslot opens nothing any more, and is only listed.
    pub fn remove_recovery_key(&mut self, keyslot: u32, other: &Volume) -> Result<(), VolumeError> {
        let mut remove = || {
            let mut update = self.update()?;
            let (id, metadata) = (Id(keyslot), &mut update.header.metadata);
            let slot = metadata.keyslots.get(&id);
            let slot = slot.ok_or(Reason::NoSuchKeyslot { keyslot })?;
            // Whoever asked meant the keyslots that he saw, and tried: not what has their numbers by now.
            let seen = &self.header.metadata.keyslots;
            if [id, Id(other.keyslot())]
                .iter()
                .any(|id| seen.get(id) != metadata.keyslots.get(id))
            {
                return Err(Reason::ChangedMeanwhile);
            }
            if Purpose::of(metadata, id) != Purpose::Passphrase {
                return Err(Reason::NoRecoveryKey { keyslot });
            }
            if other.keyslot() == keyslot {
                return Err(Reason::SameKey { keyslot });
            }
            let (offset, size) = slot.area();
            metadata.keyslots.remove(&id);
            for digest in metadata.digests.values_mut() {
                digest.keyslots_mut().retain(|&named| named != id);
            }
            random_fill(update.io, offset..offset + size)
                .and_then(|()| update.io.sync())
                .map_err(|source| Reason::Wipe { keyslot, source })?;
            update
                .commit(self)
                .map_err(|source| Reason::Entry { keyslot, source })
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
    new: NewKeyslot,
) -> Result<Material, Reason> {
    let offset = free_area(header)?;
    let digest = digest_of_disk(&mut header.metadata, key, keyslot)?;
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

/// A keyslot that a person's recovery key opens.
pub(super) fn recovery_keyslot(
    key: &SecretBytes,
    passphrase: &SecretBytes,
    cost: Argon2Cost,
) -> Result<NewKeyslot, Reason> {
    NewKeyslot::new(key, cost.to_kdf()?, passphrase).map_err(Reason::NewKeyslot)
}

/// A binding that a provider has wrapped something for. The provider is told what becomes of it: nothing, unless a commit of
/// the header was tried.
#[derive(Debug)]
pub(super) struct Announced<'p> {
    provider: &'p dyn KeyProvider,
    binding: Binding<'p>,
    became: Option<bool>,
}

impl Announced<'_> {
    /// Settles it by the commit of the header that has it. One that failed may be in force all the same.
    pub(super) fn settle<T, E>(mut self, committed: Result<T, E>) -> Result<T, E> {
        self.became = committed.is_ok().then_some(true);
        committed
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        if let Some(stored) = self.became
            && let Err(error) = self.provider.settle(&self.binding, stored)
        {
            warn!(%error, volume = %self.binding.volume, stored, "cannot report to the list of volumes whether a binding was stored");
        }
    }
}

/// A keyslot that a new slot secret opens, and the token that has it wrapped under the KEK of `binding`.
pub(super) fn bound_keyslot<'p>(
    key: &SecretBytes,
    provider: &'p dyn KeyProvider,
    binding: &Binding<'p>,
) -> Result<(NewKeyslot, SealblkToken, Announced<'p>), Reason> {
    let secret = SecretBytes::random(SLOT_SECRET_LEN)?;
    let wrapped = provider.wrap(binding, &secret).map_err(Reason::Wrap)?;
    let announced = Announced {
        provider,
        binding: *binding,
        became: Some(false),
    };
    let new =
        NewKeyslot::new(key, kdf::cheap()?, &token::passphrase_of(&secret)?).map_err(Reason::NewKeyslot)?;
    let token = SealblkToken {
        provider: binding.provider.to_owned(),
        key_id: binding.key_id.clone(),
        wrapped_slot_secret: Base64(wrapped),
        replaces: Vec::new(),
        bound: Some(Timestamp::now()),
    };
    Ok((new, token, announced))
}

pub(super) fn add_token(metadata: &mut Metadata, token: super::metadata::Token) -> Result<Id, Reason> {
    let free = (0..MAX_TOKENS)
        .map(Id)
        .find(|id| !metadata.tokens.contains_key(id));
    let id = free.ok_or(Reason::NoneFree {
        what: "token",
        limit: MAX_TOKENS,
    })?;
    metadata.tokens.insert(id, token);
    Ok(id)
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
