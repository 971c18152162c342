//! A worker's rounds: what has happened goes to the path of its request, new chains are taken, the driver is notified. With
//! nothing to do the worker looks for work for a while ([`super::polling`]), and then sleeps.
//!
//! It waits in one place, for completions, for the driver's kick and for its own stop alike.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::disk::Disk;
use super::guest::HOW_TO_SHARE;
use super::path::RequestPath;
use super::polling::Polling;
use super::ring::Ring;
use super::task::Piece;
use crate::map::SegmentTable;
use crate::storage::{Engine, Event};

/// The most events, and the most chains, of a round. What a round has brought goes to storage and to the driver before
/// the next one begins: with long rounds, device and driver would idle while the worker works, and the other way round.
const ROUND: usize = 4;
/// With so many operations in flight, a worker sleeps rather than looks for what comes next.
const ENOUGH_IN_FLIGHT: usize = 4;
/// How often a transfer is tried that waits for space.
const PROBE: Duration = Duration::from_secs(1);
/// After how long without work a worker continues in a new thread.
const REST: Duration = Duration::from_secs(1);
/// So many kicks that find nothing are too many: one is the front-end's own, at the start.
const VAIN_KICKS: u64 = 2;

/// The numbers of the watched descriptors.
const KICK: u32 = 0;
const STOP: u32 = 1;

/// Why a thread serves no more: the ring goes back, or there is nothing to do; and whether its engine has ended all watches,
/// without which no other thread can use it.
pub(super) enum End {
    Stopped(io::Result<()>),
    Idle(io::Result<()>),
}

/// What comes after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Round,
    Sleep,
}

/// Serves a ring.
pub(super) struct Worker {
    pub(super) path: RequestPath,
    /// How often the driver kicked and had offered nothing yet.
    vain_kicks: u64,
    /// Whether this thread has done anything, and whether it has then been idle for long enough to end.
    worked: bool,
    rests: bool,
    /// How many transfers were held when that was last reported.
    held: usize,
    /// When one of them was last tried.
    probed: Instant,
    /// Since when the ring is to be stopped.
    told_to_stop: Option<Instant>,
    /// The looks for the driver's next request, and for what storage brings.
    polling_driver: Polling,
    polling_storage: Polling,
}

impl Worker {
    pub(super) fn new(
        ring: Ring,
        disk: Arc<Disk>,
        table: Arc<SegmentTable>,
        engine: Engine<Piece>,
        write_through: bool,
    ) -> io::Result<Self> {
        let polling = || Polling::new(disk.poll_max);
        Ok(Self {
            polling_driver: polling(),
            polling_storage: polling(),
            path: RequestPath::new(ring, disk, table, engine, write_through)?,
            vain_kicks: 0,
            held: 0,
            probed: Instant::now(),
            told_to_stop: None,
            worked: false,
            rests: false,
        })
    }

    /// The ring's number.
    pub(super) fn index(&self) -> usize {
        self.path.ring.index
    }

    /// What it was made of, to be served again.
    pub(super) fn into_parts(mut self) -> (Ring, Engine<Piece>) {
        self.path.engine.give_up_held();
        (self.path.ring, self.path.engine)
    }

    /// Serves until the ring is to stop, or until it has been idle for a while after this thread did something.
    pub(super) fn serve(&mut self, stop: &OwnedFd) -> End {
        self.begin(stop);
        while !(self.rests || self.path.is_drained() || self.gives_up()) {
            if self.round() == Next::Sleep {
                self.sleep();
            }
        }
        let unwatched = if self.path.engine.under_way() == 0 {
            self.path.engine.unwatch()
        } else {
            self.path.engine.forget_watches();
            Ok(())
        };
        if self.rests {
            End::Idle(unwatched)
        } else {
            End::Stopped(unwatched)
        }
    }

    pub(super) fn begin(&mut self, stop: &OwnedFd) {
        self.path.engine.watch(KICK, self.path.ring.kick.as_fd());
        self.path.engine.watch(STOP, stop.as_fd());
        (self.worked, self.rests) = (false, false);
    }

