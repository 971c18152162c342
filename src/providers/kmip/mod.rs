//! The KMIP provider: KEKs of a key server, or of a group of servers with the same keys, over mutual TLS.
//!
//! A KEK is an AES-256 key that the server makes. With `wrap = "client"` the KEK comes to this host by Get, and its key
//! ID is the Unique Identifier. With `wrap = "server"` the server's key never leaves it: the KEK is made here, and the key
//! ID holds its ciphertext under the server's key beside the Unique Identifier, so that a volume stays self-contained:
//!
//! ```text
//! UNIQUE-IDENTIFIER.BASE64(nonce, 12 bytes | ciphertext, 32 bytes | tag, 16 bytes)      AES-256-GCM
//! ```
//!
//! In both cases each fetch checks the key's State at the server, not only whether the server does the operation.
//!
//! ```text
//! address   the address of a server
//! wrapping  the key under which the server wraps KEKs for this host
//! session   a connection: TLS, the protocol's version, requests one by one until a deadline
//! message   requests and answers
//! ttlv      the encoding
//! ```

mod address;
pub mod message;
mod session;
pub mod ttlv;
mod wrapping;

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{source::KekSource, source::LONGEST_TIMEOUT};
use super::{tls::Identity, tls::TlsFiles};
use super::{wrap::KEK_LEN, wrap::Kek};
use crate::error_chain::causes;
use crate::keys::{Binding, KeyError, KeyId, KeyReason, KeyState, Reach, Revocation};
use address::Address;
use message::{Mark, NONCE_LEN, PRODUCT, Request, TAG_LEN, Use, Version, identifies};
use sealblk_secmem::arena::{ArenaError, SecretBytes};
use session::{Session, Trouble, share};
pub use wrapping::WrappingKey;

/// What the operator says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `HOST[:PORT]` of servers with the same keys, in the order in which they are tried.
    pub servers: Vec<String>,
    /// The certificates of the authorities that the servers' certificates come from. A PEM file, as the next two are.
    pub ca: PathBuf,
    /// This host's certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Where slot secrets' KEKs are in clear.
    #[serde(default)]
    pub wrap: Wrap,
    /// What KEKs are under on their way to this host, beside TLS.
    #[serde(default, rename = "wrapping-key", skip_serializing_if = "Option::is_none")]
    pub wrapping_key: Option<WrappingKey>,
    /// How long an operation may take, over all servers, in seconds.
    #[serde(default = "default_timeout")]
    pub timeout: u64,
}

/// Who has the key that comes from the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wrap {
    /// This host: it fetches the key and wraps under it.
    #[default]
    Client,
    /// The server alone: it decrypts a KEK that was made on this host.
    Server,
}

/// The setting `timeout` when it is not given, in seconds.
pub const DEFAULT_TIMEOUT: u64 = 10;
/// The longest that a binding waits for the server to take note of it.
const USE_TIMEOUT: Duration = Duration::from_secs(2);
/// The Name of the key that `check` proves the provider with.
const PROBE: &str = "sealblk-probe";
/// What a KEK's ciphertext is authenticated with: it is no other message under the same key.
const LABEL: &[u8] = b"sealblk KMIP wrapped KEK\0";

fn default_timeout() -> u64 {
    DEFAULT_TIMEOUT
}

/// A KMIP provider.
pub(super) struct Kmip {
    name: String,
    servers: Vec<Address>,
    tls: TlsFiles,
    wrap: Wrap,
    wrapping_key: Option<WrappingKey>,
    timeout: Duration,
    /// The server that answered last. It is asked first.
    preferred: AtomicUsize,
}

/// What is wrong with the settings. What stands there is not shown: it may be a secret in the wrong place.
#[derive(Debug, thiserror::Error)]
enum SettingsError {
    #[error("servers: name at least one")]
    NoServer,
    #[error(
        "servers: number {number} is not the address of a server: {}",
        address::NoAddress
    )]
    Server { number: usize },
    #[error("{0}: write an absolute path")]
    Relative(&'static str),
    #[error("wrapping-key: with wrap = \"server\" no key leaves the server; use only one of the two")]
    Wrapping,
    #[error("wrapping-key.id: this is not a Unique Identifier, which is visible ASCII")]
    WrappingId,
    #[error("timeout = {0}: must be 1 to {LONGEST_TIMEOUT} seconds")]
    Timeout(u64),
}

