//! A hostile front-end: messages that are malformed, out of order, out of range, or carry the wrong descriptors.
//!
//! The server may refuse a message or hang up. It must neither die nor hang, must leave nothing behind, and must
//! serve the next front-end.

use common::driver::{Data, Driver, S_OK, SECTOR, Setup, T_IN, T_OUT};
use common::frontend::*;
use common::memory::{HOLE, Memory, Region};
use common::pattern;
use common::queue::Queue;
use common::serve::Server;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How far a session has come when the nonsense arrives.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Connected,
    Negotiated,
    MemoryGiven,
    Running,
}

const STAGES: [Stage; 4] = [
    Stage::Connected,
    Stage::Negotiated,
    Stage::MemoryGiven,
    Stage::Running,
];

/// A session at a stage. The driver is there when it got as far as to have memory.
fn session(socket: &Path, stage: Stage) -> (Option<Frontend>, Option<Driver>) {
    match stage {
        Stage::Connected => (Some(Frontend::connect(socket)), None),
        Stage::Negotiated => {
            let mut frontend = Frontend::connect(socket);
            frontend.negotiate(!0, !0);
            (Some(frontend), None)
        }
        Stage::MemoryGiven => (
            None,
            Some(Driver::unstarted(Frontend::connect(socket), Setup::default())),
        ),
        Stage::Running => (None, Some(Driver::connect(socket))),
    }
}

/// Sends each message at each stage, on a connection of its own, and looks after the server each time.
fn all_survived(messages: &[(&str, Vec<u8>, Vec<OwnedFd>)]) {
    let server = Server::new();
    for stage in STAGES {
        for (name, bytes, fds) in messages {
            let (frontend, driver) = session(server.socket(), stage);
            let frontend = frontend
                .as_ref()
                .or(driver.as_ref().map(|driver| &driver.frontend))
                .unwrap();
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
            frontend.send_bytes(bytes, &fds);
            // The end of the stream, so that one who waits for the rest of a message learns that there is none.
            frontend.shut_down();
            frontend.wait_closed();
            let name = format!("{name}, {stage:?}");
            assert_serves(&server, &name);
        }
    }
    server.wait_idle();
    server.stop();
}

fn assert_serves(server: &Server, after: &str) {
    let mut driver = server.connect();
    let read = driver.run(T_IN, 0, Data::In(SECTOR));
    assert_eq!(read.status, S_OK, "after {after}");
}

fn raw(name: &'static str, bytes: Vec<u8>) -> (&'static str, Vec<u8>, Vec<OwnedFd>) {
    (name, bytes, vec![])
}

fn asking(request: u32, payload: &[u8]) -> Vec<u8> {
    message(request, VERSION | NEED_REPLY, payload)
}

