//! A keyslot and its token, for a KEK.

use tracing::warn;

use super::error::BindingReason;
use super::token::{self, SLOT_SECRET_LEN, SealblkToken};
use crate::{Binding, KeyProvider};
use sealblk_base::timestamp::Timestamp;
use sealblk_luks2::metadata::Base64;
use sealblk_luks2::{HeaderError, NewKeyslot, Reason};
use sealblk_secmem::arena::SecretBytes;

/// A binding that a provider has wrapped something for. The provider is told what becomes of it: nothing, unless a commit of
/// the header was tried.
#[derive(Debug)]
pub(super) struct Announced<'p> {
    provider: &'p dyn KeyProvider,
    binding: Binding<'p>,
    became: Option<bool>,
}

impl Announced<'_> {
    /// Settles it by the writing of the header that has it. A header that failed to be written may be in force all the same.
    pub(super) fn settle<T>(mut self, written: Result<T, Reason>) -> Result<T, Reason> {
        self.became = match &written {
            Ok(_) => Some(true),
            Err(Reason::Header(HeaderError::Write { .. })) => None,
            Err(_) => Some(false),
        };
        written
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
) -> Result<(NewKeyslot, SealblkToken, Announced<'p>), BindingReason> {
    let secret = SecretBytes::random(SLOT_SECRET_LEN)?;
    let wrapped = provider.wrap(binding, &secret).map_err(BindingReason::Wrap)?;
    let announced = Announced {
        provider,
        binding: *binding,
        became: Some(false),
    };
    let passphrase = token::passphrase_of(&secret)?;
    let new = NewKeyslot::for_random_secret(key, &passphrase).map_err(Reason::NewKeyslot)?;
    let token = SealblkToken {
        provider: binding.provider.to_owned(),
        key_id: binding.key_id.clone(),
        wrapped_slot_secret: Base64(wrapped),
        replaces: Vec::new(),
        bound: Some(Timestamp::now()),
    };
    Ok((new, token, announced))
}
