//! What I/O stands on changes under it: rings stop and start, memory comes and goes, front-ends leave. Each such edge
//! first waits for what is in flight; after it nothing more is written, and nothing was lost.

use common::driver::{Data, Driver, F_EVENT_IDX, S_IOERR, S_OK, SECTOR, Setup, T_IN, T_OUT, header};
use common::frontend::{
    F_PROTOCOL_FEATURES, Frontend, RESET_DEVICE, SET_FEATURES, SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK,
};
use common::memory::{BUFFERS, BUFFERS_LEN, HOLE, Region, SEAM};
use common::pattern;
use common::queue::{Buf, Event, readable, writable};
use common::serve::Server;
use common::volume::MIB;
use std::time::{Duration, Instant};

const PIECE: usize = 64 * 1024;

/// Offers `count` reads of [`PIECE`] bytes each on the first queue, and kicks.
fn offer_reads(driver: &mut Driver, count: usize) -> Vec<common::driver::Pending> {
    let mut requests = Vec::new();
    let mut heads = Vec::new();
    for i in 0..count {
        let (request, buffers) = driver.build(T_IN, (i * PIECE / SECTOR) as u64, Data::In(PIECE));
        let head = driver.queue().chain(&buffers);
        heads.push(head);
        requests.push(common::driver::Pending { head, ..request });
    }
    driver.queue().offer(&heads);
    driver.queue().kick();
    requests
}

/// Gives the device every chance to do what it must not: other queues and other messages are served meanwhile.
fn let_it_work(driver: &mut Driver) {
    for _ in 0..20 {
        driver.frontend.features();
        if driver.queues.len() > 1 {
            driver.run_on(1, T_IN, 0, Data::In(SECTOR));
        }
    }
    std::thread::sleep(Duration::from_millis(20));
}

fn two_queues(server: &Server) -> Driver {
    server.connect_with(Setup {
        queues: 2,
        ..Setup::default()
    })
}

fn fill(driver: &mut Driver, len: usize) -> Vec<u8> {
    let bytes = pattern(1, len);
    for (i, piece) in bytes.chunks(MIB as usize).enumerate() {
        driver.write((i * 2048) as u64, piece);
    }
    bytes
}

// ---- stop and start

/// A server that was killed between the used ring and the call left a driver that waited for ever.
#[test]
fn a_ring_that_starts_calls_the_driver_once_for_what_an_earlier_server_may_owe() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    let_it_work(&mut driver);
    assert!(!driver.queue().take_call(), "nothing was ever asked of it");
    for _ in 0..2 {
        driver.write(0, &[1; SECTOR]);
        let base = driver.frontend.stop_vring(0);
        driver.queue().take_call(); // That of the write.
        driver.restart(0, base);
        driver.queue().wait_call();
        // More than one of the messages may have started the ring; a request shows that the last start is over.
        let_it_work(&mut driver);
        driver.read(0, SECTOR);
        let_it_work(&mut driver);
        driver.queue().take_call();
        let_it_work(&mut driver);
        assert!(!driver.queue().take_call(), "it calls without a reason");
    }
    server.still_serves_both(driver);
}

#[test]
fn get_vring_base_answers_after_all_that_was_taken_came_back() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    let bytes = fill(&mut driver, 40 * PIECE);
    let first = driver.queue().next_avail();
    let requests = offer_reads(&mut driver, 40);
    let base = driver.frontend.stop_vring(0);
    assert_eq!(driver.queue().used_index(), base, "taken, but not given back");
    let state = |driver: &Driver| {
        let data = requests
            .iter()
            .map(|request| driver.memory.read(request.data, PIECE))
            .collect::<Vec<_>>();
        (driver.queues[0].used_index(), data)
    };
    let stopped = state(&driver);
    driver.queue().kick();
    let_it_work(&mut driver);
    assert!(state(&driver) == stopped, "something happened after the stop");

    // Taken up where it was left, all of them come back, none twice.
    driver.restart(0, base);
    driver.queue().kick();
    driver.queue().wait_used_many(40);
    assert_eq!(driver.queue().used_index(), first.wrapping_add(40));
    for (i, request) in requests.iter().enumerate() {
        assert_eq!(driver.memory.read(request.status, 1), [S_OK]);
        assert!(driver.memory.read(request.data, PIECE) == bytes[i * PIECE..][..PIECE]);
    }
    server.still_serves_both(driver);
}

