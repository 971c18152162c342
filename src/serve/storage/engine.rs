//! One worker's io_uring: transfers between the payload's file and the worker's buffers. It is also the only place where
//! the worker waits, both for completions and for the descriptors that it watches.
//!
//! An operation owns its buffer from the moment it is accepted until [`Engine::next_event`] returns it; no other code
//! can free the pages, and dropping the engine waits for every operation before it unmaps them. A
//! transfer either completes or fails: the engine continues short transfers, so that no caller can take one for
//! success.
//!
//! A transfer that fails can also be held ([`super::policy`]): it keeps its buffer, and continues where it was when the engine tries it again.
//! Where storage was full, one of those that are held is tried from time to time, and the others follow when it has succeeded.

#![allow(unsafe_code)] // io_uring takes addresses, and what it does with them the compiler cannot follow.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::backing::DataFile;
use super::capabilities::{BLKDISCARD, Kind};
use super::policy::is_full;
use super::pool::{Buffer, PAGE, Pool};
use super::ring_pool::{RingPool, restrict};

/// What came of something that was asked of an [`Engine`].
#[derive(Debug)]
pub enum Event<C> {
    /// An operation ended.
    Done(Done<C>),
    /// A watched descriptor became readable; the number it was watched under.
    Ready(u32),
    /// A descriptor is watched no more, though nobody ended that.
    Lost(u32, io::Error),
}

/// An operation that ended, with what it owned.
#[derive(Debug)]
pub struct Done<C> {
    /// What the caller passed along.
    pub context: C,
    /// The buffer, to be released; none for operations without data.
    pub buffer: Option<Buffer>,
    /// Success means that every byte was transferred.
    pub result: io::Result<()>,
}

/// See the module's header. `C` is what the caller wants back with each operation's end.
pub struct Engine<C> {
    /// Until this is dropped.
    ring: ManuallyDrop<IoUring>,
    /// Where it goes then.
    rings: RingPool,
    file: Arc<DataFile>,
    pool: Pool,
    /// Whether the pool is a fixed buffer of the ring.
    registered: bool,
    flights: Vec<Option<Flight<C>>>,
    vacant: Vec<u32>,
    /// Operations in flight that hold no buffer.
    without_data: u32,
    watches: [Option<types::Fd>; WATCHES as usize],
    /// Whether the kernel watches them: from the submission to the last that it tells of a watch.
    armed: [bool; WATCHES as usize],
    /// What the ring had no place for; it comes before all else.
    waiting: VecDeque<squeue::Entry>,
    /// Entries in the ring whose last completion was not taken yet: no more than `AT_ONCE`.
    in_ring: u32,
    /// What ended without passing through the ring.
    ended: Vec<Done<C>>,
    /// The operations that are held.
    held: Vec<Held>,
    /// The one of them that is being tried.
    probe: Option<u32>,
    /// Whether nobody hears any more how operations end: they are carried out again later.
    is_unheard: bool,
}

/// An operation that storage has failed, and that waits to be tried again.
#[derive(Debug)]
struct Held {
    place: u32,
    error: io::Error,
}

/// The place of the payload's file among the ring's. The others are there for their locks ([`super::claim`]).
const FILE: u32 = 0;

/// How many descriptors an engine watches: a kick and a stop.
const WATCHES: u32 = 2;

/// The most operations without data in flight, beyond which they are refused: flushes and discards.
const WITHOUT_DATA: u32 = 64;

/// `user_data` of a watch is this plus its number; of an operation, its place in `flights`.
const WATCH: u64 = 1 << 32;
/// `user_data` of the cancellation of a watch.
const CANCEL: u64 = 1 << 33;

/// The number that `user_data` holds beside what it is of.
fn number_in(user_data: u64) -> u32 {
    let [n0, n1, n2, n3, ..] = user_data.to_le_bytes();
    u32::from_le_bytes([n0, n1, n2, n3])
}

#[derive(Debug)]
struct Flight<C> {
    operation: Operation,
    buffer: Option<Buffer>,
    /// Bytes transferred so far.
    done: u32,
    context: C,
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Read { offset: u64 },
    Write { offset: u64, durable: bool },
    Sync,
    Discard { offset: u64, len: u64 },
}

/// Before what the kernel had no memory for is tried again.
const SHORT_OF_MEMORY: Duration = Duration::from_millis(10);

