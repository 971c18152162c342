//! A hostile driver: it has the worker serve a split virtqueue round by round, and changes guest memory in between.
//!
//! The input is what the driver does: two bytes say how the disk and the queue are set up, and then each command begins with a byte
//! that names it ([`Play::act`]). After each round of the worker:
//!
//! - no byte of guest memory has changed but in buffers that the device may write to, and in the used ring;
//! - the page of each byte that has changed is in the dirty log, and no page where nothing may have been written;
//! - each chain that was given back was in flight, and what is in flight is what the record says.
//!
//! When the worker has nothing more to do, nothing is in flight but what waits for storage that fails. No byte beyond the disk's part of its file has changed at the end.
//!
//! A driver can have the device write to a descriptor table, or to the used ring. What the device does then is as open as it is what
//! the driver does, so some of this is not checked.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use sealblk_secmem::arena::SecretBytes;
use vhost::vhost_user::message::VhostUserLog;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::super::call::Call;
use super::super::claims::Claims;
use super::super::dirty_log::DirtyLog;
use super::super::disk::Disk;
use super::super::guest::SharedMemory;
use super::super::inflight::{InflightMemory, len_for};
use super::super::left;
use super::super::limits::MAX_QUEUE_SIZE;
use super::super::rings::{self, Urings};
use super::super::sigbus;
use super::super::task::Piece;
use super::super::vring::{self, Logging, StandsOn, Vring};
use super::super::worker::{End, Next, Worker};
use super::Bytes;
use crate::cipher::{KEY_LEN, KernelChoice, Sector, SectorCipher, SectorSize};
use crate::map::{Segment, SegmentTable, Treatment};
use crate::mutex::lock;
use crate::storage::{Access, Answer, Backing, Engine, Others, PAGE, Policy, RingPool};

/// Has a driver do what `input` says. See the module's header.
///
/// # Panics
/// If the device does what it must not.
pub fn queue(input: &[u8]) {
    let _alone = lock(&sigbus::SESSION);
    let mut input = Bytes(input);
    let Some(setup) = Setup::read(&mut input) else {
        return;
    };
    sigbus::begin();
    HOST.with_borrow_mut(|host| {
        let host = host.get_or_insert_with(Host::new);
        let mut play = Play::begin(host, setup);
        for _ in 0..MOST_COMMANDS {
            if play.act(&mut input).is_none() {
                break;
            }
        }
        play.settle();
        play.end();
    });
}

const MOST_COMMANDS: usize = 400;
/// No chain and no command makes a worker do more.
const MOST_ROUNDS: usize = 100_000;

/// Guest memory: two regions side by side, a hole, and another region.
const REGIONS: [Range<u64>; 3] = [0..0x1_0000, 0x1_0000..0x2_0000, 0x8_0000..0x8_8000];
/// Where the queue lies. The used ring of a large queue goes over the end of a page.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x2f80;
/// Writes to the used ring are logged so much further on, where no memory is.
const USED_LOG: u64 = 0x4_0000;
const LOG_PAGE: u64 = 4096;
/// The disk lies in its file between two parts that are not its own.
pub(super) const CAPACITY: u64 = 256 << 10;
const BEYOND: u64 = 16 << 10;

