//! The key providers of this host, by name, and the default provider of new volumes.
//!
//! They are in the state directory:
//!
//! ```text
//! providers.toml                   settings, which the operator can read and edit
//! providers/NAME/                  mode 0700: the files of the provider NAME
//! providers/NAME/primary.key       of a native provider
//! providers/NAME/attestation.key   of a trusted provider
//! ```
//!
//! The settings are replaced atomically and under a lock on the directory. A provider's own files exist before the
//! settings name it. If a crash in between leaves such files, adding the provider again uses them. When a provider
//! is removed, the settings keep its name in the list of providers to wipe until its files are wiped.

mod error;
pub(super) mod settings;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::Expiring;
use super::native::Native;
use super::revoked::Revoked;
use super::source::HostProvider;
use super::trusted::Trusted;
use crate::keys::{KeyError, KeyProvider, KeyReason, Providers};
use crate::tpm::Device;
use crate::tpm::pcr::Selection;
use sealblk_secmem::arena::SecretBytes;
use sealblk_secmem::{private_file, private_file::Forbid};

pub use super::backup::Backup;
pub use error::RegistryError;
pub use settings::Source;
use settings::{Settings, check_name, check_private, primary_key};

/// The providers of one state directory, as they were when it was opened.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    settings: Settings,
}

/// One provider, as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// What it is: "native".
    pub kind: String,
    /// Whether new volumes take it when none is named.
    pub default: bool,
    /// Where its keys come from: a path, or a server's address.
    pub location: String,
    /// The certificates of its connections that are to be renewed before long, the most urgent first.
    #[serde(default)]
    pub expiring: Vec<Expiring>,
}

/// The state directory when none is named: `/var/lib/sealblk` for root, else under the user's own state.
///
/// # Errors
/// [`RegistryError::NoStateDir`], if the user has neither `XDG_STATE_HOME` nor `HOME`.
pub fn default_dir() -> Result<PathBuf, RegistryError> {
    if rustix::process::geteuid().is_root() {
        return Ok("/var/lib/sealblk".into());
    }
    let set = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    set("XDG_STATE_HOME")
        .or_else(|| Some(set("HOME")?.join(".local/state")))
        .map(|state| state.join("sealblk"))
        .ok_or(RegistryError::NoStateDir)
}

