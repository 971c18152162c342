//! Why the providers of a host are not known, or cannot be changed.

use std::io;
use std::path::PathBuf;

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
    #[error("{}: there is no provider of the name that `default` has; known: {known}", path.display())]
    UnknownDefault {
        /// The file.
        path: PathBuf,
        /// The names there are.
        known: String,
    },
    /// The settings name a provider as none can be named.
    #[error("{}: a [provider.NAME], or one that is being removed, has a name that none can have: {NAME_RULE}", path.display())]
    SettingsName {
        /// The file.
        path: PathBuf,
    },
    /// Names appear in paths and in volume headers.
    #[error("{0:?} cannot name a provider: {NAME_RULE}")]
    Name(String),
    /// There is one already.
    #[error(
        "there is a provider called {name:?} already, in {}; volumes know theirs by its name: `sealblk provider remove` it if no \
         disk needs it, or choose another name for one that no disk knows yet",
        dir.display()
    )]
    Exists {
        /// The name.
        name: String,
        /// The state directory.
        dir: PathBuf,
    },
    /// New volumes would have no provider, though there are some.
    #[error(
        "{name:?} is the default provider; name the one that takes its place, with --new-default: {others}"
    )]
    IsDefault {
        /// The name.
        name: String,
        /// The names there are beside it.
        others: String,
    },
    /// The provider is gone, its files are not.
    #[error("{name:?} was removed, but its files in {} cannot be wiped; wipe them by other means", dir.display())]
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
    #[error("{0}; the provider was not added: mend that, or add it as it is with --no-check")]
    NotAdded(#[source] KeyError),
    /// Only a primary key can be backed up here.
    #[error("provider {0:?} is no native one: its keys are its server's, and are backed up there")]
    NotNative(String),
    /// The TPM would have the only copy of a primary key.
    #[error(
        "the primary key of {0:?} has no backup, and a TPM that breaks or is cleared, or a host that boots otherwise, would \
         take it along: take one with `sealblk provider backup {0} --to FILE --passphrase-file FILE` first"
    )]
    SealWithoutBackup(String),
    /// A backup is of a primary key that the provider has no more.
    #[error(
        "the primary key of {0:?} was replaced while its backup was taken, so the backup is of another one: keep it for the disks \
         of that one, and take a new backup"
    )]
    BackupOfAnother(String),
    /// Only a host that proves what it has booted is enrolled.
    #[error("provider {0:?} is no trusted one: its servers know this host by other means")]
    NotTrusted(String),
    /// The provider's own files.
    #[error(transparent)]
    Key(#[from] KeyError),
}
