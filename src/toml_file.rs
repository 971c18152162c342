//! TOML files that an operator writes: read strictly, and only where nobody else could have written them.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::error_chain::remedy;
use crate::keys::private_file::{self, Forbid};
use crate::parsing::{self, NotUnderstood};

/// Why such a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TomlFileError {
    /// The file system refused.
    #[error("cannot read {}{}", path.display(), remedy(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Others could have written it.
    #[error("{} is not safe to use", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Who can do what with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is not TOML, or holds what is not known.
    #[error("{} cannot be understood; correct it, or restore it from a backup", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: NotUnderstood,
    },
}

/// What the file at `path` says; nothing, if there is no file.
///
/// # Errors
/// [`TomlFileError`].
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TomlFileError> {
    let own = || path.to_owned();
    let failed = |source| TomlFileError::Read { path: own(), source };
    let mut file = match private_file::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let metadata = file.metadata().map_err(failed)?;
    private_file::check(path, &metadata, Forbid::Write).map_err(|error| TomlFileError::Exposed {
        path: own(),
        source: error.into(),
    })?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    let content = parsing::toml(&text).map_err(|source| TomlFileError::Syntax { path: own(), source })?;
    Ok(Some(content))
}
