//! The key source of a verb: the host's agent, or this process' own providers.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use super::failure::Failure;
use super::stderr;
use crate::agent::{Client, Erasure, ErasureStep, record_erasure};
use crate::inventory;
use crate::inventory::verify::{Scanned, verify};
use crate::inventory::{By, GuardError, Index, Note, Noting, Removal, remove_provider, revoke};
use crate::keys::{KeyError, KeyId, KeyProvider, Providers, Reach, Revocation};
use crate::path_text::from_text;
use crate::providers::{registry::Entry, registry::Registry};

/// Where a verb gets keys.
#[derive(Debug)]
pub(super) enum Keys {
    /// The state directory's providers, in this process, and where the volume is that they are for.
    Own(Registry, Option<PathBuf>),
    /// The host's agent.
    Agent(Client),
}

impl Providers for Keys {
    fn provider(&self, name: &str) -> Result<Arc<dyn KeyProvider>, KeyError> {
        match self {
            Self::Own(registry, None) => registry.provider(name),
            Self::Own(registry, Some(path)) => {
                Noting::new(registry, Index::of(registry.dir()), path).provider(name)
            }
            Self::Agent(client) => client.provider(name),
        }
    }

    fn default_name(&self) -> Result<Option<String>, KeyError> {
        match self {
            Self::Own(registry, _) => registry.default_name(),
            Self::Agent(client) => client.default_name(),
        }
    }
}

impl Keys {
    /// All providers, by name.
    pub(super) fn list(&self) -> Result<Vec<Entry>, KeyError> {
        match self {
            Self::Own(registry, _) => Ok(registry.list()),
            Self::Agent(client) => client.list(),
        }
    }

    /// The known volumes of a provider or key, with what they say themselves.
    pub(super) fn volumes(
        &self,
        provider: Option<&str>,
        key_id: Option<&KeyId>,
    ) -> Result<Vec<inventory::Entry>, Failure> {
        let (volumes, full, crowded) = match self {
            Keys::Agent(client) => client.volumes(None, provider, key_id)?,
            Keys::Own(registry, _) => {
                let index = Index::of(registry.dir());
                let listing = index.list().map_err(|source| unreadable(&index, source))?;
                let notes = listing.notes.into_iter();
                let matches = notes.filter(|note| note.is_under(provider, key_id));
                (verify(matches), listing.full, listing.crowded)
            }
        };
        if full {
            stderr::note(
                "the list of known volumes is incomplete: it was full, or a file of it cannot be read; add your disks with \
                 `sealblk key scan`, then drop missing volumes with `sealblk key scan --forget-missing`",
            );
        }
        if volumes.iter().any(inventory::Entry::is_untold) {
            stderr::note(
                "the agent shows only callers with the privilege ManageKeys whether these entries still hold, because it reads \
                 paths that other users cannot read",
            );
        }
        for share in crowded {
            stderr::note(&share.to_string());
        }
        Ok(volumes)
    }

    /// The keys that have opened a volume on this host, according to the list of volumes.
    pub(super) fn opened(&self, volume: Uuid) -> Result<Vec<(String, KeyId)>, Failure> {
        let notes: Vec<Note> = match self {
            Keys::Agent(client) => {
                let (entries, ..) = client.volumes(Some(volume), None, None)?;
                entries.into_iter().map(|entry| entry.note).collect()
            }
            Keys::Own(registry, _) => {
                let index = Index::of(registry.dir());
                index.list().map_err(|source| unreadable(&index, source))?.notes
            }
        };
        // A claim of a user is not a proof; the unwrapped secret of the volume is.
        let opened = notes
            .into_iter()
            .filter(|note| note.volume == volume && note.opened.is_some());
        let keys: BTreeSet<_> = opened.map(|note| (note.provider, note.key_id.0)).collect();
        Ok(keys
            .into_iter()
            .map(|(provider, key_id)| (provider, KeyId(key_id)))
            .collect())
    }

    /// Looks at the volumes in `paths` and at all that are known; drops notes that do not hold, with `missing` also of those that
    /// are not there.
    pub(super) fn scan(&self, paths: &[PathBuf], missing: bool) -> Result<Scanned, Failure> {
        match self {
            Keys::Agent(client) => Ok(client.scan(paths, missing)?),
            Keys::Own(registry, _) => {
                let index = Index::of(registry.dir());
                let mut scanned = index.scan(paths.iter().map(PathBuf::as_path), By::Owner);
                let swept = index.sweep(missing);
                scanned.dropped = swept.map_err(|source| unreadable(&index, source))?;
                Ok(scanned)
            }
        }
    }

    /// Revokes a KEK, unless volumes need it.
    pub(super) fn revoke(
        &self,
        provider: &str,
        key_id: &KeyId,
        revocation: Revocation,
        removal: &Removal<'_>,
    ) -> Result<Option<Reach>, Failure> {
        Ok(match self {
            Keys::Agent(client) => client.revoke(provider, key_id, revocation, removal)?,
            Keys::Own(registry, _) => {
                let index = Index::of(registry.dir());
                revoke(&*self.provider(provider)?, &index, key_id, revocation, removal)?
            }
        })
    }

    /// Removes a provider, unless volumes need it.
    pub(super) fn remove_provider(&mut self, name: &str, removal: &Removal<'_>) -> Result<(), Failure> {
        match self {
            Keys::Agent(client) => client.remove_provider(name, removal)?,
            Keys::Own(registry, _) => remove_provider(registry, name, removal)?,
        }
        Ok(())
    }

    /// Has it written down how far an erasure has come.
    pub(super) fn report_erasure(&self, erasure: &Erasure) -> Result<(), Failure> {
        match self {
            Keys::Agent(client) => Ok(client.report_erasure(erasure)?),
            Keys::Own(registry, _) => {
                if let ErasureStep::Erased { .. } = erasure.step {
                    Index::of(registry.dir()).erased(erasure.volume, &from_text(&erasure.path), By::Owner);
                }
                // Without a state directory there is no log either.
                match registry.dir().is_dir() {
                    true => Ok(record_erasure(registry.dir(), erasure)?),
                    false => Ok(()),
                }
            }
        }
    }
}

fn unreadable(index: &Index, source: io::Error) -> GuardError {
    GuardError::Index {
        path: index.dir().to_owned(),
        source,
    }
}
