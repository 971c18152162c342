//! Why the providers of a host cannot be read or changed.

use std::io;
use std::path::PathBuf;

use sealblk_base::blame::Blame;

use super::settings::NAME_RULE;
use crate::keys::KeyError;
use crate::toml_file::TomlFileError;

/// Why the providers of this host are not known, or cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Neither an option nor the environment says where the state is.
    #[error("no state directory: neither XDG_STATE_HOME nor HOME is set; name one with --state-dir")]
    NoStateDir,
    /// The file system refused.
    #[error(
        "cannot {action} {}; run as the owner of the state directory, or name another one with --state-dir",
        path.display()
    )]
    Io {
        /// "read", "write" …
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Others could have put providers of theirs here.
    #[error("{} is not safe to use", path.display())]
    Exposed {
        /// The file or directory.
        path: PathBuf,
        /// Who can do what with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The settings' file.
    #[error(transparent)]
    File(#[from] TomlFileError),
    /// The settings name a default that is not there.
    #[error("{}: `default` names a provider that does not exist; known: {known}", path.display())]
    UnknownDefault {
        /// The file.
        path: PathBuf,
        /// The names there are.
        known: String,
    },
    /// The settings name a provider as none can be named.
    #[error("{}: the name of a [provider.NAME], or of one that is being removed, is not allowed: {NAME_RULE}", path.display())]
    SettingsName {
        /// The file.
        path: PathBuf,
    },
    /// Names appear in paths and in volume headers.
    #[error("{0:?} is not allowed as the name of a provider: {NAME_RULE}")]
    Name(String),
    /// There is one already.
    #[error(
        "a provider called {name:?} exists already, in {}; volumes find their provider by its name: remove it with \
         `sealblk provider remove` if no disk needs it, or choose another name for a provider without disks",
        dir.display()
    )]
    Exists {
        /// The name.
        name: String,
        /// The state directory.
        dir: PathBuf,
    },
    /// New volumes would have no provider, though there are some.
    #[error("{name:?} is the default provider; name the new default provider with --new-default: {others}")]
    IsDefault {
        /// The name.
        name: String,
        /// The names there are beside it.
        others: String,
    },
    /// The provider is gone, its files are not.
    #[error("{name:?} was removed, but sealblk cannot wipe its files in {}; wipe them by other means", dir.display())]
    NotWiped {
        /// The name.
        name: String,
        /// Where the files are.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Settings that a provider cannot be added with.
    #[error(transparent)]
    Settings(KeyError),
    /// A provider that does not work is not added.
    #[error("{0}; the provider was not added: remove the cause, or add it without a test, with --no-check")]
    NotAdded(#[source] KeyError),
    /// Only a primary key can be backed up here.
    #[error("provider {0:?} is not a native one: its keys belong to its server, and are backed up there")]
    NotNative(String),
    /// The TPM would have the only copy of a primary key.
    #[error(
        "the primary key of {0:?} has no backup; if the TPM breaks or is cleared, or the host boots other software, the key would \
         be lost: first take a backup with `sealblk provider backup {0} --to FILE --passphrase-file FILE`"
    )]
    SealWithoutBackup(String),
    /// A backup is of a primary key that the provider has no more.
    #[error(
        "the primary key of {0:?} was replaced while its backup was taken, so the backup has the previous key: keep it for the \
         disks of that key, and take a new backup"
    )]
    BackupOfAnother(String),
    /// Only a host that proves what it has booted is enrolled.
    #[error("provider {0:?} is not a trusted one: its servers identify this host by other means")]
    NotTrusted(String),
    /// The provider's own files.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl RegistryError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::NoStateDir
            | Self::Name(_)
            | Self::SettingsName { .. }
            | Self::UnknownDefault { .. }
            | Self::Exists { .. }
            | Self::IsDefault { .. }
            | Self::Settings(_)
            | Self::NotNative(_)
            | Self::NotTrusted(_) => Blame::Operator,
            Self::File(error) => error.blame(),
            Self::Io { .. } | Self::Exposed { .. } | Self::NotWiped { .. } => Blame::Storage,
            Self::SealWithoutBackup(_) | Self::BackupOfAnother(_) => Blame::Key,
            Self::Key(error) | Self::NotAdded(error) => error.reason.blame(),
        }
    }
}
