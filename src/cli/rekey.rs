//! `sealblk rekey`: binds a volume to a new KEK. The volume key stays the same.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgGroup, Args};
use serde::Deserialize;
use serde_json::json;

use super::config::parse_age;
use super::failure::Failure;
use super::key::max_key_age;
use super::target::Target;
use super::volume_args::{TakeOver, Unlock, VolumeArgs};
use super::{Host, output, served, text};
use crate::keys::KeyId;
use crate::keys::RequestPurpose;
use crate::keys::binding::{self, Bindings, Rekeyed};
use crate::storage::StorageError;

const AFTER_HELP: &str = "\
Examples:
  sealblk rekey vm7.luks
  sealblk rekey vm7.luks --provider kms
  sealblk rekey vm7.luks --unlock-key vm7.key
  sealblk rekey vm7                           # the disk with that name, served or not
  sealblk rekey --control-socket /run/vm7.control
  sealblk rekey --if-due /srv/vms/*.luks      # from a timer, for disks at rest
  sealblk rekey --if-due --control-socket /run/vm7.control    # and for each served one

sealblk adds the new key to the header, opens the volume with it, and then removes
the old key from the header. If it is interrupted, at least one of the two keys
opens the volume, and the next rekey continues. Recovery keys stay as they are. Use
--unlock-key with a recovery key if the volume's provider is gone, or if the volume
has no provider.

The provider keeps the old key, and the old key still opens old copies of the
header. To prevent that, revoke it: rekey prints its ID for `sealblk key revoke`.
A backup from before the rekey then opens with a recovery key only. The volume key,
and a native provider's primary key, stay the same: rekey does not help against an
attacker who has one of these. In that case, make a new volume, with a new provider
if the primary key is known, copy the data into it, and erase the old volume.

`sealblk rekey DISK` refuses a disk that is being served (exit code 5): give its
name or its control socket instead. With several disks, sealblk continues after a failure; the
exit code is that of the last failure.";

/// Replace the provider's key that opens a volume; the volume key and the data stay unchanged
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(group = ArgGroup::new("target").required(true).args(["disks", "control_socket"]))]
pub(super) struct Rekey {
    /// The disk's file or device, or its name on this host (`sealblk define`); with --if-due, you can give several
    #[arg(value_name = "DISK|NAME")]
    disks: Vec<PathBuf>,
    /// The file that holds the header, if it is detached
    #[arg(long, value_name = "FILE", requires = "disks")]
    header: Option<PathBuf>,
    /// The control socket of `sealblk serve`, to rekey a disk that is being served; the guest does not notice
    #[arg(long, value_name = "SOCK", conflicts_with_all = ["header", "unlock_key", "take_over"])]
    control_socket: Option<PathBuf>,
    /// Key provider of the new key [default: the provider of the old key, else the host's default]
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// Rekey only if the key has reached its maximum age, or if its age is unknown
    #[arg(long)]
    if_due: bool,
    /// The maximum age of a key, as in 90d [default: the configuration's max-key-age]
    #[arg(long, value_name = "AGE", requires = "if_due", value_parser = parse_age)]
    max_age: Option<Duration>,
    #[command(flatten)]
    unlock: Unlock,
    #[command(flatten)]
    take_over: TakeOver,
}

impl Rekey {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let max_age = match self.if_due {
            true => Some(max_key_age(host, self.max_age)?),
            false => None,
        };
        if let Some(socket) = &self.control_socket {
            return self.served(socket, max_age);
        }
        if self.disks.len() > 1 && (max_age.is_none() || self.header.is_some() || self.take_over.is_given()) {
            return Err(Failure::OneDisk);
        }
        // One disk that fails keeps no other from its turn.
        let mut failed: Option<Failure> = None;
        for disk in &self.disks {
            let rekeyed = host
                .target(disk, self.header.as_deref())
                .and_then(|target| match target {
                    Target::AtRest(volume) => self.at_rest(host, &volume, max_age),
                    Target::Served(socket) => {
                        self.check_served()?;
                        self.served(&socket, max_age)
                    }
                });
            if let Err(failure) = rekeyed
                && let Some(earlier) = failed.replace(failure)
            {
                output::complain_with(&earlier, &earlier.list());
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Refuses options that are for a disk at rest.
    fn check_served(&self) -> Result<(), Failure> {
        let option = match (self.unlock.is_given(), self.take_over.is_given()) {
            (true, _) => "--unlock-key",
            (_, true) => "--take-over",
            _ => return Ok(()),
        };
        Err(Failure::NotWhileServed { option })
    }

    fn at_rest(&self, host: &Host, volume: &VolumeArgs, max_age: Option<Duration>) -> Result<(), Failure> {
        if let Some(max_age) = max_age {
            // This does not disturb a process that uses the disk.
            let files = volume.inspect()?;
            if !Bindings::of(files.locked()?.header()).are_older_than(max_age) {
                return tell_not_due(&volume.disk);
            }
        }
        let files = volume
            .open_to_change(&self.take_over)
            .map_err(|failure| match failure {
                Failure::Storage(StorageError::InUse { path }) => Failure::MayBeServed { path },
                other => other,
            })?;
        let mut locked = files.locked()?;
        let keys = || host.keys_of(volume.header_path(), RequestPurpose::Recrypt);
        let unlocked = self.unlock.open(&locked, keys)?;
        let keys = keys()?;
        let rekeyed = binding::rekey(&mut locked, &unlocked, &keys, &keys, self.provider.as_deref())?;
        tell(&volume.disk, &rekeyed)
    }

    /// Asks the process that serves the disk.
    fn served(&self, socket: &Path, max_age: Option<Duration>) -> Result<(), Failure> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Reply {
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
        let age = max_age.map(|age| age.as_secs());
        let parameters = json!({ "provider": self.provider, "ifOlderThan": age });
        let answer: Reply = match served::ask(socket, "Rekey", parameters) {
            Err(Failure::NotDue) => return tell_not_due(socket),
            answer => answer?,
        };
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

fn tell_not_due(disk: &Path) -> Result<(), Failure> {
    output::print(&format!(
        "{}: the key has not reached its maximum age\n",
        text::shown(disk)
    ))
}

fn tell(disk: &Path, rekeyed: &Rekeyed) -> Result<(), Failure> {
    let Rekeyed {
        provider,
        key_id,
        keyslot,
        replaced,
    } = rekeyed;
    let mut answer = format!("{}: rekeyed, in keyslot {keyslot}\n", text::shown(disk));
    answer.push_str(&format!("  opens now     provider {provider:?}, key {key_id}\n"));
    for (provider, key_id) in replaced {
        answer.push_str(&format!("  no longer     provider {provider:?}, key {key_id}\n"));
    }
    output::print(&answer)
}