/// What each of several servers said.
#[derive(Debug)]
struct Each(Vec<(Address, Trouble)>);

/// A key ID as this provider makes them.
enum Identifier<'a> {
    /// The KEK is the server's key.
    Key(&'a str),
    /// The KEK was encrypted by the server's key.
    Wrapped { by: &'a str, kek: [u8; WRAPPED_LEN] },
}

const WRAPPED_LEN: usize = NONCE_LEN + KEK_LEN + TAG_LEN;

impl Kmip {
    /// A provider with these settings. No server is asked yet, and no file is read.
    ///
    /// # Errors
    /// [`KeyError`] with the reason [`KeyReason::Invalid`], if the settings have not the right form.
    pub(super) fn new(name: &str, settings: &Settings) -> Result<Self, KeyError> {
        settings
            .usable(name)
            .map_err(|e| KeyError::new(name, "its settings", KeyReason::Invalid).because(e))
    }

    /// Lets the servers do `work`, one after the other until one has.
    fn with_server<T>(
        &self,
        key_id: Option<&KeyId>,
        work: impl Fn(&mut Session) -> Result<T, Trouble>,
    ) -> Result<T, KeyError> {
        self.within(self.timeout, key_id, work)
    }

    fn within<T>(
        &self,
        timeout: Duration,
        key_id: Option<&KeyId>,
        work: impl Fn(&mut Session) -> Result<T, Trouble>,
    ) -> Result<T, KeyError> {
        let about = |error: KeyError| match key_id {
            Some(key_id) => error.of(key_id),
            None => error,
        };
        let tls = self.tls.load().map_err(|e| {
            let hop = e.path.display().to_string();
            about(KeyError::new(&self.name, hop, e.reason()).because(e))
        })?;
        let deadline = Instant::now() + timeout;
        let count = self.servers.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut failed = Vec::new();
        for turn in 0..count {
            let at = (first + turn) % count;
            let address = &self.servers[at];
            let deadline = share(deadline, count - turn);
            match Session::open(address, &tls, deadline).and_then(|mut session| work(&mut session)) {
                Ok(done) => {
                    self.preferred.store(at, Ordering::Relaxed);
                    return Ok(done);
                }
                Err(trouble) if trouble.is_verdict() || count == 1 => {
                    return Err(about(self.fail(&[address], trouble.reason()).because(trouble)));
                }
                Err(trouble) => failed.push((address.clone(), trouble)),
            }
        }
        let reasons = failed.iter().map(|(_, trouble)| trouble.reason());
        // That a server does not answer tells less than what another one answered.
        let reason = reasons
            .clone()
            .find(|reason| *reason != KeyReason::Unreachable)
            .unwrap_or(KeyReason::Unreachable);
        let addresses: Vec<_> = failed.iter().map(|(address, _)| address).collect();
        Err(about(self.fail(&addresses, reason).because(Each(failed))))
    }

    fn fail(&self, at: &[&Address], reason: KeyReason) -> KeyError {
        let at: Vec<_> = at.iter().map(ToString::to_string).collect();
        KeyError::new(&self.name, at.join(", "), reason)
    }

    /// The key that KEKs come under, if there is to be one.
    fn load_wrapping_key(&self) -> Result<Option<(&WrappingKey, SecretBytes)>, KeyError> {
        let Some(wrapping) = &self.wrapping_key else {
            return Ok(None);
        };
        let key = wrapping
            .load()
            .map_err(|e| KeyError::new(&self.name, wrapping.file.display(), e.reason()).because(e))?;
        Ok(Some((wrapping, key)))
    }

    /// A KEK under a key that the server has ready for use.
    fn kek_under(&self, session: &mut Session, key: &str) -> Result<KeyId, Trouble> {
        Ok(KeyId(match self.wrap {
            Wrap::Client => key.to_owned(),
            Wrap::Server => {
                let kek = SecretBytes::random(KEK_LEN)?;
                let wrapped = encrypt(session, key, &kek)?;
                format!("{key}.{}", URL_SAFE_NO_PAD.encode(wrapped))
            }
        }))
    }

    /// Makes a key called `name` and activates it. The server marks it as sealblk's in the best way that it has.
    fn create_key(&self, session: &mut Session, name: &str) -> Result<String, Trouble> {
        let knows_sensitive = session.version() >= Version::V1_4;
        let sensitive = match self.wrap {
            Wrap::Server if !knows_sensitive => return Err(Trouble::NoWrapping(session.version())),
            Wrap::Server => true,
            // A sensitive key is given out wrapped, and never in clear.
            Wrap::Client => self.wrapping_key.is_some() && knows_sensitive,
        };
        let mut create = |mark| {
            let request = Request::Create {
                name,
                mark,
                sensitive,
            };
            session.ask(&request, |answer| answer.unique_identifier().map(str::to_owned))
        };
        let mut created = create(Mark::Vendor);
        for mark in [Mark::Application, Mark::Name] {
            match &created {
                // It may be the mark that is refused; what else it may be is told by the last refusal.
                Err(trouble @ Trouble::Refused { .. }) if !trouble.is_verdict() => created = create(mark),
                _ => break,
            }
        }
        let key = created?;
        match session.order(&Request::Activate(&key)) {
            Ok(()) => Ok(key),
            Err(trouble) => {
                // Nothing will ever refer to it.
                let _ = session.order(&Request::Destroy(&key));
                Err(trouble)
            }
        }
    }

    /// Makes a KEK whose key is called `name`.
    fn create(&self, session: &mut Session, name: &str) -> Result<KeyId, Trouble> {
        let key = self.create_key(session, name)?;
        self.kek_under(session, &key).inspect_err(|_| {
            let _ = session.order(&Request::Revoke(&key));
            let _ = session.order(&Request::Destroy(&key));
        })
    }

    /// A key ID's parts, unless no provider with these settings would make it.
    fn recognise<'a>(&self, key_id: &'a KeyId) -> Option<Identifier<'a>> {
        match self.wrap {
            Wrap::Client => Identifier::key_of(key_id),
            Wrap::Server => Identifier::wrapped_of(key_id),
        }
    }
}

