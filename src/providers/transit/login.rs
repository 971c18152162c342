//! The login of this host at the server, and the token that it gets.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::failure::{Nonsense, Refusal};
use super::http::Server;
use crate::boot_time::BootTime;
use crate::keys::KeyReason;
use crate::providers::https::Failure;
use crate::providers::{settings_file, settings_file::Unreadable};
use sealblk_secmem::arena::SecretBytes;

/// The longest secret ID or token.
const CREDENTIAL_LIMIT: usize = 4096;

/// How this host logs in. Secrets are in files that their owner alone can read, named by absolute path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "method",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Login {
    /// AppRole: a role, and a secret that goes with it.
    Approle {
        /// The role's ID.
        role_id: String,
        /// The file of a secret ID.
        secret_id_file: PathBuf,
        /// Where the server has the method, under `auth/`.
        #[serde(default = "approle")]
        mount: String,
    },
    /// This host's TLS certificate.
    Cert {
        /// The certificate, and those between it and an authority that the server believes.
        certificate: PathBuf,
        /// Its private key.
        key: PathBuf,
        /// Where the server has the method, under `auth/`.
        #[serde(default = "cert")]
        mount: String,
    },
    /// A token that something else keeps fresh.
    Token {
        /// The token's file.
        token_file: PathBuf,
    },
}

/// What the server knows this host by for a while.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) secret: SecretBytes,
    /// When it is too old to begin something with.
    until: Option<BootTime>,
}

/// A file with a credential that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be used", path.display())]
struct CredentialError {
    path: PathBuf,
    source: Unusable,
}

#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error("it is not one line of up to {CREDENTIAL_LIMIT} printable ASCII characters")]
    Form,
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow)]
    auth: Auth<'a>,
}

#[derive(Deserialize)]
struct Auth<'a> {
    client_token: &'a str,
    /// In seconds; 0 is for ever.
    lease_duration: u32,
}

/// The usual mount of [`Login::Approle`].
pub fn approle() -> String {
    "approle".to_owned()
}

/// The usual mount of [`Login::Cert`].
pub fn cert() -> String {
    "cert".to_owned()
}

impl Login {
    /// Logs in at `server`.
    pub(super) fn log_in(&self, server: &Server<'_>) -> Result<Token, Failure> {
        match self {
            Login::Approle {
                role_id,
                secret_id_file,
                mount,
            } => {
                #[derive(Serialize)]
                struct Role<'a> {
                    role_id: &'a str,
                    secret_id: &'a str,
                }
                let secret_id = read_credential(secret_id_file)?;
                let secret_id = std::str::from_utf8(&secret_id).expect("what is read is ASCII");
                let refused = |refusal: Refusal| refusal.of_an_approle(secret_id_file);
                token(server, mount, &Role { role_id, secret_id }, refused)
            }
            Login::Cert { mount, .. } => {
                #[derive(Serialize)]
                struct Empty {}
                token(server, mount, &Empty {}, Refusal::of_a_login)
            }
            Login::Token { token_file } => Ok(Token {
                secret: read_credential(token_file)?,
                until: None,
            }),
        }
    }
}

impl Token {
    pub(super) fn is_fresh(&self) -> bool {
        self.until.is_none_or(|until| BootTime::now() < until)
    }
}

fn token(
    server: &Server<'_>,
    mount: &str,
    credentials: &impl Serialize,
    refused: impl FnOnce(Refusal) -> Failure,
) -> Result<Token, Failure> {
    // The lease runs from when the server grants it, which is after this.
    let asked = BootTime::now();
    let answer = server.post(&format!("auth/{mount}/login"), None, credentials)?;
    let body = answer.body().map_err(refused)?;
    let Auth {
        client_token,
        lease_duration,
    } = body.parse::<Answer<'_>>()?.auth;
    if !is_credential(client_token.as_bytes()) {
        return Err(Nonsense::Token.into());
    }
    let secret = SecretBytes::copy_of(client_token.as_bytes())?;
    let lease = Duration::from_secs(lease_duration.into());
    let until = (!lease.is_zero()).then(|| asked + lease * 9 / 10);
    Ok(Token { secret, until })
}

/// One line of what can stand in a header.
pub(super) fn is_credential(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.len() <= CREDENTIAL_LIMIT && bytes.iter().all(u8::is_ascii_graphic)
}

fn read_credential(path: &Path) -> Result<SecretBytes, Failure> {
    let unusable = |reason, source| {
        let path = path.to_owned();
        Failure::new(reason, CredentialError { path, source })
    };
    let mut credential =
        settings_file::read(path, CREDENTIAL_LIMIT + 1).map_err(|e| unusable(e.reason(), e.into()))?;
    // As an editor or `echo` leaves it.
    if credential.last() == Some(&b'\n') {
        credential.truncate(credential.len() - 1);
    }
    match is_credential(&credential) {
        true => Ok(credential),
        false => Err(unusable(KeyReason::Invalid, Unusable::Form)),
    }
}
