//! The data path: the life of a request, in order, on one thread for each virtqueue.
//!
//! ```text
//! take      a chain from the available ring, parsed once into a request
//! issue     its pieces, for each the extent that the segment table names:
//!             write   the cipher reads guest memory and fills a buffer, which goes to io_uring
//!             read    io_uring fills a buffer
//! complete  a piece: the cipher reads a read's buffer and fills guest memory; the buffer goes back
//! finish    the request: status byte, used ring
//! notify    the driver, once for all that was finished in a round
//! ```
//!
//! A [`Ring`] comes to the worker by value when the front-end starts it and goes back by value when it is stopped,
//! with nothing in flight: whoever wants to change what I/O stands on has to have the ring, and so has drained it.
//! Memory is bounded by the pool, the table of requests and [`super::request`]'s limits; when one is exhausted, chains
//! wait in the available ring. So is the time that a stop takes: by what is in flight and the rest of one request.

use std::fmt::Display;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, ReadWriteFlags};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, Permissions, VolatileSlice};

use super::call::Call;
use super::disk::Disk;
use super::guest::{HOW_TO_SHARE, Memory, Pieces, Position, pieces};
use super::limits::{MAX_PIECE, MAX_REQUESTS};
use super::polling::Polling;
use super::request::{BadRequest, Kind, Request, Status};
use super::sigbus;
use crate::cipher::{Reader, Sector, Workspace};
use crate::keys::arena::on_wiped_stack;
use crate::storage::{Buffer, Done, Engine, Event, PAGE};
use crate::volume::segment::{Extent, SegmentTable};

/// The most events, and the most chains, of a round. What a round has brought goes to storage and to the driver before
/// the next one begins: with long rounds, device and driver would idle while the worker works, and the other way round.
const ROUND: usize = 4;
/// With so many operations in flight, a worker sleeps rather than looks for what comes next.
const ENOUGH_IN_FLIGHT: usize = 4;
/// After how long without anything to do a worker goes on in a new thread.
const REST: Duration = Duration::from_secs(1);
/// So many kicks that find nothing are too many: one is the front-end's own, at the start.
const VAIN_KICKS: u64 = 2;

/// The numbers of the watched descriptors.
const KICK: u32 = 0;
const STOP: u32 = 1;

/// A started virtqueue, with all that a worker needs to serve it.
#[derive(Debug)]
pub(super) struct Ring {
    pub index: usize,
    pub queue: Queue,
    pub memory: Memory,
    pub kick: OwnedFd,
    pub call: Option<Call>,
}

impl Ring {
    /// Whether the driver has offered a chain that was not taken yet.
    fn has_chain(&self) -> bool {
        let offered = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        offered.is_ok_and(|offered| offered.0 != self.queue.next_avail())
    }

