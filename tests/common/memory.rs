//! Guest memory as a front-end offers it: memfds mapped at guest addresses, and where in them a test puts things.
//!
//! ```text
//! guest address   0          4 MiB      8 MiB            4 GiB       4 GiB + 16 MiB
//!                 | region 0 | region 1 |  nothing there |  region 2 |
//!                   rings      adjacent to 0               buffers
//! ```
//! Buffers lie between guard bytes, which [`Memory::check_guards`] finds changed when a device writes past one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::mmap::GuestRegionMmap;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};

/// What a freshly allocated buffer is filled with: not zeros, and no status that a device writes.
pub const UNTOUCHED: u8 = 0xee;
const GUARD: u8 = 0xa5;
const GUARD_LEN: u64 = 64;

const MIB: u64 = 1 << 20;
/// Where region 0 ends and region 1 begins.
pub const SEAM: u64 = 4 * MIB;
/// An address in the hole between region 1 and region 2.
pub const HOLE: u64 = 512 * MIB;
/// The end of the last region: nothing is mapped here.
pub const END: u64 = BUFFERS + BUFFERS_LEN;
/// Where the last region begins, in which buffers are.
pub const BUFFERS: u64 = 4096 * MIB;
pub const BUFFERS_LEN: u64 = 16 * MIB;

#[derive(Debug, Clone)]
pub struct Region {
    pub guest: u64,
    pub len: u64,
    /// The address by which the front-end's own process is said to know it: what ring addresses are given in.
    pub user: u64,
    pub file: Arc<File>,
}