/// The sizes of a ring. Most are never used, so they are small: 12 KiB each. What does not fit into the submission queue waits
/// in the engine.
const SUBMISSIONS: u32 = 64;
const COMPLETIONS: u32 = 256;

/// The most entries in the ring, so that the completion queue has a place for the end of each: the kernel would have to allocate
/// memory for those without a place. The other places are for the signals of the watches. A watch ends if even those are full; it is
/// then renewed.
const AT_ONCE: u32 = COMPLETIONS / 4 * 3;

/// What an engine asks of a ring, and what of the kernel for it (io_uring_register(2)).
const OPERATIONS: [u8; 9] = [
    opcode::Nop::CODE,
    opcode::Read::CODE,
    opcode::ReadFixed::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];
const REGISTER_BUFFERS: u8 = 0;
const UNREGISTER_BUFFERS: u8 = 1;
const REGISTER_FILES: u8 = 2;
const UNREGISTER_FILES: u8 = 3;

fn ring() -> io::Result<IoUring> {
    let ring = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_cqsize(COMPLETIONS)
        .build(SUBMISSIONS)?;
    let registrations = [
        REGISTER_BUFFERS,
        UNREGISTER_BUFFERS,
        REGISTER_FILES,
        UNREGISTER_FILES,
    ];
    restrict(ring, &OPERATIONS, &registrations)
}

impl<C> Engine<C> {
    /// The rings of `count` engines.
    ///
    /// # Errors
    /// Those of [`RingPool::new`].
    pub fn rings(count: u16) -> io::Result<RingPool> {
        RingPool::new(count, ring)
    }

