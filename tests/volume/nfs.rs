//! A volume on NFS, which two hosts have mounted: their locks meet at the server.
//!
//! `ci/boot/hosts` runs these tests in a guest, where both hosts and the server are network namespaces. `SEALBLK_TEST_NFS` is a directory
//! with the two mounts, `a` and `b`, and the scripts `server` (`stop`, `start`) and `link` (`a down`, `a up`).

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::hosts::{Side, go_on, stop};
use common::driver::{Data, Driver, S_OK, T_IN, T_OUT};
use common::pattern;
use common::process::{Ended, Process};
use common::serve::{Server, sealblk_path, serve};
use common::volume::{Volume, run};
use rustix::process::Signal;

const IN_USE: i32 = 5;

/// The server's, in seconds: `ci/boot/hosts` sets it.
const LEASE: u64 = 10;

/// Two hosts; none if there are none.
fn hosts() -> Option<[PathBuf; 2]> {
    let nfs = std::env::var_os("SEALBLK_TEST_NFS").map(PathBuf::from);
    if nfs.is_none() {
        eprintln!("skipped: ci/boot/hosts runs this in a guest");
    }
    nfs.map(|nfs| ["a", "b"].map(|host| nfs.join(host)))
}

fn script(name: &str, args: &[&str]) {
    let nfs = PathBuf::from(std::env::var_os("SEALBLK_TEST_NFS").unwrap());
    run(Command::new(nfs.join(name)).args(args));
}