/// How disk and queue are set up.
#[derive(Clone, Copy)]
struct Setup {
    kind: DiskKind,
    event_idx: bool,
    write_through: bool,
    /// Whether writes to buffers, and to the used ring, are logged.
    log_all: bool,
    log_used: bool,
    size: u16,
    /// Where the rings' indexes start.
    base: u16,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DiskKind {
    read_only: bool,
    discard: bool,
    encrypted: bool,
    large_sectors: bool,
    /// Whether a transfer that storage fails waits, or the driver gets an error.
    holds: bool,
}

impl Setup {
    fn read(input: &mut Bytes<'_>) -> Option<Self> {
        let (flags, queue) = (input.byte()?, input.byte()?);
        let flag = |bit: u8| flags >> bit & 1 == 1;
        Some(Self {
            kind: DiskKind {
                read_only: flag(0),
                discard: !flag(1),
                encrypted: flag(2),
                large_sectors: flag(3),
                holds: queue & 0x20 != 0,
            },
            event_idx: flag(4),
            write_through: flag(5),
            log_all: flag(6),
            log_used: flag(7),
            size: 1 << (queue % 8).min(5),
            base: if queue & 0x10 == 0 { 0 } else { 0xfffe },
        })
    }
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// What all inputs have in common, since it takes long to set up.
struct Host {
    memory: SharedMemory,
    log: Arc<DirtyLog>,
    log_file: File,
    /// The record of what is in flight, and its file.
    record: InflightMemory,
    record_file: File,
    calls: RingPool,
    disks: BTreeMap<DiskKind, Stored>,
    stop: OwnedFd,
    kick: File,
    call: File,
}

/// A disk with its storage.
pub(super) struct Stored {
    pub disk: Arc<Disk>,
    pub table: Arc<SegmentTable>,
    pub file: File,
    pub urings: Urings,
    pub engine: Option<Engine<Piece>>,
}

fn memory_file(len: u64) -> File {
    let file = memfd_create("hostile", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, len).unwrap();
    file.into()
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

impl Host {
    fn new() -> Self {
        let regions = REGIONS.map(|region| {
            let len = region.end - region.start;
            let file = FileOffset::new(memory_file(len), 0);
            (GuestAddress(region.start), len as usize, Some(file))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(regions).unwrap();
        let log_len = REGIONS[2].end / LOG_PAGE / 8;
        let log_file = memory_file(log_len);
        let record_file = File::from(InflightMemory::create(1).unwrap());
        Self {
            memory: SharedMemory::new(memory),
            log: Arc::new(DirtyLog::map(&log_file, VhostUserLog::new(log_len, 0)).unwrap()),
            log_file,
            record: InflightMemory::map(&record_file, 0, 1).unwrap(),
            record_file,
            calls: Call::rings(1).unwrap(),
            disks: BTreeMap::new(),
            stop: event(),
            kick: event().into(),
            call: event().into(),
        }
    }
}

impl Stored {
    pub(super) fn new(kind: DiskKind) -> Self {
        let file = memory_file(BEYOND + CAPACITY + BEYOND);
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let access = match kind.read_only {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let sector_size = match kind.large_sectors {
            true => SectorSize::B4096,
            false => SectorSize::B512,
        };
        let backing = Backing::open(&path, access).unwrap();
        let attached = backing.attach(Others::Refused).unwrap();
        let answer = match kind.holds {
            true => Answer::Stop,
            false => Answer::Report,
        };
        let policy = Policy {
            full: answer,
            error: answer,
        };
        let data = backing
            .data_file(512, &attached.fence())
            .unwrap()
            .with_policy(policy);
        let sectors = CAPACITY / Sector::LEN;
        let disk = Disk::new(
            sectors,
            Arc::new(data),
            Claims::now(attached).unwrap(),
            sector_size,
            kind.read_only,
            kind.discard,
            "a serial of a disk",
        );
        // A pool that is soon exhausted.
        let disk = disk.unwrap().with_poll_max(Duration::ZERO).with_pool_pages(48);
        let treatment = match kind.encrypted {
            true => {
                let key = SecretBytes::random(KEY_LEN).unwrap();
                let cipher = SectorCipher::new(&key, sector_size, KernelChoice::Fastest);
                Treatment::Crypt(Arc::new(cipher.unwrap()))
            }
            false => Treatment::Linear,
        };
        let table = SegmentTable::new([Segment {
            sectors,
            offset: BEYOND,
            iv: Sector(0),
            treatment,
        }]);
        Self {
            disk: Arc::new(disk),
            table: Arc::new(table),
            file,
            urings: Urings::new(1).unwrap(),
            engine: None,
        }
    }
}

/// Chains that a worker serves by what a driver does.
struct Play<'h> {
    host: &'h mut Host,
    setup: Setup,
    vring: Option<Vring>,
    worker: Option<Worker>,
    /// How many chains the driver says that it has offered.
    offered: u16,
    /// Guest memory as it was before the worker's last round.
    before: Snapshot,
    /// What the device may write to, of all chains in flight.
    writable: Ranges,
}

type Snapshot = [Vec<u8>; 3];

/// Ranges of guest memory.
#[derive(Clone, Default)]
struct Ranges(Vec<Range<u64>>);

impl Ranges {
    fn add(&mut self, address: u64, len: u64) {
        let end = address.saturating_add(len);
        if address < end && address < REGIONS[2].end {
            self.0.push(address..end);
        }
    }

    fn overlap(&self, other: &Self) -> bool {
        let overlap = |one: &Range<u64>| {
            other
                .0
                .iter()
                .any(|two| one.start < two.end && two.start < one.end)
        };
        self.0.iter().any(overlap)
    }

    /// Sorted, and without overlaps.
    fn merge(&mut self) {
        self.0.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in self.0.drain(..) {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        self.0 = merged;
    }

    /// Whether one of them, which are merged, holds all of `range`.
    fn hold(&self, range: &Range<u64>) -> bool {
        let next = self.0.partition_point(|own| own.start <= range.start);
        next.checked_sub(1).is_some_and(|at| range.end <= self.0[at].end)
    }

    fn pages(&self) -> impl Iterator<Item = u64> {
        self.0.iter().flat_map(pages)
    }
}

fn pages(range: &Range<u64>) -> Range<u64> {
    range.start / LOG_PAGE..range.end.div_ceil(LOG_PAGE).min(REGIONS[2].end / LOG_PAGE)
}

/// A descriptor, as it lies in memory (virtio 1.2 §2.7.5).
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
}

const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Beyond so many descriptors of indirect tables, what the device may write to is not found out.
const MOST_LOOKED_AT: u64 = 2048;

impl<'h> Play<'h> {
    fn begin(host: &'h mut Host, setup: Setup) -> Self {
        let memory = host.memory.memory();
        for region in REGIONS {
            let zeros = vec![0; (region.end - region.start) as usize];
            memory.write_slice(&zeros, GuestAddress(region.start)).unwrap();
        }
        let record = vec![0; len_for(1)];
        host.record_file.write_all_at(&record, 0).unwrap();
        host.disks
            .entry(setup.kind)
            .or_insert_with(|| Stored::new(setup.kind));
        let play = Self {
            host,
            setup,
            vring: None,
            worker: None,
            offered: setup.base,
            before: Snapshot::default(),
            writable: Ranges::default(),
        };
        play.write(AVAILABLE + 2, &setup.base.to_le_bytes());
        play.write(USED + 2, &setup.base.to_le_bytes());
        play
    }

    /// Does what the next command says; none at the end of the input.
    fn act(&mut self, input: &mut Bytes<'_>) -> Option<()> {
        match input.byte()? % 13 {
            // A descriptor of the queue's table.
            0 => {
                let at = u64::from(input.byte()? % 32);
                let address = address(input)?;
                let descriptor = descriptor(address, len(input)?, input.byte()?, input.byte()?);
                self.write(DESCRIPTORS + 16 * at, &descriptor);
            }
            // One of an indirect table.
            1 => {
                let at = address(input)?;
                let address = address(input)?;
                let descriptor = descriptor(address, len(input)?, input.byte()?, input.byte()?);
                self.write(at, &descriptor);
            }
            // The header of a request.
            2 => {
                let at = address(input)?;
                let (kind, sector) = (u32::from(input.byte()?), u64::from(input.number()?));
                self.write(
                    at,
                    &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
                );
            }
            // A segment of a discard or write-zeroes request.
            3 => {
                let at = address(input)?;
                let (sector, sectors) = (u64::from(input.number()?), u32::from(input.number()?));
                let flags = u32::from(input.byte()?);
                let segment = [
                    &sector.to_le_bytes()[..],
                    &sectors.to_le_bytes(),
                    &flags.to_le_bytes(),
                ];
                self.write(at, &segment.concat());
            }
            // A chain is offered.
            4 => {
                let head = u16::from(input.byte()?);
                let slot = u64::from(self.offered % self.setup.size);
                self.write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
                self.offered = self.offered.wrapping_add(1);
                self.write(AVAILABLE + 2, &self.offered.to_le_bytes());
            }
            // Any bytes anywhere.
            5 => {
                let at = address(input)?;
                self.write(at, input.some()?);
            }
            // Any bytes in the available ring: its index, its flags, and the used_event.
            6 => {
                let at = u64::from(input.byte()?);
                self.write(AVAILABLE + at, input.some()?);
                let index = self.read(AVAILABLE + 2..AVAILABLE + 4);
                self.offered = u16::from_le_bytes([index[0], index[1]]);
            }
            7 => {
                self.kick();
                if self.worker.is_none() {
                    self.start();
                }
                self.round();
            }
            8 => {
                self.kick();
                self.settle();
            }
            // The queue is stopped, and started where it was.
            9 => {
                self.settle();
                self.stop();
            }
            // The process is killed, and another one finds what it has left.
            10 => {
                let ends = input.byte()? & 1 == 1;
                self.kill();
                if ends {
                    self.answer_left();
                }
            }
            // The front-end keeps another record of what is in flight.
            11 => {
                self.settle();
                self.stop();
                let at = u64::from(input.number()? % 1024);
                let bytes = input.some()?;
                self.host.record_file.write_all_at(bytes, at).unwrap();
            }
            // Storage has lost its end, or has it again: what lies there fails.
            _ => {
                let len = u64::from(input.byte()?) << 11;
                let whole = BEYOND + CAPACITY + BEYOND;
                self.stored().file.set_len(len.min(whole)).unwrap();
            }
        }
        Some(())
    }

    fn kick(&self) {
        let _ = rustix::io::write(&self.host.kick, &1_u64.to_ne_bytes());
    }

    /// Writes as the driver; what is not in memory is not written.
    fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.host.memory.memory().write(bytes, GuestAddress(at));
    }

    fn read(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let _ = self
            .host
            .memory
            .memory()
            .read(&mut bytes, GuestAddress(range.start));
        bytes
    }

    fn snapshot(&self) -> Snapshot {
        REGIONS.map(|region| self.read(region))
    }

    fn stored(&mut self) -> &mut Stored {
        self.host.disks.get_mut(&self.setup.kind).expect("it was set up")
    }

    fn vring(&self) -> Vring {
        let made = vring::collect(|| Vring::new(self.host.memory.clone(), MAX_QUEUE_SIZE));
        let vring = made.0.unwrap();
        vring.set_queue_size(self.setup.size);
        vring.set_queue_event_idx(self.setup.event_idx);
        vring.set_queue_info(DESCRIPTORS, AVAILABLE, USED).unwrap();
        // As the protocol handler does, and as QEMU says when it connects again.
        let used = vring.queue_used_idx().unwrap();
        vring.set_queue_next_used(used);
        vring.set_queue_next_avail(used);
        vring.set_kick(Some(self.host.kick.try_clone().unwrap()));
        vring.set_call(Some(self.host.call.try_clone().unwrap()));
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        vring
    }

    fn stands_on<T>(&self, use_it: impl FnOnce(&StandsOn<'_>) -> T) -> T {
        let (host, setup) = (&self.host, self.setup);
        use_it(&StandsOn {
            memory: &host.memory,
            logging: Logging {
                log: Some(&host.log),
                all: setup.log_all,
                used: setup.log_used.then_some(USED + USED_LOG),
            },
            inflight: &host.record,
            calls: &host.calls,
        })
    }

    /// Has a worker serve the queue, if that can be served.
    fn start(&mut self) {
        let vring = self.vring.take().unwrap_or_else(|| self.vring());
        let (left, is_sound) = (self.in_flight(), self.record_is_sound());
        let ring = self.stands_on(|on| vring.start(0, on));
        self.vring = Some(vring);
        // A record that makes no sense.
        let Ok(Some(ring)) = ring else { return };
        assert!(
            !is_sound || self.in_flight() == left,
            "what was left in flight is lost"
        );
        self.clear_log();
        let write_through = self.setup.write_through;
        let stored = self.stored();
        let disk = Arc::clone(&stored.disk);
        let engine = match stored.engine.take() {
            Some(engine) => engine,
            None => rings::engine(&disk, &stored.urings).unwrap(),
        };
        let worker = Worker::new(ring, disk, Arc::clone(&stored.table), engine, write_through);
        let mut worker = worker.unwrap();
        worker.begin(&self.host.stop);
        self.worker = Some(worker);
    }

    /// Has the worker work until it would sleep, with nothing in flight.
    fn settle(&mut self) {
        if self.worker.is_none() {
            self.start();
        }
        for _ in 0..MOST_ROUNDS {
            let next = self.round();
            let Some(worker) = &mut self.worker else { return };
            if next == Next::Round {
                continue;
            }
            let engine = &worker.path.engine;
            if engine.under_way() > 0 {
                worker.sleep();
                continue;
            }
            // What is held waits for the next start.
            if engine.held() > 0 {
                return;
            }
            let is_resuming = worker.path.ring.is_resuming();
            assert!(
                is_resuming || self.in_flight().is_empty(),
                "chains are not given back"
            );
            self.writable = Ranges::default();
            return;
        }
        panic!("the worker comes to no end");
    }

    /// The heads that are in flight by the record.
    fn in_flight(&self) -> Vec<u16> {
        let mut record = vec![0; 16 + 16 * usize::from(self.setup.size)];
        self.host.record_file.read_exact_at(&mut record, 0).unwrap();
        let descriptors = record[16..].chunks(16);
        (0..)
            .zip(descriptors)
            .filter(|(_, of)| of[0] != 0)
            .map(|(head, _)| head)
            .collect()
    }

    /// Whether the record is that of a queue of this size, whose used ring is as far as the record says.
    fn record_is_sound(&self) -> bool {
        let mut record = [0; 8];
        self.host.record_file.read_exact_at(&mut record, 8).unwrap();
        let number = |at: usize| u16::from_le_bytes([record[at], record[at + 1]]);
        let used = self.read(USED + 2..USED + 4);
        number(0) == 1 && number(2) == self.setup.size && record[6..] == used
    }

    /// A round of the worker, which is then checked.
    fn round(&mut self) -> Next {
        let (size, used_len) = (self.setup.size, 6 + 8 * u64::from(self.setup.size));
        self.before = self.snapshot();
        let (tables, is_known) = self.look_at_descriptors();
        let in_flight = self.in_flight();
        let Some(worker) = &mut self.worker else {
            return Next::Sleep;
        };
        let queue = &worker.path.ring.queue;
        let (avail, used) = (queue.next_avail(), queue.next_used());
        let was_resuming = worker.path.ring.is_resuming();
        let next = worker.round();
        let queue = &worker.path.ring.queue;
        let taken = queue.next_avail().wrapping_sub(avail);
        let given_back = queue.next_used().wrapping_sub(used);

        let mut used_ring = Ranges::default();
        used_ring.add(USED, used_len);
        let changes_tables = self.writable.overlap(&tables);
        let changes_used = self.writable.overlap(&used_ring);
        let now = self.snapshot();
        let changed = changed(&self.before, &now);
        if is_known && !changes_tables {
            let mut may_change = self.writable.clone();
            may_change.add(USED, used_len);
            may_change.merge();
            for range in &changed {
                assert!(
                    may_change.hold(range),
                    "{range:#x?} was written to: no buffer of the driver's"
                );
            }
        }
        self.check_log(&changed, is_known && !changes_tables, changes_used);

        if changes_tables || changes_used || !is_known || given_back > size {
            return next;
        }
        // What was in flight, and what was offered next.
        let at = |ring: u64, index: u16, each: u64| ring + 4 + each * u64::from(index % size);
        let region = |address: u64| &self.before[0][address as usize..];
        let heads = (0..taken).map(|more| {
            let slot = region(at(AVAILABLE, avail.wrapping_add(more), 2));
            u16::from_le_bytes([slot[0], slot[1]])
        });
        let mut left = in_flight;
        left.extend(heads);
        for more in 0..given_back {
            let slot = &now[0][at(USED, used.wrapping_add(more), 8) as usize..];
            let head = u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]);
            let place = left.iter().position(|other| u32::from(*other) == head);
            let place = place.unwrap_or_else(|| panic!("head {head} is given back, which was not in flight"));
            left.remove(place);
        }
        left.sort_unstable();
        assert!(
            was_resuming || self.in_flight() == left,
            "the record differs from {left:?}"
        );
        next
    }

    /// Takes note of what the device may write to. Gives the tables that it reads; and whether all of them were looked at.
    fn look_at_descriptors(&mut self) -> (Ranges, bool) {
        let (mut tables, mut is_known) = (Ranges::default(), true);
        let size = u64::from(self.setup.size);
        tables.add(DESCRIPTORS, 16 * size);
        tables.add(AVAILABLE, 6 + 2 * size);
        let mut indirect = Vec::new();
        for at in 0..size {
            let of = self.descriptor(DESCRIPTORS + 16 * at);
            if of.flags & INDIRECT != 0 {
                tables.add(of.address, of.len.into());
                indirect.push((of.address, u64::from(of.len) / 16));
            }
            if of.flags & WRITE != 0 {
                self.writable.add(of.address, of.len.into());
            }
        }
        let mut looked_at = 0;
        for (table, entries) in indirect {
            for at in 0..entries.min(MOST_LOOKED_AT) {
                let of = self.descriptor(table.wrapping_add(16 * at));
                if of.flags & WRITE != 0 {
                    self.writable.add(of.address, of.len.into());
                }
                looked_at += 1;
            }
            is_known &= looked_at < MOST_LOOKED_AT;
        }
        self.writable.merge();
        (tables, is_known)
    }

    fn descriptor(&self, at: u64) -> Descriptor {
        let mut bytes = [0; 16];
        let _ = self.host.memory.memory().read_slice(&mut bytes, GuestAddress(at));
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, _, _] = bytes;
        Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
        }
    }

