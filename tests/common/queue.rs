//! A split virtqueue from the driver's side (virtio 1.2 §2.7), with every field open to a test that wants it wrong.

use super::DEADLINE;
use super::memory::Memory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;
pub const DESC_INDIRECT: u16 = 4;

/// One element of a descriptor table, as it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A buffer of a chain, in the order of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buf {
    pub addr: u64,
    pub len: u32,
    pub write: bool,
}

/// A buffer that the device reads.
pub fn readable(addr: u64, len: usize) -> Buf {
    Buf {
        addr,
        len: len as u32,
        write: false,
    }
}

/// A buffer that the device writes.
pub fn writable(addr: u64, len: usize) -> Buf {
    Buf {
        addr,
        len: len as u32,
        write: true,
    }
}

/// What the device said of a chain it is done with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub len: u32,
}

#[derive(Debug)]
pub struct Queue {
    pub index: u32,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub kick: Event,
    pub call: Event,
    pub event_idx: bool,
    /// Where writes to the used ring are logged, if they are (`log_guest_addr`).
    pub used_log: Option<u64>,
    memory: Rc<Memory>,
    next_avail: u16,
    seen_used: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl Queue {
    pub fn new(memory: &Rc<Memory>, index: u32, size: u16, event_idx: bool) -> Self {
        let entries = u64::from(size);
        Queue {
            index,
            size,
            desc: memory.ring(16 * entries),
            avail: memory.ring(6 + 2 * entries),
            used: memory.ring(6 + 8 * entries),
            kick: Event::new(),
            call: Event::new(),
            event_idx,
            used_log: None,
            memory: memory.clone(),
            next_avail: 0,
            seen_used: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    /// Sets both indexes as if `index` chains had gone through already. Before the vring is started.
    pub fn start_at(&mut self, index: u16) {
        self.next_avail = index;
        self.seen_used = index;
        self.memory.store_index(self.avail + 2, index);
        self.memory.store_index(self.used + 2, index);
        self.memory.store_index(self.avail_event(), index);
    }

    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    // ---- descriptors

    pub fn set_desc(&self, at: u16, desc: Desc) {
        self.memory.write(self.desc + 16 * u64::from(at), &desc.bytes());
    }

    /// Links `buffers` into a chain of the descriptor table and gives its head.
    pub fn chain(&mut self, buffers: &[Buf]) -> u16 {
        assert!(
            !buffers.is_empty() && buffers.len() <= self.free.len(),
            "descriptor table full"
        );
        let at = self.free.split_off(self.free.len() - buffers.len());
        for (i, buffer) in buffers.iter().enumerate() {
            let more = if i + 1 < buffers.len() { DESC_NEXT } else { 0 };
            let write = if buffer.write { DESC_WRITE } else { 0 };
            let next = at.get(i + 1).copied().unwrap_or(0);
            self.set_desc(
                at[i],
                Desc {
                    addr: buffer.addr,
                    len: buffer.len,
                    flags: more | write,
                    next,
                },
            );
        }
        let head = at[0];
        self.chains.insert(head, at);
        head
    }

    /// Puts `buffers` into an indirect table of its own and gives the head of the chain that points to it.
    pub fn indirect_chain(&mut self, buffers: &[Buf]) -> u16 {
        let table = self.memory.buffer(16 * buffers.len() as u64).next_multiple_of(16);
        for (i, buffer) in buffers.iter().enumerate() {
            let more = if i + 1 < buffers.len() { DESC_NEXT } else { 0 };
            let write = if buffer.write { DESC_WRITE } else { 0 };
            let desc = Desc {
                addr: buffer.addr,
                len: buffer.len,
                flags: more | write,
                next: i as u16 + 1,
            };
            self.memory.write(table + 16 * i as u64, &desc.bytes());
        }
        self.indirect(table, 16 * buffers.len() as u32)
    }

    /// A chain of one descriptor that points to a table, whatever is there.
    pub fn indirect(&mut self, table: u64, len: u32) -> u16 {
        let head = self.chain(&[readable(table, len as usize)]);
        self.set_desc(
            head,
            Desc {
                addr: table,
                len,
                flags: DESC_INDIRECT,
                next: 0,
            },
        );
        head
    }

    // ---- available ring

    /// Writes heads into the available ring and publishes them at once; the device is not kicked.
    pub fn offer(&mut self, heads: &[u16]) {
        for head in heads {
            let slot = u64::from(self.next_avail % self.size);
            self.memory.write(self.avail + 4 + 2 * slot, &head.to_le_bytes());
            self.next_avail = self.next_avail.wrapping_add(1);
        }
        self.memory.store_index(self.avail + 2, self.next_avail);
    }

    /// Publishes an index that the ring's contents do not bear out.
    pub fn forge_avail_index(&mut self, index: u16) {
        self.memory.store_index(self.avail + 2, index);
    }

    pub fn kick(&self) {
        self.kick.signal();
    }

    /// Kicks if the device asked to be, after `offered` chains were published (virtio 1.2 §2.7.13.4).
    pub fn kick_if_asked(&self, offered: u16) {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.memory.load_index(self.avail_event());
            self.next_avail.wrapping_sub(event).wrapping_sub(1) < offered
        } else {
            self.memory.load_index(self.used) & 1 == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Waits until the device has taken all that was offered, and waits for a kick itself (EVENT_IDX).
    pub fn wait_taken(&self) {
        let start = Instant::now();
        while self.memory.load_index(self.avail_event()) != self.next_avail {
            assert!(start.elapsed() < DEADLINE, "queue {}: not taken", self.index);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Forges what the device has said of kicks, as if it wanted none. While the vring is stopped.
    pub fn spoil_kick_request(&self) {
        match self.event_idx {
            true => self.memory.store_index(self.avail_event(), !self.next_avail),
            false => self.memory.store_index(self.used, 1),
        }
    }

    /// Waits until the device says that it wants a kick for the next chain.
    pub fn wait_kick_request(&self) {
        match self.event_idx {
            true => self.wait_taken(),
            false => {
                let start = Instant::now();
                while self.memory.load_index(self.used) != 0 {
                    assert!(
                        start.elapsed() < DEADLINE,
                        "queue {}: no kick is wanted",
                        self.index
                    );
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        }
    }

    fn avail_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }

    /// Where the driver says at which used index it wants to be called (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.memory
            .store_index(self.avail + 4 + 2 * u64::from(self.size), index);
    }

    /// Says whether the driver wants no call at all (virtio 1.2 §2.7.7, for a driver without EVENT_IDX).
    pub fn set_no_interrupt(&self, no_interrupt: bool) {
        self.memory.store_index(self.avail, no_interrupt.into());
    }

    // ---- used ring

    /// The device's index, without taking anything.
    pub fn used_index(&self) -> u16 {
        self.memory.load_index(self.used + 2)
    }

    /// The next chain that came back, if there is one.
    pub fn poll_used(&mut self) -> Option<Used> {
        let index = self.used_index();
        let waiting = index.wrapping_sub(self.seen_used);
        if waiting == 0 {
            return None;
        }
        assert!(
            waiting <= self.size,
            "used index went from {} to {index}",
            self.seen_used
        );
        let slot = self.used + 4 + 8 * u64::from(self.seen_used % self.size);
        let id = self.memory.read_u32(slot);
        assert!(
            id < u32::from(self.size),
            "the device returned head {id} of a queue of {}",
            self.size
        );
        let used = Used {
            head: id as u16,
            len: self.memory.read_u32(slot + 4),
        };
        self.seen_used = self.seen_used.wrapping_add(1);
        if let Some(descriptors) = self.chains.remove(&used.head) {
            self.free.extend(descriptors);
        }
        Some(used)
    }

    /// The next chain that comes back. The call descriptor must announce it.
    pub fn wait_used(&mut self) -> Used {
        let start = Instant::now();
        loop {
            if self.event_idx {
                self.set_used_event(self.seen_used);
                fence(Ordering::SeqCst);
            }
            if let Some(used) = self.poll_used() {
                return used;
            }
            assert!(start.elapsed() < DEADLINE, "queue {}: no completion", self.index);
            self.wait_call();
        }
    }

    /// `count` chains, in the order in which they come back.
    pub fn wait_used_many(&mut self, count: usize) -> Vec<Used> {
        (0..count).map(|_| self.wait_used()).collect()
    }

    /// Waits for the device's call, and fails when it does not come.
    pub fn wait_call(&self) {
        let mut fds = [PollFd::new(&self.call, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: DEADLINE.as_secs() as i64,
            tv_nsec: 0,
        };
        let ready = poll(&mut fds, Some(&timeout)).unwrap();
        assert!(
            ready > 0,
            "queue {}: the device did not call; used index {}",
            self.index,
            self.used_index()
        );
        self.call.take();
    }

    /// Whether the device called since the last wait.
    pub fn take_call(&self) -> bool {
        self.call.take()
    }

    /// Waits for completions by watching the used ring alone: for a vring without a call descriptor.
    pub fn watch_used(&mut self) -> Used {
        let start = Instant::now();
        loop {
            if let Some(used) = self.poll_used() {
                return used;
            }
            assert!(start.elapsed() < DEADLINE, "queue {}: no completion", self.index);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// An eventfd that does not block.
#[derive(Debug)]
pub struct Event(File);

impl Event {
    pub fn new() -> Self {
        Event(File::from(
            eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap(),
        ))
    }

    pub fn signal(&self) {
        (&self.0).write_all(&1u64.to_ne_bytes()).unwrap();
    }

    /// Whether it was signalled since it was last asked.
    pub fn take(&self) -> bool {
        (&self.0).read(&mut [0; 8]).is_ok()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
