//! A key under which the server wraps KEKs for this host: TLS, and a proxy between the server and this host, then see only a
//! wrapped key.
//!
//! AES Key Wrap (RFC 3394), which KMIP calls NISTKeyWrap, of the bare key material (Encoding Option No Encoding).

use std::path::PathBuf;

use aes_kw::KwAes256;
use aes_kw::cipher::KeyInit;
use serde::{Deserialize, Serialize};

use super::session::Trouble;
use crate::keys::KeyReason;
use crate::providers::wrap::KEK_LEN;
use crate::providers::{settings_file, settings_file::Unreadable};
use sealblk_secmem::{arena::SecretBytes, arena::on_wiped_stack};

/// The length of the wrapping key, in bytes.
const LEN: usize = 32;
/// What wrapping adds to a key, in bytes.
const ADDED: usize = 8;

/// What the operator says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrappingKey {
    /// Its Unique Identifier at the servers.
    pub id: String,
    /// The same key here: 32 bytes, in a file that its owner alone can read.
    pub file: PathBuf,
}

/// Why the file is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error("it does not hold the {LEN} bytes of a wrapping key")]
    Length,
}

impl Unusable {
    /// What an operator would act on.
    pub(super) fn reason(&self) -> KeyReason {
        match self {
            Self::Unreadable(error) => error.reason(),
            Self::Length => KeyReason::Invalid,
        }
    }
}

impl WrappingKey {
    /// Reads the key. It is read anew each time, so that another one needs no restart.
    pub(super) fn load(&self) -> Result<SecretBytes, Unusable> {
        let key = settings_file::read(&self.file, LEN)?;
        match key.len() {
            LEN => Ok(key),
            _ => Err(Unusable::Length),
        }
    }

    /// Takes a KEK out of its wrapping by `key`, which [`WrappingKey::load`] has read.
    pub(super) fn unwrap(&self, key: &SecretBytes, wrapped: &[u8]) -> Result<SecretBytes, Trouble> {
        let mut kek = SecretBytes::zeroed(KEK_LEN)?;
        let fits = wrapped.len() == KEK_LEN + ADDED;
        let key: &[u8; LEN] = key[..].try_into().expect("it was read with this length");
        // Round keys are on the stack.
        let unwrapped =
            fits && on_wiped_stack(|| KwAes256::new(key.into()).unwrap_key(wrapped, &mut kek).is_ok());
        match unwrapped {
            true => Ok(kek),
            false => Err(Trouble::NotUnwrapped {
                id: self.id.clone(),
                file: self.file.clone(),
            }),
        }
    }
}
