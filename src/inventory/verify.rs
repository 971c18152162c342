//! Compares the entries of the list of volumes with the volumes' own headers.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::reader::{Caution, Found, Reader};
use super::{By, Index, Note, Occasion, Remark, read, remove};
use crate::keys::Binding;
use crate::keys::binding::BoundTo;
use crate::path_text::{from_text, to_text};
use crate::probe::Probe;

/// How long a look at all volumes may take. Those that it has not come to are unknown.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a volume's header says about a note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The note is right.
    Bound,
    /// The volume is there, and not bound to the key.
    NotBound,
    /// It is not at its place; what is there instead, if anything.
    Missing(Option<String>),
    /// It cannot be told: what is there cannot be read, or is about to be bound.
    Unknown(String),
}

/// A note, and what the volume says about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// The note.
    #[serde(flatten)]
    pub note: Note,
    /// Whether it holds: `bound`, `not_bound`, `missing` or `unknown`; or `untold`, to who may not know what is at places that
    /// others have named.
    #[serde(rename = "standing")]
    pub verdict: String,
    /// If it is missing or unknown: why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Entry {
    fn new(note: Note, verdict: Verdict) -> Self {
        let (verdict, why) = match verdict {
            Verdict::Bound => (BOUND, None),
            Verdict::NotBound => (NOT_BOUND, None),
            Verdict::Missing(instead) => (MISSING, instead),
            Verdict::Unknown(why) => (UNKNOWN, Some(why)),
        };
        Self {
            note,
            verdict: verdict.to_owned(),
            why,
        }
    }

    /// A note for who may not know what is at its place: nobody looks there.
    pub fn untold(note: Note) -> Self {
        Self {
            note,
            verdict: UNTOLD.to_owned(),
            why: None,
        }
    }

    /// Whether it is [`Entry::untold`].
    pub fn is_untold(&self) -> bool {
        self.verdict == UNTOLD
    }

    /// Whether the volume has to be taken for bound to the key: also where nobody can tell, since it may be on a disk that
    /// is not there just now.
    pub fn in_use(&self) -> bool {
        self.verdict != NOT_BOUND
    }
}

const BOUND: &str = "bound";
const NOT_BOUND: &str = "not_bound";
const MISSING: &str = "missing";
const UNKNOWN: &str = "unknown";
pub(super) const UNTOLD: &str = "untold";

/// What each of `notes` is worth. A place is looked at once. Since when a volume is bound to its key, its own header tells.
pub fn verify(notes: impl IntoIterator<Item = Note>) -> Vec<Entry> {
    let began = Instant::now();
    let mut probe = Reader::probe();
    let mut seen: HashMap<(String, Caution), Found> = HashMap::new();
    let judge = |mut note: Note| {
        let caution = Caution::with(&note);
        let found =
            seen.entry((note.path.clone(), caution))
                .or_insert_with(|| match began.elapsed() < PATIENCE {
                    true => Found::at(&mut probe, &from_text(&note.path), caution),
                    false => Found::Nothing("the time limit was over before it was checked".to_owned()),
                });
        let found = &*found;
        let verdict = found.judge(&note);
        if let (Found::Volume(bindings), Verdict::Bound) = (found, &verdict) {
            let to_it = |to: &&BoundTo| (&to.provider, &to.key_id) == (&note.provider, &note.key_id);
            note.bound = bindings.to.iter().find(to_it).and_then(|to| to.since);
        }
        Entry::new(note, verdict)
    };
    notes.into_iter().map(judge).collect()
}

/// What one note is worth.
pub(super) fn look(note: &Note) -> Verdict {
    let mut probe = Reader::probe();
    Found::at(&mut probe, &from_text(&note.path), Caution::with(note)).judge(note)
}

/// What a look at volumes has brought.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Scanned {
    /// The volumes that were found.
    pub found: Vec<Seen>,
    /// What is no volume that can be read.
    pub passed_over: Vec<PassedOver>,
    /// How many notes did not hold any more, and were dropped.
    pub dropped: usize,
}

/// A volume.
#[derive(Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Where it is.
    pub path: String,
    /// How many KEKs it is bound to.
    pub keys: usize,
}

/// What is no volume.
#[derive(Debug, Serialize, Deserialize)]
pub struct PassedOver {
    /// Where it is.
    pub path: String,
    /// Why it cannot be read as one.
    pub why: String,
}

impl Index {
    /// Drops what is noted of a volume that was erased, at the place where it was, whatever names that has: unless it is there
    /// still, or that cannot be told. Users say what they like: of them, only their own notes go.
    pub fn erased(&self, volume: Uuid, path: &Path, by: By) {
        let mut probe = Reader::probe();
        if !matches!(Found::at(&mut probe, path, Caution::of(by)), Found::NoVolume) {
            return;
        }
        let mut place_of = |path: &Path| probe.at(path, |reader| reader.canonical(path)).ok()?;
        let place = place_of(path);
        let its = |note: &Note| by == By::Owner || note.user == by.user();
        for (file, note) in self.notes_of(volume).unwrap_or_default() {
            let noted = from_text(&note.path);
            let is_it = noted == path || place.is_some() && place_of(&noted) == place;
            if its(&note)
                && is_it
                && let Err(error) = remove(&file)
            {
                tracing::warn!(%error, "{} is erased, but stays on the list of volumes", note.path);
            }
        }
    }

