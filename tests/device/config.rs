//! The configuration space (virtio 1.2 §5.2.4), read and written as front-ends do and as they should not.

use common::driver::{
    Data, Driver, F_BLK_SIZE, F_CONFIG_WCE, F_DISCARD, F_EVENT_IDX, F_FLUSH, F_INDIRECT_DESC, F_MQ, F_RO,
    F_SEG_MAX, F_SIZE_MAX, F_TOPOLOGY, F_VERSION_1, F_WRITE_ZEROES, S_IOERR, S_OK, Setup, T_IN, T_OUT,
};
use common::frontend::{
    F_LOG_ALL, F_PROTOCOL_FEATURES, Frontend, GET_CONFIG, GET_FEATURES, GET_MAX_MEM_SLOTS, GET_QUEUE_NUM,
    PROTOCOL_BACKEND_REQ, PROTOCOL_CONFIG, PROTOCOL_CONFIGURE_MEM_SLOTS, PROTOCOL_INFLIGHT_SHMFD,
    PROTOCOL_LOG_SHMFD, PROTOCOL_MQ, PROTOCOL_REPLY_ACK, PROTOCOL_RESET_DEVICE, SET_CONFIG, SET_FEATURES,
    SET_VRING_NUM, config, vring_state,
};
use common::serve::Server;
use common::volume::{MIB, Volume};

const WRITEBACK: u32 = 32;

fn field<const N: usize>(driver: &Driver, offset: u32) -> [u8; N] {
    driver
        .frontend
        .config(offset, N as u32)
        .unwrap()
        .try_into()
        .unwrap()
}

#[test]
fn device_offers_what_the_specification_has_for_it() {
    let server = Server::new();
    let driver = server.connect();
    let offered = [
        F_SIZE_MAX,
        F_SEG_MAX,
        F_BLK_SIZE,
        F_FLUSH,
        F_TOPOLOGY,
        F_MQ,
        F_WRITE_ZEROES,
        F_INDIRECT_DESC,
        F_EVENT_IDX,
        F_VERSION_1,
        F_PROTOCOL_FEATURES,
        F_LOG_ALL,
    ];
    assert_eq!(driver.frontend.features(), offered.iter().sum::<u64>());
    let protocol = [
        PROTOCOL_MQ,
        PROTOCOL_LOG_SHMFD,
        PROTOCOL_REPLY_ACK,
        PROTOCOL_BACKEND_REQ,
        PROTOCOL_CONFIG,
        PROTOCOL_INFLIGHT_SHMFD,
        PROTOCOL_RESET_DEVICE,
        PROTOCOL_CONFIGURE_MEM_SLOTS,
    ];
    assert_eq!(driver.frontend.protocol(), protocol.iter().sum::<u64>());
    assert_eq!(driver.frontend.ask(GET_QUEUE_NUM, &[]).u64(), 4);
    assert!(driver.frontend.ask(GET_MAX_MEM_SLOTS, &[]).u64() >= 32);

    let read_only = Server::of(Volume::new(), &["--read-only", "--num-queues", "2"]);
    let driver = read_only.connect();
    let features = driver.frontend.features();
    assert_eq!(features & (F_RO | F_FLUSH), F_RO | F_FLUSH);
    assert_eq!(features & (F_WRITE_ZEROES | F_CONFIG_WCE), 0);
    assert_eq!(driver.frontend.ask(GET_QUEUE_NUM, &[]).u64(), 2);
}