#[test]
fn ring_can_be_stopped_and_started_any_number_of_times() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    let before = server.facts();
    for _ in 0..100 {
        let requests = offer_reads(&mut driver, 4);
        let base = driver.frontend.stop_vring(0);
        driver.restart(0, base);
        driver.queue().kick();
        driver.queue().wait_used_many(requests.len());
        driver.memory.free_to(BUFFERS);
    }
    let after = server.facts();
    assert_eq!(
        (after.descriptors, after.threads),
        (before.descriptors, before.threads)
    );
    server.still_serves_both(driver);
}

#[test]
fn disabled_ring_does_nothing_and_forgets_nothing() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    fill(&mut driver, 40 * PIECE);
    let first = driver.queue().next_avail();
    offer_reads(&mut driver, 20);
    driver.frontend.enable(0, false);
    let (_, buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
    let queue = driver.queue();
    let disabled = queue.used_index();
    let head = queue.chain(&buffers);
    queue.offer(&[head]);
    queue.kick();
    let_it_work(&mut driver);
    assert_eq!(driver.queue().used_index(), disabled);
    // No kick after this: the one that came while it was disabled counts.
    driver.frontend.enable(0, true);
    driver.queue().wait_used_many(21);
    assert_eq!(driver.queue().used_index(), first.wrapping_add(21));
    server.still_serves_both(driver);
}

#[test]
fn kick_before_the_ring_is_enabled_is_not_lost() {
    let server = Server::new();
    for event_idx in [F_EVENT_IDX, 0] {
        let setup = Setup {
            features: !F_EVENT_IDX | event_idx,
            ..Setup::default()
        };
        let mut driver = Driver::unstarted(Frontend::connect(server.socket()), setup);
        let (_, buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
        let head = driver.queue().chain(&buffers);
        driver.queue().offer(&[head]);
        driver.frontend.start_vring(&driver.queues[0], &driver.memory, 0);
        driver.queue().kick();
        driver.frontend.features();
        assert_eq!(driver.queue().used_index(), 0, "served before it was enabled");
        driver.frontend.enable(0, true);
        assert_eq!(driver.queue().wait_used().len, SECTOR as u32 + 1);
        driver.still_serves();
    }
}

#[test]
fn kick_before_the_device_has_the_descriptor_is_not_lost() {
    let server = Server::new();
    let mut driver = Driver::unstarted(Frontend::connect(server.socket()), Setup::default());
    let (_, buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
    let head = driver.queue().chain(&buffers);
    driver.queue().offer(&[head]);
    driver.queue().kick();
    // Enabled first, started later: the order is the front-end's to choose.
    driver.frontend.enable(0, true);
    driver.frontend.start_vring(&driver.queues[0], &driver.memory, 0);
    assert_eq!(driver.queue().wait_used().len, SECTOR as u32 + 1);
    server.still_serves_both(driver);
}

#[test]
fn rings_work_without_protocol_features() {
    let server = Server::new();
    let setup = Setup {
        features: !F_PROTOCOL_FEATURES,
        ..Setup::default()
    };
    let mut driver = server.connect_with(setup);
    assert_eq!(driver.features & F_PROTOCOL_FEATURES, 0);
    driver.still_serves();
    let base = driver.frontend.stop_vring(0);
    assert_eq!(base, driver.queue().next_avail());
    driver
        .frontend
        .start_vring(&driver.queues[0], &driver.memory, base);
    server.still_serves_both(driver);
}

#[test]
fn ring_without_a_call_descriptor_is_served() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    driver.frontend.set_vring_fd(SET_VRING_CALL, 0, None);
    let (_, buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
    for _ in 0..10 {
        let head = driver.queue().chain(&buffers);
        driver.queue().offer(&[head]);
        driver.queue().kick();
        assert_eq!(driver.queue().watch_used().head, head);
    }
    assert!(!driver.queue().take_call());
    driver
        .frontend
        .set_vring_fd(SET_VRING_CALL, 0, Some(&driver.queues[0].call));
    server.still_serves_both(driver);
}

#[test]
fn ring_without_a_kick_descriptor_does_no_harm() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    driver.frontend.set_vring_fd(SET_VRING_KICK, 0, None);
    driver.frontend.set_vring_fd(SET_VRING_ERR, 0, None);
    driver.run_on(1, T_IN, 0, Data::In(SECTOR));
    let base = driver.frontend.stop_vring(0);
    driver.restart(0, base);
    server.still_serves_both(driver);
}

#[test]
fn call_descriptor_may_be_changed_while_requests_are_in_flight() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    for _ in 0..20 {
        driver.memory.free_to(BUFFERS);
        let requests = offer_reads(&mut driver, 16);
        driver.queues[0].call = Event::new();
        driver
            .frontend
            .set_vring_fd(SET_VRING_CALL, 0, Some(&driver.queues[0].call));
        // What came back before the change was announced by the old descriptor: look first, then wait.
        driver.queue().call.signal();
        driver.queue().wait_used_many(requests.len());
    }
    server.still_serves_both(driver);
}

