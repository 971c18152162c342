//! `sealblk recovery`: keyslots that a recovery key opens, with or without sealblk.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::failure::Failure;
use super::made::Made;
use super::recovery_key::RecoveryKey;
use super::secret::SecretSource;
use super::{Host, output};
use crate::storage::{Access, Backing};
use crate::volume::{Argon2Cost, Info, Locked, Purpose, Volume};

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

#[derive(Debug, Args)]
struct VolumeArgs {
    /// The disk's file or device
    disk: PathBuf,
    /// The file that holds the header, if it is detached
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Unlock {
    /// Open the volume with this recovery key or passphrase, instead of with its key provider
    #[arg(long, value_name = "FILE")]
    unlock_key: Option<SecretSource>,
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
        let volume = self.unlock.open(&locked, host)?;
        let key = RecoveryKey::read_or_make(&self.recovery_key)?;
        let verb = if key.made.is_some() {
            "made and added"
        } else {
            "added"
        };
        let mut made = Made::default();
        made.extend(key.made);
        let keyslot = locked.add_recovery_key(&volume, &key.passphrase, Argon2Cost::for_this_host())?;
        made.keep();
        let (disk, place) = (self.volume.disk.display(), &self.recovery_key);
        output::print(&format!(
            "{disk}: the recovery key in {place} was {verb}, in keyslot {keyslot}\n"
        ))
    }
}

impl Remove {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let files = self.volume.open(Access::ReadWrite)?;
        let mut locked = files.locked()?;
        let keyslot = match (&self.which.recovery_key, self.which.keyslot) {
            (Some(key), _) => locked.unlock_with_passphrase(&key.read_passphrase()?)?.keyslot(),
            (None, Some(keyslot)) => keyslot,
            (None, None) => unreachable!("one of the group is required"),
        };
        let slots = files.info()?.keyslots;
        if let Some(slot) = slots.iter().find(|slot| slot.keyslot == keyslot)
            && slot.purpose != Purpose::Passphrase
        {
            return Err(Failure::NoRecoveryKey { keyslot });
        }
        if self.unlock.open(&locked, host)?.keyslot() == keyslot {
            return Err(Failure::SameKey { keyslot });
        }
        locked.remove_keyslot(keyslot, false)?;
        let disk = self.volume.disk.display();
        output::print(&format!(
            "{disk}: the recovery key was removed from keyslot {keyslot}\n"
        ))
    }
}

impl Test {
    fn run(self) -> Result<(), Failure> {
        let files = self.volume.open(Access::Inspect)?;
        let volume = files
            .locked()?
            .unlock_with_passphrase(&self.recovery_key.read_passphrase()?)?;
        output::print(&format!(
            "{}: opens, by keyslot {}\n",
            self.volume.disk.display(),
            volume.keyslot()
        ))
    }
}

impl Unlock {
    fn open(&self, locked: &Locked<'_>, host: &Host) -> Result<Volume, Failure> {
        match &self.unlock_key {
            Some(key) => Ok(locked.unlock_with_passphrase(&key.read_passphrase()?)?),
            None => Ok(locked.unlock_with_provider(&host.registry()?)?),
        }
    }
}

impl VolumeArgs {
    fn open(&self, access: Access) -> Result<Files, Failure> {
        let header = self
            .header
            .as_ref()
            .map(|path| Backing::open(path, access))
            .transpose()?;
        Ok(Files {
            disk: Backing::open(&self.disk, access)?,
            header,
        })
    }
}

/// A volume's file or device, and its header's if that is detached.
struct Files {
    disk: Backing,
    header: Option<Backing>,
}

impl Files {
    fn locked(&self) -> Result<Locked<'_>, Failure> {
        Ok(match &self.header {
            Some(header) => Locked::open(header, Some(&self.disk))?,
            None => Locked::open(&self.disk, None)?,
        })
    }

    fn info(&self) -> Result<Info, Failure> {
        Ok(match &self.header {
            Some(header) => Info::read(header, Some(&self.disk))?,
            None => Info::read(&self.disk, None)?,
        })
    }
}
