//! Every edge that changes what I/O stands on waits for storage, however long that takes.
//!
//! Storage is held up for real: the volume lies on a file system that is frozen while requests are in flight. These
//! tests do nothing where no file system can be mounted.

use common::driver::{Data, Driver, Pending, S_OK, SECTOR, Setup, T_IN, T_OUT};
use common::frontend::{
    GET_VRING_BASE, NEED_REPLY, RESET_DEVICE, SET_FEATURES, SET_MEM_TABLE, SET_VRING_ENABLE, mem_table,
    vring_state,
};
use common::serve::{Server, sealblk_path};
use common::storage::{Filesystem, LoopDevice};
use common::volume::{MIB, Volume, run};
use common::{DEADLINE, pattern};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const WRITES: u64 = 4;
const LEN: usize = 64 * 1024;
/// Long enough for an answer that must not come to come.
const A_WHILE: Duration = Duration::from_millis(150);

struct Bench {
    // In the order in which they have to go.
    server: Option<Server>,
    filesystem: Filesystem,
    volume: Volume,
}

impl Bench {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("blocks");
        File::create(&file).unwrap().set_len(64 * MIB).unwrap();
        let filesystem = LoopDevice::over(&file, 512)
            .and_then(|device| Filesystem::ext4(dir.path().join("mounted"), device));
        let Some(filesystem) = filesystem else {
            eprintln!("skipped: nothing can be mounted here");
            return None;
        };
        let volume = Volume::created_at(dir, filesystem.path.join("disk"), &["--size", "8M"]);
        let control = volume.beside("control").display().to_string();
        let server = Some(Server::with(&volume, &["--control-socket", &control]));
        Some(Bench {
            server,
            filesystem,
            volume,
        })
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    /// A verb on the served disk.
    fn verb(&self, name: &str) -> Command {
        let mut verb = Command::new(sealblk_path());
        verb.args([name, "--control-socket"])
            .arg(self.volume.beside("control"));
        verb
    }

    fn state(&self) -> serde_json::Value {
        let status = run(self.verb("status").arg("--json")).stdout;
        serde_json::from_slice::<serde_json::Value>(&status).unwrap()["state"].clone()
    }

    /// A driver of two queues whose every sector is written, so that later writes allocate nothing.
    fn connect(&self) -> Driver {
        let mut driver = self.server().connect_with(Setup {
            queues: 2,
            ..Setup::default()
        });
        driver.write(0, &vec![1; WRITES as usize * LEN]);
        driver.flush();
        driver
    }
}

/// Offers writes on the first queue, which will not end while storage is held up.
fn offer_writes(driver: &mut Driver, bytes: &[u8]) -> Vec<Pending> {
    let writes = (0..WRITES).map(|i| driver.submit(0, T_OUT, i * (LEN / SECTOR) as u64, Data::Out(bytes)));
    let writes = writes.collect();
    driver.queue().wait_taken();
    // What one queue waits for, another does not.
    assert_eq!(driver.run_on(1, T_IN, 8192, Data::In(SECTOR)).status, S_OK);
    writes
}

fn assert_written(driver: &Driver, writes: &[Pending]) {
    for write in writes {
        assert_eq!(driver.memory.read(write.status, 1), [S_OK]);
    }
}

/// Sends a message while writes are held up; the answer must come after them.
fn answers_after_the_writes(name: &str, send: fn(&Driver), answer: fn(&Driver)) {
    let Some(bench) = Bench::new() else { return };
    let mut driver = bench.connect();
    let bytes = pattern(1, LEN);
    let frozen = bench.filesystem.freeze();
    let before = driver.queue().used_index();
    let writes = offer_writes(&mut driver, &bytes);
    send(&driver);
    assert!(
        !driver.frontend.hears_something(A_WHILE),
        "{name} was answered before the writes were done"
    );
    assert_eq!(
        driver.queue().used_index(),
        before,
        "a write was done while storage was held up"
    );
    drop(frozen);
    answer(&driver);
    assert_eq!(
        driver.queue().used_index(),
        before.wrapping_add(WRITES as u16),
        "{name} came first"
    );
    assert_written(&driver, &writes);
    drop(driver);
    let mut driver = bench.server().connect();
    for i in 0..WRITES {
        assert!(driver.read(i * (LEN / SECTOR) as u64, LEN) == bytes);
    }
}

/// The key is still in use; who asks is not told that it is gone.
#[test]
fn a_lock_waits_for_storage_and_the_disk_says_so() {
    let Some(bench) = Bench::new() else { return };
    let mut driver = bench.connect();
    let frozen = bench.filesystem.freeze();
    let writes = offer_writes(&mut driver, &pattern(1, LEN));
    let mut lock = bench.verb("lock").spawn().unwrap();
    let begun = Instant::now();
    while bench.state() != "locking" {
        assert!(begun.elapsed() < DEADLINE, "it is {}", bench.state());
        thread::sleep(Duration::from_millis(10));
    }
    thread::sleep(A_WHILE);
    assert!(lock.try_wait().unwrap().is_none(), "the lock did not wait");
    drop(frozen);
    assert!(lock.wait().unwrap().success());
    assert_eq!(bench.state(), "locked");
    driver.queue().wait_used_many(writes.len());
    assert_written(&driver, &writes);
    run(&mut bench.verb("unlock"));
    assert_eq!(bench.state(), "open");
    bench.server().still_serves_both(driver);
}

