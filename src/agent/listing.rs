//! Lists that are too long for one answer: a caller reads them in parts.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::inventory::Listing;
use crate::mutex::lock;

/// How much of a list one answer has, in bytes of its JSON, and what is told of an entry beside what it holds itself.
const PAGE_BYTES: usize = 24 << 10;
const ENTRY_BYTES: usize = 600;
/// How long the parts of a list are taken from what was read for its first.
const LASTS: Duration = Duration::from_secs(60);

/// What one answer has of a list, from the entry of that number on, and where the next one goes on.
pub(super) fn page<T: Serialize>(list: impl Iterator<Item = T>, from: usize) -> (Vec<T>, Option<usize>) {
    let mut left = list.skip(from).peekable();
    let mut bytes = 0;
    let mut page = Vec::new();
    while let Some(entry) = left.next_if(|entry| {
        bytes += ENTRY_BYTES + serde_json::to_vec(entry).map_or(0, |json| json.len());
        page.is_empty() || bytes <= PAGE_BYTES
    }) {
        page.push(entry);
    }
    let next = left.peek().map(|_| from + page.len());
    (page, next)
}

/// The list of volumes as who asks for its first part finds it. The parts that follow are taken from the same: to read all notes for
/// each part takes minutes where there are many.
#[derive(Debug, Default)]
pub(super) struct LastListing(Mutex<Option<(Instant, Arc<Listing>)>>);

impl LastListing {
    /// What the part from `from` on is taken of.
    pub(super) fn from(
        &self,
        from: usize,
        list: impl FnOnce() -> io::Result<Listing>,
    ) -> io::Result<Arc<Listing>> {
        let last = lock(&self.0).clone();
        if let Some((began, listing)) = last
            && from > 0
            && began.elapsed() < LASTS
        {
            return Ok(listing);
        }
        let listing = Arc::new(list()?);
        *lock(&self.0) = Some((Instant::now(), Arc::clone(&listing)));
        Ok(listing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // All notes were read for each part of some thirty: a list of 16384 took minutes.
    #[test]
    fn the_parts_of_a_list_are_of_one_look_and_the_first_is_a_new_one() {
        let last = LastListing::default();
        let full = |full| {
            move || {
                Ok(Listing {
                    full,
                    ..Listing::default()
                })
            }
        };
        let part = |from, now| last.from(from, full(now)).unwrap().full;
        assert!(part(0, true));
        assert!(part(1, false));
        assert!(!part(0, false));
        assert!(!part(1, true));
    }
}