impl Registry {
    /// Reads the settings. A directory that does not exist holds no provider, and is not made.
    ///
    /// # Errors
    /// [`RegistryError`], if the settings cannot be read, cannot be understood, or could have been written by others.
    pub fn open(dir: &Path) -> Result<Self, RegistryError> {
        Ok(Self {
            dir: dir.to_owned(),
            settings: Settings::read(dir)?,
        })
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All providers, by name.
    pub fn list(&self) -> Vec<Entry> {
        let entry = |(name, source): (&String, &Source)| Entry {
            name: name.clone(),
            kind: source.kind().to_owned(),
            default: self.settings.default.as_ref() == Some(name),
            location: source.location(&self.dir_of(name)),
            expiring: source.expiring(),
        };
        self.settings.provider.iter().map(entry).collect()
    }

    /// Adds a provider. The first one becomes the default; later ones if asked for.
    ///
    /// # Errors
    /// [`RegistryError`]; the settings are as they were then.
    pub fn add(&mut self, name: &str, source: Source, default: bool) -> Result<(), RegistryError> {
        self.add_with(name, source, default, |source, dir| source.prepare(name, dir))
    }

    /// Adds a provider if it works, by a real unwrap. `fits` may let pass why it does not yet.
    ///
    /// # Errors
    /// As for [`Registry::add`], and [`RegistryError::NotAdded`].
    pub fn add_working(
        &mut self,
        name: &str,
        source: Source,
        default: bool,
        fits: impl FnOnce(KeyError) -> Result<(), KeyError>,
    ) -> Result<(), RegistryError> {
        let revoked = Revoked::of(&self.dir, name);
        self.add_with(name, source, default, |source, dir| {
            source.prepare(name, dir)?;
            let open = || HostProvider::new(source.open(name, dir)?, Duration::ZERO, revoked).check();
            open().or_else(fits).map_err(RegistryError::NotAdded)
        })
    }

    /// Adds a native provider with the primary key of a backup.
    ///
    /// # Errors
    /// As for [`Registry::add`]; above all, if there is a primary key of that name already.
    pub fn import(&mut self, name: &str, primary: &SecretBytes, default: bool) -> Result<(), RegistryError> {
        let backup = Backup::Taken;
        self.add_with(name, Source::Native { backup }, default, |_, dir| {
            Ok(Native::write(name, &primary_key(dir), primary)?)
        })
    }

    /// The primary key of a native provider, for a backup.
    ///
    /// # Errors
    /// [`RegistryError`], if it is no native one, or its key cannot be read.
    pub fn export(&self, name: &str) -> Result<SecretBytes, RegistryError> {
        match self.settings.provider.get(name) {
            Some(Source::Native { backup }) => {
                let path = primary_key(&self.dir_of(name));
                Ok(Native::open(name, &path, *backup)?.into_primary())
            }
            Some(_) => Err(RegistryError::NotNative(name.to_owned())),
            None => Err(self.unknown(name).into()),
        }
    }

    /// Seals the primary key of a native provider to a TPM, bound to what `pcrs` hold now. The key is the provider's own, or
    /// `primary`, that of its backup, where the TPM does not give it back any more.
    ///
    /// # Errors
    /// [`RegistryError`], above all [`RegistryError::SealWithoutBackup`]: a TPM that breaks takes the key with it.
    pub fn seal(
        &self,
        name: &str,
        primary: Option<&SecretBytes>,
        tpm: &Device,
        pcrs: Selection,
    ) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        let path = primary_key(&self.dir_of(name));
        // A waiver covers the loss of this host's file, not a TPM that is cleared or a host that boots otherwise.
        if primary.is_none() && matches!(self.backup(name), Some(Backup::None | Backup::Waived)) {
            return Err(RegistryError::SealWithoutBackup(name.to_owned()));
        }
        let own;
        let primary = match primary {
            Some(primary) if self.backup(name).is_some() => primary,
            _ => {
                own = self.export(name)?;
                &own
            }
        };
        Ok(Native::seal(name, &path, primary, tpm, pcrs)?)
    }

    /// Whether a native provider was backed up; other providers' keys are their servers'.
    pub fn backup(&self, name: &str) -> Option<Backup> {
        match self.settings.provider.get(name) {
            Some(Source::Native { backup }) => Some(*backup),
            _ => None,
        }
    }

    /// Makes this host's TPM known to the broker of a trusted provider, as `host`.
    ///
    /// # Errors
    /// [`RegistryError`], if it is no trusted one, or the broker refuses.
    pub fn enrol(&self, name: &str, host: &str, token: Option<&SecretBytes>) -> Result<(), RegistryError> {
        Ok(self.trusted(name)?.enrol(host, token)?)
    }

    /// The attestation key of a trusted provider, for a broker that has to be told it: SubjectPublicKeyInfo in DER.
    ///
    /// # Errors
    /// [`RegistryError`], if it is no trusted one.
    pub fn attestation_key(&self, name: &str) -> Result<Vec<u8>, RegistryError> {
        Ok(self.trusted(name)?.attestation_key().to_vec())
    }

    fn trusted(&self, name: &str) -> Result<Trusted, RegistryError> {
        match self.settings.provider.get(name) {
            Some(Source::Trusted(settings)) => Ok(Trusted::open(name, settings, &self.dir_of(name))?),
            Some(_) => Err(RegistryError::NotTrusted(name.to_owned())),
            None => Err(self.unknown(name).into()),
        }
    }

