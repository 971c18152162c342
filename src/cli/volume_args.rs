//! Arguments of verbs that change the header of a volume at rest: the volume, and the key that opens it.

use std::fs::File;
use std::path::{Path, PathBuf};

use clap::Args;
use uuid::Uuid;

use super::Keys;
use super::failure::Failure;
use super::secret::SecretSource;
use crate::keys::binding;
use crate::luks2::{self, HeaderIo, Holding, Locked, Terms, Volume};
use crate::storage::{Access, Backing, Claim, ThisHost};

#[derive(Debug, Args)]
pub(super) struct VolumeArgs {
    /// The disk's file or device
    pub(super) disk: PathBuf,
    /// The file that holds the header, if it is detached
    #[arg(long, value_name = "FILE", requires = "disk")]
    header: Option<PathBuf>,
}

impl VolumeArgs {
    pub(super) fn new(disk: PathBuf, header: Option<PathBuf>) -> Self {
        Self { disk, header }
    }

    /// What holds the header.
    pub(super) fn header_path(&self) -> &Path {
        self.header.as_ref().unwrap_or(&self.disk)
    }

    /// Opens the header to look at it, whoever has it attached.
    pub(super) fn inspect(&self) -> Result<Files, Failure> {
        self.open_parts(Access::Inspect, Access::Inspect)
    }

    /// Opens the header to change it, and claims it. If it is detached, the verb does not write to the payload. One that is a copy of the
    /// disk's own is not to be changed: the disk would open as before.
    pub(super) fn open_to_change(&self, take_over: &TakeOver) -> Result<Files, Failure> {
        let files = self.open_parts(Access::ReadWrite, Access::ReadOnly)?;
        take_over.check(files.parts().0)?;
        Ok(files)
    }

    /// The same, for a verb that also writes to a payload whose header is detached.
    pub(super) fn open_to_resize(&self, take_over: &TakeOver) -> Result<Files, Failure> {
        let files = self.open_parts(Access::ReadWrite, Access::ReadWrite)?;
        take_over.check(files.parts().0)?;
        Ok(files)
    }

    fn open_parts(&self, access: Access, payload: Access) -> Result<Files, Failure> {
        let Some(header) = &self.header else {
            let (disk, claim) = open(&self.disk, access)?;
            return Ok(Files {
                disk,
                header: None,
                _claims: [claim, None],
            });
        };
        let (header, header_claim) = open(header, access)?;
        let (disk, claim) = open(&self.disk, payload)?;
        if access == Access::ReadWrite {
            let volume = |backing| luks2::read(backing).ok().map(|found| found.header().uuid());
            if volume(&disk).is_some_and(|own| volume(&header) == Some(own)) {
                return Err(Failure::OwnHeader {
                    disk: self.disk.clone(),
                    header: self.header_path().to_owned(),
                });
            }
        }
        Ok(Files {
            header: Some(header),
            disk,
            _claims: [claim, header_claim],
        })
    }
}

fn open(path: &Path, access: Access) -> Result<(Backing, Option<Claim>), Failure> {
    let backing = Backing::open(path, access)?;
    let claim = match access {
        Access::Inspect => None,
        Access::ReadOnly | Access::ReadWrite => Some(backing.claim()?),
    };
    Ok((backing, claim))
}

/// A volume's file or device, and its header's if that is detached.
pub(super) struct Files {
    disk: Backing,
    header: Option<Backing>,
    _claims: [Option<Claim>; 2],
}

impl Files {
    /// What holds the header, and the payload if that is elsewhere.
    pub(super) fn parts(&self) -> (&Backing, Option<&dyn HeaderIo>) {
        match &self.header {
            Some(header) => (header, Some(&self.disk)),
            None => (&self.disk, None),
        }
    }

    /// Every file.
    pub(super) fn all(&self) -> impl Iterator<Item = &File> {
        std::iter::once(&self.disk).chain(&self.header).map(Backing::file)
    }

    pub(super) fn locked(&self) -> Result<Locked<'_>, Failure> {
        let (header, payload) = self.parts();
        Ok(Locked::open(header, payload)?)
    }
}

#[derive(Debug, Default, Args)]
pub(super) struct TakeOver {
    /// Change the volume although another host has it attached, by attachment N, as the refusal said. Do this only if that host cannot
    /// write to the storage any more
    #[arg(long, value_name = "N")]
    take_over: Option<u64>,
}

impl TakeOver {
    /// Whether one is given: it is for one volume.
    pub(super) fn is_given(&self) -> bool {
        self.take_over.is_some()
    }

    /// Checks that no other host has the volume attached. A header that cannot be read says nothing; the verb finds that out itself.
    pub(super) fn check(&self, header: &Backing) -> Result<(), Failure> {
        let Ok(found) = luks2::read(header) else {
            return Ok(());
        };
        let terms = Terms {
            host: &ThisHost::find().host,
            process: Uuid::new_v4(),
            take_over: self.take_over,
            ran: None,
            goes_on: false,
        };
        let checked = Holding::of(found.header().metadata()).check(&terms);
        checked.map_err(|reason| Failure::from(reason.at(header.path())))
    }
}

#[derive(Debug, Args)]
pub(super) struct Unlock {
    /// Open the volume with this recovery key or passphrase, instead of with its key provider
    #[arg(long, value_name = "FILE")]
    unlock_key: Option<SecretSource>,
}

impl Unlock {
    /// Whether one is given: it is for a volume at rest.
    pub(super) fn is_given(&self) -> bool {
        self.unlock_key.is_some()
    }

    pub(super) fn open(
        &self,
        locked: &Locked<'_>,
        keys: impl FnOnce() -> Result<Keys, Failure>,
    ) -> Result<Volume, Failure> {
        match &self.unlock_key {
            Some(key) => Ok(key.read_key()?.open(|form| locked.unlock_with_passphrase(form))?),
            None => Ok(binding::unlock(locked, &keys()?)?),
        }
    }

    /// The same, by something that will still open it tomorrow: not only by a KEK that is in some memory.
    pub(super) fn open_for_good(
        &self,
        locked: &Locked<'_>,
        keys: impl FnOnce() -> Result<Keys, Failure>,
    ) -> Result<Volume, Failure> {
        if self.unlock_key.is_some() {
            return self.open(locked, keys);
        }
        let keys = keys()?;
        let volume = binding::unlock(locked, &keys)?;
        binding::check_binding(locked, &volume, &keys)?;
        Ok(volume)
    }
}
