//! What went wrong with one server, before it is said of which provider and key.

use std::error::Error;
use std::io;

use rustls::pki_types::InvalidDnsNameError;

use crate::keys::KeyReason;
use crate::keys::arena::ArenaError;
use crate::keys::tls::{self, TlsFileError};

/// A request that failed, and what an operator would act on.
#[derive(Debug)]
pub(in crate::keys) struct Failure {
    pub(in crate::keys) reason: KeyReason,
    pub(in crate::keys) cause: Box<dyn Error + Send + Sync>,
    /// Where it failed, if not at the server.
    pub(in crate::keys) hop: Option<String>,
}

/// An answer that makes no sense. The place alone is told: what is there may be a secret.
#[derive(Debug, thiserror::Error)]
pub(in crate::keys) enum Nonsense {
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
    #[error("an answer wants more than {0} bytes sent back")]
    TooMuch(usize),
    #[error("the answer is not the JSON that was expected, at line {line}, column {column}")]
    Json { line: usize, column: usize },
}

impl Failure {
    pub(in crate::keys) fn new(reason: KeyReason, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let cause = cause.into();
        Self {
            reason,
            cause,
            hop: None,
        }
    }

    /// The same, which has nothing to do with the server.
    pub(in crate::keys) fn at(self, hop: impl ToString) -> Self {
        let hop = Some(hop.to_string());
        Self { hop, ..self }
    }

    /// Whether another server may do better.
    pub(in crate::keys) fn is_of_this_server(&self) -> bool {
        use KeyReason::{Failed, Garbled, Unreachable, Untrusted};
        matches!(self.reason, Unreachable | Untrusted | Failed | Garbled)
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