fn header_only(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

fn some_file() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("sealblk-test-guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

// ---- bytes

#[test]
fn garbage_ends_the_session_and_nothing_else() {
    all_survived(&[
        raw("one byte", vec![7]),
        raw("half a header", vec![1, 0, 0, 0, 1, 0]),
        raw("zeros", vec![0; 4096]),
        raw("ones", vec![0xff; 4096]),
        raw("noise", pattern(1, 8192)),
        raw("text", b"GET / HTTP/1.1\r\nHost: sealblk\r\n\r\n".to_vec()),
    ]);
}

#[test]
fn headers_that_lie_end_the_session_and_nothing_else() {
    let features = [0; 8];
    all_survived(&[
        raw("no version", message(GET_FEATURES, 0, &[])),
        raw("version 2", message(GET_FEATURES, 2, &[])),
        raw(
            "reserved flags",
            message(GET_FEATURES, VERSION | 0xffff_fff0, &[]),
        ),
        raw(
            "a reply that nobody asked for",
            message(GET_FEATURES, VERSION | REPLY, &features),
        ),
        raw("a size beyond the payload", header_only(SET_FEATURES, VERSION, 8)),
        raw("a size of 4 GiB", header_only(SET_FEATURES, VERSION, u32::MAX)),
        raw("a size of 2 GiB", header_only(GET_CONFIG, VERSION, 1 << 31)),
        raw(
            "a size over the limit",
            message(SET_MEM_TABLE, VERSION, &[0; 8192]),
        ),
        raw("a payload where none belongs", asking(GET_FEATURES, &[1; 64])),
        raw("no payload where one belongs", asking(SET_FEATURES, &[])),
        raw("a short payload", asking(SET_VRING_NUM, &[0; 4])),
        raw("a long payload", asking(SET_VRING_NUM, &[0; 64])),
        raw("a short memory table", asking(SET_MEM_TABLE, &[0; 4])),
        raw("a short vring address", asking(SET_VRING_ADDR, &[0; 39])),
    ]);
}

#[test]
fn unknown_requests_end_the_session_and_nothing_else() {
    let messages: Vec<_> = [0, 33, 41, 42, 43, 44, 45, 100, 0x7fff_ffff, u32::MAX]
        .into_iter()
        .map(|request| raw("unknown request", asking(request, &[])))
        .collect();
    all_survived(&messages);
}

#[test]
fn requests_that_were_not_offered_end_the_session_and_nothing_else() {
    let inflight = [0; 24];
    all_survived(&[
        raw("inflight", asking(GET_INFLIGHT_FD, &inflight)),
        (
            "inflight with a descriptor",
            asking(SET_INFLIGHT_FD, &inflight),
            vec![memfd(4096)],
        ),
        raw("RARP", asking(19, &[0; 8])),
        raw("MTU", asking(20, &[0; 8])),
        raw("IOTLB", asking(22, &[0; 40])),
        raw("vring endianness", asking(23, &[0; 8])),
        raw("crypto session", asking(26, &[0; 64])),
        raw("postcopy", asking(28, &[])),
        raw("postcopy listen", asking(29, &[])),
        raw("GPU socket", asking(33, &[])),
        raw("status", asking(SET_STATUS, &[0; 8])),
        raw("get status", asking(GET_STATUS, &[])),
    ]);
}

#[test]
fn every_request_with_every_small_size_is_survived() {
    let server = Server::new();
    for request in 0..=44 {
        for size in [0, 1, 8, 12, 40] {
            let frontend = Frontend::connect(server.socket());
            // Ends the session after one, or after both.
            let _ = frontend.try_send_bytes(&asking(request, &vec![0; size]), &[]);
            let _ = frontend.try_send_bytes(&asking(request, &vec![0xff; size]), &[]);
            frontend.shut_down();
            frontend.wait_closed();
        }
    }
    server.still_serves();
    server.stop();
}

#[test]
fn every_bit_of_a_whole_handshake_may_be_wrong() {
    // A handshake is recorded, then sent with single bits flipped.
    let server = Server::new();
    let memory = Memory::new();
    let queue = Queue::new(&memory, 0, 128, true);
    let region = memory.regions().remove(0);
    let features = F_PROTOCOL_FEATURES | 1 << 32;
    let handshake = [
        message(SET_OWNER, VERSION, &[]),
        message(SET_FEATURES, VERSION, &features.to_ne_bytes()),
        message(SET_PROTOCOL_FEATURES, VERSION, &PROTOCOL_MQ.to_ne_bytes()),
        message(SET_MEM_TABLE, VERSION, &mem_table(std::slice::from_ref(&region))),
        message(SET_VRING_NUM, VERSION, &vring_state(0, 128)),
        message(SET_VRING_BASE, VERSION, &vring_state(0, 0)),
        message(SET_VRING_ADDR, VERSION, &vring_addr(&queue, &memory)),
        message(SET_VRING_KICK, VERSION, &0u64.to_ne_bytes()),
        message(SET_VRING_ENABLE, VERSION, &vring_state(0, 1)),
    ];
    let mut random = common::Random::new(2);
    for _ in 0..400 {
        let frontend = Frontend::connect(server.socket());
        let wrong = random.below(handshake.len() as u64) as usize;
        for (i, good) in handshake.iter().enumerate() {
            let mut bytes = good.clone();
            if i == wrong {
                let bit = random.below(8 * bytes.len() as u64) as usize;
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            let fds: Vec<BorrowedFd<'_>> = match i {
                3 => vec![region.file.as_fd()],
                7 => vec![queue.kick.as_fd()],
                _ => vec![],
            };
            if frontend.try_send_bytes(&bytes, &fds).is_err() {
                break;
            }
        }
        queue.kick();
        frontend.shut_down();
        frontend.wait_closed();
    }
    server.still_serves();
    server.stop();
}

// ---- descriptors

#[test]
fn descriptors_that_are_missing_or_too_many_end_the_session_and_nothing_else() {
    let fds = |count: usize| (0..count).map(|_| memfd(4096)).collect::<Vec<_>>();
    let region = Region::create(0, 4096);
    let table = mem_table(&[
        region.clone(),
        Region {
            guest: HOLE,
            ..region.clone()
        },
    ]);
    all_survived(&[
        (
            "a descriptor where none belongs",
            asking(GET_FEATURES, &[]),
            fds(1),
        ),
        ("many where none belongs", asking(SET_FEATURES, &[0; 8]), fds(30)),
        (
            "a region without a descriptor",
            asking(SET_MEM_TABLE, &table),
            fds(0),
        ),
        (
            "two regions and one descriptor",
            asking(SET_MEM_TABLE, &table),
            fds(1),
        ),
        (
            "two regions and three descriptors",
            asking(SET_MEM_TABLE, &table),
            fds(3),
        ),
        (
            "an added region without a descriptor",
            asking(ADD_MEM_REG, &single_region(&region)),
            fds(0),
        ),
        (
            "an added region with two",
            asking(ADD_MEM_REG, &single_region(&region)),
            fds(2),
        ),
        (
            "a kick without a descriptor",
            asking(SET_VRING_KICK, &0u64.to_ne_bytes()),
            fds(0),
        ),
        (
            "a call without a descriptor",
            asking(SET_VRING_CALL, &0u64.to_ne_bytes()),
            fds(0),
        ),
        (
            "a kick that denies its descriptor",
            asking(SET_VRING_KICK, &NOFD.to_ne_bytes()),
            fds(1),
        ),
        (
            "a kick with two",
            asking(SET_VRING_KICK, &0u64.to_ne_bytes()),
            fds(2),
        ),
        (
            "a back-end channel without a descriptor",
            asking(SET_BACKEND_REQ_FD, &[]),
            fds(0),
        ),
        (
            "a log without a descriptor",
            asking(SET_LOG_BASE, &log_base(4096, 0)),
            fds(0),
        ),
        (
            "a log in a file that can shrink",
            asking(SET_LOG_BASE, &log_base(4096, 0)),
            fds(1),
        ),
        (
            "more than one message may carry",
            asking(SET_MEM_TABLE, &table),
            fds(60),
        ),
    ]);
}

#[test]
fn descriptors_of_the_wrong_kind_end_the_session_at_worst() {
    let pair = || UnixStream::pair().unwrap();
    let kick = |fd: OwnedFd| (asking(SET_VRING_KICK, &0u64.to_ne_bytes()), vec![fd]);
    let call = |fd: OwnedFd| (asking(SET_VRING_CALL, &0u64.to_ne_bytes()), vec![fd]);
    let (read_end, write_end) = std::io::pipe().unwrap();
    let (hung_up, other) = std::io::pipe().unwrap();
    drop(other);
    let directory = || -> OwnedFd { File::open("/").unwrap().into() };
    let table = asking(SET_MEM_TABLE, &mem_table(&[Region::create(0, 4096)]));
    let named = |name, (bytes, fds)| (name, bytes, fds);
    all_survived(&[
        named("a kick that is a file", kick(some_file())),
        named("a kick that is a directory", kick(directory())),
        named("a kick that is a socket", kick(pair().0.into())),
        named("a kick that is a pipe", kick(read_end.into())),
        named("a kick that hung up", kick(hung_up.into())),
        named("a call that is a file", call(some_file())),
        named("a call that is a pipe", call(write_end.into())),
        named("a call that hung up", call(pair().0.into())),
        ("memory that is a directory", table.clone(), vec![directory()]),
        ("memory that is a socket", table.clone(), vec![pair().0.into()]),
        ("memory that is the null device", table.clone(), vec![some_file()]),
        ("memory of no length", table, vec![memfd(0)]),
        (
            "a back-end channel that is a file",
            asking(SET_BACKEND_REQ_FD, &[]),
            vec![some_file()],
        ),
        (
            "a back-end channel that hung up",
            asking(SET_BACKEND_REQ_FD, &[]),
            vec![pair().0.into()],
        ),
    ]);
}

#[test]
fn call_descriptor_that_blocks_does_not_hang_the_device() {
    let server = Server::new();
    // An eventfd that is full, and blocks whoever adds to it.
    let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let mut driver = server.connect_with(Setup {
        queues: 2,
        ..Setup::default()
    });
    driver
        .frontend
        .tell(SET_VRING_CALL, &0u64.to_ne_bytes(), &[full.as_fd()]);
    for _ in 0..3 {
        driver.submit(0, T_IN, 0, Data::In(SECTOR));
    }
    driver.run_on(1, T_IN, 0, Data::In(SECTOR));
    driver.frontend.stop_vring(0);
    drop(driver);
    server.still_serves();

    // Nor does it keep the server from ending.
    let mut driver = server.connect();
    driver
        .frontend
        .tell(SET_VRING_CALL, &0u64.to_ne_bytes(), &[full.as_fd()]);
    driver.submit(0, T_IN, 0, Data::In(SECTOR));
    server.stop();
}

#[test]
fn kick_descriptor_that_blocks_does_not_hang_the_device() {
    let server = Server::new();
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let mut driver = Driver::unstarted(Frontend::connect(server.socket()), Setup::default());
    driver.frontend.set_vring(&driver.queues[0], &driver.memory, 0);
    driver
        .frontend
        .tell(SET_VRING_KICK, &0u64.to_ne_bytes(), &[kick.as_fd()]);
    driver.frontend.enable(0, true);
    // Another reader takes the count away again and again: the device may find nothing where it was promised some.
    let (_, buffers) = driver.build(T_IN, 0, Data::In(SECTOR));
    for _ in 0..200 {
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        let mut poll = [rustix::event::PollFd::new(&kick, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if rustix::event::poll(&mut poll, Some(&now)).unwrap() > 0 {
            // Not blocking: if the device was faster, that is fine too.
            rustix::io::ioctl_fionbio(&kick, true).unwrap();
            let _ = rustix::io::read(&kick, &mut [0; 8]);
            rustix::io::ioctl_fionbio(&kick, false).unwrap();
        }
    }
    let head = driver.queue().chain(&buffers);
    driver.queue().offer(&[head]);
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    driver.queue().watch_used();
    driver.frontend.stop_vring(0);
    drop(driver);
    server.still_serves();
    server.stop();
}

#[test]
fn kick_descriptor_that_is_always_ready_does_not_keep_the_device_busy() {
    let server = Server::new();
    let (hung_up, other) = std::io::pipe().unwrap();
    drop(other);
    let (unread, mut other) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut other, &[1; 4096]).unwrap();
    for kick in [hung_up, unread] {
        let mut driver = Driver::unstarted(Frontend::connect(server.socket()), Setup::default());
        driver.frontend.set_vring(&driver.queues[0], &driver.memory, 0);
        // Refused at once, or taken.
        if driver
            .frontend
            .try_tell(SET_VRING_KICK, &0u64.to_ne_bytes(), &[kick.as_fd()])
            == Some(0)
        {
            driver.frontend.enable(0, true);
            std::thread::sleep(Duration::from_millis(100));
            let before = server.process.ticks();
            std::thread::sleep(Duration::from_millis(300));
            let used = server.process.ticks() - before;
            assert!(used <= 5, "{used} ticks in 0.3 seconds");
            driver.queue().kick();
        }
        drop(driver);
        server.still_serves();
    }
}

// ---- order and range

#[test]
fn messages_out_of_order_end_the_session_at_worst() {
    let memory = Memory::new();
    let queue = Queue::new(&memory, 0, 128, true);
    let event = || -> OwnedFd { rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap() };
    let region = Region::create(HOLE, 4096);
    all_survived(&[
        raw(
            "an owner again",
            [asking(SET_OWNER, &[]), asking(SET_OWNER, &[])].concat(),
        ),
        raw("an owner that leaves", asking(RESET_OWNER, &[])),
        raw("a reset", asking(RESET_DEVICE, &[])),
        raw("an address", asking(SET_VRING_ADDR, &vring_addr(&queue, &memory))),
        raw("a base", asking(SET_VRING_BASE, &vring_state(0, 7))),
        raw("the base", message(GET_VRING_BASE, VERSION, &vring_state(0, 0))),
        raw("a vring enabled", asking(SET_VRING_ENABLE, &vring_state(0, 1))),
        raw("a vring disabled", asking(SET_VRING_ENABLE, &vring_state(0, 0))),
        (
            "a kick",
            asking(SET_VRING_KICK, &0u64.to_ne_bytes()),
            vec![event()],
        ),
        (
            "a call",
            asking(SET_VRING_CALL, &0u64.to_ne_bytes()),
            vec![event()],
        ),
        raw(
            "a region removed that is not there",
            asking(REM_MEM_REG, &single_region(&region)),
        ),
        raw(
            "features again",
            asking(SET_FEATURES, &(1u64 << 32 | F_PROTOCOL_FEATURES).to_ne_bytes()),
        ),
        raw("no features at all", asking(SET_FEATURES, &0u64.to_ne_bytes())),
        raw(
            "no protocol features at all",
            asking(SET_PROTOCOL_FEATURES, &0u64.to_ne_bytes()),
        ),
        raw("how many queues", asking(GET_QUEUE_NUM, &[])),
        raw("how many regions", asking(GET_MAX_MEM_SLOTS, &[])),
        raw("a configuration", asking(GET_CONFIG, &config(0, 0, &[0; 60]))),
    ]);
}

#[test]
fn values_out_of_range_end_the_session_at_worst() {
    let state = |request, index, num| asking(request, &vring_state(index, num));
    let address = |desc, used, avail| asking(SET_VRING_ADDR, &raw_vring_addr(0, desc, used, avail));
    // The front-end's addresses of region 0.
    let base = 0x7e00_0000_0000u64;
    let end = base + (4 << 20);
    let mut messages = vec![
        raw(
            "features nobody offered",
            asking(SET_FEATURES, &u64::MAX.to_ne_bytes()),
        ),
        raw(
            "protocol features nobody offered",
            asking(SET_PROTOCOL_FEATURES, &u64::MAX.to_ne_bytes()),
        ),
        raw(
            "a kick of vring 255",
            asking(SET_VRING_KICK, &(255 | NOFD).to_ne_bytes()),
        ),
        raw(
            "a configuration of no bytes",
            asking(GET_CONFIG, &config(0, 0, &[])),
        ),
        raw(
            "a configuration set of no bytes",
            asking(SET_CONFIG, &config(0, 0, &[])),
        ),
        raw(
            "a configuration of another size than said",
            asking(GET_CONFIG, &[0xff; 20]),
        ),
        raw("a misaligned table", address(base + 1, base + 8192, base + 16384)),
        raw("misaligned rings", address(base, base + 8193, base + 16385)),
        raw("addresses in no region", address(1, 2, 3)),
        raw(
            "addresses at the end of a region",
            address(end - 16, end - 4, end - 4),
        ),
        raw(
            "addresses past the end",
            address(u64::MAX - 15, u64::MAX - 3, u64::MAX - 1),
        ),
    ];
    for request in [SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE] {
        for index in [4, 255, 256, 0x8000, u32::MAX] {
            messages.push(raw("a vring that is not there", state(request, index, 1)));
        }
    }
    for num in [0, 3, 127, 1025, 32_768, 65_535, 65_536, u32::MAX] {
        messages.push(raw("a size of a vring", state(SET_VRING_NUM, 0, num)));
    }
    for num in [65_535, 65_536, u32::MAX] {
        messages.push(raw("a base", state(SET_VRING_BASE, 0, num)));
        messages.push(raw("enabled how", state(SET_VRING_ENABLE, 0, num)));
    }
    all_survived(&messages);
}

#[test]
fn regions_that_are_wrong_end_the_session_at_worst() {
    let region = Region::create(HOLE, 4096);
    let with = |guest, len| Region {
        guest,
        len,
        ..region.clone()
    };
    let table = |name, regions: &[Region]| {
        let fds = regions.iter().map(|_| memfd(4096)).collect();
        (name, asking(SET_MEM_TABLE, &mem_table(regions)), fds)
    };
    let add = |name, region: &Region| {
        (
            name,
            asking(ADD_MEM_REG, &single_region(region)),
            vec![memfd(4096)],
        )
    };
    let count = |count: u32| [&count.to_ne_bytes()[..], &[0; 4]].concat();
    all_survived(&[
        table("no regions", &[]),
        table("a region of no bytes", &[with(HOLE, 0)]),
        table("a region longer than its file", &[with(HOLE, 8192)]),
        table("a region of 2^63", &[with(HOLE, 1 << 63)]),
        table("a region of everything", &[with(0, u64::MAX)]),
        table(
            "a region past the end of addresses",
            &[with(u64::MAX - 4095, 4096), with(u64::MAX, 4096)],
        ),
        table("a region twice", &[with(HOLE, 4096), with(HOLE, 4096)]),
        table(
            "regions that overlap",
            &[with(HOLE, 4096), with(HOLE + 2048, 4096)],
        ),
        table(
            "regions out of order",
            &[with(HOLE + 4096, 4096), with(HOLE, 4096)],
        ),
        table("a region of no whole pages", &[with(HOLE + 1, 4095)]),
        raw("more regions than follow", asking(SET_MEM_TABLE, &count(8))),
        raw("billions of regions", asking(SET_MEM_TABLE, &count(u32::MAX))),
        add("an added region of no bytes", &with(HOLE, 0)),
        add("an added region longer than its file", &with(HOLE, 8192)),
        add("an added region over another", &with(0, 4096)),
        add(
            "an added region past the end of addresses",
            &with(u64::MAX - 100, 4096),
        ),
    ]);
}

#[test]
fn memory_that_is_not_as_long_as_it_says_does_not_kill_the_server() {
    let server = Server::new();
    for offset in [0u64, 4096] {
        let mut driver = Driver::unstarted(Frontend::connect(server.socket()), Setup::default());
        // The rings' region, from a file that ends before the rings.
        let mut payload = mem_table(&driver.memory.regions());
        payload[8 + 24..8 + 32].copy_from_slice(&offset.to_ne_bytes());
        let regions = driver.memory.regions();
        let short = memfd(if offset == 0 { 4096 } else { regions[0].len });
        let fds = [short.as_fd(), regions[1].file.as_fd(), regions[2].file.as_fd()];
        let _ = driver.frontend.try_tell(SET_MEM_TABLE, &payload, &fds);
        // The last page of the region.
        let end = regions[0].user + regions[0].len - 4096;
        let _ = driver
            .frontend
            .try_send_bytes(&message(SET_VRING_NUM, VERSION, &vring_state(0, 4)), &[]);
        let address = raw_vring_addr(0, end, end + 1024, end + 2048);
        let _ = driver
            .frontend
            .try_send_bytes(&message(SET_VRING_ADDR, VERSION, &address), &[]);
        let kick = message(SET_VRING_KICK, VERSION, &0u64.to_ne_bytes());
        let _ = driver
            .frontend
            .try_send_bytes(&kick, &[driver.queues[0].kick.as_fd()]);
        let _ = driver
            .frontend
            .try_send_bytes(&message(SET_VRING_ENABLE, VERSION, &vring_state(0, 1)), &[]);
        driver.queue().kick();
        driver.frontend.shut_down();
        driver.frontend.wait_closed();
        drop(driver);
        server.still_serves();
    }
}

#[test]
fn memory_that_shrinks_ends_the_session_and_nothing_else() {
    let server = Server::new();
    let bytes = pattern(6, 64 * 1024);
    server.connect().write(512, &bytes);
    // The rings' memory goes, memory that nothing uses, and that of the buffers: all of it, and from their middle on.
    for (region, len) in [(0, 0), (1, 0), (2, 0), (2, 32 * 1024)] {
        let mut driver = server.connect();
        let (_, buffers) = driver.build(T_OUT, 512, Data::Out(&[0xff; 64 * 1024]));
        let head = driver.queue().chain(&buffers);
        driver.queue().offer(&[head]);
        rustix::fs::ftruncate(&driver.memory.regions()[region].file, len).unwrap();
        driver.queue().kick();
        // Answered after the drain, or not at all.
        let _ = driver
            .frontend
            .try_send_bytes(&message(GET_VRING_BASE, VERSION, &vring_state(0, 0)), &[]);
        driver.frontend.shut_down();
        driver.frontend.wait_closed();
        // Nothing here may touch that memory any more.
        std::mem::forget(driver);
        let mut driver = server.connect();
        let now = driver.read(512, bytes.len());
        // The device may have looked at the ring before the kick: sectors that were read before the memory went may be
        // there. What is read where it was is zeros.
        let sectors = now.chunks(512).zip(bytes.chunks(512));
        let wrong = sectors
            .enumerate()
            .find(|(_, (now, before))| now != before && **now != [0xff; 512]);
        assert!(
            wrong.is_none(),
            "region {region}, {len} left: what was not read reached storage: {wrong:?}"
        );
        driver.write(512, &bytes);
        driver.still_serves();
    }
}

#[test]
fn rings_in_memory_that_is_gone_do_no_harm() {
    let server = Server::new();
    let mut driver = server.connect();
    driver.still_serves();
    // The memory with the rings goes, but for the region with the buffers.
    let regions = driver.memory.regions();
    let _ = driver.frontend.try_tell(
        SET_MEM_TABLE,
        &mem_table(&regions[2..]),
        &[regions[2].file.as_fd()],
    );
    driver.queue().kick();
    driver.queue().kick();
    let frontend = &driver.frontend;
    let _ = frontend.try_send_bytes(&message(GET_VRING_BASE, VERSION, &vring_state(0, 0)), &[]);
    frontend.shut_down();
    frontend.wait_closed();
    drop(driver);
    server.still_serves();
    server.stop();
}

#[test]
fn used_ring_over_the_descriptor_table_does_no_harm() {
    let server = Server::new();
    let mut driver = Driver::unstarted(Frontend::connect(server.socket()), Setup::default());
    // All three parts of the ring lie on one another: what the device writes it then reads.
    let queue = &mut driver.queues[0];
    (queue.avail, queue.used) = (queue.desc, queue.desc);
    driver.frontend.start_vring(&driver.queues[0], &driver.memory, 0);
    driver.frontend.enable(0, true);
    let mut random = common::Random::new(3);
    for _ in 0..200 {
        let desc = driver.queues[0].desc;
        driver.memory.write(desc, &pattern(random.number(), 4096));
        driver.queue().kick();
    }
    driver.frontend.shut_down();
    driver.frontend.wait_closed();
    drop(driver);
    server.still_serves();
    server.stop();
}

#[test]
fn noise_in_rings_and_buffers_does_no_harm() {
    let server = Server::new();
    let mut random = common::Random::new(5);
    for _ in 0..20 {
        let mut driver = server.connect();
        let size = driver.queue().size;
        for _ in 0..50 {
            // Descriptors of noise, but short and near memory, so that many of them hit something.
            for at in 0..size {
                let noise = random.number();
                driver.queue().set_desc(
                    at,
                    common::queue::Desc {
                        addr: random.below(9 << 20),
                        len: (noise >> 32) as u32 % 2048,
                        flags: noise as u16 & if noise & 0x700_0000 == 0 { 7 } else { 3 },
                        next: (noise >> 16) as u16 % (size + 1),
                    },
                );
            }
            let heads: Vec<u16> = (0..random.below(64))
                .map(|_| random.below(u64::from(size)) as u16)
                .collect();
            driver.queue().offer(&heads);
            driver.queue().kick();
        }
        driver.frontend.shut_down();
        driver.frontend.wait_closed();
    }
    server.still_serves();
    server.stop();
}
