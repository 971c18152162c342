//! Requests and the chains that carry them (virtio 1.2 §5.2.6, §2.7), right and wrong, by a driver over a real socket.
//!
//! Whatever a driver does, it gets back exactly what is its due: a status byte where one can be written, `used.len`
//! = the length of the contiguous prefix of the device-writable area that was written, no byte more. A chain without
//! a status byte comes back with `used.len` 0. And the device goes on serving, on the same queue and on new
//! connections.

use common::driver::{
    Data, Done, Driver, F_EVENT_IDX, F_RO, S_IOERR, S_OK, S_UNSUPP, SECTOR, Setup, T_DISCARD, T_FLUSH,
    T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, header, range_bytes,
};
use common::memory::{END, HOLE, SEAM, UNTOUCHED};
use common::queue::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Desc, readable, writable};
use common::serve::Server;
use common::volume::{MIB, Volume};
use common::{Random, pattern};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vm_memory::{Bytes, GuestAddress};

fn start() -> (Server, Driver) {
    let server = Server::new();
    let driver = server.connect();
    (server, driver)
}

fn failed(status: u8, used_len: u32, data: usize) -> Done {
    Done {
        status,
        used_len,
        data: vec![UNTOUCHED; data],
    }
}

// ---- what a request is

#[test]
fn what_is_written_reads_back_at_every_size() {
    let (server, mut driver) = start();
    let capacity = driver.capacity();
    assert_eq!(capacity, 64 * MIB / 512);
    for (seed, sectors) in [1, 2, 7, 8, 9, 64, 255, 2048, 4096].into_iter().enumerate() {
        let bytes = pattern(seed as u64, sectors * SECTOR);
        for sector in [0, 1, 13, capacity - sectors as u64] {
            driver.write(sector, &bytes);
            assert!(
                driver.read(sector, bytes.len()) == bytes,
                "{sectors} sectors at {sector}"
            );
        }
    }
    server.still_serves_both(driver);
}

#[test]
fn requests_beyond_the_capacity_fail_and_change_nothing() {
    let (server, mut driver) = start();
    let capacity = driver.capacity();
    let last = pattern(1, SECTOR);
    driver.write(capacity - 1, &last);
    let beyond = [
        capacity,
        capacity - 1,
        capacity - 7,
        capacity + 1,
        1 << 55,
        (1 << 55) - 8,
        u64::MAX,
        u64::MAX - 7,
    ];
    for sector in beyond {
        let write = driver.run(T_OUT, sector, Data::Out(&[0xff; 8 * SECTOR]));
        assert_eq!(write, failed(S_IOERR, 1, 0), "write at {sector}");
        let read = driver.run(T_IN, sector, Data::In(8 * SECTOR));
        assert_eq!(read, failed(S_IOERR, 0, 8 * SECTOR), "read at {sector}");
    }
    assert!(driver.read(capacity - 1, SECTOR) == last);
    server.still_serves_both(driver);
}

#[test]
fn requests_of_billions_of_bytes_fail() {
    let server = Server::new();
    let mut driver = server.connect_with(Setup {
        queue_size: 1024,
        ..Setup::default()
    });
    for (kind, data) in [(T_OUT, Data::Out(&vec![7; 8 << 20])), (T_IN, Data::In(8 << 20))] {
        let mark = driver.memory.mark();
        // 511 times 8 MiB is what 32 bits can count, and too long for the disk; 512 times is no legal chain any more.
        for (times, status, written) in [(511, S_IOERR, u32::from(kind == T_OUT)), (512, UNTOUCHED, 0)] {
            let (request, buffers) = driver.build(kind, 0, data);
            let mut chain = vec![buffers[0]];
            chain.extend(std::iter::repeat_n(buffers[1], times));
            chain.push(buffers[2]);
            let head = driver.queue().indirect_chain(&chain);
            let used = driver.run_head(head);
            assert_eq!(
                (driver.memory.read(request.status, 1)[0], used.len),
                (status, written),
                "{times} times"
            );
            driver.memory.free_to(mark);
        }
    }
    server.still_serves_both(driver);
}

#[test]
fn length_that_is_not_whole_sectors_fails() {
    let (server, mut driver) = start();
    let bytes = pattern(2, 16 * SECTOR);
    driver.write(0, &bytes);
    for len in [1, 511, 513, 1023, 4095, 4097] {
        assert_eq!(
            driver.run(T_OUT, 0, Data::Out(&vec![9; len])),
            failed(S_IOERR, 1, 0),
            "write of {len}"
        );
        assert_eq!(
            driver.run(T_IN, 0, Data::In(len)),
            failed(S_IOERR, 0, len),
            "read of {len}"
        );
    }
    assert!(
        driver.read(0, bytes.len()) == bytes,
        "a write that failed left something"
    );
    server.still_serves_both(driver);
}

#[test]
fn request_that_splits_a_4096_byte_sector_fails() {
    let server = Server::of(Volume::created(64 * MIB, 4096), &[]);
    let mut driver = server.connect();
    let bytes = pattern(3, 4096);
    driver.write(8, &bytes);
    for (sector, len) in [(8, 512), (9, 4096), (15, 512), (8, 4096 + 512), (4, 8192)] {
        assert_eq!(
            driver.run(T_OUT, sector, Data::Out(&vec![9; len])),
            failed(S_IOERR, 1, 0),
            "write at {sector}"
        );
        assert_eq!(
            driver.run(T_IN, sector, Data::In(len)),
            failed(S_IOERR, 0, len),
            "read at {sector}"
        );
    }
    assert!(driver.read(8, 4096) == bytes);
    server.still_serves_both(driver);
}

