//! Storage that fails under a guest: what the guest sees of each failure, what waits, and what becomes of that.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::driver::{
    Data, Done, Driver, F_FLUSH, Pending, S_IOERR, S_OK, Setup, T_DISCARD, T_FLUSH, T_IN, T_OUT,
    T_WRITE_ZEROES, range_bytes,
};
use common::frontend::{GET_VRING_BASE, RESET_DEVICE, SET_VRING_CALL, VERSION, vring_state};
use common::fuse::{Fault, Fuse, Operation};
use common::pattern;
use common::serve::{Server, sealblk_path, serve};
use common::storage::Filesystem;
use common::volume::{MIB, Volume, run};
use rustix::process::Signal;
use serde_json::Value;

/// Long enough for an answer to come that must not come.
const A_WHILE: Duration = Duration::from_millis(300);

/// Where the payload begins: faults leave the header alone.
const PAYLOAD: u64 = 16 * MIB;

const EIO: i32 = 5;
const ENXIO: i32 = 6;
const ENODEV: i32 = 19;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;

const STOP: [&str; 4] = ["--on-full", "stop", "--on-error", "stop"];
const REPORT: [&str; 4] = ["--on-full", "report", "--on-error", "report"];

/// A served volume on storage that can fail.
struct Failing {
    server: Option<Server>,
    control: PathBuf,
    socket: PathBuf,
    volume: Volume,
    fuse: Fuse,
}

impl Failing {
    fn start(args: &[&str]) -> Option<Self> {
        // With these sectors it has direct I/O.
        Self::with_sectors(4096, args)
    }

    fn with_sectors(sector_size: u32, args: &[&str]) -> Option<Self> {
        let mut volume = Volume::created(4 * MIB, sector_size);
        let fuse = Fuse::over(volume.file());
        if fuse.is_none() {
            eprintln!("skipped: nothing can be mounted here");
        }
        let fuse = fuse?;
        fuse.take_discards();
        volume.path = fuse.path();
        let mut failing = Failing {
            server: None,
            control: volume.beside("control"),
            socket: volume.beside("sock"),
            volume,
            fuse,
        };
        failing.serve(args);
        Some(failing)
    }

