//! Shallow rekey: a new KEK and a new slot secret for the same volume key. Only the header changes.
//!
//! ```text
//! add        a keyslot for the new slot secret, and its token, which lists the tokens that it replaces: both keys open the volume
//! read back  the header from storage, and open the volume with the new key
//! remove     the material of the old keyslots, then the keyslots and their tokens: only the new key opens the volume
//! ```
//!
//! After a crash the volume is at one of these steps, and a token that replaces others shows that the rekey is not finished.
//! So no other state is needed: the next rekey first finishes the interrupted one.
//!
//! The old KEK still opens an older backup of the header, and overwritten blocks that flash storage keeps. Only a deep rekey
//! helps against an attacker with the volume key.

use super::copies::{self, Found};
use super::error::{Reason, VolumeError};
use super::kdf::Budget;
use super::lock::LockMode;
use super::locked::{Locked, Volume};
use super::metadata::Id;
use super::token::{ours, sealblk_tokens};
use super::ways_in::{add_token, bound_keyslot, free_keyslot, place, random_fill};
use crate::keys::{Binding, KeyId, KeyState, Providers};

/// What a rekey has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rekeyed {
    /// The provider of the new KEK.
    pub provider: String,
    /// The new KEK.
    pub key_id: KeyId,
    /// The keyslot that it opens.
    pub keyslot: u32,
    /// What opens the volume no more: providers, and their KEKs.
    pub replaced: Vec<(String, KeyId)>,
}