impl KekSource for Kmip {
    fn name(&self) -> &str {
        &self.name
    }

    fn location(&self) -> String {
        let servers: Vec<_> = self.servers.iter().map(ToString::to_string).collect();
        servers.join(", ")
    }

    fn create_kek(&self) -> Result<KeyId, KeyError> {
        let name = format!("sealblk-{}", Uuid::new_v4());
        self.with_server(None, |session| self.create(session, &name))
    }

    fn fetch(&self, key_id: &KeyId) -> Result<Kek, KeyError> {
        let Some(identifier) = self.recognise(key_id) else {
            return Err(KeyError::new(&self.name, self.location(), KeyReason::Missing)
                .of(key_id)
                .because(Foreign));
        };
        let wrapping = self.load_wrapping_key().map_err(|e| e.of(key_id))?;
        self.with_server(Some(key_id), |session| {
            match key_state(session, identifier.key())? {
                KeyState::Active => (),
                state => return Err(Trouble::State(state)),
            }
            let kek = match &identifier {
                Identifier::Key(key) => get(session, key, wrapping.as_ref())?,
                Identifier::Wrapped { by, kek } => decrypt(session, by, kek)?,
            };
            Kek::new(kek).map_err(|e| Trouble::NoKek(e.into()))
        })
    }

    /// Tells the server what its key is used for, by the three attributes that vSphere has for that, or in one that every
    /// server may have where those are refused.
    fn used(&self, binding: &Binding<'_>) {
        let Some(identifier) = self.recognise(binding.key_id) else {
            return;
        };
        let key = identifier.key();
        let volume = binding.volume.to_string();
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let custom = [
            ("x-Component", PRODUCT),
            ("x-Name", host.trim()),
            ("x-Identifier", &volume),
        ]
        .map(|(name, content)| Use::Custom { name, content });
        let timeout = self.timeout.min(USE_TIMEOUT);
        let told = self.within(timeout, Some(binding.key_id), |session| {
            let mut add = |attribute| session.order(&Request::AddAttribute { key, attribute });
            match custom.into_iter().try_for_each(&mut add) {
                Err(Trouble::Refused { .. }) => add(Use::Application(&volume)),
                told => told,
            }
            .or_else(|trouble| match trouble {
                // Another server of the same keys would refuse it too.
                Trouble::Refused { .. } => Ok(()),
                trouble => Err(trouble),
            })
        });
        if let Err(error) = told {
            tracing::debug!(
                provider = self.name,
                "cannot mark the key at its server with the volume that uses it: {error}"
            );
        }
    }

    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError> {
        match self.recognise(key_id) {
            None => Ok(KeyState::Missing),
            Some(identifier) => {
                self.with_server(Some(key_id), |session| key_state(session, identifier.key()))
            }
        }
    }