#[test]
fn fields_say_what_the_disk_is() {
    for sector_size in [512u32, 4096] {
        let server = Server::of(Volume::created(64 * MIB, sector_size), &[]);
        let driver = server.connect();
        assert_eq!(driver.capacity(), 64 * MIB / 512);
        let (size_max, seg_max) = (
            u32::from_le_bytes(field(&driver, 8)),
            u32::from_le_bytes(field(&driver, 12)),
        );
        assert!(
            size_max >= 65_536 && seg_max >= 64,
            "size_max {size_max}, seg_max {seg_max}"
        );
        assert_eq!(u32::from_le_bytes(field(&driver, 20)), sector_size);
        // Topology: blocks of a power of two of sectors, aligned.
        let [physical_block_exp, alignment_offset] = field(&driver, 24);
        assert!(
            sector_size << physical_block_exp >= 4096,
            "physical_block_exp {physical_block_exp}"
        );
        assert_eq!(alignment_offset, 0);
        assert_eq!(field(&driver, WRITEBACK), [1]);
        assert_eq!(u16::from_le_bytes(field(&driver, 34)), 4);
        // Limits are never 0: Windows divides by them.
        for limit in [36, 40, 44, 48, 52] {
            assert_ne!(u32::from_le_bytes(field(&driver, limit)), 0, "limit at {limit}");
        }
        // A write-zeroes with the unmap flag writes too.
        assert_eq!(field(&driver, 56), [0]);
    }
}

#[test]
fn every_prefix_and_every_range_is_answered_at_the_size_asked_for() {
    let server = Server::new();
    let driver = server.connect();
    let whole = driver.frontend.config(0, 256).unwrap();
    assert!(whole[60..].iter().all(|&byte| byte == 0), "{whole:?}");
    for size in 1..=256 {
        assert_eq!(driver.frontend.config(0, size).unwrap(), whole[..size as usize]);
    }
    for offset in 0..100 {
        for size in [1, 2, 4, 8, 60] {
            let range = offset as usize..(offset + size) as usize;
            assert_eq!(
                driver.frontend.config(offset, size).unwrap(),
                whole[range],
                "{size} at {offset}"
            );
        }
    }
}

#[test]
fn ranges_past_any_configuration_space_are_refused() {
    let server = Server::new();
    for (offset, size) in [
        (4096, 1),
        (4095, 2),
        (u32::MAX, 1),
        (u32::MAX - 3, 8),
        (1 << 31, 4),
    ] {
        // Either answer is one: an empty payload, or the end of the session. The server lives.
        let driver = server.connect();
        driver
            .frontend
            .send(GET_CONFIG, 0, &config(offset, 0, &vec![0; size]), &[]);
        if let Some(reply) = driver.frontend.receive() {
            assert!(reply.payload.is_empty(), "{size} at {offset}: {reply:?}");
        }
        drop(driver);
        server.still_serves();
    }
}

#[test]
fn nothing_in_the_configuration_space_can_be_set() {
    let server = Server::new();
    let driver = server.connect();
    let whole = driver.frontend.config(0, 60).unwrap();
    let refused: [(u32, &[u8]); 11] = [
        (0, &[0; 8]),
        (0, &[0; 60]),
        (0, &[1]),
        (8, &[0; 4]),
        (31, &[0; 2]),
        (32, &[0]),
        (32, &[1]),
        (32, &[0; 2]),
        (32, &[7]),
        (32, &[]),
        (255, &[0]),
    ];
    // Refused, and the session goes on: QEMU passes on what a guest writes, and a guest must not end its own disk.
    for (offset, bytes) in refused {
        assert!(
            set(&driver, offset, bytes).is_some_and(|ack| ack != 0),
            "{} bytes at {offset}",
            bytes.len()
        );
        assert_eq!(driver.frontend.config(0, 60).unwrap(), whole);
    }
    server.still_serves_both(driver);
}

/// A guest that was started with an earlier build may still switch the cache; each of its writes is durable anyway.
#[test]
fn a_guest_that_once_agreed_on_config_wce_may_write_the_field() {
    let server = Server::new();
    let driver = server.connect_with(Setup {
        kept: F_CONFIG_WCE,
        ..Setup::default()
    });
    for on in [0, 0, 1, 0, 1, 1] {
        assert_eq!(set(&driver, WRITEBACK, &[on]), Some(0));
    }
    for (offset, bytes) in [(WRITEBACK, &[2][..]), (WRITEBACK, &[0, 0]), (0, &[0])] {
        assert!(set(&driver, offset, bytes).is_some_and(|ack| ack != 0));
    }
    server.still_serves_both(driver);
}

