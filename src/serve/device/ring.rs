//! A started virtqueue (virtio 1.2 §2.7), with all that a worker needs to serve it.
//!
//! A ring comes to its worker by value when the front-end starts it, and goes back by value when it is stopped, with no I/O
//! under way. To change what I/O stands on takes the ring, and so takes a drained ring. Requests that wait for storage are then left in
//! flight ([`super::held`]).

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::io::{Errno, ReadWriteFlags};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::call::Call;
use super::guest::{Memory, Readable};
use super::inflight::Inflight;
use super::resumption::Resumption;

/// A started virtqueue.
#[derive(Debug)]
pub(super) struct Ring {
    pub index: usize,
    pub queue: Queue,
    pub memory: Memory,
    /// The same memory, for writes to the used ring: the front-end says where they are marked in its dirty log, if at all.
    pub used_memory: Memory,
    pub inflight: Inflight,
    /// What an earlier process has left in flight, until all of it is taken.
    pub resumption: Option<Resumption>,
    pub kick: OwnedFd,
    pub call: Option<Call>,
}

impl Ring {
    /// Takes the chain that the driver has offered first, if there is one; before these, what an earlier process has left in flight. It
    /// is in flight from then on.
    ///
    /// # Errors
    /// If the available ring makes no sense.
    pub(super) fn take(&mut self) -> Result<Option<DescriptorChain<&Readable>>, TakeError> {
        if let Some(resumption) = &mut self.resumption
            && !resumption.is_done()
        {
            return Ok(resumption.take()?);
        }
        let mut chains = self.queue.iter(self.memory.readable())?;
        let Some(chain) = chains.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        if !self.inflight.take(head) {
            // How far the ring was read is the number of chains that were taken, and no more.
            chains.go_to_previous_position();
            return Err(TakeError::Head(head));
        }
        Ok(Some(chain))
    }

    /// Gives the chain of `head` back to the driver, with what was written of it.
    ///
    /// # Errors
    /// If the used ring is not in guest memory.
    pub(super) fn give_back(&mut self, head: u16, used_len: u32) -> Result<(), QueueError> {
        self.inflight.giving_back(head);
        self.queue.add_used(&self.used_memory, head, used_len)?;
        self.inflight.given_back(head, self.queue.next_used());
        Ok(())
    }

    /// Whether not all is taken again that an earlier process has left in flight.
    pub(super) fn is_resuming(&self) -> bool {
        self.resumption.as_ref().is_some_and(|left| !left.is_done())
    }

    /// Whether the driver has offered a chain that was not taken yet.
    pub(super) fn has_chain(&self) -> bool {
        let offered = self.queue.avail_idx(self.memory.readable(), Ordering::Acquire);
        offered.is_ok_and(|offered| offered.0 != self.queue.next_avail())
    }

    /// Whether the driver seems to have offered no chain yet.
    pub(super) fn is_unused(&self) -> bool {
        self.queue.next_avail() == 0 && !self.has_chain()
    }

    /// Asks the driver for kicks, and tells whether it has offered a chain before it saw that.
    ///
    /// # Errors
    /// If the used or the available ring is not in guest memory.
    pub(super) fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&self.used_memory)
    }

    /// Whether the driver wants to be notified of what was put into the used ring.
    pub(super) fn needs_notification(&mut self) -> Result<bool, QueueError> {
        let wanted = self.queue.needs_notification(self.memory.readable())?;
        if !wanted || self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        // virtio-queue leaves out the flag by which a driver that has no event index says that it does not.
        let flags: u16 = self
            .memory
            .readable()
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(QueueError::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Resets the kick, and gives how often it was signalled since the last time; 0 if the front-end has reset it.
    ///
    /// # Errors
    /// If it is not an eventfd.
    pub(super) fn take_kicks(&self) -> Result<u64, KickError> {
        let mut count = [0; 8];
        // The front-end can have the descriptor block at any time, so this says that it must not.
        let buffers = &mut [IoSliceMut::new(&mut count)];
        match rustix::io::preadv2(&self.kick, buffers, u64::MAX, ReadWriteFlags::NOWAIT) {
            Ok(8) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            result => Err(KickError(result)),
        }
    }
}

/// The kick cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("its kick cannot be read: {0:?}")]
pub(super) struct KickError(rustix::io::Result<usize>);

/// No chain can be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error("the driver offers the head {0}, which is in flight already, or no descriptor of this queue")]
    Head(u16),
    #[error("{0}")]
    Queue(QueueError),
}

impl From<QueueError> for TakeError {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}
