//! A virtio-blk driver (virtio 1.2 §5.2) over [`Frontend`] and [`Queue`]: right by default, and open enough to be
//! made wrong in any one place.

use super::frontend::{
    F_LOG_ALL, F_PROTOCOL_FEATURES, Frontend, GET_INFLIGHT_FD, SET_FEATURES, SET_INFLIGHT_FD, SET_VRING_ADDR,
    SET_VRING_CALL, SET_VRING_KICK, inflight_description, vring_addr,
};
use super::memory::{Log, Memory, UNTOUCHED};
use super::pattern;
use super::queue::{Buf, Queue, Used, readable, writable};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::rc::Rc;

pub const F_SIZE_MAX: u64 = 1 << 1;
pub const F_SEG_MAX: u64 = 1 << 2;
pub const F_RO: u64 = 1 << 5;
pub const F_BLK_SIZE: u64 = 1 << 6;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_TOPOLOGY: u64 = 1 << 10;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_MQ: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;
pub const F_INDIRECT_DESC: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;

pub const SECTOR: usize = 512;

/// How a session is set up.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub queues: u32,
    pub queue_size: u16,
    pub features: u64,
    /// Agreed on without being offered, by a front-end that was offered it once.
    pub kept: u64,
    pub protocol: u64,
    /// Where the rings' indexes start.
    pub base: u16,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            queues: 1,
            queue_size: 128,
            features: !0,
            kept: 0,
            protocol: !0,
            base: 0,
        }
    }
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    pub status: u8,
    pub used_len: u32,
    /// What is now in the buffer that the device was given to write to.
    pub data: Vec<u8>,
}

/// A request that was put into a ring.
#[derive(Debug, Clone, Copy)]
pub struct Pending {
    pub head: u16,
    pub header: u64,
    /// The device-writable data.
    pub data: u64,
    pub data_len: usize,
    pub status: u64,
}

/// What goes between header and status.
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    None,
    /// For the device to read.
    Out(&'a [u8]),
    /// For the device to write.
    In(usize),
}

#[derive(Debug)]
pub struct Driver {
    pub frontend: Frontend,
    pub memory: Rc<Memory>,
    pub queues: Vec<Queue>,
    pub features: u64,
    /// What outlives the server, of a driver that has its requests tracked.
    pub inflight: Option<Inflight>,
    /// The log of a front-end that logs all when it goes on with another server.
    pub log: Option<Log>,
}

/// Memory that tracks requests in flight, as a front-end keeps it.
#[derive(Debug)]
pub struct Inflight {
    pub description: Vec<u8>,
    pub file: File,
}

impl Driver {
    pub fn connect(socket: &Path) -> Self {
        Driver::with(socket, Setup::default())
    }

    pub fn with(socket: &Path, setup: Setup) -> Self {
        let driver = Driver::unstarted(Frontend::connect(socket), setup);
        for queue in &driver.queues {
            driver.frontend.start_vring(queue, &driver.memory, setup.base);
        }
        if driver.features & F_PROTOCOL_FEATURES != 0 {
            driver
                .queues
                .iter()
                .for_each(|queue| driver.frontend.enable(queue.index, true));
        }
        driver
    }

    /// Features agreed on and memory given; no vring started.
    pub fn unstarted(mut frontend: Frontend, setup: Setup) -> Self {
        let features = setup.kept | frontend.negotiate_protocol(setup.features, setup.protocol);
        frontend.tell(SET_FEATURES, &features.to_ne_bytes(), &[]);
        let memory = Memory::new();
        frontend.set_memory(&memory);
        let queue = |index| {
            let mut queue = Queue::new(&memory, index, setup.queue_size, features & F_EVENT_IDX != 0);
            queue.start_at(setup.base);
            queue
        };
        let queues = (0..setup.queues).map(queue).collect();
        Driver {
            frontend,
            memory,
            queues,
            features,
            inflight: None,
            log: None,
        }
    }

