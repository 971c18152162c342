//! The volumes that this host has bound to keys, or opened: what answers "which disks does this key open?".
//!
//! A volume is self-contained and needs no list of anybody's. This one is a hint: a file for each volume, key and place in
//! `volumes/` of the state directory, written when a slot secret is wrapped or unwrapped. If it is lost, nothing is lost:
//! it comes back as volumes are used, or by a look at them (`sealblk key scan`). What it says is looked up in the
//! volumes' own headers ([`survey`]); where a header cannot be read, the hint counts as true, for it only ever keeps
//! keys from being taken away.
//!
//! ```text
//! volumes/UUID.HASH.json    the volume's UUID; 16 digits of the SHA-256 of path, provider and key ID
//! ```
//!
//! A binding is noted before it is stored, so that no volume is ever unknown, and settled when it is, or could not be. Where
//! nobody came to settle it within [`SETTLED_BY`], it counts only if the volume says so itself: that is what a killed
//! `create` leaves.
//!
//! Each file is replaced as a whole, so that any number of processes write them at a time, and a crash leaves the old one
//! or the new one. No file holds a secret. There are at most [`MOST`] of them, and at most [`PLACES`] for a volume and key.

mod guard;
mod lookout;
mod noting;
pub mod survey;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::hex;
use crate::keys::private;
use crate::keys::{Binding, KeyId};
use crate::moment::Moment;
use crate::parsing;
use crate::path_text;
use survey::{Standing, look};

pub use guard::{Disk, GuardError, Removal, Uses, remove_provider, revoke};
pub use noting::Noting;

/// The most files.
pub const MOST: usize = 16384;
/// The most places of one volume under one key: whoever may open a volume could name any number.
const PLACES: usize = 8;
/// How long after it was announced a binding may come about. Who is later notes it anew.
const SETTLED_BY: Duration = Duration::from_secs(3600);
/// How long a volume's being opened is news.
const NEWS: Duration = Duration::from_secs(60);
/// The longest file that is read: a key ID has up to 8 KiB, a path 4 KiB.
const LONGEST: u64 = 64 << 10;
/// When a file that a crash has left half written is taken away.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

/// A volume that was seen to be bound to a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Known {
    /// The UUID in its header.
    pub volume: Uuid,
    /// What holds its header, as it was last called, as [`path_text`] writes it.
    pub path: String,
    /// The provider's name.
    pub provider: String,
    /// The KEK.
    pub key_id: KeyId,
    /// The keyslot that it opens.
    pub keyslot: u32,
    /// When the keyslot was bound to the KEK, if that is known.
    #[serde(default)]
    pub bound: Option<Moment>,
    /// When it was last opened with it on this host, if it ever was.
    #[serde(default)]
    pub opened: Option<Moment>,
    /// Whether nobody has said yet that the binding, which was announced, came about.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsettled: bool,
}

impl Known {
    /// Whether it is bound to this provider and this key, if they are given.
    pub fn is_under(&self, provider: Option<&str>, key_id: Option<&KeyId>) -> bool {
        provider.is_none_or(|provider| self.provider == provider)
            && key_id.is_none_or(|key_id| self.key_id == *key_id)
    }

    /// Whether it was announced so long ago that whoever did that must have failed or been killed.
    fn was_given_up(&self) -> bool {
        self.unsettled && self.bound.is_none_or(|announced| announced.age() > SETTLED_BY)
    }
}

/// What has happened to a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// It is about to be bound to a key.
    Announced,
    /// It is bound to a key.
    Bound,
    /// It was opened with a key.
    Opened,
    /// Its header was found to name a key, since then if it tells.
    Found(Option<Moment>),
}

/// The list of a state directory.
#[derive(Clone, Debug)]
pub struct Index {
    dir: PathBuf,
}

/// What the list holds.
#[derive(Debug, Default)]
pub struct Listing {
    /// By volume.
    pub known: Vec<Known>,
    /// Whether there was no room for more, so that there may be others.
    pub full: bool,
}

impl Index {
    /// The list of the state directory `state_dir`, which need not exist.
    pub fn of(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.join("volumes"),
        }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes note of what has happened to the volume whose header is in `path`. If that fails, it is told in the log: no
    /// volume stays closed for it.
    pub fn note(&self, binding: &Binding<'_>, path: &Path, occasion: Occasion) {
        let now = Moment::now();
        let mut known = note_of(binding, path);
        known.bound = match occasion {
            Occasion::Announced | Occasion::Bound => Some(now),
            Occasion::Opened => None,
            Occasion::Found(bound) => bound,
        };
        known.opened = (occasion == Occasion::Opened).then_some(now);
        known.unsettled = occasion == Occasion::Announced;
        let path = known.path.clone();
        match self.write(known) {
            Ok(true) => {}
            Ok(false) => tracing::warn!(
                "{} is full: the key that {} is bound to is not noted; drop what has gone with `sealblk key scan`",
                self.dir.display(),
                path
            ),
            Err(error) => tracing::warn!(
                %error,
                "{}: it cannot be noted which key {} is bound to",
                self.dir.display(),
                path
            ),
        }
    }