#[test]
fn reset_device_stops_all_rings_and_they_can_be_set_up_again() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    offer_reads(&mut driver, 40);
    driver.frontend.tell(RESET_DEVICE, &[], &[]);
    let stopped = driver.queue().used_index();
    driver.queue().kick();
    for _ in 0..20 {
        driver.frontend.features();
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.queue().used_index(), stopped);

    driver.memory.free_to(BUFFERS);
    driver
        .frontend
        .tell(SET_FEATURES, &driver.features.to_ne_bytes(), &[]);
    for index in 0..2 {
        driver.queues[index as usize] = common::queue::Queue::new(&driver.memory, index, 128, true);
        driver.restart(index as usize, 0);
    }
    server.still_serves_both(driver);
}

// ---- memory

/// A read whose header and status are in memory that stays, and whose data is at `data`.
fn read_to(driver: &Driver, place: u64, data: u64) -> [Buf; 3] {
    driver.memory.place(place, 17);
    driver.memory.write(place, &header(T_IN, 0));
    [
        readable(place, 16),
        writable(data, PIECE),
        writable(place + 16, 1),
    ]
}

#[test]
fn set_mem_table_waits_for_what_writes_to_the_old_memory() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    let bytes = fill(&mut driver, PIECE);
    let count = 40;
    let heads: Vec<u16> = (0..count)
        .map(|i| {
            let buffers = read_to(&driver, SEAM + 4096 + i * 1024, BUFFERS + i * PIECE as u64);
            driver.queue().chain(&buffers)
        })
        .collect();
    driver.queue().offer(&heads);
    driver.queue().kick();

    // The region with the data is replaced by another at the same address.
    let mut regions = driver.memory.regions();
    let old = regions.pop().unwrap();
    let new = Region::create(BUFFERS, BUFFERS_LEN);
    regions.push(new.clone());
    driver.frontend.set_regions(&regions);
    let left = old.bytes();
    driver.queue().wait_used_many(heads.len());
    assert!(
        old.bytes() == left,
        "the old memory was written to after it was replaced"
    );
    let replaced = new.bytes();
    for i in 0..count as usize {
        let range = i * PIECE..(i + 1) * PIECE;
        assert!(
            left[range.clone()] == bytes || replaced[range] == bytes,
            "request {i} is in neither memory"
        );
    }
    driver.frontend.set_memory(&driver.memory);
    server.still_serves_both(driver);
}

