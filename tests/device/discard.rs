//! Discard, write zeroes, flush and the write cache (virtio 1.2 §5.2.6), by a driver over a real socket.

use common::driver::{
    Data, Done, Driver, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_RO, F_WRITE_ZEROES, S_IOERR, S_OK, S_UNSUPP,
    SECTOR, Setup, T_DISCARD, T_FLUSH, T_IN, T_WRITE_ZEROES, range_bytes,
};
use common::pattern;
use common::queue::{readable, writable};
use common::serve::Server;
use common::storage::LoopDevice;
use common::volume::{MIB, Volume};
use rustix::fs::SeekFrom;

const UNMAP: u32 = 1;

fn config_u32(driver: &Driver, offset: u32) -> u32 {
    u32::from_le_bytes(driver.frontend.config(offset, 4).unwrap().try_into().unwrap())
}

fn failed(status: u8) -> Done {
    Done {
        status,
        used_len: 1,
        data: vec![],
    }
}

// ---- write zeroes

#[test]
fn write_zeroes_reads_back_zeros_and_leaves_the_neighbours() {
    for (sector_size, unit) in [(512, 1), (4096, 8)] {
        let server = Server::of(Volume::created(64 * MIB, sector_size), &[]);
        let mut driver = server.connect();
        assert_ne!(driver.features & F_WRITE_ZEROES, 0);
        let bytes = pattern(1, 512 * SECTOR);
        for flags in [0, UNMAP] {
            for (first, count) in [(0, 1), (1, 1), (3, 7), (8, 8), (5, 50)] {
                let (sector, sectors) = (first * unit, count * unit);
                driver.write(0, &bytes);
                let done = driver.run_ranges(T_WRITE_ZEROES, &[(sector, sectors as u32, flags)]);
                assert_eq!(done, failed(S_OK));
                let mut expected = bytes.clone();
                expected[sector as usize * SECTOR..][..sectors as usize * SECTOR].fill(0);
                assert!(
                    driver.read(0, bytes.len()) == expected,
                    "{sectors} at {sector}, flags {flags}"
                );
            }
        }
        server.still_serves_both(driver);
    }
}

#[test]
fn write_zeroes_takes_as_many_segments_as_it_says() {
    let server = Server::new();
    let mut driver = server.connect();
    let segments = config_u32(&driver, 52);
    assert!(segments > 0);
    let bytes = pattern(2, 1024 * SECTOR);
    driver.write(0, &bytes);
    let ranges: Vec<_> = (0..segments).map(|i| (u64::from(i) * 4, 2, 0)).collect();
    assert_eq!(driver.run_ranges(T_WRITE_ZEROES, &ranges), failed(S_OK));
    let mut expected = bytes.clone();
    for range in &ranges {
        expected[range.0 as usize * SECTOR..][..2 * SECTOR].fill(0);
    }
    assert!(driver.read(0, bytes.len()) == expected);

    // One more is refused, whole.
    driver.write(0, &bytes);
    let ranges: Vec<_> = (0..=segments).map(|i| (u64::from(i) * 4, 2, 0)).collect();
    assert_eq!(driver.run_ranges(T_WRITE_ZEROES, &ranges), failed(S_IOERR));
    assert!(driver.read(0, bytes.len()) == bytes);
    server.still_serves_both(driver);
}

#[test]
fn write_zeroes_of_the_whole_disk_needs_no_more_memory_than_any_other() {
    let server = Server::new();
    let mut driver = server.connect();
    let capacity = driver.capacity();
    let most = config_u32(&driver, 48);
    assert!(most >= 8, "max_write_zeroes_sectors is {most}");
    let before = server.facts();
    let ranges: Vec<(u64, u32, u32)> = (0..capacity)
        .step_by(most as usize)
        .map(|sector| (sector, (capacity - sector).min(u64::from(most)) as u32, UNMAP))
        .collect();
    for chunk in ranges.chunks(config_u32(&driver, 52) as usize) {
        assert_eq!(driver.run_ranges(T_WRITE_ZEROES, chunk), failed(S_OK));
    }
    let after = server.facts();
    assert!(
        after.resident_kib < before.resident_kib + 32 * 1024,
        "grew from {before:?} to {after:?}"
    );
    for sector in (0..capacity).step_by(8192) {
        assert!(
            driver.read(sector, 8192 * SECTOR).iter().all(|&byte| byte == 0),
            "at {sector}"
        );
    }
    // On storage these are encrypted zeros, not a hole and not zeros.
    let payload = server.volume().payload_offset();
    for sector in [0, capacity / 2, capacity - 1] {
        assert_ne!(
            server.volume().stored(payload + sector * 512, SECTOR),
            [0; SECTOR]
        );
    }
    server.still_serves_both(driver);
}

