//! The native provider: KEKs derived from one primary key in a file of this host, without a server.
//!
//! The KEK of a key ID is HKDF-SHA256 of the primary key with the key ID as its context. So there is no list of KEKs
//! that could be lost or outdated: one backup of the primary key, taken once, also opens every volume made later. A
//! key ID starts with the identity of the primary key that it was made under, so that the provider can distinguish a key
//! of another primary key from an altered one.
//!
//! The file, mode 0600 and the running user's own:
//!
//! ```text
//! offset  length
//!      0      16   magic, "sealblk-native\0\x01"
//!     16      32   primary key, random
//!     48       8   its identity, derived from it; detects a damaged file
//! ```
//!
//! Or the primary key is sealed to the host's TPM, and the file is JSON: [`SealedKey`].

use std::error::Error;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base16ct::lower;
use hkdf::Hkdf;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use uuid::Uuid;

use super::backup::Backup;
use super::source::KekSource;
use super::{settings_file, settings_file::Unreadable};
use super::{wrap::KEK_LEN, wrap::Kek};
use crate::keys::{KeyError, KeyId, KeyReason, KeyState};
use crate::parsing;
use crate::tpm::pcr::Selection;
use crate::tpm::seal::Sealed;
use crate::tpm::{Device, Tpm, TpmError, TpmFailure};
use sealblk_secmem::private_file;
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes, arena::on_wiped_stack};

const MAGIC: &[u8; 16] = b"sealblk-native\0\x01";
/// The length of a primary key, in bytes.
pub const PRIMARY_LEN: usize = 32;
const IDENTITY_LEN: usize = 8;
const FILE_LEN: usize = MAGIC.len() + PRIMARY_LEN + IDENTITY_LEN;

/// The longest file: a sealed key is some 800 bytes.
const MAX_FILE: usize = 16 << 10;

/// A primary key's file, if the key is sealed to the host's TPM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct SealedKey {
    /// The TPM.
    tpm: Device,
    /// Of the key, in hexadecimal: it tells this key's backup from another's.
    identity: String,
    sealed: Sealed,
}

/// A native provider, its primary key in memory.
pub(super) struct Native {
    name: String,
    path: PathBuf,
    backup: Backup,
    primary: SecretBytes,
    identity: String,
}

/// Why a primary key's file cannot be used.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("it is not a primary key of sealblk, or has an unknown version")]
    Magic,
    #[error("it is damaged: the key and its identity do not match")]
    Damaged,
    #[error("the backup holds the primary key {0}, but this provider has {1}")]
    OtherKey(String, String),
    #[error("it now holds the primary key {0}, but {1} is in use: restart the agent, or restore the file")]
    Replaced(String, String),
}

/// Why a key ID is not one of this provider's.
#[derive(Debug, thiserror::Error)]
enum ForeignKey {
    #[error(
        "the key belongs to the primary key {wanted}, but this provider has {held}: give the state directory of that key with \
         --state-dir, or restore its backup with `sealblk provider restore`"
    )]
    OtherPrimary { wanted: String, held: String },
    #[error("a native provider does not make key IDs of this form")]
    Form,
}

impl Native {
    /// Makes a primary key at `path`, which must not exist.
    ///
    /// # Errors
    /// [`KeyError`] with the reason [`KeyReason::Host`]; then there is no file.
    pub(super) fn create(name: &str, path: &Path) -> Result<(), KeyError> {
        let fail = |source| KeyError::new(name, path.display(), KeyReason::Host).because(source);
        Self::write(name, path, &SecretBytes::random(PRIMARY_LEN).map_err(fail)?)
    }

    /// Writes `primary`, which comes from a backup, to `path`, which must not exist.
    ///
    /// # Errors
    /// As for [`Native::create`].
    pub(super) fn write(name: &str, path: &Path, primary: &SecretBytes) -> Result<(), KeyError> {
        let fail = |source: Box<dyn Error + Send + Sync>| {
            KeyError::new(name, path.display(), KeyReason::Host).because(source)
        };
        let mut content = SecretBytes::zeroed(FILE_LEN).map_err(|e| fail(e.into()))?;
        content[..16].copy_from_slice(MAGIC);
        content[16..48].copy_from_slice(primary);
        content[48..].copy_from_slice(&identity(primary));
        private_file::create_in_state(path, &content).map_err(|e| fail(e.into()))
    }