#[test]
fn requests_of_no_data_succeed() {
    let (server, mut driver) = start();
    for (kind, sector) in [
        (T_IN, 0),
        (T_OUT, 0),
        (T_IN, driver.capacity()),
        (T_FLUSH, 0),
        (T_GET_ID, 0),
    ] {
        let done = driver.run(kind, sector, Data::None);
        assert_eq!(done, failed(S_OK, 1, 0), "type {kind} at {sector}");
    }
    server.still_serves_both(driver);
}

#[test]
fn get_id_gives_at_most_20_bytes_padded_with_zeros() {
    let (server, mut driver) = start();
    let id = driver.run(T_GET_ID, 0, Data::In(20));
    assert_eq!((id.status, id.used_len), (S_OK, 21));
    let text: Vec<u8> = id.data.iter().copied().take_while(|&byte| byte != 0).collect();
    assert!(!text.is_empty() && text.is_ascii(), "{:?}", id.data);
    assert!(
        id.data[text.len()..].iter().all(|&byte| byte == 0),
        "{:?}",
        id.data
    );

    // A longer buffer keeps what the ID does not fill, so the status is no part of the prefix.
    let long = driver.run(T_GET_ID, 0, Data::In(64));
    assert_eq!((long.status, long.used_len), (S_OK, 20));
    assert_eq!(
        (&long.data[..20], &long.data[20..]),
        (&id.data[..], &[UNTOUCHED; 44][..])
    );
    let short = driver.run(T_GET_ID, 0, Data::In(8));
    assert_eq!(
        (short.status, short.used_len, &short.data[..]),
        (S_OK, 9, &id.data[..8])
    );
    server.still_serves_both(driver);
}

#[test]
fn unknown_request_types_are_unsupported() {
    let (server, mut driver) = start();
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 0x100, 0x8000_0000, u32::MAX] {
        assert_eq!(
            driver.run(kind, 0, Data::None),
            failed(S_UNSUPP, 1, 0),
            "type {kind:#x}"
        );
        assert_eq!(
            driver.run(kind, u64::MAX, Data::Out(&[1; 512])),
            failed(S_UNSUPP, 1, 0),
            "type {kind:#x}"
        );
        assert_eq!(
            driver.run(kind, 0, Data::In(512)),
            failed(S_UNSUPP, 0, 512),
            "type {kind:#x}"
        );
    }
    server.still_serves_both(driver);
}

#[test]
fn read_only_disk_refuses_every_write_whatever_was_negotiated() {
    let volume = Volume::new();
    let bytes = pattern(4, 4096);
    let server = Server::with(&volume, &[]);
    server.connect().write(8, &bytes);
    server.stop();
    let before = volume.bytes();

    let server = Server::with(&volume, &["--read-only"]);
    for features in [!0, !F_RO] {
        let mut driver = server.connect_with(Setup {
            features,
            ..Setup::default()
        });
        assert_eq!(driver.features & F_RO != 0, features & F_RO != 0);
        assert_ne!(driver.frontend.features() & F_RO, 0);
        assert_eq!(driver.run(T_OUT, 8, Data::Out(&[1; 4096])), failed(S_IOERR, 1, 0));
        let zeroes = range_bytes(&[(8, 8, 0)]);
        assert_ne!(driver.run(T_WRITE_ZEROES, 0, Data::Out(&zeroes)).status, S_OK);
        assert_ne!(driver.run(T_DISCARD, 0, Data::Out(&zeroes)).status, S_OK);
        driver.flush();
        assert!(driver.read(8, 4096) == bytes);
    }
    server.stop();
    assert!(volume.bytes() == before, "the volume changed");
}

// ---- where the parts of a request may lie

#[test]
fn header_data_and_status_may_share_descriptors() {
    let (server, mut driver) = start();
    let bytes = pattern(5, 2 * SECTOR);
    let mut out = header(T_OUT, 40);
    out.extend(&bytes);
    let (out, status) = (driver.memory.filled(&out), driver.memory.buffer(1));
    let used = driver.run_chain(&[readable(out, 16 + bytes.len()), writable(status, 1)]);
    assert_eq!((used.len, driver.memory.read(status, 1)), (1, vec![S_OK]));

    // The status is the last byte of what the device may write.
    let (head, data) = (
        driver.memory.filled(&header(T_IN, 40)),
        driver.memory.buffer(2 * 512 + 1),
    );
    let used = driver.run_chain(&[readable(head, 16), writable(data, 2 * SECTOR + 1)]);
    let written = driver.memory.read(data, 2 * SECTOR + 1);
    assert_eq!(used.len, 2 * SECTOR as u32 + 1);
    assert!(written[..2 * SECTOR] == bytes && written[2 * SECTOR] == S_OK);
    driver.memory.check_guards();
    server.still_serves_both(driver);
}

