//! The stored state of a broker: one file that is replaced atomically, so that the verbs that change it and the running
//! broker are independent of each other.
//!
//! ```text
//! master.key    32 bytes, under which resources are wrapped (AES-256-GCM, bound to their paths)
//! broker.json   resources, hosts, reference values
//! audit.log     releases and refusals
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustix::fs::{FlockOperation, flock};
use sealblk_base::blame::Blame;
use serde::{Deserialize, Serialize};

use crate::kbs::ResourcePath;
use crate::parsing;
use crate::providers::{settings_file, settings_file::Unreadable};
use crate::providers::{wrap, wrap::KEK_LEN, wrap::Kek};
use crate::tpm::pcr;
use sealblk_secmem::{arena::ArenaError, arena::SecretBytes};
use sealblk_secmem::{private_file, private_file::Forbid};

/// The file of everything but the master key.
const KEPT: &str = "broker.json";
/// Sets wrapped resources apart from all else that a key might ever authenticate.
const LABEL: &[u8] = b"sealblk broker resource\0";

/// A state directory.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    master: Kek,
}

/// All that is kept, but secrets in clear.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// By path: wrapped, in base64.
    pub resources: BTreeMap<ResourcePath, String>,
    /// By name.
    pub hosts: BTreeMap<String, Host>,
    /// By name.
    pub references: BTreeMap<String, Reference>,
}

/// What the master key wrapped is there, and the key is not.
#[derive(Debug, thiserror::Error)]
#[error("it is missing, but resources are wrapped under it")]
struct NoMaster;

/// A host that may be, or is, known by its TPM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Host {
    /// Which reference values it has to have.
    pub reference: String,
    /// What it may get.
    pub resources: Vec<ResourcePath>,
    /// The SHA-256 of its endorsement key (SubjectPublicKeyInfo), if that was named, or is known since it was enrolled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endorsement: Option<String>,
    /// Its attestation key: TPMT_PUBLIC, in base64. None before it was enrolled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attestation: Option<String>,
    /// What it enrols with, once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
}

/// A token for one enrolment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Its SHA-256.
    pub sha256: String,
    /// Until when it can be used, in seconds since 1970.
    pub until: u64,
}

/// What registers have to hold: one of these values, for each that counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Reference(pub BTreeMap<u8, Vec<String>>);

impl Reference {
    /// The registers that count, each with the values that it may have.
    pub fn registers(&self) -> impl Iterator<Item = (u8, impl Iterator<Item = [u8; 32]>)> {
        self.0.iter().map(|(register, values)| {
            (
                *register,
                values.iter().filter_map(|value| pcr::parse_value(value)),
            )
        })
    }
}

/// Why the state cannot be used or changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system.
    #[error("cannot {action} {}; run as the owner of the broker's state directory", path.display())]
    Io {
        /// "read", "write" …
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Somebody has edited it, or others could have.
    #[error("{} cannot be used; restore it from a backup", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no memory for keys.
    #[error("this host cannot hold the broker's keys")]
    Arena(#[from] ArenaError),
    /// Something of that name is there.
    #[error("a {what} called {name:?} exists already; remove it first, or choose another name")]
    Exists {
        /// "host" or "resource".
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Nothing of that name is there.
    #[error(
        "no {what} is called {name:?}; list them with `sealblk broker resource list`, `host list` or `reference show`"
    )]
    Unknown {
        /// "host", "resource" or "set of reference values".
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A name that cannot be one.
    #[error("{0:?} is not a valid name, which has up to 64 letters, digits, '-', '_' and '.'")]
    Name(String),
    /// A register with its value.
    #[error(
        "{0:?} is not the value of a register: give REGISTER=DIGITS, with 64 hexadecimal digits, as in 7=65ca…"
    )]
    Register(String),
}

impl StateError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Io { .. } => Blame::Storage,
            Self::Unusable { .. } => Blame::Content,
            Self::Arena(_) => Blame::Host,
            Self::Exists { .. } | Self::Unknown { .. } | Self::Name(_) | Self::Register(_) => Blame::Operator,
        }
    }
}

