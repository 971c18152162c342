//! The failures of verbs, and their exit codes, which tell a script who must act.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use uuid::Uuid;

use crate::agent::{AgentError, AuditError};
use crate::attachment::OpenError;
use crate::broker::{BrokerError, SettingsError, StateError};
use crate::cipher::{CipherError, SectorSize};
use crate::control::socket::BindError;
use crate::control::varlink::CallError;
use crate::device::ServeError;
use crate::inventory::GuardError;
use crate::key_helper::{HelperError, HelperFailure};
use crate::keys::binding::{BindingError, BindingReason};
use crate::keys::{KeyError, KeyId, KeyReason};
use crate::luks2::{Advice, Content, HeaderError, KdfError, KeyslotError, Owner, Reason, VolumeError};
use crate::map::UnencryptedError;
use crate::providers::registry::RegistryError;
use crate::sandbox::SandboxError;
use crate::storage::StorageError;
use crate::toml_file::TomlFileError;

use super::config::ConfigError;
use super::secret::SecretError;
use super::strength::WeakSecret;

/// clap's own choice too.
pub(super) const USAGE: u8 = 2;
const HOST: u8 = 1;
const CONTENT: u8 = 3;
const KEY: u8 = 4;
const IN_USE: u8 = 5;
const STORAGE: u8 = 6;
/// Another process of ours, which was asked.
const ASKED: u8 = 7;