#[test]
fn requests_may_be_split_at_every_byte() {
    let (server, mut driver) = start();
    let mut random = Random::new(6);
    for round in 0..40 {
        let sectors = 1 + random.below(8);
        let bytes = pattern(round, sectors as usize * SECTOR);
        let sector = random.below(1000);
        let mark = driver.memory.mark();
        let mut out = header(T_OUT, sector);
        out.extend(&bytes);
        let out = driver.memory.filled(&out);
        let status = driver.memory.buffer(1);
        let mut chain: Vec<_> = random
            .pieces(16 + bytes.len())
            .into_iter()
            .map(|(at, len)| readable(out + at, len))
            .collect();
        chain.push(writable(status, 1));
        assert_eq!(driver.run_chain(&chain).len, 1);
        assert_eq!(driver.memory.read(status, 1), [S_OK], "round {round}");

        let (head, data) = (
            driver.memory.filled(&header(T_IN, sector)),
            driver.memory.buffer(bytes.len() as u64 + 1),
        );
        let mut chain: Vec<_> = random
            .pieces(16)
            .into_iter()
            .map(|(at, len)| readable(head + at, len))
            .collect();
        chain.extend(
            random
                .pieces(bytes.len() + 1)
                .into_iter()
                .map(|(at, len)| writable(data + at, len)),
        );
        let indirect = driver.queue().indirect_chain(&chain);
        assert_eq!(driver.run_head(indirect).len, bytes.len() as u32 + 1);
        let written = driver.memory.read(data, bytes.len() + 1);
        assert!(
            written[..bytes.len()] == bytes && written[bytes.len()] == S_OK,
            "round {round}"
        );
        driver.memory.free_to(mark);
    }
    server.still_serves_both(driver);
}

#[test]
fn a_request_may_have_as_many_descriptors_as_the_queue_is_long() {
    let server = Server::new();
    let mut driver = server.connect_with(Setup {
        queue_size: 256,
        ..Setup::default()
    });
    let bytes = pattern(7, 254 * SECTOR);
    let (write, buffers) = driver.build(T_OUT, 0, Data::Out(&bytes));
    let mut chain = vec![buffers[0]];
    chain.extend((0..254).map(|i| readable(buffers[1].addr + i * 512, SECTOR)));
    chain.push(buffers[2]);
    assert_eq!(driver.run_chain(&chain).len, 1);
    assert_eq!(driver.memory.read(write.status, 1), [S_OK]);

    let (read, buffers) = driver.build(T_IN, 0, Data::In(bytes.len()));
    let mut chain = vec![buffers[0]];
    chain.extend((0..254).map(|i| writable(read.data + i * 512, SECTOR)));
    chain.push(buffers[2]);
    let head = driver.queue().indirect_chain(&chain);
    assert_eq!(driver.run_head(head).len, bytes.len() as u32 + 1);
    assert!(driver.memory.read(read.data, bytes.len()) == bytes);
    server.still_serves_both(driver);
}

#[test]
fn buffers_may_straddle_regions_that_are_adjacent() {
    let (server, mut driver) = start();
    let bytes = pattern(8, 4096);
    let memory = driver.memory.clone();
    let status = memory.buffer(1);
    // Header, data and status in one stretch each, cut by the seam at every kind of place.
    for before in [1, 15, 16, 17, 16 + 511, 16 + 512, 16 + 513, 16 + 4095] {
        let at = SEAM - before;
        memory.place(at, 16 + 4096);
        memory.write(at, &header(T_OUT, 80));
        memory.write(at + 16, &bytes);
        assert_eq!(
            driver
                .run_chain(&[readable(at, 16 + 4096), writable(status, 1)])
                .len,
            1
        );
        assert_eq!(
            memory.read(status, 1),
            [S_OK],
            "write, {before} bytes before the seam"
        );

        let head = memory.filled(&header(T_IN, 80));
        memory.place(at, 4097);
        assert_eq!(
            driver.run_chain(&[readable(head, 16), writable(at, 4097)]).len,
            4097
        );
        let written = memory.read(at, 4097);
        assert!(
            written[..4096] == bytes && written[4096] == S_OK,
            "read, {before} bytes before the seam"
        );
    }
    server.still_serves_both(driver);
}

#[test]
fn the_status_is_one_byte_the_last_that_the_device_may_write() {
    let (server, mut driver) = start();
    let status = driver.memory.buffer(4);
    let head = driver.memory.filled(&header(T_FLUSH, 0));
    let used = driver.run_chain(&[readable(head, 16), writable(status, 4)]);
    assert_eq!(
        driver.memory.read(status, 4),
        [UNTOUCHED, UNTOUCHED, UNTOUCHED, S_OK]
    );
    assert_eq!(used.len, 0, "the prefix that was written is empty");
    driver.memory.check_guards();
    server.still_serves_both(driver);
}

// ---- chains that are wrong

