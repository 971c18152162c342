//! Opening a volume by its sealblk tokens, with the providers that they name.

use tracing::warn;

use super::error::{BindingError, BindingReason};
use super::token::{self, SealblkToken};
use crate::{Binding, KeyReason, KeyState, Providers};
use sealblk_luks2::metadata::Id;
use sealblk_luks2::{Budget, Locked, Volume};

/// Unlocks `locked` by its sealblk tokens, one after the other, with the providers that they name. That which a rekey under way
/// has added is the first: the key that it replaces may be gone for good.
///
/// # Errors
/// [`BindingReason::NoToken`] when there are none; else the error of the last one.
pub fn unlock(locked: &Locked<'_>, providers: &dyn Providers) -> Result<Volume, BindingError> {
    let mut failure = BindingReason::NoToken;
    let mut budget = Budget::default();
    let tokens = locked.header().metadata().tokens.iter();
    let mut ours: Vec<_> = tokens
        .filter_map(|(&id, token)| Some((id, token, SealblkToken::of(token)?)))
        .collect();
    ours.sort_by_key(|(_, _, sealblk)| !matches!(sealblk, Ok(token) if !token.replaces.is_empty()));
    for (id, token, sealblk) in ours {
        let opened = sealblk
            .map_err(|text| BindingReason::BrokenToken { token: id.0, text })
            .and_then(|sealblk| {
                unlock_token(locked, id, token.keyslots[0], &sealblk, providers, &mut budget)
            });
        match opened {
            Ok(volume) => return Ok(volume),
            Err(reason) => {
                if !matches!(failure, BindingReason::NoToken) {
                    warn!("{}", failure.at(locked.path()));
                }
                failure = reason;
            }
        }
    }
    Err(failure.at(locked.path()))
}

pub(super) fn unlock_token(
    locked: &Locked<'_>,
    token: Id,
    keyslot: Id,
    sealblk: &SealblkToken,
    providers: &dyn Providers,
    budget: &mut Budget,
) -> Result<Volume, BindingReason> {
    let binding = Binding {
        volume: locked.uuid(),
        provider: &sealblk.provider,
        key_id: &sealblk.key_id,
        keyslot: keyslot.0,
    };
    let provider = providers
        .provider(&sealblk.provider)
        .map_err(|source| BindingReason::Provider {
            token: token.0,
            source,
        })?;
    let secret = provider
        .unwrap(&binding, &sealblk.wrapped_slot_secret.0)
        .map_err(|source| {
            if source.reason != KeyReason::Unauthentic {
                return BindingReason::Provider {
                    token: token.0,
                    source,
                };
            }
            let (provider, key_id) = (sealblk.provider.clone(), sealblk.key_id.clone());
            BindingReason::ForeignToken {
                token: token.0,
                uuid: locked.uuid(),
                provider,
                key_id,
            }
        })?;
    let passphrase = token::passphrase_of(&secret)?;
    let opened = locked.open_keyslot(keyslot, &passphrase, budget)?;
    opened.ok_or(BindingReason::TokenOpensNothing {
        token: token.0,
        keyslot: keyslot.0,
    })
}

/// Makes sure that the binding by which `opened` was unlocked will be there tomorrow: a KEK that is still in memory opens the
/// volume also when its provider has lost it.
///
/// # Errors
/// [`BindingReason::KekState`] if the provider does not have the KEK ready for use, or [`BindingReason::Kek`] if it cannot tell.
pub fn check_binding(
    locked: &Locked<'_>,
    opened: &Volume,
    providers: &dyn Providers,
) -> Result<(), BindingError> {
    let keyslot = Id(opened.keyslot());
    let tokens = locked.header().metadata().tokens.values();
    let bound = tokens
        .filter(|token| token.keyslots.contains(&keyslot))
        .filter_map(|token| SealblkToken::of(token)?.ok());
    for sealblk in bound {
        let state = providers
            .provider(&sealblk.provider)
            .and_then(|provider| provider.state(&sealblk.key_id))
            .map_err(|source| BindingReason::Kek(source).at(locked.path()))?;
        if state != KeyState::Active {
            return Err(BindingReason::KekState { state }.at(locked.path()));
        }
    }
    Ok(())
}