    fn serve(&mut self, args: &[&str]) {
        let control = self.control.to_str().unwrap();
        let args = [args, &["--discard", "--control-socket", control]].concat();
        let command = &mut serve(&self.volume, &self.socket, &args);
        self.server = Some(Server::at(command, self.socket.clone()));
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    fn fail(&self, operation: Operation, fault: Fault) {
        self.fuse.fail(operation, fault, PAYLOAD);
    }

    /// What a verb says.
    fn control(&self, args: &[&str]) -> String {
        let mut command = Command::new(sealblk_path());
        let said = run(command.args(args).arg("--control-socket").arg(&self.control));
        String::from_utf8(said.stdout).unwrap()
    }

    fn status(&self) -> Value {
        let mut command = Command::new(sealblk_path());
        let told = run(command
            .args(["status", "--json", "--control-socket"])
            .arg(&self.control));
        serde_json::from_slice(&told.stdout).unwrap()
    }

    /// Waits until requests wait.
    fn wait_held(&self, by: &str) {
        let start = Instant::now();
        loop {
            let held = &self.status()["held"];
            if held["by"] == by {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "nothing waits: {held}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// A write that waits, since storage fails it with EIO.
    fn held_write(&self, driver: &mut Driver, sector: u64, bytes: &[u8]) -> Pending {
        self.fail(Operation::Write, Fault::Error(EIO));
        let pending = driver.submit(0, T_OUT, sector, Data::Out(bytes));
        self.wait_held("error");
        pending
    }
}

fn wait_for(what: &str, is_there: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_there() {
        assert!(start.elapsed() < DEADLINE, "{what} does not come");
        thread::sleep(Duration::from_millis(5));
    }
}

fn outcome(driver: &mut Driver, pending: &Pending) -> Done {
    let used = driver.queue().wait_used();
    assert_eq!(used.head, pending.head);
    driver.outcome(pending, used)
}

/// Each kind of operation, failed in each way, for both policies. What the guest was told is written is there in the end.
#[test]
fn what_a_guest_sees_of_each_failure() {
    for (policy, args) in [("report", REPORT), ("stop", STOP)] {
        let Some(mut failing) = Failing::start(&args) else {
            return;
        };
        let mut driver = failing.server().connect();
        let mut written = Vec::new();
        let cases = [
            (T_IN, Operation::Read),
            (T_OUT, Operation::Write),
            (T_WRITE_ZEROES, Operation::Write),
            (T_FLUSH, Operation::Sync),
            (T_DISCARD, Operation::Discard),
        ];
        let faults = [EIO, ENXIO, ENODEV, ENOSPC, EDQUOT].map(Fault::Error);
        let faults = faults.into_iter().chain([Fault::Short, Fault::End]);
        for (number, (fault, (kind, operation))) in faults
            .flat_map(|fault| cases.map(|case| (fault, case)))
            .enumerate()
        {
            let case = format!("{policy}: request {kind}, {fault:?}");
            let is_transfer = matches!(operation, Operation::Read | Operation::Write);
            // Linux makes an error of a direct write that FUSE has done in part; tmpfs shows the rest below.
            let is_possible = match fault {
                Fault::Error(_) => true,
                Fault::Short => operation == Operation::Read,
                Fault::End => is_transfer,
            };
            if !is_possible {
                continue;
            }
            let (sector, bytes) = (8 * 16 * (1 + number as u64), pattern(number as u64, 64 << 10));
            driver.write(sector, &bytes);
            let data = pattern(1000 + number as u64, 64 << 10);
            let ranges = range_bytes(&[(sector, 128, 0)]);
            failing.fail(operation, fault);
            let mark = driver.memory.mark();
            let pending = driver.submit(
                0,
                kind,
                if [T_IN, T_OUT].contains(&kind) { sector } else { 0 },
                match kind {
                    T_IN => Data::In(bytes.len()),
                    T_OUT => Data::Out(&data),
                    T_FLUSH => Data::None,
                    _ => Data::Out(&ranges),
                },
            );
            // A transfer that is short goes on; at the end nothing does.
            let waits = policy == "stop" && is_transfer && fault != Fault::Short;
            let is_full = [ENOSPC, EDQUOT].map(Fault::Error).contains(&fault);
            if waits {
                failing.wait_held(if is_full { "full" } else { "error" });
                thread::sleep(A_WHILE);
                assert!(driver.queue().poll_used().is_none(), "{case}: it is answered");
                assert!(failing.fuse.heal() > 0);
                if !is_full {
                    failing.control(&["resume"]);
                }
            }
            let done = outcome(&mut driver, &pending);
            assert!(waits || failing.fuse.heal() > 0, "{case}: nothing failed");
            let expected = if waits || fault == Fault::Short {
                S_OK
            } else {
                S_IOERR
            };
            assert_eq!(done.status, expected, "{case}");
            driver.memory.free_to(mark);
            if kind == T_IN && expected == S_OK {
                assert!(done.data == bytes, "{case}: other data are read");
            }
            // It works again; and what was answered is known.
            driver.flush();
            written.push(match (kind, done.status) {
                (T_IN | T_FLUSH, _) => (case, sector, bytes),
                (T_OUT, S_OK) => (case, sector, data),
                (T_WRITE_ZEROES, S_OK) => (case, sector, vec![0; data.len()]),
                _ => continue,
            });
        }
        assert_eq!(failing.status()["held"], Value::Null);
        drop(driver);
        failing.server.take().unwrap().stop();
        failing.serve(&args);
        let mut driver = failing.server().connect();
        for (case, sector, bytes) in written {
            assert!(driver.read(sector, bytes.len()) == bytes, "{case}: lost");
        }
    }
}

/// A driver that cannot flush has each write on stable storage before it is answered.
#[test]
fn a_durable_write_waits_too() {
    let Some(failing) = Failing::start(&STOP) else {
        return;
    };
    let mut driver = failing.server().connect_with(Setup {
        features: !F_FLUSH,
        ..Setup::default()
    });
    let bytes = pattern(1, 8192);
    failing.fail(Operation::Write, Fault::Error(EIO));
    let pending = driver.submit(0, T_OUT, 64, Data::Out(&bytes));
    failing.wait_held("error");
    assert!(failing.fuse.heal() > 0);
    let said = failing.control(&["resume"]);
    assert!(said.contains("tried again: 1 "), "{said}");
    assert_eq!(outcome(&mut driver, &pending).status, S_OK);
    assert!(driver.read(64, bytes.len()) == bytes);
    failing.server().process.wait_stderr("event=RequestsResumed");
    assert!(failing.control(&["resume"]).contains("no request waited"));
    assert!(failing.control(&["status"]).contains("held: no other process"));
}

/// With the page cache, data that a failed flush was for are not on storage, and no later flush puts them there.
#[test]
fn a_flush_that_failed_through_the_page_cache_is_never_forgotten() {
    let Some(failing) = Failing::with_sectors(512, &STOP) else {
        return;
    };
    let mut driver = failing.server().connect();
    driver.write(64, &pattern(1, 8192));
    failing.fail(Operation::Sync, Fault::Error(ENOSPC));
    assert_eq!(driver.run(T_FLUSH, 0, Data::None).status, S_IOERR);
    failing.fuse.heal();
    failing.control(&["resume"]);
    for _ in 0..3 {
        assert_eq!(driver.run(T_FLUSH, 0, Data::None).status, S_IOERR);
    }
}

/// Others go on, and what waits is carried out once, whatever changes meanwhile.
#[test]
fn what_waits_stays_in_flight_over_pauses_locks_and_resizes() {
    let Some(failing) = Failing::start(&STOP) else {
        return;
    };
    let mut driver = failing.server().connect_with(Setup {
        queues: 2,
        ..Setup::default()
    });
    let bytes = pattern(1, 256 << 10);
    let pending = failing.held_write(&mut driver, 64, &bytes);
    driver.memory.mark();
    let read = driver.run_on(1, T_IN, 0, Data::In(4096));
    assert_eq!(read.status, S_OK, "others wait too");

    driver.frontend.set_memory(&driver.memory);
    failing.wait_held("error");
    driver.frontend.enable(0, false);
    driver.frontend.enable(0, true);
    failing.wait_held("error");
    failing.control(&["resume"]);
    failing.wait_held("error");
    failing.control(&["resize", "--size", "5M"]);
    failing.wait_held("error");
    failing.control(&["lock"]);
    assert_eq!(failing.status()["state"], "locked");
    failing.fuse.heal();
    thread::sleep(A_WHILE);
    assert!(driver.queue().poll_used().is_none(), "answered while locked");
    failing.control(&["unlock"]);
    assert_eq!(outcome(&mut driver, &pending).status, S_OK);
    assert!(driver.read(64, bytes.len()) == bytes);
    driver.still_serves();
    let log = failing.server().process.stderr();
    assert!(log.contains("event=RequestsHeld"), "{log}");
}

/// Full storage is tried again by itself, also for many requests that are more than the pool has room for.
#[test]
fn all_that_waits_for_space_continues_when_there_is_some() {
    let Some(failing) = Failing::start(&["--pool-size", "1M"]) else {
        return;
    };
    let mut driver = failing.server().connect();
    failing.fail(Operation::Write, Fault::Error(ENOSPC));
    let writes: Vec<_> = (0..24_u64)
        .map(|number| {
            let bytes = pattern(number, 128 << 10);
            let sector = number * 256;
            (driver.submit(0, T_OUT, sector, Data::Out(&bytes)), sector, bytes)
        })
        .collect();
    failing.wait_held("full");
    assert!(driver.queue().poll_used().is_none());
    failing.fuse.heal();
    for _ in &writes {
        let used = driver.queue().wait_used();
        let (pending, ..) = writes
            .iter()
            .find(|(pending, ..)| pending.head == used.head)
            .unwrap();
        assert_eq!(driver.outcome(pending, used).status, S_OK);
    }
    for (_, sector, bytes) in &writes {
        assert!(driver.read(*sector, bytes.len()) == *bytes);
    }
    assert_eq!(failing.status()["held"], Value::Null);
    failing.server().process.wait_stderr("event=RequestsResumed");
}

/// As QEMU keeps it: the next process carries out what waited.
#[test]
fn what_waits_is_carried_out_by_the_next_process() {
    for signal in [Signal::TERM, Signal::KILL] {
        let Some(mut failing) = Failing::start(&STOP) else {
            return;
        };
        let mut driver = Driver::tracked(&failing.socket, Setup::default());
        let bytes = pattern(1, 256 << 10);
        let pending = failing.held_write(&mut driver, 64, &bytes);
        let mut server = failing.server.take().unwrap();
        server.process.signal(signal);
        let ended = server.process.wait();
        assert_eq!(ended.status.success(), signal == Signal::TERM, "{ended:?}");
        assert!(driver.queue().poll_used().is_none(), "{signal:?}: answered");
        failing.serve(&STOP);
        driver.reconnect(&failing.socket);
        failing.wait_held("error");
        failing.fuse.heal();
        failing.control(&["resume"]);
        assert_eq!(outcome(&mut driver, &pending).status, S_OK, "{signal:?}");
        assert!(driver.read(64, bytes.len()) == bytes);
        driver.still_serves();
    }
}

/// QEMU blocks in GET_VRING_BASE, and may migrate the guest then, which takes no request in flight along.
#[test]
fn what_waits_is_answered_with_an_error_when_the_guest_stops_or_is_reset() {
    for is_locked in [false, true] {
        for disable_first in [false, true] {
            let Some(failing) = Failing::start(&STOP) else {
                return;
            };
            let mut driver = Driver::tracked(&failing.socket, Setup::default());
            let pending = failing.held_write(&mut driver, 64, &pattern(1, 256 << 10));
            if is_locked {
                failing.control(&["lock"]);
            }
            if disable_first {
                driver.frontend.enable(0, false);
            }
            let base = driver.frontend.stop_vring(0);
            assert_eq!(outcome(&mut driver, &pending).status, S_IOERR);
            assert_eq!(base, driver.queues[0].used_index());
            failing.fuse.heal();
            if is_locked {
                failing.control(&["unlock"]);
            }
            driver.restart(0, base);
            driver.still_serves();
        }
    }
    let Some(failing) = Failing::start(&STOP) else {
        return;
    };
    let mut driver = Driver::tracked(&failing.socket, Setup::default());
    let pending = failing.held_write(&mut driver, 64, &pattern(1, 4096));
    driver.frontend.tell(RESET_DEVICE, &[], &[]);
    assert_eq!(outcome(&mut driver, &pending).status, S_IOERR);
}

/// Nothing would ever answer it.
#[test]
fn what_waits_of_a_front_end_that_keeps_no_record_is_answered_at_the_end() {
    let Some(mut failing) = Failing::start(&STOP) else {
        return;
    };
    let mut driver = failing.server().connect();
    let pending = failing.held_write(&mut driver, 64, &pattern(1, 4096));
    failing.server.take().unwrap().stop();
    assert_eq!(outcome(&mut driver, &pending).status, S_IOERR);
}

/// The storage that is full takes the beginning of a write.
#[test]
fn a_full_file_system_takes_the_rest_when_it_has_grown() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Filesystem::tmpfs(dir.path().join("small"), 24 * MIB) else {
        return;
    };
    let disk = small.path.join("disk");
    let volume = Volume::created_at(dir, disk, &["--size", "32M"]);
    let server = Server::with(&volume, &[]);
    let mut driver = server.connect();
    let chunk = |number: u64| pattern(number, 1 << 20);
    // Fewer than these fit.
    let writes: Vec<_> = (0..10_u64)
        .map(|number| driver.submit(0, T_OUT, number * 2048, Data::Out(&chunk(number))))
        .collect();
    server.process.wait_stderr("the storage is full");
    let mut remount = Command::new("mount");
    run(remount.args(["-o", "remount,size=64M"]).arg(&small.path));
    for _ in &writes {
        let used = driver.queue().wait_used();
        let pending = writes.iter().find(|pending| pending.head == used.head).unwrap();
        assert_eq!(driver.outcome(pending, used).status, S_OK);
    }
    for number in 0..10 {
        assert!(driver.read(number * 2048, 1 << 20) == chunk(number), "{number}");
    }
    driver.flush();
}

/// A write that storage does not answer.
fn hung_write(failing: &Failing, driver: &mut Driver, bytes: &[u8]) -> Pending {
    failing.fuse.set_late(true);
    let pending = driver.submit(0, T_OUT, 64, Data::Out(bytes));
    let start = Instant::now();
    while failing.fuse.writes_under_way() == 0 {
        assert!(start.elapsed() < DEADLINE, "nothing is written");
        thread::sleep(Duration::from_millis(1));
    }
    failing.fuse.set_late(false);
    pending
}

const SOON: [&str; 2] = ["--stop-timeout", "1"];

/// QEMU would block in GET_VRING_BASE, and the stale write would overwrite what the guest has written since.
#[test]
fn storage_that_hangs_does_not_keep_the_guest_from_stopping_and_overwrites_nothing_later() {
    let Some(failing) = Failing::start(&SOON) else {
        return;
    };
    let mut driver = Driver::tracked(
        &failing.socket,
        Setup {
            queues: 4,
            ..Setup::default()
        },
    );
    let [stale, fresh] = [1, 2].map(|seed| pattern(seed, 4096));
    let pending = hung_write(&failing, &mut driver, &stale);
    let bases: Vec<_> = (0..4).map(|queue| driver.frontend.stop_vring(queue)).collect();
    assert_eq!(outcome(&mut driver, &pending).status, S_IOERR);
    failing.wait_held("hung");
    assert_eq!(failing.status()["claim"]["state"], "held");
    for (queue, base) in bases.iter().enumerate() {
        driver.restart(queue, *base);
    }
    let write = driver.submit(0, T_OUT, 64, Data::Out(&fresh));
    thread::sleep(A_WHILE);
    assert!(
        driver.queue().poll_used().is_none(),
        "served beside a stale write"
    );
    failing.fuse.let_writes_land();
    assert_eq!(outcome(&mut driver, &write).status, S_OK);
    assert!(
        driver.read(64, fresh.len()) == fresh,
        "overwritten by a stale write"
    );
    driver.still_serves();
    assert_eq!(failing.status()["held"], Value::Null);
}

#[test]
fn a_lock_is_in_force_although_storage_hangs_and_the_write_is_carried_out_after_it() {
    let Some(failing) = Failing::start(&SOON) else {
        return;
    };
    let mut driver = failing.server().connect();
    let bytes = pattern(1, 4096);
    let pending = hung_write(&failing, &mut driver, &bytes);
    failing.control(&["lock"]);
    assert_eq!(failing.status()["state"], "locked");
    failing.control(&["unlock"]);
    thread::sleep(A_WHILE);
    assert!(driver.queue().poll_used().is_none(), "answered");
    failing.fuse.let_writes_land();
    assert_eq!(outcome(&mut driver, &pending).status, S_OK);
    assert!(driver.read(64, bytes.len()) == bytes);
    driver.still_serves();
}

/// The next process waits for the write, as for that of a killed one, and carries it out again.
#[test]
fn sigterm_ends_a_process_whose_storage_hangs() {
    let Some(mut failing) = Failing::start(&SOON) else {
        return;
    };
    let mut driver = Driver::tracked(&failing.socket, Setup::default());
    let bytes = pattern(1, 4096);
    let pending = hung_write(&failing, &mut driver, &bytes);
    failing.server.take().unwrap().stop();
    failing.serve(&SOON);
    driver.reconnect(&failing.socket);
    thread::sleep(A_WHILE);
    assert!(driver.queue().poll_used().is_none(), "answered");
    failing.fuse.let_writes_land();
    assert_eq!(outcome(&mut driver, &pending).status, S_OK);
    assert!(driver.read(64, bytes.len()) == bytes);
    driver.still_serves();
}

/// The guest's flush is carried out again when storage answers, and the kernel tells of a failure once.
#[test]
fn a_flush_that_hangs_and_then_fails_is_not_forgotten() {
    for sector_size in [512, 4096] {
        let Some(failing) = Failing::with_sectors(sector_size, &SOON) else {
            return;
        };
        let mut driver = failing.server().connect();
        driver.write(64, &pattern(1, 8192));
        failing.fuse.ignore(failing.server().process.pid());
        let pending = driver.submit(0, T_FLUSH, 0, Data::None);
        wait_for("a sync", || failing.fuse.is_asked());
        // A ring is stopped for this, and started again.
        driver
            .frontend
            .set_vring_fd(SET_VRING_CALL, 0, Some(&driver.queues[0].call));
        failing.wait_held("hung");
        failing.fuse.answer_by(EIO);
        assert_eq!(outcome(&mut driver, &pending).status, S_IOERR, "{sector_size}");
        let is_cached = sector_size == 512;
        let status = driver.run(T_FLUSH, 0, Data::None).status;
        assert_eq!(status, if is_cached { S_IOERR } else { S_OK });
    }
}

/// What has not landed of one queue can overwrite what another one writes.
#[test]
fn no_queue_is_served_beside_one_that_waits_for_storage_after_it_was_stopped() {
    let Some(failing) = Failing::start(&SOON) else {
        return;
    };
    let mut driver = failing.server().connect_with(Setup {
        queues: 2,
        ..Setup::default()
    });
    let [stale, fresh] = [1, 2].map(|seed| pattern(seed, 4096));
    let pending = hung_write(&failing, &mut driver, &stale);
    // The driver tries again as soon as it hears of the failure, before the front-end has its answer.
    driver
        .frontend
        .send(GET_VRING_BASE, VERSION, &vring_state(0, 0), &[]);
    let start = Instant::now();
    let used = loop {
        if let Some(used) = driver.queue().poll_used() {
            break used;
        }
        assert!(start.elapsed() < DEADLINE, "the write is not answered");
    };
    let write = driver.submit(1, T_OUT, 64, Data::Out(&fresh));
    assert_eq!(driver.outcome(&pending, used).status, S_IOERR);
    driver.frontend.receive().expect("the ring's base");
    thread::sleep(A_WHILE);
    assert!(
        driver.queues[1].poll_used().is_none(),
        "served beside a stale write"
    );
    failing.fuse.let_writes_land();
    let used = driver.queues[1].wait_used();
    assert_eq!(driver.outcome(&write, used).status, S_OK);
    let read = driver.run_on(1, T_IN, 64, Data::In(fresh.len()));
    assert!(read.data == fresh, "overwritten by a stale write");
}

/// A migration's destination waits for it.
#[test]
fn the_claim_is_given_back_when_storage_answers_again_after_the_guest_has_stopped() {
    let Some(failing) = Failing::start(&SOON) else {
        return;
    };
    let mut driver = failing.server().connect();
    let pending = hung_write(&failing, &mut driver, &pattern(1, 4096));
    let base = driver.frontend.stop_vring(0);
    assert_eq!(outcome(&mut driver, &pending).status, S_IOERR);
    assert_eq!(failing.status()["claim"]["state"], "held");
    failing.fuse.let_writes_land();
    wait_for("the claim's release", || {
        failing.status()["claim"]["state"] == "released"
    });
    driver.restart(0, base);
    driver.still_serves();
}

/// Nothing reads what the service manager is told. Workers do not wait for it.
#[test]
fn a_service_manager_that_does_not_read_keeps_no_request_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let manager = dir.path().join("notify");
    let _unread = UnixDatagram::bind(&manager).unwrap();
    let Some(mut failing) = Failing::start(&STOP) else {
        return;
    };
    failing.server.take().unwrap().stop();
    let control = failing.control.to_str().unwrap().to_owned();
    let mut command = serve(&failing.volume, &failing.socket, &["--control-socket", &control]);
    command.env("NOTIFY_SOCKET", &manager);
    let socket = failing.socket.clone();
    failing.server = Some(Server::at(&mut command, socket));
    let mut driver = failing.server().connect();
    // Its queue of datagrams is full after ten.
    for number in 0..6 {
        let pending = {
            failing.fail(Operation::Write, Fault::Error(ENOSPC));
            let pending = driver.submit(0, T_OUT, 64, Data::Out(&pattern(number, 4096)));
            failing.wait_held("full");
            pending
        };
        thread::sleep(A_WHILE);
        failing.fuse.heal();
        assert_eq!(outcome(&mut driver, &pending).status, S_OK);
        // Longer than it takes until that is told.
        thread::sleep(2 * A_WHILE);
    }
    driver.frontend.stop_vring(0);
}

/// The kernel told of the failure once, and the next try gave the disk away: its next owner's flushes succeeded over lost data.
#[test]
fn a_disk_with_a_loss_that_the_guest_does_not_know_of_is_not_given_away() {
    for sector_size in [512, 4096] {
        let Some(failing) = Failing::with_sectors(sector_size, &SOON) else {
            return;
        };
        let mut driver = failing.server().connect();
        let held = || failing.status()["claim"]["state"] == "held";
        driver.write(64, &pattern(1, 8192));
        failing.fail(Operation::Sync, Fault::Error(EIO));
        let base = driver.frontend.stop_vring(0);
        assert!(held(), "{sector_size}");
        failing.fuse.heal();
        driver.restart(0, base);
        let base = driver.frontend.stop_vring(0);
        assert!(held(), "{sector_size}: given away");

        driver.restart(0, base);
        assert_eq!(driver.run(T_FLUSH, 0, Data::None).status, S_IOERR);
        driver.frontend.stop_vring(0);
        wait_for("the claim's release", || !held());
    }
}

/// When the guest stops, what was written is put on stable storage before another process may take the disk over.
#[test]
fn a_sync_that_hangs_does_not_keep_the_guest_from_stopping_and_the_disk_stays_claimed() {
    let Some(failing) = Failing::start(&SOON) else {
        return;
    };
    let mut driver = failing.server().connect();
    driver.write(64, &pattern(1, 4096));
    failing.fuse.ignore(failing.server().process.pid());
    let base = driver.frontend.stop_vring(0);
    assert!(failing.fuse.is_asked());
    assert_eq!(failing.status()["claim"]["state"], "held");
    failing.fuse.answer();
    wait_for("the claim's release", || {
        failing.status()["claim"]["state"] == "released"
    });
    driver.restart(0, base);
    driver.still_serves();
}
