//! A broker that releases a key to this host against a proof of what it has booted: Confidential Containers' Key Broker
//! Service (Trustee), or `sealblk broker`.
//!
//! The broker releases a resource of 32 bytes. The host makes KEKs and wraps them under the resource. Their ciphertexts are
//! part of the key IDs, and so are stored with the data ([`key_id`]). For each release the broker sends a fresh nonce, the
//! host makes a fresh key, and the TPM signs both together with its registers ([`release`]).
//!
//! The host can hold a released resource for a short time, so that hundreds of disks attached at once need one attestation.
//! A change of the host's state takes effect when that time is over. A held resource opens volumes and does nothing else:
//! before a volume is bound to a KEK, or loses another keyslot in favour of a KEK, the broker must release the resource
//! again. A list of keys needs one release for all of them.
//!
//! Brokers are tried in their order, like the servers of transit.

mod key_id;
mod release;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::key_id::WrappedKek;
use super::source::KekSource;
use super::tls::TlsFiles;
use super::{cache::KekCache, cache::Origin, cache::Wanted};
use super::{https, https::Failure, https::Server};
use super::{settings_file, settings_file::Unreadable};
use super::{wrap::Kek, wrap::UnwrapError};
use crate::kbs::ResourcePath;
use crate::keys::{KeyError, KeyId, KeyReason, KeyState};
use crate::parsing;
use crate::tpm::attest::AttestationKey;
use crate::tpm::{Device, Tpm, TpmError};
use sealblk_secmem::arena::SecretBytes;
use sealblk_secmem::private_file;

/// The default of [`Settings::timeout`], in seconds: TPMs are slow.
pub const TIMEOUT: u16 = 30;
/// The default of [`Settings::hold`], in seconds.
pub const HOLD: u16 = 60;

/// The longest file of an attestation key.
const KEY_LIMIT: usize = 16 << 10;

/// What a trusted provider has to be told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// The brokers, as `https://HOST:PORT`, in the order in which they are tried.
    pub addresses: Vec<String>,
    /// The certificates of the authorities that are believed: a PEM file, by absolute path.
    pub ca: PathBuf,
    /// The path of the resource that wraps KEKs: `REPOSITORY/TYPE/TAG`.
    pub resource: ResourcePath,
    /// This host's TPM.
    #[serde(default)]
    pub tpm: Device,
    /// How long a released resource is held, in seconds; with 0, each use of it is a release.
    #[serde(default = "hold")]
    pub hold: u16,
    /// How long a release may take, over all brokers, in seconds.
    #[serde(default = "timeout")]
    pub timeout: u16,
}

fn hold() -> u16 {
    HOLD
}

fn timeout() -> u16 {
    TIMEOUT
}

/// A key ID of another resource.
#[derive(Debug, thiserror::Error)]
#[error("the KEK is wrapped under the broker's resource {theirs}, but this provider uses {ours}")]
struct OtherResource {
    theirs: ResourcePath,
    ours: ResourcePath,
}

/// An attestation key that cannot be used.
#[derive(Debug, thiserror::Error)]
enum KeyFile {
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error("it is not an attestation key")]
    Form,
}

/// A trusted provider.
#[derive(Debug)]
pub(super) struct Trusted {
    name: String,
    settings: Settings,
    files: TlsFiles,
    key: AttestationKey,
    /// Its SubjectPublicKeyInfo.
    spki: Vec<u8>,
    /// The released resource, by its path.
    released: KekCache,
}

impl Settings {
    fn check(&self) -> Result<(), https::Setting> {
        if !self.tpm.is_absolute() {
            return Err(https::Setting::Relative("tpm"));
        }
        https::check(&self.addresses, [("ca", &self.ca)], self.timeout)
    }

    /// The files of its TLS connections: a host is known by its TPM, and shows no certificate.
    pub(super) fn tls_files(&self) -> TlsFiles {
        TlsFiles {
            ca: self.ca.clone(),
            identity: None,
        }
    }

    /// Where it is: the brokers' addresses.
    pub(super) fn location(&self) -> String {
        https::location(&self.addresses)
    }
}

impl Trusted {
    /// Makes this host's attestation key, if there is none in the provider's directory.
    ///
    /// # Errors
    /// [`KeyError`]: [`KeyReason::Invalid`] for settings that cannot be, [`KeyReason::Host`] if the TPM does not do it.
    pub(super) fn prepare(name: &str, settings: &Settings, dir: &Path) -> Result<(), KeyError> {
        settings
            .check()
            .map_err(|e| KeyError::new(name, "its settings", KeyReason::Invalid).because(e))?;
        let path = key_file(dir);
        if path.exists() {
            return Self::open(name, settings, dir).map(drop);
        }
        let make =
            || -> Result<AttestationKey, TpmError> { Tpm::open(&settings.tpm)?.create_attestation_key() };
        let key = make().map_err(|e| KeyError::new(name, &settings.tpm, KeyReason::Host).because(e))?;
        let json = serde_json::to_vec(&key).expect("texts are JSON");
        private_file::create_in_state(&path, &json)
            .map_err(|e| KeyError::new(name, path.display(), KeyReason::Host).because(e))
    }

