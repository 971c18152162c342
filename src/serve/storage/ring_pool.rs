//! Rings of io_uring that are made before the process is confined.
//!
//! The kernel does not ask the filter of system calls about the operations of a ring. So a confined process makes no rings, and each ring
//! that it has accepts a few operations, as long as it exists (`IORING_REGISTER_RESTRICTIONS`). An engine or a call borrows a ring,
//! registers what it works on, and returns the ring when nothing is in flight.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use io_uring::register::Restriction;
use io_uring::{IoUring, squeue};

use crate::mutex::lock;

/// Rings of one kind.
#[derive(Clone)]
pub struct RingPool {
    make: fn() -> io::Result<IoUring>,
    free: Arc<Mutex<Vec<IoUring>>>,
}

impl RingPool {
    /// So many rings of those that `make` makes.
    ///
    /// # Errors
    /// Where the kernel has no io_uring or forbids it, or descriptors or memory are exhausted.
    pub fn new(count: u16, make: fn() -> io::Result<IoUring>) -> io::Result<Self> {
        let free = (0..count).map(|_| make()).collect::<io::Result<_>>()?;
        Ok(Self {
            make,
            free: Arc::new(Mutex::new(free)),
        })
    }

    /// Takes a ring. If all are in use, it makes a new one, which fails in a confined process.
    ///
    /// # Errors
    /// Those of [`RingPool::new`].
    pub fn take(&self) -> io::Result<IoUring> {
        let free = lock(&self.free).pop();
        free.map_or_else(self.make, Ok)
    }

    /// Gives back a ring that has nothing registered, in flight, or to be reaped.
    pub fn give(&self, ring: IoUring) {
        lock(&self.free).push(ring);
    }
}

impl fmt::Debug for RingPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RingPool({})", lock(&self.free).len())
    }
}

/// Enables a ring that was set up disabled, for these operations, and for these calls of io_uring_register(2).
///
/// # Errors
/// What the kernel answers.
pub fn restrict(ring: IoUring, operations: &[u8], registrations: &[u8]) -> io::Result<IoUring> {
    let operations = operations.iter().map(|&code| Restriction::sqe_op(code));
    let registrations = registrations.iter().map(|&code| Restriction::register_op(code));
    let flags = Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits());
    let mut restrictions: Vec<_> = operations.chain(registrations).chain([flags]).collect();
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
    Ok(ring)
}
