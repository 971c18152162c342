//! The claim on a served disk's storage: a ring starts only with it.
//!
//! A process claims its disk at its start, and gives the claim back when the front-end has stopped its rings (GET_VRING_BASE): the guest
//! may have migrated, and the destination needs the claim then. It also does so if the front-end leaves while the other side of a
//! migration is there. The next ring that starts needs the claim again. A destination (`--incoming`) starts without it.
//!
//! To claim a disk can take time: writes of a process that was killed have to land, and the source of a migration has to stop. So a
//! thread does it, and the session continues meanwhile. When the disk is claimed, the thread has the header checked: the guest must
//! find the disk that it knows. If the claim is refused, the rings stay stopped, and nothing tries again by itself: the guest may have
//! run elsewhere since, and what this one knows of its disk would be old. The next try comes after the front-end has stopped its rings.
//!
//! A change of the volume's header needs the claim, too, and keeps it ([`Kept`]) while no other process has attached the disk: a guest
//! that is reset, or stopped, in the middle of a rekey is not noticed. If the other side of a migration is there, the guest goes
//! first: the claim is given back, and the rest of the change is refused. With a claim in the header, locks do not tell whether the other
//! side is there, so the guest always goes first.
//!
//! A claim that has to wait for storage before it is given back is due ([`Due`]). Meanwhile no other process takes the disk over: there,
//! nothing would give it back.

use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use super::limits::DEFAULT_STOP_LIMIT;
use crate::error_chain::causes;
use crate::mutex::lock;
use crate::storage::{Attached, Claim, DataFile, Lent, StorageError, Unclaimed};

/// How long the source of a migration can take to give up the disk once the destination's guest runs.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is asked and told when a claim comes or goes.
pub trait Observer: Send + Sync {
    /// Checks that the disk, which is claimed and not served yet, is the one that the guest knows; the error says why it is not. For the
    /// `first` claim of the process, the disk has to be read for that; later a disk that cannot be read is no other one. A guest that
    /// `goes_on` has run here before.
    fn check(&self, first: bool, goes_on: bool) -> Result<(), String>;
    /// Whether [`Observer::release`] has something to do.
    fn has_to_release(&self) -> bool;
    /// Whether other hosts are kept out by more than locks, which do not reach them.
    fn tells_other_hosts(&self) -> bool;
    /// The claim is about to be given back; whether a guest `ran` with it.
    fn release(&self, ran: bool);
    /// The claim has come or gone, or was refused.
    fn changed(&self);
}

/// See the module's header.
pub struct Claims {
    state: Mutex<State>,
    /// How many changes of the header keep the claim.
    kept: AtomicU32,
    /// Whether it is to be given back when none keeps it any more.
    is_overdue: AtomicBool,
    /// Changes while the state is locked.
    stops: Mutex<Stops>,
    /// Whether a thread is giving it back.
    is_leaving: AtomicBool,
    /// Whether another process has the locks as well, and it is not decided which of the two goes on. Nothing is given back then. Changes
    /// while the state is locked.
    is_lent: AtomicBool,
    observer: OnceLock<Box<dyn Observer>>,
    /// Whether this process has had the claim.
    was_held: AtomicBool,
    /// Whether a ring was served with the claim.
    is_used: AtomicBool,
    /// Whether the guest of the front-end that is connected has run here.
    guest_ran: AtomicBool,
}

#[derive(Debug)]
enum State {
    Claimed(Arc<Claim>),
    /// No ring needs the claim.
    Attached(Attached),
    /// A thread is claiming it.
    Claiming {
        /// Whether a ring still needs it.
        is_wanted: bool,
        /// Until the thread takes it.
        attached: Option<Attached>,
    },
    /// A ring needs it, and it was refused for this reason.
    Refused(Attached, String),
    /// Another process has what was attached, for good.
    Left,
}

/// A stop of the guest after which the claim is to be given back, once storage has what was written. What is known of the storage for one
/// stop says nothing for a later one: the guest has run in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due(u64);

