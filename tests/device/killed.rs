//! A server that is killed, at any moment, and the one after it: each request is answered once, and what was answered is done.

use common::driver::{Data, Driver, S_OK, SECTOR, Setup, T_FLUSH, T_IN, T_OUT, header};
use common::frontend::{
    F_PROTOCOL_FEATURES, Frontend, GET_INFLIGHT_FD, PROTOCOL_INFLIGHT_SHMFD, SET_INFLIGHT_FD,
    inflight_description,
};
use common::process::Process;
use common::queue::{Buf, Used, readable, writable};
use common::serve::{Server, serve};
use common::volume::Volume;
use common::{DEADLINE, Random, pattern};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::Signal;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const QUEUES: usize = 4;
const IN_FLIGHT: usize = 64;
/// The disk of a slot, in sectors.
const AREA: usize = 32;

/// A guest with 64 requests in flight in each of 4 queues. Each belongs to a slot, which has a part of the disk for itself and asks
/// for the next as soon as it has an answer: what is carried out later than it was answered overwrites what was written since.
pub(super) struct Guest {
    pub(super) driver: Driver,
    slots: Vec<Slot>,
    /// The slot of each head in flight, by queue.
    heads: Vec<HashMap<u16, usize>>,
    pub(super) random: Random,
    pub(super) answered: usize,
}

struct Slot {
    queue: usize,
    sector: u64,
    header: u64,
    data: u64,
    status: u64,
    /// What the disk holds, as far as it was answered.
    content: Vec<u8>,
    asked: Asked,
}

#[derive(Clone)]
enum Asked {
    Nothing,
    Write { at: usize, bytes: Vec<u8> },
    Read { at: usize, len: usize },
    Flush,
}

impl Guest {
    pub(super) fn new(socket: &Path) -> Self {
        let driver = Driver::tracked(
            socket,
            Setup {
                queues: QUEUES as u32,
                queue_size: 256,
                ..Setup::default()
            },
        );
        let memory = driver.memory.clone();
        let slots = (0..QUEUES * IN_FLIGHT)
            .map(|slot| Slot {
                queue: slot % QUEUES,
                sector: (slot * AREA) as u64,
                header: memory.buffer(16),
                data: memory.buffer((AREA * SECTOR) as u64),
                status: memory.buffer(1),
                content: Vec::new(),
                asked: Asked::Nothing,
            })
            .collect();
        let mut guest = Guest {
            driver,
            slots,
            heads: vec![HashMap::new(); QUEUES],
            random: Random::new(14),
            answered: 0,
        };
        for slot in 0..guest.slots.len() {
            let bytes = pattern(slot as u64, AREA * SECTOR);
            guest.slots[slot].content = vec![0; bytes.len()];
            guest.ask(slot, Asked::Write { at: 0, bytes });
        }
        guest
    }

    /// Asks for something on behalf of a slot.
    fn ask(&mut self, slot: usize, asked: Asked) {
        let Slot {
            queue,
            sector,
            header: header_at,
            data,
            status,
            ..
        } = self.slots[slot];
        let memory = self.driver.memory.clone();
        let (kind, at, buffer): (u32, usize, Option<Buf>) = match &asked {
            Asked::Nothing => return,
            Asked::Write { at, bytes } => {
                memory.write(data, bytes);
                (T_OUT, *at, Some(readable(data, bytes.len())))
            }
            Asked::Read { at, len } => {
                memory.write(data, &vec![0xee; *len]);
                (T_IN, *at, Some(writable(data, *len)))
            }
            Asked::Flush => (T_FLUSH, 0, None),
        };
        memory.write(header_at, &header(kind, sector + (at / SECTOR) as u64));
        memory.write(status, &[0xee]);
        let buffers: Vec<Buf> = [Some(readable(header_at, 16)), buffer, Some(writable(status, 1))]
            .into_iter()
            .flatten()
            .collect();
        let queue_of = &mut self.driver.queues[queue];
        let head = queue_of.chain(&buffers);
        assert!(self.heads[queue].insert(head, slot).is_none());
        self.slots[slot].asked = asked;
        queue_of.offer(&[head]);
        queue_of.kick_if_asked(1);
    }