#[test]
fn memory_can_be_plugged_and_unplugged_under_load() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    let bytes = fill(&mut driver, PIECE);
    let before = server.facts();
    for round in 0..10 {
        let requests = offer_reads(&mut driver, 16);
        let region = Region::create(HOLE, MIB);
        driver.frontend.add_region(&region);
        driver.queue().wait_used_many(requests.len());
        driver.memory.free_to(BUFFERS);

        let chain = read_to(&driver, SEAM + 4096, HOLE + 4096);
        assert_eq!(driver.run_chain(&chain).len, PIECE as u32 + 1);
        assert!(region.bytes()[4096..][..PIECE] == bytes, "round {round}");

        let requests = offer_reads(&mut driver, 16);
        driver.frontend.remove_region(&region);
        driver.queue().wait_used_many(requests.len());
        driver.memory.free_to(BUFFERS);
        let chain = read_to(&driver, SEAM + 4096, HOLE + 4096);
        assert_eq!(
            driver.run_chain(&chain).len,
            0,
            "round {round}: it is still there"
        );
        assert_eq!(driver.memory.read(SEAM + 4096 + 16, 1), [S_IOERR]);
    }
    let after = server.facts();
    assert_eq!(
        (after.descriptors, after.guest_mappings),
        (before.descriptors, before.guest_mappings)
    );
    server.still_serves_both(driver);
}

#[test]
fn a_buffer_may_straddle_dozens_of_regions_that_were_plugged_one_by_one() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    let bytes = fill(&mut driver, PIECE);
    let regions: Vec<Region> = (0..200).map(|i| Region::create(HOLE + i * 4096, 4096)).collect();
    for region in &regions {
        driver.frontend.add_region(region);
    }
    // Into the middle of one region, over the 15 after it, to the middle of the 17th.
    let chain = read_to(&driver, SEAM + 4096, HOLE + 100 * 4096 + 2048);
    assert_eq!(driver.run_chain(&chain).len, PIECE as u32 + 1);
    let whole: Vec<u8> = regions.iter().flat_map(Region::bytes).collect();
    assert!(whole[100 * 4096 + 2048..][..PIECE] == bytes);
    assert!(whole[..100 * 4096 + 2048].iter().all(|&byte| byte == 0));
    assert!(whole[100 * 4096 + 2048 + PIECE..].iter().all(|&byte| byte == 0));
    for region in &regions {
        driver.frontend.remove_region(region);
    }
    server.still_serves_both(driver);
    server.wait_idle();
}

#[test]
fn region_that_is_removed_is_written_to_no_more() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    fill(&mut driver, PIECE);
    let region = Region::create(HOLE, 40 * PIECE as u64);
    driver.frontend.add_region(&region);
    let heads: Vec<u16> = (0..40)
        .map(|i| {
            let buffers = read_to(&driver, SEAM + 4096 + i * 1024, HOLE + i * PIECE as u64);
            driver.queue().chain(&buffers)
        })
        .collect();
    driver.queue().offer(&heads);
    driver.queue().kick();
    driver.frontend.remove_region(&region);
    let left = region.bytes();
    driver.queue().wait_used_many(heads.len());
    assert!(region.bytes() == left);
    server.still_serves_both(driver);
}

// ---- front-ends leave

#[test]
fn front_end_that_leaves_with_requests_in_flight_leaves_nothing_behind() {
    let server = Server::new();
    for _ in 0..20 {
        let mut driver = two_queues(&server);
        offer_reads(&mut driver, 40);
        let regions = driver.memory.regions();
        drop(driver);
        // Once the memory is no longer mapped, nothing can write to it.
        server.wait_idle();
        drop(regions);
    }
    server.still_serves();
    server.wait_idle();
}

