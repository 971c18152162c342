//! Fetched KEKs on this host's disk, for a limited time: for a reboot while their server does not answer.
//!
//! ```text
//! sealed-keks/cache.json   in the state directory: the cache's key, sealed by the host's TPM
//! sealed-keks/HASH.kek     a KEK and the time of its fetch, under the cache's key; HASH is the SHA-256 of provider and key ID
//! ```
//!
//! They open volumes only on this host in the same boot state, until their grace period is over, and only if the server does
//! not answer, or answers with an error. An explicit refusal evicts the entry. Nothing is wrapped under them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::file_name;
use super::{wrap, wrap::KEK_LEN, wrap::Kek};
use crate::keys::{Binding, KeyId};
use crate::parsing;
use crate::tpm::pcr::Selection;
use crate::tpm::seal::Sealed;
use crate::tpm::{Device, Tpm, TpmFailure};
use sealblk_secmem::arena::SecretBytes;
use sealblk_secmem::private_file;

const DIR: &str = "sealed-keks";
const KEY: &str = "cache.json";
/// How long the time before a KEK is, in seconds since 1970, big-endian.
const TIME: usize = 8;

/// What an operator chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedCacheSettings {
    /// How long a KEK is good after it was last fetched.
    pub grace: Duration,
    /// The TPM that the cache is sealed to.
    pub tpm: Device,
    /// The registers that it is bound to.
    pub pcrs: Selection,
}

/// The KEKs of all providers of a state directory.
#[derive(Debug)]
pub struct SealedCache {
    dir: PathBuf,
    key: Kek,
    grace: Duration,
}

/// Why there is no such cache.
#[derive(Debug, thiserror::Error)]
#[error("the sealed cache in {} keeps no keys: {cause}", dir.display())]
pub struct SealedCacheError {
    dir: PathBuf,
    cause: Box<dyn std::error::Error + Send + Sync>,
}

impl SealedCache {
    /// Opens the cache of a state directory, or begins it. One that the TPM does not open any more, since the host has booted
    /// something else, is begun anew.
    ///
    /// # Errors
    /// If the TPM or the directory cannot be used.
    pub fn open(state_dir: &Path, settings: &SealedCacheSettings) -> Result<Self, SealedCacheError> {
        let dir = state_dir.join(DIR);
        let key = Self::key(&dir, settings).map_err(|cause| SealedCacheError {
            dir: dir.clone(),
            cause,
        })?;
        let cache = Self {
            dir,
            key,
            grace: settings.grace,
        };
        cache.drop_expired();
        Ok(cache)
    }

