//! Opens an inode again that this process has open, whatever its path names by now.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

/// Opens the inode of `file` once more: a description of its own, with flags, locks and write-back errors of its own.
pub(super) fn reopen(file: &File, flags: OFlags) -> rustix::io::Result<File> {
    // Of this thread: one that looks at a place that may not answer has a table of its own.
    let path = PathBuf::from(format!("/proc/thread-self/fd/{}", file.as_raw_fd()));
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}
