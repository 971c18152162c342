//! The configuration file: the host's key agent, the privileges of its callers, and the maximum age of keys.
//!
//! ```toml
//! [agent]
//! socket = "/run/sealblk/agent.sock"
//! kek-time-to-live = 600
//! kek-grace = 600
//!
//! [policy]
//! max-key-age = "90d"
//!
//! [[grant]]
//! user = "sealblk-vm7"
//! privileges = ["RegisterVM"]
//! volumes = ["e2a81bd8-66d8-4f4d-9c2c-f6d4b3e9a001"]
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sealblk_base::blame::Blame;
use serde::{Deserialize, Deserializer};
use uuid::Uuid;

use crate::agent;
use crate::control::privilege::{Grant, Grantee, Grants, Privilege};
use crate::control::socket::Permissions;
use crate::parsing::{broken, rule};
use crate::providers::SealedCacheSettings;
use crate::toml_file::{self, TomlFileError};
use crate::tpm::Device;
use crate::tpm::pcr::Selection;
use sealblk_command::socket_args::parse_mode;

/// The default path of the configuration, which may be missing.
pub(super) const DEFAULT_PATH: &str = "/etc/sealblk/config.toml";

/// The default grace period of the sealed cache.
const DEFAULT_GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// What runs: users and groups are those of the host.
#[derive(Debug, Default)]
pub(super) struct Config {
    /// The agent, if keys come from one.
    pub(super) agent: Option<Agent>,
    /// The privileges of its callers.
    pub(super) grants: Grants,
    /// How long a volume may be bound to a key.
    pub(super) max_key_age: Option<Duration>,
}

/// The host's key agent.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    /// Where it listens.
    pub(super) socket: PathBuf,
    /// Who may connect there.
    pub(super) permissions: Permissions,
    /// How long it keeps a KEK.
    pub(super) time_to_live: Duration,
    /// How long it keeps the KEK of a volume whose process was killed.
    pub(super) kek_grace: Duration,
    /// What it keeps for a reboot.
    pub(super) sealed_cache: Option<SealedCacheSettings>,
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            socket: agent::DEFAULT_SOCKET.into(),
            permissions: ANYBODY,
            time_to_live: agent::DEFAULT_TIME_TO_LIVE,
            kek_grace: agent::DEFAULT_KEK_GRACE,
            sealed_cache: None,
        }
    }
}

/// Grants name any users and groups, but a socket has one group. So the agent identifies each caller after it connects.
const ANYBODY: Permissions = Permissions {
    mode: 0o666,
    group: None,
};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error(transparent)]
    File(#[from] TomlFileError),
    /// One that was named is not there.
    #[error("{}: this configuration file does not exist; make it, or name another with --config or SEALBLK_CONFIG", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A TPM that is named by what is no whole path.
    #[error("{}: tpm under [agent.sealed-cache] must be an absolute path", path.display())]
    Tpm {
        /// The file.
        path: PathBuf,
    },
    /// A grant without a user or group, or with both.
    #[error("{}: a [[grant]] must name either a user or a group, not both; add `user` or `group`", path.display())]
    Grantee {
        /// The file.
        path: PathBuf,
    },
    /// No group for the agent's socket.
    #[error("{}: socket-group under [agent] names a group that does not exist on this host; correct it, or make the group", path.display())]
    SocketGroup {
        /// The file.
        path: PathBuf,
    },
    /// A grant for some volumes of what is about none.
    #[error(
        "{}: a [[grant]] with `volumes` can only have Access, Migrate, Recrypt and RegisterVM: give {privilege} in a [[grant]] without `volumes`",
        path.display()
    )]
    NotOfVolumes {
        /// The file.
        path: PathBuf,
        /// What cannot be granted so.
        privilege: Privilege,
    },
    /// A grant to a user or group that the host does not have.
    #[error("{}: [[grant]] number {number} names a {what} that does not exist on this host; correct it, or make the {what}", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Which grant of the file, from 1 on.
        number: usize,
        /// "user" or "group".
        what: &'static str,
    },
}

impl ConfigError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::File(error) => error.blame(),
            Self::Missing { .. } => Blame::Storage,
            Self::Tpm { .. }
            | Self::SocketGroup { .. }
            | Self::Grantee { .. }
            | Self::NotOfVolumes { .. }
            | Self::Unknown { .. } => Blame::Operator,
        }
    }
}

