//! The guard of keys and providers: they are revoked or removed only if no known volume needs them, or with --force.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;

use sealblk_base::blame::Blame;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::verify::{Entry, UNTOLD, verify};
use super::{Index, Note};
use crate::error_chain::remedy;
use crate::harmless::harmless;
use crate::keys::{KeyError, KeyId, KeyProvider, KeyReason, KeyState, Reach, Revocation};
use crate::providers::{registry::Backup, registry::Registry, registry::RegistryError};

/// How many volumes a refusal lists.
const LISTED: usize = 10;

/// The [`Disk::standing`] of a volume that is being served, which no look has found.
pub const SERVED: &str = "served";

/// The volumes that a key or a provider opens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// The first of them.
    pub volumes: Vec<Disk>,
    /// How many there are.
    pub count: usize,
    /// Whether there may be others, since the list has no room.
    pub full: bool,
}

/// Why a key or a provider is not taken away.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// Volumes would be lost.
    #[error("{what} is in use{}; rekey these disks to another key first; `sealblk key where-used` lists all", uses.caveat())]
    InUse {
        /// The key or the provider.
        what: String,
        /// The volumes.
        uses: Uses,
    },
    /// A primary key would be lost of which nobody has another.
    #[error(
        "the primary key of {0:?} has no backup: volumes that this host does not know would be lost with it; \
         take a backup with `sealblk provider backup`"
    )]
    NotBackedUp(String),
    /// The list of volumes cannot be read.
    #[error("the list of volumes cannot be read: {}{}", path.display(), remedy(source))]
    Index {
        /// The list.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The provider's settings or files.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The provider.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl GuardError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::InUse { .. } | Self::NotBackedUp(_) => Blame::Use,
            Self::Index { .. } => Blame::Storage,
            Self::Key(error) => error.reason.blame(),
            Self::Registry(error) => error.blame(),
        }
    }
}

/// A volume that keeps a key from being taken away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The UUID in its header.
    pub volume: Uuid,
    /// Where it was last seen, for people.
    pub path: String,
    /// See [`Entry::verdict`].
    #[serde(rename = "standing")]
    pub verdict: String,
    /// See [`Entry::why`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl From<Entry> for Disk {
    fn from(entry: Entry) -> Self {
        let mut why = entry.why.map(|why| harmless(&why, 200));
        if let Some(user) = entry.note.user {
            let whose = format!("recorded for user {user}");
            why = Some(why.map_or(whose.clone(), |why| format!("{why}; {whose}")));
        }
        Self {
            volume: entry.note.volume,
            path: harmless(&entry.note.path, 1024),
            verdict: entry.verdict,
            why,
        }
    }
}

impl Uses {
    /// The same without what looks at places have found.
    pub fn untold(mut self) -> Self {
        for disk in self.volumes.iter_mut().filter(|disk| disk.verdict != SERVED) {
            disk.verdict = UNTOLD.to_owned();
            disk.why = None;
        }
        self
    }

    /// The volumes, one a line.
    pub fn lines(&self) -> Vec<String> {
        let disk = |disk: &Disk| {
            let why = disk
                .why
                .as_ref()
                .map(|why| format!(": {why}"))
                .unwrap_or_default();
            format!("{}  volume {}, {}{why}", disk.path, disk.volume, disk.verdict)
        };
        let more = self.count.saturating_sub(self.volumes.len());
        let rest = (more > 0).then(|| format!("and {more} more"));
        self.volumes.iter().map(disk).chain(rest).collect()
    }

