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

use super::error::{BindingError, BindingReason};
use super::new::bound_keyslot;
use super::token::{ours, sealblk_tokens};
use super::unlock::unlock_token;
use crate::{Binding, KeyId, KeyState, Providers};
use sealblk_luks2::metadata::Id;
use sealblk_luks2::{Budget, Locked, Reason, Volume, free_keyslot};

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

/// Gives the volume a new KEK of the provider `name`; if none is named, of the one that it is bound to, else of the
/// default one, in the place of all KEKs that it is bound to. If that was begun before, it is finished. `volume` is this volume,
/// unlocked. `providers` make the KEK, and `opener` opens the volume with it, as the volume will be opened from then on: both are the
/// same providers, and may be asked for another purpose.
///
/// # Errors
/// [`BindingReason::RekeyUnfinished`] once the new KEK opens the volume; before that the header is as it was.
pub fn rekey(
    locked: &mut Locked<'_>,
    volume: &Volume,
    providers: &dyn Providers,
    opener: &dyn Providers,
    name: Option<&str>,
) -> Result<Rekeyed, BindingError> {
    let path = locked.path().to_owned();
    Rekey {
        locked,
        volume,
        providers,
        opener,
    }
    .run(name)
    .map_err(|reason| reason.at(&path))
}

struct Rekey<'a, 'header> {
    locked: &'a mut Locked<'header>,
    volume: &'a Volume,
    providers: &'a dyn Providers,
    opener: &'a dyn Providers,
}

impl Rekey<'_, '_> {
    fn run(&mut self, name: Option<&str>) -> Result<Rekeyed, BindingReason> {
        if let Some(finished) = self.finish(name)?
            && name.is_none_or(|name| name == finished.provider)
        {
            return Ok(finished);
        }
        let name = match (name, self.bound_to()) {
            (Some(name), _) => name.to_owned(),
            (None, Some(bound)) => bound,
            (None, None) => {
                let default = self.providers.default_name().map_err(BindingReason::Kek)?;
                default.ok_or(BindingReason::NoProvider)?
            }
        };
        let token = self.add_binding(&name)?;
        self.replace_others(token).map_err(unfinished)
    }

    /// Finishes a rekey that was interrupted, if there is one and what it has added opens the volume. Where another provider is
    /// wanted, `name`, and that rekey's own is not available, it is left to the rekey to come, which replaces all.
    fn finish(&mut self, name: Option<&str>) -> Result<Option<Rekeyed>, BindingReason> {
        let Some((token, provider)) = self.interrupted() else {
            return Ok(None);
        };
        match self.replace_others(token) {
            Ok(rekeyed) => Ok(Some(rekeyed)),
            Err(BindingReason::ReadBack(source)) => {
                // It never came into force; the next rekey replaces it with all others.
                tracing::warn!(token = token.0, %source, "the keyslot that an interrupted rekey added does not open");
                Ok(None)
            }
            Err(BindingReason::Kek(source)) if name.is_some_and(|name| name != provider) => {
                tracing::warn!(token = token.0, %source, "an interrupted rekey cannot be finished; replacing it");
                Ok(None)
            }
            Err(reason) => Err(unfinished(reason)),
        }
    }

    /// The provider that the volume is bound to; if there are several, that of the first token.
    fn bound_to(&self) -> Option<String> {
        let tokens = sealblk_tokens(self.locked.header().metadata());
        tokens.into_iter().next().map(|(.., token)| token.provider)
    }

    /// The token that an interrupted rekey has added, and its provider.
    fn interrupted(&self) -> Option<(Id, String)> {
        let tokens = sealblk_tokens(self.locked.header().metadata());
        tokens
            .into_iter()
            .find_map(|(id, _, token)| (!token.replaces.is_empty()).then_some((id, token.provider)))
    }

    /// Adds a keyslot with a new slot secret, under a new KEK. Servers are asked before the header is locked.
    fn add_binding(&mut self, name: &str) -> Result<Id, BindingReason> {
        let provider = self.providers.provider(name).map_err(BindingReason::Kek)?;
        let key_id = provider.create_kek().map_err(BindingReason::Kek)?;
        let keyslot = free_keyslot(self.locked.header().metadata())?;
        let binding = Binding {
            volume: self.locked.uuid(),
            provider: name,
            key_id: &key_id,
            keyslot: keyslot.0,
        };
        let (new, mut token, announced) = bound_keyslot(self.volume.key(), &*provider, &binding)?;

        let mut update = self.locked.update()?;
        let tokens = sealblk_tokens(update.metadata());
        token.replaces = tokens.into_iter().map(|(id, ..)| id).collect();
        update.add_keyslot(keyslot, new)?;
        let id = update.add_token(token.into_token(keyslot))?;
        announced.settle(update.commit(self.locked))?;
        Ok(id)
    }

    /// Removes what `token` replaces, once `token` was seen to open the volume.
    fn replace_others(&mut self, token: Id) -> Result<Rekeyed, BindingReason> {
        self.read_back(token)?;

        let mut update = self.locked.update()?;
        let (keyslot, mut kept) = ours(update.metadata(), token).ok_or(Reason::ChangedMeanwhile)?;
        if ours(self.locked.header().metadata(), token).as_ref() != Some(&(keyslot, kept.clone())) {
            return Err(Reason::ChangedMeanwhile.into());
        }
        let mut replaced = Vec::new();
        for old in std::mem::take(&mut kept.replaces) {
            let Some((slot, sealblk)) = ours(update.metadata(), old).filter(|_| old != token) else {
                continue;
            };
            update.remove_token(old);
            replaced.push((sealblk.provider, sealblk.key_id));
            // A keyslot that another token shares stays, whoever made it so.
            let mut others = update.metadata().tokens.values();
            if !others.any(|token| token.keyslots.contains(&slot))
                && update.metadata().keyslots.contains_key(&slot)
            {
                update.remove_keyslot(slot)?;
            }
        }
        let rekeyed = Rekeyed {
            provider: kept.provider.clone(),
            key_id: kept.key_id.clone(),
            keyslot: keyslot.0,
            replaced,
        };
        update.replace_token(token, kept.into_token(keyslot));
        update.commit(self.locked)?;
        Ok(rekeyed)
    }

    /// Opens the volume by `token` alone, as it stands on storage: what a cache holds proves nothing.
    fn read_back(&mut self, token: Id) -> Result<(), BindingReason> {
        self.locked.read_back()?;
        let (keyslot, sealblk) =
            ours(self.locked.header().metadata(), token).ok_or(Reason::ChangedMeanwhile)?;
        // An agent may still have the KEK in memory: that the provider has it, only the provider can tell.
        let state = self
            .providers
            .provider(&sealblk.provider)
            .and_then(|provider| provider.state(&sealblk.key_id))
            .map_err(BindingReason::Kek)?;
        let read_back = |reason| BindingReason::ReadBack(Box::new(reason));
        if state != KeyState::Active {
            return Err(read_back(BindingReason::KekState { state }));
        }
        let mut budget = Budget::default();
        let opened = unlock_token(self.locked, token, keyslot, &sealblk, self.opener, &mut budget);
        match opened.map_err(read_back)?.key().ct_eq(self.volume.key()) {
            true => Ok(()),
            false => Err(Reason::NotItsKey.into()),
        }
    }
}

fn unfinished(reason: BindingReason) -> BindingReason {
    BindingReason::RekeyUnfinished(Box::new(reason))
}
