//! `sealblk rekey`: a new KEK for a volume, which keeps its volume key.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use serde::Deserialize;
use serde_json::json;

use super::failure::Failure;
use super::volume_args::{Unlock, VolumeArgs};
use super::{Host, output, served};
use crate::agent::Purpose;
use crate::keys::KeyId;
use crate::storage::Access;
use crate::volume::Rekeyed;

const AFTER_HELP: &str = "\
Examples:
  sealblk rekey vm7.luks
  sealblk rekey vm7.luks --provider kms
  sealblk rekey vm7.luks --unlock-key vm7.key
  sealblk rekey --control-socket /run/vm7.control

The new key is added and seen to open the volume before the old one is removed;
interrupted, the volume opens with one of them, and the next rekey goes on.
Recovery keys stay as they are. With a recovery key, a volume whose provider is
gone, or that was never bound to one, gets a new one.

The data stay encrypted under the same volume key: copies of the header from
before still open with the old key.";

/// Give a volume a new key of its provider, or of another one; its data stay as they are
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(group = ArgGroup::new("target").required(true).args(["disk", "control_socket"]))]
pub(super) struct Rekey {
    #[command(flatten)]
    volume: Option<VolumeArgs>,
    /// The control socket of `sealblk serve`, for a disk that is being served: the guest does not notice
    #[arg(long, value_name = "SOCK", conflicts_with_all = ["header", "unlock_key"])]
    control_socket: Option<PathBuf>,
    /// Key provider of the new key [default: that of the old one; without one, the host's]
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    #[command(flatten)]
    unlock: Unlock,
}

impl Rekey {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let Some(volume) = &self.volume else {
            return self.served();
        };
        let files = volume.open(Access::ReadWrite)?;
        let mut locked = files.locked()?;
        let keys = || host.keys_of(volume.header_path(), Purpose::Recrypt);
        let unlocked = self.unlock.open(&locked, keys)?;
        let rekeyed = locked.rekey_to(&unlocked, &keys()?, self.provider.as_deref())?;
        tell(&volume.disk, &rekeyed)
    }

    /// Asks the process that serves the disk.
    fn served(&self) -> Result<(), Failure> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Answer {
            provider: String,
            key_id: KeyId,
            keyslot: u32,
            replaced: Vec<Replaced>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Replaced {
            provider: String,
            key_id: KeyId,
        }
        let socket = self
            .control_socket
            .as_deref()
            .expect("clap asks for a disk or its socket");
        let answer: Answer = served::ask(socket, "Rekey", json!({ "provider": self.provider }))?;
        let replaced = answer.replaced.into_iter();
        let rekeyed = Rekeyed {
            provider: answer.provider,
            key_id: answer.key_id,
            keyslot: answer.keyslot,
            replaced: replaced.map(|old| (old.provider, old.key_id)).collect(),
        };
        tell(socket, &rekeyed)
    }
}

fn tell(disk: &Path, rekeyed: &Rekeyed) -> Result<(), Failure> {
    let Rekeyed {
        provider,
        key_id,
        keyslot,
        replaced,
    } = rekeyed;
    let mut answer = format!("{}: rekeyed, in keyslot {keyslot}\n", disk.display());
    answer.push_str(&format!("  opens now     provider {provider:?}, key {key_id}\n"));
    for (provider, key_id) in replaced {
        answer.push_str(&format!("  no more       provider {provider:?}, key {key_id}\n"));
    }
    output::print(&answer)
}
