//! The cache of fetched KEKs, in memory only and for a limited time: when hundreds of disks are attached at once after a
//! reboot, the server gets one request for each KEK.
//!
//! A caller that asks for a KEK while it is being fetched waits for this fetch, and gets its result: the KEK, or the
//! failure. So callers do not wait one after the other for a server that does not answer.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::wrap::Kek;
use crate::boot_time::BootTime;
use crate::keys::{KeyError, KeyId};
use crate::mutex::lock;

/// The most KEKs of a provider that are kept at a time: one for each VM of a large host.
const MAX_SLOTS: usize = 4096;

/// The most KEKs of a provider that are fetched at a time; others wait for their turn. An answer of a server takes some 20 KiB
/// of the memory for keys, which hundreds of them at once would use up.
const MAX_FETCHES: usize = 64;

/// The KEKs of one provider.
#[derive(Debug)]
pub(super) struct KekCache {
    time_to_live: Duration,
    slots: Mutex<HashMap<KeyId, Arc<Slot>>>,
    /// See [`KekCache::hold`].
    held: Mutex<HashMap<KeyId, Arc<Kek>>>,
    /// How many are being fetched.
    fetches: Mutex<usize>,
    /// One of them has ended.
    fetched: Condvar,
}

/// A fetch that is under way, until this goes.
struct Turn<'c>(&'c KekCache);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.0.fetches) -= 1;
        self.0.fetched.notify_one();
    }
}

/// A KEK's place. Who holds its lock fetches.
#[derive(Debug, Default)]
struct Slot(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    kek: Option<Kept>,
    /// Why the last fetch brought none, with the time when it ended.
    failure: Option<(KeyError, BootTime)>,
}

#[derive(Debug)]
struct Kept {
    kek: Arc<Kek>,
    /// When it was asked for.
    since: BootTime,
    until: BootTime,
    origin: Origin,
}

/// Where a KEK that is kept came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Its source: nothing that is wrapped under it is lost.
    Fetched,
    /// Somebody who may push KEKs. It opens what it opens; a secret that is wrapped under a wrong one is lost.
    Pushed,
    /// What was fetched before, and is good until then, since its source does not answer.
    Sealed(SystemTime),
}

/// Which KEKs will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// One that its source gives out.
    Fetched,
    /// Any, to open with.
    Any,
}

impl Wanted {
    fn is(self, origin: Origin) -> bool {
        self == Self::Any || origin == Origin::Fetched
    }
}

impl KekCache {
    /// A cache that keeps a KEK for so long after it was last fetched; for no time at all if that is zero.
    pub(super) fn new(time_to_live: Duration) -> Self {
        Self {
            time_to_live,
            slots: Mutex::default(),
            held: Mutex::default(),
            fetches: Mutex::default(),
            fetched: Condvar::new(),
        }
    }

