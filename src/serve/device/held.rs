//! The transfers that storage has failed and that wait: how many of each queue, and why. The guest has no answer to their requests.
//!
//! Their chains are in flight, also in the memory that the front-end keeps ([`super::inflight`]). So a ring that is stopped meanwhile
//! takes them again when it starts, in this process or in another one. When the front-end has the guest stop or resets it, nothing
//! would answer them any more: they are answered with an error then ([`super::left`]).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

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

/// So long nothing waits before that is told: what is tried again may have to wait again.
const SETTLED: Duration = Duration::from_millis(500);

/// See the module's header.
#[derive(Clone, Default)]
pub(super) struct HeldTransfers(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    observer: OnceLock<HeldObserver>,
}

#[derive(Debug, Default)]
struct State {
    by_queue: BTreeMap<usize, Held>,
    /// The same of queues that were stopped, and that storage does not answer.
    landing: BTreeMap<usize, Held>,
    /// Why transfers wait, as far as that was told.
    told: Option<HeldBy>,
    /// Whether a thread tells what has changed since.
    is_telling: bool,
}

impl State {
    fn now(&self) -> Option<Held> {
        sum(&self.landing).or_else(|| sum(&self.by_queue))
    }

    /// Whether what was told is not true any more. If so, a thread is telling from then on.
    fn begins_to_tell(&mut self) -> bool {
        let begins = !self.is_telling && self.told != self.now().map(|held| held.by);
        self.is_telling |= begins;
        begins
    }
}

impl HeldTransfers {
    /// Has `observer` told from now on, in a thread that nothing waits for.
    pub(super) fn observe(&self, observer: HeldObserver) {
        let _ = self.0.observer.set(observer);
    }

    /// What waits, if anything does.
    pub(super) fn now(&self) -> Option<Held> {
        lock(&self.0.state).now()
    }

    /// Takes note of how many transfers of `queue` wait, the last one for `error` if that is known.
    pub(super) fn set(&self, queue: usize, transfers: usize, error: Option<&io::Error>) {
        self.change(|state| {
            if transfers == 0 {
                state.by_queue.remove(&queue);
                return;
            }
            let held = state.by_queue.entry(queue).or_insert_with(|| Held {
                transfers,
                by: HeldBy::Error,
                error: String::new(),
            });
            held.transfers = transfers;
            if let Some(error) = error {
                held.by = match is_full(error) {
                    true => HeldBy::Full,
                    false => HeldBy::Error,
                };
                held.error = error.to_string();
            }
        });
    }

    /// Takes note that `queue` is not served any more. What waited is tried again when it is.
    pub(super) fn forget(&self, queue: usize) {
        self.change(|state| drop(state.by_queue.remove(&queue)));
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
        self.change(|state| drop(state.landing.insert(queue, held)));
    }

    /// Takes note that it has answered all of them.
    pub(super) fn end_landing(&self, queue: usize) {
        tracing::info!(queue, "the storage answers again");
        self.change(|state| drop(state.landing.remove(&queue)));
    }

    /// Whether storage has not answered transfers of a queue that is stopped.
    pub(super) fn is_landing(&self) -> bool {
        !lock(&self.0.state).landing.is_empty()
    }

    /// Changes what waits, and has a thread tell of that: the observer may have to wait for others.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let begins = {
            let mut state = lock(&self.0.state);
            change(&mut state);
            state.begins_to_tell()
        };
        if begins {
            let held = self.clone();
            let thread = thread::Builder::new().name("held".into());
            if let Err(error) = thread.spawn(move || held.tell()) {
                tracing::error!(%error, "whether requests wait for the storage cannot be told");
                lock(&self.0.state).is_telling = false;
            }
        }
    }

    /// Tells what has changed, until all is told.
    fn tell(&self) {
        let mut is_settled = false;
        loop {
            let now = {
                let mut state = lock(&self.0.state);
                let now = state.now();
                let by = now.as_ref().map(|held| held.by);
                if by == state.told {
                    state.is_telling = false;
                    return;
                }
                if now.is_some() || is_settled {
                    state.told = by;
                    Some(now)
                } else {
                    None
                }
            };
            is_settled = now.is_none();
            match now {
                Some(now) => {
                    log(now.as_ref());
                    if let Some(observer) = self.0.observer.get() {
                        observer(now.as_ref());
                    }
                }
                None => thread::sleep(SETTLED),
            }
        }
    }
}

fn log(held: Option<&Held>) {
    match held {
        Some(Held {
            by: HeldBy::Full,
            error,
            ..
        }) => tracing::error!(
            error,
            "the storage is full: requests of the guest wait; free space, and they continue by themselves"
        ),
        Some(Held {
            by: HeldBy::Error,
            error,
            ..
        }) => tracing::error!(
            error,
            "the storage fails: requests of the guest wait; repair it, then run `sealblk resume`, or restart `sealblk serve`"
        ),
        // Of each queue, when it is stopped.
        Some(Held { by: HeldBy::Hung, .. }) => {}
        None => tracing::info!("no request of the guest waits for the storage any more"),
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
        f.debug_tuple("HeldTransfers").field(&self.0.state).finish()
    }
}
