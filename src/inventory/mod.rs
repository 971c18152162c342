//! The list of volumes that this host has bound to keys, or opened: it answers "which disks does this key open?".
//!
//! A volume is self-contained and opens without this list. The list is a hint: a file for each volume, key and path in
//! `volumes/` of the state directory, written when a slot secret is wrapped or unwrapped. If it is lost, no volume is lost:
//! the use of volumes, or a scan (`sealblk key scan`), restores it. Each entry is compared with the
//! volume's own header ([`verify`]), which another process reads ([`reader`]). If a header cannot be read, the entry counts as a use of the key, since an entry only
//! prevents the revocation of keys.
//!
//! ```text
//! volumes/UUID.HASH.json         the volume's UUID; 16 digits of the SHA-256 of path, provider and key ID
//! volumes/UUID.HASH.USER.json    the same, for an entry that the agent made for another user than the directory's owner
//! volumes/incomplete             an entry could not be made because the list was full
//! ```
//!
//! An entry is made before its binding is stored, so that no volume is ever unknown. It is settled after the binding was
//! stored, or failed. If it is not settled within [`SETTLED_BY`] (for instance because `create` was killed), it counts only if
//! the volume's header confirms it. A binding without an entry is refused, and a key that is bound to one volume is not
//! bound to another ([`Index::announce`]). A rekey adds an entry. The entry of the old key is dropped at the next rekey or
//! scan, if the header no longer names the old key. So after a crash or a failure, each key that opens the volume has an
//! entry.
//!
//! Data that other users can add must not decide irreversible actions. Paths are claims of callers. So each user's entries
//! have separate files and a separate share of the room ([`room`]), and only the user that announced a binding can take it
//! back. If room is short, unsettled entries are dropped before settled ones. If an entry was dropped, the remaining entries
//! record that and count as in use for any content at their paths: the volume may be at a path that was dropped. A list that
//! is incomplete, or has an unreadable file, keeps every key. Then an operator must confirm that nothing is lost: `--force`,
//! or `key scan --forget-missing`.
//!
//! Each file is replaced as a whole, so that any number of processes can write at a time, and a crash leaves the old file
//! or the new one. No file holds a secret. There is room for [`MOST`] volumes ([`room`]), and at most [`PLACES`] entries
//! for each volume, key and user.

mod guard;
mod noting;
pub(crate) mod reader;
mod room;
pub mod verify;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use base16ct::lower;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::keys::{Binding, KeyId};
use crate::mutex::lock;
use crate::parsing;
use crate::path_text;
use crate::timestamp::Timestamp;
use room::Counts;
use sealblk_secmem::private_file;
use verify::{Verdict, look};

pub use guard::{Disk, GuardError, Removal, SERVED, Uses, remove_provider, revoke};
pub use noting::Noting;
pub use room::{By, NotAnnounced, Share};
pub use verify::Entry;

/// The most volumes; those of different users count apart.
pub const MOST: usize = 16384;
/// The most places of one volume under one key that a user has noted.
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
pub struct Note {
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
    pub bound: Option<Timestamp>,
    /// When it was last opened with it on this host, if it ever was.
    #[serde(default)]
    pub opened: Option<Timestamp>,
    /// Whether nobody has said yet that the binding, which was announced, came about.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsettled: bool,
    /// The user who had the agent note it, if that is not the state directory's owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
    /// Whether there was another place that is not noted any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub elsewhere: bool,
}

/// Why the place of a note does not tell whether the volume is bound to the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remark {
    /// Nobody has said where the volume is.
    Untold,
    /// It was at other places, too, that are not noted any more.
    Elsewhere,
}

