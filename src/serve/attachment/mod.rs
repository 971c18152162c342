//! A volume that is being served, and its key: how the key is fetched, wiped, fetched again, and changed under load.
//!
//! ```text
//! Locked  --unlock-->  served  --lock-->  Locked (by an operator, until `unlock`)
//!    |
//!    +-- the key is not available: sealblk tries again until it is
//! ```
//!
//! While the disk is locked, the guest's requests wait, and no part of the volume's key is in this process. The process keeps
//! what it needs to fetch the key again: the header, and the key helper ([`crate::key_helper`]).

mod header_claim;
mod interface;
mod twins;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use sealblk_base::blame::Blame;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::cipher::{CipherError, KernelChoice, Sector};
use crate::control::events::{Event, Events};
use crate::control::manager;
use crate::device::{self, Disk, Held, NotClaimed, Observer, Standing};
use crate::key_helper::{HelperError, HelperFailure, KeyHelper};
use crate::keys::RequestPurpose;
use crate::keys::binding::{self, BindingError, BindingReason, Bindings, Rekeyed};
use crate::keys::{KeyError, KeyReason};
use crate::luks2::{
    self, Changed, Found, HeaderIo, Host, Identity, Locked, Reason, Resize, Resized, Volume, VolumeError,
};
use crate::map::SegmentTable;
use crate::mutex::lock;
use crate::path_text;
use crate::storage::Backing;

use twins::Announcement;

pub use header_claim::{Choice, HeaderClaim, HeaderClaimPast};
pub use interface::{
    Before, ClaimState, ClaimStatus, FrontEnd, HeldBy, HeldStatus, INTERFACE, Interface, LockStatus,
    LockedBy, State, Status, describe,
};

/// How soon a key that was not to be had is tried again, and how much later at most: a server that is back is found
/// within this time, and one that is away is not worn down by hundreds of disks.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// How long the end of this process waits for the agent: the guest does not wait for it any more.
const DETACH_LIMIT: Duration = Duration::from_secs(2);

/// How long the host that has the disk attached can take to give it up once the guest runs here, and how often this one looks.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(50);

/// An update takes milliseconds. What stays half written so long needs repair.
const LOOKS_AT_HALF: u32 = 10;

/// What opens a volume, as often as it has to be opened.
#[derive(Debug)]
pub struct Opener {
    /// The disk, and the header where that is detached.
    pub disk: Backing,
    /// See [`Opener::disk`].
    pub header: Option<Backing>,
    /// The host of this process.
    pub host: Host,
    /// What unlocks it.
    pub by: By,
    /// What its key is asked for: to serve it to a guest.
    pub purpose: RequestPurpose,
    /// Where keys and passphrases come from.
    pub helper: KeyHelper,
    /// The kernel of its cipher.
    pub kernel: KernelChoice,
}

/// What unlocks a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Key providers.
    Providers,
    /// A passphrase, which is read each time.
    Passphrase {
        /// It can be read once, so that a lock would have no way back.
        once: bool,
    },
}

