//! The settings file of a broker.
//!
//! ```toml
//! listen = "[::]:8700"
//! certificate = "/etc/sealblk/broker.pem"
//! key = "/etc/sealblk/broker.key"
//! state-dir = "/var/lib/sealblk-broker"
//! endorsement-authorities = "/etc/sealblk/tpm-makers.pem"
//! session-lifetime = 60
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sealblk_base::blame::Blame;
use serde::Deserialize;

use crate::providers::tls::Identity;
use crate::toml_file::{self, TomlFileError};

/// What a broker runs on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// The address and port that hosts ask.
    pub listen: SocketAddr,
    /// Its certificate, and those between it and an authority that hosts believe: a PEM file.
    certificate: PathBuf,
    /// The certificate's private key, readable by its owner alone.
    key: PathBuf,
    /// What it keeps.
    pub state_dir: PathBuf,
    /// The certificates of TPMs' makers: a PEM file. Without it, a host's endorsement key has to be named to be believed.
    pub endorsement_authorities: Option<PathBuf>,
    /// How long a host has for an attestation, or an enrolment, in seconds.
    #[serde(default = "session_lifetime")]
    session_lifetime: u16,
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file.
    #[error(transparent)]
    File(#[from] TomlFileError),
    /// There is none.
    #[error(
        "{}: the broker's settings file does not exist; write it (`sealblk broker --help` has an example), or name another with --config",
        path.display()
    )]
    Missing {
        /// Where they belong.
        path: PathBuf,
    },
    /// A value that is none.
    #[error("{}: {what}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

impl SettingsError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::File(error) => error.blame(),
            Self::Missing { .. } => Blame::Storage,
            Self::Value { .. } => Blame::Operator,
        }
    }
}

fn session_lifetime() -> u16 {
    60
}

impl Settings {
    /// Reads them.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let own = || path.to_owned();
        let settings: Self = toml_file::read(path)?.ok_or_else(|| SettingsError::Missing { path: own() })?;
        let files = [&settings.certificate, &settings.key, &settings.state_dir];
        let what = match settings.session_lifetime {
            _ if files
                .into_iter()
                .chain(&settings.endorsement_authorities)
                .any(|f| !f.is_absolute()) =>
            {
                "files must have absolute paths, which begin with /"
            }
            1..=600 => return Ok(settings),
            _ => "session-lifetime: must be 1 to 600 seconds",
        };
        Err(SettingsError::Value { path: own(), what })
    }

    pub(super) fn identity(&self) -> Identity {
        Identity {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
        }
    }

    pub(super) fn session_lifetime(&self) -> Duration {
        Duration::from_secs(self.session_lifetime.into())
    }
}
