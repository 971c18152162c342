//! `sealblk provider backup`, `restore` and `seal`: the primary key of a native provider, outside its file.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use sha2::{Digest, Sha256};

use super::failure::Failure;
use super::made::Made;
use super::secret::{SecretError, SecretSource};
use super::{Host, output, strength};
use crate::keys::arena::{SecretBytes, on_wiped_stack};
use crate::keys::registry::Backup as Taken;
use crate::keys::{PRIMARY_LEN, private_file};
use crate::storage::{Access, Backing};
use crate::tpm::pcr::Selection;
use crate::tpm::{DEFAULT_DEVICE, Device};
use crate::volume::{Argon2Cost, key_backup};

const BACKUP_HELP: &str = "\
Examples:
  sealblk provider backup native --to native.backup --passphrase-file pass
  sealblk provider backup native --waive

The backup is a LUKS2 header under argon2id that holds the primary key. It is read
back and opened with the passphrase before it counts. One is enough for good:
later keys are derived from the same primary key. cryptsetup opens it, too:
  cryptsetup luksDump --dump-volume-key --volume-key-file out native.backup
gives 64 bytes, of which the first 32 are the primary key.";

const RESTORE_HELP: &str = "\
Example:
  sealblk provider restore native.backup --passphrase-file pass

This host then opens the disks of the host that the backup was taken on.";

const SEAL_HELP: &str = "\
Examples:
  sealblk provider seal native
  sealblk provider seal native --tpm-pcrs 0,4,7
  sealblk provider seal native --from native.backup --passphrase-file pass

The provider's file then holds nothing that opens a disk on another host, or on
this one booted otherwise: the TPM gives the key back while its registers (PCRs)
hold what they hold now. After a change of firmware or boot loader it does not,
and the disks are locked until the key is sealed anew, from its backup (--from).
Take that first: a TPM that breaks or is cleared takes the key with it.";

#[derive(Debug, Args)]
#[command(after_help = BACKUP_HELP)]
#[command(group = ArgGroup::new("how").required(true).args(["to", "waive"]))]
pub(super) struct Backup {
    /// The provider
    name: String,
    /// The file, which is made
    #[arg(long, value_name = "FILE", requires = "passphrase_file")]
    to: Option<PathBuf>,
    /// The passphrase that the backup shall open with
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME", requires = "to")]
    passphrase_file: Option<SecretSource>,
    /// Take a passphrase that is easily guessed
    #[arg(long, requires = "passphrase_file")]
    weak: bool,
    /// Do without: new volumes get keys of the provider, and are lost if its file is
    #[arg(long)]
    waive: bool,
}

#[derive(Debug, Args)]
#[command(after_help = RESTORE_HELP)]
pub(super) struct Restore {
    /// The backup
    file: PathBuf,
    /// The passphrase that it opens with
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME")]
    passphrase_file: SecretSource,
    /// What to call the provider [default: as where the backup was taken, which volumes know it by]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Let new volumes take it when none is named; the first provider is the default anyway
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
    /// The registers that the key is bound to, of the bank of SHA-256
    #[arg(long, value_name = "N[,N...]", default_value_t)]
    tpm_pcrs: Selection,
    /// The backup, where the TPM does not give the key back any more
    #[arg(long, value_name = "FILE", requires = "passphrase_file")]
    from: Option<PathBuf>,
    /// The passphrase that the backup opens with
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
        let file = Backing::open(path, Access::ReadWrite)?;
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
            "{}: the primary key of {:?}, read back and opened; keep it and its passphrase apart, and from the disks\n",
            output::shown(path),
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
                what: "it does not tell the provider's name; give one with --name",
            });
        };
        registry.import(&name, &primary, self.default)?;
        if let Some(known) = known.filter(|known| *known != name) {
            output::note(&format!(
                "volumes that were bound to provider {known:?} look for that name, and not for {name:?}: serve them with a state \
                 directory of their own (`--state-dir DIR`), into which the backup is restored as {known:?}; or bind them to this \
                 provider by their recovery keys (`sealblk rekey DISK --provider {name} --unlock-key FILE`)"
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