/// See [`Due`].
#[derive(Debug, Default)]
struct Stops {
    count: u64,
    last: Stop,
}

/// What became of the last stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stop {
    /// There was none, the claim was given back, or it is not to be: the guest runs again, or storage has failed.
    #[default]
    Over,
    /// The claim is to be given back.
    Due,
    /// So it is, and a thread waits for the storage.
    Syncing,
}

impl Stops {
    fn due(&self) -> Option<Due> {
        (self.last != Stop::Over).then_some(Due(self.count))
    }

    /// Takes note that the claim is due, unless it is already.
    fn add(&mut self) {
        if self.last == Stop::Over {
            self.count += 1;
            self.last = Stop::Due;
        }
    }
}

/// A claim on its way to another process. See [`Claims::lend`].
#[derive(Debug)]
pub struct LentClaim {
    /// What is attached.
    pub parts: Vec<Lent>,
    /// What else the other process has to know.
    pub past: ClaimPast,
}

/// A disk's claim so far, as another process continues with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimPast {
    /// Whether the disk is claimed.
    pub is_claimed: bool,
    /// Whether it ever was.
    pub was_claimed: bool,
    /// Whether a ring was served with the last claim.
    pub is_used: bool,
    /// Whether the guest of the front-end that is connected has run here.
    pub guest_ran: bool,
}

/// How a disk's claim is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Rings can be served.
    Held,
    /// No ring needs it.
    Released,
    /// Rings wait for another process, or for writes of one that was killed.
    Waiting,
    /// Rings wait until the front-end has stopped them, for this reason.
    Refused(String),
}

impl Claims {
    /// Of what is attached; it is claimed when a ring needs it.
    pub fn later(attached: Attached) -> Self {
        Self::with(State::Attached(attached))
    }

    /// Claims what is attached, now or, if writes of a process that was killed have not landed, later.
    ///
    /// # Errors
    /// Where another process has it in use, or it cannot be locked.
    pub fn now(attached: Attached) -> Result<Self, StorageError> {
        match attached.claim() {
            Ok(claim) => Ok(Self::with(State::Claimed(Arc::new(claim)))),
            Err(Unclaimed {
                attached,
                error: StorageError::Landing { .. },
            }) => Ok(Self::later(attached)),
            Err(Unclaimed { error, .. }) => Err(error),
        }
    }

    /// What is attached, and whether it is claimed, for another process that takes it over. Both change only when a ring starts or stops.
    ///
    /// # Errors
    /// If the disk is just being claimed, was refused, or is to be given back.
    pub(super) fn lend(&self) -> Result<LentClaim, NotLent> {
        let state = lock(&self.state);
        if lock(&self.stops).due().is_some() {
            return Err(NotLent::Due);
        }
        let (attached, is_claimed) = match &*state {
            State::Claimed(claim) => (claim.attached(), true),
            State::Attached(attached) => (attached, false),
            State::Claiming { .. } => return Err(NotClaimed::Waiting.into()),
            State::Refused(_, reason) => return Err(NotClaimed::Refused(reason.clone()).into()),
            State::Left => return Err(NotClaimed::HandedOver.into()),
        };
        let parts = attached.lend()?;
        self.is_lent.store(true, Ordering::Relaxed);
        let past = ClaimPast {
            is_claimed,
            was_claimed: self.was_held.load(Ordering::Relaxed),
            is_used: self.is_used.load(Ordering::Relaxed),
            guest_ran: self.guest_ran.load(Ordering::Relaxed),
        };
        Ok(LentClaim { parts, past })
    }

    /// The locks are this process' alone again, or the other one's ([`Claims::leave`]).
    pub(super) fn lending_ends(&self) {
        let _state = lock(&self.state);
        self.is_lent.store(false, Ordering::Relaxed);
    }

