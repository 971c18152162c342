//! The vrings of a session, shared between vhost-user-backend's protocol handler and the workers.
//!
//! The handler makes its vrings itself and gives them only to the threads on which it would run the queues. Our workers are
//! not those threads: they wait for kicks and completions in one place, and stop by giving the ring back. So the vrings are
//! collected while the handler makes them. In all else a [`Vring`] is the crate's own.

#![allow(unsafe_code)] // vmm-sys-util's event types give their descriptors as bare numbers only.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, MutexGuard};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::GuestAddress;

use super::call::Call;
use super::dirty_log::{DirtyLog, Marks};
use super::guest::{GuestRange, HOW_TO_SHARE, Memory, SharedMemory};
use super::inflight::{InflightError, InflightMemory, Left};
use super::resumption::{ResumeError, Resumption};
use super::ring::Ring;
use super::uring;
use crate::storage::RingPool;

thread_local! {
    /// The vrings that were made on this thread since `collect` began.
    static MADE: RefCell<Vec<Vring>> = const { RefCell::new(Vec::new()) };
}

/// Runs `make`, and gives the vrings that it made on this thread, in order.
pub(super) fn collect<T>(make: impl FnOnce() -> T) -> (T, Vec<Vring>) {
    MADE.take();
    let made = make();
    (made, MADE.take())
}

/// What of the writes to guest memory the front-end has logged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logging<'l> {
    /// Its log.
    pub log: Option<&'l Arc<DirtyLog>>,
    /// Whether writes to the driver's buffers are logged (VHOST_F_LOG_ALL).
    pub all: bool,
    /// Where writes to the used ring are logged, if they are (VHOST_VRING_F_LOG).
    pub used: Option<u64>,
}

/// What a ring stands on, beside its vring.
#[derive(Clone, Copy)]
pub(super) struct StandsOn<'s> {
    pub memory: &'s SharedMemory,
    pub logging: Logging<'s>,
    pub inflight: &'s InflightMemory,
    pub calls: &'s RingPool,
}

impl Logging<'_> {
    /// The memory for writes to buffers, and that for writes to the used ring, which is `used`. None if they are to be logged, and the
    /// log does not cover them.
    fn apply(self, memory: Memory, used: GuestRange) -> Option<(Memory, Memory)> {
        if !self.all && self.used.is_none() {
            let used_memory = memory.clone();
            return Some((memory, used_memory));
        }
        let log = self.log?;
        if self.all && !memory.is_covered_by(log)
            || self.used.is_some_and(|at| !log.covers_range(at, used.len.into()))
        {
            return None;
        }
        let of_buffers = self.all.then(|| Marks::new(log, 0));
        let of_used = self
            .used
            .map(|at| Marks::new(log, at.wrapping_sub(used.address.0)));
        Some((memory.marked_by(of_buffers), memory.marked_by(of_used)))
    }
}

/// A vring as the protocol handler knows it.
#[derive(Clone)]
pub(super) struct Vring(VringMutex<SharedMemory>);

impl Vring {
    /// The ring, ready to be served, if the front-end has started and enabled it.
    ///
    /// # Errors
    /// If the driver's rings do not lie in guest memory, or descriptors are exhausted.
    pub(super) fn start(&self, index: usize, on: &StandsOn<'_>) -> Result<Option<Ring>, StartError> {
        match self.is_wanted() {
            true => self.ring(index, on),
            false => Ok(None),
        }
    }

    /// The ring, if the front-end has started it and something may be left in flight of it, which is to be answered. Nothing of it is served.
    ///
    /// # Errors
    /// Those of [`Vring::start`].
    pub(super) fn with_left(&self, index: usize, on: &StandsOn<'_>) -> Result<Option<Ring>, StartError> {
        match on.inflight.of_queue(index)?.may_have_left() {
            true => self.ring(index, on),
            false => Ok(None),
        }
    }

