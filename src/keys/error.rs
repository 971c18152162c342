//! Why a key is not available: one reason for each remedy of an operator.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use sealblk_base::blame::Blame;
use serde::{Deserialize, Serialize};

use crate::KeyId;

/// A key operation that failed: at which provider, for which key, on which hop, and why.
///
/// The text of the error ends with what to do. Its `source` is what the file system or the server answered.
#[derive(Clone, Debug)]
pub struct KeyError {
    /// The provider's name.
    pub provider: String,
    /// The KEK that was wanted, if the operation was about one.
    pub key_id: Option<KeyId>,
    /// Where it failed: a path, or a server's address.
    pub hop: String,
    /// Why.
    pub reason: KeyReason,
    /// What lies under it.
    pub source: Option<Arc<dyn Error + Send + Sync>>,
}

/// Why a key operation failed. Locked disks show it, and programs may act on it by its name, as in `not_active`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyReason {
    /// This host has no provider of that name.
    UnknownProvider,
    /// The host's agent, which has the providers, does not answer.
    NoAgent,
    /// The process that gets the keys of a served disk has ended.
    NoHelper,
    /// The host's agent does not let this user do it.
    NotPermitted,
    /// The provider exists, but its configuration or its own files cannot be used.
    Invalid,
    /// This host's list of volumes cannot take the note of which key a volume gets; what is not noted is not bound.
    NotNoted,
    /// The provider gives no key to new volumes before there is a backup of it.
    NotBackedUp,
    /// The provider does not answer.
    Unreachable,
    /// Whoever answers is not known to be the provider, or does not take this host for who it is: a certificate is wrong
    /// or has expired.
    Untrusted,
    /// The provider answers, but cannot do it: what lies behind it fails, or it does not know the operation.
    Failed,
    /// The provider's answer makes no sense.
    Garbled,
    /// The provider knows this host and will not serve it, or not this key.
    Refused,
    /// The provider does not find this host in the state that it has to be in.
    Attestation,
    /// The provider has no such KEK.
    Missing,
    /// The provider has the KEK, in a state that forbids its use.
    NotActive,
    /// The provider makes its KEKs anew whenever they are needed, so that it cannot destroy one of them.
    Indestructible,
    /// What was to be unwrapped was altered, or belongs to another volume or keyslot.
    Unauthentic,
    /// This host cannot hold the key: it has no memory or no random numbers for it.
    Host,
}

impl KeyReason {
    /// Whether the provider has not judged the key: it does not answer, or answers nothing that can be trusted. Anyone who can keep it from
    /// answering well can keep it from answering at all.
    pub fn is_no_verdict(self) -> bool {
        matches!(
            self,
            Self::Unreachable | Self::Failed | Self::Garbled | Self::Untrusted
        )
    }

    /// Where the cause lies.
    pub fn blame(self) -> Blame {
        match self {
            Self::Host => Blame::Host,
            Self::NoAgent | Self::NoHelper | Self::NotPermitted => Blame::Process,
            Self::Indestructible => Blame::Operator,
            Self::UnknownProvider
            | Self::Invalid
            | Self::NotNoted
            | Self::NotBackedUp
            | Self::Unreachable
            | Self::Untrusted
            | Self::Failed
            | Self::Garbled
            | Self::Refused
            | Self::Attestation
            | Self::Missing
            | Self::NotActive
            | Self::Unauthentic => Blame::Key,
        }
    }
}

impl KeyError {
    /// An operation that failed at `provider`, on `hop`.
    pub fn new(provider: &str, hop: impl fmt::Display, reason: KeyReason) -> Self {
        Self {
            provider: provider.to_owned(),
            key_id: None,
            hop: hop.to_string(),
            reason,
            source: None,
        }
    }

    /// The same, about this KEK.
    pub fn of(mut self, key_id: &KeyId) -> Self {
        self.key_id = Some(key_id.clone());
        self
    }

    /// The same, with what lies under it.
    pub fn because(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }
}