    /// A provider with these settings, and the attestation key in `dir`. No broker is asked yet.
    ///
    /// # Errors
    /// [`KeyError`] with the reason [`KeyReason::Invalid`], if they cannot be used.
    pub(super) fn open(name: &str, settings: &Settings, dir: &Path) -> Result<Self, KeyError> {
        settings
            .check()
            .map_err(|e| KeyError::new(name, "its settings", KeyReason::Invalid).because(e))?;
        let path = key_file(dir);
        let (key, spki) = read_key(&path)
            .map_err(|e| KeyError::new(name, path.display(), KeyReason::Invalid).because(e))?;
        Ok(Self {
            name: name.to_owned(),
            settings: settings.clone(),
            files: settings.tls_files(),
            key,
            spki,
            released: KekCache::new(Duration::from_secs(settings.hold.into())),
        })
    }

    /// Makes this host's TPM known to the first broker of ours that answers, under the name that its operator has given it.
    ///
    /// # Errors
    /// [`KeyError`]: above all [`KeyReason::Refused`].
    pub(super) fn enrol(&self, host: &str, token: Option<&SecretBytes>) -> Result<(), KeyError> {
        self.ask(|server| self.enrol_at(server, host, token))
    }

    /// The attestation key's SubjectPublicKeyInfo, in DER.
    pub(super) fn attestation_key(&self) -> &[u8] {
        &self.spki
    }

    fn ask<T>(&self, request: impl Fn(&Server<'_>) -> Result<T, Failure>) -> Result<T, KeyError> {
        let timeout = Duration::from_secs(self.settings.timeout.into());
        https::ask(
            &self.name,
            &self.settings.addresses,
            timeout,
            |address, deadline| request(&Server::new(address, &self.files, deadline)?),
        )
    }

    /// The resource. Whoever comes while it is being released waits for that.
    fn resource(&self) -> Result<Arc<Kek>, KeyError> {
        let id = KeyId(self.settings.resource.to_string());
        self.released.drop_expired();
        let release = || Ok((self.ask(|server| self.release(server))?, Origin::Fetched));
        let (resource, _) = self.released.get(&id, Wanted::Fetched, release)?;
        Ok(resource)
    }

    /// The resource as a broker gives it out now, or has within the last `age`, whatever else is held.
    fn resource_within(&self, age: Duration) -> Result<Arc<Kek>, KeyError> {
        let id = KeyId(self.settings.resource.to_string());
        self.released.forget_older(&id, age);
        self.resource()
    }

    fn unwrapped(&self, key_id: &KeyId, kek: &WrappedKek, resource: &Kek) -> Result<Kek, KeyError> {
        kek.open(resource).map_err(|e| {
            let reason = match e {
                UnwrapError::Arena(_) => KeyReason::Host,
                _ => KeyReason::Unauthentic,
            };
            self.fail(reason).of(key_id).because(e)
        })
    }

    fn recognise(&self, key_id: &KeyId) -> Result<WrappedKek, KeyError> {
        let foreign = || self.fail(KeyReason::Missing).of(key_id);
        let kek = WrappedKek::parse(key_id).map_err(|e| foreign().because(e))?;
        let ours = &self.settings.resource;
        if kek.resource == *ours {
            return Ok(kek);
        }
        Err(foreign().because(OtherResource {
            theirs: kek.resource,
            ours: ours.clone(),
        }))
    }

    fn fail(&self, reason: KeyReason) -> KeyError {
        KeyError::new(&self.name, self.settings.location(), reason)
    }
}

impl KekSource for Trusted {
    fn name(&self) -> &str {
        &self.name
    }

    fn location(&self) -> String {
        self.settings.location()
    }

    fn create_kek(&self) -> Result<KeyId, KeyError> {
        let kek = WrappedKek::new(&self.settings.resource, &*self.resource_within(Duration::ZERO)?);
        Ok(kek.map_err(|e| self.fail(KeyReason::Host).because(e))?.key_id())
    }

    fn fetch(&self, key_id: &KeyId) -> Result<Kek, KeyError> {
        let kek = self.recognise(key_id)?;
        let resource = self.resource().map_err(|e| e.of(key_id))?;
        self.unwrapped(key_id, &kek, &resource)
    }

    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError> {
        self.state_within(key_id, Duration::ZERO)
    }

    fn state_within(&self, key_id: &KeyId, age: Duration) -> Result<KeyState, KeyError> {
        let Ok(kek) = self.recognise(key_id) else {
            return Ok(KeyState::Missing);
        };
        let resource = self.resource_within(age).map_err(|e| e.of(key_id));
        match resource.and_then(|resource| self.unwrapped(key_id, &kek, &resource)) {
            Ok(_) => Ok(KeyState::Active),
            Err(e) if matches!(e.reason, KeyReason::Missing | KeyReason::Unauthentic) => {
                Ok(KeyState::Missing)
            }
            Err(e) => Err(e),
        }
    }
}

fn key_file(dir: &Path) -> PathBuf {
    dir.join("attestation.key")
}

fn read_key(path: &Path) -> Result<(AttestationKey, Vec<u8>), KeyFile> {
    let json = settings_file::read(path, KEY_LIMIT)?;
    let key = parsing::json(&json).map_err(|_| KeyFile::Form)?;
    let spki = release::spki(&key).map_err(|_| KeyFile::Form)?;
    Ok((key, spki))
}