    fn clear_log(&self) {
        let zeros = vec![0; (REGIONS[2].end / LOG_PAGE / 8) as usize];
        self.host.log_file.write_all_at(&zeros, 0).unwrap();
    }

    /// Checks the log against what has changed, and clears it.
    fn check_log(&self, changed: &[Range<u64>], is_known: bool, changes_used: bool) {
        let Setup {
            log_all, log_used, ..
        } = self.setup;
        let mut log = vec![0; (REGIONS[2].end / LOG_PAGE / 8) as usize];
        self.host.log_file.read_exact_at(&mut log, 0).unwrap();
        self.clear_log();
        let marked = |page: u64| log[(page / 8) as usize] >> (page % 8) & 1 == 1;
        let used_end = USED + 6 + 8 * u64::from(self.setup.size);
        for range in changed {
            let parts = [
                range.start..range.end.min(USED),
                range.start.max(used_end)..range.end,
            ];
            for page in parts
                .iter()
                .filter(|part| log_all && !part.is_empty())
                .flat_map(pages)
            {
                assert!(
                    marked(page),
                    "{range:#x?} was written to, and page {page:#x} is not in the log"
                );
            }
            let used = range.start.max(USED)..range.end.min(used_end);
            if log_used && !used.is_empty() && !changes_used {
                for page in pages(&(used.start + USED_LOG..used.end + USED_LOG)) {
                    assert!(
                        marked(page),
                        "the used ring was written to, and page {page:#x} is not in the log"
                    );
                }
            }
        }
        if !is_known {
            return;
        }
        let mut may_be_marked = Ranges::default();
        if log_all {
            may_be_marked = self.writable.clone();
        }
        if log_used {
            may_be_marked.add(USED + USED_LOG, used_end - USED);
        }
        let mut allowed = vec![false; 8 * log.len()];
        may_be_marked
            .pages()
            .for_each(|page| allowed[page as usize] = true);
        for (page, allowed) in (0..).zip(allowed) {
            assert!(
                allowed || !marked(page),
                "page {page:#x} is in the log: nothing may have been written there"
            );
        }
    }