/// A verb's failure.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The process could not be prepared for holding keys.
    #[error("cannot protect this process' memory from other processes of the same user")]
    Process(#[source] io::Error),
    /// What a verb prints did not go out.
    #[error("cannot write the result to standard output; check that its destination has room")]
    Output(#[source] io::Error),
    /// A disk's file cannot be made.
    #[error("cannot make {}; its directory must exist, and this user must have write access to it", path.display())]
    Make {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// A disk's device cannot be read before it is overwritten.
    #[error("cannot read {}; it must exist, and this user must have read access to it", path.display())]
    Look {
        /// The device.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// There is something to lose.
    #[error(
        "{} holds {}; name another file or device, or destroy its content with --force",
        path.display(),
        content
    )]
    Occupied {
        /// The file or device.
        path: PathBuf,
        /// What it holds.
        content: Content,
    },
    /// A file has no size of its own.
    #[error("{} is a file: set the size of the disk with --size", disk.display())]
    SizeNeeded {
        /// The file.
        disk: PathBuf,
    },
    /// The host has no key provider.
    #[error(
        "this host has no key provider: add one with `sealblk provider add native`, and back it up with \
         `sealblk provider backup`; or give --recovery-key, then sealblk adds a native provider itself"
    )]
    NoProvider,
    /// A secret that is easy to guess.
    #[error(transparent)]
    WeakSecret(#[from] WeakSecret),
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
        "the recovery key already opens the volume, by keyslot {keyslot}; for a new one, name a file that does not exist"
    )]
    OpensAlready {
        /// What it opens.
        keyslot: u32,
    },
    /// The cipher does not work here.
    #[error(transparent)]
    Cipher(#[from] CipherError),
    /// Providers whose keys cannot be used, of which each was told why.
    #[error("the keys of {names} cannot be used, for the reasons above")]
    Unusable {
        /// The providers.
        names: String,
    },
    /// The disk's file or device.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// What could be done while the disk is served.
    #[error(
        "{}: is in use by another process; if this is `sealblk serve`, give its --control-socket instead of the disk, else end \
         that process first",
        path.display()
    )]
    MayBeServed {
        /// The disk or its header.
        path: PathBuf,
    },
    /// A key is not available.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The state directory.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The volume.
    #[error("{error}{remedy}", error = .0, remedy = remedy(.0))]
    Volume(#[from] BindingError),
    /// A disk that is not served as an unencrypted one.
    #[error(transparent)]
    NotUnencrypted(#[from] UnencryptedError),
    /// A disk that is not encrypted.
    #[error("{volume}; {}", unencrypted(volume))]
    Unencrypted {
        /// What it is not.
        volume: VolumeError,
    },
    /// A disk that is to be written, and cannot be.
    #[error("{source}; or serve it with --read-only")]
    WriteProtected {
        /// Why not.
        source: StorageError,
    },
    /// Another volume lies where one is expected.
    #[error(
        "{}: holds volume {found}, but --volume names {expected}: name the disk of that volume, or restore its header, which \
         may have been replaced",
        disk.display()
    )]
    OtherVolume {
        /// The disk or its header.
        disk: PathBuf,
        /// By the command line.
        expected: Uuid,
        /// By the header.
        found: Uuid,
    },
    /// A key for a disk that is not encrypted.
    #[error(
        "{} is an unencrypted disk, which has no key: leave out --passphrase-file, or name the volume that it opens",
        disk.display()
    )]
    KeyOfPlainDisk {
        /// The disk.
        disk: PathBuf,
    },
    /// A descriptor for two things.
    #[error("descriptor {fd} is the front-end's socket (--fd); use another descriptor for the secret")]
    SameDescriptor {
        /// Its number.
        fd: RawFd,
    },
    /// A socket for two things.
    #[error(
        "{}: is given both as --socket-path (for QEMU) and as --control-socket (for operators); choose another path for one of them",
        path.display()
    )]
    SameSocket {
        /// The socket.
        path: PathBuf,
    },
    /// A sector size for a disk that has its own.
    #[error("{} is a LUKS2 volume, and its header sets the sector size: leave out --sector-size", disk.display())]
    SectorSizeOfVolume {
        /// The disk.
        disk: PathBuf,
    },
    /// A volume that is said to be none.
    #[error(
        "{} is a LUKS2 volume, and sealblk does not serve it as raw: leave out --format to serve it decrypted",
        disk.display()
    )]
    FormatOfVolume {
        /// The disk.
        disk: PathBuf,
    },
    /// A size that no disk has.
    #[error("--null-storage must be a multiple of the sector size, {}, and not 0", sector_size.bytes())]
    NullStorage {
        /// The sector size.
        sector_size: SectorSize,
    },
    /// What stands for the disk that is not there.
    #[error("/dev/null cannot be opened")]
    Null(#[source] io::Error),
    /// --confirm names another key or provider than the command.
    #[error(
        "--confirm names {confirmed:?}, but the command names {what}: nothing was changed; give the same name in both"
    )]
    Confirm {
        /// The key or provider.
        what: String,
        /// What was confirmed.
        confirmed: String,
    },
    /// Another volume than the one that is about to be lost.
    #[error(
        "{} is volume {volume}, but --confirm names {confirmed:?}: nothing was erased; if the disk is the right one, confirm its \
         UUID, else name the other disk",
        disk.display()
    )]
    ConfirmErasure {
        /// The disk.
        disk: PathBuf,
        /// Its UUID.
        volume: Uuid,
        /// What was confirmed.
        confirmed: String,
    },
    /// A key that is to go with its disk, and would not.
    #[error(
        "{}: nothing was erased, because a key of it cannot be revoked; remove the cause, or leave out --revoke-key",
        disk.display()
    )]
    NotRevocable {
        /// The disk.
        disk: PathBuf,
        /// Why not, and which key.
        source: Box<KeyError>,
    },
    /// A key that was to go with its disk.
    #[error(
        "the disk was erased, but key {key_id} of provider {provider:?} was not revoked, for the reason above; revoke it with \
         `sealblk key revoke`"
    )]
    NotRevoked {
        /// The key's provider.
        provider: String,
        /// The key.
        key_id: KeyId,
        /// Why not, which was told.
        why: Box<Failure>,
    },
    /// Standard input is not a terminal, so the erasure cannot be confirmed.
    #[error(
        "{}: nothing was erased, because the erasure was not confirmed; add --confirm UUID, with the UUID that `sealblk info` shows",
        disk.display()
    )]
    Unconfirmed {
        /// The disk.
        disk: PathBuf,
    },
    /// A served disk whose key is young enough.
    #[error("the key has not reached its maximum age")]
    NotDue,
    /// A backup of a header is given, where the header itself is meant.
    #[error(
        "{} has its header on the disk, and {} is a copy of it: leave out --header; the copy opens the disk until you destroy \
         the copy",
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
    #[error("several disks at once need --if-due, and have no --header: rekey them one by one")]
    OneDisk,
    /// No maximum age of keys is set.
    #[error(
        "no maximum age of keys is set: give --max-age, or set max-key-age under [policy] in the configuration"
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
        "{}: the log does not confirm this receipt; {}",
        path.display(),
        match erased {
            true => "it has the erasure, so the receipt was changed after it was issued",
            false => "it has no erasure of this volume with these checksums either",
        }
    )]
    NoReceipt {
        /// What was taken for one.
        path: PathBuf,
        /// Whether the log has the erasure.
        erased: bool,
    },
    /// No process answers.
    #[error(
        "{}: no answer on this control socket; check that `sealblk serve`, or the agent, listens there, and that this user can \
         connect to it",
        socket.display()
    )]
    Control {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: CallError,
    },
    /// There is no agent to ask.
    #[error(
        "this host has no key agent: start `sealblk agent`, and add [agent] to the configuration, {}; or ask one disk, with \
         `sealblk status` or `sealblk events` and its --control-socket",
        config.display()
    )]
    NoAgent {
        /// The configuration.
        config: PathBuf,
    },
    /// A served disk says no.
    #[error("{}: {message}", socket.display())]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// Why.
        message: String,
        /// If that is a key.
        reason: Option<KeyReason>,
    },
    /// The host is out of something.
    #[error(
        "this host is out of descriptors or threads; raise LimitNOFILE and TasksMax of the unit, or `ulimit -n` and `-u`"
    )]
    Host(#[source] io::Error),
    /// The process that is to get the keys.
    #[error(
        "the process that gets the disk's keys cannot be started; raise TasksMax and LimitNOFILE of the unit, or `ulimit -u` and `-n`"
    )]
    StartHelper(#[source] io::Error),
    /// What it says.
    #[error(transparent)]
    Helper(HelperFailure),
    /// The process cannot give up what it has to.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
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

impl From<VolumeError> for Failure {
    fn from(error: VolumeError) -> Self {
        Self::Volume(error.into())
    }
}

impl From<HelperError> for Failure {
    fn from(error: HelperError) -> Self {
        match error {
            HelperError::Failed(error) => Self::Helper(error),
            HelperError::Ended(error) => Self::Key(error),
        }
    }
}

impl Failure {
    /// What goes with it, one a line.
    pub(super) fn list(&self) -> Vec<String> {
        match self {
            Self::Guard(GuardError::InUse { uses, .. }) => uses.lines(),
            _ => Vec::new(),
        }
    }

    /// One of the codes that the help text lists.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Process(_) | Self::Cipher(_) | Self::Null(_) | Self::Host(_) | Self::StartHelper(_) => HOST,
            Self::Helper(error) => error.exit_code,
            Self::Sandbox(_) => HOST,
            Self::SizeNeeded { .. }
            | Self::SameDescriptor { .. }
            | Self::WeakSecret(_)
            | Self::SameSocket { .. }
            | Self::OpensAlready { .. }
            | Self::KeyOfPlainDisk { .. }
            | Self::SectorSizeOfVolume { .. }
            | Self::FormatOfVolume { .. }
            | Self::NullStorage { .. }
            | Self::Confirm { .. }
            | Self::ConfirmErasure { .. }
            | Self::Unconfirmed { .. }
            | Self::NoPolicy
            | Self::OneDisk
            | Self::NotDue
            | Self::OwnHeader { .. } => USAGE,
            Self::OtherVolume { .. }
            | Self::Unencrypted { .. }
            | Self::Backup { .. }
            | Self::NoReceipt { .. } => CONTENT,
            Self::NoProvider | Self::Unusable { .. } => KEY,
            Self::MayBeServed { .. } | Self::Occupied { .. } => IN_USE,
            Self::Output(_) | Self::WriteProtected { .. } | Self::Make { .. } | Self::Look { .. } => STORAGE,
            Self::Control { .. } | Self::NoAgent { .. } => ASKED,
            Self::NotRevocable { source, .. } => key_code(source.reason),
            Self::NotRevoked { why, .. } => why.exit_code(),
            Self::Refused { reason, .. } => reason.map_or(ASKED, key_code),
            Self::Storage(error) => storage_code(error),
            Self::Volume(error) => binding_code(&error.reason),
            Self::NotUnencrypted(error) => match error {
                UnencryptedError::TraceOfHeader { .. } | UnencryptedError::Foreign { .. } => CONTENT,
                UnencryptedError::Disk(error) => volume_code(&error.reason),
            },
            Self::Open(error) => match error {
                OpenError::Volume(error) => binding_code(&error.reason),
                OpenError::Cipher { source, .. } => match source {
                    CipherError::EqualHalves | CipherError::KeyLength(_) => CONTENT,
                    _ => HOST,
                },
                OpenError::Passphrase(error) => error.exit_code,
                OpenError::NoHelper(error) => key_code(error.reason),
                OpenError::LockedMeanwhile => ASKED,
                OpenError::Changed(_) => CONTENT,
            },
            Self::Serve(error) => match error {
                ServeError::Socket(error) => socket_code(error),
                ServeError::BadFd { .. } | ServeError::IdleFd { .. } => USAGE,
                ServeError::IoUring(_) | ServeError::Control(_) => HOST,
            },
            Self::Socket(error) => socket_code(error),
            Self::Agent(error) => match error {
                AgentError::Socket(error) => socket_code(error),
                AgentError::Audit(error) => audit_code(error),
                AgentError::Dir { .. } => STORAGE,
                AgentError::Setup(_) => HOST,
            },
            Self::Broker(error) => match error {
                BrokerError::Settings(error) => match error {
                    SettingsError::File(error) => toml_code(error),
                    SettingsError::Missing { .. } => STORAGE,
                    SettingsError::Value { .. } => USAGE,
                },
                BrokerError::State(error) => broker_code(error),
                BrokerError::Audit(error) => audit_code(error),
                BrokerError::Tls(_) => USAGE,
                BrokerError::Listen { source, .. } => match source.kind() {
                    io::ErrorKind::AddrInUse => IN_USE,
                    _ => HOST,
                },
                BrokerError::Random(_) => HOST,
            },
            Self::BrokerState(error) => broker_code(error),
            Self::Audit(error) => audit_code(error),
            Self::Config(error) => match error {
                ConfigError::File(error) => toml_code(error),
                ConfigError::Missing { .. } => STORAGE,
                ConfigError::Tpm { .. }
                | ConfigError::SocketGroup { .. }
                | ConfigError::Grantee { .. }
                | ConfigError::NotOfVolumes { .. }
                | ConfigError::Unknown { .. } => USAGE,
            },
            Self::Guard(error) => match error {
                GuardError::InUse { .. } | GuardError::NotBackedUp(_) => IN_USE,
                GuardError::Index { .. } => STORAGE,
                GuardError::Key(error) => key_code(error.reason),
                GuardError::Registry(error) => registry_code(error),
            },
            Self::Registry(error) => registry_code(error),
            Self::Secret(error) => secret_code(error),
            Self::Key(error) => key_code(error.reason),
        }
    }
}