    /// Whether the driver wants to be notified of what was put into the used ring.
    fn needs_notification(&mut self) -> Result<bool, QueueError> {
        let wanted = self.queue.needs_notification(&*self.memory)?;
        if !wanted || self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        // virtio-queue leaves out the flag by which a driver that has no event index says that it does not.
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(QueueError::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

/// A virtqueue that is being served.
#[derive(Debug)]
pub(super) struct Running {
    thread: CurrentThread,
    stop: OwnedFd,
}

/// What comes back: the ring, and the engine unless it failed.
type Stopped = (Ring, Option<Engine<Piece>>);

/// The thread that a worker is at, which ends with the worker stopped, or with another one here.
type CurrentThread = Arc<Mutex<Option<JoinHandle<Option<Stopped>>>>>;

impl Running {
    /// Starts a thread that serves `ring` of `disk` by `table` with `engine`; with `write_through`, each write is on stable
    /// storage before it is answered.
    ///
    /// # Errors
    /// If descriptors or threads are exhausted.
    pub(super) fn start(
        ring: Ring,
        disk: Arc<Disk>,
        table: Arc<SegmentTable>,
        engine: Engine<Piece>,
        write_through: bool,
    ) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let shift = Shift {
            stop: stop.try_clone()?,
            worker: Worker::new(ring, disk, table, engine, write_through)?,
            thread: CurrentThread::default(),
        };
        let thread = Arc::clone(&shift.thread);
        shift.begin().map_err(|(error, _)| error)?;
        Ok(Self { thread, stop })
    }

    /// Has it take no more chains.
    pub(super) fn tell_to_stop(&self) {
        // A count that is full has told it already.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    /// Has it take no more chains, waits for what is in flight, and gives the ring back, and the engine unless it failed.
    pub(super) fn stop(self) -> Stopped {
        self.tell_to_stop();
        loop {
            let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
            match thread.expect("a worker has a thread").join() {
                Ok(Some(stopped)) => return stopped,
                Ok(None) => {}
                // Only where panics unwind, in tests.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    }
}

/// A worker, on its way from one thread to the next.
///
/// What io_uring does not do at once, as every sync, it has threads of its own do. The last of those stays as long as the
/// thread that it works for, and wakes up every 5 s all the while. So a worker that has nothing to do any more goes on
/// in a new thread, which the kernel has no thread for: an idle disk wakes nobody.
struct Shift {
    worker: Worker,
    stop: OwnedFd,
    thread: CurrentThread,
}

impl Shift {
    /// Starts the thread.
    fn begin(self) -> Result<(), (io::Error, Box<Self>)> {
        let (give, take) = mpsc::sync_channel::<Box<Self>>(1);
        let thread = std::thread::Builder::new().name(format!("queue-{}", self.worker.ring.index));
        let shift = Box::new(self);
        match thread.spawn(move || take.recv().ok().and_then(|shift| shift.run())) {
            Ok(thread) => {
                // Before it has anything to do, and so before it can end. The one that was here is at its end.
                *shift.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
                give.send(shift).expect("the thread waits for that");
                Ok(())
            }
            Err(error) => Err((error, shift)),
        }
    }

    /// Serves on this thread; nothing comes back if another one goes on.
    fn run(mut self) -> Option<Stopped> {
        let unwatched = loop {
            match self.worker.serve(&self.stop) {
                End::Stopped(unwatched) => break unwatched,
                End::Idle(Ok(())) => match self.begin() {
                    Ok(()) => return None,
                    // No thread is to be had: it stays with this one.
                    Err((_, shift)) => self = *shift,
                },
                // The watches are this thread's, and would end with it.
                End::Idle(Err(_)) => {}
            }
        };
        let Worker { ring, engine, .. } = self.worker;
        // An engine that still watches would wake the next worker for this one's kicks.
        Some((ring, unwatched.is_ok().then_some(engine)))
    }
}

/// A part of a request that is in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Its request's place in the table.
    place: u16,
    /// Where its data lies in the request's buffers.
    position: Position,
    first: Sector,
    /// Its length in bytes.
    len: u32,
}

/// A request in hand, and how far it has come.
#[derive(Debug)]
struct Task {
    request: Request,
    /// The range to be issued next, and how many of its sectors have been.
    range: usize,
    sectors_issued: u64,
    /// Where the data of the next piece lies.
    position: Position,
    all_issued: bool,
    in_flight: u32,
    status: Status,
    /// The bytes from the start of the device-writable part that were written.
    written: u32,
}

impl Task {
    fn new() -> Self {
        Self {
            request: Request::new(),
            range: 0,
            sectors_issued: 0,
            position: Position::default(),
            all_issued: false,
            in_flight: 0,
            status: Status::Ok,
            written: 0,
        }
    }

    /// Sets out to carry out the request that was parsed.
    fn begin(&mut self) {
        self.range = 0;
        self.sectors_issued = 0;
        self.position = self.request.data_start();
        self.all_issued = false;
        self.status = Status::Ok;
        self.written = if self.request.kind == Kind::Read {
            self.request.writable_len
        } else {
            0
        };
    }

    /// The sectors that are to be issued next.
    fn next_sectors(&mut self) -> Option<(Sector, u64)> {
        while let Some(range) = self.request.ranges.get(self.range) {
            if self.sectors_issued < range.sectors {
                return Some((
                    Sector(range.sector + self.sectors_issued),
                    range.sectors - self.sectors_issued,
                ));
            }
            self.range += 1;
            self.sectors_issued = 0;
        }
        None
    }

    /// Takes into account that a piece was issued.
    fn advance(&mut self, sectors: u64, len: u32) {
        self.sectors_issued += sectors;
        self.position = self.position.advanced(self.request.data(), len);
        self.in_flight += 1;
    }

    /// Issues nothing more of it.
    fn fail(&mut self, status: Status) {
        self.range = self.request.ranges.len();
        self.status = status;
        self.written = 0;
    }

    /// What the used ring says was written (virtio 1.2 §2.7.8.2): never more than really was, from the start of the
    /// device-writable part on. The status byte is the last of that part.
    fn used_len(&self) -> u32 {
        self.written + u32::from(self.written == self.request.writable_len)
    }
}

/// Why a thread serves no more: the ring is to be given back, or there is nothing to do; and whether its engine has ended
/// all watches, without which nobody else can use it.
enum End {
    Stopped(io::Result<()>),
    Idle(io::Result<()>),
}

struct Worker {
    ring: Ring,
    disk: Arc<Disk>,
    table: Arc<SegmentTable>,
    engine: Engine<Piece>,
    write_through: bool,
    tasks: Vec<Task>,
    vacant: Vec<u16>,
    /// The task that is being issued, if the pool was exhausted in the middle of it; no other is taken before.
    current: Option<u16>,
    /// A bit for each head that is in hand.
    heads: Vec<u64>,
    /// Who reads what is written: the device itself, or the kernel that puts it into the page cache.
    reader: Reader,
    /// The zeros that write-zeroes encrypts.
    zeros: Vec<u8>,
    workspace: Workspace,
    /// How often the driver kicked and had offered nothing yet.
    vain_kicks: u64,
    /// Whether something was put into the used ring since the driver was last notified.
    published: bool,
    /// Whether an earlier server of this ring may have died between the two, or the call failed.
    owes_notification: bool,
    stopping: bool,
    /// Set for good when the ring itself makes no sense.
    broken: bool,
    /// Whether this thread has done anything, and whether it has then been idle for long enough to end.
    worked: bool,
    rests: bool,
    /// The looks for the driver's next request, and for what storage brings.
    polling_driver: Polling,
    polling_storage: Polling,
}

impl Worker {
    fn new(
        ring: Ring,
        disk: Arc<Disk>,
        table: Arc<SegmentTable>,
        engine: Engine<Piece>,
        write_through: bool,
    ) -> io::Result<Self> {
        let owes_notification = ring.queue.next_used() != 0;
        let heads = vec![0; usize::from(ring.queue.size()).div_ceil(u64::BITS as usize)];
        let polling = || Polling::new(disk.poll_max);
        Ok(Self {
            workspace: Workspace::new().map_err(io::Error::other)?,
            polling_driver: polling(),
            polling_storage: polling(),
            reader: if disk.file.is_direct() {
                Reader::Device
            } else {
                Reader::Processor
            },
            ring,
            disk,
            table,
            engine,
            write_through,
            tasks: Vec::new(),
            vacant: Vec::new(),
            current: None,
            heads,
            zeros: vec![0; PAGE],
            vain_kicks: 0,
            published: false,
            owes_notification,
            stopping: false,
            broken: false,
            worked: false,
            rests: false,
        })
    }

    /// Serves until the ring is to stop, or until it has been idle for a while after this thread did something.
    fn serve(&mut self, stop: &OwnedFd) -> End {
        self.engine.watch(KICK, self.ring.kick.as_fd());
        self.engine.watch(STOP, stop.as_fd());
        (self.worked, self.rests) = (false, false);
        while !(self.rests || self.stopping && self.is_idle()) {
            let completed = self.complete();
            let taken = self.take();
            self.notify();
            if completed || taken || self.owes_notification || self.look() {
                self.worked = true;
                self.enter(Engine::submit);
            } else if !self.has_more() {
                self.sleep();
            }
        }
        let unwatched = self.engine.unwatch();
        if self.rests {
            End::Idle(unwatched)
        } else {
            End::Stopped(unwatched)
        }
    }

    /// Takes chains off the available ring and issues them, while there is room: no more than a round's, since a driver
    /// that gets chains back can offer them again for ever.
    fn take(&mut self) -> bool {
        if !self.broken && sigbus::is_lost() {
            // Each access to what is not there costs a page of our own. The session ends.
            self.broken = true;
            self.disk.tell();
        }
        if let Some(place) = self.current.take() {
            self.issue(place);
        }
        let mut taken = false;
        for _ in 0..ROUND {
            let Some(place) = self.vacant_place() else { break };
            let chain = match self
                .ring
                .queue
                .iter(&*self.ring.memory)
                .map(|mut chains| chains.next())
            {
                Ok(Some(chain)) => chain,
                Ok(None) => break,
                Err(error) => {
                    self.retire(&error);
                    break;
                }
            };
            taken = true;
            let head = chain.head_index();
            if head >= self.ring.queue.size() || self.heads[usize::from(head) / 64] & bit(head) != 0 {
                tracing::debug!(
                    queue = self.ring.index,
                    head,
                    "the driver offers a head that is not its to offer"
                );
                continue;
            }
            self.heads[usize::from(head) / 64] |= bit(head);
            self.vacant.pop();
            let task = &mut self.tasks[usize::from(place)];
            match task.request.parse(chain, &self.ring.memory, &self.disk) {
                Ok(()) => {
                    task.begin();
                    if let Err(error) = memory_is_whole() {
                        self.fail(place, &error);
                    }
                    self.issue(place);
                }
                Err(refusal) => self.refuse(place, refusal),
            }
        }
        taken
    }

    /// Issues what is left of a request; it becomes the current one if the pool is exhausted before its end.
    fn issue(&mut self, place: u16) {
        let all_issued = match self.task(place).request.kind {
            Kind::Read | Kind::Write | Kind::WriteZeroes => self.issue_transfers(place),
            Kind::Flush => self.issue_flush(place),
            Kind::Discard => self.issue_discards(place),
            Kind::Id => {
                let task = &mut self.tasks[usize::from(place)];
                task.written = task.request.write_id(&self.ring.memory, &self.disk.serial);
                true
            }
        };
        if !all_issued {
            self.current = Some(place);
            return;
        }
        self.task(place).all_issued = true;
        if self.task(place).in_flight == 0 {
            self.finish(place);
        }
    }

    /// Issues pieces until all are or the pool is exhausted; tells which.
    fn issue_transfers(&mut self, place: u16) -> bool {
        while let Some((first, sectors)) = self.task(place).next_sectors() {
            let sectors = sectors.min(MAX_PIECE / Sector::LEN);
            let Extent { sectors, offset, .. } = self.table.extent(first, sectors);
            let len = (sectors * Sector::LEN) as u32;
            let Some(mut buffer) = self.engine.buffer(len as usize) else {
                return false;
            };
            let task = self.task(place);
            let kind = task.request.kind;
            let piece = Piece {
                place,
                position: task.position,
                first,
                len,
            };
            task.advance(sectors, if kind == Kind::WriteZeroes { 0 } else { len });

            if kind == Kind::Read {
                self.engine.read(buffer, offset, piece);
            } else if let Err(error) = self.fill(piece, &mut buffer) {
                self.engine.release(buffer);
                self.task(place).in_flight -= 1;
                self.fail(place, &error);
            } else {
                self.engine.write(buffer, offset, self.write_through, piece);
                if u64::from(len) == MAX_PIECE {
                    // Storage works on it while the next one is encrypted. Where this fails, the round's end tells of it.
                    let _ = self.engine.submit();
                }
            }
        }
        true
    }

    /// Encrypts what the guest wrote, or zeros, into a buffer for storage.
    fn fill(&mut self, piece: Piece, buffer: &mut Buffer) -> io::Result<()> {
        let request = &self.tasks[usize::from(piece.place)].request;
        let plain = if request.kind == Kind::WriteZeroes {
            zeros(&mut self.zeros, piece.len as usize)
        } else {
            pieces(
                &self.ring.memory,
                request.data(),
                piece.position,
                piece.len,
                Permissions::Read,
            )
            .map_err(io::Error::other)?
        };
        let extent = self.table.extent(piece.first, u64::from(piece.len) / Sector::LEN);
        extent.treatment.encrypt(
            extent.iv,
            &plain,
            self.engine.bytes_mut(buffer),
            self.reader,
            &mut self.workspace,
        );
        memory_is_whole()
    }

    fn issue_flush(&mut self, place: u16) -> bool {
        // What was never written needs no flush; firmware asks for one all the same.
        if self.disk.read_only {
            return true;
        }
        if !self.engine.has_room_without_data() {
            return false;
        }
        self.engine.sync(Piece {
            place,
            position: Position::default(),
            first: Sector(0),
            len: 0,
        });
        self.task(place).in_flight += 1;
        true
    }

    fn issue_discards(&mut self, place: u16) -> bool {
        while let Some((first, sectors)) = self.task(place).next_sectors() {
            if !self.engine.has_room_without_data() {
                return false;
            }
            let Extent { sectors, offset, .. } = self.table.extent(first, sectors);
            let piece = Piece {
                place,
                position: Position::default(),
                first,
                len: 0,
            };
            self.engine.discard(offset, sectors * Sector::LEN, piece);
            self.task(place).advance(sectors, 0);
        }
        true
    }

    /// Handles what has happened since the last round.
    fn complete(&mut self) -> bool {
        let mut any = false;
        for _ in 0..ROUND {
            let Some(event) = self.engine.next_event() else {
                break;
            };
            any = true;
            match event {
                Event::Done(done) => self.land(done),
                Event::Ready(KICK) => self.consume_kick(),
                Event::Ready(_) => self.stopping = true,
                // A worker that hears of no stop has to stop by itself, and one that hears of no kick serves nobody.
                Event::Lost(number, error) => {
                    tracing::error!(queue = self.ring.index, number, %error, "io_uring watches a descriptor no more");
                    self.stopping |= number == STOP;
                    self.broken = true;
                }
            }
        }
        any
    }

    /// Resets the kick. Its count says nothing: the driver may have kicked for what was taken already.
    fn consume_kick(&mut self) {
        let mut count = [0; 8];
        // Without waiting, if somebody else was faster, whatever the front-end's flags say.
        let buffers = &mut [IoSliceMut::new(&mut count)];
        match rustix::io::preadv2(&self.ring.kick, buffers, u64::MAX, ReadWriteFlags::NOWAIT) {
            Ok(8) => self.kicked(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => self.retire(&format_args!("its kick cannot be read: {result:?}")),
        }
    }

    /// Looks whether a driver that kicks has ever offered anything. A front-end's own kick at the start may find nothing;
    /// but if the driver's finds nothing either, what it writes to its memory does not reach us.
    fn kicked(&mut self, times: u64) {
        if self.ring.queue.next_avail() == 0 && !self.ring.has_chain() {
            let before = self.vain_kicks;
            self.vain_kicks = before.saturating_add(times);
            if before < VAIN_KICKS && self.vain_kicks >= VAIN_KICKS {
                tracing::warn!(
                    queue = self.ring.index,
                    "the driver kicks and its queue is empty: the guest's memory may be private to the front-end; {HOW_TO_SHARE}"
                );
            }
        }
    }

    /// A piece has ended: a read's data goes to the guest, and the request may be finished.
    fn land(
        &mut self,
        Done {
            context: piece,
            buffer,
            result,
        }: Done<Piece>,
    ) {
        let place = piece.place;
        if let Err(error) = result.and_then(|()| self.deliver(piece, buffer.as_ref())) {
            self.fail(place, &error);
        }
        if let Some(buffer) = buffer {
            self.engine.release(buffer);
        }
        let task = self.task(place);
        task.in_flight -= 1;
        if task.in_flight == 0 && task.all_issued {
            self.finish(place);
        }
    }

    /// Decrypts what a read brought into the guest's buffers.
    fn deliver(&mut self, piece: Piece, buffer: Option<&Buffer>) -> io::Result<()> {
        memory_is_whole()?;
        let request = &self.tasks[usize::from(piece.place)].request;
        if let (Kind::Read, Some(buffer)) = (request.kind, buffer) {
            let plain = pieces(
                &self.ring.memory,
                request.data(),
                piece.position,
                piece.len,
                Permissions::Write,
            )
            .map_err(io::Error::other)?;
            // The table is the one that the piece was issued by: it does not change while a ring runs.
            let extent = self.table.extent(piece.first, u64::from(piece.len) / Sector::LEN);
            extent
                .treatment
                .decrypt(extent.iv, self.engine.bytes(buffer), &plain, &mut self.workspace);
        }
        memory_is_whole()
    }

    fn fail(&mut self, place: u16, error: &io::Error) {
        let task = &mut self.tasks[usize::from(place)];
        // Storage that cannot discard is no error: the driver learns that it need not ask.
        let unsupported =
            task.request.kind == Kind::Discard && error.raw_os_error() == Some(libc::EOPNOTSUPP);
        task.fail(if unsupported && task.status != Status::IoError {
            Status::Unsupported
        } else {
            Status::IoError
        });
        if !unsupported {
            let (kind, range) = (task.request.kind, task.request.ranges.first());
            tracing::error!(queue = self.ring.index, ?kind, ?range, %error, "I/O error on storage");
        }
    }

    /// Answers a chain that is not carried out.
    fn refuse(&mut self, place: u16, refusal: BadRequest) {
        if refusal == BadRequest::BadAddress {
            // The guest's fault, or not: it may have memory that the front-end did not tell us of.
            tracing::warn!(queue = self.ring.index, %refusal, "request refused; {HOW_TO_SHARE}");
        } else {
            // The guest's fault is not the operator's concern.
            tracing::debug!(queue = self.ring.index, %refusal, "request refused");
        }
        if refusal.may_be_of_another_disk() && !self.disk.mismatch_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                queue = self.ring.index,
                %refusal,
                "the guest takes this disk for another one; it keeps the size and the options (--read-only, --sector-size) \
                 of when it started: serve the disk as it was then, or start QEMU anew (told once)"
            );
        }
        match refusal.status() {
            Some(status) => {
                self.task(place).fail(status);
                self.finish(place);
            }
            None => self.publish(place, 0),
        }
    }

    fn finish(&mut self, place: u16) {
        let task = &self.tasks[usize::from(place)];
        let used_len = task.used_len();
        if let Err(error) = task.request.write_status(&self.ring.memory, task.status) {
            tracing::debug!(queue = self.ring.index, %error, "the status byte is gone from the guest's memory");
        }
        self.publish(place, used_len);
    }

    /// Puts the head into the used ring, which gives the chain back to the driver.
    fn publish(&mut self, place: u16, used_len: u32) {
        let head = self.task(place).request.head;
        self.heads[usize::from(head) / 64] &= !bit(head);
        self.vacant.push(place);
        match self.ring.queue.add_used(&*self.ring.memory, head, used_len) {
            Ok(()) => self.published = true,
            Err(error) => self.retire(&error),
        }
    }

    /// Notifies the driver if it wants to be, once for all that was published.
    fn notify(&mut self) {
        let owed = std::mem::take(&mut self.owes_notification);
        if !std::mem::take(&mut self.published) && !owed {
            return;
        }
        match self.ring.needs_notification() {
            // Without an event index the driver has said whether it waits for one.
            Ok(wanted) if wanted || owed && self.ring.queue.event_idx_enabled() => {
                if let Some(call) = &mut self.ring.call
                    && let Err(error) = call.signal()
                {
                    self.owes_notification = true;
                    self.complain(&error);
                }
            }
            Ok(_) => {}
            Err(error) => self.retire(&error),
        }
    }

    /// Looks for a while whether there is something to do.
    fn look(&mut self) -> bool {
        if self.engine.in_flight() >= ENOUGH_IN_FLIGHT || self.vacant_place().is_none() {
            return false;
        }
        let (ring, engine) = (&self.ring, &mut self.engine);
        let polling = match engine.in_flight() {
            0 => &self.polling_driver,
            _ => &self.polling_storage,
        };
        polling.look(|| engine.has_event() || ring.has_chain())
    }

    /// Sleeps until there is something to do. Whoever has enough in flight never looked, and learns nothing from it.
    fn sleep(&mut self) {
        let in_flight = self.engine.in_flight();
        let asleep = Instant::now();
        if in_flight == 0 && self.worked {
            self.enter(|engine| engine.wait_for(REST));
            self.rests = !self.engine.has_event() && asleep.elapsed() >= REST;
        } else {
            self.enter(Engine::wait);
        }
        match in_flight {
            0 => self.polling_driver.slept(asleep.elapsed()),
            1..ENOUGH_IN_FLIGHT => self.polling_storage.slept(asleep.elapsed()),
            _ => {}
        }
    }

    /// Asks for kicks, and looks once more whether a chain came before that was seen (virtio 1.2 §2.7.10).
    fn has_more(&mut self) -> bool {
        if self.vacant_place().is_none() {
            return false;
        }
        self.ring
            .queue
            .enable_notification(&*self.ring.memory)
            .unwrap_or_else(|error| {
                self.retire(&error);
                false
            })
    }

    /// A ring that makes no sense is served no more until it is set up anew; other rings go on.
    fn retire(&mut self, reason: &dyn Display) {
        if !self.broken {
            self.broken = true;
            tracing::warn!(queue = self.ring.index, %reason, "the driver broke this queue; it rests until it is reset");
        }
    }

    /// A place for one more request, or none while no chain is to be taken.
    fn vacant_place(&mut self) -> Option<u16> {
        if self.broken || self.stopping || self.current.is_some() {
            return None;
        }
        if self.vacant.is_empty() && self.tasks.len() < MAX_REQUESTS {
            self.vacant.push(self.tasks.len() as u16);
            self.tasks.push(Task::new());
        }
        self.vacant.last().copied()
    }

    fn is_idle(&self) -> bool {
        self.engine.in_flight() == 0 && self.current.is_none()
    }

    fn task(&mut self, place: u16) -> &mut Task {
        &mut self.tasks[usize::from(place)]
    }

    /// Has the kernel take submissions, or sleeps. An error is not expected; it must not become a busy loop.
    fn enter(&mut self, call: impl Fn(&mut Engine<Piece>) -> io::Result<()>) {
        if let Err(error) = call(&mut self.engine) {
            self.complain(&error);
        }
    }

    /// Tells of an error of io_uring, and keeps this thread from meeting the next one at once.
    fn complain(&mut self, error: &io::Error) {
        tracing::error!(queue = self.ring.index, %error, "io_uring fails");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `len` bytes of zeros, as pieces of one page.
fn zeros(page: &mut [u8], len: usize) -> Pieces<'_> {
    let page_len = page.len();
    let page = VolatileSlice::from(page);
    let mut pieces: Pieces<'_> = std::iter::repeat_n(page, len / page_len).collect();
    pieces.extend(page.subslice(0, len % page_len));
    pieces
}

/// Fails when the data that were just copied from or to guest memory were not all there.
fn memory_is_whole() -> io::Result<()> {
    if sigbus::is_lost() {
        // The signal came in the middle of a kernel, perhaps, and put its registers on this stack, round keys among them.
        on_wiped_stack(|| ());
        return Err(io::Error::other("the front-end has taken guest memory away"));
    }
    Ok(())
}

fn bit(head: u16) -> u64 {
    1 << (head % 64)
}
