//! A hostile front-end: messages of vhost-user with descriptors, and bytes that are no messages, to a session with all that belongs to
//! one. Meanwhile it writes to guest memory, kicks queues, takes memory away, and an operator locks, unlocks and resizes the disk.
//!
//! The input is a byte that says how the session begins, and then commands, each of which begins with a byte that names it
//! ([`FrontEnd::act`]). Whatever comes, the session ends when the front-end leaves, and leaves nothing behind: no descriptor, no mapping.

#![allow(unsafe_code)] // Descriptors by their numbers.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::super::disk::Disk;
use super::super::handover::Desk;
use super::super::rings::Urings;
use super::super::session::{self, Link, Tools};
use super::super::sigbus;
use super::Bytes;
use super::queue::{CAPACITY, DiskKind, Stored};
use crate::cipher::Sector;
use crate::map::SegmentTable;
use crate::mutex::lock;

/// Has a front-end do what `input` says. See the module's header.
///
/// # Panics
/// If the session does, does not end, or leaves something behind.
pub fn messages(input: &[u8]) {
    let _alone = lock(&sigbus::SESSION);
    HOST.with_borrow_mut(|host| host.get_or_insert_with(Host::new).play(&mut Bytes(input)));
}

/// Of one input. More would fill the socket with answers.
const MOST_COMMANDS: usize = 200;
const QUEUES: u16 = 2;
/// Guest memory, of which most is never touched.
const MEMORY: u64 = 1 << 30;
/// How long a session may take to end, and a descriptor to be closed by a thread.
const LIMIT: Duration = Duration::from_secs(30);
/// What the descriptors of a process without leaks may come to, beside those that were there before.
const SOME_DESCRIPTORS: usize = 400;

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// What all inputs have in common.
struct Host {
    disk: Arc<Disk>,
    table: Arc<SegmentTable>,
    _file: File,
    link: Link,
    urings: Urings,
    /// How many descriptors the process had.
    descriptors: usize,
}

impl Host {
    fn new() -> Self {
        let Stored {
            disk,
            table,
            file,
            urings: _,
            engine: _,
        } = Stored::new(DiskKind::default());
        let link = Link::new().unwrap();
        link.settle().unwrap();
        Self {
            disk,
            table,
            _file: file,
            link,
            urings: Urings::new(QUEUES).unwrap(),
            descriptors: descriptors().len(),
        }
    }

    /// A lock waits until nothing else has the table.
    fn unlock(&self) {
        let table = self.table.resized(self.table.sectors());
        self.disk.unlock(Arc::new(table));
    }

