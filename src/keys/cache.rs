//! KEKs that were fetched, in memory only and for a while: hundreds of disks that are attached at once after a reboot
//! ask their server once for each KEK.
//!
//! Whoever comes while a KEK is being fetched waits for that, and gets what it brings: the KEK, or the failure, so that a
//! server that does not answer is not waited for by one after the other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::wrap::Kek;
use super::{KeyError, KeyId};

/// The most KEKs of a provider that are kept at a time: one for each VM of a large host.
const MAX_SLOTS: usize = 4096;

/// The KEKs of one provider.
#[derive(Debug)]
pub(super) struct KekCache {
    time_to_live: Duration,
    slots: Mutex<HashMap<KeyId, Arc<Slot>>>,
}

/// A KEK's place. Who holds its lock fetches.
#[derive(Debug, Default)]
struct Slot(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    /// With the time when it goes.
    kek: Option<(Arc<Kek>, Instant)>,
    /// Why the last fetch brought none, with the time when it ended.
    failure: Option<(KeyError, Instant)>,
}

impl KekCache {
    /// A cache that keeps a KEK for so long after it was last fetched; for no time at all if that is zero.
    pub(super) fn new(time_to_live: Duration) -> Self {
        Self {
            time_to_live,
            slots: Mutex::default(),
        }
    }

    /// The KEK of `key_id`, which `fetch` brings if it is not here.
    pub(super) fn get(
        &self,
        key_id: &KeyId,
        fetch: impl FnOnce() -> Result<Kek, KeyError>,
    ) -> Result<Arc<Kek>, KeyError> {
        if self.time_to_live.is_zero() {
            return fetch().map(Arc::new);
        }
        let came = Instant::now();
        let slot = {
            let mut slots = lock(&self.slots);
            // Whoever asks for keys that nothing is wrapped under must not fill the memory for keys.
            if slots.len() >= MAX_SLOTS && !slots.contains_key(key_id) {
                drop(slots);
                return fetch().map(Arc::new);
            }
            Arc::clone(slots.entry(key_id.clone()).or_default())
        };
        let mut held = lock(&slot.0);
        if let Some((kek, until)) = &held.kek
            && *until > Instant::now()
        {
            return Ok(Arc::clone(kek));
        }
        match &held.failure {
            Some((failure, ended)) if *ended >= came => return Err(failure.clone()),
            _ => *held = Held::default(),
        }
        let fetched = fetch();
        let now = Instant::now();
        match fetched {
            Ok(kek) => {
                let kek = Arc::new(kek);
                held.kek = Some((Arc::clone(&kek), now + self.time_to_live));
                Ok(kek)
            }
            Err(failure) => {
                held.failure = Some((failure.clone(), now));
                Err(failure)
            }
        }
    }

    /// Drops a KEK. Who has found it, or fetches it just now, uses it once more.
    pub(super) fn forget(&self, key_id: &KeyId) {
        lock(&self.slots).remove(key_id);
    }

    /// Drops the KEKs whose time has come.
    pub(super) fn drop_expired(&self) {
        let now = Instant::now();
        lock(&self.slots).retain(|_, slot| match slot.0.try_lock() {
            // Somebody who has found it waits for what is in it.
            Ok(_) if Arc::strong_count(slot) > 1 => true,
            Ok(held) => held.kek.as_ref().is_some_and(|(_, until)| *until > now),
            // It is being fetched.
            Err(_) => true,
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyReason;
    use crate::keys::arena::SecretBytes;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    const LONG: Duration = Duration::from_secs(1000);

    fn kek() -> Kek {
        Kek::new(SecretBytes::random(32).unwrap()).unwrap()
    }

    fn id(name: &str) -> KeyId {
        KeyId(name.into())
    }

    /// As many threads as ask for one KEK, whose fetch takes long enough for all to come.
    fn storm(cache: &KekCache, result: impl Fn() -> Result<Kek, KeyError> + Sync) -> (u32, u32) {
        let (fetched, failed) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let got = cache.get(&id("one"), || {
                        fetched.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(500));
                        result()
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
        cache.get(&id("two"), || Ok(kek())).unwrap();
        assert_eq!(lock(&cache.slots).len(), 2);
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
        let first = cache.get(&id("one"), || Ok(kek())).unwrap();
        thread::sleep(Duration::from_millis(60));
        let second = cache.get(&id("one"), || Ok(kek())).unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        cache.drop_expired();
        assert_eq!(Arc::strong_count(&second), 2, "it is not its time yet");
        thread::sleep(Duration::from_millis(60));
        cache.drop_expired();
        assert_eq!(Arc::strong_count(&second), 1);
        assert!(lock(&cache.slots).is_empty());
    }

    #[test]
    fn nothing_is_kept_for_no_time() {
        let cache = KekCache::new(Duration::ZERO);
        cache.get(&id("one"), || Ok(kek())).unwrap();
        assert!(lock(&cache.slots).is_empty());
    }
}
