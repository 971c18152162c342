//! The transfers that storage has failed and that wait: how many of each queue, and why. The guest has no answer to their requests.
//!
//! Their chains are in flight, also in the memory that the front-end keeps ([`super::inflight`]). So a ring that is stopped meanwhile
//! takes them again when it starts, in this process or in another one. When the front-end has the guest stop or resets it, nothing
//! would answer them any more: they are answered with an error then ([`super::left`]).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, OnceLock};

use crate::mutex::lock;
use crate::storage::is_full;

/// What waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// How many transfers.
    pub transfers: usize,
    /// Why the last one of them does.
    pub by: HeldBy,
    /// Its error.
    pub error: String,
}

/// Why a transfer waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldBy {
    /// Storage has no space.
    Full,
    /// Storage fails otherwise.
    Error,
    /// Storage has not answered it when its ring was stopped. No ring is served until it has.
    Hung,
}

/// What is told when transfers begin to wait, and when none waits any more.
pub(super) type HeldObserver = Box<dyn Fn(Option<&Held>) + Send + Sync>;

/// See the module's header.
#[derive(Default)]
pub(super) struct HeldTransfers {
    by_queue: Mutex<BTreeMap<usize, Held>>,
    /// The same of queues that were stopped, and that storage does not answer.
    landing: Mutex<BTreeMap<usize, Held>>,
    observer: OnceLock<HeldObserver>,
}

impl HeldTransfers {
    /// Has `observer` told from now on.
    pub(super) fn observe(&self, observer: HeldObserver) {
        let _ = self.observer.set(observer);
    }

    /// What waits, if anything does.
    pub(super) fn now(&self) -> Option<Held> {
        sum(&lock(&self.landing)).or_else(|| sum(&lock(&self.by_queue)))
    }

    /// Takes note of how many transfers of `queue` wait, the last one for `error` if that is known.
    pub(super) fn set(&self, queue: usize, transfers: usize, error: Option<&io::Error>) {
        let (before, now) = {
            let mut by_queue = lock(&self.by_queue);
            let before = sum(&by_queue);
            if transfers == 0 {
                by_queue.remove(&queue);
            } else {
                let held = by_queue.entry(queue).or_insert_with(|| Held {
                    transfers,
                    by: HeldBy::Error,
                    error: String::new(),
                });
                held.transfers = transfers;
                if let Some(error) = error {
                    held.by = if is_full(error) {
                        HeldBy::Full
                    } else {
                        HeldBy::Error
                    };
                    held.error = error.to_string();
                }
            }
            (before, sum(&by_queue))
        };
        match (before, &now) {
            (None, Some(held)) if held.by == HeldBy::Full => tracing::error!(
                error = held.error,
                "the storage is full: requests of the guest wait; free space, and they continue by themselves"
            ),
            (None, Some(held)) => tracing::error!(
                error = held.error,
                "the storage fails: requests of the guest wait; repair it, then run `sealblk resume`, or restart `sealblk serve`"
            ),
            (Some(_), None) => {
                tracing::info!("the storage works: no request of the guest waits for it any more")
            }
            _ => return,
        }
        if let Some(observer) = self.observer.get() {
            observer(now.as_ref());
        }
    }

    /// Takes note that `queue` is not served any more. What waited is tried again when it is.
    pub(super) fn forget(&self, queue: usize) {
        lock(&self.by_queue).remove(&queue);
    }

    /// Takes note that storage has not answered so many transfers of `queue`, which is stopped.
    pub(super) fn begin_landing(&self, queue: usize, transfers: usize) {
        tracing::error!(
            queue,
            transfers,
            "the storage does not answer: the disk is not served until it does, and the requests in flight are carried out again then"
        );
        let held = Held {
            transfers,
            by: HeldBy::Hung,
            error: "the storage does not answer".to_owned(),
        };
        lock(&self.landing).insert(queue, held.clone());
        if let Some(observer) = self.observer.get() {
            observer(Some(&held));
        }
    }

    /// Takes note that it has answered all of them.
    pub(super) fn end_landing(&self, queue: usize) {
        tracing::info!(queue, "the storage answers again");
        let is_last = {
            let mut landing = lock(&self.landing);
            landing.remove(&queue);
            landing.is_empty()
        };
        if let Some(observer) = self.observer.get().filter(|_| is_last) {
            observer(None);
        }
    }

    /// Whether storage has not answered transfers of a queue that is stopped.
    pub(super) fn is_landing(&self) -> bool {
        !lock(&self.landing).is_empty()
    }
}

fn sum(by_queue: &BTreeMap<usize, Held>) -> Option<Held> {
    let last = by_queue.values().next_back()?;
    Some(Held {
        transfers: by_queue.values().map(|held| held.transfers).sum(),
        ..last.clone()
    })
}

impl std::fmt::Debug for HeldTransfers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldTransfers")
            .field("by_queue", &self.by_queue)
            .finish_non_exhaustive()
    }
}
