//! How io_uring is set up, and what an operator does if that fails: each of the kernel's errors has a cause of its own.

use std::io;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};

/// Calls `make`, which sets up a ring. io_uring fails if the kernel would reclaim memory first, and the memory of a closed ring
/// comes back a while later, so a lack of memory ends a session only after some more tries.
pub(super) fn patiently<T>(mut make: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut tries = 1..=TRIES;
    loop {
        match make() {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && tries.next().is_some() => {
                thread::sleep(RETRY);
            }
            result => return result,
        }
    }
}

/// How often, and after what time, it is tried again.
const TRIES: u32 = 10;
const RETRY: Duration = Duration::from_millis(20);

/// What is wrong on this host, and what to do.
pub(super) fn remedy(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => forbidden(std::fs::read_to_string(SYSCTL).ok().as_deref()),
        Some(libc::ENOSYS) => "this kernel has none, or a seccomp profile hides it; sealblk needs Linux 5.19 or later, and in a \
                               container a profile that allows io_uring_setup, io_uring_enter and io_uring_register"
            .to_owned(),
        Some(libc::EINVAL) => "this kernel is too old; sealblk needs Linux 5.19 or later".to_owned(),
        Some(libc::ENOMEM | libc::EAGAIN) => format!(
            "there is no memory for it; RLIMIT_MEMLOCK is {}: raise it (`LimitMEMLOCK=` in a systemd unit, `ulimit -l` in a shell), \
             take less with --num-queues or --pool-size, or raise the memory limit of the process' control group",
            match getrlimit(Resource::Memlock).current {
                Some(limit) => format!("{limit} bytes"),
                None => "unlimited".to_owned(),
            }
        ),
        Some(libc::EMFILE | libc::ENFILE) => {
            "file descriptors are exhausted; raise the limit (`LimitNOFILE=` in a systemd unit, `ulimit -n` in a shell)".to_owned()
        }
        _ => "sealblk needs Linux 5.19 or later with io_uring allowed".to_owned(),
    }
}

/// The users that may use io_uring: 0 all, 1 members of a group and administrators, 2 none.
const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";

fn forbidden(sysctl: Option<&str>) -> String {
    match sysctl.map(str::trim) {
        Some("2") => "this host forbids it to all users; set the sysctl kernel.io_uring_disabled to 0".to_owned(),
        Some("1") => "this host allows it to administrators and to members of the group kernel.io_uring_group alone; run as one \
                      of them, or set the sysctl kernel.io_uring_disabled to 0"
            .to_owned(),
        _ => "a seccomp profile forbids it, as the default ones of container engines do; run the container with a profile that \
              allows io_uring_setup, io_uring_enter and io_uring_register (with Docker: --security-opt seccomp=FILE)"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_its_own_remedy() {
        let told = |errno| remedy(&io::Error::from_raw_os_error(errno));
        assert!(told(libc::ENOSYS).contains("5.19"));
        assert!(told(libc::ENOMEM).contains("RLIMIT_MEMLOCK is "));
        assert!(told(libc::EMFILE).contains("LimitNOFILE"));
        assert!(forbidden(Some("2\n")).contains("forbids it to all users"));
        assert!(forbidden(Some("1\n")).contains("io_uring_group"));
        assert!(forbidden(Some("0\n")).contains("seccomp"));
        assert!(forbidden(None).contains("seccomp"));
    }
}