    /// Ends the worker, which finishes what is in flight.
    fn end_worker(&mut self) -> Option<super::super::ring::Ring> {
        let mut worker = self.worker.take()?;
        rustix::io::write(&self.host.stop, &1_u64.to_ne_bytes()).unwrap();
        let end = worker.serve(&self.host.stop);
        rustix::io::read(&self.host.stop, &mut [0; 8]).unwrap();
        assert!(matches!(end, End::Stopped(Ok(()))), "watches stay");
        let (ring, engine) = worker.into_parts();
        assert_eq!(engine.in_flight(), 0);
        let stored = self.stored();
        stored.engine = Some(engine);
        stored.disk.held.forget(0);
        self.writable = Ranges::default();
        Some(ring)
    }

    /// The front-end stops the queue.
    fn stop(&mut self) {
        if let (Some(ring), Some(vring)) = (self.end_worker(), &self.vring) {
            vring.stopped(&ring);
            let is_kept = self.in_flight().is_empty() || !self.record_is_of_none();
            assert!(is_kept, "what waits is not kept for the next start");
        }
    }

    /// Whether the record says that nothing was left.
    fn record_is_of_none(&self) -> bool {
        let mut version = [1; 2];
        self.host.record_file.read_exact_at(&mut version, 8).unwrap();
        version == [0; 2]
    }