    /// What a slot asks for next: mostly writes.
    fn next(&mut self, slot: usize) -> Asked {
        let sectors = 1 + self.random.below(AREA as u64) as usize;
        let at = self.random.below((AREA - sectors) as u64 + 1) as usize * SECTOR;
        let len = sectors * SECTOR;
        match self.random.below(16) {
            0 => Asked::Flush,
            1..4 => Asked::Read { at, len },
            _ => Asked::Write {
                at,
                bytes: pattern(self.random.number() ^ slot as u64, len),
            },
        }
    }

    /// Takes the answers that are there; tells whether there were any.
    fn take_answers(&mut self) -> Vec<usize> {
        let mut answered = Vec::new();
        for queue in 0..QUEUES {
            while let Some(used) = self.driver.queues[queue].poll_used() {
                answered.push(self.take(queue, &used));
            }
        }
        answered
    }

    /// Takes an answer: that of the slot which it gives.
    fn take(&mut self, queue: usize, used: &Used) -> usize {
        let slot = self.heads[queue]
            .remove(&used.head)
            .unwrap_or_else(|| panic!("queue {queue}: head {} is answered a second time", used.head));
        self.check_answer(slot, used.len);
        self.answered += 1;
        slot
    }

    fn check_answer(&mut self, slot: usize, used_len: u32) {
        let memory = self.driver.memory.clone();
        let slot = &mut self.slots[slot];
        assert_eq!(memory.read(slot.status, 1), [S_OK], "sector {}", slot.sector);
        let written = match std::mem::replace(&mut slot.asked, Asked::Nothing) {
            Asked::Nothing => panic!("an answer to nothing"),
            Asked::Write { at, bytes } => {
                slot.content[at..at + bytes.len()].copy_from_slice(&bytes);
                0
            }
            Asked::Read { at, len } => {
                assert!(
                    memory.read(slot.data, len) == slot.content[at..at + len],
                    "sector {}: a read of {len} bytes at {at} finds something else than was written",
                    slot.sector
                );
                len
            }
            Asked::Flush => 0,
        };
        assert_eq!(used_len, written as u32 + 1);
    }

    /// Asks and takes answers for some time.
    pub(super) fn run(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            for slot in self.take_answers() {
                let next = self.next(slot);
                self.ask(slot, next);
            }
        }
    }

    /// Asks again for all slots.
    pub(super) fn ask_all(&mut self) {
        for slot in 0..self.slots.len() {
            let next = self.next(slot);
            self.ask(slot, next);
        }
    }

    /// Waits until all is answered, each time for the notification, as a guest does.
    pub(super) fn settle(&mut self) {
        for queue in 0..QUEUES {
            while !self.heads[queue].is_empty() {
                let used = self.driver.queues[queue].wait_used();
                self.take(queue, &used);
            }
        }
    }

    /// All that was answered is there.
    pub(super) fn check_content(&mut self) {
        for slot in 0..self.slots.len() {
            self.ask(
                slot,
                Asked::Read {
                    at: 0,
                    len: AREA * SECTOR,
                },
            );
        }
        self.settle();
    }
}

/// A volume that is served again and again at one socket.
struct Served {
    volume: Volume,
    socket: PathBuf,
    process: Process,
}

impl Served {
    fn new() -> Self {
        let volume = Volume::new();
        let socket = volume.beside("vhost.sock");
        let process = Process::spawn(&mut serve(&volume, &socket, &[]));
        Served {
            volume,
            socket,
            process,
        }
    }

    fn kill(&mut self) {
        self.process.signal(Signal::KILL);
        self.process.wait();
    }

    fn start(&mut self) {
        self.process = Process::spawn(&mut serve(&self.volume, &self.socket, &[]));
    }
}

/// SEALBLK_TEST_KILLS=N kills it as often.
pub(super) fn kills(default: usize) -> usize {
    std::env::var("SEALBLK_TEST_KILLS").map_or(default, |kills| kills.parse().expect("a number"))
}

