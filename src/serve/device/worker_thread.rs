//! The thread of a [`Worker`]: how it starts, stops, and moves on when there is nothing to do.
//!
//! io_uring has threads of its own for what it cannot do at once, each sync among them. The last of those stays as long as the
//! thread that it works for, and wakes up every 5 s. So a worker that has had no work for a while continues in a new thread, for
//! which the kernel has no such thread: an idle disk wakes no processor.
//!
//! A ring that is stopped waits for storage, but not without end: the front-end does nothing else meanwhile, and a lock must come into
//! force. If storage does not answer, the ring goes back with its requests left in flight, and the thread continues to wait.
//! Until it is done, no ring of the disk is served.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Receiver, SyncSender};
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
    stopped: Receiver<Stopped>,
    /// What the ring's I/O is allowed by.
    _claim: Arc<Claim>,
}

/// What comes back: the ring, and the engine unless it failed, or storage does not answer it.
#[derive(Debug)]
struct Stopped {
    ring: Ring,
    engine: Option<Engine<Piece>>,
    /// Whether the thread waits for storage.
    is_landing: bool,
}

/// The thread that a worker is at, which ends with the worker stopped, or with another one here.
type CurrentThread = Arc<Mutex<Option<JoinHandle<()>>>>;

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
        let (give, stopped) = mpsc::sync_channel(1);
        let shift = Shift {
            stop: stop.try_clone()?,
            worker: Worker::new(ring, Arc::clone(&disk), table, engine, write_through)?,
            thread: CurrentThread::default(),
            stopped: give,
            disk,
            claim: Arc::clone(&claim),
        };
        let thread = Arc::clone(&shift.thread);
        shift.begin().map_err(|(error, _)| error)?;
        Ok(Self {
            thread,
            stop,
            stopped,
            _claim: claim,
        })
    }

    /// Has it take no more chains.
    pub(super) fn tell_to_stop(&self) {
        // A count that is full has told it already.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    /// Has it take no more chains, waits for what is in flight, and gives the ring back, and the engine unless it failed. If storage does
    /// not answer in time, the requests are left in flight, and the thread waits for storage by itself.
    pub(super) fn stop(self) -> (Ring, Option<Engine<Piece>>) {
        self.tell_to_stop();
        let stopped = match self.stopped.recv() {
            Ok(stopped) if stopped.is_landing => return (stopped.ring, None),
            stopped => stopped,
        };
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Err(panic) = thread.expect("a worker has a thread").join() {
            // Only where panics unwind, in tests.
            std::panic::resume_unwind(panic);
        }
        let stopped = stopped.expect("a thread that ends well has given its ring");
        (stopped.ring, stopped.engine)
    }
}

/// A worker, on its way from one thread to the next.
struct Shift {
    worker: Worker,
    stop: OwnedFd,
    thread: CurrentThread,
    stopped: SyncSender<Stopped>,
    disk: Arc<Disk>,
    claim: Arc<Claim>,
}

impl Shift {
    /// Starts the thread.
    fn begin(self) -> Result<(), (io::Error, Box<Self>)> {
        let (give, take) = mpsc::sync_channel::<Box<Self>>(1);
        let thread = std::thread::Builder::new().name(format!("queue-{}", self.worker.index()));
        let shift = Box::new(self);
        let run = move || {
            if let Ok(shift) = take.recv() {
                shift.run();
            }
        };
        match thread.spawn(run) {
            Ok(thread) => {
                // Before it has anything to do, and so before it can end. The one that was here is at its end.
                *shift.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
                give.send(shift).expect("the thread waits for that");
                Ok(())
            }
            Err(error) => Err((error, shift)),
        }
    }

    /// Serves on this thread, until the ring is stopped or another thread continues.
    fn run(mut self) {
        let unwatched = loop {
            match self.worker.serve(&self.stop) {
                End::Stopped(unwatched) => break unwatched,
                End::Idle(Ok(())) => match self.begin() {
                    Ok(()) => return,
                    // No thread can be started: it stays with this one.
                    Err((_, shift)) => self = *shift,
                },
                // The watches are this thread's, and would end with it.
                End::Idle(Err(_)) => {}
            }
        };
        let (ring, engine) = self.worker.into_parts();
        let is_landing = engine.in_flight() > 0;
        if !is_landing {
            // An engine that still watches would wake the next worker for this one's kicks.
            let engine = unwatched.is_ok().then_some(engine);
            let _ = self.stopped.send(Stopped {
                ring,
                engine,
                is_landing,
            });
            return;
        }
        // Nothing else may write to the storage before all of it has ended, so the claim stays as long. It is this thread that the kernel
        // works for.
        let landing = self.disk.landing(ring.index, engine.in_flight());
        let _ = self.stopped.send(Stopped {
            ring,
            engine: None,
            is_landing,
        });
        drop(engine);
        drop(self.claim);
        drop(landing);
    }
}
