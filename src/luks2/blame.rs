//! Where the cause of a volume's failure lies.

use sealblk_base::blame::Blame;

use crate::copies::HeaderError;
use crate::error::Reason;
use crate::kdf::KdfError;
use crate::keyslot::KeyslotError;

impl Reason {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Capacity { .. }
            | Self::Label { .. }
            | Self::NoSuchKeyslot { .. }
            | Self::NoRecoveryKey { .. }
            | Self::SameKey { .. }
            | Self::PayloadIsLuks { .. } => Blame::Operator,
            // Whether one of those that were not tried would have opened only a host that can try them tells.
            Self::WrongPassphrase { untried } if untried.iter().any(|(_, error)| lacks_memory(error)) => {
                Blame::Host
            }
            Self::WrongPassphrase { .. } | Self::WrongBackupPassphrase => Blame::Key,
            Self::AlreadyLuks
            | Self::Shrinks { .. }
            | Self::HeldElsewhere { .. }
            | Self::RanElsewhere { .. }
            | Self::TakenOver { .. }
            | Self::AttachedTwice { .. } => Blame::Use,
            Self::Header(HeaderError::Read(_) | HeaderError::Length(_) | HeaderError::Write { .. })
            | Self::Keyslot {
                source: KeyslotError::Read(_) | KeyslotError::Lock(_),
                ..
            }
            | Self::Lock(_)
            | Self::Length(_)
            | Self::ReadOnly
            | Self::TooSmall { .. }
            | Self::Grow { .. }
            | Self::Prepare(_)
            | Self::WriteKeyslot { .. }
            | Self::Wipe { .. }
            | Self::ForgetCached(_)
            | Self::ReadArea(_)
            | Self::DamagedCopy { .. }
            | Self::Erase(_)
            | Self::NotErased
            | Self::Entry { .. } => Blame::Storage,
            Self::Keyslot { source, .. } if lacks_memory(source) => Blame::Host,
            Self::Arena(_) | Self::NewKeyslot(_) | Self::Random(_) | Self::UnknownHost => Blame::Host,
            Self::Header(_)
            | Self::Keyslot { .. }
            | Self::Refused(_)
            | Self::NoKeyslots
            | Self::Replaced { .. }
            | Self::ChangedMeanwhile
            | Self::NotItsKey
            | Self::NoneFree { .. }
            | Self::NoRoom
            | Self::NoVault { .. }
            | Self::NoWayIn => Blame::Content,
        }
    }
}

fn lacks_memory(error: &KeyslotError) -> bool {
    matches!(
        error,
        KeyslotError::Kdf(KdfError::Memory { .. } | KdfError::Arena(_)) | KeyslotError::Arena(_)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn memory() -> KeyslotError {
        KeyslotError::Kdf(KdfError::Memory {
            needed_kib: 2,
            available_kib: Some(1),
        })
    }

    #[test]
    fn want_of_memory_is_the_hosts_fault_and_a_failing_read_the_storages() {
        let keyslot = |source| Reason::Keyslot { keyslot: 1, source };
        let io = || io::Error::from_raw_os_error(libc::EIO);
        let untried = vec![(1, memory())];
        for (reason, blame) in [
            (keyslot(memory()), Blame::Host),
            (Reason::NewKeyslot(memory()), Blame::Host),
            (Reason::WrongPassphrase { untried }, Blame::Host),
            (Reason::WrongPassphrase { untried: vec![] }, Blame::Key),
            (keyslot(KeyslotError::Read(io())), Blame::Storage),
            (keyslot(KeyslotError::Lock(io())), Blame::Storage),
            (Reason::Header(HeaderError::Read(io())), Blame::Storage),
            (keyslot(KeyslotError::KeySize { bits: 256 }), Blame::Content),
        ] {
            assert_eq!(reason.blame(), blame, "{reason}");
        }
    }
}
