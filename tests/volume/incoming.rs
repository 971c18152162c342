//! Two servers of one disk, as a migration has them: one guest stops before the other starts, and never do both write.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::agent::Agent;
use common::driver::{Data, Driver, S_OK, T_IN, T_OUT};
use common::pattern;
use common::serve::{Server, sealblk_path, serve, serve_fails};
use common::storage::LoopDevice;
use common::volume::{MIB, Volume, run};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use serde_json::Value;

/// Long enough for a server to go wrong.
const A_WHILE: Duration = Duration::from_millis(500);

const IN_USE: i32 = 5;
const NO_ANSWER: i32 = 7;

/// Says that the guest may have changed its disk there, so that it cannot continue at the source.
const TAKEN_OVER: &str = "the disk is taken over";

struct Side {
    server: Server,
    control: PathBuf,
}

impl Side {
    fn start(volume: &Volume, name: &str, args: &[&str]) -> Self {
        let control = volume.beside(&format!("{name}.control"));
        let socket = volume.beside(&format!("{name}.sock"));
        let with_control = [args, &["--control-socket", control.to_str().unwrap()]].concat();
        let server = Server::at(&mut serve(volume, &socket, &with_control), socket);
        Side { server, control }
    }

    /// A verb for this side's control socket.
    fn verb(&self, verb: &str) -> Command {
        let mut command = Command::new(sealblk_path());
        command.arg(verb).arg("--control-socket").arg(&self.control);
        command
    }

    fn status(&self) -> Value {
        let told = run(self.verb("status").arg("--json"));
        serde_json::from_slice(&told.stdout).unwrap()
    }

    fn claim(&self) -> Value {
        self.status()["claim"].clone()
    }

    /// A verb that is refused: what it says.
    fn refuses(&self, verb: &str) -> String {
        let refused = self.verb(verb).output().unwrap();
        assert!(!refused.status.success(), "{verb}");
        String::from_utf8(refused.stderr).unwrap()
    }