    /// Takes note of what became of a binding that was announced. One that came to nothing is noted no more, unless the volume
    /// itself says otherwise: only what nobody has settled can be taken back.
    pub fn settle(&self, binding: &Binding<'_>, path: &Path, stored: bool) {
        let known = note_of(binding, path);
        if stored {
            // Who settles could name any volume: it was announced, or it says so itself.
            if read(&self.file(&known)).is_some() || look(&known) == Standing::Bound {
                self.note(binding, path, Occasion::Bound);
            }
            return;
        }
        let noted = read(&self.file(&known)).filter(|noted| noted.unsettled);
        if noted.is_some()
            && look(&known) != Standing::Bound
            && let Err(error) = self.forget(&known)
        {
            tracing::warn!(%error, "{} was not bound, and stays on the list of volumes", known.path);
        }
    }

    /// Whether there was room for it.
    fn write(&self, mut known: Known) -> io::Result<bool> {
        private::ensure_dir(&self.dir)?;
        let file = self.file(&known);
        match read(&file) {
            Some(earlier) => {
                let is_news = known.opened.is_none() || earlier.opened.is_none_or(|then| then.age() > NEWS);
                known.bound = known.bound.or(earlier.bound);
                known.opened = known.opened.or(earlier.opened);
                // What is known for sure is not made doubtful again by who could say anything.
                known.unsettled &= earlier.unsettled;
                let is_same = (earlier.keyslot, earlier.unsettled) == (known.keyslot, known.unsettled);
                if !is_news && is_same || earlier == known {
                    return Ok(true);
                }
            }
            None if !self.make_room(&known)? => return Ok(false),
            None => {}
        }
        let text = serde_json::to_vec(&known).expect("texts and numbers are JSON");
        if text.len() as u64 > LONGEST {
            // A header that was found may say anything, and nobody could read the note.
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        private::replace(&file, &text)?;
        Ok(true)
    }

    /// Drops what `known`, which is new, replaces: notes of the same volume that its header contradicts. One that names a
    /// place where nothing is stays: this may be a copy, and that one's disk away. Tells whether there is room.
    fn make_room(&self, known: &Known) -> io::Result<bool> {
        let prefix = format!("{}.", known.volume);
        let mut count = 0;
        let mut same_key: Vec<(PathBuf, Known)> = Vec::new();
        for file in self.files()? {
            count += 1;
            let of_volume = |name: &str| name.starts_with(&prefix);
            if !file
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(of_volume)
            {
                continue;
            }
            let Some(other) = read(&file) else { continue };
            let is_same = (&other.provider, &other.key_id) == (&known.provider, &known.key_id);
            if look(&other) == Standing::NotBound {
                fs::remove_file(&file)?;
                count -= 1;
            } else if is_same {
                same_key.push((file, other));
            }
        }
        if same_key.len() >= PLACES
            && let Some((file, _)) = same_key
                .iter()
                .min_by_key(|(_, other)| other.opened.max(other.bound))
        {
            fs::remove_file(file)?;
            count -= 1;
        }
        Ok(count < MOST)
    }

    /// All of it.
    ///
    /// # Errors
    /// If the directory is there and cannot be read. A file that cannot be is passed over.
    pub fn list(&self) -> io::Result<Listing> {
        let files = self.files()?;
        let full = files.len() >= MOST;
        let mut known: Vec<_> = files.iter().filter_map(|file| read(file)).collect();
        known.sort_by(|a, b| order(a).cmp(&order(b)));
        Ok(Listing { known, full })
    }

    /// Drops a note.
    ///
    /// # Errors
    /// If the directory cannot be written.
    pub fn forget(&self, known: &Known) -> io::Result<()> {
        match fs::remove_file(self.file(known)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn file(&self, known: &Known) -> PathBuf {
        let mut hash = Sha256::new();
        for text in [&known.path, &known.provider, &known.key_id.0] {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        let hash = hex::encode(&hash.finalize()[..8]);
        self.dir.join(format!("{}.{hash}.json", known.volume))
    }

    /// The files. What a crash has left of others goes.
    fn files(&self) -> io::Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => files.push(path),
                Some("new") if is_left_behind(&path) => {
                    let _ = fs::remove_file(&path);
                }
                _ => {}
            }
        }
        Ok(files)
    }
}

/// A note that says nothing yet but what is where.
fn note_of(binding: &Binding<'_>, path: &Path) -> Known {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Known {
        volume: binding.volume,
        path: path_text::to_text(&path),
        provider: binding.provider.to_owned(),
        key_id: binding.key_id.clone(),
        keyslot: binding.keyslot,
        bound: None,
        opened: None,
        unsettled: false,
    }
}