/// The unlock took effect at once: the disk was told to be open while the guest ran on by the keys that were taken away, the
/// lock never came to an end, and the guest's rings stood still from their next start on.
#[test]
fn an_unlock_waits_for_the_lock_before_it() {
    let Some(bench) = Bench::new() else { return };
    let mut driver = bench.connect();
    let frozen = bench.filesystem.freeze();
    let writes = offer_writes(&mut driver, &pattern(1, LEN));
    let mut verbs = vec![bench.verb("lock").spawn().unwrap()];
    let begun = Instant::now();
    while bench.state() != "locking" {
        assert!(begun.elapsed() < DEADLINE, "it is {}", bench.state());
        thread::sleep(Duration::from_millis(10));
    }
    // A second lock is not done before the first one.
    verbs.push(bench.verb("lock").spawn().unwrap());
    verbs.push(bench.verb("unlock").spawn().unwrap());
    thread::sleep(2 * A_WHILE);
    assert_eq!(bench.state(), "locking");
    for verb in &mut verbs {
        assert!(verb.try_wait().unwrap().is_none(), "it did not wait");
    }
    drop(frozen);
    for verb in &mut verbs {
        assert!(verb.wait().unwrap().success());
    }
    assert_eq!(bench.state(), "open");
    driver.queue().wait_used_many(writes.len());
    assert_written(&driver, &writes);
    // The guest is reset.
    let base = driver.frontend.stop_vring(0);
    driver.restart(0, base);
    bench.server().still_serves_both(driver);
}

#[test]
fn get_vring_base_waits_for_storage() {
    answers_after_the_writes(
        "GET_VRING_BASE",
        |driver| driver.frontend.send(GET_VRING_BASE, 0, &vring_state(0, 0), &[]),
        |driver| {
            let reply = driver.frontend.receive().unwrap();
            let base = u16::from_ne_bytes(reply.payload[4..6].try_into().unwrap());
            assert_eq!(base, driver.queues[0].used_index());
        },
    );
}

fn acknowledged(driver: &Driver) {
    assert_eq!(driver.frontend.acknowledgement(), 0);
}

#[test]
fn disabling_a_ring_waits_for_storage() {
    answers_after_the_writes(
        "SET_VRING_ENABLE",
        |driver| {
            driver
                .frontend
                .send(SET_VRING_ENABLE, NEED_REPLY, &vring_state(0, 0), &[])
        },
        acknowledged,
    );
}

#[test]
fn a_new_memory_table_waits_for_storage() {
    answers_after_the_writes(
        "SET_MEM_TABLE",
        |driver| {
            let regions = driver.memory.regions();
            let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|region| region.file.as_fd()).collect();
            driver
                .frontend
                .send(SET_MEM_TABLE, NEED_REPLY, &mem_table(&regions), &fds);
        },
        acknowledged,
    );
}

#[test]
fn features_wait_for_storage() {
    answers_after_the_writes(
        "SET_FEATURES",
        |driver| {
            driver
                .frontend
                .send(SET_FEATURES, NEED_REPLY, &driver.features.to_ne_bytes(), &[])
        },
        acknowledged,
    );
}

#[test]
fn a_reset_waits_for_storage() {
    answers_after_the_writes(
        "RESET_DEVICE",
        |driver| driver.frontend.send(RESET_DEVICE, NEED_REPLY, &[], &[]),
        acknowledged,
    );
}

#[test]
fn guest_memory_stays_mapped_until_what_was_in_flight_is_done() {
    let Some(bench) = Bench::new() else { return };
    let mut driver = bench.connect();
    let bytes = pattern(2, LEN);
    let frozen = bench.filesystem.freeze();
    offer_writes(&mut driver, &bytes);
    drop(driver);
    std::thread::sleep(A_WHILE);
    assert_ne!(bench.server().facts().guest_mappings, 0, "unmapped under I/O");
    // The next front-end waits for the one that leaves.
    let next = common::frontend::Frontend::connect(bench.server().socket());
    next.send(common::frontend::GET_FEATURES, 0, &[], &[]);
    assert!(!next.hears_something(A_WHILE), "two front-ends at once");
    drop(frozen);
    next.receive().expect("it is served now");
    drop(next);
    let mut driver = bench.server().connect();
    for i in 0..WRITES {
        assert!(
            driver.read(i * (LEN / SECTOR) as u64, LEN) == bytes,
            "a write that was taken is not there"
        );
    }
    drop(driver);
    bench.server().wait_idle();
}

#[test]
fn sigterm_waits_for_storage_and_then_ends_it() {
    let Some(mut bench) = Bench::new() else { return };
    let mut driver = bench.connect();
    let bytes = pattern(3, LEN);
    let frozen = bench.filesystem.freeze();
    let before = driver.queue().used_index();
    let writes = offer_writes(&mut driver, &bytes);
    let mut server = bench.server.take().unwrap();
    server.process.signal(rustix::process::Signal::TERM);
    std::thread::sleep(A_WHILE);
    assert!(server.process.is_running(), "it ended with writes in flight");
    drop(frozen);
    let ended = server.process.wait();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(driver.queue().used_index(), before.wrapping_add(WRITES as u16));
    assert_written(&driver, &writes);

    let server = Server::with(&bench.volume, &[]);
    let mut driver = server.connect();
    for i in 0..WRITES {
        assert!(driver.read(i * (LEN / SECTOR) as u64, LEN) == bytes);
    }
    drop(driver);
    server.stop();
}