/// Why a volume is not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The volume, or its bindings.
    #[error(transparent)]
    Volume(#[from] BindingError),
    /// The volume key.
    #[error("{}: the volume key cannot be used", path.display())]
    Cipher {
        /// What holds the header.
        path: PathBuf,
        /// Why.
        source: CipherError,
    },
    /// What unlocks it.
    #[error("the passphrase cannot be read")]
    Passphrase(#[source] HelperFailure),
    /// There is no way to a passphrase any more.
    #[error(transparent)]
    NoHelper(KeyError),
    /// The guest would notice.
    #[error(transparent)]
    Changed(#[from] Changed),
    /// Somebody has locked it since it was asked for.
    #[error("the disk was locked while its key was fetched")]
    LockedMeanwhile,
}

impl OpenError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Volume(error) => error.reason.blame(),
            Self::Cipher { source, .. } => match source {
                CipherError::EqualHalves | CipherError::KeyLength(_) => Blame::Content,
                CipherError::Arena(_) | CipherError::Kernel { .. } | CipherError::SelfTest { .. } => {
                    Blame::Host
                }
            },
            Self::Passphrase(error) => error.blame,
            Self::NoHelper(error) => error.reason.blame(),
            Self::LockedMeanwhile => Blame::Process,
            Self::Changed(_) => Blame::Content,
        }
    }

    /// Why the key is not to be had, if that is what is wrong.
    pub fn key(&self) -> Option<&KeyError> {
        match self {
            Self::NoHelper(error) => Some(error),
            Self::Volume(error) => match &*error.reason {
                BindingReason::Provider { source, .. }
                | BindingReason::Wrap(source)
                | BindingReason::Kek(source) => Some(source),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether it may go by itself, so that it is worth trying again.
    pub fn may_pass(&self) -> bool {
        self.key().is_some_and(|error| {
            !matches!(
                error.reason,
                KeyReason::Unauthentic
                    | KeyReason::UnknownProvider
                    | KeyReason::NotPermitted
                    | KeyReason::NoHelper
            )
        })
    }
}

impl Opener {
    /// Reads the header.
    ///
    /// # Errors
    /// Where it is no volume that can be served.
    pub fn locked(&self) -> Result<Locked<'_>, VolumeError> {
        match &self.header {
            Some(header) => Locked::open_on(&self.host, header, Some(&self.disk)),
            None => Locked::open_on(&self.host, &self.disk, None),
        }
    }

    /// Whether one copy of the header has to be repaired, or is just being written.
    fn is_half_written(&self) -> bool {
        let header = self.header.as_ref().unwrap_or(&self.disk);
        matches!(luks2::read(header), Ok(Found::NeedsRecovery(_)))
    }

    /// Unlocks the volume.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn unlock(&self, locked: &Locked<'_>) -> Result<Volume, OpenError> {
        match self.by {
            By::Providers => Ok(binding::unlock(locked, &self.helper.providers(self.purpose))?),
            By::Passphrase { .. } => {
                let forms = self.helper.passphrase()?;
                let mut forms = forms
                    .iter()
                    .map(|form| locked.unlock_with_passphrase(form).map_err(OpenError::from));
                let Some(first) = forms.next() else {
                    return Err(OpenError::Passphrase(HelperFailure::no_passphrase()));
                };
                // Where none opens it, the form that is likely meant tells why.
                first.or_else(|error| forms.find_map(Result::ok).ok_or(error))
            }
        }
    }

    /// The map of the disk, for the data path.
    fn table(&self, volume: &Volume) -> Result<Arc<SegmentTable>, OpenError> {
        let table = SegmentTable::of(volume, self.kernel).map_err(|source| OpenError::Cipher {
            path: self.header.as_ref().unwrap_or(&self.disk).path().to_owned(),
            source,
        })?;
        Ok(Arc::new(table))
    }

    /// Why a disk that is locked now could not be unlocked again.
    fn no_way_back(&self) -> Option<AttachmentError> {
        if self.by == (By::Passphrase { once: true }) {
            return Some(AttachmentError::NoWayBack);
        }
        self.helper.ended().map(AttachmentError::NoHelper)
    }
}

impl From<VolumeError> for OpenError {
    fn from(error: VolumeError) -> Self {
        Self::Volume(error.into())
    }
}

impl From<HelperError> for OpenError {
    fn from(error: HelperError) -> Self {
        match error {
            HelperError::Failed(error) => Self::Passphrase(error),
            HelperError::Ended(error) => Self::NoHelper(error),
        }
    }
}

/// A volume that is being served.
#[derive(Debug)]
pub struct Attachment {
    disk: Arc<Disk>,
    /// The disk's path, as callers are told of it, who may be in another directory.
    path: String,
    uuid: Uuid,
    /// What the guest knows the volume by. Its length changes.
    identity: Mutex<Identity>,
    opener: Opener,
    header_claim: HeaderClaim,
    _announcement: Option<Announcement>,
    /// Held while the key comes, goes or is changed: one of these at a time.
    turn: Mutex<()>,
    /// How often the header, or the length of the disk, was changed. See [`Attachment::changes`].
    changes: AtomicU64,
    order: Mutex<Order>,
    /// Signalled when `order` was changed.
    changed: Condvar,
    events: Events,
    /// Held while the service manager is told, so that it hears of the last state last.
    told: Mutex<()>,
    /// Whether front-ends are, or were, served by this process.
    is_begun: AtomicBool,
}

