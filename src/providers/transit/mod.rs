//! The transit provider: KEKs that the Transit secrets engine of OpenBao or HashiCorp Vault has made and wrapped.
//!
//! The server has one key, which never leaves it and can have many versions. A new KEK is a data key that the server
//! makes and returns wrapped under the newest version. The wrapped KEK is stored in the key ID ([`key_id`]); the server
//! does not store it. To use the KEK, this provider asks the server to unwrap it.
//!
//! ```text
//! create    POST  MOUNT/datakey/wrapped/NAME   {"bits": 256}           no plaintext travels
//! fetch     POST  MOUNT/decrypt/NAME           {"ciphertext": ...}
//! state     GET   MOUNT/keys/NAME              or as fetch, if that is not granted
//! ```
//!
//! The settings name one key of the server. A key ID with another key is refused, so that a volume's header cannot
//! make this host use other keys that its token permits.
//!
//! Servers are tried in their order. Each has an equal share of the remaining time. The next one is asked if a server is
//! unreachable or fails, but not if it refuses.

mod failure;
mod http;
mod key_id;
mod login;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};

use self::failure::{Nonsense, Refusal};
use self::http::Server;
use self::key_id::WrappedKek;
use self::login::Token;
use super::source::KekSource;
use super::{https, https::Failure};
use super::{tls::Identity, tls::TlsFiles};
use super::{wrap::KEK_LEN, wrap::Kek};
use crate::keys::{KeyError, KeyId, KeyReason, KeyState};
use crate::mutex::lock;
use sealblk_secmem::arena::SecretBytes;

pub use self::login::{Login, approle, cert};

/// The default of [`Settings::mount`].
pub const MOUNT: &str = "transit";

/// The default of [`Settings::timeout`], in seconds.
pub const TIMEOUT: u16 = 10;

/// What a transit provider has to be told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// The servers, as `https://HOST:PORT`, in the order in which they are tried.
    pub addresses: Vec<String>,
    /// The certificates of the authorities that are believed: a PEM file, by absolute path.
    pub ca: PathBuf,
    /// The server's key that wraps KEKs.
    pub transit_key: String,
    /// Where the server has the secrets engine.
    #[serde(default = "mount")]
    pub mount: String,
    /// The namespace that all of it is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// How long an operation may take, in seconds.
    #[serde(default = "timeout")]
    pub timeout: u16,
    /// How this host logs in.
    pub login: Login,
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
enum Setting {
    #[error(transparent)]
    Server(#[from] https::Setting),
    #[error("transit-key: this is not a valid name of a transit key")]
    Key,
    #[error(
        "{0}: this is not a valid path at the server, which has letters, digits, '-', '_' and '.', with '/' between names"
    )]
    Path(&'static str),
    #[error("login.role-id: this is not a valid ID of a role")]
    Role,
}

/// A key ID that is none of this provider's.
#[derive(Debug, thiserror::Error)]
#[error("the KEK is wrapped under the server's key {theirs:?}, but this provider uses {ours:?}")]
struct OtherKey {
    theirs: String,
    ours: String,
}

/// A transit provider, with the token that it has now.
#[derive(Debug)]
pub(super) struct Transit {
    name: String,
    settings: Settings,
    files: TlsFiles,
    token: Mutex<Option<Arc<Token>>>,
}

#[derive(Deserialize)]
struct Answer<T> {
    data: T,
}

fn mount() -> String {
    MOUNT.to_owned()
}

fn timeout() -> u16 {
    TIMEOUT
}

impl Settings {
    fn check(&self) -> Result<(), Setting> {
        if !key_id::is_key_name(&self.transit_key) {
            return Err(Setting::Key);
        }
        if let Login::Approle { role_id, .. } = &self.login
            && !login::is_credential(role_id.as_bytes())
        {
            return Err(Setting::Role);
        }
        let (mount, files) = match &self.login {
            Login::Approle {
                mount,
                secret_id_file,
                ..
            } => (Some(mount), vec![("login.secret-id-file", secret_id_file)]),
            Login::Cert {
                mount,
                certificate,
                key,
            } => (
                Some(mount),
                vec![("login.certificate", certificate), ("login.key", key)],
            ),
            Login::Token { token_file } => (None, vec![("login.token-file", token_file)]),
        };
        let in_urls = [
            ("mount", Some(&self.mount)),
            ("login.mount", mount),
            ("namespace", self.namespace.as_ref()),
        ];
        let wrong = |path: Option<&String>| path.is_some_and(|path| !is_path(path));
        if let Some((field, _)) = in_urls.into_iter().find(|(_, path)| wrong(*path)) {
            return Err(Setting::Path(field));
        }
        let files = files.into_iter().chain([("ca", &self.ca)]);
        Ok(https::check(&self.addresses, files, self.timeout)?)
    }

