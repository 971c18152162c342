//! Settings of the process before any verb runs.
#![allow(unsafe_code)] // Signal dispositions have no safe interface.

use std::io;

use rustix::process::{Resource, getrlimit, setrlimit};

/// Lets a write beyond the file size limit fail with `EFBIG`, which is reported, instead of killing the process
/// in the middle of an update.
pub fn prepare() -> io::Result<()> {
    // SAFETY: ignoring a signal runs no code of ours.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// A queue takes half a dozen descriptors, and so do callers; the soft limit is often made for programs that use select(2).
pub fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit on open files; many queues may exhaust it");
    }
}
