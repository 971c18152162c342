//! Why a verb failed, and the exit code that tells a script whose move it is.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::agent::{AgentError, AuditError};
use crate::broker::{BrokerError, StateError};
use crate::cipher::{CipherError, SectorSize};
use crate::control::socket::BindError;
use crate::control::varlink::CallError;
use crate::device::ServeError;
use crate::keys::KeyError;
use crate::keys::registry::RegistryError;
use crate::known::GuardError;
use crate::served::OpenError;
use crate::storage::StorageError;
use crate::volume::{HeaderError, KdfError, KeyslotError, Reason, VolumeError};

use super::config::ConfigError;
use super::secret::SecretError;

/// clap's own choice too.
pub(super) const USAGE: u8 = 2;
const HOST: u8 = 1;
const VOLUME: u8 = 3;
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
    /// A disk's file cannot be made.
    #[error("cannot make {}", path.display())]
    Make {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// A disk's device cannot be looked at before it is overwritten.
    #[error("cannot read {}", path.display())]
    Look {
        /// The device.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// There is something to lose.
    #[error("{} holds data; name another place, or destroy them with --force", path.display())]
    Occupied {
        /// The file or device.
        path: PathBuf,
    },
    /// A file has no size of its own.
    #[error("{} is a file: say how large the disk shall be, with --size", disk.display())]
    SizeNeeded {
        /// The file.
        disk: PathBuf,
    },
    /// There is nobody to ask for a key.
    #[error(
        "this host has no key provider: `sealblk provider add native` adds one, and `sealblk provider backup` makes it fit \
         for use; with --recovery-key the disk has another way in, and a native provider is added for it"
    )]
    NoProvider,
    /// A passphrase that would be found.
    #[error(
        "the passphrase in {location} is shorter than {least} bytes; whoever finds the backup would guess it"
    )]
    ShortPassphrase {
        /// Where it is.
        location: String,
        /// What is long enough.
        least: usize,
    },
    /// A backup that holds something else.
    #[error("{}: {what}", path.display())]
    Backup {
        /// The backup.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// A key that is there already.
    #[error(
        "the recovery key opens the volume already, by keyslot {keyslot}; name a file that does not exist for a new one"
    )]
    OpensAlready {
        /// What it opens.
        keyslot: u32,
    },
    /// The cipher does not work here.
    #[error(transparent)]
    Cipher(#[from] CipherError),
    /// The disk's file or device.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// What could be done while the disk is served.
    #[error(
        "{}: is in use by another process; if that is `sealblk serve`, name its --control-socket in the disk's place, else \
         detach it there first",
        path.display()
    )]
    MayBeServed {
        /// The disk or its header.
        path: PathBuf,
    },
    /// A key is not to be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The state directory.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A disk that is not encrypted.
    #[error(
        "{volume}; if its header is in another file, name that with --header; if its header was overwritten, restore a \
         backup of it with `cryptsetup luksHeaderRestore`; only if it was never encrypted, --allow-unencrypted serves it \
         as a plain disk"
    )]
    Unencrypted {
        /// What it is not.
        volume: VolumeError,
    },
    /// A key for a disk that is not encrypted.
    #[error(
        "{} is a plain disk, to which no key belongs: leave {option} out, or name the volume that it opens",
        disk.display()
    )]
    KeyOfPlainDisk {
        /// The disk.
        disk: PathBuf,
        /// What names the key.
        option: &'static str,
    },
    /// A descriptor for two things.
    #[error("descriptor {fd} is the front-end's socket, by --fd; the secret has to come by another one")]
    SameDescriptor {
        /// Its number.
        fd: RawFd,
    },
    /// A sector size for a disk that has its own.
    #[error("{} is a LUKS2 volume, whose header tells its sector size: leave --sector-size out", disk.display())]
    SectorSizeOfVolume {
        /// The disk.
        disk: PathBuf,
    },
    /// A size that no disk has.
    #[error("--null-storage needs a multiple of the sector size, {}, that is not 0", sector_size.bytes())]
    NullStorage {
        /// The sector size.
        sector_size: SectorSize,
    },
    /// What stands for the disk that is not there.
    #[error("/dev/null cannot be opened")]
    Null(#[source] io::Error),
    /// Somebody confirms another thing than what is about to be lost.
    #[error("what is to go has to be confirmed by its name: --confirm {wanted}")]
    Confirm {
        /// What is to go.
        wanted: String,
    },
    /// A served disk whose key is young enough.
    #[error("the key is not older than it may be")]
    NotDue,
    /// A backup of a header is given, where the header itself is meant.
    #[error(
        "{} has a header of its own, of which {} is a copy: leave --header away; what is in a copy opens the disk until the copy \
         is destroyed",
        disk.display(),
        header.display()
    )]
    OwnHeader {
        /// The disk.
        disk: PathBuf,
        /// What was given for its header.
        header: PathBuf,
    },
    /// Several disks, where one is meant.
    #[error("several disks are taken with --if-due alone, and without --header: rekey them one by one")]
    OneDisk,
    /// Nobody says how old a key may get.
    #[error(
        "how old may a key get? say it with --max-age, or as max-key-age under [policy] in the configuration"
    )]
    NoPolicy,
    /// A key or provider that is needed.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There can be no key agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// There can be no broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// What the broker keeps.
    #[error(transparent)]
    BrokerState(#[from] StateError),
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The audit log tells nothing of a receipt.
    #[error(
        "{}: the log tells of no such receipt; {}",
        path.display(),
        match erased {
            true => "it tells of the erasure, so this is not what was issued then, to the last byte",
            false => "nor of an erasure of what it names",
        }
    )]
    NoReceipt {
        /// What was taken for one.
        path: PathBuf,
        /// Whether the log tells of the erasure.
        erased: bool,
    },
    /// Nobody answers.
    #[error("{}: no answer on this control socket; see that `sealblk serve`, or the agent, listens there, and that this user may reach it", socket.display())]
    Control {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: CallError,
    },
    /// A served disk says no.
    #[error("{}: {message}", socket.display())]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// Why.
        message: String,
    },
    /// The host is out of something.
    #[error("descriptors or threads are exhausted")]
    Host(#[source] io::Error),
    /// The control socket.
    #[error(transparent)]
    Socket(#[from] BindError),
    /// The volume that is to be served.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A passphrase or recovery key cannot be read or written.
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl Failure {
    /// One of the codes that the help text lists.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Process(_) | Self::Output(_) | Self::Cipher(_) | Self::Null(_) => HOST,
            Self::SizeNeeded { .. }
            | Self::SameDescriptor { .. }
            | Self::ShortPassphrase { .. }
            | Self::OpensAlready { .. }
            | Self::KeyOfPlainDisk { .. }
            | Self::SectorSizeOfVolume { .. }
            | Self::NullStorage { .. } => USAGE,
            Self::Unencrypted { .. } | Self::Backup { .. } | Self::NoReceipt { .. } => VOLUME,
            Self::Storage(StorageError::InUse { .. }) | Self::MayBeServed { .. } | Self::Occupied { .. } => {
                IN_USE
            }
            Self::Storage(_) | Self::Make { .. } | Self::Look { .. } => STORAGE,
            Self::Volume(VolumeError { reason, .. }) => volume_code(reason),
            Self::Serve(error) => match error {
                ServeError::Socket(error) => socket_code(error),
                ServeError::BadFd { .. } => USAGE,
                ServeError::IoUring(_) | ServeError::Control(_) => HOST,
            },
            Self::Agent(AgentError::Socket(error)) => socket_code(error),
            Self::Agent(AgentError::Setup(_)) => HOST,
            Self::Broker(BrokerError::State(error)) | Self::BrokerState(error) => match error {
                StateError::Io { .. } => STORAGE,
                StateError::Unusable { .. } => KEY,
                StateError::Arena(_) => HOST,
                StateError::Exists { .. }
                | StateError::Unknown { .. }
                | StateError::Name(_)
                | StateError::Register(_) => USAGE,
            },
            Self::Broker(BrokerError::Settings(_) | BrokerError::Tls(_)) => USAGE,
            Self::Broker(BrokerError::Listen { .. } | BrokerError::Random(_)) => HOST,
            Self::Agent(AgentError::Audit(error))
            | Self::Broker(BrokerError::Audit(error))
            | Self::Audit(error) => match error {
                AuditError::Io { .. } => STORAGE,
                AuditError::Broken { .. } | AuditError::Moved { .. } | AuditError::HeadNotFound { .. } => {
                    VOLUME
                }
            },
            Self::Config(_) => USAGE,
            Self::Confirm { .. } | Self::NoPolicy | Self::OneDisk | Self::NotDue | Self::OwnHeader { .. } => {
                USAGE
            }
            Self::Guard(error) => match error {
                GuardError::InUse { .. } | GuardError::NotBackedUp(_) => IN_USE,
                GuardError::Index { .. } | GuardError::Key(_) => KEY,
                GuardError::Registry(error) => registry_code(error),
            },
            Self::Control { .. } | Self::Host(_) => HOST,
            Self::Refused { .. } => KEY,
            Self::Socket(error) => socket_code(error),
            Self::Open(OpenError::Volume(VolumeError { reason, .. })) => volume_code(reason),
            Self::Open(OpenError::Passphrase(_)) => KEY,
            Self::Open(OpenError::Replaced { .. } | OpenError::Reshaped) => VOLUME,
            Self::Registry(error) => registry_code(error),
            Self::Secret(SecretError::Arena(_)) => HOST,
            Self::Key(_) | Self::NoProvider | Self::Secret(_) => KEY,
        }
    }
}

