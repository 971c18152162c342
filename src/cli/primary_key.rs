//! `sealblk provider backup`, `restore` and `seal`: back up, restore and seal the primary key of a native provider.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use sha2::{Digest, Sha256};

use super::failure::Failure;
use super::made::Made;
use super::secret::{SecretError, SecretSource};
use super::{Host, output, stderr, strength, text};
use crate::luks2::{Argon2Cost, key_backup};
use crate::providers::PRIMARY_LEN;
use crate::providers::registry::Backup as Taken;
use crate::storage::{Access, Backing};
use crate::tpm::pcr::Selection;
use crate::tpm::{DEFAULT_DEVICE, Device};
use sealblk_secmem::private_file;
use sealblk_secmem::{arena::SecretBytes, arena::on_wiped_stack};

const BACKUP_HELP: &str = "\
Examples:
  sealblk provider backup native --to native.backup --passphrase-file pass
  sealblk provider backup native --waive

The backup is a LUKS2 header under argon2id that holds the primary key. It counts
only after sealblk has read it back and opened it with the passphrase. You need only
one backup: sealblk derives all later keys from the same primary key. cryptsetup can
open the backup, too:
  cryptsetup luksDump --dump-volume-key --volume-key-file out native.backup
writes 64 bytes; the first 32 are the primary key.";

const RESTORE_HELP: &str = "\
Example:
  sealblk provider restore native.backup --passphrase-file pass

This host then opens the disks of the host on which the backup was taken.";

const SEAL_HELP: &str = "\
Examples:
  sealblk provider seal native
  sealblk provider seal native --tpm-pcrs 0,4,7
  sealblk provider seal native --from native.backup --passphrase-file pass

The TPM releases the sealed key only while its registers (PCRs) hold their current
values. So the provider's file opens no disk on another host, or on this host if it
booted other software. After a change of firmware or boot loader the TPM refuses,
and the disks are locked until you seal the key again from its backup (--from).
Take a backup first: if the TPM breaks or is cleared, the sealed key is lost.";

#[derive(Debug, Args)]
#[command(after_help = BACKUP_HELP)]
#[command(group = ArgGroup::new("how").required(true).args(["to", "waive"]))]
pub(super) struct Backup {
    /// The provider
    name: String,
    /// The backup file to make
    #[arg(long, value_name = "FILE", requires = "passphrase_file")]
    to: Option<PathBuf>,
    /// The passphrase for the backup
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME", requires = "to")]
    passphrase_file: Option<SecretSource>,
    /// Accept a passphrase that is easy to guess
    #[arg(long, requires = "passphrase_file")]
    weak: bool,
    /// Do without a backup: new volumes get keys of the provider, and are lost if its file is lost
    #[arg(long)]
    waive: bool,
}

#[derive(Debug, Args)]
#[command(after_help = RESTORE_HELP)]
pub(super) struct Restore {
    /// The backup
    file: PathBuf,
    /// The passphrase of the backup
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME")]
    passphrase_file: SecretSource,
    /// The name of the provider [default: the name in the backup; volumes find their provider by this name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Make it the default provider of new volumes; the first provider is always the default
    #[arg(long)]
    default: bool,
}

#[derive(Debug, Args)]
#[command(after_help = SEAL_HELP)]
pub(super) struct Seal {
    /// The provider
    name: String,
    /// The TPM: a device, or swtpm:path=SOCKET
    #[arg(long, value_name = "DEVICE", default_value = DEFAULT_DEVICE)]
    tpm: Device,
    /// The registers of the SHA-256 bank that the key is bound to
    #[arg(long, value_name = "N[,N...]", default_value_t)]
    tpm_pcrs: Selection,
    /// The backup, if the TPM no longer releases the key
    #[arg(long, value_name = "FILE", requires = "passphrase_file")]
    from: Option<PathBuf>,
    /// The passphrase of the backup
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME", requires = "from")]
    passphrase_file: Option<SecretSource>,
}