#[test]
fn chain_without_a_status_byte_comes_back_with_nothing_written() {
    let (server, mut driver) = start();
    let bytes = pattern(9, SECTOR);
    driver.write(0, &bytes);
    let (_, write) = driver.build(T_OUT, 0, Data::Out(&[1; SECTOR]));
    let (_, read) = driver.build(T_IN, 0, Data::In(SECTOR));
    let status = read[2].addr;
    let empty_status = writable(status, 0);
    let chains = [
        vec![write[0]],
        vec![write[0], write[1]],
        vec![write[0], write[1], empty_status],
        vec![write[0], write[1], writable(HOLE, 1)],
        vec![write[0], write[1], writable(END, 1)],
        vec![write[0], write[1], writable(u64::MAX, 1)],
        vec![read[0], writable(HOLE, SECTOR + 1)],
        vec![read[0], writable(END - 512, SECTOR + 1)],
        vec![read[0], writable(u64::MAX - 100, SECTOR + 1)],
        vec![readable(write[0].addr, 0)],
        vec![readable(HOLE, 16)],
    ];
    for (i, chain) in chains.iter().enumerate() {
        assert_eq!(driver.run_chain(chain).len, 0, "chain {i}");
        let head = driver.queue().indirect_chain(chain);
        assert_eq!(driver.run_head(head).len, 0, "chain {i}, indirect");
        driver.memory.check_guards();
    }
    assert_eq!(driver.memory.read(status, 1), [UNTOUCHED]);
    assert_eq!(
        driver.memory.read(read[1].addr, SECTOR),
        Driver::untouched(SECTOR)
    );
    assert!(
        driver.read(0, SECTOR) == bytes,
        "a chain that was refused wrote to the disk"
    );
    server.still_serves_both(driver);
}

#[test]
fn buffers_outside_of_memory_fail_the_request_when_its_status_can_be_written() {
    let (server, mut driver) = start();
    let bytes = pattern(10, 2 * SECTOR);
    driver.write(0, &bytes);
    let status = driver.memory.buffer(1);
    let last = writable(status, 1);
    let out = readable(driver.memory.filled(&header(T_OUT, 0)), 16);
    let read = readable(driver.memory.filled(&header(T_IN, 0)), 16);
    let outside = [
        HOLE,
        END,
        END - 511,
        SEAM * 2 - 1,
        u64::MAX,
        u64::MAX - 511,
        u64::MAX - 1023,
        1 << 63,
    ];
    for at in outside {
        driver.memory.write(status, &[UNTOUCHED]);
        let used = driver.run_chain(&[out, readable(at, 2 * SECTOR), last]);
        assert_eq!(
            (used.len, driver.memory.read(status, 1)),
            (1, vec![S_IOERR]),
            "write from {at:#x}"
        );
        driver.memory.write(status, &[UNTOUCHED]);
        let used = driver.run_chain(&[read, writable(at, 2 * SECTOR), last]);
        assert_eq!(
            (used.len, driver.memory.read(status, 1)),
            (0, vec![S_IOERR]),
            "read to {at:#x}"
        );
        driver.memory.write(status, &[UNTOUCHED]);
        let used = driver.run_chain(&[readable(at.saturating_add(500), 16), last]);
        assert_eq!(
            (used.len, driver.memory.read(status, 1)),
            (1, vec![S_IOERR]),
            "header near {at:#x}"
        );
        // The request is in memory, but for one sector in the middle.
        let good = driver.memory.filled(&[0x11; SECTOR]);
        let used = driver.run_chain(&[out, readable(good, SECTOR), readable(at, SECTOR), last]);
        assert_eq!(
            (used.len, driver.memory.read(status, 1)),
            (1, vec![S_IOERR]),
            "second half from {at:#x}"
        );
    }
    assert!(
        driver.read(0, 2 * SECTOR) == bytes,
        "a request that failed wrote to the disk"
    );
    server.still_serves_both(driver);
}

#[test]
fn header_that_is_too_short_fails() {
    let (server, mut driver) = start();
    let status = driver.memory.buffer(1);
    let head = driver.memory.filled(&header(T_FLUSH, 0));
    for len in [1, 4, 8, 15] {
        driver.memory.write(status, &[UNTOUCHED]);
        let used = driver.run_chain(&[readable(head, len), writable(status, 1)]);
        assert_eq!(
            (used.len, driver.memory.read(status, 1)),
            (1, vec![S_IOERR]),
            "header of {len}"
        );
    }
    driver.memory.write(status, &[UNTOUCHED]);
    let used = driver.run_chain(&[writable(status, 1)]);
    assert_eq!(
        (used.len, driver.memory.read(status, 1)),
        (1, vec![S_IOERR]),
        "no header"
    );
    server.still_serves_both(driver);
}

#[test]
fn chains_that_never_end_come_back_with_nothing_written() {
    let (server, mut driver) = start();
    let size = driver.queue().size;
    let (head, status) = (driver.memory.filled(&header(T_FLUSH, 0)), driver.memory.buffer(1));
    let desc = |addr, len, flags, next| Desc {
        addr,
        len,
        flags,
        next,
    };
    let cases: [&[(u16, Desc)]; 5] = [
        // To itself; to and fro; round the whole table; past the status; out of the table.
        &[(3, desc(head, 16, DESC_NEXT, 3))],
        &[
            (3, desc(head, 16, DESC_NEXT, 4)),
            (4, desc(status, 1, DESC_NEXT | DESC_WRITE, 3)),
        ],
        &[
            (3, desc(head, 16, DESC_NEXT, 4)),
            (4, desc(status, 1, DESC_NEXT | DESC_WRITE, 4)),
        ],
        &[(3, desc(head, 16, DESC_NEXT, size))],
        &[(3, desc(head, 16, DESC_NEXT, u16::MAX))],
    ];
    for (i, descriptors) in cases.iter().enumerate() {
        descriptors
            .iter()
            .for_each(|&(at, desc)| driver.queue().set_desc(at, desc));
        assert_eq!(driver.run_head(3).len, 0, "case {i}");
    }
    for at in 0..size {
        driver
            .queue()
            .set_desc(at, desc(head, 16, DESC_NEXT, (at + 1) % size));
    }
    assert_eq!(driver.run_head(3).len, 0, "round the table");
    assert_eq!(driver.memory.read(status, 1), [UNTOUCHED]);
    server.still_serves_both(driver);
}

