//! The room in the list of volumes, each user's share of it, and the checks before a volume is bound to a key.
//!
//! A user that can open or make a volume can name any number of paths. So each user of the agent has separate entries, in
//! separate files, and a share of the room; one user's entries never displace another's. Room is reserved for the owner of
//! the state directory.
//!
//! Room is counted in volumes. During a rekey a volume has an entry for the new key and one for the old key, which is kept
//! until the header shows that the old keyslot is removed. So the first [`IN_ONE`] entries of a volume count as one, and a
//! full list refuses no rekey. From [`CROWDED`] on, the log and `sealblk key list` report it.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::verify::verify;
use super::{Index, MOST, Note, PLACES, Rarely, name_of, note_of, read, remove};
use crate::error_chain::remedy;
use crate::keys::{Binding, KeyError, KeyReason};
use sealblk_secmem::private_file;

/// What users have at most, all together: the rest is the owner's.
const MOST_OF_USERS: usize = MOST / 4 * 3;
/// What a user gets at any rate, while there is room.
const SURE: usize = 64;
/// How many notes of one volume and user take the room of one: those of a rekey, of one that was killed, and of another place.
const IN_ONE: usize = 4;
/// The part of the room, in hundredths, from which on it is told that it runs out.
const CROWDED: usize = 75;
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
    #[error(
        "this key belongs to another volume, and a key opens only one volume; make a new key for this volume"
    )]
    OtherVolume,
    /// Somebody else has bound it.
    #[error("another user has bound this key to the volume; make a new key")]
    OtherUser,
    /// It is known at too many places.
    #[error(
        "the list has {PLACES} paths of this volume for this key already; drop missing ones with `sealblk key scan \
         --forget-missing`"
    )]
    Places,
    /// There is no room for another note.
    #[error("{}: {share}", dir.display())]
    NoRoom {
        /// The list.
        dir: PathBuf,
        /// What was noted.
        share: Share,
    },
    /// The list cannot be written.
    #[error("{}: cannot record the key of the volume in the list of volumes{}", path.display(), remedy(source))]
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
            Self::Places | Self::NoRoom { .. } | Self::Io { .. } => KeyReason::NotNoted,
        };
        KeyError::new(binding.provider, "the list of volumes", reason)
            .of(binding.key_id)
            .because(self)
    }
}

/// How much of the room the notes of one user take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The user, if that is not the state directory's owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
    /// How many volumes are noted.
    pub volumes: usize,
    /// For how many there is room, as long as other users note no more.
    pub most: usize,
}

impl Share {
    fn is_crowded(&self) -> bool {
        self.volumes * 100 >= self.most * CROWDED
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, volumes, most } = self;
        let whose = user.map(|user| format!(" of user {user}")).unwrap_or_default();
        write!(
            f,
            "the list of volumes has room for {most} volumes{whose}, and holds {volumes}; attach disks that are only detached, \
             then drop deleted ones with `sealblk key scan --forget-missing`: the keys of dropped volumes can be revoked"
        )
    }
}

/// How much of the room is taken.
#[derive(Default)]
pub(super) struct Counts {
    /// How many notes a user has of a volume.
    notes: HashMap<(By, Uuid), usize>,
    /// How much room the notes of a user take.
    taken: HashMap<By, usize>,
}

impl Counts {
    pub(super) fn of(files: &[PathBuf]) -> Self {
        let mut counts = Self::default();
        for (volume, _, by) in files.iter().filter_map(|file| name_of(file)) {
            *counts.notes.entry((by, volume)).or_default() += 1;
        }
        for ((by, _), notes) in &counts.notes {
            *counts.taken.entry(*by).or_default() += notes.div_ceil(IN_ONE);
        }
        counts
    }

    /// Whether there is room for no more.
    pub(super) fn are_full(&self) -> bool {
        self.all() >= MOST
    }

    /// Those who have little room left.
    pub(super) fn crowded(&self) -> Vec<Share> {
        let shares = self.taken.keys().map(|by| self.share(*by));
        let mut crowded: Vec<_> = shares.filter(Share::is_crowded).collect();
        crowded.sort_by_key(|share| share.user);
        crowded
    }

    /// Whether `by` may have one more note of `volume`.
    fn have_room_for(&self, by: By, volume: Uuid) -> bool {
        let notes = |by| self.notes.get(&(by, volume)).copied().unwrap_or(0);
        // The owner may rekey what is a user's, too.
        let is_known = || self.notes.keys().any(|(_, note)| *note == volume);
        let own = notes(by);
        !own.is_multiple_of(IN_ONE) || by == By::Owner && own == 0 && is_known() || self.has_room(by)
    }

    fn has_room(&self, by: By) -> bool {
        let share = self.share(by);
        share.volumes < share.most
    }

    /// What `by` has, and gets: a user, half of what is left for users, so that the next one finds some.
    fn share(&self, by: By) -> Share {
        let all = self.all();
        let of_owner = self.taken(By::Owner);
        let own = self.taken(by);
        let most = match by {
            By::Owner => MOST.saturating_sub(all - of_owner),
            By::User(_) => {
                let left = MOST_OF_USERS
                    .saturating_sub(all - of_owner)
                    .min(MOST.saturating_sub(all));
                // As many as there are when it has half of what is left then.
                SURE.max((left + own) / 3).min(own + left)
            }
        };
        Share {
            user: by.user(),
            volumes: own,
            most,
        }
    }

    fn all(&self) -> usize {
        self.taken.values().sum()
    }