impl State {
    /// Opens a state directory; one that is not there is made, with a new master key.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { action, path, source }
        };
        private_file::ensure_dir(dir).map_err(io("make", dir))?;
        let path = dir.join("master.key");
        if !path.try_exists().map_err(io("look for", &path))? {
            // With a new key, what is wrapped would be lost as soon as something is wrapped beside it.
            let kept = dir.join(KEPT);
            if kept.try_exists().map_err(io("look for", &kept))? {
                return Err(unusable(&path, NoMaster));
            }
            let new = SecretBytes::random(KEK_LEN)?;
            match private_file::create(&path, &new) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                created => created.map_err(io("make", &path))?,
            }
        }
        let metadata = fs::metadata(dir).map_err(io("look at", dir))?;
        private_file::check(dir, &metadata, Forbid::Write).map_err(|e| unusable(dir, e))?;
        let master = settings_file::read(&path, KEK_LEN).map_err(|e| match e {
            Unreadable::Io(source) => io("read", &path)(source),
            Unreadable::Arena(e) => e.into(),
            e => unusable(&path, e),
        })?;
        let master = Kek::new(master).map_err(|e| unusable(&path, e))?;
        Ok(Self {
            dir: dir.to_owned(),
            master,
        })
    }

    /// What is kept now.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn read(&self) -> Result<Kept, StateError> {
        let path = self.file();
        match fs::read(&path) {
            Ok(json) => parsing::json(&json).map_err(|e| unusable(&path, e)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Kept::default()),
            Err(source) => Err(StateError::Io {
                action: "read",
                path,
                source,
            }),
        }
    }

    /// Changes what is kept; nobody else does meanwhile.
    ///
    /// # Errors
    /// [`StateError`], and those of `change`; nothing is changed then.
    pub fn change<T, E: From<StateError>>(
        &self,
        change: impl FnOnce(&mut Kept) -> Result<T, E>,
    ) -> Result<T, E> {
        let io = |action, path: PathBuf| move |source| StateError::Io { action, path, source };
        let lock = File::open(&self.dir).map_err(io("open", self.dir.clone()))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| io("lock", self.dir.clone())(e.into()))?;
        let mut kept = self.read()?;
        let done = change(&mut kept)?;
        let json = serde_json::to_vec_pretty(&kept).expect("texts are JSON");
        private_file::replace(&self.file(), &json).map_err(io("write", self.file()))?;
        Ok(done)
    }

    /// A new resource: a random key.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn wrap_new(&self, path: &ResourcePath) -> Result<String, StateError> {
        let secret = SecretBytes::random(KEK_LEN)?;
        let wrapped = wrap::wrap_with(&self.master, &associated(path), &secret)?;
        Ok(BASE64_STANDARD.encode(wrapped))
    }

    /// A resource in clear.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn unwrap(&self, path: &ResourcePath, wrapped: &str) -> Result<SecretBytes, StateError> {
        let wrapped = BASE64_STANDARD
            .decode(wrapped)
            .map_err(|e| unusable(&self.file(), e))?;
        wrap::unwrap_with(&self.master, &associated(path), &wrapped).map_err(|e| unusable(&self.file(), e))
    }

    fn file(&self) -> PathBuf {
        self.dir.join(KEPT)
    }
}

/// A resource's path does not get longer than what is said of it here: the label, and the rest.
fn associated(path: &ResourcePath) -> Vec<u8> {
    [LABEL, path.as_ref().as_bytes()].concat()
}

fn unusable(path: &Path, source: impl std::error::Error + Send + Sync + 'static) -> StateError {
    StateError::Unusable {
        path: path.to_owned(),
        source: Box::new(source),
    }
}

/// Checks a host's name, or that of reference values.
///
/// # Errors
/// [`StateError::Name`].
pub fn check_name(name: &str) -> Result<(), StateError> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    match (1..=64).contains(&name.len()) && name.bytes().all(fits) {
        true => Ok(()),
        false => Err(StateError::Name(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_key_that_is_gone_is_not_replaced_while_something_is_sealed_under_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let state = State::open(dir).unwrap();
        let path: ResourcePath = "a/b/c".parse().unwrap();
        let wrapped = state.wrap_new(&path).unwrap();
        state
            .change(|kept| -> Result<_, StateError> {
                Ok(kept.resources.insert(path.clone(), wrapped.clone()))
            })
            .unwrap();
        let (key, away) = (dir.join("master.key"), dir.join("away"));
        fs::rename(&key, &away).unwrap();
        assert!(matches!(State::open(dir), Err(StateError::Unusable { .. })));
        assert!(!key.exists());
        fs::rename(&away, &key).unwrap();
        let state = State::open(dir).unwrap();
        state.unwrap(&path, &wrapped).unwrap();
        assert!(state.unwrap(&"a/b/d".parse().unwrap(), &wrapped).is_err());
    }
}