    /// Leaves the locks to the process that has borrowed them. From then on nothing of the disk is this process'.
    pub(super) fn leave(&self) {
        let mut state = lock(&self.state);
        match &*state {
            State::Claimed(claim) => claim.attached().leave(),
            State::Attached(attached) | State::Refused(attached, _) => attached.leave(),
            State::Claiming { .. } | State::Left => {}
        }
        *state = State::Left;
        lock(&self.stops).last = Stop::Over;
    }

    /// Takes over what another process has left, claimed or not.
    pub(super) fn take_over(&self, attached: Attached, past: ClaimPast) {
        attached.take();
        self.was_held.store(past.was_claimed, Ordering::Relaxed);
        self.is_used.store(past.is_used, Ordering::Relaxed);
        self.guest_ran.store(past.guest_ran, Ordering::Relaxed);
        *lock(&self.state) = match past.is_claimed {
            true => State::Claimed(Arc::new(attached.claimed())),
            false => State::Attached(attached),
        };
    }

    fn with(state: State) -> Self {
        Self {
            was_held: AtomicBool::new(matches!(state, State::Claimed(_))),
            is_used: AtomicBool::new(false),
            guest_ran: AtomicBool::new(false),
            state: Mutex::new(state),
            kept: AtomicU32::new(0),
            is_overdue: AtomicBool::new(false),
            stops: Mutex::default(),
            is_leaving: AtomicBool::new(false),
            is_lent: AtomicBool::new(false),
            observer: OnceLock::new(),
        }
    }

    /// Has `observer` asked and told from now on.
    pub(super) fn observe(&self, observer: Box<dyn Observer>) {
        let _ = self.observer.set(observer);
    }

    /// The claim; none while it is not held.
    pub(super) fn current(&self) -> Option<Arc<Claim>> {
        match &*lock(&self.state) {
            State::Claimed(claim) => Some(Arc::clone(claim)),
            _ => None,
        }
    }

    /// Whether it is held.
    pub(super) fn is_held(&self) -> bool {
        matches!(&*lock(&self.state), State::Claimed(_))
    }

    /// Whether a thread is giving it back, or waits for the storage to do so.
    pub(super) fn is_leaving(&self) -> bool {
        let is_syncing = {
            let _state = lock(&self.state);
            lock(&self.stops).last == Stop::Syncing
        };
        is_syncing || self.is_leaving.load(Ordering::Acquire)
    }

    /// A ring is served with the claim.
    pub(super) fn set_used(&self) {
        // Also if it came for a change of the header.
        self.was_held.store(true, Ordering::Relaxed);
        self.is_used.store(true, Ordering::Relaxed);
        self.guest_ran.store(true, Ordering::Relaxed);
    }

    /// Another front-end has come: its guest has not run here.
    pub(super) fn front_end_came(&self) {
        self.guest_ran.store(false, Ordering::Relaxed);
    }

    /// Takes note that the guest has stopped: the claim is due, unless it is already. Nothing was written since then.
    pub(super) fn stopped(&self) {
        let _state = lock(&self.state);
        lock(&self.stops).add();
    }

    /// Takes note that the claim is not due any more: the guest runs.
    pub(super) fn runs(&self) {
        let _state = lock(&self.state);
        self.is_overdue.store(false, Ordering::Relaxed);
        lock(&self.stops).last = Stop::Over;
    }

    /// The stop by which the claim is due.
    pub(super) fn due(&self) -> Option<Due> {
        let _state = lock(&self.state);
        lock(&self.stops).due()
    }

    /// Whether the caller is to have storage take what was written before the stop by which the claim is `due`; then it says what became
    /// of that ([`Claims::release`], [`Claims::retain`]). One caller is enough.
    pub(super) fn begin_sync(&self, due: Due) -> bool {
        let _state = lock(&self.state);
        let mut stops = lock(&self.stops);
        let begins = stops.last == Stop::Due && stops.due() == Some(due);
        if begins {
            stops.last = Stop::Syncing;
        }
        begins
    }