    /// Waits until there may be one fetch more.
    fn turn(&self) -> Turn<'_> {
        let waits = |fetches: &mut usize| *fetches >= MAX_FETCHES;
        let fetches = self.fetched.wait_while(lock(&self.fetches), waits);
        *fetches.unwrap_or_else(PoisonError::into_inner) += 1;
        Turn(self)
    }

    /// The KEK of `key_id` as it is wanted, which `fetch` brings if it is not here.
    pub(super) fn get(
        &self,
        key_id: &KeyId,
        wanted: Wanted,
        fetch: impl FnOnce() -> Result<(Kek, Origin), KeyError>,
    ) -> Result<(Arc<Kek>, Origin), KeyError> {
        let shared = |(kek, origin)| (Arc::new(kek), origin);
        let fetch = || {
            let _turn = self.turn();
            fetch()
        };
        if self.time_to_live.is_zero() {
            return fetch().map(shared);
        }
        let came = BootTime::now();
        let slot = {
            let mut slots = lock(&self.slots);
            // Whoever asks for keys that nothing is wrapped under must not fill the memory for keys.
            if slots.len() >= MAX_SLOTS && !slots.contains_key(key_id) {
                drop(slots);
                return fetch().map(shared);
            }
            Arc::clone(slots.entry(key_id.clone()).or_default())
        };
        let mut held = lock(&slot.0);
        if let Some(kept) = &held.kek
            && kept.until > BootTime::now()
            && wanted.is(kept.origin)
        {
            return Ok((Arc::clone(&kept.kek), kept.origin));
        }
        match &held.failure {
            Some((failure, ended)) if *ended >= came => return Err(failure.clone()),
            _ => held.failure = None,
        }
        // One that will not do here may do for who comes next, should none be to be had.
        let since = BootTime::now();
        held.kek.take_if(|kept| kept.until <= since);
        let fetched = fetch();
        let now = BootTime::now();
        match fetched {
            Ok((kek, origin)) => {
                let kek = Arc::new(kek);
                let good_for = match origin {
                    Origin::Sealed(until) => until.duration_since(SystemTime::now()).unwrap_or_default(),
                    Origin::Fetched | Origin::Pushed => Duration::MAX,
                };
                held.kek = Some(Kept {
                    kek: Arc::clone(&kek),
                    since,
                    until: now + self.time_to_live.min(good_for),
                    origin,
                });
                Ok((kek, origin))
            }
            Err(failure) => {
                held.failure = Some((failure.clone(), now));
                Err(failure)
            }
        }
    }

    /// Keeps a KEK that its source was not asked for, unless it is here already. Without a time to live there is nothing to keep it for.
    pub(super) fn push(&self, key_id: &KeyId, kek: Kek) -> Result<(), Full> {
        let slot = {
            let mut slots = lock(&self.slots);
            if self.time_to_live.is_zero() || slots.len() >= MAX_SLOTS && !slots.contains_key(key_id) {
                return Err(Full);
            }
            Arc::clone(slots.entry(key_id.clone()).or_default())
        };
        let mut held = lock(&slot.0);
        let now = BootTime::now();
        if !matches!(&held.kek, Some(kept) if kept.origin == Origin::Fetched && kept.until > now) {
            held.kek = Some(Kept {
                kek: Arc::new(kek),
                since: now,
                until: now + self.time_to_live,
                origin: Origin::Pushed,
            });
        }
        Ok(())
    }

    /// Until when a KEK that is here is good, if its source was away.
    pub(super) fn grace(&self, key_id: &KeyId) -> Option<SystemTime> {
        let slot = Arc::clone(lock(&self.slots).get(key_id)?);
        // While it is being fetched it is none.
        let held = slot.0.try_lock().ok()?;
        match held.kek.as_ref()?.origin {
            Origin::Sealed(until) => Some(until),
            _ => None,
        }
    }

    /// Holds a KEK that is here beyond its time, until [`KekCache::forget`]: a volume under it is served, and has to open again
    /// after a crash while the source does not answer. [`KekCache::get`] does not give it out. A KEK of the sealed cache is not held: the
    /// operator has set until when it is good.
    pub(super) fn hold(&self, key_id: &KeyId) {
        let slot = lock(&self.slots).get(key_id).map(Arc::clone);
        let kek = slot.and_then(|slot| match &lock(&slot.0).kek {
            Some(kept) if !matches!(kept.origin, Origin::Sealed(_)) => Some(Arc::clone(&kept.kek)),
            _ => None,
        });
        let mut held = lock(&self.held);
        if let Some(kek) = kek
            && (held.len() < MAX_SLOTS || held.contains_key(key_id))
        {
            held.insert(key_id.clone(), kek);
        }
    }

    /// A KEK that is held.
    pub(super) fn held(&self, key_id: &KeyId) -> Option<Arc<Kek>> {
        lock(&self.held).get(key_id).map(Arc::clone)
    }

    /// Drops a KEK before its time, and one that is held; whoever uses it just now goes on.
    pub(super) fn forget(&self, key_id: &KeyId) {
        lock(&self.slots).remove(key_id);
        lock(&self.held).remove(key_id);
    }

    /// The same, unless it was asked for within the last `age`, and is here.
    pub(super) fn forget_older(&self, key_id: &KeyId, age: Duration) {
        let mut slots = lock(&self.slots);
        let is_young = |held: &Held| held.kek.as_ref().is_some_and(|kept| kept.since.elapsed() < age);
        let keep = |slot: &Arc<Slot>| slot.0.try_lock().is_ok_and(|held| is_young(&held));
        if !slots.get(key_id).is_some_and(keep) {
            slots.remove(key_id);
        }
    }

    /// Drops the KEKs whose time has come.
    pub(super) fn drop_expired(&self) {
        let now = BootTime::now();
        lock(&self.slots).retain(|_, slot| match slot.0.try_lock() {
            // Somebody who has found it waits for what is in it.
            Ok(_) if Arc::strong_count(slot) > 1 => true,
            Ok(held) => held.kek.as_ref().is_some_and(|kept| kept.until > now),
            // It is being fetched.
            Err(_) => true,
        });
    }
}

