//! Making a volume that is bound to a KEK.

use uuid::Uuid;

use super::error::{BindingError, BindingReason};
use super::new::bound_keyslot;
use crate::{Binding, KeyId, KeyProvider};
use sealblk_base::sector::SectorSize;
use sealblk_luks2::{Argon2Cost, HeaderIo, NewKeyslot, NewVolume, Options, Reason};
use sealblk_secmem::arena::SecretBytes;

/// What a new volume shall be.
#[derive(Debug)]
pub struct CreateOptions<'a> {
    /// Length of the disk in bytes. None: as much as the file or device has room for.
    pub capacity: Option<u64>,
    /// The unit of encryption, and of the guest's I/O.
    pub sector_size: SectorSize,
    /// A name of up to 47 bytes, for people and for `/dev/disk/by-label`.
    pub label: &'a str,
    /// The KEK to bind the volume to.
    pub binding: Option<(&'a dyn KeyProvider, &'a KeyId)>,
    /// The recovery key, and what it shall cost to try one.
    pub recovery_key: Option<(&'a SecretBytes, Argon2Cost)>,
    /// Whether a LUKS volume may be destroyed. Data of any other kind are destroyed in any case. Files are emptied
    /// then: nothing of what was there may shine through where the guest has not written yet.
    pub overwrite: bool,
}

/// Makes a volume of what `header` holds, or with `payload`, of the two: then the header is detached, and the
/// payload is the disk from its first byte. Files grow as needed. Gives its UUID.
///
/// # Errors
/// Nothing is changed when the options are not possible, the provider refuses, or there is a LUKS volume that may
/// not be overwritten. When writing fails, what is left is not a volume.
pub fn create(
    header: &dyn HeaderIo,
    payload: Option<&dyn HeaderIo>,
    options: &CreateOptions<'_>,
) -> Result<Uuid, BindingError> {
    create_volume(header, payload, options).map_err(|reason| reason.at(header.path()))
}

fn create_volume(
    header: &dyn HeaderIo,
    payload: Option<&dyn HeaderIo>,
    options: &CreateOptions<'_>,
) -> Result<Uuid, BindingReason> {
    let what = Options {
        capacity: options.capacity,
        sector_size: options.sector_size,
        label: options.label,
        overwrite: options.overwrite,
    };
    let mut new = NewVolume::plan(header, payload, &what)?;
    let mut announced = None;
    if let Some((provider, key_id)) = options.binding {
        let keyslot = new.next_keyslot();
        let binding = Binding {
            volume: new.uuid(),
            provider: provider.name(),
            key_id,
            keyslot: keyslot.0,
        };
        let (slot, token, binding) = bound_keyslot(new.key(), provider, &binding)?;
        announced = Some(binding);
        new.add_token(token.into_token(keyslot))?;
        new.add_keyslot(slot);
    }
    if let Some((passphrase, cost)) = options.recovery_key {
        let slot = NewKeyslot::for_passphrase(new.key(), passphrase, cost).map_err(Reason::NewKeyslot)?;
        new.add_keyslot(slot);
    }
    let written = new.write();
    Ok(match announced {
        Some(announced) => announced.settle(written)?,
        None => written?,
    })
}