    /// Keeps the claim although it is `due`, unless the guest has run since then. The end of a change of the header does not give it back
    /// either. Whether it is kept.
    pub(super) fn retain(&self, due: Due) -> bool {
        let _state = lock(&self.state);
        let mut stops = lock(&self.stops);
        let is_last = stops.due() == Some(due);
        if is_last {
            self.is_overdue.store(false, Ordering::Relaxed);
            stops.last = Stop::Over;
        }
        is_last
    }

    /// How it is.
    pub(super) fn standing(&self) -> Standing {
        match &*lock(&self.state) {
            State::Claimed(_) => Standing::Held,
            State::Claiming { is_wanted: true, .. } => Standing::Waiting,
            State::Attached(_) | State::Claiming { .. } | State::Left => Standing::Released,
            State::Refused(_, reason) => Standing::Refused(reason.clone()),
        }
    }

    /// Has a thread claim the disk, whose data are in `file`, unless that was refused already; `done` comes after that.
    ///
    /// # Errors
    /// If threads are exhausted.
    pub(super) fn ask(
        self: &Arc<Self>,
        file: &Arc<DataFile>,
        done: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let mut state = lock(&self.state);
        match state.take() {
            State::Attached(attached) => {
                let (is_wanted, attached) = (true, Some(attached));
                *state = State::Claiming { is_wanted, attached };
            }
            State::Claiming { attached, .. } => {
                let is_wanted = true;
                *state = State::Claiming { is_wanted, attached };
                return Ok(());
            }
            other => {
                *state = other;
                return Ok(());
            }
        }
        drop(state);
        let (claims, file) = (Arc::clone(self), Arc::clone(file));
        let thread = thread::Builder::new().name("claim".into());
        let spawned = thread.spawn(move || {
            claims.claim(&file);
            done();
        });
        if spawned.is_err() {
            let mut state = lock(&self.state);
            match state.take() {
                State::Claiming {
                    attached: Some(attached),
                    ..
                } => *state = State::Attached(attached),
                other => *state = other,
            }
        }
        spawned.map(drop)
    }

    /// Claims what the state says is to be claimed.
    fn claim(&self, file: &DataFile) {
        let attached = match &mut *lock(&self.state) {
            State::Claiming { attached, .. } => attached.take(),
            _ => None,
        };
        let Some(attached) = attached else { return };
        let claimed = match attached.claim_in_turn(PATIENCE) {
            Ok(claim) => match self.check(file) {
                Ok(()) => Ok(claim),
                Err(reason) => Err((claim.release(), reason)),
            },
            Err(Unclaimed { attached, error }) => Err((attached, text(&error))),
        };
        self.is_used.store(false, Ordering::Relaxed);
        {
            let mut state = lock(&self.state);
            let is_wanted = matches!(*state, State::Claiming { is_wanted: true, .. });
            *state = match claimed {
                Ok(claim) if !is_wanted => {
                    self.is_leaving.store(true, Ordering::Release);
                    drop(state);
                    return self.give_back(claim);
                }
                Ok(claim) => {
                    if !self.was_held.swap(true, Ordering::Relaxed) {
                        tracing::info!("the disk is taken over: its guest runs here from now on");
                    }
                    State::Claimed(Arc::new(claim))
                }
                Err((attached, reason)) if is_wanted => {
                    tracing::error!(
                        "the disk is not served, and the guest's requests wait: {reason}. To try again, stop and continue the guest"
                    );
                    State::Refused(attached, reason)
                }
                Err((attached, _)) => State::Attached(attached),
            };
        }
        self.tell();
    }