    /// What has happened goes to the path of its request, new chains are taken, the driver is notified.
    pub(super) fn round(&mut self) -> Next {
        let completed = self.complete();
        if self.held > 0 || self.path.engine.held() > 0 {
            self.tend_held();
        }
        let taken = self.path.take(ROUND);
        self.path.notify();
        if completed || taken || self.path.owes_notification() || self.look() {
            self.worked = true;
            self.enter(Engine::submit);
            Next::Round
        } else if self.path.has_more() {
            Next::Round
        } else {
            Next::Sleep
        }
    }

    /// Handles what has happened since the last round.
    fn complete(&mut self) -> bool {
        let mut any = false;
        for _ in 0..ROUND {
            let Some(event) = self.path.engine.next_event() else {
                break;
            };
            any = true;
            match event {
                Event::Done(done) => self.path.complete(done),
                Event::Ready(KICK) => self.kicked(),
                Event::Ready(_) => {
                    self.told_to_stop = Some(Instant::now());
                    self.path.stop();
                }
                // A worker that hears of no stop has to stop by itself, and one that hears of no kick serves nothing.
                Event::Lost(number, error) => {
                    tracing::error!(queue = self.index(), number, %error, "io_uring watches a descriptor no more");
                    if number == STOP {
                        self.path.stop();
                    }
                    self.path.retire();
                }
            }
        }
        any
    }

    /// Reports the transfers that storage has failed and that wait, and tries one of them from time to time.
    fn tend_held(&mut self) {
        let held = self.path.engine.held();
        if held != self.held {
            self.held = held;
            self.path.report_held();
        }
        if self.path.engine.wants_probe() && self.probed.elapsed() >= PROBE {
            self.probed = Instant::now();
            self.path.engine.probe();
        }
    }

    /// Whether storage has not answered for too long since the ring was to be stopped. If it does not answer another ring either, that
    /// is soon.
    fn gives_up(&self) -> bool {
        self.told_to_stop.is_some_and(|since| {
            since.elapsed() >= self.path.stop_limit() && self.path.engine.under_way() > 0
        })
    }

    /// Resets the kick. Its count says nothing of chains: the driver may have kicked for what was taken already.
    fn kicked(&mut self) {
        let times = match self.path.ring.take_kicks() {
            Ok(times) => times,
            Err(error) => return self.path.broken_by_driver(&error),
        };
        // A front-end's own kick at the start may find nothing; but if the driver's finds nothing either, what it writes to
        // its memory does not reach us.
        if self.path.ring.is_unused() {
            let before = self.vain_kicks;
            self.vain_kicks = before.saturating_add(times);
            if before < VAIN_KICKS && self.vain_kicks >= VAIN_KICKS {
                tracing::warn!(
                    queue = self.index(),
                    "the driver kicks and its queue is empty: the guest's memory may be private to the front-end; {HOW_TO_SHARE}"
                );
            }
        }
    }

    /// Looks for a while whether there is something to do.
    fn look(&mut self) -> bool {
        if self.path.engine.in_flight() >= ENOUGH_IN_FLIGHT || !self.path.has_room() {
            return false;
        }
        let (ring, engine) = (&self.path.ring, &mut self.path.engine);
        let polling = match engine.in_flight() {
            0 => &self.polling_driver,
            _ => &self.polling_storage,
        };
        polling.look(|| engine.has_event() || ring.has_chain())
    }

    /// Sleeps until there is something to do. A worker with enough in flight never looked, and learns nothing from it.
    pub(super) fn sleep(&mut self) {
        let in_flight = self.path.engine.in_flight();
        let asleep = Instant::now();
        if in_flight == 0 && self.worked {
            self.enter(|engine| engine.wait_for(REST));
            self.rests = !self.path.engine.has_event() && asleep.elapsed() >= REST;
        } else if self.path.engine.wants_probe() || self.told_to_stop.is_some() {
            self.enter(|engine| engine.wait_for(PROBE));
        } else {
            self.enter(Engine::wait);
        }
        match in_flight {
            0 => self.polling_driver.slept(asleep.elapsed()),
            1..ENOUGH_IN_FLIGHT => self.polling_storage.slept(asleep.elapsed()),
            _ => {}
        }
    }

    /// Has the kernel take submissions, or sleeps.
    fn enter(&mut self, call: impl Fn(&mut Engine<Piece>) -> io::Result<()>) {
        if let Err(error) = call(&mut self.path.engine) {
            self.path.complain(&error);
        }
    }
}
