//! Why a volume does not open by its providers, or is not bound to them.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::{KeyError, KeyId, KeyState};
use sealblk_base::blame::Blame;
use sealblk_base::harmless::harmless;
use sealblk_luks2::{Reason, VolumeError};
use sealblk_secmem::arena::ArenaError;

/// An operation on a volume and its bindings that failed: on which file or device, and why.
#[derive(Debug)]
pub struct BindingError {
    /// What holds the header.
    pub path: PathBuf,
    /// Why.
    pub reason: Box<BindingReason>,
}

impl fmt::Display for BindingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may have pieces of a hostile header.
        let reason = harmless(&self.reason.to_string(), SHOWN);
        write!(f, "{}: {reason}", self.path.display())
    }
}

impl Error for BindingError {
    /// What lies under the reason, whose own text is part of this error's.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.reason.source()
    }
}

impl From<VolumeError> for BindingError {
    fn from(error: VolumeError) -> Self {
        BindingReason::Volume(*error.reason).at(&error.path)
    }
}

/// How much of a reason is shown, in characters.
const SHOWN: usize = 2000;

/// Why an operation on a volume and its bindings failed.
#[derive(Debug, thiserror::Error)]
pub enum BindingReason {
    /// The volume itself.
    #[error(transparent)]
    Volume(#[from] Reason),
    #[error("there is no memory for the keys")]
    Arena(#[from] ArenaError),
    #[error(
        "it has no sealblk token, so no key provider can open it; open it with its passphrase or recovery key"
    )]
    NoToken,
    #[error("token {token} of type sealblk is broken: {text}; open the volume with its recovery key")]
    BrokenToken { token: u32, text: String },
    #[error("token {token}: {source}")]
    Provider { token: u32, source: KeyError },
    #[error("the slot secret cannot be wrapped: {0}")]
    Wrap(#[source] KeyError),
    #[error(
        "token {token} does not belong to volume {uuid}: its slot secret was wrapped by key {key_id} of provider {provider:?} for \
         another volume or keyslot, or was altered; restore this volume's own header, or open it with its recovery key"
    )]
    ForeignToken {
        token: u32,
        uuid: Uuid,
        provider: String,
        key_id: KeyId,
    },
    #[error(
        "keyslot {keyslot} does not open with the slot secret of token {token}; one of them was replaced: open the volume with its \
         recovery key"
    )]
    TokenOpensNothing { token: u32, keyslot: u32 },
    #[error("this host has no key provider for it; add one with `sealblk provider add`")]
    NoProvider,
    #[error("it cannot get a key: {0}")]
    Kek(#[source] KeyError),
    #[error(
        "the volume has its new key, but the old key may still open it: {0}; run `sealblk rekey` again to continue"
    )]
    RekeyUnfinished(#[source] Box<BindingReason>),
    #[error("read back from storage, the new keyslot does not open: {0}")]
    ReadBack(#[source] Box<BindingReason>),
    #[error("its key is in the state {state:?} at the provider, not Active")]
    KekState { state: KeyState },
}

impl BindingReason {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Volume(reason) => reason.blame(),
            Self::Arena(_) => Blame::Host,
            Self::BrokenToken { .. } => Blame::Content,
            Self::NoToken
            | Self::NoProvider
            | Self::KekState { .. }
            | Self::ForeignToken { .. }
            | Self::TokenOpensNothing { .. } => Blame::Key,
            Self::Provider { source, .. } | Self::Wrap(source) | Self::Kek(source) => source.reason.blame(),
            Self::RekeyUnfinished(reason) | Self::ReadBack(reason) => reason.blame(),
        }
    }

    pub(super) fn at(self, path: &Path) -> BindingError {
        BindingError {
            path: path.to_owned(),
            reason: Box::new(self),
        }
    }
}