#[test]
fn killed_at_any_moment_it_answers_each_request_once_and_has_done_what_it_answered() {
    let mut served = Served::new();
    let mut guest = Guest::new(&served.socket);
    let kills = kills(40);
    let mut resumed = 0;
    let mut took = Vec::new();
    for kill in 0..kills {
        let time = Duration::from_micros(guest.random.below(12_000));
        guest.run(time);
        served.kill();
        let started = Instant::now();
        served.start();
        guest.driver.reconnect(&served.socket);
        took.push(started.elapsed().as_millis());
        // All queues were set up, so each has said how many it found.
        resumed += served.process.stderr().matches("carried out again").count();
        if kill % 8 == 0 {
            guest.settle();
            guest.check_content();
            guest.ask_all();
        }
    }
    guest.settle();
    guest.check_content();
    assert!(
        guest.answered > kills * IN_FLIGHT,
        "only {} requests were answered",
        guest.answered
    );
    assert!(
        resumed >= kills,
        "requests were in flight at {resumed} ends of a queue only"
    );
    took.sort_unstable();
    let (median, most) = (took[kills / 2], took[kills - 1]);
    println!("{kills} kills, after which it served within {median} ms (median), {most} ms (most)");
    served.process.signal(Signal::TERM);
    let ended = served.process.wait();
    assert!(ended.status.success(), "{ended:?}");
}

/// It ended before it could notify the driver, which waits for that alone; the used ring's index is at its beginning again.
#[test]
fn killed_after_an_answer_the_next_one_notifies_the_driver_wherever_the_used_ring_is() {
    let mut served = Served::new();
    let setup = Setup {
        base: u16::MAX - 1,
        ..Setup::default()
    };
    let mut driver = Driver::tracked(&served.socket, setup);
    driver.flush();
    driver.flush();
    assert_eq!(driver.queues[0].used_index(), 0);
    served.kill();
    driver.queues[0].take_call();
    served.start();
    driver.reconnect(&served.socket);
    driver.queues[0].wait_call();
}

/// A guest whose server has ended, and the memory that it has left, as a test makes it up.
struct Left {
    driver: Driver,
}

/// Offsets in the memory of the first queue (vhost-user specification, "Inflight I/O tracking").
const VERSION: u64 = 8;
const DESC_NUM: u64 = 10;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;

impl Left {
    /// One queue of 128 descriptors was started, and no request came.
    fn by(served: &mut Served) -> Self {
        let driver = Driver::tracked(&served.socket, Setup::default());
        let left = Left { driver };
        // version, desc_num, last_batch_head, used_idx; the server has answered the front-end before it starts the queue.
        let start = Instant::now();
        while left.numbers(VERSION) != [1, 128, 0, 0] {
            assert!(start.elapsed() < DEADLINE, "{:?}", left.numbers(VERSION));
            thread::sleep(Duration::from_millis(1));
        }
        served.kill();
        left
    }

    fn record(&self) -> &File {
        &self.driver.inflight.as_ref().unwrap().file
    }

    fn numbers(&self, at: u64) -> [u16; 4] {
        let mut bytes = [0; 8];
        self.record().read_exact_at(&mut bytes, at).unwrap();
        [0, 2, 4, 6].map(|at| u16::from_ne_bytes([bytes[at], bytes[at + 1]]))
    }

    fn set(&self, at: u64, number: u16) {
        self.record().write_all_at(&number.to_ne_bytes(), at).unwrap();
    }

    fn descriptor(head: u16) -> u64 {
        16 + 16 * u64::from(head)
    }

    fn set_in_flight(&self, head: u16, in_flight: u8) {
        self.record()
            .write_all_at(&[in_flight], Self::descriptor(head))
            .unwrap();
    }

    fn set_counter(&self, head: u16, counter: u64) {
        let at = Self::descriptor(head) + 8;
        self.record().write_all_at(&counter.to_ne_bytes(), at).unwrap();
    }

    fn take(&self, head: u16, counter: u64) {
        self.set_counter(head, counter);
        self.set_in_flight(head, 1);
    }