    /// Reads the primary key at `path`.
    ///
    /// # Errors
    /// [`KeyError`]: [`KeyReason::Missing`] without a file, [`KeyReason::Invalid`] if the file is damaged or others
    /// than its owner can get at it.
    pub(super) fn open(name: &str, path: &Path, backup: Backup) -> Result<Self, KeyError> {
        let (primary, written) = match Content::read(name, path)? {
            Content::Plain { primary, identity } => (primary, identity),
            Content::Sealed(sealed) => (sealed.unseal(name)?, sealed.identity),
        };
        let identity = identity(&primary);
        if written != lower::encode_string(&identity) {
            return Err(KeyError::new(name, path.display(), KeyReason::Invalid).because(FileError::Damaged));
        }
        Ok(Self {
            name: name.to_owned(),
            path: path.to_owned(),
            backup,
            primary,
            identity: lower::encode_string(&identity),
        })
    }

    /// Seals `primary`, which is that of the provider at `path`, to a TPM and its registers. The file is replaced once the TPM
    /// has given the key back, and what it was is written over.
    ///
    /// # Errors
    /// [`KeyError`]; the file is as it was then.
    pub(super) fn seal(
        name: &str,
        path: &Path,
        primary: &SecretBytes,
        tpm: &Device,
        pcrs: Selection,
    ) -> Result<(), KeyError> {
        let fail = |reason, source: Box<dyn Error + Send + Sync>| {
            KeyError::new(name, path.display(), reason).because(source)
        };
        let identity = lower::encode_string(&identity(primary));
        let host = |e: io::Error| fail(KeyReason::Host, e.into());
        let there = read_identity(path).map_err(host)?;
        if let Some(there) = there.filter(|there| *there != identity) {
            return Err(fail(
                KeyReason::Invalid,
                FileError::OtherKey(identity, there).into(),
            ));
        }
        let sealed = Tpm::open(tpm)
            .and_then(|mut opened| opened.seal(primary, pcrs))
            .map_err(|e| tpm_failed(name, tpm, e))?;
        let key = SealedKey {
            tpm: tpm.clone(),
            identity,
            sealed,
        };
        if !key.unseal(name)?.ct_eq(primary) {
            return Err(KeyError::new(name, tpm, KeyReason::Garbled)
                .because("it unseals a key that differs from the sealed key"));
        }
        let text = serde_json::to_string_pretty(&key).expect("texts are JSON") + "\n";
        private_file::replace_wiping(path, text.as_bytes()).map_err(host)
    }

    /// The primary key, to be backed up.
    pub(super) fn into_primary(self) -> SecretBytes {
        self.primary
    }

    fn recognise(&self, key_id: &KeyId) -> Result<(), ForeignKey> {
        let (wanted, number) = key_id.0.split_once('.').ok_or(ForeignKey::Form)?;
        let uuid = Uuid::try_parse(number).map_err(|_| ForeignKey::Form)?;
        if uuid.to_string() != number {
            return Err(ForeignKey::Form);
        }
        if wanted == self.identity {
            Ok(())
        } else {
            Err(ForeignKey::OtherPrimary {
                wanted: wanted.to_owned(),
                held: self.identity.clone(),
            })
        }
    }

    /// Makes sure that the file still has the primary key that is in memory: what is bound to that one alone is lost with this
    /// process. A sealed key is not asked of its TPM again.
    fn check_file(&self) -> Result<(), KeyError> {
        let there = match Content::read(&self.name, &self.path)? {
            Content::Plain { primary, .. } => lower::encode_string(&identity(&primary)),
            Content::Sealed(sealed) => sealed.identity,
        };
        match there == self.identity {
            true => Ok(()),
            false => Err(KeyError::new(&self.name, self.path.display(), KeyReason::Invalid)
                .because(FileError::Replaced(there, self.identity.clone()))),
        }
    }

    fn fail(&self, key_id: &KeyId, reason: KeyReason) -> KeyError {
        KeyError::new(&self.name, self.path.display(), reason).of(key_id)
    }
}