impl Region {
    /// A region that is mapped nowhere here: what the device does to it is read from its file.
    pub fn create(guest: u64, len: u64) -> Self {
        let file = rustix::fs::memfd_create("sealblk-test-guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        Region {
            guest,
            len,
            user: 0x7e00_0000_0000 + guest * 2,
            file: Arc::new(File::from(file)),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

#[derive(Debug)]
pub struct Memory {
    map: RefCell<GuestMemoryMmap<()>>,
    regions: RefCell<Vec<Region>>,
    next_ring: Cell<u64>,
    next_buffer: Cell<u64>,
    buffers: RefCell<Vec<Range<u64>>>,
}

impl Memory {
    pub fn new() -> Rc<Self> {
        let memory = Memory {
            map: RefCell::new(GuestMemoryMmap::new()),
            regions: RefCell::new(Vec::new()),
            next_ring: Cell::new(4096),
            next_buffer: Cell::new(BUFFERS),
            buffers: RefCell::new(Vec::new()),
        };
        memory.plug(0, SEAM);
        memory.plug(SEAM, 4 * MIB);
        memory.plug(BUFFERS, BUFFERS_LEN);
        Rc::new(memory)
    }

    /// Adds a region; the device does not know of it until it is told.
    pub fn plug(&self, guest: u64, len: u64) -> Region {
        let region = Region::create(guest, len);
        let mapping =
            MmapRegion::from_file(FileOffset::from_arc(region.file.clone(), 0), len as usize).unwrap();
        let mapped = GuestRegionMmap::new(mapping, GuestAddress(guest)).unwrap();
        let map = self.map.borrow().insert_region(Arc::new(mapped)).unwrap();
        self.map.replace(map);
        self.regions.borrow_mut().push(region.clone());
        region
    }

    pub fn regions(&self) -> Vec<Region> {
        self.regions.borrow().clone()
    }

    /// The mapping itself, for a thread that changes memory under the device.
    pub fn map(&self) -> GuestMemoryMmap<()> {
        self.map.borrow().clone()
    }

    /// The front-end's own address for a guest address; for one in no region, an address in no region.
    pub fn user(&self, guest: u64) -> u64 {
        let regions = self.regions.borrow();
        let region = regions
            .iter()
            .find(|r| (r.guest..r.guest + r.len).contains(&guest));
        region.map_or(0x10_0000_0000 + guest, |r| r.user + (guest - r.guest))
    }

    /// Room for a ring: zeroed, aligned to 4096, and never given back.
    pub fn ring(&self, len: u64) -> u64 {
        let at = self.next_ring.get();
        assert!(at + len < SEAM / 2, "no room for rings");
        self.next_ring.set((at + len).next_multiple_of(4096));
        self.write(at, &vec![0; len as usize]);
        at
    }

    /// Room for a buffer, filled with [`UNTOUCHED`], between guards.
    pub fn buffer(&self, len: u64) -> u64 {
        let start = self.next_buffer.get() + GUARD_LEN;
        let end = start + len;
        assert!(end + GUARD_LEN <= END, "no room for buffers");
        self.next_buffer.set(end.next_multiple_of(16));
        self.place(start, len);
        start
    }

    /// Makes a buffer of any range of guest memory, with guards around it.
    pub fn place(&self, start: u64, len: u64) {
        let end = start + len;
        self.write(start, &vec![UNTOUCHED; len as usize]);
        self.write(start - GUARD_LEN, &[GUARD; GUARD_LEN as usize]);
        if end + GUARD_LEN <= END {
            self.write(end, &[GUARD; GUARD_LEN as usize]);
        }
        self.buffers.borrow_mut().push(start..end);
    }

    /// A buffer that holds `bytes`.
    pub fn filled(&self, bytes: &[u8]) -> u64 {
        let at = self.buffer(bytes.len() as u64);
        self.write(at, bytes);
        at
    }

    /// Panics when a byte next to a buffer changed.
    pub fn check_guards(&self) {
        let buffers = self.buffers.borrow();
        let inside = |at: u64| buffers.iter().any(|buffer| buffer.contains(&at));
        for buffer in buffers.iter() {
            for at in
                (buffer.start - GUARD_LEN..buffer.start).chain(buffer.end..(buffer.end + GUARD_LEN).min(END))
            {
                let byte = self.read(at, 1)[0];
                assert!(
                    byte == GUARD || inside(at),
                    "the device wrote {byte:#x} at {at:#x}, next to {buffer:x?}"
                );
            }
        }
    }

    /// Where the next buffer goes; [`Memory::free_to`] comes back here.
    pub fn mark(&self) -> u64 {
        self.next_buffer.get()
    }

    /// Checks all guards, then gives back what was allocated since the mark. Nothing of it may be in flight.
    pub fn free_to(&self, mark: u64) {
        self.check_guards();
        self.buffers
            .borrow_mut()
            .retain(|buffer| buffer.end <= mark && buffer.start >= BUFFERS);
        self.next_buffer.set(mark);
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.map.borrow().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map
            .borrow()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    pub fn read_u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.read(at, 4).try_into().unwrap())
    }

    /// Reads a ring index after which everything that the device wrote before it can be seen.
    pub fn load_index(&self, at: u64) -> u16 {
        self.map
            .borrow()
            .load(GuestAddress(at), std::sync::atomic::Ordering::SeqCst)
            .unwrap()
    }

    /// Writes a ring index before which everything that the driver wrote can be seen.
    pub fn store_index(&self, at: u64, index: u16) {
        self.map
            .borrow()
            .store(index, GuestAddress(at), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }
}

/// The page of a dirty log, whatever pages the machine has.
pub const LOG_PAGE: u64 = 4096;

/// A front-end's dirty log: a bit for each page of guest memory, from address 0 on (vhost-user specification, "Migration").
#[derive(Debug)]
pub struct Log {
    pub file: File,
    pub len: u64,
}

impl Log {
    /// A log of `len` bytes, in a memfd that is sealed as QEMU's is.
    pub fn new(len: u64) -> Self {
        use rustix::fs::SealFlags;
        let log = Self::unsealed(len);
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&log.file, seals).unwrap();
        log
    }

    /// As [`Log::new`], and not sealed.
    pub fn unsealed(len: u64) -> Self {
        use rustix::fs::MemfdFlags;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("vhost-log", flags).unwrap());
        file.set_len(len).unwrap();
        Log { file, len }
    }

    /// As long as QEMU makes it for guest memory up to `end`: whole words of 64 pages.
    pub fn of_memory(end: u64) -> Self {
        Self::new(end.div_ceil(64 * LOG_PAGE) * 8)
    }

    /// The pages that are marked.
    pub fn pages(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        let marked = |page: &u64| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1;
        (0..8 * self.len).filter(marked).collect()
    }

    /// Its words, mapped, to be taken while the device goes on.
    pub fn words(&self) -> LogWords {
        let file = FileOffset::new(self.file.try_clone().unwrap(), 0);
        LogWords(MmapRegion::from_file(file, self.len as usize).unwrap())
    }

    /// Removes all marks. Nothing may be logged meanwhile.
    pub fn clear(&self) {
        self.file.write_all_at(&vec![0; self.len as usize], 0).unwrap();
    }
}

/// A dirty log as QEMU has it.
#[derive(Debug)]
pub struct LogWords(MmapRegion);

impl LogWords {
    /// The pages of `pages`, in whole words, that are marked now. They are not marked afterwards.
    pub fn take(&self, pages: Range<u64>) -> Vec<u64> {
        assert!(pages.start.is_multiple_of(64));
        let words = pages.start / 64..pages.end.div_ceil(64);
        let taken = words.map(|word| {
            let bits = self.0.get_atomic_ref::<AtomicU64>(8 * word as usize);
            (word, bits.unwrap().swap(0, Ordering::SeqCst))
        });
        taken
            .flat_map(|(word, bits)| {
                let set = (0..64).filter(move |bit| bits >> bit & 1 == 1);
                set.map(move |bit| 64 * word + bit)
            })
            .collect()
    }
}
