//! The front-end's end of a vhost-user socket, message by message (QEMU's `docs/interop/vhost-user.rst`).
//!
//! A message is `request: u32, flags: u32, size: u32` and a payload of `size` bytes, in the host's byte order, with
//! descriptors attached to its first byte. [`Frontend::send`] sends any of them, right or wrong.

use super::DEADLINE;
use super::memory::{Log, Memory, Region};
use super::queue::{Event, Queue};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const RESET_OWNER: u32 = 4;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_LOG_BASE: u32 = 6;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const RESET_DEVICE: u32 = 34;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;
pub const SET_STATUS: u32 = 39;
pub const GET_STATUS: u32 = 40;

/// Protocol version 1, in the two lowest bits of a message's flags.
pub const VERSION: u32 = 1;
/// Set in a reply.
pub const REPLY: u32 = 1 << 2;
/// Asks for an acknowledgement (REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;

/// The front-end logs what is written to guest memory; no feature of a driver's.
pub const F_LOG_ALL: u64 = 1 << 26;
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

pub const PROTOCOL_MQ: u64 = 1 << 0;
pub const PROTOCOL_LOG_SHMFD: u64 = 1 << 1;
pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
pub const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
pub const PROTOCOL_CONFIG: u64 = 1 << 9;
pub const PROTOCOL_RESET_DEVICE: u64 = 1 << 13;
pub const PROTOCOL_INFLIGHT_SHMFD: u64 = 1 << 12;
pub const PROTOCOL_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

/// In the payload of SET_VRING_KICK, _CALL and _ERR: no descriptor is attached.
pub const NOFD: u64 = 1 << 8;

#[derive(Debug)]
pub struct Message {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub fn u64(&self) -> u64 {
        u64::from_ne_bytes(self.payload.as_slice().try_into().expect("a payload of 8 bytes"))
    }
}

#[derive(Debug)]
pub struct Frontend {
    stream: UnixStream,
    /// Protocol features that were agreed on; without REPLY_ACK nothing is acknowledged.
    protocol: u64,
}