impl Note {
    /// Why its place does not tell whether the volume is bound to the key, if so.
    fn remark(&self) -> Option<Remark> {
        match self {
            Note { path, .. } if path.is_empty() => Some(Remark::Untold),
            Note { elsewhere: true, .. } => Some(Remark::Elsewhere),
            _ => None,
        }
    }

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
    /// It is bound to a key.
    Bound,
    /// It was opened with a key.
    Opened,
    /// Its header was found to name a key, since then if it tells.
    Found(Option<Timestamp>),
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
    pub notes: Vec<Note>,
    /// Whether there may be others: there is or was no room for more, or a file cannot be read.
    pub full: bool,
    /// Whose room runs out.
    pub crowded: Vec<Share>,
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

    /// Takes note, for `by`, of what has happened to the volume whose header is in `path`; which is empty if nobody has said:
    /// then it is noted that there is such a volume, unless that is known. If it cannot be noted, the list says that it lacks
    /// something, and so does the log: no volume stays closed for it.
    pub fn note(&self, binding: &Binding<'_>, path: &Path, occasion: Occasion, by: By) {
        let now = Timestamp::now();
        let mut note = note_of(binding, path, by);
        note.bound = match occasion {
            Occasion::Bound => Some(now),
            Occasion::Opened => None,
            Occasion::Found(bound) => bound,
        };
        note.opened = (occasion == Occasion::Opened).then_some(now);
        let told = note.path.clone();
        let unkept = match self.write(note) {
            Ok(true) => return,
            Ok(false) => "it has no room for more".to_owned(),
            Err(error) => error.to_string(),
        };
        let marked = self.mark_incomplete();
        static TOLD: Rarely = Rarely::every(Duration::from_secs(60));
        if TOLD.is_due() {
            tracing::warn!(
                user = by.user(),
                marked = marked.is_ok(),
                "{}: cannot record the key of {told:?} in the list of volumes: {unkept}; until you run `sealblk key scan \
                 --forget-missing`, keys can be revoked and providers removed only with --force",
                self.dir.display(),
            );
        }
    }

    /// Takes note of what became of a binding that was announced. One that came to nothing is noted no more, unless the volume
    /// itself says otherwise: only what nobody has settled can be taken back, and only by who announced it.
    pub fn settle(&self, binding: &Binding<'_>, path: &Path, stored: bool, by: By) {
        let note = note_of(binding, path, by);
        let file = self.file(&note);
        if stored {
            // Who settles could name any volume: it was announced, or it says so itself.
            if read(&file).is_some() || look(&note) == Verdict::Bound {
                self.note(binding, path, Occasion::Bound, by);
            }
            return;
        }
        let noted = read(&file).filter(|noted| noted.unsettled);
        if noted.is_some()
            && look(&note) != Verdict::Bound
            && let Err(error) = remove(&file)
        {
            tracing::warn!(%error, "{} was not bound, but stays on the list of volumes", note.path);
        }
    }

    /// Whether there was room for it.
    fn write(&self, mut note: Note) -> io::Result<bool> {
        private_file::ensure_dir_in_state(&self.dir)?;
        if self.file(&note).exists() {
            return self.put(note).map(|()| true);
        }
        self.drop_contradicted(note.volume)?;
        let is_same = |other: &Note| other.is_under(Some(&note.provider), Some(&note.key_id));
        if note.path.is_empty()
            && self
                .notes_of(note.volume)?
                .iter()
                .any(|(_, other)| is_same(other))
        {
            return Ok(true);
        }
        let Some(replaced) = self.make_room(&mut note)? else {
            return Ok(false);
        };
        // First the one that says what is lost with the others.
        self.put(note)?;
        for file in replaced {
            remove(&file)?;
        }
        Ok(true)
    }

    /// Writes a note, with what an earlier one of the same user and place has told.
    fn put(&self, mut note: Note) -> io::Result<()> {
        let file = self.file(&note);
        if let Some(earlier) = read(&file) {
            let is_news = note.opened.is_none() || earlier.opened.is_none_or(|then| then.age() > NEWS);
            note.bound = note.bound.or(earlier.bound);
            note.opened = note.opened.or(earlier.opened);
            note.elsewhere |= earlier.elsewhere;
            // What is known for sure is not made doubtful again by who could say anything.
            note.unsettled &= earlier.unsettled;
            let is_same = (earlier.keyslot, earlier.unsettled) == (note.keyslot, note.unsettled);
            if !is_news && is_same || earlier == note {
                return Ok(());
            }
        }
        self.put_anew(&file, note)
    }

