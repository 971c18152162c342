//! Why a disk is not served, and whose the cause is.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use sealblk_base::blame::Blame;
use sealblk_command::executable::NoExecutable;
use sealblk_command::output::OutputError;
use sealblk_command::secret::SecretError;
use uuid::Uuid;

use crate::attachment::OpenError;
use crate::cipher::{CipherError, SectorSize};
use crate::control::socket::BindError;
use crate::device::ServeError;
use crate::key_helper::{HelperError, HelperFailure};
use crate::keys::KeyError;
use crate::luks2::{Advice, HeaderError, Owner, Reason, Refusal, VolumeError};
use crate::map::UnencryptedError;
use crate::sandbox::SandboxError;
use crate::storage::StorageError;
use crate::upgrade::TakeError;

/// Why a disk is not served.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The process could not be prepared for holding keys.
    #[error("cannot protect this process' memory from other processes of the same user")]
    Process(#[source] io::Error),
    /// What is printed did not go out.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The cipher does not work here.
    #[error(transparent)]
    Cipher(#[from] CipherError),
    /// The disk's file or device.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A key is not available.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The volume.
    #[error("{_0}{}", remedy(.0))]
    Volume(#[from] VolumeError),
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
    /// No group for a socket.
    #[error("{option}: {source}")]
    Group {
        /// That names the group.
        option: &'static str,
        /// Why not.
        source: Box<Failure>,
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
    /// The host is out of something.
    #[error(
        "this host is out of descriptors or threads; raise LimitNOFILE and TasksMax of the unit, or `ulimit -n` and `-u`"
    )]
    Host(#[source] io::Error),
    /// The executable of the process that is to get the keys.
    #[error(transparent)]
    Executable(#[from] NoExecutable),
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
    /// The disk stays with the process that serves it.
    #[error("the disk is not taken over")]
    TakeOver(#[from] TakeError),
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
    /// Where the cause lies.
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::Process(_)
            | Self::Cipher(_)
            | Self::Null(_)
            | Self::Host(_)
            | Self::StartHelper(_)
            | Self::Executable(_)
            | Self::Sandbox(_) => Blame::Host,
            Self::SameDescriptor { .. }
            | Self::SameSocket { .. }
            | Self::KeyOfPlainDisk { .. }
            | Self::SectorSizeOfVolume { .. }
            | Self::FormatOfVolume { .. }
            | Self::NullStorage { .. } => Blame::Operator,
            Self::OtherVolume { .. } | Self::Unencrypted { .. } => Blame::Content,
            Self::WriteProtected { .. } => Blame::Storage,
            Self::Output(error) => error.blame(),
            Self::Storage(error) => error.blame(),
            Self::Key(error) => error.reason.blame(),
            Self::Volume(error) => error.reason.blame(),
            Self::NotUnencrypted(error) => error.blame(),
            Self::Group { source, .. } => source.blame(),
            Self::Helper(error) => error.blame,
            Self::Socket(error) => error.blame(),
            Self::Open(error) => error.blame(),
            Self::Serve(error) => error.blame(),
            Self::Secret(error) => error.blame(),
            Self::TakeOver(error) => error.blame(),
        }
    }
}

/// What to do about a volume that failed, as far as its own error does not tell.
fn remedy(volume: &VolumeError) -> &'static str {
    match &*volume.reason {
        Reason::Header(HeaderError::NotLuks { .. }) => {
            "; name the disk that holds the volume, or the file of its header if that is detached"
        }
        Reason::Refused(Refusal::MidErasure) => " with `sealblk erase`",
        _ => "",
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
