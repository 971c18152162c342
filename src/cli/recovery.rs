//! `sealblk recovery`: keyslots for recovery keys, which open a volume with or without sealblk.

use clap::{Args, Subcommand};

use super::failure::Failure;
use super::made::Made;
use super::recovery_key::RecoveryKey;
use super::secret::SecretSource;
use super::volume_args::{TakeOver, Unlock, VolumeArgs};
use super::{Host, output, text};
use crate::keys::RequestPurpose;
use crate::luks2::{Argon2Cost, HeaderError, Reason};

const AFTER_HELP: &str = "\
Examples:
  sealblk recovery add vm7.luks --recovery-key vm7.key
  sealblk recovery test vm7.luks --recovery-key vm7.key
  sealblk recovery remove vm7.luks --recovery-key vm7.key

A recovery key opens the volume on any Linux, without sealblk:
  cryptsetup open --key-file vm7.key vm7.luks vm7
You can also type it at cryptsetup's prompt.

The volume must not be in use for `add` and `remove`; `test` works on a disk in use.";

/// Add, remove and test recovery keys
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Recovery {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Add a recovery key: read it from a file, or make it and write it to the file if it does not exist
    Add(Add),
    /// Remove a recovery key, after the volume was opened without it
    Remove(Remove),
    /// Check whether a recovery key opens the volume
    Test(Test),
}

#[derive(Debug, Args)]
struct Add {
    #[command(flatten)]
    volume: VolumeArgs,
    /// The file of the recovery key, made if it does not exist; or '-', 'fd:N', 'cred:NAME'
    #[arg(long, value_name = "FILE")]
    recovery_key: SecretSource,
    /// Accept a recovery key that is easy to guess
    #[arg(long)]
    weak: bool,
    #[command(flatten)]
    unlock: Unlock,
    #[command(flatten)]
    take_over: TakeOver,
}

#[derive(Debug, Args)]
struct Remove {
    #[command(flatten)]
    volume: VolumeArgs,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    unlock: Unlock,
    #[command(flatten)]
    take_over: TakeOver,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The recovery key to remove
    #[arg(long, value_name = "FILE")]
    recovery_key: Option<SecretSource>,
    /// The keyslot of a lost recovery key; `sealblk info` lists the keyslots
    #[arg(long, value_name = "N")]
    keyslot: Option<u32>,
}

#[derive(Debug, Args)]
struct Test {
    #[command(flatten)]
    volume: VolumeArgs,
    /// The file of the recovery key; or '-', 'fd:N', 'cred:NAME'
    #[arg(long, value_name = "FILE")]
    recovery_key: SecretSource,
}

impl Recovery {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        match self.verb {
            Verb::Add(add) => add.run(host),
            Verb::Remove(remove) => remove.run(host),
            Verb::Test(test) => test.run(),
        }
    }
}

impl Add {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let files = self.volume.open_to_change(&self.take_over)?;
        let mut locked = files.locked()?;
        let volume = self.unlock.open(&locked, || {
            host.keys_of(self.volume.header_path(), RequestPurpose::Access)
        })?;
        let key = RecoveryKey::read_or_make(&self.recovery_key, self.weak)?;
        if key.made.is_none()
            && let Ok(volume) = key.key.open(|form| locked.unlock_with_passphrase(form))
        {
            let keyslot = volume.keyslot();
            return Err(Failure::OpensAlready { keyslot });
        }
        let verb = if key.made.is_some() {
            "made and added"
        } else {
            "added"
        };
        let mut made = Made::default();
        made.extend(key.made);
        let added = locked.add_passphrase(&volume, key.key.first(), Argon2Cost::for_this_host());
        let keyslot = match added {
            Ok(keyslot) => keyslot,
            Err(error) => {
                // A write that failed may have come through nevertheless: a key that may open the volume stays.
                if matches!(*error.reason, Reason::Header(HeaderError::Write { .. })) {
                    made.keep();
                }
                return Err(error.into());
            }
        };
        made.keep();
        let (disk, place) = (text::shown(&self.volume.disk), &self.recovery_key);
        output::print(&format!(
            "{disk}: the recovery key in {place} was {verb}, in keyslot {keyslot}\n"
        ))
    }
}

impl Remove {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let files = self.volume.open_to_change(&self.take_over)?;
        let mut locked = files.locked()?;
        let key = match &self.which.recovery_key {
            Some(key) => Some(key.read_key()?),
            None => None,
        };
        let other = self.unlock.open_for_good(&locked, || {
            host.keys_of(self.volume.header_path(), RequestPurpose::Access)
        })?;
        let mut keyslot = match (&key, self.which.keyslot) {
            (Some(key), _) => key.open(|form| locked.unlock_with_passphrase(form))?.keyslot(),
            (None, Some(keyslot)) => keyslot,
            (None, None) => unreachable!("one of the group is required"),
        };
        // A key that was added more than once is removed from each keyslot: an operator removes it because it may be stolen.
        loop {
            locked.remove_passphrase(keyslot, &other)?;
            let disk = text::shown(&self.volume.disk);
            output::print::<Failure>(&format!(
                "{disk}: the recovery key was removed from keyslot {keyslot}\n"
            ))?;
            let Some(key) = &key else { return Ok(()) };
            keyslot = match key.open(|form| locked.unlock_with_passphrase(form)) {
                Ok(again) => again.keyslot(),
                Err(error) => match &*error.reason {
                    Reason::NoKeyslots => return Ok(()),
                    Reason::WrongPassphrase { untried } if untried.is_empty() => return Ok(()),
                    _ => return Err(error.into()),
                },
            };
        }
    }
}

impl Test {
    fn run(self) -> Result<(), Failure> {
        let files = self.volume.inspect()?;
        let key = self.recovery_key.read_key()?;
        let locked = files.locked()?;
        let volume = key.open(|form| locked.unlock_with_passphrase(form))?;
        output::print(&format!(
            "{}: the recovery key opens keyslot {}\n",
            text::shown(&self.volume.disk),
            volume.keyslot()
        ))
    }
}
