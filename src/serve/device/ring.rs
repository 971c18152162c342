//! A started virtqueue (virtio 1.2 §2.7), with all that a worker needs to serve it.
//!
//! A ring comes to its worker by value when the front-end starts it, and goes back by value when it is stopped, with nothing
//! in flight. To change what I/O stands on takes the ring, and so takes a drained ring.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::io::{Errno, ReadWriteFlags};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::call::Call;
use super::guest::Memory;

/// A started virtqueue.
#[derive(Debug)]
pub(super) struct Ring {
    pub index: usize,
    pub queue: Queue,
    pub memory: Memory,
    pub kick: OwnedFd,
    pub call: Option<Call>,
}

impl Ring {
    /// Whether the driver has offered a chain that was not taken yet.
    pub(super) fn has_chain(&self) -> bool {
        let offered = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        offered.is_ok_and(|offered| offered.0 != self.queue.next_avail())
    }

    /// Whether the driver seems to have offered no chain yet.
    pub(super) fn is_unused(&self) -> bool {
        self.queue.next_avail() == 0 && !self.has_chain()
    }

    /// Whether the driver wants to be notified of what was put into the used ring.
    pub(super) fn needs_notification(&mut self) -> Result<bool, QueueError> {
        let wanted = self.queue.needs_notification(&*self.memory)?;
        if !wanted || self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        // virtio-queue leaves out the flag by which a driver that has no event index says that it does not.
        let flags: u16 = self
            .memory
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

/// The heads of chains that were taken and not given back: a bit for each.
#[derive(Debug)]
pub(super) struct HeadsInHand(Vec<u64>);

impl HeadsInHand {
    /// None, of a queue of `size` descriptors.
    pub(super) fn none(size: u16) -> Self {
        Self(vec![0; usize::from(size).div_ceil(BITS)])
    }

    /// Takes `head`, unless it is in hand already, or no head of this queue.
    pub(super) fn take(&mut self, head: u16, size: u16) -> bool {
        let Some(word) = self.0.get_mut(usize::from(head) / BITS).filter(|_| head < size) else {
            return false;
        };
        let is_new = *word & bit(head) == 0;
        *word |= bit(head);
        is_new
    }

    /// Takes note that `head` was given back.
    pub(super) fn give_back(&mut self, head: u16) {
        if let Some(word) = self.0.get_mut(usize::from(head) / BITS) {
            *word &= !bit(head);
        }
    }
}

const BITS: usize = 64;

fn bit(head: u16) -> u64 {
    1 << (head % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_taken_once_until_it_is_given_back_and_none_beyond_the_queue() {
        let mut heads = HeadsInHand::none(100);
        for head in [0, 63, 64, 99] {
            assert!(heads.take(head, 100), "{head}");
            assert!(!heads.take(head, 100), "{head} twice");
            heads.give_back(head);
            assert!(heads.take(head, 100), "{head} again");
        }
        for head in [100, 127, 128, u16::MAX] {
            assert!(!heads.take(head, 100), "{head}");
            heads.give_back(head);
        }
    }
}
