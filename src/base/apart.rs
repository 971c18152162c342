//! Threads that wait for what may never answer, and hold up nobody but those who wait for them.
//!
//! A call on what another process can keep from answering may not even be killed; then neither can its process end. A thread that
//! makes such a call has a table of descriptors of its own: the process' sockets and locks, the audit log's above all, are free
//! nevertheless for the one that comes after.

#![allow(unsafe_code)] // close_range has no safe wrapper.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::thread;

/// The lowest descriptor that is no standard one.
const FIRST: RawFd = 3;

/// Has `work` done on `descriptor`, which another process shares, by a thread that has nothing else open; and waits for it.
///
/// # Errors
/// If there is no thread.
pub fn on<T: Send>(descriptor: &OwnedFd, work: impl FnOnce(&OwnedFd) -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let apart = || {
            let kept = descriptor.as_raw_fd();
            let_go_of(FIRST, kept - 1);
            let_go_of(kept + 1, RawFd::MAX);
            work(descriptor)
        };
        let thread = thread::Builder::new()
            .name("apart".to_owned())
            .spawn_scoped(scope, apart)?;
        thread
            .join()
            .map_err(|_| io::Error::other("a thread has panicked"))
    })
}

/// Gives the calling thread, which has just begun, a table with none but the standard descriptors in it.
pub fn let_go_of_descriptors() {
    let_go_of_all_from(FIRST);
}

/// Gives the calling thread, which has just begun, a table with none but the descriptors below `first` in it; tells whether it has
/// one.
pub fn let_go_of_all_from(first: RawFd) -> bool {
    let_go_of(first, RawFd::MAX)
}

/// Closes these descriptors in a table of the calling thread's own.
fn let_go_of(first: RawFd, last: RawFd) -> bool {
    let (Ok(first), Ok(last)) = (libc::c_uint::try_from(first), libc::c_uint::try_from(last)) else {
        return false;
    };
    if first > last {
        return false;
    }
    // A kernel that cannot do it leaves the table as it is, which harms nothing but what this is for.
    // SAFETY: CLOSE_RANGE_UNSHARE gives this thread a copy of the table first, and what is closed is in the copy alone.
    // Descriptors that other threads own stay open in theirs, and this one, which has just begun, owns none of these.
    let result = unsafe { libc::close_range(first, last, libc::CLOSE_RANGE_UNSHARE as libc::c_int) };
    result == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    #[test]
    fn work_has_its_descriptor_and_no_other_and_the_process_keeps_all() {
        let open = |_: usize| OwnedFd::from(File::open("/dev/null").unwrap());
        let files: Vec<_> = (0..3).map(open).collect();
        let count = |_: &OwnedFd| {
            let entries = fs::read_dir("/proc/thread-self/fd").unwrap();
            let numbers = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            numbers
                .filter(|number| number.parse::<RawFd>().unwrap() >= FIRST)
                .count()
        };
        for file in &files {
            // With the directory's own.
            assert_eq!(on(file, count).unwrap(), 2);
        }
        assert!(files.iter().all(|file| rustix::fs::fstat(file).is_ok()));
    }
}