    /// Looks at the volumes in `paths`, and notes what they are bound to.
    pub fn scan<'p>(&self, paths: impl Iterator<Item = &'p Path>, by: By) -> Scanned {
        let mut scanned = Scanned::default();
        let mut probe = Reader::probe();
        for path in paths {
            let told = to_text(path);
            match Found::at(&mut probe, path, Caution::of(by)) {
                Found::Volume(bindings) => {
                    for to in &bindings.to {
                        let binding = Binding {
                            volume: bindings.uuid,
                            provider: &to.provider,
                            key_id: &to.key_id,
                            keyslot: to.keyslot,
                        };
                        self.note(&binding, path, Occasion::Found(to.since), by);
                    }
                    let keys = bindings.to.len();
                    scanned.found.push(Seen { path: told, keys });
                }
                Found::Missing => scanned.passed_over.push(PassedOver {
                    path: told,
                    why: "nothing is there".to_owned(),
                }),
                Found::NoVolume => scanned.passed_over.push(PassedOver {
                    path: told,
                    why: NO_VOLUME.to_owned(),
                }),
                Found::Nothing(why) => scanned.passed_over.push(PassedOver { path: told, why }),
            }
        }
        scanned
    }

    /// Looks at all volumes that are known, and drops what does not hold. With `missing`, somebody says that nothing is needed of
    /// what nobody can look at: notes of places where the volume is not, what notes say of others, files that cannot be read,
    /// and that there was no room go as well. Tells how many notes those were.
    ///
    /// # Errors
    /// If the list cannot be read or written.
    pub fn sweep(&self, missing: bool) -> io::Result<usize> {
        let mut dropped = 0;
        if missing {
            self.clear_incomplete()?;
            for file in self.files()? {
                match read(&file) {
                    Some(note) if note.remark() == Some(Remark::Elsewhere) => {
                        self.put_anew(
                            &file,
                            Note {
                                elsewhere: false,
                                ..note
                            },
                        )?;
                    }
                    Some(_) => {}
                    None if file.is_file() => {
                        remove(&file)?;
                        dropped += 1;
                    }
                    None => {}
                }
            }
        }
        let mut entries = verify(self.list()?.notes);
        let is_missing =
            |entry: &Entry| entry.verdict == MISSING || entry.note.remark() == Some(Remark::Untold);
        entries.retain(|entry| !entry.in_use() || missing && is_missing(entry));
        self.forget(entries.iter().map(|entry| &entry.note))?;
        Ok(dropped + entries.len())
    }
}

const NO_VOLUME: &str = "no LUKS2 volume is there";

impl Caution {
    fn of(by: By) -> Self {
        match by {
            By::Owner => Self::None,
            By::User(_) => Self::Others,
        }
    }

    fn with(note: &Note) -> Self {
        Self::of(note.user.map_or(By::Owner, By::User))
    }
}

impl Found {
    fn at(probe: &mut Probe<Reader>, path: &Path, caution: Caution) -> Self {
        match probe.at(path, |reader| reader.is_missing(path)) {
            Ok(false) => {}
            Ok(true) => return Self::Missing,
            Err(silence) => return Self::Nothing(silence.to_string()),
        }
        let found = probe.at(path, |reader| reader.header(path, caution));
        // A hostile header may have taken it over: it must not tell of another volume that nothing binds it to its key.
        probe.renew();
        found.unwrap_or_else(|silence| Self::Nothing(silence.to_string()))
    }

    fn judge(&self, note: &Note) -> Verdict {
        let verdict = self.judge_place(note);
        match (note.remark(), &verdict) {
            (Some(Remark::Untold), _) => Verdict::Unknown("its path is unknown".to_owned()),
            (Some(Remark::Elsewhere), Verdict::NotBound) => {
                Verdict::Unknown("it was at other paths, too, which the list no longer has".to_owned())
            }
            _ => verdict,
        }
    }

    fn judge_place(&self, note: &Note) -> Verdict {
        match self {
            Found::Volume(bindings) if bindings.uuid == note.volume => {
                let to_it = bindings
                    .to
                    .iter()
                    .any(|to| (&to.provider, &to.key_id) == (&note.provider, &note.key_id));
                match to_it {
                    true => Verdict::Bound,
                    false if note.unsettled && !note.was_given_up() => {
                        Verdict::Unknown("it is about to be bound to the key".to_owned())
                    }
                    false => Verdict::NotBound,
                }
            }
            Found::Nothing(why) => Verdict::Unknown(why.clone()),
            _ if note.was_given_up() => Verdict::NotBound,
            Found::Volume(other) => {
                Verdict::Missing(Some(format!("another volume is there, {}", other.uuid)))
            }
            Found::NoVolume => Verdict::Missing(Some(NO_VOLUME.to_owned())),
            Found::Missing => Verdict::Missing(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyId;
    use crate::keys::binding::Bindings;

    #[test]
    fn a_place_does_not_tell_of_others_that_were_not_kept() {
        let note = Note {
            volume: Uuid::from_u128(1),
            path: "/a".into(),
            provider: "native".into(),
            key_id: KeyId("k".into()),
            keyslot: 0,
            bound: None,
            opened: None,
            unsettled: false,
            user: Some(1),
            elsewhere: false,
        };
        let unbound = Found::Volume(Bindings {
            uuid: note.volume,
            to: Vec::new(),
        });
        assert_eq!(unbound.judge(&note), Verdict::NotBound);
        let elsewhere = Note {
            elsewhere: true,
            ..note.clone()
        };
        let untold = Note {
            path: String::new(),
            ..note
        };
        for note in [elsewhere, untold] {
            assert!(matches!(unbound.judge(&note), Verdict::Unknown(_)), "{note:?}");
        }
    }
}
