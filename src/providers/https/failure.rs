//! Failures of one server, before provider and key are added to them.

use std::error::Error;
use std::io;

use rustls::pki_types::InvalidDnsNameError;

use crate::keys::KeyReason;
use crate::parsing::NotUnderstood;
use crate::providers::{tls::TlsFailure, tls::TlsFileError};
use sealblk_secmem::arena::ArenaError;

/// A request that failed, and what an operator would act on.
#[derive(Debug)]
pub(in crate::providers) struct Failure {
    pub(in crate::providers) reason: KeyReason,
    pub(in crate::providers) cause: Box<dyn Error + Send + Sync>,
    /// Where it failed, if not at the server.
    pub(in crate::providers) hop: Option<String>,
}

/// An answer that makes no sense. The place alone is told: what is there may be a secret.
#[derive(Debug, thiserror::Error)]
pub(in crate::providers) enum Nonsense {
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
    #[error("an answer asks this host to send back more than {0} bytes")]
    TooMuch(usize),
    #[error("the answer is not the JSON that was expected: {0}")]
    Json(NotUnderstood),
}

/// What goes wrong before there is an answer: the HTTP client's own texts may quote what it was given.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("there was no answer in time")]
    Timeout,
    #[error("its name is unknown; correct the address, or this host's name service")]
    NoName,
    #[error("the connection failed")]
    Connect,
    #[error("the name in its address is not valid for a server")]
    Name,
    #[error("the head of the answer is too long")]
    LongHead,
    #[error("the answer is not valid HTTP")]
    Http,
}

impl Failure {
    pub(in crate::providers) fn new(
        reason: KeyReason,
        cause: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        let cause = cause.into();
        Self {
            reason,
            cause,
            hop: None,
        }
    }

    /// The same, which has nothing to do with the server.
    pub(in crate::providers) fn at(self, hop: impl ToString) -> Self {
        let hop = Some(hop.to_string());
        Self { hop, ..self }
    }

    /// Whether another server may do better.
    pub(in crate::providers) fn is_of_this_server(&self) -> bool {
        use KeyReason::{Failed, Garbled, Unreachable, Untrusted};
        matches!(self.reason, Unreachable | Untrusted | Failed | Garbled)
    }
}

impl From<Nonsense> for Failure {
    fn from(cause: Nonsense) -> Self {
        Self::new(KeyReason::Garbled, cause)
    }
}

impl From<NotUnderstood> for Failure {
    fn from(error: NotUnderstood) -> Self {
        Self::from(Nonsense::Json(error))
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
        let error = match error {
            Http::Other(cause) => match cause.downcast::<TlsFailure>() {
                Ok(failure) => return Self::new(failure.reason, *failure),
                Err(cause) => Http::Other(cause),
            },
            error => error,
        };
        match error {
            Http::Io(error) => Self::from(error),
            Http::Timeout(_) => Self::new(KeyReason::Unreachable, Trouble::Timeout),
            Http::HostNotFound => Self::new(KeyReason::Unreachable, Trouble::NoName),
            Http::ConnectionFailed => Self::new(KeyReason::Unreachable, Trouble::Connect),
            Http::Other(cause) if cause.is::<InvalidDnsNameError>() => {
                Self::new(KeyReason::Invalid, Trouble::Name)
            }
            // Others quote headers and addresses.
            Http::LargeResponseHeader(..) => Self::new(KeyReason::Garbled, Trouble::LongHead),
            _ => Self::new(KeyReason::Garbled, Trouble::Http),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let inner = error.get_ref();
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