    /// Keeps the claim for a change of the header; if it is not held, the disk is claimed for that, unless another process has attached
    /// it, or could have without a lock that tells.
    ///
    /// # Errors
    /// Why the header cannot be changed here now.
    pub(super) fn keep(self: &Arc<Self>, file: &DataFile) -> Result<Kept, NotClaimed> {
        let mut state = lock(&self.state);
        let attached = match state.take() {
            State::Attached(attached) => attached,
            other => {
                let not_claimed = match &other {
                    State::Claimed(_) => None,
                    State::Refused(_, reason) => Some(NotClaimed::Refused(reason.clone())),
                    State::Left => Some(NotClaimed::HandedOver),
                    _ => Some(NotClaimed::Waiting),
                };
                *state = other;
                return not_claimed.map_or_else(|| Ok(self.kept()), Err);
            }
        };
        drop(state);
        let tells_other_hosts = self.tells_other_hosts();
        let claimed = match attached.is_attached_by_others() {
            true => Err((attached, NotClaimed::Elsewhere)),
            // A guest that is on its way to another host would be refused there.
            false if tells_other_hosts => Err((attached, NotClaimed::NoGuest)),
            false => match attached.claim() {
                Ok(claim) => match self.check(file) {
                    Ok(()) => Ok(claim),
                    Err(reason) => Err((claim.release(), NotClaimed::Refused(reason))),
                },
                Err(Unclaimed { attached, error }) => Err((attached, NotClaimed::Refused(text(&error)))),
            },
        };
        let mut state = lock(&self.state);
        let kept = match claimed {
            Ok(claim) => {
                self.is_used.store(false, Ordering::Relaxed);
                *state = State::Claimed(Arc::new(claim));
                self.is_overdue.store(true, Ordering::Relaxed);
                Ok(self.kept())
            }
            // A ring that has asked for it meanwhile asks again.
            Err((attached, not_claimed)) => {
                *state = State::Attached(attached);
                Err(not_claimed)
            }
        };
        drop(state);
        self.tell();
        kept
    }

    /// The state is locked.
    fn kept(self: &Arc<Self>) -> Kept {
        self.kept.fetch_add(1, Ordering::Relaxed);
        Kept(Arc::clone(self))
    }

    /// Checks what was just claimed.
    fn check(&self, file: &DataFile) -> Result<(), String> {
        let first = !self.was_held.load(Ordering::Relaxed);
        let goes_on = self.guest_ran.load(Ordering::Relaxed);
        file.forget_cached().map_err(|error| text(&error))?;
        self.observer
            .get()
            .map_or(Ok(()), |observer| observer.check(first, goes_on))
    }

    fn tell(&self) {
        if let Some(observer) = self.observer.get() {
            observer.changed();
        }
    }

    /// Whether this process has had the claim.
    pub(super) fn was_held(&self) -> bool {
        self.was_held.load(Ordering::Relaxed)
    }

    /// Gives back the claim that is `due`, unless the guest has run since then. What was refused may be tried again. If storage does not
    /// answer within `limit`, a thread continues, and the claim is held until it is done.
    pub(super) fn release(self: &Arc<Self>, due: Due, limit: Duration) {
        // Locks do not tell whether other hosts have attached a disk whose header names this one. Where they do, a server may be asked, which
        // others that look at the claim do not wait for.
        let gives_way = self.tells_other_hosts()
            || self.kept.load(Ordering::Relaxed) > 0
                && self.current().is_some_and(|claim| claim.is_attached_by_others());
        let claim = {
            let mut state = lock(&self.state);
            let mut stops = lock(&self.stops);
            if stops.due() != Some(due) {
                return;
            }
            if self.is_lent.load(Ordering::Relaxed) {
                stops.last = Stop::Due;
                return;
            }
            stops.last = Stop::Over;
            let is_kept = self.kept.load(Ordering::Relaxed) > 0 && !gives_way;
            let (next, claim) = match state.take() {
                State::Claimed(claim) if is_kept => {
                    self.is_overdue.store(true, Ordering::Relaxed);
                    (State::Claimed(claim), None)
                }
                State::Claimed(claim) => match Arc::try_unwrap(claim) {
                    Ok(claim) => {
                        self.is_leaving.store(true, Ordering::Release);
                        (State::nothing(), Some(claim))
                    }
                    Err(claim) => {
                        // Somebody looks at it, who looks whether it is due afterwards.
                        stops.last = Stop::Due;
                        (State::Claimed(claim), None)
                    }
                },
                State::Refused(attached, _) | State::Attached(attached) => (State::Attached(attached), None),
                State::Claiming { attached, .. } => {
                    let is_wanted = false;
                    (State::Claiming { is_wanted, attached }, None)
                }
                State::Left => (State::Left, None),
            };
            *state = next;
            claim
        };
        match claim {
            Some(claim) if self.has_to_release() => self.give_back_within(claim, limit),
            Some(claim) => self.give_back(claim),
            None => self.tell(),
        }
    }

