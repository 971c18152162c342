//! Guest memory, or the dirty log, that is lost while it is mapped.
//!
//! A front-end can shrink the file of a memory region that we have mapped, and a file system can run out of pages, above all of
//! huge ones. The dirty log's file cannot shrink, and its pages can run out all the same. An access to a page that does not exist raises SIGBUS, which would end the process. The signal handler here maps
//! anonymous memory in the place of the whole region, so that the access continues, and records that guest memory
//! [was lost](is_lost). From then on no data that were read from guest memory reach storage, no request is reported as done,
//! and the session ends. Wayland compositors guard the pools that clients share with them in the same way.
//!
//! The handler replaces the whole region, since a part of a huge page or of a DAX device cannot be replaced, and since the
//! number of mappings has a limit. Memory that fails (BUS_MCEERR_AR), and a SIGBUS anywhere else, still end the process.

#![allow(unsafe_code)] // A signal handler, and the mapping that it makes.

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::dirty_log::DirtyLog;
use super::limits::MAX_REGIONS;

/// Where a mapping starts and ends; 0 and 0 if there is none. A signal handler may not take a lock.
type Mapped = [AtomicUsize; 2];

/// Where guest memory is mapped.
static REGIONS: [Mapped; MAX_REGIONS] = [const { [const { AtomicUsize::new(0) }; 2] }; MAX_REGIONS];

/// Where the dirty log is mapped.
static LOG: Mapped = [const { AtomicUsize::new(0) }; 2];

/// Whether a page of either was missing since [`begin`].
static LOST: AtomicBool = AtomicBool::new(false);

/// Whether guest memory was lost in this session. An access that finds a page missing is followed by a true answer in
/// the same thread.
pub(super) fn is_lost() -> bool {
    LOST.load(Ordering::SeqCst)
}

/// Begins a session: no memory, no log, and nothing lost.
pub(super) fn begin() {
    protect(&GuestMemoryMmap::new());
    protect_log(None);
    LOST.store(false, Ordering::SeqCst);
}

/// Lets accesses to `memory` survive the loss of its pages. Call it while no ring runs; one front-end's memory is
/// protected at a time.
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
        set(slot, regions.next().unwrap_or_default());
    }
}

/// Lets marks in `log` survive the loss of its pages. Call it while no ring runs, after [`protect`], and before the last log goes.
pub(super) fn protect_log(log: Option<&DirtyLog>) {
    let (start, len) = log.map_or((0, 0), DirtyLog::mapped_at);
    set(&LOG, [start, start.saturating_add(len)]);
}

fn set(mapped: &Mapped, [start, end]: [usize; 2]) {
    mapped[0].store(start, Ordering::SeqCst);
    mapped[1].store(end, Ordering::SeqCst);
}

fn install() -> io::Result<()> {
    // SAFETY: all zeros is a valid sigaction: no flags, no mask, the default action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and makes only calls that a handler may make.
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
    let is_missing = info.si_code == libc::BUS_ADRERR;
    let region = REGIONS
        .iter()
        .chain([&LOG])
        .map(|[start, end]| (start.load(Ordering::SeqCst), end.load(Ordering::SeqCst)))
        .find(|(start, end)| (*start..*end).contains(&address));
    if let (true, Some((start, end))) = (is_missing, region) {
        // Before the memory is there: another worker may read its zeros without a fault.
        LOST.store(true, Ordering::SeqCst);
        if replace(start, end - start) {
            return;
        }
    }
    // SAFETY: setting the default action is allowed in a handler; the access then faults once more, and ends us.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Maps anonymous memory over a region or the log.
fn replace(start: usize, len: usize) -> bool {
    // SAFETY: the range is a mapping of guest memory, into which no reference points, or of the log, into which only atomics point, for
    // one operation each; the new mapping has the same length and protection. mmap is a bare system call here.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::with_exposed_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// There is one place for the mappings of a session.
#[cfg(any(test, fuzzing))]
pub(super) static SESSION: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::PAGE;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::fs::File;
    use vhost::vhost_user::message::VhostUserLog;
    use vm_memory::{Bytes, FileOffset, GuestAddress};

    #[test]
    fn a_log_that_was_taken_away_takes_marks_all_the_same() {
        let _session = SESSION.lock().unwrap();
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 4 * PAGE as u64).unwrap();
        let log = DirtyLog::map(&file, VhostUserLog::new(4 * PAGE as u64, 0)).unwrap();
        begin();
        protect_log(Some(&log));
        log.mark(0, 1);
        ftruncate(&file, 0).unwrap();
        assert!(!is_lost());
        log.mark(0, 1);
        assert!(is_lost());
        protect_log(None);
    }

    #[test]
    fn guest_memory_that_was_taken_away_reads_as_zeros() {
        let _session = SESSION.lock().unwrap();
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 4 * PAGE as u64).unwrap();
        let shrinking = file.try_clone().unwrap();
        let ranges = [(GuestAddress(0), 4 * PAGE, Some(FileOffset::new(file, 0)))];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        begin();
        protect(&memory);
        memory.write_slice(&[7; 4 * PAGE], GuestAddress(0)).unwrap();

        ftruncate(&shrinking, PAGE as u64).unwrap();
        assert!(!is_lost());
        let mut content = [1; 4 * PAGE];
        memory.read_slice(&mut content, GuestAddress(0)).unwrap();
        assert!(is_lost());
        assert!(content[PAGE..].iter().all(|&byte| byte == 0));
        memory
            .write_slice(&[9; 100], GuestAddress(3 * PAGE as u64))
            .unwrap();
    }
}
