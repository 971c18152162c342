//! The dirty log, by which a front-end migrates a running guest (vhost-user specification, "Migration").
//!
//! The tests compare all of guest memory before and after requests: each page in which a byte has changed must be in the log, and the log
//! must hold no page that the device has no reason to write to. The ring is stopped before and after, so that the device writes nothing
//! at any other time.

use common::driver::*;
use common::frontend::*;
use common::memory::{BUFFERS, END, HOLE, LOG_PAGE, Log, Memory, SEAM};
use common::process::Process;
use common::queue::{Buf, Used, readable, writable};
use common::serve::{Server, serve};
use common::volume::Volume;
use common::{Random, pattern};
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress};

/// What a guest migrates by: the driver's features and the log.
struct Logging {
    driver: Driver,
    log: Log,
    /// Where the ring, which is stopped, goes on.
    base: u16,
}

/// What the device has done.
struct Seen {
    used: Vec<Used>,
    /// Pages of the log that stand for bytes that have changed.
    changed: BTreeSet<u64>,
    /// Pages that are in the log.
    marked: BTreeSet<u64>,
}

/// A part of the log's addresses where no memory is: for the used ring, so that its marks are no others'.
const ELSEWHERE: u64 = HOLE;

impl Logging {
    /// A session that logs all; writes to the used ring are logged at `used_log`.
    fn start(server: &Server, setup: Setup, used_log: Option<u64>) -> Self {
        let mut driver = Driver::unstarted(Frontend::connect(server.socket()), setup);
        let log = Log::of_memory(END);
        driver.frontend.set_log(&log);
        driver.log_all(true);
        driver.queue().used_log = used_log;
        Logging {
            driver,
            log,
            base: setup.base,
        }
    }

    /// Has the device carry out a request of each list of buffers.
    fn carry_out(&mut self, requests: &[Vec<Buf>]) -> Seen {
        let queue = self.driver.queue();
        let heads: Vec<_> = requests.iter().map(|buffers| queue.chain(buffers)).collect();
        self.carry_out_heads(&heads)
    }

    fn carry_out_heads(&mut self, heads: &[u16]) -> Seen {
        let driver = &mut self.driver;
        driver.queue().spoil_kick_request();
        self.log.clear();
        let before = contents(&driver.memory);
        driver.restart(0, self.base);
        // Only then has it written that.
        driver.queue().wait_kick_request();
        driver.queue().offer(heads);
        driver.queue().kick();
        let used = driver.queue().wait_used_many(heads.len());
        self.base = driver.frontend.stop_vring(0);
        let after = contents(&driver.memory);
        let marked = self.log.pages();
        let changed = changes(&before, &after)
            .into_iter()
            .filter_map(|at| self.log_page(at));
        Seen {
            used,
            changed: changed.collect(),
            marked,
        }
    }

    /// Where a byte is in the log; nowhere, if it is the driver's: the device never writes to the available ring.
    fn log_page(&self, at: u64) -> Option<u64> {
        let queue = &self.driver.queues[0];
        let entries = u64::from(queue.size);
        if (queue.avail..queue.avail + 6 + 2 * entries).contains(&at) {
            return None;
        }
        match queue.used_log {
            Some(log) if (queue.used..queue.used + 6 + 8 * entries).contains(&at) => {
                Some((log + at - queue.used) / LOG_PAGE)
            }
            _ => Some(at / LOG_PAGE),
        }
    }

    /// The pages of `buffers` that the device may write to, and those of the used ring.
    fn writable(&self, buffers: &[Buf]) -> BTreeSet<u64> {
        let queue = &self.driver.queues[0];
        let used = queue.used_log.map(|log| (log, 6 + 8 * u64::from(queue.size)));
        let writable = buffers.iter().filter(|buffer| buffer.write && buffer.len > 0);
        let ranges = writable.map(|buffer| (buffer.addr, buffer.len.into()));
        ranges
            .chain(used)
            .flat_map(|(at, len)| at / LOG_PAGE..=(at + len - 1) / LOG_PAGE)
            .collect()
    }

    /// Carries out a request of `buffers`, checks the log, and gives the status, which is the last byte of them.
    fn check(&mut self, name: &str, buffers: &[Buf], indirect: bool) -> u8 {
        let queue = self.driver.queue();
        let head = match indirect {
            true => queue.indirect_chain(buffers),
            false => queue.chain(buffers),
        };
        let seen = self.carry_out_heads(&[head]);
        assert_eq!(seen.used[0].head, head, "{name}");
        let missing: Vec<_> = seen.changed.difference(&seen.marked).collect();
        assert!(
            missing.is_empty(),
            "{name}: written and not in the log: {missing:x?}"
        );
        let writable = self.writable(buffers);
        let too_many: Vec<_> = seen.marked.difference(&writable).collect();
        assert!(
            too_many.is_empty(),
            "{name}: in the log and not written: {too_many:x?}"
        );
        let last = buffers.last().unwrap();
        self.driver.memory.read(last.addr + u64::from(last.len) - 1, 1)[0]
    }

