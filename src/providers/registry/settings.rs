//! `providers.toml`: the providers of a host, in a form that the operator can read and edit.
//!
//! ```toml
//! default = "native"
//!
//! [provider.native]
//! kind = "native"
//! backup = "taken"
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::RegistryError;
use crate::keys::KeyError;
use crate::providers::backup::Backup;
use crate::providers::native::Native;
use crate::providers::source::KekSource;
use crate::providers::{expiry, expiry::Expiring};
use crate::providers::{kmip, kmip::Kmip};
use crate::providers::{transit, transit::Transit};
use crate::providers::{trusted, trusted::Trusted};
use crate::toml_file;
use sealblk_secmem::{private_file, private_file::Exposed, private_file::Forbid};

/// What can be the name of a provider: it appears in paths and in volume headers.
pub(super) const NAME_RULE: &str =
    "a name has up to 64 lower-case letters, digits, '-' and '_', and begins with a letter or digit";

/// The settings' name in the state directory.
pub(in crate::providers) const FILE: &str = "providers.toml";

/// All of it: every name is valid, and the default exists.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    /// The provider that new volumes take when none is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) default: Option<String>,
    /// The providers that were removed, and whose files are to be wiped still.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) removing: Vec<String>,
    /// By name.
    #[serde(default)]
    pub(super) provider: BTreeMap<String, Source>,
}

/// Where a provider's KEKs come from, and what it has to be told for that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Source {
    /// A primary key in the provider's directory.
    Native {
        /// Whether there is a backup of it.
        #[serde(default)]
        backup: Backup,
    },
    /// Key servers that speak KMIP.
    Kmip(kmip::Settings),
    /// A key of a server's that wraps KEKs.
    Transit(transit::Settings),
    /// A broker that releases a key to a host which proves what it has booted.
    Trusted(trusted::Settings),
}

impl Source {
    /// Its kind, as the settings and the command line spell it.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Source::Native { .. } => "native",
            Source::Kmip(_) => "kmip",
            Source::Transit(_) => "transit",
            Source::Trusted(_) => "trusted",
        }
    }

    /// Where its keys come from: a path, or servers' addresses. `dir` is the provider's directory.
    pub(super) fn location(&self, dir: &Path) -> String {
        match self {
            Source::Native { .. } => primary_key(dir).display().to_string(),
            Source::Kmip(settings) => settings.location(),
            Source::Transit(settings) => settings.location(),
            Source::Trusted(settings) => settings.location(),
        }
    }

    /// The certificates that are to be renewed before long.
    pub(super) fn expiring(&self) -> Vec<Expiring> {
        match self {
            Source::Native { .. } => Vec::new(),
            Source::Kmip(settings) => expiry::expiring(&settings.tls_files()),
            Source::Transit(settings) => expiry::expiring(&settings.tls_files()),
            Source::Trusted(settings) => expiry::expiring(&settings.tls_files()),
        }
    }

    /// Makes what it keeps in `dir`. What a crash left there before the settings named it, or what was brought back from
    /// a backup, is taken up.
    pub(super) fn prepare(&self, name: &str, dir: &Path) -> Result<(), RegistryError> {
        match self {
            Source::Native { backup } => {
                let path = primary_key(dir);
                let exists = path.try_exists().map_err(|source| RegistryError::Io {
                    action: "look for",
                    path: path.clone(),
                    source,
                })?;
                match exists {
                    true => Native::open(name, &path, *backup).map(drop)?,
                    false => Native::create(name, &path)?,
                }
            }
            Source::Kmip(settings) => drop(Kmip::new(name, settings).map_err(RegistryError::Settings)?),
            Source::Transit(settings) => drop(Transit::new(name, settings).map_err(RegistryError::Settings)?),
            Source::Trusted(settings) => {
                Trusted::prepare(name, settings, dir).map_err(RegistryError::Settings)?;
            }
        }
        Ok(())
    }

    /// Makes it ready for use.
    pub(super) fn open(&self, name: &str, dir: &Path) -> Result<Box<dyn KekSource>, KeyError> {
        match self {
            Source::Native { backup } => Ok(Box::new(Native::open(name, &primary_key(dir), *backup)?)),
            Source::Kmip(settings) => Ok(Box::new(Kmip::new(name, settings)?)),
            Source::Transit(settings) => Ok(Box::new(Transit::new(name, settings)?)),
            Source::Trusted(settings) => Ok(Box::new(Trusted::open(name, settings, dir)?)),
        }
    }
}

/// Refuses a directory that others can get at.
pub(super) fn check_private(path: &Path, forbid: Forbid) -> Result<(), RegistryError> {
    let metadata = std::fs::metadata(path).map_err(|source| RegistryError::Io {
        action: "look at",
        path: path.to_owned(),
        source,
    })?;
    private_file::check_in_state(path, &metadata, forbid).map_err(|e: Exposed| RegistryError::Exposed {
        path: path.to_owned(),
        source: Box::new(e),
    })
}

/// Refuses what cannot be a provider's name.
pub(super) fn check_name(name: &str) -> Result<(), RegistryError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let valid =
        name.len() <= 64 && name.starts_with(plain) && name.chars().all(|c| plain(c) || c == '-' || c == '_');
    if valid {
        Ok(())
    } else {
        Err(RegistryError::Name(name.to_owned()))
    }
}

/// The file of a native provider in its directory.
pub(super) fn primary_key(dir: &Path) -> PathBuf {
    dir.join("primary.key")
}

impl Settings {
    /// Reads the settings of a state directory; without a file there are none.
    pub(super) fn read(dir: &Path) -> Result<Self, RegistryError> {
        let path = dir.join(FILE);
        let Some(settings) = toml_file::read_in_state::<Self>(&path)? else {
            return Ok(Self::default());
        };
        check_private(dir, Forbid::Write)?;
        settings.check(&path)?;
        Ok(settings)
    }

    fn check(&self, path: &Path) -> Result<(), RegistryError> {
        let path = || path.to_owned();
        let mut names = self.provider.keys().chain(&self.removing);
        if names.any(|name| check_name(name).is_err()) {
            return Err(RegistryError::SettingsName { path: path() });
        }
        match &self.default {
            Some(name) if !self.provider.contains_key(name) => {
                let known: Vec<_> = self.provider.keys().map(String::as_str).collect();
                Err(RegistryError::UnknownDefault {
                    path: path(),
                    known: known.join(", "),
                })
            }
            _ => Ok(()),
        }
    }

    /// Replaces the settings of a state directory. The caller has it locked since it read them.
    pub(super) fn write(&self, dir: &Path) -> Result<(), RegistryError> {
        let path = dir.join(FILE);
        let not_text = |_| {
            io::Error::other(
                "TOML cannot hold a path that is not UTF-8; rename the file, or give a link to it",
            )
        };
        let written = toml::to_string(self).map_err(not_text);
        let replaced = written.and_then(|text| private_file::replace_in_state(&path, text.as_bytes()));
        replaced.map_err(|source| RegistryError::Io {
            action: "write",
            path,
            source,
        })
    }
}
