//! Rate limit for refusal and failure records, so that callers cannot flood the log.
//!
//! Each caller has a share of the table, and records that do not fit are counted together. So no caller can suppress the
//! records of other callers, and every suppressed record is counted.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;

use sealblk_base::mutex::lock;

/// The most kinds of one caller that are told apart; all others of his are one kind. All disks of a large host may be one user's.
const MAX_KINDS: usize = 1024;
/// The most callers that are told apart; all others are one caller.
const MAX_CALLERS: usize = 128;

/// What was told of each caller, and of each kind of refusal.
#[derive(Debug)]
pub struct RateLimit<C, K> {
    at_once: u32,
    interval: Duration,
    /// The most kinds of one caller.
    kinds: usize,
    told: Mutex<HashMap<Option<C>, Kinds<K>>>,
}

type Kinds<K> = HashMap<Option<K>, Told>;

/// How many refusals of the same kind were not told since the last one that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suppressed(u64);

/// What was told of a kind.
#[derive(Debug)]
struct Told {
    /// How many more may be, as of when.
    room: u32,
    since: Instant,
    suppressed: u64,
}

impl<C: Eq + Hash, K: Eq + Hash> RateLimit<C, K> {
    /// So many of a kind are told at once, and one more after each interval.
    pub fn new(at_once: u32, interval: Duration) -> Self {
        Self {
            at_once,
            interval,
            kinds: MAX_KINDS,
            told: Mutex::default(),
        }
    }

    /// With so many kinds of one caller told apart at most.
    pub fn with_kinds(mut self, most: usize) -> Self {
        self.kinds = most;
        self
    }

    /// What goes with a refusal that is to be told, or none if it is not to be.
    pub fn admit(&self, caller: C, kind: K) -> Option<Suppressed> {
        let mut told = lock(&self.told);
        let caller = own_place(&mut told, caller, MAX_CALLERS, |kinds| {
            kinds.retain(|_, told| !told.is_quiet(self.at_once, self.interval));
            kinds.is_empty()
        });
        let kinds = told.entry(caller).or_default();
        let kind = own_place(kinds, kind, self.kinds, |told| {
            told.is_quiet(self.at_once, self.interval)
        });
        let told = kinds.entry(kind).or_insert_with(|| Told {
            room: self.at_once,
            since: Instant::now(),
            suppressed: 0,
        });
        told.make_room(self.at_once, self.interval);
        told.admit()
    }
}

/// The place of `key` in `map`: its own if it has one, or if there is room for it, without those that `is_over` says so of;
/// else the one of all others.
fn own_place<K: Eq + Hash, V>(
    map: &mut HashMap<Option<K>, V>,
    key: K,
    limit: usize,
    mut is_over: impl FnMut(&mut V) -> bool,
) -> Option<K> {
    let key = Some(key);
    if map.len() >= limit && !map.contains_key(&key) {
        map.retain(|_, value| !is_over(value));
        if map.len() >= limit {
            return None;
        }
    }
    key
}

impl Suppressed {
    /// How many.
    pub fn count(self) -> u64 {
        self.0
    }

    /// `fields`, and how many others there were.
    pub fn told_in(self, mut fields: Value) -> Value {
        if self.0 > 0 {
            fields["suppressed"] = self.0.into();
        }
        fields
    }
}

impl Told {
    /// Whether nothing is lost if it is forgotten.
    fn is_quiet(&mut self, at_once: u32, interval: Duration) -> bool {
        self.make_room(at_once, interval);
        self.room == at_once && self.suppressed == 0
    }

    fn make_room(&mut self, at_once: u32, interval: Duration) {
        let passed = self.since.elapsed().as_secs() / interval.as_secs();
        if passed > 0 {
            self.room =
                u32::try_from(passed).map_or(at_once, |passed| at_once.min(self.room.saturating_add(passed)));
            self.since = Instant::now();
        }
    }

    fn admit(&mut self) -> Option<Suppressed> {
        match self.room.checked_sub(1) {
            Some(room) => {
                self.room = room;
                Some(Suppressed(std::mem::take(&mut self.suppressed)))
            }
            None => {
                self.suppressed += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(60);

    /// Lets time go by.
    fn later<C, K>(refusals: &RateLimit<C, K>, intervals: u32) {
        let mut told = refusals.told.lock().unwrap();
        for told in told.values_mut().flat_map(HashMap::values_mut) {
            told.since -= intervals * INTERVAL;
        }
    }

    #[test]
    fn refusals_are_told_until_they_are_too_many_and_counted_then() {
        let refusals = RateLimit::new(3, INTERVAL);
        let admit = |times: usize| (0..times).map(|_| refusals.admit(7, ())).collect::<Vec<_>>();
        let told = |suppressed| Some(Suppressed(suppressed));
        assert_eq!(admit(5), [told(0), told(0), told(0), None, None]);
        // Others have room of their own.
        assert_eq!(refusals.admit(8, ()), told(0));
        later(&refusals, 2);
        assert_eq!(admit(3), [told(2), told(0), None]);
        later(&refusals, 10_000);
        assert_eq!(admit(4), [told(1), told(0), told(0), None]);
    }

    #[test]
    fn a_caller_who_asks_for_everything_takes_nothing_from_others_and_is_counted() {
        let refusals = RateLimit::new(1, INTERVAL);
        let told = (0..2 * MAX_KINDS).filter(|kind| refusals.admit(1, *kind).is_some());
        // And one for all the others.
        assert_eq!(told.count(), MAX_KINDS + 1);
        assert_eq!(refusals.admit(2, 0), Some(Suppressed(0)));
        later(&refusals, 1);
        let rest = 2 * MAX_KINDS;
        assert_eq!(
            refusals.admit(1, rest),
            Some(Suppressed(0)),
            "an old one made room"
        );
        for kind in rest + 1..rest + MAX_KINDS - 1 {
            refusals.admit(1, kind);
        }
        let suppressed = MAX_KINDS as u64 - 1;
        assert_eq!(refusals.admit(1, 9999), Some(Suppressed(suppressed)));
    }

    #[test]
    fn callers_without_end_take_no_memory_without_end_and_are_counted() {
        let refusals = RateLimit::new(1, INTERVAL);
        let told = (0..2 * MAX_CALLERS).filter(|caller| refusals.admit(*caller, ()).is_some());
        assert_eq!(told.count(), MAX_CALLERS + 1);
        later(&refusals, 1);
        assert_eq!(refusals.admit(9999, ()), Some(Suppressed(0)));
        // What was counted is not forgotten.
        assert_eq!(refusals.told.lock().unwrap().len(), 2);
    }
}
