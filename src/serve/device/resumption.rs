//! Chains that an earlier process had taken and not given back, to be taken again in the order in which that process took them.
//!
//! virtio-queue takes chains from an available ring only, and by now the driver may have written over their heads in its own. So
//! they are put into an available ring of this process, in a page that lies beside the guest's memory.

use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryError, GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use super::guest::{Memory, Readable};
use super::limits::MAX_QUEUE_SIZE;

/// See the module's header.
#[derive(Debug)]
pub(super) struct Resumption {
    /// The driver's queue, with our available ring.
    queue: Queue,
    /// The guest's memory and our page.
    memory: Memory,
    left: usize,
}

/// The length of our page: an available ring has flags, an index, and a head of 16 bits for each descriptor (virtio 1.2 §2.7.6).
const PAGE: u16 = 4096;
const _: () = assert!(MAX_QUEUE_SIZE <= (PAGE - 6) / 2);

impl Resumption {
    /// Puts `heads` into a ring of their own. They are heads of `queue`, which lies in `memory`.
    ///
    /// # Errors
    /// If memory is exhausted.
    pub(super) fn new(queue: &Queue, memory: &Memory, heads: &[u16]) -> Result<Self, ResumeError> {
        let last = memory.last_addr();
        let at = last
            .checked_add(u64::from(PAGE))
            .map(|after| GuestAddress(after.0 & !(u64::from(PAGE) - 1)))
            .ok_or(ResumeError::NoRoom)?;
        let page = MmapRegion::new(PAGE.into())?;
        let page = GuestRegionMmap::new(page, at).ok_or(ResumeError::NoRoom)?;
        let memory = memory.beside(page)?;
        for (place, head) in (0_u64..).zip(heads) {
            memory.write_obj(head.to_le(), at.unchecked_add(4 + 2 * place))?;
        }
        let index = u16::try_from(heads.len()).map_err(|_| ResumeError::NoRoom)?;
        memory.write_obj(index.to_le(), at.unchecked_add(2))?;

        let mut state = queue.state();
        state.avail_ring = at.0;
        state.next_avail = 0;
        Ok(Self {
            queue: Queue::try_from(state)?,
            memory,
            left: heads.len(),
        })
    }

    /// Whether all were taken.
    pub(super) fn is_done(&self) -> bool {
        self.left == 0
    }

    /// Takes the next one.
    pub(super) fn take(&mut self) -> Result<Option<DescriptorChain<&Readable>>, QueueError> {
        self.left = self.left.saturating_sub(1);
        Ok(self.queue.iter(self.memory.readable())?.next())
    }
}

/// Chains cannot be taken again.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResumeError {
    #[error("there is no room for their ring")]
    NoRoom,
    #[error("the memory of their ring cannot be mapped")]
    Map(#[from] MmapRegionError),
    #[error("the memory of their ring cannot be placed")]
    Place(#[from] GuestRegionCollectionError),
    #[error("their ring cannot be written")]
    Write(#[from] GuestMemoryError),
    #[error("their ring is not valid: {0}")]
    Queue(QueueError),
}

impl From<QueueError> for ResumeError {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}