#[test]
fn ranges_that_are_wrong_are_refused_and_change_nothing() {
    let server = Server::of(Volume::new(), &["--discard"]);
    let mut driver = server.connect();
    let capacity = driver.capacity();
    let (first, last) = (pattern(3, 64 * SECTOR), pattern(4, 64 * SECTOR));
    driver.write(0, &first);
    driver.write(capacity - 64, &last);
    for kind in [T_WRITE_ZEROES, T_DISCARD] {
        let beyond: [&[(u64, u32, u32)]; 8] = [
            &[(capacity, 1, 0)],
            &[(capacity - 1, 2, 0)],
            &[(capacity - 8, u32::MAX, 0)],
            &[(u64::MAX, 1, 0)],
            &[(u64::MAX - 6, 8, 0)],
            &[(1 << 55, 8, 0)],
            &[(0, u32::MAX, 0)],
            // The first would do; nothing of it is done.
            &[(0, 8, 0), (capacity, 8, 0)],
        ];
        for ranges in beyond {
            assert_eq!(
                driver.run_ranges(kind, ranges),
                failed(S_IOERR),
                "type {kind}: {ranges:?}"
            );
        }
        for flags in [2, 3, 1 << 31, u32::MAX] {
            let done = driver.run_ranges(kind, &[(0, 8, flags)]);
            assert_eq!(done, failed(S_UNSUPP), "type {kind}, flags {flags:#x}");
        }
        for len in [0, 1, 15, 17, 31, 512] {
            let mut segments = range_bytes(&[(0, 8, 0); 32]);
            segments.truncate(len);
            let done = driver.run(kind, 0, Data::Out(&segments));
            assert_eq!(done, failed(S_IOERR), "type {kind} with {len} bytes of segments");
        }
    }
    // Unmap is a flag of write zeroes alone.
    assert_eq!(driver.run_ranges(T_DISCARD, &[(0, 8, UNMAP)]), failed(S_UNSUPP));
    assert!(driver.read(0, first.len()) == first);
    assert!(driver.read(capacity - 64, last.len()) == last);
    server.still_serves_both(driver);
}

#[test]
fn ranges_may_be_split_over_descriptors() {
    let server = Server::new();
    let mut driver = server.connect();
    driver.write(0, &pattern(5, 64 * SECTOR));
    let (request, buffers) = driver.build(
        T_WRITE_ZEROES,
        0,
        Data::Out(&range_bytes(&[(8, 8, 0), (24, 8, 0)])),
    );
    let mut chain = vec![buffers[0]];
    chain.extend((0..32).map(|i| readable(buffers[1].addr + i, 1)));
    chain.push(writable(request.status, 1));
    assert_eq!(driver.run_chain(&chain).len, 1);
    assert_eq!(driver.memory.read(request.status, 1), [S_OK]);
    assert_eq!(driver.read(8, 4096), [0; 4096]);
    assert_eq!(driver.read(24, 4096), [0; 4096]);
    server.still_serves_both(driver);
}

// ---- discard

#[test]
fn discard_is_not_offered_unless_asked_for() {
    let server = Server::new();
    let mut driver = server.connect();
    assert_eq!(driver.frontend.features() & F_DISCARD, 0);
    let bytes = pattern(6, 4096);
    driver.write(0, &bytes);
    assert_eq!(driver.run_ranges(T_DISCARD, &[(0, 8, 0)]), failed(S_UNSUPP));
    assert!(driver.read(0, 4096) == bytes);
    server.still_serves_both(driver);
}