impl Frontend {
    /// Connects, waiting for the socket to appear and for the server to listen on it.
    pub fn connect(path: &Path) -> Self {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                    assert!(start.elapsed() < DEADLINE, "{}: {e}", path.display());
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => panic!("{}: {e}", path.display()),
            }
        };
        Frontend::over(stream)
    }

    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Frontend { stream, protocol: 0 }
    }

    // ---- any bytes, any descriptors

    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        self.try_send_bytes(bytes, fds)
            .expect("the server closed the connection");
    }

    /// Fails when the server has closed the connection already, as it may while it is sent nonsense.
    pub fn try_send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = rustix::net::sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        assert_eq!(sent, bytes.len());
        Ok(())
    }

    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_bytes(&message(request, VERSION | flags, payload), fds);
    }

    /// The next message, or nothing when the server closed the connection.
    pub fn receive(&self) -> Option<Message> {
        let mut header = [0; 12];
        let mut fds = Vec::new();
        if !self.fill(&mut header, &mut fds) {
            return None;
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        assert!(
            self.fill(&mut payload, &mut fds),
            "the server hung up in the middle of a message"
        );
        Some(Message {
            request: word(0),
            flags: word(4),
            payload,
            fds,
        })
    }

    /// Whether there is something to receive, or the connection ended, within a time.
    pub fn hears_something(&self, within: Duration) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: within.as_nanos() as i64,
        };
        poll(&mut fds, Some(&timeout)).unwrap() > 0
    }

    fn fill(&self, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> bool {
        let mut done = 0;
        while done < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut iov = [IoSliceMut::new(&mut bytes[done..])];
            match rustix::net::recvmsg(&self.stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) if received.bytes > 0 => done += received.bytes,
                Ok(_) | Err(rustix::io::Errno::CONNRESET) => return false,
                Err(rustix::io::Errno::AGAIN) => panic!("the server did not answer"),
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => panic!("receiving from the server: {e}"),
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
        }
        true
    }

    /// Waits for the server to close the connection; what it says before that is thrown away.
    pub fn wait_closed(&self) {
        while self.receive().is_some() {}
    }

    /// Ends the sending half: the server sees the end of the stream.
    pub fn shut_down(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    // ---- well-formed messages

    /// A request that has a reply of its own.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Message {
        self.send(request, 0, payload, &[]);
        let reply = self
            .receive()
            .unwrap_or_else(|| panic!("request {request}: the server hung up"));
        assert_eq!(
            (reply.request, reply.flags),
            (request, VERSION | REPLY),
            "reply to request {request}"
        );
        reply
    }

    /// A request that is acknowledged: 0 for success. The server may hang up instead.
    pub fn try_tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Option<u64> {
        assert!(
            self.protocol & PROTOCOL_REPLY_ACK != 0,
            "no acknowledgement without REPLY_ACK"
        );
        self.send(request, NEED_REPLY, payload, fds);
        let reply = self.receive()?;
        assert_eq!(
            (reply.request, reply.flags & 7),
            (request, VERSION | REPLY),
            "reply to request {request}"
        );
        Some(reply.u64())
    }

    /// Receives what was asked for by [`Frontend::send`] with NEED_REPLY: 0 for success.
    pub fn acknowledgement(&self) -> u64 {
        self.receive().expect("an acknowledgement").u64()
    }

    /// A request that must succeed.
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        if self.protocol & PROTOCOL_REPLY_ACK == 0 {
            return self.send(request, 0, payload, fds);
        }
        let ack = self.try_tell(request, payload, fds);
        assert_eq!(
            ack,
            Some(0),
            "request {request} refused (None: the server hung up)"
        );
    }

    /// Takes ownership and agrees on features: all that both sides know, of `want`.
    pub fn negotiate(&mut self, want: u64, want_protocol: u64) -> u64 {
        let features = self.negotiate_protocol(want, want_protocol);
        self.tell(SET_FEATURES, &features.to_ne_bytes(), &[]);
        features
    }

    /// As [`Frontend::negotiate`], up to but not including SET_FEATURES. Nothing is logged.
    pub fn negotiate_protocol(&mut self, want: u64, want_protocol: u64) -> u64 {
        self.send(SET_OWNER, 0, &[], &[]);
        let features = self.features() & want & !F_LOG_ALL;
        if features & F_PROTOCOL_FEATURES != 0 {
            let protocol = self.ask(GET_PROTOCOL_FEATURES, &[]).u64() & want_protocol;
            self.send(SET_PROTOCOL_FEATURES, 0, &protocol.to_ne_bytes(), &[]);
            self.protocol = protocol;
        }
        features
    }

    pub fn features(&self) -> u64 {
        self.ask(GET_FEATURES, &[]).u64()
    }

    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    pub fn set_memory(&self, memory: &Memory) {
        self.set_regions(&memory.regions());
    }

    pub fn set_regions(&self, regions: &[Region]) {
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|region| region.file.as_fd()).collect();
        self.tell(SET_MEM_TABLE, &mem_table(regions), &fds);
    }

    pub fn add_region(&self, region: &Region) {
        self.tell(ADD_MEM_REG, &single_region(region), &[region.file.as_fd()]);
    }

    pub fn remove_region(&self, region: &Region) {
        self.tell(REM_MEM_REG, &single_region(region), &[]);
    }

    /// Passes a dirty log, and waits for the answer.
    pub fn set_log(&self, log: &Log) {
        self.send(SET_LOG_BASE, 0, &log_base(log.len, 0), &[log.file.as_fd()]);
        let reply = self.receive().expect("an answer to SET_LOG_BASE");
        assert_eq!((reply.request, reply.flags), (SET_LOG_BASE, VERSION | REPLY));
        assert_eq!(reply.payload, log_base(log.len, 0));
    }

    /// Everything that starts a vring but does not enable it. The kick descriptor comes last, and starts it.
    pub fn start_vring(&self, queue: &Queue, memory: &Memory, base: u16) {
        self.set_vring(queue, memory, base);
        self.set_vring_fd(SET_VRING_CALL, queue.index, Some(&queue.call));
        self.set_vring_fd(SET_VRING_KICK, queue.index, Some(&queue.kick));
    }

    pub fn set_vring(&self, queue: &Queue, memory: &Memory, base: u16) {
        self.tell(
            SET_VRING_NUM,
            &vring_state(queue.index, u32::from(queue.size)),
            &[],
        );
        self.tell(SET_VRING_BASE, &vring_state(queue.index, u32::from(base)), &[]);
        self.tell(SET_VRING_ADDR, &vring_addr(queue, memory), &[]);
    }

    /// SET_VRING_KICK, _CALL or _ERR; with no descriptor, says so.
    pub fn set_vring_fd(&self, request: u32, index: u32, event: Option<&Event>) {
        let payload = u64::from(index) | if event.is_none() { NOFD } else { 0 };
        let fds: Vec<BorrowedFd<'_>> = event.iter().map(|event| event.as_fd()).collect();
        self.tell(request, &payload.to_ne_bytes(), &fds);
    }

    pub fn enable(&self, index: u32, on: bool) {
        self.tell(SET_VRING_ENABLE, &vring_state(index, u32::from(on)), &[]);
    }

    /// Stops a vring; the answer comes when nothing of it is in flight.
    pub fn stop_vring(&self, index: u32) -> u16 {
        let reply = self.ask(GET_VRING_BASE, &vring_state(index, 0));
        assert_eq!(reply.payload[..4], index.to_ne_bytes());
        u32::from_ne_bytes(reply.payload[4..8].try_into().unwrap())
            .try_into()
            .expect("a base of 16 bits")
    }

    /// Passes a channel for what the back-end has to say, and gives its other end.
    pub fn back_end_channel(&self) -> Channel {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.tell(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        Channel(ours)
    }

    /// `size` bytes of the configuration space, or nothing if the server answers with an empty payload.
    pub fn config(&self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let reply = self.ask(GET_CONFIG, &config(offset, 0, &vec![0; size as usize]));
        if reply.payload.is_empty() {
            return None;
        }
        assert_eq!(reply.payload[..4], offset.to_ne_bytes());
        assert_eq!(reply.payload[4..8], size.to_ne_bytes());
        assert_eq!(reply.payload.len(), 12 + size as usize);
        Some(reply.payload[12..].to_vec())
    }
}

