//! The host's TPM 2.0: proofs of the host's identity and boot state, and secrets that only this host in the same boot state
//! can unseal.
//!
//! ```text
//! codec     bytes as a TPM has them
//! device    the device of a TPM, and the transport of bytes to and from it
//! command   one command and its answer: handles, sessions, parameters (TPM 2.0 Library, part 1, 18)
//! session   authorisation sessions that encrypt a secret on its way through the TPM's bus
//! storage_key  the key under which a TPM keeps what is ours, and what works with it
//! pcr       selections of registers, and their values
//! attest    keys that only this TPM has, their quotes of its registers, and the verification of quotes
//! credential  a secret that a verifier encrypts to an endorsement key, for one attestation key
//! spki      an RSA key in the form of X.509
//! seal      a secret under this TPM's storage key, bound to registers
//! ```
//!
//! The crate tpm2-protocol, which is pure Rust, parses structures from a TPM or from untrusted peers: no C library is in
//! a process with keys. Names are those of the TPM 2.0 Library specification, revision 1.59.

pub mod attest;
mod codec;
mod command;
pub mod credential;
mod device;
pub mod pcr;
pub mod seal;
mod session;
mod spki;
mod storage_key;

use std::fmt;
use std::io;

use tpm2_protocol::data::TpmRc;

pub use codec::object_name;
pub use device::{DEFAULT_DEVICE, Device};

use device::Stream;

/// A TPM that answers.
#[derive(Debug)]
pub struct Tpm {
    device: Device,
    stream: Stream,
}

/// What a TPM does not do for us.
#[derive(Debug, thiserror::Error)]
#[error("the TPM at {device}: {what}")]
pub struct TpmError {
    /// Which one.
    pub device: String,
    /// Why.
    #[source]
    pub what: TpmFailure,
}

/// Why not.
#[derive(Debug, thiserror::Error)]
pub enum TpmFailure {
    /// There is none, or it does not answer.
    #[error("it does not answer; name another TPM with --tpm, or give this user access to it")]
    Io(#[from] io::Error),
    /// Its answer is none.
    #[error("its answer to {command} makes no sense: {what}")]
    Garbled {
        /// The command.
        command: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// It says no.
    #[error("it refuses {command}: {code}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Its response code.
        code: Code,
    },
    /// It is not the TPM that it was, or its registers, or what it has sealed, are not what they were.
    #[error("{0}")]
    Changed(&'static str),
    /// This host has no memory or no random numbers.
    #[error("this host cannot hold the secret")]
    Host(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A response code (TPM_RC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u32);

impl Code {
    /// The TPM makes nothing of a parameter: it is about one, by its format and by what it is about.
    fn is_about_parameter(self) -> bool {
        self.0 & 0xc0 == 0xc0
    }

    /// The same, whichever handle, session or parameter it is about.
    fn is(self, error: u32) -> bool {
        match error & 0x80 {
            0 => self.0 == error,
            _ => self.0 & 0xbf == error,
        }
    }
}

impl TpmError {
    /// The code with which the TPM says no.
    fn refusal(&self) -> Option<Code> {
        match self.what {
            TpmFailure::Refused { code, .. } => Some(code),
            _ => None,
        }
    }

    /// It says no with this code.
    fn is_refusal(&self, error: u32) -> bool {
        self.refusal().is_some_and(|code| code.is(error))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match TpmRc::try_from(self.0) {
            Ok(name) => write!(f, "{name} ({:#x})", self.0),
            Err(_) => write!(f, "response code {:#x}", self.0),
        }
    }
}

impl Tpm {
    /// Opens a TPM.
    ///
    /// # Errors
    /// If there is none that answers.
    pub fn open(device: &Device) -> Result<Self, TpmError> {
        let stream = Stream::open(device).map_err(|e| TpmError {
            device: device.to_string(),
            what: e.into(),
        })?;
        Ok(Self {
            device: device.clone(),
            stream,
        })
    }

    fn failed(&self, what: impl Into<TpmFailure>) -> TpmError {
        TpmError {
            device: self.device.to_string(),
            what: what.into(),
        }
    }
}
