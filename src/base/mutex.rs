//! Mutexes that outlive a panic. In a release build a panic ends the process; in a test it is reported, and other tests
//! continue.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, whoever has panicked while they held it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
