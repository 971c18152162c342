//! The causes of an error.

use std::error::Error;
use std::io;

/// The cause of `error`, the cause of that, and so on.
pub fn causes<'e>(error: &'e (dyn Error + 'e)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(error.source(), |error| (*error).source())
}

/// What an operator can do about the answer of the system to something that names a file; it stands behind what failed.
pub fn remedy(error: &io::Error) -> &'static str {
    if error.raw_os_error() == Some(libc::EIO) {
        return "; the device or the file system has failed: see the kernel's log (`dmesg`)";
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run this as a user with access, or give this user access",
        io::ErrorKind::NotFound => "; check the name, and that its directory exists",
        io::ErrorKind::IsADirectory => "; name a file or a block device",
        io::ErrorKind::NotADirectory => "; a part of this path is not a directory: check the name",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room there, and try again",
        io::ErrorKind::ReadOnlyFilesystem => {
            "; remount the file system for writing, or use another file system"
        }
        io::ErrorKind::FileTooLarge => {
            "; raise the limit on the size of files (`ulimit -f`), or use a file system that supports larger files"
        }
        _ => "",
    }
}
