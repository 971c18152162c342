//! Looking for secrets in a process, and being somebody who may not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// Every mapping of a process that can be read, one after the other: what a core dump or a debugger would get.
pub fn readable_memory(pid: u32) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut bytes = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split(' ');
        let (start, end) = fields.next().unwrap().split_once('-').unwrap();
        if !fields.next().unwrap().starts_with('r') {
            continue;
        }
        let address = |hex| u64::from_str_radix(hex, 16).unwrap();
        let mut mapping = vec![0; (address(end) - address(start)) as usize];
        if memory.read_exact_at(&mut mapping, address(start)).is_ok() {
            bytes.append(&mut mapping);
        }
    }
    bytes
}

pub fn finds(memory: &[u8], wanted: &[u8]) -> bool {
    memory
        .windows(wanted.len())
        .any(|window| window[0] == wanted[0] && window == wanted)
}

/// Does `work` as a user whose group has the same number, which the kernel tells whoever is asked; nobody else in this
/// process is that user.
#[allow(unsafe_code)] // A thread of another user than its process has no safe wrapper.
pub fn as_user<R: Send>(user: u32, work: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // The raw calls change this thread alone, which ends with it.
            let keep: libc::c_long = -1;
            let no_groups: [libc::gid_t; 0] = [];
            // SAFETY: a list of no groups.
            let groups = unsafe { libc::syscall(libc::SYS_setgroups, 0, no_groups.as_ptr()) };
            // SAFETY: this takes numbers alone.
            let group = unsafe { libc::syscall(libc::SYS_setresgid, keep, user, keep) };
            assert_eq!((groups, group), (0, 0));
            // SAFETY: as above.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, keep, user, keep) }, 0);
            work()
        });
        thread.join().unwrap()
    })
}
