//! `sealblk rekey`: a new KEK for a volume, which keeps its volume key.

use clap::Args;

use super::failure::Failure;
use super::volume_args::{Unlock, VolumeArgs};
use super::{Host, output};
use crate::agent::Purpose;
use crate::keys::Providers;
use crate::storage::Access;
use crate::volume::Rekeyed;

const AFTER_HELP: &str = "\
Examples:
  sealblk rekey vm7.luks
  sealblk rekey vm7.luks --provider kms
  sealblk rekey vm7.luks --unlock-key vm7.key

The new key is added and seen to open the volume before the old one is removed;
interrupted, the volume opens with one of them, and the next rekey goes on.
Recovery keys stay as they are. With a recovery key, a volume whose provider is
gone, or that was never bound to one, gets a new one.

The data stay encrypted under the same volume key: copies of the header from
before still open with the old key.";

/// Give a volume a new key of its provider, or of another one; its data stay as they are
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Rekey {
    #[command(flatten)]
    volume: VolumeArgs,
    /// Key provider of the new key [default: that of the old one; without one, the host's]
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    #[command(flatten)]
    unlock: Unlock,
}

impl Rekey {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let files = self.volume.open(Access::ReadWrite)?;
        let mut locked = files.locked()?;
        let keys = || host.keys(Purpose::Recrypt);
        let volume = self.unlock.open(&locked, keys)?;
        let keys = keys()?;
        if let Some(finished) = locked.finish_rekey(&volume, &keys)? {
            self.tell("an interrupted rekey was finished", &finished)?;
            if self
                .provider
                .as_ref()
                .is_none_or(|name| *name == finished.provider)
            {
                return Ok(());
            }
        }
        let name = match &self.provider {
            Some(name) => name.clone(),
            None => match locked.bound_to() {
                Some(name) => name,
                None => keys.default_name()?.ok_or(Failure::NoProvider)?,
            },
        };
        let rekeyed = locked.rekey(&volume, &keys, &name)?;
        self.tell("rekeyed", &rekeyed)
    }

    fn tell(&self, what: &str, rekeyed: &Rekeyed) -> Result<(), Failure> {
        let Rekeyed {
            provider,
            key_id,
            keyslot,
            replaced,
        } = rekeyed;
        let disk = self.volume.disk.display();
        let mut answer = format!("{disk}: {what}, in keyslot {keyslot}\n");
        answer.push_str(&format!("  opens now     provider {provider:?}, key {key_id}\n"));
        for (provider, key_id) in replaced {
            answer.push_str(&format!("  no more       provider {provider:?}, key {key_id}\n"));
        }
        output::print(&answer)
    }
}
