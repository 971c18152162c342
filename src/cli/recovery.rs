//! `sealblk recovery`: keyslots that a recovery key opens, with or without sealblk.

use clap::{Args, Subcommand};

use super::failure::Failure;
use super::made::Made;
use super::recovery_key::RecoveryKey;
use super::secret::SecretSource;
use super::volume_args::{Unlock, VolumeArgs};
use super::{Host, output};
use crate::agent::Purpose;
use crate::storage::Access;
use crate::volume::{Argon2Cost, HeaderError, Reason};

const AFTER_HELP: &str = "\
Examples:
  sealblk recovery add vm7.luks --recovery-key vm7.key
  sealblk recovery test vm7.luks --recovery-key vm7.key
  sealblk recovery remove vm7.luks --recovery-key vm7.key

A recovery key opens the volume on any Linux, without sealblk:
  cryptsetup open --key-file vm7.key vm7.luks vm7
Given by hand, at cryptsetup's prompt, it works as well.

The volume must not be in use, except to test a key.";

/// Add, remove and test recovery keys
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Recovery {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Add a recovery key: made and written to a file, or read from it if it exists
    Add(Add),
    /// Remove a recovery key, once another way into the volume has been seen to work
    Remove(Remove),
    /// See whether a recovery key opens the volume
    Test(Test),
}

#[derive(Debug, Args)]
struct Add {
    #[command(flatten)]
    volume: VolumeArgs,
    /// Where the recovery key is, or shall be; '-', 'fd:N' and 'cred:NAME' are taken too
    #[arg(long, value_name = "FILE")]
    recovery_key: SecretSource,
    /// Take a recovery key that is easily guessed
    #[arg(long)]
    weak: bool,
    #[command(flatten)]
    unlock: Unlock,
}

#[derive(Debug, Args)]
struct Remove {
    #[command(flatten)]
    volume: VolumeArgs,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    unlock: Unlock,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The recovery key to remove
    #[arg(long, value_name = "FILE")]
    recovery_key: Option<SecretSource>,
    /// The keyslot of a recovery key that is lost; `sealblk info` lists them
    #[arg(long, value_name = "N")]
    keyslot: Option<u32>,
}

#[derive(Debug, Args)]
struct Test {
    #[command(flatten)]
    volume: VolumeArgs,
    /// Where the recovery key is; '-', 'fd:N' and 'cred:NAME' are taken too
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
        let files = self.volume.open(Access::ReadWrite)?;
        let mut locked = files.locked()?;
        let volume = self.unlock.open(&locked, || {
            host.keys_of(self.volume.header_path(), Purpose::Access)
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
        let added = locked.add_recovery_key(&volume, key.key.first(), Argon2Cost::for_this_host());
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
        let (disk, place) = (output::shown(&self.volume.disk), &self.recovery_key);
        output::print(&format!(
            "{disk}: the recovery key in {place} was {verb}, in keyslot {keyslot}\n"
        ))
    }
}

impl Remove {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let files = self.volume.open(Access::ReadWrite)?;
        let mut locked = files.locked()?;
        let key = match &self.which.recovery_key {
            Some(key) => Some(key.read_key()?),
            None => None,
        };
        let other = self.unlock.open_for_good(&locked, || {
            host.keys_of(self.volume.header_path(), Purpose::Access)
        })?;
        let mut keyslot = match (&key, self.which.keyslot) {
            (Some(key), _) => key.open(|form| locked.unlock_with_passphrase(form))?.keyslot(),
            (None, Some(keyslot)) => keyslot,
            (None, None) => unreachable!("one of the group is required"),
        };
        // A key that was added more than once has to go as often: who removes it fears that somebody has it.
        loop {
            locked.remove_recovery_key(keyslot, &other)?;
            let disk = output::shown(&self.volume.disk);
            output::print(&format!(
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
        let files = self.volume.open(Access::Inspect)?;
        let key = self.recovery_key.read_key()?;
        let locked = files.locked()?;
        let volume = key.open(|form| locked.unlock_with_passphrase(form))?;
        output::print(&format!(
            "{}: opens, by keyslot {}\n",
            output::shown(&self.volume.disk),
            volume.keyslot()
        ))
    }
}