#[test]
fn writes_in_flight_at_a_disconnect_are_whole_or_not_done() {
    let server = Server::new();
    let (old, new) = (pattern(2, PIECE), pattern(3, PIECE));
    for _ in 0..5 {
        let mut driver = server.connect();
        for i in 0..32 {
            driver.write(i * (PIECE / SECTOR) as u64, &old);
        }
        let mut heads = Vec::new();
        for i in 0..32 {
            let (_, buffers) = driver.build(T_OUT, i * (PIECE / SECTOR) as u64, Data::Out(&new));
            heads.push(driver.queue().chain(&buffers));
        }
        driver.queue().offer(&heads);
        driver.queue().kick();
        drop(driver);
        let mut driver = server.connect();
        for i in 0..32 {
            for (at, sector) in driver
                .read(i * (PIECE / SECTOR) as u64, PIECE)
                .chunks(SECTOR)
                .enumerate()
            {
                let range = at * SECTOR..(at + 1) * SECTOR;
                assert!(
                    sector == &old[range.clone()] || sector == &new[range],
                    "write {i}: sector {at} is torn"
                );
            }
        }
    }
}

// ---- the end

#[test]
fn sigterm_ends_it_with_everything_answered_or_untouched() {
    let server = Server::new();
    let mut driver = two_queues(&server);
    let bytes = fill(&mut driver, 40 * PIECE);
    let first = driver.queue().used_index();
    let requests = offer_reads(&mut driver, 40);
    let start = Instant::now();
    let ended = server.terminate();
    assert!(ended.status.success(), "{ended:?}");
    assert!(start.elapsed() < Duration::from_secs(10));
    let answered = driver.queue().used_index().wrapping_sub(first) as usize;
    let mut came_back = vec![false; 40];
    for _ in 0..answered {
        let used = driver.queue().poll_used().unwrap();
        assert_eq!(used.len, PIECE as u32 + 1);
        let i = requests
            .iter()
            .position(|request| request.head == used.head)
            .unwrap();
        assert!(!came_back[i], "request {i} came back twice");
        came_back[i] = true;
        assert_eq!(driver.memory.read(requests[i].status, 1), [S_OK]);
        assert!(driver.memory.read(requests[i].data, PIECE) == bytes[i * PIECE..][..PIECE]);
    }
    for (request, _) in requests
        .iter()
        .zip(&came_back)
        .filter(|(_, came_back)| !**came_back)
    {
        assert_eq!(driver.memory.read(request.data, PIECE), Driver::untouched(PIECE));
        assert_eq!(driver.memory.read(request.status, 1), Driver::untouched(1));
    }
    driver.frontend.wait_closed();
}

#[test]
fn sigterm_ends_it_whatever_a_front_end_is_at() {
    type Stage = fn(&Server) -> Option<Driver>;
    let stages: [(&str, Stage); 4] = [
        ("no front-end", |_| None),
        ("one that is idle", |server| Some(server.connect())),
        ("one in the handshake", |server| {
            Some(Driver::unstarted(
                Frontend::connect(server.socket()),
                Setup::default(),
            ))
        }),
        ("one in the middle of a message", |server| {
            let driver = server.connect();
            driver.frontend.send_bytes(&[1, 0, 0, 0, 1, 0], &[]);
            Some(driver)
        }),
    ];
    for (name, stage) in stages {
        let server = Server::new();
        let socket = server.socket().to_owned();
        let driver = stage(&server);
        let ended = server.terminate();
        assert!(ended.status.success(), "{name}: {ended:?}");
        assert!(!socket.exists(), "{name}: the socket is left behind");
        drop(driver);
    }
}

#[test]
fn what_was_flushed_is_there_after_a_kill() {
    let volume = common::volume::Volume::new();
    let server = Server::with(&volume, &[]);
    let mut driver = server.connect();
    let bytes = pattern(4, MIB as usize);
    driver.write(100, &bytes);
    driver.flush();
    server.process.signal(rustix::process::Signal::KILL);
    drop(server);
    let server = Server::with(&volume, &[]);
    assert!(server.connect().read(100, bytes.len()) == bytes);
    server.stop();
}