    /// Takes a ring for `file`, with a pool of `pages` pages.
    ///
    /// # Errors
    /// If there is none, or descriptors or memory are exhausted.
    pub fn new(file: Arc<DataFile>, pages: u32, rings: &RingPool) -> io::Result<Self> {
        let pool = Pool::new(pages)?;
        // Every buffer holds a page at least, so an operation with a buffer always finds a vacant place.
        let places = pages + WITHOUT_DATA;
        let (reopened, fence) = (file.reopen()?, file.fence());
        let ring = rings.take()?;
        // The ring holds them from then on, until its last operation has ended, also after the end of this process.
        let files: Vec<_> = [reopened.as_raw_fd()]
            .into_iter()
            .chain(fence.descriptors())
            .collect();
        if let Err(error) = ring.submitter().register_files(&files) {
            rings.give(ring);
            return Err(error);
        }
        // SAFETY: the region stays mapped until the ring has let go of it: `Drop` takes care of the order.
        let registered = unsafe { ring.submitter().register_buffers(&[pool.region()]) };
        if let Err(error) = &registered {
            // Pinned memory counts against RLIMIT_MEMLOCK; without it each transfer pins its own pages.
            tracing::warn!(
                %error,
                bytes = pages as usize * PAGE,
                "buffers cannot be registered with io_uring, which costs speed; raise the locked-memory limit"
            );
        }
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            rings: rings.clone(),
            file,
            pool,
            registered: registered.is_ok(),
            flights: (0..places).map(|_| None).collect(),
            vacant: (0..places).rev().collect(),
            without_data: 0,
            watches: [None; WATCHES as usize],
            armed: [false; WATCHES as usize],
            waiting: VecDeque::new(),
            in_ring: 0,
            ended: Vec::new(),
            held: Vec::new(),
            probe: None,
            is_unheard: false,
        })
    }

    /// Takes a buffer of `len` bytes, or none while the pool is exhausted: completions will bring some back.
    pub fn buffer(&mut self, len: u32) -> Option<Buffer> {
        self.pool.take(len)
    }

    /// The bytes of a buffer.
    pub fn bytes(&self, buffer: &Buffer) -> &[u8] {
        self.pool.bytes(buffer)
    }

    /// The bytes of a buffer, to be filled.
    pub fn bytes_mut(&mut self, buffer: &mut Buffer) -> &mut [u8] {
        self.pool.bytes_mut(buffer)
    }

    /// Gives a buffer back to the pool.
    pub fn release(&mut self, buffer: Buffer) {
        self.pool.give(buffer);
    }

    /// Fills `buffer` from `offset` bytes into the file.
    #[inline]
    pub fn read(&mut self, buffer: Buffer, offset: u64, context: C) {
        self.start(Flight {
            operation: Operation::Read { offset },
            buffer: Some(buffer),
            done: 0,
            context,
        });
    }

    /// Writes `buffer` at `offset` bytes into the file; `durable` means on stable storage before it ends.
    #[inline]
    pub fn write(&mut self, buffer: Buffer, offset: u64, durable: bool, context: C) {
        if durable && let Some(error) = self.file.loss() {
            let (buffer, result) = (Some(buffer), Err(error));
            return self.ended.push(Done {
                context,
                buffer,
                result,
            });
        }
        self.start(Flight {
            operation: Operation::Write { offset, durable },
            buffer: Some(buffer),
            done: 0,
            context,
        });
    }

    /// Whether a flush or a discard would be accepted now; completions make room.
    pub fn has_room_without_data(&self) -> bool {
        // A device's discard has blocked this queue already: one a round.
        self.without_data < WITHOUT_DATA && self.ended.is_empty()
    }

    /// Puts on stable storage all that was written by operations that ended before this one began.
    ///
    /// Call it only while [`Engine::has_room_without_data`].
    pub fn sync(&mut self, context: C) {
        if let Some(error) = self.file.loss() {
            let (buffer, result) = (None, Err(error));
            return self.ended.push(Done {
                context,
                buffer,
                result,
            });
        }
        self.start(Flight {
            operation: Operation::Sync,
            buffer: None,
            done: 0,
            context,
        });
    }

    /// Tells the storage that a range of bytes is not needed any more; what it reads as from then on is open.
    ///
    /// Call it only while [`Engine::has_room_without_data`].
    pub fn discard(&mut self, offset: u64, len: u64, context: C) {
        match self.file.kind() {
            Kind::File => {
                let operation = Operation::Discard { offset, len };
                self.start(Flight {
                    operation,
                    buffer: None,
                    done: 0,
                    context,
                });
            }
            Kind::BlockDevice => {
                // io_uring has no discard before Linux 6.12, and fallocate means "write zeroes" on a device, which
                // thin volumes refuse. The ioctl blocks this queue while the device works on it. It takes whole
                // blocks; a discard is a hint, and less of it is still one.
                let result = match self.file.discardable(offset, len) {
                    Some((start, end)) => block_device_discard(&self.file, start, end - start),
                    None => Ok(()),
                };
                self.ended.push(Done {
                    context,
                    buffer: None,
                    result,
                });
            }
        }
    }

    /// Has [`Event::Ready`] come whenever `fd` becomes readable, until [`Engine::unwatch`]. The caller keeps `fd` open
    /// until then.
    pub fn watch(&mut self, number: u32, fd: BorrowedFd<'_>) {
        self.watches[number as usize] = Some(types::Fd(fd.as_raw_fd()));
        // One that could not be ended goes on.
        if !self.armed[number as usize] {
            self.arm(number);
        }
    }

    /// Ends all watches, and waits until the kernel has let go of their descriptors and told of their ends: what it told
    /// later would be taken for the end of the next watch. Call it only while nothing is in flight.
    pub fn unwatch(&mut self) -> io::Result<()> {
        self.watches = [None; WATCHES as usize];
        for number in 0..WATCHES {
            let mut asked = false;
            while self.armed[number as usize] {
                if !asked {
                    let remove = opcode::PollRemove::new(WATCH + u64::from(number));
                    self.push(remove.build().user_data(CANCEL));
                    asked = true;
                }
                self.refill();
                enter(|| self.ring.submit_and_wait(1))?;
                for entry in self.ring.completion() {
                    self.in_ring -= u32::from(!cqueue::more(entry.flags()));
                    match entry.user_data() {
                        // A poll that is just being told of an event stays, and has to be removed again.
                        CANCEL => asked = entry.result() != -libc::EALREADY,
                        id => self.armed[number_in(id) as usize] = cqueue::more(entry.flags()),
                    }
                }
            }
        }
        Ok(())
    }

    /// Watches nothing any more, and waits for nothing: for an engine that is only dropped from then on.
    pub fn forget_watches(&mut self) {
        self.watches = [None; WATCHES as usize];
    }

    /// The number of operations that are held, which are in flight as well. One that is being tried counts.
    pub fn held(&self) -> usize {
        self.held.len() + usize::from(self.probe.is_some())
    }

    /// The number of operations that storage works on.
    pub fn under_way(&self) -> usize {
        self.in_flight() - self.held.len()
    }

    /// Why the last one is held, if any is.
    pub fn held_by(&self) -> Option<&io::Error> {
        self.held.last().map(|held| &held.error)
    }

    /// Whether any is held because storage was full, and none is being tried.
    pub fn wants_probe(&self) -> bool {
        self.probe.is_none() && self.held.iter().any(|held| is_full(&held.error))
    }

    /// Tries one of those that are held because storage was full.
    pub fn probe(&mut self) {
        let next = self.held.iter().position(|held| is_full(&held.error));
        if let Some(next) = next.filter(|_| self.probe.is_none()) {
            let Held { place, .. } = self.held.remove(next);
            self.probe = Some(place);
            self.launch(place);
        }
    }

    /// Gives up all that are held, which are in flight no more.
    pub fn give_up_held(&mut self) {
        for Held { place, .. } in std::mem::take(&mut self.held) {
            if let Some(buffer) = self.vacate(place).and_then(|flight| flight.buffer) {
                self.pool.give(buffer);
            }
        }
    }

    /// The number of operations that have not ended.
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.vacant.len() + self.ended.len()
    }

    /// Hands all that was asked for to the kernel, and lets it report what has ended, without waiting.
    pub fn submit(&mut self) -> io::Result<()> {
        self.refill();
        let submission = self.ring.submission();
        if submission.is_empty() && !submission.taskrun() && !submission.cq_overflow() {
            return Ok(());
        }
        drop(submission);
        enter(|| self.ring.submit())
    }

    /// Hands all that was asked for to the kernel, and sleeps until there is an event.
    pub fn wait(&mut self) -> io::Result<()> {
        let wanted = self.wanted();
        enter(|| self.ring.submit_and_wait(wanted))
    }

    /// The same, but sleeps no longer than `time`.
    pub fn wait_for(&mut self, time: Duration) -> io::Result<()> {
        let wanted = self.wanted();
        let time = types::Timespec::from(time);
        let arguments = types::SubmitArgs::new().timespec(&time);
        match enter(|| self.ring.submitter().submit_with_args(wanted, &arguments)) {
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            result => result,
        }
    }

    /// How many completions to wait for, once all that fits is in the ring.
    fn wanted(&mut self) -> usize {
        self.refill();
        usize::from(self.ended.is_empty() && !self.has_more_to_submit())
    }

    /// Whether something waits that [`Engine::submit`] makes room for. Otherwise only completions make room.
    fn has_more_to_submit(&self) -> bool {
        !self.waiting.is_empty() && self.in_ring < AT_ONCE
    }

    /// Whether there is an event, or will be one after [`Engine::submit`]. It costs no system call.
    pub fn has_event(&mut self) -> bool {
        if !self.ended.is_empty() || self.has_more_to_submit() || !self.ring.completion().is_empty() {
            return true;
        }
        // What goes on after a short transfer is not submitted yet.
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow() || !submission.is_empty()
    }

    /// The next event that has happened, or none.
    pub fn next_event(&mut self) -> Option<Event<C>> {
        if let Some(done) = self.ended.pop() {
            return Some(Event::Done(done));
        }
        loop {
            let entry = self.ring.completion().next()?;
            self.in_ring -= u32::from(!cqueue::more(entry.flags()));
            let id = entry.user_data();
            if id >= CANCEL {
                continue;
            }
            if id >= WATCH {
                let number = number_in(id);
                self.armed[number as usize] = cqueue::more(entry.flags());
                if entry.result() == -libc::ECANCELED && self.watches[number as usize].is_some() {
                    // Linux 5.19 to 6.1 cancel a multishot poll when the completion queue is full.
                    self.arm(number);
                    continue;
                }
                if entry.result() < 0 {
                    // Cancelled, or never watched.
                    if self.watches[number as usize].take().is_some() {
                        return Some(Event::Lost(number, io::Error::from_raw_os_error(-entry.result())));
                    }
                    continue;
                }
                // A multishot poll ends when the completion queue overflows.
                if !self.armed[number as usize] {
                    self.arm(number);
                }
                return Some(Event::Ready(number));
            }
            if let Some(done) = self.land(number_in(id), entry.result()) {
                return Some(Event::Done(done));
            }
        }
    }

    fn arm(&mut self, number: u32) {
        if let Some(fd) = self.watches[number as usize] {
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32)
                .multi(true)
                .build()
                .user_data(WATCH + u64::from(number));
            self.push(entry);
            self.armed[number as usize] = true;
        }
    }

    #[inline]
    fn start(&mut self, flight: Flight<C>) {
        self.without_data += u32::from(flight.buffer.is_none());
        let place = self
            .vacant
            .pop()
            .expect("there is a place for each page and each operation without data");
        self.flights[place as usize] = Some(flight);
        self.launch(place);
    }

    /// Submits what is left to do of the operation at `place`.
    fn launch(&mut self, place: u32) {
        let Some(flight) = &self.flights[place as usize] else {
            return;
        };
        let fd = types::Fixed(FILE);
        let (address, len) = match &flight.buffer {
            // SAFETY: `done` is less than the buffer's length, so the address lies within it.
            Some(buffer) => unsafe {
                (
                    self.pool.address(buffer).add(flight.done as usize),
                    buffer.len_u32() - flight.done,
                )
            },
            None => (std::ptr::null_mut(), 0),
        };
        let at = u64::from(flight.done);
        let entry = match flight.operation {
            _ if self.file.is_null() => opcode::Nop::new().build(),
            Operation::Read { offset } if self.registered => opcode::ReadFixed::new(fd, address, len, 0)
                .offset(offset + at)
                .build(),
            Operation::Read { offset } => opcode::Read::new(fd, address, len).offset(offset + at).build(),
            Operation::Write { offset, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                if self.registered {
                    opcode::WriteFixed::new(fd, address, len, 0)
                        .offset(offset + at)
                        .rw_flags(flags)
                        .build()
                } else {
                    opcode::Write::new(fd, address, len)
                        .offset(offset + at)
                        .rw_flags(flags)
                        .build()
                }
            }
            Operation::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Discard { offset, len } => opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
        };
        self.push(entry.user_data(u64::from(place)));
    }

    fn push(&mut self, entry: squeue::Entry) {
        if !(self.waiting.is_empty() && self.try_push(&entry)) {
            self.waiting.push_back(entry);
        }
    }

    /// Gives the ring what has waited for room in it.
    fn refill(&mut self) {
        while let Some(entry) = self.waiting.pop_front() {
            if !self.try_push(&entry) {
                return self.waiting.push_front(entry);
            }
        }
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        if self.in_ring >= AT_ONCE {
            return false;
        }
        // SAFETY: what the entry points to is owned by `flights` until its completion, or is a watched descriptor;
        // `Drop` waits for both.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.in_ring += u32::from(pushed);
        pushed
    }

    /// Takes a completion into account: the end of the operation, or none if it goes on.
    fn land(&mut self, place: u32, result: i32) -> Option<Done<C>> {
        let flight = self.flights[place as usize].as_mut()?;
        let wanted = flight.buffer.as_ref().map_or(0, Buffer::len_u32);
        let result = match result {
            0 if self.file.is_null() => Ok(()),
            error if error == -libc::EINTR || error == -libc::EAGAIN => {
                self.launch(place);
                return None;
            }
            error if error < 0 => {
                match flight.operation {
                    // Repeated, it would succeed, since the kernel tells of a failure once.
                    Operation::Sync if self.is_unheard => self.file.record_loss(),
                    Operation::Sync => self.file.flush_failed(),
                    Operation::Write { durable: true, .. } => self.file.durable_write_failed(),
                    _ => {}
                }
                Err(io::Error::from_raw_os_error(-error))
            }
            _ if flight.buffer.is_none() => Ok(()),
            0 => Err(match flight.operation {
                Operation::Write { .. } => io::ErrorKind::WriteZero.into(),
                _ => io::ErrorKind::UnexpectedEof.into(),
            }),
            transferred => {
                flight.done += transferred.unsigned_abs();
                if flight.done < wanted {
                    self.launch(place);
                    return None;
                }
                Ok(())
            }
        };
        if self.probe.is_some() || result.is_err() {
            return self.judge(place, result);
        }
        self.finish(place, result)
    }

    /// The end of the operation at `place`.
    fn finish(&mut self, place: u32, result: io::Result<()>) -> Option<Done<C>> {
        let flight = self.vacate(place)?;
        Some(Done {
            context: flight.context,
            buffer: flight.buffer,
            result,
        })
    }
}

