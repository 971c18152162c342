//! The path of a request, from the available ring to the used ring, in the order in which a request takes it.
//!
//! ```text
//! take      a chain from the available ring, parsed once into a request
//! issue     its pieces; for each the segment table is asked once, and what it says travels with the piece
//!             write   the cipher reads guest memory and fills a buffer, which goes to io_uring
//!             read    io_uring fills a buffer
//! complete  a piece; of a read, the cipher reads the buffer and fills guest memory
//! finish    the request: the status byte
//! publish   its head to the used ring
//! notify    the driver, once for all that a round has published
//! ```
//!
//! Memory is bounded by the pool, the table of tasks and the limits of a request; when one is exhausted, chains wait in the
//! available ring. So is the time that a stop takes: by what is in flight and the rest of one request. The common case makes
//! no allocation, takes no lock and writes no log line; when the path is walked, and when the thread sleeps, [`super::worker`]
//! says.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtio_queue::QueueT;
use vm_memory::VolatileSlice;

use super::blame::log_by_blame;
use super::disk::Disk;
use super::guest::Pieces;
use super::limits::MAX_PIECE_SECTORS;
use super::request::{BadRequest, Kind, Status, Target};
use super::ring::Ring;
use super::sigbus;
use super::task::{Piece, TaskIndex, Tasks, data_len};
use crate::cipher::{Reader, Workspace};
use crate::map::{Extent, SegmentTable};
use crate::storage::{Buffer, Done, Engine, PAGE};
use sealblk_secmem::arena::on_wiped_stack;

/// All that the requests of one ring pass through.
pub(super) struct RequestPath {
    pub ring: Ring,
    pub engine: Engine<Piece>,
    disk: Arc<Disk>,
    /// Where sectors lie and under which key. It does not change while the ring runs.
    table: Arc<SegmentTable>,
    write_through: bool,
    tasks: Tasks,
    /// The task that is being issued, if the pool was exhausted in the middle of it; no other is taken before.
    current: Option<TaskIndex>,
    /// The reader of the ciphertext: the device itself, or the kernel that puts it into the page cache.
    reader: Reader,
    /// The zeros that write-zeroes encrypts.
    zeros: Vec<u8>,
    workspace: Workspace,
    /// Whether something was put into the used ring since the driver was last notified.
    published: bool,
    /// Whether an earlier server of this ring may have died between the two, or the call failed.
    owes_notification: bool,
    stopping: bool,
    /// Set for good when the ring itself makes no sense.
    broken: bool,
}