    fn put_anew(&self, file: &Path, note: Note) -> io::Result<()> {
        let text = serde_json::to_vec(&note).expect("texts and numbers are JSON");
        if text.len() as u64 > LONGEST {
            // A header that was found may say anything, and nobody could read the note.
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        private_file::replace_in_state(file, &text)
    }

    /// All of it. What several users have noted of one place is told once.
    ///
    /// # Errors
    /// If the directory is there and cannot be read. A file that cannot be is passed over, and the list is not complete then.
    pub fn list(&self) -> io::Result<Listing> {
        let files = self.files()?;
        let counts = Counts::of(&files);
        let mut full = counts.are_full() || self.is_incomplete();
        let mut notes: Vec<Note> = Vec::new();
        for file in &files {
            match read(file) {
                Some(noted) => notes.push(noted),
                // One that has just gone is no doubt.
                None => full |= file.exists(),
            }
        }
        notes.sort_by(|a, b| order(a).cmp(&order(b)));
        notes.dedup_by(|later, kept| {
            let is_same = order(later) == order(kept);
            if is_same {
                kept.bound = kept.bound.max(later.bound);
                kept.opened = kept.opened.max(later.opened);
                kept.elsewhere |= later.elsewhere;
            }
            is_same
        });
        let crowded = counts.crowded();
        Ok(Listing { notes, full, crowded })
    }

    /// Drops notes, whoever's.
    ///
    /// # Errors
    /// If the directory cannot be written.
    pub fn forget<'k>(&self, notes: impl IntoIterator<Item = &'k Note>) -> io::Result<()> {
        let gone: HashSet<_> = notes.into_iter().map(order).collect();
        for file in self.files()? {
            if read(&file).is_some_and(|noted| gone.contains(&order(&noted))) {
                remove(&file)?;
            }
        }
        Ok(())
    }