impl<C> Engine<C> {
    /// The end of the operation at `place`, unless it is held; which others go on now.
    #[cold]
    fn judge(&mut self, place: u32, result: io::Result<()>) -> Option<Done<C>> {
        let is_probe = self.probe.take_if(|probe| *probe == place).is_some();
        match result {
            Err(error) if self.holds(place, &error) => {
                self.held.push(Held { place, error });
                return None;
            }
            Ok(()) if is_probe => self.try_those_that_follow(),
            _ => {}
        }
        self.finish(place, result)
    }

    /// Whether the operation at `place` is held, which `error` has ended.
    fn holds(&self, place: u32, error: &io::Error) -> bool {
        let operation = self.flights[place as usize]
            .as_ref()
            .map(|flight| flight.operation);
        let can_be_repeated = match operation {
            // Through a page cache, the error can be that of earlier writes, which are lost.
            Some(Operation::Write { durable, .. }) => !durable || self.file.is_direct(),
            Some(Operation::Read { .. }) => true,
            Some(Operation::Sync | Operation::Discard { .. }) | None => false,
        };
        can_be_repeated && self.file.policy().holds(error)
    }

    /// Tries all others that are held because storage was full.
    fn try_those_that_follow(&mut self) {
        let all = std::mem::take(&mut self.held);
        let (full, others): (Vec<_>, _) = all.into_iter().partition(|held| is_full(&held.error));
        self.held = others;
        for Held { place, .. } in full {
            self.launch(place);
        }
    }