#[test]
fn indirect_tables_that_are_wrong_come_back_with_nothing_written() {
    let (server, mut driver) = start();
    let memory = driver.memory.clone();
    let (head, status) = (memory.filled(&header(T_FLUSH, 0)), memory.buffer(1));
    let table = memory.buffer(64).next_multiple_of(16);
    let put = |at: u64, addr: u64, len: u32, flags: u16, next: u16| {
        let bytes = [
            &addr.to_le_bytes()[..],
            &len.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ]
        .concat();
        memory.write(table + 16 * at, &bytes);
    };
    let good = || {
        put(0, head, 16, DESC_NEXT, 1);
        put(1, status, 1, DESC_WRITE, 0);
    };
    good();
    // Of no length, of no whole descriptors, longer than memory, nowhere.
    for (at, len) in [
        (table, 0),
        (table, 15),
        (table, 17),
        (table, 31),
        (END - 16, 32),
        (HOLE, 32),
        (u64::MAX - 15, 32),
    ] {
        let head = driver.queue().indirect(at, len);
        assert_eq!(driver.run_head(head).len, 0, "table at {at:#x} of {len}");
    }
    // A table in a table; one that goes round; one that leads out of itself.
    let tables: [&dyn Fn(); 3] = [
        &|| put(0, table, 32, DESC_INDIRECT, 0),
        &|| put(1, status, 1, DESC_WRITE | DESC_NEXT, 0),
        &|| put(1, status, 1, DESC_WRITE | DESC_NEXT, 2),
    ];
    for (i, spoil) in tables.iter().enumerate() {
        good();
        spoil();
        let head = driver.queue().indirect(table, 32);
        assert_eq!(driver.run_head(head).len, 0, "table {i}");
    }
    assert_eq!(memory.read(status, 1), [UNTOUCHED]);
    good();
    let head = driver.queue().indirect(table, 32);
    assert_eq!(
        (driver.run_head(head).len, memory.read(status, 1)),
        (1, vec![S_OK])
    );
    server.still_serves_both(driver);
}

/// A queue whose driver offers a head that is not its to offer is served no more, until it is set up anew.
fn is_retired(server: &Server, driver: &mut Driver) {
    let used = driver.queue().used_index();
    let (_, buffers) = driver.build(T_FLUSH, 0, Data::None);
    let head = driver.queue().chain(&buffers);
    driver.queue().offer(&[head]);
    driver.queue().kick();
    // The other queue is served again and again, the broken one not at all.
    for round in 0..50 {
        let read = driver.run_on(1, T_IN, 0, Data::In(SECTOR));
        assert_eq!(read.status, S_OK, "round {round}");
    }
    assert_eq!(driver.queue().used_index(), used);
    server.process.wait_stderr("the driver broke this queue");

    driver.frontend.stop_vring(0);
    let event_idx = driver.features & F_EVENT_IDX != 0;
    driver.queues[0] = common::queue::Queue::new(&driver.memory, 0, 128, event_idx);
    driver.restart(0, 0);
    driver.still_serves();
}

fn start_two() -> (Server, Driver) {
    let server = Server::new();
    let setup = Setup {
        queues: 2,
        ..Setup::default()
    };
    let driver = server.connect_with(setup);
    (server, driver)
}

#[test]
fn head_outside_of_the_table_retires_the_queue() {
    for beyond in [128, 129, u16::MAX] {
        let (server, mut driver) = start_two();
        let (flush, buffers) = driver.build(T_FLUSH, 0, Data::None);
        let head = driver.queue().chain(&buffers);
        driver.queue().offer(&[head, beyond, head]);
        driver.queue().kick();
        assert_eq!(driver.queue().wait_used().head, head);
        assert_eq!(driver.memory.read(flush.status, 1), [S_OK]);
        is_retired(&server, &mut driver);
        server.still_serves_both(driver);
    }
}

#[test]
fn head_that_is_in_flight_is_not_taken_again() {
    let (server, mut driver) = start_two();
    let bytes = pattern(11, MIB as usize);
    let (write, buffers) = driver.build(T_OUT, 0, Data::Out(&bytes));
    let queue = driver.queue();
    let (a, used_before) = (queue.chain(&buffers), queue.used_index());
    queue.offer(&[a, a, a, a]);
    queue.kick();
    assert_eq!(queue.wait_used().head, a);
    assert_eq!(driver.memory.read(write.status, 1), [S_OK]);
    server.process.wait_stderr("the driver broke this queue");
    // The answer to GET_VRING_BASE comes after all that was taken: nothing more can come back.
    let base = driver.frontend.stop_vring(0);
    assert_eq!(
        driver.queue().used_index(),
        used_before.wrapping_add(1),
        "a head came back twice"
    );
    assert_eq!(
        base,
        driver.queue().used_index(),
        "what was refused counts as taken"
    );
    driver.restart(0, base);
    // It is offered by now, and is the driver's to offer.
    assert_eq!(driver.queue().wait_used().head, a);
    drop(driver);
    server.still_serves();
}