fn key_code(reason: KeyReason) -> u8 {
    match reason {
        KeyReason::Host => HOST,
        KeyReason::NoAgent | KeyReason::NoHelper | KeyReason::NotPermitted => ASKED,
        KeyReason::Indestructible => USAGE,
        _ => KEY,
    }
}

fn secret_code(error: &SecretError) -> u8 {
    match error {
        SecretError::Io { .. } => STORAGE,
        SecretError::Empty { .. } | SecretError::TooLong { .. } => KEY,
        SecretError::NoCredentials { .. } => USAGE,
        SecretError::Arena(_) => HOST,
    }
}

/// Settings of an operator: distinguishes a file that cannot be read from a file with wrong content.
fn toml_code(error: &TomlFileError) -> u8 {
    match error {
        TomlFileError::Read { .. } | TomlFileError::Exposed { .. } => STORAGE,
        TomlFileError::Syntax { .. } => USAGE,
    }
}

fn storage_code(error: &StorageError) -> u8 {
    match error {
        StorageError::InUse { .. } | StorageError::UnderLoop { .. } => IN_USE,
        _ => STORAGE,
    }
}

fn audit_code(error: &AuditError) -> u8 {
    match error {
        AuditError::Io { .. } | AuditError::Missing { .. } => STORAGE,
        AuditError::Broken { .. } | AuditError::Moved { .. } | AuditError::HeadNotFound { .. } => CONTENT,
    }
}