    /// Takes an operation from its place.
    fn vacate(&mut self, place: u32) -> Option<Flight<C>> {
        let flight = self.flights[place as usize].take()?;
        self.vacant.push(place);
        self.without_data -= u32::from(flight.buffer.is_none());
        Some(flight)
    }

    /// Leaves a ring of which all operations and watches have ended as it was.
    fn let_go(&self, ring: &mut IoUring) -> io::Result<()> {
        ring.completion().for_each(drop);
        ring.submitter().unregister_files()?;
        if self.registered {
            ring.submitter().unregister_buffers()?;
        }
        Ok(())
    }
}

impl<C> Drop for Engine<C> {
    fn drop(&mut self) {
        self.is_unheard = true;
        let drained = loop {
            while self.next_event().is_some() {}
            self.give_up_held();
            if self.in_flight() == 0 {
                break self.unwatch();
            }
            match self.wait() {
                Ok(()) => {}
                // The kernel lacks memory. What is in flight can still land, so who waits for this must not go on.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM)) => {
                    thread::sleep(SHORT_OF_MEMORY);
                }
                Err(error) => break Err(error),
            }
        };
        // SAFETY: it is taken once, here, and not used afterwards.
        let mut ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        let drained = drained.and_then(|()| self.let_go(&mut ring));
        if drained.is_ok() {
            self.rings.give(ring);
        }
        if let Err(error) = drained {
            // The kernel may still write into the pool, so its pages must outlive us.
            tracing::error!(%error, "io_uring cannot be drained; its buffers are left mapped");
            if let Ok(empty) = Pool::new(1) {
                std::mem::forget(std::mem::replace(&mut self.pool, empty));
            } else {
                std::process::abort();
            }
        }
    }
}