    /// Looks whether [`Registry::remove`] would be possible.
    ///
    /// # Errors
    /// As for [`Registry::remove`].
    pub fn check_removal(&self, name: &str, new_default: Option<&str>) -> Result<(), RegistryError> {
        self.without(Settings::read(&self.dir)?, name, new_default)
            .map(drop)
    }

    /// Removes a provider: first from the settings, and then its files, which are written over. If it is the default one,
    /// `new_default` becomes that; without other providers there is none.
    ///
    /// # Errors
    /// [`RegistryError::NotWiped`] once the provider is no more; before that the settings are as they were.
    pub fn remove(&mut self, name: &str, new_default: Option<&str>) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        let mut settings = self.without(Settings::read(&self.dir)?, name, new_default)?;
        // Until the files are wiped the settings say that they are to be: whoever changes them next goes on with it.
        settings.removing.push(name.to_owned());
        settings.write(&self.dir)?;
        let wiped = self.finish_removals(&mut settings);
        self.settings = settings;
        wiped
    }

    /// Wipes the files of providers that were removed, now or before a crash.
    fn finish_removals(&self, settings: &mut Settings) -> Result<(), RegistryError> {
        for name in settings.removing.clone() {
            wipe_dir(&self.dir_of(&name)).map_err(|source| RegistryError::NotWiped {
                name: name.clone(),
                dir: self.dir_of(&name),
                source,
            })?;
            settings.removing.retain(|other| *other != name);
            settings.write(&self.dir)?;
        }
        Ok(())
    }

    /// `settings` without a provider.
    fn without(
        &self,
        mut settings: Settings,
        name: &str,
        new_default: Option<&str>,
    ) -> Result<Settings, RegistryError> {
        if settings.provider.remove(name).is_none() {
            return Err(self.unknown(name).into());
        }
        match new_default {
            Some(new) if settings.provider.contains_key(new) => settings.default = Some(new.to_owned()),
            Some(new) => return Err(self.unknown(new).into()),
            None if settings.default.as_deref() != Some(name) => {}
            None if settings.provider.is_empty() => settings.default = None,
            None => {
                let others: Vec<_> = settings.provider.keys().map(String::as_str).collect();
                return Err(RegistryError::IsDefault {
                    name: name.to_owned(),
                    others: others.join(", "),
                });
            }
        }
        Ok(settings)
    }

    /// Takes note of the backup of a native provider.
    ///
    /// # Errors
    /// [`RegistryError`]; the settings are as they were then.
    pub fn set_backup(&mut self, name: &str, taken: Backup) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        self.record_backup(name, taken)
    }

    fn record_backup(&mut self, name: &str, taken: Backup) -> Result<(), RegistryError> {
        let mut settings = Settings::read(&self.dir)?;
        match settings.provider.get_mut(name) {
            Some(Source::Native { backup }) => *backup = taken,
            Some(_) => return Err(RegistryError::NotNative(name.to_owned())),
            None => return Err(self.unknown(name).into()),
        }
        settings.write(&self.dir)?;
        self.settings = settings;
        Ok(())
    }

    /// Records that there is a backup of `primary`, which is still the provider's primary key.
    ///
    /// # Errors
    /// [`RegistryError`]; above all [`RegistryError::BackupOfAnother`], if the provider was replaced meanwhile.
    pub fn was_backed_up(&mut self, name: &str, primary: &SecretBytes) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        self.settings = Settings::read(&self.dir)?;
        if !self.export(name)?.ct_eq(primary) {
            return Err(RegistryError::BackupOfAnother(name.to_owned()));
        }
        self.record_backup(name, Backup::Taken)
    }

    fn lock(&self) -> Result<File, RegistryError> {
        let error = |action| {
            let path = self.dir.clone();
            move |source| RegistryError::Io { action, path, source }
        };
        let lock = File::open(&self.dir).map_err(error("open"))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| error("lock")(e.into()))?;
        Ok(lock)
    }

    fn add_with(
        &mut self,
        name: &str,
        source: Source,
        default: bool,
        prepare: impl FnOnce(&Source, &Path) -> Result<(), RegistryError>,
    ) -> Result<(), RegistryError> {
        check_name(name)?;
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| RegistryError::Io { action, path, source }
        };
        private_file::ensure_dir(&self.dir).map_err(io("make the state directory", &self.dir))?;
        let _lock = self.lock()?;
        let mut settings = Settings::read(&self.dir)?;
        self.finish_removals(&mut settings)?;
        if settings.provider.contains_key(name) {
            return Err(RegistryError::Exists {
                name: name.to_owned(),
                dir: self.dir.clone(),
            });
        }

        let dir = self.dir_of(name);
        let is_new = !dir.exists();
        for dir in [&self.dir.join("providers"), &dir] {
            private_file::ensure_dir_in_state(dir).map_err(io("make", dir))?;
            check_private(dir, Forbid::All)?;
        }
        prepare(&source, &dir).inspect_err(|_| {
            if is_new && let Err(error) = wipe_dir(&dir) {
                tracing::warn!(%error, "cannot remove {}, which was made for a provider that is not added", dir.display());
            }
        })?;
        settings.provider.insert(name.to_owned(), source);
        if default || settings.default.is_none() {
            settings.default = Some(name.to_owned());
        }
        settings.write(&self.dir)?;
        self.settings = settings;
        Ok(())
    }

    /// The provider of this name, which keeps a KEK for `time_to_live` after it was fetched.
    pub(super) fn open_provider(&self, name: &str, time_to_live: Duration) -> Result<HostProvider, KeyError> {
        let source = self.look_up(name)?.open(name, &self.dir_of(name))?;
        Ok(HostProvider::new(
            source,
            time_to_live,
            Revoked::of(&self.dir, name),
        ))
    }

    /// The settings of a provider.
    pub(super) fn look_up(&self, name: &str) -> Result<&Source, KeyError> {
        let source = self.settings.provider.get(name);
        source.ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> KeyError {
        KeyError::new(name, self.dir.display(), KeyReason::UnknownProvider)
    }

    /// Where a provider keeps what is its own.
    fn dir_of(&self, name: &str) -> PathBuf {
        self.dir.join("providers").join(name)
    }
}