    /// The server's key is what a revocation is of, and all KEKs under it go along: under which provider of this host they were
    /// noted does not matter, since several can name one server, by several addresses.
    fn takes_along(&self, key_id: &KeyId, other: &KeyId) -> bool {
        let own = self.recognise(key_id);
        own.is_some_and(|own| server_keys(other).any(|key| key == own.key()))
    }

    fn destroys_keys(&self) -> bool {
        true
    }

    /// A key that is not active any more is not revoked again, which servers refuse.
    fn revoke(&self, key_id: &KeyId, revocation: Revocation) -> Result<Reach, KeyError> {
        let Some(identifier) = self.recognise(key_id) else {
            return Err(KeyError::new(&self.name, self.location(), KeyReason::Missing)
                .of(key_id)
                .because(Foreign));
        };
        let key = identifier.key();
        self.with_server(Some(key_id), |session| {
            let state = key_state(session, key)?;
            // A server may take "01" for "1": what else is bound to the key is known by the server's own spelling alone.
            let spelled = session.ask(&Request::GetIdentifier(key), |answer| {
                answer.identifier().map(str::to_owned)
            })?;
            if spelled != key {
                return Err(Trouble::Spelled(spelled));
            }
            if state == KeyState::Active {
                session.order(&Request::Revoke(key))?;
            }
            if revocation == Revocation::Destroy && state != KeyState::Destroyed {
                session.order(&Request::Destroy(key))?;
            }
            Ok(Reach::Server)
        })
    }

    fn probe_kek(&self) -> Result<KeyId, KeyError> {
        self.with_server(None, |session| {
            let located = session.ask(&Request::Locate { name: PROBE }, |answer| {
                Ok(answer.located()?.map(str::to_owned))
            })?;
            match located {
                Some(key) => self.kek_under(session, &key),
                None => self.create(session, PROBE),
            }
        })
    }
}

/// A key ID that this provider has not made.
#[derive(Debug, thiserror::Error)]
#[error("a provider with these settings does not make key IDs of this form")]
struct Foreign;

/// The keys of a server that `key_id` can be about, whichever way of wrapping it was made for.
fn server_keys(key_id: &KeyId) -> impl Iterator<Item = &str> {
    let forms = [Identifier::key_of(key_id), Identifier::wrapped_of(key_id)];
    forms.into_iter().flatten().map(|identifier| identifier.key())
}

impl<'a> Identifier<'a> {
    fn key_of(key_id: &'a KeyId) -> Option<Self> {
        identifies(&key_id.0).then_some(Identifier::Key(&key_id.0))
    }

    fn wrapped_of(key_id: &'a KeyId) -> Option<Self> {
        let (by, kek) = key_id.0.rsplit_once('.')?;
        let kek = URL_SAFE_NO_PAD.decode(kek).ok()?.try_into().ok()?;
        identifies(by).then_some(Identifier::Wrapped { by, kek })
    }

    /// The server's key.
    fn key(&self) -> &'a str {
        match self {
            Identifier::Key(key) | Identifier::Wrapped { by: key, .. } => key,
        }
    }
}

fn key_state(session: &mut Session, key: &str) -> Result<KeyState, Trouble> {
    match session.ask(&Request::GetState(key), |answer| answer.state()) {
        Err(trouble @ Trouble::Refused { .. }) if trouble.reason() == KeyReason::Missing => {
            Ok(KeyState::Missing)
        }
        told => told,
    }
}

