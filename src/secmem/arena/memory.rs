//! The arena's memory: `memfd_secret(2)`, or locked anonymous memory if the kernel has no `memfd_secret(2)`.
#![allow(unsafe_code)] // Mapping, protecting and locking memory.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use rustix::param::page_size;
use rustix::process::{Resource, getrlimit};

use super::ArenaError;

/// What the kernel keeps the arena's pages away from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// `memfd_secret(2)`: the pages leave the kernel's own direct map, so that neither `/proc/PID/mem`, nor ptrace,
    /// nor a bug in the kernel that reads memory at will, finds them.
    Secret,
    /// `mlock(2)`: never swapped, not in core dumps, zero in a forked child.
    Locked,
}

impl Source {
    /// The best that this kernel has.
    pub(super) fn detect() -> Self {
        match memfd_secret() {
            Ok(_) => Self::Secret,
            Err(_) => Self::Locked,
        }
    }

    /// Maps `len` bytes of zeros (a multiple of the page size) with a guard page on either side, for good: the arena
    /// never unmaps, it reuses.
    pub(super) fn map(self, len: usize) -> Result<NonNull<u8>, ArenaError> {
        let guard = page_size();
        let whole = len + 2 * guard;
        let base = match self {
            Self::Secret => {
                let file = memfd_secret().map_err(ArenaError::Map)?;
                rustix::fs::ftruncate(&file, whole as u64).map_err(|e| ArenaError::Map(e.into()))?;
                // SAFETY: a new mapping at an address of the kernel's choice; nothing else maps this file.
                unsafe {
                    rustix::mm::mmap(
                        ptr::null_mut(),
                        whole,
                        ProtFlags::empty(),
                        MapFlags::SHARED,
                        &file,
                        0,
                    )
                }
            }
            // SAFETY: a new mapping at an address of the kernel's choice.
            Self::Locked => unsafe {
                rustix::mm::mmap_anonymous(ptr::null_mut(), whole, ProtFlags::empty(), MapFlags::PRIVATE)
            },
        }
        .map_err(|e| refused(e, whole))?;

        self.protect(base.wrapping_byte_add(guard), len)
            .inspect_err(|_| {
                // SAFETY: the mapping made above, which nothing refers to yet.
                let _ = unsafe { rustix::mm::munmap(base, whole) };
            })?;
        Ok(NonNull::new(base.wrapping_byte_add(guard).cast())
            .expect("the kernel maps nothing at address zero"))
    }

    /// Opens the part between the guard pages, and keeps it out of children, dumps and swap.
    fn protect(self, start: *mut libc::c_void, len: usize) -> Result<(), ArenaError> {
        // SAFETY: the range was mapped by the caller for this, and no reference into it exists yet.
        unsafe { rustix::mm::mprotect(start, len, MprotectFlags::READ | MprotectFlags::WRITE) }
            .map_err(|e| refused(e, len))?;
        let advise = |advice| {
            // SAFETY: the advices used below alter what forks and dumps contain, never these bytes; the range is ours.
            unsafe { rustix::mm::madvise(start, len, advice) }.map_err(|e| ArenaError::Map(e.into()))
        };
        advise(Advice::LinuxDontDump)?;
        match self {
            // A shared mapping cannot be wiped in the child, so the child does not get it at all. The kernel locks
            // such pages itself.
            Self::Secret => advise(Advice::LinuxDontFork),
            Self::Locked => {
                advise(Advice::LinuxWipeOnFork)?;
                // SAFETY: locking pages does not alter them; the range is ours.
                unsafe { rustix::mm::mlock(start, len) }.map_err(|e| refused(e, len))
            }
        }
    }
}

fn memfd_secret() -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags alone.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).expect("descriptors are ints");
    // SAFETY: the kernel just opened this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The error for memory that the kernel would not give or lock: `EAGAIN`, `EPERM` and (from `mlock`) `ENOMEM` mean the
/// limit, if there is one.
fn refused(errno: Errno, wanted: usize) -> ArenaError {
    match getrlimit(Resource::Memlock).current {
        Some(limit) if matches!(errno, Errno::AGAIN | Errno::PERM | Errno::NOMEM) => {
            ArenaError::LockLimit { wanted, limit }
        }
        _ => ArenaError::Map(errno.into()),
    }
}
