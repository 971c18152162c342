//! Whose notes there is room for, and what may be bound to a key at all.
//!
//! Others add notes: whoever may open or make a volume can name any number of places. So each user who asks the agent has notes
//! of its own, in files of its own, and a share of the room; one user's never push out another's. Nobody else's notes touch
//! those of the state directory's owner, for whom room is kept.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use super::survey::{Standing, look};
use super::{Index, Known, MOST, PLACES, Remark, name_of, note_of, read};
use crate::causes::remedy;
use crate::keys::{Binding, KeyError, KeyReason, private};
use std::path::Path;

/// What users have at most, all together: the rest is the owner's.
const MOST_OF_USERS: usize = MOST / 4 * 3;
/// What a user gets at any rate, while there is room.
const SURE: usize = 64;
/// Says that a note was not kept.
const INCOMPLETE: &str = "incomplete";

/// Whose note it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum By {
    /// Whoever the state directory belongs to: root, and the user that the agent runs as.
    Owner,
    /// A user who asks the agent, by number.
    User(u32),
}

impl By {
    pub(super) fn user(self) -> Option<u32> {
        match self {
            Self::Owner => None,
            Self::User(user) => Some(user),
        }
    }
}

/// Why a key is not bound to a volume.
#[derive(Debug, thiserror::Error)]
pub enum NotAnnounced {
    /// It opens another one.
    #[error("this key is another volume's, and a key opens one volume; have a new key made for this one")]
    OtherVolume,
    /// Somebody else has bound it.
    #[error("another user has bound this key to the volume; have a new key made")]
    OtherUser,
    /// It is known at too many places.
    #[error(
        "{PLACES} places of this volume are noted for this key; drop those that are gone with `sealblk key scan \
         --forget-missing`"
    )]
    Places,
    /// There is no room for another note.
    #[error("{}: there is no room to note which key the volume is bound to; drop what is gone with `sealblk key scan`", .0.display())]
    NoRoom(PathBuf),
    /// The list cannot be written.
    #[error("{}: it cannot be noted which key the volume is bound to{}", path.display(), remedy(source))]
    Io {
        /// The list.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl NotAnnounced {
    /// The same, as a provider's failure.
    pub fn of(self, binding: &Binding<'_>) -> KeyError {
        let reason = match self {
            Self::OtherVolume | Self::OtherUser => KeyReason::Refused,
            Self::Places | Self::NoRoom(_) | Self::Io { .. } => KeyReason::Invalid,
        };
        KeyError::new(binding.provider, "the list of volumes", reason)
            .of(binding.key_id)
            .because(self)
    }
}

/// How many notes there are of each.
#[derive(Default)]
struct Counts(HashMap<By, usize>);

impl Counts {
    fn of(files: &[PathBuf]) -> Self {
        let mut counts = Self::default();
        for file in files {
            if let Some((_, _, by)) = name_of(file) {
                *counts.0.entry(by).or_default() += 1;
            }
        }
        counts
    }

    /// Whether `by` may have one more: half of what is left for users, so that the next one finds some.
    fn have_room_for(&self, by: By) -> bool {
        let all: usize = self.0.values().sum();
        match by {
            By::Owner => all < MOST,
            By::User(_) => {
                let owner = self.0.get(&By::Owner).copied().unwrap_or(0);
                let left = MOST_OF_USERS
                    .saturating_sub(all - owner)
                    .min(MOST.saturating_sub(all));
                let own = self.0.get(&by).copied().unwrap_or(0);
                left > 0 && own < SURE.max(left / 2)
            }
        }
    }
}

impl Index {
    /// Takes note of a binding that is about to be stored in the volume whose header is in `path`, which is empty if nobody has
    /// said. What cannot be noted must not be bound: its key could be taken away as one that opens nothing.
    ///
    /// A KEK is made for one volume. One that is noted for another volume, or was bound to this one by another user, is refused
    /// to users and owner alike; the owner may bind a user's key to the same volume again. Notes of bindings that were given up do
    /// not count.
    ///
    /// # Errors
    /// [`NotAnnounced`]; nothing is noted then.
    pub fn announce(&self, binding: &Binding<'_>, path: &Path, by: By) -> Result<(), NotAnnounced> {
        let unwritable = |source| NotAnnounced::Io {
            path: self.dir.clone(),
            source,
        };
        // What the volume itself contradicts makes room. To look at it may take a while, in which nobody has to wait.
        self.drop_contradicted(binding.volume).map_err(unwritable)?;
        private::ensure_dir(&self.dir).map_err(unwritable)?;
        let lock = File::open(&self.dir).map_err(unwritable)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| unwritable(error.into()))?;