impl KekSource for Native {
    fn name(&self) -> &str {
        &self.name
    }

    fn location(&self) -> String {
        self.path.display().to_string()
    }

    fn create_kek(&self) -> Result<KeyId, KeyError> {
        if self.backup == Backup::None {
            return Err(KeyError::new(
                &self.name,
                self.path.display(),
                KeyReason::NotBackedUp,
            ));
        }
        self.check_file()?;
        Ok(KeyId(format!("{}.{}", self.identity, Uuid::new_v4())))
    }

    fn fetch(&self, key_id: &KeyId) -> Result<Kek, KeyError> {
        self.recognise(key_id)
            .map_err(|e| self.fail(key_id, KeyReason::Missing).because(e))?;
        let kek = derive(&self.primary, b"sealblk native KEK\0", key_id.0.as_bytes())
            .map_err(|e| self.fail(key_id, KeyReason::Host).because(e))?;
        Ok(Kek::new(kek).expect("it is derived at this length"))
    }

    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError> {
        if self.recognise(key_id).is_err() {
            return Ok(KeyState::Missing);
        }
        self.check_file().map_err(|e| e.of(key_id))?;
        Ok(KeyState::Active)
    }
}

impl fmt::Debug for Native {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Native")
            .field("name", &self.name)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// What a primary key's file holds.
enum Content {
    Plain { primary: SecretBytes, identity: String },
    Sealed(SealedKey),
}

impl Content {
    fn read(name: &str, path: &Path) -> Result<Self, KeyError> {
        let fail = |reason, source: Box<dyn Error + Send + Sync>| {
            KeyError::new(name, path.display(), reason).because(source)
        };
        let invalid = || fail(KeyReason::Invalid, FileError::Magic.into());
        let content = settings_file::read(path, MAX_FILE).map_err(|e| match &e {
            Unreadable::Io(io) if io.kind() == io::ErrorKind::NotFound => fail(KeyReason::Missing, e.into()),
            _ => fail(e.reason(), e.into()),
        })?;
        match content.strip_prefix(MAGIC) {
            Some(key) if content.len() == FILE_LEN => {
                let (key, identity) = key.split_at(PRIMARY_LEN);
                Ok(Self::Plain {
                    primary: SecretBytes::copy_of(key).map_err(|e| fail(KeyReason::Host, e.into()))?,
                    identity: lower::encode_string(identity),
                })
            }
            Some(_) => Err(invalid()),
            None => SealedKey::parse(&content).map(Self::Sealed).ok_or_else(invalid),
        }
    }
}

impl SealedKey {
    fn parse(content: &[u8]) -> Option<Self> {
        parsing::json(content).ok()
    }

