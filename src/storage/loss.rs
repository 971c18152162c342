//! What is known of data that storage did not keep, for an inode that is attached.
//!
//! Linux writes cached data back when it likes. Where that fails, it marks them clean, as if they had been written, and
//! tells of it once to each open description, at the next fsync there. So the fsync after that succeeds though the data
//! are gone, and a description that is opened after somebody was told is never told. Whoever is told first would hide the
//! loss from all who come later: the sync of a header, another program's, another queue's.
//!
//! So each queue has a description of its own, and one more is opened with the claim and does no I/O: the witness. It is
//! told of every failure since then, whoever else was told.
//!
//! A failure is the guest's to know, at a flush or at a write that has to be durable:
//! - Of data in the page cache for ever, that is until the disk is attached anew. What the cache gives to reads is not what
//!   storage has, so a guest that repairs by what it reads repairs nothing, and no later sync can make that good.
//! - Else once. The data passed by no cache of ours, and whoever wrote them was told of a failure at the write itself.

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
}

impl Losses {
    /// Of an inode that is open once more as `witness`.
    pub(super) fn new(witness: Option<File>) -> Self {
        Self {
            witness: Mutex::new(witness),
            untold: AtomicBool::new(false),
        }
    }

    /// A sync failed, or a write-back, which nobody has told the guest of.
    pub(super) fn record(&self) {
        self.untold.store(true, Ordering::Release);
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

    /// Whether the guest is to be told of a loss; where `once`, it counts as told from then on.
    pub(super) fn any(&self, once: bool) -> bool {
        self.untold.load(Ordering::Acquire) && (!once || self.untold.swap(false, Ordering::AcqRel))
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