impl<C> std::fmt::Debug for Engine<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("file", &self.file)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

fn enter(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<()> {
    loop {
        match call() {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The completion queue is full: the caller reaps before it comes again.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Discards, with the page cache over the range.
///
/// Data in the cache that are not on the device yet make the kernel refuse (the exclusive claim that would let it drop
/// them belongs to the open file of the lock), so they are written first. If others are at the range all the same, it
/// is left as it is: a discard is a hint.
fn block_device_discard(file: &DataFile, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    let discard = || {
        // SAFETY: BLKDISCARD reads two u64 from the pointer, which is valid for that.
        match unsafe { libc::ioctl(file.as_fd().as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let busy =
        |result: &io::Result<()>| matches!(result, Err(error) if error.kind() == io::ErrorKind::ResourceBusy);
    let result = discard();
    if !busy(&result) {
        return result;
    }
    file.sync()?;
    let result = discard();
    if busy(&result) { Ok(()) } else { result }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Access, Backing, Fence};
    use rustix::event::{EventfdFlags, eventfd};
    use std::io::Write;

    fn data_of(size: u64) -> (tempfile::NamedTempFile, DataFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        (file, backing.data_file(512, &Fence::default()).unwrap())
    }

    fn engine_on(size: u64, pages: u32) -> (tempfile::NamedTempFile, Engine<u32>) {
        let (file, data) = data_of(size);
        (
            file,
            Engine::new(Arc::new(data), pages, &Engine::<u32>::rings(1).unwrap()).unwrap(),
        )
    }

    fn next_done(engine: &mut Engine<u32>) -> Done<u32> {
        loop {
            match engine.next_event() {
                Some(Event::Done(done)) => return done,
                Some(other) => panic!("{other:?}"),
                None => engine.wait().unwrap(),
            }
        }
    }

    /// A ring for everything reached what the filter of system calls refuses.
    #[test]
    fn a_ring_opens_neither_sockets_nor_files_and_gets_no_other_rules() {
        let mut ring = ring().unwrap();
        let refused = |ring: &mut IoUring, entry: squeue::Entry| {
            // SAFETY: what the entries point to is static.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            let result = ring.completion().next().unwrap().result();
            assert_eq!(result, -libc::EACCES, "{entry:?}");
        };
        refused(
            &mut ring,
            opcode::Socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0).build(),
        );
        let here = types::Fd(libc::AT_FDCWD);
        refused(
            &mut ring,
            opcode::OpenAt::new(here, c"/dev/null".as_ptr()).build(),
        );
        refused(&mut ring, opcode::Nop::new().build().flags(squeue::Flags::ASYNC));
        assert!(ring.submitter().register_personality().is_err());
        assert!(restrict(ring, &[opcode::Socket::CODE], &[]).is_err());
    }

    /// There are more operations than a ring has room for.
    #[test]
    fn what_does_not_fit_into_the_ring_is_done_all_the_same() {
        const PAGES: u32 = 2 * COMPLETIONS;
        let (_file, mut engine) = engine_on(u64::from(PAGES) * 4096, PAGES);
        for round in 0..2 {
            for page in 0..PAGES {
                let mut buffer = engine.buffer(4096).unwrap();
                let at = u64::from(page) * 4096;
                if round == 0 {
                    engine.bytes_mut(&mut buffer).fill(page.to_le_bytes()[0]);
                    engine.write(buffer, at, false, page);
                } else {
                    engine.read(buffer, at, page);
                }
            }
            let mut ended = vec![false; PAGES as usize];
            for _ in 0..PAGES {
                let done = next_done(&mut engine);
                done.result.unwrap();
                let buffer = done.buffer.unwrap();
                assert!(
                    engine
                        .bytes(&buffer)
                        .iter()
                        .all(|byte| *byte == done.context.to_le_bytes()[0])
                );
                assert!(!std::mem::replace(&mut ended[done.context as usize], true));
                engine.release(buffer);
            }
        }
    }

    /// The kernel was given more than the completion queue holds, and allocated memory for the rest.
    #[test]
    fn the_completion_queue_holds_the_ends_of_all_that_the_kernel_was_given() {
        const PAGES: u32 = 2 * COMPLETIONS;
        let data = DataFile::null().unwrap();
        let rings = Engine::<u32>::rings(1).unwrap();
        let mut engine = Engine::new(Arc::new(data), PAGES, &rings).unwrap();
        for page in 0..PAGES {
            let buffer = engine.buffer(4096).unwrap();
            engine.read(buffer, 0, page);
        }
        for _ in 0..PAGES {
            engine.submit().unwrap();
            assert!(!engine.ring.submission().cq_overflow());
        }
        for left in (0..PAGES).rev() {
            let done = next_done(&mut engine);
            done.result.unwrap();
            engine.release(done.buffer.unwrap());
            assert_eq!(engine.in_flight(), left as usize);
        }
    }

    /// It would turn in circles until the storage answers, as if there was something to submit.
    #[test]
    fn an_engine_with_a_full_ring_has_no_event_before_something_ends() {
        let (_file, mut engine) = engine_on(1 << 20, 1);
        let (pipe, mut end) = io::pipe().unwrap();
        engine.watch(0, pipe.as_fd());
        engine.submit().unwrap();
        let in_ring = std::mem::replace(&mut engine.in_ring, AT_ONCE);
        let buffer = engine.buffer(4096).unwrap();
        engine.read(buffer, 0, 7);
        assert!(!engine.has_event());
        end.write_all(b"x").unwrap();
        engine.wait().unwrap();
        assert!(matches!(engine.next_event(), Some(Event::Ready(0))));
        engine.in_ring = in_ring;
        assert_eq!(next_done(&mut engine).context, 7);
    }

    #[test]
    fn a_ring_that_comes_back_serves_the_next_engine() {
        let rings = Engine::<u32>::rings(1).unwrap();
        let number = || {
            let ring = rings.take().unwrap();
            let number = ring.as_raw_fd();
            rings.give(ring);
            number
        };
        let before = number();
        for _ in 0..3 {
            let (_file, data) = data_of(1 << 20);
            let mut engine = Engine::new(Arc::new(data), 16, &rings).unwrap();
            let (pipe, mut end) = io::pipe().unwrap();
            engine.watch(0, pipe.as_fd());
            end.write_all(b"x").unwrap();
            let buffer = engine.buffer(4096).unwrap();
            engine.read(buffer, 0, 1);
            drop(engine);
        }
        assert_eq!(number(), before);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let (_file, mut engine) = engine_on(1 << 20, 16);
        let mut buffer = engine.buffer(8192).unwrap();
        engine.bytes_mut(&mut buffer).fill(0xa5);
        engine.write(buffer, 4096, true, 1);
        let done = next_done(&mut engine);
        assert_eq!((done.context, done.result.is_ok()), (1, true));
        engine.release(done.buffer.unwrap());

        let buffer = engine.buffer(16384).unwrap();
        engine.read(buffer, 0, 2);
        let done = next_done(&mut engine);
        let buffer = done.buffer.unwrap();
        let expected = [[0; 4096], [0xa5; 4096], [0xa5; 4096], [0; 4096]].concat();
        assert_eq!(engine.bytes(&buffer), expected);
        assert_eq!(engine.in_flight(), 0);
    }

    #[test]
    fn a_read_past_the_end_is_an_error_not_a_short_success() {
        let (_file, mut engine) = engine_on(4096, 16);
        let buffer = engine.buffer(8192).unwrap();
        engine.read(buffer, 0, 0);
        assert!(next_done(&mut engine).result.is_err());
    }

    #[test]
    fn a_discarded_range_reads_as_zeros_and_a_sync_ends() {
        let (_file, mut engine) = engine_on(1 << 20, 16);
        let mut buffer = engine.buffer(4096).unwrap();
        engine.bytes_mut(&mut buffer).fill(1);
        engine.write(buffer, 0, false, 0);
        let buffer = next_done(&mut engine).buffer.unwrap();
        engine.discard(0, 4096, 1);
        next_done(&mut engine).result.unwrap();
        engine.sync(2);
        next_done(&mut engine).result.unwrap();
        engine.read(buffer, 0, 3);
        let buffer = next_done(&mut engine).buffer.unwrap();
        assert!(engine.bytes(&buffer).iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_watch_reports_every_signal_until_it_is_ended() {
        let (_file, mut engine) = engine_on(4096, 1);
        let signal = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        engine.watch(1, signal.as_fd());
        for _ in 0..3 {
            rustix::io::write(&signal, &1_u64.to_ne_bytes()).unwrap();
            engine.wait().unwrap();
            assert!(matches!(engine.next_event(), Some(Event::Ready(1))));
            rustix::io::read(&signal, &mut [0; 8]).unwrap();
        }
        engine.unwatch().unwrap();
        rustix::io::write(&signal, &1_u64.to_ne_bytes()).unwrap();
        engine.submit().unwrap();
        assert!(engine.next_event().is_none());
    }

    #[test]
    fn dropping_an_engine_waits_for_what_is_in_flight() {
        let (file, mut engine) = engine_on(1 << 20, 64);
        for number in 0..16 {
            let mut buffer = engine.buffer(16384).unwrap();
            engine.bytes_mut(&mut buffer).fill(0x5a);
            engine.write(buffer, u64::from(number) * 16384, false, number);
        }
        drop(engine);
        let content = std::fs::read(file.path()).unwrap();
        assert!(content[..16 * 16384].iter().all(|&byte| byte == 0x5a));
    }

    #[test]
    fn a_pool_of_any_load_never_lacks_a_place() {
        let (_file, mut engine) = engine_on(1 << 20, 8);
        for round in 0..50 {
            let mut started = 0;
            while let Some(buffer) = engine.buffer(512) {
                engine.read(buffer, 512 * round, 0);
                started += 1;
            }
            while engine.has_room_without_data() {
                engine.sync(1);
                started += 1;
            }
            assert_eq!(started, 8 + WITHOUT_DATA);
            for _ in 0..started {
                let done = next_done(&mut engine);
                done.result.unwrap();
                if let Some(buffer) = done.buffer {
                    engine.release(buffer);
                }
            }
        }
    }
}
