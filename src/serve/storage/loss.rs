//! Data that the storage lost, for an attached inode.
//!
//! Linux writes cached data back at a time of its choice. If that fails, it marks the data clean, as if they had been written,
//! and reports the failure once to each open file description, at its next fsync. The fsync after that succeeds although the
//! data are lost, and a description that is opened after the first report never gets one. So the first reader of the failure
//! would hide the loss from all later ones: the sync of a header, another program, another queue.
//!
//! So each queue has its own description, and one more is opened with the claim and does no I/O: the witness. It gets a
//! report of every failure since then, independent of other descriptions.
//!
//! The guest gets a failure at a flush, or at a write that must be durable:
//! - With the page cache, each time until the disk is attached again. The cache returns data to reads that the storage does
//!   not have, so a guest that repairs by what it reads repairs nothing, and no later sync corrects that.
//! - Without the page cache, once. The writer got the failure at the write itself.

#![allow(unsafe_code)] // sync_file_range has no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::mutex::lock;

/// The losses of an inode. See the module's header.
#[derive(Debug)]
pub(super) struct Losses {
    /// None where nothing is written.
    witness: Mutex<Option<File>>,
    /// Whether there was one that the guest is to be told of.
    untold: AtomicBool,
    /// Whether there was one that the guest was never told of. With the page cache it is told again and again.
    unknown: AtomicBool,
}

impl Losses {
    /// Of an inode that is open once more as `witness`.
    pub(super) fn new(witness: Option<File>) -> Self {
        Self {
            witness: Mutex::new(witness),
            untold: AtomicBool::new(false),
            unknown: AtomicBool::new(false),
        }
    }

    /// A sync failed, or a write-back, which nobody has told the guest of.
    pub(super) fn record(&self) {
        self.unknown.store(true, Ordering::Release);
        self.untold.store(true, Ordering::Release);
    }

    /// Records one that the guest is being told of.
    pub(super) fn record_known(&self) {
        self.untold.store(true, Ordering::Release);
        self.unknown.store(false, Ordering::Release);
    }

    /// Records what the witness was told of since it was asked last.
    pub(super) fn look(&self) {
        let witness = lock(&self.witness);
        if witness.as_ref().is_some_and(write_back_failed) {
            // Before the next one asks the witness, which is told once only.
            self.record();
        }
    }

    /// Takes note that the guest is being told of what the witness was told of.
    pub(super) fn told(&self) {
        lock(&self.witness).as_ref().map(write_back_failed);
    }

    /// Whether there is one that the guest is to be told of.
    pub(super) fn is_untold(&self) -> bool {
        self.untold.load(Ordering::Acquire)
    }

    /// Whether there is one that the guest does not know of.
    pub(super) fn is_unknown(&self) -> bool {
        self.unknown.load(Ordering::Acquire)
    }

    /// Whether the guest is to be told of a loss, which it knows of from then on; where `once`, it is not told again.
    pub(super) fn any(&self, once: bool) -> bool {
        let any = self.untold.load(Ordering::Acquire) && (!once || self.untold.swap(false, Ordering::AcqRel));
        if any {
            self.unknown.store(false, Ordering::Release);
        }
        any
    }
}

/// Whether a write-back failed since `file` was asked last. Nothing is written, and nothing waited for.
fn write_back_failed(file: &File) -> bool {
    // No data are there; the error belongs to the file, not to a range.
    let nowhere = i64::MAX - 4096;
    // SAFETY: takes no pointers, and the descriptor is open for the duration of the call.
    let result =
        unsafe { libc::sync_file_range(file.as_raw_fd(), nowhere, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE) };
    result != 0
        && !matches!(
            io::Error::last_os_error().raw_os_error(),
            // Where the kernel cannot be asked.
            Some(libc::EINVAL | libc::ESPIPE | libc::ENOSYS | libc::EBADF | libc::EPERM)
        )
}
