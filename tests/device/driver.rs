//! The tests' own driver, judged by a back-end that is not ours: what it does right, QEMU's storage daemon serves.

use common::driver::{
    Data, Driver, F_EVENT_IDX, S_IOERR, S_OK, S_UNSUPP, Setup, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES,
};
use common::pattern;
use common::queue::{readable, writable};
use common::serve::Server;
use common::volume::MIB;

#[test]
fn qemu_storage_daemon_serves_the_driver() {
    let server = Server::reference(64 * MIB);
    for event_idx in [F_EVENT_IDX, 0] {
        let setup = Setup {
            queues: 4,
            features: !F_EVENT_IDX | event_idx,
            ..Setup::default()
        };
        let mut driver = server.connect_with(setup);
        assert_eq!(driver.capacity(), 64 * MIB / 512);
        driver.still_serves();
        let bytes = pattern(1, 300 * 1024);
        driver.write(1000, &bytes);
        assert!(driver.read(1000, bytes.len()) == bytes);
        assert_eq!(driver.run_ranges(T_WRITE_ZEROES, &[(1000, 8, 0)]).status, S_OK);
        assert_eq!(driver.read(1000, 4096), vec![0; 4096]);
        assert_eq!(driver.run(T_IN, driver.capacity(), Data::In(512)).status, S_IOERR);
        assert_eq!(driver.run(77, 0, Data::None).status, S_UNSUPP);
        assert_eq!(driver.run(T_GET_ID, 0, Data::In(20)).status, S_OK);
    }
}

#[test]
fn qemu_storage_daemon_serves_every_shape_of_chain() {
    let server = Server::reference(64 * MIB);
    let mut driver = server.connect();
    let bytes = pattern(2, 4096);
    let (write, buffers) = driver.build(T_OUT, 0, Data::Out(&bytes));
    let head = driver.queue().indirect_chain(&buffers);
    driver.run_head(head);
    assert_eq!(driver.memory.read(write.status, 1), [S_OK]);

    // A descriptor for every 64 bytes of data.
    let (read, buffers) = driver.build(T_IN, 0, Data::In(4096));
    let mut split = vec![readable(buffers[0].addr, 16)];
    split.extend((0..64).map(|i| writable(read.data + 64 * i, 64)));
    split.push(buffers[2]);
    driver.run_chain(&split);
    assert_eq!(driver.memory.read(read.status, 1), [S_OK]);
    assert!(driver.memory.read(read.data, 4096) == bytes);
    driver.memory.check_guards();
}

#[test]
fn qemu_storage_daemon_takes_the_ring_up_where_it_was_left() {
    let server = Server::reference(64 * MIB);
    let mut driver = Driver::with(
        server.socket(),
        Setup {
            base: 65_530,
            ..Setup::default()
        },
    );
    for _ in 0..10 {
        driver.still_serves();
    }
    let base = driver.frontend.stop_vring(0);
    assert_eq!(base, driver.queue().next_avail());
    driver
        .frontend
        .start_vring(&driver.queues[0], &driver.memory, base);
    driver.frontend.enable(0, true);
    driver.still_serves();
}
