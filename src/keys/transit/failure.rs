//! What went wrong with one server, before it is said of which provider and key.

use std::error::Error;
use std::io;

use rustls::pki_types::InvalidDnsNameError;

use crate::keys::arena::ArenaError;
use crate::keys::tls::{self, TlsFileError};
use crate::keys::{KeyReason, harmless};

/// A request that failed, and what an operator would act on.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: KeyReason,
    pub(super) cause: Box<dyn Error + Send + Sync>,
}

/// An answer that is an error: the server's own words, bounded and without control characters.
#[derive(Debug, thiserror::Error)]
#[error("it answers with the HTTP status {status}{words}")]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) words: String,
}

/// An answer that makes no sense. The place alone is told: what is there may be a secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum Nonsense {
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
    #[error("the answer is not the JSON that was expected, at line {line}, column {column}")]
    Json { line: usize, column: usize },
    #[error("the key in the answer is not base64")]
    Base64,
    #[error("the ciphertext in the answer is of no known form")]
    Ciphertext,
    #[error("the token in the answer cannot be one")]
    Token,
}

impl Failure {
    pub(super) fn new(reason: KeyReason, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let cause = cause.into();
        Self { reason, cause }
    }

    /// Whether another server may do better.
    pub(super) fn is_of_this_server(&self) -> bool {
        use KeyReason::{Failed, Garbled, Unreachable, Untrusted};
        matches!(self.reason, Unreachable | Untrusted | Failed | Garbled)
    }
}

impl Refusal {
    /// What the server has answered with `status`.
    pub(super) fn new(status: u16, body: &[u8]) -> Self {
        #[derive(serde::Deserialize)]
        struct Errors {
            errors: Vec<String>,
        }
        const SHOWN: usize = 256;
        let words = match serde_json::from_slice::<Errors>(body) {
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

impl From<Nonsense> for Failure {
    fn from(cause: Nonsense) -> Self {
        Self::new(KeyReason::Garbled, cause)
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::from(Nonsense::Json {
            line: error.line(),
            column: error.column(),
        })
    }
}

impl From<ArenaError> for Failure {
    fn from(cause: ArenaError) -> Self {
        Self::new(KeyReason::Host, cause)
    }
}

impl From<TlsFileError> for Failure {
    fn from(cause: TlsFileError) -> Self {
        Self::new(cause.reason(), cause)
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        use ureq::Error as Http;
        match error {
            Http::Io(error) => Self::from(error),
            Http::Timeout(_) | Http::HostNotFound | Http::ConnectionFailed => {
                Self::new(KeyReason::Unreachable, error)
            }
            Http::Other(cause) if cause.is::<InvalidDnsNameError>() => Self::new(KeyReason::Invalid, cause),
            error => Self::new(KeyReason::Garbled, error),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let inner = error.get_ref();
        if let Some(tls) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return Self::new(tls::reason(tls), error);
        }
        if inner.is_some_and(|inner| inner.is::<ureq::Error>()) {
            return Self::from(ureq::Error::from(error));
        }
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => KeyReason::Garbled,
            _ => KeyReason::Unreachable,
        };
        Self::new(reason, error)
    }
}