    fn unseal(&self, name: &str) -> Result<SecretBytes, KeyError> {
        let unsealed = Tpm::open(&self.tpm).and_then(|mut tpm| tpm.unseal(&self.sealed));
        unsealed.map_err(|e| tpm_failed(name, &self.tpm, e))
    }
}

/// What a TPM does not do for a provider.
fn tpm_failed(name: &str, tpm: &Device, error: TpmError) -> KeyError {
    let reason = match error.what {
        TpmFailure::Changed(_) => KeyReason::Attestation,
        TpmFailure::Io(_) => KeyReason::Unreachable,
        TpmFailure::Garbled { .. } => KeyReason::Garbled,
        TpmFailure::Refused { .. } => KeyReason::Failed,
        TpmFailure::Host(_) => KeyReason::Host,
    };
    KeyError::new(name, tpm, reason).because(error)
}

/// The identity of the key in a file, as far as that can be told without the key.
fn read_identity(path: &Path) -> io::Result<Option<String>> {
    let mut content = SecretBytes::zeroed(MAX_FILE).map_err(io::Error::other)?;
    let len = private_file::open(path)?.read(&mut content)?;
    Ok(match content[..len].strip_prefix(MAGIC) {
        Some(key) => key.get(PRIMARY_LEN..).map(lower::encode_string),
        None => SealedKey::parse(&content[..len]).map(|sealed| sealed.identity),
    })
}

/// A public name for a primary key, which reveals nothing of it.
fn identity(primary: &SecretBytes) -> [u8; IDENTITY_LEN] {
    on_wiped_stack(|| {
        let mut identity = [0; IDENTITY_LEN];
        expand(
            primary,
            &[b"sealblk native primary key identity\0"],
            &mut identity,
        );
        identity
    })
}

fn derive(primary: &SecretBytes, label: &[u8], context: &[u8]) -> Result<SecretBytes, ArenaError> {
    let mut key = SecretBytes::zeroed(KEK_LEN)?;
    on_wiped_stack(|| expand(primary, &[label, context], &mut key));
    Ok(key)
}

fn expand(primary: &SecretBytes, info: &[&[u8]], out: &mut [u8]) {
    Hkdf::<Sha256>::new(None, primary)
        .expand_multi_info(info, out)
        .expect("the requested length is below HKDF's limit of 8160 bytes");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{Binding, KeyProvider};
    use crate::providers::revoked::Revoked;
    use crate::providers::source::HostProvider;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    fn native(dir: &tempfile::TempDir, file: &str) -> Native {
        let path = dir.path().join(file);
        Native::create("native", &path).unwrap();
        Native::open("native", &path, Backup::Waived).unwrap()
    }

    #[test]
    fn reopened_provider_unwraps_what_it_wrapped_before() {
        let dir = tempfile::tempdir().unwrap();
        let revoked = || Revoked::of(dir.path(), "native");
        let before = HostProvider::new(Box::new(native(&dir, "primary.key")), Duration::ZERO, revoked());
        let key_id = before.create_kek().unwrap();
        let binding = Binding {
            volume: Uuid::new_v4(),
            provider: "native",
            key_id: &key_id,
            keyslot: 3,
        };
        let secret = SecretBytes::random(32).unwrap();
        let wrapped = before.wrap(&binding, &secret).unwrap();
        let after = Native::open("native", &dir.path().join("primary.key"), Backup::Waived).unwrap();
        let after = HostProvider::new(Box::new(after), Duration::ZERO, revoked());
        assert!(after.unwrap(&binding, &wrapped).unwrap().ct_eq(&secret));
    }

    #[test]
    fn key_of_another_primary_key_is_missing_not_corrupt() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (native(&dir, "one"), native(&dir, "two"));
        let error = two.fetch(&one.create_kek().unwrap()).unwrap_err();
        assert_eq!(error.reason, KeyReason::Missing);
        let cause = error.source.unwrap().to_string();
        assert!(
            cause.contains(&one.identity) && cause.contains(&two.identity),
            "{cause}"
        );
    }

    /// HKDF-SHA256 as computed by another implementation. If it changes, no volume in the field opens any more.
    #[test]
    fn derivation_stays_as_it_is() {
        let primary = SecretBytes::take(&mut [0x70; 32]).unwrap();
        assert_eq!(lower::encode_string(&identity(&primary)), "1f195b6cb64d675c");
        let kek = derive(&primary, b"sealblk native KEK\0", b"0011223344556677.a5").unwrap();
        assert_eq!(
            lower::encode_string(&kek),
            "9c82b1e2156dbad9c631118fd3b90734aca941b7db215c18cf12423a513db611"
        );
    }

    #[test]
    fn every_damaged_byte_of_the_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        native(&dir, "primary.key");
        let path = dir.path().join("primary.key");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(
                Native::open("native", &path, Backup::Waived).unwrap_err().reason,
                KeyReason::Invalid,
                "byte {at}"
            );
            fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(
                Native::open("native", &path, Backup::Waived).unwrap_err().reason,
                KeyReason::Invalid,
                "cut at {at}"
            );
        }
    }

    #[test]
    fn file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        native(&dir, "primary.key");
        let path = dir.path().join("primary.key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = Native::open("native", &path, Backup::Waived).unwrap_err();
        assert_eq!(error.reason, KeyReason::Invalid);
        assert!(error.source.unwrap().to_string().contains("chmod"));
    }

    #[test]
    fn primary_key_without_file_is_missing_and_no_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("primary.key");
        assert_eq!(
            Native::open("native", &path, Backup::Waived).unwrap_err().reason,
            KeyReason::Missing
        );
        fs::write(&path, b"precious").unwrap();
        assert_eq!(
            Native::create("native", &path).unwrap_err().reason,
            KeyReason::Host
        );
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