impl RequestPath {
    pub(super) fn new(
        ring: Ring,
        disk: Arc<Disk>,
        table: Arc<SegmentTable>,
        engine: Engine<Piece>,
        write_through: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            workspace: Workspace::new().map_err(io::Error::other)?,
            reader: match disk.file.is_direct() {
                true => Reader::Device,
                false => Reader::Processor,
            },
            // By an earlier process, which may have ended before it did that. The used ring's index can be 0 again.
            owes_notification: ring.queue.next_used() != 0 || ring.resumption.is_some(),
            ring,
            engine,
            disk,
            table,
            write_through,
            tasks: Tasks::default(),
            current: None,
            zeros: vec![0; PAGE],
            published: false,
            stopping: false,
            broken: false,
        })
    }

    /// Takes chains off the available ring and issues them, while there is room: at most `most`, since a driver that gets
    /// chains back can offer them again for ever. Tells whether there was one.
    pub(super) fn take(&mut self, most: usize) -> bool {
        if !self.broken && sigbus::is_lost() {
            // Each access to what is not there costs a page of our own. The session ends.
            self.broken = true;
            self.disk.tell();
        }
        if let Some(task) = self.current.take() {
            self.issue(task);
        }
        let mut taken = false;
        for _ in 0..most {
            if !self.has_room() {
                break;
            }
            let chain = match self.ring.take() {
                Ok(Some(chain)) => chain,
                Ok(None) => break,
                Err(error) => {
                    self.broken_by_driver(&error);
                    break;
                }
            };
            taken = true;
            let Some(task) = self.tasks.take() else { break };
            let request = &mut self.tasks[task].request;
            let gathered = request.gather(chain);
            let (disk, sectors) = (&*self.disk, self.table.sectors());
            match request.parse(gathered, &self.ring.memory, Target { disk, sectors }) {
                Ok(()) => {
                    self.tasks[task].begin();
                    if let Err(error) = memory_is_whole() {
                        self.fail(task, &error);
                    }
                    self.issue(task);
                }
                Err(why) => self.refuse(task, why),
            }
        }
        taken
    }

    /// Issues what is left of a request; it becomes the current one if the pool is exhausted before its end.
    fn issue(&mut self, index: TaskIndex) {
        let task = &mut self.tasks[index];
        let all_issued = match task.request.kind {
            Kind::Read | Kind::Write | Kind::WriteZeroes => self.issue_transfers(index),
            Kind::Flush => self.issue_flush(index),
            Kind::Discard => self.issue_discards(index),
            Kind::Id => {
                task.written = task.request.write_id(&self.ring.memory, &self.disk.serial);
                true
            }
        };
        if !all_issued {
            self.current = Some(index);
            return;
        }
        let task = &mut self.tasks[index];
        task.all_issued = true;
        if task.in_flight == 0 {
            self.finish(index);
        }
    }

    /// Issues pieces until all are or the pool is exhausted; tells which.
    fn issue_transfers(&mut self, index: TaskIndex) -> bool {
        while let Some((first, sectors)) = self.tasks[index].next_sectors() {
            let extent = self.table.extent(first, sectors.min(MAX_PIECE_SECTORS));
            let Some(mut buffer) = self.engine.buffer(data_len(&extent)) else {
                return false;
            };
            let task = &mut self.tasks[index];
            let piece = task.next_piece(index, extent);

            if task.request.kind == Kind::Read {
                self.engine.read(buffer, extent.offset, piece);
            } else if let Err(error) = self.encrypt(&piece, &mut buffer) {
                self.engine.release(buffer);
                self.tasks[index].in_flight -= 1;
                self.fail(index, &error);
            } else {
                self.engine
                    .write(buffer, extent.offset, self.write_through, piece);
                if extent.sectors == MAX_PIECE_SECTORS {
                    // Storage works on it while the next one is encrypted. If this fails, the round's end reports it.
                    let _ = self.engine.submit();
                }
            }
        }
        true
    }

    /// Encrypts what the guest wrote, or zeros, into a buffer for storage.
    fn encrypt(&mut self, piece: &Piece, buffer: &mut Buffer) -> io::Result<()> {
        let request = &self.tasks[piece.task].request;
        let len = data_len(&piece.extent);
        let plain = if request.kind == Kind::WriteZeroes {
            zeros(&mut self.zeros, len as usize)
        } else {
            let plain = self.ring.memory.source(request.data(), piece.position, len);
            plain.map_err(io::Error::other)?
        };
        self.table.treatment(piece.extent.treatment).encrypt(
            piece.extent.iv,
            &plain,
            self.engine.bytes_mut(buffer),
            self.reader,
            &mut self.workspace,
        );
        memory_is_whole()
    }

    fn issue_flush(&mut self, index: TaskIndex) -> bool {
        // What was never written needs no flush; firmware asks for one all the same.
        if self.disk.read_only {
            return true;
        }
        if !self.engine.has_room_without_data() {
            return false;
        }
        let piece = self.tasks[index].next_piece(index, Extent::EMPTY);
        self.engine.sync(piece);
        true
    }

    fn issue_discards(&mut self, index: TaskIndex) -> bool {
        while let Some((first, sectors)) = self.tasks[index].next_sectors() {
            if !self.engine.has_room_without_data() {
                return false;
            }
            let extent = self.table.extent(first, sectors);
            let piece = self.tasks[index].next_piece(index, extent);
            self.engine.discard(extent.offset, extent.bytes(), piece);
        }
        true
    }

    /// A piece has ended: a read's data goes to the guest, and the request may be finished.
    pub(super) fn complete(&mut self, done: Done<Piece>) {
        let (piece, buffer) = (done.context, done.buffer);
        let decrypted = done.result.and_then(|()| self.decrypt(&piece, buffer.as_ref()));
        if let Err(error) = decrypted {
            self.fail(piece.task, &error);
        }
        if let Some(buffer) = buffer {
            self.engine.release(buffer);
        }
        let task = &mut self.tasks[piece.task];
        task.in_flight -= 1;
        if task.in_flight == 0 && task.all_issued {
            self.finish(piece.task);
        }
    }

    /// Decrypts what a read has brought into the guest's buffers.
    fn decrypt(&mut self, piece: &Piece, buffer: Option<&Buffer>) -> io::Result<()> {
        memory_is_whole()?;
        let request = &self.tasks[piece.task].request;
        if let (Kind::Read, Some(buffer)) = (request.kind, buffer) {
            let treatment = self.table.treatment(piece.extent.treatment);
            let cipher = self.engine.bytes(buffer);
            let len = data_len(&piece.extent);
            let written = self
                .ring
                .memory
                .fill(request.data(), piece.position, len, |plain| {
                    treatment.decrypt(piece.extent.iv, cipher, plain, &mut self.workspace);
                });
            written.map_err(io::Error::other)?;
        }
        memory_is_whole()
    }

    /// Writes the status byte.
    fn finish(&mut self, index: TaskIndex) {
        let task = &self.tasks[index];
        let used_len = task.used_len();
        if let Err(error) = task.request.write_status(&self.ring.memory, task.status) {
            tracing::debug!(queue = self.ring.index, %error, "the status byte is gone from the guest's memory");
        }
        self.publish(index, used_len);
    }

    /// Puts the head into the used ring, which gives the chain back to the driver.
    fn publish(&mut self, index: TaskIndex, used_len: u32) {
        let head = self.tasks[index].request.head;
        self.tasks.give_back(index);
        match self.ring.give_back(head, used_len) {
            Ok(()) => self.published = true,
            Err(error) => self.broken_by_driver(&error),
        }
    }

    /// Notifies the driver if it wants to be, once for all that was published.
    pub(super) fn notify(&mut self) {
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
            Err(error) => self.broken_by_driver(&error),
        }
    }

    /// A request has failed on storage, or on guest memory that is gone.
    fn fail(&mut self, index: TaskIndex, error: &io::Error) {
        let task = &mut self.tasks[index];
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
    fn refuse(&mut self, index: TaskIndex, why: BadRequest) {
        log_by_blame!(why.blame(), queue = self.ring.index, refusal = %why, "request refused");
        if why.may_be_of_another_disk() && !self.disk.mismatch_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                queue = self.ring.index,
                refusal = %why,
                "the guest takes this disk for another one; it keeps the size and the options (--read-only, --sector-size) \
                 of when it started: serve the disk as it was then, or restart QEMU (reported once)"
            );
        }
        match why.status() {
            Some(status) => {
                self.tasks[index].fail(status);
                self.finish(index);
            }
            None => self.publish(index, 0),
        }
    }

    /// Takes no more chains: a ring that makes no sense is not served until it is set up again. Other rings are not concerned.
    pub(super) fn broken_by_driver(&mut self, reason: &dyn Display) {
        if !self.broken {
            self.broken = true;
            tracing::warn!(queue = self.ring.index, %reason, "the driver broke this queue; it rests until it is reset");
        }
    }

    /// Takes no more chains, since no kick announces them.
    pub(super) fn retire(&mut self) {
        self.broken = true;
    }

    /// Takes no more chains, since the ring is to be given back. What an earlier process has left in flight counts as taken.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
    }

    /// Whether it was stopped, and no I/O is under way. If transfers are held, their requests, and those behind them, are left in flight.
    pub(super) fn is_drained(&self) -> bool {
        let is_left = || self.engine.held() > 0 || !self.takes_chains() && self.current.is_none();
        self.stopping && self.engine.under_way() == 0 && is_left()
    }

    /// How long a ring that is stopped waits for storage.
    pub(super) fn stop_limit(&self) -> Duration {
        match self.disk.held.is_landing() {
            true => self.disk.stop_limit.min(SOON),
            false => self.disk.stop_limit,
        }
    }

    /// Takes note of how many transfers are held.
    pub(super) fn report_held(&self) {
        let (held, error) = (self.engine.held(), self.engine.held_by());
        self.disk.held.set(self.ring.index, held, error);
    }

    /// Whether one more request can be taken.
    pub(super) fn has_room(&self) -> bool {
        self.takes_chains() && self.current.is_none() && self.tasks.has_vacant()
    }

    fn takes_chains(&self) -> bool {
        !self.broken && (!self.stopping || self.ring.is_resuming())
    }

    /// Asks for kicks, and looks once more whether a chain came before the driver saw that (virtio 1.2 §2.7.10).
    pub(super) fn has_more(&mut self) -> bool {
        if !self.has_room() {
            return false;
        }
        if self.ring.is_resuming() {
            return true;
        }
        let more = self.ring.enable_notification();
        more.unwrap_or_else(|error| {
            self.broken_by_driver(&error);
            false
        })
    }

    /// Whether the driver is to be notified, since the last time failed.
    pub(super) fn owes_notification(&self) -> bool {
        self.owes_notification
    }

    /// Logs an error of io_uring, which is not expected, and keeps this thread from a busy loop of them.
    pub(super) fn complain(&self, error: &io::Error) {
        tracing::error!(queue = self.ring.index, %error, "io_uring fails");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// How long a ring that is stopped waits for storage that does not answer another ring.
const SOON: Duration = Duration::from_secs(1);

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