    /// As [`Driver::with`], and the server tracks requests in flight in memory that outlives it.
    pub fn tracked(socket: &Path, setup: Setup) -> Self {
        let mut driver = Driver::unstarted(Frontend::connect(socket), setup);
        let wanted = inflight_description(0, 0, setup.queues as u16, setup.queue_size);
        let mut made = driver.frontend.ask(GET_INFLIGHT_FD, &wanted);
        let inflight = Inflight {
            description: made.payload,
            file: File::from(made.fds.pop().expect("memory that tracks requests")),
        };
        driver.keep(&inflight);
        driver.inflight = Some(inflight);
        for queue in &driver.queues {
            driver.frontend.start_vring(queue, &driver.memory, setup.base);
            driver.frontend.enable(queue.index, true);
        }
        driver
    }

    fn keep(&self, inflight: &Inflight) {
        let fds = [inflight.file.as_fd()];
        self.frontend.tell(SET_INFLIGHT_FD, &inflight.description, &fds);
    }

    /// Goes on with another server, as QEMU does: each vring starts where the used ring is.
    pub fn reconnect(&mut self, socket: &Path) {
        self.frontend = Frontend::connect(socket);
        self.frontend.negotiate_protocol(!0, !0);
        if let Some(inflight) = &self.inflight {
            self.keep(inflight);
        }
        for queue in &self.queues {
            self.frontend
                .set_vring_fd(SET_VRING_CALL, queue.index, Some(&queue.call));
        }
        self.log_all(self.log.is_some());
        self.frontend.set_memory(&self.memory);
        for queue in &self.queues {
            self.frontend.set_vring(queue, &self.memory, queue.used_index());
            self.frontend
                .set_vring_fd(SET_VRING_KICK, queue.index, Some(&queue.kick));
        }
        if let Some(log) = &self.log {
            self.frontend.set_log(log);
        }
        for queue in &self.queues {
            self.frontend.enable(queue.index, true);
        }
    }

    /// Says whether what the device writes to buffers is logged.
    pub fn log_all(&self, on: bool) {
        let features = self.features | if on { F_LOG_ALL } else { 0 };
        self.frontend.tell(SET_FEATURES, &features.to_ne_bytes(), &[]);
    }

    /// Says again where a vring is, and whether and where writes to its used ring are logged.
    pub fn set_vring_addr(&self, queue: usize) {
        let addresses = vring_addr(&self.queues[queue], &self.memory);
        self.frontend.tell(SET_VRING_ADDR, &addresses, &[]);
    }

