//! A server that is killed while its writes are on their way to storage. They go on landing after its end, so the next server must
//! not touch the disk before the last of them has landed.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::driver::{Data, Driver, S_OK, T_OUT};
use common::fuse::Fuse;
use common::pattern;
use common::process::Process;
use common::serve::{Server, serve, serve_fails};
use common::storage::LoopDevice;
use common::volume::{MIB, Volume};
use rustix::process::Signal;

/// Long enough for a server to go wrong.
const A_WHILE: Duration = Duration::from_millis(500);

/// What a server says that waits, and what it says then.
const WAITS: &str = "have not reached the storage yet";
const GOES_ON: &str = "have reached the storage";

/// A volume on storage whose writes land when they are let go.
struct Slow {
    volume: Volume,
    _device: Option<LoopDevice>,
    fuse: Fuse,
}

impl Slow {
    /// In a file.
    fn file() -> Option<Self> {
        // With these sectors it has direct I/O: other writes keep a killed process from ending.
        let mut volume = Volume::created(MIB, 4096);
        let fuse = Fuse::over(volume.file());
        if fuse.is_none() {
            eprintln!("skipped: nothing can be mounted here");
        }
        let fuse = fuse?;
        volume.path = fuse.path();
        Some(Slow {
            volume,
            _device: None,
            fuse,
        })
    }

    /// On a block device.
    fn device() -> Option<Self> {
        let mut slow = Self::file()?;
        let device = LoopDevice::with(&slow.volume.path, &["--direct-io=on"])?;
        slow.volume.path = device.path().to_owned();
        slow._device = Some(device);
        Some(slow)
    }

    /// Kills a server in the middle of a write of `bytes`.
    fn kill_in_write(&self, bytes: &[u8]) {
        let mut server = Server::with(&self.volume, &[]);
        let mut driver = server.connect();
        self.fuse.set_late(true);
        driver.submit(0, T_OUT, 0, Data::Out(bytes));
        let start = Instant::now();
        while self.fuse.writes_under_way() == 0 {
            assert!(start.elapsed() < DEADLINE, "nothing is written");
            thread::sleep(Duration::from_millis(1));
        }
        server.process.signal(Signal::KILL);
        server.process.wait();
        self.fuse.set_late(false);
    }

    /// Starts the next server, which front-ends can connect to.
    fn start(&self) -> (Process, PathBuf) {
        let socket = self.volume.beside("next.sock");
        let process = Process::spawn(&mut serve(&self.volume, &socket, &[]));
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < DEADLINE, "no socket: {}", process.stderr());
            thread::sleep(Duration::from_millis(1));
        }
        (process, socket)
    }
}

/// The stale write of the dead process came last, and the guest read it instead of what it had written since.
#[test]
fn writes_of_a_killed_server_land_before_the_next_one_serves() {
    for slow in [Slow::file(), Slow::device()].into_iter().flatten() {
        let [stale, fresh] = [1, 2].map(|seed| pattern(seed, 4096));
        slow.kill_in_write(&stale);
        let (mut next, socket) = slow.start();
        let mut driver = Driver::connect(&socket);
        let write = driver.submit(0, T_OUT, 0, Data::Out(&fresh));
        thread::sleep(A_WHILE);
        let early = driver.queue().poll_used();
        slow.fuse.let_writes_land();
        let used = early.unwrap_or_else(|| driver.queue().wait_used());
        assert_eq!(driver.outcome(&write, used).status, S_OK);
        assert!(
            driver.read(0, fresh.len()) == fresh,
            "overwritten by a stale write"
        );
        assert!(early.is_none(), "served while a stale write was under way");
        next.wait_stderr(GOES_ON);
        assert!(next.stderr().contains(WAITS), "{}", next.stderr());
        driver.still_serves();
        drop(driver);
        next.signal(Signal::TERM);
        assert!(next.wait().status.success());
    }
}

#[test]
fn a_server_that_waits_for_the_writes_of_a_killed_one_says_so_and_ends_when_told_to() {
    let Some(slow) = Slow::file() else { return };
    slow.kill_in_write(&pattern(1, 4096));
    let (mut next, socket) = slow.start();
    next.wait_stderr(WAITS);
    let driver = Driver::connect(&socket);
    // It has the disk, though it does not serve it.
    serve_fails(&slow.volume, &[]).assert_says(5, &["in use"]);
    next.signal(Signal::TERM);
    let ended = next.wait();
    assert!(
        ended.status.success() && !ended.stderr.contains(GOES_ON),
        "{ended:?}"
    );
    drop(driver);
    // A reader waits as well.
    let socket = slow.volume.beside("reader.sock");
    let mut reader = Process::spawn(&mut serve(&slow.volume, &socket, &["--read-only"]));
    reader.wait_stderr(WAITS);
    slow.fuse.let_writes_land();
    reader.wait_stderr(GOES_ON);
    Driver::connect(&socket).read(0, 4096);
    reader.signal(Signal::TERM);
    assert!(reader.wait().status.success());
}

/// What changes a disk at rest waits as well: what it wrote could be overwritten.
#[test]
fn a_verb_on_a_disk_at_rest_waits_for_the_writes_of_a_killed_server() {
    let Some(slow) = Slow::file() else { return };
    slow.kill_in_write(&pattern(1, 4096));
    let mut rekey = Process::spawn(
        std::process::Command::new(common::serve::sealblk_path())
            .args(&slow.volume.open)
            .arg("rekey")
            .arg(&slow.volume.path),
    );
    rekey.wait_stderr(WAITS);
    thread::sleep(A_WHILE);
    assert!(rekey.is_running());
    slow.fuse.let_writes_land();
    let ended = rekey.wait();
    assert!(ended.status.success(), "{ended:?}");
    Server::with(&slow.volume, &[]).still_serves();
}