/// What was asked for, in the order in which it was: of a lock and an unlock, the later is in force.
#[derive(Debug, Default)]
struct Order {
    /// Why the disk is locked; none while it is not.
    lock: Option<Lock>,
    /// How often it was locked by somebody. A key that was asked for before the last time does not come into force.
    locks: u64,
    /// How many of these locks are under way: what is in flight is being finished.
    locking: u32,
    /// Whether a thread that has the turn asks for the key, which can take long, and does nothing else.
    is_fetching: bool,
    /// Whether another process is about to take the disk over: nothing is changed meanwhile.
    is_held: bool,
    /// Whether it has.
    is_left: bool,
}

impl Order {
    fn lacks_key(&self) -> bool {
        matches!(self.lock, Some(Lock::NoKey(_)))
    }
}

/// Why a disk is locked.
#[derive(Debug)]
pub enum Lock {
    /// Its key was asked for, for the first time, and there is no answer yet.
    Asked,
    /// Somebody wants it so.
    Operator,
    /// Its key is not to be had.
    NoKey(OpenError),
}

/// What cannot be done to a disk.
#[derive(Debug, thiserror::Error)]
pub enum AttachmentError {
    /// Its key.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It would have to be unlocked.
    #[error("the disk is locked; unlock it first")]
    IsLocked,
    /// Nobody to ask for a KEK.
    #[error("the disk was opened with a passphrase, without a key provider; rekey it while it is not served")]
    NoProviders,
    /// It could not tell the guest.
    #[error(
        "no guest runs with the disk, or another process has it, so its size cannot be changed here now; continue the guest, or resize the \
         disk where it runs; if none is to run, end `sealblk serve` and resize the disk at rest"
    )]
    NoGuest,
    /// Its header is not this process's to change.
    #[error(transparent)]
    NotClaimed(#[from] NotClaimed),
    /// It could not be unlocked again.
    #[error(
        "the passphrase came from standard input, another inherited descriptor or a pipe without a name; sealblk can read it only \
         once, so it could not unlock the disk again; to remove the key, end `sealblk serve` (SIGTERM): its guest waits until you start it again"
    )]
    NoWayBack,
    /// The same, for another reason.
    #[error("sealblk could not unlock the disk again")]
    NoHelper(#[source] KeyError),
    /// `sealblk upgrade` was quicker.
    #[error("another process of sealblk serves the disk by now; try again")]
    HandedOver,
}

/// Whether a disk has its key, as the process that takes it over has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    /// It has.
    Open,
    /// An operator has locked it.
    LockedByOperator,
    /// It waits for it.
    NoKey,
}

/// A disk whose key neither comes nor goes, until this is dropped.
#[derive(Debug)]
pub struct KeyHold<'a> {
    attachment: &'a Attachment,
    _turn: Option<MutexGuard<'a, ()>>,
    /// Whether it has its key.
    pub state: KeyState,
}

impl KeyHold<'_> {
    /// Another process serves the disk from now on.
    pub fn leave(self) {
        lock(&self.attachment.order).is_left = true;
    }
}

impl Drop for KeyHold<'_> {
    fn drop(&mut self) {
        lock(&self.attachment.order).is_held = false;
        self.attachment.changed.notify_all();
    }
}

/// The first try to get the key of a volume that is being served.
#[derive(Debug)]
pub struct FirstTry {
    ended: OwnedFd,
    outcome: Receiver<Result<(), OpenError>>,
}

