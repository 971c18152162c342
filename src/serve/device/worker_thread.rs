//! The thread of a [`Worker`]: how it starts, stops, and moves on when there is nothing to do.
//!
//! io_uring has threads of its own for what it cannot do at once, each sync among them. The last of those stays as long as the
//! thread that it works for, and wakes up every 5 s. So a worker that has had no work for a while continues in a new thread, for
//! which the kernel has no such thread: an idle disk wakes no processor.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use super::disk::Disk;
use super::ring::Ring;
use super::task::Piece;
use super::worker::{End, Worker};
use crate::map::SegmentTable;
use crate::storage::{Claim, Engine};

/// The thread that serves a virtqueue.
#[derive(Debug)]
pub(super) struct WorkerThread {
    thread: CurrentThread,
    stop: OwnedFd,
    /// What the ring's I/O is allowed by.
    _claim: Arc<Claim>,
}

/// What comes back: the ring, and the engine unless it failed.
type Stopped = (Ring, Option<Engine<Piece>>);

/// The thread that a worker is at, which ends with the worker stopped, or with another one here.
type CurrentThread = Arc<Mutex<Option<JoinHandle<Option<Stopped>>>>>;

impl WorkerThread {
    /// Starts a thread that serves `ring` of `disk`, under `claim`, by `table` with `engine`; with `write_through`, each write is on stable
    /// storage before it is answered.
    ///
    /// # Errors
    /// If descriptors or threads are exhausted.
    pub(super) fn start(
        ring: Ring,
        disk: Arc<Disk>,
        claim: Arc<Claim>,
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
        Ok(Self {
            thread,
            stop,
            _claim: claim,
        })
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
struct Shift {
    worker: Worker,
    stop: OwnedFd,
    thread: CurrentThread,
}

impl Shift {
    /// Starts the thread.
    fn begin(self) -> Result<(), (io::Error, Box<Self>)> {
        let (give, take) = mpsc::sync_channel::<Box<Self>>(1);
        let thread = std::thread::Builder::new().name(format!("queue-{}", self.worker.index()));
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

    /// Serves on this thread; nothing comes back if another thread continues.
    fn run(mut self) -> Option<Stopped> {
        let unwatched = loop {
            match self.worker.serve(&self.stop) {
                End::Stopped(unwatched) => break unwatched,
                End::Idle(Ok(())) => match self.begin() {
                    Ok(()) => return None,
                    // No thread can be started: it stays with this one.
                    Err((_, shift)) => self = *shift,
                },
                // The watches are this thread's, and would end with it.
                End::Idle(Err(_)) => {}
            }
        };
        let (ring, engine) = self.worker.into_parts();
        // An engine that still watches would wake the next worker for this one's kicks.
        Some((ring, unwatched.is_ok().then_some(engine)))
    }
}
