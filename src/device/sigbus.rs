//! A front-end can shrink the file of a memory region that we have mapped; to touch what is gone raises SIGBUS, which
//! would end the process. The handler here puts an anonymous page in the place of the missing one, and the access goes
//! on: what is read is zeros, what is written is lost, and both is the front-end's own doing. A SIGBUS anywhere else
//! ends the process as ever. (Wayland compositors guard the pools that clients share with them the same way.)

#![allow(unsafe_code)] // A signal handler, and the mapping that it makes.

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use crate::storage::PAGE;

/// The most regions that a front-end may have mapped: vhost-user-backend's limit.
const MAX_REGIONS: usize = 512;

/// Where guest memory is mapped: start and end of each region, 0 and 0 where there is none. A signal handler may not
/// take a lock.
static REGIONS: [[AtomicUsize; 2]; MAX_REGIONS] = [const { [const { AtomicUsize::new(0) }; 2] }; MAX_REGIONS];

/// Lets accesses to `memory` survive the loss of its pages. One front-end's memory is protected at a time.
pub(super) fn protect(memory: &GuestMemoryMmap) {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        if let Err(error) = install() {
            tracing::warn!(%error, "a front-end that shrinks its memory can end this process");
        }
    });
    let mut regions = memory.iter().filter_map(|region| {
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()?.addr();
        Some([start, start + usize::try_from(region.len()).ok()?])
    });
    for slot in &REGIONS {
        let [start, end] = regions.next().unwrap_or_default();
        // Emptied first, so that the handler never sees the start of one region with the end of another.
        slot[1].store(0, Ordering::SeqCst);
        slot[0].store(start, Ordering::SeqCst);
        slot[1].store(end, Ordering::SeqCst);
    }
}

fn install() -> io::Result<()> {
    // SAFETY: all zeros is a valid sigaction: no flags, no mask, the default action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and calls only what a handler may.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

extern "C" fn handle(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    let info = unsafe { &*info };
    // SAFETY: that of a SIGBUS has an address.
    let address = unsafe { info.si_addr() }.addr();
    let is_guest_memory = REGIONS.iter().any(|[start, end]| {
        let (start, end) = (start.load(Ordering::SeqCst), end.load(Ordering::SeqCst));
        (start..end).contains(&address)
    });
    if is_guest_memory && replace(address & !(PAGE - 1)) {
        return;
    }
    // SAFETY: setting the default action is allowed in a handler; the access then faults once more, and ends us.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Maps an anonymous page over a lost one.
fn replace(page: usize) -> bool {
    // SAFETY: the page lies within a mapping of guest memory, which nobody holds a reference into; what replaces it
    // has the same length and protection. mmap is a bare system call here.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::with_exposed_provenance_mut(page),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::fs::File;
    use vm_memory::{Bytes, FileOffset, GuestAddress};

    #[test]
    fn guest_memory_that_was_taken_away_reads_as_zeros() {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 4 * PAGE as u64).unwrap();
        let shrinking = file.try_clone().unwrap();
        let ranges = [(GuestAddress(0), 4 * PAGE, Some(FileOffset::new(file, 0)))];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        protect(&memory);
        memory.write_slice(&[7; 4 * PAGE], GuestAddress(0)).unwrap();

        ftruncate(&shrinking, PAGE as u64).unwrap();
        let mut content = [1; 4 * PAGE];
        memory.read_slice(&mut content, GuestAddress(0)).unwrap();
        assert!(content[..PAGE].iter().all(|&byte| byte == 7));
        assert!(content[PAGE..].iter().all(|&byte| byte == 0));
        memory
            .write_slice(&[9; 100], GuestAddress(3 * PAGE as u64))
            .unwrap();
    }
}