fn registry_code(error: &RegistryError) -> u8 {
    match error {
        RegistryError::Name(_)
        | RegistryError::Exists { .. }
        | RegistryError::IsDefault { .. }
        | RegistryError::Settings(_)
        | RegistryError::NotNative(_)
        | RegistryError::NotTrusted(_) => USAGE,
        RegistryError::NotWiped { .. } => STORAGE,
        _ => KEY,
    }
}

fn volume_code(reason: &Reason) -> u8 {
    match reason {
        Reason::Capacity { .. }
        | Reason::Label { .. }
        | Reason::NoSuchKeyslot { .. }
        | Reason::NoRecoveryKey { .. }
        | Reason::SameKey { .. }
        | Reason::PayloadIsLuks { .. } => USAGE,
        // Whether one of those that were not tried would have opened only a host that can try them tells.
        Reason::WrongPassphrase { untried } if untried.iter().any(|(_, error)| lacks_memory(error)) => HOST,
        Reason::WrongPassphrase { .. }
        | Reason::NoToken
        | Reason::Provider { .. }
        | Reason::Wrap(_)
        | Reason::Kek(_)
        | Reason::NoProvider
        | Reason::KekState { .. }
        | Reason::ForeignToken { .. }
        | Reason::TokenOpensNothing { .. } => KEY,
        Reason::RekeyUnfinished(reason) | Reason::ReadBack(reason) => volume_code(reason),
        Reason::AlreadyLuks => IN_USE,
        Reason::Header(HeaderError::Read(_) | HeaderError::Length(_) | HeaderError::Write { .. })
        | Reason::Keyslot {
            source: KeyslotError::Read(_) | KeyslotError::Lock(_),
            ..
        }
        | Reason::Lock(_)
        | Reason::Length(_)
        | Reason::ReadOnly
        | Reason::TooSmall { .. }
        | Reason::Grow { .. }
        | Reason::Prepare(_)
        | Reason::WriteKeyslot { .. }
        | Reason::Wipe { .. }
        | Reason::WipeReplaced { .. }
        | Reason::ForgetCached(_)
        | Reason::ReadArea(_)
        | Reason::DamagedCopy { .. }
        | Reason::Erase(_)
        | Reason::NotErased
        | Reason::Entry { .. } => STORAGE,
        Reason::Keyslot { source, .. } if lacks_memory(source) => HOST,
        Reason::Cipher(CipherError::EqualHalves | CipherError::KeyLength(_)) => VOLUME,
        Reason::Cipher(_) | Reason::Arena(_) | Reason::Kdf(_) | Reason::Seal(_) | Reason::Random(_) => HOST,
        _ => VOLUME,
    }
}

fn socket_code(error: &BindError) -> u8 {
    match error {
        BindError::InUse { .. } => IN_USE,
        BindError::NotASocket { .. } => USAGE,
        BindError::Bind { .. } => HOST,
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
        for (reason, code) in [
            (keyslot(memory()), HOST),
            (Reason::Seal(memory()), HOST),
            (Reason::WrongPassphrase { untried }, HOST),
            (Reason::WrongPassphrase { untried: vec![] }, KEY),
            (keyslot(KeyslotError::Read(io())), STORAGE),
            (keyslot(KeyslotError::Lock(io())), STORAGE),
            (Reason::Header(HeaderError::Read(io())), STORAGE),
            (keyslot(KeyslotError::KeySize { bits: 256 }), VOLUME),
        ] {
            assert_eq!(volume_code(&reason), code, "{reason}");
        }
    }
}
