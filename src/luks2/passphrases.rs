//! Keyslots that a person's passphrase opens: one is added, one is removed.

use sealblk_secmem::arena::SecretBytes;

use crate::error::{Reason, VolumeError};
use crate::kdf::Argon2Cost;
use crate::keyslot::NewKeyslot;
use crate::locked::{Locked, Volume, keyslots_of_segments};
use crate::metadata::Id;
use crate::update::free_keyslot;

impl Locked<'_> {
    /// Adds a keyslot for `passphrase`, and gives its number. `volume` is this volume, unlocked.
    ///
    /// # Errors
    /// Where there is no room, or the header cannot be written; it is as it was then.
    pub fn add_passphrase(
        &mut self,
        volume: &Volume,
        passphrase: &SecretBytes,
        cost: Argon2Cost,
    ) -> Result<u32, VolumeError> {
        let mut add = || {
            let new =
                NewKeyslot::for_passphrase(volume.key(), passphrase, cost).map_err(Reason::NewKeyslot)?;
            let mut update = self.update()?;
            let keyslot = free_keyslot(update.metadata())?;
            update.add_keyslot(keyslot, new)?;
            update.commit(self)?;
            Ok(keyslot.0)
        };
        add().map_err(|reason| self.failed(reason))
    }

    /// Removes a keyslot that a passphrase opens and no token, and its material: no copy of the header opens with the passphrase
    /// any more. `other` is this volume, unlocked in another way, which so is known to work.
    ///
    /// # Errors
    /// Where the keyslot is none of a passphrase, opened `other`, or is not what it was when this header was read.
    /// After [`Reason::Entry`] the keyslot opens nothing any more, and is only listed.
    pub fn remove_passphrase(&mut self, keyslot: u32, other: &Volume) -> Result<(), VolumeError> {
        let mut remove = || {
            let mut update = self.update()?;
            let (id, metadata) = (Id(keyslot), update.metadata());
            if !metadata.keyslots.contains_key(&id) {
                return Err(Reason::NoSuchKeyslot { keyslot });
            }
            // The caller meant the keyslots that he saw, and tried: not others that have their numbers by now.
            let seen = &self.header.metadata.keyslots;
            if [id, Id(other.keyslot())]
                .iter()
                .any(|id| seen.get(id) != metadata.keyslots.get(id))
            {
                return Err(Reason::ChangedMeanwhile);
            }
            let has_token = metadata.tokens.values().any(|token| token.keyslots.contains(&id));
            if has_token || !keyslots_of_segments(metadata).any(|(bound, _)| bound == id) {
                return Err(Reason::NoRecoveryKey { keyslot });
            }
            if other.keyslot() == keyslot {
                return Err(Reason::SameKey { keyslot });
            }
            update.remove_keyslot(id)?;
            update.commit(self)
        };
        remove().map_err(|reason| self.failed(reason))
    }
}
