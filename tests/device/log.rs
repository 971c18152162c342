//! The log of a served disk, which belongs to the operator: a guest or a front-end that wants to cannot fill it.

use common::driver::Setup;
use common::frontend::{ADD_MEM_REG, Frontend, NEED_REPLY, single_region};
use common::memory::{HOLE, Region};
use common::serve::Server;
use std::os::fd::AsFd;

/// So many lines of a kind are written at once; the next one comes a minute later, and tells how many were left out.
const AT_ONCE: usize = 10;
const TIMES: usize = 60;

fn lines(said: &str, what: &str) -> usize {
    said.lines().filter(|line| line.contains(what)).count()
}

/// 520 lines a second by breaking a queue and setting it up again.
#[test]
fn a_guest_that_breaks_its_queue_again_and_again_is_told_of_a_few_times() {
    let server = Server::new();
    let mut driver = server.connect();
    for _ in 0..TIMES {
        // More chains than the queue has descriptors.
        let next = driver.queue().next_avail();
        driver.queue().forge_avail_index(next.wrapping_add(1000));
        driver.queue().kick();
        // The stop waits for what the kick brings.
        driver.frontend.stop_vring(0);
        driver.queue().forge_avail_index(next);
        driver.restart(0, next);
    }
    driver.still_serves();
    drop(driver);
    let ended = server.stop();
    let told = lines(&ended.stderr, "the driver broke this queue");
    assert!((1..=AT_ONCE).contains(&told), "{told} lines:\n{}", ended.stderr);
}

/// A front-end without shared memory came back twice a second, with two lines each time, for ever.
#[test]
fn a_front_end_that_comes_again_and_again_is_told_of_a_few_times() {
    let server = Server::new();
    for _ in 0..TIMES {
        let mut frontend = Frontend::connect(server.socket());
        frontend.negotiate(!0, !0);
        let region = Region {
            file: std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/zero")
                .unwrap()
                .into(),
            ..Region::create(HOLE, 4096)
        };
        frontend.send(
            ADD_MEM_REG,
            NEED_REPLY,
            &single_region(&region),
            &[region.file.as_fd()],
        );
        frontend.wait_closed();
    }
    server.connect_with(Setup::default()).still_serves();
    let ended = server.stop();
    for kind in ["a front-end has connected", "the session has ended"] {
        let told = lines(&ended.stderr, kind);
        assert!(
            (1..=AT_ONCE).contains(&told),
            "{told} times {kind}:\n{}",
            ended.stderr
        );
    }
    assert!(ended.stderr.contains("stopping"));
}