impl KeyReason {
    /// All, for those that must have each.
    pub const ALL: [Self; 18] = [
        Self::UnknownProvider,
        Self::NoAgent,
        Self::NoHelper,
        Self::NotPermitted,
        Self::Invalid,
        Self::NotNoted,
        Self::NotBackedUp,
        Self::Unreachable,
        Self::Untrusted,
        Self::Failed,
        Self::Garbled,
        Self::Refused,
        Self::Attestation,
        Self::Missing,
        Self::NotActive,
        Self::Indestructible,
        Self::Unauthentic,
        Self::Host,
    ];

    /// The reason as a phrase: "the provider has no such key".
    pub fn what(self) -> &'static str {
        match self {
            Self::UnknownProvider => "this host has no such key provider",
            Self::NoAgent => "this host's key agent does not answer",
            Self::NoHelper => "the process that gets this disk's keys has ended",
            Self::NotPermitted => "this host's key agent does not permit this user to do that",
            Self::Invalid => "the key provider's own state cannot be used",
            Self::NotNoted => {
                "this host cannot record the volume in its list of volumes, so the volume gets no key"
            }
            Self::NotBackedUp => "the key provider has no backup yet, so it gives no keys to new volumes",
            Self::Unreachable => "the key provider does not answer",
            Self::Untrusted => "this host and the key provider do not trust each other's certificates",
            Self::Failed => "the key provider answers, but fails",
            Self::Garbled => "the key provider's answer makes no sense",
            Self::Attestation => "the key provider does not find this host in the required state",
            Self::Refused => "the key provider refuses this host",
            Self::Missing => "the key provider has no such key",
            Self::NotActive => "the key is not active",
            Self::Indestructible => "the key provider cannot destroy a single key",
            Self::Unauthentic => "the wrapped key was altered, or belongs to another volume or keyslot",
            Self::Host => "this host cannot hold the key",
        }
    }

    /// What an operator can do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::UnknownProvider => {
                "see `sealblk provider list`, or point --state-dir at the right directory"
            }
            Self::NoAgent => {
                "start `sealblk agent`, or correct its `socket` under [agent] in the configuration"
            }
            Self::NoHelper => {
                "end `sealblk serve` (SIGTERM) and start it again: the guest waits in the meantime, and loses nothing"
            }
            Self::NotPermitted => {
                "grant the privilege that the cause names in the agent's configuration, and restart the agent"
            }
            Self::Invalid => "correct it as the cause says, or restore the provider's files from a backup",
            Self::NotNoted => "make room in the list of volumes, or repair the list, as the cause says",
            Self::NotBackedUp => {
                "take a backup with `sealblk provider backup NAME --to FILE --passphrase-file FILE`, or do without a backup: \
                 `sealblk provider backup NAME --waive`"
            }
            Self::Unreachable => "check the server and the network, then try again",
            Self::Untrusted => "renew or replace the certificate that the cause names, and check both clocks",
            Self::Failed => "see the provider's log, and remove the cause",
            Self::Garbled => "check that the address is the provider's, and that its version is supported",
            Self::Attestation => "compare this host's measured state with the provider's reference values",
            Self::Refused => "grant this host access at the provider",
            Self::Missing => "restore the key at the provider, or open the volume with a recovery key",
            Self::NotActive => {
                "activate the key at the provider; a revoked key cannot be activated: open the volume with a recovery key"
            }
            Self::Indestructible => "leave out --destroy, to revoke the key on this host only",
            Self::Unauthentic => "restore the volume's header from a backup, or open it with a recovery key",
            Self::Host => "remove the cause, then try again",
        }
    }
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Some questions are to the agent, and to no provider of it.
        match self.provider.as_str() {
            "" => f.write_str("keys")?,
            provider => write!(f, "key provider {provider:?}")?,
        }
        if let Some(key_id) = &self.key_id {
            write!(f, ", key {key_id}")?;
        }
        write!(
            f,
            ": {} (at {}); {}",
            self.reason.what(),
            self.hop,
            self.reason.remedy()
        )
    }
}

impl Error for KeyError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_says_what_where_and_what_to_do() {
        let error = KeyError::new("kms", "kms1:5696", KeyReason::Missing).of(&KeyId("4711".into()));
        assert_eq!(
            error.to_string(),
            "key provider \"kms\", key 4711: the key provider has no such key (at kms1:5696); restore the key at \
             the provider, or open the volume with a recovery key"
        );
    }
}