    /// Whether the observer has something to do before the claim can be given back.
    pub(super) fn has_to_release(&self) -> bool {
        let observer = self.observer.get();
        observer.is_some_and(|observer| observer.has_to_release())
    }

    /// Whether other hosts are kept out by more than locks.
    pub(super) fn tells_other_hosts(&self) -> bool {
        let observer = self.observer.get();
        observer.is_some_and(|observer| observer.tells_other_hosts())
    }

    fn give_back_within(self: &Arc<Self>, claim: Claim, limit: Duration) {
        let (done, wait) = sync_channel(1);
        // A thread that is not spawned gives nothing back.
        let claim = Arc::new(Mutex::new(Some(claim)));
        let (claims, given) = (Arc::clone(self), Arc::clone(&claim));
        let thread = thread::Builder::new().name("release".into());
        let spawned = thread.spawn(move || {
            if let Some(claim) = lock(&given).take() {
                claims.give_back(claim);
            }
            let _ = done.send(());
        });
        if spawned.is_err() {
            if let Some(claim) = lock(&claim).take() {
                self.give_back(claim);
            }
        } else if wait.recv_timeout(limit).is_err() {
            tracing::error!(
                "the storage does not answer, so the disk stays claimed until it does: no other process can take it over"
            );
        }
    }

    /// Gives the claim back. The state says that it is being claimed.
    fn give_back(&self, claim: Claim) {
        // A change of the header may be under way.
        claim.leave_changes_to_this_thread();
        if let Some(observer) = self.observer.get() {
            observer.release(self.is_used.load(Ordering::Relaxed));
        }
        // A ring that has asked for it meanwhile asks again when it is told.
        *lock(&self.state) = State::Attached(claim.release());
        self.is_leaving.store(false, Ordering::Release);
        self.tell();
    }
}

/// The claim is kept for a change of the header, until this is dropped.
#[derive(Debug)]
#[must_use = "the claim is given back"]
pub struct Kept(Arc<Claims>);

impl Drop for Kept {
    fn drop(&mut self) {
        let overdue = {
            let _state = lock(&self.0.state);
            let is_last = self.0.kept.fetch_sub(1, Ordering::Relaxed) == 1;
            let is_overdue = is_last && self.0.is_overdue.swap(false, Ordering::Relaxed);
            let mut stops = lock(&self.0.stops);
            // One that is due already waits for storage.
            (is_overdue && stops.last == Stop::Over).then(|| {
                stops.add();
                Due(stops.count)
            })
        };
        if let Some(due) = overdue {
            self.0.release(due, DEFAULT_STOP_LIMIT);
        }
    }
}

/// Why a process cannot change the header of its disk.
#[derive(Debug, thiserror::Error)]
pub enum NotClaimed {
    /// The other side of a migration.
    #[error(
        "no guest runs with the disk here, and another `sealblk serve` has attached it: make the change where the guest runs, or end one of \
         the two"
    )]
    Elsewhere,
    /// On storage whose locks do not reach other hosts.
    #[error(
        "no guest runs with the disk here any more, and locks do not tell whether it continues at another host: make the change where the guest \
         runs, or end `sealblk serve` first"
    )]
    NoGuest,
    /// See [`Standing::Waiting`].
    #[error(
        "the disk is being taken over from another process, waits for writes of one that was killed, or is being given back: try again later"
    )]
    Waiting,
    /// `sealblk upgrade` was quicker.
    #[error("another process of sealblk serves the disk by now; try again")]
    HandedOver,
    /// Another process has it in use, or it is not the disk that the guest knows.
    #[error("the disk cannot be claimed: {0}")]
    Refused(String),
}

