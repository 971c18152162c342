//! Which refusals and failures are told: whoever asks for what is not to be had could fill a log with them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How many refusals of a user are told at once, and how often one more.
const AT_ONCE: u32 = 100;
const INTERVAL: Duration = Duration::from_secs(60);

/// What was told of the refusals of each user.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<HashMap<u32, OfUser>>);

/// How many refusals of the same user were not told since the last one that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suppressed(u64);

#[derive(Debug)]
struct OfUser {
    /// How many more may be, as of when.
    room: u32,
    since: Instant,
    suppressed: u64,
}

impl Refusals {
    /// What goes with a refusal of `user` that is to be told, or none if it is not to be.
    pub fn admit(&self, user: u32) -> Option<Suppressed> {
        let mut users = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        users.entry(user).or_insert_with(OfUser::new).admit()
    }
}

impl Suppressed {
    /// `fields`, and how many others there were.
    pub fn told_in(self, mut fields: Value) -> Value {
        if self.0 > 0 {
            fields["suppressed"] = self.0.into();
        }
        fields
    }
}

impl OfUser {
    fn new() -> Self {
        Self {
            room: AT_ONCE,
            since: Instant::now(),
            suppressed: 0,
        }
    }

    fn admit(&mut self) -> Option<Suppressed> {
        let passed = self.since.elapsed().as_secs() / INTERVAL.as_secs();
        if passed > 0 {
            self.room =
                u32::try_from(passed).map_or(AT_ONCE, |passed| AT_ONCE.min(self.room.saturating_add(passed)));
            self.since = Instant::now();
        }
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

    #[test]
    fn refusals_are_told_until_they_are_too_many_and_counted_then() {
        let mut user = OfUser::new();
        let told = |suppressed| Some(Suppressed(suppressed));
        for _ in 0..AT_ONCE {
            assert_eq!(user.admit(), told(0));
        }
        assert_eq!((user.admit(), user.admit()), (None, None));
        user.since -= 3 * INTERVAL;
        assert_eq!(user.admit(), told(2));
        assert_eq!(
            (user.admit(), user.admit(), user.admit()),
            (told(0), told(0), None)
        );
        user.since -= 10_000 * INTERVAL;
        assert_eq!(user.admit(), told(1));
        assert_eq!(user.room, AT_ONCE - 1);
    }
}
