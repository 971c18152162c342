//! The providers of a host for a long-running process such as the agent: opened once, with a cache of their KEKs.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use super::sealed_cache::SealedCache;
use super::source::HostProvider;
use super::{registry::Entry, registry::Registry, registry::RegistryError, registry::settings};
use crate::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, Providers};
use crate::mutex::lock;
use sealblk_secmem::arena::SecretBytes;

/// The providers of one state directory, as they are at each moment: other processes add to them.
#[derive(Debug)]
pub struct SharedProviders {
    dir: PathBuf,
    time_to_live: Duration,
    sealed: Option<Arc<SealedCache>>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// Which settings these are.
    settings: Option<FileIdentity>,
    providers: HashMap<String, Arc<Slot>>,
}

/// A provider's place. Opening one may take its time, if a TPM has its key: who comes meanwhile waits for that one alone, and
/// gets what comes of it, the failure too.
#[derive(Debug, Default)]
struct Slot {
    provider: OnceLock<Arc<HostProvider>>,
    /// Held while it is being opened: why it was not the last time, and when that was known.
    opening: Mutex<Option<(KeyError, Instant)>>,
}

impl Slot {
    fn open(
        &self,
        open: impl FnOnce() -> Result<HostProvider, KeyError>,
    ) -> Result<Arc<HostProvider>, KeyError> {
        let came = Instant::now();
        if let Some(provider) = self.provider.get() {
            return Ok(Arc::clone(provider));
        }
        let mut failed = lock(&self.opening);
        match (self.provider.get(), &*failed) {
            (Some(provider), _) => return Ok(Arc::clone(provider)),
            (None, Some((failure, known))) if *known >= came => return Err(failure.clone()),
            _ => {}
        }
        match open() {
            Ok(provider) => Ok(Arc::clone(self.provider.get_or_init(|| Arc::new(provider)))),
            Err(failure) => {
                *failed = Some((failure.clone(), Instant::now()));
                Err(failure)
            }
        }
    }
}

impl Open {
    /// Begins anew if the settings were changed.
    fn follow(&mut self, settings: Option<FileIdentity>) {
        if self.settings != settings {
            *self = Self {
                settings,
                ..Self::default()
            };
        }
    }

    fn opened(&self, provider: &str) -> Option<&Arc<HostProvider>> {
        self.providers.get(provider)?.provider.get()
    }
}

/// Tells a file from the one that has replaced it: inode, and change in seconds and nanoseconds.
type FileIdentity = (u64, i64, i64);

impl SharedProviders {
    /// The providers of `dir`, which keep a KEK for `time_to_live` after it was fetched.
    pub fn new(dir: &Path, time_to_live: Duration) -> Self {
        Self {
            dir: dir.to_owned(),
            time_to_live,
            sealed: None,
            open: Mutex::default(),
        }
    }

    /// The same, with what is kept for a reboot while a provider's servers are away.
    pub fn with_sealed_cache(mut self, sealed: SealedCache) -> Self {
        self.sealed = Some(Arc::new(sealed));
        self
    }