fn set(driver: &Driver, offset: u32, bytes: &[u8]) -> Option<u64> {
    driver
        .frontend
        .try_tell(SET_CONFIG, &config(offset, 0, bytes), &[])
}

/// The session ended with "message 2 of the front-end is not valid or not offered", which named no option.
#[test]
fn a_running_guest_that_was_told_other_options_is_refused_with_the_option() {
    for (args, kept, says) in [
        (&[][..], F_DISCARD, "discard (--discard)"),
        (&[], F_RO, "read-only (--read-only)"),
        (
            &["--read-only"],
            F_WRITE_ZEROES | F_CONFIG_WCE,
            "a write cache (not with --read-only), write zeroes (not with --read-only)",
        ),
        (&[], 1 << 40, "bit 40"),
    ] {
        let server = Server::of(Volume::new(), args);
        let mut frontend = Frontend::connect(server.socket());
        let features = kept | frontend.negotiate_protocol(!0, !0);
        frontend.send(SET_FEATURES, 0, &features.to_ne_bytes(), &[]);
        frontend.wait_closed();
        assert_eq!(server.connect().run(T_IN, 0, Data::In(512)).status, S_OK);
        let told = server.stop().stderr;
        assert!(told.contains(says) && told.contains("start it again"), "{told}");
    }
}

/// QEMU does not ask for the configuration again when it reconnects: the guest's requests failed, and nothing was told.
#[test]
fn requests_of_a_guest_that_was_told_of_another_disk_are_refused_and_it_is_told_once() {
    let read_only = Server::of(Volume::new(), &["--read-only"]);
    let mut driver = read_only.connect();
    for _ in 0..3 {
        assert_eq!(driver.run(T_OUT, 0, Data::Out(&[1; 512])).status, S_IOERR);
    }
    let end = driver.capacity();
    assert_eq!(driver.run(T_IN, end, Data::In(512)).status, S_IOERR);
    drop(driver);
    let told = read_only.stop().stderr;
    assert_eq!(
        told.matches("takes this disk for another one").count(),
        1,
        "{told}"
    );
    assert!(
        told.contains("the disk is read-only") && told.contains("--read-only"),
        "{told}"
    );
}

/// It was advised to have more queues served, as was each QEMU whose guest had never used the disk.
#[test]
fn a_front_end_that_leaves_later_is_told_nothing_of_queues() {
    let server = Server::of(Volume::new(), &[]);
    let mut frontend = Frontend::connect(server.socket());
    frontend.negotiate_protocol(!0, !0);
    frontend.ask(GET_QUEUE_NUM, &[]);
    frontend.ask(GET_FEATURES, &[]);
    drop(frontend);
    server.wait_idle();
    server.still_serves();
    let told = server.stop().stderr;
    assert!(told.contains("the front-end has left"), "{told}");
    assert!(!told.contains("it may stay"), "{told}");
}

/// QEMU says so itself and gives up; sealblk said that a front-end had left.
#[test]
fn a_front_end_that_wants_more_queues_is_told_of_the_option() {
    let server = Server::of(Volume::new(), &["--num-queues", "2"]);
    let mut frontend = Frontend::connect(server.socket());
    frontend.negotiate_protocol(!0, !0);
    assert_eq!(frontend.ask(GET_QUEUE_NUM, &[]).u64(), 2);
    drop(frontend);
    server.wait_idle();
    let mut frontend = Frontend::connect(server.socket());
    frontend.negotiate(!0, !0);
    frontend.send(SET_VRING_NUM, 0, &vring_state(2, 128), &[]);
    frontend.wait_closed();
    server.still_serves();
    let told = server.stop().stderr;
    assert!(told.contains("it may stay: --num-queues"), "{told}");
    assert!(
        told.contains("queue 2 is one too many: there are 2 (--num-queues)"),
        "{told}"
    );
}
