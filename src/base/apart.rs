//! Threads for calls that may never return. They delay only the callers that wait for them.
//!
//! Another process can block such a call for ever, and sometimes the kernel cannot even kill its thread; then the process
//! cannot end either. So the thread has a separate table of descriptors: the sockets and locks of the process, above all the
//! lock of the audit log, are still released for the next process.

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
    const UNSHARE: libc::c_int = libc::CLOSE_RANGE_UNSHARE.cast_signed();
    // A kernel that cannot do it leaves the table as it is, which harms nothing but what this is for.
    // SAFETY: CLOSE_RANGE_UNSHARE gives this thread a copy of the table first, and what is closed is in the copy alone.
    // Descriptors that other threads own stay open in theirs, and this one, which has just begun, owns none of these.
    let result = unsafe { libc::close_range(first, last, UNSHARE) };
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