    /// Ends the worker as a kill would: of what it does from then on, nothing is left but on storage.
    fn kill(&mut self) {
        let mut record = vec![0; len_for(1)];
        self.host.record_file.read_exact_at(&mut record, 0).unwrap();
        let memory = self.snapshot();
        drop(self.end_worker());
        self.host.record_file.write_all_at(&record, 0).unwrap();
        for (region, bytes) in REGIONS.iter().zip(memory) {
            self.write(region.start, &bytes);
        }
        self.vring = None;
    }

    /// The queue is stopped, and what was left in flight is answered.
    fn answer_left(&mut self) {
        let vring = self.vring();
        let disk = Arc::clone(&self.stored().disk);
        if let Ok(Some(mut ring)) = self.stands_on(|on| vring.with_left(0, on)) {
            left::answer(&mut ring, &disk);
            vring.stopped(&ring);
        }
        self.vring = Some(vring);
    }

    fn end(mut self) {
        self.stop();
        assert!(!sigbus::is_lost());
        let file = &self.stored().file;
        assert!(file.metadata().unwrap().len() <= BEYOND + CAPACITY + BEYOND);
        file.set_len(BEYOND + CAPACITY + BEYOND).unwrap();
        for at in [0, BEYOND + CAPACITY] {
            let mut beyond = [1; BEYOND as usize];
            file.read_exact_at(&mut beyond, at).unwrap();
            assert!(
                beyond.iter().all(|byte| *byte == 0),
                "something was written beyond the disk's end"
            );
        }
    }
}

/// Where two snapshots differ.
fn changed(before: &Snapshot, now: &Snapshot) -> Vec<Range<u64>> {
    let mut changed: Vec<Range<u64>> = Vec::new();
    for (region, (before, now)) in REGIONS.iter().zip(before.iter().zip(now)) {
        // Most pages have not changed.
        for (page, (before, now)) in (0..).zip(before.chunks(PAGE).zip(now.chunks(PAGE))) {
            if before == now {
                continue;
            }
            let start = region.start + page * PAGE as u64;
            for (at, _) in (start..)
                .zip(before.iter().zip(now))
                .filter(|(_, (one, two))| one != two)
            {
                match changed.last_mut() {
                    Some(last) if last.end == at => last.end += 1,
                    _ => changed.push(at..at + 1),
                }
            }
        }
    }
    changed
}

/// An address of three bytes: in the first MiB, or so close to the end of all addresses.
fn address(input: &mut Bytes<'_>) -> Option<u64> {
    let bytes = input.take(3)?;
    let low = u64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2] & 0xf, 0]));
    Some(if bytes[2] >= 0xf0 { u64::MAX - low } else { low })
}

/// A length of two bytes: in bytes, or in sectors.
fn len(input: &mut Bytes<'_>) -> Option<u32> {
    let number = u32::from(input.number()?);
    Some(if number < 0x8000 {
        number
    } else {
        (number & 0x7fff) << 9
    })
}

fn descriptor(address: u64, len: u32, flags: u8, next: u8) -> [u8; 16] {
    let (flags, next) = (u16::from(flags), u16::from(next));
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