    fn play(&self, input: &mut Bytes<'_>) {
        let Some(begin) = input.byte() else { return };
        let disk = &self.disk;
        if begin & 1 == 0 {
            self.unlock();
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let front_end = FrontEnd::new(ours);
        thread::scope(|scope| {
            let session = thread::Builder::new().name("hostile session".into());
            let run = || {
                let desk = Desk::default();
                let tools = Tools {
                    disk,
                    num_queues: QUEUES,
                    link: &self.link,
                    urings: &self.urings,
                    desk: &desk,
                };
                let _ = session::run(&theirs, &tools, None);
                let _ = theirs.shutdown(Shutdown::Both);
            };
            let session = session.spawn_scoped(scope, run).unwrap();
            for _ in 0..MOST_COMMANDS {
                if front_end.act(input, self).is_none() {
                    break;
                }
                front_end.take_answers();
            }
            front_end.stream.shutdown(Shutdown::Write).unwrap();
            let start = Instant::now();
            while !session.is_finished() {
                front_end.take_answers();
                assert!(start.elapsed() < LIMIT, "the session does not end");
                thread::sleep(Duration::from_micros(50));
            }
            session.join().unwrap();
        });
        drop(theirs);
        disk.withdraw().wait();
        disk.shrink_for_next_input(CAPACITY / Sector::LEN);
        front_end.left_behind(self.descriptors);
    }
}

/// What can be behind a descriptor of a front-end.
struct FrontEnd {
    stream: UnixStream,
    /// The name of its memory files in the list of this process' mappings.
    name: String,
    memory: File,
    things: Vec<OwnedFd>,
}

/// The place among these of what kicks and calls are.
const KICK: usize = 3;
const CALL: usize = 5;

/// How many inputs there were.
static INPUT: AtomicUsize = AtomicUsize::new(0);

impl FrontEnd {
    fn new(stream: UnixStream) -> Self {
        stream.set_nonblocking(true).unwrap();
        let name = format!("front-end-{}", INPUT.fetch_add(1, Ordering::Relaxed));
        let memfd = |len: u64, seals: SealFlags| {
            let file = memfd_create(&*name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
            ftruncate(&file, len).unwrap();
            fcntl_add_seals(&file, seals).unwrap();
            file
        };
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let memory = memfd(MEMORY, SealFlags::empty());
        let read_only = File::open(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap();
        let kept = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let record = memfd_create(&*name, kept).unwrap();
        ftruncate(&record, super::super::inflight::len_for(QUEUES) as u64).unwrap();
        fcntl_add_seals(&record, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let (pipe, _) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let things = vec![
            memory.try_clone().unwrap(),
            memfd(0x2000, SealFlags::SHRINK),
            record,
            event(),
            event(),
            event(),
            event(),
            UnixStream::pair().unwrap().0.into(),
            memfd(0x1_0000, SealFlags::SHRINK),
            read_only.into(),
            File::open("/dev/null").unwrap().into(),
            pipe,
        ];
        Self {
            stream,
            name,
            memory: memory.into(),
            things,
        }
    }

    /// Does what the next command says; none at the end of the input.
    fn act(&self, input: &mut Bytes<'_>, host: &Host) -> Option<()> {
        match input.byte()? % 10 {
            // A message, with descriptors.
            0 | 1 => {
                let (request, flags) = (input.byte()?, input.byte()?);
                let fds = self.descriptors(input)?;
                let body = input.some()?;
                let fields = [request.into(), flags.into(), body.len() as u32];
                self.send(
                    &[fields.map(u32::to_ne_bytes).as_flattened(), body].concat(),
                    &fds,
                );
            }
            // Any bytes, with descriptors.
            2 => {
                let fds = self.descriptors(input)?;
                self.send(input.some()?, &fds);
            }
            // An answer is waited for, so that all before it is done.
            3 => self.wait(),
            // Guest memory is written to.
            4 => {
                let at = input.take(4)?.try_into().ok()?;
                let at = u64::from(u32::from_le_bytes(at)) % MEMORY;
                let _ = self.memory.write_at(input.some()?, at);
            }
            5 => {
                let which = usize::from(input.byte()?) % 2;
                let _ = rustix::io::write(&self.things[KICK + which], &1_u64.to_ne_bytes());
                thread::sleep(Duration::from_micros(100));
            }
            6 => host.disk.withdraw().wait(),
            7 => host.unlock(),
            8 => {
                let sectors = u64::from(input.byte()?) * 8;
                host.disk.grow(CAPACITY / Sector::LEN + sectors).wait();
            }
            // Guest memory is taken away.
            _ => {
                let pages = u64::from(input.byte()?);
                ftruncate(&self.memory, pages * 4096).unwrap();
            }
        }
        Some(())
    }

    /// Those that the input names: how many, and for each what it is.
    fn descriptors(&self, input: &mut Bytes<'_>) -> Option<Vec<BorrowedFd<'_>>> {
        let count = usize::from(input.byte()?) % 12;
        let kinds = input.take(count)?;
        let thing = |kind: &u8| self.things[usize::from(*kind) % self.things.len()].as_fd();
        Some(kinds.iter().map(thing).collect())
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(12))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        // The session may have ended.
        let _ = rustix::net::sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
    }

    fn wait(&self) {
        const GET_FEATURES: u32 = 1;
        self.send([GET_FEATURES, 1, 0].map(u32::to_ne_bytes).as_flattened(), &[]);
        let mut fds = [rustix::event::PollFd::new(
            &self.stream,
            rustix::event::PollFlags::IN,
        )];
        let limit = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        let _ = rustix::event::poll(&mut fds, Some(&limit));
    }

    /// Reads what the session has answered; descriptors with it are closed by the kernel.
    fn take_answers(&self) {
        let mut bytes = [0; 4096];
        while let Ok((1.., _)) = rustix::net::recv(&self.stream, &mut bytes[..], RecvFlags::DONTWAIT) {}
    }

    /// Checks that the session has left nothing of this front-end's.
    fn left_behind(self, before: usize) {
        let own = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|status| (status.st_dev, status.st_ino));
        // An eventfd has no inode of its own.
        let things = self
            .things
            .iter()
            .enumerate()
            .filter(|(place, _)| !(KICK..=CALL + 1).contains(place));
        let wanted: Vec<_> = things.map(|(_, thing)| own(thing).unwrap()).collect();
        let own: Vec<_> = self
            .things
            .iter()
            .map(AsRawFd::as_raw_fd)
            .chain([self.memory.as_raw_fd()])
            .collect();
        let null = fs::metadata("/dev/null").unwrap().ino();
        let start = Instant::now();
        loop {
            let open = descriptors();
            let left = open.iter().find(|fd| {
                let same = |(device, inode)| wanted.contains(&(device, inode)) && inode != null;
                !own.contains(fd) && identity(**fd).is_some_and(same)
            });
            assert!(open.len() < before + SOME_DESCRIPTORS, "descriptors stay open");
            let Some(left) = left else { break };
            let name = fs::read_link(format!("/proc/self/fd/{left}"));
            assert!(start.elapsed() < LIMIT, "a descriptor stays open: {name:?}");
            // Threads close some.
            thread::sleep(Duration::from_micros(200));
        }
        while is_mapped(&self.name) {
            assert!(start.elapsed() < LIMIT, "a memory region stays mapped");
            thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Whether this process has mapped a memory file of this name.
fn is_mapped(name: &str) -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.contains(&format!("/memfd:{name} "))
}

/// What is behind a descriptor, which may be closed by now.
fn identity(fd: i32) -> Option<(u64, u64)> {
    // SAFETY: it is used for one call, which fails if it is closed.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::fs::fstat(fd)
        .ok()
        .map(|status| (status.st_dev, status.st_ino))
}

/// The descriptors of this process.
fn descriptors() -> Vec<i32> {
    let dir = fs::read_dir("/proc/self/fd").unwrap();
    let number = |entry: std::io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    dir.filter_map(number).collect()
}