impl FirstTry {
    /// Waits for its end: the disk is served, or stays locked until its key is there.
    ///
    /// # Errors
    /// Where waiting does not help, or nobody wants to wait.
    pub fn outcome(self) -> Result<(), OpenError> {
        // A thread that is gone has told the log why; the disk is locked.
        self.outcome.recv().unwrap_or(Ok(()))
    }
}

/// Readable when it has ended.
impl AsFd for FirstTry {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }
}

impl Attachment {
    /// `disk`, which is locked, as that of the volume that `opener` opens. Nothing is asked for its key yet.
    pub fn new(opener: Opener, disk: Arc<Disk>, identity: Identity, header_claim: HeaderClaim) -> Arc<Self> {
        let order = Order {
            lock: Some(Lock::Asked),
            ..Order::default()
        };
        let header = opener.header.as_ref().unwrap_or(&opener.disk);
        let _announcement = twins::announce(identity.uuid(), header)
            .inspect_err(|error| tracing::warn!(%error, "cannot detect whether copies of this volume are served at the same time"))
            .ok();
        let path = opener.disk.path();
        let path = path_text::to_text(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
        let attachment = Arc::new(Self {
            disk,
            path,
            uuid: identity.uuid(),
            identity: Mutex::new(identity),
            opener,
            header_claim,
            _announcement,
            turn: Mutex::new(()),
            changes: AtomicU64::new(0),
            order: Mutex::new(order),
            changed: Condvar::new(),
            events: Events::default(),
            told: Mutex::new(()),
            is_begun: AtomicBool::new(false),
        });
        let observer = Arc::downgrade(&attachment);
        attachment.disk.observe_claim(Box::new(observer.clone()));
        attachment.disk.observe_held(move |held| {
            if let Some(served) = observer.upgrade() {
                served.tell_held(held);
            }
        });
        attachment
    }

    /// Has a thread get the key. If it is not to be had, and `wait` says so, it tries again until the key is there, or somebody
    /// locks the disk; so it does if nobody is left to hear of the first try. Call it once threads do not get the signals that end
    /// the process.
    ///
    /// # Errors
    /// If threads or descriptors are exhausted.
    pub fn get_key(self: &Arc<Self>, wait: bool) -> io::Result<FirstTry> {
        self.opener.helper.watch()?;
        let ended = eventfd(0, EventfdFlags::CLOEXEC)?;
        let signal = ended.try_clone()?;
        let (tell, outcome) = sync_channel(0);
        let served = Arc::clone(self);
        thread::Builder::new().name("key".into()).spawn(move || {
            let first = served.try_first(wait);
            let _ = rustix::io::write(&signal, &1_u64.to_ne_bytes());
            if let Err(SendError(Err(error))) = tell.send(first) {
                served.tell_locked(error, 0);
            }
            served.try_again();
        })?;
        Ok(FirstTry { ended, outcome })
    }

    /// Has a thread wait for the end of the key helper, of a disk that is not to get its key now. As [`Attachment::get_key`].
    ///
    /// # Errors
    /// If threads are exhausted.
    pub fn watch_helper(&self) -> io::Result<()> {
        self.opener.helper.watch()
    }

    fn try_first(&self, wait: bool) -> Result<(), OpenError> {
        match self.fetch(&lock(&self.turn), 0) {
            Err(error) if wait && error.may_pass() => {
                self.tell_locked(error, 0);
                Ok(())
            }
            result => result,
        }
    }

    /// Enters in the header that this host has the disk attached, at the start of the process. If writes of one that was killed have to
    /// land first, it is only looked whether another host has it.
    ///
    /// # Errors
    /// If another host has it attached, or the header cannot be written.
    pub fn claim_header(&self) -> Result<(), OpenError> {
        let mut locked = self.read_header()?;
        let claimed = match self.disk.claimed() {
            Standing::Held => self.header_claim.take(&mut locked, false),
            _ => self.header_claim.check(&locked),
        };
        claimed.map_err(|reason| OpenError::from(reason.at(locked.path())))
    }

    /// The claim in the header.
    pub fn header_claim(&self) -> &HeaderClaim {
        &self.header_claim
    }

    /// Tells other hosts, and the agent, that this process is about to end. The agent takes one that ends without that for killed, and keeps
    /// its KEK for a while.
    pub fn detach(&self) {
        self.disk.detach();
        // The destination of a migration that came to nothing has not.
        let has_served = self.is_begun.load(Ordering::Relaxed) && self.disk.was_claimed();
        self.opener.helper.detach(has_served, DETACH_LIMIT);
    }

    /// Takes note that front-ends are served from now on.
    pub fn begin(&self) {
        self.is_begun.store(true, Ordering::Relaxed);
    }

    /// How the disk is, in a line.
    pub fn standing(&self) -> String {
        match self.disk.claimed() {
            Standing::Held => {}
            Standing::Released => return "no guest runs with the disk here".to_owned(),
            Standing::Waiting => {
                return "waiting for another process to leave the disk, or for the last writes of one that was killed".to_owned();
            }
            Standing::Refused(reason) => return format!("not served: {reason}"),
        }
        match self.state() {
            (State::Open, _) => match self.disk.held() {
                Some(held) => format!(
                    "the guest's requests wait, since the storage fails: {}",
                    held.error
                ),
                None => "serving".to_owned(),
            },
            (_, Some(status)) if status.by == LockedBy::NoKey => {
                format!(
                    "locked until its key is available: {}",
                    status.message.unwrap_or_default()
                )
            }
            _ => "locked by an operator, until `sealblk unlock`".to_owned(),
        }
    }

    fn tell_manager(&self) {
        let _told = lock(&self.told);
        manager::status(&self.standing());
    }

    /// Takes the key away. When this returns, nothing of it is in this process.
    ///
    /// # Errors
    /// [`AttachmentError::NoWayBack`] and [`AttachmentError::NoHelper`]; the disk stays open.
    pub fn lock(&self) -> Result<(), AttachmentError> {
        if let Some(error) = self.opener.no_way_back() {
            return Err(error);
        }
        // It is in force at once, also while a rekey or an unlock waits for a server.
        let withdrawal = {
            let mut order = self.order_unheld()?;
            order.lock = Some(Lock::Operator);
            order.locks += 1;
            order.locking += 1;
            self.disk.withdraw()
        };
        self.changed.notify_all();
        withdrawal.wait();
        // Somebody who rekeys or unlocks just now has the key in hand, and is waited for.
        drop(lock(&self.turn));
        self.tell(Event::DiskLocked, json!({ "by": LockedBy::Operator }));
        lock(&self.order).locking -= 1;
        self.changed.notify_all();
        self.tell_manager();
        Ok(())
    }

    /// Fetches the key, and has the disk served again, once the locks that were asked for before are done.
    ///
    /// # Errors
    /// [`AttachmentError`]; the disk is as locked as it was.
    pub fn unlock(&self) -> Result<(), AttachmentError> {
        let order = self
            .changed
            .wait_while(self.order_unheld()?, |order| order.locking > 0);
        let locks = order.unwrap_or_else(PoisonError::into_inner).locks;
        Ok(self.open(&self.turn()?, locks)?)
    }

    /// Waits for the turn, and until no other process is about to take the disk over. None begins meanwhile to do that.
    fn turn(&self) -> Result<MutexGuard<'_, ()>, AttachmentError> {
        let turn = lock(&self.turn);
        drop(self.order_unheld()?);
        Ok(turn)
    }