#[test]
fn ring_whose_index_jumps_is_retired_and_the_others_go_on() {
    let server = Server::new();
    let mut driver = server.connect_with(Setup {
        queues: 2,
        ..Setup::default()
    });
    driver.still_serves();
    let used = driver.queue().used_index();
    let jump = driver.queue().next_avail().wrapping_add(driver.queue().size + 1);
    driver.queue().forge_avail_index(jump);
    driver.queue().kick();
    // The other queue is served again and again, the broken one not at all.
    for round in 0..50 {
        let read = driver.run_on(1, T_IN, 0, Data::In(SECTOR));
        assert_eq!(read.status, S_OK, "round {round}");
    }
    assert_eq!(driver.queue().used_index(), used);

    // Set up anew, it serves again.
    driver.frontend.stop_vring(0);
    let event_idx = driver.features & F_EVENT_IDX != 0;
    driver.queues[0] = common::queue::Queue::new(&driver.memory, 0, 128, event_idx);
    driver.restart(0, 0);
    server.still_serves_both(driver);
}

#[test]
fn the_header_is_read_once() {
    let (server, mut driver) = start();
    let (zero, eight) = (pattern(12, 8 * SECTOR), pattern(13, 8 * SECTOR));
    driver.write(0, &zero);
    driver.write(8, &eight);
    let (request, buffers) = driver.build(T_IN, 0, Data::In(8 * SECTOR));

    // Two sectors that are served and one that is beyond the capacity.
    let flipper = Flipper::start(&driver, request.header + 8, vec![0, 8, u64::MAX - 3]);
    let (mut good, mut bad) = (0, 0);
    for round in 0..1000 {
        driver.memory.write(request.data, &Driver::untouched(8 * SECTOR));
        let used = driver.run_chain(&buffers);
        let data = driver.memory.read(request.data, 8 * SECTOR);
        match driver.memory.read(request.status, 1)[0] {
            S_OK => {
                assert!(
                    used.len == 4097 && (data == zero || data == eight),
                    "round {round}: torn"
                );
                good += 1;
            }
            status => {
                assert_eq!((status, used.len), (S_IOERR, 0), "round {round}");
                assert_eq!(data, Driver::untouched(8 * SECTOR), "round {round}");
                bad += 1;
            }
        }
    }
    drop(flipper);
    println!("{good} read, {bad} refused");
    server.still_serves_both(driver);
}

#[test]
fn the_segments_of_a_request_are_read_once() {
    let (server, mut driver) = start();
    let capacity = driver.capacity();
    let bytes = pattern(18, 16 * SECTOR);
    let (request, buffers) = driver.build(T_WRITE_ZEROES, 0, Data::Out(&range_bytes(&[(0, 8, 0)])));
    let flipper = Flipper::start(&driver, buffers[1].addr, vec![0, 8, capacity - 4, u64::MAX - 3]);
    for round in 0..300 {
        driver.write(0, &bytes);
        driver.run_chain(&buffers);
        let now = driver.read(0, 16 * SECTOR);
        let mut first = bytes.clone();
        first[..8 * SECTOR].fill(0);
        let mut second = bytes.clone();
        second[8 * SECTOR..].fill(0);
        match driver.memory.read(request.status, 1)[0] {
            S_OK => assert!(
                now == first || now == second,
                "round {round}: neither range alone was zeroed"
            ),
            status => assert!(status == S_IOERR && now == bytes, "round {round}: {status}"),
        }
    }
    drop(flipper);
    server.still_serves_both(driver);
}

#[test]
fn descriptors_may_change_under_the_device() {
    let (server, mut driver) = start();
    let (zero, eight) = (pattern(19, 8 * SECTOR), pattern(20, 8 * SECTOR));
    driver.write(0, &zero);
    driver.write(8, &eight);
    for kind in [T_IN, T_OUT] {
        let data = if kind == T_IN {
            Data::In(8 * SECTOR)
        } else {
            Data::Out(&zero)
        };
        let (_, buffers) = driver.build(kind, 0, data);
        let head = driver.queue().chain(&buffers);
        let table = driver.queue().desc;
        // The chain's descriptors are the highest ones of the table, in order downwards.
        let second = table + 16 * u64::from(head - 1);
        let flags = if kind == T_IN {
            DESC_NEXT | DESC_WRITE
        } else {
            DESC_NEXT
        };
        let tail = |len: u64, flags: u16, next: u64| len | u64::from(flags) << 32 | next << 48;
        let next = u64::from(head - 2);
        let addresses = Flipper::start(&driver, second, vec![buffers[1].addr, HOLE, END - 512, u64::MAX]);
        let tails = Flipper::start(
            &driver,
            second + 8,
            vec![
                tail(4096, flags, next),
                tail(u64::from(u32::MAX), flags, next),
                tail(4096, flags ^ DESC_WRITE, next),
                tail(4096, flags, u64::from(head)),
                tail(4096, DESC_INDIRECT, 0),
                tail(0, 0, 0),
            ],
        );
        for _ in 0..500 {
            let queue = driver.queue();
            queue.offer(&[head]);
            queue.kick_if_asked(1);
            let used = queue.wait_used();
            assert!(used.head == head && used.len <= 4097, "{used:?}");
            driver.memory.check_guards();
        }
        drop((addresses, tails));
    }
    // Only sectors that were written to can have changed.
    assert!(driver.read(8, 8 * SECTOR) == eight);
    drop(driver);
    server.still_serves();
}