fn broker_code(error: &StateError) -> u8 {
    match error {
        StateError::Io { .. } => STORAGE,
        StateError::Unusable { .. } => CONTENT,
        StateError::Arena(_) => HOST,
        StateError::Exists { .. }
        | StateError::Unknown { .. }
        | StateError::Name(_)
        | StateError::Register(_) => USAGE,
    }
}

/// What to do about a volume that failed, as far as its own error does not tell.
fn remedy(volume: &BindingError) -> String {
    match &*volume.reason {
        BindingReason::Volume(Reason::Header(HeaderError::NotLuks { .. })) => {
            "; name the disk that holds the volume, or the file of its header if that is detached".to_owned()
        }
        BindingReason::Volume(Reason::Wipe { keyslot, .. } | Reason::Entry { keyslot, .. }) => {
            format!(", with `sealblk recovery remove --keyslot {keyslot}`")
        }
        _ => String::new(),
    }
}

/// What may be wrong where there is no volume, and what to do.
fn unencrypted(volume: &VolumeError) -> String {
    let looks_like = match &*volume.reason {
        Reason::Header(HeaderError::NotLuks { looks_like }) => *looks_like,
        _ => None,
    };
    match looks_like.map(|format| (format, format.owner())) {
        Some((format, Owner::Image(_))) => {
            let path = &volume.path;
            Advice { path, format }.to_string()
        }
        Some((format, Owner::Pool)) => format!(
            "{}; if this is an unencrypted disk, and its guest has written that content, serve it with --allow-unencrypted --format raw",
            Advice { path: &volume.path, format }
        ),
        Some((_, Owner::Disk)) | None => "if its header is in another file, give that file with --header; if its header was \
            overwritten, restore a backup of it with `cryptsetup luksHeaderRestore`; only if it was never encrypted, \
            serve it as an unencrypted disk with --allow-unencrypted"
            .to_owned(),
    }
}