/// A host that the server cannot hear, until this is dropped.
struct CutOff(&'static str);

impl CutOff {
    fn host(name: &'static str) -> Self {
        script("link", &[name, "down"]);
        Self(name)
    }
}

impl Drop for CutOff {
    fn drop(&mut self) {
        script("link", &[self.0, "up"]);
    }
}

/// A new volume, as two hosts see it.
fn volume(name: &str, [one, other]: [&PathBuf; 2]) -> [Volume; 2] {
    let here = Volume::created_at(tempfile::tempdir().unwrap(), one.join(name), &["--size", "1M"]);
    let there = Volume::at(tempfile::tempdir().unwrap(), other.join(name), here.open.clone());
    [here, there]
}

fn start(volume: &Volume, args: &[&str]) -> Side {
    Side::by(volume, args, |command| command)
}

fn fails(volume: &Volume, args: &[&str]) -> Ended {
    Process::spawn(&mut serve(volume, &volume.beside("refused.sock"), args)).wait()
}

fn assert_refused(volume: &Volume) {
    fails(volume, &[]).assert_says(IN_USE, &["in use"]);
}

/// Waits until the other host gets the disk, which it tries again and again.
fn attached_within(volume: &Volume, limit: Duration) -> (Server, Duration) {
    let (start, socket) = (Instant::now(), volume.beside("sock"));
    loop {
        let mut process = Process::spawn(&mut serve(volume, &socket, &[]));
        while !socket.exists() && process.is_running() {
            thread::sleep(Duration::from_millis(20));
        }
        if process.is_running() {
            let took = start.elapsed();
            process.signal(Signal::TERM);
            process.wait();
            return (Server::at(&mut serve(volume, &socket, &[]), socket), took);
        }
        let ended = process.wait();
        ended.assert_says(IN_USE, &["in use"]);
        assert!(start.elapsed() < limit, "still in use: {}", ended.stderr);
        thread::sleep(Duration::from_millis(200));
    }
}

/// Migrates the guest that is connected to a server of the same volume; `last` is what it writes last before.
fn migrate(from: &mut Driver, there: &Volume, last: &[u8]) -> (Side, Driver, Vec<u16>) {
    let destination = start(there, &["--incoming"]);
    let mut to = destination.server.connect();
    let read = to.submit(0, T_IN, 0, Data::In(last.len()));
    destination.wait_claim("waiting");
    from.write(0, last);
    thread::sleep(Duration::from_millis(300));
    assert!(to.queue().poll_used().is_none(), "both serve");
    let bases = stop(from);
    let used = to.queue().wait_used();
    let done = to.outcome(&read, used);
    assert!(done.status == S_OK && done.data == last);
    (destination, to, bases)
}

/// Asserts that this host's locks are another's, so that it cannot write.
fn assert_lost(driver: &mut Driver) {
    let late = pattern(9, 64 * 1024);
    assert!(
        driver.run(T_OUT, 0, Data::Out(&late)).status != S_OK,
        "both write"
    );
    let log = run(&mut Command::new("dmesg")).stdout;
    let log = String::from_utf8_lossy(&log);
    assert!(
        log.lines()
            .any(|line| line.contains("NFS: ") && line.contains(" locks")),
        "{log}"
    );
}

#[test]
fn nfs_locks_keep_the_other_host_out_in_each_order() {
    let Some([a, b]) = hosts() else { return };
    for (round, hosts) in [[&a, &b], [&b, &a]].into_iter().enumerate() {
        let [here, there] = volume(&format!("orders-{round}"), hosts);
        let [first, second, third] = [1, 2, 3].map(|seed| pattern(seed, 64 * 1024));
        let side = start(&here, &[]);
        let said = side.server.process.stderr();
        assert!(said.contains("direct=true"), "{said}");
        let mut driver = side.server.connect();
        driver.write(0, &first);
        assert_refused(&there);
        fails(&there, &["--read-only"]).assert_says(IN_USE, &["in use"]);
        let mut rekey = Command::new(sealblk_path());
        let rekey = rekey
            .args(&there.open)
            .arg("rekey")
            .arg(&there.path)
            .output()
            .unwrap();
        assert_eq!(
            rekey.status.code(),
            Some(IN_USE),
            "{}",
            String::from_utf8_lossy(&rekey.stderr)
        );

        // A process that is killed frees its locks when its last write has landed.
        driver.submit(0, T_OUT, 128, Data::Out(&second));
        side.crash();
        let (server, _) = attached_within(&there, Duration::from_secs(30));
        let mut driver = server.connect();
        assert!(driver.read(0, first.len()) == first);
        driver.write(0, &third);
        assert_refused(&here);
        drop(driver);
        server.stop();
        if round > 0 {
            continue;
        }

        // The guest migrates, and comes back.
        let source = start(&here, &[]);
        let mut from = source.server.connect();
        assert!(from.read(0, third.len()) == third);
        let (destination, mut to, bases) = migrate(&mut from, &there, &first);
        to.write(0, &second);
        go_on(&mut from, &bases);
        match source.wait_claim_of(&["refused", "held"]) {
            refused if refused["state"] == "refused" => assert!(
                refused["message"].as_str().unwrap().contains("in use"),
                "{refused}"
            ),
            // The whole guest stood still for so long that the destination's host did not renew its lease.
            _ => assert_lost(&mut to),
        }
        drop(to);
        destination.server.terminate();
        drop(from);
        assert!(source.server.connect().read(0, second.len()) == second);
        source.server.stop();
    }
}

/// Its clients claim their locks again in its grace period; until that is over, no other client gets one.
#[test]
fn nfs_server_that_restarts_keeps_the_disk_for_the_host_that_has_it() {
    let Some([a, b]) = hosts() else { return };
    let [here, there] = volume("restart", [&a, &b]);
    let side = start(&here, &[]);
    let mut driver = side.server.connect();
    let bytes = pattern(4, 64 * 1024);
    driver.write(0, &bytes);
    script("server", &["stop"]);
    let write = driver.submit(0, T_OUT, 128, Data::Out(&bytes));
    thread::sleep(Duration::from_secs(1));
    assert!(driver.queue().poll_used().is_none(), "there is no server");
    script("server", &["start"]);
    assert_refused(&there);
    let used = driver.queue().wait_used();
    assert_eq!(driver.outcome(&write, used).status, S_OK);
    assert!(driver.read(128, bytes.len()) == bytes);
    assert_refused(&there);
    drop(driver);
    side.server.stop();
    start(&there, &[]).server.stop();
}

/// The server gives the locks of a host that it does not hear from to another one. What the first one has in flight, and what it writes
/// when it is back, must not reach the disk.
#[test]
fn nfs_client_that_is_cut_off_loses_the_disk_and_writes_nothing_afterwards() {
    let Some([a, b]) = hosts() else { return };
    let [here, there] = volume("cut-off", [&a, &b]);
    let side = start(&here, &[]);
    let mut driver = side.server.connect();
    let [first, late, second] = [5, 6, 7].map(|seed| pattern(seed, 64 * 1024));
    driver.write(0, &first);
    driver.flush();
    assert_refused(&there);
    let link = CutOff::host("a");
    let in_flight = driver.submit(0, T_OUT, 0, Data::Out(&late));
    let (server, took) = attached_within(&there, Duration::from_secs(6 * LEASE));
    eprintln!("nfs: another host got the disk after {:.1} s", took.as_secs_f32());
    let mut other = server.connect();
    assert!(other.read(0, first.len()) == first);
    other.write(0, &second);
    drop(link);
    let used = driver.queue().wait_used();
    let done = driver.outcome(&in_flight, used);
    eprintln!("nfs: the write in flight ended with status {}", done.status);
    let again = driver.run(T_OUT, 0, Data::Out(&late)).status;
    eprintln!("nfs: a later write ended with status {again}");
    assert!(
        other.read(0, second.len()) == second,
        "the host that was cut off has written"
    );
    assert!(done.status != S_OK && again != S_OK);
    drop(driver);
    side.server.terminate();
    assert!(other.read(0, second.len()) == second);
    drop(other);
    server.stop();
}

/// The host that has the guest since a migration is cut off, and the one that the guest came from gets the disk back: for a while both
/// say that they hold it, and only one of them can write.
#[test]
fn nfs_destination_that_is_cut_off_loses_the_disk_to_its_source() {
    let Some([a, b]) = hosts() else { return };
    let [here, there] = volume("cut-off-destination", [&a, &b]);
    let source = start(&here, &[]);
    let mut from = source.server.connect();
    let [first, second] = [10, 11].map(|seed| pattern(seed, 64 * 1024));
    let (destination, mut to, mut bases) = migrate(&mut from, &there, &first);
    to.write(0, &second);
    let link = CutOff::host("b");
    let start = Instant::now();
    loop {
        go_on(&mut from, &bases);
        if source.wait_claim_of(&["refused", "held"])["state"] == "held" {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(6 * LEASE), "still refused");
        bases = stop(&mut from);
    }
    drop(link);
    destination.wait_claim("held");
    assert_lost(&mut to);
    assert!(from.read(0, second.len()) == second);
    from.write(0, &first);
    drop(to);
    destination.server.terminate();
    assert!(from.read(0, first.len()) == first);
    drop(from);
    source.server.stop();
}
