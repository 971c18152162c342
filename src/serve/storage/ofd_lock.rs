//! Open file description locks (fcntl(2)): each belongs to an open file description, and lasts until that unlocks it or is closed by all
//! that share it.

#![allow(unsafe_code)] // These locks have no safe wrapper.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// All that a lock can name.
pub(super) const EVERYTHING: Range<u64> = 0..i64::MAX.unsigned_abs();

/// What a description holds on a range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Exclusive,
    Shared,
    None,
}

/// What the lock of another description is.
#[derive(Debug)]
pub(super) struct Holder {
    pub is_shared: bool,
    start: i64,
    /// 0 where it has no end.
    len: i64,
}

impl Holder {
    /// Whether it is that of a reader of an earlier build, which locks the whole file.
    pub(super) fn is_earlier_reader(&self) -> bool {
        self.is_shared && (self.start, self.len) == (0, 0)
    }
}

/// Has the description of `file` hold a lock of that kind; whether it does so now. It does not if the lock of another is in the way.
pub(super) fn set(file: &File, kind: Kind, range: &Range<u64>) -> io::Result<bool> {
    let kind = match kind {
        Kind::Exclusive => libc::F_WRLCK,
        Kind::Shared => libc::F_RDLCK,
        Kind::None => libc::F_UNLCK,
    };
    match command(file, libc::F_OFD_SETLK, &mut lock(kind, range)?) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A lock of another description that keeps that of `file` from an exclusive one.
pub(super) fn holder(file: &File, range: &Range<u64>) -> io::Result<Option<Holder>> {
    let mut lock = lock(libc::F_WRLCK, range)?;
    command(file, libc::F_OFD_GETLK, &mut lock)?;
    let kind = libc::c_int::from(lock.l_type);
    Ok((kind != libc::F_UNLCK).then_some(Holder {
        is_shared: kind == libc::F_RDLCK,
        start: lock.l_start,
        len: lock.l_len,
    }))
}

fn lock(kind: libc::c_int, range: &Range<u64>) -> io::Result<libc::flock> {
    Ok(libc::flock {
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: i64::try_from(range.start).map_err(io::Error::other)?,
        l_len: i64::try_from(range.end - range.start).map_err(io::Error::other)?,
        l_pid: 0,
    })
}

fn command(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of the call, and `lock` is a valid struct flock, which the kernel reads
    // and, for F_OFD_GETLK, writes.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
