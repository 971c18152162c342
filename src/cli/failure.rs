//! The failures of verbs, and whose the cause is: exit codes follow from that, and tell a script who must act.

use std::io;
use std::path::PathBuf;

use sealblk_base::blame::Blame;
use sealblk_command::executable::NoExecutable;
use sealblk_command::output::OutputError;
use uuid::Uuid;

use crate::agent::{AgentError, AuditError};
use crate::broker::{BrokerError, StateError};
use crate::cipher::CipherError;
use crate::control::varlink::CallError;
use crate::disks::{DefinitionError, DiskName};
use crate::inventory::GuardError;
use crate::keys::binding::{BindingError, BindingReason};
use crate::keys::{KeyError, KeyId, KeyReason};
use crate::luks2::{Content, HeaderError, Reason, Refusal, VolumeError};
use crate::providers::registry::RegistryError;
use crate::storage::StorageError;

use super::config::ConfigError;
use super::secret::SecretError;
use super::strength::WeakSecret;

/// A verb's failure.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The process could not be prepared for holding keys.
    #[error("cannot protect this process' memory from other processes of the same user")]
    Process(#[source] io::Error),
    /// What a verb prints did not go out.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Options of a disk.
    #[error("{}; see `sealblk serve --help`", first_part(.0))]
    Options(clap::Error),
    /// The definition of a disk.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// A file in this directory has the name of a disk.
    #[error(
        "this host has a disk {name}, and this directory a file of that name; write ./{name} for the file, or run the command elsewhere"
    )]
    NameOrPath {
        /// The name.
        name: DiskName,
    },
    /// A header for a disk whose definition tells where it is.
    #[error("--header cannot be given with a disk's name: the definition of {name} says where its header is")]
    HeaderOfName {
        /// The disk.
        name: DiskName,
    },
    /// Another volume in the place of a disk's.
    #[error("{}: holds the volume {found}, and not {expected}, which the disk's definition has", disk.display())]
    NotItsVolume {
        /// The file.
        disk: PathBuf,
        /// What the definition has.
        expected: Uuid,
        /// What is there.
        found: Uuid,
    },
    /// A disk that is to be undefined.
    #[error("{name} is being served; run `sealblk stop {name}` first")]
    Served {
        /// The disk.
        name: DiskName,
    },
    /// The same, under another name or none.
    #[error(
        "the volume of {name} is being served by process {}; end it first",
        list(processes)
    )]
    ServedBy {
        /// The disk.
        name: DiskName,
        /// By whom.
        processes: Vec<i32>,
    },
    /// An option of a disk at rest.
    #[error("{option} is for a disk at rest, and this one is being served; stop it first")]
    NotWhileServed {
        /// Which option.
        option: &'static str,
    },
    /// A unit of systemd.
    #[error("`systemctl {verb} {unit}` failed; `journalctl -u {unit}` says why")]
    Unit {
        /// What systemd was told.
        verb: &'static str,
        /// Which unit.
        unit: String,
    },
    /// A disk of a domain that is to start.
    #[error("the disk {name} cannot be served: {}", if said.is_empty() { "see `sealblk list`" } else { said })]
    NotStarted {
        /// The disk.
        name: String,
        /// What its service has said.
        said: String,
    },
    /// No libvirt.
    #[error("virsh cannot be started; it is in the package libvirt-clients, or libvirt-client")]
    NoVirsh {
        /// The answer.
        source: io::Error,
    },
    /// libvirt refuses.
    #[error("`virsh {verb}` failed: {said}")]
    Virsh {
        /// Its command.
        verb: String,
        /// What it says.
        said: String,
    },
    /// What libvirt gives as a domain.
    #[error("libvirt's domain cannot be read, or names disks in its metadata that cannot be names")]
    NoDomain,
    /// A disk that the domain has.
    #[error("the domain {domain:?} has this disk, or another one as {target}")]
    Attached {
        /// The domain.
        domain: String,
        /// Where.
        target: String,
    },
    /// A disk that the domain does not have.
    #[error("the domain {domain:?} does not have the disk {name}")]
    NotAttached {
        /// The domain.
        domain: String,
        /// The disk.
        name: DiskName,
    },
    /// A host without systemd.
    #[error(
        "systemctl cannot be started; without systemd, use --foreground, and end the process with SIGTERM"
    )]
    NoSystemd {
        /// The answer.
        source: io::Error,
    },
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
    /// A group that this host does not have.
    #[error("this host has no group called {name:?}; correct the name, or make the group")]
    NoGroup {
        /// As it was given.
        name: String,
    },
    /// The executable that serves a disk.
    #[error(transparent)]
    Executable(#[from] NoExecutable),
    /// This program by the name of that executable.
    #[error(
        "this is `sealblk` under the name `vhost-user-sealblk`: remove it (it may be a link), and install the executable \
         vhost-user-sealblk in its place"
    )]
    NotTheServer,
    /// It is there, and does not start.
    #[error("cannot execute {}; check that this user may execute it", path.display())]
    Execute {
        /// The executable.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
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
    /// A disk stays with the process that serves it.
    #[error("{}: not upgraded, and served by the same process as before: {reason}", socket.display())]
    NotUpgraded {
        /// Its control socket.
        socket: PathBuf,
        /// Why the new process does not, in its own words.
        reason: String,
        /// As the new process has it.
        blame: Blame,
    },
    /// The host is out of something.
    #[error(
        "this host is out of descriptors or threads; raise LimitNOFILE and TasksMax of the unit, or `ulimit -n` and `-u`"
    )]
    Host(#[source] io::Error),
    /// A passphrase or recovery key cannot be read or written.
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl From<VolumeError> for Failure {
    fn from(error: VolumeError) -> Self {
        Self::Volume(error.into())
    }
}

/// What clap says first, on one line, without the usage of a verb that the operator has not called.
fn first_part(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let part = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = part.trim_start_matches("error: ").split_whitespace().collect();
    words.join(" ")
}

/// Numbers, as they are told.
fn list(numbers: &[i32]) -> String {
    let texts: Vec<_> = numbers.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

impl Failure {
    /// What goes with it, one a line.
    pub(super) fn list(&self) -> Vec<String> {
        match self {
            Self::Guard(GuardError::InUse { uses, .. }) => uses.lines(),
            _ => Vec::new(),
        }
    }

    /// Where the cause lies.
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::Process(_)
            | Self::Cipher(_)
            | Self::Host(_)
            | Self::Executable(_)
            | Self::NotTheServer
            | Self::NoSystemd { .. }
            | Self::NoVirsh { .. }
            | Self::Execute { .. } => Blame::Host,
            Self::SizeNeeded { .. }
            | Self::WeakSecret(_)
            | Self::OpensAlready { .. }
            | Self::Confirm { .. }
            | Self::ConfirmErasure { .. }
            | Self::Unconfirmed { .. }
            | Self::NoPolicy
            | Self::NoGroup { .. }
            | Self::OneDisk
            | Self::NotDue
            | Self::Options(_)
            | Self::NameOrPath { .. }
            | Self::NoDomain
            | Self::NotAttached { .. }
            | Self::HeaderOfName { .. }
            | Self::OwnHeader { .. } => Blame::Operator,
            Self::NotItsVolume { .. } | Self::Backup { .. } | Self::NoReceipt { .. } => Blame::Content,
            Self::NoProvider | Self::Unusable { .. } => Blame::Key,
            Self::Attached { .. }
            | Self::Served { .. }
            | Self::ServedBy { .. }
            | Self::NotWhileServed { .. }
            | Self::MayBeServed { .. }
            | Self::Occupied { .. } => Blame::Use,
            Self::Make { .. } | Self::Look { .. } => Blame::Storage,
            Self::Control { .. } | Self::NoAgent { .. } => Blame::Process,
            Self::Unit { .. } | Self::NotStarted { .. } | Self::Virsh { .. } => Blame::Process,
            Self::Definition(error) => error.blame(),
            Self::NotUpgraded { blame, .. } => *blame,
            Self::NotRevocable { source, .. } => source.reason.blame(),
            Self::NotRevoked { why, .. } => why.blame(),
            Self::Refused { reason, .. } => reason.map_or(Blame::Process, KeyReason::blame),
            Self::Output(error) => error.blame(),
            Self::Storage(error) => error.blame(),
            Self::Volume(error) => error.reason.blame(),
            Self::Agent(error) => error.blame(),
            Self::Broker(error) => error.blame(),
            Self::BrokerState(error) => error.blame(),
            Self::Audit(error) => error.blame(),
            Self::Config(error) => error.blame(),
            Self::Guard(error) => error.blame(),
            Self::Registry(error) => error.blame(),
            Self::Secret(error) => error.blame(),
            Self::Key(error) => error.reason.blame(),
        }
    }
}

/// What to do about a volume that failed, as far as its own error does not tell.
fn remedy(volume: &BindingError) -> String {
    let BindingReason::Volume(reason) = &*volume.reason else {
        return String::new();
    };
    match reason {
        Reason::Header(HeaderError::NotLuks { .. }) => {
            "; name the disk that holds the volume, or the file of its header if that is detached".to_owned()
        }
        Reason::Wipe { keyslot, .. } | Reason::Entry { keyslot, .. } => {
            format!(", with `sealblk recovery remove --keyslot {keyslot}`")
        }
        Reason::NoSuchKeyslot { .. } | Reason::NoRecoveryKey { .. } => "; see `sealblk info`".to_owned(),
        Reason::SameKey { .. } => " (--unlock-key)".to_owned(),
        Reason::Refused(Refusal::MidErasure) => " with `sealblk erase`".to_owned(),
        Reason::Shrinks { .. } => "; if they may be lost, add --shrink".to_owned(),
        Reason::Erase(_) => ", with `sealblk erase`".to_owned(),
        _ => String::new(),
    }
}