/// A thread that writes one value after the other to a place in guest memory, until it is dropped.
struct Flipper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flipper {
    fn start(driver: &Driver, at: u64, values: Vec<u64>) -> Self {
        let (map, stop) = (driver.memory.map(), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for &value in &values {
                    map.store(value, GuestAddress(at), Ordering::Relaxed).unwrap();
                }
            }
            map.store(values[0], GuestAddress(at), Ordering::Relaxed).unwrap();
        });
        Flipper {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Flipper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

// ---- rings

#[test]
fn ring_indexes_go_round_at_65536() {
    let server = Server::new();
    for event_idx in [F_EVENT_IDX, 0] {
        let features = !F_EVENT_IDX | event_idx;
        let mut driver = server.connect_with(Setup {
            base: 65_500,
            features,
            queues: 2,
            ..Setup::default()
        });
        let mut random = Random::new(14);
        while driver.queue().next_avail() > 60_000 {
            driver.still_serves();
            let sector = random.below(1000);
            let bytes = pattern(sector, SECTOR);
            driver.write(sector, &bytes);
            assert!(driver.read(sector, SECTOR) == bytes);
        }
        driver.still_serves();
        assert_eq!(driver.frontend.stop_vring(0), driver.queue().next_avail());
    }
}

#[test]
fn queues_of_every_size_are_served() {
    let server = Server::new();
    for queue_size in [4, 8, 16, 64, 256, 1024] {
        let mut driver = server.connect_with(Setup {
            queue_size,
            ..Setup::default()
        });
        (0..3).for_each(|_| driver.still_serves());
    }
}

#[test]
fn spurious_kicks_and_calls_do_no_harm() {
    let (server, mut driver) = start();
    let used = driver.queue().used_index();
    for _ in 0..200 {
        driver.queue().kick();
        driver.queue().call.signal();
    }
    driver.still_serves();
    assert_eq!(driver.queue().used_index(), used.wrapping_add(3));
    server.still_serves_both(driver);
}

#[test]
fn no_completion_is_lost_when_kicks_and_calls_are_suppressed() {
    let server = Server::new();
    for event_idx in [F_EVENT_IDX, 0] {
        let features = !F_EVENT_IDX | event_idx;
        let mut driver = server.connect_with(Setup {
            features,
            ..Setup::default()
        });
        let (read, buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
        let mut random = Random::new(15);
        for _ in 0..300 {
            // A few at a time, published together, kicked only if the device wants it; every wait is for a call.
            let batch = 1 + random.below(12) as u16;
            let queue = driver.queue();
            let heads: Vec<u16> = (0..batch).map(|_| queue.chain(&buffers)).collect();
            queue.offer(&heads);
            queue.kick_if_asked(batch);
            for used in queue.wait_used_many(heads.len()) {
                assert_eq!(used.len, SECTOR as u32 + 1);
            }
        }
        assert_eq!(driver.memory.read(read.status, 1), [S_OK]);
        driver.still_serves();
    }
}

#[test]
fn no_kick_is_lost_when_the_device_is_about_to_sleep() {
    let server = Server::new();
    for event_idx in [F_EVENT_IDX, 0] {
        let features = !F_EVENT_IDX | event_idx;
        let mut driver = server.connect_with(Setup {
            features,
            ..Setup::default()
        });
        let (_, buffers) = driver.build(T_FLUSH, 0, Data::None);
        let (read, read_buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
        let mut random = Random::new(21);
        for round in 0..2000 {
            let head = driver
                .queue()
                .chain(if round % 8 == 0 { &buffers } else { &read_buffers });
            driver.run_head(head);
            // The next one comes after any time that it may take to fall asleep.
            for _ in 0..random.below(3000) {
                std::hint::spin_loop();
            }
        }
        assert_eq!(driver.memory.read(read.status, 1), [S_OK]);
        driver.still_serves();
    }
}

#[test]
fn device_does_not_call_before_the_used_event_is_reached() {
    let (server, mut driver) = start();
    assert_ne!(driver.features & F_EVENT_IDX, 0);
    let (_, buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
    let queue = driver.queue();
    let used = queue.used_index();
    queue.set_used_event(used.wrapping_add(7));
    for served in 1..=8 {
        let head = queue.chain(&buffers);
        queue.offer(&[head]);
        queue.kick();
        // Watched in the ring: while the event is not reached there is no call to wait for.
        assert_eq!(queue.watch_used().head, head);
        if served < 8 {
            assert!(!queue.take_call(), "called after {served}");
        } else {
            queue.wait_call();
        }
    }
    server.still_serves_both(driver);
}

#[test]
fn device_does_not_call_a_driver_that_wants_no_interrupt() {
    let server = Server::new();
    let mut driver = server.connect_with(Setup {
        features: !F_EVENT_IDX,
        ..Setup::default()
    });
    let (_, buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
    let queue = driver.queue();
    for no_interrupt in [true, false, true, false] {
        queue.set_no_interrupt(no_interrupt);
        let head = queue.chain(&buffers);
        queue.offer(&[head]);
        queue.kick();
        assert_eq!(queue.watch_used().head, head);
        if no_interrupt {
            // Time for a call that would be wrong.
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!queue.take_call(), "called");
        } else {
            queue.wait_call();
        }
    }
    driver.still_serves();
}

#[test]
fn more_than_the_device_has_buffers_for_waits_and_is_served() {
    let server = Server::new();
    let mut driver = server.connect_with(Setup {
        queue_size: 256,
        queues: 4,
        ..Setup::default()
    });
    let before = server.facts();
    // 4 queues of 85 requests of 256 KiB, all offered at once. They read what they all read: zeros, from one buffer.
    let len = 256 * 1024;
    let zeroes = vec![0; len];
    driver.write(0, &zeroes);
    let (_, buffers) = driver.build(T_IN, 0, Data::In(len));
    for queue in &mut driver.queues {
        let heads: Vec<u16> = (0..85).map(|_| queue.chain(&buffers)).collect();
        queue.offer(&heads);
        queue.kick();
    }
    for queue in &mut driver.queues {
        for used in queue.wait_used_many(85) {
            assert_eq!(used.len, len as u32 + 1);
        }
    }
    let after = server.facts();
    assert!(
        after.resident_kib < before.resident_kib + 16 * 1024,
        "grew from {before:?} to {after:?}"
    );
    server.still_serves_both(driver);
}

#[test]
fn one_request_larger_than_every_buffer_is_served() {
    one_large_request_is_served(&[]);
}

#[test]
fn one_large_request_is_served_with_the_smallest_pool_and_the_largest() {
    one_large_request_is_served(&["--pool-size", "1M"]);
    one_large_request_is_served(&["--pool-size", "64M"]);
}

fn one_large_request_is_served(args: &[&str]) {
    let server = Server::of(Volume::created(16 * MIB, 512), args);
    let mut driver = server.connect();
    let piece = pattern(16, MIB as usize);
    // The whole disk in one request, from and to one buffer.
    let (write, buffers) = driver.build(T_OUT, 0, Data::Out(&piece));
    let mut chain = vec![buffers[0]];
    chain.extend(std::iter::repeat_n(buffers[1], 16));
    chain.push(buffers[2]);
    let before = server.facts();
    assert_eq!(driver.run_chain(&chain).len, 1);
    assert_eq!(driver.memory.read(write.status, 1), [S_OK]);

    let (read, buffers) = driver.build(T_IN, 0, Data::In(MIB as usize));
    let mut chain = vec![buffers[0]];
    chain.extend(std::iter::repeat_n(buffers[1], 16));
    chain.push(buffers[2]);
    assert_eq!(driver.run_chain(&chain).len, 16 * MIB as u32 + 1);
    assert!(driver.memory.read(read.data, MIB as usize) == piece);
    let after = server.facts();
    assert!(
        after.resident_kib < before.resident_kib + 16 * 1024,
        "grew from {before:?} to {after:?}"
    );
    assert!(driver.read(2048 * 7, MIB as usize) == piece);
    server.still_serves_both(driver);
}

#[test]
fn random_requests_on_four_queues_agree_with_a_model() {
    let server = Server::new();
    let mut driver = server.connect_with(Setup {
        queues: 4,
        ..Setup::default()
    });
    let mut random = Random::new(17);
    // Each queue has a stripe of its own, so that what is in flight at a time never overlaps.
    let stripe = 256u64;
    let mut model = vec![0u8; 4 * 256 * SECTOR];
    let zeroes = vec![0; 256 * SECTOR];
    (0..4).for_each(|queue| driver.write(queue * stripe, &zeroes));
    for round in 0..150 {
        let mark = driver.memory.mark();
        let mut pending = HashMap::new();
        for queue in 0..4 {
            for part in 0..4 {
                let start = queue as u64 * stripe + part * 64 + random.below(32);
                let len = (1 + random.below(32)) as usize * SECTOR;
                let range = start as usize * SECTOR..start as usize * SECTOR + len;
                if random.below(2) == 0 {
                    model[range.clone()].copy_from_slice(&pattern(random.number(), len));
                    let write = driver.submit(queue, T_OUT, start, Data::Out(&model[range]));
                    pending.insert((queue, write.head), (write, None));
                } else {
                    let read = driver.submit(queue, T_IN, start, Data::In(len));
                    pending.insert((queue, read.head), (read, Some(range)));
                }
            }
        }
        for queue in 0..4 {
            for used in driver.queues[queue].wait_used_many(4) {
                let (request, range) = pending
                    .remove(&(queue, used.head))
                    .expect("a head that was offered");
                let done = driver.outcome(&request, used);
                assert_eq!(done.status, S_OK, "round {round}");
                if let Some(range) = range {
                    assert!(
                        done.data == model[range],
                        "round {round}: queue {queue} read something else"
                    );
                }
            }
        }
        driver.memory.free_to(mark);
    }
    for queue in 0..4 {
        let at = (queue * stripe) as usize * SECTOR;
        assert!(driver.read(queue * stripe, 256 * SECTOR) == model[at..at + 256 * SECTOR]);
    }
    server.still_serves_both(driver);
}