    fn taken(&self, by: By) -> usize {
        self.taken.get(&by).copied().unwrap_or(0)
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
        private_file::ensure_dir_in_state(&self.dir).map_err(unwritable)?;
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
        let mut note = note_of(binding, path, by);
        note.bound = Some(crate::timestamp::Timestamp::now());
        note.unsettled = true;
        let file = self.file(&note);
        if !own.contains(&&file) && !file.exists() {
            if own.len() >= PLACES {
                return Err(NotAnnounced::Places);
            }
            let counts = Counts::of(&files);
            let share = counts.share(by);
            if !counts.have_room_for(by, binding.volume) {
                return Err(NotAnnounced::NoRoom {
                    dir: self.dir.clone(),
                    share,
                });
            }
            if share.is_crowded() && WARNED.is_due() {
                tracing::warn!("{}: {share}", self.dir.display());
            }
        }
        self.put(note).map_err(unwritable)
    }

    /// Drops notes of a volume that its header contradicts. One that names a place where nothing is stays: this may be a copy,
    /// and that one's disk away.
    pub(super) fn drop_contradicted(&self, volume: Uuid) -> io::Result<()> {
        let (files, notes): (Vec<_>, Vec<_>) = self.notes_of(volume)?.into_iter().unzip();
        for (file, entry) in files.iter().zip(verify(notes)) {
            if !entry.in_use() {
                remove(file)?;
            }
        }
        Ok(())
    }

    /// Makes room for `note`, which is new, and gives back what it takes the place of: the same user's least recent note of
    /// the same volume and key, an unsettled one before all others. None if there is no room.
    pub(super) fn make_room(&self, note: &mut Note) -> io::Result<Option<Vec<PathBuf>>> {
        let mut alike = self.notes_of(note.volume)?;
        alike.retain(|(_, other)| {
            other.user == note.user && other.is_under(Some(&note.provider), Some(&note.key_id))
        });
        let files = self.files()?;
        let by = note.user.map_or(By::Owner, By::User);
        let fits = alike.len() < PLACES && Counts::of(&files).have_room_for(by, note.volume);
        if fits {
            return Ok(Some(Vec::new()));
        }
        let least = alike
            .into_iter()
            .min_by_key(|(_, other)| (!other.unsettled, other.opened.max(other.bound)));
        Ok(least.map(|(file, other)| {
            note.elsewhere |= !other.unsettled || other.elsewhere;
            vec![file]
        }))
    }

    /// Says, until somebody clears it, that the list lacks something.
    pub(super) fn mark_incomplete(&self) -> io::Result<()> {
        private_file::replace_in_state(&self.dir.join(INCOMPLETE), b"")
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
    pub(super) fn notes_of(&self, volume: Uuid) -> io::Result<Vec<(PathBuf, Note)>> {
        let files = self.files()?.into_iter();
        let of_volume = files.filter(|file| name_of(file).is_some_and(|(of, _, _)| of == volume));
        Ok(of_volume
            .filter_map(|file| Some((file.clone(), read(&file)?)))
            .collect())
    }
}

/// Callers can provoke it.
static WARNED: Rarely = Rarely::every(Duration::from_secs(3600));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_used_three_quarters_of_the_room_is_told() {
        let crowded = |taken: &[(By, usize)]| counts(taken).crowded();
        let most = MOST_OF_USERS / 3;
        assert_eq!(crowded(&[(By::Owner, MOST / 4 * 3 - 1), (By::User(1), 1)]), []);
        assert_eq!(crowded(&[(By::User(1), most / 4 * 3 - 1)]), []);
        let shares = crowded(&[
            (By::Owner, MOST / 2),
            (By::User(1), most / 4 * 3),
            (By::User(2), 10),
        ]);
        let [share] = &shares[..] else {
            panic!("{shares:?}")
        };
        assert_eq!((share.user, share.volumes), (Some(1), most / 4 * 3));
        // The owner has what users leave.
        let shares = crowded(&[(By::Owner, MOST / 4 * 3), (By::User(1), 1)]);
        assert_eq!(shares[0].most, MOST - 1);
        assert!(
            shares[0].to_string().contains("--forget-missing"),
            "{}",
            shares[0]
        );
    }

    #[test]
    fn the_notes_of_one_volume_take_the_room_of_one() {
        let files = |user: u32, notes: usize| -> Vec<PathBuf> {
            let name = |note| format!("{}.{note:x}.{user}.json", Uuid::nil());
            (0..notes).map(|note| name(note).into()).collect()
        };
        let taken = |notes| Counts::of(&files(1, notes)).taken(By::User(1));
        assert_eq!([0, 1, IN_ONE, IN_ONE + 1].map(taken), [0, 1, 1, 2]);
        // A user's note gives the owner room for the same volume, and no other user.
        let mut counts = Counts::of(&files(1, 1));
        counts.taken.insert(By::Owner, MOST);
        let room = |by| counts.have_room_for(by, Uuid::nil());
        assert_eq!(
            [By::User(1), By::User(2), By::Owner].map(room),
            [true, false, true]
        );
        assert!(!counts.have_room_for(By::Owner, Uuid::from_u128(1)));
    }

    fn counts(counts: &[(By, usize)]) -> Counts {
        Counts {
            taken: counts.iter().copied().collect(),
            ..Counts::default()
        }
    }

    #[test]
    fn no_user_takes_the_room_of_others_nor_all_of_them_the_owners() {
        let mut taken = Vec::new();
        for user in 1..=300 {
            let by = By::User(user);
            let mut own = 0;
            while counts(&[&taken[..], &[(by, own)]].concat()).has_room(by) {
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
        assert!(counts(&taken).has_room(By::Owner));
    }
}