    fn ring(&self, index: usize, on: &StandsOn<'_>) -> Result<Option<Ring>, StartError> {
        let StandsOn {
            memory,
            logging,
            inflight,
            calls,
        } = *on;
        let state = self.0.get_ref();
        let Some(kick) = state.get_kick() else {
            return Ok(None);
        };
        let queue = state.get_queue();
        if !queue.ready() {
            return Ok(None);
        }
        let memory = Memory::now(memory);
        if queue.avail_ring() == 0 || !queue.is_valid(&memory) {
            return Err(StartError::NotInMemory);
        }
        let used = GuestRange {
            address: GuestAddress(queue.used_ring()),
            len: USED_RING + USED_ELEMENT * u32::from(queue.size()),
        };
        let (memory, used_memory) = logging.apply(memory, used).ok_or(StartError::NoLog)?;
        let mut queue = Queue::try_from(queue.state()).map_err(StartError::Queue)?;
        let mut inflight = inflight.of_queue(index)?;
        let resumption = match inflight.begin(queue.size(), queue.next_used())? {
            Some(left) => {
                // The process may have ended between a write and its mark.
                used_memory.mark(used);
                Some(resume(index, &mut queue, &memory, &left)?)
            }
            None => None,
        };
        let kick = borrow(kick).try_clone_to_owned()?;
        let call = state.get_call().as_ref();
        let call = call
            .map(|call| uring::patiently(|| Call::new(&borrow(call), calls)))
            .transpose()?;
        Ok(Some(Ring {
            index,
            queue,
            memory,
            used_memory,
            inflight,
            resumption,
            kick,
            call,
        }))
    }

    /// Whether the front-end has started it, and not stopped it since.
    pub(super) fn is_started(&self) -> bool {
        let state = self.0.get_ref();
        state.get_kick().is_some() && state.get_queue().ready()
    }

    /// Whether the front-end wants it served.
    pub(super) fn is_wanted(&self) -> bool {
        self.is_started() && self.0.get_ref().is_enabled()
    }

    /// Takes back how far the ring was served. No I/O of it is under way.
    pub(super) fn stopped(&self, ring: &Ring) {
        ring.inflight.end();
        self.0.set_queue_next_avail(ring.queue.next_avail());
        self.0.set_queue_next_used(ring.queue.next_used());
    }
}

/// Has `queue` continue where an earlier process has left it.
fn resume(index: usize, queue: &mut Queue, memory: &Memory, left: &Left) -> Result<Resumption, ResumeError> {
    tracing::info!(
        queue = index,
        requests = left.heads.len(),
        "the queue continues where it was left; the requests that were in flight are carried out again"
    );
    queue.set_next_avail(left.next_avail);
    Resumption::new(queue, memory, &left.heads)
}

/// The length of a used ring without its elements, and that of an element (virtio 1.2 §2.7.8).
const USED_RING: u32 = 6;
const USED_ELEMENT: u32 = 8;

/// Why a ring is not served.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(
        "its descriptor table, available ring or used ring does not lie in the guest's memory; {HOW_TO_SHARE}"
    )]
    NotInMemory,
    #[error(
        "the front-end logs what is written to guest memory, and has given no log of all of it (SET_LOG_BASE)"
    )]
    NoLog,
    #[error("its size or addresses are not valid: {0}")]
    Queue(Error),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error("what an earlier process has left in flight cannot be taken again")]
    Resume(#[from] ResumeError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The eventfd behind one of vmm-sys-util's types. It is the front-end's as well, which can change its flags at any time.
fn borrow(event: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `event`, which is borrowed as long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl<'a> VringStateGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl VringT<SharedMemory> for Vring {
    fn new(mem: SharedMemory, max_queue_size: u16) -> Result<Self, Error> {
        let vring = Self(VringMutex::new(mem, max_queue_size)?);
        MADE.with_borrow_mut(|made| made.push(vring.clone()));
        Ok(vring)
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<SharedMemory>> {
        self.0.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<SharedMemory>> {
        self.0.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.0.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.0.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        self.0.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.0.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.0.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.0.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(file);
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.0.read_kick()
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}