    fn caveat(&self) -> &'static str {
        match self.full {
            true => {
                ", or may be: the list of volumes is incomplete, because it was full or a file of it cannot be read (with \
                 `sealblk key scan --forget-missing` you confirm that the missing volumes are not needed)"
            }
            false => "",
        }
    }

    /// The volumes that have to be taken for bound to what `matches`, and those that are `served` under it.
    ///
    /// # Errors
    /// If the list cannot be read.
    pub fn of(index: &Index, served: &[Disk], matches: impl Fn(&Note) -> bool) -> Result<Self, GuardError> {
        let mut seen = HashSet::new();
        let mut look = || {
            let listing = index.list().map_err(|source| GuardError::Index {
                path: index.dir.clone(),
                source,
            })?;
            let is_new = |note: &Note| matches(note) && seen.insert(index.file(note));
            let entries = verify(listing.notes.into_iter().filter(is_new));
            Ok::<_, GuardError>((entries, listing.full))
        };
        let (mut entries, _) = look()?;
        // To look at many takes a while. What was noted meanwhile counts, too.
        let (more, full) = look()?;
        entries.extend(more);
        entries.retain(Entry::in_use);
        entries.sort_by(|a, b| a.note.path.cmp(&b.note.path));
        let is_listed = |disk: &&Disk| !entries.iter().any(|other| other.note.volume == disk.volume);
        let mut volumes: Vec<_> = served.iter().filter(is_listed).cloned().collect();
        let count = volumes.len() + entries.len();
        volumes.extend(entries.into_iter().map(Disk::from));
        volumes.truncate(LISTED);
        Ok(Self { volumes, count, full })
    }

    fn refuse(self, what: String) -> Result<(), GuardError> {
        match self.count == 0 && !self.full {
            true => Ok(()),
            false => Err(GuardError::InUse { what, uses: self }),
        }
    }
}

/// What is to be taken away, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Removal<'a> {
    /// The default provider from then on, if the one that goes is that now.
    pub new_default: Option<&'a str>,
    /// Though volumes are bound to it, or there is no backup.
    pub force: bool,
    /// Only see whether it is possible.
    pub dry_run: bool,
    /// The volumes that are being served under it, which are no hint.
    pub served: &'a [Disk],
}

/// Removes a provider of `registry`.
///
/// # Errors
/// [`GuardError`]; the provider is still there then, unless only its files could not be wiped.
pub fn remove_provider(registry: &mut Registry, name: &str, removal: &Removal<'_>) -> Result<(), GuardError> {
    registry.check_removal(name, removal.new_default)?;
    let index = Index::of(registry.dir());
    if !removal.force {
        Uses::of(&index, removal.served, |note| note.is_under(Some(name), None))?
            .refuse(format!("key provider {name:?}"))?;
        if matches!(registry.backup(name), Some(Backup::None | Backup::Waived)) {
            return Err(GuardError::NotBackedUp(name.to_owned()));
        }
    }
    if removal.dry_run {
        return Ok(());
    }
    registry.remove(name, removal.new_default)?;
    if !removal.force {
        forget_keys_of(&index, name);
    }
    Ok(())
}

/// Drops the notes of a provider that is gone: no volume needs its keys. A note that a volume has come to need meanwhile stays.
fn forget_keys_of(index: &Index, provider: &str) {
    let notes = index.list().unwrap_or_default().notes.into_iter();
    let entries = verify(notes.filter(|note| note.is_under(Some(provider), None)));
    let gone = entries.iter().filter(|entry| !entry.in_use());
    if let Err(error) = index.forget(gone.map(|entry| &entry.note)) {
        tracing::warn!(%error, "{provider:?} was removed, but keys of it stay on the list of volumes");
    }
}

/// Takes a KEK of `provider` out of use. In a dry run nothing is reached.
///
/// # Errors
/// [`GuardError`]; the KEK can be used as before then.
pub fn revoke(
    provider: &dyn KeyProvider,
    index: &Index,
    key_id: &KeyId,
    revocation: Revocation,
    removal: &Removal<'_>,
) -> Result<Option<Reach>, GuardError> {
    if revocation == Revocation::Destroy && !provider.destroys_keys() {
        let name = provider.name();
        return Err(KeyError::new(name, name, KeyReason::Indestructible)
            .of(key_id)
            .into());
    }
    if !removal.force {
        let name = provider.name();
        let needs_it = |note: &Note| {
            note.is_under(Some(name), Some(key_id)) || provider.takes_along(key_id, &note.key_id)
        };
        Uses::of(index, removal.served, needs_it)?.refuse(format!("key {key_id} of provider {name:?}"))?;
    }
    match removal.dry_run {
        true => match provider.state(key_id)? {
            KeyState::Missing => {
                let name = provider.name();
                Err(KeyError::new(name, name, KeyReason::Missing).of(key_id).into())
            }
            _ => Ok(None),
        },
        false => Ok(Some(provider.revoke(key_id, revocation)?)),
    }
}