fn order(known: &Known) -> (Uuid, &str, &str, &str) {
    (known.volume, &known.path, &known.provider, &known.key_id.0)
}

fn is_left_behind(path: &Path) -> bool {
    let written = fs::metadata(path).and_then(|metadata| metadata.modified());
    written.is_ok_and(|written| {
        SystemTime::now()
            .duration_since(written)
            .is_ok_and(|age| age > LEFT_BEHIND)
    })
}

fn read(file: &Path) -> Option<Known> {
    let metadata = fs::metadata(file).ok()?;
    if !metadata.is_file() || metadata.len() > LONGEST {
        return None;
    }
    parsing::json(&fs::read(file).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn binding<'a>(volume: u128, key_id: &'a KeyId) -> Binding<'a> {
        Binding {
            volume: Uuid::from_u128(volume),
            provider: "native",
            key_id,
            keyslot: 1,
        }
    }

    fn index() -> (tempfile::TempDir, Index) {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::of(dir.path());
        (dir, index)
    }

    #[test]
    fn what_was_noted_is_listed_and_forgotten() {
        let (_dir, index) = index();
        assert!(index.list().unwrap().known.is_empty());
        let key_id = KeyId("k".into());
        index.note(&binding(1, &key_id), Path::new("/a"), Occasion::Bound);
        index.note(&binding(1, &key_id), Path::new("/a"), Occasion::Opened);
        index.note(&binding(2, &key_id), Path::new("/b"), Occasion::Opened);
        let listed = index.list().unwrap();
        assert!(!listed.full);
        let [one, two] = &listed.known[..] else {
            panic!("{listed:?}")
        };
        assert_eq!((one.volume, one.path.as_str()), (Uuid::from_u128(1), "/a"));
        assert!(one.bound.is_some() && one.opened.is_some());
        assert!(two.bound.is_none() && two.opened.is_some());
        index.forget(one).unwrap();
        index.forget(one).unwrap();
        assert_eq!(index.list().unwrap().known, std::slice::from_ref(two));
    }

    #[test]
    fn places_are_bounded_and_one_where_nothing_is_may_be_away() {
        let (_dir, index) = index();
        let key_id = KeyId("k".into());
        for path in ["/nowhere/a", "/nowhere/b"] {
            index.note(&binding(1, &key_id), Path::new(path), Occasion::Opened);
        }
        let paths = |index: &Index| -> Vec<String> {
            index
                .list()
                .unwrap()
                .known
                .into_iter()
                .map(|known| known.path)
                .collect()
        };
        assert_eq!(paths(&index), ["/nowhere/a", "/nowhere/b"]);
        // Of these nobody can tell: something is there that is not opened.
        let there = tempfile::tempdir().unwrap();
        for number in 0..2 * PLACES {
            let path = there.path().join(number.to_string());
            fs::create_dir(&path).unwrap();
            index.note(&binding(1, &key_id), &path, Occasion::Opened);
        }
        assert_eq!(paths(&index).len(), PLACES);
    }

    #[test]
    fn files_of_others_and_half_written_ones_do_no_harm() {
        let (_dir, index) = index();
        let key_id = KeyId("k".into());
        index.note(&binding(1, &key_id), Path::new("/a"), Occasion::Opened);
        let file = index.file(&index.list().unwrap().known[0]);
        let whole = fs::read(&file).unwrap();
        for cut in 0..whole.len() {
            fs::write(&file, &whole[..cut]).unwrap();
            assert!(index.list().unwrap().known.is_empty(), "{cut}");
        }
        fs::create_dir(index.dir.join("directory.json")).unwrap();
        fs::write(index.dir.join("x.json.1.new"), "").unwrap();
        index.note(&binding(1, &key_id), Path::new("/a"), Occasion::Opened);
        assert_eq!(index.list().unwrap().known.len(), 1);
    }

    #[test]
    fn any_number_of_writers_lose_nothing() {
        let (_dir, index) = index();
        thread::scope(|scope| {
            for thread in 0..8 {
                let index = &index;
                scope.spawn(move || {
                    for number in 0..20 {
                        let key_id = KeyId(format!("k{number}"));
                        index.note(&binding(number, &key_id), Path::new("/a"), Occasion::Bound);
                        let own = KeyId(format!("k{thread}.{number}"));
                        index.note(&binding(100 + thread, &own), Path::new("/b"), Occasion::Opened);
                    }
                });
            }
        });
        assert_eq!(index.list().unwrap().known.len(), 20 + 8 * 20);
    }
}