impl Providers for Registry {
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError> {
        Ok(Arc::new(self.open_provider(name, Duration::ZERO)?))
    }

    fn default_name(&self) -> Result<Option<String>, KeyError> {
        Ok(self.settings.default.clone())
    }
}

/// Wipes a provider's directory, if it is there.
fn wipe_dir(dir: &Path) -> io::Result<()> {
    let files = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        files => files?,
    };
    for file in files {
        private_file::wipe(&file?.path())?;
    }
    fs::remove_dir(dir)?;
    private_file::sync_dir_of(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{Binding, KeyId, KeyState, Reach, Revocation};
    use crate::toml_file::TomlFileError;
    use std::os::unix::fs::PermissionsExt;
    use uuid::Uuid;

    const NATIVE: Source = Source::Native {
        backup: Backup::Waived,
    };

    /// A state directory that does not exist yet.
    fn fresh() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("state");
        (parent, dir)
    }

    #[test]
    fn state_directory_that_does_not_exist_is_empty_and_stays_away() {
        let (_parent, dir) = fresh();
        let registry = Registry::open(&dir).unwrap();
        assert_eq!(registry.list(), []);
        assert_eq!(registry.default_name().unwrap(), None);
        assert_eq!(
            registry.provider("native").unwrap_err().reason,
            KeyReason::UnknownProvider
        );
        assert!(!dir.exists());
    }

    #[test]
    fn added_provider_is_there_for_the_next_process() {
        let (_parent, dir) = fresh();
        Registry::open(&dir)
            .unwrap()
            .add("native", NATIVE, false)
            .unwrap();
        let registry = Registry::open(&dir).unwrap();
        assert_eq!(registry.default_name().unwrap().as_deref(), Some("native"));
        registry.provider("native").unwrap().check().unwrap();
        assert_eq!(
            fs::read_to_string(dir.join(settings::FILE)).unwrap(),
            "default = \"native\"\n\n[provider.native]\nkind = \"native\"\nbackup = \"waived\"\n"
        );
        assert_eq!(
            fs::metadata(dir.join("providers/native"))
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o700
        );
    }

    #[test]
    fn first_provider_is_the_default_until_another_is_asked_for() {
        let (_parent, dir) = fresh();
        let mut registry = Registry::open(&dir).unwrap();
        registry.add("one", NATIVE, false).unwrap();
        registry.add("two", NATIVE, false).unwrap();
        assert_eq!(registry.default_name().unwrap().as_deref(), Some("one"));
        registry.add("three", NATIVE, true).unwrap();
        assert_eq!(
            Registry::open(&dir).unwrap().default_name().unwrap().as_deref(),
            Some("three")
        );
    }

    #[test]
    fn second_provider_of_a_name_is_refused_and_the_first_keeps_its_key() {
        let (_parent, dir) = fresh();
        let mut registry = Registry::open(&dir).unwrap();
        registry.add("native", NATIVE, false).unwrap();
        let key = fs::read(dir.join("providers/native/primary.key")).unwrap();
        // As seen by a process that read the settings before.
        let mut stale = Registry {
            dir: dir.clone(),
            settings: Settings::default(),
        };
        assert!(matches!(
            stale.add("native", NATIVE, false),
            Err(RegistryError::Exists { .. })
        ));
        assert_eq!(fs::read(dir.join("providers/native/primary.key")).unwrap(), key);
    }

    #[test]
    fn key_left_behind_by_a_crash_is_taken_up() {
        let (_parent, dir) = fresh();
        Registry::open(&dir)
            .unwrap()
            .add("native", NATIVE, false)
            .unwrap();
        let key = fs::read(dir.join("providers/native/primary.key")).unwrap();
        fs::remove_file(dir.join(settings::FILE)).unwrap();
        Registry::open(&dir)
            .unwrap()
            .add("native", NATIVE, false)
            .unwrap();
        assert_eq!(fs::read(dir.join("providers/native/primary.key")).unwrap(), key);
    }

    #[test]
    fn removed_provider_leaves_no_file_and_the_default_moves_when_told() {
        let (_parent, dir) = fresh();
        let mut registry = Registry::open(&dir).unwrap();
        for name in ["one", "two"] {
            registry.add(name, NATIVE, false).unwrap();
        }
        for new_default in [None, Some("one"), Some("three")] {
            assert!(registry.check_removal("one", new_default).is_err());
            assert!(registry.remove("one", new_default).is_err());
        }
        assert_eq!(Registry::open(&dir).unwrap().list().len(), 2);
        registry.check_removal("one", Some("two")).unwrap();
        registry.remove("one", Some("two")).unwrap();
        registry.remove("two", None).unwrap();
        assert!(matches!(registry.remove("two", None), Err(RegistryError::Key(_))));
        let registry = Registry::open(&dir).unwrap();
        assert_eq!(
            (registry.list(), registry.default_name().unwrap()),
            (vec![], None)
        );
        assert_eq!(fs::read_dir(dir.join("providers")).unwrap().count(), 0);
    }

    #[test]
    fn files_of_a_removal_that_a_crash_interrupted_are_wiped_and_never_taken_up() {
        let (_parent, dir) = fresh();
        let mut registry = Registry::open(&dir).unwrap();
        registry.add("native", NATIVE, false).unwrap();
        let key = fs::read(dir.join("providers/native/primary.key")).unwrap();
        private_file::replace(&dir.join(settings::FILE), b"removing = [\"native\"]").unwrap();
        assert_eq!(Registry::open(&dir).unwrap().list(), []);
        registry.add("native", NATIVE, false).unwrap();
        assert_ne!(fs::read(dir.join("providers/native/primary.key")).unwrap(), key);
        let text = fs::read_to_string(dir.join(settings::FILE)).unwrap();
        assert!(!text.contains("removing"), "{text}");
    }

    #[test]
    fn revoked_key_is_not_used_and_stays_so_when_the_provider_comes_back() {
        let (_parent, dir) = fresh();
        let mut registry = Registry::open(&dir).unwrap();
        registry.add("native", NATIVE, false).unwrap();
        let primary = registry.export("native").unwrap();
        let provider = registry.provider("native").unwrap();
        let (revoked, other) = (provider.create_kek().unwrap(), provider.create_kek().unwrap());
        assert_eq!(
            provider.revoke(&revoked, Revocation::Deactivate).unwrap(),
            Reach::Host
        );
        let failed = provider.revoke(&other, Revocation::Destroy).unwrap_err();
        assert_eq!(failed.reason, KeyReason::Indestructible);
        let missing = provider
            .revoke(&KeyId("x".into()), Revocation::Deactivate)
            .unwrap_err();
        assert_eq!(missing.reason, KeyReason::Missing);

        registry.remove("native", None).unwrap();
        registry.import("native", &primary, false).unwrap();
        let provider = registry.provider("native").unwrap();
        let secret = SecretBytes::random(32).unwrap();
        for (key_id, state) in [(&revoked, KeyState::Revoked), (&other, KeyState::Active)] {
            assert_eq!(provider.state(key_id).unwrap(), state);
            let binding = Binding {
                volume: Uuid::nil(),
                provider: "native",
                key_id,
                keyslot: 0,
            };
            let wrapped = provider.wrap(&binding, &secret);
            match state {
                KeyState::Active => drop(wrapped.unwrap()),
                _ => assert_eq!(wrapped.unwrap_err().reason, KeyReason::NotActive),
            }
        }
    }

    #[test]
    fn unusable_settings_are_refused_with_the_place() {
        let (_parent, dir) = fresh();
        private_file::ensure_dir(&dir).unwrap();
        let refused = |text: &str| {
            private_file::replace(&dir.join(settings::FILE), text.as_bytes()).unwrap();
            let error = Registry::open(&dir).unwrap_err();
            assert!(error.to_string().contains("providers.toml"), "{error}");
            error
        };
        assert!(matches!(
            refused("default = "),
            RegistryError::File(TomlFileError::Syntax { .. })
        ));
        assert!(matches!(
            refused("colour = \"red\""),
            RegistryError::File(TomlFileError::Syntax { .. })
        ));
        assert!(matches!(
            refused("[provider.a]\nkind = \"magic\""),
            RegistryError::File(TomlFileError::Syntax { .. })
        ));
        assert!(matches!(
            refused("[provider.a]\nkind = \"native\"\nx = 1"),
            RegistryError::File(TomlFileError::Syntax { .. })
        ));
        assert!(matches!(
            refused("[provider.\"../a\"]\nkind = \"native\""),
            RegistryError::SettingsName { .. }
        ));
        assert!(matches!(
            refused("default = \"a\""),
            RegistryError::UnknownDefault { .. }
        ));
    }

    #[test]
    fn settings_that_others_can_write_are_refused() {
        let (_parent, dir) = fresh();
        Registry::open(&dir)
            .unwrap()
            .add("native", NATIVE, false)
            .unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o770)).unwrap();
        assert!(matches!(Registry::open(&dir), Err(RegistryError::Exposed { .. })));
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        Registry::open(&dir).unwrap();
    }

    #[test]
    fn names_that_are_no_file_names_are_refused() {
        let (_parent, dir) = fresh();
        let mut registry = Registry::open(&dir).unwrap();
        for name in ["", ".", "..", "a/b", "-a", "Native", "a b", "ä", &"a".repeat(65)] {
            assert!(
                matches!(registry.add(name, NATIVE, false), Err(RegistryError::Name(_))),
                "{name}"
            );
        }
        assert!(!dir.exists());
    }
}