    /// As [`Logging::check`], of a request as the driver builds it.
    fn check_request(&mut self, name: &str, kind: u32, sector: u64, data: Data<'_>) -> u8 {
        let mark = self.driver.memory.mark();
        let (_, buffers) = self.driver.build(kind, sector, data);
        let status = self.check(name, &buffers, false);
        self.driver.memory.free_to(mark);
        status
    }
}

/// The contents of guest memory, by region.
fn contents(memory: &Memory) -> Vec<(u64, Vec<u8>)> {
    let regions = memory.regions();
    regions
        .iter()
        .map(|region| (region.guest, region.bytes()))
        .collect()
}

/// Where bytes have changed.
fn changes(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> Vec<u64> {
    let mut changes = Vec::new();
    for ((start, before), (_, after)) in before.iter().zip(after) {
        for (page, (old, new)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
            if old != new {
                let bytes = (0..old.len()).filter(|&at| old[at] != new[at]);
                changes.extend(bytes.map(|at| start + (4096 * page + at) as u64));
            }
        }
    }
    changes
}

/// The features of a driver with the event index, and of one without it.
const FEATURES: [u64; 2] = [!0, !F_EVENT_IDX];

#[test]
fn each_page_that_a_request_writes_to_is_in_the_log_and_no_other() {
    let server = Server::new();
    let mut random = Random::new(14);
    for features in FEATURES {
        for used_log in [None, Some(ELSEWHERE)] {
            let setup = Setup {
                features,
                ..Setup::default()
            };
            let mut logging = Logging::start(&server, setup, used_log);
            // As QEMU has it.
            let used = logging.driver.queue().used;
            logging.driver.queue().used_log = used_log.or(Some(used));
            let ok = |status| assert_eq!(status, S_OK);

            ok(logging.check_request("write", T_OUT, 0, Data::Out(&pattern(1, 2 << 20))));
            for len in [SECTOR, 4096, 9 * SECTOR, 128 << 10, (1 << 20) + SECTOR] {
                ok(logging.check_request(&format!("read of {len}"), T_IN, 3, Data::In(len)));
            }
            ok(logging.check_request("read of nothing", T_IN, 0, Data::None));
            ok(logging.check_request("flush", T_FLUSH, 0, Data::None));
            let zeroes = range_bytes(&[(4000, 64, 0)]);
            ok(logging.check_request("write zeroes", T_WRITE_ZEROES, 0, Data::Out(&zeroes)));
            for len in [20, 5, 64] {
                ok(logging.check_request(&format!("ID of {len}"), T_GET_ID, 0, Data::In(len)));
            }
            for len in [4096, 60_000 / SECTOR * SECTOR] {
                let (mut buffers, _) = read_in_pieces(&logging.driver, &mut random, len);
                ok(logging.check("read in pieces", &buffers, false));
                buffers[0].addr = logging.driver.memory.filled(&header(T_IN, 8));
                ok(logging.check("indirect read in pieces", &buffers, true));
            }
            // The two regions are adjacent for the guest, and not in the device's address space.
            logging.driver.memory.place(SEAM - 5000, 16 * 512);
            let mut buffers = logging.driver.build(T_IN, 0, Data::None).1;
            buffers.insert(1, writable(SEAM - 5000, 16 * 512));
            ok(logging.check("read over a seam", &buffers, false));

            assert_eq!(
                logging.check_request("beyond the end", T_IN, 1 << 40, Data::In(4096)),
                S_IOERR
            );
            assert_eq!(
                logging.check_request("half a sector", T_IN, 0, Data::In(256)),
                S_IOERR
            );
            assert_eq!(logging.check_request("unknown", 99, 0, Data::In(4096)), S_UNSUPP);
            let status = logging.driver.memory.buffer(1);
            let short = [
                readable(logging.driver.memory.filled(&[0; 8]), 8),
                writable(status, 1),
            ];
            assert_eq!(logging.check("short header", &short, false), S_IOERR);
            // There is no status: nothing but the used ring is written to.
            let no_status = [readable(logging.driver.memory.filled(&header(T_FLUSH, 0)), 16)];
            logging.check("no status", &no_status, false);
        }
    }
}

/// A read into buffers of any length, some of one byte, the last of which takes the status.
fn read_in_pieces(driver: &Driver, random: &mut Random, len: usize) -> (Vec<Buf>, u64) {
    let memory = &driver.memory;
    let mut buffers = vec![readable(memory.filled(&header(T_IN, 0)), 16)];
    let data = memory.buffer(3 * len as u64);
    for (at, piece) in random.pieces(len + 1) {
        // With gaps, so that a page may be left out.
        buffers.push(writable(data + 2 * at, piece));
    }
    (buffers, data)
}

#[test]
fn a_read_that_fails_after_a_part_has_that_part_in_the_log() {
    let volume = Volume::new();
    let server = Server::with(&volume, &[]);
    let mut logging = Logging::start(&server, Setup::default(), Some(ELSEWHERE));
    logging.check_request("write", T_OUT, 0, Data::Out(&pattern(2, 2 << 20)));
    volume
        .file()
        .set_len(volume.payload_offset() + (600 << 10))
        .unwrap();
    let data = logging.driver.build(T_IN, 0, Data::In(1 << 20)).1;
    assert_eq!(logging.check("read past the file's end", &data, false), S_IOERR);
    let written = logging.driver.memory.read(data[1].addr, 512 << 10);
    assert!(
        written.iter().any(|byte| *byte != common::memory::UNTOUCHED),
        "no part was read"
    );
}

/// Of the used ring, one page of the log ends before a field, so that its mark cannot be another field's.
#[test]
fn each_field_of_the_used_ring_is_in_the_log() {
    let server = Server::new();
    // With an event index: idx, ring, avail_event. Without: flags, idx, ring.
    for (features, cut, fields) in [
        (FEATURES[1], 2, "flags | idx, ring"),
        (FEATURES[1], 4, "flags, idx | ring"),
        (FEATURES[0], 4, "idx | ring, avail_event"),
        (FEATURES[0], 4 + 8 * 8, "idx, ring | avail_event"),
    ] {
        let used_log = ELSEWHERE + LOG_PAGE - cut;
        let setup = Setup {
            queue_size: 8,
            features,
            ..Setup::default()
        };
        let mut logging = Logging::start(&server, setup, Some(used_log));
        for round in 0..20 {
            let flush = logging.driver.build(T_FLUSH, 0, Data::None).1;
            let seen = logging.carry_out(&[flush]);
            let both = BTreeSet::from([ELSEWHERE / LOG_PAGE, ELSEWHERE / LOG_PAGE + 1]);
            assert!(
                seen.marked.is_superset(&both),
                "{fields}, round {round}: {:x?}",
                seen.marked
            );
            assert!(seen.marked.is_superset(&seen.changed), "{fields}");
        }
    }
}

/// The front-end takes marks and copies pages all the time, as in a migration. Of a write that comes after its mark, it can have copied
/// what was there before.
#[test]
fn a_copy_that_follows_the_log_is_what_the_guest_has_after_each_request() {
    let server = Server::new();
    let mut logging = Logging::start(&server, Setup::default(), Some(ELSEWHERE));
    let len = 128 << 10;
    logging.check_request("write", T_OUT, 0, Data::Out(&pattern(3, 4 * len)));
    let data = BUFFERS + (8 << 20);
    logging.driver.memory.place(data, len as u64);
    let reads = [0, 1, 2, 3].map(|which: u64| {
        let mut buffers = logging.driver.build(T_IN, which * 256, Data::None).1;
        buffers.insert(1, writable(data, len));
        buffers
    });
    let (memory, words) = (logging.driver.memory.map(), logging.log.words());
    let copy = Mutex::new(logging.driver.memory.read(data, len));
    let passes = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let driver = &mut logging.driver;
    driver.restart(0, logging.base);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                for page in words.take(data / LOG_PAGE..(data + len as u64) / LOG_PAGE) {
                    let at = (page * LOG_PAGE - data) as usize;
                    let target = &mut copy.lock().unwrap()[at..at + LOG_PAGE as usize];
                    memory.read_slice(target, GuestAddress(page * LOG_PAGE)).unwrap();
                }
                passes.fetch_add(1, Ordering::SeqCst);
            }
        });
        let checked = catch_unwind(AssertUnwindSafe(|| {
            for round in 0..300 {
                let head = driver.queue().chain(&reads[round % reads.len()]);
                driver.run_head(head);
                // The one that goes on now, and a whole one.
                let seen = passes.load(Ordering::SeqCst);
                while passes.load(Ordering::SeqCst) < seen + 2 {
                    std::thread::yield_now();
                }
                let is_whole = *copy.lock().unwrap() == driver.memory.read(data, len);
                assert!(is_whole, "round {round}: a page was copied before it was written");
            }
        }));
        stop.store(true, Ordering::SeqCst);
        checked.unwrap_or_else(|panic| resume_unwind(panic));
    });
}