    /// The first `writes` of the writes by which a server gives a chain back.
    fn give_back(&self, head: u16, used: u16, writes: usize) {
        let (queue, memory) = (&self.driver.queues[0], &self.driver.memory);
        let element = queue.used + 4 + 8 * u64::from(used % queue.size);
        let writes_of_one: [&dyn Fn(); 6] = [
            &|| self.set(Self::descriptor(head) + 6, self.numbers(VERSION)[2]),
            &|| self.set(LAST_BATCH_HEAD, head),
            &|| {
                memory.write(
                    element,
                    &[u32::from(head).to_le_bytes(), 1_u32.to_le_bytes()].concat(),
                )
            },
            &|| memory.store_index(queue.used + 2, used.wrapping_add(1)),
            &|| self.set_in_flight(head, 0),
            &|| self.set(USED_IDX, used.wrapping_add(1)),
        ];
        writes_of_one.iter().take(writes).for_each(|write| write());
    }
}

/// A server that was killed while it gave a chain back: whatever the driver has seen of that, it does not see again.
#[test]
fn killed_between_any_two_writes_of_an_answer_it_answers_once() {
    const IN_USED_RING: usize = 4;
    let mut served = Served::new();
    for writes in 0..=6 {
        let mut left = Left::by(&mut served);
        let old = pattern(1, 8 * SECTOR);
        let new = pattern(2, 8 * SECTOR);
        let requests: Vec<_> = (0..4)
            .map(|slot| left.driver.build(T_OUT, 8 * slot, Data::Out(&old)))
            .collect();
        let heads: Vec<u16> = requests
            .iter()
            .map(|(_, buffers)| left.driver.queue().chain(buffers))
            .collect();
        left.driver.queue().offer(&heads);
        // Three were taken; the second is answered, the third is being answered.
        for (counter, head) in (0..).zip(&heads[..3]) {
            left.take(*head, counter);
        }
        left.give_back(heads[1], 0, 6);
        left.give_back(heads[2], 1, writes);
        let answered: &[usize] = if writes < IN_USED_RING { &[1] } else { &[1, 2] };
        for &request in answered {
            left.driver.memory.write(requests[request].0.status, &[S_OK]);
            // The driver has the buffer back, and writes something else to it.
            left.driver.memory.write(requests[request].1[1].addr, &new);
        }

        served.start();
        left.driver.reconnect(&served.socket);
        let mut seen: Vec<usize> = (0..4)
            .map(|_| left.driver.queue().wait_used().head)
            .map(|head| heads.iter().position(|other| *other == head).unwrap())
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3], "after {writes} writes");
        assert_eq!(left.numbers(VERSION)[3], 4, "used_idx after {writes} writes");
        left.driver.still_serves();
        let used = left.driver.queue().used_index();
        assert_eq!(used, left.driver.queue().next_avail(), "after {writes} writes");
        for (request, (pending, _)) in requests.iter().enumerate() {
            assert_eq!(left.driver.memory.read(pending.status, 1), [S_OK]);
            let content = left.driver.read(8 * request as u64, old.len());
            // What the dead server had answered it has written, or so a driver believes; this one must not write it.
            assert!(
                answered.contains(&request) || request == 1 || content == old || request > 3,
                "request {request} after {writes} writes"
            );
            assert!(
                content != new,
                "request {request} was carried out again, after {writes} writes"
            );
        }
        drop(left);
        served.kill();
        served.start();
    }
}

