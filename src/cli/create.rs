//! `sealblk create`: a volume, its keyslots, and the file that holds it.
//!
//! `create` claims an existing file or device before it writes to it, so a disk in use stays untouched. If it fails, it
//! removes the files that it made.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::failure::Failure;
use super::made::Made;
use super::recovery_key::RecoveryKey;
use super::secret::SecretSource;
use super::size::Size;
use super::volume_args::TakeOver;
use super::{Host, Keys, output, provider, stderr, text};
use crate::cipher::SectorSize;
use crate::keys::RequestPurpose;
use crate::keys::binding::{self, CreateOptions};
use crate::keys::{KeyProvider, Providers};
use crate::luks2::{Argon2Cost, Content, HeaderIo, Locked};
use crate::providers::registry::Backup;
use crate::storage::{Access, Backing, Claim, Kind};

const AFTER_HELP: &str = "\
Examples:
  sealblk create vm7.luks --size 20G --recovery-key vm7.key
  sealblk create /dev/vg0/vm8 --sector-size 4096 --provider kms
  sealblk create /dev/vg0/vm9 --header vm9.luks --recovery-key vm9.key

The volume is bound to a key provider: this host opens it without a passphrase.
Without a recovery key, nothing else opens it: if you lose the provider's keys, you
lose the data. So give --recovery-key, or back up the provider (`sealblk provider
backup`). If the host has no provider, sealblk stops; with --recovery-key it adds
a native provider instead, and says so. In scripts, give --provider: sealblk then
stops if the host has no provider of that name.

A recovery key opens the volume on any Linux, without sealblk:
  cryptsetup open --key-file vm7.key vm7.luks vm7
  cryptsetup open --header vm9.luks --key-file vm9.key /dev/vg0/vm9 vm9
If FILE does not exist, sealblk makes a key of 256 bits, writes it to FILE (mode
600), and says so: check the name that it prints. If FILE exists, its content is the
recovery key, if it is strong enough (`sealblk --help`). Do not keep the recovery
key on the same storage as the disk. If FILE is a passphrase with a newline at its
end, type it at cryptsetup's prompt: --key-file would use the newline, too.

With --header, back up that file too: without it, no key opens the disk.

sealblk does not wipe a block device. The guest sees noise there, but a reader of
the device can read its old data until the guest overwrites them. To remove old
data, run `blkdiscard` or overwrite the device before `sealblk create`; afterwards
that would destroy the disk.";

/// Make an encrypted disk
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Create {
    /// A file to make, or a block device
    disk: PathBuf,
    /// Capacity of the disk, as in 20G; its file takes 16M more [default for a device: all of it but 16M]
    #[arg(long)]
    size: Option<Size>,
    /// Key provider that opens the volume [default: the host's default provider, as `sealblk provider list` shows]
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// The encryption sector and the disk's block size, in bytes; some firmware cannot boot from 4096
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = ["512", "4096"])]
    sector_size: String,
    /// Add a recovery key: read it from FILE, or make it and write it to FILE if FILE does not exist
    #[arg(long, value_name = "FILE")]
    recovery_key: Option<SecretSource>,
    /// Accept a recovery key that is easy to guess
    #[arg(long, requires = "recovery_key")]
    weak: bool,
    /// Store the header in this file; DISK then holds only ciphertext
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// A label, also for /dev/disk/by-label
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    label: String,
    /// Make the disk even if DISK is not empty. You lose its content, but sealblk does not wipe it (see below)
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    take_over: TakeOver,
}

impl Create {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let sector_size = match self.sector_size.as_str() {
            "4096" => SectorSize::B4096,
            _ => SectorSize::B512,
        };
        let mut keys = host.keys_of(self.header.as_ref().unwrap_or(&self.disk), RequestPurpose::Create)?;
        let named = self
            .provider
            .as_deref()
            .map(|name| keys.provider(name))
            .transpose()?;

        let mut made = Made::default();
        let (disk, _claim) = self.claim(&self.disk, &mut made)?;
        if disk.kind() == Kind::File && self.size.is_none() {
            return Err(Failure::SizeNeeded { disk: self.disk });
        }
        let header = self
            .header
            .as_ref()
            .map(|path| self.claim(path, &mut made))
            .transpose()?;
        let (header, _header_claim) = header.unzip();
        let recovery_key = self
            .recovery_key
            .as_ref()
            .map(|source| RecoveryKey::read_or_make(source, self.weak))
            .transpose()?;
        made.extend(recovery_key.as_ref().and_then(|key| key.made.clone()));

