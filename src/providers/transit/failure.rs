//! The meaning of a server's refusals.

use std::path::{Path, PathBuf};

use crate::harmless::harmless;
use crate::keys::KeyReason;
use crate::parsing;
use crate::providers::https::Failure;

/// An answer that is an error: the server's own words, bounded and without control characters.
#[derive(Debug, thiserror::Error)]
#[error("it answers with the HTTP status {status}{words}")]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) words: String,
}

/// A login by AppRole that the server does not take.
#[derive(Debug, thiserror::Error)]
#[error(
    "the login by AppRole failed; the secret ID in {} may have expired: put a new one there, and check the role ID",
    secret_id_file.display()
)]
struct WrongSecretId {
    secret_id_file: PathBuf,
    source: Refusal,
}

/// An answer that makes no sense. The place alone is told: what is there may be a secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum Nonsense {
    #[error("the key in the answer is not base64")]
    Base64,
    #[error("the ciphertext in the answer has an unknown form")]
    Ciphertext,
    #[error("the token in the answer is not valid")]
    Token,
}

impl Refusal {
    /// What the server has answered with `status`.
    pub(super) fn new(status: u16, body: &[u8]) -> Self {
        #[derive(serde::Deserialize)]
        struct Errors {
            errors: Vec<String>,
        }
        const SHOWN: usize = 256;
        let words = match parsing::json::<Errors>(body) {
            Ok(answer) if !answer.errors.is_empty() => {
                format!(": {}", harmless(&answer.errors.join("; "), SHOWN))
            }
            // A proxy's page, or nothing.
            _ => String::new(),
        };
        Self { status, words }
    }

    /// What it means when keys are asked for.
    pub(super) fn of_a_key(self) -> Failure {
        let says = |words: &str| self.words.contains(words);
        let reason = match self.status {
            403 => KeyReason::Refused,
            404 => KeyReason::Missing,
            // The server has one status for all of these, and tells them apart in words alone.
            400 if says("encryption key not found") || says("too new") => KeyReason::Missing,
            400 if says("too old") || says("soft-deleted") => KeyReason::NotActive,
            400 if says("message authentication failed") || says("invalid ciphertext") => {
                KeyReason::Unauthentic
            }
            _ => KeyReason::Failed,
        };
        Failure::new(reason, self)
    }

    /// What it means when this host logs in.
    pub(super) fn of_a_login(self) -> Failure {
        let reason = match self.status {
            // It may be the server's own error, as it sees it.
            _ if self.words.contains("x509: certificate") => KeyReason::Untrusted,
            400 | 401 | 403 | 404 => KeyReason::Refused,
            _ => KeyReason::Failed,
        };
        Failure::new(reason, self)
    }
}

impl Refusal {
    /// What it means when this host logs in by AppRole, with the secret ID of that file.
    pub(super) fn of_an_approle(self, secret_id_file: &Path) -> Failure {
        // OpenBao says "invalid role or secret ID", and Vault "invalid secret id" as well.
        if !self.words.to_lowercase().contains("secret id") {
            return self.of_a_login();
        }
        Failure::new(
            KeyReason::Refused,
            WrongSecretId {
                secret_id_file: secret_id_file.to_owned(),
                source: self,
            },
        )
    }
}

impl From<Nonsense> for Failure {
    fn from(cause: Nonsense) -> Self {
        Self::new(KeyReason::Garbled, cause)
    }
}