/// What the next server had not taken again when it was told to stop was never answered.
#[test]
fn a_queue_that_is_stopped_while_it_continues_carries_out_first_what_was_in_flight() {
    // More than there are buffers for.
    const REQUESTS: u64 = 40;
    const LEN: usize = 256 << 10;
    let mut served = Served::new();
    let mut left = Left::by(&mut served);
    let bytes = pattern(1, LEN);
    let requests: Vec<_> = (0..REQUESTS)
        .map(|request| {
            left.driver
                .build(T_OUT, request * (LEN / SECTOR) as u64, Data::Out(&bytes))
        })
        .collect();
    for (counter, (_, buffers)) in (0..).zip(&requests) {
        let head = left.driver.queue().chain(buffers);
        left.driver.queue().offer(&[head]);
        left.take(head, counter);
    }
    served.start();
    left.driver.reconnect(&served.socket);
    let base = left.driver.frontend.stop_vring(0);
    assert_eq!(u64::from(base), REQUESTS);
    assert_eq!(left.driver.queue().used_index(), base);
    for (pending, _) in &requests {
        assert_eq!(left.driver.memory.read(pending.status, 1), [S_OK]);
    }
    left.driver.restart(0, base);
    (0..REQUESTS).for_each(|_| {
        left.driver.queue().wait_used();
    });
    left.driver.still_serves();
}

/// A head that was counted, and not yet in flight when the server died, is taken in its turn.
#[test]
fn killed_between_the_two_writes_of_a_take_it_takes_the_chain_later() {
    let mut served = Served::new();
    let mut left = Left::by(&mut served);
    let (_, first) = left.driver.build(T_FLUSH, 0, Data::None);
    let (_, second) = left.driver.build(T_FLUSH, 0, Data::None);
    let heads = [
        left.driver.queue().chain(&first),
        left.driver.queue().chain(&second),
    ];
    left.driver.queue().offer(&heads);
    left.take(heads[0], 0);
    left.set_counter(heads[1], 1);
    served.start();
    left.driver.reconnect(&served.socket);
    let mut seen = [(); 2].map(|()| left.driver.queue().wait_used().head);
    seen.sort_unstable();
    let mut expected = heads;
    expected.sort_unstable();
    assert_eq!(seen, expected);
    left.driver.still_serves();
    assert_eq!(left.driver.queue().used_index(), left.driver.queue().next_avail());
}

#[test]
fn a_queue_that_was_stopped_starts_where_the_front_end_says() {
    let served = Served::new();
    let mut driver = Driver::tracked(&served.socket, Setup::default());
    driver.still_serves();
    let base = driver.frontend.stop_vring(0);
    assert_eq!(base, driver.queue().next_avail());
    // A driver that was reset begins anew, in the same memory.
    let event_idx = driver.queues[0].event_idx;
    driver.queues[0] = common::queue::Queue::new(&driver.memory, 0, 64, event_idx);
    driver.restart(0, 0);
    driver.still_serves();
}

#[test]
fn a_record_that_makes_no_sense_has_its_queue_rest_and_harms_nothing_else() {
    type Spoiled<'s> = (&'s str, &'s dyn Fn(&Left));
    let spoil: [Spoiled<'_>; 8] = [
        ("another version", &|left| left.set(VERSION, 2)),
        ("another size", &|left| left.set(DESC_NUM, 64)),
        ("a used index far behind", &|left| left.set(USED_IDX, 1000)),
        ("a used index just behind, and a last head beyond", &|left| {
            left.set(USED_IDX, u16::MAX);
            left.set(LAST_BATCH_HEAD, 128);
        }),
        ("a chain of heads that leads out of the table", &|left| {
            left.set(USED_IDX, u16::MAX - 3);
            left.set(Left::descriptor(0) + 6, u16::MAX);
        }),
        // These make sense, to a front-end that has harmed itself.
        ("a chain of heads that goes round", &|left| {
            left.set(USED_IDX, u16::MAX - 100)
        }),
        ("all in flight", &|left| {
            (0..128).for_each(|head| left.set_in_flight(head, 0xff))
        }),
        ("all in flight for the last time", &|left| {
            for head in 0..128 {
                left.take(head, u64::MAX);
            }
        }),
    ];
    let mut served = Served::new();
    for (what, spoil) in spoil {
        let left = Left::by(&mut served);
        spoil(&left);
        served.start();
        let Left { mut driver } = left;
        driver.reconnect(&served.socket);
        driver.queues[0].kick();
        // Its messages are answered, and the next front-end is served.
        assert_eq!(
            driver.frontend.features() & F_PROTOCOL_FEATURES,
            F_PROTOCOL_FEATURES,
            "{what}"
        );
        drop(driver);
        Driver::connect(&served.socket).still_serves();
        let said = served.process.stderr();
        assert!(
            said.contains("the queue is not served") || said.contains("carried out again"),
            "{what}: {said}"
        );
        served.process.signal(Signal::TERM);
        let ended = served.process.wait();
        assert!(ended.status.success(), "{what}: {ended:?}");
        served.start();
    }
}