    /// The files that connections are made with.
    pub(super) fn tls_files(&self) -> TlsFiles {
        let identity = match &self.login {
            Login::Cert { certificate, key, .. } => Some(Identity {
                certificate: certificate.clone(),
                key: key.clone(),
            }),
            Login::Approle { .. } | Login::Token { .. } => None,
        };
        TlsFiles {
            ca: self.ca.clone(),
            identity,
        }
    }

    /// Where it is: the servers' addresses.
    pub(super) fn location(&self) -> String {
        https::location(&self.addresses)
    }
}

/// Names with slashes between them, of letters that mean nothing in a URL.
fn is_path(text: &str) -> bool {
    let is_name = |name: &str| {
        !name.is_empty()
            && name != "."
            && name != ".."
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    text.len() <= 256 && text.split('/').all(is_name)
}

impl Transit {
    /// A provider with these settings. No server is asked yet.
    ///
    /// # Errors
    /// [`KeyError`] with the reason [`KeyReason::Invalid`], if they cannot be.
    pub(super) fn new(name: &str, settings: &Settings) -> Result<Self, KeyError> {
        settings
            .check()
            .map_err(|e| KeyError::new(name, "its settings", KeyReason::Invalid).because(e))?;
        Ok(Self {
            name: name.to_owned(),
            settings: settings.clone(),
            files: settings.tls_files(),
            token: Mutex::default(),
        })
    }

    /// Has `request` answered by the first server that can.
    fn ask<T>(
        &self,
        request: impl Fn(&Server<'_>, &SecretBytes) -> Result<T, Failure>,
    ) -> Result<T, KeyError> {
        let timeout = Duration::from_secs(self.settings.timeout.into());
        https::ask(
            &self.name,
            &self.settings.addresses,
            timeout,
            |address, deadline| self.ask_one(address, deadline, &request),
        )
    }

    fn ask_one<T>(
        &self,
        address: &str,
        deadline: Instant,
        request: impl Fn(&Server<'_>, &SecretBytes) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let server = Server::new(address, self.settings.namespace.as_deref(), &self.files, deadline)?;
        let held = lock(&self.token).clone().filter(|token| token.is_fresh());
        if let Some(token) = held {
            match request(&server, &token.secret) {
                // Expired before its time, revoked, or of another server: a new one tells whether it is only that.
                Err(failure) if failure.reason == KeyReason::Refused => (),
                answer => return answer,
            }
        }
        // Whoever else needs a token meanwhile gets their own: nobody waits for another's slow server.
        let token = Arc::new(self.settings.login.log_in(&server)?);
        *lock(&self.token) = Some(Arc::clone(&token));
        request(&server, &token.secret)
    }

    fn path(&self, verb: &str) -> String {
        format!("{}/{verb}/{}", self.settings.mount, self.settings.transit_key)
    }

    fn recognise<'a>(&self, key_id: &'a KeyId) -> Result<WrappedKek<'a>, KeyError> {
        let foreign = || KeyError::new(&self.name, self.settings.location(), KeyReason::Missing).of(key_id);
        let kek = WrappedKek::parse(key_id).map_err(|e| foreign().because(e))?;
        let ours = &self.settings.transit_key;
        if kek.name == ours {
            return Ok(kek);
        }
        Err(foreign().because(OtherKey {
            theirs: kek.name.to_owned(),
            ours: ours.clone(),
        }))
    }

    fn decrypt(&self, kek: &WrappedKek<'_>) -> Result<Kek, KeyError> {
        #[derive(Serialize)]
        struct Wrapped<'a> {
            ciphertext: &'a str,
        }
        #[derive(Deserialize)]
        struct Plaintext<'a> {
            plaintext: &'a str,
        }
        let wrapped = Wrapped {
            ciphertext: kek.ciphertext,
        };
        self.ask(|server, token| {
            let answer = server.post(&self.path("decrypt"), Some(token), &wrapped)?;
            let body = answer.body().map_err(Refusal::of_a_key)?;
            let text = body.parse::<Answer<Plaintext<'_>>>()?.data.plaintext;
            let mut key = SecretBytes::zeroed(base64::decoded_len_estimate(text.len()))?;
            let len = BASE64_STANDARD
                .decode_slice(text, &mut key)
                .map_err(|_| Nonsense::Base64)?;
            key.truncate(len);
            Kek::new(key).map_err(|e| Failure::new(KeyReason::Garbled, e))
        })
    }

    /// The state of a version, as the server's key says.
    fn state_of_version(&self, version: u32) -> Result<KeyState, KeyError> {
        #[derive(Deserialize)]
        struct Key {
            latest_version: u32,
            min_decryption_version: u32,
            /// Older ones were removed for good.
            #[serde(default)]
            min_available_version: u32,
            #[serde(default)]
            soft_deleted: bool,
        }
        let key = self.ask(|server, token| {
            let answer = server.get(&self.path("keys"), token)?;
            let body = answer.body().map_err(Refusal::of_a_key)?;
            Ok(body.parse::<Answer<Key>>()?.data)
        })?;
        Ok(match version {
            version if version > key.latest_version => KeyState::Missing,
            version if version < key.min_available_version => KeyState::Destroyed,
            version if key.soft_deleted || version < key.min_decryption_version => KeyState::Deactivated,
            _ => KeyState::Active,
        })
    }
}