    /// Until when the KEK that is here opens volumes, if its servers are away.
    pub fn grace(&self, provider: &str, key_id: &KeyId) -> Option<SystemTime> {
        let provider = Arc::clone(lock(&self.open).opened(provider)?);
        provider.keks().grace(key_id)
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All providers, by name.
    ///
    /// # Errors
    /// If the settings cannot be used.
    pub fn list(&self) -> Result<Vec<Entry>, RegistryError> {
        Ok(Registry::open(&self.dir)?.list())
    }

    /// Keeps a KEK that somebody else has fetched.
    ///
    /// # Errors
    /// [`KeyError`], if there is no such provider, or no KEK can be kept.
    pub fn push(&self, provider: &str, key_id: &KeyId, key: SecretBytes) -> Result<(), KeyError> {
        self.open_provider(provider)?.push(key_id, key)
    }

    /// Holds a KEK that is here for the volumes that are served under it, until [`SharedProviders::forget`].
    pub fn hold(&self, provider: &str, key_id: &KeyId) {
        let provider = lock(&self.open).opened(provider).map(Arc::clone);
        if let Some(provider) = provider {
            provider.keks().hold(key_id);
        }
    }

    /// Unwraps with a KEK that is held; none if none is.
    ///
    /// # Errors
    /// As for [`KeyProvider::unwrap`].
    pub fn unwrap_held(
        &self,
        binding: &Binding<'_>,
        wrapped: &[u8],
    ) -> Option<Result<SecretBytes, KeyError>> {
        let provider = lock(&self.open).opened(binding.provider).map(Arc::clone)?;
        provider.unwrap_held(binding, wrapped)
    }

    /// Drops a KEK before its time.
    pub fn forget(&self, provider: &str, key_id: &KeyId) {
        let open = lock(&self.open);
        if let Some(provider) = open.opened(provider) {
            provider.keks().forget(key_id);
        }
    }

    /// The same, also where it is kept for a reboot.
    pub fn forget_for_good(&self, provider: &str, key_id: &KeyId) {
        self.forget(provider, key_id);
        if let Some(sealed) = &self.sealed {
            sealed.forget(provider, key_id);
        }
    }

    /// Lets go of what the settings do not have any more.
    pub fn refresh(&self) {
        let settings = self.settings();
        lock(&self.open).follow(settings);
    }

    /// Drops the KEKs whose time has come.
    pub fn drop_expired(&self) {
        let open = lock(&self.open);
        let opened = open.providers.values().filter_map(|place| place.provider.get());
        opened.for_each(|provider| provider.keks().drop_expired());
    }

    fn settings(&self) -> Option<FileIdentity> {
        let metadata = std::fs::metadata(self.dir.join(settings::FILE)).ok()?;
        Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
    }

    fn open_provider(&self, name: &str) -> Result<Arc<HostProvider>, KeyError> {
        self.place(name)?.open(|| {
            let provider = self.registry(name)?.open_provider(name, self.time_to_live)?;
            Ok(provider.with_sealed_cache(self.sealed.clone()))
        })
    }

    /// The place of a provider that the settings have.
    fn place(&self, name: &str) -> Result<Arc<Slot>, KeyError> {
        loop {
            // Their storage may not answer, and KEKs have to go all the same when their time has come.
            let settings = self.settings();
            let known = {
                let mut open = lock(&self.open);
                open.follow(settings);
                open.providers.get(name).map(Arc::clone)
            };
            if let Some(place) = known {
                return Ok(place);
            }
            self.registry(name)?.look_up(name)?;
            let mut open = lock(&self.open);
            // Else what was looked up may be there no more.
            if open.settings == settings {
                return Ok(Arc::clone(open.providers.entry(name.to_owned()).or_default()));
            }
        }
    }

    fn registry(&self, name: &str) -> Result<Registry, KeyError> {
        Registry::open(&self.dir)
            .map_err(|error| KeyError::new(name, self.dir.display(), KeyReason::Invalid).because(error))
    }
}

impl Providers for SharedProviders {
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError> {
        Ok(self.open_provider(name)?)
    }

    fn default_name(&self) -> Result<Option<String>, KeyError> {
        self.registry("")?.default_name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::providers::{registry::Backup, registry::Source};

    const NATIVE: Source = Source::Native {
        backup: Backup::Waived,
    };

    #[test]
    fn providers_are_shared_until_the_settings_change() {
        let dir = tempfile::tempdir().unwrap();
        let shared = SharedProviders::new(dir.path(), Duration::from_secs(60));
        assert_eq!(
            shared.provider("one").unwrap_err().reason,
            KeyReason::UnknownProvider
        );
        let mut registry = Registry::open(dir.path()).unwrap();
        registry.add("one", NATIVE, false).unwrap();
        let first = shared.provider("one").unwrap();
        assert!(Arc::ptr_eq(&first, &shared.provider("one").unwrap()));
        registry.add("two", NATIVE, true).unwrap();
        assert!(!Arc::ptr_eq(&first, &shared.provider("one").unwrap()));
        shared.provider("two").unwrap().check().unwrap();
        assert_eq!(shared.default_name().unwrap().as_deref(), Some("two"));
        assert_eq!(shared.list().unwrap().len(), 2);
    }

    /// One TPM that does not answer must not keep the other providers, or the agent's own thread, from anything.
    #[test]
    fn a_provider_that_is_being_opened_keeps_nobody_else_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let mut registry = Registry::open(dir.path()).unwrap();
        for name in ["slow", "quick"] {
            registry.add(name, NATIVE, false).unwrap();
        }
        let shared = SharedProviders::new(dir.path(), Duration::from_secs(60));
        let slow = shared.place("slow").unwrap();
        let away = || KeyError::new("slow", "/dev/tpmrm0", KeyReason::Host);
        let (begun, begins) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let slow = &slow;
            let first = scope.spawn(move || {
                slow.open(|| {
                    begun.send(()).unwrap();
                    ends.recv().unwrap();
                    Err(away())
                })
            });
            begins.recv().unwrap();
            let (here, comes) = std::sync::mpsc::channel();
            let second = scope.spawn(move || {
                here.send(()).unwrap();
                slow.open(|| panic!("it gets what the first one gets"))
            });
            shared.provider("quick").unwrap();
            shared.drop_expired();
            shared.forget("slow", &KeyId("key".into()));
            assert_eq!(shared.grace("slow", &KeyId("key".into())), None);
            comes.recv().unwrap();
            // That it waits cannot be seen.
            std::thread::sleep(Duration::from_millis(200));
            end.send(()).unwrap();
            for opened in [first, second] {
                assert_eq!(opened.join().unwrap().unwrap_err().reason, KeyReason::Host);
            }
        });
        shared.provider("slow").unwrap();
        assert_eq!(
            shared.provider("none").unwrap_err().reason,
            KeyReason::UnknownProvider
        );
        assert_eq!(lock(&shared.open).providers.len(), 2);
    }
}
