//! Why a verb failed, and the exit code that tells a script whose move it is.

use std::io;

use crate::cipher::CipherError;
use crate::keys::KeyError;
use crate::keys::registry::RegistryError;
use crate::storage::StorageError;

use super::secret::SecretError;

/// clap's own choice too.
pub(super) const USAGE: u8 = 2;
const HOST: u8 = 1;
const KEY: u8 = 4;
const IN_USE: u8 = 5;
const STORAGE: u8 = 6;

/// A verb's failure.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The process could not be prepared for holding keys.
    #[error("cannot protect this process' memory from other processes of the same user")]
    Process(#[source] io::Error),
    /// What a verb prints did not go out.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    /// The cipher does not work here.
    #[error(transparent)]
    Cipher(#[from] CipherError),
    /// The disk's file or device.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A key is not to be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The state directory.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A passphrase or recovery key cannot be read or written.
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl Failure {
    /// One of the codes that the help text lists.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Process(_) | Self::Output(_) | Self::Cipher(_) => HOST,
            Self::Storage(StorageError::InUse { .. }) => IN_USE,
            Self::Storage(_) => STORAGE,
            Self::Key(_) | Self::Registry(_) | Self::Secret(_) => KEY,
        }
    }
}