/// What is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    agent: Option<WrittenAgent>,
    policy: Option<WrittenPolicy>,
    #[serde(default)]
    grant: Vec<WrittenGrant>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct WrittenAgent {
    socket: Option<PathBuf>,
    socket_group: Option<Id>,
    #[serde(default, deserialize_with = "mode")]
    socket_mode: Option<u32>,
    kek_time_to_live: Option<u32>,
    kek_grace: Option<u32>,
    sealed_cache: Option<WrittenSealedCache>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSealedCache {
    #[serde(default, deserialize_with = "age")]
    grace: Option<Duration>,
    #[serde(default)]
    tpm: Device,
    pcrs: Option<Selection>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct WrittenPolicy {
    #[serde(default, deserialize_with = "age")]
    max_key_age: Option<Duration>,
}

/// A mode in octal, as in `"660"`.
fn mode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_mode(&text).map(Some).map_err(|_| broken(rule::MODE))
}

/// A length of time, as in `90d`.
fn age<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_age(&text).map(Some).map_err(|_| broken(rule::AGE))
}

/// How old a key may get.
pub(super) fn parse_age(text: &str) -> Result<Duration, String> {
    let age = humantime::parse_duration(text).ok().filter(|age| !age.is_zero());
    age.ok_or_else(|| rule::AGE.to_owned())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenGrant {
    user: Option<Id>,
    group: Option<Id>,
    privileges: BTreeSet<Privilege>,
    #[serde(default, deserialize_with = "volumes")]
    volumes: Option<BTreeSet<Uuid>>,
}

fn volumes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BTreeSet<Uuid>>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let uuids = texts
        .iter()
        .map(|text| text.parse().map_err(|_| broken(rule::VOLUME)));
    uuids.collect::<Result<_, _>>().map(Some)
}

/// A user or group, by number or by name.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a user or group is a number or a name")]
enum Id {
    Number(u32),
    Name(String),
}

impl Config {
    /// Reads the configuration at `path`, or the default one if it exists.
    pub(super) fn read(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, optional) = match path {
            Some(path) => (path, false),
            None => (Path::new(DEFAULT_PATH), true),
        };
        let written: Written = match toml_file::read(path)? {
            Some(written) => written,
            None if optional => return Ok(Self::default()),
            None => {
                return Err(ConfigError::Missing {
                    path: path.to_owned(),
                });
            }
        };
        let sealed = written
            .agent
            .as_ref()
            .and_then(|agent| agent.sealed_cache.as_ref());
        if sealed.is_some_and(|sealed| !sealed.tpm.is_absolute()) {
            return Err(ConfigError::Tpm {
                path: path.to_owned(),
            });
        }
        let grants = written.grant.into_iter().zip(1..);
        let grants = grants.map(|(grant, number)| grant.check(path, number));
        Ok(Self {
            agent: written.agent.map(|agent| agent.check(path)).transpose()?,
            grants: Grants::new(grants.collect::<Result<_, _>>()?),
            max_key_age: written.policy.and_then(|policy| policy.max_key_age),
        })
    }
}

impl WrittenAgent {
    fn check(self, path: &Path) -> Result<Agent, ConfigError> {
        let default = Agent::default();
        let group = self.socket_group.map(|group| group.group(path)).transpose()?;
        Ok(Agent {
            socket: self.socket.unwrap_or(default.socket),
            permissions: match (self.socket_mode, group) {
                (None, None) => default.permissions,
                (mode, group) => Permissions::new(mode, group),
            },
            time_to_live: match self.kek_time_to_live {
                Some(seconds) => Duration::from_secs(seconds.into()),
                None => default.time_to_live,
            },
            kek_grace: match self.kek_grace {
                Some(seconds) => Duration::from_secs(seconds.into()),
                None => default.kek_grace,
            },
            sealed_cache: self.sealed_cache.map(|sealed| SealedCacheSettings {
                grace: sealed.grace.unwrap_or(DEFAULT_GRACE),
                tpm: sealed.tpm,
                pcrs: sealed.pcrs.unwrap_or_default(),
            }),
        })
    }
}

impl Id {
    /// The group of the agent's socket.
    fn group(self, path: &Path) -> Result<u32, ConfigError> {
        let name = match self {
            Self::Number(group) => return Ok(group),
            Self::Name(name) => name,
        };
        let group = uzers::get_group_by_name(&name).map(|group| group.gid());
        group.ok_or_else(|| ConfigError::SocketGroup {
            path: path.to_owned(),
        })
    }
}

