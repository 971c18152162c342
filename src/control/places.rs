//! How many callers there are of each kind, so that none of them takes every place.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use crate::mutex::lock;

/// The places that are taken, by whom.
#[derive(Debug)]
pub struct Places<K>(Mutex<HashMap<K, usize>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Place<K: Copy + Eq + Hash> {
    places: Arc<Places<K>>,
    owner: K,
}

impl<K> Default for Places<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Copy + Eq + Hash> Places<K> {
    /// One more place for `owner`, if `has_room` says so of the places that are taken.
    pub fn take(
        places: &Arc<Self>,
        owner: K,
        has_room: impl FnOnce(&HashMap<K, usize>) -> bool,
    ) -> Option<Place<K>> {
        let mut taken = lock(&places.0);
        if !has_room(&taken) {
            return None;
        }
        *taken.entry(owner).or_default() += 1;
        Some(Place {
            places: Arc::clone(places),
            owner,
        })
    }
}

impl<K: Copy + Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        // An owner without a place takes no room.
        if let Entry::Occupied(mut count) = lock(&self.places.0).entry(self.owner) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_when_it_is_dropped() {
        let places = Arc::new(Places::default());
        let take = |owner: u32, most: usize| {
            Places::take(&places, owner, |taken| taken.values().sum::<usize>() < most)
        };
        let held = [1, 1, 2].map(|owner| take(owner, 3).unwrap());
        assert!(take(3, 3).is_none());
        drop(held);
        assert!(lock(&places.0).is_empty());
    }
}