/// Has the server give out a key, under the key that is named if one is.
fn get(
    session: &mut Session,
    key: &str,
    wrapping: Option<&(&WrappingKey, SecretBytes)>,
) -> Result<SecretBytes, Trouble> {
    let wrapped_by = wrapping.map(|(wrapping, _)| &*wrapping.id);
    let request = Request::Get { key, wrapped_by };
    match wrapping {
        None => session.ask(&request, |answer| answer.key()),
        Some((wrapping, key)) => {
            let wrapped = session.ask(&request, |answer| answer.wrapped_key())?;
            wrapping.unwrap(key, &wrapped)
        }
    }
}

/// Lets the server encrypt a KEK.
fn encrypt(session: &mut Session, key: &str, kek: &SecretBytes) -> Result<Vec<u8>, Trouble> {
    let mut nonce = [0; NONCE_LEN];
    getrandom::fill(&mut nonce).map_err(ArenaError::Random)?;
    let request = Request::Encrypt {
        key,
        nonce: &nonce,
        additional: LABEL,
        data: kek,
    };
    session.ask(&request, |answer| {
        let encrypted = answer.encrypted(KEK_LEN)?;
        Ok([encrypted.nonce.unwrap_or(&nonce), encrypted.data, encrypted.tag].concat())
    })
}

/// Lets the server decrypt a KEK.
fn decrypt(session: &mut Session, key: &str, wrapped: &[u8; WRAPPED_LEN]) -> Result<SecretBytes, Trouble> {
    if session.version() < Version::V1_4 {
        return Err(Trouble::NoWrapping(session.version()));
    }
    let (nonce, rest) = wrapped.split_at(NONCE_LEN);
    let (data, tag) = rest.split_at(KEK_LEN);
    let request = Request::Decrypt {
        key,
        nonce,
        additional: LABEL,
        data,
        tag,
    };
    session.ask(&request, |answer| answer.decrypted())
}

impl Settings {
    /// The files that connections are made with.
    pub(super) fn tls_files(&self) -> TlsFiles {
        TlsFiles {
            ca: self.ca.clone(),
            identity: Some(Identity {
                certificate: self.certificate.clone(),
                key: self.key.clone(),
            }),
        }
    }

    /// Where the provider is: the servers, as they are shown.
    pub(super) fn location(&self) -> String {
        let shown = self.servers.iter().map(|text| match text.parse::<Address>() {
            Ok(_) => text.as_str(),
            Err(_) => "(no address)",
        });
        shown.collect::<Vec<_>>().join(", ")
    }

    /// The provider that has them, if they are of the right form.
    fn usable(&self, name: &str) -> Result<Kmip, SettingsError> {
        let servers: Vec<Address> = self
            .servers
            .iter()
            .zip(1..)
            .map(|(text, number)| text.parse().map_err(|_| SettingsError::Server { number }))
            .collect::<Result<_, _>>()?;
        if servers.is_empty() {
            return Err(SettingsError::NoServer);
        }
        for (field, path) in [
            ("ca", &self.ca),
            ("certificate", &self.certificate),
            ("key", &self.key),
        ] {
            if !path.is_absolute() {
                return Err(SettingsError::Relative(field));
            }
        }
        if let Some(WrappingKey { id, file }) = &self.wrapping_key {
            if self.wrap == Wrap::Server {
                return Err(SettingsError::Wrapping);
            }
            if !identifies(id) {
                return Err(SettingsError::WrappingId);
            }
            if !file.is_absolute() {
                return Err(SettingsError::Relative("wrapping-key.file"));
            }
        }
        if !(1..=LONGEST_TIMEOUT.into()).contains(&self.timeout) {
            return Err(SettingsError::Timeout(self.timeout));
        }
        Ok(Kmip {
            name: name.to_owned(),
            servers,
            tls: self.tls_files(),
            wrap: self.wrap,
            wrapping_key: self.wrapping_key.clone(),
            timeout: Duration::from_secs(self.timeout),
            preferred: AtomicUsize::new(0),
        })
    }
}

impl fmt::Debug for Kmip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kmip")
            .field("name", &self.name)
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Each {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (address, trouble)) in self.0.iter().enumerate() {
            write!(f, "{}{address}: {trouble}", if number == 0 { "" } else { "; " })?;
            for cause in causes(trouble) {
                write!(f, ": {cause}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Each {}
