//! Which refusals and failures are told: whoever asks for what is not to be had could fill a log with them.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How many kinds are told apart. Beyond them, a new one is told when an old one has been quiet for long enough.
const MAX_KINDS: usize = 4096;

/// What was told of each kind of refusal: of each user, say.
#[derive(Debug)]
pub struct Refusals<K> {
    at_once: u32,
    interval: Duration,
    kinds: Mutex<HashMap<K, Told>>,
}

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

impl<K: Eq + Hash> Refusals<K> {
    /// So many of a kind are told at once, and one more after each interval.
    pub fn new(at_once: u32, interval: Duration) -> Self {
        Self {
            at_once,
            interval,
            kinds: Mutex::default(),
        }
    }

    /// What goes with a refusal that is to be told, or none if it is not to be.
    pub fn admit(&self, kind: K) -> Option<Suppressed> {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        if kinds.len() >= MAX_KINDS && !kinds.contains_key(&kind) {
            kinds.retain(|_, told| {
                told.make_room(self.at_once, self.interval);
                told.room < self.at_once
            });
            if kinds.len() >= MAX_KINDS {
                return None;
            }
        }
        let told = kinds.entry(kind).or_insert_with(|| Told {
            room: self.at_once,
            since: Instant::now(),
            suppressed: 0,
        });
        told.make_room(self.at_once, self.interval);
        told.admit()
    }
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

    #[test]
    fn refusals_are_told_until_they_are_too_many_and_counted_then() {
        let refusals = Refusals::new(3, INTERVAL);
        let later = |intervals: u32| {
            let mut kinds = refusals.kinds.lock().unwrap();
            kinds
                .values_mut()
                .for_each(|told| told.since -= intervals * INTERVAL);
        };
        let admit = |times: usize| (0..times).map(|_| refusals.admit(7)).collect::<Vec<_>>();
        let told = |suppressed| Some(Suppressed(suppressed));
        assert_eq!(admit(5), [told(0), told(0), told(0), None, None]);
        // Others have room of their own.
        assert_eq!(refusals.admit(8), told(0));
        later(2);
        assert_eq!(admit(3), [told(2), told(0), None]);
        later(10_000);
        assert_eq!(admit(4), [told(1), told(0), told(0), None]);
    }

    #[test]
    fn kinds_without_end_take_no_memory_without_end() {
        let refusals = Refusals::new(1, INTERVAL);
        let told = (0..2 * MAX_KINDS).filter(|kind| refusals.admit(*kind).is_some());
        assert_eq!(told.count(), MAX_KINDS);
        let mut kinds = refusals.kinds.lock().unwrap();
        kinds.values_mut().for_each(|told| told.since -= INTERVAL);
        drop(kinds);
        assert!(refusals.admit(2 * MAX_KINDS).is_some());
        assert_eq!(refusals.kinds.lock().unwrap().len(), 1);
    }
}