        let files = self.files().map_err(unwritable)?;
        let mut own = Vec::new();
        for (file, other) in files.iter().filter_map(|file| Some((file, read(file)?))) {
            if !other.is_under(Some(binding.provider), Some(binding.key_id)) || other.was_given_up() {
                continue;
            }
            match by {
                _ if other.volume != binding.volume => return Err(NotAnnounced::OtherVolume),
                By::User(user) if other.user != Some(user) => return Err(NotAnnounced::OtherUser),
                _ if other.user == by.user() => own.push(file),
                _ => {}
            }
        }
        let mut known = note_of(binding, path, by);
        known.bound = Some(crate::moment::Moment::now());
        known.unsettled = true;
        let file = self.file(&known);
        if !own.contains(&&file) && !file.exists() {
            if own.len() >= PLACES {
                return Err(NotAnnounced::Places);
            }
            if !Counts::of(&files).have_room_for(by) {
                return Err(NotAnnounced::NoRoom(self.dir.clone()));
            }
        }
        self.put(known).map_err(unwritable)
    }

    /// Drops notes of a volume that its header contradicts. One that names a place where nothing is stays: this may be a copy,
    /// and that one's disk away.
    pub(super) fn drop_contradicted(&self, volume: uuid::Uuid) -> io::Result<()> {
        for (file, known) in self.notes_of(volume)? {
            if look(&known) == Standing::NotBound {
                fs::remove_file(file)?;
            }
        }
        Ok(())
    }

    /// Makes room for `known`, which is new, and gives back what it takes the place of: the same user's least recent note of
    /// the same volume and key, an unsettled one before all others. None if there is no room.
    pub(super) fn make_room(&self, known: &mut Known) -> io::Result<Option<Vec<PathBuf>>> {
        let mut alike = self.notes_of(known.volume)?;
        alike.retain(|(_, other)| {
            other.user == known.user && other.is_under(Some(&known.provider), Some(&known.key_id))
        });
        let files = self.files()?;
        let by = known.user.map_or(By::Owner, By::User);
        let fits = alike.len() < PLACES && Counts::of(&files).have_room_for(by);
        if fits {
            return Ok(Some(Vec::new()));
        }
        let least = alike
            .into_iter()
            .min_by_key(|(_, other)| (!other.unsettled, other.opened.max(other.bound)));
        Ok(least.map(|(file, other)| {
            known.elsewhere |= !other.unsettled || other.elsewhere;
            vec![file]
        }))
    }

    /// Says, until somebody clears it, that the list lacks something.
    pub(super) fn mark_incomplete(&self) -> io::Result<()> {
        private::replace(&self.dir.join(INCOMPLETE), b"")
    }

    pub(super) fn is_incomplete(&self) -> bool {
        // What cannot be told counts as well.
        !matches!(self.dir.join(INCOMPLETE).try_exists(), Ok(false))
    }

    /// What the list lacks is known to be nothing that anybody needs.
    pub(super) fn clear_incomplete(&self) -> io::Result<()> {
        match fs::remove_file(self.dir.join(INCOMPLETE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The notes of a volume, each with its file.
    pub(super) fn notes_of(&self, volume: uuid::Uuid) -> io::Result<Vec<(PathBuf, Known)>> {
        let files = self.files()?.into_iter();
        let of_volume = files.filter(|file| name_of(file).is_some_and(|(of, _, _)| of == volume));
        Ok(of_volume
            .filter_map(|file| Some((file.clone(), read(&file)?)))
            .collect())
    }
}

/// What is known of a place that nobody has named, or of places that were not kept.
pub(super) fn remark(known: &Known) -> Option<Remark> {
    match known {
        Known { path, .. } if path.is_empty() => Some(Remark::Untold),
        Known { elsewhere: true, .. } => Some(Remark::Elsewhere),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: &[(By, usize)]) -> Counts {
        Counts(counts.iter().copied().collect())
    }

    #[test]
    fn no_user_takes_the_room_of_others_nor_all_of_them_the_owners() {
        let mut taken = Vec::new();
        for user in 1..=300 {
            let by = By::User(user);
            let mut own = 0;
            while counts(&[&taken[..], &[(by, own)]].concat()).have_room_for(by) {
                own += 1;
            }
            let all: usize = taken.iter().map(|(_, own)| own).sum();
            assert!(own >= SURE || all + own == MOST_OF_USERS, "{user}: {own}");
            taken.push((by, own));
            if own == 0 {
                break;
            }
        }
        let all: usize = taken.iter().map(|(_, own)| own).sum();
        assert_eq!(all, MOST_OF_USERS);
        assert!(taken[0].1 <= MOST_OF_USERS / 3 + 1);
        taken.push((By::Owner, MOST - all - 1));
        assert!(counts(&taken).have_room_for(By::Owner));
    }
}
