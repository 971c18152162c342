//! What a key is asked for.

use sealblk_control::privilege::Privilege;
use serde::{Deserialize, Serialize};

/// The purpose of a request for a key. The interface describes which calls and privileges go with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RequestPurpose {
    /// To serve a volume to a guest.
    Attach,
    /// To serve a volume to a guest that migrates here.
    Migrate,
    /// To open a volume for something else.
    Access,
    /// To make a volume.
    Create,
    /// To give a volume another KEK.
    Recrypt,
    /// To prove that a provider works.
    Check,
}

impl RequestPurpose {
    /// Whether it is to serve the volume to a guest.
    pub fn is_to_serve(self) -> bool {
        matches!(self, Self::Attach | Self::Migrate)
    }

    /// The privilege of an agent that goes with it.
    pub fn privilege(self) -> Privilege {
        match self {
            Self::Attach => Privilege::RegisterVM,
            Self::Migrate => Privilege::Migrate,
            Self::Access => Privilege::Access,
            Self::Create => Privilege::EncryptNew,
            Self::Recrypt => Privilege::Recrypt,
            Self::Check => Privilege::ReadKeyServersInfo,
        }
    }
}