fn registry_code(error: &RegistryError) -> u8 {
    match error {
        RegistryError::NoStateDir
        | RegistryError::Name(_)
        | RegistryError::SettingsName { .. }
        | RegistryError::UnknownDefault { .. }
        | RegistryError::Exists { .. }
        | RegistryError::IsDefault { .. }
        | RegistryError::Settings(_)
        | RegistryError::NotNative(_)
        | RegistryError::NotTrusted(_) => USAGE,
        RegistryError::File(error) => toml_code(error),
        RegistryError::Io { .. } | RegistryError::Exposed { .. } | RegistryError::NotWiped { .. } => STORAGE,
        RegistryError::SealWithoutBackup(_) | RegistryError::BackupOfAnother(_) => KEY,
        RegistryError::Key(error) | RegistryError::NotAdded(error) => key_code(error.reason),
    }
}

fn binding_code(reason: &BindingReason) -> u8 {
    match reason {
        BindingReason::Volume(reason) => volume_code(reason),
        BindingReason::Arena(_) => HOST,
        BindingReason::BrokenToken { .. } => CONTENT,
        BindingReason::NoToken
        | BindingReason::NoProvider
        | BindingReason::KekState { .. }
        | BindingReason::ForeignToken { .. }
        | BindingReason::TokenOpensNothing { .. } => KEY,
        BindingReason::Provider { source, .. } | BindingReason::Wrap(source) | BindingReason::Kek(source) => {
            key_code(source.reason)
        }
        BindingReason::RekeyUnfinished(reason) | BindingReason::ReadBack(reason) => binding_code(reason),
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
        Reason::WrongPassphrase { .. } | Reason::WrongBackupPassphrase => KEY,
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
        | Reason::ForgetCached(_)
        | Reason::ReadArea(_)
        | Reason::DamagedCopy { .. }
        | Reason::Erase(_)
        | Reason::NotErased
        | Reason::Entry { .. } => STORAGE,
        Reason::Keyslot { source, .. } if lacks_memory(source) => HOST,
        Reason::Arena(_) | Reason::NewKeyslot(_) | Reason::Random(_) => HOST,
        Reason::Header(_)
        | Reason::Keyslot { .. }
        | Reason::Refused(_)
        | Reason::NoKeyslots
        | Reason::Replaced { .. }
        | Reason::ChangedMeanwhile
        | Reason::NotItsKey
        | Reason::NoneFree { .. }
        | Reason::NoRoom
        | Reason::NoVault { .. }
        | Reason::NoWayIn => CONTENT,
    }
}

fn socket_code(error: &BindError) -> u8 {
    match error {
        BindError::InUse { .. } => IN_USE,
        BindError::NotASocket { .. } | BindError::TooLong { .. } => USAGE,
        BindError::Bind { .. } | BindError::Group { .. } | BindError::Replaced { .. } => STORAGE,
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
            (Reason::NewKeyslot(memory()), HOST),
            (Reason::WrongPassphrase { untried }, HOST),
            (Reason::WrongPassphrase { untried: vec![] }, KEY),
            (keyslot(KeyslotError::Read(io())), STORAGE),
            (keyslot(KeyslotError::Lock(io())), STORAGE),
            (Reason::Header(HeaderError::Read(io())), STORAGE),
            (keyslot(KeyslotError::KeySize { bits: 256 }), CONTENT),
        ] {
            assert_eq!(volume_code(&reason), code, "{reason}");
        }
    }
}