    /// The order, once no other process is about to take the disk over.
    fn order_unheld(&self) -> Result<MutexGuard<'_, Order>, AttachmentError> {
        let order = self.changed.wait_while(lock(&self.order), |order| order.is_held);
        let order = order.unwrap_or_else(PoisonError::into_inner);
        match order.is_left {
            true => Err(AttachmentError::HandedOver),
            false => Ok(order),
        }
    }

    /// Has the key neither come nor go, for another process to take the disk over; none while it is just coming, going or being changed.
    pub fn hold(&self) -> Option<KeyHold<'_>> {
        let turn = self.turn.try_lock().ok();
        let mut order = lock(&self.order);
        let state = match (self.disk.is_locked(), &order.lock) {
            _ if order.locking > 0 || order.is_left => return None,
            (false, _) => KeyState::Open,
            (true, Some(Lock::Operator)) => KeyState::LockedByOperator,
            (true, _) => KeyState::NoKey,
        };
        // Who asks for the key may have the turn for long. If the key comes meanwhile, no ring starts by it.
        if turn.is_none() && !(order.is_fetching && state == KeyState::NoKey) {
            return None;
        }
        order.is_held = true;
        drop(order);
        Some(KeyHold {
            attachment: self,
            _turn: turn,
            state,
        })
    }

    /// How often the header or the disk's length was changed: another process may have read them before.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    fn count_change(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Locks the disk as an operator has locked it in the process before this one.
    pub fn stay_locked(&self) {
        let withdrawal = {
            let mut order = lock(&self.order);
            order.lock = Some(Lock::Operator);
            order.locks += 1;
            self.disk.withdraw()
        };
        self.changed.notify_all();
        withdrawal.wait();
    }

    /// Whether it has its key.
    pub fn is_open(&self) -> bool {
        !self.disk.is_locked()
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The disk's file or device, and that of its header where that is detached.
    pub fn backings(&self) -> (&Backing, Option<&Backing>) {
        (&self.opener.disk, self.opener.header.as_ref())
    }

    /// Whether what opens the volume can be read only once.
    pub fn reads_once(&self) -> bool {
        self.opener.by == By::Passphrase { once: true }
    }

    /// Whether it is locked, and why.
    fn state(&self) -> (State, Option<LockStatus>) {
        let order = lock(&self.order);
        let state = match self.disk.is_locked() {
            false => State::Open,
            true if order.locking > 0 => State::Locking,
            true => State::Locked,
        };
        (state, order.lock.as_ref().map(LockStatus::of))
    }

    /// Gives the volume a new KEK of `provider`, or of the one that it has, unless that is not older than it may be; the guest
    /// does not notice.
    ///
    /// # Errors
    /// [`AttachmentError`].
    pub fn rekey(
        &self,
        provider: Option<&str>,
        if_older_than: Option<Duration>,
    ) -> Result<Option<Rekeyed>, AttachmentError> {
        if self.opener.by != By::Providers {
            return Err(AttachmentError::NoProviders);
        }
        let _turn = self.turn()?;
        if self.disk.is_locked() {
            return Err(AttachmentError::IsLocked);
        }
        let _kept = self.disk.keep_claim()?;
        let mut locked = self.read_header_to_change()?;
        if if_older_than.is_some_and(|age| !Bindings::of(locked.header()).are_older_than(age)) {
            return Ok(None);
        }
        // Also if it fails in the middle.
        self.count_change();
        let volume = self.opener.unlock(&locked)?;
        let providers = self.opener.helper.providers(RequestPurpose::Recrypt);
        // The agent knows a volume by the KEK that it was opened with last.
        let opener = self.opener.helper.providers(self.opener.purpose);
        let rekeyed =
            binding::rekey(&mut locked, &volume, &providers, &opener, provider).map_err(OpenError::from)?;
        let bound =
            json!({ "provider": rekeyed.provider, "keyId": rekeyed.key_id, "keyslot": rekeyed.keyslot });
        self.tell(Event::DiskRekeyed, bound);
        Ok(Some(rekeyed))
    }

    /// Gives the disk another length: that of its file or device, or `capacity` in bytes. The guest is told. It never becomes shorter.
    ///
    /// # Errors
    /// [`AttachmentError`].
    pub fn resize(&self, capacity: Option<u64>) -> Result<Resized, AttachmentError> {
        let _turn = self.turn()?;
        if self.disk.claimed() != Standing::Held {
            return Err(AttachmentError::NoGuest);
        }
        let _kept = self.disk.keep_claim()?;
        let mut locked = self.read_header_to_change()?;
        let header = self.opener.header.as_ref();
        let payload: Option<&dyn HeaderIo> = header.map(|_| &self.opener.disk as _);
        let shrink = false;
        self.count_change();
        let resized = locked.resize(payload, Resize { capacity, shrink });
        let resized = resized.map_err(|reason| OpenError::from(reason.at(locked.path())))?;
        self.set_length(locked.identity().map_err(OpenError::from)?);
        if resized.from != resized.to {
            let told = json!({ "before": resized.from, "capacity": resized.to });
            self.tell(Event::DiskResized, told);
        }
        Ok(resized)
    }

    /// Has all requests tried again that wait for storage; how many transfers that are.
    pub fn resume(&self) -> usize {
        let held = self.disk.held().filter(|held| held.by != device::HeldBy::Hung);
        self.disk.resume().wait();
        held.map_or(0, |held| held.transfers)
    }

    /// Tells of requests that begin to wait for storage, or that none waits any more.
    fn tell_held(&self, held: Option<&Held>) {
        match held {
            Some(held) => self.tell(Event::RequestsHeld, json!(HeldStatus::from(held.clone()))),
            None => self.tell(Event::RequestsResumed, json!({})),
        }
        self.tell_manager();
    }

    /// Has the guest see the length that the volume has by now, unless it knows a greater one.
    fn set_length(&self, found: Identity) {
        let capacity = found.capacity();
        {
            let mut known = lock(&self.identity);
            if capacity <= known.capacity() {
                return;
            }
            *known = found;
        }
        self.count_change();
        self.disk.grow(capacity / Sector::LEN).wait();
    }

    /// As [`Attachment::open`]; meanwhile another process may take the disk over.
    fn fetch(&self, turn: &MutexGuard<'_, ()>, locks: u64) -> Result<(), OpenError> {
        lock(&self.order).is_fetching = true;
        let opened = self.open(turn, locks);
        lock(&self.order).is_fetching = false;
        opened
    }

    /// Opens the disk, unless it was locked since it had been locked `locks` times.
    fn open(&self, _turn: &MutexGuard<'_, ()>, locks: u64) -> Result<(), OpenError> {
        if !self.disk.is_locked() {
            return Ok(());
        }
        let locked = self.read_header()?;
        let volume = self.opener.unlock(&locked)?;
        let table = self.opener.table(&volume)?;
        {
            let mut order = lock(&self.order);
            if order.locks != locks {
                return Err(OpenError::LockedMeanwhile);
            }
            self.disk.unlock(table);
            order.lock = None;
        }
        self.changed.notify_all();
        self.tell_manager();
        self.tell(Event::DiskUnlocked, json!({ "keyslot": volume.keyslot() }));
        Ok(())
    }

    /// Reads the header anew, which has to be of the volume that the guest sees.
    fn read_header(&self) -> Result<Locked<'_>, OpenError> {
        let known = lock(&self.identity).clone();
        self.opener.locked()?.as_before(&known)
    }

    /// Reads it to change it. The claim is held.
    fn read_header_to_change(&self) -> Result<Locked<'_>, OpenError> {
        let locked = self.read_header()?;
        let held = self.header_claim.check_held(&locked);
        held.map_err(|reason| reason.at(locked.path()))?;
        Ok(locked)
    }

    /// Reads it after another process may have changed it. The volume may have become longer: then it is as long for the guest from now on.
    fn read_header_of_others(&self) -> Result<Locked<'_>, OpenError> {
        let locked = self.opener.locked()?;
        let found = locked.identity()?;
        let changed = lock(&self.identity).changed_to(&found);
        if let Some(changed) = changed {
            return Err(changed.into());
        }
        self.set_length(found);
        Ok(locked)
    }

    /// Takes the claim in the header, once the host that has it has given it up.
    fn take_over_header(&self, goes_on: bool) -> Result<(), OpenError> {
        let start = Instant::now();
        let mut looks = 0;
        loop {
            // The host that gives it up writes one copy after the other, and no lock tells. A repair would cross that.
            if looks < LOOKS_AT_HALF && self.opener.is_half_written() {
                looks += 1;
                thread::sleep(LOOK);
                continue;
            }
            let mut locked = self.read_header_of_others()?;
            match self.header_claim.take(&mut locked, goes_on) {
                Err(Reason::HeldElsewhere { .. }) if start.elapsed() < GIVEN_UP_WITHIN => {
                    thread::sleep(LOOK);
                }
                taken => return taken.map_err(|reason| reason.at(locked.path()).into()),
            }
        }
    }

    /// While the disk is locked for want of its key, tries again and again.
    fn try_again(&self) {
        let mut pause = FIRST_RETRY;
        while self.pause(pause) {
            let turn = lock(&self.turn);
            let Some(locks) = self.wants_key() else { return };
            match self.fetch(&turn, locks) {
                Ok(()) => return,
                Err(error) => self.tell_locked(error, locks),
            }
            pause = (2 * pause).min(LAST_RETRY);
        }
    }

    /// If the disk is locked for want of its key, how often it was locked before.
    fn wants_key(&self) -> Option<u64> {
        let order = lock(&self.order);
        (order.lacks_key() && !order.is_left).then_some(order.locks)
    }

    /// Waits; tells whether the disk is still locked for want of its key.
    fn pause(&self, pause: Duration) -> bool {
        let lacks_key = |order: &mut Order| order.lacks_key();
        let waited = self
            .changed
            .wait_timeout_while(lock(&self.order), pause, lacks_key);
        let (order, _) = waited.unwrap_or_else(PoisonError::into_inner);
        order.lacks_key()
    }

    /// Takes note of why the key is not to be had, unless somebody has locked the disk since it had been `locks` times.
    fn tell_locked(&self, error: OpenError, locks: u64) {
        let mut order = lock(&self.order);
        if order.locks != locks {
            return;
        }
        let told =
            matches!(&order.lock, Some(Lock::NoKey(before)) if before.to_string() == error.to_string());
        let no_key = Lock::NoKey(error);
        if !told {
            let status = serde_json::to_value(LockStatus::of(&no_key)).expect("texts are JSON");
            self.tell(Event::DiskLocked, status);
        }
        order.lock = Some(no_key);
        drop(order);
        self.tell_manager();
    }

    /// Tells of an event of this disk.
    pub fn tell(&self, event: Event, mut fields: Value) {
        fields["volume"] = self.uuid.to_string().into();
        self.events.tell(event, &fields);
    }
}