    fn key(
        dir: &Path,
        settings: &SealedCacheSettings,
    ) -> Result<Kek, Box<dyn std::error::Error + Send + Sync>> {
        private_file::ensure_dir(dir)?;
        let path = dir.join(KEY);
        let mut tpm = Tpm::open(&settings.tpm)?;
        match fs::read(&path) {
            Ok(text) => {
                let sealed = parsing::json::<Sealed>(&text).ok();
                let sealed = sealed.filter(|sealed| sealed.pcrs == settings.pcrs);
                match sealed.map(|sealed| tpm.unseal(&sealed)) {
                    Some(Ok(key)) => return Ok(Kek::new(key)?),
                    Some(Err(error)) if !matches!(error.what, TpmFailure::Changed(_)) => {
                        return Err(error.into());
                    }
                    Some(Err(error)) => {
                        tracing::warn!("the sealed cache cannot be read: {error}")
                    }
                    None => {}
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        // Without the key, what is there is noise.
        for entry in fs::read_dir(dir)? {
            fs::remove_file(entry?.path())?;
        }
        let key = SecretBytes::random(KEK_LEN)?;
        let sealed = tpm.seal(&key, settings.pcrs)?;
        let text = serde_json::to_vec_pretty(&sealed).expect("texts are JSON");
        private_file::create(&path, &text)?;
        Ok(Kek::new(key)?)
    }

    /// Keeps a KEK that was fetched just now. Where that is not possible, there will be none after a reboot.
    pub(super) fn keep(&self, provider: &str, key_id: &KeyId, kek: &Kek) {
        let keep = || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            let mut entry = SecretBytes::zeroed(TIME + KEK_LEN)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            entry[..TIME].copy_from_slice(&now.as_secs().to_be_bytes());
            entry[TIME..].copy_from_slice(kek.key());
            let wrapped = wrap::wrap(&self.key, &binding(provider, key_id), &entry)?;
            Ok(private_file::replace(&self.file(provider, key_id), &wrapped)?)
        };
        if let Err(error) = keep() {
            tracing::warn!(provider, %key_id, "the sealed cache cannot store a key: {error}");
        }
    }

    /// A KEK, and until when it is good.
    pub(super) fn find(&self, provider: &str, key_id: &KeyId) -> Option<(Kek, SystemTime)> {
        let wrapped = fs::read(self.file(provider, key_id)).ok()?;
        let entry = wrap::unwrap(&self.key, &binding(provider, key_id), &wrapped).ok()?;
        let (time, key) = entry.split_first_chunk::<TIME>()?;
        let fetched = UNIX_EPOCH.checked_add(Duration::from_secs(u64::from_be_bytes(*time)))?;
        let until = fetched.checked_add(self.grace)?;
        // A clock that was set back does not make it last longer.
        let now = SystemTime::now();
        if now >= until || now + Duration::from_secs(1) < fetched {
            return None;
        }
        let mut kek = SecretBytes::zeroed(KEK_LEN).ok()?;
        kek.copy_from_slice(key.get(..KEK_LEN)?);
        Some((Kek::new(kek).ok()?, until))
    }

    /// Forgets a KEK that its source does not give out any more.
    pub(super) fn forget(&self, provider: &str, key_id: &KeyId) {
        match fs::remove_file(self.file(provider, key_id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(provider, %key_id, "the sealed cache cannot remove a key that is no longer in use: {error}");
            }
            _ => {}
        }
    }

    /// Removes what nobody has fetched for as long as the grace period is.
    pub(super) fn drop_expired(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let old = |entry: &fs::DirEntry| {
                let changed = entry.metadata().ok()?.modified().ok()?;
                Some(changed.elapsed().ok()? > self.grace)
            };
            if entry.file_name() != KEY && old(&entry) == Some(true) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn file(&self, provider: &str, key_id: &KeyId) -> PathBuf {
        self.dir.join(file_name(provider, key_id) + ".kek")
    }
}

/// A KEK belongs to no volume.
fn binding<'a>(provider: &'a str, key_id: &'a KeyId) -> Binding<'a> {
    Binding {
        volume: Uuid::nil(),
        provider,
        key_id,
        keyslot: u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(dir: &Path, grace: Duration) -> SealedCache {
        SealedCache {
            dir: dir.to_owned(),
            key: Kek::new(SecretBytes::random(KEK_LEN).unwrap()).unwrap(),
            grace,
        }
    }

    fn id(name: &str) -> KeyId {
        KeyId(name.into())
    }

    #[test]
    fn a_kek_is_found_under_its_own_name_alone_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), Duration::from_secs(100));
        let kek = Kek::new(SecretBytes::random(KEK_LEN).unwrap()).unwrap();
        assert!(cache.find("kms", &id("one")).is_none());
        cache.keep("kms", &id("one"), &kek);
        let (found, until) = cache.find("kms", &id("one")).unwrap();
        assert!(found.key().ct_eq(kek.key()));
        assert!(until <= SystemTime::now() + Duration::from_secs(100));
        assert!(cache.find("kms", &id("two")).is_none() && cache.find("other", &id("one")).is_none());
        // Moved to another's place, it is nobody's.
        fs::copy(cache.file("kms", &id("one")), cache.file("kms", &id("two"))).unwrap();
        assert!(cache.find("kms", &id("two")).is_none());
        cache.forget("kms", &id("one"));
        assert!(cache.find("kms", &id("one")).is_none());
        cache.forget("kms", &id("one"));
    }

    #[test]
    fn a_kek_is_good_until_its_grace_is_over_and_not_before_it_was_fetched() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = cache(dir.path(), Duration::from_secs(100));
        let kek = Kek::new(SecretBytes::random(KEK_LEN).unwrap()).unwrap();
        cache.keep("kms", &id("one"), &kek);
        cache.grace = Duration::ZERO;
        assert!(cache.find("kms", &id("one")).is_none());
        cache.drop_expired();
        assert!(!cache.file("kms", &id("one")).exists());

        cache.grace = Duration::from_secs(1000);
        let mut entry = SecretBytes::zeroed(TIME + KEK_LEN).unwrap();
        let later = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 100;
        entry[..TIME].copy_from_slice(&later.to_be_bytes());
        let wrapped = wrap::wrap(&cache.key, &binding("kms", &id("one")), &entry).unwrap();
        private_file::replace(&cache.file("kms", &id("one")), &wrapped).unwrap();
        assert!(cache.find("kms", &id("one")).is_none(), "it is of the future");
    }
}
