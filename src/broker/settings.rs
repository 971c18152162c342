//! The file that sets a broker up.
//!
//! ```toml
//! listen = "[::]:8700"
//! certificate = "/etc/sealblk/broker.pem"
//! key = "/etc/sealblk/broker.key"
//! state-dir = "/var/lib/sealblk-broker"
//! endorsement-authorities = "/etc/sealblk/tpm-makers.pem"
//! session-lifetime = 60
//! ```

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::keys::private::{self, Exposed, Forbid};
use crate::keys::tls::Identity;

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
    /// The file system refused.
    #[error("cannot read the broker's settings {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Others could have written them.
    #[error("the broker's settings {} are not safe to use", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Who can do what with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// They are not TOML, or hold what is not known.
    #[error("the broker's settings {} cannot be understood", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
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
        let io = |source| SettingsError::Read { path: own(), source };
        let text = fs::read_to_string(path).map_err(io)?;
        let metadata = fs::metadata(path).map_err(io)?;
        private::check(path, &metadata, Forbid::Write).map_err(|e: Exposed| SettingsError::Exposed {
            path: own(),
            source: Box::new(e),
        })?;
        let settings: Self = toml::from_str(&text).map_err(|e| SettingsError::Syntax {
            path: own(),
            source: Box::new(e),
        })?;
        let files = [&settings.certificate, &settings.key, &settings.state_dir];
        let what = match settings.session_lifetime {
            _ if files
                .into_iter()
                .chain(&settings.endorsement_authorities)
                .any(|f| !f.is_absolute()) =>
            {
                "files are named by absolute paths"
            }
            1..=600 => return Ok(settings),
            _ => "session-lifetime: from 1 to 600 seconds are possible",
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