    /// Starts and enables a vring that was stopped, where it was stopped.
    pub fn restart(&self, queue: usize, base: u16) {
        self.frontend.start_vring(&self.queues[queue], &self.memory, base);
        self.frontend.enable(queue as u32, true);
    }

    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }

    // ---- one request at a time, on the first queue

    pub fn run(&mut self, kind: u32, sector: u64, data: Data<'_>) -> Done {
        self.run_on(0, kind, sector, data)
    }

    pub fn run_on(&mut self, queue: usize, kind: u32, sector: u64, data: Data<'_>) -> Done {
        let mark = self.memory.mark();
        let pending = self.submit(queue, kind, sector, data);
        let used = self.queues[queue].wait_used();
        assert_eq!(used.head, pending.head);
        let done = self.outcome(&pending, used);
        self.memory.free_to(mark);
        done
    }

    pub fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let done = self.run(T_IN, sector, Data::In(len));
        assert_eq!(
            (done.status, done.used_len),
            (S_OK, len as u32 + 1),
            "read of {len} bytes at sector {sector}"
        );
        done.data
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) {
        let done = self.run(T_OUT, sector, Data::Out(bytes));
        let len = bytes.len();
        assert_eq!(
            (done.status, done.used_len),
            (S_OK, 1),
            "write of {len} bytes at sector {sector}"
        );
    }

    pub fn flush(&mut self) {
        let done = self.run(T_FLUSH, 0, Data::None);
        assert_eq!((done.status, done.used_len), (S_OK, 1), "flush");
    }

    /// Discard or write zeroes, of `(sector, sectors, flags)`.
    pub fn run_ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> Done {
        self.run(kind, 0, Data::Out(&range_bytes(ranges)))
    }

    // ---- many requests

    /// Puts a request into a ring and kicks. Header, data and status have a descriptor each.
    pub fn submit(&mut self, queue: usize, kind: u32, sector: u64, data: Data<'_>) -> Pending {
        let (pending, buffers) = self.build(kind, sector, data);
        let queue = &mut self.queues[queue];
        let head = queue.chain(&buffers);
        queue.offer(&[head]);
        queue.kick_if_asked(1);
        Pending { head, ..pending }
    }

    /// The buffers of a request, which are in no chain yet.
    pub fn build(&self, kind: u32, sector: u64, data: Data<'_>) -> (Pending, Vec<Buf>) {
        let memory = &self.memory;
        let header = memory.filled(&header(kind, sector));
        let mut pending = Pending {
            head: 0,
            header,
            data: 0,
            data_len: 0,
            status: 0,
        };
        let mut buffers = vec![readable(header, 16)];
        match data {
            Data::None => {}
            Data::Out(bytes) => buffers.push(readable(memory.filled(bytes), bytes.len())),
            Data::In(len) => {
                pending.data = memory.buffer(len as u64);
                pending.data_len = len;
                buffers.push(writable(pending.data, len));
            }
        }
        pending.status = memory.buffer(1);
        buffers.push(writable(pending.status, 1));
        (pending, buffers)
    }

    /// What came of a request whose chain came back.
    pub fn outcome(&self, pending: &Pending, used: Used) -> Done {
        let status = self.memory.read(pending.status, 1)[0];
        Done {
            status,
            used_len: used.len,
            data: self.memory.read(pending.data, pending.data_len),
        }
    }

    /// Runs one chain of any shape.
    pub fn run_chain(&mut self, buffers: &[Buf]) -> Used {
        let head = self.queue().chain(buffers);
        self.run_head(head)
    }

    /// Offers a head and waits for it to come back.
    pub fn run_head(&mut self, head: u16) -> Used {
        let queue = self.queue();
        queue.offer(&[head]);
        queue.kick_if_asked(1);
        let used = queue.wait_used();
        assert_eq!(used.head, head);
        used
    }

    /// The device still does what it is for: on every queue, a write, a flush, and the write reads back.
    pub fn still_serves(&mut self) {
        for queue in 0..self.queues.len() {
            let bytes = pattern(0x5e47e5 + queue as u64, 4096);
            let ok = |used_len| (S_OK, used_len);
            let sector = 8 * (1 + queue as u64);
            let write = self.run_on(queue, T_OUT, sector, Data::Out(&bytes));
            assert_eq!((write.status, write.used_len), ok(1), "queue {queue}: write");
            let flush = self.run_on(queue, T_FLUSH, 0, Data::None);
            assert_eq!((flush.status, flush.used_len), ok(1), "queue {queue}: flush");
            let read = self.run_on(queue, T_IN, sector, Data::In(bytes.len()));
            assert_eq!((read.status, read.used_len), ok(4097), "queue {queue}: read");
            assert!(
                read.data == bytes,
                "queue {queue}: what was written did not read back"
            );
        }
    }

    pub fn untouched(len: usize) -> Vec<u8> {
        vec![UNTOUCHED; len]
    }

    pub fn capacity(&self) -> u64 {
        u64::from_le_bytes(
            self.frontend
                .config(0, 8)
                .expect("a configuration space")
                .try_into()
                .unwrap(),
        )
    }
}

/// The header of a request (virtio 1.2 §5.2.6).
pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    let ioprio = 0u32;
    [
        &kind.to_le_bytes()[..],
        &ioprio.to_le_bytes(),
        &sector.to_le_bytes(),
    ]
    .concat()
}

/// Segments of a discard or write zeroes request.
pub fn range_bytes(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let segment = |&(sector, sectors, flags): &(u64, u32, u32)| {
        [
            &sector.to_le_bytes()[..],
            &sectors.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat()
    };
    ranges.iter().flat_map(segment).collect()
}
