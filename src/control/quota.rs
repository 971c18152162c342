//! Limits of the number of callers, in total and for each user, so that no user can take all places.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use super::peer::Peer;
use super::privilege::has_all;
use sealblk_base::mutex::lock;

/// How a caller stands to the process that it asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Root, or the user that the process runs as.
    Own,
    /// Something was granted to it.
    Granted,
    /// Nothing was.
    Stranger,
}

/// How many places there are for those who stand so. Each kind has places of its own.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For [`Standing::Own`].
    pub own: usize,
    /// For [`Standing::Granted`].
    pub granted: usize,
    /// For [`Standing::Stranger`].
    pub stranger: usize,
    /// What a user gets at any rate, while there is a place.
    pub sure: usize,
}

/// The places of users: how many each has, of each kind.
pub type UserQuota = Quota<(u32, Standing)>;
/// One of them.
pub type UserShare = Share<(u32, Standing)>;

/// The places that are taken, by whom.
#[derive(Debug)]
pub struct Quota<K>(Mutex<HashMap<K, usize>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Share<K: Copy + Eq + Hash> {
    places: Arc<Quota<K>>,
    owner: K,
}

impl Standing {
    /// That of `peer`; `is_known` tells whether something was granted to it.
    pub fn of(peer: &Peer, is_known: impl FnOnce(&Peer) -> bool) -> Self {
        match () {
            () if has_all(peer) => Self::Own,
            () if is_known(peer) => Self::Granted,
            () => Self::Stranger,
        }
    }
}

/// Whether a user who has `own` places may have one more of the `left` ones: half of them, so that the next user finds some, and
/// `sure` ones at any rate.
pub fn is_fair(own: usize, left: usize, sure: usize) -> bool {
    left > 0 && own < sure.max(left / 2)
}

impl UserQuota {
    /// One more place for `user`, if there is one.
    pub fn take_of(places: &Arc<Self>, rooms: Limits, user: u32, standing: Standing) -> Option<UserShare> {
        Self::take(places, (user, standing), |taken| {
            let room = match standing {
                Standing::Own => rooms.own,
                Standing::Granted => rooms.granted,
                Standing::Stranger => rooms.stranger,
            };
            let alike = taken.iter().filter(|((_, other), _)| *other == standing);
            let left = room.saturating_sub(alike.map(|(_, count)| count).sum());
            let own = taken.get(&(user, standing)).copied().unwrap_or(0);
            match standing {
                Standing::Own => left > 0,
                Standing::Granted | Standing::Stranger => is_fair(own, left, rooms.sure),
            }
        })
    }
}

impl<K> Default for Quota<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Copy + Eq + Hash> Quota<K> {
    /// One more place for `owner`, if `has_room` says so of the places that are taken.
    pub fn take(
        places: &Arc<Self>,
        owner: K,
        has_room: impl FnOnce(&HashMap<K, usize>) -> bool,
    ) -> Option<Share<K>> {
        let mut taken = lock(&places.0);
        if !has_room(&taken) {
            return None;
        }
        *taken.entry(owner).or_default() += 1;
        Some(Share {
            places: Arc::clone(places),
            owner,
        })
    }
}

impl<K: Copy + Eq + Hash> Drop for Share<K> {
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
    fn no_two_users_take_all_places_and_none_of_them_the_owners() {
        let rooms = Limits {
            own: 512,
            granted: 1024,
            stranger: 64,
            sure: 16,
        };
        let places = Arc::default();
        let mut held = Vec::new();
        let mut take_all = |user, standing| {
            let before = held.len();
            while let Some(place) = Quota::take_of(&places, rooms, user, standing) {
                held.push(place);
            }
            held.len() - before
        };
        let granted: Vec<_> = (1..=10).map(|user| take_all(user, Standing::Granted)).collect();
        assert!(
            granted[0] < 400 && granted.iter().all(|got| *got >= rooms.sure),
            "{granted:?}"
        );
        assert!(take_all(11, Standing::Stranger) < 64 && take_all(12, Standing::Stranger) > 0);
        assert_eq!(take_all(0, Standing::Own), 512);
    }

    #[test]
    fn a_place_is_free_again_when_it_is_dropped() {
        let places = Arc::new(Quota::default());
        let take = |owner: u32, most: usize| {
            Quota::take(&places, owner, |taken| taken.values().sum::<usize>() < most)
        };
        let held = [1, 1, 2].map(|owner| take(owner, 3).unwrap());
        assert!(take(3, 3).is_none());
        drop(held);
        assert!(lock(&places.0).is_empty());
    }
}