/// As many KEKs are kept as may be.
#[derive(Debug, thiserror::Error)]
#[error("the cache keeps no more keys: it has {MAX_SLOTS} already, or time_to_live is 0")]
pub(super) struct Full;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyReason;
    use sealblk_secmem::arena::SecretBytes;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    const LONG: Duration = Duration::from_secs(1000);

    #[test]
    fn no_more_than_so_many_are_fetched_at_a_time() {
        let cache = KekCache::new(LONG);
        let (now, most) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for n in 0..3 * MAX_FETCHES {
                let (cache, now, most) = (&cache, &now, &most);
                scope.spawn(move || {
                    let fetch = || {
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        thread::sleep(Duration::from_millis(20));
                        now.fetch_sub(1, Ordering::SeqCst);
                        Ok((kek(), Origin::Fetched))
                    };
                    cache.get(&KeyId(n.to_string()), Wanted::Any, fetch).unwrap();
                });
            }
        });
        let most = most.load(Ordering::SeqCst) as usize;
        assert!((2..=MAX_FETCHES).contains(&most), "{most} at a time");
    }

    fn kek() -> Kek {
        Kek::new(SecretBytes::random(32).unwrap()).unwrap()
    }

    fn id(name: &str) -> KeyId {
        KeyId(name.into())
    }

    fn get(cache: &KekCache, name: &str) -> Arc<Kek> {
        let (kek, _) = cache
            .get(&id(name), Wanted::Fetched, || Ok((kek(), Origin::Fetched)))
            .unwrap();
        kek
    }

    /// As many threads as ask for one KEK, whose fetch takes long enough for all to come.
    fn storm(cache: &KekCache, result: impl Fn() -> Result<Kek, KeyError> + Sync) -> (u32, u32) {
        let (fetched, failed) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let got = cache.get(&id("one"), Wanted::Fetched, || {
                        fetched.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(500));
                        result().map(|kek| (kek, Origin::Fetched))
                    });
                    failed.fetch_add(u32::from(got.is_err()), Ordering::Relaxed);
                });
            }
        });
        (fetched.into_inner(), failed.into_inner())
    }

    #[test]
    fn a_storm_makes_one_request_for_each_kek() {
        let cache = KekCache::new(LONG);
        assert_eq!(storm(&cache, || Ok(kek())), (1, 0));
        assert_eq!(storm(&cache, || panic!("it is here")), (0, 0));
        get(&cache, "two");
        assert_eq!(lock(&cache.slots).len(), 2);
        cache.forget(&id("one"));
        assert_eq!(lock(&cache.slots).len(), 1);
        assert_eq!(storm(&cache, || Ok(kek())), (1, 0));
    }

    #[test]
    fn who_waits_for_a_fetch_gets_its_failure_and_who_comes_later_tries_again() {
        let cache = KekCache::new(LONG);
        let away = || Err(KeyError::new("kms", "kms1:5696", KeyReason::Unreachable));
        assert_eq!(storm(&cache, away), (1, 16));
        assert_eq!(storm(&cache, || Ok(kek())), (1, 0));
    }

    #[test]
    fn keks_go_when_their_time_has_come() {
        let cache = KekCache::new(Duration::from_millis(50));
        let first = get(&cache, "one");
        thread::sleep(Duration::from_millis(60));
        let second = get(&cache, "one");
        assert!(!Arc::ptr_eq(&first, &second));
        cache.drop_expired();
        assert_eq!(Arc::strong_count(&second), 2, "it is not its time yet");
        thread::sleep(Duration::from_millis(60));
        cache.drop_expired();
        assert_eq!(Arc::strong_count(&second), 1);
        assert!(lock(&cache.slots).is_empty());
    }

    #[test]
    fn a_pushed_kek_is_given_to_who_takes_one_and_a_fetched_one_replaces_it() {
        let cache = KekCache::new(LONG);
        cache.push(&id("one"), kek()).unwrap();
        let unneeded = || panic!("it is here");
        let (pushed, origin) = cache.get(&id("one"), Wanted::Any, unneeded).unwrap();
        assert_eq!(origin, Origin::Pushed);
        assert!(!Arc::ptr_eq(&pushed, &get(&cache, "one")));
        let (_, origin) = cache.get(&id("one"), Wanted::Any, unneeded).unwrap();
        assert_eq!(origin, Origin::Fetched);
    }

    #[test]
    fn a_kek_of_before_a_reboot_is_not_kept_past_the_end_of_its_grace() {
        let cache = KekCache::new(LONG);
        let grace = Duration::from_millis(300);
        let sealed = || Ok((kek(), Origin::Sealed(SystemTime::now() + grace)));
        let (first, _) = cache.get(&id("one"), Wanted::Any, sealed).unwrap();
        let (again, _) = cache
            .get(&id("one"), Wanted::Any, || panic!("it is here"))
            .unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        thread::sleep(grace);
        let over = || Err(KeyError::new("kms", "kms1:5696", KeyReason::Unreachable));
        cache.get(&id("one"), Wanted::Any, over).unwrap_err();
    }

    #[test]
    fn nothing_is_kept_for_no_time() {
        let cache = KekCache::new(Duration::ZERO);
        get(&cache, "one");
        assert!(cache.push(&id("one"), kek()).is_err());
        assert!(lock(&cache.slots).is_empty());
    }

    #[test]
    fn a_kek_is_held_past_its_time_until_it_is_forgotten_and_a_sealed_one_is_not() {
        let cache = KekCache::new(LONG);
        let fetched = get(&cache, "one");
        let sealed = || Ok((kek(), Origin::Sealed(SystemTime::now() + LONG)));
        cache.get(&id("two"), Wanted::Any, sealed).unwrap();
        for name in ["one", "two", "never here"] {
            cache.hold(&id(name));
        }
        lock(&cache.slots).clear();
        assert!(Arc::ptr_eq(&fetched, &cache.held(&id("one")).unwrap()));
        assert!(cache.held(&id("two")).is_none() && cache.held(&id("never here")).is_none());
        // It is given out by no other way.
        cache
            .get(&id("one"), Wanted::Any, || {
                Err(KeyError::new("kms", "kms1:5696", KeyReason::Unreachable))
            })
            .unwrap_err();
        cache.forget(&id("one"));
        assert!(cache.held(&id("one")).is_none());
    }
}