impl Backup {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let mut registry = host.registry()?;
        let (Some(path), Some(source)) = (&self.to, &self.passphrase_file) else {
            return Ok(registry.set_backup(&self.name, Taken::Waived)?);
        };
        let primary = registry.export(&self.name)?;
        let key = source.read_key()?;
        let passphrase = key.first();
        strength::demand(passphrase, source, self.weak)?;
        let mut made = Made::default();
        private_file::create(path, &[]).map_err(|source| Failure::Make {
            path: path.clone(),
            source,
        })?;
        made.extend([path.clone()]);
        let (file, _claim) = Backing::claimed(path, Access::ReadWrite)?;
        let checked = with_check(&primary)?;
        let about = [("provider", self.name.as_str())];
        key_backup::write(
            &file,
            &checked,
            passphrase,
            Argon2Cost::for_this_host(),
            BACKUP,
            &about,
        )?;
        // It counts once it was restored.
        let contents = key_backup::read(&file, passphrase, BACKUP)?;
        if !contents.key.ct_eq(&checked) {
            return Err(Failure::Backup {
                path: path.clone(),
                what: "read back from storage, the backup holds another key; check the storage",
            });
        }
        made.keep();
        registry.was_backed_up(&self.name, &primary)?;
        output::print(&format!(
            "{}: the backup of the primary key of {:?}, read back and checked; store it and its passphrase in different places, \
             apart from the disks\n",
            text::shown(path),
            self.name
        ))
    }
}

impl Restore {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let mut registry = host.registry()?;
        let (primary, known) = open(&self.file, &self.passphrase_file)?;
        let Some(name) = self.name.or_else(|| known.clone()) else {
            return Err(Failure::Backup {
                path: self.file,
                what: "it does not contain the provider's name; give one with --name",
            });
        };
        registry.import(&name, &primary, self.default)?;
        if let Some(known) = known.filter(|known| *known != name) {
            stderr::note(&format!(
                "volumes that are bound to provider {known:?} do not find it under the name {name:?}: restore the backup as {known:?} \
                 into another state directory, and serve them with it (`--state-dir DIR`); or bind them to this provider by \
                 their recovery keys (`sealblk rekey DISK --provider {name} --unlock-key FILE`)"
            ));
        }
        output::print(&format!("key provider {name:?} was restored\n"))
    }
}

impl Seal {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let registry = host.registry()?;
        let backup = match (&self.from, &self.passphrase_file) {
            (Some(file), Some(passphrase)) => Some(open(file, passphrase)?.0),
            _ => None,
        };
        registry.seal(&self.name, backup.as_ref(), &self.tpm, self.tpm_pcrs)?;
        output::print(&format!(
            "the primary key of {:?} is sealed to the TPM at {}, registers {}\n",
            self.name, self.tpm, self.tpm_pcrs
        ))
    }
}

/// The primary key in a backup, and the name of its provider.
fn open(file: &Path, passphrase: &SecretSource) -> Result<(SecretBytes, Option<String>), Failure> {
    let backing = Backing::open(file, Access::Inspect)?;
    let key = passphrase.read_key()?;
    let contents = key.open(|form| key_backup::read(&backing, form, BACKUP))?;
    let mut primary = SecretBytes::zeroed(PRIMARY_LEN).map_err(SecretError::from)?;
    primary.copy_from_slice(&contents.key[..PRIMARY_LEN]);
    if !with_check(&primary)?.ct_eq(&contents.key) {
        return Err(Failure::Backup {
            path: file.to_owned(),
            what: "it holds no primary key; was it made by sealblk?",
        });
    }
    let mut about = contents.about.into_iter();
    let provider = about.find(|(name, _)| name == "provider");
    Ok((primary, provider.map(|(_, provider)| provider)))
}

/// What a backup of a primary key holds: the key, and the SHA-256 of it, so that it is known for what it is.
fn with_check(primary: &SecretBytes) -> Result<SecretBytes, Failure> {
    let mut key = SecretBytes::zeroed(2 * PRIMARY_LEN).map_err(SecretError::from)?;
    let (first, check) = key.split_at_mut(PRIMARY_LEN);
    first.copy_from_slice(primary);
    on_wiped_stack(|| {
        let digest = Sha256::new()
            .chain_update(b"sealblk primary key backup\0")
            .chain_update(&primary[..]);
        check.copy_from_slice(&digest.finalize());
    });
    Ok(key)
}

/// The type of a backup's token.
const BACKUP: &str = "sealblk-primary-key";