#[test]
fn the_used_ring_is_logged_where_the_front_end_says_and_only_if_it_does() {
    let server = Server::new();
    let mut logging = Logging::start(&server, Setup::default(), Some(ELSEWHERE));
    for (all, used_log) in [
        (true, Some(ELSEWHERE)),
        (true, Some(ELSEWHERE + (64 << 20))),
        (true, None),
        (false, Some(ELSEWHERE)),
        (false, None),
        (true, Some(ELSEWHERE)),
    ] {
        logging.driver.log_all(all);
        logging.driver.queue().used_log = used_log;
        let request = logging.driver.build(T_IN, 0, Data::In(4096)).1;
        let data = request[1].addr / LOG_PAGE;
        let seen = logging.carry_out(&[request]);
        assert_eq!(seen.marked.contains(&data), all, "{all}, {used_log:x?}");
        let elsewhere = |page: &u64| (HOLE..BUFFERS).contains(&(page * LOG_PAGE));
        let of_used: Vec<_> = seen.marked.into_iter().filter(elsewhere).collect();
        assert_eq!(
            of_used,
            used_log.map(|at| at / LOG_PAGE).as_slice(),
            "{all}, {used_log:x?}"
        );
    }
}

#[test]
fn nothing_is_logged_before_and_after_a_migration() {
    let server = Server::new();
    let mut driver = server.connect();
    let log = Log::of_memory(END);
    driver.still_serves();
    driver.frontend.set_log(&log);
    driver.still_serves();
    assert_eq!(log.pages(), BTreeSet::new(), "a log alone is no order to log");

    // As QEMU begins it, while the ring runs.
    let used = driver.queue().used;
    driver.log_all(true);
    driver.queue().used_log = Some(used);
    driver.set_vring_addr(0);
    driver.still_serves();
    assert!(!log.pages().is_empty());

    // And ends it.
    driver.log_all(false);
    driver.queue().used_log = None;
    driver.set_vring_addr(0);
    log.clear();
    driver.still_serves();
    assert_eq!(log.pages(), BTreeSet::new());

    // The next one has a log of its own.
    let next = Log::of_memory(END);
    driver.frontend.set_log(&next);
    driver.log_all(true);
    driver.still_serves();
    assert!(!next.pages().is_empty());
    assert_eq!(log.pages(), BTreeSet::new());
}

