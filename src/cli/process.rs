//! What the process is set to before any verb runs.
#![allow(unsafe_code)] // Signal dispositions have no safe interface.

use std::io;

/// Lets a write beyond the file size limit fail with `EFBIG`, which is reported, instead of killing the process
/// in the middle of an update.
pub(super) fn prepare() -> io::Result<()> {
    // SAFETY: ignoring a signal runs no code of ours.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