impl KekSource for Transit {
    fn name(&self) -> &str {
        &self.name
    }

    fn location(&self) -> String {
        self.settings.location()
    }

    fn create_kek(&self) -> Result<KeyId, KeyError> {
        #[derive(Serialize)]
        struct Size {
            bits: usize,
        }
        #[derive(Deserialize)]
        struct Wrapped<'a> {
            ciphertext: &'a str,
        }
        self.ask(|server, token| {
            let size = Size { bits: 8 * KEK_LEN };
            let answer = server.post(&self.path("datakey/wrapped"), Some(token), &size)?;
            let body = answer.body().map_err(Refusal::of_a_key)?;
            let ciphertext = body.parse::<Answer<Wrapped<'_>>>()?.data.ciphertext;
            let kek = WrappedKek::new(&self.settings.transit_key, ciphertext);
            Ok(kek.map_err(|_| Nonsense::Ciphertext)?.key_id())
        })
    }

    fn fetch(&self, key_id: &KeyId) -> Result<Kek, KeyError> {
        let kek = self.recognise(key_id)?;
        self.decrypt(&kek).map_err(|e| e.of(key_id))
    }

    fn state(&self, key_id: &KeyId) -> Result<KeyState, KeyError> {
        let Ok(kek) = self.recognise(key_id) else {
            return Ok(KeyState::Missing);
        };
        let state = self.state_of_version(kek.version).or_else(|e| match e.reason {
            // The token need not be allowed to look at the key, if it may use it.
            KeyReason::Refused => self.decrypt(&kek).map(|_| KeyState::Active),
            _ => Err(e),
        });
        state.or_else(|e| match e.reason {
            KeyReason::Missing | KeyReason::Unauthentic => Ok(KeyState::Missing),
            KeyReason::NotActive => Ok(KeyState::Deactivated),
            _ => Err(e.of(key_id)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORTEST: &str = "addresses = [\"https://bao1\"]\nca = \"/ca.pem\"\ntransit-key = \"sealblk\"\n";

    #[test]
    fn settings_that_are_left_out_have_defaults() {
        let role = "[login]\nmethod = \"approle\"\nrole-id = \"r\"\nsecret-id-file = \"/s\"\n";
        let settings: Settings = toml::from_str(&format!("{SHORTEST}{role}")).unwrap();
        settings.check().unwrap();
        assert_eq!(
            (settings.mount.as_str(), settings.namespace, settings.timeout),
            ("transit", None, TIMEOUT)
        );
        let Login::Approle { mount, .. } = settings.login else {
            panic!("another login");
        };
        assert_eq!(mount, "approle");
    }

    #[test]
    fn unknown_settings_are_refused() {
        let token = "[login]\nmethod = \"token\"\ntoken-file = \"/t\"\n";
        toml::from_str::<Settings>(&format!("{SHORTEST}{token}")).unwrap();
        for text in [
            format!("{SHORTEST}colour = 1\n{token}"),
            format!("{SHORTEST}{token}colour = 1\n"),
            format!("{SHORTEST}{token}role-id = \"r\"\n"),
            SHORTEST.to_owned(),
        ] {
            assert!(toml::from_str::<Settings>(&text).is_err(), "{text}");
        }
    }
}