    fn wait_claim(&self, state: &str) -> Value {
        let start = Instant::now();
        loop {
            let claim = self.claim();
            if claim["state"] == state {
                return claim;
            }
            assert!(start.elapsed() < DEADLINE, "it is not {state} but {claim}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// As QEMU does when its guest stops.
fn stop(driver: &mut Driver) -> Vec<u16> {
    let queues = driver.queues.iter().map(|queue| queue.index);
    queues
        .clone()
        .for_each(|queue| driver.frontend.enable(queue, false));
    queues.map(|queue| driver.frontend.stop_vring(queue)).collect()
}

/// As QEMU does when its guest continues.
fn go_on(driver: &mut Driver, bases: &[u16]) {
    for (queue, base) in bases.iter().enumerate() {
        driver.restart(queue, *base);
    }
}

/// `is_counted`: the header tells that the guest has run elsewhere.
fn goes_over(volume: &Volume, is_counted: bool) {
    let source = Side::start(volume, "source", &[]);
    let mut there = source.server.connect();
    let bytes = pattern(1, 64 * 1024);
    there.write(0, &bytes);
    serve_fails(volume, &[]).assert_says(IN_USE, &["in use"]);
    let destination = Side::start(volume, "destination", &["--incoming"]);
    assert_eq!(destination.claim()["state"], "released");
    assert_eq!(source.claim()["state"], "held");

    // The guest has started at the destination before it has stopped at the source.
    let mut here = destination.server.connect();
    let read = here.submit(0, T_IN, 0, Data::In(bytes.len()));
    destination.wait_claim("waiting");
    thread::sleep(A_WHILE);
    assert!(here.queue().poll_used().is_none(), "both serve");
    there.write(8, &bytes[..4096]);
    let bases = stop(&mut there);
    let used = here.queue().wait_used();
    let done = here.outcome(&read, used);
    assert_eq!(done.status, S_OK);
    assert!(done.data[4096..8192] == bytes[..4096] && done.data[8192..] == bytes[8192..]);
    assert_eq!(source.claim()["state"], "released");
    assert_eq!(destination.claim()["state"], "held");
    here.write(0, &bytes);
    for args in [&[][..], &["--read-only"]] {
        serve_fails(volume, args).assert_says(IN_USE, &["in use"]);
    }

    // And back.
    let other_bases = stop(&mut here);
    // Nobody has it, and third parties do not get it.
    for args in [&[][..], &["--read-only"]] {
        serve_fails(volume, args).assert_says(IN_USE, &["in use"]);
    }
    if is_counted {
        go_on(&mut there, &bases);
        let refused = source.wait_claim("refused");
        let message = refused["message"].as_str().unwrap();
        assert!(message.contains("has run elsewhere"), "{refused}");
        // A guest that comes back, or another one.
        drop(there);
        assert!(source.server.connect().read(0, bytes.len()) == bytes);
        drop(here);
        destination.server.stop();
        source.server.stop();
        return;
    }
    go_on(&mut there, &bases);
    assert!(there.read(0, bytes.len()) == bytes);
    assert_eq!(destination.claim()["state"], "released");

    // The guest runs at the source, and somebody starts it at the destination all the same.
    go_on(&mut here, &other_bases);
    let write = here.submit(0, T_OUT, 0, Data::Out(&pattern(2, 4096)));
    let refused = destination.wait_claim("refused");
    assert!(
        refused["message"].as_str().unwrap().contains("in use"),
        "{refused}"
    );
    // It does not get it behind the guest's back later.
    let bases = stop(&mut there);
    thread::sleep(A_WHILE);
    assert!(here.queue().poll_used().is_none());
    assert_eq!(destination.claim()["state"], "refused");
    go_on(&mut there, &bases);
    assert!(there.read(0, bytes.len()) == bytes);
    // One of them leaves.
    drop(there);
    source.server.stop();
    let bases = stop(&mut here);
    assert_eq!(bases[0], other_bases[0], "the write was not taken");
    go_on(&mut here, &bases);
    let used = here.queue().wait_used();
    assert_eq!(here.outcome(&write, used).status, S_OK);
    assert!(here.read(0, 4096) == pattern(2, 4096));
    let said = destination.server.stop().stderr;
    assert!(said.contains("stop and continue the guest"), "{said}");
    assert_eq!(said.matches(TAKEN_OVER).count(), 1, "{said}");
}

#[test]
fn a_disk_goes_over_to_another_server_when_its_guest_has_stopped() {
    goes_over(&Volume::created(MIB, 512), false);
}

/// There the claim is also the device's own, which one process can have.
#[test]
fn a_block_device_goes_over_to_another_server_when_its_guest_has_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("blocks");
    std::fs::File::create(&file).unwrap().set_len(24 * MIB).unwrap();
    let Some(device) = LoopDevice::over(&file, 512) else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let volume = Volume::created_at(dir, device.path().to_owned(), &["--size", "1M"]);
    goes_over(&volume, true);

    // Nothing mounts it while the guest is stopped, whether there is a destination by then or not.
    let is_exclusive = || {
        let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::open(device.path(), flags, Mode::empty()).map(drop) == Err(Errno::BUSY)
    };
    let source = Side::start(&volume, "source", &[]);
    let mut there = source.server.connect();
    let bases = stop(&mut there);
    assert!(is_exclusive());
    go_on(&mut there, &bases);
    there.still_serves();
    let destination = Side::start(&volume, "destination", &["--incoming"]);
    stop(&mut there);
    let mut here = destination.server.connect();
    here.still_serves();
    drop(there);
    source.server.stop();
    assert!(is_exclusive());
    drop(here);
    destination.server.stop();
    assert!(!is_exclusive());
}

/// Readers share a disk, and none of them ever has to give it up.
#[test]
fn a_reader_keeps_writers_out_also_while_its_guest_is_stopped() {
    let volume = Volume::created(MIB, 512);
    let reader = Side::start(&volume, "reader", &["--read-only"]);
    let mut driver = reader.server.connect();
    stop(&mut driver);
    serve_fails(&volume, &[]).assert_says(IN_USE, &["in use"]);
    drop(driver);
    reader.server.wait_idle();
    serve_fails(&volume, &[]).assert_says(IN_USE, &["in use"]);
    assert_eq!(reader.claim()["state"], "held");
    reader.server.connect().read(0, 512);
    reader.server.stop();
    Server::with(&volume, &[]).stop();
}

/// What the guest knows of its disk would be wrong.
#[test]
fn a_disk_that_became_another_one_meanwhile_is_not_taken_over() {
    let volume = Volume::created(MIB, 512);
    let other = Volume::created(MIB, 512).stored(0, 16 * MIB as usize);
    let source = Side::start(&volume, "source", &[]);
    let mut there = source.server.connect();
    there.still_serves();
    let destination = Side::start(&volume, "destination", &["--incoming"]);
    stop(&mut there);
    let file = volume.file();
    std::os::unix::fs::FileExt::write_all_at(&file, &other, 0).unwrap();
    file.sync_all().unwrap();
    let mut here = destination.server.connect();
    let read = here.submit(0, T_IN, 0, Data::In(512));
    let refused = destination.wait_claim("refused");
    assert!(
        refused["message"].as_str().unwrap().contains("volume"),
        "{refused}"
    );
    assert!(here.queue().poll_used().is_none());
    let _ = read;
}

/// It waited for its key instead, and a guest that came had a locked disk.
#[test]
fn a_destination_that_does_not_get_its_key_ends_at_its_start() {
    let mut agent = Agent::new("");
    let volume = agent.volume();
    let source = Side::start(&volume, "source", &[]);
    let mut driver = source.server.connect();
    agent.stop();
    serve_fails(&volume, &["--incoming"]).assert_says(NO_ANSWER, &["agent"]);
    driver.still_serves();
    assert_eq!(source.claim()["state"], "held");
}

/// The first 16 MiB are the header.
fn header(volume: &Volume) -> Vec<u8> {
    volume.stored(0, 16 * MIB as usize)
}

/// Another process may serve the disk, on a host that the lock of the header does not reach.
#[test]
fn a_header_is_changed_where_the_guest_runs() {
    let volume = Volume::created(MIB, 512);
    let source = Side::start(&volume, "source", &[]);
    let mut there = source.server.connect();
    let bytes = pattern(3, 4096);
    there.write(0, &bytes);
    let destination = Side::start(&volume, "destination", &["--incoming"]);
    let unchanged = |side: &Side| {
        let before = header(&volume);
        let said = side.refuses("rekey");
        assert!(said.contains("where the guest runs"), "{said}");
        assert!(header(&volume) == before);
    };
    let changed = |side: &Side| {
        let before = header(&volume);
        run(&mut side.verb("rekey"));
        assert!(header(&volume) != before);
    };
    unchanged(&destination);
    changed(&source);
    stop(&mut there);
    // Nobody has it: the guest is under way.
    unchanged(&source);
    unchanged(&destination);
    let mut here = destination.server.connect();
    assert!(here.read(0, bytes.len()) == bytes);
    unchanged(&source);
    changed(&destination);
    drop(there);
    source.server.stop();

    // No guest runs, and no other process has the disk.
    let bases = stop(&mut here);
    assert_eq!(destination.claim()["state"], "released");
    changed(&destination);
    assert_eq!(destination.claim()["state"], "released");
    go_on(&mut here, &bases);
    assert!(here.read(0, bytes.len()) == bytes);
}

/// A reset of the guest stops all its rings.
#[test]
fn a_guest_that_stops_in_the_middle_of_a_rekey_ends_it_only_if_it_migrates() {
    let volume = Volume::created(MIB, 512);
    let source = Side::start(&volume, "source", &[]);
    let mut there = source.server.connect();
    there.still_serves();
    // The rekey waits for the header.
    let file = volume.file();
    let begin_rekey = |times: usize| {
        flock(&file, FlockOperation::LockExclusive).unwrap();
        let rekey = source.verb("rekey").stderr(Stdio::piped()).spawn().unwrap();
        while source.server.process.stderr().matches("PrivilegeUsed").count() < times {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(A_WHILE);
        rekey
    };
    let rekey = begin_rekey(1);
    let bases = stop(&mut there);
    assert_eq!(source.claim()["state"], "held");
    go_on(&mut there, &bases);
    there.still_serves();
    flock(&file, FlockOperation::Unlock).unwrap();
    assert!(rekey.wait_with_output().unwrap().status.success());
    assert_eq!(source.claim()["state"], "held");

    let destination = Side::start(&volume, "destination", &["--incoming"]);
    let rekey = begin_rekey(2);
    stop(&mut there);
    assert_eq!(source.claim()["state"], "released");
    flock(&file, FlockOperation::Unlock).unwrap();
    let refused = rekey.wait_with_output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains("where the guest runs"),
        "{said}"
    );
    let mut here = destination.server.connect();
    here.still_serves();
    // A rekey there begins anew.
    run(&mut destination.verb("rekey"));
}

/// A lock is of one process, and a guest that runs elsewhere needs none there.
#[test]
fn a_lock_of_one_side_says_nothing_of_the_other() {
    let volume = Volume::created(MIB, 512);
    let source = Side::start(&volume, "source", &[]);
    let mut there = source.server.connect();
    there.still_serves();
    let destination = Side::start(&volume, "destination", &["--incoming"]);

    // The guest of a locked disk stops, with its requests in the rings, and goes on where the disk is open.
    run(&mut source.verb("lock"));
    let waiting = there.submit(0, T_IN, 0, Data::In(512));
    let bases = stop(&mut there);
    assert_eq!(source.claim()["state"], "released");
    let mut here = destination.server.connect();
    here.still_serves();

    // And the other way round: the request that waited is carried out after the unlock.
    let other_bases = stop(&mut here);
    go_on(&mut there, &bases);
    thread::sleep(A_WHILE);
    assert!(there.queue().poll_used().is_none());
    assert_eq!(
        source.claim()["state"],
        "released",
        "a locked disk needs no claim"
    );
    run(&mut source.verb("unlock"));
    let used = there.queue().wait_used();
    assert_eq!(there.outcome(&waiting, used).status, S_OK);
    assert_eq!(source.claim()["state"], "held");

    // The destination is locked before the guest comes.
    run(&mut destination.verb("lock"));
    stop(&mut there);
    go_on(&mut here, &other_bases);
    let waiting = here.submit(0, T_IN, 0, Data::In(512));
    thread::sleep(A_WHILE);
    assert!(here.queue().poll_used().is_none());
    run(&mut destination.verb("unlock"));
    let used = here.queue().wait_used();
    assert_eq!(here.outcome(&waiting, used).status, S_OK);
}

/// The guest can go on at the source.
#[test]
fn a_destination_whose_storage_goes_away_does_not_take_the_disk_over() {
    let volume = Volume::created(MIB, 512);
    let source = Side::start(&volume, "source", &[]);
    let mut there = source.server.connect();
    there.still_serves();
    let destination = Side::start(&volume, "destination", &["--incoming"]);
    let bases = stop(&mut there);
    let len = volume.file().metadata().unwrap().len();
    let all = volume.stored(0, len as usize);
    volume.file().set_len(0).unwrap();
    let mut here = destination.server.connect();
    let read = here.submit(0, T_IN, 0, Data::In(512));
    destination.wait_claim("refused");
    assert!(here.queue().poll_used().is_none());
    std::os::unix::fs::FileExt::write_all_at(&volume.file(), &all, 0).unwrap();
    go_on(&mut there, &bases);
    there.still_serves();
    assert_eq!(destination.claim()["state"], "refused");
    let said = destination.server.terminate().stderr;
    assert!(!said.contains(TAKEN_OVER), "{said}");
    let _ = read;
}