    fn file(&self, note: &Note) -> PathBuf {
        let mut hash = Sha256::new();
        for text in [&note.path, &note.provider, &note.key_id.0] {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        let hash = lower::encode_string(&hash.finalize()[..8]);
        let user = note.user.map(|user| format!(".{user}")).unwrap_or_default();
        self.dir.join(format!("{}.{hash}{user}.json", note.volume))
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

/// What a file's name tells: the volume, the hash, and whose it is.
fn name_of(file: &Path) -> Option<(Uuid, &str, By)> {
    let mut parts = file.file_name()?.to_str()?.strip_suffix(".json")?.split('.');
    let (volume, hash) = (parts.next()?.parse().ok()?, parts.next()?);
    let by = match parts.next() {
        None => By::Owner,
        Some(user) => By::User(user.parse().ok()?),
    };
    Some((volume, hash, by))
}

/// A note that says nothing yet but what is where.
fn note_of(binding: &Binding<'_>, path: &Path, by: By) -> Note {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Note {
        volume: binding.volume,
        path: path_text::to_text(&path),
        provider: binding.provider.to_owned(),
        key_id: binding.key_id.clone(),
        keyslot: binding.keyslot,
        bound: None,
        opened: None,
        unsettled: false,
        user: by.user(),
        elsewhere: false,
    }
}

/// What a note is about. An announcement that is still awaited is told apart from what is settled.
fn order(note: &Note) -> (Uuid, &str, &str, &str, bool) {
    let awaited = note.unsettled && !note.was_given_up();
    (note.volume, &note.path, &note.provider, &note.key_id.0, awaited)
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What is told no more often, since callers can provoke it.
struct Rarely {
    told: Mutex<Option<Instant>>,
    every: Duration,
}

impl Rarely {
    const fn every(every: Duration) -> Self {
        Self {
            told: Mutex::new(None),
            every,
        }
    }

    fn is_due(&self) -> bool {
        let mut told = lock(&self.told);
        let is_due = told.is_none_or(|told| told.elapsed() > self.every);
        if is_due {
            *told = Some(Instant::now());
        }
        is_due
    }
}

fn is_left_behind(path: &Path) -> bool {
    let written = fs::metadata(path).and_then(|metadata| metadata.modified());
    written.is_ok_and(|written| {
        SystemTime::now()
            .duration_since(written)
            .is_ok_and(|age| age > LEFT_BEHIND)
    })
}

fn read(file: &Path) -> Option<Note> {
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

    /// As many volumes as one user can have noted, while no other has any.
    const MOST_OF_ONE: usize = MOST / 4;

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
        assert!(index.list().unwrap().notes.is_empty());
        let key_id = KeyId("k".into());
        index.note(&binding(1, &key_id), Path::new("/a"), Occasion::Bound, By::Owner);
        index.note(&binding(1, &key_id), Path::new("/a"), Occasion::Opened, By::Owner);
        index.note(&binding(2, &key_id), Path::new("/b"), Occasion::Opened, By::Owner);
        let listed = index.list().unwrap();
        assert!(!listed.full);
        let [one, two] = &listed.notes[..] else {
            panic!("{listed:?}")
        };
        assert_eq!((one.volume, one.path.as_str()), (Uuid::from_u128(1), "/a"));
        assert!(one.bound.is_some() && one.opened.is_some());
        assert!(two.bound.is_none() && two.opened.is_some());
        index.forget([one]).unwrap();
        index.forget([one]).unwrap();
        assert_eq!(index.list().unwrap().notes, std::slice::from_ref(two));
    }

    #[test]
    fn places_are_bounded_and_one_where_nothing_is_may_be_away() {
        let (_dir, index) = index();
        let key_id = KeyId("k".into());
        for path in ["/nowhere/a", "/nowhere/b"] {
            index.note(&binding(1, &key_id), Path::new(path), Occasion::Opened, By::Owner);
        }
        let paths = |index: &Index| -> Vec<String> {
            index
                .list()
                .unwrap()
                .notes
                .into_iter()
                .map(|note| note.path)
                .collect()
        };
        assert_eq!(paths(&index), ["/nowhere/a", "/nowhere/b"]);
        // Of these nobody can tell: something is there that is not opened.
        let there = tempfile::tempdir().unwrap();
        for number in 0..2 * PLACES {
            let path = there.path().join(number.to_string());
            fs::create_dir(&path).unwrap();
            index.note(&binding(1, &key_id), &path, Occasion::Opened, By::Owner);
        }
        assert_eq!(paths(&index).len(), PLACES);
    }

    // Whoever could make disks could have eight places of another's noted, which pushed its own out, and take them back.
    #[test]
    fn no_user_pushes_out_or_takes_back_what_others_have_noted() {
        let (_dir, index) = index();
        let [key_id, fresh] = ["k", "fresh"].map(|id| KeyId(id.into()));
        let [one, other] = [By::User(1), By::User(2)];
        index.note(
            &binding(1, &key_id),
            Path::new("/nowhere/disk"),
            Occasion::Bound,
            one,
        );
        for number in 0..2 * PLACES {
            let path = format!("/nowhere/{number}");
            let refused = index.announce(&binding(1, &key_id), Path::new(&path), other);
            assert!(matches!(refused, Err(NotAnnounced::OtherUser)), "{refused:?}");
            // As one does who can read the header, and may open volumes.
            index.note(&binding(1, &key_id), Path::new(&path), Occasion::Opened, other);
            index.settle(&binding(1, &key_id), Path::new(&path), false, other);
        }
        let of = |by: By| {
            let notes = index.notes_of(Uuid::from_u128(1)).unwrap().into_iter();
            let notes = notes.map(|(_, note)| note);
            notes.filter(|note| note.user == by.user()).collect::<Vec<_>>()
        };
        assert_eq!(of(one)[0].path, "/nowhere/disk");
        assert_eq!(of(other).len(), PLACES);
        let announced = binding(2, &fresh);
        let path = Path::new("/nowhere/disk");
        index.announce(&announced, path, one).unwrap();
        index.settle(&announced, path, false, other);
        index.settle(&announced, path, true, other);
        let awaited = |index: &Index| {
            let listed = index.list().unwrap().notes;
            listed.into_iter().find(|note| note.volume == announced.volume)
        };
        assert!(awaited(&index).unwrap().unsettled);
        index.settle(&announced, path, false, one);
        assert_eq!(awaited(&index), None);
    }

    #[test]
    fn a_key_is_bound_to_one_volume() {
        let (_dir, index) = index();
        let [key_id, stale] = ["k", "stale"].map(|id| KeyId(id.into()));
        let path = Path::new("/nowhere/disk");
        for by in [By::User(1), By::Owner] {
            index.announce(&binding(1, &key_id), path, By::User(1)).unwrap();
            let refused = index.announce(&binding(2, &key_id), path, by);
            assert!(matches!(refused, Err(NotAnnounced::OtherVolume)), "{refused:?}");
        }
        // To the same volume again, as after a failure; the owner may anyhow.
        index.announce(&binding(1, &key_id), path, By::User(1)).unwrap();
        index.announce(&binding(1, &key_id), path, By::Owner).unwrap();
        // What was given up binds nobody.
        index.announce(&binding(3, &stale), path, By::User(1)).unwrap();
        let (file, mut note) = index.notes_of(Uuid::from_u128(3)).unwrap().remove(0);
        note.bound = Some(Timestamp::from_unix(0));
        index.put_anew(&file, note).unwrap();
        index.announce(&binding(4, &stale), path, By::User(2)).unwrap();
    }

    // What is not settled pushed out what was, and no trace was left of what had to go.
    #[test]
    fn what_is_settled_goes_last_and_what_is_left_says_that_something_went() {
        let (_dir, index) = index();
        let key_id = KeyId("k".into());
        let there = tempfile::tempdir().unwrap();
        let place = |number: usize| there.path().join(number.to_string());
        (0..PLACES + 1).for_each(|number| fs::create_dir(place(number)).unwrap());
        for number in 0..PLACES {
            index.note(
                &binding(1, &key_id),
                &place(number),
                Occasion::Opened,
                By::User(1),
            );
        }
        let refused = index.announce(&binding(1, &key_id), &place(PLACES), By::User(1));
        assert!(matches!(refused, Err(NotAnnounced::Places)), "{refused:?}");
        index.note(
            &binding(1, &key_id),
            &place(PLACES),
            Occasion::Opened,
            By::User(1),
        );
        let notes = index.list().unwrap().notes;
        let last = notes
            .iter()
            .find(|note| Path::new(&note.path) == place(PLACES))
            .unwrap();
        assert!(notes.len() == PLACES && last.elsewhere, "{notes:?}");
        index.sweep(true).unwrap();
        assert!(index.list().unwrap().notes.iter().all(|note| !note.elsewhere));
    }

    #[test]
    fn a_list_that_lacks_something_says_so_until_somebody_takes_the_blame() {
        let (_dir, index) = index();
        let key_id = KeyId("k".into());
        let opened = |volume, by| {
            let path = Path::new("/nowhere/disk");
            index.note(&binding(volume, &key_id), path, Occasion::Opened, by);
            !index.notes_of(Uuid::from_u128(volume)).unwrap().is_empty()
        };
        assert!(opened(1, By::Owner) && !index.list().unwrap().full);
        let note = fs::read(index.file(&index.list().unwrap().notes[0])).unwrap();
        // A user fills its share.
        for number in 0..MOST_OF_ONE {
            let name = format!("{}.0.1.json", Uuid::from_u128(1000 + number as u128));
            fs::write(index.dir.join(name), &note).unwrap();
        }
        assert!(!index.list().unwrap().full);
        assert!(!opened(2, By::User(1)));
        assert!(index.list().unwrap().full);
        let refused = index.announce(&binding(9, &KeyId("n".into())), Path::new("/a"), By::User(1));
        assert!(matches!(refused, Err(NotAnnounced::NoRoom { .. })), "{refused:?}");
        // Others have room, and what is opened again is noted again.
        assert!(opened(2, By::User(2)) && opened(3, By::Owner));
        assert!(index.list().unwrap().full);
        index.clear_incomplete().unwrap();
        assert!(!index.list().unwrap().full);
        // One that nobody can read may be any volume's.
        fs::write(index.dir.join(format!("{}.0.json", Uuid::nil())), "{").unwrap();
        assert!(index.list().unwrap().full);
    }

    // A rekey was refused for want of room: a key that somebody had got hold of could not be changed.
    #[test]
    fn a_rekey_finds_room_in_a_full_list_and_takes_no_note_away_before_the_header_does() {
        let (_dir, index) = index();
        let [old, new, other] = ["old", "new", "other"].map(|id| KeyId(id.into()));
        let place = Path::new("/nowhere/disk");
        let by = By::User(1);
        index.note(&binding(1, &old), place, Occasion::Bound, by);
        let note = fs::read(index.file(&index.list().unwrap().notes[0])).unwrap();
        for number in 0..MOST_OF_ONE {
            let name = format!("{}.0.1.json", Uuid::from_u128(1000 + number as u128));
            fs::write(index.dir.join(name), &note).unwrap();
        }
        let refused = index.announce(&binding(2, &other), place, by);
        assert!(matches!(refused, Err(NotAnnounced::NoRoom { .. })), "{refused:?}");
        let keys = || {
            let notes = index.notes_of(Uuid::from_u128(1)).unwrap().into_iter();
            let mut keys: Vec<_> = notes.map(|(_, note)| note.key_id.0).collect();
            keys.sort_unstable();
            keys
        };
        index.announce(&binding(1, &new), place, by).unwrap();
        assert_eq!(keys(), ["new", "old"]);
        // It is stored, and nothing at the place says that the old one is gone.
        index.settle(&binding(1, &new), place, true, by);
        assert_eq!(keys(), ["new", "old"]);
        // One that came to nothing takes its own note away, and no other.
        index.announce(&binding(1, &other), place, by).unwrap();
        assert_eq!(keys(), ["new", "old", "other"]);
        index.settle(&binding(1, &other), place, false, by);
        assert_eq!(keys(), ["new", "old"]);
    }

    #[test]
    fn files_of_others_and_half_written_ones_do_no_harm() {
        let (_dir, index) = index();
        let key_id = KeyId("k".into());
        index.note(&binding(1, &key_id), Path::new("/a"), Occasion::Opened, By::Owner);
        let file = index.file(&index.list().unwrap().notes[0]);
        let whole = fs::read(&file).unwrap();
        for cut in 0..whole.len() {
            fs::write(&file, &whole[..cut]).unwrap();
            assert!(index.list().unwrap().notes.is_empty(), "{cut}");
        }
        fs::create_dir(index.dir.join("directory.json")).unwrap();
        fs::write(index.dir.join("x.json.1.new"), "").unwrap();
        index.note(&binding(1, &key_id), Path::new("/a"), Occasion::Opened, By::Owner);
        assert_eq!(index.list().unwrap().notes.len(), 1);
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
                        index.note(
                            &binding(number, &key_id),
                            Path::new("/a"),
                            Occasion::Bound,
                            By::Owner,
                        );
                        let own = KeyId(format!("k{thread}.{number}"));
                        index.note(
                            &binding(100 + thread, &own),
                            Path::new("/b"),
                            Occasion::Opened,
                            By::Owner,
                        );
                    }
                });
            }
        });
        assert_eq!(index.list().unwrap().notes.len(), 20 + 8 * 20);
    }
}