        let provider = match named {
            Some(provider) => provider,
            None => default_provider(host, &mut keys, recovery_key.is_some())?,
        };
        let key_id = provider.create_kek()?;
        let (header_io, payload): (_, Option<&dyn HeaderIo>) = match &header {
            Some(header) => (header, Some(&disk)),
            None => (&disk, None),
        };
        let options = CreateOptions {
            capacity: self.size.map(|size| size.0),
            sector_size,
            label: &self.label,
            binding: Some((&*provider, &key_id)),
            recovery_key: recovery_key
                .as_ref()
                .map(|key| (key.key.first(), Argon2Cost::for_this_host())),
            overwrite: self.force,
        };
        binding::create(header_io, payload, &options)?;
        // Read back before anybody relies on it.
        let created = Locked::open(header_io, payload)?;
        made.keep();
        if let Keys::Own(registry, _) = &keys
            && recovery_key.is_none()
            && registry.backup(provider.name()) == Some(Backup::Waived)
        {
            stderr::note(&format!(
                "only the primary key of provider {:?} opens this disk, and it has no backup: run {}, or \
                 `sealblk recovery add`",
                provider.name(),
                provider::backup_command(host, provider.name())
            ));
        }

        let mut answer = format!(
            "Created {}: a disk of {}\n",
            text::shown(&self.disk),
            Size(created.capacity())
        );
        let mut tell = |what: &str, value: &str| answer.push_str(&format!("  {what:<13} {value}\n"));
        tell("volume", &created.uuid().to_string());
        tell("sector size", &self.sector_size);
        tell("key", &format!("provider {:?}, key {key_id}", provider.name()));
        match (
            &self.recovery_key,
            recovery_key.is_some_and(|key| key.made.is_some()),
        ) {
            (Some(place), true) => tell(
                "recovery key",
                &format!("written to {place}; keep it apart from the disk"),
            ),
            (Some(place), false) => tell("recovery key", &format!("read from {place}")),
            (None, _) => tell("recovery key", "none; `sealblk recovery add` adds one"),
        }
        output::print(&answer)
    }

    /// Opens a file or device and keeps everybody else from it. A file that does not exist is made.
    fn claim(&self, path: &Path, made: &mut Made) -> Result<(Backing, Claim), Failure> {
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
        {
            Ok(_) => made.extend([path.to_owned()]),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => {
                return Err(Failure::Make {
                    path: path.to_owned(),
                    source,
                });
            }
        }
        let (backing, claim) = Backing::claimed(path, Access::ReadWrite)?;
        if !self.force && occupied(&backing)? {
            return Err(Failure::Occupied {
                path: path.to_owned(),
                content: Content::of(&backing),
            });
        }
        self.take_over.check(&backing)?;
        Ok((backing, claim))
    }
}

/// The provider of volumes for which none is named. A host without one gets a native one, if the volume has a recovery key
/// too: the recovery key still opens it if the primary key is lost without a backup.
fn default_provider(
    host: &Host,
    keys: &mut Keys,
    recovery_key: bool,
) -> Result<Arc<dyn KeyProvider>, Failure> {
    if let Keys::Own(registry, _) = keys
        && recovery_key
        && registry.default_name()?.is_none()
    {
        provider::add_native(host, registry, "native", true, Backup::Waived)?;
    }
    let name = keys.default_name()?.ok_or(Failure::NoProvider)?;
    Ok(keys.provider(&name)?)
}

/// Whether there may be something to lose: any byte in a file; on a device, anything but zeros at either end, where
/// every partition table, file system, RAID and volume manager leaves its mark.
fn occupied(backing: &Backing) -> Result<bool, Failure> {
    const EDGE: u64 = 1 << 20;
    let len = backing.len()?;
    if backing.kind() == Kind::File {
        return Ok(len > 0);
    }
    let edge = EDGE.min(len);
    let mut bytes = vec![0; edge as usize];
    for offset in [0, len - edge] {
        // From the medium: another host may have made a volume there since this one looked last.
        HeaderIo::read_at(backing, &mut bytes, offset).map_err(|source| Failure::Look {
            path: backing.path().to_owned(),
            source,
        })?;
        if bytes.iter().any(|&byte| byte != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}