/// A memfd of some length, sealed or not.
fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let file = memfd_create("left", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, len).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

#[test]
fn memory_that_can_be_cut_off_or_is_too_small_or_of_too_many_queues_is_refused() {
    let server = Server::new();
    let refused = |what: &str, request: u32, description: &[u8], file: Option<OwnedFd>| {
        let mut frontend = Frontend::connect(server.socket());
        frontend.negotiate(!0, !0);
        let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        frontend.send(request, 0, description, &fds);
        frontend.wait_closed();
        server.still_serves();
        assert!(!server.process.stderr().contains("panicked"), "{what}");
    };
    let sealed = || Some(memfd(1 << 20, SealFlags::SHRINK));
    let describe = inflight_description;
    // Of one queue: room for the largest that a driver can set up.
    let len = 1024 * 16 + 64;
    for queues in [0, 5, u16::MAX] {
        let description = describe(1 << 20, 0, queues, 128);
        refused("queues", GET_INFLIGHT_FD, &description, None);
        refused("queues", SET_INFLIGHT_FD, &description, sealed());
    }
    for len in [0, 8, 19, 21, 23, 25, 64] {
        refused("a length", GET_INFLIGHT_FD, &vec![1; len], None);
    }
    let good = describe(4 * len, 0, 4, 128);
    refused("no descriptor", SET_INFLIGHT_FD, &good, None);
    refused(
        "unsealed",
        SET_INFLIGHT_FD,
        &good,
        Some(memfd(1 << 20, SealFlags::GROW)),
    );
    refused(
        "a short file",
        SET_INFLIGHT_FD,
        &good,
        Some(memfd(4096, SealFlags::SHRINK)),
    );
    refused(
        "a short range",
        SET_INFLIGHT_FD,
        &describe(len, 0, 4, 128),
        sealed(),
    );
    for offset in [1, 1 << 20, u64::MAX - 4095, u64::MAX] {
        refused(
            "an offset",
            SET_INFLIGHT_FD,
            &describe(4 * len, offset, 4, 128),
            sealed(),
        );
    }
    let pipe = std::io::pipe().unwrap().0;
    refused("a pipe", SET_INFLIGHT_FD, &good, Some(pipe.into()));

    // Of a front-end that has not agreed on it.
    let mut frontend = Frontend::connect(server.socket());
    frontend.negotiate(!0, !PROTOCOL_INFLIGHT_SHMFD);
    frontend.send(GET_INFLIGHT_FD, 0, &good, &[]);
    frontend.wait_closed();
    server.still_serves();
}

#[test]
fn memory_is_described_in_as_many_bytes_as_were_asked_for() {
    let server = Server::new();
    let mut frontend = Frontend::connect(server.socket());
    frontend.negotiate(!0, !0);
    for len in [20, 24] {
        let wanted = inflight_description(0, 0, 2, 256);
        let made = frontend.ask(GET_INFLIGHT_FD, &wanted[..len]);
        assert_eq!(made.payload.len(), len);
        let size = u64::from_ne_bytes(made.payload[..8].try_into().unwrap());
        let file = File::from(made.fds.into_iter().next().unwrap());
        assert_eq!(file.metadata().unwrap().len(), size);
        // A driver may set up larger queues than the front-end says.
        assert!(size >= 2 * (16 + 1024 * 16), "{size}");
        assert_eq!(made.payload[8..20], wanted[8..20]);
        // Another process cannot cut it off.
        file.set_len(0).unwrap_err();
        frontend.tell(SET_INFLIGHT_FD, &made.payload, &[file.as_fd()]);
    }
}