impl Locked<'_> {
    /// Gives the volume a new KEK of the provider `name`; if none is named, of the one that it is bound to, else of the
    /// default one. If that was begun before, it is finished. `volume` is this volume, unlocked.
    ///
    /// # Errors
    /// As for [`Locked::rekey`] and [`Locked::finish_rekey`].
    pub fn rekey_to(
        &mut self,
        volume: &Volume,
        providers: &dyn Providers,
        name: Option<&str>,
    ) -> Result<Rekeyed, VolumeError> {
        if let Some(finished) = self.finish_rekey(volume, providers, name)?
            && name.is_none_or(|name| name == finished.provider)
        {
            return Ok(finished);
        }
        let chosen = || match (name, self.bound_to()) {
            (Some(name), _) => Ok(name.to_owned()),
            (None, Some(bound)) => Ok(bound),
            (None, None) => providers
                .default_name()
                .map_err(Reason::Kek)?
                .ok_or(Reason::NoProvider),
        };
        let name = chosen().map_err(|reason| self.failed(reason))?;
        self.rekey(volume, providers, &name)
    }

    /// Gives the volume a new KEK of the provider `name`, in the place of all KEKs that it is bound to. `volume` is this
    /// volume, unlocked.
    ///
    /// # Errors
    /// [`Reason::RekeyUnfinished`] once the new KEK opens the volume; before that the header is as it was.
    pub fn rekey(
        &mut self,
        volume: &Volume,
        providers: &dyn Providers,
        name: &str,
    ) -> Result<Rekeyed, VolumeError> {
        let token = self
            .add_binding(volume, providers, name)
            .map_err(|reason| self.failed(reason))?;
        self.replace_others(token, volume, providers)
            .map_err(|reason| self.failed(Reason::RekeyUnfinished(Box::new(reason))))
    }

    /// Finishes a rekey that was interrupted, if there is one and what it has added opens the volume. Where another provider is
    /// wanted, `name`, and that rekey's own is not to be had, it is left to the rekey to come, which replaces all.
    ///
    /// # Errors
    /// [`Reason::RekeyUnfinished`], if what it replaces cannot be removed.
    pub fn finish_rekey(
        &mut self,
        volume: &Volume,
        providers: &dyn Providers,
        name: Option<&str>,
    ) -> Result<Option<Rekeyed>, VolumeError> {
        let Some((token, provider)) = self.unfinished() else {
            return Ok(None);
        };
        match self.replace_others(token, volume, providers) {
            Ok(rekeyed) => Ok(Some(rekeyed)),
            Err(Reason::ReadBack(source)) => {
                // It never came into force; the next rekey replaces it with all others.
                tracing::warn!(token = token.0, %source, "the keyslot that an interrupted rekey added does not open");
                Ok(None)
            }
            Err(Reason::Kek(source)) if name.is_some_and(|name| name != provider) => {
                tracing::warn!(token = token.0, %source, "an interrupted rekey cannot be finished; replacing it");
                Ok(None)
            }
            Err(reason) => Err(self.failed(Reason::RekeyUnfinished(Box::new(reason)))),
        }
    }

    /// The provider that the volume is bound to; if there are several, that of the first token.
    fn bound_to(&self) -> Option<String> {
        let tokens = sealblk_tokens(&self.header.metadata);
        tokens.into_iter().next().map(|(.., token)| token.provider)
    }

    /// The token that an interrupted rekey has added, and its provider.
    fn unfinished(&self) -> Option<(Id, String)> {
        let tokens = sealblk_tokens(&self.header.metadata);
        tokens
            .into_iter()
            .find_map(|(id, _, token)| (!token.replaces.is_empty()).then_some((id, token.provider)))
    }

    /// Adds a keyslot with a new slot secret, under a new KEK. Servers are asked before the header is locked.
    fn add_binding(&mut self, volume: &Volume, providers: &dyn Providers, name: &str) -> Result<Id, Reason> {
        let provider = providers.provider(name).map_err(Reason::Kek)?;
        let key_id = provider.create_kek().map_err(Reason::Kek)?;
        let keyslot = free_keyslot(&self.header.metadata)?;
        let binding = Binding {
            volume: self.uuid(),
            provider: name,
            key_id: &key_id,
            keyslot: keyslot.0,
        };
        let (sealed, mut token, announced) = bound_keyslot(volume.key(), &*provider, &binding)?;

        let mut update = self.update()?;
        let metadata = &update.header.metadata;
        if metadata.keyslots.contains_key(&keyslot) {
            return Err(Reason::ChangedMeanwhile);
        }
        let tokens = sealblk_tokens(metadata);
        token.replaces = tokens.into_iter().map(|(id, ..)| id).collect();
        place(&mut update.header, keyslot, volume.key(), sealed)?.store(update.io)?;
        let id = add_token(&mut update.header.metadata, token.into_token(keyslot))?;
        announced.settle(update.commit(self))?;
        Ok(id)
    }

    /// Removes what `token` replaces, once `token` was seen to open the volume.
    fn replace_others(
        &mut self,
        token: Id,
        volume: &Volume,
        providers: &dyn Providers,
    ) -> Result<Rekeyed, Reason> {
        self.read_back(token, volume, providers)?;

        let mut update = self.update()?;
        let metadata = &mut update.header.metadata;
        let (keyslot, mut kept) = ours(metadata, token).ok_or(Reason::ChangedMeanwhile)?;
        if ours(&self.header.metadata, token).as_ref() != Some(&(keyslot, kept.clone())) {
            return Err(Reason::ChangedMeanwhile);
        }
        let mut replaced = Vec::new();
        let mut areas = Vec::new();
        for old in std::mem::take(&mut kept.replaces) {
            let Some((slot, sealblk)) = ours(metadata, old).filter(|_| old != token) else {
                continue;
            };
            metadata.tokens.remove(&old);
            replaced.push((sealblk.provider, sealblk.key_id));
            // A keyslot that another way in shares stays, whoever made it so.
            let shared = metadata
                .tokens
                .values()
                .any(|token| token.keyslots.contains(&slot));
            if !shared && let Some(removed) = metadata.keyslots.remove(&slot) {
                areas.push((slot, removed.area()));
                for digest in metadata.digests.values_mut() {
                    digest.keyslots_mut().retain(|&named| named != slot);
                }
            }
        }
        let rekeyed = Rekeyed {
            provider: kept.provider.clone(),
            key_id: kept.key_id.clone(),
            keyslot: keyslot.0,
            replaced,
        };
        metadata.tokens.insert(token, kept.into_token(keyslot));
        for (slot, (offset, size)) in areas {
            random_fill(update.io, offset..offset + size)
                .and_then(|()| update.io.sync())
                .map_err(|source| Reason::WipeReplaced {
                    keyslot: slot.0,
                    source,
                })?;
        }
        update.commit(self)?;
        Ok(rekeyed)
    }

    /// Opens the volume by `token` alone, as it stands on storage.
    fn read_back(&mut self, token: Id, volume: &Volume, providers: &dyn Providers) -> Result<(), Reason> {
        let header = {
            let _lock = self.io.lock(LockMode::Read).map_err(Reason::Lock)?;
            // What a cache holds proves nothing.
            self.io
                .forget_cached(0..self.header.end())
                .map_err(Reason::ForgetCached)?;
            match copies::read(self.io)? {
                Found::Sound(header) => header,
                // The old keyslots go only when both copies know of the new one.
                Found::NeedsRecovery(recoverable) => {
                    return Err(Reason::DamagedCopy {
                        copy: recoverable.bad.name(),
                        damage: recoverable.damage,
                    });
                }
            }
        };
        if header.binary.uuid != self.uuid() {
            let (expected, found) = (self.uuid(), header.binary.uuid);
            return Err(Reason::Replaced { expected, found });
        }
        self.header = header;
        let (keyslot, sealblk) = ours(&self.header.metadata, token).ok_or(Reason::ChangedMeanwhile)?;
        // An agent may still have the KEK in memory: that the provider has it, only the provider can tell.
        let state = providers
            .provider(&sealblk.provider)
            .and_then(|provider| provider.state(&sealblk.key_id))
            .map_err(Reason::Kek)?;
        if state != KeyState::Active {
            return Err(Reason::ReadBack(Box::new(Reason::KekState { state })));
        }
        let opened = self
            .unlock_token(token, keyslot, &sealblk, providers, &mut Budget::default())
            .map_err(|reason| Reason::ReadBack(Box::new(reason)))?;
        match opened.key().ct_eq(volume.key()) {
            true => Ok(()),
            false => Err(Reason::NotItsKey),
        }
    }
}