#[test]
fn discard_gives_storage_back_and_leaves_the_neighbours() {
    let server = Server::of(Volume::new(), &["--discard"]);
    let mut driver = server.connect();
    assert_ne!(driver.features & F_DISCARD, 0);
    for (name, offset) in [("sectors", 36), ("segments", 40), ("alignment", 44)] {
        assert_ne!(config_u32(&driver, offset), 0, "limit on discard {name}");
    }
    let bytes = pattern(7, 8 * MIB as usize);
    driver.write(0, &bytes);
    driver.flush();
    // The first hole of the file at or after a sector, in sectors of the disk.
    let (file, payload) = (server.volume().file(), server.volume().payload_offset());
    let hole_from = |sector: u64| {
        let at = rustix::fs::seek(&file, SeekFrom::Hole(payload + sector * 512)).unwrap();
        (at - payload) / 512
    };
    assert_eq!(
        hole_from(0),
        16_384,
        "nothing is a hole yet but what was never written"
    );
    let ranges = [(2048, 4096, 0), (8192, 2048, 0)];
    assert_eq!(driver.run_ranges(T_DISCARD, &ranges), failed(S_OK));
    driver.flush();
    for (sector, sectors, _) in ranges {
        assert_eq!(hole_from(sector), sector);
        let data = rustix::fs::seek(&file, SeekFrom::Data(payload + sector * 512)).unwrap();
        assert_eq!((data - payload) / 512, sector + u64::from(sectors));
    }
    let expect = |driver: &mut Driver, sector: u64, sectors: usize| {
        let at = sector as usize * SECTOR;
        assert!(
            driver.read(sector, sectors * SECTOR) == bytes[at..at + sectors * SECTOR],
            "at {sector}"
        );
    };
    expect(&mut driver, 0, 2048);
    expect(&mut driver, 6144, 2048);
    expect(&mut driver, 10_240, 2048);

    // Ranges that are no whole blocks of the file system: the neighbours in the block stay.
    assert_eq!(
        driver.run_ranges(T_DISCARD, &[(11_001, 30, 0), (12_000, 1, 0)]),
        failed(S_OK)
    );
    expect(&mut driver, 10_240, 11_001 - 10_240);
    expect(&mut driver, 11_031, 12_000 - 11_031);
    expect(&mut driver, 12_001, 100);

    // What was discarded can be written, and zeroed.
    driver.write(2048, &bytes[..4096]);
    assert!(driver.read(2048, 4096) == bytes[..4096]);
    assert_eq!(
        driver.run_ranges(T_WRITE_ZEROES, &[(2048, 4096, UNMAP)]),
        failed(S_OK)
    );
    assert!(driver.read(2048, 4096 * SECTOR).iter().all(|&byte| byte == 0));
    server.still_serves_both(driver);
}

// ---- flush and the write cache

#[test]
fn flush_works_on_every_disk() {
    let volume = Volume::new();
    for args in [&[][..], &["--read-only"]] {
        let server = Server::with(&volume, args);
        let mut driver = server.connect();
        assert_ne!(driver.features & F_FLUSH, 0);
        assert_eq!(driver.features & F_RO != 0, !args.is_empty());
        driver.flush();
        // The sector means nothing here; older drivers leave one in.
        assert_eq!(driver.run(T_FLUSH, u64::MAX, Data::None), failed(S_OK));
        assert_eq!(driver.run(T_IN, 0, Data::In(SECTOR)).status, S_OK);
    }
}

/// A guest that had switched its cache off sent no flushes any more, and after a restart of the server its writes were not
/// durable either: the choice was in the process's memory. A driver that cannot flush, or that may have chosen so once,
/// has each write on stable storage before it is answered, in every process.
#[test]
fn writes_of_a_driver_that_may_not_flush_are_durable_also_after_a_restart() {
    let mut volume = Volume::new();
    let Some(device) = LoopDevice::over(&volume.path, 512) else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    volume.path = device.path().to_owned();
    let flushes_of = |driver: &mut Driver, run: &dyn Fn(&mut Driver)| {
        let before = device.flushes();
        run(driver);
        device.flushes() - before
    };
    let bytes = pattern(8, 4096);
    let write = |driver: &mut Driver| driver.write(0, &bytes);
    let zero =
        |driver: &mut Driver| assert_eq!(driver.run_ranges(T_WRITE_ZEROES, &[(64, 8, 0)]).status, S_OK);
    let flush = |driver: &mut Driver| driver.flush();
    // What they may have and what they keep from before.
    let (all, cannot_flush) = (!F_CONFIG_WCE, !(F_FLUSH | F_CONFIG_WCE));
    for _ in 0..2 {
        let server = Server::with(&volume, &[]);
        for (features, kept, through) in [
            (all, 0, false),
            (all, F_CONFIG_WCE, true),
            (cannot_flush, 0, true),
            (all, 0, false),
        ] {
            let mut driver = server.connect_with(Setup {
                features,
                kept,
                ..Setup::default()
            });
            let kind = format!("features {:#x}", driver.features);
            assert_eq!(
                flushes_of(&mut driver, &write) > 0,
                through,
                "a write with {kind}"
            );
            assert_eq!(
                flushes_of(&mut driver, &zero) > 0,
                through,
                "write zeroes with {kind}"
            );
            assert!(flushes_of(&mut driver, &flush) > 0, "a flush with {kind}");
            driver.still_serves();
            drop(driver);
            server.wait_idle();
        }
        // What was written back to a cache before it came, a driver that cannot flush finds on stable storage.
        let mut driver = server.connect();
        driver.write(0, &bytes);
        let before = device.flushes();
        drop(driver);
        let driver = server.connect_with(Setup {
            kept: F_CONFIG_WCE,
            ..Setup::default()
        });
        assert!(device.flushes() > before);
        drop(driver);
        server.stop();
    }
}