impl WrittenGrant {
    /// The name is not shown: it may be a secret in the wrong place.
    fn check(self, path: &Path, number: usize) -> Result<Grant, ConfigError> {
        let unknown = |what| ConfigError::Unknown {
            path: path.to_owned(),
            number,
            what,
        };
        let to = match (self.user, self.group) {
            (Some(Id::Number(user)), None) => Grantee::User(user),
            (None, Some(Id::Number(group))) => Grantee::Group(group),
            (Some(Id::Name(name)), None) => match uzers::get_user_by_name(&name) {
                Some(user) => Grantee::User(user.uid()),
                None => return Err(unknown("user")),
            },
            (None, Some(Id::Name(name))) => match uzers::get_group_by_name(&name) {
                Some(group) => Grantee::Group(group.gid()),
                None => return Err(unknown("group")),
            },
            _ => {
                return Err(ConfigError::Grantee {
                    path: path.to_owned(),
                });
            }
        };
        let other = self
            .privileges
            .iter()
            .find(|privilege| !privilege.is_of_volumes());
        match (other, &self.volumes) {
            (Some(&privilege), Some(_)) => Err(ConfigError::NotOfVolumes {
                path: path.to_owned(),
                privilege,
            }),
            _ => Ok(Grant {
                to,
                privileges: self.privileges,
                volumes: self.volumes,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, text).unwrap();
        Config::read(Some(&path))
    }

    #[test]
    fn everything_has_a_default_but_a_file_that_was_named() {
        let config = read("").unwrap();
        assert!(config.agent.is_none() && config.grants == Grants::default());
        assert!(config.max_key_age.is_none());
        let policy = read("[policy]\nmax-key-age = \"90d\"").unwrap();
        assert_eq!(policy.max_key_age, Some(Duration::from_secs(90 * 86_400)));
        let config = read("[agent]").unwrap();
        assert_eq!(config.agent.unwrap().socket, Path::new(agent::DEFAULT_SOCKET));
        let nowhere = Path::new("/nonexistent/config.toml");
        assert!(matches!(
            Config::read(Some(nowhere)),
            Err(ConfigError::Missing { .. })
        ));
    }

    #[test]
    fn users_and_groups_have_names_or_numbers() {
        let config = read(
            "[agent]\nsocket = \"/run/a\"\nkek-time-to-live = 5\n[[grant]]\nuser = \"root\"\nprivileges = \
             [\"Access\"]\n[[grant]]\ngroup = 7\nprivileges = [\"RegisterVM\", \"Recrypt\"]\nvolumes = \
             [\"00000000-0000-0000-0000-000000000001\"]",
        )
        .unwrap();
        assert_eq!(config.agent.unwrap().time_to_live, Duration::from_secs(5));
        let expected = Grants::new(vec![
            Grant {
                to: Grantee::User(0),
                privileges: [Privilege::Access].into(),
                volumes: None,
            },
            Grant {
                to: Grantee::Group(7),
                privileges: [Privilege::RegisterVM, Privilege::Recrypt].into(),
                volumes: Some([Uuid::from_u128(1)].into()),
            },
        ]);
        assert_eq!(config.grants, expected);
    }

    #[test]
    fn slips_of_the_pen_are_refused() {
        for (text, expected) in [
            ("agent = 1", "cannot be parsed"),
            ("[agent]\nsokcet = \"/run/a\"", "cannot be parsed"),
            ("[policy]\nmax-key-age = 90", "cannot be parsed"),
            ("[policy]\nmax-key-age = \"0d\"", "cannot be parsed"),
            ("[policy]\nmax-key-age = \"soon\"", "cannot be parsed"),
            (
                "[[grant]]\nuser = \"root\"\nprivileges = [\"Everything\"]",
                "cannot be parsed",
            ),
            ("[[grant]]\nprivileges = [\"Access\"]", "either a user or a group"),
            (
                "[[grant]]\nuser = 1\ngroup = 1\nprivileges = []",
                "either a user or a group",
            ),
            (
                "[[grant]]\nuser = 1\nprivileges = [\"RegisterVM\"]\nvolumes = [\"vm7\"]",
                "cannot be parsed",
            ),
            (
                "[[grant]]\nuser = 1\nprivileges = [\"RegisterVM\", \"EncryptNew\"]\nvolumes = []",
                "give EncryptNew in a [[grant]] without",
            ),
            (
                "[[grant]]\nuser = \"no one at all\"\nprivileges = []",
                "[[grant]] number 1 names a user that does not exist on this host",
            ),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(
            Config::read(Some(&path)),
            Err(ConfigError::File(TomlFileError::Exposed { .. }))
        ));
    }
}