impl Observer for Weak<Attachment> {
    /// Another process may have changed the header while it had the claim.
    fn check(&self, first: bool, goes_on: bool) -> Result<(), String> {
        let Some(served) = self.upgrade() else {
            return Ok(());
        };
        let Err(error) = served.take_over_header(goes_on) else {
            return Ok(());
        };
        let reason = interface::describe(&error);
        match error {
            OpenError::Changed(Changed::Volume { .. } | Changed::Key | Changed::Place) => Err(reason),
            _ if first || served.header_claim.has_refused(&error) => Err(reason),
            _ => {
                tracing::warn!("the disk is served by the header as it was read before: {reason}");
                Ok(())
            }
        }
    }

    fn has_to_release(&self) -> bool {
        let served = self.upgrade();
        served.is_some_and(|served| served.header_claim.is_held())
    }

    fn tells_other_hosts(&self) -> bool {
        let served = self.upgrade();
        served.is_some_and(|served| served.header_claim.is_wanted())
    }

    fn release(&self, ran: bool) {
        let Some(served) = self.upgrade().filter(|served| served.header_claim.is_held()) else {
            return;
        };
        let Err(error) = served.header_claim.let_go(|| served.opener.locked(), ran) else {
            return;
        };
        let reason = interface::describe(&error);
        match *error.reason {
            Reason::TakenOver { .. } => tracing::error!("{reason}"),
            _ => tracing::error!(
                "the header may still say that this host has the disk attached, so that another host needs --take-over to attach it: {reason}"
            ),
        }
    }

    fn changed(&self) {
        if let Some(served) = self.upgrade() {
            served.disk.tell();
            served.tell_manager();
        }
    }
}