/// The log grows before the memory does; after the answer nothing goes to the one before.
#[test]
fn memory_that_is_plugged_in_during_a_migration_is_logged_in_the_new_log() {
    let server = Server::new();
    let mut logging = Logging::start(&server, Setup::default(), Some(ELSEWHERE));
    logging.check_request("before", T_IN, 0, Data::In(4096));
    let plugged = 5 << 30;
    let larger = Log::of_memory(plugged + (1 << 20));
    logging.driver.frontend.set_log(&larger);
    let before = std::mem::replace(&mut logging.log, larger);
    before.clear();
    logging.check_request("larger log", T_IN, 0, Data::In(4096));
    let region = logging.driver.memory.plug(plugged, 1 << 20);
    logging.driver.frontend.add_region(&region);
    logging.driver.memory.place(plugged + 5000, 4096);
    let mut buffers = logging.driver.build(T_IN, 0, Data::None).1;
    buffers.insert(1, writable(plugged + 5000, 4096));
    assert_eq!(logging.check("plugged memory", &buffers, false), S_OK);
    assert_eq!(before.pages(), BTreeSet::new());
}

/// When a back-end is started again in the middle of a migration, QEMU sends all but ENABLE before the log.
#[test]
fn a_ring_that_is_to_log_rests_until_it_has_a_log_of_all_memory() {
    let server = Server::new();
    let mut driver = Driver::unstarted(Frontend::connect(server.socket()), Setup::default());
    let used = driver.queue().used;
    driver.log_all(true);
    driver.queue().used_log = Some(used);
    driver.frontend.start_vring(&driver.queues[0], &driver.memory, 0);
    let log = Log::of_memory(END);
    driver.frontend.set_log(&log);
    driver.frontend.enable(0, true);
    driver.still_serves();
    assert!(log.pages().contains(&(used / LOG_PAGE)));
    drop(driver);

    // Without a log, and with one that is too short for the memory, or for where the used ring is to be logged.
    let half = Log::of_memory(END / 2);
    for (log, all, used_log) in [
        (None, true, None),
        (None, false, Some(0)),
        (Some(&half), true, None),
        (Some(&log), true, Some(END)),
        (Some(&log), true, Some(u64::MAX - 4)),
    ] {
        let mut driver = Driver::unstarted(Frontend::connect(server.socket()), Setup::default());
        if let Some(log) = log {
            driver.frontend.set_log(log);
        }
        driver.log_all(all);
        driver.queue().used_log = used_log;
        driver.frontend.start_vring(&driver.queues[0], &driver.memory, 0);
        driver.frontend.enable(0, true);
        let request = driver.build(T_IN, 0, Data::In(4096)).1;
        let head = driver.queue().chain(&request);
        driver.queue().offer(&[head]);
        driver.queue().kick();
        // Whatever a ring does that runs, it has done when it is stopped.
        assert_eq!(driver.frontend.stop_vring(0), 0, "{all}, {used_log:x?}");
        assert_eq!(driver.queue().poll_used(), None);
        server.process.wait_stderr("has given no log of all of it");

        // With one it is served.
        let log = Log::of_memory(END);
        driver.frontend.set_log(&log);
        driver.queue().used_log = used_log.map(|_| 0);
        driver.restart(0, 0);
        assert_eq!(driver.queue().wait_used().head, head);
        assert_ne!(log.pages(), BTreeSet::new());
    }
}