/// Why a claim cannot go to another process.
#[derive(Debug, thiserror::Error)]
pub enum NotLent {
    /// There is none, and the guest waits for it.
    #[error(transparent)]
    NotClaimed(#[from] NotClaimed),
    /// The guest has stopped, and what it has written is not on stable storage yet.
    #[error(
        "the guest has stopped, and this process gives the disk back as soon as the storage has answered: see whether the storage is slow or \
         hangs (`sealblk status`), and try again then, or when the guest runs"
    )]
    Due,
    /// What a guest has written can still land.
    #[error(
        "requests of a guest that has left do not end: see whether the storage is slow or hangs (`sealblk status`), and try again when they have \
         ended"
    )]
    InFlight,
    /// Descriptors are exhausted.
    #[error("the locks of the disk cannot be passed on")]
    Io(#[from] io::Error),
}

impl State {
    /// Takes it, to put another one in its place at once.
    fn take(&mut self) -> Self {
        std::mem::replace(self, Self::nothing())
    }

    /// What another thread has, and puts back.
    fn nothing() -> Self {
        let (is_wanted, attached) = (false, None);
        State::Claiming { is_wanted, attached }
    }
}

/// An error with its causes, on one line.
fn text(error: &dyn Error) -> String {
    causes(error).fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

impl std::fmt::Debug for Claims {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Claims")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::SyncSender;

    use rustix::fs::{FlockOperation, flock};

    use super::*;
    use crate::luks2::{HeaderIo, LockMode};
    use crate::storage::{Access, Backing, Others};

    /// Storage has what was written.
    fn release(claims: &Arc<Claims>) {
        let due = claims.due().unwrap();
        assert!(claims.begin_sync(due));
        claims.release(due, DEFAULT_STOP_LIMIT);
    }

    /// The process that had left a disk went on as if it had its claim, and gave back the locks that were another one's by then.
    #[test]
    fn a_claim_that_another_process_has_is_neither_used_nor_given_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let claims = Arc::new(Claims::now(backing.attach(Others::Refused).unwrap()).unwrap());
        let of_the_other = claims.lend().unwrap();
        assert!(claims.current().is_some() && backing.is_claimed());
        claims.leave();
        let data = DataFile::null().unwrap();
        assert!(claims.current().is_none() && !backing.is_claimed());
        assert_eq!(claims.standing(), Standing::Released);
        assert!(matches!(claims.keep(&data), Err(NotClaimed::HandedOver)));
        assert!(matches!(
            claims.lend(),
            Err(NotLent::NotClaimed(NotClaimed::HandedOver))
        ));
        claims
            .ask(&Arc::new(data), || panic!("nothing is to be claimed"))
            .unwrap();
        assert!(claims.due().is_none());
        drop(claims);
        let third = || Backing::open(file.path(), Access::ReadWrite).unwrap().claim();
        assert!(matches!(third(), Err(StorageError::InUse { .. })));
        drop(of_the_other);
        third().unwrap();
    }

    /// What is to be given back when storage has answered would be the next process', which knows nothing of that. What is given back
    /// meanwhile would not be the next process' although it says so: both unlock one description.
    #[test]
    fn a_claim_is_either_lent_or_given_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let claims = Arc::new(Claims::now(backing.attach(Others::Refused).unwrap()).unwrap());
        claims.stopped();
        assert!(matches!(claims.lend(), Err(NotLent::Due)));
        claims.runs();
        let lent = claims.lend().unwrap();
        claims.stopped();
        release(&claims);
        assert!(claims.current().is_some() && backing.is_claimed());
        claims.lending_ends();
        release(&claims);
        assert!(claims.current().is_none() && !backing.is_claimed());
        drop(lent);
    }

    /// What storage had answered for one stop gave the claim of the next one back, while what the guest had written since could be lost.
    #[test]
    fn an_answer_for_a_stop_says_nothing_for_a_later_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let claims = Arc::new(Claims::now(backing.attach(Others::Refused).unwrap()).unwrap());
        claims.stopped();
        let first = claims.due().unwrap();
        assert!(claims.begin_sync(first));
        // The front-end has left, too: one thread is enough.
        claims.stopped();
        assert_eq!((claims.due(), claims.begin_sync(first)), (Some(first), false));
        claims.runs();
        claims.stopped();
        claims.release(first, DEFAULT_STOP_LIMIT);
        assert!(!claims.retain(first) && !claims.begin_sync(first) && backing.is_claimed());
        release(&claims);
        assert!(!backing.is_claimed());
    }

    /// On storage whose locks do not reach other hosts: what changes the header while it says that this host has the disk, and after that.
    #[derive(Debug, Default)]
    struct InHeader {
        is_held: Arc<AtomicBool>,
        let_go: Option<SyncSender<SyncSender<()>>>,
    }

    impl Observer for InHeader {
        fn check(&self, _: bool, _: bool) -> Result<(), String> {
            Ok(())
        }

        fn has_to_release(&self) -> bool {
            self.is_held.load(Ordering::Relaxed)
        }

        fn tells_other_hosts(&self) -> bool {
            true
        }

        fn release(&self, _: bool) {
            self.is_held.store(false, Ordering::Relaxed);
            if let Some(let_go) = &self.let_go {
                let (go_on, wait) = sync_channel(0);
                let_go.send(go_on).unwrap();
                wait.recv().unwrap();
            }
        }

        fn changed(&self) {}
    }

    /// The claim stayed for ever if another thread looked at it at that moment.
    #[test]
    fn a_claim_that_somebody_looks_at_is_given_back_afterwards() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let claims = Arc::new(Claims::now(backing.attach(Others::Refused).unwrap()).unwrap());
        let looked = claims.current();
        claims.stopped();
        release(&claims);
        assert!(claims.is_held());
        drop(looked);
        release(&claims);
        assert!(!backing.is_claimed());
        assert_eq!(claims.standing(), Standing::Released);
    }

    /// A rekey wrote the header of another host's disk: it had asked for the claim before it waited for the lock on the header.
    #[test]
    fn a_header_that_says_no_more_that_this_host_has_the_disk_is_not_changed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let claims = Arc::new(Claims::now(backing.attach(Others::Refused).unwrap()).unwrap());
        let (let_go, is_let_go) = sync_channel(0);
        claims.observe(Box::new(InHeader {
            is_held: Arc::new(true.into()),
            let_go: Some(let_go),
        }));
        let kept = claims.keep(&DataFile::null().unwrap()).unwrap();
        let change = || backing.lock(LockMode::Write);
        drop(change().unwrap());
        claims.stopped();
        // A rekey that waits for a key server does not keep it.
        thread::scope(|scope| {
            let release = scope.spawn(|| release(&claims));
            let go_on = is_let_go.recv().unwrap();
            assert!(backing.is_claimed());
            assert!(change().is_err());
            go_on.send(()).unwrap();
            release.join().unwrap();
        });
        assert!(!backing.is_claimed());
        assert_eq!(claims.standing(), Standing::Released);
        assert!(change().is_err());
        drop(kept);
        assert!(matches!(
            claims.keep(&DataFile::null().unwrap()),
            Err(NotClaimed::NoGuest)
        ));
    }

    /// The lock on the header was waited for meanwhile.
    #[test]
    fn a_change_that_waited_until_the_claim_was_given_back_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        let claim = backing.claim().unwrap();
        let other = file.reopen().unwrap();
        flock(&other, FlockOperation::LockExclusive).unwrap();
        thread::scope(|scope| {
            let change = scope.spawn(|| backing.lock(LockMode::Write).map(drop));
            thread::sleep(Duration::from_millis(100));
            let _attached = claim.release();
            flock(&other, FlockOperation::Unlock).unwrap();
            let refused = change.join().unwrap().unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        });
    }
}