/// What the back-end says on its channel.
#[derive(Debug)]
pub struct Channel(UnixStream);

/// The configuration has changed.
const BACKEND_CONFIG_CHANGE: u32 = 2;

impl Channel {
    /// Waits for the next message, which says that the configuration has changed and wants no answer.
    pub fn config_changed(&self) {
        let mut heard = [0; 12];
        (&self.0)
            .read_exact(&mut heard)
            .expect("a message of the back-end");
        assert_eq!(heard[..], message(BACKEND_CONFIG_CHANGE, VERSION, &[]));
    }

    /// Whether nothing has come.
    pub fn is_silent(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() == 0
    }
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Drop for Frontend {
    /// Leaves at once. Closing alone is not enough: while another thread starts a process, that has a copy of every
    /// descriptor for a moment.
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

// ---- payloads

pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    [
        &request.to_ne_bytes()[..],
        &flags.to_ne_bytes(),
        &(payload.len() as u32).to_ne_bytes(),
        payload,
    ]
    .concat()
}

pub fn vring_state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

pub fn vring_addr(queue: &Queue, memory: &Memory) -> Vec<u8> {
    let mut payload = raw_vring_addr(
        queue.index,
        memory.user(queue.desc),
        memory.user(queue.used),
        memory.user(queue.avail),
    );
    if let Some(log) = queue.used_log {
        payload[4..8].copy_from_slice(&VRING_F_LOG.to_ne_bytes());
        payload[32..].copy_from_slice(&log.to_ne_bytes());
    }
    payload
}

/// Writes to the used ring are logged at the address in the message (VHOST_VRING_F_LOG).
const VRING_F_LOG: u32 = 1;

pub fn raw_vring_addr(index: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let flags = 0u32;
    let log = 0u64;
    let mut payload = [index.to_ne_bytes(), flags.to_ne_bytes()].concat();
    for address in [desc, used, avail, log] {
        payload.extend(address.to_ne_bytes());
    }
    payload
}

/// Memory that tracks requests in flight, as QEMU describes it: in 24 bytes, of which the last 4 mean nothing.
pub fn inflight_description(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut payload = [size.to_ne_bytes(), offset.to_ne_bytes()].concat();
    payload.extend([queues.to_ne_bytes(), queue_size.to_ne_bytes(), [0; 2], [0; 2]].as_flattened());
    payload
}

pub fn log_base(size: u64, offset: u64) -> Vec<u8> {
    [size.to_ne_bytes(), offset.to_ne_bytes()].concat()
}

pub fn mem_table(regions: &[Region]) -> Vec<u8> {
    let mut payload = [(regions.len() as u32).to_ne_bytes(), [0; 4]].concat();
    for region in regions {
        payload.extend(region_bytes(region));
    }
    payload
}

pub fn single_region(region: &Region) -> Vec<u8> {
    [&[0; 8][..], &region_bytes(region)].concat()
}

fn region_bytes(region: &Region) -> Vec<u8> {
    let offset = 0u64;
    [region.guest, region.len, region.user, offset]
        .iter()
        .flat_map(|field| field.to_ne_bytes())
        .collect()
}

pub fn config(offset: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let size = bytes.len() as u32;
    [
        &offset.to_ne_bytes()[..],
        &size.to_ne_bytes(),
        &flags.to_ne_bytes(),
        bytes,
    ]
    .concat()
}