/// It may have ended between a write and its mark.
#[test]
fn what_a_killed_server_has_put_into_the_used_ring_is_in_the_log() {
    let volume = Volume::new();
    let socket = volume.beside("vhost.sock");
    let mut process = Process::spawn(&mut serve(&volume, &socket, &[]));
    let setup = Setup {
        queue_size: 1024,
        ..Setup::default()
    };
    let mut driver = Driver::tracked(&socket, setup);
    driver.still_serves();
    process.signal(Signal::KILL);
    process.wait();
    let _process = Process::spawn(&mut serve(&volume, &socket, &[]));
    let used = driver.queue().used;
    driver.queue().used_log = Some(used);
    driver.log = Some(Log::of_memory(END));
    driver.reconnect(&socket);
    // The second page of three: the start of a ring writes nothing there.
    let pages = driver.log.as_ref().unwrap().pages();
    assert!(pages.contains(&(used / LOG_PAGE + 1)), "{pages:x?}");
    driver.still_serves();
}

#[test]
fn a_log_that_could_fail_us_is_refused() {
    let server = Server::new();
    let sealed = |len| OwnedFd::from(Log::new(len).file);
    let read_only = |file: &OwnedFd| {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        OwnedFd::from(File::open(path).unwrap())
    };
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.set_len(1 << 20).unwrap();
    let in_shm = tempfile::tempfile_in("/dev/shm").unwrap();
    in_shm.set_len(1 << 20).unwrap();
    const MIB: u64 = 1 << 20;
    let cases: Vec<(&str, Vec<OwnedFd>, u64, u64, u64)> = vec![
        (
            "one that can shrink",
            vec![Log::unsealed(MIB).file.into()],
            MIB,
            0,
            !0,
        ),
        ("a file", vec![on_disk.into()], MIB, 0, !0),
        ("a file of tmpfs", vec![in_shm.into()], MIB, 0, !0),
        (
            "a device",
            vec![File::open("/dev/null").unwrap().into()],
            MIB,
            0,
            !0,
        ),
        ("a read-only one", vec![read_only(&sealed(MIB))], MIB, 0, !0),
        ("none", vec![], MIB, 0, !0),
        ("two", vec![sealed(MIB), sealed(MIB)], MIB, 0, !0),
        ("beyond its file", vec![sealed(MIB)], MIB + 1, 0, !0),
        ("an offset beyond its file", vec![sealed(MIB)], MIB, 4096, !0),
        (
            "an offset that overflows",
            vec![sealed(MIB)],
            MIB,
            u64::MAX - 4095,
            !0,
        ),
        ("an offset within a page", vec![sealed(MIB)], 4096, 8, !0),
        ("of no bytes", vec![sealed(MIB)], 0, 0, !0),
        ("not agreed on", vec![sealed(MIB)], MIB, 0, !PROTOCOL_LOG_SHMFD),
    ];
    for (name, files, len, offset, protocol) in cases {
        let setup = Setup {
            protocol,
            ..Setup::default()
        };
        let mut driver = server.connect_with(setup);
        driver.still_serves();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        driver
            .frontend
            .send(SET_LOG_BASE, 0, &log_base(len, offset), &files);
        assert!(driver.frontend.receive().is_none(), "{name}: accepted");
        drop(driver);
        server.still_serves();
    }
    server.stop();
}
