//! The call of a queue, which notifies the driver (vhost-user, VHOST_USER_SET_VRING_CALL).
//!
//! The call is an eventfd that the front-end has too. A write(2) to an eventfd waits while its counter is full, unless
//! O_NONBLOCK is set. That flag belongs to the open file description, so the front-end can clear it at any time, also between a
//! check of the flag and the write. The kernel's own signal never waits, and leaves a full counter full. io_uring signals an
//! eventfd that is registered with a ring whenever an operation of that ring ends. So each call has a ring of its own, whose
//! only operation does nothing.

#![allow(unsafe_code)] // Submission to io_uring.

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, opcode};

use crate::storage::{RingPool, restrict};

/// An eventfd that is signalled without a wait.
pub(super) struct Call {
    /// Until this is dropped.
    ring: ManuallyDrop<IoUring>,
    /// Where it goes then.
    rings: RingPool,
}

const REGISTER_EVENTFD: u8 = 4;
const UNREGISTER_EVENTFD: u8 = 5;

fn ring() -> io::Result<IoUring> {
    let ring = IoUring::builder().dontfork().setup_r_disabled().build(1)?;
    restrict(
        ring,
        &[opcode::Nop::CODE],
        &[REGISTER_EVENTFD, UNREGISTER_EVENTFD],
    )
}

impl Call {
    /// The rings of `count` calls.
    ///
    /// # Errors
    /// Those of [`RingPool::new`].
    pub(super) fn rings(count: u16) -> io::Result<RingPool> {
        RingPool::new(count, ring)
    }

    /// # Errors
    /// If `eventfd` is not an eventfd, or descriptors or memory are exhausted.
    pub(super) fn new(eventfd: &impl AsFd, rings: &RingPool) -> io::Result<Self> {
        let ring = rings.take()?;
        // The ring holds it from then on.
        if let Err(error) = ring.submitter().register_eventfd(eventfd.as_fd().as_raw_fd()) {
            rings.give(ring);
            return Err(error);
        }
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            rings: rings.clone(),
        })
    }

    /// Adds one to the counter, unless that is full.
    ///
    /// # Errors
    /// If the kernel has no memory for an operation. It can be tried again.
    pub(super) fn signal(&mut self) -> io::Result<()> {
        let nothing = opcode::Nop::new().build();
        let mut submission = self.ring.submission();
        if submission.is_empty() {
            // SAFETY: the operation refers to no memory.
            let pushed = unsafe { submission.push(&nothing) };
            pushed.expect("the queue was made to hold it, and is empty");
        }
        drop(submission);
        while let Err(error) = self.ring.submit() {
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        // It has ended.
        self.ring.completion().for_each(drop);
        Ok(())
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // SAFETY: it is taken once, here, and not used afterwards.
        let mut ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        // An operation that was not submitted would signal for the next call.
        let is_idle = ring.submission().is_empty();
        if is_idle && ring.submitter().unregister_eventfd().is_ok() {
            self.rings.give(ring);
        }
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Call").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn an_eventfd_counts_each_signal_and_a_full_one_stays_full() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut call = Call::new(&fd, &Call::rings(1).unwrap()).unwrap();
        let count = || {
            let mut count = [0; 8];
            rustix::io::read(&fd, &mut count).unwrap();
            u64::from_ne_bytes(count)
        };
        for _ in 0..100 {
            call.signal().unwrap();
        }
        assert_eq!(count(), 100);
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        call.signal().unwrap();
        call.signal().unwrap();
        assert_eq!(count(), u64::MAX);
    }

    #[test]
    fn what_is_no_eventfd_is_refused() {
        let (_reader, writer) = io::pipe().unwrap();
        assert_eq!(
            Call::new(&writer, &Call::rings(1).unwrap())
                .unwrap_err()
                .raw_os_error(),
            Some(libc::EINVAL)
        );
    }
}
